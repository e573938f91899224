"""Loading by kind, and a loader's options as texts."""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path

import pytest

from cli_support import save_photos
from ditkit.core.errors import ConfigError, DataError
from ditkit.data import folder, video_folder
from ditkit.data.loading import (
    FILES,
    accepts_option,
    load_clips,
    load_fields,
    load_images,
    names,
    read_options,
)
from ditkit.data.sets import moving_digits


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Path]:
    """Something of every kind; the loaders that are refused here open none of it but the photos."""
    for name in ("films/a.mp4", "notes/a.txt", "series.csv", "fields.nc"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (tmp_path / "empty").mkdir()
    save_photos(tmp_path / "photos")
    return {path.stem: path for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("load", "name", "said"),
    [
        (load_clips, "emoji", "emoji holds images, expected clips"),
        (load_clips, "winds", "winds holds fields, expected clips"),
        (load_clips, "photos", "photos holds images, expected clips"),
        (load_clips, "series", "series.csv holds fields, expected clips"),
        (load_clips, "empty", "empty holds no videos and no images, expected clips"),
        (load_clips, "notes", "notes holds no videos and no images, expected clips"),
        (load_fields, "films", "films holds clips, expected fields"),
        (load_fields, "photos", "photos holds images, expected fields"),
        (load_fields, "vizdoom", "vizdoom holds clips, expected fields"),
        (load_fields, "empty", "empty holds no videos and no images, expected fields"),
        (load_images, "films", "films holds clips, expected images"),
        (load_images, "fields", "fields.nc holds fields, expected images"),
        (load_images, "moving-digits", "moving-digits holds clips, expected images"),
    ],
)
def test_another_kind_is_said_before_any_option_is_looked_at(load, name, said, places):
    with pytest.raises((ConfigError, DataError)) as caught:
        load(places.get(name, name), no_such_option=3)
    assert str(caught.value).endswith(said)


def test_an_empty_folder_of_images_says_how_one_is_laid_out(places):
    with pytest.raises(DataError, match=r"empty holds no images.*expected class folders"):
        load_images(places["empty"], 16)


def test_a_moving_picture_among_pictures_is_one_of_them(places):
    """GIF is a suffix of both kinds."""
    (places["photos"] / "cat" / "0.png").rename(places["photos"] / "cat" / "0.gif")
    assert len(load_images(places["photos"], 16)) == 6
    with pytest.raises(ConfigError, match=r"unknown option.*'fps'"):
        load_images(places["photos"], 16, fps=3)


def test_texts_are_read_as_the_loader_declares(places):
    def read(name: str, *texts: str) -> dict[str, object]:
        found = read_options(places.get(name, name), texts)
        assert all(accepts_option(places.get(name, name), option) for option in found)
        return found

    assert read("films", "fps=10", "step=2") == {"fps": 10.0, "step": 2}
    assert isinstance(read("films", "fps=10")["fps"], float)
    assert read("series", "repair=sort,interpolate", "columns=load", "time=when") == {
        "repair": ("sort", "interpolate"),
        "columns": ("load",),
        "time": "when",
    }
    assert read("series", "repair=first") == {"repair": "first"}
    assert read("series", "separator=,", "time_format=%H=%M") == {"separator": ",", "time_format": "%H=%M"}
    assert read("fields", "variables=u,v") == {"variables": ("u", "v")}
    assert read("emoji", "skin_tones=true") == {"skin_tones": True}
    assert read("winds") == {}


@pytest.mark.parametrize(
    ("name", "texts", "said"),
    [
        ("films", ["fps=fast"], "option 'fps=fast', expected a number"),
        ("films", ["step=1.5"], "option 'step=1.5', expected an integer"),
        ("emoji", ["skin_tones=1"], "option 'skin_tones=1', expected true or false"),
        ("films", ["fps"], "option 'fps', expected NAME=VALUE"),
        ("films", ["fps=1", "fps=2"], "option 'fps=2': fps is given twice, expected once"),
        ("films", ["rate=1"], "unknown option of data set .*'rate'.*choose from: frames, stride, step, fps"),
        ("films", ["size=8"], "unknown option of data set .*'size'.*choose from: frames"),
        ("winds", ["size=8"], r"unknown option of data set 'winds': 'size' \(choose from: none\)"),
    ],
)
def test_texts_that_do_not_read(name, texts, said, places):
    with pytest.raises(ConfigError, match=said) as caught:
        read_options(places.get(name, name), texts)
    assert "\n" not in str(caught.value)


def test_an_option_that_is_decided_elsewhere_is_not_offered(places):
    with pytest.raises(ConfigError, match=r"'rate'.*choose from: stride, step, fps"):
        read_options(places["films"], ["rate=1"], decided=("size", "frames"))


def test_every_option_of_every_loader_has_a_text(places):
    loaders = {name: import_module(f"ditkit.data.sets.{name.replace('-', '_')}").load for name in names()}
    loaders |= {places["series"]: FILES[".csv"], places["fields"]: FILES[".nc"]}
    loaders |= {places["films"]: video_folder.load, places["photos"]: folder.load}
    texts = {bool: "false", int: "3", float: "0.5"}
    read = 0
    for place, loader in loaders.items():
        for name, parameter in inspect.signature(loader).parameters.items():
            if name in ("size", "root", "path"):
                continue
            text = texts.get(
                type(parameter.default), "0.5" if "float" in parameter.annotation else "some,word"
            )
            if parameter.annotation == "Sequence[float]":
                text = "0.5,1.5"
            if name == "blank":  # one of two words
                text = "keep"
            (value,) = read_options(place, [f"{name}={text}"]).values()
            assert (
                ",".join(map(str, value)) == text if isinstance(value, tuple) else str(value).lower() == text
            )
            read += 1
    assert read > 20 and moving_digits.load in loaders.values()
