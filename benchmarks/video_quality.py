"""Clips that models complete, beside holding or blending what is given; with and without guidance.

    python benchmarks/video_quality.py
    python benchmarks/video_quality.py --models digits runs/mine/model --masks backward region

Held-out clips of the data that each model was trained on, of those options of the loader; of moving digits for a model
that does not say. One seed a clip. The baseline draws nothing, and has no guidance.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict

import torch
import tyro
from torch import Tensor

import ditkit
from common import Row, record, show
from ditkit.core.model import Denoiser
from ditkit.data.clips import spread
from ditkit.data.loading import load_held_out
from ditkit.tasks.video.masks import mask_kind
from ditkit.tasks.video.scores import Scores, complete

NO_HISTORY = {"trained": "moving-digits"}


def main(
    models: tuple[str, ...] = ("digits", "vizdoom"),
    masks: tuple[str, ...] = ("predict", "interpolate"),
    guidance: tuple[float, ...] = (1.0, 2.0),
    count: int = 32,
    steps: int = 25,
    threads: int = 2,
) -> None:
    """Print one table, and keep it in results/video.json.

    Args:
        models: shipped ones, or folders. masks: what is given, as `ditkit video` names it.
        guidance: scales, of which 1 is none. count: clips of each model. threads: of torch.
    """
    torch.set_num_threads(threads)
    rows = [row for model in models for row in rows_of(model, masks, guidance, count, steps)]
    names = ("network", "mask", "made_by", "guidance", "psnr_db", "ssim", "temporal_error")
    show(f"{count} clips in {steps} steps", [{name: row[name] for name in names} for row in rows])
    record("video", rows)


def rows_of(
    name: str, masks: Sequence[str], scales: Sequence[float], count: int, steps: int
) -> Iterator[Row]:
    """The model under each mask and scale, after the baseline of that mask."""
    model = ditkit.load(name)
    assert isinstance(model, Denoiser)
    clips = held_out(model, count)
    for mask in masks:
        for i, scale in enumerate(scales):
            found = complete(
                model, clips, mask_kind(mask), seeds=range(count), steps=steps, guidance=scale
            ).scores
            assert found.baseline is not None and found.model is not None
            if i == 0:
                yield row(name, mask, None, "baseline", found.baseline)
            yield row(name, mask, scale, "model", found.model)


def held_out(model: Denoiser, count: int) -> Tensor:
    """Clips [B, C, T, H, W] spread over the test split of what the model was trained on last."""
    run = model.last_training or NO_HISTORY
    _, frames, height, width = model.signal_shape
    whole = load_held_out(run["trained"], (height, width), frames, **run.get("options", {}))
    return spread(whole, count).clips(torch.arange(count))


def row(name: str, mask: str, scale: float | None, by: str, scores: Scores) -> Row:
    return {
        "network": name,
        "mask": mask,
        "guidance": scale,
        "made_by": by,
        **asdict(scores),
    }


if __name__ == "__main__":
    tyro.cli(main)
