"""The demo model is a small Llama trained on generated text, and both come with the package."""

from __future__ import annotations

from pathlib import Path

from neuroal.demo.text import documents

MODEL: Path = Path(__file__).resolve().parent / "model"

__all__ = ["MODEL", "documents"]
