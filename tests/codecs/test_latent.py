"""Models of a codec's latents, from training to pictures: what they are told, what they give back, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ditkit
from codecs_support import equal
from ditkit.api.generate import generate
from ditkit.bench.memory import describe as described
from ditkit.bench.memory import revive
from ditkit.codecs import ImageVae, ImageVaeConfig
from ditkit.core.checkpoint import read_state
from ditkit.core.codec import IDENTITY, Codec, encode_given
from ditkit.core.cond import Cond
from ditkit.core.convention import Convention
from ditkit.core.errors import CheckpointError, ConfigError, ShapeError
from ditkit.data.sets import moving_digits
from ditkit.models.dit import DiT, DiTConfig
from ditkit.models.vdt import VDT, VDTConfig
from ditkit.report.sheet import write_png
from ditkit.sample import Sampler, sample
from ditkit.tasks.image.recipe import ClassImageRecipe
from ditkit.tasks.latent import LatentDataset, coded, load_codec
from ditkit.tasks.recipe import describe, train_recipe
from ditkit.tasks.video.masks import KINDS, MaskMixture, mask_kind
from ditkit.tasks.video.recipe import VideoRecipe, conditioned
from ditkit.train.ema import Constant
from ditkit.train.randomness import SampleRNG
from ditkit.train.settings import Settings
from models_support import perturbed
from scripts.toy_run import losses

SIDE, FRAMES = 16, 4
VAE = ImageVaeConfig(size=SIDE, latent_channels=4, widths=(8, 16), groups=4)
LATENTS = (4, SIDE // 2, SIDE // 2)
PLAIN = Convention()
SETTINGS = Settings(
    steps=4, batch=4, learning_rate=1e-3, averages=(Constant(0.5),), save_every=2, sheet_every=4
)


def small(channels: int = 3, seed: int = 0) -> ImageVae:
    """Random everywhere, with statistics that are not neutral."""
    torch.manual_seed(seed)
    vae = ImageVae(replace(VAE, channels=channels)).eval().requires_grad_(False)
    vae.shift.normal_()
    vae.scale.uniform_(0.5, 2)
    return vae


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of pictures in colour."""
    return small().save(tmp_path_factory.mktemp("colour"))


