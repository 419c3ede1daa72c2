"""What is measured of a finished run later: kept in its report and on its model card."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neuroal.errors import NeuroalError, UsageError
from neuroal.evaluation import quality
from neuroal.model.files import MARKER, fingerprint, read_report, write_atomically
from neuroal.model.places import locate
from neuroal.run.model_card import CARD, model_card

log = logging.getLogger(__name__)


def run_folder_of(model: str) -> Path | None:
    """Return the folder of the run that a model is the output of; None where it is no run's."""
    folder = Path(locate(model))
    if not (folder / MARKER).is_file():
        return None
    return folder if "linears" in read_report(folder, needed=()) else None


def dense_model(folder: Path, report: Mapping[str, Any]) -> str:
    """Return the model that a run was pruned from.

    Raises:
        UsageError: It is not there, or not what it was, or no folder any more.
    """
    name, recorded = str(report["model"]["name"]), report["model"].get("sha256")
    try:
        found = fingerprint(name)
    except NeuroalError as error:
        raise UsageError(f"the dense model of '{folder}' is not there: {error}") from error
    if recorded not in (None, found):  # a folder that is gone may not be looked for on the hub
        lost = (
            "is not there any more"
            if found is None
            else f"is not what '{folder}' was pruned from any more"
        )
        raise UsageError(f"'{name}' {lost}")
    return name


def keep(
    folder: Path, entry: Mapping[str, Any] | None, zero_shot: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """Keep an evaluation in the report of a run, in place of an earlier one of the same protocol.

    Weights and config stay as they are, and so does the digest of the model. The model card is
    written anew unless someone has changed it.

    Args:
        folder: Of the run.
        entry: Of a text: see `quality.entry`.
        zero_shot: Of tasks: see `ZeroShot.to_json`.

    Returns:
        The report with what was kept; None where the folder cannot be written to, of which a
        warning is logged.
    """
    report = read_report(folder)
    new = dict(report)
    if entry is not None:
        others = [x for x in report.get("evaluation", ()) if not quality.same_text(x, entry)]
        new["evaluation"] = [*others, dict(entry)]
    if zero_shot is not None:
        others = [x for x in report.get("zero_shot", ()) if _asked(x) != _asked(zero_shot)]
        new["zero_shot"] = [*others, dict(zero_shot)]
    return new if _replaced(folder, report, new) else None


def keep_bench(folder: Path, result: Mapping[str, Any]) -> bool:
    """Keep what `neuroal bench` measured in the report of a run, in place of what was alike.

    Returns:
        False where the folder cannot be written to, of which a warning is logged.
    """
    report = read_report(folder)
    others = [x for x in report.get("bench", ()) if _benched(x) != _benched(result)]
    return _replaced(folder, report, report | {"bench": [*others, dict(result)]})


def _replaced(folder: Path, report: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    try:
        replace(folder, report, new)
    except OSError as error:
        log.warning("the result is not kept in '%s': %s", folder, error.strerror or error)
        return False
    return True


def replace(folder: Path, report: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Replace the report of a run by a new one, and its model card unless someone changed that.

    Raises:
        OSError: The folder cannot be written to.
    """
    card = folder / CARD
    ours = (model_card(report), model_card(new))
    if card.is_file() and card.read_text(encoding="utf-8") in ours:
        write_atomically(card, ours[1].encode())
    text = json.dumps(new, indent=1, ensure_ascii=False)
    write_atomically(folder / MARKER, text.encode())


def _asked(zero_shot: Mapping[str, Any]) -> tuple[object, ...]:
    return sorted(zero_shot["tasks"]), zero_shot["limit"], zero_shot["dtype"]


def _benched(result: Mapping[str, Any]) -> tuple[object, ...]:
    where = [result["environment"].get(key) for key in ("platform", "device", "dtype", "threads")]
    return *where, result["batches"], result["prompt"], result["tokens"]
