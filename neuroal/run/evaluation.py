"""The evaluation of one run: its model on the same texts before and after the pruning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from neuroal.data.windows import Windows
from neuroal.distributed import Team
from neuroal.evaluation import quality
from neuroal.evaluation.perplexity import Perplexity, of_losses, window_losses
from neuroal.evaluation.streamed import streamed_losses
from neuroal.layout import Block
from neuroal.model.blocks import Blocks
from neuroal.model.run_folder import Journal
from neuroal.recipe import Recipe
from neuroal.run.commit import restore
from neuroal.run.report import Phases
from neuroal.walk import Walker
from neuroal.walk.stubs import OpenBlock

_LOSSES = "losses"
_TOKENS = 16384


def tokens_at_once(recipe: Recipe, length: int) -> int:
    """Return how many tokens of a text pass a block before the next, at least one forward pass.

    As many as calibrate, in windows of `length` tokens, so that their states need no more memory.
    """
    return max(recipe.samples * length, _TOKENS)


@dataclass(frozen=True, eq=False)
class RunEvaluation:
    """What the evaluation of one run is made of.

    Attributes:
        texts: Windows of each.
        blocks: The model's, dense until they are pruned.
        walker: For blocks that are in memory one at a time; None for a model in memory, which runs
            as it is.
        at_once: Tokens whose states are held together by the walker.
        journal: Losses that an earlier try has measured, and a place for new ones.
        team: The processes that share the windows.
        progress: Show bars.
    """

    texts: Sequence[Windows]
    blocks: Blocks
    walker: Walker | None
    at_once: int
    journal: Journal
    phases: Phases
    team: Team
    progress: bool

    def dense(self) -> list[Perplexity]:
        """Return the perplexities before the pruning."""
        return self._measure("dense", self.blocks.open)

    def pruned(self, dense: Sequence[Perplexity]) -> list[dict[str, Any]]:
        """Return the report's entries after the pruning, with the numbers of before."""
        pairs = zip(self._measure("pruned", self._pruned_block), dense, strict=True)
        return [quality.entry(after, before) for after, before in pairs]

    @contextmanager
    def _pruned_block(self, block: Block) -> Iterator[nn.Module]:
        with self.blocks.open(block) as module:
            restore(self.blocks, block, module, self.journal, self.team)
            yield module

    def _measure(self, when: str, open_block: OpenBlock) -> list[Perplexity]:
        if not self.texts:
            return []
        found = []
        with self.phases.phase("evaluate"):
            for windows in self.texts:
                key = f"evaluate-{when}-{windows.ids.shape[1]}-{windows.sha256[:16]}"
                packed = self.journal.recall(key, partial(self._losses, windows, open_block))
                losses = from_safetensors(packed)[_LOSSES]
                found.append(of_losses(losses, windows, self.blocks.model))
        return found

    def _losses(self, windows: Windows, open_block: OpenBlock) -> bytes:
        """Return the losses of all windows, shared out among the processes, as safetensors."""
        count, team = len(windows.ids), self.team
        share = -(-count // team.size)  # every process runs as many, the first window in excess
        excess = windows.ids[:1].expand(share * team.size - count, -1)
        own = torch.cat([windows.ids, excess])[team.rank * share :][:share]
        if self.walker is None:
            losses = window_losses(self.blocks.model, windows, own, progress=self.progress)
        else:
            walker = self.walker.opening(open_block)
            losses = streamed_losses(walker, windows, own, self.at_once, progress=self.progress)
        parts: list[Tensor] = [x[_LOSSES] for x in team.exchange_tensors({_LOSSES: losses})]
        return to_safetensors({_LOSSES: torch.cat(parts)[:count].contiguous()})
