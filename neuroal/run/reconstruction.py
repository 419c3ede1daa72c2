"""New values for the surviving weights of a pruned block: linear by linear, then the block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from neuroal.layout import Block, Linear, matrices
from neuroal.plugins import Plugin, checks
from neuroal.pruning.hooks import rng_for
from neuroal.pruning.masks import zeroed
from neuroal.pruning.pruner import NONE, unseen
from neuroal.types import Accumulator, ReconstructionTraits, Target
from neuroal.walk import BlockRun, CandidateState, Inputs, Walker
from neuroal.walk.block_batches import BlockBatches
from neuroal.walk.statistics import Statistics, resolve


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """A reconstruction plugin on the calibration windows.

    Attributes:
        plugin: Of role `reconstruction`.
        walker: Runs the model.
        inputs: The windows.
        seed: Of the recipe.
    """

    plugin: Plugin
    walker: Walker
    inputs: Inputs
    seed: int

    @cached_property
    def accumulators(self) -> tuple[Accumulator, ...]:
        """Return the statistics that `reconstruct_linear` reads."""
        return resolve(self.plugin.required_statistics())

    @property
    def compares(self) -> bool:
        """Return whether inputs are compared with those of the dense model."""
        return reads_dense_inputs(self.plugin)

    @property
    def reads_dense(self) -> bool:
        """Return whether the dense model walks beside the pruned one."""
        return reads_dense(self.plugin)

    def dense_run(self, block: Block, module: nn.Module, state: CandidateState) -> BlockRun:
        """Run a dense block on the output of the dense model's own blocks.

        `module` is dense still. Weights that a later block shares are kept as they are.
        """
        own: dict[str, Tensor] = {}
        if self.walker.lends(block):
            own = {x.name: matrices.weight(x, module, block.name).clone() for x in block.linears}
        return self.walker.run(
            block, module, self.inputs, state, weights=own, keep_inputs=self.compares
        )

    def block(
        self,
        block: Block,
        module: nn.Module,
        state: CandidateState,
        dense: BlockRun | None,
        weights: Mapping[str, Tensor],
        targets: Mapping[str, Target],
    ) -> dict[str, Tensor]:
        """Return a block's reconstructed weights by linear name, in the model's own dtype.

        Args:
            block: The block.
            module: Its module, dense; not changed.
            state: Of the pruned model, before the block.
            dense: The dense model's own run of the block, if `reads_dense`.
            weights: As pruned, by linear name.
            targets: What they were pruned for.

        Raises:
            PluginError: The plugin failed, or returned a wrong shape, name or value.
        """
        # What other processes have pruned comes by way of the CPU.
        new = {name: weight.to(self.walker.device) for name, weight in weights.items()}
        masks = {name: weight == 0 for name, weight in new.items()}
        if self.plugin.has("reconstruct_linear"):
            for stage in stages(block):
                linears = [x for x in stage if x.name in new]
                if linears:
                    known = self.statistics(block, module, state, dense, linears, new)
                    new |= self.linears(block, module, linears, new, masks, targets, known)
        if self.plugin.has("reconstruct_block") and new:
            assert dense is not None and dense.state is not None
            new |= self._whole(block, module, state, dense.state, new, masks)
        return new

    def statistics(
        self,
        block: Block,
        module: nn.Module,
        state: CandidateState,
        dense: BlockRun | None,
        linears: Sequence[Linear],
        weights: Mapping[str, Tensor],
    ) -> dict[str, Statistics]:
        """Return the statistics of linears of which none feeds another, the others pruned."""
        if not self.accumulators:
            return {}
        run = self.walker.run(
            block,
            module,
            self.inputs,
            state,
            self.accumulators,
            weights=weights,
            output=False,
            dense=dense if self.compares else None,
            groups=frozenset(x.group for x in linears),
        )
        self.walker.unchecked.look()
        return run.statistics

    def linears(
        self,
        block: Block,
        module: nn.Module,
        linears: Sequence[Linear],
        weights: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        targets: Mapping[str, Target],
        statistics: Mapping[str, Statistics],
    ) -> dict[str, Tensor]:
        """Return new weights of linears by name; an expert that saw no token keeps its own."""
        new: dict[str, Tensor] = {}
        for x in self.inputs.team.mine(linears):
            known = statistics.get(x.name, NONE)
            if unseen(x, known):
                continue
            with torch.no_grad():
                values = self.plugin.call(
                    "reconstruct_linear",
                    weight=matrices.weight(x, module, block.name).to(torch.float32, copy=True),
                    mask=masks[x.name].clone(),
                    values=weights[x.name].to(torch.float32, copy=True),
                    target=targets[x.name],
                    statistics=known,
                    linear=x,
                )
            new[x.name] = self._checked("reconstruct_linear", x, values, weights, masks)
        self.walker.unchecked.look()
        shares = self.inputs.team.exchange_tensors(new)
        found = {name: weight for share in shares for name, weight in share.items()}
        return {name: weight.to(weights[name]) for name, weight in found.items()}

    def batches(
        self,
        block: Block,
        module: nn.Module,
        state: CandidateState,
        after: CandidateState,
        weights: Mapping[str, Tensor],
    ) -> BlockBatches:
        """Return the windows in front of a block, with the output of the dense model behind it.

        `weights` are float32 `(out, in)` by linear name.
        """
        copy = deepcopy(module).to(torch.float32).requires_grad_(False)
        inputs = replace(self.inputs, dtype=torch.float32)
        return BlockBatches(self.walker, block, copy, inputs, state, after, weights)

    def _whole(
        self,
        block: Block,
        module: nn.Module,
        state: CandidateState,
        after: CandidateState,
        weights: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """Return new weights of a block; in a team, the mean of what every process has made."""
        values = {name: w.to(torch.float32, copy=True) for name, w in weights.items()}
        batches = self.batches(block, module, state, after, values)
        with torch.enable_grad():
            answer = self.plugin.call(
                "reconstruct_block",
                block=block,
                weights={name: value.clone() for name, value in values.items()},
                masks={name: mask.clone() for name, mask in masks.items()},
                batches=batches,
                rng=rng_for(self.seed, "reconstruction", self.plugin.name, block.name),
            )
        if not isinstance(answer, Mapping) or not answer.keys() <= weights.keys():
            strange = set(answer) - set(weights) if isinstance(answer, Mapping) else None
            what = f"named '{min(strange)}'" if strange else f"returned {type(answer).__name__}"
            raise self.plugin.error(
                "reconstruct_block", f"{what}, not a mapping of the block's pruned linears"
            )
        linears = {x.name: x for x in block.linears}
        new = {
            name: self._checked("reconstruct_block", linears[name], x, weights, masks)
            for name, x in answer.items()
        }
        self.walker.unchecked.look()
        return self._mean(new)

    def _mean(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the mean over the processes of a team, weighed by their windows."""
        team = self.inputs.team
        if team.size == 1:
            return dict(own)
        share = torch.tensor(float(self.inputs.windows))
        shares = team.exchange_tensors({"": share, **{n: x.float() for n, x in own.items()}})
        total = sum(float(x[""]) for x in shares)
        means = {
            name: torch.stack([x[name] * (float(x[""]) / total) for x in shares]).sum(0)
            for name in own
        }
        return {name: mean.to(own[name]) for name, mean in means.items()}

    def _checked(
        self,
        hook: str,
        linear: Linear,
        values: object,
        weights: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
    ) -> Tensor:
        """Return new values in the model's dtype, 0 where pruned; refuse what is not finite."""
        checks.check(self.plugin, hook, linear, values)
        assert isinstance(values, Tensor)
        new = zeroed(values.detach().to(weights[linear.name]), masks[linear.name])
        error = partial(checks.wrong, self.plugin, hook, linear, checks.NOT_FINITE)
        self.walker.unchecked.add(checks.finite(new), error)
        return new


