"""Patterns that choose blocks from queries and keys, against masks of every pair that are chosen the slow way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditkit.attention.dynamic import Dynamic
from ditkit.attention.pattern import append_dense_rows
from ditkit.caching.taylorseer import TaylorSeer
from ditkit.core.cond import Cond
from ditkit.core.errors import ShapeError
from ditkit.core.grid import Grid, image_of, sequence
from ditkit.core.policy import Claim, Policy, Session
from ditkit.core.run import Call, Handler, Site, attended
from ditkit.core.trajectory import Trajectory
from ditkit.ops.block_sparse_attention import (
    BlockPlan,
    attend,
    attend_reference,
    build_plan,
    chooser_handle,
    narrowed,
)
from ditkit.sample import Sampler
from patterns_support import predicted, prompt, tiny_clip_model

BLOCK, EACH = 16, 2


@dataclass(frozen=True)
class Strongest(Dynamic):
    """A block's own keys and those `each` blocks whose mean key its mean query likes best; text sees all."""

    each: int = EACH

    def plan(self, grid: Grid, others: int) -> BlockPlan:
        slots = F.pad(torch.arange(grid.length), (0, -grid.length % self.block), value=-1)
        blocks = len(slots) // self.block
        order, kept = append_dense_rows(
            slots, torch.ones(blocks, blocks, dtype=torch.bool), others, self.block
        )
        return build_plan(len(slots) + others, block=self.block, order=order, kept=kept)

    def share(self, plan: BlockPlan, image: int) -> float:
        return min(1.0, (self.each + 2) / plan.blocks[1])

    def kept(self, plan: BlockPlan, image: int, q: Tensor, k: Tensor) -> Tensor:
        blocks = image // self.block
        real = plan.real[:blocks, :, None].to(q)
        mean = [
            (x[:, :, : blocks * self.block].unflatten(2, (blocks, -1)) * real).sum(3) / real.sum(1)
            for x in (q, k)
        ]
        best = (mean[0] @ mean[1].mT).topk(self.each).indices
        kept = torch.zeros(*q.shape[:2], *plan.blocks, dtype=torch.bool)
        kept[:, :, :blocks, :blocks].scatter_(3, best, True).diagonal(dim1=2, dim2=3)[:] = True
        kept[:, :, blocks:] = kept[:, :, :, blocks:] = True
        return kept


@dataclass(frozen=True)
class Slow(Policy):
    """The same token by token, sample by sample and head by head, with text before the clip."""

    def claims(self, sites: Sequence[Site]) -> Mapping[str, Claim]:
        return dict.fromkeys(attended(sites), "own")

    def start(self, sites: Sequence[Site], total: int, modules: nn.Module | None = None) -> SlowSession:
        return SlowSession(attended(sites))

    def exact(self) -> Slow:
        raise NotImplementedError


class SlowSession(Session):
    def __init__(self, streams: Mapping[str, str]) -> None:
        super().__init__()
        self.streams = streams

    def enter(self, call: Call) -> Mapping[str, Handler]:
        return {name: partial(self.core, call, stream) for name, stream in self.streams.items()}

    def core(
        self, call: Call, stream: str, fn: Handler, q: Tensor, k: Tensor, v: Tensor, *masks: Tensor
    ) -> Tensor:
        image = image_of(call.layout)
        segments = sequence(call.layout, stream)
        before = sum(part.length for part in segments[: segments.index(image)])
        pairs = torch.ones(*q.shape[:3], k.shape[2], dtype=torch.bool)
        parts = torch.arange(image.length).split(BLOCK)
        for b in range(len(q)):
            for n in range(q.shape[1]):
                means = [[x[b, n, before + part].mean(0) for part in parts] for x in (q, k)]
                for i, part in enumerate(parts):
                    score = torch.stack([means[0][i] @ key for key in means[1]])
                    seen = {i, *score.topk(EACH).indices.tolist()}
                    for j in set(range(len(parts))) - seen:
                        pairs[b, n, (before + part)[:, None], before + parts[j]] = False
        for mask in masks:
            pairs = pairs & F.pad(mask, (0, k.shape[2] - mask.shape[-1]), value=True)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=pairs)


