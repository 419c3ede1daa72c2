"""Paragraphs of the demo texts are reports and small stories that agree with the land."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from .words import ANIMALS, GOODS, JOBS, below, draw, pick, spell
from .world import Person, River, Town, World

THINGS = ("key", "coin", "ring", "spoon", "letter", "candle", "button", "knife", "thimble", "bell")
SPOTS = (
    "in the basket",
    "under the bed",
    "on the shelf",
    "behind the door",
    "in the blue jug",
    "on the table",
    "in the chest",
    "by the window",
)


@dataclass(frozen=True)
class Scene:
    """A scene names who and what one document is about."""

    rng: random.Random
    land: World
    river: River
    town: Town
    hero: Person
    friend: Person
    third: Person


def capped(text: str) -> str:
    """A sentence starts with a capital letter."""
    return text[:1].upper() + text[1:]


def articled(noun: str) -> str:
    """A noun takes "an" before a vowel."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def counted(number: int, noun: str) -> str:
    """A counted noun agrees with its number."""
    return f"{spell(number)} {noun}" + ("" if number == 1 else "s")


def listed(items: list[str]) -> str:
    """The last two items of a list are joined by "and"."""
    return ", ".join(items[:-1]) + " and " + items[-1]


def _about_town(scene: Scene, town: Town, count: int) -> str:
    """Facts about a town come in random order and in one of several wordings."""
    river = next(river for river in scene.land.rivers if river.name == town.river)
    place = river.towns.index(town)
    if place + 1 < len(river.towns):
        onward = river.towns[place + 1].name
        lower = (
            f"The next town below {town.name} is {onward}, {counted(town.miles, 'mile')} away.",
            f"From {town.name} it is {counted(town.miles, 'mile')} down the river to {onward}.",
        )
    else:
        lower = (
            f"Below {town.name} the {river.name} flows into {river.mouth}.",
            f"{town.name} is the last town before {river.mouth}.",
        )
    facts = (
        (
            f"{town.name} lies on the river {town.river}.",
            f"The river {town.river} runs through {town.name}.",
        ),
        (
            f"The people of {town.name} trade in {town.good.name}.",
            f"{town.name} is known for its {town.good.name}.",
        ),
        (
            f"In the middle of {town.name} there is {town.landmark}.",
            f"Every visitor of {town.name} wants to see {town.landmark}.",
        ),
        (
            f"{town.name} was founded in the year {town.year}.",
            f"The first house of {town.name} was built in the year {town.year}.",
        ),
        (
            f"The flag of {town.name} shows {articled(town.emblem.name)} on {town.colour} cloth.",
            f"On the {town.colour} flag of {town.name} there is {articled(town.emblem.name)}.",
        ),
        lower,
    )
    return " ".join(pick(scene.rng, fact) for fact in draw(scene.rng, facts, count))


def _about_person(scene: Scene, who: Person, count: int) -> str:
    """Facts about a person start with the name and go on with the right pronoun."""
    she = capped(who.she)
    facts = (
        (f"{she} is {spell(who.age)} years old.",),
        (
            f"{she} has {articled(who.pet.name)} called {who.pet_name}.",
            f"{capped(who.whose)} {who.pet.name} is called {who.pet_name}.",
        ),
        (
            f"{capped(who.whose)} favourite food is {who.food}.",
            f"Nothing tastes better to {who.her} than {who.food}.",
        ),
        (f"In the evening {who.she} likes {who.hobby}.",),
        (
            f"{she} always wears a {who.colour} {who.garment}.",
            f"People know {who.her} by {who.whose} {who.colour} {who.garment}.",
        ),
    )
    first = pick(
        scene.rng,
        (
            f"{who.name} is the {who.job.title} of {who.town}.",
            f"{who.name} lives in {who.town} and works as a {who.job.title}.",
            f"The {who.job.title} of {who.town} is called {who.name}.",
        ),
    )
    rest = [pick(scene.rng, fact) for fact in draw(scene.rng, facts, count)]
    return " ".join([first, *rest])


