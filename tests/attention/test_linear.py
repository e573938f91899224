"""LiT: linear attention against the quadratic form, convolution on the grid, inheritance, distillation, refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ditkit
from ditkit.attention import Band, ReluLinear
from ditkit.attention.linear import HEADS, WITHOUT_ATTENTION, attend
from ditkit.bench.macs import count_macs
from ditkit.caching import RAS, TaylorSeer
from ditkit.core.cond import Cond
from ditkit.core.convention import DDPM
from ditkit.core.errors import ConfigError, ConflictError, NoEffectError, ShapeError
from ditkit.core.grid import Grid
from ditkit.core.inherit import Inherit, inherit
from ditkit.core.model import Model, parameter_count
from ditkit.core.run import Call
from ditkit.core.trajectory import Trajectory
from ditkit.hosts.hosted import Host
from ditkit.models.dit import DiT, DiTConfig
from ditkit.models.video_dit import VideoDiT, VideoDiTConfig
from ditkit.nn.linear_attention import ValueConv, linear_attention, regrouped
from ditkit.recipes.lit import lit
from ditkit.tasks.recipe import started
from ditkit.train.denoising import Denoising
from ditkit.train.loop import train
from ditkit.train.settings import Settings
from ditkit.train.teacher import Held
from ditkit.train.terms.distillation import PredictionDistillation
from ditkit.train.terms.regression import Regression
from ditkit.train.terms.variance_distillation import VarianceDistillation
from ditkit.train.terms.variational_bound import VariationalBound
from hosts_support import FAMILIES, call, layout_of
from models_support import perturbed
from rig import tiny_dit

PARAMETERS = {"S/2": 32_984_864, "B/2": 130_555_424, "L/2": 458_479_648, "XL/2": 675_673_376}
LEARNED = DiTConfig(size=8, patch=2, channels=3, width=24, depth=2, heads=3, classes=4, convention=DDPM)
HYBRID = Denoising((Regression(), VariationalBound(), PredictionDistillation(), VarianceDistillation()))
PLAIN = Denoising((Regression(), VariationalBound()))


def quadratic(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The slow twin: all pairs of features, their rows divided by their sums."""
    weights = q @ k.mT
    return weights / weights.sum(-1, keepdim=True).clamp_min(1e-6) @ v


def features(heads: int = 2, rows: int = 30, width: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, heads, rows, width, dtype=torch.float64)
    return q.relu(), k.relu(), v


def donor() -> DiT:
    torch.manual_seed(3)
    return perturbed(DiT(LEARNED), 0.1)


def student(policy: ReluLinear | None = None, source: DiT | None = None) -> DiT:
    """A student that has the donor's weights but attention's, and a convolution that is not zero."""
    torch.manual_seed(4)
    model = DiT(LEARNED)
    inherit(model, source or donor(), WITHOUT_ATTENTION)
    model.adopt([policy or ReluLinear()])
    for parameter in model.learned.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


class Noisy:
    """A training set of eight pictures."""

    def __len__(self) -> int:
        return 8

    def batch(self, indices: Tensor, rng: Any = None) -> tuple[Tensor, Cond]:
        pictures = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)).tanh()
        return pictures[indices], Cond(label=indices % 4)


def losses(model: DiT, teacher: Model | None, objective: Denoising = HYBRID) -> dict[str, Tensor]:
    data, noise = torch.randn(2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(5)).tanh()
    names = [type(term).__name__ for term in objective.terms if term.teacher is not None]
    return objective.at(
        model,
        model,
        path=DDPM.make_path(),
        data=data,
        noise=noise,
        t=torch.tensor([20, 700]),
        cond=Cond(label=torch.tensor([0, 1]), drop=torch.tensor([True, False])),
        held=Held(teachers=dict.fromkeys(names, teacher)),
    )


@pytest.mark.parametrize("heads", [1, 2, 5])
def test_the_linear_form_equals_the_quadratic_one(heads: int) -> None:
    q, k, v = features(heads)
    assert torch.allclose(linear_attention(q, k, v), quadratic(q, k, v), rtol=0, atol=1e-12)


def test_rows_sum_to_one_and_their_scale_does_not_matter() -> None:
    q, k, v = features()
    constant = torch.full_like(v, 3.5)
    seen = q.any(-1)
    assert seen.any() and torch.allclose(linear_attention(q, k, constant)[seen], constant[seen], atol=1e-12)
    exact = linear_attention(q, k, v)
    assert torch.allclose(linear_attention(q * 7, k, v), exact, atol=1e-12)
    assert torch.allclose(linear_attention(q, k * 0.2, v), exact, atol=1e-12)


