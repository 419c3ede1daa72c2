"""The end of a run: zeros counted, the report complete, everything in the output folder."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from neuroal.layout import Layout
from neuroal.model import files, packing, run_folder
from neuroal.model.blocks import Blocks
from neuroal.model.carry_over import carry_over
from neuroal.model.zeros import count_saved_zeros, count_zeros
from neuroal.pruning import allocation as allocations
from neuroal.pruning.allocation import Allocation
from neuroal.pruning.targets import Rules, as_pruned
from neuroal.run.masks import WithMasks
from neuroal.run.model_card import CARD, model_card
from neuroal.run.report import InputNorms, Phases, Report, fill_sparsity, peak_memory
from neuroal.types import Target


@dataclass(frozen=True, eq=False)
class Pruned:
    """How a model was pruned.

    Attributes:
        allocation: The ratios that were chosen.
        targets: How much was to be pruned of every linear.
        norms: Mean input norms of every linear on the way.
    """

    allocation: Allocation
    targets: Mapping[str, Target]
    norms: Mapping[str, InputNorms]


def as_counted(
    counts: Mapping[str, int],
    dense: Mapping[str, str],
    layout: Layout,
    recipe: Mapping[str, Any],
) -> tuple[Pruned, Rules]:
    """Return the ratios of masks that are there already as those of a run, and its rules.

    Args:
        counts: How many weights the mask of every linear prunes.
        dense: Linears without a mask, and why.
        layout: Of the model.
        recipe: Of the run that the masks are from.
    """
    ratios = {n: counts.get(n, 0) / x.weights for n, x in layout.linears.items()}
    targets = {
        name: Target(torch.tensor([count]), ratios[name], comparison="matrix")
        for name, count in counts.items()
    }
    over = recipe.get("sparsity_over", "pruned")
    rules = Rules(0.0, recipe["budget"], "matrix", dense=dense, over=over)
    rules = replace(rules, sparsity=sum(counts.values()) / rules.counted(layout))
    return Pruned(Allocation(ratios), targets, {}), rules


def save_run(
    report: Report,
    blocks: Blocks,
    tokenizer: Any,
    rules: Rules,
    pruned: Pruned,
    phases: Phases,
    out: Path | None,
    source: Path | None = None,
    masks: WithMasks | None = None,
    *,
    packed: bool = False,
) -> Report:
    """Complete the report of a pruned model in place, and write all that a run leaves into `out`.

    The output folder is there when everything is in it; None counts zeros only. It keeps everything
    else of `source`, the folder of the dense model. `masks` that were noted are written too. The
    weights are `packed` on request.
    """
    start = time.perf_counter()
    layout = blocks.layout
    work = None if out is None else run_folder.partial(out) / "checkpoint"
    if work is None:
        zeros = count_zeros(blocks.model, layout)
    else:
        blocks.save(tokenizer, work)
        if source is not None:
            report.notes += carry_over(blocks.model, source, work)
        zeros = count_saved_zeros(work, layout, blocks.model)
        done = as_pruned(pruned.allocation, layout, pruned.targets)
        files.write_atomically(work / allocations.FILE, allocations.to_bytes(done, layout))
        if masks is not None:
            report.notes.append(masks.write(work, report.to_json()))
        if source is not None:
            report.weight_bytes["dense"] = packing.packing_of(source).dense
        report.weight_bytes["pruned"] = packing.packing_of(work).dense
        if packed and out is not None:
            packing.pack_aside(work, run_folder.aside(out))
            run_folder.forget(out)
            found = packing.take(work, run_folder.aside(out))
            report.weight_bytes["packed"] = found.bytes
            report.packing = found.of_matrices()
    fill_sparsity(report, layout, rules, pruned.targets, zeros, pruned.norms)
    report.peak_memory_bytes = phases.memory["save"] = peak_memory()
    report.phase_memory_bytes = phases.memory
    phases.seconds["save"] = time.perf_counter() - start
    report.timings = {k: round(v, 4) for k, v in phases.seconds.items()}
    if out is not None and work is not None:
        files.write_atomically(work / CARD, model_card(report.to_json()).encode())
        text = json.dumps(report.to_json(), indent=1, ensure_ascii=False)
        files.write_atomically(work / files.MARKER, text.encode())
        run_folder.publish(out)
    return report
