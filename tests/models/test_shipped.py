"""The models that ship: their size, their pictures, and what TaylorSeer does to them."""

from __future__ import annotations

import functools
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from torch import Tensor

import ditkit
from ditkit.caching.taylorseer import TaylorSeer
from ditkit.core.cond import Cond
from ditkit.core.loading import shipped
from ditkit.core.model import Model, parameter_count
from ditkit.core.policy import Policy
from ditkit.models.small_flux import SmallFlux

LABELS = ["face-smiling", "country-flag", "heart", "time"]
STEPS = 50


@functools.cache
def model() -> Model:
    return ditkit.load("emoji")


@functools.cache
def drawn(*policies: Policy, steps: int = STEPS) -> Tensor:
    return ditkit.generate(model(), LABELS, seeds=range(4), steps=steps, policies=policies).samples


def error(x: Tensor) -> float:
    return (x - drawn()).square().mean().item()


@pytest.mark.parametrize("name", ["emoji", "digits", "fashion", "vizdoom"])
def test_it_is_small_enough_to_ship(name: str) -> None:
    assert name in shipped()
    assert parameter_count(ditkit.load(name)) <= 12_000_000
    folder = Path(str(files("ditkit"))) / "weights" / name
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 25_000_000
    assert (folder / "README.md").is_file()


def test_its_classes_have_names() -> None:
    names = model().config.class_names
    assert len(names) == model().config.classes == 99
    assert {"animal-mammal", *LABELS} <= set(names)


def test_pictures_use_the_range_of_pictures() -> None:
    """White corners, and next to nothing outside [-1, 1]: an untrained or broken model has neither."""
    images = drawn()
    flag = LABELS.index("country-flag")
    for i in range(len(LABELS)):
        if i != flag:
            assert images[i, :, 0, 0].mean() > 0.9
    assert (images.abs() > 1.1).float().mean() < 0.02


@pytest.mark.parametrize("interval", [3, 4, 6])
def test_forecasting_beats_reuse(interval: int) -> None:
    errors = [error(drawn(TaylorSeer(interval=interval, order=order))) for order in (0, 1, 2)]
    assert errors[1] < errors[0]
    assert errors[2] < 1.1 * errors[1]


def test_first_order_halves_the_error_of_reuse() -> None:
    reuse, first = (error(drawn(TaylorSeer(interval=4, order=order))) for order in (0, 1))
    assert 2 * first <= reuse


@pytest.mark.parametrize("interval", [3, 4])
def test_forecasting_beats_fewer_exact_steps(interval: int) -> None:
    full = len(TaylorSeer(interval=interval).full_steps(STEPS))
    fewer = error(drawn(steps=full))
    assert error(drawn(TaylorSeer(interval=interval, order=2))) < fewer
    assert error(drawn(TaylorSeer(interval=interval, order=1))) < fewer


def test_neutral_setting_changes_no_bit() -> None:
    assert torch.equal(drawn(TaylorSeer(interval=1)), drawn())


# -- digits and vizdoom

CLIPS = ("digits", "vizdoom")


@functools.cache
def clips(name: str, *policies: Policy) -> Tensor:
    model = ditkit.load(name)
    return ditkit.generate(model, seeds=range(2), steps=STEPS, guidance=1.0, policies=policies).samples


def moved(made: Tensor) -> Tensor:
    """Mean square of the steps from frame to frame, of each clip."""
    return made.diff(dim=2).square().mean((1, 2, 3, 4))


def test_clips_of_digits_are_strokes_on_black_that_move() -> None:
    made = clips("digits")
    assert made.shape == (2, 1, 16, 32, 32)
    assert (made < -0.9).float().mean() > 0.9
    assert 0.004 < (made > 0).float().mean() < 0.05, "a digit of the data covers 0.024"
    assert (moved(made) > 0.003).all(), "standing still would be 0, a digit of the data is at 0.024"


def test_clips_of_vizdoom_are_a_room_seen_on_the_way() -> None:
    """A dark blue sky above grass, in the mean, and walls between that move."""
    made = clips("vizdoom")
    assert made.shape == (2, 3, 16, 32, 32)
    assert (made.abs() > 1.1).float().mean() < 0.02
    red, green, blue = range(3)
    above, below = made[:, :, :, :3].mean((0, 2, 3, 4)), made[:, :, :, -3:].mean((0, 2, 3, 4))
    assert above[blue] > above[red] + 0.05 and above[blue] > above[green] + 0.05
    assert below[green] > below[red] + 0.05 and below[green] > below[blue] + 0.05
    assert (moved(made) > 1e-4).all(), "standing still would be 0"


@pytest.mark.parametrize("name", CLIPS)
def test_given_frames_come_out_as_they_went_in(name: str) -> None:
    """The first half of one of its own clips; what it makes of the rest follows on from there."""
    seen = clips(name)[:1]
    mask = torch.ones_like(seen[:, :1])
    mask[:, :, :8] = 0
    cond = Cond(context=seen, mask=mask)
    made = ditkit.generate(ditkit.load(name), seeds=[7], steps=20, guidance=1.0, cond=cond).samples
    assert torch.equal(made[:, :, :8], seen[:, :, :8])
    step = seen.diff(dim=2).square().mean()
    assert (made[:, :, 8] - seen[:, :, 7]).square().mean() < 3 * step


@pytest.mark.parametrize("name", CLIPS)
def test_forecasts_of_clips_beat_reuse(name: str) -> None:
    zeroth, first = (
        (clips(name, TaylorSeer(interval=3, order=order)) - clips(name)).square().mean() for order in (0, 1)
    )
    assert 2 * first < zeroth


# -- fashion


@functools.cache
def fashion() -> SmallFlux:
    found = ditkit.load("fashion")
    assert isinstance(found, SmallFlux)
    return found


@functools.cache
def garments(*policies: Policy, steps: int = 28) -> Tensor:
    """A sample of each class."""
    labels = list(fashion().config.class_names)
    return ditkit.generate(
        fashion(), labels, seeds=range(10), steps=steps, guidance=1.0, policies=policies
    ).samples


def test_its_pictures_are_garments_on_black() -> None:
    made = garments()
    assert (made[..., :2, :] < -0.95).float().mean() > 0.98, "the padding that it was trained on"
    assert (made.abs() > 1.1).float().mean() < 0.02
    names = fashion().config.class_names
    lit = dict(zip(names, (made > -0.5).float().flatten(1).mean(1).tolist(), strict=True))
    assert lit["pullover"] > 1.5 * lit["sandal"] and lit["coat"] > lit["trouser"]


def test_the_letters_alone_choose_the_class() -> None:
    """A prompt in capitals is spelled alike; another name is another picture from the same noise."""
    pipe = fashion().pipeline()
    pipe.set_progress_bar_config(disable=True)

    def draw(prompt: str) -> Tensor:
        noise = torch.Generator().manual_seed(0)
        told = {"num_inference_steps": 8, "generator": noise, "output_type": "pt"}
        return pipe(prompt, **told).images

    assert torch.equal(draw("TROUSER"), draw("trouser"))
    assert (draw("trouser") - draw("bag")).square().mean() > 0.02


def test_forecasts_on_it_beat_reuse_and_fewer_steps() -> None:
    def error(x: Tensor) -> float:
        return (x - garments()).square().mean().item()

    policy = TaylorSeer(interval=3, order=1, warmup=3)
    assert 2 * error(garments(policy)) < error(garments(replace(policy, order=0)))
    assert error(garments(policy)) < error(garments(steps=len(policy.full_steps(28))))
