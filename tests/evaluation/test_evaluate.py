"""`neuroal.evaluate` and `neuroal.compare`: what the command line says, as Python objects."""

import dataclasses
import importlib.util
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import neuroal
from neuroal import NeuroalError, Recipe, UsageError
from neuroal.cli import main
from neuroal.model import pretrained
from neuroal.testing import tiny_model, tiny_tokenizer

BLOCK = 16  # rows and columns that share a scale


@pytest.fixture
def text(tmp_path: Path) -> str:
    file = tmp_path / "text.txt"
    file.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    return str(file)


def run(*words: object) -> Any:
    return CliRunner().invoke(main, [str(w) for w in words], prog_name="neuroal")


def test_it_measures_what_the_command_measures(models: Mapping[str, Path], text: str) -> None:
    folder = models["llama"]
    found = neuroal.evaluate(folder, data=text, length=16, windows=4)
    said = json.loads(run("evaluate", folder, "--data", text, "--length", 16, "--windows", 4,
                          "--json").stdout)  # fmt: skip
    values = found.to_json()
    assert values.pop("seconds") > 0 < said.pop("seconds")
    assert values == said and found.zero_shot is None
    assert found.perplexity is not None
    assert repr(found) == f"Evaluation({folder}, perplexity on {text} = " + (
        f"{found.perplexity.perplexity:.4f})"
    )
    assert found.records() == [
        {
            "model": str(folder),
            "measure": "perplexity",
            "value": found.perplexity.perplexity,
            "on": text,
            "dtype": "float32",
        }
    ]


def test_a_model_in_memory_is_measured_where_it_is(models: Mapping[str, Path], text: str) -> None:
    model = tiny_model("llama")
    here = neuroal.evaluate(model, tiny_tokenizer(), text, length=16, windows=4)
    there = neuroal.evaluate(models["llama"], data=text, length=16, windows=4)
    assert here.perplexity == there.perplexity and here.model == "LlamaForCausalLM"
    with pytest.raises(UsageError, match="leave device and dtype out"):
        neuroal.evaluate(model, tiny_tokenizer(), text, dtype="float16")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "nothing to measure of 'path': give data (a text), tasks, or both"),
        ({"tasks": "x", "length": 8}, "length is for data, which is not given"),
        ({"data": "x.txt", "limit": 8}, "limit is for tasks, which is not given"),
        ({"data": "demo", "batch": 0}, "batch"),
    ],
)
def test_what_says_nothing_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        neuroal.evaluate("path", **options)
    assert said in str(caught.value)


# Quantised models


