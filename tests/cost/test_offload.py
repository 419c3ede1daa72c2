"""Activations on the disk: chosen where it takes that to fit, the same bits, and nothing left."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

import neuroal
from neuroal import NeuroalError, Recipe, engine
from neuroal.cost.offload import Needs, Offload, decide
from neuroal.cost.plan import plan
from neuroal.cost.preparation import prepare
from neuroal.model import pretrained
from neuroal.testing import tiny_model
from neuroal.testing import windows as random_windows
from neuroal.walk import Walker, activations

Tensors = dict[str, Tensor]
Read = Callable[[Path], Tensors]
Same = Callable[[Tensors, Tensors], bool]
REPORT = ("candidates", "sparsity", "blocks", "linears", "counts", "recipe_sha256", "model", "data")

# 1 GiB at work, 8 of weights or 2 with one block at a time, 6 of activations or 1 of a batch's.
NEEDS = Needs(0, *(n << 30 for n in (1, 8, 2, 6, 1, 8)))


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files, empty."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def folders(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Where activations are held, from now on."""
    seen: list[Path] = []
    plain = activations.on_disk

    def on_disk(folder: Path) -> Any:
        seen.append(folder)
        return plain(folder)

    monkeypatch.setattr(activations, "on_disk", on_disk)
    return seen


# -- the decision ----------------------------------------------------------------------------


@pytest.fixture
def nothing_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neuroal.cost.offload.resident_memory", lambda: 0)


def test_needs_by_hand(nothing_held: None) -> None:
    ways = [Offload(b, a) for b in (False, True) for a in (False, True)]
    assert [NEEDS.memory(way) >> 30 for way in ways] == [15, 10, 9, 4]
    # 6 GiB beside the weights while these are loaded are more than work and a batch's activations.
    loading = dataclasses.replace(NEEDS, loading=6 << 30)
    assert [loading.memory(way) >> 30 for way in ways] == [15, 14, 9, 4]
    # What a long walk keeps of its activations is counted beside the checkpoint, once or twice.
    assert [NEEDS.disk(way) >> 30 for way in ways] == [16 + 6, 16 + 12, 8 + 6, 8 + 12]


def test_what_is_lacking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neuroal.cost.offload.resident_memory", lambda: 1 << 30)
    assert NEEDS.lack(Offload(), 14 << 30) is None and NEEDS.lack(Offload(), None) is None
    said = "the run needs about 14.0 GiB of memory, 512.0 MiB are available"
    assert NEEDS.lack(Offload(), 1 << 29) == said
    assert NEEDS.lack(Offload(True, True), 3 << 30) is None


CHOICES: dict[tuple[float, bool | None, bool | None], Offload] = {
    # GiB that are free, --stream, --spill
    (15, None, None): Offload(False, False),
    (14, None, None): Offload(True, False),
    (8, None, None): Offload(True, True),
    (10, False, None): Offload(False, True),
    (15, False, None): Offload(False, False),
    (8, True, None): Offload(True, True),
    (99, None, True): Offload(False, True),
    (9, None, True): Offload(True, True),
    (9, None, False): Offload(True, False),
    (99, True, True): Offload(True, True),
}


@pytest.mark.parametrize("given", CHOICES)
def test_no_more_is_on_the_disk_than_it_takes(
    given: tuple[int, bool | None, bool | None], nothing_held: None, tmp_path: Path
) -> None:
    free, stream, spill = given
    (tmp_path / "config.json").write_text("{}")
    chosen, note = decide(NEEDS, str(tmp_path), stream, spill, free << 30)
    assert chosen == CHOICES[given]
    unasked = (chosen.blocks and stream is None, chosen.activations and spill is None)
    words = ("blocks are read from the disk one at a time", "activations are held on the disk")
    if any(unasked):
        said = ", ".join(w for w, is_said in zip(words, unasked, strict=True) if is_said)
        assert note is not None and note.endswith(f"GiB are available: {said}")
    else:
        assert note is None


