"""Masks agree as counted weight by weight; different models are refused."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import neuroal
from neuroal.errors import NeuroalError, UsageError
from neuroal.evaluation.comparison import check_comparable, differences, lines, overall, read_side
from neuroal.evaluation.mask_overlap import MaskOverlap, agreement, masks_of
from neuroal.layout import find
from neuroal.testing import tiny_model, tiny_tokenizer, windows


def bits(mask: list[int]) -> int:
    return int("".join(map(str, mask)), 2)


def test_agreement_by_hand() -> None:
    found = agreement(bits([1, 1, 0, 0, 1, 0]), bits([1, 0, 1, 0, 1, 0]), 6)
    assert found == MaskOverlap(both=2, either=4, equal=4, weights=6)
    assert (found.overlap, found.share) == (2 / 4, 4 / 6)
    assert agreement(0, 0, 5).overlap == 1.0 == agreement(0, 0, 5).share  # neither prunes
    assert (found + agreement(1, 0, 4)).to_json() == {
        "intersection_over_union": 2 / 5,
        "equal_share": 7 / 10,
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One model, pruned by two methods at two sparsities."""
    folder = tmp_path_factory.mktemp("runs")
    for name, options in {
        "wanda": {"pruner": "wanda", "top_up": "neuroal", "sparsity": 0.6},
        "magnitude": {"pruner": "magnitude", "top_up": "uniform", "sparsity": 0.5},
    }.items():
        recipe = neuroal.Recipe(**options, search_samples=2)  # type: ignore[arg-type]
        neuroal.prune(
            tiny_model("mistral", blocks=3),
            tiny_tokenizer(),
            windows=windows(4, 16),
            recipe=recipe,
            out=folder / name,
        )
    return folder / "wanda", folder / "magnitude"


def test_lines_are_counted_on_the_saved_weights(runs: tuple[Path, Path]) -> None:
    from transformers import AutoModelForCausalLM

    models = [AutoModelForCausalLM.from_pretrained(run) for run in runs]
    layout = find(models[0])
    a, b = (read_side(str(run)) for run in runs)
    check_comparable(a, b)
    masks = masks_of(models[0], layout), masks_of(models[1], layout)
    found = lines(a, b, layout, masks)
    assert [x.name for x in found] == [x.name for x in layout.blocks]
    both = either = equal = total = pruned = 0
    for block, line in zip(layout.blocks, found, strict=True):
        for x, part in zip(block.linears, line.linears, strict=True):
            one, other = (m.get_parameter(f"{x.name}.weight") == 0 for m in models)
            assert part.name == x.name and part.masks is not None
            assert (part.a, part.b) == (float(one.double().mean()), float(other.double().mean()))
            assert part.masks.both == int((one & other).sum())
            assert part.masks.either == int((one | other).sum())
            assert part.masks.equal == int((one == other).sum())
            both, either = both + int((one & other).sum()), either + int((one | other).sum())
            equal, total = equal + int((one == other).sum()), total + one.numel()
            pruned += int(one.sum())
        size = sum(x.weights for x in block.linears)
        zeros = sum(
            int((models[1].get_parameter(f"{x.name}.weight") == 0).sum()) for x in block.linears
        )
        assert line.b == pytest.approx(zeros / size, rel=1e-12)
    together = overall(found, layout)
    assert together.masks == MaskOverlap(both, either, equal, total)
    assert together.a == pytest.approx(pruned / total, rel=1e-12) == pytest.approx(0.6, abs=1e-4)
    assert together.b == pytest.approx(0.5, abs=1e-4)


def test_what_was_asked_for_differently(runs: tuple[Path, Path]) -> None:
    a, b = (read_side(str(run)) for run in runs)
    assert list(differences(a, b)) == [
        ("sparsity", 0.6, 0.5),
        ("pruner", "wanda", "magnitude"),
        ("top_up", "neuroal", "uniform"),
    ]
    assert list(differences(a, a)) == []


def test_a_fine_tuned_run_was_asked_for_differently(runs: tuple[Path, Path]) -> None:
    a = read_side(str(runs[0]))
    assert a.report is not None
    settings = {"steps": 3, "lora": None, "distil": False}
    b = replace(a, report={**a.report, "training": {"settings": settings}})
    assert list(differences(a, a)) == list(differences(b, b)) == []
    assert list(differences(a, b)) == [("training steps", None, 3)]


