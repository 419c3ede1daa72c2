"""`neuroal bench`: what a finished run gains on this machine."""

from __future__ import annotations

from functools import partial
from textwrap import fill
from typing import Any

import click

from neuroal.cli.command import (
    Command,
    clean_stdout,
    echo,
    message_options,
    option,
    print_json,
    trust_option,
)
from neuroal.cli.tables import table
from neuroal.recipe import DTYPES
from neuroal.types import Tick

_measure = partial(option, group="Measurement", type=click.IntRange(min=1))


@click.command(
    cls=Command,
    examples=[
        "neuroal bench pruned",
        "neuroal bench pruned --batch 1 --batch 8 --prompt 512 --tokens 64",
        "neuroal bench pruned-24 --device cuda --dtype float16 --json",
    ],
)
@click.argument("run")
@_measure(
    "--batch", "batches", multiple=True, default=(1,), help="Sequences at a time. May be repeated."
)
@_measure("--prompt", default=128, help="Tokens that are read at once (prefill).")
@_measure("--tokens", default=32, help="Tokens that follow, one by one (decode).")
@_measure("--repeats", default=5, help="Rounds, in which all forms take turns.")
@option("--device", default="auto", group="Model", help="auto, cpu, cuda, cuda:0 or mps.")
@option(
    "--dtype",
    type=click.Choice(DTYPES),
    default="auto",
    group="Model",
    help="Dtype to load the weights in; auto is the checkpoint's own, or float32 on a CPU that "
    "computes faster in it.",
)
@trust_option
@message_options(json="the result", quiet=True, progress=True)
def bench(
    run: str,
    batches: tuple[int, ...],
    prompt: int,
    tokens: int,
    repeats: int,
    device: str,
    dtype: str,
    trust_remote_code: bool,
    as_json: bool,
    quiet: bool,
    progress: bool,
) -> None:
    """Measure what RUN gains on this machine: bytes, load time, tokens per second.

    RUN is the output folder of `neuroal prune`, packed or not. It is measured as it is, as torch's
    CSR matrices on a CPU and as torch's 2:4 matrices on an NVIDIA GPU, where its linears fit,
    against the model that it was pruned from, if that is still there. Numbers are medians over
    rounds; outputs are compared. Where nothing is gained, the table says so. The result is kept in
    the run's neuroal.json.
    """
    from neuroal.model.files import MARKER
    from neuroal.model.places import locate

    locate(run)
    from neuroal.bench import bench as measure
    from neuroal.progress import bar
    from neuroal.run import later

    def tick(title: str, total: int) -> Tick:
        update: Tick = bar(total=total, desc=title, disable=not progress, leave=False).update
        return update

    with clean_stdout(as_json):
        found = measure(
            run,
            batches=tuple(dict.fromkeys(batches)),
            prompt=prompt,
            tokens=tokens,
            repeats=repeats,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            tick=tick,
        )
        folder = later.run_folder_of(run)
        kept = folder if folder is not None and later.keep_bench(folder, found) else None
    if as_json:
        print_json(found | ({"kept_in": str(kept / MARKER)} if kept else {}))
    elif not quiet:
        echo(_text(found, None if kept is None else str(kept / MARKER)))


def _text(found: dict[str, Any], kept: str | None) -> str:
    from neuroal.bench.measuring import NO_GAIN
    from neuroal.units import number, size

    def shown(value: float | None) -> str:
        if value is not None and value >= 100:
            return f"{value:,.0f}"
        return "" if value is None else number(value, 3)

    where, measured = found["environment"], found["measured"]
    files = [
        (form, f"{count:,}", shown(found["load_seconds"].get(form)))
        for form, count in found["bytes"].items()
    ]
    rows = [
        (
            x["form"],
            x["batch"],
            size(x["memory_bytes"]),
            *(
                shown(x[f"{step}_{what}"])
                for step in ("prefill", "decode")
                for what in ("tokens_per_second", "over_dense")
            ),
            shown(x["difference"]),
            x["gain"],
        )
        for x in measured
    ]
    headers = ("form", "batch", "memory", "prefill", "× dense", "decode", "× dense", "diff", "gain")
    repeats = found["repeats"]
    rounds = "one round" if repeats == 1 else f"medians of {repeats} rounds"
    protocol = (
        f"Tokens per second for a prompt of {found['prompt']} and {found['tokens']} after it; "
        f"{rounds}; {where['dtype']} on {where['device']}, "
        f"{where['threads']} threads. diff: largest absolute difference of logits from those of "
        "the pruned model."
    )
    missing: dict[str, list[str]] = {}
    for form, why in found["not_measured"].items():
        missing.setdefault(why, []).append(form)
    gained = any(x["gain"] not in (None, NO_GAIN) for x in measured)
    parts = [
        table(files, ("weights", "bytes on disk", "seconds to load"), right=(1, 2)),
        table(rows, headers, right=range(1, 8)),
        fill(protocol, 80),
        *([] if gained else ["There is no gain here, in speed or in memory."]),
        "\n".join(f"Not measured: {'; '.join(forms)}: {why}" for why, forms in missing.items()),
        "\n".join(f"Note: {note}" for note in found["notes"]),
        "" if kept is None else f"Kept in {kept}",
    ]
    return "\n\n".join(part for part in parts if part)
