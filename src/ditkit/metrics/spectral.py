"""Distances between satellite images, over all pixels or some, and between maps of land cover that changes.

n series, C bands, T dates, H W pixels. Images are reflectances in [0, 1] as [-1, 1], as in `metrics`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ditkit.core.errors import DataError, ShapeError
from ditkit.metrics.video import frame_ssim


@dataclass(frozen=True)
class ImageScores:
    """Distances to the truth, means over series; errors are of reflectances in [0, 1].

    Args:
        psnr_db: of the squared error over the pixels of each series. sam_deg: mean angle of spectra.
        ssim: mean over the dates of which a pixel counts.
    """

    psnr_db: float
    ssim: float
    rmse: float
    mae: float
    sam_deg: float


def spectral_angle_deg(x: Tensor, ref: Tensor) -> Tensor:
    """Angle between the spectra of pixels (SAM), arccos(<x, ref> / |x| |ref|): [n, C, ...] to [n, ...] in degrees.

    Values are reflectances, where 0 is black; scaling a spectrum changes nothing. The angle to black is 90 degrees,
    and that of black to black 0.

    Raises:
        ShapeError: unequal shapes.
    """
    if x.shape != ref.shape:
        raise ShapeError(f"spectral_angle_deg: {list(x.shape)} and {list(ref.shape)}, expected one shape")
    x, ref = x.double(), ref.double()
    lengths = x.norm(dim=1, keepdim=True), ref.norm(dim=1, keepdim=True)
    black = [(length == 0).squeeze(1) for length in lengths]
    a, b = (v / length.clamp_min(1e-300) for v, length in zip((x, ref), lengths, strict=True))
    # by both legs: arccos of a cosine near 1 would leave 1e-6 degrees of nothing
    angle = 2 * torch.atan2((a - b).norm(dim=1), (a + b).norm(dim=1)) * 180 / torch.pi
    return torch.where(black[0] & black[1], 0.0, torch.where(black[0] | black[1], 90.0, angle))


def scores_by_series(x: Tensor, ref: Tensor, counted: Tensor | None = None) -> dict[str, Tensor]:
    """Measure every distance of `ImageScores`, [n] each; NaN of a series of which no pixel counts.

    Args:
        x, ref: [n, C, T, H, W] in [-1, 1]; x is cut to that.
        counted: bool [n, 1, T, H, W]; all pixels count without.

    Raises:
        ShapeError: unequal shapes. DataError: values that are not finite.
    """
    x = x.clamp(-1, 1)
    similarity = frame_ssim(x, ref, None if counted is None else counted.float())  # refuses what does not fit
    weight = torch.ones_like(ref[:, :1]) if counted is None else counted.to(ref.dtype)
    weight = weight.double()
    pixels = weight.flatten(1).sum(1)
    error = (x.double() - ref.double()) / 2
    bands = x.shape[1]
    square = (error.square() * weight).flatten(1).sum(1) / (pixels * bands)
    angle = spectral_angle_deg((x + 1) / 2, (ref + 1) / 2) * weight[:, 0]
    return {
        "psnr_db": -10 * square.log10(),
        "ssim": similarity.nanmean(1),
        "rmse": square.sqrt(),
        "mae": (error.abs() * weight).flatten(1).sum(1) / (pixels * bands),
        "sam_deg": angle.flatten(1).sum(1) / pixels,
    }


def image_scores(x: Tensor, ref: Tensor, counted: Tensor | None = None) -> ImageScores:
    """Average `scores_by_series`, whose arguments these are, over the series of which a pixel counts.

    Raises:
        DataError: no pixel of any counts. Those of `scores_by_series`.
    """
    found = scores_by_series(x, ref, counted)
    if found["rmse"].isnan().all():
        raise DataError("image_scores: no pixel counts, expected some")
    return ImageScores(**{name: float(each.nanmean()) for name, each in found.items()})


@dataclass(frozen=True)
class ChangeScores:
    """Scores of class maps over time (DynamicEarthNet's): from 0 to 1, NaN where the truth has nothing to be scored.

    Args:
        miou: mean over classes of intersection over union, on all pixels.
        bc: intersection over union of the pixels that change from one date to the next.
        sc: mean intersection over union of the classes on the pixels that truly changed. scs: (bc + sc) / 2.
    """

    miou: float
    bc: float
    sc: float
    scs: float


def change_scores(maps: Tensor, truth: Tensor, classes: int) -> ChangeScores:
    """Score class maps [n, T, H, W] against the truth, -1 where that is unknown; all series are counted as one.

    A pixel has changed if its class is another than at the date before. A class counts that the truth has.

    Raises:
        ShapeError: unequal shapes, or fewer than two dates. DataError: a class beyond the last.
    """
    if maps.shape != truth.shape or maps.ndim != 4 or maps.shape[1] < 2:
        raise ShapeError(
            f"change_scores: maps {list(maps.shape)} and {list(truth.shape)}, expected [n, T, H, W] twice, T > 1"
        )
    if int(maps.max()) >= classes or int(truth.max()) >= classes or int(maps.min()) < 0:
        raise DataError(f"change_scores: classes up to {int(maps.max())}, expected 0 to {classes - 1}")
    known = truth >= 0
    both = known[:, 1:] & known[:, :-1]
    change = (truth[:, 1:] != truth[:, :-1]) & both
    found = (maps[:, 1:] != maps[:, :-1]) & both
    union = (change | found).sum()
    bc = float((change & found).sum() / union) if union else float("nan")
    sc = _mean_iou(maps[:, 1:][change], truth[:, 1:][change], classes)
    return ChangeScores(_mean_iou(maps[known], truth[known], classes), bc, sc, (bc + sc) / 2)


def _mean_iou(maps: Tensor, truth: Tensor, classes: int) -> float:
    """Average intersection over union over the classes that occur in the truth, pixels [m] each."""
    table = torch.bincount(truth * classes + maps, minlength=classes**2).view(classes, classes).double()
    hits, occurs = table.diagonal(), table.sum(1) > 0
    union = table.sum(0) + table.sum(1) - hits
    return float((hits[occurs] / union[occurs]).mean()) if occurs.any() else float("nan")