def test_weights_that_fit_stay_where_activations_are_what_is_too_large(nothing_held: None) -> None:
    """With the weights alone on the disk it would not fit; with the activations alone it does."""
    needs = dataclasses.replace(NEEDS, activations=90 << 30)
    assert needs.choose(None, None, 12 << 30) == Offload(False, True)
    assert needs.choose(None, None, 9 << 30) == Offload(True, True)
    assert needs.choose(None, None, None) == Offload()


def test_a_model_in_memory_is_not_streamed(nothing_held: None) -> None:
    needs = dataclasses.replace(NEEDS, weights=0, streamed=0)
    assert decide(needs, None, None, None, 7 << 30) == (Offload(), None)
    assert decide(needs, None, None, None, 6 << 30)[0] == Offload(False, True)


@pytest.mark.parametrize(
    ("path", "stream", "spill", "cure"),
    [
        ("here", None, None, "a smaller --batch or a shorter --length needs less"),
        ("here", False, None, "--stream needs less"),
        ("here", False, False, "--stream --spill needs less"),
        ("here", None, False, "--spill needs less"),
        (None, None, False, "--spill needs less"),
        (None, None, None, "a smaller --batch or a shorter --length needs less"),
    ],
)
def test_what_would_help(  # nothing fits
    path: str | None, stream: bool | None, spill: bool | None, cure: str,
    nothing_held: None, tmp_path: Path,
) -> None:  # fmt: skip
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(NeuroalError, match=f"are available: {cure}$"):
        decide(NEEDS, str(tmp_path) if path else None, stream, spill, 1 << 20)


def test_a_limit_below_what_python_needs(nothing_held: None) -> None:
    needs = dataclasses.replace(NEEDS, process=2 << 30)
    said = (
        "Python and its libraries alone take about 2.0 GiB of memory, 1.5 GiB are available in all"
    )
    for path in (None, "somewhere"):
        with pytest.raises(NeuroalError, match=f"^{said}: give more$"):
            decide(needs, path, None, None, 3 << 29)
    with pytest.raises(NeuroalError, match=r"^the run needs about 6.0 GiB"):
        decide(needs, "somewhere", True, True, 5 << 29)


def test_what_would_fit_is_named(nothing_held: None) -> None:
    asked = ("somewhere", False, False)
    for free, cure in {14: "--stream", 8: "--stream --spill"}.items():
        with pytest.raises(NeuroalError, match=f"are available: {cure} needs less$"):
            decide(NEEDS, *asked, free << 30)
    many = dataclasses.replace(NEEDS, activations=90 << 30)
    with pytest.raises(NeuroalError, match=r"are available: --spill needs less$"):
        decide(many, *asked, 12 << 30)


# -- the same bits ---------------------------------------------------------------------------


def test_same_bits_on_every_structure(
    structure: str, recipe: Recipe, windows: Tensor, same: Same,
    weights_of: Callable[[nn.Module], Tensors], folders: list[Path], temporary: Path,
) -> None:  # fmt: skip
    """A model in memory, without an output: the folder for temporary files holds them."""
    made = []
    asked = dataclasses.replace(recipe, batch=2)
    for spill in (False, True):
        model = tiny_model(structure)
        report = neuroal.prune(model, None, asked, windows=windows, spill=spill)
        made.append((report, weights_of(model)))
        left = {p.name for p in temporary.iterdir() if not p.name.startswith("torchinductor")}
        assert left == set()
    assert folders == [temporary]
    assert same(made[0][1], made[1][1])
    for key in REPORT:
        assert getattr(made[0][0], key) == getattr(made[1][0], key), key


