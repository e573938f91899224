"""A diffusers transformer as a denoiser: latents and times in, a prediction out, so that it trains like our own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from ditkit.core.cond import Cond
from ditkit.core.config import Finite, Share, check_fields
from ditkit.core.convention import Convention
from ditkit.core.errors import ConfigError, unknown
from ditkit.core.grid import Segment
from ditkit.core.model import Denoiser
from ditkit.core.run import DIRECT, Run
from ditkit.core.slot import Slot
from ditkit.data.latents import LatentSet
from ditkit.hosts.family import families, family
from ditkit.hosts.hosted import Host, HostConfig
from ditkit.hosts.inputs import Inputs
from ditkit.hosts.paths import path_of
from ditkit.hosts.view import running

FLOW = Convention()


@dataclass(frozen=True)
class HostDenoiserConfig(HostConfig):
    """The transformer, what it is trained on, and how.

    Args:
        convention: of its scheduler.
        shape: of a sample of latents, without the batch axis.
        rows: of text.
        label_dropout: share of training samples whose label or text is taken away.
        guidance: the scale that a network distilled from guidance is told.
    """

    convention: Convention = FLOW
    shape: tuple[int, ...] = ()
    rows: int = 0
    label_dropout: Share = 0.0
    guidance: Finite = 1.0

    def __post_init__(self) -> None:
        check_fields(self, self.name)


class HostDenoiser(Host, Denoiser):
    """A transformer as its pipelines call it; saved as a `Host`, which knows nothing of latents and prompts."""

    Config = HostDenoiserConfig
    config: HostDenoiserConfig
    nothing: Cond = Cond()
    """One row of the conditioning that stands in a dropped one's place."""

    @classmethod
    def of(
        cls,
        host: Host,
        samples: LatentSet,
        scheduler: Mapping[str, Any] | None,
        dropout: float | None = None,
        guidance: float = 1.0,
    ) -> Self:
        """Build it around the transformer of `host`, with all that was done to that.

        Args:
            samples: the latents that it is trained on. scheduler: the config of its pipeline's.
            dropout: by default 0.1, and 0 where nothing can stand in the place of a prompt.

        Raises:
            ConfigError: a dropout without that, or a scheduler of another path.
        """
        own = inputs_of(host.transformer)
        nothing = own.nothing(host.transformer) or samples.nothing
        absent = not _tensors(nothing)
        if absent and dropout:
            raise ConfigError(
                f"dropout={dropout} needs what stands in a dropped prompt's place; {samples.path} has no "
                "'negative_prompt_embeds', expected it, or dropout=0"
            )
        learns = _learns_variance(host.transformer, own)
        config = HostDenoiserConfig(
            host.config.name,
            host.config.arguments,
            shape=samples.shape,
            rows=samples.rows,
            label_dropout=(0.0 if absent else 0.1) if dropout is None else dropout,
            guidance=guidance,
        )
        model = cls.__new__(cls)
        model._set(config, host.transformer)
        model.nothing = nothing
        path = path_of(scheduler, own.flow, learns, model.picture_rows)
        model.config = replace(config, convention=path.convention)
        model.transforms, model.policies, model.learned = host.transforms, host.policies, host.learned
        model.history = host.history
        return model

    def _set(self, config: Any, transformer: nn.Module) -> None:
        super()._set(config, transformer)
        self.inputs.prepare(transformer)

    @property
    def inputs(self) -> Inputs:
        """The family's way of calling it."""
        return inputs_of(self.transformer)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return self.config.shape

    @property
    def picture_rows(self) -> int:
        """Tokens of a sample's picture or clip."""
        return next(s.length for s in self.layout(self.config.shape) if s.stream == "image")

    def layout(self, shape: tuple[int, ...]) -> tuple[Segment, ...]:
        text = torch.zeros(1, self.config.rows, 1)
        x, t = torch.zeros(1, *shape), torch.zeros(1)
        arguments = self.inputs.arguments(self.transformer, x, t, Cond(text=text), self.config.guidance)
        return family(self.transformer).layout(self.transformer, arguments)

    def unconditional(self, cond: Cond) -> Cond:
        """Every conditioning replaced by none.

        Raises:
            ConfigError: nothing is known that could stand in its place.
        """
        if not _tensors(self.nothing):
            raise ConfigError(
                f"{self.config.name}: nothing is known to stand in a prompt's place; expected a file with "
                "'negative_prompt_embeds'"
            )
        first = next(iter(_tensors(cond).values()))
        return self._dropped(
            replace(cond, drop=torch.ones(len(first), dtype=torch.bool, device=first.device))
        )

    def forward(self, x: Tensor, t: Tensor, cond: Cond, run: Run = DIRECT) -> Tensor:  # type: ignore[override]
        """Predict for latents x [B, C, ...] at t [B], by the convention of the config."""
        self._switch_checkpointing()
        cond, scale = self._dropped(cond), self.config.guidance
        arguments = self.inputs.arguments(self.transformer, x, t, cond, scale)
        with running(run):
            (out,) = self.transformer(**arguments, return_dict=False)
        return self.inputs.prediction(self.transformer, out, tuple(x.shape))

    def _dropped(self, cond: Cond) -> Cond:
        """Put nothing in the place of the conditioning of samples that `cond.drop` marks."""
        if cond.drop is None:
            return cond
        given, changed = _tensors(cond), dict[str, Any]()
        for name, row in _tensors(self.nothing).items():
            drop = cond.drop.view(-1, *[1] * (given[name].ndim - 1))
            changed[name] = torch.where(drop, row.to(given[name]), given[name])
        return replace(cond, **changed)

    def _switch_checkpointing(self) -> None:
        if self.recomputes != self.transformer.gradient_checkpointing:
            switch = "enable" if self.recomputes else "disable"
            getattr(self.transformer, f"{switch}_gradient_checkpointing")()

    def host(self) -> Host:
        """Return the transformer as `ditkit.load` gives it, without latents and prompts; nothing is copied."""
        bare = Host.around(self.transformer)
        bare.transforms, bare.policies, bare.learned = self.transforms, self.policies, self.learned
        bare.history = self.history
        return bare

    def as_teacher(self, given: Any) -> Any:
        """Return a transformer of the same class, asked with the same latents and prompts.

        Raises:
            ConfigError: it is of another class.
        """
        if not isinstance(given, Host) or given.config.name != self.config.name:
            name = given.config.name if isinstance(given, Host) else type(given).__name__
            raise ConfigError(f"a teacher is a {name}, expected a {self.config.name}")
        model = type(self).__new__(type(self))
        name, arguments = given.config.name, given.config.arguments
        model._set(replace(self.config, name=name, arguments=arguments), given.transformer)
        model.nothing, model.transforms = self.nothing, given.transforms
        model.policies, model.learned = given.policies, given.learned
        return model

    def with_weights(self, state: Mapping[str, Tensor], source: object) -> Self:
        copy = super().with_weights(state, source)
        copy.nothing = self.nothing
        return copy

    def sharing(self, state: Mapping[str, Tensor]) -> Self:
        copy = super().sharing(state)
        copy.nothing = self.nothing
        return copy

    def save(self, folder: str | Path, dtype: torch.dtype | None = None, history: Sequence[Any] = ()) -> Path:
        return self.host().save(folder, dtype, history)


