"""SRA's times, distances, weights and gradients against vvvvvjdy/SRA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import formula
from ditkit.core.cond import Cond
from ditkit.core.convention import DDPM, Convention
from ditkit.models.dit import DiT, DiTConfig
from ditkit.train.denoising import Denoising, NoisyBatch
from ditkit.train.randomness import SampleRNG
from ditkit.train.schedules import EpochDecay
from ditkit.train.teacher import Answer, Held, LiveTeacher
from ditkit.train.terms.regression import Regression
from ditkit.train.terms.self_alignment import AlignmentHead, SelfAlignment, distance
from golden_support import adaln_shapes, assert_golden, float64, read, with_time

SYSTEM = "32-sra"
FLOW = Convention()
"""REPA's and SRA's: the network is fed noise-time and answers noise - data."""
HEAD = ("linear1", "linear2")


@dataclass(frozen=True)
class GivenRNG(SampleRNG):
    """Randomness whose one draw of a term is given."""

    u: tuple[float, ...] = ()

    def of_term(self, name: str, n: int = 1) -> Tensor:
        return torch.tensor(self.u, dtype=torch.float64)[:, None]


def given(u: Any) -> GivenRNG:
    return GivenRNG(0, 0, range(2), tuple(u))


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_loss_of_given_features(path: str) -> None:
    case = read(SYSTEM)[f"SRA loss, all inputs given, {path} path"]
    draws, results = case["draws"], case["results"]
    convention = Convention(path)  # type: ignore[arg-type]
    data, noise, out = (
        formula.tensor(f"sra1.{n}", (2, 4, 4, 4)) for n in ("images", "noise", "model_output")
    )
    own, taught = (formula.tensor(f"sra1.{who}_features", (2, 5, 12)) for who in ("student", "teacher"))
    t = torch.tensor(draws["time"], dtype=torch.float64)
    model = DiT(DiTConfig(size=4, width=12, depth=8, heads=2, classes=2, convention=convention))
    batch = NoisyBatch(
        path=convention.make_path(), convention=convention, data=data, noise=noise, t=t, prediction=out,
        x=convention.make_path().mix(data, noise, t), fraction=None, taps={"blocks.2": own}, sites=model.sites(),
        rng=given(draws["u in [0,1) (times t_max and subtracted for the teacher)"]),
    )  # fmt: skip
    assert_golden(Regression().loss(batch), results["denoising_loss_per_sample"])
    assert_golden(batch.x, results["student_input"])
    term = SelfAlignment(head=False)
    ask = term.asks(batch)
    assert ask.x is not None and ask.t is not None and ask.stop == "blocks.7"
    assert_golden(ask.x, results["teacher_input"])
    assert_golden(ask.t, results["teacher_time"])
    batch = replace(batch, taught=Answer(None, {"blocks.7": taught}))
    kinds = {"sml1": "smooth_l1", "l2": "l2", "l1": "l1", "cos": "cosine"}
    for name, kind in kinds.items():
        found = replace(term, distance=kind, over="tokens").loss(batch).mean().item()  # type: ignore[arg-type]
        assert found == pytest.approx(results["by_loss_type"][name]["its_mean"], rel=1e-9)
    channels = distance(own, taught, "cosine")
    dots = (own * taught).sum(-1) / (own.norm(dim=-1) * taught.norm(dim=-1))
    torch.testing.assert_close(channels, (1 - dots).mean(1))


def pair_of(case: Mapping[str, Any], convention: Convention, outs: int, depth: int) -> tuple[DiT, DiT]:
    """Return student and teacher: half of the teacher's weights are the student's."""
    shapes = adaln_shapes(case["constructor"], outs)
    own = formula.weights(shapes)
    other = {k: 0.5 * v + 0.5 * formula.weight(f"teacher.{k}", v.shape) for k, v in own.items()}
    config = DiTConfig(
        size=8, patch=2, channels=4, width=24, depth=depth, heads=3, classes=10, convention=convention
    )
    pos = {"pos_embed": torch.zeros(1)}
    with float64():
        return DiT.from_original(pos | own, config).train(), DiT.from_original(pos | other, config).eval()


def head() -> AlignmentHead:
    with float64():
        module = AlignmentHead(24, 24)
    for layer, name in zip((module.inner, module.outer), HEAD, strict=True):
        for kind in ("weight", "bias"):
            value = getattr(layer, kind)
            value.data.copy_(formula.weight(f"ap_head.{name}.{kind}", value.shape))
    return module


OURS = {
    "blocks.0.attn.qkv.weight": "blocks.0.attn.qkv.weight",
    "blocks.1.mlp.fc2.weight": "blocks.1.mlp.outer.weight",
    "blocks.4.mlp.fc2.weight": "blocks.4.mlp.outer.weight",
    "y_embedder.embedding_table.weight": "label.weight",
}


@pytest.mark.parametrize("kind", ["sml1", "cos"])
def test_gradients_of_a_tiny_sit(kind: str) -> None:
    case = read(SYSTEM)[f"tiny SiT, 2 -> 4, {kind}, loss and gradients"]
    draws, results = case["draws"], case["results"]
    student, teacher = pair_of(case, FLOW, outs=4, depth=5)
    module = head()
    options = {"sml1": (0.2, "smooth_l1"), "cos": (0.5, "cosine")}[kind]
    term = SelfAlignment(options[0], 2, 4, distance=options[1], over="tokens", teacher=LiveTeacher())  # type: ignore[arg-type]
    losses = Denoising((Regression(), term)).at(
        student,
        student,
        path=FLOW.make_path(),
        data=formula.tensor("srasit.images", (2, 4, 8, 8)),
        noise=formula.tensor("srasit.noise", (2, 4, 8, 8)),
        t=torch.tensor(draws["time"], dtype=torch.float64),
        cond=Cond(label=torch.tensor(case["labels"]), drop=torch.tensor([True, False])),
        rng=given(draws["u"]),
        held=Held(0, {"SelfAlignment": module}, {"SelfAlignment": teacher}),
    )
    losses["loss"].backward()
    tolerance = with_time(1e-6)
    assert losses["SelfAlignment"].item() == pytest.approx(results["align_mean"], rel=tolerance)
    expected = results["denoising_loss_per_sample"]["sum"] / 2
    assert losses["Regression"].item() == pytest.approx(expected, rel=tolerance)
    weights = {
        **{name: student.get_parameter(ours) for name, ours in OURS.items()},
        "ap_head.linear1.weight": module.inner.weight,
        "ap_head.linear2.bias": module.outer.bias,
    }
    for name, value in results["gradients"].items():
        gradient = weights[name].grad
        assert gradient is not None
        assert gradient.norm().item() == pytest.approx(value["norm"], rel=tolerance)
        slack = tolerance * gradient.abs().sum().item()
        assert gradient.sum().item() == pytest.approx(value["sum"], abs=slack)
    assert all(p.grad is None for p in teacher.parameters())


def test_losses_of_a_tiny_dit() -> None:
    case = read(SYSTEM)["tiny DiT, training losses, 2 -> 3"]
    results = case["results"]
    student, teacher = pair_of(case, DDPM, outs=8, depth=4)
    term = SelfAlignment(0.04, 2, 3, teacher=LiveTeacher())
    objective = Denoising(
        (Regression(), term)
    )  # the bound, which has the exact integral at t = 0, is 39's to hold
    rng = given((r + 0.5) / 200 for r in case["draws"]["randint"])
    met: dict[str, Any] = {}
    forward = teacher.forward
    teacher.forward = lambda x, t, cond, run: met.update(x=x, t=t, cond=cond) or forward(x, t, cond, run)  # type: ignore[method-assign]
    losses = objective.at(
        student,
        student,
        path=DDPM.make_path(),
        data=formula.tensor("sradit.x", (2, 4, 8, 8)),
        noise=formula.tensor("sradit.noise", (2, 4, 8, 8)),
        t=torch.tensor(case["t"]),
        cond=Cond(label=torch.tensor(case["labels"]), drop=torch.tensor([False, True])),
        rng=rng,
        held=Held(0, {"SelfAlignment": head()}, {"SelfAlignment": teacher}),
    )
    tolerance = with_time(1e-6)
    assert losses["SelfAlignment"].item() == pytest.approx(results["align_loss"], rel=tolerance)
    assert losses["Regression"].item() == pytest.approx(results["mse"]["sum"] / 2, rel=tolerance)
    assert met["t"].tolist() == results["teacher_t"] == [1, 650]
    assert met["cond"].drop.tolist() == [label == 10 for label in results["teacher_labels"]]
    assert_golden(met["x"], results["teacher_input"], 1e-6)


def test_weight_by_epoch() -> None:
    results = read(SYSTEM)["weight of the alignment loss by epoch (sml1)"]["results"]
    schedules = {
        "sit_256": SelfAlignment.preset("SiT-XL").weight,
        "sit_512": EpochDecay(0.2, 99, 800),
        "dit_256": SelfAlignment.preset("DiT-XL").weight,
    }
    for name, schedule in schedules.items():
        assert isinstance(schedule, EpochDecay)
        first = [-(-epoch * schedule.samples // schedule.batch) for epoch in results["epochs"]]
        assert [schedule.at(step) for step in first] == pytest.approx(results[name], rel=1e-12)
        assert [schedule.at(step - 1) for step in first[1:]] != results[name][1:]
    assert SelfAlignment.preset("SiT-B", "cosine").weight == results["cos_any_epoch"]


def test_parameters_of_the_head() -> None:
    for name, width in (("B", 768), ("L", 1024), ("XL", 1152)):
        with torch.device("meta"):
            count = sum(p.numel() for p in AlignmentHead(width, width).parameters())
        assert count == read(SYSTEM)["parameters of the head"]["results"][name]
