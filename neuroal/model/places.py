"""Where a model is, and what its folder says of it before torch or transformers are imported."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path

from neuroal.errors import NeuroalError

CONTEXT = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len")
TOKENIZER = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")


def locate(model: str) -> str:
    """Return the folder or hub name that `from_pretrained` takes.

    Args:
        model: "demo", a folder, or a hub name.

    Raises:
        NeuroalError: It is neither, or it holds an adapter or weights that are not safetensors.
    """
    if model == "demo":
        from neuroal.demo import MODEL

        return str(MODEL)
    path = Path(model).expanduser()
    if path.is_dir():
        _check_folder(model, path)
        return str(path)
    if path.suffix == ".gguf":
        raise NeuroalError(f"'{model}' is a GGUF file: {_from_gguf(path.parent, path.name)}")
    hub_name = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", model)
    similar = similar_folder(model)
    if path.exists() or not hub_name or (similar and len(path.parts) > 1):
        meant = f": did you mean '{similar}'?" if similar else ""
        raise NeuroalError(f"model '{model}' is neither a folder, a hub name nor 'demo'{meant}")
    return model


def similar_folder(model: str, holds: Sequence[str] = ("config.json",)) -> str | None:
    """Return the folder whose name is most like one that is not there, if any is.

    Args:
        model: The name that is not there.
        holds: Files of which a folder has to hold one: a model's, where nothing else is said.
    """
    path = Path(model).expanduser()
    if path.exists() or not path.parent.is_dir():
        return None
    folders = [p.name for p in path.parent.iterdir() if any((p / x).is_file() for x in holds)]
    close = difflib.get_close_matches(path.name, folders, n=1)
    return str(Path(model).with_name(close[0])) if close else None


def _check_folder(model: str, folder: Path) -> None:
    """Refuse a folder that is not a whole model in safetensors, and say how to make it one."""
    if (folder / "adapter_config.json").is_file():
        raise NeuroalError(
            f"folder '{model}' holds an adapter, not a whole model: merge it first with peft: "
            f"AutoPeftModelForCausalLM.from_pretrained('{model}').merge_and_unload()"
            ".save_pretrained('MERGED')"
        )
    gguf = next(folder.glob("*.gguf"), None)
    if gguf is not None and not any(folder.glob("*.safetensors")):
        raise NeuroalError(f"folder '{model}' holds GGUF files: {_from_gguf(folder, gguf.name)}")
    if not (folder / "config.json").is_file():
        raise NeuroalError(f"folder '{model}' is no model: it holds no config.json")
    pickled = next(folder.glob("pytorch_model*.bin"), None)
    if pickled is not None and not any(folder.glob("*.safetensors")):
        raise NeuroalError(
            f"folder '{model}' holds {pickled.name}, which may run code when it is read, and no "
            "safetensors: convert it once, if you trust it: "
            f"m = AutoModelForCausalLM.from_pretrained('{model}', use_safetensors=False); "
            "m.save_pretrained('CONVERTED')"
        )


def _from_gguf(folder: Path, name: str) -> str:
    """Return how a GGUF file becomes a model folder."""
    return (
        "convert it once with transformers and the package gguf: "
        f"m = AutoModelForCausalLM.from_pretrained('{folder}', gguf_file='{name}'); "
        "m.save_pretrained('CONVERTED'), and the same with AutoTokenizer"
    )


def local_folder(model: str) -> Path | None:
    """Return the folder of a model; None for a hub name."""
    folder = Path(locate(model))
    return folder if folder.is_dir() else None


def has_tokenizer(model: str) -> bool:
    """Return whether a model's folder holds a tokenizer; of the hub's it is assumed."""
    folder = Path(locate(model))
    return not folder.is_dir() or any(f for x in TOKENIZER for f in folder.glob(x))


def stated_context(model: str) -> int | None:
    """Return the longest window that a model takes, as its config.json states it.

    None where that leaves it to a default, or to code of the model's own, and for a hub name.
    """
    file = Path(locate(model)) / "config.json"
    try:
        stated = json.loads(file.read_text(encoding="utf-8"))
        stated = {} if "auto_map" in stated else stated.get("text_config", stated)
        lengths = [stated[name] for name in CONTEXT if name in stated]
    except (OSError, ValueError, TypeError, AttributeError):  # transformers says what is wrong
        return None
    return next((x for x in lengths if isinstance(x, int) and x > 0), None)
