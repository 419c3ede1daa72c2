"""The study file: what is to be crossed with what, read from TOML and checked entry by entry."""

from __future__ import annotations

import dataclasses
import tomllib
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from neuroal import options
from neuroal.errors import NeuroalError, UsageError, nearest
from neuroal.plugins import in_file
from neuroal.recipe import GivenRatio, Recipe
from neuroal.types import Bos, Budget, Comparison, SparsityOver

T = TypeVar("T")
Options = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class ModelEntry:
    """One of `models`: a string is its name.

    Attributes:
        name: Folder, hub name, or "demo".
        label: What tables call it; "" is the last part of the name.
        dtype: In place of the study's.
        calibration: Source in place of the study's.
    """

    name: str
    label: str = ""
    dtype: str | None = None
    calibration: str | None = None


@dataclass(frozen=True)
class PrunerEntry:
    """One of `pruners`: a string is its name.

    Attributes:
        name: A plugin, as `--pruner` takes it.
        label: What tables call it; "" is the name.
        options: Its options.
    """

    name: str
    label: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TopUpEntry:
    """One of `top_ups`: a string is its name.

    Attributes:
        name: A preset, as `--top-up` takes it.
        label: What tables call it; "" is the name.
        block_ratios: Plugins in place of the preset's.
        row_ratios: Plugin in place of the preset's.
        alignment: Plugin in place of the preset's.
        refiner: Plugin in place of the preset's; "none" removes it.
        reconstruction: Plugin in place of the preset's; "none" removes it.
        search_pruner: Plugin in place of the preset's.
        options: Plugin name to its options.
        ratios: Ratios by pattern in place of a search, as in a recipe: of linears that none means,
            the study's sparsity is the ratio. The preset's refiner and reconstruction stay.
    """

    name: str
    label: str = ""
    block_ratios: tuple[str, ...] | None = None
    row_ratios: str | None = None
    alignment: str | None = None
    refiner: str | None = None
    reconstruction: str | None = None
    search_pruner: str | None = None
    options: Options = field(default_factory=dict)
    ratios: tuple[GivenRatio, ...] = ()


@dataclass(frozen=True)
class CalibrationEntry:
    """`[calibration]`: what every case is calibrated on; see `Recipe`."""

    source: str | None = None
    samples: int = Recipe.samples
    search_samples: int | None = Recipe.search_samples
    length: int | None = None
    bos: Bos = Recipe.bos
    pack_documents: bool | None = Recipe.pack_documents


@dataclass(frozen=True)
class EvaluationEntry:
    """One of `[[evaluations]]`: perplexity on `data`, or zero-shot `tasks`.

    Attributes:
        data: Source of the test text.
        tasks: Zero-shot tasks, or "paper" for the paper's seven.
        label: What tables call it; "" is a name made from `data` or `tasks`.
        length: Tokens per window of `data`.
        windows: At most this many windows of `data`.
        bos: Whether windows of `data` begin with the beginning-of-sequence token; None is "auto",
            and "never" where the study's budget is "paper".
        pack_documents: Whether the documents of `data` are joined by the end-of-sequence token;
            None: where they are conversations.
        include_path: Folder of local task definitions.
        limit: At most this many examples of each task.
        batch: Windows, or requests, per forward pass.
    """

    data: str | None = None
    tasks: tuple[str, ...] = ()
    label: str = ""
    length: int | None = None
    windows: int | None = None
    bos: Bos | None = None
    pack_documents: bool | None = None
    include_path: str | None = None
    limit: int | None = None
    batch: int | None = None


@dataclass(frozen=True)
class Study:
    """A study file; every case is one of the product of its lists.

    Attributes:
        models: What is pruned.
        evaluations: What is measured.
        pruners: Base pruners.
        top_ups: What decides the ratios.
        sparsities: Wanted sparsities; where empty, each pattern has its own.
        patterns: "unstructured" or N:M.
        seeds: Of the calibration windows and every other draw; tables show mean and deviation.
        calibration: Calibration windows.
        budget: As in `Recipe`, like all that follow.
    """

    models: tuple[ModelEntry, ...]
    evaluations: tuple[EvaluationEntry, ...]
    pruners: tuple[PrunerEntry, ...] = (PrunerEntry("wanda", "wanda"),)
    top_ups: tuple[TopUpEntry, ...] = (
        TopUpEntry("uniform", "uniform"),
        TopUpEntry("neuroal", "neuroal"),
    )
    sparsities: tuple[float, ...] = ()
    patterns: tuple[str, ...] = ("unstructured",)
    seeds: tuple[int, ...] = (0,)
    calibration: CalibrationEntry = CalibrationEntry()
    budget: Budget = "exact"
    comparison: Comparison | None = None
    skip_indivisible: bool = False
    keep_zeros: bool = True
    keep: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    sparsity_over: SparsityOver = "pruned"
    dtype: str = "auto"
    device: str = "auto"
    requires: tuple[str, ...] = ()

    def source_for(self, model: ModelEntry) -> str | None:
        """Return the source that a model is calibrated on; None where none is named."""
        own = "demo" if model.name == "demo" else None
        return model.calibration or self.calibration.source or own


