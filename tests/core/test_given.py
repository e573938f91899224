"""What a user gives of clips is refused before anything is drawn, by sample and frame, unless it can be completed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ditkit.api.generate import generate
from ditkit.core.cond import Cond
from ditkit.core.convention import Convention
from ditkit.core.errors import ConfigError, ShapeError
from ditkit.models.vdt import VDT, VDTConfig
from ditkit.models.video_dit import VideoDiT, VideoDiTConfig
from ditkit.sample import Samples
from ditkit.tasks.video import recipe as video
from ditkit.tasks.video.masks import mask_kind
from ditkit.tasks.video.recipe import SHEET_KINDS, conditioned, write_strips
from models_support import perturbed, tiny_model

T, SIDE = 4, 8
SIZE: dict[str, Any] = {"channels": 3, "frames": T, "size": SIDE, "depth": 1, "heads": 2}


@pytest.fixture(scope="module", params=["VDT", "VideoDiT"])
def model(request: pytest.FixtureRequest) -> VDT | VideoDiT:
    torch.manual_seed(0)
    if request.param == "VDT":
        return perturbed(VDT(VDTConfig(**SIZE, patch=4, width=8, convention=Convention())), 0.3)
    return perturbed(VideoDiT(VideoDiTConfig(**SIZE, patch=(1, 4, 4), width=12)), 0.3)


def told() -> Cond:
    """Three clips, each told its first half."""
    clips = torch.rand(3, 3, T, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return conditioned(clips, mask_kind("predict"), [0, 1, 2])


def masked(value: float, sample: int | slice = slice(None), frame: int | slice = slice(None)) -> Cond:
    cond = told()
    assert cond.mask is not None
    mask = cond.mask.float()
    mask[sample, :, frame] = value
    return replace(cond, mask=mask)


def holding(value: float, sample: int, frame: int) -> Cond:
    cond = told()
    assert cond.context is not None
    context = cond.context.clone()
    context[sample, 1, frame, 5, 6] = value
    return replace(cond, context=context)


def cut(name: str, *index: slice) -> Cond:
    return replace(told(), **{name: getattr(told(), name)[index]})


every = slice(None)
REFUSED = [
    (masked(1), ConfigError, "Cond.mask: sample 0 is all 1, which gives nothing"),
    (
        masked(1, sample=1),
        ConfigError,
        "sample 1 is all 1, which gives nothing, expected some 0; to generate all",
    ),
    (masked(0), ConfigError, "Cond.mask: sample 0 is all 0, which leaves nothing to be generated"),
    (
        masked(0, sample=2),
        ConfigError,
        "sample 2 is all 0, which leaves nothing to be generated, expected some 1",
    ),
    (
        masked(0.5),
        ConfigError,
        "Cond.mask: 0.5 in sample 0, frame 0, expected 0 (given) or 1 (to be generated)",
    ),
    (masked(2, sample=1, frame=3), ConfigError, "Cond.mask: 2 in sample 1, frame 3, expected 0"),
    (masked(torch.nan, sample=2, frame=1), ConfigError, "Cond.mask: nan in sample 2, frame 1, expected 0"),
    (
        holding(torch.nan, 1, 1),
        ConfigError,
        "Cond.context: nan in sample 1, frame 1, expected finite numbers",
    ),
    (holding(-torch.inf, 2, 0), ConfigError, "Cond.context: -inf in sample 2, frame 0, expected finite"),
    (replace(told(), context=None), ConfigError, "Cond.mask says what is given, but Cond.context is None"),
    (replace(told(), mask=None), ConfigError, "Cond.context is given, but Cond.mask is None"),
    (cut("mask", slice(2)), ShapeError, "Cond.mask [2, 1, 4, 8, 8] should be [3, 1, 4, 8, 8], a row a seed"),
    (cut("mask", every, every, slice(3)), ShapeError, "Cond.mask [3, 1, 3, 8, 8] should be [3, 1, 4, 8, 8]"),
    (cut("context", every, slice(1)), ShapeError, "Cond.context [3, 1, 4, 8, 8] should be [3, 3, 4, 8, 8]"),
    (cut("context", slice(1)), ShapeError, "Cond.context [1, 3, 4, 8, 8] should be [3, 3, 4, 8, 8]"),
]


@pytest.mark.parametrize(("cond", "kind", "message"), REFUSED, ids=[message for _, _, message in REFUSED])
def test_what_cannot_be_completed_is_refused_before_the_first_step(
    model: VDT | VideoDiT, cond: Cond, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind) as caught:
        generate(
            model, seeds=[0, 1, 2], steps=2, guidance=1.0, cond=cond, shape=model.signal_shape,
            progress=lambda *done: pytest.fail("drawn"),
        )  # fmt: skip
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_mask_without_a_frame_of_its_shape_is_refused(model: VDT | VideoDiT) -> None:
    cond = told()
    assert cond.mask is not None
    with pytest.raises(ShapeError, match=r"Cond.mask \[3, 4, 8, 8\] should be \[3, 1, 4, 8, 8\]"):
        generate(model, seeds=[0, 1, 2], steps=1, guidance=1.0, cond=replace(cond, mask=cond.mask[:, 0]))


def test_a_model_of_pictures_is_given_none() -> None:
    cond = Cond(context=torch.zeros(1, 3, 16, 16), mask=torch.ones(1, 1, 16, 16).tril())
    with pytest.raises(
        ConfigError, match=r"samples \[3, 16, 16\], which a DiT does not complete; expected a model that does"
    ):
        generate(tiny_model(), seeds=[0], steps=1, guidance=1.0, cond=cond)


@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.float32])
def test_what_can_be_completed_is_whatever_its_type_and_what_is_hidden(
    model: VDT | VideoDiT, kind: torch.dtype
) -> None:
    cond = told()
    assert cond.mask is not None and cond.context is not None
    hidden = torch.where(cond.mask, torch.nan, cond.context)
    draws: list[Tensor] = [
        generate(model, seeds=[0, 1, 2], steps=2, guidance=1.0, cond=told).samples
        for told in (cond, Cond(context=hidden, mask=cond.mask.to(kind)))
    ]
    assert torch.equal(*draws) and torch.equal(draws[0][:, :, : T // 2], cond.context[:, :, : T // 2])


def test_training_sheets_ask_for_whole_clips_without_a_mask(
    model: VDT | VideoDiT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Cond] = []

    def watched(*args: Any, cond: Cond, **options: Any) -> Samples:
        asked.append(cond)
        return generate(*args, cond=cond, **{**options, "steps": 1})

    monkeypatch.setattr(video, "generate", watched)
    write_strips(tmp_path, torch.zeros(1, 3, T + 2, SIDE, SIDE), model, 7)  # not of the model's own length
    assert (tmp_path / "000007.png").exists()
    whole = [kind for kind, cond in zip(SHEET_KINDS, asked, strict=True) if cond.context is None]
    assert whole == ["unconditional"]
