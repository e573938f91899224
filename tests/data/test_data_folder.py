"""A user's own folder: every picture mode, both layouts, damaged files and wrong metadata."""

from __future__ import annotations

import io
import json
import logging
import os
import re
from pathlib import Path, PurePath

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ditkit.core.errors import ConfigError, DataError, DitkitError
from ditkit.data import load
from ditkit.data.decode import SUFFIXES, DamagedImage, centre_crop, read_square
from ditkit.data.folder import read_metadata

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def picture(
    path: Path, colour: tuple[int, ...] = RED, size: tuple[int, int] = (8, 8), mode: str = "RGB"
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path


# -- one picture


def test_centre_crop_is_that_of_adm():
    """A 40 x 24 ramp at size 8: one BOX halving to 20 x 12, BICUBIC to 13 x 8, columns 2 to 9."""
    ramp = Image.fromarray(np.tile(np.arange(40, dtype=np.uint8) * 6, (24, 1)))
    halved = ramp.resize((20, 12), Image.Resampling.BOX)
    expected = halved.resize((13, 8), Image.Resampling.BICUBIC).crop((2, 0, 10, 8))
    assert np.array_equal(np.asarray(centre_crop(ramp, 8)), np.asarray(expected))


@pytest.mark.parametrize("size", [(8, 8), (1, 1), (3, 50), (64, 17), (100, 99)])
def test_centre_crop_is_always_square(size):
    assert centre_crop(Image.new("RGB", size), 8).size == (8, 8)


@pytest.mark.parametrize(
    ("mode", "colour", "suffix", "expected"),
    [
        ("RGB", RED, "png", RED),
        ("L", 100, "png", (100, 100, 100)),
        ("1", 1, "png", WHITE),
        ("RGBA", (255, 0, 0, 0), "png", WHITE),
        ("RGBA", (0, 0, 0, 51), "png", (204, 204, 204)),
        ("LA", (0, 0), "png", WHITE),
        ("I;16", 0x8000, "png", (128, 128, 128)),
        ("I;16", 0xFFFF, "tif", WHITE),
        ("CMYK", (0, 255, 255, 0), "tif", RED),
        ("P", 0, "gif", (0, 0, 0)),
        ("RGB", BLUE, "bmp", BLUE),
        ("RGB", BLUE, "ppm", BLUE),
    ],
)
def test_every_mode_becomes_rgb_on_white(mode, colour, suffix, expected, tmp_path):
    pixels = read_square(picture(tmp_path / f"a.{suffix}", colour, mode=mode), 4)
    assert pixels.shape == (4, 4, 3)
    assert (pixels == expected).all()


def test_palette_transparency_is_white(tmp_path):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.save(tmp_path / "a.png", transparency=1)
    assert (read_square(tmp_path / "a.png", 8) == 255).all()


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (8, 8), WHITE)
    image.paste(RED, (0, 0, 8, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # the top of the file is the right side of the picture
    image.save(tmp_path / "a.png", exif=exif)
    pixels = read_square(tmp_path / "a.png", 8)
    assert (pixels[:, 4:] == RED).all()
    assert (pixels[:, :4] == WHITE).all()


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert (read_square(tmp_path / "a.gif", 8) == RED).all()


@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "not an image"), (b"GIF89a", None), (b"<svg></svg>", "not an image")]
)
def test_what_is_no_image_is_damaged(content, reason, tmp_path):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(DamagedImage, match=reason):
        read_square(tmp_path / "a.png", 8)


def test_floating_point_pixels_are_refused(tmp_path):
    with pytest.raises(DamagedImage, match="floating-point pixels"):
        read_square(picture(tmp_path / "a.tif", 0.5, mode="F"), 8)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), kind=st.sampled_from(["png", "jpeg", "gif", "bmp", "tiff", "webp", "ppm"]))
def test_damage_is_noticed_or_harmless(data, kind, tmp_path):
    """Whatever is cut off or overwritten, the answer is a picture or `DamagedImage`."""
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, kind)
    content = bytearray(buffer.getvalue()[: data.draw(st.integers(0, len(buffer.getvalue())))])
    for place, byte in data.draw(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6)):
        content[place : place + 1] = bytes([byte])
    path = tmp_path / "a.png"
    path.write_bytes(content)
    try:
        assert read_square(path, 4).shape == (4, 4, 3)
    except DamagedImage as reason:
        assert str(reason)


