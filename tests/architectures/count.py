"""What there is to prune in a model, and what kind of model it is, found without neuroal.

The count is made from execution alone: every parameter of two or more dimensions that a matrix
multiplication reads inside the model's stacks of blocks.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .tiny import VOCABULARY, architectures

TOLERANCE = 1e-5  # of the largest logit
_PRODUCTS = frozenset(
    [
        "matmul",
        "__matmul__",
        "__rmatmul__",
        "linear",
        "einsum",
        "mm",
        "addmm",
        "bmm",
        "baddbmm",
        "addbmm",
        "mv",
        "addmv",
        "_grouped_mm",
        "grouped_mm",
    ]
)


class _Read:
    """Where the operands of matrix multiplications lie in memory."""

    def __init__(self) -> None:
        self.storages: set[int] = set()

    def note(self, name: str, args: tuple[Any, ...]) -> None:
        if name in _PRODUCTS:
            if name.startswith(("add", "badd")):
                args = args[1:]  # what is added to the product
            tensors = (x for x in pytree.tree_leaves(args) if isinstance(x, Tensor))
            self.storages.update(x.untyped_storage().data_ptr() for x in tensors)


class _Called(TorchFunctionMode):
    """Notes products as the model calls them, before broadcasting copies their operands."""

    def __init__(self, read: _Read) -> None:
        super().__init__()
        self.read = read

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.read.note(getattr(func, "__name__", ""), (*args, *(kwargs or {}).values()))
        return func(*args, **(kwargs or {}))


class _Computed(TorchDispatchMode):
    """Notes products as torch computes them, whatever they were called through."""

    def __init__(self, read: _Read) -> None:
        super().__init__()
        self.read = read

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.read.note(func.name().removeprefix("aten::").split(".")[0], args)
        return func(*args, **(kwargs or {}))


def stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Return every outermost list of modules that hold matrices below them."""
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f + ".") for f in found):
            below = [[p for c in x.children() for p in c.parameters()] for x in module]
            if below and all(any(p.dim() >= 2 for p in ps) for ps in below):
                found[name] = module
    return found


@dataclass(frozen=True)
class Count:
    """The matrices of a model's stacks.

    Attributes:
        matrices: Parameters that a matrix multiplication reads, by name; a shared one once.
        idle: Matrices of entries that run, which tokens alone do not reach.
        towers: Stacks none of whose entries runs on tokens.
    """

    matrices: dict[str, nn.Parameter]
    idle: dict[str, nn.Parameter]
    towers: tuple[str, ...]


def count(model: nn.Module, ids: Tensor) -> Count:
    """Count the matrices of a model's stacks by running it on tokens."""
    ran: set[str] = set()
    handles = [
        entry.register_forward_pre_hook(lambda *_, at=f"{name}.{i}": ran.add(at))
        for name, entries in stacks(model).items()
        for i, entry in enumerate(entries)
    ]
    read = _Read()
    try:
        with torch.no_grad(), _Called(read), _Computed(read):
            model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    matrices, idle = {}, {}
    for name, entries in stacks(model).items():
        for i, entry in enumerate(entries):
            for key, p in entry.named_parameters():
                whole = f"{name}.{i}.{key}"
                if p.dim() < 2 or any(p is q for q in matrices.values()):
                    continue
                owner = entry.get_submodule(key.rpartition(".")[0])
                if p.untyped_storage().data_ptr() in read.storages:
                    matrices[whole] = p
                elif f"{name}.{i}" in ran and isinstance(owner, nn.Linear):
                    idle[whole] = p
    towers = (
        n for n, x in stacks(model).items() if not any(f"{n}.{i}" in ran for i in range(len(x)))
    )
    return Count(matrices, idle, tuple(towers))


def is_half(model_type: str) -> str:
    """Return what an architecture needs from another model; nothing where it stands alone."""
    kind = getattr(transformers, architectures()[model_type])
    if "shared_kv_states" in inspect.signature(kind.forward).parameters:
        return "reads another model's keys and values"
    if CONFIG_MAPPING[model_type]().is_encoder_decoder:
        return "half of an encoder-decoder model"
    return ""


def kind_of(model: nn.Module, counted: Count, ids: Tensor) -> tuple[str, str]:
    """Return what a model that runs on tokens is, and how that shows."""
    if counted.towers:
        return "multimodal", f"tokens do not reach {', '.join(counted.towers)}"
    for name, entries in stacks(model).items():
        for i, entry in enumerate(entries):
            crosses = "encoder_hidden_states" in inspect.signature(entry.forward).parameters
            if crosses and any(k.startswith(f"{name}.{i}.") for k in counted.idle):
                return "encoder-decoder", "blocks attend to an encoder's output"
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] + 1) % (VOCABULARY - 4)
    with torch.no_grad():
        one = model(input_ids=ids, use_cache=False).logits
        two = model(input_ids=changed, use_cache=False).logits
    if not close(one[:, :-1], two[:, :-1]):
        return "encoder", "a token's logits depend on the tokens after it"
    return "decoder", ""


def close(a: Tensor, b: Tensor) -> bool:
    scale = max(1.0, float(b.abs().max()))
    return a.shape == b.shape and bool((a - b).abs().max() <= TOLERANCE * scale)


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits
