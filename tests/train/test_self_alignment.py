"""SRA: two passes over the same data, noise and labels; nothing is learned past the student's block."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import ditkit
from ditkit.adapt.task_routing import TaskRouting
from ditkit.caching import TaylorSeer
from ditkit.core.cond import Cond
from ditkit.core.convention import DDPM, Convention
from ditkit.core.errors import ConfigError
from ditkit.models.dimr import DiMR, DiMRConfig
from ditkit.models.dit import DiT
from ditkit.models.small_flux import SmallFlux, SmallFluxConfig
from ditkit.recipes.sra import sra
from ditkit.train.denoising import Denoising, NoisyBatch
from ditkit.train.loop import Training, train
from ditkit.train.randomness import SampleRNG
from ditkit.train.schedules import EpochDecay
from ditkit.train.taps import run_with_taps
from ditkit.train.teacher import EmaTeacher, Held, LiveTeacher
from ditkit.train.terms.regression import Regression
from ditkit.train.terms.self_alignment import SelfAlignment
from scripts.toy_run import Pictures, losses, settings, toy_model

FLOW = Convention()
DISTANCES = ("smooth_l1", "cosine", "l1", "l2")
PAIR: dict[str, Any] = {"block": 1, "target": 3}


def model(convention: Convention = FLOW, **config: Any) -> DiT:
    return toy_model(convention, depth=3, **config)


class Spied(DiT):
    """A network that notes what it is called on."""

    def forward(self, x: Tensor, t: Tensor, cond: Cond, *run: Any) -> Tensor:  # type: ignore[override]
        self.met = {"x": x, "t": t, "cond": cond, "training": self.training}
        return super().forward(x, t, cond, *run)


def both(term: SelfAlignment, student: DiT, teacher: DiT, convention: Convention = FLOW) -> dict[str, Any]:
    """Evaluate a term alone; labels of half of the samples are dropped."""
    generator = torch.Generator().manual_seed(1)
    data, noise = torch.randn(2, 8, 1, 8, 8, generator=generator)
    path = convention.make_path()
    own = term.modules(student)
    drop = torch.arange(8) % 2 == 0
    found = Denoising((term,)).at(
        student,
        student,
        path=path,
        data=data,
        noise=noise,
        t=path.place(torch.rand(8, dtype=torch.float64, generator=generator)),
        cond=Cond(label=torch.arange(8) % 4, drop=drop),
        rng=SampleRNG(0, 0, range(8)),
        held=Held(0, {"SelfAlignment": own}, {"SelfAlignment": teacher}),
    )
    return {"loss": found["loss"], "data": data, "noise": noise, "drop": drop}


@pytest.mark.parametrize("distance", DISTANCES)
def test_the_same_block_of_the_same_network_at_the_same_time_has_no_distance(distance: Any) -> None:
    term = SelfAlignment(1.0, 2, 2, gap=0.0, distance=distance, head=False)
    student = model().eval()
    found = both(term, student, student.with_weights(student.state_dict(), "teacher"))["loss"].item()
    assert found == pytest.approx(0, abs=1e-6 if distance == "cosine" else 0)  # x / |x| is rounded


def test_the_teacher_is_given_the_same_noise_and_labels_at_a_cleaner_time() -> None:
    student, teacher = (model().with_weights(model().state_dict(), "spied") for _ in range(2))
    for network in (student, teacher):
        network.__class__ = Spied
    student.train()
    teacher.eval()
    given = both(SelfAlignment(1.0, **PAIR), student, teacher)
    own, taught = student.met, teacher.met
    gap = own["t"] - taught["t"]
    assert gap.min() >= 0 and 0.1 < gap.max() <= 0.2 + 1e-6 and taught["t"].min() >= 0
    t = taught["t"][:, None, None, None]
    torch.testing.assert_close(taught["x"] - (1 - t) * given["data"], t * given["noise"], rtol=0, atol=1e-6)
    assert torch.equal(own["cond"].label, taught["cond"].label)
    assert torch.equal(own["cond"].drop, given["drop"]) and torch.equal(taught["cond"].drop, given["drop"])
    assert own["training"] and not taught["training"]


@pytest.mark.parametrize("convention", [FLOW, DDPM], ids=["flow", "ddpm"])
def test_the_teachers_times(convention: Convention) -> None:
    path, n = convention.make_path(), 2000
    t = path.place(torch.linspace(0, 1 - 1e-9, n, dtype=torch.float64))
    batch: Any = NoisyBatch(
        path=path, convention=convention, data=torch.zeros(n, 1), noise=torch.zeros(n, 1), x=torch.zeros(n, 1), t=t,
        prediction=torch.zeros(n, 1), fraction=None, taps={}, rng=SampleRNG(0, 0, range(n)),
    )  # fmt: skip
    earlier, least = SelfAlignment().earlier(batch), 1 if convention is DDPM else 0
    back, late = t - earlier, t >= (201 if convention is DDPM else 0.2)
    assert earlier.min() == least and earlier.dtype == t.dtype
    if convention is DDPM:
        assert back[late].min() == 0 and back.max() == 199 and back[0] == -1  # index 0: the published clamp
        assert abs(back[late].double().mean() - 99.5) < 5
    else:
        assert (back >= 0).all() and back.max() <= 0.2 and abs(back[late].mean() - 0.1) < 0.005
    fixed = t - SelfAlignment(fixed=True).earlier(batch)
    torch.testing.assert_close(fixed[late], torch.full_like(fixed[late], 200 if convention is DDPM else 0.2))


def test_only_blocks_up_to_the_students_learn_from_it() -> None:
    student, teacher = model().train(), model().eval().requires_grad_(False)
    both(SelfAlignment(1.0, 2, 3), student, teacher)["loss"].backward()
    reached = {name for name, p in student.named_parameters() if p.grad is not None and p.grad.any()}
    assert {name.split(".")[1] for name in reached if name.startswith("blocks.")} == {"0", "1"}
    assert not any(name.startswith("head") for name in reached) and "label.weight" in reached
    assert all(p.grad is None for p in teacher.parameters())


def test_a_teacher_that_stops_early_says_the_same() -> None:
    network = model().eval()
    x, t, cond = torch.randn(4, 1, 8, 8), torch.rand(4), Cond(label=torch.arange(4))
    whole, cut = (
        run_with_taps(network, network, ["blocks.1"], (1, 8, 8), x, t, cond, times=t, stop=stop)
        for stop in ("", "blocks.1")
    )
    assert cut.out is None and torch.equal(cut.taps["blocks.1"], whole.taps["blocks.1"])


def run(folder: Path, *terms: Any, steps: int = 4, resume: bool = False, network: Any = None) -> Path:
    chosen = settings(steps=steps, save_every=1, warmup=2, clip=0.0)
    network = model() if network is None else network
    train(network, Pictures(), Denoising((Regression(), *terms)), chosen, folder, resume=resume)
    return folder


def test_weight_zero_is_plain_training_and_a_resume_the_uninterrupted_run(tmp_path: Path) -> None:
    term = SelfAlignment(0.5, **PAIR, teacher=EmaTeacher(1))
    plain, zero = run(tmp_path / "plain"), run(tmp_path / "zero", replace(term, weight=0.0))
    whole = run(tmp_path / "whole", term)
    cut = run(tmp_path / "cut", term, steps=2)
    run(cut, term, resume=True)
    for a, b in ((plain, zero), (whole, cut)):
        one, two = (load_file(f / "state.safetensors") for f in (a, b))
        assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
        assert losses(a) == losses(b)
    assert losses(plain)[0]["Regression"] == losses(whole)[0]["Regression"]
    held = load_file(whole / "model" / "model.safetensors")
    assert held.keys() == load_file(plain / "model" / "model.safetensors").keys()  # the head does not ship
    assert "part.SelfAlignment.inner.weight" in load_file(whole / "state.safetensors")


def test_a_live_teacher_is_the_student_without_gradients(tmp_path: Path) -> None:
    objective = Denoising((Regression(), SelfAlignment(0.5, **PAIR, teacher=LiveTeacher())))
    training = Training(model(), Pictures(), objective, settings(), tmp_path)
    training.open({}, False)
    for _ in range(2):
        training.step()
        teacher = training.teachers["SelfAlignment"]
        assert all(
            a.data_ptr() == b.data_ptr() and not b.requires_grad
            for a, b in zip(training.model.parameters(), teacher.parameters(), strict=True)
        )
    assert not teacher.training and training.model.training


def test_trained_under_routing_each_pass_is_routed_by_its_own_time() -> None:
    routed = model().adopt([TaskRouting(path="linear")])
    teacher = routed.with_weights(routed.state_dict(), "teacher").eval()
    term = SelfAlignment(1.0, 3, 3, gap=1.0, head=False)
    plain = both(replace(term, gap=0.0), routed.eval(), teacher)["loss"]
    assert plain == 0  # the same windows of channels
    assert both(term, routed.eval(), teacher)["loss"] > 0
    bare = model().eval()
    assert both(replace(term, gap=0.0), routed.eval(), bare)["loss"] > 0


def test_what_was_trained_so_is_accelerated_like_any_other(tmp_path: Path) -> None:
    folder = run(tmp_path / "run", SelfAlignment(0.5, **PAIR, teacher=EmaTeacher(1)))
    trained = ditkit.load(folder / "model")
    exact, fast = (
        ditkit.generate(trained, [0, 1], seeds=[0, 1], steps=6, policies=policies)
        for policies in ((), [TaylorSeer(interval=3)])
    )
    (receipt,) = fast.receipts
    assert receipt.saved and not torch.equal(exact.samples, fast.samples)


@pytest.mark.parametrize(
    ("term", "network", "message"),
    [
        (SelfAlignment(1.0, 2, 4), model, r"needs blocks 2 and 4, counted from 1; the model has 3"),
        (
            SelfAlignment(1.0, 1, 4),
            lambda: DiMR(DiMRConfig.tiny()),
            r"needs two blocks of one grid; 'stages.0.0'",
        ),
        (
            SelfAlignment(1.0, 1, 2),
            lambda: SmallFlux(SmallFluxConfig.tiny()),
            r"needs blocks of the image's tokens alone; 'blocks.0' has text",
        ),
    ],
)
def test_a_model_without_such_a_pair_is_refused(term: Any, network: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Denoising((term,)).check(network())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: SelfAlignment(block=0), r"block=0 should be at least 1"),
        (lambda: SelfAlignment(gap=1.5), r"gap=1.5 should"),
        (lambda: SelfAlignment(distance="mse"), r"unknown distance 'mse'"),  # type: ignore[arg-type]
        (lambda: SelfAlignment.preset("XL"), r"unknown SelfAlignment preset 'XL'"),
        (lambda: EpochDecay(samples=0), r"samples=0 should be at least 1"),
        (lambda: EpochDecay(-0.1), r"value=-0.1, expected a finite number"),
    ],
)
def test_what_cannot_be_is_refused(change: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        change()


def test_the_recipe_aligns_block_3_with_block_8() -> None:
    recipe = sra()
    term = next(t for t in recipe.objective.terms if isinstance(t, SelfAlignment))
    assert (term.block, term.target, recipe.model.depth) == (3, 8, 12)
    with torch.device("meta"):
        recipe.objective.check(recipe.network())
