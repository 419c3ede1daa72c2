"""A plugin that was written for an older or a newer hook API goes on working (docs/roles)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import neuroal
from neuroal import PluginError, hookimpl
from neuroal.hookspecs import ROLES, PrunerSpec, hookspec
from neuroal.plugins import contract, load
from neuroal.testing import linear, statistics, tiny_model, windows
from neuroal.types import REMOVED


@dataclass(frozen=True, eq=False)
class Old:
    """Written when `score_weights` had one argument."""

    @hookimpl
    def score_weights(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.abs()


@dataclass(frozen=True, eq=False)
class Declares:
    """Declares an argument that is to be removed."""

    @hookimpl
    def score_weights(self, weight: torch.Tensor, linear: neuroal.Linear) -> torch.Tensor:
        return weight.abs() * linear.in_features


@dataclass(frozen=True, eq=False)
class Ahead:
    """Has a hook that only a later neuroal knows, marked so that an earlier one passes over it."""

    @hookimpl
    def score_weights(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.abs()

    @hookimpl(optionalhook=True)
    def explain_weights(self, weight: torch.Tensor) -> str:
        raise AssertionError("no one asks")


@pytest.fixture
def arguments() -> dict[str, Any]:
    return {
        "weight": torch.tensor([[1.0, -2.0]]),
        "statistics": statistics(),
        "linear": linear(1, 2),
    }


def test_an_argument_is_added(monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any]) -> None:
    class Spec:
        """As a later minor release may have it."""

        @hookspec(firstresult=True)
        def score_weights(self, weight, statistics, linear, temperature):  # type: ignore[no-untyped-def]
            """Score."""

    monkeypatch.setattr(PrunerSpec, "score_weights", Spec.score_weights)
    assert contract.arguments(Spec.score_weights)[-1] == "temperature"
    [plugin] = load([("pruner", Old())])
    scores = plugin.call("score_weights", **arguments, temperature=1.0)
    assert scores.tolist() == [[1.0, 2.0]]


def test_an_argument_is_to_be_removed(
    monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any]
) -> None:
    going = {"linear": DeprecationWarning("score_weights: `linear` goes in 0.9, use `place`")}

    class Spec:
        """As the release before the removal has it."""

        @hookspec(firstresult=True, warn_on_impl_args=going)
        def score_weights(self, weight, statistics, linear):  # type: ignore[no-untyped-def]
            """Score."""

    monkeypatch.setattr(PrunerSpec, "score_weights", Spec.score_weights)
    with pytest.warns(DeprecationWarning, match="goes in 0.9, use `place`"):
        [plugin] = load([("pruner", Declares())])
    assert plugin.call("score_weights", **arguments).tolist() == [[2.0, 4.0]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # who does not declare it hears nothing
        load([("pruner", Old())])


def test_an_argument_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Spec:
        """As the release after has it."""

        @hookspec(firstresult=True)
        def score_weights(self, weight, statistics):  # type: ignore[no-untyped-def]
            """Score."""

    monkeypatch.setattr(PrunerSpec, "score_weights", Spec.score_weights)
    with pytest.raises(PluginError, match="hook score_weights has no argument 'linear'"):
        load([("pruner", Declares())])
    load([("pruner", Old())])


def test_a_hook_of_a_later_release_is_passed_over() -> None:
    recipe = neuroal.Recipe(sparsity=0.5, pruner=Ahead(), top_up="uniform")
    report = neuroal.prune(tiny_model("llama", blocks=2), windows=windows(2, 8), recipe=recipe)
    assert report.sparsity["achieved"] == pytest.approx(0.5, abs=1e-3)


def test_a_field_is_added_to_what_the_engine_gives() -> None:
    """Types that plugins construct have defaults for all but what a first release asked for."""
    assert neuroal.Proposal({}).importance == {}
    assert neuroal.Generation([]).drop_early is True
    assert neuroal.PrunerTraits() == neuroal.PrunerTraits("row", True, True)
    assert neuroal.RowRatiosTraits() == neuroal.RowRatiosTraits(weighs_rows=False)
    assert neuroal.RefinerTraits() == neuroal.RefinerTraits(needs_paper_budget="")
    assert neuroal.ReconstructionTraits() == neuroal.ReconstructionTraits(
        batch_tokens=None, passes=1
    )
    assert neuroal.ExporterTraits() == neuroal.ExporterTraits(reads_dense=False)
    assert neuroal.TopUp().refiner is None
    assert neuroal.TopUp().reconstruction is None


def test_fourteen_hooks_express_every_plugin() -> None:
    assert len({hook for role in ROLES.values() for hook in role.hooks}) == 14


@pytest.mark.parametrize(
    ("kind", "name", "instead"),
    [(k, n, said) for k, names in REMOVED.items() if k != "hook" for n, said in names.items()],
)
def test_a_former_argument_is_refused_with_what_to_write(
    kind: str, name: str, instead: str
) -> None:
    arguments: dict[str, Any] = {"Generation": {"proposals": []}, "Proposal": {"ratios": {}}}
    with pytest.raises(TypeError) as error:
        getattr(neuroal, kind)(**arguments.get(kind, {}), **{name: 2})
    assert str(error.value) == f"{kind} has no '{name}' any more: {instead}"


@dataclass(frozen=True, eq=False)
class Says:
    """A refiner of a former version."""

    @hookimpl
    def needs_paper_budget(self) -> str:
        return ""

    @hookimpl
    def refine_mask(self, mask: torch.Tensor) -> torch.Tensor:
        return mask


@dataclass(frozen=True, eq=False)
class Weighs:
    """A row step of a former version."""

    @hookimpl(optionalhook=True)
    def propose_row_importance(self, base: Any) -> Any:
        yield from ()
        return neuroal.Proposal(base)


@pytest.mark.parametrize(
    ("role", "plugin", "said"),
    [
        (
            "refiner",
            Says(),
            "hook needs_paper_budget is not called any more: return RefinerTraits(needs_paper_bu",
        ),
        (
            "row_ratios",
            Weighs(),
            "hook propose_row_importance is not called any more: name it propose_row_ratios, and",
        ),
    ],
)
def test_a_former_hook_is_refused_with_what_to_write(role: str, plugin: Any, said: str) -> None:
    with pytest.raises(PluginError) as error:
        load([(role, plugin)])
    assert said in str(error.value) and "\n" not in str(error.value)
