"""Switch-DiT's own promises: experts that are not chosen are not computed, the stream is not scaled, the prior."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from torch import Tensor

import ditkit
from cli_support import save_photos
from ditkit.adapt import TaskRouting
from ditkit.attention import Neighbourhood
from ditkit.bench.expert_use import ExpertUse, use_of
from ditkit.bench.macs import count_macs
from ditkit.caching import ConfidentTaylor, TaylorSeer
from ditkit.cli.main import main
from ditkit.compress import Kept
from ditkit.core.cond import Cond
from ditkit.core.convention import DDPM, Convention
from ditkit.core.errors import ConfigError, ConflictError
from ditkit.core.model import Model
from ditkit.models.dit import DiT, DiTConfig
from ditkit.models.switch_dit import SwitchBlock, SwitchDiT, SwitchDiTConfig
from ditkit.nn.experts import Experts, choices, chosen
from ditkit.nn.task_windows import TASKS, prior
from ditkit.ops.routed_linear import reference as slow
from ditkit.ops.routed_linear import routed_linear
from ditkit.recipes.switch_dit import switch_dit
from ditkit.train.denoising import Denoising, NoisyBatch
from ditkit.train.loop import Training, train
from ditkit.train.randomness import SampleRNG
from ditkit.train.settings import Settings
from ditkit.train.terms.diffusion_prior import DiffusionPrior, costs, divergence, matched
from ditkit.train.terms.regression import Regression
from models_support import perturbed

sys.path.insert(0, str(Path(__file__).parents[1] / "support" / "scripts"))
from toy_run import Pictures, losses, settings

SIZES = {"size": 8, "patch": 2, "channels": 1, "width": 16, "depth": 3, "heads": 2, "classes": 4}
EVERY = torch.arange(TASKS)
COND = Cond(label=torch.tensor([0, 2]))
SHORT = ["--steps", "2", "--batch", "8", "--warmup", "0", "--precision", "float32", "--sheet-every", "0"]


def switch(scale: float = 0.2, convention: Convention = DDPM, **changed: Any) -> SwitchDiT:
    torch.manual_seed(0)
    config: Any = {**SIZES, "convention": convention, **changed}
    return perturbed(SwitchDiT(SwitchDiTConfig(**config)), scale)


# --- experts ---------------------------------------------------------------------------------------------------


def routed(B: int = 7, L: int = 5, M: int = 4, k: int = 2, same: bool = False) -> list[Tensor]:
    """Random x, weight, bias, gate and index in float64; 6 channels in, 3 out."""
    p = torch.randn(1 if same else B, M).softmax(-1).expand(B, M)
    gate, index = chosen(p, k)
    given = [torch.randn(B, L, 6), torch.randn(M, 6, 3), torch.randn(M, 3), gate]
    return [*(v.double().requires_grad_(True) for v in given), index]


@pytest.mark.parametrize(("k", "same"), [(1, False), (2, False), (4, False), (2, True)])
def test_the_operation_is_the_dense_sum_with_its_gradients(k: int, same: bool) -> None:
    """Gathered by expert, or merged where all samples choose alike, it is every expert on every sample, masked."""
    given = routed(k=k, same=same)
    out, dense = routed_linear(*given), slow.routed_linear(*given)
    assert torch.allclose(out, dense, atol=1e-12)
    weight = torch.randn_like(out)
    own, theirs = (torch.autograd.grad((y * weight).sum(), given[:4]) for y in (out, dense))
    for a, b in zip(own, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_what_is_not_chosen_is_not_computed() -> None:
    """Neither forward nor backward read its weights; each product is one of a sample with an expert that it chose."""
    x, weight, bias, gate, index = routed(B=6)
    index = torch.tensor([[0, 1], [1, 0], [0, 3], [3, 1], [1, 0], [0, 1]])
    with torch.no_grad():
        weight[2], bias[2] = torch.nan, torch.nan
    macs = count_macs(routed_linear, x, weight, bias, gate, index)
    assert macs.by_kind == {"linear": 6 * 5 * 2 * 6 * 3} and not macs.uncounted
    out = routed_linear(x, weight, bias, gate, index)
    assert out.isfinite().all()
    out.square().sum().backward()
    assert not weight.grad[2].any() and not bias.grad[2].any()
    assert all(v.grad.isfinite().all() and v.grad.any() for v in (x, weight, bias, gate))
    one = routed(B=6, same=True)
    merged = count_macs(routed_linear, *one).by_kind
    assert merged == {"linear": (6 * 5 + 2) * 6 * 3}, "one product, and the sum of two layers"


def test_a_samples_bits_do_not_depend_on_how_many_chose_the_same() -> None:
    x, weight, bias, gate, index = (v.detach() for v in routed(B=9))
    x, weight, bias, gate = x.float(), weight.float(), bias.float(), gate.float()
    whole = routed_linear(x, weight, bias, gate, index)
    some = routed_linear(x[:4], weight, bias, gate[:4], index[:4])
    assert torch.equal(whole[:4], some)


def test_equal_probabilities_choose_the_first_experts() -> None:
    p = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.2, 0.3, 0.2, 0.3]])
    assert chosen(p, 2)[1].tolist() == [[0, 1], [1, 3]]
    assert choices(p, 3).int().tolist() == [[1, 1, 1, 0], [1, 1, 0, 1]]
    assert torch.equal(chosen(p, 2)[0], torch.tensor([[0.25, 0.25], [0.3, 0.3]])), "not normalised again"


def test_all_of_equal_experts_are_one() -> None:
    experts = Experts(3, 6).double()
    with torch.no_grad():
        experts.weight.copy_(torch.randn(6, 6).expand(3, 6, 6))
        experts.bias.copy_(torch.randn(6).expand(3, 6))
    x, p = torch.randn(4, 5, 6).double(), torch.randn(4, 3).double().softmax(-1)
    assert torch.allclose(experts(x, p, 3), x @ experts.weight[0] + experts.bias[0], atol=1e-12)


# --- the network -----------------------------------------------------------------------------------------------


def test_a_fresh_one_is_a_dit_to_the_bit_for_any_gate() -> None:
    model = switch(scale=0.0)
    plain = DiT(DiTConfig(**SIZES, convention=DDPM)).eval()
    own = {name: v for name, v in model.state_dict().items() if name in plain.state_dict()}
    plain.load_state_dict(own)
    for one in (plain, model):
        torch.manual_seed(3)
        for name, parameter in one.named_parameters():
            if name in own:
                parameter.data += 0.2 * torch.randn_like(parameter)
    for block in model.blocks:
        block.gate.weight.data.normal_()
    given = torch.randn(2, 1, 8, 8), torch.tensor([10, 900]), COND
    assert torch.equal(model(*given), plain(*given)) and model(*given).abs().max() > 0


def test_the_residual_stream_is_not_scaled() -> None:
    torch.manual_seed(0)
    block = perturbed(SwitchBlock(16, 2, 3, 2).double(), 0.3)
    x, c, p = (
        torch.randn(2, 5, 16).double(),
        torch.randn(2, 16).double(),
        torch.randn(2, 3).double().softmax(-1),
    )
    o = slow.routed_linear(x, block.experts.weight, block.experts.bias, *chosen(p, 2))
    masked = x * (1 + o)
    updates = super(SwitchBlock, block).forward(masked, c) - masked
    assert torch.allclose(block(x, c, p) - updates, x, atol=1e-12) and o.abs().max() > 0.1
    nn_zero = [block.modulation.weight, block.modulation.bias]
    for parameter in nn_zero:
        torch.nn.init.zeros_(parameter)
    assert torch.allclose(block(x, c, p), x, atol=1e-12), "shut gates leave x, whatever the experts say"


def test_time_alone_chooses() -> None:
    model = switch()
    t = torch.tensor([3, 3, 990])
    given = model.route(t)
    assert torch.equal(given.p[0], given.p[1]) and not torch.allclose(given.p[0], given.p[2])
    assert given.p.shape == (3, 3, 3) and torch.allclose(given.p.sum(-1), torch.ones(3, 3))
    every = given.tasks()
    assert torch.allclose(every[[3, 990]], given.p[1:], atol=1e-6) and not every.requires_grad
    flow = switch(convention=Convention("linear", "velocity", "data"))
    assert torch.allclose(flow.route(torch.tensor([0.75])).p[0], flow.task_probabilities()[249], atol=1e-6)


def test_a_step_of_a_sampler_merges_the_experts() -> None:
    """With one time for all samples the layers are one; alone and among others a sample is the same."""
    model = switch().double()
    x, cond = torch.randn(3, 1, 8, 8).double(), Cond(label=torch.arange(3))
    counts = [
        count_macs(model, x, t, cond).total
        for t in (torch.tensor([500, 500, 500]), torch.tensor([1, 500, 999]))
    ]
    assert counts[1] - counts[0] == 3 * 16**2 * (3 * 16 * 2 - 3 * 16 - 2)
    t = torch.tensor([1, 500, 999])
    alone = [model(x[i : i + 1], t[i : i + 1], cond.rows(slice(i, i + 1))) for i in range(3)]
    assert torch.allclose(model(x, t, cond), torch.cat(alone), atol=1e-12)


def test_macs_of_the_papers_smallest() -> None:
    """Two of three experts in each block and the gates; the table of all tasks is not computed. XL is in the claims."""
    label = Cond(label=torch.zeros(1, dtype=torch.long, device="meta"))
    found = []
    for kind in (DiT, SwitchDiT):
        with torch.device("meta"), torch.no_grad():
            model = kind.preset("S/2").eval()
            found.append(count_macs(model, torch.empty(1, 4, 32, 32), torch.empty(1), label).total)
    assert found[1] - found[0] == 12 * (2 * 256 * 384**2 + 3 * 384) + 256 * 384 + 384**2
    assert found[1] / found[0] == pytest.approx(1.15, abs=0.02)


def test_only_the_prior_moves_the_gates_at_first() -> None:
    model = switch(scale=0.0).train()
    for block in model.blocks:  # the first output of a DiT is 0 whatever its blocks do
        for layer in (block.modulation, model.head.modulation, model.head.out):
            torch.nn.init.normal_(layer.weight, std=0.1)
    data, noise = torch.randn(2, 8, 1, 8, 8)
    given = {
        "path": DDPM.make_path(), "data": data, "noise": noise, "t": torch.arange(8) * 140,
        "cond": Cond(label=torch.zeros(8, dtype=torch.long), drop=torch.zeros(8, dtype=torch.bool)),
    }  # fmt: skip
    for terms, moved in (((Regression(),), False), ((Regression(), DiffusionPrior()), True)):
        model.zero_grad()
        Denoising(terms).at(model, model, **given)["loss"].backward()
        gates = [block.gate.weight.grad for block in model.blocks]
        assert all(bool(g.any()) == moved for g in gates)
        assert all(block.experts.weight.grad.any() for block in model.blocks)


# --- the prior -------------------------------------------------------------------------------------------------


def batch_of(p: Tensor, tasks: Tensor, t: Tensor, active: int = 2) -> NoisyBatch:
    """Return a batch whose network chooses as `tasks` [T, N, M] say."""
    from ditkit.models.switch_dit import Routes

    x = torch.zeros(len(t), 1, 2, 2)
    return NoisyBatch(
        path=DDPM.make_path(), convention=DDPM, data=x, noise=x, x=x, t=t, prediction=x, fraction=None,
        taps={"route": Routes(p, active, lambda: tasks)}, rng=SampleRNG(0, 3, range(len(t))),
    )  # fmt: skip


def test_a_permuted_prior_is_matched_and_costs_no_more_than_the_identity() -> None:
    table = prior(EVERY, 6, 3, 2, 4.0)
    order = torch.randperm(18)
    shuffled = table[:, order]
    found = matched(shuffled, table, torch.randperm(18), torch.randperm(18))
    assert costs(shuffled, table)[torch.arange(18), found].sum() == 0
    assert torch.equal(table[:, found], shuffled), "the order, or one of slots that are alike"
    own, rows = shuffled / shuffled.sum(1, keepdim=True), table / table.sum(1, keepdim=True)
    best, identity = divergence(own, rows[:, found]).mean(), divergence(own, rows).mean()
    assert best == 0 < identity <= math.log(2)
    brute = (shuffled[:, :, None] != table[:, None]).sum(0)
    assert torch.equal(costs(shuffled, table), brute.double())


def test_the_divergence_lies_between_0_and_ln_2() -> None:
    a, b = torch.rand(2, 50, 12, dtype=torch.float64)
    a, b = a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True)
    found = divergence(a, b)
    assert (found > 0).all() and (found < math.log(2)).all() and torch.allclose(found, divergence(b, a))


def test_the_loss_is_the_same_under_other_numbers_of_experts() -> None:
    """Within a block and across blocks, where the assignment is one but for slots of the prior that are alike."""
    N, M = 4, 3
    slots = torch.tensor(
        [[2, 4, 10], [0, 5, 8], [3, 6, 11], [1, 7, 9]]
    )  # of a task j or 8 + j, and a shared one
    wanted = prior(EVERY, N, M, 2, 4.0)[:, slots].double()
    tasks = (2 * wanted + torch.rand(TASKS, N, M, dtype=torch.float64)).softmax(-1)
    t = torch.tensor([3, 200, 600, 950])
    loss = DiffusionPrior().loss(batch_of(tasks[t], tasks, t))
    for blocks, experts in (
        (torch.tensor([2, 0, 3, 1]), torch.arange(3)),
        (torch.arange(4), torch.tensor([2, 0, 1])),
    ):
        other = tasks[:, blocks][:, :, experts]
        assert torch.allclose(DiffusionPrior().loss(batch_of(other[t], other, t)), loss, atol=1e-9)
    assert (loss > 0).all()


def test_all_processes_match_alike() -> None:
    """Orders that break ties belong to the step, not to the samples."""
    term = DiffusionPrior()
    p = torch.rand(2, 2, 3)
    batch = batch_of(p, p, torch.tensor([1, 2]))
    other = replace(batch, rng=replace(batch.rng, places=range(2, 4)))
    later = replace(batch, rng=replace(batch.rng, step=4))
    first = [torch.cat(term.orders(one, 12)).tolist() for one in (batch, other, later)]
    assert first[0] == first[1] != first[2]


def test_gates_learn_the_priors_bands() -> None:
    """Near tasks share their experts, a path is shared by all, and QQ^T is the prior's; before, none of it is so."""
    model = switch(scale=0.0, depth=4)
    learned = [p for name, p in model.named_parameters() if "gate" in name or "time." in name]
    optimizer = torch.optim.Adam(learned, lr=1e-2)
    before, g = use_of(model), torch.Generator().manual_seed(0)
    for step in range(100):
        t = torch.randint(TASKS, (32,), generator=g)
        routes = model.route(t)
        batch = replace(batch_of(routes.p, EVERY, t), taps={"route": routes})
        loss = DiffusionPrior().loss(replace(batch, rng=SampleRNG(0, step, range(32)))).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = use_of(model)
    assert loss < 0.01 and after.likeness > 0.95 and before.likeness < 0.7
    assert after.near > 0.95 and (after.shares.amax(1) > 0.95).all()