@pytest.mark.parametrize(("size", "text"), [((16, 16), 0), ((12, 20), 0), ((16, 16), 7), ((12, 20), 7)])
def test_chosen_blocks_are_those_of_the_slow_twin(size, text):
    model = tiny_clip_model(text, size=size)
    x = torch.randn(2, *model.sample_shape, generator=torch.Generator().manual_seed(1)).double()
    cond = prompt(2, (7, 3)) if text else Cond()
    pattern = Strongest(block=BLOCK, kernel="cpu")
    found, wanted, dense = (predicted(model, p, x, cond) for p in (pattern, Slow(), None))
    assert (found - wanted).abs().max() < 1e-12
    assert (dense - wanted).abs().max() > 1e-3


def test_all_blocks_kept_is_the_bound_itself():
    model = tiny_clip_model(size=(16, 16))
    x = torch.randn(1, *model.sample_shape, generator=torch.Generator().manual_seed(1)).double()
    found = predicted(model, Strongest(block=BLOCK, each=16, kernel="cpu"), x, Cond())
    assert (found - predicted(model, None, x, Cond())).abs().max() < 1e-12


def test_the_receipt_says_what_was_visited_and_a_share_that_does_not_pay_leaves_attention_alone():
    model = tiny_clip_model(size=(32, 32), frames=4)  # 1,024 tokens in 64 blocks
    x = torch.randn(1, *model.sample_shape, generator=torch.Generator().manual_seed(1)).double()
    for each, is_off in ((3, False), (40, True)):
        call = Call(0, 2, 0.5, layout=model.layout(tuple(x.shape[1:])))
        trajectory = Trajectory(model.sites(), [Strongest(block=BLOCK, each=each)], 2)
        with torch.no_grad():
            trajectory.leave(call, model(x, torch.tensor([0.5]).double(), Cond(), trajectory.run(call)))
        remarks = trajectory.sessions[0].remarks
        assert ("off" in remarks) == is_off
        if is_off:
            assert remarks["visited"] == round(42 / 64, 4) and "65.6%" in remarks["off"]
        else:
            assert 3 / 64 <= remarks["visited"] <= 4 / 64 and remarks["kernel"] == "cpu"


@dataclass(frozen=True)
class Alternating(Strongest):
    """All blocks in the first two attentions that are asked, its own alone in the later ones."""

    def kept(self, plan: BlockPlan, image: int, q: Tensor, k: Tensor) -> Tensor:
        ASKED.append(len(ASKED))
        own = torch.eye(plan.blocks[0], dtype=torch.bool) | (len(ASKED) <= 2)
        return own.expand(*q.shape[:2], *plan.blocks)

    def share(self, plan: BlockPlan, image: int) -> float:
        return 0.25


ASKED: list[int] = []


@pytest.mark.parametrize("cached", [False, True])
def test_the_receipt_tells_the_mean_over_the_trajectory_also_where_a_cache_forecasts_the_last(cached):
    ASKED.clear()
    model = tiny_clip_model(size=(16, 16))  # 16 blocks, two attentions
    policies = [TaylorSeer(interval=3, order=1, warmup=2)] if cached else []
    work = Sampler.of(model.float(), steps=6, guidance=1.0, batch_size=1)
    result = work.draw(policies=[*policies, Alternating(block=BLOCK, kernel="cpu")])
    receipt = result.receipts[-1].as_dict()
    assert len(ASKED) == (6 if cached else 12)
    assert receipt["visited"] == round((2 + (len(ASKED) - 2) / 16) / len(ASKED), 4)
    assert receipt["kernel"] == "cpu"


