"""What is no model folder is refused in one line, with the way to make it one."""

from collections.abc import Mapping
from pathlib import Path

import pytest

import neuroal
from neuroal import NeuroalError, Recipe, UsageError
from neuroal.model import pretrained
from neuroal.model.places import local_folder, locate, similar_folder, stated_context
from neuroal.testing import tiny_model


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (
            ["adapter_config.json", "adapter_model.safetensors"],
            "holds an adapter.*merge_and_unload",
        ),
        (["config.json", "adapter_config.json"], "an adapter.*merge_and_unload"),
        (["config.json", "pytorch_model.bin"], "holds pytorch_model.bin.*use_safetensors=False"),
        (["config.json", "pytorch_model-00001-of-00002.bin"], "may run code.*save_pretrained"),
        (["model.Q4_K_M.gguf"], r"GGUF.*gguf_file='model\.Q4_K_M\.gguf'"),
        (["model.safetensors"], "holds no config.json"),
    ],
)
def test_folders_that_are_not_a_model(names: list[str], said: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).write_text("{}")
    with pytest.raises(NeuroalError, match=said) as error:
        locate(str(tmp_path))
    assert "\n" not in str(error.value) and f"'{tmp_path}'" in str(error.value)


def test_pickled_weights_beside_safetensors_do_no_harm(tmp_path: Path) -> None:
    for name in ("config.json", "pytorch_model.bin", "model.safetensors", "model.gguf"):
        (tmp_path / name).write_text("{}")
    assert locate(str(tmp_path)) == str(tmp_path) and local_folder(str(tmp_path)) == tmp_path


def test_a_gguf_file(tmp_path: Path) -> None:
    with pytest.raises(NeuroalError, match=rf"GGUF file.*'{tmp_path}', gguf_file='m\.gguf'"):
        locate(str(tmp_path / "m.gguf"))


def test_a_mistyped_folder_gets_the_nearest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("models/llama-7b", "models/mistral", "smollm"):
        Path(name).mkdir(parents=True)
        Path(name, "config.json").write_text("{}")
    Path("models/lama-7").mkdir()  # holds no model
    for typed in ("models/lama-7b", "./models/lama-7b", f"{tmp_path}/models/lama-7b"):
        with pytest.raises(NeuroalError, match=r"did you mean '.*models/llama-7b'\?"):
            locate(typed)
    assert similar_folder("smolm") == "smollm" and similar_folder("quite/else") is None
    assert locate("smolm") == "smolm"  # may be a name on the hub
    assert locate("models/quite-else") == "models/quite-else"
    assert local_folder("smolm") is None


def test_adapters_in_memory_are_refused(recipe: Recipe, models: Mapping[str, Path]) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = peft.get_peft_model(
        tiny_model("llama"), peft.LoraConfig(target_modules=["q_proj"], r=2)
    )
    with pytest.raises(UsageError, match="merge_and_unload"):
        neuroal.prune(model, None, recipe)


@pytest.mark.parametrize(
    ("config", "context"),
    [
        ('{"max_position_embeddings": 64}', 64),
        ('{"n_positions": 32}', 32),  # of GPT-2
        ('{"max_position_embeddings": 9, "text_config": {"max_position_embeddings": 8}}', 8),
        ('{"text_config": {}}', None),  # left to the default of its class
        ('{"max_position_embeddings": 64, "auto_map": {"AutoConfig": "x.Y"}}', None),
        ("{}", None),
        ("[]", None),
        ("{", None),
    ],
)
def test_a_context_that_is_stated(config: str, context: int | None, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config)
    assert stated_context(str(tmp_path)) == context


def test_a_hub_name_states_no_context() -> None:
    assert stated_context("owner/name") is None


def test_what_is_stated_is_what_transformers_says(models: Mapping[str, Path]) -> None:
    for folder in models.values():
        read = pretrained.context_length(pretrained.load_config(str(folder)))
        assert stated_context(str(folder)) in (read, None)
