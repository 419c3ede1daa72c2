"""`neuroal pack`, `neuroal unpack` and `--save-packed`."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from neuroal.model import packing
from neuroal.packed import writing
from neuroal.packed.reading import packed

QUICK = ("--pruner", "magnitude", "--top-up", "uniform", "--sparsity", 0.7, "-q")
Tree = Callable[[], dict[str, str]]


def ok(result: Any) -> Any:
    assert result.exit_code == 0, result.stderr
    return result


def report(folder: str) -> dict[str, Any]:
    said: dict[str, Any] = json.loads(Path(folder, "neuroal.json").read_text())
    return said


@pytest.fixture
def pruned(folder: Path, run: Any) -> Path:
    """A run of the tiny model, pruned to 0.7, in `run`."""
    ok(run("prune", "tiny", *QUICK, "--out", "run"))
    return folder


def test_there_and_back(pruned: Path, run: Any, digests: Any) -> None:
    said = ok(run("pack", "run", "--out", "packed"))
    assert "packed" in said.stdout and "lm_head.weight" in said.stdout
    assert "packs 0.1 MiB of weights into about" in said.stderr
    found = json.loads(ok(run("pack", "run", "--compress", "--out", "zip", "--json")).stdout)
    assert found["packed_bytes"] == Path("zip/model.safetensors").stat().st_size
    assert found["dense_bytes"] == Path("run/model.safetensors").stat().st_size
    assert found["packed_bytes"] < Path("packed/model.safetensors").stat().st_size
    assert found["matrices"]["left_dense"].keys() == {"lm_head.weight", "model.embed_tokens.weight"}
    for name in ("packed", "zip"):
        ok(run("unpack", name, "--out", f"{name}-again", "-q"))
        files = {p.name: p.read_bytes() for p in Path("run").iterdir()}
        assert files == {p.name: p.read_bytes() for p in Path(f"{name}-again").iterdir()}


def test_the_size_is_that_of_masks_and_values(pruned: Path, run: Any) -> None:
    ok(run("pack", "run", "--out", "packed", "-q"))
    tensors = load_file("run/model.safetensors")
    opened = packed(Path("packed/model.safetensors"))
    assert opened is not None
    for x in opened.matrices():
        weight = tensors[x.name]
        kept = int((weight.view(torch.int32) != 0).sum())
        fits = (weight.numel() + 7) // 8 + 4 * kept
        assert x.packed == (fits < 4 * weight.numel())
        assert x.bytes == min(fits, 4 * weight.numel())


def test_the_report_and_the_card_say_how_large(pruned: Path, run: Any) -> None:
    dense = Path("tiny/model.safetensors").stat().st_size
    size = Path("run/model.safetensors").stat().st_size
    assert report("run")["weight_bytes"] == {"dense": dense, "pruned": size}
    ok(run("pack", "run", "--out", "packed", "-q"))
    small = Path("packed/model.safetensors").stat().st_size
    assert report("packed")["weight_bytes"] == {"dense": dense, "pruned": size, "packed": small}
    card = Path("packed/README.md").read_text()
    assert f"| packed | {small:,} |" in card and f"| dense | {dense:,} |" in card
    assert "import neuroal" in card
    assert "packed" not in Path("run/README.md").read_text()
    ok(run("report", "packed", "--out", "page.html"))
    assert f"{small:,}" in Path("page.html").read_text()


def test_the_report_says_which_matrices_stay_dense(pruned: Path, run: Any) -> None:
    """Those without zeros would be larger packed: page, card and JSON name or count them."""
    ok(run("pack", "run", "--out", "packed", "-q"))
    dense = {n: t for n, t in load_file("run/model.safetensors").items() if t.dim() > 1}
    left = {n: t.nbytes for n, t in dense.items() if not (t == 0).any()}
    said = report("packed")["packing"]
    assert left and said["left_dense"] == left and said["packed"] == len(dense) - len(left)
    assert said["dense_bytes"] == sum(t.nbytes for n, t in dense.items() if n not in left)
    assert report("run")["packing"] is None
    card = Path("packed/README.md").read_text()
    assert f"Matrices that would not be smaller stay as they are: {len(left)}." in card
    ok(run("report", "packed", "--out", "page.html"))
    page = Path("page.html").read_text()
    listed = page[page.index("Packed weights") :]
    assert all(name in listed for name in left)
    ok(run("unpack", "packed", "--out", "again", "-q"))
    assert report("again")["packing"] is None
    assert "Matrices that" not in Path("again/README.md").read_text()
    ok(run("prune", "tiny", *QUICK[:-1], "--save-packed", "--out", "once", "-q"))
    assert report("once")["packing"] == said


def test_a_card_that_someone_wrote_stays(pruned: Path, run: Any) -> None:
    Path("run/README.md").write_text("mine")
    ok(run("pack", "run", "--out", "packed", "-q"))
    assert Path("packed/README.md").read_text() == "mine"


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_save_packed_writes_it_at_once(
    stream: str, pruned: Path, run: Any, streaming: None
) -> None:
    said = ok(run("prune", "tiny", *QUICK[:-1], stream, "--save-packed", "--out", "once"))
    assert "weights packed" in said.stdout
    ok(run("prune", "tiny", *QUICK, stream, "--out", "dense"))
    ok(run("unpack", "once", "--out", "again", "-q"))
    one, other = (
        {p.name: p.read_bytes() for p in Path(x).iterdir() if p.suffix != ".json"}
        for x in ("again", "dense")
    )
    one.pop("README.md"), other.pop("README.md")
    assert one == other
    assert Path("again/config.json").read_bytes() == Path("dense/config.json").read_bytes()
    once = report("once")
    assert once["linears"] == report("dense")["linears"]
    assert once["weight_bytes"]["packed"] < once["weight_bytes"]["pruned"]
    ok(run("evaluate", "once", "--data", "text.txt", "--length", 16, "-q"))


def test_a_packed_folder_is_taken_by_every_command(pruned: Path, run: Any) -> None:
    ok(run("pack", "run", "--compress", "--out", "packed", "-q"))
    text = ("--data", "text.txt", "--length", 16, "-q")
    one, other = (ok(run("evaluate", x, *text)).stdout for x in ("run", "packed"))
    assert one == other
    compared = json.loads(ok(run("compare", "run", "packed", "--json")).stdout)
    assert compared["overall"]["masks"]["intersection_over_union"] == 1.0
    layouts = [json.loads(ok(run("layout", x, "--json")).stdout) for x in ("run", "packed")]
    assert layouts[0].pop("model") != layouts[1].pop("model") and layouts[0] == layouts[1]
    plan = ok(run("prune", "packed", *QUICK[:-1], "--dry-run")).stdout
    assert "2 blocks" in plan


def test_what_is_refused(pruned: Path, run: Any, tree: Tree) -> None:
    ok(run("pack", "run", "--out", "packed", "-q"))
    config = Path("run/config.json")
    Path("int8").mkdir()
    for file in Path("run").iterdir():
        Path("int8", file.name).write_bytes(file.read_bytes())
    said = json.loads(config.read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    Path("int8/config.json").write_text(json.dumps(said))
    before = tree()
    for arguments, code, message in (
        (("pack", "run", "--out", "packed"), 2, "exists: choose another or add --overwrite"),
        (("pack", "packed", "--out", "x"), 2, "'packed' is packed already: `neuroal unpack`"),
        (("unpack", "run", "--out", "x"), 2, "'run' is not packed"),
        (("pack", "int8", "--out", "x"), 1, "'int8' is quantised"),
        (("pack", "./no folder", "--out", "x"), 1, "is neither a folder"),
        (("pack", "owner/name", "--out", "x"), 2, "download it first (hf download owner/name"),
        (("pack", "run", "--out", "packed", "--resume"), 2, "nothing to resume"),
    ):
        result = run(*arguments)
        assert result.exit_code == code and message in result.stderr, arguments
        assert result.stderr.count("\n") == 1, result.stderr
    assert tree() == before


def test_a_broken_file_is_refused_and_leaves_nothing(pruned: Path, run: Any, tree: Tree) -> None:
    ok(run("pack", "run", "--out", "packed", "-q"))
    file = Path("packed/model.safetensors")
    data = bytearray(file.read_bytes())
    data[-1000] ^= 4
    file.write_bytes(data)
    before = tree()
    for command in (
        ("unpack", "packed", "--out", "x"),
        ("evaluate", "packed", "--data", "text.txt"),
    ):
        result = run(*command)
        assert result.exit_code == 1 and "SHA-256 is another" in result.stderr
        assert "Traceback" not in result.stderr
    assert tree() == before


def test_overwrite_replaces_a_run(pruned: Path, run: Any) -> None:
    ok(run("pack", "run", "--out", "packed", "-q"))
    before = Path("packed/model.safetensors").stat().st_size
    ok(run("pack", "run", "--compress", "--overwrite", "--out", "packed", "-q"))
    assert Path("packed/model.safetensors").stat().st_size < before


@pytest.mark.parametrize("command", ["pack", "unpack"])
def test_an_interrupted_try_goes_on(
    command: str, folder: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ok(run("prune", "tiny", *QUICK, "--out", "run"))
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained("run").save_pretrained("many", max_shard_size="20KB")
    ok(run("pack", "many", "--out", "packed", "-q"))
    source, out = ("many", "x") if command == "pack" else ("packed", "y")
    written: list[str] = []
    name = f"{command}_file"
    write = getattr(writing, name)

    def stops(file: Path, *rest: Any, **more: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        write(file, *rest, **more)
        written.append(file.name)

    monkeypatch.setattr(writing, name, stops)
    result = run(command, source, "--out", out)
    assert result.exit_code == 130 and f"--resume goes on from '{out}.partial'" in result.stderr
    assert not Path(out).exists()
    result = run(command, source, "--out", out)
    assert result.exit_code == 2 and "add --resume to go on" in result.stderr
    written.clear()
    monkeypatch.setattr(writing, name, lambda *x, **y: (written.append(x[0].name), write(*x, **y)))
    ok(run(command, source, "--out", out, "--resume"))
    files = packing.weight_files(Path(source))
    assert sorted(written) == sorted(f.name for f in files)[2:]
    other = "packed" if command == "pack" else "many"
    assert {p.name: p.read_bytes() for p in Path(out).iterdir()} == {
        p.name: p.read_bytes() for p in Path(other).iterdir()
    }
    assert not Path(f"{out}.partial").exists()


KILLED = """
import os, signal, sys
from neuroal.packed import writing
from neuroal.run import pack