def test_allocations_alone_have_wanted_ratios(runs: tuple[Path, Path]) -> None:
    file = runs[0] / "allocation.safetensors"
    a, b = read_side(str(file)), read_side(str(runs[1]))
    check_comparable(a, b)
    found = lines(a, b)
    assert [x.name for x in found] == [f"model.layers.{n}" for n in range(3)]
    assert all(x.masks is None for x in found)
    from neuroal.model.files import load_tensors

    tensors = load_tensors(file)
    for block in found:
        for line in block.linears:
            assert line.a == pytest.approx(float(tensors[line.name].mean()), rel=1e-12)
        mean = sum(x.a for x in block.linears) / len(block.linears)
        assert block.a == pytest.approx(mean, rel=1e-12)
    assert overall(found).b == pytest.approx(0.5, abs=1e-9)


def test_other_linears_are_refused(runs: tuple[Path, Path], tmp_path: Path) -> None:
    save_file({"other.0.fc": torch.tensor([0.5])}, tmp_path / "x.safetensors")
    a, b = read_side(str(runs[0])), read_side(str(tmp_path / "x.safetensors"))
    for one, other in ((a, b), (b, a)):
        with pytest.raises(UsageError, match=r"of different models: only '.*' has the linear '"):
            check_comparable(one, other)


def test_another_models_run_is_refused(runs: tuple[Path, Path], tmp_path: Path) -> None:
    torch.manual_seed(9)
    other = tiny_model("mistral", blocks=3, seed=9)
    neuroal.prune(
        other,
        tiny_tokenizer(),
        recipe=neuroal.Recipe(sparsity=0.5, pruner="magnitude", top_up="uniform"),
        out=tmp_path / "other",
    )
    with pytest.raises(UsageError, match="do not hold the same weights"):
        check_comparable(read_side(str(runs[0])), read_side(str(tmp_path / "other")))


def test_what_is_no_side_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'.*gone' is neither a run's folder nor an allocation"):
        read_side(str(tmp_path / "gone"))
    with pytest.raises(UsageError, match=r"is no run: it holds no neuroal\.json"):
        read_side(str(tmp_path))
    for name, tensor in (("matrix", torch.zeros(2, 2)), ("ratio", torch.tensor([1.5]))):
        save_file({name: tensor}, tmp_path / "x.safetensors")
        with pytest.raises(UsageError, match=f"is no allocation: '{name}'"):
            read_side(str(tmp_path / "x.safetensors"))
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(NeuroalError, match="cannot read"):
        read_side(str(tmp_path / "x.safetensors"))
    (tmp_path / "neuroal.json").write_text('{"schema": 99}')
    with pytest.raises(UsageError, match="has schema 99, this neuroal reads"):
        read_side(str(tmp_path))


# -- rows of allocations ---------------------------------------------------------------------


def written(file: Path, **tensors: list[float]) -> str:
    """Write an allocation; `q1` is linear q of block 1, `q1_c` and `q1_d` its importance."""
    named = {}
    for key, values in tensors.items():
        ending = {"c": ":importance", "d": ":input_importance"}.get(key[-1], "")
        named[f"blocks.{key[1]}.{key[0]}{ending}"] = torch.tensor(values, dtype=torch.float64)
    save_file(named, file)
    return str(file)


def test_importance_apart_by_hand(tmp_path: Path) -> None:
    """The logarithms of block 0 are 1 apart in one row of two, those of block 1 in none."""
    half: dict[str, list[float]] = {"q0": [0.5], "q1": [0.5]}
    e = math.e
    one = written(tmp_path / "a", **half, q0_c=[5 * e, 5.0], q1_c=[2.0, 6.0])
    other = written(tmp_path / "b", **half, q0_c=[1.0, 1.0], q1_c=[100.0, 300.0])
    none = written(tmp_path / "c", **half)
    a, b, c = (read_side(x) for x in (one, other, none))
    for left, right in ((a, b), (b, a)):
        check_comparable(left, right)
        blocks = lines(left, right)
        assert [x.importance for x in blocks] == pytest.approx([math.exp(0.5), 1.0])
        assert overall(blocks).importance == pytest.approx(math.exp(math.sqrt(0.25 / 2)))
        assert blocks[0].linears[0].to_json()["importance_apart"] == blocks[0].importance
        assert all(x.rows is None and "rows_apart" not in x.to_json() for x in blocks)
    assert lines(a, c)[0].importance == pytest.approx(math.exp(0.5))
    assert [x.importance for x in lines(a, a)] == [1.0, 1.0]
    assert [x.importance for x in lines(c, c)] == [None, None]


