"""Prune a model: load, calibrate, search, prune, save; `Report` says what happened."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from neuroal import layout
from neuroal.cost.estimate import needs
from neuroal.cost.first_steps import first_steps, reads_data
from neuroal.cost.offload import Needs, Offload, decide
from neuroal.data import calibration
from neuroal.data.calibration import Windows
from neuroal.data.source import Source, parse_source
from neuroal.distributed import Team
from neuroal.errors import NeuroalError, UsageError
from neuroal.layout import Layout
from neuroal.model import files, memory, pretrained, run_folder
from neuroal.model.blocks import Blocks, InMemory, state_sha256
from neuroal.model.memory import available_memory
from neuroal.model.streaming import Streamed, folder_of
from neuroal.model.zeros import count_saved_zeros, count_zeros
from neuroal.pruning import allocation as allocations
from neuroal.pruning.allocation import Allocation
from neuroal.pruning.hooks import updates_weights
from neuroal.pruning.pruner import BasePruner
from neuroal.pruning.targets import Rules, targets
from neuroal.recipe import Recipe
from neuroal.run.commit import commit
from neuroal.run.model_card import model_card
from neuroal.run.report import InputNorms, Report, environment, fill_sparsity, peak_memory
from neuroal.run.reuse import earlier_allocation, with_its_sparsity
from neuroal.run.setup import Setup, search_dtype, setup
from neuroal.search.alignment import Aligner
from neuroal.search.measurements import Measurements, SharedMeasurements
from neuroal.search.topup import Candidate, TopUpSearch
from neuroal.types import Target, Tick
from neuroal.walk import Inputs, Walker, activations
from neuroal.walk.activations import MakeStore

log = logging.getLogger(__name__)


def prune(
    model: nn.Module | str | Path,
    tokenizer: Any = None,
    recipe: Recipe | None = None,
    *,
    windows: Tensor | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    stream: bool | None = None,
    spill: bool | None = None,
    trust_remote_code: bool = False,
    progress: bool = False,
    shared: SharedMeasurements | None = None,
) -> Report:
    """Prune a model in memory, or a folder or hub name, by a recipe.

    Args:
        model: A causal language model, pruned in place, or where to load one.
        tokenizer: Of a model in memory; not needed where `windows` or token ids calibrate it.
        recipe: What to do; `Recipe()` prunes half the weights by Wanda with NeuroAL on top.
        windows: Calibration token ids, int64 `(samples, length)`, in place of a source.
        out: Folder to write; needed for a path.
        overwrite: Replace an earlier run in `out`.
        resume: Go on with an unfinished run in `out`.
        stream: Read the blocks of a model folder one at a time, for models larger than memory;
            None does so where the model would not fit. The result is the same.
        spill: Hold activations between blocks on the disk of `out` (of the folder for temporary
            files without `out`); None does so where they would not fit. The result is the same.
        trust_remote_code: Let the model's own code run.
        progress: Show progress bars.
        shared: What this run has in common with others on the same dense model.

    Returns:
        What happened.

    Raises:
        UsageError: The recipe makes no sense; nothing was done.
        NeuroalError: Model, data or a plugin failed; a model in memory keeps its weights unless
            the final pruning had begun.
    """
    if isinstance(tokenizer, Recipe):
        raise UsageError("a recipe stands where the tokenizer belongs: give it as recipe=...")
    recipe = with_its_sparsity(recipe or Recipe())
    if isinstance(model, (str, Path)):
        recipe = dataclasses.replace(recipe, model=str(model))
        if recipe.calibration is None and str(model) == "demo" and windows is None:
            recipe = dataclasses.replace(recipe, calibration="demo")
        if out is None:
            raise UsageError("a model given by path needs an output folder")
    elif stream:
        raise UsageError("a model in memory cannot be streamed: give the path of its folder")
    common, team = shared or SharedMeasurements(), Team.join()
    place = None if out is None else Path(out)
    choices = (stream, spill, progress, trust_remote_code)
    run = _Run(recipe, setup(recipe), place, *choices, common, team)
    if resume and team.size > 1 and isinstance(model, nn.Module):
        raise UsageError("several processes cannot resume a model in memory: give its path")
    target = place if team.leads else None

    def earlier() -> Report | None:
        if target is not None:
            run_folder.check(target, overwrite, resume)
        there = resume and target is not None and target.exists()
        return run.finished(model, windows, target) if there and target is not None else None

    done = _by_first(team, earlier)
    if done is not None:
        return done
    with _evaluation(model):
        return run.run(model, tokenizer, windows, target, resume)


def _by_first(team: Team, work: Callable[[], Report | None]) -> Report | None:
    """Return the report that the first process makes, which alone has an output folder."""
    made: list[Report] = []

    def as_bytes() -> bytes | None:
        report = work()
        if report is None:
            return None
        made.append(report)
        return json.dumps(report.to_json()).encode()

    said = team.first(as_bytes)
    if said is None:
        return None
    return made[0] if made else Report(**json.loads(said))


@contextmanager
def _evaluation(model: nn.Module | str | Path) -> Iterator[None]:
    """Hold a model in memory in evaluation mode."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    training = [m for m in modules if m.training]
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True


