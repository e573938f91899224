"""Todyformer (arXiv 2402.05944): node embeddings of a graph of events, for its later links and the state of its nodes.

Message passing inside patches of time alternates with a transformer along each node's patches.

E events of a window, M patches, N nodes of the window, S tokens (a node in a patch), D width, P targets.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from ditkit.core.config import DEEPEST, FROM_DATA, Count, ModelConfig, Natural, Share, divides_into_heads
from ditkit.core.errors import ConfigError, ShapeError
from ditkit.core.model import Model
from ditkit.core.run import DIRECT, Run, Site
from ditkit.nn.blocks import Attention, Mlp, Stack
from ditkit.nn.edge_attention import EdgeAttention
from ditkit.nn.patches import COUNTS, Patches
from ditkit.nn.time_encoding import TimeEncoding

Positions = Literal["time", "index", "none"]
Readout = Literal["last", "mean"]
STREAM = "node"
"""The stream of all sites: tokens are nodes in patches."""
GROUP = re.compile(r"([LG]+)(?:\*(\d+))?")


@dataclass(frozen=True)
class TodyformerConfig(ModelConfig):
    """Architecture of a Todyformer; the defaults are the paper's size.

    Args:
        width: of a token's vector.
        heads: of both attentions.
        layout: blocks in their order, L for message passing inside patches and G for attention along a node's patches:
            "LG*3" alternates, "LLLGGG" does not, "L*3" in one patch is DyG2Vec.
        window: events that a prediction looks back at.
        patches: into which those are cut, in equal counts.
        neighbours: most recent events of a node that it hears of in a patch; 0 for all.
        positions: of a patch along a node's sequence: the age of its latest event, its learned index, or none.
        readout: a node's embedding is its token of the last patch it occurs in, or the mean of its tokens.
        dropout: of both branches of a G block and of the decoder.
        features: of an event.
        node_features: of a node.
        classes: of a node's state, which is then what is predicted; 0 to predict links.
    """

    task: ClassVar[str] = "graph"

    width: Count = 100
    heads: Count = 2
    layout: str = "LG*3"
    window: Count = 16_384
    patches: Count = 16
    neighbours: Natural = 0
    positions: Positions = "time"
    readout: Readout = "last"
    dropout: Share = 0.1
    features: Natural = field(default=0, metadata=FROM_DATA)
    node_features: Natural = field(default=0, metadata=FROM_DATA)
    classes: Natural = field(default=0, metadata=FROM_DATA)

    def __post_init__(self) -> None:
        super().__post_init__()
        divides_into_heads(self)
        if self.window < self.patches:
            raise ConfigError(
                f"Todyformer: window={self.window} should hold at least patches={self.patches} events"
            )
        kinds_of(self.layout)

    @classmethod
    def tiny(cls) -> Self:
        return cls(width=8, heads=2, layout="LG*2", window=64, patches=4)


def kinds_of(layout: str) -> str:
    """Write the blocks of a layout out one by one: "LG*2" is "LGLG".

    Raises:
        ConfigError: other letters, or no or too many blocks.
    """
    if not re.fullmatch(f"(?:{GROUP.pattern})+", layout):
        raise ConfigError(
            f"Todyformer: layout={layout!r} should be letters L (local) and G (global), such as LG*3"
        )
    counts = [(letters, int(times or 1)) for letters, times in GROUP.findall(layout)]
    blocks = sum(len(letters) * times for letters, times in counts)
    if not 1 <= blocks <= DEEPEST:
        raise ConfigError(f"Todyformer: layout={layout!r} has {blocks} blocks, expected 1 to {DEEPEST}")
    return "".join(letters * times for letters, times in counts)


class Todyformer(Model):
    """The encoder over one window, and a decoder of pairs of nodes or of nodes.

    Nothing tells one node from another but what happened around it, so nodes never met in training are embedded too.
    """

    Config = TodyformerConfig
    config: TodyformerConfig

    def __init__(self, config: TodyformerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.kinds = kinds_of(config.layout)
        self.first = nn.Parameter(0.02 * torch.randn(width))
        self.node_in = nn.Linear(config.node_features, width, bias=False) if config.node_features else None
        self.time = TimeEncoding(width) if "L" in self.kinds else None
        self.structure = EdgeStructure(COUNTS + config.features, width) if "L" in self.kinds else None
        make = {"L": LocalBlock, "G": GlobalBlock}
        self.blocks = nn.ModuleList(make[kind](config) for kind in self.kinds)
        self.norm = nn.LayerNorm(width)
        self.newcomer = nn.Parameter(0.02 * torch.randn(width))
        self.decoder = Decoder(config)

    def sites(self) -> tuple[Site, ...]:
        site = partial(Site, stream=STREAM, width=self.config.width)
        blocks = [site for i, block in enumerate(self.blocks) for site in block.sites(f"blocks.{i}")]  # type: ignore[operator]
        return (site("tokens", "tokens"), site("blocks", "stack"), *blocks, site("head", "head"))

    def forward(self, patches: Patches, targets: Tensor, run: Run = DIRECT) -> Tensor:
        """Predict the logit of each link [P], or those of each node's classes [P, classes].

        Args:
            patches: of the window, by `ditkit.nn.patches.patchify`.
            targets: [P, 2] ids of sources and destinations, or [P] ids of nodes; any nodes, in the window or not.

        Raises:
            ShapeError: targets of another shape, or features of another number than the config's.
        """
        of_nodes = self.config.classes > 0
        if targets.shape[1:] != (() if of_nodes else (2,)):
            wanted = "[P]" if of_nodes else "[P, 2]"
            raise ShapeError(f"Todyformer: targets {list(targets.shape)} should be {wanted}")
        return run.site("head", self.decoder, self.embed(patches, targets, run))

    def embed(self, patches: Patches, ids: Tensor, run: Run = DIRECT) -> Tensor:
        """Embed nodes by their ids [...], [..., D]; those outside of the window share a learned embedding."""
        self._check_features(patches)
        x, edges = run.site("tokens", self.tokenize, patches)
        stack = Stack(self.blocks, run, checkpointing=self.recomputes)
        x = run.site("blocks", stack.beside, x, patches, edges)
        table = torch.cat([self.norm(self.read_out(x, patches)), self.newcomer[None]])
        return table[patches.row_of(ids)]

    def tokenize(self, patches: Patches) -> tuple[Tensor, Tensor]:
        """Make the first tokens [S, D], and the tokens of edges: phi(age) + Omega(counts, features), [2 E, D]."""
        x = self.first_tokens(patches.node_features)[patches.node]
        if self.time is None or self.structure is None:
            return x, x[:0]
        own = torch.cat([patches.structure.log1p(), patches.features[patches.event]], -1)
        return x, self.time(patches.age)[patches.event] + self.structure(own)

    def first_tokens(self, node_features: Tensor) -> Tensor:
        """Add a learned constant and a map of the node's features, [N, D]."""
        constant = self.first.expand(len(node_features), -1)
        return constant if self.node_in is None else constant + self.node_in(node_features)

    def read_out(self, x: Tensor, patches: Patches) -> Tensor:
        """Reduce tokens [S, D] to one vector a node, [N, D]."""
        if self.config.readout == "last":
            return x[patches.last]
        share = 1 / torch.bincount(patches.node, minlength=len(patches.nodes)).to(x.dtype)
        return x.new_zeros(len(patches.nodes), x.shape[1]).index_add(
            0, patches.node, x * share[patches.node, None]
        )

    def _check_features(self, patches: Patches) -> None:
        for given, name, what in (
            (patches.features, "features", "an event"),
            (patches.node_features, "node_features", "a node"),
        ):
            if given.shape[1] != getattr(self.config, name):
                raise ShapeError(
                    f"Todyformer: {given.shape[1]} features {what}, expected {getattr(self.config, name)}"
                )


