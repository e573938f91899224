"""RAS: rows that are computed come out as in a dense evaluation, and what becomes of the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import flux_support as fluxes
import hosts_support as hosts
from ditkit.caching import RAS, TaylorSeer
from ditkit.caching.regional import Choice, Regions, by_row
from ditkit.core.cond import Cond
from ditkit.core.convention import DDPM
from ditkit.core.errors import ConfigError, ConflictError, NoEffectError
from ditkit.core.grid import Grid, Segment, Tokens
from ditkit.core.policy import Policy
from ditkit.core.run import Call, Run, Site
from ditkit.core.trajectory import Trajectory
from ditkit.hosts import flux
from ditkit.models.predformer import PredFormer, PredFormerConfig
from ditkit.models.vdt import VDT, VDTConfig
from ditkit.models.video_dit import VideoDiT, VideoDiTConfig
from ditkit.nn.blocks import attention
from ditkit.nn.modulation import Parts
from ditkit.sample import Ancestral, ClassifierFree, Heun, sample
from models_support import perturbed
from policies_support import BandReuse
from rig import STEPS, TINY, call_at, evaluate, noise, tiny_dit

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
    model = perturbed(VideoDiT(replace(config, text_width=7 * bool(text), text_tokens=text)), 0.15)
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
    model, inputs, _ = hosts.shared(name)
    C = inputs["hidden_states"].shape[1]
    return Subject(
        hosts.sites_of(model),
        hosts.layout_of(model, inputs),
        lambda run: hosts.call(model, inputs, run)[:, :C],
    )


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "DiT": our_dit,
    "VideoDiT": partial(our_video_dit, 0),
    "VideoDiT, text": partial(our_video_dit, 5),
    "FLUX": partial(a_flux, 0),
    "FLUX, references": partial(a_flux, 6),
    **{
        f"host {name}": partial(a_host, name)
        for name in ("sd3", "sd3.5", "dit", "lumina2", "lumina-next", "wan")
    },
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
        return choice._replace(rows=torch.arange(image.length).expand(len(choice.rows), -1))

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
    layer, x = model.blocks[0], torch.randn(2, 9, 32)
    c = Parts(layer.modulation, torch.randn(2, 1, 32))
    with torch.no_grad():
        trajectory.guided(call_at(model, 0), evaluate(model, trajectory, noise(), call_at(model, 0)))
        run = trajectory.run(call_at(model, 1))
        run.site("tokens", model.tokenize, noise())
        attend = partial(layer.attend, run, "blocks.0.attn")
        compiled = torch.compile(attend, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x, c), attend(x, c))


# --- what is said and what is refused ----------------------------------------------------------------------


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
    for model in (
        VDT(VDTConfig(frames=4, size=8, patch=2, channels=2, width=32, depth=1, heads=2)),
        PredFormer(PredFormerConfig(frames=4, size=(8, 8), patch=2, width=32, heads=2, layout="TS")),
    ):
        with pytest.raises(NoEffectError, match="RAS: this model has no site"):
            Trajectory(model.sites(), [RAS()], STEPS)
