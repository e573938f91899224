"""Solvers as steppers: the plain loops they stand for, orders, grids of times, and the same solvers of diffusers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from itertools import pairwise
from math import sqrt
from pathlib import Path as File
from typing import Any

import diffusers
import pytest
import torch
from test_diffusers_schedulers import BETAS, FLOW
from test_mixture import Mixture, model_of
from torch import Tensor

from ditkit.core.catalog import every
from ditkit.core.convention import DDPM, Convention
from ditkit.core.ddpm import DiscretePath
from ditkit.core.errors import ConfigError
from ditkit.core.path import Cosine, Linear, VariancePreserving
from ditkit.core.spec import component, spec
from ditkit.core.time_grid import Even, Shift, Table, TimeGrid
from ditkit.core.trajectory import Trajectory
from ditkit.sample import (
    Ancestral,
    ClassifierFree,
    Ddim,
    DdimInversion,
    DiffusersScheduler,
    DpmSolverPP,
    Euler,
    EulerMaruyama,
    Heun,
    SampleNoise,
    Solver,
    UniPc,
    invert,
)
from ditkit.sample.denoiser import Estimate, GuidedDenoiser
from ditkit.sample.guidance import Unguided
from ditkit.sample.steppers import follow
from ditkit.train.timesteps import Shifted
from sampling_support import COND, SEEDS, SOLVERS, draw, tiny

sys.path.append(str(File(__file__).parents[2] / "benchmarks"))
import solver_orders

pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")
ORDERS = {  # between the ends; UniPC's corrector adds one to its p
    "euler": 1, "heun": 2, "ddim": 1, "dpmsolverpp:order=1": 1, "dpmsolverpp": 2, "unipc:order=1": 2, "unipc": 3,
    "unipc:order=3": 4, "ddiminversion": 1, "eulermaruyama": 1, "eulermaruyama:diffusion=sbdm": 1,
}  # fmt: skip


def field_of(model: Any, total: int) -> GuidedDenoiser:
    return GuidedDenoiser(model, COND, Unguided(), Trajectory(model.sites(), (), total))


def start(points: int = 50) -> Tensor:
    return torch.randn(1, 2, points, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def exact(model: Mixture) -> Callable[[Tensor, float], Estimate]:
    """The mixture's own prediction, in float64."""

    def field(x: Tensor, t: float) -> Estimate:
        time = torch.tensor([t], dtype=torch.float64)
        return Estimate(model.path, model.config.convention.prediction, model(x, time, COND), x, time)

    return field


def plain(solver: Any, field: GuidedDenoiser, x: Tensor, steps: int, noise: SampleNoise) -> Tensor:
    """Each solver as one loop over its times, from its paper."""
    path, times = field.path, solver.times(field.path, steps).tolist()
    for i, (t, s) in enumerate(pairwise(times)):
        estimate, at_s = field(x, t), path.at(x.new_tensor([s]))
        if isinstance(solver, Ddim):
            x = at_s.alpha * estimate.to("data") + at_s.sigma * estimate.to("noise")
        elif isinstance(solver, Ancestral):
            kept = path.respaced(path.evenly(steps))  # type: ignore[attr-defined]
            here = torch.tensor([steps - 1 - i])
            x = kept.posterior_mean(x, estimate.to("data"), here)
            if here:
                x = x + (0.5 * kept.log_variance(estimate.fraction, here, x)).exp() * noise.draw()
        elif isinstance(solver, EulerMaruyama):
            w = solver.scale * solver.strength(path, t)
            x = x + (s - t) * (estimate.to("velocity") - w * estimate.to("score"))
            x = x + sqrt(2 * w * (t - s)) * noise.draw() if s > 0 else x
        else:
            slope = estimate.to("velocity")
            if isinstance(solver, Heun) and s > 0:
                slope = (slope + field(x + (s - t) * slope, s).to("velocity")) / 2
            x = x + (s - t) * slope
    return x


