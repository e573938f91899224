"""Temporal Feature Matters: features that are looked up, the choice of the nearer strategy, and tables."""

from __future__ import annotations

import threading
from copy import deepcopy
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import ditkit
import hosts_support as hosts
from ditkit.adapt.lora import LoRA
from ditkit.caching import TaylorSeer
from ditkit.compress import Calibration, Kept, TemporalFeatures, recording
from ditkit.compress.features import cosines, temporal_features
from ditkit.compress.temporal_cache import Selection
from ditkit.core.cond import Cond
from ditkit.core.errors import ConfigError, ConflictError
from ditkit.hosts.hosted import Host
from ditkit.models.dit import DiT, DiTConfig
from ditkit.nn.quantised import QuantisedLinear, Schedule
from ditkit.nn.temporal_table import Absent, TemporalTable
from rig import TINY, noise, tiny_dit

TIMES = (1.0, 0.75, 0.5)
LABELS = torch.arange(16) % 5
QUICK = TemporalFeatures(weights=4, rounding="nearest", interval=1)
FLOATS = replace(QUICK, weights=32, activations=32, cache_bits=32, strategies=("cache",))
FEATURES = ("blocks.0.modulation", "head.modulation")


def network() -> DiT:
    model = DiT(replace(TINY, depth=1)).eval()
    model.load_state_dict({k: v for k, v in tiny_dit().state_dict().items() if k in model.state_dict()})
    return model


def arguments(t: float, seed: int = 0) -> dict[str, Any]:
    return {"x": noise(16, seed), "t": torch.full((16,), t), "cond": Cond(label=LABELS)}


@torch.no_grad()
def out(model: Any, t: float = 0.75, seed: int = 9, **changed: Any) -> Tensor:
    return model(**{**arguments(t, seed), **changed})


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    model = network()
    with recording(model) as calls, torch.no_grad():
        for step, t in enumerate(TIMES):
            model(**arguments(t, step))
    return Calibration(tuple(calls))


@pytest.fixture(scope="module")
def settled(calibration) -> TemporalFeatures:
    """Names of layers and the schedule, for settings that ask for no trace of their own."""
    found = QUICK.resolved(network(), calibration)
    return replace(found, cached=(), kept=(), conditions=(), reads=())


@pytest.fixture(scope="module")
def arms(calibration) -> dict[str, Any]:
    changed: dict[str, dict[str, Any]] = {
        "floats": {"weights": 32, "activations": 32, "cache_bits": 32, "strategies": ("cache",)},
        "both": {},
        "tib": {"strategies": ("tib",)},
        "cache": {"strategies": ("cache",)},
    }
    found = {}
    for name, fields in changed.items():
        found[name] = network()
        found[name].transform(replace(QUICK, **fields), calibration)
    return found


def test_a_table_of_floats_is_the_network_that_computes(arms):
    for t in TIMES:
        assert torch.allclose(out(arms["floats"], t), out(network(), t), atol=1e-6)
    assert not any(isinstance(m, QuantisedLinear) for m in arms["floats"].modules())


def test_eight_bits_are_off_by_half_a_step_of_their_chunk(arms):
    full = temporal_features(network(), FEATURES, [arguments(t) for t in TIMES])
    own = temporal_features(arms["cache"], FEATURES, [arguments(t) for t in TIMES])
    for name in FEATURES:
        table = arms["cache"].get_submodule(name)
        assert table.table.dtype == torch.uint8 and table.table_scale.shape[:2] == (3, 5)
        apart = (own[name] - full[name]).abs().view(3, 16, table.table_scale.shape[-1], -1).amax(-1)
        scales = table.table_scale[:, LABELS]
        assert (apart <= scales * 0.5001).all() and len(scales.unique()) == scales[:, :5].numel()


def test_the_choice_is_the_nearer_of_the_two_at_every_step_of_every_layer(calibration):
    setting = replace(QUICK, cache_bits=4)
    selection: Selection = vars(setting.resolved(network(), calibration))["_selection"]
    tib, cache = selection.errors["tib"], selection.errors["cache"]
    own = [
        torch.stack([1 - torch.nn.functional.cosine_similarity(a.double(), b.double(), -1)])
        for a, b in zip(selection.chosen, selection.full, strict=True)
    ]
    steps = torch.tensor(selection.steps)
    for i, one in enumerate(own):
        found = torch.stack([one[0][steps == step].mean() for step in range(3)])
        assert torch.allclose(found, torch.minimum(tib[i], cache[i]), rtol=1e-9)
    assert torch.equal(selection.looked_up, cache <= tib)


