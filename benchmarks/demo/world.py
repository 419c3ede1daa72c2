"""The invented land of the demo texts is fixed: every document states the same facts about it."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache

from . import words
from .words import Animal, Good, Job, below, draw, pick

WORLD_SEED = 1729
TOWNS_PER_RIVER = 4


@dataclass(frozen=True)
class Town:
    """A town lies on one river, a known number of miles above the next town."""

    name: str
    river: str
    good: Good
    landmark: str
    year: int
    colour: str
    emblem: Animal
    miles: int


@dataclass(frozen=True)
class River:
    """A river passes its towns in order from its source to its mouth."""

    name: str
    source: str
    mouth: str
    towns: tuple[Town, ...]


@dataclass(frozen=True)
class Person:
    """A person has the same home, job, pet and tastes in every document."""

    name: str
    she: str
    her: str
    whose: str
    town: str
    job: Job
    age: int
    pet: Animal
    pet_name: str
    food: str
    hobby: str
    colour: str
    garment: str


@dataclass(frozen=True)
class World:
    """A world holds all rivers, towns and people."""

    rivers: tuple[River, ...]
    towns: tuple[Town, ...]
    people: tuple[Person, ...]

    def folk(self, town: str) -> list[Person]:
        """The people of a town are listed in a fixed order.

        Args:
            town: The name of the town.

        Returns:
            Everybody who lives there.
        """
        return [person for person in self.people if person.town == town]


def _rivers(rng: random.Random) -> tuple[River, ...]:
    """Every river gets its own towns, and every good is made in two towns."""
    names = [stem + ending for stem in words.TOWN_STEMS for ending in words.TOWN_ENDINGS]
    names = draw(rng, names, len(words.RIVERS) * TOWNS_PER_RIVER)
    goods = draw(rng, words.GOODS, len(words.GOODS)) + draw(rng, words.GOODS, len(words.GOODS))
    rivers = []
    for index, river in enumerate(words.RIVERS):
        towns = tuple(
            Town(
                name=names[TOWNS_PER_RIVER * index + place],
                river=river,
                good=goods[TOWNS_PER_RIVER * index + place],
                landmark=pick(rng, words.LANDMARKS),
                year=300 + below(rng, 600),
                colour=pick(rng, words.COLOURS),
                emblem=pick(rng, words.ANIMALS),
                miles=3 + below(rng, 17),
            )
            for place in range(TOWNS_PER_RIVER)
        )
        rivers.append(River(river, pick(rng, words.MOUNTAINS), pick(rng, words.WATERS), towns))
    return tuple(rivers)


def _people(rng: random.Random, towns: tuple[Town, ...]) -> tuple[Person, ...]:
    """Every name gets a life; neighbours never share a job or an age."""
    women = [stem + ending for stem in words.NAME_STEMS for ending in words.WOMEN_ENDINGS]
    men = [stem + ending for stem in words.NAME_STEMS for ending in words.MEN_ENDINGS]
    names = draw(rng, women + men, len(women) + len(men))
    female = frozenset(women)
    people = []
    for index, town in enumerate(towns):
        mine = names[index :: len(towns)]
        ages = draw(rng, range(18, 80), len(mine))
        jobs = draw(rng, words.JOBS[:-1], len(mine))
        for name, age, job in zip(mine, ages, jobs, strict=True):
            she, her, whose = ("she", "her", "her") if name in female else ("he", "him", "his")
            if job.title == "ferrywoman" and she == "he":
                job = words.JOBS[-1]
            people.append(
                Person(
                    name=name,
                    she=she,
                    her=her,
                    whose=whose,
                    town=town.name,
                    job=job,
                    age=age,
                    pet=pick(rng, words.ANIMALS),
                    pet_name=pick(rng, words.PET_NAMES),
                    food=pick(rng, words.FOODS),
                    hobby=pick(rng, words.HOBBIES),
                    colour=pick(rng, words.COLOURS),
                    garment=pick(rng, words.GARMENTS),
                )
            )
    return tuple(people)


@lru_cache(maxsize=1)
def world() -> World:
    """The world is built once from its own seed and is the same for every split.

    Returns:
        The invented land.
    """
    rng = random.Random(WORLD_SEED)
    rivers = _rivers(rng)
    towns = tuple(town for river in rivers for town in river.towns)
    return World(rivers, towns, _people(rng, towns))
