"""A method for those who name none: presets that say how much to spend, and name the pruner too."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from neuroal.errors import PluginError, UsageError, nearest
from neuroal.plugins import available, in_file, load_top_up
from neuroal.recipe import TOP_UP_ROLES, Recipe
from neuroal.types import TopUp

DEFAULT = "medium"
METHOD = frozenset({"pruner", "top_up", "allocation", "ratios", "comparison", *TOP_UP_ROLES})


def efforts() -> dict[str, TopUp]:
    """Return the installed presets that name a pruner, in the order of what they were measured at.

    The first leaves the most excess; those that were not measured come last. A preset that does not
    load is none.
    """
    found: dict[str, TopUp] = {}
    for listing in available("top_up"):
        if listing.status != "ok":
            continue
        try:
            preset = load_top_up(listing.name)
        except PluginError:  # `neuroal plugins check` says why
            continue
        if preset.pruner is not None:
            found[listing.name] = preset
    order = {name: -min(preset.excess.values(), default=0.0) for name, preset in found.items()}
    return {name: found[name] for name in sorted(found, key=lambda name: (order[name], name))}


def names_method(recipe: Recipe, given: Collection[str]) -> bool:
    """Return whether a recipe, of which the fields `given` were asked for, names a method.

    The paper's budget stands for the paper's method, and ratios are one of their own.
    """
    return bool(METHOD & set(given)) or recipe.gives_ratios or recipe.budget == "paper"


def with_effort(recipe: Recipe, effort: str | None, given: Collection[str]) -> Recipe:
    """Return a recipe with the method of an effort where it was not asked for another.

    Args:
        recipe: What to do.
        effort: A preset that names a pruner; None is the default effort, and counts only where
            the recipe names no method.
        given: The fields of the recipe that were asked for, and are not changed.

    Raises:
        UsageError: There is no such effort, or something stands against it.
    """
    if effort is None:
        if names_method(recipe, given):
            return recipe
        effort = DEFAULT
    elif recipe.gives_ratios or "top_up" in given:
        what = f"does top-up '{recipe.top_up}'" if "top_up" in given else "do given ratios"
        raise UsageError(f"effort '{effort}' chooses the ratios, and so {what}: drop one")
    installed = {x.name for x in available("top_up")}
    if not in_file(effort) and effort.rpartition(":")[2] not in installed:
        raise UsageError(f"unknown effort '{effort}': {nearest(effort, efforts())}")
    pruner = load_top_up(effort).pruner
    if pruner is None:
        known = ", ".join(efforts())
        raise UsageError(f"'{effort}' is a top-up that names no pruner: efforts are {known}")
    return replace(recipe, top_up=effort, pruner=recipe.pruner if "pruner" in given else pruner)
