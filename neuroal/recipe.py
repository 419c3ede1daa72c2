"""What was asked for: a frozen description of a pruning run that JSON can hold."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import numbers
import os
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from neuroal.errors import UsageError, nearest
from neuroal.options import convert, type_name
from neuroal.options import values as option_values
from neuroal.types import Bos, Budget, Comparison, Pattern, SparsityOver

DTYPES = ("auto", "float32", "float16", "bfloat16")
TOP_UP_ROLES = (  # that a top-up decides
    "block_ratios",
    "row_ratios",
    "alignment",
    "refiner",
    "reconstruction",
    "search_pruner",  # of role `pruner`
)


Kind = TypeVar("Kind")
_LARGEST = 2**31 - 1


def _knows_its_fields(kind: type[Kind]) -> type[Kind]:
    """Have the constructor of a dataclass answer a misspelt field with the nearest there is."""
    construct = kind.__init__
    names = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]

    @functools.wraps(construct)
    def checked(self: Kind, *args: Any, **arguments: Any) -> None:
        for name in arguments:
            if name not in names:
                raise UsageError(f"a recipe has no '{name}': {nearest(name, names)}")
        construct(self, *args, **arguments)

    kind.__init__ = checked  # type: ignore[assignment]
    return kind


@dataclass(frozen=True)
class GivenRatio:
    """`[[ratios]]`: the ratio of the linears that a pattern means.

    Attributes:
        match: A pattern as for `keep`.
        sparsity: Their ratio, in [0, 1), or a list over the depth of the model.
    """

    match: str
    sparsity: float | tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparsity", _checked_sparsity(self.sparsity))

    @classmethod
    def of(cls, value: GivenRatio | Mapping[str, Any]) -> GivenRatio:
        """Return what a mapping of `match` and `sparsity` says.

        Raises:
            UsageError: It is no such mapping.
        """
        if isinstance(value, GivenRatio):
            return value
        if not isinstance(value, Mapping):
            raise UsageError(f"ratios have an entry {value!r}: give match and sparsity")
        known = {"match", "sparsity"}
        for key in value.keys() - known:
            raise UsageError(f"ratios have an unknown key '{key}': {nearest(key, known)}")
        for key in sorted(known - value.keys()):
            raise UsageError(f"an entry of ratios has no {key}: give match and sparsity")
        if not isinstance(value["match"], str):
            raise UsageError(f"ratios have match={value['match']!r}: give one pattern as text")
        return cls(**value)


@_knows_its_fields
@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run's result.

    A role's plugin is a name, `distribution:name`, `./file.py:Class`, or an instance in Python;
    None takes what the top-up preset has for the role.

    Attributes:
        sparsity: Wanted ratio, in [0, 1), over what `sparsity_over` says; None takes an N:M
            pattern's own, else that of an allocation, else 0.5. Several are ratios over depth, the
            first block's to the last block's, straight lines between; nothing is searched then.
        pruner: Base pruner.
        top_up: Preset that names the plugins of the other roles.
        block_ratios: Several compete under one alignment metric.
        row_ratios: Row-ratio plugin.
        alignment: Alignment metric of the search.
        refiner: Mask refiner of the final pruning; "none" removes a preset's.
        reconstruction: What gives the surviving weights new values in the final pruning; "none"
            removes a preset's.
        search_pruner: What prunes the candidates of the search; None is the top-up's own, which is
            the pruner unless it says otherwise.
        pattern: "unstructured" or "N:M" (N kept of M).
        comparison: Scores compete per "row" or "matrix"; None is the pruner's own.
        skip_indivisible: Leave linears dense whose inputs M does not divide.
        keep_zeros: Weights that are zero already stay zero, in linears of which they are at least a
            tenth.
        keep: Patterns of linears that stay dense under every method: names or globs, `first:2`,
            `last:1`, `attention`, `mlp`.
        only: Patterns of the linears that may be pruned; all others stay dense.
        sparsity_over: The sparsity is that of the linears that are "pruned", or of "all" linears of
            the blocks, those that stay dense among them.
        all_experts: Score every expert by all tokens, not only those routed to it.
        budget: "exact" meets the sparsity to the weight; "paper" rounds and clips as published.
        options: Plugin name to its options.
        calibration: Source of the calibration text or tokens.
        samples: Calibration windows of the final pruning.
        search_samples: How many of them the search uses, from the first; None is the top-up's own,
            which is 8 unless it says otherwise.
        length: Tokens per window; None is the smaller of 2048 and the model's context.
        bos: Put the beginning-of-sequence token in front of every window: "always", "never", or
            "auto", where the tokenizer itself begins a text with it, but not under the budget
            "paper". Rows of token ids get it under "always" alone.
        pack_documents: Join documents by the end-of-sequence token and cut windows from them all;
            None does so where they are conversations.
        evaluate: Sources of texts on which the dense and the pruned model are measured.
        evaluate_length: Tokens per window of these texts; None is the rows' own, for text the
            smaller of 2048 and the model's context.
        evaluate_windows: At most so many windows of each, from the first; None is all.
        seed: Seed of every random draw.
        model: Folder or hub name; "demo" is the built-in model.
        device: "auto", "cpu", "cuda", "cuda:0", "mps".
        dtype: Dtype in which the model is loaded and saved; "auto" is the checkpoint's own.
        search_dtype: Dtype in which the search runs the blocks; "auto" is the model's own. Masks
            are made from the model's own weights, and the final pruning does not change.
        batch: Windows that pass a block together; None is as many as have 2048 tokens on the CPU,
            16384 on a device.
        allocation: Folder or file of an earlier run's allocation to use instead of a search; of
            linears that it does not name, `sparsity` is the ratio.
        ratios: Ratios by pattern, instead of a search; the last that means a linear counts, and
            `sparsity` is the ratio of those that none means.
        requires: Distributions that must be installed, as pip reads them: `neuroal-nowag>=0.1`;
            checked before anything else.
    """

    sparsity: float | tuple[float, ...] | None = None
    pruner: Any = "wanda"
    top_up: str = "neuroal"
    block_ratios: tuple[Any, ...] | None = None
    row_ratios: Any = None
    alignment: Any = None
    refiner: Any = None
    reconstruction: Any = None
    search_pruner: Any = None
    pattern: str = "unstructured"
    comparison: Comparison | None = None
    skip_indivisible: bool = False
    keep_zeros: bool = True
    keep: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    sparsity_over: SparsityOver = "pruned"
    all_experts: bool = False
    budget: Budget = "exact"
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    calibration: str | None = None
    samples: int = 128
    search_samples: int | None = None
    length: int | None = None
    bos: Bos = "auto"
    pack_documents: bool | None = None
    evaluate: tuple[str, ...] = ()
    evaluate_length: int | None = None
    evaluate_windows: int | None = None
    seed: int = 0
    model: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    search_dtype: str = "auto"
    batch: int | None = None
    allocation: str | None = None
    ratios: tuple[GivenRatio, ...] = ()
    requires: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, hint in _hints().items():
            object.__setattr__(self, name, _typed(getattr(self, name), name, hint))
        for name in ("requires", "keep", "only"):
            texts = getattr(self, name)
            if isinstance(texts, str):
                raise UsageError(f"{name} is a string: write ('{texts}',)")
            object.__setattr__(self, name, tuple(texts))
        ratios = self.block_ratios
        if ratios is not None:
            many = isinstance(ratios, (tuple, list))
            object.__setattr__(self, "block_ratios", tuple(ratios) if many else (ratios,))
        texts = (self.evaluate,) if isinstance(self.evaluate, str) else self.evaluate
        object.__setattr__(self, "evaluate", tuple(dict.fromkeys(texts)))
        if self.sparsity is not None:
            object.__setattr__(self, "sparsity", _checked_sparsity(self.sparsity))
        object.__setattr__(self, "ratios", tuple(GivenRatio.of(x) for x in self.ratios))
        numbers = ("samples", "search_samples", "length", "batch")
        for name in (*numbers, "evaluate_length", "evaluate_windows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} {value} is not a positive number")
            if value is not None and value > _LARGEST:
                raise UsageError(f"{name} {value} is too large: give at most {_LARGEST:,}")
        if abs(self.seed) > _LARGEST:
            raise UsageError(f"seed {self.seed} is too large: give at most {_LARGEST:,}")
        for name in ("length", "evaluate_length"):
            if getattr(self, name) == 1:
                raise UsageError(f"{name} 1 is too short: a window needs at least 2 tokens")
        for name in ("evaluate_length", "evaluate_windows"):
            if getattr(self, name) is not None and not self.evaluate:
                raise UsageError(f"{name} is for evaluate, which names no text")
        _choice("budget", self.budget, typing.get_args(Budget))
        _choice("bos", self.bos, typing.get_args(Bos))
        if self.comparison is not None:
            _choice("comparison", self.comparison, typing.get_args(Comparison))
        _choice("sparsity_over", self.sparsity_over, typing.get_args(SparsityOver))
        _choice("dtype", self.dtype, DTYPES)
        _choice("search_dtype", self.search_dtype, DTYPES)
        self.parsed_pattern()

    def parsed_pattern(self) -> Pattern | None:
        """Return the N:M pattern, or None for unstructured.

        Raises:
            UsageError: The pattern is neither, or N is not in [1, M].
        """
        if self.pattern == "unstructured":
            return None
        match = re.fullmatch(r"(\d+):(\d+)", self.pattern)
        if not match:
            raise UsageError(
                f"pattern '{self.pattern}' is neither 'unstructured' nor N:M such as 2:4"
            )
        kept, of = int(match[1]), int(match[2])
        if not 1 <= kept <= of:
            raise UsageError(f"pattern {self.pattern} keeps {kept} of {of}: N must be in [1, M]")
        return Pattern(kept, of)

    @property
    def gives_ratios(self) -> bool:
        """Return whether ratios are given, so that none are searched for."""
        return self.allocation is not None or bool(self.ratios) or isinstance(self.sparsity, tuple)

    @property
    def wanted(self) -> float:
        """Return the wanted overall sparsity; of several over depth, the middle of the extremes."""
        if isinstance(self.sparsity, tuple):
            return (min(self.sparsity) + max(self.sparsity)) / 2
        if self.sparsity is not None:
            return self.sparsity
        pattern = self.parsed_pattern()
        return 0.5 if pattern is None else (pattern.of - pattern.kept) / pattern.of

    @property
    def window_bos(self) -> Bos:
        """Return the rule of `bos` that holds: the published code puts no token there."""
        return "never" if self.bos == "auto" and self.budget == "paper" else self.bos

    def to_json(self) -> dict[str, Any]:
        """Return the recipe as JSON values; a plugin instance becomes its class and options."""
        return {f.name: _json(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Recipe:
        """Return the recipe of `to_json`, or of a `neuroal.json`'s `recipe` entry.

        Raises:
            UsageError: A key is unknown, a value is of the wrong type, or a plugin was a Python
                instance.
        """
        fields = {f.name for f in dataclasses.fields(cls)}
        hints = _hints()
        values: dict[str, Any] = {}
        for key, value in data.items():
            if key not in fields:
                raise UsageError(f"recipe has an unknown key '{key}': {nearest(key, fields)}")
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, dict) and "instance" in item:
                    raise UsageError(
                        f"recipe's {key} was a Python instance of {item['instance']}: give it again"
                    )
            if key == "options":
                values[key] = value
                continue
            try:
                values[key] = value if hints[key] is Any else _read(value, key, hints[key])
            except (ValueError, TypeError):
                kind = type_name(hints[key])
                raise UsageError(f"recipe's {key}={value!r:.80} is not {kind}") from None
        return cls(**values)

    def digest(self) -> str:
        """Return the SHA-256 of the recipe's JSON."""
        text = json.dumps(self.to_json(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def _hints() -> dict[str, Any]:
    """Return the types of a recipe's fields."""
    return typing.get_type_hints(Recipe)


def _typed(value: Any, key: str, hint: Any) -> Any:
    """Return a value given in Python in the type of its field: a path as text, 1 as 1.0.

    Raises:
        UsageError: It is of another type; text is no number here.
    """
    if isinstance(value, numbers.Real) and not isinstance(value, bool):  # NumPy's too
        value = int(value) if isinstance(value, numbers.Integral) else float(value)
    if key == "sparsity" and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if key == "sparsity":  # read elsewhere
        return value
    if hint is Any or key == "block_ratios":
        several = key == "block_ratios" and isinstance(value, (tuple, list))
        given = value if several else [value]
        needed = several or key == "pruner"
        if any(not _is_plugin(x) or (x is None and needed) for x in given):
            raise UsageError(f"recipe's {key}={value!r:.80} is not the name of a plugin")
        return value
    wrong = UsageError(f"recipe's {key}={value!r:.80} is not {type_name(hint)}")
    if key == "options":
        if not isinstance(value, Mapping):
            raise UsageError(
                f"recipe's options={value!r:.80} are not a mapping of plugins to options"
            )
        for name, given in value.items():
            if not isinstance(name, str) or not isinstance(given, Mapping):
                raise UsageError(f"recipe's options of {name!r:.80} are {given!r:.80}: no mapping")
        return value
    if key in ("requires", "keep", "only", "evaluate"):
        if not isinstance(value, (str, tuple, list)) or not all(isinstance(x, str) for x in value):
            raise wrong
        return value
    if key == "ratios":
        if not isinstance(value, (tuple, list)):
            raise UsageError(f"recipe's ratios={value!r:.80} are not a list of match and sparsity")
        return value
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    unions = (typing.Union, types.UnionType)
    members = typing.get_args(hint) if typing.get_origin(hint) in unions else (hint,)
    if isinstance(value, str):
        if str in members or any(typing.get_origin(x) is typing.Literal for x in members):
            return value
        raise wrong
    try:
        return convert(value, hint)
    except (ValueError, TypeError):
        raise wrong from None


def _is_plugin(value: Any) -> bool:
    """Return whether a value may be a plugin: a name, an instance, or None."""
    return not isinstance(value, (bool, int, float, bytes, Mapping, tuple, list, set))


def _read(value: Any, key: str, hint: Any) -> Any:
    if key in ("block_ratios", "ratios"):  # as in Python
        return value
    return convert(value, hint)


def _json(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_json(v) for v in value]
    if isinstance(value, Mapping):
        return {k: _json(v) for k, v in value.items()}
    if isinstance(value, GivenRatio):
        return {"match": value.match, "sparsity": _json(value.sparsity)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind = type(value)
        return {
            "instance": f"{kind.__module__}:{kind.__qualname__}",
            "options": option_values(value),
        }
    return value


def _checked_sparsity(value: Any) -> float | tuple[float, ...]:
    """Return one ratio, or several over depth.

    Raises:
        UsageError: One is no number in [0, 1), or there is none.
    """
    many = isinstance(value, (tuple, list))
    for number in value if many else [value]:
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise UsageError(f"sparsity {number!r} is not a number in [0, 1)")
        if not 0 <= number < 1:
            raise UsageError(f"sparsity {no_ratio(number)}")
    if many and not value:
        raise UsageError("sparsity is an empty list: give one number or several")
    return tuple(value) if many else value


def no_ratio(number: float) -> str:
    """Return what is wrong with a number outside [0, 1); one that is a percentage has a cure."""
    meant = f": did you mean {number / 100:g}?" if 2 <= number < 100 else ""
    return f"{number:g} is outside [0, 1){meant}"


def _choice(key: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise UsageError(f"{key} '{value}' is not known: {nearest(value, valid)}")
