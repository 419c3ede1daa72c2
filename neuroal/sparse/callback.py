"""Zeros that stay zero in the Trainer of transformers."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from neuroal.sparse.zeros import KeptZeros, keep_zeros


class KeepZerosCallback(TrainerCallback):
    """Keeps the zeros of the model that a Trainer trains: one of its `callbacks`.

    They are those at the beginning of the training, which may go on from a checkpoint.
    """

    _kept: KeptZeros | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Note the zeros, and keep them from here on."""
        self.on_train_end(args, state, control)
        self._kept = keep_zeros(more["model"])

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Let the zeros go."""
        if self._kept is not None:
            self._kept.remove()
        self._kept = None
