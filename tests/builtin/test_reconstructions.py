"""refit against slow sums and by hand, and what block training keeps and ends with."""

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from neuroal import Block, Statistics, Target, UsageError
from neuroal.plugins import load
from neuroal.testing import collect, linear
from neuroal_plugins.pruner.wanda_refit import WandaRefit
from neuroal_plugins.reconstruction.block import BlockReconstruction
from neuroal_plugins.reconstruction.refit import Fit, Refit, better, solve

OUT, IN = 7, 5


def case(tokens: int = 40, noise: float = 0.3) -> tuple[Tensor, Tensor, Tensor, Statistics]:
    """A weight, a mask, inputs that differ a little from the dense model's, and statistics."""
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(OUT, IN, generator=rng)
    mask = torch.rand(OUT, IN, generator=rng) < 0.5
    mask[0], mask[1] = True, False
    dense = torch.randn(4, tokens, IN, generator=rng) @ torch.randn(IN, IN, generator=rng)
    pruned = dense + noise * torch.randn(4, tokens, IN, generator=rng)
    return weight, mask, pruned, collect(pruned, "gram", "cross_gram", "dense_gram", dense=dense)


def fit(plugin: Refit, weight: Tensor, mask: Tensor, statistics: Statistics) -> Tensor:
    values = weight.masked_fill(mask, 0)
    return plugin.reconstruct_linear(weight, mask, values, statistics, linear(OUT, IN))


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_refit_solves_the_normal_equations_of_every_row(share: float) -> None:
    """One row after the other, with the support's own matrix, in float64."""
    weight, mask, _, statistics = case()
    plugin = Refit(target=share, damping=0.05, steps=40, rescale=1.0)
    new = fit(plugin, weight, mask, statistics)
    gram, cross = statistics.gram.double(), statistics.cross_gram.double()
    damp = 0.05 * gram.diagonal().mean()
    for row in range(OUT):
        kept = (~mask[row]).nonzero().flatten().tolist()
        wanted = weight[row].double() @ (gram + share * (cross - gram)) + damp * weight[row]
        matrix = gram[kept][:, kept] + damp * torch.eye(len(kept), dtype=torch.float64)
        expected = torch.zeros(IN, dtype=torch.float64)
        expected[kept] = torch.linalg.solve(matrix, wanted[kept])
        torch.testing.assert_close(new[row].double(), expected, rtol=1e-4, atol=1e-5)


def test_refit_by_hand() -> None:
    """One token (1, 2) in one window, H = 2 x x'; the second of w = (1, 1) is pruned.

    v 2 - 2 v (w H)_1: (w H)_1 = 2 (1 + 2) = 6, and H_11 = 2. With d = 1 times the mean diagonal,
    which is (2 + 8) / 2 = 5, v = (6 + 5) / (2 + 5) = 11 / 7.
    """
    x = torch.tensor([[[1.0, 2.0]]])
    weight, mask = torch.tensor([[1.0, 1.0]]), torch.tensor([[False, True]])
    plugin = Refit(target=0.0, damping=1.0, rescale=1.0)
    values = torch.tensor([[1.0, 0.0]])
    new = plugin.reconstruct_linear(weight, mask, values, collect(x, "gram"), linear(1, 2))
    assert new.tolist() == [[pytest.approx(11 / 7), 0]]


def test_rows_get_back_the_size_of_their_dense_output() -> None:
    """sqrt(w D w' / v H v'), within the bound; a row of which nothing survives stays 0."""
    weight, mask, _, statistics = case(noise=2.0)
    gram, dense = statistics.gram, statistics["dense_gram"]
    plain = fit(Refit(target=1.0, damping=0.05, rescale=1.0), weight, mask, statistics)
    new = fit(Refit(target=1.0, damping=0.05, rescale=1.25), weight, mask, statistics)
    wanted = weight @ statistics.cross_gram
    changed = 0
    for row in range(1, OUT):
        size = math.sqrt(
            float(weight[row] @ dense @ weight[row]) / float(plain[row] @ gram @ plain[row])
        )
        scaled = plain[row] * min(max(size, 1 / 1.25), 1.25)
        error = [float(v @ gram @ v - 2 * wanted[row] @ v)
                 for v in (scaled, weight[row] * ~mask[row])]  # fmt: skip
        expected = scaled if error[0] <= error[1] else plain[row]
        changed += error[0] <= error[1]
        torch.testing.assert_close(new[row], expected)
    assert changed and not new[0].any()


