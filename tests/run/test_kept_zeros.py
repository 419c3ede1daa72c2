"""Models that are sparse already: their zeros stay, whatever prunes them, and the counts hold."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import neuroal
from neuroal import (
    Importance,
    Pattern,
    PrunedLinear,
    PrunerTraits,
    Recipe,
    Report,
    Statistics,
    Target,
    UsageError,
    hookimpl,
    mask_for,
)
from neuroal.cli import main
from neuroal.cost.plan import plan
from neuroal.cost.preparation import prepare
from neuroal.layout import find, matrices
from neuroal.plugins import load
from neuroal.pruning.allocation import Allocation
from neuroal.pruning.targets import Rules, targets
from neuroal.testing import layout, tiny_model
from neuroal.testing import windows as random_windows
from neuroal.types import Comparison

Tensors = dict[str, Tensor]
WINDOWS = random_windows(4, 16)


def weights_of(model: nn.Module) -> Tensors:
    """Copies of the linears' weights."""
    return {n: matrices.weight(x, model).clone() for n, x in find(model).linears.items()}


def sparse_model(share: float = 0.55) -> nn.Module:
    """A tiny Llama of which about `share` of every linear is zero, some rows more and some less."""
    model = tiny_model("llama", blocks=2)
    rng = torch.Generator().manual_seed(1)
    for x in find(model).linears.values():
        weight = matrices.weight(x, model)
        per_row = (torch.rand(len(weight), 1, generator=rng) - 0.5) * 0.6 + share
        weight[torch.rand(weight.shape, generator=rng) < per_row] = 0
    return model


@dataclass(frozen=True, eq=False)
class Shuffles:
    """A stranger's pruner that knows nothing of zeros: it moves all weights, and prunes any."""

    @hookimpl
    def describe(self):
        return PrunerTraits(comparison="matrix", row_ratios=False)

    @hookimpl
    def prune_linear(self, weight, target, rng):
        scores = torch.rand(weight.shape, generator=rng)
        return PrunedLinear(weight + 1, mask_for(scores, dataclasses.replace(target, zeros=None)))


@dataclass(frozen=True, eq=False)
class Chance:
    """A stranger's score that is as high for zeros as for others."""

    @hookimpl
    def score_weights(self, weight):
        return torch.rand(weight.shape, generator=torch.Generator().manual_seed(4))


def prune(model: nn.Module, **recipe: Any) -> Report:
    given = {"top_up": "uniform", "samples": 4, "search_samples": 2, "device": "cpu"} | recipe
    return neuroal.prune(model, recipe=Recipe(**given), windows=WINDOWS)


MOVERS = ("sparsegpt", "admm", "alps")
CASES: dict[str, dict[str, Any]] = {
    **{p: {"pruner": p} for p in (*MOVERS, "wanda", "magnitude", "ria", "multiflow")},
    **{f"{p} by row": {"pruner": p, "comparison": "row"} for p in MOVERS},
    "wanda by matrix": {"pruner": "wanda", "comparison": "matrix"},
    "rose": {"pruner": "sparsegpt", "options": {"sparsegpt": {"order": "rose", "slice": 8}}},
    "narrow slices": {"pruner": "sparsegpt", "options": {"sparsegpt": {"slice": 8}}},
    "search": {"top_up": "neuroal"},
    "search under alps": {"pruner": "alps", "top_up": "neuroal-block"},
    "weighed rows": {"pruner": "sparsegpt", "row_ratios": "row_sensitivity"},
    "refined": {"refiner": "dsnot"},
    "swapped": {"refiner": "sparseswaps"},
    "moved and swapped": {"pruner": "alps", "refiner": "sparseswaps"},
    "a stranger's": {"pruner": Shuffles()},
    "a stranger's score": {"pruner": Chance()},
}
PATTERNS = [case for case in CASES if "matrix" not in case and case not in ("rose", "weighed rows")]


@pytest.mark.parametrize("case", CASES)
def test_zeros_stay_and_the_sparsity_is_met_to_the_weight(case: str) -> None:
    model = sparse_model()
    before = weights_of(model)
    report = prune(model, sparsity=0.7, **CASES[case])
    after = weights_of(model)
    assert all(bool((after[n][w == 0] == 0).all()) for n, w in before.items())
    total = sum(w.numel() for w in before.values())
    zeros = sum(int((w == 0).sum()) for w in after.values())
    assert zeros == round(0.7 * total) == report.counts["pruned"]
    share = sum(int((w == 0).sum()) for w in before.values()) / total
    assert (
        f"14 of 14 linears are sparse already: their zeros stay, {share:.4f} of all weights "
        "(--no-keep-zeros)" in report.notes
    )