class EdgeStructure(nn.Module):
    """Omega: two layers over an edge's structural counts and features. It stands where identities of nodes would."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(channels, width)
        self.outer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.relu(self.inner(x)))


class LocalBlock(EdgeAttention):
    """Structure-aware tokens: one layer of message passing in every patch, with the same weights in all."""

    def __init__(self, config: TodyformerConfig) -> None:
        super().__init__(config.width, config.heads)

    def forward(  # type: ignore[override]
        self, x_SD: Tensor, patches: Patches, e_ED: Tensor, run: Run = DIRECT, at: str = "blocks.0"
    ) -> Tensor:
        gather = super().forward
        branch = run.site(f"{at}.edges", gather, x_SD, e_ED, patches.receiver, patches.sender)
        return torch.relu(x_SD + branch)

    def sites(self, at: str) -> list[Site]:
        """List its sites in the order of the call."""
        site = partial(Site, stream=STREAM, width=self.q.in_features)
        return [site(at, "block"), site(f"{at}.edges", "branch")]


class GlobalBlock(nn.Module):
    """A pre-norm transformer block along the patches of each node; no node sees another."""

    def __init__(self, config: TodyformerConfig) -> None:
        super().__init__()
        self.position = PatchPosition(config)
        self.norm_attn = nn.LayerNorm(config.width)
        self.attn = Attention(config.width, config.heads)
        self.norm_mlp = nn.LayerNorm(config.width)
        self.mlp = Mlp(config.width)
        self.dropout = nn.Dropout(config.dropout)

    def attend(self, run: Run, at: str, x_SD: Tensor, patches: Patches) -> Tensor:
        """Attend along each node's patches, packed to [N, M, D], where a padded slot is neither read nor returned."""
        present = patches.present()
        x_NMD = patches.pack(self.norm_attn(x_SD)).masked_fill(~present[..., None], 0)
        o_NMD = self.attn(x_NMD, run, at, mask=(present[:, None, None],))
        return self.dropout(patches.unpack(o_NMD))

    def feed(self, run: Run, at: str, x_SD: Tensor) -> Tensor:
        """Compute the MLP branch; row-wise, and on tokens only."""
        return self.dropout(self.mlp(self.norm_mlp(x_SD), run, at))

    def forward(
        self,
        x_SD: Tensor,
        patches: Patches,
        e_ED: Tensor | None = None,
        run: Run = DIRECT,
        at: str = "blocks.0",
    ) -> Tensor:
        x_SD = x_SD + self.position.of(patches)
        attn, mlp = f"{at}.attn", f"{at}.mlp"
        x_SD = x_SD + run.site(attn, partial(self.attend, run, attn), x_SD, patches)
        return x_SD + run.site(mlp, partial(self.feed, run, mlp), x_SD)

    def sites(self, at: str) -> list[Site]:
        """List its sites in the order of the call."""
        site = partial(Site, stream=STREAM, width=self.attn.out.in_features)
        attention = self.attn.sites(f"{at}.attn", STREAM, attention="axial")
        inner = self.mlp.site(f"{at}.mlp", STREAM)
        return [
            site(at, "block"),
            site(f"{at}.attn", "branch"),
            *attention,
            site(f"{at}.mlp", "branch"),
            inner,
        ]


