"""Codecs: exact where they say so, normalised by what they measured, and never parted from their model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from ditkit.codecs import ImageVae, ImageVaeConfig
from ditkit.codecs.standardised import Standardised
from ditkit.core.catalog import every
from ditkit.core.checkpoint import read_state
from ditkit.core.codec import IDENTITY, Codec, Identity, fingerprint, frame_by_frame
from ditkit.core.cond import Cond
from ditkit.core.errors import CheckpointError, ConfigError, DataError, DitkitError, ShapeError
from ditkit.core.model import Model
from ditkit.evaluate.pictures import write_png
from ditkit.models.dit import DiT, DiTConfig
from ditkit.tasks.image_vae import ImageVaeRecipe
from ditkit.tasks.recipe import describe, train_recipe
from ditkit.train.autoencoding import Autoencoding, CodedBatch
from ditkit.train.ema import Constant
from ditkit.train.randomness import Chance
from ditkit.train.settings import Settings
from ditkit.train.terms.absolute_error import AbsoluteError
from ditkit.train.terms.latent_kl import LatentKL
from ditkit.train.terms.regression import Regression

SMALL = ImageVaeConfig(size=16, latent_channels=4, widths=(8, 16, 16), groups=4)
LATENT = DiTConfig(size=4, patch=2, channels=4, width=16, depth=1, heads=2, classes=2)
PICTURES, CLIPS = (2, 3, 16, 8), (2, 3, 5, 16, 8)


def small(**changes: Any) -> ImageVae:
    """A VAE whose statistics are not neutral, in eval mode."""
    vae = ImageVae(replace(SMALL, **changes)).eval()
    vae.shift.normal_()
    vae.scale.uniform_(0.5, 2)
    return vae


def latent_model() -> DiT:
    model = DiT(LATENT).eval()
    model.codec = small()
    return model


def codec_of(kind: type[Codec]) -> Codec:
    """One that takes pictures of three channels; a new codec without defaults is added here."""
    if kind is Standardised:
        return Standardised.of(
            "uvp", ("m/s", "m/s", "Pa"), torch.tensor([1.0, 2, 3]), torch.tensor([2.0, 1, 9])
        )
    return kind(kind.Config()).eval()


def equal(one: Codec, other: Codec) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return type(one) is type(other) and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def one_line(error: pytest.ExceptionInfo[DitkitError]) -> str:
    message = str(error.value)
    assert "\n" not in message and len(message) < 400
    return message


# what every codec owes


@pytest.mark.parametrize("kind", every(Codec), ids=lambda kind: kind.__name__)  # type: ignore[type-abstract]
@pytest.mark.parametrize("shape", [PICTURES, CLIPS], ids=["pictures", "clips"])
def test_shapes_are_those_that_are_stated(kind, shape):
    codec = codec_of(kind)
    x = torch.rand(shape) * 2 - 1
    with torch.no_grad():
        z = codec.encode(x)
        again = codec.decode(z)
        drawn = codec.encode(x, torch.randn(z.shape))
    assert tuple(z.shape[1:]) == codec.latent_shape(shape[1:]) and len(z) == shape[0]
    assert codec.signal_shape(tuple(z.shape[1:])) == shape[1:]
    assert again.shape == x.shape and drawn.shape == z.shape
    assert z.dtype == again.dtype == torch.float32


@pytest.mark.parametrize("kind", every(Codec), ids=lambda kind: kind.__name__)  # type: ignore[type-abstract]
def test_a_saved_codec_is_read_back_to_the_bit(kind, tmp_path):
    codec = codec_of(kind)
    codec.history = ("trained",)
    codec.save(tmp_path / "a")
    before = torch.get_rng_state()
    loaded = Codec.load(tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), before)
    assert equal(loaded, codec) and (loaded.config, loaded.history) == (codec.config, codec.history)
    assert not loaded.training and not any(v.is_meta for v in loaded.state_dict().values())
    x = torch.randn(PICTURES)
    assert torch.equal(loaded.encode(x), codec.encode(x))
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["codec.safetensors", "config.json"]


def test_the_identity_is_nothing_at_all():
    x = torch.randn(CLIPS)
    assert IDENTITY.encode(x) is x and IDENTITY.encode(x, torch.randn(CLIPS)) is x and IDENTITY.decode(x) is x
    assert list(IDENTITY.parameters()) == [] and IDENTITY.state_dict() == {}


@pytest.mark.parametrize("frames", [1, 5, 33])
def test_frames_are_folded_in_order_and_in_parts(frames):
    sizes = []

    def number(pictures: Tensor) -> Tensor:
        sizes.append(len(pictures))
        return pictures[:, :1] * 2

    x = torch.randn(2, 3, frames, 4, 4)
    assert torch.equal(frame_by_frame(number, x), x[:, :1] * 2)
    assert sum(sizes) == 2 * frames and max(sizes) <= 32


def test_a_fingerprint_is_of_the_content():
    state = {"a": torch.randn(3, 2), "b": torch.tensor(1), "c": torch.zeros(0)}
    again = {k: state[k].clone() for k in ("c", "b", "a")}
    assert fingerprint(state) == fingerprint(again)
    others = [
        state | {"a": state["a"].T.reshape(3, 2)},
        state | {"a": state["a"].view(2, 3)},
        state | {"b": torch.tensor(1, dtype=torch.int32)},
        {k if k != "c" else "d": v for k, v in state.items()},
    ]
    assert len({fingerprint(s) for s in (state, *others)}) == 5


# the VAE


def test_a_clip_is_coded_as_its_frames_are():
    vae, x = small(), torch.randn(CLIPS)
    noise = torch.randn(2, *vae.latent_shape(CLIPS[1:]))
    z = vae.encode(x, noise)
    for i in range(CLIPS[2]):
        torch.testing.assert_close(z[:, :, i], vae.encode(x[:, :, i], noise[:, :, i]))
        torch.testing.assert_close(vae.decode(z)[:, :, i], vae.decode(z[:, :, i]))


@pytest.mark.parametrize(
    ("published", "quant"), [((0.18215, None), True), ((1.5305, 0.0609), False)], ids=["sd", "sd3"]
)
def test_a_vae_of_diffusers_gives_its_own_numbers_to_the_bit(tmp_path, published, quant):
    scale, shift = published
    theirs = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        scaling_factor=scale,
        shift_factor=shift,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
        mid_block_add_attention=not quant,
    ).eval()
    theirs.save_pretrained(tmp_path)
    x = torch.randn(3, 3, 8, 12)
    for ours in (ImageVae.from_diffusers(theirs), ImageVae.from_diffusers(tmp_path)):
        with torch.no_grad():
            posterior = theirs.encode(x).latent_dist
            z = (posterior.mode() - (shift or 0.0)) * scale
            assert torch.equal(ours.encode(x), z)
            drawn = posterior.sample(torch.Generator().manual_seed(3))
            noise = torch.randn(drawn.shape, generator=torch.Generator().manual_seed(3))
            assert torch.equal(ours.encode(x, noise), (drawn - (shift or 0.0)) * scale)
            assert torch.equal(ours.decode(z), theirs.decode(z / scale + (shift or 0.0)).sample)
        assert (ours.config.widths, ours.config.quant_conv) == ((8, 16), quant)


def test_published_means_and_deviations_are_taken_a_channel():
    theirs = AutoencoderKL(
        block_out_channels=(8,),
        norm_num_groups=4,
        latent_channels=2,
        scaling_factor=0.5,
        latents_mean=(1.0, -2.0),
        latents_std=(2.0, 4.0),
    )
    ours = ImageVae.from_diffusers(theirs)
    assert ours.shift.tolist() == [1, -2] and ours.scale.tolist() == [0.25, 0.125]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"act_fn": "gelu"}, "act_fn=gelu of the AutoencoderKL, expected silu only"),
        (
            {"down_block_types": ("AttnDownEncoderBlock2D",)},
            "down_block_types=('AttnDownEncoderBlock2D',) of the AutoencoderKL, expected DownEncoderBlock2D only",
        ),
        ({"out_channels": 1}, "out_channels=1 of the AutoencoderKL, expected 3 only"),
    ],
)
def test_a_vae_that_our_config_cannot_describe_is_refused(change, expected):
    theirs = AutoencoderKL(**{"block_out_channels": (8,), "norm_num_groups": 4, **change})
    with pytest.raises(CheckpointError) as caught:
        ImageVae.from_diffusers(theirs)
    assert expected in one_line(caught)


def test_what_is_no_vae_is_refused(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        ImageVae.from_diffusers(torch.nn.Linear(1, 1))
    assert "a Linear was given, expected an AutoencoderKL" in one_line(caught)
    with pytest.raises(CheckpointError) as caught:
        ImageVae.from_diffusers(tmp_path)
    assert f"no AutoencoderKL at {tmp_path}: " in one_line(caught)


@pytest.mark.parametrize("shape", [PICTURES, CLIPS], ids=["pictures", "clips"])
def test_fitted_latents_have_mean_zero_and_deviation_one(shape, tmp_path):
    vae = small()
    data = 0.3 * torch.randn(6, *shape[1:]) + torch.randn(6, shape[1], *(1,) * (len(shape) - 2))
    vae.fit_statistics(data[i : i + 4] for i in (0, 4))  # batches of different sizes
    vae = ImageVae.load(vae.save(tmp_path))
    with torch.no_grad():
        z = vae.encode(data).double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(z.mean(1), torch.zeros(4).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.std(1, correction=0), torch.ones(4).double(), atol=1e-5, rtol=0)
    assert vae.shift.dtype == vae.scale.dtype == torch.float32


def test_fitting_changes_no_picture():
    """The decoder sees the same latents before and after."""
    vae, x = small(), torch.randn(PICTURES)
    with torch.no_grad():
        before = vae.decode(vae.encode(x))
        vae.fit_statistics([x])
        torch.testing.assert_close(vae.decode(vae.encode(x)), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("batches", "expected"),
    [
        ([], "no pictures to measure statistics on"),
        ([torch.full(PICTURES, torch.nan)], "latent channel 0 should vary on the data and be finite"),
        ([torch.zeros(2, 3, 4, 4)], "latent channel 0 should vary on the data and be finite"),
    ],
    ids=["none", "nan", "constant"],
)
def test_statistics_that_cannot_be_measured_leave_the_old_ones(batches, expected):
    vae = small()
    before = vae.shift.clone(), vae.scale.clone()
    with pytest.raises(DataError) as caught:
        vae.fit_statistics(batches)
    assert expected in one_line(caught)
    assert torch.equal(vae.shift, before[0]) and torch.equal(vae.scale, before[1])


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((1, 3, 30, 32), "sides 30 x 32 should divide by 4, the side of a latent"),
        ((1, 3, 5, 32, 31), "sides 32 x 31 should divide by 4, the side of a latent"),
        ((1, 1, 32, 32), "a picture or clip of shape [1, 32, 32] should be [3, H, W] or [3, T, H, W]"),
        ((3, 32, 32), "a picture or clip of shape [32, 32] should be [3, H, W]"),
        ((1, 3, 0, 32), "a picture or clip of shape [3, 0, 32] should be [3, H, W]"),
    ],
)
def test_a_signal_that_does_not_fit_is_refused_in_one_line(shape, expected):
    with pytest.raises(ShapeError) as caught:
        small().encode(torch.zeros(shape))
    assert expected in one_line(caught)


def test_latents_that_do_not_fit_are_refused_in_one_line():
    with pytest.raises(ShapeError) as caught:
        small().decode(torch.zeros(1, 3, 4, 4))
    assert "latents of shape [3, 4, 4] should be [4, H, W] or [4, T, H, W]" in one_line(caught)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"latent_channels": 0}, "latent_channels=0 should be at least 1"),
        ({"widths": ()}, "0 levels, expected 1 to 8"),
        ({"widths": (8, 10)}, "a width of 10 does not divide into groups=4"),
        ({"layers": 101}, "101 layers, expected 1 to 100"),
        ({"size": 18}, "size=18 does not divide by 4"),
    ],
)
def test_sizes_that_make_no_network_are_refused_in_one_line(change, expected):
    with pytest.raises(DitkitError) as caught:
        replace(SMALL, **change)
    assert f"ImageVae: {expected}" in one_line(caught)


def test_half_precision_comes_in_and_float32_goes_out():
    vae, x = small(), torch.randn(PICTURES)
    z = vae.encode(x.bfloat16())
    assert z.dtype == vae.decode(z.bfloat16()).dtype == torch.float32
    torch.testing.assert_close(z, vae.encode(x.bfloat16().float()))


# training


def test_autoencoding_weighs_the_error_and_the_divergence():
    objective = Autoencoding((AbsoluteError(), LatentKL(0.5)))
    vae, x = small().train(), torch.randn(PICTURES)
    objective.check(vae)
    chance = Chance(seed=1, step=2, places=range(2))
    losses = objective(vae, vae, x, Cond(), chance)
    noise, _, _ = chance.draws(vae.latent_shape(PICTURES[1:]))
    again, mean, log_variance = vae(x, noise)
    torch.testing.assert_close(losses["AbsoluteError"], (again - x).abs().mean())
    normal = torch.distributions.Normal(mean, (log_variance / 2).exp())
    kl = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(losses["LatentKL"], kl.sum() / x.numel())
    torch.testing.assert_close(losses["loss"], losses["AbsoluteError"] + 0.5 * losses["LatentKL"])
    losses["loss"].backward()
    assert all(p.grad is not None and p.grad.any() for p in vae.parameters())


def test_the_divergence_is_least_at_a_standard_normal():
    def loss(mean: float, log_variance: float) -> float:
        flat = torch.ones(1, 2, 3, 3)
        batch = CodedBatch(
            data=flat, prediction=flat, taps={}, mean=flat * mean, log_variance=flat * log_variance
        )
        return LatentKL().loss(batch).item()

    assert loss(0, 0) == 0 and min(loss(0.1, 0), loss(0, 0.1), loss(0, -0.1)) > 0


def test_objectives_and_networks_that_do_not_meet_are_refused():
    with pytest.raises(ConfigError, match="Autoencoding: a DiT has no latents that are drawn"):
        Autoencoding((Regression(),)).check(DiT(LATENT))
    with pytest.raises(ConfigError, match="LatentKL needs a codec's latents; a DiT has none"):
        Autoencoding((LatentKL(),)).check(DiT(LATENT))


def test_checkpointing_gives_equal_gradients():
    vae, x = small().train(), torch.randn(PICTURES)
    noise = torch.randn(2, *vae.latent_shape(PICTURES[1:]))
    gradients = []
    for vae.gradient_checkpointing in (False, True, False):
        vae.zero_grad()
        vae(x, noise)[0].square().sum().backward()
        gradients.append([p.grad.clone() for p in vae.parameters() if p.grad is not None])
        assert vae.network.is_gradient_checkpointing == vae.gradient_checkpointing
    for plain, *others in zip(*gradients, strict=True):
        assert all(torch.equal(plain, other) for other in others)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A user's folder: twelve flat pictures in two class folders."""
    for i in range(12):
        path = tmp_path / "pictures" / ("warm" if i % 2 else "cold") / f"{i}.png"
        write_png(path, torch.tensor([i % 2 * 2 - 1.0, i / 6 - 1, 0]).view(3, 1, 1).expand(3, 20, 16))
    return tmp_path / "pictures"


