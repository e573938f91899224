"""The sampling loop: seeds, guidance, lanes, solvers' arithmetic, and input that is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Self

import pytest
import torch
from torch import Tensor, nn

from ditkit.core.catalog import every, find
from ditkit.core.convention import DDPM, SIT, Convention
from ditkit.core.ddpm import DiscretePath
from ditkit.core.errors import ConfigError, DitkitError, NoEffectError
from ditkit.core.path import Linear
from ditkit.core.policy import Claim, Policy, Session
from ditkit.core.run import Call, Handler, Site, named
from ditkit.models.dit import DiT
from ditkit.sample import (
    Ancestral,
    Autoguidance,
    ClassifierFree,
    Ddim,
    Euler,
    EulerMaruyama,
    Guidance,
    Heun,
    SampleNoise,
    Sampler,
    Sampling,
    Solver,
    Unguided,
    initial_noise,
    sample,
)
from ditkit.sample.noise import LAST_SEED, distinct
from sampling_support import COND, SEEDS, batches, draw, solvers, tiny


@solvers
def test_a_seed_gives_the_same_sample_alone_in_a_batch_and_in_another_order(
    solver: Solver, convention: Convention
) -> None:
    model = tiny(convention)
    together = draw(model, solver=solver)
    alone = torch.cat([draw(model, COND.rows(slice(i, i + 1)), [SEEDS[i]], solver=solver) for i in range(3)])
    order = torch.tensor([2, 0, 1])
    turned = draw(model, COND.rows(order), [SEEDS[i] for i in order], solver=solver)
    scale = together.abs().max()
    torch.testing.assert_close(alone / scale, together / scale, rtol=0, atol=1e-5)
    torch.testing.assert_close(turned / scale, together[order] / scale, rtol=0, atol=1e-5)
    assert not torch.allclose(together[0], together[1])


def test_noise_belongs_to_the_seed() -> None:
    together = initial_noise((4, 8, 8), [7, 3])
    assert torch.equal(together[:1], initial_noise((4, 8, 8), [7]))
    assert torch.equal(together.flip(0), initial_noise((4, 8, 8), [3, 7]))
    stream, alone = SampleNoise([7, 3], (4, 8, 8)), SampleNoise([3], (4, 8, 8))
    assert torch.equal(stream.draw(), together)
    assert torch.equal(alone.draw(), together[1:])
    second = stream.draw()
    assert torch.equal(second[1:], alone.draw()) and not torch.equal(second, together)


@pytest.mark.parametrize(
    ("seeds", "message"),
    [([], "seeds is empty"), ([3, 7, 3], "seed 3 is given twice"), ([2**32], "at most 4294967295")],
    ids=["none", "twice", "large"],
)
def test_seeds_that_are_refused(seeds: list[int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        initial_noise((1,), seeds)


def test_seeds_of_other_libraries_are_integers() -> None:
    for seeds in (range(3), torch.arange(3), torch.arange(3).numpy()):
        assert distinct(seeds) == (0, 1, 2)


def test_many_seeds_are_told_apart_at_once() -> None:
    compared = 0

    class Seed(int):
        __hash__ = int.__hash__

        def __eq__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return int.__eq__(self, other)

    assert len(distinct([Seed(i) for i in range(10_000)])) == 10_000
    assert compared < 100_000  # comparing each with all before it would be 50 million


def test_the_last_seed_is_the_last_with_noise_of_its_own() -> None:
    def first(seed: int) -> float:
        return torch.randn(1, generator=torch.Generator().manual_seed(seed)).item()

    assert first(LAST_SEED + 1) == first(0) != first(LAST_SEED)


def test_euler_is_the_plain_loop() -> None:
    model = tiny()
    x = initial_noise(model.sample_shape, SEEDS)
    for t, s in pairwise(torch.linspace(1, 0, 9).tolist()):
        with torch.no_grad():
            x = x + (s - t) * model(x, torch.full((3,), t), COND)
    torch.testing.assert_close(draw(model), x, rtol=0, atol=1e-6)


def test_ddim_on_the_linear_path_is_euler() -> None:
    model = tiny()
    torch.testing.assert_close(draw(model, solver=Ddim()), draw(model), rtol=0, atol=1e-6)


def test_one_step_of_ddim_is_the_predicted_data() -> None:
    model = tiny(Convention(prediction="data"))
    x = initial_noise(model.sample_shape, SEEDS)
    with torch.no_grad():
        expected = model(x, torch.ones(3), COND)
    torch.testing.assert_close(draw(model, solver=Ddim(), steps=1), expected)


def test_euler_maruyama_without_diffusion_is_euler_bit_for_bit() -> None:
    """At 32 steps and a last one of 1/32 both visit the same times exactly."""
    model, still = tiny(SIT), EulerMaruyama(scale=0, last=1 / 32)
    assert torch.equal(still.times(Linear(), 32), Euler().times(Linear(), 32))
    assert torch.equal(draw(model, solver=still, steps=32), draw(model, steps=32))


def test_sde_times_and_strengths() -> None:
    times = EulerMaruyama().times(Linear(), 250)
    assert len(times) == 251 and times[0] == 1 and times[-2].item() == 0.04 and times[-1] == 0
    at = {
        form: EulerMaruyama(form).strength(Linear(), 0.25) for form in ("sigma", "constant", "sbdm", "linear")
    }  # type: ignore[arg-type]
    assert at == pytest.approx({"sigma": 0.25, "constant": 1, "sbdm": 0.25 / 0.75, "linear": 0.25})
    assert EulerMaruyama("decreasing").strength(Linear(), 1) == 1
    assert EulerMaruyama("decreasing").strength(Linear(), 0) == 0
    assert EulerMaruyama("increasing-decreasing").strength(Linear(), 0.5) == 1


@solvers
def test_evaluations_are_as_announced(solver: Solver, convention: Convention) -> None:
    model, seen = tiny(convention), []
    with batches(model) as forwards:
        done = sample(model, COND, SEEDS, steps=8, solver=solver, progress=lambda *at: seen.append(at))
    total = solver.evaluations(8)
    assert done.evaluations == done.forwards == len(forwards) == total
    assert seen == [(i + 1, total) for i in range(total)]
    path = convention.make_path()
    assert len(solver.times(path, 8)) == 9 and (solver.times(path, 8).diff() < 0).all()


def test_ancestral_draws_with_the_learned_variance() -> None:
    """Two steps by hand: mean + exp(log variance / 2) * the seed's second draw, then the mean alone."""
    model, path = tiny(DDPM), DiscretePath.linear()
    noise = SampleNoise(SEEDS, model.sample_shape)
    x, z, t = noise.draw().double(), noise.draw(), torch.tensor([1])
    kept = path.respaced(path.evenly(2))
    with torch.no_grad():
        eps, fraction = DDPM.split(model(x.float(), torch.full((3,), 999.0), COND).double())
    data = path.convert(eps, x, torch.tensor([999.0]), "noise", "data")
    x = kept.posterior_mean(x, data, t) + (0.5 * kept.log_variance(fraction, t, x)).exp() * z
    with torch.no_grad():
        eps, _ = DDPM.split(model(x.float(), torch.zeros(3), COND).double())
    expected = path.convert(eps, x, torch.tensor([0.0]), "noise", "data")
    found = draw(model, solver=Ancestral(), steps=2)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@dataclass(frozen=True)