def test_a_run_resumes_to_the_bit_and_its_model_is_saved_whole(tmp_path: Path) -> None:
    objective = Denoising((Regression(), DiffusionPrior()))

    def run(name: str, steps: int, resume: bool = False) -> Model:
        given = settings(steps=steps, save_every=2, warmup=0)
        return train(switch(0.02), Pictures(), objective, given, tmp_path / name, resume=resume)

    model = run("whole", 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "follow", partialmethod(stopped, after=2, follow=Training.follow))
        with pytest.raises(KeyboardInterrupt):
            run("cut", 4)
    cut = run("cut", 4, resume=True)
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    again = ditkit.load(tmp_path / "whole" / "model")
    given = torch.randn(2, 1, 8, 8), torch.tensor([4, 800]), COND
    assert torch.equal(again(*given), model(*given)) and torch.equal(cut(*given), model(*given))


def stopped(self: Training, *given: Any, after: int, follow: Any) -> None:
    """Follow a run that is interrupted after some steps."""
    step = self.step

    def counted() -> Any:
        if self.done == after:
            raise KeyboardInterrupt
        return step()

    self.step = counted  # type: ignore[method-assign]
    follow(self, *given)


# --- in company ------------------------------------------------------------------------------------------------


def test_caches_and_patterns_act_on_it_and_a_second_routing_is_refused_by_name() -> None:
    model = switch(0.1)

    def drawn(*policies: Any) -> Tensor:
        found: Tensor = ditkit.generate(model, [0, 1], seeds=(0, 1), steps=8, policies=policies).samples
        return found

    exact = drawn()
    for policy in (
        TaylorSeer(interval=2),
        ConfidentTaylor(interval=2),
        Neighbourhood(radius=1, block=8, kernel="cpu"),
    ):
        assert torch.equal(drawn(policy.exact()), exact)
        error = (drawn(policy) - exact).norm() / exact.norm()
        assert 0 < error < 0.5
    with pytest.raises(ConflictError, match="TaskRouting and SwitchDiT both decide by time"):
        drawn(TaskRouting())
    with pytest.raises(ConflictError, match="use one of them"):
        model.adopt([TaskRouting()])
    assert torch.equal(drawn(TaskRouting(share=1.0)), exact)


