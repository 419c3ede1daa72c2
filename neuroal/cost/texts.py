"""How large the texts are that a run is evaluated on, as far as that is known before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from neuroal.cost.preparation import Prepared
from neuroal.data.sizes import default_length
from neuroal.data.source import parse_source
from neuroal.data.windows import Windows
from neuroal.evaluation.perplexity import C4_WINDOWS
from neuroal.model import pretrained

_CHARACTERS = {"wikitext2": 1_300_000, "ptb": 450_000}  # of the test splits
_PER_TOKEN = 4  # characters; vocabularies of 30 to 150 thousand tokens come to 3.6 to 4.6


@dataclass(frozen=True)
class TextSize:
    """Windows of a text to be evaluated on.

    Attributes:
        source: Of the text.
        windows: None where they are not known before the text is read.
        length: Tokens of each.
    """

    source: str
    windows: int | None
    length: int

    @classmethod
    def of(cls, windows: Windows) -> TextSize:
        """Return the size of a text that has been cut."""
        count, length = windows.ids.shape
        return cls(windows.source, count, length)


def text_sizes(prepared: Prepared) -> list[TextSize]:
    """Return the sizes of a run's texts; those of the hub are not read for it.

    Raises:
        NeuroalError: One that is at hand cannot be read, or is shorter than one window.
    """
    recipe = prepared.recipe
    context = pretrained.context_length(prepared.model.config)
    length = recipe.evaluate_length or default_length(context)
    sizes = []
    for source in recipe.evaluate:
        if source in prepared.texts:
            sizes.append(TextSize.of(prepared.texts[source]))
            continue
        kind = parse_source(source).kind
        windows = C4_WINDOWS if kind == "c4" else recipe.evaluate_windows
        if kind in _CHARACTERS:
            windows = _CHARACTERS[kind] // _PER_TOKEN // length
        if windows is not None:
            windows = min(windows, recipe.evaluate_windows or windows)
        sizes.append(TextSize(source, windows, length))
    return sizes


def in_longest(texts: Sequence[TextSize]) -> tuple[int, int]:
    """Return texts of known size as windows of the longest length among them, and this length."""
    known = [(t.windows, t.length) for t in texts if t.windows is not None]
    longest = max((length for _, length in known), default=1)
    return -(-sum(n * length for n, length in known) // longest), longest
