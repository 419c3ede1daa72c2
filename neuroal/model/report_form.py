"""What the report of a run holds, key by key, so that a damaged one is refused before its use."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from neuroal.errors import UsageError
from neuroal.recipe import Recipe

_LARGEST = 10.0**15  # of what is added up


def _number(value: Any, low: float = -_LARGEST, high: float = _LARGEST) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def _measured(value: Any) -> bool:
    limit = sys.float_info.max
    numeric = isinstance(value, float) or _number(value, -limit, limit)
    return numeric or value in ("inf", "-inf", "nan")


_KINDS: Mapping[str, Callable[[Any], bool]] = {
    "text": lambda x: isinstance(x, str),
    "truth value": lambda x: isinstance(x, bool),
    "count": lambda x: isinstance(x, int) and _number(x, 0),
    "number": _number,
    "number of seconds": lambda x: _number(x, 0),
    "ratio in [0, 1]": lambda x: _number(x, 0, 1),
    "measured number": _measured,
    "perplexity": lambda x: _measured(x) and (isinstance(x, str) or x > 0),
    "value": lambda x: True,
    "null": lambda x: x is None,
}

# A form is the name of a kind; an object's keys, those with a ? may be absent; {"*": form}, an
# object of any keys; [form], a list; several, of which one fits. "+" for "*": not empty.
_SIDE = {"perplexity": "perplexity", "windows": "count", "length": "count"}
_SIDE |= {"data": "text", "sha256": "text", "dtype": "text"}
_BESIDE = ("dense_perplexity", "difference", "excess")
_OVER = ("tokens_per_second", "over_dense")
_EVALUATION = [
    (
        _SIDE | {"dense_perplexity": "perplexity"} | dict.fromkeys(_BESIDE[1:], "measured number"),
        _SIDE | dict.fromkeys(_BESIDE, "null"),
    )
]
_WINDOWS = {"source": "text", "windows": "count", "length": "count", "sha256": "text"} | {
    "bos?": ("text", "null"),
    "packed?": "truth value",
}
_ENVIRONMENT = {"threads": "count"} | dict.fromkeys(
    ("neuroal", "python", "torch", "transformers", "platform", "device", "dtype"), "text"
)
_SPEEDS = [f"{step}_{what}" for step in ("prefill", "decode") for what in _OVER]
_FORM: Mapping[str, Any] = {
    "recipe": {"pruner": "value", "top_up": "value"}
    | dict.fromkeys(("pattern", "seed", "budget", "sparsity"), "value"),
    "recipe_sha256": "text",
    "environment": _ENVIRONMENT,
    "model": {"name": "text", "sha256": ("text", "null")},
    "plugins": [
        dict.fromkeys(("role", "name", "distribution", "version"), "text")
        | {"options": {"*": "value"}, "sha256": ("text", "null")}
    ],
    "data": (_WINDOWS, "null"),
    "candidates": [
        {
            "role": "text",
            "plugin": "text",
            "parameters": {"*": "value"},
            "misalignment": ("measured number", "null"),
            "selected": "truth value",
            "dropped": "truth value",
            "probe?": "truth value",
            "windows?": ("count", "null"),
        }
    ],
    "sparsity": dict.fromkeys(("wanted", "achieved", "over_pruned", "over_all"), "ratio in [0, 1]"),
    "blocks": ["+", {"name": "text", "wanted?": "ratio in [0, 1]", "achieved?": "ratio in [0, 1]"}],
    "linears": {
        "+": {
            "wanted": "ratio in [0, 1]",
            "achieved": "ratio in [0, 1]",
            "rows": dict.fromkeys(("min", "mean", "max"), "ratio in [0, 1]"),
            "tensors?": ["text"],
            "input_norm?": dict.fromkeys(("dense", "pruned"), ("number", "null")),
        }
    },
    "evaluation?": _EVALUATION,
    "zero_shot?": [
        {
            "tasks": {"*": {"metric": "text", "examples": "count"}},
            "accuracy": ("number", "null"),
            "limit": ("number", "null"),
            "harness": "text",
            "dtype": "text",
        }
    ],
    "bench?": [
        {
            "environment": _ENVIRONMENT,
            "batches": ["count"],
            "prompt": "count",
            "tokens": "count",
            "measured": [
                {
                    "form": "text",
                    "batch": "count",
                    "memory_bytes": "count",
                    "gain": ("text", "null"),
                }
                | dict.fromkeys(("difference", *_SPEEDS), ("measured number", "null"))
            ],
            "not_measured": {"*": "text"},
            "notes": ["text"],
        }
    ],
    "timings": {"+": "number of seconds"},
    "counts": {
        **dict.fromkeys(("block_runs", "linears", "weights", "pruned"), "count"),
        **dict.fromkeys(("all_linears", "all_weights"), "count"),
    },
    "peak_memory_bytes": "count",
    "phase_memory_bytes?": {"*": "count"},
    "weight_bytes?": {"*": "count"},
    "packing?": (
        dict.fromkeys(("packed", "dense_bytes", "packed_bytes"), "count")
        | {"left_dense": {"*": "count"}},
        "null",
    ),
    "notes": ["text"],
    "parent?": ({"name": "text", "sha256?": ("text", "null"), "evaluation?": _EVALUATION}, "null"),
    "training?": (
        {
            "settings": {"steps": "count", "lora": ("count", "null"), "distil": "truth value"},
            "data": _WINDOWS,
            "trained": "count",
            "losses": [["value"]],
        },
        "null",
    ),
}


def check_report(
    file: object, report: Mapping[str, Any], needed: Collection[str] | None = None
) -> None:
    """Refuse a report whose parts are not what they were written as.

    Args:
        file: Where it is from, for the message.
        report: Its JSON values.
        needed: The parts that may not be missing; None: all of a run's report. A recipe that is
            not among them is left to who reads it.

    Raises:
        UsageError: A part is missing, or of a wrong type.
    """
    if needed is None and "schema" not in report:
        raise UsageError(f"'{file}' is no report of a run: it has no 'schema'")
    wrong = next(_wrong(report, _FORM.keys() if needed is None else needed), None)
    if wrong is not None:
        raise UsageError(
            f"'{file}' is damaged: {wrong}: take the run's own file again, or run it again"
        )


def _wrong(report: Mapping[str, Any], needed: Collection[str]) -> Iterator[str]:
    """Yield what is wrong with a report, the first thing first."""
    try:
        json.dumps(report, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        yield "it holds text that is no Unicode"
    form = {k if k in needed else f"{k.removesuffix('?')}?": x for k, x in _FORM.items()}
    if "recipe" not in needed:
        form.pop("recipe?")
    yield from _misfits(report, form, "")
    if "recipe" in needed:
        try:
            Recipe.from_json(_checkable(report["recipe"]))
        except UsageError as error:
            yield f"{error}"
    for k, found in enumerate(report.get("zero_shot", ())):
        for name, task in found["tasks"].items():
            if not (_measured(task.get(task["metric"])) or task.get(task["metric"]) is None):
                yield f"zero_shot[{k}].tasks.{name}.{task['metric']} is not a measured number"
    blocks = tuple(f"{x['name']}." for x in report.get("blocks", ()))
    for linear in report.get("linears", ()) if blocks else ():
        if not linear.startswith(blocks):
            yield f"linear '{linear}' is in none of its blocks"
    training = report.get("training")
    for step in training["losses"] if training else ():
        if len(step) != 2 or not _KINDS["count"](step[0]) or not _measured(step[1]):
            yield "training.losses is not a list of steps and losses"
    if training and not report.get("parent"):
        yield "parent is missing"


def _misfits(value: Any, form: Any, key: str) -> Iterator[str]:
    """Yield what does not fit a form, by its key: `plugins[0].role is missing`."""
    if isinstance(form, tuple):
        found = [next(_misfits(value, each, key), None) for each in form]
        if None not in found:
            yield str(found[0])
    elif isinstance(form, str):
        if not _KINDS[form](value):
            yield f"{key} is not a {form}"
    elif isinstance(form, list):
        if not isinstance(value, list):
            yield f"{key} is not a list"
        elif not value and form[0] == "+":
            yield f"{key} is empty"
        else:
            for index, each in enumerate(value):
                yield from _misfits(each, form[-1], f"{key}[{index}]")
    elif not isinstance(value, dict):
        yield f"{key} is not an object"
    elif not form.keys() <= {"*", "+"}:
        for name, inner in form.items():
            at = f"{key}.{name.removesuffix('?')}".removeprefix(".")
            if name.removesuffix("?") in value:
                yield from _misfits(value[name.removesuffix("?")], inner, at)
            elif not name.endswith("?"):
                yield f"{at} is missing"
    elif not value and "+" in form:
        yield f"{key} is empty"
    else:
        for name, each in value.items():
            yield from _misfits(each, next(iter(form.values())), f"{key}.{name}")


def _checkable(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a recipe that this version knows and that JSON can say."""
    known = {f.name for f in dataclasses.fields(Recipe)}
    kept = {}
    for key, value in recipe.items():
        values = value if isinstance(value, list) else [value]
        if key in known and not any(isinstance(x, dict) and "instance" in x for x in values):
            kept[key] = value
    return kept
