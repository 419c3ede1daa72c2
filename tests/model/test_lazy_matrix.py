"""Matrices that stay in their files: read as the same numbers, and no more of them than needed."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from neuroal.errors import NeuroalError
from neuroal.model import blocks, lazy_matrix
from neuroal.model.files import ONE, Shards
from neuroal.model.lazy_matrix import LazyMatrix, parts, write

ROWS, COLUMNS = 23, 5
Stay = Callable[[Tensor], LazyMatrix]


@pytest.fixture
def stay(tmp_path: Path) -> Stay:
    """Writes a matrix into a file between others, and returns it as one that stays there."""

    def make(x: Tensor) -> LazyMatrix:
        others = {"a": torch.ones(3), "z": torch.ones(7, 7)}
        save_file({"matrix": x, **others}, tmp_path / ONE)
        return LazyMatrix(Shards(tmp_path).ranges["matrix"], x.shape, x.dtype)

    return make


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of every read."""
    seen: list[int] = []
    own = LazyMatrix._rows

    def rows(self: LazyMatrix, runs: list[tuple[int, int]]) -> Tensor:
        seen.append(sum(end - start for start, end in runs))
        return own(self, runs)

    monkeypatch.setattr(LazyMatrix, "_rows", rows)
    monkeypatch.setattr(lazy_matrix, "PART", 4 * COLUMNS * 4)  # 4 rows in float32
    return seen


def matrix(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("to", [torch.float32, torch.bfloat16])
def test_an_embedding_reads_the_rows_of_its_tokens(
    dtype: torch.dtype, to: torch.dtype, stay: Stay, read: list[int]
) -> None:
    x = matrix(dtype)
    module = nn.Embedding(ROWS, COLUMNS)
    module.weight = nn.Parameter(stay(x).to(to), requires_grad=False)
    ids = torch.tensor([[3, 4, 5, 22], [0, 3, 22, 3]])
    assert module(ids).equal(x.to(to)[ids])
    assert type(module(ids)) is Tensor
    assert read == [5, 5]  # each once: 0, 3, 4, 5 and 22


def test_a_product_reads_all_of_it_part_by_part(stay: Stay, read: list[int]) -> None:
    x, given = matrix(), torch.randn(2, 3, COLUMNS)
    module = nn.Linear(COLUMNS, ROWS)
    expected = F.linear(given, x, module.bias)
    module.weight = nn.Parameter(stay(x))
    with torch.no_grad():
        assert module(given).equal(expected)
    assert read == [4] * 5 + [3]


def test_it_looks_like_a_parameter_and_reads_nothing_for_it(stay: Stay, read: list[int]) -> None:
    module = nn.Embedding(ROWS, COLUMNS)
    module.weight = nn.Parameter(stay(matrix()).to(torch.bfloat16))
    weight = module.weight
    assert isinstance(weight, nn.Parameter) and not weight.is_meta
    assert (weight.shape, weight.dtype) == ((ROWS, COLUMNS), torch.bfloat16)
    assert (weight.numel(), weight.device.type) == (ROWS * COLUMNS, "cpu")
    for same in (module.state_dict()["weight"], weight[...], weight.detach()):
        assert isinstance(same, LazyMatrix) and same.source == weight.source
        assert same.dtype == torch.bfloat16
    assert read == []


def test_equal_is_told_part_by_part(stay: Stay, read: list[int], tmp_path: Path) -> None:
    x = matrix()
    one, other = stay(x), matrix()
    other[-1, -1] += 1
    save_file({"other": other, "half": x.half()}, tmp_path / "b.safetensors")
    places = Shards.header(tmp_path / "b.safetensors")
    assert torch.equal(one, stay(x)) and max(read) == 4
    assert not torch.equal(one, LazyMatrix(places["other"], x.shape, x.dtype))
    assert not torch.equal(one, LazyMatrix(places["half"], x.shape, torch.float16))
    assert max(read) == 4
    assert one.equal(x) and not one.equal(other)


@pytest.mark.parametrize(
    "function",
    [lambda x: x + 1, lambda x: x.sum(0), lambda x: x.mT @ x, torch.isfinite, lambda x: x[2:4]],
)
def test_whatever_else_is_done_with_it(function: Callable[[Tensor], Tensor], stay: Stay) -> None:
    x = matrix()
    made = function(stay(x))
    assert type(made) is Tensor and made.equal(function(x))


@pytest.mark.parametrize("row", [0, ROWS - 1])
def test_what_is_not_finite_is_found(row: int, stay: Stay, read: list[int]) -> None:
    module = nn.Linear(COLUMNS, ROWS, bias=False)
    x = matrix()
    module.weight = nn.Parameter(stay(x))
    blocks.check_finite(module, ())
    x[row, 2] = torch.nan
    module.weight = nn.Parameter(stay(x))
    with pytest.raises(NeuroalError, match="'weight' holds NaN or infinity"):
        blocks.check_finite(module, ())
    assert max(read) == 4


def test_a_file_is_what_safetensors_writes(stay: Stay, read: list[int], tmp_path: Path) -> None:
    """To the byte, whatever is in it, and whatever the matrix is cast to."""
    x = matrix()
    tensors = {
        **{"a": torch.arange(3), "b": torch.tensor(2.5), "ö": torch.tensor([True, False, True])},
        **{"c": torch.randn(3, 5).bfloat16(), "d": torch.empty(0, 4), "e": torch.randn(4, 3).mT},
    }
    save_file(
        {k: v.contiguous() for k, v in tensors.items()} | {"matrix": x.bfloat16()},
        tmp_path / "expected",
        metadata={"format": "pt"},
    )
    write(tmp_path / "made", {"matrix": stay(x).to(torch.bfloat16), **tensors})
    assert max(read) == 4
    assert (tmp_path / "made").read_bytes() == (tmp_path / "expected").read_bytes()


def test_a_file_that_was_cut_meanwhile(stay: Stay) -> None:
    made = stay(matrix())
    file = made.source.file
    file.write_bytes(file.read_bytes()[: made.source.start + 40])
    with pytest.raises(OSError, match="ends before its tensors do"):
        made.read()


def test_what_is_in_memory_is_one_part() -> None:
    x = matrix()
    assert [part is x for part in parts(x)] == [True]
