"""An earlier run's masks, and on request its weights, put on a model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neuroal.errors import NeuroalError, UsageError
from neuroal.layout import Layout, find, matrices
from neuroal.model import files, places, pretrained, run_folder
from neuroal.model.blocks import Blocks, InMemory, state_sha256
from neuroal.model.files import MARKER, read_report
from neuroal.model.memory import available_memory
from neuroal.model.output import one_writer, output_folder
from neuroal.model.report_form import check_report
from neuroal.model.run_folder import Journal
from neuroal.model.streaming import Streamed, folder_of
from neuroal.progress import bar
from neuroal.pruning import mask_file
from neuroal.pruning.mask_file import Masks
from neuroal.pruning.masks import zeroed
from neuroal.recipe import Recipe
from neuroal.run.masks import RUN
from neuroal.run.report import Phases, Report, environment
from neuroal.run.save import as_counted, save_run
from neuroal.run.setup import stays_dense


@dataclass(frozen=True, eq=False)
class Source:
    """Where masks are from.

    Attributes:
        name: As it was given.
        run: What is known of the run: entries of its report.
        pruned: The linears that may have masks, with their shapes where the file says them.
        masks: Their masks; None where the zeros of the run's weights are the masks.
        folder: Of the run, with its weights; None for a file of masks alone.
    """

    name: str
    run: Mapping[str, Any]
    pruned: Mapping[str, tuple[int, int] | None]
    masks: Masks | None
    folder: Path | None


def apply(
    model: str | Path,
    source: str | Path,
    out: str | Path,
    *,
    weights: bool = False,
    any_model: bool = False,
    stream: bool | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: bool = False,
) -> Report:
    """Put an earlier run's masks on a model, and write it as a run does.

    Args:
        model: Folder or hub name of the dense model, or "demo".
        source: Folder of the run, or its `masks.safetensors`.
        out: Folder to write.
        weights: Take the run's own weights, too, where its pruner moved those that stay.
        any_model: Let the model be another than the one that the run pruned.
        stream: Read blocks one at a time; None does so where the models would not fit into memory.
        overwrite: Replace an earlier run in `out`.
        trust_remote_code: Let the model's own code run.
        progress: Show a progress bar.

    Returns:
        The report, which is in `out` too.

    Raises:
        UsageError: The source has no masks, or is of another model; nothing was done.
        NeuroalError: A file is broken.
    """
    model, out = str(model), output_folder(out)
    with one_writer(out):
        run_folder.check(out, overwrite, resume=None)
        found = read_source(str(source), weights)
        if weights and any_model:
            raise UsageError("--weights are those of the model that was pruned: drop --any-model")
        phases = Phases()
        with phases.phase("load"):
            skeleton = pretrained.skeleton(model, trust_remote_code)
            layout = find(skeleton)
            check_fits(found, layout)
            dense = dense_linears(found, layout)
            reads_run = found.masks is None or weights
            dtype = str(found.run["recipe"].get("dtype", "auto"))
            streams = streams_blocks(model, skeleton, 2 if reads_run else 1, stream)
            blocks = open_blocks(model, layout, dtype, streams, trust_remote_code)
            sha256 = files.fingerprint(model)
            same = _is_same(found, sha256, blocks)
            if not (same or any_model):
                raise UsageError(
                    f"'{model}' is not the model that '{found.name}' was pruned from (its SHA-256 "
                    "differs): --any-model puts the masks on it all the same"
                )
            blocks.check_finite()
            tokenizer = pretrained.load_tokenizer(model, trust_remote_code)
            run_blocks = None
            if reads_run:
                assert found.folder is not None
                run_blocks = open_blocks(
                    str(found.folder), layout, "auto", streams, trust_remote_code
                )
        recipe = {**found.run["recipe"], "model": model}
        digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
        journal = Journal.open(out, {"recipe": recipe}, resume=False)
        try:
            with phases.phase("prune"):
                applied = _apply(found, dense, blocks, run_blocks, weights, journal, progress)
            report = Report(
                **{key: found.run[key] for key in RUN},
                notes=_notes(found, applied, weights, same),
            )
            report.recipe, report.recipe_sha256 = recipe, digest
            report.environment = environment(blocks.model)
            report.model = {"name": model, "sha256": sha256 or state_sha256(blocks.model)}
            report.counts["block_runs"] = 0
            counts = {name: x.pruned for name, x in applied.items()}
            pruned, rules = as_counted(counts, dense, layout, recipe)
            return save_run(
                report, blocks, tokenizer, rules, pruned, phases, out, places.local_folder(model)
            )
        finally:
            journal.abandon(everything=True)


def read_source(name: str, weights: bool = False) -> Source:
    """Return where masks are from.

    Raises:
        UsageError: It is neither a run nor a file of masks, or has no weights where they are asked
            for.
        NeuroalError: A file is broken.
    """
    path = Path(name)
    if path.is_dir() and (path / MARKER).is_file():
        report = read_report(path)
        file = path / mask_file.FILE
        if file.is_file():
            masks = mask_file.read(file)
            return Source(name, report, masks.shapes, masks, path)
        pruned = dict.fromkeys(report["linears"])
        return Source(name, report, pruned, None, path)
    if not path.is_file():
        raise UsageError(f"'{name}' is neither a run's folder nor a file of masks")
    masks = mask_file.read(path)
    check_report(path, masks.run, RUN)
    if weights:
        raise UsageError(f"'{name}' holds masks alone: --weights needs the folder of the run")
    return Source(name, masks.run, masks.shapes, masks, None)


def check_fits(found: Source, layout: Layout) -> None:
    """Refuse masks of linears that the model has not, or has in another shape."""
    for name, shape in found.pruned.items():
        x = layout.linears.get(name)
        if x is None:
            raise UsageError(f"masks of '{found.name}' do not fit the model: it has no '{name}'")
        if shape not in (None, (x.out_features, x.in_features)):
            raise UsageError(
                f"masks of '{found.name}' do not fit the model: '{name}' has shape "
                f"{(x.out_features, x.in_features)}, not {shape}"
            )


def _is_same(found: Source, sha256: str | None, blocks: Blocks) -> bool:
    """Return whether a model is the one that was pruned, by its files or by its weights."""
    recorded = found.run["model"].get("sha256")
    if recorded is None or recorded == sha256:
        return recorded is not None
    return not blocks.streams and state_sha256(blocks.model) == recorded


def streams_blocks(model: str, skeleton: nn.Module, models: int, asked: bool | None) -> bool:
    """Return whether blocks are read one at a time: as asked, or where memory is too small."""
    if asked is not None:
        if asked:
            folder_of(model)
        return asked
    size = sum(p.numel() * p.element_size() for p in skeleton.parameters())
    free = available_memory("cpu")
    return free is not None and models * size > free and places.local_folder(model) is not None


def open_blocks(
    name: str, layout: Layout, dtype: str, streams: bool, trust: bool, device: str = "cpu"
) -> Blocks:
    """Return the blocks of a model, all in memory or read one at a time."""
    if streams:
        return Streamed(name, layout, device, dtype, trust)
    return InMemory(pretrained.load(name, device, dtype, trust)[0], layout)


@dataclass(frozen=True)
class Applied:
    """What was done to one linear.

    Attributes:
        pruned: Weights that the mask prunes.
        moved: Weights that stay and have another value in the run; 0 where that was not read.
    """

    pruned: int
    moved: int


def _apply(
    found: Source,
    dense: Mapping[str, str],
    blocks: Blocks,
    run_blocks: Blocks | None,
    weights: bool,
    journal: Journal,
    progress: bool,
) -> dict[str, Applied]:
    """Put masks, and the run's weights if asked for, on every block in turn."""
    applied: dict[str, Applied] = {}
    shown = bar(iterable=blocks.layout.blocks, desc="apply", disable=not progress, leave=False)
    for block in shown:
        of_run: AbstractContextManager[nn.Module | None] = nullcontext()
        if run_blocks is not None:
            of_run = run_blocks.open(block)
        with blocks.open(block) as module, of_run as run_module, torch.no_grad():
            new: dict[str, Tensor] = {}
            for x in block.linears:
                if x.name in dense:
                    continue
                own = matrices.weight(x, module, block.name)  # (out, in)
                other = None
                if run_module is not None:
                    other = matrices.weight(x, run_module, block.name)
                mask = mask_of(found, x.name, other)
                moved = 0 if other is None else int(((other != own) & ~mask).sum())
                applied[x.name] = Applied(int(mask.sum()), moved)
                values = own if other is None or not weights else other.to(own.dtype)
                new[x.name] = zeroed(values, mask)
            blocks.keep(block, module, new, journal)
    return applied


