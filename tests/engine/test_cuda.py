"""What can be tested on a CUDA device alone: runs, semi-structured weights, the compiled kernel."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import neuroal
from neuroal import Recipe
from neuroal.bench import bench
from neuroal.testing import finished_run, tiny_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

METHODS: dict[str, dict[str, Any]] = {
    "neuroal": {},
    "second order": {"pruner": "sparsegpt", "top_up": "uniform", "options": {}},
    "refined": {"refiner": "dsnot", "top_up": "uniform", "options": {}},
    "new values": {"reconstruction": "refit", "top_up": "uniform", "options": {}},
    "2:4": {"pattern": "2:4", "sparsity": None, "top_up": "uniform", "options": {}},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_run_is_nearly_that_of_the_cpu(
    method: dict[str, Any],
    stream: bool,
    from_file: Recipe,
    tmp_path: Path,
    save: Callable[[nn.Module, Path], Path],
    read: Callable[[Path], dict[str, Tensor]],
) -> None:
    """Sums are rounded otherwise there: a few weights at the edge of a mask are others."""
    model = save(tiny_model("llama", blocks=2), tmp_path / "model")
    for device in ("cpu", "cuda"):
        recipe = dataclasses.replace(from_file, device=device, **method)
        neuroal.prune(model, recipe=recipe, out=tmp_path / device, stream=stream)
    here, there = read(tmp_path / "cpu"), read(tmp_path / "cuda")
    masks = [torch.cat([(t == 0).flatten() for t in x.values()]) for x in (here, there)]
    assert masks[0].sum() == masks[1].sum()
    assert (masks[0] != masks[1]).double().mean() < 0.01
    text = str(from_file.calibration)
    found = [neuroal.evaluate(tmp_path / "cuda", data=text, device=d) for d in ("cpu", "cuda")]
    values = [x.perplexity.perplexity for x in found if x.perplexity is not None]
    assert values[0] == pytest.approx(values[1], rel=1e-3)


def test_a_model_in_memory_stays_on_the_device(recipe: Recipe, windows: Tensor) -> None:
    model = tiny_model("llama", blocks=2).cuda()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        report = neuroal.prune(
            model, None, dataclasses.replace(recipe, device="auto"), windows=windows
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert report.environment["device"] == "cuda:0"
    assert all(p.device.type == "cuda" for p in model.parameters())


def test_semi_structured_weights_compute_the_same() -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("the device has no 2:4 products")
    weight = torch.randn(256, 256).cuda().half()
    mask = weight.abs().reshape(-1, 4).argsort(dim=1).argsort(dim=1) < 2
    dense = nn.Linear(256, 256, bias=False, device="cuda", dtype=torch.half)
    dense.weight = nn.Parameter(weight.masked_fill(mask.view_as(weight), 0))
    packed = copy.deepcopy(dense)
    packed.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(dense.weight))
    x = torch.randn(128, 256).cuda().half()
    assert torch.allclose(packed(x), dense(x), rtol=1e-2, atol=1e-2)


def test_bench_measures_24_forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("the device has no 2:4 products")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run = finished_run(tmp_path / "run").folder
    found = bench(run, prompt=32, tokens=2, repeats=1, device="cuda", dtype="float16")
    forms = {x["form"]: x for x in found["measured"]}
    sparse = {"torch 2:4, CUTLASS", "torch 2:4, cuSPARSELt"}
    assert sparse <= forms.keys() | found["not_measured"].keys()
    assert sparse & forms.keys(), found["not_measured"]
    for name in sparse & forms.keys():
        assert forms[name]["linears"] == 14 and forms[name]["difference"] < 0.1
        assert forms[name]["memory_bytes"] < forms["pruned"]["memory_bytes"]


KERNEL = """
import torch
from neuroal.pruning.masks import prune_rows

torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for rows, columns in ((1, 7), (33, 256), (64, 4096)):
        weight, norm = torch.randn(rows, columns).to(dtype), torch.rand(columns)
        weight[:, ::3] = weight[:, :1]  # ties
        counts = torch.randint(0, columns + 1, (rows,))
        for scores in (norm, torch.rand(rows, columns)):
            for last in (False, True):
                here, _ = prune_rows(weight, scores, counts, last)
                there, fine = prune_rows(weight.cuda(), scores.cuda(), counts, last)
                assert bool(fine)
                assert torch.equal(there.cpu(), here), (dtype, rows, columns, scores.dim(), last)
"""


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="there is no Triton")
def test_the_kernel_as_triton_compiles_it(run_process: Callable[..., Any]) -> None:
    """In a process of its own: the others have Triton's interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = run_process([sys.executable, "-c", KERNEL], env=environment)
    assert done.returncode == 0, done.stderr
