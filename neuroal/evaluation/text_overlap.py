"""Whether a model was calibrated on what it is evaluated on.

A run's calibration windows are drawn anew from its recipe and compared with the evaluated ones by
their sequences of tokens: what both share word for word makes a perplexity look better than it is.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from neuroal.data.calibration import calibration_windows
from neuroal.data.source import parse_source
from neuroal.data.windows import Windows
from neuroal.errors import NeuroalError
from neuroal.model import files, places
from neuroal.recipe import Recipe

LOG = logging.getLogger(__name__)

LENGTH = 50  # tokens; Lee et al. 2022 call texts duplicates that share as many
WORTH_A_WARNING = 0.05
_MULTIPLIER, _INCREMENT = np.uint64(6364136223846793005), np.uint64(1442695040888963407)


def overlap(calibration: Tensor, evaluation: Tensor, length: int = LENGTH) -> float:
    """Return how much of one set of token windows is in the other, word for word.

    Args:
        calibration: Token ids, (samples, length), int64.
        evaluation: Token ids of the same tokenizer, (windows, length), int64.
        length: Tokens of the compared sequences; at most a window's.

    Returns:
        In [0, 1]: of all sequences of `length` tokens in one set, the share that the other has
        too; of the two shares the larger, for either set may be a small part of the other.
    """
    length = min(length, calibration.shape[1], evaluation.shape[1])
    one, other = _sequences(calibration, length), _sequences(evaluation, length)
    return max(float(np.isin(one, other).mean()), float(np.isin(other, one).mean()))


def _sequences(ids: Tensor, length: int) -> npt.NDArray[np.uint64]:
    """Return a 64-bit hash of every sequence of `length` tokens within a window."""
    tokens = ids.numpy().astype(np.uint64)
    count = tokens.shape[1] - length + 1
    hashes = np.zeros((tokens.shape[0], count), np.uint64)
    for start in range(length):  # a polynomial in the tokens, modulo 2^64
        hashes = hashes * _MULTIPLIER + tokens[:, start : start + count] + _INCREMENT
    return hashes.ravel()


def warn_of_overlap(calibration: Windows, evaluation: Windows) -> float:
    """Log a warning where calibration and evaluation share text, and return how much."""
    share = overlap(calibration.ids, evaluation.ids)
    if share >= WORTH_A_WARNING:
        LOG.warning(
            "calibration on '%s' and evaluation on '%s' overlap: %.0f %% of the text is the same "
            "in both, so the perplexity flatters the pruned model",
            calibration.source,
            evaluation.source,
            100 * share,
        )
    return share


def calibration_of(model: str, tokenizer: Any) -> Windows | None:
    """Draw the calibration windows of a pruned model again.

    Args:
        model: A folder, a hub name or "demo".
        tokenizer: The model's.

    Returns:
        The windows; None where the model is not the output of a run, where its text has changed,
        or where it comes from the hub, which is not asked for this.
    """
    folder = Path(places.locate(model))
    if not (folder / files.MARKER).is_file():
        return None
    report = files.read_report(folder, needed=())
    data, recipe = report.get("data"), report.get("recipe")
    if not isinstance(data, Mapping) or not isinstance(recipe, Mapping):
        return None
    try:
        asked = Recipe.from_json(recipe)
        source = parse_source(str(data["source"]))
        if source.on_hub:
            return None
        windows = calibration_windows(
            source,
            tokenizer,
            samples=data["windows"],
            length=data["length"],
            seed=asked.seed,
            bos="always" if data.get("bos") else "never",
            pack_documents=asked.pack_documents,
        )
    except (NeuroalError, KeyError) as error:
        LOG.info("calibration of '%s' is not at hand to compare with: %s", model, error)
        return None
    if windows.sha256 != data.get("sha256"):
        LOG.info("calibration text of '%s' is no longer what it was", model)
        return None
    return windows
