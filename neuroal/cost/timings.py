"""How long a run will take: every kind of work that it does, timed on one block of its shapes.

The block is one of the model's own code, with weights that mean nothing; nothing of the model is
read. Runs of the block begin with a few tokens, and prunings with corners of its matrices; both
grow until they are whole, or until their seconds are up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from neuroal.cost.preparation import Prepared
from neuroal.cost.probes import Timed, corner, corner_statistics, grow, scale, synchronised
from neuroal.cost.reconstructing import Reconstructions, uniform_targets
from neuroal.cost.texts import TextSize, in_longest
from neuroal.evaluation.perplexity import cross_entropy, forward_windows
from neuroal.layout import Block, Layout, find, matrices
from neuroal.model import memory, pretrained
from neuroal.plugins import Plugin
from neuroal.pruning.pruner import BasePruner, spare_copies
from neuroal.pruning.targets import Rules
from neuroal.run.setup import Setup, search_dtype
from neuroal.types import Accumulator
from neuroal.walk import BlockRun, CandidateState, Walker, batch_size
from neuroal.walk.states import LinearStatistics
from neuroal.walk.statistics import resolve

_VOCABULARY = 1024
_LOGITS = 8192  # words at most: logits take as long as there are words
_TOKENS, _CORNER = 64, 256  # the first sizes
# Powers with which time grows: of tokens, since attention looks at pairs of them; of the sides of
# matrices, from scores to factorisations.
_RUN_POWERS, _PRUNE_POWERS = (1.0, 1.5), (2.0, 3.0)
Seconds = dict[str, float]


def time_block(prepared: Prepared, length: int, texts: Sequence[TextSize] = ()) -> Timed:
    """Return the seconds of every kind of `Work` that a run does, on windows of `length` tokens.

    The evaluation's are on the longest windows of `texts`.

    Raises:
        NeuroalError: The family cannot be made with one block.
    """
    setup, recipe = prepared.setup, prepared.recipe
    assert recipe.model is not None
    device = memory.device_of(recipe.device)
    evaluated, longest = in_longest(texts)
    known = pretrained.vocabulary_size(prepared.model.config) or _VOCABULARY
    logits = evaluated or setup.alignment.has("measure_output")
    words = min(known, _LOGITS if logits else _VOCABULARY)
    trust = prepared.trust_remote_code
    model = pretrained.one_block(recipe.model, device, recipe.dtype, words, trust)
    layout = find(model)
    dtype, walker = search_dtype(recipe), Walker(model, layout)
    (block,) = layout.blocks
    windows = min(recipe.samples, recipe.batch or batch_size(torch.device(device), length))
    with walker.block(block, dtype) as cast, torch.no_grad():
        runs = _Runs(setup, walker, block, cast, dtype, device, known / words)
        sizes = _token_sizes(windows, length)
        tokens = [float(n * t) for n, t in sizes]
        spent = grow(tokens, lambda k: runs.seconds(*sizes[k]), *_RUN_POWERS)
        rules = setup.rules(replace(recipe, keep=(), only=()), layout)  # of a block that is pruned
        prunings = _Prunings(setup, recipe.seed, rules, layout, walker.module(block), device)
        corners = prunings.corners()
        of_search, of_final = runs.dense.statistics, runs.final.statistics
        rest = [
            grow([scale(x) for x in corners], partial(_nth, corners, work), *_PRUNE_POWERS)
            for work in prunings.kinds(of_search, of_final, runs.measured)
        ]
        if setup.reconstruction is not None:
            new = Reconstructions(setup.reconstruction, walker, recipe.seed, rules, device)
            timed = grow(tokens, lambda k: new.runs(*sizes[k]), *_RUN_POWERS)
            rest.append(replace(timed, seconds={k: x / windows for k, x in timed.seconds.items()}))
            if setup.reconstruction.has("reconstruct_linear"):
                solve = partial(_nth, corners, new.solve)
                rest.append(grow([scale(x) for x in corners], solve, *_PRUNE_POWERS))
        if evaluated:
            together = min(forward_windows(longest, known), evaluated)
            steps = _token_sizes(together, longest)
            score = partial(_evaluate, walker, known / words, device)
            timed = grow([float(n * t) for n, t in steps], lambda k: score(*steps[k]), *_RUN_POWERS)
            rest.append(replace(timed, seconds={k: x / together for k, x in timed.seconds.items()}))
    seconds = {kind: x / windows for kind, x in spent.seconds.items()}
    for timed in rest:
        seconds |= timed.seconds
    return Timed(seconds, any(timed.extrapolated for timed in (spent, *rest)))


def time_forward(
    model: str, device: str, dtype: str, length: int, trust_remote_code: bool = False
) -> Timed:
    """Return the seconds of a window in a dense model: a `block`, and a word of its `head`.

    Raises:
        NeuroalError: The family cannot be made with one block.
    """
    made: Any = pretrained.one_block(model, device, dtype, _VOCABULARY, trust_remote_code)
    seconds = synchronised(device)
    sizes = _token_sizes(1, length)

    def run(k: int) -> Seconds:
        ids = torch.zeros(sizes[k], dtype=torch.int64, device=device)
        with torch.no_grad():
            block = seconds(lambda: made.base_model(input_ids=ids, use_cache=False))
            whole = seconds(lambda: made(input_ids=ids, use_cache=False))
        return {"block": block, "head": max(whole - block, 0.0) / _VOCABULARY}

    return grow([float(tokens) for _, tokens in sizes], run, *_RUN_POWERS)


def _evaluate(walker: Walker, more_words: float, device: str, windows: int, length: int) -> Seconds:
    """Return the seconds of a block, and of logits and loss, on so many tokens of a text."""
    (block,), seconds = walker.layout.blocks, synchronised(device)
    embeddings: Any = walker.model.get_input_embeddings()  # type: ignore[operator]
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(embeddings.weight.shape[0], (windows, length), generator=rng)
    inputs = walker.inputs(ids, batch=windows)
    (tokens,), start = inputs.batches, CandidateState.start(inputs)
    found: list[CandidateState] = []

    def run() -> None:
        after = walker.run(block, walker.module(block), inputs, start).state
        assert after is not None
        found.append(after)

    def losses() -> None:
        cross_entropy(walker.logits(tokens, found[-1].outputs[0]), tokens)

    return {"evaluate": seconds(run), "losses": seconds(losses) * more_words}


def _nth(corners: Sequence[Block], work: Callable[[Block], Seconds], k: int) -> Seconds:
    return work(corners[k])


def _token_sizes(windows: int, length: int) -> list[tuple[int, int]]:
    """Return windows and their length, from a few tokens to all of a batch."""
    sizes = [(1, min(_TOKENS, length))]
    while sizes[-1] != (windows, length):
        n, tokens = sizes[-1]
        longer = tokens < length
        sizes.append((n, min(2 * tokens, length)) if longer else (min(2 * n, windows), length))
    return sizes


@dataclass(eq=False)
class _Runs:
    """Runs of the block, timed on any number of tokens.

    Attributes:
        more_words: Words of the model for each one that there is.
        dense: The last dense run of the search, for its statistics.
        final: The last one of the final pruning.
        measured: What `measure_block` hooks are given.
    """

    setup: Setup
    walker: Walker
    block: Block
    cast: nn.Module
    dtype: torch.dtype | None
    device: str
    more_words: float
    dense: BlockRun = field(default_factory=lambda: BlockRun({}, None))
    final: BlockRun = field(default_factory=lambda: BlockRun({}, None))
    measured: LinearStatistics | None = None

    def seconds(self, windows: int, length: int) -> Seconds:
        """Return the seconds of every kind of run on so many windows of so many tokens."""
        rng = torch.Generator().manual_seed(0)
        embeddings: Any = self.walker.model.get_input_embeddings()  # type: ignore[operator]
        ids = torch.randint(embeddings.weight.shape[0], (windows, length), generator=rng)
        inputs = self.walker.inputs(ids, batch=windows)
        module, state = self.walker.module(self.block), CandidateState.start(inputs)
        run = partial(self.walker.run, self.block, module, inputs, state)
        cast_inputs = replace(inputs, dtype=self.dtype)
        search_run = partial(self.walker.run, self.block, self.cast, cast_inputs, state)
        spent = self._search(search_run, module) | self._final(run)
        if self.setup.alignment.has("measure_output"):
            spent["logits"] = self._logits(run, ids) * self.more_words
        if self.setup.measures:
            names = resolve(s for p in self.setup.measures for s in p.required_statistics())
            self.measured = run(names).statistics
        return spent

    def _search(self, run: Callable[..., BlockRun], module: nn.Module) -> Seconds:
        """Time a candidate's block, dense and pruned."""
        setup = self.setup
        norm = frozenset({"input_norm"} if setup.reads_deviation else ())
        read = setup.alignment.statistic_names() | norm
        of_plugins = [p.required_statistics() for p in (setup.alignment, setup.search_pruner)]
        accumulators = resolve(norm.union(*of_plugins))
        compared = tuple(a for a in accumulators if a.name in read)
        keeps = any(a.compares for a in compared)
        seconds = synchronised(self.device)
        spent = {"dense": seconds(lambda: self._dense(run, accumulators, keeps))}
        weights = {
            x.name: matrices.weight(x, module, self.block.name).clone() for x in self.block.linears
        }
        weights = {name: w.to(self.dtype or w.dtype) for name, w in weights.items()}
        return spent | {"pruned": seconds(lambda: run(compared, weights=weights, dense=self.dense))}

    def _dense(
        self, run: Callable[..., BlockRun], accumulators: Sequence[Accumulator], keeps: bool
    ) -> None:
        self.dense = run(accumulators, output=False, keep_inputs=keeps)

    def _final(self, run: Callable[..., BlockRun]) -> Seconds:
        """Time the runs of the final pruning, where there are any."""
        required = resolve({s for p in self.setup.final for s in p.required_statistics()})
        if not required and self.setup.reconstruction is None:
            return {}
        accumulators = resolve({*required, "input_norm"})

        def dense() -> None:
            self.final = run(accumulators, output=False)

        seconds = synchronised(self.device)
        norm = resolve({"input_norm"})
        return {"final_dense": seconds(dense), "final_pruned": seconds(lambda: run(norm))}

    def _logits(self, run: Callable[..., BlockRun], ids: Tensor) -> float:
        state = run().state
        assert state is not None
        outputs = state.outputs[0]

        def measure_output() -> None:
            logits = self.walker.logits(ids.to(self.walker.device), outputs)
            hook = partial(self.setup.alignment.call, "measure_output")
            hook(dense_logits=logits, pruned_logits=logits)

        return synchronised(self.device)(measure_output)