class Watch(Policy):
    """Keeps every call it sees, and each branch's last output; replaces branches in evaluations of `skip`."""

    calls: list[Call]
    skip: tuple[int, ...] = ()

    def claims(self, sites: Sequence[Site]) -> Mapping[str, Claim]:
        return dict.fromkeys(named(sites, "branch"), "own")

    def start(self, sites: Sequence[Site], total: int, modules: nn.Module | None = None) -> Session:
        return WatchSession(self, named(sites, "branch"))

    def exact(self) -> Self:
        return replace(self, skip=())


class WatchSession(Session):
    def __init__(self, policy: Watch, names: list[str]) -> None:
        super().__init__()
        self.policy, self.names, self.guidances = policy, names, 0

    def enter(self, call: Call) -> Mapping[str, Handler]:
        self.policy.calls.append(call)
        return {name: self.handler(call, name) for name in self.names}

    def handler(self, call: Call, name: str) -> Handler:
        key = (call.net, call.lane, name)

        def handle(fn: Handler, *args: Any) -> Any:
            if call.index in self.policy.skip:
                return self.state[key]
            out = fn(*args)
            self.put(key, out)
            return out

        return handle

    def guided(self, call: Call, v: Tensor) -> Tensor:
        assert v.shape == (3, 4, 4, 4)
        return v


