"""What a report says of one run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from neuroal.evaluation import quality
from neuroal.html_report.allocation_figures import row_ratios, sparsity_map
from neuroal.html_report.bench import bench_tables, gains
from neuroal.html_report.figure import Table, finite
from neuroal.html_report.reading import FinishedRun
from neuroal.html_report.search_figures import STEPS, misalignment
from neuroal.html_report.section import Details, Fact, Section
from neuroal.html_report.training_figures import losses
from neuroal.html_report.walk_figures import input_norms, phases
from neuroal.recipe import TOP_UP_ROLES
from neuroal.run.model_card import model_title
from neuroal.units import duration, number, percent, size, windows

_TEXTS = 3  # whose perplexity is among the facts


def run_section(run: FinishedRun) -> Section:
    """Return the section of a run."""
    report = run.report
    sparsity, counts = report["sparsity"], report["counts"]
    model = model_title(report["model"]["name"])
    lead = (
        f"{model}, pruned by {method(report['recipe'])}: {counts['pruned']:,} of "
        f"{counts['weights']:,} prunable weights inside the decoder blocks are zero."
    )
    training = report.get("training")
    if training:
        steps = training["settings"]["steps"]
        lead += (
            f" What survived was fine-tuned for {steps:,} steps, from {report['parent']['name']}."
        )
    return Section(
        title=f"{model}, {method(report['recipe'])}, {percent(sparsity['achieved'])}",
        lead=lead,
        facts=list(_facts(report)),
        notes=[*report["notes"], *quality.collapses(report)],
        figures=[
            *losses(run),
            sparsity_map(run),
            *(misalignment(run, role) for role in STEPS),
            row_ratios(run),
            input_norms(run),
            phases(run),
            *gains(run),
        ],
        listings=[
            *_evaluation(report),
            *_training(report),
            *bench_tables(report),
            *_packing(report),
            _recipe(run),
            _provenance(report),
            _plugins(report),
        ],
    )


def method(recipe: Mapping[str, Any]) -> str:
    """Return what a recipe prunes by, in a few words: `wanda + neuroal`."""
    decided = recipe["top_up"]
    if recipe.get("allocation") is not None:
        decided = "a given allocation"
    elif recipe.get("ratios") or isinstance(recipe.get("sparsity"), list):
        decided = "given ratios"
    others = []
    for role in TOP_UP_ROLES:
        choice = recipe.get(role)
        if choice is not None:
            names = ", ".join(map(_name, choice if isinstance(choice, list) else [choice]))
            others.append(f"{role.replace('_', ' ')} {names}")
    pattern = "" if recipe.get("pattern") in (None, "unstructured") else f" {recipe['pattern']}"
    more = f" ({'; '.join(others)})" if others else ""
    return f"{_name(recipe['pruner'])}{pattern} + {decided}{more}"


def _name(plugin: str | Mapping[str, Any]) -> str:
    """Return a plugin's name; of a Python instance, that of its class."""
    return plugin if isinstance(plugin, str) else str(plugin["instance"])


def _facts(report: Mapping[str, Any]) -> Iterator[Fact]:
    sparsity, counts = report["sparsity"], report["counts"]
    over_all = report["recipe"].get("sparsity_over") == "all"
    weights = counts["all_weights" if over_all else "weights"]
    wanted = f"{percent(sparsity['wanted'], 2)} wanted, over {weights:,} weights"
    yield Fact("Achieved sparsity", percent(sparsity["achieved"], 2), wanted)
    before = (report.get("parent") or {}).get("evaluation", ())
    for entry in report.get("evaluation", ())[:_TEXTS]:
        yield _perplexity(entry, next((x for x in before if quality.same_text(x, entry)), None))
    dense = counts.get("all_linears", counts["linears"]) - counts["linears"]
    if dense:  # reports written before linears could be kept have no such counts
        other = percent(sparsity["over_pruned" if over_all else "over_all"], 2)
        which = "the linears that are pruned" if over_all else "all linears"
        yield Fact("Linears left dense", f"{dense:,}", f"{other} over {which}")
    chosen = [c for c in report["candidates"] if c["selected"]]
    measured = [c for c in report["candidates"] if finite(c["misalignment"]) is not None]
    scored = [c for c in chosen if finite(c["misalignment"]) is not None]
    if scored:
        several = len(measured) > 1
        more = f"the chosen one of {len(measured)} candidates" if several else "one candidate"
        yield Fact("Misalignment", number(scored[-1]["misalignment"], 4), more)
    runs = f"{counts['block_runs']:,} block runs"
    yield Fact("Time", duration(sum(report["timings"].values())), runs)
    yield from _bytes(report.get("weight_bytes") or {})
    where = report["environment"]
    yield Fact(
        "Peak memory", size(report["peak_memory_bytes"]), f"{where['device']}, {where['dtype']}"
    )


