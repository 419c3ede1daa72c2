"""`neuroal prune` on a tiny model, end to end: what it writes, says and repeats."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from neuroal import engine, progress
from neuroal.cli.recipe import default_out, parse_options
from neuroal.cost import preparation
from neuroal.errors import UsageError
from neuroal.model import pretrained
from neuroal.recipe import Recipe

OUT = Path("tiny-wanda-neuroal-0.5")
MINE = '''
from dataclasses import dataclass
from neuroal import hookimpl, option

@dataclass(frozen=True, eq=False)
class Mine:
    """Keeps what is far from a centre."""

    centre: float = option(0.0, "what is pruned first")

    @hookimpl
    def score_weights(self, weight):
        print("scoring")
        return (weight - self.centre).abs()
'''


def report(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / "neuroal.json").read_text())
    return value


def sums(folder: Path) -> dict[str, str]:
    files = folder.glob("*.safetensors")
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def ok(result: Any) -> Any:
    assert result.exit_code == 0, result.stderr
    return result


def test_summary_and_default_folder(folder: Path, prune: Any) -> None:
    result = ok(prune("--top-up", "neuroal"))
    assert result.stderr == ""
    (out,) = folder.glob(f"{OUT}*")
    assert re.fullmatch(rf"{OUT}-rows-4samples-[0-9a-f]{{6}}", out.name)
    said = report(out)
    chosen = {c["role"]: c["parameters"]["lam"] for c in said["candidates"] if c["selected"]}
    assert f"linear_schedule, λ = {chosen['block_ratios']}" in result.stdout
    assert f"neuroal, λ = {chosen['row_ratios']}" in result.stdout
    assert f"{said['counts']['block_runs']:,}" in result.stdout
    assert "0.500000" in result.stdout and out.name in result.stdout
    assert "best of 14" in result.stdout and "best of 15" in result.stdout
    assert sorted(p.name for p in folder.iterdir()) == ["rows.jsonl", "text.txt", "tiny", out.name]


def test_folder_is_a_checkpoint_and_its_zeros_are_the_reports(folder: Path, prune: Any) -> None:
    ok(prune("--sparsity", 0.7, "--out", "out"))
    model = AutoModelForCausalLM.from_pretrained("out")
    tokenizer = AutoTokenizer.from_pretrained("out")
    ids = tokenizer("The quick", return_tensors="pt")["input_ids"]
    assert model.generate(ids, max_new_tokens=4, min_new_tokens=4).shape == (1, ids.shape[1] + 4)
    said = report(Path("out"))
    tensors = load_file("out/model.safetensors")
    zeros = weights = 0
    for name, linear in said["linears"].items():
        weight = tensors[f"{name}.weight"]
        count = int((weight == 0).sum())
        assert linear["achieved"] == pytest.approx(count / weight.numel(), abs=1e-12)
        zeros, weights = zeros + count, weights + weight.numel()
    assert (zeros, weights) == (said["counts"]["pruned"], said["counts"]["weights"])
    assert zeros == round(0.7 * weights)
    of_all = dict.fromkeys(("achieved", "over_pruned", "over_all"), pytest.approx(zeros / weights))
    assert said["sparsity"] == {"wanted": 0.7} | of_all
    assert "sparsity_config" not in json.loads(Path("out/config.json").read_text())
    dense = load_file("tiny/model.safetensors")
    for name, tensor in tensors.items():
        if name.removesuffix(".weight") not in said["linears"]:
            assert torch.equal(tensor, dense[name])


def test_same_bits_twice_and_from_the_report(folder: Path, prune: Any, run: Any) -> None:
    ok(prune("--out", "one", "-q"))
    ok(prune("--out", "two", "-q"))
    result = ok(run("prune", "--recipe", "one/neuroal.json", "--out", "three", "-q"))
    assert (result.stdout, result.stderr) == ("", "")
    assert sums(Path("one")) == sums(Path("two")) == sums(Path("three"))
    assert set(sums(Path("one"))) == {"model.safetensors", "allocation.safetensors"}


def test_recipe_alone_and_flags_over_it(folder: Path, run: Any) -> None:
    recipe = {
        "model": "tiny",
        "calibration": "rows.jsonl",
        "samples": 2,
        "sparsity": 0.6,
        "pruner": "magnitude",
        "top_up": "uniform",
        "seed": 3,
    }
    Path("recipe.json").write_text(json.dumps(recipe))
    ok(run("prune", "--recipe", "recipe.json", "--sparsity", 0.5, "--out", "out", "-q"))
    said = report(Path("out"))["recipe"]
    assert {k: said[k] for k in recipe} == recipe | {"sparsity": 0.5}


def test_flag_drops_the_options_of_what_it_replaces(folder: Path, run: Any) -> None:
    Path("mine.py").write_text(MINE)
    recipe = {
        "model": "tiny",
        "pruner": "wanda",
        "top_up": "uniform",
        "block_ratios": ["linear_schedule"],
        "options": {"linear_schedule": {"lambdas": [0.1]}},
        "calibration": "rows.jsonl",
        "samples": 2,
    }
    Path("recipe.json").write_text(json.dumps(recipe))
    ok(run("prune", "--recipe", "recipe.json", "--block-ratios", "uniform", "--out", "a", "-q"))
    assert report(Path("a"))["recipe"]["options"] == {}
    more = ("-o", "linear_schedule.lambdas=0.05,0.15")
    ok(run("prune", "--recipe", "recipe.json", *more, "--out", "b", "-q"))
    lams = [c["parameters"].get("lam") for c in report(Path("b"))["candidates"]]
    assert lams[:2] == [0.05, 0.15]


@pytest.mark.parametrize(
    ("recorded", "flags"),
    [
        ({"pruner": "./mine.py:Mine", "options": {"mine": {"centre": 0.5}}}, ("--pruner", "wanda")),
        ({"top_up": "neuroal"}, ("--top-up", "uniform")),
        ({"top_up": "neuroal"}, ("--block-ratios", "owl")),
        ({"top_up": "neuroal"}, ("--allocation", "one")),
        ({"top_up": "neuroal"}, ("--pattern", "2:4")),
    ],
    ids=["file", "preset", "block ratios", "allocation", "pattern"],
)
def test_options_go_with_what_is_replaced(
    recorded: dict[str, Any], flags: tuple[str, ...], folder: Path, prune: Any, run: Any
) -> None:
    Path("mine.py").write_text(MINE)
    ok(prune("--out", "one", "-q"))
    given = {"options": {"linear_schedule": {"lambdas": [0.1]}}} | recorded
    recipe = {"model": "tiny", "calibration": "rows.jsonl", "samples": 2} | given
    Path("recipe.json").write_text(json.dumps(recipe))
    ok(run("prune", "--recipe", "recipe.json", *flags, "--dry-run"))
    # What is asked for beside it is not forgotten.
    option = next(f"{name}.{key}=0.1" for name, x in given["options"].items() for key in x)
    result = run("prune", "--recipe", "recipe.json", *flags, "-o", option, "--dry-run")
    assert result.exit_code == 2 and "which is not used" in result.stderr


def test_a_plugin_in_a_file_is_shown_by_its_role(folder: Path, run: Any) -> None:
    Path("mine.py").write_text(MINE)
    said = ok(run("plugins", "show", "./mine.py:Mine", "--role", "pruner")).stdout
    assert "Keeps what is far from a centre." in said and "mine.centre" in said
    assert ok(run("plugins", "show", "./mine.py:Mine")).stdout == said  # by its hooks
    result = run("prune", "tiny", "--pruner", "./mine:Mine", "--out", "out")
    assert result.exit_code == 2 and "written ./file.py:Class" in result.stderr


def test_optional_roles_are_left_out_by_none(folder: Path, prune: Any) -> None:
    ok(prune("--top-up", "uniform", "--out", "plain", "-q"))
    left_out = ("--refiner", "none", "--reconstruction", "none")
    ok(prune("--top-up", "dsnot", *left_out, "--out", "none", "-q"))
    roles = [{p["role"] for p in report(Path(out))["plugins"]} for out in ("plain", "none")]
    assert roles[0] == roles[1] and not roles[0] & {"refiner", "reconstruction"}


def test_an_allocation_brings_its_sparsity(folder: Path, prune: Any, run: Any) -> None:
    ok(prune("--top-up", "neuroal", "--sparsity", 0.7, "--out", "one", "-q"))
    ok(prune("--pruner", "magnitude", "--allocation", "one", "--out", "two", "-q"))
    ok(prune("--allocation", "one", "--sparsity", 0.6, "--out", "three", "-q"))
    assert [report(Path(x))["recipe"]["sparsity"] for x in ("two", "three")] == [None, 0.6]
    for name, wanted in (("two", 0.7), ("three", 0.6)):
        said = report(Path(name))
        assert said["sparsity"]["wanted"] == pytest.approx(wanted, abs=1e-4)
        assert said["sparsity"]["achieved"] == pytest.approx(wanted, abs=1e-3)
        assert any("shifted by -" in note for note in said["notes"]) == (name == "three")
    counts = [report(Path(x))["counts"]["pruned"] for x in ("one", "two")]
    assert counts[0] == counts[1]
    Path("one/allocation.safetensors").rename("alone.safetensors")
    ok(prune("--allocation", "alone.safetensors", "--out", "four", "-q"))
    assert sums(Path("four"))["model.safetensors"] == sums(Path("one"))["model.safetensors"]


def test_a_folder_that_exists_is_refused_before_anything_is_planned(
    folder: Path, prune: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planned(*_: Any, **__: Any) -> None:
        raise AssertionError("planned")

    monkeypatch.setattr("neuroal.cost.preparation.prepare", planned)
    Path("out").mkdir()
    result = prune("--top-up", "neuroal", "--out", "out")
    assert result.exit_code == 2 and "output folder 'out' exists" in result.stderr


@pytest.mark.parametrize("more", [(), ("-q",), ("--dry-run",)])
def test_a_command_prepares_its_run_once(
    more: tuple[str, ...], folder: Path, prune: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def watch(module: Any, name: str) -> None:
        plain = getattr(module, name)

        def counted(*given: Any, **named: Any) -> Any:
            calls.append(name)
            return plain(*given, **named)

        monkeypatch.setattr(module, name, counted)

    watch(pretrained, "skeleton")
    for name in ("setup", "earlier_allocation", "first_steps"):
        watch(preparation, name)
    monkeypatch.setattr("neuroal.engine.setup", preparation.setup)
    monkeypatch.setattr("neuroal.run.setup.setup", preparation.setup)
    monkeypatch.setattr("neuroal.cost.plan.LONG", 1.0)
    ok(prune("--out", "out", *more))
    assert sorted(calls) == ["earlier_allocation", "first_steps", "setup", "skeleton"]


def test_changed_plugin_model_and_data_are_said(folder: Path, run: Any) -> None:
    Path("mine.py").write_text(MINE)
    given = ("--calibration", "rows.jsonl", "--samples", 2, "--top-up", "neuroal-block")
    ok(run("prune", "tiny", *given, "--pruner", "./mine.py:Mine", "--out", "one", "-q"))
    Path("mine.py").write_text(MINE + "\n# edited\n")
    rows = Path("rows.jsonl").read_text().splitlines()
    Path("rows.jsonl").write_text("\n".join(rows[1:]))
    Path("tiny/config.json").write_text(Path("tiny/config.json").read_text() + "\n")
    named = ("--pruner", "./mine.py:Mine")  # what is named there may run
    result = ok(run("prune", "--recipe", "one/neuroal.json", *named, "--out", "two"))
    assert "pruner 'mine' is not the one of the recorded run" in result.stderr
    assert "the calibration tokens are not those of the recorded run" in result.stderr
    assert "the model's files are not those of the recorded run" in result.stderr


def test_allocation_on_another_pruner(folder: Path, prune: Any) -> None:
    ok(prune("--top-up", "neuroal", "--out", "one", "-q"))
    result = ok(prune("--pruner", "magnitude", "--allocation", "one", "--out", "two"))
    assert "from one" in result.stdout
    one, two = report(Path("one")), report(Path("two"))
    assert [p["name"] for p in two["plugins"] if p["role"] == "pruner"] == ["magnitude"]
    for name, linear in one["linears"].items():
        assert two["linears"][name]["achieved"] == linear["achieved"]
        assert two["linears"][name]["rows"] == linear["rows"]
    ids = ("model.safetensors", "allocation.safetensors")
    first, second = sums(Path("one")), sums(Path("two"))
    assert first[ids[0]] != second[ids[0]] and first[ids[1]] == second[ids[1]]


def test_one_file_plugin_with_an_option(folder: Path, prune: Any) -> None:
    Path("mine.py").write_text(MINE)
    mine = ("--pruner", "./mine.py:Mine", "-o", "mine.centre=0.1", "--top-up", "uniform")
    result = ok(prune(*mine, "--json", "--out", "out"))
    out = Path("out")
    said = json.loads(result.stdout)  # what the plugin printed is not in it
    assert "scoring" in result.stderr
    assert said == report(out)
    assert said["plugins"][0]["options"] == {"centre": 0.1}
    assert said["plugins"][0]["sha256"] == hashlib.sha256(MINE.encode()).hexdigest()
    weight = load_file("tiny/model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    mask = load_file(out / "model.safetensors")["model.layers.0.mlp.up_proj.weight"] == 0
    distance = (weight - 0.1).abs()
    for row in range(weight.shape[0]):
        assert set(distance[row].argsort()[: mask[row].sum()].tolist()) == set(
            mask[row].nonzero().flatten().tolist()
        )


def test_competing_block_ratios_and_notes(folder: Path, prune: Any) -> None:
    two = ("--block-ratios", "linear_schedule", "--block-ratios", "uniform")
    ok(prune(*two, "--out", "out", "-q"))
    tried = {c["plugin"] for c in report(Path("out"))["candidates"] if c["role"] == "block_ratios"}
    assert tried == {"linear_schedule", "uniform"}
    result = ok(prune("--top-up", "neuroal", "--pattern", "2:4"))
    assert "Note: row step of top-up 'neuroal' left out" in result.stdout
    assert any(Path().glob("tiny-wanda-neuroal-2of4-*"))


def test_no_calibration_where_nothing_reads_it(folder: Path, run: Any) -> None:
    ok(run("prune", "tiny", "--pruner", "magnitude", "--top-up", "uniform", "--out", "out"))
    assert report(Path("out"))["data"] is None


def test_overwrite_and_resume(folder: Path, prune: Any) -> None:
    ok(prune("--out", "out", "-q"))
    before = sums(Path("out"))
    assert prune("--out", "out").exit_code == 2
    result = ok(prune("--out", "out", "--resume", "--json"))
    assert json.loads(result.stdout) == report(Path("out"))
    assert prune("--out", "out", "--resume", "--seed", 1).exit_code == 2
    ok(prune("--out", "out", "--overwrite", "--sparsity", 0.6, "-q"))
    assert report(Path("out"))["sparsity"]["wanted"] == 0.6
    assert sums(Path("out")) != before


@pytest.mark.parametrize("started", [True, False])
def test_interrupted(
    started: bool, folder: Path, prune: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **given: Any) -> None:
        if started:
            Path("out.partial/journal").mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "prune", stop)
    result = prune("--top-up", "neuroal", "--out", "out")
    hint = "; --resume goes on from 'out.partial'" if started else ""
    assert result.stderr == f"Error: interrupted{hint}\n"
    assert result.exit_code == 130


def test_unexpected_error(folder: Path, prune: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no\nluck")

    monkeypatch.setattr(engine, "prune", fail)
    result = prune("--top-up", "neuroal")
    assert result.stderr == "Error: RuntimeError: no luck (run with -v for the traceback)\n"
    assert result.exit_code == 1
    result = prune("--top-up", "neuroal", "-v")
    assert "Traceback" in result.stderr
    assert result.stderr.endswith("\nError: RuntimeError: no luck\n")


def test_progress_is_on_stderr(folder: Path, prune: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    result = ok(prune("--top-up", "neuroal", "--progress", "--json"))
    assert "14 candidates" in result.stderr and "prune: " in result.stderr
    json.loads(result.stdout)
    result = ok(prune("--top-up", "neuroal", "--progress", "--quiet", "--overwrite"))
    assert (result.stdout, result.stderr) == ("", "")


def test_dry_run(folder: Path, prune: Any, run: Any) -> None:
    before = sorted(folder.rglob("*"))
    text = ok(prune("--top-up", "neuroal", "--dry-run")).stdout
    for expected in ("blocks 0 to 1", "self_attn.q_proj", "32 × 32", "self_attn.o_proj"):
        assert expected in text
    for expected in ("linear_schedule", "14", "15", "prunable weights", "17,408", "MiB", str(OUT)):
        assert expected in text
    plan = json.loads(ok(prune("--top-up", "neuroal", "--dry-run", "--json")).stdout)
    assert plan["weights"] == plan["layout"]["weights"] == 17_408
    assert [s["candidates"] for s in plan["steps"]] == [14, 15]
    assert len(plan["layout"]["blocks"][0]["linears"]) == 7
    assert "a source to be given" in ok(run("prune", "tiny", "--dry-run")).stdout
    assert sorted(folder.rglob("*")) == before
    Path("tiny/model.safetensors").write_bytes(b"damaged")
    assert "cannot read 'tiny/model.safetensors'" in prune("--dry-run").stderr


def test_dry_run_counts_the_block_runs(folder: Path, prune: Any) -> None:
    named = ("--top-up", "neuroal")
    for more in (named, ("--top-up", "uniform"), (*named, "--pattern", "2:4"), ("--pruner", "ria")):
        plan = json.loads(ok(prune(*more, "--dry-run", "--json")).stdout)
        said = json.loads(ok(prune(*more, "--json", "--out", "out", "--overwrite")).stdout)
        done = said["counts"]["block_runs"]
        assert done <= plan["block_runs"], more
        costs = [c["misalignment"] for c in said["candidates"]]
        if len(costs) == len(set(costs)):  # equal candidates are measured once
            assert done == plan["block_runs"], more


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (Recipe(0.7, model="models/llama/"), "llama-wanda-neuroal-0.7"),
        (Recipe(model="owner/Llama-3.2"), "Llama-3.2-wanda-neuroal-0.5"),
        (Recipe(0.6, "a:ria", "uniform", model="demo"), "demo-ria-uniform-0.6"),
        (Recipe(0.6, "./my file.py:Mine", model="demo"), "demo-Mine-neuroal-0.6"),
        (Recipe(model="demo", block_ratios=("owl", "dlp")), "demo-wanda-neuroal-owl-dlp-0.5"),
        (Recipe(model="demo", refiner="dsnot"), "demo-wanda-neuroal-dsnot-0.5"),
        (Recipe(model="demo", reconstruction="refit"), "demo-wanda-neuroal-refit-0.5"),
        (Recipe(model="demo", pattern="2:4"), "demo-wanda-neuroal-2of4"),
        (Recipe(0.6, model="demo", pattern="4:8"), "demo-wanda-neuroal-0.6-4of8"),
        (Recipe(model="demo", seed=3, samples=16), "demo-wanda-neuroal-0.5-16samples-seed3"),
        (Recipe(model="demo", calibration="a/b.jsonl"), "demo-wanda-neuroal-0.5-b"),
        (Recipe(model="demo", calibration="c4"), "demo-wanda-neuroal-0.5-c4"),
    ],
)
def test_default_out(recipe: Recipe, expected: str) -> None:
    assert default_out(recipe) == expected


def test_default_out_tells_runs_apart() -> None:
    """What has no words of its own in the name is a digest at its end."""
    recipes = [
        Recipe(model="demo", allocation="x"),
        Recipe(model="demo", allocation="y"),
        *(Recipe(model="demo", keep=(x,)) for x in ("first:1", "last:1")),
        *(Recipe(model="demo", options={"owl": {"m": m}}) for m in (3, 5)),
        *(Recipe(model="demo", length=n) for n in (None, 128, 256)),
        *(Recipe((0.2, middle, 0.7), model="demo") for middle in (0.3, 0.4)),
        *(Recipe(model="m" * 300, seed=seed) for seed in (0, 1)),
    ]
    names = [default_out(recipe) for recipe in recipes]
    assert len(set(names)) == len(names)
    assert max(map(len, names)) < 110
    digests = [name.rpartition("-")[2] for name in names if name != "demo-wanda-neuroal-0.5"]
    assert all(len(digest) == 6 and int(digest, 16) >= 0 for digest in digests)


def test_default_out_of_the_current_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("tiny")
    assert default_out(Recipe(model=".")) == str(OUT)


def test_parse_options() -> None:
    texts = ["a.k=1", "a.k=x=y", "b-c.d=", "dist.name.key=v"]
    assert parse_options(texts) == {
        "a": {"k": "x=y"},
        "b-c": {"d": ""},
        "dist.name": {"key": "v"},
    }
    for text in ("", "a", "a.b", "a=1", ".b=1", "a.=1", "=1"):
        with pytest.raises(UsageError, match="is not PLUGIN"):
            parse_options([text])


def test_json_in_a_process_of_its_own(folder: Path, process: Any) -> None:
    given = ("--calibration", "rows.jsonl", "--samples", 2, "--top-up", "uniform")
    done = process("prune", "tiny", *given, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == report(Path("tiny-wanda-uniform-0.5-rows-2samples"))
    assert done.stderr == "written to tiny-wanda-uniform-0.5-rows-2samples\n"


def test_model_without_a_tokenizer(folder: Path, prune: Any, run: Any) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        Path("tiny", file).unlink()
    ok(prune("--top-up", "uniform", "--out", "out"))
    result = run("prune", "tiny", "--calibration", "text.txt", "--length", 16)
    assert "no tokenizer" in result.stderr
    assert result.exit_code == 1
    shutil.rmtree("out")


def test_dry_run_says_what_measurements_decide(folder: Path, prune: Any) -> None:
    text = ok(prune("--dry-run", "--pruner", "sparsegpt", "--top-up", "best-slow")).stdout
    [row] = [x.split() for x in text.splitlines() if x.startswith("row ratios ")]
    assert " ".join(row[2:]) == "row_sensitivity at the cost of 49.5 on all windows, at most"
    assert "block runs         at most " in text
    assert "candidates that depend on measurements are not in the memory" in text
    assert "left out" not in text and "measure " in text


WEIGHS = """
from dataclasses import dataclass
import torch
from neuroal import Importance, Proposal, RowRatiosTraits, hookimpl

