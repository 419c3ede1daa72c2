"""Whether the zeros of a run are still zero: after fine-tuning, merging, or somebody's script."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neuroal.errors import UsageError
from neuroal.layout import Linear, find, matrices
from neuroal.model import pretrained
from neuroal.model.files import MARKER, read_report
from neuroal.model.places import locate
from neuroal.run.apply import Source, check_fits, mask_of, open_blocks, read_source, streams_blocks
from neuroal.types import Tick

UNSTRUCTURED = "unstructured"


@dataclass(frozen=True)
class Checked:
    """What was found of one linear, or of several.

    Attributes:
        name: Of the linear, or of the pattern.
        pattern: That it was pruned by: "unstructured", or N:M.
        linears: How many linears.
        weights: How many weights.
        zeros: How many of them have to be zero.
        lost: How many of these are not.
        groups: Groups of M in which more than N are not zero.
    """

    name: str
    pattern: str
    linears: int
    weights: int
    zeros: int
    lost: int
    groups: int

    @property
    def holds(self) -> bool:
        """Whether everything is as it has to be."""
        return not (self.lost or self.groups)

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self) | {"holds": self.holds}


def verify(
    run: str | Path,
    against: str | Path | None = None,
    *,
    stream: bool | None = None,
    trust_remote_code: bool = False,
    tick: Callable[[int], Tick] = lambda total: int,
) -> tuple[Checked, ...]:
    """Check the zeros of a run, linear by linear.

    Args:
        run: Folder of the run, packed or not; or of any model that was made from one, where
            `against` says which.
        against: Another run, or its `masks.safetensors`, whose zeros have to be zero here. None is
            the run's parent if its report names one, else the run's own masks; where it has
            neither, the zeros that its report has counted.
        stream: Read blocks one at a time; None does so where the models would not fit into memory.
        trust_remote_code: Let the model's own code run.
        tick: Opens a progress bar for a number of blocks.

    Returns:
        What was found of every linear that was pruned.

    Raises:
        UsageError: There is no run whose zeros have to be zero, or it is of another model.
        NeuroalError: A file is broken.
    """
    folder = Path(locate(str(run)))
    own_report = read_report(folder) if (folder / MARKER).is_file() else None
    source = _source(str(run), folder, own_report, against)
    report = source.run if own_report is None else own_report
    skeleton = pretrained.skeleton(str(folder), trust_remote_code)
    layout = find(skeleton)
    check_fits(source, layout)
    own = source.folder is not None and source.folder.resolve() == folder.resolve()
    compares = source.masks is None and not own  # with weights, since there are no masks
    streamed = streams_blocks(str(folder), skeleton, 2 if compares else 1, stream)
    blocks = open_blocks(str(folder), layout, "auto", streamed, trust_remote_code)
    other = None
    if compares:
        other = open_blocks(str(source.folder), layout, "auto", streamed, trust_remote_code)
    found = []
    done = tick(len(layout.blocks))
    for block in layout.blocks:
        before: AbstractContextManager[nn.Module | None] = nullcontext()
        if other is not None:
            before = other.open(block)
        with blocks.open(block) as module, before as other_module, torch.no_grad():
            for x in block.linears:
                if x.name in source.pruned:
                    weight = matrices.weight(x, module, block.name)
                    there = None
                    if other_module is not None:
                        there = matrices.weight(x, other_module, block.name)
                    counted = _zeros(source, x, weight, there)
                    found.append(_checked(x, weight, report, *counted))
        done()
    return tuple(found)


def _source(
    run: str, folder: Path, report: Mapping[str, Any] | None, against: str | Path | None
) -> Source:
    """Return whose zeros have to be zero in a folder."""
    if against is not None:
        return read_source(str(against))
    cure = "say by --against which run's zeros have to be zero"
    if report is None:
        raise UsageError(f"'{run}' is no run, it holds no {MARKER}: {cure}")
    parent = (report.get("parent") or {}).get("name")
    if parent is not None and not Path(parent).exists():
        raise UsageError(f"'{parent}', of which '{run}' was made, is not there: {cure}")
    return read_source(str(parent or folder))


def _zeros(source: Source, x: Linear, weight: Tensor, there: Tensor | None) -> tuple[int, int]:
    """Return how many weights of a linear have to be zero, and how many of these are not."""
    if source.masks is None and there is None:
        count = round(source.run["linears"][x.name]["achieved"] * x.weights)
        return count, max(0, count - int((weight == 0).sum()))
    mask = mask_of(source, x.name, there)
    return int(mask.sum()), int((weight[mask] != 0).sum())


def _checked(
    x: Linear, weight: Tensor, report: Mapping[str, Any], zeros: int, lost: int
) -> Checked:
    said = str(report["recipe"].get("pattern", UNSTRUCTURED))
    wanted = report.get("linears", {}).get(x.name, {}).get("wanted", zeros / x.weights)
    if said == UNSTRUCTURED or not wanted:
        return Checked(x.name, UNSTRUCTURED, 1, x.weights, zeros, lost, 0)
    of = int(said.partition(":")[2])
    kept = round((1 - wanted) * of)  # where N varies from block to block, it is this one's
    groups = (weight != 0).reshape(-1, of).sum(dim=1) > kept
    return Checked(x.name, f"{kept}:{of}", 1, x.weights, zeros, lost, int(groups.sum()))


def by_pattern(found: Iterable[Checked]) -> tuple[Checked, ...]:
    """Return what was found of the linears of every pattern together."""
    sums: dict[str, Checked] = {}
    for x in found:
        y = sums.get(x.pattern)
        sums[x.pattern] = Checked(
            x.pattern,
            x.pattern,
            *(
                getattr(x, key) + (getattr(y, key) if y else 0)
                for key in ("linears", "weights", "zeros", "lost", "groups")
            ),
        )
    return tuple(sums.values())
