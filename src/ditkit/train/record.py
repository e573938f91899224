"""The record of a run in its folder, so that a resume goes on with the same one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from reprlib import repr as short
from typing import Any

from ditkit.core.checkpoint import read_json
from ditkit.core.errors import ConfigError
from ditkit.train.log import LOSSES
from ditkit.train.state import STATE

RECIPE = "recipe.json"
CONTENT = "content"
"""Key of the digest of the data: what they hold, not how their path is written, says whether they are the same."""
SPELLINGS = {"data": CONTENT, "codec.folder": "codec.weights_sha256"} | dict.fromkeys(
    ("init.folder", "init.source"), "init.weights_sha256"
)
"""Keys of paths, by the keys of the digests that are compared in their stead."""
FREE = frozenset(
    f"settings.{name}"
    for name in (
        "steps",
        "accumulate",
        "gradient_checkpointing",
        "compile",
        "save_every",
        "sheet_every",
        "snapshot_every",
    )
)
"""The settings that a resume may change: how long, how often, how a step is computed, but not its result."""


def check_start(folder: Path) -> None:
    """Refuse to start where a run has done a step, or a model stands that no run has left.

    Raises:
        ConfigError: quotes the folder.
    """
    losses = folder / LOSSES
    if (folder / STATE).exists() or (losses.exists() and losses.stat().st_size):
        raise ConfigError(f"{folder} already holds a run; resume it, or choose another folder")
    if (folder / "model" / "config.json").exists():
        raise ConfigError(
            f"{folder} already holds a model, which the run would replace; choose another folder"
        )


def check_resume(folder: Path, described: Mapping[str, Any]) -> None:
    """Refuse to go on with another run than the folder's.

    Raises:
        ConfigError: there is no run, or names the first key that differs. A key that an older record does not
            have is not compared.
    """
    path = folder / RECIPE
    if not path.is_file():
        raise ConfigError(f"{folder} holds no run to resume: there is no {RECIPE}")
    before = dict(_flat(read_json(path)))
    after = dict(_flat(json.loads(json.dumps(described))))
    for key, now in after.items():
        digest = SPELLINGS.get(key, "")
        if key in FREE or (before.get(digest) and before[digest] == after.get(digest)):
            continue
        if key == CONTENT and before.get(key, now) != now:
            raise ConfigError(
                f"{path}: the files of the data are not those of the run so far, expected the same for a resume"
            )
        if key in before and before[key] != now:
            raise ConfigError(
                f"{path}: {key} was {short(before[key])}, now {short(now)}; a resume needs the same"
            )


def _flat(described: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Keys of the first two levels with dots, and their values."""
    for key, value in described.items():
        if isinstance(value, dict):
            yield from ((f"{key}.{inner}", v) for inner, v in value.items())
        else:
            yield key, value
