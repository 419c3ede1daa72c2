"""A strategy of a step: what it proposed, and what was measured of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from neuroal.plugins import Plugin
from neuroal.pruning.allocation import Allocation
from neuroal.search.outcomes import Outcome
from neuroal.types import Generation, Measurement, Proposal, Proposals


@dataclass(eq=False)
class Contender:
    """One proposal, and what was measured of it.

    Attributes:
        plugin: Who proposed it.
        proposal: As the plugin made it.
        allocation: Its ratios and importance, checked.
        windows: Search windows that it is measured on.
        probe: Measured as given, and cannot win.
        limit: A finished misalignment, above which it leaves the walk; None measures to the end.
        first: The first of its generation, whose weights it reuses where it prunes alike.
        outcome: None until it is measured.
    """

    plugin: Plugin
    proposal: Proposal
    allocation: Allocation
    windows: int
    probe: bool = False
    limit: float | None = None
    first: Contender | None = None
    outcome: Outcome | None = None

    @property
    def cost(self) -> float:
        """Return the misalignment; infinity until it is measured."""
        return float("inf") if self.outcome is None else self.outcome.measurement.misalignment

    @property
    def can_win(self) -> bool:
        """Return whether it was measured to the end and is not a probe."""
        measured = self.outcome is not None and not self.outcome.measurement.dropped
        return measured and not self.probe

    @property
    def deviation(self) -> Mapping[str, Tensor]:
        """Return the deviation of its own evaluation, float32 `(in,)` by linear, if it is known."""
        return {} if self.outcome is None else self.outcome.deviation


@dataclass(eq=False)
class Strategy:
    """One plugin's generator, what it proposed so far, and what it returned."""

    plugin: Plugin
    proposals: Proposals
    contenders: list[Contender] = field(default_factory=list)
    generation: Generation | None = None
    answer: list[Measurement] | None = None
    returned: Proposal | None = None

    def advance(self) -> bool:
        """Ask for the next generation; False when the strategy has ended."""
        try:
            if self.answer is None:
                self.generation = next(self.proposals)
            else:
                self.generation = self.proposals.send(self.answer)
        except StopIteration as stop:
            self.generation, self.returned = None, stop.value
            return False
        return True

    def hear(self, contenders: Sequence[Contender]) -> None:
        """Take the measured proposals of its generation, which it is sent when it advances."""
        self.contenders += contenders
        self.answer = [c.outcome.measurement for c in contenders if c.outcome is not None]

    def best(self, windows: int) -> float | None:
        """Return the least finished misalignment on that many windows."""
        costs = [c.cost for c in self.contenders if c.windows == windows and c.can_win]
        return min(costs, default=None)


def digest(proposal: Proposal, probe: bool = False) -> bytes:
    """Return the SHA-256 of what a proposal asks for."""
    sha256 = hashlib.sha256(json.dumps(dict(proposal.parameters), sort_keys=True).encode())
    sha256.update(b"probe" if probe else b"")
    names = sorted(proposal.importance)
    vectors: list[tuple[str, float | Tensor | None]] = [
        *((name, proposal.ratios[name]) for name in sorted(proposal.ratios)),
        *((name, proposal.importance[name].rows) for name in names),
        *((name, proposal.importance[name].inputs) for name in names),
    ]
    for name, values in vectors:
        if values is not None:
            numbers = torch.as_tensor(values, dtype=torch.float64).detach().cpu().contiguous()
            sha256.update(name.encode() + numbers.numpy().tobytes())
    return sha256.digest()
