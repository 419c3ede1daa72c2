"""`neuroal pack` and `neuroal unpack`: a sparse checkpoint that is smaller, to the bit the same."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from neuroal.cli.command import (
    Command,
    Stopped,
    clean_stdout,
    echo,
    message_options,
    option,
    print_json,
    say,
)

if TYPE_CHECKING:
    from neuroal.model.packing import Packing

_run_option = partial(option, group="Run")
_NAMED = 3  # matrices


def _output_options(command: Any) -> Any:
    """Add the options of the output folder, which both commands have."""
    for add in (
        _run_option("--resume", is_flag=True, help="Go on where an earlier try was interrupted."),
        _run_option("--overwrite", is_flag=True, help="Replace an earlier run in the folder."),
        _run_option("--out", required=True, metavar="DIR", help="Folder to write."),
    ):
        command = add(command)
    return command


@click.command(
    cls=Command,
    examples=[
        "neuroal pack llama-wanda-neuroal-0.7 --out packed",
        "neuroal pack llama-wanda-neuroal-0.7 --compress --out packed",
        "neuroal evaluate packed --data test.txt",
        "neuroal unpack packed --out again",
    ],
)
@click.argument("run_or_model")
@_run_option(
    "--compress",
    is_flag=True,
    help="Compress masks and values by zstd, too: smaller, and slower to load.",
)
@_output_options
@message_options(json="the bytes", quiet=True, progress=True)
def pack(
    run_or_model: str,
    compress: bool,
    out: str,
    overwrite: bool,
    resume: bool,
    as_json: bool,
    quiet: bool,
    progress: bool,
) -> None:
    """Write a sparse checkpoint without its zeros: smaller, and to the bit the same.

    RUN_OR_MODEL is the folder of a run, or of any model with zeros in its weights. Of every matrix
    that becomes smaller so, a mask of one bit a weight and the values that are not zero are
    written; everything else stays as it is. After `import neuroal`, transformers' from_pretrained
    reads the folder as it read the dense one.
    """
    from neuroal.model import files, packing
    from neuroal.model.output import one_writer, output_folder
    from neuroal.run import pack as packs
    from neuroal.units import size

    if not quiet:
        folder = packing.folder_of(run_or_model)
        packing.check_packable(run_or_model, folder)
        with one_writer(output_folder(out)):  # not in a while, when the packing itself asks
            packs.check_output(output_folder(out), overwrite, resume)
        about = size(packs.expected(folder, compress))
        say(f"packs {size(files.weight_bytes(folder))} of weights into about {about}")
    with clean_stdout(as_json), _interruptible(out):
        found = packs.pack(
            run_or_model,
            out,
            compress=compress,
            overwrite=overwrite,
            resume=resume,
            tick=_bar("pack", progress),
        )
    _tell(found, out, as_json, quiet)


@click.command(
    cls=Command,
    examples=["neuroal unpack packed --out dense", "neuroal unpack packed --resume --out dense"],
)
@click.argument("packed")
@_output_options
@message_options(json="the bytes", quiet=True, progress=True)
def unpack(
    packed: str,
    out: str,
    overwrite: bool,
    resume: bool,
    as_json: bool,
    quiet: bool,
    progress: bool,
) -> None:
    """Write the folder that was packed: the same files of weights, by their SHA-256.

    PACKED is a folder that neuroal pack, or neuroal prune --save-packed, has written.
    """
    from neuroal.run import pack as packs

    with clean_stdout(as_json), _interruptible(out):
        found = packs.unpack(
            packed, out, overwrite=overwrite, resume=resume, tick=_bar("unpack", progress)
        )
    _tell(found, out, as_json, quiet)


class _interruptible:
    """Says how to go on, where Ctrl-C has left something to go on with."""

    def __init__(self, out: str) -> None:
        self._out = Path(out)

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        from neuroal.model import run_folder

        if kind is KeyboardInterrupt:
            rest = run_folder.partial(self._out)
            hint = f"; --resume goes on from '{rest}'" if rest.exists() else ""
            raise Stopped(f"interrupted{hint}") from None


def _bar(title: str, shown: bool) -> Callable[[int], Callable[[int], object]]:
    from neuroal.progress import bar

    def tick(total: int) -> Callable[[int], object]:
        update: Callable[[int], object] = bar(
            total=total, desc=title, unit="B", unit_scale=True, disable=not shown, leave=False
        ).update
        return update

    return tick


def _tell(found: Packing, out: str, as_json: bool, quiet: bool) -> None:
    """Say what was written, and which matrices stay as they are."""
    from neuroal.cli.tables import table
    from neuroal.units import size

    if as_json:
        print_json(found.to_json() | {"out": out})
    if quiet:
        return
    if as_json:
        say(f"written to {out}")
        return
    had, has = (sum(getattr(x, key) for x in found.packed) for key in ("dense", "bytes"))
    rows = [
        ("weights, dense", f"{found.dense:,} bytes ({size(found.dense)})"),
        ("weights, as written", f"{found.bytes:,} bytes, {found.bytes / found.dense:.4f} of these"),
    ]
    if found.packed:
        rows.append(
            (
                "packed",
                f"{len(found.packed)} matrices: {had:,} bytes into {has:,}, {found.share():.4f}",
            )
        )
    rows.append(("written to", out))
    notes = list(found.notes)
    if found.packed and found.left:
        names = ", ".join(x.name for x in found.left[:_NAMED])
        more = f" and {len(found.left) - _NAMED} more" if len(found.left) > _NAMED else ""
        notes.insert(0, f"stay as they are, which is smaller: {names}{more}")
    if found.matrices and not found.packed:
        notes.insert(0, "nothing is smaller packed: no matrix has enough zeros")
    echo("\n\n".join([table(rows), *(f"Note: {x}" for x in notes)]))
