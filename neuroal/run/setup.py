"""From a recipe to a run: which plugins take part, whether they fit together, what it will cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from neuroal.errors import NeuroalError, UsageError
from neuroal.layout import Layout
from neuroal.plugins import Plugin, check_requirements, listing_of, load, load_top_up
from neuroal.pruning.pruner import needs_paper_budget, traits
from neuroal.pruning.targets import Rules
from neuroal.recipe import Recipe
from neuroal.types import Comparison, Pattern, PrunerTraits, TopUp
from neuroal.walk.statistics import resolve

UNIFORM = "uniform"


@dataclass(frozen=True)
class Setup:
    """The plugins of a run, checked against each other.

    Attributes:
        pruner: The base pruner.
        block_ratios: One or more; empty where an earlier allocation is used.
        row_ratios: None where an earlier allocation is used.
        alignment: The metric of the search.
        refiner: None without.
        comparison: Scores compete per row or per matrix.
        pattern: N:M or None.
        search_samples: Calibration windows that the search may use.
        notes: What a preset would have done and cannot, one line each.
    """

    pruner: Plugin
    block_ratios: tuple[Plugin, ...]
    row_ratios: Plugin | None
    alignment: Plugin
    refiner: Plugin | None
    comparison: Comparison
    pattern: Pattern | None
    search_samples: int
    notes: tuple[str, ...]

    @property
    def plugins(self) -> tuple[Plugin, ...]:
        """Return every plugin of the run."""
        rows = (self.row_ratios,) if self.row_ratios else ()
        refiner = (self.refiner,) if self.refiner else ()
        return (self.pruner, *self.block_ratios, *rows, self.alignment, *refiner)

    @property
    def measures(self) -> tuple[Plugin, ...]:
        """Return the strategies that want the dense walk."""
        rows = (self.row_ratios,) if self.row_ratios else ()
        return tuple(p for p in (*self.block_ratios, *rows) if p.has("measure_block"))

    @property
    def reads_deviation(self) -> bool:
        """Return whether the row step reads the deviation of the block step's winner."""
        rows = self.row_ratios
        return rows is not None and "input_norm" in rows.statistic_names()

    def rules(self, recipe: Recipe, layout: Layout) -> Rules:
        """Return how ratios become counts.

        Raises:
            NeuroalError: M does not divide the inputs of a linear.
        """
        dense: set[str] = set()
        if self.pattern is not None:
            odd = [x for x in layout.linears.values() if x.in_features % self.pattern.of]
            if odd and not recipe.skip_indivisible:
                raise NeuroalError(
                    f"pattern {self.pattern} does not divide the {odd[0].in_features} inputs of "
                    f"'{odd[0].name}': --skip-indivisible leaves such linears dense"
                )
            dense = {x.name for x in odd}
            if len(dense) == len(layout.linears):
                raise NeuroalError(f"pattern {self.pattern} divides the inputs of no linear")
        return Rules(
            recipe.wanted,
            recipe.budget,
            self.comparison,
            self.pattern,
            self.pattern is not None and _varies(recipe, self.pattern),
            frozenset(dense),
        )


