"""SLA against its definition, token by token: classes, both branches, gradients, padding, hosts, training, refusals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ditkit
from ditkit.attention import Grouped, SparseLinear
from ditkit.attention.sparse_linear import (
    CRITICAL,
    MARGINAL,
    NEGLIGIBLE,
    Mixing,
    OutputMap,
    attend_linear,
    block_scores,
    real_slots,
)
from ditkit.caching import TaylorSeer
from ditkit.core.cond import Cond
from ditkit.core.errors import ConfigError, ConflictError, ShapeError
from ditkit.core.grid import Grid, image_of, sequence
from ditkit.core.policy import Claim, Policy, Session, site_key
from ditkit.core.run import Call, Handler, Site, attended
from ditkit.core.trajectory import Trajectory
from ditkit.hosts.view import view
from ditkit.ops.block_sparse_attention import attend_reference
from ditkit.ops.linear_attention import block_linear_attention, divide, feature_map
from hosts_support import EVERY, run_steps
from patterns_support import predicted, prompt, tiny_clip_model

SMALL = SparseLinear(critical=0.2, negligible=0.3, block=8, kernel="cpu")
VARIANTS = {
    "paper": SMALL,
    "sla1": replace(SMALL, variant="sla1", negligible=0.0),
    "main": replace(SMALL, variant="main", negligible=0.0),
    "elu": replace(SMALL, feature="elu"),
    "relu": replace(SMALL, feature="relu"),
}
every_variant = pytest.mark.parametrize("policy", VARIANTS.values(), ids=VARIANTS)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one_core(width: int) -> tuple[Site, ...]:
    return Site("tokens", "tokens"), Site("core", "core", width=width, heads=1), Site("head", "head")


def learned(width: int, seed: int = 9) -> OutputMap:
    output = OutputMap(width).double()
    with torch.no_grad():
        output.weight.copy_(drawn(width, width, seed=seed) / 3)
        output.bias.copy_(drawn(width, seed=seed + 1) / 3)
    return output


def in_slots(policy: SparseLinear, grid: Grid, x: Tensor) -> Tensor:
    plan = policy.plan(grid, x.shape[2] - grid.length)
    order = torch.arange(x.shape[2]) if plan.order is None else plan.order.clamp(min=0)
    return x[:, :, order]


def mixed(policy: SparseLinear, output: OutputMap, grid: Grid, *qkv: Tensor) -> Tensor:
    """Attention of an image of these tokens, in the model's order."""
    plan = policy.plan(grid, 0)
    session = policy.start(one_core(qkv[0].shape[-1]), 1)
    assert isinstance(session, Mixing)
    q, k, v = (in_slots(policy, grid, x) for x in qkv)
    return session.mix(plan, plan.queries, output, q, k, v, None)[:, :, plan.inverse]


def slow_classes(
    policy: SparseLinear, q: Tensor, k: Tensor, seen: Tensor, blocks: list[Tensor], image: int
) -> Tensor:
    """Classes of one head by loops over blocks of tokens; the mean of keys is not taken away."""
    n = len(blocks)
    means = [
        torch.stack([x[part[seen[part]]].mean(0) if seen[part].any() else x[0] * 0 for part in blocks])
        for x in (q, k)
    ]
    scores = (means[0] @ means[1].T / sqrt(q.shape[-1])).softmax(-1)
    found = torch.zeros(n, n, dtype=torch.int8)
    critical = max(1, int(policy.critical * n))
    worst = min(int(policy.negligible * n), n - critical) if policy.variant == "paper" else 0
    held = [j for j in range(n) if seen[blocks[j]].any()]
    for i in range(n):
        order = sorted(held, key=scores[i].__getitem__)
        for j in order[:worst]:
            found[i, j] = NEGLIGIBLE
        for j in order[::-1][:critical]:
            found[i, j] = CRITICAL
        for j in range(n):
            if policy.protect and j >= image:
                found[i, j] = CRITICAL
            if j not in held:
                found[i, j] = NEGLIGIBLE
    return found


