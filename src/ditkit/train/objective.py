"""Objectives: weighted sums of terms over the predictions of one batch."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ditkit.core.cond import Cond
from ditkit.core.config import Checked
from ditkit.core.errors import ConfigError, unknown
from ditkit.core.grid import Segment
from ditkit.core.model import Model
from ditkit.core.policy import detached
from ditkit.core.run import Handler, Site
from ditkit.train.randomness import TERMS, SampleRNG, seed_of
from ditkit.train.schedules import Schedule, Weight, never, weight_at
from ditkit.train.taps import check_policies, site_of
from ditkit.train.teacher import Answer, Ask, Held, SelfTeacher, Teacher

NOTHING = Held()


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A batch and what the network said of it.

    Args:
        data: [B, ...] in float32, what is to be said. prediction: [B, ...].
        mask: 1 where content counts, broadcast to the data; None where all does.
        taps: outputs, or arguments, of the sites that the term reads, by the names that it asked for.
        sites: of the network.
        own: the term's modules. taught: what its teacher, or what it asked, said.
        cond, rng: what the network was told, and what is random about these samples.
        step: of the optimiser, from 0. layout: of the network's tokens.
        pool: the mean over the whole batch of a mean over these samples, which may be a part of it.
    """

    data: Tensor
    prediction: Tensor
    mask: Tensor | None = None
    taps: Mapping[str, Any]
    sites: Sequence[Site] = ()
    own: Any = None
    taught: Answer | None = None
    cond: Cond | None = None
    rng: SampleRNG | None = None
    step: int = 0
    layout: Sequence[Segment] = ()
    pool: Callable[[Tensor], Tensor] | None = None

    def pooled(self, values: Tensor) -> Tensor:
        """Return the mean over the whole batch of values [B] of these samples, whose gradient is that of their own.

        The mean over parts of a function of it has then the value and the gradient that the whole batch would give,
        however many parts and processes share it.
        """
        own = values.mean()
        return own if self.pool is None else own + (self.pool(own.detach()) - own.detach())

    def pixels(self) -> Tensor:
        """Return the signals [B, C, ...] that the data are, or that they code."""
        given = None if self.cond is None else self.cond.pixels
        return self.data if given is None else given

    def residual(self) -> Tensor:
        """Return what a perfect network would make zero, [B, ...]."""
        return self.data - self.prediction

    def counted(self, error: Tensor) -> Tensor:
        """`error` [B, ...] where content counts, and 0 elsewhere."""
        return error if self.mask is None else error * self.mask


class Feed(NamedTuple):
    """Handlers that give the network in training other states than its own, for a term that stands alone.

    Args:
        handlers: by site, around what policies do there. taps: sites whose outputs the loss reads.
        kept: further outputs by name, which the handlers fill in.
    """

    handlers: Mapping[str, Handler]
    taps: tuple[str, ...]
    kept: Mapping[str, Any]


class Term(Checked, ABC):
    """One part of the loss. At a step where its weight is 0 nothing of it is computed: no tap, no teacher, no data.

    A term with `opposed` is an adversary: an optimiser of its own, at `rate`, steps its modules on that loss at every
    `every`-th step; the network's loss, through `loss`, leaves them alone.
    """

    homes: ClassVar[tuple[str, ...]] = ("ditkit.train.terms",)
    teacher: Teacher | None = None
    """Who it compares the network with."""
    rate: float | None = None
    """Learning rate of an adversary's modules; None is the network's."""
    every: int = 1
    reads_pixels: ClassVar[bool] = False
    """True if it looks at the signal under latents, which data give only at steps where it has a weight."""
    on_given: bool = False
    """True if its mean is over given content, too, where others count 0."""
    alone: ClassVar[bool] = False
    """True if the network is run in pieces for it, by `feed`, after its teacher: no other term can share the pass."""
    strata: int = 0
    """Equal parts of noise-time of which every batch has to hold as many samples; 0 if it may hold any."""
    weight: Weight

    @property
    def needs_teacher(self) -> bool:
        """Return whether it compares with the model that training goes on from."""
        return isinstance(self.teacher, SelfTeacher)

    def taps(self, sites: Sequence[Site]) -> Sequence[str]:
        """Names of the sites whose outputs the term needs; with ":in", ":q", ":k" or ":v", those arguments."""
        return ()

    def asks(self, batch: Any) -> Ask | None:
        """Something else than what the student was given and tapped, of its teacher or of the student."""
        return None

    def objective(self, given: Any) -> Any:
        """Return the objective in whose place a run takes another, of a term that is `alone`."""
        return given

    def feed(self, batch: Any) -> Feed:
        """Return what the network is given in this step, of a term that is `alone`; `batch.taught` is the teacher's."""
        raise NotImplementedError

    def followed(self, batch: Any) -> Mapping[str, Tensor]:
        """Return numbers for the log beside the loss, of a term that is `alone`."""
        return {}

    def modules(self, model: Model) -> nn.Module | None:
        """Projectors, heads, scalars, discriminators: trained, resumed, not shipped."""
        return None

    def balance(self, rest: Tensor, own: Tensor, weight: Tensor) -> Tensor:
        """Return the factor of its loss `own` beside that of the `rest`, by their gradients on a weight."""
        return torch.ones_like(own)

    def opposed(self, batch: Any) -> Tensor | None:
        """Return an adversary's loss of its own modules, [B]; the prediction and the taps carry no gradient."""
        return None

    balanced: ClassVar[bool] = False
    """True if an objective scales it by its `balance` with the other terms."""
    pools: ClassVar[bool] = False
    """True if its loss is a function of a mean over the whole batch, `Batch.pooled`."""

    def check(self, model: Model) -> str:
        """Name what the term needs and the model does not give; empty for nothing."""
        return ""

    def check_trained(self, model: Model) -> str:
        """Name what the term needs and the weights that are trained do not give; empty for nothing."""
        return ""

    def check_teacher(self, model: Model, teacher: Any) -> None:
        """Refuse a teacher of which the term asks something that it has not, before the first step.

        Raises:
            ConfigError: names what was given and expected.
        """

    @abstractmethod
    def loss(self, batch: Any) -> Tensor:
        """Return the unweighted loss of each sample of a `Batch`, [B]."""