def seen_by(model: DiT, **options: Any) -> list[Call]:
    calls: list[Call] = []
    draw(model, policies=[Watch(calls)], **options)
    return calls


def test_calls_name_their_lane_net_index_and_time() -> None:
    model = tiny()
    calls = seen_by(model, guidance=ClassifierFree(2.0), steps=2)
    assert [(c.index, c.total, c.t, c.lane, c.net) for c in calls] == [
        (0, 2, 1.0, "cond", "main"),
        (0, 2, 1.0, "uncond", "main"),
        (1, 2, 0.5, "cond", "main"),
        (1, 2, 0.5, "uncond", "main"),
    ]
    assert calls[0].layout == model.layout((4, 4, 4))
    batched = seen_by(model, guidance=ClassifierFree(2.0, interval=(0.5, 1.0)), batched=True, steps=4)
    assert [c.lane for c in batched] == ["cond+uncond"] * 3 + ["cond"]
    assert [c.index for c in seen_by(model, solver=Heun(), steps=2)] == [0, 1, 2]
    assert [c.t for c in seen_by(tiny(DDPM), solver=Ddim(), steps=2)] == [0.501, 0.001]


def test_a_guide_shares_the_policies_only_if_it_has_the_same_sites() -> None:
    model = tiny()
    twin = seen_by(model, guidance=Autoguidance(2.0, tiny(seed=1)), steps=2)
    assert [(c.net, c.lane) for c in twin] == [("main", "cond"), ("guide", "cond")] * 2
    other = seen_by(model, guidance=Autoguidance(2.0, tiny(seed=1, depth=1)), steps=2)
    assert [c.net for c in other] == ["main"] * 2


def test_policies_act_and_leave_receipts() -> None:
    model, guidance = tiny(), ClassifierFree(2.0)
    exact = sample(model, COND, SEEDS, steps=8, guidance=guidance, policies=[Watch([])])
    assert torch.equal(exact.samples, draw(model, guidance=guidance))
    fast = sample(model, COND, SEEDS, steps=8, guidance=guidance, policies=[Watch([], skip=(3, 4))])
    lanes = fast.receipts[0].as_dict()["lanes"]
    assert lanes == {lane: {"computed": "0-2 5-7", "replaced": "3-4"} for lane in ("cond", "uncond")}
    kept = 2 * 4 * 3 * 4 * 32 * 4  # lanes, branches, samples, tokens, width, bytes
    assert fast.policy_bytes == kept and not torch.equal(fast.samples, exact.samples)
    with pytest.raises(NoEffectError, match="saved nothing"):
        draw(model, policies=[Watch([], skip=(99,))])
    with pytest.raises(ConfigError, match="max_bytes=1,000"):
        draw(model, policies=[Watch([])], max_bytes=1000)


def test_samples_are_float32_and_ordinary_tensors() -> None:
    model = tiny().bfloat16()
    done = sample(model, COND, SEEDS, steps=2)
    assert done.samples.dtype == torch.float32 and done.samples.shape == (3, 4, 4, 4)
    assert not done.samples.requires_grad and not done.samples.is_inference()
    torch.testing.assert_close(done.samples, draw(tiny(), steps=2), rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0 should be at least 1"),
        ({"seeds": [1, 1, 2]}, "seed 1 is given twice"),
        ({"seeds": [1, 2]}, "Cond.label has 3 rows for 2 seeds"),
        ({"solver": Ancestral()}, "Ancestral needs DDPM's discrete path, not Linear"),
        ({"guidance": ClassifierFree(2.0, channels=5)}, "channels=5, but the model predicts 4"),
        (
            {"guidance": Autoguidance(2.0, tiny(DDPM))},
            "predicts noise on path 'ddpm'; expected velocity on 'linear'",
        ),
    ],
)
def test_bad_input_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        draw(tiny(), **options)


