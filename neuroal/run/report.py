"""What a run leaves: the report, and the numbers that go into it, seconds and memory among them."""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from typing import Any

import torch
from torch import nn

from neuroal.distributed import Team
from neuroal.layout import Layout
from neuroal.model.files import SCHEMA
from neuroal.model.pretrained import transformers_version
from neuroal.model.zeros import Zeros
from neuroal.pruning.targets import Rules
from neuroal.types import Target
from neuroal.units import parameters
from neuroal.version import __version__

InputNorms = dict[str, float | None]
"""Mean over a linear's inputs of their norms: `dense`, and `pruned` or None where not measured."""


@dataclass(repr=False)
class Report:
    """What happened; `to_json` is the content of `neuroal.json`.

    Attributes:
        schema: Version of this format.
        recipe: What was asked for.
        recipe_sha256: SHA-256 of the recipe.
        environment: Versions, device, dtype.
        model: Name and SHA-256 of config and weights.
        plugins: Role, name, distribution, version, options and SHA-256 of every plugin.
        data: Source, windows, length and SHA-256 of the calibration token ids.
        candidates: Every candidate of the search, in order.
        sparsity: `wanted` and `achieved`, of what the recipe's `sparsity_over` says, and what was
            achieved `over_pruned` linears and `over_all` linears of the blocks.
        blocks: The same per block.
        linears: The same per linear, with the achieved ratio of its rows; `input_norm` is the mean
            over its inputs of their norms on the calibration windows, with its block `dense` and
            with its block `pruned`, after the same pruned blocks. It is absent where the final
            pruning runs no block, and `pruned` is None in the last one.
        evaluation: Perplexity, with its protocol, on every text that the run was evaluated on, and
            the dense model's beside it: see `evaluation.quality.entry`.
        zero_shot: What `neuroal evaluate --tasks` measured of the saved model, one entry for every
            choice of tasks.
        timings: Seconds per phase.
        counts: `block_runs`; `linears` that are pruned, their `weights`, and how many of these are
            `pruned`; `all_linears` and `all_weights` of the blocks, those that stay dense too.
        peak_memory_bytes: Of the process; of the accelerator where one is used.
        phase_memory_bytes: The same up to the end of every phase: the phase that raises it has the
            peak. Reports written before it was measured have none.
        weight_bytes: Of the files of weights: `dense`, those of the dense model, where they are
            known; `pruned`, not packed; and `packed`, where they are.
        packing: Of a packed run: how many matrices are `packed`, their `dense_bytes` and
            `packed_bytes`, and the bytes of each that stays as it is (`left_dense`); else None.
        notes: What was left out or should be known.
        parent: Of a run that was made from another: that one's `name`, `sha256` (of its config and
            weights) and `evaluation`; else None.
        training: Of a run that was fine-tuned: its `settings`, `data` (windows and their SHA-256),
            `losses` (step and mean loss since the one before) and `trained`, the number of
            parameters that were; else None.
    """

    recipe: dict[str, Any]
    recipe_sha256: str
    environment: dict[str, Any]
    model: dict[str, Any]
    plugins: list[dict[str, Any]]
    data: dict[str, Any] | None
    schema: int = SCHEMA
    candidates: list[dict[str, Any]] = field(default_factory=list)
    sparsity: dict[str, float] = field(default_factory=dict)
    blocks: list[dict[str, Any]] = field(default_factory=list)
    linears: dict[str, dict[str, Any]] = field(default_factory=dict)
    evaluation: list[dict[str, Any]] = field(default_factory=list)
    zero_shot: list[dict[str, Any]] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    peak_memory_bytes: int = 0
    phase_memory_bytes: dict[str, int] = field(default_factory=dict)
    weight_bytes: dict[str, int] = field(default_factory=dict)
    packing: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    parent: dict[str, Any] | None = None
    training: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {"schema": self.schema} | dataclasses.asdict(self)  # schema first

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Report:
        """Return the report in a `neuroal.json`, without what else the file holds."""
        return cls(**{x.name: data[x.name] for x in dataclasses.fields(cls) if x.name in data})

    def __repr__(self) -> str:
        """Return model, method, sparsity and cost on one line."""
        facts = [f"{name} {value}" for name, value in self._facts()]
        return f"Report({', '.join(facts)})"

    def _repr_html_(self) -> str:
        """Return a table of what happened, and one of the blocks, for a notebook."""
        facts = [(name, value) for name, value in self._facts()]
        facts += [("note", note) for note in self.notes]
        blocks = [(x["name"], f"{x['wanted']:.4f}", f"{x['achieved']:.4f}") for x in self.blocks]
        return _html(facts) + _html(blocks, ("block", "wanted", "achieved"))

    def _facts(self) -> Iterator[tuple[str, str]]:
        """Yield what there is to say in short: what it is, and its value."""
        plugins = {x["role"]: x["name"] for x in self.plugins}
        yield "model", str(self.model.get("name"))
        yield "pruner", ", ".join(plugins[x] for x in ("pruner", "refiner") if x in plugins)
        for role, candidate in self.selected().items():
            said = [candidate["plugin"], parameters(candidate["parameters"])]
            yield role.replace("_", " "), " ".join(filter(None, said))
        if self.sparsity:
            wanted, achieved = self.sparsity["wanted"], self.sparsity["achieved"]
            yield "sparsity", f"{achieved:.6f} of {wanted:g} wanted"
        if self.timings:
            yield "took", f"{sum(self.timings.values()):.1f} s"

    def candidate_records(self) -> list[dict[str, Any]]:
        """Return a flat dict for each candidate of the search, as `pandas.DataFrame` takes them.

        The parameters that made a candidate stand beside what was measured of it, under their own
        names; lists among them become text.
        """
        rows = []
        for candidate in self.candidates:
            own = {k: v for k, v in candidate.items() if k != "parameters"}
            made = {k: _flat(v) for k, v in candidate["parameters"].items()}
            rows.append(own | {f"{k} (parameter)" if k in own else k: v for k, v in made.items()})
        return rows

    def linear_records(self) -> list[dict[str, Any]]:
        """Return a flat dict for each linear, as `pandas.DataFrame` takes them.

        Its wanted and achieved ratio, the least, mean and largest of its rows, and the mean input
        norms with its block dense and pruned, where they were measured.
        """
        rows = []
        for name, linear in self.linears.items():
            block = next((b["name"] for b in self.blocks if name.startswith(f"{b['name']}.")), None)
            norms = linear.get("input_norm", {})
            rows.append(
                {"linear": name, "block": block}
                | {key: linear[key] for key in ("wanted", "achieved")}
                | {f"row_{key}": value for key, value in linear["rows"].items()}
                | {f"input_norm_{key}": norms.get(key) for key in ("dense", "pruned")}
            )
        return rows

    def timing_records(self) -> list[dict[str, Any]]:
        """Return a flat dict for each phase, as `pandas.DataFrame` takes them."""
        memory = self.phase_memory_bytes
        return [
            {"phase": phase, "seconds": seconds, "peak_memory_bytes": memory.get(phase)}
            for phase, seconds in self.timings.items()
        ]

    def selected(self) -> dict[str, dict[str, Any]]:
        """Return the selected candidate of every step by role."""
        return {c["role"]: c for c in self.candidates if c["selected"]}


