"""What a run will cost: block runs, seconds, memory and disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn

from neuroal.cost.first_steps import SearchStep, first_steps
from neuroal.cost.offload import Needs
from neuroal.cost.timings import Timings
from neuroal.layout import Layout
from neuroal.model import memory
from neuroal.model.lazy_matrix import PART
from neuroal.model.memory import held_memory
from neuroal.pruning.pruner import TOGETHER
from neuroal.recipe import Recipe
from neuroal.run.setup import Setup, search_dtype
from neuroal.search.alignment import generation_runs
from neuroal.walk.statistics import resolve
from neuroal.walk.walker import batch_size

_COPIES = 4  # float32 copies of a linear at work: weight, scores, sorted scores, mask


def generations(made: Setup, steps: Sequence[SearchStep]) -> list[int]:
    """Return the number of candidates of every generation that is known before it runs."""
    counts = [max(s.candidates or 0, 0) for s in steps]
    if made.reads_deviation and not any(counts[:-1]):
        counts.append(1)  # the winner's own evaluation
    return [count for count in counts if count]


def block_runs(made: Setup, found: Layout, recipe: Recipe, steps: Sequence[SearchStep]) -> int:
    """Return the block runs of dense walk, search (first generations) and final pruning."""
    blocks = len(found.blocks)
    runs = 0
    if made.measures:
        runs += (blocks - 1) * recipe.samples  # the last block's output is not needed
        runs += recipe.samples if any(p.required_statistics() for p in made.measures) else 0
    search = min(made.search_samples, recipe.samples)
    counts = generations(made, steps)
    for count in counts:
        runs += generation_runs(
            made.alignment, made.pruner, made.reads_deviation, blocks, count, search
        )
    if counts and made.alignment.has("measure_output"):
        runs += blocks * search  # the dense reference
    if _final_reads(made):
        runs += recipe.samples * (2 * blocks - 1)
    return runs


def _final_reads(made: Setup) -> bool:
    final = [p for p in (made.pruner, made.refiner) if p is not None]
    return any(p.required_statistics() for p in final)


def seconds(
    timings: Timings, made: Setup, found: Layout, recipe: Recipe, steps: Sequence[SearchStep]
) -> dict[str, float]:
    """Return the seconds of every phase by name; reading and writing files are not in them."""
    blocks, samples = len(found.blocks), recipe.samples
    search = min(made.search_samples, samples)
    phases = {}
    if made.measures:
        phases["measure"] = samples * blocks * timings.dense + blocks * timings.measure
    total = 0.0
    for count in generations(made, steps):
        dense = count * (blocks - 1) + 1
        total += search * (dense * timings.dense + count * blocks * timings.pruned)
        total += count * blocks * timings.prune
        if made.alignment.has("measure_output"):
            total += search * (blocks * timings.dense + (count + 1) * timings.logits)
    if total:
        phases["search"] = total
    final = blocks * timings.final_prune
    if _final_reads(made):
        final += samples * (blocks * timings.final_dense + (blocks - 1) * timings.final_pruned)
    return phases | {"prune": final}


def needs(made: Setup, found: Layout, recipe: Recipe, model: nn.Module, length: int) -> Needs:
    """Return the memory and disk of a run.

    Args:
        made: The plugins.
        found: The model's layout.
        recipe: What is asked.
        model: On any device, meta included: shapes are enough.
        length: Tokens per window.
    """
    steps = first_steps(made, found, recipe) if recipe.allocation is None else []
    size = _bytes_per_weight(recipe, model)
    weights = sum(p.numel() for p in model.parameters()) * size
    inside = [
        sum(p.numel() for p in model.get_submodule(b.name).parameters()) for b in found.blocks
    ]
    largest = max(inside) * size
    loads = next(model.parameters()).is_meta
    linears = found.linears.values()
    work = _COPIES * _pruned_together(made, found)
    device = _device(recipe, model)
    batch = recipe.batch or batch_size(device, max(length, 1))  # without data there is no length
    tokens = length * min(recipe.samples, batch)
    work += 4 * tokens * 4 * max(x.in_features for x in linears)  # what a batch holds in a block
    needed = {s for p in made.plugins for s in p.required_statistics()}
    if any(a.name == "gram" for a in resolve(needed)):
        work += 2 * 4 * sum({x.group: x.in_features**2 for x in found.blocks[0].linears}.values())
    cast = search_dtype(recipe)
    state = size if cast is None else cast.itemsize
    if cast is not None:
        work += max(inside) * state  # the block that the search runs
    at_output = made.alignment.has("measure_output")
    around = _around(model, found, size, whole=at_output)
    if at_output:
        vocabulary = getattr(model.config, "vocab_size", 0)
        work += 4 * tokens * vocabulary * 4  # dense and pruned logits, and what is made of them
    search = min(made.search_samples, recipe.samples)
    together = _together(made, steps, search)
    width = max(x.in_features for x in linears if x.group == 0)
    compared = _compared(found) if any(a.compares for a in resolve(needed)) else 0
    # Embeddings, what every candidate's (or the one pruned model's) blocks handed on and the block
    # at work hands on, the dense model's behind its last block, and inputs that are compared.
    searched = ((together + search * (2 + at_output)) * width + search * compared) * state
    activations = length * max(searched, (search + 3 * recipe.samples) * width * size)
    # Read, handed on, what came before, and what else the block is given.
    at_hand = tokens * (4 * width + compared) * size
    return Needs(
        work=held_memory() + largest + work,
        weights=weights if loads else 0,
        streamed=around + largest if loads else 0,
        activations=activations,
        batch=min(at_hand, activations),
        checkpoint=weights,
    )


def _around(model: nn.Module, found: Layout, size: int, whole: bool) -> int:
    """Return the bytes around streamed blocks: all but matrices, and what is read of one of these.

    Args:
        model: The model.
        found: Its layout.
        size: Bytes of a weight.
        whole: Whether one is read as a whole: the head, by an output metric.
    """
    prefixes = tuple(f"{b.name}." for b in found.blocks)
    outside = [p for n, p in model.named_parameters() if not n.startswith(prefixes)]
    matrices = [p.numel() * size for p in outside if p.dim() == 2]
    largest = max(matrices, default=0)
    read = min(PART, largest) + (largest if whole else min(PART, largest))
    return sum(p.numel() * size for p in outside if p.dim() != 2) + read


def _device(recipe: Recipe, model: nn.Module) -> torch.device:
    own = next(model.parameters()).device
    return torch.device(memory.device_of(recipe.device)) if own.type == "meta" else own


def _together(made: Setup, steps: Sequence[SearchStep], search: int) -> int:
    """Return the windows of all candidates that pass the blocks side by side."""
    # Block strategies advance side by side, and the row step after them.
    blocks = sum(s.widest for s in steps if s.role == "block_ratios")
    rows = sum(s.widest for s in steps if s.role == "row_ratios")
    alone = search if generations(made, steps) else 0  # a winner that is measured by itself
    return max(blocks, rows, alone)


def _compared(found: Layout) -> int:
    """Return the inputs of all groups of a block: what a token has to be compared by."""
    return max(
        sum({x.group: x.in_features for x in b.linears if x.expert is None}.values())
        for b in found.blocks
    )


def _bytes_per_weight(recipe: Recipe, model: nn.Module) -> int:
    first = next(model.parameters())
    asked = recipe.dtype if first.is_meta else "auto"  # a model in memory stays as it is
    dtype: torch.dtype = first.dtype if asked == "auto" else getattr(torch, asked)
    return dtype.itemsize


def _pruned_together(made: Setup, found: Layout) -> int:
    """Return the bytes in float32 of the linears that one call of the pruner has."""
    alone = 4 * max(x.weights for x in found.linears.values())
    if not made.pruner.has("prune_linears"):
        return alone
    alike: Counter[object] = Counter()
    for block in found.blocks:
        for x in block.linears:
            alike[block.name, x.out_features, x.in_features] += 4 * x.weights
    return max(alone, min(TOGETHER, max(alike.values())))