def slow_attention(policy: SparseLinear, output: nn.Module, q: Tensor, k: Tensor, v: Tensor, seen: Tensor,
                   blocks: list[Tensor], image: int, classes: Tensor | None = None) -> Tensor:  # fmt: skip
    """One head [L, K] under masks of every pair, by torch's operations alone."""
    if classes is None:
        classes = slow_classes(policy, q.detach(), k.detach(), seen, blocks, image)
    kinds = torch.full((len(q), len(k)), NEGLIGIBLE, dtype=torch.int8)
    for i, rows in enumerate(blocks):
        for j, columns in enumerate(blocks):
            kinds[rows[:, None], columns] = classes[i, j]
    kinds[:, ~seen] = NEGLIGIBLE
    sparse = attend_reference(q[None, None], k[None, None], v[None, None], kinds == CRITICAL).out[0, 0]
    a, b = (feature_map(x, policy.feature) for x in (q, k))
    if policy.variant == "main":
        weight = (a @ b.T) * seen
        linear = weight @ v / (weight.sum(-1, keepdim=True) + 1e-5)
    else:
        weight = (a @ b.T) * (kinds == MARGINAL)
        total = weight.sum(-1, keepdim=True)
        linear = weight @ v / total.masked_fill(total == 0, torch.inf)
    return sparse + output(linear)


@dataclass(frozen=True)
class Slow(Policy):
    """The method token by token in the model's order, each sample and head for itself."""

    policy: SparseLinear
    maps: Any = None

    def claims(self, sites: Sequence[Site]) -> Mapping[str, Claim]:
        return dict.fromkeys(attended(sites), "own")

    def start(self, sites: Sequence[Site], total: int, modules: nn.Module | None = None) -> SlowSession:
        return SlowSession(self, attended(sites), self.maps or self.policy.modules(sites))

    def exact(self) -> Slow:
        raise NotImplementedError


class SlowSession(Session):
    def __init__(self, slow: Slow, streams: Mapping[str, str], maps: Any) -> None:
        super().__init__()
        self.policy, self.streams, self.maps = slow.policy, streams, maps

    def enter(self, call: Call) -> Mapping[str, Handler]:
        return {name: partial(self.core, call, name) for name in self.streams}

    def core(
        self, call: Call, name: str, fn: Handler, q: Tensor, k: Tensor, v: Tensor, *masks: Tensor
    ) -> Tensor:
        segments = sequence(call.layout, self.streams[name])
        image = image_of(call.layout)
        before = sum(part.length for part in segments[: segments.index(image)])
        slots = self.policy.slots(image.grid)
        parts = [before + row[row >= 0] for row in slots.view(-1, self.policy.block)]
        others = torch.cat((torch.arange(before + image.length, q.shape[2]), torch.arange(before)))
        blocks = parts + list(others.split(self.policy.block)) if len(others) else parts
        seen = torch.ones(len(q), k.shape[2], dtype=torch.bool)
        for mask in masks:
            visible = mask[:, 0, 0] if mask.dtype == torch.bool else mask[:, 0, 0] == 0
            seen[:, : visible.shape[-1]] &= visible
        output = self.maps[site_key(name)]
        out = torch.zeros_like(q)
        for b in range(len(q)):
            for n in range(q.shape[1]):
                one = slow_attention(
                    self.policy, output, q[b, n], k[b, n], v[b, n], seen[b], blocks, len(parts)
                )
                out[b, n] = one
        return out


GRID = Grid(1, 1, 45)
"""Six blocks, the last of five tokens."""


def test_with_a_map_of_zero_it_is_the_sparse_branch_and_with_all_blocks_dense() -> None:
    q, k, v = (drawn(2, 2, 45, 6, seed=s) for s in range(3))
    for policy in VARIANTS.values():
        every = replace(policy, critical=1.0, negligible=0.0)
        assert (
            mixed(every, OutputMap(6).double(), GRID, q, k, v) - attend_reference(q, k, v).out
        ).abs().max() < 1e-14
    plan, sla1 = SMALL.plan(GRID, 0), VARIANTS["sla1"]
    kept = sla1.kept(plan, 48, *(in_slots(sla1, GRID, x) for x in (q, k)))
    pairs = kept.repeat_interleave(8, 2).repeat_interleave(8, 3)[:, :, :45, :45]
    assert kept.sum(-1).eq(1).all()
    found = mixed(sla1, OutputMap(6).double(), GRID, q, k, v)
    assert (found - attend_reference(q, k, v, pairs).out).abs().max() < 1e-14