def _bytes(sizes: Mapping[str, int]) -> Iterator[Fact]:
    """Yield the bytes of the weights; reports written before they were counted have none."""
    forms = [f"{form} {sizes[form]:,}" for form in ("dense", "pruned", "packed") if form in sizes]
    if forms:
        yield Fact("Weights on disk", size(list(sizes.values())[-1]), f"bytes: {', '.join(forms)}")


def _perplexity(entry: Mapping[str, Any], before: Mapping[str, Any] | None) -> Fact:
    said = []
    if before is not None:
        said.append(f"before the training {number(float(before['perplexity']), 4)}")
    if entry["dense_perplexity"] is not None:
        dense, excess = float(entry["dense_perplexity"]), float(entry["excess"])
        said.append(f"dense {number(dense, 4)}, excess {number(excess, 3)}")
    more = ", ".join(said)
    value = number(float(entry["perplexity"]), 4)
    return Fact(f"Perplexity on {quality.title(entry['data'])}", value, more)


def _evaluation(report: Mapping[str, Any]) -> Iterator[Details]:
    keys = ("perplexity", "dense_perplexity", "difference", "excess")
    rows = [
        (
            quality.title(x["data"]),
            f"{x['windows']} of {x['length']} tokens",
            *(_number(x[key]) for key in keys),
            str(x["sha256"])[:12],
        )
        for x in report.get("evaluation", ())
    ]
    if rows:
        shown = ("text", "windows", "perplexity", "dense", "difference", "excess", "SHA-256")
        yield Details("Evaluation", table=Table(shown, rows))
    tasks = [
        (
            name,
            task["metric"],
            _number(task.get(task["metric"])),
            task["examples"],
            found["harness"],
        )
        for found in report.get("zero_shot", ())
        for name, task in found["tasks"].items()
    ]
    if tasks:
        headers = ("task", "metric", "value", "documents", "harness")
        yield Details("Zero-shot tasks", table=Table(headers, tasks))


def _number(value: Any) -> float | str | None:
    """Return a number as a table has it; what is not finite as text."""
    found = finite(value)
    return found if found is not None or value is None else str(value)


def _training(report: Mapping[str, Any]) -> Iterator[Details]:
    training = report.get("training")
    if training:
        given = {k: v for k, v in training["settings"].items() if v not in (None, [], False)}
        pairs = [
            ("from", str(report["parent"]["name"])),
            ("SHA-256 of that run's model", str(report["parent"].get("sha256"))),
            ("parameters trained", f"{training['trained']:,}"),
            ("text", windows(training["data"])),
            ("SHA-256 of its tokens", str(training["data"]["sha256"])),
            *((key.replace("_", " "), _value(x)) for key, x in given.items() if key != "data"),
        ]
        yield Details("Fine-tuning", pairs=pairs)


def _packing(report: Mapping[str, Any]) -> Iterator[Details]:
    """Yield which matrices of a packed run stay as they are."""
    found = report.get("packing")
    if found:
        words = (
            f"{found['packed']:,} matrices of {found['dense_bytes']:,} bytes are packed into "
            f"{found['packed_bytes']:,}."
        )
        left = list(found["left_dense"].items())
        words += " These stay as they are, which is smaller:" if left else ""
        table = Table(("matrix", "bytes"), left) if left else None
        yield Details("Packed weights", words, table=table)


def _recipe(run: FinishedRun) -> Details:
    recipe = run.report["recipe"]
    pairs = [(key, _value(x)) for key, x in recipe.items() if x not in (None, {}, [])]
    return Details("Recipe", "This repeats the run:", f"neuroal prune --recipe {run.path}", pairs)


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _plugins(report: Mapping[str, Any]) -> Details:
    rows = [
        (
            p["role"],
            p["name"],
            f"{p['distribution']} {p['version']}",
            ", ".join(f"{key} = {_value(x)}" for key, x in p["options"].items()) or "none",
            str(p["sha256"])[:12],
        )
        for p in report["plugins"]
    ]
    return Details("Plugins", table=Table(("role", "plugin", "from", "options", "SHA-256"), rows))


def _provenance(report: Mapping[str, Any]) -> Details:
    data, where = report["data"], report["environment"]
    versions = ", ".join(f"{k} {where[k]}" for k in ("neuroal", "torch", "transformers", "python"))
    pairs = [
        ("model", str(report["model"]["name"])),
        ("SHA-256 of the model", str(report["model"]["sha256"])),
    ]
    if data:
        pairs += [
            ("calibration", windows(data)),
            ("SHA-256 of the tokens", str(data["sha256"])),
        ]
    pairs += [
        ("SHA-256 of the recipe", str(report.get("recipe_sha256"))),
        ("versions", versions),
        ("platform", f"{where['platform']}, {where['threads']} threads"),
    ]
    return Details("Provenance", pairs=pairs)
