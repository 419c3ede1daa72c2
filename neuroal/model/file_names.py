"""Which parameter of a model a tensor in its files goes to, by transformers' own rules."""

from __future__ import annotations

from typing import Any


class FileNames:
    """Names of file tensors, and the parameters and buffers that they are loaded into.

    Some families have other names in their files than in memory, or several tensors there for one
    parameter here (experts).
    """

    def __init__(self, model: Any) -> None:
        """Read the rules of a model of transformers; on any device, meta included."""
        self._known = dict.fromkeys(model.state_dict(), True)
        self._rename: Any = None
        self._base = model.base_model_prefix
        try:
            from transformers import conversion_mapping, core_model_loading
        except ImportError:  # before transformers 5, files and memory agree but for the prefix
            return
        rules: Any = conversion_mapping.get_model_conversion_mapping(model)
        renamings = [r for r in rules if isinstance(r, core_model_loading.WeightRenaming)]
        converters = [r for r in rules if isinstance(r, core_model_loading.WeightConverter)]
        self._rules: tuple[list[Any], list[Any]] = (renamings, converters)
        self._rename = core_model_loading.rename_source_key

    def parameter(self, tensor: str) -> str:
        """Return the name of the (first) parameter that a file tensor goes to."""
        if self._rename is None:
            names = (tensor, f"{self._base}.{tensor}", tensor.removeprefix(f"{self._base}."))
            return next((name for name in names if name in self._known), tensor)
        name, _ = self._rename(tensor, *self._rules, self._base, self._known)
        if name not in self._known and tensor in self._known:
            name, _ = self._rename(tensor, [], [], self._base, self._known)
        return str(name)

    def reads(self, tensor: str) -> bool:
        """Return whether the model has a place for a file tensor."""
        return self.parameter(tensor) in self._known