def test_without_a_marginal_block_the_linear_branch_is_zero_and_no_nan() -> None:
    q, k, v = (drawn(1, 1, 45, 6, seed=s).requires_grad_() for s in range(3))
    every = replace(VARIANTS["sla1"], critical=1.0)
    output = learned(6)
    found = mixed(every, output, GRID, q, k, v)
    assert (found - attend_reference(q, k, v).out - output.bias).abs().max() < 1e-14
    assert all(g.isfinite().all() for g in torch.autograd.grad(found.sum(), (q, k, v)))


def test_with_nothing_critical_both_codes_are_plain_linear_attention() -> None:
    q, k, v = (drawn(1, 2, 48, 6, seed=s) for s in range(3))
    a, b = (feature_map(x, "softmax") for x in (q, k))
    plain = a @ (b.mT @ v) / (a * b.sum(2, keepdim=True)).sum(-1, keepdim=True)
    every = torch.ones(1, 2, 6, 6, dtype=torch.bool)
    assert (divide(block_linear_attention(a, b, v, every, (8, 8))) - plain).abs().max() < 1e-14
    assert (attend_linear(a, b, v) - plain).abs().max() < 1e-5  # it adds 1e-5 to a denominator of about 8
    assert (attend_linear(a, b, v) - plain).abs().max() > 1e-8


