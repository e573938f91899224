"""RAS: which rows are computed, that they come out as in a dense evaluation, and what becomes of the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import flux_for_tests as fluxes
import hosts_for_tests as hosts
from ditkit.caching import RAS, TaylorSeer
from ditkit.caching.regional import Choice, Regions, by_row, row_metric
from ditkit.core.cond import Cond
from ditkit.core.convention import DDPM, Convention
from ditkit.core.errors import ConfigError, ConflictError, NoEffectError
from ditkit.core.grid import Grid, Segment, Tokens
from ditkit.core.policy import Policy
from ditkit.core.run import Call, Run, Site
from ditkit.core.spec import component, spec
from ditkit.core.trajectory import Trajectory
from ditkit.hosts import flux
from ditkit.models.vdt import VDT, VDTConfig
from ditkit.models.video_dit import VideoDiT, VideoDiTConfig
from ditkit.nn.blocks import attention
from ditkit.sample import Ancestral, ClassifierFree, Heun, sample
from policies_for_tests import BandReuse
from rig import STEPS, TINY, call_at, evaluate, noise, tiny_dit

SD3 = RAS()
LUMINA = RAS(reset_every=0, resets=(12, 22), high_ratio=1.0, slope=256)


# --- the schedule and the choice of rows -------------------------------------------------------------------


def test_skip_lists_of_the_paper() -> None:
    skips = SD3.skipped(28, 4096)
    assert skips == [0 if i < 4 or i in (12, 20) else 2048 for i in range(28)]
    assert 1 - sum(skips) / 28 / 4096 == pytest.approx(0.6071, abs=5e-5)
    spans = [
        (4, 1280),
        (4, 1536),
        (1, 0),
        (3, 1792),
        (4, 2048),
        (2, 2304),
        (1, 0),
        (1, 2304),
        (4, 2560),
        (2, 2816),
    ]
    skips = LUMINA.skipped(30, 4096)
    assert skips == [0] * 4 + [count for times, count in spans for _ in range(times)]
    assert 1 - sum(skips) / 30 / 4096 == pytest.approx(0.6125, abs=5e-5)


def test_after_the_end_all_rows_are_computed() -> None:
    assert replace(SD3, end=24).skipped(28, 4096)[20:] == [0, 2048, 2048, 2048, 0, 0, 0, 0]


def test_a_slope_that_leaves_out_too_many_rows_is_refused() -> None:
    with pytest.raises(ConfigError, match="slope=256 leaves out -768 of 64 rows in evaluation 4 of 30"):
        LUMINA.skipped(30, 64)


@pytest.mark.parametrize("high_ratio", [0.0, 0.3, 1.0])
def test_published_rows_are_those_of_the_code(high_ratio: float) -> None:
    """Its own words: sort q exp(k D), D from -(T + 1); leave out both ends, and count those."""
    policy, n, q = replace(SD3, high_ratio=high_ratio, starvation=1.0), 17, torch.rand(1, 40)
    counts, drops = torch.zeros(40) - 29, torch.zeros(1, 40)
    for _ in range(12):
        order = (q[0] * torch.exp(counts)).argsort()
        low, high = int(n * (1 - high_ratio)), int(n * high_ratio)
        left_out = torch.cat([order[:low], order[40 - high :]])
        counts[left_out] += 1
        rows = policy.chosen(q, drops, n)
        drops = policy.counted(drops, rows)
        assert sorted([*rows[0].tolist(), *left_out.tolist()]) == list(range(40))
        assert torch.equal(drops[0] - 29, counts)


def longest_runs(policy: RAS, q: Tensor, steps: int, skip: int) -> Tensor:
    """The most evaluations in a row that left out each row; `steps` for one that was never computed."""
    drops, run = torch.zeros_like(q), torch.zeros_like(q)
    longest = torch.zeros_like(q)
    for _ in range(steps):
        rows = policy.chosen(q, drops, skip)
        drops, run = policy.counted(drops, rows), (run + 1).scatter(1, rows, 0.0)
        longest = torch.maximum(longest, run)
    return longest


@pytest.mark.parametrize("selection", ["low", "high"])
@pytest.mark.parametrize("k", [0.1, 0.5, 1.0])
def test_no_row_starves_under_the_corrected_sign(selection: Any, k: float) -> None:
    """Once a row's D exceeds the spread of log q over k, nothing computed since ranks above it again."""
    q, rows, skip = torch.rand(1, 64) + 0.2, 64, 48
    bound = float((q.max() / q.min()).log()) / k + rows / (rows - skip) + 1
    runs = longest_runs(RAS(selection=selection, starvation=k), q, 200, skip)
    assert runs.max() <= bound
    assert longest_runs(RAS(selection=selection, starvation=0.0), q, 200, skip).max() == 200


