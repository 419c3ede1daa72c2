"""Blocks read one at a time: the same bits as in memory, in less of it; and what is refused."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import neuroal
from neuroal import NeuroalError, Recipe, UsageError
from neuroal.cost.offload import Needs
from neuroal.layout import find
from neuroal.model import lazy_matrix, pretrained
from neuroal.model.files import INDEX, ONE, Shards
from neuroal.model.lazy_matrix import LazyMatrix
from neuroal.model.streaming import Streamed
from neuroal.search.alignment import Aligner
from neuroal.testing import STRUCTURES, tiny_model

pytest.importorskip("transformers.conversion_mapping", reason="streaming needs transformers 5")

Read = Callable[[Path], dict[str, Tensor]]
Same = Callable[[dict[str, Tensor], dict[str, Tensor]], bool]
Save = Callable[[nn.Module, Path], Path]
Tree = Callable[[], dict[str, str]]
REPORT = ("candidates", "sparsity", "blocks", "linears", "counts", "recipe_sha256", "model", "data")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[nn.Module], Path]:
    """Saves a model in many files, cut anywhere."""

    def save(model: Any) -> Path:
        folder = tmp_path_factory.mktemp("sharded")
        model.save_pretrained(folder, max_shard_size="15kB")
        assert (folder / INDEX).is_file()
        return folder

    return save


def both(model: Path, recipe: Recipe, folder: Path) -> tuple[Any, Any]:
    """The reports of a run in memory, in `folder/memory`, and of a streamed one beside it."""
    made = [
        neuroal.prune(model, recipe=recipe, out=folder / name, stream=name == "stream")
        for name in ("memory", "stream")
    ]
    return made[0], made[1]


def assert_same(folder: Path, read: Read, same: Same) -> None:
    """All but the division into files is the same."""
    memory, stream = folder / "memory", folder / "stream"
    assert same(read(memory), read(stream))
    reports = [json.loads((f / "neuroal.json").read_text()) for f in (memory, stream)]
    for key in REPORT:
        assert reports[0][key] == reports[1][key], key
    others = sorted(p.name for p in memory.iterdir() if p.name not in (ONE, "neuroal.json"))
    for name in others:  # the card's bytes are those of the files, with their headers
        one, other = (_without_bytes((f / name).read_bytes()) for f in (memory, stream))
        assert one == other, name
    extra = {p.name for p in stream.iterdir()} - {p.name for p in memory.iterdir()}
    assert all(n == INDEX or (n.startswith("model-") and n.endswith(".safetensors")) for n in extra)


def _without_bytes(content: bytes) -> list[bytes]:
    return [line for line in content.splitlines() if not line.startswith(b"| pruned |")]


def test_same_bits_on_every_structure(
    structure: str,
    sharded: Callable[[nn.Module], Path],
    from_file: Recipe,
    tmp_path: Path,
    read: Read,
    same: Same,
) -> None:
    both(sharded(tiny_model(structure)), from_file, tmp_path)
    assert_same(tmp_path, read, same)


WEIGHED = {
    "top_up": "uniform",
    "block_ratios": ("uniform",),
    "row_ratios": f"{Path(__file__).parents[1] / 'programs/weighs.py'}:Weighs",
}
CASES: dict[str, dict[str, Any]] = {
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "dense walk": {"top_up": "owl"},
    "output metric": {"alignment": "output_kl"},
    "comparing metric": {"alignment": "relative_l2"},
    "moves weights": {"pruner": "sparsegpt", "top_up": "neuroal-block"},
    "refiner": {"refiner": "dsnot", "top_up": "uniform"},
    "weighs rows": {"refiner": "dsnot", "budget": "paper", **WEIGHED},
    "weighs rows and moves": {"pruner": "sparsegpt", "dtype": "bfloat16", **WEIGHED},
    "no statistics": {"pruner": "magnitude", "top_up": "uniform", "calibration": None},
    "pattern": {"pattern": "2:4", "sparsity": None, "top_up": "uniform"},
}


@pytest.mark.parametrize("case", CASES)
def test_same_bits_whatever_runs(
    case: str, models: Mapping[str, Path], from_file: Recipe, tmp_path: Path, read: Read, same: Same
) -> None:
    top_up = CASES[case].get("top_up", "neuroal")
    used = {"neuroal": {"linear_schedule", "neuroal"}, "neuroal-block": {"linear_schedule"}}
    options = {k: v for k, v in from_file.options.items() if k in used.get(top_up, ())}
    recipe = dataclasses.replace(from_file, options=options, **CASES[case])
    both(models["mistral"], recipe, tmp_path)
    assert_same(tmp_path, read, same)


def test_result_is_an_ordinary_checkpoint(
    models: Mapping[str, Path], from_file: Recipe, tmp_path: Path, windows: Tensor
) -> None:
    """A file a block and one for what is around them; the index counts every byte."""
    from transformers import AutoModelForCausalLM

    neuroal.prune(models["opt"], recipe=from_file, out=tmp_path / "out", stream=True)
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert files[1:] == [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    held = {f: load_file(tmp_path / "out" / f) for f in files[1:]}
    assert index["weight_map"] == {name: f for f, tensors in held.items() for name in tensors}
    sizes = [t.numel() * t.element_size() for ts in held.values() for t in ts.values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert torch.isfinite(model(windows).logits).all()


def test_names_in_the_files_that_are_not_the_models_own(
    models: Mapping[str, Path], from_file: Recipe, tmp_path: Path, read: Read, same: Same
) -> None:
    """transformers loads a checkpoint of the base model alone, without its prefix."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in models["opt"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / ONE)
    renamed = {name.removeprefix("model."): t for name, t in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, folder / ONE, metadata={"format": "pt"})
    both(folder, from_file, tmp_path)
    assert_same(tmp_path, read, same)


