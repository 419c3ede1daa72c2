"""The generator of the demo: its texts agree with themselves, and are the ones that we ship."""

import gzip
import hashlib
import importlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
from click.testing import CliRunner

from neuroal.demo import TEXTS
from neuroal.demo import documents as shipped


class Generator(NamedTuple):
    """The modules of `benchmarks/demo`, which no wheel holds."""

    text: ModuleType
    words: ModuleType
    world: ModuleType
    train: ModuleType
    command: ModuleType


@pytest.fixture(scope="module")
def generator(project: Path) -> Iterator[Generator]:
    """The generator is imported by its path: the tests may run without the checkout."""
    folder = project / "benchmarks"
    if not (folder / "demo").is_dir():
        pytest.skip(f"no demo/ in {folder}: the generator is in the source, not in the wheel")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        names = ("text", "words", "world", "train", "__main__")
        yield Generator(*(importlib.import_module(f"demo.{name}") for name in names))
        for name in [name for name in sys.modules if name.partition(".")[0] == "demo"]:
            del sys.modules[name]


@pytest.fixture(scope="module")
def text(generator: Generator) -> str:
    """Enough documents for every kind of story."""
    write = generator.text.documents
    return "\n".join(write("train", 400) + write("heldout", 100))


@pytest.fixture(scope="module")
def number(generator: Generator) -> Callable[[str], int]:
    """Reads a number that is written in words."""
    return {generator.words.spell(number): number for number in range(100)}.__getitem__


def matches_in(text: str, pattern: str) -> list[tuple[str, ...]]:
    """All matches, of which there have to be some: a changed wording must not empty a test."""
    matches = re.findall(pattern, text)
    assert len(matches) > 30, pattern
    return matches


def test_shipped_texts_are_the_generators(generator: Generator) -> None:
    for split in ("calibration", "heldout"):
        assert shipped(split) == generator.text.documents(split)


def test_the_command_writes_the_shipped_file(generator: Generator, tmp_path: Path) -> None:
    runs = [
        CliRunner().invoke(generator.command.main, ["texts", "--out", str(tmp_path / name)])
        for name in "ab"
    ]
    assert [run.exit_code for run in runs] == [0, 0]
    first, second = ((tmp_path / name).read_bytes() for name in "ab")
    assert first == second
    # compressed bytes depend on the release of zlib, what is compressed does not
    assert gzip.decompress(first) == gzip.decompress(TEXTS.read_bytes())


def test_text_is_the_one_the_model_was_trained_on(generator: Generator) -> None:
    text = "\n\n".join(
        document
        for split in generator.text.SPLITS
        for document in generator.text.documents(split, 20)
    )
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert digest == "2588e788206a904a573a1d79c0cbb329548f48d8d80b3f9897e300af25de5e4e"


def test_a_longer_split_starts_with_the_shorter_one(generator: Generator) -> None:
    assert generator.text.documents("train", 5) == generator.text.documents("train", 9)[:5]
    assert generator.text.documents("heldout", 0) == []
    assert len(generator.text.documents("heldout")) == generator.text.SPLITS["heldout"][1]


def test_splits_share_no_document(generator: Generator) -> None:
    everything = [
        document for split in generator.text.SPLITS for document in generator.text.documents(split)
    ]
    assert (
        len(set(everything))
        == len(everything)
        == sum(count for _, count in generator.text.SPLITS.values())
    )


@pytest.mark.parametrize(("split", "count"), [("test", 1), ("train", -1), ("train", 1_000_001)])
def test_unknown_split_or_number_is_refused(generator: Generator, split: str, count: int) -> None:
    with pytest.raises(ValueError, match=r"unknown split|count must lie"):
        generator.text.documents(split, count)


@pytest.mark.parametrize(
    ("value", "words"),
    [(0, "no"), (1, "one"), (19, "nineteen"), (20, "twenty"), (99, "ninety-nine")],
)
def test_numbers_are_spelt(generator: Generator, value: int, words: str) -> None:
    assert generator.words.spell(value) == words


def test_purchases_add_up(text: str, number: Callable[[str], int]) -> None:
    for purse, price, count, cost, left in matches_in(
        text,
        r"market with (\S+) coins? in .*? costs (\S+) coins?\. \w+ bought (\S+) \w+ of \w+ "
        r"and paid (\S+) coins?\. On the way home \w+ had (\S+) coins? left",
    ):
        assert number(cost) == number(count) * number(price)
        assert number(left) == number(purse) - number(cost) > 0


