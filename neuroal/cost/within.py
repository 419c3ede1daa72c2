"""What to do within a time: the effort, samples and length that leave the least excess."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

from neuroal.cost.estimate import work
from neuroal.cost.preparation import prepare
from neuroal.cost.texts import text_sizes
from neuroal.cost.timings import time_block
from neuroal.errors import UsageError
from neuroal.model import pretrained
from neuroal.progress import bar
from neuroal.recipe import Recipe
from neuroal.run.effort import efforts, names_method, with_effort
from neuroal.types import TopUp
from neuroal.units import rough_duration

SAMPLES = (8, 16, 32, 64, 128, 256)
LENGTH = 512  # tokens of a window at most: longer ones make fewer of the same time
SHARE = 0.8  # of the time: the rest is for reading, writing and what an estimate misses


@dataclass(frozen=True)
class Choice:
    """One of the ways to spend the time.

    Attributes:
        recipe: What to do.
        effort: The preset that it has.
        seconds: How long it will take, about.
        excess: What is expected to be left of the excess of Wanda with uniform ratios.
        next: The quickest of those that leave less, for which there was no time.
    """

    recipe: Recipe
    effort: str
    seconds: float
    excess: float
    next: Choice | None = None

    @property
    def tokens(self) -> int:
        """Return how much text it calibrates on, by which ways of equal excess are told apart."""
        return self.recipe.samples * (self.recipe.length or 0)

    def __str__(self) -> str:
        recipe = self.recipe
        said = (
            f"effort {self.effort} with {recipe.samples} windows of {recipe.length} tokens: about "
            f"{rough_duration(self.seconds)}, and {self.excess:.2f} of the excess of plain Wanda "
            f"on the model it was measured on (by name: --effort {self.effort} --samples "
            f"{recipe.samples} --length {recipe.length})"
        )
        if (way := self.next) is None:
            return said
        return (
            f"{said}; the next would be effort {way.effort} with {way.recipe.samples} windows, and "
            f"{way.excess:.2f} of it, within about {rough_duration(way.seconds / SHARE)}"
        )


def choose(
    recipe: Recipe,
    seconds: float,
    effort: str | None = None,
    given: Collection[str] = (),
    trust_remote_code: bool = False,
    progress: bool = False,
) -> Choice:
    """Return the best of the ways to spend at most so many seconds on this machine.

    Every effort is timed on one block, which takes some seconds each.

    Args:
        recipe: What to do; it names no method.
        seconds: The time.
        effort: The only one to look at; None looks at all that were measured.
        given: The fields of the recipe that were asked for, and are not changed.
        trust_remote_code: Let the model's own code run.
        progress: Show a bar on stderr.

    Raises:
        UsageError: The recipe names a method, or nothing is as quick as that.
        NeuroalError: The model cannot be timed.
    """
    if names_method(recipe, set(given) - {"pruner"}):
        raise UsageError("--within chooses the method: name none beside it, or leave it out")
    known = {effort: preset for effort, preset in efforts().items() if preset.excess}
    if effort is not None:
        asked = with_effort(recipe, effort, given)
        known = {effort: known[asked.top_up]} if asked.top_up in known else {}
    if not known:
        raise UsageError(f"effort '{effort}' says nowhere how good it is: --within needs that")
    ways = [
        way
        for name, preset in bar(iterable=known.items(), desc="time", disable=not progress)
        for way in _ways(with_effort(recipe, name, given), name, preset, given, trust_remote_code)
    ]
    fitting = [way for way in ways if way.seconds <= SHARE * seconds]
    if not fitting:
        least = min(ways, key=lambda way: way.seconds)
        needed = rough_duration(least.seconds / SHARE)
        raise UsageError(f"--within is too short here: at least {needed}, for {least}")
    best = min(fitting, key=lambda way: (way.excess, -way.tokens, way.seconds))
    better = [way for way in ways if way.excess < best.excess]  # none of which fits
    return replace(best, next=min(better, key=lambda way: (way.seconds, way.excess), default=None))


def expected(excess: Mapping[int, float], tokens: int) -> float:
    """Return the excess at so many tokens, straight lines over their logarithm between measured.

    Beyond the ends it is that of the end.
    """
    points = sorted(excess.items())
    for (low, left), (high, right) in itertools.pairwise(points):
        if low <= tokens <= high:
            share = math.log(tokens / low) / math.log(high / low)
            return left + share * (right - left)
    return points[0][1] if tokens < points[0][0] else points[-1][1]


def _ways(
    recipe: Recipe, effort: str, preset: TopUp, given: Collection[str], trust: bool
) -> Iterator[Choice]:
    """Yield what an effort takes with every number of windows, timed once."""
    config = pretrained.load_config(str(recipe.model), trust)
    context = pretrained.context_length(config)
    length = recipe.length or min(LENGTH, context or LENGTH)
    prepared = prepare(replace(recipe, length=length), trust_remote_code=trust)
    texts = text_sizes(prepared)
    timings = time_block(prepared, length, texts).seconds
    least = min(min(preset.excess), SAMPLES[-1] * length)  # with fewer tokens nothing was measured
    sizes = [n for n in SAMPLES if n * length >= least]
    for samples in (recipe.samples,) if "samples" in given else sizes:
        way = replace(prepared, recipe=replace(prepared.recipe, samples=samples))
        seconds = sum(phase.seconds(timings) for phase in work(way, texts).values())
        yield Choice(way.recipe, effort, seconds, expected(preset.excess, samples * length))
