"""Named sets, the in-memory set itself, and what each says about bad input."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ditkit.core.errors import ConfigError, DataError
from ditkit.data import ImageSet, load, names
from ditkit.data.sets import emoji, fashion

pytestmark = pytest.mark.usefixtures("nothing_installed")
RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# -- the set itself


def tiny_set(**changes) -> ImageSet:
    fields = {
        "name": "tiny",
        "images": torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1),
        "labels": torch.tensor([1, 0, 1]),
        "classes": ("cat", "dog"),
        "captions": ("a", "b", "c"),
        "ids": ("1", "2", "3"),
    }
    return ImageSet(**(fields | changes))


def test_floats_span_minus_one_to_one():
    assert tiny_set().images_float().flatten().tolist() == pytest.approx([-1.0, -0.6, 1.0])
    assert tiny_set().images_float([2, 0]).flatten().tolist() == [1.0, -1.0]
    assert tiny_set().images_float([]).shape == (0, 1, 1, 1)
    assert tiny_set().images_float(torch.tensor([1])).dtype == torch.float32


def test_subset_keeps_rows_together():
    chosen = tiny_set().subset([2, 1])
    assert (chosen.ids, chosen.captions, chosen.labels.tolist()) == (("3", "2"), ("c", "b"), [1, 0])
    assert chosen.images.flatten().tolist() == [255, 51]
    assert chosen.classes == ("cat", "dog")


def test_label_of_an_unknown_class_names_the_nearest():
    assert tiny_set().label("dog") == 1
    with pytest.raises(ConfigError, match="unknown class of tiny 'dgo'; did you mean 'dog'"):
        tiny_set().label("dgo")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": torch.zeros(3, 1, 1, 1)}, r"torch.float32 \[3, 1, 1, 1\], expected torch.uint8"),
        ({"captions": ("a",)}, r"lengths differ: .*'captions': 1"),
        ({"labels": torch.tensor([0, 1, 2])}, r"labels span 0..2, expected 0..1 for 2 classes"),
        ({"classes": ()}, r"labels span 0..1, expected 0..0 for 0 classes"),
    ],
)
def test_inconsistent_sets_are_refused(changes, message):
    with pytest.raises(DataError, match=message):
        tiny_set(**changes)


# -- load


def test_names_are_the_files_of_the_folder():
    assert names() == (
        *(
            "beijing",
            "electricity",
            "emoji",
            "fashion",
            "flights",
            "landsat",
            "moving-digits",
            "openmoji",
            "rain",
            "school",
            "solar",
            "traffic",
            "vizdoom",
            "winds",
        ),
    )


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        (
            ("emojy",),
            {},
            DataError,
            "unknown data set 'emojy'; did you mean 'emoji'.*no folder, .csv, .tsv, .parquet or .nc file of that name",
        ),
        (("emoji", 0), {}, ConfigError, "size=0 is not a positive whole number"),
        (("emoji", 65), {}, ConfigError, "size=65 is outside 1..64"),
        (
            ("emoji",),
            {"level": "high"},
            ConfigError,
            "unknown option of data set 'emoji': 'level'.*skin_tones",
        ),
        (("fashion", 30), {}, ConfigError, r"size=30, expected 28 \(as is\) or 32"),
        (
            ("fashion",),
            {"split": "tset"},
            ConfigError,
            "unknown split of fashion 'tset'; did you mean 'test'",
        ),
        (("emoji",), {}, DataError, "npm pack emoji-datasource-google@16.0.0"),
        (("fashion",), {}, DataError, "apt-get install --no-install-recommends dataset-fashion-mnist"),
    ],
)
def test_load_refuses(args, options, error, message):
    with pytest.raises(error, match=message) as caught:
        load(*args, **options)
    assert "\n" not in str(caught.value)


# -- emoji


EMOJI = [
    {"name": "RED CAT", "subcategory": "cat-face", "image": "1f1.png", "sheet_x": 0, "sheet_y": 0},
    {"name": "Blue Hand", "subcategory": "body", "image": "1f2.png", "sheet_x": 1, "sheet_y": 0},
    {"name": "HIDDEN", "subcategory": "hidden", "image": "1f3.png", "sheet_x": 1, "sheet_y": 1},
]


@pytest.fixture
def emoji_files(monkeypatch) -> dict[str, bytes]:
    """A sheet of 2 x 2 cells: a red one, a blue one with a brown variation below, each half transparent."""
    table = [e | {"has_img_google": e["name"] != "HIDDEN"} for e in EMOJI]
    tone = {"image": "1f2-1f3fb.png", "sheet_x": 0, "sheet_y": 1, "has_img_google": True}
    table[1]["skin_variations"] = {"1F3FB": tone, "1F3FB-1F3FF": tone | {"has_img_google": False}}
    sheet = Image.new("RGBA", (132, 132))
    sheet.paste((*RED, 255), (1, 1, 65, 33))
    sheet.paste((*BLUE, 255), (67, 1, 131, 33))
    sheet.paste((128, 64, 0, 255), (1, 67, 65, 99))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    files = {emoji.TABLE: json.dumps(table).encode(), emoji.SHEET: buffer.getvalue()}
    monkeypatch.setattr(emoji, "FILE_SHA256", {name: sha256(content) for name, content in files.items()})
    return files


def pack(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def unpack(files: dict[str, bytes], folder: Path) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def check_fake_emoji(found: ImageSet) -> None:
    assert found.classes == ("body", "cat-face")
    assert found.labels.tolist() == [1, 0]
    assert found.captions == ("red cat", "blue hand")
    assert found.ids == ("1f1", "1f2")
    assert found.images.shape == (2, 3, 4, 4)
    for image, colour in zip(found.images, (RED, BLUE), strict=True):
        assert image[:, 0, 0].tolist() == image[:, 1, 3].tolist() == list(colour)
        assert image[:, 2, 0].tolist() == image[:, 3, 3].tolist() == list(WHITE)


def test_emoji_from_the_archive(emoji_files, tmp_path, monkeypatch):
    archive = pack(emoji_files)
    monkeypatch.setattr(emoji, "ARCHIVE_SHA256", sha256(archive))
    monkeypatch.setenv("DITKIT_DATA", str(tmp_path))
    (tmp_path / emoji.ARCHIVE).write_bytes(archive)
    check_fake_emoji(load("emoji", 4))


def test_emoji_from_an_installed_package(emoji_files):
    unpack(emoji_files, Path("node_modules") / emoji.PACKAGE)
    check_fake_emoji(load("emoji", 4))


def test_emoji_skin_tones_are_captioned(emoji_files):
    unpack(emoji_files, Path("node_modules") / emoji.PACKAGE)
    found = load("emoji", 4, skin_tones=True)
    assert found.captions == ("red cat", "blue hand", "blue hand, light skin tone")
    assert found.labels.tolist() == [1, 0, 0]
    assert found.images[2, :, 0, 0].tolist() == [128, 64, 0]


def test_emoji_of_another_checksum_quotes_both(emoji_files):
    archive = pack(emoji_files)
    Path(emoji.ARCHIVE).write_bytes(archive)
    with pytest.raises(DataError, match=f"{sha256(archive)}, expected {emoji.ARCHIVE_SHA256}"):
        load("emoji")


def test_emoji_of_an_incomplete_package_names_the_file(emoji_files):
    unpack({emoji.TABLE: emoji_files[emoji.TABLE]}, Path(emoji.PACKAGE))
    with pytest.raises(DataError, match=r"cannot read .*64\.png: No such file"):
        load("emoji")


# -- fashion


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return gzip.compress(header + array.tobytes(), mtime=0)


@pytest.fixture
def fashion_folder(tmp_path, monkeypatch) -> Path:
    images = np.arange(2 * 28 * 28).reshape(2, 28, 28).astype(np.uint8)
    pins = {}
    for prefix, labels in (("train", [9, 0]), ("t10k", [3, 3])):
        arrays = {"images-idx3": images, "labels-idx1": np.array(labels, np.uint8)}
        for kind, array in arrays.items():
            content = idx(array)
            name = f"{prefix}-{kind}-ubyte.gz"
            (tmp_path / name).write_bytes(content)
            pins[name] = sha256(content)
    monkeypatch.setattr(fashion, "FILE_SHA256", pins)
    monkeypatch.setattr(fashion, "DEBIAN_FOLDER", tmp_path)
    return tmp_path


def test_fashion_is_padded_with_black(fashion_folder):
    plain, padded = load("fashion"), load("fashion", 32)
    assert plain.images.shape == (2, 1, 28, 28)
    assert plain.images[1, 0, 0, :3].tolist() == [16, 17, 18]  # 784 mod 256
    assert torch.equal(padded.images[:, :, 2:30, 2:30], plain.images)
    assert padded.images.long().sum() == plain.images.long().sum()
    assert plain.captions == ("ankle boot", "t-shirt or top")
    assert plain.ids == ("train-00000", "train-00001")


def test_fashion_test_split(fashion_folder):
    assert load("fashion", split="test").labels.tolist() == [3, 3]


def test_fashion_in_a_folder_of_the_users_choice(fashion_folder, monkeypatch):
    monkeypatch.setenv("DITKIT_DATA", str(fashion_folder.parent))
    monkeypatch.setattr(fashion, "DEBIAN_FOLDER", Path("absent"))
    fashion_folder.rename(fashion_folder.parent / "fashion-mnist")
    assert len(load("fashion")) == 2


def test_fashion_of_another_checksum_quotes_both(fashion_folder):
    path = fashion_folder / "train-labels-idx1-ubyte.gz"
    expected = fashion.FILE_SHA256[path.name]
    path.write_bytes(b"damaged")
    with pytest.raises(DataError, match=f"{sha256(b'damaged')}, expected {expected}"):
        load("fashion")


def test_fashion_header_that_does_not_fit_its_data(fashion_folder, monkeypatch):
    name = "train-labels-idx1-ubyte.gz"
    content = gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 3, 1, 1]))
    (fashion_folder / name).write_bytes(content)
    monkeypatch.setitem(fashion.FILE_SHA256, name, sha256(content))
    with pytest.raises(DataError, match="header 0000080100000003 does not fit 2 data bytes"):
        load("fashion")


# -- the real packages


def load_or_skip(name: str, *args, **options) -> ImageSet:
    try:
        return load(name, *args, **options)
    except DataError as error:
        if "not on this machine" not in str(error):
            raise
        pytest.skip(str(error))


def test_real_emoji():
    found = load_or_skip("emoji")
    assert found.images.shape == (1911, 3, 32, 32)
    assert len(found.classes) == 99
    assert len(set(found.ids)) == 1911
    assert found.labels.bincount(minlength=99).min() == 1
    kangaroo = found.captions.index("kangaroo")
    assert found.classes[found.labels[kangaroo]] == "animal-mammal"
    orange = found.images[found.captions.index("large orange circle"), :, 16, 16].tolist()
    assert orange[0] > 230 > orange[1] > 100 > orange[2]
    corners = found.images[found.captions.index("large orange circle")][:, [0, 0, 31, 31], [0, 31, 0, 31]]
    assert (corners == 255).all()


def test_real_emoji_skin_tones():
    found = load_or_skip("emoji", 16, skin_tones=True)
    assert len(set(found.ids)) == len(found) == 3786
    assert "waving hand sign, medium-dark skin tone" in found.captions


def test_real_fashion():
    found = load_or_skip("fashion", 32)
    assert found.images.shape == (60000, 1, 32, 32)
    assert found.labels.bincount().tolist() == [6000] * 10
    assert found.captions[0] == "ankle boot"
    # the mean that every Fashion-MNIST loader normalises by, over the 28 x 28 pictures
    assert found.images.float().mean().item() / 255 * (32 / 28) ** 2 == pytest.approx(0.2860, abs=1e-4)
    assert load_or_skip("fashion", split="test").labels.bincount().tolist() == [1000] * 10
