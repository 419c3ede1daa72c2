"""What a run will cost: block runs, seconds, memory and disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from neuroal.cost.first_steps import SearchStep, first_steps
from neuroal.cost.offload import Needs
from neuroal.cost.work import Work, generation_work
from neuroal.layout import Layout
from neuroal.model import memory
from neuroal.model.lazy_matrix import PART
from neuroal.model.memory import resident_memory
from neuroal.pruning.hooks import BATCH_BYTES
from neuroal.recipe import Recipe
from neuroal.run.setup import Setup, search_dtype
from neuroal.walk import batch_size
from neuroal.walk.statistics import resolve

_COPIES = 4  # float32 copies of a linear at work: weight, scores, sorted scores, mask


def generations(setup: Setup, steps: Sequence[SearchStep]) -> list[int]:
    """Return the number of candidates of every generation that is known before it runs."""
    counts = [s.candidates for s in steps if s.candidates]
    blocks = [s for s in steps if s.role == "block_ratios"]
    if len(blocks) > 1:  # what a strategy returns unmeasured is measured to compete
        counts += [1 for s in blocks if not s.candidates]
    elif setup.reads_deviation and not any(s.candidates for s in blocks):
        counts.append(1)  # the winner's own evaluation
    return counts


def work(
    setup: Setup, blocks: int, recipe: Recipe, steps: Sequence[SearchStep]
) -> Mapping[str, Work]:
    """Return the work of dense walk, search (first generations) and final pruning by phase.

    Args:
        setup: The plugins.
        blocks: Of the model.
        recipe: What is asked.
        steps: The search's steps, as far as they are known.
    """
    samples, search = recipe.samples, min(setup.search_samples, recipe.samples)
    phases: dict[str, Work] = {}
    if setup.measures:
        # The last block's output is not needed, only what is read of its inputs.
        reads = any(p.required_statistics() for p in setup.measures)
        phases["measure"] = Work(dense=samples * (blocks - (not reads)), measure=blocks)
    counts = generations(setup, steps)
    if counts:
        reference = setup.alignment.has("measure_output")  # the dense model's output, once
        phases["search"] = Work(dense=search * blocks if reference else 0)
        for count in counts:
            phases["search"] += generation_work(
                setup.alignment,
                setup.pruner,
                setup.reads_deviation,
                blocks=blocks,
                candidates=count,
                windows=search,
            )
    phases["prune"] = Work(final_prune=blocks)
    if any(p.required_statistics() for p in setup.final):
        phases["prune"] += Work(final_dense=samples * blocks, final_pruned=samples * (blocks - 1))
    return phases


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
        work=resident_memory() + largest + work,
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
    return max(alone, min(BATCH_BYTES, max(alike.values())))