@dataclass(frozen=True)
class Objective(ABC):
    """Weighted terms over one forward pass; a subclass says what the network is asked."""

    supports_teacher: ClassVar[bool] = False
    """True if a teacher, or the student anew, can be asked."""
    in_order: ClassVar[bool] = False
    """True if batches keep the order of the samples, as events in time need it, instead of being shuffled."""
    terms: tuple[Term, ...]

    def __post_init__(self) -> None:
        for term in self.terms:
            if not isinstance(term.weight, Schedule) and term.weight < 0:
                raise ConfigError(f"{type(term).__name__}: weight={term.weight} should not be negative")
        names = [type(term).__name__ for term in self.terms]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise ConfigError(f"Objective: {repeated[0]} is given twice; give it once, with a weight")
        if comparing := [
            type(term).__name__ for term in self.active if term.teacher and not self.supports_teacher
        ]:
            raise ConfigError(f"{type(self).__name__} has no teacher, which {comparing[0]} compares with")
        if not self.active:
            raise ConfigError("Objective: every term has weight 0, so there is nothing to learn")

    @abstractmethod
    def __call__(
        self,
        forward: Callable[..., Any],
        model: Model,
        data: Any,
        cond: Cond,
        rng: SampleRNG,
        held: Held = NOTHING,
    ) -> dict[str, Tensor]:
        """Mean loss of each active term, and their weighted sum under `loss`.

        Args:
            forward: what is called, `model` itself or a wrapper around it (DDP).
            data: [B, ...] float32, or what else the samples are, with `cond`, on the model's device.
            rng: all that is random about these samples.
            held: the step, and modules and teachers of the terms, on the same device.
        """

    def chosen(self) -> Objective:
        """Return the objective that a run takes: itself, or what its one term asks for.

        Raises:
            ConfigError: a term stands alone, and there are others.
        """
        names = [type(term).__name__ for term in self.active]
        lonely = [term for term in self.active if term.alone]
        if lonely and len(names) > 1:
            raise ConfigError(
                f"{type(lonely[0]).__name__} runs the network in pieces, which no other term can read; got "
                f"{', '.join(names)}, expected it alone"
            )
        found: Objective = lonely[0].objective(self) if lonely else self
        return found

    def begin(self, run: Any) -> Cursor | None:
        """Return what training steps through, where it is not one batch of the samples a step."""
        return None

    @property
    def active(self) -> tuple[Term, ...]:
        """Terms that have a weight at any step."""
        return tuple(term for term in self.terms if not never(term.weight))

    def active_at(self, step: int) -> tuple[Term, ...]:
        return tuple(term for term in self.terms if weight_at(term.weight, step))

    def reads_pixels(self, step: int) -> bool:
        """Return whether a term looks at the signal under latents at a step."""
        return any(term.reads_pixels for term in self.active_at(step))

    def check(self, model: Model) -> None:
        """Refuse a model that an active term cannot learn from, before the first step.

        Raises:
            ConfigError: the model is not of the kind that a term needs, or lacks a site that it reads; or those of
                `check_policies`.
        """
        sites = {site.name for site in model.sites()}
        for term in self.active:
            name = type(term).__name__
            if missing := term.check(model):
                raise ConfigError(f"{name} needs {missing}")
            for tap in term.taps(model.sites()):
                if site_of(tap) not in sites:
                    raise ConfigError(unknown(f"site that {name} reads:", site_of(tap), sites))
            if term.teacher is not None:
                term.teacher.check(model)
        check_policies(model, self.taps(model))

    def check_trained(self, model: Model) -> None:
        """Refuse weights, of which some are frozen, that an active term cannot teach, before the first step.

        Raises:
            ConfigError: names the term and what it needs.
        """
        for term in self.active:
            if missing := term.check_trained(model):
                raise ConfigError(f"{type(term).__name__} needs {missing}")

    def check_batch(self, batch: int) -> None:  # noqa: B027
        """Refuse a number of samples a step, over all processes, that it cannot be computed on.

        Raises:
            ConfigError: names what was given and expected.
        """

    def describe(self) -> dict[str, Any]:
        """Return what is minimised, as JSON has it."""
        own = {f.name: _plain(getattr(self, f.name)) for f in fields(self) if f.name != "terms"}
        return {"kind": type(self).__name__, **own, "terms": [_plain(term) for term in self.active]}

    def taps(self, model: Model, step: int | None = None) -> list[str]:
        """List what active terms read, at a step or at any."""
        terms = self.active if step is None else self.active_at(step)
        return sorted({name for term in terms for name in term.taps(model.sites())})

    def weigh(
        self, batch: Batch, held: Held = NOTHING, answers: Mapping[str, Answer | None] | None = None
    ) -> dict[str, Tensor]:
        """Mean loss of each term that has a weight at this step, and their weighted sum under `loss`.

        A term sees its own modules, its own taps and what it asked. Adversaries' batches go to `held.opponents`.
        """
        losses, weighted = {}, []
        for term in self.active_at(held.step):
            name = type(term).__name__
            wanted = term.taps(batch.sites)
            own = replace(
                batch,
                own=held.modules.get(name),
                taught=(answers or {}).get(name),
                taps={tap: batch.taps[tap] for tap in wanted},
                step=held.step,
                pool=None if held.pool is None else partial(held.pool, name),
            )
            losses[name] = term.loss(own).mean()
            weighted.append(weight_at(term.weight, held.step) * losses[name])
            if held.opponents is not None and type(term).opposed is not Term.opposed:
                held.opponents.append((term, cut(own)))
        if not weighted:
            raise ConfigError(f"Objective: every term has weight 0 at step {held.step}")
        return losses | {"loss": torch.stack(weighted).sum()}

    def make_modules(self, model: Model, seed: int) -> nn.ModuleDict:
        """Modules of the active terms, by their names; their first values follow from `seed` and the term's name."""
        own_modules = nn.ModuleDict()
        for term in self.active:
            name = type(term).__name__
            with torch.random.fork_rng(devices=()):
                torch.manual_seed(seed_of(seed, TERMS, zlib.crc32(name.encode())))
                own = term.modules(model)
            if own is not None:
                own_modules[name] = own
        return own_modules


