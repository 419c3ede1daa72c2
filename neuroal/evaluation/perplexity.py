"""Perplexity of a causal language model on consecutive windows of a text.

The protocol of the Wanda family: the test text is joined, tokenised once and cut into windows;
perplexity is exp of the mean over windows of the mean next-token cross-entropy in the window.
Windows may begin with the beginning-of-sequence token, which is never predicted.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from neuroal.data import sizes
from neuroal.data import windows as cutting
from neuroal.data.documents import Documents, documents_of
from neuroal.data.source import Source, origin, parse_source, read
from neuroal.data.windows import Beginning, Windows, beginning
from neuroal.errors import NeuroalError, UsageError, overflows
from neuroal.model import pretrained
from neuroal.progress import bar
from neuroal.types import Bos

LOG = logging.getLogger(__name__)

C4_DOCUMENTS, C4_WINDOWS = 1100, 256
FORWARD_TOKENS = 2048
LOGITS_BYTES = 256 * 2**20
MEAN = "exp of the mean over windows of the mean next-token cross-entropy in each"


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and what it was measured on.

    Attributes:
        perplexity: In [1, inf]; NaN where the model's outputs are.
        windows: How many windows were read.
        length: Tokens per window, of which all but the first are predicted.
        data: Source of the text, as it was given.
        sha256: Of the token ids: see `Windows`.
        dtype: In which the model computes; the loss is taken in float32.
        protocol: How the windows were taken from the data, and the mean that is taken.
        reason: Why the perplexity is no finite number; empty where it is one.
        bos: The beginning-of-sequence token in front of every window; None if none was put there.
    """

    perplexity: float
    windows: int
    length: int
    data: str
    sha256: str
    dtype: str
    protocol: str
    reason: str = ""
    bos: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return JSON values; a perplexity that is not finite becomes "inf" or "nan"."""
        values = asdict(self)
        if not math.isfinite(self.perplexity):
            values["perplexity"] = str(self.perplexity)  # float() reads both back
        else:
            del values["reason"]
        return values


def perplexity(
    model: nn.Module, windows: Windows, *, batch: int | None = None, progress: bool = False
) -> Perplexity:
    """Measure the perplexity of a model in memory.

    Args:
        model: A causal language model of transformers, on any device and in any dtype.
        windows: Token windows, (windows, length), length at least 2.
        batch: Windows per forward pass; None is as many as hold 2048 tokens and 256 MiB of
            logits, at least one.
        progress: Show a bar.

    Returns:
        The perplexity with its protocol.

    Raises:
        UsageError: `batch` is less than 1.
        NeuroalError: A token id is beyond the model's vocabulary.
    """
    losses = window_losses(model, windows, windows.ids, batch=batch, progress=progress)
    return of_losses(losses, windows, model)


def of_losses(losses: Tensor, windows: Windows, model: nn.Module) -> Perplexity:
    """Return the perplexity of windows by their cross-entropies `(windows,)` from a model."""
    count, length = windows.ids.shape
    mean = float(losses.double().mean())
    value = math.exp(mean) if not mean > 709 else math.inf
    reason = "" if math.isfinite(value) else _reason(model, mean)
    if reason:
        LOG.warning("the perplexity on '%s' is %s: %s", windows.source, value, reason)
    return Perplexity(
        perplexity=value,
        windows=count,
        length=length,
        data=windows.source,
        sha256=windows.sha256,
        dtype=str(embedding_of(model).dtype).removeprefix("torch."),
        protocol="; ".join(filter(None, (windows.protocol, MEAN))),
        reason=reason,
        bos=windows.bos,
    )


def _reason(model: nn.Module, mean: float) -> str:
    """Return why a perplexity is not finite, given the mean loss: NaN where the logits are not."""
    if not math.isnan(mean):
        return f"the mean cross-entropy of {mean:g} is beyond what exp can give"
    named = [(name, x) for name, x in model.named_parameters() if not x.is_meta]
    broken = next((n for n, x in named if not bool(x.isfinite().all())), None)
    if broken is not None:
        return f"'{broken}' holds NaN or infinity"
    dtype = next(x.dtype for _, x in named if x.is_floating_point())
    return overflows("the logits are", str(dtype).removeprefix("torch."))


def window_losses(
    model: nn.Module,
    windows: Windows,
    ids: Tensor,
    *,
    batch: int | None = None,
    progress: bool = False,
) -> Tensor:
    """Return the mean next-token cross-entropy of each window by a model in memory.

    Args:
        model: As in `perplexity`, and so are the errors.
        windows: What the windows are from.
        ids: Those to measure, all or some of them, int64 `(windows, length)`.
        batch: As in `perplexity`.
        progress: Show a bar.

    Returns:
        float32 `(windows,)` on the CPU.
    """
    if batch is not None and batch < 1:
        raise UsageError(f"batch {batch} is not a positive number")
    embedding = embedding_of(model)
    check_vocabulary(windows, len(embedding))
    losses = [torch.empty(0)]
    with torch.no_grad(), evaluating(model), window_bar(len(ids), progress) as shown:
        for part in torch.split(ids, batch or forward_windows(ids.shape[1], len(embedding))):
            tokens = part.to(embedding.device)
            logits = model(input_ids=tokens, use_cache=False).logits  # (batch, length, vocabulary)
            losses.append(cross_entropy(logits, tokens).cpu())
            shown.update(len(part))
    return torch.cat(losses)


def embedding_of(model: nn.Module) -> Tensor:
    """Return a model's embedding `(vocabulary, hidden)`."""
    embedding: Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
    return embedding