def reads_dense_inputs(plugin: Plugin) -> bool:
    """Return whether a reconstruction compares inputs with those of the dense model."""
    return any(a.compares for a in resolve(plugin.required_statistics()))


def reads_dense(plugin: Plugin) -> bool:
    """Return whether a reconstruction has the dense model walk beside the pruned one."""
    return plugin.has("reconstruct_block") or reads_dense_inputs(plugin)


def batch_windows(plugin: Plugin, default: int, length: int) -> int:
    """Return how many windows of `length` tokens a batch has, which is `default` at most."""
    tokens = plugin.traits(ReconstructionTraits).batch_tokens
    if tokens is None or not plugin.has("reconstruct_block"):
        return default
    return min(default, max(1, tokens // length))


def stages(block: Block) -> list[list[Linear]]:
    """Return a block's linears in the order in which they run, those together that may be.

    Linears that share an input are a stage; so are the first linears of all experts, and so on:
    tokens pass experts side by side.
    """
    steps: dict[tuple[int | None, int], int] = {}  # (expert, group) -> step within the expert
    seen: dict[int | None, int] = {}
    by_stage: dict[tuple[bool, int], list[Linear]] = {}
    for x in block.linears:
        if x.expert is None:
            stage = (False, x.group)
        else:
            if (x.expert, x.group) not in steps:
                steps[x.expert, x.group] = seen.get(x.expert, 0)
                seen[x.expert] = seen.get(x.expert, 0) + 1
            stage = (True, steps[x.expert, x.group])
        by_stage.setdefault(stage, []).append(x)
    return list(by_stage.values())
