"""Account of a call: seconds, multiply-accumulates and bytes by part and by operator class.

The call runs three times: as it is, for its wall clock; under a counter of what the dispatcher executes, for MACs and
bytes; and under torch's profiler, for time. Sites and modules say to which part an operation belongs, so a cache, a
pattern or a pruned layer shows by what it did not run (arXiv 2312.14385).
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ditkit.bench.macs import MacCounter
from ditkit.bench.operations import DECIDING, OpClass, class_of, touched_bytes
from ditkit.bench.parts import BRANCH, SAMPLER, parts_of
from ditkit.bench.timing import seconds_of
from ditkit.core.errors import ConfigError
from ditkit.core.run import Handler, Site, watching

DENOISER = "denoiser"
MARK = "ditkit|"
"""Begins the names of the ranges that stand in the profiler's trace."""
ROOT, EVALUATION = MARK + "root", MARK + "evaluation"
US = 1e-6


class Tag(NamedTuple):
    """The place of an operation: a stage of the call, a site of the network, and whether a norm or a core is around."""

    stage: str = SAMPLER
    site: str = ""
    inside: str = ""

    @classmethod
    def read(cls, name: str) -> Tag:
        return cls(*name.removeprefix(MARK).split("|"))

    def __str__(self) -> str:
        return MARK + "|".join(self)


class Key(NamedTuple):
    """One line of the account."""

    stage: str
    site: str
    kind: OpClass


@dataclass
class Account:
    """Costs of what ran, by stage, site and operator class."""

    seconds: dict[Key, float] = field(default_factory=lambda: defaultdict(float))
    macs: Counter[Key] = field(default_factory=Counter)
    bytes: Counter[Key] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    """Calls of each site; `ran` are those in which its function ran."""
    ran: Counter[str] = field(default_factory=Counter)
    lengths: Counter[tuple[int, str, int, int]] = field(default_factory=Counter)
    """(evaluation, site, queries, keys) of each core."""
    evaluations: list[float] = field(default_factory=list)
    """Seconds of each forward pass of a denoiser."""
    uncounted: tuple[str, ...] = ()
    plain_seconds: float = 0.0
    """Wall clock without a profiler; `wall_seconds` with it, which `seconds` sum to."""
    wall_seconds: float = 0.0


def account(
    call: Callable[[], object],
    denoisers: Sequence[tuple[nn.Module, Sequence[Site]]],
    stages: Mapping[str, nn.Module] = {},
) -> Account:
    """Run `call` three times and account for it.

    Args:
        denoisers: networks that have sites, with them.
        stages: other modules, by the names of their stages, such as "vae".

    Raises:
        ConfigError: no denoiser ran, or another profile is under way.
    """
    plain_seconds = seconds_of(call)
    found = count_parts(call, denoisers, stages)
    found.plain_seconds = plain_seconds
    _time(found, call, denoisers, stages)
    return found


def count_parts(
    call: Callable[[], object],
    denoisers: Sequence[tuple[nn.Module, Sequence[Site]]],
    stages: Mapping[str, nn.Module] = {},
) -> Account:
    """Run `call` once and count MACs, bytes, calls of sites and lengths, no time; on the meta device too.

    Raises:
        ConfigError: as `account` does.
    """
    found = Account()
    tracer = Tracer([site for _, sites in denoisers for site in sites], timed=False)

    def note(func: Any, args: Any, kwargs: Any, out: Any, macs: int) -> None:
        tag = tracer.tag
        key = Key(tag.stage, tag.site, _kind(func.overloadpacket.__name__, tag.inside))
        found.macs[key] += macs
        found.bytes[key] += touched_bytes(func, args, kwargs, out)

    with tracer.at_work([net for net, _ in denoisers], stages), MacCounter(note) as counter:
        call()
    if tracer.index < 0:
        raise ConfigError("profile: the call ran no denoiser, expected at least one forward pass")
    found.uncounted = counter.count.uncounted
    found.calls, found.ran, found.lengths = tracer.calls, tracer.ran, tracer.lengths
    return found


def settled_parts(found: Account, sites: Sequence[Site]) -> dict[str, str]:
    """Return the part of each site; of a branch that does not name its attention, by what ran in it."""
    parts = parts_of(sites)
    for name, part in parts.items():
        if part == BRANCH:
            attends = found.macs[Key(DENOISER, name, "attention")] > 0
            parts[name] = "cross attention" if attends else "MLP"
    return parts


