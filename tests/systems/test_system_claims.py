"""Claims: verdicts follow from intervals, digests from statements, and a claims script writes what `--check` reads."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditkit.bench import claims as writing
from ditkit.bench.claims import write
from ditkit.core.errors import ConfigError
from ditkit.systems import check
from ditkit.systems.claims import VERDICTS, Claim, judge, read_claims
from ditkit.systems.code import component_digests, file_digest
from ditkit.systems.rows import find

finite = st.floats(-1e6, 1e6)
FAST = Claim.tried("it is fast", paper="2x", ours=2.0, interval=(1.5, 2.5), claimed=(1.0, None), unit="x")


@pytest.mark.parametrize(
    ("interval", "claimed", "verdict"),
    [
        ((-2.0, -1.0), (None, 0.0), "held"),
        ((1.0, 2.0), (None, 0.0), "refuted"),
        ((-1.0, 1.0), (None, 0.0), "not resolved at this size"),
        ((0.0, 0.0), (None, 0.0), "not resolved at this size"),
        ((0.0, 0.0), (0.0, None), "not resolved at this size"),
        ((-1.0, 0.0), (None, 0.0), "not resolved at this size"),
        ((1.95, 2.05), (1.9, 2.1), "held"),
        ((1.95, 2.15), (1.9, 2.1), "not resolved at this size"),
        ((2.2, 2.3), (1.9, 2.1), "refuted"),
        ((3.0, 3.0), (2.0, None), "held"),
    ],
)
def test_verdicts(
    interval: tuple[float, float], claimed: tuple[float | None, float | None], verdict: str
) -> None:
    assert judge(interval, claimed) == verdict


@given(finite, finite, finite)
def test_a_claim_and_its_opposite_are_not_both_held(a: float, b: float, bound: float) -> None:
    interval = (min(a, b), max(a, b))
    above, below = judge(interval, (bound, None)), judge(interval, (None, bound))
    assert {above, below} in ({"held", "refuted"}, {"not resolved at this size"})


@pytest.mark.parametrize(
    ("interval", "claimed"),
    [
        ((2.0, 1.0), (0.0, None)),
        ((1.0, 2.0), (3.0, 3.0)),
        ((math.nan, 1.0), (0.0, None)),
        ((0.0, 1.0), (math.nan, 1.0)),
    ],
)
def test_ranges_that_are_none_are_refused(
    interval: tuple[float, float], claimed: tuple[float | None, float | None]
) -> None:
    with pytest.raises(ConfigError, match="expected"):
        judge(interval, claimed)


def test_claims_that_make_no_sense_are_refused_where_they_are_made() -> None:
    with pytest.raises(ConfigError, match="outside its interval"):
        Claim.tried("x", paper="1", ours=3.0, interval=(1.0, 2.0), claimed=(0.0, None))
    with pytest.raises(ConfigError, match="finite"):
        Claim.tried("x", paper="1", ours=math.inf, interval=(1.0, math.inf), claimed=(0.0, None))
    with pytest.raises(ConfigError, match="without its reason"):
        Claim.untried("x", paper="1", reason="")
    with pytest.raises(ConfigError, match="must not be empty"):
        Claim.untried("x", paper="", reason="y")


SOURCE = '''
"""Words."""
from a import b


def f(x: int = 3) -> int:
    """Words."""
    return b(x) if x else None  # a comment
'''


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Words.", "Other words."),
        ("  # a comment", ""),
        ("from a import b", "import os\nfrom c.d import b"),
        ("x: int = 3", "x:int=3"),
        ("\n\n\n", "\n"),
    ],
)
def test_a_digest_is_not_of_words_and_imports(tmp_path: Path, old: str, new: str) -> None:
    assert old in SOURCE
    assert digest(tmp_path, SOURCE.replace(old, new)) == digest(tmp_path, SOURCE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("= 3", "= 4"),
        ("= 3", "= 3.0"),
        ("b(x)", "b(-x)"),
        ("None", "0"),
        ("def f", "def g"),
        ("if x", "if not x"),
    ],
)
def test_a_digest_is_of_every_statement(tmp_path: Path, old: str, new: str) -> None:
    assert old in SOURCE
    assert digest(tmp_path, SOURCE.replace(old, new)) != digest(tmp_path, SOURCE)


def test_a_digest_is_the_same_on_every_version_of_python(tmp_path: Path) -> None:
    """Frozen: a version whose tree has further fields must not make every claims file one of other code."""
    assert digest(tmp_path, SOURCE) == "58318cabc0cf0007"


def digest(folder: Path, source: str) -> str:
    (folder / "code.py").write_text(source)
    return file_digest(folder / "code.py")


def test_a_component_without_a_module_has_no_digest() -> None:
    assert set(component_digests(["ditkit.core.grid:Grid"])) == {"ditkit.core.grid:Grid"}
    with pytest.raises(ConfigError, match=r"no module ditkit\.core\.no"):
        component_digests(["ditkit.core.no:It"])


def test_a_script_writes_what_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "checkout", lambda: tmp_path)
    row = find("12")
    script = tmp_path / check.script_of(row)
    script.parent.mkdir(parents=True)
    script.write_text("FIGURE = 1\n")
    untried = Claim.untried("it is good", paper="FID 2", reason="takes ImageNet")
    path = write("12-taylorseer", [FAST, untried])
    assert path == tmp_path / "benchmarks/results/claims/12-taylorseer.json"
    recorded = read_claims(path)
    assert recorded.claims == (FAST, untried) and list(recorded.problems()) == []
    assert set(recorded.code) == {*row.components, check.script_of(row)}
    assert {"python", "torch", "ditkit"} <= set(recorded.versions)
    out = capsys.readouterr().out
    assert "it is fast" in out and "held" in out and "takes" in out
    assert "shared" not in path.read_text() and str(tmp_path) not in path.read_text()


def test_nothing_is_written_where_no_claim_was_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "checkout", lambda: tmp_path)
    script = tmp_path / check.script_of(find("12"))
    script.parent.mkdir(parents=True)
    script.write_text("")
    with pytest.raises(ConfigError, match="no claim was tried"):
        write("12", [Claim.untried("it is good", paper="FID 2", reason="takes ImageNet")])
    assert not (tmp_path / "benchmarks" / "results").exists()
    with pytest.raises(ConfigError, match="unknown system 'taylorsear'"):
        write("taylorsear", [FAST])
    monkeypatch.setattr(check, "checkout", lambda: None)
    with pytest.raises(ConfigError, match="without one"):
        write("12", [FAST])


def test_every_claims_file_on_record_has_all_verdicts_decided() -> None:
    root = check.checkout()
    assert root is not None
    files = sorted((root / "benchmarks" / "results" / "claims").glob("*.json"))
    assert files
    for path in files:
        assert {claim.verdict for claim in read_claims(path).claims} <= set(VERDICTS)
        assert json.loads(path.read_text())["core_seconds"] > 0


def test_the_library_of_scripts_names_what_they_need() -> None:
    assert set(writing.__all__) == {"Claim", "table", "write"}
