"""What of a checkpoint a run does not change, and the result has to hold all the same.

A model's class may have no place for some tensors of its files, such as the layers that predict
several tokens ahead. They are copied as they are. So are the small files beside the weights.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from neuroal.errors import NeuroalError
from neuroal.model.file_names import FileNames
from neuroal.model.files import INDEX, MARKER, ONE, Shards, write_atomically

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt")
OWN = {MARKER, INDEX, "README.md", "allocation.safetensors", "masks.safetensors"}
_EXTRA = "model-unread.safetensors"


def carry_over(model: nn.Module, source: Path, out: Path) -> list[str]:
    """Bring to a pruned checkpoint what of the dense one the run has not written itself.

    Args:
        model: The pruned model; names alone are read.
        source: Folder of the dense model.
        out: Folder of the pruned checkpoint, its own files written.

    Returns:
        Notes on what is there unchanged and what is not there.

    Raises:
        NeuroalError: A tensor of the source is not in the result, or the other way round.
    """
    unread = carry_tensors(model, source, out)
    notes = copy_small_files(source, out)
    if unread:
        many = f" and {len(unread) - 1} more" if len(unread) > 1 else ""
        notes.append(f"not read by the model's class, copied unchanged: {unread[0]}{many}")
    return notes


def copy_small_files(source: Path, out: Path) -> list[str]:
    """Copy what stands beside a model's weights and the run has not written itself.

    Args:
        source: Folder of the dense model.
        out: Folder of the pruned checkpoint, its own files written.

    Returns:
        A note on weights in other formats, which are not copied; empty where there are none.
    """
    others: list[str] = []
    for file in files_of(source):
        name = file.relative_to(source)
        if file.suffix in WEIGHTS or file.name.endswith(".index.json"):
            if file.suffix != ".safetensors" and file.name != INDEX:
                others.append(str(name))
        elif str(name) not in OWN and not (out / name).exists():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, out / name)
    if not others:
        return []
    more = f" and {len(others) - 1} more" if len(others) > 1 else ""
    return [f"not copied, since it holds the dense weights in another format: {others[0]}{more}"]


def files_of(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder and of those below it in order.

    Hidden ones, runs and their locks are left out.
    """
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name == "__pycache__":
            continue
        if path.is_dir():
            if not path.name.endswith(".partial") and not (path / MARKER).is_file():
                yield from files_of(path)
        elif path.is_file() and path.suffix != ".lock":
            yield path


def carry_tensors(model: nn.Module, source: Path, out: Path) -> list[str]:
    """Add the tensors that a model's class does not read to the pruned checkpoint, unchanged.

    Args:
        model: The pruned model; names alone are read.
        source: Folder of the dense model.
        out: Folder of the pruned checkpoint, its tensors written.

    Returns:
        Their names.

    Raises:
        NeuroalError: A tensor of the source is not in the result, or the other way round.
    """
    names = FileNames(model)
    dense, pruned = Shards(source), Shards(out)
    unread = [n for n in dense.ranges if n not in pruned.ranges and not names.reads(n)]
    _check_complete(model, names, dense, pruned)
    if unread:
        _add(out, {n: dense.read(n) for n in unread}, pruned)
    return unread


def _check_complete(model: nn.Module, names: FileNames, dense: Shards, pruned: Shards) -> None:
    """Refuse a result that has lost a tensor that the model reads, or that has one more."""
    alias = {}  # tied parameters are one, whichever name they have in the files
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        alias[name] = first.setdefault(id(parameter), name)
    had, has = (
        {alias.get(p, p): n for n in shards.ranges if names.reads(n) and (p := names.parameter(n))}
        for shards in (dense, pruned)
    )
    for lacking, what in ((had.keys() - has.keys(), "lost"), (has.keys() - had.keys(), "made up")):
        if lacking:
            tensor = (had | has)[min(lacking)]
            raise NeuroalError(f"saving has {what} the tensor '{tensor}': nothing is published")


def _add(out: Path, tensors: dict[str, object], pruned: Shards) -> None:
    """Add a file of tensors to a checkpoint, and to its index."""
    if (out / ONE).is_file():  # a file of this name is taken for all of the model
        first = out / "model-00001-of-00001.safetensors"
        os.replace(out / ONE, first)
        files = dict.fromkeys(pruned.ranges, first.name)
    else:
        files = {name: span.file.name for name, span in pruned.ranges.items()}
    partial = out / f"{_EXTRA}.tmp"
    save_file(tensors, partial, metadata={"format": "pt"})  # type: ignore[arg-type]
    os.replace(partial, out / _EXTRA)
    (out / _EXTRA).chmod((out / "config.json").stat().st_mode)
    files |= dict.fromkeys(tensors, _EXTRA)
    spans = [s for f in sorted(set(files.values())) for s in Shards.header(out / f).values()]
    size = sum(span.size for span in spans)
    index = {"metadata": {"total_size": size}, "weight_map": files}
    write_atomically(out / INDEX, json.dumps(index, indent=2).encode())
