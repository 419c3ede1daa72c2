"""What a run would do and cost: the price of what is prepared."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from neuroal.cost.estimate import generations, needs, work
from neuroal.cost.offload import Needs, Offload
from neuroal.cost.preparation import Prepared
from neuroal.cost.texts import TextSize, text_sizes
from neuroal.cost.timings import time_block
from neuroal.cost.work import Work
from neuroal.errors import NeuroalError
from neuroal.model import memory, places, pretrained
from neuroal.model.memory import available_memory
from neuroal.model.zeros import sampled_zeros
from neuroal.run.windows import Look

LONG = 1e13  # operations of a run that is worth timing before: minutes on a CPU
HOURS = 7200.0  # seconds of a run that people want to shorten

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Plan:
    """A prepared run and what it costs.

    Attributes:
        prepared: The run.
        work: Of each phase: dense walk, search (of its first generations, if it says no more),
            final pruning, evaluation.
        needs: Estimated bytes of memory and disk.
        offload: What of the run is on the disk: what was asked for, or does not fit into memory.
        texts: That it is evaluated on.
        seconds: Estimated, by phase, without reading and writing; None where they were not asked
            for or the family cannot be timed.
        extrapolated: Whether a part of the work that was timed stands for all of it.
        zeros: Share of the weights of linears that are pruned that are zero already, and stay so,
            about.
        text: What is known of the calibration text; None where it was not looked at.
    """

    prepared: Prepared
    work: Mapping[str, Work]
    needs: Needs
    offload: Offload
    texts: Sequence[TextSize] = ()
    seconds: Mapping[str, float] | None = None
    extrapolated: bool = False
    zeros: float = 0.0
    text: Look | None = None

    @property
    def block_runs(self) -> int:
        """Return the block runs of all phases but the evaluation."""
        return sum(phase.block_runs for phase in self.work.values())

    @property
    def weights(self) -> int:
        """Return the number of weights of the linears that are pruned."""
        return sum(x.weights for x in self.prepared.rules.pruned(self.prepared.layout))

    @property
    def notes(self) -> tuple[str, ...]:
        """Return what is left out, stays dense or is not known, and what is known of the text."""
        dense = self.prepared.rules.left_dense(self.prepared.layout)
        of_text = self.text.notes if self.text is not None else ()
        notes = [*self.prepared.notes, *of_text, *(f"stays dense: {line}" for line in dense)]
        if self.zeros:
            wanted = self.prepared.rules.sparsity
            more = f"; that is more than the wanted sparsity {wanted:g}"
            more = more if self.zeros > wanted else ""
            notes.append(
                f"the model is sparse already: its zeros stay, about {self.zeros:.2f} of the "
                f"weights to prune from by a sample (--no-keep-zeros){more}"
            )
        notes += _slow_half(self.prepared)
        notes += [
            f"'{x.source}' is read only by the run: its evaluation is not in the time"
            for x in self.texts
            if x.windows is None
        ]
        return tuple(notes)

    @property
    def open_ended(self) -> bool:
        """Return whether a strategy goes on after the candidates that are counted here."""
        return any(step.open_ended for step in self.prepared.steps)

    @property
    def operations(self) -> float:
        """Return the floating-point operations of all blocks, about."""
        layout = self.prepared.layout
        tokens = float(self.block_runs * (self.prepared.recipe.length or 2048))
        tokens += sum(2 * len(layout.blocks) * (t.windows or 0) * t.length for t in self.texts)
        return 2.0 * tokens * layout.weights / len(layout.blocks)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        recipe, layout = self.prepared.recipe, self.prepared.layout
        return {
            "blocks": len(layout.blocks),
            "linears": len(layout.linears),
            "weights": self.weights,
            "plugins": self.prepared.setup.provenance,
            "steps": [dataclasses.asdict(s) for s in self.prepared.steps],
            "windows": recipe.samples,
            "length": recipe.length,
            "data": self.text and self.text.data and self.text.data.to_json(),
            "evaluation": [dataclasses.asdict(t) for t in self.texts],
            "block_runs": self.block_runs,
            "memory_bytes": self.needs.memory(self.offload),
            "disk_bytes": self.needs.disk(self.offload),
            "streams": self.offload.blocks,
            "spills": self.offload.activations,
            "seconds": None if self.seconds is None else dict(self.seconds),
            "seconds_extrapolated": self.extrapolated,
            "notes": list(self.notes),
        }


def plan(
    prepared: Prepared,
    *,
    timed: bool = False,
    stream: bool | None = None,
    spill: bool | None = None,
    save_masks: bool = False,
    text: Look | None = None,
) -> Plan:
    """Return what a prepared run would cost; reads of the weights a sample at most.

    It reads texts to evaluate on, but not those of the hub: their size is known, or said to be
    unknown. Where it is `timed`, one block of random weights says within seconds how long the run
    will take.
    `text` is what is known of its calibration text. The rest is as in `prune`.
    """
    texts = text_sizes(prepared)
    needed = needs(prepared, prepared.length, texts, saves_masks=save_masks)
    free = available_memory(memory.device_of(prepared.recipe.device))
    offload = needed.choose(stream, spill, free)
    found, zeros = work(prepared, texts), _zeros(prepared)
    untimed = Plan(prepared, found, needed, offload, texts, zeros=zeros, text=text)
    return with_seconds(untimed) if timed else untimed


def _slow_half(prepared: Prepared) -> list[str]:
    """Return a note where the blocks run in a dtype that this CPU is slow in."""
    recipe, first = prepared.recipe, next(prepared.model.parameters())
    device = memory.device_of(recipe.device) if first.is_meta else str(first.device)
    own = not first.is_meta or recipe.dtype == "auto"
    dtype: torch.dtype = first.dtype if own else getattr(torch, recipe.dtype)
    if not prepared.reads_data or not pretrained.slower_than_float32(dtype, device):
        return []
    searches = bool(generations(prepared)) and recipe.search_dtype == "auto"
    cure = "--search-dtype float32 for the search, " if searches else ""
    name = str(dtype).removeprefix("torch.")
    return [
        f"this CPU is slower in {name} than in float32: {cure}--dtype float32 for everything, the "
        "saved weights too"
    ]


def _zeros(prepared: Prepared) -> float:
    """Return about which share of the weights are zeros that stay; 0 where no folder tells."""
    recipe = prepared.recipe
    folder = None if recipe.model is None else places.local_folder(recipe.model)
    if folder is None or not recipe.keep_zeros or not any(folder.glob("*.safetensors")):
        return 0.0
    pruned = prepared.layout.without(prepared.rules.dense)
    return sampled_zeros(folder, pruned, prepared.model)


def with_seconds(untimed: Plan) -> Plan:
    """Return a plan with the seconds of its phases, where its family can be timed."""
    prepared = untimed.prepared
    try:
        timings = time_block(prepared, prepared.length, untimed.texts)
    except (NeuroalError, RuntimeError) as error:  # the plan holds all the same
        log.info("not timed: %s", error)
        return untimed
    seconds = {name: phase.seconds(timings.seconds) for name, phase in untimed.work.items()}
    return dataclasses.replace(untimed, seconds=seconds, extrapolated=timings.extrapolated)
