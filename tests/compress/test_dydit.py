"""DyDiT++: what is off is not computed, masks and slices agree, budgets, TD-LoRA, and what it composes with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import nan
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ditkit
from ditkit.attention import Neighbourhood
from ditkit.bench.macs import MacCounter
from ditkit.caching import TaylorSeer
from ditkit.compress import DyDiT
from ditkit.compress import dydit as dydit_module
from ditkit.compress.dydit import gate, load_routers
from ditkit.core.cond import Cond
from ditkit.core.errors import CheckpointError, ConfigError
from ditkit.core.run import Call, Run, Site, named
from ditkit.core.trajectory import Trajectory
from ditkit.models.dit import DiT, DiTConfig
from ditkit.models.video_dit import VideoDiT, VideoDiTConfig
from ditkit.nn.blocks import Mlp
from ditkit.nn.routes import Route, Update, into_groups, out_of_groups, routed_blocks
from ditkit.nn.time_lora import TimeLoRA
from ditkit.recipes.dydit import dydit
from ditkit.train.denoising import Denoising
from ditkit.train.ema import Constant
from ditkit.train.loop import Training, train
from ditkit.train.objective import Batch
from ditkit.train.randomness import SampleRNG
from ditkit.train.settings import Settings
from ditkit.train.taps import run_with_taps
from ditkit.train.terms.budget import Budget, work_share
from ditkit.train.terms.complete_model import CompleteModel
from ditkit.train.terms.regression import Regression
from ditkit.train.timesteps import Stratified
from rig import TINY, noise, tiny_dit

OPEN = DyDiT(width_bias=0.0, token_bias=0.0)
"""Routers that are on and off by halves."""
COND = Cond(label=torch.tensor([0, 2, 1]))
X = noise(3)


def routed(policy: DyDiT, spread: float = 1.0, heads: int = 4) -> DiT:
    """Return a model with routers that differ from block to block."""
    model = DiT(replace(TINY, heads=heads))
    model.load_state_dict(tiny_dit().state_dict())
    model.adopt([policy]).eval()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.learned.parameters():
            weight.add_(spread * torch.randn(weight.shape, generator=g))
        for routers in model.learned["DyDiT"].values() if spread else ():
            if routers.tokens is not None:  # some on, some off: one channel less the other
                routers.tokens[2].weight.copy_(torch.tensor([[1.0, -1.0]]))
                routers.tokens[2].bias.zero_()
    return model


def called(model: DiT, x: Tensor, sliced: bool, t: float = 0.6, count: bool = False) -> Any:
    """Evaluate at one time, known to the policy or not; its output, or the MACs and the receipt's remarks."""
    trajectory = Trajectory(model.sites(), model.policies, 1, learned=model.learned)
    call = Call(0, 1, t if sliced else float("nan"), layout=model.layout((3, 8, 8)))
    with MacCounter() as counter:
        out = trajectory.leave(call, model(x, torch.full((3,), t), COND, trajectory.run(call)))
    return (counter, trajectory.sessions[0].remarks) if count else out


def dense(model: DiT) -> Tensor:
    """The same network without its policies."""
    plain = DiT(model.config).eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("learned.")})
    out: Tensor = plain(X, torch.full((3,), 0.6), COND)
    return out


def with_dead_tokens(model: DiT) -> DiT:
    """The first block's MLP computes no token, the second's all."""
    with torch.no_grad():
        for i, bias in enumerate((-1e4, 1e4)):
            model.learned["DyDiT"][f"blocks/{i}/mlp/route"].tokens[2].bias.fill_(bias)
    return model


POLICIES = {
    "both": OPEN,
    "width": replace(OPEN, tokens=False),
    "tokens": replace(OPEN, width=False),
    "all may go": replace(OPEN, keeps_first=False),
    "td-lora": replace(OPEN, rank=2, alpha=2.0),
    "td-lora alone": DyDiT(width=False, tokens=False, rank=2),
}