class PatchPosition(nn.Module):
    """The addition of a G block to a token for its patch: a map of the patch's age, a vector of its index, or 0."""

    def __init__(self, config: TodyformerConfig) -> None:
        super().__init__()
        self.kind, self.patches = config.positions, config.patches
        self.time = TimeEncoding(config.width) if self.kind == "time" else None
        self.out = nn.Linear(config.width, config.width) if self.kind == "time" else None
        table = 0.02 * torch.randn(config.patches, config.width)
        self.table = nn.Parameter(table) if self.kind == "index" else None

    def of(self, patches: Patches) -> Any:
        """Return the position of each token, [S, D], or 0. The newest patch always has the last index."""
        if self.kind == "none":
            return 0
        index = torch.arange(self.patches - patches.length, self.patches, device=patches.patch.device)
        return self(patches.stamp, index)[patches.patch]

    def forward(self, stamp: Tensor, index: Tensor) -> Any:
        """Embed patches by their age in seconds [M] and index [M], [M, D]; 0 without positions."""
        if self.time is not None and self.out is not None:
            return self.out(self.time(stamp))
        return 0 if self.table is None else self.table[index]


class Decoder(nn.Module):
    """MLP([z_u | z_v]) to a logit, or MLP(z_u) to classes."""

    def __init__(self, config: TodyformerConfig) -> None:
        super().__init__()
        self.classes = config.classes
        self.inner = nn.Linear(config.width if config.classes else 2 * config.width, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.outer = nn.Linear(config.width, config.classes or 1)

    def forward(self, z: Tensor) -> Tensor:
        """Map [P, 2, D] to [P], or [P, D] to [P, classes]."""
        out = self.outer(self.dropout(torch.relu(self.inner(z if self.classes else z.flatten(1)))))
        return out if self.classes else out.squeeze(-1)


def dyg2vec(config: TodyformerConfig) -> TodyformerConfig:
    """Make the local-only rival of a config, DyG2Vec: as many layers of message passing, on the window as one patch."""
    return replace(config, layout=f"L*{kinds_of(config.layout).count('L')}", patches=1)
