"""The command that makes the demo's texts and its model anew."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path

import click

from neuroal.demo import MODEL, TEXTS

from .text import documents

SHIPPED = ("calibration", "heldout")


def texts_file() -> bytes:
    """The file of the shipped texts holds a row a document, and no time of day.

    Returns:
        JSON lines of the columns "split" and "text", compressed by gzip.
    """
    rows = [{"split": split, "text": text} for split in SHIPPED for text in documents(split)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    return gzip.compress(lines.encode("utf-8"), compresslevel=9, mtime=0)


@click.group(context_settings={"max_content_width": 100})
def main() -> None:
    r"""Make the demo's texts and its model anew, in neuroal/demo.

    \b
    python -m benchmarks.demo texts    a second; the same texts on every machine
    python -m benchmarks.demo model    minutes on two cores; other bits on another machine

    Run it in the root of the checkout. Results that were published on the demo model belong to
    the weights that are there: train another with --out, and compare before you replace them.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")


@main.command()
@click.option("--out", type=Path, default=TEXTS, show_default="in neuroal/demo", metavar="FILE")
def texts(out: Path) -> None:
    """Write the calibration and held-out documents."""
    out.write_bytes(texts_file())


@main.command()
@click.option("--out", type=Path, default=MODEL, show_default="in neuroal/demo", metavar="DIR")
@click.option("--steps", default=3000, show_default=True, help="training steps")
@click.option("--seed", default=0, show_default=True, help="of weights and windows")
def model(out: Path, steps: int, seed: int) -> None:
    """Train the model on the generated text."""
    from . import train

    train.make(out, steps, seed)


if __name__ == "__main__":
    main()
