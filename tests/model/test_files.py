"""What a model is loaded from and named by, and how files are written."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

import neuroal
from neuroal import NeuroalError
from neuroal.model import pretrained
from neuroal.model.files import fingerprint, weight_files, write_atomically
from neuroal.testing import tiny_model


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A model of two blocks in several files with an index."""
    model: Any = tiny_model("llama", blocks=2)
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    assert len(weight_files(tmp_path / "model")) > 1
    return tmp_path / "model"


def test_the_fingerprint_is_that_of_what_is_read(sharded: Path) -> None:
    first = fingerprint(str(sharded))
    (sharded / "allocation.safetensors").write_bytes(b"not read")
    (sharded / "README.md").write_text("not read")
    assert fingerprint(str(sharded)) == first
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    index.write_text(json.dumps(content | {"more": 1}))
    assert fingerprint(str(sharded)) != first
    index.write_text(json.dumps(content, indent=2))
    names = sorted(set(content["weight_map"].values()))
    (sharded / "deep").mkdir()  # a shard below the folder
    os.replace(sharded / names[0], sharded / "deep/first.safetensors")
    moved = {
        k: "deep/first.safetensors" if v == names[0] else v
        for k, v in content["weight_map"].items()
    }
    index.write_text(json.dumps({"weight_map": moved}))
    before = fingerprint(str(sharded))
    shard = sharded / "deep/first.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    assert fingerprint(str(sharded)) != before


@pytest.mark.parametrize("place", ["../elsewhere.safetensors", "{parent}/elsewhere.safetensors"])
def test_shards_outside_the_folder_are_refused(place: str, sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = next(iter(content["weight_map"].values()))
    os.replace(sharded / name, sharded.parent / "elsewhere.safetensors")
    place = place.format(parent=sharded.parent)
    moved = {k: place if v == name else v for k, v in content["weight_map"].items()}
    index.write_text(json.dumps({"weight_map": moved}))
    for stream in (False, True):
        with pytest.raises(NeuroalError, match=r"elsewhere.* is outside the folder"):
            neuroal.prune(
                sharded, pruner="magnitude", top_up="uniform", out=sharded.parent / "out",
                stream=stream,
            )  # fmt: skip
    assert not list(sharded.parent.glob("out*"))


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', '{"weight_map": null}'],
)
def test_damaged_index(text: str, sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(NeuroalError, match=r"index\.json'") as error:
        weight_files(sharded)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("stream", [False, True])
def test_blocks_that_the_config_leaves_out_are_refused(stream: bool, tmp_path: Path) -> None:
    model: Any = tiny_model("llama", blocks=3)
    model.save_pretrained(tmp_path / "model")
    config = tmp_path / "model/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 2}))
    said = r"holds the weight 'model\.layers\.2\.\S+', but its config\.json .* 2 of 'model\.layers'"
    with pytest.raises(NeuroalError, match=said):
        neuroal.prune(
            tmp_path / "model", pruner="magnitude", top_up="uniform", out=tmp_path / "out",
            stream=stream,
        )  # fmt: skip
    with pytest.raises(NeuroalError, match=said):
        pretrained.load(str(tmp_path / "model"))
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    further = json.loads(config.read_text()) | {"num_nextn_predict_layers": 1}
    config.write_text(json.dumps(further))  # a layer behind the blocks, of another purpose
    pretrained.load(str(tmp_path / "model"))


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"before")

    def full(path: Path, data: bytes) -> None:
        with path.open("wb") as stream:
            stream.write(data[:2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "file", b"after")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"before")]
