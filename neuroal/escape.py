"""Text of strangers - names, paths, notes - as a medium shows it, and never as its commands.

HTML is escaped by the templates that write it.
"""

from __future__ import annotations

import re

_NOT_PRINTED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)
_MARKDOWN = re.compile(r"[\\`*|\[\]]")


def terminal(text: str) -> str:
    """Return text whose control characters are written out, as JSON writes them."""
    return _NOT_PRINTED.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def markdown(text: object, code: bool = False) -> str:
    """Return text that Markdown shows as it is, on one line and in a cell of a table.

    Args:
        text: Anything with a text.
        code: Show it as code.
    """
    line = terminal(" ".join(str(text).split()))
    if code:
        return f"`{line.replace('`', chr(39)).replace('|', chr(92) + '|')}`"
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKDOWN.sub(r"\\\g<0>", line)
