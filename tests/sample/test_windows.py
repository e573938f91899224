"""Windows of long samples: every frame covered and owned once, weights that sum to 1, and one step of the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_mixture import Mixture, model_of
from torch import Tensor

from ditkit.core.catalog import every
from ditkit.core.errors import ConfigError, ShapeError
from ditkit.core.path import Linear
from ditkit.core.spec import component, spec
from ditkit.sample import Euler, Solver, UniPc
from ditkit.sample.denoiser import Estimate
from ditkit.sample.steppers import follow
from ditkit.sample.windows import Chunks, MovingWindows, WindowPlan, Windows, merge
from sampling_support import COND


@st.composite
def chunks(draw: Any) -> Chunks:
    first = draw(st.none() | st.integers(1, 12))
    return Chunks(
        draw(st.integers(1, 9)), draw(st.integers(0, 12)), first, draw(st.sampled_from((0.0, 0.5, 1.0)))
    )


@st.composite
def moving(draw: Any) -> MovingWindows:
    length = draw(st.integers(1, 24))
    shortest = draw(st.integers(1, length))
    return MovingWindows(
        length,
        draw(st.integers(0, shortest - 1)),
        draw(st.integers(0, 5)),
        draw(st.integers(0, length - shortest)),
        shortest,
        draw(st.sampled_from(("owner", "linear", "closed"))),
    )


plans = st.builds(
    lambda windows, frames, step: (windows, windows.plan(frames, step, 12)),
    chunks() | moving(),
    st.integers(1, 90),
    st.integers(0, 11),
)


@given(plans)
def test_every_frame_is_covered_owned_once_and_weighs_one(case: tuple[Windows, WindowPlan]) -> None:
    _, plan = case
    held = torch.zeros(len(plan.windows), plan.frames, dtype=torch.bool)
    for i, window in enumerate(plan.windows):
        assert 0 <= window.start <= window.own < window.stop <= plan.frames
        held[i, window.start : window.stop] = True
    assert held.any(0).all()
    owners = plan.owners
    assert owners.shape == (plan.frames,) and torch.equal(owners, held.int().argmax(0))
    assert torch.equal(owners.unique(), torch.arange(len(plan.windows)))
    weights = plan.weights
    assert (weights >= 0).all() and (weights[~held] == 0).all()
    torch.testing.assert_close(
        weights.sum(0), torch.ones(plan.frames, dtype=torch.float64), rtol=0, atol=1e-12
    )
    if plan.blend == "owner":
        assert torch.equal(weights, torch.nn.functional.one_hot(owners, len(plan.windows)).T.double())


@given(plans, st.integers(0, 3))
def test_merging_is_the_weighted_sum_and_keeps_what_agrees(
    case: tuple[Windows, WindowPlan], seed: int
) -> None:
    _, plan = case
    generator = torch.Generator().manual_seed(seed)
    predictions = [
        torch.randn(2, 1, window.length, 3, generator=generator, dtype=torch.float64)
        for window in plan.windows
    ]
    slow = torch.zeros(2, 1, plan.frames, 3, dtype=torch.float64)
    for window, weight, prediction in zip(plan.windows, plan.weights, predictions, strict=True):
        slow[:, :, window.start : window.stop] += weight[window.start : window.stop, None] * prediction
    torch.testing.assert_close(merge(plan, predictions), slow, rtol=1e-12, atol=1e-12)
    whole = torch.randn(2, 1, plan.frames, 3, generator=generator)
    assert torch.equal(merge(plan, plan.cut(whole)), whole)
    turned = whole.movedim(2, 1)
    assert torch.equal(merge(plan, plan.cut(turned, axis=1), axis=1), turned)


@given(moving(), st.integers(1, 90), st.integers(0, 40))
def test_moving_windows_keep_their_lengths(windows: MovingWindows, frames: int, step: int) -> None:
    plan = windows.plan(frames, step, 41)
    lengths = [window.length for window in plan.windows]
    assert max(lengths) <= windows.length
    assert min(lengths) >= min(windows.shortest, frames)
    if frames <= windows.length:
        assert lengths == [frames]
    for before, after in zip(plan.windows, plan.windows[1:], strict=False):
        assert before.stop - after.start >= windows.overlap


@given(chunks(), st.integers(1, 60))
def test_chunks_own_their_length(windows: Chunks, frames: int) -> None:
    plan = windows.plan(frames, 0, 2)
    owned = [window.stop - window.own for window in plan.windows]
    expected = [windows.length] * len(owned)
    expected[0] = windows.length if windows.first is None else windows.first
    assert owned[:-1] == expected[:-1] and 0 < owned[-1] <= expected[-1]
    for window in plan.windows[1:]:
        assert window.own - window.start == min(windows.overlap, window.own)


def printed(l: int, f: int, o: int, n: int, p: int, m: int, steps: int) -> list[list[tuple[int, int]]]:  # noqa: E741
    """YingVideo-MV's algorithm in its own words, with the loop that its figure shows."""
    alpha, found = 0, []
    for _ in range(steps):
        if alpha > m:
            alpha = 0
        s, e, spans = 0, min(l, f - alpha), []
        while True:
            spans.append((s, e))
            if e == l:
                break
            s = e - o
            e = s + f
            if e >= l:
                e = l
                if e - s < n:
                    s = max(0, e - n)
        found.append(spans)
        alpha += p
    return found