def test_a_vae_of_a_users_folder_learns_and_keeps_its_statistics(pictures, tmp_path):
    recipe = ImageVaeRecipe(
        data=str(pictures),
        model=replace(SMALL, widths=(8, 16)),
        settings=Settings(
            steps=30, batch=4, learning_rate=3e-3, averages=(Constant(0.5),), save_every=0, sheet_every=30
        ),
    )
    model = train_recipe(recipe, tmp_path / "run")
    losses = [json.loads(line) for line in (tmp_path / "run/losses.jsonl").read_text().splitlines()]
    assert (
        sum(line["AbsoluteError"] for line in losses[-3:])
        < sum(line["AbsoluteError"] for line in losses[:3]) / 2
    )
    assert (tmp_path / "run/samples/000030.png").exists()

    prepared = recipe.prepared()
    codec = Codec.load(tmp_path / "run/model")
    assert torch.equal(codec.scale, model.scale)
    with torch.no_grad():
        z = codec.encode(prepared.samples.batch(torch.arange(12), None)[0]).transpose(0, 1).flatten(1)
    torch.testing.assert_close(z.std(1, correction=0), torch.ones(4), atol=1e-4, rtol=0)
    assert "parameters" in describe(recipe)


# beside a model


def test_a_codec_is_no_part_of_its_model():
    plain, model = DiT(LATENT), latent_model()
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert len(list(model.parameters())) == len(list(plain.parameters()))
    assert list(dict(model.named_modules())) == list(dict(plain.named_modules()))
    assert isinstance(plain.codec, Identity) and isinstance(model.codec, ImageVae)
    model.train()
    assert not model.codec.training and not any(p.requires_grad for p in model.codec.parameters())


