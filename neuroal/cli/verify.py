"""`neuroal verify`: whether the zeros of a run are still zero."""

from __future__ import annotations

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
from neuroal.errors import NeuroalError
from neuroal.types import Tick


@click.command(
    cls=Command,
    examples=[
        "neuroal verify llama-wanda-neuroal-0.7",
        "neuroal verify finetuned --against llama-wanda-neuroal-0.7",
        "neuroal verify merged --against llama-wanda-neuroal-0.7/masks.safetensors --quiet",
    ],
)
@click.argument("run")
@option(
    "--against",
    metavar="RUN_OR_FILE",
    group="Zeros",
    help="A run, or its masks.safetensors, whose zeros have to be zero here.  [default: the run's "
    "parent if its report names one, else its own masks, else the zeros that its report counts]",
)
@option(
    "--stream/--no-stream",
    default=None,
    group="Model",
    help="Read blocks from the disk one at a time.  [default: where the weights would not fit into "
    "memory]",
)
@trust_option
@message_options(json="what was found of every linear", quiet=True, progress=True)
def verify(
    run: str,
    against: str | None,
    stream: bool | None,
    trust_remote_code: bool,
    as_json: bool,
    quiet: bool,
    progress: bool,
) -> None:
    """Check that the zeros of RUN are still zero, pattern by pattern.

    RUN is the output folder of neuroal, packed or not; with --against it may be any model that was
    made from that run. The exit code is 0 if everything is as it
    has to be, and 1 if a weight that was pruned is not zero, or a group of an N:M pattern has more
    than N weights.
    """
    from neuroal.cli.tables import table
    from neuroal.progress import bar
    from neuroal.run import verify as checks

    def tick(total: int) -> Tick:
        update: Tick = bar(total=total, desc="verify", disable=not progress, leave=False).update
        return update

    with clean_stdout(as_json):
        found = checks.verify(
            run, against, stream=stream, trust_remote_code=trust_remote_code, tick=tick
        )
    sums = checks.by_pattern(found)
    if as_json:
        said = {"run": run, "holds": all(x.holds for x in found)}
        patterns, linears = ([x.to_json() for x in group] for group in (sums, found))
        print_json(said | {"patterns": patterns, "linears": linears})
    elif not quiet:
        rows = [
            (x.name, x.linears, f"{x.weights:,}", f"{x.zeros:,}", f"{x.lost:,}", f"{x.groups:,}")
            for x in sums
        ]
        headers = ("pattern", "linears", "weights", "have to be zero", "are not", "groups broken")
        echo(table(rows, headers, right=range(1, 6)))
    wrong = [x for x in found if not x.holds]
    if wrong:
        worst = max(wrong, key=lambda x: (x.lost, x.groups))
        what = [f"{worst.lost:,} of {worst.zeros:,} zeros are lost"] if worst.lost else []
        if worst.groups:
            what.append(f"{worst.groups:,} groups have more weights than {worst.pattern}")
        raise NeuroalError(
            f"'{run}' is not as sparse as it was, in {len(wrong)} of {len(found)} linears; "
            f"'{worst.name}': {', '.join(what)}"
        )
