"""`--keep`, `--only` and `--sparsity-over`: what stays dense, under every method."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from neuroal.testing import tiny_model, tiny_tokenizer

KEEP = ("--keep", "first:1", "--keep", "*.o_proj")
METHODS: dict[str, tuple[object, ...]] = {
    "neuroal": (),
    "matrix": ("--pruner", "magnitude", "--comparison", "matrix", "--top-up", "uniform"),
    "owl": ("--top-up", "owl"),
    "dlp": ("--top-up", "dlp"),
    "alphapruning": ("--top-up", "alphapruning", "--pruner", "ria"),
    "evolution": (
        *("--top-up", "evolution", "-o", "evolution.generations=2"),
        *("-o", "evolution.offspring=4", "-o", "evolution.survivors=2,1"),
    ),
    "sensitivity": ("--top-up", "best", "-o", "sensitivity.candidates=8"),
    "rows": (
        *("--top-up", "best-slow", "-o", "sensitivity.candidates=4"),
        *("-o", "row_sensitivity.candidates=12"),
    ),
    "dsnot": ("--top-up", "dsnot", "--budget", "paper"),
    "sparseswaps": ("--refiner", "sparseswaps", "--top-up", "uniform"),
    "sparsegpt": ("--pruner", "sparsegpt"),
    "admm": ("--pruner", "admm", "--top-up", "uniform"),
    "alps": ("--pruner", "alps", "--top-up", "uniform"),
}


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of three blocks."""
    path = tmp_path_factory.mktemp("three") / "model"
    tiny_model("llama", blocks=3).save_pretrained(path)  # type: ignore[operator]
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def keep(run: Any, folder: Path, three: Path) -> Any:
    """Runs `neuroal prune` on the three blocks, and returns its report."""

    def invoke(*arguments: object, out: str = "out") -> dict[str, Any]:
        given = ("--calibration", "rows.jsonl", "--samples", 4, "--search-samples", 2)
        result = run("prune", three, *given, "--out", out, *arguments)
        assert result.exit_code == 0, result.stderr
        said: dict[str, Any] = json.loads(Path(out, "neuroal.json").read_text())
        said["stdout"] = result.stdout
        return said

    return invoke