def to_fp8(folder: Path) -> dict[str, Tensor]:
    """Quantise a saved model as DeepSeek-V3 is stored; return the weights that it stands for."""
    tensors = load_file(folder / "model.safetensors")
    stands_for = dict(tensors)
    for name, weight in list(tensors.items()):
        if ".layers." not in name or weight.dim() != 2:
            continue
        rows, columns = (-(-n // BLOCK) for n in weight.shape)
        scales = torch.empty(rows, columns)
        small = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
        for i in range(rows):
            for j in range(columns):
                at = slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK)
                scales[i, j] = weight[at].abs().max() / 448
                small[at] = (weight[at] / scales[i, j]).to(torch.float8_e4m3fn)
                stands_for[name][at] = small[at].float() * scales[i, j]
        tensors[name], tensors[f"{name}_scale_inv"] = small, scales
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    said = {
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
        "activation_scheme": "dynamic",
    }
    set_quantisation(folder, said)
    return stands_for


def set_quantisation(folder: Path, said: Mapping[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": said}))


@pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5, reason="needs a device before transformers 5"
)
def test_a_quantised_model_is_measured_as_it_is(
    save: Callable[[nn.Module, Path], Path], text: str, tmp_path: Path
) -> None:
    pytest.importorskip("accelerate", reason="transformers needs it for quantised models")
    folder = save(tiny_model("llama", blocks=2), tmp_path / "fp8")
    plain = neuroal.evaluate(folder, data=text, length=16, windows=4).perplexity
    model = tiny_model("llama", blocks=2)
    model.load_state_dict(to_fp8(folder), strict=False)
    expected = neuroal.evaluate(model, tiny_tokenizer(), text, length=16, windows=4).perplexity
    measured = neuroal.evaluate(folder, data=text, length=16, windows=4)
    found = measured.perplexity
    assert found is not None and expected is not None and plain is not None
    moved = abs(expected.perplexity - plain.perplexity)
    assert abs(found.perplexity - expected.perplexity) < 0.2 * moved > 0
    assert measured.notes == ("quantised by fp8: measured as transformers loads it",)
    done = run("evaluate", folder, "--data", text, "--length", 16)
    assert done.exit_code == 0 and "Note: quantised by fp8: measured as" in done.output
    refused = run("prune", folder, "--calibration", text, "--out", tmp_path / "out")
    assert refused.exit_code == 1 and "is quantised: prune the original" in refused.output


def test_the_package_that_a_quantised_model_needs_is_named(
    save: Callable[[nn.Module, Path], Path], text: str, tmp_path: Path
) -> None:
    folder = save(tiny_model("llama", blocks=1), tmp_path / "model")
    set_quantisation(folder, {"quant_method": "bitsandbytes", "load_in_4bit": True})
    if importlib.util.find_spec("bitsandbytes"):
        pytest.skip("bitsandbytes is installed")
    done = run("evaluate", folder, "--data", text, "--length", 16)
    (line,) = done.output.strip().splitlines()
    assert done.exit_code == 1
    assert line.startswith(f"Error: cannot load model '{folder}', quantised by bitsandbytes: ")
    # Before transformers 5 another package is missed first.
    assert re.search("pip install (-U bitsandbytes|accelerate)", line)


# In which dtype


@pytest.mark.parametrize(
    ("capable", "dtype", "expected"),
    [
        ({}, "bfloat16", "float32"),
        ({"avx512_bf16": True}, "bfloat16", "auto"),
        ({"amx_bf16": True, "avx512_bf16": False}, "bfloat16", "auto"),
        ({"avx512_bf16": True}, "float16", "float32"),
        ({"avx512_fp16": True}, "float16", "auto"),
        ({}, "float32", "auto"),
    ],
)
def test_half_precision_is_computed_in_float32_where_the_cpu_has_no_instructions(
    capable: dict[str, bool],
    dtype: str,
    expected: str,
    models: Mapping[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capable, raising=False)
    config = pretrained.load_config(str(models["llama"]))
    config.dtype = getattr(torch, dtype)
    folder = str(models["llama"])
    assert pretrained.dtype_to_measure(folder, config, "cpu") == expected
    assert pretrained.dtype_to_measure(folder, config, "cuda:0") == "auto"
    monkeypatch.setattr(pretrained, "available_memory", lambda device: 1000)
    assert pretrained.dtype_to_measure(folder, config, "cpu") == "auto"  # it would not fit


def test_the_dtype_of_the_arithmetic_is_said(
    save: Callable[[nn.Module, Path], Path],
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = save(tiny_model("llama", blocks=1).bfloat16(), tmp_path / "half")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {}, raising=False)
    words = ("evaluate", folder, "--data", text, "--length", 16)
    said = json.loads(run(*words, "--json").stdout)
    note = "computed in float32, which is faster on this CPU than bfloat16 (--dtype bfloat16)"
    assert (said["dtype"], said["notes"]) == ("float32", [note])
    assert f"({said['dtype']})" in run(*words).output and f"Note: {note}" in run(*words).output
    own = json.loads(run(*words, "--json", "--dtype", "bfloat16").stdout)
    assert own["dtype"] == "bfloat16" and "notes" not in own
    assert own["perplexity"] == pytest.approx(said["perplexity"], rel=0.02)
    assert own["perplexity"] != said["perplexity"]
    again = json.loads(run(*words, "--json").stdout)
    assert again["perplexity"] == said["perplexity"]


# Comparing


@pytest.fixture(scope="module")
def runs(
    models: Mapping[str, Path], from_file: Recipe, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("runs")
    recipe = dataclasses.replace(from_file, top_up="uniform", options={})
    for pruner in ("wanda", "magnitude"):
        neuroal.prune(models["llama"], recipe=recipe, pruner=pruner, out=root / pruner)
    return root / "wanda", root / "magnitude"


def test_compare_says_what_the_command_says(runs: tuple[Path, Path], text: str) -> None:
    found = neuroal.compare(*runs, data=text, length=16, windows=2)
    words = ["compare", *runs, "--data", text, "--length", 16, "--windows", 2, "--json"]
    assert found.to_json() == json.loads(run(*words).stdout)
    assert repr(found).startswith(f"Comparison({runs[0]}: 0.6000, {runs[1]}: 0.6000, masks overlap")
    rows = found.records()
    assert len(rows) == 21 and rows[0]["linear"] == "model.layers.0.self_attn.q_proj"
    assert rows[0]["block"] == "model.layers.0" and 0 < rows[0]["intersection_over_union"] < 1
    assert all(not isinstance(v, (dict, list)) for row in rows for v in row.values())


def test_compare_refuses_a_text_for_an_allocation(runs: tuple[Path, Path], text: str) -> None:
    file = runs[0] / "allocation.safetensors"
    with pytest.raises(UsageError, match=r"needs two runs: .* is an allocation alone"):
        neuroal.compare(file, runs[1], data=text)
    assert neuroal.compare(file, runs[1]).runs == ()
    with pytest.raises(UsageError, match="for data, which is not given"):
        neuroal.compare(*runs, windows=3)


# Layouts


def test_layout_is_a_function_of_a_model_or_a_folder(models: Mapping[str, Path]) -> None:
    from neuroal import layout

    here, there = neuroal.layout(tiny_model("llama")), neuroal.layout(models["llama"])
    assert layout is neuroal.layout and layout.find(tiny_model("llama")) == here == there
    assert repr(here) == f"Layout(3 blocks, 21 linears, {here.weights:,} weights)"
    rows = here.records()
    assert [row["linear"] for row in rows] == list(here.linears)
    first = rows[0]
    assert (first["rows"], first["columns"], first["weights"]) == (32, 32, 1024)
    assert first["consumer"] == "model.layers.0.self_attn.o_proj"
    assert all(not isinstance(v, (dict, list, tuple)) for row in rows for v in row.values())
    with pytest.raises(NeuroalError, match=r"holds no config\.json"):
        neuroal.layout(models["llama"].parent)
