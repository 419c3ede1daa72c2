"""The presets of `--top-up`: which plugins decide the ratios."""

from __future__ import annotations

from dataclasses import replace

from neuroal import TopUp

UNIFORM = TopUp(help="the same ratio everywhere; no search")

NEUROAL = TopUp(
    block_ratios=("linear_schedule",),
    row_ratios="neuroal",
    help="NeuroAL, both steps: block ratios, then row ratios on them",
)

# In candidates of one window: 6 and 4 of the winner, which the row step reads, and 9, of some 232.
NEUROAL_FAST = TopUp(
    block_ratios=("lambda_parabola",),
    row_ratios="neuroal_parabola",
    search_samples=4,
    help="NeuroAL, both steps, in a tenth of its block runs: each λ by a parabola",
)

NEUROAL_BLOCK = TopUp(
    block_ratios=("linear_schedule",),
    help="NeuroAL's block step alone",
)

NEUROAL_ROW = TopUp(
    row_ratios="neuroal",
    help="NeuroAL's row step on uniform block ratios",
)

OWL = TopUp(block_ratios=("owl",), help="blocks with more outliers stay denser; no search")

DLP = TopUp(block_ratios=("dlp",), help="blocks of small scores stay denser; no search")

ALPHAPRUNING = TopUp(
    block_ratios=("alphapruning",),
    help="blocks with heavier-tailed spectra stay denser; no search",
)

DSNOT = TopUp(refiner="dsnot", help="uniform ratios, and masks refined by DSnoT; no search")

EVOLUTION = TopUp(
    block_ratios=("evolution",),
    alignment="output_kl",
    help="EvoPress: one ratio per linear, evolved by the divergence of the output; slow",
)

BEST = TopUp(
    block_ratios=("sensitivity",),
    alignment="output_kl",
    help="one ratio per linear by measured sensitivity, in the block runs of the paper's search",
)

# In candidates of 32 windows: the paper's search is 29 of 8 windows, ten times that 72.5. One more
# measures the deviation of the block step's winner, two the energies of the dense model on the 128
# calibration windows of the default.
BEST_SLOW = TopUp(
    block_ratios=("sensitivity",),
    row_ratios="row_sensitivity",
    alignment="output_kl",
    options={
        "sensitivity": {"candidates": 20, "probe_windows": 8},
        "row_sensitivity": {"candidates": 49.5},
    },
    search_samples=32,
    help="like best with ten times the block runs, on more windows, rows and inputs weighed",
)

# What `--effort` names: whole methods. What each leaves of the excess of Wanda with uniform ratios
# is that of SmolLM2-135M at 0.6, the mean of three texts (docs/real-models.md).

LOW = TopUp(
    pruner="wanda",
    reconstruction="refit",
    excess={4096: 0.64, 16384: 0.60},
    help="uniform ratios, and the surviving weights refitted; no search",
)

# Shares of the weights are much the same under any good pruner, and Wanda is quick: it prunes the
# candidates. 5 candidates of 8 windows pay probes of every block of a model of 30, and of every
# linear of a small one, and steps from there. Few tokens make ADMM's Gram matrix uncertain, so that
# it is damped more than where it was published; 8 of the published 20 iterations and 6 steps of
# refit do (docs/real-models.md).
MEDIUM = TopUp(
    pruner="admm",
    search_pruner="wanda",
    block_ratios=("sensitivity",),
    alignment="output_kl",
    reconstruction="refit",
    options={
        "sensitivity": {"candidates": 5},
        "admm": {"damping": 0.3, "iterations": 8, "ramp": 6},
        "refit": {"steps": 6},
    },
    excess={4096: 0.50, 16384: 0.44},
    help="ADMM by ratios of a short search under Wanda, the weights refitted",
)

# Half of the paper's search on ratios, and as much on the exponents of rows. Rounds of steps on
# rows are paid from it on small models alone.
HIGH = replace(
    MEDIUM,
    row_ratios="row_sensitivity",
    options={
        "sensitivity": {"candidates": 15},
        "row_sensitivity": {"candidates": 14},
        "admm": {"damping": 0.3},
    },
    excess={4096: 0.43},
    help="as medium, with a longer search and rows weighed",
)

# At 0.6 it leaves a real model no better than HIGH, at 2:4 and in small models it does: no number
# of --within's is true of both.
MAX = replace(
    HIGH,
    reconstruction="block",
    excess={},
    help="as high, and every block trained towards its dense output; for 2:4 above all",
)
