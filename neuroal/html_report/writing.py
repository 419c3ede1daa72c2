"""From folders of runs and studies to one HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from neuroal.errors import NeuroalError, UsageError
from neuroal.html_report.section import Section
from neuroal.model.places import similar_folder

HELD = ("neuroal.json", "study.json")  # by the folder of a run, and of a study
LARGEST = 3_000_000  # bytes that a browser opens and a mail takes without a thought


def write(
    paths: Sequence[str | Path],
    out: str | Path,
    *,
    title: str | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> int:
    """Write a report of runs and studies, in the order given.

    Args:
        paths: Folders of runs, `neuroal.json` files, or folders of studies.
        out: The HTML file.
        title: Its heading; the section's own where there is one section.
        overwrite: Replace a file.
        progress: Show a progress bar.

    Returns:
        The size of the file in bytes.

    Raises:
        UsageError: A path holds nothing to report, or `out` cannot be written; nothing was.
        NeuroalError: The extra is not installed.
    """
    target = Path(out)
    check(paths, target, overwrite)
    from neuroal.html_report.page import page
    from neuroal.model import files

    text = page([_section(Path(p)) for p in paths], title, progress).encode()
    files.write_atomically(target, text)
    return len(text)


def check(paths: Sequence[str | Path], out: Path, overwrite: bool) -> None:
    """Refuse what cannot be written before anything is read.

    Raises:
        UsageError: No path is given, one is not there, or `out` cannot be written.
        NeuroalError: The extra is not installed.
    """
    if not paths:
        raise UsageError("nothing to report: give folders of runs or studies")
    for path in paths:
        if not Path(path).exists():
            similar = similar_folder(str(path), HELD)
            meant = f": did you mean '{similar}'?" if similar else ""
            raise UsageError(f"'{path}' does not exist{meant}")
    if out.is_dir():
        raise UsageError(f"'{out}' is a folder: give a file to write, such as --out report.html")
    if out.exists() and not overwrite:
        raise UsageError(f"'{out}' exists: choose another file or add --overwrite")
    if not out.absolute().parent.is_dir():
        raise UsageError(f"'{out}' cannot be written: its folder does not exist")
    try:
        import jinja2  # noqa: F401
        import vl_convert  # noqa: F401
    except ImportError as error:
        raise NeuroalError(f"a report needs {error.name}: pip install 'neuroal[report]'") from error


def _section(path: Path) -> Section:
    from neuroal.html_report.reading import read_run
    from neuroal.html_report.runs import run_section
    from neuroal.html_report.studies import study_section
    from neuroal.study.results import MARKER, read_study

    if (path / MARKER).is_file() or path.name == MARKER:
        return study_section(read_study(path if path.is_dir() else path.parent))
    return run_section(read_run(path))
