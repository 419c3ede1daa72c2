"""What a prepared run costs: the work of its phases, and bytes of memory and disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from neuroal.cost.offload import Needs, activations_folder, decide
from neuroal.cost.preparation import Prepared
from neuroal.cost.texts import TextSize, in_longest
from neuroal.cost.work import Work, generation_work, reconstruction_work
from neuroal.data.source import parse_source, peek
from neuroal.errors import NeuroalError
from neuroal.evaluation.perplexity import LOGITS_BYTES, forward_windows
from neuroal.layout import Layout, Linear
from neuroal.model import memory, pretrained
from neuroal.model.files import check_disk
from neuroal.model.lazy_matrix import PART
from neuroal.model.memory import resident_memory
from neuroal.pruning.hooks import BATCH_BYTES
from neuroal.run.evaluation import tokens_at_once
from neuroal.run.reconstruction import reads_dense, reads_dense_inputs, stages
from neuroal.run.setup import Setup, search_dtype
from neuroal.types import Accumulator
from neuroal.units import size
from neuroal.walk import batch_size
from neuroal.walk.statistics import resolve

_SOLVER = 12  # float32 copies of a linear while its weights are solved for
_MASTERS = 8  # of a block that is trained: module, masters, gradients, two moments, the best so far
_GRAPH = 4  # times the inputs and outputs of a block's linears, for what autograd keeps
_DRAWN = 16  # bytes of a token: in the list that is drawn, and in the tensor
_LIBRARIES = 48 << 20  # bytes of what is imported, and allocated by kernels, only in the run
_METRIC, _TOKENS = 6, 128  # copies that an output metric makes of the logits of so many tokens
_COPIES = 4  # float32 copies of a linear at work: weight, scores, sorted scores, mask


def generations(prepared: Prepared) -> list[int]:
    """Return the candidates of every generation that is known before it runs, at most."""
    counts = [count for s in prepared.steps for count in s.generations]
    blocks = [s for s in prepared.steps if s.role == "block_ratios"]
    if len(blocks) > 1:  # what a strategy returns unmeasured is measured to compete
        counts += [1 for s in blocks if not s.generations]
    elif prepared.setup.reads_deviation and not any(s.generations for s in blocks):
        counts.append(1)  # the winner's own evaluation
    return counts


def work(prepared: Prepared, texts: Sequence[TextSize] = ()) -> Mapping[str, Work]:
    """Return the work of dense walk, search and final pruning by phase.

    Of a search that does not say what it costs at most, it is that of the first generations.

    And of the evaluation before and after, on texts whose size is known.
    """
    setup, blocks = prepared.setup, len(prepared.layout.blocks)
    pruned_blocks = len({x.block for x in prepared.rules.pruned(prepared.layout)})
    samples, search = prepared.recipe.samples, prepared.search_windows
    phases: dict[str, Work] = {}
    if setup.measures:
        # The last block's output is not needed, only what is read of its inputs.
        reads = any(p.required_statistics() for p in setup.measures)
        phases["measure"] = Work(dense=samples * (blocks - (not reads)), measure=blocks)
    counts = generations(prepared)
    if counts:
        reference = setup.alignment.has("measure_output")  # the dense model's output, once
        phases["search"] = Work(dense=search * blocks if reference else 0)
        for count in counts:
            phases["search"] += generation_work(
                setup.alignment,
                setup.search_pruner,
                setup.reads_deviation,
                blocks=blocks,
                candidates=count,
                windows=search,
                unpruned=blocks - pruned_blocks,
            )
    phases["prune"] = Work(final_prune=pruned_blocks)
    new_values = setup.reconstruction
    if new_values is not None:
        phases["prune"] += reconstruction_work(new_values, prepared.layout, samples)
    if new_values is not None or any(p.required_statistics() for p in setup.final):
        phases["prune"] += Work(final_dense=samples * blocks, final_pruned=samples * (blocks - 1))
    windows, _ = in_longest(texts)
    if windows:
        phases["evaluate"] = Work(evaluate=2 * windows * blocks, losses=2 * windows)
    return phases


def check_space(
    prepared: Prepared, stream: bool | None, spill: bool | None, out: Path | None
) -> None:
    """Refuse windows of a text for which memory or disk are too small, before they are drawn.

    Rows of token ids are as many as there are, whatever is asked for. `stream`, `spill` and `out`
    are those of the run.

    Raises:
        NeuroalError: They are too small.
    """
    recipe = prepared.recipe
    source = None if recipe.calibration is None else parse_source(recipe.calibration)
    holds = None if source is None else peek(source)
    if source is None or holds == "tokens" or (holds is None and source.kind == "json"):
        return
    drawn, free = _DRAWN * recipe.samples * prepared.length, memory.available_memory("cpu")
    if free is not None and drawn > free:
        raise NeuroalError(
            f"{recipe.samples:,} windows of {prepared.length:,} tokens take {size(drawn)} of "
            f"memory, {size(free)} are available: give fewer --samples or a shorter --length"
        )
    needed = needs(prepared, prepared.length)
    path = recipe.model if next(prepared.model.parameters()).is_meta else None
    free = memory.available_memory(memory.device_of(recipe.device))
    offload, _ = decide(needed, path, stream, spill, free)
    check_disk(activations_folder(out), needed.disk(offload) if out else 0)


def needs(
    prepared: Prepared, length: int, texts: Sequence[TextSize] = (), *, saves_masks: bool = False
) -> Needs:
    """Return the memory and disk of a run on windows of `length` tokens; 0 without data.

    `texts` are those that it is evaluated on; it may save masks.
    """
    recipe, setup, layout = prepared.recipe, prepared.setup, prepared.layout
    first = next(prepared.model.parameters())
    loads = first.is_meta  # a model in memory stays where and as it is
    device = torch.device(memory.device_of(recipe.device)) if loads else first.device
    asked = recipe.dtype if loads else "auto"
    dtype: torch.dtype = first.dtype if asked == "auto" else getattr(torch, asked)
    size = dtype.itemsize
    numbers = sum(p.numel() for p in prepared.model.parameters())
    weights = numbers * size
    largest = _largest_block(prepared) * size
    reads = prepared.reads_data
    tokens = length * min(recipe.samples, recipe.batch or batch_size(device, max(length, 1)))
    tokens = tokens if reads else 0
    required = resolve({s for p in setup.plugins for s in p.required_statistics()})
    compared = _compared(layout) if any(a.compares for a in required) else 0
    width = max(x.in_features for x in layout.linears.values() if x.group == 0)
    activations = length * _activations(prepared, width, compared, size) if reads else 0
    at_once = tokens_at_once(recipe, length)
    for text in texts:
        evaluated = max(at_once, _forward_tokens(prepared, text))
        activations = max(activations, 3 * evaluated * width * size)
    # Of a batch: inputs and outputs of the block, of the block before, and its other arguments.
    at_hand = tokens * (4 * width + compared) * size
    # Files are mapped into memory while their weights are read, and are not what stays where these
    # are of another dtype.
    cast = loads and dtype != first.dtype
    process = resident_memory() + _LIBRARIES
    if loads and recipe.model is not None:
        process += pretrained.tokenizer_bytes(recipe.model)
    return Needs(
        process=process,
        work=largest + max(_at_work(prepared, tokens, size), _at_evaluation(prepared, texts, size)),
        weights=weights if loads else 0,
        streamed=_outside_blocks(prepared, size, bool(texts)) + largest if loads else 0,
        activations=activations,
        batch=min(at_hand, activations),
        checkpoint=weights,
        masks=saves_masks * -(-sum(x.weights for x in prepared.rules.pruned(layout)) // 8),
        loading=cast * numbers * first.dtype.itemsize,
    )


def _largest_block(prepared: Prepared) -> int:
    """Return the number of parameters of the largest block."""
    model: nn.Module = prepared.model
    modules = [model.get_submodule(b.name) for b in prepared.layout.blocks]
    return max(sum(p.numel() for p in module.parameters()) for module in modules)


def _at_work(prepared: Prepared, tokens: int, size: int) -> int:
    """Return the bytes at work on one block and a batch of `tokens` tokens, at their peak.

    A number of the model's own dtype has `size` bytes.
    """
    setup, layout = prepared.setup, prepared.layout
    total = _COPIES * _pruned_together(setup, layout)
    total += 4 * tokens * 4 * max(x.in_features for x in layout.linears.values())  # in a block
    required = resolve({s for p in setup.plugins for s in p.required_statistics()})
    if any(a.name == "gram" for a in required):
        squares = {x.group: x.in_features**2 for x in layout.blocks[0].linears}
        total += 2 * 4 * sum(squares.values())
    searching = 0
    dtype = search_dtype(prepared.recipe)
    if dtype is not None:
        searching += _largest_block(prepared) * dtype.itemsize  # the block that the search runs
    if setup.alignment.has("measure_output"):
        vocabulary = pretrained.vocabulary_size(prepared.model.config) or 0
        searched = min(tokens, prepared.search_windows * prepared.length)
        # Logits of the dense model and of a candidate, and what the metric makes of some tokens of
        # them in float32.
        searching += vocabulary * (2 * size * searched + _METRIC * 4 * min(searched, _TOKENS))
    return total + max(searching, _reconstructing(prepared, tokens))


def _reconstructing(prepared: Prepared, tokens: int) -> int:
    """Return the bytes that give a block's weights new values: of its linears, or of the whole."""
    plugin, layout = prepared.setup.reconstruction, prepared.layout
    if plugin is None:
        return 0
    linears = whole = 0
    if plugin.has("reconstruct_linear"):
        accumulators = resolve(plugin.required_statistics())
        collected = max(
            sum(_state_bytes(accumulators, width) for width in _widths(stage))
            for block in layout.blocks
            for stage in stages(block)
        )
        linears = 2 * collected + _SOLVER * 4 * max(x.weights for x in layout.linears.values())
    if plugin.has("reconstruct_block"):
        inside = max(sum(x.in_features + x.out_features for x in b.linears) for b in layout.blocks)
        whole = 4 * (_MASTERS * _largest_block(prepared) + _GRAPH * tokens * inside)
    return max(linears, whole)


