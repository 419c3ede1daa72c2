"""The vocabulary of the demo texts is a set of short lists and the draws made from them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

ONES = (
    "no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
    "nineteen",
)  # fmt: skip
TENS = (
    "", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety",
)  # fmt: skip

NAME_STEMS = (
    "Mar", "Bel", "Tam", "Ros", "Lin", "Cor", "Del", "Fen", "Hal", "Iv", "Jor", "Kes", "Nor",
    "Ost", "Pell", "Sel", "Ven", "Wyn", "Yar", "Zel",
)  # fmt: skip
WOMEN_ENDINGS = ("a", "ine", "ella", "wen")
MEN_ENDINGS = ("o", "ric", "an", "bert")
TOWN_STEMS = (
    "Ash", "Brun", "Cold", "Dunn", "Elm", "Foss", "Grim", "Hazel", "Kirk", "Lang", "Moss",
    "Oak",
)  # fmt: skip
TOWN_ENDINGS = ("beck", "holt", "mouth", "field", "wick")
RIVERS = ("Arrel", "Bodo", "Cinder", "Dree", "Erve", "Fallow", "Glim", "Hurn", "Iska")
MOUNTAINS = ("the Grey Teeth", "the Owl Hills", "Mount Sarn", "the Kettle Range", "Mount Vey")
WATERS = ("the Amber Sea", "the Bay of Gulls", "Lake Merrin", "the Long Sound")
LANDMARKS = (
    "a round tower",
    "a stone bridge",
    "an old mill",
    "a clock without hands",
    "a white temple",
    "a market hall",
    "a bronze lion",
    "a dry fountain",
    "a wooden theatre",
    "a school of maps",
    "a crooked lighthouse",
    "a garden of pears",
)
COLOURS = ("red", "blue", "green", "yellow", "white", "black", "grey", "brown", "purple")
GARMENTS = ("hat", "coat", "scarf", "cloak", "belt", "apron")
FOODS = (
    "onion soup",
    "plum cake",
    "fried trout",
    "barley bread",
    "goat cheese",
    "roast duck",
    "pickled beet",
    "apple pie",
    "mushroom stew",
    "honey cake",
    "lentil porridge",
    "smoked eel",
    "cabbage salad",
    "walnut pudding",
)
HOBBIES = (
    "playing the flute",
    "carving spoons",
    "telling riddles",
    "watching the stars",
    "swimming in the river",
    "drawing maps",
    "singing old songs",
    "playing chess",
    "growing beans",
    "knitting socks",
    "flying kites",
    "collecting shells",
    "reading letters",
    "walking in the woods",
)
PET_NAMES = (
    "Button", "Pepper", "Thistle", "Biscuit", "Smoke", "Clover", "Nettle", "Pebble", "Acorn",
    "Whistle", "Bramble", "Copper", "Feather", "Ginger", "Mitten", "Pickle", "Rumble",
    "Saffron", "Tinker", "Velvet",
)  # fmt: skip


@dataclass(frozen=True)
class Good:
    """A good is sold by the unit at one price in the whole land."""

    name: str
    unit: str
    price: int


@dataclass(frozen=True)
class Job:
    """A job has a place, a tool and a work that is told in the past tense."""

    title: str
    place: str
    tool: str
    work: str


@dataclass(frozen=True)
class Animal:
    """An animal makes one sound, likes one food and hides in one kind of place."""

    name: str
    sound: str
    food: str
    den: str


GOODS = (
    Good("salt", "sack", 3),
    Good("wool", "bale", 6),
    Good("honey", "jar", 4),
    Good("tin", "bar", 7),
    Good("tea", "tub", 5),
    Good("silk", "roll", 9),
    Good("cider", "barrel", 8),
    Good("rope", "coil", 2),
    Good("paper", "bundle", 3),
    Good("glass", "crate", 7),
    Good("flour", "sack", 2),
    Good("oil", "flask", 4),
    Good("wax", "block", 5),
    Good("dye", "pot", 6),
    Good("rice", "bag", 3),
    Good("leather", "roll", 8),
    Good("timber", "cart", 9),
    Good("ink", "bottle", 2),
)
JOBS = (
    Job("baker", "the bakery", "a rolling pin", "baked forty loaves of rye bread"),
    Job("smith", "the forge", "a heavy hammer", "bent hot iron into horseshoes"),
    Job("tailor", "the sewing room", "a silver needle", "sewed the sleeves of a winter coat"),
    Job("potter", "the kiln house", "a turning wheel", "shaped clay into tall jugs"),
    Job("fisher", "the landing stage", "a long net", "pulled trout and eel from the water"),
    Job("miller", "the water mill", "a grindstone", "ground wheat into fine flour"),
    Job("weaver", "the loom hall", "a wooden shuttle", "wove a carpet of many threads"),
    Job("carpenter", "the timber yard", "a sharp saw", "cut planks for a new roof"),
    Job("healer", "the sick house", "a box of herbs", "mixed bitter herbs against the cough"),
    Job("teacher", "the school", "a piece of chalk", "taught the children their letters"),
    Job("shepherd", "the high pasture", "a crooked staff", "counted the sheep on the hill"),
    Job("brewer", "the brew house", "a copper kettle", "boiled barley for dark beer"),
    Job("painter", "the attic", "a fine brush", "painted a ship on a blue wall"),
    Job("cook", "the tavern", "an iron pan", "stirred a pot of thick soup"),
    Job("gardener", "the orchard", "a small spade", "planted young trees in a row"),
    Job("ferrywoman", "the ferry", "a pair of oars", "rowed travellers across the river"),
    Job("ferryman", "the ferry", "a pair of oars", "rowed travellers across the river"),
)
ANIMALS = (
    Animal("dog", "barked", "bones", "under the cart"),
    Animal("cat", "purred", "cream", "behind the stove"),
    Animal("goat", "bleated", "thistles", "on the woodpile"),
    Animal("goose", "hissed", "wet grass", "beside the pond"),
    Animal("donkey", "brayed", "carrots", "in the stable"),
    Animal("crow", "cawed", "bread crumbs", "on the chimney"),
    Animal("frog", "croaked", "flies", "in the well"),
    Animal("pig", "grunted", "turnips", "in the mud"),
    Animal("owl", "hooted", "mice", "in the hollow oak"),
    Animal("pony", "neighed", "oats", "behind the hedge"),
)


def spell(number: int) -> str:
    """A number from 0 to 99 is written in words.

    Args:
        number: The number to write.

    Returns:
        Its English name; zero is "no", as in "no coins".
    """
    if number < len(ONES):
        return ONES[number]
    tens, ones = divmod(number, 10)
    return TENS[tens] + (f"-{ONES[ones]}" if ones else "")


def below(rng: random.Random, bound: int) -> int:
    """A whole number below a bound is drawn from ``rng.random()`` alone.

    Python promises the same ``random()`` sequence for a seed in every version; it promises no
    such thing for ``choice``, ``shuffle`` or ``sample``, and the model was trained on the result.

    Args:
        rng: The source of randomness.
        bound: One more than the largest possible result.

    Returns:
        A number from 0 to ``bound - 1``.
    """
    return int(rng.random() * bound)


def pick(rng: random.Random, items: Sequence[T]) -> T:
    """One item of a sequence is drawn with equal chances.

    Args:
        rng: The source of randomness.
        items: The sequence to draw from.

    Returns:
        The drawn item.
    """
    return items[below(rng, len(items))]


def draw(rng: random.Random, items: Sequence[T], count: int) -> list[T]:
    """Distinct items of a sequence are drawn in random order.

    Args:
        rng: The source of randomness.
        items: The sequence to draw from.
        count: How many to draw, at most ``len(items)``.

    Returns:
        The drawn items.
    """
    pool = list(items)
    return [pool.pop(below(rng, len(pool))) for _ in range(count)]
