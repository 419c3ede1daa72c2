"""Models by transformers: configuration, structure without weights, loading and saving."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neuroal.errors import NeuroalError
from neuroal.layout import Layout, matrices
from neuroal.model.file_names import FileNames
from neuroal.model.files import Shards, weight_bytes, weight_files
from neuroal.model.memory import available_memory
from neuroal.model.places import CONTEXT, TOKENIZER, has_tokenizer, locate, similar_folder
from neuroal.packed.form import METHOD
from neuroal.units import size

_TOKENIZER_GROWS = 13  # times a tokenizer.json of 262,144 tokens, and of 49,152


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
def _loading(named: str, model: str | None = None) -> Iterator[None]:
    """Silence transformers, and turn its errors into one line that names the model.

    `model` is where it is, if `named` says more than that.
    """
    model = model or named
    try:
        with quiet():
            yield
    except Exception as error:
        first = next((x.strip() for x in str(error).splitlines() if x.strip()), "")
        local = model == "demo" or Path(model).expanduser().is_dir()
        similar = similar_folder(model)
        meant = f" (did you mean '{similar}'?)" if similar else ""
        where = "" if local else f"no such folder{meant}, and on the hub: "
        what = f"{where}{type(error).__name__}: {first}"
        more = named.removeprefix(model)
        raise NeuroalError(f"cannot load model '{model}'{more}: {what}") from error


def load_config(model: str, trust_remote_code: bool = False) -> Any:
    """Return the model's transformers configuration."""
    where = locate(model)  # before the library is there: it takes seconds
    from transformers import AutoConfig

    with _loading(model):
        config = AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code)
    if quantisation(config) == METHOD:  # the weights are those of an ordinary model
        del config.quantization_config
    return config


def skeleton(model: str, trust_remote_code: bool = False, dtype: torch.dtype | None = None) -> Any:
    """Return the model on meta tensors: structure without weights.

    Args:
        model: As in `load`.
        trust_remote_code: Let the model's own code run.
        dtype: Of its weights; None is the configuration's.
    """
    config = load_config(model, trust_remote_code)
    _refuse_quantised(model, config)
    with _loading(model), torch.device("meta"):
        bare = _build(config, trust_remote_code, dtype or config.dtype)
    for module in bare.modules():  # some models ignore the device when they draw weights
        for name, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_meta:
                module._parameters[name] = nn.Parameter(parameter.to("meta"), False)
    folder = Path(locate(model))
    if folder.is_dir() and weight_files(folder):
        _refuse_surplus(model, bare, list(Shards(folder).ranges))
    return bare.eval()


def _refuse_surplus(model: str, built: Any, tensors: Iterable[str]) -> None:
    """Refuse file tensors of blocks, or experts, that the configuration leaves out.

    What else a model's class does not read is carried over. So are the layers that predict further
    tokens and stand behind the blocks: the class or the configuration says of them that it does not
    read them.
    """
    names = FileNames(built)
    ignored = getattr(built, "_keys_to_ignore_on_load_unexpected", None) or ()
    known = dict(built.state_dict())
    further = getattr(text_config(built.config), "num_nextn_predict_layers", None) or 0
    for tensor in sorted(tensors):
        name = names.parameter(tensor)
        if name in known or any(re.search(x, y) for x in ignored for y in (tensor, name)):
            continue
        for place in re.finditer(r"\.(\d+)\.", name):
            prefix, number = name[: place.start() + 1], int(place[1])
            held = {k[len(prefix) :].partition(".")[0] for k in known if k.startswith(prefix)}
            if held and str(number) not in held and number >= len(held) + further:
                raise NeuroalError(
                    f"model '{model}' holds the weight '{tensor}', but its config.json has "
                    f"{len(held)} of '{prefix.rstrip('.')}': correct the number"
                )