def test_a_compiler_needs_no_break_where_blocks_are_chosen_and_gets_them_right():
    pattern = Strongest(block=BLOCK, kernel="cpu")
    session = pattern.start(tiny_clip_model().sites(), 2)
    plan, key, handle = pattern.plan(Grid(4, 8, 8), 0), ("main", "cond", "core"), chooser_handle(pattern)
    compiled = torch.compile(
        lambda *x: session.select(key, handle, plan, 256, *x, None) + 1, backend="aot_eager", fullgraph=True
    )
    for seed in (1, 2):  # other queries, other lists
        q, k, v = torch.randn(3, 1, 2, 256, 8, generator=torch.Generator().manual_seed(seed)).double()
        wanted = attend(q, k, v, narrowed(plan, pattern.kept(plan, 256, q, k)), kernel="cpu").out + 1
        assert (compiled(q, k, v) - wanted).abs().max() < 1e-12


def test_compiled_blocks_choose_as_eager_ones_do():
    model = tiny_clip_model(size=(16, 16))
    x = torch.randn(1, *model.sample_shape, generator=torch.Generator().manual_seed(1)).double()
    pattern = Strongest(block=BLOCK, kernel="cpu")
    wanted = predicted(model, pattern, x, Cond())
    for block in model.blocks:
        block.compile(backend="aot_eager")
    for seed in (1, 2):  # other queries, other lists
        x = torch.randn(1, *model.sample_shape, generator=torch.Generator().manual_seed(seed)).double()
        found = predicted(model, pattern, x, Cond())
        if seed == 1:
            assert (found - wanted).abs().max() < 1e-12
    assert (found - wanted).abs().max() > 1e-3


def test_a_narrowed_plan_is_the_one_built_from_those_blocks():
    """A window with padding, per sample and head."""
    generator = torch.Generator().manual_seed(0)
    order = F.pad(torch.randperm(90, generator=generator), (0, 6), value=-1)
    near = lambda batch, head, query, key: (query - key).abs() < 40  # noqa: E731
    bound = build_plan(96, block=16, order=order, allowed=near)
    kept = torch.rand(2, 3, *bound.blocks, generator=generator) < 0.5
    kept |= torch.eye(6, dtype=torch.bool)
    found = narrowed(bound, kept)
    wanted = build_plan(96, block=16, order=order, allowed=near, kept=kept, batches=2, heads=3)
    assert torch.equal(found.mask(), wanted.mask())
    assert torch.equal(found.start, wanted.start) and torch.equal(found.index, wanted.index)
    assert torch.equal(found.counts, wanted.counts) and found.density == wanted.density < bound.density


def test_gradients_go_through_chosen_blocks():
    generator = torch.Generator().manual_seed(0)
    bound = build_plan(64, block=16)
    kept = (torch.rand(2, 2, 4, 4, generator=generator) < 0.4) | torch.eye(4, dtype=torch.bool)
    q, k, v = (torch.randn(2, 2, 64, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    pairs = kept.repeat_interleave(16, 2).repeat_interleave(16, 3)
    grads = []
    for run in (
        lambda *x: attend(*x, narrowed(bound, kept), kernel="cpu").out,
        lambda *x: attend_reference(*x, pairs, 8**-0.5).out,
    ):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        run(*leaves).square().sum().backward()
        grads.append([x.grad for x in leaves])
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (torch.ones(1, 1, 3, 4, dtype=torch.bool), r"kept torch.bool \[1, 1, 3, 4\], expected"),
        (torch.ones(1, 1, 4, 4), r"kept torch.float32 \[1, 1, 4, 4\], expected torch.bool"),
        (torch.ones(3, 1, 4, 4, dtype=torch.bool), r"for a plan of 2 batches"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.bool), r"sees no key"),
    ],
)
def test_blocks_that_do_not_fit_the_plan_are_refused(kept, message):
    with pytest.raises(ShapeError, match=message):
        narrowed(build_plan(64, block=16, batches=2), kept)