def mask_of(found: Source, name: str, weight: Tensor | None) -> Tensor:
    """Return a linear's mask, bool `(out, in)`: that of the file, else the zeros of the run."""
    if found.masks is not None:
        return found.masks.mask(name)
    if weight is None:
        raise NeuroalError(f"'{found.name}' has neither a mask nor a weight of '{name}'")
    return weight == 0


def dense_linears(found: Source, layout: Layout) -> dict[str, str]:
    """Return the linears that have no masks, and why: as the run's recipe says, if it does."""
    recipe = found.run["recipe"]
    pattern = Recipe(pattern=recipe["pattern"]).parsed_pattern()
    why = stays_dense(layout, recipe.get("keep", ()), recipe.get("only", ()), pattern)
    if found.masks is not None:
        return {
            name: why.get(name, f"'{found.name}' has no mask of it")
            for name in layout.linears
            if name not in found.pruned
        }
    return why


def _notes(found: Source, applied: Mapping[str, Applied], weights: bool, same: bool) -> list[str]:
    what = "masks and weights" if weights else "masks"
    notes = [f"{what} of '{found.name}', put on the model by `neuroal apply`"]
    if not same:
        notes.append("the model is another than the one that the masks were made for")
    moved = sum(x.moved for x in applied.values())
    if moved and not weights:
        notes.append(
            f"{moved:,} weights that stay have other values in '{found.name}': --weights takes them"
        )
    return notes
