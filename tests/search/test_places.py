"""A walk that is interrupted anywhere goes on from its bookmark, to the same bits."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neuroal.layout import Layout, find
from neuroal.plugins import load
from neuroal.pruning.allocation import Allocation
from neuroal.pruning.pruner import BasePruner
from neuroal.pruning.targets import Rules, targets
from neuroal.search.alignment import Aligner
from neuroal.search.measurements import measure_blocks
from neuroal.search.outcomes import Outcome, Trial
from neuroal.testing import tiny_model, windows
from neuroal.walk import Walker, bookmark
from neuroal.walk.activations import MakeStore, on_disk
from neuroal.walk.bookmark import Bookmark

SAMPLES, BATCH = 3, 2


class Interrupted(BaseException):
    """What SIGINT raises, at a call of our choice."""


@pytest.fixture(autouse=True)
def always_due(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bookmark, "SECONDS", 0.0)
    monkeypatch.setattr(bookmark, "SHARE", 0)


@pytest.fixture
def spilled(tmp_path: Path) -> Iterator[MakeStore]:
    (tmp_path / "spilled").mkdir()
    with on_disk(tmp_path / "spilled") as made:
        yield made


@cache
def dense(structure: str) -> tuple[nn.Module, Layout]:
    """A model, which no walk changes, and its layout."""
    model = tiny_model(structure)
    return model, find(model)


def one(role: str, choice: Any) -> Any:
    return load([(role, choice)])[0]


def per_block(layout: Layout, ratios: Sequence[float]) -> Any:
    allocation = Allocation.of(layout.per_block(list(ratios)), layout)
    return targets(allocation, layout, Rules(0.5), probe=True)


def grid(layout: Layout) -> list[Trial]:
    """Candidates of all kinds: different, alike to the end or up to a block, dropped, unpruned."""
    rows = [(0.2, 0.5, 0.8), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), (0.5, 0.5, 0.9), (0.0, 0.5, 0.0)]
    trials = [Trial(per_block(layout, row)) for row in rows]
    return [replace(trials[0], limit=1e-9), *trials]


def around(layout: Layout) -> list[Trial]:
    """Probes that keep the weights of the first of them."""
    first = per_block(layout, (0.5, 0.5, 0.5))
    rows = [(0.7, 0.5, 0.5), (0.5, 0.7, 0.5), (0.5, 0.5, 0.7), (0.9, 0.5, 0.5)]
    return [Trial(first, first=first), *(Trial(per_block(layout, r), first=first) for r in rows)]


class Watched(Walker):
    """Interrupts before the n-th run of a block, or the n-th logits."""

    last = 10**9
    calls = 0

    def _count(self) -> None:
        self.calls += 1
        if self.calls > self.last:
            raise Interrupted

    def run(self, *given: Any, **how: Any) -> Any:
        self._count()
        return super().run(*given, **how)

    def logits(self, *given: Any, **how: Any) -> Tensor:
        self._count()
        return super().logits(*given, **how)


CASES: dict[str, dict[str, Any]] = {
    "wanda": {},
    "deviation": {"deviation": True},
    "compares": {"metric": "relative_l2", "structure": "mistral"},
    "output": {"metric": "output_kl", "structure": "opt"},
    "moves weights": {"pruner": "sparsegpt"},
    "reads nothing": {"pruner": "magnitude", "structure": "phi"},
    "weights of the first": {"trials": around, "deviation": True},
    "weights of the first, output": {"trials": around, "metric": "output_kl"},
    "half precision": {"dtype": torch.bfloat16},
}


def measured(
    case: dict[str, Any], store: MakeStore, mark: Bookmark | None, last: int = 10**9
) -> tuple[list[Outcome], Watched, int]:
    """The outcomes of a walk that ends before a call, the walker, and the ticks."""
    model, layout = dense(case.get("structure", "llama"))
    walker = Watched(model, layout, make_store=store)
    walker.last = last
    base = BasePruner(one("pruner", case.get("pruner", "wanda")), None, seed=0)
    metric = one("alignment", case.get("metric", "neuron"))
    made = Aligner(walker, base, metric, case.get("deviation", False))
    inputs = walker.inputs(windows(SAMPLES), batch=BATCH, dtype=case.get("dtype"))
    trials = case.get("trials", grid)(layout)
    ticks = 0

    def tick() -> None:
        nonlocal ticks
        ticks += 1

    walker.calls = 0
    try:
        return made.measure(trials, inputs, tick, mark), walker, ticks
    except Interrupted:
        return [], walker, ticks


def assert_same(found: Sequence[Outcome], wanted: Sequence[Outcome]) -> None:
    assert [o.measurement for o in found] == [o.measurement for o in wanted]
    for a, b in zip(found, wanted, strict=True):
        assert a.deviation.keys() == b.deviation.keys()
        assert all(a.deviation[n].equal(b.deviation[n]) for n in a.deviation)


@pytest.mark.parametrize(
    ("disk", "every"),
    [
        (False, 7),
        (True, 11),
        pytest.param(False, 2, marks=pytest.mark.matrix),
        pytest.param(True, 5, marks=pytest.mark.matrix),
    ],
)
@pytest.mark.parametrize("name", CASES)
def test_interrupted_at_many_calls(
    name: str, disk: bool, every: int, spilled: MakeStore, tmp_path: Path
) -> None:
    """The same outcomes, block runs among them; what is done again is one candidate in one block.

    That is a dense run and a pruned one. Besides, dense runs that others share are made again.
    """
    case, make_store = CASES[name], spilled if disk else list
    wanted, whole, all_ticks = measured(case, make_store, None)
    # An output metric's reference is the dense model's output, and its logits.
    blocks, reference = 3, 3 + 1 if case.get("metric") == "output_kl" else 0
    assert all_ticks == blocks * len(wanted)
    for last in range(1, whole.calls, every):
        folder = tmp_path / str(last)
        folder.mkdir()
        measured(case, make_store, Bookmark(folder, "walk"), last)
        mark = Bookmark(folder, "walk")
        found, walker, ticks = measured(case, make_store, mark)
        assert_same(found, wanted)
        assert ticks == all_ticks
        again = walker.calls - (whole.calls - last)
        assert again <= 4 + reference, (last, again)
        mark.remove()
        assert list(folder.iterdir()) == []


def test_interrupted_again_and_again(tmp_path: Path) -> None:
    case = CASES["deviation"]
    wanted, whole, _ = measured(case, list, None)
    tries = 0
    found: list[Outcome] = []
    while not found:
        tries += 1
        assert tries < 50
        found, _, _ = measured(case, list, Bookmark(tmp_path, "walk"), last=4)
    assert_same(found, wanted)
    assert tries > whole.calls / 8


@pytest.mark.parametrize("plugin", ["owl", "alphapruning"])
def test_the_dense_walk_goes_on(plugin: str, tmp_path: Path) -> None:
    def answers(mark: Bookmark | None, last: int = 10**9) -> tuple[Any, int, int]:
        walker = Watched(*dense("llama"))
        inputs = walker.inputs(windows(SAMPLES), batch=BATCH)
        walker.calls, walker.last = 0, last
        ticks: list[int] = []
        try:
            chosen = [one("block_ratios", plugin)]
            made = measure_blocks(walker, inputs, chosen, lambda: ticks.append(1), bookmark=mark)
        except Interrupted:
            made = []
        return made, walker.calls, len(ticks)

    wanted, calls, _ = answers(None)
    for last in range(1, calls):
        folder = tmp_path / str(last)
        folder.mkdir()
        answers(Bookmark(folder, "walk"), last)
        found, redone, ticks = answers(Bookmark(folder, "walk"))
        assert redone == calls - last and ticks == 3
        for a, b in zip(found[0], wanted[0], strict=True):
            assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        again, redone, _ = answers(Bookmark(folder, "walk"))  # the end is kept too
        assert redone == 0 and len(again[0]) == 3
