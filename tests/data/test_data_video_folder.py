"""A user's folder of videos: frames, sizes and rates as they should be, and files that are damaged."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ditkit.core.errors import ConfigError, DataError
from ditkit.data import video_folder
from ditkit.data.clips import ClipSet, MemoryClips
from ditkit.data.video_decode import Film, cover, nearest_in_time

av = pytest.importorskip("av", reason="pip install 'av>=18'")
Disposition = pytest.importorskip("av.stream").Disposition
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
PIXELS = {"ffv1": "bgr0", "png": "rgb24", "mpeg4": "yuv420p", "mjpeg": "yuvj420p", "libx264": "yuv420p"}


def solid(value: int, size: tuple[int, int] = (12, 16)) -> np.ndarray:
    return np.full((*size, 3), value, np.uint8)


def write(
    path: Path, pictures: Sequence[np.ndarray], fps: float = 10, times_ms: Sequence[int] | None = None,
    codec: str = "ffv1", rotation: int = 0, aspect: int = 1,
) -> Path:  # fmt: skip
    """A video, without loss unless told otherwise, of frames at `times_ms` or at the constant rate."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = PIXELS[codec]
        stream.codec_context.sample_aspect_ratio = Fraction(aspect)
        if rotation:
            stream.set_display_rotation(rotation)
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture)
            frame.time_base = Fraction(1, 1000) if times_ms else 1 / stream.codec_context.rate
            frame.pts = times_ms[number] if times_ms else number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def counting(count: int) -> list[np.ndarray]:
    return [solid(10 * i) for i in range(count)]


def shown(found: MemoryClips, index: Sequence[int]) -> list[list[int]]:
    """The number that `counting` painted on each frame of the clips."""
    clips = found.clips(torch.tensor(index))
    assert (clips.amax((1, 3, 4)) == clips.amin((1, 3, 4))).all()
    return ((clips[:, 0, :, 0, 0] + 1) * 12.75).round().int().tolist()


def test_a_folder_of_videos(tmp_path):
    write(tmp_path / "b.mkv", counting(5))
    write(tmp_path / "a/deep.mov", counting(4), codec="png")
    write(tmp_path / ".hidden/c.mkv", counting(9))
    (tmp_path / "notes.txt").write_text("not a video")
    found = video_folder.load(tmp_path, size=(6, 8), frames=3)
    assert isinstance(found, ClipSet)
    assert (found.name, found.channels, found.size, found.fps) == (tmp_path.name, 3, (6, 8), 10)
    assert [found.id(i) for i in range(5)] == [
        "a/deep.mov@0",
        "a/deep.mov@1",
        "b.mkv@0",
        "b.mkv@1",
        "b.mkv@2",
    ]
    assert shown(found, [4, 0]) == [[2, 3, 4], [0, 1, 2]]
    strided = video_folder.load(tmp_path, size=4, frames=2, stride=3, step=2)
    assert shown(strided, range(len(strided))) == [[0, 3], [0, 3]]
    assert strided.fps == pytest.approx(10 / 3)


def test_the_centre_is_cut_out(tmp_path):
    """Thirds of red, green and blue: a square keeps the green; a tall cut of a tall picture keeps all."""
    thirds = np.zeros((12, 36, 3), np.uint8)
    thirds[:, :12], thirds[:, 12:24], thirds[:, 24:] = RED, GREEN, BLUE
    assert (cover(thirds, (12, 12)) == GREEN).all()
    tall = cover(thirds.transpose(1, 0, 2), (18, 6))
    assert [tall[i, 3].tolist() for i in (2, 9, 15)] == [list(RED), list(GREEN), list(BLUE)]
    write(tmp_path / "a.mkv", [thirds] * 2)
    clip = video_folder.load(tmp_path, size=12, frames=2).clips(torch.tensor([0]))
    assert clip[0, :, 1, 5, 5].tolist() == [-1, 1, -1]


@pytest.mark.parametrize("picture", [(288, 352), (576, 704), (480, 720), (1080, 1440)])
@pytest.mark.parametrize("aspect", [12 / 11, 10 / 11, 404 / 405, 4 / 3, 64 / 45])
def test_pixels_of_common_aspects_are_cut_to_any_size(picture, aspect):
    for size in ((60, 80), (36, 64), (16, 16)):
        assert cover(np.full((*picture, 3), 7, np.uint8), size, aspect).shape == (*size, 3)


