"""Model to blocks, linears and consumers, found by structure and execution.

`find` looks for the list of decoder blocks, runs the model once on a few tokens (or on meta
tensors, without weights) and reads from that run which linears see the same input and in which
order they run. No family name is looked at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from neuroal.errors import NeuroalError

TRACE_TOKENS = 8


@dataclass(frozen=True)
class Linear:
    """One weight matrix of a block.

    Attributes:
        name: Full dotted module name.
        block: Index of its block.
        out_features: Rows of the weight.
        in_features: Columns of the weight.
        group: Index, within the block, of the input it shares with the linears run beside it
            (q, k and v; gate and up); groups count in execution order.
        paired: The linear whose input the paper reads this one's rows from: the first of the next
            group in execution order; None at the end of the model, and where row counts differ
            from the consumer's input (grouped key/value heads: the whole group).
        part: "attention" for the child module of the block that holds the first linear to run,
            "mlp" for the rest.
    """

    name: str
    block: int
    out_features: int
    in_features: int
    group: int
    paired: str | None
    part: Literal["attention", "mlp"] = "mlp"

    @property
    def weights(self) -> int:
        """Return the number of weights."""
        return self.out_features * self.in_features


@dataclass(frozen=True)
class Block:
    """One decoder block: its module name and its linears in execution order."""

    index: int
    name: str
    linears: tuple[Linear, ...]

    @property
    def weights(self) -> int:
        """Return the number of prunable weights."""
        return sum(linear.weights for linear in self.linears)


@dataclass(frozen=True)
class Layout:
    """The blocks of a model, in order."""

    blocks: tuple[Block, ...]

    @cached_property
    def linears(self) -> dict[str, Linear]:
        """Return every linear by name, in execution order."""
        return {linear.name: linear for block in self.blocks for linear in block.linears}

    @property
    def weights(self) -> int:
        """Return the number of prunable weights."""
        return sum(block.weights for block in self.blocks)

    def per_block(self, ratios: Mapping[int, float] | list[float]) -> dict[str, float]:
        """Return a ratio per linear from a ratio per block."""
        return {name: float(ratios[linear.block]) for name, linear in self.linears.items()}


class _Meta(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answers questions about values, which meta tensors do not have, with one."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return True if args[0].dtype == torch.bool else 1
        return func(*args, **(kwargs or {}))


@contextmanager
def _without_autocast(device: torch.device) -> Iterator[None]:
    """Let a model on meta tensors leave `torch.autocast` off, which knows no such device.

    Models of transformers 4 switch it off around their position embeddings.
    """
    original = torch.autocast
    if device.type == "meta":
        torch.autocast = lambda *args, **kwargs: nullcontext()  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        torch.autocast = original  # type: ignore[misc]


@dataclass(frozen=True)
class _Call:
    name: str
    input: Tensor


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return name and list of the decoder blocks.

    Raises:
        NeuroalError: There is no such list, or more than one.
    """
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(outer + ".") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) and not inside:
            if all(_holds_linears(entry) for entry in module):
                found[name] = module
    looked = "looked for one nn.ModuleList whose entries all hold nn.Linear weights"
    if not found:
        raise NeuroalError(f"{type(model).__name__} has no list of decoder blocks: {looked}")
    if len(found) > 1:
        raise NeuroalError(
            f"{type(model).__name__} has several lists of blocks ({', '.join(found)}): {looked}"
        )
    return next(iter(found.items()))


def _holds_linears(entry: nn.Module) -> bool:
    return any(isinstance(m, nn.Linear) for m in entry.modules() if m is not entry)