@every_variant
def test_gradients_are_those_of_the_masks_of_every_pair_with_a_ragged_tail(policy: SparseLinear) -> None:
    leaves = [drawn(1, 1, 45, 6, seed=s).requires_grad_() for s in range(3)]
    output, weight = learned(6), drawn(45, 6, seed=5)
    blocks, seen = list(torch.arange(45).split(8)), torch.ones(45, dtype=torch.bool)
    plan = policy.plan(GRID, 0)
    q, k, v = (x[0, 0] for x in leaves)
    slots = [in_slots(policy, GRID, x) for x in leaves[:2]]
    (classes,) = policy.classes(48, slots[0], slots[1], real_slots(plan, None, q)).flatten(0, 1)
    assert torch.equal(classes, slow_classes(policy, q.detach(), k.detach(), seen, blocks, 6))
    grads = []
    for found in (
        mixed(policy, output, GRID, *leaves)[0, 0],
        slow_attention(policy, output, q, k, v, seen, blocks, 6, classes),
    ):
        grads.append((found, *torch.autograd.grad((found * weight).sum(), (*leaves, *output.parameters()))))
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("policy", [VARIANTS["paper"], VARIANTS["main"]], ids=["paper", "main"])
def test_gradients_are_finite_differences(policy: SparseLinear) -> None:
    """Of q, k, v, W and b, in 17 tokens of three blocks, one of each class; the choice is far from a tie."""
    grid = Grid(1, 1, 17)
    leaves = [drawn(1, 1, 17, 2, seed=s).requires_grad_() for s in range(3)]
    output, policy = learned(2), replace(policy, negligible=0.4 if policy.variant == "paper" else 0.0)

    session, plan = policy.start(one_core(2), 1), policy.plan(grid, 0)
    assert isinstance(session, Mixing) and plan.order is not None
    order = plan.order.clamp(min=0)

    def attention(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        applied: Any = lambda x: F.linear(x, weight, bias)  # noqa: E731
        q, k, v = (x[:, :, order] for x in (q, k, v))
        return session.mix(plan, plan.queries, applied, q, k, v, None)[:, :, plan.inverse]

    parameters = [p.detach().clone().requires_grad_() for p in output.parameters()]
    assert torch.autograd.gradcheck(attention, (*leaves, *parameters))


@every_variant
def test_at_its_start_features_learn_nothing_and_the_map_does(policy: SparseLinear) -> None:
    q, k, v = (drawn(1, 1, 45, 6, seed=s).requires_grad_() for s in range(3))
    output = OutputMap(6).double()
    found = mixed(policy, output, GRID, q, k, v)
    sparse = attend_only(policy, q, k, v)
    assert torch.equal(found, sparse)
    grads, alone = (
        torch.autograd.grad((x * drawn(45, 6, seed=4)).sum(), (q, k, v), retain_graph=True)
        for x in (found, sparse)
    )
    assert all(torch.equal(a, b) for a, b in zip(grads, alone, strict=True))  # nothing comes through phi
    weight, bias = torch.autograd.grad((found * drawn(45, 6, seed=4)).sum(), list(output.parameters()))
    assert weight.abs().max() > 1e-3 and bias.abs().max() > 1e-3


def attend_only(policy: SparseLinear, *qkv: Tensor) -> Tensor:
    """The sparse branch."""
    from ditkit.ops.block_sparse_attention import attend_mapped

    plan = policy.plan(GRID, 0)
    q, k, v = (in_slots(policy, GRID, x) for x in qkv)
    return attend_mapped(q, k, v, plan, policy.kept(plan, 48, q, k), kernel="cpu").out[:, :, plan.inverse]


def test_the_router_is_the_slow_one_and_a_vector_added_to_all_keys_changes_nothing() -> None:
    q, k = (drawn(2, 3, 80, 5, seed=s) for s in range(2))
    blocks, seen = list(torch.arange(80).split(8)), torch.ones(80, dtype=torch.bool)
    for critical, negligible in ((0.05, 0.1), (0.3, 0.3), (0.5, 0.5), (1.0, 0.0), (0.29, 0.0)):
        policy = replace(SMALL, critical=critical, negligible=negligible)
        found = policy.classes(80, q, k, None)
        shifted = policy.classes(80, q, k + 100 * drawn(5, seed=8), None)
        assert torch.equal(found, shifted)
        slow = slow_classes(policy, q[1, 2], k[1, 2], seen, blocks, 10)
        assert torch.equal(found[1, 2], slow)
        counts = [(found == kind).sum(-1) for kind in (CRITICAL, MARGINAL, NEGLIGIBLE)]
        assert counts[0].eq(max(1, int(critical * 10))).all() and counts[2].eq(int(negligible * 10)).all()
        assert (counts[0] + counts[1] + counts[2]).eq(10).all()
        assert policy.share(policy.plan(Grid(1, 8, 10), 0), 80) == max(1, int(critical * 10)) / 10


def test_taking_the_mean_of_keys_away_spares_rounding() -> None:
    q, k = (drawn(1, 1, 128, 8, seed=s).float() for s in range(2))
    far = k + 1000
    exact = block_scores(q.double(), far.double(), 8, None)[0]
    smooth = block_scores(q, far, 8, None)[0]
    raw = q.unflatten(2, (-1, 8)).mean(3) @ far.unflatten(2, (-1, 8)).mean(3).mT
    errors = [x - x.mean(-1, keepdim=True) for x in (smooth.double() - exact, raw.double() - exact)]
    assert errors[0].norm() < errors[1].norm() / 4


TILES = [(1, 1, 1), (1, 2, 4), (2, 2, 2)]
MODELS = [(name, tile, text) for name in ("paper", "sla1", "main") for tile in TILES for text in (0, 7)]


def test_autocast_leaves_sums_of_states_and_scores_in_float32() -> None:
    q, k, v = (torch.randn(1, 2, 40, 8).bfloat16() for _ in range(3))
    q, k = q.abs(), k.abs()
    with torch.autocast("cpu", torch.bfloat16):
        cast = attend_linear(q, k, v), block_scores(q, k, 8, None)[0]
    plain = attend_linear(q, k, v), block_scores(q, k, 8, None)[0]
    for a, b in zip(cast, plain, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


@pytest.mark.parametrize(("variant", "tile", "text"), [*MODELS, ("elu", TILES[0], 7), ("relu", TILES[0], 7)])
def test_a_model_under_it_is_one_token_by_token(variant: str, tile: tuple[int, int, int], text: int) -> None:
    """In raster order or tiles, beyond a grid of 2 x 5 x 6, with prompts of 7 and 3 rows and random maps."""
    model = tiny_clip_model(text, frames=2, size=(10, 12))
    policy = replace(VARIANTS[variant], tile=tile, protect=tile == (2, 2, 2))
    maps = policy.modules(model.sites())
    assert maps is not None
    for place, output in enumerate(maps.values()):
        output.load_state_dict(learned(12, seed=20 + place).state_dict())
    maps.double()
    x = drawn(2, *model.sample_shape, seed=1)
    cond = prompt(2, (7, 3)) if text else Cond()
    found = predicted(model, policy, x, cond, learned=nn.ModuleDict({"SparseLinear": maps}))
    slow, dense = predicted(model, Slow(policy, maps), x, cond), predicted(model, None, x, cond)
    assert (found - slow).abs().max() < 1e-11
    assert (dense - slow).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["wan", "cogvideox", "hunyuan-video"])
def test_on_hosts_it_is_the_slow_way(name: str) -> None:
    """Joint sequences with text before the clip and behind it, and masks of prompts."""
    policy = replace(SMALL, critical=0.3)

    def stepped(policies: list[Policy]) -> tuple[Tensor, Trajectory]:
        family = EVERY[name]
        return run_steps(family, view(family.transformer()), family.inputs(), policies, steps=2)

    found, trajectory = stepped([policy])
    (wanted, _), (dense, _) = stepped([Slow(policy)]), stepped([])
    (receipt,) = trajectory.finish()
    assert receipt.as_dict()["lanes"]["cond"]["sparse"] == "0-1"
    assert (found - wanted).norm() < 1e-5 * dense.norm() < 1e-2 * (dense - wanted).norm()


def test_with_a_cache_it_is_the_cache_of_the_slow_model() -> None:
    model = tiny_clip_model(frames=2)
    cache = TaylorSeer(interval=3, order=1, warmup=2)

    def outcome(policy: Policy) -> Tensor:
        x = drawn(1, *model.sample_shape, seed=1)
        trajectory = Trajectory(model.sites(), [cache, policy], 6)
        for index in range(6):
            call = Call(index, 6, 1 - index / 6, layout=model.layout(tuple(x.shape[1:])))
            with torch.no_grad():
                out = model(x, torch.full((1,), call.t).double(), Cond(), trajectory.run(call))
            x = x - trajectory.leave(call, out) / 6
        return x

    assert (outcome(SMALL) - outcome(Slow(SMALL))).abs().max() < 1e-10


def test_another_pattern_is_refused_by_name() -> None:
    with pytest.raises(ConflictError, match="SparseLinear and Grouped both own 'rows'"):
        Trajectory(tiny_clip_model().sites(), [SMALL, Grouped()], 4)


def trained(tmp_path: Path) -> Any:
    """A model with random maps, saved and loaded."""
    model = tiny_clip_model(frames=2).float().adopt([SMALL])
    for place, output in enumerate(model.learned["SparseLinear"].values()):  # type: ignore[operator]
        output.load_state_dict(learned(12, seed=place).state_dict())
    return ditkit.load(model.save(tmp_path))


def test_a_model_that_was_fine_tuned_so_is_sampled_so_unless_it_is_named(tmp_path: Path) -> None:
    model = trained(tmp_path)
    assert '"sparselinear:' in (tmp_path / "config.json").read_text()
    assert "variant" not in (tmp_path / "config.json").read_text()  # the default is the paper's

    def generated(*policies: Policy) -> Tensor:
        return ditkit.generate(model, seeds=(0,), steps=3, guidance=1.0, policies=policies).samples

    own, dense = generated(), generated(SMALL.exact())
    assert torch.equal(own, generated(SMALL)) and not torch.equal(own, dense)
    fewer = generated(replace(SMALL, critical=0.1))
    assert not torch.equal(fewer, own)
    with pytest.raises(
        ConfigError, match=r"variant=main,feature=softmax .* fine-tuned under variant=paper,feature=softmax"
    ):
        generated(VARIANTS["main"])


def test_maps_of_another_model_are_refused(tmp_path: Path) -> None:
    model = trained(tmp_path)
    for other, line in (
        (tiny_clip_model(depth=3), r"the map 'blocks/2/attn/core.weight' is None, expected \[12, 12\]"),
        (tiny_clip_model(heads=3), r"is \[12, 12\], expected \[8, 8\]: it was fine-tuned with another model"),
    ):
        with pytest.raises(ConfigError, match=line):
            Trajectory(other.sites(), [SMALL], 4, learned=model.learned)
    (tmp_path / "config.json").write_text(
        (tmp_path / "config.json").read_text().replace('"sparselinear:', '"grouped:')
    )
    with pytest.raises(ditkit.errors.DitkitError):
        ditkit.load(tmp_path)


def test_a_clip_of_another_length_is_refused_before_its_first_block() -> None:
    trajectory = Trajectory(tiny_clip_model().sites(), [SMALL], 4)
    for frames in (4, 2):
        model = tiny_clip_model(frames=frames)
        call = Call(0, 4, 0.5, layout=model.layout(model.sample_shape))
        if frames == 4:
            trajectory.run(call)
            continue
        with pytest.raises(
            ShapeError, match=r"2 x 6 x 10 tokens after 4 x 6 x 10, expected the same frames and size"
        ):
            trajectory.run(call)


def test_a_mask_that_leaves_nothing_is_refused_before_the_first_block() -> None:
    model = tiny_clip_model()
    (image,) = model.layout(model.sample_shape)
    valid = torch.ones(2, image.length, dtype=torch.bool)
    valid[1] = False
    call = Call(0, 4, 0.5, layout=(image._replace(valid=valid),))
    with pytest.raises(ShapeError, match="a mask leaves none of a sample's tokens"):
        Trajectory(model.sites(), [SMALL], 4).run(call)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"critical": 1.5}, "critical=1.5 should lie in [0, 1]"),
        (
            {"critical": 0.6, "negligible": 0.5},
            "critical=0.6 and negligible=0.5, expected at most 1 together",
        ),
        ({"variant": "main", "negligible": 0.2}, "negligible=0.2, expected none: variant=main"),
        ({"variant": "sla2"}, "unknown variant 'sla2'"),
        ({"feature": "hedgehog"}, "unknown feature 'hedgehog'"),
        ({"block": 48}, "block=48"),
    ],
)
def test_bad_settings(given: dict[str, object], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SparseLinear(**given)  # type: ignore[arg-type]
    assert line in str(caught.value)


def test_int8_and_compiled_blocks() -> None:
    """To the bit with a backend that changes nothing and refuses breaks."""
    from test_composition import GRAPHS, compiled, in_int8

    torch._dynamo.reset()
    GRAPHS.clear()
    case, policy = EVERY["wan"], replace(SMALL, critical=0.3)
    outcomes = []
    for changes in ((), (in_int8,), (in_int8, compiled)):
        model = case.transformer()
        for change in changes:
            change(model)
        outcomes.append(run_steps(case, view(model), case.inputs(), [policy], steps=2)[0])
    float32, eager, found = outcomes
    assert 1e-5 < (eager - float32).norm() / float32.norm() < 0.1
    assert torch.equal(found, eager) and GRAPHS


def test_plan_knows_it_and_compare_refuses_another_variant_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ditkit.cli.main import main

    trained(tmp_path)
    text = "sparselinear:critical=0.2,negligible=0.3,block=8,kernel=cpu"
    assert main(["plan", "--policy", text, "--grid", "2x6x10"]) == 0
    assert "sparselinear" in capsys.readouterr().out
    assert main(["compare", str(tmp_path), "--steps", "2", "--policy", "sparselinear:variant=main"]) == 2
    error = capsys.readouterr().err
    assert "fine-tuned under variant=paper" in error and error.count("\n") == 1
