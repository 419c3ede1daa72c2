"""Whole runs on a simulated device: the CPU's weights to the bit, and no work that falls back.

Both run attention by the same formula (`MATH`), which accelerators have kernels of their own for.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import neuroal
from neuroal import Recipe
from neuroal.layout import finding
from neuroal.model.run_folder import Journal
from neuroal.plugins import available
from neuroal.testing import STRUCTURES, simulated_device, tiny_model
from neuroal.testing.simulated_device import NAME, Traffic, traffic
from neuroal.walk import activations, bookmark

pytest.importorskip(
    "transformers.conversion_mapping",
    reason="the masks of transformers 4 need vmap",
)
pytestmark = pytest.mark.skipif(
    not simulated_device.available(), reason="this torch cannot simulate a device"
)

SMALL: dict[str, dict[str, Any]] = {
    "linear_schedule": {"lambdas": (0.05, 0.1)},
    "lambda_search": {"lambdas": (0.0, 0.1, 0.2), "refinements": 1},
    "evolution": {"generations": 1, "offspring": 2, "windows": (1,), "survivors": (1,)},
    "sensitivity": {"candidates": 5},
    "neuroal": {"lambdas": (0.0, 0.1)},
    "row_sensitivity": {"candidates": 4, "own": (0.0,), "probe_windows": 1},
    "alps": {"iterations": 10},
    "block": {"passes": 1},
}
PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "linear", "_grouped_mm"}
# Where a matrix may be read by the host: it is written to the disk.
SAVING = ("safetensors.torch:", "model.run_folder:", "model.streaming:", "model.lazy_matrix:")
SAVED = ("walk.activations:", "walk.bookmark:")


def names(role: str) -> list[str]:
    return [x.name for x in available(role) if x.distribution == "neuroal"]


class Products(TorchDispatchMode):
    """Fails at a product of matrices of the CPU; those of searches alone are in float64."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in PRODUCTS and result.dtype != torch.float64:
            assert result.device.type != "cpu", f"{func} of {[tuple(x.shape) for x in args]}"
        return result


@contextmanager
def on_the_device() -> Iterator[Traffic]:
    """Watch work on the device; refuse that a matrix is read or multiplied on the CPU."""
    with Products(), traffic() as seen:
        yield seen
    read = {e.place for e in (*seen.waits, *seen.copies) if e.what == "to the CPU" and e.matrix}
    assert not [place for place in read if not place.startswith(SAVING + SAVED)], read


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    simulated_device.register()


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory, save: Callable[[nn.Module, Path], Path]
) -> Mapping[str, Path]:
    """The folder of a model of two blocks, by structure."""
    root = tmp_path_factory.mktemp("two")
    return {s: save(tiny_model(s, blocks=2), root / s) for s in STRUCTURES}


def nearly(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).norm() <= 1e-2 * one.norm())


def costs_of(run: Path) -> list[float]:
    """The misalignments of a run's candidates, -1 where there is none."""
    candidates = json.loads((run / "neuroal.json").read_text())["candidates"]
    return [-1 if c["misalignment"] is None else c["misalignment"] for c in candidates]


Run = Callable[..., Traffic]