def find(model: nn.Module) -> Layout:
    """Return the layout of a causal language model, on any device, meta included.

    The model runs once on a few tokens.

    Raises:
        NeuroalError: The structure is unknown; the message says what was looked for.
    """
    list_name, modules = find_blocks(model)
    names = {f"{list_name}.{i}.{n}": i for i, b in enumerate(modules) for n, _ in _linears(b)}
    _refuse_unknown_weights(list_name, modules)
    calls = _execution_order(model, names)
    missing = names.keys() - {c.name for c in calls}
    if missing:
        raise NeuroalError(f"linear {min(missing)} does not run in the model's forward pass")
    groups = list(_groups(calls))
    shapes = {
        f"{list_name}.{i}.{n}": (linear.weight.shape[0], linear.weight.shape[1])
        for i, b in enumerate(modules)
        for n, linear in _linears(b)
    }
    blocks: dict[int, list[Linear]] = {i: [] for i in range(len(modules))}
    for k, group in enumerate(groups):
        block = names[group[0]]
        consumer = groups[k + 1][0] if k + 1 < len(groups) else None
        fits = consumer is not None and all(shapes[n][0] == shapes[consumer][1] for n in group)
        index = blocks[block][-1].group + 1 if blocks[block] else 0
        for name in group:
            first = blocks[block][0].name if blocks[block] else name
            part: Literal["attention", "mlp"] = (
                "attention" if _child(name, list_name) == _child(first, list_name) else "mlp"
            )
            rows, columns = shapes[name]
            paired = consumer if fits else None
            blocks[block].append(Linear(name, block, rows, columns, index, paired, part))
    return Layout(tuple(Block(i, f"{list_name}.{i}", tuple(v)) for i, v in blocks.items()))


def _child(linear: str, list_name: str) -> str:
    """Return the direct child of the block that holds a linear: `self_attn`, `mlp`, `fc1`."""
    return linear.removeprefix(list_name + ".").split(".")[1]


def _linears(block: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear):
            yield name, module


def _refuse_unknown_weights(list_name: str, modules: nn.ModuleList) -> None:
    """Refuse weight matrices that are not the weight of one nn.Linear: they would stay dense."""
    owners: dict[int, str] = {}
    for i, block in enumerate(modules):
        known = {id(linear.weight) for _, linear in _linears(block)}
        for name, linear in _linears(block):
            owner = owners.setdefault(id(linear.weight), f"{list_name}.{i}.{name}")
            if owner != f"{list_name}.{i}.{name}":
                raise NeuroalError(f"{list_name}.{i}.{name} shares its weight with {owner}")
        for name, parameter in block.named_parameters():
            if parameter.dim() >= 2 and id(parameter) not in known:
                raise NeuroalError(
                    f"{list_name}.{i}.{name} {tuple(parameter.shape)} is a weight of unknown "
                    "structure: only nn.Linear weights inside decoder blocks can be pruned"
                )
            if not parameter.is_floating_point():
                raise NeuroalError(f"{list_name}.{i}.{name} is quantised ({parameter.dtype})")


def _execution_order(model: nn.Module, names: Mapping[str, int]) -> list[_Call]:
    calls: list[_Call] = []

    def record(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            calls.append(_Call(name, args[0]))  # holding the tensor keeps its identity unique

        return hook

    handles = [model.get_submodule(n).register_forward_pre_hook(record(n)) for n in names]
    device = next(model.parameters()).device
    try:
        with torch.no_grad(), _without_autocast(device), _Meta():  # type: ignore[no-untyped-call]
            ids = torch.zeros((1, TRACE_TOKENS), dtype=torch.long, device=device)
            model(input_ids=ids, use_cache=False)
    except NeuroalError:
        raise
    except Exception as error:
        raise NeuroalError(
            f"{type(model).__name__} does not run on {TRACE_TOKENS} tokens as a causal language "
            f"model: {type(error).__name__}: {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    repeated = [name for name, times in Counter(c.name for c in calls).items() if times > 1]
    if repeated:
        raise NeuroalError(f"linear {min(repeated)} runs more than once in one forward pass")
    return calls


def _groups(calls: list[_Call]) -> Iterator[list[str]]:
    """Yield runs of consecutive linears that see the same input tensor.

    A parallel MLP sees the attention's input too, but runs after the attention's output
    projection; it is a group of its own, which is how the paper reads execution order.
    """
    group: list[_Call] = []
    for call in calls:
        if group and call.input is not group[0].input:
            yield [c.name for c in group]
            group = []
        group.append(call)
    if group:
        yield [c.name for c in group]
