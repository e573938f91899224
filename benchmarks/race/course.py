"""The network that all contestants run, and what they are asked to draw with it."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from itertools import chain, product
from typing import Any

import torch
from diffusers import FluxPipeline
from torch import Tensor, nn

import ditkit
from ditkit.models.small_flux import SmallFlux, SmallFluxConfig

RANDOM = "random"
PROMPTS = ("trouser", "sandal", "coat", "bag")
Told = dict[str, Any]


@dataclass(frozen=True)
class Course:
    """FLUX pipelines around the very same weights, and calls of them.

    Args:
        pipe: the one that the others are made of; it is never run under a cache.
        prompts, seeds: every pair is one sample of a call's batch.
    """

    pipe: FluxPipeline
    prompts: tuple[str, ...] = PROMPTS
    seeds: tuple[int, ...] = (0, 1)

    def pipeline(self, kind: type = FluxPipeline) -> Any:
        """With a transformer of its own, for a cache may patch the module; the parameters are the same tensors."""
        transformer = self.pipe.transformer
        shared = {id(t): t for t in chain(transformer.parameters(), transformer.buffers())}
        scheduler = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)
        pipe = alone(kind)(scheduler, self.pipe.vae, None, None, None, None, deepcopy(transformer, shared))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def told(self, steps: int, first: int | None = None, zoom: int = 1) -> Told:
        """Arguments of a call, of the first samples only or `zoom` times as many pixels a side."""
        pairs = list(product(self.prompts, self.seeds))[:first]
        embeds, pooled, _ = self.pipe.encode_prompt([prompt for prompt, _ in pairs], None)
        side = zoom * self.side
        return {
            "prompt_embeds": embeds,
            "pooled_prompt_embeds": pooled,
            "height": side,
            "width": side,
            "num_inference_steps": steps,
            "latents": torch.cat([self._noise(seed, side) for _, seed in pairs]),
            "output_type": "latent",
        }

    def late(self, steps: int, strength: float) -> Told:
        """The same as image-to-image: smooth pictures, of which a share of `strength` of the steps is redrawn."""
        told = self.told(steps)
        told.pop("latents")
        draw = torch.Generator().manual_seed(0)
        rough = torch.rand(len(told["prompt_embeds"]), self._channels, 4, 4, generator=draw)
        picture = nn.functional.interpolate(rough, size=self.side, mode="bilinear")
        generators = [torch.Generator().manual_seed(row) for row in range(len(picture))]
        return told | {"image": picture, "strength": strength, "generator": generators}

    @property
    def side(self) -> int:
        """Of a picture, in pixels."""
        return self.pipe.default_sample_size * self.pipe.vae_scale_factor

    @property
    def _channels(self) -> int:
        """Of a picture: a token holds 4 x 4 pixels."""
        return self.pipe.transformer.config.in_channels // 16

    def _noise(self, seed: int, side: int) -> Tensor:
        """[1, L, 16 C]; the seed's, whatever it is drawn with."""
        rows = (side // 4) ** 2
        draw = torch.Generator().manual_seed(seed)
        return torch.randn(1, rows, 16 * self._channels, generator=draw)


def alone(kind: type) -> Any:
    """A class of its own and the same name: cache-dit patches `__call__` of the class and marks it as cached."""
    return type(kind.__name__, (kind,), {})


def reason(error: BaseException) -> str:
    """The class and first line."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def course(model: str) -> Course:
    """Of a shipped model's name, a folder, or `RANDOM` weights, which say nothing of errors."""
    network = random_flux() if model == RANDOM else ditkit.load(model)
    assert isinstance(network, SmallFlux)
    return Course(network.pipeline())


def random_flux(config: SmallFluxConfig | None = None) -> SmallFlux:
    """Random everywhere: a fresh one's output is 0."""
    model = SmallFlux(config or SmallFluxConfig()).eval()
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            scale = 0.7 / parameter.shape[1] ** 0.5
            parameter.data.copy_(torch.randn(parameter.shape, generator=draw) * scale)
    return model
