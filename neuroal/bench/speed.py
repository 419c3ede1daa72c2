"""How fast a model is, and how large in memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensor


@dataclass(frozen=True)
class Timed:
    """One prompt read and continued.

    Attributes:
        prefill: Seconds for the prompt.
        decode: Seconds for the tokens after it, one by one; None for a model without a cache.
        logits: Of the prompt, `(batch, prompt, vocabulary)`.
    """

    prefill: float
    decode: float | None
    logits: Tensor


@torch.no_grad()
def timed(model: nn.Module, ids: Tensor, prompt: int) -> Timed:
    """Read the first tokens at once and each of the others by itself, with the model's cache.

    Args:
        model: In evaluation mode.
        ids: Tokens, int64 `(batch, prompt + decoded)`, on the model's device.
        prompt: How many are read at once.
    """
    start = _now(ids)
    read = model(ids[:, :prompt], use_cache=True)
    prefill = _now(ids) - start
    logits, cache = read.logits, getattr(read, "past_key_values", None)
    if cache is None:
        return Timed(prefill, None, logits)
    start = _now(ids)
    for step in range(prompt, ids.shape[1]):
        cache = model(ids[:, step : step + 1], past_key_values=cache, use_cache=True)
        cache = cache.past_key_values
    return Timed(prefill, _now(ids) - start, logits)


def memory_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's parameters and buffers; what is shared counts once."""
    storages = {}
    for tensor in (*model.parameters(), *model.buffers()):
        for part in _parts(tensor):
            storage = part.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the strided tensors that one is made of."""
    if isinstance(tensor, SparseSemiStructuredTensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield getattr(tensor, name)
    elif tensor.layout == torch.sparse_csr:
        yield from (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    else:
        yield tensor


def _now(ids: Tensor) -> float:
    """Return the time, when the device is done with what it was given."""
    if ids.device.type == "cuda":
        torch.cuda.synchronize(ids.device)
    elif ids.device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()
