"""Every code block of the manual works.

A page is read from top to bottom in a folder of its own, which has what the pages take for granted:
a tiny model `path/to/llama`, `texts.jsonl` and `test.txt`.

- A block with a title is a file, and is written.
- `python` runs; blocks of a page share their names. A `### hook`'s signature is not run. In the
  pages in `NOTEBOOKS` a `text` block behind it is what it prints, and the value of its last line.
- `sh` runs line by line; `cd` lasts to the end of the page. A `text` block right behind it is its
  output, where `...` stands for anything; output that begins with `Error:` means a failure.
- `toml`, `yaml` and `json` (line by line) must parse; `text` elsewhere is not looked at. What
  stands in `error` blocks is tested in `test_hook_errors.py`.
- `pip install -e` puts the package and its metadata on the path, without pip or network.
- `<!-- test: skip because WHY -->` before a block leaves it out. With `parse` in place of `skip`
  its commands are only parsed; with `fails` its last line has to fail.

So that this takes seconds, runs of `neuroal prune` and `neuroal evaluate` get few and short windows
unless the page says how many, and their output is not compared. The pages in `LONG`, whose commands
have tests elsewhere, are for `make test-full`; so are those in `AS_WRITTEN`, where what shows its
output runs as it stands.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner

import neuroal
from neuroal.cli import main
from neuroal.export import export
from neuroal.hookspecs import ROLES
from neuroal.plugins import Plugin, load
from neuroal.testing import failures, finished_run, tiny_model, tiny_tokenizer, windows

DOCS = Path(__file__).resolve().parents[2] / "docs"
# Pages of results show the commands of the benchmarks; examples have tests of their own.
UNTESTED = {"benchmarks.md", "best.md", "parity.md", "results.md", "streaming.md"}
PAGES = sorted(
    name
    for name in (p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md"))
    if name not in UNTESTED and not name.startswith("examples/")
)
AS_WRITTEN = ["getting-started.md"]
LONG = {
    "howto/bench.md",
    "howto/finetune.md",
    "howto/studies.md",
    "howto/zero-shot.md",
    "reference/testing.md",
    "tour.md",
    "tutorial.md",
}
NOTEBOOKS = ["notebook.md"]
EXTRAS = {  # that a page needs
    "howto/zero-shot.md": ("lm_eval", "eval"),
    "howto/finetune.md": ("accelerate", "finetune"),
}
SMALL = {"--samples": "2", "--search-samples": "1", "--length": "16"}
LANGUAGES = {"sh", "python", "text", "error", "toml", "json", "yaml"}


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        language: Of its first line.
        title: Name of the file that it is, or "".
        text: What it holds.
        line: Where it stands.
        mode: Of the marker before it: skip, parse, fails, or "".
        output: The `text` block right behind it, or None.
    """

    language: str
    title: str
    text: str
    line: int
    mode: str
    output: str | None


_FENCE = re.compile(
    r"^(?:[ \t]*<!-- test: (?P<mode>\w+) because (?P<why>[^\n]+) -->\n)?"
    r"(?P<indent>[ \t]*)```(?P<language>[\w-]*)(?P<rest>[^\n`]*)\n"
    r"(?P<text>.*?)^(?P=indent)```[ \t]*\n"
    r"(?:\n(?P=indent)```text\n(?P<output>.*?)^(?P=indent)```[ \t]*\n)?",
    re.MULTILINE | re.DOTALL,
)


def blocks(text: str, shows: Collection[str] = ("sh",)) -> Iterator[Block]:
    """Yield the fenced blocks of a page, together with the output of those languages."""
    position = 0
    while match := _FENCE.search(text, position):
        indent = len(match["indent"])
        position = match.end() if match["language"] in shows else match.end("text")
        if match["language"] not in shows:
            position = text.index("\n", match.end("text")) + 1
        output = match["output"] if match["language"] in shows else None
        title = re.search(r'title="([^"]+)"', match["rest"])
        yield Block(
            match["language"],
            title[1] if title else "",
            _dedent(match["text"], indent),
            text.count("\n", 0, match.start("language")) + 1,
            match["mode"] or "",
            None if output is None else _dedent(output, indent),
        )


def _dedent(text: str, by: int) -> str:
    return "".join(line[by:] if line.strip() else "\n" for line in text.splitlines(keepends=True))


