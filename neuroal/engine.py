"""Prune a model: load, calibrate, search, prune, save; `Report` says what happened."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from neuroal import allocation as allocations
from neuroal import calibration, checkpoint, layout, output
from neuroal.alignment import Aligner, Tick, measure_blocks
from neuroal.allocation import Allocation, Rules, targets
from neuroal.calibration import Windows
from neuroal.card import model_card
from neuroal.errors import NeuroalError, UsageError
from neuroal.hookspecs import Target
from neuroal.layout import Layout
from neuroal.plan import Setup, first_steps, setup
from neuroal.plugins import Plugin
from neuroal.pruning import BasePruner, spare_copies, weight_of
from neuroal.recipe import Recipe
from neuroal.result import Report, environment, fill_sparsity, peak_memory
from neuroal.source import parse_source
from neuroal.statistics import resolve
from neuroal.topup import Candidate, TopUpSearch
from neuroal.walk import Inputs, Prefix, Walker


def prune(
    model: nn.Module | str | Path,
    tokenizer: Any = None,
    recipe: Recipe | None = None,
    *,
    windows: Tensor | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    trust_remote_code: bool = False,
    progress: bool = False,
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
        trust_remote_code: Let the model's own code run.
        progress: Show progress bars.

    Returns:
        What happened.

    Raises:
        UsageError: The recipe makes no sense; nothing was done.
        NeuroalError: Model, data or a plugin failed; a model in memory keeps its weights unless
            the final pruning had begun.
    """
    recipe = recipe or Recipe()
    if isinstance(model, (str, Path)):
        recipe = dataclasses.replace(recipe, model=str(model))
        if recipe.calibration is None and str(model) == "demo" and windows is None:
            recipe = dataclasses.replace(recipe, calibration="demo")
        if out is None:
            raise UsageError("a model given by path needs an output folder")
    run = _Run(recipe, setup(recipe), progress, trust_remote_code)
    target = None if out is None else Path(out)
    if target is not None:
        output.check(target, overwrite, resume)
        done = output.finished(target, recipe.digest()) if resume else None
        if done is not None:
            if output.partial(target).exists():
                shutil.rmtree(output.partial(target))
            return Report(**done)
    return run.run(model, tokenizer, windows, target, resume)


