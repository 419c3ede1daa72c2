"""The data that engine and plugins exchange.

Nothing here imports torch: names of plugins and hooks are known without it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import wraps
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import torch
    from torch import Tensor

    from neuroal.layout import Layout, Linear
    from neuroal.walk.statistics import Statistics

Tick = Callable[[], object]
"""Called once per unit of work that is done, for a progress bar."""
Comparison = Literal["row", "matrix"]
Budget = Literal["exact", "paper"]
Bos = Literal["auto", "always", "never"]
"""Whether windows begin with the beginning-of-sequence token; "auto": as the tokenizer does."""
SparsityOver = Literal["pruned", "all"]

_IMPORTANCE = "say importance={linear: Importance(rows, inputs)}"
REMOVED: Mapping[str, Mapping[str, str]] = {
    "Generation": {
        "keep": "write drop_early=False to have the exact cost of more than the best",
        "around_first": "say reuse_first_weights",
    },
    "Proposal": {
        "probe": "say probe=True of its Generation",
        "row_importance": _IMPORTANCE,
        "input_importance": _IMPORTANCE,
    },
    "PrunerTraits": {
        "second_order": "leave it out: prune_linear or prune_linears shows that weights are moved"
    },
    "hook": {
        "needs_paper_budget": "return RefinerTraits(needs_paper_budget=...) from describe",
        "propose_row_importance": (
            "name it propose_row_ratios, and return RowRatiosTraits(weighs_rows=True) from describe"
        ),
    },
}
"""Names of former versions, by what had them, and what to write in their place."""

_Data = TypeVar("_Data")


def _names_removed(kind: type[_Data]) -> type[_Data]:
    """Have the constructor of a class answer a former argument with what to write in its place."""
    construct = kind.__init__
    removed = REMOVED[kind.__name__]

    @wraps(construct)
    def checked(self: _Data, *args: Any, **arguments: Any) -> None:
        for name in arguments:
            if name in removed:
                raise TypeError(f"{kind.__name__} has no '{name}' any more: {removed[name]}")
        construct(self, *args, **arguments)

    kind.__init__ = checked  # type: ignore[assignment]
    return kind


@dataclass(frozen=True)
class Pattern:
    """N:M sparsity: of every `of` consecutive inputs of a row, `kept` weights stay.

    Attributes:
        kept: N, at least 0 and at most `of`.
        of: M, at least 1.
    """

    kept: int
    of: int

    def __str__(self) -> str:
        return f"{self.kept}:{self.of}"


@_names_removed
@dataclass(frozen=True)
class PrunerTraits:
    """What a pruner can be combined with.

    Attributes:
        comparison: Weights compete within a "row" or within the whole "matrix" by default.
        row_ratios: Whether the rows of one linear may have different ratios.
        patterns: Whether N:M patterns are supported.
        magnitude_times: Performance only: the name of the statistic n, float32 `(in,)`, if the
            scores are |W| * n to the bit, so that one kernel may score and prune. None for every
            other score; no result depends on it.
    """

    comparison: Comparison = "row"
    row_ratios: bool = True
    patterns: bool = True
    _: KW_ONLY
    magnitude_times: str | None = None


@dataclass(frozen=True)
class BlockRatiosTraits:
    """What a plugin of role `block_ratios` costs.

    Attributes:
        candidates: For estimates: what its search costs at most, in candidates on all search
            windows; None where that is not known before.
    """

    candidates: float | None = None


@dataclass(frozen=True)
class RowRatiosTraits:
    """What a plugin of role `row_ratios` proposes.

    Attributes:
        weighs_rows: Proposals have importance of rows, which goes with every pruner, and not
            ratios of rows, which need masks per row.
        candidates: As of `BlockRatiosTraits`.
    """

    weighs_rows: bool = False
    candidates: float | None = None


@dataclass(frozen=True)
class RefinerTraits:
    """What a refiner needs.

    Attributes:
        needs_paper_budget: Why a refined mask may prune another number of weights; budget "exact"
            is then refused for this reason. Empty if counts are kept.
    """

    needs_paper_budget: str = ""


@dataclass(frozen=True)
class ReconstructionTraits:
    """What a plugin of role `reconstruction` needs.

    Attributes:
        batch_tokens: Tokens of the largest batch that `reconstruct_block` wants; None takes the
            batches of the run. A batch has at least one window.
        passes: How often `reconstruct_block` runs a batch at most; the estimate is made from it.
    """

    batch_tokens: int | None = None
    passes: int = 1


@dataclass(frozen=True)
class ExporterTraits:
    """What an exporter needs.

    Attributes:
        reads_dense: Whether it reads the weights of the dense model, which has to be there then.
    """

    reads_dense: bool = False


@dataclass(frozen=True, eq=False)
class Importance:
    """How much an error of a linear counts: for each of its rows, and for each of its inputs.

    The scores of a linear's weights are multiplied by both, and its rows compete for its ratio.
    Only proportions count.

    Attributes:
        rows: `(out,)`, positive, the largest at most 1e12 times the least; float64 in a proposal,
            float32 and at most 1 in a target.
        inputs: The same for inputs, `(in,)`; None: scores are not multiplied per input. For
            pruners that only score.
    """

    rows: Tensor
    inputs: Tensor | None = None


@dataclass(frozen=True)
class Target:
    """How much of one linear to prune.

    Attributes:
        counts: int64, weights to prune: `(out,)` per row, or `(1,)` for the whole matrix.
        ratio: The wanted ratio of the linear in [0, 1), before rounding to `counts`.
        pattern: The N:M pattern, or None for unstructured.
        comparison: "row" if `counts` is per row, "matrix" if it is one number.
        budget: "exact" (`counts` is met to the weight) or "paper" (published roundings).
        prune_last: Which of equal scores goes: the one of higher index (the published rule under
            row ratios) or of lower index (everywhere else).
        importance: Scores are multiplied by it before the weights of the matrix compete; None if
            all count alike. A pruner never sees it: for one that moves weights, the engine
            multiplies the rows by it first and divides them afterwards.
        zeros: bool `(out, in)`, weights that the dense model has at zero and that stay so; None if
            zeros may come back. `counts` includes them, and `mask_for` prunes them first. Whatever
            a pruner or refiner answers, the engine keeps them at zero.
    """

    counts: Tensor
    ratio: float
    pattern: Pattern | None = None
    comparison: Comparison = "row"
    budget: Budget = "exact"
    prune_last: bool = False
    importance: Importance | None = None
    zeros: Tensor | None = None


@dataclass(frozen=True)
class PrunedLinear:
    """What `prune_linear` returns, and `prune_linears` for each linear.

    Attributes:
        weight: Floating `(out, in)`; the engine sets it to zero where `mask` prunes.
        mask: bool `(out, in)`, True = pruned.
    """

    weight: Tensor
    mask: Tensor


class BlockBatch(Protocol):
    """Some windows in front of a pruned block, and what the dense model has behind it.

    Attributes:
        windows: How many windows.
        target: float32 `(windows, tokens, hidden)`: the output of the dense model's own block, on
            the output of the dense model's own blocks before it.
    """

    @property
    def windows(self) -> int: ...

    @property
    def target(self) -> Tensor: ...

    def run(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Return the block's output, float32 `(windows, tokens, hidden)`.

        The input is the output of the pruned blocks before it. Autograd differentiates the result
        by `weights`, which are float32 `(out, in)` by linear name; linears that are not named have
        the weights of the pruned block.
        """


