"""What is said before a run: seconds by hand, bytes by hand, and what memory is free."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import neuroal
import neuroal.cost.plan as plan_module
import neuroal.cost.timings as timings
from neuroal import Recipe
from neuroal.cost import probes
from neuroal.cost.estimate import needs, work
from neuroal.cost.offload import Needs, Offload
from neuroal.cost.plan import plan
from neuroal.cost.preparation import prepare
from neuroal.cost.texts import TextSize
from neuroal.cost.timings import time_block
from neuroal.cost.work import Work
from neuroal.errors import NeuroalError
from neuroal.layout import find
from neuroal.model import memory, pretrained
from neuroal.model.lazy_matrix import PART
from neuroal.search.alignment import Aligner
from neuroal.testing import STRUCTURES, tiny_model
from neuroal.walk import Inputs, Walker

PACE = {
    "dense": 1.0,
    "pruned": 10,
    "prune": 100,
    "final_dense": 1000,
    "final_pruned": 1e4,
    "final_prune": 1e5,
}


def timed(recipe: Recipe, timings: Mapping[str, float] = PACE) -> dict[str, float]:
    phases = work(prepare(recipe, tiny_model("llama")))
    return {name: phase.seconds(timings) for name, phase in phases.items()}


def test_seconds_by_hand(recipe: Recipe) -> None:
    """3 blocks, 2 candidates in each of 2 steps on 2 windows, 6 windows in the end.

    A step: 2 (3 - 1) + 1 = 5 blocks dense on 2 windows, 2 · 3 pruned on 2 windows, 2 · 3 to prune.
    """
    step = 2 * 5 * 1 + 2 * 6 * 10 + 6 * 100
    final = 6 * (3 * 1000 + 2 * 1e4) + 3 * 1e5
    assert timed(recipe) == {"search": 2 * step, "prune": final}
    uniform = dataclasses.replace(recipe, top_up="uniform", options={})
    assert timed(uniform) == {"prune": final}
    magnitude = dataclasses.replace(uniform, pruner="magnitude")
    assert timed(magnitude) == {"prune": 3 * 1e5}


def test_seconds_of_a_dense_walk_and_of_an_output_metric_by_hand(recipe: Recipe) -> None:
    owl = dataclasses.replace(recipe, top_up="owl", options={})
    measured = timed(owl, {**PACE, "measure": 1e6})["measure"]
    assert measured == 6 * 3 * 1 + 3 * 1e6
    output = dataclasses.replace(recipe, alignment="output_kl")
    more = timed(output, {**PACE, "logits": 1e7})["search"] - timed(recipe)["search"]
    # The dense reference once, and in each step its logits and those of two candidates.
    assert more == 2 * 3 * 1 + 2 * 2 * (2 + 1) * 1e7


def test_seconds_of_an_evaluation_by_hand(recipe: Recipe) -> None:
    """3 blocks, 5 windows of 8 and 4 of 16 tokens: 6.5, so 7 of 16, once dense and once pruned."""
    texts = [TextSize("a", 5, 8), TextSize("b", 4, 16), TextSize("unknown", None, 32)]
    prepared = prepare(recipe, tiny_model("llama"))
    phases = work(prepared, texts)
    assert phases["evaluate"] == Work(evaluate=2 * 7 * 3, losses=2 * 7)
    assert phases["evaluate"].seconds({"evaluate": 10.0, "losses": 1.0}) == 2 * 7 * (3 * 10 + 1)
    assert phases["evaluate"].block_runs == 0  # they say what the pruning costs
    assert {k: x for k, x in phases.items() if k != "evaluate"} == work(prepared)
    assert "evaluate" not in work(prepared, texts[2:])


def test_the_pace_of_an_evaluation_is_that_of_its_longest_windows(
    models: Mapping[str, Path], recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []
    plain = timings.cross_entropy

    def loss(logits: Tensor, tokens: Tensor) -> Tensor:
        seen.append((*logits.shape[:2], *tokens.shape))
        assert logits.shape[2] == 97  # the whole vocabulary
        return plain(logits, tokens)

    monkeypatch.setattr(timings, "cross_entropy", loss)
    monkeypatch.setattr(probes, "SECONDS", 1e9)  # on a busy machine too
    asked = dataclasses.replace(recipe, model=str(models["opt"]))
    made = time_block(prepare(asked), 16, [TextSize("a", 5, 8), TextSize("b", 4, 24)])
    assert {"evaluate", "losses", "dense", "final_prune"} <= made.seconds.keys()
    assert made.seconds["evaluate"] > 0 and made.seconds["losses"] > 0
    assert seen[-1] == (6, 24, 6, 24)  # 5 windows of 8 are as much as 2 of 24


def test_memory_of_an_evaluation_by_hand(
    models: Mapping[str, Path], from_file: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neuroal.cost.estimate.resident_memory", lambda: 0)
    asked = dataclasses.replace(from_file, model=str(models["llama"]), top_up="uniform", options={})
    prepared, text = prepare(asked), TextSize("a", 5, 64)
    without, withal = needs(prepared, 16), needs(prepared, 16, [text])
    logits = 32 * 64 * 97  # 2048 tokens in float32, and what the loss makes of them
    block = 4 * (4 * 32 * 32 + 3 * 32 * 48 + 2 * 32)
    assert withal.work == block + 2 * 4 * logits + 3 * 4 * logits > without.work
    head = 4 * 97 * 32
    assert withal.streamed - without.streamed == head - min(PART, head)
    assert withal.activations == 3 * 16384 * 32 * 4  # as many tokens at once, of width 32
    longer = dataclasses.replace(prepared, recipe=dataclasses.replace(asked, samples=2048))
    assert needs(longer, 16, [text]).activations == needs(longer, 16).activations


def test_the_pace_has_what_the_run_does(models: Mapping[str, Path], recipe: Recipe) -> None:
    asked = dataclasses.replace(recipe, model=str(models["opt"]))
    each = {f.name for f in dataclasses.fields(Work)}
    search = {"dense", "pruned", "prune"}
    final = {"final_dense", "final_pruned", "final_prune"}
    cases: dict[str, tuple[dict[str, Any], set[str]]] = {
        "neuroal": ({}, search | final),
        "output": ({"alignment": "output_kl"}, search | final | {"logits"}),
        "owl": ({"top_up": "owl", "options": {}}, search | final | {"measure"}),
        "magnitude": ({"pruner": "magnitude"}, search | {"final_prune"}),
        "refit": (
            {"reconstruction": "refit"},
            search | final | {"own", "stage", "reconstruct"},
        ),
        "block": (
            {"reconstruction": "block"},
            search | final | {"own", "stage", "reconstruct", "differentiate"},
        ),
    }
    for changes, used in cases.values():
        changed = dataclasses.replace(asked, **changes)
        made = time_block(prepare(changed), 16).seconds
        assert used <= each and made.keys() == used, changes
        assert all(seconds > 0 for seconds in made.values())


def test_the_pace_runs_as_the_search_will(
    models: Mapping[str, Path], recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, object, object]] = []
    plain = Walker.run

    def run(self: Walker, block: Any, module: Any, inputs: Any, *given: Any, **how: Any) -> Any:
        own = next(module.parameters()).dtype
        seen.append((len(inputs.batches[0]), inputs.dtype, own))
        return plain(self, block, module, inputs, *given, **how)

    monkeypatch.setattr(Walker, "run", run)
    monkeypatch.setattr(probes, "SECONDS", 1e9)
    asked = dataclasses.replace(recipe, model=str(models["llama"]), batch=3)
    time_block(prepare(asked), 16)
    assert set(seen) == {(n, None, torch.float32) for n in (1, 2, 3)}  # up to the run's own batch
    seen.clear()
    half = dataclasses.replace(asked, search_dtype="bfloat16")
    time_block(prepare(half), 16)  # what prunes for good runs in the model's own dtype
    assert {x for x in seen if x[0] == 3} == {
        (3, torch.bfloat16, torch.bfloat16),
        (3, None, torch.float32),
    }


@pytest.mark.parametrize("structure", STRUCTURES)
def test_one_block_of_the_same_shapes(structure: str, models: Mapping[str, Path]) -> None:
    whole = find(tiny_model(structure)).blocks[0]
    made = find(pretrained.one_block(str(models[structure]), "cpu", "auto", 50)).blocks
    assert len(made) == 1
    shapes = [[(x.out_features, x.in_features, x.group) for x in b.linears] for b in (*made, whole)]
    assert shapes[0] == shapes[1]


def test_what_cannot_be_timed_is_said_to_be_unknown(
    models: Mapping[str, Path], from_file: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(*_: object, **__: object) -> None:
        raise NeuroalError("not with one block")

    recipe = dataclasses.replace(from_file, model=str(models["llama"]))
    assert plan(prepare(recipe)).seconds is None
    known = plan(prepare(recipe), timed=True).to_json()["seconds"]
    assert set(known) == {"search", "prune"} and min(known.values()) > 0
    monkeypatch.setattr(pretrained, "one_block", cannot)
    assert plan(prepare(recipe), timed=True).seconds is None


# -- bytes -----------------------------------------------------------------------------------


def test_bytes_by_hand(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neuroal.cost.estimate.resident_memory", lambda: 0)
    model = tiny_model("llama").to("meta")
    made = needs(prepare(recipe, model), 16)
    block = 4 * (4 * 32 * 32 + 3 * 32 * 48 + 2 * 32)
    around = 4 * (2 * 97 * 32 + 32)
    weights = 3 * block + around
    assert around == 4 * 32 + 2 * (4 * 97 * 32)  # the norm, and two parts of a matrix: all of it
    # Embeddings of 2 windows, 2 more states beside 2 candidates; in the end 3 states of 6 windows.
    states = max(2 * (2 + 2), 2 + 3 * 6) * 16 * 32 * 4
    work = 4 * 4 * 32 * 48 + 4 * (6 * 16) * 4 * 48
    assert made.activations == states
    own = 48 << 20  # what is loaded later; the process holds nothing here, and has no tokenizer
    assert made.memory(Offload()) == own + weights + block + states + work
    assert made.memory(Offload(blocks=True)) == own + around + 2 * block + states + work
    # All 6 windows are one batch: read, handed on, what came before, and what the block is given.
    batch = 4 * (6 * 16) * 32 * 4
    assert batch > states // 2
    held = own + weights + block + min(batch, states) + work
    assert made.memory(Offload(activations=True)) == held
    assert made.memory(Offload(True, True)) == held - weights + around + block
    for spills in (False, True):  # what a long walk keeps, and what is held on the disk
        kept = (1 + spills) * states
        disk = [made.disk(Offload(blocks, spills)) for blocks in (False, True)]
        assert disk == [2 * weights + kept, weights + kept]
    also = needs(prepare(recipe, model), 16, saves_masks=True)  # a bit a weight
    bits = 3 * (4 * 32 * 32 + 3 * 32 * 48) // 8
    for offload in (Offload(), Offload(True, True)):
        assert also.disk(offload) - made.disk(offload) == bits
        assert also.memory(offload) - made.memory(offload) == bits


def test_a_large_vocabulary_counts_where_logits_are_asked_for(recipe: Recipe) -> None:
    """Streamed, of embeddings and head no more than two parts: the head's rows, or all of it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, vocab_size=200_000, num_attention_heads=4)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    matrix, block = 4 * 200_000 * 32, 4 * (4 * 32 * 32 + 3 * 32 * 48 + 2 * 32)
    assert matrix > PART
    for alignment, read in {"neuron": 2 * PART, "output_kl": PART + matrix}.items():
        asked = dataclasses.replace(recipe, alignment=alignment)
        made = needs(prepare(asked, model), 16)
        assert made.streamed == block + 4 * 32 + read
        assert made.weights == 2 * block + 4 * 32 + 2 * matrix