class Tracer:
    """Tags what runs: with the innermost site, norm module, denoiser or stage around it."""

    def __init__(self, sites: Sequence[Site], timed: bool) -> None:
        self.sites = {site.name for site in sites}
        self.cores = {site.name for site in sites if site.kind == "core"}
        self.timed, self.index = timed, -1
        self.stack: list[tuple[Tag, Any]] = []
        self.calls: Counter[str] = Counter()
        self.ran: Counter[str] = Counter()
        self.lengths: Counter[tuple[int, str, int, int]] = Counter()

    @property
    def tag(self) -> Tag:
        return self.stack[-1][0] if self.stack else Tag()

    def push(self, tag: Tag, name: str = "") -> None:
        range_ = torch.profiler.record_function(name or str(tag)) if self.timed else None
        if range_ is not None:
            range_.__enter__()
        self.stack.append((tag, range_))

    def pop(self) -> None:
        _, range_ = self.stack.pop()
        if range_ is not None:
            range_.__exit__(None, None, None)

    def watch(self, name: str, fn: Callable[..., Any], handler: Handler | None, args: tuple[Any, ...]) -> Any:
        """Run a site inside its tag; what a model does not list belongs to what is around it."""
        if name not in self.sites:
            return fn(*args) if handler is None else handler(fn, *args)
        self.calls[name] += 1
        is_core = name in self.cores
        if is_core:
            self.lengths[self.index, name, args[0].shape[-2], args[1].shape[-2]] += 1

        def counted(*given: Any) -> Any:
            self.ran[name] += 1
            return fn(*given)

        self.push(Tag(DENOISER, name, "core" if is_core else ""))
        try:
            return counted(*args) if handler is None else handler(counted, *args)
        finally:
            self.pop()

    @contextmanager
    def at_work(self, nets: Sequence[nn.Module], stages: Mapping[str, nn.Module]) -> Iterator[None]:
        """Tag what runs inside the block, by hooks and a watch of the sites, which are gone after it."""
        with ExitStack() as undo:
            undo.enter_context(watching(self.watch))
            for net in nets:
                self._hook(undo, net, self._begin_evaluation)
                for module in net.modules():
                    if type(module).__name__.endswith("Norm"):
                        self._hook(undo, module, lambda: self.push(self.tag._replace(inside="norm")))
            for name, module in stages.items():
                self._hook(undo, module, lambda name=name: self.push(Tag(name)))  # type: ignore[misc]
                for method in ("encode", "decode"):
                    self._wrap(undo, module, method, Tag(name))
            yield

    def _begin_evaluation(self) -> None:
        self.index += 1
        self.push(Tag(DENOISER), EVALUATION)

    def _hook(self, undo: ExitStack, module: nn.Module, begin: Callable[[], None]) -> None:
        before = module.register_forward_pre_hook(lambda *_: begin(), prepend=True)
        after = module.register_forward_hook(lambda *_: self.pop(), always_call=True)
        undo.callback(before.remove)
        undo.callback(after.remove)

    def _wrap(self, undo: ExitStack, module: nn.Module, name: str, tag: Tag) -> None:
        """Tag a method that is called past `forward`, as a VAE's are."""
        method = getattr(module, name, None)
        if method is None:
            return

        def tagged(*args: Any, **kwargs: Any) -> Any:
            self.push(tag)
            try:
                return method(*args, **kwargs)
            finally:
                self.pop()

        own = module.__dict__.get(name)
        module.__dict__[name] = tagged
        undo.callback(_put_back, module, name, own)


def _put_back(module: nn.Module, name: str, own: Any) -> None:
    del module.__dict__[name]
    if own is not None:
        module.__dict__[name] = own


def _kind(name: str, inside: str) -> OpClass:
    """Return the class of an operation by its own name and by what is around it."""
    kind = class_of(name)
    if inside == "core":
        return "attention"
    return "normalisation" if inside == "norm" and kind == "elementwise" else kind


def _time(
    found: Account,
    call: Callable[[], object],
    denoisers: Sequence[tuple[nn.Module, Sequence[Site]]],
    stages: Mapping[str, nn.Module],
) -> None:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would write two lines a run to stderr
    from torch.profiler import ProfilerActivity, profile, record_function

    tracer = Tracer([site for _, sites in denoisers for site in sites], timed=True)
    on_gpu = torch.cuda.is_initialized()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with (
        tracer.at_work([net for net, _ in denoisers], stages),
        profile(activities=activities) as trace,
        record_function(ROOT),
    ):
        found.wall_seconds = seconds_of(call)
    _read(found, trace.events(), on_gpu)


class _Place(NamedTuple):
    tag: Tag
    decided: OpClass | None


def _read(found: Account, events: Any, on_gpu: bool) -> None:
    """Attribute the time that each event spent outside its children; on a GPU, that of the kernels it launched."""
    places: dict[int, _Place | None] = {}
    for event in events:
        place = _place(event, places)
        if place is None:
            continue
        if event.name == EVALUATION:
            found.evaluations.append(event.cpu_time_total * US)
        kind = _event_kind(event, place)
        seconds = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) * US
        found.seconds[Key(place.tag.stage, place.tag.site, kind)] += seconds
    if on_gpu:  # the host's time hides behind the device's: what no kernel fills is a gap
        idle = found.wall_seconds - sum(found.seconds.values())
        found.seconds[Key(SAMPLER, "", "host")] += max(0.0, idle)


def _place(event: Any, places: dict[int, _Place | None]) -> _Place | None:
    """Return the innermost tag around an event and the class that an operation around it decided."""
    missing = []
    while event is not None and id(event) not in places:
        missing.append(event)
        event = event.cpu_parent
    around = None if event is None else places[id(event)]
    for inner in reversed(missing):
        if inner.name == ROOT:
            around = _Place(Tag(), None)
        elif around is not None and inner.name == EVALUATION:
            around = _Place(Tag(DENOISER), None)
        elif around is not None and inner.name.startswith(MARK):
            around = _Place(Tag.read(inner.name), None)
        elif around is not None and around.decided is None and "::" in inner.name:
            kind = _kind(inner.name, around.tag.inside)
            around = _Place(around.tag, kind if kind in DECIDING else None)
        places[id(inner)] = around
    return around


def _event_kind(event: Any, place: _Place) -> OpClass:
    if event.name.startswith(MARK):
        return "host"
    if place.decided is not None:
        return place.decided
    if "::" in event.name:
        return _kind(event.name, place.tag.inside)
    return "compiled" if "ompiled" in event.name or "graph_" in event.name else "host"


def query_lengths(found: Account) -> dict[int, int]:
    """Return how often a core had so many queries, over all calls."""
    lengths: Counter[int] = Counter()
    for (_, _, queries, _), times in found.lengths.items():
        lengths[queries] += times
    return dict(sorted(lengths.items()))


def device_of(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Return the device and type of a model's first floating-point parameter."""
    first: Tensor | None = next((p for p in model.parameters() if p.is_floating_point()), None)
    return (torch.device("cpu"), torch.float32) if first is None else (first.device, first.dtype)
