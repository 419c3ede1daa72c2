"""A device that is not the CPU, for machines that have none: it computes on the CPU.

Tensors of the device `simulated` say that they are there, work in every operation that the CPU
has, and are refused where those of an accelerator would be: beside a tensor of the CPU (but for one
number), with a generator of the CPU, or as a NumPy array. What makes the host wait for the device,
and what is copied to it, is counted while `traffic` watches:

    register()
    with traffic() as seen:
        neuroal.prune(folder, recipe)  # device="simulated"
    print(len(seen.waits), seen.table())

The device is torch's own for third parties (`PrivateUse1`), of which a process has one: it is
registered once, and stays.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils import _python_dispatch as dispatching
from torch.utils import _pytree as pytree
from torch.utils import backend_registration

NAME = "simulated"

# What an accelerator has to finish before the host can go on: the shape or value of the answer
# depends on the data, or the host looks whether it has succeeded.
_WAITING = {
    "_linalg_check_errors", "_linalg_eigh", "_linalg_svd", "_local_scalar_dense", "_unique2",
    "bincount", "equal", "linalg_lstsq", "masked_select", "nonzero", "unique_consecutive",
    "unique_dim",
}  # fmt: skip
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
_NO_NUMBERS = {"cat", "stack"}  # which take no number of the CPU among tensors of a device


@dataclass(frozen=True)
class Event:
    """Something between the host and the device.

    Attributes:
        what: The operation of torch, "to the CPU" or "to the device".
        shape: Of the tensor.
        place: The function that asked for it, the innermost one outside of torch: "room.file:name".
    """

    what: str
    shape: tuple[int, ...]
    place: str

    @property
    def matrix(self) -> bool:
        """Return whether it is about a matrix, or a stack of them, and not about a few numbers."""
        return len(self.shape) > 1


@dataclass(frozen=True)
class Traffic:
    """What went on between the host and the device.

    Attributes:
        waits: Where the host waited for the device: it read a number or a tensor, or asked what
            depends on one.
        copies: Tensors that were copied to the device, or to the CPU without waiting.
    """

    waits: list[Event] = field(default_factory=list)
    copies: list[Event] = field(default_factory=list)

    def table(self) -> str:
        """Return how often the host waited, and where, the most frequent first."""
        counts = Counter((e.place, e.what) for e in self.waits)
        return "\n".join(f"{n:6}  {place}  {what}" for (place, what), n in counts.most_common())


_HANDLERS = {"__torch_dispatch__", "__torch_function__"}  # of those who watch torch too

_WATCHING: list[Traffic] = []


@contextmanager
def traffic() -> Iterator[Traffic]:
    """Count what goes on between the host and the device while the context is open."""
    seen = Traffic()
    _WATCHING.append(seen)
    try:
        yield seen
    finally:
        _WATCHING.remove(seen)


def available() -> bool:
    """Return whether the installed torch can simulate a device, and no other has its place."""
    taken = torch._C._get_privateuse1_backend_name()
    return taken == NAME or (
        taken == "privateuseone"
        and hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
    )


def register() -> None:
    """Make the device known to torch in this process; a second call does nothing.

    Raises:
        RuntimeError: The installed torch cannot, or another device has its place.
    """
    if torch._C._get_privateuse1_backend_name() == NAME:
        return
    if not available():
        raise RuntimeError(f"torch {torch.__version__} cannot simulate a device")
    backend_registration._setup_privateuseone_for_python_backend(NAME)
    # Autograd has a thread for every device, but for one that comes after its first backward pass;
    # the thread that calls it does as well.
    torch.autograd.set_multithreading_enabled(False)
    # Operations without an operand, such as `torch.zeros`, come by a library, which has to stay;
    # and those of `torch.tensor`, which passes by what a subclass or a mode of torch's handles.
    everything, aten = (
        torch.library.Library(name, "IMPL")  # type: ignore[no-untyped-call]
        for name in ("_", "aten")
    )
    everything.fallback(_called, "PrivateUse1")  # type: ignore[no-untyped-call]
    for operation in (torch.ops.aten.empty_strided.default, torch.ops.aten.copy_.default):
        aten.impl(  # type: ignore[no-untyped-call]
            operation, partial(_called, operation), "PrivateUse1"
        )
    _LIBRARIES.extend((everything, aten))


def _called(operation: Any, *args: Any, **kwargs: Any) -> Any:
    return _run(operation, args, kwargs)


_LIBRARIES: list[torch.library.Library] = []


class SimulatedTensor(Tensor):
    """A tensor of the device; its numbers are those of `host`, on the CPU."""

    host: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, host: Tensor) -> SimulatedTensor:
        """Return a tensor of the device that has the memory of one of the CPU."""
        made: SimulatedTensor = Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=torch.device(NAME, 0),
        )
        made.host = host
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        """Tell torch that a module's weights are swapped, and not filled, when it is moved."""
        return ["host"], None

    @staticmethod
    def __tensor_unflatten__(
        inner: Mapping[str, Tensor], _: None, size: Any, stride: Any
    ) -> SimulatedTensor:
        return SimulatedTensor(inner["host"])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            copied: Tensor = self.detach().clone()
            if isinstance(self, nn.Parameter):
                copied = nn.Parameter(copied, self.requires_grad)
            memo[id(self)] = copied.requires_grad_(self.requires_grad)
        return memo[id(self)]

    @property
    def data(self) -> Tensor:
        """Return it without its history."""
        return self.detach()

    @data.setter
    def data(self, _: Tensor) -> NoReturn:
        raise RuntimeError("the simulated device has no `x.data = y`: make a new tensor")

    def data_ptr(self) -> int:
        """Return the address of its first number; that of a view lies within its base."""
        return self.host.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        """Return the memory that it shares with its views."""
        return self.host.untyped_storage()

    def tolist(self) -> Any:
        """Return its numbers as Python has them; waits for the device."""
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """Refuse, as torch does for every device but the CPU."""
        if force:
            return self.detach().cpu().numpy()
        raise TypeError(f"can't convert {self.device} device type tensor to numpy")

    def __array__(self, dtype: Any = None) -> NoReturn:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{self.cpu()!r}"[:-1] + f", device='{self.device}')"


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation of torch on the CPU, with what an accelerator would refuse refused."""
    name = func.overloadpacket.__name__
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    to = kwargs.get("device")
    to_cpu = to is not None and torch.device(to).type == "cpu"
    if name in ("copy_", "_to_copy"):
        _count_copy(name, args, kwargs, to_cpu)
    else:
        _check_devices(name, args, tensors)
        _check_generator(args, kwargs)
        waits = name in _WAITING or (name in _INDEXING and _selects(args[1]))
        if name == "repeat_interleave":
            waits = kwargs.get("output_size") is None
        if waits:
            _count("waits", name, args[0])
    inner = dict(kwargs) if to is None else kwargs | {"device": torch.device("cpu")}
    inner.pop("pin_memory", None)
    result = func(*pytree.tree_map(_host, args), **pytree.tree_map(_host, inner))
    if to_cpu or (name == "copy_" and not isinstance(args[0], SimulatedTensor)):
        return args[0] if name == "copy_" else result
    there = pytree.tree_map(lambda x: SimulatedTensor(x) if isinstance(x, Tensor) else x, result)
    if not any(isinstance(x, SimulatedTensor) for x in tensors):
        return there
    return dispatching.return_and_correct_aliasing(  # type: ignore[no-untyped-call]
        func, args, kwargs, there
    )


def _host(x: Any) -> Any:
    return x.host if isinstance(x, SimulatedTensor) else x


def _check_devices(name: str, args: tuple[Any, ...], tensors: list[Tensor]) -> None:
    """Refuse tensors of the CPU beside those of the device, but for numbers and for indices."""
    others = [x for x in tensors if not isinstance(x, SimulatedTensor)]
    if not others or len(others) == len(tensors):
        return
    indices = args[1] if name in _INDEXING and isinstance(args[0], SimulatedTensor) else ()
    for x in others:
        if any(x is index for index in indices):
            _count("copies", "to the device", x)
        elif x.dim() or name in _NO_NUMBERS or (name.endswith("_") and x is args[0]):
            devices = f"{torch.device(NAME, 0)} and cpu!"
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"{devices} (in aten::{name})"
            )


def _check_generator(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse a generator of the CPU, as every other device does."""
    if any(isinstance(x, torch.Generator) for x in (*args, *kwargs.values())):
        raise RuntimeError(f"Expected a '{NAME}' device type for generator but found 'cpu'")


