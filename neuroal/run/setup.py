"""From a recipe to the plugins that take part, and whether they fit together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from neuroal.errors import NeuroalError, UsageError
from neuroal.layout import Layout, kept_linears
from neuroal.plugins import (
    Plugin,
    check_requirements,
    listing_of,
    load,
    load_top_up,
    refuse_unused,
)
from neuroal.pruning.hooks import updates_weights
from neuroal.pruning.targets import Rules
from neuroal.recipe import TOP_UP_ROLES, Recipe
from neuroal.types import (
    Comparison,
    Pattern,
    PrunerTraits,
    RefinerTraits,
    RowRatiosTraits,
    TopUp,
)
from neuroal.walk.statistics import resolve

UNIFORM = "uniform"
KEPT = "asked to be kept"


@dataclass(frozen=True)
class Setup:
    """The plugins of a run, checked against each other.

    Attributes:
        search_pruner: What prunes the candidates of the search: the pruner, or another.
        block_ratios: One or more; empty where ratios are given.
        row_ratios: None where ratios are given.
        reconstruction: None where surviving weights stay as the pruner leaves them.
        comparison: Scores compete per row or per matrix.
        pattern: N:M or None.
        search_samples: Calibration windows that the search may use.
        notes: What a preset would have done and cannot, one line each.
    """

    pruner: Plugin
    search_pruner: Plugin
    block_ratios: tuple[Plugin, ...]
    row_ratios: Plugin | None
    alignment: Plugin
    refiner: Plugin | None
    reconstruction: Plugin | None
    comparison: Comparison
    pattern: Pattern | None
    search_samples: int
    notes: tuple[str, ...]

    @property
    def plugins(self) -> tuple[Plugin, ...]:
        """Return every plugin of the run."""
        own = (self.reconstruction,) if self.reconstruction else ()
        search = (self.search_pruner,) if self.search_pruner is not self.pruner else ()
        return (
            *(self.pruner, *search, *self.strategies, self.alignment),
            *(*self.final[1:], *own),
        )

    @property
    def provenance(self) -> list[dict[str, Any]]:
        """Return what identifies every plugin, as JSON values: the search's own pruner as such."""
        own = self.search_pruner is not self.pruner
        return [
            p.provenance() | ({"role": "search_pruner"} if own and p is self.search_pruner else {})
            for p in self.plugins
        ]

    @property
    def weighs_inputs(self) -> bool:
        """Return whether inputs may have importance: where no pruner moves weights."""
        return not any(updates_weights(x) for x in (self.pruner, self.search_pruner))

    @property
    def search_comparison(self) -> Comparison:
        """Return how scores compete in the search."""
        if self.search_pruner is self.pruner:
            return self.comparison
        comparison: Comparison = self.search_pruner.traits(PrunerTraits).comparison
        return comparison

    @property
    def strategies(self) -> tuple[Plugin, ...]:
        """Return the plugins of the search's steps, in order."""
        return (*self.block_ratios, *((self.row_ratios,) if self.row_ratios else ()))

    @property
    def measures(self) -> tuple[Plugin, ...]:
        """Return the strategies that have `measure_block`, for which there is a dense walk."""
        return tuple(p for p in self.strategies if p.has("measure_block"))

    @property
    def final(self) -> tuple[Plugin, ...]:
        """Return the plugins that make the final masks: the pruner, and the refiner if any."""
        return (self.pruner, *((self.refiner,) if self.refiner else ()))

    @property
    def reads_deviation(self) -> bool:
        """Return whether the row step reads the deviation of the block step's winner."""
        rows = self.row_ratios
        return rows is not None and "input_norm" in rows.statistic_names()

    @property
    def reads_data(self) -> bool:
        """Return whether the run reads activations, as far as it is known without the model."""
        final = any(p.required_statistics() for p in self.final) or self.reconstruction is not None
        return final or self.reads_deviation or len(self.block_ratios) > 1

    def rules(self, recipe: Recipe, layout: Layout) -> Rules:
        """Return how ratios become counts.

        Raises:
            UsageError: A pattern of `keep` or `only` means no linear, or what is left to prune
                cannot have the sparsity.
            NeuroalError: M does not divide the inputs of a linear.
        """
        dense = stays_dense(layout, recipe.keep, recipe.only, self.pattern)
        odd = next((n for n, reason in dense.items() if reason != KEPT), None)
        if odd is not None and not recipe.skip_indivisible:
            raise NeuroalError(
                f"pattern {self.pattern} does not divide the {layout.linears[odd].in_features} "
                f"inputs of '{odd}': --skip-indivisible leaves such linears dense"
            )
        if len(dense) == len(layout.linears):
            raise NeuroalError(f"pattern {self.pattern} divides the inputs of no linear")
        rules = Rules(
            recipe.wanted,
            recipe.budget,
            self.comparison,
            self.pattern,
            self.pattern is not None and _varies(recipe, self.pattern),
            dense,
            over=recipe.sparsity_over,
        )
        _check_reachable(rules, layout, recipe.gives_ratios)
        return rules


