"""Flags that several commands share, how these are read, and how progress is shown."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from ditkit.core.checkpoint import read_json
from ditkit.core.codec import CODEC_CONFIG, Codec
from ditkit.core.config import MOST_SAMPLES
from ditkit.core.errors import ConfigError
from ditkit.core.files import is_file, kind_of
from ditkit.core.loading import load, shipped
from ditkit.core.model import Model
from ditkit.core.policy import Policy
from ditkit.core.spec import as_text, components
from ditkit.core.task import generating, task_named, task_of
from ditkit.core.terminal import Advance
from ditkit.data.loading import accepts_option, dataset_name, read_options
from ditkit.sample.noise import LAST_SEED, distinct

ModelName = Annotated[str, tyro.conf.Positional]
Labels = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="CLASS")]
Prompts = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="TEXT")]
Seeds = Annotated[tuple[str, ...], tyro.conf.arg(metavar="SEED ...")]
Policies = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="POLICY")]
Number = Annotated[int | None, tyro.conf.arg(metavar="INT")]
DataName = Annotated[str | None, tyro.conf.arg(metavar="STR")]
Options = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME=VALUE")]

EXACT = "exact"
CODEC, MODEL = "codec", "model"
"""Keys of config.json that name the class."""
OF_THE_MODEL = ("size", "frames")
"""Options of loaders that follow from the model."""
RANGE = re.compile(r"(\d+)\.\.(\d+)", re.ASCII)

LONGEST_RANGE = 24
"""Letters of the longest word of seeds that says something."""


def load_of(name: str, task: str) -> Any:
    """Load a model of one task.

    Raises:
        ConfigError: it is of another task; the message names the command for that. Those of `load`.
    """
    model = load(name)
    own, expected = task_of(model), task_named(task)
    if own.name != expected.name:
        raise ConfigError(
            f"{name} makes {own.noun}s, expected a model of {expected.noun}s; try: {own.command} {name}"
        )
    return model


def load_generator(name: str, verb: str) -> Any:
    """Load a model whose samples can be drawn without data.

    Raises:
        ConfigError: it is of another task; the message names the command for that. Those of `load`.
    """
    model = load(name)
    generating(model, verb, name)
    return model


def load_trained(name: str) -> Any:
    """Load a model, or the codec in a folder.

    Raises:
        CheckpointError, ConfigError: as `load` and `Codec.load` do.
    """
    config = Path(name).expanduser() / CODEC_CONFIG
    is_codec = name not in shipped() and is_file(config) and CODEC in read_json(config)
    return Codec.load(config.parent) if is_codec and MODEL not in read_json(config) else load(name)


def options_of(data: str | None, words: Sequence[str], max_bad: int | None = None) -> dict[str, Any]:
    """Read the words of `--option` and `--max-bad` for the loader of `--data`.

    Raises:
        ConfigError: there are no data, or their loader has no such option; one that the model decides, one given
            twice, or a value of another type.
        DataError: no such data.
    """
    texts = [*words, *([] if max_bad is None else [f"max_bad={max_bad}"])]
    if not texts:
        return {}
    if data is None:
        raise ConfigError(f"got {texts[0]} for the loader of --data, but no --data")
    if max_bad is not None and not accepts_option(data, "max_bad"):
        raise ConfigError(f"--max-bad {max_bad} with --data {data}, expected a folder of images or videos")
    for word in words:
        if word.partition("=")[0] in OF_THE_MODEL:
            raise ConfigError(f"--option {word}: size and frames are the model's, expected another option")
    return read_options(data, texts, OF_THE_MODEL)


def with_training_options(data: str | None, words: Sequence[str], *models: Model) -> tuple[str, ...]:
    """Return the words of `--option`, preceded by those of the models' last training on the same data.

    Says on the screen what it adds: a model that learned slow digits makes nothing of fast ones.

    Raises:
        ConfigError: one model was trained on them under other options than another, and no word decides.
    """
    if data is None:
        return tuple(words)
    runs = [run for model in models if (run := model.last_training) and run["trained"] == dataset_name(data)]
    learned = [tuple(_learned(run.get("options", {}), data, words)) for run in runs]
    if differing := [added for added in learned if added != learned[0]]:
        listed = " and ".join(" ".join(option_words) or "none" for option_words in (learned[0], differing[0]))
        raise ConfigError(
            f"the models were trained on {data} under different options, {listed}; expected --option"
        )
    added = learned[0] if learned else ()
    if added:
        print(f"{data} as the model was trained on it:", *(f"--option {text}" for text in added))
    return (*added, *words)


def _learned(options: Mapping[str, Any], data: str, words: Sequence[str]) -> Iterator[str]:
    """Options of a training that the loader takes and no word gives, as words."""
    given = {word.partition("=")[0] for word in words}
    for name, value in options.items():
        if name not in given and accepts_option(data, name):
            yield f"{name}=" + ",".join(map(as_text, value if isinstance(value, list | tuple) else [value]))


def seeds_of(words: Sequence[str]) -> tuple[int, ...]:
    """`("0..2", "7")` is (0, 1, 2, 7): both ends of a range count.

    Raises:
        ConfigError: a word is neither, a range runs backwards, there is no seed, or one stands twice.
    """
    seeds: list[int] = []
    for word in words:
        ends = RANGE.fullmatch(word)
        if len(word) > LONGEST_RANGE:
            raise ConfigError(
                f"--seeds got {word[:LONGEST_RANGE]}..., expected whole numbers up to {LAST_SEED}"
            )
        if ends and int(ends[2]) - int(ends[1]) >= MOST_SAMPLES:
            raise ConfigError(f"--seeds got {word}, expected at most {MOST_SAMPLES:,} of them")
        if word.isascii() and word.isdigit():
            seeds.append(int(word))
        elif ends and int(ends[1]) <= int(ends[2]):
            seeds.extend(range(int(ends[1]), int(ends[2]) + 1))
        else:
            raise ConfigError(f"--seeds got {word!r}, expected whole numbers or ranges such as 0..15")
    return distinct(seeds)


def policies_of(specs: Sequence[str]) -> tuple[Policy, ...]:
    """Return the policies of `--policy`; `exact` stands for none.

    Raises:
        ConfigError: an unknown policy, field or value.
    """
    return components("--policy", Policy, [text for text in specs if text != EXACT])  # type: ignore[type-abstract]


def words_of(options: Mapping[str, Any]) -> Iterator[str]:
    """Return `options` as words of a command line.

    A list is a flag that is repeated, a tuple one of several words, True a flag alone; None and False are left out.
    """
    for name, value in options.items():
        word = "--policy" if name == "policies" else f"--{name.replace('_', '-')}"
        if value is True:
            yield word
        elif value is not None and value is not False:
            for item in value if isinstance(value, list) else [value]:
                yield from (word, *map(str, item if isinstance(item, tuple) else (item,)))


@contextlib.contextmanager
def writable(folder: Path) -> Iterator[None]:
    """`folder`, made and tried out before the block, so that hours of work do not end unsaved.

    If the block fails, the folders that were made for it go again unless they hold something.

    Raises:
        ConfigError: nothing can be written there.
    """
    created: list[Path] = []
    try:
        try:
            for place in reversed([p for p in (folder, *folder.parents) if not kind_of(p)]):
                place.mkdir(exist_ok=True)
                created.append(place)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise ConfigError(f"cannot write in {folder}: {error.strerror or error}") from error
        yield
    except BaseException:
        for place in reversed(created):
            with contextlib.suppress(OSError):
                place.rmdir()
        raise


def is_main_process() -> bool:
    """Return whether this process speaks for all: torchrun and accelerate number theirs in RANK."""
    return os.environ.get("RANK", "0") == "0"


def for_stage(advance: Advance, stage: str) -> Callable[[int, int], None]:
    """`advance` for one stage."""
    return lambda done, total: advance(stage, done, total)
