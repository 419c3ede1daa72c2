"""An exporter's files: in the output folder when all of them are there, and not before."""

from __future__ import annotations

import hashlib
import json
import shutil
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from neuroal.errors import PluginError, UsageError
from neuroal.export.linears import open_run
from neuroal.layout import find
from neuroal.model import files, memory, pretrained, run_folder
from neuroal.model.output import one_writer, output_folder
from neuroal.plugins import Plugin, load
from neuroal.pruning.hooks import rng_for
from neuroal.run import later
from neuroal.types import Tick
from neuroal.version import __version__

_HOOK = "export_run"


def export(
    run: str | Path,
    to: object,
    out: str | Path,
    *,
    options: Mapping[str, Mapping[str, object]] | None = None,
    device: str = "auto",
    stream: bool | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    tick: Callable[[int], Tick] = lambda total: int,
) -> dict[str, Any]:
    """Write another form of a finished run.

    Args:
        run: Folder of the run.
        to: An exporter: a name, `distribution:name`, `./mine.py:Mine` or an instance.
        out: Folder to write.
        options: Its options, by its name.
        device: Where its linears are: "auto", or a torch device.
        stream: Read blocks one at a time; None does so where they would not fit into memory.
        overwrite: Replace an earlier export or run in `out`.
        trust_remote_code: Let the model's own code run.
        tick: Opens a progress bar for a number of blocks.

    Returns:
        The content of `export.json`, which is in `out` too: `exporter`, `run`, `result` (what the
        exporter says) and `files` (bytes and SHA-256).

    Raises:
        UsageError: There is no such run or exporter, `out` exists, or the exporter refuses the run.
        PluginError: The exporter failed; nothing is left of it.
        NeuroalError: A file is broken.
    """
    out = output_folder(out)
    with one_writer(out):
        run_folder.check(out, overwrite, resume=None)
        plugin = load([("exporter", to)], options)[0]
        folder = later.run_folder_of(str(run))
        if folder is None:
            raise UsageError(f"'{run}' is no run: give the output folder of `neuroal prune`")
        report = files.read_report(folder)
        place = memory.device_of(device)
        layout = find(pretrained.skeleton(str(folder), trust_remote_code))
        opened = open_run(
            folder,
            report,
            layout,
            plugin,
            device=place,
            stream=stream,
            trust=trust_remote_code,
            tick=tick(len(layout.blocks)),
        )
        work = run_folder.work_folder(out)
        try:
            rng = rng_for(int(report["recipe"].get("seed", 0)), plugin.role, plugin.name)
            with torch.no_grad():
                result = _asked(plugin, run=opened, folder=work, rng=rng)
            said = {
                "neuroal": __version__,
                "exporter": plugin.provenance(),
                "run": {"name": str(run), "sha256": files.fingerprint(str(folder))},
                "result": _checked(plugin, result),
                "files": _written(plugin, work),
            }
            text = json.dumps(said, indent=1, ensure_ascii=False)
            files.write_atomically(work / run_folder.EXPORT, text.encode())
            for file in work.rglob("*.safetensors"):  # that library leaves them to their owner
                file.chmod((work / run_folder.EXPORT).stat().st_mode)
            run_folder.publish(out)
        finally:
            shutil.rmtree(run_folder.partial(out), ignore_errors=True)
    return said


def _asked(plugin: Plugin, **arguments: Any) -> object:
    """Return what an exporter answers; where it refuses the run, its own sentence is the error."""
    try:
        return plugin.call(_HOOK, **arguments)
    except PluginError as error:
        refusal = error.__cause__
        if not isinstance(refusal, UsageError) or _of_the_engine(refusal):
            raise
        raise refusal from None


def _of_the_engine(error: BaseException) -> bool:
    """Return whether the engine raised an error, at what the plugin did, and not the plugin."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals["__name__"]).startswith("neuroal.")


def _checked(plugin: Plugin, result: object) -> dict[str, Any]:
    """Return what an exporter says, if it is JSON values by name."""
    if not isinstance(result, Mapping) or not all(isinstance(key, str) for key in result):
        kind = type(result).__name__
        raise plugin.error(_HOOK, f"returned {kind}, not a mapping of names to JSON values")
    try:
        json.dumps(dict(result), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise plugin.error(_HOOK, f"returned what is no JSON: {error}") from error
    return dict(result)


def _written(plugin: Plugin, folder: Path) -> dict[str, dict[str, Any]]:
    """Return bytes and SHA-256 of the files in a folder by name."""
    found = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            digest = hashlib.sha256()
            with file.open("rb") as stream:
                while chunk := stream.read(1 << 22):
                    digest.update(chunk)
            name = str(file.relative_to(folder))
            found[name] = {"bytes": file.stat().st_size, "sha256": digest.hexdigest()}
    if not found:
        raise plugin.error(_HOOK, "wrote no file: write into the folder that it is given")
    return found
