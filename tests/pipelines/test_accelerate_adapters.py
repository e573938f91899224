"""LoRA adapters that are switched between two steps of one call: what was kept is of another network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig

import ditkit
from ditkit.pipelines.adapters import Adapters
from flux_support import LORA, transformer
from pipelines_support import POLICY, asked, computed, latents, pipeline, prompt

UNBROKEN, ANEW = {"cond": "0-1 4 7"}, {"cond": "2-3 6"}
Change = Callable[[Any], object]


def with_two() -> Any:
    """A pipeline with adapters "one" and "two", of which "one" is at work."""
    net = transformer()
    for name in ("one", "two"):
        net.add_adapter(LoraConfig(**LORA), name)
    net.set_adapters("one")
    return pipeline(net=net)


def after_step(step: int, change: Change) -> Callable[..., dict[str, Any]]:
    def callback(pipe: Any, at: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        if at == step:
            change(pipe)
        return given

    return callback


CHANGES: dict[str, Change] = {
    "set": lambda pipe: pipe.transformer.set_adapters("two"),
    "added": lambda pipe: pipe.transformer.set_adapters(["one", "two"]),
    "scaled": lambda pipe: pipe.transformer.set_adapters("one", 0.5),
    "disabled": lambda pipe: pipe.transformer.disable_adapters(),
    "merged": lambda pipe: pipe.transformer.fuse_lora(adapter_names=["two"]),
    "deleted": lambda pipe: pipe.transformer.delete_adapters("one"),
    "loaded": lambda pipe: pipe.transformer.add_adapter(LoraConfig(**LORA), "three"),
    "scaled by the call": lambda pipe: pipe._joint_attention_kwargs.update(scale=0.5),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_switch_between_two_steps_voids_what_was_kept(change: str) -> None:
    fast = ditkit.accelerate(with_two(), POLICY)
    told = asked(joint_attention_kwargs={"scale": 1.0})
    latents(fast, {**told, "callback_on_step_end": after_step(1, CHANGES[change])})
    assert computed(fast) == ANEW


def test_a_first_adapter_in_the_middle_of_a_call() -> None:
    def load(pipe: Any) -> None:
        pipe.transformer.add_adapter(LoraConfig(**LORA))

    fast = ditkit.accelerate(pipeline(), POLICY)
    latents(fast, asked(callback_on_step_end=after_step(1, load)))
    assert computed(fast) == ANEW


@pytest.mark.parametrize("change", [lambda pipe: None, lambda pipe: pipe.transformer.set_adapters("one")])
def test_the_same_adapters_void_nothing(change: Change) -> None:
    fast = ditkit.accelerate(with_two(), POLICY)
    drawn = latents(fast, asked())
    assert torch.equal(latents(fast, asked(callback_on_step_end=after_step(1, change))), drawn)
    assert computed(fast) == UNBROKEN


def test_both_lanes_go_on_together_after_a_switch() -> None:
    """The second lane tells the same news once more, which is no reason to forget the first one's."""
    negative = {**prompt(seed=9, prefix="negative_"), "true_cfg_scale": 2.0}
    fast = ditkit.accelerate(with_two(), POLICY)
    latents(fast, asked(callback_on_step_end=after_step(1, CHANGES["set"]), **negative))
    assert computed(fast) == {"cond": "2-3 6", "uncond": "2-3 6"}


def test_without_adapters_no_layer_is_looked_at() -> None:
    net = transformer()
    net.modules = None
    assert Adapters(net).at_work({"joint_attention_kwargs": {"scale": 0.5}}) == ()