@torch.no_grad()
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("change", [None, with_dead_tokens])
def test_slices_are_masks(name: str, change: Callable[[DiT], DiT] | None) -> None:
    """To 1e-5, where samples keep unlike numbers of tokens, blocks none or all, and branches one head."""
    model = routed(POLICIES[name])
    if change is not None and POLICIES[name].tokens:
        change(model)
    sliced, masked = called(model, X, True), called(model, X, False)
    assert torch.allclose(sliced, masked, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(sliced, dense(model), atol=1e-3)


@pytest.mark.parametrize("heads", [(0,), (1, 3), ()])
def test_gradients_of_slices_are_those_of_masks(heads: tuple[int, ...]) -> None:
    block, c = routed(OPEN).double().blocks[0], torch.randn(3, 32, dtype=torch.float64)
    rows = torch.rand(3, 16, 1) < torch.tensor([0.0, 0.3, 0.8])[:, None, None]
    groups = torch.zeros(3, 4, dtype=torch.float64).index_fill(1, torch.tensor(heads, dtype=torch.long), 1.0)
    slices = Route(4, torch.tensor(heads, dtype=torch.long))
    masks = Route(4, group_mask=groups)
    found = []
    for attn, mlp in (
        (slices, slices._replace(rows=rows.flatten().nonzero().squeeze(1))),
        (masks, masks._replace(row_mask=rows.double())),
    ):
        given = {"b.attn.route": attn, "b.mlp.route": mlp}
        run = Run({name: lambda *_, route=route: route for name, route in given.items()})
        x = torch.linspace(-1, 1, 3 * 16 * 32, dtype=torch.float64).view(3, 16, 32).requires_grad_()
        out = block(x, c, None, run, "b")
        weights = block.mlp.inner.weight, block.attn.qkv.bias
        found.append((out, *torch.autograd.grad(out.square().sum(), (x, *weights))))
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, atol=1e-10)


@torch.no_grad()
def test_without_heads_a_branch_is_its_bias() -> None:
    model = routed(replace(OPEN, keeps_first=False, tokens=False))
    for router in model.learned["DyDiT"].values():
        router.width.bias.fill_(-1e4)
    plain = tiny_dit()
    for block in plain.blocks:
        block.attn.forward = lambda h, *_, out=block.attn.out, **__: out.bias.expand_as(h)
        block.mlp.forward = lambda h, *_, out=block.mlp.outer, **__: out.bias.expand_as(h)
    assert torch.allclose(called(model, X, True), plain(X, torch.full((3,), 0.6), COND), atol=1e-5)


@torch.no_grad()
def test_fresh_routers_and_masks_off_are_the_dense_model_to_the_bit() -> None:
    fresh = routed(DyDiT(), spread=0.0)
    off = routed(OPEN).adopt([OPEN.exact()])
    for model in (fresh, off):
        assert torch.equal(called(model, X, False), dense(model))
        assert torch.equal(called(model, X, True), dense(model))
    torch.manual_seed(0)
    routes, kept = named(fresh.sites(), "choice"), replace(COND, drop=torch.zeros(3).bool())
    noisy = run_with_taps(fresh.train(), fresh, routes, (3, 8, 8), X, torch.rand(3), kept)
    for route in noisy.taps.values():
        assert route.group_mask.all() and (route.row_mask is None or route.row_mask.all())


def test_a_masked_group_is_one_that_is_not_there() -> None:
    """Masks come after the bias and before the activation, whose value at 0 is 0."""
    mlp, x = Mlp(8), torch.randn(2, 3, 8)
    nn.init.normal_(mlp.inner.bias)
    mask = torch.tensor([[1.0, 0.0, 1.0, 0.0]] * 2)
    masked = mlp(x, route=Route(4, group_mask=mask))
    assert torch.allclose(masked, mlp(x, route=Route(4, torch.tensor([0, 2]))), atol=1e-6)
    assert F.gelu(torch.zeros(1), approximate="tanh").item() == 0
    before = mlp.inner(x) * mask.repeat_interleave(8, 1)[:, None]
    assert torch.allclose(masked, mlp.outer(F.gelu(before, approximate="tanh")), atol=1e-6)


def test_layers_that_cannot_be_cut_are_computed_whole() -> None:
    """A wrapped layer gives the same groups; what it costs is its own."""
    layer, x, route = nn.Linear(8, 24), torch.randn(2, 3, 8), Route(4, torch.tensor([1, 3]))
    cut = into_groups(layer, x, route, 3, 4)
    layer.register_forward_hook(lambda *_: None)
    assert torch.allclose(into_groups(layer, x, route, 3, 4), cut, atol=1e-6)
    back, h = nn.Linear(8, 5), torch.randn(2, 3, 4)
    cut = out_of_groups(back, h, route, 4)
    back.register_forward_hook(lambda *_: None)
    assert torch.allclose(out_of_groups(back, h, route, 4), cut, atol=1e-6)