def test_a_codec_of_other_latents_is_refused():
    model = DiT(replace(LATENT, channels=3))
    with pytest.raises(ShapeError) as caught:
        model.codec = small()
    assert "latents of shape [3, 4, 4] should be [4, H, W]" in one_line(caught)
    assert model.codec is IDENTITY


def test_a_model_and_its_codec_travel_in_one_folder(tmp_path):
    model = latent_model()
    model.save(tmp_path / "a", dtype=torch.bfloat16)
    files = sorted(str(p.relative_to(tmp_path / "a")) for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert files == ["codec/codec.safetensors", "codec/config.json", "config.json", "model.safetensors"]
    loaded = Model.load(tmp_path / "a")
    assert equal(loaded.codec, model.codec), "the codec stays in float32"
    z = torch.randn(2, 4, 4, 4)
    assert torch.equal(loaded.codec.decode(z), model.codec.decode(z))
    loaded.save(tmp_path / "b")
    assert read_state(tmp_path / "b/codec/codec.safetensors").keys() == model.codec.state_dict().keys()
    assert equal(DiT.from_pretrained(tmp_path / "b").codec, model.codec)


def test_a_model_without_a_codec_writes_and_says_none(tmp_path):
    DiT(LATENT).save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert "codec" not in json.loads((tmp_path / "config.json").read_text())
    assert Model.load(tmp_path).codec is IDENTITY


def test_the_hub_is_asked_for_the_codec_too(tmp_path, monkeypatch):
    folder = latent_model().save(tmp_path)
    asked = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options)
        return str(folder)

    monkeypatch.setattr("ditkit.core.model.snapshot_download", download)
    assert isinstance(Model.from_pretrained("owner/name").codec, ImageVae)
    assert {"codec/config.json", "codec/codec.safetensors"} < set(asked["allow_patterns"])


