"""The results folder: `study.json`, and one JSON file a case, written whole or not at all.

`OUT/study.json` says what was asked for and lists the cases; `OUT/cases/ID.json` is what became of
one. A case's file is all there is to a case: remove it, and the case is run again.
"""

from __future__ import annotations

import json
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
    elif out.exists() and any(out.iterdir()):
        raise UsageError(f"'{out}' exists and holds no study: choose another --out")


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
    return {id: _read(file) for id, file in files.items() if file.exists()}


def read_study(folder: Path) -> StudyResults:
    """Read a results folder, finished or not.

    Raises:
        UsageError: It does not hold a study, or a file is broken or of another schema.
    """
    if not (folder / MARKER).is_file():
        raise UsageError(f"'{folder}' is no results folder of a study: it holds no {MARKER}")
    study = _read(folder / MARKER)
    cases = []
    for entry in study["cases"]:
        file = case_file(folder, entry["id"])
        known = _read(file) if file.exists() else {"status": MISSING, "scores": {}}
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