@dataclass
class Reader:
    """Someone who types what a page says.

    Attributes:
        small: All runs get few windows, and what takes longer is left out; else what shows its
            output runs as it stands.
        desk: The folder in which the page begins.
        run_process: Runs other commands than neuroal's.
        names: What the page's Python has defined.
    """

    small: bool
    desk: Path
    run_process: Callable[..., subprocess.CompletedProcess[str]]
    names: dict[str, Any] = field(default_factory=lambda: {"__name__": "page"})

    def follow(self, block: Block) -> None:
        if block.mode == "skip":
            return
        if block.title:
            path = Path(block.title)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")
        if block.language == "python" and not block.title:
            self.execute(block)
        elif block.language == "python":
            compile(block.text, block.title, "exec")
        elif block.language == "toml":
            tomllib.loads(block.text)
        elif block.language == "yaml":
            yaml.safe_load(block.text)
        elif block.language == "json":
            for line in block.text.splitlines():
                json.loads(line)
        elif block.language == "sh" and block.mode != "parse":  # test_docs.py parses all of them
            self.type(block)

    def execute(self, block: Block) -> None:
        if block.text.rstrip().endswith(": ...") and block.text.startswith("def "):
            ast.parse(block.text)
            return
        place = f"block in line {block.line}"
        if block.output is None:
            exec(compile(block.text, place, "exec"), self.names)
            return
        *lines, last = ast.parse(block.text).body
        before = ast.Module([*lines, *([] if isinstance(last, ast.Expr) else [last])], [])
        with contextlib.redirect_stdout(io.StringIO()) as said:
            exec(compile(before, place, "exec"), self.names)
            if isinstance(last, ast.Expr):
                value = eval(compile(ast.Expression(last.value), place, "eval"), self.names)
                print("" if value is None else repr(value))
        output = said.getvalue()
        assert matches(output, block.output), f"{block.text}gave\n{output}"

    def type(self, block: Block) -> None:
        lines = [x for x in block.text.replace("\\\n", " ").splitlines() if x.strip()]
        shown = block.output or ""
        fails = block.mode == "fails" or shown.startswith("Error:")
        output, compared = "", True
        for line in lines:
            status, said, whole = self.run(line, self.small or block.output is None)
            assert (status != 0) == (fails and line == lines[-1]), f"{line}\n{said}"
            output, compared = output + said, compared and (whole or fails)
        if block.output is not None and compared:
            assert matches(output, block.output), f"{block.text}gave\n{output}"

    def run(self, line: str, small: bool) -> tuple[int, str, bool]:
        """Return exit code and output of a line, and whether it ran as it stands."""
        words = shlex.split(line, comments=True)
        if words[0] == "cd":
            os.chdir(words[1])
            return 0, "", True
        if words[:3] == ["pip", "install", "-e"]:
            install(Path(words[3].partition("[")[0]))
            return 0, "", False
        if words[0] != "neuroal" or {"|", ">", "&&"} & set(words):
            return (*self.shell(line), True)
        if small and words[1] == "demo":
            return 0, "", False
        extra = self.fewer(words) if small else []
        result = CliRunner().invoke(main, words[1:] + extra, prog_name="neuroal")
        return result.exit_code, result.output, not extra

    def fewer(self, words: list[str]) -> list[str]:
        """Return options that make a run small."""
        if words[1] in ("evaluate", "compare"):
            small = {"--windows": "2", "--length": "16"}
            if words[1] == "compare" and "--data" not in words:
                return []
            if "--tasks" in words:
                small = {"--limit": "2"}
        elif words[1] == "prune" and "--dry-run" not in words:
            small = dict(SMALL)
        else:
            return []
        for word in words:
            if Path(word).is_file() and '"input_ids"' in Path(word).read_text(errors="ignore"):
                del small["--length"]  # the rows' own
        return [part for key, value in small.items() if key not in words for part in (key, value)]

    def shell(self, line: str) -> tuple[int, str]:
        path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
        own = [str(x) for x in map(Path, sys.path) if x.is_relative_to(self.desk)]
        done = self.run_process(
            ["bash", "-c", line],
            env=dict(os.environ) | {"PATH": path, "PYTHONPATH": os.pathsep.join(own[:-1])},
            stderr=subprocess.STDOUT,
        )
        return done.returncode, done.stdout


def install(folder: Path) -> None:
    """Put a package of `src` layout and its metadata on the path, as an editable install does."""
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    name, version = project["name"], project["version"]
    site = folder.resolve() / "site"
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    points = (
        f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in entries.items())
        for group, entries in project["entry-points"].items()
    )
    (info / "entry_points.txt").write_text("\n".join(points))
    sys.path[:0] = [str(site), str(folder.resolve() / "src")]
    importlib.invalidate_caches()


