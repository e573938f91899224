"""The guided denoiser: at (x, t) it gives a solver an estimate that can be read in any form."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ditkit.core.cond import Cond, check_cond
from ditkit.core.errors import ConfigError, unknown
from ditkit.core.model import Denoiser
from ditkit.core.path import Path, Prediction
from ditkit.core.policy import with_inherent
from ditkit.core.run import Call
from ditkit.core.trajectory import Trajectory
from ditkit.sample.guidance import Guidance

Progress = Callable[[int, int], None]
"""`progress(done, total)`, in evaluations."""

MAIN = "main"
"""The sampled network, beside those of guidance."""
LATEST = 1 - 1e-3
"""Time of evaluation in place of t = 1 for forms that are infinite at alpha = 0 (SiT's sample_eps)."""


@dataclass(frozen=True)
class Estimate:
    """The output of the guided model at (x, t).

    Args:
        value: [B, C, ...] of the form `kind`, in the dtype of `x`. t: [1].
        fraction: [B, C, ...] where the model learns its variance; always the conditional branch's.
    """

    path: Path
    kind: Prediction
    value: Tensor
    x: Tensor
    t: Tensor
    fraction: Tensor | None = None

    def to(self, target: Prediction) -> Tensor:
        """Return the estimate as velocity, noise, data or score, [B, C, ...]."""
        return self.path.convert(self.value, self.x, self.t, self.kind, target)


class GuidanceBranch(NamedTuple):
    """A guidance branch: its network, conditioning, policies, and number of copies of x."""

    name: str
    net: str
    model: Denoiser
    cond: Cond
    trajectory: Trajectory
    copies: int = 1


class GuidedDenoiser:
    """A model, its guidance and its policies on one trajectory; each call of it is one evaluation.

    Args:
        trajectory: the policies at work on the model's sites.
        batched: run the branches of the model as one call of 2B or more rows, in a lane such as "cond+uncond", unless
            a branch is given another number of things, or things of another shape, texts apart.

    Raises:
        ConfigError: a network is in train mode, or a guide's path or prediction differs from the model's.
    """

    def __init__(
        self,
        model: Denoiser,
        cond: Cond,
        guidance: Guidance,
        trajectory: Trajectory,
        *,
        batched: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self.model, self.guidance, self.total = model, guidance, trajectory.total
        self.batched, self.progress = batched, progress
        self.path = model.config.convention.make_path()
        self.kind: Prediction = model.config.convention.prediction
        self.latest = latest_time(self.path, self.kind)
        self.index = self.forwards = 0
        self.trajectory = trajectory
        check_cond(type(model).__name__, model.conditions, cond, cond_rows(cond))
        self.lanes = {"cond": GuidanceBranch("cond", MAIN, model, cond, self.trajectory)}
        for name, network in guidance.networks().items():
            lane = GuidanceBranch("cond", name, network, cond, self._of_guide(network))
            self.lanes[f"{name}:cond"] = lane
        for lane in self.lanes.values():
            _check(lane, model)

    def __call__(self, x: Tensor, t: float) -> Estimate:
        """Estimate at `x` [B, C, ...] and `t`, noise-time or a discrete path's index.

        A noise or score prediction has no data in it at alpha = 0; it is then evaluated at `LATEST`.
        """
        t = min(t, self.latest)
        evaluation = _Evaluation(self, x, t)
        value = self.guidance(evaluation, evaluation.clock)
        value = self.trajectory.guided(evaluation.calls[0], value)
        self.index += 1
        if self.progress is not None:
            self.progress(self.index, self.total)
        fraction = None if evaluation.fraction is None else evaluation.fraction.to(x.dtype)
        return Estimate(self.path, self.kind, value.to(x.dtype), x, x.new_tensor([t]), fraction)

    @property
    def trajectories(self) -> list[Trajectory]:
        """The model's, then those of guides that do not share it."""
        return list(dict.fromkeys(lane.trajectory for lane in self.lanes.values()))

    def lane(self, name: str) -> GuidanceBranch:
        """Return the lane of a branch, or of several joined by "+" in one batch; each is built on first use.

        Raises:
            ConfigError: the model has no such branch, or guidance no such network.
            ShapeError: branches that are given things of several shapes, but for texts, cannot be joined.
        """
        if name not in self.lanes:
            net, branch = self._place(name)
            base = self.lanes.get(f"{net}:cond" if net else "cond")
            if base is None:
                raise ConfigError(
                    "guidance: " + unknown("network", net, self.guidance.networks() or ("none",))
                )
            names = branch.split("+")
            conds = [base.model.branch(base.cond, one) for one in names]
            cond = conds[0] if len(conds) == 1 else Cond.cat(conds)
            self.lanes[name] = base._replace(name=branch, cond=cond, copies=len(names))
        return self.lanes[name]

    def joins(self, names: Sequence[str]) -> bool:
        """Return whether branches run as one call: the model's own, given things of one shape but for texts."""
        if not self.batched or len(names) < 2 or any(self._place(name)[0] for name in names):
            return False
        return "+".join(names) in self.lanes or Cond.joins([self.lane(name).cond for name in names])

    def _place(self, name: str) -> tuple[str, str]:
        """Split "NET:BRANCH"; a network's name alone is its "cond", unless the model has such a branch."""
        if f"{name}:cond" in self.lanes and name not in self.model.branches:
            return name, "cond"
        net, _, branch = name.rpartition(":")
        return net, branch

    def _of_guide(self, network: Denoiser) -> Trajectory:
        """Return the guide's trajectory.

        It is the model's own if the guide has the same sites and policies and neither has weights that a policy
        learned.

        A guide of other sites runs without policies, but for the inherent ones of its own.
        """
        main, sites = self.trajectory, network.sites()
        added = [policy for policy in getattr(self.model, "policies", ()) if policy.inherent]
        given = [policy for policy in main.policies if policy not in added]
        policies = with_inherent(network, given if sites == self.model.sites() else ())
        if sites != self.model.sites() and not policies:
            return Trajectory((), (), self.total)
        learned = {*self.model.learned, *network.learned}
        apart = not learned.isdisjoint(type(policy).__name__ for policy in (*main.policies, *policies))
        if network is self.model or (list(policies) == list(main.policies) and not apart):
            return main  # policies key their state by network and lane
        return Trajectory(sites, policies, self.total, main.max_bytes, network.learned)


class _Evaluation:
    """The branches of one evaluation, run as guidance asks for them."""

    def __init__(self, field: GuidedDenoiser, x: Tensor, t: float) -> None:
        self.field, self.x, self.t = field, x, t
        self.clock = field.path.noise_time(t)
        self.calls: list[Call] = []
        self.fraction: Tensor | None = None

    def __call__(self, *names: str) -> tuple[Tensor, ...]:
        if self.field.joins(names):
            value, fraction = self._forward(self.field.lane("+".join(names)))
            if fraction is not None and "cond" in names:
                self.fraction = fraction.chunk(len(names))[names.index("cond")]
            return value.chunk(len(names))
        values = []
        for name in names:
            value, fraction = self._forward(self.field.lane(name))
            values.append(value)
            if name == "cond":
                self.fraction = fraction
        return tuple(values)

    def _forward(self, lane: GuidanceBranch) -> tuple[Tensor, Tensor | None]:
        """One forward pass: a prediction in noise-time and the variance fraction, at least in float32."""
        field, model = self.field, lane.model
        device, dtype = placement(model)
        x = torch.cat([self.x] * lane.copies).to(device, dtype)
        exact = torch.promote_types(dtype, torch.float32)
        t = torch.full((len(x),), self.t, device=device, dtype=exact)
        layout = model.layout(tuple(x.shape[1:]))
        times = torch.full((len(x),), self.clock, device=device)
        call = Call(field.index, field.total, self.clock, lane.name, lane.net, layout, times)
        self.calls.append(call)
        convention = model.config.convention
        out = model(x, convention.model_time(t), lane.cond, lane.trajectory.run(call))
        out = lane.trajectory.leave(call, out)
        field.forwards += 1
        value, fraction = convention.split(out.to(exact))
        return value, fraction


def cond_rows(cond: Cond) -> int:
    """Return how many samples a conditioning is of; 0 where nothing is given."""
    return next((len(value) for _, value in cond.tensors()), 0)


def placement(model: Denoiser) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a model's first floating-point parameter; without any, CPU and float64."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            return parameter.device, parameter.dtype
    return torch.device("cpu"), torch.float64


def latest_time(path: Path, kind: Prediction) -> float:
    """Return the latest time at which a prediction can be converted."""
    needs_data = kind in ("noise", "score")
    ends_at_zero = path.at(torch.ones(1, dtype=torch.float64)).alpha.item() < 1 - LATEST
    return LATEST if needs_data and ends_at_zero else math.inf


def _check(lane: GuidanceBranch, model: Denoiser) -> None:
    if lane.model.training:
        raise ConfigError(
            f"the network {lane.net!r} is in train mode and would drop labels at random; call eval() first"
        )
    given, wanted = lane.model.config.convention, model.config.convention
    if (given.path, given.prediction) != (wanted.path, wanted.prediction):
        raise ConfigError(
            f"the network {lane.net!r} predicts {given.prediction} on path {given.path!r}; "
            f"expected {wanted.prediction} on {wanted.path!r}, as the sampled model"
        )