@torch.no_grad()
@pytest.mark.parametrize(
    ("solver", "convention"),
    [s for s in SOLVERS if isinstance(s[0], Euler | Heun | Ddim | Ancestral | EulerMaruyama)],
)
def test_steps_are_the_plain_loop_to_the_bit(solver: Solver, convention: Convention) -> None:
    model, results = tiny(convention), []
    for run in (solver.solve, lambda *of: plain(solver, *of)):
        noise = SampleNoise(SEEDS, model.sample_shape)
        results.append(run(field_of(model, solver.evaluations(8)), noise.draw().double(), 8, noise))
    assert torch.equal(*results)


@torch.no_grad()
@pytest.mark.parametrize(("solver", "convention"), SOLVERS)
def test_a_trajectory_can_pause_and_two_do_not_meet(solver: Solver, convention: Convention) -> None:
    """Steppers taken in turns, from two noises, end where each ends alone."""
    model = tiny(convention)
    times = solver.times(model.config.convention.make_path(), 6)

    def begin(seed: int) -> tuple[Any, Tensor, Any]:
        noise = SampleNoise([seed, seed + 1, seed + 2], model.sample_shape)
        x = noise.draw().double()
        field = field_of(model, solver.evaluations(6))
        return solver.begin(field.path, times, noise), x, field

    alone = [follow(stepper, field, x) for stepper, x, field in map(begin, (0, 10))]
    runs = [list(begin(seed)) for seed in (0, 10)]
    while any(run[0].t is not None for run in runs):
        for run in runs:
            if (t := run[0].t) is not None:
                run[1] = run[0].step(run[1], run[2](run[0].input(run[1]), t))
    assert all(torch.equal(run[1], x) for run, x in zip(runs, alone, strict=True))


@pytest.fixture(scope="module")
def measured() -> dict[tuple[str, str], dict[str, Any]]:
    rows: list[Any] = solver_orders.measure("linear", "discrete vp")
    return {(row["solver"], row["path"]): row for row in rows}


def test_orders_of_convergence(measured: dict[tuple[str, str], dict[str, Any]]) -> None:
    found = {key: row["inside"] for key, row in measured.items() if row["inside"] is not None}
    assert found == pytest.approx({key: ORDERS[key[0]] for key in found}, abs=0.25)
    assert {solver for solver, _ in found} == set(ORDERS)
    assert measured["ancestral", "discrete vp"]["whole"] == pytest.approx(1, abs=0.15)


def test_the_table_of_orders_is_that_of_this_code(measured: dict[tuple[str, str], dict[str, Any]]) -> None:
    recorded = json.loads((solver_orders.record.__globals__["RESULTS"] / "solver_orders.json").read_text())
    rows = {(row["solver"], row["path"]): row for row in recorded["rows"]}
    for key, row in measured.items():
        numbers = {name: value for name, value in row.items() if isinstance(value, float)}
        assert {name: rows[key][name] for name in numbers} == pytest.approx(numbers, rel=1e-3)
    kinds = {row["solver"].partition(":")[0] for row in recorded["rows"]}
    solvers = {kind.__name__.lower() for kind in every(Solver)}  # type: ignore[type-abstract]
    assert kinds == solvers - {"diffusersscheduler"} | {"ddiminversion"}


def with_tables(scheduler: Any, model: Mixture, steps: int) -> Tensor:
    """Give a multistep scheduler of diffusers float64 tables; the times it visits."""
    scheduler.set_timesteps(steps)
    if not isinstance(model.path, DiscretePath):
        scheduler.sigmas = scheduler.sigmas.double()
        return scheduler.sigmas
    index = scheduler.timesteps.long()
    abar = model.path.abar[index]
    scheduler.sigmas = torch.cat([((1 - abar) / abar).sqrt(), abar.new_zeros(1)])
    return torch.cat([index, index.new_tensor([-1])]).double()


