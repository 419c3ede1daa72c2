"""`from_pretrained` on a packed folder gives the dense model, whatever its files are like."""

from __future__ import annotations

import shutil
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import neuroal
import neuroal.testing
from neuroal import NeuroalError, Recipe
from neuroal.model import pretrained
from neuroal.model.files import Shards
from neuroal.packed import reading
from neuroal.run.pack import pack, unpack

Read = Callable[[Path], dict[str, Tensor]]
Same = Callable[[dict[str, Tensor], dict[str, Tensor]], bool]


def thinned(model: Any, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The model with half of every matrix at zero."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.to(dtype).parameters():
            if p.dim() > 1:
                p.masked_fill_(torch.rand(p.shape, generator=rng) < 0.5, 0)
    return model.eval()


@pytest.fixture
def both(
    tmp_path: Path, save: Callable[[nn.Module, Path], Path]
) -> Callable[..., tuple[Path, Path]]:
    """Saves a model, and packs it: the dense folder and the packed one."""

    def make(model: Any, compress: bool = True, **how: Any) -> tuple[Path, Path]:
        dense, out = tmp_path / "dense", tmp_path / "packed"
        model.save_pretrained(dense, **how)
        found = pack(dense, out, compress=compress)
        assert found.packed and found.bytes < found.dense
        return dense, out

    return make


def assert_equal(one: Any, other: Any) -> None:
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name
    ids = torch.arange(2, 18).reshape(2, 8)
    with torch.no_grad():
        assert torch.equal(one(input_ids=ids).logits, other(input_ids=ids).logits)


@pytest.mark.parametrize("compress", [False, True])
def test_every_structure(structure: str, compress: bool, both: Any, tmp_path: Path) -> None:
    dense, out = both(thinned(neuroal.testing.tiny_model(structure)), compress)
    model = AutoModelForCausalLM.from_pretrained(out)
    ordinary = AutoModelForCausalLM.from_pretrained(dense)
    assert_equal(model, ordinary)
    # It is an ordinary model: it is saved, cast and trained as any other.
    assert not any(hasattr(model, x) for x in ("hf_quantizer", "is_quantized"))
    model.save_pretrained(tmp_path / "again")
    ordinary.save_pretrained(tmp_path / "dense again")
    for name in ("config.json", "model.safetensors"):
        one, other = (tmp_path / x / name for x in ("again", "dense again"))
        assert one.read_bytes() == other.read_bytes()
    assert all(p.requires_grad for p in model.float().parameters())
    wide = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert_equal(wide, AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32))


def test_several_files_with_an_index(both: Any, tmp_path: Path) -> None:
    dense, out = both(thinned(neuroal.testing.tiny_model("mistral")), max_shard_size="9KB")
    assert len(list(out.glob("model-*.safetensors"))) > 3
    index = "model.safetensors.index.json"
    assert (out / index).read_bytes() == (dense / index).read_bytes()
    assert_equal(*(AutoModelForCausalLM.from_pretrained(x) for x in (out, dense)))
    packed, ordinary = Shards(out), Shards(dense)
    assert packed.ranges.keys() == ordinary.ranges.keys()
    assert all(torch.equal(packed.read(n), ordinary.read(n)) for n in ordinary.ranges)


def mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    config: Any = MixtralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=12, num_experts_per_tok=2,
    )  # fmt: skip
    return MixtralForCausalLM(config)


def test_experts_that_are_packed_in_part(both: Any) -> None:
    """More than ten, so that their order is not that of their names; some stay as they are."""
    model = thinned(mixtral())
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "experts" in name and p.dim() == 3:
                p[3:5] = 1.0
    dense, out = both(model)
    assert_equal(*(AutoModelForCausalLM.from_pretrained(x) for x in (out, dense)))


def test_experts_that_are_stacked_in_the_files(both: Any) -> None:
    """Their matrices have three dimensions, and no `.weight` in their name."""
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "GptOssConfig"):
        pytest.skip("this transformers has no such model")
    config = transformers.GptOssConfig(
        vocab_size=97, hidden_size=32, intermediate_size=16, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    dense, out = both(thinned(transformers.GptOssForCausalLM(config)))
    stacked = [x for x in Shards(out).ranges if "experts" in x and x.endswith("_proj")]
    assert stacked and all(Shards(out).ranges[x].packed for x in stacked)
    assert_equal(*(AutoModelForCausalLM.from_pretrained(x) for x in (out, dense)))


def test_a_model_that_sees(both: Any, streaming: None) -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "head_dim": 8, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1,
        "layer_types": ["full_attention"] * 2,
    }  # fmt: skip
    tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    tower |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(
        text_config=text, vision_config=tower, mm_tokens_per_image=4, image_token_index=96
    )
    dense, out = both(thinned(Gemma3ForConditionalGeneration(config)))
    assert_equal(*(AutoModelForImageTextToText.from_pretrained(x) for x in (out, dense)))
    loaded, _ = pretrained.load(str(out))
    assert_equal(loaded, AutoModelForImageTextToText.from_pretrained(dense))


