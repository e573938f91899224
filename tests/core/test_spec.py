"""Components as text: what is read, what is written, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditkit.caching.taylorseer import Axis, Basis, TaylorSeer
from ditkit.core.errors import ConfigError
from ditkit.core.policy import Policy
from ditkit.core.spec import brief, component, read_value, spec
from ditkit.core.time_grid import Shift
from ditkit.models import DiT, DiTConfig
from ditkit.sample import Autoguidance, ClassifierFree, Euler, EulerMaruyama, Guidance, Heun, Solver


def policy(text: str) -> Policy:
    return component(Policy, text)  # type: ignore[type-abstract]


def solver(text: str) -> Solver:
    return component(Solver, text)  # type: ignore[type-abstract]


def refused(text: str, base: Any = Policy) -> str:
    with pytest.raises(ConfigError) as error:
        component(base, text)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_fields_are_typed() -> None:
    assert policy("taylorseer:interval=6,order=1,axis=sigma") == TaylorSeer(interval=6, order=1, axis="sigma")
    assert policy("TaylorSeer") == TaylorSeer()
    assert policy("taylorseer:") == TaylorSeer()
    assert solver("eulermaruyama:diffusion=constant") == EulerMaruyama(diffusion="constant")
    assert solver("HEUN") == Heun()


def test_unions_and_floats() -> None:
    read = component(Guidance, "classifierfree:scale=1.5,channels=3")  # type: ignore[type-abstract]
    assert read == ClassifierFree(1.5, channels=3)
    assert component(Guidance, "classifierfree:scale=2,channels=none") == ClassifierFree(2.0)  # type: ignore[type-abstract]


def test_defaults_are_not_written() -> None:
    assert spec(TaylorSeer()) == "taylorseer"
    assert spec(TaylorSeer(interval=6, axis="sigma")) == "taylorseer:interval=6,axis=sigma"


@given(
    st.builds(
        TaylorSeer,
        interval=st.integers(1, 99),
        order=st.integers(0, 9),
        warmup=st.integers(1, 99),
        axis=st.sampled_from(get_args(Axis)),
        basis=st.sampled_from(get_args(Basis)),
    )
)
def test_what_is_written_reads_back(written: TaylorSeer) -> None:
    assert policy(spec(written)) == written


@given(st.text(max_size=30) | st.from_regex(r"taylorseer:[a-z=,0-9.-]{0,20}", fullmatch=True))
def test_any_text_is_a_policy_or_one_line(text: str) -> None:
    try:
        assert isinstance(policy(text), Policy)
    except ConfigError as error:
        assert str(error).splitlines() == [str(error)]


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        ("taylorser", ["'taylorser'", "did you mean 'taylorseer'?"]),
        ("", ["unknown policy ''"]),
        ("taylorseer:intervall=4", ["'intervall'", "did you mean 'interval'?"]),
        ("taylorseer:interval=four", ["interval='four'", "expected an integer"]),
        ("taylorseer:interval=1.5", ["interval='1.5'", "expected an integer"]),
        ("taylorseer:interval=", ["interval=''", "expected an integer"]),
        ("taylorseer:interval", ["'interval'", "expected field=value"]),
        ("taylorseer:interval=4,interval=5", ["interval is given twice"]),
        ("taylorseer:axis=sigm", ["'sigm'", "did you mean 'sigma'?"]),
        ("taylorseer:interval=0", ["interval=0", "at least 1"]),
        ("taylorseer:order=-1", ["order=-1", "at least 0"]),
        ("taylorseer:homes=x", ["'homes'", "choose from: interval"]),
    ],
)
def test_what_is_wrong_is_quoted_with_what_was_expected(text: str, quoted: list[str]) -> None:
    message = refused(text)
    assert [part for part in quoted if part not in message] == []


def test_a_field_without_default_must_be_given() -> None:
    assert "needs scale=..." in refused("classifierfree", Guidance)


def test_a_field_that_is_not_plain_is_refused_both_ways() -> None:
    assert "cannot be given as text" in refused("autoguidance:scale=2,guide=dit", Guidance)
    with pytest.raises(ConfigError, match="guide"):
        spec(Autoguidance(2.0, DiT(DiTConfig.tiny())))


def test_a_tuple_of_fixed_length_is_read_whole() -> None:
    assert spec(ClassifierFree(2.0, interval=(0.1, 0.9))) == "classifierfree:scale=2.0,interval=0.1+0.9"
    read = component(Guidance, "classifierfree:scale=2,interval=0.1+0.9")  # type: ignore[type-abstract]
    assert read == ClassifierFree(2.0, interval=(0.1, 0.9))
    assert "interval='0.1', expected 2 values" in refused("classifierfree:scale=2,interval=0.1", Guidance)


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (tuple[float, ...], "1e+3+2", (1000.0, 2.0)),
        (Sequence[str] | None, "none", None),
        (Sequence[str] | None, "load", ("load",)),
        (str | Sequence[str], "sort", "sort"),
        (str | Sequence[str], "sort,first", ("sort", "first")),
        (str | Sequence[str], "sort+first", ("sort", "first")),
        (str | Sequence[str], "a+b,", ("a+b",)),
        (int | tuple[int, int], "3", 3),
        (int | tuple[int, int], "3,4", (3, 4)),
        (tuple[int, ...], "", ()),
    ],
)
def test_members_stand_between_pluses_or_commas(kind: Any, text: str, value: object) -> None:
    assert read_value(kind, text, text, commas=True) == value
    assert type(value) is type(read_value(kind, text, text, commas=True))


@dataclass(frozen=True)
class Odd:
    """Fields of every kind that has a text."""

    flag: bool = False
    name: str = ""
    level: Literal[1, 2] = 1
    maybe: float | None = None
    kept: tuple[int, ...] = field(default_factory=tuple)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Odd(flag=True), "odd:flag=true"),
        (Odd(name="x"), "odd:name=x"),
        (Odd(level=2), "odd:level=2"),
        (Odd(maybe=0.5), "odd:maybe=0.5"),
        (Odd(kept=(3,)), "odd:kept=3"),
        (Odd(kept=(12, 20)), "odd:kept=12+20"),
    ],
)
def test_every_kind_of_field_is_written(value: Odd, text: str) -> None:
    assert spec(value) == text


def test_what_would_not_read_back_is_not_written() -> None:
    with pytest.raises(ConfigError):
        spec(Odd(name="a,b"))


def test_a_reader_sees_what_was_chosen() -> None:
    assert brief(Euler()) == "Euler" and brief(Euler(Shift(2.0))) == "Euler(grid=Shift(a=2.0))"
    assert brief(ClassifierFree(2.0)) == "ClassifierFree(scale=2.0)"
    assert brief(Autoguidance(2.0, DiT(DiTConfig.tiny()))) == "Autoguidance(scale=2.0)"