@pytest.mark.parametrize("path", ["linear", "ddpm"])
@pytest.mark.parametrize("steps", [8, 20])
@pytest.mark.parametrize(
    ("ours", "theirs", "tolerance"),
    [  # DPMSolverMultistepScheduler casts the sample to float32 in each step
        *((DpmSolverPP(order=p), diffusers.DPMSolverMultistepScheduler, 5e-6) for p in (1, 2)),
        *((UniPc(order=p), diffusers.UniPCMultistepScheduler, 1e-13) for p in (1, 2, 3)),
    ],
    ids=lambda v: spec(v) if isinstance(v, Solver) else "",
)
def test_multistep_solvers_are_those_of_diffusers(
    path: str, steps: int, ours: Any, theirs: Any, tolerance: float
) -> None:
    model, x = model_of(path, 50), start()
    scheduler = theirs(**(FLOW if path == "linear" else BETAS), solver_order=ours.order)
    times, field = with_tables(scheduler, model, steps), exact(model)
    found = follow(ours.begin(model.path, times), field, x)
    for t, timestep in zip(times.tolist(), scheduler.timesteps, strict=False):
        x = scheduler.step(field(x, t).value, timestep, x, return_dict=False)[0]
    torch.testing.assert_close(found, x, rtol=0, atol=tolerance)


def test_the_second_order_step_is_that_of_diffusers_in_float64() -> None:
    """Their formula called by itself, around the cast."""
    model, scheduler = model_of("ddpm", 50), diffusers.DPMSolverMultistepScheduler(**BETAS)
    times, field, x = with_tables(scheduler, model, 20), exact(model), start()
    stepper = DpmSolverPP().begin(model.path, times)
    first = field(x, times[0].item())
    x = stepper.step(x, first)
    second, scheduler._step_index = field(x, times[1].item()), 1
    outputs = [first.to("data"), second.to("data")]
    expected = scheduler.multistep_dpm_solver_second_order_update(outputs, sample=x)
    torch.testing.assert_close(stepper.step(x, second), expected, rtol=0, atol=1e-13)


def test_inversion_is_that_of_diffusers() -> None:
    model, x = model_of("ddpm", 50), start()
    theirs = diffusers.DDIMInverseScheduler(**BETAS, clip_sample=False)
    theirs.set_timesteps(50)
    theirs.alphas_cumprod, theirs.initial_alpha_cumprod = model.path.abar, model.path.abar.new_ones(())
    found = DdimInversion().solve(exact(model), x, model.path, 50)
    for timestep in theirs.timesteps:
        output = exact(model)(x, timestep.item()).value
        x = theirs.step(output, timestep, x, return_dict=False)[0]
    torch.testing.assert_close(found, x, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    "convention",
    [Convention(), Convention("cosine", "data"), Convention("vp"), Convention("linear", "score"), DDPM],
    ids=lambda c: f"{c.path} {c.prediction}",
)
def test_what_is_inverted_is_drawn_again(convention: Convention) -> None:
    """The error of there and back halves with the step; data of a discrete path start at the index -1."""
    if convention is DDPM:
        convention = Convention("ddpm", "noise", "index")
    model = Mixture(convention, 50)
    data = torch.randn(1, 2, 50, generator=torch.Generator().manual_seed(1)) / 2
    errors = []
    for steps in (100, 200):
        noise = invert(model, data, COND.rows(slice(1)), steps=steps)
        assert noise.isfinite().all()
        times = Ddim().times(model.path, steps)
        field = GuidedDenoiser(model, COND.rows(slice(1)), Unguided(), Trajectory(model.sites(), (), steps))
        again = follow(Ddim().begin(model.path, times), field, noise)
        errors.append((again - data).square().mean().sqrt().item())
    assert errors[1] < 0.65 * errors[0] and errors[1] < 0.1


GRIDS = [Even(), Shift(3.0), Shift(0.5), Table((1.0, 0.7, 0.4, 0.0))]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_grids_rise_from_the_data(grid: TimeGrid) -> None:
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    moved = grid.warp(t)
    assert moved[0] == 0 and moved[-1] == 1 and (moved.diff() > 0).all() and moved.dtype == t.dtype
    times = Euler(grid).times(Linear(), 12)
    assert torch.equal(times, grid.warp(torch.linspace(1, 0, 13, dtype=torch.float64)))


