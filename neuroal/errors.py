"""Errors that a user can act on: one line that names the culprit and the cure."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class NeuroalError(Exception):
    """Something outside the code is wrong: a file, a model, a text, a number.

    The message is one line. The command line prints it and exits with `exit_code`.
    """

    exit_code = 1


class UsageError(NeuroalError):
    """What was asked for does not exist or makes no sense; known before any work starts."""

    exit_code = 2


class PluginError(NeuroalError):
    """A plugin failed; the message names plugin, distribution, version and hook."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return the half sentence that helps after a misspelt `name`.

    Args:
        name: The misspelt name.
        valid: Every name that would have been accepted.

    Returns:
        `did you mean 'wanda'?` if something is close, else `choose from a, b, c`.
    """
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"choose from {', '.join(names)}" if names else "there is nothing to choose from"


def overflows(what: str, dtype: str, option: str = "--dtype") -> str:
    """Return the sentence on numbers of a model that are not finite, with the dtype that helps.

    Args:
        what: Which numbers: `the input of 'model.layers.0.mlp.up_proj' is`.
        dtype: In which the model runs: `float16`.
        option: That sets it.
    """
    wider = {"float16": "bfloat16 or float32", "bfloat16": "float32"}.get(dtype)
    cure = f"give {option} {wider}" if wider else "its weights or inputs are too large"
    return f"{what} not finite: the model overflows in {dtype}; {cure}"
