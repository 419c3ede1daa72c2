"""One linear: scored, masked, refined, and every answer of a plugin checked."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from neuroal import (
    Linear,
    Pattern,
    PluginError,
    PrunedLinear,
    PrunerTraits,
    Statistics,
    Target,
    hookimpl,
)
from neuroal.layout import find
from neuroal.plugins import Plugin, load
from neuroal.pruning import BasePruner, generator, spare_copies, traits
from neuroal.testing import linear, statistics, tiny_model
from neuroal.weights import weight

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
    return base.prune_linear(linear(rows, columns, name="b.0.up"), weight, statistics(), target)


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
        float(torch.rand((), generator=generator(seed, *names)))
        for seed, names in [(0, ["pruner", "a"]), (0, ["pruner", "b"]), (1, ["pruner", "a"])]
    ]
    assert len(set(draws)) == 3


def test_traits() -> None:
    assert traits(one("pruner", Says())) == PrunerTraits()
    assert traits(one("pruner", Moves())) == PrunerTraits(second_order=True)


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