# -- folders


def test_class_folders(tmp_path):
    picture(tmp_path / "dog_or_wolf" / "b.png", BLUE)
    picture(tmp_path / "cat" / "deep" / "a.PNG", RED)
    picture(tmp_path / "cat" / ".hidden.png")
    (tmp_path / "README.txt").write_text("not an image")
    found = load(tmp_path, 4)
    assert found.classes == ("cat", "dog_or_wolf")
    assert found.ids == ("cat/deep/a.PNG", "dog_or_wolf/b.png")
    assert found.captions == ("cat", "dog or wolf")
    assert found.labels.tolist() == [0, 1]
    assert found.images[:, :, 0, 0].tolist() == [list(RED), list(BLUE)]
    assert found.name == tmp_path.name


def test_linked_class_folders_are_followed_but_not_for_ever(tmp_path):
    picture(tmp_path / "elsewhere" / "a.png")
    root = tmp_path / "root"
    root.mkdir()
    (root / "cat").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "elsewhere")
    assert load(root, 4).ids == ("cat/a.png",)


def test_captions(tmp_path):
    picture(tmp_path / "a.png", RED)
    picture(tmp_path / "sub" / "b.png", BLUE)
    rows = [
        {"file_name": "sub/b.png", "text": "blau, schön"},
        {"file_name": "./a.png", "text": "red", "n": 1},
    ]
    lines = "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode() + b"\n")
    found = load(str(tmp_path), 4)
    assert found.captions == ("blau, schön", "red")
    assert found.ids == ("sub/b.png", "a.png")
    assert (found.classes, found.labels.tolist()) == ((), [0, 0])
    assert found.images[:, :, 0, 0].tolist() == [list(BLUE), list(RED)]


def bad_folder(tmp_path: Path, what: str) -> None:
    if what == "loose beside classes":
        picture(tmp_path / "a.png")
        picture(tmp_path / "cat" / "a.png")
    if what == "empty class":
        picture(tmp_path / "cat" / "a.png")
        (tmp_path / "dog").mkdir()
    if what == "too large":
        picture(tmp_path / "cat" / "a.png")
    if what == "metadata is a folder":
        (tmp_path / "metadata.jsonl").mkdir()


@pytest.mark.parametrize(
    ("what", "options", "error", "message"),
    [
        (
            "empty",
            {},
            DataError,
            r"holds no images; expected class folders .* with a metadata.jsonl",
        ),
        (
            "loose beside classes",
            {},
            DataError,
            r"1 images outside class folders, first 'a.png'; expected class folders",
        ),
        ("empty class", {}, DataError, "class folder 'dog' holds no images"),
        (
            "too large",
            {"max_bytes": 47},
            DataError,
            "1 images at 4 x 4 need 48 bytes of memory, more than max_byt",
        ),
        ("metadata is a folder", {}, DataError, "cannot read .*metadata.jsonl: Is a directory"),
        ("empty", {"size": None}, ConfigError, "needs a size in pixels, for example size=64"),
        ("empty", {"max_bad": -1}, ConfigError, "max_bad=-1, expected 0 or more"),
        ("empty", {"maxbad": 1}, ConfigError, "'maxbad'; did you mean 'max_bad'"),
    ],
)
def test_folders_that_are_refused(what, options, error, message, tmp_path):
    bad_folder(tmp_path, what)
    with pytest.raises(error, match=message) as caught:
        load(tmp_path, **({"size": 4} | options))
    assert "\n" not in str(caught.value)


def test_an_unreadable_folder_is_named(tmp_path, monkeypatch):
    picture(tmp_path / "cat" / "a.png")
    (tmp_path / "dog").mkdir()
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "dog":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(DataError, match=r"cannot read folder .*dog: Permission denied"):
        load(tmp_path, 4)