def _build(config: Any, trust_remote_code: bool, dtype: torch.dtype) -> Any:
    """Return a model of a configuration, on the default device; its weights mean nothing."""
    cls = _class_of(config)
    if hasattr(cls, "from_config"):  # one of transformers' Auto classes
        return cls.from_config(config, trust_remote_code=trust_remote_code, dtype=dtype)
    return cls(config).to(dtype)


def _class_of(config: Any) -> Any:
    """Return the class that a model is made by: AutoModelForCausalLM where it knows the right one.

    It would take the text part alone of some multimodal models, and knows no class for others, nor
    for the text part of some: there the class counts that the configuration names.
    """
    import transformers

    named = getattr(transformers, next(iter(config.architectures or ()), ""), None)
    if named is None or hasattr(config, "auto_map"):
        return transformers.AutoModelForCausalLM
    multimodal = [
        getattr(transformers, f"MODEL_FOR_{kind}_MAPPING", {})
        for kind in ("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM")
    ]
    unknown = type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if unknown and named.__name__.endswith("ForCausalLM"):
        return named
    if any(named is mapping.get(type(config), None) for mapping in multimodal):
        if int(transformers.__version__.split(".")[0]) < 5:  # names in files are others than here
            raise NeuroalError(f"{named.__name__} is multimodal: that needs transformers 5")
        return named
    return transformers.AutoModelForCausalLM


def text_config(config: Any) -> Any:
    """Return the part of a configuration that describes the language model; mostly all of it."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def vocabulary_size(config: Any) -> int | None:
    """Return the number of tokens that a model knows, or None where it does not say."""
    size: int | None = getattr(text_config(config), "vocab_size", None)
    return size


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
    config = load_config(model, trust_remote_code)
    kind = config.dtype if dtype == "auto" else getattr(torch, dtype)
    text = text_config(config)
    with _loading(model), torch.random.fork_rng(devices=[]):
        for part in (
            text,
            *(getattr(config, name, None) for name in getattr(config, "sub_configs", ())),
        ):
            for depth in ("num_hidden_layers", "depth"):  # of language, and of vision or audio
                if getattr(part, depth, None):
                    setattr(part, depth, 1)
        if vocabulary is not None:
            text.vocab_size, text.pad_token_id = vocabulary, None
        with _no_init_weights()():
            small = _build(config, trust_remote_code, kind)
    result: nn.Module = small.to(device).eval()
    _fill(result)
    return result


def quantisation(config: Any) -> str | None:
    """Return by which method a configuration's model is quantised; None if it is not."""
    said = getattr(config, "quantization_config", None)
    if not said:
        return None
    said = said if isinstance(said, dict) else said.to_dict()
    method = said.get("quant_method") or "an unnamed method"
    return str(getattr(method, "value", method))


def _no_init_weights() -> Any:
    """Return transformers' own context in which weights are made and not drawn."""
    from transformers import modeling_utils

    where: Any = modeling_utils  # before transformers 5
    with suppress(ImportError):
        from transformers import initialization as where
    return where.no_init_weights


def _fill(model: nn.Module) -> None:
    """Fill parameters with a few random numbers again and again, and vectors with ones."""
    some = 0.02 * torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() < 2:
                p.fill_(1.0)
                continue
            own = some.to(p)
            for part in torch.split(p.view(-1), len(own)):
                part.copy_(own[: len(part)])


def _refuse_quantised(model: str, config: Any) -> None:
    if quantisation(config):
        raise NeuroalError(f"model '{model}' is quantised: prune the original, then quantise")


