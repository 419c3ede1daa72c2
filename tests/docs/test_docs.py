"""The manual says what the code does: hooks, roles, methods, options and links.

What its code blocks do is tested in `test_pages.py`.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.metadata
import inspect
import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.exceptions import Exit

import neuroal
from neuroal.cli import main
from neuroal.errors import UsageError
from neuroal.hookspecs import ROLES
from neuroal.plugins import available, describe, find
from neuroal.testing import CLASSES

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = sorted(p for p in DOCS.rglob("*.md") if "examples" not in p.relative_to(DOCS).parts)
TEXTS = [*PAGES, DOCS.parent / "README.md", DOCS.parent / "CONTRIBUTING.md"]
HOOKS = {name: hook for role in ROLES.values() for name, hook in role.hooks.items()}


def relative(path: Path) -> str:
    return path.relative_to(DOCS.parent).as_posix()


def prose(text: str) -> str:
    """The text without its fenced blocks."""
    return re.sub(r"^( *)```.*?^\1```", "", text, flags=re.MULTILINE | re.DOTALL)


def section(text: str, heading: str) -> str:
    """What stands under a heading, up to the next of its level or above."""
    match = re.search(rf"^(#+) {re.escape(heading)}$", text, re.MULTILINE)
    assert match, f"no heading {heading!r}"
    rest = text[match.end() :]
    end = re.search(rf"^#{{1,{len(match[1])}}} ", rest, re.MULTILINE)
    return rest[: end.start()] if end else rest


# -- hooks and roles ---------------------------------------------------------------------------


def page_of(hook: str) -> str:
    """The page with a hook: that of its first role, or of all roles."""
    roles = [name for name, role in ROLES.items() if hook in role.hooks]
    shared = hook in ("required_statistics", "describe")
    return (DOCS / "roles" / f"{'index' if shared else roles[0]}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_is_documented_with_its_exact_signature(name: str) -> None:
    text = section(page_of(name), name)
    shown = re.search(r"^```python\n(def .*?)^```", text, re.MULTILINE | re.DOTALL)
    assert shown, f"no signature of {name}"
    signature = inspect.signature(HOOKS[name])
    wanted = ast.parse(f"def {name}{signature}: ...".replace("'", ""))
    assert ast.unparse(ast.parse(shown[1])) == ast.unparse(wanted)


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_is_explained(name: str) -> None:
    text = section(page_of(name), name)
    for part in ("**Called**", "**Returns**", "**Minimal**", "**Errors**"):
        assert part in text, part
    for argument in list(inspect.signature(HOOKS[name]).parameters)[1:]:
        assert f"`{argument}`" in text, argument


def test_every_hook_is_in_the_table_of_calls() -> None:
    text = (DOCS / "roles" / "index.md").read_text(encoding="utf-8")
    table = section(text, "When each hook is called")
    assert set(re.findall(r"^\| \[`(\w+)`\]", table, re.MULTILINE)) == set(HOOKS)


def test_no_hook_is_documented_that_does_not_exist() -> None:
    texts = [page.read_text(encoding="utf-8") for page in (DOCS / "roles").glob("*.md")]
    found = [re.findall(r"^### ([a-z]+(?:_[a-z]+)+|describe)$", x, re.MULTILINE) for x in texts]
    assert sorted(itertools.chain(*found)) == sorted(HOOKS)


def test_built_in_statistics_are_documented() -> None:
    from neuroal.walk.statistics import BUILT_IN

    text = (DOCS / "roles" / "index.md").read_text(encoding="utf-8")
    text = section(text, "Statistics")
    assert set(re.findall(r"^\| `(\w+)`", text, re.MULTILINE)) == set(BUILT_IN)


@pytest.mark.parametrize("role", [*ROLES, "top_up"])
def test_a_role_has_a_page(role: str) -> None:
    text = (DOCS / "roles" / f"{role}.md").read_text(encoding="utf-8")
    assert text.startswith(f"# {role}\n")
    assert f"({role}.md)" in (DOCS / "roles" / "index.md").read_text(encoding="utf-8")
    assert f"roles/{role}.md" in (DOCS.parent / ".mkdocs.yml").read_text(encoding="utf-8")


# -- methods -----------------------------------------------------------------------------------

SECTIONS = {
    "pruner": "Pruners",
    "block_ratios": "Block ratios",
    "row_ratios": "Row ratios",
    "alignment": "Alignment",
    "refiner": "Refiners",
    "reconstruction": "Reconstructions",
    "exporter": "Exporters",
    "top_up": "Presets",
}


@pytest.mark.parametrize(("role", "heading"), SECTIONS.items())
def test_the_methods_page_has_every_plugin_that_comes_with_neuroal(role: str, heading: str) -> None:
    text = section((DOCS / "methods.md").read_text(encoding="utf-8"), heading)
    firsts = re.findall(r"^\| (`\w[^|]*) \|", text, re.MULTILINE)
    named = {name for cell in firsts for name in re.findall(r"`([\w-]+)`", cell)}
    assert named == {x.name for x in available(role) if x.distribution == "neuroal"}


# -- options and commands ----------------------------------------------------------------------


def commands(command: click.Command, *path: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        for name, child in command.commands.items():
            yield from commands(child, *path, name)


COMMANDS = dict(commands(main))
OPTIONS = {
    option
    for command in COMMANDS.values()
    for parameter in command.params
    for option in (*parameter.opts, *parameter.secondary_opts)
} | {"--help"}
OTHER_TOOLS = re.compile(
    r"\b(?:bash|hf|lm_eval|make|mypy|pip|pytest|python|torchrun|twine) (?:\\\n|[^`\n])*"
)


def test_the_changelog_names_every_plugin_that_comes_with_neuroal() -> None:
    text = (DOCS.parent / "CHANGELOG.md").read_text(encoding="utf-8")
    ours = importlib.metadata.distribution("neuroal").entry_points
    names = {point.name for point in ours if point.group.startswith("neuroal.")}
    assert {name for name in names if f"`{name}`" not in text} == set()


@pytest.mark.parametrize("path", TEXTS, ids=relative)
def test_options_that_a_page_shows_exist(path: Path) -> None:
    text = OTHER_TOOLS.sub("", path.read_text(encoding="utf-8"))
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", text)) <= OPTIONS


def shown_commands(path: Path) -> list[str]:
    """Every `neuroal …` line of a page's code blocks."""
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"^ *```(?:sh|console|bash)[^\n]*\n(.*?)^ *```", text, re.M | re.S)
    lines = [line.strip().removeprefix("$ ") for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("neuroal ")]


