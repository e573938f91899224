"""Comparisons: what each row says is what independent runs give, and the files hold it and nothing else."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from ditkit.api.compare import compare
from ditkit.bench import bench
from ditkit.bench.bench import pooled_psnr_db
from ditkit.bench.rows import headline, titles
from ditkit.caching.taylorseer import TaylorSeer
from ditkit.core.cond import Cond
from ditkit.core.errors import ConfigError, NoEffectError
from ditkit.core.labels import resolve_labels
from ditkit.metrics.features import EfficientNetLite0
from ditkit.report.plots import Box, look_of, place, ticks
from ditkit.report.report import Report
from ditkit.sample import ClassifierFree, Euler, Heun, Unguided, sample
from rig import TINY, tiny_dit

STEPS, CONVERGED, SEEDS = 12, 60, (0, 1, 2)
POLICIES = (TaylorSeer(interval=1), TaylorSeer(interval=4, order=0), TaylorSeer(interval=4, order=2))
NEUTRAL, REUSE, FORECAST = titles(POLICIES)
REQUIRED = {
    "name", "seconds", "speedup", "macs", "macs_ratio", "peak_bytes", "policy_bytes", "psnr_db", "ssim",
    "relative_l2", "psnr_converged_db", "control_psnr_db", "receipt",
}  # fmt: skip


def compared(policies=(), seeds=SEEDS, **settings) -> Report:
    quick = {"steps": STEPS, "converged_steps": CONVERGED, "rounds": 1, "memory": False}
    return compare(tiny_dit(), policies=policies, seeds=seeds, **(quick | settings))


def drawn(steps=STEPS, policies=(), labels=(0, 1, 2)) -> torch.Tensor:
    """What the default comparison draws, drawn without it."""
    cond = Cond(label=torch.tensor(labels))
    return sample(
        tiny_dit(), cond, SEEDS, steps=steps, guidance=ClassifierFree(2.0), policies=policies
    ).samples


@pytest.fixture(scope="module")
def report() -> Report:
    return compared(POLICIES, label=[0, 1, 2], controls_as_rows=True)


@pytest.fixture(scope="module")
def rows(report):
    return {row.name: row for row in report.rows}


def test_exact_comes_first_then_policies_then_each_number_of_control_steps_once(report):
    expected = ["exact", NEUTRAL.name, REUSE.name, FORECAST.name, "exact, 4 steps"]
    assert [row.name for row in report.rows] == expected
    assert [row.kind for row in report.rows] == ["exact", "policy", "policy", "policy", "control"]


def test_errors_are_those_of_separate_runs(rows):
    exact, converged, fewer = drawn(), drawn(CONVERGED), drawn(4)
    forecast = drawn(policies=[POLICIES[2]])
    row = rows[FORECAST.name]
    mean_square = (forecast.double() - exact.double()).square().mean().item()
    assert row.psnr_db == pytest.approx(10 * torch.tensor(4 / mean_square).log10().item(), abs=1e-4)
    assert row.psnr_converged_db == pooled_psnr_db(forecast, converged)
    assert row.control_steps == 4
    assert row.control_psnr_db == pooled_psnr_db(fewer, exact)
    assert row.control_psnr_converged_db == pooled_psnr_db(fewer, converged)
    assert rows["exact"].psnr_converged_db == pooled_psnr_db(exact, converged)
    assert row.psnr_worst_db < row.psnr_db
    assert row.relative_l2 > 0
    assert row.ssim < 1


def test_a_control_row_says_what_the_control_columns_say(rows):
    control, row = rows["exact, 4 steps"], rows[FORECAST.name]
    assert control.psnr_db == row.control_psnr_db
    assert control.psnr_converged_db == row.control_psnr_converged_db
    assert control.macs_ratio == row.control_macs_ratio == 4 / STEPS


def test_a_neutral_policy_is_identical_to_exact_and_so_is_its_control(report, rows):
    row = rows[NEUTRAL.name]
    assert row.identical
    assert (row.psnr_db, row.psnr_worst_db, row.relative_l2, row.macs_ratio) == (None, None, 0, 1)
    assert row.ssim == pytest.approx(1, abs=1e-12)
    assert (row.control_steps, row.control_identical, row.control_psnr_db) == (STEPS, True, None)
    assert torch.equal(report.pictures[NEUTRAL.name], report.pictures["exact"])
    assert not torch.equal(report.pictures[REUSE.name], report.pictures["exact"])


def test_macs_are_those_of_the_shapes(rows):
    c, tokens, pixels = TINY, 16, 12
    modulation = 4 * c.depth * c.width**2  # shifts and scales belong to a branch, gates do not
    branches = c.depth * (12 * c.width**2 * tokens + 2 * tokens**2 * c.width) + modulation
    conditioning = (256 + c.width) * c.width + (2 * c.depth + 2) * c.width**2
    forward = branches + conditioning + 2 * pixels * c.width * tokens
    lanes_and_samples = 2 * len(SEEDS)
    assert rows["exact"].macs == STEPS * forward * lanes_and_samples
    row = rows[FORECAST.name]
    assert (row.full_evaluations, row.evaluations) == (len(POLICIES[2].full_steps(STEPS)), STEPS)
    assert row.macs == (STEPS * forward - (STEPS - row.full_evaluations) * branches) * lanes_and_samples
    assert row.macs_ratio == row.macs / rows["exact"].macs
    assert not row.macs_uncounted


def test_bytes_and_receipts_are_the_trajectory_s_own(rows):
    row = rows[REUSE.name]
    branch = len(SEEDS) * 16 * TINY.width * 4
    assert row.policy_bytes == 2 * (2 * TINY.depth) * branch
    (receipt,) = row.receipt
    assert receipt["lanes"]["cond"] == receipt["lanes"]["uncond"]
    assert receipt["lanes"]["cond"]["computed"] == "0-1 5 9"
    assert rows["exact"].receipt == ()
    assert rows["exact"].policy_bytes == 0


def test_report_json_is_strict_and_complete(report, tmp_path):
    report.save(tmp_path)

    def refused(name):
        raise AssertionError(f"{name} is not JSON")

    saved = json.loads((tmp_path / "report.json").read_text(), parse_constant=refused)
    assert [row["name"] for row in saved["rows"]] == [row.name for row in report.rows]
    for row in saved["rows"]:
        assert set(row) >= REQUIRED
        assert not {"fid", "kid"} & set(row)
        assert row["psnr_db"] is not None or row["identical"]
    assert set(saved["definitions"]) >= REQUIRED - {"name"}
    settings = saved["settings"]
    assert (settings["seeds"], settings["labels"]) == ([0, 1, 2], ["0", "1", "2"])
    assert settings["model"]["parameters"] == sum(p.numel() for p in tiny_dit().parameters())
    assert saved["headline"] == report.headline


class Page(HTMLParser):
    """Every tag with its attributes; tags that are opened are closed in order."""

    VOID = ("meta", "img", "line", "circle", "polyline")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID or tag == "circle":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_report_html_is_one_file_that_fetches_nothing(report, tmp_path):
    report.save(tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf8")
    page = Page(text)
    assert page.open == []
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    assert not re.search(r"@import|url\(|https?://", text)
    images = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    assert len(images) == (len(report.rows) + 1) * len(SEEDS)
    assert all(src.startswith("data:image/png;base64,") for src in images)
    assert all(row.name in text for row in report.rows)
    plots = [attrs for tag, attrs in page.tags if tag == "svg" and attrs.get("role") == "img"]
    keys = [attrs for tag, attrs in page.tags if tag == "svg" and "aria-hidden" in attrs]  # of the legend
    assert len(plots) == 2 and len(plots) + len(keys) == sum(tag == "svg" for tag, _ in page.tags)
    # neutral has no finite error to exact; exact has one to the converged run
    markers = [(tag, attrs.get("points")) for tag, attrs in page.tags if tag in ("circle", "polygon")]
    assert len(markers) == 3 + len(report.rows) + len(keys)


def test_series_differ_by_shape_and_dash_as_well_as_by_colour():
    rows: list[Any] = [SimpleNamespace(kind="policy", series=f"series {index}") for index in range(12)]
    looks = [look_of(row, rows) for row in rows]
    assert len({(look.colour, look.shape) for look in looks}) == 12
    assert all(len({look[place] for look in looks[:6]}) == 6 for place in range(3))


def test_saving_replaces_whole_files_and_leaves_no_others(report, tmp_path):
    folder = tmp_path / "new" / "folder"
    first = report.save(folder)
    assert [path.name for path in first] == ["report.json", "report.html", "sheet.png"]
    assert report.save(folder) == first
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "report.json", "sheet.png"]
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="cannot write"):
        report.save(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "in the way"


def test_the_sheet_holds_every_picture_in_its_place(report, tmp_path):
    from PIL import Image

    from ditkit.report.sheet import CELL, GAP, LABEL_WIDTH, LINE, MARGIN

    report.save(tmp_path)
    page = Image.open(tmp_path / "sheet.png")
    for row, pictures in enumerate(report.pictures.values()):
        for column, picture in enumerate(pictures):
            x, y = MARGIN + LABEL_WIDTH + column * (CELL + GAP), MARGIN + LINE + row * (CELL + GAP)
            last = (x + CELL - 1, y + CELL - 1)
            assert page.getpixel((x, y)) == tuple(picture[:, 0, 0].tolist())
            assert page.getpixel(last) == tuple(picture[:, -1, -1].tolist())


def test_the_table_reads_at_80_columns(report):
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report.table())
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert f"{report.rows[2].psnr_db:.1f}" in text
    assert f"{report.rows[2].speedup:.2f}x" in text


def test_batches_change_the_cost_and_not_the_pictures(rows):
    batched = {row.name: row for row in compared(POLICIES, label=[0, 1, 2], batch_size=2).rows}
    row = batched[FORECAST.name]
    assert row.psnr_db == pytest.approx(rows[FORECAST.name].psnr_db, abs=1e-2)
    assert row.macs == rows[FORECAST.name].macs
    assert row.policy_bytes == rows[FORECAST.name].policy_bytes * 2 / 3
    assert len(row.receipt) == 1
    assert "exact, 4 steps" not in batched


def test_without_controls_their_columns_are_empty():
    row = compared(POLICIES[1:2], control=False).rows[1]
    assert row.control_steps is None
    assert row.control_psnr_db is None
    assert row.psnr_db is not None


def test_a_solver_of_two_evaluations_a_step_gets_a_control_of_the_same_cost():
    row = compared([TaylorSeer(interval=3, order=1)], solver=Heun(), guidance=Unguided()).rows[1]
    assert row.evaluations == 2 * STEPS - 1
    share = min(range(1, STEPS), key=lambda n: abs((2 * n - 1) / row.evaluations - row.macs_ratio))
    assert row.control_steps == share
    assert row.control_macs_ratio == (2 * share - 1) / row.evaluations


def test_real_pictures_add_distances_that_name_their_extractor(monkeypatch):
    monkeypatch.setattr(bench, "load_efficientnet_lite0", lambda: EfficientNetLite0().eval())
    real = torch.rand(5, 3, 8, 8) * 2 - 1
    report = compared(POLICIES[1:2], seeds=range(4), real=real, control=False)
    for row in report.as_dict()["rows"]:
        assert row["fid"] is None  # 192 features need 960 pictures
        assert isinstance(row["kid"], float)
        assert (row["n"], row["n_real"], row["extractor"]) == (4, 5, "efficientnet-lite0")
        assert 0 <= row["precision"] <= 1
    with pytest.raises(ConfigError, match="4 pictures in each set, got 5 real and 3 seeds"):
        compared(real=real)


def test_progress_counts_up_to_the_end_of_every_stage():
    told: dict[str, list[tuple[int, int]]] = {}
    compared(
        POLICIES[1:2], progress=lambda stage, done, total: told.setdefault(stage, []).append((done, total))
    )
    assert set(told) == {
        "counting MACs", "counting MACs of controls", f"drawing in {CONVERGED} steps", "timing", "comparing",
    }  # fmt: skip
    for steps in told.values():
        total = steps[0][1]
        assert steps == [(i + 1, total) for i in range(total)]


@pytest.mark.parametrize(
    ("policies", "settings", "message"),
    [
        ([POLICIES[1], POLICIES[1]], {}, r"TaylorSeer\(interval=4, order=0.* is given twice"),
        ([], {"seeds": (3, 1, 3)}, "seed 3 is given twice"),
        ([], {"label": [0, 1]}, "2 labels for 3 seeds"),
        ([], {"label": [7]}, "class 7 should lie between 0 and 3"),
        ([], {"label": "cat"}, "unknown class 'cat'"),
        ([], {"steps": 0}, "steps=0 should be at least 1"),
        ([], {"batch_size": 0}, "batch_size=0 should be at least 1"),
        ([], {"rounds": 0}, "rounds=0 should be at least 1"),
        ([], {"converged_steps": STEPS}, "converged_steps=12, expected more than steps=12"),
        ([TaylorSeer(warmup=13)], {}, "warmup=13"),
        ([], {"max_bytes": -1}, "max_bytes=-1 should be at least 1"),
        ([], {"converged_steps": 99.5}, "converged_steps=99.5 should be an integer"),
        ([POLICIES[2]], {"max_bytes": 1000}, "max_bytes=1,000: TaylorSeer"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(policies, settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        compared(policies, **settings)
    assert "\n" not in str(caught.value)


def test_compare_takes_what_generate_takes():
    told = {"label": "2", "guidance": 3.0, "solver": "euler", "control": False}
    row = compared("taylorseer:interval=4,order=0", **told).rows[1]
    meant = {"label": [2] * 3, "guidance": ClassifierFree(3.0), "solver": Euler(), "control": False}
    twin = compared(POLICIES[1:2], **meant).rows[1]
    assert (row.name, row.psnr_db, row.macs) == (twin.name, twin.psnr_db, twin.macs)


def test_a_policy_without_effect_is_named():
    with pytest.raises(NoEffectError, match=r"TaylorSeer\(interval=20"):
        compared([TaylorSeer(interval=20, warmup=12)])


def test_the_others_are_compared_without_it(tmp_path):
    report = compared([TaylorSeer(interval=20, warmup=12), TaylorSeer(interval=4, order=0)])
    assert [row.kind for row in report.rows] == ["exact", "policy"]
    (why,) = report.settings["left_out"]
    assert "TaylorSeer(interval=20" in why and "saved nothing" in why
    report.save(tmp_path)
    assert "No row: TaylorSeer(interval=20" in (tmp_path / "report.html").read_text()
    assert why in str(report.table().caption)


def test_labels_are_names_or_numbers_one_for_all_or_spread():
    named = tiny_dit()
    named.config = replace(TINY, class_names=("ant", "bee", "cat", "dog"))
    assert resolve_labels(named, ["dog", 0, "bee"], 3) == (3, 0, 1)
    assert resolve_labels(named, ["cat"], 3) == (2, 2, 2)
    assert resolve_labels(named, None, 2) == (0, 2)
    assert resolve_labels(named, None, 8) == (0, 0, 1, 1, 2, 2, 3, 3)
    with pytest.raises(ConfigError, match="did you mean 'dog'"):
        resolve_labels(named, ["dgo"], 1)


def test_names_show_the_fields_that_tell_policies_apart():
    seen = titles([TaylorSeer(interval=3, order=1), TaylorSeer(interval=6, order=1), TaylorSeer(interval=6)])
    assert [title.name for title in seen] == [
        "TaylorSeer interval=3 order=1",
        "TaylorSeer interval=6 order=1",
        "TaylorSeer interval=6 order=2",
    ]
    assert [title.series for title in seen][:2] == ["TaylorSeer order=1"] * 2
    assert [title.tag for title in seen][:2] == ["interval=3", "interval=6"]
    assert titles([TaylorSeer()]) == [("TaylorSeer", "TaylorSeer", "TaylorSeer")]
    assert titles([TaylorSeer(axis="sigma")])[0].name == "TaylorSeer axis=sigma"


def test_the_headline_takes_the_fastest_that_is_close_and_tells_when_its_control_is_closer(rows):
    exact, base = rows["exact"], rows[FORECAST.name]
    slow = replace(base, name="slow", psnr_db=50.0, speedup=1.5, control_psnr_db=40.0)
    quick = replace(base, name="quick", psnr_db=31.0, speedup=3.0, control_psnr_db=33.0)
    far = replace(base, name="far", psnr_db=12.0, speedup=9.0, control_psnr_db=10.0)
    assert headline([exact, slow, quick, far], "picture") == (
        "quick is 3.00 times as fast as the exact sampler, at 31.0 dB PSNR to its pictures; "
        "the same MACs spent on 4 exact steps would be closer, 33.0 dB."
    )
    assert headline([exact, slow, far], "picture").endswith("on 4 exact steps reach only 40.0 dB.")
    assert headline([exact, far], "picture").startswith(
        "No policy keeps a PSNR of 30 dB to the exact sampler."
    )
    assert headline([exact, rows[NEUTRAL.name]], "picture").endswith("identical pictures.")
    assert headline([exact], "picture").startswith("The exact sampler alone: ")


def test_labels_of_a_cluster_do_not_cover_each_other():
    points = [Box(300 + 4 * i, 150 + 3 * i, 10, 10) for i in range(4)]
    boxes = place(points, ["interval=3"] * 4)
    for i, box in enumerate(boxes):
        assert all(box.overlap(other) == 0 for other in boxes[:i])


@pytest.mark.parametrize(
    ("low", "high"),
    [(0.9, 1.5), (1, 4.8), (25.4, 54.2), (30.0, 30.0), (-3.0, 120.0), (1e-9, 9e-9), (1e12, 1e12)],
)
def test_ticks_are_round_and_enclose(low, high):
    marks = ticks(low, high)
    assert marks[0] <= low <= high <= marks[-1]
    assert 2 <= len(marks) <= 9
    steps = [b - a for a, b in pairwise(marks)]
    assert steps == pytest.approx([steps[0]] * len(steps)) and steps[0] > 0
    assert marks[-1] - marks[0] <= 2 * max(high - low, 1e-6 * abs(high))


def test_peak_memory_is_that_of_another_process():
    row = compared(memory=True, batch_size=2).rows[0]
    assert 0 < row.peak_added_bytes < row.peak_bytes
