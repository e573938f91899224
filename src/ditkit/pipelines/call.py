"""One call of a diffusers pipeline under policies: every evaluation of its transformers, in its place."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from inspect import BoundArguments
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ditkit.core.errors import ConfigError, ConflictError, NoEffectError
from ditkit.core.grid import Segment
from ditkit.core.policy import Policy, with_inherent
from ditkit.core.receipt import PolicyReceipt
from ditkit.core.run import Call
from ditkit.core.spec import brief, spec
from ditkit.core.trajectory import Trajectory, is_idle, refuse_idle
from ditkit.hosts.attention import refuse_closed
from ditkit.hosts.family import Family
from ditkit.hosts.hosted import adopted
from ditkit.hosts.view import running
from ditkit.pipelines.adapters import Adapters
from ditkit.pipelines.scheduler_clock import LISTENER, Clock, by_name, instrumented, listening, parameters_of

LOG = logging.getLogger(__name__)
PROMPTS = (
    "encoder_hidden_states",
    "encoder_attention_mask",
    "encoder_hidden_states_mask",
    "pooled_projections",
    "class_labels",
)
"""Arguments of diffusers' transformers that say what shall be drawn, the same at every step."""


class Net(NamedTuple):
    """A transformer of a pipeline, under the name by which policies key their state."""

    name: str
    model: nn.Module
    family: Family


def inherited(nets: Sequence[Net], policies: Sequence[Policy]) -> tuple[Policy, ...]:
    """`policies`, after those inherent ones that all transformers of a pipeline were trained under.

    Raises:
        ConflictError: they were trained under different ones, or learned weights of their own under them.
    """
    under = [with_inherent(adopted(net.model), policies) for net in nets]
    learned = [net.name for net in nets if adopted(net.model).learned]
    if other := [i for i, found in enumerate(under) if found != under[0] or (learned and i)]:
        texts = [" ".join(map(spec, adopted(nets[i].model).policies)) or "none" for i in (0, other[0])]
        raise ConflictError(
            f"accelerate: {nets[0].name} was trained under {texts[0]} and {nets[other[0]].name} under {texts[1]}, "
            "expected the same for all, with no weights of policies"
        )
    return under[0] if under else tuple(policies)


class ConditioningKey(NamedTuple):
    """Key of the conditioning for which a branch's state holds: latent shape, prompts and adapters."""

    shape: torch.Size
    prompts: tuple[tuple[Tensor, int], ...]
    adapters: tuple[Any, ...]

    @classmethod
    def of(cls, arguments: Mapping[str, Any], adapters: Adapters) -> ConditioningKey:
        prompts = [leaf for name in PROMPTS for leaf in _leaves(arguments.get(name))]
        kept = tuple((p, _version(p)) for p in prompts if isinstance(p, Tensor))
        return cls(arguments["hidden_states"].shape, kept, adapters.at_work(arguments))

    def is_like(self, other: ConditioningKey) -> bool:
        pairs = list(zip(self.prompts, other.prompts, strict=False))
        return (
            self.shape == other.shape
            and self.adapters == other.adapters
            and len(self.prompts) == len(other.prompts)
            and all(_is_same(a, b) for a, b in pairs)
        )