@dataclass(frozen=True, eq=False)
class LinearToExport:
    """One pruned linear of a finished run.

    Attributes:
        linear: Name, shape and place.
        weight: `(out, in)`, as saved, in its own dtype.
        dense: The dense model's weight, of the same shape; None unless the exporter `reads_dense`.
        statistics: The required statistics of the linear's input in the pruned model.
    """

    linear: Linear
    weight: Tensor
    dense: Tensor | None
    statistics: Statistics


class RunToExport(Protocol):
    """A finished run in front of an exporter.

    Attributes:
        folder: Of the run, which is only read; its weights may be packed.
        report: Content of its `neuroal.json`.
        layout: Of the model.
    """

    @property
    def folder(self) -> Path: ...

    @property
    def report(self) -> Mapping[str, Any]: ...

    @property
    def layout(self) -> Layout: ...

    def linears(self) -> Iterator[LinearToExport]:
        """Yield the pruned linears in order, each read when it is asked for.

        Where the exporter reads statistics, the pruned model runs on the calibration windows
        meanwhile, block by block.
        """

    def copy(self, folder: Path) -> None:
        """Copy the run into an existing folder, as an ordinary checkpoint: unpacked if packed."""


@_names_removed
@dataclass(frozen=True)
class Proposal:
    """A candidate allocation and the parameters that made it.

    Attributes:
        ratios: For every prunable linear by full name: one ratio in [0, 1], or a float64 tensor
            `(out,)` of ratios per row.
        parameters: JSON values that identify the proposal; NeuroAL's λ is `parameters["lam"]`.
        importance: For some linears, by full name, how much rows and inputs count. The ratio of
            such a linear is one number. For plugins of role `row_ratios` that weigh rows.
    """

    ratios: Mapping[str, float | Tensor]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    _: KW_ONLY
    importance: Mapping[str, Importance] = field(default_factory=dict)


