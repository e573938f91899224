"""The adversary of a representation autoencoder's decoder (RAE, arXiv 2510.11690, stage 1).

B batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from annotated_types import Gt
from torch import Tensor, nn

from ditkit.core.config import Count, Natural, check_fields
from ditkit.core.model import Model
from ditkit.nn.discriminator import TokenHeads, augmented
from ditkit.nn.encoders import PictureEncoder, Sides
from ditkit.train.autoencoding import DecodedBatch
from ditkit.train.objective import Term
from ditkit.train.schedules import Weight
from ditkit.train.teacher import PictureTeacher, Teacher

SIDE_PX = 224
"""Pixels along a side of what the frozen network sees."""


@dataclass(frozen=True)
class Adversarial(Term):
    """-mean D(aug(x)) of decoded pictures x, times a = |grad of the other terms| / |grad of this|, at most `most`.

    Gradients are those of the decoder's last layer. D is a head for each of some blocks of a frozen vision transformer,
    and learns by the hinge (relu(1 - D(given)) + relu(1 + D(decoded))) / 2, of pictures that are decoded without noise
    and rounded to 8 bits. Both are shifted and recoloured first. The weight's first step is D's: `Between(0.75, first,
    stop)`.

    Args:
        decoder_after: step from which the decoder is told, too; the paper's is two epochs after D's first.
        encoder: as `ditkit.nn.encoders` opens it; the paper's is DINO's ViT-S/8.
        blocks: of it, from 0, the last one first.
        kernel: of a head's second layer.
        most: that a may be.
    """

    balanced: ClassVar[bool] = True
    weight: Weight = 0.75
    decoder_after: Natural = 0
    encoder: str = "facebook/dino-vits8"
    blocks: tuple[int, ...] = (11, 2, 5, 8, 11)
    kernel: Count = 9
    most: Annotated[float, Gt(0)] = 1e4
    rate: float | None = None
    teacher: Teacher | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        check_fields(self, type(self).__name__)
        object.__setattr__(self, "teacher", PictureTeacher(self.encoder))

    def check(self, model: Model) -> str:
        if not hasattr(model, "last_weight"):
            return f"a decoder of a frozen encoder's tokens; got a {type(model).__name__}"
        facts = PictureTeacher(self.encoder).facts()
        if not self.blocks or not all(0 <= block < facts.depth for block in self.blocks):
            return f"blocks from 0 to {facts.depth - 1} of {self.encoder}; got {self.blocks}"
        if self.kernel % 2 == 0:
            return f"a kernel of an odd number of tokens; got {self.kernel}"
        return ""

    def modules(self, model: Model) -> nn.Module:
        width = PictureTeacher(self.encoder).facts().width
        return TokenHeads(width, self.kernel, len(self.blocks))

    def loss(self, batch: DecodedBatch) -> Tensor:
        if batch.step < self.decoder_after:
            return batch.data.new_zeros(len(batch.data))
        batch.own.eval()  # the norms of its layers are measured at its own steps
        return -self.logits(batch, batch.prediction, "decoder").mean(1)

    def balance(self, rest: Tensor, own: Tensor, weight: Tensor) -> Tensor:
        one, other = (torch.autograd.grad(loss, weight, retain_graph=True)[0].norm() for loss in (rest, own))
        return (one / (other + 1e-6)).clamp(0, self.most).detach()

    def opposed(self, batch: DecodedBatch) -> Tensor:
        assert batch.clean is not None
        batch.own.train()
        fake = ((batch.clean.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
        given, decoded = self.logits(batch, batch.data, "given"), self.logits(batch, fake, "decoded")
        return ((1 - given).relu().mean(1) + (1 + decoded).relu().mean(1)) / 2

    def logits(self, batch: DecodedBatch, x: Tensor, use: str) -> Tensor:
        """Return the logits of pictures after changes that are drawn for this use, [B, N]."""
        assert batch.rng is not None and batch.taught is not None
        encoder: PictureEncoder = batch.taught.out
        u = batch.rng.of_term(f"Adversarial {use}", 5).to(x.device)
        with torch.autocast(x.device.type, enabled=False):
            tokens = encoder.after_blocks(augmented(x.float(), u), _grid(encoder), self.blocks)
            found: Tensor = batch.own(tokens)
        return found


def _grid(encoder: PictureEncoder) -> Sides:
    return encoder.facts.grid or (SIDE_PX // encoder.facts.patch,) * 2
