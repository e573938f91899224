"""DraftAttention against its specification: order, map, counts, bounds, padding, and the slow way over all pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil, floor, sqrt

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditkit.attention import Draft, Grouped
from ditkit.attention.draft import draft_map, pool_regions, region_order, strongest
from ditkit.bench.macs import MacCounter
from ditkit.caching import TaylorSeer
from ditkit.core.cond import Cond
from ditkit.core.errors import ConfigError, ConflictError
from ditkit.core.grid import Grid, image_of, sequence
from ditkit.core.policy import Claim, Policy, Session
from ditkit.core.run import Call, Handler, Site, attended
from ditkit.core.trajectory import Trajectory
from ditkit.hosts.view import view
from ditkit.ops.block_sparse_attention import attend_chosen, attend_reference, chooser_handle
from hosts_support import EVERY, run_steps
from patterns_support import predicted, prompt, tiny_clip_model

PATCH = (2, 4)
SMALL = Draft(sparsity=0.7, patch=PATCH, dense_share=0.0, block=8, kernel="cpu")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def regions_of(grid: Grid, patch: tuple[int, int]) -> list[list[int]]:
    """The tokens of each region by five loops; a region that reaches beyond the grid has fewer."""
    found = []
    for t in range(grid.frames):
        for a in range(ceil(grid.height / patch[0])):
            for b in range(ceil(grid.width / patch[1])):
                inside = []
                for y in range(a * patch[0], min((a + 1) * patch[0], grid.height)):
                    for x in range(b * patch[1], min((b + 1) * patch[1], grid.width)):
                        inside.append((t * grid.height + y) * grid.width + x)
                found.append(inside)
    return found


@dataclass(frozen=True)
class Slow(Policy):
    """The method token by token in the model's order, each sample and head for itself."""

    pattern: Draft

    def claims(self, sites: Sequence[Site]) -> Mapping[str, Claim]:
        return dict.fromkeys(attended(sites), "own")

    def start(self, sites: Sequence[Site], total: int, modules: nn.Module | None = None) -> SlowSession:
        return SlowSession(self.pattern, attended(sites))

    def exact(self) -> Slow:
        raise NotImplementedError


class SlowSession(Session):
    def __init__(self, pattern: Draft, streams: Mapping[str, str]) -> None:
        super().__init__()
        self.pattern, self.streams = pattern, streams

    def enter(self, call: Call) -> Mapping[str, Handler]:
        return {name: partial(self.core, call, stream) for name, stream in self.streams.items()}

    def core(
        self, call: Call, stream: str, fn: Handler, q: Tensor, k: Tensor, v: Tensor, *masks: Tensor
    ) -> Tensor:
        image, segments = image_of(call.layout), sequence(call.layout, stream)
        before = sum(part.length for part in segments[: segments.index(image)])
        regions = [before + torch.tensor(part) for part in regions_of(image.grid, self.pattern.patch)]
        pairs = torch.ones(*q.shape[:3], k.shape[2], dtype=torch.bool)
        for b in range(len(q)):
            for n in range(q.shape[1]):
                means = [torch.stack([x[b, n, part].double().mean(0) for part in regions]) for x in (q, k)]
                scores = (means[0] @ means[1].T / sqrt(q.shape[-1])).softmax(-1)
                dropped = floor(self.pattern.sparsity * len(regions) ** 2)
                least = -1.0 if dropped == 0 else scores.flatten().sort().values[dropped - 1]
                for i, j in (scores < least).nonzero().tolist():
                    pairs[b, n, regions[i][:, None], regions[j]] = False
        for mask in masks:
            pairs = pairs & F.pad(mask, (0, k.shape[2] - mask.shape[-1]), value=True)
        return attend_reference(q, k, v, pairs).out


@pytest.mark.parametrize("grid", [Grid(3, 4, 8), Grid(2, 5, 7), Grid(1, 8, 4)])
def test_the_order_is_five_loops_and_has_an_inverse(grid: Grid) -> None:
    plan = SMALL.plan(grid, 5)
    slots = region_order(grid, PATCH)
    cut = slots.view(-1, 8)
    assert [[t for t in row.tolist() if t >= 0] for row in cut] == regions_of(grid, PATCH)
    order = torch.arange(plan.queries) if plan.order is None else plan.order
    assert torch.equal(order[: len(slots)], slots)
    x = drawn(2, grid.length + 5, 3)
    assert torch.equal(x[:, order.clamp(min=0)][:, plan.inverse], x)  # with text behind, and a batch


