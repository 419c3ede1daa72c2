"""From a trace to a layout: names, groups, experts, consumers, and what stays dense."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from neuroal.errors import NeuroalError
from neuroal.layout.experts import Experts, TracedLinear, find_experts, router
from neuroal.layout.flows import Flows
from neuroal.layout.parts import Block, Layout, Linear, SkippedWeight
from neuroal.layout.trace import Event, trace


def find(model: nn.Module) -> Layout:
    """Return the layout of a causal language model, on any device, meta included.

    The model runs once on a few tokens.

    Raises:
        NeuroalError: The structure is unknown; the message says what was looked for.
    """
    _refuse_offloaded(model)
    modules = _candidates(model)
    for name, module in modules.items():
        _refuse_quantised(name, module)
    traced = trace(model, modules)
    first = {id(p): name for name, p in model.named_parameters()}
    taken = _Taken()
    linears: list[list[list[TracedLinear]]] = []
    skipped: list[SkippedWeight] = []
    blocks: list[str] = []
    for block in dict.fromkeys(traced.runs):
        # A shared parameter has a name in every block that holds it.
        own = {f"{block}.{n}": p for n, p in modules[block].named_parameters()}
        names = {first[id(p)]: name for name, p in own.items()}
        events = [e for e in traced.events if e.block == block and e.place.parameter in names]
        earlier = {names[n] for n in names if n in taken}
        fresh = [e for e in events if taken.take(e)]
        for event in fresh:
            event.place = replace(event.place, parameter=names[event.place.parameter])
        experts = find_experts(block, modules[block], own, fresh)
        dense = _dense(block, fresh, experts, own)
        groups = list(_groups([e for e in fresh if e.place.parameter not in dense], experts, own))
        if groups:
            skipped += _skipped(len(blocks), modules[block], own, groups, dense, earlier)
            blocks.append(block)
            linears.append(groups)
    if not blocks:
        raise NeuroalError(f"{type(model).__name__} runs no weight matrix inside its blocks")
    return _layout(blocks, linears, skipped, Flows(traced, linears))


def _candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Return what may be blocks: entries with weight matrices of the outermost module lists.

    Raises:
        NeuroalError: There is no such list.
    """
    candidates: dict[str, nn.Module] = {}
    lists: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(outer + ".") for outer in lists)
        if isinstance(module, nn.ModuleList) and not inside:
            # The matrix of an entry that is a linear itself is its own, not one of a block.
            entries = {f"{name}.{i}": e for i, e in enumerate(module) if _holds_matrices(e)}
            if entries:
                lists.append(name)
                candidates |= entries
    if not candidates:
        raise NeuroalError(
            f"{type(model).__name__} has no list of decoder blocks: looked for an nn.ModuleList "
            "whose entries hold weight matrices"
        )
    return candidates


def _holds_matrices(entry: nn.Module) -> bool:
    return any(p.dim() >= 2 and "." in name for name, p in entry.named_parameters())


def _refuse_offloaded(model: nn.Module) -> None:
    """Refuse a model with a part of its weights not in memory; without any it is a skeleton."""
    away = [name for name, p in model.named_parameters() if p.is_meta]
    if away and any(not p.is_meta for p in model.parameters()):
        raise NeuroalError(
            f"{away[0]} is not in memory (offloaded): load the whole model, or prune its folder "
            "with --stream"
        )


def _refuse_quantised(block: str, module: nn.Module) -> None:
    """Refuse weights that are not ordinary floating tensors."""
    for name, parameter in module.named_parameters():
        if not parameter.is_floating_point() or parameter.element_size() < 2:
            raise NeuroalError(
                f"{block}.{name} is quantised ({parameter.dtype}): prune the original model"
            )
        if type(parameter.data) is not torch.Tensor:
            raise NeuroalError(
                f"{block}.{name} is no ordinary tensor ({type(parameter.data).__name__}): "
                "prune the model before it is quantised or sharded"
            )
    for name, buffer in module.named_buffers():
        packed = buffer.dtype in (torch.uint8, torch.int8, torch.int32) and buffer.dim() == 2
        if packed and "weight" in name:
            raise NeuroalError(
                f"{block}.{name} is quantised ({buffer.dtype}): prune the original model"
            )