def _town_report(scene: Scene) -> str:
    """A report states four facts about the town of the document or about another one."""
    other = pick(scene.rng, scene.land.towns)
    return _about_town(scene, pick(scene.rng, (scene.town, other)), 4)


def _river_report(scene: Scene) -> str:
    """A river is told from its source to its mouth."""
    river = pick(scene.rng, (scene.river, pick(scene.rng, scene.land.rivers)))
    names = listed([town.name for town in river.towns])
    return (
        f"The river {river.name} rises in {river.source} and flows into {river.mouth}. "
        f"It passes {spell(len(river.towns))} towns, {names}. "
        + _about_town(scene, pick(scene.rng, river.towns), 2)
    )


def _portrait(scene: Scene) -> str:
    """A portrait states facts about one person."""
    stranger = pick(scene.rng, scene.land.people)
    who = pick(scene.rng, (scene.hero, scene.friend, scene.third, stranger))
    return _about_person(scene, who, 3)


def _ages(scene: Scene) -> str:
    """Three people are compared by their ages."""
    people = draw(scene.rng, (scene.hero, scene.friend, scene.third), 3)
    young, middle, old = sorted(people, key=lambda who: who.age)
    first = f"{people[0].name} is {spell(people[0].age)}, {people[1].name} is "
    first += f"{spell(people[1].age)} and {people[2].name} is {spell(people[2].age)} years old. "
    return first + (
        f"So {old.name} is the oldest of the three, {young.name} is the youngest, and "
        f"{middle.name} is {counted(middle.age - young.age, 'year')} older than {young.name}."
    )


def _market(scene: Scene) -> str:
    """A purchase multiplies the price and leaves the right change."""
    rng, who, good = (
        scene.rng,
        scene.hero,
        pick(scene.rng, (scene.town.good, pick(scene.rng, GOODS))),
    )
    number = 2 + below(rng, 4)
    cost = number * good.price
    purse = cost + 1 + below(rng, 20)
    return (
        f"{who.name} went to the market with {counted(purse, 'coin')} in {who.whose} purse. "
        f"A {good.unit} of {good.name} costs {counted(good.price, 'coin')}. "
        f"{capped(who.she)} bought {counted(number, good.unit)} of {good.name} and paid "
        f"{counted(cost, 'coin')}. On the way home {who.she} had "
        f"{counted(purse - cost, 'coin')} left."
    )


def _moves(scene: Scene) -> str:
    """Things move between places, and the last question asks where they are."""
    rng = scene.rng
    things = draw(rng, THINGS, 2)
    where = dict(zip(things, draw(rng, SPOTS, 2), strict=True))
    first, second = things
    lines = [f"There was a {first} {where[first]} and a {second} {where[second]}."]
    for _ in range(2 + below(rng, 2)):
        thing = pick(rng, things)
        where[thing] = pick(rng, [spot for spot in SPOTS if spot not in where.values()])
        who = pick(rng, (scene.hero, scene.friend))
        lines.append(f"{who.name} took the {thing} and put it {where[thing]}.")
    asked = pick(rng, things)
    asker, teller = draw(rng, (scene.hero, scene.friend, scene.third), 2)
    lines.append(
        f'"Where is the {asked}?" asked {asker.name}. "It is {where[asked]}," said {teller.name}.'
    )
    return " ".join(lines)


def _journey(scene: Scene) -> str:
    """A journey along a river adds up the miles of its two legs."""
    start = below(scene.rng, 2)
    one, two, goal = scene.river.towns[start : start + 3]
    who = pick(scene.rng, (scene.friend, scene.third))
    how = pick(scene.rng, ("by boat", "on foot", "in a cart"))
    return (
        f"{who.name} travelled {how} from {one.name} to {goal.name}. First {who.she} came to "
        f"{two.name} after {counted(one.miles, 'mile')}, and then {who.she} went another "
        f"{counted(two.miles, 'mile')} to {goal.name}. That made "
        f"{counted(one.miles + two.miles, 'mile')} along the {scene.river.name}. "
        + _about_town(scene, goal, 1)
    )


