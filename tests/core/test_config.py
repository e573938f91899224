"""Configs: what annotations declare is checked once, for fields, for JSON, and shown in words."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, Literal

import numpy as np
import pytest
from annotated_types import Ge, Gt, Interval, MinLen

from ditkit.cli.flags import flags_of
from ditkit.codecs.image_vae import ImageVaeConfig
from ditkit.core.catalog import every
from ditkit.core.config import (
    Checked,
    Count,
    Depth,
    Finite,
    Natural,
    Share,
    config_of,
    described,
    limits_of,
)
from ditkit.core.errors import CheckpointError, ConfigError
from ditkit.core.model import Model
from ditkit.models import DiTConfig, VDTConfig, VideoDiTConfig


@dataclass(frozen=True)
class Odd(Checked):
    """A field of each sort."""

    count: Count = 1
    end: Natural | None = None
    share: Share = 0.0
    scale: Finite = 1.0
    level: Annotated[float, Gt(0)] = 1.0
    axis: Literal["call", "sigma"] = "call"
    block: Literal[8, 16] = 8
    flag: bool = False
    size: Count | tuple[Count, Count] = 4
    states: Annotated[tuple[Count, ...], MinLen(1)] = (1,)
    anything: Any = None


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"count": 0}, "Odd: count=0 should be at least 1"),
        ({"count": True}, "Odd: count=True should be an integer of at least 1"),
        ({"count": 2.0}, "Odd: count=2.0 should be an integer of at least 1"),
        ({"end": -1}, "Odd: end=-1 should be at least 0"),
        ({"end": "x"}, "Odd: end='x' should be an integer of at least 0 or none"),
        ({"share": 1}, "Odd: share=1 should lie in [0, 1)"),
        ({"share": math.nan}, "Odd: share=nan should lie in [0, 1)"),
        ({"share": "1"}, "Odd: share='1' should be a number in [0, 1)"),
        ({"scale": math.inf}, "Odd: scale=inf should be a finite number"),
        ({"scale": None}, "Odd: scale=None should be a finite number"),
        ({"level": 0}, "Odd: level=0 should be positive"),
        ({"level": False}, "Odd: level=False should be a positive number"),
        ({"axis": "sigm"}, "Odd: unknown axis 'sigm'; did you mean 'sigma'? (choose from: call, sigma)"),
        ({"axis": 1}, "Odd: axis=1 should be one of call, sigma"),
        ({"block": 8.0}, "Odd: block=8.0 should be one of 8, 16"),
        ({"flag": 1}, "Odd: flag=1 should be true or false"),
        ({"size": (4, 0)}, "Odd: size=(4, 0) should be at least 1"),
        (
            {"size": (4,)},
            "Odd: size=(4,) should be an integer of at least 1 or a tuple of 2 integers of at least 1",
        ),
        ({"states": ()}, "Odd: states=() should hold at least 1"),
        ({"states": [1]}, "Odd: states=[1] should be a tuple of integers of at least 1"),
    ],
)
def test_a_field_out_of_its_bounds_is_refused_in_one_line(change: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Odd(**change)
    assert str(caught.value) == line


def test_what_fits_is_kept_as_it_is() -> None:
    odd = Odd(end=0, share=0.5, axis="sigma", block=16, size=(1, 2), states=(3, 4), anything=object)
    assert (odd.size, odd.states, odd.block) == ((1, 2), (3, 4), 16)
    numpy = Odd(count=np.int64(3), scale=np.float32(0.5), states=(np.int32(2),))
    assert [type(v) for v in (numpy.count, numpy.scale, *numpy.states)] == [int, float, int]
    assert numpy == Odd(count=3, scale=0.5, states=(2,))


@pytest.mark.parametrize(
    ("kind", "words", "limits"),
    [
        (int, "an integer", ""),
        (Depth, "an integer from 1 to 1000", "from 1 to 1000"),
        (Annotated[float, Interval(gt=0, le=1)], "a number in (0, 1]", "in (0, 1]"),
        (Annotated[float, Ge(0)], "a number of at least 0", "at least 0"),
        (tuple[Natural, ...], "a tuple of integers of at least 0", "at least 0"),
        (Literal["a", "b"], "one of a, b", ""),
    ],
)
def test_annotations_in_words(kind: Any, words: str, limits: str) -> None:
    assert (described(kind), limits_of(kind)) == (words, limits)


@pytest.mark.parametrize("config", [*(m.Config for m in every(Model)), ImageVaeConfig])  # type: ignore[type-abstract]
def test_every_field_of_a_network_has_its_line_of_help(config: Any) -> None:
    flags = type(flags_of(config()))
    names = {f.name for f in fields(flags)}
    assert names < {f.name for f in fields(config)} and "channels" not in names
    told = [arg.help for f in fields(flags) for arg in f.type.__metadata__ if getattr(arg, "help", None)]
    assert len(told) == len(names)
    assert config.tiny() == config_of(config, _as_json(config.tiny()), "a folder")


def _as_json(config: Any) -> Any:
    return json.loads(json.dumps(asdict(config)))


SAVED = {
    DiTConfig: '{"size": 32, "patch": 4, "channels": 3, "width": 256, "depth": 9, "heads": 4, "classes": 2, '
    '"label_dropout": 0.1, "convention": {"path": "linear", "prediction": "velocity", "time": "noise", '
    '"extra": "none"}, "class_names": ["a", "b"]}',
    VDTConfig: '{"channels": 1, "frames": 16, "size": [32, 32], "patch": 4, "width": 128, "depth": 8, "heads": 4, '
    '"classes": 1, "mode": "video", "conditioning": "mask", "label_dropout": 0.1, "convention": {"path": "linear", '
    '"prediction": "data", "time": "noise", "extra": "none"}, "class_names": []}',
    VideoDiTConfig: '{"channels": 1, "frames": 16, "size": 32, "patch": [1, 4, 4], "width": 32, "depth": 1, '
    '"heads": 2, "classes": 0, "text_width": 0, "text_tokens": 0, "qk_norm": true, "rotary_base": 10000.0, '
    '"rotary_split": [], "label_dropout": 0, "convention": {"path": "linear", "prediction": "data", "time": "noise", '
    '"extra": "none"}, "class_names": []}',
}
"""As version 0.1.0 wrote them."""


@pytest.mark.parametrize("kind", SAVED, ids=lambda kind: kind.__name__)
def test_configs_of_older_folders_are_read(kind: Any) -> None:
    saved = json.loads(SAVED[kind])
    assert _as_json(config_of(kind, saved, "a folder")) == saved


def test_json_is_quoted_with_what_was_expected() -> None:
    with pytest.raises(
        CheckpointError, match=r"here: size=\(4,\) should be an integer of at least 1 or a tuple"
    ):
        config_of(Odd, {"size": [4]}, "here")