def test_rows_starve_under_the_published_sign() -> None:
    runs = longest_runs(RAS(high_ratio=1.0), torch.rand(1, 64) + 0.2, 200, 32)
    assert (runs == 200).float().mean() == 0.5


@pytest.mark.parametrize("p", [1, 2, 4])
@pytest.mark.parametrize("metric", ["std", "l2"])
def test_metric_and_mask_of_a_row_are_those_of_its_patch(p: int, metric: Any) -> None:
    v, image = torch.randn(2, 3, 3 * p, 5 * p), Segment("image", Grid(1, 3, 5), 15)
    of = partial(torch.std, correction=0) if metric == "std" else torch.linalg.vector_norm
    q, mask, expected = row_metric(v, image, metric), torch.rand(2, 15) < 0.5, torch.zeros(2, 1, 3 * p, 5 * p)
    for b in range(2):
        for row in range(15):
            top, left = row // 5 * p, row % 5 * p
            pixels = [of(v[b, :, top + i, left + j]) for i in range(p) for j in range(p)]
            assert q[b, row] == pytest.approx(float(sum(pixels) / p**2), rel=1e-5)
            expected[b, 0, top : top + p, left : left + p] = mask[b, row]
    assert torch.equal(by_row(mask, image, v), expected.bool())


def test_metric_of_packed_tokens_and_of_clips() -> None:
    v = torch.randn(2, 3, 4, 4, 6)
    clip, packed = Segment("image", Grid(2, 2, 3), 12), Segment("image", Grid(12), 12)
    q = row_metric(v, clip, "std")
    assert q[1, 7] == pytest.approx(float(v[1, :, 2:4, 0:2, 2:4].std(0, correction=0).mean()), rel=1e-5)
    tokens = torch.randn(2, 12, 8)
    assert torch.allclose(row_metric(tokens, packed, "std"), tokens.std(-1, correction=0))
    assert by_row(torch.ones(2, 12, dtype=torch.bool), packed, tokens).shape == (2, 12, 1)


# --- a partial evaluation right after a dense one ----------------------------------------------------------


class Subject(NamedTuple):
    """A model on one input: its sites, the layout of its calls, and a call that gives what guidance would."""

    sites: Sequence[Site]
    layout: tuple[Segment, ...]
    call: Callable[[Run], Tensor]


def our_dit() -> Subject:
    model, cond = tiny_dit(), Cond(label=torch.tensor([0, 1]))
    t = torch.tensor([0.7, 0.4])
    return Subject(model.sites(), model.layout((3, 8, 8)), lambda run: model(noise(), t, cond, run))


def our_video_dit(text: int) -> Subject:
    torch.manual_seed(0)
    config = VideoDiTConfig(channels=2, frames=4, size=(8, 12), patch=(2, 2, 2), width=32, depth=3, heads=4)
    model = VideoDiT(replace(config, text_width=7 * bool(text), text_tokens=text)).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.15 * torch.randn_like(parameter))
    x, valid = torch.randn(2, 2, 4, 8, 12), torch.tensor([[True] * text, [True] * 3 + [False] * (text - 3)])
    cond = Cond(text=torch.randn(2, text, 7), text_mask=valid) if text else Cond()
    t = torch.tensor([0.7, 0.4])
    return Subject(model.sites(), model.layout((2, 4, 8, 12)), lambda run: model(x, t, cond, run))