def inputs_of(transformer: Any) -> Inputs:
    """Return a transformer's inputs in training.

    Raises:
        ConfigError: it has no view, or its family is not trained.
    """
    known = family(transformer).inputs
    if known is None:
        kinds = [
            type(home.INPUTS).__name__.removesuffix("Inputs")
            for home in families()
            if hasattr(home, "INPUTS")
        ]
        raise ConfigError(
            "train: " + unknown("family of transformers to train", type(transformer).__name__, kinds)
        )
    return known


def slots_of(transformer: Any) -> dict[str, Slot]:
    """Return the tensors that a training file of `transformer` has beside its latents."""
    return dict(inputs_of(transformer).slots(transformer))


def samples_of(transformer: Any, path: str | Path) -> LatentSet:
    """Read the file of latents that `transformer` can be trained on.

    Raises:
        ConfigError: its family is not trained. DataError: the file is missing, or does not fit.
    """
    channels, multiples = inputs_of(transformer).latents(transformer)
    return LatentSet(path, slots_of(transformer), channels, multiples)


def shift_for(model: HostDenoiser, scheduler: Mapping[str, Any] | None) -> float:
    """Return how far the scheduler moves times to noise, for samples of the model's size."""
    own = model.inputs
    learns = _learns_variance(model.transformer, own)
    return path_of(scheduler, own.flow, learns, model.picture_rows).shift


def _learns_variance(transformer: Any, own: Inputs) -> bool:
    channels = own.latents(transformer)[0]
    return not own.flow and transformer.config.out_channels == 2 * channels


def _tensors(cond: Cond) -> dict[str, Tensor]:
    held = {f.name: getattr(cond, f.name) for f in fields(Cond)}
    return {name: value for name, value in held.items() if isinstance(value, Tensor)}
