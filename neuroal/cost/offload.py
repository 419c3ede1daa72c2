"""What a run keeps on the disk: what was asked for, or as much as it takes to fit into memory."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from neuroal.errors import NeuroalError
from neuroal.model import places
from neuroal.model.memory import resident_memory
from neuroal.units import size


@dataclass(frozen=True)
class Offload:
    """What a run keeps on the disk, and reads into memory where it is used.

    Attributes:
        blocks: The model's blocks, read one at a time.
        activations: The inputs and outputs of blocks, read one batch at a time.
    """

    blocks: bool = False
    activations: bool = False


@dataclass(frozen=True)
class Needs:
    """Bytes that a run needs.

    Attributes:
        process: The process with its libraries, what it holds already, and a tokenizer.
        work: Peak memory besides that does not depend on what is on the disk: a block's pruned
            weights, and the computation of a batch.
        weights: The model's weights that are still to be loaded; 0 for a model in memory.
        streamed: The part of them that is in memory where blocks are read one at a time.
        activations: The inputs and outputs of blocks.
        batch: The part of them that is in memory where batches are read one at a time.
        checkpoint: The model's files.
        masks: What masks take that are saved, a bit a weight at most, in memory and on the disk.
        loading: What is in memory beside the weights while they are loaded, and then no more.
    """

    process: int
    work: int
    weights: int
    streamed: int
    activations: int
    batch: int
    checkpoint: int
    masks: int = 0
    loading: int = 0

    def memory(self, offload: Offload) -> int:
        """Return the memory at its peak, the process itself included."""
        weights = self.streamed if offload.blocks else self.weights
        loading = 0 if offload.blocks else self.loading
        held = self.batch if offload.activations else self.activations
        return self.process + weights + max(loading, self.work + held + self.masks)

    def disk(self, offload: Offload) -> int:
        """Return the disk while it runs."""
        # Pruned blocks are in the journal and in the result; streamed ones are written only once.
        files = self.checkpoint if offload.blocks else 2 * self.checkpoint
        # What a long walk has made is kept, to go on from there; and it may be held there anyway.
        return files + self.masks + self.activations * (1 + offload.activations)

    def lack(self, offload: Offload, free: int | None) -> str | None:
        """Return what to say where too little memory is free; None where it is enough."""
        more = self.memory(offload) - resident_memory()
        if free is None or more <= free:
            return None
        if free <= self.process - resident_memory():
            return (
                f"Python and its libraries alone take about {size(self.process)} of memory, "
                f"{size(free + resident_memory())} are available in all"
            )
        return f"the run needs about {size(more)} of memory, {size(free)} are available"

    def choose(self, blocks: bool | None, activations: bool | None, free: int | None) -> Offload:
        """Return what to keep on the disk: no more than it takes to fit into memory, blocks first.

        `blocks` and `activations` are as asked, None where the choice is free. None in place of
        `free` bytes of memory fits everything. Where nothing fits, it is what needs the least.
        """
        ways = [Offload(b, a) for a in _either(activations) for b in _either(blocks)]
        return next((way for way in ways if self.lack(way, free) is None), ways[-1])


def decide(
    needs: Needs, path: str | None, stream: bool | None, spill: bool | None, free: int | None
) -> tuple[Offload, str | None]:
    """Return what a run keeps on the disk, and what to say of it where that was not asked for.

    `path` is the model's, None for one in memory. `stream` keeps blocks on the disk and `spill`
    activations; None does so where they would not fit into the `free` bytes of memory, and None of
    those fits everything.

    Raises:
        NeuroalError: Memory is too small.
    """
    if path is None or (stream is None and not Path(places.locate(path)).is_dir()):
        stream = False
    chosen = needs.choose(stream, spill, free)
    lack = needs.lack(chosen, free)
    if lack is not None and (free or 0) <= needs.process - resident_memory():
        raise NeuroalError(f"{lack}: give more")
    if lack is not None:
        best = needs.choose(False if path is None else None, None, free)
        flags = ["--stream"] if best.blocks and not chosen.blocks else []
        flags += ["--spill"] if best.activations and not chosen.activations else []
        cure = " ".join(flags) or "a smaller --batch or a shorter --length"
        raise NeuroalError(f"{lack}: {cure} needs less")
    said = []
    if chosen.blocks and stream is None:
        said.append("blocks are read from the disk one at a time")
    if chosen.activations and spill is None:
        said.append("activations are held on the disk")
    asked = Offload(bool(stream), bool(spill))
    return chosen, f"{needs.lack(asked, free)}: {', '.join(said)}" if said else None


def activations_folder(out: Path | None) -> Path:
    """Return the folder on whose disk activations are held: that of the output, if any."""
    parents = () if out is None else out.absolute().parents
    temporary = Path(tempfile.gettempdir())
    return next((p for p in parents if os.access(p, os.W_OK)), temporary)


def _either(asked: bool | None) -> tuple[bool, ...]:
    return (False, True) if asked is None else (asked,)
