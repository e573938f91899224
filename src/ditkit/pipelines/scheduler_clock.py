"""The clock of a pipeline's call, read off its scheduler.

Never off the timestep that the transformer is told: 50 steps can give 43 distinct values in bfloat16, Heun
repeats one, FLUX divides by 1000.
"""

from __future__ import annotations

import copyreg
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, wraps
from typing import Any, Protocol

import torch
from torch import Tensor

from ditkit.core.errors import ConfigError

WATCHED = ("set_timesteps", "add_noise", "scale_noise", "scale_model_input", "step")


class Clock:
    """The place of the evaluation under way in the scheduler's timesteps.

    It is an offset (`begin_index`, or the place of the first timestep that the scheduler was shown) plus the
    number of completed steps. `age` grows whenever what was kept from earlier evaluations is void: with a new
    trajectory, and when a step is not at the timestep where the clock expects it.
    """

    def __init__(self) -> None:
        self.timesteps = torch.empty(0)
        self.times: tuple[float, ...] = ()
        self.scale = 1.0
        self.first = 0.0
        self.age = 0
        self._index: int | None = None

    @property
    def index(self) -> int:
        """The index of the evaluation under way, at most the last one's."""
        return min(self._index or 0, max(len(self.times) - 1, 0))

    @property
    def t(self) -> float:
        """The noise-time, nominally: the timestep over the number of those that the model was trained with."""
        return self.times[self.index] / self.scale

    @property
    def noise_time(self) -> float:
        """The noise-time of the evaluation: of index i of a table of betas (i + 1) / its length, as of our paths."""
        return (self.times[self.index] + self.first) / self.scale

    @property
    def is_over(self) -> bool:
        """Return whether a trajectory began and all its steps are done."""
        return bool(self.times) and (self._index or 0) >= len(self.times)

    def begin(self, scheduler: Any) -> None:
        """Begin a new trajectory.

        Raises:
            ConfigError: the scheduler cannot say its timesteps.
        """
        steps = getattr(scheduler, "timesteps", None)
        if steps is None or len(steps) == 0:
            raise ConfigError(
                f"{type(scheduler).__name__}: timesteps={steps!r} after set_timesteps, expected at least one"
            )
        self.timesteps = torch.as_tensor(steps)
        self.times = tuple(self.timesteps.tolist())
        self.scale = float(getattr(scheduler.config, "num_train_timesteps", 1000))
        flows = getattr(scheduler.config, "use_flow_sigmas", False)
        self.first = float(hasattr(scheduler.config, "beta_schedule") and not flows)
        self._index = None
        self.age += 1

    def locate(self, scheduler: Any, timestep: Any = None) -> None:
        """Find the offset, unless it is known: before an evaluation, or with the first timestep shown."""
        if self._index is not None:
            return
        begin = getattr(scheduler, "begin_index", None)
        place = None if timestep is None else self._place(timestep, 0)
        self._index = begin if begin is not None else place or 0

    def check(self, timestep: Any) -> None:
        """Check a step's `timestep` against the clock; where they disagree, move there and drop the state."""
        if self._index is None or not self._is_at(self._index, timestep):
            place = self._place(timestep, self.index)
            self._index = self.index if place is None else place
            self.age += 1

    def advance(self) -> None:
        """Complete a step."""
        assert self._index is not None
        self._index += 1

    def _is_at(self, index: int, timestep: Any) -> bool:
        if index >= len(self.times):
            return False
        place = self._by_storage(timestep)
        return _close(self.times[index], float(timestep)) if place is None else place == index

    def _place(self, timestep: Any, start: int) -> int | None:
        """Find the index of `timestep`, searched from `start` on and then before it."""
        place = self._by_storage(timestep)
        if place is not None:
            return place
        order = [*range(start, len(self.times)), *range(start)]
        return next((i for i in order if _close(self.times[i], float(timestep))), None)

    def _by_storage(self, timestep: Any) -> int | None:
        """Find the index of a timestep that is a view of the list's own memory, without a wait for the device."""
        own = self.timesteps
        if not isinstance(timestep, Tensor) or timestep.untyped_storage().data_ptr() != _pointer(own):
            return None
        ahead = int(timestep.storage_offset()) - int(own.storage_offset())
        place, rest = divmod(ahead, max(own.stride(0), 1))
        return place if rest == 0 and 0 <= place < len(own) else None


class Listener(Protocol):
    """Protocol of what follows a scheduler through one pipeline call."""

    scheduler: Any

    def on_set_timesteps(self) -> None: ...
    def on_timestep(self, timestep: Any) -> None: ...
    def before_step(self, timestep: Any, prediction: Any) -> Any: ...
    def after_step(self, sample: Any, out: Any) -> None: ...
    def on_intrusion(self) -> None: ...


LISTENER: ContextVar[Listener | None] = ContextVar("ditkit_listener", default=None)
"""The pipeline call in force, in this thread."""
OWNERS: dict[int, Listener] = {}
"""The call that each instrumented scheduler is of, in whatever thread, by the scheduler's identity."""