def test_other_names_in_the_files_around_the_blocks_too(
    sharded: Callable[[nn.Module], Path],
    from_file: Recipe,
    tmp_path: Path,
    read: Read,
    same: Same,
) -> None:
    """GPT-NeoX's head has another name in its files, one that transformers 5 gives back to it."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48}
    more = {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, **more))
    folder = sharded(model)
    names = set(json.loads((folder / INDEX).read_text())["weight_map"])
    assert "embed_out.weight" in names - model.state_dict().keys()
    both(folder, dataclasses.replace(from_file, alignment="output_kl"), tmp_path)
    assert_same(tmp_path, read, same)
    assert "embed_out.weight" in read(tmp_path / "stream")


# -- around the blocks -----------------------------------------------------------------------


AROUND = {("llama", True, "auto"), ("mistral", False, "bfloat16")}
AROUND |= {("phi", True, "bfloat16"), ("opt", False, "auto")}


@pytest.mark.parametrize(
    ("structure", "tied", "dtype"),
    [
        case if case in AROUND else pytest.param(*case, marks=pytest.mark.matrix)
        for case in product(STRUCTURES, (False, True), ("auto", "bfloat16"))
    ],
)
def test_matrices_around_the_blocks(
    structure: str,
    tied: bool,
    dtype: str,
    from_file: Recipe,
    tmp_path: Path,
    read: Read,
    same: Same,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Embeddings and head, in one matrix or two, read and written part by part, and cast."""
    model: Any = tiny_model(structure)
    config = type(model.config)(**model.config.to_dict() | {"tie_word_embeddings": tied})
    torch.manual_seed(0)
    made = type(model)(config)
    made.load_state_dict(model.state_dict())
    made.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(lazy_matrix, "PART", 1000)
    asked = dataclasses.replace(from_file, alignment="output_kl", dtype=dtype)
    both(tmp_path / "model", asked, tmp_path)
    assert_same(tmp_path, read, same)
    assert ("lm_head.weight" in read(tmp_path / "stream")) is not tied


def test_tied_matrices_that_are_both_in_the_files(
    from_file: Recipe, tmp_path: Path, read: Read, same: Same
) -> None:
    """They are compared: what is the same is tied and written once, what differs is not."""
    from transformers import OPTConfig, OPTForCausalLM

    for name, differs in {"the same": 0.0, "another": 1.0}.items():
        folder = tmp_path / name
        model: Any = tiny_model("opt")
        assert isinstance(model, OPTForCausalLM) and isinstance(model.config, OPTConfig)
        model.save_pretrained(folder)
        tensors = load_file(folder / ONE)
        embeddings = tensors["model.decoder.embed_tokens.weight"]
        tensors["lm_head.weight"] = embeddings + differs
        save_file(tensors, folder / ONE, metadata={"format": "pt"})
        both(folder, dataclasses.replace(from_file, alignment="output_kl"), folder)
        assert_same(folder, read, same)
        assert ("lm_head.weight" in read(folder / "stream")) is bool(differs)