def test_a_cache_forecasts_the_experts_too() -> None:
    """They are a branch of the block, so that a step that is forecast computes none of them."""
    model = switch(0.1)

    def macs(*policies: Any) -> int:
        given = {"seeds": [0], "steps": 9, "guidance": 1.0, "policies": policies}
        return count_macs(lambda: ditkit.generate(model, [0], **given)).total

    exact, fast = macs(), macs(TaylorSeer(interval=3, order=1))
    assert fast < 0.55 * exact


def test_a_pruned_one_keeps_the_routes_of_its_blocks() -> None:
    model = switch(0.1)
    t = torch.tensor([5, 700])
    before = model.route(t).p
    shallow = ditkit.compress(model, Kept(blocks=(0, 2)))
    assert torch.equal(shallow.route(t).p, before[:, [0, 2]])
    assert shallow(torch.randn(2, 1, 8, 8), t, COND).isfinite().all() and len(shallow.blocks) == 2
    Denoising((Regression(), DiffusionPrior())).check(shallow)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="SwitchDiT: active=4 of experts=3, expected no more than a block has"
    ):
        SwitchDiTConfig(active=4)
    with pytest.raises(ConfigError, match="experts=0 should be at least 1"):
        SwitchDiTConfig(experts=0)
    with pytest.raises(ConfigError, match="unknown SwitchDiT preset 'XXL/2'"):
        SwitchDiT.preset("XXL/2")
    alone = Denoising((Regression(), DiffusionPrior()))
    with pytest.raises(ConfigError, match=r"needs experts that are routed by noise-time.*got a DiT"):
        train(DiT(DiTConfig(**SIZES)), Pictures(), alone, Settings(steps=1), tmp_path / "a")
    wide = SwitchDiT(SwitchDiTConfig(**{**SIZES, "experts": 334}))
    with pytest.raises(
        ConfigError, match="no more slots than the 1000 tasks, got 3 blocks x experts=334 = 1002"
    ):
        train(wide, Pictures(), alone, Settings(steps=1), tmp_path / "b")
    assert not list(tmp_path.iterdir())