def test_a_pooled_product_is_the_mean_of_the_products_of_its_tokens() -> None:
    q, k = drawn(2, 3, 64, 8, seed=1), drawn(2, 3, 64, 8, seed=2)
    products = (q @ k.mT).unflatten(2, (8, 8)).unflatten(4, (8, 8)).mean((3, 5))
    assert (pool_regions(q, 8) @ pool_regions(k, 8).mT - products).abs().max() < 1e-15 * 8


@pytest.mark.parametrize("sparsity", [0.0, 0.01, 1 / 64, 0.3, 0.5, 0.77, 0.9, 0.999])
def test_kept_blocks_are_those_of_the_formula(sparsity: float) -> None:
    kept = strongest(draft_map(drawn(3, 2, 8, 5, seed=1), drawn(3, 2, 8, 5, seed=2)), sparsity)
    expected = 64 if sparsity < 1 / 64 else 64 - floor(sparsity * 64) + 1
    assert kept.sum((2, 3)).eq(expected).all()
    by_row = strongest(drawn(3, 2, 8, 8), sparsity, "row").sum(3)
    assert by_row.eq(8 - max(floor(sparsity * 8) - 1, 0)).all()


def test_ties_at_the_threshold_are_kept() -> None:
    assert strongest(torch.full((1, 1, 4, 4), 0.25), 0.9).all()


