"""How many candidates every strategy starts with, as far as it is known before it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from neuroal.cost.work import generation_work
from neuroal.errors import PluginError
from neuroal.layout import Layout
from neuroal.plugins import Plugin
from neuroal.pruning.hooks import rng_for, updates_weights
from neuroal.recipe import Recipe
from neuroal.run.setup import Setup
from neuroal.types import Measurement

_AHEAD = 8  # generations of a strategy that are looked at before it runs


@dataclass(frozen=True)
class SearchStep:
    """One step of the search, as far as it is known before it runs.

    Attributes:
        role: `block_ratios` or `row_ratios`.
        plugin: Its name.
        candidates: Proposals of its first generation; None where they depend on measurements.
        goes_on: Whether it answers that generation's costs with another.
        widest: Windows of all candidates of its largest generation, whose states are held together;
            of the first few generations, as they are where all candidates cost the same.
    """

    role: str
    plugin: str
    candidates: int | None
    goes_on: bool = False
    widest: int = 0


def first_steps(made: Setup, layout: Layout, recipe: Recipe) -> list[SearchStep]:
    """Return how many candidates every strategy starts with; runs no model."""
    steps = []
    for plugin in made.block_ratios:
        if plugin.has("measure_block"):
            steps.append(SearchStep(plugin.role, plugin.name, None))
            continue
        given = {"sparsity": recipe.wanted, "measurements": ()}
        steps.append(_first_step(made, plugin, "propose_block_ratios", layout, recipe, **given))
    if made.row_ratios is not None:
        rows = made.row_ratios
        zeros = {n: torch.zeros(x.in_features) for n, x in layout.linears.items()}
        base = dict.fromkeys(layout.linears, recipe.wanted)
        weighs_inputs = not updates_weights(made.pruner)
        given = {
            "base": base,
            "deviation": zeros,
            "measurements": (),
            "weighs_inputs": weighs_inputs,
        }
        if rows.has("measure_block"):
            steps.append(SearchStep(rows.role, rows.name, None))
        else:
            steps.append(_first_step(made, rows, rows.proposes, layout, recipe, **given))
    return steps


def _first_step(
    made: Setup, plugin: Plugin, hook: str, layout: Layout, recipe: Recipe, **arguments: Any
) -> SearchStep:
    rng = rng_for(recipe.seed, plugin.role, plugin.name)
    search = min(made.search_samples, recipe.samples)
    proposals = plugin.proposals(hook, layout=layout, windows=search, rng=rng, **arguments)
    counts: list[int] = []
    widest = 0
    answer: list[Measurement] | None = None
    ended = False
    try:
        while len(counts) < _AHEAD:
            generation = next(proposals) if answer is None else proposals.send(answer)
            windows = min(generation.windows or search, search)
            counts.append(len(generation.proposals))
            widest = max(widest, counts[-1] * windows)
            alone = generation_work(
                made.alignment,
                made.pruner,
                made.reads_deviation,
                blocks=len(layout.blocks),
                candidates=1,
                windows=windows,
            )
            answer = [Measurement(1.0, False, alone.block_runs)] * counts[-1]
    except StopIteration:
        ended = True
    except PluginError:
        if len(counts) < 2:
            raise
        # Equal costs again and again are no run's: what a strategy makes of them is its own affair.
    proposals.close()
    goes_on = len(counts) > 1 or not ended
    return SearchStep(plugin.role, plugin.name, counts[0] if counts else 0, goes_on, widest)


def reads_data(made: Setup, steps: Sequence[SearchStep]) -> bool:
    """Return whether anything reads activations, given the search's first steps."""
    final = [p for p in (made.pruner, made.refiner) if p is not None]
    return (
        made.reads_deviation
        or len(made.block_ratios) > 1
        or any(step.candidates != 0 for step in steps)
        or any(p.required_statistics() for p in final)
    )
