"""Options: every type from a string and from a value, refusals, and what is said about them."""

import json
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Optional

import hypothesis
import pytest
from hypothesis import strategies as st

from neuroal.errors import UsageError
from neuroal.options import bind, convert, describe, option, type_name, values


@dataclass(frozen=True, eq=False)
class Everything:
    """One option of every type."""

    kind: ClassVar[str] = "no option"
    flag: bool = option(False, "a switch")
    count: int = option(1, "a number")
    power: float = 0.5
    label: str = "x"
    mode: Literal["row", "matrix"] = "row"
    bits: Literal[2, 4] = 4
    lambdas: tuple[float, ...] = (0.01, 0.02)
    limit: int | None = None
    scale: float | Literal["auto"] = "auto"
    steps: tuple[int, ...] | None = None
    computed: int = field(init=False, default=7)


@dataclass(frozen=True, eq=False)
class Needs:
    """A required option, and one that is refused below 0."""

    size: int
    rate: float = 0.0
    names: tuple[str, ...] = field(default_factory=lambda: ("a",))

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ValueError("rate must be at least 0")


GOOD: list[tuple[Any, Any, Any]] = [
    ("true", bool, True),
    ("Yes", bool, True),
    ("0", bool, False),
    ("off", bool, False),
    (True, bool, True),
    ("3", int, 3),
    (" 3 ", int, 3),
    ("-2", int, -2),
    ("1e3", int, 1000),
    (8.0, int, 8),
    (2**60 + 1, int, 2**60 + 1),
    (str(2**60 + 1), int, 2**60 + 1),
    ("0.5", float, 0.5),
    ("1e-4", float, 1e-4),
    (2, float, 2.0),
    ("abc", str, "abc"),
    ("", str, ""),
    ("none", str, "none"),
    ("row", Literal["row", "matrix"], "row"),
    ("4", Literal[2, 4], 4),
    (4, Literal[2, 4], 4),
    ("0.1,0.2", tuple[float, ...], (0.1, 0.2)),
    ("0.1, 0.2", tuple[float, ...], (0.1, 0.2)),
    ("0.1", tuple[float, ...], (0.1,)),
    ([0.1, 1], tuple[float, ...], (0.1, 1.0)),
    ((), tuple[float, ...], ()),
    ("", tuple[float, ...], ()),
    ("a,b", tuple[str, ...], ("a", "b")),
    ("row,row", tuple[Literal["row"], ...], ("row", "row")),
    ([[1], [2, 3]], tuple[tuple[int, ...], ...], ((1,), (2, 3))),
    ("none", int | None, None),
    ("None", int | None, None),
    (None, int | None, None),
    ("3", int | None, 3),
    ("3", None | int, 3),
    ("3", Optional[int], 3),  # noqa: UP045
    ("1,2", tuple[int, ...] | None, (1, 2)),
    ("auto", float | Literal["auto"], "auto"),
    ("0.5", float | Literal["auto"], 0.5),
    (0.5, int | float, 0.5),
    (2, int | float, 2),
]


@pytest.mark.parametrize(("value", "kind", "expected"), GOOD)
def test_convert(value: Any, kind: Any, expected: Any) -> None:
    result = convert(value, kind)
    assert result == expected
    assert type(result) is type(expected)


BAD: list[tuple[Any, Any]] = [
    ("maybe", bool),
    ("", bool),
    (1, bool),
    (None, bool),
    ("3.5", int),
    (3.5, int),
    ("three", int),
    ("", int),
    (True, int),
    ("nan", int),
    ("1e400", int),
    ("nan", float),
    ("inf", float),
    (10**400, float),
    (float("inf"), float),
    (False, float),
    ("0,5", float),
    (None, float),
    ([1], float),
    (1, str),
    (None, str),
    ("rows", Literal["row", "matrix"]),
    (True, Literal[1, 2]),
    (3, Literal[2, 4]),
    ("0.1,,0.2", tuple[float, ...]),
    ("0.1,x", tuple[float, ...]),
    (0.1, tuple[float, ...]),
    (None, tuple[float, ...]),
    ("0.1,0.2", tuple[float, float]),
    ("1", list[int]),
    ([1], list[int]),
    ({}, dict),
    ("x", int | None),
    ("none", int | float),
    ("x", float | Literal["auto"]),
]


