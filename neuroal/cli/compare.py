"""`neuroal compare`: two runs, or allocations, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from neuroal.cli.command import (
    Command,
    check_needed,
    clean_stdout,
    echo,
    load_options,
    message_options,
    option,
    print_json,
    text_options,
    trust_option,
)
from neuroal.cli.tables import table
from neuroal.types import Bos
from neuroal.units import begun_with, parameters

if TYPE_CHECKING:
    from neuroal.evaluation.compare import MeasuredRun
    from neuroal.evaluation.comparison import ComparedSide, Line


@click.command(
    cls=Command,
    examples=[
        "neuroal compare demo-wanda-neuroal-0.7 demo-wanda-uniform-0.7",
        "neuroal compare wanda ria --data test.txt --length 256",
        "neuroal compare one/allocation.safetensors two/allocation.safetensors --all",
        "neuroal compare wanda ria --json",
    ],
)
@click.argument("a")
@click.argument("b")
@text_options("Measure both on a text")
@option("--all", "every", group="Table", is_flag=True, help="Show every linear, not blocks alone.")
@load_options
@trust_option
@message_options(json="the comparison", progress=True)
def compare(
    a: str,
    b: str,
    data: str | None,
    length: int | None,
    windows: int | None,
    bos: Bos | None,
    pack_documents: bool | None,
    every: bool,
    device: str,
    dtype: str,
    trust_remote_code: bool,
    as_json: bool,
    progress: bool,
) -> None:
    """Show two runs, or two allocations, of one model side by side.

    A and B are output folders of neuroal prune, or allocation.safetensors files. Of runs it shows
    what was asked for differently, the ratios achieved in every block, and how far the masks agree:
    intersection over union of what is pruned, and the share of weights that both treat alike; and
    the perplexities that were kept with the runs, with the excess over the dense model's. With
    an allocation on one side, the ratios are the wanted ones. Ratios of rows and importance, where
    there are any, are shown by how far they are apart.
    """
    how = {"length": length, "windows": windows, "bos": bos, "pack_documents": pack_documents}
    check_needed("--data", data, **how)
    if data is not None:
        from neuroal.run.mistakes import check_text

        check_text(data, None, windows, length)
    from neuroal.evaluation.compare import compare as put_side_by_side

    with clean_stdout(as_json):
        found = put_side_by_side(
            a,
            b,
            data=data,
            length=length,
            windows=windows,
            bos=bos or "auto",
            pack_documents=pack_documents,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if as_json:
        print_json(found.to_json())
    else:
        sides = (found.a, found.b)
        echo("\n\n".join(_texts(sides, found.runs, found.blocks, found.overall, every)))


def _texts(
    sides: tuple[ComparedSide, ComparedSide],
    measured: Sequence[MeasuredRun],
    blocks: Sequence[Line],
    total: Line,
    every: bool,
) -> Iterator[str]:
    from neuroal.evaluation.comparison import differences

    yield table(_summary(sides, measured), ("", "A", "B"))
    if measured:
        other = [(key, _short(x), _short(y)) for key, x, y in differences(sides[0], sides[1])]
        yield table(other, ("asked for differently", "A", "B")) or "Both were asked for the same."
    headers = ["block", "linear"] if every else ["block"]
    headers += ["ratio A", "ratio B", "B − A"]
    headers += ["IoU of masks", "equal share"] if measured else []
    headers += ["rows apart"] if total.rows is not None else []
    headers += ["importance apart"] if total.importance is not None else []
    yield table(_rows(blocks, total, every), headers, right=range(1 + every, len(headers)))
    if not measured:
        yield "The ratios are the wanted ones, as the allocations have them."


def _rows(blocks: Sequence[Line], total: Line, every: bool) -> Iterator[tuple[object, ...]]:
    for block in (*blocks, total):
        yield (block.name, *(("all",) if every else ()), *_numbers(block))
        for line in block.linears if every else ():
            yield None, line.name.removeprefix(f"{block.name}."), *_numbers(line)


def _numbers(line: Line) -> tuple[str, ...]:
    numbers: tuple[str, ...] = (f"{line.a:.4f}", f"{line.b:.4f}", f"{line.b - line.a:+.4f}")
    if line.masks is not None:
        numbers += (f"{line.masks.overlap:.4f}", f"{line.masks.share:.4f}")
    if line.rows is not None:
        numbers += (f"{line.rows:.4f}",)
    if line.importance is not None:
        numbers += (f"× {line.importance:.3f}",)
    return numbers


def _summary(
    sides: tuple[ComparedSide, ComparedSide], measured: Sequence[MeasuredRun]
) -> Iterator[tuple[object, ...]]:
    from neuroal.evaluation.comparison import evaluations
    from neuroal.evaluation.quality import title

    yield "", *(side.name for side in sides)
    reports = [side.report for side in sides]
    if any(reports):
        yield "sparsity", *(r and f"{r['sparsity']['achieved']:.6f}" for r in reports)
        yield "misalignment", *(r and _misalignment(r) for r in reports)
        yield "seconds", *(r and f"{sum(r['timings'].values()):.1f}" for r in reports)
    for pair in evaluations(*sides):
        entry = next(x for x in pair if x)
        text = f"perplexity, {title(entry['data'])} ({entry['dtype']})"
        yield text, *(x and _with_excess(x) for x in pair)
    perplexities = [x.perplexity for x in measured if x.perplexity is not None]
    if perplexities:
        yield "perplexity", *(f"{x.perplexity:.4f}" for x in perplexities)
        yield (
            "on",
            *(
                f"{x.data}, {x.windows} windows of {x.length}{begun_with(x.bos)}, {x.dtype}"
                for x in perplexities
            ),
        )


def _with_excess(entry: Mapping[str, Any]) -> str:
    text = f"{float(entry['perplexity']):.4f}"
    return text if entry["excess"] is None else f"{text} (excess {float(entry['excess']):.4f})"


def _misalignment(report: Any) -> str:
    chosen = [c for c in report["candidates"] if c["selected"] and c["misalignment"] is not None]
    if not chosen:
        return "not searched"
    return f"{chosen[-1]['misalignment']:.6g} ({parameters(chosen[-1]['parameters'])})"


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
