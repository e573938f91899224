"""DiMR's own promises: its stages, what they hand on, its norms and its loss; numbers of the code are in golden/."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ditkit.attention.pattern import Pattern
from ditkit.bench.macs import count_macs
from ditkit.caching import TaylorSeer
from ditkit.core.catalog import every
from ditkit.core.cond import Cond
from ditkit.core.convention import SIT, Convention
from ditkit.core.errors import ConfigError, DitkitError, NoEffectError, ShapeError
from ditkit.core.grid import Grid
from ditkit.core.model import parameter_count
from ditkit.core.policy import Policy
from ditkit.core.run import Run
from ditkit.models.dimr import DiMR, DiMRConfig
from ditkit.nn.stages import LongSkips
from ditkit.nn.time_norms import TimeDependentLayerNorm, TimeDependentParameter, TimeDependentRMSNorm
from ditkit.sample import ClassifierFree, DpmSolverPP, PowerCosine, sample
from ditkit.train.denoising import Denoising
from ditkit.train.optimizers import optimizers_of
from ditkit.train.randomness import SampleRNG
from ditkit.train.settings import Settings
from ditkit.train.terms.multi_scale import MultiScale, at_resolution
from ditkit.train.terms.regression import Regression
from models_support import perturbed

LABELS = Cond(label=torch.tensor([1, 4]))


def awake(**changes: Any) -> DiMR:
    torch.manual_seed(1)
    return perturbed(DiMR(replace(DiMRConfig.tiny(), **changes)).double(), 0.2)


def noisy(batch: int = 2, side: int = 8) -> Tensor:
    return torch.randn(batch, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def macs(config: DiMRConfig) -> int:
    told = Cond(label=torch.zeros(1, dtype=torch.long, device="meta"))
    with torch.device("meta"), torch.no_grad():
        found = count_macs(DiMR(config).eval(), torch.empty(1, 4, 32, 32), torch.empty(1), told)
    assert not found.uncounted
    return found.total


def test_macs_of_the_published_sizes() -> None:
    """Of XL counted; of both also from small depths, as each pair of blocks of a stage adds the same."""
    for name, gmac in (("XL/2R", 160.18), ("G/2R", 331.10)):
        with torch.device("meta"):
            config = DiMR.preset(name).config
        one, lower, upper = (macs(replace(config, depth=depth)) for depth in ((1, 1), (3, 1), (1, 3)))
        pairs = [(blocks - 1) // 2 for blocks in config.blocks]
        found = one + pairs[0] * (lower - one) + pairs[1] * (upper - one)
        assert found / 1e9 == pytest.approx(gmac, rel=1e-4)
        if name == "XL/2R":
            assert macs(config) == found


def test_the_inferred_third_stage_has_the_papers_count() -> None:
    with torch.device("meta"):
        assert parameter_count(DiMR.preset("XL/3R")) == pytest.approx(525e6, rel=1e-3)
    with pytest.raises(ConfigError, match="unknown DiMR preset 'XL/2'"):
        DiMR.preset("XL/2")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": (16, 8, 4)}, "one number a stage"),
        ({"patch": (2, 2)}, r"patch=\(2, 2\) should fall"),
        ({"patch": (3, 2)}, r"patch=\(3, 2\) should fall"),
        ({"size": 9}, "size=9 does not divide into patches of 2"),
        ({"heads": 3}, r"width=\(16, 8\) does not divide into heads=3"),
        ({"kernel": 4}, "kernel=4 should be odd"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DitkitError, match=message):
        replace(DiMRConfig.tiny(), **changes)


# --- norms that depend on time -----------------------------------------------------------------------------


def spread_parameter(width: int = 5) -> TimeDependentParameter:
    return perturbed(TimeDependentParameter(width, 1.0).double(), 0.5)  # type: ignore[type-var]


def test_a_parameter_runs_from_one_end_to_the_other() -> None:
    parameter = spread_parameter()
    assert torch.equal(parameter(torch.tensor([torch.inf]).double()), parameter.high)
    assert torch.equal(parameter(torch.tensor([-torch.inf]).double()), parameter.low)
    with torch.no_grad():
        parameter.weight.fill_(-1)
        parameter.bias.zero_()
    middle = (parameter.high + parameter.low) / 2
    assert torch.allclose(parameter(torch.tensor([[0.3], [-0.9]]).double()), middle.expand(2, 5), atol=1e-15)


def test_a_fresh_parameter_is_the_same_at_all_times() -> None:
    for value in (0.0, 1.0):
        parameter = TimeDependentParameter(5, value)
        assert torch.equal(parameter(torch.linspace(-1, 1, 9)[:, None]), torch.full((9, 5), value))


def test_gradients_of_a_parameter_by_hand() -> None:
    tau = torch.tensor([[0.7]], dtype=torch.float64)
    fresh = TimeDependentParameter(5, 1.0).double()
    for parameter in (spread_parameter(), fresh):
        parameter(tau).sum().backward()
        s = torch.sigmoid((1 + parameter.weight) * 0.7 + parameter.bias)
        slope = s * (1 - s) * (parameter.high - parameter.low)
        for own, expected in (("high", s), ("low", 1 - s), ("weight", 0.7 * slope), ("bias", slope)):
            assert torch.allclose(getattr(parameter, own).grad, expected, atol=1e-14)
    assert not fresh.weight.grad.any() and not fresh.bias.grad.any()


def test_a_norm_whose_ends_agree_is_the_plain_norm() -> None:
    norm, x = perturbed(TimeDependentRMSNorm(6).double(), 0.5), torch.randn(2, 4, 6).double()
    with torch.no_grad():
        norm.scale.low.copy_(norm.scale.high)
    rms = x.norm(dim=-1, keepdim=True) * 6**-0.5
    assert torch.equal(
        norm(x, torch.tensor([0.3, -0.8]).double()[:, None, None]), norm.scale.high * (x / (rms + 1e-8))
    )
    layer = TimeDependentLayerNorm(6).double()
    assert torch.allclose(
        layer(x, torch.zeros(2, 1, 1).double()), F.layer_norm(x, (6,), eps=1e-5), atol=1e-15
    )


@pytest.mark.parametrize("kind", [TimeDependentRMSNorm, TimeDependentLayerNorm])
def test_times_of_a_batch_are_each_sample_s_own(kind: Any) -> None:
    norm, x = perturbed(kind(6).double(), 0.5), torch.randn(3, 4, 6).double()
    tau = torch.tensor([-1.0, 0.1, 1.0], dtype=torch.float64)[:, None, None]
    together = norm(x, tau)
    assert torch.equal(together, torch.cat([norm(x[i : i + 1], tau[i : i + 1]) for i in range(3)]))
    assert torch.equal(norm(x.bfloat16(), tau), norm(x.bfloat16().float(), tau).bfloat16())


def test_tau_is_the_published_one_and_belongs_to_the_call() -> None:
    model = awake()
    steps = torch.tensor([1, 500, 1000])
    published = (8 * steps / 1000 - 4) / 4
    assert torch.allclose(model.place(steps.double() - 1).flatten(), published.double(), atol=1e-7)
    for convention, t in ((Convention(), 0.25), (SIT, 0.75)):
        assert awake(convention=convention).place(torch.tensor([t]).double()).item() == pytest.approx(-0.5)
    first, second = (torch.full((2,), t, dtype=torch.float64) for t in (3.0, 900.0))
    out = model(noisy(), first, LABELS)
    between: list[Tensor] = []

    def interrupt(fn: Any, *args: Any) -> Any:
        between.append(model(noisy(), second, LABELS))  # another call in the middle of this one
        return fn(*args)

    assert torch.equal(model(noisy(), first, LABELS, Run({"stages.0.1": interrupt})), out)
    assert torch.equal(between[0], model(noisy(), second, LABELS)) and not torch.equal(between[0], out)


def test_the_clock_may_be_the_log_of_signal_to_noise() -> None:
    model = awake(clock="log-snr")
    tau = model.place(torch.tensor([0.0, 999.0]).double()).flatten()
    assert (4 * tau).tolist() == pytest.approx([7.07, -5.36], abs=0.005)


def test_weight_decay_leaves_out_what_bends_the_clock() -> None:
    (adamw,) = optimizers_of(awake(), Settings(weight_decay=0.03))
    decayed, spared = adamw.param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.03, 0.0)
    model = awake()
    (adamw,) = optimizers_of(model, Settings(weight_decay=0.03))
    names = {id(p): name for name, p in model.named_parameters()}
    kept = {names[id(p)] for p in adamw.param_groups[1]["params"]}
    assert kept == {
        n for n in names.values() if n.endswith(("scale.weight", "scale.bias", "shift.weight", "shift.bias"))
    }


# --- stages ------------------------------------------------------------------------------------------------


def test_one_stage_is_a_plain_u_vit() -> None:
    model = awake(width=(16,), depth=(5,), patch=(2,))
    (stage,) = model.stages
    x, t, tau = (
        noisy(),
        torch.tensor([10.0, 700.0]).double(),
        model.place(torch.tensor([10.0, 700.0]).double()),
    )

    def attention(block: Any, h: Tensor) -> Tensor:
        qkv = block.attn.qkv(block.norm_attn(h, tau))
        q, k, v = (part.unflatten(2, (2, 8)) for part in qkv.split(16, -1))
        scores = torch.einsum("blnk,bmnk->bnlm", q, k) / 8**0.5
        return block.attn.out(torch.einsum("bnlm,bmnk->blnk", scores.softmax(-1), v).flatten(2))

    def feed(block: Any, h: Tensor) -> Tensor:
        u = block.norm_mlp(h, tau)
        return block.mlp.out(F.gelu(block.mlp.gate(u)) * block.mlp.value(u))

    patches = F.unfold(x, 2, stride=2).mT @ stage.embed.weight.flatten(1).T + stage.embed.bias
    h, pile = torch.cat([stage.label.weight[LABELS.label][:, None], patches + stage.position], 1), []
    for i, block in enumerate(stage.blocks):
        if i > 2:
            h = stage.skips[i - 3](torch.cat([h, pile.pop()], -1))
        h = h + attention(block, h)
        h = h + feed(block, h)
        if i < 2:
            pile.append(h)
    picture = stage.norm(h[:, 1:], tau).mT.unflatten(2, (4, 4))
    patches = F.conv2d(picture, stage.out.weight, stage.out.bias, padding=1).unflatten(1, (2, 2, 3))
    expected = patches.permute(0, 3, 4, 1, 5, 2).flatten(4).flatten(2, 3)
    assert model(x, t, LABELS).shape == x.shape
    assert torch.allclose(model(x, t, LABELS), expected, atol=1e-12)


def test_skips_are_taken_last_in_first_out() -> None:
    skips = LongSkips(1, 7)
    with torch.no_grad():
        for layer in skips:
            layer.weight.copy_(torch.tensor([[0.0, 1.0]]))
            layer.bias.zero_()
    outputs = [torch.tensor([[[float(i)]]]) for i in range(7)]
    taken = [skips.joined(i, torch.tensor([[[-1.0]]]), outputs[:i]).item() for i in range(7)]
    assert taken == [-1, -1, -1, -1, 2, 1, 0]


def test_every_feature_of_a_stage_reaches_the_next() -> None:
    """The embedding and each block's output, without the class token: a handler that changes one changes the output."""
    model = awake(depth=(3, 1))
    t = torch.tensor([10.0, 700.0]).double()
    told: list[Tensor] = []
    model.stages[1].norm_lower.register_forward_pre_hook(lambda module, given: told.append(given[0]))
    outs: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        def handler(fn: Any, *args: Any) -> Any:
            out = fn(*args)
            outs[name] = getattr(out, "x", out)
            return out

        return handler

    names = ["stages.0.tokens", "stages.0.0", "stages.0.1", "stages.0.2"]
    model(noisy(), t, LABELS, Run({name: note(name) for name in names}))
    assert torch.equal(told[0], torch.cat([outs[name][:, 1:] for name in names], -1))
    assert told[0].shape[-1] == model.stages[1].expand.in_features == 4 * 16


