"""Tiny random pipelines of the families that are trained, saved as folders, and files of latents for them."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import family_pipelines_support as pipelines
from ditkit.hosts.denoiser import inputs_of, slots_of
from ditkit.train.ema import Constant
from ditkit.train.settings import Settings

FAMILIES = {
    "flux": pipelines.flux,
    "sd3": pipelines.sd3,
    "pixart": pipelines.pixart,
    "dit": pipelines.dit,
    "wan": pipelines.wan,
}
N, TEXT = 6, 5
SHORT = Settings(
    steps=2,
    batch=2,
    learning_rate=1e-3,
    trained="auto",
    averages=(Constant(0.5),),
    save_every=1,
    sheet_every=0,
)


@lru_cache
def pipe_of(name: str) -> Any:
    """Always the same weights; to read, not to change."""
    return pipelines.ready(FAMILIES[name])[0]


def folder_of(name: str, where: Path) -> Path:
    """Save the transformer and the scheduler as a pipeline's folder has them."""
    pipe, folder = pipe_of(name), where / name
    pipe.transformer.save_pretrained(folder / "transformer")
    pipe.scheduler.save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(f'{{"_class_name": "{type(pipe).__name__}"}}')
    return folder


def tensors_of(transformer: Any, negative: bool = True) -> dict[str, Tensor]:
    """Draw what a file for a transformer holds."""
    g = torch.Generator().manual_seed(0)
    channels, multiples = inputs_of(transformer).latents(transformer)
    sides = (2, 4, 4) if len(multiples) == 3 else (8, 8)
    held = {"latents": torch.randn(N, channels, *sides, generator=g)}
    for key, slot in slots_of(transformer).items():
        shape = [N, *(TEXT if n == "S" else n for n in slot.shape)]
        if slot.below:
            held[key] = torch.randint(slot.below, shape, generator=g)
        elif slot.field == "text_mask":
            held[key] = (torch.arange(TEXT) < 3).long().expand(N, -1).contiguous()
        else:
            held[key] = torch.randn(shape, generator=g)
        if negative and not slot.below:
            held["negative_" + key] = held[key][:1].flip(-1).contiguous()
    return held


def file_of(name: str, where: Path, **changed: Tensor | None) -> Path:
    """Write the file of a family, with tensors changed or, for None, left out."""
    held = {**tensors_of(pipe_of(name).transformer), **changed}
    path = where / f"{name}.safetensors"
    save_file({k: v for k, v in held.items() if v is not None}, path)
    return path