class _Run:
    """One run from recipe to report."""

    def __init__(self, recipe: Recipe, made: Setup, progress: bool, trust: bool) -> None:
        self.recipe = recipe
        self.setup = made
        self.progress = progress
        self.trust = trust
        self.timings: dict[str, float] = {}
        self.notes = list(made.notes)

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
        with self._phase("load"):
            if isinstance(model, nn.Module):
                fingerprint = None
                found = layout.find(model)
                rules = self.setup.rules(recipe, found)
                self._check_needs(found, given)
                model.eval()
            else:
                found = layout.find(checkpoint.skeleton(str(model), self.trust))
                rules = self.setup.rules(recipe, found)
                self._check_needs(found, given)
                name = str(model)
                fingerprint = checkpoint.fingerprint(name)
                model, tokenizer = checkpoint.load(
                    name, checkpoint.device_of(recipe.device), recipe.dtype, self.trust
                )
            checkpoint.check_finite(model, found)
        with self._phase("calibrate"):
            data = self._windows(model, tokenizer, given)
        saved = sum(p.numel() * p.element_size() for p in model.parameters())
        if out is not None:
            checkpoint.check_disk(out, 2 * saved)
        digest = hashlib.sha256(
            json.dumps([recipe.digest(), fingerprint, data.sha256 if data else None]).encode()
        ).hexdigest()
        journal = output.Journal.open(out, digest, resume)
        report = Report(
            recipe=recipe.to_json(),
            recipe_sha256=recipe.digest(),
            environment=environment(model),
            model={"name": recipe.model or type(model).__name__, "sha256": fingerprint},
            plugins=[p.provenance() for p in self.setup.plugins],
            data=data.to_json() if data else None,
            notes=self.notes,
        )
        try:
            walker = Walker(model, found) if data else None
            allocation, candidates = self._allocate(walker, found, rules, data, journal)
            wanted = targets(allocation, found, rules)
            with self._phase("prune"):
                self._commit(model, found, wanted, walker, data, journal)
            report.candidates = [dataclasses.asdict(c) for c in candidates]
            report.counts["block_runs"] = walker.block_runs if walker else 0
            self._save(report, model, tokenizer, found, rules, wanted, allocation, out)
        except NeuroalError:  # bad input, which would fail again: nothing stays behind
            journal.abandon(everything=not resume)
            raise
        except BaseException:
            journal.abandon()
            raise
        return report

    # -- phases ------------------------------------------------------------------------------

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.timings[name] = self.timings.get(name, 0.0) + time.perf_counter() - start

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
            if self.setup.reads_data(first_steps(self.setup, found, self.recipe)):
                raise UsageError(
                    f"model '{self.recipe.model or 'in memory'}' needs --calibration: a .txt, "
                    ".jsonl, .json or .parquet file, c4, wikitext2, ptb, or a hub data set "
                    "owner/name"
                )

    def _windows(self, model: nn.Module, tokenizer: Any, given: Tensor | None) -> Windows | None:
        recipe = self.recipe
        if given is not None:
            if given.dim() != 2 or given.dtype != torch.int64:
                raise UsageError("windows must be int64 (samples, length)")
            return Windows(given.cpu(), "windows")
        if recipe.calibration is None:
            return None
        config = getattr(model, "config", None)
        return calibration.calibration_windows(
            recipe.calibration,
            tokenizer,
            samples=recipe.samples,
            length=recipe.length,
            seed=recipe.seed,
            context=checkpoint.context_length(config),
            vocabulary=getattr(config, "vocab_size", None),
            progress=self.progress,
        )

    def _allocate(
        self,
        walker: Walker | None,
        found: Layout,
        rules: Rules,
        data: Windows | None,
        journal: output.Journal,
    ) -> tuple[Allocation, list[Candidate]]:
        recipe = self.recipe
        if recipe.allocation is not None:
            return allocations.read(Path(recipe.allocation), found), []
        aligner = None
        if walker is not None:
            pruner = BasePruner(self.setup.pruner, None, recipe.seed)
            aligner = Aligner(walker, pruner, self.setup.alignment, self.setup.reads_deviation)
        ids = data.ids[: recipe.search_samples] if data is not None else torch.empty(0, 0)
        cut: dict[int, Inputs] = {}

        def inputs(windows: int) -> Inputs:
            assert walker is not None
            if windows not in cut:
                cut[windows] = walker.inputs(ids[:windows])
            return cut[windows]

        search = TopUpSearch(
            aligner, found, rules, inputs, len(ids), journal.outcomes, self._tick, recipe.seed
        )
        measurements: dict[Plugin, Sequence[Mapping[str, Tensor]]] = {}
        if self.setup.measures:
            assert walker is not None and data is not None
            with self._phase("measure"):
                tick = self._tick("measure blocks", len(found.blocks))
                answers = measure_blocks(walker, walker.inputs(data.ids), self.setup.measures, tick)
                for plugin, answer in zip(self.setup.measures, answers, strict=True):
                    measurements[plugin] = answer
        with self._phase("block_search"):
            choice = search.choose_blocks(
                self.setup.block_ratios, measurements, self.setup.reads_deviation
            )
        candidates = list(choice.candidates)
        rows = self.setup.row_ratios
        assert rows is not None
        with self._phase("row_search"):
            choice = search.choose_rows(rows, choice)
        return choice.allocation, [*candidates, *choice.candidates]

    def _commit(
        self,
        model: nn.Module,
        found: Layout,
        wanted: Mapping[str, Target],
        walker: Walker | None,
        data: Windows | None,
        journal: output.Journal,
    ) -> None:
        """Prune block by block on what the pruned blocks before it produce, and keep the result."""
        base = BasePruner(self.setup.pruner, self.setup.refiner, self.recipe.seed)
        plugins = [p for p in (base.pruner, base.refiner) if p is not None]
        accumulators = resolve(s for p in plugins for s in p.required_statistics())
        if not accumulators:
            walker = None  # nothing is read from activations
        tick = self._tick("prune", len(found.blocks))
        prefix = inputs = None
        if walker is not None and data is not None:
            inputs = walker.inputs(data.ids)
            prefix = Prefix.start(inputs)
        for block in found.blocks:
            last = block.index == len(found.blocks) - 1
            with walker.block(block) if walker else _module(model, block.name) as module:
                weights = journal.block(block.index)
                if weights is None:
                    statistics = {}
                    if walker is not None and inputs is not None and prefix is not None:
                        statistics = walker.run(
                            block, module, inputs, prefix, accumulators, output=False
                        ).statistics
                    copies = spare_copies(block, module)
                    pruned = base.prune_block(block, copies, statistics, wanted)
                    weights = {
                        x.name: pruned[x.name].weight.to(weight_of(block, module, x).dtype)
                        for x in block.linears
                        if x.name in pruned
                    }
                    journal.keep_block(block.index, weights)
                with torch.no_grad():
                    for x in block.linears:
                        if x.name in weights:
                            weight_of(block, module, x).copy_(weights[x.name])
                if walker is not None and inputs is not None and prefix is not None and not last:
                    prefix = walker.run(block, module, inputs, prefix).prefix
            tick()

    def _save(
        self,
        report: Report,
        model: nn.Module,
        tokenizer: Any,
        found: Layout,
        rules: Rules,
        wanted: Mapping[str, Target],
        allocation: Allocation,
        out: Path | None,
    ) -> None:
        start = time.perf_counter()
        work = None if out is None else output.partial(out) / "checkpoint"
        if work is None:
            zeros = checkpoint.count_zeros(model, found)
        else:
            if work.exists():
                shutil.rmtree(work)
            checkpoint.save(model, tokenizer, work)
            zeros = checkpoint.count_saved_zeros(work, found)
            (work / allocations.FILE).write_bytes(allocations.to_bytes(allocation, found))
        fill_sparsity(report, found, rules, wanted, zeros)
        report.peak_memory_bytes = peak_memory()
        self.timings["save"] = time.perf_counter() - start
        report.timings = {k: round(v, 4) for k, v in self.timings.items()}
        if out is not None and work is not None:
            (work / "README.md").write_text(model_card(report.to_json()), encoding="utf-8")
            text = json.dumps(report.to_json(), indent=1, ensure_ascii=False)
            checkpoint.write_atomically(work / checkpoint.MARKER, text.encode())
            output.publish(out)


@contextmanager
def _module(model: nn.Module, name: str) -> Iterator[nn.Module]:
    yield model.get_submodule(name)
