"""Tokenizers of characters, made by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from neuroal.testing import tiny_tokenizer

Make = Callable[..., Any]


@pytest.fixture
def characters() -> Make:
    """Makes a tokenizer of a token a character: `</s>` ends, and `~` begins a text if it `adds`."""

    def make(*, adds: bool = False, bos: str | None = "~", template: str | None = None) -> Any:
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = template
        if bos is not None:
            tokenizer.bos_token = bos
        if adds:
            token = tokenizer.convert_tokens_to_ids("~")
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
                single="~ $A", special_tokens=[("~", token)]
            )
        return tokenizer

    return make
