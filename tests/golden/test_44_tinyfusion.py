"""TinyFusion's search, decision, baselines and distillation against VainF/TinyFusion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import formula
from ditkit.adapt.lora import LoRA, _candidates
from ditkit.compress import Kept, LearnedDepth, decide
from ditkit.compress import learned_depth as search
from ditkit.compress.learned_depth import choices
from ditkit.compress.scores import block_influence, least_needed
from ditkit.core.cond import Cond
from ditkit.core.convention import DDPM
from ditkit.core.model import parameter_count
from ditkit.core.run import Call
from ditkit.core.trajectory import Trajectory
from ditkit.models.dit import DiT, DiTConfig
from ditkit.train.denoising import NoisyBatch
from ditkit.train.schedules import Ramp
from ditkit.train.taps import run_with_taps
from ditkit.train.teacher import Answer
from ditkit.train.terms import masked_distillation, variational_bound
from ditkit.train.terms.masked_distillation import MaskedDistillation
from ditkit.train.terms.regression import Regression
from ditkit.train.terms.variational_bound import VariationalBound
from golden_support import (
    adaln_shapes,
    approximate_likelihood,
    assert_golden,
    cases,
    float64,
    read,
    with_time,
)

SYSTEM = "44-tinyfusion"
TOLERANCE = with_time(1e-6)
SMALL = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 24,
    "num_heads": 3,
    "num_classes": 10,
}


def network(depth: int, prefix: str = "") -> DiT:
    shapes = adaln_shapes({**SMALL, "depth": depth}, outs=8)
    state = {name: formula.weight(prefix + name, shape) for name, shape in shapes.items()}
    config = DiTConfig(
        size=8, patch=2, channels=4, width=24, depth=depth, heads=3, classes=10, convention=DDPM
    )
    with float64():
        return DiT.from_original({"pos_embed": torch.zeros(1), **state}, config).eval()


def told(labels: Sequence[int]) -> Cond:
    """Return labels, with the null class as a label that was dropped."""
    label = torch.tensor(labels)
    return Cond(label=label.clamp(max=9), drop=label == 10)


def gates(model: DiT) -> Any:
    return model.learned["LearnedDepth"]["all"]


def with_gates(model: DiT, policy: LearnedDepth) -> DiT:
    """Return the model under a search whose logits are 0.02 times the formula's."""
    with float64():
        model.adopt([policy])
    for k, logits in enumerate(gates(model).logits):
        logits.data = 0.02 * formula.tensor(f"gumbel_gates.{k}", (1, len(logits)))[0]
    return model


