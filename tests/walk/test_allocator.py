"""What lies free between tensors in use goes back to the system, where glibc would keep it."""

import platform

import pytest
import torch

from neuroal.model.memory import resident_memory
from neuroal.walk import allocator
from neuroal.walk.allocator import give_back


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator alone keeps it")
def test_free_memory_between_tensors_in_use_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "SECONDS", 0.0)
    large = torch.ones(7_000_000)
    del large  # from now on the allocator keeps what is smaller than that
    tensors = [torch.full((300_000,), float(k)) for k in range(200)]
    kept = tensors[::2]
    del tensors
    freed, before = 100 * 300_000 * 4, resident_memory()
    give_back()
    assert before - resident_memory() > freed / 2
    assert [float(x.mean()) for x in kept[:3]] == [0.0, 2.0, 4.0]
