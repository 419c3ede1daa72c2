"""`neuroal export`: what an exporter is given, and that its files are there whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import neuroal
from neuroal import ExporterTraits, NeuroalError, PluginError, Recipe, UsageError, hookimpl
from neuroal.export import export
from neuroal.run.pack import pack
from neuroal.testing import collect, finished_run
from neuroal_plugins.exporter.eora import companion

SAMPLES, LENGTH = 3, 16


@dataclass(frozen=True, eq=False)
class Looks:
    """Writes down what it is given."""

    how: str = "good"

    @hookimpl
    def required_statistics(self) -> set[str]:
        return {"gram"} if self.how != "no statistics" else set()

    @hookimpl
    def describe(self) -> ExporterTraits:
        return ExporterTraits(reads_dense=self.how != "no statistics")

    @hookimpl
    def export_run(self, run: Any, folder: Path, rng: torch.Generator) -> Any:
        found = list(run.linears())
        if self.how != "no file":
            torch.save(
                [(x.linear.name, x.weight, x.dense, x.statistics) for x in found], folder / "x"
            )
        if self.how == "raises":
            raise ValueError("not today")
        if self.how == "refuses":
            raise UsageError("this run has no such form")
        if self.how == "reads too much":
            assert found[0].statistics.input_var is not None
        if self.how == "NaN":
            return {"x": float("nan")}
        return ["x"] if self.how == "a list" else {"linears": len(found)}


@pytest.fixture(scope="module")
def home(models: Any, windows: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense Mistral, and a run of it with its last block left dense."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(models["mistral"], home / "dense")
    rows = "".join(json.dumps({"input_ids": row}) + "\n" for row in windows[:SAMPLES].tolist())
    (home / "rows.jsonl").write_text(rows)
    recipe = Recipe(
        sparsity=0.5, top_up="uniform", keep=("last:1",), calibration=str(home / "rows.jsonl"),
        samples=SAMPLES, device="cpu",
    )  # fmt: skip
    neuroal.prune(str(home / "dense"), recipe=recipe, out=home / "run")
    return home


def given(folder: Path) -> list[Any]:
    found: list[Any] = torch.load(folder / "x", weights_only=False)
    return found


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.usefixtures("streaming")
def test_what_an_exporter_is_given(stream: bool, home: Path, tmp_path: Path) -> None:
    """Weights of both models, and statistics of what the pruned model's linears really read."""
    said = export(home / "run", Looks(), tmp_path / "out", device="cpu", stream=stream)
    assert said["result"] == {"linears": 14}
    assert said == json.loads((tmp_path / "out/export.json").read_text())
    assert said["exporter"]["role"] == "exporter" and list(said["files"]) == ["x"]
    pruned, dense = (load_file(home / x / "model.safetensors") for x in ("run", "dense"))
    model: Any = neuroal_model(home / "run")
    seen: dict[str, list[Any]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            keep: Callable[..., None] = lambda m, x, n=name: seen.setdefault(n, []).append(x[0])  # noqa: E731
            module.register_forward_pre_hook(keep)
    ids = [json.loads(line)["input_ids"] for line in (home / "rows.jsonl").open()]
    with torch.no_grad():
        model(torch.tensor(ids))
    for name, weight, whole, statistics in given(tmp_path / "out"):
        assert ".layers.2." not in name  # left dense
        assert torch.equal(weight, pruned[f"{name}.weight"])
        assert torch.equal(whole, dense[f"{name}.weight"])
        wanted = collect(torch.cat(seen[name]), "gram").gram
        torch.testing.assert_close(statistics.gram, wanted, rtol=1e-4, atol=1e-4)


def neuroal_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def test_what_is_not_read_is_not_there(home: Path, tmp_path: Path) -> None:
    export(home / "run", Looks("no statistics"), tmp_path / "out", device="cpu")
    assert all(x[2] is None and len(x[3]) == 0 for x in given(tmp_path / "out"))


BROKEN = {
    "raises": "ValueError: not today",
    "a list": "returned list, not a mapping of names to JSON values",
    "NaN": "returned what is no JSON",
    "no file": "wrote no file",
    "reads too much": "UsageError: statistic 'input_var' was not collected",
}


@pytest.mark.parametrize("how", BROKEN)
def test_what_fails_leaves_nothing(how: str, home: Path, tmp_path: Path) -> None:
    with pytest.raises(PluginError, match=f"hook export_run: {BROKEN[how]}"):
        export(home / "run", Looks(how), tmp_path / "out", device="cpu")
    assert not list(tmp_path.iterdir())


def test_a_refusal_is_the_exporters_own_sentence(home: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        export(home / "run", Looks("refuses"), tmp_path / "out", device="cpu")
    assert str(caught.value) == "this run has no such form"
    assert not list(tmp_path.iterdir())


def test_an_output_folder_is_replaced_only_if_asked(home: Path, tmp_path: Path) -> None:
    def go(**options: Any) -> Any:
        return export(home / "run", Looks(), tmp_path / "out", device="cpu", **options)

    go()
    with pytest.raises(UsageError, match="exists: choose another or add --overwrite"):
        go()
    (tmp_path / "out/mine").touch()
    go(overwrite=True)
    assert {x.name for x in (tmp_path / "out").iterdir()} == {"x", "export.json"}
    (tmp_path / "out/export.json").unlink()
    with pytest.raises(UsageError, match="was not written by neuroal"):
        go(overwrite=True)


def test_what_is_not_there_is_said(home: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(home, moved)
    report = json.loads((moved / "run/neuroal.json").read_text())

    def refused(message: str, run: Path) -> None:
        with pytest.raises(NeuroalError, match=message):
            export(run, Looks(), tmp_path / "out", device="cpu")
        assert not (tmp_path / "out").exists()

    refused("is no run: give the output folder of `neuroal prune`", moved / "dense")
    for key, value, message in (
        ("model", {**report["model"], "name": str(moved / "run")}, "is not what .* any more"),
        ("model", {**report["model"], "name": "../absent/x"}, "is neither a folder"),
        (
            "data",
            {**report["data"], "source": "absent.jsonl"},
            "calibration text of .* is not there",
        ),
    ):
        (moved / "run/neuroal.json").write_text(json.dumps({**report, key: value}))
        refused(message, moved / "run")


def test_eora_on_the_command_line(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its factors are those of the formula, on what the engine gives."""
    from click.testing import CliRunner

    from neuroal.cli import main

    monkeypatch.chdir(tmp_path)
    export(home / "run", Looks(), tmp_path / "seen", device="cpu")
    arguments = ["export", str(home / "run"), "--to", "eora", "-o", "eora.rank=2", "--out", "eora"]
    done = CliRunner().invoke(main, [*arguments, "--device", "cpu"])
    assert done.exit_code == 0, done.stderr
    assert "sparsity left" in done.stdout and "output error taken back" in done.stdout
    tensors = load_file("eora/adapter_model.safetensors")
    for name, weight, whole, statistics in given(tmp_path / "seen"):
        lost, gram = whole.double() - weight.double(), statistics.gram.double()
        a, b, _, _ = companion(lost, gram, 2, 1e-6)
        for which, factor in (("A", a), ("B", b)):
            found = tensors[f"base_model.model.{name}.lora_{which}.weight"]
            torch.testing.assert_close(found, factor.float(), rtol=1e-3, atol=1e-4)


@dataclass(frozen=True, eq=False)
class Copies:
    """Writes the run as it is, and a tensor beside it."""

    @hookimpl
    def export_run(self, run: Any, folder: Path) -> Any:
        run.copy(folder)
        save_file({"x": torch.zeros(1)}, folder / "x.safetensors")
        return {}


@pytest.mark.parametrize("compress", [False, True])
def test_a_packed_run_is_copied_unpacked(compress: bool, home: Path, tmp_path: Path) -> None:
    """A runtime that an exporter writes for does not read packed weights."""
    pack(home / "run", tmp_path / "packed", compress=compress)
    for name in ("run", "packed"):
        export((home if name == "run" else tmp_path) / name, Copies(), tmp_path / f"of {name}")
    one, other = (
        {
            p.name: p.read_bytes()
            for p in (tmp_path / f"of {x}").iterdir()
            if p.name != "export.json"
        }
        for x in ("run", "packed")
    )
    assert one == other and "README.md" in one
    modes = {p.stat().st_mode for p in (tmp_path / "of packed").iterdir()}
    assert len(modes) == 1  # who may read config.json may read the weights


def test_a_24_run_that_is_packed_is_written_for_torch(tmp_path: Path) -> None:
    made = finished_run(tmp_path / "made").folder
    pack(made, tmp_path / "packed")
    export(tmp_path / "packed", "torch-24", tmp_path / "out", device="cpu")
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (made / name).read_bytes()
