"""The results folder: `study.json`, and one JSON file a case, written whole or not at all.

`OUT/study.json` says what was asked for and lists the cases; `OUT/cases/ID.json` is what became of
one. A case's file is all there is to a case: remove it, and the case is run again.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import neuroal
from neuroal.errors import UsageError
from neuroal.model.files import write_atomically
from neuroal.model.output import output_folder
from neuroal.study.cases import Expansion, StudyCase
from neuroal.study.file import Study

SCHEMA = 1
MARKER = "study.json"
DONE, FAILED, MISSING = "done", "failed", "missing"
CaseResult = dict[str, Any]
LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class StudyResults:
    """A study and what has become of it so far.

    Attributes:
        folder: The results folder.
        study: The content of `study.json`.
        cases: In the study's order, the content of each case's file with the study's own labels as
            `case`; of a case without a file only id, case, status "missing" and no scores.
    """

    folder: Path
    study: Mapping[str, Any]
    cases: tuple[CaseResult, ...]


def check_folder(out: Path) -> None:
    """Refuse a results folder that cannot be made, or holds something else.

    Raises:
        UsageError: It is a file, holds something else or another schema, or cannot be written.
    """
    output_folder(out, in_place=True)
    if out.exists() and not (out.is_dir() and os.access(out, os.W_OK | os.X_OK)):
        raise UsageError(f"results folder '{out}' is no folder to write in")
    if (out / MARKER).exists():
        _read(out / MARKER)
    elif out.exists() and not _is_begun(out):
        raise UsageError(f"'{out}' exists and holds no study: choose another --out")


def _is_begun(out: Path) -> bool:
    """Return whether a folder holds no more than what a study makes before its `study.json`."""
    begun = {"cases", f"{MARKER}.tmp"}
    return {p.name for p in out.iterdir()} <= begun and not any((out / "cases").glob("*"))


def begin(out: Path, name: str, study: Study, expansion: Expansion) -> None:
    """Write `study.json`; cases of an earlier form of the study stay as they are."""
    (out / "cases").mkdir(parents=True, exist_ok=True)
    content = {
        "schema": SCHEMA,
        "kind": "study",
        "name": name,
        "neuroal": neuroal.__version__,
        "study": asdict(study),
        "cases": [{"id": c.id, "case": dict(c.labels)} for c in expansion.cases],
        "skipped": [{"case": dict(s.labels), "reason": s.reason} for s in expansion.skipped],
    }
    _write(out / MARKER, content)


def write_case(out: Path, result: CaseResult) -> None:
    """Write a case's file, in place of an earlier one."""
    _write(case_file(out, result["id"]), {"schema": SCHEMA, **result})


def case_file(out: Path, id: str) -> Path:
    """Return where a case's file is, or will be."""
    return out / "cases" / f"{id}.json"


def earlier(out: Path, cases: Iterable[StudyCase]) -> dict[str, CaseResult]:
    """Return the files of those cases that are done or have failed, by id."""
    files = {case.id: case_file(out, case.id) for case in cases}
    found = {id: _case(file) for id, file in files.items() if file.exists()}
    return {id: case for id, case in found.items() if case is not None}


def _damage(study: Mapping[str, Any]) -> str | None:
    """Return what is wrong with the content of `study.json`, if anything is."""
    for key, kind in {"name": str, "study": dict, "cases": list, "skipped": list}.items():
        needed = key in ("name", "cases")
        if not isinstance(study.get(key, None if needed else kind()), kind):
            return f"its '{key}' is missing or of a wrong type"
    for entry in (*study["cases"], *study.get("skipped", ())):
        if not isinstance(entry, dict) or not isinstance(entry.get("case"), dict):
            return "an entry of it has no case"
    if not all(isinstance(entry.get("id"), str) for entry in study["cases"]):
        return "a case of it has no id"
    return None


def _case(file: Path) -> CaseResult | None:
    """Return the content of a case's file; None, with a warning, where it is damaged.

    Raises:
        UsageError: It is of another schema.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(data["schema"], int) and data["schema"] != SCHEMA:
            _read(file)
        parts = {"schema": int, "id": str, "status": str, "scores": dict, "case": dict}
        wrong = [key for key, kind in parts.items() if not isinstance(data[key], kind)]
        if not wrong and all(isinstance(x, dict) for x in data["scores"].values()):
            return dict(data)
        why: object = f"its {wrong[0] if wrong else 'scores'} is of a wrong type"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        why = f"it has no {error}" if isinstance(error, KeyError) else error
    LOG.warning("case '%s' is damaged and left out, a run makes it anew: %s", file, why)
    return None


def read_study(folder: Path) -> StudyResults:
    """Read a results folder, finished or not.

    Raises:
        UsageError: It does not hold a study, or a file is broken or of another schema.
    """
    if not (folder / MARKER).is_file():
        raise UsageError(f"'{folder}' is no results folder of a study: it holds no {MARKER}")
    study = _read(folder / MARKER)
    problem = _damage(study)
    if problem:
        raise UsageError(
            f"'{folder / MARKER}' is damaged: {problem}; running the study writes it anew"
        )
    cases = []
    for entry in study["cases"]:
        file = case_file(folder, entry["id"])
        known = (_case(file) if file.exists() else None) or {"status": MISSING, "scores": {}}
        cases.append(known | {"id": entry["id"], "case": entry["case"]})
    return StudyResults(folder, study, tuple(cases))


def _read(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read '{file}': {error}; remove it to go on") from error
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema != SCHEMA:
        raise UsageError(
            f"'{file}' has schema {schema!r:.20}, this neuroal reads {SCHEMA}: "
            "use the neuroal that wrote it, or another --out"
        )
    return dict(data)


def _write(file: Path, content: Mapping[str, Any]) -> None:
    write_atomically(file, json.dumps(content, indent=1, ensure_ascii=False).encode())
