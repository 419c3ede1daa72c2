"""`--save-masks` and `neuroal apply`: a run's masks, and its weights, on a model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from neuroal.errors import NeuroalError
from neuroal.pruning import mask_file

MOVES = ("--pruner", "sparsegpt", "--top-up", "uniform", "--sparsity", 0.6, "--keep", "*.o_proj")
SCORES = ("--pruner", "wanda", "--top-up", "uniform", "--pattern", "2:4", "--keep", "first:1")


def tensors(folder: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in Path(folder).glob("model*.safetensors"):
        found |= load_file(file)
    return found


def report(folder: str) -> dict[str, Any]:
    said: dict[str, Any] = json.loads(Path(folder, "neuroal.json").read_text())
    return said


def ok(result: Any) -> Any:
    assert result.exit_code == 0, result.stderr
    return result


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("columns", [1, 7, 16])
def test_a_mask_comes_back(rows: int, columns: int) -> None:
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(rows)) < 0.5
    masks = mask_file.Masks({"a": mask_file.pack(mask)}, {"a": (rows, columns)}, {})
    assert masks.mask("a").equal(mask)


def test_a_mask_that_is_broken() -> None:
    packed = mask_file.pack(torch.ones(4, 4, dtype=torch.bool))
    with pytest.raises(NeuroalError, match="mask of 'a' is broken: it has 2 bytes"):
        mask_file.Masks({"a": packed}, {"a": (8, 8)}, {}).mask("a")
    with pytest.raises(NeuroalError, match="mask of 'a' is broken"):
        mask_file.Masks({"a": packed[:-3]}, {"a": (4, 4)}, {}).mask("a")


def test_masks_are_the_zeros_in_less_than_a_bit_a_weight(folder: Path, prune: Any) -> None:
    ok(prune(*SCORES, "--save-masks", "--out", "run"))
    masks, after = mask_file.read(Path("run/masks.safetensors")), tensors("run")
    said = report("run")
    assert masks.packed.keys() == {n for n in said["linears"] if ".layers.1." in n}
    for name in masks.packed:
        assert masks.mask(name).equal(after[f"{name}.weight"] == 0)
    assert sum(int(masks.mask(n).sum()) for n in masks.packed) == said["counts"]["pruned"]
    assert masks.run["model"] == said["model"] and masks.run["recipe"] == said["recipe"]
    with safe_open("run/masks.safetensors", "pt") as file:
        assert file.metadata()["format"] == "neuroal masks 1"
    # Two of four are one of six patterns, 0.65 bits a weight at best; zlib's header is 11 bytes.
    assert sum(x.numel() for x in masks.packed.values()) < said["counts"]["weights"] / 8 + 7 * 11
    assert any("masks.safetensors holds the masks" in note for note in said["notes"])
    assert "masks.safetensors holds the masks" in Path("run/README.md").read_text()


@pytest.mark.usefixtures("streaming")
def test_masks_alone_give_the_same_model_where_the_pruner_only_scores(
    folder: Path, prune: Any, run: Any
) -> None:
    ok(prune(*SCORES, "--save-masks", "--out", "run"))
    Path("run/masks.safetensors").rename("m.safetensors")
    one, two = ("apply", "tiny", "m.safetensors"), ("apply", "tiny", "run")
    said = ok(run(*one, "--out", "file")).stdout
    ok(run(*two, "--out", "zeros", "-q"))
    ok(run(*one, "--out", "streamed", "--stream", "-q"))
    ok(run(*two, "--out", "both", "--stream", "-q"))
    expected = tensors("run")
    for name in ("file", "zeros", "streamed", "both"):
        found = tensors(name)
        assert found.keys() == expected.keys()
        assert all(found[n].equal(x) for n, x in expected.items()), name
        a, b = report("run"), report(name)
        assert b["counts"]["pruned"] == a["counts"]["pruned"] and b["model"] == a["model"]
        assert b["sparsity"] == a["sparsity"] and b["recipe"]["pattern"] == "2:4"
        assert b["linears"].keys() == a["linears"].keys()
    assert "masks of 'm.safetensors', put on the model by `neuroal apply`" in said
    assert Path("file/README.md").is_file() and Path("file/tokenizer.json").is_file()
    again = run("prune", "--recipe", "file/neuroal.json", "--out", "again", "-q")
    assert ok(again) and all(tensors("again")[n].equal(x) for n, x in expected.items())


def test_weights_that_moved_are_taken_on_request(folder: Path, prune: Any, run: Any) -> None:
    ok(prune(*MOVES, "--save-masks", "--out", "run"))
    dense, moved = tensors("tiny"), tensors("run")
    said = ok(run("apply", "tiny", "run/masks.safetensors", "--out", "own")).stdout
    assert "other values" not in said
    masks = mask_file.read(Path("run/masks.safetensors"))
    for name, weight in tensors("own").items():
        linear = name.removesuffix(".weight")
        masked = linear in masks.packed
        assert weight.equal(
            dense[name].masked_fill(masks.mask(linear), 0) if masked else dense[name]
        )
    ok(run("apply", "tiny", "run", "--weights", "--out", "same", "-q"))
    assert all(tensors("same")[n].equal(x) for n, x in moved.items())
    Path("run/masks.safetensors").unlink()
    said = ok(run("apply", "tiny", "run", "--out", "zeros")).stdout
    changed = sum(
        int(((moved[n] != dense[n]) & (moved[n] != 0)).sum()) for n in dense if n in moved
    )
    assert f"{changed:,} weights that stay have other values in 'run': --weights takes" in said
    assert all(tensors("zeros")[n].equal(x) for n, x in tensors("own").items())
    assert report("own")["counts"]["pruned"] == report("run")["counts"]["pruned"]


@pytest.mark.parametrize("masks", [True, False])
def test_linears_without_masks_say_why(masks: bool, folder: Path, prune: Any, run: Any) -> None:
    how = ("--pattern", "1:3", "--skip-indivisible", "--keep", "first:1", "--top-up", "uniform")
    ok(prune(*how, *(["--save-masks"] if masks else []), "--out", "run", "-q"))
    ok(run("apply", "tiny", "run", "--out", "out", "-q"))
    dense = [note for note in report("out")["notes"] if note.startswith("stays dense")]
    assert dense == [note for note in report("run")["notes"] if note.startswith("stays dense")]
    assert "asked to be kept: model.layers.0." in dense[0]
    assert "pattern 1:3 does not divide the inputs: model.layers.1.self_attn.q_proj" in dense[1]
    assert report("out")["counts"] | {"block_runs": 0} == report("run")["counts"] | {
        "block_runs": 0
    }


def test_a_linear_that_a_file_has_no_mask_of(folder: Path, prune: Any, run: Any) -> None:
    ok(prune(*SCORES, "--save-masks", "--out", "run", "-q"))
    masks = mask_file.read(Path("run/masks.safetensors"))
    packed, shapes = dict(masks.packed), dict(masks.shapes)
    del packed["model.layers.1.mlp.up_proj"], shapes["model.layers.1.mlp.up_proj"]
    data = mask_file.to_bytes(mask_file.Masks(packed, shapes, masks.run))
    Path("some.safetensors").write_bytes(data)
    said = ok(run("apply", "tiny", "some.safetensors", "--out", "out")).stdout
    assert "'some.safetensors' has no mask of it: model.layers.1.mlp.up_proj, " in said


def test_a_file_whose_run_is_damaged(folder: Path, prune: Any, run: Any) -> None:
    ok(prune(*SCORES, "--save-masks", "--out", "run", "-q"))
    masks = mask_file.read(Path("run/masks.safetensors"))
    known = {key: value for key, value in masks.run.items() if key != "plugins"}
    for told, said in (
        (known, "'some.safetensors' is damaged: plugins is missing"),
        (masks.run | {"model": 7}, "'some.safetensors' is damaged: model is not an object"),
        ([7], "'some.safetensors' is broken: what it says of its run is damaged"),
    ):
        damaged = mask_file.Masks(masks.packed, masks.shapes, told)  # type: ignore[arg-type]
        Path("some.safetensors").write_bytes(mask_file.to_bytes(damaged))
        result = run("apply", "tiny", "some.safetensors", "--out", "out")
        assert result.exit_code in (1, 2) and said in result.stderr


def test_ratios_of_nothing_are_no_reason(folder: Path, prune: Any, run: Any) -> None:
    """A linear that was given the ratio 0 counts among those that are pruned, as in the run."""
    ok(prune("--sparsity", "0,0.6", "--out", "run", "-q"))
    ok(run("apply", "tiny", "run", "--out", "out", "-q"))
    assert not any(note.startswith("stays dense") for note in report("out")["notes"])
    assert report("out")["sparsity"]["achieved"] == report("run")["sparsity"]["achieved"]


def test_masks_are_put_on_a_model_from_python(folder: Path, prune: Any) -> None:
    import neuroal

    ok(prune(*SCORES, "--save-masks", "--out", "run", "-q"))
    made = neuroal.apply(Path("tiny"), "run/masks.safetensors", "out")
    assert isinstance(made, neuroal.Report) and made.to_json() == report("out")
    assert all(tensors("out")[n].equal(x) for n, x in tensors("run").items())


@pytest.mark.usefixtures("streaming")
def test_the_model_has_to_be_the_one_that_was_pruned(folder: Path, prune: Any, run: Any) -> None:
    ok(prune(*SCORES, "--save-masks", "--out", "run"))
    shutil.copytree("tiny", "tuned")
    own = load_file("tuned/model.safetensors")
    save_file({n: x + 0.01 for n, x in own.items()}, "tuned/model.safetensors", {"format": "pt"})
    for more in ((), ("--stream",)):
        result = run("apply", "tuned", "run", "--out", "out", *more)
        assert result.exit_code == 2 and "--any-model puts the masks on it all the same" in (
            result.stderr
        )
        assert not Path("out").exists() and not Path("out.partial").exists()
    result = run("apply", "tuned", "run", "--out", "out", "--any-model", "--weights")
    assert result.exit_code == 2 and "drop --any-model" in result.stderr
    said = ok(run("apply", "tuned", "run", "--out", "out", "--any-model")).stdout
    assert "another than the one that the masks were made for" in said
    masks = mask_file.read(Path("run/masks.safetensors"))
    for name, weight in tensors("out").items():
        linear = name.removesuffix(".weight")
        if linear in masks.packed:
            assert ((weight == 0) == (masks.mask(linear) | (own[name] + 0.01 == 0))).all()
        else:
            assert weight.equal(own[name] + 0.01)


def test_masks_after_an_interrupted_run(folder: Path, prune: Any, monkeypatch: Any) -> None:
    from neuroal.run import commit

    plain, seen = commit._prune, []

    def fails(base: Any, block: Any, *rest: Any) -> Any:
        seen.append(block.index)
        if block.index == 1 and seen.count(1) == 1:
            raise KeyboardInterrupt
        return plain(base, block, *rest)

    monkeypatch.setattr(commit, "_prune", fails)
    assert prune(*MOVES, "--save-masks", "--out", "run").exit_code == 130
    ok(prune(*MOVES, "--save-masks", "--out", "run", "--resume", "-q"))
    assert seen == [0, 1, 1]
    ok(prune(*MOVES, "--save-masks", "--out", "whole", "-q"))
    files = [Path(x, "masks.safetensors") for x in ("run", "whole")]
    one, two = (mask_file.read(file) for file in files)
    assert all(one.mask(n).equal(two.mask(n)) for n in two.packed) and one.packed.keys() == (
        two.packed.keys()
    )


@pytest.mark.parametrize(
    ("source", "more", "status", "message"),
    [
        ("gone", (), 2, "'gone' is neither a run's folder nor a file of masks"),
        ("tiny", (), 2, "'tiny' is neither a run's folder nor a file of masks"),
        ("text.txt", (), 1, "cannot read 'text.txt'"),
        ("run/model.safetensors", (), 1, "'run/model.safetensors' holds no masks: its format is"),
        ("run/masks.safetensors", ("--weights",), 2, "--weights needs the folder of the run"),
    ],
)
def test_what_has_no_masks(
    folder: Path, prune: Any, run: Any, source: str, more: Any, status: int, message: str
) -> None:
    if source.startswith("run"):
        ok(prune(*SCORES, "--save-masks", "--out", "run", "-q"))
    result = run("apply", "tiny", source, "--out", "out", *more)
    assert result.exit_code == status and message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1 and not Path("out").exists()


def test_masks_of_another_architecture(folder: Path, prune: Any, run: Any) -> None:
    ok(prune(*SCORES, "--save-masks", "--out", "run", "-q"))
    masks = mask_file.read(Path("run/masks.safetensors"))
    for shapes, message in (
        ({"model.layers.7.a": (2, 2)}, "it has no 'model.layers.7.a'"),
        ({"model.layers.0.mlp.up_proj": (2, 2)}, "has shape (48, 32), not (2, 2)"),
    ):
        packed = {n: mask_file.pack(torch.ones(2, 2, dtype=torch.bool)) for n in shapes}
        data = mask_file.to_bytes(mask_file.Masks(packed, shapes, masks.run))
        Path("other.safetensors").write_bytes(data)
        result = run("apply", "tiny", "other.safetensors", "--out", "out", "--any-model")
        assert result.exit_code == 2 and message in result.stderr


def test_masks_need_a_place(folder: Path) -> None:
    import neuroal
    from neuroal.testing import tiny_model, windows

    recipe = neuroal.Recipe(pruner="magnitude", top_up="uniform")
    with pytest.raises(neuroal.UsageError, match="save_masks needs an output folder"):
        neuroal.prune(tiny_model("llama"), recipe=recipe, windows=windows(2, 8), save_masks=True)
