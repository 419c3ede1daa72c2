"""What `neuroal prune` says before and after a run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from textwrap import fill
from typing import Any

from neuroal.cli.layout_tables import layout_json, layout_tables
from neuroal.cli.tables import table
from neuroal.cost.offload import Offload
from neuroal.cost.plan import Plan
from neuroal.cost.preparation import SearchStep
from neuroal.cost.texts import TextSize
from neuroal.evaluation import quality
from neuroal.pruning.targets import Rules
from neuroal.run.report import Report
from neuroal.units import parameters, rough_duration, size, windows

_FINAL = ("pruner", "refiner", "reconstruction")
_STEPS = {"block_ratios": "block ratios", "row_ratios": "row ratios"}


def plan_json(plan: Plan) -> dict[str, Any]:
    """Return the plan with every linear as JSON values."""
    recipe, layout = plan.prepared.recipe, plan.prepared.layout
    return plan.to_json() | {"recipe": recipe.to_json(), "layout": layout_json(layout)}


def plan_text(plan: Plan, out: Path) -> str:
    """Return the plan as tables."""
    prepared, recipe, layout = plan.prepared, plan.prepared.recipe, plan.prepared.layout
    plugins = [
        (p["role"], p["name"], f"{p['distribution']} {p['version']}", _options(p["options"]))
        for p in prepared.setup.provenance
    ]
    steps = [(_STEPS.get(s.role, s.role), s.plugin, _candidates(s)) for s in prepared.steps]
    length = f"{recipe.length} tokens" if recipe.length else "the rows' or the model's length"
    source = recipe.calibration or "a source to be given"
    data = plan.text and plan.text.data
    wanted = f"{recipe.samples} windows of {length} from {source}"
    exists = " (exists: add --overwrite or choose another --out)" if out.exists() else ""
    blocks, linears = len(layout.blocks), len(layout.linears)
    cost = [
        ("model", f"{recipe.model}: {blocks} blocks, {linears} linears"),
        *_wanted(plan),
        *_given(recipe.to_json()),
        ("pattern, budget", f"{recipe.pattern}, {recipe.budget}"),
        ("calibration", wanted if data is None else windows(data.to_json())),
        *(("evaluation", _text_size(x)) for x in plan.texts),
        ("block runs", f"{'more than' if plan.open_ended else 'at most'} {plan.block_runs:,}"),
        ("memory, estimated", _memory(plan)),
        ("disk, estimated", size(plan.needs.disk(plan.offload))),
        ("time, estimated", duration(plan)),
        ("output", f"{out}{exists}"),
    ]
    parts = [
        *layout_tables(layout),
        table(plugins, ("role", "plugin", "from", "options")),
        table(steps, ("step", "strategy", "candidates")),
        table(cost),
        *_notes(_plan_notes(plan)),
    ]
    return "\n\n".join(part for part in parts if part)


def _text_size(text: TextSize) -> str:
    many = "all" if text.windows is None else f"{text.windows}"
    return f"dense and pruned on {many} windows of {text.length} tokens from {text.source}"


def _wanted(plan: Plan) -> Iterator[tuple[str, str]]:
    """Yield what is to be pruned, over which linears."""
    rules, layout = plan.prepared.rules, plan.prepared.layout
    if not rules.dense:
        yield "prunable weights", f"{plan.weights:,}"
    else:
        pruned = len(rules.pruned(layout))
        yield (
            "weights to prune from",
            f"{plan.weights:,} in {pruned} of {len(layout.linears)} linears; "
            f"{layout.weights:,} in all of them",
        )
    weights = rules.sparsity * rules.counted(layout)
    yield "sparsity wanted", f"{rules.sparsity:g}{_over(rules)} ({weights:,.0f} weights)"


def _over(rules: Rules) -> str:
    """Return what the sparsity is over, where that makes a difference."""
    if not rules.dense:
        return ""
    return " over all linears" if rules.over == "all" else " over the linears that are pruned"


def _memory(plan: Plan) -> str:
    chosen = plan.offload
    said = ["blocks read one at a time"] if chosen.blocks else []
    said += ["activations on the disk"] if chosen.activations else []
    if said:
        return f"{size(plan.needs.memory(chosen))}, {', '.join(said)}"
    streamed, both = (size(plan.needs.memory(Offload(True, spills))) for spills in (False, True))
    return f"{size(plan.needs.memory(chosen))} ({streamed} with --stream, {both} with --spill too)"


def duration(plan: Plan) -> str:
    """Return the estimated seconds of a run's phases as people say them."""
    if plan.seconds is None:
        return "not known for this family"
    phases = ", ".join(f"{k} {rough_duration(v, 1)}" for k, v in plan.seconds.items())
    least = "more than " if plan.open_ended else ""
    total = rough_duration(sum(plan.seconds.values()), 1)
    how = ", extrapolated from a part of a block" if plan.extrapolated else ""
    return f"{least}{total} ({phases}) and reading and writing{how}"


def _plan_notes(plan: Plan) -> Iterator[str]:
    yield from plan.notes
    measured = [s for s in plan.prepared.steps if s.candidates is None]
    if any(s.most is None for s in measured):
        yield "candidates that depend on measurements are in neither block runs, time nor memory"
    elif measured:
        yield "candidates that depend on measurements are not in the memory"
    if plan.open_ended:
        yield "candidates that answer earlier ones are in neither block runs nor time"


def _candidates(step: SearchStep) -> str:
    if step.most is not None:
        return f"at the cost of {step.most:g} on all windows, at most"
    if step.candidates is None:
        return "depend on measurements"
    if step.goes_on:
        return f"{step.candidates}, and more by their costs"
    return str(step.candidates) if step.candidates else "none to measure"