def named_commands(path: Path) -> list[str]:
    """Every `neuroal …` in a page's prose: a command, or its beginning."""
    spans = re.findall(r"`(neuroal [^`]+)`", prose(path.read_text(encoding="utf-8")))
    return [" ".join(span.split()) for span in spans]


def parse(line: str) -> click.Context:
    """Have click parse a command line without running it."""
    words = shlex.split(line, comments=True)[1:]
    path: tuple[str, ...] = ()
    while (*path, *words[:1]) in COMMANDS and words:
        path, words = (*path, words[0]), words[1:]
    if isinstance(COMMANDS[path], click.Group) and words and not words[0].startswith("-"):
        raise click.UsageError(f"no such command: {words[0]}")
    return COMMANDS[path].make_context(" ".join(("neuroal", *path)), words)


@pytest.mark.parametrize("path", TEXTS, ids=relative)
def test_commands_that_a_page_shows_parse(path: Path) -> None:
    for line in shown_commands(path):
        try:
            parse(line)
        except click.UsageError as error:
            pytest.fail(f"{line}: {error.format_message()}")


@pytest.mark.parametrize("path", TEXTS, ids=relative)
def test_commands_that_a_page_names_exist(path: Path) -> None:
    for line in named_commands(path):
        try:
            with contextlib.suppress(click.MissingParameter, click.BadOptionUsage, Exit):
                parse(line)
        except click.UsageError as error:
            pytest.fail(f"{line}: {error.format_message()}")


@pytest.mark.parametrize("path", sorted(COMMANDS), ids=" ".join)
def test_examples_in_the_help_parse(path: tuple[str, ...]) -> None:
    for line in getattr(COMMANDS[path], "examples", ()):
        parse(line)


@pytest.mark.parametrize("path", TEXTS, ids=relative)
def test_plugin_options_that_a_page_shows_exist(path: Path) -> None:
    for line in shown_commands(path):
        for name, key in re.findall(r"-o (\w+)\.(\w+)=", line):
            try:
                found = find(name)
            except UsageError:  # a plugin of the page's own
                assert ".py:" in line or path.stem in ("tutorial", "publish"), line
                continue
            assert any(key == row[0] for x in found for row in describe(x).options), line


