"""What an earlier run left: its allocation, as far as this run can have it, or all of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from neuroal.data.windows import Windows
from neuroal.errors import UsageError
from neuroal.layout import Layout, find
from neuroal.model import files, pretrained, run_folder
from neuroal.model.blocks import state_sha256
from neuroal.pruning import allocation
from neuroal.pruning.allocation import Allocation
from neuroal.pruning.hooks import updates_weights
from neuroal.recipe import Recipe
from neuroal.run.report import Report
from neuroal.run.setup import Setup, no_importance, no_rows
from neuroal.types import Importance, PrunerTraits


def earlier_allocation(
    setup: Setup, recipe: Recipe, layout: Layout
) -> tuple[Allocation | None, list[str]]:
    """Return the allocation that a recipe names, and a note on what of it is left out.

    Ratios or importance of rows are left out where the pruner or the pattern has no use for them,
    and importance of inputs where the pruner moves weights.

    Returns:
        The allocation, or None where the recipe names none.

    Raises:
        UsageError: `--comparison` alone keeps its rows from counting.
        NeuroalError: It cannot be read, or is of another model.
    """
    if recipe.allocation is None:
        return None, []
    earlier = allocation.read(Path(recipe.allocation), layout)
    asked, can = recipe.comparison, setup.pruner.traits(PrunerTraits)
    weighs_inputs = any(x.inputs is not None for x in earlier.importance.values())
    if earlier.importance:
        what = "importance of rows" + (" and inputs" if weighs_inputs else "")
        why = no_importance(setup.pattern, asked)
        otherwise = no_importance(setup.pattern, None)
    elif earlier.rows:
        what = "ratios of rows"
        why = no_rows(setup.pruner.name, can, setup.pattern, setup.comparison)
        otherwise = no_rows(setup.pruner.name, can, setup.pattern, can.comparison)
    else:
        return earlier, []
    if why is None and weighs_inputs and updates_weights(setup.pruner):
        rows_alone = {name: Importance(x.rows) for name, x in earlier.importance.items()}
        kept = dataclasses.replace(earlier, importance=rows_alone)
        named = f"importance of inputs in allocation '{recipe.allocation}'"
        return kept, [f"{named} left out: pruner '{setup.pruner.name}' moves weights"]
    if why is None:
        return earlier, []
    named = f"{what} in allocation '{recipe.allocation}'"
    if otherwise is None:
        raise UsageError(f"{named} cannot be used here: {why}: drop --comparison {asked}")
    kept = dataclasses.replace(earlier, rows={}, importance={})
    return kept, [f"{named} left out: {why}"]


def finished_run(
    recipe: Recipe,
    setup: Setup,
    model: nn.Module | str | Path,
    windows: Tensor | None,
    out: Path,
) -> Report | None:
    """Return the report of the same run if `out` holds it; a model in memory gets its weights.

    Raises:
        UsageError: `out` holds another run.
    """
    if isinstance(model, nn.Module):
        sha256: str | None = state_sha256(model)
    else:
        sha256 = files.fingerprint(str(model))
    same: dict[str, Any] = {"plugins": setup.provenance}
    if sha256 is not None:  # that of a hub's model is known once it is loaded
        same["model"] = {"name": model_name(recipe, model), "sha256": sha256}
    if windows is not None:
        same["data"] = Windows(windows.cpu(), "windows").to_json()
    done = run_folder.finished(out, recipe.to_json(), **same)
    if done is None:
        return None
    if isinstance(model, nn.Module):
        pretrained.restore(model, out, find(model))
    return Report.of(done)


def model_name(recipe: Recipe, model: object) -> str:
    """Return the name by which a model is reported."""
    return recipe.model or type(model).__name__