@pytest.mark.parametrize("case", [c for c in PATTERNS if "by row" not in c])
def test_under_a_pattern_groups_have_their_zeros_and_at_least_its_own(case: str) -> None:
    model = sparse_model()
    before = weights_of(model)
    changes = {k: v for k, v in CASES[case].items() if k != "comparison"}
    changes["top_up"] = "uniform"
    report = prune(model, pattern="2:4", **changes)
    for name, weight in weights_of(model).items():
        had, has = ((w.reshape(-1, 4) == 0).sum(1) for w in (before[name], weight))
        assert has.equal(had.clamp(min=2)), name
        assert bool((weight[before[name] == 0] == 0).all())
    assert report.sparsity["wanted"] == 0.5 < 0.6 < report.sparsity["achieved"]
    assert any("that is more than the wanted sparsity 0.5" in note for note in report.notes)


@pytest.mark.parametrize("pruner", MOVERS)
def test_zeros_may_come_back_where_that_is_asked_for(pruner: str) -> None:
    back, achieved = {}, {}
    for keep in (True, False):
        model = sparse_model(0.7)
        before = weights_of(model)
        report = prune(model, pruner=pruner, pattern="2:4", keep_zeros=keep)
        after = weights_of(model)
        back[keep] = sum(int((w[before[n] == 0] != 0).sum()) for n, w in after.items())
        achieved[keep] = report.sparsity["achieved"]
        assert any("sparse already" in note for note in report.notes) == keep
    assert back[True] == 0 < back[False]
    assert achieved[False] < achieved[True] - 0.02


@pytest.mark.parametrize("case", ["matrix", "row", "2:4"])
@pytest.mark.parametrize("pruner", [*MOVERS, "rose"])
def test_pruners_that_move_weights_have_the_zeros_in_their_masks(pruner: str, case: str) -> None:
    """What the engine would do to a mask without them is never needed."""
    if (pruner, case) == ("rose", "2:4"):
        pytest.skip("the order of ROSE has no patterns")
    options = {"sparsegpt": {"slice": 8, "order": "rose" if pruner == "rose" else "natural"}}
    name = "sparsegpt" if pruner == "rose" else pruner
    (plugin,) = load([("pruner", name)], options if name == "sparsegpt" else {})
    made = find(sparse_model()).linears
    x, y = (made[f"model.layers.{i}.mlp.up_proj"] for i in (0, 1))
    rng = torch.Generator().manual_seed(3)
    weights = torch.randn(2, x.out_features, x.in_features, generator=rng)
    zeros = torch.rand(weights.shape, generator=rng) < 0.5
    zeros[1, :3] = True
    weights[zeros] = 0
    inputs = torch.randn(64, x.in_features, generator=rng)
    grams = [Statistics({"gram": inputs.T @ inputs})] * 2
    pattern = Pattern(2, 4) if case == "2:4" else None
    wanted = []
    for its in zeros:
        counts = (its.sum(1) + 3).clamp(max=x.in_features)
        counts = counts.sum()[None] if case == "matrix" else counts
        comparison: Comparison = "matrix" if case == "matrix" else "row"
        wanted.append(Target(counts, 0.6, pattern, comparison, zeros=its))
    answers = plugin.call(
        "prune_linears", weights=weights, targets=wanted, statistics=grams, linears=[x, y], rngs=[]
    )
    for answer, target, its in zip(answers, wanted, zeros, strict=True):
        assert bool(answer.mask[its].all())
        if pattern is None:
            pruned = answer.mask.sum(1) if case == "row" else answer.mask.sum()[None]
            assert pruned.equal(target.counts)
        else:
            groups, had = (m.reshape(-1, 4).sum(1) for m in (answer.mask, its))
            assert groups.equal(had.clamp(min=2))


def test_a_wanted_sparsity_below_what_is_there_is_refused() -> None:
    model = sparse_model()
    before = weights_of(model)
    total = sum(w.numel() for w in before.values())
    share = sum(int((w == 0).sum()) for w in before.values()) / total
    with pytest.raises(UsageError) as caught:
        prune(model, sparsity=0.3, pruner="alps")
    assert str(caught.value) == (
        f"the model is sparser than it is to be: {share:.4f} of its weights are zero already, and "
        "sparsity 0.3 is wanted: give a higher --sparsity, or --no-keep-zeros"
    )
    assert all(w.equal(before[n]) for n, w in weights_of(model).items())
    report = prune(model, sparsity=0.3, pruner="alps", keep_zeros=False)
    assert report.sparsity["achieved"] == pytest.approx(0.3, abs=1e-4)