def test_damaged_files_are_named_and_skipped_up_to_the_limit(tmp_path, caplog):
    good = picture(tmp_path / "cat" / "good.png", size=(64, 64))
    (tmp_path / "cat" / "cut.png").write_bytes(good.read_bytes()[:60])
    (tmp_path / "cat" / "text.jpg").write_text("not an image")
    with caplog.at_level(logging.WARNING):
        found = load(tmp_path, 4, max_bad=2)
    assert found.ids == ("cat/good.png",)
    assert (found.images[0, 0] == 255).all()
    reported = [record.getMessage() for record in caplog.records]
    assert [re.search(r"cat/\w+\.\w+", line).group() for line in reported] == ["cat/cut.png", "cat/text.jpg"]
    with pytest.raises(
        DataError, match=r"2 damaged or missing images, more than max_bad=1: cat/cut\.png, cat/text\.jpg"
    ):
        load(tmp_path, 4, max_bad=1)


def test_found_5_whatever_pillow_opens_is_read_and_the_rest_is_named(tmp_path, caplog):
    """Other endings, none, and what a browser leaves of a download."""
    names = ["a.jfif", "b.jpe", "c.avif", "d.jp2", "e.apng", "f", "g.png.download", "h.JPG"]
    kinds = ["JPEG", "JPEG", "AVIF", "JPEG2000", "PNG", "PNG", "PNG", "JPEG"]
    for name, kind in zip(names, kinds, strict=True):
        (tmp_path / "cat").mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), RED).save(tmp_path / "cat" / name, kind)
    (tmp_path / "cat" / "notes").write_text("a cat")
    (tmp_path / "cat" / "Thumbs.db").write_bytes(b"\0" * 100)
    with caplog.at_level(logging.WARNING):
        found = load(tmp_path, 8, max_bad=0)
    assert found.ids == tuple(sorted(f"cat/{name}" for name in names))
    assert (found.images[:, 0] > 245).all() and (found.images[:, 1:] < 10).all()
    assert "2 files are not read: cat/Thumbs.db, cat/notes" in caplog.text


@pytest.mark.parametrize("size", [(1, 1_000_000), (1_000_000, 1)])
def test_found_29_a_strip_that_would_fill_the_memory_is_damaged(size, tmp_path, caplog):
    picture(tmp_path / "a.png")
    Image.new("1", size).save(tmp_path / "bomb.png")
    with caplog.at_level(logging.WARNING):
        assert load(tmp_path, 64, max_bad=1).ids == ("a.png",)
    assert f"bomb.png: {size[0]} x {size[1]} pixels, too long a strip for 64 x 64" in caplog.text
    with pytest.raises(DataError, match=r"1 damaged or missing images, more than max_bad=0: bomb\.png"):
        load(tmp_path, 64, max_bad=0)


@pytest.mark.parametrize("error", [MemoryError, OverflowError])
def test_found_29_what_no_memory_holds_is_damaged(error, tmp_path, monkeypatch):
    def refuse(image, size):
        raise error

    picture(tmp_path / "a.png")
    monkeypatch.setattr("ditkit.data.decode.centre_crop", refuse)
    with pytest.raises(DataError, match=r"1 damaged or missing images, more than max_bad=0: a\.png"):
        load(tmp_path, 4, max_bad=0)


