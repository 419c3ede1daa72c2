"""A finished run in front of an exporter: its pruned linears, read one by one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neuroal.errors import UsageError
from neuroal.evaluation.text_overlap import calibration_of
from neuroal.layout import Block, Layout, Linear, matrices
from neuroal.model import pretrained
from neuroal.model.blocks import Blocks
from neuroal.plugins import Plugin
from neuroal.run import later
from neuroal.run.apply import open_blocks, streams_blocks
from neuroal.run.pack import copy_unpacked
from neuroal.types import ExporterTraits, LinearToExport, Tick
from neuroal.walk import CandidateState, Inputs, Walker
from neuroal.walk.statistics import Statistics, resolve

_NONE = Statistics({})


@dataclass(frozen=True, eq=False)
class FinishedRun:
    """A `RunToExport`.

    Attributes:
        folder: Of the run.
        report: Content of its `neuroal.json`.
        layout: Of the model.
        blocks: Of the run's model.
        dense: Of the dense model, where the exporter reads it.
        ids: Calibration windows, int64 `(windows, length)`, where the exporter reads statistics.
        plugin: The exporter.
        tick: Called once per block.
    """

    folder: Path
    report: Mapping[str, Any]
    layout: Layout
    blocks: Blocks
    dense: Blocks | None
    ids: Tensor | None
    plugin: Plugin
    tick: Tick

    def linears(self) -> Iterator[LinearToExport]:
        """Yield the pruned linears in order."""
        pruned = {n for n, x in self.report["linears"].items() if x["wanted"] > 0}
        walker = inputs = state = None
        if self.ids is not None:
            walker = Walker(self.blocks.model, self.layout, self.blocks.open)
            inputs = walker.inputs(self.ids)
            state = CandidateState.start(inputs)
        for block in self.layout.blocks:
            dense: AbstractContextManager[nn.Module | None] = nullcontext()
            if self.dense is not None:
                dense = self.dense.open(block)
            with self.blocks.open(block) as module, dense as dense_module:
                statistics: Mapping[str, Statistics] = {}
                if walker is not None and inputs is not None and state is not None:
                    statistics, state = self._walked(walker, block, module, inputs, state)
                for x in block.linears:
                    if x.name in pruned:
                        yield LinearToExport(
                            linear=x,
                            weight=_weight(x, module, block),
                            dense=None if dense_module is None else _weight(x, dense_module, block),
                            statistics=statistics.get(x.name, _NONE),
                        )
            self.tick()

    def copy(self, folder: Path) -> None:
        """Copy the run into a folder, unpacked."""
        copy_unpacked(self.folder, folder)

    def _walked(
        self, walker: Walker, block: Block, module: nn.Module, inputs: Inputs, state: CandidateState
    ) -> tuple[Mapping[str, Statistics], CandidateState]:
        accumulators = resolve(self.plugin.required_statistics())
        run = walker.run(block, module, inputs, state, accumulators)
        walker.unchecked.look()
        return run.statistics, run.state or state


def _weight(linear: Linear, module: nn.Module, block: Block) -> Tensor:
    with torch.no_grad():
        return matrices.weight(linear, module, block.name).clone()


def open_run(
    folder: Path,
    report: Mapping[str, Any],
    layout: Layout,
    plugin: Plugin,
    *,
    device: str,
    stream: bool | None,
    trust: bool,
    tick: Tick,
) -> FinishedRun:
    """Open a run, and what else an exporter reads.

    Raises:
        UsageError: The dense model or the calibration text is wanted and not there any more.
    """
    name = str(folder)
    reads_dense = plugin.traits(ExporterTraits).reads_dense
    dense_name = later.dense_model(folder, report) if reads_dense else None
    ids = None
    if plugin.required_statistics():
        windows = calibration_of(name, pretrained.load_tokenizer(name, trust))
        if windows is None:
            raise UsageError(
                f"{plugin.label} reads statistics, and the calibration text of '{name}' is not "
                "there any more, or was none: go to the folder where it was pruned"
            )
        ids = windows.ids
    skeleton = pretrained.skeleton(name, trust)
    streams = streams_blocks(name, skeleton, 2 if reads_dense else 1, stream)
    blocks = open_blocks(name, layout, "auto", streams, trust, device)
    dense = None
    if dense_name is not None:
        dense = open_blocks(dense_name, layout, "auto", streams, trust, device)
    return FinishedRun(folder, report, layout, blocks, dense, ids, plugin, tick)
