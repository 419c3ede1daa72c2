"""What is held on the disk comes back as it was, once, and leaves no file."""

import gc
import os
import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from neuroal import NeuroalError
from neuroal.layout import find
from neuroal.testing import STRUCTURES, tiny_model, windows
from neuroal.walk import CandidateState, Walker, activations
from neuroal.walk.activations import MakeStore, on_disk
from neuroal.walk.statistics import resolve


@pytest.fixture
def make_store(tmp_path: Path) -> Iterator[MakeStore]:
    with on_disk(tmp_path) as made:
        yield made


def size(folder_file: Any) -> int:
    """Bytes that a sequence's file has taken so far."""
    return os.fstat(folder_file._file._file.fileno()).st_size


class Named(NamedTuple):
    leaves: tuple[Any, ...]
    other: object


def assert_same(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, Tensor):
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
        assert a.equal(b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (tuple, list)):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_same(one, other)
    else:
        assert a is b or a == b


TENSORS = {
    "float": torch.randn(2, 3, 5),
    "bfloat16": torch.randn(2, 3).bfloat16(),
    "float16": torch.randn(4).half(),
    "bool": torch.rand(3, 4) > 0.5,
    "int": torch.arange(6).reshape(2, 3),
    "complex": torch.randn(3, 2, dtype=torch.complex64),
    "one number": torch.tensor(2.5),
    "nothing": torch.empty(0, 3),
    "transposed": torch.randn(3, 5).t(),
    "expanded": torch.randn(1, 1, 4, 4).expand(3, 1, 4, 4),
    "part": torch.randn(4, 96)[:, 65:90:2],
    "windows": torch.arange(10.0).unfold(0, 4, 1),
    "nan": torch.tensor([float("nan"), -0.0]).nan_to_num(nan=7.0),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_come_back_as_they_were(name: str, make_store: MakeStore) -> None:
    store, x = make_store(), TENSORS[name]
    store.append(x)
    back = store[0]
    assert_same(back, x)
    if x.numel():
        assert back is not x and back.data_ptr() != x.data_ptr()
        assert back.data_ptr() % 64 == x.data_ptr() % 64  # kernels may round by alignment


def test_an_expanded_tensor_takes_no_more_than_it_is_made_of(make_store: MakeStore) -> None:
    store = make_store()
    store.append(torch.randn(1, 1, 4, 4).expand(100, 1, 4, 4))
    assert size(store) == 4 * 16


def test_trees_come_back_as_they_were(make_store: MakeStore) -> None:
    x, flag = torch.randn(2, 3), object()
    tree = {
        (0, 0): x,
        (1, -1): {("cache", "keys"): torch.ones(2).bfloat16(), ("cache", 0): None},
        (2, 1): [Named((x, 3, flag), "kind"), torch.tensor([True, False])],
    }
    store = make_store()
    store.append({})
    store.append(tree)
    assert len(store) == 2 and store[0] == {}
    back = store[1]
    assert_same(back, tree)
    assert back[2, 1][0].leaves[0] is back[0, 0]  # one object where one was stored
    assert [len(item) for item in store] == [0, 3]


def test_what_is_passed_on_unchanged_is_written_once(make_store: MakeStore) -> None:
    store, x = make_store(), torch.randn(100)
    store.append({"x": x})
    for _ in range(3):
        after = make_store()
        after.append({"x": store[0]["x"]})
        store = after
    assert size(store) == 400 and store[0]["x"].equal(x)


def test_the_place_of_what_is_gone_is_used_again(make_store: MakeStore) -> None:
    """As many places as are held at once: two, for the one that is read and the one after it."""
    store = make_store()
    store.append(torch.zeros(100))
    for i in range(10):
        after = make_store()
        after.append(store[0] + i)
        store = after
        gc.collect()
    assert store[0].equal(torch.full((100,), 45.0))
    assert size(store) <= 3 * 400


def test_reads_are_copies(make_store: MakeStore) -> None:
    store = make_store()
    store.append(torch.zeros(3))
    store[0].fill_(1)
    assert store[0].equal(torch.zeros(3))


def test_parameters_and_other_kinds_of_tensors_stay_what_they_are(make_store: MakeStore) -> None:
    store = make_store()
    kept = (nn.Parameter(torch.ones(2)), torch.eye(2).to_sparse(), torch.randn(2) + 0j)
    store.append([*kept[:2], kept[2].conj()])
    assert store[0][0] is kept[0] and store[0][1] is kept[1]
    assert size(store) == 0


@pytest.mark.skipif(sys.platform == "win32", reason="a file has a name there until it is closed")
def test_the_file_has_no_name(tmp_path: Path) -> None:
    """So that nothing is left, whatever ends the process."""
    with on_disk(tmp_path) as make_store:
        store = make_store()
        store.append(torch.randn(1000))
        assert size(store) == 4000 and list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="closed"):
        _ = store[0]


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    said = "none' cannot hold activations: No such file"
    with pytest.raises(NeuroalError, match=said), on_disk(tmp_path / "none"):
        pass


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = open("/dev/full", "r+b", buffering=0)  # noqa: SIM115 (closed by `on_disk`)
    monkeypatch.setattr(activations.tempfile, "TemporaryFile", lambda **_: full)
    said = "^activations cannot be held on the disk: .*No space left"
    with pytest.raises(NeuroalError, match=said) as error, on_disk(tmp_path) as make_store:
        make_store().append(torch.ones(3))
    assert isinstance(error.value.__cause__, OSError) and full.closed


# -- a walk ----------------------------------------------------------------------------------


def walk(
    model: nn.Module, ids: Tensor, dtype: torch.dtype | None, make_store: MakeStore
) -> list[Tensor]:
    """Statistics of every block, pruned and compared to its dense run, and logits after all."""
    found = find(model)
    walker = Walker(model, found, batch=2, make_store=make_store)
    inputs = walker.inputs(ids, dtype=dtype)
    state, seen = CandidateState.start(inputs), []
    names = ["input_norm", "input_error", "gram"]
    for block in found.blocks:
        with walker.block(block) as module:
            cast = deepcopy(module).to(dtype or torch.float32)
            own = {
                x.name: cast.get_submodule(x.name.removeprefix(f"{block.name}."))
                for x in block.linears
            }
            halves = {name: linear.weight.detach() / 2 for name, linear in own.items()}
            given = (block, cast, inputs, state, resolve(names))
            dense = walker.run(*given, keep_inputs=True)
            after = walker.run(*given, weights=halves, dense=dense)
        assert after.state is not None
        state = after.state
        seen += [s[name] for s in after.statistics.values() for name in names]
    pairs = zip(inputs.batches, state.outputs, strict=True)
    return [*seen, *(walker.logits(ids, outputs) for ids, outputs in pairs)]


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_walk_gives_the_same_bits(
    structure: str, attention: str, dtype: torch.dtype | None, make_store: MakeStore
) -> None:
    """Hidden states, masks (of eager attention) and inputs that are compared, in 3 batches."""
    model: Any = tiny_model(structure)
    model.set_attn_implementation(attention)
    ids = windows(5)
    one, other = (walk(model, ids, dtype, way) for way in (list, make_store))
    assert len(one) == len(other) > 50
    assert all(a.equal(b) for a, b in zip(one, other, strict=True))
