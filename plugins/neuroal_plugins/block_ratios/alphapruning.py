"""AlphaPruning: blocks with heavier-tailed spectra stay denser."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neuroal import Block, Generation, Layout, Measurement, Proposal, hookimpl, option
from neuroal_plugins import density

BINS = 100


@dataclass(frozen=True, eq=False)
class Alphapruning:
    """ratio_b proportional to 1 - e + 2 e minmax(alpha_b), alpha the spectra's power-law exponent.

    Lu et al. 2024, arXiv:2410.10912. A block's alpha is the mean over its linears; linears without
    a tail to fit (fewer than two distinct singular values) are left out, and a block of nothing
    else is put at the mean of the others. Ratios of 1 and more are clipped.
    """

    epsilon: float = option(0.3, "relative distance of the extreme ratios from the mean, in [0, 1)")
    published_code: bool = option(
        False, "search the tail's start without the lower bound, as the published code does"
    )

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon < 1:
            raise ValueError(f"epsilon={self.epsilon} is outside [0, 1)")

    @hookimpl
    def measure_block(self, block: Block, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the exponents of the block's linears that have one, float64 `(k,)`."""
        lowest = 0.0 if self.published_code else 0.95
        exponents = (exponent(weights[linear.name], lowest) for linear in block.linears)
        return {"exponents": torch.tensor([a for a in exponents if a], dtype=torch.float64)}

    @hookimpl
    def propose_block_ratios(
        self, layout: Layout, sparsity: float, measurements: Sequence[Mapping[str, Tensor]]
    ) -> Generator[Generation, list[Measurement], Proposal]:
        """Return the one allocation; nothing is measured."""
        yield from ()
        means = torch.stack([m["exponents"].cpu().double().mean() for m in measurements])
        means = means.where(~means.isnan(), means.nanmean())  # (blocks,)
        low, high = means.min(), means.max()
        if not low < high:
            return Proposal(dict.fromkeys(layout.linears, sparsity), {"epsilon": self.epsilon})
        relative = (means - low) / (high - low) * 2 * self.epsilon + (1 - self.epsilon)
        sizes = torch.tensor([block.weights for block in layout.blocks], dtype=torch.float64)
        ratios = relative * sparsity * sizes.sum() / (sizes * relative).sum()
        clipped = density.clip_block_ratios(ratios)
        return Proposal(layout.per_block(clipped), {"epsilon": self.epsilon})


def exponent(weight: Tensor, lowest: float = 0.95) -> float | None:
    """Return the power-law exponent of a weight's squared singular values.

    The tail starts at the eigenvalue between `lowest` and 1.5 times the peak of the histogram of
    log10 that gives the least Kolmogorov-Smirnov distance; its exponent is the Hill estimate
    alpha = 1 + n / sum ln(l_k / l_min) (Lu et al. 2024).

    Args:
        weight: `(out, in)`, floating.
        lowest: Lower end of the candidates, relative to the histogram's peak.

    Returns:
        The exponent, above 1, or None where fewer than two distinct eigenvalues leave no tail.
    """
    singular = torch.linalg.svdvals(weight.float()).cpu().double().flip(0)  # rising
    noise = singular[-1] * max(weight.shape) * torch.finfo(torch.float32).eps
    eigenvalues = singular[singular > noise].square()
    if len(eigenvalues) < 2:
        return None
    peak = _peak(eigenvalues)
    inside = (eigenvalues >= lowest * peak) & (eigenvalues <= 1.5 * peak)
    fits = [_fit(eigenvalues[i:]) for i in inside[:-1].nonzero().flatten().tolist()]
    finite = [(distance, alpha) for distance, alpha in fits if alpha < torch.inf]
    return min(finite, key=lambda fit: fit[0])[1] if finite else None


def _peak(eigenvalues: Tensor) -> float:
    """Return the left edge of the fullest of 100 bins of log10."""
    logs = eigenvalues.log10()
    low, high = float(logs[0]), float(logs[-1])
    counts = torch.histc(logs, BINS, min=low, max=high)
    edge = low + (high - low) / BINS * int(counts.argmax())
    return float(10**edge)


def _fit(tail: Tensor) -> tuple[float, float]:
    """Return Kolmogorov-Smirnov distance and exponent of a tail of rising eigenvalues."""
    n = len(tail)
    ratios = tail / tail[0]
    alpha = float(1 + n / ratios.log().sum())
    empirical = torch.arange(n, dtype=torch.float64) / n
    distance = (1 - ratios ** (1 - alpha) - empirical).abs().max()
    return float(distance), alpha
