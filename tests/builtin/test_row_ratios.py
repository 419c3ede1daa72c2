"""Row ratios against a slow second formula, and every case in which a row keeps its base ratio."""

import math
from collections.abc import Callable, Generator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from neuroal import Block, Generation, Layout, Linear, Measurement, Proposal
from neuroal_plugins.row_ratios.neuroal import LAMBDAS, Neuroal
from neuroal_plugins.row_ratios.uniform import UniformRows

WIDTH, INNER = 6, 9


def layout(blocks: int = 3, grouped: bool = False) -> Layout:
    """Blocks of q, k, o, up and down; grouped heads: k has fewer rows, neither has a consumer."""
    result = []
    for b in range(blocks):
        following = f"{b + 1}.q" if b + 1 < blocks else None
        attention = None if grouped else f"{b}.o"
        result.append(
            Block(
                b,
                f"{b}",
                (
                    Linear(f"{b}.q", b, WIDTH, WIDTH, 0, attention),
                    Linear(f"{b}.k", b, 3 if grouped else WIDTH, WIDTH, 0, attention),
                    Linear(f"{b}.o", b, WIDTH, WIDTH, 1, f"{b}.up"),
                    Linear(f"{b}.up", b, INNER, WIDTH, 2, f"{b}.down"),
                    Linear(f"{b}.down", b, WIDTH, INNER, 3, following),
                ),
            )
        )
    return Layout(tuple(result))


def deviations(model: Layout, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(linear.in_features, generator=generator)
        for name, linear in model.linears.items()
    }


def propose(
    model: Layout, deviation: dict[str, Tensor], base: float = 0.7, plugin: Neuroal | None = None
) -> list[Proposal]:
    """The proposals of the one generation, after which the generator ends without a winner."""
    bases = dict.fromkeys(model.linears, base)
    steps = (plugin or Neuroal()).propose_row_ratios(model, bases, deviation)
    generation = next(steps)
    assert (generation.drop_early, generation.windows) == (True, None)
    with pytest.raises(StopIteration) as stop:
        steps.send([Measurement(0.0, False, 1)] * len(generation.proposals))
    assert stop.value.value is None
    return list(generation.proposals)


def slow(scores: list[float], lam: float, base: float) -> list[float]:
    low, high = min(scores), max(scores)
    term = [2 * lam * (x - low) / (high - low) for x in scores]
    mean = math.fsum(term) / len(term)
    return [min(max(1 - (t - mean + 1 - base), 0.01), 0.99) for t in term]


def test_uniform_returns_the_base() -> None:
    steps: Generator[Generation, list[Measurement], Any] = UniformRows().propose_row_ratios(
        {"a": 0.5}
    )
    with pytest.raises(StopIteration) as stop:
        next(steps)
    assert stop.value.value == Proposal({"a": 0.5})


def test_neuroal_proposes_the_papers_grid() -> None:
    model = layout()
    proposals = propose(model, deviations(model))
    lams = [p.parameters["lam"] for p in proposals]
    assert lams == [round(0.01 * i, 2) for i in range(11)] + [0.12, 0.15, 0.2, 0.25]
    for proposal in proposals:
        for name, linear in model.linears.items():
            assert proposal.ratios[name].shape == (linear.out_features,)
            assert proposal.ratios[name].dtype == torch.float64


def test_neuroal_is_its_definition() -> None:
    model = layout()
    deviation = deviations(model)
    consumers = {"q": "o", "k": "o", "o": "up", "up": "down"}
    for proposal in propose(model, deviation):
        for b in (0, 1):
            pairs = [(f"{b}.{n}", f"{b}.{c}") for n, c in consumers.items()]
            for name, consumer in [*pairs, (f"{b}.down", f"{b + 1}.q")]:
                scores = deviation[consumer].tolist()
                expected = slow(scores, proposal.parameters["lam"], 0.7)
                assert proposal.ratios[name].tolist() == pytest.approx(expected, abs=1e-12)


def test_neuroal_by_hand() -> None:
    # The output projection's rows feed `up`, whose input lost 0, 1, 2, 3, 4 and 2.
    model = layout(2)
    deviation = deviations(model) | {"0.up": torch.tensor([0.0, 1, 2, 3, 4, 2])}
    (proposal,) = propose(model, deviation, 0.5, Neuroal(lambdas=(0.1,)))
    expected = [0.6, 0.55, 0.5, 0.45, 0.4, 0.5]  # the more was lost, the denser
    assert proposal.ratios["0.o"].tolist() == pytest.approx(expected)


def test_neuroal_clips_rows() -> None:
    model = layout(2)
    spread = propose(model, deviations(model), 0.9, Neuroal(lambdas=(0.25,)))[0].ratios["0.o"]
    assert float(spread.max()) == 0.99
    dense = propose(model, deviations(model), 0.1, Neuroal(lambdas=(0.25,)))[0].ratios["0.o"]
    assert float(dense.min()) == 0.01


@given(
    seed=st.integers(0, 1000),
    lam=st.floats(0, 0.25),
    base=st.floats(0.3, 0.7),
    rows=st.integers(2, 9),
)
def test_rows_keep_the_mean(seed: int, lam: float, base: float, rows: int) -> None:
    first = Linear("a", 0, rows, 4, 0, "b")
    model = Layout((Block(0, "0", (first,)), Block(1, "1", (Linear("b", 1, 2, rows, 0, None),))))
    (proposal,) = propose(model, deviations(model, seed), base, Neuroal(lambdas=(lam,)))
    if float(proposal.ratios["a"].min()) > 0.01 and float(proposal.ratios["a"].max()) < 0.99:
        assert float(proposal.ratios["a"].mean()) == pytest.approx(base, abs=1e-12)