def stays_dense(
    layout: Layout, keep: Iterable[str], only: Iterable[str], pattern: Pattern | None
) -> dict[str, str]:
    """Return the linears that stay dense, in execution order, and why.

    Raises:
        UsageError: A pattern of `keep` or `only` means no linear, or none is left to prune.
    """
    kept = kept_linears(layout, keep, only)
    dense = {}
    for x in layout.linears.values():
        if x.name in kept:
            dense[x.name] = KEPT
        elif pattern is not None and x.in_features % pattern.of:
            dense[x.name] = f"pattern {pattern} does not divide the inputs"
    return dense


def _varies(recipe: Recipe, pattern: Pattern) -> bool:
    own = 1 - pattern.kept / pattern.of
    if recipe.sparsity is None or isinstance(recipe.sparsity, tuple):
        return recipe.sparsity is not None
    return recipe.sparsity_over == "all" or abs(recipe.sparsity - own) > 1e-9


def _check_reachable(rules: Rules, layout: Layout, given: bool) -> None:
    """Refuse a sparsity over all linears that those that are pruned cannot bring about."""
    ratio, pattern = rules.ratio(layout), rules.pattern
    highest = 1.0 if pattern is None else (pattern.of - 1) / pattern.of
    if rules.over == "all" and not given and (ratio > highest or ratio >= 1):
        raise UsageError(
            f"sparsity {rules.sparsity:g} over all linears would be {ratio:.3g} in those that are "
            "pruned: keep fewer, ask for less, or say --sparsity-over pruned"
        )


def search_dtype(recipe: Recipe) -> torch.dtype | None:
    """Return the dtype in which the search runs the blocks; None is the model's own."""
    if recipe.search_dtype == "auto":
        return None
    dtype: torch.dtype = getattr(torch, recipe.search_dtype)
    return dtype