def test_found_30_only_regular_files_are_opened(tmp_path, caplog):
    """Reading a pipe waits for ever, and a device ends never."""
    picture(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe")
    with caplog.at_level(logging.WARNING):
        assert load(tmp_path, 4).ids == ("a.png",)
    assert all(f"{name}.png: not a regular file" in caplog.text for name in ("pipe", "zero"))
    os.mkfifo(tmp_path / "metadata.jsonl")
    with pytest.raises(DataError, match=r"metadata\.jsonl: not a regular file"):
        load(tmp_path, 4)


def test_found_34_links_out_of_the_folder_are_followed_and_named(tmp_path, caplog):
    picture(tmp_path / "elsewhere" / "b.png")
    picture(tmp_path / "photos" / "cat" / "a.png")
    (tmp_path / "photos" / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "cat" / "c.png").symlink_to(tmp_path / "elsewhere" / "b.png")
    (tmp_path / "photos" / "cat" / "d.png").symlink_to(tmp_path / "photos" / "cat" / "a.png")
    with caplog.at_level(logging.WARNING):
        assert len(load(tmp_path / "photos", 4)) == 4
    assert "2 files lie elsewhere, where links lead, and are read: cat/c.png, dog/b.png" in caplog.text


def test_found_18_a_missing_picture_of_the_metadata_is_skipped_like_a_damaged_one(tmp_path, caplog):
    picture(tmp_path / "a.png")
    rows = [{"file_name": f"{name}.png", "text": name} for name in "ab"]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with caplog.at_level(logging.WARNING):
        assert load(tmp_path, 4, max_bad=1).captions == ("a",)
    assert "b.png: it does not exist" in caplog.text
    with pytest.raises(DataError, match=r"1 damaged or missing images, more than max_bad=0: b\.png"):
        load(tmp_path, 4, max_bad=0)


def test_a_class_without_a_readable_image_is_an_error(tmp_path):
    picture(tmp_path / "cat" / "a.png")
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "b.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"every image of class folder 'dog' is damaged: dog/b\.png"):
        load(tmp_path, 4)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"file_name": "a.png"', "line 2: not JSON"),
        (b"\xff\xfe", "line 2: not JSON .*utf-8"),
        (b"[" * 100_000, "line 2: not JSON"),
        (b'["a.png"]', "line 2: expected a JSON object, found list"),
        (b'{"text": "red"}', r"line 2: expected a string 'file_name', found keys \['text'\]"),
        (b'{"file_name": "a.png", "caption": "red"}', "expected a string 'text', found keys .*'caption'"),
        (b'{"file_name": "a.png", "text": 3}', "line 2: expected a string 'text', found int 3"),
        (b'{"file_name": "", "text": "red"}', "line 2: file_name '', expected a path of an image in"),
        (b'{"file_name": "../a.png", "text": "red"}', "line 2: file_name '../a.png' leads out of the folder"),
        (
            b'{"file_name": "/etc/a.png", "text": "red"}',
            "line 2: file_name '/etc/a.png' leads out of the folder",
        ),
        (b'{"file_name": "./a.png", "text": "red"}', "line 2: 'a.png' again, first on line 1"),
    ],
)
def test_metadata_lines_that_are_refused(line, message, tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_bytes(b'{"file_name": "a.png", "text": "red"}\n' + line + b"\n")
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path, 4)
    assert "\n" not in str(caught.value)


def test_metadata_without_a_line(tmp_path):
    (tmp_path / "metadata.jsonl").write_text("\n \n")
    with pytest.raises(DataError, match="lists no images"):
        load(tmp_path, 4)


rows = st.fixed_dictionaries(
    {},
    optional={
        "file_name": st.sampled_from(["a.png", "b.png", "c.png", "\0", "x" * 300]) | st.text(),
        "text": st.text(),
    },
)
lines = (
    st.binary(max_size=40)
    | rows.map(lambda row: json.dumps(row).encode())
    | st.recursive(st.none() | st.floats() | st.text(), st.lists, max_leaves=5).map(
        lambda v: json.dumps(v).encode()
    )
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.lists(lines, max_size=4))
def test_metadata_reader_answers_or_raises_one_line(content, tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).touch()
    (tmp_path / "metadata.jsonl").write_bytes(b"\n".join(content))
    try:
        entries = read_metadata(tmp_path)
    except DitkitError as error:
        assert len(str(error).splitlines()) == 1
        assert "metadata.jsonl" in str(error)
    else:
        assert entries
        # one that is missing is left to the reader of pictures
        assert not any(
            PurePath(e.file_name).is_absolute() or ".." in PurePath(e.file_name).parts for e in entries
        )
        assert len(entries) == len({e.file_name for e in entries}) == sum(bool(c.strip()) for c in content)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(), min_size=1, max_size=4), ascii_only=st.booleans())
def test_any_caption_survives_the_file(texts, ascii_only, tmp_path):
    for i in range(len(texts)):
        (tmp_path / f"{i}.png").touch()
    written = [
        json.dumps({"file_name": f"{i}.png", "text": text}, ensure_ascii=ascii_only)
        for i, text in enumerate(texts)
    ]
    (tmp_path / "metadata.jsonl").write_bytes("\n".join(written).encode())
    assert [e.caption for e in read_metadata(tmp_path)] == texts