def test_the_map_of_bfloat16_is_float32_so_that_ties_do_not_swell_it() -> None:
    """In bf16 a softmax over 256 regions has a few hundred values; in float32 a tie of 65,536 is one of two."""
    q, k = (drawn(1, 1, 2048, 16, seed=s).bfloat16() for s in (1, 2))
    pattern = Draft(sparsity=0.9, patch=PATCH, block=8)
    plan = pattern.plan(Grid(1, 32, 64), 0)
    formula = 256**2 - floor(0.9 * 256**2) + 1
    assert formula <= int(pattern.kept(plan, 2048, q, k).sum()) <= formula + 2
    coarse = strongest(draft_map(*(pool_regions(x, 8).bfloat16() for x in (q, k))), 0.9)
    assert int(coarse.sum()) > formula + 100


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("smooth", [0.0, 3.0])
def test_the_bounds_on_logits(seed: int, smooth: float) -> None:
    """The first on any input; the second with the largest |dropped mean| in place of the paper's t."""
    n, g, sparsity = 128, 8, 0.75
    wave = smooth * torch.sin(torch.arange(n).double() / 20)[:, None]
    q, k = (drawn(n, 8, seed=2 * seed + i) * 0.5 + wave for i in (0, 1))
    logits = q @ k.T / sqrt(8)
    means = logits.unflatten(0, (g, -1)).unflatten(2, (g, -1)).mean((1, 3))
    spread = means.repeat_interleave(n // g, 0).repeat_interleave(n // g, 1)
    delta = (logits - spread).abs().max()
    assert (logits - spread).norm() <= delta * n
    kept = strongest(means[None, None], sparsity)[0, 0]
    lost = logits * ~kept.repeat_interleave(n // g, 0).repeat_interleave(n // g, 1)
    assert lost.norm() <= n * (delta + means[~kept].abs().max()) * sqrt(sparsity)


def test_the_second_bound_is_false_as_it_is_printed() -> None:
    """Kept: a quarter of entries of 1. Dropped: entries of -10, which the threshold says nothing of."""
    n, g, r = 512, 8, 0.25
    means = torch.where(torch.arange(g**2) < ceil(r * g**2), 1.0, -10.0).view(g, g).double()
    logits = means.repeat_interleave(n // g, 0).repeat_interleave(n // g, 1)  # so delta is 0
    t = means.flatten().sort(descending=True).values[ceil(r * g**2) - 1]
    lost = logits * (logits < t)
    assert lost.norm() > n * t * sqrt(1 - r)
    assert lost.norm() <= n * means[means < t].abs().max() * sqrt(1 - r) * (1 + 1e-12)


def test_of_constant_patches_the_kept_blocks_are_those_of_most_mass() -> None:
    q, k = (drawn(2, 2, 12, 6, seed=s).repeat_interleave(8, 2) * 2 for s in (1, 2))
    mass = (q @ k.mT / sqrt(6)).softmax(-1)
    blocks = mass.unflatten(2, (12, 8)).unflatten(4, (12, 8)).sum(5)
    found = draft_map(pool_regions(q, 8), pool_regions(k, 8))
    assert (blocks - found[:, :, :, None]).abs().max() < 1e-12  # of every query row
    assert (mass - found.repeat_interleave(8, 2).repeat_interleave(8, 3) / 8).abs().max() < 1e-12
    kept = strongest(found, 0.8)
    count = int(kept[0, 0].sum())
    best = blocks.mean(3).flatten(2).topk(count).indices
    assert torch.equal(torch.zeros(2, 2, 144).scatter(2, best, 1.0).bool().view_as(kept), kept)


@pytest.mark.parametrize(("size", "text"), [((16, 16), 0), ((16, 16), 7), ((12, 20), 7), ((10, 14), 0)])
@pytest.mark.parametrize("sparsity", [0.7, 0.9])
def test_a_model_under_it_is_one_under_the_mask_of_every_pair(
    size: tuple[int, int], text: int, sparsity: float
) -> None:
    """Tokens stay in the order of patches through the whole network; the slow way never moves them."""
    model = tiny_clip_model(text, size=size)
    x = drawn(2, *model.sample_shape, seed=1)
    cond = prompt(2, (7, 3)) if text else Cond()
    pattern = Draft(sparsity=sparsity, patch=PATCH, dense_share=0.0, block=8, kernel="cpu")
    found, wanted, dense = (predicted(model, p, x, cond) for p in (pattern, Slow(pattern), None))
    assert (found - wanted).abs().max() < 1e-12
    assert (dense - wanted).abs().max() > 1e-3


def test_nothing_left_out_is_dense() -> None:
    model = tiny_clip_model(7)
    x, cond = drawn(2, *model.sample_shape, seed=1), prompt(2, (7, 3))
    pattern = Draft(sparsity=0.0, patch=PATCH, dense_share=0.0, block=8, kernel="cpu")
    assert (predicted(model, pattern, x, cond) - predicted(model, None, x, cond)).abs().max() < 1e-12


def test_a_region_of_several_blocks() -> None:
    q, k = drawn(1, 2, 128, 4, seed=1), drawn(1, 2, 128, 4, seed=2)
    coarse, fine = (Draft(sparsity=0.6, patch=(4, 8), block=b).plan(Grid(1, 8, 16), 0) for b in (32, 8))
    pattern = Draft(sparsity=0.6, patch=(4, 8), block=8)
    by_fine = pattern.kept(fine, 128, q, k)
    by_coarse = Draft(sparsity=0.6, patch=(4, 8), block=32).kept(coarse, 128, q, k)
    assert torch.equal(by_fine, by_coarse.repeat_interleave(4, 2).repeat_interleave(4, 3))


def test_what_stands_in_padding_changes_nothing() -> None:
    grid = Grid(2, 5, 7)
    plan = SMALL.plan(grid, 3)
    image, handle = plan.queries - 3, chooser_handle(SMALL)
    pad = plan.order < 0
    assert pad.any()
    outs = []
    for fill in (0.0, 1e3, -7.0):
        q, k, v = (drawn(2, 2, plan.queries, 4, seed=s).masked_fill(pad[:, None], fill) for s in (1, 2, 3))
        outs.append(attend_chosen(q, k, v, plan, handle, image, kernel="cpu")[0].out[:, :, plan.inverse])
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


def test_a_sample_chooses_for_itself() -> None:
    model = tiny_clip_model(7)
    x, cond = drawn(3, *model.sample_shape, seed=1), prompt(3, (7, 3, 5))
    together = predicted(model, SMALL, x, cond)
    for i in range(3):
        alone = predicted(
            model, SMALL, x[i : i + 1], Cond(text=cond.text[i : i + 1], text_mask=cond.text_mask[i : i + 1])
        )
        assert (together[i] - alone[0]).abs().max() < 1e-12


def test_rows_without_a_block_give_nothing_are_counted_and_can_be_filled() -> None:
    """Peaked rows take all places of the others; without text, as in Wan, those give 0, not NaN."""
    grid = Grid(1, 8, 16)
    scale = torch.tensor([9.0] * 4 + [0.1] * 12).double().repeat_interleave(8)[:, None]
    q, k, v = drawn(1, 1, 128, 4, seed=1) * scale, drawn(1, 1, 128, 4, seed=2), drawn(1, 1, 128, 4, seed=3)
    shares = {}
    for empty in ("none", "diagonal", "best"):
        pattern = Draft(sparsity=0.95, patch=PATCH, dense_share=0.0, block=8, kernel="cpu", empty=empty)
        plan = pattern.plan(grid, 0)
        found, measured = attend_chosen(q, k, v, plan, chooser_handle(pattern), 128, kernel="cpu")
        kept = pattern.kept(plan, 128, q, k)[0, 0]
        lost = ~kept.any(1)
        shares[empty] = measured[1].item()
        assert shares[empty] == lost.double().mean()
        assert found.out.isfinite().all()
        assert found.out.unflatten(2, (16, 8))[0, 0, lost].abs().sum() == 0
        if empty == "none":
            faithful, empties = kept, lost
        else:
            added = kept & ~faithful
            assert torch.equal(added.any(1), empties) and added.sum() == empties.sum()
            draft = draft_map(pool_regions(q, 8), pool_regions(k, 8))[0, 0]
            own = torch.arange(16) if empty == "diagonal" else draft.argmax(1)
            assert torch.equal(added.long().argmax(1)[empties], own[empties])
    assert shares["none"] > 0.3 and shares["diagonal"] == shares["best"] == 0
    with_text = SMALL.plan(grid, 4)
    q, k, v = (F.pad(x, (0, 0, 0, 4)) for x in (q, k, v))
    assert attend_chosen(q, k, v, with_text, chooser_handle(SMALL), 128, kernel="cpu")[1][1] == 0


def outcome(
    policies: Sequence[Policy], steps: int = 8, size: tuple[int, int] = (16, 16)
) -> tuple[Tensor, Trajectory]:
    model = tiny_clip_model(size=size)
    x = drawn(1, *model.sample_shape, seed=1)
    trajectory = Trajectory(model.sites(), policies, steps)
    for index in range(steps):
        call = Call(index, steps, 1 - index / steps, layout=model.layout(tuple(x.shape[1:])))
        t = torch.full((1,), call.t).double()
        with torch.no_grad():
            x = x - trajectory.leave(call, model(x, t, Cond(), trajectory.run(call))) / steps
    return x, trajectory


def test_the_schedule_of_the_paper_and_that_of_the_code() -> None:
    def sparse(pattern: Draft) -> str:
        (receipt,) = outcome([pattern])[1].finish()
        return receipt.as_dict()["lanes"]["cond"].get("sparse", "")

    setting = {"sparsity": 0.7, "patch": PATCH, "block": 8, "kernel": "cpu"}
    assert sparse(Draft(**setting)) == "2-7"  # type: ignore[arg-type]
    assert sparse(Draft(**setting, dense_share=0.3)) == "3-7"  # type: ignore[arg-type]
    assert sparse(Draft(**setting, dense_share=0.0, dense_above=0.7)) == "3-7"  # type: ignore[arg-type]
    assert sparse(Draft(**setting, dense=(0,))) == "2-7"  # type: ignore[arg-type]


def test_evaluations_of_the_dense_share_change_no_bit() -> None:
    """Where patches as wide as the grid leave tokens where they are."""
    pattern = Draft(sparsity=0.7, patch=(1, 8), block=8, kernel="cpu", dense_share=0.5)
    assert pattern.plan(Grid(4, 8, 8), 0).order is None
    model = tiny_clip_model(size=(16, 16))
    x = drawn(1, *model.sample_shape, seed=1)
    for index, is_dense in ((0, True), (1, True), (2, False)):
        found = predicted(model, pattern, x, Cond(), index=index)
        assert torch.equal(found, predicted(model, None, x, Cond(), index=index)) == is_dense
    with pytest.raises(ConfigError, match=r"dense_share=0.9 leaves none of total=4 evaluations sparse"):
        predicted(model, Draft(sparsity=0.7, patch=(1, 8), block=8, dense_share=0.9), x, Cond())


def test_clips_of_other_lengths_in_one_trajectory_each_have_their_plan() -> None:
    found = []
    for frames in (4, 2):
        model = tiny_clip_model(frames=frames, size=(16, 16))
        x = drawn(1, *model.sample_shape, seed=frames)
        trajectory = Trajectory(model.sites(), [SMALL], 4)
        for count in (4, 2):  # a session that has met a longer clip before
            other = tiny_clip_model(frames=count, size=(16, 16))
            y = x if count == frames else drawn(1, *other.sample_shape, seed=count)
            call = Call(0, 4, 0.5, layout=other.layout(tuple(y.shape[1:])))
            with torch.no_grad():
                out = other(y, torch.full((1,), 0.5).double(), Cond(), trajectory.run(call))
            out = trajectory.leave(call, out)
            if count == frames:
                found.append(torch.equal(out, predicted(other, SMALL, y, Cond())))
    assert found == [True, True]


def test_macs_are_those_of_the_blocks_and_of_the_map() -> None:
    plan = SMALL.plan(Grid(1, 16, 16), 0)
    q, k, v = (drawn(2, 3, 256, 4, seed=s) for s in (1, 2, 3))
    with MacCounter() as counter:
        attend_chosen(q, k, v, plan, chooser_handle(SMALL), 256, kernel="cpu")
    blocks = 32**2 - floor(0.7 * 32**2) + 1
    assert counter.total == 6 * (blocks * 64 * 8 + 32**2 * 4)
    assert SMALL.share(plan, 256) == pytest.approx(blocks / 32**2)


def test_the_share_that_is_foreseen_with_text_and_padding() -> None:
    pattern = Draft(sparsity=0.75, patch=PATCH, block=8, empty="none")
    plan, handle = pattern.plan(Grid(2, 7, 10), 11), chooser_handle(pattern)
    image = plan.queries - 11
    q, k, v = (drawn(1, 2, plan.queries, 4, seed=s) for s in (1, 2, 3))
    _, measured = attend_chosen(q, k, v, plan, handle, image, kernel="cpu")
    assert pattern.share(plan, image) == pytest.approx(measured[0].item())


def test_gradients_are_those_of_the_mask_with_the_choice_as_given() -> None:
    plan = SMALL.plan(Grid(1, 8, 8), 0)
    q, k, v = (drawn(1, 2, 64, 4, seed=s) for s in (1, 2, 3))
    kept = SMALL.kept(plan, 64, q, k)
    pairs = kept.repeat_interleave(8, 2).repeat_interleave(8, 3)
    grads = []
    for attend in (
        lambda *x: attend_chosen(*x, plan, chooser_handle(SMALL), 64, kernel="cpu")[0].out,
        lambda *x: attend_reference(*x, pairs).out,
    ):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        attend(*leaves).square().sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("name", ["wan", "cogvideox 2b", "cogvideox"])
def test_on_hosts_it_is_the_slow_way(name: str) -> None:
    """Wan's clip of 2 x 3 x 4 tokens and CogVideoX's of 3 x 4 x 6, none of which patches divide."""

    def stepped(policies: list[Policy]) -> tuple[Tensor, Trajectory]:
        family = EVERY[name]
        return run_steps(family, view(family.transformer()), family.inputs(), policies)

    (found, trajectory), (wanted, _), (dense, _) = map(stepped, ([SMALL], [Slow(SMALL)], []))
    (receipt,) = trajectory.finish()
    assert receipt.as_dict()["lanes"]["cond"]["sparse"] == "0-7"
    assert (found - wanted).norm() < 1e-5 * dense.norm() < 1e-2 * (dense - wanted).norm()


def test_with_a_cache_it_is_the_cache_of_the_slow_model() -> None:
    cache = TaylorSeer(interval=3, order=1, warmup=2)
    (found, trajectory), (wanted, _) = outcome([cache, SMALL]), outcome([cache, Slow(SMALL)])
    assert (found - wanted).abs().max() < 1e-10
    forecast, sparse = (receipt.as_dict()["lanes"]["cond"] for receipt in trajectory.finish())
    assert forecast["computed"] == sparse["sparse"]


def test_another_pattern_is_refused_by_name() -> None:
    with pytest.raises(ConflictError, match="Draft and Grouped both own 'rows'"):
        Trajectory(tiny_clip_model().sites(), [SMALL, Grouped()], 4)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"sparsity": 1.0}, "sparsity=1.0 should lie in [0, 1)"),
        ({"patch": (3, 5)}, "patch=3+5 of 15 tokens, expected a multiple of block=128"),
        ({"patch": (8, 16, 1)}, "patch=(8, 16, 1) should be a tuple of 2 integers"),
        ({"threshold": "column"}, "unknown threshold 'column'"),
        ({"dense_share": 1.0}, "dense_share=1.0 should lie in [0, 1)"),
    ],
)
def test_bad_settings(given: dict[str, object], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Draft(**given)  # type: ignore[arg-type]
    assert line in str(caught.value)