def a_flux(references: int) -> Subject:
    """With control residuals; `references` rows of another picture follow those of the image."""
    model, inputs = flux.view(fluxes.transformer()), fluxes.call_inputs()
    more = torch.cat([torch.ones(references, 1), torch.arange(references)[:, None].expand(-1, 2)], 1)
    ids = torch.cat([inputs["img_ids"], more])
    rows = torch.cat([inputs["hidden_states"], torch.randn(2, references, 16)], 1)
    control = [0.1 * torch.randn(2, fluxes.L + references, fluxes.D) for _ in range(2)]
    changed = {"hidden_states": rows, "img_ids": ids, "controlnet_block_samples": control}
    layout = flux.layout(ids, inputs["txt_ids"])
    return Subject(
        flux.sites(model), layout, lambda run: fluxes.call(model, inputs, run, **changed)[:, : fluxes.L]
    )


def a_host(name: str) -> Subject:
    family = hosts.FAMILIES[name]
    model, inputs = family.view.view(family.transformer()), family.inputs()
    C = inputs["hidden_states"].shape[1]
    return Subject(
        family.view.sites(model), family.layout(model), lambda run: hosts.call(model, inputs, run)[:, :C]
    )


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "DiT": our_dit,
    "VideoDiT": partial(our_video_dit, 0),
    "VideoDiT, text": partial(our_video_dit, 5),
    "FLUX": partial(a_flux, 0),
    "FLUX, references": partial(a_flux, 6),
    **{f"host {name}": partial(a_host, name) for name in hosts.FAMILIES},
}
subjects = pytest.mark.parametrize("name", SUBJECTS)


@cache
def subject(name: str) -> Subject:
    return SUBJECTS[name]()


@torch.no_grad()
def after_dense(it: Subject, change: Callable[[Choice], Choice] = lambda c: c, cache: bool = True) -> Any:
    """A dense evaluation, one on some rows at the same x and t, and the mask of those rows."""
    trajectory = Trajectory(it.sites, [RAS(warmup=1)], 4)
    first, second = (Call(i, 4, 0.7, layout=it.layout) for i in range(2))
    dense = trajectory.leave(first, it.call(trajectory.run(first)))
    trajectory.guided(first, dense)
    (session,) = trajectory.sessions
    assert isinstance(session, Regions) and session.choice is not None
    session.choice = change(session.choice)
    run = trajectory.run(second)
    if not cache:
        run = Run({name: h for name, h in run.handlers.items() if name not in session.streams})
    image = next(segment for segment in it.layout if segment.stream == "image")
    rows = session.choice.rows
    mask = torch.zeros(len(rows), image.length, dtype=torch.bool).scatter(1, rows, True)
    return dense, it.call(run), by_row(mask, image, dense).expand_as(dense)


def off(dense: Tensor, partly: Tensor, mask: Tensor) -> float:
    return float((partly - dense)[mask].abs().max() / dense.abs().max())


@subjects
def test_computed_rows_equal_the_dense_ones_and_need_the_keys_of_the_others(name: str) -> None:
    """Each sample of the batch has rows of its own; positions, text rows, scatter and masks all have to be right."""
    dense, partly, mask = after_dense(subject(name))
    assert 0.4 < mask.float().mean() < 0.6
    assert not mask[0].equal(mask[1])
    assert off(dense, partly, mask) < 5e-6
    assert not partly[~mask].any()
    assert off(*after_dense(subject(name), cache=False)) > 1e-4


@subjects
def test_the_order_of_rows_changes_nothing(name: str) -> None:
    def shuffled(choice: Choice) -> Choice:
        order = torch.randperm(choice.rows.shape[1], generator=torch.Generator().manual_seed(0))
        return choice._replace(rows=choice.rows[:, order])

    _, plain, _ = after_dense(subject(name))
    _, other, _ = after_dense(subject(name), shuffled)
    assert torch.allclose(plain, other, rtol=1e-4, atol=5e-6 * float(plain.abs().max()))


