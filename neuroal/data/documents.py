"""Rows of text or of conversations as documents: their text, their token ids, their packing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from neuroal.data.conversations import Conversation, check_template, rendered
from neuroal.data.source import Source
from neuroal.errors import NeuroalError


@dataclass(frozen=True, eq=False)
class Documents:
    """The documents of a source.

    Attributes:
        source: Where they come from.
        rows: Texts or conversations, at least one.
        tokenizer: The model's; None where it has none.
        chat: Whether they are conversations.
    """

    source: Source
    rows: Sequence[Any]
    tokenizer: Any
    chat: bool

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def what(self) -> str:
        """Return what messages call them."""
        return "conversations" if self.chat else "documents"

    def text(self, index: int) -> str:
        """Return the text of a document; a conversation's by the model's chat template.

        Raises:
            NeuroalError: The row is neither, or the model has no tokenizer.
        """
        row, where = self.rows[index], f"row {index + 1} of '{self.source.text}'"
        if isinstance(row, Conversation):
            self._check_tokenizer()
            return rendered(row, self.tokenizer, where)
        if not isinstance(row, str):
            raise NeuroalError(f"{where} is {row!r:.40}, not text")
        return row

    def tokens(self, index: int) -> list[int]:
        """Return the token ids of a document, special tokens included."""
        return self.encode(self.text(index))

    def joined(self, separator: str) -> Documents:
        """Return all of them as one document."""
        whole = separator.join(self.text(index) for index in range(len(self)))
        return dataclasses.replace(self, rows=[whole])

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, however long it is, with the tokenizer's special tokens.

        A template has put them into a conversation already.
        """
        self._check_tokenizer()
        # verbose=False: no warning that the text is longer than the model's context.
        options = {"add_special_tokens": False} if self.chat else {}
        return list(self.tokenizer(text, verbose=False, **options)["input_ids"])

    def packed(self, order: Iterable[int], enough: int | None = None) -> tuple[list[int], int]:
        """Join documents in an order, the end-of-sequence token behind each.

        Args:
            order: Their indices.
            enough: Tokens that suffice; None takes all documents.

        Returns:
            At least `enough` tokens if there are as many, and the number of documents they are of.

        Raises:
            NeuroalError: The tokenizer has no such token.
        """
        self._check_tokenizer()
        end: int | None = getattr(self.tokenizer, "eos_token_id", None)
        if end is None:
            raise NeuroalError(
                f"the tokenizer has no end-of-sequence token to join the {self.what} of "
                f"'{self.source.text}' by: give --no-pack-documents"
            )
        tokens: list[int] = []
        used = 0
        for index in order:
            ids = self.tokens(index)
            # A chat template may end with it, and a line end behind it.
            tokens += ids if end in ids[-2:] else [*ids, end]
            used += 1
            if enough is not None and len(tokens) >= enough:
                break
        return tokens, used

    def _check_tokenizer(self) -> None:
        if self.tokenizer is None:
            raise no_tokenizer(self.source)


def no_tokenizer(source: Source) -> NeuroalError:
    """Return the error of a text that nothing makes tokens of."""
    return NeuroalError(
        f"the model has no tokenizer to read '{source.text}' with: give a file of input_ids"
    )


def documents_of(source: Source, rows: Sequence[Any], tokenizer: Any) -> Documents:
    """Return the rows of a source, texts or conversations, as documents.

    Raises:
        NeuroalError: They are conversations, and the model has no chat template.
    """
    first = rows[0]
    if isinstance(first, Conversation) and tokenizer is not None:
        check_template(first, tokenizer, source.text)
    return Documents(source, rows, tokenizer, isinstance(first, Conversation))
