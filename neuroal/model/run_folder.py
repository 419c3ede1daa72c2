"""The output folder of an unfinished run: everything in `OUT.partial`, renamed on success.

`OUT.partial` is created with the first result worth keeping. It contains `run.json` (all that
decides the result, and whether an earlier run in `OUT` will be replaced), `journal/` (finished
search generations and pruned blocks, and how far a walk has come; `kept.json` has the digest of
each), `checkpoint/` (which becomes `OUT`) and, while the two are exchanged, `replaced/` (the
earlier run).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save as to_safetensors
from torch import Tensor

from neuroal.distributed import ALONE, Team
from neuroal.errors import NeuroalError, UsageError
from neuroal.model.differences import differences
from neuroal.model.files import MARKER, load_tensors, read_report, write_atomically
from neuroal.model.output import output_folder

EXPORT = "export.json"  # what an exported folder has; a run has MARKER
_KEPT, _RUNS = "kept.json", "block runs"
_MARK, _JOURNAL, _CHECKPOINT, _REPLACED = "run.json", "journal", "checkpoint", "replaced"
_PUBLISHED = "published"  # in the mark


def check(out: Path, overwrite: bool, resume: bool | None) -> None:
    """Refuse an output folder that would overwrite something, or that cannot be created.

    To be called by its one writer: what a kill has left of a finished run is removed.

    Args:
        out: The output folder.
        overwrite: Replace what is there.
        resume: Go on with an unfinished run; None for a command that cannot.

    Raises:
        UsageError: It exists and may not be replaced, or its parent cannot be written to.
    """
    output_folder(out)
    if overwrite and resume:
        raise UsageError("--overwrite and --resume exclude each other")
    if out.exists() and not resume:
        if not overwrite:
            raise UsageError(f"output folder '{out}' exists: choose another or add --overwrite")
        if not any((out / x).is_file() for x in (MARKER, EXPORT)) and (
            not out.is_dir() or any(out.iterdir())
        ):
            raise UsageError(f"'{out}' was not written by neuroal: remove it yourself")
    work = partial(out)
    if work.exists() and not _is_ours(work):
        raise UsageError(f"'{work}', which the run needs, is not neuroal's: remove it yourself")
    if not overwrite:
        _tidy(out)
    if work.exists() and not (resume or overwrite):
        cure = (
            "--overwrite begins anew" if resume is None else "add --resume to go on, or --overwrite"
        )
        raise UsageError(f"'{work}' holds an unfinished run: {cure}")


def partial(out: Path) -> Path:
    """Return the folder of the unfinished run."""
    return out.with_name(out.name + ".partial")


def _tidy(out: Path) -> None:
    """Remove what a kill has left of a run that was published, or that had not begun."""
    work = partial(out)
    mark = _mark(work)
    begun = mark or ((work / _REPLACED).exists() and not out.exists())
    published = mark.get(_PUBLISHED) and out.exists() and not (work / _CHECKPOINT).exists()
    if published or not begun:
        _remove(work)


def _is_ours(work: Path) -> bool:
    ours = {_MARK, f"{_MARK}.tmp", _JOURNAL, _CHECKPOINT, _REPLACED}
    return work.is_dir() and all(p.name in ours for p in work.iterdir())


def _mark(work: Path) -> dict[str, Any]:
    """Return the `run.json` of the unfinished run in a folder; empty without one."""
    return _json(work / _MARK)


def _json(file: Path) -> dict[str, Any]:
    """Return the object in a file of an unfinished run; empty without the file.

    Raises:
        NeuroalError: The file is damaged.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        return dict(found)
    except (ValueError, TypeError) as error:
        raise _damaged(file) from error


def _damaged(file: Path) -> NeuroalError:
    return NeuroalError(f"'{file}' is damaged or of another run: --overwrite begins anew")


def refuse_another(out: Path, decides: Mapping[str, Any]) -> None:
    """Refuse to go on with an unfinished run that is another, by what is known of both.

    Raises:
        UsageError: It says what differs.
    """
    there = _mark(partial(out)).get("decides", {})
    asked = json.loads(json.dumps(decides))
    if any(there[key] != asked[key] for key in there.keys() & asked.keys()):
        what = differences(there, asked)
        raise UsageError(f"'{partial(out)}' belongs to another run: {what}")


