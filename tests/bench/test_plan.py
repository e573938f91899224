"""`ditkit plan`: what is drawn and printed is what the plan lets a query see."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from ditkit.attention.pattern import Pattern
from ditkit.bench.plans import IN_FULL, IN_PART, Planned, places, rows_of
from ditkit.cli.main import main
from ditkit.core.catalog import every
from ditkit.core.errors import ConfigError, ShapeError
from ditkit.core.grid import Grid
from ditkit.core.spec import component
from ditkit.models.vdt import VDT, VDTConfig
from ditkit.report.plan_picture import BLANK, HEAD_COLOURS, PART, QUERY, VISIBLE, head_view, laid, plan_page
from models_support import save_tiny
from patterns_support import tiny_clip_model

Capture = pytest.CaptureFixture[str]
COLUMNS = 80
CLIP, PICTURE = Grid(4, 6, 10), Grid(1, 12, 20)
PATTERNS = {
    "Band": "band:block=8,keep=0.2",
    "Draft": "draft:patch=2+4,block=8",
    "Grouped": "grouped:group=2+2+4,block=16",
    "Neighbourhood": "neighbourhood:block=8,radius=3,span=2,pooled=2",
    "Reshaped": "reshaped:block=8,keep=0.2",
    "ReshapedGrouped": "reshapedgrouped:group=2+2+4,block=16,reach=0",
    "ReshapedNeighbourhood": "reshapedneighbourhood:block=8,radius=3,span=2",
    "Searched": "searched:heads=02+34,stripes=even,block=8",
}
"""Settings for small grids; a pattern that is not here is planned as it comes."""


def pattern(text: str) -> Pattern:
    return component(Pattern, text)  # type: ignore[type-abstract]


@pytest.fixture(params=[PATTERNS.get(cls.__name__, cls.__name__) for cls in every(Pattern)])  # type: ignore[type-abstract]
def known(request: pytest.FixtureRequest) -> Pattern:
    """Each pattern of the catalogue."""
    return pattern(request.param)


def seen_in_slots(planned: Planned, token: int) -> Tensor:
    """The same from the mask of all pairs of slots: bool [tokens]."""
    plan = planned.plan
    row = plan.mask()[0, 0, int(plan.inverse[token])]
    order = torch.arange(plan.queries) if plan.order is None else plan.order
    slots = [(order == t).nonzero().item() for t in range(len(plan.inverse))]
    return row[[*slots, *range(plan.queries, plan.keys)]]


@pytest.mark.parametrize("others", [0, 5])
@pytest.mark.parametrize("grid", [CLIP, PICTURE], ids=["clip", "picture"])
def test_a_query_sees_what_the_mask_lets_through(known: Pattern, grid: Grid, others: int) -> None:
    planned = Planned.of(known, grid, others)
    for place in places(grid).values():
        seen = planned.seen_from(place)
        assert torch.equal(seen, seen_in_slots(planned, planned.token(place)))
        assert seen[grid.length :].all() and seen[planned.token(place)]
    found = planned.blocks()
    assert int((found == IN_PART).sum()) == planned.plan.partial
    assert int((found == IN_FULL).sum()) == planned.plan.visited - planned.plan.partial


def test_a_groups_neighbours_are_counted_by_hand() -> None:
    """Groups of 2 x 2 x 2 on 4 x 6 x 10 tokens: from the corner 2 x 2 x 2 groups, from the centre 2 x 3 x 3."""
    planned = Planned.of(pattern("grouped:group=2+2+2,block=8"), CLIP)
    seen = {name: planned.seen_from(place).view(CLIP.shape) for name, place in places(CLIP).items()}
    assert seen["corner"].nonzero().amax(0).tolist() == [3, 3, 3] and seen["corner"].sum() == 64
    centre = seen["centre"].nonzero()
    assert centre.amin(0).tolist() == [0, 0, 2] and centre.amax(0).tolist() == [3, 5, 7]
    assert seen["centre"].sum() == 4 * 6 * 6 and seen["border"].sum() == 4 * 6 * 4
    every_pair = 240**2
    assert planned.pairs_share == pytest.approx((2 * 2) * (2 + 3 + 2) * (2 + 3 * 3 + 2) * 64 / every_pair)


def test_a_long_clip_is_planned_without_its_pairs() -> None:
    """HunyuanVideo at 720p: 122,880 tokens, GRAT-B; the counts of its specification."""
    planned = Planned.of(pattern("grouped"), Grid(32, 48, 80))
    assert planned.plan.density == 22 * 16 * 28 / 480**2
    assert int(planned.seen_from((16, 24, 40)).sum()) == 27 * 256
    assert planned.why_not == "" and planned.kernel == "cpu" and planned.seconds > 0


def test_what_executes_a_plan_is_said() -> None:
    small = Planned.of(pattern("grouped:group=2+2+2,block=8"), CLIP)
    assert small.why_not == "240 keys, dense attention is faster below 256"
    assert Planned.of(pattern("grouped:group=2+2+2,block=8,kernel=cpu"), CLIP).why_not == ""
    none = Planned.of(pattern("grouped:group=2+2+2,block=8,kernel=none"), CLIP)
    assert (none.kernel, none.why_not) == ("none", "kernel=none never skips")
    with pytest.raises(ConfigError, match="kernel flex: queries are on cpu"):
        Planned.of(pattern("grouped:group=2+2+2,block=8,kernel=flex"), CLIP)
    with pytest.raises(ShapeError, match=r"query \(4, 0, 0\), expected one on the grid of \(4, 6, 10\)"):
        small.seen_from((4, 0, 0))


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour.removeprefix("#")))


def pixels(picture: Image.Image) -> Counter[tuple[int, ...]]:
    return Counter(picture.convert("RGB").get_flattened_data())


@pytest.mark.parametrize("grid", [CLIP, PICTURE], ids=["clip", "picture"])
def test_a_page_shows_every_pattern(known: Pattern, grid: Grid) -> None:
    """With all that its legend names, whatever lies under the keys; a page of two is that of each."""
    planned = Planned.of(known, grid, 5)
    alone = plan_page([planned], places(grid))
    found = pixels(alone)
    wanted = {VISIBLE, BLANK, QUERY} | ({PART} if planned.plan.partial else set())
    assert all(found[rgb(colour)] > 100 for colour in wanted)
    assert (PART in wanted) == (rgb(PART) in found)
    two = plan_page([planned, planned], places(grid), torch.full((1, 3, 9, 7), 255, dtype=torch.uint8))
    assert two.width == alone.width and two.height > 1.5 * alone.height


def test_tokens_are_painted_where_they_are() -> None:
    seen = torch.zeros(3, 5, dtype=torch.bool)
    seen[1, 3] = seen[2, 0] = True
    picture = laid(seen, None, 25)
    assert picture.size == (25, 15)
    for row in range(3):
        for column in range(5):
            painted = picture.getpixel((5 * column + 2, 5 * row + 2))
            assert painted == rgb(VISIBLE if seen[row, column] else BLANK)


def test_tokens_smaller_than_a_pixel_are_averaged() -> None:
    half = (torch.arange(400) % 2).bool().expand(400, 400)
    (painted,) = pixels(laid(half, None, 100))
    mean = [(a + b) / 2 for a, b in zip(rgb(VISIBLE), rgb(BLANK), strict=True)]
    assert painted == pytest.approx(mean, abs=0.51)


def test_a_picture_lies_under_the_keys() -> None:
    """Its middle, in grey: the left half of 2 x 4 pixels is black, the right one white."""
    under = torch.zeros(3, 2, 4, dtype=torch.uint8)
    under[:, :, 2:] = 255
    picture = laid(torch.tensor([[True, True], [False, False]]), under, 4)
    left, right = picture.getpixel((0, 0)), picture.getpixel((3, 0))
    assert isinstance(left, tuple) and isinstance(right, tuple)
    assert all(dark < light for dark, light in zip(left, right, strict=True))
    assert left[2] > left[0] and picture.getpixel((0, 3)) != left


def test_rows_of_a_model() -> None:
    model = tiny_clip_model(text=7)
    assert rows_of(model, model.sample_shape) == (CLIP, 7)
    assert rows_of(model, (2, 8, 8, 4)) == (Grid(8, 4, 2), 7)
    axes = VDT(VDTConfig(frames=2, size=(8, 8), patch=2, channels=1, width=8, depth=1, heads=1))
    with pytest.raises(ConfigError, match="VDT attends along one axis at a time"):
        rows_of(axes, axes.sample_shape)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


def said(capsys: Capture, *words: object, code: int = 0) -> str:
    """What `ditkit plan WORDS` prints: on stdout, or the one line on stderr where it fails."""
    assert main(["plan", *map(str, words)]) == code
    streams = capsys.readouterr()
    assert (streams.err if code == 0 else streams.out) == ""
    return streams.err if code else streams.out


def test_a_layout_without_a_model(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    out = tmp_path / "new" / "plan.png"
    words = ("--grid", "16x8x8", "--text", 7, "--policy", "grouped:group=2+4+4,block=32")
    text = said(capsys, *words, "--policy", "grouped:group=1+4+4,block=16,meeting=crisscross", "--out", out)
    assert max(len(line) for line in text.splitlines() if not line.startswith("wrote")) <= COLUMNS
    assert "16 x 8 x 8 tokens and 7 others" in text and f"wrote {out}" in text
    row = next(line.split() for line in text.splitlines() if "grouped:block=32" in line)
    assert [*row[:5], row[-1]] == ["grouped:block=32,", "38.3%", "7.9%", "35.3%", "391", "cpu"]
    assert "off, 77.3% of dense attention's blocks visited" in " ".join(text.split())
    with Image.open(out) as page:
        assert page.format == "PNG" and page.width > 800


def test_a_model_with_a_sample_or_a_picture_under_it(model: Path, tmp_path: Path, capsys: Capture) -> None:
    words = (model, "--policy", "grouped:group=2+4,block=8,reach=0", "--query", "1,1")
    drawings = {}
    Image.new("RGB", (40, 30), "white").save(tmp_path / "white.png")
    for name, flags in {
        "plain": (),
        "sample": ("--sample",),
        "over": ("--over", tmp_path / "white.png"),
    }.items():
        out = tmp_path / f"{name}.png"
        assert "4 x 4 tokens and 0 others" in said(capsys, *words, *flags, "--out", out)
        drawings[name] = out.read_bytes()
    assert len(set(drawings.values())) == 3
    larger = said(capsys, *words, "--size", "32x16", "--out", tmp_path / "large.png")
    assert "8 x 4 tokens and 0 others" in larger


def test_a_table_is_shown_head_by_head_and_pattern_by_pattern(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "heads.png"
    table = "searched:heads=0123+2223,block=16,stripes=even"
    text = " ".join(said(capsys, "--grid", "16x8x8", "--policy", table, "--out", out).split())
    assert all(f"{count} of 8 heads" in text for count in (1, 4, 2)) and "off, " not in text
    parts = Planned.parts(pattern(table), Grid(16, 8, 8))
    assert [p.part.rpartition(" ")[2] for p in parts] == ["dense", "skipped", "diagonal", "multi-diagonal"]
    assert [p.visited for p in parts[:2]] == [1, 0] and all(0.1 < p.visited < 0.2 for p in parts[2:])
    held = pixels(head_view(parts[0].words))
    most = {letter: held[rgb(HEAD_COLOURS[letter])] for letter in "0123"}
    cell = 17 * 17
    assert most["0"] >= cell and most["2"] >= 4 * cell > most["3"] >= 2 * cell
    # from the centre of frame 8: its place in other frames, of the multi-diagonal heads
    seen = parts[3].seen_from((8, 4, 4)).view(16, 64)
    assert seen[:, 36].all() and seen.any(0).sum() < 20


def test_a_pattern_that_chooses_is_judged_by_what_it_will_leave(tmp_path: Path, capsys: Capture) -> None:
    words = ("--grid", "16x16x16", "--policy", "draft:patch=8+16,sparsity=0.9", "--out", tmp_path / "d.png")
    row = next(line.split() for line in said(capsys, *words).splitlines() if "draft" in line)
    assert row[1] == "10.2%" and row[-1] == "cpu"  # 32 regions: 1024 - 921 + 1 of 1024, 10.2 %


GROUPED = ("--policy", "grouped")
REFUSED = [
    (("--grid", "8x8"), "got no --policy, expected an attention pattern (band, draft, grouped"),
    (("--grid", "8x8", "--policy", "taylorseer"), "--policy taylorseer is no attention pattern"),
    (("--grid", "8x8", "--policy", "gruped"), "did you mean 'grouped'?"),
    (GROUPED, "got neither MODEL nor --grid"),
    (("--grid", "8x8", "--size", "8x8", *GROUPED), "got --size 8x8 without a model"),
    (("--grid", "8", *GROUPED), "--grid 8, expected positive sides such as 64x64 or 32x48x80"),
    (("--grid", "8x0", *GROUPED), "--grid 8x0, expected positive sides"),
    (("--grid", "8xy", *GROUPED), "--grid 8xy, expected positive sides"),
    (("--grid", "8x8", "--text", "-1", *GROUPED), "--text=-1 should be at least 0"),
    (
        ("--grid", "8x8", "--query", "8,0", *GROUPED),
        "--query 8,0, expected 2 numbers below 8, 8, such as 4,4",
    ),
    (("--grid", "8x8", "--query", "1,1,1", *GROUPED), "--query 1,1,1, expected 2 numbers"),
    (("--grid", "8x8", "--query", "1,1", "1,1", *GROUPED), "--query 1,1 is given twice"),
    (("--grid", "8x8", "--query", "a,1", *GROUPED), "--query a,1, expected 2 numbers"),
    (("--grid", "8x8", "--sample", *GROUPED), "got --sample without a model that draws"),
    (("--grid", "8x8", "--over", "no.png", "--sample", *GROUPED), "got --over no.png with --sample"),
    (("--grid", "16x16", "--over", "no.png", *GROUPED), "--over no.png: "),
    (("--grid", "16x16", "--policy", "grouped:kernel=flex"), "kernel flex: queries are on cpu"),
    (("--grid", "8x8", *GROUPED), "groups of 1 x 8 x 8 tokens on a grid of 1 x 8 x 8"),
    (("MODEL", "--grid", "8x8", *GROUPED), "got --grid 8x8 with the model"),
    (("MODEL", "--text", "3", *GROUPED), "got --text 3 with the model"),
    (("MODEL", "--size", "2x8x8", *GROUPED), "--size 2x8x8, expected positive sides such as 64x64"),
    (("MODEL", "--size", "10x8", *GROUPED), "height=10 does not divide"),
]


@pytest.mark.parametrize(
    ("words", "line"), REFUSED, ids=lambda given: given if isinstance(given, str) else ""
)
def test_bad_input_is_one_line(
    words: tuple[str, ...],
    line: str,
    model: Path,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "out" / "plan.png"
    given = [str(model) if word == "MODEL" else word for word in words]
    error = said(capsys, *given, "--out", out, code=2)
    assert line in error and len(error.splitlines()) == 1 and not out.parent.exists()


def test_a_picture_ends_in_png(tmp_path: Path, capsys: Capture) -> None:
    words = ("--grid", "8x8", *GROUPED, "--out", tmp_path / "plan.jpg")
    assert "expected a name that ends in .png" in said(capsys, *words, code=2)