@pytest.mark.parametrize("tokens", [1, 2, 40])
@pytest.mark.parametrize("plugin", [Refit(), Refit(steps=1), Refit(target=1.0, damping=1e-6)])
def test_no_row_is_worse_than_it_was(plugin: Refit, tokens: int) -> None:
    """On the statistics that it is fitted to, with fewer tokens than inputs too."""
    weight, mask, _, statistics = case(tokens)
    values = weight.masked_fill(mask, 0)
    new = fit(plugin, weight, mask, statistics)
    gram, share = statistics.gram.double(), plugin.target
    if share is None:
        share = min(1.0, statistics.tokens / IN / 28)
    wanted = weight.double() @ (gram + share * (statistics.cross_gram.double() - gram))
    for row in range(OUT):
        before, after = (
            float(v @ gram @ v - 2 * wanted[row] @ v)
            for v in (values[row].double(), new[row].double())
        )
        assert after <= before + 1e-4 * abs(before)


def test_permuting_rows_permutes_the_answer() -> None:
    weight, mask, _, statistics = case()
    order = torch.randperm(OUT, generator=torch.Generator().manual_seed(1))
    new = fit(Refit(), weight, mask, statistics)
    torch.testing.assert_close(fit(Refit(), weight[order], mask[order], statistics), new[order])


def test_few_tokens_draw_to_the_weight_and_many_half_way_to_the_dense_output() -> None:
    """4 tokens for 5 inputs: a = 4/5/28; from 14 tokens per input on, a = 1/2."""
    for tokens, share in ((1, 4 / IN / 28), (17, 4 * 17 / IN / 28), (18, 0.5), (70, 0.5)):
        weight, mask, _, statistics = case(tokens)
        damping = max(0.01, 0.5 / max(4 * tokens / IN, 0.5))
        own = fit(Refit(), weight, mask, statistics)
        assert torch.equal(own, fit(Refit(target=share, damping=damping), weight, mask, statistics))


def test_what_was_never_seen_stays() -> None:
    weight, mask, _, _ = case()
    statistics = collect(torch.zeros(2, 3, IN), "gram", "cross_gram", "dense_gram",
                         dense=torch.zeros(2, 3, IN))  # fmt: skip
    assert torch.equal(fit(Refit(), weight, mask, statistics), weight.masked_fill(mask, 0))


