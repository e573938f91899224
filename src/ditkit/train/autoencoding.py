"""Learning to code a signal and to decode it again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ditkit.core.codec import RepresentingCodec, VariationalCodec
from ditkit.core.cond import Cond
from ditkit.core.errors import ConfigError
from ditkit.train.objective import NOTHING, Batch, Objective
from ditkit.train.randomness import SampleRNG
from ditkit.train.schedules import weight_at
from ditkit.train.teacher import Answer, Held


@dataclass(frozen=True, kw_only=True)
class CodedBatch(Batch):
    """A batch, what came back of it, and the Gaussians [B, C, ...] that its latents were drawn from."""

    mean: Tensor
    log_variance: Tensor


@dataclass(frozen=True)
class Autoencoding(Objective):
    """A codec sees data, draws latents and decodes them (arXiv 2112.10752, section 3.1)."""

    supports_teacher: ClassVar[bool] = True

    def check(self, model: Any) -> None:
        for term in self.active:
            if missing := term.check(model):
                raise ConfigError(f"{type(term).__name__} needs {missing}")
        if not isinstance(model, VariationalCodec):
            raise ConfigError(
                f"Autoencoding: a {type(model).__name__} has no latents that are drawn, as ImageVae has"
            )

    def __call__(
        self,
        forward: Callable[..., Any],
        model: Any,
        data: Tensor,
        cond: Cond,
        rng: SampleRNG,
        held: Held = NOTHING,
    ) -> dict[str, Tensor]:
        noise, _, _ = rng.draws(model.latent_shape(tuple(data.shape[1:])))
        prediction, mean, log_variance = forward(data, noise.to(data.device))
        return self.weigh(
            CodedBatch(
                data=data,
                prediction=prediction.float(),
                taps={},
                mean=mean.float(),
                log_variance=log_variance.float(),
                rng=rng,
            ),
            held,
            judges(held),
        )


@dataclass(frozen=True, kw_only=True)
class DecodedBatch(Batch):
    """A batch, what was decoded of its noisy latents, and of clean ones, if an adversary looks at it."""

    clean: Tensor | None = None


@dataclass(frozen=True)
class Decoding(Objective):
    """A decoder sees noisy latents of a frozen encoder and gives the signal back (RAE, arXiv 2510.11690, section 3)."""

    supports_teacher: ClassVar[bool] = True

    def check(self, model: Any) -> None:
        for term in self.active:
            if missing := term.check(model):
                raise ConfigError(f"{type(term).__name__} needs {missing}")
        if not isinstance(model, RepresentingCodec):
            raise ConfigError(
                f"Decoding: a {type(model).__name__} has no frozen encoder, as RepresentationCodec has"
            )

    def __call__(
        self,
        forward: Callable[..., Any],
        model: Any,
        data: Tensor,
        cond: Cond,
        rng: SampleRNG,
        held: Held = NOTHING,
    ) -> dict[str, Tensor]:
        noise, _, _ = rng.draws(model.latent_shape(tuple(data.shape[1:])))
        u = rng.of_term("Decoding")[:, 0].to(data.device, data.dtype)
        noise, clean = noise.to(data.device), None
        prediction = forward(data, noise, u)
        if held.opponents is not None:
            with torch.no_grad():
                clean = forward(data, noise, torch.zeros_like(u)).float()
        batch = DecodedBatch(data=data, prediction=prediction.float(), taps={}, rng=rng, clean=clean)
        return self.balanced(model, self.weigh(batch, held, judges(held)), held.step)

    def balanced(self, model: Any, losses: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Scale an adversary's loss to the gradient that the others have at the decoder's last layer."""
        active = self.active_at(step)
        for term in (term for term in active if term.balanced):
            own = losses[type(term).__name__]
            if not own.requires_grad:  # it does not tell the decoder yet
                continue
            others = [weight_at(t.weight, step) * losses[type(t).__name__] for t in active if t is not term]
            rest = torch.stack(others).sum()
            scale = term.balance(rest, own, model.last_weight)
            losses |= {"loss": rest + weight_at(term.weight, step) * scale * own}
        return losses


def judges(held: Held) -> dict[str, Answer | None]:
    """Give each term its frozen network itself, as the answer: it is asked with gradients of what was decoded."""
    return {name: Answer(network, {}) for name, network in held.teachers.items()}
