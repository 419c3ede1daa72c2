"""One run of the model on a few tokens: which blocks run, and which matrices multiply in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from neuroal.errors import NeuroalError
from neuroal.weights import Place, Products

TRACE_TOKENS = 8


@dataclass(frozen=True, eq=False)
class Event:
    """A matrix that multiplied an input while a block ran.

    Attributes:
        block: The block's module name.
        place: Where the matrix lies.
        shape: `(out, in)`.
        input: `(..., in)`; holding it keeps its address unique.
    """

    block: str
    place: Place
    shape: tuple[int, int]
    input: Tensor

    def renamed(self, parameter: str) -> Event:
        """Return the same event under another name of its parameter."""
        return replace(self, place=replace(self.place, parameter=parameter))

    def same_input(self, other: Event) -> bool:
        """Return whether two matrices multiplied one and the same input."""
        a, b = self.input, other.input
        if a is b:
            return True
        layout = a.shape == b.shape and a.stride() == b.stride()
        start = a.storage_offset() == b.storage_offset()
        return layout and start and a.untyped_storage()._cdata == b.untyped_storage()._cdata


@dataclass
class Trace:
    """What ran, in order: names of blocks (again if they ran again), and their products."""

    runs: list[str] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)


class _Meta(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answers questions about values, which meta tensors do not have.

    A number is one, and every entry of a mask is true: each expert is one that tokens go to.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return True if args[0].dtype == torch.bool else 1
        if func is torch.ops.aten.nonzero.default and args[0].is_meta:
            return torch.ones(args[0].shape, dtype=torch.bool).nonzero()
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


def trace(model: nn.Module, blocks: Mapping[str, nn.Module]) -> Trace:
    """Run a model once on a few tokens.

    Args:
        model: A causal language model, on any device, meta included.
        blocks: What may be its blocks, by module name.

    Raises:
        NeuroalError: It does not run.
    """
    found = Trace()
    inside: list[str] = []

    def enter(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            inside.append(name)
            found.runs.append(name)

        return hook

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        inside.pop()

    def seen(place: Place, shape: tuple[int, int], x: Tensor) -> None:
        if inside:
            found.events.append(Event(inside[-1], place, shape, x))

    handles = [b.register_forward_pre_hook(enter(n)) for n, b in blocks.items()]
    handles += [b.register_forward_hook(leave) for b in blocks.values()]
    device = next(model.parameters()).device
    products = Products(dict(model.named_parameters()), seen)
    try:
        with torch.no_grad(), _without_autocast(device), _Meta(), products:  # type: ignore[no-untyped-call]
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
    return found
