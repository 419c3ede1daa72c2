"""What a checkpoint holds beside its language blocks comes out of a run as it went in."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import neuroal
from neuroal import NeuroalError, Recipe
from neuroal.layout import find
from neuroal.model import pretrained
from neuroal.model.carry_over import carry_tensors, copy_small_files
from neuroal.model.files import Shards

TEXT = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
TOWER |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
MARKS = {"video_token_id": 94, "vision_start_token_id": 93, "vision_end_token_id": 92}
MROPE = {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
QWEN2_TOWER = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 14}
# By class: which configuration it has, and what of it is tiny.
WRAPPERS: dict[str, tuple[str, dict[str, Any]]] = {
    "LlavaForConditionalGeneration": (
        "LlavaConfig",
        {
            "text_config": {"model_type": "llama", **TEXT},
            "vision_config": {"model_type": "clip_vision_model", **TOWER},
            "image_token_id": 96,
        },
    ),
    "Qwen2VLForConditionalGeneration": (
        "Qwen2VLConfig",
        {
            "text_config": {**TEXT, **MROPE},
            "vision_config": QWEN2_TOWER | {"mlp_ratio": 2},
            "image_token_id": 95,
            **MARKS,
        },
    ),
    "Mistral3ForConditionalGeneration": (
        "Mistral3Config",
        {
            "text_config": {"model_type": "mistral", "head_dim": 8, **TEXT},
            "vision_config": {"model_type": "pixtral", "head_dim": 8, **TOWER},
        },
    ),
    "Gemma3ForConditionalGeneration": (
        "Gemma3Config",
        {
            "text_config": {"head_dim": 8, "layer_types": ["full_attention"] * 3, **TEXT},
            "vision_config": TOWER,
            "mm_tokens_per_image": 4,
            "image_token_index": 96,
            "boi_token_index": 95,
            "eoi_token_index": 94,
        },
    ),
    "Qwen3_5ForConditionalGeneration": (
        "Qwen3_5Config",
        {
            "text_config": {"head_dim": 8, "layer_types": ["full_attention"] * 3, **TEXT},
            "vision_config": {
                "depth": 2,
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_heads": 2,
                "patch_size": 14,
                "out_hidden_size": 32,
                "num_position_embeddings": 16,
            },
            "image_token_id": 95,
            **MARKS,
        },
    ),
    "Llama4ForConditionalGeneration": (
        "Llama4Config",
        {
            "text_config": {
                "intermediate_size_mlp": 48,
                "num_local_experts": 2,
                "head_dim": 8,
                **TEXT,
            },
            "vision_config": {
                **TOWER,
                "vision_output_dim": 32,
                "projector_input_dim": 32,
                "projector_output_dim": 32,
            },
        },
    ),
}
Tensors = Mapping[str, Tensor]
OLD = int(transformers.__version__.split(".")[0]) < 5


@pytest.fixture(scope="module", params=WRAPPERS)
def wrapped(request: pytest.FixtureRequest, tmp_path_factory: Any, save: Any) -> Path:
    """The folder of a tiny model that sees too, with a preprocessor and a licence."""
    name = str(request.param)
    kind, tiny = WRAPPERS[name]
    if not hasattr(transformers, name) or not hasattr(transformers, kind):
        pytest.skip(f"this transformers has no {name}")
    if OLD:
        pytest.skip("multimodal models need transformers 5")
    torch.manual_seed(0)
    config = getattr(transformers, kind)(tie_word_embeddings=False, **tiny)
    folder: Path = save(getattr(transformers, name)(config).eval(), tmp_path_factory.mktemp(name))
    (folder / "preprocessor_config.json").write_text('{"size": 28}')
    (folder / "LICENSE").write_text("ours")
    return folder


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_sees_keeps_its_sight(
    wrapped: Path, stream: bool, from_file: Recipe, tmp_path: Path, read: Callable[[Path], Tensors]
) -> None:
    asked = dataclasses.replace(from_file, top_up="uniform", options={})
    report = neuroal.prune(wrapped, recipe=asked, out=tmp_path / "out", stream=stream)
    before, after = read(wrapped), read(tmp_path / "out")
    assert before.keys() == after.keys()
    pruned = {tensor for x in report.linears.values() for tensor in x["tensors"]}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == pruned and report.sparsity["achieved"] == pytest.approx(0.6, abs=0.01)
    assert not any("visual" in name or "vision" in name for name in pruned)
    configs = [json.loads((f / "config.json").read_text()) for f in (wrapped, tmp_path / "out")]
    assert configs[0]["architectures"] == configs[1]["architectures"]
    for name in ("preprocessor_config.json", "LICENSE"):
        assert (tmp_path / "out" / name).read_text() == (wrapped / name).read_text()


@pytest.mark.skipif(not OLD, reason="transformers 5 or newer is installed")
def test_an_old_transformers_is_refused(save: Callable[[Any, Path], Path], tmp_path: Path) -> None:
    name = "LlavaForConditionalGeneration"
    config = transformers.LlavaConfig(**WRAPPERS[name][1])
    folder = save(transformers.LlavaForConditionalGeneration(config), tmp_path / "llava")
    with pytest.raises(NeuroalError, match=f"{name} is multimodal: that needs transformers 5"):
        pretrained.load(str(folder))


def test_one_block_of_a_model_that_sees(wrapped: Path) -> None:
    """To be timed: one block of the language model, and no more than one of what sees."""
    one = pretrained.one_block(str(wrapped), "cpu", "auto", 50)
    layout = find(one)
    assert len(layout.blocks) == 1
    whole = find(pretrained.skeleton(str(wrapped)))
    shapes = [(x.out_features, x.in_features) for x in layout.blocks[0].linears]
    assert shapes == [(x.out_features, x.in_features) for x in whole.blocks[0].linears]


@pytest.mark.parametrize("stream", [False, True])
def test_tensors_that_the_class_does_not_read(
    stream: bool, models: Mapping[str, Path], from_file: Recipe, tmp_path: Path,
    read: Callable[[Path], Tensors],
) -> None:  # fmt: skip
    """Layers that predict further tokens, as DeepSeek-V3 and GLM-4.5 have them behind the last."""
    if stream and OLD:
        pytest.skip("streaming needs transformers 5")
    source = tmp_path / "source"
    shutil.copytree(models["llama"], source)
    extra = {"eh_proj.weight": torch.randn(4, 8), "enorm.weight": torch.ones(4)}
    extra = {f"model.layers.3.{name}": tensor for name, tensor in extra.items()}
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    whole = load_file(source / "model.safetensors") | extra
    save_file(whole, source / "model.safetensors", metadata={"format": "pt"})
    report = neuroal.prune(source, recipe=from_file, out=tmp_path / "out", stream=stream)
    after = read(tmp_path / "out")
    assert after.keys() == whole.keys()
    assert all(torch.equal(after[name], extra[name]) for name in extra)
    assert any("copied unchanged: model.layers.3." in note for note in report.notes)
    assert set(Shards(tmp_path / "out").ranges) == set(whole)  # the index names all of them
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, after[name])


def test_a_tensor_that_is_lost_is_an_error(models: Mapping[str, Path], tmp_path: Path) -> None:
    model, _ = pretrained.load(str(models["llama"]))
    tensors = load_file(models["llama"] / "model.safetensors")
    lost = "model.layers.1.mlp.up_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != lost}, tmp_path / "model.safetensors")
    with pytest.raises(NeuroalError, match=f"lost the tensor '{lost}'"):
        carry_tensors(model, models["llama"], tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    assert carry_tensors(model, models["llama"], tmp_path) == []
    (tmp_path / "less").mkdir()
    save_file({k: v for k, v in tensors.items() if k != lost}, tmp_path / "less/model.safetensors")
    with pytest.raises(NeuroalError, match=f"made up the tensor '{lost}'"):
        carry_tensors(model, tmp_path / "less", models["llama"])


def test_tied_weights_may_have_either_name(models: Mapping[str, Path], tmp_path: Path) -> None:
    """A source that stores the head of a tied model too has lost nothing."""
    model, _ = pretrained.load(str(models["opt"]))
    tensors = load_file(models["opt"] / "model.safetensors")
    (embedding,) = (name for name in tensors if "embed_tokens" in name)
    both = tensors | {"lm_head.weight": tensors[embedding].clone()}
    save_file(both, tmp_path / "model.safetensors")
    assert carry_tensors(model, tmp_path, models["opt"]) == []


def test_small_files(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    for folder in (
        source / "templates",
        source / ".git",
        source / "run",
        source / "x.partial",
        out,
    ):
        folder.mkdir(parents=True)
    texts = {
        "config.json": "new", "LICENSE": "l", "templates/chat.jinja": "c", "modeling_own.py": "m",
        "README.md": "r", "neuroal.json": "n", "pytorch_model.bin": "b", "model.gguf": "g",
        "model.safetensors": "s", "pytorch_model.bin.index.json": "i", ".git/HEAD": "h",
        "run/neuroal.json": "n", "run/LICENSE": "l", "x.partial/run.json": "r",
    }  # fmt: skip
    for name, text in texts.items():
        (source / name).write_text(text)
    (out / "config.json").write_text("own")
    notes = copy_small_files(source, out)
    copied = {str(p.relative_to(out)): p.read_text() for p in out.rglob("*") if p.is_file()}
    assert copied == {
        "config.json": "own", "LICENSE": "l", "templates/chat.jinja": "c", "modeling_own.py": "m"
    }  # fmt: skip
    assert len(notes) == 1 and "model.gguf and 2 more" in notes[0]
