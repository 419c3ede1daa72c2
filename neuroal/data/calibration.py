"""From text, conversations or token rows to calibration windows."""

from __future__ import annotations

import logging
import random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neuroal.data.documents import Documents, documents_of
from neuroal.data.sizes import check_sizes, cure, default_length
from neuroal.data.source import Source, parse_source, read
from neuroal.data.windows import (
    Windows,
    beginning,
    begun,
    holds_tokens,
    on_beginning,
    refuse_packed_tokens,
    token_rows,
    windows_of,
)
from neuroal.errors import NeuroalError
from neuroal.types import Bos

log = logging.getLogger(__name__)


class _Drawn(NamedTuple):
    """Windows, (samples, length), the documents that they come from, and what to know of them."""

    ids: Tensor
    documents: int
    notes: tuple[str, ...]


def calibration_windows(
    source: Source | str,
    tokenizer: Any,
    *,
    samples: int,
    length: int | None = None,
    seed: int = 0,
    bos: Bos = "auto",
    pack_documents: bool | None = None,
    context: int | None = None,
    vocabulary: int | None = None,
    progress: bool = False,
) -> Windows:
    """Take rows of token ids unchanged, or draw random windows of documents.

    Windows are drawn as by the published code of the Wanda family: with one `random.Random(seed)`,
    document indices until a document is longer than `length`, then a start in
    [0, tokens - length - 1]. Of packed documents, windows are consecutive: see `_packed`.

    Args:
        source: A `Source` or its text.
        tokenizer: Called like a tokenizer of transformers; may be None for rows of token ids.
        samples: Number of windows; of rows of token ids, the first ones.
        length: Tokens per window; None is the rows' own, for text the smaller of 2048 and
            `context`.
        seed: Seed of the draws.
        bos: Whether windows begin with the beginning-of-sequence token: see `beginning`. Rows of
            token ids do under "always" alone.
        pack_documents: Whether documents are joined by the end-of-sequence token; None: where they
            are conversations.
        context: Longest window that the model takes, if it has a bound.
        vocabulary: Number of token ids that the model knows; None leaves ids unchecked.
        progress: Show the progress bars of downloads.

    Returns:
        The windows, (samples, length).

    Raises:
        UsageError: `samples` or `length` is out of range, the source text is wrong, or the token of
            `bos` does not exist.
        NeuroalError: The source cannot be read, or holds too little or the wrong thing.
    """
    source = parse_source(source) if isinstance(source, str) else source
    check_sizes(samples, length, context)
    rows = read(source, "train", progress=progress)
    if holds_tokens(rows):
        refuse_packed_tokens(source, pack_documents)
        if len(rows) < samples:
            log.warning("'%s' has %d windows of token ids, not %d", source.text, len(rows), samples)
            samples = len(rows)
        first = beginning(tokenizer, bos) if bos == "always" else None
        ids = begun(token_rows(source, rows, samples, length, context), first)
        told = {"bos": first and first.token, "notes": on_beginning(first, bos)}
        return windows_of(ids, source, vocabulary, **told)
    documents = documents_of(source, rows, tokenizer)
    if source.kind in ("ptb", "wikitext2"):
        documents = documents.joined(" ")
    first = beginning(tokenizer, bos)
    packs = documents.chat if pack_documents is None else pack_documents
    packs = packs and len(documents) > 1
    take = _packed if packs else _draw
    drawn = take(documents, random.Random(seed), samples, length or default_length(context))
    return windows_of(
        begun(drawn.ids, first),
        source,
        vocabulary,
        bos=first and first.token,
        packed=packs,
        documents=drawn.documents,
        notes=(*on_beginning(first, bos), *drawn.notes),
    )


def _draw(documents: Documents, rng: random.Random, samples: int, length: int) -> _Drawn:
    """Draw a document, and a start in it, for every window."""
    long: dict[int, list[int]] = {}  # tokenised once, when first drawn
    short: dict[int, int] = {}  # number of tokens
    drawn: list[list[int]] = []
    while len(drawn) < samples:
        index = rng.randrange(len(documents))
        if index in short:
            continue
        if index not in long:
            tokens = documents.tokens(index)
            if len(tokens) <= length:
                short[index] = len(tokens)
                if len(short) == len(documents):
                    raise _all_too_short(documents, short, length)
                continue
            long[index] = tokens
        tokens = long[index]
        start = rng.randint(0, len(tokens) - length - 1)
        drawn.append(tokens[start : start + length])
    return _Drawn(
        torch.tensor(drawn), len(long), _on_short(documents, len(short), len(long), length)
    )


def _all_too_short(documents: Documents, short: dict[int, int], length: int) -> NeuroalError:
    longest = max(short.values())
    packs = len(short) > 1 and sum(short.values()) >= length
    return NeuroalError(
        f"no document of '{documents.source.text}' is longer than {length} tokens, the longest has "
        f"{longest}: {cure(longest - 1, packs)}"
    )


def _on_short(documents: Documents, short: int, long: int, length: int) -> tuple[str, ...]:
    """Return a note on the documents that no window can come from, if there are any."""
    if not short:
        return ()
    seen = short + long
    some = "" if seen == len(documents) else f" that were drawn (of {len(documents):,})"
    come = f"{long:,} document{'s' if long > 1 else ''}"
    return (
        f"{short:,} of {seen:,} {documents.what}{some} are too short for a window of {length} "
        f"tokens; windows come from {come}: --pack-documents joins short ones",
    )


def _packed(documents: Documents, rng: random.Random, samples: int, length: int) -> _Drawn:
    """Cut windows from documents that are joined in random order, until there are enough.

    Window i begins at token floor(i * (tokens - length) / (samples - 1)), where `tokens` are at
    most samples * length: windows follow one another, and overlap evenly where tokens are fewer.
    """
    order = rng.sample(range(len(documents)), len(documents))
    tokens, used = documents.packed(order, samples * length)
    tokens = tokens[: samples * length]
    if len(tokens) < length:
        raise NeuroalError(
            f"all {len(documents)} {documents.what} of '{documents.source.text}' have "
            f"{len(tokens)} tokens, fewer than one window of {length}: {cure(len(tokens))}"
        )
    spare, gaps = len(tokens) - length, max(samples - 1, 1)
    starts = [i * spare // gaps for i in range(samples)]
    how = "rendered by the model's chat template, " if documents.chat else ""
    end = documents.tokenizer.eos_token
    notes = [
        f"windows come from {used:,} of {len(documents):,} {documents.what}, {how}joined by '{end}'"
    ]
    if len(tokens) < samples * length:
        notes.append(
            f"windows overlap: {samples} of {length} tokens are cut from {len(tokens):,} tokens"
        )
    return _Drawn(torch.tensor([tokens[x : x + length] for x in starts]), used, tuple(notes))