def _options(values: Mapping[str, Any]) -> str:
    texts = {k: ",".join(map(str, v)) if isinstance(v, list) else v for k, v in values.items()}
    text = ", ".join(f"{k}={v}" for k, v in texts.items())
    return text if len(text) <= 32 else f"{text[:31]}…"


def run_text(report: Report, out: Path) -> str:
    """Return the summary of a run: one table, then its notes."""
    plugins = {p["role"]: p["name"] for p in report.plugins}
    counts, seconds = report.counts, report.timings
    phases = [f"{k.replace('_', ' ')} {v:.1f}" for k, v in seconds.items() if v >= 0.05]
    rows = [
        ("model", report.model["name"]),
        ("pruner", ", ".join(plugins[role] for role in _FINAL if role in plugins)),
        *((("searched under", plugins["search_pruner"]),) if "search_pruner" in plugins else ()),
        ("sparsity wanted", f"{report.sparsity['wanted']:.6g}"),
        (
            "sparsity achieved",
            f"{report.sparsity['achieved']:.6f} ({counts['pruned']:,} of {_counted(report):,})",
        ),
        *_dense_rows(report),
        *_step_rows(report),
        *_training_rows(report),
        *_quality_rows(report),
        ("seconds", fill(f"{sum(seconds.values()):.1f} ({', '.join(phases)})", 60)),
        ("block runs", f"{counts['block_runs']:,}"),
        ("peak memory", size(report.peak_memory_bytes)),
        *_packed_rows(report),
        ("written to", str(out)),
    ]
    return "\n\n".join(
        [table(rows), *_notes((*report.notes, *quality.collapses(report.to_json())))]
    )


def _training_rows(report: Report) -> Iterator[tuple[str, str]]:
    """Yield of a fine-tuned run what it was made from, and how its loss went."""
    if report.training is None or report.parent is None:
        return
    yield "fine-tuned from", report.parent["name"]
    losses = [f"{loss:.4f} at step {step}" for step, loss in report.training["losses"]]
    yield "loss", " to ".join(losses[:1] + losses[1:][-1:])


def _quality_rows(report: Report) -> Iterator[tuple[str, str]]:
    for x in report.evaluation:
        yield f"perplexity, {quality.title(x['data'])}", quality.words(x)


def _packed_rows(report: Report) -> Iterator[tuple[str, str]]:
    sizes = report.weight_bytes
    if "packed" in sizes:
        share = sizes["packed"] / sizes["pruned"]
        yield "weights packed", f"{sizes['packed']:,} of {sizes['pruned']:,} bytes, {share:.4f}"


def _counted(report: Report) -> int:
    """Return the number of weights that the sparsity is a ratio of."""
    over_all = report.recipe.get("sparsity_over") == "all"
    return report.counts["all_weights" if over_all else "weights"]


def _dense_rows(report: Report) -> Iterator[tuple[str, str]]:
    """Yield the sparsity over the other linears, where some stay dense."""
    counts = report.counts
    if counts["linears"] < counts.get("all_linears", 0):  # older reports have no such count
        asked = report.recipe["sparsity_over"] == "all"
        key, which = ("over_pruned", "linears pruned") if asked else ("over_all", "all linears")
        yield f"over {which}", f"{report.sparsity[key]:.6f}"


def _step_rows(report: Report) -> Iterator[tuple[str, str]]:
    chosen = report.selected()
    if not report.candidates:
        yield from _given(report.recipe)
    for role, title in _STEPS.items():
        winner = chosen.get(role)
        if winner is None:
            continue
        tried = [c for c in report.candidates if c["role"] == role]
        yield title, ", ".join(filter(None, [winner["plugin"], parameters(winner["parameters"])]))
        if winner["misalignment"] is not None:
            dropped = sum(c["dropped"] for c in tried)
            best = f", best of {len(tried)}" if len(tried) > 1 else ""
            early = f", {dropped} dropped early" if dropped else ""
            yield "misalignment", f"{winner['misalignment']:.6g}{best}{early}"


def _given(recipe: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield where the ratios are from, where they are given."""
    said = []
    if isinstance(recipe.get("sparsity"), list):
        said.append(f"{', '.join(f'{x:g}' for x in recipe['sparsity'])} over depth")
    if recipe.get("allocation"):
        said.append(f"from {recipe['allocation']}")
    if recipe.get("ratios"):
        said.append("by pattern: " + ", ".join(x["match"] for x in recipe["ratios"]))
    if said:
        yield "ratios", "; ".join(said)


def _notes(lines: Iterable[str]) -> list[str]:
    text = "\n".join(f"Note: {line}" for line in lines)
    return [text] if text else []


def changes(recorded: Mapping[str, Any] | None, report: Report) -> Iterator[str]:
    """Yield what is not as it was in the run that a recipe came from."""
    if recorded is None or "schema" not in recorded:
        return
    old = recorded.get("model") or {}
    if old.get("name") == report.model["name"] and old.get("sha256") != report.model["sha256"]:
        yield "the model's files are not those of the recorded run"
    before, now = recorded.get("data") or {}, report.data or {}
    shape = ("source", "windows", "length")
    if all(before.get(k) == now.get(k) for k in shape) and before.get("sha256") != now.get(
        "sha256"
    ):
        yield "the calibration tokens are not those of the recorded run"
    sums = {(p["role"], p["name"]): p["sha256"] for p in recorded.get("plugins", ())}
    for plugin in report.plugins:
        key = (plugin["role"], plugin["name"])
        if sums.get(key, plugin["sha256"]) != plugin["sha256"]:
            yield f"{key[0]} '{key[1]}' is not the one of the recorded run"