class _Taken:
    """The matrices that multiplied so far, by parameter."""

    def __init__(self) -> None:
        self._known: dict[str, dict[tuple[Any, ...], dict[int, int]]] = {}

    def __contains__(self, parameter: str) -> bool:
        return parameter in self._known

    def take(self, event: Event) -> bool:
        """Take a product's matrix; False if it, or part of it, multiplied before."""
        place, (rows, columns) = event.place, event.shape
        form = (event.shape, place.strides)
        start = place.offset
        end = start + (rows - 1) * place.strides[0] + (columns - 1) * place.strides[1]
        forms = self._known.setdefault(place.parameter, {})
        # Slices of one stack may interleave; another form reads the same weights in another way.
        others = [ends for other, ends in forms.items() if other != form]
        if start in forms.get(form, {}) or any(
            first <= end and start <= last for ends in others for first, last in ends.items()
        ):
            return False
        forms.setdefault(form, {})[start] = end
        return True


def _dense(
    block: str,
    events: Sequence[Event],
    experts: Mapping[str, Experts],
    own: Mapping[str, nn.Parameter],
) -> dict[str, str]:
    """Return the parameters that multiply but are left dense, with the reason."""
    dense: dict[str, str] = {}
    for group in {id(x): x for x in experts.values()}.values():
        name = router(group, events)
        if name is not None:
            dense[name] = "router: chooses the experts"
    for event in events:
        name = event.place.parameter
        if event.shape[0] == 1 and own[name].numel() == event.shape[1]:
            dense.setdefault(name, "gate: one output")
        if event.shape[1] == 1:
            dense.setdefault(name, "one input")
    return dense


def _groups(
    events: Sequence[Event], experts: Mapping[str, Experts], own: Mapping[str, nn.Parameter]
) -> Iterator[list[TracedLinear]]:
    """Yield the linears that see one input, in execution order; experts one after another.

    A parallel MLP sees the attention's input too, but runs after the attention's output
    projection; it is a group of its own, which is how the paper reads execution order.
    """
    mine = [experts.get(event.place.parameter) for event in events]
    for k, group in enumerate(mine):
        if k and mine[k - 1] is group:
            continue
        if group is None:
            stop = next((i for i in range(k, len(events)) if mine[i] is not None), len(events))
            for same in _same_input(events[k:stop]):
                yield [TracedLinear(_plain_name(e, own), e.place, e) for e in same]
        elif group not in mine[:k]:  # all at once, however often others run in between
            run = [event for event, other in zip(events, mine, strict=True) if other is group]
            stages = list(_same_input(group.witness(run)))
            for expert in range(group.count):
                for same in stages:
                    yield [group.of(e, expert) for e in same]


def _same_input(events: Sequence[Event]) -> Iterator[list[Event]]:
    group: list[Event] = []
    for event in events:
        if group and not event.same_input(group[0]):
            yield group
            group = []
        group.append(event)
    if group:
        yield group


def _plain_name(event: Event, own: Mapping[str, nn.Parameter]) -> str:
    name, (rows, columns) = event.place.parameter, event.shape
    if rows * columns == own[name].numel():
        return name.removesuffix(".weight")
    return f"{name}.{event.place.offset // (rows * columns)}"


def _skipped(
    index: int,
    module: nn.Module,
    own: Mapping[str, nn.Parameter],
    groups: Sequence[Sequence[TracedLinear]],
    dense: Mapping[str, str],
    earlier: set[str],
) -> Iterator[SkippedWeight]:
    """Yield the weights of a block that no linear of it, or of an earlier block, covers."""
    covered: dict[str, int] = {}
    for linear in (x for group in groups for x in group):
        rows, columns = linear.event.shape
        name = linear.place.parameter
        covered[name] = covered.get(name, 0) + rows * columns
    owners = {id(m.weight): m for m in module.modules() if hasattr(m, "weight")}
    for name, parameter in own.items():
        # What an earlier block uses too is counted there.
        if parameter.dim() < 2 or covered.get(name) == parameter.numel() or name in earlier:
            continue
        if name in covered:
            reason = f"{covered[name]:,} of its {parameter.numel():,} weights multiply"
        else:
            reason = dense.get(name) or _unused(owners.get(id(parameter)))
        yield SkippedWeight(name, index, tuple(parameter.shape), reason)


