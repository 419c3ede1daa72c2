"""What was asked of a fine-tuning."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from neuroal.errors import UsageError
from neuroal.types import Bos

LENGTH = 512  # tokens of a window of text, if the model's context allows
RATES = {"full": 1e-4, "lora": 1e-3}


@dataclass(frozen=True)
class FineTuning:
    """What decides a fine-tuning, beside the run and the text.

    Attributes:
        data: Source of the text, as for calibration.
        steps: Steps of the optimiser (AdamW; the rate rises over the first twentieth, and falls
            along a cosine).
        lora: Rank of low-rank changes under the masks; None trains all weights.
        targets: Linears that `lora` changes, as patterns; none means all of the blocks.
        distil: Learn from the dense model's predictions in place of the text's next tokens.
        batch: Windows per step.
        length: Tokens per window; None is the smaller of 512 and the model's context, or that of
            rows of token ids.
        learning_rate: The highest; None is 1e-4, or 1e-3 with `lora`.
        weight_decay: Of AdamW.
        dtype: In which the weights are held while they are trained; they are saved in their own.
        bos: Whether windows begin with the beginning-of-sequence token: as in `Recipe`.
        pack_documents: Whether documents are joined: as in `Recipe`.
        seed: Of the windows and their order.
    """

    data: str
    steps: int
    lora: int | None = None
    targets: tuple[str, ...] = ()
    distil: bool = False
    batch: int = 8
    length: int | None = None
    learning_rate: float | None = None
    weight_decay: float = 0.0
    dtype: str = "float32"
    bos: Bos = "auto"
    pack_documents: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what makes no sense.

        Raises:
            UsageError: A number is out of range, or an option would not be read.
        """
        for name in ("steps", "batch", "lora"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} {value} is too low: give at least 1")
        if not 0 < self.rate < 1:
            raise UsageError(f"learning rate {self.rate:g} is not between 0 and 1")
        if self.weight_decay < 0:
            raise UsageError(f"weight decay {self.weight_decay:g} is negative")
        if self.targets and self.lora is None:
            raise UsageError("targets are for low-rank changes: give a rank (--lora)")
        if self.dtype == "float16":
            raise UsageError("float16 overflows in training: give float32 or bfloat16")

    @property
    def rate(self) -> float:
        """Return the learning rate."""
        default = RATES["full" if self.lora is None else "lora"]
        return default if self.learning_rate is None else self.learning_rate

    @property
    def method(self) -> str:
        """Return what is trained, and on what, in a few words."""
        what = "all weights" if self.lora is None else f"low-rank changes of rank {self.lora}"
        return what + (", distilled from the dense model" if self.distil else "")

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self) | {"learning_rate": self.rate, "targets": list(self.targets)}
