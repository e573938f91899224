"""Any diffusers pipeline whose transformer has a view, under policies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, wraps
from inspect import BoundArguments
from types import TracebackType
from typing import Any, Self
from weakref import finalize

from torch import nn

from ditkit.bench.timing import seconds_of
from ditkit.caching.confident_taylor import ConfidentTaylor
from ditkit.core.config import integer
from ditkit.core.errors import ConfigError, ConflictError, NoEffectError
from ditkit.core.policy import Policy
from ditkit.core.spec import components
from ditkit.core.trajectory import claim
from ditkit.hosts.attention import refuse_closed
from ditkit.hosts.family import families, family, has_sites, is_known
from ditkit.hosts.view import refuse_foreign, refuse_graph, view
from ditkit.hosts.view import restore as without_sites
from ditkit.pipelines.call import Net, PipelineCall, TransformerHooks, inherited
from ditkit.pipelines.overlap import reserved
from ditkit.pipelines.replay import CallSnapshot, Cost, PipelineReport, Replay
from ditkit.pipelines.scheduler_clock import check_scheduler

DEFAULT = ConfidentTaylor(interval=3)
"""Every family has one stack of blocks. An interval of three is the longest that stays above 40 dB on the shipped FLUX
in 28 steps (`benchmarks/race_caching.py`). TaylorSeer with as many full evaluations is 2.5 dB behind there, slower,
and holds nine times as much."""


def accelerate(pipe: Any, *policies: Policy | str, max_bytes: int | None = None) -> Accelerated:
    """Accelerate a pipeline of diffusers: called like it, with the same weights, LoRAs, hooks and components.

    `pipe` itself stays exact, and so several may be made of one pipeline. `restore` or leaving a `with` block
    takes away what was added to its transformers; diffusers' `from_pipe`, asked for another pipeline of the same
    parts, gives an exact one. Compiled blocks stay compiled; where a policy acts inside one, each of its branches is
    a graph, and a branch in which it acts, such as attention under RAS, is none.

    Args:
        policies: objects or texts such as "taylorseer:interval=4"; none stands for `DEFAULT`, which computes all of a
            call that is too short for it, and says so. Beside them work those that a transformer was trained under and
            cannot do without, unless their class is named.
        max_bytes: memory that all policies may hold together in a call.

    Raises:
        ConfigError: no pipeline, no transformer that has a view, a scheduler without timesteps, or no policy.
        ConflictError: `pipe` is accelerated itself, two policies own one site, another cache has its hooks on a
            transformer, more than its blocks is compiled, a policy of rows meets attention whose processor is
            not diffusers' default, or its transformers were trained under different inherent policies.
        NoEffectError: a policy has no site that it can use. The pipeline is then as it was.
    """
    if isinstance(pipe, Accelerated):
        raise ConflictError(f"accelerate: got {pipe!r}, expected the pipeline that it was made of")
    chosen = components("policies", Policy, policies) or (DEFAULT,)  # type: ignore[type-abstract]
    if max_bytes is not None:
        integer("max_bytes", max_bytes, least=1)
    models = transformers_of(pipe)
    check_scheduler(pipe.scheduler)
    alone = len(models) == 1
    nets = [Net("main" if alone else name, model, family(model)) for name, model in models.items()]
    chosen = inherited(nets, chosen)
    viewed: list[nn.Module] = []
    try:
        for net in nets:
            if not has_sites(net.model):
                viewed.append(view(net.model))
            _check(net, chosen)
    except BaseException:
        for model in viewed:
            without_sites(model)
        raise
    return Accelerated(pipe, nets, chosen, max_bytes, named=bool(policies))


def restore(fast: Accelerated) -> Any:
    """Return the pipeline as it was before `accelerate`."""
    if not isinstance(fast, Accelerated):
        raise ConfigError(f"restore: got {type(fast).__name__}, expected what ditkit.accelerate returned")
    return fast._restore()


class Accelerated:
    """A pipeline under policies. What it has not itself is the pipeline's, to read, to set and to call."""

    __slots__ = ("__weakref__", "_last", "_max_bytes", "_named", "_nets", "_pipe", "_policies", "_watches")

    def __init__(
        self,
        pipe: Any,
        nets: list[Net],
        policies: tuple[Policy, ...],
        max_bytes: int | None,
        named: bool,
    ) -> None:
        self._pipe, self._nets, self._policies, self._max_bytes = pipe, nets, policies, max_bytes
        self._named = named
        self._last: tuple[CallSnapshot, Cost] | None = None
        self._watches: list[TransformerHooks] | None = [TransformerHooks(net) for net in nets]
        finalize(self, _unwatch, self._watches).atexit = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the pipeline under the policies.

        Raises:
            ConfigError: the pipeline was restored, the scheduler cannot say its timesteps, a policy does not fit
                the number of steps, or the policies would hold more than `max_bytes`.
            ConflictError: what `accelerate` refuses was done to the pipeline since.
            NoEffectError: the pipeline was given another transformer since; or the call went to its end, and a
                policy touched nothing or saved nothing: what was drawn is then the error's `output`. Or a policy's
                setting says before the first evaluation that it would save nothing.
        """
        if self._watches is None:
            raise ConfigError(f"{type(self._pipe).__name__} was restored; call ditkit.accelerate again")
        for net in self._nets:
            _check(net, self._policies)
        self._refuse_strangers()
        snapshot, self._last = CallSnapshot(self._pipe, args, kwargs), None
        out, cost = self._draw(snapshot.bound, True)
        self._last = (snapshot, cost)
        return out

    def report(self, exact: bool = False, converged_steps: int | None = None) -> PipelineReport:
        """Cost and receipt of the last call; with `exact` its error, and what the same MACs buy in fewer steps.

        The error takes five more calls from the same state of all generators, under the autocast and the inference
        mode of the last call: both samplers once to count MACs and once, in turns, for the wall clock, and the
        control; a run of `converged_steps` is a sixth. A callback is called in all of them, as it may change what
        is drawn; so whatever else it does is done again.

        Raises:
            ConfigError: nothing was called yet, the pipeline was restored since, or `converged_steps` is no
                positive integer, goes without `exact`, or the call had its own list of timesteps.
        """
        if converged_steps is not None and not exact:
            raise ConfigError(
                f"report: got converged_steps={converged_steps!r} without exact=True, expected it"
            )
        if self._last is None:
            raise ConfigError(
                "report: expected a finished call of the accelerated pipeline before it, got none"
            )
        snapshot, cost = self._last
        if not exact:
            return PipelineReport(cost)
        if self._watches is None:
            raise ConfigError("report(exact=True) was asked after restore, expected it before")
        decodes = getattr(self._pipe, "vae", None) is not None
        replay = Replay(snapshot, self._draw, self._policies, decodes)
        rows = replay.rows(converged_steps)
        return PipelineReport(replay.costs[rows[1].name], rows, "pictures" if decodes else "latents")

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The pipeline's, by which `isinstance` and diffusers' `AutoPipeline` classes know it."""
        return type(self._pipe)

    def __getattr__(self, name: str) -> Any:
        pipe = object.__getattribute__(self, "_pipe")
        found = getattr(pipe, name)
        return _returning(self, found) if getattr(found, "__self__", None) is pipe else found

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__slots__:
            object.__setattr__(self, name, value)
        else:
            setattr(self._pipe, name, value)

    def __repr__(self) -> str:
        return f"Accelerated({type(self._pipe).__name__}, {', '.join(map(str, self._policies))})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy by accelerating a copy of the pipeline anew."""
        return partial(accelerate, max_bytes=self._max_bytes), (self._pipe, *self._policies * self._named)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _refuse_strangers(self) -> None:
        kind = type(self._pipe).__name__
        for name, model in transformers_of(self._pipe).items():
            if not any(net.model is model for net in self._nets):
                raise NoEffectError(
                    f"{kind}: {name} is none of the transformers that it had before; call ditkit.accelerate again"
                )

    def _restore(self) -> Any:
        for net, watch in zip(self._nets, self._watches or (), strict=False):
            if watch.remove():
                without_sites(net.model)
        self._watches = None
        return self._pipe

    def _draw(self, bound: BoundArguments, fast: bool) -> tuple[Any, Cost]:
        """Run the pipeline, under the policies or exactly; return its output and its cost.

        Exactly is under the inherent policies of its transformers.
        """
        under = self._policies if fast else inherited(self._nets, ())
        drawn: list[Any] = []
        with reserved(self._pipe) as pipe:
            named = self._named or not fast
            pipeline_call = PipelineCall(pipe.scheduler, self._nets, under, self._max_bytes, named)

            def call() -> None:
                with pipeline_call.under_way():
                    snapshot = pipeline_call.wrap_callback(bound)
                    drawn.append(pipe(*snapshot.args, **snapshot.kwargs))

            try:
                seconds = seconds_of(call)
            except NoEffectError as error:
                error.output = next(iter(drawn), None)
                raise
        return drawn[0], Cost(
            seconds, pipeline_call.evaluations, pipeline_call.peak_bytes, tuple(pipeline_call.receipts)
        )


