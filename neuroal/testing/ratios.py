"""What holds for every strategy of block ratios or row ratios, and for those of block ratios."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from neuroal.layout import Layout
from neuroal.plugins import Plugin
from neuroal.pruning.hooks import rng_for
from neuroal.testing import cases
from neuroal.testing.checks import (
    Conformance,
    content,
    devices,
    expect,
    expect_repeatable,
    expect_unchanged,
    situation,
)
from neuroal.testing.search import COSTS, WINDOWS, SearchQuestion, SearchTrace, drive
from neuroal.types import Proposal

FEW = 12  # generations after which most checks have seen enough of a search
SPARSITIES = (0.5, 0.0, 0.3, 0.7, 0.99)
ORDINARY = (0.3, 0.5, 0.7)  # where no ratio has to be clipped


class RatiosConformance(Conformance):
    """The checks of a strategy; see `BlockRatiosConformance` and `RowRatiosConformance`.

    Attributes:
        tolerance: How far the mean ratio of a proposal may be from the budget. The engine shifts
            every proposal that is not a probe onto the budget; one that is further off is not what
            its parameters say.
        generations: Generations after which a search counts as one that never ends.
    """

    tolerance: float = 0.005
    generations: int = 2000

    def test_proposals_cover_every_linear(self, plugin: Any) -> None:
        """Every proposal has a ratio for every linear, and for nothing else."""
        for s, trace in self._searches(plugin):
            for proposal in trace.proposals():
                wrong = sorted(s.layout.linears.keys() ^ dict(proposal.ratios).keys())
                expect(not wrong, f"a proposal lacks or adds '{(wrong or [''])[0]}' ({s.name})")

    def test_ratios_are_ratios(self, plugin: Any) -> None:
        """Ratios are finite, in [0, 1], one number or one per row."""
        for s, trace in self._searches(plugin):
            for proposal in trace.proposals():
                for name in filter(proposal.ratios.__contains__, s.layout.linears):
                    with situation(f"linear '{name}', {s.name}"):
                        _expect_ratio(proposal.ratios[name], s.layout.linears[name].out_features)

    def test_proposals_keep_the_budget(self, plugin: Any) -> None:
        """What is not a probe prunes as much as was asked for, weighted by weights."""
        for s, trace in self._searches(plugin):
            for proposal in trace.proposals(probes=False) if s.ordinary else ():
                if proposal.ratios.keys() != s.layout.linears.keys():
                    continue
                mean = _mean(proposal, s.layout)
                close = not abs(mean - s.mean) > self.tolerance
                told = f"a proposal that is no probe prunes {mean:.4f}, not {s.mean:g} ({s.name})"
                expect(close, told)

    def test_parameters_identify(self, plugin: Any) -> None:
        """Parameters are JSON values, and differ where the proposals of a generation do."""
        for s, trace in self._searches(plugin):
            for generation in trace.generations:
                known: dict[str, list[Any]] = {}
                for proposal in generation.proposals:
                    key = _json(proposal)
                    own = list(content((proposal.ratios, proposal.importance)))
                    same = known.setdefault(key, own) == own
                    expect(same, f"two proposals differ, their parameters do not ({s.name})")

    def test_something_can_win(self, plugin: Any) -> None:
        """A search returns a proposal or has had one measured that is not a probe."""
        for s, trace in self._searches(plugin):
            with situation(s.name):
                _expect_winner(trace)

    def test_search_ends(self, plugin: Any) -> None:
        """A search ends whatever costs it is sent, and closes when the engine closes it."""
        p = self.load(plugin)
        s = next(self.situations(p))
        for name, cost in COSTS.items():
            with situation(f"costs that are {name}"):
                trace = self._search(p, s, cost, FEW if self.quick else self.generations)
                ended = trace.ended or self.quick
                expect(ended, f"has not ended after {self.generations} generations")
                if len(trace.generations) > FEW:
                    _expect_winner(trace)

    def test_search_repeats(self, plugin: Any) -> None:
        """The same question, costs and `rng` have the same proposals."""
        p = self.load(plugin)
        for s in self.situations(p):
            with situation(s.name):
                expect_repeatable(partial(self._said, p, s), p.proposes)

    def test_search_leaves_inputs_alone(self, plugin: Any) -> None:
        """What the search is given is not written to."""
        p = self.load(plugin)
        for s in self.situations(p):
            with situation(s.name):
                expect_unchanged(s.arguments, partial(self._said, p, s), p.proposes)

    def test_block_measurements(self, plugin: Any) -> None:
        """`measure_block` returns tensors by name, and the same ones every time."""
        p = self.load(plugin, "measure_block")
        for name, layout in cases.layouts():
            for kind in cases.BLOCKS:
                with situation(f"{name}, {kind}"):
                    ask = partial(_measure, p, layout, kind)
                    for answer in ask():
                        tensors = all(isinstance(v, Tensor) for v in dict(answer).values())
                        expect(tensors, "measure_block returned what is no tensor")
                    expect_repeatable(ask, "measure_block")

    def test_block_measurements_leave_inputs_alone(self, plugin: Any) -> None:
        """Weights and statistics are not written to."""
        p = self.load(plugin, "measure_block")
        for kind in cases.BLOCKS:
            block = next(cases.layouts())[1].blocks[0]
            weights, statistics = cases.block_data(block, kind, p.required_statistics())
            arguments = {"block": block, "weights": weights, "statistics": statistics}
            with situation(kind):
                expect_unchanged(
                    arguments, partial(p.call, "measure_block", **arguments), "measure_block"
                )

    def test_block_measurements_on_other_devices(self, plugin: Any) -> None:
        """`measure_block` works on a device, and a search on what it returned there."""
        self._search_on_devices(self.load(plugin, "measure_block"))

    def situations(self, p: Plugin, device: str = "cpu") -> Iterator[SearchQuestion]:
        """Yield what the strategy is asked, the ordinary first."""
        raise NotImplementedError

    def _search_on_devices(self, p: Plugin) -> None:
        for device in devices():
            for s in self.situations(p, device):
                with situation(f"{s.name}, {device}"):
                    self._search(p, s)

    def _searches(self, plugin: Any) -> list[tuple[SearchQuestion, SearchTrace]]:
        """Return the begin of a search in every situation; checks on one instance share them."""
        known: dict[Any, list[tuple[SearchQuestion, SearchTrace]]] = self.__dict__.setdefault(
            "_known", {}
        )
        if plugin not in known:
            p, searches = self.load(plugin), []
            for s in self.situations(p):
                with situation(s.name):
                    searches.append((s, self._search(p, s)))
            known[plugin] = searches
        return known[plugin]

    def _search(
        self,
        p: Plugin,
        s: SearchQuestion,
        cost: Callable[[int], float] = COSTS["scattered"],
        most: int = FEW,
    ) -> SearchTrace:
        rng = rng_for(0, p.role, p.name)
        steps = p.proposals(p.proposes, **s.arguments, windows=WINDOWS, rng=rng)
        return drive(steps, cost, most)

    def _said(self, p: Plugin, s: SearchQuestion) -> tuple[object, ...]:
        return self._search(p, s).said


class BlockRatiosConformance(RatiosConformance):
    """The checks of block ratios; a subclass has the fixture `plugin`, returning an instance."""

    role = "block_ratios"

    def situations(self, p: Plugin, device: str = "cpu") -> Iterator[SearchQuestion]:
        """Yield every sparsity, every layout, and blocks that are equal or dead."""
        for i, (name, layout) in enumerate(cases.layouts()):
            for sparsity in SPARSITIES if i == 0 else (0.5,):
                for blocks, known in measured_blocks(p, layout, device, every=sparsity == 0.5):
                    yield SearchQuestion(
                        f"{name}, sparsity {sparsity}{blocks}",
                        layout,
                        sparsity,
                        {"layout": layout, "sparsity": sparsity, "measurements": known},
                        i == 0 and sparsity in ORDINARY,
                    )


def _expect_winner(trace: SearchTrace) -> None:
    if trace.ended and trace.returned is None:
        expect(trace.can_win, "ends without a proposal that can win")


def measured_blocks(
    p: Plugin, layout: Layout, device: str, every: bool
) -> Iterator[tuple[str, Sequence[Any]]]:
    """Yield what the plugin measured of ordinary blocks, and of equal and dead ones if wanted."""
    measures = p.has("measure_block")
    for kind in cases.BLOCKS if measures and every else ("typical",):
        told = f", {kind} blocks" if kind != "typical" else ""
        yield told, _measure(p, layout, kind, device) if measures else ()


def _measure(p: Plugin, layout: Layout, kind: str, device: str = "cpu") -> list[Any]:
    """Return the plugin's answer for every block, as the engine's dense walk does."""
    answers = []
    for block in layout.blocks:
        weights, statistics = cases.block_data(block, kind, p.required_statistics(), device)
        with torch.no_grad():
            arguments = {"block": block, "weights": weights, "statistics": statistics}
            answers.append(p.call("measure_block", **arguments))
    return answers


def _expect_ratio(ratio: object, rows: int) -> None:
    if isinstance(ratio, Tensor):
        shape = tuple(ratio.shape)
        expect(shape in ((), (rows,)), f"ratios have shape {shape}, not () or ({rows},)")
        low, high = float(ratio.min()), float(ratio.max())
    else:
        number = isinstance(ratio, (float, int)) and not isinstance(ratio, bool)
        expect(number, f"a ratio is {type(ratio).__name__}, neither float nor tensor")
        low = high = float(ratio)  # type: ignore[arg-type]
    expect(low >= 0 and high <= 1, f"a ratio is {low if not low >= 0 else high}, not in [0, 1]")


def _mean(proposal: Proposal, layout: Layout) -> float:
    ratios = ((proposal.ratios[name], x.weights) for name, x in layout.linears.items())
    pruned = (float(r.double().mean() if isinstance(r, Tensor) else r) * n for r, n in ratios)
    return sum(pruned) / layout.weights


def _json(proposal: Proposal) -> str:
    try:
        return json.dumps(dict(proposal.parameters), sort_keys=True)
    except (TypeError, ValueError) as error:
        raise AssertionError(f"parameters are no JSON values: {error}") from None