def test_the_class_reaches_the_first_stage_alone() -> None:
    model = awake()
    tables = [name for name, p in model.named_parameters() if name.endswith("label.weight")]
    assert tables == ["stages.0.label.weight"]
    assert model.stages[0].position.shape == (16, 16) and model.stages[1].position.shape == (64, 8)


def test_smaller_pictures_take_a_corner_of_the_positions_and_larger_ones_are_refused() -> None:
    model = awake()
    t = torch.tensor([10.0, 700.0]).double()
    assert model(noisy(side=4), t, LABELS).shape == (2, 3, 4, 4)
    stage, x = model.stages[1], noisy(side=4)
    rows = stage.tokenize(x, Grid(1, 4, 4)) - stage.embed(x).flatten(2).mT
    assert torch.allclose(
        rows[0].unflatten(0, (4, 4)), stage.position.unflatten(0, (8, 8))[:4, :4], atol=1e-14
    )
    with pytest.raises(ShapeError, match="8 x 8 tokens, expected at most 4 a side"):
        model(noisy(side=16), t, LABELS)


def test_three_stages() -> None:
    model = awake(width=(16, 8, 4), depth=(3, 2, 1), patch=(4, 2, 1))
    t = torch.tensor([10.0, 700.0]).double()
    assert model(noisy(), t, LABELS).shape == (2, 3, 8, 8)
    grids = [(s.stream, s.stage, s.grid.height) for s in model.layout((3, 8, 8))]
    assert grids == [("context", 0, 1), ("image", 0, 2), ("image", 1, 4), ("image", 2, 8)]