@subjects
def test_all_rows_are_a_dense_evaluation(name: str) -> None:
    def every(choice: Choice) -> Choice:
        image = next(segment for segment in subject(name).layout if segment.stream == "image")
        return choice._replace(rows=torch.arange(image.length).expand(2, -1))

    dense, whole, mask = after_dense(subject(name), every)
    assert mask.all()
    assert torch.allclose(whole, dense, rtol=1e-4, atol=2e-6 * float(dense.abs().max()))


# --- a trajectory ------------------------------------------------------------------------------------------

PART = (Site("tokens", "tokens"), Site("core", "core"), Site("head", "head"))
IMAGE = Segment("image", Grid(1, 3, 5), 15)


def test_rows_left_out_move_along_their_last_velocity() -> None:
    """A field that is constant in each evaluation: a row moves by the values at its last active ones."""
    steps, policy = 20, RAS(0.4, warmup=2, reset_every=6, selection="low", starvation=0.3)
    trajectory, field = Trajectory(PART, [policy], steps), torch.randn(steps, 2, 15, 4)
    (session,) = trajectory.sessions
    assert isinstance(session, Regions)
    x, expected, last = torch.zeros(2, 15, 4), torch.zeros(2, 15, 4), torch.zeros(2, 15, 4)
    for i in range(steps):
        call = Call(i, steps, 1 - i / steps, layout=(IMAGE,))
        run, choice = trajectory.run(call), session.choice
        tokens = run.site("tokens", Tokens, field[i])
        keys = tokens.x[:, None]
        run.site("core", attention, keys, keys, keys)
        v = trajectory.guided(call, trajectory.leave(call, run.site("head", torch.clone, tokens.x)))
        x = x + v * (i + 1)
        for b in range(2):
            for row in range(15):
                if choice is None or row in choice.rows[b]:
                    last[b, row] = field[i, b, row]
                expected[b, row] += last[b, row] * (i + 1)
    assert torch.allclose(x, expected, atol=1e-4)
    assert sum(policy.skipped(steps, 15)) == trajectory.finish()[0].rows_saved > 0


LABELS = Cond(label=torch.tensor([1, 2, 3]))


def drawn(*policies: Policy, seeds: Sequence[int] = (3, 5, 8), cond: Cond = LABELS, **options: Any) -> Any:
    options = {"steps": STEPS, "guidance": ClassifierFree(2.0)} | options
    return sample(tiny_dit(), cond, seeds, policies=policies, **options)


def test_neutral_settings_change_no_bit() -> None:
    exact = drawn().samples
    assert torch.equal(drawn(RAS(1.0)).samples, exact)
    for policy in (RAS(warmup=STEPS), RAS(warmup=1, resets=tuple(range(STEPS)))):
        with pytest.raises(NoEffectError, match="saved nothing: all 24 evaluations were full"):
            drawn(policy)
    for policy in (RAS(warmup=STEPS), RAS(resets=tuple(range(STEPS)))):
        trajectory, plain = Trajectory(tiny_dit().sites(), [policy], STEPS), tiny_dit()
        for index in range(STEPS):
            call = call_at(plain, index)
            out = evaluate(plain, trajectory, noise(), call)
            assert torch.equal(trajectory.guided(call, out), out)
            assert torch.equal(out, evaluate(plain, Trajectory((), (), STEPS), noise(), call))


@pytest.mark.parametrize("selection", ["published", "low", "high"])
def test_a_sample_does_not_depend_on_its_batch(selection: Any) -> None:
    policy = RAS(0.25, selection=selection)
    together = drawn(policy).samples
    alone = torch.cat(
        [drawn(policy, seeds=[s], cond=LABELS.rows(slice(i, i + 1))).samples for i, s in enumerate((3, 5, 8))]
    )
    assert torch.allclose(together, alone, atol=1e-4)
    assert not torch.allclose(together, drawn().samples, atol=1e-2)