def other_weights(folder: Path) -> None:
    state = load_file(folder / "codec/codec.safetensors")
    state["shift"] += 1
    save_file(state, folder / "codec/codec.safetensors")


def another_codec(folder: Path) -> None:
    small().save(folder / "codec")


def no_codec(folder: Path) -> None:
    (folder / "codec/config.json").unlink()


def other_config(folder: Path) -> None:
    path = folder / "codec/config.json"
    described = json.loads(path.read_text())
    described["config"]["size"] = 32
    path.write_text(json.dumps(described))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            other_weights,
            "codec/codec.safetensors are other weights than {0}/codec/config.json was saved with",
        ),
        (another_codec, "{0}/codec is another codec than {0}/config.json was saved with"),
        (other_config, "{0}/codec is another codec than {0}/config.json was saved with"),
        (no_codec, "cannot read {0}/codec/config.json: No such file"),
    ],
)
def test_a_codec_that_was_not_saved_with_its_model_is_refused(tmp_path, change, expected):
    folder = latent_model().save(tmp_path / "m")
    change(folder)
    with pytest.raises(CheckpointError) as caught:
        Model.load(folder)
    assert expected.format(folder) in one_line(caught)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{}", "no 'codec' that names a codec"),
        ('{"codec": "ImageVea"}', "unknown codec 'ImageVea'; did you mean 'imagevae'?"),
        ('{"codec": "ImageVae", "confg": {}}', "unknown key 'confg'; did you mean 'config'?"),
        ('{"codec": "ImageVae", "config": {"widths": 3}}', "widths=3 should be of type"),
        ('{"codec": "ImageVae", "config": {}, "history": 1}', "'history' should be a list"),
        ('{"codec": "Identity", "config": {}}', "unexpected tensor"),
    ],
)
def test_a_config_that_is_no_codec_is_refused(tmp_path, text, expected):
    small().save(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError) as caught:
        Codec.load(tmp_path)
    assert expected in one_line(caught)