def test_broken_weights_are_not_loaded(both: Any) -> None:
    _, out = both(thinned(neuroal.testing.tiny_model("llama")))
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-100] ^= 1
    (out / "model.safetensors").write_bytes(data)
    with pytest.raises(NeuroalError, match="is broken: its SHA-256 is another"):
        AutoModelForCausalLM.from_pretrained(out)
    with pytest.raises(NeuroalError, match=r"cannot load model.*SHA-256 is another"):
        pretrained.load(str(out))


def test_another_version_is_refused(both: Any) -> None:
    _, out = both(thinned(neuroal.testing.tiny_model("llama")))
    config = out / "config.json"
    config.write_text(config.read_text().replace('"version": "1"', '"version": "2"'))
    with pytest.raises(NeuroalError, match="packed in version '2': this neuroal reads 1"):
        AutoModelForCausalLM.from_pretrained(out)


def test_one_matrix_at_a_time_is_unpacked(both: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, out = both(thinned(neuroal.testing.tiny_model("llama")))
    running: list[int] = []
    most: list[int] = []
    expand = reading.codec.expand

    def watched(*args: Any) -> Any:
        running.append(threading.get_ident())
        most.append(len(running))
        result = expand(*args)
        running.pop()
        return result

    monkeypatch.setattr(reading.codec, "expand", watched)
    AutoModelForCausalLM.from_pretrained(out)
    assert max(most) == 1 and len(most) > 20


LATER = """
import sys
{first}
{second}
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(sum(int((p == 0).sum()) for p in model.parameters()))
assert not any(type(x).__name__ == "_Watch" for x in sys.meta_path)
"""


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("import neuroal; assert 'torch' not in sys.modules", "import transformers"),
        ("import transformers.modeling_utils", "import neuroal"),
        ("import transformers", "import neuroal"),
    ],
)
def test_whatever_is_imported_first(
    first: str, second: str, both: Any, run_process: Callable[..., Any]
) -> None:
    model = thinned(neuroal.testing.tiny_model("llama"))
    zeros = sum(int((p == 0).sum()) for p in model.parameters())
    _, out = both(model)
    code = LATER.format(first=first, second=second)
    done = run_process([sys.executable, "-c", code, out])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(zeros)


def test_without_neuroal_no_random_weights_are_loaded(
    both: Any, run_process: Callable[..., Any], tmp_path: Path
) -> None:
    _, out = both(thinned(neuroal.testing.tiny_model("llama")))
    code = LATER.format(first="", second="")
    done = run_process([sys.executable, "-c", code, out])
    assert done.returncode != 0 and "mismatch" in done.stderr.lower()


@pytest.mark.parametrize("compress", [False, True])
def test_a_packed_folder_is_pruned_as_the_dense_one(
    compress: bool,
    both: Any,
    recipe: Recipe,
    windows: Tensor,
    read: Read,
    same: Same,
    streaming: None,
    tmp_path: Path,
) -> None:
    dense, out = both(thinned(neuroal.testing.tiny_model("mistral"), torch.float32), compress)
    runs = {}
    for name, folder, stream in (
        ("dense", dense, False),
        ("packed", out, False),
        ("streamed", out, True),
    ):
        target = tmp_path / "runs" / name
        report = neuroal.prune(folder, None, recipe, windows=windows, out=target, stream=stream)
        runs[name] = read(target)
        assert report.weight_bytes["dense"] == (dense / "model.safetensors").stat().st_size
        assert "quantization_config" not in (target / "config.json").read_text()
    assert same(runs["dense"], runs["packed"]) and same(runs["dense"], runs["streamed"])


def test_unpacked_it_is_what_it_was(both: Any, models: Mapping[str, Path], tmp_path: Path) -> None:
    dense, out = both(thinned(neuroal.testing.tiny_model("opt")), max_shard_size="20KB")
    unpack(out, tmp_path / "again")
    names = {p.name for p in dense.iterdir()}
    assert (
        names == {p.name for p in (tmp_path / "again").iterdir()} == {p.name for p in out.iterdir()}
    )
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (dense / name).read_bytes(), name
    shutil.rmtree(tmp_path / "again")
