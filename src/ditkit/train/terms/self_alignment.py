"""Self-alignment: an early block against a later one of an average of the weights (SRA, arXiv 2505.02831)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditkit.core.config import Count, Fraction
from ditkit.core.ddpm import DiscretePath
from ditkit.core.errors import ConfigError, unknown
from ditkit.core.model import Model
from ditkit.core.run import Site
from ditkit.train.denoising import NoisyBatch, time_axis
from ditkit.train.objective import Term
from ditkit.train.schedules import EpochDecay, Weight
from ditkit.train.teacher import Ask, EmaTeacher, Teacher

AVERAGE = EmaTeacher()
FADING = EpochDecay()
PAIRS = {"SiT-B": (3, 8), "SiT-L": (6, 16), "SiT-XL": (8, 20), "DiT-XL": (8, 16)}
"""Blocks of the student and of the teacher in the published runs, counted from 1."""
BETA = 0.05
"""Size of an error at which the smooth absolute error turns from a square into a line."""

Distance = Literal["smooth_l1", "cosine", "l1", "l2"]


class AlignmentHead(nn.Module):
    """Linear(d, 2 d), SiLU, Linear(2 d, d'), of each token; only training has it."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, 2 * width), nn.Linear(2 * width, out)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.outer(F.silu(self.inner(x)))
        return out


@dataclass(frozen=True)
class SelfAlignment(Term):
    """D(g(h_m(x_t, t)), h_n(x_t', t') of an average of the weights), t' = max(t - u, 0) (SRA, section 3).

    The same data and noise, and the labels that the student was left with; u is uniform in [0, gap]. A discrete path of
    S steps goes back by a whole number below gap S, no further than to index 1, which is noisier than index 0 (the
    published code for DiT). The teacher stops after its block n. D is taken in float32 or wider, as a mean.

    Args:
        block: m, of the student, counted from 1. target: n, of the teacher.
        gap: the most that the teacher's time is nearer to the data. fixed: u is always the gap.
        distance: "smooth_l1" with beta 0.05 goes with a weight that fades, "cosine", 1 - cos, with a weight of 0.5
            (the authors' later advice).
        over: of the cosine; "tokens" is what the published code takes it over, for each channel.
        head: g is a head, which is not saved with the model; without it, g leaves features as they are.
        teacher: `LiveTeacher()` is the student itself, without gradients.
    """

    weight: Weight = FADING
    block: Count = 3
    target: Count = 8
    gap: Fraction = 0.2
    fixed: bool = False
    distance: Distance = "smooth_l1"
    over: Literal["channels", "tokens"] = "channels"
    head: bool = True
    teacher: Teacher = AVERAGE

    @classmethod
    def preset(cls, name: str, distance: Distance = "smooth_l1") -> Self:
        """Return a published run: SiT-B, SiT-L or SiT-XL at 256 pixels, or DiT-XL.

        Raises:
            ConfigError: the name is none of them.
        """
        if name not in PAIRS:
            raise ConfigError(unknown("SelfAlignment preset", name, PAIRS))
        block, target = PAIRS[name]
        fading = EpochDecay(0.04 if name.startswith("DiT") else 0.2)
        weight: Weight = 0.5 if distance == "cosine" else fading
        return cls(weight, block, target, distance=distance)

    def pair(self, sites: Sequence[Site]) -> tuple[Site, Site]:
        """Find the sites of the student's block and of the teacher's."""
        blocks = [site for site in sites if site.kind == "block"]
        return blocks[self.block - 1], blocks[self.target - 1]

    def check(self, model: Model) -> str:
        depth = sum(site.kind == "block" for site in model.sites())
        if max(self.block, self.target) > depth:
            return f"blocks {self.block} and {self.target}, counted from 1; the model has {depth}"
        own, other = self.pair(model.sites())
        if mixed := [site.name for site in (own, other) if site.stream != "image"]:
            return f"blocks of the image's tokens alone; {mixed[0]!r} has text among its rows"
        if own.stage != other.stage:
            return f"two blocks of one grid; {own.name!r} and {other.name!r} are of two"
        if not self.head and own.width != other.width:
            return f"a head from width {own.width} to {other.width}; head=False"
        return ""

    def taps(self, sites: Sequence[Site]) -> Sequence[str]:
        return [self.pair(sites)[0].name]

    def modules(self, model: Model) -> nn.Module | None:
        own, other = self.pair(model.sites())
        return AlignmentHead(own.width, other.width) if self.head else None

    def earlier(self, batch: NoisyBatch) -> Tensor:
        """Return the teacher's times, of the shape of the student's."""
        assert batch.rng is not None
        u = batch.rng.of_term("SelfAlignment")[:, 0].to(batch.t.device)
        u = torch.ones_like(u) if self.fixed else u
        u = u.reshape(-1, *(1,) * (batch.t.ndim - 1))
        if not isinstance(batch.path, DiscretePath):
            return (batch.t - self.gap * u).clamp_min(0)
        back = int(self.gap * batch.path.steps)
        return (batch.t - (u * back).long()).clamp(1, batch.path.steps - 1)

    def asks(self, batch: NoisyBatch) -> Ask:
        t, site = self.earlier(batch), self.pair(batch.sites)[1].name
        x = batch.path.mix(batch.data, batch.noise, t.to(batch.data.dtype), time_axis(t))
        return Ask(x=x, t=t, taps=(site,), stop=site)

    def loss(self, batch: NoisyBatch) -> Tensor:
        assert batch.taught is not None
        (own,), (taught,) = batch.taps.values(), batch.taught.taps.values()
        own = own if batch.own is None else batch.own(own)
        wide = torch.promote_types(own.dtype, torch.float32)
        return distance(own.to(wide), taught.to(wide), self.distance, self.over)


def distance(own: Tensor, taught: Tensor, kind: Distance, over: str = "channels") -> Tensor:
    """Mean distance of each sample's features, [B]; both [B, L, D]."""
    if kind == "cosine":
        return 1 - F.cosine_similarity(own, taught, dim=1 if over == "tokens" else -1).mean(-1)
    if kind == "smooth_l1":
        error = F.smooth_l1_loss(own, taught, reduction="none", beta=BETA)
    else:
        error = (own - taught).abs() if kind == "l1" else (own - taught).square()
    return error.flatten(1).mean(1)