def found(out: Path) -> str:
    """Return what there is of a run to go on with, as a sentence."""
    work = partial(out)
    if (out / MARKER).is_file() and not _mark(work).get("replaces"):
        return f"nothing to resume: '{out}' is finished"
    if not _mark(work):
        return f"nothing to resume: there is no unfinished run in '{work}', a new one begins"
    names = [p.name for p in work.glob("*/*")]
    blocks = sum(bool(re.fullmatch(r"block-\d+\.safetensors", n)) for n in names) or sum(
        bool(re.fullmatch(r"model-\d+-of-\d+\.safetensors", n)) for n in names
    )
    steps = sum(bool(re.match(r"(block|row)_ratios-.*\.safetensors$", n)) for n in names)
    going = any(re.match(r"at-.*\.json$", n) for n in names)
    parts = [f"{steps} generation{'s' * (steps != 1)} of candidates"] if steps else []
    parts += [f"{blocks} pruned block{'s' * (blocks != 1)}"] if blocks else []
    parts += ["a walk on its way"] if going else []
    tuned = [int(n.removeprefix("checkpoint-")) for n in names if re.match(r"checkpoint-\d+$", n)]
    parts += [f"{max(tuned)} steps of training"] if tuned else []
    return f"going on from '{work}': {', '.join(parts) or 'nothing is finished yet'}"


def finished(out: Path, recipe: Mapping[str, Any], **more: Any) -> dict[str, Any] | None:
    """Return the report of the same run if `out` has it finished; its partial folder is removed.

    Args:
        out: The output folder.
        recipe: The recipe as JSON values.
        **more: Other entries of the report that have to be equal.

    Returns:
        None if the run is not finished: there is no `out`, or it is still the earlier run that is
        to be replaced.

    Raises:
        UsageError: `out` holds another run.
    """
    work = partial(out)
    if not out.exists() or (_mark(work).get("replaces") and not (work / _REPLACED).exists()):
        return None
    if not (out / MARKER).is_file():
        raise UsageError(f"'{out}' was not written by neuroal: choose another output folder")
    data = read_report(out)
    asked = json.loads(json.dumps({"recipe": recipe, **more}))
    if any(data.get(key) != value for key, value in asked.items()):
        raise UsageError(f"'{out}' holds another run: {differences(data, asked)}")
    _remove(work)
    return data


def _remove(work: Path) -> None:
    """Remove an unfinished run, its mark first: without a mark, what a kill leaves is not a run."""
    if work.exists():
        (work / _MARK).unlink(missing_ok=True)
        shutil.rmtree(work)


def _norms_file(index: int) -> str:
    return f"norms-{index:04d}.json"


def _block_file(index: int) -> str:
    return f"block-{index:04d}.safetensors"


