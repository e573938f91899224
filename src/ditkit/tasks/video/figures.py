"""Figures of clips beside the truth, as films and as strips of frames."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from ditkit.core.checkpoint import replacing
from ditkit.metrics.error import pooled_psnr_db
from ditkit.report.film import enlarged, scale_of, side_by_side, tiled, write_film
from ditkit.report.leadtime import LeadTimePlot
from ditkit.report.legend import below_each_other
from ditkit.report.sheet import as_frames, png
from ditkit.report.strips import outlined, strip
from ditkit.tasks.video.scores import Completed, MaskScores

if TYPE_CHECKING:
    from PIL import Image

REPEATED, GIVEN = "the last frame, repeated", "given"
FILMED, ALONE, SHOWN = 4, 8, 2
"""Clips of a film, of one of unconditional clips, and of a strip."""


def write_films(folder: Path, done: Completed, fps: float) -> list[str]:
    """MASK.gif, and MASK.mp4 where PyAV is installed: truth, given, generated and baseline in a row; the file names.

    A GIF of more than 50 frames a second is slowed down to them.

    Raises:
        ConfigError: a file cannot be written, or there is no such `fps`.
    """
    if done.mask is None:
        tiles = list(done.generated[:ALONE])
        film = side_by_side(tiles, [f"generated {i + 1}" for i in range(len(tiles))])
    else:
        film = _beside_the_truth(done)
    return write_film(folder, done.kind.name, film, fps)


def write_strips(folder: Path, done: Completed) -> str:
    """MASK.png, the frames of two clips: truth, generated and baseline, each with its error below; its name.

    Raises:
        ConfigError: the file cannot be written.
    """
    if done.mask is None:
        pages = [strip({f"generated {i + 1}": clip for i, clip in enumerate(done.generated[:FILMED])})]
    else:
        pages = [_strip(done, i) for i in range(min(SHOWN, len(done.generated)))]
    with replacing(folder / f"{done.kind.name}.png") as draft:
        draft.write_bytes(png(below_each_other(pages)))
    return f"{done.kind.name}.png"


def leadtime(scores: MaskScores) -> LeadTimePlot | None:
    """PSNR of predicted frames; None where a curve has no finite point, as for clips that stand still."""
    if scores.model is None or scores.baseline is None:
        return None
    frames = [t for t, ssim in enumerate(scores.model.ssim_by_frame) if ssim is not None]
    curves = {
        name: [math.nan if (value := of.psnr_db_by_frame[t]) is None else value for t in frames]
        for name, of in (("model", scores.model), (REPEATED, scores.baseline))
    }
    if any(all(map(math.isnan, curve)) for curve in curves.values()):
        return None
    return LeadTimePlot(
        curves=curves,
        lead=[t - frames[0] + 1 for t in frames],
        error="PSNR, dB (higher is better)",
        unit="frames",
        title=f"Predicted frames of {scores.clips} clips",
        baselines=[REPEATED],
    )


def _beside_the_truth(done: Completed) -> Tensor:
    """Truth, given, generated and baseline of the first clips; given content is outlined, its tile else black."""
    assert done.truth is not None and done.baseline is not None and done.mask is not None
    given = done.truth.masked_fill(done.mask, -1)
    rows = {"truth": done.truth, GIVEN: given, "generated": done.generated, "baseline": done.baseline}
    scale = scale_of(done.generated.shape[-2], done.generated.shape[-1], len(rows))
    tiles = []
    for i in range(min(FILMED, len(done.generated))):
        for name, clips in rows.items():
            tile = enlarged(as_frames(clips[i]).expand(-1, 3, -1, -1), scale)
            tiles.append(outlined(tile, ~done.mask[i, 0]) if name == GIVEN else tile)
    return tiled(tiles, [*rows] * (len(tiles) // len(rows)), columns=len(rows))


def _strip(done: Completed, i: int) -> Image.Image:
    assert done.truth is not None and done.baseline is not None and done.mask is not None
    one, mask = slice(i, i + 1), done.mask[i]
    by = {"generated": done.generated, "baseline": done.baseline}
    notes = {}
    for name, clips in by.items():
        psnr = pooled_psnr_db(clips[one].clamp(-1, 1), done.truth[one], done.mask[one])
        notes[name] = ["equal to the truth" if psnr is None else f"{psnr:.2f} dB over what was generated"]
    rows = {name: clips[i].clamp(-1, 1) for name, clips in {"truth": done.truth, **by}.items()}
    return strip(rows, masks=dict.fromkeys(by, mask), errors_to="truth", notes=notes)
