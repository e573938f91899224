"""Noise-times in training, and policies that a model is trained under and cannot do without."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ditkit.api.compare import compare
from ditkit.api.generate import generate
from ditkit.attention import Grouped
from ditkit.caching import TaylorSeer
from ditkit.core.cond import Cond
from ditkit.core.convention import DDPM, SIT
from ditkit.core.errors import ConfigError
from ditkit.core.model import Model
from ditkit.core.policy import Policy, with_inherent
from ditkit.core.run import Call
from ditkit.core.trajectory import Trajectory
from ditkit.models.video_dit import VideoDiT, VideoDiTConfig
from ditkit.sample import Autoguidance
from ditkit.sample.denoiser import GuidedDenoiser
from ditkit.sample.sampler import Sampling, trajectory_of
from ditkit.train.denoising import Denoising, NoisyBatch
from ditkit.train.loop import train
from ditkit.train.objective import Term
from ditkit.train.randomness import SampleRNG
from ditkit.train.terms.distillation import PredictionDistillation
from ditkit.train.terms.regression import Regression
from ditkit.train.timesteps import Paired, PerFrame, Stratified
from inherent_policies import Mapped, Routing
from rig import call_at, noise, tiny_dit

sys.path.insert(0, str(Path(__file__).parents[1] / "support" / "scripts"))
from toy_run import Pictures, losses, settings, toy_model

POLICIES = (Routing(), Mapped())


def trained(folder: Path, steps: int = 4, convention: Any = SIT, **changed: Any) -> Any:
    model = toy_model(convention).adopt(POLICIES)
    return train(model, Pictures(), Denoising(), settings(steps=steps, warmup=0, **changed), folder)


def test_policies_that_read_times_and_learn_train_alike_with_and_without_checkpointing(tmp_path):
    plain, again = (trained(tmp_path / str(on), gradient_checkpointing=on) for on in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), again.parameters(), strict=True))
    assert plain.learned["Mapped"]["blocks/0/attn/core"].weight.abs().max() > 0
    loaded = Model.load(tmp_path / "False" / "model")
    assert loaded.policies == POLICIES
    drawn = {"seeds": [0, 1], "steps": 2, "guidance": 1.0}
    assert torch.equal(generate(loaded, **drawn).samples, generate(plain, **drawn).samples)


def test_a_model_is_not_sampled_without_what_it_was_trained_under(tmp_path):
    model = trained(tmp_path)
    drawn: dict[str, Any] = {"seeds": [0, 1], "steps": 4, "guidance": 1.0}
    own = generate(model, **drawn)
    named = generate(model, **drawn, policies=POLICIES)
    without = generate(model, **drawn, policies=[policy.exact() for policy in POLICIES])
    assert torch.equal(own.samples, named.samples) and not torch.allclose(
        own.samples, without.samples, atol=1e-3
    )
    assert [receipt.as_dict().get("inherent") for receipt in own.receipts] == [True, True]
    assert with_inherent(model, [TaylorSeer()]) == (*POLICIES, TaylorSeer())
    assert with_inherent(model, [Routing(1.0)]) == (Mapped(), Routing(1.0))
    cached = generate(model, **drawn, policies=[TaylorSeer(interval=1)])
    assert torch.equal(cached.samples, own.samples)
    forecast = generate(model, **{**drawn, "steps": 8}, policies=[TaylorSeer(interval=2, order=1)])
    assert len(forecast.receipts) == 3


def test_compare_is_exact_under_the_inherent_ones(tmp_path):
    model = trained(tmp_path)
    report = compare(
        model,
        policies=[Routing(), Routing(1.0)],
        seeds=[0],
        steps=2,
        guidance=1.0,
        rounds=1,
        memory=False,
    )
    same, off = (row for row in report.rows if row.kind == "policy")
    assert same.identical and not off.identical


def test_a_guide_has_its_own_inherent_policies():
    model, guide = (toy_model(SIT).eval() for _ in range(2))
    guide.adopt([Routing()])
    label, settings = Cond(label=torch.tensor([0])), Sampling(steps=2, guidance=1.0)
    field = GuidedDenoiser(model, label, Autoguidance(2.0, guide), trajectory_of(model, settings))
    main, other = field.trajectories
    assert main.policies == () and other.policies == (Routing(),)
    alike = Autoguidance(2.0, toy_model(SIT).eval())
    shared = GuidedDenoiser(model, label, alike, trajectory_of(model, settings))
    assert len(shared.trajectories) == 1


class Watching(Routing):
    """Notes the times of every call."""

    seen: list[Tensor] = []  # noqa: RUF012

    def start(self, sites: Any, total: int, modules: Any = None) -> Any:
        session = super().start(sites, total)
        enter = session.enter

        def noted(call: Call) -> Any:
            self.seen.append(call.times)
            return enter(call)

        session.enter = noted
        return session


@pytest.mark.parametrize("convention", [SIT, DDPM])
def test_times_are_noise_times_in_training_and_of_teachers(convention, monkeypatch):
    Watching.__module__, Watching.__name__ = "ditkit.adapt.toy", "Watching"
    Watching.seen.clear()
    model = toy_model(convention).adopt([Watching()])
    objective = Denoising((Regression(),))
    objective.check(model)
    data, noise_ = torch.randn(2, 3, 1, 8, 8)
    path = convention.make_path()
    t = path.place(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    cond = Cond(label=torch.zeros(3, dtype=torch.long), drop=torch.zeros(3, dtype=torch.bool))
    objective.at(model, model, path=path, data=data, noise=noise_, t=t, cond=cond)
    dry, times = Watching.seen
    assert dry.tolist() == [0.5] and times.shape == (3,)
    assert torch.allclose(times.double(), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), atol=2e-3)


def test_a_routed_teacher_is_asked_under_its_own_policies(tmp_path):
    folder = trained(tmp_path / "teacher").save(tmp_path / "model")

    def run(name: str, start: Any) -> list[Any]:
        objective = Denoising((Regression(), PredictionDistillation()))
        student, given = Model.load(folder).adopt(()), settings(steps=1, warmup=0)
        train(student, Pictures(), objective, given, tmp_path / name, start=start)
        return losses(tmp_path / name)

    with_, without = run("a", lambda: Model.load(folder)), run("b", None)
    assert with_[0]["PredictionDistillation"] > 0 == without[0]["PredictionDistillation"]


class Two(Policy):
    """Multiplies a branch by a sigmoid of what it was in the call before; read when called, or bound in `enter`."""

    def __init__(self, bound: bool) -> None:
        self.bound = bound

    def claims(self, sites: Any) -> Any:
        return {"blocks.0.mlp": "wrap"}

    def exact(self) -> Any:
        return self

    def start(self, sites: Any, total: int, modules: Any = None) -> Any:
        from ditkit.core.policy import Session

        policy = self

        class Carry(Session):
            def enter(self, call: Call) -> Any:
                before = self.state.get(("b",))

                def handler(fn: Any, *args: Any) -> Tensor:
                    old = before if policy.bound else self.state.get(("b",))
                    out = fn(*args)
                    self.put(("b",), out.detach())
                    return out if old is None else out * old.sigmoid()

                return {"blocks.0.mlp": handler}

        return Carry()


def gradients(bound: bool, checkpointing: bool) -> Tensor:
    """Two calls, the state committed between and after them, then one backward pass."""
    model = tiny_dit().train()
    model.gradient_checkpointing = checkpointing
    trajectory, x = Trajectory(model.sites(), [Two(bound)], 2), noise()
    cond = Cond(label=torch.tensor([0, 1]), drop=torch.tensor([False, False]))
    for index in range(2):
        call = call_at(model, index, total=2)
        out = trajectory.leave(call, model(x + index, torch.full((2,), 0.5), cond, trajectory.run(call)))
    out.square().mean().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_a_handler_reads_only_what_enter_bound():
    assert torch.equal(gradients(True, False), gradients(True, True))
    assert not torch.equal(gradients(False, False), gradients(False, True))


def test_stratified_times_do_not_depend_on_the_processes():
    rng = SampleRNG(0, 3, range(8))
    u = rng.draws((1,))[1]
    whole, _ = Stratified(4).uniforms(u, rng, torch.Size((8, 1)))
    assert sorted((whole * 4).long().tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]
    half = SampleRNG(0, 3, range(4, 8))
    assert torch.equal(Stratified(4).uniforms(half.draws((1,))[1], half, torch.Size((4, 1)))[0], whole[4:])


def test_paired_times_reach_terms_and_move_no_other_draw():
    class Pairs(Regression):
        seen: list[NoisyBatch] = []  # noqa: RUF012

        def loss(self, batch: Any) -> Tensor:
            self.seen.append(batch)
            return super().loss(batch)

    model, rng = toy_model(SIT), SampleRNG(0, 0, range(8))
    data, cond = Pictures().batch(torch.arange(8))
    plain = Denoising()(model, model, data, cond, rng)
    paired = Denoising((Pairs(),), clock=Paired(0.3))(model, model, data, cond, rng)
    assert paired["loss"] == plain["loss"]
    (batch,) = Pairs.seen
    assert ((batch.other <= batch.t) & (batch.other >= batch.t - 0.3)).all() and (batch.other < batch.t).any()


class FrameTimes(VideoDiT):
    """The network at the mean time of its frames."""

    takes_frame_times = True

    def forward(self, x: Tensor, t: Tensor, *args: Any, **given: Any) -> Tensor:
        assert t.shape == (len(x), x.shape[2])
        return super().forward(x, t.mean(1), *args, **given)


def test_each_frame_has_a_time_of_its_own():
    config = VideoDiTConfig(frames=4, size=8, patch=4, channels=1, width=24, depth=1, heads=2, classes=0)
    model, rng = FrameTimes(config), SampleRNG(0, 0, range(2))
    data = torch.randn(2, 1, 4, 8, 8)
    objective = Denoising(clock=PerFrame())
    objective.check(model)
    assert objective(model, model, data, Cond(), rng)["loss"].isfinite()
    with pytest.raises(ConfigError, match="PerFrame: a VideoDiT is told one time a sample"):
        objective.check(VideoDiT(config))
    assert rng.of_term("PerFrame", 4).shape == (2, 4)
    assert not torch.equal(rng.of_term("a"), rng.of_term("b"))
    assert isinstance(Regression(), Term) and replace(objective, clock=Paired()).clock == Paired()
    assert Grouped().inherent is False
