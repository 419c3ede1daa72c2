"""What the documentation site has beyond its Markdown; mkdocs calls the `on_*` functions.

- The marker `<!-- commands -->` becomes the reference of every command, from the command itself.
- The marker `<!-- checks -->` becomes a table of the conformance checks of every role.
- The marker `<!-- source: FILE -->` becomes the file, a path from the project's root.
- A picture in `assets/*.svg` is put into the page, so that it follows the site's colours.
- A block of language `error` wraps its lines.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from neuroal.hookspecs import ROLES

COMMANDS, CHECKS = "<!-- commands -->", "<!-- checks -->"
ROOT = Path(__file__).resolve().parent.parent
_SOURCE = re.compile(r"^<!-- source: (\S+) -->$", re.MULTILINE)
_PICTURE = re.compile(r"^!\[([^\]]*)\]\((assets/[\w-]+\.svg)\)$", re.MULTILINE)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Return the page with its markers and pictures replaced."""
    if COMMANDS in markdown:
        from neuroal.cli import main

        markdown = markdown.replace(COMMANDS, "\n\n".join(commands(main, "neuroal")))
    if CHECKS in markdown:
        markdown = markdown.replace(CHECKS, "\n\n".join(checks(ROOT / "neuroal/testing")))

    def inlined(match: re.Match[str]) -> str:
        svg = (Path(config.docs_dir) / match[2]).read_text(encoding="utf-8")
        return f'<figure class="picture" role="img" aria-label="{match[1]}">\n{svg}</figure>'

    def listed(match: re.Match[str]) -> str:
        path = ROOT / match[1]
        text = path.read_text(encoding="utf-8").rstrip()
        language = {".py": "python"}.get(path.suffix, path.suffix[1:])
        title = "/".join(path.parts[-2:])
        return f'```{language} title="{title}"\n{text}\n```'

    markdown = _SOURCE.sub(listed, markdown)
    markdown = markdown.replace("```error\n", "```{ .text .error }\n")
    return _PICTURE.sub(inlined, markdown)


def checks(folder: Path) -> Iterator[str]:
    """Yield a table per role of the conformance checks, read from the source without running it."""
    trees = [ast.parse(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("*.py"))]
    kinds = {x.name: x for tree in trees for x in tree.body if isinstance(x, ast.ClassDef)}

    def methods(name: str) -> Iterator[tuple[str, str]]:
        for base in kinds[name].bases:
            if isinstance(base, ast.Name) and base.id in kinds:
                yield from methods(base.id)
        for x in kinds[name].body:
            if isinstance(x, ast.FunctionDef) and x.name.startswith("test_"):
                yield x.name, (ast.get_docstring(x) or "").partition("\n")[0]

    for role in ROLES:
        name = role.title().replace("_", "") + "Conformance"
        rows = [f"| `{test}` | {_cell(says)} |" for test, says in dict(methods(name)).items()]
        yield "\n".join([f"### {name}", "", f"| of a {role} | |", "|---|---|", *rows])


def commands(command: click.Command, name: str) -> Iterator[str]:
    """Yield the Markdown section of a command and those of its subcommands."""
    context = click.Context(command, info_name=name)
    if not isinstance(command, click.Group) or command.params:
        yield _section(command, name, context)
    if isinstance(command, click.Group):
        for child in command.list_commands(context):
            found = command.get_command(context, child)
            if found is not None and not found.hidden:
                yield from commands(found, f"{name} {child}")


def _section(command: click.Command, name: str, context: click.Context) -> str:
    pieces = " ".join(command.collect_usage_pieces(context))
    parts = [f"## `{name}` {{ #{name.replace(' ', '-')} }}", f"```text\n{name} {pieces}\n```"]
    parts.append("\n\n".join(" ".join(p.split()) for p in (command.help or "").split("\n\n")))
    for heading, rows in _options(command, context).items():
        table = [f"| {heading} | |", "|---|---|"]
        table += [f"| {_code(names)} | {_cell(help)} |" for names, help in rows]
        parts.append("\n".join(table))
    examples = getattr(command, "examples", ())
    if examples:
        parts.append("Examples:\n\n```sh\n" + "\n".join(examples) + "\n```")
    return "\n\n".join(parts)


def _options(command: click.Command, context: click.Context) -> dict[str, list[tuple[str, str]]]:
    groups: dict[str, list[tuple[str, str]]] = {}
    for parameter in command.params:
        record = parameter.get_help_record(context)
        if record is not None:
            groups.setdefault(getattr(parameter, "group", "Options"), []).append(record)
    return groups


def _code(text: str) -> str:
    return "`` " + text.replace("|", "\\|") + " ``"


def _cell(text: str) -> str:
    # A `*` or `_` in a help text is a character, what stands in backticks is code.
    parts = " ".join(text.split()).replace("|", "\\|").split("`")
    plain = [re.sub(r"([*_<\[])", r"\\\1", p) if i % 2 == 0 else p for i, p in enumerate(parts)]
    return "`".join(plain)
