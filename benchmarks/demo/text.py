"""Documents of the demo are short invented reports and stories about one fixed invented land.

The model is trained on the split "train"; the other two are the texts that `neuroal.demo` reads.
"""

from __future__ import annotations

import random

from .tales import KINDS, THINGS, Scene, capped
from .words import COLOURS, below, draw, pick
from .world import world

SPLITS = {
    "train": (1_000_000, 12_000),
    "calibration": (3_000_000, 256),
    "heldout": (5_000_000, 128),
}
SEEDS_PER_SPLIT = 1_000_000
PARAGRAPHS = 6
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
WEATHER = (
    ("It rained", "the road turned to mud", "an oiled cape"),
    ("It snowed", "the roofs were white", "thick boots"),
    ("The sun shone", "the stones were hot", "a straw hat"),
    ("The wind blew", "leaves flew over the wall", "a tight hood"),
    ("Fog lay over the town", "nobody saw the river", "a bright lantern"),
)


def _document(seed: int) -> str:
    """One seed gives one document, which comes back to its first paragraph at noon and at night."""
    rng = random.Random(seed)
    land = world()
    river = pick(rng, land.rivers)
    town = pick(rng, river.towns)
    hero, friend, third = draw(rng, land.folk(town.name), 3)
    scene = Scene(rng, land, river, town, hero, friend, third)
    day = below(rng, len(DAYS))
    weather, effect, clothes = pick(rng, WEATHER)
    (found, given), (one, two) = draw(rng, THINGS, 2), draw(rng, COLOURS, 2)
    opening = (
        f"{weather} on {DAYS[day]}, {effect}, and everybody in {town.name} needed {clothes}. "
        f"{hero.name} the {hero.job.title} met {friend.name} the {friend.job.title} and "
        f"{third.name} the {third.job.title}. Beside {town.landmark} {hero.name} found a {one} "
        f"{found} and took it home."
    )
    noon = (
        f"At noon {hero.name} showed the {one} {found} to {friend.name}. {capped(friend.she)} "
        f"liked it so much that {friend.she} gave {hero.name} a {two} {given} for it."
    )
    closing = (
        f"In the evening {hero.name} still had the {two} {given}, but the {one} {found} belonged "
        f"to {friend.name}. The next day was {DAYS[(day + 1) % len(DAYS)]}, and nobody in "
        f"{town.name} needed {clothes}."
    )
    middle = [kind(scene) for kind in draw(rng, KINDS, PARAGRAPHS)]
    half = PARAGRAPHS // 2
    return "\n".join([opening, *middle[:half], noon, *middle[half:], closing])


def documents(split: str, count: int | None = None) -> list[str]:
    """Documents of a split are the same on every machine and belong to no other split.

    Args:
        split: "train", "calibration" or "heldout".
        count: How many documents; by default the standard size of the split.

    Returns:
        The documents, each several hundred tokens long.

    Raises:
        ValueError: If there is no such split or it has no such number of documents.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    first, standard = SPLITS[split]
    number = standard if count is None else count
    if not 0 <= number <= SEEDS_PER_SPLIT:
        raise ValueError(f"count must lie between 0 and {SEEDS_PER_SPLIT}, not {number}")
    return [_document(first + index) for index in range(number)]