@pytest.fixture(scope="module")
def grey(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of pictures in grey."""
    return small(channels=1).save(tmp_path_factory.mktemp("grey"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: eight noisy pictures in two class folders."""
    folder, g = tmp_path_factory.mktemp("pictures"), torch.Generator().manual_seed(0)
    for i in range(8):
        write_png(folder / ("warm" if i % 2 else "cold") / f"{i}.png", torch.rand(3, SIDE, SIDE, generator=g))
    return folder


@pytest.fixture(autouse=True)
def digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Squares stand for the handwritten digits."""
    squares = torch.zeros(10, 28, 28, dtype=torch.uint8)
    squares[:, 6:22, 6:22] = 255
    monkeypatch.setattr(moving_digits, "read_digits", lambda split: squares)


def of_pictures(pictures: Path, codec: Path | str, **changes: Any) -> ClassImageRecipe:
    model = DiTConfig(size=SIDE, patch=2, channels=3, width=16, depth=1, heads=2, classes=1, convention=PLAIN)
    return ClassImageRecipe(
        data=str(pictures), codec=str(codec), model=model, settings=replace(SETTINGS, **changes)
    )


def of_clips(codec: Path | str, **changes: Any) -> VideoRecipe:
    return VideoRecipe(
        data="moving-digits",
        options={"length": 6},
        codec=str(codec),
        model=VDTConfig(1, FRAMES, SIDE, patch=2, width=16, depth=1, heads=2, convention=PLAIN),
        settings=replace(SETTINGS, steps=2, batch=2, sheet_every=0, **changes),
    )


@pytest.fixture(scope="module")
def run(pictures: Path, codec: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class-conditional model of latents after four steps."""
    folder = tmp_path_factory.mktemp("run")
    train_recipe(of_pictures(pictures, codec), folder)
    return folder


def latent_vdt() -> VDT:
    """Random everywhere: at initialisation the output is zero."""
    torch.manual_seed(1)
    config = VDTConfig(4, FRAMES, SIDE // 2, patch=2, width=16, depth=1, heads=2, convention=PLAIN)
    model = perturbed(VDT(config), 0.1).requires_grad_(False)
    model.codec = small(channels=1)
    return model


def test_clips_go_on_under_the_masks_that_they_were_begun_with(tmp_path: Path) -> None:
    train_recipe(of_clips(""), tmp_path)
    begun = json.loads((tmp_path / "recipe.json").read_text())
    assert begun["task"]["masks"]["frames"] == list(MaskMixture().frames)
    only = replace(of_clips(""), masks=MaskMixture(region=0, frames=("predict",)))
    with pytest.raises(ConfigError, match=r"task.masks was .* now"):
        train_recipe(only, tmp_path, resume=True)


def told(kind: str, count: int = 2, seed: int = 0) -> Cond:
    clips = torch.rand(count, 1, FRAMES, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return conditioned(clips, mask_kind(kind), range(count))


# pictures


def test_a_trained_model_carries_its_codec_and_draws_pictures(run: Path, codec: Path) -> None:
    model = ditkit.load(run / "model")
    assert (model.sample_shape, model.signal_shape) == (LATENTS, (3, SIDE, SIDE))
    assert equal(model.codec, Codec.load(codec)) and model.config.class_names == ("cold", "warm")
    assert isinstance(model, DiT) and (run / "samples" / "000004.png").exists()

    drawn = ditkit.generate(model, label="warm", seeds=[3, 4], steps=2, guidance=1.0)
    latents = sample(model, Cond(label=torch.tensor([1, 1])), [3, 4], steps=2).samples
    assert latents.shape == (2, *LATENTS) and drawn.samples.shape == (2, 3, SIDE, SIDE)
    with torch.no_grad():
        assert torch.equal(drawn.samples, model.codec.decode(latents))


def test_its_weights_are_not_those_of_the_codec(run: Path, codec: Path) -> None:
    assert not any("network" in name for name in read_state(run / "model" / "model.safetensors"))
    assert equal(Codec.load(run / "model" / "codec"), Codec.load(codec))  # training left it alone


def test_it_is_compared_as_pictures(run: Path) -> None:
    model = ditkit.load(run / "model")
    options: dict[str, Any] = {"steps": 4, "rounds": 1, "memory": False, "guidance": 1.0}
    report = ditkit.compare(model, policies="taylorseer:interval=2,order=1", seeds=range(3), **options)
    exact, fast = report.rows
    assert exact.identical and not fast.identical and fast.macs < exact.macs
    assert report.settings["shape"] == [3, SIDE, SIDE]
    assert all(drawn.shape == (3, 3, SIDE, SIDE) for drawn in report.pictures.values())


def test_another_process_is_told_the_codec_too(run: Path, tmp_path: Path) -> None:
    work = Sampler.of(ditkit.load(run / "model"), seeds=[0, 1], steps=2, guidance=1.0, batch_size=2)
    again = revive(json.loads(json.dumps(described(work, tmp_path))))
    assert torch.equal(again.draw().samples, work.draw().samples)


def test_a_run_that_stops_goes_on_with_the_same_losses(
    run: Path, pictures: Path, codec: Path, tmp_path: Path
) -> None:
    train_recipe(of_pictures(pictures, codec, steps=2), tmp_path)
    train_recipe(of_pictures(pictures, codec), tmp_path, resume=True)
    assert losses(tmp_path) == losses(run) and len(losses(run)) == 4
    for file in ("state.safetensors", "model/model.safetensors"):
        one, two = read_state(tmp_path / file), read_state(run / file)
        assert all(torch.equal(one[name], two[name]) for name in one.keys() | two.keys())


def test_a_run_goes_on_with_its_own_codec_only(pictures: Path, tmp_path: Path) -> None:
    """Also where another one lies in the same folder by now."""
    place, folder = tmp_path / "vae", tmp_path / "run"
    train_recipe(of_pictures(pictures, small().save(place), steps=1, sheet_every=0), folder)
    small(seed=1).save(place)
    with pytest.raises(ConfigError, match=r"codec.weights_sha256 was .*, now .*; a resume needs the same"):
        train_recipe(of_pictures(pictures, place, steps=2, sheet_every=0), folder, resume=True)


def test_latents_are_drawn_anew_at_every_step(pictures: Path, codec: Path) -> None:
    prepared = of_pictures(pictures, codec).prepared()
    samples, vae = prepared.samples, Codec.load(codec)
    assert isinstance(samples, LatentDataset) and len(samples) == 8
    index = torch.tensor([5, 2])
    first, again, later = (samples.batch(index, SampleRNG(0, s, range(2)))[0] for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, later)
    chance, signal = SampleRNG(0, 1, range(2)), samples.samples.batch(index, SampleRNG(0, 1, range(2)))[0]
    with torch.no_grad():
        assert torch.equal(first, vae.encode(signal, chance.of_codec(LATENTS)))
    alone = samples.batch(index[1:], SampleRNG(0, 1, range(1, 2)))[0]
    torch.testing.assert_close(alone, first[1:], atol=1e-5, rtol=0)


def test_without_a_codec_samples_are_as_they_were(pictures: Path) -> None:
    samples = of_pictures(pictures, "").prepared().samples
    assert load_codec("") is IDENTITY and coded(samples, IDENTITY) is samples


# clips, of which something is given


@pytest.mark.parametrize("kind", KINDS)
def test_a_latent_is_to_be_made_where_any_of_its_pixels_is(kind: str) -> None:
    cond, vae = told(kind), small(channels=1)
    assert cond.mask is not None
    latent = encode_given(vae, cond)
    assert latent.context is not None and latent.mask is not None
    assert latent.mask.shape == (2, 1, FRAMES, SIDE // 2, SIDE // 2)
    assert latent.context.shape == (2, *vae.latent_shape((1, FRAMES, SIDE, SIDE)))
    for b, _, t, y, x in torch.ones_like(latent.mask).nonzero().tolist():
        cell = cond.mask[b, 0, t, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
        assert latent.mask[b, 0, t, y, x] == float(cell.any())


def test_frames_that_are_given_whole_are_coded_as_they_are() -> None:
    cond, vae = told("predict"), small(channels=1)
    assert cond.context is not None
    given = slice(FRAMES // 2)
    latent = encode_given(vae, cond)
    assert latent.context is not None
    torch.testing.assert_close(latent.context[:, :, given], vae.encode(cond.context)[:, :, given])


def test_one_pixel_asks_for_its_whole_latent_alone() -> None:
    mask = torch.zeros(1, 1, FRAMES, SIDE, SIDE, dtype=torch.bool)
    mask[0, 0, 2, 5, 8] = True
    latent = encode_given(small(channels=1), Cond(context=torch.zeros(1, 1, FRAMES, SIDE, SIDE), mask=mask))
    assert latent.mask is not None and latent.mask.nonzero().tolist() == [[0, 0, 2, 2, 4]]


def test_where_nothing_is_given_or_nothing_is_coded_all_stays() -> None:
    cond = told("predict")
    assert encode_given(IDENTITY, cond) is cond
    bare = Cond(label=torch.zeros(2, dtype=torch.long))
    assert encode_given(small(), bare) is bare
    whole = encode_given(small(channels=1), replace(cond, mask=None))
    assert whole.mask is None and whole.context is not None and whole.context.shape[1] == 4


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "unconditional"])
def test_what_is_given_comes_back_to_the_bit_and_what_is_hidden_is_never_seen(kind: str) -> None:
    """The codec's attention spans the frame: coded with it, hidden pixels would show in the given latents."""
    model, cond = latent_vdt(), told(kind)
    assert cond.context is not None and cond.mask is not None
    draw = partial(generate, model, seeds=[5, 6], steps=2, guidance=1.0)
    clips = draw(cond=cond).samples
    given = ~cond.mask
    assert clips.shape == cond.context.shape and given.any()
    assert torch.equal(clips[given].view(torch.int32), cond.context[given].view(torch.int32))
    assert not torch.equal(clips[cond.mask], cond.context[cond.mask])
    other = torch.where(cond.mask, torch.nan, cond.context)
    assert torch.equal(draw(cond=replace(cond, context=other)).samples, clips)


def test_clips_of_another_length_and_size_are_drawn() -> None:
    model = latent_vdt()
    assert model.signal_shape == (1, FRAMES, SIDE, SIDE)
    drawn = generate(model, seeds=[0], steps=1, guidance=1.0, shape=(1, 6, 12, 20)).samples
    assert drawn.shape == (1, 1, 6, 12, 20)
    with pytest.raises(ShapeError, match="sides 12 x 13 should divide by 2"):
        generate(model, seeds=[0], steps=1, guidance=1.0, shape=(1, 6, 12, 13))


def test_a_video_model_learns_latents_and_fills_in_frames(grey: Path, tmp_path: Path) -> None:
    train_recipe(of_clips(grey, save_every=0), tmp_path)
    model = ditkit.load(tmp_path / "model")
    assert isinstance(model, VDT) and model.sample_shape == (4, FRAMES, SIDE // 2, SIDE // 2)
    assert equal(model.codec, Codec.load(grey))
    assert all("Regression_made" in line for line in losses(tmp_path))
    cond = told("first-frame", 1)
    assert cond.context is not None
    clip = ditkit.generate(model, seeds=[0], steps=2, guidance=1.0, cond=cond).samples
    assert torch.equal(clip[:, :, 0], cond.context[:, :, 0])
    report = ditkit.compare(model, steps=2, guidance=1.0, cond=cond, rounds=1, memory=False)
    assert report.rows[0].identical and report.settings["shape"] == [1, FRAMES, SIDE, SIDE]


def test_training_is_told_given_content_as_sampling_is(grey: Path) -> None:
    prepared = of_clips(grey).prepared()
    assert isinstance(prepared.samples, LatentDataset)
    index, chance = torch.tensor([0, 3]), partial(SampleRNG, 0, 7, range(2))
    _, latent = prepared.samples.batch(index, chance())
    _, signal = prepared.samples.samples.batch(index, chance())
    expected = encode_given(prepared.codec, signal)
    assert latent.context is not None and expected.context is not None
    assert torch.equal(latent.context, expected.context) and not latent.context.requires_grad
    assert isinstance(latent.mask, Tensor) and latent.mask.equal(expected.mask)  # type: ignore[arg-type]


# what is refused, before the data are read


def test_a_codec_that_is_none_is_refused_before_the_data_are_read(
    run: Path, tmp_path: Path, pictures: Path
) -> None:
    nowhere = tmp_path / "nowhere"
    for recipe in (of_pictures(tmp_path / "no-data", nowhere), of_clips(nowhere)):
        with pytest.raises(CheckpointError, match=r"cannot read .*nowhere"):
            recipe.prepared()
    with pytest.raises(CheckpointError, match="unknown key 'model'"):
        of_pictures(pictures, run / "model").prepared()


def test_data_that_the_codec_does_not_take_are_refused(codec: Path, grey: Path, pictures: Path) -> None:
    with pytest.raises(ShapeError, match=r"shape \[3, 16, 16\] should be \[1, H, W\]"):
        of_pictures(pictures, grey).prepared()
    with pytest.raises(ShapeError, match=r"shape \[1, 4, 16, 16\] should be \[3, H, W\]"):
        of_clips(codec).prepared()


def test_a_dry_run_says_what_the_latents_are(pictures: Path, codec: Path) -> None:
    lines = dict(line.split(maxsplit=1) for line in describe(of_pictures(pictures, codec)).splitlines())
    assert lines["codec"] == f"{codec}, latents [4, 8, 8]"
    assert "[3, 16, 16]" in lines["data"] and lines["model.channels"] == "4"
    assert "codec" not in describe(of_clips(""))
