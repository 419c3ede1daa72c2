"""The data that engine and plugins exchange.

Nothing here imports torch: names of plugins and hooks are known without it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Tick = Callable[[], object]
"""Called once per unit of work that is done, for a progress bar."""
Comparison = Literal["row", "matrix"]
Budget = Literal["exact", "paper"]


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


@dataclass(frozen=True)
class PrunerTraits:
    """What a pruner can be combined with.

    Attributes:
        comparison: Weights compete within a "row" or within the whole "matrix" by default.
        row_ratios: Whether the rows of one linear may have different ratios.
        patterns: Whether N:M patterns are supported.
        second_order: Whether surviving weights are moved (by `prune_linear` or `prune_linears`).
        magnitude_times: Name of the statistic n, float32 `(in,)`, if the scores are |W| * n to the
            bit: then a kernel may make them on the way. None for every other score.
    """

    comparison: Comparison = "row"
    row_ratios: bool = True
    patterns: bool = True
    second_order: bool = False
    magnitude_times: str | None = None


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
        row_importance: float32 `(out,)`, at most 1, by which the scores of each row are multiplied
            before the matrix competes; None for rows that count alike. A pruner never sees it: one
            that moves weights is given rows that are multiplied by it.
        input_importance: float32 `(in,)`, at most 1, by which the scores of each input are
            multiplied too; None for inputs that count as the pruner has them. Only where the matrix
            competes, and never with a pruner that moves weights.
    """

    counts: Tensor
    ratio: float
    pattern: Pattern | None = None
    comparison: Comparison = "row"
    budget: Budget = "exact"
    prune_last: bool = False
    row_importance: Tensor | None = None
    input_importance: Tensor | None = None


@dataclass(frozen=True)
class PrunedLinear:
    """What `prune_linear` returns, and `prune_linears` for each linear.

    Attributes:
        weight: float32 `(out, in)`, zero where pruned.
        mask: bool `(out, in)`, True = pruned.
    """

    weight: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Proposal:
    """A candidate allocation and the parameters that made it.

    Attributes:
        ratios: For every prunable linear by full name: one ratio in [0, 1), or a float64 tensor
            `(out,)` of ratios per row. Ratios per row for one linear mean that the proposal is a
            row allocation; its other linears then have tensors too.
        parameters: JSON values that identify the proposal; NeuroAL's λ is `parameters["lam"]`.
        probe: Measured as given (no projection on the budget) and cannot win.
        row_importance: For some linears, by full name, how much an error in the output of each row
            counts: float64 `(out,)`, positive, the largest at most 1e12 times the least. The
            scores of a row are multiplied by it, and the rows of such a linear compete for its
            ratio, which is then one number. Only proportions within a linear count.
        input_importance: The same of inputs, float64 `(in,)`, of linears that `row_importance`
            names; scores are multiplied by both. For pruners that only score.
    """

    ratios: Mapping[str, float | Tensor]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    probe: bool = False
    row_importance: Mapping[str, Tensor] = field(default_factory=dict)
    input_importance: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Generation:
    """Proposals to be measured together.

    Attributes:
        proposals: At least one.
        keep: How many of the best need an exact cost; more than 1 forbids early dropping.
        windows: Search windows to measure on, from the first; None for all.
        around_first: The others are small changes of the first proposal; all are probes. A block
            that one of them prunes as the first does keeps the weights that the first has there,
            though it is given other inputs: it is not pruned again, nor run for the pruner.
    """

    proposals: Sequence[Proposal]
    keep: int = 1
    windows: int | None = None
    around_first: bool = False


@dataclass(frozen=True)
class Measurement:
    """The engine's answer to one proposal.

    Attributes:
        misalignment: >= 0, lower is better; for a dropped one the partial sum at which it left.
        dropped: Left the walk early because it could not win any more.
        block_runs: One block on one window once, dense or pruned, counted for this proposal.
    """

    misalignment: float
    dropped: bool
    block_runs: int


Proposals = Generator[Generation, list[Measurement], Proposal | None]


class Accumulator(Protocol):
    """A running statistic over the inputs of a linear; a frozen dataclass in practice.

    Built in by name: `input_norm`, `input_sum`, `input_var`, `gram`, `input_error`. A plugin may
    return one of its own from `required_statistics`; results are read by `name`.

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
    """

    block_ratios: tuple[str, ...] = ("uniform",)
    row_ratios: str = "uniform"
    alignment: str = "neuron"
    refiner: str | None = None
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    search_samples: int = 8
    help: str = ""
