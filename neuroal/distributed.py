"""Several processes on one run, one per device: how they divide work and exchange results.

`torchrun` starts them and says how many there are. They exchange bytes, and tensors as safetensors,
over gloo, for which CPU memory and any network are enough.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor

from neuroal.errors import NeuroalError, UsageError

T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """The processes of a run; with one process, every call returns at once.

    Attributes:
        rank: Number of this process; only process 0 reads and writes the output folder.
        size: How many there are.
        group: Of `torch.distributed`; None with one process.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    @classmethod
    def join(cls) -> Team:
        """Return the team of all processes that `torchrun` started; without it, of one process."""
        if int(os.environ.get("WORLD_SIZE", 1)) == 1 and not dist.is_initialized():
            return cls()
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        return cls(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo"))

    @property
    def leads(self) -> bool:
        """Return whether this process is the first, which writes."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """Return this process's own device: the n-th GPU for the n-th process on a machine."""
        own = os.environ.get("LOCAL_RANK", "0")
        return f"cuda:{own}" if self.size > 1 and name == "cuda" else name

    def mine(self, items: Sequence[T]) -> Sequence[T]:
        """Return this process's share of items, every `size`-th."""
        return items[self.rank :: self.size]

    def part(self, ids: Tensor) -> Tensor:
        """Return this process's share of windows `(windows, length)`, which are consecutive."""
        return torch.tensor_split(ids, self.size)[self.rank]

    def exchange(self, data: bytes) -> list[bytes]:
        """Return what every process gave, by rank."""
        if self.size == 1:
            return [data]
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(data)]), group=self.group)
        longest = max(int(n) for n in sizes)
        own = torch.zeros(longest, dtype=torch.uint8)
        own[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else own[:0]
        buffers = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(buffers, own, group=self.group)
        pairs = zip(buffers, sizes, strict=True)
        return [x[: int(n)].numpy().tobytes() for x, n in pairs]

    def exchange_tensors(self, tensors: Mapping[str, Tensor]) -> list[Mapping[str, Tensor]]:
        """Return the tensors that every process gave, by rank, on this one's devices."""
        if self.size == 1:
            return [tensors]
        own = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        return [from_safetensors(data) for data in self.exchange(to_safetensors(own))]

    def first(self, work: Callable[[], bytes | None]) -> bytes | None:
        """Return the result of work that only the first process does.

        Raises:
            NeuroalError: The work has failed; every process raises it.
        """
        if self.size == 1:
            return work()
        message, failure = b"", None
        if self.leads:
            try:
                result = work()
                message = b"" if result is None else b"+" + result
            except NeuroalError as error:
                failure = error
                message = (b"!" if isinstance(error, UsageError) else b"-") + str(error).encode()
        message = self.exchange(message)[0]
        if message[:1] in (b"!", b"-"):
            kind = UsageError if message[:1] == b"!" else NeuroalError
            raise failure or kind(message[1:].decode())
        return message[1:] if message else None

    def interleaved(self, shares: Iterable[Sequence[T]]) -> list[T]:
        """Return the items in order from the shares of `mine`, by rank."""
        by_rank = list(shares)
        count = sum(len(x) for x in by_rank)
        return [by_rank[i % self.size][i // self.size] for i in range(count)]


ALONE = Team()
