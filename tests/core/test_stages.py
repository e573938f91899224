"""A network of two grids under every policy: it acts in its stage, or is refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ditkit.attention import Grouped
from ditkit.caching import TaylorSeer
from ditkit.core.catalog import every
from ditkit.core.cond import Cond
from ditkit.core.errors import ConfigError, NoEffectError
from ditkit.core.grid import Grid, image_of, sequence
from ditkit.core.policy import Policy
from ditkit.core.run import Call, Run, attended, moving
from ditkit.core.trajectory import Trajectory
from rig import call_at
from two_stages import TwoStages, two_stages

TOTAL = 9
REFUSED = {"RAS", "ConfidentTaylor", "DyDiT", "LearnedDepth"}
ALL = Grouped(group=(4, 4), block=8, reach=9, kernel="cpu")


@pytest.fixture(scope="module")
def model() -> TwoStages:
    return two_stages()


def noise() -> Tensor:
    return torch.randn(2, 2, 16, 16, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def evaluated(model: TwoStages, policies: list[Policy], max_bytes: int | None = None) -> list[Tensor]:
    """What the network says in each evaluation of one trajectory at a fixed input."""
    trajectory, outs = Trajectory(model.sites(), policies, TOTAL, max_bytes), []
    for index in range(TOTAL):
        call = call_at(model, index, total=TOTAL)
        out = model(noise(), torch.full((2,), call.t), Cond(), trajectory.run(call))
        outs.append(trajectory.leave(call, out))
        trajectory.guided(call, outs[-1])
    trajectory.finish()
    return outs


def test_every_site_is_met_once_in_the_stated_order(model):
    seen = []

    class Recording(Run):
        def site(self, name, fn, *args):
            seen.append(name)
            return super().site(name, fn, *args)

    model(noise(), torch.ones(2), Cond(), Recording())
    assert seen == [site.name for site in model.sites()]


SHIPPED = [
    kind for kind in every(Policy) if kind.__module__ != "ditkit.adapt.toy"
]  # toys of other test files


@pytest.mark.parametrize("kind", SHIPPED, ids=lambda kind: kind.__name__)
def test_every_policy_acts_in_its_stage_or_is_refused_by_name(model, kind):
    policy = kind.small(Grid(1, 8, 8))
    if kind.__name__ in REFUSED:
        with pytest.raises((ConfigError, NoEffectError), match=f"{kind.__name__}: "):
            evaluated(model, [policy])
        return
    dense = evaluated(model, [])
    assert all(map(torch.equal, evaluated(model, [policy.exact()]), dense))
    given = evaluated(model, [policy])
    assert all(out.isfinite().all() for out in given)
    assert not all(map(torch.equal, given, dense))


def test_a_pattern_that_keeps_all_keys_is_dense_attention(model):
    ends = [site.name for site in model.sites() if site.stage == 1 and site.kind in ("tokens", "head")]
    assert [name for name, how in ALL.claims(model.sites()).items() if how == "wrap"] == ends
    cached = TaylorSeer(interval=2, order=1)
    for beside in ([], [cached]):
        pairs = zip(evaluated(model, [ALL, *beside]), evaluated(model, beside), strict=True)
        assert max((out - dense).abs().max() for out, dense in pairs) < 1e-5


def test_memory_is_foreseen_for_the_rows_and_the_width_of_each_stage(model):
    branches = [site for site in model.sites() if site.kind == "branch"]
    need = 2 * 4 * 2 * sum({0: 256, 1: 64}[site.stage] * site.width for site in branches)
    evaluated(model, [TaylorSeer(interval=2, order=1)], max_bytes=need)
    with pytest.raises(ConfigError, match=f"would hold {need:,} bytes"):
        evaluated(model, [TaylorSeer(interval=2, order=1)], max_bytes=need - 1)


def test_a_stack_has_the_blocks_up_to_the_next(model):
    depths = Trajectory(model.sites(), [TaylorSeer(interval=2)], TOTAL).receipts[0].depths
    assert depths == {"down": 2, "mid": 2, "up": 2}


def test_a_stage_has_its_own_image(model):
    layout = model.layout(model.sample_shape)
    assert image_of(layout).grid == Grid(1, 16, 16) and image_of(layout, 1).grid == Grid(1, 8, 8)
    assert [s.length for s in sequence(layout, "joint", 1)] == [64]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mid.0.attn.core": {"stage": 0}}, r"attention works in stages \[0, 1\], expected one"),
        ({"mid.0.mlp": {"ordered": True}}, "'mid.0.mlp' reads its rows as a grid"),
        ({"mid.0.attn.core": {"attention": "axial"}}, "'mid.0.attn.core' does not attend to just the rows"),
        ({"mid.0.attn.core": {"over": ("image", "prompt")}}, "'mid.0.attn.core' does not attend to just"),
        ({"split": {"stage": 0}}, "stage 1 has no 'head' site"),
    ],
)
def test_what_cannot_be_moved_is_refused(model, change, message):
    sites = [site._replace(**change.get(site.name, {})) for site in model.sites()]
    with pytest.raises(ConfigError, match=message):
        moving(sites, attended(sites), "Grouped")
    with pytest.raises((ConfigError, NoEffectError)):
        Trajectory(sites, [ALL], 1)


def test_a_call_always_has_times():
    assert Call(0, 2, 0.25).times.tolist() == [0.25]
    per_frame = torch.rand(2, 4)
    assert Call(0, 2, float("nan"), times=per_frame).times is per_frame
    assert Call(0, 2, 0.5, times=per_frame) == Call(0, 2, 0.5)