@_names_removed
@dataclass(frozen=True)
class Generation:
    """Proposals to be measured together.

    Attributes:
        proposals: At least one.
        drop_early: Whether a proposal may leave the walk once its partial misalignment is above the
            least one so far: exact where only the best matters. False measures all to the end.
        windows: Search windows to measure on, from the first; None for all.
        probe: All are measured as given (no projection on the budget), to the end, and none of
            them can win.
        reuse_first_weights: For probes that are small changes of the first one. Where the targets
            of a block are those of the first probe, the block keeps the weights that the first
            probe has there: it is not pruned again, even though its inputs differ.
    """

    proposals: Sequence[Proposal]
    _: KW_ONLY
    drop_early: bool = True
    windows: int | None = None
    probe: bool = False
    reuse_first_weights: bool = False


@dataclass(frozen=True)
class Measurement:
    """The engine's answer to one proposal.

    Attributes:
        misalignment: >= 0, lower is better; for a dropped one the partial sum at which it left.
        dropped: Left the walk early because it could not win any more.
        block_runs: Block runs (one block on one window once) that were done for this proposal.
    """

    misalignment: float
    dropped: bool
    block_runs: int


Proposals = Generator[Generation, list[Measurement], Proposal | None]


class Accumulator(Protocol):
    """A running statistic over the inputs of a linear; a frozen dataclass in practice.

    Built in by name: `input_norm`, `input_sum`, `input_var`, `gram`, `input_error`, `cross_gram`,
    `dense_gram`. A plugin may return one of its own from `required_statistics`; results are read by
    `name`.

    Attributes:
        name: Key of the result in `Statistics`.
        compares: Whether `update` wants the dense and the pruned input of the same tokens.
    """

    @property
    def name(self) -> str: ...

    @property
    def compares(self) -> bool: ...

    def init(self, in_features: int, device: torch.device) -> dict[str, Tensor]:
        """Return the empty state."""

    def update(self, state: dict[str, Tensor], x: Tensor, pruned: Tensor | None) -> None:
        """Add float32 `x (windows, tokens, in)` to `state` in place; `pruned` if `compares`."""

    def merge(self, a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the state of both sets of windows together."""

    def result(self, state: dict[str, Tensor]) -> Tensor:
        """Return the statistic."""


@dataclass(frozen=True)
class TopUp:
    """A preset: which plugins decide the ratios. An entry point of group `neuroal.top_up`.

    Attributes:
        block_ratios: One or more names; several compete under the alignment metric.
        row_ratios: One name; left out where the pruner cannot have row ratios.
        alignment: One name.
        refiner: One name, or None.
        options: Options per plugin name, overridden by the user's own.
        search_samples: Calibration windows that the search uses where the user does not say.
        help: One line for `neuroal plugins list`.
        reconstruction: One name, or None.
        search_pruner: What prunes the candidates of the search, where that is not the pruner.
        pruner: Base pruner that it goes with where the user names none; what `--effort` takes has
            one.
        excess: What is left of the excess of Wanda with uniform ratios, by calibration tokens, as
            measured on real models; `--within` chooses by it.
    """

    block_ratios: tuple[str, ...] = ("uniform",)
    row_ratios: str = "uniform"
    alignment: str = "neuron"
    refiner: str | None = None
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    search_samples: int = 8
    help: str = ""
    reconstruction: str | None = None
    search_pruner: str | None = None
    pruner: str | None = None
    excess: Mapping[int, float] = field(default_factory=dict)