@pytest.mark.parametrize("heading", [x for role, x in SECTIONS.items() if role in ROLES])
def test_every_method_says_when_to_use_it(heading: str) -> None:
    text = section((DOCS / "methods.md").read_text(encoding="utf-8"), heading)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert lines[0].endswith("| use it when |")
    rows = [re.split(r"(?<!\\)\|", line) for line in lines if line.startswith("| `")]
    assert {len(cells) for cells in rows} == {len(re.split(r"\|", lines[0]))}
    assert all(len(cells[-2].strip()) > 10 for cells in rows)


def test_the_directory_lists_the_examples_in_order() -> None:
    text = (DOCS / "directory.md").read_text(encoding="utf-8")
    names = re.findall(r"^\| `([\w-]+)` \|", text, re.MULTILINE)
    assert names == sorted(names)
    for folder in (DOCS / "examples").glob("neuroal-*"):
        row = next(line for line in text.splitlines() if line.startswith(f"| `{folder.name}` "))
        declared = (folder / "pyproject.toml").read_text(encoding="utf-8")
        points = re.findall(r'^\[project.entry-points."neuroal.(\w+)"\]\n(\w+) =', declared, re.M)
        for role, name in points:
            if role in ROLES:
                assert role in row and f"`{name}`" in row
    assert "## How to get listed" in text


def test_the_parity_page_names_its_windows_and_one_command_a_row() -> None:
    text = (DOCS / "parity.md").read_text(encoding="utf-8")
    tree = ast.parse((DOCS.parent / "benchmarks" / "parity.py").read_text(encoding="utf-8"))
    (head,) = (
        ast.literal_eval(x.value)
        for x in tree.body
        if isinstance(x, ast.Assign) and getattr(x.targets[0], "id", "") == "HEAD"
    )
    assert text.startswith(head)
    assert "`SHARED/reference/llama.calibration.jsonl`" in text
    (command,) = re.findall(r"^    (OMP_\w+=1 [^\\\n]*(?:\\\n[^\\\n]*)*)", text, re.MULTILINE)
    words = shlex.split(command.replace("\\\n", " "))
    assert words[2:5] == ["python", "benchmarks/parity.py", "SHARED"]
    known = {arg.value for x in ast.walk(tree) if isinstance(x, ast.Call) for arg in x.args
             if isinstance(arg, ast.Constant)}  # fmt: skip
    assert {word for word in words if word.startswith("--")} <= known


# -- links -------------------------------------------------------------------------------------


def slug(heading: str) -> str:
    """A heading's anchor, as Python-Markdown makes it."""
    heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


def anchors(path: Path) -> set[str]:
    text = path.read_text(encoding="utf-8")
    found: set[str] = set(re.findall(r"\{ #([\w.-]+) \}", text))
    found |= {slug(h) for h in re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)}
    found |= set(re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE))
    if path.name == "cli.md":
        found |= {"-".join(("neuroal", *names)) for names in COMMANDS}
    if path.name == "testing.md":
        found |= {kind.__name__.lower() for kind in CLASSES.values()}
    return found


@pytest.mark.parametrize("path", TEXTS, ids=relative)
def test_internal_links_resolve(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(path.read_text(encoding="utf-8"))):
        if re.match(r"https?://", link):
            continue
        target, _, anchor = link.partition("#")
        file = (path.parent / target).resolve() if target else path
        assert file.exists(), link
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), link


@pytest.mark.parametrize("path", PAGES, ids=relative)
def test_files_that_a_page_shows_exist(path: Path) -> None:
    for file in re.findall(r"^<!-- source: (\S+) -->$", path.read_text(encoding="utf-8"), re.M):
        assert (DOCS.parent / file).is_file(), file


def test_the_reference_has_every_public_name() -> None:
    text = (DOCS / "reference" / "neuroal.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"^::: neuroal\.(\w+)$", text, re.MULTILINE))
    shown |= set(re.findall(r"\{ #neuroal\.(\w+) \}", text))
    assert shown == set(neuroal.__all__) - {"__version__"}


def test_pictures_are_readable_in_light_and_dark() -> None:
    for path in (DOCS / "assets").glob("*.svg"):
        text = path.read_text(encoding="utf-8")
        assert "prefers-color-scheme: dark" in text
        assert not re.findall(r'(?:fill|stroke)="#', text), "colours are the style's"