class PipelineCall:
    """One call of a pipeline: its clock, its lanes, and the trajectories of its policies.

    A trajectory begins with `set_timesteps`; and again, with nothing kept, when the clock jumps, a lane is told
    something else or by other adapters, or a callback moves the latents farther than the last step did.

    Args:
        max_bytes: memory that all policies may hold together.
        named: True if the caller named the policies: one that can save nothing is then refused. Others compute all,
            and the log says so.
    """

    def __init__(
        self,
        scheduler: Any,
        nets: Sequence[Net],
        policies: Sequence[Policy],
        max_bytes: int | None,
        named: bool = True,
    ) -> None:
        self.scheduler, self.nets, self.max_bytes = scheduler, nets, max_bytes
        self.policies, self.named = tuple(policies), named
        self.clock = Clock()
        self.context: str | None = None
        self.receipts: list[PolicyReceipt] = []
        self.peak_bytes = self.evaluations = 0
        self._learned = _learned(nets)
        self._sites = tuple(dict.fromkeys(s for net in nets for s in net.family.sites(net.model)))
        self._trajectory: Trajectory | None = None
        self._age = -1
        self._idle: str | None = None
        self._had_effect = False
        self._ordinals: Counter[tuple[str, str]] = Counter()
        self._adapters = {net.name: Adapters(net.model) for net in nets}
        self._keys: dict[tuple[str, str], ConditioningKey] = {}
        self._layouts: dict[tuple[str, str], tuple[list[Any], tuple[Segment, ...]]] = {}
        self._call: Call | None = None
        self._first: Call | None = None
        self._open = ExitStack()
        self._moved: tuple[Tensor, Tensor] | None = None
        self._is_intruded = False

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """Enclose the pipeline's call; one that raises leaves nothing behind.

        Raises:
            NoEffectError: the call went to its end, and a policy saved nothing in it.
        """
        with instrumented(self.scheduler, self), listening(self):
            try:
                yield
            finally:
                self._open.close()
                self._close()
        if not self.clock.is_over or self._had_effect:
            return
        if self._idle is None and any(policy != policy.exact() for policy in self.policies):
            self._idle = "the pipeline evaluated none of the transformers that it had before"
        if self._idle is not None:
            raise NoEffectError(self._idle)

    def enter(self, net: Net, arguments: Mapping[str, Any]) -> None:
        """Begin one evaluation of a transformer."""
        if not self.clock.times:
            kind = type(self.scheduler).__name__
            raise ConfigError(f"{kind}: the transformer was called before set_timesteps, expected after it")
        self._refuse_intrusion()
        self.clock.locate(self.scheduler)
        key = (net.name, self._lane(net))
        conditioning_key = ConditioningKey.of(arguments, self._adapters[net.name])
        if key not in self._keys:
            _check_labels(net, arguments)
        if key in self._keys and not conditioning_key.is_like(self._keys[key]):
            self.clock.age += 1
            self._keys.clear()  # nothing is kept of the other lanes that could be void once more
            self._layouts.clear()
        self._keys[key] = conditioning_key
        trajectory = self._current()
        clock = self.clock
        layout = self._layout(key, net, arguments)
        x = arguments["hidden_states"]
        times = torch.full((len(x),), clock.noise_time, device=x.device)
        self._call = Call(clock.index, len(clock.times), clock.t, key[1], net.name, layout, times)
        self._first = self._first or self._call
        self._open.enter_context(running(trajectory.run(self._call)))

    def leave(self, out: Any) -> Any:
        """End one evaluation; `out` is None where it raised. Return the output, possibly replaced."""
        self._open.close()
        call, self._call = self._call, None
        if call is None or out is None:
            return out
        self.evaluations += 1
        value = self._current().leave(call, out[0])
        if value is out[0]:
            return out
        if isinstance(out, tuple):
            return (value, *out[1:])
        out[next(iter(out))] = value
        return out

    def on_set_timesteps(self) -> None:
        self.clock.begin(self.scheduler)
        self._keys.clear()
        self._layouts.clear()
        self._ordinals.clear()

    def on_timestep(self, timestep: Any) -> None:
        self.clock.locate(self.scheduler, timestep)

    def before_step(self, timestep: Any, prediction: Any) -> Any:
        """Apply the policies to the scheduler's prediction after guidance; they see its channels at axis 1.

        Raises:
            ConflictError: a call that is not accelerated set the scheduler's timesteps since the last step.
        """
        self._refuse_intrusion()
        self.clock.locate(self.scheduler, timestep)
        self.clock.check(timestep)
        self._ordinals.clear()
        call, self._first = self._first, None
        if call is None or self.clock.age != self._age:
            return prediction
        axis = next(net.family.channel_axis for net in self.nets if net.name == call.net)
        return self._current().guided(call, prediction.movedim(axis, 1)).movedim(1, axis)

    def after_step(self, sample: Any, out: Any) -> None:
        self.clock.advance()
        self._moved = (sample, out[0])

    def on_intrusion(self) -> None:
        self._is_intruded = True

    def _refuse_intrusion(self) -> None:
        if self._is_intruded:
            raise ConflictError(
                f"{type(self.scheduler).__name__}: another call set its timesteps while this one was under way, "
                "expected a scheduler of its own for a pipeline that is called meanwhile"
            )

    def wrap_callback(self, bound: BoundArguments) -> BoundArguments:
        """Wrap the pipeline's callback among its arguments."""
        callback = bound.arguments.get("callback_on_step_end")
        if callback is None:
            return bound
        bound = copy(bound)
        bound.arguments = {**bound.arguments, "callback_on_step_end": self._watching(callback)}
        if hasattr(
            callback, "tensor_inputs"
        ):  # diffusers asks its own callback objects what they want to see
            bound.arguments["callback_on_step_end_tensor_inputs"] = callback.tensor_inputs
        return bound

    def _watching(self, callback: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a callback of the pipeline so that calls of other pipelines inside it do not count as this call's."""

        def after_step(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> Any:
            latents = given.get("latents")
            before = None if latents is None else (latents, _version(latents), latents.clone())
            with listening(None):
                returned = callback(pipe, step, timestep, given)
            after = returned.get("latents", latents)
            if before is not None and self._is_jump(*before, after):
                self.clock.age += 1
            return returned

        return after_step

    def _is_jump(self, latents: Tensor, version: int, before: Tensor, after: Tensor) -> bool:
        """Return whether latents were moved farther than the step before moved them."""
        untouched = after is latents and not after.is_inference() and _version(after) == version
        if untouched or self._moved is None:
            return False
        origin, goal = self._moved
        if after.shape != before.shape or not isinstance(origin, Tensor):
            return True
        step = (goal - origin).norm() if goal is not latents else (before - origin).norm()
        return bool((after - before).norm() > step)

    def _current(self) -> Trajectory:
        """Return the trajectory, made anew if its state is void."""
        if self._trajectory is None or self.clock.age != self._age:
            self._close()
            for net in self.nets:  # some pipelines set processors in the call
                refuse_closed(net.model, self._sites, self.policies)
            times = [t / self.clock.scale for t in self.clock.times]
            for policy in self.policies:
                policy.check_schedule(times, type(self.scheduler).__name__)
            total = len(self.clock.times)
            idle = [] if self.evaluations else self._idle_from_here(total)
            if not self.named and idle:
                LOG.warning(
                    "%d evaluations are too few for %s: all are computed",
                    total - self.clock.index,
                    brief(idle[0]),
                )
                self.policies = tuple(p.exact() if p in idle else p for p in self.policies)
            self._trajectory = Trajectory(self._sites, self.policies, total, self.max_bytes, self._learned)
            if self.named:
                refuse_idle(idle, total - self.clock.index)
            self._age = self.clock.age
        return self._trajectory

    def _idle_from_here(self, total: int) -> list[Policy]:
        """List the policies whose setting alone says that they can save nothing in what is left of a trajectory."""
        left = total - self.clock.index
        # a list of one's own is of the whole trajectory's evaluations: it says little about a late start
        known = (p for p in self.policies if left == total or not getattr(p, "schedule", ()))
        return [policy for policy in known if is_idle(policy, left)]

    def _close(self) -> None:
        """Note what a trajectory did; its state is freed."""
        trajectory, self._trajectory = self._trajectory, None
        if trajectory is None:
            return
        done = [receipt for receipt in trajectory.receipts if receipt.calls]
        self.receipts += done
        self.peak_bytes = max(self.peak_bytes, trajectory.peak_bytes)
        if not done:
            return
        try:
            trajectory.finish()
            self._had_effect = True
        except NoEffectError as error:
            self._idle = str(error)  # the error itself knows this frame, and would keep the state alive

    def _lane(self, net: Net) -> str:
        """Name the branch by the cache context, else by its ordinal among the calls since the last step."""
        name = self.context or "call"
        place = self._ordinals[net.name, name]
        self._ordinals[net.name, name] += 1
        return name if self.context and not place else f"{name}{place}"

    def _layout(self, key: tuple[str, str], net: Net, arguments: Mapping[str, Any]) -> tuple[Segment, ...]:
        """Build the layout of this call; reuse the branch's last one for the very same arguments."""
        bound = [arguments.get(name) for name in net.family.asks()]
        before = self._layouts.get(key)
        if before is None or not all(a is b for a, b in zip(bound, before[0], strict=True)):
            before = self._layouts[key] = (bound, net.family.layout(net.model, arguments))
        return before[1]


class CacheContext:
    """`model.cache_context`, which also tells the passage in force its name; follows a copy of the model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @contextmanager
    def __call__(self, name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
        pipeline_call = LISTENER.get()
        with type(self.model).cache_context(self.model, name, *args, **kwargs):  # type: ignore[attr-defined]
            if not isinstance(pipeline_call, PipelineCall):
                yield
                return
            outer, pipeline_call.context = pipeline_call.context, name
            try:
                yield
            finally:
                pipeline_call.context = outer


class TransformerHooks:
    """The hooks of one accelerated pipeline on one transformer; without a passage of its own they do nothing."""

    net: Net | None = None

    def __init__(self, net: Net) -> None:
        self.net = net
        self._names = parameters_of(type(net.model).forward)
        self._model = model = net.model
        _drop_copies(model)
        self._handles = [
            model.register_forward_pre_hook(self.before, prepend=True, with_kwargs=True),
            model.register_forward_hook(self.after, always_call=True),
        ]
        if hasattr(type(model), "cache_context"):
            model.cache_context = CacheContext(model)  # type: ignore[assignment]

    def remove(self) -> bool:
        """Take the hooks away; whether no other accelerated pipeline watches the transformer."""
        for handle in self._handles:
            handle.remove()
        model = self._model
        others = (getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values())
        if any(isinstance(other, TransformerHooks) for other in others):
            return False
        vars(model).pop("cache_context", None)
        return True

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy without the hooks: a copy of the transformer is no part of the accelerated pipeline."""
        return object.__new__, (TransformerHooks,)

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.net and (pipeline_call := self._pipeline_call()):
            pipeline_call.enter(self.net, by_name(self._names, args, kwargs))

    def after(self, model: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        if pipeline_call := self._pipeline_call():
            return pipeline_call.leave(out)
        return None

    def _pipeline_call(self) -> PipelineCall | None:
        listener = LISTENER.get()
        ours = isinstance(listener, PipelineCall) and any(net is self.net for net in listener.nets)
        return listener if ours else None  # type: ignore[return-value]


def _check_labels(net: Net, arguments: Mapping[str, Any]) -> None:
    """Refuse classes that a transformer does not have, which torch would look up beyond its table.

    Raises:
        ConfigError: there is one.
    """
    slots = {} if net.family.inputs is None else net.family.inputs.slots(net.model)
    for name, slot in slots.items():
        given = arguments.get(name)
        if not slot.below or not isinstance(given, Tensor) or given.numel() == 0:
            continue
        # the one after the last is none
        if odd := [label for label in given.flatten().tolist() if not 0 <= label <= slot.below]:
            raise ConfigError(
                f"{type(net.model).__name__}: {name} {odd[0]}, expected whole numbers from 0 to {slot.below - 1}"
            )


def _learned(nets: Sequence[Net]) -> nn.ModuleDict | None:
    """Return the weights that policies learned with a transformer, where that has its own."""
    for net in nets:
        if learned := adopted(net.model).learned:
            return learned.to(next(net.model.parameters()).device)
    return None


def _drop_copies(model: nn.Module) -> None:
    """Take away the hooks that came with a copy of a watched transformer."""
    before = (model._forward_pre_hooks, model._forward_pre_hooks_with_kwargs)
    after = (model._forward_hooks, model._forward_hooks_always_called)
    for hooks, marked in (before, after):
        watches = {key: getattr(hook, "__self__", None) for key, hook in hooks.items()}
        for key, watch in watches.items():
            if isinstance(watch, TransformerHooks) and watch.net is None:
                del hooks[key]
                marked.pop(key, None)


def _is_same(a: tuple[Tensor, int], b: tuple[Tensor, int]) -> bool:
    """Return whether two tensors are the same object, unchanged since, or hold the same values."""
    if a[0] is b[0]:
        return a[1] == b[1]
    return a[0].shape == b[0].shape and torch.equal(a[0], b[0])


def _leaves(tree: Any) -> list[Any]:
    return [tree] if tree is None or isinstance(tree, Tensor) else tree_leaves(tree)


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version
