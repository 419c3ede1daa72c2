"""The demo model is a small Llama trained on generated text, and both come with the package.

`benchmarks/demo` of the source makes them: `python -m benchmarks.demo`.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

MODEL: Path = Path(__file__).resolve().parent / "model"
TEXTS: Path = MODEL.with_name("texts.jsonl.gz")

__all__ = ["MODEL", "TEXTS", "documents"]


def documents(split: str) -> list[str]:
    """Return the documents of a split, each several hundred tokens long.

    Args:
        split: "calibration" (256 documents) or "heldout" (128).

    Raises:
        ValueError: There is no such split.
    """
    with gzip.open(TEXTS, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    texts = [row["text"] for row in rows if row["split"] == split]
    if not texts:
        raise ValueError(f"unknown split {split!r}; choose calibration or heldout")
    return texts
