"""What is wrong with a recipe or a text, as far as it is known before torch is imported."""

from __future__ import annotations

from neuroal.data.documents import no_tokenizer
from neuroal.data.sizes import check_sizes
from neuroal.data.source import parse_source, peek
from neuroal.model.places import has_tokenizer, locate, stated_context
from neuroal.plugins import check_requirements, listing_of
from neuroal.recipe import TOP_UP_ROLES, Recipe


def check(recipe: Recipe, *, in_memory: bool = False) -> None:
    """Refuse a recipe whose mistake shows without torch: a name, a folder, a column, a length.

    Args:
        recipe: What is asked.
        in_memory: The model is at hand, and not the one that the recipe names.

    Raises:
        UsageError: A distribution or a plugin is not there, or a number is out of range.
        NeuroalError: The model or a text is not there, or the text has not the column.
    """
    check_names(recipe)
    model = None if in_memory else recipe.model
    if model is not None:
        locate(model)
    for evaluated in recipe.evaluate:
        check_text(evaluated, model, recipe.evaluate_windows, recipe.evaluate_length)
    if recipe.calibration is not None:
        check_text(recipe.calibration, model, recipe.samples, recipe.length)


def check_names(recipe: Recipe) -> None:
    """Refuse distributions and plugins that are not there; nothing is imported.

    Raises:
        UsageError: One is not there.
    """
    check_requirements(recipe.requires)
    asked: list[tuple[str, object]] = [("pruner", recipe.pruner), ("top_up", recipe.top_up)]
    for role in TOP_UP_ROLES:
        choice = getattr(recipe, role)
        role = "pruner" if role == "search_pruner" else role
        asked += [(role, x) for x in (choice if isinstance(choice, tuple) else [choice])]
    for role, choice in asked:
        removed = role in ("refiner", "reconstruction") and choice == "none"
        if choice is not None and not removed:
            listing_of(role, choice)


def check_text(
    source: str, model: str | None, windows: int | None = None, length: int | None = None
) -> None:
    """Refuse a text, by its first row, that has not the column or that a model cannot read.

    Args:
        source: Of the text.
        model: Folder or hub name; None: whichever.
        windows: How many are asked for.
        length: Tokens of each that are asked for.

    Raises:
        UsageError: The source is none, or a number is out of range.
        NeuroalError: There is no such column, model, or tokenizer.
    """
    parsed = parse_source(source)
    holds = peek(parsed)
    if model is not None and holds == "text" and not has_tokenizer(model):
        raise no_tokenizer(parsed)
    check_sizes(windows, length, None if model is None else stated_context(model))