@dataclass(frozen=True, eq=False)
class _Prunings:
    """Prunings of corners of the block's matrices, timed."""

    setup: Setup
    seed: int
    rules: Rules
    layout: Layout
    module: nn.Module
    device: str

    def corners(self) -> list[Block]:
        """Return corners of growing size; the last is the block itself."""
        (block,) = self.layout.blocks
        widest = max(max(x.out_features, x.in_features) for x in block.linears)
        multiple = self.rules.pattern.of if self.rules.pattern else 1
        sizes, size = [], _CORNER
        while size < widest:
            sizes.append(corner(block, size, multiple))
            size *= 2
        return [*sizes, block]

    def kinds(
        self,
        of_search: LinearStatistics,
        of_final: LinearStatistics,
        measured: LinearStatistics | None,
    ) -> list[Callable[[Block], Seconds]]:
        """Return what times one kind of work each on a corner, given the statistics of a run."""
        required = {s.name for p in self.setup.final for s in resolve(p.required_statistics())}
        final = {name: x.only(required) for name, x in of_final.items()}
        kinds: list[Callable[[Block], Seconds]] = [
            partial(self._prune, "prune", self.setup.search_pruner, None, of_search),
            partial(self._prune, "final_prune", self.setup.pruner, self.setup.refiner, final),
        ]
        return kinds if measured is None else [*kinds, partial(self._measure, measured)]

    def _prune(
        self,
        kind: str,
        plugin: Plugin,
        refiner: Plugin | None,
        statistics: LinearStatistics,
        block: Block,
    ) -> Seconds:
        goals = uniform_targets(Layout((block,)), self.rules)
        seen = corner_statistics(block, statistics, self.layout)
        pruner = BasePruner(plugin, refiner, self.seed)
        work = partial(pruner.prune_block, block, self.module, seen, goals)
        return {kind: synchronised(self.device)(work)}

    def _measure(self, statistics: LinearStatistics, block: Block) -> Seconds:
        """Time the `measure_block` hooks; their dense walk is timed as the search's."""
        seen = {
            "block": block,
            "weights": spare_copies(block, self.module),
            "statistics": corner_statistics(block, statistics, self.layout),
        }
        total = 0.0
        for plugin in self.setup.measures:
            total += synchronised(self.device)(partial(plugin.call, "measure_block", **seen))
        return {"measure": total}
