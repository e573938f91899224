"""Training a VAE: its losses against torch's own, checkpointing, and a run on a user's folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from codecs_support import LATENT, PICTURES, SMALL, small
from ditkit.core.codec import Codec
from ditkit.core.cond import Cond
from ditkit.core.errors import ConfigError
from ditkit.models.dit import DiT
from ditkit.report.sheet import write_png
from ditkit.tasks.image.vae import ImageVaeRecipe
from ditkit.tasks.recipe import describe, train_recipe
from ditkit.train.autoencoding import Autoencoding, CodedBatch
from ditkit.train.ema import Constant
from ditkit.train.randomness import SampleRNG
from ditkit.train.settings import Settings
from ditkit.train.terms.latent_kl import LatentKL
from ditkit.train.terms.regression import AbsoluteError, Regression


def test_autoencoding_weighs_the_error_and_the_divergence():
    objective = Autoencoding((AbsoluteError(), LatentKL(0.5)))
    vae, x = small().train(), torch.randn(PICTURES)
    objective.check(vae)
    chance = SampleRNG(seed=1, step=2, places=range(2))
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
