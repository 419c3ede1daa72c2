"""The contract between the engine and its plugins: data, roles and hooks.

A plugin is a frozen dataclass (`@dataclass(frozen=True, eq=False)`): its fields are its options,
its methods marked with `hookimpl` are its hooks. A hook may declare fewer arguments than its
specification here; it never declares more, and never gives one a default.

Nothing here imports torch: names of plugins and hooks are known without it.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import pluggy

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from neuroal.layout import Block, Layout, Linear
    from neuroal.statistics import Statistics

hookspec = pluggy.HookspecMarker("neuroal")
hookimpl = pluggy.HookimplMarker("neuroal")

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


class _AnyRole:
    @hookspec(firstresult=True)
    def required_statistics(self) -> frozenset[str | Accumulator]:  # type: ignore[empty-body]
        """Name the statistics that the plugin's other hooks read.

        Called once, before any weight is read. The engine collects the union over all plugins of
        a run and nothing else. Optional; nothing is collected without it.
        """


class PrunerSpec:
    """Base scoring: which weights of one linear matter."""

    @hookspec(firstresult=True)
    def describe(self) -> PrunerTraits:  # type: ignore[empty-body]
        """Say what the pruner can be combined with. Optional; the defaults of `PrunerTraits`."""

    @hookspec(firstresult=True)
    def score_weights(  # type: ignore[empty-body]
        self, weight: Tensor, statistics: Statistics, linear: Linear
    ) -> Tensor:
        """Score every weight of one linear; the lowest are pruned.

        Args:
            weight: float32 `(out, in)`, the dense weight; read-only.
            statistics: The required statistics of the linear's dense input.
            linear: Name, shape and place of the linear.

        Returns:
            Finite floating tensor `(out, in)`, higher = keep.
        """

    @hookspec(firstresult=True)
    def prune_linear(  # type: ignore[empty-body]
        self,
        weight: Tensor,
        target: Target,
        statistics: Statistics,
        linear: Linear,
        rng: torch.Generator,
    ) -> PrunedLinear:
        """Prune one linear and move what survives (SparseGPT and its like).

        Args:
            weight: float32 `(out, in)`, the dense weight; read-only.
            target: How many weights to prune.
            statistics: The required statistics of the linear's dense input.
            linear: Name, shape and place of the linear.
            rng: CPU generator seeded from seed, role and plugin name.

        Returns:
            The new weight and its mask; the mask meets `target`.
        """

    @hookspec(firstresult=True)
    def prune_linears(  # type: ignore[empty-body]
        self,
        weights: Tensor,
        targets: Sequence[Target],
        statistics: Sequence[Statistics],
        linears: Sequence[Linear],
        rngs: Sequence[torch.Generator],
    ) -> Sequence[PrunedLinear]:
        """Prune linears of one block and shape together, in place of `prune_linear`.

        No answer depends on which linears come together. Their targets have the same pattern,
        comparison and budget, and all of them ask for weights or none does.

        Args:
            weights: float32 `(n, out, in)`, the dense weights; read-only.
            targets: For each linear, how many weights to prune.
            statistics: For each linear, the required statistics of its dense input.
            linears: Name, shape and place of each linear.
            rngs: For each linear, the generator that `prune_linear` is given.

        Returns:
            For each linear, in order, the new weight and its mask; the mask meets its target.
        """


class _MeasuringRole:
    @hookspec(firstresult=True)
    def measure_block(  # type: ignore[empty-body]
        self, block: Block, weights: Mapping[str, Tensor], statistics: Mapping[str, Statistics]
    ) -> Mapping[str, Tensor]:
        """Measure one dense block, in a dense walk over all calibration windows. Optional.

        Args:
            block: The block and its linears.
            weights: float32 `(out, in)` by linear name; read-only.
            statistics: The required statistics by linear name.

        Returns:
            Named tensors, handed to the plugin's `propose_*` hook.
        """


class BlockRatiosSpec:
    """Block-ratio proposals: how much of each linear to prune."""

    @hookspec(firstresult=True)
    def propose_block_ratios(  # type: ignore[empty-body]
        self,
        layout: Layout,
        sparsity: float,
        measurements: Sequence[Mapping[str, Tensor]],
        rng: torch.Generator,
    ) -> Proposals:
        """Yield generations of proposals, hear their costs, return the winner or None.

        Args:
            layout: Blocks and linears, in order.
            sparsity: The wanted overall ratio in [0, 1).
            measurements: What `measure_block` returned, in block order; empty without it.
            rng: CPU generator seeded from seed, role and plugin name.

        Returns:
            A generator. A returned `Proposal` wins; after None the least misalignment wins among
            the non-probes measured on the most windows, the first in order on ties.
        """


class RowRatiosSpec:
    """Row-ratio proposals: how to spread each linear's ratio over its rows.

    A plugin has one of two hooks. Ratios of rows need a pruner whose masks are per row; importance
    of rows goes with every pruner, SparseGPT and its like too.
    """

    @hookspec(firstresult=True)
    def propose_row_ratios(  # type: ignore[empty-body]
        self,
        layout: Layout,
        base: Mapping[str, float],
        deviation: Mapping[str, Tensor],
        measurements: Sequence[Mapping[str, Tensor]],
        rng: torch.Generator,
    ) -> Proposals:
        """Yield generations of row allocations on a base allocation.

        Args:
            layout: Blocks and linears, in order.
            base: The block step's ratio of every linear.
            deviation: Dense minus pruned input norm of every linear, float32 `(in,)`, from the
                winning candidate's own evaluation; empty unless `required_statistics` names
                `input_norm`.
            measurements: What `measure_block` returned, in block order; empty without it.
            rng: CPU generator seeded from seed, role and plugin name.

        Returns:
            A generator, as for `propose_block_ratios`. Returning `Proposal(base)` at once leaves
            the block step's allocation as it is.
        """

    @hookspec(firstresult=True)
    def propose_row_importance(  # type: ignore[empty-body]
        self,
        layout: Layout,
        base: Mapping[str, float],
        deviation: Mapping[str, Tensor],
        measurements: Sequence[Mapping[str, Tensor]],
        weighs_inputs: bool,
        rng: torch.Generator,
    ) -> Proposals:
        """Yield generations that weigh the rows of linears, in place of `propose_row_ratios`.

        Args:
            layout: Blocks and linears, in order.
            base: The block step's ratio of every linear.
            deviation: As for `propose_row_ratios`.
            measurements: What `measure_block` returned, in block order; empty without it.
            weighs_inputs: Whether proposals may weigh inputs too: the pruner only scores.
            rng: CPU generator seeded from seed, role and plugin name.

        Returns:
            A generator of proposals whose ratios are `base` and whose `row_importance` says how
            the rows of a linear share its ratio, and `input_importance` how its inputs do.
        """


class AlignmentSpec:
    """The distance between the dense and the pruned model; a plugin has exactly one hook."""

    @hookspec(firstresult=True)
    def measure_linear(  # type: ignore[empty-body]
        self, dense: Statistics, pruned: Statistics, linear: Linear
    ) -> Tensor:
        """Measure the misalignment at one linear's input.

        Args:
            dense: Statistics of the dense block on the candidate's own prefix.
            pruned: Statistics of the pruned block on the same inputs.
            linear: Name, shape and place of the linear.

        Returns:
            0-d tensor >= 0; the engine sums over all linears in float64.
        """

    @hookspec(firstresult=True)
    def measure_output(  # type: ignore[empty-body]
        self, dense_logits: Tensor, pruned_logits: Tensor
    ) -> Tensor:
        """Measure the misalignment of the model's output.

        Args:
            dense_logits: `(windows, tokens, vocabulary)` of the dense model.
            pruned_logits: The same of the candidate.

        Returns:
            0-d tensor >= 0, a mean over the given windows; the engine averages over windows.
        """


class RefinerSpec:
    """Mask refinement after pruning (DSnoT and its like)."""

    @hookspec(firstresult=True)
    def needs_paper_budget(self) -> str:  # type: ignore[empty-body]
        """Say why masks do not keep their counts, as budget "exact" wants it.

        Called once, before any weight is read. Optional; without it masks keep their counts.

        Returns:
            The reason, for which budget "exact" is refused; empty if masks keep their counts.
        """

    @hookspec(firstresult=True)
    def refine_mask(  # type: ignore[empty-body]
        self,
        weight: Tensor,
        mask: Tensor,
        scores: Tensor,
        target: Target,
        statistics: Statistics,
        linear: Linear,
    ) -> Tensor:
        """Exchange pruned for kept weights.

        Args:
            weight: float32 `(out, in)`, the dense weight; read-only.
            mask: bool `(out, in)` of the pruner, True = pruned.
            scores: The pruner's scores `(out, in)`, higher = keep.
            target: What the mask was made for.
            statistics: The required statistics of the linear's dense input.
            linear: Name, shape and place of the linear.

        Returns:
            bool `(out, in)`; under budget "exact" with as many pruned as `target` asks.
        """


@dataclass(frozen=True)
class Role:
    """One kind of plugin.

    Attributes:
        name: Entry-point group `neuroal.<name>`, recipe key, and flag with hyphens.
        spec: Class of the hook specifications.
        required: A plugin has at least one of these hooks.
        exclusive: A plugin has exactly one of `required`.
        measures: A plugin may have `measure_block`.
    """

    name: str
    spec: type
    required: tuple[str, ...]
    exclusive: bool = False
    measures: bool = False

    @property
    def hooks(self) -> dict[str, Any]:
        """Return every hook specification of the role by name."""
        own = {k: v for k, v in vars(self.spec).items() if hasattr(v, "neuroal_spec")}
        if self.measures:
            own["measure_block"] = _MeasuringRole.measure_block
        return own | {"required_statistics": _AnyRole.required_statistics}


ROLES: dict[str, Role] = {
    role.name: role
    for role in (
        Role("pruner", PrunerSpec, ("score_weights", "prune_linear", "prune_linears")),
        Role("block_ratios", BlockRatiosSpec, ("propose_block_ratios",), measures=True),
        Role(
            "row_ratios",
            RowRatiosSpec,
            ("propose_row_ratios", "propose_row_importance"),
            exclusive=True,
            measures=True,
        ),
        Role("alignment", AlignmentSpec, ("measure_linear", "measure_output"), exclusive=True),
        Role("refiner", RefinerSpec, ("refine_mask",)),
    )
}

SPECS: tuple[type, ...] = (_AnyRole, _MeasuringRole, *(role.spec for role in ROLES.values()))


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
