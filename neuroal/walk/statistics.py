"""Running statistics over the inputs of a linear, accumulated window by window.

Every update is a running mean over windows in float32, in the order of the windows, so that the
result does not depend on how windows are batched and equals the published code's bits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from neuroal.distributed import ALONE, Team
from neuroal.errors import UsageError, nearest
from neuroal.types import Accumulator

State = dict[str, Tensor]
STRIPES = 4  # of rows, in which a symmetric matrix is summed from its diagonal on
NARROWEST = 128  # rows of a stripe, at least


def _windows(state: State) -> int:
    return int(state["windows"].item())


def _running_mean(state: State, key: str, per_window: Tensor) -> None:
    """m <- m (k-1)/k + value/k for every window of `per_window (windows, ...)`."""
    k = _windows(state)
    mean = state[key]
    for value in per_window:
        mean.mul_(k / (k + 1)).add_(value / (k + 1))
        k += 1
    state["windows"].fill_(k)


def squared_norms(x: Tensor) -> Tensor:
    """Return the sum over tokens of x_tj^2, float32 `(windows, in)`, of `x (windows, tokens, in)`.

    On the CPU token after token, as the published code adds them up, in one pass over memory.
    """
    if x.device.type != "cpu":
        return x.square().sum(dim=1)
    values = x.detach().numpy()
    return torch.from_numpy(np.einsum("wti,wti->wi", values, values))


def _empty(key: str, shape: tuple[int, ...], device: torch.device) -> State:
    # The count lives on the host: reading it never waits for a device.
    return {
        key: torch.zeros(shape, dtype=torch.float32, device=device),
        "windows": torch.zeros((), dtype=torch.int64),
    }


@dataclass(frozen=True)
class _Mean:
    """Mean over windows of one number per input, `(in,)`."""

    name: ClassVar[str]
    compares: ClassVar[bool] = False
    counts: ClassVar[str] = "windows"  # by which the means of two sets of windows are weighed

    def init(self, in_features: int, device: torch.device) -> State:
        return _empty(self.name, (in_features,), device)

    def merge(self, a: State, b: State) -> State:
        n_a, n_b = int(a[self.counts].item()), int(b[self.counts].item())
        total = max(n_a + n_b, 1)
        mean = a[self.name] * (n_a / total) + b[self.name] * (n_b / total)
        return {key: mean if key == self.name else a[key] + b[key] for key in a}

    def result(self, state: State) -> Tensor:
        return state[self.name]


@dataclass(frozen=True)
class InputNorm(_Mean):
    """n_j = sqrt((1/N) sum over windows and tokens of x_tj^2); divides by windows, not tokens."""

    name: ClassVar[str] = "input_norm"

    def update(self, state: State, x: Tensor, pruned: Tensor | None = None) -> None:
        _running_mean(state, self.name, squared_norms(x))

    def result(self, state: State) -> Tensor:
        return state[self.name].sqrt()


@dataclass(frozen=True)
class InputSum(_Mean):
    """s_j = (1/N) sum over windows and tokens of x_tj."""

    name: ClassVar[str] = "input_sum"

    def update(self, state: State, x: Tensor, pruned: Tensor | None = None) -> None:
        _running_mean(state, self.name, x.sum(dim=1))


@dataclass(frozen=True)
class InputError(_Mean):
    """e_j = (1/N) sum over windows and tokens of (x_tj dense - x_tj pruned)^2."""

    name: ClassVar[str] = "input_error"
    compares: ClassVar[bool] = True

    def update(self, state: State, x: Tensor, pruned: Tensor | None = None) -> None:
        assert pruned is not None
        _running_mean(state, self.name, (x - pruned).square().sum(dim=1))


@dataclass(frozen=True)
class InputVar(_Mean):
    """v_j = token-weighted mean over windows of the biased variance of x_tj within the window."""

    name: ClassVar[str] = "input_var"
    counts: ClassVar[str] = "tokens"

    def init(self, in_features: int, device: torch.device) -> State:
        return _empty(self.name, (in_features,), device) | {
            "tokens": torch.zeros((), dtype=torch.int64)
        }

    def update(self, state: State, x: Tensor, pruned: Tensor | None = None) -> None:
        seen, new = int(state["tokens"].item()), x.shape[1]
        if not new:  # an expert that no token of these windows was routed to
            state["windows"] += x.shape[0]
            return
        mean = state[self.name]
        for value in x.var(dim=1, unbiased=False):
            mean.copy_((mean * seen + value * new) / (seen + new))
            seen += new
        state["tokens"].fill_(seen)
        state["windows"] += x.shape[0]


def _stripes(rows: int) -> list[tuple[int, int]]:
    """Return where every stripe of a symmetric matrix begins and ends."""
    width = max(-(-rows // STRIPES), NARROWEST)
    return [(i, min(i + width, rows)) for i in range(0, rows, width)]


@dataclass(frozen=True)
class Gram(_Mean):
    """H = (2/N) sum over windows and tokens of x x^T, `(in, in)`.

    H is symmetric: it is summed in stripes of rows, each from its own columns on, and what is left
    of them is copied from above at the end.
    """

    name: ClassVar[str] = "gram"

    def init(self, in_features: int, device: torch.device) -> State:
        return _empty(self.name, (in_features, in_features), device)

    def update(self, state: State, x: Tensor, pruned: Tensor | None = None) -> None:
        k = _windows(state)
        gram = state[self.name]
        for window in x:
            k += 1
            scaled = math.sqrt(2 / k) * window.t()  # (in, tokens)
            for i, end in _stripes(len(gram)):
                gram[i:end, i:].mul_((k - 1) / k).add_(scaled[i:end] @ scaled[i:].t())
        state["windows"].fill_(k)

    def result(self, state: State) -> Tensor:
        gram = state[self.name]
        for i, end in _stripes(len(gram)):
            gram[end:, i:end] = gram[i:end, end:].t()
        return gram


@dataclass(frozen=True)
class DenseGram(Gram):
    """D = (2/N) sum over windows and tokens of x x^T, x of the dense model, `(in, in)`."""

    name: ClassVar[str] = "dense_gram"
    compares: ClassVar[bool] = True


@dataclass(frozen=True)
class CrossGram(_Mean):
    """C = (2/N) sum over windows and tokens of x_dense x_pruned^T, `(in, in)`."""

    name: ClassVar[str] = "cross_gram"
    compares: ClassVar[bool] = True

    def init(self, in_features: int, device: torch.device) -> State:
        return _empty(self.name, (in_features, in_features), device)

    def update(self, state: State, x: Tensor, pruned: Tensor | None = None) -> None:
        assert pruned is not None
        k = _windows(state)
        for dense_window, window in zip(x, pruned, strict=True):  # (tokens, in)
            k += 1
            state[self.name].addmm_(dense_window.t(), window, beta=(k - 1) / k, alpha=2 / k)
        state["windows"].fill_(k)


BUILT_IN: dict[str, Accumulator] = {
    a.name: a
    for a in (
        *(InputNorm(), InputSum(), InputVar(), InputError()),
        *(Gram(), CrossGram(), DenseGram()),
    )
}


def resolve(required: Iterable[str | Accumulator]) -> tuple[Accumulator, ...]:
    """Return the accumulators of a requirement, sorted by name.

    A name is the built-in accumulator, unless the requirement also holds an accumulator of that
    name: a plugin may bring its own `input_norm`, which then serves everyone in the run.

    Raises:
        UsageError: A name is neither, or two different accumulators share one.
    """
    required = list(required)
    chosen: dict[str, Accumulator] = {}
    for item in required:
        if not isinstance(item, str) and chosen.setdefault(item.name, item) != item:
            raise UsageError(f"two different accumulators are called '{item.name}'")
    for item in required:
        if isinstance(item, str) and item not in chosen:
            if item not in BUILT_IN:
                raise UsageError(f"unknown statistic '{item}': {nearest(item, BUILT_IN)}")
            chosen[item] = BUILT_IN[item]
    return tuple(chosen[name] for name in sorted(chosen))


class Statistics:
    """The results of one linear's accumulators: `statistics.input_norm`, `statistics["mine"]`.

    Attributes:
        windows: How many windows were seen.
        tokens: How many tokens were seen.
    """

    def __init__(self, results: Mapping[str, Tensor], windows: int = 0, tokens: int = 0) -> None:
        self._results = dict(results)
        self.windows = windows
        self.tokens = tokens

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._results:
            raise UsageError(
                f"statistic '{name}' was not collected: name it in required_statistics "
                f"(collected: {', '.join(sorted(self._results)) or 'none'})"
            )
        return self._results[name]

    def __getattr__(self, name: str) -> Tensor:
        if name.startswith("_"):
            raise AttributeError(name)
        return self[name]

    def __contains__(self, name: str) -> bool:
        return name in self._results

    def only(self, names: Iterable[str]) -> Statistics:
        """Return the same statistics with these results alone."""
        kept = {name: self._results[name] for name in names if name in self._results}
        return Statistics(kept, self.windows, self.tokens)

    def __len__(self) -> int:
        return len(self._results)

    def tensors(self) -> dict[str, Tensor]:
        """Return every result by name."""
        return dict(self._results)


class Collector:
    """The accumulators of one linear's input while a walk feeds it."""

    def __init__(self, accumulators: Iterable[Accumulator], in_features: int) -> None:
        self._accumulators = tuple(accumulators)
        self._in_features = in_features
        self._states: dict[str, State] = {}
        self._windows = 0
        self._tokens = 0

    def update(self, x: Tensor, dense: Tensor | None = None) -> None:
        """Add inputs `x (windows, tokens, in)` of any floating dtype; computed in float32.

        `dense` is the dense run's input of the same tokens, for accumulators that compare.
        """
        x = x.float()
        for accumulator in self._accumulators:
            if accumulator.name not in self._states:
                self._states[accumulator.name] = accumulator.init(self._in_features, x.device)
            state = self._states[accumulator.name]
            if accumulator.compares:
                if dense is None:
                    raise ValueError(f"'{accumulator.name}' compares dense with pruned inputs")
                accumulator.update(state, dense.float(), x)
            else:
                accumulator.update(state, x, None)
        self._windows += x.shape[0]
        self._tokens += x.shape[0] * x.shape[1]

    def statistics(self, team: Team = ALONE) -> Statistics:
        """Return the results so far, of what all processes of a team have seen."""
        states, windows, tokens = self._states, self._windows, self._tokens
        if team.size > 1:
            states, windows, tokens = self._merged(team)
        results = {a.name: a.result(states[a.name]) for a in self._accumulators}
        return Statistics(results, windows, tokens)

    def _merged(self, team: Team) -> tuple[dict[str, State], int, int]:
        """Return the states of all processes, merged in their order, and the windows and tokens."""
        own = {f"{a}/{key}": t for a, state in self._states.items() for key, t in state.items()}
        seen = torch.tensor([self._windows, self._tokens])
        shares = team.exchange_tensors({"": seen, **own})
        states = dict(self._states)
        for a in self._accumulators:
            parts = [
                {key: share[f"{a.name}/{key}"].to(t.device) for key, t in states[a.name].items()}
                for share in shares
            ]
            states[a.name] = functools.reduce(a.merge, parts)
        windows, tokens = torch.stack([share[""] for share in shares]).sum(dim=0).tolist()
        return states, windows, tokens