def test_a_shift_of_sampling_is_that_of_training_and_of_flow_matching_schedulers() -> None:
    even = torch.linspace(1, 0, 51, dtype=torch.float64)
    times = Euler(Shift(3.0)).times(Linear(), 50)
    assert torch.equal(times, Shifted(3.0).quantile(even))
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.set_timesteps(sigmas=even[:-1].tolist())
    torch.testing.assert_close(theirs.sigmas.double(), times, rtol=0, atol=1e-6)


def test_a_table_is_visited_as_given_and_read_between() -> None:
    table = Table((1.0, 0.7, 0.4, 0.0))
    assert Heun(table).times(Cosine(), 3).tolist() == [1.0, 0.7, 0.4, 0.0]
    assert Ddim(grid=table).times(Linear(), 6).tolist() == pytest.approx([1, 0.85, 0.7, 0.55, 0.4, 0.2, 0])
    published = (999, 850, 736, 645, 545, 455, 343, 233, 124, 24)  # of Sabour et al. 2024, in indices
    grid = Table((*((index + 1) / 1000 for index in published), 0.0))
    assert DpmSolverPP(grid=grid).times(DiscretePath.linear(), 10).tolist() == [*published, -1]


def test_indices_of_a_shifted_discrete_path() -> None:
    path = DiscretePath.linear()
    shifted = Ddim(grid=Shift(3.0)).times(path, 4).tolist()
    assert shifted == [999, 899, 749, 499, -1]  # 0.9, 0.75 and 0.5 of 1000, less one
    assert Ancestral(Shift(3.0)).times(path, 4).tolist() == shifted
    assert path.trailing(50).tolist() == list(range(19, 1000, 20))
    scheduler = diffusers.DDIMScheduler(**BETAS, timestep_spacing="trailing")
    for steps in (7, 50, 300):
        scheduler.set_timesteps(steps)
        assert Ddim("trailing").times(path, steps).tolist() == [*scheduler.timesteps.tolist(), -1]
    with pytest.raises(
        ConfigError, match=r"steps=900: Shift\(a=3.0, end=0.0\) has \d+ different indices of 1000"
    ):
        Ddim(grid=Shift(3.0)).times(path, 900)


