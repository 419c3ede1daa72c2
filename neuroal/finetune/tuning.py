"""From a run to a fine-tuned run: load, keep the zeros, train, save."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neuroal.data.calibration import calibration_windows
from neuroal.data.source import parse_source, peek
from neuroal.data.windows import Windows
from neuroal.errors import NeuroalError, UsageError
from neuroal.finetune import cost
from neuroal.finetune.cost import TrainingCost
from neuroal.finetune.settings import LENGTH, FineTuning
from neuroal.layout import Layout, find, matrices
from neuroal.model import files, memory, places, pretrained, run_folder
from neuroal.model.blocks import InMemory
from neuroal.model.differences import differences
from neuroal.model.output import one_writer, output_folder
from neuroal.model.run_folder import Journal
from neuroal.run import later
from neuroal.run.apply import dense_linears, read_source
from neuroal.run.masks import RUN
from neuroal.run.report import Phases, Report, environment
from neuroal.run.save import as_counted, save_run
from neuroal.sparse import keep_zeros, masked_lora
from neuroal.types import Tick

_CHECKPOINTS = 10  # in a fine-tuning, where nothing else is asked for


@dataclass(frozen=True, eq=False)
class _Parent:
    """The run that is fine-tuned.

    Attributes:
        name: Its folder, as it was given.
        folder: The same.
        report: Its `neuroal.json`.
        sha256: Of config and weights.
    """

    name: str
    folder: Path
    report: Mapping[str, Any]
    sha256: str

    def to_json(self) -> dict[str, Any]:
        """Return what a report says of it."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            "evaluation": list(self.report.get("evaluation", ())),
        }


