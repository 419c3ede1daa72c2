"""What the page on quantising says of torchao, where that is installed."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import neuroal

PAGE = Path(__file__).resolve().parents[2] / "docs/howto/quantise.md"


def test_torchao_keeps_the_zeros(
    tmp_path: Path, run_process: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("torchao") is None:
        pytest.skip("torchao is not installed")
    monkeypatch.chdir(tmp_path)
    recipe = neuroal.Recipe(pruner="magnitude", top_up="uniform", sparsity=0.6, device="cpu")
    report = neuroal.prune("demo", recipe=recipe, out="pruned")
    assert report is not None
    page = PAGE.read_text(encoding="utf-8")
    (code,) = (x for x in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "torchao" in x)
    done = run_process([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr
    said = re.findall(r"^(.+) zeros, (.+) kept, (.+) stored as 0$", done.stdout, re.MULTILINE)
    zeros = f"{report.counts['pruned']:,}"
    assert [x[:2] for x in said] == [(zeros, zeros), (zeros, zeros)]
    assert said[0][2] == zeros and f"{int(said[1][2].replace(',', '')):,}" in page