def test_a_turned_video_is_upright(tmp_path):
    """A player turns this file by 90 degrees counterclockwise: its right side is then the top."""
    sides = np.zeros((16, 32, 3), np.uint8)
    sides[:, 16:] = 255
    write(tmp_path / "a.mov", [sides] * 2, codec="png", rotation=90)
    clip = video_folder.load(tmp_path, size=(32, 16), frames=1).clips(torch.tensor([0]))
    assert clip[0, 0, 0, 4, 8] == 1
    assert clip[0, 0, 0, 28, 8] == -1


@pytest.mark.parametrize("codec", ["libx264", "png"])
@pytest.mark.parametrize(
    ("rotation", "size", "ends"),
    [
        (0, (24, 64), (2, 233)),  # twice as wide as stored: 48 x 128, nothing is cut
        (0, (24, 24), (2, 233)),
        (0, (12, 64), (60, 175)),
        (90, (64, 24), (2, 233)),  # turned as shown, 128 x 48
        (90, (64, 12), (60, 175)),
        (180, (24, 64), (233, 2)),
    ],
)
def test_pixels_twice_as_wide_as_high_are_shown_so(codec, rotation, size, ends, tmp_path):
    """48 rows of 64 pixels, brighter by 5 from row to row."""
    ramp = np.broadcast_to(5 * np.arange(48, dtype=np.uint8)[:, None, None], (48, 64, 3))
    write(tmp_path / "a.mov", [np.ascontiguousarray(ramp)] * 2, codec=codec, rotation=rotation, aspect=2)
    frame = video_folder.load(tmp_path, size=size, frames=1).clips(torch.tensor([0]))[0, 0, 0]
    lines = (frame.mean(0 if rotation == 90 else 1) + 1) * 127.5
    assert lines[[0, -1]].tolist() == pytest.approx(ends, abs=4)


def test_a_wide_pixel_is_cut_to_half_the_columns_of_a_square(tmp_path):
    """Columns brighter by 4 each: of 64 the middle 24 make a square of 48 rows."""
    ramp = np.broadcast_to(4 * np.arange(64, dtype=np.uint8)[:, None], (48, 64, 3))
    write(tmp_path / "a.mov", [np.ascontiguousarray(ramp)] * 2, codec="png", aspect=2)
    square = video_folder.load(tmp_path, size=48, frames=1).clips(torch.tensor([0]))[0, 0, 0]
    columns = (square.mean(0) + 1) * 127.5
    assert columns[[0, -1]].tolist() == pytest.approx((80, 172), abs=2)


def test_a_constant_rate_in_whole_milliseconds_is_constant(tmp_path):
    write(tmp_path / "a.mkv", counting(20), times_ms=[round(i * 1000 / 30) for i in range(20)], fps=30)
    assert video_folder.load(tmp_path, size=4, frames=2).fps == 30


def test_a_variable_rate_is_refused_unless_resampled(tmp_path):
    """Frames at 0, 100, 200, 500 and 600 ms; at 10 a second 300 ms is nearest to 200, 400 to 500."""
    path = write(tmp_path / "a.mkv", counting(5), times_ms=[0, 100, 200, 500, 600])
    with pytest.raises(
        DataError,
        match=rf"{path}: variable frame rate: frame 3 is at 0\.5000 s, expected 0\.3000 s for 10 frames.*give fps=",
    ):
        video_folder.load(tmp_path, size=4, frames=2)
    found = video_folder.load(tmp_path, size=4, frames=7, fps=10)
    assert shown(found, [0]) == [[0, 1, 2, 2, 3, 3, 4]]
    assert shown(video_folder.load(tmp_path, size=4, frames=3, fps=4), [0]) == [[0, 2, 3]]


@pytest.mark.parametrize(
    ("times_ms", "message"),
    [
        ([0, 100, 200, 300, 450, 500, 600], "frame 4 is at 0.4500 s, expected 0.4000 s for 10 frames"),
        ([0, 40, 80, 120, 130, 160], "frame 4 is at 0.1300 s, expected 0.1600 s for 25 frames"),
        ([0, 20, 40, 60, 160, 180, 1180, 1200], "frame 6 is at 1.1800 s, expected 0.2000 s for 50 frames"),
        ([0, 50, 100, 150, 250, 350, 450], "frame 4 is at 0.2500 s, expected 0.2000 s for 20 frames"),
        ([0, 300, 400], "frame 1 is at 0.3000 s, expected 0.1000 s for 10 frames"),
    ],
)
def test_the_frame_that_is_off_is_named(times_ms, message):
    """One that comes late or early, the longest of two gaps, and where a second rate begins."""
    film = Film(Path("a.mkv"), np.zeros((0, 1, 1, 3), np.uint8), np.array(times_ms) / 1000, 0.001, 10)
    with pytest.raises(DataError) as caught:
        film.rate()
    assert message in str(caught.value) and "\n" not in str(caught.value)


