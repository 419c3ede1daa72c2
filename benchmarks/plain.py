"""What `speed.py` measures against: the published procedure, and the block runs alone.

`published` is NeuroAL with Wanda as its authors describe and publish it, written plainly: one
candidate at a time, one window at a time, every linear observed, full sorts, weights cut and put
back, nothing shared and nothing left out. `floor` runs only the blocks that this search cannot do
without, and computes nothing from them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neuroal import layout
from neuroal.layout import Block, Layout
from neuroal_plugins import density

Ratios = Mapping[str, float | Tensor]
Call = tuple[Tensor, dict[str, Any]]  # hidden state and the block's other arguments


class _Stop(Exception):
    pass


def calls_of(model: nn.Module, ids: Tensor, batch: int, name: str) -> list[Call]:
    """Return what the model gives its first block, per batch of windows."""
    calls: list[Call] = []

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args[0], kwargs))
        raise _Stop

    handle = model.get_submodule(name).register_forward_pre_hook(catch, with_kwargs=True)
    for part in ids.split(batch):
        with contextlib.suppress(_Stop):
            model(input_ids=part, use_cache=False)
    handle.remove()
    return calls


def run(block: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """Return the block's hidden state."""
    output = block(hidden, **kwargs)
    return output if isinstance(output, Tensor) else output[0]


class Published:
    """The published procedure on one model.

    Attributes:
        block_runs: Blocks times windows run so far.
    """

    def __init__(self, model: nn.Module, ids: Tensor, search: int) -> None:
        self.model, self.ids, self.search = model, ids, search
        self.layout: Layout = layout.find(model)
        self.block_runs = 0

    def prune(self, sparsity: float, block_lams: Sequence[float], row_lams: Sequence[float]) -> Any:
        """Search block and row ratios, prune for good, and return both lambdas."""
        blocks = len(self.layout.blocks)
        schedules = {
            lam: self.layout.per_block(density.linear_schedule(blocks, lam, sparsity))
            for lam in block_lams
        }
        block_lam, base, deviation = self._best(schedules)
        rows = {lam: self._row_ratios(lam, base, deviation) for lam in row_lams}
        row_lam, ratios, _ = self._best(rows)
        self._walk(ratios, self.ids, restore=False)
        return block_lam, row_lam

    def _best(self, proposals: Mapping[float, Ratios]) -> tuple[float, Ratios, dict[str, Tensor]]:
        results = {
            lam: self._walk(ratios, self.ids[: self.search], restore=True)
            for lam, ratios in proposals.items()
        }
        lam = min(results, key=lambda x: results[x][0])
        return lam, proposals[lam], results[lam][1]

    def _row_ratios(self, lam: float, base: Ratios, deviation: Mapping[str, Tensor]) -> Ratios:
        ratios: dict[str, float | Tensor] = {}
        for name, x in self.layout.linears.items():
            scores = deviation.get(x.paired or "")
            if scores is None or x.block == len(self.layout.blocks) - 1 or scores.sum() == 0:
                ratios[name] = torch.full((x.out_features,), base[name], dtype=torch.float64)
            else:
                ratios[name] = density.clip_row_ratios(density.spread(scores, lam, base[name]))
        return ratios

    def _walk(self, ratios: Ratios, ids: Tensor, restore: bool) -> tuple[float, dict[str, Tensor]]:
        """Return the misalignment and the deviation of one allocation."""
        hidden = calls_of(self.model, ids, 1, self.layout.blocks[0].name)
        total, deviation = 0.0, {}
        for block in self.layout.blocks:
            module = self.model.get_submodule(block.name)
            dense, _ = self._observe(block, module, hidden)
            saved = {x.name: self._weight(x.name).clone() for x in block.linears}
            for x in block.linears:
                self._cut(x.name, dense[x.name], ratios[x.name])
            pruned, hidden = self._observe(block, module, hidden)
            for x in block.linears:
                a, b = dense[x.name], pruned[x.name]
                total += float((a / a.sum() - b / b.sum()).norm()) / x.in_features
                deviation[x.name] = a - b
                if restore:
                    self._weight(x.name).copy_(saved[x.name])
        return total, deviation

    def _observe(
        self, block: Block, module: nn.Module, calls: list[Call]
    ) -> tuple[dict[str, Tensor], list[Call]]:
        """Run a block window by window; return the input norms of its linears, and its outputs."""
        squares = {x.name: torch.zeros(x.in_features) for x in block.linears}
        seen = dict.fromkeys(squares, 0)

        def hook(name: str) -> Callable[..., None]:
            def observe(_: nn.Module, args: tuple[Tensor, ...], __: Tensor) -> None:
                x = args[0].reshape(-1, args[0].shape[-1]).t().float()  # (in, tokens)
                mean = squares[name].to(x.device)
                mean *= seen[name] / (seen[name] + 1)
                seen[name] += 1
                mean += x.norm(p=2, dim=1) ** 2 / seen[name]
                squares[name] = mean

            return observe

        handles = [self.model.get_submodule(n).register_forward_hook(hook(n)) for n in squares]
        behind = [(run(module, hidden, kwargs), kwargs) for hidden, kwargs in calls]
        for handle in handles:
            handle.remove()
        self.block_runs += len(calls)
        return {n: s.sqrt() for n, s in squares.items()}, behind

    def _weight(self, name: str) -> Tensor:
        return self.model.get_submodule(name).weight.data

    def _cut(self, name: str, norms: Tensor, ratio: float | Tensor) -> None:
        weight = self._weight(name)
        scores, columns = weight.abs().float() * norms, weight.shape[1]
        order = scores.sort(dim=1, descending=isinstance(ratio, Tensor), stable=True).indices
        rank = torch.arange(columns, device=weight.device)
        if isinstance(ratio, Tensor):  # so many of each row's largest stay
            kept = ((1 - ratio) * columns).floor().to(weight.device)
            gone = rank >= kept[:, None]
        else:
            gone = (rank < int(columns * ratio)).expand_as(order)
        weight[torch.zeros_like(gone).scatter_(1, order, gone)] = 0