def _unused(owner: nn.Module | None) -> str:
    """Return why a weight that never multiplied stays dense."""
    if isinstance(owner, nn.Embedding):
        return "embedding: looked up, not multiplied"
    if owner is not None and "Conv" in type(owner).__name__:
        return "convolution kernel"
    if isinstance(owner, nn.Linear):
        return "does not run in the forward pass"
    return "multiplies no input as a matrix"


def _layout(
    blocks: Sequence[str],
    linears: Sequence[Sequence[Sequence[TracedLinear]]],
    skipped: list[SkippedWeight],
    flows: Flows,
) -> Layout:
    consumers = iter(_consumers([group for block in linears for group in block]))
    layout_blocks: list[Block] = []
    for index, groups in enumerate(linears):
        mixing = _mixing(groups, blocks[index], flows)
        own: list[Linear] = []
        for number, group in enumerate(groups):
            consumer = next(consumers)
            for traced in group:
                attention = _child(traced.name, blocks[index]) in mixing
                rows, columns = traced.event.shape
                own.append(
                    Linear(
                        name=traced.name,
                        block=index,
                        out_features=rows,
                        in_features=columns,
                        group=number,
                        paired=consumer,
                        part="attention" if attention else "mlp",
                        place=traced.place,
                        expert=traced.expert,
                        rows=flows.rows(traced),
                        fed=flows.fed(traced),
                    )
                )
        layout_blocks.append(Block(index, blocks[index], tuple(own)))
    return Layout(tuple(layout_blocks), tuple(skipped))


def _consumers(order: Sequence[Sequence[TracedLinear]]) -> list[str | None]:
    """Return every group's consumer: the next group of its own expert, else what runs next."""
    result: list[str | None] = []
    after = len(order)  # the first group after the experts that a group belongs to
    for k in reversed(range(len(order))):
        own = order[k][0]
        following = order[k + 1][0] if k + 1 < len(order) else None
        if following is None or following.experts is not own.experts or own.experts is None:
            after = k + 1
        if following is None or (following.experts, following.expert) != (own.experts, own.expert):
            following = _in_stack(order, after, own)
        fits = following is not None and all(
            x.event.shape[0] == following.event.shape[1] for x in order[k]
        )
        result.append(following.name if following is not None and fits else None)
    return result[::-1]


def _in_stack(
    order: Sequence[Sequence[TracedLinear]], k: int, own: TracedLinear
) -> TracedLinear | None:
    """Return the first linear of group `k`, or of the same expert in another stack of experts."""
    if k == len(order):
        return None
    other = order[k][0].experts
    if own.experts is not None and other is not None and own.experts.count == other.count:
        return next(g[0] for g in order[k:] if g[0].expert == own.expert)
    return order[k][0]


def _mixing(groups: Sequence[Sequence[TracedLinear]], block: str, flows: Flows) -> set[str]:
    """Return the children of a block that mix tokens, which are called attention.

    These are the child of the first linear to run and those of queries, keys and values; where
    such a linear is a child itself, what reads the values is one too.
    """
    linears = [x for group in groups for x in group]
    mixing = {_child(linears[0].name, block)}
    for x in linears:
        if any(rows.name in ("q", "k", "v") for rows in flows.rows(x)):
            mixing.add(_child(x.name, block))
            fed = flows.fed(x)
            if fed is not None and x.name == f"{block}.{_child(x.name, block)}":
                mixing.add(_child(fed.linear, block))
    return mixing


def _child(linear: str, block: str) -> str:
    """Return the direct child of the block that holds a linear: `self_attn`, `mlp`, `fc1`."""
    return linear.removeprefix(block + ".").split(".")[0]
