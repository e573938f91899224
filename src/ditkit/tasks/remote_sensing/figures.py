"""Pictures of satellite series: a strip of dates, as it was given, as it is, as it was filled, and the error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ditkit.core.checkpoint import replacing
from ditkit.core.model import Model
from ditkit.data.satellite import SatelliteSet, Scenes
from ditkit.models.units import UniTS
from ditkit.report.legend import BOX_PX, HEIGHT_PX, below_each_other, difference, with_legend
from ditkit.report.sheet import LABEL_WIDTH, LINE, MARGIN, PALE, PAPER, font, png, sheet
from ditkit.report.strips import at_size, chosen, columns, fitting
from ditkit.sample import sample
from ditkit.tasks.remote_sensing.jobs import given, hidden_of

if TYPE_CHECKING:
    from PIL import Image

RED_GREEN_BLUE = ("red", "green", "blue")
NUMBERED = ("B4", "B3", "B2")
"""Bands of a picture in true colours, by what they are called; of others, the third, second and first."""
CUT = (0.01, 0.995)
"""Quantiles of what is clear that are black and white."""
SHEET_STEPS = 10
CLASS_COLOURS = {10: "tab10", 20: "tab20"}
"""Colour maps of classes, by the most of them."""


class Stretch(NamedTuple):
    """Bands that are shown as red, green and blue, and the value of each that is black and white, [3, 1, 1, 1]."""

    bands: tuple[int, ...]
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, images: Tensor, clear: Tensor, bands: Sequence[str] = ()) -> Stretch:
        """Fit to the clear pixels of series [C, T, H, W] in [-1, 1]; to all, if fewer than two are clear."""
        shown = shown_bands(bands, len(images))
        values = images[list(shown)]
        some = values[:, clear[0]] if int(clear.sum()) > 1 else values.flatten(1)
        ends = torch.tensor(CUT, dtype=some.dtype)
        low, high = some.quantile(ends, dim=1)[..., None, None, None]
        return cls(shown, low, torch.maximum(high, low + 1e-3))

    def __call__(self, images: Tensor) -> Tensor:
        """Show series [C, T, H, W] as uint8 [T, 3, H, W]."""
        shares = (images[list(self.bands)] - self.low) / (self.high - self.low)
        return (shares.clamp(0, 1) * 255).round().to(torch.uint8).transpose(0, 1)


def shown_bands(bands: Sequence[str], count: int) -> tuple[int, ...]:
    """Choose the bands that are shown as red, green and blue."""
    for names in (RED_GREEN_BLUE, NUMBERED):
        if all(name in bands for name in names):
            return tuple(list(bands).index(name) for name in names)
    return (2, 1, 0) if count >= 3 else (0, 0, 0)


def composite(series: Tensor, bands: Sequence[str] = ()) -> Tensor:
    """Show one series [C, T, H, W] by its own range, uint8 [T, 3, H, W]."""
    return Stretch.of(series, torch.ones_like(series[:1], dtype=torch.bool), bands)(series)


def series_strip(
    *,
    observed: Tensor,
    filled: Tensor,
    hidden: Tensor,
    dates: Sequence[str],
    truth: Tensor | None = None,
    known: Tensor | None = None,
    bands: Sequence[str] = (),
    titles: Mapping[str, Sequence[str]] | None = None,
) -> Image.Image:
    """Draw a row each for what was given, the truth, what was filled and the error, under dates and their cloud.

    Args:
        observed, filled, truth: [C, T, H, W] in [-1, 1]; without truth there is no error.
        hidden: [1, T, H, W] bool, of the shares in the heads.
        known: [1, T, H, W] bool, where the truth is known; there is no error elsewhere.
        titles: lines of text under "given", "truth" and "filled".
    """
    titles = titles or {}
    clear = torch.ones_like(hidden) if known is None else known
    stretch = Stretch.of(filled if truth is None else truth, clear, bands)
    cell = fitting(*observed.shape[-2:])
    shown = chosen(observed.shape[1], columns(cell[0]))
    rows: dict[str, Tensor] = {}
    captions: dict[str, Sequence[str]] = {}
    for name, series in (("given", observed), ("truth", truth), ("filled", filled)):
        if series is not None:
            rows[name] = at_size(stretch(series[:, shown]), cell)
            captions[name] = [name, *titles.get(name, ())]
    heads = [f"{dates[t]}\n{float(hidden[0, t].float().mean()):.0%} hidden" for t in shown]
    if truth is None:
        return sheet(rows, captions, heads, cell)
    error = ((filled - truth).abs().mean(0) / 2 * clear[0])[shown]
    scale = difference(float(error.max()), "reflectance, mean of bands")
    rows["error"] = at_size(scale.paint(error), cell)
    captions["error"] = ["error", *titles.get("error", ("|filled - truth|",))]
    return with_legend(sheet(rows, captions, heads, cell), False, [scale])


def class_strip(
    *,
    images: Tensor,
    maps: Tensor,
    dates: Sequence[str],
    classes: Sequence[str],
    truth: Tensor | None = None,
    bands: Sequence[str] = (),
    titles: Mapping[str, Sequence[str]] | None = None,
) -> Image.Image:
    """Draw a row each for the images [C, T, H, W], the true classes and the predicted ones [T, H, W], under dates."""
    titles = titles or {}
    cell = fitting(*images.shape[-2:])
    shown = chosen(images.shape[1], columns(cell[0]))
    rows = {"images": at_size(composite(images, bands)[shown], cell)}
    captions: dict[str, Sequence[str]] = {"images": ["images", *titles.get("images", ())]}
    for name, found in (("truth", truth), ("classes", maps)):
        if found is not None:
            rows[name] = at_size(class_colours(found[shown], len(classes)), cell)
            captions[name] = [name, *titles.get(name, ())]
    return _with_classes(sheet(rows, captions, [str(dates[t]) for t in shown], cell), classes)


def class_colours(maps: Tensor, classes: int) -> Tensor:
    """Colour class maps [T, H, W] as uint8 [T, 3, H, W]; unknown, -1, is white."""
    from matplotlib import colormaps

    colours = next((name for most, name in CLASS_COLOURS.items() if classes <= most), "tab20")
    table = torch.from_numpy(colormaps[colours](range(classes), bytes=True)[:, :3].copy())
    table = torch.cat([table, torch.full((1, 3), 255, dtype=torch.uint8)])
    return table[maps].permute(0, 3, 1, 2)


def _with_classes(page: Image.Image, classes: Sequence[str]) -> Image.Image:
    """Add a legend of the classes' colours below a page."""
    from PIL import Image, ImageDraw

    line = Image.new("RGB", (page.width, LINE + HEIGHT_PX), PAPER)
    draw, x = ImageDraw.Draw(line), MARGIN + LABEL_WIDTH
    colours = class_colours(torch.arange(len(classes))[:, None, None], len(classes))[:, :, 0, 0].tolist()
    for name, colour in zip(classes, colours, strict=True):
        draw.rectangle((x, 0, x + BOX_PX, HEIGHT_PX), tuple(colour))
        draw.text((x + BOX_PX + 6, -1), name, PALE, font(12))
        x += BOX_PX + 24 + round(font(12).getlength(name))
    return below_each_other([page, line])


