"""The contract between the engine and its plugins: roles and hooks.

A plugin is a frozen dataclass (`@dataclass(frozen=True, eq=False)`): its fields are its options,
its methods marked with `hookimpl` are its hooks. A hook may declare fewer arguments than its
specification here; it never declares more, and never gives one a default.

Nothing here imports torch: names of plugins and hooks are known without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor

    from neuroal.layout import Block, Layout, Linear
    from neuroal.types import (
        Accumulator,
        BlockBatch,
        BlockRatiosTraits,
        ExporterTraits,
        Proposals,
        PrunedLinear,
        PrunerTraits,
        ReconstructionTraits,
        RefinerTraits,
        RowRatiosTraits,
        RunToExport,
        Target,
    )
    from neuroal.walk.statistics import Statistics

hookspec = pluggy.HookspecMarker("neuroal")
hookimpl = pluggy.HookimplMarker("neuroal")


class _AnyRole:
    @hookspec(firstresult=True)
    def required_statistics(self) -> frozenset[str | Accumulator]:  # type: ignore[empty-body]
        """Name the statistics that the plugin's other hooks read.

        Called often, first before any weight is read: the answer must not change. The engine
        collects the union over all plugins of a run and nothing else. Optional; nothing is
        collected without it.
        """


class _DescribedRole:
    @hookspec(firstresult=True)
    def describe(  # type: ignore[empty-body]
        self,
    ) -> (
        PrunerTraits
        | BlockRatiosTraits
        | RowRatiosTraits
        | RefinerTraits
        | ReconstructionTraits
        | ExporterTraits
    ):
        """Return the traits of the plugin's role, by which the engine combines plugins.

        Called before any weight is read, possibly more than once. Optional; without it the
        defaults of the role's traits hold.
        """


class PrunerSpec:
    """Base scoring: which weights of one linear matter."""

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
        """Prune one linear and move the weights that stay (SparseGPT and its like).

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
        """Prune linears of one block and shape together: the advanced form of `prune_linear`.

        For methods that are faster on several linears at once; used in place of `prune_linear`
        where both are there. No answer depends on which linears come together. Their targets have
        the same pattern, comparison and budget; every one of them prunes a weight, or none does.

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
        windows: int,
        rng: torch.Generator,
    ) -> Proposals:
        """Yield generations of proposals, read their costs, return the winner or None.

        Args:
            layout: Blocks and linears, in order.
            sparsity: The wanted overall ratio in [0, 1).
            measurements: What `measure_block` returned, in block order; empty without it.
            windows: How many search windows there are.
            rng: CPU generator seeded from seed, role and plugin name.

        Returns:
            A generator. A returned `Proposal` wins; after None the least misalignment wins among
            the non-probes measured on the most windows, the first in order on ties.
        """


class RowRatiosSpec:
    """Row-ratio proposals: how to spread each linear's ratio over its rows.

    A plugin sets ratios of rows, which need a pruner whose masks are per row; or, where
    `RowRatiosTraits(weighs_rows=True)` says so, importance of rows, which goes with every pruner.
    """

    @hookspec(firstresult=True)
    def propose_row_ratios(  # type: ignore[empty-body]
        self,
        layout: Layout,
        base: Mapping[str, float],
        deviation: Mapping[str, Tensor],
        measurements: Sequence[Mapping[str, Tensor]],
        weighs_inputs: bool,
        windows: int,
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
            weighs_inputs: Whether importance of inputs is allowed: the pruner only scores.
            windows: How many search windows there are.
            rng: CPU generator seeded from seed, role and plugin name.

        Returns:
            A generator, as for `propose_block_ratios`. If the plugin weighs rows, the ratios of
            every proposal equal `base`. Returning `Proposal(base)` at once leaves the block step's
            allocation as it is.
        """


class AlignmentSpec:
    """The distance between the dense and the pruned model; a plugin has exactly one hook."""

    @hookspec(firstresult=True)
    def measure_linear(  # type: ignore[empty-body]
        self, dense: Statistics, pruned: Statistics, linear: Linear
    ) -> Tensor:
        """Measure the misalignment at one linear's input.

        Args:
            dense: Of the dense block, on the output of the candidate's own pruned blocks before.
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
    def refine_mask(  # type: ignore[empty-body]
        self,
        weight: Tensor,
        mask: Tensor,
        scores: Tensor,
        target: Target,
        statistics: Statistics,
        linear: Linear,
    ) -> Tensor:
        """Exchange some pruned weights for kept ones.

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