def read(path: Path) -> Study:
    """Read a study file; relative paths are looked for in its folder first.

    Raises:
        UsageError: It cannot be read, a key or value is wrong, or a list has one thing twice.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot read study '{path}': {reason}") from error
    except RecursionError as error:
        raise UsageError(f"study '{path}' is nested too deeply") from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"study '{path}' is not TOML: {error}") from error
    with within(f"study '{path}'"):
        return parse(data, path.parent)


@contextmanager
def within(place: str) -> Iterator[None]:
    """Begin the message of an error in here with the part of the study that it is about."""
    try:
        yield
    except NeuroalError as error:
        raise type(error)(f"{place}: {error}") from error


def parse(data: Mapping[str, Any], folder: Path) -> Study:
    """Return the study of a file's content; relative paths begin in `folder` if they exist there.

    Raises:
        UsageError: A key or value is wrong, or a list has one thing twice.
    """
    values: dict[str, Any] = dict(data)
    readers: Mapping[str, tuple[type, str, Callable[[Any], Any]]] = {
        "models": (
            ModelEntry,
            "name",
            lambda m: _labelled(_located(m, folder, "name", "calibration")),
        ),
        "pruners": (
            PrunerEntry,
            "name",
            lambda p: _labelled(_located(p, folder, "name", find=_plugin)),
        ),
        "top_ups": (TopUpEntry, "name", lambda t: _top_up(t, folder)),
        "evaluations": (EvaluationEntry, "data", lambda e: _evaluation(e, folder)),
    }
    for key, (kind, main, finish) in readers.items():
        if key in values:
            entries = []
            for number, value in enumerate(_list(key, values[key]), 1):
                entry: Any = _entry(kind, main, value, f"{key}[{number}]")
                with within(f"{key}[{number}]"):
                    entries.append(finish(entry))
            values[key] = tuple(entries)
    if "calibration" in values:
        calibration = _entry(CalibrationEntry, "source", values["calibration"], "calibration")
        values["calibration"] = _located(calibration, folder, "source")
    for key in ("sparsities", "patterns", "seeds"):
        if key in values:
            values[key] = _list(key, values[key])
    study = _table(Study, values, "", done={*readers, "calibration"})
    _check(study)
    return _as_published(study) if study.budget == "paper" else study


def _as_published(study: Study) -> Study:
    """Return a study whose evaluations read windows as the published code does."""
    evaluations = [
        e if e.bos is not None or e.data is None else dataclasses.replace(e, bos="never")
        for e in study.evaluations
    ]
    return dataclasses.replace(study, evaluations=tuple(evaluations))


def _list(key: str, value: Any) -> Sequence[Any]:
    if not isinstance(value, list):
        raise UsageError(f"{key} is {value!r:.40}: write a list, [{value!r:.40}]")
    if not value and key != "sparsities":
        raise UsageError(f"{key} is empty: leave it out, or name one")
    return value


def _entry(kind: type[T], main: str, value: Any, where: str) -> T:
    """Return an entry that is given in full as a table, or as the string that is its main field."""
    if isinstance(value, str):
        value = {main: value}
    if not isinstance(value, Mapping):
        raise UsageError(f"{where} is {value!r:.40}: write a string or a table")
    return _table(kind, value, where)


def _table(kind: type[T], values: Mapping[str, Any], where: str, done: Collection[str] = ()) -> T:
    """Return a dataclass of this module made from a table, every value of its field's type."""
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    inside = f" in {where}" if where else ""
    converted: dict[str, Any] = {}
    for key, value in values.items():
        if key == "ratios" and key not in fields:
            raise UsageError(f"ratios{inside}: they belong to one of top_ups, [[top_ups.ratios]]")
        if key not in fields:
            raise UsageError(f"unknown key '{key}'{inside}: {nearest(key, fields)}")
        text = isinstance(value, str) and str in typing.get_args(hints[key])
        if key in done or text:  # "none" too: what a study leaves out is None
            converted[key] = value
        elif key == "options":
            converted[key] = _options(value, where, hints[key] == Options)
        elif key == "ratios":
            with within(where):
                converted[key] = tuple(GivenRatio.of(x) for x in _list(key, value))
        else:
            try:
                converted[key] = options.convert(value, hints[key])
            except (ValueError, TypeError):
                wanted = options.type_name(hints[key])
                raise UsageError(f"{key}{inside} is {value!r:.60}, not {wanted}") from None
    for name, f in fields.items():
        required = f.default is f.default_factory is dataclasses.MISSING
        if required and name not in converted:
            raise UsageError(f"no {name}{inside}: at least one is needed")
    return kind(**converted)