def test_sites_by_name_and_stage() -> None:
    model = awake(depth=(1, 1))
    assert [(s.name, s.kind, s.width, s.heads, s.stage) for s in model.sites()] == [
        ("time", "time", 0, 0, 0),
        ("stages.0.tokens", "tokens", 16, 0, 0),
        ("stages.0.0", "block", 16, 0, 0),
        ("stages.0.0.attn", "branch", 16, 0, 0),
        ("stages.0.0.attn.kv", "kv", 16, 2, 0),
        ("stages.0.0.attn.core", "core", 16, 2, 0),
        ("stages.0.0.mlp", "branch", 16, 0, 0),
        ("stages.0.0.mlp.inner", "inner", 32, 0, 0),
        ("stages.0.head", "head", 16, 0, 0),
        ("stages.1.tokens", "tokens", 8, 0, 1),
        ("stages.1.0", "block", 8, 0, 1),
        ("stages.1.0.conv", "branch", 8, 0, 1),
        ("stages.1.0.mlp", "branch", 8, 0, 1),
        ("stages.1.0.mlp.inner", "inner", 16, 0, 1),
        ("stages.1.head", "head", 8, 0, 1),
    ]
    assert {s.name for s in model.sites() if s.ordered} >= {
        "stages.0.head",
        "stages.1.0.conv",
        "stages.1.head",
    }