def xl(group: Tensor, row: Tensor) -> Tensor:
    """The share of work where every block of DiT-XL/2 has these masks of 16 groups and 256 tokens."""
    with torch.device("meta"):
        sites = DiT.preset("XL/2").sites()
    taps: dict[str, Any] = {}
    for block in routed_blocks(sites):
        taps[block.attn.name] = Route(16, group_mask=group)
        taps[block.mlp.name] = Route(16, group_mask=group, row_mask=row)
        taps[block.attn.name + ":in"] = torch.empty(1, 1, 1).expand(1, 256, 1152)
    data = torch.zeros(1, 1)
    return work_share(Batch(data=data, prediction=data, taps=taps, sites=sites))


def test_share_of_work() -> None:
    every, first = torch.ones(1, 16), F.one_hot(torch.tensor([0]), 16).float()
    tokens = torch.ones(1, 256, 1)
    assert xl(every, tokens).item() == 1
    assert xl(first, 0 * tokens).item() == pytest.approx(0.02232, abs=1e-5)
    half = (torch.arange(256) < 128).float().view(1, 256, 1)
    assert xl(every, half).item() == pytest.approx(0.67857, abs=1e-5)


def test_measured_macs_are_the_share_of_work() -> None:
    model = routed(OPEN)
    with torch.no_grad():
        counted, remarks = called(model, X, True, count=True)
        routing, _ = called(with_dead_tokens(routed(replace(OPEN, width=False))), X, True, count=True)
    blocks = routed_blocks(model.sites())
    whole = 3 * sum(sum(block.work(16)) for block in blocks)
    with MacCounter() as dense:
        model(X, torch.full((3,), 0.6), COND)
    width, hidden = 32, 128
    routers = 3 * 3 * 16 * (width * 2 + 2) + 2 * 3 * width * 3
    done = counted.total - (dense.total - whole) - routers
    assert done / whole == pytest.approx(remarks["work"], rel=0.005) and 0.2 < remarks["work"] < 0.8
    assert routing.total < dense.total + 3 * 3 * 16 * (width * 2 + 2) and hidden == blocks[0].hidden


def test_the_gate_has_the_gradient_of_its_probability() -> None:
    z = torch.randn(6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, dtype=torch.float64)
    for training, tau in ((True, 5.0), (False, 1.0)):
        torch.manual_seed(3)
        mask = gate(z, 5.0, training)
        (gradient,) = torch.autograd.grad((mask * weight).sum(), z)
        assert set(mask.tolist()) <= {0.0, 1.0}

        def soft(logits: Tensor, training: bool = training) -> Tensor:
            torch.manual_seed(3)
            if training:
                first, second = (-torch.empty_like(logits).exponential_().log() for _ in range(2))
                logits = (logits + first - second) / 5.0
            return (logits.sigmoid() * weight).sum()

        with torch.no_grad():
            s = torch.tensor(
                [(soft(z + d) - soft(z - d)).item() / 2e-6 for d in 1e-6 * torch.eye(6, dtype=torch.float64)]
            )
        assert torch.allclose(gradient, s.double(), atol=1e-6), tau


def test_td_lora() -> None:
    lora, e, x = TimeLoRA(6, 8, 5, rank=2, updates=3, alpha=4.0), torch.randn(4, 6), torch.randn(4, 3, 8)
    layer = nn.Linear(8, 5)
    assert torch.equal(lora(e).added(x), torch.zeros(4, 3, 5))  # every B is 0
    nn.init.normal_(lora.up)
    one = lora(e[:1])
    assert isinstance(one, Update) and one.up.shape == (1, 5, 2)
    merged = F.linear(x, layer.weight + one.up[0] @ one.down, layer.bias)
    assert torch.allclose(merged, layer(x) + one.added(x), atol=1e-5)
    apart = torch.cat([lora(e[i : i + 1]).added(x[i : i + 1]) for i in range(4)])
    assert torch.allclose(lora(e).added(x), apart, atol=1e-5)
    with torch.no_grad():
        lora.router.weight.zero_()
        lora.router.bias.copy_(torch.tensor([0.0, 1e4, 0.0]))
    assert torch.allclose(lora(e).up[0], 2.0 * lora.up[1])
    plain = TimeLoRA(6, 8, 5, rank=2, updates=1, alpha=4.0)
    nn.init.normal_(plain.up)
    expected = 2.0 * F.linear(F.linear(x, plain.down), plain.up[0])
    assert torch.allclose(plain(e).added(x), expected, atol=1e-5)