@dataclass(frozen=True, eq=False)
class Weighs:
    @hookimpl
    def describe(self):
        return RowRatiosTraits(weighs_rows=True)

    @hookimpl
    def propose_row_ratios(self, layout, base):
        yield from ()
        rows = {n: torch.arange(1, x.out_features + 1).double() for n, x in layout.linears.items()}
        importance = {n: Importance(x) for n, x in rows.items()}
        return Proposal(base, {"rows": "by place"}, importance=importance)
"""


def test_importance_of_rows_on_another_pruner(folder: Path, prune: Any, run: Any) -> None:
    Path("weighs.py").write_text(WEIGHS)
    steps = ("--block-ratios", "uniform", "--row-ratios", "./weighs.py:Weighs")
    ok(prune("--pruner", "sparsegpt", *steps, "--out", "one", "-q"))
    ok(prune("--pruner", "magnitude", "--allocation", "one", "--out", "two", "-q"))
    one, two = report(Path("one")), report(Path("two"))
    for name, linear in one["linears"].items():
        assert two["linears"][name]["achieved"] == linear["achieved"]
    assert "× 1.000" in ok(run("compare", "one", "two")).stdout
    ok(prune("--pruner", "magnitude", "--top-up", "uniform", "--out", "alike", "-q"))
    files = [f"{name}/allocation.safetensors" for name in ("one", "alike")]
    shown = ok(run("compare", *files)).stdout.splitlines()
    [last] = [x.split() for x in shown if x.startswith("all blocks")]
    assert last[-2] == "×" and float(last[-1]) > 1
    said = json.loads(ok(run("compare", *files, "--json")).stdout)
    assert f"{said['overall']['importance_apart']:.3f}" == last[-1]
    refused = prune(*steps, "--comparison", "row", "--out", "three")
    assert refused.exit_code == 2 and "--comparison row keeps them from it" in refused.stderr
    refused = prune(*steps, "--pattern", "2:4", "--out", "three")
    assert refused.exit_code == 2 and "pattern 2:4 fixes the ratio of every row" in refused.stderr
    assert not Path("three").exists()
