"""Chat data: the columns that hold it, and from a row to text by the model's own chat template."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from neuroal.errors import NeuroalError

# Looked for in this order, after `input_ids` and `text`.
CHAT_COLUMNS: tuple[tuple[str, ...], ...] = (
    ("messages",),
    ("conversations",),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
)
OPTIONAL = "input"  # what an instruction is about, in data of Alpaca's form
_ROLES = {  # ShareGPT's words for who speaks
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
_WAY_OUT = "put one into the model's folder (chat_template.jinja), or give texts in a column 'text'"


@dataclass(frozen=True)
class Conversation:
    """A row of chat data as it stands in its columns."""

    cells: Mapping[str, Any]


def check_template(conversation: Conversation, tokenizer: Any, source: str) -> None:
    """Raise a `NeuroalError` where there is no template to render the conversations of a source."""
    if not getattr(tokenizer, "chat_template", None):
        columns = ", ".join(conversation.cells)
        raise NeuroalError(
            f"'{source}' holds conversations ({columns}), and the model's tokenizer has no chat "
            f"template to render them by: {_WAY_OUT}"
        )


def rendered(conversation: Conversation, tokenizer: Any, where: str) -> str:
    """Return a conversation as the text that the model's chat template makes of it.

    Args:
        conversation: The row.
        tokenizer: As of transformers, with a chat template: see `check_template`.
        where: What an error calls the row.

    Raises:
        NeuroalError: The row is no conversation, or the template refuses it.
    """
    messages = [dict(message) for message in _messages(conversation, where)]
    if not messages:
        raise NeuroalError(f"{where} is a conversation without messages")
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # jinja2's, or whatever the template's code runs into
        reason = " ".join(str(error).split()) or type(error).__name__
        raise NeuroalError(f"{where} is refused by the model's chat template: {reason}") from error
    return str(text)


def _messages(conversation: Conversation, where: str) -> Iterator[Mapping[str, Any]]:
    cells = conversation.cells
    if "instruction" in cells:  # Alpaca's form (Taori et al. 2023)
        asked = [cells["instruction"], cells.get(OPTIONAL) or None]
        texts = [_text(part, where, "instruction") for part in asked if part is not None]
        yield {"role": "user", "content": "\n\n".join(texts)}
        yield {"role": "assistant", "content": _text(cells["output"], where, "output")}
        return
    if len(cells) == 1:
        ((column, cell),) = cells.items()
        yield from _turns(cell, where, column)
        return
    for (column, cell), role in zip(cells.items(), ("user", "assistant"), strict=True):  # of two
        if isinstance(cell, str):
            yield {"role": role, "content": cell}
        else:  # a prompt or completion may be messages itself
            yield from _turns(cell, where, column)


def _turns(cell: Any, where: str, column: str) -> Iterator[Mapping[str, Any]]:
    if isinstance(cell, Mapping) and all(isinstance(x, list) for x in cell.values()):
        cell = [dict(zip(cell, turn, strict=True)) for turn in zip(*cell.values(), strict=True)]
    if not isinstance(cell, (list, tuple)):
        raise NeuroalError(f"{where} has {cell!r:.40} in column '{column}', not a list of messages")
    for message in cell:
        yield _message(message, where)


def _message(message: Any, where: str) -> Mapping[str, Any]:
    if isinstance(message, Mapping):
        if isinstance(message.get("role"), str):
            return {key: value for key, value in message.items() if value is not None}
        who, text = message.get("from"), message.get("value")
        if isinstance(who, str) and isinstance(text, str):
            if who.lower() not in _ROLES:
                known = ", ".join(_ROLES)
                raise NeuroalError(f"{where} has a message from '{who}', none of {known}")
            return {"role": _ROLES[who.lower()], "content": text}
    raise NeuroalError(
        f"{where} has the message {message!r:.60}: write role and content, or from and value"
    )


def _text(value: Any, where: str, column: str) -> str:
    if not isinstance(value, str):
        raise NeuroalError(f"{where} has {value!r:.40} in column '{column}', not text")
    return value
