"""How far a walk has come, on the disk: what is interrupted goes on from there, to the same bits.

A bookmark is a JSON file that names tensors in files beside it. Every tensor is written once: the
next bookmark of the same walk writes what is new, and the files that it no longer needs go.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from functools import cache
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from neuroal.walk.activations import MakeStore, StoredTensor, is_plain, write_bytes
from neuroal.walk.states import CandidateState

SECONDS = 30.0  # of work that may be lost, as long as one piece of it is shorter
SHARE = 3  # times as long as the last one took to write are at least between two bookmarks

log = logging.getLogger(__name__)


class _CannotKeep(Exception):
    """A value that JSON and tensors cannot hold."""


class Bookmark:
    """Keeps how far one walk has come; without a folder, nothing.

    What is kept is made of states of candidates, tensors, and JSON values; a key may be a tuple.
    """

    def __init__(
        self, folder: Path | None = None, name: str = "", begin: Callable[[], object] = int
    ) -> None:
        """Start the clock.

        Args:
            folder: Of the files, or None.
            name: Of the walk, of which they are made.
            begin: Makes the folder.
        """
        self._folder, self._name, self._begin = folder, name, begin
        self._kept = self._seen = time.perf_counter()
        self._cost = 0.0
        self._number = 0
        self._tensors = WeakIdKeyDictionary()  # to the file's number and the place in it
        self._states = WeakIdKeyDictionary()  # to what is written of them

    @property
    def began(self) -> bool:
        """Return whether something has been kept, now or by an earlier try."""
        return self._number > 0

    def due(self) -> bool:
        """Return whether to keep the place now; to be asked after every piece of work."""
        now = time.perf_counter()
        piece, self._seen = now - self._seen, now
        lost = now - self._kept + piece + self._cost  # if it is the next piece that is interrupted
        return self._folder is not None and lost >= max(SECONDS, SHARE * self._cost)

    def keep(self, value: Any) -> None:
        """Keep a place, in the stead of the last one.

        A disk that is full, or a value of no known kind, ends it with a warning, not the run.
        """
        if self._folder is None:
            return
        start = time.perf_counter()
        self._number += 1
        try:
            self._begin()
            tree, used = self._write(value)
            index = self._folder / f"{self._name}.json"
            partial = index.with_name(f"{index.name}.tmp")
            partial.write_text(json.dumps(tree))
            os.replace(partial, index)
            self._remove(but=used)
        except (OSError, _CannotKeep) as error:
            log.warning("how far the run has come cannot be kept: %s", error)
            self.remove()
            self._folder = None
        self._kept = self._seen = time.perf_counter()
        self._cost = self._kept - start

    def recall(self, make_store: MakeStore, device: torch.device) -> Any:
        """Return what an earlier try kept; None where there is nothing.

        Args:
            make_store: Makes the stores of states.
            device: For tensors that were not on the CPU.
        """
        index = None if self._folder is None else self._folder / f"{self._name}.json"
        if index is None or not index.is_file():
            self._remove(but=frozenset())
            return None
        tree = json.loads(index.read_text())
        self._number = max(self._numbers(), default=0)
        with contextlib.ExitStack() as stack:
            reader = _Reader(self._file, stack, make_store, device, tree["states"])
            return reader.decoded(tree["value"])

    def remove(self) -> None:
        """Remove it, when the walk has ended."""
        if self._folder is not None:
            (self._folder / f"{self._name}.json").unlink(missing_ok=True)
            self._remove(but=frozenset())

    # -- files -------------------------------------------------------------------------------

    def _file(self, number: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{self._name}.{number}.bin"

    def _numbers(self) -> list[int]:
        if self._folder is None or not self._folder.is_dir():
            return []
        return [int(p.suffixes[-2][1:]) for p in self._folder.glob(f"{self._name}.*.bin")]

    def _remove(self, but: frozenset[int]) -> None:
        for number in set(self._numbers()) - but:
            self._file(number).unlink(missing_ok=True)

    def _write(self, value: Any) -> tuple[Mapping[str, Any], frozenset[int]]:
        """Write the tensors that are new; return the tree, and the numbers of the files in it."""
        with FileIO(self._file(self._number), "w") as file:
            writer = _Writer(file, self._number, self._tensors, self._states)
            tree = {"value": writer.encoded(value), "states": writer.states}
        return tree, frozenset(writer.used)


class _Writer:
    """Makes JSON of values, and writes the tensors in them to a file if they are new."""

    def __init__(
        self, file: FileIO, number: int, known: WeakIdKeyDictionary, states: WeakIdKeyDictionary
    ) -> None:
        self.states: list[Any] = []
        self.used: set[int] = set()
        self._file, self._number, self._known, self._known_states = file, number, known, states
        self._places: dict[int, int] = {}  # of states, by address

    def encoded(self, value: Any) -> Any:
        if value is None or type(value) in (bool, int, float, str):
            return value
        if isinstance(value, CandidateState):
            return {"state": self._state(value)}
        if isinstance(value, Tensor):
            dtype = str(value.dtype).removeprefix("torch.")
            return (
                {"tensor": self._tensor(value)}
                if value.numel()
                else {"empty": [dtype, *value.shape]}
            )
        if type(value) in (list, tuple):
            return {type(value).__name__: [self.encoded(x) for x in value]}
        if type(value) is dict:
            return {"dict": [[self.encoded(k), self.encoded(x)] for k, x in value.items()]}
        raise _CannotKeep(f"a {type(value).__name__} passes between the blocks")

    def _state(self, state: CandidateState) -> int:
        place = self._places.get(id(state))
        if place is None:
            if state not in self._known_states:
                outputs = [self.encoded(x) for x in state.outputs]
                self._known_states[state] = {"outputs": outputs, "w": self.encoded(state.weights)}
            place = self._places[id(state)] = len(self.states)
            self.states.append(self._known_states[state])
            self.used |= _files(self._known_states[state])
        return place

    def _tensor(self, x: Tensor) -> list[Any]:
        if x not in self._known:
            if not is_plain(x):
                raise _CannotKeep(f"a tensor of the kind {type(x).__name__} passes between blocks")
            stored, data = StoredTensor.of(x, self._file.tell())
            write_bytes(self._file, data)
            dtype, on_cpu = str(x.dtype).removeprefix("torch."), x.device.type == "cpu"
            layout = [list(stored.shape), list(stored.stride), stored.offset]
            self._known[x] = [self._number, stored.start, stored.size, dtype, on_cpu, *layout]
        self.used.add(self._known[x][0])
        known: list[Any] = self._known[x]
        return known


def _files(tree: Any) -> set[int]:
    """Return the numbers of the files that a tree has tensors in."""
    if isinstance(tree, dict) and "tensor" in tree:
        return {tree["tensor"][0]}
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return set().union(*map(_files, parts))


class _Reader:
    """Makes values of what `_Writer` has made."""

    def __init__(
        self,
        file: Callable[[int], Path],
        stack: contextlib.ExitStack,
        make_store: MakeStore,
        device: torch.device,
        states: list[Any],
    ) -> None:
        self._open = cache(lambda number: stack.enter_context(FileIO(file(number))))
        self._make_store, self._device, self._trees = make_store, device, states
        self._states: dict[int, CandidateState] = {}

    def decoded(self, tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        ((kind, value),) = tree.items()
        if kind == "state":
            return self._state(value)
        if kind == "tensor":
            return self._tensor(*value)
        if kind == "empty":
            return torch.empty(value[1:], dtype=getattr(torch, value[0]), device=self._device)
        if kind == "dict":
            return {self.decoded(k): self.decoded(x) for k, x in value}
        items = [self.decoded(x) for x in value]
        return tuple(items) if kind == "tuple" else items

    def _state(self, place: int) -> CandidateState:
        if place not in self._states:
            tree = self._trees[place]
            outputs = self._make_store()
            for batch in tree["outputs"]:
                outputs.append(self.decoded(batch))
            self._states[place] = CandidateState(outputs, self.decoded(tree["w"]))
        return self._states[place]

    def _tensor(
        self,
        number: int,
        start: int,
        size: int,
        dtype: str,
        on_cpu: bool,
        shape: list[int],
        stride: list[int],
        offset: int,
    ) -> Tensor:
        device = torch.device("cpu") if on_cpu else self._device
        kind: torch.dtype = getattr(torch, dtype)
        layout = torch.Size(shape), tuple(stride), offset
        return StoredTensor(start, size, kind, device, *layout).read(self._open(number))