def plain_strip(series: Mapping[str, Tensor]) -> Image.Image:
    """Draw series [C, T, H, W], a row each, all of the range of the first."""
    first = next(iter(series.values()))
    stretch, cell = (
        Stretch.of(first, torch.ones_like(first[:1], dtype=torch.bool)),
        fitting(*first.shape[-2:]),
    )
    shown = chosen(first.shape[1], columns(cell[0]))
    rows = {name: at_size(stretch(one[:, shown]), cell) for name, one in series.items()}
    return sheet(rows, {name: [name] for name in rows}, [f"date {t}" for t in shown], cell)


@torch.no_grad()
def write_sheet(folder: Path, data: SatelliteSet, model: Model, step: int) -> None:
    """Write the first window as the model makes it, as `folder`/STEP.png."""
    assert isinstance(model, UniTS)
    scenes = data.scenes(torch.tensor([0]))
    drawn = sample(model, given(model.config, scenes), [0], steps=SHEET_STEPS, policies=model.policies)
    page = page_of(model, data, scenes, drawn.samples, 0)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / f"{step:06d}.png") as draft:
        draft.write_bytes(png(page))


def page_of(
    model: UniTS,
    data: SatelliteSet,
    scenes: Scenes,
    predicted: Tensor,
    i: int,
    titles: Mapping[str, Sequence[str]] | None = None,
) -> Image.Image:
    """Draw number `i` of windows, and what a model predicted of them [n, C, T, H, W]."""
    config, dates = model.config, [str(day) for day in scenes.dates[i]]
    about = {"given": [data.name], **(titles or {})}
    if config.job == "change-detection":
        labels = scenes.labels
        return class_strip(
            images=scenes.image[i],
            maps=predicted[i].cpu().argmax(0),
            dates=dates,
            classes=config.land_cover,
            truth=None if labels is None else labels[i],
            bands=data.bands,
            titles=titles,
        )
    streams = given(config, scenes).streams
    optical = torch.where(streams["clouds"][i] > 0.5, 1.0, streams["optical"][i])
    return series_strip(
        observed=optical,
        filled=predicted[i].cpu().clamp(-1, 1),
        hidden=hidden_of(config, scenes)[i],
        dates=dates,
        truth=torch.where(scenes.known[i], scenes.image[i], 1.0),
        known=scenes.known[i],
        bands=data.bands,
        titles=about,
    )