def test_under_the_paper_budget_it_is_said() -> None:
    model = sparse_model()
    before = weights_of(model)
    report = prune(model, sparsity=0.3, budget="paper")
    assert any("that is more than the wanted sparsity 0.3" in note for note in report.notes)
    # Row by row, int(d r) weights go, or as many as are zero already.
    for name, weight in weights_of(model).items():
        had, has = (before[name] == 0).sum(1), (weight == 0).sum(1)
        assert has.equal(had.clamp(min=int(0.3 * weight.shape[1]))), name


def test_fewer_than_a_tenth_of_zeros_are_any_weights() -> None:
    model = tiny_model("llama", blocks=2)
    (few, *_, many) = find(model).linears.values()
    for x, share in ((few, 0.09), (many, 0.1)):
        weight = matrices.weight(x, model)
        count = round(share * weight.numel()) + (share == 0.1)
        weight.view(-1)[torch.randperm(weight.numel())[:count]] = 0
    report = prune(model, sparsity=0.5, pruner="sparsegpt")
    assert any(note.startswith("1 of 14 linears are sparse already") for note in report.notes)


@pytest.mark.parametrize("budget", ["exact", "paper"])
@pytest.mark.parametrize("pruner", ["magnitude", "sparsegpt"])
@pytest.mark.parametrize("keep", [(), ("*.o_proj",), ("last:1",)])
def test_ratios_over_depth_beside_zeros_and_kept_linears(
    keep: tuple[str, ...], pruner: str, budget: str
) -> None:
    """A linear that is kept does not change, and of the others the larger of two shares is zero."""
    model = sparse_model()
    before, found = weights_of(model), find(model)
    report = prune(model, pruner=pruner, sparsity=(0.2, 0.9), keep=keep, budget=budget)
    after, pruned = weights_of(model), 0
    for name, x in found.linears.items():
        means = {"*.o_proj": name.endswith("o_proj"), "last:1": x.block == 1}
        if any(means[pattern] for pattern in keep):
            assert after[name].equal(before[name])
            continue
        was_zero, zero = before[name] == 0, after[name] == 0
        assert not bool((was_zero & ~zero).any())
        wanted = max((0.2, 0.9)[x.block] * x.weights, int(was_zero.sum()))
        if budget == "exact":
            assert int(zero.sum()) == pytest.approx(wanted, abs=1)
        pruned += wanted
    weights = report.counts["weights"]
    (note,) = [x for x in report.notes if "sparse already" in x]
    where = "the weights of linears that are pruned" if keep else "all weights"
    asked = 0.2 if keep == ("last:1",) else 0.55
    low = 7 if keep != ("*.o_proj",) else 6
    assert (
        f" of {where} (--no-keep-zeros); {low} of the ratios that are given would be less" in note
    )
    assert note.endswith(f"a sparsity of {pruned / weights:.4f} in place of {asked:g}")
    if budget == "exact":
        assert report.sparsity["achieved"] == pytest.approx(pruned / weights, abs=14 / weights)


@pytest.mark.parametrize(("sparsity", "said"), [(0.2, True), (0.7, False)])
def test_zeros_that_need_not_stay_are_said_where_they_are_more(sparsity: float, said: bool) -> None:
    model = sparse_model()
    linears = weights_of(model).values()
    share = sum(int((w == 0).sum()) for w in linears) / sum(w.numel() for w in linears)
    report = prune(model, pruner="wanda", sparsity=sparsity, keep_zeros=False)
    notes = [note for note in report.notes if "zero" in note]
    assert notes == (
        [
            f"{share:.4f} of all weights are zero already, more than the wanted sparsity 0.2: "
            "where the pruner moves no weight, they stay zero"
        ]
        if said
        else []
    )


def test_given_ratios_above_all_zeros_are_not_said_to_rise() -> None:
    report = prune(sparse_model(0.3), pruner="magnitude", sparsity=(0.8, 0.9))
    assert report.notes[0].endswith("(--no-keep-zeros)")


