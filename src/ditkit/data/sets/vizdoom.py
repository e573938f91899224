"""Episodes of ViZDoom (Kempka et al. 2016): colour, actions, depth and the class of each pixel.

From the PyPI package `vizdoom` (MIT; engine GPL, Freedoom BSD).

An episode is a function of its seed, and is played once: it lies in `$DITKIT_DATA`, or else in
`~/.cache/ditkit`, until the file is deleted.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ditkit.core.checkpoint import dump_state, read_metadata, read_state, replacing
from ditkit.core.config import integer
from ditkit.core.errors import CheckpointError, ConfigError, DataError, unknown
from ditkit.data.clips import MemoryClips, Windows, frame_size
from ditkit.data.pinned import roots
from ditkit.data.progress import tracked

if TYPE_CHECKING:
    from vizdoom import DoomGame, GameState, Label

logger = logging.getLogger(__name__)

REQUIREMENT = "vizdoom==1.3.2"
SCENARIOS = (
    "basic",
    "deadly_corridor",
    "deathmatch",
    "defend_the_center",
    "defend_the_line",
    "health_gathering",
    "health_gathering_supreme",
    "my_way_home",
    "predict_position",
    "rocket_basic",
    "simpler_basic",
    "take_cover",
)
TICS_PER_SECOND = 35
LARGEST = 240, 320  # height and width that the engine is asked to draw, unless half of that is enough
TEST_SEED = 1_000_000  # the first seed of the test split
FORMAT = 1  # of a cached file: its tensors, and the policy that played
MOVES = (2, 9)  # an action is kept for 2 to 8 frames
# What the engine writes into the buffer where there is no object, and then its own categories of objects
SURFACES = ("wall", "floor or ceiling")
UNNAMED = "unknown"


@dataclass(frozen=True)
class Game:
    """Settings that an episode depends on, beside its seed and the version of the engine."""

    scenario: str
    size: tuple[int, int]  # height, width
    frame_skip: int  # tics from one frame to the next
    length: int  # frames, unless the game ends before


def load(
    size: int | Sequence[int] | None = None,
    frames: int = 16,
    scenario: str = "my_way_home",
    episodes: int = 20,
    episode_frames: int = 300,
    frame_skip: int = 4,
    stride: int = 1,
    step: int = 1,
    split: str = "train",
    seed: int = 0,
) -> MemoryClips:
    """Windows of the episodes `seed`, `seed + 1` ..., played at random; the whole view at `size`, 64 x 64 unless given.

    The player keeps a random action for 2 to 8 frames. An episode ends early where the game does; one shorter
    than a window gives no clip. The set has `actions`, `depth` and `labels`; the test split has its own seeds.

    Raises:
        DataError: the package is missing or does not run, or every episode is shorter than a window.
        ConfigError: an unknown scenario or split, a number out of range, or a cache that cannot be written.
    """
    height, width = frame_size(64 if size is None else size)
    integer("height", height, least=1, most=LARGEST[0])
    integer("width", width, least=1, most=LARGEST[1])
    if scenario not in SCENARIOS:
        raise ConfigError(unknown("scenario of vizdoom", scenario, SCENARIOS))
    if split not in ("train", "test"):
        raise ConfigError(unknown("split of vizdoom", split, ("train", "test")))
    integer("frame_skip", frame_skip, least=1)
    integer("episode_frames", episode_frames, least=Windows((), frames, stride, step).span)
    integer("episodes", episodes, least=1, most=TEST_SEED)
    first = integer("seed", seed, least=0, most=TEST_SEED - episodes) + (TEST_SEED if split == "test" else 0)
    game = Game(scenario, (height, width), frame_skip, episode_frames)
    seeds = range(first, first + episodes)
    played = _episodes(game, seeds)
    return MemoryClips(
        name=f"vizdoom-{scenario}",
        films=tuple(episode["rgb"] for episode in played),
        film_ids=tuple(f"{scenario}-{s}" for s in seeds),
        film_fps=TICS_PER_SECOND / frame_skip,
        frames=frames,
        stride=stride,
        step=step,
        tracks={name: tuple(e[name] for e in played) for name in ("actions", "depth", "labels")},
        meanings={"actions": tuple(_actions(scenario)), "labels": _classes()},
    )


def smooth_choices(choices: int, length: int, seed: int) -> NDArray[np.int64]:
    """Draw a random choice for each of `length` frames, kept for 2 to 8 of them."""
    random = np.random.default_rng(seed)
    return np.repeat(random.integers(choices, size=length), random.integers(*MOVES, size=length))[:length]


def _episodes(game: Game, seeds: Sequence[int]) -> list[dict[str, Tensor]]:
    """Each episode from its file; those that have none are played and filed."""
    found = {seed: _read(_file(game, seed)) for seed in seeds}
    missing = [seed for seed in seeds if not found[seed]]
    if missing:
        with _running(game) as doom:
            for seed in tracked(missing, f"playing {game.scenario}"):
                found[seed] = _play(doom, game, seed)
                with replacing(_file(game, seed)) as draft:
                    dump_state(draft, found[seed], {"sha256": _checksum(found[seed])})
    return list(found.values())


def _file(game: Game, seed: int) -> Path:
    """Return the path of an episode; its name holds all that the episode depends on."""
    height, width = game.size
    return (
        Path(os.environ.get("DITKIT_DATA") or roots()[-1])
        / "vizdoom"
        / (
            f"{_engine().__version__}-{FORMAT}-{game.scenario}-{height}x{width}-skip{game.frame_skip}"
            f"-frames{game.length}-seed{seed}.safetensors"
        )
    )


def _read(path: Path) -> dict[str, Tensor]:
    """Read a stored episode; empty where there is none or it is damaged."""
    if not path.exists():
        return {}
    try:
        episode = read_state(path)
        if read_metadata(path).get("sha256") == _checksum(episode):
            return episode
        reason = f"{path} is not what was written"
    except CheckpointError as error:
        reason = str(error)
    logger.warning("playing an episode again: %s", reason)
    return {}


def _checksum(episode: Mapping[str, Tensor]) -> str:
    content = hashlib.sha256()
    for name in sorted(episode):
        content.update(name.encode() + episode[name].numpy().tobytes())
    return content.hexdigest()


def _engine() -> ModuleType:
    try:
        import vizdoom
    except ImportError as error:
        raise DataError(f"the vizdoom set needs its package: run `pip install {REQUIREMENT}`") from error
    return vizdoom


@contextmanager
def _running(game: Game) -> Iterator[DoomGame]:
    """Run the engine without window and sound; its folders and settings are gone afterwards."""
    engine = _engine()
    doom = engine.DoomGame()
    with TemporaryDirectory() as scratch:
        try:
            doom.load_config(_config(game.scenario))
            doom.set_doom_config_path(f"{scratch}/vizdoom.ini")
            doom.set_mode(engine.Mode.PLAYER)
            doom.set_window_visible(False)
            doom.set_screen_format(engine.ScreenFormat.RGB24)
            height, width = game.size
            fits = 2 * height <= LARGEST[0] and 2 * width <= LARGEST[1]
            sizes = engine.ScreenResolution
            doom.set_screen_resolution(sizes.RES_160X120 if fits else sizes.RES_320X240)
            doom.set_depth_buffer_enabled(True)
            doom.set_labels_buffer_enabled(True)
            # It makes a folder where it starts, and takes the process down where that is there or cannot be made
            with chdir(scratch):
                doom.init()
            yield doom
        except (engine.ViZDoomErrorException, engine.ViZDoomUnexpectedExitException) as error:
            raise DataError(f"vizdoom does not play {game.scenario}: {str(error).splitlines()[0]}") from error
        finally:
            doom.close()


def _play(doom: DoomGame, game: Game, seed: int) -> dict[str, Tensor]:
    """Play one episode: rgb [T, 3, H, W], depth and labels [T, H, W] and actions [T], all uint8."""
    actions = list(_actions(game.scenario).values())
    chosen = smooth_choices(len(actions), game.length, seed)
    doom.set_seed(seed)
    doom.new_episode()
    frames: list[tuple[NDArray[np.uint8], ...]] = []
    for action in chosen:
        state = doom.get_state()
        if state is None:
            break
        frames.append(_frame(state, game.size))
        doom.make_action(actions[action], game.frame_skip)
    rgb, depth, labels = (torch.from_numpy(np.stack(part)) for part in zip(*frames, strict=True))
    return {
        "rgb": rgb.permute(0, 3, 1, 2).contiguous(),
        "depth": depth,
        "labels": labels,
        "actions": torch.from_numpy(chosen[: len(frames)].astype(np.uint8)),
    }


def _frame(state: GameState, size: tuple[int, int]) -> tuple[NDArray[np.uint8], ...]:
    """Colour averaged over areas; depth and labels from the nearest pixel, as their means would mean nothing."""
    from PIL import Image
    from PIL.Image import Resampling

    assert state.depth_buffer is not None and state.labels is not None  # `_running` asks for them
    height, width = size
    classes = _class_of_value(state.labels)[state.labels_buffer]
    resamplings = (
        (state.screen_buffer, Resampling.BOX),
        (state.depth_buffer, Resampling.NEAREST),
        (classes, Resampling.NEAREST),
    )
    return tuple(
        np.asarray(Image.fromarray(part).resize((width, height), resampling))
        for part, resampling in resamplings
    )


def _class_of_value(labels: Iterable[Label]) -> NDArray[np.uint8]:
    """Map each value of the engine's label buffer, new in each frame, to its object's class: uint8 [256]."""
    classes = _classes()
    table = np.full(256, classes.index(UNNAMED), np.uint8)
    table[: len(SURFACES)] = range(len(SURFACES))
    for label in labels:
        if label.object_category in classes:
            table[label.value] = classes.index(label.object_category)
    return table


def _classes() -> tuple[str, ...]:
    return (*SURFACES, UNNAMED, *_engine().get_default_categories())


def _actions(scenario: str) -> dict[str, list[float]]:
    """Each button that is on or off alone, and each turn while walking: how far each button is pressed."""
    engine = _engine()
    doom = engine.DoomGame()
    doom.load_config(_config(scenario))
    buttons = doom.get_available_buttons()
    names = [b.name.lower().replace("_", " ") for b in buttons]
    singles = [{n} for n, b in zip(names, buttons, strict=True) if not engine.is_delta_button(b)]
    walks = [{"move forward", turn} for turn in ("turn left", "turn right")]
    pressed = singles + [walk for walk in walks if walk <= set(names)]
    return {" + ".join(sorted(p)): [float(name in p) for name in names] for p in pressed}


def _config(scenario: str) -> str:
    return os.path.join(_engine().scenarios_path, f"{scenario}.cfg")
