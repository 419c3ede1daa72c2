"""Sections laid out as one page; every text is escaped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from neuroal.html_report.drawing import draw
from neuroal.html_report.figure import Figure
from neuroal.html_report.section import Section
from neuroal.progress import bar
from neuroal.units import number
from neuroal.version import __version__


@dataclass(frozen=True)
class _Drawn:
    ident: str
    figure: Figure
    svg: Markup | None


def page(sections: Sequence[Section], title: str | None, progress: bool = False) -> str:
    """Return the HTML of a report.

    Args:
        sections: What it says of each run and study.
        title: Its heading; that of the only section, or `neuroal report`, when None.
        progress: Show a progress bar.
    """
    if title is None:
        title = sections[0].title if len(sections) == 1 else "neuroal report"
    total = sum(len(s.figures) for s in sections)
    shown: list[dict[str, Any]] = []
    with bar(total=total, desc="report", disable=not progress, leave=False) as steps:
        for i, section in enumerate(sections, start=1):
            drawn = []
            for k, figure in enumerate(section.figures, start=1):
                drawn.append(_drawn(figure, f"subject-{i}-figure-{k}"))
                steps.update()
            shown.append({"ident": f"subject-{i}", "content": section, "drawn": drawn})
    environment = Environment(
        loader=PackageLoader("neuroal.html_report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["number"] = _shown
    loader = environment.loader
    assert loader is not None
    style = Markup(loader.get_source(environment, "style.css")[0])
    template = environment.get_template("page.html")
    return template.render(title=title, sections=shown, style=style, version=__version__)


def _drawn(figure: Figure, ident: str) -> _Drawn:
    if figure.spec is None:
        return _Drawn(ident, figure, None)
    # The drawing escapes its own texts.
    return _Drawn(ident, figure, Markup(draw(figure.spec, ident, figure.title, figure.caption)))


def _shown(value: float) -> str:
    """Return a number of a table: whole ones in full, others to six digits."""
    if isinstance(value, int) or (math.isfinite(value) and value == int(value) and value > 1e6):
        return f"{int(value):,}"
    return number(value)
