"""`neuroal finetune`: a run whose surviving weights are trained further."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import click

from neuroal.cli.command import (
    SOURCES,
    Command,
    Stopped,
    clean_stdout,
    echo,
    message_options,
    option,
    print_json,
    say,
    trust_option,
    window_options,
)
from neuroal.errors import UsageError
from neuroal.types import Bos, Tick

if TYPE_CHECKING:
    from neuroal.finetune.cost import TrainingCost

_training = partial(option, group="Training")
_text = partial(option, group="Text")
_run_option = partial(option, group="Run")
_model = partial(option, group="Model")


@click.command(
    cls=Command,
    examples=[
        "neuroal finetune pruned --data texts.jsonl --steps 1000 --out tuned",
        "neuroal finetune pruned --data chats.jsonl --steps 500 --lora 16 --out tuned",
        "neuroal finetune pruned --data texts.jsonl --steps 500 --lora 8 --target mlp --out tuned",
        "neuroal finetune pruned --data texts.jsonl --steps 1000 --distil --out tuned",
        "neuroal finetune pruned --data texts.jsonl --steps 1000 --out tuned --resume",
    ],
)
@click.argument("run")
@_text("--data", required=True, metavar="SOURCE", help=f"The text: {SOURCES}.")
@_text(
    "--length",
    type=int,
    help="Tokens per window.  [default: the smaller of 512 and the model's context]",
)
@window_options("Text")
@_training("--steps", required=True, type=int, help="Steps of the optimiser.")
@_training("--lora", type=int, metavar="RANK", help="Train low-rank changes under the masks.")
@_training("--full", is_flag=True, help="Train all weights.  [default: unless --lora is given]")
@_training(
    "--target",
    "targets",
    multiple=True,
    metavar="PATTERN",
    help="Linears that --lora changes: a name or glob, first:2, last:1, attention or mlp. May be "
    "repeated.  [default: all]",
)
@_training(
    "--distil",
    is_flag=True,
    help="Learn from the predictions of the dense model, from which RUN was pruned.",
)
@_training("--batch", type=int, default=8, help="Windows per step.")
@_training(
    "--learning-rate",
    type=float,
    help="The highest, after a rise and before a cosine.  [default: 1e-4, with --lora 1e-3]",
)
@_training("--weight-decay", type=float, default=0.0, help="Of AdamW.")
@_training("--seed", type=int, default=0, help="Of the windows and their order.")
@_model("--device", default="auto", help="auto, cpu, cuda or mps.")
@_model(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    help="In which weights are trained; they are saved in their own.",
)
@trust_option
@_run_option("--out", required=True, metavar="DIR", help="Folder to write.")
@_run_option("--overwrite", is_flag=True, help="Replace an earlier run in the folder.")
@_run_option("--resume", is_flag=True, help="Go on with a fine-tuning that was interrupted.")
@_run_option(
    "--save-every",
    type=int,
    help="Steps between the checkpoints that --resume goes on from.  [default: a tenth of --steps]",
)
@_run_option("--dry-run", is_flag=True, help="Say what it will take; write nothing.")
@message_options(json="the report", quiet=True, progress=True)
def finetune(
    run: str,
    data: str,
    length: int | None,
    bos: Bos | None,
    pack_documents: bool | None,
    steps: int,
    lora: int | None,
    full: bool,
    targets: tuple[str, ...],
    distil: bool,
    batch: int,
    learning_rate: float | None,
    weight_decay: float,
    seed: int,
    device: str,
    dtype: str,
    trust_remote_code: bool,
    out: str,
    overwrite: bool,
    resume: bool,
    save_every: int | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    progress: bool,
) -> None:
    """Train what survived in RUN, keep its zeros, and write a run like any other.

    RUN is the output folder of `neuroal prune`. Windows are drawn from the text as for calibration;
    conversations are rendered by the model's chat template. Needs the extra neuroal[finetune].
    """
    if full and lora is not None:
        raise UsageError("--full and --lora exclude each other")
    if save_every is not None and save_every < 1:
        raise UsageError(f"--save-every {save_every} is too low: give at least 1")
    from neuroal.finetune import FineTuning
    from neuroal.finetune import finetune as tune
    from neuroal.model import run_folder
    from neuroal.model.output import one_writer, output_folder
    from neuroal.progress import bar

    settings = FineTuning(
        data=data,
        steps=steps,
        lora=lora,
        targets=targets,
        distil=distil,
        batch=batch,
        length=length,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        dtype=dtype,
        bos=bos or "auto",
        pack_documents=pack_documents,
        seed=seed,
    )
    target = output_folder(out)
    with one_writer(target):  # not in a while, when the training itself asks
        run_folder.check(target, overwrite, resume)
    if resume and not quiet:
        say(run_folder.found(target))

    def tick(total: int, done: int) -> Tick:
        shown = bar(total=total, initial=done, desc="finetune", leave=False, disable=not progress)
        update: Tick = shown.update
        return update

    def foresee(cost: TrainingCost) -> bool:
        if not quiet:
            say(_cost_text(cost))
        return not dry_run

    try:
        with clean_stdout(as_json):
            report = tune(
                run,
                settings,
                target,
                save_every=save_every,
                device=device,
                overwrite=overwrite,
                resume=resume,
                trust_remote_code=trust_remote_code,
                progress=progress,
                tick=tick,
                foresee=foresee,
            )
    except KeyboardInterrupt:
        rest = run_folder.partial(target)
        hint = f"; --resume goes on from '{rest}'" if rest.exists() else ""
        raise Stopped(f"interrupted{hint}") from None
    if report is None:
        return
    if as_json:
        print_json(report.to_json())
    if quiet:
        return
    from neuroal.cli.summary import run_text

    if as_json:
        say(f"written to {target}")
    else:
        echo(run_text(report, target))


def _cost_text(cost: TrainingCost) -> str:
    from neuroal.units import rough_duration, size

    took = rough_duration(cost.seconds, 1)
    return (
        f"this will take about {took}, by a step that was timed, and {size(cost.memory)} of memory"
    )