@pytest.mark.parametrize("metric", ["neuron", "output_kl"])
def test_the_head_is_read_for_logits_alone(
    metric: str,
    structure: str,
    models: Mapping[str, Path],
    from_file: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the embeddings the rows of tokens are read, and nothing is read as a whole without it."""
    whole: list[tuple[int, ...]] = []
    own = LazyMatrix.read

    def read(self: LazyMatrix) -> Tensor:
        whole.append(tuple(self.shape))
        return own(self)

    monkeypatch.setattr(LazyMatrix, "read", read)
    recipe = dataclasses.replace(from_file, alignment=metric)
    neuroal.prune(models[structure], recipe=recipe, out=tmp_path / "out", stream=True)
    assert set(whole) == ({(97, 32)} if metric == "output_kl" else set())


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_a_broken_matrix_around_the_blocks(
    name: str, models: Mapping[str, Path], from_file: Recipe, tmp_path: Path
) -> None:
    """NaN, another shape and one that lacks are found before anything is pruned."""
    tensors = load_file(models["llama"] / ONE)
    nan = tensors[name].clone()
    nan[96, 31] = torch.nan
    broken: dict[str, tuple[Tensor | None, str]] = {
        "nan": (nan, f"'{name}' holds NaN or infinity"),
        "cut": (tensors[name][:, :-1].contiguous(), rf"'{name}' as \(97, 31\), not \(97, 32\)"),
        "gone": (None, f"lacks the weight '{name}'"),
    }
    for case, (value, message) in broken.items():
        folder = tmp_path / case
        folder.mkdir()
        for file in models["llama"].iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        others = {k: v for k, v in tensors.items() if k != name}
        held = others if value is None else others | {name: value}
        save_file(held, folder / ONE, metadata={"format": "pt"})
        with pytest.raises(NeuroalError, match=message):
            neuroal.prune(folder, recipe=from_file, out=tmp_path / "out", stream=True)
        assert not (tmp_path / "out").exists()


# -- one block at a time ---------------------------------------------------------------------


def test_one_block_is_in_memory(models: Mapping[str, Path]) -> None:
    model = tiny_model("llama")
    made = Streamed(str(models["llama"]), find(model), "cpu", "auto")

    def there() -> list[bool]:
        held = [made.model.get_submodule(b.name).parameters() for b in made.layout.blocks]
        return [not any(p.is_meta for p in parameters) for parameters in held]

    assert there() == [False] * 3
    for block in made.layout.blocks:
        with made.open(block) as module:
            assert there() == [b is block for b in made.layout.blocks]
            for name, weight in module.named_parameters():
                assert weight.equal(model.get_parameter(f"{block.name}.{name}"))
    assert there() == [False] * 3
    with pytest.raises(ZeroDivisionError), made.open(made.layout.blocks[1]):
        _ = 1 / 0
    assert there() == [False] * 3
    around = {"model.embed_tokens.weight": True, "model.norm.weight": False, "lm_head.weight": True}
    for name, stays in around.items():
        weight = made.model.get_parameter(name)
        assert isinstance(weight, LazyMatrix) is stays, name
        assert weight.equal(model.get_parameter(name))


def test_read_ahead_reads_the_tensors_asked_for(
    sharded: Callable[[nn.Module], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = Shards(sharded(tiny_model("llama")))
    names = [n for n in shards.ranges if ".layers.1." in n]
    for name, tensor in shards.slices(names).items():
        span = shards.ranges[name]
        raw = span.file.read_bytes()[span.start : span.end]
        assert torch.frombuffer(bytearray(raw), dtype=torch.float32).equal(tensor[...].flatten())
    opened: list[Path] = []
    own = Path.open

    def recorded(path: Path, *args: Any, **kwargs: Any) -> Any:
        opened.append(path)
        return own(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", recorded)
    shards.read_ahead(names)
    assert opened == sorted(shards.ranges[n].file for n in names)


def test_resumed_run_reads_its_own_shards(
    models: Mapping[str, Path],
    from_file: Recipe,
    tmp_path: Path,
    read: Read,
    same: Same,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped in the last block; the blocks before it are not pruned again."""
    out, keep = tmp_path / "stream", Streamed.keep

    def stop(self: Streamed, block: Any, *rest: Any) -> None:
        if block.index == 2:
            raise KeyboardInterrupt
        keep(self, block, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Streamed, "keep", stop)
        with pytest.raises(KeyboardInterrupt):
            neuroal.prune(models["phi"], recipe=from_file, out=out, stream=True)
    left = tmp_path / "stream.partial" / "checkpoint"
    assert sorted(p.name for p in left.iterdir()) == [
        "model-00002-of-00004.safetensors",
        "model-00003-of-00004.safetensors",
    ]
    written: list[int] = []

    def watched(self: Streamed, block: Any, *rest: Any) -> None:
        written.append(block.index)
        keep(self, block, *rest)

    monkeypatch.setattr(Streamed, "keep", watched)
    monkeypatch.setattr(Aligner, "measure", None)
    neuroal.prune(models["phi"], recipe=from_file, out=out, stream=True, resume=True)
    assert written == [2]
    monkeypatch.undo()
    neuroal.prune(models["phi"], recipe=from_file, out=tmp_path / "memory", stream=False)
    assert same(read(tmp_path / "memory"), read(out))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["memory", "stream"]


# -- less memory than weights ----------------------------------------------------------------


LARGE = {  # 115 MiB of blocks; 2 · 96 MiB of embeddings and head around blocks of 3 MiB
    "blocks": {"vocab_size": 97, "intermediate_size": 1024, "num_hidden_layers": 17},
    "vocabulary": {"vocab_size": 65536, "intermediate_size": 512, "num_hidden_layers": 2},
}


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts what is mapped on Linux")
@pytest.mark.parametrize("large", ["blocks", pytest.param("vocabulary", marks=pytest.mark.matrix)])
def test_model_larger_than_the_limit(
    large: str,
    models: Mapping[str, Path],
    from_file: Recipe,
    tmp_path: Path,
    read: Read,
    same: Same,
) -> None:
    """Refused in memory under 88 MiB, less than one matrix; the same bits streamed, by itself."""
    from transformers import LlamaConfig, LlamaForCausalLM

    more = {"hidden_size": 384, "num_attention_heads": 4, "max_position_embeddings": 64}
    model = LlamaForCausalLM(LlamaConfig(**LARGE[large], **more))
    model.save_pretrained(tmp_path / "model", max_shard_size="50MB")
    weights = sum(f.stat().st_size for f in (tmp_path / "model").glob("*.safetensors"))
    assert weights > 114 << 20
    del model
    uniform = dataclasses.replace(from_file, top_up="uniform", options={}, samples=2)
    given = {
        "limit": 88 << 20,
        "recipe": uniform.to_json(),
        "small": str(models["llama"]),
        "model": str(tmp_path / "model"),
        "runs": {"in memory": {"stream": False}, "chosen": {}},
        "folder": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parents[1] / "programs/limited.py")],
        input=json.dumps(given),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["in memory"].endswith("MiB are available: --stream needs less")
    assert said["chosen"].endswith("blocks are read from the disk one at a time")
    assert not (tmp_path / "in memory").exists()
    neuroal.prune(tmp_path / "model", recipe=uniform, out=tmp_path / "whole", stream=False)
    assert same(read(tmp_path / "whole"), read(tmp_path / "chosen"))