def setup(recipe: Recipe) -> Setup:
    """Load the plugins of a recipe and check that they fit together; no weight is read.

    Raises:
        UsageError: A plugin or option is unknown, or a combination makes no sense.
        PluginError: A plugin is broken.
    """
    check_requirements(recipe.requires)
    top_up = _top_up(recipe)
    searched = ("block_ratios", "row_ratios", "search_pruner")
    if recipe.gives_ratios and any(getattr(recipe, x) is not None for x in searched):
        what = "--allocation holds" if recipe.allocation is not None else "the recipe gives"
        flags = ", ".join(f"--{x.replace('_', '-')}" for x in searched)
        raise UsageError(f"{what} every ratio: drop {flags}")
    plugins = _load(recipe, top_up)
    (pruner,) = plugins["pruner"]
    search_pruner = next(iter(plugins["search_pruner"]), pruner)
    pattern, can = recipe.parsed_pattern(), pruner.traits(PrunerTraits)
    comparison: Comparison = recipe.comparison or can.comparison
    if pattern is not None and recipe.comparison is not None:
        raise UsageError(
            f"--comparison {recipe.comparison} makes no sense here: weights compete within the "
            f"groups of pattern {pattern}"
        )
    if pattern is not None and not can.patterns:
        raise UsageError(f"pruner '{pruner.name}' has no N:M patterns")
    notes: list[str] = []
    for rows in plugins["row_ratios"]:
        if rows.traits(RowRatiosTraits).weighs_rows:
            why = no_importance(pattern, recipe.comparison)
        else:
            why = no_rows(pruner.name, can, pattern, comparison)
            if why is None and search_pruner is not pruner:
                searches = search_pruner.traits(PrunerTraits)
                why = no_rows(search_pruner.name, searches, pattern, searches.comparison)
        if why and top_up.row_ratios != UNIFORM:
            notes.append(_left_out_row_step(recipe, top_up, why))
            plugins["row_ratios"] = load([("row_ratios", UNIFORM)])
    if pattern is not None:
        notes += _left_out_block_step(recipe, top_up, pattern)
    names = {p.name for of_role in plugins.values() for p in of_role}
    refuse_unused(recipe.options, names)
    chosen = Setup(
        pruner=pruner,
        search_pruner=search_pruner,
        block_ratios=tuple(plugins["block_ratios"]),
        row_ratios=next(iter(plugins["row_ratios"]), None),
        alignment=plugins["alignment"][0],
        refiner=next(iter(plugins["refiner"]), None),
        reconstruction=next(iter(plugins["reconstruction"]), None),
        comparison=comparison,
        pattern=pattern,
        search_samples=recipe.search_samples or top_up.search_samples,
        notes=tuple(notes),
    )
    _check_refiner(chosen, recipe)
    _check_statistics(chosen)
    return chosen


def _top_up(recipe: Recipe) -> TopUp:
    """Return the recipe's preset, with the plugins that the recipe names in place of its own."""
    asked = {role: getattr(recipe, role) for role in TOP_UP_ROLES}
    own = {role: choice for role, choice in asked.items() if choice is not None and choice != ()}
    return replace(load_top_up(recipe.top_up), **own)


def _load(recipe: Recipe, top_up: TopUp) -> dict[str, list[Plugin]]:
    """Return every role's plugins.

    Their options are the top-up's, overridden by the recipe's. Where ratios are given or fixed, no
    strategy is loaded for them.
    """
    pattern = recipe.parsed_pattern()
    fixed = pattern is not None and not _varies(recipe, pattern)
    searches = top_up.search_pruner not in (None, recipe.pruner) and not fixed
    choices: dict[str, tuple[Any, ...]] = {
        "pruner": (recipe.pruner,),
        "search_pruner": (top_up.search_pruner,) if searches else (),
        "block_ratios": (UNIFORM,) if fixed else top_up.block_ratios,
        "row_ratios": (top_up.row_ratios,),
        "alignment": (top_up.alignment,),
        "refiner": _optional(top_up.refiner),
        "reconstruction": _optional(top_up.reconstruction),
    }
    if recipe.gives_ratios:
        choices["block_ratios"] = choices["row_ratios"] = choices["search_pruner"] = ()
    roles = {"search_pruner": "pruner"}
    flat = [(roles.get(x, x), choice) for x, of_role in choices.items() for choice in of_role]
    used = {listing_of(role, choice).name for role, choice in flat}
    options: dict[str, dict[str, Any]] = {}
    for values_by_name in (top_up.options, recipe.options):
        for name, values in values_by_name.items():
            if name in used:
                options[name] = options.get(name, {}) | dict(values)
    loaded = iter(load(flat, options))
    return {role: [next(loaded) for _ in of_role] for role, of_role in choices.items()}


def _optional(choice: Any) -> tuple[Any, ...]:
    return () if choice in (None, "none") else (choice,)


