"""Classifier-free guidance, its channels and intervals, and autoguidance, each against a plain loop."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ditkit.attention import Neighbourhood
from ditkit.caching import TaylorSeer
from ditkit.core.cond import Cond
from ditkit.core.convention import DDPM, Convention
from ditkit.core.errors import ConfigError
from ditkit.core.trajectory import Trajectory
from ditkit.models.dit import DiT
from ditkit.sample import (
    Autoguidance,
    ClassifierFree,
    Ddim,
    SampleNoise,
    Solver,
    Stepper,
    initial_noise,
)
from ditkit.sample.denoiser import GuidedDenoiser
from ditkit.sample.steppers import OneEstimate
from patterns_support import predicted, tiny_clip_model
from sampling_support import COND, SEEDS, batches, draw, solvers, tiny


def guided_by_hand(model: DiT, scale: float) -> Tensor:
    x, null = initial_noise(model.sample_shape, SEEDS), model.unconditional(COND)
    for t, s in pairwise(torch.linspace(1, 0, 9).tolist()):
        time = torch.full((3,), t)
        with torch.no_grad():
            c, u = model(x, time, COND), model(x, time, null)
        x = x + (s - t) * (u + scale * (c - u))
    return x


def test_classifier_free_is_the_plain_loop() -> None:
    model = tiny()
    found = draw(model, guidance=ClassifierFree(2.5))
    torch.testing.assert_close(found, guided_by_hand(model, 2.5), rtol=0, atol=1e-5)


@pytest.mark.parametrize("batched", [False, True])
def test_scale_one_is_the_conditional_sample_bit_for_bit(batched: bool) -> None:
    model = tiny()
    for guidance in (ClassifierFree(1.0), ClassifierFree(1.0, channels=3), Autoguidance(1.0, tiny(seed=1))):
        assert torch.equal(draw(model, guidance=guidance, batched=batched), draw(model))


@solvers
def test_batched_branches_equal_separate_lanes(solver: Solver, convention: Convention) -> None:
    model, guidance = tiny(convention), ClassifierFree(2.0)
    with batches(model) as together:
        one = draw(model, solver=solver, guidance=guidance, batched=True)
    with batches(model) as apart:
        two = draw(model, solver=solver, guidance=guidance)
    scale = two.abs().max()
    torch.testing.assert_close(one / scale, two / scale, rtol=0, atol=1e-5)
    assert set(together) == {6} and set(apart) == {3} and len(apart) == 2 * len(together)


def test_three_channels_are_guided_and_the_rest_stays_conditional() -> None:
    """In one step, so that no channel has yet acted on another."""
    model = tiny()
    plain = draw(model, steps=1)
    full = draw(model, steps=1, guidance=ClassifierFree(3.0))
    some = draw(model, steps=1, guidance=ClassifierFree(3.0, channels=3))
    assert torch.equal(some[:, 3], plain[:, 3]) and torch.equal(some[:, :3], full[:, :3])
    assert ((full - plain).abs().amax((0, 2, 3)) > 1e-3).all()


def test_learned_variance_is_the_conditional_branchs() -> None:
    model, plain = tiny(DDPM), RecordFraction()
    draw(model, solver=plain, steps=1)
    for batched in (False, True):
        guided = RecordFraction()
        draw(model, solver=guided, guidance=ClassifierFree(4.0), batched=batched, steps=1)
        torch.testing.assert_close(guided.seen[0], plain.seen[0], rtol=0, atol=1e-6)


class RecordFraction(Solver):
    """One evaluation, whose variance fraction is kept."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def times(self, path: Any, steps: int) -> Tensor:
        return torch.tensor([999.0, -1.0])

    def evaluations(self, steps: int) -> int:
        return 1

    def begin(self, path: Any, times: Tensor, noise: SampleNoise | None = None) -> Stepper:
        return RecordFractionStepper(self, path, times)