def test_chosen_where_the_model_does_not_fit(
    models: Mapping[str, Path], from_file: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacks = {(False, False): "too large", (True, False): None}
    monkeypatch.setattr(Needs, "lack", lambda _, way, free: lacks[way.blocks, way.activations])
    report = neuroal.prune(models["llama"], recipe=from_file, out=tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) == 4
    assert report.notes == ["too large: blocks are read from the disk one at a time"]
    lacks[False, True] = "too large even so"
    with pytest.raises(NeuroalError, match=r"^too large even so: --stream needs less$") as error:
        neuroal.prune(models["llama"], recipe=from_file, out=tmp_path / "no", stream=False)
    assert "\n" not in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


# -- what is refused -------------------------------------------------------------------------


def without_weights(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()


def without_a_file(folder: Path) -> None:
    min(folder.glob("model-*.safetensors")).unlink()


def without_a_tensor(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"]["model.layers.1.mlp.up_proj.weight"]
    (folder / INDEX).write_text(json.dumps(index))


def with_a_tensor_elsewhere(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = index["weight_map"]["lm_head.weight"]
    (folder / INDEX).write_text(json.dumps(index))


def with_half_a_file(folder: Path) -> None:
    file = min(folder.glob("model-*.safetensors"))
    os.truncate(file, file.stat().st_size // 2)


def with_a_broken_index(folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": [1]}')


def with_another_shape(folder: Path) -> None:
    name = "model.layers.2.mlp.down_proj.weight"
    file = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
    tensors = load_file(file)
    tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, file, metadata={"format": "pt"})


def with_no_rows(folder: Path) -> None:
    name = "model.layers.2.mlp.down_proj.weight"
    file = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
    save_file({**load_file(file), name: torch.zeros(0, 48)}, file, metadata={"format": "pt"})


def with_nan(folder: Path) -> None:
    name = "model.layers.2.mlp.down_proj.weight"
    file = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
    tensors = load_file(file)
    tensors[name][0, 0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})


BROKEN: dict[Callable[[Path], None], str] = {
    without_weights: r"holds no model\.safetensors and no model\.safetensors\.index\.json",
    without_a_file: r"names 'model-00001-of-\d+\.safetensors', which is not there",
    without_a_tensor: r"lacks the weight 'model\.layers\.1\.mlp\.up_proj\.weight'",
    with_a_tensor_elsewhere: r"lacks the tensor 'model\.norm\.weight'",
    with_half_a_file: r"cannot read .*model-00001-of",
    with_a_broken_index: "is no index of safetensors files",
    with_another_shape: r"down_proj\.weight' as \(32, 47\), not \(32, 48\)",
    with_no_rows: r"down_proj\.weight' as \(0, 48\), not \(32, 48\)",
    with_nan: r"weight of linear 'model\.layers\.2\.mlp\.down_proj' holds NaN or infinity",
}


@pytest.mark.parametrize("broken", BROKEN, ids=lambda f: f.__name__)
@pytest.mark.parametrize("pruner", ["wanda", "magnitude"])
def test_broken_folder(
    broken: Callable[[Path], None],
    pruner: str,
    sharded: Callable[[nn.Module], Path],
    from_file: Recipe,
    tmp_path: Path,
) -> None:
    """One clear line, and nothing is left on the disk."""
    folder = sharded(tiny_model("llama"))
    broken(folder)
    recipe = dataclasses.replace(from_file, pruner=pruner, top_up="uniform", options={})
    if pruner == "magnitude":
        recipe = dataclasses.replace(recipe, calibration=None)
    with pytest.raises(NeuroalError, match=BROKEN[broken]) as error:
        neuroal.prune(folder, recipe=recipe, out=tmp_path / "out", stream=True)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("broken", [with_another_shape, with_no_rows])
def test_another_shape_is_named_without_streaming_too(
    broken: Callable[[Path], None], sharded: Callable[[nn.Module], Path]
) -> None:
    folder = sharded(tiny_model("llama"))
    broken(folder)
    with pytest.raises(NeuroalError, match=BROKEN[broken]):
        pretrained.load(str(folder))


def test_a_tensor_without_elements_beside_the_weights(
    sharded: Callable[[nn.Module], Path], from_file: Recipe, tmp_path: Path
) -> None:
    folder = sharded(tiny_model("llama"))
    file = min(folder.glob("model-*.safetensors"))
    save_file({**load_file(file), "a": torch.zeros(0, 4)}, file, metadata={"format": "pt"})
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["a"] = file.name
    (folder / INDEX).write_text(json.dumps(index))
    recipe = dataclasses.replace(from_file, pruner="magnitude", top_up="uniform", options={})
    recipe = dataclasses.replace(recipe, calibration=None)
    for name, stream in (("whole", False), ("streamed", True)):
        neuroal.prune(folder, recipe=recipe, out=tmp_path / name, stream=stream)


def test_only_folders_are_streamed(
    from_file: Recipe, recipe: Recipe, windows: Tensor, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    with pytest.raises(UsageError, match="in memory cannot be streamed"):
        neuroal.prune(tiny_model("llama"), None, recipe, windows=windows, stream=True)
    monkeypatch.setattr(pretrained, "skeleton", lambda *_, **__: tiny_model("llama"))
    with pytest.raises(UsageError, match="download 'someone/llama' first") as error:
        neuroal.prune("someone/llama", recipe=from_file, out=tmp_path / "out", stream=True)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_disk_too_small(
    models: Mapping[str, Path], from_file: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=50_000))
    monkeypatch.setattr(Streamed, "open", None)
    with pytest.raises(NeuroalError, match="iB of disk"):
        neuroal.prune(models["llama"], recipe=from_file, out=tmp_path / "out", stream=True)
    assert list(tmp_path.iterdir()) == []
