"""From the command line, and the report of an earlier run, to a recipe."""

from __future__ import annotations

import dataclasses
import os
import re
import tomllib
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from neuroal.cli.command import say
from neuroal.errors import UsageError
from neuroal.recipe import TOP_UP_ROLES, Recipe
from neuroal.units import rough_duration

_FIELDS = frozenset(f.name for f in dataclasses.fields(Recipe))
_LONGEST_NAME = 100  # characters of an output folder's, before a digest
# What decides which plugins a run uses.
_CHOOSE = frozenset({"pruner", "top_up", "allocation", "pattern", "comparison", *TOP_UP_ROLES})


def read_recipe(file: str | None) -> Mapping[str, Any] | None:
    """Return the content of a neuroal.json, or of a recipe alone as `{"recipe": ...}`.

    A recipe alone may be JSON or, in a file named .toml, TOML.

    Raises:
        UsageError: The file cannot be read, or holds neither.
    """
    if file is None:
        return None
    if file.endswith(".toml"):
        return {"recipe": _read_toml(Path(file))}
    from neuroal.model.files import read_report

    data = read_report(Path(file), needed=())
    if "schema" not in data:
        return {"recipe": data}
    if not isinstance(data.get("recipe"), Mapping):
        raise UsageError(f"'{file}' holds no recipe")
    # Runs from before windows could begin with the token had none there.
    return data | {"recipe": {"bos": "never"} | data["recipe"]}


def _read_toml(path: Path) -> Mapping[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot read recipe '{path}': {reason}") from error
    except RecursionError as error:
        raise UsageError(f"recipe '{path}' is nested too deeply") from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"recipe '{path}' is not TOML: {error}") from error


def recipe_of(
    ctx: click.Context,
    recorded: Mapping[str, Any] | None,
    plugin_options: Iterable[str],
    allow_plugin_files: bool = False,
) -> Recipe:
    """Return the recipe of the command line: what is given there overrides what is recorded.

    Where neither names a method, it is that of the effort, or what `--within` chooses.

    Raises:
        UsageError: An option or a value is wrong, they do not go together, or what is recorded
            names a plugin's file that may not run.
    """
    from neuroal.run.effort import with_effort

    recipe = Recipe() if recorded is None else Recipe.from_json(recorded["recipe"])
    recorded_keys = set[str]() if recorded is None else set(recorded["recipe"])
    typed = {
        name: value
        for name, value in ctx.params.items()
        if name in _FIELDS and ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE
    }
    if recorded is not None:
        _check_plugin_files(ctx.params["recipe_file"], recipe, recorded, typed, allow_plugin_files)
    options = {name: dict(values) for name, values in recipe.options.items()}
    if options and typed.keys() & _CHOOSE:  # those of a plugin that is replaced go with it
        from neuroal.run.setup import setup

        used = {p.name for p in setup(dataclasses.replace(recipe, **typed, options={})).plugins}
        options = {name: values for name, values in options.items() if name in used}
    for name, values in parse_options(plugin_options).items():
        options[name] = options.get(name, {}) | values
    recipe = dataclasses.replace(recipe, **typed, options=options)
    effort, within = ctx.params["effort"], ctx.params["within"]
    given = typed.keys() | (set() if effort or within else recorded_keys)
    if within is None:
        return with_effort(recipe, effort, given)
    if recipe.model is None:
        raise UsageError("--within measures a model's time: give a MODEL")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UsageError("--within would choose in every process by itself: name an --effort")
    from neuroal.run import mistakes

    mistakes.check(recipe)
    from neuroal.cost.within import choose

    trust, progress = ctx.params["trust_remote_code"], ctx.params["progress"]
    choice = choose(recipe, within, effort, given, trust, progress)
    say(f"within {rough_duration(within)}: {choice}")
    return choice.recipe


def unnamed(ctx: click.Context) -> bool:
    """Return whether a command line leaves it to neuroal to choose the method."""
    given = ("effort", "within", "top_up", "recipe_file")
    return all(ctx.get_parameter_source(x) is not ParameterSource.COMMANDLINE for x in given)