def test_rows_without_features_give_the_convolution_alone_and_finite_gradients() -> None:
    grid, conv = Grid(1, 3, 4), perturbed(ValueConv(8, 2).double(), 0.3)
    q, k, v = torch.randn(3, 1, 4, 12, 2, dtype=torch.float64)
    q[:, :, 5] = -1
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attend(ReluLinear(), conv, grid, None, *inputs)  # type: ignore[arg-type]
    expected = regrouped(conv(regrouped(v, 2), grid), 4)
    assert torch.allclose(out[:, :, 5], expected[:, :, 5], atol=1e-12)
    assert not torch.allclose(out[:, :, 4], expected[:, :, 4])
    out.square().sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in inputs)
    blind = attend(ReluLinear(), None, grid, None, -q.abs(), k, v)  # type: ignore[arg-type]
    assert not blind.any()


def test_rows_may_be_permuted_without_the_convolution_and_only_with_the_grid_beside_it() -> None:
    grid, conv = Grid(1, 4, 4), perturbed(ValueConv(8, 2).double(), 0.3)
    q, k, v = torch.randn(3, 2, 2, 16, 4, dtype=torch.float64)

    def run(conv: Any, order: Tensor) -> Tensor:
        return attend(ReluLinear(), conv, grid, None, *(x[:, :, order] for x in (q, k, v)))  # type: ignore[arg-type]

    places, order = torch.arange(16), torch.randperm(16, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(run(None, order), run(None, places)[:, :, order], atol=1e-12)
    assert not torch.allclose(run(conv, order), run(conv, places)[:, :, order])
    mirrored = places.view(4, 4).flip(1).flatten()
    with torch.no_grad():
        conv.conv.weight.copy_((conv.conv.weight + conv.conv.weight.flip(3)) / 2)
    assert torch.allclose(run(conv, mirrored), run(conv, places)[:, :, mirrored], atol=1e-12)


@pytest.mark.parametrize("shared", [False, True])
def test_the_convolution_pixel_by_pixel_on_a_grid_that_is_no_square(shared: bool) -> None:
    grid, conv = Grid(1, 3, 5), perturbed(ValueConv(8, 2, shared=shared).double(), 0.3)
    v = torch.randn(2, 2, 15, 4, dtype=torch.float64)
    weight, bias = conv.conv.weight[:, 0], conv.conv.bias
    expected = torch.zeros_like(v)
    for head in range(2):
        for channel in range(4):
            own = channel if shared else 4 * head + channel
            cells = F.pad(v[:, head, :, channel].view(2, 3, 5), (2, 2, 2, 2))
            for place in range(15):
                row, column = divmod(place, 5)
                near = cells[:, row : row + 5, column : column + 5]
                expected[:, head, place, channel] = (near * weight[own]).sum((1, 2)) + bias[own]
    assert torch.allclose(conv(v, grid), expected, atol=1e-12)
    assert parameter_count(conv) == 26 * (4 if shared else 8)


def test_a_kernel_of_one_adds_the_values_and_a_fresh_one_nothing() -> None:
    grid, conv = Grid(1, 4, 4), ValueConv(8, 2)
    q, k, v = torch.randn(3, 1, 2, 16, 4)
    alone = attend(ReluLinear(), None, grid, None, q, k, v)  # type: ignore[arg-type]
    assert torch.equal(attend(ReluLinear(), conv, grid, None, q, k, v), alone)  # type: ignore[arg-type]
    with torch.no_grad():
        conv.conv.weight[:, :, 2, 2] = 1
    both = attend(ReluLinear(), conv, grid, None, q, k, v)  # type: ignore[arg-type]
    assert torch.allclose(both, alone + v, atol=1e-6)


def test_sums_over_many_rows_are_float32_in_sixteen_bits() -> None:
    torch.manual_seed(0)
    q, k = torch.rand(2, 1, 1, 8192, 4) * 40
    v = torch.randn(1, 1, 8192, 4) + 1
    exact = linear_attention(q.double(), k.double(), v.double())
    for dtype in (torch.bfloat16, torch.float16):
        given = [x.to(dtype) for x in (q, k, v)]
        out = linear_attention(*given)
        of_given = linear_attention(*(x.double() for x in given))
        assert out.dtype == dtype and (out - of_given).abs().max() < 4 * torch.finfo(dtype).eps
    assert exact.isfinite().all()


def test_heads_regroup_channels_that_lie_side_by_side() -> None:
    x = torch.arange(12.0).view(1, 1, 12).unflatten(2, (3, 4)).transpose(1, 2)  # [1, 3, 1, 4]
    assert regrouped(x, 2)[0, :, 0].tolist() == [list(range(6)), list(range(6, 12))]
    assert torch.equal(regrouped(regrouped(x, 2), 3), x)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_of_the_papers_sizes(name: str) -> None:
    policy = ReluLinear.preset(name)
    with torch.device("meta"):
        model = DiT.preset(name).adopt([policy])
        shared = DiT.preset(name).adopt([replace(policy, shared=True)])
    width, depth, heads = model.config.width, model.config.depth, HEADS[name.removesuffix("/2")]
    assert parameter_count(model) == PARAMETERS[name] and policy.heads == heads
    assert parameter_count(model) - parameter_count(shared) == 26 * depth * (width - width // heads)


def test_the_state_costs_two_products_and_doubles_when_heads_halve() -> None:
    with torch.device("meta"), torch.no_grad():
        costs = {}
        for heads in (1, 2, 4):
            q, k, v = (torch.empty(1, 8, 64, 4) for _ in range(3))
            policy = ReluLinear(heads=heads)
            costs[heads] = count_macs(attend, policy, None, Grid(1, 8, 8), None, q, k, v).total
            assert costs[heads] == 2 * 64 * 32 * 32 // heads
    conv = ValueConv(32, 2)
    assert count_macs(conv, torch.empty(1, 2, 64, 16), Grid(1, 8, 8)).total == 25 * 64 * 32
    assert costs[1] == 2 * costs[2] == 4 * costs[4]


def test_what_is_inherited_is_all_but_attention_to_the_bit() -> None:
    model, source = DiT(LEARNED), donor()
    before = {name: v.clone() for name, v in model.state_dict().items()}
    report = inherit(model, source, WITHOUT_ATTENTION)
    own, other = model.state_dict(), source.state_dict()
    skipped = {
        f"blocks.{i}.attn.{layer}.{part}"
        for i in (0, 1)
        for layer in ("qkv", "out")
        for part in ("weight", "bias")
    }
    assert report == {"taken": len(own) - 8, "fresh": 8, "left": 8}
    for name, value in own.items():
        assert torch.equal(value, before[name] if name in skipped else other[name])
        assert name not in skipped or name.endswith("bias") or not torch.equal(value, other[name])
    everything = Inherit()
    assert inherit(DiT(LEARNED), source, everything)["fresh"] == 0  # the option that also takes attention


def test_the_recipe_starts_so_and_its_teacher_is_the_donor(monkeypatch: pytest.MonkeyPatch) -> None:
    start = started(lit()).model
    source = ditkit.load("fashion-dit")
    assert start is not None and start.policies == (ReluLinear(),)
    own, other = start.state_dict(), source.state_dict()
    shared = [name for name in other if torch.equal(own[name], other[name])]
    attention = [name for name in other if ".attn." in name]
    assert sorted(shared) == sorted(set(other) - set(attention)) and len(attention) == 12 * 4
    learned = [name for name in own if name.startswith("learned.ReluLinear.")]
    assert set(own) - set(other) == set(learned) and len(learned) == 12 * 2
    assert parameter_count(start) - parameter_count(source) == 12 * 26 * 128


def test_training_goes_on_from_the_donor_under_the_policy(tmp_path: Path) -> None:
    """Weights 0 of both distillations give the plain training, to the bit; with them it differs."""
    settings = Settings(steps=2, batch=4, learning_rate=1e-3, warmup=0, save_every=0, sheet_every=0)

    def trained(objective: Denoising, name: str) -> dict[str, Tensor]:
        out = train(student(), Noisy(), objective, settings, tmp_path / name, start=donor)
        return {key: value.clone() for key, value in out.state_dict().items()}

    silent = Denoising(
        (Regression(), VariationalBound(), PredictionDistillation(0.0), VarianceDistillation(0.0))
    )
    plain, off, hybrid = (trained(o, n) for o, n in ((PLAIN, "plain"), (silent, "off"), (HYBRID, "hybrid")))
    assert all(torch.equal(plain[name], off[name]) for name in plain)
    assert not torch.equal(plain["head.out.weight"], hybrid["head.out.weight"])


def test_both_halves_of_the_distillation_are_their_formulas() -> None:
    model, source = student(), donor()
    cond = Cond(label=torch.tensor([0, 1]), drop=torch.tensor([True, False]))
    found = {name: loss.item() for name, loss in losses(model, source).items()}
    data, noise = torch.randn(2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(5)).tanh()
    t = torch.tensor([20, 700])
    x = DDPM.make_path().mix(data, noise, t.float())
    with torch.no_grad():
        taught = source(x, t.float(), cond)
        trajectory = Trajectory(model.sites(), model.policies, 1, learned=model.learned)
        at = Call(0, 1, 0.5, layout=model.layout((3, 8, 8)))
        out = model(x, t.float(), cond, run=trajectory.run(at))
    error, unlike = (out - taught).square().chunk(2, 1)
    assert found["PredictionDistillation"] == pytest.approx(error.mean().item(), rel=1e-5)
    assert found["VarianceDistillation"] == pytest.approx(unlike.mean().item(), rel=1e-5)
    same = losses(donor(), source)
    assert same["PredictionDistillation"] == 0 and same["VarianceDistillation"] == 0
    logs = losses(model, source, Denoising((Regression(), VarianceDistillation(of="log"))))
    assert logs["VarianceDistillation"] > 0 and logs["VarianceDistillation"] != found["VarianceDistillation"]


def test_gradients_reach_every_parameter() -> None:
    model = student().train()
    sum(losses(model, donor()).values()).backward()  # type: ignore[union-attr]
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_a_model_trained_so_is_sampled_so_unless_it_is_named(tmp_path: Path) -> None:
    model: Model = ditkit.load(student().save(tmp_path))
    assert model.policies == (ReluLinear(),)

    def drawn(*policies: Any) -> Tensor:
        found: Tensor = ditkit.generate(model, [0, 1], seeds=(0, 1), steps=6, policies=policies).samples
        return found

    own, plain = drawn(), drawn(ReluLinear(phi="softmax"))
    assert torch.equal(own, drawn(ReluLinear())) and not torch.equal(own, plain)
    cached = drawn(TaylorSeer(interval=2, order=1))
    assert cached.isfinite().all() and not torch.equal(cached, own)
    untrained = DiT(LEARNED)
    untrained.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("learned.")})
    assert torch.equal(ditkit.generate(untrained.eval(), [0, 1], seeds=(0, 1), steps=6).samples, plain)


