"""One linear: scored, masked, refined, and every answer of a plugin checked."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neuroal import (
    Block,
    Importance,
    Linear,
    Pattern,
    PluginError,
    PrunedLinear,
    PrunerTraits,
    RefinerTraits,
    Statistics,
    Target,
    hookimpl,
    mask_for,
)
from neuroal.layout import find
from neuroal.layout.matrices import weight
from neuroal.plugins import Plugin, load
from neuroal.pruning.hooks import rng_for, updates_weights
from neuroal.pruning.pruner import BasePruner, spare_copies
from neuroal.testing import linear, tiny_model

WEIGHT = torch.tensor([[1.0, -2.0, 3.0, -4.0], [0.5, 0.25, -8.0, 0.75]])
HALF = Target(torch.tensor([2, 2]), 0.5)
TWO_OF_FOUR = Target(torch.tensor([2, 2]), 0.5, Pattern(2, 4))
MATRIX = Target(torch.tensor([3]), 3 / 8, comparison="matrix")
PAPER = Target(torch.tensor([2, 2]), 0.5, budget="paper")


def one(role: str, choice: Any) -> Plugin:
    return load([(role, choice)])[0]


def prune(
    pruner: Any, target: Target = HALF, refiner: Any = None, weight: Tensor = WEIGHT
) -> PrunedLinear:
    base = BasePruner(
        one("pruner", pruner), None if refiner is None else one("refiner", refiner), seed=0
    )
    rows, columns = weight.shape
    only = linear(rows, columns, name="b.0.up")
    module = nn.ModuleDict({"up": nn.Linear(columns, rows, bias=False)})
    module["up"].weight = nn.Parameter(weight)
    pruned = base.prune_block(Block(0, "b.0", (only,)), module, {}, {only.name: target})[only.name]
    return PrunedLinear(pruned, pruned == 0)  # no weight that stays is 0


@dataclass(frozen=True, eq=False)
class Says:
    """A pruner that scores as it is told."""

    kind: str = "magnitude"

    @hookimpl
    def score_weights(self, weight: Tensor) -> Any:
        if self.kind == "writes":
            return weight.abs_()
        return {
            "magnitude": weight.abs(),
            "half": weight.abs().half(),
            "narrow": weight[:, :-1],
            "integer": weight.to(torch.int64),
            "nan": weight / 0 * 0,
            "infinity": weight / 0,
            "list": weight.tolist(),
        }[self.kind]


@dataclass(frozen=True, eq=False)
class Moves:
    """A pruner that moves what survives; its mask is the rows given as 0 and 1."""

    rows: tuple[str, ...] = ("1100", "1101")
    kind: str = "right"

    @hookimpl
    def prune_linear(self, weight: Tensor, rng: torch.Generator) -> Any:
        mask = torch.tensor([[c == "1" for c in row] for row in self.rows])
        draw = float(torch.rand((), generator=rng))
        return {
            "right": PrunedLinear(weight * 10, mask),
            "double": PrunedLinear(weight.double() + 1, mask),
            "draw": PrunedLinear(torch.full_like(weight, draw), mask),
            "tuple": (weight, mask),
            "nan": PrunedLinear(weight / 0 * 0, mask),
            "integer": PrunedLinear(weight, mask.int()),
        }[self.kind]

    @hookimpl
    def score_weights(self, weight: Tensor) -> Tensor:
        return weight.abs()


@dataclass(frozen=True, eq=False)
class Refines:
    """A refiner whose mask is the rows given as 0 and 1."""

    rows: tuple[str, ...]

    @hookimpl
    def refine_mask(
        self, weight: Tensor, mask: Tensor, scores: Tensor, target: Target, linear: Linear
    ) -> Tensor:
        assert scores.equal(weight.abs()) and weight.equal(WEIGHT) and mask.dtype == torch.bool
        return torch.tensor([[c == "1" for c in row] for row in self.rows])


def test_scores_become_an_exact_mask() -> None:
    made = prune(Says())
    assert made.mask.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0]]
    assert made.weight.tolist() == [[0, 0, 3, -4], [0, 0, -8, 0.75]]
    assert made.weight.dtype == torch.float32
    assert prune(Says("half")).mask.equal(made.mask)
    assert prune(Says(), MATRIX).mask.int().tolist() == [[0, 0, 0, 0], [1, 1, 0, 1]]
    assert prune(Says(), TWO_OF_FOUR).mask.equal(made.mask)


def test_what_survives_may_move_and_what_is_pruned_is_zero() -> None:
    made = prune(Moves(("1100", "1100")))
    assert made.weight.tolist() == [[0, 0, 30, -40], [0, 0, -80, 7.5]]
    made = prune(Moves(("1100", "1100"), "double"))
    assert made.weight.dtype == torch.float32
    assert made.weight.tolist() == [[0, 0, 4, -3], [0, 0, -7, 1.75]]


def test_a_weight_that_a_refiner_brings_back_has_its_dense_value() -> None:
    made = prune(Moves(("1100", "1100")), refiner=Refines(("0110", "1100")))
    assert made.weight.tolist() == [[1, 0, 0, -40], [0, 0, -80, 7.5]]
    assert made.mask.int().tolist() == [[0, 1, 1, 0], [1, 1, 0, 0]]


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("narrow", r"score_weights: returned shape \(2, 3\), not \(2, 4\)"),
        ("integer", r"score_weights: returned torch\.int64 \(2, 4\), not a floating tensor"),
        ("nan", "score_weights: returned NaN or infinity"),
        ("infinity", "score_weights: returned NaN or infinity"),
        ("list", "score_weights: returned list, not a floating tensor"),
        ("writes", "score_weights: wrote to its input 'weight'"),
    ],
)
def test_wrong_scores_are_blamed_on_the_pruner(kind: str, problem: str) -> None:
    with pytest.raises(PluginError, match=rf"^pruner 'says' .*hook {problem}"):
        prune(Says(kind), weight=WEIGHT.clone())


@pytest.mark.parametrize(
    ("rows", "kind", "target", "problem"),
    [
        (("1100", "1100"), "tuple", HALF, "returned tuple for linear 'b.0.up'"),
        (("1100", "1100"), "nan", HALF, "returned NaN or infinity for linear 'b.0.up'"),
        (("1100", "1100"), "integer", HALF, r"returned mask torch\.int32 \(2, 4\), not bool"),
        (("110", "110"), "right", HALF, r"returned mask torch\.bool \(2, 3\), not bool \(2, 4\)"),
        (("1100", "1110"), "right", HALF, "pruned 5, not 4, weights for linear 'b.0.up'"),
        (("1000", "1110"), "right", HALF, "pruned other rows than it was asked to"),
        (("1100", "1100"), "right", MATRIX, "pruned 4, not 3, weights"),
        (("1000", "1110"), "right", TWO_OF_FOUR, "returned a mask that is not 2:4"),
    ],
)
def test_a_mask_that_misses_its_target_is_refused(
    rows: tuple[str, ...], kind: str, target: Target, problem: str
) -> None:
    with pytest.raises(PluginError, match=rf"^pruner 'moves' .*hook prune_linear: {problem}"):
        prune(Moves(rows, kind), target)


def test_a_refiner_keeps_the_budget_too() -> None:
    with pytest.raises(PluginError, match=r"^refiner 'refines' .*refine_mask: pruned 3, not 4"):
        prune(Says(), refiner=Refines(("0110", "0100")))
    with pytest.raises(PluginError, match=r"^refiner 'refines' .*refine_mask: .* is not 2:4"):
        prune(Says(), TWO_OF_FOUR, Refines(("0111", "0100")))


def test_the_paper_budget_lets_masks_drift() -> None:
    made = prune(Says(), PAPER, Refines(("0111", "1000")))
    assert made.mask.sum(dim=1).tolist() == [3, 1]


def test_random_draws_depend_on_seed_names_and_linear_alone() -> None:
    torch.manual_seed(1)
    first = prune(Moves(("1100", "1100"), "draw")).weight
    torch.manual_seed(2)
    assert prune(Moves(("1100", "1100"), "draw")).weight.equal(first)
    draws = [
        float(torch.rand((), generator=rng_for(seed, *names)))
        for seed, names in [(0, ["pruner", "a"]), (0, ["pruner", "b"]), (1, ["pruner", "a"])]
    ]
    assert len(set(draws)) == 3


def test_traits() -> None:
    assert one("pruner", Says()).traits(PrunerTraits) == PrunerTraits()
    assert one("refiner", Refines(("0110", "0110"))).traits(RefinerTraits) == RefinerTraits()


def test_the_hooks_say_whether_weights_are_moved() -> None:
    assert [updates_weights(one("pruner", x)) for x in (Says(), Moves(), MovesMany())] == [
        False,
        True,
        True,
    ]


def test_only_linears_with_a_target_are_pruned_and_plugins_see_copies() -> None:
    model = tiny_model("llama", blocks=1).bfloat16()
    (block,) = find(model).blocks
    module = model.get_submodule(block.name)
    copies = spare_copies(block, module)
    for x in block.linears:
        own = model.get_parameter(f"{x.name}.weight")
        assert weight(x, module, block.name).data_ptr() == own.data_ptr()
        assert copies[x.name].dtype == torch.float32 and copies[x.name].equal(own.float())
        assert copies[x.name].data_ptr() != own.data_ptr()
    second = block.linears[1]
    targets = {second.name: Target(torch.full((second.out_features,), 16), 0.5)}
    base = BasePruner(one("pruner", Says()), None, 0)
    empty: Mapping[str, Statistics] = {}
    weights = base.prune_block(block, module, empty, targets)
    assert weights.keys() == {second.name} and weights[second.name].dtype == torch.bfloat16


calls: list[list[str]] = []


@dataclass(frozen=True, eq=False)
class MovesMany:
    """A pruner of many linears at once; it says which came together."""

    kind: str = "right"

    @hookimpl
    def prune_linears(
        self, weights: Tensor, targets: Any, statistics: Any, linears: Any, rngs: Any
    ) -> Any:
        calls.append([x.name.rpartition(".")[2] for x in linears])
        assert len(weights) == len(targets) == len(statistics) == len(linears) == len(rngs)
        masks = [mask_for(w.abs(), target) for w, target in zip(weights, targets, strict=True)]
        draws = [float(torch.rand((), generator=rng)) for rng in rngs]
        moved = [weight * (1 + draw) for weight, draw in zip(weights, draws, strict=True)]
        answers = [PrunedLinear(*pair) for pair in zip(moved, masks, strict=True)]
        return {
            "right": answers,
            "short": answers[1:],
            "tensor": weights,
            "nan": [*answers[:-1], PrunedLinear(moved[-1] / 0 * 0, masks[-1])],
        }[self.kind]


@dataclass(frozen=True, eq=False)
class MovesOne:
    """The same, one linear at a time."""

    @hookimpl
    def prune_linear(self, weight: Tensor, target: Target, rng: torch.Generator) -> PrunedLinear:
        draw = float(torch.rand((), generator=rng))
        return PrunedLinear(weight * (1 + draw), mask_for(weight.abs(), target))


def whole_block(
    pruner: Any, counts: Mapping[str, int] | None = None, weighed: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """Prune a block of four linears of 32 x 32, two of 48 x 32 and one of 32 x 48.

    If any are `weighed`, all compete in the matrix: these with importance, by powers of two.
    """
    calls.clear()
    model = tiny_model("llama", blocks=1)
    (block,) = find(model).blocks
    counts = counts or {}
    targets = {
        x.name: Target(torch.full((x.out_features,), counts.get(x.name.split(".")[-1], 16)), 0.5)
        for x in block.linears
    }
    for x in block.linears if weighed else ():
        importance = 2.0 ** (-torch.arange(x.out_features) % 5)
        of_rows = Importance(importance) if x.name.split(".")[-1] in weighed else None
        half = torch.tensor([x.weights // 2])
        targets[x.name] = Target(half, 0.5, comparison="matrix", importance=of_rows)
    plugin = Plugin(**{**vars(one("pruner", pruner)), "name": "moves"})  # the rngs know its name
    return BasePruner(plugin, None, 0).prune_block(
        block, model.get_submodule(block.name), {}, targets
    )


def test_linears_of_one_shape_are_pruned_in_one_call() -> None:
    found = whole_block(MovesMany())
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert calls == [attention, ["gate_proj", "up_proj"], ["down_proj"]]
    alone = whole_block(MovesOne())
    assert found.keys() == alone.keys()
    assert all(found[name].equal(alone[name]) for name in alone)


def test_linears_that_lose_nothing_come_by_themselves() -> None:
    whole_block(MovesMany(), {"k_proj": 0, "o_proj": 0, "q_proj": 20})
    assert calls[:2] == [["q_proj", "v_proj"], ["k_proj", "o_proj"]]


def test_a_call_has_no_more_linears_than_its_bytes_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neuroal.pruning.hooks.BATCH_BYTES", 3 * 4 * 32 * (32 + 32))
    whole_block(MovesMany())
    assert calls[:2] == [["q_proj", "k_proj", "v_proj"], ["o_proj"]]
    monkeypatch.setattr("neuroal.pruning.hooks.BATCH_BYTES", 1)
    whole_block(MovesMany())
    assert [len(call) for call in calls] == [1] * 7


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("short", r"returned a list of 3, not a list of 4 PrunedLinear, for '.*q_proj' and follow"),
        ("tensor", r"returned Tensor, not a list of 4 PrunedLinear, for '.*q_proj' and following"),
        ("nan", r"returned NaN or infinity for linear '.*o_proj'"),
    ],
)
def test_a_wrong_answer_among_many_is_blamed_by_name(kind: str, problem: str) -> None:
    with pytest.raises(PluginError, match=rf"hook prune_linears: {problem}"):
        whole_block(MovesMany(kind))


def test_a_pruner_of_many_linears_takes_one_alone() -> None:
    assert prune(MovesMany()).mask.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0]]


# -- importance of rows ------------------------------------------------------------------------


def weighed_by(*importance: float) -> Target:
    """Three of eight weights go, of rows that count so much."""
    rows = Importance(torch.tensor(importance))
    return Target(torch.tensor([3]), 3 / 8, comparison="matrix", importance=rows)


WEIGHED = weighed_by(1.0, 8.0)


def test_rows_of_a_pruner_that_scores_compete_and_survivors_keep_their_bits() -> None:
    made = prune(Says(), WEIGHED)  # 8 times as much: 4, 2, 64 and 6
    assert made.mask.int().tolist() == [[1, 1, 0, 0], [0, 1, 0, 0]]
    assert made.weight.tolist() == [[0, 0, 3, -4], [0.5, 0, -8, 0.75]]
    again = prune(Says(), weighed_by(0.3, 0.7))
    assert again.weight[~again.mask].equal(WEIGHT[~again.mask])


@dataclass(frozen=True, eq=False)
class Sees:
    """Prunes the smallest weights of the matrix, doubles the others, and is sure of its target."""

    @hookimpl
    def prune_linear(self, weight: Tensor, target: Target) -> PrunedLinear:
        assert target.importance is None and target.comparison == "matrix"
        assert weight[0].equal(WEIGHT[0]) and weight[1].equal(8 * WEIGHT[1])
        mask = mask_for(weight.abs(), target)
        return PrunedLinear(2 * weight * ~mask, mask)


@dataclass(frozen=True, eq=False)
class SeesMany(Sees):
    """The same of many linears."""

    @hookimpl
    def prune_linears(self, weights: Tensor, targets: list[Target]) -> list[PrunedLinear]:
        pairs = zip(weights, targets, strict=True)
        return [Sees.prune_linear(self, weight, target) for weight, target in pairs]


@pytest.mark.parametrize("pruner", [Sees(), SeesMany()])
def test_a_pruner_that_moves_weights_sees_larger_rows_and_no_importance(pruner: Any) -> None:
    made = prune(pruner, WEIGHED)
    assert made.mask.int().tolist() == [[1, 1, 0, 0], [0, 1, 0, 0]]
    assert made.weight.tolist() == [[0, 0, 6, -8], [1, 0, -16, 1.5]]


def test_weighed_linears_are_pruned_together_with_others() -> None:
    """In one call, each as if alone; those without importance as if no other had any."""
    weighed = ("k_proj", "o_proj", "up_proj")
    found = whole_block(MovesMany(), weighed=weighed)
    assert calls[0] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    alone = whole_block(MovesOne(), weighed=weighed)
    others = whole_block(MovesMany(), weighed=("none of them",))
    assert all(found[name].equal(alone[name]) for name in alone)
    same = {name.split(".")[-1] for name in found if found[name].equal(others[name])}
    assert same == {"q_proj", "v_proj", "gate_proj", "down_proj"}


@dataclass(frozen=True, eq=False)
class Normalises:
    """Brings every row to a length that is finite only as long as nobody divides it."""

    @hookimpl
    def prune_linear(self, weight: Tensor, target: Target) -> PrunedLinear:
        return PrunedLinear(torch.full_like(weight, 1e38), mask_for(weight.abs(), target))


def test_what_importance_makes_infinite_is_refused() -> None:
    with pytest.raises(PluginError, match=r"hook prune_linear: returned NaN or infinity"):
        prune(Normalises(), weighed_by(1, 0.1))
    assert bool(prune(Normalises(), MATRIX).weight.isfinite().all())


def test_a_refiner_of_weighed_rows_keeps_their_number() -> None:
    refined = prune(Says(), WEIGHED, Refines(("1100", "0001")))
    assert refined.weight.tolist() == [[0, 0, 3, -4], [0.5, 0.25, -8, 0]]
    with pytest.raises(PluginError, match="refine_mask"):
        prune(Says(), WEIGHED, Refines(("1100", "0011")))