def _options(value: Any, where: str, by_plugin: bool) -> Mapping[str, Any]:
    example = "{owl = {m = 5}}" if by_plugin else "{a = 0.5}"
    inner = value.values() if by_plugin and isinstance(value, Mapping) else ()
    if not isinstance(value, Mapping) or not all(isinstance(x, Mapping) for x in inner):
        raise UsageError(f"options in {where} are {value!r:.40}: write a table, {example}")
    return value


def located(text: str, folder: Path) -> str:
    """Return a path within the study file's folder, if it exists there; anything else unchanged.

    The path may end in `:column` or `:Class`.
    """
    path = text.partition(":")[0]
    return str(folder / text) if path and (folder / path).exists() else text


def _plugin(text: str, folder: Path) -> str:
    """Return `file.py:Class` within the study file's folder, and any other name unchanged."""
    return located(text, folder) if in_file(text) else text


def _located(entry: T, folder: Path, *keys: str, find: Callable[[str, Path], str] = located) -> T:
    texts = {key: getattr(entry, key) for key in keys}
    changes = {k: find(v, folder) for k, v in texts.items() if isinstance(v, str)}
    return dataclasses.replace(entry, **changes)  # type: ignore[type-var]


def _labelled(entry: Any) -> Any:
    return dataclasses.replace(entry, label=entry.label or _short(entry.name))


def _short(name: str) -> str:
    """Return what a table calls `path/to/llama`, `./mine.py:Mine` or `neuroal:owl`."""
    return name.rstrip("/\\").replace("\\", "/").rpartition("/")[2].rpartition(":")[2]


def _top_up(top_up: TopUpEntry, folder: Path) -> Any:
    roles = ("row_ratios", "alignment", "refiner", "reconstruction", "search_pruner")
    top_up = _located(top_up, folder, "name", *roles, find=_plugin)
    if top_up.block_ratios is not None:
        block = tuple(_plugin(b, folder) for b in top_up.block_ratios)
        top_up = dataclasses.replace(top_up, block_ratios=block)
    return _labelled(top_up)


def _evaluation(evaluation: EvaluationEntry, folder: Path) -> EvaluationEntry:
    if (evaluation.data is None) == (not evaluation.tasks):
        raise UsageError("give data (a source, for perplexity) or tasks (zero-shot), one of them")
    of_data = ("length", "windows", "bos", "pack_documents")
    foreign = ("include_path", "limit") if evaluation.data else of_data
    for key in foreign:
        if getattr(evaluation, key) is not None:
            kind = "data" if evaluation.data else "tasks"
            raise UsageError(f"{key} has no meaning beside {kind}")
    evaluation = _located(evaluation, folder, "data", "include_path")
    if evaluation.label:
        return evaluation
    source = evaluation.data or " + ".join(evaluation.tasks)
    name = source.replace("\\", "/").rpartition("/")[2]
    for ending in (".gz", ".txt", ".jsonl", ".json", ".parquet"):
        name = name.removesuffix(ending)
    return dataclasses.replace(evaluation, label=name)


def _check(study: Study) -> None:
    """Refuse labels that are there twice and numbers that no recipe takes."""
    for key in ("models", "pruners", "top_ups", "evaluations"):
        _refuse_repeats(key, [x.label for x in getattr(study, key)], ": give one a label")
    for key in ("sparsities", "patterns", "seeds"):
        _refuse_repeats(key, getattr(study, key), "")
    calibration = dataclasses.asdict(study.calibration)
    calibration.pop("source")
    Recipe(budget=study.budget, dtype=study.dtype, requires=study.requires, **calibration)
    for sparsity in study.sparsities:
        Recipe(sparsity=sparsity)
    for pattern in study.patterns:
        Recipe(pattern=pattern)
    for model in study.models:
        Recipe(dtype=model.dtype or "auto")


def _refuse_repeats(key: str, values: Sequence[Any], cure: str) -> None:
    for value in values:
        if list(values).count(value) > 1:
            raise UsageError(f"{key} has '{value}' twice{cure}")
