"""Whole pipelines: saved, offloaded, with two lanes, inside and beside one another."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ditkit
from ditkit.caching import RAS, TaylorSeer
from family_pipelines_support import ONE_EACH, draw, ready, sd3
from pipelines_support import computed


@pytest.mark.parametrize("family", ONE_EACH)
def test_an_accelerated_pipeline_is_saved_as_diffusers_own(family: str, tmp_path: Path) -> None:
    pipe, _ = ready(ONE_EACH[family])
    files = []
    for folder, one in ((tmp_path / "own", pipe), (tmp_path / "fast", ditkit.accelerate(pipe))):
        one.save_pretrained(folder)
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        files.append({path.relative_to(folder): path.read_bytes() for path in paths})
    assert files[0] == files[1] and Path("transformer/config.json") in files[0]


OFFLOADS = [(family, how) for family in ONE_EACH for how in ("models", "groups")]


@pytest.mark.parametrize(("family", "how"), [pair for pair in OFFLOADS if pair != ("dit", "groups")])
def test_an_offloaded_pipeline_draws_the_same(family: str, how: str) -> None:
    """diffusers offloads no groups of DiT."""
    drawn = []
    for kind in ("none", how):
        pipe, told = ready(ONE_EACH[family])
        if kind == "models":
            pipe.enable_model_cpu_offload(device="cpu")
        elif kind == "groups":
            pipe.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
        with ditkit.accelerate(pipe) as fast:
            drawn.append(draw(fast, told))
    assert torch.equal(*drawn)


WORDS = [family for family in ONE_EACH if family != "dit"]


@pytest.mark.parametrize("family", WORDS)
def test_lengths_of_text_that_differ_between_calls_and_lanes(family: str) -> None:
    """What was kept of one length never meets another: each call is as if it were the first."""
    pipe, told = ready(ONE_EACH[family])
    policy = TaylorSeer(interval=2) if family == "latte" else RAS(warmup=1)
    rows = told["prompt_embeds"].shape[1]

    def longer(*prefixes: str) -> dict[str, Any]:
        texts = {name: x for name, x in told.items() if name.startswith(prefixes) and isinstance(x, Tensor)}
        return told | {n: torch.cat([x, x[:, :2]], 1) for n, x in texts.items() if "pooled" not in n}

    calls = [told, longer("prompt", "negative"), told]
    if told.get("negative_prompt_embeds") is not None and family in ("qwen-image", "wan", "hunyuan-video"):
        calls.append(longer("negative"))  # these guide in a call of its own
    fast = ditkit.accelerate(pipe, policy)
    drawn = [draw(fast, call, num_inference_steps=4) for call in calls]
    assert torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[1])
    ditkit.restore(fast)
    for call, found in zip(calls[1:], drawn[1:], strict=True):
        with ditkit.accelerate(pipe, policy) as alone:
            assert torch.equal(draw(alone, call, num_inference_steps=4), found)
    assert rows + 2 == calls[1]["prompt_embeds"].shape[1]


# Lanes, and pipelines inside or beside one another


@pytest.mark.parametrize("family", ["lumina2", "wan"])
def test_lanes_keep_apart(family: str) -> None:
    """With the same text in both lanes guidance adds nothing: what a lane took from the other would show."""
    pipe, told = ready(ONE_EACH[family])
    told |= {f"negative_{name}": text for name, text in told.items() if name.startswith("prompt")}
    fast = ditkit.accelerate(pipe)
    guided = draw(fast, told, guidance_scale=4.0)
    assert len({lane.rpartition("/")[2] for lane in computed(fast)}) == 2
    assert torch.equal(guided, draw(fast, told, guidance_scale=1.0))


def test_lanes_of_one_batch_are_those_of_their_own_calls() -> None:
    """SD3 guides in one batch; the samples of a batch do not meet, so that its size changes rounding only."""
    pipe, told = ready(sd3)
    fast = ditkit.accelerate(pipe)
    for kind in ("prompt_embeds", "pooled_prompt_embeds"):
        told[f"negative_{kind}"] = told[kind]
    assert torch.allclose(draw(fast, told), draw(fast, told, guidance_scale=1.0), rtol=1e-4, atol=1e-4)


PAIRS = [
    ("sd3", "wan"),
    ("lumina2", "lumina-next"),
    ("wan", "dit"),
    ("lumina-next", "sd3"),
]
pairs = pytest.mark.parametrize("pair", PAIRS, ids=" and ".join)


@pairs
def test_a_pipeline_inside_a_callback_of_another(pair: tuple[str, str]) -> None:
    (outer, told), (inner, inner_told) = (ready(ONE_EACH[family]) for family in pair)
    fast, inner = ditkit.accelerate(outer), ditkit.accelerate(inner, "taylorseer:interval=2")
    alone = draw(fast, told), draw(inner, inner_told)
    seen: list[Tensor] = []

    def nest(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step in (0, 3):
            seen.append(draw(inner, inner_told))
        return given

    assert torch.equal(draw(fast, told, callback_on_step_end=nest), alone[0])
    assert len(seen) == 2 and all(torch.equal(x, alone[1]) for x in seen)


@pairs
def test_two_threads_take_turns(pair: tuple[str, str]) -> None:
    """Each alone runs in a thread of its own as well: torch shares out the work of a product otherwise there."""
    pipes, tolds = zip(*(ready(ONE_EACH[family]) for family in pair), strict=True)
    fasts = [ditkit.accelerate(pipe) for pipe in pipes]
    alone: dict[int, Tensor] = {}
    drawn: dict[int, Tensor] = {}

    def run(i: int, into: dict[int, Tensor]) -> None:
        into[i] = draw(fasts[i], tolds[i])

    def threads(into: dict[int, Tensor]) -> list[threading.Thread]:
        return [threading.Thread(target=run, args=(i, into)) for i in range(2)]

    for thread in threads(alone):
        thread.start()
        thread.join()
    turns = threading.Barrier(2)

    def take_turns(module: Any, *_: Any, calls: list[int]) -> None:
        calls.append(1)
        if len(calls) <= 6:
            turns.wait(timeout=30)

    for pipe in pipes:
        pipe.transformer.register_forward_hook(partial(take_turns, calls=[]))
    both = threads(drawn)
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert all(torch.equal(drawn[i], alone[i]) for i in range(2))