@contextmanager
def listening(listener: Listener | None) -> Iterator[None]:
    """Inside, `listener` hears its scheduler; None silences an outer one."""
    token = LISTENER.set(listener)
    try:
        yield
    finally:
        LISTENER.reset(token)


@contextmanager
def instrumented(scheduler: Any, owner: Listener | None = None) -> Iterator[None]:
    """Inside, the methods of `scheduler` tell the listener in force; then it has its own class again.

    Args:
        owner: hears of it when others, who are no listeners, set the timesteps meanwhile.

    Raises:
        ConfigError: it lacks a method or its timesteps.
    """
    check_scheduler(scheduler)
    own: type = type(scheduler)
    assert not hasattr(own, "ditkit_own"), "a call that overlaps has a scheduler of its own"
    scheduler.__class__ = _instrumented(own)
    if owner is not None:
        OWNERS[id(scheduler)] = owner
    try:
        yield
    finally:
        OWNERS.pop(id(scheduler), None)
        scheduler.__class__ = own


def check_scheduler(scheduler: Any) -> None:
    """Raise ConfigError if `scheduler` cannot say where it is."""
    missing = [name for name in ("set_timesteps", "step") if not hasattr(scheduler, name)]
    if missing or "timestep" not in inspect.signature(scheduler.step).parameters:
        missing_part = missing[0] if missing else "a timestep in its step"
        raise ConfigError(
            f"{type(scheduler).__name__} lacks {missing_part}: expected a scheduler that can say its timesteps"
        )
    replaced = [name for name in WATCHED if name in vars(scheduler)]
    if replaced:
        raise ConfigError(
            f"{type(scheduler).__name__}: {replaced[0]} was replaced on the object itself, where it cannot be "
            "followed; expected a subclass that overrides it"
        )


@cache
def _instrumented(own: type) -> type:
    """Make a subclass of a scheduler's class, of the same name, whose methods keep their signatures."""
    wrappers: dict[str, Callable[..., Any]] = {
        "set_timesteps": _telling_begin,
        "add_noise": _telling_noise,
        "scale_noise": _telling_noise,
        "scale_model_input": _telling_time,
        "step": _telling_step,
    }
    body = {name: wrappers[name](getattr(own, name)) for name in WATCHED if hasattr(own, name)}
    # a copy, such as a pipeline makes for a second modality, is a scheduler of its own
    body["__reduce_ex__"] = lambda self, _: (copyreg.__newobj__, (own,), vars(self))  # type: ignore[attr-defined]
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "ditkit_own": own}
    return type(own.__name__, (own,), {**body, **names})


def _telling_begin(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = method(self, *args, **kwargs)
        if listener := _listener(self):
            listener.on_set_timesteps()
        elif owner := OWNERS.get(id(self)):
            owner.on_intrusion()
        return out

    return set_timesteps


def _telling_time(method: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(method)

    @wraps(method)
    def scale_model_input(self: Any, *args: Any, **kwargs: Any) -> Any:
        if listener := _listener(self):
            given = signature.bind(self, *args, **kwargs).arguments
            # schedulers that scale nothing take it as one of *args
            listener.on_timestep(given.get("timestep", next(iter(given.get("args", ())), None)))
        return method(self, *args, **kwargs)

    return scale_model_input


def _telling_noise(method: Callable[..., Any]) -> Callable[..., Any]:
    """Pipelines that start late noise what they start from, some without a word of where they begin."""
    signature = inspect.signature(method)

    @wraps(method)
    def add_noise(self: Any, *args: Any, **kwargs: Any) -> Any:
        if listener := _listener(self):
            given = signature.bind(self, *args, **kwargs).arguments
            listener.on_timestep(torch.as_tensor(given.get("timesteps", given.get("timestep"))).flatten()[0])
        return method(self, *args, **kwargs)

    return add_noise


def _telling_step(method: Callable[..., Any]) -> Callable[..., Any]:
    names = parameters_of(method)

    @wraps(method)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        listener = _listener(self)
        if listener is None:
            return method(self, *args, **kwargs)
        given = by_name(names, args, kwargs)
        given["model_output"] = listener.before_step(given["timestep"], given["model_output"])
        out = method(self, *args[len(names) :], **given)
        listener.after_step(given.get("sample"), out)
        return out

    return step


def parameters_of(method: Callable[..., Any]) -> tuple[str, ...]:
    """List the names of a method's parameters after `self`, without *args and **kwargs."""
    parameters = inspect.signature(method).parameters.values()
    loose = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return tuple(parameter.name for parameter in parameters if parameter.kind not in loose)[1:]


def by_name(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by the names of their parameters; `Signature.bind` takes ten times as long, at every step."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _listener(scheduler: Any) -> Listener | None:
    listener = LISTENER.get()
    return listener if listener is not None and listener.scheduler is scheduler else None


def _pointer(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _close(a: float, b: float) -> bool:
    # some pipelines hand a timestep on as an integer
    return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9) or int(a) == b
