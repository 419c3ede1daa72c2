"""Flags and numbers are read together, and the first flag that does not hold is the error."""

from functools import partial

import pytest
import torch

from neuroal.errors import NeuroalError
from neuroal.testing import simulated_device
from neuroal.walk.unchecked import Unchecked


def test_numbers_come_back_to_the_bit() -> None:
    third = torch.tensor(1 / 3, dtype=torch.float64)
    single = torch.tensor(0.1)
    unchecked = Unchecked()
    unchecked.add(torch.tensor(True), partial(NeuroalError, "holds"))
    assert unchecked.look(third, single) == [1 / 3, float(single)]
    assert unchecked.look() == []


def test_the_first_flag_that_does_not_hold_is_the_error() -> None:
    unchecked = Unchecked()
    for holds, said in ((True, "first"), (False, "second"), (False, "third")):
        unchecked.add(torch.tensor(holds), partial(NeuroalError, said))
    with pytest.raises(NeuroalError, match=r"^second$"):
        unchecked.look(torch.tensor(1.0))
    assert unchecked.look() == []  # it is said once


@pytest.mark.skipif(not simulated_device.available(), reason="this torch cannot simulate a device")
def test_a_device_is_waited_for_once() -> None:
    simulated_device.register()
    x = torch.arange(4.0).to(simulated_device.NAME)
    unchecked = Unchecked()
    for value in x:
        unchecked.add(value >= 0, partial(NeuroalError, "negative"))
    with simulated_device.traffic() as seen:
        assert unchecked.look(x.sum(), x.double().mean()) == [6.0, 1.5]
    assert len(seen.waits) == 1