@pytest.mark.parametrize(
    ("l", "f", "o", "n", "p", "m"), [(81, 21, 5, 12, 3, 9), (60, 21, 5, 12, 4, 9), (47, 16, 4, 8, 2, 7)]
)
def test_moving_windows_are_the_printed_algorithm(l: int, f: int, o: int, n: int, p: int, m: int) -> None:  # noqa: E741
    windows = MovingWindows(f, o, p, m, n)
    ours = [list(windows.plan(l, step, 12).spans) for step in range(12)]
    assert ours == printed(l, f, o, n, p, m, 12)
    assert len({tuple(spans) for spans in ours}) >= 2


def test_chunks_are_vins_and_dualparals() -> None:
    vin = Chunks().plan(60, 0, 50)
    assert vin.spans == ((0, 20), (8, 40), (28, 60))
    assert vin.weights[1, 8:20].tolist() == pytest.approx([k / 12 for k in range(12)])
    assert vin.weights[0, 8:20].tolist() == pytest.approx([(12 - k) / 12 for k in range(12)])
    blends = [Chunks().plan(60, step, 50).blend for step in range(50)]
    assert blends == ["linear"] * 30 + ["owner"] * 20  # t > 20, counted from 50 down
    blocks = Chunks(length=8, overlap=4, first=12, blended=0).plan(36, 0, 50)
    assert blocks.spans == ((0, 12), (8, 20), (16, 28), (24, 36)) and blocks.blend == "owner"
    alone = MovingWindows(length=10, overlap=0, shift=0, most=0, shortest=1).plan(25, 3, 9)
    assert alone.spans == ((0, 10), (10, 20), (20, 25))


def test_the_ramp_of_a_closed_blend_reaches_both_windows() -> None:
    plan = WindowPlan(8, ((0, 5), (2, 8)), "closed")
    assert plan.weights[1].tolist() == [0, 0, 0, 0.5, 1, 1, 1, 1]
    assert WindowPlan(3, ((0, 2), (1, 3)), "closed").weights[1].tolist() == [0, 0.5, 1]


class PerFrame:
    """A clip [B, C, T, n] as T independent mixtures: the prediction of a frame depends on no other."""

    def __init__(self) -> None:
        self.model: Mixture = model_of("linear", 5)

    def __call__(self, x: Tensor, t: float) -> Tensor:
        time = torch.tensor([t], dtype=torch.float64)
        return self.model(x.movedim(2, 1), time, COND).movedim(1, 2)


@pytest.mark.parametrize("solver", [Euler(), UniPc(order=3)], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize(
    "windows", [Chunks(4, 3), MovingWindows(6, 2, 1, 2, 4)], ids=lambda w: type(w).__name__
)
def test_one_step_of_merged_predictions_is_seamless(solver: Solver, windows: Windows) -> None:
    """With a history of the long latent, the windowed run is the plain one; one solver a window is not."""
    predict, path, steps = PerFrame(), Linear(), 8
    x = torch.randn(1, 2, 15, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    times = solver.times(path, steps)

    def estimate(value: Tensor, x: Tensor, t: float) -> Estimate:
        return Estimate(path, "velocity", value, x, torch.tensor([t], dtype=torch.float64))

    plain = follow(solver.begin(path, times), lambda x, t: estimate(predict(x, t), x, t), x)
    stepper, long = solver.begin(path, times), x
    for step in range(steps):
        assert stepper.t is not None
        plan = windows.plan(15, step, steps)
        merged = merge(plan, [predict(part, stepper.t) for part in plan.cut(long)])
        long = stepper.step(long, estimate(merged, long, stepper.t))
    assert stepper.t is None and torch.equal(long, plain)


def test_windows_are_found_by_name_and_written() -> None:
    assert {kind.__name__ for kind in every(Windows)} == {"Chunks", "MovingWindows"}  # type: ignore[type-abstract]
    for windows in (Chunks(length=8, first=12), MovingWindows(blend="closed")):
        assert component(Windows, spec(windows)) == windows  # type: ignore[type-abstract]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WindowPlan(5, ((0, 2), (3, 5))), "window 3..5 after frame 2 should start from 0 to 2"),
        (lambda: WindowPlan(5, ((0, 3), (1, 3))), "and go beyond"),
        (lambda: WindowPlan(5, ((0, 4),)), "end at frame 4, expected 5"),
        (lambda: WindowPlan(5, ((0, 6),)), "end at frame 6, expected 5"),
        (lambda: WindowPlan(5, ((0, 5),), "linaer"), "unknown blend 'linaer'; did you mean 'linear'"),  # type: ignore[arg-type]
        (lambda: Chunks(length=0), "length=0 should be at least 1"),
        (lambda: Chunks(blended=1.5), "blended=1.5 should be a share"),
        (lambda: Chunks().plan(0, 0, 5), "frames=0 should be at least 1"),
        (lambda: Chunks().plan(8, 5, 5), "step=5 should be one of the 5 steps"),
        (lambda: MovingWindows(overlap=12), "shortest=12 should lie above overlap=12"),
        (lambda: MovingWindows(most=10), "most=10 leaves the first window fewer.*expected at most 9"),
        (lambda: MovingWindows(blend="soft"), "unknown blend 'soft'"),  # type: ignore[arg-type]
    ],
)
def test_plans_that_make_no_sense_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_predictions_that_do_not_fit_the_plan_are_refused() -> None:
    plan = WindowPlan(5, ((0, 3), (2, 5)))
    with pytest.raises(ShapeError, match=r"predictions of \[3, 2\] frames, expected \[3, 3\]"):
        merge(plan, [torch.zeros(1, 1, 3), torch.zeros(1, 1, 2)])
    with pytest.raises(ShapeError, match="should have the plan's 5 frames"):
        plan.cut(torch.zeros(1, 1, 4))