def _widths(stage: Sequence[Linear]) -> list[int]:
    """Return the inputs of every group of a stage."""
    return list({x.group: x.in_features for x in stage}.values())


def _state_bytes(accumulators: Sequence[Accumulator], width: int) -> int:
    """Return the bytes of what is collected of one input."""
    states = [a.init(width, torch.device("meta")) for a in accumulators]
    return sum(t.numel() * t.element_size() for state in states for t in state.values())


def _at_evaluation(prepared: Prepared, texts: Sequence[TextSize], size: int) -> int:
    """Return the bytes of logits at their peak, and of what the loss makes of them in float32."""
    vocabulary = pretrained.vocabulary_size(prepared.model.config) or 0
    logits = [_forward_tokens(prepared, text) * vocabulary for text in texts]
    return max((2 * size * n + 3 * min(4 * n, LOGITS_BYTES) for n in logits), default=0)


def _forward_tokens(prepared: Prepared, text: TextSize) -> int:
    """Return the tokens of a forward pass of the evaluation."""
    vocabulary = pretrained.vocabulary_size(prepared.model.config) or 1
    return text.length * forward_windows(text.length, vocabulary)


def _activations(prepared: Prepared, width: int, compared: int, size: int) -> int:
    """Return the bytes per token position of all activations that are held between blocks.

    The hidden state has `width` numbers, of `size` bytes in the model's own dtype; a token is
    compared by `compared` inputs.
    """
    search, dtype = prepared.search_windows, search_dtype(prepared.recipe)
    at_output = prepared.setup.alignment.has("measure_output")
    # The embeddings, what the blocks of every candidate have passed on and the block at work passes
    # on, the dense model's output, and inputs that are compared.
    states = _together(prepared) + search * (2 + at_output)
    searched = (states * width + search * compared) * (dtype.itemsize if dtype else size)
    samples = prepared.recipe.samples
    pruned = (search + 3 * samples) * width * size
    plugin = prepared.setup.reconstruction
    if plugin is not None and reads_dense(plugin):  # the dense model's own, and what is compared
        inputs = _compared(prepared.layout) if reads_dense_inputs(plugin) else 0
        pruned += samples * (2 * width + inputs) * size
    return max(searched, pruned)