def _lost_pet(scene: Scene) -> str:
    """A lost pet is found where its kind hides, by its own sound."""
    rng = scene.rng
    owner, finder = draw(rng, (scene.hero, scene.friend, scene.third), 2)
    pet = owner.pet
    return (
        f"{owner.name} could not find {owner.whose} {pet.name}. "
        f'"{owner.pet_name}, {owner.pet_name}!" {owner.she} called. {finder.name} brought some '
        f"{pet.food}, because every {pet.name} likes {pet.food}. Then something {pet.sound} "
        f"{pet.den}. It was {owner.pet_name}, and {owner.name} thanked {finder.name} and gave "
        f"{finder.her} some {finder.food}, {finder.whose} favourite food."
    )


def _work(scene: Scene) -> str:
    """A day of work is told with the tool, the place and the work of the job."""
    who = pick(scene.rng, (scene.hero, scene.friend, scene.third))
    return (
        f"In the morning {who.name} put on {who.whose} {who.colour} {who.garment}, took "
        f"{who.job.tool} and went to {who.job.place}. There {who.she} {who.job.work}, as a "
        f"{who.job.title} must. When the work was done, {who.she} spent the evening {who.hobby}."
    )


def _sharing(scene: Scene) -> str:
    """A gift takes from one person what it adds to the other."""
    rng = scene.rng
    giver, taker = draw(rng, (scene.hero, scene.friend, scene.third), 2)
    noun = pick(rng, ("pear", "nut", "egg", "plum", "pancake"))
    mine, yours = 4 + below(rng, 12), 1 + below(rng, 8)
    gift = 1 + below(rng, mine - 2)
    return (
        f"{giver.name} had {counted(mine, noun)} and {taker.name} had {counted(yours, noun)}. "
        f"{giver.name} gave {taker.name} {counted(gift, noun)}. Now {giver.name} had "
        f"{counted(mine - gift, noun)} and {taker.name} had {counted(yours + gift, noun)}."
    )


def _quiz(scene: Scene) -> str:
    """Questions about the land are answered from its facts."""
    rng = scene.rng
    town, who = pick(rng, scene.land.towns), pick(rng, scene.land.people)
    good, animal, job = pick(rng, GOODS), pick(rng, ANIMALS), pick(rng, JOBS)
    makers = [place.name for place in scene.land.towns if place.good == good]
    cards = (
        f'"Which river runs through {town.name}?" "The {town.river}."',
        f'"In which year was {town.name} founded?" "In the year {town.year}."',
        f'"What do they trade in {town.name}?" "{capped(town.good.name)}."',
        f'"Which animal is on the flag of {town.name}?" "{capped(articled(town.emblem.name))}."',
        f'"Where does {who.name} live?" "In {who.town}."',
        f'"What is the work of {who.name}?" "{capped(who.she)} is a {who.job.title}."',
        f'"How old is {who.name}?" "{capped(who.she)} is {spell(who.age)} years old."',
        f'"What does {who.name} like to eat?" "{capped(who.food)}."',
        f'"Where do they trade in {good.name}?" "In {listed(makers)}."',
        f'"How much is a {good.unit} of {good.name}?" "{capped(counted(good.price, "coin"))}."',
        f'"Where does {articled(animal.name)} hide?" "{capped(animal.den)}."',
        f'"What does a {job.title} need?" "{capped(job.tool)}."',
    )
    asker, teller = draw(rng, (scene.hero, scene.friend, scene.third), 2)
    return f"{asker.name} asked and {teller.name} answered. " + " ".join(draw(rng, cards, 3))


KINDS: tuple[Callable[[Scene], str], ...] = (
    _town_report,
    _river_report,
    _portrait,
    _ages,
    _market,
    _moves,
    _journey,
    _lost_pet,
    _work,
    _sharing,
    _quiz,
)
