"""The search of one run: the dense walk of `measure_block`, the block step, the row step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, partial

import torch

from neuroal.data.windows import Windows
from neuroal.distributed import Team
from neuroal.layout import Layout
from neuroal.model.run_folder import Journal
from neuroal.pruning.allocation import Allocation
from neuroal.pruning.pruner import BasePruner
from neuroal.pruning.targets import Rules
from neuroal.recipe import Recipe
from neuroal.run.marks import bookmark
from neuroal.run.report import Phases
from neuroal.run.setup import Setup, search_dtype
from neuroal.search.alignment import Aligner
from neuroal.search.measurements import Measurements, SharedMeasurements
from neuroal.search.topup import Candidate, Progress, TopUpSearch
from neuroal.walk import Inputs, Walker


@dataclass(frozen=True, eq=False)
class RunSearch:
    """What the search of one run is made of.

    Attributes:
        walker: Runs the model; None without calibration data.
        data: All calibration windows; None without.
        shared: What the run has in common with others on the same dense model.
        journal: Outcomes of an earlier try, and a place for new ones.
        progress: Opens a progress bar: `(title, total) -> tick`.
    """

    setup: Setup
    recipe: Recipe
    layout: Layout
    rules: Rules
    walker: Walker | None
    data: Windows | None
    shared: SharedMeasurements
    journal: Journal
    progress: Progress
    phases: Phases
    team: Team

    def choose(self) -> tuple[Allocation, list[Candidate]]:
        """Return the allocation that the two steps choose, and all candidates in order."""
        setup, recipe, walker = self.setup, self.recipe, self.walker
        aligner = None
        if walker is not None:
            pruner = BasePruner(setup.search_pruner, None, recipe.seed, self.rules.zeros.keys())
            aligner = Aligner(walker, pruner, setup.alignment, setup.reads_deviation)
        samples = setup.search_samples
        ids = self.data.ids[:samples] if self.data is not None else torch.empty(0, 0)

        @cache
        def inputs(windows: int) -> Inputs:
            assert walker is not None
            return walker.inputs(ids[:windows], dtype=search_dtype(recipe))

        search = TopUpSearch(
            aligner=aligner,
            layout=self.layout,
            rules=replace(self.rules, comparison=setup.search_comparison),
            inputs=inputs,
            windows=len(ids),
            journal=self.journal.recall,
            progress=self.progress,
            bookmark=partial(bookmark, self.journal),
            seed=recipe.seed,
            weighs_inputs=setup.weighs_inputs,
            team=self.team,
        )
        measurements = self._measure()
        with self.phases.phase("block_search"):
            blocks = search.choose_blocks(setup.block_ratios, measurements, setup.reads_deviation)
        assert setup.row_ratios is not None
        with self.phases.phase("row_search"):
            answers = measurements.get(setup.row_ratios, ())
            rows = search.choose_rows(setup.row_ratios, blocks, answers)
        return rows.allocation, [*blocks.candidates, *rows.candidates]

    def _measure(self) -> Measurements:
        """Return the answers of the `measure_block` hooks, if there are any."""
        plugins = self.setup.measures
        if not plugins:
            return {}
        assert self.walker is not None and self.data is not None
        open_tick = partial(self.progress, "measure blocks", len(self.layout.blocks))
        with self.phases.phase("measure"):
            answers, seconds = self.shared.measure(
                self.walker,
                self.data,
                plugins,
                open_tick,
                self.team,
                frozenset(self.rules.dense),
                partial(bookmark, self.journal),
            )
        self.phases.seconds["measure"] = seconds  # also where another run has measured them
        return answers
