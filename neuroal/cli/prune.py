"""`neuroal prune`: a model and a recipe to a pruned checkpoint."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from neuroal.cli.command import (
    SOURCES,
    Command,
    Stopped,
    allow_option,
    clean_stdout,
    echo,
    keep_options,
    leads,
    message_options,
    option,
    print_json,
    ratios,
    say,
    seconds,
    trust_option,
    window_options,
)
from neuroal.cli.recipe import default_out, read_recipe, recipe_of, unnamed
from neuroal.errors import UsageError
from neuroal.recipe import DTYPES, Recipe

if TYPE_CHECKING:
    from neuroal.cost.preparation import Prepared
    from neuroal.run.report import Report

_DEFAULT = Recipe()
_PLUGIN = "NAME"
_method = partial(option, group="Method")
_calibration = partial(option, group="Calibration")
_evaluation = partial(option, group="Evaluation")
_model = partial(option, group="Model")
_run_option = partial(option, group="Run")


@click.command(
    cls=Command,
    examples=[
        "neuroal prune demo --sparsity 0.7",
        "neuroal prune path/to/llama --calibration texts.jsonl --effort high --out pruned",
        "neuroal prune path/to/llama --calibration texts.jsonl --within 10m --out pruned",
        "neuroal prune path/to/llama --calibration texts.jsonl --sparsity 0.6 --out pruned",
        "neuroal prune demo --pruner magnitude --top-up uniform -o magnitude.comparison=matrix",
        "neuroal prune demo --pruner ./mine.py:Mine --top-up neuroal-block",
        "neuroal prune demo --pattern 2:4 --dry-run",
        "neuroal prune demo --pattern 2:4 --keep first:1 --keep '*.o_proj' --out kept",
        "neuroal prune path/to/llama --calibration texts.jsonl --stream --spill --out pruned",
        "neuroal prune path/to/llama --calibration texts.jsonl --evaluate wikitext2 --out pruned",
        "neuroal prune path/to/llama --calibration texts.jsonl --save-packed --out packed",
        "neuroal prune --recipe pruned/neuroal.json --seed 1 --out again",
    ],
)
@click.argument("model", required=False)
@_method(
    "--sparsity",
    type=ratios,
    metavar="NUMBER[,...]",
    help="Ratio to prune, in [0, 1); several are ratios over depth, from the first block to the "
    "last, in place of a search.  [default: an allocation's own, else 0.5]",
)
@_method(
    "--effort",
    metavar="LEVEL",
    help="How much to spend, where you name no method: low, medium, high or max, presets that "
    "choose the pruner too.  [default: medium, where no method is named]",
)
@_method(
    "--within",
    type=seconds,
    metavar="TIME",
    help="Choose effort, samples and length by what this machine does in 90s, 10m or 1.5h.",
)
@_method(
    "--pruner",
    default=_DEFAULT.pruner,
    metavar=_PLUGIN,
    show_default=False,
    help="Base pruner: a name from `neuroal plugins list`, distribution:name, or ./mine.py:Mine.  "
    f"[default: the effort's, or {_DEFAULT.pruner} beside another part of a method]",
)
@_method(
    "--top-up",
    default=_DEFAULT.top_up,
    metavar=_PLUGIN,
    show_default=False,
    help="Preset that decides the ratios: uniform, neuroal, owl and more: `neuroal plugins list`.  "
    f"[default: the effort's, or {_DEFAULT.top_up} beside another part of a method]",
)
@_method(
    "--block-ratios",
    multiple=True,
    metavar=_PLUGIN,
    help="In place of the preset's; given more than once, they compete.",
)
@_method("--row-ratios", metavar=_PLUGIN, help="In place of the preset's.")
@_method("--alignment", metavar=_PLUGIN, help="In place of the preset's metric.")
@_method(
    "--refiner",
    metavar=_PLUGIN,
    help="Goes over the masks of the final pruning; none removes the preset's.",
)
@_method(
    "--reconstruction",
    metavar=_PLUGIN,
    help="Gives the surviving weights new values: refit, block; none removes the preset's.",
)
@_method(
    "--search-pruner",
    metavar=_PLUGIN,
    help="Prunes the candidates of the search, where that is not the pruner: a quicker one, or one "
    "that is closer to what is saved.",
)
@_method(
    "-o",
    "plugin_options",
    multiple=True,
    metavar="PLUGIN.KEY=VALUE",
    help="Option of a plugin: see `neuroal plugins show PLUGIN`.",
)
@_method(
    "--pattern",
    default=_DEFAULT.pattern,
    metavar="PATTERN",
    help="unstructured, or N:M such as 2:4, which keeps N of every M inputs of a row.",
)
@_method(
    "--comparison",
    type=click.Choice(["row", "matrix"]),
    help="Scores compete within a row or a whole matrix.  [default: the pruner's own]",
)
@_calibration(
    "--all-experts",
    is_flag=True,
    help="Score every expert by all tokens, not only those routed to it.",
)
@_method(
    "--skip-indivisible", is_flag=True, help="Leave linears dense whose inputs M does not divide."
)
@keep_options
@option(
    "--sparsity-over",
    group="Linears",
    type=click.Choice(["pruned", "all"]),
    default=_DEFAULT.sparsity_over,
    help="The sparsity is that of the linears that are pruned, or of all linears of the blocks.",
)
@_method(
    "--keep-zeros/--no-keep-zeros",
    default=_DEFAULT.keep_zeros,
    help="Weights that are zero already stay zero, where they are at least a tenth of a linear's.",
)
@_method(
    "--budget",
    type=click.Choice(["exact", "paper"]),
    default=_DEFAULT.budget,
    help="exact meets the sparsity to the weight; paper rounds and clips as published.",
)
@_method(
    "--allocation",
    metavar="FILE",
    help="Ratios of an earlier run (its folder or allocation.safetensors), and importance, "
    "in place of a search; a --sparsity shifts them, or is that of linears it does not name.",
)
@_calibration("--calibration", metavar="SOURCE", help=f"{SOURCES}.".capitalize())
@_calibration(
    "--samples", default=_DEFAULT.samples, help="Calibration windows of the final pruning."
)
@_calibration(
    "--search-samples",
    type=int,
    help="How many of them the search uses.  [default: the top-up's own, 8 for most]",
)
@_calibration(
    "--length",
    type=int,
    help="Tokens per window.  [default: the smaller of 2048 and the model's context]",
)
@window_options("Calibration", unless=" (not under --budget paper)")
@_calibration("--seed", default=_DEFAULT.seed, help="Of every random draw.")
@_evaluation(
    "--evaluate",
    multiple=True,
    metavar="SOURCE",
    help="Measure the perplexity of the dense and of the pruned model on a text, named as that of "
    "--calibration is; may be given more than once.",
)
@_evaluation(
    "--evaluate-length",
    type=int,
    help="Tokens per window of it.  [default: the smaller of 2048 and the model's context]",
)
@_evaluation("--evaluate-windows", type=int, help="At most so many windows.  [default: all]")
@_model(
    "--device", metavar="DEVICE", default=_DEFAULT.device, help="auto, cpu, cuda, cuda:0 or mps."
)
@_model(
    "--dtype",
    type=click.Choice(DTYPES),
    default=_DEFAULT.dtype,
    help="Dtype to load and save the weights in; auto is the checkpoint's own.",
)
@_model(
    "--search-dtype",
    type=click.Choice(DTYPES),
    default=_DEFAULT.search_dtype,
    help="Dtype in which the search runs the blocks; bfloat16 is faster and may choose another λ.",
)
@_model("--batch", type=int, help="Windows that pass a block together.  [default: by their tokens]")
@trust_option
@_run_option(
    "--recipe",
    "recipe_file",
    metavar="FILE",
    help="Repeat the run of a neuroal.json, or do what a recipe says (.json or .toml); what is "
    "given beside it overrides.",
)
@allow_option
@_run_option(
    "--out",
    metavar="DIR",
    help="Folder to write.  [default: named after model, method, sparsity and what else is given]",
)
@_run_option("--overwrite", is_flag=True, help="Replace an earlier run in the folder.")
@_run_option("--resume", is_flag=True, help="Go on with a run that was interrupted.")
@_run_option(
    "--stream/--no-stream",
    default=None,
    help="Read blocks from the disk one at a time; the result is the same.  [default: where the "
    "model would not fit into memory]",
)
@_run_option(
    "--spill/--no-spill",
    default=None,
    help="Hold activations between blocks on the disk of --out; the result is the same.  [default: "
    "where they would not fit into memory]",
)
@_run_option(
    "--save-masks",
    is_flag=True,
    help="Write masks.safetensors too, one bit a weight, for `neuroal apply`.",
)
@_run_option(
    "--save-packed",
    is_flag=True,
    help="Write the weights packed, as `neuroal pack` does: smaller, and to the bit the same.",
)
@_run_option("--dry-run", is_flag=True, help="Show the plan; load no weights, write nothing.")
@message_options(json="the report (or the plan)", quiet=True, progress=True)
@click.pass_context
def prune(
    ctx: click.Context,
    /,
    model: str | None,
    plugin_options: tuple[str, ...],
    recipe_file: str | None,
    allow_plugin_files: bool,
    trust_remote_code: bool,
    out: str | None,
    overwrite: bool,
    resume: bool,
    stream: bool | None,
    spill: bool | None,
    save_masks: bool,
    save_packed: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    progress: bool,
    **_: Any,  # the fields of the recipe, which `recipe_of` reads
) -> None:
    """Prune MODEL and write an ordinary Hugging Face checkpoint with a report.

    MODEL is a folder, a hub name, or demo, the built-in model, which brings its own calibration.
    """
    recorded = read_recipe(recipe_file)
    recipe = recipe_of(ctx, recorded, plugin_options, allow_plugin_files)
    if recipe.model is None:
        raise UsageError("give a MODEL (a folder, a hub name or demo) or --recipe FILE")
    from neuroal.run import mistakes

    mistakes.check(recipe)
    from neuroal.model import run_folder
    from neuroal.model.output import one_writer, output_folder

    target = output_folder(out or default_out(recipe))
    held = {"stream": stream, "spill": spill, "save_masks": save_masks}
    if dry_run:
        if leads():
            _dry_run(recipe, target, trust_remote_code, as_json, **held)
        return
    says = leads() and not quiet
    if leads():
        with one_writer(target):  # not in a while, when the run itself asks
            run_folder.check(target, overwrite, resume)
    found, finished = run_folder.found(target) if says and resume else "", target.exists()
    if found and not finished:  # whether a finished run is this one is still to be seen
        say(found)
    ready = _say_how_long(recipe, trust_remote_code, **held) if says else None
    options = {"overwrite": overwrite, "resume": resume, **held}
    options |= {"trust_remote_code": trust_remote_code, "progress": progress}
    options |= {"save_packed": save_packed}
    with clean_stdout(as_json):
        report = _run(recipe, target, prepared=ready, **options)
    if not leads():
        return
    if found and finished:
        say(found)
    if as_json:
        print_json(report.to_json())
    if quiet:
        return
    from neuroal.cli.summary import changes, run_text

    if as_json:
        say(f"written to {target}")
    else:
        echo(run_text(report, target))
    if unnamed(ctx) and recipe.top_up != _DEFAULT.top_up:
        say(
            f"no method is named: this was --effort {recipe.top_up}; the paper's is --top-up "
            f"{_DEFAULT.top_up}"
        )
    for change in changes(recorded, report):
        say(f"Warning: {change}")


def _dry_run(recipe: Recipe, target: Path, trust: bool, as_json: bool, **held: Any) -> None:
    """Show the plan, having read the text but no weight."""
    from neuroal.cli.summary import plan_json, plan_text
    from neuroal.cost.estimate import check_space
    from neuroal.cost.plan import plan
    from neuroal.cost.preparation import prepare, with_its_calibration
    from neuroal.model import pretrained
    from neuroal.run.windows import look

    with clean_stdout(as_json):
        prepared = prepare(with_its_calibration(recipe), trust_remote_code=trust)
        check_space(prepared, held["stream"], held["spill"], None)
        tokenizer = pretrained.load_tokenizer(str(recipe.model), trust)
        text = look(prepared.recipe, prepared.model, tokenizer)
        price = plan(prepared, timed=True, text=text, **held)
    if as_json:
        print_json(plan_json(price))
    else:
        echo(plan_text(price, target))


def _say_how_long(recipe: Recipe, trust: bool, **held: Any) -> Prepared:
    """Prepare a run, and say of a long one how long it will take; what is short is not timed."""
    from neuroal.cli.summary import duration
    from neuroal.cost.estimate import check_space
    from neuroal.cost.plan import HOURS, LONG, plan, with_seconds
    from neuroal.cost.preparation import check_calibrated, prepare, with_its_calibration
    from neuroal.run.setup import setup

    recipe = with_its_calibration(recipe)
    plugins = setup(recipe)
    check_calibrated(recipe, plugins.reads_data)
    prepared = prepare(recipe, plugins=plugins, trust_remote_code=trust)
    check_calibrated(recipe, prepared.reads_data)
    check_space(prepared, held["stream"], held["spill"], None)
    price = plan(prepared, **held)
    if price.operations > LONG:
        price = with_seconds(price)
        about = "" if price.open_ended else "about "
        long = sum((price.seconds or {}).values()) > HOURS
        shorter = ": shorter with --within 30m, --effort low, or fewer --samples" if long else ""
        say(f"this will take {about}{duration(price)}{shorter}")
    return prepared


def _run(recipe: Recipe, out: Path, **options: Any) -> Report:
    from neuroal import engine
    from neuroal.model import run_folder

    assert recipe.model is not None
    try:
        return engine.prune(recipe.model, recipe=recipe, out=out, **options)
    except KeyboardInterrupt:
        rest = run_folder.partial(out)
        hint = f"; --resume goes on from '{rest}'" if rest.exists() else ""
        raise Stopped(f"interrupted{hint}") from None
