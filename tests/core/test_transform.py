"""What every transform promises: what survives a save survives a copy, an average and a teacher, to the bit."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ditkit.adapt.lora import LoRA, Merged, load_adapter, merged, save_adapter
from ditkit.attention import Neighbourhood
from ditkit.compress import Kept
from ditkit.core.catalog import every
from ditkit.core.checkpoint import read_state, write_state
from ditkit.core.cond import Cond
from ditkit.core.errors import CheckpointError, ConfigError, ConflictError
from ditkit.core.model import Model
from ditkit.core.transform import Transform
from ditkit.models.dit import DiT
from ditkit.train.ema import Average, Constant
from rig import TINY, noise, tiny_dit
from toy_transforms import TOYS, ToyAffine, ToyInt8, ToyLowRank

POLICY = Neighbourhood(radius=2, pooled=2, block=8, kernel="cpu")
KINDS = [kind for kind in every(Transform) if kind.__module__.startswith("ditkit")]


def out(model: Model) -> Tensor:
    with torch.no_grad():
        return model.eval()(noise(), torch.tensor([0.3, 0.8]), Cond(label=torch.tensor([0, 2])))


def shuffled(model: Model) -> Model:
    """Every trained number changed, so that nothing is what it was at the start."""
    g = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=g))
    return model


def made(kind: type[Transform], adopted: str = "") -> Model:
    model = tiny_dit()
    if adopted == "before":
        shuffled(model.adopt([POLICY]))
    for transform in kind.small(model):
        model.transform(transform)
    if adopted == "after":
        model.adopt([POLICY])
    return shuffled(model)


def test_all_kinds_are_here():
    assert set(TOYS) <= set(KINDS) and {LoRA, Merged, Kept} <= set(KINDS)


@pytest.mark.parametrize("adopted", ["", "before", "after"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_what_is_saved_survives_load_copy_and_average(kind, adopted, tmp_path):
    model = made(kind, adopted)
    state, expected = model.state_dict(), out(model)
    loaded = Model.load(model.save(tmp_path / "a"))
    average = Average(model, Constant(0.0))
    average.update(model, 1)
    for copy in (loaded, model.with_weights(state, "copy"), model.with_weights(average.state, "average")):
        assert copy.transforms == model.transforms and copy.policies == model.policies
        assert copy.state_dict().keys() == state.keys()
        assert all(torch.equal(v, state[k]) for k, v in copy.state_dict().items())
        assert torch.equal(out(copy), expected)
    loaded.save(tmp_path / "b")
    first, second = ((tmp_path / n / "model.safetensors").read_bytes() for n in "ab")
    assert first == second
    assert [site.name for site in loaded.sites()] == [site.name for site in model.sites()]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_neutral_is_identity_and_is_not_listed(kind):
    model = tiny_dit()
    before, rng = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    assert model.transform(kind.small(model)[-1].exact()) == {}
    assert model.transforms == () and torch.equal(torch.get_rng_state(), rng)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_structure_draws_nothing_and_what_it_trains_exists(kind):
    model, rng = made(kind), torch.get_rng_state()
    meta = model.rebuilt(model.transforms)
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(v.is_meta for v in meta.state_dict().values())
    names = dict(model.named_parameters())
    assert all(name in names for transform in model.transforms for name in transform.trains(model))
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "order",
    [
        (Kept(blocks=(0, 2)), LoRA(rank=2), ToyAffine()),
        (LoRA(rank=2), Kept(blocks=(0, 2)), ToyAffine()),
        (LoRA(rank=2), ToyAffine(), Kept(blocks=(1, 2)), Kept(blocks=(1,))),
        (ToyLowRank(), ToyInt8(), Kept(blocks=(0, 1))),
        (Kept(blocks=(0, 1)), ToyLowRank(), LoRA(rank=2, layers="attention"), ToyInt8(), ToyAffine()),
    ],
    ids=lambda order: "-".join(type(t).__name__ for t in order),
)
def test_transforms_follow_one_another(order, tmp_path):
    model = shuffled(tiny_dit().adopt([POLICY]))
    for transform in order:
        model.transform(transform)
    loaded = Model.load(model.save(tmp_path))
    assert loaded.transforms == order
    assert torch.equal(out(loaded), out(model))


def test_what_a_policy_learned_goes_where_its_site_went(tmp_path):
    model = tiny_dit().adopt([POLICY])
    for i, part in enumerate(model.learned["Neighbourhood"].values()):
        nn.init.constant_(part.weight, float(i))
    model.transform(Kept(blocks=(0, 2)))
    model.transform(Kept(blocks=(1,)))
    assert model.origin("blocks.0.attn.core") == "blocks.2.attn.core"
    assert {k: v.weight[0, 0].item() for k, v in model.learned["Neighbourhood"].items()} == {
        "blocks/0/attn/core": 2.0
    }
    again = Model.load(model.save(tmp_path))
    assert again.learned["Neighbourhood"]["blocks/0/attn/core"].weight[0, 0] == 2


def test_a_policy_that_does_not_fit_what_is_left_is_refused_before_anything_changes():
    model = tiny_dit().adopt([replace(POLICY, dense=(2,))])
    before = out(model)
    with pytest.raises(ConfigError, match="dense=2, expected a place among 2 attentions"):
        model.transform(Kept(blocks=(0, 1)))
    assert model.transforms == () and torch.equal(out(model), before)


def test_lora_begins_as_the_base_and_merges(tmp_path):
    model = tiny_dit()
    expected, rng = out(model), torch.get_rng_state()
    report = model.transform(LoRA(rank=2, seed=3))
    assert report["layers"] == 3 * 5 and torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(out(model), expected)
    assert len(model.transforms[0].trains(model)) == 2 * 15
    shuffled(model)
    apart, state = out(model), {k: v.clone() for k, v in model.state_dict().items()}
    with merged(model):
        assert torch.allclose(out(model), apart, atol=1e-4) and not torch.equal(out(model), expected)
        with pytest.raises(ConfigError, match="merged for now"):
            model.save(tmp_path / "no")
    assert not (tmp_path / "no" / "config.json").exists()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    model.transform(Merged())
    assert torch.allclose(out(model), apart, atol=1e-4)
    assert model.state_dict().keys() == tiny_dit().state_dict().keys()
    model.transform(LoRA(rank=2))  # a second one, on the merged weights
    assert torch.equal(out(Model.load(model.save(tmp_path / "yes"))), out(model))


def test_an_adapter_goes_on_its_own_base_only(tmp_path):
    model = tiny_dit()
    model.transform(LoRA(rank=2))
    with torch.no_grad():
        for name in model.transforms[0].trains(model):
            model.get_parameter(name).normal_(generator=torch.Generator().manual_seed(1))
    save_adapter(model, tmp_path)
    again = tiny_dit()
    load_adapter(again, tmp_path)
    assert torch.equal(out(again), out(model)) and again.transforms == model.transforms
    other = tiny_dit(seed=1)
    with pytest.raises(
        CheckpointError, match=r"is an adapter for the base [0-9a-f]{16}, the model is [0-9a-f]{16}"
    ):
        load_adapter(other, tmp_path)
    assert other.transforms == ()


@pytest.mark.parametrize(
    ("applied", "kind", "message"),
    [
        ((LoRA(rank=2), LoRA(rank=2)), ConflictError, "the model has one already; merge it first"),
        (
            (ToyInt8(), LoRA(rank=2)),
            ConflictError,
            "is a Int8Linear, which peft cannot wrap; apply LoRA before",
        ),
        ((Merged(),), ConflictError, "no LoRA to merge"),
        ((LoRA(rank=64),), ConfigError, "rank=64, expected at most 32"),
        ((Kept(blocks=(0, 3)),), ConfigError, "name block 3, expected numbers of the 3 of 'blocks', 0 to 2"),
        ((Kept(blocks=(0,), stack="block"),), ConfigError, "unknown stack 'block'; did you mean 'blocks'"),
        ((ToyLowRank(), ToyLowRank()), ConflictError, "no MLP of plain layers is left"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_changes(applied, kind, message):
    model = tiny_dit()
    for transform in applied[:-1]:
        model.transform(transform)
    before, structure = out(model), [name for name, _ in model.named_parameters()]
    with pytest.raises(kind, match=message):
        model.transform(applied[-1])
    assert model.transforms == applied[:-1]
    assert [name for name, _ in model.named_parameters()] == structure and torch.equal(out(model), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ([{"name": "Pruned", "fields": {}}], "unknown transform 'Pruned'.*is it of a newer ditkit"),
        ([{"name": "Kept", "fields": {"blocks": [0, 2], "ratio": 0.5}}], "unknown config key 'ratio'"),
        ([{"name": "Kept"}], "a transform should have a name and fields"),
        ({"name": "Kept"}, "'transforms' should be a list"),
        ([], "unexpected tensor|missing tensor"),
        ([{"name": "Kept", "fields": {"blocks": [0, 1, 2]}}], "missing tensor|unexpected tensor"),
        ([{"name": "Kept", "fields": {"blocks": [0, 7]}}], "name block 7, expected numbers of the 3"),
    ],
)
def test_a_folder_whose_transforms_do_not_hold_is_refused(tmp_path, change, message):
    model = tiny_dit()
    model.transform(Kept(blocks=(0, 2)))
    path = model.save(tmp_path) / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "transforms": change}))
    with pytest.raises(CheckpointError, match=message) as caught:
        Model.load(tmp_path)
    assert "\n" not in str(caught.value)


@dataclass(frozen=True)
class Forgetful(Transform):
    """Makes a tensor that is not saved."""

    on: bool = True

    def shape(self, model: Any) -> Any:
        model.register_buffer("table", torch.zeros(2), persistent=False)
        return model

    def exact(self) -> Forgetful:
        return replace(self, on=False)


@dataclass(frozen=True)
class OfTwoMinds(Forgetful):
    def shape(self, model: Any) -> Any:
        model.extra = nn.Parameter(torch.zeros(2))
        return model

    def apply(self, model: Any, calibration: Any = None) -> Any:
        model.extra = nn.Parameter(torch.zeros(3))
        return model, {}


def test_an_authors_slips_are_found(monkeypatch):
    model = tiny_dit()
    with pytest.raises(
        ConfigError, match=r"could not be loaded with the model: .*unknown transform 'Forgetful'"
    ):
        model.transform(Forgetful())
    for kind in (Forgetful, OfTwoMinds):
        monkeypatch.setattr(kind, "__module__", "ditkit.compress.slips")
    model.transform(Forgetful())
    with pytest.raises(CheckpointError, match="'table' has no value, as it is not among what is saved"):
        model.with_weights(model.state_dict(), "copy")
    with pytest.raises(ConfigError, match="its apply makes 'extra' of"):
        tiny_dit().transform(OfTwoMinds())


def test_a_smaller_type_leaves_what_a_transform_keeps(tmp_path):
    model = tiny_dit()
    model.transform(ToyInt8())
    model.save(tmp_path, dtype=torch.bfloat16)
    stored = read_state(tmp_path / "model.safetensors")
    assert stored["head.out.scale"].dtype == torch.float32 and stored["head.out.whole"].dtype == torch.int8
    assert stored["head.out.bias"].dtype == torch.bfloat16


def test_tied_tensors_are_written_once_and_read_under_all_their_names(tmp_path):
    a = torch.randn(3, 4)
    write_state(tmp_path / "s.safetensors", {"a": a, "b": a, "c": a[:2]})
    state = read_state(tmp_path / "s.safetensors")
    assert state.keys() == {"a", "b", "c"} and torch.equal(state["b"], a) and torch.equal(state["c"], a[:2])
    model = tiny_dit()
    model.blocks[2] = model.blocks[0]
    loaded = DiT.load(model.save(tmp_path / "m"))
    assert torch.equal(out(loaded), out(model))


def test_nothing_outside_a_constructor_reads_the_depth():
    model = tiny_dit()
    model.transform(Kept(blocks=(1,)))
    assert model.config == TINY and out(model).isfinite().all()
    assert [site.name for site in model.sites() if site.kind == "block"] == ["blocks.0"]