def test_an_order_of_tokens_or_another_attention_is_refused_before_the_first_step() -> None:
    model = student()
    for other in (Band(keep=0.5, block=8, kernel="cpu"), RAS(warmup=1)):
        with pytest.raises(ConflictError, match=rf"ReluLinear and {type(other).__name__} both own 'rows'"):
            ditkit.generate(model, [0], seeds=(0,), steps=4, policies=(other,))


def test_what_does_not_fit_is_refused() -> None:
    sites = tiny_dit().sites()
    with pytest.raises(
        ConfigError, match=r"'blocks\.0\.attn\.core' of width 32 does not divide into heads=3"
    ):
        Trajectory(sites, [ReluLinear(heads=3)], 1)
    with pytest.raises(ConfigError, match="kernel=4 should be odd"):
        ReluLinear(kernel=4)
    with pytest.raises(ConfigError, match="phi"):
        ReluLinear(phi="elu")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="unknown LiT preset 'H/2'"):
        ReluLinear.preset("H/2")
    clip = VideoDiT(VideoDiTConfig.tiny())
    with pytest.raises(ConfigError, match="expected the rows of one picture"):
        session = ReluLinear().start(clip.sites(), 1)
        session.enter(Call(0, 1, 0.5, layout=clip.layout(clip.sample_shape)))
    q = torch.randn(1, 2, 16, 4)
    with pytest.raises(ShapeError, match="attention with a mask"):
        attend(ReluLinear(), None, Grid(1, 4, 4), None, q, q, q, torch.ones(1, 1, 1, 16))  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="20 queries and 20 keys on a grid of 16 tokens"):
        attend(ReluLinear(), None, Grid(1, 4, 4), None, *torch.randn(3, 1, 2, 20, 4))  # type: ignore[arg-type]
    with pytest.raises(NoEffectError, match="ReluLinear: this model has no site"):
        joint = [site._replace(stream="joint") for site in sites]
        Trajectory(joint, [ReluLinear()], 1)
    with pytest.raises(ConfigError, match="a learned variance"):
        Denoising((Regression(), VarianceDistillation())).check(tiny_dit())


