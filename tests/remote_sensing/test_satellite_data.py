"""Satellite series: simulated from one scene, or read from folders of GeoTIFFs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ditkit.core.errors import ConfigError, DataError
from ditkit.data.loading import accepts_option, load, load_images, load_satellite
from ditkit.data.rasters import corners, date_in, holds_rasters, read_place
from ditkit.data.satellite import SatelliteSet, Weather, calendar_of
from ditkit.data.sets import landsat
from satellite_support import SIDE, ground, scene

rasterio = pytest.importorskip("rasterio")
GRID = rasterio.transform.from_origin(288_000, 9_120_000, 30, 30)


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(landsat, "read_scene", scene)


def write(
    path: Path, values: Any, crs: str | None = "EPSG:31985", transform: Any = GRID, **tags: str
) -> Path:
    values = np.asarray(values)
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = values.shape
    profile = {
        "driver": "GTiff",
        "count": count,
        "height": height,
        "width": width,
        "dtype": values.dtype.name,
    }
    with rasterio.open(path, "w", **profile, crs=crs, transform=transform) as file:
        file.write(values)
        file.update_tags(**tags)
    return path


def farm(
    folder: Path, dates: tuple[str, ...] = ("20240105", "20240121", "20240206", "20240222"), side: int = 16
) -> Path:
    """A place of four dates, 16-bit, with masks, radar and classes."""
    draw = np.random.default_rng(0)
    for i, day in enumerate(dates):
        write(folder / f"S2_{day}.tif", draw.integers(200, 5000, (3, side, side)).astype(np.uint16))
        mask = np.zeros((1, side, side), np.uint8)
        mask[0, : side // 2, i * 2 : i * 2 + 4] = 1
        write(folder / "clouds" / f"mask_{day}.tif", mask)
        write(folder / "radar" / f"{day}.tif", draw.normal(-15, 3, (2, side, side)).astype(np.float32))
        write(folder / "classes" / f"{day}.tif", draw.integers(0, 3, (1, side, side)).astype(np.uint8))
    return folder


# -- simulated


def test_a_window_is_the_same_in_any_batch_and_splits_share_no_pixel(simulated):
    data = landsat.load(size=16, frames=5, length=20)
    first, both = data.scenes(torch.tensor([7])), data.scenes(torch.tensor([3, 7]))
    for name, value in first._asdict().items():
        other = getattr(both, name)[1:]
        assert np.array_equal(value, other) if name == "dates" else torch.equal(value, other)
    assert first.image.shape == first.observed.shape == (1, 6, 5, 16, 16) and first.radar.shape == (
        1,
        2,
        5,
        16,
        16,
    )
    assert first.image.abs().max() <= 1 and first.known.all() and first.present.all()
    test = landsat.load(size=16, frames=5, split="test")
    assert test.rows[1] == data.rows[0] == SIDE // 4 and (test.rows[0], data.rows[1]) == (0, SIDE)
    assert isinstance(data, SatelliteSet) and "clouds" in data.simulated
    with pytest.raises(ConfigError, match="unknown split of landsat 'tset'; did you mean 'test'"):
        landsat.load(split="tset")
    with pytest.raises(ConfigError, match="size=64 x 64 does not fit into the 24 x 96 pixels of split=test"):
        landsat.load(split="test")


def test_seasons_belong_to_parcels_of_the_scene_and_truth_differs_between_dates(simulated):
    data = landsat.load(size=32, frames=6, length=50)
    scenes = data.scenes(torch.arange(20))
    assert scenes.image.std(2).mean() > 0.01
    day = torch.tensor([100.0, 200.0])
    whole = landsat.LandsatSeries(data.ground, (0, SIDE), 2, (24, 24), "train", 1, 0, Weather())._season
    shifted = whole(day, (12, 12), torch.Generator())
    assert torch.equal(whole(day, (0, 0), torch.Generator())[:, 12:, 12:], shifted[:, :12, :12])
    labels = scenes.labels
    assert labels.min() >= 0 and labels.max() <= 3 and (labels[:, 1:] != labels[:, :-1]).any()
    assert (labels == 0).any(), "water"
    assert np.diff(scenes.dates.astype(int), axis=1).min() >= landsat.REVISIT_DAYS
    assert torch.equal(scenes.days[:, 0], torch.zeros(20)) and 1 <= scenes.day_of_year.min() <= 366


@pytest.mark.parametrize(("least", "most"), [(0.0, 0.0), (0.5, 0.85), (1.0, 1.0)])
def test_clouds_cover_the_share_that_is_asked_for_and_shadows_fall_beside_them(least, most):
    sky = Weather(least, most).draw(12, (16, 24), torch.Generator().manual_seed(0))
    cover = (sky.cloud > 0).float().mean((1, 2))
    assert cover.min() >= least - 0.01 and cover.max() <= most + 0.01
    assert not ((sky.cloud > 0) & (sky.shadow > 0)).any()
    image = torch.rand(3, 12, 16, 24) * 2 - 1
    under = sky.over(image)
    clear = ~sky.hidden.expand_as(image)
    torch.testing.assert_close(under[clear], image[clear])
    assert not least or not torch.allclose(under, image)
    dark = (sky.shadow > 0).expand_as(image)
    assert (under[dark] <= image[dark]).all()
    with pytest.raises(ConfigError, match=r"least=0.9 is above most=0.5"):
        Weather(0.9, 0.5)


def test_speckle_keeps_the_mean_power_and_radar_has_its_scaling():
    kinds = [
        landsat.LandsatSeries(ground(), (0, SIDE), 4, (32, 32), "train", 8, 0, Weather(), s)
        for s in (True, False)
    ]
    rough, smooth = (10 ** (kind.scenes(torch.arange(8)).radar / 10) for kind in kinds)
    assert (rough.mean() / smooth.mean()).item() == pytest.approx(1, abs=0.03)
    contrast = ((rough / smooth).std() / (rough / smooth).mean()).item()
    assert contrast == pytest.approx(landsat.LOOKS**-0.5, abs=0.03)
    mean, std = kinds[0].radar_scaling()
    assert len(mean) == len(std) == 2 and mean[1] < mean[0] < 0 < std[0]


def test_the_missing_package_and_scene_are_named(nothing_installed, monkeypatch, tmp_path):
    landsat.read_scene.cache_clear()
    monkeypatch.setattr(landsat, "DEBIAN_FILE", tmp_path / "absent.tif")
    with pytest.raises(DataError, match=r"apt-get download r-cran-stars.*DITKIT_DATA"):
        landsat.load()
    monkeypatch.setitem(__import__("sys").modules, "rasterio", None)
    with pytest.raises(ConfigError, match=re.escape("pip install 'ditkit[satellite]'")):
        read_place(farm_of_names(tmp_path))


def farm_of_names(folder: Path) -> Path:
    (folder / "20240101.tif").write_bytes(b"II*\0")
    return folder


def test_real_landsat_is_the_pinned_scene_with_towns_fields_and_sea():
    try:
        data = landsat.load(size=64, length=4)
    except DataError:
        pytest.skip("r-cran-stars is not on this machine")
    assert data.ground.reflectance.shape == (6, 352, 349)
    shares = [float((data.scenes(torch.arange(4)).labels == k).float().mean()) for k in range(4)]
    assert min(shares[1:]) > 0.01
    longitude, latitude = data.scenes(torch.tensor([0])).place[0].tolist()
    assert -34.92 < longitude < -34.82 and -8.05 < latitude < -7.94


# -- GeoTIFFs


@pytest.mark.parametrize(
    ("text", "day"),
    [
        ("S2A_MSIL2A_20240531T103031_N0510", "2024-05-31"),
        ("farm 2024-05-31", "2024-05-31"),
        ("2024:05:31 10:30:31", "2024-05-31"),
        ("LC08_2024152_T1", "2024-05-31"),
        ("LE07_214066_20240531", "2024-05-31"),
        ("scene-12345678", None),
        ("20241399", None),
        ("b04", None),
    ],
)
def test_dates_are_read_from_names_as_people_write_them(text, day):
    assert date_in(text) == (None if day is None else np.datetime64(day))


def test_calendars_count_from_the_first_date_and_from_new_year():
    days, of_year = calendar_of(np.array([["2023-12-31", "2024-02-29", "2024-12-31"]], "M8[D]"))
    assert days.tolist() == [[0, 60, 366]] and of_year.tolist() == [[365, 60, 366]]


def test_a_folder_is_read_with_masks_radar_classes_and_its_place(tmp_path):
    root = farm(tmp_path / "farm")
    assert holds_rasters(root) and accepts_option(root, "scale")
    data = load(root, 8, frames=4, least_cloud=0.25, most_cloud=0.25)
    assert isinstance(data, SatelliteSet) and len(data) == 4 and data.id(0) == "farm@2024-01-05+0+0"
    scenes = load_satellite(root, 8, frames=4, least_cloud=0.25, most_cloud=0.25).scenes(torch.arange(4))
    with rasterio.open(root / "S2_20240105.tif") as file:
        expected = torch.from_numpy(file.read().astype(np.float32)) / 10_000 * 2 - 1
    masked = torch.zeros(16, 16, dtype=torch.bool)
    masked[:8, :4] = True
    assert torch.equal(scenes.known[0, 0, 0], ~masked[:8, :8])
    seen = scenes.image[0, :, 0].masked_fill(masked[:8, :8], 0)
    torch.testing.assert_close(seen, expected[:, :8, :8].masked_fill(masked[:8, :8], 0))
    assert (scenes.hidden & ~scenes.known).sum() == (~scenes.known).sum()
    assert scenes.hidden.float().mean() > 0.25 and scenes.radar.shape == (4, 2, 4, 8, 8)
    assert (
        scenes.labels.max() == 2
        and data.classes == ("0", "1", "2")
        and scenes.days[0].tolist() == [0, 16, 32, 48]
    )
    longitude, latitude = scenes.place[0].tolist()
    assert -35 < longitude < -34.8 and -8.1 < latitude < -7.9
    places = tmp_path / "farms"
    for name in ("a", "b"):
        farm(places / name)
    assert [path.name for path in sorted(places.iterdir())] == ["a", "b"] and len(
        load(places, 16, frames=3)
    ) == 4


def test_short_series_are_filled_up_and_every_fifth_crop_is_held_out(tmp_path):
    root = farm(tmp_path / "farm")
    data = load_satellite(root, 16, frames=6)
    scenes = data.scenes(torch.tensor([0]))
    assert scenes.present[0].tolist() == [True] * 4 + [False] * 2 and not scenes.known[:, :, 4:].any()
    assert scenes.labels[0, 4:].unique().tolist() == [-1]
    wide = farm(tmp_path / "wide", side=24)
    parts = {split: load_satellite(wide, 8, frames=4, split=split) for split in ("all", "train", "test")}
    names = {split: {part.id(i) for i in range(len(part))} for split, part in parts.items()}
    assert parts["train"].has_split and not parts["all"].has_split
    assert (
        names["train"] | names["test"] == names["all"]
        and not names["train"] & names["test"]
        and names["test"]
    )
    assert corners(20, 8) == [0, 8, 12] and corners(16, 8, 4) == [0, 4, 8]


@pytest.mark.parametrize("side", [20, 16])
def test_no_pixel_of_the_test_crops_is_trained_on_and_too_few_crops_are_not_split(side, tmp_path):
    root = farm(tmp_path / "farm", side=side)
    parts = [load_satellite(root, 8, frames=4, split=split) for split in ("train", "test")]
    counts = []
    for part in parts:
        met = np.zeros((side, side), bool)
        for _, _, top, left in part.windows:
            met[top : top + 8, left : left + 8] = True
        counts.append(met)
    if side == 20:
        assert not (counts[0] & counts[1]).any() and counts[0].any() and counts[1].sum() == 64
    else:
        assert parts[0].windows == parts[1].windows
    assert {part.has_split for part in parts} == {side == 20}


def test_radar_statistics_are_of_what_was_measured(tmp_path):
    root = farm(tmp_path / "farm")
    own = load_satellite(root, 16, frames=4)
    padded = load_satellite(root, 16, frames=8)
    assert padded.scenes(torch.tensor([0])).radar[:, :, 4:].isnan().all()
    assert padded.radar_scaling() == own.radar_scaling()
    values = np.full((2, 16, 16), -15, np.float32)
    values[0, :4] = np.nan
    values[:, 4] = -9999
    write(root / "radar" / "20240105.tif", values)
    with rasterio.open(root / "radar" / "20240105.tif", "r+") as file:
        file.nodata = -9999.0
    radar = read_place(root).radar
    assert radar[0, :, :5].isnan().all() and (radar[0, :, 5:] == -15).all() and radar[1:].isfinite().all()
    holes = load_satellite(root, 16, frames=4).radar_scaling()
    assert all(np.isfinite(holes).flatten())
    for path in (root / "radar").iterdir():
        write(path, np.full((2, 16, 16), np.nan, np.float32))
    with pytest.raises(DataError, match="a radar band has no values"):
        load_satellite(root, 16, frames=4).radar_scaling()


def test_no_data_in_one_band_hides_a_pixel(tmp_path):
    values = np.full((3, 8, 8), 1000, np.uint16)
    values[1, 2, 3] = 0
    values[:, 5, 5] = 0
    write(tmp_path / "2024-01-01.tif", values)
    with rasterio.open(tmp_path / "2024-01-01.tif", "r+") as file:
        file.nodata = 0
    write(tmp_path / "2024-01-05.tif", values)
    place = read_place(tmp_path)
    assert place.hidden[0].nonzero().tolist() == [[2, 3], [5, 5]] and not place.hidden[1].any()


def test_files_of_another_type_are_refused_unless_a_scale_is_given(tmp_path):
    write(tmp_path / "a" / "2024-01-01.tif", np.full((3, 8, 8), 1000, np.uint16))
    odd = write(tmp_path / "a" / "2024-01-05.tif", np.full((3, 8, 8), 0.1, np.float32))
    with pytest.raises(DataError, match=r"2024-01-05.tif holds float32, 2024-01-01.tif holds uint16.*scale="):
        read_place(tmp_path / "a")
    assert read_place(tmp_path / "a", 10_000).unit == 10_000
    odd.rename(tmp_path / "2024-01-05.tif")
    (tmp_path / "b").mkdir()
    (tmp_path / "2024-01-05.tif").rename(tmp_path / "b" / "2024-01-05.tif")
    with pytest.raises(
        DataError, match=r"b holds float32 \(1 is .*a holds uint16 \(10000 is .*expected one unit"
    ):
        load_satellite(tmp_path, 8, frames=2)
    assert len(load_satellite(tmp_path, 8, frames=2, scale=10_000)) == 2


@pytest.mark.parametrize("with_classes", ["a", "b"])
def test_places_with_classes_may_lie_beside_others(with_classes, tmp_path):
    for name in ("a", "b"):
        root = farm(tmp_path / name)
        if name != with_classes:
            for path in (root / "classes").iterdir():
                path.unlink()
    data = load_satellite(tmp_path, 16, frames=4)
    labels = data.scenes(torch.arange(2)).labels
    bare = 1 if with_classes == "a" else 0
    assert (labels[bare] == -1).all() and (labels[1 - bare] >= 0).all() and labels.dtype == torch.int64


def test_splits_of_the_real_scene_share_no_parcel():
    assert landsat.row_of(0.25, 352) == 84 and 84 % landsat.PARCEL_PX == 0
    assert (landsat.row_of(0.0, 352), landsat.row_of(1.0, 352)) == (0, 352)
    data = landsat.LandsatSeries(ground(), (24, SIDE), 2, (8, 8), "train", 9, 0, Weather())
    top, left = data.corner(5)
    near = torch.lerp(*torch.lerp(*data.ground.place, (top + 4) / SIDE), (left + 4) / SIDE)
    torch.testing.assert_close(data.scenes(torch.tensor([5])).place[0], near)


def test_dates_come_from_tags_where_names_have_none(tmp_path):
    values = np.ones((1, 8, 8), np.float32) * 0.5
    for name, day in (("a", "2024:03:02 10:00:00"), ("b", "2024:01:02 10:00:00")):
        write(tmp_path / "optical" / f"{name}.tif", values, TIFFTAG_DATETIME=day)
    place = read_place(tmp_path)
    assert [path.name for path in place.files] == ["b.tif", "a.tif"]
    assert place.dates.tolist() == np.array(["2024-01-02", "2024-03-02"], "M8[D]").tolist()


def test_no_data_and_what_is_not_finite_are_hidden(tmp_path):
    values = np.full((2, 8, 8), 0.25, np.float32)
    values[0, 0, 0] = np.nan
    write(tmp_path / "2024-01-01.tif", values)
    with rasterio.open(tmp_path / "2024-01-01.tif", "r+") as file:
        file.nodata = -9999.0
        values[:, 1, 1] = -9999.0
        file.write(values)
    write(tmp_path / "2024-01-05.tif", np.full((2, 8, 8), 7.0, np.float32))
    place = read_place(tmp_path)
    assert place.hidden[0].nonzero().tolist() == [[0, 0], [1, 1]] and not place.hidden[1].any()
    assert place.optical.isfinite().all() and (place.optical[1] == 1).all()  # cut to 1


def shifted(root: Path) -> None:
    write(
        root / "20240301.tif",
        np.ones((3, 16, 16), np.uint16),
        transform=rasterio.transform.from_origin(288_030, 9_120_000, 30, 30),
    )


BROKEN = {
    "shifted": (
        shifted,
        r"20240301.tif lies on another grid than S2_20240105.tif: 16 x 16 pixels of 30 x 30 from \(288030",
    ),
    "smaller": (
        lambda r: write(r / "20240301.tif", np.ones((3, 8, 16), np.uint16)),
        "another grid.*8 x 16 pixels",
    ),
    "other system": (
        lambda r: write(r / "20240301.tif", np.ones((3, 16, 16), np.uint16), crs="EPSG:32722"),
        "another grid.*EPSG:32722",
    ),
    "radar elsewhere": (
        lambda r: write(r / "radar" / "20240222.tif", np.ones((2, 8, 8), np.float32)),
        "radar/20240222.tif lies on another grid",
    ),
    "mask elsewhere": (
        lambda r: write(r / "clouds" / "mask_20240222.tif", np.ones((1, 8, 8), np.uint8)),
        "mask_20240222.tif lies on another grid",
    ),
    "other bands": (
        lambda r: write(r / "20240301.tif", np.ones((4, 16, 16), np.uint16)),
        "has 4 bands, S2_20240105.tif has 3",
    ),
    "no date": (
        lambda r: write(r / "field.tif", np.ones((3, 16, 16), np.uint16)),
        "field.tif has no date, expected one in its name .*TIFFTAG_DATETIME",
    ),
    "twice": (
        lambda r: write(r / "again-2024-01-05.tif", np.ones((3, 16, 16), np.uint16)),
        "are both of 2024-01-05, expected one file a date",
    ),
    "mask of nothing": (
        lambda r: write(r / "clouds" / "20250101.tif", np.ones((1, 16, 16), np.uint8)),
        "is a mask of 2025-01-01, of which farm has no image",
    ),
    "damaged": (lambda r: (r / "20240301.tif").write_bytes(b"II*\0broken"), "cannot read .*20240301.tif"),
    "complex": (
        lambda r: write(r / "20240301.tif", np.ones((3, 16, 16), np.complex64)),
        "holds complex64, expected whole or real numbers",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_folders_that_do_not_fit_are_refused_in_one_line(kind, tmp_path):
    root = farm(tmp_path / "farm")
    spoil, message = BROKEN[kind]
    spoil(root)
    before = {path: path.read_bytes() for path in root.rglob("*.tif")}
    with pytest.raises(DataError, match=message) as caught:
        load_satellite(root, 8, frames=4)
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in root.rglob("*.tif")} == before


def test_all_clouds_an_empty_folder_and_crops_too_large_are_refused(tmp_path):
    root = farm(tmp_path / "farm")
    with pytest.raises(DataError, match=r"has 16 x 16 pixels .*smaller than size=32 x 32"):
        load_satellite(root, 32, frames=4)
    for path in (root / "clouds").iterdir():
        write(path, np.ones((1, 16, 16), np.uint8))
    assert len(load_satellite(root, 8, frames=4))  # with radar there is something to go by
    for part in ("radar", "classes"):
        for path in (root / part).iterdir():
            path.unlink()
        (root / part).rmdir()
    with pytest.raises(DataError, match="every pixel of all 4 dates is hidden"):
        load_satellite(root, 8, frames=4)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no GeoTIFFs, expected dated files"):
        load_satellite(tmp_path / "empty")
    with pytest.raises(ConfigError, match=r"farm holds satellite series, expected clips|holds no videos"):
        from ditkit.data.loading import load_clips

        load_clips(root)
    with pytest.raises(
        DataError, match=r"4 dates of 3 bands .*: 12,288 bytes, expected at most max_bytes=10,000"
    ):
        load_satellite(root, 8, frames=4, max_bytes=10_000)
    with pytest.raises(ConfigError, match="scale=0, expected a positive number"):
        load_satellite(root, 8, scale=0)


def test_a_folder_of_pictures_in_tiff_is_still_one_of_pictures(tmp_path):
    from PIL import Image

    for kind in ("cat", "dog"):
        (tmp_path / kind).mkdir()
        Image.new("RGB", (16, 16)).save(tmp_path / kind / "20240101.tif")
    assert load_images(tmp_path, 16).classes == ("cat", "dog")
