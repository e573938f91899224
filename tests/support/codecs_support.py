"""Small codecs with random weights, a model of the latents of one, and what a refusal of theirs says."""

from __future__ import annotations

import pytest
import torch

from ditkit.codecs import ImageVae, ImageVaeConfig
from ditkit.core.codec import Codec
from ditkit.core.errors import DitkitError
from ditkit.models.dit import DiT, DiTConfig

SMALL = ImageVaeConfig(size=16, latent_channels=4, widths=(8, 16, 16), groups=4)
LATENT = DiTConfig(size=4, patch=2, channels=4, width=16, depth=1, heads=2, classes=2)
PICTURES, CLIPS = (2, 3, 16, 8), (2, 3, 5, 16, 8)


def small() -> ImageVae:
    """A VAE whose statistics are not neutral, in eval mode."""
    vae = ImageVae(SMALL).eval()
    vae.shift.normal_()
    vae.scale.uniform_(0.5, 2)
    return vae


def latent_model() -> DiT:
    model = DiT(LATENT).eval()
    model.codec = small()
    return model


def equal(one: Codec, other: Codec) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return type(one) is type(other) and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def one_line(error: pytest.ExceptionInfo[DitkitError]) -> str:
    message = str(error.value)
    assert "\n" not in message and len(message) < 400
    return message