def _selects(indices: Any) -> bool:
    """Return whether one of some indices is a mask, which has to be counted first."""
    return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in indices)


def _count_copy(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], to_cpu: bool) -> None:
    source = args[1] if name == "copy_" else args[0]
    from_device = isinstance(source, SimulatedTensor)
    if name == "copy_":
        to_cpu = not isinstance(args[0], SimulatedTensor)
    elif kwargs.get("device") is None:
        to_cpu = not from_device
    if from_device == (not to_cpu):  # it stays where it is
        return
    soon = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
    what = "to the CPU" if to_cpu else "to the device"
    _count("waits" if to_cpu and not soon else "copies", what, source)


def _count(kind: str, what: str, x: Tensor) -> None:
    if _WATCHING:
        event = Event(what, tuple(x.shape), _place())
        for seen in _WATCHING:
            getattr(seen, kind).append(event)


def _place() -> str:
    """Return the innermost function that is neither torch's nor this module's."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        module, name = frame.f_globals.get("__name__", ""), frame.f_code.co_name
        within = module == __name__ or module.split(".")[0] == "torch" or name in _HANDLERS
        if not within:
            break
        frame = frame.f_back
    module = frame.f_globals.get("__name__", "").removeprefix("neuroal.")
    return f"{module}:{frame.f_code.co_name}"
