"""How long a run will take: every kind of work that it does, timed on one block of its shapes.

The block is one of random weights, made by the model's own code; nothing of the model is read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from neuroal import layout
from neuroal.model import memory, pretrained
from neuroal.pruning.allocation import Allocation
from neuroal.pruning.pruner import BasePruner, spare_copies
from neuroal.pruning.targets import targets
from neuroal.recipe import Recipe
from neuroal.run.setup import Setup, search_dtype
from neuroal.walk import CandidateState, Walker, batch_size
from neuroal.walk.statistics import resolve

_VOCABULARY = 1024
_PER_WINDOW = {"dense", "pruned", "final_dense", "final_pruned", "logits"}
_QUICK, _TIMES = 1.0, 10  # what is over in less than a second is timed again: the least counts


@dataclass(frozen=True)
class Timings:
    """Seconds of the parts of a run, for one window in one block, or for one block.

    Attributes:
        dense: A window, dense, with the search's statistics.
        pruned: A window, pruned, with the metric's statistics.
        prune: A block's weights, pruned for a candidate.
        final_dense: A window, dense, with the final pruning's statistics.
        final_pruned: A window, pruned, with input norms alone.
        final_prune: A block's weights, pruned for good.
        measure: A block, in the `measure_block` hooks.
        logits: A window behind the last block, and an output metric of it.
    """

    dense: float = 0.0
    pruned: float = 0.0
    prune: float = 0.0
    final_dense: float = 0.0
    final_pruned: float = 0.0
    final_prune: float = 0.0
    measure: float = 0.0
    logits: float = 0.0


def time_block(
    made: Setup, recipe: Recipe, length: int, trust_remote_code: bool = False
) -> Timings:
    """Time one block.

    Raises:
        NeuroalError: The family cannot be made with one block.
    """
    assert recipe.model is not None
    device = memory.device_of(recipe.device)
    words = None if made.alignment.has("measure_output") else _VOCABULARY
    model = pretrained.one_block(recipe.model, device, recipe.dtype, words, trust_remote_code)
    found = layout.find(model)
    walker = Walker(model, found)
    (block,) = found.blocks
    rules = made.rules(recipe, found)
    ratios = dict.fromkeys(found.linears, rules.sparsity)
    wanted = targets(Allocation.of(ratios, found), found, rules)
    norm = frozenset({"input_norm"} if made.reads_deviation else ())
    read = made.alignment.statistic_names() | norm
    searched = resolve(
        made.alignment.required_statistics() | norm | made.pruner.required_statistics()
    )
    compared = tuple(a for a in searched if a.name in read)
    keeps = any(a.compares for a in compared)
    final = [p for p in (made.pruner, made.refiner) if p is not None]
    needed = {s for p in final for s in p.required_statistics()}
    rng = torch.Generator().manual_seed(0)
    windows = min(recipe.samples, recipe.batch or batch_size(torch.device(device), length))
    vocabulary: int = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    ids = torch.randint(vocabulary, (windows, length), generator=rng)
    inputs = walker.inputs(ids, batch=windows)
    dtype = search_dtype(recipe)
    seconds = _Clock(device)
    with walker.block(block, dtype) as cast, torch.no_grad():
        module = walker.module(block)
        same = replace(inputs, dtype=dtype)

        def run(*arguments: Any, **how: Any) -> Any:
            return walker.run(
                block, module, inputs, CandidateState.start(inputs), *arguments, **how
            )

        def search_run(*arguments: Any, **how: Any) -> Any:
            return walker.run(block, cast, same, CandidateState.start(same), *arguments, **how)

        dense = seconds("dense", lambda: search_run(searched, output=False, keep_inputs=keeps))
        search, last = (BasePruner(made.pruner, r, recipe.seed) for r in (None, made.refiner))
        statistics = dense.statistics if searched else {}
        weights = seconds("prune", lambda: search.prune_block(block, module, statistics, wanted))
        laid = {name: weight.to(dtype or weight.dtype) for name, weight in weights.items()}
        seconds("pruned", lambda: search_run(compared, weights=laid, dense=dense))
        known: Mapping[str, Any] = {}
        if needed:
            whole = resolve({*needed, "input_norm"})
            final_dense = seconds("final_dense", lambda: run(whole, output=False))
            names = {a.name for a in resolve(needed)}
            known = {n: s.only(names) for n, s in final_dense.statistics.items()}
            seconds("final_pruned", lambda: run(resolve({"input_norm"})))
        seconds("final_prune", lambda: last.prune_block(block, module, known, wanted))
        if made.alignment.has("measure_output"):
            behind = run().state

            def measure_output() -> None:
                logits = walker.logits(inputs.batches[0], behind.outputs[0])
                given = {"dense_logits": logits, "pruned_logits": logits}
                made.alignment.call("measure_output", **given)

            seconds("logits", measure_output)
        if made.measures:
            every = run(resolve(s for p in made.measures for s in p.required_statistics()))
            copies = spare_copies(block, module)
            for plugin in made.measures:
                given = {"block": block, "weights": copies, "statistics": every.statistics}
                seconds("measure", partial(plugin.call, "measure_block", **given))
    values = {k: v / (windows if k in _PER_WINDOW else 1) for k, v in seconds.spent.items()}
    return Timings(**values)


class _Clock:
    """Adds up the seconds of calls by name; what is quick is timed again, warm."""

    def __init__(self, device: str) -> None:
        self.spent: dict[str, float] = {}
        self._device = device

    def __call__(self, name: str, work: Callable[[], Any]) -> Any:
        result, first = self._once(work)
        taken = [first]
        while first < _QUICK and sum(taken) < _QUICK and len(taken) < _TIMES:
            taken.append(self._once(work)[1])
        self.spent[name] = self.spent.get(name, 0.0) + min(taken)
        return result

    def _once(self, work: Callable[[], Any]) -> tuple[Any, float]:
        start = time.perf_counter()
        result = work()
        if self._device.startswith("cuda"):
            torch.cuda.synchronize()
        return result, time.perf_counter() - start
