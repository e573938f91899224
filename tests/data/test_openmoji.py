"""The set openmoji: what it reads of its package, draws once and keeps; the real one where it is installed."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import logging
import sys
import tarfile
import types
from pathlib import Path

import pytest
from PIL import Image

from ditkit.core.errors import ConfigError, DataError
from ditkit.data import load
from ditkit.data.pinned import find
from ditkit.data.sets import openmoji

pytestmark = pytest.mark.usefixtures("nothing_installed")

TABLE = """hexcode,subgroups,annotation,skintone
1F600,face-smiling,Grinning face,
1F34E,food-fruit,red apple,
1F44B,hand,waving hand,
1F44B-1F3FB,hand,waving hand: light skin tone,1
"""
COLOURS = {"1F600": "yellow", "1F34E": "red", "1F44B": "orange", "1F44B-1F3FB": "pink"}


def draw(bytestring: bytes, output_width: int, output_height: int, background_color: str) -> bytes:
    """Stands for cairosvg: the picture is one colour, which the file names."""
    name = bytestring.decode()
    if name == "orange":
        raise AttributeError("'NoneType' object has no attribute 'get'")
    buffer = io.BytesIO()
    Image.new("RGB", (output_width, output_height), name).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / openmoji.ARCHIVE
    with tarfile.open(path, "w:gz") as archive:
        contents = {openmoji.TABLE: TABLE, **{openmoji.PICTURE.format(k): v for k, v in COLOURS.items()}}
        for name, text in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    monkeypatch.setenv("DITKIT_DATA", str(tmp_path))
    monkeypatch.setattr(openmoji, "ARCHIVE_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setitem(sys.modules, "cairosvg", types.SimpleNamespace(svg2png=draw))
    return path


def test_pictures_have_classes_and_captions(package, caplog):
    with caplog.at_level(logging.WARNING):
        found = load("openmoji", 8)
    assert found.captions == ("grinning face", "red apple") and found.ids == ("1f600", "1f34e")
    assert found.classes == ("face-smiling", "food-fruit", "hand") and found.labels.tolist() == [0, 1]
    assert found.images[:, :, 0, 0].tolist() == [[255, 255, 0], [255, 0, 0]]
    assert "1 of 3 pictures cannot be drawn by cairosvg and are left out" in caplog.text
    assert load("openmoji", 8, skin_tones=True).captions[-1] == "waving hand: light skin tone"


def test_they_are_drawn_once(package, monkeypatch):
    first = load("openmoji", 8)
    monkeypatch.setitem(sys.modules, "cairosvg", None)
    again = load("openmoji", 8)
    assert again.captions == first.captions and (again.images == first.images).all()
    with pytest.raises(DataError, match=r"drawn by cairosvg, which is missing .*ditkit\[text\]"):
        load("openmoji", 16)


def test_splits_share_out_the_captions(package):
    parts = [load("openmoji", 8, split=split).captions for split in ("train", "test", "all")]
    assert sorted(parts[0] + parts[1]) == sorted(parts[2])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"size": 0}, ConfigError, "size=0"),
        ({"size": 5000}, ConfigError, "openmoji: size=5000 is outside 1..1024"),
        ({"size": 8, "split": "val"}, ConfigError, "unknown split of openmoji 'val'"),
    ],
)
def test_what_is_out_of_range_is_refused(package, options, error, message):
    with pytest.raises(error, match=message):
        load("openmoji", **options)


def test_the_missing_package_is_named():
    with pytest.raises(DataError, match=r"run `npm pack openmoji@17.0.0`"):
        load("openmoji", 8)


@pytest.mark.skipif(
    find([openmoji.ARCHIVE]) is None or importlib.util.find_spec("cairosvg") is None,
    reason="openmoji or cairosvg is not installed",
)
def test_real_openmoji():
    found = load("openmoji", 16)
    assert (len(found), len(found.classes)) == (2464, 119) and "red apple" in found.captions
