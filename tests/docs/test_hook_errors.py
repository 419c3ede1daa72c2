"""Every error that the pages of the roles show is what a user sees, to the letter."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path

import pytest
from click.testing import CliRunner

from neuroal.cli import main
from neuroal.hookspecs import ROLES
from neuroal.testing import finished_run, tiny_model, tiny_tokenizer, windows

PAGES = sorted((Path(__file__).resolve().parents[2] / "docs" / "roles").glob("*.md"))
HEAD = """\
from dataclasses import dataclass
import torch
from neuroal import *

@dataclass(frozen=True, eq=False)
class Mine:
"""
SCORES = """\
@hookimpl
def score_weights(self, weight):
    return weight.abs()
"""
NORMS = """\
@hookimpl
def required_statistics(self):
    return {"input_norm"}
"""


def hook(signature: str, *body: str) -> str:
    lines = "\n".join(f"    {line}" for line in body)
    return f"@hookimpl\ndef {signature}:\n{lines}\n"


# What each broken plugin does wrong; its role, and the methods of the class.
BROKEN: dict[str, tuple[str, str]] = {
    "statistics as a list": (
        "pruner",
        hook("required_statistics(self)", "return ['input_norm']") + SCORES,
    ),
    "unknown statistic": (
        "pruner",
        hook("required_statistics(self)", "return {'input_norms'}") + SCORES,
    ),
    "statistic not named": (
        "pruner",
        hook("score_weights(self, weight, statistics)", "return weight * statistics.input_norm"),
    ),
    "traits of the wrong type": ("pruner", hook("describe(self)", "return 'row'") + SCORES),
    "scores of the wrong shape": (
        "pruner",
        hook("score_weights(self, weight)", "return weight.abs().sum(1)"),
    ),
    "scores of NaN": ("pruner", hook("score_weights(self, weight)", "return weight * torch.nan")),
    "written to an input": ("pruner", hook("score_weights(self, weight)", "return weight.abs_()")),
    "an exception": ("pruner", hook("score_weights(self, weight)", "return weight * (1 / 0)")),
    "no PrunedLinear": ("pruner", hook("prune_linear(self, weight)", "return weight.relu()")),
    "no list": ("pruner", hook("prune_linears(self, weights)", "return weights.relu()")),
    "too many pruned": (
        "pruner",
        hook(
            "prune_linear(self, weight)",
            "mask = torch.ones_like(weight, dtype=torch.bool)",
            "return PrunedLinear(weight, mask)",
        ),
    ),
    "no generator": (
        "block_ratios",
        hook(
            "propose_block_ratios(self, layout, sparsity)",
            "return Proposal(dict.fromkeys(layout.linears, sparsity))",
        ),
    ),
    "a ratio above 1": (
        "block_ratios",
        hook(
            "propose_block_ratios(self, layout, sparsity)",
            "yield Generation([Proposal(layout.per_block([sparsity, 1.2]))])",
        ),
    ),
    "nothing that can win": (
        "block_ratios",
        hook(
            "propose_block_ratios(self, layout, sparsity)",
            "ratios = dict.fromkeys(layout.linears, sparsity)",
            "yield Generation([Proposal(ratios)], probe=True)",
        ),
    ),
    "a wrong name": (
        "block_ratios",
        hook("measure_block(self, weights)", "return {'size': weights['q_proj'].norm()}")
        + hook(
            "propose_block_ratios(self, layout, sparsity)",
            "yield from ()",
            "return Proposal(dict.fromkeys(layout.linears, sparsity))",
        ),
    ),
    "rows of the wrong shape": (
        "row_ratios",
        hook(
            "propose_row_ratios(self, base)",
            "rows = {name: torch.full((3,), ratio) for name, ratio in base.items()}",
            "yield Generation([Proposal(rows)])",
        ),
    ),
    "importance of zero": (
        "row_ratios",
        hook("describe(self)", "return RowRatiosTraits(weighs_rows=True)")
        + hook(
            "propose_row_ratios(self, layout, base)",
            "shapes = layout.linears.items()",
            "zeros = {n: Importance(torch.zeros(x.out_features)) for n, x in shapes}",
            "yield Generation([Proposal(base, importance=zeros)])",
        ),
    ),
    "a vector for a number": (
        "alignment",
        NORMS + hook("measure_linear(self, dense, pruned)", "return dense.input_norm"),
    ),
    "a negative number": (
        "alignment",
        NORMS + hook("measure_linear(self, dense, pruned)", "return -dense.input_norm.sum()"),
    ),
    "a number per window": (
        "alignment",
        hook(
            "measure_output(self, dense_logits, pruned_logits)",
            "return (dense_logits - pruned_logits).square().mean((1, 2))",
        ),
    ),
    "a yes in place of a reason": (
        "refiner",
        hook("describe(self)", "return True")
        + hook("refine_mask(self, mask)", "return mask.clone()"),
    ),
    "a mask of floats": ("refiner", hook("refine_mask(self, mask)", "return mask.float()")),
    "a mask of another size": ("refiner", hook("refine_mask(self, mask)", "return ~mask")),
    "a number of tokens in place of traits": (
        "reconstruction",
        hook("describe(self)", "return 512")
        + hook("reconstruct_block(self, weights)", "return weights"),
    ),
    "new values of the wrong shape": (
        "reconstruction",
        hook("reconstruct_linear(self, values)", "return values.sum(1)"),
    ),
    "new values of NaN": (
        "reconstruction",
        hook("reconstruct_linear(self, values)", "return values / values.sum().sub(values.sum())"),
    ),
    "new values without their names": (
        "reconstruction",
        hook("reconstruct_block(self, weights)", "return list(weights.values())"),
    ),
    "new values of a shortened name": (
        "reconstruction",
        hook(
            "reconstruct_block(self, block, weights)",
            "return {'q_proj': weights[block.linears[0].name].clone()}",
        ),
    ),
    "a list of files": (
        "exporter",
        hook("export_run(self, folder)", "(folder / 'x').touch()", "return ['x']"),
    ),
    "no files": ("exporter", hook("export_run(self, run)", "return {}")),
    "a defaulted argument": (
        "pruner",
        hook("score_weights(self, weight, power=2)", "return weight.abs()"),
    ),
    "an unknown argument": ("pruner", hook("score_weights(self, weights)", "return weights")),
    "an unknown hook": ("pruner", hook("score_weight(self, weight)", "return weight")),
    "a former hook": (
        "refiner",
        hook("needs_paper_budget(self)", "return ''")
        + hook("refine_mask(self, mask)", "return mask"),
    ),
    "a former argument": (
        "block_ratios",
        hook("propose_block_ratios(self, layout)", "yield Generation([], keep=2)"),
    ),
    "no mark": ("pruner", SCORES.removeprefix("@hookimpl\n")),
    "not frozen": ("pruner", SCORES),
}


def shown(heading: str | None = None) -> list[str]:
    text = "\n## ".join(page.read_text(encoding="utf-8") for page in PAGES)
    if heading is not None:
        text = text.split(f"\n### {heading}\n")[1].split("\n## ")[0].split("\n### ")[0]
    return re.findall(r"^```error\n(.*?)\n```", text, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the command says to each broken plugin, less `Error: `."""
    folder = tmp_path_factory.mktemp("errors")
    tiny_model("llama", blocks=2).save_pretrained(folder / "tiny")  # type: ignore[operator]
    tiny_tokenizer().save_pretrained(folder / "tiny")
    rows = [json.dumps({"input_ids": row}) for row in windows(4, 16).tolist()]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    run = finished_run(folder / "run").folder
    lines = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, (role, body) in BROKEN.items():
            head = HEAD.replace("frozen=True, ", "") if name == "not frozen" else HEAD
            Path("mine.py").write_text(head + textwrap.indent(body, "    "))
            arguments = ["--sparsity", "0.59", "--out", "out"]
            arguments += ["--calibration", "rows.jsonl", "--samples", "2"]
            if role in ("pruner", "refiner", "reconstruction"):
                arguments += ["--top-up", "uniform"]  # the counts of a message
            flag = f"--{role.replace('_', '-')}"
            command = ["prune", "tiny", *arguments, flag, "./mine.py:Mine"]
            if role == "exporter":
                command = ["export", str(run), "--to", "./mine.py:Mine", "--out", "out"]
            result = CliRunner().invoke(main, command)
            assert result.exit_code == 1, name
            assert not Path("out").exists(), name
            [line] = [x for x in result.stderr.splitlines() if x.startswith("Error: ")]
            lines[name] = line.removeprefix("Error: ")
    return lines


def test_every_error_that_is_shown_is_said(said: dict[str, str]) -> None:
    missing = set(shown()) - set(said.values())
    assert not missing, "\n".join([*missing, "instead of", *said.values()])


@pytest.mark.parametrize("name", BROKEN)
def test_every_error_names_plugin_and_file(name: str, said: dict[str, str]) -> None:
    assert said[name].startswith(f"{BROKEN[name][0]} 'mine' (./mine.py file)")


@pytest.mark.parametrize("name", sorted({name for role in ROLES.values() for name in role.hooks}))
def test_every_hook_shows_an_error(name: str) -> None:
    assert shown(name)
