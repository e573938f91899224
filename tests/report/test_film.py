import io
import math
import re
import sys
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ditkit.core.errors import ConfigError, DataError, ShapeError
from ditkit.report.film import BETWEEN_PX, side_by_side, write_gif, write_mp4
from ditkit.report.leadtime import LINE_PX, LeadTimePlot, spread
from ditkit.report.legend import GIVEN_RGB, OUTLINE_PX, coloured
from ditkit.report.sheet import GAP, LABEL_WIDTH, LINE, MARGIN
from ditkit.report.strips import chosen, fitting, strip
from ditkit.report.theme import LIGHT, STYLE


def stepping(frames: int, height: int = 16, width: int = 24, channels: int = 3) -> Tensor:
    """A bright square that moves on by one pixel a frame over a ramp: [C, T, H, W]."""
    clip = torch.linspace(-1, 0, width).expand(channels, frames, height, width).clone()
    for t in range(frames):
        clip[:, t, 4:10, t : t + 6] = 1
    return clip


def decoded(path: Path) -> tuple[dict[str, object], Tensor]:
    """Facts about the video of a file, and its frames uint8 [T, 3, H, W]."""
    av = pytest.importorskip("av")
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        frames = [f.to_ndarray(format="rgb24", src_colorspace="ITU709") for f in file.decode(stream)]
        facts = {
            "pixels": stream.codec_context.pix_fmt,
            "rate": stream.average_rate,
            "matrix": stream.codec_context.colorspace,
        }
    return facts, torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def test_a_film_holds_every_clip_in_its_place_enlarged():
    clips = torch.stack([stepping(3), -stepping(3), 0 * stepping(3)])
    film = side_by_side(clips, columns=2)
    scale = 256 // 24
    height, width = 16 * scale, 24 * scale
    assert film.shape == (3, 3, 2 * height + BETWEEN_PX, 2 * width + BETWEEN_PX)
    second = film[:, :, :height, width + BETWEEN_PX :]
    corners = second[:, :, ::scale, ::scale]
    expected = ((-stepping(3).transpose(0, 1) + 1) * 127.5).round().to(torch.uint8)
    assert torch.equal(corners, expected)
    assert torch.equal(second[:, :, scale - 1 :: scale, scale - 1 :: scale], expected)
    assert (film[:, :, height:, width:] == 255).all()  # the fourth place is empty
    assert side_by_side([stepping(2)]).shape == (2, 3, height, width)


