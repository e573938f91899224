"""Alignment of attention: a block's maps against those of a frozen encoder (HASTE, arXiv 2505.16792)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ditkit.core.config import Count
from ditkit.core.model import Model
from ditkit.core.run import Site
from ditkit.train.denoising import NoisyBatch
from ditkit.train.objective import Term
from ditkit.train.schedules import Weight
from ditkit.train.teacher import Ask, PictureTeacher, Teacher, picture_grid
from ditkit.train.terms.feature_alignment import DINOV2, checked_block, checked_encoder


@dataclass(frozen=True)
class AttentionAlignment(Term):
    """-sum_k p_k log softmax(q k^T / sqrt(K))_k, the mean over heads, queries and pairs of blocks (HASTE, section 3).

    p is the attention of the encoder's patches among themselves, in its last blocks; q and k are what the student's
    attention works with, after norms and rotations, of its first heads, as many as both have. Values and all after the
    scores learn nothing from it. In the published runs blocks 5 to 8 are paired with 9 to 12 of DINOv2-B.

    Args:
        block: the last that is compared, counted from 1. layers: how many there are.
    """

    reads_pixels: ClassVar[bool] = True
    weight: Weight = 0.5
    block: Count = 8
    layers: Count = 4
    teacher: Teacher = DINOV2

    def cores(self, sites: Sequence[Site]) -> list[Site]:
        """List the attentions of the blocks that are compared, in their order."""
        blocks = [site.name for site in sites if site.kind == "block"][self.block - self.layers : self.block]
        cores = [site for site in sites if site.kind == "core"]
        return [core for block in blocks for core in cores if core.name.startswith(f"{block}.")]

    def check(self, model: Model) -> str:
        if missing := checked_block(model, self.block) or checked_encoder(self.teacher):
            return missing
        if self.layers > self.block:
            return f"layers={self.layers} of the first block={self.block} blocks, expected no more"
        cores = self.cores(model.sites())
        plain = [core for core in cores if core.attention == "full" and not core.over]
        if len(plain) < self.layers or len(plain) < len(cores):
            return f"one attention over the image's tokens in each of blocks {self._range()}; it has {len(plain)}"
        if policy := _owner(model, [core.name for core in cores]):
            return f"the softmax of all scores in blocks {self._range()}; {policy} has another there"
        assert isinstance(self.teacher, PictureTeacher)
        facts = self.teacher.facts()
        if not facts.heads or facts.depth < self.layers:
            return f"an encoder with attention in {self.layers} blocks; {self.teacher.source!r} has {facts.depth}"
        return ""

    def _range(self) -> str:
        return f"{self.block - self.layers + 1} to {self.block}"

    def taps(self, sites: Sequence[Site]) -> Sequence[str]:
        return [f"{core.name}:{part}" for core in self.cores(sites) for part in "qk"]

    def asks(self, batch: NoisyBatch) -> Ask:
        grid = picture_grid(batch.layout, self.cores(batch.sites)[0].stage)
        return Ask(x=batch.pixels(), grid=grid, maps=self.layers)

    def loss(self, batch: NoisyBatch) -> Tensor:
        assert batch.taught is not None
        names = [core.name for core in self.cores(batch.sites)]
        maps = batch.taught.out.maps[-self.layers :]
        losses = []
        for name, taught in zip(names, maps, strict=True):
            heads = min(taught.shape[1], batch.taps[f"{name}:q"].shape[1])
            q, k = (batch.taps[f"{name}:{part}"][:, :heads] for part in "qk")
            losses.append(cross_entropy(scores(q, k), taught[:, :heads]))
        return torch.stack(losses).mean(0)


def scores(q: Tensor, k: Tensor) -> Tensor:
    """q k^T / sqrt(K) in float32 or wider, [B, N, L, L]; q is scaled first, which 16 bits could not hold later."""
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.to(wide) * q.shape[-1] ** -0.5 @ k.to(wide).mT


def cross_entropy(own: Tensor, taught: Tensor) -> Tensor:
    """Return the mean over heads and queries of -sum p log softmax(own), [B]; both [B, N, L, L]."""
    return -(taught.to(own.dtype) * own.log_softmax(-1)).sum(-1).mean((1, 2))


def _owner(model: Model, cores: Sequence[str]) -> str:
    """Name a policy of the model that replaces one of these attentions, or takes rows out; empty for none."""
    for policy in model.policies:
        claims = policy.claims(model.sites())
        if policy != policy.exact() and any(claims.get(name) == "own" for name in (*cores, "rows")):
            return str(policy)
    return ""