def _outside_blocks(prepared: Prepared, size: int, evaluates: bool) -> int:
    """Return the bytes in memory with streamed blocks, for weights of `size` bytes.

    That is everything outside the blocks but matrices, and what is read of one matrix at a time;
    the head is read as a whole by an output metric and by the evaluation.
    """
    prefixes = tuple(f"{b.name}." for b in prepared.layout.blocks)
    model: nn.Module = prepared.model
    outside = [p for n, p in model.named_parameters() if not n.startswith(prefixes)]
    largest = max((p.numel() * size for p in outside if p.dim() == 2), default=0)
    part = min(PART, largest)
    reads_head = evaluates or prepared.setup.alignment.has("measure_output")
    read = part + (largest if reads_head else part)
    return sum(p.numel() * size for p in outside if p.dim() != 2) + read


def _together(prepared: Prepared) -> int:
    """Return the windows of all candidates that pass the blocks side by side."""
    # Block strategies advance side by side, and the row step after them.
    blocks = sum(s.widest for s in prepared.steps if s.role == "block_ratios")
    rows = sum(s.widest for s in prepared.steps if s.role == "row_ratios")
    # A winner may be measured by itself.
    alone = prepared.search_windows if generations(prepared) else 0
    return max(blocks, rows, alone)


def _compared(layout: Layout) -> int:
    """Return the inputs of all groups of a block: what a token has to be compared by."""
    return max(
        sum({x.group: x.in_features for x in b.linears if x.expert is None}.values())
        for b in layout.blocks
    )


def _pruned_together(setup: Setup, layout: Layout) -> int:
    """Return the bytes in float32 of the linears that one call of the pruner has."""
    alone = 4 * max(x.weights for x in layout.linears.values())
    if not any(x.has("prune_linears") for x in (setup.pruner, setup.search_pruner)):
        return alone
    alike: Counter[object] = Counter()
    for block in layout.blocks:
        for x in block.linears:
            alike[block.name, x.out_features, x.in_features] += 4 * x.weights
    return max(alone, min(BATCH_BYTES, max(alike.values())))