def test_branches_of_one_call_equal_branches_of_their_own() -> None:
    """Both get the rows that were chosen after guidance."""
    assert torch.allclose(drawn(RAS(), batched=True).samples, drawn(RAS()).samples, atol=1e-4)
    one = {"seeds": [3], "cond": LABELS.rows(slice(1))}
    assert torch.allclose(drawn(RAS(), batched=True, **one).samples, drawn(RAS(), **one).samples, atol=1e-4)


def test_solvers_of_two_evaluations_and_networks_with_a_variance() -> None:
    (receipt,) = drawn(RAS(), solver=Heun()).receipts
    assert receipt.as_dict()["lanes"]["cond"] == {"computed": "0-3 12 20", "partial": "4-11 13-19 21-22"}
    model = type(tiny_dit())(replace(TINY, convention=DDPM)).eval()
    torch.nn.init.normal_(model.head.out.weight)
    assert (
        sample(model, LABELS, [3, 5, 8], steps=STEPS, solver=Ancestral(), policies=[RAS()])
        .samples.isfinite()
        .all()
    )


def test_a_lane_that_was_away_is_computed_in_full() -> None:
    model = tiny_dit()
    trajectory = Trajectory(model.sites(), [RAS()], STEPS)
    with torch.no_grad():
        for index in range(STEPS):
            call = call_at(model, index)
            out = evaluate(model, trajectory, noise(), call)
            if index in (6, 7, 9):
                evaluate(model, trajectory, noise(), call_at(model, index, "late"))
            trajectory.guided(call, out)
    (receipt,) = trajectory.finish()
    assert receipt.as_dict()["lanes"] == {
        "cond": {"computed": "0-3", "partial": "4-11"},
        "late": {"computed": "6 9", "partial": "7"},
    }


def test_another_batch_or_size_is_computed_in_full() -> None:
    model = tiny_dit()
    trajectory = Trajectory(model.sites(), [RAS()], STEPS)
    sizes = [(2, 8)] * 6 + [(3, 8)] * 2 + [(3, 4)] * 4
    with torch.no_grad():
        for index, (batch, side) in enumerate(sizes):
            call = replace(call_at(model, index), layout=model.layout((3, side, side)))
            x = torch.randn(batch, 3, side, side)
            out = evaluate(model, trajectory, x, call)
            assert trajectory.guided(call, out).shape == x.shape
    (receipt,) = trajectory.finish()
    assert receipt.as_dict()["lanes"]["cond"] == {"computed": "0-3 6 8", "partial": "4-5 7 9-11"}


def test_receipt_counts_the_rows_that_were_not_computed() -> None:
    (receipt,) = drawn(RAS(high_ratio=1.0)).receipts
    assert receipt.saved == 0
    assert receipt.rows_saved == 2 * 8 * 8  # two lanes, evaluations 4 to 11, 8 of 16 rows
    steps = {"computed": "0-3", "partial": "4-11"}
    assert receipt.as_dict() == {
        "policy": str(RAS(high_ratio=1.0)),
        "sites": 5,
        "site_calls_saved": 0,
        "rows_saved": pytest.approx(8 * 8 / (12 * 16)),
        "lanes": {"cond": steps, "uncond": steps},
    }


def test_memory_is_that_of_the_keys_and_is_told_at_once() -> None:
    model, bytes_ = tiny_dit(), 3 * 2 * 2 * 16 * 32 * 4  # blocks, keys and values, samples, rows, width
    trajectory = Trajectory(model.sites(), [RAS(end=9)], STEPS)
    (session,) = trajectory.sessions
    held = []
    with torch.no_grad():
        for index in range(STEPS):
            call = call_at(model, index)
            out = evaluate(model, trajectory, noise(), call)
            held.append(session.bytes())
            if index < 8:
                assert session.projected_bytes() >= bytes_
            trajectory.guided(call, out)
    rest = noise().nbytes + 2 * 16 * 4 + 2 * 9 * 8  # stale prediction, counts, rows
    assert held[:3] == [0, 0, 0] and held[3] == bytes_
    assert held[4:8] == [bytes_ + rest] * 4
    assert max(held[9:]) < rest
    with pytest.raises(ConfigError, match=f"max_bytes={bytes_ - 1:,}: .* would hold {bytes_:,} bytes"):
        evaluate(model, Trajectory(model.sites(), [RAS()], STEPS, bytes_ - 1), noise(), call_at(model, 0))


