"""Train the table of a cache on whole trajectories, without data (HarmoniCa, arXiv 2410.01723).

T evaluations of a trajectory, M branches, B samples; R rows of a call: 2 B under guidance.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, NamedTuple

import torch
from annotated_types import Ge, Gt, Interval
from torch import Tensor, nn

from ditkit.caching.harmonica import COMPUTED, REUSED, CacheTable, Mixed, branch_digest
from ditkit.core.codec import fingerprint
from ditkit.core.cond import Cond, check_cond
from ditkit.core.config import Checked, Count, Natural
from ditkit.core.errors import ConfigError
from ditkit.core.labels import class_names
from ditkit.core.model import Denoiser
from ditkit.core.policy import with_inherent
from ditkit.core.run import Call, Run, Site, named
from ditkit.sample.denoiser import Estimate, latest_time, placement
from ditkit.sample.guidance import ClassifierFree, Unguided, extrapolate
from ditkit.sample.sampler import Sampling, with_prompt

Proxy = Literal["incremental", "isolated", "none"]
Follow = Literal["student", "teacher"]
Progress = Callable[[int, int], None]
LIMIT = 5.0
"""Logits stay within it, and those of the first evaluation are at it: r in [0.0067, 0.9933]."""


@dataclass(frozen=True)
class Harmonising(Checked):
    """Settings of a training.

    Args:
        trajectories: each one step of the optimiser an evaluation but the first. batch: samples of a trajectory.
        beta: weight of a computed branch; the more, the more is reused. It is small, as the loss is times a squared
            change of latents.
        threshold: a branch whose r is above it is computed (the paper's tau).
        rate: of AdamW.
        proxy: weights lambda_t of the evaluations: the squared change of what is drawn as row t joins the rows of
            earlier evaluations ("incremental", the published code), or is the only one ("isolated", the paper's
            formula); "none" is 1.
        refresh: trajectories from one proxy to the next.
        follow: whose x_t a trajectory goes on with. "teacher" is the control that learns each time by itself, from
            inputs and outputs of the exact run.
        seed: of the first rates, labels and noise.
    """

    trajectories: Count = 2000
    batch: Count = 8
    beta: Annotated[float, Ge(0)] = 7e-8
    threshold: Annotated[float, Interval(gt=0, lt=1)] = 0.1
    rate: Annotated[float, Gt(0)] = 0.01
    proxy: Proxy = "incremental"
    refresh: Count = 50
    follow: Follow = "student"
    seed: Natural = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = (torch.tensor([-LIMIT, LIMIT]).sigmoid()).tolist()
        if not low < self.threshold < high:
            raise ConfigError(
                f"harmonise: threshold={self.threshold}, expected it between the least and the greatest rate, "
                f"{low:.4f} and {high:.4f}"
            )


class Process(ABC):
    """A sampling process whose steps a training takes one by one.

    Attributes:
        times: noise-times of its evaluations. sampler: its name. sites: of its network.
    """

    times: Sequence[float]
    sampler: str
    sites: Sequence[Site]

    @abstractmethod
    def start(self, number: int) -> Any:
        """Begin the trajectory of this number; what its steps hand on."""

    @abstractmethod
    def predict(self, state: Any, index: int, run: Callable[[Call], Run]) -> Tensor:
        """Return all that the network says after guidance, [R, ...]."""

    @abstractmethod
    def step(self, state: Any, index: int, out: Tensor) -> Any:
        """Return the state after a step by a prediction."""

    @abstractmethod
    def latents(self, state: Any) -> Tensor:
        """Return what has been drawn so far, [R, ...]."""


class Drawn(NamedTuple):
    """The state of a trajectory of a model: x [R, ...] in float64, its conditioning, and the stepper."""

    x: Tensor
    cond: Cond
    stepper: Any


class ModelProcess(Process):
    """A model of ours under a deterministic solver of one estimate a step, both guidance branches as one call.

    The rows of both branches take the guided channels; the network is shown the first half twice, as DiT's code does.

    Args:
        prompts: of a model that takes them: a trajectory takes as many as it has samples, in turn.

    Raises:
        ConfigError: a solver that draws noise or takes several estimates, a guidance other than classifier-free,
            prompts for a model without text, none for one with text, or a model that needs more than classes and text.
    """

    def __init__(
        self, model: Denoiser, sampling: Sampling, seed: int = 0, prompts: Sequence[str] = ()
    ) -> None:
        self.model, self.seed = model, seed
        self.prompted = _prompted(model, prompts)
        self.path = model.config.convention.make_path()
        sampling, self.solver = sampling.on(self.path)
        if sampling.evaluations != sampling.steps or not isinstance(
            sampling.guidance, Unguided | ClassifierFree
        ):
            raise ConfigError(
                f"harmonise: {self.solver} with {sampling.guidance}, expected one evaluation a step and a "
                "classifier-free scale"
            )
        self.batch, self.guidance = sampling.batch_size, sampling.guidance
        self.grid = self.solver.times(self.path, sampling.steps)
        self.solver.begin(self.path, self.grid)  # one that draws noise refuses
        self.times = [self.path.noise_time(t) for t in self.grid[:-1].tolist()]
        self.sampler, self.sites = str(self.solver), model.sites()
        self.latest = latest_time(self.path, model.config.convention.prediction)

    def start(self, number: int) -> Drawn:
        g = torch.Generator().manual_seed(hash((self.seed, number)) % 2**63)
        shape = (self.batch, *self.model.sample_shape)
        x = torch.randn(shape, generator=g)
        classes = len(class_names(self.model))
        label = torch.randint(classes, (self.batch,), generator=g) if classes else None
        if self.prompted.text is None:
            return self.begin(x, Cond(label=label))
        turn = (number * self.batch + torch.arange(self.batch)) % len(self.prompted.text)
        return self.begin(x, replace(self.prompted.rows(turn), label=label))

    def begin(self, x: Tensor, cond: Cond) -> Drawn:
        """Begin from this noise [B, ...], of this conditioning."""
        device, _ = placement(self.model)
        cond = cond.to(device)
        if isinstance(self.guidance, ClassifierFree):
            x, cond = torch.cat([x, x]), Cond.cat([cond, self.model.unconditional(cond)])
        return Drawn(x.double().to(device), cond, self.solver.begin(self.path, self.grid))

    def predict(self, state: Drawn, index: int, run: Callable[[Call], Run]) -> Tensor:
        x, convention = self._input(state.x), self.model.config.convention
        t = torch.full((len(x),), self._time(index), dtype=x.dtype, device=x.device)
        times = torch.full((len(x),), self.times[index], device=x.device)
        lane = "cond" if isinstance(self.guidance, Unguided) else "cond+uncond"
        layout = self.model.layout(tuple(x.shape[1:]))
        call = Call(index, len(self.times), self.times[index], lane, layout=layout, times=times)
        raw: Tensor = self.model(x, convention.model_time(t), state.cond, run(call))
        if isinstance(self.guidance, Unguided):
            return raw
        cond, bare = raw.chunk(2)
        low, high = self.guidance.interval
        if self.guidance.scale == 1 or not low <= self.times[index] <= high:
            return torch.cat([cond, cond])
        C = self.guidance.channels or self.model.sample_shape[0]
        both = extrapolate(cond[:, :C], bare[:, :C], self.guidance.scale)
        return torch.cat([torch.cat([both, half[:, C:]], 1) for half in (cond, bare)])

    def step(self, state: Drawn, index: int, out: Tensor) -> Drawn:
        value, fraction = self.model.config.convention.split(out)
        kind = self.model.config.convention.prediction
        stepper = copy(state.stepper)  # the teacher and the proxies go on from the same state
        t = state.x.new_tensor([self._time(index)])
        estimate = Estimate(self.path, kind, value.to(state.x), state.x, t, fraction)
        return state._replace(x=stepper.step(state.x, estimate), stepper=stepper)

    def latents(self, state: Drawn) -> Tensor:
        return state.x

    def _time(self, index: int) -> float:
        """Return the time of an evaluation, as a sampler evaluates it."""
        return min(self.grid[index].item(), self.latest)

    def _input(self, x: Tensor) -> Tensor:
        _, dtype = placement(self.model)
        if isinstance(self.guidance, ClassifierFree):
            half = x[: len(x) // 2]
            x = torch.cat([half, half])
        return x.to(dtype)


def _prompted(model: Denoiser, prompts: Sequence[str]) -> Cond:
    """Return the tokens of prompts, for a model that is drawn by them; else nothing.

    Raises:
        ConfigError: those of `ModelProcess`.
    """
    takes = "text" in model.conditions and getattr(model.config, "text_encoder", None) is not None
    if takes and not prompts:
        raise ConfigError(
            f"harmonise: a {type(model).__name__} is drawn by prompts, got none; expected some that are typical of its "
            'use: prompts=["a red apple", ...], on the command line --prompt'
        )
    cond = with_prompt(model, Cond(), prompts or None, len(prompts))
    needed = {n: c for n, c in model.conditions.items() if n != "label"}
    check_cond(f"harmonise: {type(model).__name__}", needed, cond, len(prompts))
    return cond


class Router:
    """The table under training: a row of logits an evaluation, that of the first fixed.

    A row is a parameter of its own, so that a step of the optimiser touches one.
    """

    def __init__(self, evaluations: int, branches: int, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.rows = [nn.Parameter(torch.randn(branches, generator=g)) for _ in range(evaluations - 1)]
        self.first = torch.full((branches,), LIMIT)

    def rates(self) -> list[Tensor]:
        """Return r of every evaluation, from noise to data, [M] each."""
        return [row.sigmoid() for row in (self.first, *self.rows)]

    def clamp(self) -> None:
        """Keep the logits within the limit."""
        with torch.no_grad():
            for row in self.rows:
                row.clamp_(-LIMIT, LIMIT)


@dataclass
class Lesson:
    """One optimiser step: its evaluation, error, lambda, sum of rates, and whole loss."""

    index: int
    error: float
    weight: float
    computed: float
    loss: float


@dataclass
class Training:
    """Step-wise denoising training of a router on a process."""

    process: Process
    settings: Harmonising
    router: Router = field(init=False)
    weights: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.T = len(self.process.times)
        if self.T < 2:
            raise ConfigError(f"harmonise: {self.T} evaluation, expected two or more, the first computes all")
        self.branches = named(self.process.sites, "branch")
        if not self.branches:
            raise ConfigError("harmonise: the model has no branches")
        self.router = Router(self.T, len(self.branches), self.settings.seed)
        self.optimizer = torch.optim.AdamW(self.router.rows, lr=self.settings.rate, weight_decay=0.0)
        self.weights = [1.0] * self.T

    def run(self, progress: Progress | None = None) -> None:
        """Train to the end."""
        for number in range(self.settings.trajectories):
            start = self.process.start(number)
            if self.settings.proxy != "none" and number % self.settings.refresh == 0:
                self.weights = self.proxies(start)
            for _ in self.trajectory(start):
                pass
            if progress is not None:
                progress(number + 1, self.settings.trajectories)

    def trajectory(self, state: Any) -> Iterator[Lesson]:
        """Yield a lesson an evaluation but the first, which computes all and is not learned from."""
        student, teacher = self._session(), Mixed(self.branches, [None] * self.T, self.settings.threshold)
        with torch.no_grad():
            out = self._predict(state, 0, student, None)
        state = self.process.step(state, 0, out)
        for index in range(1, self.T):
            if self.settings.follow == "teacher":
                teacher.state.update(student.state)  # outputs of the exact run at the step before
            with torch.no_grad():
                exact = self._predict(state, index, teacher, None)
            row = self.router.rows[index - 1]
            out = self._predict(state, index, student, row.sigmoid())
            error = (exact - out).square().mean()
            computed = row.sigmoid().sum()
            loss = self.weights[index] * error + self.settings.beta * computed
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.router.clamp()
            yield Lesson(index, error.item(), self.weights[index], computed.item(), loss.item())
            if self.settings.follow == "teacher":
                student.state = dict(teacher.state)
                out = exact
            state = self.process.step(state, index, out.detach())

    @torch.no_grad()
    def proxies(self, start: Any) -> list[float]:
        """Return lambda of each evaluation: the mean squared change of the latents that its row brings.

        "Incremental": the rows of earlier evaluations are on already; each run goes on from theirs, computed in full.
        """
        rates, T = self.router.rates(), self.T
        if self.settings.proxy == "isolated":
            exact = self._end(start, 0, self._session())
            return [0.0, *(self._change(self._alone(start, i, rates[i]), exact) for i in range(1, T))]
        session, state, found = self._session(), start, [0.0]
        before = self._end(start, 0, self._session())
        state = self.process.step(state, 0, self._predict(state, 0, session, None))
        for index in range(1, T):
            out = self._predict(state, index, session, rates[index])
            state = self.process.step(state, index, out)
            ends = self._end(state, index + 1, self._session())
            found.append(self._change(ends, before))
            before = ends
        return found

    def rates(self) -> Tensor:
        """Return r, [T, M]."""
        return torch.stack(self.router.rates()).detach()

    def _alone(self, state: Any, index: int, rate: Tensor) -> Tensor:
        session = self._session()
        for i in range(index + 1):
            out = self._predict(state, i, session, rate if i == index else None)
            state = self.process.step(state, i, out)
        return self._end(state, index + 1, session)

    def _end(self, state: Any, first: int, session: Mixed) -> Tensor:
        """Return the latents at the end of a trajectory computed in full from evaluation `first`."""
        for index in range(first, self.T):
            state = self.process.step(state, index, self._predict(state, index, session, None))
        return self.process.latents(state)

    def _change(self, one: Tensor, other: Tensor) -> float:
        return (one - other).square().mean().item()

    def _session(self) -> Mixed:
        return Mixed(self.branches, [None] * self.T, self.settings.threshold)

    def _predict(self, state: Any, index: int, session: Mixed, rate: Tensor | None) -> Tensor:
        session.rates[index] = rate

        def run(call: Call) -> Run:
            return Run(session.enter(call))

        out = self.process.predict(state, index, run)
        session.commit()
        return out


def harmonise(
    model: Denoiser,
    sampling: Sampling | None = None,
    settings: Harmonising | None = None,
    *,
    prompts: Sequence[str] = (),
    progress: Progress | None = None,
    **changes: Any,
) -> CacheTable:
    """Train a table for this model and this way of sampling, which `HarmoniCa(table=...)` takes from its file.

    The model is frozen meanwhile and needs no data: labels and noise are drawn, prompts are taken in turn.

    Args:
        prompts: texts, for a model that is drawn by them.
        sampling: its steps, solver and guidance; the paper's is 10 steps of DDIM at a scale of 1.5. settings: of the
            training, whose `batch` samples stand in each trajectory.
        changes: words of `Sampling` that differ.

    Raises:
        ConfigError: a solver or guidance that cannot be stepped through, a model under other policies, one that needs
            other than classes and prompts, or too few steps.
        DataError: the weights of its text encoder are missing.
    """
    settings = settings or Harmonising()
    sampling = (sampling or Sampling(steps=10, guidance=1.5)).changed(  # type: ignore[arg-type]
        **{**changes, "batch_size": settings.batch}
    )
    if sampling.policies or with_inherent(model, ()):
        raise ConfigError("harmonise: got a model or sampling under policies, expected none")
    process = ModelProcess(model, sampling, settings.seed, prompts)
    with frozen(model):
        training = Training(process, settings)
        training.run(progress)
        return table_of(
            training, type(model).__name__, fingerprint(model.state_dict()), str(sampling.guidance)
        )


def table_of(training: Training, model: str, weights: str, guidance: str) -> CacheTable:
    """Return the table that a training has come to."""
    rates, settings = training.rates(), training.settings
    rows = tuple(
        "".join(COMPUTED if r > settings.threshold else REUSED for r in row) for row in rates.tolist()
    )
    return CacheTable(
        model=model,
        sites=branch_digest(training.process.sites),
        sampler=training.process.sampler,
        times=tuple(training.process.times),
        rows=rows,
        rates=tuple(tuple(round(r, 6) for r in row) for row in rates.tolist()),
        threshold=settings.threshold,
        weights=weights,
        training={
            "guidance": guidance,
            "trajectories": settings.trajectories,
            "batch": settings.batch,
            "beta": settings.beta,
            "proxy": settings.proxy,
            "follow": settings.follow,
            "seed": settings.seed,
        },
    )


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Hold a network in eval mode without gradients of its weights; afterwards it is as it was."""
    trained = [(weight, weight.requires_grad) for weight in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval().requires_grad_(False)
        yield
    finally:
        for weight, before in trained:
            weight.requires_grad_(before)
        for module, mode in modes:
            module.training = mode
