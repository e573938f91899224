"""The small FLUX: the same function through our sampler and through diffusers' pipeline."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline

import ditkit
from ditkit.core.cond import Cond
from ditkit.core.errors import DitkitError
from ditkit.core.grid import Grid
from ditkit.models.small_flux import SmallFlux, SmallFluxConfig, pack, unpack
from ditkit.nn.toy_text_encoder import LETTERS, encode_letters, pooled
from ditkit.sample.guidance import ClassifierFree
from ditkit.sample.noise import initial_noise

CONFIG = SmallFluxConfig(
    size=16,
    width=32,
    heads=2,
    depth=1,
    single_depth=2,
    letters=8,
    classes=2,
    class_names=("bag", "ankle boot"),
)
B, STEPS = 3, 4


@pytest.fixture(scope="module")
def model() -> SmallFlux:
    """Random everywhere: fresh weights predict zero."""
    draw = torch.Generator().manual_seed(0)
    net = SmallFlux(CONFIG).eval()
    for parameter in net.parameters():
        parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=draw))
    return net


def batch() -> tuple[torch.Tensor, torch.Tensor, Cond]:
    draw = torch.Generator().manual_seed(1)
    label = torch.tensor([0, 1, 1])
    return torch.randn(B, 1, 16, 16, generator=draw), torch.rand(B, generator=draw), Cond(label=label)


def test_packing_is_diffusers_own_of_the_unshuffled_pixels() -> None:
    x = torch.randn(2, 3, 8, 12)
    z = torch.nn.functional.pixel_unshuffle(x, 2)
    assert torch.equal(pack(x), FluxPipeline._pack_latents(z, 2, 12, 4, 6))
    assert torch.equal(unpack(pack(x), Grid(1, 2, 3)), x)


def test_letters_are_one_hot_cut_and_counted() -> None:
    letters = encode_letters(["Bag", "", "a~a"], 2)
    assert letters.shape == (3, 2, LETTERS)
    assert letters[0].argmax(-1).tolist() == [1, 0] and letters[1].sum() == 0
    assert letters[2, 1].argmax() == LETTERS - 1  # what is no letter
    assert pooled(encode_letters(["aba"], 8))[0, :3].tolist() == [2, 1, 0]


def test_fresh_weights_predict_zero() -> None:
    assert not SmallFlux(CONFIG)(*batch()).any()


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_our_sampler_and_the_pipeline_draw_the_same(model: SmallFlux, guidance: float) -> None:
    drawn = ditkit.generate(
        model, "ankle boot", seeds=[5], steps=STEPS, guidance=ClassifierFree(guidance), solver="euler"
    )
    pipe = quiet(model)
    told: dict[str, Any] = {"negative_prompt": "", "true_cfg_scale": guidance} if guidance > 1 else {}
    (theirs,) = pipe(
        "ankle boot",
        num_inference_steps=STEPS,
        latents=pack(initial_noise(model.sample_shape, [5])),
        output_type="pt",
        return_dict=False,
        **told,
    )
    torch.testing.assert_close(theirs, (drawn.samples / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=0)


def test_the_pipeline_is_a_copy_without_sites(model: SmallFlux) -> None:
    before = model(*batch())
    pipe = quiet(model)
    assert type(pipe.transformer).__module__.startswith("diffusers")
    pipe.transformer.proj_out.weight.data.zero_()
    assert torch.equal(model(*batch()), before)


def test_accelerate_takes_the_pipeline(model: SmallFlux) -> None:
    pipe = quiet(model)
    exact = pipe("bag", num_inference_steps=8, generator=torch.Generator().manual_seed(0)).images[0]
    assert exact.size == (16, 16) and exact.mode == "L"
    fast = ditkit.accelerate(pipe, "taylorseer:interval=2,order=1")
    fast("bag", num_inference_steps=8, generator=torch.Generator().manual_seed(0))
    assert "forecast" in str(fast.report())


def test_a_batch_of_prompts_and_pictures_of_each(model: SmallFlux) -> None:
    images = quiet(model)(["bag", "ankle boot"], num_images_per_prompt=2, num_inference_steps=1).images
    assert len(images) == 4


def test_training_attends_as_diffusers_does(model: SmallFlux) -> None:
    config = replace(CONFIG, label_dropout=0.0)
    own = SmallFlux(config)
    own.load_state_dict(model.state_dict())
    torch.testing.assert_close(own.train()(*batch()), own.eval()(*batch()))


def test_gradient_checkpointing_leaves_the_gradient(model: SmallFlux) -> None:
    found = []
    for again in (False, True):
        own = SmallFlux(replace(CONFIG, label_dropout=0.0)).train()
        own.load_state_dict(model.state_dict())
        own.gradient_checkpointing = again
        own(*batch()).square().mean().backward()
        found.append(torch.cat([p.grad.flatten() for p in own.parameters() if p.grad is not None]))
    torch.testing.assert_close(found[0], found[1])


def test_checkpointing_is_off_outside_training() -> None:
    own = SmallFlux(CONFIG)
    own.gradient_checkpointing = True
    own.train()(*batch())
    assert own.transformer.gradient_checkpointing
    seen: list[int] = []
    own.transformer.transformer_blocks[0].register_forward_hook(lambda *_: seen.append(1))
    own.eval()(*batch()).sum().backward()
    assert len(seen) == 1


def test_a_dropped_name_is_the_unconditional_one(model: SmallFlux) -> None:
    x, t, cond = batch()
    dropped = replace(cond, drop=torch.ones(B, dtype=torch.bool))
    assert torch.equal(model(x, t, dropped), model(x, t, model.unconditional(cond)))
    assert not torch.equal(model(x, t, dropped), model(x, t, cond))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"width": 33}, "width=33"),
        ({"size": 18}, "size=18"),
        ({"depth": -1}, "depth=-1"),
        ({"letters": 0}, "letters=0"),
        ({"label_dropout": 1.0}, "label_dropout=1.0"),
        ({"class_names": ("bag",)}, "1 class names for 2"),
        ({"convention": ditkit.models.DiTConfig().convention}, "convention="),
    ],
)
def test_a_config_that_cannot_be(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(DitkitError, match=said):
        replace(CONFIG, **changed)


def quiet(model: SmallFlux) -> FluxPipeline:
    pipe = model.pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe
