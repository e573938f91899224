"""Learned depth: masks, gradients, the decision, what is saved of it, and distillation of what is left."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flux_support as fluxes
import hosts_support as hosts
from rig import noise, tiny_dit

sys.path.insert(0, str(Path(__file__).parents[1] / "support" / "scripts"))

from toy_run import Pictures, settings, toy_model

import ditkit
from ditkit.adapt.lora import LoRA
from ditkit.attention import Neighbourhood
from ditkit.caching import TaylorSeer
from ditkit.compress import Kept, LearnedDepth, decide
from ditkit.compress import learned_depth as search
from ditkit.compress.learned_depth import Gates, gumbel
from ditkit.compress.scores import (
    alternate,
    block_change,
    block_influence,
    least_needed,
    sensitivity,
)
from ditkit.core.cond import Cond
from ditkit.core.convention import DDPM, SIT
from ditkit.core.errors import ConfigError, ShapeError
from ditkit.core.model import Model
from ditkit.core.run import Run
from ditkit.hosts.hosted import Host
from ditkit.models.small_flux import SmallFlux, SmallFluxConfig
from ditkit.train.denoising import Denoising, NoisyBatch
from ditkit.train.loop import train
from ditkit.train.settings import Group
from ditkit.train.taps import run_with_taps
from ditkit.train.teacher import Answer
from ditkit.train.terms.masked_distillation import MaskedDistillation
from ditkit.train.terms.regression import Regression
from ditkit.train.terms.variational_bound import VariationalBound

COND = Cond(label=torch.tensor([0, 2]), drop=torch.tensor([False, True]))
T = torch.tensor([0.3, 0.8])
ONE_OF_THREE = LearnedDepth(keep=(1,), of=())


def gates(model: Model) -> Gates:
    learned: Any = model.learned["LearnedDepth"]
    found: Gates = learned["all"]
    return found


def searching(policy: LearnedDepth, choice: int | None = None) -> Model:
    """A model under a search; with a choice, one whose logits leave no other."""
    model = tiny_dit().adopt([policy])
    if choice is not None:
        with torch.no_grad():
            gates(model).logits[0][choice] += 100
    return model


def out(model: Model, step: int | None = None) -> Tensor:
    return run_with_taps(model, model, (), (3, 8, 8), noise(), T, COND, times=T, step=step).out


def kept_only(*blocks: int) -> Model:
    return ditkit.compress(tiny_dit(), Kept(blocks)).train()


def test_all_kept_is_the_dense_model_to_the_bit():
    dense = tiny_dit().train()
    for policy in (LearnedDepth(keep=(3,), of=(3,)), LearnedDepth(keep=(1,), of=(1,)), ONE_OF_THREE.exact()):
        assert torch.equal(out(searching(policy).train(), 0), out(dense))
        assert torch.equal(out(searching(policy).eval()), out(dense.eval()))
        dense.train()


@pytest.mark.parametrize("choice", [0, 1, 2])
def test_a_mask_is_the_pruned_model_to_the_bit_and_in_evaluation_the_rest_is_not_run(choice):
    pruned = kept_only(choice)
    model = searching(ONE_OF_THREE, choice).train()
    assert torch.equal(out(model, 0), out(pruned))
    without = searching(LearnedDepth(keep=(2,), of=(3,)), 2 - choice).train()  # 01, 02, 12 in order
    assert torch.equal(out(without, 0), out(kept_only(*sorted({0, 1, 2} - {choice}))))
    model.eval()
    ran = []
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    assert torch.equal(out(model), out(pruned.eval())) and ran == [choice]


def test_every_sample_draws_its_own_and_the_masks_are_exact():
    draw = Gates([(2, 4), (1, 2)], 0.02, 100.0)
    torch.manual_seed(0)
    masks = draw.draw(64, 4.0)
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    assert (masks[:, :4].sum(1) == 2).all() and (masks[:, 4:].sum(1) == 1).all()
    assert len(masks.unique(dim=0)) == 6 * 2
    with torch.no_grad():
        draw.logits[0][3] += 1
    certain = draw.draw(64, 0.1)
    assert len(certain[:, :4].unique(dim=0)) == 1
    certain.sum().backward()
    assert all(logits.grad.isfinite().all() for logits in draw.logits)


def test_the_gradient_is_that_of_the_soft_choice(monkeypatch):
    given, weight = gumbel(torch.zeros(5, 6, dtype=torch.float64)), torch.randn(5, 4).double()
    monkeypatch.setattr(search, "gumbel", lambda like: given)
    draw = Gates([(2, 4)], 0.02, 100.0).double()
    (weight * draw.draw(5, 0.7)).sum().backward()
    logits = torch.full((6,), 0.02, dtype=torch.float64, requires_grad=True)
    soft = ((100 * logits + given) / 0.7).softmax(-1) @ draw.options()[0].double()
    (weight * soft).sum().backward()
    assert torch.allclose(draw.logits[0].grad, logits.grad, rtol=1e-12)


def test_groups_and_mixed_groups():
    policy = LearnedDepth(keep=(2, 3), of=(4, 4))
    assert policy.groups(8) == [(2, 4), (3, 4)] and policy.groups(16) == policy.groups(8) * 2
    assert LearnedDepth(keep=(7,), of=(14,)).groups(28) == [(7, 14), (7, 14)]
    model = searching(LearnedDepth(keep=(1,), of=(3,)), 1)
    assert decide(model).kept == Kept((1,)) and decide(model).confidence == (1.0,)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: tiny_dit().adopt([LearnedDepth()]), r"of=\(2,\) does not make up the 3 blocks"),
        (lambda: LearnedDepth(keep=(3,)), r"keep=\(3,\), expected no more than of=\(2,\)"),
        (lambda: LearnedDepth(keep=(1, 2)), "expected as many of each"),
        (lambda: LearnedDepth(keep=(14,), of=()).groups(28), "40,116,600 choices, expected 1 to 65,536"),
        (lambda: LearnedDepth(cold=0.0), "expected hot >= cold > 0"),
        (lambda: tiny_dit().adopt([LearnedDepth(stack="block")]), "unknown stack 'block'; did you mean"),
        (lambda: decide(tiny_dit()), "was not trained under LearnedDepth"),
        (lambda: least_needed([0.1, 0.2, 0.3], 3), "count=3, expected 0 to 2 of 3 blocks"),
        (lambda: alternate(6), "depth=6, expected a multiple of 4"),
    ],
)
def test_what_does_not_fit_is_refused(act, message):
    with pytest.raises(ConfigError, match=message):
        act()


def test_a_block_of_another_batch_axis_is_refused():
    with pytest.raises(ShapeError, match="a block of 6 rows of samples, expected 3"):
        search.gated(torch.ones(3), lambda x: x, torch.ones(6, 2, 4))


@pytest.fixture(scope="module")
def searched(tmp_path_factory) -> dict[bool, tuple[Path, dict[str, Tensor]]]:
    """Searches of six steps with adapters and without, stopped and resumed."""
    found = {}
    for adapted in (True, False):
        folder = tmp_path_factory.mktemp("search") / "run"
        for steps in (3, 6):
            model = toy_model(SIT, depth=4)
            base = {k: v.clone() for k, v in model.state_dict().items()}
            if adapted and steps == 3:
                model.transform(LoRA(rank=2, alpha=4, layers="all"))
            elif adapted:
                model.shaped([LoRA(rank=2, alpha=4, layers="all")])
            model.adopt([LearnedDepth(steps=6)])
            given = settings(
                steps=steps,
                warmup=0,
                trained="lora+learneddepth" if adapted else "all",
                groups=(Group("learneddepth", 10.0),),
            )
            train(model, Pictures(), Denoising(), given, folder, resume=steps == 6)
        found[adapted] = folder / "model", base
    return found


@pytest.mark.parametrize("adapted", [True, False])
def test_the_original_weights_are_kept_and_the_search_is_thrown_away(searched, adapted, tmp_path):
    folder, base = searched[adapted]
    model = ditkit.load(folder)
    logits = torch.cat([*gates(model).logits])
    assert len(logits) == 4 and (logits != 0.02).all()
    kept, confidence = decide(model)
    assert len(kept.blocks) == 2 and all(0.5 <= share <= 1 for share in confidence)
    shallow = ditkit.load(ditkit.compress(toy_model(SIT, depth=4), kept).save(tmp_path / "shallow"))
    assert shallow.transforms == (kept,) and not shallow.policies
    own = shallow.state_dict()
    assert {shallow.origin(name) for name in own} < set(base)
    assert all(torch.equal(value, base[shallow.origin(name)]) for name, value in own.items())
    frozen = {name: v for name, v in model.state_dict().items() if "base_layer" in name}
    assert all(torch.equal(v, base[name.replace(".base_layer", "")]) for name, v in frozen.items())
    assert len(model.blocks) == 4 and any("lora_A" in name for name in model.state_dict()) == adapted


def test_resumed_it_is_the_uninterrupted_search(searched, tmp_path):
    model = toy_model(SIT, depth=4).adopt([LearnedDepth(steps=6)])
    given = settings(steps=6, warmup=0, groups=(Group("learneddepth", 10.0),))
    whole = train(model, Pictures(), Denoising(), given, tmp_path / "run").state_dict()
    resumed = ditkit.load(searched[False][0]).state_dict()
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_temperature_follows_the_step_of_the_optimiser(monkeypatch):
    seen = []
    monkeypatch.setattr(Gates, "draw", lambda self, batch, tau: seen.append(tau) or torch.ones(batch, 3))
    model = tiny_dit().train().adopt([replace(ONE_OF_THREE, steps=5)])
    for step in (0, 2, 4, 9):
        out(model, step)
    assert seen == pytest.approx([4.0, 2.05, 0.1, 0.1])


def test_sampling_runs_the_choice_and_composes_with_caches_and_patterns():
    model = searching(ONE_OF_THREE, 1).eval()
    pruned = kept_only(1).eval()
    cache, pattern = TaylorSeer(interval=3, order=1), Neighbourhood(radius=2, block=8, kernel="cpu")
    for policies in ((), (cache,), (cache, pattern)):
        found, expected = (
            ditkit.generate(m, [0, 1], seeds=(0, 1), steps=6, policies=policies) for m in (model, pruned)
        )
        assert torch.equal(found.samples, expected.samples)


@torch.no_grad()
def test_two_streams_of_flux_share_a_mask_and_plain_diffusers_opens_the_pruned(tmp_path):
    from diffusers import FluxTransformer2DModel

    whole, inputs = Host.around(fluxes.transformer()), fluxes.call_inputs()
    kept = {"blocks": (1,), "single": (0, 2)}
    policies = [LearnedDepth((1,), (2,), "blocks"), LearnedDepth((2,), (3,), "single")]
    masks = {"blocks.0": 0.0, "blocks.1": 1.0, "single.0": 1.0, "single.1": 0.0, "single.2": 1.0}
    assert [name for policy in policies for name in policy.blocks(whole.sites())] == list(masks)
    handlers = {name: partial(search.gated, torch.full((2,), m)) for name, m in masks.items()}
    expected = whole(**inputs, run=Run(handlers), return_dict=False)[0]
    pruned = ditkit.compress(fluxes.transformer(), *(Kept(blocks, name) for name, blocks in kept.items()))
    assert torch.equal(pruned(**inputs, return_dict=False)[0], expected)
    pruned.save_pretrained(tmp_path)
    plain = FluxTransformer2DModel.from_pretrained(tmp_path).eval()
    assert type(plain) is FluxTransformer2DModel and len(plain.single_transformer_blocks) == 2
    assert torch.equal(plain(**inputs, return_dict=False)[0], expected)


def test_the_network_of_flux_is_searched(tmp_path):
    torch.manual_seed(0)
    sizes = {"size": 8, "channels": 1, "width": 32, "heads": 4, "single_depth": 4, "letters": 8, "classes": 4}
    model = SmallFlux(SmallFluxConfig(**sizes)).adopt([LearnedDepth(stack="single", steps=2)])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    given = settings(steps=2, warmup=0, groups=(Group("learneddepth", 10.0),), save_every=0)
    searched = train(model, Pictures(), Denoising(), given, tmp_path / "run")
    kept, _ = decide(searched)
    assert kept.stack == "single" and len(kept.blocks) == 2
    pipe = ditkit.compress(SmallFlux(SmallFluxConfig(**sizes)), kept).pipeline()
    assert pipe.transformer.config.num_single_layers == 2


@torch.no_grad()
def test_diffusers_dit_is_scored_pruned_and_opened_by_plain_diffusers(tmp_path):
    from diffusers import DiTTransformer2DModel

    family = hosts.FAMILIES["dit"]
    transformer, inputs = family.transformer(num_layers=4), family.inputs()
    whole = Host.around(family.transformer(num_layers=4))
    named = inputs | {"return_dict": False}
    scores = block_influence(whole, **named)
    assert scores.shape == (4,) and (block_change(whole, **named) > 0).all()
    kept = least_needed(scores, 2, spare=(0, -1))
    assert {0, 3} <= set(kept.blocks) and len(kept.blocks) == 2
    ditkit.compress(transformer, kept).save_pretrained(tmp_path)
    plain = DiTTransformer2DModel.from_pretrained(tmp_path).eval()
    assert torch.equal(plain(**named)[0], transformer(**named)[0])


def test_baselines():
    assert alternate(28).blocks == (0, 2, 4, 6, 8, 10, 12, 15, 17, 19, 21, 23, 25, 27)
    model = tiny_dit()
    with torch.no_grad():
        model.blocks[1].modulation.weight.zero_()
        model.blocks[1].modulation.bias.zero_()  # gates of zero: an identity
        influence = block_influence(model, noise(), T, COND)
        assert influence[1] == pytest.approx(1.0, abs=1e-6) and influence.argmax() == 1
        assert block_change(model, noise(), T, COND)[1] == 0
        rises = sensitivity(model, lambda m: m(noise(), T, COND).square().mean().item())
    assert rises[1] == 0 and (rises[[0, 2]] != 0).all()
    assert least_needed(influence, 1) == least_needed(-rises.abs(), 1) == Kept((0, 2))


def distilled(
    student: Model, teacher: Model, term: MaskedDistillation, data: Tensor
) -> tuple[Tensor, Tensor]:
    """The term's squared error and its features' difference of two networks on the same inputs."""
    path, t = DDPM.make_path(), torch.tensor([10, 600])
    pairs = term.paired(student.sites())
    x = path.mix(data, torch.ones_like(data), t.float())
    label = Cond(label=torch.tensor([0, 1]))
    own, theirs = (
        run_with_taps(m.eval(), m, list(taps), (1, 8, 8), x, t.float(), label)
        for m, taps in ((student, pairs), (teacher, pairs.values()))
    )
    prediction, fraction = DDPM.split(own.out)
    taught, variance = DDPM.split(theirs.out)
    batch = NoisyBatch(
        path=path, convention=DDPM, data=data, noise=torch.ones_like(data), x=x, t=t, prediction=prediction,
        fraction=fraction, taps=own.taps, taught=Answer(taught, theirs.taps, variance), sites=student.sites(),
    )  # fmt: skip
    return term.loss(batch), term.unlike(batch, theirs.taps)


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    term, data = MaskedDistillation(every=1), torch.randn(2, 1, 8, 8)
    loss, unlike = distilled(toy_model(), toy_model(), term, data)
    assert loss.abs().max() < 1e-6 and unlike.abs().max() == 0
    other = toy_model()
    nn.init.normal_(other.blocks[0].mlp.inner.weight, std=0.3)
    loss, unlike = distilled(toy_model(), other, term, data)
    assert (loss > 0).all() and (unlike > 0).all()


def test_an_outlier_counts_as_zero():
    term, h = MaskedDistillation(), torch.randn(2, 16, 32)
    planted, zeroed = h.clone(), h.clone()
    planted[:, 3, 5], zeroed[:, 3, 5] = 1e4, 0.0
    inside = term.inside(planted)
    assert (inside[:, 3, 5] == 0).all()
    deviation, mean = torch.std_mean(planted[0])
    assert torch.equal(inside[0] != 0, (planted[0] - mean).abs() < 2 * deviation)
    assert term.inside(planted.half()).dtype == torch.float32


def test_masked_distillation_trains_a_shallow_student_of_the_deep_model(tmp_path):
    deep, seen = toy_model(depth=4), []
    student = ditkit.compress(deep, Kept((0, 3)))
    term = MaskedDistillation()
    objective = Denoising((Regression(0.1), VariationalBound(0.1), term))

    def start() -> Model:
        teacher = toy_model(depth=4)
        teacher.register_forward_pre_hook(lambda _, args: seen.append(args[2].drop))
        return teacher

    given = settings(steps=2, warmup=0)
    train(student, Pictures(), objective, given, tmp_path / "run", start=start)
    assert len(seen) == 2 and all(drop is not None for drop in seen)
    wrong = Denoising((Regression(0.1), MaskedDistillation(every=3)))
    with pytest.raises(ConfigError, match="the teacher has no unknown block"):
        train(ditkit.compress(deep, Kept((0, 3))), Pictures(), wrong, given, tmp_path / "no", start=start)
