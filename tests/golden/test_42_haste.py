"""REPA's and HASTE's losses and gradients against sihyun-yu/REPA and NUS-HPC-AI-Lab/HASTE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import formula
from ditkit.core.cond import Cond
from ditkit.core.convention import Convention
from ditkit.models.dit import DiT, DiTConfig
from ditkit.nn.blocks import Attention
from ditkit.nn.encoders import Encoded, Facts, PictureEncoder, among, attention_map
from ditkit.train.denoising import Denoising, NoisyBatch
from ditkit.train.randomness import SampleRNG
from ditkit.train.taps import Tap
from ditkit.train.teacher import Held
from ditkit.train.terms.attention_alignment import AttentionAlignment, cross_entropy
from ditkit.train.terms.feature_alignment import FeatureAlignment, projector, unlike
from ditkit.train.terms.regression import Regression
from golden_support import adaln_shapes, assert_golden, float64, read, with_time

SYSTEM = "42-haste"
FLOW = Convention()


class Given(PictureEncoder):
    """An encoder whose answer is given, and which counts how often it is asked."""

    facts = Facts(24, 1, 12, 12)

    def __init__(self, encoded: Encoded) -> None:
        super().__init__()
        self.encoded, self.calls = encoded, 0

    def forward(self, pictures: Tensor, grid: tuple[int, int], maps: int = 0) -> Encoded:
        self.calls += 1
        return self.encoded


@pytest.mark.parametrize(("path", "teachers", "key"), [("linear", 2, "repa1"), ("cosine", 1, "repa2")])
def test_repa_of_given_features(path: str, teachers: int, key: str) -> None:
    case = read(SYSTEM)[f"REPA loss, all inputs given, {path} path, {teachers} teacher(s)"]
    results, convention = case["results"], Convention(path)  # type: ignore[arg-type]
    data, noise, out = (
        formula.tensor(f"{key}.{n}", (2, 4, 4, 4)) for n in ("images", "noise", "model_output")
    )
    t = torch.tensor(case["draws"]["time (the one torch.rand)"], dtype=torch.float64)
    batch = NoisyBatch(
        path=convention.make_path(), convention=convention, data=data, noise=noise, t=t, prediction=out,
        x=convention.make_path().mix(data, noise, t), fraction=None, taps={},
    )  # fmt: skip
    assert_golden(batch.x, results["model_input"])
    assert_golden(Regression().loss(batch), results["denoising_loss_per_sample"])
    widths = (24, 10)[:teachers]
    pairs = [
        [formula.tensor(f"{key}.{n}.{i}", (2, 6, width)) for n in ("z_tilde", "z")]
        for i, width in enumerate(widths)
    ]
    each = torch.stack([unlike(*pair) for pair in pairs])
    assert each.mean().item() == pytest.approx(results["projection_loss"], rel=1e-9)
    own, taught = pairs[0]
    dots = (own * taught).sum(-1) / (own.norm(dim=-1) * taught.norm(dim=-1))
    torch.testing.assert_close(each[0], -dots.mean(1))


def test_haste_of_given_scores() -> None:
    case = read(SYSTEM)["HASTE loss, all inputs given"]
    results = case["results"]["before the stop"]
    losses = []
    for own, other in zip(range(4, 8), range(8, 12), strict=True):
        student = formula.tensor(f"haste1.student_logits.{own}", (1, 16, 256, 256))
        teacher = formula.tensor(f"haste1.teacher_logits.{other}", (1, 12, 256, 256))
        losses.append(cross_entropy(student[:, :12], teacher.softmax(-1)))
    assert torch.stack(losses).mean().item() == pytest.approx(results["attention_loss"], rel=1e-9)
    features = (formula.tensor(f"haste1.{n}", (1, 256, 20)) for n in ("z_tilde", "z"))
    assert unlike(*features).item() == pytest.approx(results["projection_loss"], rel=1e-9)


def test_a_teachers_attention_without_its_class_token() -> None:
    case = read(SYSTEM)["teacher attention returning logits"]
    with float64():
        attention = Attention(24, 3)
    names = {"qkv": "qkv", "out": "proj"}
    for name, value in attention.state_dict().items():
        layer, _, kind = name.partition(".")
        value.copy_(formula.weight(f"{names[layer]}.{kind}", value.shape))
    tap = Tap(["attn.core:q", "attn.core:k"])
    with torch.no_grad():
        out = attention(formula.tensor("dino.x", (2, 7, 24)), tap, "attn")
    assert_golden(out, case["results"]["output"])
    q, k = tap.recorded.values()
    whole = q @ k.mT * 8**-0.5
    assert_golden(whole[..., 1:, 1:], case["results"]["logits"])
    kept = among(whole.softmax(-1), 1)
    torch.testing.assert_close(kept, whole[..., 1:, 1:].softmax(-1).float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(attention_map(q[:, :, 1:], k[:, :, 1:]), kept, rtol=1e-5, atol=1e-7)


def student(case: Mapping[str, Any], outs: int = 4) -> DiT:
    """Build the published SiT; under qk_norm theirs is a layer norm, which is put in the place of ours."""
    c = case["constructor"]
    shapes = adaln_shapes(c, outs)
    config = DiTConfig(
        size=c["input_size"], patch=2, channels=4, width=c["hidden_size"], depth=c["depth"], heads=c["num_heads"],
        classes=10, convention=FLOW,
    )  # fmt: skip
    with float64():
        model = DiT.from_original({"pos_embed": torch.zeros(1), **formula.weights(shapes)}, config)
        if c["qk_norm"]:
            blocks: Any = model.blocks
            for i, block in enumerate(blocks):
                for part in "qk":
                    norm = nn.LayerNorm(c["hidden_size"] // c["num_heads"])
                    for kind in ("weight", "bias"):
                        value = getattr(norm, kind)
                        value.data.copy_(formula.weight(f"blocks.{i}.attn.{part}_norm.{kind}", value.shape))
                    setattr(block.attn, f"norm_{part}", norm)
    return model


def head(place: int, width: int, hidden: int, out: int) -> nn.Sequential:
    with float64():
        module = projector(width, out, hidden)
    for name, value in module.state_dict().items():
        value.copy_(formula.weight(f"projectors.{place}.{name}", value.shape))
    return module


def losses(
    case: Mapping[str, Any], model: DiT, key: str, terms: Sequence[Any], held: Held
) -> dict[str, Tensor]:
    side, labels = case["constructor"]["input_size"], torch.tensor(case["labels"])
    return Denoising((Regression(), *terms)).at(
        model,
        model,
        path=FLOW.make_path(),
        data=formula.tensor(f"{key}.images", (2, 4, side, side)),
        noise=formula.tensor(f"{key}.noise", (2, 4, side, side)),
        t=torch.tensor(case["draws"]["time"], dtype=torch.float64),
        cond=Cond(label=labels.clamp(max=9), drop=labels == 10),
        rng=SampleRNG(0, 0, range(2)),
        held=held,
    )


def assert_gradients(weights: Mapping[str, Tensor], expected: Mapping[str, Any], tolerance: float) -> None:
    for name, value in expected.items():
        gradient = weights[name].grad
        assert gradient is not None, name
        assert gradient.norm().item() == pytest.approx(value["norm"], rel=tolerance)
        slack = tolerance * gradient.abs().sum().item()
        assert gradient.sum().item() == pytest.approx(value["sum"], abs=slack)


def renamed(model: DiT) -> dict[str, Tensor]:
    """Return the parameters under their published names."""
    parts = {
        "mlp.inner": "mlp.fc1",
        "modulation": "adaLN_modulation.1",
        "norm_q": "q_norm",
        "head.out": "final_layer.linear",
        "label.weight": "y_embedder.embedding_table.weight",
    }
    found = {}
    for name, value in model.named_parameters():
        for ours, theirs in parts.items():
            name = name.replace(ours, theirs)  # noqa: PLW2901
        found[name] = value
    return found


def test_haste_on_a_tiny_sit() -> None:
    case = read(SYSTEM)["tiny SiT with all three losses and gradients"]
    results, model = case["results"], student(case).eval()
    maps = tuple(
        formula.tensor(f"sit.teacher_logits.{i}", (2, 12, 256, 256)).softmax(-1) for i in range(8, 12)
    )
    encoder = Given(Encoded(formula.tensor("sit.z", (2, 256, 24)), maps))
    own = head(0, 32, 32, 24)
    terms = (FeatureAlignment(0.5, 8), AttentionAlignment(0.5, 8, 4))
    names = [type(term).__name__ for term in terms]
    held = Held(0, {names[0]: own}, dict.fromkeys(names, encoder))
    found = losses(case, model, "sit", terms, held)
    tolerance = with_time(1e-6)
    assert encoder.calls == 1  # for both terms
    pairs = {names[0]: "projection_loss", names[1]: "attention_loss", "loss": "total"}
    scale = abs(results["denoising_loss_per_sample"]["sum"])
    for name, key in pairs.items():
        assert found[name].item() == pytest.approx(results[key], rel=tolerance, abs=tolerance * scale * 1e-3)
    found["loss"].backward(retain_graph=True)
    weights = {**renamed(model), **{f"projectors.0.{k}": v for k, v in own.named_parameters()}}
    assert_gradients(weights, results["gradients_of_total"], tolerance)
    model.zero_grad()
    found["AttentionAlignment"].backward()
    expected = results["gradients_of_attention_loss"]
    blocks: Any = model.blocks
    gradient = blocks[7].attn.qkv.weight.grad.view(3, 16, 2, 32)  # q, k, v of 16 heads of width 2
    norms = gradient.flatten(1).norm(dim=1).tolist()
    assert norms == pytest.approx(expected["blocks.7.attn.qkv.weight, norm of gradient by q,k,v"], rel=1e-5)
    assert not gradient[2].any() and not gradient[:, 12:].any()
    rest = (blocks[7].attn.out.weight, blocks[7].mlp.inner.weight, blocks[8].attn.qkv.weight)
    assert all(weight.grad is None for weight in rest)
    shift, scale_, gate, *_ = blocks[7].modulation.weight.grad.chunk(6)
    assert shift.any() and scale_.any() and not gate.any()


def test_repa_on_a_tiny_sit_with_normed_queries_and_two_teachers() -> None:
    case = read(SYSTEM)["tiny REPA SiT with loss and gradients, two teachers, qk_norm"]
    results, model = case["results"], student(case).eval()
    widths = (10, 6)
    owns = [head(i, 24, 32, width) for i, width in enumerate(widths)]
    term = FeatureAlignment(0.5, 2)
    total, weights, mean = 0.0, renamed(model), []
    for i, (own, width) in enumerate(zip(owns, widths, strict=True)):
        encoder = Given(Encoded(formula.tensor(f"repasit.z.{i}", (2, 16, width))))
        held = Held(0, {"FeatureAlignment": own}, {"FeatureAlignment": encoder})
        found = losses(case, model, "repasit", (replace(term, weight=0.25),), held)
        mean.append(found["FeatureAlignment"].item())
        plain = found["Regression"] if i == 0 else 0.0
        total = total + plain + 0.25 * found["FeatureAlignment"]
        weights |= {f"projectors.{i}.{k}": v for k, v in own.named_parameters()}
    assert isinstance(total, Tensor)
    total.backward()
    tolerance = with_time(1e-6)
    assert sum(mean) / 2 == pytest.approx(results["projection_loss"], rel=1e-5)
    assert_gradients(weights, results["gradients_of_total"], tolerance)


def test_parameters_of_the_projector() -> None:
    for name, width in (("B", 768), ("L", 1024), ("XL", 1152)):
        with torch.device("meta"):
            count = sum(p.numel() for p in projector(width, 768).parameters())
        assert count == read(SYSTEM)["projector parameters"]["results"][name]
