"""Packed folders as a quantisation method of transformers: `from_pretrained` reads them.

A quantizer of transformers sees a tensor when it has been renamed, cast and merged with others. A
packed matrix has to be whole before that, so that names in the files decide, as for any model. So
this one changes how transformers opens a safetensors file: a packed one is read as the dense one,
and everything else happens as for the dense one. What comes out is an ordinary model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors
from transformers import modeling_utils
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from neuroal.errors import NeuroalError
from neuroal.packed.form import METHOD, VERSION
from neuroal.packed.reading import packed


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):
    """What `config.json` says of a packed folder."""

    def __init__(self, version: str = VERSION, **_: Any) -> None:
        """Take the version of the format."""
        self.quant_method: Any = METHOD
        self.version = version
        self.dequantize = True  # what is loaded is no longer packed


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):
    """Gives the dense weights, to the bit."""

    requires_calibration = True  # a model in memory is not packed: `neuroal pack` does that

    def validate_environment(self, *args: Any, device_map: Any = None, **_: Any) -> None:
        """Have packed files opened as dense ones.

        Raises:
            NeuroalError: The folder is of another version, or weights are to stay on the disk.
        """
        version = getattr(self.quantization_config, "version", None)
        if version != VERSION:
            raise NeuroalError(f"packed in version {version!r:.20}: this neuroal reads {VERSION}")
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise NeuroalError("packed weights cannot be left on the disk: `neuroal unpack` first")
        opens: Any = modeling_utils
        opens.safe_open = _open

    def _convert_model_for_quantization(self, model: Any) -> None:
        """Leave modules as they are; transformers 4 replaces experts here, and needs accelerate."""

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        """Leave an ordinary model."""
        for holder, name in (
            (model, "hf_quantizer"),
            (model, "is_quantized"),
            (model, "quantization_method"),
            (model.config, "quantization_config"),
            (model.config, "_pre_quantization_dtype"),  # of transformers 4
        ):
            if hasattr(holder, name):
                delattr(holder, name)
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """Return that the model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the model can be trained."""
        return True


def _open(file: Any, *args: Any, **options: Any) -> Any:
    """Open a safetensors file as `safetensors.safe_open` does, a packed one as the dense one."""
    return packed(Path(file)) or safetensors.safe_open(file, *args, **options)
