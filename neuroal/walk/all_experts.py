"""Calibration that shows every token to every expert, and does not change the model's output."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from neuroal.errors import NeuroalError
from neuroal.layout import Block
from neuroal.layout.matrices import local


@contextmanager
def every_expert(block: Block, module: nn.Module) -> Iterator[Callable[[], bool]]:
    """Let the experts of a block run on all tokens before they run on those routed to them.

    Yields:
        Returns whether the first of the two runs now: the one whose inputs statistics are of.

    Raises:
        NeuroalError: The experts are not called with tokens and the experts chosen for each.
    """
    experts = [x for x in block.linears if x.expert is not None]
    showing: list[nn.Module] = []
    shown: set[str] = set()
    owners = {local(x, block.name).rpartition(".")[0] for x in experts}
    # The modules that own experts, and the modules around them.
    names = {name for x in owners for name in accumulate(x.split("."), "{}.{}".format)}
    counts = {
        name: 1 + max(x.expert or 0 for x in experts if local(x, block.name).startswith(f"{name}."))
        for name in names
    }

    def hook(name: str) -> Any:
        def before(owner: nn.Module, args: Any, kwargs: Any) -> None:
            if showing:
                return
            leaves, spec = pytree.tree_flatten((args, kwargs))
            routed = _routed(leaves, counts[name])
            listed = [x for key, x in lists.items() if key.rpartition(".")[0] == name]
            if routed is None and not listed:
                return
            showing.append(owner)
            try:
                if routed is not None:
                    every_args, every_kwargs = pytree.tree_unflatten(routed, spec)
                    owner.forward(*every_args, **every_kwargs)
                else:
                    hidden = next(x for x in leaves if isinstance(x, Tensor))
                    for expert in (x for entries in listed for x in entries):
                        expert(hidden.reshape(-1, hidden.shape[-1]))
            finally:
                showing.pop()
            shown.update(o for o in owners if o == name or o.startswith(f"{name}.") or not name)

        return before

    modules = {name: module.get_submodule(name) for name in sorted(names)}
    lists = {name: x for name, x in modules.items() if isinstance(x, nn.ModuleList)}
    handles = [
        x.register_forward_pre_hook(hook(name), with_kwargs=True) for name, x in modules.items()
    ]
    try:
        yield lambda: bool(showing)
        if owners - shown:
            raise NeuroalError(
                f"the experts of {block.name} are not called with tokens and the experts chosen "
                "for each: --all-experts cannot show them all tokens"
            )
    finally:
        for handle in handles:
            handle.remove()


def _routed(leaves: list[Any], count: int) -> list[Any] | None:
    """Return arguments that route every token to every expert evenly; None if these route none."""
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    chosen = [x for x in tensors if not x.is_floating_point() and x.dim() == 2]
    if len(chosen) != 1 or chosen[0].dtype == torch.bool:
        return None
    shape, tokens = chosen[0].shape, len(chosen[0])
    everyone = torch.arange(count, device=chosen[0].device, dtype=chosen[0].dtype)
    return [
        everyone.expand(tokens, count).contiguous()
        if x is chosen[0]
        else x.new_full((tokens, count), 1 / count)
        if isinstance(x, Tensor) and x.is_floating_point() and x.shape == shape
        else x
        for x in leaves
    ]