@given(
    gaps=st.lists(st.integers(1, 50), max_size=12), fps=st.sampled_from([1.0, 3.0, 7.5, 25.0, 60.0])
)  # fmt: skip
def test_resampling_takes_the_nearest(gaps, fps):
    times = np.cumsum([0, *gaps]) / 100
    found = list(nearest_in_time(enumerate(times.tolist()), fps))
    assert [second for _, second in found] == [k / fps for k in range(int(times[-1] * fps + 1e-4) + 1)]
    for frame, second in found:
        assert abs(times[frame] - second) <= np.abs(times - second).min() + 1e-9


def damaged_folder(root: Path) -> None:
    write(root / "good.mkv", counting(4))
    whole = write(root / "cut.mkv", [solid(9, (64, 64))] * 40).read_bytes()
    (root / "cut.mkv").write_bytes(whole[: len(whole) // 2])
    (root / "text.mp4").write_text("this is no video")
    (root / "void.avi").write_bytes(b"")


def test_damaged_videos_are_named_and_skipped(tmp_path, caplog):
    damaged_folder(tmp_path)
    noise = [np.random.default_rng(i).integers(0, 255, (64, 64, 3), np.uint8) for i in range(10)]
    flipped = bytearray(write(tmp_path / "flipped.mp4", noise, codec="mpeg4").read_bytes())
    middle = len(flipped) // 2
    flipped[middle : middle + 400] = bytes(byte ^ 0x5A for byte in flipped[middle : middle + 400])
    (tmp_path / "flipped.mp4").write_bytes(flipped)
    with caplog.at_level(logging.WARNING):
        found = video_folder.load(tmp_path, size=4, frames=2)
    assert found.film_ids == ("good.mkv",)
    for name in ("cut.mkv", "text.mp4", "void.avi", "flipped.mp4"):
        assert f"skipped damaged video {tmp_path / name}: " in caplog.text
    assert "of the 4.00 s that its header declares" in caplog.text


def test_too_many_damaged_videos_stop(tmp_path):
    damaged_folder(tmp_path)
    with pytest.raises(
        DataError, match=r"3 damaged or short videos, more than max_bad=2: cut\.mkv, text\.mp4, void\.avi"
    ):
        video_folder.load(tmp_path, size=4, frames=2, max_bad=2)
    (tmp_path / "good.mkv").unlink()
    with pytest.raises(DataError, match=r"every video is damaged or short: cut\.mkv, text\.mp4, void\.avi"):
        video_folder.load(tmp_path, size=4, frames=2)


def test_a_video_shorter_than_a_clip(tmp_path):
    write(tmp_path / "a.mkv", counting(5))
    with pytest.raises(DataError, match=r"5 frames at 10 a second, fewer than the 7 of a clip of frames=4"):
        video_folder.load(tmp_path, size=4, frames=4, stride=2)


def test_found_18_a_short_clip_is_skipped_like_a_damaged_one(tmp_path, caplog):
    for name, length in (("a", 7), ("b", 5), ("c", 9)):
        write(tmp_path / f"{name}.mkv", counting(length))
    with caplog.at_level(logging.WARNING):
        found = video_folder.load(tmp_path, size=4, frames=4, stride=2, max_bad=1)
    assert found.film_ids == ("a.mkv", "c.mkv")
    assert f"skipped short video {tmp_path / 'b.mkv'}: 5 frames at 10 a second" in caplog.text
    with pytest.raises(DataError, match=r"1 damaged or short videos, more than max_bad=0: b\.mkv"):
        video_folder.load(tmp_path, size=4, frames=4, stride=2, max_bad=0)


def atoms(data: bytes) -> list[bytes]:
    """The boxes of an MP4 file, or of the inside of one."""
    found = []
    while data:
        size = int.from_bytes(data[:4])
        found.append(data[:size])
        data = data[size:]
    return found


def with_artwork_first(data: bytes) -> bytes:
    """The same file with its tags, which hold the artwork, before its tracks."""
    whole = atoms(data)
    place = next(i for i, atom in enumerate(whole) if atom[4:8] == b"moov")
    inside = sorted(
        atoms(whole[place][8:]),
        key=lambda atom: [b"mvhd", b"udta"].index(atom[4:8]) if atom[4:8] != b"trak" else 2,
    )
    whole[place] = whole[place][:8] + b"".join(inside)
    return b"".join(whole)


def test_found_13_the_artwork_of_a_film_is_no_film(tmp_path):
    """The cover is the first stream, and its one picture has no time stamp."""
    film, cover_jpg = write(tmp_path / "film.mp4", counting(6), codec="mpeg4"), tmp_path / "cover.mkv"
    write(cover_jpg, [solid(200)], codec="mjpeg")
    path = tmp_path / "both" / "a.mp4"
    path.parent.mkdir()
    with av.open(path, "w") as container, av.open(film) as moving, av.open(cover_jpg) as still:
        art = container.add_stream_from_template(still.streams.video[0])
        art.disposition = Disposition.attached_pic
        stream = container.add_stream_from_template(moving.streams.video[0])
        for source, target in ((still, art), (moving, stream)):
            for packet in source.demux(video=0):
                if packet.dts is not None:
                    packet.stream = target
                    container.mux(packet)
    path.write_bytes(with_artwork_first(path.read_bytes()))
    with av.open(path) as container:
        assert container.streams.video[0].disposition & Disposition.attached_pic
    found = video_folder.load(path.parent, size=4, frames=6, max_bad=0)
    assert len(found) == 1 and found.clips(torch.tensor([0])).shape[2] == 6


def test_found_30_a_pipe_among_videos_is_skipped(tmp_path, caplog):
    write(tmp_path / "a.mkv", counting(4))
    os.mkfifo(tmp_path / "b.mkv")
    with caplog.at_level(logging.WARNING):
        assert video_folder.load(tmp_path, size=4, frames=4).film_ids == ("a.mkv",)
    assert "b.mkv: not a regular file" in caplog.text


def test_frames_of_differing_sizes(tmp_path):
    """JPEG pictures stand alone, so packets of another size in the same stream are a valid file."""
    small, large = (write(tmp_path / f"{n}.mkv", [solid(0, (n, 16))] * 2, codec="mjpeg") for n in (12, 24))
    both = tmp_path / "both/a.mkv"
    both.parent.mkdir()
    with av.open(both, "w") as container, av.open(small) as one, av.open(large) as two:
        stream = container.add_stream_from_template(one.streams.video[0])
        for number, packet in enumerate([*one.demux(video=0), *two.demux(video=0)]):
            if packet.dts is not None:
                packet.stream, packet.pts, packet.dts = stream, number * 100, number * 100
                container.mux(packet)
    with pytest.raises(
        DataError, match=r"both/a\.mkv: frame 2 is 24 x 16 pixels .*, expected 12 x 16 as frame 0"
    ):
        video_folder.load(both.parent, size=4, frames=2)


def test_differing_rates(tmp_path):
    write(tmp_path / "a.mkv", counting(6), fps=10)
    write(tmp_path / "b.mkv", counting(6), fps=20)
    with pytest.raises(DataError, match=r"b\.mkv: 20 frames a second, but a\.mkv has 10; give fps="):
        video_folder.load(tmp_path, size=4, frames=2)
    found = video_folder.load(tmp_path, size=4, frames=2, fps=10)
    assert (found.fps, [len(film) for film in found.films]) == (10, [6, 3])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"size": None}, ConfigError, "a folder of videos needs a size in pixels, for example size=64"),
        ({"size": (4, 0)}, ConfigError, "size=0 should be at least 1"),
        ({"frames": 0}, ConfigError, "frames=0 should be at least 1"),
        ({"stride": 0}, ConfigError, "stride=0 should be at least 1"),
        ({"max_bad": -1}, ConfigError, "max_bad=-1 should be at least 0"),
        ({"fps": 0}, ConfigError, "fps=0, expected a positive number"),
        ({"fps": float("nan")}, ConfigError, "fps=nan, expected a positive number"),
        ({}, DataError, r"holds no videos \(\.avi .*\.wmv\)"),
    ],
)
def test_video_folder_refuses(options, error, message, tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(error, match=message) as caught:
        video_folder.load(tmp_path, **({"size": 4} | options))
    assert "\n" not in str(caught.value)


def test_memory_is_bounded(tmp_path):
    write(tmp_path / "a.mkv", counting(4))
    write(tmp_path / "b.mkv", counting(4))
    assert len(video_folder.load(tmp_path, size=4, frames=4, max_bytes=8 * 48)) == 2
    with pytest.raises(
        DataError, match=r"b\.mkv: from frame 3 on, .* at 4 x 4 need more memory than max_bytes"
    ):
        video_folder.load(tmp_path, size=4, frames=4, max_bytes=8 * 48 - 1)


def test_without_pyav_the_package_is_named(tmp_path, monkeypatch):
    write(tmp_path / "a.mkv", counting(4))
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(DataError, match="pip install 'av>=18'"):
        video_folder.load(tmp_path, size=4, frames=2)
