"""What a person sees of a forecast: fields with their values, dates and places, series as lines, films of both."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image, ImageDraw
from torch import Tensor

from ditkit.core.errors import DataError, ShapeError
from ditkit.data.calendar import Step, step_of
from ditkit.data.clips import MemoryClips
from ditkit.data.fields import FieldSet
from ditkit.report import film as films
from ditkit.report.example import Example
from ditkit.report.film import BETWEEN_PX, LINE, WIDEST_PX
from ditkit.report.forecast_pictures import NO_UNIT, forecast_film, forecast_strip, series_figure, series_plot
from ditkit.report.legend import GIVEN_RGB, NO_DATA_RGB, OUTLINE_PX, coloured
from ditkit.report.sheet import GAP, HEAD_LINE, LABEL_WIDTH, MARGIN
from ditkit.report.sheet import LINE as HEAD
from ditkit.report.strips import fitting
from ditkit.tasks.forecast.figures import clip_examples, field_examples, page, write_pictures, write_sheet

SEEN, FORECAST = 3, 2
NAMES, UNITS = ("eastward", "northward"), ("m/s", "")


def fields(height: int = 40, width: int = 30, step: str = "h") -> FieldSet:
    """Two variables that grow with time, rows and columns; the second is a hundred times the first."""
    times = (np.datetime64("1999-12-31T22") + np.arange(12) * np.timedelta64(1, step)).astype("M8[us]")
    t, y, x = torch.arange(12.0), torch.arange(height), torch.arange(width)
    first = t.view(-1, 1, 1) + y.view(-1, 1) / 10 + x / 100
    values = torch.stack([first, 100 * first], 1)
    return FieldSet("made", values, times, step_of(times), NAMES, UNITS)


def later(seen: Tensor) -> Tensor:
    """A forecast: the first frames again."""
    return seen[:, :, :FORECAST]


def examples(of: FieldSet) -> list[Example]:
    scaled = of.normalised(of.fit_scaling())
    return list(field_examples(scaled, 1, SEEN, FORECAST, later))


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """All that is written on pages, in order."""
    texts: list[str] = []
    original = ImageDraw.ImageDraw.text

    def text(self: ImageDraw.ImageDraw, xy: object, text: str, *args: object, **options: object) -> None:
        texts.append(text)
        original(self, xy, text, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return texts


def test_an_example_is_in_the_unit_of_its_variable_and_has_the_times_of_its_frames() -> None:
    of = fields()
    for i, (name, unit, example) in enumerate(zip(NAMES, UNITS, examples(of), strict=True)):
        assert (example.variable, example.unit) == (name, unit)
        torch.testing.assert_close(example.observed[0].float(), of.values[1:4, i])
        torch.testing.assert_close(example.followed[0].float(), of.values[4:6, i])
        torch.testing.assert_close(example.forecast[0].float(), of.values[1:3, i])
        assert example.times is not None and (example.times == of.times[1:6]).all()
    ahead = replace(of, lead_in=5)  # the first target is the first frame after the border
    example = next(field_examples(ahead, 1, SEEN, FORECAST, later))
    assert example.times is not None and (example.times == of.times[3:8]).all()
    assert torch.equal(example.followed[0].float(), of.values[6:8, 0])


def test_heads_say_how_far_ahead_and_when() -> None:
    hourly = examples(fields())[0].heads()
    assert hourly[0] == "-2 hours\n1999-12-31\n23:00" and hourly[2] == "0 hours\n2000-01-01\n01:00"
    assert hourly[3:] == ["+1 hour\n2000-01-01\n02:00", "+2 hours\n2000-01-01\n03:00"]
    daily = examples(fields(step="D"))[0].heads()
    assert daily[1:4] == ["-1 day\n2000-01-02", "0 days\n2000-01-03", "+1 day\n2000-01-04"]
    months = np.arange("1999-11", "2000-11", dtype="M8[M]").astype("M8[us]")
    monthly = examples(replace(fields(), times=months, step=step_of(months)))[0].heads()
    assert monthly[-1] == "+2 months\n2000-04"
    of = replace(examples(fields())[0], times=None)
    assert replace(of, step=Step(3, "hour")).heads() == [
        "-6 hours",
        "-3 hours",
        "0 hours",
        "+3 hours",
        "+6 hours",
    ]
    assert replace(of, step=None).heads() == ["-2 frames", "-1 frame", "0 frames", "+1 frame", "+2 frames"]


def cell(strip: Image.Image, row: int, column: int, size: tuple[int, int], heads: int) -> Tensor:
    """A frame of a strip, uint8 [3, H, W]; row 0 is what was observed. `heads`: lines over a column."""
    over = MARGIN + HEAD + (heads - 1) * HEAD_LINE
    y = over if row == 0 else over + (size[1] + GAP) + MARGIN + over + (row - 1) * (size[1] + GAP)
    x = MARGIN + LABEL_WIDTH + column * (size[0] + GAP)
    part = strip.crop((x, y, x + size[0], y + size[1]))
    return torch.from_numpy(np.array(part)).permute(2, 0, 1)


def test_fields_have_a_scale_of_values_and_no_difference_where_they_were_observed(written: list[str]) -> None:
    example = examples(fields())[0]
    strip = forecast_strip(example)
    low, high = example.span
    assert (low, high) == pytest.approx((1, 5 + 3.9 + 0.29))
    size = fitting(40, 30)
    scale = size[0] // 30
    viridis = torch.from_numpy(colormaps["viridis"](range(256), bytes=True)[:, :3].copy())
    rows = {0: example.observed, 1: example.followed, 2: example.forecast}
    for row, frames in rows.items():
        for column in range(frames.shape[1]):
            expected = viridis[((frames[0, column] - low) / (high - low) * 255).round().long()]
            found = cell(strip, row, column, size, heads=3)[:, ::scale, ::scale]
            assert torch.equal(found, expected.permute(2, 0, 1))
    # what was said is what was three steps before, everywhere: the largest difference, the lightest colour
    assert torch.equal(
        cell(strip, 3, 0, size, heads=3), coloured(torch.ones(1, 1, 1))[0].expand(-1, *reversed(size))
    )
    rowwise = [text for text in written if text in ("observed", "what followed", "forecast", "|difference|")]
    assert rowwise == ["observed", "what followed", "forecast", "|difference|"]
    assert {"eastward, m/s", "1", "9.19", "|difference|, m/s", "0", "1.5", "3"} <= set(written)
    assert {"-2 hours", "+1 hour", "2000-01-01", "02:00"} <= set(written) and "no data" not in written


@pytest.mark.parametrize(
    ("low", "high", "marks"),
    [(101_300, 101_340, {"101300", "101320", "101340"}), (287.2, 287.7, {"287.2", "287.45", "287.7"})],
)
def test_marks_of_a_narrow_scale_differ(low: float, high: float, marks: set[str], written: list[str]) -> None:
    frames = torch.linspace(low, high, 4 * 64, dtype=torch.float64).view(1, 4, 8, 8)
    forecast_strip(Example(frames[:, :2], frames[:, 2:], frames[:, 2:], variable="level"))
    assert marks <= set(written)


def test_a_dry_window_has_a_scale_for_the_rain_that_was_forecast(written: list[str]) -> None:
    dry = torch.zeros(1, 2, 8, 8)
    forecast_strip(Example(dry, dry, dry + 0.5, variable="rain", unit="mm/h"))
    assert {"0", "0.5", "1"} <= set(written)


def test_large_fields_are_made_smaller_in_films() -> None:
    frames = torch.rand(1, 2, 721, 1440)
    film = forecast_film(Example(frames[:, :1], frames[:, 1:], frames[:, 1:], variable="heat"))
    assert film.shape[3] <= WIDEST_PX and film.shape[2] < 721


def test_padding_is_not_drawn_and_is_in_no_scale() -> None:
    of = fields(37, 30)
    of = replace(of, values=of.values + 50)  # zero, the value of padding, is far off
    whole, padded = examples(of)[0], examples(of.padded(8))[0]
    assert padded.observed.shape[-2:] == (40, 32)
    assert forecast_strip(padded).tobytes() == forecast_strip(whole).tobytes()
    assert torch.equal(forecast_film(padded), forecast_film(whole))


def test_cells_that_hold_no_data_are_grey_and_are_told(written: list[str]) -> None:
    of = fields()
    valid = torch.ones(2, 40, 30, dtype=torch.bool)
    valid[:, 10:20, 5:9] = False
    example = examples(replace(of, values=of.values.where(valid, torch.tensor(0.0)), valid=valid))[0]
    example.forecast[..., 10:20, 5:9] = 1e6
    assert example.span[0] == pytest.approx(1)
    strip = forecast_strip(example)
    size = fitting(40, 30)
    scale = size[0] // 30
    grey = torch.tensor(NO_DATA_RGB, dtype=torch.uint8).view(3, 1, 1)
    for row in range(4):
        found = cell(strip, row, 0, size, heads=3)[:, ::scale, ::scale]
        assert torch.equal((found == grey).all(0), ~valid[0])
    assert "no data" in written and "3" in written  # the scale of errors ends at the largest that counts


def moving(size: tuple[int, int], channels: int = 1) -> MemoryClips:
    """A film of noise, and clips of all its windows."""
    shape = (9, channels, *size)
    film = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return MemoryClips("noise", (film,), ("a",), 12.5, frames=SEEN + FORECAST)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_film_shows_truth_forecast_and_error_side_by_side(
    channels: int, tmp_path: Path, written: list[str]
) -> None:
    clips = moving((16, 24), channels)
    example = next(clip_examples(clips, 2, SEEN, later))
    assert example.fps == 12.5 and not example.is_series
    film = forecast_film(example)
    scale = 256 // 24
    head, tall, wide = 2 * (LINE + 2), 16 * scale, 24 * scale
    tiles = [
        film[:, :, head : head + tall, x : x + wide] for x in (i * (wide + BETWEEN_PX) for i in range(3))
    ]
    truth, said, error = (tile[:, :, scale // 2 :: scale, scale // 2 :: scale] for tile in tiles)
    whole = clips.films[0][2 : 2 + SEEN + FORECAST].expand(-1, 3, -1, -1)
    assert torch.equal(truth, whole) and torch.equal(said[:SEEN], whole[:SEEN])
    assert torch.equal(said[SEEN:], whole[:FORECAST])
    largest = example.errors.max()
    assert torch.equal(error[SEEN:], coloured(example.errors / largest)) and (error[:SEEN] == 255).all()
    amber = (tiles[1] == torch.tensor(GIVEN_RGB, dtype=torch.uint8).view(3, 1, 1)).all(1)
    assert amber[:SEEN, :OUTLINE_PX].all() and not amber[SEEN:].any()
    assert {
        "-1 frame",
        "truth",
        "forecast",
        "|difference|",
        "given",
        "+2 frames",
    } <= set(written)

    names = write_pictures(tmp_path, "noise", example)
    assert (
        sorted(names)
        == sorted(path.name for path in tmp_path.iterdir())
        == ["noise.gif", "noise.mp4", "noise.png"]
    )
    with Image.open(tmp_path / "noise.gif") as gif:
        assert (gif.n_frames, gif.info["duration"], gif.size) == (5, 80, (film.shape[3], film.shape[2]))  # type: ignore[attr-defined]


def test_the_error_is_left_out_of_a_film_where_it_does_not_fit() -> None:
    fits, wider = WIDEST_PX // 3 - BETWEEN_PX, WIDEST_PX // 3 + 1
    widths = [
        forecast_film(next(clip_examples(moving((8, w)), 0, SEEN, later))).shape[3] for w in (fits, wider)
    ]
    assert widths == [3 * fits + 2 * BETWEEN_PX, 2 * wider + BETWEEN_PX]


def test_without_pyav_the_film_is_a_gif(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(films, "find_spec", lambda name: None)
    assert write_pictures(tmp_path, "a", examples(fields())[0]) == ["a.png", "a.gif"]


def test_a_series_is_drawn_as_lines_of_values_over_time(tmp_path: Path) -> None:
    of = fields(1, 1)
    for example, unit in zip(examples(of.padded(4)), ("m/s", NO_UNIT), strict=True):
        assert example.is_series
        figure = series_figure(example)
        (axes,) = figure.axes
        lines = {line.get_label(): line for line in axes.get_lines()}
        values = of.values[:, NAMES.index(example.variable)].flatten()
        for name, ahead, expected in (
            ("observed", [-2, -1, 0], values[1:4]),
            ("what followed", [0, 1, 2], values[3:6]),
            ("forecast", [0, 1, 2], torch.cat([values[3:4], values[1:3]])),
        ):
            assert lines[name].get_xdata().tolist() == ahead
            np.testing.assert_allclose(lines[name].get_ydata(), expected, rtol=1e-5)
        assert [text.get_text() for text in axes.get_legend().get_texts()] == [
            "observed",
            "what followed",
            "forecast",
        ]
        texts = {text.get_text() for text in axes.texts}
        assert texts == {f"Forecast of {example.variable}", unit}
        assert axes.get_xlabel() == "time, a value every hour"
        dates = ["1999-12-31\n23:00", *(f"2000-01-01\n0{hour}:00" for hour in range(4))]
        assert [text.get_text() for text in axes.get_xticklabels()] == dates
        assert axes.get_xticks().tolist() == [-2, -1, 0, 1, 2]
    assert write_pictures(tmp_path, "load", example) == ["load.png"]
    assert [path.name for path in tmp_path.iterdir()] == ["load.png"]
    assert page(example).tobytes() == series_plot(example).tobytes()


def test_a_series_without_times_has_lead_times_on_its_axis() -> None:
    example = replace(examples(fields(1, 1))[0], times=None, step=Step(3, "hour"))
    (axes,) = series_figure(example).axes
    assert axes.get_xlabel() == "lead time, hours"
    assert [*axes.get_lines()[-1].get_xdata()] == [0, 3, 6]


def test_of_many_values_some_dates_are_shown_and_that_of_the_last_observed_is() -> None:
    days = np.arange("2000-01-01", "2000-03-01", dtype="M8[D]").astype("M8[us]")
    values = torch.arange(60.0).view(1, 60, 1, 1)
    parts = values[:, :40], values[:, 40:], values[:, 40:]
    (axes,) = series_figure(Example(*parts, variable="load", step=step_of(days), times=days)).axes
    assert axes.get_xticks().tolist() == [-32, -24, -16, -8, 0, 8, 16]
    shown = [text.get_text() for text in axes.get_xticklabels()]
    assert shown[4] == "2000-02-09" == str(days[39])[:10] and shown[-1] == "2000-02-25"


def test_nothing_of_a_series_is_drawn_outside_the_picture() -> None:
    example = examples(fields(1, 1))[0]
    large = replace(
        example,
        observed=example.observed + 1e6,
        followed=example.followed + 1e6,
        forecast=example.forecast + 1e6,
    )
    pixels = torch.from_numpy(np.array(series_plot(large)))
    panel = pixels[0, 0]
    border = torch.ones(pixels.shape[:2], dtype=torch.bool)
    border[4:-4, 4:-4] = False
    assert (pixels[border] == panel).all()


@pytest.mark.parametrize(("side", "pages"), [(1, [series_plot] * 2), (9, [forecast_strip] * 2)])
def test_sheets_of_training_show_every_variable(side: int, pages: list, tmp_path: Path) -> None:
    of = fields(side, side)
    scaled = of.normalised(of.fit_scaling())
    drawn = [draw(example) for draw, example in zip(pages, examples(of), strict=True)]
    model: Any = torch.nn.Identity()
    model.config = SimpleNamespace(frames=FORECAST)
    write_sheet(tmp_path, partial(field_examples, scaled, 1, SEEN, FORECAST), model, 7)
    with Image.open(tmp_path / "000007.png") as sheet:
        assert sheet.size == (max(p.width for p in drawn), sum(p.height for p in drawn))
        assert sheet.crop((0, 0, *drawn[0].size)).tobytes() == drawn[0].tobytes()


def test_examples_of_other_shapes_or_broken_values_are_refused() -> None:
    clip = torch.zeros(1, 3, 4, 4)
    with pytest.raises(ShapeError, match=r"needs \[C, T, H, W\] and twice \[C, T', H, W\], got"):
        Example(clip, clip[:, :2], clip)
    with pytest.raises(ShapeError, match="4 times for 3 \\+ 3 frames"):
        Example(clip, clip, clip, times=np.arange("2000-01", "2000-05", dtype="M8[M]"))
    with pytest.raises(DataError, match="forecast holds NaN or infinite values"):
        Example(clip, clip, clip * torch.nan)