def test_energies_of_a_solution_are_those_of_its_values() -> None:
    weight, mask, _, statistics = case()
    wanted = weight @ statistics.cross_gram
    for fit in solve(statistics.gram, wanted, weight, weight, mask, 0.05, 4):
        energy = ((fit.values @ statistics.gram) * fit.values).sum(1, keepdim=True)
        torch.testing.assert_close(fit.energy, energy, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(fit.along, (fit.values * wanted).sum(1, keepdim=True))


def test_solve_keeps_what_is_solved() -> None:
    """A start that solves the equations is left alone."""
    gram = torch.eye(3) * 2
    start = torch.tensor([[1.0, 0.0, 3.0]])
    mask = start == 0
    wanted = start * 2
    for fit in solve(gram, wanted, start, start, mask, 0.125, 5):
        assert torch.equal(fit.values, start)
        torch.testing.assert_close(fit.energy, torch.tensor([[20.0]]))  # v H v' = 2 (1 + 9)
        torch.testing.assert_close(fit.along, torch.tensor([[20.0]]))  # b v' = 2 + 18
    energies = torch.tensor([[20.0]]), torch.tensor([[42.0]])  # and v + 1: 2 (4 + 1 + 16)
    old = Fit(start, energies[0], torch.tensor([[20.0]]))  # b v' = 2 + 18
    new = Fit(start + 1, energies[1], torch.tensor([[28.0]]))  # 2 * 2 + 6 * 4
    assert better(new, old).values.equal(start)
    assert better(old, new).values.equal(start)
    assert old.times(torch.tensor([[2.0]])).error.item() == 0.0  # 4 * 20 - 2 * 2 * 20


@pytest.mark.parametrize(
    ("option", "value"),
    [("target", "1.5"), ("damping", "0"), ("steps", "0"), ("rescale", "0.5")],
)
def test_refit_refuses_options_that_make_no_sense(option: str, value: str) -> None:
    with pytest.raises(UsageError, match=f"'refit' refuses its options: {option} "):
        load([("reconstruction", "refit")], {"refit": {option: value}})


@pytest.mark.parametrize(
    ("option", "value"), [("passes", "0"), ("rate", "0"), ("held", "1"), ("tokens", "0")]
)
def test_block_refuses_options_that_make_no_sense(option: str, value: str) -> None:
    with pytest.raises(UsageError, match=f"'block' refuses its options: {option} "):
        load([("reconstruction", "block")], {"block": {option: value}})


class Batch:
    """A block that is one linear, and a target that another weight gives."""

    def __init__(self, seed: int, truth: Tensor, windows: int = 2) -> None:
        rng = torch.Generator().manual_seed(seed)
        mixed = torch.eye(IN) + 0.8  # inputs that go up and down together
        self.x = torch.randn(windows, 6, IN, generator=rng) @ mixed
        self.windows, self.target = windows, self.x @ truth.t()
        self.runs = 0

    def run(self, weights: Mapping[str, Tensor]) -> Tensor:
        self.runs += 1
        return self.x @ weights["w"].t()


def trained(plugin: BlockReconstruction, batches: list[Batch], start: Tensor) -> Tensor:
    mask = {"w": start == 0}
    rng = torch.Generator().manual_seed(0)
    block = Block(0, "block", (linear(OUT, IN, name="w"),))
    with torch.enable_grad():
        return plugin.reconstruct_block(block, {"w": start}, mask, batches, rng)["w"]


def distance(batches: list[Batch], weight: Tensor) -> float:
    return sum(float((b.run({"w": weight}) - b.target).square().mean()) for b in batches)


def test_training_comes_nearer_to_the_dense_output_and_keeps_zeros() -> None:
    truth, mask, _, _ = case()
    batches = [Batch(i, truth) for i in range(8)]
    start = truth.masked_fill(mask, 0)
    new = trained(BlockReconstruction(passes=40, rate=0.02), batches, start)
    assert not new[start == 0].any()
    assert distance(batches, new) < 0.9 * distance(batches, start)


def test_values_that_are_worse_on_what_is_held_back_are_not_taken() -> None:
    """The batch held back asks for the weight as it is; the others ask for its negative."""
    truth, _, _, _ = case()
    batches = [Batch(i, -truth) for i in range(3)] + [Batch(3, truth)]
    plugin = BlockReconstruction(passes=8, patience=2)
    assert torch.equal(trained(plugin, batches, truth), truth)
    assert [b.runs for b in batches] == [2, 2, 2, 3]  # two passes, and once before them


def test_passes_are_no_more_than_announced() -> None:
    truth, mask, _, _ = case()
    plugin = BlockReconstruction(passes=3)
    for count in (1, 2, 5):
        batches = [Batch(i, truth) for i in range(count)]
        trained(plugin, batches, truth.masked_fill(mask, 0))
        assert sum(b.runs for b in batches) <= plugin.describe().passes * count


def test_wanda_refit_is_wandas_mask_and_the_normal_equations() -> None:
    """On every row's support, (H + d I) v = H w + d w, d half the inputs per token."""
    torch.manual_seed(5)
    weight, x = torch.randn(6, 12), torch.randn(3, 16, 12) * torch.linspace(0.2, 2, 12)
    known = collect(x, "gram")
    target = Target(torch.full((6,), 7), 7 / 12, None, "row", "exact")
    found = WandaRefit(steps=60).prune_linear(weight, target, known, linear(6, 12))
    gram = 2 / 3 * torch.einsum("nti,ntj->ij", x, x).double()
    scores = weight.double().abs() * gram.diagonal().sqrt()
    damp = 0.5 * 12 / 48 * float(gram.diagonal().mean())
    for i in range(6):
        pruned = scores[i].argsort()[:7].tolist()
        assert sorted(pruned) == found.mask[i].nonzero().flatten().tolist()
        kept = [j for j in range(12) if j not in pruned]
        left = gram[kept][:, kept] + damp * torch.eye(5).double()
        right = (gram[kept] + damp * torch.eye(12).double()[kept]) @ weight[i].double()
        wanted = torch.linalg.solve(left, right)
        assert torch.allclose(found.weight[i, kept].double(), wanted, atol=1e-4)
        assert not found.weight[i, pruned].any()