def test_no_graph_breaks_where_rows_are_left_out() -> None:
    torch._dynamo.reset()
    model = tiny_dit()
    trajectory = Trajectory(model.sites(), [RAS(warmup=1)], STEPS)
    layer, (shift, scale), x = model.blocks[0], torch.randn(2, 2, 1, 32), torch.randn(2, 9, 32)
    with torch.no_grad():
        trajectory.guided(call_at(model, 0), evaluate(model, trajectory, noise(), call_at(model, 0)))
        run = trajectory.run(call_at(model, 1))
        run.site("tokens", model.tokenize, noise())
        attend = partial(layer.attend, run, "blocks.0.attn")
        compiled = torch.compile(attend, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x, shift, scale), attend(x, shift, scale))


# --- what is said and what is refused ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy", [RAS(), LUMINA, RAS(0.25, end=24, resets=(7,), selection="low", metric="l2", starvation=1.0)]
)
def test_text(policy: RAS) -> None:
    assert component(Policy, spec(policy)) == policy  # type: ignore[type-abstract]


def test_resets_as_text() -> None:
    read = component(Policy, "ras:ratio=0.25,resets=12+22,end=none")  # type: ignore[type-abstract]
    assert read == RAS(0.25, resets=(12, 22))
    with pytest.raises(ConfigError, match="resets='x', expected an integer"):
        component(Policy, "ras:resets=12+x")  # type: ignore[type-abstract]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratio": 0.0}, "ratio=0.0, expected above 0"),
        ({"ratio": float("nan")}, "ratio=nan, expected above 0"),
        ({"high_ratio": 1.5}, "high_ratio=1.5, expected 0 to 1"),
        ({"starvation": -1.0}, "starvation=-1.0, expected 0 or more"),
        ({"warmup": 0}, "warmup=0, expected an integer of at least 1"),
        ({"resets": (3, -1)}, "resets=-1, expected an integer of at least 0"),
        ({"end": 2.5}, "end=2.5, expected an integer"),
        ({"metric": "l1"}, "unknown metric 'l1'.*did you mean 'l2'"),
        ({"selection": "lowest"}, "unknown selection 'lowest'; did you mean 'low'"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RAS(**changes)


def test_more_warmup_than_evaluations_is_refused() -> None:
    with pytest.raises(ConfigError, match="warmup=4, expected at most total=3"):
        drawn(RAS(), steps=3)


@pytest.mark.parametrize(
    ("other", "what"), [(TaylorSeer(), "schedule"), (BandReuse(), "rows"), (RAS(0.25), "schedule")]
)
def test_other_owners_are_refused_by_name(other: Policy, what: str) -> None:
    for one, two in ((RAS(), other), (other, RAS())):
        message = f"{type(one).__name__} and {type(two).__name__} both own '{what}'"
        with pytest.raises(ConflictError, match=message):
            Trajectory(tiny_dit().sites(), (one, two), STEPS)


def test_models_that_cannot_run_on_some_rows_are_refused() -> None:
    with pytest.raises(NoEffectError, match="RAS: this model has no site"):
        Trajectory(PART[:2], [RAS()], STEPS)
    model = VDT(
        VDTConfig(frames=4, size=8, patch=2, channels=2, width=32, depth=1, heads=2, convention=Convention())
    ).eval()
    with pytest.raises(
        ConfigError, match=r"RAS: blocks\.0\..*core has 4 keys, expected the 64 rows of its sequence"
    ):
        sample(model, Cond(label=torch.tensor([1])), [3], steps=STEPS, policies=[RAS()])


def test_the_spread_of_one_channel_is_refused() -> None:
    with pytest.raises(ConfigError, match="of 1 channel is 0, expected metric='l2'"):
        row_metric(torch.randn(2, 1, 6, 10), IMAGE, "std")
    assert row_metric(torch.randn(2, 1, 6, 10), IMAGE, "l2").shape == (2, 15)
