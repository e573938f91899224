"""Transformers of diffusers, transformed: saved, they open in plain diffusers to the bit, or are refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import ditkit
import hosts_support as hosts
from ditkit.adapt.lora import LoRA, Merged
from ditkit.compress import Kept
from ditkit.core.errors import CheckpointError, ConfigError
from ditkit.hosts.hosted import Host
from ditkit.hosts.toy_flux_pipeline import ToyFluxPipeline

CASES = {
    name: (family.transformer, family.inputs)
    for name, family in hosts.FAMILIES.items()
    if name != "latte"  # its spatial and temporal blocks are two lists of one length: no stack of its own
}
every_host = pytest.mark.parametrize("name", CASES)


@torch.no_grad()
def said(transformer: Any, inputs: Any) -> Tensor:
    return transformer(**inputs, return_dict=False)[0]


def cut(transformer: Any) -> Kept:
    """The first and the last block."""
    model = Host.around(transformer)
    return Kept.small(model)[0]


@every_host
def test_a_cut_transformer_opens_in_plain_diffusers(name, tmp_path):
    make, draw = CASES[name]
    transformer = make()
    kind, kept = type(transformer), cut(make())
    ditkit.compress(transformer, kept)
    assert type(transformer) is kind  # without sites, as it was
    expected = said(transformer, draw())
    transformer.save_pretrained(tmp_path)
    plain = kind.from_pretrained(tmp_path).eval()
    assert torch.equal(said(plain, draw()), expected)
    again = ditkit.load(tmp_path)
    assert again.transforms == (kept,)
    assert torch.equal(said(again.transformer, draw()), expected)
    again.transform(LoRA(rank=2))  # what was done before is not done again
    copy = again.with_weights(again.state_dict(), "copy")
    assert copy.transforms == (kept, LoRA(rank=2))
    assert torch.equal(said(copy.transformer, draw()), expected)


@every_host
def test_low_rank_layers_are_refused_by_diffusers_folder_and_saved_in_ours(name, tmp_path):
    make, draw = CASES[name]
    transformer = make()
    kind, before = type(transformer), said(transformer, draw())
    ditkit.adapt(transformer, LoRA(rank=2))
    assert torch.equal(said(transformer, draw()), before)
    with torch.no_grad():
        for key, weight in transformer.named_parameters():
            if ".lora_" in key:
                weight.normal_(generator=torch.Generator().manual_seed(len(key)), std=0.1)
    expected = said(transformer, draw())
    assert not torch.equal(expected, before)
    with pytest.raises(
        ConfigError, match=r"LoRA has no form that plain diffusers opens; save it by .*Merged\(\)"
    ):
        transformer.save_pretrained(tmp_path / "no")
    assert not (tmp_path / "no").exists()
    again = ditkit.load(Host.around(transformer).save(tmp_path / "ours"))
    assert torch.equal(said(again.transformer, draw()), expected)
    ditkit.adapt(transformer, Merged())
    transformer.save_pretrained(tmp_path / "merged")
    plain = kind.from_pretrained(tmp_path / "merged").eval()
    for (
        weight
    ) in plain.parameters():  # a file's tensors lie at 8 bytes, and the last bit of a product may follow that
        weight.data = weight.data.clone()
    assert torch.equal(said(plain, draw()), said(transformer, draw()))
    assert torch.allclose(said(plain, draw()), expected, atol=1e-3)


def test_a_block_that_others_read_stays():
    with pytest.raises(ConfigError, match="leave out block 0 of 'blocks', which other parts of a Host read"):
        ditkit.compress(hosts.FAMILIES["dit"].transformer(), Kept(blocks=(1, 2)))
    with pytest.raises(ConfigError, match="leave out block 2 of 'blocks'"):
        ditkit.compress(hosts.VARIANTS["sd3"].transformer(), Kept(blocks=(0, 1)))


def test_a_pipeline_is_changed_in_place_and_still_runs(tmp_path):
    from ditkit.models.small_flux import SmallFlux, SmallFluxConfig

    torch.manual_seed(0)
    model = SmallFlux(
        SmallFluxConfig(size=16, width=48, heads=2, depth=2, single_depth=3, letters=8, classes=3)
    )
    pipe = model.pipeline()
    kept = Kept(blocks=(0, 2), stack="single")
    assert ditkit.compress(pipe, kept) is pipe and isinstance(pipe, ToyFluxPipeline)
    assert len(pipe.transformer.single_transformer_blocks) == pipe.transformer.config.num_single_layers == 2
    pipe("1", num_inference_steps=1, output_type="pt")
    small = ditkit.compress(model, kept)
    assert len(model.transformer.single_transformer_blocks) == 3
    assert small.pipeline().transformer.config.num_single_layers == 2
    assert small.origin("single.1.attn.core") == "single.2.attn.core"
    with pytest.raises(ConfigError, match="expected a model, or a pipeline of diffusers"):
        ditkit.compress(object(), kept)


def test_a_folder_whose_config_and_weights_disagree_is_refused(tmp_path):
    transformer = hosts.FAMILIES["dit"].transformer()
    transformer.register_to_config(num_layers=5)
    transformer.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="its config and its weights disagree on"):
        ditkit.load(tmp_path)