@pytest.mark.parametrize("stops", range(4))
def test_a_kill_between_two_files_leaves_the_old_the_new_or_a_refusal(tmp_path, monkeypatch, stops):
    """Never a model with the codec of another save."""
    old, new = latent_model(), latent_model()
    folder = old.save(tmp_path / "m")
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(Path, "replace", killed_at(stops, Path.replace))
        new.save(folder)
    if stops == 0:
        assert equal(Model.load(folder).codec, old.codec)
    else:
        with pytest.raises(CheckpointError, match="was saved with"):
            Model.load(folder)
    assert equal(Model.load(new.save(folder)).codec, new.codec)


def killed_at(stop: int, rename: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
    """Stands in for `Path.replace`; drafts of drafts are not counted."""
    done = 0

    def renamed(self: Path, target: Path) -> Path:
        nonlocal done
        if not target.name.startswith("."):
            if done == stop:
                raise KeyboardInterrupt
            done += 1
        return rename(self, target)

    return renamed


def test_a_failed_write_keeps_the_earlier_model_and_codec(tmp_path):
    old = latent_model()
    folder = old.save(tmp_path / "m")
    (folder / "model.safetensors").rename(tmp_path / "weights")
    (folder / "model.safetensors").mkdir()
    with pytest.raises(ConfigError, match="it is a folder"):
        latent_model().save(folder)
    (folder / "model.safetensors").rmdir()
    (tmp_path / "weights").rename(folder / "model.safetensors")
    assert equal(Model.load(folder).codec, old.codec)
    assert sorted(p.name for p in (folder / "codec").iterdir()) == ["codec.safetensors", "config.json"]
