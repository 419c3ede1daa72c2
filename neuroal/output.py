"""The output folder while it is made: everything in `OUT.partial`, renamed on success."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save as to_safetensors
from torch import Tensor

from neuroal.alignment import Outcome
from neuroal.checkpoint import MARKER, load_tensors, read_report, write_atomically
from neuroal.errors import UsageError
from neuroal.hookspecs import Measurement


def check(out: Path, overwrite: bool, resume: bool) -> None:
    """Refuse an output folder that would lose something.

    Raises:
        UsageError: It exists and may not be replaced.
    """
    if overwrite and resume:
        raise UsageError("--overwrite and --resume exclude each other")
    if out.exists() and not resume:
        if not overwrite:
            raise UsageError(f"output folder '{out}' exists: choose another or add --overwrite")
        if not (out / MARKER).is_file() and (not out.is_dir() or any(out.iterdir())):
            raise UsageError(f"'{out}' was not written by neuroal: remove it yourself")
    if partial(out).exists() and not (resume or overwrite):
        raise UsageError(
            f"'{partial(out)}' holds an unfinished run: add --resume to go on, or --overwrite"
        )


def partial(out: Path) -> Path:
    """Return the folder of the unfinished run."""
    return out.with_name(out.name + ".partial")


def finished(out: Path, digest: str) -> dict[str, Any] | None:
    """Return the report of a finished run of the same recipe in `out`.

    Raises:
        UsageError: `out` holds another run.
    """
    if not out.exists():
        return None
    data = read_report(out)
    if data.get("recipe_sha256") != digest:
        raise UsageError(f"'{out}' holds another run: its recipe differs")
    return data


@dataclass(frozen=True)
class Journal:
    """What an unfinished run has done so far, one file a step; None remembers nothing.

    Attributes:
        folder: `OUT.partial/journal`, or None without an output folder.
    """

    folder: Path | None

    @classmethod
    def open(cls, out: Path | None, digest: str, resume: bool) -> Journal:
        """Start or go on with a run.

        Args:
            out: The output folder.
            digest: SHA-256 of everything that decides the result.
            resume: Go on with what is there.

        Raises:
            UsageError: What is there belongs to another recipe.
        """
        if out is None:
            return cls(None)
        work = partial(out)
        if work.exists() and resume:
            mark = work / "recipe.sha256"
            if mark.is_file() and mark.read_text() != digest:
                raise UsageError(f"'{work}' belongs to another recipe, model or data")
        elif work.exists():
            shutil.rmtree(work)
        (work / "journal").mkdir(parents=True, exist_ok=True)
        write_atomically(work / "recipe.sha256", digest.encode())
        return cls(work / "journal")

    def outcomes(self, key: str, make: Callable[[], list[Outcome]]) -> list[Outcome]:
        """Return the outcomes of a generation, measured now or read from an earlier try."""
        if self.folder is None:
            return make()
        file = self.folder / f"{key}.json"
        tensors = file.with_suffix(".safetensors")
        if file.is_file():
            stored = json.loads(file.read_text())
            deviations: list[dict[str, Tensor]] = [{} for _ in stored]
            for name, tensor in load_tensors(tensors).items():
                index, _, linear = name.partition("/")
                deviations[int(index)][linear] = tensor
            return [Outcome(Measurement(**m), d) for m, d in zip(stored, deviations, strict=True)]
        outcomes = make()
        flat = {
            f"{i}/{name}": t.cpu().contiguous()
            for i, o in enumerate(outcomes)
            for name, t in o.deviation.items()
        }
        write_atomically(tensors, to_safetensors(flat))
        write_atomically(file, json.dumps([asdict(o.measurement) for o in outcomes]).encode())
        return outcomes

    def block(self, index: int) -> dict[str, Tensor] | None:
        """Return the pruned weights of a finished block by linear name."""
        file = None if self.folder is None else self.folder / f"block-{index:04d}.safetensors"
        return load_tensors(file) if file is not None and file.is_file() else None

    def abandon(self) -> None:
        """Remove the unfinished run's folder if nothing in it is worth going on from."""
        if self.folder is not None and self.folder.is_dir() and not any(self.folder.iterdir()):
            shutil.rmtree(self.folder.parent)

    def keep_block(self, index: int, weights: Mapping[str, Tensor]) -> None:
        """Keep the pruned weights of a finished block."""
        if self.folder is not None:
            data = to_safetensors({k: w.detach().cpu().contiguous() for k, w in weights.items()})
            write_atomically(self.folder / f"block-{index:04d}.safetensors", data)


def publish(out: Path) -> None:
    """Rename the finished checkpoint to `out`, replacing an earlier run, and tidy up."""
    work = partial(out)
    old = out.with_name(out.name + ".old")
    if out.exists():
        if old.exists():
            shutil.rmtree(old)
        os.replace(out, old)
    os.replace(work / "checkpoint", out)
    shutil.rmtree(work)
    if old.exists():
        shutil.rmtree(old)