def test_importance_of_inputs_apart_by_hand(tmp_path: Path) -> None:
    """Of the six weights of q the logarithms are apart by a = ±1/2 and b = 2/3 or -1/3 in sum."""
    e, rows = math.e, {"q0": [0.5], "q0_c": [1.0, math.e]}
    one = read_side(written(tmp_path / "a", **rows, q0_d=[e, 1.0, 1.0]))
    none = read_side(written(tmp_path / "b", q0=[0.5]))
    rows_alone = read_side(written(tmp_path / "c", **rows))
    sums = [a + b for a in (-1 / 2, 1 / 2) for b in (2 / 3, -1 / 3, -1 / 3)]
    apart = math.exp(math.sqrt(math.fsum(x * x for x in sums) / 6))
    assert lines(one, none)[0].importance == pytest.approx(apart)
    of_inputs = math.exp(math.sqrt(2 / 9))
    assert lines(rows_alone, one)[0].importance == pytest.approx(of_inputs)
    assert lines(one, one)[0].importance == 1.0
    other = read_side(written(tmp_path / "d", **rows, q0_d=[1.0, 2.0]))
    with pytest.raises(UsageError, match=r"linear 'blocks.0.q' has 2 or 3 inputs"):
        check_comparable(one, other)


def test_rows_apart_by_hand(tmp_path: Path) -> None:
    a = read_side(written(tmp_path / "a", q0=[0.4, 0.6], q1=[0.5]))
    b = read_side(written(tmp_path / "b", q0=[0.5, 0.4], q1=[0.3]))
    c = read_side(written(tmp_path / "c", q0=[0.5], q1=[0.5]))
    check_comparable(a, b)
    blocks = lines(a, b)
    assert [x.rows for x in blocks] == pytest.approx([0.15, 0.2])
    assert overall(blocks).rows == pytest.approx(0.175)
    assert [x.rows for x in lines(c, a)] == pytest.approx([0.1, 0.0])
    assert [x.rows for x in lines(c, c)] == [None, None]


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"q0_c": [1.0, 0.0]}, "'blocks.0.q' has no importance of rows"),
        ({"q0_c": [1.0, 1e13]}, "'blocks.0.q' has no importance of rows"),
        ({"k0_c": [1.0, 1.0]}, "'blocks.0.k' has no importance of rows"),
        ({"q0_c": [1.0], "q0_d": [1.0, -1.0]}, "'blocks.0.q' has no importance of inputs"),
        ({"q0_d": [1.0, 2.0]}, "'blocks.0.q' has importance of inputs alone"),
        ({"k0_d": [1.0, 1.0]}, "'blocks.0.k' has importance of inputs alone"),
        ({"q0": []}, "'blocks.0.q' is float64 .0,., not floating"),
    ],
)
def test_a_file_of_wrong_rows_is_refused(
    wrong: dict[str, list[float]], problem: str, tmp_path: Path
) -> None:
    given: dict[str, list[float]] = {"q0": [0.5]}
    with pytest.raises(UsageError, match=problem):
        read_side(written(tmp_path / "x", **(given | wrong)))


@pytest.mark.parametrize("rows", [{"q0": [0.5, 0.5, 0.5]}, {"q0": [0.5], "q0_c": [1.0, 1.0, 2.0]}])
def test_linears_of_other_rows_are_refused(rows: dict[str, list[float]], tmp_path: Path) -> None:
    a = read_side(written(tmp_path / "a", q0=[0.4, 0.6]))
    b = read_side(written(tmp_path / "b", **rows))
    with pytest.raises(UsageError, match=r"linear 'blocks.0.q' has 2 or 3 rows"):
        check_comparable(a, b)
