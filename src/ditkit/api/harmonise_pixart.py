"""The training of a cache's table on a PixArt pipeline of diffusers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ditkit.api.harmonise import Harmonising, Process, Progress, Training, frozen, table_of
from ditkit.caching.harmonica import CacheTable
from ditkit.core.errors import ConfigError
from ditkit.core.run import Call, Run
from ditkit.hosts.family import families, family, has_sites
from ditkit.hosts.view import restore, running, view

FAMILY = "PixArtTransformer2DModel"
EMBEDDED = (
    "prompt_embeds",
    "prompt_attention_mask",
    "negative_prompt_embeds",
    "negative_prompt_attention_mask",
)


class Latents(NamedTuple):
    """The state of a trajectory: latents [B, C, H, W], captions and masks of 2 B rows, and the scheduler."""

    x: Tensor
    text: Tensor
    known: Tensor
    scheduler: Any


class PixArtProcess(Process):
    """A PixArt pipeline under its own scheduler, the rows without the caption first, as diffusers has them.

    Args:
        captions: embedded, [N, S, D'] and masks by the names of the pipeline's arguments; a trajectory takes `batch` of
            them in turn.
    """

    def __init__(
        self, pipe: Any, captions: Mapping[str, Tensor], steps: int, scale: float, batch: int, seed: int
    ) -> None:
        self.pipe, self.captions, self.scale, self.batch, self.seed = pipe, captions, scale, batch, seed
        self.model = pipe.transformer
        self.scheduler = deepcopy(pipe.scheduler)
        self.scheduler.set_timesteps(steps)
        self.steps = list(self.scheduler.timesteps)
        trained = float(getattr(self.scheduler.config, "num_train_timesteps", 1000))
        self.times = [float(t) / trained for t in self.steps]
        _refuse_noise(self.scheduler, self.model.config, self.steps[0])
        self.sampler = type(pipe.scheduler).__name__
        self.family = family(self.model)
        self.sites = self.family.sites(self.model)

    def start(self, number: int) -> Latents:
        config = self.model.config
        g = torch.Generator().manual_seed(self.seed * 2**32 + number)
        x = torch.randn(self.batch, config.in_channels, config.sample_size, config.sample_size, generator=g)
        count = len(self.captions["prompt_embeds"])
        at = (number * self.batch + torch.arange(self.batch)) % count
        text, known, bare, bare_known = (self.captions[name][at] for name in EMBEDDED)
        weight = next(self.model.parameters())
        return Latents(
            x.to(weight) * self.scheduler.init_noise_sigma,
            torch.cat([bare, text]).to(weight),
            torch.cat([bare_known, known]).to(weight.device),
            deepcopy(self.scheduler),
        )

    def predict(self, state: Latents, index: int, run: Callable[[Call], Run]) -> Tensor:
        t, x = self.steps[index], torch.cat([state.x, state.x])
        x = state.scheduler.scale_model_input(x, t)
        given = {
            "hidden_states": x,
            "encoder_hidden_states": state.text,
            "encoder_attention_mask": state.known,
            "timestep": torch.as_tensor(t, device=x.device).expand(len(x)),
            "added_cond_kwargs": self._size(x),
        }
        times = torch.full((len(x),), self.times[index], device=x.device)
        layout = self.family.layout(self.model, given)
        call = Call(index, len(self.times), self.times[index], "call0", layout=layout, times=times)
        with running(run(call)):
            out = self.model(**given, return_dict=False)[0]
        bare, text = out.chunk(2)
        guided: Tensor = bare + self.scale * (text - bare)
        return guided

    def step(self, state: Latents, index: int, out: Tensor) -> Latents:
        scheduler = deepcopy(state.scheduler)  # a multistep one remembers the steps before
        noise = out.chunk(2, dim=1)[0] if out.shape[1] == 2 * state.x.shape[1] else out
        x = scheduler.step(noise, self.steps[index], state.x, return_dict=False)[0]
        return state._replace(x=x, scheduler=scheduler)

    def latents(self, state: Latents) -> Tensor:
        return state.x

    def _size(self, x: Tensor) -> dict[str, Any]:
        """Return the size, for a model of several."""
        if not getattr(self.model, "use_additional_conditions", False):
            return {"resolution": None, "aspect_ratio": None}
        side = self.model.config.sample_size * self.pipe.vae_scale_factor
        size = torch.tensor([[side, side]], dtype=x.dtype, device=x.device).repeat(len(x), 1)
        return {"resolution": size, "aspect_ratio": torch.ones(len(x), 1, dtype=x.dtype, device=x.device)}


def harmonise_pixart(
    pipe: Any,
    prompts: Sequence[str] | Mapping[str, Tensor],
    *,
    steps: int = 20,
    guidance_scale: float = 4.5,
    settings: Harmonising | None = None,
    progress: Progress | None = None,
) -> CacheTable:
    """Train a table on a PixArt pipeline, which `accelerate(pipe, HarmoniCa(table=...))` takes from its file.

    Three branches a block: attention, cross-attention and MLP. The pipeline is left as it was.

    Args:
        prompts: captions, or what `pipe.encode_prompt` made of them, by the names of the pipeline's arguments.

    Raises:
        ConfigError: no PixArt pipeline, no captions, or a scheduler that draws noise in its steps is given.
    """
    settings = settings or Harmonising()
    model: Any = getattr(pipe, "transformer", None)
    families()
    if FAMILY not in {kind.__name__ for kind in type(model).__mro__}:
        raise ConfigError(
            f"harmonise_pixart: got {type(pipe).__name__}, expected a PixArt pipeline of diffusers"
        )
    count = len(prompts["prompt_embeds"]) if isinstance(prompts, Mapping) else len(prompts)
    if not count or steps < 2:
        raise ConfigError(
            f"harmonise_pixart: got {count} prompts and steps={steps}, expected one or more, and two or more"
        )
    captions = prompts if isinstance(prompts, Mapping) else _embedded(pipe, prompts)
    viewed = not has_sites(model)
    if viewed:
        view(model)
    try:
        process = PixArtProcess(pipe, captions, steps, guidance_scale, settings.batch, settings.seed)
        with frozen(model):
            training = Training(process, settings)
            training.run(progress)
        return table_of(training, FAMILY, "", f"scale {guidance_scale:g}")
    finally:
        if viewed:
            restore(model)


def _refuse_noise(scheduler: Any, config: Any, t: Any) -> None:
    """Refuse a scheduler whose first step is another at another state of the generator: a table learns one trajectory.

    Raises:
        ConfigError: it draws noise.
    """
    x = torch.ones(1, config.in_channels, 2, 2)
    found = []
    with torch.random.fork_rng(devices=()):
        for seed in (0, 1):
            torch.manual_seed(seed)
            found.append(deepcopy(scheduler).step(0.1 * x, t, x, return_dict=False)[0])
    if not torch.equal(*found):
        raise ConfigError(
            f"harmonise_pixart: {type(scheduler).__name__} draws noise in its steps, expected one that does not, such "
            "as DDIMScheduler or DPMSolverMultistepScheduler"
        )


def _embedded(pipe: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    found = pipe.encode_prompt(list(prompts), do_classifier_free_guidance=True)
    return dict(zip(EMBEDDED, found, strict=True))
