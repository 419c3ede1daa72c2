"""A model whose blocks are opened one by one; all in memory here, from its files in `streaming`."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from neuroal.errors import NeuroalError
from neuroal.layout import Block, Layout, Linear, matrices
from neuroal.model import blocks, pretrained
from neuroal.model.lazy_matrix import parts
from neuroal.model.run_folder import Journal

_AT_ONCE = 1 << 20  # numbers that are checked together, which takes several copies of them


class Blocks(Protocol):
    """A model whose blocks are opened one by one.

    Attributes:
        model: In evaluation mode; its modules outside the blocks can be used at any time.
        layout: Its layout.
        streams: Whether a block is in memory only while it is open.
    """

    model: nn.Module
    layout: Layout
    streams: bool

    def open(self, block: Block) -> AbstractContextManager[nn.Module]:
        """Give a block's module, with its weights in memory until the context ends."""

    def restore(self, block: Block, module: nn.Module, journal: Journal) -> bool:
        """Write an earlier try's pruned weights to an open block; False if there are none."""

    def keep(
        self, block: Block, module: nn.Module, weights: Mapping[str, Tensor], journal: Journal
    ) -> None:
        """Write pruned weights by linear name to an open block, and keep them for a later try."""

    def check_finite(self) -> None:
        """Refuse weights with NaN or infinity.

        Raises:
            NeuroalError: Names the first such linear or parameter.
        """

    def save(self, tokenizer: Any, folder: Path) -> None:
        """Write the pruned model as an ordinary checkpoint; `keep` may have written some of it."""


@dataclass
class InMemory:
    """A model with all its blocks in memory."""

    model: nn.Module
    layout: Layout
    streams: bool = False

    @contextmanager
    def open(self, block: Block) -> Iterator[nn.Module]:
        """Give a block's module, which is in memory already."""
        yield self.model.get_submodule(block.name)

    def restore(self, block: Block, module: nn.Module, journal: Journal) -> bool:
        """Copy a block's weights from the journal."""
        weights = journal.block(block.index)
        if weights is not None:
            self._write(block, module, weights)
        return weights is not None

    def keep(
        self, block: Block, module: nn.Module, weights: Mapping[str, Tensor], journal: Journal
    ) -> None:
        """Copy a block's weights into the model and the journal."""
        journal.keep_block(block.index, weights)
        self._write(block, module, weights)

    def _write(self, block: Block, module: nn.Module, weights: Mapping[str, Tensor]) -> None:
        matrices.write({x.name: x for x in block.linears}, weights, module, block.name)

    def check_finite(self) -> None:
        """Check every weight."""
        blocks.check_finite(self.model, self.layout.linears.values())

    def save(self, tokenizer: Any, folder: Path) -> None:
        """Write the whole model."""
        if folder.exists():
            shutil.rmtree(folder)
        pretrained.save(self.model, tokenizer, folder)


def state_sha256(model: nn.Module) -> str:
    """Return the SHA-256 over names, dtypes, shapes and bytes of a model's state dict."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_finite(module: nn.Module, linears: Iterable[Linear], prefix: str = "") -> None:
    """Refuse NaN and infinity in the weights of linears and in all other parameters.

    Args:
        module: A model, or one of its blocks; parameters on the meta device are not checked.
        linears: Its linears.
        prefix: What precedes its parameters' names in the model, with the dot.

    Raises:
        NeuroalError: Names the first such linear, else the first such parameter.
    """
    linear_names = {x.place.parameter: f"linear '{x.name}'" for x in linears}
    named = module.named_parameters(remove_duplicate=False)
    parameters = {f"{prefix}{name}": p for name, p in named if not p.is_meta}
    names = [*linear_names, *sorted(parameters.keys() - linear_names.keys())]
    finite = [_finite(parameters[name]) for name in names]
    if finite and not bool(torch.stack(finite).all()):  # the device is waited for once
        name = next(n for n, holds in zip(names, finite, strict=True) if not holds)
        raise NeuroalError(f"weight of {linear_names.get(name, repr(name))} holds NaN or infinity")


def _finite(values: Tensor) -> Tensor:
    """Return whether all values are finite, 0-d bool, a part at a time."""
    few = (x for part in parts(values) for x in torch.split(part.view(-1), _AT_ONCE))
    found = [torch.isfinite(x).all() for x in few]
    return torch.stack(found).all() if found else values.new_ones((), dtype=torch.bool)
