"""Every form of a pruned model that fits, measured in turn against the dense model."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from neuroal.bench.forms import FORMS, Form
from neuroal.bench.speed import Timed, memory_bytes, timed
from neuroal.errors import NeuroalError, UsageError
from neuroal.model import files, memory, packing, places, pretrained
from neuroal.run import later
from neuroal.run.report import environment
from neuroal.types import Tick

DENSE, PRUNED, PACKED = "dense", "pruned", "packed"
_GAIN = 1.05  # times as fast or as small: what is less is noise
NO_GAIN = "no gain here"


def bench(
    run: str | Path,
    *,
    batches: Sequence[int] = (1,),
    prompt: int = 128,
    tokens: int = 32,
    repeats: int = 5,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    tick: Callable[[str, int], Tick] = lambda title, total: int,
) -> dict[str, Any]:
    """Measure what a finished run gains on this machine.

    The forms take turns, round by round, so that what else the machine does meets all of them.

    Args:
        run: Folder of the run, packed or not.
        batches: Sequences at a time.
        prompt: Tokens that are read at once (prefill).
        tokens: Tokens that follow one by one (decode).
        repeats: Rounds.
        device: Where the models are: "auto", or a torch device.
        dtype: As in `pretrained.load`; "auto" is float32 where that is faster on the CPU.
        trust_remote_code: Let the model's own code run.
        tick: Opens a progress bar of a title for a number of steps.

    Returns:
        JSON values: `environment` and the arguments; `bytes` on disk; median `load_seconds`;
        `measured`, an entry for each form and batch; `not_measured`, why by form; `notes`.

    Raises:
        UsageError: It is no run, or the windows are longer than the model's context.
        NeuroalError: The model cannot be loaded.
    """
    folder = later.run_folder_of(str(run))
    if folder is None:
        raise UsageError(f"'{run}' is no run: give the output folder of `neuroal prune`")
    report, place = files.read_report(folder), memory.device_of(device)
    config = pretrained.load_config(str(folder), trust_remote_code)
    context = pretrained.context_length(config)
    if context is not None and prompt + tokens > context:
        raise UsageError(f"--prompt and --tokens are {prompt + tokens}: '{run}' reads {context}")
    kind = pretrained.dtype_to_measure(str(folder), config, place) if dtype == "auto" else dtype
    sources, notes = {PRUNED: str(folder)}, []
    try:
        dense = later.dense_model(folder, report)
        pretrained.load_config(dense, trust_remote_code)  # one of a hub may be out of reach
        sources[DENSE] = dense
    except NeuroalError as error:
        notes.append(f"the pruned model stands for the dense one, which is as fast: {error}")
    models, seconds = _load(sources, place, kind, trust_remote_code, repeats, tick)
    names = [n for n, x in report["linears"].items() if x["wanted"] > 0]
    forms, missing = _forms(models, names)
    measured = []
    vocabulary = pretrained.vocabulary_size(config) or 1
    for batch in batches:
        ids = torch.randint(
            vocabulary, (batch, prompt + tokens), generator=torch.Generator().manual_seed(0)
        )
        measured += _measured(forms, missing, ids.to(place), prompt, repeats, tick)
    stored = {PRUNED: PACKED} if packing.is_packed(folder) else {}
    return {
        "environment": environment(models[PRUNED]),
        "batches": list(batches),
        "prompt": prompt,
        "tokens": tokens,
        "repeats": repeats,
        "bytes": _bytes(folder, sources.get(DENSE), report),
        "load_seconds": {stored.get(name, name): median(x) for name, x in seconds.items()},
        "measured": measured,
        "not_measured": missing,
        "notes": notes,
    }


def _load(
    sources: Mapping[str, str],
    device: str,
    dtype: str,
    trust: bool,
    repeats: int,
    tick: Callable[[str, int], Tick],
) -> tuple[dict[str, nn.Module], dict[str, list[float]]]:
    """Load every model in turn, again and again; return the last ones and the seconds.

    The first round reads the files from the disk and imports what the models are made of: it is not
    counted.
    """
    models: dict[str, nn.Module] = {}
    seconds: dict[str, list[float]] = {name: [] for name in sources}
    update = tick("load", (1 + repeats) * len(sources))
    for warm in (False, *[True] * repeats):
        for name, source in sources.items():
            models.pop(name, None)
            gc.collect()
            start = time.perf_counter()
            models[name] = pretrained.load(source, device, dtype, trust)[0]
            if warm:
                seconds[name].append(time.perf_counter() - start)
            update()
    return models, seconds


def _forms(
    models: Mapping[str, nn.Module], names: Sequence[str]
) -> tuple[dict[str, Form], dict[str, str]]:
    """Return the models and every form of the pruned one; and why there is no other."""
    order = [name for name in (DENSE, PRUNED) if name in models]
    forms = {name: Form(models[name], 0) for name in order}
    missing = {}
    for name, make in FORMS.items():
        try:
            found = make(models[PRUNED], names)
        except RuntimeError as error:
            found = _failed(error)
        if isinstance(found, Form):
            forms[name] = found
        else:
            missing[name] = found
    return forms, missing


def _measured(
    forms: dict[str, Form],
    missing: dict[str, str],
    ids: Tensor,
    prompt: int,
    repeats: int,
    tick: Callable[[str, int], Tick],
) -> list[dict[str, Any]]:
    """Return an entry for each form; one that does not run moves to the missing ones."""
    wanted = timed(forms[PRUNED].model, ids, prompt).logits.float()
    differences: dict[str, float | None] = {}
    for name in list(forms):  # also warms everything up
        try:
            found = timed(forms[name].model, ids, prompt).logits.float()
        except RuntimeError as error:
            if name in (DENSE, PRUNED):
                raise
            missing[name] = _failed(error)
            del forms[name]
            continue
        same_weights = name not in (DENSE, PRUNED)
        differences[name] = float((found - wanted).abs().max()) if same_weights else None
    runs: dict[str, list[Timed]] = {name: [] for name in forms}
    batch, length = ids.shape
    update = tick(f"batch of {batch}", repeats * len(forms))
    for _ in range(repeats):
        for name, form in forms.items():
            run = timed(form.model, ids, prompt)
            runs[name].append(Timed(run.prefill, run.decode, run.logits[:0]))
            update()
    counts = {"prefill": batch * prompt, "decode": batch * (length - prompt)}
    return _entries(forms, runs, differences, batch, counts)


def _entries(
    forms: Mapping[str, Form],
    runs: Mapping[str, Sequence[Timed]],
    differences: Mapping[str, float | None],
    batch: int,
    counts: Mapping[str, int],
) -> list[dict[str, Any]]:
    """Return what was measured, form by form, from the rounds and the tokens of each step."""
    baseline = DENSE if DENSE in forms else PRUNED
    in_memory = {name: memory_bytes(form.model) for name, form in forms.items()}
    entries = []
    for name, form in forms.items():
        entry: dict[str, Any] = {
            "form": name,
            "batch": batch,
            "linears": form.linears,
            "memory_bytes": in_memory[name],
            "difference": differences[name],
        }
        for step, count in counts.items():
            own, dense = ([getattr(x, step) for x in runs[which]] for which in (name, baseline))
            entry |= compared(step, count, own, dense)
        gains = [step for step in counts if entry[f"{step}_gain"]]
        gains += ["memory"] if in_memory[baseline] > _GAIN * in_memory[name] else []
        entry["gain"] = None if name == baseline else ", ".join(gains) or NO_GAIN
        entries.append(entry)
    return entries


def compared(
    step: str, tokens: int, seconds: Sequence[float | None], dense: Sequence[float | None]
) -> dict[str, Any]:
    """Return speed and gain of one form, from its seconds and the dense model's, round by round.

    It is a gain where the median is 1.05 times as fast, and every round was faster.

    Args:
        step: "prefill" or "decode".
        tokens: Of one round.
        seconds: Of the form; None where there are none.
        dense: Of the dense model.
    """
    own = [x for x in seconds if x is not None]
    pairs = [(x, y) for x, y in zip(seconds, dense, strict=True) if x and y]
    ratio = median(y for _, y in pairs) / median(x for x, _ in pairs) if pairs else None
    return {
        f"{step}_tokens_per_second": tokens / median(own) if own else None,
        f"{step}_over_dense": ratio,
        f"{step}_gain": ratio is not None and ratio >= _GAIN and all(x < y for x, y in pairs),
        f"{step}_seconds": list(seconds),
    }


def _bytes(folder: Path, dense: str | None, report: Mapping[str, Any]) -> dict[str, int]:
    """Return the bytes of the files of weights: dense, pruned and, for a packed run, packed."""
    found = {}
    source = None if dense is None else places.local_folder(dense)
    if source is not None:
        found[DENSE] = files.weight_bytes(source)
    elif DENSE in (report.get("weight_bytes") or {}):
        found[DENSE] = report["weight_bytes"][DENSE]
    found[PRUNED] = files.weight_bytes(folder)
    if packing.is_packed(folder):
        found[PACKED] = sum(x.stat().st_size for x in packing.weight_files(folder))
    return found


def _failed(error: RuntimeError) -> str:
    first = next((x for x in str(error).splitlines() if x.strip()), "")
    return f"does not run here: {type(error).__name__}: {first.strip()}"