def test_names_stand_above_their_clips_and_leave_them_whole():
    clips = [stepping(2), -stepping(2)]
    film, plain = side_by_side(clips, ["exact", "a very long name " * 9]), side_by_side(clips)
    head = film.shape[2] - plain.shape[2]
    assert torch.equal(film[:, :, head:], plain)
    left, right = (
        film[0, :, :head, : film.shape[3] // 2],
        film[0, :, :head, film.shape[3] // 2 + BETWEEN_PX :],
    )
    assert left.min() < 80 and right.min() < 80
    assert (film[0, :, :head, plain.shape[3] // 2 - BETWEEN_PX // 2 :][..., :BETWEEN_PX] == 255).all()


@pytest.mark.parametrize("size", [(16, 24), (61, 91)])
def test_mp4_comes_back_frame_by_frame(tmp_path, size):
    film = side_by_side([stepping(7, *size)])
    path = write_mp4(tmp_path / "sub" / "clip.mp4", film, fps=29.97)
    facts, frames = decoded(path)
    assert facts == {"pixels": "yuv420p", "rate": Fraction(2997, 100), "matrix": 1}
    assert frames.shape == (7, 3, film.shape[2] + film.shape[2] % 2, film.shape[3] + film.shape[3] % 2)
    error = (frames[:, :, : film.shape[2], : film.shape[3]].float() - film.float()).abs()
    assert error.mean() < 2  # of 255; halved colour resolution blurs edges of odd-sized squares
    # the frame nearest to each one that was read is the one that was written there
    distances = (frames[:, None, :, : film.shape[2], : film.shape[3]].float() - film[None].float()).square()
    assert distances.mean((2, 3, 4)).argmin(1).tolist() == list(range(7))
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")
    assert [p.name for p in path.parent.iterdir()] == ["clip.mp4"]


def test_mp4_keeps_colours(tmp_path):
    colours = torch.tensor([[1, -1, -1], [-1, 1, -1], [-1, -1, 1], [0.5, 0, -0.5]])
    film = side_by_side([colour.view(3, 1, 1, 1).expand(3, 2, 16, 16) for colour in colours])
    _, frames = decoded(write_mp4(tmp_path / "c.mp4", film, 8))
    centres = [128 + i * (256 + BETWEEN_PX) for i in range(4)]
    found = torch.stack([frames[0, :, 128, x] for x in centres]).float()
    assert (found - (colours + 1) * 127.5).abs().max() < 4


def test_without_pyav_mp4_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ConfigError, match=r"needs PyAV; expected: pip install 'ditkit\[video\]'"):
        write_mp4(tmp_path / "a.mp4", side_by_side([stepping(2)]), 8)
    assert list(tmp_path.iterdir()) == []


def test_gif_of_few_colours_is_exact_loops_and_lasts_as_long_as_it_should(tmp_path):
    film = side_by_side([stepping(9)])
    path = write_gif(tmp_path / "clip.gif", film, fps=30)
    gif = Image.open(path)
    assert (gif.format, gif.n_frames, gif.info["loop"]) == ("GIF", 9, 0)
    durations = []
    for t in range(9):
        gif.seek(t)
        durations.append(gif.info["duration"])
        assert torch.equal(torch.from_numpy(np.array(gif.convert("RGB"))).permute(2, 0, 1), film[t])
    assert set(durations) == {30, 40} and sum(durations) == 300


def test_films_that_cannot_be_written_are_refused_and_an_earlier_file_stays(tmp_path):
    film = side_by_side([stepping(2)])
    for write in (write_mp4, write_gif):
        for fps in (0, -1, math.nan, math.inf):
            with pytest.raises(ConfigError, match=f"fps={fps}"):
                write(tmp_path / "a", film, fps)
        with pytest.raises(ShapeError, match=r"a film is uint8 \[T, 1 or 3, H, W\], got float32"):
            write(tmp_path / "a", film.float(), 8)
        (tmp_path / "folder").mkdir(exist_ok=True)
        with pytest.raises(ConfigError, match=r"cannot write .*folder: it is a folder"):
            write(tmp_path / "folder", film, 8)
    with pytest.raises(ConfigError, match="fps=60: a GIF shows at most 50"):
        write_gif(tmp_path / "a", film, 60)
    with pytest.raises(ShapeError, match="clips of one shape, got 2 of"):
        side_by_side([stepping(2), stepping(3)])
    with pytest.raises(ConfigError, match="film of 1 clips needs as many names, got 2"):
        side_by_side([stepping(2)], ["a", "b"])
    with pytest.raises(DataError, match="1 of 2304 values of the clip are not finite"):
        clip = stepping(2)
        clip[0, 0, 0, 0] = math.nan
        side_by_side([clip])


def cells(page: Image.Image, row: int, column: int, cell: tuple[int, int]) -> Tensor:
    """A frame of a strip, uint8 [3, H, W]."""
    x = MARGIN + LABEL_WIDTH + column * (cell[0] + GAP)
    y = MARGIN + LINE + row * (cell[1] + GAP)
    part = page.crop((x, y, x + cell[0], y + cell[1]))
    return torch.from_numpy(np.array(part)).permute(2, 0, 1)


def test_a_strip_shows_frames_and_outlines_what_was_given():
    clip = stepping(4)
    mask = torch.ones(1, 4, 16, 24)
    mask[:, 0] = 0
    mask[:, 1, :, :12] = 0
    page = strip({"real": clip, "made": clip}, masks={"made": mask})
    cell = fitting(16, 24)
    scale = cell[0] // 24
    assert cell == (96, 64)
    expected = ((clip.transpose(0, 1) + 1) * 127.5).round().to(torch.uint8)
    for t in range(4):
        assert torch.equal(cells(page, 0, t, cell)[:, ::scale, ::scale], expected[t])
    amber = torch.tensor(GIVEN_RGB, dtype=torch.uint8).view(3, 1, 1)
    first, second, third = ((cells(page, 1, t, cell) == amber).all(0) for t in range(3))
    inner = torch.zeros(64, 96, dtype=torch.bool)
    inner[OUTLINE_PX:-OUTLINE_PX, OUTLINE_PX:-OUTLINE_PX] = True
    assert torch.equal(first, ~inner)
    half = torch.zeros_like(inner)
    half[:, :48] = True
    hole = torch.zeros_like(inner)
    hole[OUTLINE_PX:-OUTLINE_PX, OUTLINE_PX : 48 - OUTLINE_PX] = True
    assert torch.equal(second, half & ~hole)
    assert not third.any()


def test_error_maps_share_one_scale_that_ends_at_the_largest():
    real = stepping(3)
    near, far = real + 0.1, real.clone()
    far[:, 2] -= 0.4
    page = strip({"real": real, "near": near, "far": far}, errors_to="real")
    cell = fitting(16, 24)
    ramp = coloured(torch.tensor([[[0, 0.25, 1]]]))[0, :, 0]  # [3, 3]
    assert torch.equal(cells(page, 2, 0, cell), ramp[:, 1].view(3, 1, 1).expand(3, 64, 96))
    assert torch.equal(cells(page, 4, 1, cell), ramp[:, 0].view(3, 1, 1).expand(3, 64, 96))
    assert torch.equal(cells(page, 4, 2, cell), ramp[:, 2].view(3, 1, 1).expand(3, 64, 96))
    plain = strip({"a": real, "b": near, "c": near, "d": far, "e": far})
    assert page.height > plain.height  # the scale


def test_a_scale_of_colours_grows_lighter():
    lightness = coloured(torch.linspace(0, 1, 64).view(1, 1, 64))[0, :, 0].float().T @ torch.tensor(
        [0.2, 0.7, 0.1]
    )
    assert (lightness.diff() > 0).all()


def test_a_strip_of_many_frames_is_as_wide_as_one_of_some():
    assert chosen(5, 8) == [0, 1, 2, 3, 4]
    for frames, columns in ((16, 10), (300, 7), (9, 8), (100, 0)):
        found = chosen(frames, columns)
        assert (found[0], found[-1], len(found)) == (0, frames - 1, max(columns, 2))
        steps = {b - a for a, b in pairwise(found)}
        assert max(steps) - min(steps) <= 1 and min(steps) >= 1
    for size in ((64, 64), (28, 28), (120, 160), (480, 640), (16, 16), (21, 180)):
        page = strip({"a": torch.zeros(1, 90, *size)}, notes={"a": ["one", "two", "three"]})
        assert 900 < page.width <= 1600
        width, height = fitting(*size)
        assert 80 <= max(width, height) <= 160 and height / width == pytest.approx(
            size[0] / size[1], rel=0.03
        )


def test_a_strip_shows_some_of_each_stretch_that_was_given():
    evenly = [0, 1, 2, 4, 5, 6, 8, 9, 10, 11, 12, 14, 15]
    assert chosen(16, 13) == chosen(16, 13, range(8)) == chosen(16, 13, {4, 15}) == evenly
    assert chosen(16, 13, {7}) == [0, 1, 2, 4, 5, 7, 8, 9, 10, 11, 12, 14, 15]
    assert chosen(16, 13, {2, 3, 7, 13}) == [0, 1, 2, 4, 5, 7, 8, 9, 10, 11, 13, 14, 15]
    found = chosen(100, 13, range(0, 100, 4))
    assert len(set(found)) == 13 and (found[0], found[-1]) == (0, 99)
    assert sum(t % 4 == 0 for t in found) < 8, "what was made stays to be seen"
    mask = torch.ones(1, 16, 16, 16)
    mask[:, 7] = 0
    clip = torch.zeros(1, 16, 16, 16)
    outline = torch.tensor(GIVEN_RGB)
    page = torch.from_numpy(np.array(strip({"a": clip}, masks={"a": mask})))
    assert (page == outline).all(2).sum() > 2 * 80 * OUTLINE_PX, "more than the legend's"


def test_strips_refuse_what_does_not_belong_together():
    clip = stepping(3)
    with pytest.raises(ShapeError, match="of one shape, got"):
        strip({"a": clip, "b": stepping(4)})
    with pytest.raises(ShapeError, match=r"mask of 'a' \[3, 16, 24\], expected \[1, 3, 16, 24\]"):
        strip({"a": clip}, masks={"a": torch.ones(3, 16, 24)})
    with pytest.raises(ConfigError, match="unknown clip 'reel'; did you mean 'real'"):
        strip({"real": clip, "a": clip}, errors_to="reel")
    with pytest.raises(DataError, match="'b' holds NaN"):
        strip({"a": clip, "b": clip * math.nan})


CURVES = {
    "PredFormer": [math.nan, 0.5, 0.6, 0.7],
    "ConvLSTM": [math.nan, 0.51, 0.62, 0.71],
    "persistence": [math.nan, 0.5, 1, 1.5],
}


def plot(**changes: object) -> LeadTimePlot:
    given = {"lead": [0, 1, 2, 3], "error": "MAE, m/s (lower is better)", "unit": "hours", "title": "Wind"}
    return LeadTimePlot(**{"curves": CURVES, "baselines": ("persistence",), **given, **changes})


def test_the_plot_names_every_curve_its_unit_and_the_horizon():
    svg = plot().svg()
    assert {
        "PredFormer",
        "ConvLSTM",
        "persistence",
        "lead time, hours",
        "MAE, m/s (lower is better)",
        "Wind",
    } <= set(re.findall(r"<text[^>]*>([^<]*)</text>", svg))
    picture = Image.open(io.BytesIO(plot().png()))
    assert (picture.format, picture.size) == ("PNG", (1280, 760))
    assert plot().png() == plot().png() and svg == plot().svg()


def test_baselines_have_dashes_of_their_own_beside_their_names():
    curves = {"model": [1.0, 2, 3], "persistence": [3.0, 2, 1], "climatology": [2.0, 2, 2]}
    svg = plot(curves=curves, lead=[1, 2, 3], baselines=("persistence", "climatology")).svg()
    dashes = re.findall(r"stroke-dasharray: ([\d., ]+); stroke-dashoffset[^\"]*stroke: var\(--control\)", svg)
    assert len(set(dashes)) == 2
    assert [dashes.count(of) for of in set(dashes)] == [2, 2]  # the curve, and the sample before its name


def test_marks_of_large_numbers_differ():
    svg = plot(curves={"a": [100_000.1, 100_000.3, 100_000.8, 100_000.9]}, baselines=()).svg()
    assert {"100000", "100000.2", "100000.8"} <= set(re.findall(r"<text[^>]*>([^<]*)</text>", svg))


def test_the_plot_takes_its_colours_and_font_from_the_page():
    svg = plot().svg()
    assert svg.startswith("<svg") and not re.search(r"#[0-9a-f]{6}\b|<style|font-family|<metadata", svg)
    used = set(re.findall(r"var\(--(\w+)\)", svg))
    assert {"ink", "pale", "panel", "edge", "control", "c0", "c1"} == used <= set(LIGHT)
    for name in used:
        assert STYLE.count(f"--{name}: #") == 2  # by day and by night


def test_nothing_is_drawn_outside_the_plot():
    """The outermost four pixels stay empty, with one long name or thirty."""
    for names in (["a name that goes on " * 5], [f"method {i}" for i in range(30)]):
        png = plot(curves={name: [1.0, 2, 3, 3] for name in names}, baselines=()).png()
        pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(png)).convert("RGB")))
        inner = pixels[4:-4, 4:-4]
        panel = torch.tensor([int(LIGHT["panel"][i : i + 2], 16) for i in (1, 3, 5)], dtype=torch.uint8)
        assert (pixels == panel).all(-1).sum() - (inner == panel).all(-1).sum() == (
            pixels[..., 0].numel() - inner[..., 0].numel()
        )


