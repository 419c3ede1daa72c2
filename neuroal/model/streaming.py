"""A model larger than memory: its blocks come from safetensors shards one at a time.

The model is built without weights. Opening a block loads its weights, by transformers' own
conversion of file tensors to parameters, and closing it frees them. A pruned block is written at
once, as a shard of the output. Outside the blocks, matrices stay in their files (see
`neuroal.model.lazy_matrix`) and everything else is loaded.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from neuroal.errors import NeuroalError, UsageError
from neuroal.layout import Block, Layout, matrices
from neuroal.model import blocks, files, places, pretrained
from neuroal.model.file_names import FileNames
from neuroal.model.files import DTYPES, INDEX, ONE, Shards, open_file
from neuroal.model.lazy_matrix import LazyMatrix, write
from neuroal.model.run_folder import Journal


class Streamed:
    """A model of which one block at a time is in memory.

    Attributes:
        model: Its blocks have no weights unless they are open; matrices outside the blocks are
            read when they are used.
        layout: Its layout.
        streams: True.
    """

    streams = True

    def __init__(
        self, name: str, layout: Layout, device: str, dtype: str, trust_remote_code: bool = False
    ) -> None:
        """Build the model, and load and check what is outside its blocks.

        Args:
            name: Folder of the model.
            layout: Its layout.
            device: That blocks are loaded to.
            dtype: "auto" or that of the weights.
            trust_remote_code: Let the model's own code run.

        Raises:
            NeuroalError: The folder lacks a file or a tensor, or its weights hold NaN or infinity.
        """
        self._shards = Shards(folder_of(name))
        own = pretrained.load_config(name, trust_remote_code).dtype or self._shards.dtype()
        wanted = own if dtype == "auto" else getattr(torch, dtype)
        self.model = pretrained.skeleton(name, trust_remote_code, wanted)
        self.layout = layout
        self._conversion = _Conversion(name, self.model, device)
        self._prefixes = tuple(f"{b.name}." for b in layout.blocks)
        self._names = self._by_block()
        self._refuse_shared(name)
        self._empty = {b.index: dict(self._module(b).named_parameters()) for b in layout.blocks}
        self._checked: set[int] = set()
        self._ahead: threading.Thread | None = None
        self._conversion.load_around(self._around(), self._prefixes)
        blocks.check_finite(self.model, ())

    def _around(self) -> dict[str, Any]:
        """Return the file tensors outside the blocks; matrices stay in their files."""
        tensors = self._shards.slices(self._names[None])
        for name, x in tensors.items():
            dtype, shape = DTYPES.get(x.get_dtype()), x.get_shape()
            span = self._shards.ranges[name]
            floats = dtype is not None and dtype.is_floating_point
            if len(shape) == 2 and dtype is not None and floats and not span.packed:
                tensors[name] = LazyMatrix(span, shape, dtype)
        return tensors

    def _module(self, block: Block) -> nn.Module:
        module: nn.Module = self.model.get_submodule(block.name)
        return module

    def _by_block(self) -> dict[int | None, list[str]]:
        """Return the file tensors of every block, and under None those outside all blocks."""
        owners = dict(zip(self._prefixes, range(len(self._prefixes)), strict=True))
        names: dict[int | None, list[str]] = defaultdict(list)
        for name in self._shards.ranges:
            parameter = self._conversion.parameter(name)
            names[next((i for p, i in owners.items() if parameter.startswith(p)), None)] += [name]
        return names

    def _refuse_shared(self, name: str) -> None:
        """Refuse a block that shares a parameter: it could not be read alone."""
        owners: dict[int, str] = {}
        for own, parameter in self.model.named_parameters(remove_duplicate=False):
            first = owners.setdefault(id(parameter), own)
            block = next((p[:-1] for p in self._prefixes if own.startswith(p)), None)
            if first != own and block is not None:
                raise NeuroalError(
                    f"model '{name}' cannot be read block by block: {block} shares '{first}'"
                )

    # -- one block ---------------------------------------------------------------------------

    @contextmanager
    def open(self, block: Block) -> Iterator[nn.Module]:
        """Load a block's dense weights, and read the next block's files ahead."""
        module = self._module(block)
        try:
            self._load(block, self._shards.slices(self._names[block.index]))
            if block.index not in self._checked:
                blocks.check_finite(module, block.linears, f"{block.name}.")
                self._checked.add(block.index)
            self._read_ahead((block.index + 1) % len(self.layout.blocks))
            yield module
        finally:
            for name, parameter in self._empty[block.index].items():
                owner, _, own = name.rpartition(".")
                setattr(module.get_submodule(owner), own, parameter)

    def _load(self, block: Block, slices: Mapping[str, Any]) -> None:
        self._conversion.load(slices, self._prefixes[block.index])

    def _read_ahead(self, index: int) -> None:
        if self._ahead is None or not self._ahead.is_alive():
            fetch = partial(self._shards.read_ahead, self._names[index])
            self._ahead = threading.Thread(target=fetch, name="read ahead", daemon=True)
            self._ahead.start()

    def restore(self, block: Block, module: nn.Module, journal: Journal) -> bool:
        """Load a block from the shard that an earlier try wrote."""
        file = journal.shard(self._shard(block.index + 1))
        if file is None:
            return False
        with open_file(file) as tensors:
            self._load(block, {name: tensors.get_slice(name) for name in tensors.keys()})  # noqa: SIM118
        return True

    def keep(
        self, block: Block, module: nn.Module, weights: Mapping[str, Tensor], journal: Journal
    ) -> None:
        """Write pruned weights to an open block, and the block to a shard of the output."""
        matrices.write({x.name: x for x in block.linears}, weights, module, block.name)
        state = {f"{block.name}.{name}": t for name, t in module.state_dict().items()}
        tensors = pretrained.file_tensors(self.model, state)
        journal.keep_shard(self._shard(block.index + 1), partial(_save, tensors))

    # -- the whole model ---------------------------------------------------------------------

    def check_finite(self) -> None:
        """Do nothing: a block is checked when it is first opened."""

    def save(self, tokenizer: Any, folder: Path) -> None:
        """Write what is outside the blocks, and the index of all shards."""
        aside = folder / "around"  # `save_pretrained` removes what looks like an earlier shard
        shutil.rmtree(aside, ignore_errors=True)
        state = self.model.state_dict()
        around = {k: v for k, v in state.items() if not k.startswith(self._prefixes)}
        lazy = {k: v for k, v in around.items() if isinstance(v, LazyMatrix)}
        # transformers writes a number in place of each matrix, and so says which are written.
        numbers = {v.source: torch.zeros(1) for v in lazy.values()}
        around |= {k: numbers[v.source] for k, v in lazy.items()}
        pretrained.save(self.model, tokenizer, aside, around)
        named = pretrained.file_tensors(self.model, dict(lazy))
        written = files.load_tensors(aside / ONE)
        write(aside / self._shard(0), {k: named.get(k, v) for k, v in written.items()})
        (aside / ONE).unlink()
        for file in sorted(aside.iterdir()):
            os.replace(file, folder / file.name)
        aside.rmdir()
        index = _index([folder / self._shard(i) for i in range(len(self._prefixes) + 1)])
        files.write_atomically(folder / INDEX, json.dumps(index, indent=2).encode())
        for file in folder.glob("*.safetensors"):  # as in `pretrained.save`
            file.chmod((folder / "config.json").stat().st_mode)

    def _shard(self, number: int) -> str:
        """Return the name of an output shard; 0 is what is outside the blocks."""
        return f"model-{number + 1:05d}-of-{len(self._prefixes) + 1:05d}.safetensors"


def folder_of(name: str) -> Path:
    """Return the folder that a model is streamed from.

    Raises:
        UsageError: It is a hub name.
    """
    folder = Path(places.locate(name))
    if not folder.is_dir():
        raise UsageError(
            f"--stream reads the files of a folder: download '{name}' first (hf download {name} "
            "--local-dir DIR)"
        )
    return folder


def _save(tensors: Mapping[str, Tensor], file: Path) -> None:
    whole = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    save_file(whole, file, metadata={"format": "pt"})


def _index(files: list[Path]) -> dict[str, Any]:
    """Return the index of a sharded checkpoint."""
    names, size = {}, 0
    for file in files:
        for name, span in Shards.header(file).items():
            names[name] = file.name
            size += span.size
    return {"metadata": {"total_size": size}, "weight_map": names}


class _Conversion:
    """Transformers' conversion of file tensors to a model's parameters."""

    def __init__(self, name: str, model: Any, device: str) -> None:
        try:
            from transformers import conversion_mapping, core_model_loading, modeling_utils
        except ImportError as error:
            raise NeuroalError(f"--stream needs transformers 5: {error}") from error
        self._name = name
        self._model = model
        self._code = core_model_loading
        transforms: Any = conversion_mapping.get_model_conversion_mapping(model)
        self._names = FileNames(model)
        self._config = modeling_utils.LoadStateDictConfig(
            device_map={"": torch.device(device)},
            dtype=model.config.dtype,
            dtype_plan=model._get_dtype_plan(model.config.dtype),
            weight_mapping=transforms,
        )

    def parameter(self, tensor: str) -> str:
        """Return the name of the (first) parameter that a file's tensor goes to."""
        return self._names.parameter(tensor)

    def load(self, slices: Mapping[str, Any], prefix: str) -> None:
        """Load file tensors into the parameters that begin with a prefix.

        Raises:
            NeuroalError: One of these is missing, or of another shape.
        """
        info = self._load(slices)
        self._check({key for key in info.missing_keys if key.startswith(prefix)})

    def load_around(self, slices: Mapping[str, Any], blocks: tuple[str, ...]) -> None:
        """Load what is outside the blocks, tie weights, and fill buffers that are in no file."""
        info = self._load(slices)
        info.missing_keys = {k for k in info.missing_keys if not k.startswith(blocks)}
        with pretrained.quiet(), torch.random.fork_rng(devices=[]):
            info = self._model._finalize_model_loading(self._model, self._config, info)
        self._check(info.missing_keys)

    def _load(self, slices: Mapping[str, Any]) -> Any:
        # A slice of a tensor without elements cannot be indexed.
        empty = {
            name: torch.empty(x.get_shape(), dtype=DTYPES.get(x.get_dtype()))
            for name, x in slices.items()
            if not isinstance(x, Tensor) and 0 in x.get_shape()
        }
        with pretrained.quiet():
            info, _ = self._code.convert_and_load_state_dict_in_model(
                model=self._model, state_dict={**slices, **empty}, load_config=self._config
            )
        pretrained.refuse_mismatched(self._name, info.mismatched_keys)
        if info.conversion_errors:
            what, why = next(iter(info.conversion_errors.items()))
            raise NeuroalError(
                f"model '{self._name}' cannot be read block by block: '{what}': {why}"
            )
        return info

    def _check(self, missing: set[str]) -> None:
        lacking = missing.intersection(name for name, _ in self._model.named_parameters())
        if lacking:
            raise NeuroalError(f"model '{self._name}' lacks the weight '{min(lacking)}'")
