"""What a run would do and cost, from the model's structure alone."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from neuroal import layout
from neuroal.cost.estimate import needs, work
from neuroal.cost.first_steps import SearchStep, first_steps
from neuroal.cost.offload import Needs, Offload
from neuroal.cost.timings import time_block
from neuroal.cost.work import Work
from neuroal.data.source import parse_source
from neuroal.errors import NeuroalError, UsageError
from neuroal.layout import Layout
from neuroal.model import memory, pretrained
from neuroal.model.memory import available_memory
from neuroal.recipe import Recipe
from neuroal.run.reuse import earlier_allocation, with_its_sparsity
from neuroal.run.setup import Setup, setup

LONG = 1e13  # operations of a run that is worth timing before: minutes on a CPU

log = logging.getLogger(__name__)


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
        needs: Estimated bytes of memory and disk.
        weights: Prunable weights.
        offload: What of the run is on the disk: what was asked for, or does not fit into memory.
        seconds: Estimated, by phase, without reading and writing; None where they were not asked
            for or the family cannot be timed.
    """

    layout: Layout
    setup: Setup
    steps: tuple[SearchStep, ...]
    windows: int
    length: int | None
    block_runs: int
    needs: Needs
    weights: int
    offload: Offload
    seconds: Mapping[str, float] | None = None

    @property
    def open_ended(self) -> bool:
        """Return whether a strategy goes on after the candidates that are counted here."""
        return any(step.goes_on for step in self.steps)

    @property
    def operations(self) -> float:
        """Return the floating-point operations of all block runs, about."""
        tokens = self.length or 2048
        return 2.0 * self.block_runs * tokens * self.layout.weights / len(self.layout.blocks)

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
            "memory_bytes": self.needs.memory(self.offload),
            "disk_bytes": self.needs.disk(self.offload),
            "streams": self.offload.blocks,
            "spills": self.offload.activations,
            "seconds": None if self.seconds is None else dict(self.seconds),
            "notes": list(self.setup.notes),
        }


def plan(
    recipe: Recipe,
    trust_remote_code: bool = False,
    *,
    timed: bool = False,
    stream: bool | None = None,
    spill: bool | None = None,
) -> Plan:
    """Return what `prune` would do with a recipe; loads no weights and no text.

    Args:
        recipe: What is asked.
        trust_remote_code: Let the model's own code run.
        timed: Time one block of random weights, to say how long the run will take.
        stream: As in `prune`.
        spill: As in `prune`.

    Raises:
        NeuroalError: The recipe makes no sense, or the model's structure is unknown.
    """
    recipe = with_its_sparsity(recipe)
    if recipe.model is None:
        raise UsageError("a plan needs a model")
    if recipe.calibration is not None:
        parse_source(recipe.calibration)
    made = setup(recipe)
    model = pretrained.skeleton(recipe.model, trust_remote_code)
    found = layout.find(model)
    rules = made.rules(recipe, found)
    _, left_out = earlier_allocation(made, recipe, found)
    dense = [f"stays dense: {line}" for line in rules.left_dense(found)]
    made = dataclasses.replace(made, notes=(*made.notes, *left_out, *dense))
    config = model.config
    context = pretrained.context_length(config)
    length = recipe.length or min(2048, context or 2048)
    steps = tuple(first_steps(made, found, recipe))
    phases = work(made, len(found.blocks), recipe, steps)
    prunable = sum(x.weights for x in found.linears.values() if x.name not in rules.dense)
    needed = needs(made, found, recipe, model, length)
    free = available_memory(memory.device_of(recipe.device))
    return Plan(
        layout=found,
        setup=made,
        steps=steps,
        windows=recipe.samples,
        length=recipe.length,
        block_runs=sum(phase.block_runs for phase in phases.values()),
        needs=needed,
        weights=prunable,
        offload=needed.choose(stream, spill, free),
        seconds=_seconds(made, recipe, phases, length, trust_remote_code) if timed else None,
    )


def _seconds(
    made: Setup, recipe: Recipe, phases: Mapping[str, Work], length: int, trust: bool
) -> dict[str, float] | None:
    try:
        timings = time_block(made, recipe, length, trust)
    except (NeuroalError, RuntimeError) as error:  # the plan holds all the same
        log.info("not timed: %s", error)
        return None
    return {name: phase.seconds(timings) for name, phase in phases.items()}