@pytest.mark.usefixtures("streaming")
def test_streamed_as_in_memory_and_said_in_the_plan(
    save: Callable[[nn.Module, Path], Path],
    digests: Callable[[Path], dict[str, str]],
    from_file: Recipe,
    read: Callable[[Path], Tensors],
    tmp_path: Path,
) -> None:
    source = save(sparse_model(), tmp_path / "sparse")
    recipe = dataclasses.replace(
        from_file, pruner="sparsegpt", top_up="uniform", options={}, sparsity=0.7
    )
    reports = [
        neuroal.prune(source, recipe=recipe, out=tmp_path / out, stream=stream)
        for out, stream in (("memory", False), ("streamed", True))
    ]
    one, other = (read(tmp_path / out) for out in ("memory", "streamed"))
    assert all(one[name].equal(other[name]) for name in one)
    assert reports[0].notes == reports[1].notes
    stored = json.loads((tmp_path / "memory" / "neuroal.json").read_text())
    assert stored["recipe"]["keep_zeros"] is True and stored["notes"] == reports[0].notes

    (note,) = plan(prepare(dataclasses.replace(recipe, model=str(source)))).notes
    exact = float(reports[0].notes[0].split("stay, ")[1].split()[0])
    said = float(note.split("about ")[1].split()[0])
    assert note.startswith("the model is sparse already: its zeros stay, about ")
    assert said == pytest.approx(exact, abs=0.05) and "more than" not in note
    low = dataclasses.replace(recipe, model=str(source), sparsity=0.2)
    assert plan(prepare(low)).notes[0].endswith("that is more than the wanted sparsity 0.2")
    free = dataclasses.replace(recipe, model=str(source), keep_zeros=False)
    assert plan(prepare(free)).notes == ()


def test_no_row_gets_fewer_than_its_zeros_and_no_weight_is_lost() -> None:
    """Ratios of rows 0.5 and 0, of which the second has zeros: by hand."""
    made = layout(1, {"a": (2, 8)})
    zeros = {"blocks.0.a": torch.tensor([0, 6])}
    rows = Allocation.of({"blocks.0.a": torch.tensor([0.5, 0.0], dtype=torch.float64)}, made)
    # 8 of 16 go: row 1 keeps its 6, which leaves 2 for row 0.
    (target,) = targets(rows, made, Rules(0.5, zeros=zeros)).values()
    assert target.counts.tolist() == [2, 6]
    # Without a row step both would lose 4 each.
    alike = Allocation.of({"blocks.0.a": 0.5}, made)
    (target,) = targets(alike, made, Rules(0.5, zeros=zeros)).values()
    assert target.counts.tolist() == [2, 6]
    (target,) = targets(alike, made, Rules(0.5, "paper", zeros=zeros)).values()
    assert target.counts.tolist() == [4, 6]
    weighed = Allocation.of(
        {"blocks.0.a": 0.25}, made, {"blocks.0.a": Importance(torch.tensor([1.0, 2.0]))}
    )
    (target,) = targets(weighed, made, Rules(0.25, "paper", zeros=zeros)).values()
    assert target.counts.tolist() == [6]


def test_linears_share_what_zeros_leave_of_the_budget() -> None:
    """Of four linears of 16, 24, 24, 24 weights, the first has 12 zeros; 44 of 88 go, by hand."""
    made = layout(1, {"q": (4, 4), "o": (6, 4), "up": (6, 4), "down": (4, 6)})
    zeros = {"blocks.0.q": torch.tensor([3, 3, 3, 3])}
    alike = Allocation.of(dict.fromkeys(made.linears, 0.5), made)
    wanted = targets(alike, made, Rules(0.5, comparison="matrix", zeros=zeros))
    counts = [int(t.counts.sum()) for t in wanted.values()]
    assert counts == [12, 11, 11, 10]  # 32 left for three of 24: 10.67 each, largest first
    probed = targets(alike, made, Rules(0.9, comparison="matrix", zeros=zeros), probe=True)
    assert [int(t.counts.sum()) for t in probed.values()] == [12, 12, 12, 12]


def test_from_the_command_line(
    save: Callable[[nn.Module, Path], Path], from_file: Recipe, tmp_path: Path
) -> None:
    source = save(sparse_model(), tmp_path / "sparse")
    words = ["prune", source, "--calibration", from_file.calibration, "--samples", 4]
    words += ["--pruner", "alps", "--top-up", "uniform", "--pattern", "2:4", "--device", "cpu"]

    def run(*more: object) -> Any:
        return CliRunner().invoke(main, [str(w) for w in (*words, *more)], prog_name="neuroal")

    dry = run("--dry-run")
    assert "Note: the model is sparse already: its zeros stay, about 0.5" in dry.output
    done = run("--out", tmp_path / "kept")
    assert done.exit_code == 0, done.output
    assert run("--out", tmp_path / "free", "--no-keep-zeros").exit_code == 0
    kept, free = (
        json.loads((tmp_path / out / "neuroal.json").read_text())["sparsity"]["achieved"]
        for out in ("kept", "free")
    )
    assert 0.5 <= free < 0.53 < 0.55 < kept
    assert "their zeros stay" in (tmp_path / "kept" / "README.md").read_text()
    low = run("--out", tmp_path / "low", "--pattern", "unstructured", "--sparsity", 0.2)
    assert low.exit_code == 2 and "the model is sparser than it is to be" in low.output
    assert not (tmp_path / "low").exists() and not (tmp_path / "low.partial").exists()