class ReconstructionSpec:
    """New values for the weights that survive, once the masks stand.

    A plugin has one of the hooks or both; the linears come first, then their block.
    """

    @hookspec(firstresult=True)
    def reconstruct_linear(  # type: ignore[empty-body]
        self,
        weight: Tensor,
        mask: Tensor,
        values: Tensor,
        target: Target,
        statistics: Statistics,
        linear: Linear,
    ) -> Tensor:
        """Return new values for the surviving weights of one linear.

        Called for the linears of a block in the order in which they run, after those before have
        their new weights: the statistics are of the inputs that the linear will see.

        Args:
            weight: float32 `(out, in)`, the dense weight; read-only.
            mask: bool `(out, in)`, True = pruned.
            values: float32 `(out, in)`, the weight as pruned: 0 where `mask` prunes.
            target: What the mask was made for.
            statistics: The required statistics of the linear's input, with everything before it
                pruned. Those that compare with the dense model's own input are not there for
                experts, whose tokens may have no counterpart.
            linear: Name, shape and place of the linear.

        Returns:
            Finite floating tensor `(out, in)`; the engine sets it to 0 where `mask` prunes.
        """

    @hookspec(firstresult=True)
    def reconstruct_block(  # type: ignore[empty-body]
        self,
        block: Block,
        weights: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        batches: Sequence[BlockBatch],
        rng: torch.Generator,
    ) -> Mapping[str, Tensor]:
        """Return new values for the surviving weights of one block.

        Called with gradients enabled.

        Args:
            block: Name and linears of the block.
            weights: float32 `(out, in)` by linear name, as pruned and reconstructed so far.
            masks: bool `(out, in)` by linear name, True = pruned.
            batches: Calibration windows in front of the block, and the dense model's output behind
                it; an item is made when it is asked for.
            rng: CPU generator seeded from seed, role, plugin and block name.

        Returns:
            Finite floating tensors `(out, in)` for some of the linears by name; the engine sets
            them to 0 where `masks` prune.
        """


class ExporterSpec:
    """Another form of a finished run: that of a runtime, or an adapter beside it."""

    @hookspec(firstresult=True)
    def export_run(  # type: ignore[empty-body]
        self, run: RunToExport, folder: Path, rng: torch.Generator
    ) -> Mapping[str, Any]:
        """Write another form of a run into an empty folder.

        Called once. What it writes becomes the output folder when it returns, and nothing is left
        of it if it raises.

        Args:
            run: The run: its folder and report, and its pruned linears one by one.
            folder: Empty.
            rng: CPU generator seeded from the run's seed, role and plugin name.

        Returns:
            What should be known of the result, JSON values by name.
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
        described: A plugin may have `describe`.
    """

    name: str
    spec: type
    required: tuple[str, ...]
    exclusive: bool = False
    measures: bool = False
    described: bool = False

    @property
    def hooks(self) -> dict[str, Any]:
        """Return every hook specification of the role by name."""
        own = {k: v for k, v in vars(self.spec).items() if hasattr(v, "neuroal_spec")}
        if self.measures:
            own["measure_block"] = _MeasuringRole.measure_block
        if self.described:
            own["describe"] = _DescribedRole.describe
        return own | {"required_statistics": _AnyRole.required_statistics}


ROLES: dict[str, Role] = {
    role.name: role
    for role in (
        Role(
            "pruner", PrunerSpec, ("score_weights", "prune_linear", "prune_linears"), described=True
        ),
        Role(
            "block_ratios",
            BlockRatiosSpec,
            ("propose_block_ratios",),
            measures=True,
            described=True,
        ),
        Role("row_ratios", RowRatiosSpec, ("propose_row_ratios",), measures=True, described=True),
        Role("alignment", AlignmentSpec, ("measure_linear", "measure_output"), exclusive=True),
        Role("refiner", RefinerSpec, ("refine_mask",), described=True),
        Role(
            "reconstruction",
            ReconstructionSpec,
            ("reconstruct_linear", "reconstruct_block"),
            described=True,
        ),
        Role("exporter", ExporterSpec, ("export_run",), described=True),
    )
}

SPECS: tuple[type, ...] = (
    _AnyRole,
    _DescribedRole,
    _MeasuringRole,
    *(role.spec for role in ROLES.values()),
)
