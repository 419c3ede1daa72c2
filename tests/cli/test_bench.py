"""`neuroal bench`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from neuroal.bench import bench
from neuroal.testing import finished_run

QUICK = ("--pruner", "magnitude", "--top-up", "uniform", "-q")
FEW = ("--prompt", 4, "--tokens", 2, "--repeats", 1, "--device", "cpu")


def ok(result: Any) -> Any:
    assert result.exit_code == 0, result.stderr
    return result


@pytest.fixture
def pruned(folder: Path, run: Any) -> Path:
    """A run of the tiny model, pruned to 0.7, in `run`."""
    ok(run("prune", "tiny", *QUICK, "--sparsity", 0.7, "--out", "run"))
    return folder


def test_every_form_has_its_numbers(pruned: Path, run: Any) -> None:
    said = ok(run("bench", "run", *FEW, "--batch", 1, "--batch", 2, "--json", "--no-progress"))
    found = json.loads(said.stdout)
    forms = [(x["form"], x["batch"], x["linears"]) for x in found["measured"]]
    names = ("dense", 0), ("pruned", 0), ("torch CSR", 14)
    assert forms == [(name, batch, count) for batch in (1, 2) for name, count in names]
    for x in found["measured"]:
        assert x["prefill_tokens_per_second"] > 0 and x["decode_tokens_per_second"] > 0
        assert len(x["prefill_seconds"]) == len(x["decode_seconds"]) == 1
        assert (x["difference"] is None) == (x["form"] != "torch CSR")
        assert x["difference"] is None or x["difference"] < 1e-4
        assert (x["gain"] is None) == (x["form"] == "dense")
    size = Path("tiny/model.safetensors").stat().st_size
    assert found["bytes"] == {"dense": size, "pruned": Path("run/model.safetensors").stat().st_size}
    assert found["load_seconds"].keys() == {"dense", "pruned"} and found["notes"] == []
    assert {"OpenVINO", "torch 2:4, CUTLASS"} < found["not_measured"].keys()


def test_it_is_kept_and_shown(pruned: Path, run: Any) -> None:
    for _ in range(2):  # the second takes the place of the first
        said = ok(run("bench", "run", *FEW, "--no-progress")).stdout
    assert (
        "torch CSR" in said
        and "; one round;" in said
        and "Not measured: OpenVINO" in said
        and "Kept in" in said
    )
    report = json.loads(Path("run/neuroal.json").read_text())
    assert len(report["bench"]) == 1
    ok(run("bench", "run", *FEW, "--batch", 3, "-q"))
    assert len(json.loads(Path("run/neuroal.json").read_text())["bench"]) == 2
    ok(run("report", "run", "--out", "page.html"))
    page = Path("page.html").read_text()
    assert page.count("Gains on a machine") >= 2 and "torch CSR" in page
    assert page.count(">Speed against the dense model</h3>") == 2
    measured = json.loads(Path("run/neuroal.json").read_text())["bench"][0]["measured"]
    for x in measured:  # a bar and its value for every form but the one at 1
        steps = (f"{x[f'{step}_over_dense']:.3g}" for step in ("prefill", "decode"))
        words = f"{x['form']}: prefill {next(steps)}"
        assert (words in page) == (x["form"] != "dense")
    ok(run("evaluate", "run", "--data", "text.txt", "--length", 16, "-q"))
    assert len(json.loads(Path("run/neuroal.json").read_text())["bench"]) == 2


def test_a_packed_run_without_its_dense_model(pruned: Path, run: Any) -> None:
    ok(run("pack", "run", "--out", "packed", "-q"))
    shutil.rmtree("tiny")
    found = json.loads(ok(run("bench", "packed", *FEW, "--json", "--no-progress")).stdout)
    assert [x["form"] for x in found["measured"]] == ["pruned", "torch CSR"]
    assert "stands for the dense one" in found["notes"][0]
    assert found["bytes"]["packed"] == Path("packed/model.safetensors").stat().st_size
    assert found["bytes"]["packed"] < found["bytes"]["pruned"] == found["bytes"]["dense"]
    assert found["load_seconds"].keys() == {"packed"}


def test_a_dense_model_on_a_hub_that_is_out_of_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is of `some/llama`, which no test reaches."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    made = finished_run(tmp_path / "run").folder
    found = bench(made, prompt=8, tokens=2, repeats=1, device="cpu", dtype="float16")
    assert [x["form"] for x in found["measured"]] == ["pruned", "torch CSR"]
    assert "stands for the dense one" in found["notes"][0] and "'some/llama'" in found["notes"][0]
    assert "needs an NVIDIA GPU" in found["not_measured"]["torch 2:4, CUTLASS"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("tiny",), "'tiny' is no run: give the output folder of `neuroal prune`"),
        (("run", "--prompt", 100_000), "'run' reads"),
        (("run", "--batch", 0), "0 is not in the range"),
    ],
)
def test_mistakes_are_one_line(
    pruned: Path, run: Any, arguments: tuple[object, ...], said: str
) -> None:
    found = run("bench", *arguments)
    assert found.exit_code == 2 and said in found.stderr
    assert len(found.stderr.splitlines()) == 1
    assert "bench" not in json.loads(Path("run/neuroal.json").read_text())