class RecordFractionStepper(OneEstimate):
    def __init__(self, solver: RecordFraction, path: Any, times: Tensor) -> None:
        super().__init__(solver, path, times)
        self.seen = solver.seen

    def move(self, x: Tensor, estimate: Any, t: float, s: float) -> Tensor:
        self.seen.append(estimate.fraction)
        return x


def test_intervals() -> None:
    model = tiny()
    everywhere = ClassifierFree(2.0, interval=(0.0, 1.0))
    assert torch.equal(draw(model, guidance=everywhere), draw(model, guidance=ClassifierFree(2.0)))
    with batches(model) as nowhere:
        empty = draw(model, guidance=ClassifierFree(2.0, interval=(0.0, 0.0)))
    assert torch.equal(empty, draw(model)) and len(nowhere) == 8
    with batches(model) as half:  # t = 1, 7/8 ... 1/8, of which 3/4, 5/8, 1/2 and 3/8 are guided
        draw(model, guidance=ClassifierFree(2.0, interval=(0.375, 0.75)))
    assert len(half) == 8 + 4


def test_intervals_on_ddpm_count_the_index_as_noise_time() -> None:
    model = tiny(DDPM)
    with batches(model) as seen:  # indices 0, 100 ... 900: of these 400 and 500 lie in (0.4, 0.55)
        draw(model, solver=Ddim(), steps=10, guidance=ClassifierFree(2.0, interval=(0.4, 0.55)))
    assert len(seen) == 10 + 2


def test_autoguidance_extrapolates_from_a_weaker_model() -> None:
    model, guide = tiny(), tiny(seed=1, depth=1)
    x = initial_noise(model.sample_shape, SEEDS)
    for t, s in pairwise(torch.linspace(1, 0, 9).tolist()):
        time = torch.full((3,), t)
        with torch.no_grad():
            c, g = model(x, time, COND), guide(x, time, COND)
        x = x + (s - t) * (g + 1.7 * (c - g))
    with batches(guide) as seen:
        found = draw(model, guidance=Autoguidance(1.7, guide))
    torch.testing.assert_close(found, x, rtol=0, atol=1e-5)
    assert seen == [3] * 8
    same = draw(model, guidance=Autoguidance(1.7, model))
    torch.testing.assert_close(same, draw(model), rtol=0, atol=1e-5)


def test_each_network_samples_with_the_weights_that_its_policies_learned() -> None:
    pattern = Neighbourhood(radius=3, span=2, pooled=2, block=8, kernel="cpu")
    model, guide = (tiny_clip_model(depth=1).adopt([pattern]).double() for _ in range(2))
    for part in guide.learned["Neighbourhood"].values():
        nn.init.constant_(part.weight, 2.0)
    x = torch.randn(1, *model.sample_shape, generator=torch.Generator().manual_seed(0)).double()
    c, g = (predicted(n, pattern, x, Cond(), 1, learned=n.learned) for n in (model, guide))
    assert not torch.allclose(c, g)  # the pooling weights are all that differs
    field = GuidedDenoiser(
        model, Cond(), Autoguidance(3.0, guide), Trajectory(model.sites(), [pattern], 1, None, model.learned)
    )
    with torch.no_grad():
        torch.testing.assert_close(field(x, 0.5).value, g + 3 * (c - g))
    receipts = [receipt for trajectory in field.trajectories for receipt in trajectory.finish()]
    assert [list(receipt.rows) for receipt in receipts] == [["cond"], ["guide/cond"]]
    cached = GuidedDenoiser(
        model,
        Cond(),
        Autoguidance(3.0, guide),
        Trajectory(model.sites(), [TaylorSeer()], 8, None, model.learned),
    )
    assert cached.trajectories == [cached.trajectory]  # which has learned nothing


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf"), None, "2", True])
def test_scales_that_are_no_finite_number_are_refused(scale: Any) -> None:
    for make in (ClassifierFree, lambda given: Autoguidance(given, tiny())):
        with pytest.raises(ConfigError, match=f"scale={scale!r} should be a finite number"):
            make(scale)
