"""What README.md tells people to type works."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from neuroal import demo


def blocks(project: Path, language: str) -> list[str]:
    text = (project / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.fixture
def readme(project: Path, folder: Path) -> Path:
    """A current folder with everything that the README names."""
    Path("path/to").mkdir(parents=True)
    Path("tiny").rename("path/to/llama")
    rows = [json.dumps({"text": Path("text.txt").read_text()})] * 3
    Path("texts.jsonl").write_text("\n".join(rows))
    Path("test.txt").write_text(Path("text.txt").read_text())
    Path("mine.py").write_text(next(b for b in blocks(project, "python") if "class Mine" in b))
    return folder


def commands(project: Path) -> list[list[str]]:
    lines = [line for block in blocks(project, "sh") for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines]


def test_commands_on_a_folder(project: Path, readme: Path, run: Any) -> None:
    ours = [c[1:] for c in commands(project) if c[0] == "neuroal" and "demo" not in " ".join(c)]
    assert len(ours) == 4
    for arguments in ours:
        result = run(*arguments)
        assert result.exit_code == 0, (arguments, result.stderr)


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.skipif(not demo.MODEL.is_dir(), reason="the demo model has not been trained")
def test_commands_on_the_demo_model(project: Path, readme: Path, run: Any) -> None:
    ours = [c[1:] for c in commands(project) if c[0] == "neuroal" and "demo" in " ".join(c)]
    assert len(ours) == 3
    for arguments in ours:
        result = run(*arguments)
        assert result.exit_code == 0, (arguments, result.stderr)


def test_python(project: Path, readme: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = next(b for b in blocks(project, "python") if "neuroal.prune" in b)
    exec(compile(code, "README.md", "exec"), {})
    report, measured = capsys.readouterr().out.splitlines()
    assert report.startswith("Report(") and "of 0.6 wanted" in report
    assert measured.startswith("Evaluation(LlamaForCausalLM, perplexity on test.txt = ")


def test_it_says_how_to_install_for_the_cpu_in_an_environment(project: Path) -> None:
    (block,) = [b for b in blocks(project, "sh") if "pip install" in b]
    assert "python -m venv" in block and "https://download.pytorch.org/whl/cpu" in block


def test_make_targets_exist(project: Path) -> None:
    makefile = (project / "Makefile").read_text(encoding="utf-8")
    targets = [c[1] for c in commands(project) if c[0] == "make"]
    assert targets == ["demo", "test"]
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_links_lead_somewhere(project: Path) -> None:
    text = (project / "README.md").read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("https://") or (project / link).exists(), link


def test_it_says_what_zeros_are_not(project: Path) -> None:
    text = " ".join((project / "README.md").read_text(encoding="utf-8").split())
    assert "By themselves they make nothing faster" in text and "`neuroal pack`" in text