@pytest.mark.parametrize(("value", "kind"), BAD)
def test_convert_refuses(value: Any, kind: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        convert(value, kind)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (bool, "bool"),
        (float, "float"),
        (int | None, "int or None"),
        (Literal["row", "matrix"], "row or matrix"),
        (tuple[float, ...], "list of float"),
        (tuple[int, ...] | None, "list of int or None"),
        (float | Literal["auto"], "float or auto"),
        (tuple[float, float], "tuple[float, float]"),
        (list[int], "list[int]"),
        (dict, "dict"),
    ],
)
def test_type_name(kind: Any, name: str) -> None:
    assert type_name(kind) == name


def test_bind_converts_strings() -> None:
    given = {
        "flag": "yes",
        "count": "3",
        "power": "2",
        "label": "y",
        "mode": "matrix",
        "bits": "2",
        "lambdas": "0.5",
        "limit": "9",
        "scale": "0.25",
        "steps": "1,2",
    }
    bound = bind(Everything, given, "mine")
    assert values(bound) == {
        "flag": True,
        "count": 3,
        "power": 2.0,
        "label": "y",
        "mode": "matrix",
        "bits": 2,
        "lambdas": [0.5],
        "limit": 9,
        "scale": 0.25,
        "steps": [1, 2],
    }


def test_values_go_through_json_and_back() -> None:
    for given in ({}, {"lambdas": "0.1,0.3", "limit": "none", "scale": "auto", "steps": "4"}):
        written = json.loads(json.dumps(values(bind(Everything, given, "mine"))))
        assert values(bind(Everything, written, "mine")) == written


@hypothesis.given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1))
def test_floats_survive_being_written_and_read(numbers: list[float]) -> None:
    text = ",".join(repr(number) for number in numbers)
    assert convert(text, tuple[float, ...]) == tuple(numbers)


@hypothesis.given(st.integers())
def test_integers_survive_being_written_and_read(number: int) -> None:
    assert convert(str(number), int) == convert(number, int) == number


@pytest.mark.parametrize(
    ("plugin", "given", "said"),
    [
        (Everything, {"powr": 1}, "plugin 'mine' has no option 'powr': did you mean 'power'?"),
        (Everything, {"kind": "a"}, "has no option 'kind'"),
        (Everything, {"computed": 1}, "has no option 'computed'"),
        (Everything, {"power": "a"}, "option mine.power='a' is not float"),
        (Everything, {"mode": "rows"}, "option mine.mode='rows' is not row or matrix"),
        (Everything, {"lambdas": 0.5}, "option mine.lambdas=0.5 is not list of float"),
        (Everything, {"limit": "x"}, "option mine.limit='x' is not int or None"),
        (Needs, {}, "plugin 'mine' needs the option mine.size (int)"),
        (Needs, {"size": 1, "rate": -1}, "plugin 'mine' refuses its options: rate must be at"),
    ],
)
def test_bind_refuses(plugin: type, given: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as error:
        bind(plugin, given, "mine")
    assert said in str(error.value)


def test_plugin_without_options() -> None:
    @dataclass(frozen=True)
    class Empty:
        """Nothing to set."""

    assert values(bind(Empty, {}, "mine")) == {}
    with pytest.raises(UsageError, match="'x': it has no options"):
        bind(Empty, {"x": 1}, "mine")


def test_describe() -> None:
    rows = {row[0]: row[1:] for row in describe(Everything)}
    assert "kind" not in rows
    assert "computed" not in rows
    assert rows["flag"] == ("bool", "False", "a switch")
    assert rows["lambdas"] == ("list of float", "0.01,0.02", "")
    assert rows["limit"] == ("int or None", "None", "")
    assert describe(Needs)[0] == ("size", "int", "required", "")
    assert describe(Needs)[2] == ("names", "list of str", "a", "")


def test_defaults_can_be_typed_as_described() -> None:
    given = {name: default for name, _, default, _ in describe(Everything)}
    assert values(bind(Everything, given, "mine")) == values(Everything())