def test_the_recipe_is_the_donors_with_experts_and_their_prior() -> None:
    recipe = switch_dit()
    assert [type(term).__name__ for term in recipe.objective.terms] == [
        "Regression",
        "VariationalBound",
        "DiffusionPrior",
    ]
    recipe.objective.check(recipe.network())


def test_the_command_shows_the_experts_over_noise_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, picture = switch(0.3).save(tmp_path / "model"), tmp_path / "out" / "experts.png"
    assert main(["experts", str(folder), "--out", str(picture)]) == 0
    shown = capsys.readouterr().out
    use = use_of(ditkit.load(folder))
    assert f"correlation of the overlaps of noise-times with the prior's: {use.likeness:.3f}" in shown
    assert f"{use.shares[2, 0]:.0%}  {use.p[use.chosen[:, 2, 0], 2, 0].mean():.2f}" in shown
    with Image.open(picture) as drawn:
        assert drawn.width > drawn.height > 300
    assert main(["experts", "fashion-dit", "--out", str(picture)]) == 2
    assert (
        "a DiT has no experts, expected a model with experts that are routed by noise-time"
        in capsys.readouterr().err
    )
    for words in (["--out", "a.txt"], ["--alpha", "-1"]):
        assert main(["experts", str(folder), *words]) == 2


