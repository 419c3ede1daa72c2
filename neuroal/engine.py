"""Prune a model: load, calibrate, search, prune, save; `Report` says what happened."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neuroal.cost.estimate import check_space, needs
from neuroal.cost.offload import Needs, Offload, activations_folder, decide
from neuroal.cost.preparation import Prepared, check_calibrated, prepare, with_its_calibration
from neuroal.cost.texts import TextSize
from neuroal.data.windows import Windows
from neuroal.distributed import Team
from neuroal.errors import NeuroalError, UsageError, nearest
from neuroal.model import files, memory, places, pretrained, run_folder
from neuroal.model.blocks import Blocks, InMemory, state_sha256
from neuroal.model.memory import available_memory
from neuroal.model.output import one_writer, output_folder
from neuroal.model.run_folder import Journal
from neuroal.model.streaming import Streamed, folder_of
from neuroal.progress import bar
from neuroal.pruning import allocation as allocations
from neuroal.pruning.pruner import BasePruner
from neuroal.pruning.targets import Rules, targets
from neuroal.recipe import Recipe
from neuroal.run.commit import commit
from neuroal.run.effort import METHOD, with_effort
from neuroal.run.evaluation import RunEvaluation, tokens_at_once
from neuroal.run.kept_zeros import with_kept_zeros
from neuroal.run.masks import WithMasks
from neuroal.run.report import Phases, Report, environment, first_report
from neuroal.run.reuse import finished_run, model_name
from neuroal.run.save import Pruned, save_run
from neuroal.run.search import RunSearch
from neuroal.run.setup import Setup, setup
from neuroal.run.windows import calibrate, texts_to_evaluate
from neuroal.search.measurements import SharedMeasurements
from neuroal.types import Tick
from neuroal.walk import Walker, activations
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
    save_masks: bool = False,
    save_packed: bool = False,
    trust_remote_code: bool = False,
    progress: bool = False,
    shared: SharedMeasurements | None = None,
    prepared: Prepared | None = None,
    effort: str | None = None,
    **fields: Any,
) -> Report:
    """Prune a model in memory, or a folder or hub name, by a recipe.

    Args:
        model: A causal language model, pruned in place, or where to load one.
        tokenizer: Of a model in memory; not needed where `windows` or token ids calibrate it.
        recipe: What to do; `Recipe()` prunes half the weights by Wanda with NeuroAL on top. Without
            one, `fields` say it, and where they name no method it is that of the effort "medium".
        windows: Calibration token ids, int64 `(samples, length)`, in place of a source.
        out: Folder to write; needed for a path.
        overwrite: Replace an earlier run in `out`.
        resume: Go on with an unfinished run in `out`.
        stream: Read the blocks of a model folder one at a time, for models larger than memory;
            None does so where the model would not fit. The result is the same.
        spill: Hold activations between blocks on the disk of `out` (of the folder for temporary
            files without `out`); None does so where they would not fit. The result is the same.
        save_masks: Write the masks into `out`, one bit a weight, for `neuroal apply`.
        save_packed: Write the weights packed, as `neuroal pack` does.
        trust_remote_code: Let the model's own code run.
        progress: Show bars on stderr, or a line every 30 seconds where it is no terminal.
        shared: Windows and measurements that runs on the same dense model reuse.
        prepared: What `prepare` has made of the same recipe and path; None prepares here.
        effort: A preset that says how much to spend, and names the pruner: "low", "medium", "high"
            or "max"; None where a method is named.
        fields: Fields of `Recipe`, which go before those of `recipe`: `sparsity=0.7`.

    Returns:
        What happened.

    Raises:
        UsageError: The recipe makes no sense; nothing was done.
        NeuroalError: Model, data or a plugin failed; a model in memory keeps its weights unless
            the final pruning had begun.
    """
    if isinstance(tokenizer, Recipe):
        raise UsageError("a recipe stands where the tokenizer belongs: give it as recipe=...")
    given = fields.keys() if recipe is None or effort else fields.keys() | METHOD
    recipe = with_effort(_with_fields(recipe or Recipe(), fields), effort, given)
    in_memory = isinstance(model, nn.Module)
    if not in_memory:
        recipe = dataclasses.replace(recipe, model=str(model))
        if windows is None:
            recipe = with_its_calibration(recipe)
        if out is None:
            raise UsageError("a model given by path needs an output folder")
    elif getattr(model, "peft_config", None) or getattr(model, "_hf_peft_config_loaded", False):
        raise UsageError("the model has adapters: merge them first (model.merge_and_unload())")
    elif stream:
        raise UsageError("a model in memory cannot be streamed: give the path of its folder")
    for name, asked in (("save_masks", save_masks), ("save_packed", save_packed)):
        if asked and out is None:
            raise UsageError(f"{name} needs an output folder")
    plugins = prepared.setup if prepared is not None else setup(recipe)
    team = Team.join()
    if resume and team.size > 1 and in_memory:
        raise UsageError("several processes cannot resume a model in memory: give its path")
    folder = output_folder(out) if out is not None else None
    target = folder if team.leads else None

    phases = Phases()
    with ExitStack() as held:

        def done_already() -> Report | None:
            if target is None:
                return None
            held.enter_context(one_writer(target))
            run_folder.check(target, overwrite, resume)
            return _finished(recipe, plugins, model, windows, target) if resume else None

        report = first_report(team, done_already)
        if report is not None:
            return report
        if recipe.calibration is not None and windows is not None:
            raise UsageError("give a calibration source or windows, not both")
        with phases.phase("load"):
            if stream:
                folder_of(str(model))
            if windows is None:
                check_calibrated(recipe, plugins.reads_data)
            if prepared is None:
                structure = model if isinstance(model, nn.Module) else None
                prepared = prepare(
                    recipe, structure, plugins=plugins, trust_remote_code=trust_remote_code
                )
            if windows is None:
                check_calibrated(prepared.recipe, prepared.reads_data)
        run = _Run(
            prepared=prepared,
            folder=folder,
            stream=stream,
            spill=spill,
            resume=resume,
            save_masks=save_masks,
            save_packed=save_packed,
            progress=progress and team.leads,
            shared=shared or SharedMeasurements(),
            team=team,
            phases=phases,
            notes=list(prepared.notes),
        )
        held.enter_context(_evaluation(model))
        return run.run(model, tokenizer, windows, target)


def _finished(
    recipe: Recipe,
    plugins: Setup,
    model: nn.Module | str | Path,
    windows: Tensor | None,
    out: Path,
) -> Report | None:
    """Return the report of the same run if `out` has it finished already.

    Raises:
        UsageError: There is another run, finished or not.
    """
    if out.exists():
        done = finished_run(recipe, plugins, model, windows, out)
        if done is not None:
            return done
    here = {"recipe": recipe.to_json(), "plugins": plugins.provenance}
    run_folder.refuse_another(out, here)
    return None


def _with_fields(recipe: Recipe, fields: Mapping[str, Any]) -> Recipe:
    """Return a recipe with fields replaced.

    Raises:
        UsageError: There is no such field; the nearest name may be an argument of `prune`.
    """
    known = {f.name for f in dataclasses.fields(Recipe)}
    unknown = next((name for name in fields if name not in known), None)
    if unknown is not None:
        own = set(inspect.signature(prune).parameters) - {"fields"}
        raise UsageError(f"prune has no '{unknown}': {nearest(unknown, known | own)}")
    return dataclasses.replace(recipe, **fields) if fields else recipe


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


@dataclass(frozen=True, eq=False)
class _Run:
    """One run from what is prepared to its report; what is not said here is as in `prune`.

    Attributes:
        folder: Of the output, which the first process writes.
        team: The processes that run together.
        phases: Seconds and memory so far.
        notes: What was left out or should be known.
    """

    prepared: Prepared
    folder: Path | None
    stream: bool | None
    spill: bool | None
    resume: bool
    save_masks: bool
    save_packed: bool
    progress: bool
    shared: SharedMeasurements
    team: Team
    phases: Phases
    notes: list[str]

    def run(
        self,
        model: nn.Module | str | Path,
        tokenizer: Any,
        windows: Tensor | None,
        out: Path | None,
    ) -> Report:
        """Return the report; `out` is the output folder, None in all processes but the first."""
        prepared, recipe = self.prepared, self.prepared.recipe
        plugins = prepared.setup.provenance
        known: Mapping[str, Windows] = {}
        with self.phases.phase("calibrate"):
            if not isinstance(model, nn.Module):
                tokenizer = pretrained.load_tokenizer(str(model), prepared.trust_remote_code)
                known = prepared.texts
            if windows is None:
                check_space(prepared, self.stream, self.spill, self.folder)
            data = calibrate(
                recipe,
                prepared.model,
                tokenizer,
                windows,
                self.shared,
                progress=self.progress,
            )
            texts = texts_to_evaluate(
                recipe, prepared.model, tokenizer, known, data, progress=self.progress
            )
        self.notes.extend(data.notes if data is not None else ())
        length = 0 if data is None else data.ids.shape[1]
        sizes = [TextSize.of(text) for text in texts]
        needed = needs(prepared, length, sizes, saves_masks=self.save_masks)
        with self.phases.phase("load"):
            blocks, fingerprint, offload = self._load(model, needed, out)
            blocks.check_finite()
            allocation = prepared.allocation
            rules, kept = with_kept_zeros(
                recipe, prepared.rules, prepared.layout, blocks, allocation
            )
            self.notes.extend(kept)
        decides = {
            "recipe": recipe.to_json(),
            "model": fingerprint,
            "data": data.sha256 if data else None,
            "plugins": plugins,
            "allocation": allocation and _sha256(allocations.to_bytes(allocation, prepared.layout)),
        }
        journal = Journal.open(out, decides, self.resume, self.team)
        report = Report(
            recipe=recipe.to_json(),
            recipe_sha256=recipe.digest(),
            environment=environment(blocks.model) | {"processes": self.team.size},
            model={"name": model_name(recipe, blocks.model), "sha256": fingerprint},
            plugins=plugins,
            data=data.to_json() if data else None,
            notes=self.notes,
        )
        try:
            masks = None
            if self.save_masks:
                linears = rules.pruned(prepared.layout)
                blocks = masks = WithMasks(blocks, frozenset(x.name for x in linears))
            pruned = self._prune(blocks, rules, data, texts, journal, offload, report)
            phases = self.phases
            source = None if isinstance(model, nn.Module) else places.local_folder(str(model))
            given = (report, blocks, tokenizer, rules, pruned, phases, out, source, masks)
            save = partial(save_run, *given, packed=self.save_packed)
            return first_report(self.team, save) or report
        except NeuroalError as error:  # bad input, which would fail again: no folder is left
            journal.abandon(everything=not self.resume and _fails_again(error))
            raise
        except BaseException:
            journal.abandon()
            raise

    # -- what a run needs --------------------------------------------------------------------

    def _load(
        self, model: nn.Module | str | Path, needed: Needs, out: Path | None
    ) -> tuple[Blocks, str | None, Offload]:
        """Return the model's blocks, its SHA-256 (if it is asked for), and what is kept on disk.

        Raises:
            NeuroalError: Memory or disk are too small, or the model cannot be loaded.
        """
        prepared, recipe = self.prepared, self.prepared.recipe
        if isinstance(model, nn.Module):
            offload = self._offload(None, str(next(model.parameters()).device), needed)
            sha256 = None if out is None else state_sha256(model)
            return InMemory(model, prepared.layout), sha256, offload
        path, trust = str(model), prepared.trust_remote_code
        fingerprint = files.fingerprint(path)
        device = self.team.device(memory.device_of(recipe.device))
        offload = self._offload(path, device, needed)
        if offload.blocks:
            blocks: Blocks = Streamed(path, prepared.layout, device, recipe.dtype, trust)
        else:
            loaded, _ = pretrained.load(path, device, recipe.dtype, trust)
            blocks = InMemory(loaded, prepared.layout)
        return blocks, fingerprint or state_sha256(blocks.model), offload

    def _offload(self, path: str | None, device: str, needed: Needs) -> Offload:
        """Decide what the run keeps on disk, and check the free space there.

        Raises:
            NeuroalError: Memory or disk are too small.
        """
        free = available_memory(device)
        offload, note = decide(needed, path, self.stream, self.spill, free)
        if note is not None:
            self.notes.append(note)
            log.warning("%s", note)
        if self.folder is not None and self.team.leads:
            files.check_disk(self.folder, needed.disk(offload))
        elif offload.activations:
            files.check_disk(activations_folder(self.folder), needed.activations)
        return offload

    def _stores(self, offload: Offload) -> AbstractContextManager[MakeStore]:
        """Return a context in which stores for activations can be made; it deletes them."""
        if offload.activations:
            return activations.on_disk(activations_folder(self.folder))
        in_memory: MakeStore = list
        return nullcontext(in_memory)

    def _tick(self, title: str, total: int) -> Tick:
        shown = bar(total=total, desc=title, disable=not self.progress, leave=False)

        def tick() -> None:
            shown.update()
            if shown.n >= total:
                shown.close()

        return tick

    def _evaluation(
        self,
        texts: list[Windows],
        data: Windows | None,
        blocks: Blocks,
        walker: Walker | None,
        journal: Journal,
    ) -> RunEvaluation:
        length = 0 if data is None else data.ids.shape[1]
        return RunEvaluation(
            texts=texts,
            blocks=blocks,
            walker=walker if blocks.streams else None,
            at_once=tokens_at_once(self.prepared.recipe, length),
            journal=journal,
            phases=self.phases,
            team=self.team,
            progress=self.progress,
        )

    # -- what it does ------------------------------------------------------------------------

    def _prune(
        self,
        blocks: Blocks,
        rules: Rules,
        data: Windows | None,
        texts: list[Windows],
        journal: Journal,
        offload: Offload,
        report: Report,
    ) -> Pruned:
        """Find the allocation, prune by it, and report candidates, block runs and evaluation."""
        prepared, recipe = self.prepared, self.prepared.recipe
        with self._stores(offload) as make_store:
            walker = None
            if data is not None or (texts and blocks.streams):
                walker = Walker(
                    blocks.model,
                    prepared.layout,
                    blocks.open,
                    batch=recipe.batch,
                    all_experts=recipe.all_experts,
                    make_store=make_store,
                )
                journal = dataclasses.replace(journal, block_runs=partial(_block_runs, walker))
            evaluation = self._evaluation(texts, data, blocks, walker, journal)
            dense = evaluation.dense()
            walker = walker if data is not None else None
            allocation = prepared.allocation
            if allocation is None:
                search = RunSearch(
                    setup=prepared.setup,
                    recipe=recipe,
                    layout=prepared.layout,
                    rules=rules,
                    walker=walker,
                    data=data,
                    shared=self.shared,
                    journal=journal,
                    progress=self._tick,
                    phases=self.phases,
                    team=self.team,
                )
                allocation, candidates = search.choose()
                report.candidates = [dataclasses.asdict(c) for c in candidates]
            wanted = targets(allocation, prepared.layout, rules)
            chosen = prepared.setup
            with self.phases.phase("prune"):
                norms = commit(
                    blocks,
                    BasePruner(chosen.pruner, chosen.refiner, recipe.seed, rules.zeros.keys()),
                    wanted,
                    walker,
                    None if data is None else data.ids,
                    journal,
                    self._tick("prune", len(prepared.layout.blocks)),
                    self.team,
                    prepared.setup.reconstruction,
                )
            report.evaluation = evaluation.pruned(dense)
        done = journal.earlier_runs + (walker.block_runs if walker else 0)
        runs = json.dumps(done).encode()
        report.counts["block_runs"] = sum(json.loads(x) for x in self.team.exchange(runs))
        return Pruned(allocation, wanted, norms)


def _block_runs(walker: Walker) -> int:
    return walker.block_runs


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _fails_again(error: BaseException | None) -> bool:
    """Return whether an error comes from the input, not from too little disk or memory."""
    lack = (OSError, MemoryError, torch.cuda.OutOfMemoryError)
    return error is None or (not isinstance(error, lack) and _fails_again(error.__cause__))
