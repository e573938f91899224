"""What every policy promises: a new file in `caching` or `attention` is tested here the moment it exists."""

from __future__ import annotations

import gc
from functools import cache, partial
from types import FunctionType, ModuleType

import pytest
import torch
from torch import Tensor, nn

from ditkit.adapt import TaskRouting
from ditkit.attention.linear import ReluLinear
from ditkit.attention.pattern import Pattern
from ditkit.attention.reshaped import Reshape
from ditkit.compress import DyDiT, LearnedDepth
from ditkit.core.catalog import every
from ditkit.core.cond import Cond
from ditkit.core.grid import Grid
from ditkit.core.policy import RESOURCES, Policy
from ditkit.core.run import DIRECT, Call
from ditkit.core.trajectory import DEPTH, Trajectory
from ditkit.models.dit import DiT
from ditkit.nn.modulation import Parts
from rig import STEPS, call_at, evaluate, noise, sample, tiny_dit

LANES = ("cond", "uncond")
GRID = Grid(1, 4, 4)
"""Tokens of `tiny_dit`, where the default of a pattern would be switched off."""
SHIPPED = [cls for cls in every(Policy) if cls.__module__ != "ditkit.adapt.toy"]  # toys of other test files
pytestmark = pytest.mark.parametrize(
    "policy", [cls.small(GRID) for cls in SHIPPED], ids=lambda p: type(p).__name__
)


@pytest.fixture(scope="module")
def model():
    return tiny_dit()


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[lane], b[lane]) for lane in a)


def test_the_neutral_setting_changes_no_bit(model, policy):
    exact = policy.exact()
    assert exact == exact.exact() and type(exact) is type(policy)
    assert equal(sample(model, [exact], LANES), sample(model, (), LANES))


def test_a_small_setting_changes_something(model, policy):
    assert not equal(sample(model, [policy], LANES), sample(model, (), LANES))


def test_a_second_trajectory_equals_the_first(model, policy):
    assert equal(sample(model, [policy], LANES), sample(model, [policy], LANES))


def test_interleaved_lanes_equal_separate_ones(model, policy):
    """A lane knows nothing of the others but what came out of guidance, here the first lane's."""
    guided: list[Tensor] = []

    def noted(model: DiT, trajectory: Trajectory, x: Tensor, call: Call) -> Tensor:
        out = evaluate(model, trajectory, x, call)
        if call.lane == "cond":
            guided.append(out)
        return out

    together = sample(model, [policy], LANES, evaluate=noted)
    trajectory = Trajectory(model.sites(), [policy], STEPS)
    alone = noise(seed=1)
    with torch.no_grad():
        for index in range(STEPS):
            alone = alone - evaluate(model, trajectory, alone, call_at(model, index, "uncond")) / STEPS
            trajectory.guided(call_at(model, index), guided[index])
    assert equal(together, {**sample(model, [policy], ("cond",)), "uncond": alone})


@cache
def uninterrupted(policy: Policy) -> dict[str, Tensor]:
    """What no interruption may change: the same for every place that a call is interrupted at."""
    return sample(tiny_dit(), [policy], LANES)


PLACES = [
    (index, block, ("", ".attn", ".mlp")[(turn + block) % 3])
    for turn, index in enumerate((0, 1, 5, 6, STEPS - 1))
    for block in range(3)
]
"""Pairwise: each evaluation meets each block and each part, and each block each part."""


@pytest.mark.parametrize(("index", "block", "part"), PLACES)
def test_an_interrupted_call_was_never_made(model, policy, index, block, part):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    def interrupted_once(model: DiT, trajectory: Trajectory, x: Tensor, call: Call) -> Tensor:
        hook = model.get_submodule(f"blocks.{block}{part}").register_forward_hook(stop)
        try:
            if call.index == index:
                return evaluate(model, trajectory, x, call)
        except KeyboardInterrupt:
            interruptions.append(call.lane)
        finally:
            hook.remove()
        return evaluate(model, trajectory, x, call)

    interruptions: list[str] = []
    assert equal(sample(model, [policy], LANES, evaluate=interrupted_once), uninterrupted(policy))
    absent = isinstance(policy, LearnedDepth) and block > 0  # a block that is not kept never runs
    assert index > 0 or absent or interruptions == [*LANES], "the first evaluation computes everything"


def test_claims_name_what_exists(model, policy):
    claims = policy.claims(model.sites())
    assert claims and set(claims) <= {site.name for site in model.sites()} | set(RESOURCES)
    assert set(claims.values()) <= set(DEPTH)


def test_handlers_stay_within_the_claims(model, policy):
    claims, session = policy.claims(model.sites()), policy.start(model.sites(), STEPS)
    with torch.no_grad():
        for index in range(STEPS):
            call = call_at(model, index)
            assert set(session.enter(call)) <= set(claims)
            session.staged.clear()


def tensors_within(root: object) -> dict[int, int]:
    """Bytes of every storage that the garbage collector reaches from `root`, modules and code apart."""
    found, seen, todo = {}, set(), [root]
    while todo:
        thing = todo.pop()
        if id(thing) in seen or isinstance(thing, type | ModuleType | FunctionType | nn.Module):
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        todo.extend(gc.get_referents(thing))
    return found


def test_memory_kept_is_the_memory_stated(model, policy):
    def compared(model: DiT, trajectory: Trajectory, x: Tensor, call: Call) -> Tensor:
        (session,) = trajectory.sessions
        out = evaluate(model, trajectory, x, call)
        held = sum(tensors_within(session).values())
        assert session.bytes() == held
        assert session.projected_bytes() >= held
        most.append(held)
        return out

    most: list[int] = []
    sample(model, [policy], LANES, evaluate=compared)
    keeps_nothing = isinstance(policy, Pattern | LearnedDepth | TaskRouting | ReluLinear | DyDiT)
    stateless = keeps_nothing and not isinstance(policy, Reshape)
    assert (max(most) == 0) == stateless


@pytest.mark.parametrize("block", ["with the policy", "direct"])
def test_no_graph_breaks_inside_a_branch(model, policy, block):
    """`fullgraph` refuses a break; the branch runs as the policy would run it, with whatever acts inside."""
    torch._dynamo.reset()
    compiled = partial(torch.compile, backend="eager", fullgraph=True)
    trajectory = Trajectory(model.sites(), [policy], STEPS)
    layer, x = model.blocks[0], torch.randn(2, 16, 32)
    c = torch.randn(2, 1, 32)
    parts = Parts(layer.modulation, c)
    with torch.no_grad():
        for index in range(3):
            call = call_at(model, index)
            run = DIRECT if block == "direct" else trajectory.run(call)
            model.condition(torch.ones(2), Cond(label=torch.tensor([0, 1])), run)  # what a policy may watch
            attend = compiled(partial(layer.attend, run, "blocks.0.attn"))
            assert torch.equal(attend(x, parts), layer.attend(run, "blocks.0.attn", x, parts))
            feed = compiled(partial(layer.feed, run, "blocks.0.mlp"))
            assert torch.equal(feed(x, parts), layer.feed(run, "blocks.0.mlp", x, parts))
            if block == "direct":
                assert torch.equal(compiled(layer)(x, c[:, 0]), layer(x, c[:, 0]))
            evaluate(model, trajectory, noise(), call)
