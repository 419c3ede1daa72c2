"""The simulated device refuses what an accelerator refuses, and counts what it would wait for."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neuroal.testing import simulated_device
from neuroal.testing.simulated_device import NAME, traffic

pytestmark = pytest.mark.skipif(
    not simulated_device.available(), reason="this torch cannot simulate a device"
)


@pytest.fixture(autouse=True)
def registered() -> None:
    simulated_device.register()


@pytest.fixture
def x() -> Tensor:
    return torch.arange(12.0).reshape(3, 4).to(NAME)


MADE: dict[str, Callable[[Tensor], Tensor]] = {
    "a list": lambda x: torch.tensor([1.0, 2.0], device=NAME),
    "zeros": lambda x: torch.zeros(3, device=NAME),
    "a sum": lambda x: x + 1,
    "with a number of the CPU": lambda x: x * torch.tensor(2.0),
    "a view": lambda x: x.t()[1:],
    "by indices of the CPU": lambda x: x[torch.tensor([0, 2])],
    "a random number": lambda x: torch.rand(3, device=NAME),
    "of its kind": lambda x: x.new_zeros(2),
    "a factor": lambda x: torch.linalg.cholesky(x.t() @ x + torch.eye(4, device=NAME)),
    "attention": lambda x: nn.functional.scaled_dot_product_attention(x[None], x[None], x[None])[0],
}


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_what_is_made_there_stays_there(x: Tensor, make: Callable[[Tensor], Tensor]) -> None:
    made = make(x)
    assert made.device == torch.device(NAME, 0)
    assert made.cpu().device.type == "cpu"


REFUSED: dict[str, Callable[[Tensor], object]] = {
    "a sum with the CPU's": lambda x: x + torch.ones(3, 4),
    "the CPU's with a number of it": lambda x: torch.ones(3) + x.sum(),
    "a product with the CPU's": lambda x: x @ torch.ones(4, 2),
    "a number of the CPU among others": lambda x: torch.stack([x.sum(), torch.tensor(1.0)]),
    "its indices into the CPU's": lambda x: torch.ones(3)[x[:, 0].long()],
    "written to the CPU's": lambda x: torch.zeros(()).add_(x.sum()),
    "a mask of the CPU": lambda x: x.masked_fill(torch.ones(3, 4, dtype=torch.bool), 0),
    "a generator of the CPU": lambda x: torch.randperm(
        3, generator=torch.Generator().manual_seed(0), device=NAME
    ),
}


@pytest.mark.parametrize("ask", REFUSED.values(), ids=REFUSED)
def test_what_an_accelerator_refuses(x: Tensor, ask: Callable[[Tensor], object]) -> None:
    with pytest.raises(RuntimeError, match=r"same device|device type for generator|device"):
        ask(x)


def test_numpy_is_for_the_cpu(x: Tensor) -> None:
    with pytest.raises(TypeError, match="can't convert simulated:0 device type tensor to numpy"):
        x.numpy()


WAITS: dict[str, Callable[[Tensor], object]] = {
    "a number": lambda x: float(x.sum()),
    "a truth": lambda x: bool(x.any()),
    "a list": lambda x: x.tolist(),
    "a text": lambda x: repr(x),
    "a copy": lambda x: x.cpu(),
    "equality": lambda x: x.equal(x),
    "where": lambda x: x.nonzero(),
    "by a mask": lambda x: x[x > 3],
    "eigenvalues": lambda x: torch.linalg.eigh(x.t() @ x),
}


@pytest.mark.parametrize("ask", WAITS.values(), ids=WAITS)
def test_waits_are_counted(x: Tensor, ask: Callable[[Tensor], object]) -> None:
    with traffic() as seen:
        ask(x)
    assert len(seen.waits) == 1
    assert __name__.removeprefix("neuroal.") in seen.waits[0].place
    assert seen.table().split()[:1] == ["1"]


def test_work_is_no_wait(x: Tensor) -> None:
    with traffic() as seen:
        y = (x @ x.t()).softmax(dim=1).sort(dim=1).values.where(x[:, :3] > 1, 0)
        y[0] = 1
        assert y.shape == (3, 3)
    assert not seen.waits
    assert not seen.copies


def test_copies_are_counted(x: Tensor) -> None:
    with traffic() as seen:
        torch.ones(5).to(NAME)
        x.to("cpu", non_blocking=True)
        x[torch.tensor([0, 2])]
        x.to(NAME)  # is there
    assert [(e.what, e.shape) for e in seen.copies] == [
        ("to the device", (5,)),
        ("to the CPU", (3, 4)),
        ("to the device", (2,)),
    ]
    assert [e.matrix for e in seen.copies] == [False, True, False]
    assert not seen.waits


def test_views_share_memory_and_say_so(x: Tensor) -> None:
    version = x._version
    row = x[1]
    row.zero_()
    assert x[1].tolist() == [0.0] * 4
    assert x._version == row._version == version + 1
    assert row.data_ptr() == x.data_ptr() + 16
    assert row.untyped_storage()._cdata == x.untyped_storage()._cdata


AFTERWARDS = """
import torch
from neuroal.testing import simulated_device

def slope(x):
    x = x.requires_grad_()
    x.square().sum().backward()
    return x.grad

slope(torch.ones(2))
simulated_device.register()
print(slope(torch.ones(2, device="simulated")).tolist())
"""


def test_autograd_may_have_run_before(run_process: Callable[..., Any]) -> None:
    done = run_process([sys.executable, "-c", AFTERWARDS])
    assert (done.stdout, done.returncode) == ("[2.0, 2.0]\n", 0), done.stderr


def test_modules_move_train_and_are_copied() -> None:
    here = nn.Linear(4, 3)
    there = copy.deepcopy(here).to(NAME)
    again = copy.deepcopy(there)
    data = torch.rand(5, 4)
    for module, given in ((here, data), (there, data.to(NAME))):
        module(given).square().sum().backward()
    assert there.weight.grad is not None
    assert here.weight.grad is not None
    assert torch.equal(there.weight.grad.cpu(), here.weight.grad)
    assert isinstance(again.weight, nn.Parameter)
    assert again.weight.requires_grad
    assert again.weight.grad is None
    assert there.to(torch.bfloat16).weight.device.type == NAME
    assert there.to("cpu").weight.device.type == "cpu"
