"""The first step of every run: plugins and structure; what cannot work is refused."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from neuroal import layout as layouts
from neuroal.cost.work import generation_work
from neuroal.data.sizes import check_sizes, default_length
from neuroal.data.source import parse_source
from neuroal.data.windows import Windows
from neuroal.errors import PluginError, UsageError
from neuroal.evaluation.perplexity import windows_for
from neuroal.layout import Layout
from neuroal.model import pretrained
from neuroal.model.memory import device_of
from neuroal.plugins import Plugin
from neuroal.pruning.allocation import Allocation
from neuroal.pruning.hooks import rng_for
from neuroal.pruning.targets import Rules
from neuroal.recipe import Recipe
from neuroal.run import mistakes
from neuroal.run.given import given_ratios
from neuroal.run.reuse import earlier_allocation
from neuroal.run.setup import Setup, setup
from neuroal.types import BlockRatiosTraits, Measurement, RowRatiosTraits

_AHEAD = 8  # generations of a strategy that are looked at before it runs


@dataclass(frozen=True)
class SearchStep:
    """One step of the search, as far as it is known before it runs.

    Attributes:
        role: `block_ratios` or `row_ratios`.
        plugin: Its name.
        candidates: Proposals of its first generation; None where they depend on measurements.
        goes_on: Whether it answers that generation's costs with another.
        widest: Windows of all candidates of its largest generation, whose states are held together:
            the largest of the first few, as they are where all candidates cost the same.
        most: What all its generations cost at most, in candidates on all search windows; None where
            it does not say.
    """

    role: str
    plugin: str
    candidates: int | None
    goes_on: bool = False
    widest: int = 0
    most: float | None = None

    @property
    def generations(self) -> list[int]:
        """Return the candidates of every generation that is known, at most.

        Of what its search costs at most, every candidate is a generation: it has all its runs to
        itself.
        """
        if self.most is not None:
            return [1] * math.ceil(self.most)
        return [self.candidates] if self.candidates else []

    @property
    def open_ended(self) -> bool:
        """Return whether there may be any number of candidates more."""
        return self.goes_on and self.most is None


@dataclass(frozen=True, eq=False)
class Prepared:
    """A recipe and the model that it is for; `plan` says what it costs, `engine.prune` runs it.

    Attributes:
        recipe: What is asked.
        setup: The plugins, checked against each other.
        model: The model, or its shapes alone on the meta device.
        layout: Its blocks and linears.
        rules: How ratios become counts.
        allocation: Ratios that are given, in place of a search; None where they are searched for.
        notes: What is left out, one line each.
        trust_remote_code: Whether the model's own code may run.
    """

    recipe: Recipe
    setup: Setup
    model: Any
    layout: Layout
    rules: Rules
    allocation: Allocation | None
    notes: tuple[str, ...]
    trust_remote_code: bool = False

    @cached_property
    def steps(self) -> tuple[SearchStep, ...]:
        """Return the steps of the search, as far as they are known before it runs.

        Raises:
            PluginError: A strategy fails at once.
        """
        return tuple(first_steps(self.setup, self.layout, self.recipe))

    @property
    def search_windows(self) -> int:
        """Return how many calibration windows the search uses."""
        return min(self.setup.search_samples, self.recipe.samples)

    @property
    def length(self) -> int:
        """Return the tokens of a window; the default where the rows of the source decide."""
        context = pretrained.context_length(self.model.config)
        return self.recipe.length or default_length(context)

    @cached_property
    def texts(self) -> Mapping[str, Windows]:
        """Return the windows of the texts to evaluate on, by source; without those of the hub.

        The model is one given by its path, whose tokenizer cuts them.

        Raises:
            NeuroalError: One cannot be read, or is shorter than one window.
        """
        recipe = self.recipe
        local = [x for x in recipe.evaluate if not parse_source(x).on_hub]
        if not local:
            return {}
        tokenizer = pretrained.load_tokenizer(str(recipe.model), self.trust_remote_code)
        cut = partial(
            windows_for,
            self.model.config,
            tokenizer=tokenizer,
            length=recipe.evaluate_length,
            windows=recipe.evaluate_windows,
            bos=recipe.window_bos,
        )
        return {source: cut(source) for source in local}

    @property
    def reads_data(self) -> bool:
        """Return whether anything reads activations, so that there has to be calibration data."""
        return self.setup.reads_data or any(step.candidates != 0 for step in self.steps)


def prepare(
    recipe: Recipe,
    model: nn.Module | None = None,
    *,
    plugins: Setup | None = None,
    layout: Layout | None = None,
    trust_remote_code: bool = False,
) -> Prepared:
    """Load the plugins of a recipe and read its model's structure: no weight, and of a text a row.

    What is known without the model is checked first.

    Args:
        recipe: What is asked.
        model: A model in memory or its skeleton; None: the skeleton of the recipe's model is made.
        plugins: `setup(recipe)`, if it has been made.
        layout: The model's layout, if it has been found.
        trust_remote_code: Let the model's own code run.

    Raises:
        UsageError: The recipe makes no sense.
        NeuroalError: A plugin is broken, the model's structure is unknown, or an allocation or the
            first row of a text cannot be read.
    """
    mistakes.check(recipe, in_memory=model is not None)
    plugins = plugins or setup(recipe)
    if model is None:
        if recipe.model is None:
            raise UsageError("a plan needs a model")
        device_of(recipe.device)
        model = pretrained.skeleton(recipe.model, trust_remote_code)
    if recipe.calibration is not None:
        context = pretrained.context_length(getattr(model, "config", None))
        check_sizes(recipe.samples, recipe.length, context)
    layout = layout or layouts.find(model)
    rules = plugins.rules(recipe, layout)
    earlier, left_out = earlier_allocation(plugins, recipe, layout)
    given = given_ratios(recipe, layout, rules, earlier)
    if given is not None:
        rules = dataclasses.replace(rules, sparsity=given.sparsity, given=True)
        left_out = [*left_out, *given.notes]
    return Prepared(
        recipe=recipe,
        setup=plugins,
        model=model,
        layout=layout,
        rules=rules,
        allocation=None if given is None else given.allocation,
        notes=(*plugins.notes, *left_out),
        trust_remote_code=trust_remote_code,
    )


def with_its_calibration(recipe: Recipe) -> Recipe:
    """Return a recipe that names a calibration source: the built-in model brings its own."""
    if recipe.calibration is None and recipe.model == "demo":
        return dataclasses.replace(recipe, calibration="demo")
    return recipe


def check_calibrated(recipe: Recipe, reads_data: bool) -> None:
    """Refuse a run that reads activations and names no calibration source.

    Raises:
        UsageError: It needs one.
    """
    if recipe.calibration is None and reads_data:
        named = "the model in memory" if recipe.model is None else f"model '{recipe.model}'"
        raise UsageError(
            f"{named} needs calibration (--calibration): a .txt, .jsonl, .json or .parquet file, "
            "c4, wikitext2, ptb, or a hub data set owner/name"
        )


def first_steps(setup: Setup, layout: Layout, recipe: Recipe) -> list[SearchStep]:
    """Return how many candidates every strategy starts with; runs no model."""
    return [
        SearchStep(plugin.role, plugin.name, None, most=_most(plugin))
        if plugin.has("measure_block")
        else _first_step(setup, plugin, layout, recipe)
        for plugin in setup.strategies
    ]


def _first_step(setup: Setup, plugin: Plugin, layout: Layout, recipe: Recipe) -> SearchStep:
    search = min(setup.search_samples, recipe.samples)
    rules = setup.rules(recipe, layout)
    pruned = layout.without(rules.dense)
    arguments: dict[str, Any] = {
        "layout": pruned if plugin.role == "block_ratios" else layout,
        "measurements": (),
        "windows": search,
        "rng": rng_for(recipe.seed, plugin.role, plugin.name),
    }
    if plugin.role == "block_ratios":
        arguments["sparsity"] = rules.ratio(layout)
    else:
        base = dict.fromkeys(pruned.linears, rules.ratio(layout))
        arguments["base"] = dict.fromkeys(layout.linears, 0.0) | base
        arguments["deviation"] = {n: torch.zeros(x.in_features) for n, x in layout.linears.items()}
        arguments["weighs_inputs"] = setup.weighs_inputs
    proposals = plugin.proposals(plugin.proposes, **arguments)
    counts: list[int] = []
    widest = 0
    answer: list[Measurement] | None = None
    ended = False
    try:
        while len(counts) < _AHEAD:
            generation = next(proposals) if answer is None else proposals.send(answer)
            windows = min(generation.windows or search, search)
            counts.append(len(generation.proposals))
            widest = max(widest, counts[-1] * windows)
            alone = generation_work(
                setup.alignment,
                setup.search_pruner,
                setup.reads_deviation,
                blocks=len(layout.blocks),
                candidates=1,
                windows=windows,
                unpruned=len(layout.blocks) - len(pruned.blocks),
            )
            answer = [Measurement(1.0, False, alone.block_runs)] * counts[-1]
    except StopIteration:
        ended = True
    except PluginError:
        if len(counts) < 2:
            raise
        # No run has equal costs again and again: what a strategy makes of them tells nothing.
    proposals.close()
    goes_on = len(counts) > 1 or not ended
    first, most = counts[0] if counts else 0, _most(plugin) if goes_on else None
    return SearchStep(plugin.role, plugin.name, first, goes_on, widest, most)


def _most(plugin: Plugin) -> float | None:
    """Return what a strategy says that its search costs at most, in candidates, if it does."""
    if plugin.role == "block_ratios":
        most = plugin.traits(BlockRatiosTraits).candidates
    else:
        most = plugin.traits(RowRatiosTraits).candidates
    if most is None:
        return None
    if not isinstance(most, (int, float)) or not 0 < most < math.inf:
        raise plugin.error("describe", f"returned candidates={most!r}: give a number above 0")
    return float(most)