def _left_out_row_step(recipe: Recipe, top_up: TopUp, why: str) -> str:
    """Return a note that the preset's row step is left out.

    Raises:
        UsageError: It was asked for, or is all that the preset has.
    """
    if recipe.row_ratios is not None:
        raise UsageError(f"row ratios make no sense here: {why}")
    more = top_up.refiner or top_up.reconstruction
    if recipe.block_ratios is None and top_up.block_ratios == (UNIFORM,) and not more:
        raise UsageError(f"top-up '{recipe.top_up}' is a row step alone, and {why}")
    return f"row step of top-up '{recipe.top_up}' left out: {why}"


def _left_out_block_step(recipe: Recipe, top_up: TopUp, pattern: Pattern) -> list[str]:
    """Return a note that the preset's block step is left out where a pattern fixes every ratio.

    Raises:
        UsageError: Block ratios were asked for, or an allocation or a sparsity that cannot be.
    """
    wanted = max(recipe.sparsity) if isinstance(recipe.sparsity, tuple) else recipe.wanted
    if wanted > (pattern.of - 1) / pattern.of:
        raise UsageError(f"sparsity {wanted} is more than a pattern of M = {pattern.of} has")
    if recipe.ratios:
        raise UsageError(
            f"pattern {pattern} has one N in a block: [[ratios]] are for unstructured sparsity"
        )
    if _varies(recipe, pattern):
        return []
    if recipe.sparsity_over == "all":
        raise UsageError(
            f"--sparsity-over all makes no sense here: pattern {pattern} alone fixes every ratio; "
            "a --sparsity beside it lets N vary"
        )
    if recipe.allocation is not None:
        raise UsageError(f"pattern {pattern} alone fixes every ratio: --allocation has none to set")
    if top_up.block_ratios == (UNIFORM,):
        return []
    why = f"pattern {pattern} alone fixes every ratio; a --sparsity beside it lets N vary"
    if recipe.block_ratios:
        raise UsageError(f"block ratios make no sense here: {why}")
    return [f"block step of top-up '{recipe.top_up}' left out: {why}"]


def _check_refiner(chosen: Setup, recipe: Recipe) -> None:
    if chosen.refiner is None:
        return
    if not chosen.pruner.has("score_weights"):
        raise UsageError(
            f"refiner '{chosen.refiner.name}' needs scores, which pruner '{chosen.pruner.name}' "
            "has not"
        )
    why = chosen.refiner.traits(RefinerTraits).needs_paper_budget
    if why and recipe.budget == "exact":
        raise UsageError(f"refiner '{chosen.refiner.name}' needs --budget paper: {why}")


def _check_statistics(chosen: Setup) -> None:
    """Refuse statistics that are unknown, clash, or compare where nothing is compared."""
    for plugin in chosen.plugins:
        try:
            needed = resolve(plugin.required_statistics())
        except UsageError as error:
            raise plugin.error("required_statistics", str(error)) from error
        compares = next((a.name for a in needed if a.compares), None)
        if compares and plugin.role not in ("alignment", "reconstruction"):
            what = (
                f"'{compares}' compares dense with pruned: that is for alignment metrics and "
                "reconstructions"
            )
            raise plugin.error("required_statistics", what)
    for together in ([chosen.search_pruner, chosen.alignment], chosen.final):
        try:
            resolve(s for plugin in together for s in plugin.required_statistics())
        except UsageError as error:
            raise UsageError(f"{' and '.join(str(p) for p in together)}: {error}") from error


def no_rows(
    name: str, can: PrunerTraits, pattern: Pattern | None, comparison: Comparison
) -> str | None:
    """Return why rows cannot have ratios of their own, or None if they can."""
    if not can.row_ratios:
        return f"the mask of pruner '{name}' is not per row"
    if pattern is not None:
        return f"pattern {pattern} fixes the ratio of every row"
    if comparison == "matrix":
        return "weights compete over the whole matrix, not within rows"
    return None


def no_importance(pattern: Pattern | None, asked: Comparison | None) -> str | None:
    """Return why rows cannot compete by their importance, or None if they can."""
    if pattern is not None:
        return f"pattern {pattern} fixes the ratio of every row"
    if asked == "row":
        return "rows compete by their importance, and --comparison row keeps them from it"
    return None