def test_suffixes_are_formats_that_pillow_reads():
    Image.init()
    assert {s for s in SUFFIXES if Image.EXTENSION[s] in Image.OPEN} == SUFFIXES


# -- layouts of other trainers (found.md, cases 4, 17 and 20)


def test_splits_are_splits_and_no_classes(tmp_path):
    for split, colour in (("train", RED), ("val", BLUE)):
        for name in ("cat", "dog"):
            picture(tmp_path / split / name / "1.png", colour)
    found = load(tmp_path, 4)
    assert (found.classes, found.name) == (("cat", "dog"), tmp_path.name)
    assert (found.images[:, 0] == RED[0]).all()
    for word in ("val", "validation"):
        other = load(tmp_path, 4, split=word)
        assert other.classes == ("cat", "dog") and (other.images[:, 0] == BLUE[0]).all()
    with pytest.raises(ConfigError, match=r"split of .*: 'test' \(choose from: train, validation\)"):
        load(tmp_path, 4, split="test")


def test_a_folder_that_only_wraps_another_is_that(tmp_path):
    for name in ("cat", "dog"):
        picture(tmp_path / "pets" / "train" / name / "1.png")
    assert load(tmp_path, 4).classes == ("cat", "dog")
    picture(tmp_path / "single" / "cat" / "1.png")
    assert load(tmp_path / "single", 4).classes == ("cat",)


def test_a_split_of_a_folder_without_any_is_refused(tmp_path):
    picture(tmp_path / "cat" / "1.png")
    with pytest.raises(ConfigError, match="split='train', but there are no folders train, val or test"):
        load(tmp_path, 4, split="train")


def test_captions_in_a_table_and_beside_the_pictures(tmp_path):
    for folder in ("table", "texts"):
        picture(tmp_path / folder / "a.png", RED)
        picture(tmp_path / folder / "b.png", BLUE)
    (tmp_path / "table" / "metadata.csv").write_text('file_name,text\nb.png,"blue, deep"\na.png,\n')
    (tmp_path / "texts" / "a.txt").write_text("a red\npicture\n")
    table, texts = load(tmp_path / "table", 4), load(tmp_path / "texts", 4)
    assert (table.ids, table.captions) == (("b.png", "a.png"), ("blue, deep", ""))
    assert (texts.ids, texts.captions) == (("a.png", "b.png"), ("a red picture", ""))
    dropped = load(tmp_path / "texts", 4, blank="drop")
    assert dropped.ids == ("a.png",)


def test_a_flat_folder_is_a_set_without_classes(tmp_path):
    picture(tmp_path / "b.png", BLUE)
    picture(tmp_path / "a.png", RED)
    found = load(tmp_path, 4)
    assert (found.classes, found.captions, found.ids) == ((), ("", ""), ("a.png", "b.png"))


def test_what_no_reader_uses_is_named_in_one_warning(tmp_path, caplog):
    picture(tmp_path / "a.png")
    picture(tmp_path / "unlisted.png")
    (tmp_path / "train.jsonl").write_text("{}")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "red"}')
    with caplog.at_level(logging.WARNING):
        load(tmp_path, 4)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.endswith("2 files are not read: train.jsonl, unlisted.png")


@pytest.mark.parametrize("written", ["caf\u00e9.png", "cafe\u0301.png", "sub\\caf\u00e9.png"])
@pytest.mark.parametrize("there", ["caf\u00e9.png", "cafe\u0301.png"])
def test_names_are_compared_in_one_form(written, there, tmp_path):
    folder = "sub/" if "\\" in written else ""
    picture(tmp_path / folder / there)
    line = json.dumps({"file_name": written, "text": "a cup"})
    (tmp_path / "metadata.jsonl").write_text(line)
    assert load(tmp_path, 4).ids == (folder + there,)


def test_two_files_of_captions_are_refused(tmp_path):
    picture(tmp_path / "a.png")
    for name in ("metadata.jsonl", "metadata.csv"):
        (tmp_path / name).write_text("")
    with pytest.raises(DataError, match=r"metadata.jsonl and metadata.csv, expected one of the two"):
        load(tmp_path, 4)
