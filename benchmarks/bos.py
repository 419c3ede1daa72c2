"""What the beginning-of-sequence token in front of every window changes, for docs/evaluation.md.

    python benchmarks/bos.py MODEL --data SOURCE --length 256 --windows 30 [--calibration SOURCE]

One line a rule: the perplexity, and the mean loss in nats at the first 15 predicted tokens of a
window and at those from the 128th. Both rules predict the same tokens: the windows without it have
the token before in its place. With `--calibration`, the model is also pruned by Wanda and SparseGPT
at three sparsities on windows of either kind, and measured on windows of both.
"""

from __future__ import annotations

import copy
import itertools
import math

import click
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import neuroal
from neuroal.data.calibration import calibration_windows
from neuroal.evaluation.perplexity import evaluation_windows
from neuroal.model import pretrained
from neuroal.types import Bos

RULES: tuple[Bos, ...] = ("never", "always")
EARLY, LATE = slice(0, 15), slice(127, None)


def windows(ids: Tensor, bos: int) -> dict[Bos, Tensor]:
    """Return windows of the same tokens behind the token before them, and behind the token."""
    text = ids[:, 1:].flatten()  # the evaluation windows' own, without the token
    length = ids.shape[1]
    with_token = ids[1:]  # the first window has no token before it
    without = with_token.clone()
    without[:, 0] = text.view(-1, length - 1)[:-1, -1]
    assert (with_token[:, 0] == bos).all()
    return {"never": without, "always": with_token}


@torch.no_grad()
def losses(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the mean loss of every predicted token of a window, in nats: (length - 1,)."""
    total = torch.zeros(ids.shape[1] - 1, dtype=torch.float64)
    for window in ids:
        scores = model(input_ids=window[None], use_cache=False).logits[0, :-1].float()
        total += cross_entropy(scores, window[1:], reduction="none").double()
    return total / len(ids)


def line(name: str, found: Tensor) -> str:
    """Return a rule's perplexity and losses."""
    early, late = float(found[EARLY].mean()), float(found[LATE].mean())
    return f"{name:<24}{math.exp(found.mean()):>10.3f}{early:>8.2f}{late:>8.2f}"


@click.command(help=__doc__)
@click.argument("model")
@click.option("--data", required=True)
@click.option("--calibration")
@click.option("--length", default=256)
@click.option("--windows", "count", default=30)
def main(model: str, data: str, calibration: str | None, length: int, count: int) -> None:
    """Measure one model."""
    dense, tokenizer = pretrained.load(model, dtype="float32")
    cut = evaluation_windows(data, tokenizer, length=length, windows=count + 1, bos="always")
    texts = windows(cut.ids, tokenizer.bos_token_id)
    print(f"{'windows':<24}{'perplexity':>10}{'early':>8}{'late':>8}")
    for rule, ids in texts.items():
        print(line(f"dense, {rule}", losses(dense, ids)))
    if calibration is None:
        return
    for sparsity, pruner, rule in itertools.product((0.5, 0.6, 0.7), ("wanda", "sparsegpt"), RULES):
        ids = calibration_windows(calibration, tokenizer, samples=64, length=length, bos=rule).ids
        pruned = copy.deepcopy(dense)
        recipe = neuroal.Recipe(sparsity, pruner, "uniform")
        neuroal.prune(pruned, tokenizer, recipe, windows=ids)
        for read, text in texts.items():
            name = f"{pruner} {sparsity:g} {rule}"
            print(f"{line(name, losses(pruned, text))}  on {read}")


if __name__ == "__main__":
    main()
