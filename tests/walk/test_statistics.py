"""Running statistics against slow sums in float64, and the laws that a walk relies on."""

import copy
import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from neuroal import Accumulator, Statistics, UsageError
from neuroal.testing import collect, statistics
from neuroal.walk.statistics import BUILT_IN, NARROWEST, Collector, Gram, InputNorm, resolve

NAMES = sorted(BUILT_IN)
each_name = pytest.mark.parametrize("name", NAMES)


def inputs(samples: int = 5, tokens: int = 7, features: int = 6, seed: int = 0) -> Tensor:
    """Inputs whose scale differs by feature, with a feature that is always 0."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, tokens, features, generator=rng) * torch.logspace(-2, 1, features)
    x[..., -1] = 0
    return x + torch.linspace(-1, 0, features)


def slow(name: str, x: Tensor, pruned: Tensor) -> Tensor:
    """Each statistic by its definition, one number after the other, in float64."""
    values, others = x.double().tolist(), pruned.double().tolist()
    n, features = len(values), range(x.shape[2])

    def mean(j: int, term: str) -> float:
        sums = 0.0
        for window, other in zip(values, others, strict=True):
            for t, u in zip(window, other, strict=True):
                sums += {"sum": t[j], "square": t[j] ** 2, "error": (t[j] - u[j]) ** 2}[term]
        return sums / n

    if name == "input_norm":
        return torch.tensor([math.sqrt(mean(j, "square")) for j in features])
    if name == "input_sum":
        return torch.tensor([mean(j, "sum") for j in features])
    if name == "input_error":
        return torch.tensor([mean(j, "error") for j in features])
    if name == "input_var":
        variances = []
        for j in features:
            total = 0.0
            for window in values:
                column = [t[j] for t in window]
                centre = sum(column) / len(column)
                total += sum((v - centre) ** 2 for v in column)
            variances.append(total / sum(len(window) for window in values))
        return torch.tensor(variances)
    tokens = [token for window in values for token in window]
    right = [token for window in (others if name == "cross_gram" else values) for token in window]
    pairs = list(zip(tokens, right, strict=True))
    rows = [[sum(t[i] * u[j] for t, u in pairs) * 2 / n for j in features] for i in features]
    return torch.tensor(rows)


@each_name
@pytest.mark.parametrize(("samples", "tokens", "features"), [(5, 7, 6), (1, 1, 1), (2, 1, 3)])
def test_statistic_is_its_definition(name: str, samples: int, tokens: int, features: int) -> None:
    x = inputs(samples, tokens, features)
    pruned = x + inputs(samples, tokens, features, seed=1)
    compares = name in ("input_error", "cross_gram", "dense_gram")
    result = collect(pruned if compares else x, name, dense=x if compares else None)[name]
    expected = slow(name, x, pruned)
    assert result.dtype == torch.float32 and result.shape == expected.shape
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["gram", "dense_gram"])
def test_a_gram_matrix_of_several_stripes_is_its_definition(name: str) -> None:
    """Symmetric to the bit, and read twice: between two windows too."""
    x = inputs(3, 5, 2 * NARROWEST + 44)
    collector = Collector(resolve([name]), x.shape[2])
    for window in x:
        collector.update(window[None], window[None])
        result = collector.statistics()[name]
    tokens = x.double().flatten(0, 1)
    assert torch.equal(result, result.t())
    torch.testing.assert_close(result.double(), 2 / 3 * tokens.t() @ tokens, rtol=1e-5, atol=1e-4)


def test_by_hand() -> None:
    x = torch.tensor([[[3.0], [5.0]], [[1.0], [1.0]]])  # two windows of two tokens
    made = collect(x, "input_norm", "input_sum", "input_var", "gram")
    assert made.input_norm.tolist() == pytest.approx([math.sqrt((9 + 25 + 1 + 1) / 2)])
    assert made.input_sum.tolist() == [(8 + 2) / 2]
    assert made.input_var.tolist() == [(1 + 0) / 2]
    assert made.gram.tolist() == [[pytest.approx(9 + 25 + 1 + 1)]]
    assert (made.windows, made.tokens) == (2, 4)


def test_input_var_weighs_windows_by_their_tokens() -> None:
    collector = Collector(resolve(["input_var"]), 1)
    collector.update(torch.tensor([[[0.0], [2.0]]]))  # variance 1 of 2 tokens
    collector.update(torch.tensor([[[0.0], [4.0], [0.0], [4.0]]]))  # variance 4 of 4 tokens
    assert collector.statistics().input_var.tolist() == [pytest.approx((2 * 1 + 4 * 4) / 6)]


def test_input_error_of_the_same_inputs_is_zero() -> None:
    x = inputs()
    assert not collect(x, "input_error", dense=x.clone()).input_error.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@each_name
def test_every_dtype_is_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    x, dense = inputs().to(dtype), inputs(seed=1).to(dtype)
    result = collect(x, name, dense=dense)[name]
    assert result.dtype == torch.float32
    assert result.equal(collect(x.float(), name, dense=dense.float())[name])


@given(
    samples=st.integers(1, 6),
    tokens=st.integers(1, 40),
    features=st.integers(1, 40),
    batch=st.integers(1, 6),
)
def test_batching_changes_no_bit(samples: int, tokens: int, features: int, batch: int) -> None:
    x, dense = inputs(samples, tokens, features), inputs(samples, tokens, features, seed=1)

    def collected(size: int) -> Statistics:
        collector = Collector(resolve(NAMES), features)
        for start in range(0, samples, size):
            part = slice(start, start + size)
            collector.update(x[part], dense[part])
        return collector.statistics()

    one_by_one, batched = collected(1), collected(batch)
    for name in NAMES:
        assert batched[name].equal(one_by_one[name]), name
    assert (batched.windows, batched.tokens) == (samples, samples * tokens)


@given(st.integers(0, 5), st.sampled_from(NAMES))
def test_merge_is_one_pass_over_both(first: int, name: str) -> None:
    x, dense = inputs(), inputs(seed=1)
    accumulator = BUILT_IN[name]

    def state(part: slice) -> dict[str, Tensor]:
        made = accumulator.init(x.shape[2], x.device)
        if len(x[part]):
            given = (dense[part], x[part]) if accumulator.compares else (x[part], None)
            accumulator.update(made, *given)
        return made

    a, b = state(slice(0, first)), state(slice(first, None))
    before = copy.deepcopy((a, b))
    merged = accumulator.merge(a, b)
    whole = state(slice(None))
    assert merged.keys() == whole.keys()
    for key, value in whole.items():
        torch.testing.assert_close(merged[key], value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(accumulator.result(merged), accumulator.result(whole))
    assert all(old[k].equal(new[k]) for old, new in zip(before, (a, b), strict=True) for k in old)


@each_name
def test_merge_of_nothing(name: str) -> None:
    accumulator = BUILT_IN[name]
    merged = accumulator.merge(
        accumulator.init(3, torch.device("cpu")), accumulator.init(3, torch.device("cpu"))
    )
    assert not accumulator.result(merged).any()


@each_name
def test_inputs_are_not_changed(name: str) -> None:
    x, dense = inputs(), inputs(seed=1)
    collect(x, name, dense=dense)
    assert x.equal(inputs()) and dense.equal(inputs(seed=1))


# -- a stranger's ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Largest:
    """The largest magnitude of every input, times `scale`."""

    scale: float = 1.0
    name: ClassVar[str] = "largest"
    compares: ClassVar[bool] = False

    def init(self, in_features: int, device: torch.device) -> dict[str, Tensor]:
        return {"largest": torch.zeros(in_features, device=device)}

    def update(self, state: dict[str, Tensor], x: Tensor, pruned: Tensor | None) -> None:
        assert pruned is None and x.dtype == torch.float32 and x.dim() == 3
        state["largest"] = torch.maximum(state["largest"], x.abs().amax(dim=(0, 1)))

    def merge(self, a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"largest": torch.maximum(a["largest"], b["largest"])}

    def result(self, state: dict[str, Tensor]) -> Tensor:
        return state["largest"] * self.scale


@dataclass(frozen=True)
class LargestError:
    """The largest distance between the dense and the pruned input; says who was given as whom."""

    name: ClassVar[str] = "largest_error"
    compares: ClassVar[bool] = True

    def init(self, in_features: int, device: torch.device) -> dict[str, Tensor]:
        return {"first": torch.zeros(in_features), "second": torch.zeros(in_features)}

    def update(self, state: dict[str, Tensor], x: Tensor, pruned: Tensor | None) -> None:
        assert pruned is not None
        state["first"], state["second"] = x.amax(dim=(0, 1)), pruned.amax(dim=(0, 1))

    def merge(self, a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
        return a

    def result(self, state: dict[str, Tensor]) -> Tensor:
        return torch.stack((state["first"], state["second"]))


def test_a_strangers_accumulator_is_collected() -> None:
    x = inputs()
    made = collect(x, Largest(2.0), "input_norm")
    assert made.largest.equal(2 * x.abs().amax(dim=(0, 1)))
    assert set(made.tensors()) == {"largest", "input_norm"}


def test_what_compares_is_given_dense_first_and_pruned_second() -> None:
    made = collect(torch.ones(1, 2, 3), LargestError(), dense=torch.full((1, 2, 3), 5.0))
    assert made.largest_error.tolist() == [[5.0] * 3, [1.0] * 3]


def test_what_compares_needs_the_dense_inputs() -> None:
    with pytest.raises(ValueError, match="'input_error' compares dense with pruned"):
        collect(inputs(), "input_error")


def test_requirements_are_resolved_once_each_and_sorted() -> None:
    chosen = resolve(["input_norm", Largest(), "gram", InputNorm(), Largest()])
    assert chosen == (Gram(), InputNorm(), Largest())


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="unknown statistic 'input_norms': did you mean 'input_no"):
        resolve(["input_norms"])


def test_two_accumulators_of_one_name_are_refused() -> None:
    clashing: list[str | Accumulator] = [Largest(1.0), Largest(2.0)]
    with pytest.raises(UsageError, match="two different accumulators are called 'largest'"):
        resolve(clashing)


# -- reading ---------------------------------------------------------------------------------


def test_a_statistic_that_was_not_collected_is_named() -> None:
    made = statistics(input_norm=[1.0])
    message = r"'gram' was not collected: .*: input_norm\)"
    with pytest.raises(UsageError, match=message):
        made["gram"]
    with pytest.raises(UsageError, match=message):
        made.gram  # noqa: B018
    with pytest.raises(UsageError, match="collected: none"):
        Statistics({})["gram"]


def test_statistics_read_like_a_mapping() -> None:
    made = statistics({"input_norm": [3.0, 4.0]}, mine=torch.tensor([[1.0]]))
    assert "input_norm" in made and "gram" not in made
    assert made["mine"] is made.mine
    assert list(made.tensors()) == ["input_norm", "mine"]
    with pytest.raises(AttributeError):
        made._private  # noqa: B018  (what copy and pickle ask for)
    assert copy.deepcopy(made).input_norm.equal(made.input_norm)
