"""The time path of a network: the layers that depend on time and on no token, found in a trace of one call.

A trace lists every operation with its inputs. A layer whose input descends from the time, and neither from the sample
nor from a sequence of text, is of the time path, whatever its weights are; on class and pooled text it may depend too.
The same trace, without all that the features do not need, is the network that computes them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from ditkit.core.errors import ConfigError
from ditkit.nn.quantised import TIMES

SAMPLES = ("x", "hidden_states")
"""Names of the argument of a network's forward that is the noisy sample."""
Bound = Mapping[str, Any]
"""The arguments of one call, by name."""


def binder(network: nn.Module) -> Callable[..., Bound]:
    """Return a function that gives the arguments of a call of `network` their names.

    Raises:
        ConfigError: its forward takes no time, or no sample.
    """
    signature = inspect.signature(network.forward)
    for names in (TIMES, SAMPLES):
        if not any(name in signature.parameters for name in names):
            raise ConfigError(
                f"{type(network).__name__}: its forward takes {', '.join(signature.parameters)}, expected a "
                f"{' or '.join(names)}"
            )

    def bound(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Bound:
        named = dict(signature.bind(*args, **kwargs).arguments)
        for name, parameter in signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                named |= named.pop(name, {})
        return {name: value for name, value in named.items() if name not in ("run", "return_dict")}

    return bound


def map_tensors(value: Any, fn: Callable[[str, Tensor], Any], at: str = "") -> Any:
    """Return `value` with `fn(name, tensor)` in place of every tensor in mappings, sequences and dataclasses."""
    inner = at + "." if at else ""
    if isinstance(value, Tensor):
        return fn(at, value)
    if isinstance(value, Mapping):
        return {key: map_tensors(one, fn, inner + str(key)) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([map_tensors(one, fn, f"{inner}{i}") for i, one in enumerate(value)])
    if is_dataclass(value) and not isinstance(value, type):
        known = {f.name: getattr(value, f.name) for f in fields(value)}
        return replace(value, **{k: map_tensors(v, fn, inner + k) for k, v in known.items()})
    return value


def tensors_of(bound: Bound) -> dict[str, Tensor]:
    """Return the tensors of a call's arguments by name, such as "t" and "cond.label"."""
    found: dict[str, Tensor] = {}

    def note(name: str, tensor: Tensor) -> Tensor:
        found[name] = tensor
        return tensor

    map_tensors(bound, note)
    return found


def name_of(names: Sequence[str], bound: Bound) -> str:
    """Return which of `names` a call has."""
    return next(name for name in names if name in bound)


@dataclass(frozen=True)
class TimePath:
    """The layers of a network that depend on time and on no token, and the function that they are.

    Args:
        shared: layers that others of the path read, in the order of the call: the time MLP.
        features: those that blocks read: each gives a temporal feature.
        data: linear layers that depend on the sample, or on text.
        first: those of them all that read no other linear layer: the sample itself, the time itself.
        second: layers of `data` that read the first of them.
        last: layers of `data` that no other reads.
        reads: names of the tensors that the features depend on, the time first.
        rows: that `compute` takes.
    """

    shared: tuple[str, ...]
    features: tuple[str, ...]
    data: tuple[str, ...]
    first: tuple[str, ...]
    second: tuple[str, ...]
    last: tuple[str, ...]
    reads: tuple[str, ...]
    rows: int
    trace: torch.fx.GraphModule
    parameters: tuple[str, ...]

    @property
    def layers(self) -> tuple[str, ...]:
        return (*self.shared, *self.features)

    def compute(
        self, rows: Mapping[str, Tensor], weights: Mapping[str, Tensor], inputs: bool = False
    ) -> list[Tensor]:
        """Compute the features [B, N], in the order of `features`; or the inputs of their layers, [B, K].

        Args:
            rows: what the features depend on, by the names of `reads`, as many rows as were traced.
            weights: the network's tensors by name, some of them replaced.
        """
        found = self.trace(*(weights[name] for name in self.parameters), *(rows[name] for name in self.reads))
        some = found[len(self.features) :] if inputs else found[: len(self.features)]
        return [one.flatten(0, -2) for one in some]


@torch.no_grad()
def find_time_path(network: nn.Module, bound: Bound, rows: int, beside: Collection[str] = ()) -> TimePath:
    """Find the time path of `network` in a call on as many samples.

    Args:
        bound: the arguments of a call, of which the first row is taken; tensors have the batch first.
        rows: that `TimePath.compute` will be given.
        beside: layers that are none, such as adapters.

    Raises:
        ConfigError: no layer depends on time alone.
    """
    given = tensors_of(bound)
    x, t = name_of(SAMPLES, bound), name_of(TIMES, bound)
    batch = len(given[x])
    spread = {
        name: v[:1].expand(rows, *v.shape[1:]).clone() if v.ndim and len(v) == batch else v
        for name, v in given.items()
    }
    linears = {n: m for n, m in network.named_modules() if isinstance(m, nn.Linear) and n not in beside}
    held = dict(network.named_parameters()) | dict(network.named_buffers())
    names, leaves = list(held), list(spread)

    def call(*values: Tensor) -> dict[str, list[tuple[Tensor, Tensor]]]:
        weights = dict(zip(names, values[: len(names)], strict=True))
        inputs = dict(zip(leaves, values[len(names) :], strict=True))
        arguments = map_tensors(bound, lambda name, _: inputs[name])
        met: dict[str, list[tuple[Tensor, Tensor]]] = {}

        def note(name: str, _: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            met.setdefault(name, []).append((args[0], out))

        hooks = [m.register_forward_hook(partial(note, name)) for name, m in linears.items()]
        try:
            functional_call(network, weights, (), dict(arguments))
        finally:
            for hook in hooks:
                hook.remove()
        return met

    values = (*held.values(), *spread.values())
    try:
        trace = make_fx(call, tracing_mode="fake")(*values)  # nothing is computed
    except (RuntimeError, AssertionError):  # a forward that makes tensors elsewhere, or reads one
        trace = make_fx(call)(*values)
    tokens = {x, *(name for name, v in given.items() if v.ndim > 2)}
    return _read(trace, names, leaves, tokens, t, rows)


def _read(
    trace: torch.fx.GraphModule, names: list[str], leaves: list[str], tokens: set[str], t: str, rows: int
) -> TimePath:
    """Sort the layers of a trace by what their inputs descend from, and cut out what computes the features."""
    graph = trace.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    inputs = dict(zip(placeholders[len(names) :], leaves, strict=True))
    descends: dict[torch.fx.Node, frozenset[str]] = {}
    for node in graph.nodes:
        parents = [descends[parent] for parent in node.all_input_nodes]
        own = {inputs[node]} if node in inputs else set()
        descends[node] = frozenset(own.union(*parents))
    (output,) = (node for node in graph.nodes if node.op == "output")
    met: dict[str, list[tuple[torch.fx.Node, torch.fx.Node]]] = output.args[0]
    origin = {name: frozenset().union(*(descends[x] for x, _ in calls)) for name, calls in met.items()}
    timed = [name for name in met if t in origin[name] and not tokens & origin[name]]
    data = tuple(name for name in met if tokens & origin[name])
    if not timed:
        raise ConfigError("no linear layer depends on the time and on no sample; expected a time path")
    outs = {out: name for name, calls in met.items() for _, out in calls}
    above = {name: {before for x, _ in calls for before in _nearest(x, outs)} for name, calls in met.items()}
    read = set().union(*(above[name] for name in timed))
    direct = set().union(
        *(above[name] for name in data)
    )  # the last layer of PixArt and Wan reads the time MLP itself
    features = tuple(name for name in timed if name not in read or name in direct)
    shared = tuple(name for name in timed if name not in features)
    first = tuple(name for name in (*data, *timed) if not above[name])
    second = tuple(name for name in data if above[name] & {*first})
    last = tuple(name for name in data if not any(name in before for before in above.values()))
    output.args = (tuple(met[name][0][place] for place in (1, 0) for name in features),)
    used = _ancestors(output)
    kept = [name for node, name in inputs.items() if node in used]
    reads = (t, *(name for name in kept if name != t))
    parameters = tuple(n for n, node in zip(names, placeholders[: len(names)], strict=True) if node in used)
    _reduce(graph, placeholders, used, {name: node for node, name in inputs.items()}, reads)
    trace.recompile()
    return TimePath(shared, features, data, first, second, last, reads, rows, trace, parameters)


def _reduce(
    graph: torch.fx.Graph,
    placeholders: list[torch.fx.Node],
    used: set[torch.fx.Node],
    inputs: Mapping[str, torch.fx.Node],
    reads: Sequence[str],
) -> None:
    """Take out all that is not used, and put the inputs that are read in the order of `reads`."""
    for node in reversed(list(graph.nodes)):
        if node not in used and node.op != "output":
            graph.erase_node(node)
    last = next(node for node in graph.nodes if node.op != "placeholder")
    for name in reads:
        last.prepend(inputs[name])


def _ancestors(node: torch.fx.Node) -> set[torch.fx.Node]:
    found, todo = set(), [node]
    while todo:
        for parent in todo.pop().all_input_nodes:
            if parent not in found:
                found.add(parent)
                todo.append(parent)
    return found


def _nearest(node: torch.fx.Node, outs: Mapping[torch.fx.Node, str]) -> Iterator[str]:
    """Yield the layers that a value comes from, without those before them."""
    todo, met = [node], {node}
    while todo:
        one = todo.pop()
        if one in outs:
            yield outs[one]
            continue
        for parent in one.all_input_nodes:
            if parent not in met:
                met.add(parent)
                todo.append(parent)
