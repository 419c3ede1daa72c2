"""The model card that a pruned checkpoint carries."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from neuroal.escape import markdown
from neuroal.evaluation import quality
from neuroal.units import windows

CARD = "README.md"
UNSTRUCTURED = """The zeros are unstructured: they
make the model no faster in a runtime that does not use sparsity, and `neuroal pack` leaves them out
of the file."""
PACKED = """The weights are packed, to the bit:
`import neuroal` lets transformers read them, `neuroal unpack` writes them as ordinary files."""
PATTERN = """The zeros follow a pattern, which
makes the model faster only in a runtime that uses it."""


def model_title(model: str) -> str:
    """Return a hub name as it is, and of any other path the last part."""
    return PurePath(model).name if model[:1] in "/.~\\" or ":" in model else model


def model_card(report: Mapping[str, Any]) -> str:
    """Return `README.md` of a pruned checkpoint, made from its report alone."""
    sparsity = report["sparsity"]
    recipe = {key: markdown(report["recipe"][key]) for key in ("seed", "budget", "pattern")}
    environment = {key: markdown(value) for key, value in report["environment"].items()}
    plugins = "\n".join(
        f"| {markdown(p['role'])} | {markdown(p['name'])} "
        f"| {markdown(p['distribution'])} {markdown(p['version'])} |"
        for p in report["plugins"]
    )
    chosen = [c for c in report["candidates"] if c["selected"] and c["parameters"]]
    parameters = "".join(
        f"- {markdown(c['role'])}: "
        f"{markdown(', '.join(f'{k} = {v}' for k, v in c['parameters'].items()))}\n"
        for c in chosen
    )
    data = report["data"]
    calibration = "none"
    if data:
        calibration = _windows(data)
    said = (*report["notes"], *quality.collapses(report))
    notes = "".join(f"- {markdown(note)}\n" for note in said)
    counts = report["counts"]
    again = "pruning" if report.get("training") else "run"
    zeros = UNSTRUCTURED if recipe["pattern"] == "unstructured" else PATTERN
    return f"""---
library_name: transformers
tags:
- pruning
- sparsity
- neuroal
---

# {markdown(model_title(report["model"]["name"]))}, pruned to {sparsity["achieved"]:.1%}

Of the prunable weights inside the decoder blocks, {counts["pruned"]:,} of
{counts["weights"]:,} are zero. {_left_dense(report)}{_training(report)} {zeros}

| role | plugin | distribution |
|---|---|---|
{plugins}

{_bytes(report)}{_quality(report)}{parameters}{notes}\
- calibration: {calibration}
- seed: {recipe["seed"]}, budget: {recipe["budget"]}, pattern: {recipe["pattern"]}
- made with neuroal {environment["neuroal"]}, torch {environment["torch"]},
  transformers {environment["transformers"]}

`neuroal.json` beside this file holds the whole report; `neuroal prune --recipe neuroal.json`
repeats the {again} (from the folder where it was started, if it names relative paths), and
`allocation.safetensors` holds every ratio, and importance if any.
"""


def _training(report: Mapping[str, Any]) -> str:
    """Return a sentence on what was trained."""
    training = report.get("training")
    if not training:
        new = [p["name"] for p in report["plugins"] if p["role"] == "reconstruction"]
        if new:
            return f"The weights that survived were given new values by `{markdown(new[0])}`."
        return "Nothing was re-trained."
    settings = training["settings"]
    what = "all weights" if settings["lora"] is None else f"rank {settings['lora']} under the masks"
    how = ", distilled from the dense model" if settings["distil"] else ""
    return (
        f"The weights that survived\nwere fine-tuned for {settings['steps']:,} steps ({what}{how}) "
        f"on {_windows(training['data'])}; every zero stayed."
    )


def _windows(data: Mapping[str, Any]) -> str:
    """Return what windows a report's data are, its source as code."""
    how = markdown(windows({**data, "source": ""}))
    return f"{how} {markdown(data['source'], code=True)}"


def _bytes(report: Mapping[str, Any]) -> str:
    """Return a table of the bytes of the weights, where the report has them."""
    sizes = report.get("weight_bytes") or {}
    if not sizes:
        return ""
    rows = "".join(f"| {form} | {size:,} |\n" for form, size in sizes.items())
    how = f"{PACKED}\n\n" if "packed" in sizes else ""
    left = (report.get("packing") or {}).get("left_dense")
    if left:
        how = f"{PACKED}\nMatrices that would not be smaller stay as they are: {len(left)}.\n\n"
    return f"| weights | bytes |\n|---|---|\n{rows}\n{how}"


def _quality(report: Mapping[str, Any]) -> str:
    """Return a table of the texts that a run was evaluated on, and a line for its tasks."""
    lines = [
        f"| {markdown(x['data'], code=True)} | {x['windows']} of {x['length']} tokens "
        f"| {' | '.join(_numbers(x))} |"
        for x in report.get("evaluation", ())
    ]
    if lines:
        head = "| text | windows | perplexity | dense | difference | excess |"
        lines = [head, "|---|---|---|---|---|---|", *lines, ""]
    lines += [f"- {markdown(line)}" for line in quality.accuracies(report)]
    return "".join(f"{line}\n" for line in lines)


def _numbers(entry: Mapping[str, Any]) -> list[str]:
    forms = {"perplexity": ".2f", "dense_perplexity": ".2f", "difference": "+.2f", "excess": ".3f"}
    return ["" if entry[k] is None else f"{float(entry[k]):{form}}" for k, form in forms.items()]


def _left_dense(report: Mapping[str, Any]) -> str:
    """Return a sentence on the linears of the blocks that stay dense, with a line end."""
    counts, sparsity = report["counts"], report["sparsity"]
    dense = counts.get("all_linears", counts["linears"]) - counts["linears"]
    if not dense:
        return ""
    return (
        f"{dense} of {counts['all_linears']} linears were left dense:\n"
        f"{sparsity['over_all']:.1%} of the weights of all linears are zero, "
        f"{sparsity['over_pruned']:.1%} of the others'.\n"
    )
