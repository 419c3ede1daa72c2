"""A real Chromium opens the report without a word on its console, in light, dark and print."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from neuroal.html_report import write

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--hide-scrollbars", "--enable-logging=stderr"),
)


@pytest.fixture(scope="module")
def page(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("browser") / "report.html"
    write([run, run], out)
    return out


@pytest.fixture
def chromium(tmp_path: Path, run_process: Callable[..., Any]) -> Callable[..., str]:
    """Opens a page and returns what was on the console and on stdout."""
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip(f"no browser here: {', '.join(names)}")

    def browse(page: Path, *flags: str) -> str:
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        command = [program, *FLAGS, profile, *flags, page.as_uri()]
        environment = os.environ | {"HOME": str(tmp_path)}
        done = run_process(command, env=environment)
        assert done.returncode == 0, done.stderr
        console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        assert console == []
        return str(done.stdout)

    return browse


def png_size(file: Path) -> tuple[int, int]:
    head = file.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


@pytest.mark.parametrize("look", ["light", "dark"])
@pytest.mark.parametrize("width", [500, 1280])
def test_screenshot(
    look: str, width: int, page: Path, chromium: Callable[..., str], tmp_path: Path
) -> None:
    picture = tmp_path / "picture.png"
    flags = ["--force-dark-mode"] if look == "dark" else []
    chromium(page, f"--window-size={width},900", f"--screenshot={picture}", *flags)
    assert png_size(picture) == (width, 900)


def test_print(page: Path, chromium: Callable[..., str], tmp_path: Path) -> None:
    chromium(page, f"--print-to-pdf={tmp_path / 'report.pdf'}")
    assert (tmp_path / "report.pdf").read_bytes()[:5] == b"%PDF-"


def test_the_browser_would_say_what_is_wrong(chromium: Callable[..., str], tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text("<script>console.error('here')</script>")
    with pytest.raises(AssertionError, match="here"):
        chromium(bad, "--dump-dom")
