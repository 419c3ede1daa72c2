"""`neuroal demo`: what allocation is worth, on a model small enough to try it at once."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from textwrap import fill
from typing import Any

import click

from neuroal.cli.command import Command, clean_stdout, echo, message_options, print_json
from neuroal.cli.tables import table

SPARSITIES = (0.6, 0.7)
PRUNERS = ("magnitude", "wanda")
TOP_UPS = ("uniform", "neuroal")
SAMPLES = 64  # calibration windows, and
WINDOWS = 128  # held-out windows: enough for the table, in half the time


@dataclass(frozen=True)
class DemoRow:
    """One row of the table; the first is the dense model's, without pruner and top-up."""

    pruner: str | None
    top_up: str | None
    wanted: float  # sparsity
    achieved: float  # sparsity, counted on the weights
    block_lam: float | None  # of the block step's winner
    row_lam: float | None  # of the row step's winner
    perplexity: float  # on the held-out text
    seconds: float  # of pruning and evaluation

    @property
    def method(self) -> str:
        """Return `wanda + neuroal`, or `dense`."""
        return f"{self.pruner} + {self.top_up}" if self.pruner else "dense"


@click.command(cls=Command, examples=["neuroal demo", "neuroal demo --json"])
@message_options(json="the table", quiet=True, progress=True)
def demo(as_json: bool, quiet: bool, progress: bool) -> None:
    """Prune the built-in model by eight methods and compare their perplexities.

    60 and 70 % of the weights, by magnitude and by Wanda, each with the same ratio everywhere and
    with the ratios that NeuroAL finds. Nothing is written; under two minutes on two cores.
    """
    with clean_stdout(as_json):
        cases = list(_cases(progress))
    if as_json:
        print_json({"model": "demo", "cases": [asdict(c) for c in cases]})
        return
    echo(_table(cases))
    if not quiet:
        echo("\n" + "\n".join(fill(line, 80) for line in verdict(cases)))


def _cases(shown: bool) -> Iterator[DemoRow]:
    from neuroal import engine
    from neuroal.data.sizes import default_length
    from neuroal.evaluation.perplexity import evaluation_windows, perplexity
    from neuroal.model import pretrained
    from neuroal.progress import bar as open_bar
    from neuroal.recipe import Recipe

    start = time.perf_counter()
    model, tokenizer = pretrained.load("demo")
    length = default_length(pretrained.context_length(model.config))
    heldout = evaluation_windows(  # as published, like the recipes
        "demo", tokenizer, length=length, windows=WINDOWS, bos="never"
    )
    plans = list(itertools.product(SPARSITIES, PRUNERS, TOP_UPS))
    with open_bar(total=len(plans) + 1, desc="dense", disable=not shown, leave=False) as bar:
        dense = perplexity(model, heldout).perplexity
        yield DemoRow(None, None, 0.0, 0.0, None, None, dense, time.perf_counter() - start)
        bar.update()
        for sparsity, pruner, top_up in plans:
            bar.set_description(f"{pruner} + {top_up} at {sparsity:.0%}")
            start = time.perf_counter()
            pruned = copy.deepcopy(model)
            recipe = Recipe(
                sparsity,
                pruner,
                top_up,
                model="demo",
                calibration="demo",
                samples=SAMPLES,
                bos="never",
            )
            report = engine.prune(pruned, tokenizer, recipe)
            chosen = report.selected()
            yield DemoRow(
                pruner,
                top_up,
                sparsity,
                report.sparsity["achieved"],
                _lam(chosen.get("block_ratios")),
                _lam(chosen.get("row_ratios")),
                perplexity(pruned, heldout).perplexity,
                time.perf_counter() - start,
            )
            bar.update()


def _lam(candidate: dict[str, Any] | None) -> float | None:
    lam = None if candidate is None else candidate["parameters"].get("lam")
    return None if lam is None else float(lam)


def _table(cases: Sequence[DemoRow]) -> str:
    dense = cases[0].perplexity
    rows = [
        (
            case.method,
            f"{case.achieved:.4f}",
            "-" if case.block_lam is None else f"{case.block_lam:g}",
            "-" if case.row_lam is None else f"{case.row_lam:g}",
            f"{case.perplexity:.3f}",
            f"{case.perplexity / dense - 1:+.1%}" if case.pruner else "",
            f"{case.seconds:.1f}",
        )
        for case in cases
    ]
    headers = ("method", "sparsity", "block λ", "row λ", "perplexity", "against dense", "seconds")
    return table(rows, headers, right=range(1, 7))


def verdict(cases: Sequence[DemoRow]) -> list[str]:
    """Return two lines on what the cases show: the cost of pruning, and what NeuroAL changes."""
    dense = cases[0].perplexity
    by_key = {(c.wanted, c.pruner, c.top_up): c for c in cases[1:]}
    worst = max(SPARSITIES)
    costs = [by_key[worst, p, "uniform"].perplexity / dense - 1 for p in PRUNERS]
    pairs = [
        (by_key[s, p, "uniform"].perplexity, by_key[s, p, "neuroal"].perplexity)
        for s, p in itertools.product(SPARSITIES, PRUNERS)
    ]
    better = sum(top_up < uniform for uniform, top_up in pairs)
    gains = [top_up / uniform - 1 for uniform, top_up in pairs]
    costly = " and ".join(f"{c:+.0%} by {p}" for c, p in zip(costs, PRUNERS, strict=True))
    return [
        f"Pruning {worst:.0%} with one ratio everywhere changes perplexity by {costly}.",
        f"NeuroAL's ratios win {better} of {len(pairs)} comparisons with uniform ones: "
        f"perplexity {min(gains):+.1%} to {max(gains):+.1%}.",
    ]