def matches(output: str, shown: str) -> bool:
    """Tell whether a page shows a command's output; `...` stands for anything."""

    def plain(text: str) -> str:
        return "\n".join(line.rstrip() for line in text.strip().splitlines())

    parts = [re.escape(part) for part in plain(shown).split("...")]
    return re.fullmatch(".*?".join(parts), plain(output), re.DOTALL) is not None


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs") / "llama"
    tiny_model("llama", blocks=2).save_pretrained(folder)  # type: ignore[operator]
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def desk(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with what pages take for granted; what they import is forgotten."""
    (tmp_path / "path/to").mkdir(parents=True)
    (tmp_path / "path/to/llama").symlink_to(llama, target_is_directory=True)
    text = "The quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 4
    (tmp_path / "texts.jsonl").write_text((json.dumps({"text": text}) + "\n") * 20)
    (tmp_path / "test.txt").write_text(text * 20)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(x, marks=pytest.mark.matrix) if x in LONG else x
        for x in PAGES
        if x not in AS_WRITTEN
    ],
)
def test_page(name: str, desk: Path, run_process: Callable[..., Any]) -> None:
    if name in EXTRAS:
        module, extra = EXTRAS[name]
        pytest.importorskip(module, reason=f"{module} is not installed: neuroal[{extra}]")
    reader = Reader(small=True, desk=desk, run_process=run_process)
    shows = ("sh", "python") if name in NOTEBOOKS else ("sh",)
    for block in blocks((DOCS / name).read_text(encoding="utf-8"), shows):
        reader.follow(block)


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.parametrize("name", AS_WRITTEN)
def test_page_as_written(name: str, desk: Path, run_process: Callable[..., Any]) -> None:
    reader = Reader(small=False, desk=desk, run_process=run_process)
    for block in blocks((DOCS / name).read_text(encoding="utf-8")):
        reader.follow(block)


@pytest.mark.parametrize("name", PAGES)
def test_blocks_say_what_they_are(name: str) -> None:
    text = (DOCS / name).read_text(encoding="utf-8")
    found = list(blocks(text))
    fences = len(re.findall(r"^[ \t]*```", text, re.MULTILINE))
    assert fences == 2 * sum(1 if b.output is None else 2 for b in found)
    for block in found:
        assert block.language in LANGUAGES, f"line {block.line}: {block.language}"
        assert block.mode in ("", "skip", "parse", "fails"), f"line {block.line}: {block.mode}"
    assert text.count("<!-- test:") == sum(bool(b.mode) for b in found), "a marker without a block"


def plugins_of(name: str, folder: Path) -> Iterator[Plugin]:
    """The plugins in the files of a page."""
    for block in blocks((DOCS / name).read_text(encoding="utf-8")):
        if block.language != "python" or not block.title:
            continue
        file = folder / Path(block.title).name
        file.write_text(block.text, encoding="utf-8")
        for node in ast.parse(block.text).body:
            if isinstance(node, ast.ClassDef):
                methods = {x.name for x in node.body if isinstance(x, ast.FunctionDef)}
                for role in ROLES.values():
                    if methods & set(role.required):
                        yield from load([(role.name, f"{file}:{node.name}")])


@pytest.mark.parametrize("name", [name for name in PAGES if name != "tutorial.md"])
def test_plugins_of_a_page_pass_the_conformance_checks(name: str, tmp_path: Path) -> None:
    for plugin in plugins_of(name, tmp_path):
        assert not list(failures(plugin)), plugin.label


def minimal(hook: str) -> dict[str, Any]:
    """The functions of a hook's minimal example on the page of its role."""
    pages = [page.read_text(encoding="utf-8") for page in sorted((DOCS / "roles").glob("*.md"))]
    (text,) = [page for page in pages if f"\n### {hook}\n" in page]
    code = re.search(
        rf"^### {hook}$.*?^\*\*Minimal\*\*.*?^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL
    )
    assert code, hook
    names: dict[str, Any] = {}
    exec(code[1], names)
    return {k: v for k, v in names.items() if hasattr(v, "neuroal_impl")}


# `measure_block`, which two roles have, is shown in the first.
HOOKS = {hook: role for role in reversed(ROLES) for hook in ROLES[role].hooks}


@pytest.mark.parametrize(
    ("role", "hook"), [(r, h) for h, r in HOOKS.items() if h != "required_statistics"]
)
def test_minimal_examples_work(role: str, hook: str, tmp_path: Path) -> None:
    methods = minimal(hook)
    assert hook in methods
    if not set(ROLES[role].required) & set(methods):
        methods |= minimal(ROLES[role].required[0])
    kind = dataclass(frozen=True, eq=False)(type("Minimal", (), methods))
    if role == "exporter":
        export(finished_run(tmp_path / "run").folder, kind(), tmp_path / "out")
        assert (tmp_path / "out/export.json").is_file()
        return
    choice = (kind(),) if role == "block_ratios" else kind()
    recipe = neuroal.Recipe(sparsity=0.6, search_samples=2, **{role: choice})
    model = tiny_model("llama", blocks=2)
    report = neuroal.prune(model, windows=windows(2, 8), recipe=recipe)
    assert report.sparsity["achieved"] == pytest.approx(0.6, abs=1e-3)
    assert torch.is_grad_enabled()


def test_output_matching() -> None:
    assert matches("a 1\nb 2  \n", "a ...\nb 2\n")
    assert not matches("a 1\nb 2\n", "a 1\n")


def test_block_parser() -> None:
    text = (
        "<!-- test: skip because x -->\n```sh\na\n```\n\n```text\nout\n```\n\n"
        '    ```python title="m.py"\n    x = 1\n\n    y = 2\n    ```\n\n```text\nfree\n```\n'
    )
    first, second, third = blocks(text)
    assert (first.mode, first.text, first.output) == ("skip", "a\n", "out\n")
    assert (second.title, second.text, second.output) == ("m.py", "x = 1\n\ny = 2\n", None)
    assert (third.language, third.text) == ("text", "free\n")
