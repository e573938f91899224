"""The task of clips: generated whole, or completed where a mask gives a part of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditkit.core.cond import Cond
from ditkit.core.errors import ConfigError
from ditkit.core.task import Evaluation, Progress, Task

FPS = 10.0
"""The rate of films without data, which have none of their own."""
SHEET_CLIPS = 8
"""Clips of sheet.png."""


class VideoTask(Task):
    """Clips [C, T, H, W]."""

    name, noun, data, axes = "video", "clip", "clips", ("C", "T", "H", "W")
    command, has_frames = "ditkit video", True
    settings = ("count", "masks", "frames", "size", "features")

    @property
    def recipe(self) -> type:
        from ditkit.tasks.video.recipe import VideoRecipe

        return VideoRecipe

    def error(self, x: Tensor, ref: Tensor, generated: Tensor | None = None) -> Mapping[str, Any]:
        from ditkit.metrics.error import clip_errors

        return clip_errors(x, ref, generated)

    def draw(self, samples: Tensor) -> Tensor:
        from ditkit.report.sheet import as_pictures

        return as_pictures(samples).transpose(1, 2)

    def write(self, folder: Path, samples: Sequence[Tensor], names: Sequence[str], columns: int) -> list[str]:
        from ditkit.core.checkpoint import replacing
        from ditkit.report.film import side_by_side, write_film
        from ditkit.report.sheet import png
        from ditkit.report.strips import strip

        files = [
            write_film(folder, name, side_by_side([clip]), FPS)[0]
            for name, clip in zip(names, samples, strict=True)
        ]
        page = strip(dict(zip(names[:SHEET_CLIPS], samples[:SHEET_CLIPS], strict=True)))
        with replacing(folder / "sheet.png") as draft:
            draft.write_bytes(png(page))
        return files

    def settle(self, sampling: Any) -> Any:
        """Return the settings without classifier-free guidance, which has nothing to favour."""
        return sampling if sampling.guidance.networks() else sampling.changed(guidance=1.0)

    def reference(
        self, model: Any, data: str | None, mask: Any, seeds: Sequence[int], **options: Any
    ) -> tuple[Tensor | None, Cond]:
        from ditkit.tasks.video.evaluation import held_out
        from ditkit.tasks.video.masks import PREDICT
        from ditkit.tasks.video.recipe import conditioned, labels_for

        if data is None:
            if mask is not None and not mask.gives_nothing:
                raise ConfigError(f"--mask {mask.name} without clips, expected --data, such as moving-digits")
            return None, Cond()
        if mask is not None and mask.gives_nothing:
            raise ConfigError(f"--mask {mask.name} gives nothing of --data {data}, expected one of the two")
        clips = held_out(model, data, len(seeds), **options)
        given = clips.clips(torch.arange(len(clips)))
        kind = PREDICT if mask is None else mask
        return None, conditioned(given, kind, seeds, labels_for(model, clips))

    def evaluate(
        self, model: Any, data: str, *, sampling: Any, progress: Progress | None, **settings: Any
    ) -> Evaluation:
        from ditkit.tasks.video.evaluation import evaluate_clips

        return evaluate_clips(model, data, sampling=sampling, progress=progress, **settings)
