"""The masks of a run, noted block by block while it prunes."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from neuroal.layout import Block, matrices
from neuroal.model.blocks import Blocks
from neuroal.model.files import write_atomically
from neuroal.model.run_folder import Journal
from neuroal.pruning import mask_file
from neuroal.pruning.mask_file import Masks

RUN = ("recipe", "recipe_sha256", "environment", "model", "plugins", "data")
"""What of a report goes with its masks."""


class WithMasks:
    """The blocks of a model, whose masks are noted when pruned weights are written to them.

    A weight that is 0 is masked, whether the pruner or the model itself has made it so.

    Attributes:
        model: As of the blocks.
        layout: As of the blocks.
        streams: As of the blocks.
        packed: The masks so far.
    """

    def __init__(self, blocks: Blocks, pruned: frozenset[str]) -> None:
        """Take the blocks, and the names of the linears that are pruned."""
        self._blocks = blocks
        self._pruned = pruned
        self.model = blocks.model
        self.layout = blocks.layout
        self.streams = blocks.streams
        self.packed: dict[str, Tensor] = {}

    def open(self, block: Block) -> AbstractContextManager[nn.Module]:
        """Give a block's module."""
        return self._blocks.open(block)

    def restore(self, block: Block, module: nn.Module, journal: Journal) -> bool:
        """Write an earlier try's pruned weights to an open block, and note their masks."""
        there = self._blocks.restore(block, module, journal)
        if there:
            self._note(block, module)
        return there

    def keep(
        self, block: Block, module: nn.Module, weights: Mapping[str, Tensor], journal: Journal
    ) -> None:
        """Write pruned weights to an open block, and note their masks."""
        self._blocks.keep(block, module, weights, journal)
        self._note(block, module)

    def _note(self, block: Block, module: nn.Module) -> None:
        for x in block.linears:
            if x.name in self._pruned:
                self.packed[x.name] = mask_file.pack(matrices.weight(x, module, block.name) == 0)

    def check_finite(self) -> None:
        """Refuse weights with NaN or infinity."""
        self._blocks.check_finite()

    def save(self, tokenizer: Any, folder: Path) -> None:
        """Write the pruned model as an ordinary checkpoint."""
        self._blocks.save(tokenizer, folder)

    def write(self, folder: Path, report: Mapping[str, Any]) -> str:
        """Write the masks with what a report says of their run; return a note on them."""
        shapes = {n: (x.out_features, x.in_features) for n, x in self.layout.linears.items()}
        own = {n: shapes[n] for n in self.packed}
        masks = Masks(self.packed, own, {key: report[key] for key in RUN})
        write_atomically(folder / mask_file.FILE, mask_file.to_bytes(masks))
        return (
            f"{mask_file.FILE} holds the masks: `neuroal apply MODEL {mask_file.FILE}` puts them "
            "on the dense model"
        )
