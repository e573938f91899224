"""Sets of clips: the windows of films that are their clips, a set in memory, and frame sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ditkit.core.errors import ConfigError, DataError
from ditkit.data.clips import ClipSet, MemoryClips, Windows, frame_size


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
