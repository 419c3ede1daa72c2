"""From folders to what a report shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from neuroal.errors import UsageError
from neuroal.model import files, report_form
from neuroal.pruning import allocation

_FEW_BLOCKS = 8  # half the page has room for their map


@dataclass(frozen=True, eq=False)
class FinishedRun:
    """One run.

    Attributes:
        name: Its folder's name.
        path: As it was given.
        report: The content of its `neuroal.json`.
        ratios: The ratio of every row, float64 `(1,)` or `(out,)`, by linear; None where only the
            report is at hand.
        weighed: Rows compete for their linear's ratio, weighed by their importance.
    """

    name: str
    path: Path
    report: Mapping[str, Any]
    ratios: Mapping[str, Tensor] | None
    weighed: bool = False


def read_run(path: Path) -> FinishedRun:
    """Return the run in a folder, of a `neuroal.json` alone, or of the file of a study's case.

    Raises:
        UsageError: There is none, or one of another schema.
    """
    folder = path if path.is_dir() else path.parent
    if path.is_dir() and not (path / files.MARKER).is_file():
        raise UsageError(
            f"'{path}' is neither a run (no {files.MARKER}) nor a study (no study.json)"
        )
    report = files.read_report(path, needed=())
    if isinstance(report.get("report"), dict):
        report = report["report"]
    report_form.check_report(path / files.MARKER if path.is_dir() else path, report)
    file = folder / allocation.FILE
    ratios, importance = allocation.load(file) if file.is_file() else (None, {})
    return FinishedRun(folder.resolve().name, path, report, ratios, bool(importance))


def is_wide(run: FinishedRun) -> bool:
    """Return whether the map of its blocks needs the whole width of the page."""
    return len(run.report["blocks"]) > _FEW_BLOCKS


def local(linear: str, report: Mapping[str, Any]) -> tuple[int, str]:
    """Return the block of a linear, and the linear's name within it."""
    for index, block in enumerate(report["blocks"]):
        if linear.startswith(f"{block['name']}."):
            return index, linear.removeprefix(f"{block['name']}.")
    raise UsageError(f"linear '{linear}' of the report is in none of its blocks")