CASES: dict[str, dict[str, Any]] = {
    "dense walk": {"top_up": "owl"},
    "output metric": {"alignment": "output_kl"},
    "comparing metric": {"alignment": "relative_l2"},
    "search in half precision": {"search_dtype": "bfloat16"},
    "bfloat16": {"dtype": "bfloat16"},
    "moves weights": {"pruner": "sparsegpt", "top_up": "neuroal-block"},
    "refiner": {"refiner": "dsnot", "top_up": "uniform"},
    "later generations": {"top_up": "evolution"},
}
FEW = {"generations": 2, "offspring": 4, "windows": (1,), "survivors": (2,)}
OPTIONS = {"evolution": {"evolution": FEW}}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_same_bits_whatever_runs(
    case: str, stream: bool, models: Mapping[str, Path], from_file: Recipe, tmp_path: Path,
    read: Read, same: Same, folders: list[Path],
) -> None:  # fmt: skip
    if stream:
        pytest.importorskip("transformers.conversion_mapping")
    top_up = CASES[case].get("top_up", "neuroal")
    used = {"neuroal": {"linear_schedule", "neuroal"}, "neuroal-block": {"linear_schedule"}}
    options = {k: v for k, v in from_file.options.items() if k in used.get(top_up, ())}
    options |= OPTIONS.get(top_up, {})
    recipe = dataclasses.replace(from_file, options=options, batch=2, **CASES[case])
    for name, spill in {"memory": False, "disk": True}.items():
        given = {"stream": spill and stream, "spill": spill}
        neuroal.prune(models["mistral"], recipe=recipe, out=tmp_path / name, **given)
    assert folders == [tmp_path]
    assert same(read(tmp_path / "memory"), read(tmp_path / "disk"))
    reports = [json.loads((tmp_path / n / "neuroal.json").read_text()) for n in ("memory", "disk")]
    for key in REPORT:
        assert reports[0][key] == reports[1][key], key
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "memory"]


# -- chosen, refused, interrupted ------------------------------------------------------------


def test_chosen_where_activations_do_not_fit(
    models: Mapping[str, Path], from_file: Recipe, recipe: Recipe, windows: Tensor, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, folders: list[Path], temporary: Path,
) -> None:  # fmt: skip
    lacks = {Offload(): "too large", Offload(True): "still too large", Offload(False, True): None}
    monkeypatch.setattr(Needs, "lack", lambda _, way, free: lacks[way])
    by_path = neuroal.prune(models["llama"], recipe=from_file, out=tmp_path / "out")
    in_memory = neuroal.prune(tiny_model("llama"), None, recipe, windows=windows)
    for report in (by_path, in_memory):
        assert report.notes == ["too large: activations are held on the disk"]
    assert folders == [tmp_path, temporary]
    assert by_path.candidates == in_memory.candidates
    with pytest.raises(NeuroalError, match=r"^too large: --spill needs less$"):
        given = {"stream": False, "spill": False}
        neuroal.prune(models["llama"], recipe=from_file, out=tmp_path / "no", **given)
    with pytest.raises(NeuroalError, match=r"^too large: --spill needs less$"):
        neuroal.prune(tiny_model("llama"), None, recipe, windows=windows, spill=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "temporary"]


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts what is mapped on Linux")
def test_activations_larger_than_the_limit(
    models: Mapping[str, Path], from_file: Recipe, tmp_path: Path, read: Read, same: Same
) -> None:
    """144 MiB of states under 112 MiB: refused in memory, the same bits on the disk, by itself."""
    pytest.importorskip("transformers.conversion_mapping")  # the script streams, too
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 97, "hidden_size": 384, "intermediate_size": 512}
    more = {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
    LlamaForCausalLM(LlamaConfig(**sizes, **more)).save_pretrained(tmp_path / "model")
    source = tmp_path / "windows.jsonl"
    rows = (json.dumps({"input_ids": w.tolist()}) + "\n" for w in random_windows(512, 64))
    source.write_text("".join(rows))
    changes = {"top_up": "uniform", "options": {}, "samples": 512, "calibration": str(source)}
    uniform = dataclasses.replace(from_file, **changes)
    given = {
        "limit": 112 << 20,
        "recipe": uniform.to_json(),
        "small": str(models["llama"]),
        "model": str(tmp_path / "model"),
        "runs": {"in memory": {"stream": False, "spill": False}, "chosen": {"stream": False}},
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
    assert said["in memory"].endswith("MiB are available: --spill needs less")
    assert said["chosen"].endswith("MiB are available: activations are held on the disk")
    neuroal.prune(tmp_path / "model", recipe=uniform, out=tmp_path / "whole", spill=False)
    assert same(read(tmp_path / "whole"), read(tmp_path / "chosen"))


def test_a_disk_that_cannot_hold_activations(
    models: Mapping[str, Path], from_file: Recipe, recipe: Recipe, windows: Tensor, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, folders: list[Path], temporary: Path,
) -> None:  # fmt: skip
    """Refused before any weight is read, where the result alone would have had room."""
    asked = dataclasses.replace(from_file, model=str(models["llama"]), length=16)
    needs = plan(prepare(asked)).needs
    room = needs.disk(Offload()) + needs.activations // 2
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=room))
    with monkeypatch.context() as patch:
        patch.setattr(pretrained, "load", None)
        with pytest.raises(NeuroalError, match=r"out' needs .* MiB of disk"):
            neuroal.prune(models["llama"], recipe=asked, out=tmp_path / "out", spill=True)
    room = needs.activations // 2
    with pytest.raises(NeuroalError, match=r"temporary' needs .* MiB of disk"):
        neuroal.prune(tiny_model("llama"), None, recipe, windows=windows, spill=True)
    neuroal.prune(tiny_model("llama"), None, recipe, windows=windows, spill=False)
    assert folders == [] and sorted(p.name for p in tmp_path.iterdir()) == ["temporary"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, NeuroalError, MemoryError])