def check_vocabulary(windows: Windows, vocabulary: int) -> None:
    """Refuse windows with a token id that a model does not know.

    Raises:
        NeuroalError: There is one.
    """
    if int(windows.ids.max()) >= vocabulary:
        raise NeuroalError(
            f"'{windows.source}' has the token id {int(windows.ids.max())}, beyond the model's "
            f"vocabulary of {vocabulary}: tokens and model do not belong together"
        )


def forward_windows(length: int, vocabulary: int) -> int:
    """Return how many windows go through a model together if nothing else is asked for."""
    return max(1, min(FORWARD_TOKENS, LOGITS_BYTES // (4 * vocabulary)) // length)


def window_bar(total: int, progress: bool) -> tqdm[Any]:
    """Return a bar that counts windows; as an inner bar it is erased at its end."""
    return bar(
        early=True,
        total=total,
        desc="perplexity",
        unit="window",
        leave=None,
        disable=not progress,
    )


def cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the mean next-token cross-entropy of each window, in float32: (batch,).

    It is NaN where the logits are not finite.
    """
    rows = max(1, LOGITS_BYTES // (4 * logits.shape[-1]))  # tokens in float32 at a time
    losses = []
    for window, targets in zip(logits[:, :-1], tokens[:, 1:].to(logits.device), strict=True):
        sums = [
            functional.cross_entropy(scores.float(), wanted, reduction="sum")
            for scores, wanted in zip(
                torch.split(window, rows), torch.split(targets, rows), strict=True
            )
        ]
        losses.append(torch.stack(sums).sum() / len(targets))
    found = torch.stack(losses)
    if not bool(found.isfinite().all()):
        found = found.where(logits.isfinite().flatten(1).all(dim=1), torch.nan)
    return found


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every part of a model into evaluation mode, and back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def evaluation_windows(
    source: Source | str,
    tokenizer: Any,
    *,
    length: int | None = None,
    windows: int | None = None,
    bos: Bos = "auto",
    pack_documents: bool | None = None,
    context: int | None = None,
    vocabulary: int | None = None,
    progress: bool = False,
) -> Windows:
    """Cut the test text, tokenised once, into consecutive windows, and drop the rest.

    Args:
        source: A `Source` or its text; rows of token ids are used unchanged.
        tokenizer: As in `calibration_windows`.
        length: Tokens per window, with the one of `bos`; None is the rows' own, for text the
            smaller of 2048 and `context`.
        windows: At most this many windows, from the first; None is all of them (256 of c4).
        bos: As in `calibration_windows`.
        pack_documents: Whether documents are tokenised one by one and joined by the end-of-sequence
            token; None: where they are conversations.
        context: Longest window that the model takes, if it has a bound.
        vocabulary: Number of token ids that the model knows; None leaves ids unchecked.
        progress: Show the bars of a download.

    Returns:
        The windows, (at most `windows`, length).

    Raises:
        UsageError: `windows` or `length` is out of range, the source text is wrong, or the token of
            `bos` does not exist.
        NeuroalError: The source cannot be read, or is shorter than one window.
    """
    source = parse_source(source) if isinstance(source, str) else source
    sizes.check_sizes(windows, length, context)
    rows = read(source, "test", progress=progress)
    if cutting.holds_tokens(rows):
        cutting.refuse_packed_tokens(source, pack_documents)
        first = beginning(tokenizer, bos) if bos == "always" else None
        count = min(windows or len(rows), len(rows))
        ids = cutting.begun(cutting.token_rows(source, rows, count, length, context), first)
        how, documents, packs = "rows of token ids as they stand", None, False
    else:
        first = beginning(tokenizer, bos)
        length = length or sizes.default_length(context)
        texts, separator = _joining(source, rows, tokenizer)
        packs = texts.chat if pack_documents is None else pack_documents
        most = windows or (C4_WINDOWS if source.kind == "c4" else None)
        enough = None if most is None or not packs else most * length
        tokens, documents, how = _tokens(texts, separator, packs, enough)
        cut = cutting.consecutive(tokens, length, first, most)
        if not cut:
            raise NeuroalError(
                f"the text of '{source.text}' has {len(tokens)} tokens, fewer than one window of "
                f"{length}: {sizes.cure(len(tokens))}"
            )
        ids = torch.tensor(cut)
        how += ", cut into consecutive windows"
    if windows is not None and windows > len(ids):
        LOG.warning("'%s' has %d windows, not %d: all are used", source.text, len(ids), windows)
    return cutting.windows_of(
        ids,
        source,
        vocabulary,
        protocol=f"{origin(source, 'test')}: {how}{_begun(first)}",
        bos=first and first.token,
        packed=packs,
        documents=documents,
    )


def _tokens(
    documents: Documents, separator: str, packs: bool, enough: int | None
) -> tuple[list[int], int, str]:
    """Return the tokens of all documents, or `enough` of packed ones, of how many, and how."""
    what = documents.what + (" rendered by the model's chat template" if documents.chat else "")
    if packs:
        tokens, used = documents.packed(range(len(documents)), enough)
        end = documents.tokenizer.eos_token
        return tokens, used, f"{used} {what}, tokenised one by one and joined by '{end}'"
    count = len(documents)
    whole = "one document" if count == 1 else f"{count} {what} joined by {separator!r}"
    return documents.joined(separator).tokens(0), count, f"{whole}, tokenised once"


def _begun(first: Beginning | None) -> str:
    return "" if first is None else f", each begun with '{first.token}'"


def windows_for(config: Any, source: Source | str, tokenizer: Any, **options: Any) -> Windows:
    """Cut the test text for the model of a configuration; otherwise as `evaluation_windows`."""
    context = pretrained.context_length(config)
    vocabulary = pretrained.vocabulary_size(config)
    return evaluation_windows(source, tokenizer, context=context, vocabulary=vocabulary, **options)


def _joining(source: Source, rows: Any, tokenizer: Any) -> tuple[Documents, str]:
    """Return the documents of a source, and what stands between them."""
    if source.kind == "c4":
        return documents_of(source, rows[:C4_DOCUMENTS], tokenizer), " "
    return documents_of(source, rows, tokenizer), " " if source.kind == "ptb" else "\n\n"
