"""Packed folders made known to transformers, which `import neuroal` must not import.

Transformers has a registry of quantisation methods but no entry points for it. So the import of
the module that holds the registry is watched, and followed by ours.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_REGISTRY = "transformers.quantizers.auto"


def register() -> None:
    """Register packed folders now if transformers' registry is imported, else when it is."""
    if _REGISTRY in sys.modules:
        importlib.import_module("neuroal.model.quantizer")
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


class _Watch:
    """Finds nothing itself; has the registry's own loader register packed folders at its end."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of the registry as others find it; None for every other module."""
        if name != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                register()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