def test_routers_are_given_the_time_alone() -> None:
    """Labels and guidance change no width."""
    model = routed(replace(OPEN, tokens=False))
    taps, t = named(model.sites(), "choice"), torch.tensor([0.0, 500.0, 999.0])
    found = [
        run_with_taps(model, model, taps, (3, 8, 8), X, t, cond).taps
        for cond in (COND, model.unconditional(COND), Cond(label=torch.tensor([3, 3, 3])))
    ]
    for name in taps:
        assert all(torch.equal(other[name].group_mask, found[0][name].group_mask) for other in found)
    assert len({tuple(row) for row in torch.cat([found[0][n].group_mask for n in taps], 1).tolist()}) > 1


def drawn(model: Any, *policies: Any) -> Tensor:
    found: Tensor = ditkit.generate(model, [0, 1], seeds=(0, 1), steps=6, policies=policies).samples
    return found


def test_composes_with_forecasts_of_its_branches(tmp_path: Path) -> None:
    """A model that was saved under it is sampled under it; a forecast asks no router, and MACs of both multiply."""
    model = ditkit.load(routed(OPEN).save(tmp_path))
    own = drawn(model)
    assert not torch.equal(own, drawn(model, OPEN.exact()))
    assert torch.equal(drawn(model, OPEN.exact()), drawn(ditkit.load(tmp_path).adopt([])))
    cache = TaylorSeer(interval=3, order=1)
    costs = {}
    pattern = Neighbourhood(radius=2, block=8, kernel="cpu")
    arms = {"own": (), "cached": (cache,), "dense": (OPEN.exact(),), "patterned": (pattern,)}
    for name, policies in arms.items():
        with MacCounter() as counter:
            out = drawn(model, *policies)
        costs[name] = counter.total
        assert out.isfinite().all()
    assert costs["cached"] < costs["own"] < costs["dense"]
    assert torch.equal(drawn(model, TaylorSeer(interval=1)), own)


def test_receipts_say_what_was_done() -> None:
    samples = ditkit.generate(routed(OPEN), [0, 1], seeds=(0, 1), steps=4)
    (receipt,) = samples.receipts
    said = receipt.as_dict()
    assert said["inherent"] and said["sites"] == 6 and 0 < said["least"] <= said["work"] <= said["most"] < 1


def test_a_layer_that_cannot_be_cut_saves_nothing() -> None:
    """The receipt counts it whole, as it is computed; the attention between two such layers is saved all the same."""
    model = routed(replace(OPEN, tokens=False))
    blocks = routed_blocks(model.sites())
    whole = 3 * sum(sum(block.work(16)) for block in blocks)
    inside = 3 * sum(block.parts(16)[0][1] for block in blocks)
    with torch.no_grad():
        _, cut = called(model, X, True, count=True)
        for block in model.blocks:
            for layer in (block.attn.qkv, block.attn.out, block.mlp.inner, block.mlp.outer):
                layer.register_forward_hook(lambda *_: None)
        counted, remarks = called(model, X, True, count=True)
        with MacCounter() as dense:
            model(X, torch.full((3,), 0.6), COND)
    routers = 2 * 3 * 32 * 3
    done = counted.total - (dense.total - whole) - routers
    assert cut["work"] < 0.8 < remarks["work"] < 1
    assert done / whole == pytest.approx(remarks["work"], abs=1e-3) and done > whole - inside
    (receipt,) = ditkit.generate(model, [0], seeds=(0,), steps=2).receipts
    assert receipt.saved <= 2 * 2 * 3  # attentions at most: two evaluations of two lanes


class Pictures:
    def __len__(self) -> int:
        return 16

    def batch(self, indices: Tensor, rng: SampleRNG) -> tuple[Tensor, Cond]:
        return noise(16)[indices], Cond(label=indices % 4)


SHORT = Settings(
    steps=12, batch=4, learning_rate=3e-2, save_every=0, sheet_every=0, averages=(Constant(0.5),)
)


