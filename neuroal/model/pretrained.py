"""Models by transformers: configuration, structure without weights, loading and saving."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neuroal.errors import NeuroalError
from neuroal.layout import Layout, matrices
from neuroal.model.files import locate
from neuroal.model.memory import available_memory
from neuroal.units import size

_TOKENIZER = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' own progress bars and warnings; its errors are exceptions."""
    from transformers.utils import logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


@contextmanager
def _loading(model: str) -> Iterator[None]:
    """Silence transformers, and turn its errors into one line that names the model."""
    try:
        with quiet():
            yield
    except Exception as error:
        first = next((x.strip() for x in str(error).splitlines() if x.strip()), "")
        local = model == "demo" or Path(model).expanduser().is_dir()
        where = "" if local else "no such folder, and on the hub: "
        what = f"{where}{type(error).__name__}: {first}"
        raise NeuroalError(f"cannot load model '{model}': {what}") from error


def load_config(model: str, trust_remote_code: bool = False) -> Any:
    """Return the model's transformers configuration."""
    from transformers import AutoConfig

    where = locate(model)
    with _loading(model):
        return AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code)


def skeleton(model: str, trust_remote_code: bool = False, dtype: torch.dtype | None = None) -> Any:
    """Return the model on meta tensors: structure without weights.

    Args:
        model: As in `load`.
        trust_remote_code: Let the model's own code run.
        dtype: Of its weights; None is the configuration's.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(model, trust_remote_code)
    _refuse_quantised(model, config)
    named = _named_class(config)
    with _loading(model), torch.device("meta"):
        if named is not None:
            bare = named(config).to(dtype or config.dtype)
        else:
            bare = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, trust_remote_code=trust_remote_code, dtype=dtype or config.dtype
            )
    for module in bare.modules():  # some models ignore the device when they draw weights
        for name, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_meta:
                module._parameters[name] = nn.Parameter(parameter.to("meta"), False)
    return bare.eval()


def _named_class(config: Any) -> Any:
    """Return the class that a configuration names, where AutoModelForCausalLM knows none for it.

    The text part of some multimodal models has a configuration of its own, for instance.
    """
    import transformers

    named = next(iter(config.architectures or ()), "")
    if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING or hasattr(config, "auto_map"):
        return None
    return getattr(transformers, named, None) if named.endswith("ForCausalLM") else None


def one_block(
    model: str,
    device: str,
    dtype: str,
    vocabulary: int | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Return a model of the same shapes with one block and random weights, to be timed.

    Args:
        model: As in `load`.
        device: Where its weights are.
        dtype: As in `load`.
        vocabulary: Number of tokens; None is the model's own, which takes more memory.
        trust_remote_code: Let the model's own code run.

    Raises:
        NeuroalError: A model of this family cannot be built from its configuration.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(model, trust_remote_code)
    kind = config.dtype if dtype == "auto" else getattr(torch, dtype)
    with _loading(model), torch.random.fork_rng(devices=[]):
        config.num_hidden_layers = 1
        if vocabulary is not None:
            config.vocab_size, config.pad_token_id = vocabulary, None
        small: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, trust_remote_code=trust_remote_code, dtype=kind
        )
    result: nn.Module = small.to(device).eval()
    return result


def _refuse_quantised(model: str, config: Any) -> None:
    if getattr(config, "quantization_config", None):
        raise NeuroalError(f"model '{model}' is quantised: prune the original, then quantise")


def load(
    model: str, device: str = "cpu", dtype: str = "auto", trust_remote_code: bool = False
) -> tuple[nn.Module, Any]:
    """Return model and tokenizer, the model in evaluation mode on `device`.

    Raises:
        NeuroalError: The folder or name is no causal language model in safetensors, or memory is
            too small for its weights.
    """
    from transformers import AutoModelForCausalLM

    where = locate(model)
    config = load_config(model, trust_remote_code)
    _refuse_quantised(model, config)
    if Path(where).is_dir():
        _check_memory(model, Path(where), device)
    with _loading(model):
        answer: Any = (_named_class(config) or AutoModelForCausalLM).from_pretrained(
            where,
            output_loading_info=True,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
        )
    loaded, info = answer
    assert isinstance(loaded, nn.Module)
    missing = set(info["missing_keys"]).intersection(dict(loaded.named_parameters()))
    if missing:  # transformers would continue with random numbers
        raise NeuroalError(f"model '{model}' lacks the weight '{min(missing)}'")
    loaded.to(device).eval()
    return loaded, load_tokenizer(model, trust_remote_code)


def load_tokenizer(model: str, trust_remote_code: bool = False) -> Any:
    """Return the model's tokenizer; None where its folder holds none."""
    from transformers import AutoTokenizer

    where = locate(model)
    folder = Path(where)
    if folder.is_dir() and not any(f for pattern in _TOKENIZER for f in folder.glob(pattern)):
        return None
    with _loading(model):
        return AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code)


def _check_memory(model: str, folder: Path, device: str) -> None:
    needed = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    if not needed:
        raise NeuroalError(f"folder '{model}' holds no .safetensors weights")
    free = available_memory(device)
    if free is not None and needed > free:
        raise NeuroalError(
            f"model '{model}' has {size(needed)} of weights, but only "
            f"{size(free)} of memory are available"
        )


def transformers_version() -> str:
    """Return the installed version of transformers."""
    import transformers

    return str(transformers.__version__)


def context_length(config: Any) -> int | None:
    """Return the longest window that the model takes, or None where it does not say."""
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def restore(model: nn.Module, folder: Path, layout: Layout) -> None:
    """Copy the linears' weights of a finished run into the same model in memory."""
    cls: Any = type(model)
    with quiet():
        pruned = cls.from_pretrained(folder, dtype="auto", use_safetensors=True)
    linears = layout.linears
    matrices.write(linears, {n: matrices.weight(x, pruned) for n, x in linears.items()}, model, "")


def file_tensors(model: nn.Module, state: dict[str, Tensor]) -> Mapping[str, Tensor]:
    """Return parameters as `save` writes them: converted and named as in the files."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # before transformers 5, files and memory agree
        return state
    tensors: Mapping[str, Tensor] = revert_weight_conversion(model, state)  # type: ignore[arg-type]
    return tensors


def save(
    model: nn.Module, tokenizer: Any, folder: Path, state: dict[str, Tensor] | None = None
) -> None:
    """Write an ordinary Hugging Face checkpoint: safetensors, config, tokenizer.

    Args:
        model: What is written.
        tokenizer: Its tokenizer, or None.
        folder: Created if it does not exist.
        state: The tensors to write by name; None is all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with quiet():
        model.save_pretrained(folder, state_dict=state)  # type: ignore[operator]
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):  # written for their owner alone by safetensors 0.8
        file.chmod((folder / "config.json").stat().st_mode)