@pytest.fixture
def run(
    folders: Mapping[str, Path],
    from_file: Recipe,
    tmp_path: Path,
    read: Callable[[Path], dict[str, Tensor]],
) -> Run:
    """Prunes a model on the CPU and on the device, and compares what is written."""

    def both(structure: str = "llama", /, stream: bool = False, **changes: Any) -> Traffic:
        recipe = dataclasses.replace(
            from_file, sparsity=0.5, samples=3, **{"options": {}} | changes
        )
        model, how = folders[structure], {"stream": stream}
        with sdpa_kernel(SDPBackend.MATH):
            neuroal.prune(model, recipe=recipe, out=tmp_path / "cpu", **how)
        recipe = dataclasses.replace(recipe, device=NAME)
        with on_the_device() as seen:
            report = neuroal.prune(model, recipe=recipe, out=tmp_path / "device", **how)
        assert report.environment["device"] == f"{NAME}:0"
        here, there = read(tmp_path / "cpu"), read(tmp_path / "device")
        for name, tensor in here.items():
            assert torch.equal(tensor == 0, there[name] == 0), f"other masks in {name}"
        trained = changes.get("reconstruction") == "block"  # autograd adds up in another order
        close = nearly if trained else torch.equal
        assert all(close(tensor, there[name]) for name, tensor in here.items())
        costs = [costs_of(tmp_path / place) for place in ("cpu", "device")]
        assert costs[0] == pytest.approx(costs[1], rel=1e-5)
        return seen

    return both


def small(*used: str) -> dict[str, dict[str, Any]]:
    return {name: SMALL[name] for name in used if name in SMALL}


@pytest.mark.parametrize("pruner", names("pruner"))
def test_pruners(pruner: str, run: Run) -> None:
    run(pruner=pruner, top_up="uniform", options=small(pruner))


@pytest.mark.parametrize("refiner", names("refiner"))
def test_refiners(refiner: str, run: Run) -> None:
    run(refiner=refiner, top_up="uniform")


@pytest.mark.parametrize("reconstruction", names("reconstruction"))
def test_reconstructions(reconstruction: str, run: Run) -> None:
    run(reconstruction=reconstruction, top_up="uniform", options=small(reconstruction))


@pytest.mark.parametrize("alignment", names("alignment"))
def test_metrics(alignment: str, run: Run) -> None:
    run(alignment=alignment, options=small("linear_schedule", "neuroal"))


@pytest.mark.parametrize("block_ratios", names("block_ratios"))
def test_block_ratios(block_ratios: str, run: Run) -> None:
    run(block_ratios=(block_ratios,), row_ratios="uniform", options=small(block_ratios))


@pytest.mark.parametrize("row_ratios", names("row_ratios"))
def test_row_ratios(row_ratios: str, run: Run) -> None:
    run(block_ratios=("uniform",), row_ratios=row_ratios, options=small(row_ratios))