def load(
    model: str,
    device: str = "cpu",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    *,
    quantised: bool = False,
) -> tuple[nn.Module, Any]:
    """Return model and tokenizer, the model in evaluation mode on `device`.

    Args:
        model: A folder, a hub name, or "demo".
        device: Where its weights are.
        dtype: Of its weights; "auto" is the checkpoint's own.
        trust_remote_code: Let the model's own code run.
        quantised: A quantised model is loaded by transformers as it is; else it is refused.

    Raises:
        NeuroalError: The folder or name is no causal language model in safetensors, memory is
            too small for its weights, or the package of a quantisation is missing.
    """
    where = locate(model)
    config = load_config(model, trust_remote_code)
    method = quantisation(config)
    if not quantised:
        _refuse_quantised(model, config)
    if Path(where).is_dir():
        _check_memory(model, Path(where), device)
    # Quantised weights may not be moved later. Of others, the wrong shape is refused below.
    placed = {"device_map": {"": device}} if method else {"ignore_mismatched_sizes": True}
    with _loading(model if method is None else f"{model}, quantised by {method}", model):
        answer: Any = _class_of(config).from_pretrained(
            where,
            output_loading_info=True,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            **placed,
        )
    loaded, info = answer
    assert isinstance(loaded, nn.Module)
    refuse_mismatched(model, info["mismatched_keys"])
    missing = set(info["missing_keys"]).intersection(dict(loaded.named_parameters()))
    if missing:  # transformers would continue with random numbers
        raise NeuroalError(f"model '{model}' lacks the weight '{min(missing)}'")
    _refuse_surplus(model, loaded, info["unexpected_keys"])
    if method is None:
        loaded.to(device)
    loaded.eval()
    return loaded, load_tokenizer(model, trust_remote_code)


def refuse_mismatched(
    model: str, found: Iterable[tuple[str, Sequence[int], Sequence[int]]]
) -> None:
    """Refuse a model that holds weights in another shape than the one needed.

    Args:
        model: Its name.
        found: Of each such weight: its name, its shape, and the shape needed.

    Raises:
        NeuroalError: There is one.
    """
    wrong = [f"'{name}' as {tuple(had)}, not {tuple(needed)}" for name, had, needed in found]
    if wrong:
        raise NeuroalError(f"model '{model}' holds {min(wrong)}")


def dtype_to_measure(model: str, config: Any, device: str) -> str:
    """Return the dtype in which a model is measured soonest: "auto", or "float32" on some CPUs.

    Half precision is slower than float32 on a CPU that has no instructions for its products. The
    rule looks at the processor and takes no time, so that one machine always measures alike. Where
    float32 would not fit into memory, the checkpoint's own dtype stays.
    """
    if quantisation(config) or not slower_than_float32(getattr(config, "dtype", None), device):
        return "auto"
    folder, free = Path(locate(model)), available_memory(device)
    size = weight_bytes(folder) if folder.is_dir() else 0
    return "auto" if free is not None and 2 * size > free else "float32"


def slower_than_float32(dtype: torch.dtype | None, device: str) -> bool:
    """Return whether a dtype is half precision, on a CPU that has no instructions for it."""
    half = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype) if dtype else None
    return half is not None and torch.device(device).type == "cpu" and not multiplies(half)


def multiplies(half: str) -> bool:
    """Return whether this CPU has instructions for products of half precision, bf16 or fp16."""
    capable: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capable.get(f"{family}{half}") for family in ("avx512_", "amx_", "avx10_", ""))


def tokenizer_bytes(model: str) -> int:
    """Return about how much memory a tokenizer takes while it is read from its files."""
    folder = Path(locate(model))
    files = {f for x in TOKENIZER for f in folder.glob(x)} if folder.is_dir() else ()
    return _TOKENIZER_GROWS * max((f.stat().st_size for f in files), default=0)


def load_tokenizer(model: str, trust_remote_code: bool = False) -> Any:
    """Return the model's tokenizer; None where its folder holds none."""
    if not has_tokenizer(model):
        return None
    from transformers import AutoTokenizer

    with _loading(model):
        return AutoTokenizer.from_pretrained(locate(model), trust_remote_code=trust_remote_code)


def _check_memory(model: str, folder: Path, device: str) -> None:
    needed = weight_bytes(folder)
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
    for name in CONTEXT:
        value = getattr(text_config(config), name, None)
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
