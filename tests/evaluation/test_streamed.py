"""Losses by blocks that are opened one after the other are those of the model, to the bit."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from neuroal.data.windows import Windows
from neuroal.errors import NeuroalError
from neuroal.evaluation import perplexity as module
from neuroal.evaluation.perplexity import window_losses
from neuroal.evaluation.streamed import streamed_losses
from neuroal.layout import find
from neuroal.testing import tiny_model, windows
from neuroal.walk import Walker


@pytest.mark.parametrize("at_once", [1, 4 * 16, 10**6])
def test_the_losses_are_those_of_the_model(
    structure: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FORWARD_TOKENS", 2 * 16)  # two windows a forward pass
    model = tiny_model(structure)
    text = Windows(windows(7, 16), "random")
    opened: list[str] = []
    layout = find(model)
    plain = Walker(model, layout)

    @contextmanager
    def open_block(block):  # type: ignore[no-untyped-def]
        opened.append(block.name)
        yield model.get_submodule(block.name)

    walker = plain.opening(open_block)
    found = streamed_losses(walker, text, text.ids, at_once)
    assert torch.equal(found, window_losses(model, text, text.ids))
    passes = {1: 4, 4 * 16: 2, 10**6: 1}[at_once]  # a group passes all blocks before the next
    assert opened == [b.name for b in layout.blocks] * passes
    assert (plain.block_runs, walker.block_runs) == (0, 7 * 3)


def test_foreign_tokens_are_refused() -> None:
    model = tiny_model("llama")
    text = Windows(torch.full((1, 4), 97), "foreign")
    with pytest.raises(NeuroalError, match=r"'foreign' has the token id 97, .*vocabulary of 97"):
        streamed_losses(Walker(model, find(model)), text, text.ids, 100)