command, source, out = sys.argv[1:]
name = f"{command}_file"
write, written = getattr(writing, name), []

def dies(file, target, *rest, **more):
    if len(written) == 2:
        target.write_bytes(file.read_bytes()[:1000])
        os.kill(os.getpid(), signal.SIGKILL)
    write(file, target, *rest, **more)
    written.append(file)

setattr(writing, name, dies)
getattr(pack, command)(source, out)
"""


@pytest.mark.parametrize("command", ["pack", "unpack"])
def test_a_killed_try_goes_on(
    command: str, folder: Path, run: Any, run_process: Callable[..., Any]
) -> None:
    """Half of a file is on the disk when it happens: it is not taken for a whole one."""
    ok(run("prune", "tiny", *QUICK, "--out", "run"))
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained("run").save_pretrained("many", max_shard_size="20KB")
    ok(run("pack", "many", "--out", "packed", "-q"))
    source, other = ("many", "packed") if command == "pack" else ("packed", "many")
    done = run_process([sys.executable, "-c", KILLED, command, source, "x"])
    assert done.returncode == -signal.SIGKILL and not Path("x").exists()
    ok(run(command, source, "--out", "x", "--resume", "-q"))
    assert {p.name: p.read_bytes() for p in Path("x").iterdir()} == {
        p.name: p.read_bytes() for p in Path(other).iterdir()
    }


def test_another_try_is_not_gone_on_with(pruned: Path, run: Any, monkeypatch: Any) -> None:
    def stops(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(packing, "copy_rest", stops)
        assert run("pack", "run", "--out", "x").exit_code == 130
    result = run("pack", "run", "--compress", "--out", "x", "--resume")
    assert result.exit_code == 2 and "belongs to another run" in result.stderr
    ok(run("pack", "run", "--out", "x", "--resume"))


def test_small_files_and_other_formats(pruned: Path, run: Any) -> None:
    Path("run/pytorch_model.bin").write_bytes(b"dense")
    Path("run/adapter").mkdir()
    Path("run/adapter/adapter_model.safetensors").write_bytes(b"small")
    Path("run/LICENSE").write_text("ours")
    said = ok(run("pack", "run", "--out", "packed")).stdout
    assert "not copied, since it holds weights in another format: pytorch_model.bin" in said
    assert Path("packed/adapter/adapter_model.safetensors").read_bytes() == b"small"
    assert Path("packed/LICENSE").read_text() == "ours"
    assert not Path("packed/pytorch_model.bin").exists()