def run_of(folder: Path, terms: tuple[Any, ...], **changed: Any) -> DiT:
    model = DiT(TINY).adopt([DyDiT(width_bias=1.0, token_bias=1.0)])
    objective = Denoising(terms, clock=Stratified(4))
    return train(model, Pictures(), objective, replace(SHORT, **changed), folder)  # type: ignore[return-value]


def test_a_run_learns_its_budget_beside_the_complete_model(tmp_path: Path) -> None:
    terms = (Regression(), CompleteModel(), Budget(target=0.3, warmup=1, hold=0, weight=20.0))
    model = run_of(tmp_path, terms)
    with torch.no_grad():
        _, remarks = called(model, X, True, count=True)
    assert abs(remarks["work"] - 0.3) < 0.2
    lines = (tmp_path / "losses.jsonl").read_text().splitlines()
    assert '"CompleteModel"' in lines[0] and '"Budget"' in lines[-1]


def test_the_budget_is_of_the_whole_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loss and gradient are the same however many parts and processes share a batch, and strata."""
    monkeypatch.setattr(dydit_module, "gumbel", torch.zeros_like)
    found = {}
    for parts in (1, 4):
        model = routed(OPEN).train()
        objective = Denoising((Regression(), Budget(target=0.3, warmup=1, hold=0)), clock=Stratified(4))
        settings = replace(SHORT, batch=8, accumulate=parts)
        run = Training(model, Pictures(), objective, settings, tmp_path / str(parts))
        run.open({}, False)
        run.done = 1
        losses = run.gradients()
        found[parts] = losses, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    (one, whole), (four, parted) = found[1], found[4]
    assert one == pytest.approx(four, rel=1e-4) and one["Budget"] > 1e-4
    for name, gradient in whole.items():
        assert torch.allclose(gradient, parted[name], rtol=1e-3, atol=1e-5), name
    others = SimpleNamespace(num_processes=2, process_index=0, reduce=lambda mean, how: mean + 1)
    run.settings, run.accelerator = replace(settings, accumulate=1), others  # type: ignore[assignment]
    pool = run.pooled(run.indices())
    assert pool is not None and pool("Budget", torch.tensor(1.0)) == 2
    data = torch.zeros(2, 1)
    half = Batch(data=data, prediction=data, taps={}, pool=lambda mean: mean + 1)
    values = torch.tensor([0.2, 0.4], requires_grad=True)
    half.pooled(values).square().backward()
    assert values.grad is not None and torch.allclose(values.grad, torch.full((2,), 2 * 1.3 / 2))


def test_td_lora_learns_beside_the_complete_model(tmp_path: Path) -> None:
    """Complete is all heads, channels and tokens with the updates; exact is the network as it is without them."""
    policy = replace(OPEN, rank=2, alpha=2.0)
    model = routed(policy)
    whole, plain = (
        Trajectory(model.sites(), [p], 1, learned=model.learned) for p in (policy.whole(), policy.exact())
    )
    opened = routed(policy)
    with torch.no_grad():
        for routers in opened.learned["DyDiT"].values():  # type: ignore[operator]
            routers.width.bias.fill_(1e4)
            if routers.tokens is not None:
                routers.tokens[2].bias.fill_(1e4)
        t, call = torch.full((3,), 0.6), Call(0, 1, 0.6, layout=model.layout((3, 8, 8)))
        assert torch.allclose(model(X, t, COND, whole.run(call)), called(opened, X, True), atol=1e-5)
        assert torch.equal(model(X, t, COND, plain.run(call)), dense(model))
        assert not torch.allclose(called(opened, X, True), dense(model), atol=1e-3)
    run = Training(
        model.train(), Pictures(), Denoising((CompleteModel(),)), replace(SHORT, trained="dydit"), tmp_path
    )
    run.open({}, False)
    run.gradients()
    reached = {n.split(".")[3] for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {"first", "second"}
    with pytest.raises(ConfigError, match="CompleteModel needs weights to train that are there when DyDiT"):
        Training(
            routed(OPEN), Pictures(), Denoising((CompleteModel(),)), replace(SHORT, trained="dydit"), tmp_path
        )


def test_routers_that_nobody_holds_go_where_the_model_is() -> None:
    """Fresh ones follow the embedding of the time; those of a model stay where it has them."""
    model = routed(OPEN)
    (site,) = named(model.sites(), "timestep")
    for held in (None, model.learned["DyDiT"]):
        session: Any = OPEN.start(model.sites(), 1, held)
        session.enter(Call(0, 1, nan))[site](lambda: torch.empty(2, 32, device="meta"))
        assert all(weight.is_meta is (held is None) for weight in session.modules.parameters())


def test_a_step_of_too_large_a_gradient_changes_nothing(tmp_path: Path) -> None:
    before = DiT(TINY).adopt([DyDiT(width_bias=1.0, token_bias=1.0)])
    torch.manual_seed(0)
    state = {k: v.clone() for k, v in before.state_dict().items()}
    after = train(before, Pictures(), Denoising(), replace(SHORT, steps=2, skip_above=1e-9), tmp_path)
    assert all(torch.equal(value, state[name]) for name, value in after.state_dict().items())


@torch.no_grad()
def test_clips_are_routed() -> None:
    """Slices are masks over tokens of all frames, under rotary positions and normed keys; less is computed."""
    model = VideoDiT(VideoDiTConfig.tiny())
    g = torch.Generator().manual_seed(2)
    for weight in (*model.parameters(), *model.adopt([OPEN]).eval().learned.parameters()):
        weight.add_(0.3 * torch.randn(weight.shape, generator=g))
    x, cond = torch.randn(2, 3, 4, 8, 8, generator=g), Cond(label=torch.tensor([1, 4]))
    found = {}
    for name, t, policy in (("sliced", 0.6, OPEN), ("masked", nan, OPEN), ("dense", 0.6, OPEN.exact())):
        trajectory = Trajectory(model.sites(), [policy], 1, learned=model.learned)
        call = Call(0, 1, t, layout=model.layout((3, 4, 8, 8)))
        with MacCounter() as counter:
            out = trajectory.leave(call, model(x, torch.full((2,), 0.6), cond, trajectory.run(call)))
        found[name] = out, counter.total, trajectory.sessions[0].remarks.get("work", 1)
    (sliced, cost, share), (masked, _, _), (plain, whole, _) = found.values()
    assert torch.allclose(sliced, masked, atol=1e-5, rtol=1e-5) and not torch.allclose(
        sliced, plain, atol=1e-2
    )
    blocks = 2 * sum(sum(block.work(64)) for block in routed_blocks(model.sites()))
    routers = 2 * 2 * 64 * (32 * 2 + 2) + 2 * 2 * 32 * 3
    assert 0.2 < share < 0.9 and whole - cost + routers == pytest.approx((1 - share) * blocks, rel=0.01)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DyDiT(width=False, tokens=False), "leave nothing"),
        (lambda: Budget(target=0.0), "Budget: target=0.0"),
        (lambda: Budget(target=1.5), "Budget: target=1.5"),
        (lambda: DyDiT(share=1.5), "DyDiT: share=1.5"),
        (lambda: OPEN.blocks([Site("b", "branch")]), "no 'choice' sites"),
        (lambda: DyDiT(ratio=64).blocks(tiny_dit().sites()), "width of at least ratio=64"),
        (lambda: Denoising((Budget(),)).check(tiny_dit()), "Budget needs a policy that learns routes"),
        (lambda: Denoising(clock=Stratified(4)).check_batch(6), "batch=6 does not divide into strata=4"),
        (lambda: load_routers(tiny_dit(), {}), "not under DyDiT"),
    ],
)
def test_what_does_not_fit_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_routers_of_another_model_are_refused(tmp_path: Path) -> None:
    other: Mapping[str, Tensor] = routed(OPEN, heads=2).learned["DyDiT"].state_dict()
    with pytest.raises(CheckpointError, match=r"'blocks/0/attn/route.width.weight' is \(1, 32\), expected"):
        load_routers(routed(OPEN), other)
    with pytest.raises(ConfigError, match="this setting has"):
        routed(OPEN).adopt([replace(OPEN, keeps_first=False)])


def test_the_recipe_is_of_the_paper() -> None:
    recipe = dydit()
    assert recipe.policies == (DyDiT(),) and recipe.init == "fashion-dit"
    assert isinstance(recipe.objective, Denoising) and recipe.objective.clock == Stratified(4)
    assert DiTConfig.tiny().width >= DyDiT().ratio
