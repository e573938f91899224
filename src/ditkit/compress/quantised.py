"""Quantised networks: what TFMQ-DM and its successor share, from the layers they find to the ranges they fit."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from annotated_types import Gt
from torch import Tensor, nn

from ditkit.compress.calibration import Calibration, some_rows
from ditkit.compress.ranges import Running
from ditkit.compress.reconstruction import Units, learn_features
from ditkit.compress.rounding import Rounded, Rounding
from ditkit.core.config import Checked, Count, Natural
from ditkit.core.errors import ConfigError, ConflictError
from ditkit.core.transform import Draws, Report, Transform
from ditkit.nn.quantised import FLOAT, QuantisedLinear, Schedule
from ditkit.nn.time_path import SAMPLES, TimePath, binder, find_time_path, name_of
from ditkit.ops.int8_linear import find

SEARCHED = 16
"""Samples of a step from which a range is searched first."""
TRACED = 32
"""Rows of times that are computed at once."""

Weights = Literal[4, 8, 32]
Activations = Literal[7, 8, 32]


@dataclass(frozen=True)
class Quantised(Checked, Transform):
    """Base of transforms that leave linear layers of whole numbers.

    The layers are found in a trace of a call: all but the first ones of each path and the last. The time MLP and the
    first layer behind the embedded sample take their rows as they are.

    Args:
        weights, activations: bits. 4 make weights small, not fast: no processor multiplies them as they are. Seven bits
            of activations are one product less where fbgemm has no instructions for int8; 32 leaves them floats.
        rounding: of weights: "learned", or to the "nearest".
        ranges: of activations: one for each of the "steps", "one" for all, or one of each row, taken when it comes
            ("rows", which asks for no calibration).
        steps, samples: of the trajectories that a verb draws as calibration, where none is given.
        interval: every so many steps are calibrated; others have the nearest one's ranges.
        iterations, rate, batch: of learning, a block.
        kernel: of the product of int8, "auto" for the fastest.
        seed: of calibration and of batches.
        layers, features, shared, raw, times, network: found, and left to be found: the layers that are quantised; of
            the time path, those that give features and those before them; those whose activations stay; the schedule;
            and which module of the model is called with a time.
    """

    keeps: ClassVar[tuple[str, ...]] = QuantisedLinear.keeps

    weights: Weights = 8
    activations: Activations = 8
    rounding: Literal["learned", "nearest"] = "learned"
    ranges: Literal["steps", "one", "rows"] = "steps"
    steps: Count = 50
    samples: Count = 256
    interval: Count = 5
    iterations: Count = 20_000
    rate: Annotated[float, Gt(0)] = 1e-3
    batch: Count = 32
    kernel: Literal["auto", "fbgemm", "torchao", "torch"] = "auto"
    seed: Natural = 0
    layers: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    raw: tuple[str, ...] = ()
    times: tuple[float, ...] = ()
    network: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights == FLOAT and self.activations != FLOAT:
            raise ConfigError(
                f"{type(self).__name__}: weights=32 and activations={self.activations}, expected weights of 4 or 8 bits"
            )

    @property
    def fits(self) -> bool:
        """True if values follow from calibration."""
        return self.rounding == "learned" or (self.activations != FLOAT and self.ranges != "rows")

    @property
    def traces(self) -> bool:
        """True if the time path is computed by itself."""
        return self.rounding == "learned"

    def check(self, model: Any) -> None:
        if held := self.fixed(model):
            raise ConflictError(
                f"{type(self).__name__}: {held[0]!r} is of whole numbers already, expected a model of floats"
            )
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        if self.activations != FLOAT and device.type != "meta":
            find(self.kernel, device)
        for name in self.layers:
            if type(found := _submodule(model, name)) is not nn.Linear:
                raise ConfigError(
                    f"{type(self).__name__}: {name!r} is {_called(found)}, expected a linear layer of this "
                    f"{type(model).__name__}"
                )

    def draws(self) -> Draws | None:
        return Draws(self.steps, self.samples, self.seed) if self.fits or not self.layers else None

    def resolved(self, model: Any, calibration: Any = None) -> Self:
        who = type(self).__name__
        needed = self.fits or not self.layers
        if calibration is None:
            if needed:
                raise ConfigError(
                    f"{who}: it is fitted to calibration, and got none; ditkit.compress draws it for models that "
                    "sample, and a pipeline's is recorded by ditkit.compress.recording(pipe.transformer)"
                )
            return self
        if not isinstance(calibration, Calibration):
            raise ConfigError(
                f"{who}: calibration={calibration!r:.60}, expected a Calibration of recorded calls"
            )
        calibration.check(who, SEARCHED, tuple(model.sample_shape))
        times = self.ranged(calibration).times
        if self.layers and not self.traces:
            return replace(self, times=times)
        path = self._path(model, calibration)
        if self.layers:
            return self._carrying(replace(self, times=times), path)
        prefix = _prefix(model)
        left = {*path.first, *path.last}
        found = replace(
            self,
            layers=tuple(prefix + n for n in (*path.layers, *path.data) if n not in left),
            features=tuple(prefix + n for n in path.features),
            shared=tuple(prefix + n for n in path.shared),
            raw=tuple(prefix + n for n in (*path.shared, *path.second[:1])),
            times=times,
            network=prefix.rstrip("."),
        )
        return self._carrying(found, path)

    def ranged(self, calibration: Calibration) -> Calibration:
        """Return the calls at the steps that have ranges of their own."""
        return calibration.every(self.interval)

    def schedule(self) -> Schedule:
        """Return a schedule that knows the times."""
        return Schedule(self.times)

    def shape(self, model: Any) -> Any:
        schedule = self.schedule()
        if self.times:
            network = network_of(model, self.network)
            schedule.attach(network, binder(network))
        for name in self.layers:
            put(model, name, self.layer(model, name, schedule))
        return model

    def fixed(self, model: Any) -> list[str]:
        return [name for name, m in model.named_modules() if isinstance(m, QuantisedLinear)]

    def exact(self) -> Self:
        return replace(self, weights=FLOAT, activations=FLOAT)

    @abstractmethod
    def round_time_path(self, fitting: Fitting) -> None:
        """Decide the weights of the time path, before blocks are reconstructed."""

    def place(self, name: str) -> str:
        """Return where the layer stands that holds the whole numbers of the layer `name`; empty if none does."""
        return name

    def finish(self, model: Any) -> None:
        """Fill what the structure has beside quantised layers, before ranges are fitted."""

    def apply(self, model: Any, calibration: Any = None) -> tuple[Any, Report]:
        fitting = Fitting(self, model, vars(self).pop("_found", None), calibration)
        if self.rounding == "learned" or vars(self).get("_selection") is not None:
            fitting.clock("time path", lambda: self.round_time_path(fitting))
        if self.rounding == "learned":
            fitting.clock("blocks", fitting.reconstruct)
        fitting.restore()
        self.shape(model)
        for name, layer in fitting.rounded.items():
            mode = layer.mode if layer.mode != "full" else "nearest"
            if at := self.place(name):
                held: Any = model.get_submodule(at)
                held.hold(layer.whole(mode), *layer.range, layer.bias)
        self.finish(model)
        if self.activations != FLOAT and self.ranges != "rows":
            fitting.clock("ranges", fitting.ranges)
        return model, {"layers": len(self.layers), **fitting.report}

    def layer(self, model: Any, name: str, schedule: Schedule) -> nn.Module:
        """Return the layer of whole numbers that takes the place of the layer `name`."""
        whole = self.activations == FLOAT or name in self.raw
        ranges = 0 if whole or self.ranges == "rows" else 1 if self.ranges == "one" else len(self.times)
        return QuantisedLinear.like(
            model.get_submodule(name),
            bits=self.weights,
            activations=FLOAT if whole else self.activations,
            ranges=ranges,
            kernel=self.kernel,
            schedule=schedule,
        )

    def _path(self, model: Any, calibration: Calibration) -> TimePath:
        network = network_of(model, _prefix(model).rstrip("."))
        trained = {n.removeprefix(_prefix(model)) for t in model.transforms for n in t.trains(model)}
        rows = min(
            TRACED, len(calibration.calls) * len(calibration.calls[0][name_of(SAMPLES, calibration.calls[0])])
        )
        return find_time_path(network, calibration.calls[0], rows, {n.rpartition(".")[0] for n in trained})

    def _carrying(self, found: Self, path: TimePath) -> Self:
        """Let the setting that `apply` runs under know the trace, which is no field of it."""
        object.__setattr__(found, "_found", path)
        return found


class Fitting:
    """The work of one `apply`: a model whose layers are being rounded, and what is known of its calls."""

    def __init__(
        self, setting: Quantised, model: Any, path: TimePath | None, calibration: Calibration | None
    ) -> None:
        self.setting, self.model, self.path, self.calibration = setting, model, path, calibration
        self.report: dict[str, Any] = {}
        self.weights = tensors_of_network(network_of(model, setting.network))
        self.left: set[str] = set()
        """Layers that the blocks' reconstruction leaves alone."""
        self.rounded: dict[str, Rounded] = {}
        self.beside: dict[str, Any] = {}
        """Further modules that stand in for layers meanwhile: they have a `linear` and a `mode`, as rounded ones."""
        for name in setting.layers:
            self.rounded[name] = Rounded(model.get_submodule(name), setting.weights)
            put(model, name, self.rounded[name])

    def restore(self) -> None:
        """Put the layers back that were there."""
        for name, layer in {**self.rounded, **self.beside}.items():
            put(self.model, name, layer.linear)

    @property
    def time_path(self) -> dict[str, Rounded]:
        """The layers of the time path that are quantised, by their names in the network."""
        names = (*self.setting.shared, *self.setting.features)
        prefix = self.setting.network + "." if self.setting.network else ""
        return {name.removeprefix(prefix): self.rounded[name] for name in names if name in self.rounded}

    @property
    def settings(self) -> Rounding:
        own = self.setting
        return Rounding(own.iterations, own.rate, own.batch)

    def learn_features(self) -> None:
        """Learn the rounding of the time path by itself (TIAR)."""
        assert self.path is not None and self.calibration is not None
        rows = self.calibration.every(self.setting.interval).rows(self.path.reads)
        done = learn_features(self.path, rows, self.weights, self.time_path, self.settings, self.setting.seed)
        self.report["time_path_iterations"] = done

    def reconstruct(self) -> None:
        """Learn the rounding of all layers that are not decided yet, block by block."""
        assert self.calibration is not None
        chosen = [n for n, layer in self.rounded.items() if layer.mode == "full" and n not in self.left]
        calls = self.calibration.every(self.setting.interval).calls
        units = Units(self.model, calls, {**self.rounded, **self.beside})
        self.report["block_iterations"] = units.learn(chosen, self.settings, self.setting.seed)

    @torch.no_grad()
    def ranges(self) -> None:
        """Fit the ranges of activations of each step by itself (finite set calibration)."""
        assert self.calibration is not None
        layers = {
            name: layer
            for name in self.setting.layers
            if (at := self.setting.place(name))
            and isinstance(layer := self.model.get_submodule(at), QuantisedLinear)
            and layer.range_scale is not None
        }
        calibration = self.setting.ranged(self.calibration)
        for step, t in enumerate(calibration.times):
            place = step if self.setting.ranges == "steps" else 0
            if step == 0 or self.setting.ranges == "steps":
                running = {n: Running(self.setting.activations, n in self.setting.features) for n in layers}
            hooks = [
                layer.register_forward_pre_hook(partial(_observe, running[name], place))
                for name, layer in layers.items()
            ]
            for call in _searched_first(calibration.at(t)):
                self.model(**call)
            for hook in hooks:
                hook.remove()

    def clock(self, what: str, work: Callable[[], None]) -> None:
        """Do a part of the work, and note how long it took."""
        began = time.perf_counter()
        work()
        self.report[what.replace(" ", "_") + "_seconds"] = round(time.perf_counter() - began, 3)


def _observe(running: Running, step: int, layer: Any, args: tuple[Tensor, ...]) -> None:
    scale, zero = running.see(args[0].float())
    layer.range_scale[step], layer.range_zero[step] = scale[0], zero[0]


def _searched_first(calls: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Put before the calls the first samples, from which a range is searched; they run again with all others."""
    first, count = calls[0], len(calls[0][name_of(SAMPLES, calls[0])])
    return [some_rows(first, 0, min(SEARCHED, count)), *calls]


def put(model: Any, name: str, layer: nn.Module) -> None:
    """Put `layer` in the place of the one called `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)


def network_of(model: Any, name: str) -> Any:
    """Return the module of `model` that is called with a time."""
    return model.get_submodule(name) if name else model


def tensors_of_network(network: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name, cut from autograd."""
    held = (*network.named_parameters(), *network.named_buffers())
    return {name: value.detach() for name, value in held}


def _prefix(model: Any) -> str:
    """Return under what the network stands that is called with a time: a model may hold one of diffusers."""
    return "transformer." if "transformer" in model._modules else ""


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _called(module: nn.Module | None) -> str:
    return "no layer" if module is None else f"a {type(module).__name__}"