def test_pixart_keeps_attention_to_text_and_all_weights_but_those_of_self_attention() -> None:
    family = FAMILIES["pixart"]
    plain, inputs = family.transformer(), family.inputs()
    model = Host.around(family.transformer())
    with torch.no_grad():
        for p in model.transformer.parameters():
            p.add_(1)
    rule = Inherit(skip=("transformer.transformer_blocks.*.attn1.*",))
    inherit(model, Host.around(plain), rule)
    own, other = model.state_dict(), Host.around(plain).state_dict()
    fresh = {name for name in own if not torch.equal(own[name], other[name])}
    assert fresh == {name for name in own if ".attn1." in name} and len(fresh) == 8 * len(
        plain.transformer_blocks
    )
    model.adopt([ReluLinear()])
    cores = [site.name for site in model.sites() if site.kind == "core"]
    assert [key.replace("/", ".") for key in model.learned["ReluLinear"]] == cores
    layout = layout_of(model.transformer, inputs)
    trajectory = Trajectory(model.sites(), model.policies, 1, learned=model.learned)
    run = trajectory.run(Call(0, 1, 0.5, layout=layout))
    out, dense = call(model.transformer, inputs, run), call(model.transformer, inputs)
    assert out.shape == dense.shape and not torch.allclose(out, dense)
    text = {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"] + 1}
    assert not torch.allclose(call(model.transformer, text, run), out)