@cases(SYSTEM, lambda case: case["name"].startswith("search"))
def test_search(case: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    of_two, expected = case["name"] == "search-1of2", case["expect"]
    policy = LearnedDepth(scale=10.0, hot=0.7, cold=0.7) if of_two else LearnedDepth(keep=(2,), of=(4,))
    model = with_gates(network(4), policy)
    gates(model).train()
    drawn = iter(range(9))
    monkeypatch.setattr(search, "gumbel", lambda like: formula.tensor(f"gumbel{next(drawn)}", like.shape))
    x = formula.tensor(*case["inputs"]["x"])
    session = policy.start(model.sites(), 1, model.learned["LearnedDepth"])
    call = Call(0, 1, 0.5, times=torch.rand(len(x)), step=0)
    handlers = session.enter(call)
    masks = torch.stack([handlers[f"blocks.{i}"].args[0] for i in range(4)], 1)  # type: ignore[attr-defined]
    expected_masks = torch.tensor(expected["masks_per_group"]).double()
    assert torch.equal(masks.detach(), expected_masks.transpose(0, 1).flatten(1))
    drawn = iter(range(9))
    trajectory = Trajectory(model.sites(), [policy], 1, learned=model.learned)
    t = torch.tensor(case["inputs"]["t"]).double()
    out = model(x, t, told(case["inputs"]["y"]), trajectory.run(call))
    assert_golden(out, expected["output"], TOLERANCE)
    out.square().sum().backward()
    for k, logits in enumerate(gates(model).logits):
        golden = expected["gradients_of_sum_of_squares"][f"gumbel_gates.{k}"]
        found = logits.grad.tolist()
        assert found == pytest.approx(list(golden["at"].values()), rel=1e-5)


def test_options() -> None:
    expected = read(SYSTEM)["options"]["expect"]
    for name, kept, size in (("1of2", 1, 2), ("2of4", 2, 4), ("2of3", 2, 3)):
        assert choices(kept, size).int().tolist() == expected[name]
    large = choices(7, 14).int()
    assert len(large) == expected["7of14_count"] and len(large.unique(dim=0)) == 3432
    assert (large.sum(1) == 7).all()
    for row, given in expected["7of14_rows"].items():
        assert large[int(row)].tolist() == given
    assert LearnedDepth().first == expected["fresh_gate_value"]


@pytest.mark.parametrize(
    ("name", "keep", "of"), [("1of2", 1, 2), ("2of4", 2, 4), ("7of14", 7, 14), ("1of4", 1, 4)]
)
def test_decision(name: str, keep: int, of: int) -> None:
    expected = read(SYSTEM)["decision"]["expect"][name]
    model = with_gates(DiT(DiTConfig(size=4, width=4, heads=1, depth=28)), LearnedDepth((keep,), (of,)))
    kept, confidence = decide(model)
    assert kept == Kept(tuple(expected["kept"]))
    assert confidence == pytest.approx(expected["confidence"], rel=1e-6)


def test_schedules() -> None:
    given, expected = read(SYSTEM)["schedules"]["inputs"], read(SYSTEM)["schedules"]["expect"]
    policy = LearnedDepth(steps=given["total_steps"])
    for step, tau in expected["tau"].items():
        assert policy.tau(int(step)) == pytest.approx(tau, rel=1e-12)
    assert policy.scale == expected["scaling"]
    ramp = Ramp(0.01, 0.0, 0, given["epochs"] - 1)
    assert [ramp.at(int(n)) for n in expected["beta"]] == pytest.approx([*expected["beta"].values()])


def test_block_influence() -> None:
    case = read(SYSTEM)["block-importance"]
    x, t = formula.tensor(*case["inputs"]["x"]), torch.tensor(case["inputs"]["t"]).double()
    scores = block_influence(network(6), x, t, told(case["inputs"]["y"]))
    assert scores.tolist() == pytest.approx(case["expect"]["score"], rel=TOLERANCE)
    for count, dropped in case["expect"]["drop"].items():
        assert set(range(6)) - set(least_needed(scores, int(count)).blocks) == set(dropped)


def test_masked_distillation(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (variational_bound, masked_distillation):
        monkeypatch.setattr(module, "discretised_log_likelihood", approximate_likelihood)
    case = read(SYSTEM)["masked-kd"]
    student, teacher, path = network(2), network(4, "teacher."), DDPM.make_path()
    data, noise = (formula.tensor(*case["inputs"][name]) for name in ("x0", "eps"))
    t, cond = torch.tensor(case["inputs"]["t"]), told(range(4))
    x, expected = path.mix(data, noise, t.double()), case["expect"]
    term = MaskedDistillation(features=case["inputs"]["beta_feat"])
    assert term.paired(student.sites()) == {"blocks.0": "blocks.1", "blocks.1": "blocks.3"}
    own, theirs = (
        run_with_taps(model, model, taps, (4, 8, 8), x, t.double(), cond)
        for model, taps in ((student, ("blocks.0", "blocks.1")), (teacher, ("blocks.1", "blocks.3")))
    )
    prediction, fraction = DDPM.split(own.out)
    taught, variance = (part.detach() for part in DDPM.split(theirs.out) if part is not None)
    answer = Answer(taught, {k: v.detach() for k, v in theirs.taps.items()}, variance)
    batch = NoisyBatch(
        path=path, convention=DDPM, data=data, noise=noise, x=x, t=t, prediction=prediction, fraction=fraction,
        taps=own.taps, taught=answer, sites=student.sites(),
    )  # fmt: skip
    inside = [
        [(term.inside(h) != 0).sum().item() for h in (own.taps[a], theirs.taps[b])]
        for a, b in term.paired(student.sites()).items()
    ]
    assert inside == expected["elements_inside_two_sigma_student_teacher"]
    bound = term.bound(batch, taught, variance)
    kd = (prediction - taught).square().flatten(1).mean(1) + bound
    truth = Regression().loss(batch) + VariationalBound().loss(batch)
    loss = term.loss(batch) + 0.1 * truth
    near = pytest.approx
    assert bound.tolist() == near(expected["vb_kd"], rel=TOLERANCE)
    assert term.unlike(batch, answer.taps).tolist() == near(expected["feat_loss"], rel=TOLERANCE)
    assert kd.tolist() == near(expected["kd_loss"], rel=TOLERANCE)
    assert truth.tolist() == near(expected["gt"], rel=TOLERANCE)
    assert loss.tolist() == near(expected["loss"], rel=TOLERANCE)
    loss.mean().backward()
    for theirs_name, ours in (
        ("blocks.0.mlp.fc1.bias", "blocks.0.mlp.inner.bias"),
        ("blocks.1.attn.proj.bias", "blocks.1.attn.out.bias"),
        ("final_layer.linear.bias", "head.out.bias"),
    ):
        gradient: Tensor | None = student.get_parameter(ours).grad
        assert gradient is not None
        golden = expected["gradients_of_mean_loss"][theirs_name]
        found = formula.summary(gradient, picks=len(golden["at"]))
        for key in ("norm", "abs", "at"):
            assert found[key] == near(golden[key], rel=10 * TOLERANCE)


def test_parameters() -> None:
    """A published model has a fixed table of positions beside, which ours makes when it runs."""
    expected = read(SYSTEM)["parameters"]["expect"]
    with torch.device("meta"):
        for depth, name in ((28, "DiT-XL/2"), (19, "DiT-D19/2"), (14, "DiT-D14/2"), (7, "DiT-D7/2")):
            model = DiT.preset("XL/2")
            model.shaped([Kept(tuple(range(depth)))])
            assert parameter_count(model) == expected[name]["trainable"]
            assert parameter_count(model) + 256 * 1152 == expected[name]["all"]


def test_adapters() -> None:
    """Ours has a linear layer in the place of the convolution that embeds patches, which `all` takes in as well."""
    expected = read(SYSTEM)["lora-targets"]["expect"]
    lora = LoRA(rank=8, alpha=16)
    assert lora.alpha / lora.rank == expected["scale"]
    with torch.device("meta"):
        model = DiT.preset("XL/2").adopt([LearnedDepth((2,), (4,))])
    assert sum(map(len, gates(model).logits)) == expected["gate_logits"]
    embed = 8 * (16 + 1152)
    for layers, count, weights in (
        ("blocks", expected["layers_in_blocks"], expected["weights_in_blocks"]),
        ("all", expected["layers"] + 1, expected["weights"] + embed),
    ):
        found = _candidates(model, layers)  # type: ignore[arg-type]
        assert len(found) == count
        assert sum(8 * (layer.in_features + layer.out_features) for _, layer in found) == weights
