"""Sites, trajectories, receipts and refusals, with policies small enough to see through."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch

from ditkit.caching.taylorseer import TaylorSeer
from ditkit.core.catalog import every
from ditkit.core.errors import ConfigError, ConflictError, NoEffectError
from ditkit.core.policy import Claim, Policy, Session
from ditkit.core.receipt import spans
from ditkit.core.run import DIRECT, Call, Handler, Run, Site, named
from ditkit.core.trajectory import Trajectory
from rig import STEPS, TINY, call_at, evaluate, noise, sample, tiny_dit

SITES = (Site("a", "branch"), Site("b", "branch"), Site("b.core", "core"))


@dataclass(frozen=True)
class Scripted(Policy):
    """Claims and handlers as given."""

    wants: tuple[tuple[str, Claim], ...]
    acts: tuple[tuple[str, Handler], ...] = ()
    neutral: bool = False

    def claims(self, sites: Sequence[Site]) -> Mapping[str, Claim]:
        return dict(self.wants)

    def start(self, sites: Sequence[Site], total: int, modules: Any = None) -> Session:
        session = Session()
        session.enter = lambda call: {} if self.neutral else dict(self.acts)
        return session

    def exact(self) -> Scripted:
        return replace(self, neutral=True)


def tagged(tag: str, log: list[str]) -> Handler:
    def handler(fn: Callable[..., Any], *args: Any) -> Any:
        log.append(tag)
        return fn(*args)

    return handler


def play(policies: Sequence[Policy], total: int = 2, **kwargs: Any) -> Trajectory:
    trajectory = Trajectory(SITES, policies, total, **kwargs)
    for index in range(total):
        call = Call(index, total, 1 - index / total)
        run = trajectory.run(call)
        for name in ("a", "b", "b.core"):
            run.site(name, torch.ones_like, torch.zeros(2, 3))
        trajectory.leave(call, None)
    return trajectory


def test_a_site_without_a_handler_calls_its_function():
    assert DIRECT.site("a", max, 3, 5) == 5
    run = Run({"a": lambda fn, *args: -fn(*args)})
    assert (run.site("a", max, 3, 5), run.site("b", max, 3, 5)) == (-5, 5)


def test_without_policies_the_run_is_direct():
    assert Trajectory(SITES, [], 3).run(Call(0, 3, 1.0)) is DIRECT


def test_sites_of_dit():
    def block(i: int) -> list[tuple[str, str, str]]:
        at = f"blocks.{i}"
        names = [
            (at, "block"),
            (f"{at}.modulation", "modulation"),
            (f"{at}.attn", "branch"),
            (f"{at}.attn.route", "choice"),
            (f"{at}.attn.kv", "kv"),
            (f"{at}.attn.core", "core"),
            (f"{at}.mlp", "branch"),
            (f"{at}.mlp.route", "choice"),
            (f"{at}.mlp.inner", "inner"),
        ]
        return [(*pair, "image") for pair in names]

    ends = [("time", "time", "image"), ("time.embedding", "timestep", "image")]
    ends += [("tokens", "tokens", "image"), ("blocks", "stack", "image")]
    head = [("head", "head", "image"), ("head.modulation", "modulation", "image")]
    expected = [*ends, *block(0), *block(1), *block(2), *head]
    assert [tuple(site[:3]) for site in tiny_dit().sites()] == expected
    assert named(tiny_dit().sites(), "stack", "head") == ["blocks", "head"]


def test_every_declared_site_of_dit_is_met_once_a_call():
    model, met = tiny_dit(), []

    class Watch(Run):
        def site(self, name: str, fn: Callable[..., Any], *args: Any) -> Any:
            met.append(name)
            return fn(*args)

    evaluate(model, trajectory := Trajectory(model.sites(), [], 1), noise(), call_at(model, 0))
    assert trajectory.finish() == []
    model.forward(noise(), torch.ones(2), cond_of(2), run=Watch())
    assert sorted(met) == sorted(site.name for site in model.sites())


def cond_of(batch: int) -> Any:
    from ditkit.core.cond import Cond

    return Cond(label=torch.arange(batch) % TINY.classes)


# --- who may do what ---------------------------------------------------------------------------------------


def test_owner_innermost_then_wrappers_then_watchers():
    log: list[str] = []
    how: dict[str, Claim] = {"watcher": "see", "owner": "own", "wrapper": "wrap"}
    policies = [
        Scripted((("a", claim),), (("a", tagged(tag, log)),), neutral=True) for tag, claim in how.items()
    ]
    trajectory = Trajectory(SITES, [replace(policy, neutral=False) for policy in policies], 1)
    trajectory.run(Call(0, 1, 1.0)).site("a", lambda x: log.append("site"), 0)
    assert log == ["watcher", "wrapper", "owner", "site"]


def test_two_owners_are_refused_by_name():
    with pytest.raises(ConflictError, match="TaylorSeer and TaylorSeer both own 'schedule'"):
        sample(tiny_dit(), [TaylorSeer(3), TaylorSeer(4)])
    with pytest.raises(ConflictError, match="TaylorSeer and Scripted both own 'a'"):
        Trajectory(SITES, [TaylorSeer(), Scripted((("a", "own"),))], 9)


def test_one_policy_given_twice_is_two_owners():
    policy = TaylorSeer()
    with pytest.raises(ConflictError, match="both own 'schedule'"):
        Trajectory(SITES, [policy, policy], 9)


def test_an_unknown_site_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"Scripted: unknown site 'b\.cores'; did you mean 'b\.core'"):
        Trajectory(SITES, [Scripted((("b.cores", "see"),))], 9)


def test_a_model_without_usable_sites_is_refused():
    with pytest.raises(NoEffectError, match="TaylorSeer: this model has no site that it can use"):
        Trajectory((Site("head", "head"),), [TaylorSeer()], 9)


def test_acting_where_nothing_was_claimed_is_refused():
    with pytest.raises(ConfigError, match="Scripted acts on 'b', which it did not claim"):
        play([Scripted((("a", "wrap"),), (("b", tagged("b", [])),))])


# --- complete or not at all --------------------------------------------------------------------------------


class Ledger(Session):
    """Keeps the index of every complete call."""

    def __init__(self, breaks_at: int = -1) -> None:
        super().__init__()
        self.breaks_at = breaks_at

    def enter(self, call: Call) -> Mapping[str, Handler]:
        self.put((call.net, call.lane, str(call.index)), torch.zeros(5))
        return {}

    def leave(self, call: Call, out: Any) -> Any:
        if call.index == self.breaks_at:
            raise KeyboardInterrupt
        return out


@dataclass(frozen=True)
class Kept(Policy):
    breaks_at: int = -1

    def claims(self, sites: Sequence[Site]) -> Mapping[str, Claim]:
        return {"a": "see"}

    def start(self, sites: Sequence[Site], total: int, modules: Any = None) -> Ledger:
        return Ledger(self.breaks_at)

    def exact(self) -> Kept:
        return self


def test_staged_state_is_committed_by_all_or_by_none():
    trajectory = Trajectory(SITES, [Kept(), Kept(breaks_at=1)], 3)
    for index in range(3):
        call = Call(index, 3, 0.5)
        trajectory.run(call)
        if index == 1:
            with pytest.raises(KeyboardInterrupt):
                trajectory.leave(call, None)
        else:
            trajectory.leave(call, None)
    for session in trajectory.sessions:
        assert list(session.state) == [("main", "cond", "0"), ("main", "cond", "2")]
        assert session.bytes() == 2 * 5 * 4 and not session.staged
    assert trajectory.receipts[0].calls == 2


def test_outputs_and_guided_values_pass_through_every_session():
    trajectory = Trajectory(SITES, [Kept(), Kept()], 1)
    for session, add in zip(trajectory.sessions, (1, 10), strict=True):
        session.leave = lambda call, out, add=add: out * 2 + add
        session.guided = lambda call, v, add=add: v * 3 + add
    trajectory.run(call := Call(0, 1, 1.0))
    assert trajectory.leave(call, 1) == (1 * 2 + 1) * 2 + 10
    assert trajectory.guided(call, 1) == (1 * 3 + 1) * 3 + 10


# --- receipts ----------------------------------------------------------------------------------------------


def test_receipt_of_taylorseer():
    model = tiny_dit()
    trajectory = Trajectory(model.sites(), [policy := TaylorSeer(interval=4, order=1)], STEPS)
    for index in range(STEPS):
        for lane in ("cond", "uncond"):
            evaluate(model, trajectory, noise(), call_at(model, index, lane))
    (receipt,) = trajectory.finish()
    steps = {"computed": "0-1 5 9", "forecast": "2-4 6-8 10-11"}
    assert receipt.as_dict() == {
        "policy": str(policy),
        "sites": 6,
        "site_calls_saved": 6 * 8 * 2,
        "lanes": {"cond": steps, "uncond": steps},
    }
    assert receipt.calls == 2 * STEPS
    assert str(receipt) == f"{policy}: 6 sites; " + "; ".join(
        f"{lane}: computed 0-1 5 9, forecast 2-4 6-8 10-11" for lane in ("cond", "uncond")
    )


def test_receipts_tell_networks_apart():
    model = tiny_dit()
    trajectory = Trajectory(model.sites(), [TaylorSeer(interval=2, warmup=1)], 4)
    for index in range(4):
        for net in ("main", "guide"):
            evaluate(model, trajectory, noise(), call_at(model, index, net=net, total=4))
    lanes = trajectory.finish()[0].as_dict()["lanes"]
    assert list(lanes) == ["cond", "guide/cond"]
    assert lanes["guide/cond"] == {"computed": "0 2", "forecast": "1 3"}


def test_a_receipt_counts_what_ran_not_what_was_promised():
    """A handler that says nothing about itself, and one that computes its site after all."""
    replace_all = Scripted((("a", "own"), ("b", "own")), (("a", lambda fn, x: x), ("b", lambda fn, x: fn(x))))
    (receipt,) = play([replace_all], total=3).finish()
    assert (receipt.sites, receipt.saved, receipt.calls) == ({"a", "b"}, 3, 3)
    assert receipt.rows["cond"] == {0: (1, 1), 1: (1, 1), 2: (1, 1)}


@pytest.mark.parametrize(
    ("numbers", "text"), [([], ""), ([4], "4"), ([0, 1, 2, 5, 7, 8], "0-2 5 7-8"), ([3, 2, 9], "2-3 9")]
)
def test_spans(numbers, text):
    assert spans(numbers) == text


# --- never silently nothing --------------------------------------------------------------------------------


def test_a_policy_that_saved_nothing_is_an_error():
    with pytest.raises(NoEffectError, match="saved nothing: all 3 evaluations were full"):
        sample(tiny_dit(), [TaylorSeer(interval=4, warmup=3)], steps=3)


def test_the_neutral_setting_may_save_nothing():
    sample(tiny_dit(), [TaylorSeer(interval=4, warmup=3).exact()], steps=3)


def test_a_watcher_that_met_nothing_is_an_error():
    with pytest.raises(NoEffectError, match="met none of its sites in 2 evaluations"):
        play([Scripted((("a", "see"),))]).finish()
    play([Scripted((("a", "see"),), (("a", tagged("", [])),))]).finish()


def without(rows: int, fn: Callable[..., Any], x: Any) -> Any:
    return fn(x)[:, rows:]


def test_an_owner_of_rows_computes_every_site_on_fewer_rows():
    sites = (Site("tokens", "tokens"),)
    for saved in (3, 0):
        takes = Scripted((("rows", "own"), ("tokens", "wrap")), (("tokens", partial(without, saved)),))
        trajectory, call = Trajectory(sites, [takes], 1), Call(0, 1, 1.0)
        trajectory.leave(call, trajectory.run(call).site("tokens", torch.ones_like, torch.zeros(1, 5, 3)))
        assert trajectory.receipts[0].rows_saved == saved
        assert trajectory.receipts[0].full("cond") == ([] if saved else [0])
        if saved:
            trajectory.finish()
        else:
            with pytest.raises(NoEffectError, match="saved nothing"):
                trajectory.finish()


# --- memory ------------------------------------------------------------------------------------------------


def test_a_budget_is_refused_in_the_first_full_evaluation():
    model, need = tiny_dit(), 6 * 2 * 16 * 32 * 4 * 3
    for lanes in (1, 2):
        trajectory = Trajectory(model.sites(), [TaylorSeer(order=2)], STEPS, max_bytes=lanes * need - 1)
        with pytest.raises(ConfigError) as refusal:
            for lane in ("cond", "uncond")[:lanes]:
                evaluate(model, trajectory, noise(), call_at(model, 0, lane))
        assert str(refusal.value) == (
            f"max_bytes={lanes * need - 1:,}: {TaylorSeer(order=2)} would hold {lanes * need:,} bytes; "
            "order=1 would fit"
        )
        assert trajectory.receipts[0].saved == 0


def test_a_budget_that_suffices_is_kept():
    model, need = tiny_dit(), 6 * 2 * 16 * 32 * 4 * 3
    trajectory = Trajectory(model.sites(), [TaylorSeer(order=2)], STEPS, max_bytes=need)
    with torch.no_grad():
        for index in range(STEPS):
            evaluate(model, trajectory, noise(), call_at(model, index))
    assert trajectory.peak_bytes == need


def test_the_catalog_finds_policies_that_ship_and_no_others():
    assert TaylorSeer in every(Policy)
    assert Scripted not in every(Policy)