class _Run:
    """One run from recipe to report."""

    def __init__(
        self,
        recipe: Recipe,
        made: Setup,
        place: Path | None,
        stream: bool | None,
        spill: bool | None,
        progress: bool,
        trust: bool,
        shared: SharedMeasurements,
        team: Team,
    ) -> None:
        self.recipe = recipe
        self.setup = made
        self.place = place  # of the output, which the first process writes
        self.stream = stream
        self.spill = spill
        self.progress = progress and team.leads
        self.trust = trust
        self.team = team
        self.shared = shared
        self.timings: dict[str, float] = {}
        self.memory: dict[str, int] = {}
        self.notes = list(made.notes)
        self.plugins = [p.provenance() for p in made.plugins]

    def finished(
        self, model: nn.Module | str | Path, given: Tensor | None, out: Path
    ) -> Report | None:
        """Return the report of the same run if `out` holds it; a model in memory gets its weights.

        Raises:
            UsageError: `out` holds another run.
        """
        if isinstance(model, nn.Module):
            sha256: str | None = state_sha256(model)
        else:
            sha256 = files.fingerprint(str(model))
        same: dict[str, Any] = {"plugins": self.plugins}
        if sha256 is not None:  # that of a hub's model is known once it is loaded
            same["model"] = {"name": self._name(model), "sha256": sha256}
        if given is not None:
            same["data"] = Windows(given.cpu(), "windows").to_json()
        done = run_folder.finished(out, self.recipe.digest(), **same)
        if done is None:
            return None
        if isinstance(model, nn.Module):
            pretrained.restore(model, out, layout.find(model))
        return Report(**done)

    def _name(self, model: nn.Module | str | Path) -> str:
        return self.recipe.model or type(model).__name__

    def run(
        self,
        model: nn.Module | str | Path,
        tokenizer: Any,
        given: Tensor | None,
        out: Path | None,
        resume: bool,
    ) -> Report:
        recipe = self.recipe
        self._check_data(given)
        path = None if isinstance(model, nn.Module) else str(model)
        with self._phase("load"):
            if path is not None and self.stream:
                folder_of(path)
            shape: Any = model if path is None else pretrained.skeleton(path, self.trust)
            found = layout.find(shape)
            rules = self.setup.rules(recipe, found)
            self._check_needs(found, given)
            earlier, left_out = earlier_allocation(self.setup, recipe, found)
            self.notes += left_out
        with self._phase("calibrate"):
            if path is not None:
                tokenizer = pretrained.load_tokenizer(path, self.trust)
            data = self._windows(shape, tokenizer, given)
        length = 0 if data is None else data.ids.shape[1]
        needed = needs(self.setup, found, recipe, shape, length)
        with self._phase("load"):
            if isinstance(model, nn.Module):
                on_disk = self._on_disk(None, str(next(model.parameters()).device), needed)
                blocks: Blocks = InMemory(model, found)
                fingerprint = None if out is None else state_sha256(model)
            else:
                fingerprint = files.fingerprint(str(model))
                device = self.team.device(memory.device_of(recipe.device))
                on_disk = self._on_disk(str(model), device, needed)
                blocks = self._open(str(model), found, device, on_disk.blocks)
                fingerprint = fingerprint or state_sha256(blocks.model)
            blocks.check_finite()
        model = blocks.model
        ratios = None if earlier is None else allocations.to_bytes(earlier, found).hex()
        data_sha256 = data.sha256 if data else None
        decides = [recipe.digest(), fingerprint, data_sha256, self.plugins, ratios]
        digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
        journal = run_folder.Journal.open(out, digest, resume, self.team)
        report = Report(
            recipe=recipe.to_json(),
            recipe_sha256=recipe.digest(),
            environment=environment(model) | {"processes": self.team.size},
            model={"name": self._name(model), "sha256": fingerprint},
            plugins=self.plugins,
            data=data.to_json() if data else None,
            notes=self.notes,
        )
        try:
            with self._hold(on_disk) as hold:
                walker = None
                if data is not None:
                    given_to = (blocks.open, recipe.batch, recipe.all_experts, hold)
                    walker = Walker(model, found, *given_to)
                candidates: list[Candidate] = []
                allocation = earlier
                if allocation is None:
                    allocation, candidates = self._allocate(walker, found, rules, data, journal)
                wanted = targets(allocation, found, rules)
                with self._phase("prune"):
                    base = BasePruner(self.setup.pruner, self.setup.refiner, recipe.seed)
                    tick = self._tick("prune", len(found.blocks))
                    ids = data.ids if data is not None else None
                    norms = commit(blocks, base, wanted, walker, ids, journal, tick, self.team)
            report.candidates = [dataclasses.asdict(c) for c in candidates]
            runs = json.dumps(walker.block_runs if walker else 0).encode()
            report.counts["block_runs"] = sum(json.loads(x) for x in self.team.exchange(runs))
            decided = (rules, wanted, norms, allocation)
            save = partial(self._save, report, blocks, tokenizer, *decided, out)
            report = _by_first(self.team, save) or report
        except NeuroalError as error:  # bad input, which would fail again: nothing stays behind
            journal.abandon(everything=not resume and _fails_again(error))
            raise
        except BaseException:
            journal.abandon()
            raise
        return report

    def _on_disk(self, path: str | None, device: str, needed: Needs) -> Offload:
        """Return what of the run is on the disk, where there has to be room for it.

        Raises:
            NeuroalError: Memory or disk are too small.
        """
        chosen, note = decide(needed, path, self.stream, self.spill, available_memory(device))
        if note is not None:
            self.notes.append(note)
            log.warning("%s", note)
        if self.place is not None and self.team.leads:
            files.check_disk(self.place, needed.disk(chosen))
        elif chosen.activations:
            files.check_disk(self._disk, needed.activations)
        return chosen

    @property
    def _disk(self) -> Path:
        """Return the folder on whose disk activations lie: that of the output, if any."""
        parents = () if self.place is None else self.place.absolute().parents
        temporary = Path(tempfile.gettempdir())
        return next((p for p in parents if os.access(p, os.W_OK)), temporary)

    def _hold(self, on_disk: Offload) -> AbstractContextManager[MakeStore]:
        """Return what makes the sequences of activations, for as long as these are there."""
        kept: MakeStore = list
        return activations.on_disk(self._disk) if on_disk.activations else nullcontext(kept)

    def _open(self, name: str, found: Layout, device: str, streams: bool) -> Blocks:
        """Return a model by path, in memory or streamed."""
        recipe = self.recipe
        if streams:
            return Streamed(name, found, device, recipe.dtype, self.trust)
        model, _ = pretrained.load(name, device, recipe.dtype, self.trust)
        return InMemory(model, found)

    # -- phases ------------------------------------------------------------------------------

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        before = self.timings.pop(name, 0.0)  # phases are in the order in which they end
        self.timings[name] = before + time.perf_counter() - start
        self.memory.pop(name, None)
        self.memory[name] = peak_memory()

    def _tick(self, title: str, total: int) -> Tick:
        bar = tqdm(total=total, desc=title, disable=not self.progress, leave=False)

        def tick() -> None:
            bar.update()
            if bar.n >= total:
                bar.close()

        return tick

    def _check_data(self, given: Tensor | None) -> None:
        """Refuse a missing or doubled calibration source before any weight is read."""
        if self.recipe.calibration is not None:
            if given is not None:
                raise UsageError("give a calibration source or windows, not both")
            parse_source(self.recipe.calibration)

    def _check_needs(self, found: Layout, given: Tensor | None) -> None:
        if self.recipe.calibration is None and given is None:
            if reads_data(self.setup, first_steps(self.setup, found, self.recipe)):
                raise UsageError(
                    f"model '{self.recipe.model or 'in memory'}' needs --calibration: a .txt, "
                    ".jsonl, .json or .parquet file, c4, wikitext2, ptb, or a hub data set "
                    "owner/name"
                )

    def _windows(self, model: nn.Module, tokenizer: Any, given: Tensor | None) -> Windows | None:
        recipe = self.recipe
        config = getattr(model, "config", None)
        context = pretrained.context_length(config)
        vocabulary = getattr(config, "vocab_size", None)
        if given is not None:
            if given.dim() != 2 or given.dtype != torch.int64:
                raise UsageError("windows must be int64 (samples, length)")
            calibration.check_sizes(given.shape[0], given.shape[1], context)
            return calibration.windows_of(given.cpu(), Source("windows", "tensor", ""), vocabulary)
        if recipe.calibration is None:
            return None
        make = partial(
            calibration.calibration_windows,
            recipe.calibration,
            tokenizer,
            samples=recipe.samples,
            length=recipe.length,
            seed=recipe.seed,
            context=context,
            vocabulary=vocabulary,
            progress=self.progress,
        )
        return self.shared.windows(recipe, make)

    def _allocate(
        self,
        walker: Walker | None,
        found: Layout,
        rules: Rules,
        data: Windows | None,
        journal: run_folder.Journal,
    ) -> tuple[Allocation, list[Candidate]]:
        recipe = self.recipe
        aligner = None
        if walker is not None:
            pruner = BasePruner(self.setup.pruner, None, recipe.seed)
            aligner = Aligner(walker, pruner, self.setup.alignment, self.setup.reads_deviation)
        ids = data.ids[: self.setup.search_samples] if data is not None else torch.empty(0, 0)
        cut: dict[int, Inputs] = {}
        dtype = search_dtype(recipe)

        def inputs(windows: int) -> Inputs:
            assert walker is not None
            if windows not in cut:
                cut[windows] = walker.inputs(ids[:windows], dtype=dtype)
            return cut[windows]

        search = TopUpSearch(
            *(aligner, found, rules, inputs, len(ids), journal.recall, self._tick),
            *(recipe.seed, not updates_weights(self.setup.pruner), self.team),
        )
        measurements: Measurements = {}
        if self.setup.measures:
            assert walker is not None and data is not None
            open_tick = partial(self._tick, "measure blocks", len(found.blocks))
            with self._phase("measure"):
                measurements, seconds = self.shared.measure(
                    walker, data, self.setup.measures, open_tick, self.team
                )
            self.timings["measure"] = seconds
        with self._phase("block_search"):
            choice = search.choose_blocks(
                self.setup.block_ratios, measurements, self.setup.reads_deviation
            )
        candidates = list(choice.candidates)
        rows = self.setup.row_ratios
        assert rows is not None
        with self._phase("row_search"):
            choice = search.choose_rows(rows, choice, measurements.get(rows, ()))
        return choice.allocation, [*candidates, *choice.candidates]

    def _save(
        self,
        report: Report,
        blocks: Blocks,
        tokenizer: Any,
        rules: Rules,
        wanted: Mapping[str, Target],
        norms: Mapping[str, InputNorms],
        allocation: Allocation,
        out: Path | None,
    ) -> Report:
        start = time.perf_counter()
        found = blocks.layout
        work = None if out is None else run_folder.partial(out) / "checkpoint"
        if work is None:
            zeros = count_zeros(blocks.model, found)
        else:
            blocks.save(tokenizer, work)
            zeros = count_saved_zeros(work, found, blocks.model)
            (work / allocations.FILE).write_bytes(allocations.to_bytes(allocation, found))
        fill_sparsity(report, found, rules, wanted, zeros, norms)
        report.peak_memory_bytes = self.memory["save"] = peak_memory()
        report.phase_memory_bytes = self.memory
        self.timings["save"] = time.perf_counter() - start
        report.timings = {k: round(v, 4) for k, v in self.timings.items()}
        if out is not None and work is not None:
            (work / "README.md").write_text(model_card(report.to_json()), encoding="utf-8")
            text = json.dumps(report.to_json(), indent=1, ensure_ascii=False)
            files.write_atomically(work / files.MARKER, text.encode())
            run_folder.publish(out)
        return report


def _fails_again(error: BaseException | None) -> bool:
    """Return whether an error is the input's, not that of a full disk or a lack of memory."""
    lack = (OSError, MemoryError, torch.cuda.OutOfMemoryError)
    return error is None or (not isinstance(error, lack) and _fails_again(error.__cause__))