def _check_plugin_files(
    file: str, recipe: Recipe, recorded: Mapping[str, Any], typed: Collection[str], allow: bool
) -> None:
    """Refuse plugins' files that only a recipe names, and those that are not as it recorded them.

    Raises:
        UsageError: There is one.
    """
    from neuroal.plugins import file_sha256, in_file, listing_of, refuse_code_of

    named = [
        (r, x) for r, x in _choices(recipe) if r not in typed and isinstance(x, str) and in_file(x)
    ]
    if not allow:
        refuse_code_of(file, (choice for _, choice in named))
    sums = {(p["role"], p["name"]): p["sha256"] for p in recorded.get("plugins", ())}
    for role, choice in named:
        listing = listing_of("pruner" if role == "search_pruner" else role, choice)
        if sums.get((role, listing.name), found := file_sha256(listing)) != found:
            raise UsageError(
                f"{role} '{choice}' is not the file that '{file}' recorded (its SHA-256 differs): "
                f"name it yourself to run it all the same: --{role.replace('_', '-')} {choice}"
            )


def _choices(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """Yield role and choice of every plugin that a recipe names."""
    yield from (("pruner", recipe.pruner), ("top_up", recipe.top_up))
    for role in TOP_UP_ROLES:
        choice = getattr(recipe, role)
        for x in choice if isinstance(choice, tuple) else (choice,):
            if x is not None:
                yield role, x


def parse_options(texts: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return options by plugin from texts such as `ria.alpha=0.5`.

    Raises:
        UsageError: One is malformed.
    """
    options: dict[str, dict[str, str]] = {}
    for text in texts:
        left, equals, value = text.partition("=")
        plugin, _, key = left.strip().rpartition(".")
        if not (equals and plugin and key):
            example = "-o linear_schedule.lambdas=0.05,0.1"
            raise UsageError(f"option '{text}' is not PLUGIN.key=value, such as {example}")
        options.setdefault(plugin, {})[key] = value
    return options


def default_out(recipe: Recipe) -> str:
    """Return a folder's name after all that is not as usual: `llama-wanda-neuroal-0.7-texts`.

    Model, method and sparsity come first, then calibration, samples and seed; whatever else is
    given is a short digest at the end.
    """
    model = str(recipe.model)
    parts = [Path(model).resolve().name if os.path.isdir(model) else model, recipe.pruner]
    given = "allocation" if recipe.allocation is not None else "ratios"
    parts.append(given if recipe.gives_ratios else recipe.top_up)
    for role in TOP_UP_ROLES:
        choice = getattr(recipe, role)
        parts += choice if isinstance(choice, tuple) else [choice]
    pattern = recipe.parsed_pattern()
    if isinstance(recipe.sparsity, tuple):
        parts.append("to".join(f"{x:g}" for x in (recipe.sparsity[0], recipe.sparsity[-1])))
    elif recipe.sparsity is not None or (pattern is None and recipe.allocation is None):
        parts.append(f"{recipe.wanted:g}")
    if pattern is not None:
        parts.append(f"{pattern.kept}of{pattern.of}")
    name = "-".join(_short(part) for part in parts if part is not None)
    usual = Recipe()
    more = [] if recipe.calibration is None else [Path(_short(recipe.calibration)).stem]
    more += [f"{recipe.samples}samples"] if recipe.samples != usual.samples else []
    more += [f"seed{recipe.seed}"] if recipe.seed != usual.seed else []
    said = {"model", "pruner", "top_up", "pattern", "calibration", "samples", "seed", *TOP_UP_ROLES}
    if not isinstance(recipe.sparsity, tuple):
        said.add("sparsity")
    rest = any(getattr(recipe, k) != getattr(usual, k) for k in _FIELDS - said)
    whole = "-".join([name, *more])
    if rest or len(whole) > _LONGEST_NAME:
        digest = recipe.digest()[:6]
        whole = f"{whole[:_LONGEST_NAME]}-{digest}"
    return whole


def _short(name: str) -> str:
    """Return the last part of a name, path or `file.py:Class`, as a file name may have it."""
    return re.sub(r"[^\w.-]+", "-", re.split(r"[/\\:]", name.rstrip("/\\"))[-1])
