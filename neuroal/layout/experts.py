"""Experts: matrices, stacked in a parameter or in modules, that tokens choose from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from neuroal.layout.parts import Place
from neuroal.layout.trace import Event


@dataclass(frozen=True)
class TracedLinear:
    """A linear as the trace shows it, before its group and consumer are known.

    `event` is a product with its matrix, or with the same matrix of another expert; `expert` is its
    index among `experts`, if tokens are routed to it.
    """

    name: str
    place: Place
    event: Event
    experts: Experts | None = None
    expert: int | None = None


@dataclass(frozen=True, eq=False)
class Experts:
    """The experts of one block, or one stack of theirs.

    Attributes:
        container: Name of the module whose parameters are stacks, or of the list of experts.
        count: Number of experts.
        stacked: Whether the experts are slices of parameters.
    """

    container: str
    count: int
    stacked: bool

    def index(self, event: Event) -> int:
        """Return the expert whose matrix an event multiplied."""
        if self.stacked:
            return event.place.offset // (event.shape[0] * event.shape[1])
        return int(event.place.parameter.removeprefix(self.container + ".").split(".")[0])

    def of(self, event: Event, expert: int) -> TracedLinear:
        """Return the same matrix of another expert."""
        place = event.place
        if self.stacked:
            name = f"{place.parameter}.{expert}"
            place = replace(place, offset=expert * event.shape[0] * event.shape[1])
        else:
            rest = place.parameter.removeprefix(f"{self.container}.{self.index(event)}")
            place = replace(place, parameter=f"{self.container}.{expert}{rest}")
            name = place.parameter.removesuffix(".weight")
        return TracedLinear(name, place, event, self, expert)

    def witness(self, events: Sequence[Event]) -> list[Event]:
        """Return the products of one expert, one that ran all of its matrices."""
        by_expert: dict[int, list[Event]] = {}
        for event in events:
            by_expert.setdefault(self.index(event), []).append(event)
        return max(by_expert.values(), key=len)  # the first on ties


def find_experts(
    block: str, module: nn.Module, own: Mapping[str, nn.Parameter], events: Sequence[Event]
) -> dict[str, Experts]:
    """Return the experts of a block by the names of their parameters.

    Stacks are parameters of which single slices multiply. A list of modules is one of experts if
    its entries are alike and another parameter of its parent, the router, has as many outputs.
    """
    by_name: dict[str, Experts] = {}
    stacks: dict[str, Experts] = {}
    by_parameter: dict[str, list[Event]] = {}
    for event in events:
        by_parameter.setdefault(event.place.parameter, []).append(event)
    for name, slices in by_parameter.items():
        size = slices[0].shape[0] * slices[0].shape[1]
        count, rest = divmod(own[name].numel(), size)
        if count > 1 and not rest and all(_is_slice(e, size) for e in slices):
            container = name.rpartition(".")[0]
            key = f"{container} {count}"
            by_name[name] = stacks.setdefault(key, Experts(container, count, stacked=True))
    for name, entries in module.named_modules():
        if isinstance(entries, nn.ModuleList) and len(entries) > 1:
            if _alike(entries) and _is_routed(module, name, len(entries)):
                experts = Experts(f"{block}.{name}", len(entries), stacked=False)
                for parameter in own:
                    if parameter.startswith(f"{experts.container}."):
                        by_name[parameter] = experts
    return by_name


def _is_slice(event: Event, size: int) -> bool:
    (rows, columns), (down, right) = event.shape, event.place.strides
    dense = (rows - 1) * down + (columns - 1) * right == size - 1
    return dense and rows * columns == size and event.place.offset % size == 0


def _alike(entries: nn.ModuleList) -> bool:
    shapes = [[(n, p.shape) for n, p in e.named_parameters()] for e in entries]
    return bool(shapes[0]) and all(s == shapes[0] for s in shapes)


def _is_routed(module: nn.Module, name: str, count: int) -> bool:
    parent = name.rpartition(".")[0]
    parameters = module.get_submodule(parent).named_parameters()
    own = f"{name}."
    names = ((f"{parent}.{n}" if parent else n, p) for n, p in parameters)
    return any(p.dim() == 2 and len(p) == count and not n.startswith(own) for n, p in names)


def router(experts: Experts, events: Sequence[Event]) -> str | None:
    """Return the parameter that chooses the experts: the last to run before with an output each."""
    parent = experts.container.rpartition(".")[0]
    chosen = None
    for event in events:
        name = event.place.parameter
        if name.startswith(f"{experts.container}."):
            break
        if name.startswith(f"{parent}.") and event.shape[0] == experts.count:
            chosen = name
    return chosen