@pytest.mark.parametrize("granularity", ["pair", "layer", "global"])
def test_a_layer_that_is_exact_is_maintained_and_a_table_that_is_exact_is_looked_up(calibration, granularity):
    """Weights of one layer on the grid of 4 bits, whose table has 2: it stays. The other's table is nearer: it goes."""
    model = network()
    with torch.no_grad():
        model.time.outer.weight.mul_(20).round_().clamp_(-7, 8).div_(20)
        model.time.outer.weight[:, :2] = torch.tensor([-7.0, 8.0]) / 20
        layer = model.head.modulation
        layer.weight.mul_(20).round_().clamp_(-7, 8).div_(20)
        layer.weight[:, :2] = torch.tensor([-7.0, 8.0]) / 20
        model.blocks[0].modulation.weight.zero_()  # the feature is its bias, in each chunk of two values
        model.blocks[0].modulation.weight[:, 0] = 1e-3
        model.blocks[0].modulation.bias.copy_(torch.tensor([0.0, 1.0]).repeat(96))
    setting = replace(QUICK, activations=32, cache_bits=2, granularity=granularity)
    found = setting.resolved(model, calibration)
    selection: Selection = vars(found)["_selection"]
    assert (selection.errors["tib"][1] < 1e-9).all() and (selection.errors["cache"][1] > 1e-4).all()
    if granularity != "global":
        assert "head.modulation" in found.kept and "head.modulation" not in found.cached


def test_what_is_no_longer_read_is_gone(arms, tmp_path):
    gone = {"time.inner", "time.outer", *FEATURES}
    for kind in ("cache", "floats"):
        names = [name for name, held in arms[kind].named_parameters() if held.numel()]
        assert not any(name.startswith(tuple(gone)) for name in names)
        assert isinstance(arms[kind].time.inner, Absent) and arms[kind].blocks[0].modulation.layer is None
    for name, model in arms.items():
        assert torch.equal(out(ditkit.load(model.save(tmp_path / name))), out(model))


def test_the_parameters_of_dit_xl_that_a_table_replaces():
    with torch.device("meta"):
        config = DiTConfig(patch=2, width=1152, depth=28, heads=16)
        model = DiT(config)
    before = sum(p.numel() for p in model.parameters())
    features = (*(f"blocks.{i}.modulation" for i in range(28)), "head.modulation")
    setting = replace(
        FLOATS, features=features, cached=features, shared=("time.inner", "time.outer"),
        times=tuple(range(50)), conditions=("",), layers=("blocks.0.mlp.inner",),
    )  # fmt: skip
    with torch.device("meta"):
        after = sum(p.numel() for p in setting.shape(model).parameters())
    mlp = 256 * 1152 + 1152 + 1152 * 1152 + 1152
    assert before - after == 28 * (1152 * 6912 + 6912) + (1152 * 2304 + 2304) + mlp
    assert 28 * (1152 * 6912 + 6912) == 223_147_008 and 1152 * 2304 + 2304 == 2_656_512
    values = sum(m.table.shape[-1] for m in model.modules() if isinstance(m, TemporalTable))
    assert values == 195_840


def test_another_schedule_is_refused_unless_the_nearest_is_allowed(arms, calibration, settled):
    with pytest.raises(ConfigError, match=r"of 3 times, 1 to 0\.5, without 0\.3; sample by the schedule"):
        out(arms["cache"], 0.3)
    allowed = network()
    allowed.transform(replace(QUICK, strategies=("cache",), nearest=True), calibration)
    table = allowed.blocks[0].modulation
    out(allowed, 0.3)
    assert table.schedule.steps.tolist() == [2] * 16
    out(arms["tib"], 0.3)  # nothing is looked up there


def test_conditions_never_mix(arms):
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    whole = out(arms["cache"])
    changed = {"x": noise(16, 9)[order], "cond": Cond(label=LABELS[order])}
    assert torch.allclose(out(arms["cache"], **changed), whole[order], atol=1e-5)
    lookups = temporal_features(arms["cache"], FEATURES[:1], [arguments(0.5)])[FEATURES[0]]
    assert torch.equal(lookups[0], lookups[5]) and not torch.equal(lookups[0], lookups[1])


def test_a_condition_that_is_not_known_is_computed_where_the_layers_are(calibration, arms):
    few = Calibration(tuple({**call, "cond": Cond(label=LABELS % 2)} for call in calibration.calls))
    gone, model = network(), network()
    gone.transform(replace(QUICK, strategies=("cache",)), few)
    with pytest.raises(ConfigError, match="features of a condition of this call are not known"):
        out(gone)
    setting = replace(QUICK, cache_bits=2)
    model.transform(setting, few)
    kept = model.transforms[0].kept
    assert kept and (not set(FEATURES) <= set(kept) or out(model).isfinite().all())
    lacking = Calibration((*few.calls[:2], calibration.calls[2]))
    with pytest.raises(ConfigError, match="expected every condition at every step"):
        network().transform(setting, lacking)