@dataclass(frozen=True)
class Journal:
    """What an unfinished run has done so far, one file a step; nothing without an output folder.

    Attributes:
        out: The output folder, or None.
        mark: The contents of `run.json`.
        team: The processes of the run, of which the first alone has an output folder.
        kept: What `kept.json` says: the digest of every file of a finished step, by name, and the
            block runs of all tries.
        block_runs: Returns those of this try.
        earlier_runs: Block runs of the tries before.
    """

    out: Path | None
    mark: Mapping[str, Any] = field(default_factory=dict)
    team: Team = ALONE
    kept: dict[str, Any] = field(default_factory=dict)
    block_runs: Callable[[], int] = int
    earlier_runs: int = 0
    _seen: set[str] = field(default_factory=set)  # files whose digests have been compared

    @classmethod
    def open(
        cls, out: Path | None, decides: Mapping[str, Any], resume: bool, team: Team = ALONE
    ) -> Journal:
        """Start a run, or continue one.

        Args:
            out: The output folder.
            decides: Everything that decides the result, as JSON values.
            resume: Continue an unfinished run.
            team: The processes of the run.

        Raises:
            UsageError: The unfinished run is another.
        """
        if out is None:
            return cls(None, team=team)
        work = partial(out)
        mark = _mark(work) if resume else {}  # which may be damaged
        if mark:
            refuse_another(out, decides)
            kept = _json(work / _JOURNAL / _KEPT)
            return cls(out, mark, team, kept, earlier_runs=int(kept.get(_RUNS, 0)))
        if (work / _REPLACED).exists() and not out.exists():
            os.replace(work / _REPLACED, out)
        _remove(work)
        return cls(out, {"decides": decides, "replaces": out.exists()}, team)

    @property
    def folder(self) -> Path | None:
        """Return `OUT.partial/journal`, or None without an output folder."""
        return None if self.out is None else partial(self.out) / _JOURNAL

    def _set_mark(self) -> None:
        assert self.out is not None
        work = partial(self.out)
        if not (work / _MARK).is_file():
            work.mkdir(parents=True, exist_ok=True)
            write_atomically(work / _MARK, json.dumps(dict(self.mark)).encode())

    def begin(self) -> None:
        """Make the folder, which is made with the first thing worth keeping."""
        assert self.folder is not None
        self._set_mark()
        self.folder.mkdir(exist_ok=True)
        runs = self.earlier_runs + self.block_runs()
        if self.kept.get(_RUNS, 0) != runs:
            self.kept[_RUNS] = runs
            self._write_kept()

    def _write_kept(self) -> None:
        assert self.folder is not None
        write_atomically(self.folder / _KEPT, json.dumps(self.kept).encode())

    def _keep(self, name: str, data: bytes) -> None:
        assert self.folder is not None
        self.begin()
        write_atomically(self.folder / name, data)
        self._vouch(self.folder / name)

    def _digest(self, file: Path) -> str:
        """Return the SHA-256 over what decides the run and the content of a file."""
        digest = hashlib.sha256(json.dumps(self.mark.get("decides"), sort_keys=True).encode())
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
        return digest.hexdigest()

    def _vouch(self, file: Path) -> None:
        """Record that a file of a finished step is this run's, and whole."""
        self.begin()
        assert self.folder is not None
        self.kept[file.name] = self._digest(file)
        self._seen.add(file.name)
        self._write_kept()

    def _known(self, file: Path) -> bool:
        """Return whether an earlier try has finished a file.

        Raises:
            NeuroalError: It is damaged, or another run's.
        """
        if file.name not in self.kept or not file.is_file():
            return False
        if file.name not in self._seen and self._digest(file) != self.kept[file.name]:
            raise _damaged(file)
        self._seen.add(file.name)
        return True

    def recall(self, key: str, make: Callable[[], bytes]) -> bytes:
        """Return the bytes that an earlier try kept under a key; else make and keep them."""
        file = None if self.folder is None else self.folder / f"{key}.safetensors"
        known = self.team.first(
            lambda: file.read_bytes() if file is not None and self._known(file) else None
        )
        if known is not None:
            return known
        data = make()
        if file is not None:
            self._keep(file.name, data)
        return data

    def block(self, index: int) -> dict[str, Tensor] | None:
        """Return the pruned weights of a finished block by linear name."""
        if self.folder is None or not self._known(self.folder / _block_file(index)):
            return None
        return load_tensors(self.folder / _block_file(index))

    def norms(self, index: int) -> dict[str, float]:
        """Return the dense input norms of a finished block by linear name; empty if unknown."""
        file = None if self.folder is None else self.folder / _norms_file(index)
        return _json(file) if file is not None and self._known(file) else {}

    def keep_norms(self, index: int, norms: Mapping[str, float]) -> None:
        """Keep the dense input norms of a block, before its weights are kept."""
        if self.folder is not None:
            self._keep(_norms_file(index), json.dumps(dict(norms)).encode())

    def shard(self, name: str) -> Path | None:
        """Return a file of the checkpoint if an earlier try has written it."""
        if self.out is None:
            return None
        file = partial(self.out) / _CHECKPOINT / name
        return file if self._known(file) else None

    def keep_shard(self, name: str, write: Callable[[Path], object]) -> None:
        """Write a file of the checkpoint so that it is complete or absent."""
        if self.out is not None:
            self._set_mark()
            folder = partial(self.out) / _CHECKPOINT
            folder.mkdir(exist_ok=True)
            write(folder / f"{name}.tmp")
            os.replace(folder / f"{name}.tmp", folder / name)
            self._vouch(folder / name)

    def abandon(self, everything: bool = False) -> None:
        """Remove the unfinished run's folder if it has no finished step.

        Args:
            everything: Remove finished steps too, because the run would fail again.
        """
        if self.out is not None:
            work = partial(self.out)
            if everything or not any((work / name).is_dir() for name in (_JOURNAL, _CHECKPOINT)):
                _remove(work)

    def keep_block(self, index: int, weights: Mapping[str, Tensor]) -> None:
        """Keep the pruned weights of a finished block."""
        if self.folder is not None:
            data = to_safetensors({k: w.detach().cpu().contiguous() for k, w in weights.items()})
            self._keep(_block_file(index), data)


def work_folder(out: Path) -> Path:
    """Return the empty folder that `publish` will rename to `out`, anew."""
    journal = Journal.open(out, {}, resume=False)
    journal.begin()
    work = partial(out) / _CHECKPOINT
    work.mkdir()
    return work


def aside(out: Path) -> Path:
    """Return a folder of the unfinished run for what is not finished either."""
    return partial(out) / _JOURNAL / "aside"


def forget(out: Path) -> None:
    """Have `--resume` begin anew from here: what was kept is about to be changed."""
    (partial(out) / _JOURNAL / _KEPT).unlink(missing_ok=True)


def publish(out: Path) -> None:
    """Rename the finished checkpoint to `out`, replacing an earlier run, and tidy up.

    Raises:
        NeuroalError: `out` was created during the run.
    """
    work = partial(out)
    replaced = work / _REPLACED
    mark = {**_mark(work), _PUBLISHED: True}  # once `checkpoint/` is gone
    write_atomically(work / _MARK, json.dumps(mark).encode())
    if out.exists():
        if not _mark(work).get("replaces"):
            meanwhile = f"'{out}' was made meanwhile: move it away, and add --resume"
            raise NeuroalError(meanwhile) from FileExistsError(out)
        os.replace(out, replaced)
    try:
        os.replace(work / _CHECKPOINT, out)
    except OSError:
        if replaced.exists():
            os.replace(replaced, out)
        raise
    _remove(work)