@pytest.mark.parametrize("solver", [Euler(), Heun(), EulerMaruyama()], ids=lambda s: type(s).__name__)
def test_velocity_solvers_refuse_ddpm_before_running_it(solver: Solver) -> None:
    model = tiny(DDPM)
    with batches(model) as seen, pytest.raises(ConfigError, match=r"needs a velocity.*use Ddim or Ancestral"):
        draw(model, solver=solver)
    assert not seen


@pytest.mark.parametrize("steps", [0, 1001])
def test_ddpm_steps_outside_the_schedule_are_refused(steps: int) -> None:
    for solver in (Ddim(), Ancestral()):
        with pytest.raises(ConfigError, match=f"steps={steps} should"):
            draw(tiny(DDPM), solver=solver, steps=steps)


def test_train_mode_is_refused() -> None:
    with pytest.raises(ConfigError, match="'main' is in train mode"):
        draw(tiny().train())
    with pytest.raises(ConfigError, match="'guide' is in train mode"):
        draw(tiny(), guidance=Autoguidance(2.0, tiny(seed=1).train()))


def test_samples_that_are_not_finite_are_reported_by_seed() -> None:
    model = tiny()
    with torch.no_grad():
        model.label.weight[4] = torch.nan
    with pytest.raises(DitkitError, match=r"1 of 3 samples are not finite \(seeds 11\)"):
        draw(model)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EulerMaruyama("sgima"), "unknown diffusion 'sgima'; did you mean 'sigma'"),  # type: ignore[arg-type]
        (lambda: EulerMaruyama(scale=-1), "scale=-1 should not be negative"),
        (lambda: EulerMaruyama(last=0), "last=0 should lie between 0 and 1"),
        (lambda: ClassifierFree(2.0, channels=0), "channels=0 should be at least 1"),
        (lambda: ClassifierFree(2.0, interval=(0.8, 0.2)), "interval=\\(0.8, 0.2\\) should be"),
    ],
)
def test_settings_out_of_range_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_solvers_and_guidances_are_found_by_name() -> None:
    assert {c.__name__ for c in every(Solver)} == {  # type: ignore[type-abstract]
        "Ancestral",
        "Ddim",
        "DiffusersScheduler",
        "DpmSolverPP",
        "Euler",
        "EulerMaruyama",
        "Heun",
        "UniPc",
    }
    assert find(Guidance, "classifierfree") is ClassifierFree  # type: ignore[type-abstract]


@pytest.mark.parametrize(
    ("convention", "solver"), [(SIT, Euler()), (DDPM, Ddim())], ids=["continuous", "discrete"]
)
def test_the_default_solver_follows_from_the_path(convention: Convention, solver: Solver) -> None:
    model = tiny(convention)
    named = Sampling(steps=2, solver=solver, guidance=Unguided(), seeds=(0, 1))
    assert named.changed(solver=None).resolved(model) == named == named.resolved(model)
    sampler = Sampler.of(model, sampling=named.changed(solver=None))
    assert sampler.sampling.solver == solver and sampler.sampling.as_dict()["solver"] == str(solver)
    assert torch.equal(sampler.draw().samples, Sampler.of(model, sampling=named).draw().samples)
    assert torch.equal(sampler.draw(solver=None).samples, sampler.draw().samples)


def test_settings_without_a_model_have_no_solver_yet() -> None:
    assert Sampling().solver is None and Sampling().as_dict()["solver"] is None
    assert Sampling(steps=7).evaluations == 7 and Sampling(steps=7, solver=Heun()).evaluations == 13