def fallbacks(model: Layout, deviation: dict[str, Tensor]) -> set[str]:
    """The linears of which every row has exactly the base ratio, under every λ."""
    proposals = propose(model, deviation, plugin=Neuroal(lambdas=(0.0, 0.1, 0.25)))
    kept = set(model.linears)
    for proposal in proposals[1:]:
        for name, ratios in proposal.ratios.items():
            if ratios.tolist() != [0.7] * model.linears[name].out_features:
                kept.discard(name)
    return kept


LAST = {"2.q", "2.k", "2.o", "2.up", "2.down"}


def test_last_block_keeps_the_base() -> None:
    model = layout()
    assert fallbacks(model, deviations(model)) == LAST


def test_one_block_keeps_the_base() -> None:
    model = layout(1)
    assert fallbacks(model, deviations(model)) == set(model.linears)


def test_grouped_heads_keep_the_base() -> None:
    model = layout(grouped=True)
    assert fallbacks(model, deviations(model)) == LAST | {"0.q", "0.k", "1.q", "1.k"}


def test_rows_that_are_not_the_consumers_inputs_keep_the_base() -> None:
    odd = Linear("a", 0, 3, 4, 0, "b")
    model = Layout((Block(0, "0", (odd,)), Block(1, "1", (Linear("b", 1, 2, 5, 0, None),))))
    assert fallbacks(model, deviations(model)) == {"a", "b"}


def test_the_same_input_keeps_the_base() -> None:
    # q and k see the same in both runs, so the last linear before them has no score.
    model = layout()
    deviation = deviations(model) | {"1.q": torch.zeros(WIDTH), "2.q": torch.zeros(WIDTH)}
    assert fallbacks(model, deviation) == LAST | {"0.down", "1.down"}


def test_a_sum_of_zero_keeps_the_base() -> None:
    model = layout()
    deviation = deviations(model) | {"0.o": torch.tensor([1.0, -1, 2, -2, 3, -3])}
    assert fallbacks(model, deviation) == LAST | {"0.q", "0.k"}


def test_equal_scores_keep_the_base() -> None:
    model = layout()
    deviation = deviations(model) | {"0.up": torch.full((WIDTH,), 0.3)}
    assert fallbacks(model, deviation) == LAST | {"0.o"}


def test_one_row_keeps_the_base() -> None:
    model = Layout(
        (
            Block(0, "0", (Linear("a", 0, 1, 4, 0, "b"),)),
            Block(1, "1", (Linear("b", 1, 2, 1, 0, None),)),
        )
    )
    assert fallbacks(model, deviations(model)) == {"a", "b"}


@pytest.mark.parametrize("lambdas", [(), (0.1, 1.0), (-0.1,)])
def test_lambdas_out_of_range(lambdas: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="lam"):
        Neuroal(lambdas=lambdas)


def test_the_last_block_is_scored_where_asked() -> None:
    model = layout()
    deviation = deviations(model)
    plugin = Neuroal(lambdas=(0.1,), last_block=True)
    [proposal], [without] = (propose(model, deviation, plugin=p) for p in (plugin, Neuroal((0.1,))))
    found = torch.as_tensor(proposal.ratios["2.up"])
    assert found.tolist() == pytest.approx(slow(deviation["2.down"].tolist(), 0.1, 0.7))
    for name in model.linears:  # what has no consumer keeps the base, and all else is as without
        if name not in ("2.q", "2.k", "2.o", "2.up"):
            assert torch.equal(*(torch.as_tensor(p.ratios[name]) for p in (proposal, without)))
    assert torch.as_tensor(proposal.ratios["2.down"]).unique().tolist() == [0.7]


def test_statistics() -> None:
    assert Neuroal().required_statistics() == {"input_norm"}
    assert not hasattr(UniformRows(), "required_statistics")
    assert len(LAMBDAS) == 15


def test_grouped_heads_score_by_the_mean_over_the_heads_that_share(
    with_heads: Callable[[bool], Layout],
) -> None:
    deviation = deviations(with_heads(False))
    at = deviation["0.o"].tolist()
    shared = [(at[4 * g + i] + at[4 * g + 2 + i]) / 2 for g in range(2) for i in range(2)]
    plugin = Neuroal(lambdas=(0.1,), grouped_heads=True)
    [proposal] = propose(with_heads(False), deviation, plugin=plugin)
    expected = {"0.q": at, "0.k": shared, "0.v": shared}
    for name, scores in expected.items():
        assert torch.as_tensor(proposal.ratios[name]).tolist() == pytest.approx(
            slow(scores, 0.1, 0.7)
        )


def test_grouped_heads_of_a_fused_linear(with_heads: Callable[[bool], Layout]) -> None:
    model = with_heads(True)
    deviation = deviations(model)
    at = deviation["0.o"].tolist()
    shared = [(at[4 * g + i] + at[4 * g + 2 + i]) / 2 for g in range(2) for i in range(2)]
    [proposal] = propose(model, deviation, plugin=Neuroal(lambdas=(0.1,), grouped_heads=True))
    ratios = torch.as_tensor(proposal.ratios["0.qkv"]).tolist()
    assert ratios == pytest.approx(slow([*at, *shared, *shared], 0.1, 0.7))


@pytest.mark.parametrize("fused", [False, True])
def test_grouped_heads_keep_the_base_ratio_unless_asked(
    fused: bool, with_heads: Callable[[bool], Layout]
) -> None:
    model = with_heads(fused)
    [proposal] = propose(model, deviations(model), plugin=Neuroal(lambdas=(0.1,)))
    for x in model.blocks[0].linears[:-1]:
        assert torch.as_tensor(proposal.ratios[x.name]).tolist() == [0.7] * x.out_features