class Floor:
    """The block runs of our search and of the final pruning, and nothing else.

    Attributes:
        block_runs: Blocks times windows run so far.
    """

    def __init__(self, model: nn.Module, ids: Tensor, search: int, batch: int) -> None:
        self.model, self.ids, self.search, self.batch = model, ids, search, batch
        self.layout = layout.find(model)
        self.block_runs = 0

    def prune(self, candidates: Sequence[int]) -> None:
        """Run the blocks of generations of so many candidates, and of the final pruning."""
        for count in candidates:
            self._walk(self.ids[: self.search], count, observed=True)
        self._walk(self.ids, 1, observed=False)

    def _walk(self, ids: Tensor, candidates: int, observed: bool) -> None:
        start = calls_of(self.model, ids, self.batch, self.layout.blocks[0].name)
        states = [start] * candidates
        for block in self.layout.blocks:
            module = self.model.get_submodule(block.name)
            last = block.index == len(self.layout.blocks) - 1
            for c in range(candidates):
                if c == 0 or block.index:  # the first block's dense run is common to all
                    self._run(block, module, states[c], whole=False)
                if not last:
                    states[c] = self._run(block, module, states[c], whole=True)
                elif observed:
                    self._run(block, module, states[c], whole=False)

    def _run(self, block: Block, module: nn.Module, calls: list[Call], whole: bool) -> list[Call]:
        """Run a block; all of it, or up to the last linear's input."""

        def stop(*_: Any) -> None:
            raise _Stop

        last = self.model.get_submodule(block.linears[-1].name)
        handle = None if whole else last.register_forward_pre_hook(stop)
        behind = []
        for hidden, kwargs in calls:
            self.block_runs += len(hidden)
            with contextlib.suppress(_Stop):
                behind.append((run(module, hidden, kwargs), kwargs))
        if handle is not None:
            handle.remove()
        return behind
