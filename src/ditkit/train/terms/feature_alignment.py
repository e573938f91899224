"""Alignment of features: a block, projected, against a frozen encoder of the clean picture (REPA, arXiv 2410.06940)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditkit.core.config import Count
from ditkit.core.model import Model
from ditkit.core.run import Site
from ditkit.train.denoising import NoisyBatch
from ditkit.train.objective import Term
from ditkit.train.schedules import Weight
from ditkit.train.teacher import Ask, PictureTeacher, Teacher, picture_grid

DINOV2 = PictureTeacher("facebook/dinov2-base")
"""ViT-B/14 without registers: 86 M parameters, features of width 768."""


def projector(width: int, out: int, hidden: int = 2048) -> nn.Sequential:
    """Build REPA's three layers with SiLU between them, applied to each token."""
    return nn.Sequential(
        nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, out)
    )


@dataclass(frozen=True)
class FeatureAlignment(Term):
    """-cos(P(h), z), the mean over tokens: h the output of a block, z the encoder's token there (REPA, section 3.2).

    The encoder is given the clean picture, in the size in which its grid is the block's. With a weight that is
    `Between` it stops for good at a step, as HASTE has it: nothing of it is computed then, and the encoder is let go.

    Args:
        block: whose output is projected, counted from 1; 8 of 28 in SiT-XL/2.
        hidden: width of the projector, which is not saved with the model.
    """

    reads_pixels: ClassVar[bool] = True
    weight: Weight = 0.5
    block: Count = 8
    hidden: Count = 2048
    teacher: Teacher = DINOV2

    def site(self, sites: Sequence[Site]) -> Site:
        """Find the block."""
        return [site for site in sites if site.kind == "block"][self.block - 1]

    def check(self, model: Model) -> str:
        return checked_block(model, self.block) or checked_encoder(self.teacher)

    def taps(self, sites: Sequence[Site]) -> Sequence[str]:
        return [self.site(sites).name]

    def modules(self, model: Model) -> nn.Module:
        assert isinstance(self.teacher, PictureTeacher)
        return projector(self.site(model.sites()).width, self.teacher.facts().width, self.hidden)

    def asks(self, batch: NoisyBatch) -> Ask:
        return Ask(x=batch.pixels(), grid=picture_grid(batch.layout, self.site(batch.sites).stage))

    def loss(self, batch: NoisyBatch) -> Tensor:
        assert batch.taught is not None
        (tap,) = batch.taps.values()
        return unlike(batch.own(tap), batch.taught.out.tokens)


def unlike(own: Tensor, taught: Tensor) -> Tensor:
    """Return minus the mean cosine over tokens, [B] in float32 or wider, of features [B, L, D]."""
    wide = torch.promote_types(own.dtype, torch.float32)
    return -F.cosine_similarity(own.to(wide), taught.to(wide), dim=-1).mean(1)


def checked_block(model: Model, block: int) -> str:
    """Name what an alignment needs of a block, counted from 1, and the model has not; empty for nothing."""
    blocks = [site for site in model.sites() if site.kind == "block"]
    if block > len(blocks):
        return f"block {block}, counted from 1; the model has {len(blocks)}"
    if blocks[block - 1].stream != "image":
        return f"a block of the image's tokens alone; {blocks[block - 1].name!r} has text among its rows"
    return ""


def checked_encoder(teacher: Teacher) -> str:
    """Name the kind of teacher that an alignment needs; empty where it has one."""
    return "" if isinstance(teacher, PictureTeacher) else f"a PictureTeacher; got {teacher}"
