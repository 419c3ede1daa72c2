"""A run or a model packed into a folder of its own, and back."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from neuroal.errors import NeuroalError, UsageError
from neuroal.model import files, packing, run_folder
from neuroal.model.files import MARKER, read_report
from neuroal.model.output import one_writer, output_folder
from neuroal.model.packing import Packing
from neuroal.model.run_folder import Journal
from neuroal.packed import writing
from neuroal.packed.reading import packed
from neuroal.run import later

Tick = Callable[[int], object]


def pack(
    model: str | Path,
    out: str | Path,
    *,
    compress: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    tick: Callable[[int], Tick] = lambda total: lambda _: None,
) -> Packing:
    """Write the packed form of a run or a model: masks and surviving values in place of matrices.

    Nothing is lost: `unpack` gives the same files, and `from_pretrained` the same weights.

    Args:
        model: Folder of a run or a model, or "demo".
        out: Folder to write.
        compress: Compress masks and values by zstd too.
        overwrite: Replace an earlier run in `out`.
        resume: Go on with an interrupted try; files that are finished stay.
        tick: Opens a progress bar for a number of bytes.

    Raises:
        UsageError: The model is packed already, or is no folder; or `out` exists.
        NeuroalError: The model is quantised, a file is broken, or the disk is too small.
    """
    folder = packing.folder_of(str(model))
    packing.check_packable(str(model), folder)
    write = partial(writing.pack_file, compress=compress)
    decides = _decides(folder, packs=str(model), compress=compress)
    needed = expected(folder, compress)
    target = output_folder(out)
    with one_writer(target):
        check_output(target, overwrite, resume)
        return _write(folder, target, write, decides, needed, resume, tick)


def unpack(
    model: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    tick: Callable[[int], Tick] = lambda total: lambda _: None,
) -> Packing:
    """Write the folder that was packed; its weights are the same files, by their SHA-256.

    Args:
        model: A packed folder.
        out: As in `pack`, and so are the others.
        overwrite: Replace an earlier run in `out`.
        resume: Go on with an interrupted try.
        tick: Opens a progress bar.

    Raises:
        UsageError: The folder is not packed, or `out` exists.
        NeuroalError: A file is broken, or the disk is too small.
    """
    folder = packing.folder_of(str(model))
    if not packing.is_packed(folder):
        raise UsageError(f"'{model}' is not packed")
    decides = _decides(folder, unpacks=str(model))
    needed = packing.packing_of(folder).dense
    target = output_folder(out)
    with one_writer(target):
        check_output(target, overwrite, resume)
        return _write(folder, target, writing.unpack_file, decides, needed, resume, tick)


def copy_unpacked(folder: Path, out: Path) -> None:
    """Copy a run or a model into an existing folder, its weights unpacked if they are packed.

    Raises:
        NeuroalError: A file is broken, or the disk is too small.
    """
    if not packing.is_packed(folder):
        shutil.copytree(folder, out, dirs_exist_ok=True)
        return
    files.check_disk(out, files.weight_bytes(folder))
    for file in packing.weight_files(folder):
        writing.unpack_file(file, out / file.name, lambda _: None)
    _report(out, packing.packing_of(out, packing.copy_rest(folder, out, mark=False)))


def expected(folder: Path, compress: bool) -> int:
    """Return about how many bytes of weights `pack` writes, by a part of every matrix."""
    return sum(writing.estimate(file, compress) for file in packing.weight_files(folder))


def check_output(out: Path, overwrite: bool, resume: bool) -> None:
    """Refuse an output folder that exists, or an unfinished one that is not gone on with.

    Raises:
        UsageError: It is such a one.
    """
    run_folder.check(out, overwrite, resume)
    if resume and out.exists() and not run_folder.partial(out).exists():
        raise UsageError(f"nothing to resume: '{out}' is finished")


def _decides(folder: Path, **asked: Any) -> Mapping[str, Any]:
    """Return what is asked for and which files are read: an interrupted try may be another."""
    stats = {file.name: file.stat() for file in packing.weight_files(folder)}
    sizes = {name: [x.st_size, x.st_mtime_ns] for name, x in stats.items()}
    return {"recipe": asked, "model": {"folder": str(folder.resolve()), "files": sizes}}


def _write(
    folder: Path,
    out: Path,
    write: Callable[..., None],
    decides: Mapping[str, Any],
    needed: int,
    resume: bool,
    tick: Callable[[int], Tick],
) -> Packing:
    """Write every file of weights in its other form, and what stands beside them."""
    files.check_disk(out, needed)
    journal = Journal.open(out, decides, resume)
    weights = packing.weight_files(folder)
    try:
        done = tick(sum(files.dense_bytes(file) for file in weights))
        for file in weights:
            if journal.shard(file.name) is None:
                journal.keep_shard(file.name, partial(write, file, tick=done))
            else:
                done(files.dense_bytes(file))
        work = run_folder.partial(out) / "checkpoint"
        notes = packing.copy_rest(folder, work, mark=packed(weights[0]) is None)
        found = packing.packing_of(work, notes)
        _report(work, found)
        run_folder.publish(out)
        return found
    except NeuroalError:
        journal.abandon(everything=not resume)
        raise
    except BaseException:
        journal.abandon()
        raise


def _report(folder: Path, found: Packing) -> None:
    """Say in the report and on the model card of a run how large its weights are."""
    if not (folder / MARKER).is_file():
        return
    report = read_report(folder)
    sizes = {k: v for k, v in report.get("weight_bytes", {}).items() if k == "dense"}
    sizes["pruned"] = found.dense
    matrices = None
    if packing.is_packed(folder):
        sizes["packed"], matrices = found.bytes, found.of_matrices()
    later.replace(folder, report, {**report, "weight_bytes": sizes, "packing": matrices})
