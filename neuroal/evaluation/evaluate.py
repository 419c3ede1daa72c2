"""A model measured: its perplexity on a text, its accuracy on zero-shot tasks, or both."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from neuroal.data.source import parse_source
from neuroal.errors import UsageError
from neuroal.evaluation import perplexity as perplexities
from neuroal.evaluation import tasks as harness
from neuroal.evaluation import text_overlap, zero_shot
from neuroal.evaluation.perplexity import Perplexity
from neuroal.evaluation.zero_shot import ZeroShot
from neuroal.model import memory, pretrained
from neuroal.types import Bos


@dataclass(frozen=True, repr=False)
class Evaluation:
    """What was measured of a model.

    Attributes:
        model: Its name; of one in memory, its class.
        perplexity: None where no text was given.
        zero_shot: None where no tasks were given.
        seconds: How long it took, loading included.
        notes: What should be known.
    """

    model: str
    perplexity: Perplexity | None
    zero_shot: ZeroShot | None
    seconds: float
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """Return the model and its numbers."""
        numbers = [f"{x['measure']} on {x['on']} = {x['value']:.4f}" for x in self.records()]
        return f"Evaluation({', '.join([self.model, *numbers])})"

    def records(self) -> list[dict[str, Any]]:
        """Return a flat dict for each number, as `pandas.DataFrame` takes them."""
        rows: list[dict[str, Any]] = []
        if self.perplexity is not None:
            row = {"measure": "perplexity", "value": self.perplexity.perplexity}
            rows.append(row | {"on": self.perplexity.data, "dtype": self.perplexity.dtype})
        if self.zero_shot is not None:
            for score in self.zero_shot.tasks:
                for name, value in score.metrics.items():
                    row = {"measure": name, "value": value, "on": score.name}
                    rows.append(row | {"dtype": self.zero_shot.dtype})
        return [{"model": self.model} | row for row in rows]

    def to_json(self) -> dict[str, Any]:
        """Return JSON values, each number with its protocol."""
        values: dict[str, Any] = {"model": self.model}
        if self.perplexity is not None:
            values |= self.perplexity.to_json()
        if self.zero_shot is not None:
            values |= {"zero_shot": self.zero_shot.to_json()}
        values |= {"notes": list(self.notes)} if self.notes else {}
        return values | {"seconds": round(self.seconds, 3)}


def evaluate(
    model: nn.Module | str | Path,
    tokenizer: Any = None,
    data: str | None = None,
    *,
    length: int | None = None,
    windows: int | None = None,
    bos: Bos = "auto",
    pack_documents: bool | None = None,
    tasks: str | None = None,
    include_path: str | None = None,
    limit: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    batch: int | None = None,
    trust_remote_code: bool = False,
    progress: bool = False,
) -> Evaluation:
    """Measure the perplexity of a model on a text, its accuracy on zero-shot tasks, or both.

    Args:
        model: A causal language model in memory, a folder, a hub name, or "demo". It may be
            quantised, by whatever transformers loads.
        tokenizer: Of a model in memory.
        data: Source of the test text, as for `neuroal evaluate --data`; "demo" where the model is
            "demo" and no tasks are given.
        length: Tokens per window; None is the smaller of 2048 and the model's context.
        windows: At most so many; None is all.
        bos: Whether windows begin with the beginning-of-sequence token: as in `Recipe`.
        pack_documents: Whether documents are joined by the end-of-sequence token: as in `Recipe`.
        tasks: Tasks of lm-eval with commas between them, or "paper".
        include_path: Folder with task definitions of your own.
        limit: Documents of each task; None is all.
        device: Where a model that is loaded runs; None chooses.
        dtype: Dtype to load it in; None is the checkpoint's own, or float32 where a CPU computes
            faster in it.
        batch: Windows or requests per forward pass; None chooses.
        trust_remote_code: Let the model's own code run.
        progress: Show progress bars.

    Raises:
        UsageError: There is nothing to measure, or a number is out of range.
        NeuroalError: Model, text or tasks cannot be read.
    """
    loaded = isinstance(model, nn.Module)
    name = type(model).__name__ if loaded else str(model)
    if data is None and tasks is None and name == "demo":
        data = "demo"
    _check(name, loaded, data, tasks, length, windows, limit, include_path, device, dtype)
    source = None if data is None else parse_source(data)
    zero_shot.check_sizes(batch, limit)
    start = time.perf_counter()
    if isinstance(model, nn.Module):
        config: Any = model.config
    else:
        config = pretrained.load_config(name, trust_remote_code)
        tokenizer = pretrained.load_tokenizer(name, trust_remote_code)
    notes: tuple[str, ...] = ()
    asked = cut = None
    if tasks is not None:
        zero_shot.check_tokenizer(tokenizer)
        asked = harness.load_tasks(tasks, include_path, progress=progress)
    if source is not None:
        cut = perplexities.windows_for(
            config,
            source,
            tokenizer,
            length=length,
            windows=windows,
            bos=bos,
            pack_documents=pack_documents,
            progress=progress,
        )
        calibrated = None if loaded else text_overlap.calibration_of(name, tokenizer)
        if calibrated is not None:
            text_overlap.warn_of_overlap(calibrated, cut)
    if not isinstance(model, nn.Module):
        place = memory.device_of(device or "auto")
        kind = dtype or "auto"
        if kind == "auto":
            kind = pretrained.dtype_to_measure(name, config, place)
            notes = _notes(config, kind)
        method = pretrained.quantisation(config)
        if method is not None:
            notes = (f"quantised by {method}: measured as transformers loads it",)
        model, _ = pretrained.load(name, place, kind, trust_remote_code, quantised=True)
    read = answered = None
    if cut is not None:
        read = perplexities.perplexity(model, cut, batch=batch, progress=progress)
    if asked is not None:
        answered = zero_shot.zero_shot(
            model, tokenizer, asked, batch=batch, limit=limit, progress=progress
        )
    return Evaluation(name, read, answered, time.perf_counter() - start, notes)


def _notes(config: Any, dtype: str) -> tuple[str, ...]:
    """Return what there is to say of a dtype that is not the checkpoint's own."""
    if dtype == "auto":
        return ()
    own = str(config.dtype).removeprefix("torch.")
    return (f"computed in {dtype}, which is faster on this CPU than {own} (--dtype {own})",)


def _check(
    name: str,
    loaded: bool,
    data: str | None,
    tasks: str | None,
    length: int | None,
    windows: int | None,
    limit: int | None,
    include_path: str | None,
    device: str | None,
    dtype: str | None,
) -> None:
    """Refuse arguments that say nothing together."""
    if data is None and tasks is None:
        raise UsageError(f"nothing to measure of '{name}': give data (a text), tasks, or both")
    for needed, given, options in (
        ("data", data, {"length": length, "windows": windows}),
        ("tasks", tasks, {"limit": limit, "include_path": include_path}),
    ):
        unread = next((key for key, value in options.items() if value is not None), None)
        if given is None and unread is not None:
            raise UsageError(f"{unread} is for {needed}, which is not given")
    if loaded and (device or dtype):
        raise UsageError("a model in memory is measured as it is: leave device and dtype out")
