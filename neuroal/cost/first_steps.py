"""How many candidates every strategy starts with, as far as it is known before it runs."""

from __future__ import annotations

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
from neuroal.types import Measurement, Proposals

_AHEAD = 8  # generations of a strategy that are looked at before it runs


@dataclass(frozen=True)
class SearchStep:
    """One step of the search, as far as it is known before it runs.

    Attributes:
        role: `block_ratios` or `row_ratios`.
        plugin: Its name.
        candidates: Proposals of its first generation; None where they depend on measurements.
        goes_on: Whether it answers that generation's costs with another.
        widest: Windows of all candidates of its largest generation, whose states are held together:
            the largest of the first few, as they are where all candidates cost the same.
    """

    role: str
    plugin: str
    candidates: int | None
    goes_on: bool = False
    widest: int = 0


def first_steps(setup: Setup, layout: Layout, recipe: Recipe) -> list[SearchStep]:
    """Return how many candidates every strategy starts with; runs no model."""
    steps = []
    for plugin in setup.strategies:
        if plugin.has("measure_block"):
            steps.append(SearchStep(plugin.role, plugin.name, None))
        else:
            steps.append(_first_step(setup, plugin, layout, recipe))
    return steps


def _proposals(setup: Setup, plugin: Plugin, layout: Layout, recipe: Recipe) -> Proposals:
    arguments: dict[str, Any] = {
        "layout": layout,
        "measurements": (),
        "windows": min(setup.search_samples, recipe.samples),
        "rng": rng_for(recipe.seed, plugin.role, plugin.name),
    }
    if plugin.role == "block_ratios":
        arguments["sparsity"] = recipe.wanted
    else:
        arguments["base"] = dict.fromkeys(layout.linears, recipe.wanted)
        arguments["deviation"] = {n: torch.zeros(x.in_features) for n, x in layout.linears.items()}
        arguments["weighs_inputs"] = not updates_weights(setup.pruner)
    return plugin.proposals(plugin.proposes, **arguments)


def _first_step(setup: Setup, plugin: Plugin, layout: Layout, recipe: Recipe) -> SearchStep:
    proposals = _proposals(setup, plugin, layout, recipe)
    search = min(setup.search_samples, recipe.samples)
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
                setup.alignment,
                setup.pruner,
                setup.reads_deviation,
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
        # No run has equal costs again and again: what a strategy makes of them tells nothing.
    proposals.close()
    goes_on = len(counts) > 1 or not ended
    return SearchStep(plugin.role, plugin.name, counts[0] if counts else 0, goes_on, widest)
