"""Makes the pictures of the tour: `python docs/make_pictures.py`, in about ten minutes.

Prunes the built-in model, runs the study that `neuroal study init` writes, reports both and has
Chromium take the screenshots into docs/assets. Needs neuroal[report] and a program `chromium`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

DOCS = Path(__file__).resolve().parent
NEUROAL = [sys.executable, "-m", "neuroal"]
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--hide-scrollbars",
)
PICTURES = {  # name: page, width, height, dark
    "report-run.png": ("run.html", 1100, 1590, False),
    "report-run-dark.png": ("run.html", 1100, 760, True),
    "report-study.png": ("study.html", 1100, 1600, False),
}


def main() -> None:
    """Make every picture."""
    chromium = shutil.which("chromium") or sys.exit("needs chromium on the path")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _make_reports(folder)
        for picture, (page, width, height, dark) in PICTURES.items():
            command = [chromium, *FLAGS, f"--user-data-dir={folder / picture}.profile"]
            command += [f"--window-size={width},{height}", f"--screenshot={folder / picture}"]
            command += ["--force-dark-mode"] if dark else []
            command.append((folder / page).as_uri())
            subprocess.run(command, check=True, stderr=subprocess.DEVNULL)  # it is talkative
            shutil.copyfile(folder / picture, DOCS / "assets" / picture)
            print(f"docs/assets/{picture}: {(folder / picture).stat().st_size:,} bytes")


def _make_reports(folder: Path) -> None:
    for line in (  # thirteen cases take a few minutes
        "prune demo --sparsity 0.7 --out neuroal --quiet",
        "report neuroal --out run.html",
        "study init study.toml",
        "study run study.toml --out results",
        "report results --out study.html",
    ):
        print(f"neuroal {line}")
        subprocess.run([*NEUROAL, *line.split()], cwd=folder, check=True)


if __name__ == "__main__":
    main()
