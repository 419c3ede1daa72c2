"""Runs of tiny models, and a page as a parser sees it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import neuroal
from neuroal import Recipe
from neuroal.testing import tiny_model, windows

VOID = {"link", "meta"}


@dataclass
class Element:
    """One element: its tag, attributes, children, and all the text in it."""

    tag: str
    attributes: dict[str, str]
    children: list[Element] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    def all(self, tag: str) -> list[Element]:
        """Every element below with a tag, in document order."""
        found = []
        for child in self.children:
            found += [child] if child.tag == tag else []
            found += child.all(tag)
        return found

    @property
    def text(self) -> str:
        """All the text, in document order, in single spaces."""
        return " ".join(" ".join(self._words()).split())

    def _words(self) -> list[str]:
        children = iter(self.children)
        return [x if x is not CHILD else " ".join(next(children)._words()) for x in self.texts]


CHILD = "\0child"  # stands, among texts, for the next child


class Reader(HTMLParser):
    """Builds the tree and refuses tags that do not match."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Element("", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {k: v or "" for k, v in attrs})
        self.open[-1].children.append(element)
        self.open[-1].texts.append(CHILD)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> ends <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].texts.append(data)


@pytest.fixture(scope="session")
def read() -> Callable[[Path], Element]:
    """Reads a report."""

    def parse(path: Path) -> Element:
        reader = Reader()
        reader.feed(path.read_text(encoding="utf-8"))
        reader.close()
        assert reader.open == [reader.root]
        return reader.root

    return parse


@pytest.fixture(scope="session")
def prune(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Prunes a tiny model of three blocks and returns the output folder."""
    root = tmp_path_factory.mktemp("runs")

    def run(name: str, **recipe: Any) -> Path:
        asked = Recipe(sparsity=0.6, samples=4, search_samples=2, device="cpu", **recipe)
        model = tiny_model("llama", blocks=3)
        neuroal.prune(model, recipe=asked, windows=windows(4, 16), out=root / name)
        return root / name

    return run


@pytest.fixture(scope="session")
def run(prune: Callable[..., Path]) -> Path:
    """A run with both steps of the search."""
    options = {
        "linear_schedule": {"lambdas": [0.05, 0.1, 0.2]},
        "neuroal": {"lambdas": [0.0, 0.1]},
    }
    return prune("neuroal", options=options, model="some/llama")


@pytest.fixture(scope="session")
def report_of() -> Callable[[Path], dict[str, Any]]:
    """Reads the neuroal.json of a run."""

    def load(folder: Path) -> dict[str, Any]:
        return dict(json.loads((folder / "neuroal.json").read_text(encoding="utf-8")))

    return load
