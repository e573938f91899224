"""DiT's block with attention factorised in time and space (VDT, section 3.1).

B batch, F frames, n places of a frame, L = F n tokens in row-major order, R rows of them, S memory, D width.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ditkit.core.run import DIRECT, Run, Site
from ditkit.nn.axes import Clip
from ditkit.nn.blocks import KV, Attention, Mlp, attention, keep
from ditkit.nn.modulation import Parts, activated, affine, gate, modulate


class Scene(NamedTuple):
    """The context that every block of one call works in.

    Args:
        clip: where the tokens lie. valid: [B, F], frames that may be seen along time; None for all.
        memory: [B, S, D] tokens for cross-attention, seen where `known` [B, S] is true.
    """

    clip: Clip
    valid: Tensor | None = None
    memory: Tensor | None = None
    known: Tensor | None = None

    def rows(self, stream: str, index: Tensor) -> Scene:
        return self._replace(clip=self.clip.rows(stream, index))


class SceneTokens(NamedTuple):
    """Embedded tokens [B, L, D] and their scene: what a `tokens` site returns."""

    x: Tensor
    scene: Scene

    def rows(self, stream: str, index: Tensor) -> SceneTokens:
        return SceneTokens(self.x[:, index], self.scene.rows(stream, index))


class TemporalAttention(nn.Module):
    """W_fc MHA(LN x) of each place over time: no modulation, no gate, not zero at the start (VDT)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.fc = nn.Linear(width, width)

    def forward(self, run: Run, at: str, x_BLD: Tensor, clip: Clip, valid_BF: Tensor | None = None) -> Tensor:
        """Compute the branch."""
        mask = seen_over_time(clip, valid_BF, x_BLD.device)
        o = self.attn(clip.fold(self.norm(x_BLD), "T"), run, at, mask=mask)
        return self.fc(clip.unfold(o, "T"))


def seen_over_time(clip: Clip, valid_BF: Tensor | None, device: torch.device) -> tuple[Tensor, ...]:
    """Return the mask of attention over time, after folding: none, or one that broadcasts to [B n, N, F, F]."""
    line = clip.mask("T")
    if valid_BF is None:
        return () if line is None else (line,)
    valid_BL1 = valid_BF[:, clip.line("S", device), None]
    visible = clip.fold(valid_BL1, "T").mT[:, None]
    return (visible if line is None else visible & line,)


class CrossAttention(nn.Module):
    """Attention of tokens to a memory, MHA(LN x, memory), without modulation or gate.

    Args:
        norm: without it queries come from x as it is.
    """

    def __init__(self, width: int, heads: int, norm: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(
        self, run: Run, at: str, x_BLD: Tensor, memory_BSD: Tensor, known_BS: Tensor | None = None
    ) -> Tensor:
        """Compute the branch, row by row.

        At least one token of each sample's memory must be known; None: all are.
        """
        q = self.q(self.norm(x_BLD)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(memory_BSD).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        kv = run.site(at + ".kv", keep, KV(k, v))
        mask = () if known_BS is None else (known_BS[:, None, None],)
        o_BNLK = run.site(at + ".core", attention, q, kv.k, kv.v, *mask)
        return self.out(o_BNLK.transpose(1, 2).flatten(2))

    def sites(self, at: str, stage: int = 0, memory: str = "context") -> list[Site]:
        """Its sites in the branch `at`; `memory` is the stream of the memory, by default that of given frames."""
        kv = Site(f"{at}.kv", "kv", memory, self.out.in_features, self.heads, stage)
        return [kv, kv._replace(name=f"{at}.core", kind="core", stream="image", over=(memory,))]


class SpaceTimeBlock(nn.Module):
    """A temporal branch, then DiT's block with its attention inside each frame (VDT).

    Args:
        temporal: without it the block is DiT's on every frame alone.
        cross: attend to a memory between the frame's attention and the MLP.
    """

    def __init__(self, width: int, heads: int, temporal: bool = True, cross: bool = False) -> None:
        super().__init__()
        self.temporal_attn = TemporalAttention(width, heads) if temporal else None
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads)
        self.cross_attn = CrossAttention(width, heads) if cross else None
        self.mlp = Mlp(width)
        self.modulation = nn.Linear(width, 6 * width)

    def attend(self, run: Run, at: str, x_BLD: Tensor, parts: Parts | Tensor, clip: Clip) -> Tensor:
        """Compute the attention branch inside each frame, before its gate."""
        line = clip.mask("S")
        h_BLD = modulate(self.norm(x_BLD), *affine(parts, 0))
        o = self.attn(clip.fold(h_BLD, "S"), run, at, mask=() if line is None else (line,))
        return clip.unfold(o, "S")

    def feed(self, run: Run, at: str, x_BLD: Tensor, parts: Parts | Tensor) -> Tensor:
        """Compute the MLP branch before its gate, row by row."""
        return self.mlp(modulate(self.norm(x_BLD), *affine(parts, 1)), run, at)

    def forward(
        self, x_BLD: Tensor, c_BD: Tensor, scene: Scene, run: Run = DIRECT, at: str = "blocks.0"
    ) -> Tensor:
        parts = run.site(at + ".modulation", partial(Parts, self.modulation), activated(c_BD))
        temporal, attn = at + ".temporal_attn", at + ".attn"
        cross, mlp = at + ".cross_attn", at + ".mlp"
        if self.temporal_attn is not None:
            valid = () if scene.valid is None else (scene.valid,)
            over_time = partial(self.temporal_attn, run, temporal)
            x_BLD = x_BLD + run.site(temporal, over_time, x_BLD, scene.clip, *valid)
        branch = run.site(attn, partial(self.attend, run, attn), x_BLD, parts, scene.clip)
        x_BLD = torch.addcmul(x_BLD, gate(parts, 0), branch)
        if self.cross_attn is not None:
            look = partial(self.cross_attn, run, cross)
            x_BLD = x_BLD + run.site(cross, look, x_BLD, scene.memory, scene.known)
        branch = run.site(mlp, partial(self.feed, run, mlp), x_BLD, parts)
        return torch.addcmul(x_BLD, gate(parts, 1), branch)

    def sites(self, at: str, stream: str = "image", stage: int = 0) -> list[Site]:
        """Its sites in the order of the call, as wide as its layers are."""
        width = self.norm.normalized_shape[0]
        site = partial(Site, stream=stream, width=width, stage=stage)
        found = [site(at, "block"), site(f"{at}.modulation", "modulation")]
        if self.temporal_attn is not None:
            name = f"{at}.temporal_attn"
            inside = self.temporal_attn.attn.sites(name, stream, stage, attention="axial")
            found += [site(name, "branch"), *(inner._replace(axis="time") for inner in inside)]
        inside = self.attn.sites(f"{at}.attn", stream, stage, attention="axial")
        found += [site(f"{at}.attn", "branch"), *(inner._replace(axis="space") for inner in inside)]
        if self.cross_attn is not None:
            name = f"{at}.cross_attn"
            found += [site(name, "branch"), *self.cross_attn.sites(name, stage)]
        return [*found, site(f"{at}.mlp", "branch"), self.mlp.site(f"{at}.mlp", stream, stage)]