class Cursor(ABC):
    """The position of an objective in its data, and what it remembers from one step of the optimiser to the next.

    Randomness belongs to the number of what is walked, not to the step, so that a resume goes on with the same.
    """

    rests: bool = True
    """True if nothing is under way, so that another number of processes may go on from here."""

    @abstractmethod
    def losses(self, step: int) -> dict[str, Tensor]:
        """Return the losses of the optimiser's next step by name, their sum under `loss`."""

    def state(self) -> Mapping[str, Tensor] | None:
        """All that it remembers, as tensors by name; None where it cannot be said until it rests."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Go on from a `state`."""


def cut(batch: Any) -> Any:
    """Return a batch whose tensors carry no gradient."""
    fields_of = {f.name: detached(getattr(batch, f.name)) for f in fields(batch) if f.name != "own"}
    return replace(batch, **fields_of)


def _plain(value: Any) -> Any:
    """Return a dataclass as its name and fields, as JSON has them; anything else as it is."""
    if not is_dataclass(value) or isinstance(value, type):
        return value
    held = {f.name: getattr(value, f.name) for f in fields(value)}
    return {
        "is": type(value).__name__,
        **{k: _plain(v) if _has_name(v) else _json(v) for k, v in held.items()},
    }


def _has_name(value: Any) -> bool:
    return isinstance(value, Schedule | Teacher)


def _json(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return getattr(value, "__qualname__", "function") if callable(value) else value
