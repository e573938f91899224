"""`generate`: samples of a model, by seed, class and given content."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ditkit.core.cond import Cond
from ditkit.core.model import Denoiser
from ditkit.sample.denoiser import Progress
from ditkit.sample.sampler import Sampler, Samples, Sampling


def generate(
    model: Denoiser,
    label: str | int | Sequence[str | int] | None = None,
    *,
    prompt: str | Sequence[str] | None = None,
    cond: Cond = Cond(),
    shape: Sequence[int] | None = None,
    sampling: Sampling = Sampling(),
    progress: Progress | None = None,
    **changes: Any,
) -> Samples:
    """Draw one sample a seed, the same alone and in a batch (to the rounding of the model).

    Args:
        label: a class by name or index, or one a seed; by default the seeds are spread over the classes.
        prompt: a text such as "a red apple", or one a seed, for a model that takes one; without one it draws what it
            draws unasked.
        cond: further conditioning of each sample, in the order of the seeds, such as given frames and their mask,
            which gives some of each sample; without one, all is generated.
        shape: of one sample (C, H, W) or (C, T, H, W); by default that of the given content, or the model's.
        sampling, changes: the settings, and words of `Sampling` that differ, such as `seeds=[0, 1], steps=25`.
        progress: called after each evaluation with (done, total).

    Raises:
        ConfigError: an unknown class, a prompt for a model without text, a seed given twice, a number out of range, a
            policy that does not fit.
        ConfigError, ShapeError: given content that cannot be completed, before anything is drawn.
        ConflictError, NoEffectError: two policies own one site; a policy saved nothing.
    """
    return Sampler.of(model, label, prompt=prompt, cond=cond, shape=shape, sampling=sampling, **changes).draw(
        progress
    )
