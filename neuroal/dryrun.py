"""What a run would do and cost, from the model's structure alone."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from neuroal import checkpoint, layout
from neuroal.alignment import generation_runs
from neuroal.errors import UsageError
from neuroal.layout import Layout
from neuroal.plan import Setup, Step, first_steps, setup
from neuroal.recipe import Recipe
from neuroal.source import parse_source
from neuroal.statistics import resolve


@dataclass(frozen=True)
class Plan:
    """The plan of a run.

    Attributes:
        layout: Blocks and linears.
        setup: The plugins.
        steps: Candidates of every strategy's first generation.
        windows: Calibration windows.
        length: Tokens per window; None where the rows of the source decide.
        block_runs: Of dense walk, search (first generations) and final pruning.
        memory: Estimated peak bytes: weights, activations, statistics, one spare block.
        weights: Prunable weights.
    """

    layout: Layout
    setup: Setup
    steps: tuple[Step, ...]
    windows: int
    length: int | None
    block_runs: int
    memory: int
    weights: int

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return {
            "blocks": len(self.layout.blocks),
            "linears": len(self.layout.linears),
            "weights": self.weights,
            "plugins": [p.provenance() for p in self.setup.plugins],
            "steps": [dataclasses.asdict(s) for s in self.steps],
            "windows": self.windows,
            "length": self.length,
            "block_runs": self.block_runs,
            "memory_bytes": self.memory,
            "notes": list(self.setup.notes),
        }


def plan(recipe: Recipe, trust_remote_code: bool = False) -> Plan:
    """Return what `prune` would do with a recipe; loads no weights and no text.

    Raises:
        NeuroalError: The recipe makes no sense, or the model's structure is unknown.
    """
    if recipe.model is None:
        raise UsageError("a plan needs a model")
    if recipe.calibration is not None:
        parse_source(recipe.calibration)
    made = setup(recipe)
    model = checkpoint.skeleton(recipe.model, trust_remote_code)
    found = layout.find(model)
    rules = made.rules(recipe, found)
    config = model.config
    context = checkpoint.context_length(config)
    length = recipe.length or min(2048, context or 2048)
    steps = tuple(first_steps(made, found, recipe))
    prunable = sum(x.weights for x in found.linears.values() if x.name not in rules.dense)
    return Plan(
        layout=found,
        setup=made,
        steps=steps,
        windows=recipe.samples,
        length=recipe.length,
        block_runs=_block_runs(made, found, recipe, steps),
        memory=_memory(made, found, recipe, steps, model, length),
        weights=prunable,
    )


def _block_runs(made: Setup, found: Layout, recipe: Recipe, steps: tuple[Step, ...]) -> int:
    blocks = len(found.blocks)
    runs = 0
    if made.measures:
        runs += (blocks - 1) * recipe.samples  # the last block's output is not needed
        runs += recipe.samples if any(p.required_statistics() for p in made.measures) else 0
    counts = [max(s.candidates or 0, 0) for s in steps]
    search = min(recipe.search_samples, recipe.samples)
    if made.reads_deviation and not any(counts[:-1]):
        counts.append(1)  # the winner's own evaluation
    metric = made.alignment
    for count in counts:
        if count:
            runs += generation_runs(
                metric, made.pruner, made.reads_deviation, blocks, count, search
            )
    if any(counts) and metric.has("measure_output"):
        runs += blocks * search  # the dense reference
    final = [p for p in (made.pruner, made.refiner) if p is not None]
    if any(p.required_statistics() for p in final):
        runs += recipe.samples * (2 * blocks - 1)
    return runs


def _memory(
    made: Setup,
    found: Layout,
    recipe: Recipe,
    steps: tuple[Step, ...],
    model: torch.nn.Module,
    length: int,
) -> int:
    """Weights, one spare float32 block and its pruned copy, activations of all candidates."""
    dtype = getattr(torch, recipe.dtype) if recipe.dtype != "auto" else None
    dtype = dtype or getattr(model.config, "dtype", None) or torch.float32
    size = torch.finfo(dtype).bits // 8
    weights = sum(p.numel() for p in model.parameters()) * size
    block = max(b.weights for b in found.blocks)
    width = max(x.in_features for x in found.linears.values() if x.group == 0)
    search = min(recipe.search_samples, recipe.samples)
    candidates = max([s.candidates or 1 for s in steps] or [1])
    hidden = max(candidates * search, recipe.samples) * length * width * size
    needed = {s for p in made.plugins for s in p.required_statistics()}
    grams = any(a.name == "gram" for a in resolve(needed))
    gram = 4 * sum({x.group: x.in_features**2 for x in found.blocks[0].linears}.values())
    return weights + block * (4 + size) + 2 * hidden + (gram if grams else 0)