def weights_of(folder: Path, said: dict[str, Any]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in folder.glob("model*.safetensors"):
        tensors |= load_file(file)
    return {name: tensors[f"{name}.weight"] for name in said["linears"]}


def is_kept(name: str) -> bool:
    return name.startswith("model.layers.0.") or name.endswith(".o_proj")


def check_kept(three: Path, said: dict[str, Any], out: str = "out") -> tuple[int, int]:
    """Checks what is kept, and returns zeros and weights of the rest."""
    before, after = weights_of(three, said), weights_of(Path(out), said)
    allocation = load_file(f"{out}/allocation.safetensors")
    zeros = weights = 0
    for name, weight in after.items():
        if is_kept(name):
            assert weight.equal(before[name])
            assert not allocation[name].any()
            assert f"{name}:importance" not in allocation
            assert said["linears"][name]["wanted"] == 0
        else:
            zeros += int((weight == 0).sum())
            weights += weight.numel()
    return zeros, weights


@pytest.mark.parametrize("method", METHODS)
def test_kept_linears_stay_dense(method: str, keep: Any, three: Path) -> None:
    said = keep("--sparsity", 0.6, *KEEP, *METHODS[method])
    zeros, weights = check_kept(three, said)
    exact = said["recipe"]["budget"] == "exact"
    assert zeros == pytest.approx(0.6 * weights, abs=0.5 if exact else 0.02 * weights)
    counts, sparsity = said["counts"], said["sparsity"]
    assert (counts["pruned"], counts["weights"]) == (zeros, weights)
    assert (counts["linears"], counts["all_linears"]) == (12, 21)
    total = sum(w.numel() for w in weights_of(three, said).values())
    assert sparsity["wanted"] == 0.6 and counts["all_weights"] == total
    assert sparsity["achieved"] == sparsity["over_pruned"] == zeros / weights
    assert sparsity["over_all"] == zeros / total


@pytest.mark.parametrize("more", [("--pruner", "wanda"), ("--pruner", "sparsegpt")])
def test_a_pattern_but_not_everywhere(more: tuple[str, ...], keep: Any, three: Path) -> None:
    said = keep("--pattern", "2:4", *KEEP, *more)
    zeros, weights = check_kept(three, said)
    assert zeros * 2 == weights
    for name, weight in weights_of(Path("out"), said).items():
        if not is_kept(name):
            assert ((weight.view(-1, 4) == 0).sum(dim=1) == 2).all()


def test_a_pattern_that_varies_meets_the_sparsity_over_the_rest(keep: Any, three: Path) -> None:
    said = keep("--pattern", "4:8", "--sparsity", 0.44, *KEEP)
    zeros, weights = check_kept(three, said)
    assert abs(zeros / weights - 0.44) <= 0.5 / 8  # two blocks of one size: one step of each


@pytest.mark.usefixtures("streaming")
def test_streamed_blocks_give_the_same(keep: Any, three: Path) -> None:
    one = keep("--sparsity", 0.6, *KEEP)
    two = keep("--sparsity", 0.6, *KEEP, "--stream", out="streamed")
    check_kept(three, two, "streamed")
    a, b = weights_of(Path("out"), one), weights_of(Path("streamed"), two)
    assert all(a[name].equal(b[name]) for name in a)


def test_only_is_the_reverse(keep: Any) -> None:
    said = keep("--only", "mlp", "--keep", "last:1", "--top-up", "uniform")
    pruned = {n for n, x in said["linears"].items() if x["achieved"] > 0}
    assert pruned == {
        f"model.layers.{b}.mlp.{n}_proj" for b in (0, 1) for n in ("gate", "up", "down")
    }
    assert said["recipe"]["only"] == ["mlp"] and said["recipe"]["keep"] == ["last:1"]


def test_a_sparsity_over_all_linears(keep: Any, three: Path) -> None:
    said = keep("--sparsity", 0.3, "--sparsity-over", "all", *KEEP)
    zeros, weights = check_kept(three, said)
    total = said["counts"]["all_weights"]
    assert zeros == math.floor(0.3 * total + 0.5)
    sparsity = said["sparsity"]
    assert sparsity["achieved"] == sparsity["over_all"] == zeros / total
    assert sparsity["over_pruned"] == zeros / weights > 0.3
    assert f"({zeros:,} of {total:,})" in said["stdout"]
    assert f"{zeros / weights:.6f}" in said["stdout"]


def test_a_pattern_varies_to_meet_a_sparsity_over_all(keep: Any, three: Path) -> None:
    said = keep("--pattern", "4:8", "--sparsity", 0.3, "--sparsity-over", "all", *KEEP)
    zeros, weights = check_kept(three, said)
    step = weights / 2 / 8  # one more of eight in one of two blocks
    assert abs(zeros - 0.3 * said["counts"]["all_weights"]) <= step / 2 + 1


def test_report_card_and_summary_say_what_is_kept(keep: Any) -> None:
    said = keep("--sparsity", 0.6, *KEEP, "--top-up", "uniform")
    counts, sparsity = said["counts"], said["sparsity"]
    (note,) = [n for n in said["notes"] if "asked to be kept" in n]
    share = 1 - counts["weights"] / counts["all_weights"]
    assert note == (
        "stays dense: asked to be kept: model.layers.0.self_attn.q_proj and 8 more, "
        f"{share:.1%} of the weights of all linears"
    )
    assert note in said["stdout"]
    assert f"over all linears   {sparsity['over_all']:.6f}" in said["stdout"]
    card = Path("out/README.md").read_text()
    assert "9 of 21 linears were left dense" in card and note in card
    assert f"{sparsity['over_all']:.1%} of the weights of all linears are zero" in card


def test_the_layout_shows_what_is_kept(run: Any, three: Path) -> None:
    result = run("layout", three, *KEEP)
    assert result.exit_code == 0, result.stderr
    first, rest = result.stdout.split("blocks 1 to 2")
    shown = [
        sum(x.endswith(" kept") for x in map(str.rstrip, t.splitlines())) for t in (first, rest)
    ]
    assert shown == [7, 1]
    assert "9 linears are kept dense" in result.stdout
    assert "kept" not in run("layout", three).stdout
    data = json.loads(run("layout", three, *KEEP, "--json").stdout)
    kept = {x["name"] for b in data["blocks"] for x in b["linears"] if x["kept"]}
    assert kept == {x["name"] for b in data["blocks"] for x in b["linears"] if is_kept(x["name"])}
    sparsity = 0.5 * (
        1
        - sum(x["weights"] for b in data["blocks"] for x in b["linears"] if x["kept"])
        / data["weights"]
    )
    assert f"0.5 over these is {sparsity:.4g} over all" in result.stdout


def test_the_dry_run_counts_what_is_pruned(run: Any, three: Path, folder: Path) -> None:
    given = ("prune", three, "--calibration", "rows.jsonl", "--samples", 4, "--dry-run")
    whole = json.loads(run(*given, "--json").stdout)
    result = run(*given, *KEEP, "--json")
    assert result.exit_code == 0, result.stderr
    kept = json.loads(result.stdout)
    names = [x for b in kept["layout"]["blocks"] for x in b["linears"] if not is_kept(x["name"])]
    assert kept["weights"] == sum(x["weights"] for x in names) < whole["weights"]
    assert kept["block_runs"] < whole["block_runs"]
    assert any("asked to be kept" in note for note in kept["notes"])
    text = run(*given, *KEEP).stdout
    assert f"{kept['weights']:,} in 12 of 21 linears; {whole['weights']:,} in all of them" in text
    assert f"0.5 over the linears that are pruned ({kept['weights'] / 2:,.0f} weights)" in text
    text = run(*given, *KEEP, "--sparsity-over", "all", "--sparsity", 0.2).stdout
    assert f"0.2 over all linears ({0.2 * whole['weights']:,.0f} weights)" in text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--keep", "*.o_porj"), "--keep *.o_porj means no linear of a block"),
        (("--keep", "*.o_porj"), "did you mean '*.o_proj'?"),
        (("--keep", "first:9"), "--keep first:9 is not one of the 3 blocks"),
        (("--keep", "attention", "--keep", "mlp"), "leave no linear to prune"),
        (
            ("--keep", "mlp", "--sparsity-over", "all", "--sparsity", 0.9),
            "in those that are pruned: keep fewer, ask for less, or say --sparsity-over pruned",
        ),
        (("--pattern", "2:4", "--sparsity-over", "all"), "--sparsity-over all makes no sense here"),
        (
            ("--pattern", "2:4", "--sparsity", 0.7, "--sparsity-over", "all", "--keep", "mlp"),
            "keep fewer",
        ),
    ],
)
def test_what_cannot_be_is_refused_at_once(
    run: Any, three: Path, folder: Path, given: tuple[object, ...], message: str
) -> None:
    before = sorted(folder.iterdir())
    result = run("prune", three, "--calibration", "rows.jsonl", *given, "--out", "out")
    assert result.exit_code == 2 and message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert sorted(folder.iterdir()) == before


def test_a_kept_linear_may_have_inputs_that_m_does_not_divide(keep: Any, run: Any) -> None:
    given = ("--pattern", "16:32", "--pruner", "magnitude")
    refused = run("prune", "tiny", *given, "--out", "no")
    assert "16:32 does not divide the 48 inputs of 'model.layers.0.mlp.down_proj'" in refused.stderr
    said = keep(*given, "--keep", "*.down_proj")
    assert said["sparsity"]["achieved"] == 0.5
    assert not any("does not divide" in note for note in said["notes"])