def test_gifts_add_up(text: str, number: Callable[[str], int]) -> None:
    for mine, yours, gift, kept, got in matches_in(
        text,
        r"had (\S+) \w+ and \w+ had (\S+) \w+\. \w+ gave \w+ (\S+) \w+\. "
        r"Now \w+ had (\S+) \w+ and \w+ had (\S+) \w+\.",
    ):
        assert number(kept) == number(mine) - number(gift) > 0
        assert number(got) == number(yours) + number(gift)


def test_journeys_add_up(text: str, number: Callable[[str], int]) -> None:
    for first, second, whole in matches_in(
        text,
        r"after (\S+) miles?, and then \w+ went another (\S+) miles? to \w+\. "
        r"That made (\S+) miles",
    ):
        assert number(whole) == number(first) + number(second)


def test_things_lie_where_they_were_put_last(text: str) -> None:
    for start, moves, asked, answer in matches_in(
        text, r'(There was a .*?)\. (.*?) "Where is the (\w+)\?" asked \w+\. "It is (.*?)," said'
    ):
        places = dict(re.findall(r"a (\w+) ((?:in|under|on|behind|by) the (?:blue )?\w+)", start))
        assert len(places) == 2
        for thing, place in re.findall(r"took the (\w+) and put it (.*?)\.", moves):
            assert place not in places.values()
            places[thing] = place
        assert places[asked] == answer


def test_gifts_of_noon_are_remembered_at_night(generator: Generator) -> None:
    for text in generator.text.documents("heldout", 50):
        opening, *_, closing = text.split("\n")
        kept = re.search(r"(\w+) found a (\w+ \w+) and took it home", opening)
        swap = re.search(r"At noon (\w+) showed the (.*?) to (\w+)\..* a (\w+ \w+) for it", text)
        assert kept and swap
        assert kept.groups() == swap.groups()[:2]
        assert (
            f"{swap[1]} still had the {swap[4]}, but the {swap[2]} belonged to {swap[3]}" in closing
        )
        today = re.search(r" on (\w+day)", opening)
        tomorrow = re.search(r"The next day was (\w+)", closing)
        assert today and tomorrow
        assert (generator.text.DAYS.index(today[1]) + 1) % len(
            generator.text.DAYS
        ) == generator.text.DAYS.index(tomorrow[1])


def test_pronouns_follow_names(generator: Generator, text: str) -> None:
    pronouns = {who.name: (who.she, who.whose) for who in generator.world.world().people}
    assert {"she", "he"} == {she for she, _ in pronouns.values()}
    for name, whose in matches_in(text, r"(\w+) could not find (\w+)") + matches_in(
        text, r"(\w+) put on (\w+)"
    ):
        assert pronouns[name][1] == whose
    for name, she in matches_in(text, r"(\w+) lives in \w+ and works as a \w+\. (She|He) "):
        assert pronouns[name][0] == she.lower()


def test_facts_are_the_same_in_all_documents(generator: Generator, text: str) -> None:
    towns = {town.name: town for town in generator.world.world().towns}
    for name, river in matches_in(text, r"(\w+) lies on the river (\w+)"):
        assert towns[name].river == river
    for name, year in matches_in(text, r"(\w+) was founded in the year (\d+)"):
        assert towns[name].year == int(year)
    homes = {who.name: who.town for who in generator.world.world().people}
    for name, town in matches_in(text, r"(\w+) lives in (\w+) and"):
        assert homes[name] == town


def test_nouns_agree_with_articles_and_numbers(text: str) -> None:
    assert not re.search(r"\ba [aeiou]\w+|\ban [^aeiou\W]\w+", text)
    assert not re.search(r"(?<!-)\bone (?:coin|mile|year|pear|nut|egg|plum)s\b", text)
    assert not re.search(r"\bno (?:coin|mile|year|pear|nut|egg|plum)", text)


def test_every_person_has_one_name_and_a_home_with_others(generator: Generator) -> None:
    names = [who.name for who in generator.world.world().people]
    assert len(set(names)) == len(names)
    assert all(
        len(generator.world.world().folk(town.name)) >= 3 for town in generator.world.world().towns
    )


def test_tokenizer_is_learnt_alike_twice(generator: Generator) -> None:
    one, two = (
        generator.train.make_tokenizer(generator.text.documents("train", 30)) for _ in range(2)
    )
    assert one.backend_tokenizer.to_str() == two.backend_tokenizer.to_str()


def test_learning_rate_rises_and_falls(generator: Generator) -> None:
    rates = [generator.train.rate(step, 1000) for step in range(1000)]
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert 0 < rates[-1] < 0.05 < max(rates) == 1
