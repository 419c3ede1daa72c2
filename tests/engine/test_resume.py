"""A run that SIGKILL ends, at any step, goes on to the same bytes; and what `resume` refuses."""

import dataclasses
import json
import os
import signal
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

import neuroal
from neuroal import Recipe, UsageError, hookimpl
from neuroal.model import pretrained, run_folder
from neuroal.model.blocks import InMemory
from neuroal.model.streaming import Streamed
from neuroal.pruning.pruner import BasePruner
from neuroal.search.alignment import Aligner
from neuroal.testing import tiny_model

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked children")

Digests = Callable[[Path], dict[str, str]]
Tree = Callable[[], dict[str, str]]
Results = list[dict[str, Any]]

PROGRAMS = Path(__file__).parents[1] / "programs"


@pytest.fixture(scope="module")
def small(from_file: Recipe) -> Recipe:
    """A recipe with every kind of step, as few of each as can be."""
    return dataclasses.replace(from_file, samples=2, search_samples=1)


@pytest.fixture(scope="module")
def folder(
    save: Callable[[nn.Module, Path], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A model of two blocks."""
    return save(tiny_model("llama", blocks=2), tmp_path_factory.mktemp("two") / "model")


@pytest.fixture(scope="module")
def reference(folder: Path, small: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("reference") / "out"
    neuroal.prune(folder, recipe=small, out=out)
    return out


KILLS = {
    "in the search": "open row_ratios-0",
    "in the pruning": "rename block-0001",
    "in the writing": "open README.md",
    "in the exchange": "rename checkpoint",
    "in the tidying up": "rmtree out.partial",
}


@pytest.fixture(scope="module")
def cases(
    folder: Path,
    small: Recipe,
    recipe: Recipe,
    windows: Tensor,
    reference: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, dict[str, Any]]:
    """What `killed.py` runs, by case."""
    root = tmp_path_factory.mktemp("killed")
    other = dataclasses.replace(small, pruner="magnitude", top_up="uniform", options={})
    neuroal.prune(folder, recipe=other, out=root / "earlier")
    uniform = dataclasses.replace(recipe, top_up="uniform", options={})
    neuroal.prune(tiny_model("opt"), None, uniform, windows=windows[:2], out=root / "in memory")
    by_path = {"model": str(folder), "recipe": small.to_json(), "reference": str(reference)}
    cases: dict[str, dict[str, Any]] = {
        "by path": by_path | {"kills": list(KILLS.values())},
        "replaces": by_path | {"earlier": str(root / "earlier"), "since": "rename neuroal.json"},
        "replaces the same": by_path | {"earlier": str(reference), "since": "os.rename out"},
        "in memory": {
            "model": "opt",
            "recipe": uniform.to_json(),
            "windows": windows[:2].tolist(),
            "reference": str(root / "in memory"),
            "since": "rename block-0001",
        },
        "again": by_path | {"again": 8},
        "within a walk": by_path | {"bookmarks": True, "since": "open at-"},
    }
    if find_spec("transformers.conversion_mapping"):  # streaming needs it
        neuroal.prune(folder, recipe=small, out=root / "streamed", stream=True)
        cases["streamed"] = by_path | {
            "reference": str(root / "streamed"),
            "stream": True,
            "since": "rename model-00003",
            "kills": ["rename allocation.safetensors"],
        }
    return cases


Kill = Callable[[dict[str, dict[str, Any]]], dict[str, Results]]


@pytest.fixture(scope="module")
def kill(tmp_path_factory: pytest.TempPathFactory, run_process: Callable[..., Any]) -> Kill:
    """Runs `killed.py`, and returns what it says of runs that were killed and resumed, by case."""

    def run(cases: dict[str, dict[str, Any]]) -> dict[str, Results]:
        folder = tmp_path_factory.mktemp("cases")
        done = run_process(
            [sys.executable, PROGRAMS / "killed.py", folder], input=json.dumps(cases)
        )
        assert done.returncode == 0, done.stderr
        results: dict[str, Results] = json.loads(done.stdout)
        return results

    return run


@pytest.fixture(scope="module")
def killed(cases: dict[str, dict[str, Any]], kill: Kill) -> Callable[[str], Results]:
    """What becomes of a case that is killed at every step."""
    return lambda name: kill({name: cases[name]})[name]


def steps(results: Results) -> str:
    """The steps before which a kill was survived: resumed to the one result, nothing left over."""
    whole, *others = results
    assert (whole["status"], whole["holds"], whole["same"]) == (0, ["out"], True), whole
    for r in others:
        assert r["status"] == -signal.SIGKILL, r
        assert (r["resumed"], r["holds"], r["same"]) == (0, ["out"], True), r
    return "\n".join(r["step"] for r in others)


def test_killed_at_some_steps(cases: dict[str, dict[str, Any]], kill: Kill) -> None:
    """Of every kind of run and of every part of it; the tests below take every step."""
    results = kill({name: case | {"every": 17} for name, case in cases.items()})
    *others, last = results.pop("again")
    assert {r["status"] for r in others} == {-signal.SIGKILL}
    assert (last["status"], last["holds"], last["same"]) == (0, ["out"], True), last
    survived = {name: steps(of) for name, of in results.items()}
    assert survived.keys() == cases.keys() - {"again"}
    assert all(survived.values())
    real = [x for x in survived["by path"].splitlines() if x.startswith("killed before ")]
    for line, part in zip(real, KILLS.values(), strict=True):
        assert part in line
    assert "half of the weights saved" in survived["by path"]
    assert "half of run.json" in survived["by path"]


@pytest.mark.matrix
def test_killed_at_every_step(killed: Callable[[str], Results]) -> None:
    survived = steps(killed("by path"))
    for part in (
        "mkdir out.partial",
        "open run.json",
        "rename run.json",
        "open block_ratios-0",
        "rename block_ratios-0",
        "rename row_ratios-0",
        "rename block-0000.safetensors",
        "rename block-0001.safetensors",
        "mkdir checkpoint",
        "open allocation.safetensors",
        "open README.md",
        "rename neuroal.json",
        "rename checkpoint",
        "remove run.json",
        "rmtree out.partial",
        "rmdir out.partial",
        "half of the weights saved",
        *(
            f"half of {name}"
            for name in ("run.json", "block_ratios-0", "row_ratios-0", "block-0001")
        ),
        *(f"half of {name}" for name in ("allocation.safetensors", "neuroal.json")),
        *(f"killed before os.{part}" for part in KILLS.values() if part.startswith("rename")),
    ):
        assert part in survived, part
    assert survived.count("killed before") == len(KILLS)


@pytest.mark.matrix
@pytest.mark.usefixtures("streaming")
def test_killed_while_streaming(killed: Callable[[str], Results]) -> None:
    """Whatever else lies half written beside the shards, it is not taken for one."""
    survived = steps(killed("streamed"))
    assert "rename model-00003-of-00003.safetensors" in survived
    assert "half of allocation.safetensors" in survived and "rename README.md" in survived


@pytest.mark.matrix
def test_killed_within_a_walk(killed: Callable[[str], Results]) -> None:
    """Walks that go on from where they were, in the search and in the final pruning."""
    survived = steps(killed("within a walk"))
    for part in (
        "rename at-block_ratios-0",
        "rename at-row_ratios-0",
        "rename at-prune.json",
        "remove at-row_ratios-0",
    ):
        assert part in survived, part


@pytest.mark.matrix
@pytest.mark.parametrize("case", ["replaces", "replaces the same"])
def test_killed_while_an_earlier_run_is_replaced(
    case: str, killed: Callable[[str], Results]
) -> None:
    survived = steps(killed(case))
    assert "rename out\n" in survived and "rename checkpoint" in survived
    assert "remove run.json" in survived and "rmdir out.partial" in survived


@pytest.mark.matrix
def test_killed_with_the_model_in_memory(killed: Callable[[str], Results]) -> None:
    """The model that is given again holds the pruned weights, wherever the run was killed."""
    survived = steps(killed("in memory"))
    assert "rename checkpoint" in survived and "rmtree out.partial" in survived


@pytest.mark.matrix
def test_killed_again_and_again(killed: Callable[[str], Results]) -> None:
    *others, last = killed("again")
    assert len(others) >= 2
    assert {r["status"] for r in others} == {-signal.SIGKILL}
    assert (last["status"], last["holds"], last["same"]) == (0, ["out"], True), last


# What is left, and what goes on from it


@pytest.fixture
def stopped(
    tmp_path: Path, folder: Path, small: Recipe, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """Begins a run and interrupts it before it saves."""

    def begin(**changes: Any) -> Path:
        def interrupt(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(pretrained, "save", interrupt)
            with pytest.raises(KeyboardInterrupt):
                asked = dataclasses.replace(small, **changes)
                neuroal.prune(folder, recipe=asked, out=tmp_path / "out")
        assert [p.name for p in tmp_path.iterdir()] == ["out.partial"]
        return tmp_path / "out"

    return begin


def test_nothing_finished_is_done_again(
    stopped: Callable[..., Path],
    folder: Path,
    small: Recipe,
    reference: Path,
    digests: Digests,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = stopped()

    def never(*_: object, **__: object) -> None:
        raise AssertionError("done again")

    monkeypatch.setattr(Aligner, "measure", never)
    monkeypatch.setattr(BasePruner, "prune_block", never)
    report = neuroal.prune(folder, recipe=small, out=out, resume=True)
    assert digests(out) == digests(reference)
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    expected = json.loads((reference / "neuroal.json").read_text())
    resumed = json.loads(json.dumps(report.to_json()))
    for key in ("candidates", "sparsity", "blocks", "linears"):
        assert resumed[key] == expected[key]
    # Those of the first try, too, and of the final pruning, which looks at its blocks again.
    assert resumed["counts"]["block_runs"] >= expected["counts"]["block_runs"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("what", ["damaged", "another run's"])
def test_a_block_is_taken_over_only_as_it_was_left(
    what: str, stream: bool, folder: Path, small: Recipe, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    if stream:
        request.getfixturevalue("streaming")

    def begin(name: str, recipe: Recipe) -> Path:
        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Streamed if stream else InMemory, "save", interrupt)
            with pytest.raises(KeyboardInterrupt):
                neuroal.prune(folder, recipe=recipe, out=tmp_path / name, stream=stream)
        pattern = "checkpoint/model-00002-of-*" if stream else "journal/block-0000.safetensors"
        return next((tmp_path / f"{name}.partial").glob(pattern))

    block = begin("out", small)
    if what == "damaged":
        block.write_bytes(block.read_bytes()[:-1] + b"?")
    else:
        other = dataclasses.replace(small, sparsity=0.3)
        block.write_bytes(begin("other", other).read_bytes())
    with pytest.raises(neuroal.NeuroalError, match=r"is damaged or of another run: --overwrite"):
        neuroal.prune(folder, recipe=small, out=tmp_path / "out", stream=stream, resume=True)
    assert block.is_file() and not (tmp_path / "out").exists()


CHANGES: dict[str, dict[str, Any]] = {
    "sparsity is 0.6 there and 0.5 here": {"sparsity": 0.5},
    "seed is 0 there and 1 here": {"seed": 1},
    "pruner is wanda there and magnitude here": {"pruner": "magnitude"},
    "neuroal.lambdas is [0.0, 0.1] there and [0.0, 0.2] here": {
        "options": {
            "linear_schedule": {"lambdas": [0.05, 0.1]},
            "neuroal": {"lambdas": [0.0, 0.2]},
        }
    },
    "samples is 2 there and 3 here, seed is 0 there and 1 here": {"samples": 3, "seed": 1},
}


@pytest.mark.parametrize("change", CHANGES)
def test_resume_refuses_another_recipe(
    change: str,
    stopped: Callable[..., Path],
    folder: Path,
    small: Recipe,
    tree: Tree,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What differs is said, before anything is loaded."""
    out = stopped()
    before = tree()
    monkeypatch.setattr(pretrained, "load", None)
    monkeypatch.setattr(pretrained, "skeleton", None)
    with pytest.raises(UsageError) as error:
        asked = dataclasses.replace(small, **CHANGES[change])
        neuroal.prune(folder, recipe=asked, out=out, resume=True)
    assert str(error.value) == f"'{run_folder.partial(out)}' belongs to another run: {change}"
    assert tree() == before


def test_resume_refuses_other_weights_data_and_plugins(
    folder: Path,
    small: Recipe,
    tmp_path: Path,
    tree: Tree,
    save: Callable[[nn.Module, Path], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The recipe names them; what they hold decides."""
    model = save(tiny_model("llama", blocks=2), tmp_path / "model")
    data = tmp_path / "windows.jsonl"
    data.write_text(Path(str(small.calibration)).read_text())
    plugin = tmp_path / "mine.py"
    plugin.write_text(PLUGIN)
    asked = dataclasses.replace(small, calibration=str(data), pruner=f"{plugin}:Mine")

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pretrained, "save", interrupt)
        with pytest.raises(KeyboardInterrupt):
            neuroal.prune(model, recipe=asked, out=tmp_path / "out")
    before = tree()

    def refused(what: str) -> None:
        with pytest.raises(UsageError, match=f"belongs to another run: {what}$") as error:
            neuroal.prune(model, recipe=asked, out=tmp_path / "out", resume=True)
        assert "\n" not in str(error.value)

    lines = data.read_text().splitlines()
    data.write_text("\n".join([lines[1], lines[0], *lines[2:]]))
    refused("the calibration tokens are others")
    data.write_text("\n".join(lines) + "\n")
    plugin.write_text(PLUGIN.replace("weight.abs()", "weight.abs() + 1"))
    refused("pruner 'mine': its code is another")
    plugin.write_text(PLUGIN)
    save(tiny_model("llama", seed=1, blocks=2), model)
    refused("the model's weights or config are others")
    save(tiny_model("llama", blocks=2), model)
    assert tree() == before
    neuroal.prune(model, recipe=asked, out=tmp_path / "out", resume=True)
    assert not (tmp_path / "out.partial").exists()


PLUGIN = """
from dataclasses import dataclass
from neuroal import hookimpl


@dataclass(frozen=True, eq=False)
class Mine:
    @hookimpl
    def score_weights(self, weight):
        return weight.abs()
"""


def test_resume_refuses_another_model_in_memory(
    recipe: Recipe, windows: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pretrained, "save", interrupt)
        with pytest.raises(KeyboardInterrupt):
            neuroal.prune(tiny_model("phi"), None, recipe, windows=windows, out=tmp_path / "out")
    with pytest.raises(UsageError, match=r"run: the model's weights or config are others$"):
        neuroal.prune(
            tiny_model("phi", seed=1), None, recipe, windows=windows,
            out=tmp_path / "out", resume=True,
        )  # fmt: skip


def test_resume_of_a_finished_run_returns_its_report(
    folder: Path, small: Recipe, tmp_path: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = neuroal.prune(folder, recipe=small, out=tmp_path / "out")
    before = tree()
    with monkeypatch.context() as patch:
        patch.setattr(pretrained, "load", None)
        again = neuroal.prune(folder, recipe=small, out=tmp_path / "out", resume=True)
    assert json.dumps(again.to_json()) == json.dumps(report.to_json())
    with pytest.raises(UsageError, match=r"holds another run: seed is 0 there and 1 here$"):
        other = dataclasses.replace(small, seed=1)
        neuroal.prune(folder, recipe=other, out=tmp_path / "out", resume=True)
    assert tree() == before


def test_resume_of_a_finished_run_prunes_the_model_in_memory(
    recipe: Recipe, windows: Tensor, tmp_path: Path, weights_of: Any, same: Any
) -> None:
    done, model = tiny_model("mistral"), tiny_model("mistral")
    neuroal.prune(done, None, recipe, windows=windows, out=tmp_path / "out")
    neuroal.prune(model, None, recipe, windows=windows, out=tmp_path / "out", resume=True)
    assert same(weights_of(model), weights_of(done))
    others = {
        "the model's weights or config are others": (tiny_model("mistral", 1), windows),
        "the calibration tokens are others": (tiny_model("mistral"), windows[:3]),
    }
    for what, (other, ids) in others.items():
        with pytest.raises(UsageError, match=f"holds another run: {what}$"):
            neuroal.prune(other, None, recipe, windows=ids, out=tmp_path / "out", resume=True)


def test_resume_without_anything_there_begins(
    folder: Path, small: Recipe, tmp_path: Path, reference: Path, digests: Digests
) -> None:
    neuroal.prune(folder, recipe=small, out=tmp_path / "out", resume=True)
    assert digests(tmp_path / "out") == digests(reference)


def test_unfinished_run_is_not_lost_by_accident(
    stopped: Callable[..., Path],
    folder: Path,
    small: Recipe,
    tree: Tree,
    reference: Path,
    digests: Digests,
) -> None:
    out = stopped()
    before = tree()
    with pytest.raises(UsageError, match="unfinished run: add --resume") as error:
        neuroal.prune(folder, recipe=small, out=out)
    assert "\n" not in str(error.value)
    assert tree() == before
    neuroal.prune(folder, recipe=small, out=out, overwrite=True)
    assert digests(out) == digests(reference)
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_leavings_without_a_mark_are_not_trusted(
    stopped: Callable[..., Path], folder: Path, small: Recipe, reference: Path, digests: Digests
) -> None:
    """A kill while an unfinished run is removed may leave steps of nobody knows what run."""
    out = stopped(sparsity=0.3)
    (run_folder.partial(out) / "run.json").unlink()
    neuroal.prune(folder, recipe=small, out=out, resume=True)
    assert digests(out) == digests(reference)


@dataclasses.dataclass(frozen=True, eq=False)
class FailsLate:
    """Refines nothing, and fails in the last block."""

    @hookimpl
    def refine_mask(self, mask: Tensor, linear: neuroal.Linear) -> Tensor:
        if "layers.1.mlp.down_proj" in linear.name:
            raise RuntimeError("no")
        return mask


def test_a_failing_resumed_run_keeps_what_was_there(
    folder: Path, small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = dataclasses.replace(small, refiner=FailsLate())

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_folder.Journal, "keep_block", interrupt)
        with pytest.raises(KeyboardInterrupt):
            neuroal.prune(folder, recipe=asked, out=tmp_path / "out")
    with pytest.raises(neuroal.PluginError):
        neuroal.prune(folder, recipe=asked, out=tmp_path / "out", resume=True)
    names = {p.name.partition("-0")[0] for p in (tmp_path / "out.partial/journal").iterdir()}
    assert names == {"block_ratios", "row_ratios", "block", "norms", "kept.json"}