def finetune(
    run: str | Path,
    settings: FineTuning,
    out: str | Path,
    *,
    save_every: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
    resume: bool = False,
    trust_remote_code: bool = False,
    progress: bool = False,
    tick: Callable[[int, int], Tick] = lambda total, done: int,
    foresee: Callable[[TrainingCost], bool] = lambda cost: True,
) -> Report | None:
    """Train the weights of a run that survived, and write them as a run of their own.

    Args:
        run: Folder of the run.
        settings: What is asked for.
        out: Folder to write.
        save_every: Steps between checkpoints, from which `resume` goes on; None is a tenth of all.
        device: "auto", "cpu", "cuda" or "mps".
        overwrite: Replace an earlier run in `out`.
        resume: Go on with a fine-tuning that was interrupted.
        trust_remote_code: Let the model's own code run.
        progress: Show the progress bars of downloads.
        tick: Opens a progress bar for a number of steps, of which some are done.
        foresee: Told what it will cost, before the first step; False ends it there.

    Returns:
        The report, which is in `out` too; None if `foresee` has ended it.

    Raises:
        UsageError: There is no such run, something asked for is not there, or `out` exists.
        NeuroalError: A file is broken, or memory is too small.
    """
    out = output_folder(out)
    with one_writer(out):
        run_folder.check(out, overwrite, resume)
        _check_extra()
        parent = _parent(str(run))
        place = _device(device)
        teacher = _teacher_of(parent) if settings.distil else None
        phases = Phases()
        with phases.phase("load"):
            tokenizer = pretrained.load_tokenizer(parent.name, trust_remote_code)
            skeleton = pretrained.skeleton(parent.name, trust_remote_code)
            layout = find(skeleton)
            windows = _windows(settings, tokenizer, skeleton.config, progress)
            decides = {"recipe": settings.to_json(), "data": windows.to_json()}
            done = _finished(out, parent, decides) if resume else None
            if done is not None:
                return done
            held = _bytes(teacher) if teacher else 0
            needed = cost.memory(
                skeleton,
                layout,
                tokens=settings.batch * windows.ids.shape[1],
                lora=settings.lora,
                dtype=settings.dtype,
                teacher=held,
            )
            cost.check_memory(needed, place)
            needed += memory.resident_memory() if place == "cpu" else 0
            model, dtypes = _loaded(parent.name, place, settings.dtype, trust_remote_code)
            dense = (
                pretrained.load(teacher, place, "auto", trust_remote_code)[0] if teacher else None
            )
        layout = find(model)
        masks = _masks(model, layout, parent)
        journal = Journal.open(out, {**decides, "model": {"sha256": parent.sha256}}, resume)
        assert journal.folder is not None
        with keep_zeros(model):
            lora = None
            if settings.lora is not None:
                lora = masked_lora(model, settings.lora, settings.targets, seed=settings.seed)
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            if not foresee(_cost(model, windows.ids, settings, dense, needed, journal.folder)):
                return None
            with phases.phase("train"):
                every = save_every or max(1, settings.steps // _CHECKPOINTS)
                losses = _trained(model, windows.ids, settings, journal, dense, every, tick)
            if lora is not None:
                lora.merge()
        report = _report(parent, settings, windows, losses, trained, environment(model))
        _restore(model.cpu(), dtypes)
        report.environment["dtype"] = environment(model)["dtype"]
        report.notes += _check_zeros(model, layout, masks)
        counts = {name: int(mask.sum()) for name, mask in masks.items()}
        left = dense_linears(read_source(parent.name), layout)
        pruned, rules = as_counted(counts, left, layout, report.recipe)
        blocks = InMemory(model.eval(), layout)
        return save_run(report, blocks, tokenizer, rules, pruned, phases, out, parent.folder)


def _check_extra() -> None:
    if importlib.util.find_spec("accelerate") is None:
        raise UsageError("accelerate is not installed: pip install 'neuroal[finetune]'")


def _device(name: str) -> str:
    if name.partition(":")[2]:
        raise UsageError(f"device '{name}': say cuda, and choose one by CUDA_VISIBLE_DEVICES")
    return memory.device_of(name)


def _parent(name: str) -> _Parent:
    """Return the run in a folder.

    Raises:
        UsageError: There is none.
    """
    folder = later.run_folder_of(name)
    sha256 = None if folder is None else files.fingerprint(name)
    if folder is None or sha256 is None:
        raise UsageError(f"'{name}' is no run: give the output folder of `neuroal prune`")
    return _Parent(name, folder, files.read_report(folder), sha256)


def _teacher_of(parent: _Parent) -> str:
    """Return the dense model that a run was pruned from.

    Raises:
        UsageError: It is not there, or not what it was.
    """
    try:
        return later.dense_model(parent.folder, parent.report)
    except NeuroalError as error:
        raise UsageError(
            f"{error}: go to the folder where it was pruned, or leave --distil out"
        ) from error


def _windows(settings: FineTuning, tokenizer: Any, config: Any, progress: bool) -> Windows:
    """Return a window for every step and place in a batch, as for calibration.

    Raises:
        NeuroalError: The source cannot be read, or holds too little.
    """
    source = parse_source(settings.data)
    context = pretrained.context_length(config)
    length = settings.length
    if length is None and peek(source) != "tokens":
        length = min(LENGTH, context or LENGTH)
    windows = calibration_windows(
        source,
        tokenizer,
        samples=settings.steps * settings.batch,
        length=length,
        seed=settings.seed,
        bos=settings.bos,
        pack_documents=settings.pack_documents,
        context=context,
        vocabulary=pretrained.vocabulary_size(config),
        progress=progress,
    )
    if len(windows.ids) < settings.batch:
        raise UsageError(
            f"'{settings.data}' has {len(windows.ids)} windows, fewer than a batch of "
            f"{settings.batch}: give a smaller --batch"
        )
    return windows


def _finished(out: Path, parent: _Parent, decides: Mapping[str, Any]) -> Report | None:
    """Return the report of the same fine-tuning if `out` has it.

    Raises:
        UsageError: `out` has something else.
    """
    if not out.exists() or run_folder.partial(out).exists():
        return None
    data = files.read_report(out)
    training = data.get("training") or {}
    there = {"recipe": training.get("settings"), "data": training.get("data")}
    of = (data.get("parent") or {}).get("sha256")
    if json.loads(json.dumps(decides)) != there or of != parent.sha256:
        there |= {"model": of}
        why = differences(there, {**decides, "model": parent.sha256})
        raise UsageError(f"'{out}' holds another run: {why}")
    return Report.of(data)


def _bytes(model: str) -> int:
    folder = places.local_folder(model)
    return sum(f.stat().st_size for f in folder.glob("*.safetensors")) if folder else 0


def _loaded(
    name: str, device: str, dtype: str, trust: bool
) -> tuple[nn.Module, dict[str, torch.dtype]]:
    """Return a model in the dtype in which it is trained, and the dtypes in which it is saved."""
    model, _ = pretrained.load(name, device, "auto", trust)
    own = {n: x.dtype for n, x in _floating(model)}
    model.to(getattr(torch, dtype))
    return model, own


def _floating(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    named = chain(model.named_parameters(), model.named_buffers())
    return ((name, x) for name, x in named if x.is_floating_point())


def _restore(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    for name, tensor in _floating(model):
        tensor.grad = None
        tensor.data = tensor.data.to(dtypes[name])


def _masks(model: nn.Module, layout: Layout, parent: _Parent) -> dict[str, Tensor]:
    """Return where the linears that the run has pruned are zero, bool `(out, in)`, by name."""
    wanted = {n for n, x in parent.report["linears"].items() if x["wanted"] > 0}
    if not wanted:
        raise UsageError(
            f"'{parent.name}' has no linear that is pruned: there are no zeros to keep"
        )
    linears = {name: x for name, x in layout.linears.items() if name in wanted}
    return {name: (matrices.weight(x, model) == 0).cpu() for name, x in linears.items()}


def _check_zeros(model: nn.Module, layout: Layout, masks: Mapping[str, Tensor]) -> list[str]:
    """Return a note on zeros that rounding has added.

    Raises:
        NeuroalError: A zero is lost.
    """
    more = 0
    for name, mask in masks.items():
        zero = matrices.weight(layout.linears[name], model) == 0
        if bool((mask & ~zero).any()):
            raise NeuroalError(f"linear '{name}' has lost zeros in the training: nothing is saved")
        more += int((zero & ~mask).sum())
    return [f"{more:,} weights became zero by the training or by rounding"] if more else []


def _cost(
    model: nn.Module,
    ids: Tensor,
    settings: FineTuning,
    teacher: nn.Module | None,
    needed: int,
    folder: Path,
) -> TrainingCost:
    """Return what the steps that are still to come will take."""
    from neuroal.finetune.trainer import last_checkpoint, loss_of

    on = next(model.parameters()).device
    each = cost.seconds_per_step(
        lambda batch: loss_of(model, batch, teacher), ids[: settings.batch].to(on), model
    )
    there = last_checkpoint(folder)
    done = 0 if there is None else int(there.name.rpartition("-")[2])
    return TrainingCost(needed, each * (settings.steps - done))


def _trained(
    model: nn.Module,
    ids: Tensor,
    settings: FineTuning,
    journal: Journal,
    teacher: nn.Module | None,
    save_every: int,
    tick: Callable[[int, int], Tick],
) -> list[tuple[int, float]]:
    """Train a model; what fails before its first checkpoint leaves nothing."""
    from neuroal.finetune.trainer import last_checkpoint, train

    assert journal.folder is not None
    journal.begin()
    try:
        losses = train(
            model,
            ids,
            settings,
            journal.folder,
            teacher=teacher,
            save_every=save_every,
            tick=tick,
        )
        broken = next((step for step, loss in losses if not math.isfinite(loss)), None)
        if broken is not None:
            raise NeuroalError(
                f"the loss is not finite at step {broken}: give a lower --learning-rate"
            )
    except NeuroalError:
        journal.abandon(everything=True)
        raise
    finally:
        if last_checkpoint(journal.folder) is None:
            journal.abandon(everything=True)
    return losses


def _report(
    parent: _Parent,
    settings: FineTuning,
    windows: Windows,
    losses: list[tuple[int, float]],
    trained: int,
    where: dict[str, Any],
) -> Report:
    """Return the report of a fine-tuned run, but for what is counted and measured."""
    report = Report(
        **{key: parent.report[key] for key in RUN},
        notes=[
            f"fine-tuned from '{parent.name}' for {settings.steps} steps: {settings.method}",
            *windows.notes,
        ],
        parent=parent.to_json(),
        training={
            "settings": settings.to_json(),
            "data": windows.to_json(),
            "trained": trained,
            "losses": [list(x) for x in losses],
        },
    )
    report.environment = where
    report.counts["block_runs"] = 0
    return report
