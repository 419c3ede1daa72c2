"""Training that keeps the zeros of a pruned model: for anyone's own loop, and for `finetune`.

zeros     `keep_zeros`: zeros stay zero under any optimiser
callback  `KeepZerosCallback`: the same for the Trainer of transformers
lora      `masked_lora`: low-rank changes of the weights that survive
adapters  `merge_under_mask`: an adapter that peft has trained without masks
"""

from typing import TYPE_CHECKING, Any

from neuroal.sparse.adapters import MergedAdapter, merge_under_mask
from neuroal.sparse.lora import MaskedLora, masked_lora
from neuroal.sparse.zeros import KeptZeros, keep_zeros

if TYPE_CHECKING:
    from neuroal.sparse.callback import KeepZerosCallback

__all__ = [
    "KeepZerosCallback",
    "KeptZeros",
    "MaskedLora",
    "MergedAdapter",
    "keep_zeros",
    "masked_lora",
    "merge_under_mask",
]


def __getattr__(name: str) -> Any:
    if name == "KeepZerosCallback":  # loads transformers
        from neuroal.sparse.callback import KeepZerosCallback

        return KeepZerosCallback
    raise AttributeError(f"module 'neuroal.sparse' has no attribute '{name}'")
