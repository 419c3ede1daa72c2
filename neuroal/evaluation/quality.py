"""What a run's model is worth beside the dense one: the entries of a report, and their words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

from neuroal.evaluation.perplexity import Perplexity
from neuroal.recipe import Recipe

COLLAPSE = 1.0  # excess above which a model is of no use
BESIDE = ("dense_perplexity", "difference", "excess")
_IDENTITY = ("sha256", "windows", "length", "dtype")


def entry(pruned: Perplexity, dense: Perplexity | None) -> dict[str, Any]:
    """Return what a report says of one text.

    It is the pruned model's perplexity with its protocol; `dense_perplexity`, measured by the same
    protocol; `difference`; and `excess`, ln(perplexity) − ln(dense perplexity). These three are
    None without the dense one; what is not finite is "inf" or "nan".
    """
    values = pruned.to_json()
    other = None if dense is None else dense.perplexity
    return values | _beside(pruned.perplexity, other)


def _beside(perplexity: float, dense: float | None) -> dict[str, Any]:
    if dense is None:
        return dict.fromkeys(BESIDE)
    numbers = (dense, perplexity - dense, math.log(perplexity) - math.log(dense))
    return {key: x if math.isfinite(x) else str(x) for key, x in zip(BESIDE, numbers, strict=True)}


def same_text(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether two entries are of the same windows, by models of the same dtype."""
    return all(one.get(key) == other.get(key) for key in _IDENTITY)


def with_dense(new: Mapping[str, Any], report: Mapping[str, Any]) -> dict[str, Any]:
    """Return an entry with the dense model's number beside it, where the report has one."""
    earlier = (report.get("parent") or {}).get("evaluation", ())
    for known in (*report.get("evaluation", ()), *earlier):
        if same_text(new, known) and known["dense_perplexity"] is not None:
            beside = _beside(float(new["perplexity"]), float(known["dense_perplexity"]))
            return {**new, **beside}
    return dict(new)


def in_another_dtype(new: Mapping[str, Any], report: Mapping[str, Any]) -> str | None:
    """Return a note on a dense number of the same windows that is of another dtype, if one is."""
    for known in report.get("evaluation", ()):
        alike = {**known, "dtype": new["dtype"]}
        if known["dense_perplexity"] is not None and same_text(new, alike):
            return (
                f"the run has the dense model's {float(known['dense_perplexity']):.4f} by "
                f"{known['dtype']}, not {new['dtype']}: --dtype {known['dtype']} measures alike"
            )
    return None


def title(source: str) -> str:
    """Return the name of a text: of a file without its folder."""
    return PurePath(source).name if "/" in source and PurePath(source).suffix else source


def words(found: Mapping[str, Any]) -> str:
    """Return an entry's numbers in a line: `93.5216, dense 62.8211 (+30.7005, excess 0.3979)`."""
    text = f"{float(found['perplexity']):.4f}"
    if found["dense_perplexity"] is None:
        return text
    dense, difference, excess = (float(found[key]) for key in BESIDE)
    return f"{text}, dense {dense:.4f} ({difference:+.4f}, excess {excess:.4f})"


def accuracies(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for every choice of tasks that a run's model was measured on."""
    for found in report.get("zero_shot", ()):
        names = ", ".join(found["tasks"])
        limit = "" if found["limit"] is None else f", limited to {found['limit']} a task"
        if found["accuracy"] is not None:
            yield f"accuracy on {names}: {found['accuracy']:.4f} ({found['harness']}{limit})"


def collapses(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for every text on which a run's model has collapsed, with what to try.

    That is where its excess is above 1, or no number.
    """
    for found in report.get("evaluation", ()):
        if found["excess"] is None or float(found["excess"]) <= COLLAPSE:
            continue
        perplexity, dense = float(found["perplexity"]), float(found["dense_perplexity"])
        yield (
            f"the model has collapsed on '{title(found['data'])}': its perplexity of "
            f"{perplexity:.1f} is {perplexity / dense:.1f} times the dense model's {dense:.1f} "
            f"(excess {float(found['excess']):.2f}): try {_what_to_try(report['recipe'])}"
        )


def _what_to_try(asked: Mapping[str, Any]) -> str:
    recipe = Recipe.from_json({k: asked[k] for k in ("sparsity", "pattern")})
    fixed = recipe.parsed_pattern() is not None and recipe.sparsity is None
    cures = []
    if asked["top_up"] != "max":
        cures.append("--effort max" if asked["top_up"] == "high" else "--effort high")
    cures.append("a pattern that keeps more" if fixed else f"a sparsity below {recipe.wanted:g}")
    return " or ".join(filter(None, (", ".join(cures[:-1]), cures[-1])))