def test_a_grid_moves_the_samples_and_a_solver_is_written_with_it() -> None:
    model = tiny()
    for solver in (Euler(Shift(3.0)), UniPc(order=3, grid=Shift(2.0)), Heun(Table((1.0, 0.6, 0.0)))):
        assert component(Solver, spec(solver)) == solver  # type: ignore[type-abstract]
        assert not torch.equal(draw(model, solver=solver), draw(model, solver=type(solver)()))
    text = "ddim:spacing=even,grid=shift:a=0.5"
    assert component(Solver, text) == Ddim("even", Shift(0.5))  # type: ignore[type-abstract]
    assert spec(Ddim("even", Shift(0.5))) == text
    one = draw(model, solver=Euler(Shift(1.0)))
    assert torch.equal(one, draw(model))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: component(Solver, "euler:grid=evne"), "unknown timegrid 'evne'; did you mean 'even'"),  # type: ignore[type-abstract]
        (lambda: Euler("shift"), r"Euler: unknown time grid 'shift'; did you mean 'Shift\(3.0\)'"),  # type: ignore[arg-type]
        (lambda: Heun(3.0), "Heun: grid=3.0 should be a time grid"),  # type: ignore[arg-type]
        (lambda: Shift(0), "Shift: a=0 should be positive"),
        (lambda: Table((1.0, 0.5, 0.6, 0.0)), r"should fall.*0.5 is followed by 0.6 \(number 3\)"),
        (lambda: Table((0.0,)), "got 1 times, expected two or more"),
        (lambda: Table((1.0, float("nan"), 0.0)), "1 is followed by nan"),
        (lambda: Table((1.0, 0.1)), "go from 1 to 0.1, expected from at most 1"),
        (lambda: Ddim("evne"), "unknown spacing 'evne'; did you mean 'even'"),  # type: ignore[arg-type]
        (
            lambda: Ddim("even").times(Linear(), 4),
            "spacing='even' is of discrete paths; on Linear give a grid",
        ),
        (lambda: Ddim("even", Shift()).times(DiscretePath.linear(), 4), "is of the grid Even"),
        (lambda: DpmSolverPP(order=3), "order=3, expected one of 1, 2; did you mean 2"),
        (lambda: UniPc(order=0), "order=0, expected one of 1, 2, 3; did you mean 1"),
        (lambda: Euler().begin(Linear(), torch.tensor([0.2, 0.4])), "0.2 is followed by 0.4"),
        (lambda: DdimInversion().begin(Linear(), torch.tensor([0.4, 0.2])), "should rise"),
        (lambda: Ancestral().begin(DiscretePath.linear(), torch.tensor([9.0, -1.0])), "draws noise"),
        (lambda: EulerMaruyama().begin(Linear(), torch.tensor([1.0, 0.0])), "draws noise"),
    ],
)
def test_what_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_scheduler_refuses_times_of_others() -> None:
    solver = DiffusersScheduler(diffusers.DDIMScheduler(**BETAS))
    with pytest.raises(ConfigError, match="runs on times of its own only"):
        noise: Any = object()
        solver.begin(DiscretePath.linear(), torch.tensor([900.0, 3.0, -1.0]), noise)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("ddpm-sd", {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}),
        ("ddpm-cosine", {"beta_schedule": "squaredcos_cap_v2"}),
    ],
)
def test_schedulers_run_on_paths_by_name(name: str, config: dict[str, Any]) -> None:
    """Float32 throughout; data from noise at the first index lose what alpha is small by."""
    model = Mixture(Convention(name, "noise", "index"), 100)  # type: ignore[arg-type]
    theirs = DiffusersScheduler(
        diffusers.DDIMScheduler(**config, clip_sample=False, timestep_spacing="leading", steps_offset=0)
    )
    times = theirs.times(model.path, 50)
    assert torch.equal(times, Ddim().times(model.path, 50))
    x = start(100)
    ours = follow(Ddim().begin(model.path, times), exact(model), x)
    found = follow(theirs.begin(model.path, times, SampleNoise([0], (2, 100))), exact(model), x)
    rounding = torch.finfo(torch.float32).eps * ours.abs().max() / model.path.at(times[:1]).alpha
    torch.testing.assert_close(found.double(), ours, rtol=0, atol=4 * rounding.item())
    with pytest.raises(ConfigError, match=f"betas are not the model's.*{config['beta_schedule']}"):
        DiffusersScheduler(diffusers.DDIMScheduler(**BETAS)).times(model.path, 50)


def test_guided_multistep_solvers_draw_what_many_steps_draw() -> None:
    """Twenty steps of second order come nearer to 400 of Heun than twenty of Ddim do."""
    model, options = tiny(), {"guidance": ClassifierFree(2.0)}
    truth = draw(model, solver=Heun(), steps=200, **options)
    error = {
        spec(solver): (draw(model, solver=solver, steps=20, **options) - truth).norm().item()
        for solver in (Ddim(), DpmSolverPP(), UniPc())
    }
    assert max(error["dpmsolverpp"], error["unipc"]) < error["ddim"] / 2


def test_vp_ends_are_finite() -> None:
    for solver in (DpmSolverPP(), UniPc(order=3)):
        for path in (Linear(), Cosine(), VariancePreserving()):
            model = Mixture(
                Convention({"Linear": "linear", "Cosine": "cosine"}.get(type(path).__name__, "vp")), 20
            )
            stepper = solver.begin(path, solver.times(path, 5))
            assert follow(stepper, exact(model), start(20)).isfinite().all()
