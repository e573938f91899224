"""ViZDoom: episodes that a seed fixes, what is seen and done in them, and those that are damaged on disk."""

from __future__ import annotations

import importlib.util
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ditkit.core.errors import ConfigError, DataError
from ditkit.data.clips import ClipSet, MemoryClips
from ditkit.data.sets import vizdoom

pytestmark = pytest.mark.usefixtures("nothing_installed")
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
def test_the_engine_needs_nothing_of_the_current_folder():
    """It makes `_vizdoom` where it starts: where another run had just made it, this process ended by a signal."""
    Path("_vizdoom").touch()
    assert len(vizdoom.load(**TINY)) > 0
    assert Path("_vizdoom").is_file()


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
