"""What holds for every exporter."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from neuroal.plugins import Plugin
from neuroal.pruning.hooks import rng_for
from neuroal.testing.checks import Conformance, expect
from neuroal.testing.finished_run import TinyRun, contents, finished_run
from neuroal.types import ExporterTraits

HOOK = "export_run"


class ExporterConformance(Conformance):
    """The checks of an exporter; a subclass has the fixture `plugin`, which returns one.

    They export a run that is pruned 2:4, of linears of 64 rows and columns, which every exporter
    should take. That its runtime computes what the model does is for tests of its own.
    """

    role = "exporter"

    def test_traits(self, plugin: Any) -> None:
        """`describe` says the same every time, and yes or no."""
        p = self.load(plugin)
        needs = p.traits(ExporterTraits)
        expect(p.traits(ExporterTraits) == needs, "describe differs between two calls")
        said = needs.reads_dense
        expect(type(said) is bool, f"describe: reads_dense is {said!r}, not True or False")

    def test_export(self, plugin: Any) -> None:
        """It writes files, and says JSON values by name."""
        p = self.load(plugin)
        with _a_run(p) as (run, folder):
            said = _export(p, run, folder)
            kind = type(said).__name__
            expect(isinstance(said, Mapping), f"{HOOK} returned {kind}, not a mapping")
            try:
                json.dumps(dict(said), allow_nan=False)
            except (TypeError, ValueError) as error:
                raise AssertionError(f"{HOOK} returned what is no JSON: {error}") from error
            expect(bool(contents(folder)), f"{HOOK} wrote no file into the folder")

    def test_export_repeats(self, plugin: Any) -> None:
        """The same run and `rng` have the same files, to the bit."""
        p = self.load(plugin)
        written = []
        with _a_run(p) as (run, folder), torch.random.fork_rng(devices=[]):
            for seed in (1, 2):
                torch.manual_seed(seed)
                own = folder / str(seed)
                own.mkdir()
                _export(p, run, own)
                written.append(contents(own))
        expect(written[0] == written[1], f"{HOOK} writes other files each time: draw from `rng`")

    def test_export_leaves_the_run_alone(self, plugin: Any) -> None:
        """Nothing in the run's folder is written to."""
        p = self.load(plugin)
        with _a_run(p) as (run, folder):
            before = contents(run.folder)
            _export(p, run, folder)
            expect(contents(run.folder) == before, f"{HOOK} writes into the run's own folder")


@contextmanager
def _a_run(p: Plugin) -> Iterator[tuple[TinyRun, Path]]:
    """Give a run and an empty folder, which are there in the context."""
    with tempfile.TemporaryDirectory(prefix="neuroal-") as home:
        folder = Path(home) / "out"
        folder.mkdir()
        yield finished_run(Path(home) / "run", p.required_statistics()), folder


def _export(p: Plugin, run: TinyRun, folder: Path) -> Any:
    with torch.no_grad():
        return p.call(HOOK, run=run, folder=folder, rng=rng_for(0, p.role, p.name))