def _flat(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, (list, dict)) else value


def _html(rows: Sequence[tuple[str, ...]], headers: Sequence[str] = ()) -> str:
    """Return rows as an HTML table."""
    lines = [f"<tr>{''.join(f'<th>{escape(x)}</th>' for x in headers)}</tr>"] if headers else []
    lines += [f"<tr>{''.join(f'<td>{escape(x)}</td>' for x in row)}</tr>" for row in rows]
    return f"<table>{''.join(lines)}</table>"


@dataclass(frozen=True)
class Phases:
    """The phases of one run so far, in the order in which they ended.

    Attributes:
        seconds: Of each phase, over all of its parts.
        memory: Peak bytes up to the end of each phase.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure a phase, or another part of it; what ends in an exception is not recorded."""
        start = time.perf_counter()
        yield
        before = self.seconds.pop(name, 0.0)
        self.seconds[name] = before + time.perf_counter() - start
        self.memory.pop(name, None)
        self.memory[name] = peak_memory()


def peak_memory() -> int:
    """Return the peak bytes of the accelerator in use, else of the process."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0:
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    scale = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def fill_sparsity(
    report: Report,
    layout: Layout,
    rules: Rules,
    wanted: Mapping[str, Target],
    zeros: Mapping[str, Zeros],
    norms: Mapping[str, InputNorms],
) -> None:
    """Write wanted and achieved ratios, counted on the weights, and input norms into the report."""
    for name, x in layout.linears.items():
        rows = zeros[name].rows
        report.linears[name] = {
            "wanted": wanted[name].ratio if name in wanted else 0.0,
            "achieved": zeros[name].zeros / x.weights,
            "rows": {
                "min": float(rows.min()),
                "mean": float(rows.mean()),
                "max": float(rows.max()),
            },
            "tensors": list(zeros[name].tensors),
        }
        if name in norms:
            report.linears[name]["input_norm"] = norms[name]
    dense = [*layout.dense(), *rules.left_dense(layout)]
    report.notes += [f"stays dense: {line}" for line in dense]
    report.notes += _varied(layout, rules, wanted)
    report.notes += _unseen(layout, norms)
    for block in layout.blocks:
        share = {x.name: x.weights / block.weights for x in block.linears}
        ratios = {
            key: sum(report.linears[n][key] * s for n, s in share.items())
            for key in ("wanted", "achieved")
        }
        report.blocks.append({"name": block.name} | ratios)
    prunable = rules.pruned(layout)
    weights = sum(x.weights for x in prunable)
    pruned = sum(zeros[x.name].zeros for x in prunable)
    report.sparsity = {
        "wanted": rules.sparsity,
        "achieved": pruned / rules.counted(layout),
        "over_pruned": pruned / weights,
        "over_all": pruned / layout.weights,
    }
    report.counts |= {
        "linears": len(prunable),
        "weights": weights,
        "pruned": pruned,
        "all_linears": len(layout.linears),
        "all_weights": layout.weights,
    }


def _varied(layout: Layout, rules: Rules, wanted: Mapping[str, Target]) -> list[str]:
    """Return a note on the patterns that blocks have, where they are not all the one asked for."""
    if rules.pattern is None or not rules.varies:
        return []
    of = rules.pattern.of
    by_block = {x.block: wanted[n].ratio for n, x in layout.linears.items() if n in wanted}
    kept = [round((1 - ratio) * of) for ratio in by_block.values()]
    each = ", ".join(f"{n}:{of} in {kept.count(n)}" for n in sorted(set(kept), reverse=True))
    return [f"N varies to meet the sparsity: of {len(kept)} blocks, {each}"]


def _unseen(layout: Layout, norms: Mapping[str, InputNorms]) -> list[str]:
    """Return a note on the experts that no calibration token was routed to."""
    experts = [n for n, x in layout.linears.items() if x.expert is not None and n in norms]
    unseen = [n for n in experts if not norms[n]["dense"]]
    if not unseen:
        return []
    return [
        f"no calibration token was routed to {len(unseen)} of {len(experts)} linears of experts, "
        f"which magnitude pruned: {unseen[0]}" + (" and others" if len(unseen) > 1 else "")
    ]


def environment(model: nn.Module) -> dict[str, Any]:
    """Return what the result may depend on besides recipe, model and data."""
    parameter = next(p for p in model.parameters() if not p.is_meta)
    return {
        "neuroal": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers_version(),
        "platform": platform.platform(),
        "device": str(parameter.device),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


def first_report(team: Team, work: Callable[[], Report | None]) -> Report | None:
    """Return the report that the first process makes, which alone has an output folder."""
    own: list[Report] = []

    def as_bytes() -> bytes | None:
        report = work()
        if report is None:
            return None
        own.append(report)
        return json.dumps(report.to_json()).encode()

    sent = team.first(as_bytes)
    if sent is None:
        return None
    return own[0] if own else Report(**json.loads(sent))