def test_blocks_are_learned_with_the_features_that_they_will_get(calibration):
    model = network()
    setting = replace(QUICK, rounding="learned", iterations=10, rate=0.1, batch=8)
    report = model.transform(setting, calibration)
    assert report["block_iterations"] == 10 and report["cache_seconds"] < report["maintenance_seconds"]
    exact = temporal_features(network(), FEATURES, [arguments(t) for t in TIMES])
    own = temporal_features(model, FEATURES, [arguments(t) for t in TIMES])
    assert cosines(own, exact).min() > 0.9999
    assert (out(model) - out(network())).norm() < 0.1 * out(network()).norm()


def test_it_composes_with_pruning_and_a_cache_and_adapters_come_before_it(calibration, tmp_path):
    model = tiny_dit()
    model.transform(Kept(blocks=(0,)))
    with recording(model) as calls:
        ditkit.generate(model, [0, 1, 2, 3] * 4, seeds=range(16), steps=6, batch_size=16)
    model.transform(replace(QUICK, strategies=("cache",)), Calibration(tuple(calls)))
    policies = [TaylorSeer(interval=3, order=1)]
    given = {"seeds": (0, 1), "steps": 6, "policies": policies}
    drawn = ditkit.generate(model, [0, 1], **given).samples
    assert drawn.isfinite().all()
    assert torch.equal(ditkit.generate(ditkit.load(model.save(tmp_path)), [0, 1], **given).samples, drawn)
    with pytest.raises(ConflictError, match="which peft cannot wrap; apply LoRA before"):
        model.transform(LoRA(rank=2))
    assert "blocks.0.modulation" in model.transforms[-1].fixed(model)


def test_a_table_of_four_bits_is_two_values_a_byte(calibration):
    model = network()
    model.transform(replace(QUICK, strategies=("cache",), cache_bits=4), calibration)
    assert model.head.modulation.table.shape == (3, 5, 32) and isinstance(model.head.modulation, nn.Module)


@torch.no_grad()
def test_the_features_of_wan_are_looked_up_and_its_time_layers_are_gone(tmp_path):
    """Its time embedder asks the first parameter of its first layer for the type to work in."""
    family = hosts.of_wan(hosts.wan_inputs())
    transformer, inputs = family.transformer(num_layers=1), family.inputs()
    wide = {
        name: value[:1].repeat(16, *[1] * (value.ndim - 1)) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }
    calls_of = [{**wide, "timestep": torch.full((16,), t)} for t in (900, 500)]
    expected = [transformer(**call, return_dict=False)[0] for call in calls_of]
    with recording(transformer) as calls:
        for call in calls_of:
            transformer(**call)
    assert isinstance(transformer, diffusers.WanTransformer3DModel)
    setting = TemporalFeatures(rounding="nearest", interval=1, strategies=("cache",), cache_bits=32)
    ditkit.compress(transformer, setting, calibration=Calibration(tuple(calls)))
    assert any(isinstance(module, Absent) for module in transformer.modules())
    loaded: Any = ditkit.load(Host.around(transformer).save(tmp_path / "host"))
    for call, exact in zip(calls_of, expected, strict=True):
        found = transformer(**call, return_dict=False)[0]
        assert 0 < (found - exact).norm() < 0.05 * exact.norm()
        assert torch.equal(loaded(**call, return_dict=False)[0], found)
    with pytest.raises(ConfigError, match="sample by the schedule"):
        transformer(**{**wide, "timestep": torch.full((16,), 700)})


@pytest.mark.parametrize("ranges", ["steps", "one", "rows"])
def test_the_choice_is_made_of_the_ranges_that_the_layers_will_have(calibration, ranges):
    """The maintained features by which D chooses are those that the compressed network computes."""
    setting = replace(QUICK, ranges=ranges, strategies=("tib",))
    found = setting.resolved(network(), calibration)
    selection: Selection = vars(found)["_selection"]
    model = network()
    model.transform(setting, calibration)
    own = temporal_features(model, FEATURES, [arguments(t) for t in TIMES])
    steps = torch.tensor(selection.steps)
    for name, chosen in zip(FEATURES, selection.chosen, strict=True):
        for step in range(len(TIMES)):
            expected = chosen[steps == step]
            distance = torch.cdist(own[name][16 * step : 16 * step + 16].float(), expected.float()).amin(1)
            assert (distance <= 1e-4 * expected.norm(dim=1).max()).all(), (name, step)


def test_each_thread_has_the_steps_of_its_own_call():
    schedule = Schedule(TIMES)
    schedule.steps = torch.tensor([2])
    met: list[Tensor] = []
    thread = threading.Thread(target=lambda: met.append(schedule.steps))
    thread.start()
    thread.join()
    assert met[0].tolist() == [0] and schedule.steps.tolist() == [2]
    assert deepcopy(schedule).steps.tolist() == [0] and deepcopy(schedule).times == TIMES
