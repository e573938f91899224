"""Switch-DiT (arXiv 2403.09176): a DiT whose blocks are given x (1 + a mixture of experts that the noise-time chooses).

B batch, L tokens, D width, M experts a block, k active, N blocks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditkit.core.checkpoint import read_state
from ditkit.core.config import Count
from ditkit.core.errors import ConfigError
from ditkit.core.policy import Policy
from ditkit.core.run import DIRECT, Run, Site
from ditkit.models.dit import DiT, DiTConfig, renamed
from ditkit.nn.blocks import Block, Stack
from ditkit.nn.experts import Experts
from ditkit.nn.task_windows import TASKS


@dataclass(frozen=True)
class SwitchDiTConfig(DiTConfig):
    """Architecture and convention of a Switch-DiT.

    Args:
        size: height and width of a picture.
        patch: side of a token.
        channels: of a sample.
        width: of a token's vector.
        depth: number of blocks.
        heads: of attention.
        classes: labels, without the null class.
        label_dropout: share of training samples whose label is replaced by the null class.
        class_names: one a class, or empty.
        experts: of a block.
        active: experts of a block that a noise-time chooses; more than half of them leave a path that all share.
    """

    experts: Count = 3
    active: Count = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.active > self.experts:
            raise ConfigError(
                f"SwitchDiT: active={self.active} of experts={self.experts}, expected no more than a block has"
            )


class Routes(NamedTuple):
    """The output of a `route` site.

    Args:
        p: probabilities of each block's experts, [B, N, M], of the samples' times.
        active: of a block's experts, the number that is chosen.
        tasks: gives the probabilities of all tasks, [1000, N, M], without gradient.
    """

    p: Tensor
    active: int
    tasks: Callable[[], Tensor]


class SwitchBlock(Block):
    """A DiT's block on x M with x (1 - M) added back, M = 1 + sum over the chosen experts of p_m (x A_m + a_m).

    The residual stream is not scaled: with o = M - 1, block(x + o x) - o x is x and what attention and MLP make of
    x + o x. Experts are 0 at first, so a fresh block is a DiT's.
    """

    def __init__(self, width: int, heads: int, experts: int, active: int) -> None:
        super().__init__(width, heads)
        self.active = active
        self.gate = nn.Linear(width, experts)
        self.experts = Experts(experts, width)

    def mix(self, x_BLD: Tensor, p_BM: Tensor) -> Tensor:
        """Compute o, [B, L, D], row by row."""
        return self.experts(x_BLD, p_BM, self.active)

    def forward(  # type: ignore[override]
        self, x_BLD: Tensor, c_BD: Tensor, p_BM: Tensor, run: Run = DIRECT, at: str = "blocks.0"
    ) -> Tensor:
        beside = run.site(at + ".experts", self.mix, x_BLD, p_BM) * x_BLD
        return super().forward(x_BLD + beside, c_BD, None, run, at) - beside

    def sites(self, at: str, stream: str = "image", stage: int = 0) -> list[Site]:
        block, *inside = super().sites(at, stream, stage)
        return [block, block._replace(name=f"{at}.experts", kind="branch"), *inside]


class RoutedStack(Stack):
    """Blocks each of which is given its own probabilities of [B, N, M]."""

    def of_block(self, i: int, args: tuple[Any, ...]) -> tuple[Any, ...]:
        c, p_BNM = args
        return c, p_BNM[:, i]


class SwitchDiT(DiT):
    """A DiT with experts that are routed by noise-time alone, alike for all tokens of a sample and for all classes."""

    Config = SwitchDiTConfig
    config: SwitchDiTConfig

    @classmethod
    def from_original(
        cls,
        source: str | Path | Mapping[str, Tensor],
        config: DiTConfig,
        policies: Sequence[Policy] = (),
    ) -> Self:
        """Weights in the naming of the Switch-DiT repository (`.safetensors`, or `.pt` of plain tensors).

        Its tables of tasks and of the prior, which are no weights, are dropped.

        Raises:
            CheckpointError: a tensor is missing, left over, of another shape or not finite.
        """
        state = source if isinstance(source, Mapping) else read_state(Path(source))
        kept = {name: v for name, v in state.items() if not TABLES.search(name)}
        ours = {_renamed(name): v for name, v in renamed(kept).items()}
        named = source if isinstance(source, str | Path) else "state dict"
        return cls.holding(config, ours, named, policies)

    def block(self) -> Block:
        c = self.config
        return SwitchBlock(c.width, c.heads, c.experts, c.active)

    def sites(self) -> tuple[Site, ...]:
        time, alone, tokens, *rest = super().sites()
        return (time, alone, tokens, Site("route", "route"), *rest)

    def through(self, x_BLD: Tensor, c_BD: Tensor, t: Tensor, run: Run) -> Tensor:
        routes = run.site("route", self.route, t)
        stack = RoutedStack(self.blocks, run, checkpointing=self.recomputes)
        out: Tensor = run.site("blocks", stack.beside, x_BLD, c_BD, routes.p)
        return out

    def route(self, t: Tensor) -> Routes:
        """Choose the experts of times [B], in the unit the convention names."""
        return Routes(self.probabilities(t), self.config.active, self.task_probabilities)

    def probabilities(self, t: Tensor) -> Tensor:
        """Compute p = softmax(gate(silu(e(t)))) of each block, [B, N, M]; e is the embedding of time without label."""
        blocks: Any = self.blocks
        e_BD = F.silu(self.time(t))
        logits = torch.stack([block.gate(e_BD) for block in blocks], 1)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)

    @torch.no_grad()
    def task_probabilities(self) -> Tensor:
        """Compute `probabilities` of all tasks: the indices of a discrete path, even noise-times of another."""
        convention, device = self.config.convention, self.time.inner.weight.device
        index = torch.arange(TASKS, device=device)
        t = convention.model_time(index if convention.discrete else (index + 1) / TASKS)
        with torch.autocast(device.type, enabled=False):
            return self.probabilities(t)


TABLES = re.compile(r"(^|\.)(full_time|_unit_mapping)$")
ORIGINAL_NAMES = {
    r"^routers\.(\d+)\.f_gate\.1\.": r"blocks.\1.gate.",
    r"^routers\.(\d+)\.experts\.w$": r"blocks.\1.experts.weight",
    r"^routers\.(\d+)\.experts\.b$": r"blocks.\1.experts.bias",
}


def _renamed(name: str) -> str:
    for pattern, ours in ORIGINAL_NAMES.items():
        name = re.sub(pattern, ours, name)
    return name
