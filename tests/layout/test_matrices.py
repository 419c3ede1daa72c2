"""Where matrices lie, and when they multiply: every form against the plain product."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neuroal.layout.matrices import Place, Products, overlay, view, weight, write
from neuroal.testing import linear

ROWS, COLUMNS, TOKENS = 3, 5, 7


@dataclass(frozen=True)
class Slice:
    name: str
    out_features: int
    in_features: int
    place: Place


class Holder(nn.Module):
    def __init__(self, parameter: Tensor) -> None:
        super().__init__()
        self.stack = nn.Parameter(parameter)


def seen_by(parameter: Tensor, run: Any) -> list[tuple[Slice, Tensor]]:
    """Every product reported, as a matrix and its input."""
    found = []

    def seen(place: Place, shape: tuple[int, int], x: Tensor) -> None:
        found.append((Slice("", *shape, place), x))

    with torch.no_grad(), Products({"p": parameter}, seen):
        run()
    return found


def x(*lead: int) -> Tensor:
    return torch.randn((*lead, TOKENS, COLUMNS), generator=torch.Generator().manual_seed(1))


W = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(2))
FORMS: dict[str, tuple[Tensor, Any]] = {
    "linear": (W, lambda p: nn.functional.linear(x(2), p)),
    "linear by keyword": (W, lambda p: nn.functional.linear(input=x(2), weight=p)),
    "matmul of the transpose": (W, lambda p: x() @ p.T),
    "mm": (W, lambda p: torch.mm(x(), p.t())),
    "addmm": (W.T.contiguous(), lambda p: torch.addmm(torch.zeros(ROWS), x(), p)),
    "left": (W, lambda p: p @ x().T),
    "view": (W.reshape(-1), lambda p: x() @ p.view(ROWS, COLUMNS).T),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_product_is_seen(form: str) -> None:
    parameter, run = FORMS[form]
    [(matrix, given)] = seen_by(parameter, lambda: run(parameter))
    assert view(matrix, parameter).equal(W)
    assert given.reshape(-1, TOKENS, COLUMNS)[0].equal(x(2)[0] if "linear" in form else x())


def test_slices_of_a_stack() -> None:
    stack = torch.randn(4, ROWS, COLUMNS)
    one = seen_by(stack, lambda: x() @ stack[2].T)
    assert [view(m, stack).equal(stack[2]) for m, _ in one] == [True]
    batched = seen_by(stack, lambda: torch.bmm(x(4), stack.mT))
    assert len(batched) == 4
    for e, (matrix, given) in enumerate(batched):
        assert view(matrix, stack).equal(stack[e])
        assert given.reshape(TOKENS, COLUMNS).equal(x(4)[e])


def test_tokens_sorted_by_expert() -> None:
    stack = torch.randn(3, 8, 16)
    tokens, ends = torch.randn(10, 16), torch.tensor([4, 4, 10], dtype=torch.int32)
    found = seen_by(stack, lambda: nn.functional.grouped_mm(tokens, stack.mT, offs=ends))
    assert [len(given) for _, given in found] == [4, 0, 6]
    assert found[2][1].equal(tokens[4:])
    assert all(view(m, stack).equal(stack[e]) for e, (m, _) in enumerate(found))


def test_what_is_no_product_of_a_watched_parameter_is_not_seen() -> None:
    other = torch.randn(ROWS, COLUMNS)
    assert not seen_by(W, lambda: (x() @ other.T, W + 1, W.sum(), torch.outer(W[0], W[0])))
    assert not seen_by(W, lambda: W @ W.T)  # no input takes part


def test_meta_tensors_have_places_too() -> None:
    stack = torch.empty(4, ROWS, COLUMNS, device="meta")
    found = seen_by(stack, lambda: torch.empty(TOKENS, COLUMNS, device="meta") @ stack[3].T)
    assert [m.place for m, _ in found] == [Place("p", 3 * ROWS * COLUMNS, (COLUMNS, 1))]


def test_slices_overlay_and_write_one_parameter() -> None:
    """Two slices, one of them transposed on disk, against index arithmetic by hand."""
    module = Holder(torch.zeros(2, COLUMNS, ROWS))
    matrices = {
        f"b.stack.{e}": Slice(
            f"b.stack.{e}", ROWS, COLUMNS, Place("b.stack", e * ROWS * COLUMNS, (1, ROWS))
        )
        for e in range(2)
    }
    new = {name: torch.randn(ROWS, COLUMNS) for name in matrices}
    expected = torch.stack([w.T for w in new.values()])
    made = overlay(matrices, new, module, "b")
    assert list(made) == ["stack"] and made["stack"].equal(expected)
    assert not module.stack.any()
    write(matrices, new, module, "b")
    assert module.stack.equal(expected)
    assert all(weight(m, module, "b").equal(new[n]) for n, m in matrices.items())


def test_a_whole_weight_is_its_own_overlay() -> None:
    module = nn.Module()
    module.up = nn.Linear(COLUMNS, ROWS)
    up = linear(ROWS, COLUMNS, name="b.up")
    new = torch.randn(ROWS, COLUMNS)
    made = overlay({"b.up": up}, {"b.up": new}, module, "b")
    assert made["up.weight"] is new  # no copy