def test_nothing_is_left_and_resume_goes_on(
    error: type[BaseException], models: Mapping[str, Path], from_file: Recipe, tmp_path: Path,
    read: Read, same: Same, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Stopped in the middle of the search's second step: its first step alone is kept."""
    run, calls = Walker.run, 0

    def stop(self: Walker, *given: Any, **how: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 15:
            raise error("stopped")
        return run(self, *given, **how)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Walker, "run", stop)
        with pytest.raises(error):
            neuroal.prune(models["opt"], recipe=from_file, out=out, spill=True)
    left = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    if error is NeuroalError:  # the input's: it would fail again
        assert left == set()
    else:
        steps = {f for f in left if "block_ratios" in f and f.startswith("out.partial/journal/")}
        kept = {"out.partial/run.json", "out.partial/journal/kept.json"}
        assert left == {*kept, *steps} and len(steps) == 1
    neuroal.prune(models["opt"], recipe=from_file, out=out, spill=False, resume=True)
    neuroal.prune(models["opt"], recipe=from_file, out=tmp_path / "whole", spill=False)
    assert same(read(out), read(tmp_path / "whole"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]


def test_where_the_folder_of_the_output_is_still_to_be_made(
    models: Mapping[str, Path], from_file: Recipe, tmp_path: Path, folders: list[Path],
    temporary: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The nearest folder that is there; that for temporary files where none is writable."""
    neuroal.prune(models["llama"], recipe=from_file, out=tmp_path / "a/b/out", spill=True)
    assert folders == [tmp_path / "a/b"]
    checked = os.access
    with monkeypatch.context() as patch:  # as on another machine of a team, which has no output
        patch.setattr(engine.run_folder, "check", lambda *_: None)
        patch.setattr(os, "access", lambda p, mode: mode != os.W_OK and checked(p, mode))
        neuroal.prune(models["llama"], recipe=from_file, out=tmp_path / "other", spill=True)
    assert folders == [tmp_path / "a/b", temporary]


def test_the_command_line(
    models: Mapping[str, Path], from_file: Recipe, tmp_path: Path, folders: list[Path]
) -> None:
    from click.testing import CliRunner

    from neuroal.cli import main

    given = ["prune", str(models["llama"]), "--calibration", str(from_file.calibration)]
    given += ["--samples", "2", "--top-up", "uniform", "--out"]
    for option in ("--spill", "--no-spill"):
        done = CliRunner().invoke(main, [*given, str(tmp_path / option), option])
        assert done.exit_code == 0, done.stderr
    assert folders == [tmp_path]
    dry = CliRunner().invoke(main, [*given, str(tmp_path / "dry"), "--spill", "--dry-run"])
    assert "activations on the disk" in dry.stdout
    dry = CliRunner().invoke(main, [*given, str(tmp_path / "dry"), "--dry-run"])
    assert "with --stream" in dry.stdout and "with --spill too" in dry.stdout