def test_the_use_of_experts_is_counted_by_hand() -> None:
    """Three tasks, two blocks: overlaps, shares and what neighbours have in common."""
    p = torch.tensor(
        [
            [[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]],
            [[0.2, 0.5, 0.3], [0.1, 0.7, 0.2]],
            [[0.1, 0.2, 0.7], [0.6, 0.3, 0.1]],
        ]
    )
    use = ExpertUse(p, 2, prior(torch.tensor([0, 500, 999]), 2, 3, 2, 4.0))
    assert use.shares.tolist() == [[1 / 3, 1.0, 2 / 3], [1 / 3, 1.0, 2 / 3]]
    assert use.overlap.tolist() == [[4, 3, 2], [3, 4, 3], [2, 3, 4]] and use.near == 3 / 4 and use.shared == 2
    assert use.wanted_overlap.tolist() == [[4, 4, 2], [4, 4, 2], [2, 2, 4]]
    own, wanted = (numpy.array(m.tolist()).flatten() for m in (use.overlap, use.wanted_overlap))
    assert use.likeness == pytest.approx(numpy.corrcoef(own, wanted)[0, 1])


def test_the_recipe_from_the_command_line_to_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos, out = save_photos(tmp_path / "photos"), tmp_path / "run"
    sizes = ["--size", "8", "--width", "16", "--depth", "2", "--heads", "2", "--patch", "2"]
    words = ["train", "switch-dit", "--data", str(photos), "--out", str(out), *sizes, *SHORT]
    assert main([*words, "--experts", "4", "--active", "5"]) == 2
    assert "active=5 of experts=4, expected no more than a block has" in capsys.readouterr().err
    assert not out.exists() and main(words) == 0
    model = str(out / "model")
    assert (
        main(
            [
                "generate",
                model,
                "--label",
                "cat",
                "--seeds",
                "0",
                "--steps",
                "3",
                "--out",
                str(tmp_path / "drawn"),
            ]
        )
        == 0
    )
    assert list((tmp_path / "drawn").glob("*.png"))