FORMS: dict[str, dict[str, Any]] = {
    "2:4": {"pattern": "2:4"},
    "2:4, second order": {"pattern": "2:4", "pruner": "sparsegpt"},
    "4:8, refined": {"pattern": "4:8", "refiner": "dsnot"},
    "matrix": {"comparison": "matrix"},
    "published roundings": {"budget": "paper"},
    "half precision": {"dtype": "bfloat16"},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_patterns_and_comparisons(form: dict[str, Any], run: Run) -> None:
    run(top_up="uniform", **form)


STREAMED: dict[str, dict[str, Any]] = {
    "neuroal": {"options": {k: SMALL[k] for k in ("linear_schedule", "neuroal")}},
    "second order": {"pruner": "sparsegpt", "top_up": "uniform"},
    "refined": {"refiner": "dsnot", "top_up": "uniform"},
    "new values": {"reconstruction": "refit", "top_up": "uniform"},
    "half precision search": {"search_dtype": "bfloat16", "options": {"neuroal": SMALL["neuroal"]}},
}


ELSEWHERE = ("safetensors.", "model.", "transformers.", "walk.block_arguments:")
BLOCKS = 2
WAITS: dict[str, tuple[dict[str, Any], int]] = {
    "magnitude": ({"pruner": "magnitude", "top_up": "uniform"}, 0),
    "wanda": ({"top_up": "uniform"}, 0),
    "ria": ({"pruner": "ria", "top_up": "uniform"}, 0),
    "neuroal": ({"options": {k: SMALL[k] for k in ("linear_schedule", "neuroal")}}, 2),
    "neuroal-fast": ({"top_up": "neuroal-fast"}, 2),
}


@pytest.mark.parametrize("method", WAITS.values(), ids=WAITS)
def test_waits(method: tuple[dict[str, Any], int], run: Run) -> None:
    """Once a block and once at the end; and so for every generation, which also reads deviations.

    But for weights on their way to the disk, and what is done once a run (docs/benchmarks.md).
    """
    recipe, steps = method
    seen = run(**recipe)
    waits = [e for e in seen.waits if not e.place.startswith(ELSEWHERE)]
    generations = sum(e.place.startswith("search.outcomes:") for e in waits)
    assert generations >= steps
    assert len(waits) <= (BLOCKS + 1) + generations * (BLOCKS + 2), seen.table()


@pytest.mark.usefixtures("streaming")
@pytest.mark.parametrize("method", STREAMED.values(), ids=STREAMED)
def test_streamed(method: dict[str, Any], run: Run) -> None:
    run(stream=True, **method)


@pytest.mark.parametrize("structure", [s for s in STRUCTURES if s != "llama"])
def test_structures(structure: str, run: Run) -> None:
    run(structure, options=small("linear_schedule", "neuroal"))


def test_a_model_in_memory_stays_there(
    recipe: Recipe, windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which the layout would refuse: the device's tensors are a class of their own."""
    monkeypatch.setattr(finding, "_refuse_quantised", lambda block, module: None)
    here, there = tiny_model("llama", blocks=2), tiny_model("llama", blocks=2).to(NAME)
    with sdpa_kernel(SDPBackend.MATH):
        neuroal.prune(here, None, recipe, windows=windows)
    with on_the_device():
        report = neuroal.prune(there, None, recipe, windows=windows)
    assert report.environment["device"] == f"{NAME}:0"
    for name, tensor in there.state_dict().items():
        assert tensor.device.type == NAME
        assert torch.equal(tensor.cpu(), here.state_dict()[name])


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device's tensors, which are a class of their own, pass for plain ones."""

    def is_plain(x: object) -> bool:
        return usual(x) or (isinstance(x, simulated_device.SimulatedTensor) and x.numel() > 0)

    usual = activations.is_plain
    monkeypatch.setattr(activations, "is_plain", is_plain)
    monkeypatch.setattr(bookmark, "is_plain", is_plain)


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("stream", [False, True])
def test_a_run_that_is_resumed(
    stream: bool,
    folders: Mapping[str, Path],
    from_file: Recipe,
    tmp_path: Path,
    digests: Callable[[Path], dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Interrupted before the last block is kept, with activations on the disk; to the same bits."""
    recipe = dataclasses.replace(from_file, samples=3, device=NAME)
    how: dict[str, Any] = {"recipe": recipe, "stream": stream, "spill": True}
    neuroal.prune(folders["llama"], out=tmp_path / "whole", **how)

    def interrupt(self: Journal, index: int, *_: object) -> None:
        if index:
            raise KeyboardInterrupt
        keep(self, index, *_)

    keep = Journal.keep_norms
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "keep_norms", interrupt)
        patch.setattr(bookmark, "SECONDS", 0.0)
        patch.setattr(bookmark, "SHARE", 0)
        with pytest.raises(KeyboardInterrupt):
            neuroal.prune(folders["llama"], out=tmp_path / "out", **how)
    assert list((tmp_path / "out.partial").rglob("at-*"))
    with on_the_device():
        neuroal.prune(folders["llama"], out=tmp_path / "out", resume=True, **how)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_evaluation(folders: Mapping[str, Path], from_file: Recipe) -> None:
    text = str(from_file.calibration)
    with sdpa_kernel(SDPBackend.MATH):
        known = neuroal.evaluate(folders["llama"], data=text, device="cpu").perplexity
    with on_the_device():
        found = neuroal.evaluate(folders["llama"], data=text, device=NAME).perplexity
    assert found is not None
    assert known is not None
    assert found.perplexity == pytest.approx(known.perplexity, rel=1e-6)
