"""The windows of a run: for calibration those given or of the recipe's source; for evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from neuroal.data import calibration
from neuroal.data.sizes import check_sizes
from neuroal.data.source import Source, parse_source
from neuroal.data.windows import Windows, beginning, on_beginning, windows_of
from neuroal.errors import UsageError
from neuroal.evaluation.perplexity import windows_for
from neuroal.evaluation.text_overlap import warn_of_overlap
from neuroal.model import pretrained
from neuroal.recipe import Recipe
from neuroal.search.measurements import SharedMeasurements


def calibrate(
    recipe: Recipe,
    model: nn.Module,
    tokenizer: Any,
    ids: Tensor | None,
    shared: SharedMeasurements,
    *,
    progress: bool = False,
) -> Windows | None:
    """Return the calibration windows; None where there are none.

    They are `ids`, int64 `(samples, length)`, or cut from the recipe's source, unless `shared` has
    those of an earlier run; context and vocabulary of the model, or of its skeleton, bound them.

    Raises:
        UsageError: The ids or the source are wrong.
        NeuroalError: The source cannot be read, or holds too little.
    """
    config = getattr(model, "config", None)
    context = pretrained.context_length(config)
    vocabulary = pretrained.vocabulary_size(config)
    if ids is not None:
        if ids.dim() != 2 or ids.dtype != torch.int64:
            raise UsageError("windows must be int64 (samples, length)")
        if recipe.bos == "always" or recipe.pack_documents:
            what = "bos" if recipe.bos == "always" else "pack_documents"
            raise UsageError(f"windows are taken as they are: {what} is for a calibration source")
        check_sizes(ids.shape[0], ids.shape[1], context)
        return windows_of(ids.cpu(), Source("windows", "tensor", ""), vocabulary)
    if recipe.calibration is None:
        return None
    make = partial(
        calibration.calibration_windows,
        recipe.calibration,
        tokenizer,
        samples=recipe.samples,
        length=recipe.length,
        seed=recipe.seed,
        bos=recipe.window_bos,
        pack_documents=recipe.pack_documents,
        context=context,
        vocabulary=vocabulary,
        progress=progress,
    )
    return shared.windows(recipe, make)


class Look(NamedTuple):
    """What is known of a run's calibration text before it runs.

    Attributes:
        data: Its windows; None where there are none, or where the hub would have to be asked.
        notes: What should be known, one line each.
    """

    data: Windows | None
    notes: tuple[str, ...]


def look(recipe: Recipe, model: nn.Module, tokenizer: Any) -> Look:
    """Take the windows that a run would have, for its plan; of the hub's, only how they begin.

    Raises:
        UsageError: The source is wrong.
        NeuroalError: It cannot be read, or holds too little.
    """
    if recipe.calibration is not None and parse_source(recipe.calibration).on_hub:
        bos = recipe.window_bos
        return Look(None, on_beginning(beginning(tokenizer, bos), bos))
    data = calibrate(recipe, model, tokenizer, None, SharedMeasurements())
    return Look(data, () if data is None else data.notes)


def texts_to_evaluate(
    recipe: Recipe,
    model: nn.Module,
    tokenizer: Any,
    known: Mapping[str, Windows],
    calibration: Windows | None,
    *,
    progress: bool = False,
) -> list[Windows]:
    """Return the windows of every text that a recipe evaluates on, and warn of calibration on it.

    `known` are those that have been cut, by their sources.

    Raises:
        NeuroalError: A source cannot be read, or holds too little or the wrong thing.
    """
    texts = []
    for source in recipe.evaluate:
        text = known.get(source) or windows_for(
            getattr(model, "config", None),
            source,
            tokenizer,
            length=recipe.evaluate_length,
            windows=recipe.evaluate_windows,
            bos=recipe.window_bos,
            progress=progress,
        )
        if calibration is not None:
            warn_of_overlap(calibration, text)
        texts.append(text)
    return texts
