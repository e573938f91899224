"""What a person looks at: clips beside the truth, as films and as strips of frames."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ditkit.core.checkpoint import replacing
from ditkit.evaluate.deviation import pooled_psnr_db
from ditkit.evaluate.film import GIF_FASTEST, side_by_side, write_gif, write_mp4
from ditkit.evaluate.leadtime import LeadTimePlot
from ditkit.evaluate.sheet import PAPER, png
from ditkit.evaluate.strips import strip
from ditkit.tasks.video_scores import Completed, MaskScores

if TYPE_CHECKING:
    from PIL import Image

REPEATED = "the last frame, repeated"
FILMED, ALONE, SHOWN = 4, 8, 2
"""Clips of a film, of one of unconditional clips, and of a strip."""


def write_films(folder: Path, done: Completed, fps: float) -> list[str]:
    """MASK.gif, and MASK.mp4 where PyAV is installed: truth, given, made and baseline in a row; the file names.

    A GIF of more than 50 frames a second is slowed down to them.

    Raises:
        ConfigError: a file cannot be written, or there is no such `fps`.
    """
    if done.mask is None:
        tiles = list(done.made[:ALONE])
        film = side_by_side(tiles, [f"made {i + 1}" for i in range(len(tiles))])
    else:
        assert done.truth is not None and done.baseline is not None
        given = done.truth.masked_fill(done.mask, 0)
        rows = {"truth": done.truth, "given": given, "made": done.made, "baseline": done.baseline}
        count = min(FILMED, len(done.made))
        film = side_by_side([x[i] for i in range(count) for x in rows.values()], [*rows] * count)
    name = done.scores.mask
    written = [write_gif(folder / f"{name}.gif", film, min(fps, GIF_FASTEST)).name]
    return [write_mp4(folder / f"{name}.mp4", film, fps).name, *written] if find_spec("av") else written


def write_strips(folder: Path, done: Completed) -> str:
    """MASK.png, the frames of two clips: truth, made and baseline, each with its error below; its name.

    Raises:
        ConfigError: the file cannot be written.
    """
    if done.mask is None:
        pages = [strip({f"made {i + 1}": clip for i, clip in enumerate(done.made[:FILMED])})]
    else:
        pages = [_strip(done, i) for i in range(min(SHOWN, len(done.made)))]
    with replacing(folder / f"{done.scores.mask}.png") as draft:
        draft.write_bytes(png(_below_each_other(pages)))
    return f"{done.scores.mask}.png"


def leadtime(scores: MaskScores) -> LeadTimePlot | None:
    """PSNR of predicted frames; None where a curve has no finite point, as for clips that stand still."""
    if scores.model is None or scores.baseline is None:
        return None
    made = [t for t, ssim in enumerate(scores.model.ssim_by_frame) if ssim is not None]
    curves = {
        name: [math.nan if (value := of.psnr_db_by_frame[t]) is None else value for t in made]
        for name, of in (("model", scores.model), (REPEATED, scores.baseline))
    }
    if any(all(map(math.isnan, curve)) for curve in curves.values()):
        return None
    return LeadTimePlot(
        curves=curves,
        lead=[t - made[0] + 1 for t in made],
        error="PSNR, dB (higher is better)",
        unit="frames",
        title=f"Predicted frames of {scores.clips} clips",
        baselines=[REPEATED],
    )


def _strip(done: Completed, i: int) -> Image.Image:
    assert done.truth is not None and done.baseline is not None and done.mask is not None
    one, mask = slice(i, i + 1), done.mask[i]
    made = {"made": done.made, "baseline": done.baseline}
    notes = {}
    for name, clips in made.items():
        psnr = pooled_psnr_db(clips[one].clamp(-1, 1), done.truth[one], done.mask[one])
        notes[name] = ["equal to the truth" if psnr is None else f"{psnr:.2f} dB over what was made"]
    rows = {name: clips[i].clamp(-1, 1) for name, clips in {"truth": done.truth, **made}.items()}
    return strip(rows, masks=dict.fromkeys(made, mask), errors_to="truth", notes=notes)


def _below_each_other(pages: Sequence[Image.Image]) -> Image.Image:
    from PIL import Image

    whole = Image.new("RGB", (max(p.width for p in pages), sum(p.height for p in pages)), PAPER)
    top = 0
    for page in pages:
        whole.paste(page, (0, top))
        top += page.height
    return whole