def test_bytes_follow_what_is_asked(recipe: Recipe) -> None:
    model = tiny_model("llama").to("meta")

    def bytes_of(**changes: Any) -> Needs:
        changed = dataclasses.replace(recipe, **changes)
        return needs(prepare(changed, model), 16)

    made = bytes_of()
    few = bytes_of(batch=2)  # 2 of the 6 windows pass a block together
    assert made.work - few.work == 4 * (4 * 16) * 4 * 48
    assert few.activations == made.activations and few.batch == 4 * (2 * 16) * 32 * 4 < made.batch
    cast = bytes_of(search_dtype="bfloat16")  # the final pruning's states count
    assert cast.activations == made.activations
    half = bytes_of(dtype="bfloat16")
    assert half.checkpoint == made.weights // 2
    assert half.weights == half.checkpoint  # and the files that are mapped meanwhile
    assert (half.loading, made.loading) == (made.weights, 0)
    # Inputs of q/k/v, o, gate/up and down of 2 windows beside 4 states of the search.
    many = {"samples": 2, "alignment": "relative_l2"}
    compared = bytes_of(**many).activations
    assert compared == 2 * 16 * (4 * 32 + 32 + 32 + 32 + 48) * 4
    output = bytes_of(samples=2, alignment="output_kl").activations  # the dense model's output
    assert output == max(2 * (2 + 3), 2 + 3 * 2) * 16 * 32 * 4