# --- the loss of every resolution --------------------------------------------------------------------------


def test_targets_keep_the_variance_of_noise_and_scale_a_constant() -> None:
    noise = torch.randn(1024, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    assert at_resolution(noise, (32, 32)) is noise
    for ratio in (1, 2, 4):
        sides = (32 // ratio,) * 2
        assert at_resolution(noise, sides).var().item() == pytest.approx(1, abs=0.01)
        constant = at_resolution(torch.full((1, 1, 32, 32), 0.25), sides)
        assert torch.equal(constant, torch.full((1, 1, *sides), 0.25 * ratio))
    with pytest.raises(ShapeError, match=r"a prediction of \(5, 5\) pixels for samples of \(32, 32\)"):
        at_resolution(noise, (5, 5))


def losses(model: DiMR, term: Any) -> dict[str, Tensor]:
    rng = SampleRNG(0, 0, range(2))
    return Denoising((term,))(model, model, noisy().float(), LABELS, rng)


def test_the_loss_is_the_weighted_sum_over_stages() -> None:
    model = awake().float()
    model.config = replace(model.config, label_dropout=0.0)
    last = losses(model, MultiScale(scales=(0.0, 1.0)))["loss"]
    assert torch.equal(last, losses(model, Regression())["loss"])
    first = losses(model, MultiScale(scales=(1.0, 0.0)))["loss"]
    both = losses(model, MultiScale())["loss"]
    assert both.item() == pytest.approx((0.25 * first + last).item(), rel=1e-6)


def test_every_stage_learns_and_the_lower_ones_from_the_last_too() -> None:
    model = awake().float().train()
    losses(model, MultiScale())["loss"].backward()
    assert all(
        p.grad is not None and p.grad.any() for name, p in model.named_parameters() if "label" not in name
    )
    model.zero_grad()
    losses(model, MultiScale(scales=(0.0, 1.0)))["loss"].backward()
    assert not model.stages[0].out.weight.grad.any() and model.stages[0].embed.weight.grad.any()


def test_a_loss_for_other_stages_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"each of scales=\(0.25, 1.0\); the model makes 3"):
        Denoising((MultiScale(),)).check(awake(width=(16, 8, 4), depth=(1, 1, 1), patch=(4, 2, 1)))
    score = Convention("vp", "score")
    with pytest.raises(ConfigError, match="the model predicts a score"):
        Denoising((MultiScale(),)).check(awake(convention=score))


# --- sampling and policies ---------------------------------------------------------------------------------


def drawn(model: DiMR, policies: tuple[Policy, ...] = (), **given: Any) -> Tensor:
    options = {"steps": 8, "solver": DpmSolverPP(), "guidance": ClassifierFree(1.4), **given}
    return sample(model, LABELS, range(2), policies=policies, **options).samples


def test_guidance_in_one_batch_equals_two_passes() -> None:
    model = awake().float()
    apart = drawn(model)
    assert torch.allclose(drawn(model, batched=True), apart, atol=1e-4 * apart.abs().max().item())
    assert not torch.equal(drawn(model, guidance=PowerCosine(1.4)), apart)


def test_a_cache_works_on_every_branch_of_every_stage() -> None:
    model = awake().float()
    exact = drawn(model)
    assert torch.equal(drawn(model, (TaylorSeer(interval=1),)), exact)
    close = (drawn(model, (TaylorSeer(interval=2, order=1),)) - exact).norm() / exact.norm()
    assert 0 < close < 0.5
    branches = [site for site in model.sites() if site.kind == "branch"]
    need = 2 * 2 * 2 * 4 * sum({0: 17, 1: 64}[site.stage] * site.width for site in branches)
    drawn(model, (TaylorSeer(interval=2, order=1),), max_bytes=need)
    with pytest.raises(ConfigError, match=f"would hold {need:,} bytes"):
        drawn(model, (TaylorSeer(interval=2, order=1),), max_bytes=need - 1)


@pytest.mark.parametrize("kind", every(Policy), ids=lambda kind: kind.__name__)
def test_what_moves_rows_is_refused_by_name_and_others_act_or_are(kind: type[Policy]) -> None:
    policy, model = kind.small(Grid(1, 4, 4)), awake().float()
    moves = isinstance(policy, Pattern) or kind.__name__ in ("RAS", "ConfidentTaylor")
    try:
        assert drawn(model, (policy,)).isfinite().all() and not moves
    except (ConfigError, NoEffectError) as error:
        assert str(error).startswith(f"{kind.__name__}: ") and kind is not TaylorSeer
