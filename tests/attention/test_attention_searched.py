"""Sparse-vDiT against its specification: masks, planted patterns, one launch for all heads, tables, and the search."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_composition import GRAPHS, compiled, in_int8
from torch import Tensor, nn

import ditkit
from ditkit.api.search import CANDIDATES, Evidence, Objective, Searching, search, search_by
from ditkit.attention import Grouped, HeadTable, Searched
from ditkit.attention.searched import band_reach, sites_digest
from ditkit.bench.macs import MacCounter
from ditkit.caching import TaylorSeer
from ditkit.core.codec import fingerprint
from ditkit.core.cond import Cond
from ditkit.core.errors import CheckpointError, ConfigError, ConflictError, NoEffectError, ShapeError
from ditkit.core.grid import Grid, Segment, image_of, sequence
from ditkit.core.policy import Claim, Policy, Session
from ditkit.core.run import Call, Handler, Site, attended
from ditkit.core.trajectory import Trajectory
from ditkit.hosts.view import view
from ditkit.ops.block_sparse_attention import attend_reference
from hosts_support import EVERY, run_steps, sites_of
from patterns_support import predicted, prompt, tiny_clip_model
from policies_support import Tap

CORE = (Site("core", "core", heads=5, width=80),)
SETTING = {"block": 8, "kernel": "cpu", "stripes": "even"}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def letter_mask(pattern: Searched, grid: Grid, letter: str) -> Tensor:
    """Every pair of tokens of a clip in the model's order, from the words of the method: bool [L, L]."""
    L, S, n = grid.length, grid.height * grid.width, -(-grid.length // pattern.block)
    if letter in "01":
        return torch.full((L, L), letter == "0")
    places = [token % S * grid.frames + token // S for token in range(L)]  # and within a place its frames
    block = torch.tensor(places if letter == "3" else range(L)) // pattern.block
    most = (1 - dict(zip("234", pattern.sparsity, strict=True))[letter]) * n
    if letter == "4":
        count = max(1, int(most + 1e-9))
        return torch.isin(block, torch.tensor([c * n // count for c in range(count)])).expand(L, L)
    visited = [sum(abs(i - j) <= r for i in range(n) for j in range(n)) for r in range(n)]
    reach = max(r for r in range(n) if r == 0 or visited[r] <= most * n)
    return (block[:, None] - block).abs() <= reach


@dataclass(frozen=True)
class Slow(Policy):
    """Each head's mask of every pair, in the model's order; text sees all and is seen by all but by skipped heads."""

    pattern: Searched

    def claims(self, sites: Sequence[Site]) -> Mapping[str, Claim]:
        return dict.fromkeys(attended(sites), "own")

    def start(self, sites: Sequence[Site], total: int, modules: nn.Module | None = None) -> SlowSession:
        return SlowSession(self.pattern.resolved(sites), attended(sites))

    def exact(self) -> Slow:
        raise NotImplementedError


class SlowSession(Session):
    def __init__(self, pattern: Searched, streams: Mapping[str, str]) -> None:
        super().__init__()
        self.pattern, self.streams = pattern, streams
        self.masks: dict[str, Tensor] = {}

    def enter(self, call: Call) -> Mapping[str, Handler]:
        every = enumerate(self.streams.items())
        return {name: partial(self.core, call, place, stream) for place, (name, stream) in every}

    def core(
        self,
        call: Call,
        place: int,
        stream: str,
        fn: Handler,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *masks: Tensor,
    ) -> Tensor:
        image, segments = image_of(call.layout), sequence(call.layout, stream)
        at = segments.index(image)
        around = [sum(part.length for part in some) for some in (segments[:at], segments[at + 1 :])]
        heads = []
        for letter in self.pattern.heads[place]:
            if letter not in self.masks:
                self.masks[letter] = letter_mask(self.pattern, image.grid, letter)
            heads.append(F.pad(self.masks[letter], (*around, *around), value=letter != "1"))
        pairs = torch.stack(heads)[None].expand(len(q), -1, -1, -1)
        for mask in masks:
            pairs = pairs & F.pad(mask, (0, k.shape[2] - mask.shape[-1]), value=True)
        return attend_reference(q, k, v, pairs).out


@pytest.mark.parametrize("grid", [Grid(4, 4, 4), Grid(3, 5, 3), Grid(5, 2, 7), Grid(1, 6, 6)])
@pytest.mark.parametrize("letter", "234")
@pytest.mark.parametrize("others", [0, 5])
def test_a_pattern_is_the_mask_of_every_pair(grid: Grid, letter: str, others: int) -> None:
    """Also where a frame is no whole number of blocks, so that blocks of pattern 3 span places."""
    pattern = Searched(heads=(letter,), sparsity=(0.6, 0.7, 0.5), **SETTING)  # type: ignore[arg-type]
    plan = pattern.letter_plan(letter, grid, others)
    (mask,) = plan.mask().flatten(0, 1)
    mask = mask[plan.inverse][:, plan.inverse]
    assert torch.equal(mask[: grid.length, : grid.length], letter_mask(pattern, grid, letter))
    assert mask[grid.length :].all() and mask[:, grid.length :].all()


def test_pattern_3_is_the_band_of_pattern_2_after_the_transposition() -> None:
    grid = Grid(3, 5, 3)
    pattern = Searched(heads=("23",), **SETTING)  # type: ignore[arg-type]
    two, three = (pattern.letter_plan(letter, grid, 0) for letter in "23")
    assert torch.equal(two.tile_map >= 0, three.tile_map >= 0)
    transposed = torch.arange(45).view(3, 15).T.flatten()
    order = torch.arange(48) if three.order is None else three.order
    assert torch.equal(order[:45], transposed)


@pytest.mark.parametrize(
    ("blocks", "left_out", "reach"), [(16, 0.8, 1), (8, 0.8, 0), (8, 0.99, 0), (32, 0.5, 8), (4, 0.0, 3)]
)
def test_the_band_leaves_out_at_least_what_it_should(blocks: int, left_out: float, reach: int) -> None:
    assert band_reach(blocks, left_out) == reach
    at = torch.arange(blocks)

    def share(r: int) -> float:
        return ((at[:, None] - at).abs() <= r).double().mean().item()

    assert reach == 0 or share(reach) <= 1 - left_out + 1e-12
    assert reach == blocks - 1 or share(reach + 1) > 1 - left_out


def test_all_dense_changes_no_bit_and_is_told_to_save_nothing() -> None:
    """On a grid that blocks do not divide."""
    model = tiny_clip_model(7, size=(10, 14))
    x, cond = drawn(2, *model.sample_shape, seed=1), prompt(2, (7, 3))
    pattern = Searched(heads=("0",), **SETTING)  # type: ignore[arg-type]
    assert torch.equal(predicted(model, pattern, x, cond), predicted(model, None, x, cond))
    trajectory = Trajectory(model.sites(), [pattern], 1)
    call = Call(0, 1, 0.5, layout=model.layout(tuple(x.shape[1:])))
    trajectory.leave(call, model(x, torch.full((2,), 0.5).double(), cond, trajectory.run(call)))
    with pytest.raises(NoEffectError):
        trajectory.finish()


def test_all_skipped_leaves_the_bias_of_the_projection() -> None:
    model = tiny_clip_model(7)
    x, cond = drawn(2, *model.sample_shape, seed=1), prompt(2, (7, 3))
    tap = Tap(("blocks.1.attn",))
    call = Call(0, 4, 0.5, layout=model.layout(tuple(x.shape[1:])))
    trajectory = Trajectory(model.sites(), [Searched(heads=("1",), **SETTING), tap], 4)  # type: ignore[arg-type]
    with torch.no_grad():
        model(x, torch.full((2,), 0.5).double(), cond, trajectory.run(call))
    _, branch = tap.seen["blocks.1.attn"]
    bias = model.blocks[1].attn.out.bias
    assert branch.shape[-1] == len(bias) and torch.equal(branch, bias.expand_as(branch))


WORDS = ["0123", "4321", "2222", "3333", "1130", "2310", "4040"]


@pytest.mark.parametrize("word", WORDS)
def test_one_launch_is_a_loop_over_heads(word: str) -> None:
    """And multiplies no more than the blocks that each head visits."""
    grid, others = Grid(3, 5, 3), 6
    pattern = Searched(heads=(word,), sparsity=(0.6, 0.7, 0.5), **SETTING)  # type: ignore[arg-type]
    sites = (Site("core", "core", "joint", heads=4),)
    layout = (Segment("text", Grid(1, 1, others), others), Segment("image", grid, grid.length))
    run = Trajectory(sites, [pattern], 2).run(Call(0, 2, 0.5, layout=layout))
    rows = others + pattern.plan(grid, others).queries - others
    order = pattern.plan(grid, others).order[: rows - others]
    q, k, v = (drawn(2, 4, grid.length + others, 6, seed=s) for s in (1, 2, 3))
    slots = torch.cat((torch.arange(others), others + order.clamp(min=0)))
    with MacCounter() as counter:
        found = run.site("core", F.scaled_dot_product_attention, *(x[:, :, slots] for x in (q, k, v)))
    real = torch.cat((torch.arange(others), others + (order >= 0).nonzero().squeeze(1)))
    blocks = 0
    for head, letter in enumerate(word):
        mask = F.pad(letter_mask(pattern, grid, letter), (others, 0, others, 0), value=letter != "1")
        alone = attend_reference(*(x[:, head : head + 1] for x in (q, k, v)), mask).out
        assert (found[:, head : head + 1, real] - alone).abs().max() < 1e-12
        blocks += pattern.letter_plan(letter, grid, others).visited
    assert counter.total == 2 * blocks * 8 * 8 * 12


@pytest.mark.parametrize("heads", [("23",), ("12", "30"), ("44", "03"), ("33", "11")])
@pytest.mark.parametrize(("size", "text"), [((16, 16), 0), ((10, 14), 7)])
def test_a_model_under_a_table_is_one_under_the_masks(
    heads: tuple[str, ...], size: tuple[int, int], text: int
) -> None:
    model = tiny_clip_model(text, size=size)
    x, cond = drawn(2, *model.sample_shape, seed=1), prompt(2, (7, 3)) if text else Cond()
    pattern = Searched(heads=heads, **SETTING)  # type: ignore[arg-type]
    found, wanted, dense = (predicted(model, p, x, cond) for p in (pattern, Slow(pattern), None))
    assert (found - wanted).abs().max() < 1e-12
    assert (dense - wanted).abs().max() > 1e-3


def test_the_receipt_counts_heads_and_what_they_visit() -> None:
    model = tiny_clip_model(size=(16, 16))
    x = drawn(1, *model.sample_shape, seed=1)
    pattern = Searched(heads=("12", "30"), **SETTING)  # type: ignore[arg-type]
    trajectory = Trajectory(model.sites(), [pattern], 1)
    call = Call(0, 1, 0.5, layout=model.layout(tuple(x.shape[1:])))
    trajectory.leave(call, model(x, torch.full((1,), 0.5).double(), Cond(), trajectory.run(call)))
    (receipt,) = trajectory.finish()
    told = receipt.as_dict()
    assert told["heads"] == "1 dense, 1 skipped, 1 diagonal, 1 multi-diagonal"
    share = (32 + 2 * (31 + 30)) / 32**2  # 32 blocks: a reach of 2
    assert told["visited"] == round((0 + share + share + 1) / 4, 4)


# --- the search --------------------------------------------------------------------------------------------

GRID, BLOCK = Grid(8, 4, 4), 8


def planted(word: str, seed: int, sharp: float = 14.0) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [1, N, 128, 16] whose heads attend as the letters say, and to nothing else.

    A diagonal head sees the tokens of its own block of a frame, a multi-diagonal one its place in all frames, a
    striped one the same three blocks from everywhere, a dense one all tokens alike. Values are random; a skipped
    head's are 0.
    """
    L, S = GRID.length, 16
    token, draw = torch.arange(L), torch.Generator().manual_seed(seed)
    features = torch.eye(16, dtype=torch.float64)
    q, k, v = (torch.zeros(1, len(word), L, 16, dtype=torch.float64) for _ in range(3))
    striped = torch.randperm(L // BLOCK, generator=draw)[:3]
    for head, letter in enumerate(word):
        v[0, head] = torch.randn(L, 16, generator=draw, dtype=torch.float64)
        if letter == "1":
            v[0, head] = 0
        elif letter in "23":
            q[0, head] = k[0, head] = features[token // BLOCK if letter == "2" else token % S] * sharp
        elif letter == "4":
            q[0, head, :, 0] = sharp
            k[0, head, :, 0] = sharp * torch.isin(token // BLOCK, striped)
    return q, k, v


def planted_table(
    word: str, seeds: Sequence[int] = (0, 1), sharp: float = 14.0, **setting: object
) -> HeadTable:
    sites = (Site("core", "core", heads=len(word)),)

    def draw(policy: Policy) -> None:
        for seed in seeds:
            trajectory = Trajectory(sites, [policy], 1)
            call = Call(0, 1, 0.5, layout=(Segment("image", GRID, GRID.length),))
            trajectory.run(call).site("core", F.scaled_dot_product_attention, *planted(word, seed, sharp))
            trajectory.leave(call, None)

    given = {"cost": "sparsity", "block": BLOCK, "kernel": "cpu"} | setting
    return search_by(draw, sites, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("word", ["23401", "10432", "33224"])
def test_planted_patterns_are_found(word: str) -> None:
    """Random stripes, the same for both samples only in their attention: each sample has three of its own."""
    assert planted_table(word, seeds=(3,)).heads == (word,)
    assert planted_table(word, seeds=(3,), follow="dense").heads == (word,)


def test_the_stripes_are_the_blocks_of_most_attention_head_by_head() -> None:
    table = planted_table("44", seeds=(3,))
    striped = torch.randperm(16, generator=torch.Generator().manual_seed(3))[:3]
    assert table.columns == (((*sorted(striped.tolist()),),) * 2,)


def test_raw_errors_of_attention_are_too_small_for_the_printed_epsilon() -> None:
    """Means of many values: with epsilon 1 not even attention to everything is kept."""
    found = planted_table("02", seeds=(3,), error="raw", epsilon=1.0)
    assert found.heads == ("12",) and max(found.errors["raw"][0][0]) < 0.5
    assert planted_table("02", seeds=(3,)).heads == ("02",)


def test_errors_are_those_of_the_kernel_that_will_run() -> None:
    """A blurred table, so that none is 0."""
    word = "23402"
    table = planted_table(word, seeds=(3,), sharp=3.0, stripes="even")
    q, k, v = planted(word, 3, sharp=3.0)
    dense = F.scaled_dot_product_attention(q, k, v)
    pattern = Searched(heads=(word,), stripes="even", block=8)
    for i, letter in enumerate(CANDIDATES):
        mask = letter_mask(pattern, GRID, letter)
        out = attend_reference(q, k, v, mask.expand(1, 5, -1, -1)).out
        raw = (out - dense).square().mean((0, 2, 3))
        found = {
            kind: torch.tensor(table.errors[kind], dtype=torch.float64)[0, :, i]
            for kind in ("raw", "relative")
        }
        assert (found["raw"] - raw).abs().max() < 1e-12
        assert (found["relative"] - raw / dense.square().mean((0, 2, 3))).abs().max() < 1e-9


def test_a_search_that_follows_its_choice_sees_what_the_table_will_make() -> None:
    """One sample and one step: the search's own output is the table's."""
    model = tiny_clip_model(7, size=(16, 16))
    x, cond = drawn(1, *model.sample_shape, seed=1), prompt(1, (7,))
    outs: list[Tensor] = []
    made = {"epsilon": 0.6, "cost": "sparsity", **SETTING}
    tables = {}
    for follow in ("sparse", "dense"):
        tables[follow] = search_by(
            lambda policy: outs.append(predicted(model, policy, x, cond, total=1)),
            model.sites(),
            follow=follow,
            **made,
        )
    known = {name: getattr(tables["sparse"], name) for name in ("heads", "block", "sparsity", "stripes")}
    assert set("".join(known["heads"])) - {"0"}, "the test needs a table that leaves out something"
    under = predicted(model, Searched(kernel="cpu", **known), x, cond)
    assert (outs[0] - under).abs().max() < 1e-12
    assert (
        torch.equal(outs[1], predicted(model, None, x, cond))
        or (outs[1] - predicted(model, None, x, cond)).abs().max() < 1e-12
    )
    first, second = (torch.tensor(t.errors["relative"]) for t in (tables["sparse"], tables["dense"]))
    assert torch.allclose(first[0], second[0]) and not torch.allclose(first[1], second[1])


def test_choices_are_monotone() -> None:
    errors = torch.rand(6, 8, 4, generator=torch.Generator().manual_seed(0)).double() * 2
    sparsity = torch.tensor([1.0, 0.8, 0.8, 0.7]).double()
    before, kept = 49, 99.0
    for epsilon in (-1.0, 0.1, 0.3, 0.6, 1.0, 3.0):
        letters = Objective(epsilon=epsilon, cost="sparsity").letters(errors, 1 - sparsity, sparsity)
        dense = int((letters == 0).sum())
        work = torch.cat((torch.zeros(1).double(), sparsity))[letters]
        assert dense <= before and (1 - work).sum() <= kept
        before, kept = dense, (1 - work).sum()
        assert epsilon > 0 or dense == 48
    free = Objective(weight=0.0, epsilon=9.0).letters(errors, 1 - sparsity, sparsity)
    assert torch.equal(free, errors.argmin(-1) + 1)
    costs = Objective(weight=1e6, epsilon=1e9).letters(errors, 1 - sparsity, sparsity)
    assert costs.eq(1).all()


def test_a_target_is_reached_and_not_by_more_than_a_head() -> None:
    errors = torch.rand(6, 8, 4, generator=torch.Generator().manual_seed(0)).double() * 2
    sparsity = torch.tensor([1.0, 0.8, 0.8, 0.7]).double()
    for target in (0.1, 0.4, 0.7):
        letters = Objective(target=target, cost="sparsity").letters(errors, 1 - sparsity, sparsity)
        reached = torch.cat((torch.zeros(1).double(), sparsity))[letters].mean()
        assert target <= reached < target + 1 / 48 + 1e-9
    with pytest.raises(ConfigError, match=r"target=0.99, expected at most 0\.\d+, what all heads leave out"):
        Objective(target=0.99, cost="sparsity").letters(errors, 1 - sparsity, sparsity)


def test_costs_are_measured_and_recorded() -> None:
    table = planted_table("23401", seeds=(3,), cost="measured")
    assert set(table.seconds) == set("01234") and min(table.seconds.values()) > 0
    assert table.device and table.dtype == "float64" and table.torch == torch.__version__
    evidence = Evidence(seconds={"0": 2.0, "1": 0.0, "2": 0.5, "3": 1.0, "4": 3.0})
    assert evidence.costs(Objective(), torch.zeros(4)).tolist() == [0.0, 0.25, 0.5, 1.5]


def test_a_search_of_a_model_weighs_both_guidance_branches(tmp_path: Path) -> None:
    model = tiny_clip_model(size=(16, 16), classes=3).float()
    found = {g: search(model, (0, 1), steps=2, guidance=g, batch_size=2, **SETTING) for g in (1.0, 2.0)}
    assert [found[g].search["evaluations"] for g in (1.0, 2.0)] == [2, 4]
    assert found[1.0].errors != found[2.0].errors
    assert found[2.0].grid == (4, 8, 8) and len(found[2.0].heads) == 2
    assert found[2.0].weights == fingerprint(model.state_dict())


# --- tables ------------------------------------------------------------------------------------------------


@pytest.fixture
def table(tmp_path: Path) -> Path:
    model = tiny_clip_model(size=(16, 16)).float()
    found = search(model, (0,), steps=1, guidance=1.0, epsilon=0.9, cost="sparsity", block=8, kernel="cpu")
    return found.save(tmp_path / "table.json")


def test_a_table_is_read_as_it_was_written_and_works_by_its_name(table: Path) -> None:
    held = HeadTable.load(table)
    assert HeadTable.load(held.save(table.with_name("again.json"))) == held
    model = tiny_clip_model(size=(16, 16))
    x = drawn(1, *model.sample_shape, seed=1)
    by_file = Searched(table=str(table), kernel="cpu", warmup=1)
    resolved = by_file.resolved(model.sites())
    assert (resolved.heads, resolved.columns, resolved.block) == (held.heads, held.columns, 8)
    assert torch.equal(
        predicted(model, by_file, x, Cond(), index=1), predicted(model, resolved, x, Cond(), index=1)
    )
    assert held.band == pytest.approx(((band_reach(32, 0.8) + 0.5) * 8 / 64, (band_reach(32, 0.8) + 0.5)))


def test_a_table_of_another_model_or_shape_is_refused_before_the_first_block(table: Path) -> None:
    pattern = Searched(table=str(table), kernel="cpu")
    for other in (tiny_clip_model(size=(16, 16), heads=4), tiny_clip_model(size=(16, 16), depth=3)):
        with pytest.raises(ConfigError, match=r"is of VideoDiT with 2 attentions of 2 heads, got a model of"):
            Trajectory(other.sites(), [pattern], 4)
    longer = tiny_clip_model(frames=5, size=(16, 16))
    blocks: list[int] = []
    for block in longer.blocks:
        block.register_forward_pre_hook(lambda *_: blocks.append(1))
    with pytest.raises(ShapeError, match=r"searched on 4 x 8 x 8 tokens, got 5 x 8 x 8; search again"):
        predicted(longer, pattern, drawn(1, *longer.sample_shape), Cond())
    assert not blocks
    model = tiny_clip_model(size=(16, 16)).float()
    held = HeadTable.load(table)
    held.check_weights(fingerprint(model.state_dict()))
    model.embed.weight.data[0, 0] += 1
    with pytest.raises(ConfigError, match=r"searched on weights .* got .*; search again, or say weights=any"):
        ditkit.generate(model, steps=2, policies=[pattern])
    ditkit.generate(model, steps=2, guidance=1.0, policies=[replace(pattern, weights="any")])


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda held: held.pop("kind"), "expected a table of heads"),
        (lambda held: held.update(kind="picture"), "expected a table of heads"),
        (lambda held: held.update(grids=1), "unknown config key 'grids'"),
        (lambda held: held.pop("heads"), "missing config key 'heads'"),
        (lambda held: held.update(block="8"), "block='8' should be an integer"),
    ],
)
def test_damaged_tables_are_refused(table: Path, change: object, line: str) -> None:
    held = json.loads(table.read_text())
    change(held)  # type: ignore[operator]
    table.write_text(json.dumps(held))
    with pytest.raises(CheckpointError, match=line):
        HeadTable.load(table)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({}, "got neither, expected one of table=FILE and heads=0234"),
        ({"table": "x.json", "heads": ("0",)}, "got table=x.json with heads=0"),
        ({"heads": ("02", "0")}, "heads=02+0, expected words of one length"),
        ({"heads": ("05",)}, "heads=05, expected letters of 0, 1, 2, 3 and 4"),
        ({"heads": ("4",)}, "heads with stripes=top, whose blocks a search finds"),
        ({"heads": ("2",), "sparsity": (0.8, 0.8, 1.0)}, "sparsity=(0.8, 0.8, 1.0) should lie in [0, 1)"),
        ({"heads": ("2",), "stripes": "odd"}, "unknown stripes 'odd'"),
    ],
)
def test_bad_settings(given: dict[str, object], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Searched(**given)  # type: ignore[arg-type]
    assert line in str(caught.value)


def test_tables_that_do_not_fit_a_model() -> None:
    sites = tiny_clip_model().sites()
    wrong = {
        ("2",) * 3: "heads of 3 layers, got a model of 2 attentions of 2 heads",
        ("234",): "words of 3 heads",
    }
    for heads, line in wrong.items():
        with pytest.raises(ConfigError, match=line):
            Trajectory(sites, [Searched(heads=heads, stripes="even")], 4)
    with pytest.raises(CheckpointError, match=r"cannot read nothing.json"):
        Trajectory(sites, [Searched(table="nothing.json")], 4)
    with pytest.raises(ConflictError, match="Searched and Grouped both own 'rows'"):
        Trajectory(sites, [Searched(heads=("2",)), Grouped()], 4)
    two = (Segment("image", Grid(2, 4, 4), 32),), (Segment("image", Grid(3, 4, 4), 48),)
    session = Searching(block=8, kernel="cpu").start((Site("core", "core"),), 2)
    session.enter(Call(0, 2, 1.0, layout=two[0]))
    with pytest.raises(
        ConfigError, match=r"a clip of \(3, 4, 4\) tokens after one of \(2, 4, 4\), expected one shape"
    ):
        session.enter(Call(1, 2, 0.5, layout=two[1]))
    with pytest.raises(NoEffectError, match="met no attention"):
        search_by(lambda policy: None, sites, **SETTING)


# --- with other methods, and on hosts ----------------------------------------------------------------------


def stepped(name: str, policies: Sequence[Policy], *changes: object) -> tuple[Tensor, Trajectory]:
    family = EVERY[name]
    model = family.transformer()
    for change in changes:
        change(model)  # type: ignore[operator]
    return run_steps(family, view(model), family.inputs(), policies)


@pytest.mark.parametrize("name", ["wan", "cogvideox 2b", "cogvideox"])
def test_on_hosts_it_is_the_masks(name: str) -> None:
    pattern = Searched(heads=("0123",), sparsity=(0.6, 0.6, 0.6), **SETTING)  # type: ignore[arg-type]
    (found, trajectory), (wanted, _), (dense, _) = (
        stepped(name, p) for p in ([pattern], [Slow(pattern)], [])
    )
    (receipt,) = trajectory.finish()
    assert receipt.as_dict()["lanes"]["cond"]["sparse"] == "0-7"
    assert (found - wanted).norm() < 1e-5 * dense.norm() < 1e-2 * (dense - wanted).norm()


def test_with_a_cache_it_is_the_cache_of_the_masked_host() -> None:
    pattern = Searched(heads=("0123",), sparsity=(0.6, 0.6, 0.6), **SETTING)  # type: ignore[arg-type]
    cache = TaylorSeer(3, 1, 2)
    (found, trajectory), (wanted, _) = (stepped("cogvideox", [cache, p]) for p in (pattern, Slow(pattern)))
    assert (found - wanted).norm() < 1e-5 * wanted.norm()
    forecast, sparse = (receipt.as_dict()["lanes"]["cond"] for receipt in trajectory.finish())
    assert forecast["computed"] == sparse["sparse"]


@pytest.mark.parametrize("kind", ["searched", "draft"])
def test_int8_and_compiled_blocks(kind: str) -> None:
    """To the bit with a backend that changes nothing and refuses breaks; a second trajectory compiles nothing."""
    from ditkit.attention import Draft

    pattern: Policy = Searched(heads=("0123",), sparsity=(0.6, 0.6, 0.6), **SETTING)  # type: ignore[arg-type]
    if kind == "draft":
        pattern = Draft(sparsity=0.7, patch=(2, 4), dense_share=0.0, block=8, kernel="cpu")
    torch._dynamo.reset()
    GRAPHS.clear()
    eager, _ = stepped("cogvideox", [pattern], in_int8)
    float32, _ = stepped("cogvideox", [pattern])
    assert 1e-5 < (eager - float32).norm() / float32.norm() < 0.1
    case, model = EVERY["cogvideox"], EVERY["cogvideox"].transformer()
    in_int8(model)
    compiled(model)
    model = view(model)
    found, trajectory = run_steps(case, model, case.inputs(), [pattern])
    assert torch.equal(found, eager) and trajectory.finish()[0].as_dict()["visited"] < 0.9
    graphs = len(GRAPHS)
    assert graphs and torch.equal(run_steps(case, model, case.inputs(), [pattern])[0], eager)
    assert len(GRAPHS) == graphs


def test_a_search_on_a_host_finds_a_table_for_it(tmp_path: Path) -> None:
    case = EVERY["cogvideox 2b"]
    model = view(case.transformer())
    sites = sites_of(model)
    found = search_by(
        lambda policy: run_steps(case, model, case.inputs(), [policy], steps=2),
        sites,
        model="CogVideoX",
        epsilon=0.8,
        sparsity=(0.5, 0.5, 0.5),
        block=8,
        kernel="cpu",
    )
    assert found.sites == sites_digest(sites) and len(found.heads) == 3 and found.grid == (3, 4, 6)
    pattern = Searched(table=str(found.save(tmp_path / "t.json")), kernel="cpu")
    under, _ = run_steps(case, model, case.inputs(), [pattern])
    again = replace(
        pattern, table="", **{n: getattr(found, n) for n in ("heads", "columns", "block", "sparsity")}
    )
    assert torch.equal(under, run_steps(case, model, case.inputs(), [again])[0])