@pytest.mark.parametrize("top_up", ["best", "best-slow", "evolution", "neuroal"])
def test_candidates_that_are_side_by_side_are_counted(
    top_up: str, recipe: Recipe, windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    plain = Aligner.measure

    def measure(self: Aligner, trials: Any, inputs: Inputs, *rest: Any) -> Any:
        seen.append(len(trials) * inputs.windows)
        return plain(self, trials, inputs, *rest)

    monkeypatch.setattr(Aligner, "measure", measure)
    few = {"evolution": {"evolution": {"generations": 3, "offspring": 9}}}
    asked = dataclasses.replace(recipe, top_up=top_up, options=few.get(top_up, {}))
    model = tiny_model("llama")
    steps = prepare(asked, model).steps
    neuroal.prune(model, None, asked, windows=windows)
    # How many candidates a strategy thinks worth it may follow their costs, which are not known.
    assert max(seen) == pytest.approx(max(s.widest for s in steps), rel=0.1)


def test_no_activations_where_nothing_reads_them(recipe: Recipe) -> None:
    blind = dataclasses.replace(recipe, pruner="magnitude", top_up="uniform", options={})
    made = needs(prepare(blind, tiny_model("llama").to("meta")), 16)
    assert (made.activations, made.batch, made.work) == (
        0,
        0,
        4 * (4 * 32 * 32 + 3 * 32 * 48 + 2 * 32) + 4 * 4 * 32 * 48,
    )


def test_a_tokenizer_is_counted_by_its_largest_file(
    models: Mapping[str, Path], recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neuroal.cost.estimate.resident_memory", lambda: 1 << 20)
    asked = dataclasses.replace(recipe, model=str(models["llama"]))
    size = (models["llama"] / "tokenizer.json").stat().st_size
    assert needs(prepare(asked), 16).process == (1 << 20) + (48 << 20) + 13 * size


def test_a_model_in_memory_is_held_already(recipe: Recipe) -> None:
    model = tiny_model("llama")
    half = dataclasses.replace(recipe, dtype="bfloat16")
    made = needs(prepare(half, model), 16)
    size = sum(4 * p.numel() for p in model.parameters())
    assert (made.weights, made.streamed, made.checkpoint) == (0, 0, size)  # it stays as it is


def test_a_long_run_says_how_long(
    models: Mapping[str, Path], from_file: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from click.testing import CliRunner

    from neuroal.cli import main

    calibration = ["--calibration", str(from_file.calibration), "--samples", "2"]
    given = ["prune", str(models["llama"]), *calibration, "--top-up", "uniform", "--out"]
    short = CliRunner().invoke(main, [*given, str(tmp_path / "a")])
    assert "will take" not in short.stderr
    monkeypatch.setattr(plan_module, "LONG", 1.0)
    long = CliRunner().invoke(main, [*given, str(tmp_path / "b")])
    assert long.exit_code == 0 and long.stderr.startswith("this will take about ")
    quiet = CliRunner().invoke(main, [*given, str(tmp_path / "c"), "--quiet"])
    assert quiet.stderr == ""


# -- what is free ----------------------------------------------------------------------------


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 8 GiB free and no container: files that a test may change."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    8388608 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    (tmp_path / "proc/self/status").write_text(
        "VmRSS:\t 1024 kB\nVmSize:\t 2048 kB\nVmData: 512 kB\n"
    )
    monkeypatch.setattr(memory, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path / "cgroup")
    return tmp_path


def container(folder: Path, names: Mapping[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in names.items():
        (folder / name).write_text(f"{value}\n")


def test_the_machine(system: Path) -> None:
    assert memory.available_memory() == 8 << 30
    assert memory.resident_memory() == 1 << 20


def test_a_container_of_the_second_kind(system: Path) -> None:
    (system / "proc/self/cgroup").write_text("0::/a/b\n")
    inner = {"memory.max": "max", "memory.current": 5}
    outer = {"memory.max": 3 << 30, "memory.current": 2 << 30, "memory.stat": "inactive_file 4096"}
    container(system / "cgroup/a/b", inner)
    container(system / "cgroup/a", outer)
    assert memory.available_memory() == (1 << 30) + 4096


def test_a_container_of_the_first_kind(system: Path) -> None:
    (system / "proc/self/cgroup").write_text("3:cpu:/x\n4:memory:/seen/from/outside\n0::/\n")
    limits = {"memory.limit_in_bytes": 2 << 30, "memory.usage_in_bytes": 3 << 30}
    container(system / "cgroup/memory", limits)
    assert memory.available_memory() == 0


@pytest.mark.parametrize(("kind", "used"), [("RLIMIT_AS", 2048), ("RLIMIT_DATA", 512)])
def test_the_limits_of_the_process(
    kind: str, used: int, system: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resource = pytest.importorskip("resource")
    limits = {getattr(resource, kind): 1 << 30}
    none = resource.RLIM_INFINITY
    monkeypatch.setattr(resource, "getrlimit", lambda k: (limits.get(k, none), none))
    assert memory.available_memory() == (1 << 30) - used * 1024


def test_a_system_that_does_not_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_PROC", tmp_path)
    assert memory.available_memory() is None and memory.resident_memory() == 0


def test_the_dry_run_says_what_memory_would_do(
    models: Mapping[str, Path], from_file: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = dataclasses.replace(from_file, model=str(models["llama"]))
    prepared = prepare(recipe)
    assert plan(prepared).offload == Offload()
    assert plan(prepared, stream=True).offload == Offload(True)
    monkeypatch.setattr(plan_module, "available_memory", lambda _: 0)
    made = plan(prepared)
    assert made.offload == Offload(True, True)  # even so it would not fit
    data = json.loads(json.dumps(made.to_json()))
    assert (data["streams"], data["spills"]) == (True, True)
    assert data["memory_bytes"] == made.needs.memory(made.offload) < made.needs.memory(Offload())
    assert data["disk_bytes"] == made.needs.disk(made.offload)
    assert plan(prepared, stream=False, spill=True).offload == Offload(False, True)
    assert plan(prepared, stream=True, spill=False).offload == Offload(True, False)
