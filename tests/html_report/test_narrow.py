"""On a narrow screen what is wide scrolls by itself, and the page does not."""

import re
from html.parser import HTMLParser
from pathlib import Path

from neuroal.html_report import write

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Boxes(HTMLParser):
    """Collects tables and pictures that are not in a box that scrolls."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[tuple[str, bool]] = []
        self.wide: list[str] = []
        self.seen = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        inside = any(scrolls for _, scrolls in self.open)
        if tag in ("table", "svg"):
            self.seen += 1
            if not inside:
                self.wide.append(tag)
        if tag not in VOID:
            classes = (dict(attrs).get("class") or "").split()
            self.open.append((tag, "scroll" in classes))

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop()[0] != tag:
            pass


def test_tables_and_pictures_stand_in_boxes_that_scroll(run: Path, tmp_path: Path) -> None:
    write([run, run], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    boxes = Boxes()
    boxes.feed(page)
    assert boxes.seen > 10 and boxes.wide == []
    style = page[page.index("<style>") : page.index("</style>")]
    assert re.search(r"\.scroll \{ overflow-x: auto; max-width: 100%; \}", style)
    # No word, and no item of a grid, makes the page wider than the screen.
    assert re.search(r"body \{[^}]*overflow-wrap: anywhere;", style)
    for item in (r"\.facts > div", r"figure", r"\.listings > section", r"\.comparisons > section"):
        assert re.search(rf"^{item} \{{[^}}]*min-width: 0;", style, re.MULTILINE), item
