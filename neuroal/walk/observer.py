"""What is read while a block runs: statistics of its linears' inputs, or the inputs themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from neuroal.distributed import Team
from neuroal.layout import Block
from neuroal.layout.parts import Place
from neuroal.types import Accumulator
from neuroal.walk.states import BlockRun, GroupInputs, LinearStatistics
from neuroal.walk.statistics import Collector


class EndOfRun(Exception):
    """Ends a block's forward pass once everything that is read has been seen."""


class Observer:
    """Reads the inputs of a block's linears, batch by batch.

    Linears that share an input are a group; the first of them to run reports it for all.

    Attributes:
        counts_now: Says whether the tokens that an expert gets now count; None: all of them do.
    """

    def __init__(
        self,
        block: Block,
        accumulators: Sequence[Accumulator],
        dense: BlockRun | None,
        *,
        output: bool,
        keep_inputs: bool,
        groups: Collection[int] | None = None,
    ) -> None:
        """Prepare to collect; the arguments are those of `Walker.run`."""
        wanted = [a for a in accumulators if dense is not None or not a.compares]
        self.block = block
        self._linears = [x for x in block.linears if groups is None or x.group in groups]
        self.keep_inputs = keep_inputs
        self.counts_now: Callable[[], bool] | None = None
        self._output = output
        self._dense = dense
        self._compares = any(a.compares for a in wanted)
        # Nothing pruned lies before the first group: its statistics are the dense run's.
        shares_first = dense is not None and not self._compares
        self._shared_group = block.linears[0].group if shares_first else None
        self._last_group = self._linears[-1].group
        # Tokens that are routed to experts may have no dense counterpart.
        of_experts = [a for a in wanted if not a.compares]
        self._collectors = {
            x.group: Collector(wanted if x.expert is None else of_experts, x.in_features)
            for x in self._linears
            if accumulators and x.group != self._shared_group
        }
        self._collects = bool(accumulators)
        first_of_groups = {x.group: x for x in reversed(self._linears)}.values()
        self._reporting = {x.place: x for x in first_of_groups}
        self.start_batch(0, 0)

    @property
    def reads(self) -> bool:
        """Return whether the input of any linear has to be read."""
        return bool(self._collectors) or self.keep_inputs or not self._output

    @property
    def collects_experts(self) -> bool:
        """Return whether statistics of experts are collected."""
        return bool(self._collectors) and any(x.expert is not None for x in self._linears)

    def start_batch(self, index: int, windows: int) -> None:
        """Begin batch number `index`, which has `windows` windows."""
        self._windows = windows
        self._runs: Counter[int] = Counter()
        self._inputs: GroupInputs = {}
        compared = self._dense if self._compares else None
        self._dense_inputs = compared.inputs[index] if compared is not None and windows else {}

    def observe(self, place: Place, shape: tuple[int, int], x: Tensor) -> None:
        """See the input `x (..., in)` of a product with the matrix at a place."""
        linear = self._reporting.get(place)
        if linear is None:
            return
        group = linear.group
        collector = self._collectors.get(group)
        if linear.expert is not None:
            if collector is not None and (self.counts_now is None or self.counts_now()):
                _update_routed(collector, x, self._windows)
            self._runs[group] += 1
            return
        x = x.reshape(self._windows, -1, x.shape[-1])  # (windows, tokens, in): some blocks flatten
        if self.keep_inputs:
            self._inputs.setdefault(group, []).append(x)
        if collector is not None:
            dense_inputs = self._dense_inputs
            collector.update(x, dense_inputs[group][self._runs[group]] if dense_inputs else None)
        self._runs[group] += 1
        if not self._output and group == self._last_group:
            raise EndOfRun

    def end_batch(self, device: torch.device) -> GroupInputs:
        """Count the windows for experts without a token too; return the inputs that are kept."""
        for x in self._reporting.values():
            if x.expert is not None and x.group in self._collectors and not self._runs[x.group]:
                no_tokens = torch.zeros((0, x.in_features), device=device)
                _update_routed(self._collectors[x.group], no_tokens, self._windows)
        return self._inputs

    def statistics(self, team: Team) -> LinearStatistics:
        """Return the statistics of all batches, of all processes of a team."""
        of_groups = {group: c.statistics(team) for group, c in self._collectors.items()}
        statistics: LinearStatistics = {}
        for x in self._linears if self._collects else ():
            if self._dense is not None and x.group == self._shared_group:
                statistics[x.name] = self._dense.statistics[x.name]
            else:
                statistics[x.name] = of_groups[x.group]
        return statistics


def _update_routed(collector: Collector, x: Tensor, windows: int) -> None:
    """Add tokens `x (..., in)` of a batch's windows that were routed to an expert.

    Which window a token is from is not known. The tokens are split into equal shares, one a window,
    so that sums over the windows are right, and independent of the batch.
    """
    if x.dim() > 2:  # all tokens in a batched product; those of other experts are zero
        x = x.reshape(-1, x.shape[-1])  # (tokens, in)
        x = x[x.any(dim=-1)]
    for share in torch.tensor_split(x, windows):
        collector.update(share[None])