def _varies(recipe: Recipe, pattern: Pattern) -> bool:
    own = 1 - pattern.kept / pattern.of
    return recipe.sparsity is not None and abs(recipe.sparsity - own) > 1e-9


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
    preset = load_top_up(recipe.top_up)
    pattern = recipe.parsed_pattern()
    choices = _choices(recipe, preset)
    if recipe.allocation is not None and (recipe.block_ratios or recipe.row_ratios is not None):
        raise UsageError("--allocation holds every ratio: drop --block-ratios and --row-ratios")

    # What pruner and row step can do decides which steps make sense: they are loaded first.
    pruner, rows = (
        load(choices[role], _options(recipe, preset, choices[role], strict=False))[0]
        for role in ("pruner", "row_ratios")
    )
    can = traits(pruner)
    comparison: Comparison = recipe.comparison or can.comparison
    if pattern is not None and recipe.comparison is not None:
        raise UsageError(
            f"--comparison {recipe.comparison} makes no sense here: weights compete within the "
            f"groups of pattern {pattern}"
        )
    if pattern is not None and not can.patterns:
        raise UsageError(f"pruner '{pruner.name}' has no N:M patterns")
    notes: list[str] = []
    searches = recipe.allocation is None
    if rows.has("propose_row_importance"):
        why = no_importance(pattern, recipe.comparison)
    else:
        why = no_rows(pruner.name, can, pattern, comparison)
    if why and searches and choices["row_ratios"] != [("row_ratios", UNIFORM)]:
        if recipe.row_ratios is not None:
            raise UsageError(f"row ratios make no sense here: {why}")
        alone = recipe.block_ratios is None and preset.block_ratios == (UNIFORM,)
        if alone:
            raise UsageError(f"top-up '{recipe.top_up}' is a row step alone, and {why}")
        choices["row_ratios"] = [("row_ratios", UNIFORM)]
        notes.append(f"row step of top-up '{recipe.top_up}' left out: {why}")
    if pattern is not None and recipe.wanted > (pattern.of - 1) / pattern.of:
        raise UsageError(f"sparsity {recipe.wanted} is more than a pattern of M = {pattern.of} has")
    fixed = pattern is not None and not _varies(recipe, pattern)
    if fixed and not searches:
        raise UsageError(f"pattern {pattern} alone fixes every ratio: --allocation has none to set")
    if fixed and searches and choices["block_ratios"] != [("block_ratios", UNIFORM)]:
        why = f"pattern {pattern} alone fixes every ratio; a --sparsity beside it lets N vary"
        if recipe.block_ratios:
            raise UsageError(f"block ratios make no sense here: {why}")
        choices["block_ratios"] = [("block_ratios", UNIFORM)]
        notes.append(f"block step of top-up '{recipe.top_up}' left out: {why}")
    if not searches:
        choices["block_ratios"] = choices["row_ratios"] = []

    flat = [choice for of_role in choices.values() for choice in of_role]
    loaded = iter(load(flat, _options(recipe, preset, flat)))
    by_role = {role: [next(loaded) for _ in of_role] for role, of_role in choices.items()}
    made = Setup(
        pruner=by_role["pruner"][0],
        block_ratios=tuple(by_role["block_ratios"]),
        row_ratios=_first(by_role["row_ratios"]),
        alignment=by_role["alignment"][0],
        refiner=_first(by_role["refiner"]),
        comparison=comparison,
        pattern=pattern,
        search_samples=recipe.search_samples or preset.search_samples,
        notes=tuple(notes),
    )
    if made.refiner is not None and not made.pruner.has("score_weights"):
        raise UsageError(
            f"refiner '{made.refiner.name}' needs scores, which pruner '{pruner.name}' has not"
        )
    if made.refiner is not None and recipe.budget == "exact":
        why = needs_paper_budget(made.refiner)
        if why:
            raise UsageError(f"refiner '{made.refiner.name}' needs --budget paper: {why}")
    _check_statistics(made)
    return made


def _check_statistics(made: Setup) -> None:
    """Refuse statistics that are unknown, clash, or compare where nothing is compared."""
    for plugin in made.plugins:
        try:
            needed = resolve(plugin.required_statistics())
        except UsageError as error:
            raise plugin.error("required_statistics", str(error)) from error
        compares = next((a.name for a in needed if a.compares), None)
        if compares and plugin.role != "alignment":
            what = f"'{compares}' compares dense with pruned: that is for alignment metrics"
            raise plugin.error("required_statistics", what)
    together = [made.pruner, made.alignment, *([made.refiner] if made.refiner else [])]
    try:
        resolve(s for plugin in together for s in plugin.required_statistics())
    except UsageError as error:
        raise UsageError(f"{' and '.join(str(p) for p in together)}: {error}") from error


def _first(plugins: Sequence[Plugin]) -> Plugin | None:
    return plugins[0] if plugins else None


def _choices(recipe: Recipe, preset: TopUp) -> dict[str, list[tuple[str, Any]]]:
    """Return every role's plugins: the recipe's where it names them, else the preset's."""
    rows = preset.row_ratios if recipe.row_ratios is None else recipe.row_ratios
    alignment = preset.alignment if recipe.alignment is None else recipe.alignment
    refiner = preset.refiner if recipe.refiner is None else recipe.refiner
    return {
        "pruner": [("pruner", recipe.pruner)],
        "block_ratios": [("block_ratios", b) for b in recipe.block_ratios or preset.block_ratios],
        "row_ratios": [("row_ratios", rows)],
        "alignment": [("alignment", alignment)],
        "refiner": [] if refiner in (None, "none") else [("refiner", refiner)],
    }


def _options(
    recipe: Recipe, preset: TopUp, choices: Sequence[tuple[str, Any]], strict: bool = True
) -> dict[str, dict[str, Any]]:
    """Return the preset's options overridden by the recipe's.

    The preset's are for the plugins in use. So are the recipe's unless `strict`: then an option
    for a plugin that the run does not use reaches the loader, which refuses it.
    """
    used = {listing_of(role, choice).name for role, choice in choices}
    options = {name: dict(given) for name, given in preset.options.items() if name in used}
    for name, given in recipe.options.items():
        if strict or name in used:
            options[name] = options.get(name, {}) | dict(given)
    return options


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