def _unwatch(watches: Sequence[TransformerHooks]) -> None:
    """Remove the hooks of an accelerated pipeline that is no longer referenced, and so cannot be restored."""
    for watch in watches:
        watch.remove()


def _check(net: Net, policies: tuple[Policy, ...]) -> None:
    """Raise what keeps `policies` from a transformer that has its sites, as it is now."""
    refuse_foreign(net.model)
    sites = net.family.sites(net.model)
    refuse_closed(net.model, sites, policies)
    claim(sites, policies)


def transformers_of(pipe: Any) -> dict[str, nn.Module]:
    """Find the components of a pipeline that have a view."""
    components = getattr(pipe, "components", None)
    if not isinstance(components, dict) or getattr(pipe, "scheduler", None) is None:
        raise ConfigError(
            f"accelerate: got {type(pipe).__name__}, expected a diffusers pipeline with a scheduler"
        )
    modules = {name: part for name, part in components.items() if isinstance(part, nn.Module)}
    families()
    for name, part in modules.items():
        refuse_graph(name, part, whole=True)
    found = {name: part for name, part in modules.items() if is_known(part)}
    if not found:
        named = modules.get("transformer", modules.get("unet"))
        if named is None:
            raise ConfigError(
                f"accelerate: {type(pipe).__name__} has no transformer, only {', '.join(modules)}"
            )
        family(named)
    return found


def _returning(fast: Accelerated, method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a method of the pipeline that returns the pipeline itself, as `to` does, to return the accelerated one."""

    @wraps(method)
    def forwarded(*args: Any, **kwargs: Any) -> Any:
        out = method(*args, **kwargs)
        return fast if out is fast._pipe else out

    return forwarded
