"""The calibration windows of a run: those given, or those of the recipe's source."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from neuroal.data import calibration
from neuroal.data.calibration import Windows
from neuroal.data.source import Source
from neuroal.errors import UsageError
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
        calibration.check_sizes(ids.shape[0], ids.shape[1], context)
        return calibration.windows_of(ids.cpu(), Source("windows", "tensor", ""), vocabulary)
    if recipe.calibration is None:
        return None
    make = partial(
        calibration.calibration_windows,
        recipe.calibration,
        tokenizer,
        samples=recipe.samples,
        length=recipe.length,
        seed=recipe.seed,
        context=context,
        vocabulary=vocabulary,
        progress=progress,
    )
    return shared.windows(recipe, make)
