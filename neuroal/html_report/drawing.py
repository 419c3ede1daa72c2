"""From a Vega-Lite view to an SVG that takes its colours from the page around it.

Colours are CSS variables, so one drawing serves light, dark and print; what the mouse meets has a
native tooltip; to assistive technology the drawing is one image with a title and a description.
"""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

from neuroal.escape import terminal
from neuroal.html_report.figure import Spec

FONT = "Helvetica Neue, Helvetica, Arial, Liberation Sans, sans-serif"
INK, MUTED, LINE, GRID, PAPER = (f"var(--{x})" for x in ("ink", "muted", "line", "grid", "paper"))
SERIES = tuple(f"var(--series-{i})" for i in range(1, 8))
"""Colours of series, distinguishable with every kind of colour vision (Okabe and Ito 2008)."""
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right")
SCHEME = "cividis"
"""For amounts: even in lightness, the same to every kind of colour vision."""

_LONG = re.compile(r"-?\d*\.\d{3,}")

CONFIG: Spec = {
    "font": FONT,
    "background": None,
    "padding": 2,
    "view": {"stroke": None},
    "axis": {
        **{"domainColor": LINE, "tickColor": LINE, "gridColor": GRID, "labelColor": MUTED},
        **{"titleColor": INK, "labelFontSize": 11, "titleFontSize": 12, "titlePadding": 8},
        **{"titleFontWeight": "normal", "labelPadding": 4, "tickSize": 4, "labelLimit": 240},
        "aria": False,
    },
    "legend": {
        **{"labelColor": INK, "titleColor": INK, "labelFontSize": 11, "titleFontSize": 12},
        **{"titleFontWeight": "normal", "orient": "top", "symbolStrokeWidth": 1.5},
        **{"labelLimit": 240, "columnPadding": 16, "rowPadding": 4, "offset": 12},
        "gradientStrokeColor": LINE,
        "aria": False,
    },
    "header": {
        **{"labelColor": INK, "titleColor": INK, "labelFontSize": 12, "titleFontSize": 12},
        **{"titleFontWeight": "normal", "labelPadding": 6},
    },
    "line": {"strokeWidth": 1.75, "aria": False},
    "area": {"aria": False},
    "rule": {"aria": False},
    "text": {"color": INK, "fontSize": 11, "aria": False},
    "title": {"aria": False},
}


def draw(spec: Spec, ident: str, title: str, description: str) -> str:
    """Return a view as SVG text to stand in a page.

    Args:
        spec: Vega-Lite; a datum's field `text`, where marks describe themselves by it, becomes
            their tooltip.
        ident: Unique in the page: what every id in the drawing begins with.
        title: Its name.
        description: What is to be seen.
    """
    import vl_convert

    config = {**CONFIG, **spec.get("config", {})}
    printed = _printed({**spec, "config": config})
    text = vl_convert.vegalite_to_svg(printed, allowed_base_urls=[])
    root = ElementTree.fromstring(text)
    _bare(root)
    _own_ids(root, ident)
    for element in list(root.iter()):
        _lighten(element)
        _tooltip(element)
    size = {"viewBox": root.get("viewBox", ""), "style": f"--width: {root.get('width')}"}
    root.attrib = {"role": "img", "aria-labelledby": f"{ident}-title {ident}-text", **size}
    for position, (tag, part, words) in enumerate(
        (("title", "title", title), ("desc", "text", description))
    ):
        child = ElementTree.Element(tag, {"id": f"{ident}-{part}"})
        child.text = words
        root.insert(position, child)
    return ElementTree.tostring(root, encoding="unicode")


def _printed(value: Any) -> Any:
    """Return JSON values whose texts have no control characters, which XML cannot hold."""
    if isinstance(value, dict):
        return {key: _printed(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_printed(x) for x in value]
    return terminal(value) if isinstance(value, str) else value


def _bare(root: ElementTree.Element) -> None:
    """Leave the namespaces out, as SVG inside HTML has them."""
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for key in [k for k in element.attrib if "}" in k]:
            element.set(key.rpartition("}")[2], element.attrib.pop(key))


def _own_ids(root: ElementTree.Element, ident: str) -> None:
    """Give ids that are unique in the page, and do not depend on what was drawn before."""
    ids = [e.attrib["id"] for e in root.iter() if "id" in e.attrib]
    new = {old: f"{ident}-{i}" for i, old in enumerate(ids)}
    new |= {f"#{old}": f"#{own}" for old, own in new.items()}
    new |= {f"url({old})": f"url({own})" for old, own in new.items() if old.startswith("#")}
    for element in root.iter():
        for key, value in element.attrib.items():
            element.set(key, new.get(value, value))


def _lighten(element: ElementTree.Element) -> None:
    """Drop what draws nothing, and decimals beyond a hundredth of a pixel."""
    for child in list(element):
        unseen = child.get("class") in ("background", "foreground")
        if unseen and not (child.get("fill") or child.get("stroke")):
            element.remove(child)
    for key in ("d", "transform"):
        if key in element.attrib:
            element.set(key, _LONG.sub(lambda m: f"{float(m[0]):.2f}".rstrip("0").rstrip("."),
                                       element.attrib[key]))  # fmt: skip


def _tooltip(element: ElementTree.Element) -> None:
    """Turn a mark's description into a tooltip, and drop what a single image has no use for."""
    text = element.get("aria-label")
    if text and element.get("aria-roledescription") != "title":
        child = ElementTree.Element("title")
        child.text = text
        element.insert(0, child)
    for key in list(element.attrib):
        if key in ("role", "class", "pointer-events") or key.startswith("aria-"):
            del element.attrib[key]