def test_labels_are_spread_as_little_as_possible():
    assert spread([10, 100, 50], LINE_PX, 200) == [10, 100, 50]
    assert spread([50, 50], 10, 200) == [45, 55]
    assert spread([50, 40, 45, 100], 10, 200) == [55, 35, 45, 100]
    assert spread([0, 0, 0], 10, 200) == [0, 10, 20]
    assert spread([200, 200, 185], 10, 200) == [190, 200, 180]
    crowded = spread([3.0 * i for i in range(13)], 16, 200)
    assert all(b - a >= 16 - 1e-9 for a, b in pairwise(crowded)) and crowded[0] >= 0 and crowded[-1] <= 200


def test_plots_refuse_curves_that_do_not_fit():
    with pytest.raises(ShapeError, match="'a' has 3 errors, expected 4"):
        plot(curves={"a": [1, 2, 3]}, baselines=())
    with pytest.raises(DataError, match="rise, got 1 after 2"):
        plot(lead=[0, 2, 1, 3])
    with pytest.raises(DataError, match="'a' should hold a finite error, and none that is infinite"):
        plot(curves={"a": [1, 2, math.inf, 3]}, baselines=())
    with pytest.raises(ConfigError, match="unknown baseline 'persistense'; did you mean 'persistence'"):
        plot(baselines=("persistense",))
    with pytest.raises(ShapeError, match="a plot needs curves, got 0 over 4"):
        plot(curves={}, baselines=())
