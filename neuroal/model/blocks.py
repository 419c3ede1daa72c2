"""Where a model's blocks are: all in memory, or one at a time from its files."""

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
from neuroal.layout import Block, Layout, Linear
from neuroal.layout import matrices as matrices
from neuroal.model import blocks, pretrained
from neuroal.model.lazy_matrix import parts
from neuroal.model.run_folder import Journal


class Blocks(Protocol):
    """A model whose blocks are opened one by one.

    Attributes:
        model: In evaluation mode; what stands around the blocks can be used at any time.
        layout: Its layout.
        streams: Whether a block is in memory only while it is open.
    """

    model: nn.Module
    layout: Layout
    streams: bool

    def open(self, block: Block) -> AbstractContextManager[nn.Module]:
        """Hold a block's module with its weights in memory."""

    def restore(self, block: Block, module: nn.Module, journal: Journal) -> bool:
        """Give an open block the pruned weights of an earlier try; False where there are none."""

    def keep(
        self, block: Block, module: nn.Module, weights: Mapping[str, Tensor], journal: Journal
    ) -> None:
        """Give an open block its pruned weights by linear name, and keep them for a later try."""

    def check_finite(self) -> None:
        """Refuse weights with NaN or infinity.

        Raises:
            NeuroalError: Names the first such linear or parameter.
        """

    def save(self, tokenizer: Any, folder: Path) -> None:
        """Write the pruned model as an ordinary checkpoint; blocks may be kept in `folder`."""


@dataclass
class InMemory:
    """A model with all its blocks in memory."""

    model: nn.Module
    layout: Layout
    streams: bool = False

    @contextmanager
    def open(self, block: Block) -> Iterator[nn.Module]:
        """Hold a block, which is there already."""
        yield self.model.get_submodule(block.name)

    def restore(self, block: Block, module: nn.Module, journal: Journal) -> bool:
        """Copy what the journal has of a block."""
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
        """Look through every weight."""
        blocks.check_finite(self.model, self.layout.linears.values())

    def save(self, tokenizer: Any, folder: Path) -> None:
        """Write the model in one go."""
        if folder.exists():
            shutil.rmtree(folder)
        pretrained.save(self.model, tokenizer, folder)


def state_sha256(model: nn.Module) -> str:
    """Return the SHA-256 over names, dtypes, shapes and bytes of everything a model holds."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_finite(module: nn.Module, linears: Iterable[Linear], prefix: str = "") -> None:
    """Refuse weights with NaN or infinity, of linears and of everything around them.

    Args:
        module: A model, or one of its blocks; what it holds on meta is not looked at.
        linears: Its linears.
        prefix: What the names of its parameters lack.

    Raises:
        NeuroalError: Names the first such linear, else the first such parameter.
    """
    known = {x.place.parameter: f"linear '{x.name}'" for x in linears}
    held = module.named_parameters(remove_duplicate=False)
    parameters = {f"{prefix}{name}": p for name, p in held if not p.is_meta}
    for name in [*known, *sorted(parameters.keys() - known.keys())]:
        if not all(bool(torch.isfinite(x).all()) for x in parts(parameters[name])):
            what = known.get(name, f"'{name}'")
            raise NeuroalError(f"weight of {what} holds NaN or infinity")
