"""Fine-tuning: zeros stay, what is trained is better, and a killed one goes on to the bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import neuroal
from neuroal import Recipe, Report, UsageError
from neuroal.errors import NeuroalError
from neuroal.finetune import FineTuning, finetune
from neuroal.finetune import cost as costs
from neuroal.model import pretrained
from neuroal.model.run_folder import partial
from neuroal.testing import tiny_model, tiny_tokenizer, windows

pytest.importorskip("accelerate", reason="the extra neuroal[finetune]")
LINEARS = ("_proj.weight",)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, a run of it, and 24 windows of the same few tokens, which can be learnt."""
    home = tmp_path_factory.mktemp("home")
    dense = tiny_model("llama", blocks=2).to(torch.bfloat16)
    dense.save_pretrained(home / "dense")  # type: ignore[operator]
    tiny_tokenizer().save_pretrained(home / "dense")
    rows = (windows(24, 16) % 5 + 10).tolist()
    lines = [json.dumps({"input_ids": row}) for row in rows]
    (home / "rows.jsonl").write_text("\n".join(lines) + "\n")
    recipe = Recipe(sparsity=0.6, pruner="magnitude", top_up="uniform", keep=("last:1",))
    neuroal.prune(str(home / "dense"), recipe=recipe, out=home / "run")
    return home


@pytest.fixture
def tune(home: Path, tmp_path: Path) -> Callable[..., Report]:
    """Fine-tunes the run for 12 steps of two windows."""

    def run(name: str, how: dict[str, Any] | None = None, **options: Any) -> Report:
        asked = {"data": str(home / "rows.jsonl"), "steps": 12, "batch": 2, **(how or {})}
        settings = FineTuning(**asked)
        report = finetune(home / "run", settings, tmp_path / name, device="cpu", **options)
        assert report is not None
        return report

    return run


def test_the_report_shows_the_loss(tmp_path: Path, tune: Callable[..., Report]) -> None:
    from neuroal.html_report.reading import read_run
    from neuroal.html_report.runs import run_section

    report = tune("tuned")
    section = run_section(read_run(tmp_path / "tuned"))
    assert "fine-tuned for 12 steps" in section.lead
    figure = section.figures[0]
    assert report.training is not None and figure.table is not None
    assert figure.title == "Training loss" and figure.spec is not None
    assert [list(row) for row in figure.table.rows] == report.training["losses"]
    assert "Fine-tuning" in [x.title for x in section.listings]


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    "how", [{}, {"lora": 4}, {"distil": True}, {"lora": 2, "targets": ("mlp",)}]
)
def test_what_comes_out_is_a_run_with_the_same_zeros(
    how: dict[str, Any], home: Path, tmp_path: Path, tune: Callable[..., Report]
) -> None:
    report = tune("tuned", {**how, "learning_rate": 0.01})
    assert report.to_json() == json.loads((tmp_path / "tuned/neuroal.json").read_text())
    before, after = tensors(home / "run"), tensors(tmp_path / "tuned")
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {
        n: (t.shape, t.dtype) for n, t in after.items()
    }
    parent = json.loads((home / "run/neuroal.json").read_text())
    zeros = 0
    for name, tensor in before.items():
        trained = not torch.equal(tensor, after[name])
        assert trained == (not how.get("lora") or _changed(name, how)), name
        if name.endswith(LINEARS) and ".layers.0." in name:
            assert torch.equal(tensor == 0, after[name] == 0), name
            zeros += int((after[name] == 0).sum())
    assert report.counts["pruned"] == zeros == parent["counts"]["pruned"]
    assert report.sparsity["achieved"] == parent["sparsity"]["achieved"]
    assert report.parent is not None and report.training is not None
    assert report.parent["name"] == str(home / "run")
    assert report.model == parent["model"] and report.recipe == parent["recipe"]
    losses = [loss for _, loss in report.training["losses"]]
    assert len(losses) == 12 and sum(losses[-3:]) < sum(losses[:3])
    card = (tmp_path / "tuned/README.md").read_text()
    assert "fine-tuned for 12 steps" in card and "Nothing was re-trained" not in card
    assert not partial(tmp_path / "tuned").exists()


def _changed(name: str, how: dict[str, Any]) -> bool:
    return name.endswith(LINEARS) and (not how.get("targets") or ".mlp." in name)


def test_the_saved_model_is_the_one_that_was_trained(
    home: Path, tmp_path: Path, tune: Callable[..., Report]
) -> None:
    """Its loss on the windows is lower than before; evaluate, compare and report take it."""
    tune("tuned", {"lora": 4, "learning_rate": 0.01})
    text = {"data": str(home / "rows.jsonl"), "device": "cpu", "dtype": "float32"}
    before = neuroal.evaluate(str(home / "run"), **text).perplexity
    after = neuroal.evaluate(str(tmp_path / "tuned"), **text).perplexity
    assert before is not None and after is not None
    assert after.perplexity < 0.9 * before.perplexity
    compared = neuroal.compare(home / "run", tmp_path / "tuned", device="cpu")
    assert compared.overall.masks is not None and compared.overall.masks.overlap == 1


@pytest.mark.parametrize("how", [{}, {"lora": 4}])
def test_a_killed_one_goes_on_to_the_same_bits(
    how: dict[str, Any], home: Path, tmp_path: Path, tune: Callable[..., Report]
) -> None:
    whole = tune("whole", how)
    begun = []

    def stopped(total: int, done: int) -> Callable[[], object]:
        steps = iter(range(done, total))

        def step() -> None:
            if next(steps) == 7:
                raise KeyboardInterrupt

        return step

    def counted(total: int, done: int) -> Callable[[], object]:
        begun.append(done)
        return int

    with pytest.raises(KeyboardInterrupt):
        tune("killed", how, save_every=3, tick=stopped)
    assert not (tmp_path / "killed").exists()
    (tmp_path / "killed.partial/journal/checkpoint-9").mkdir()  # half-written: no state in it
    with pytest.raises(UsageError, match="holds an unfinished run: add --resume"):
        tune("killed", how)
    with pytest.raises(UsageError, match="belongs to another run: seed is 0 there and 1 here"):
        tune("killed", {**how, "seed": 1}, resume=True)
    resumed = tune("killed", how, resume=True, tick=counted)
    assert begun == [6]
    assert resumed.training == whole.training
    one, other = tensors(tmp_path / "whole"), tensors(tmp_path / "killed")
    assert all(torch.equal(one[n], other[n]) for n in one)
    assert tune("killed", how, resume=True).to_json() == resumed.to_json()
    with pytest.raises(UsageError, match="holds another run: batch is 2 there and 4 here"):
        tune("killed", {**how, "batch": 4}, resume=True)


def test_what_fails_leaves_nothing(tmp_path: Path, tune: Callable[..., Report]) -> None:
    with pytest.raises(NeuroalError, match=r"the loss is not finite at step .*lower --learning"):
        tune("broken", {"learning_rate": 0.99, "weight_decay": 1e30})
    assert not list(tmp_path.iterdir())


def test_a_forecast_can_end_it(home: Path, tmp_path: Path) -> None:
    told: list[costs.TrainingCost] = []

    def stop(cost: costs.TrainingCost) -> bool:
        told.append(cost)
        return False

    settings = FineTuning(str(home / "rows.jsonl"), 12, batch=2)
    assert finetune(home / "run", settings, tmp_path / "no", device="cpu", foresee=stop) is None
    assert told[0].seconds > 0 and told[0].memory > 0 and not list(tmp_path.iterdir())


def test_memory_by_hand(home: Path) -> None:
    """All weights: 16 bytes each, a byte of mask, 68 of activations, 16 a logit."""
    skeleton = pretrained.skeleton(str(home / "run"))
    layout = neuroal.layout(skeleton)
    linears = 2 * (4 * 32 * 32 + 3 * 32 * 48)
    everything = linears + 2 * 97 * 32 + 5 * 32
    tokens = 2 * 16
    rest = 68 * tokens * 2 * 32 + 16 * tokens * 97
    asked: dict[str, Any] = {"tokens": tokens, "dtype": "float32", "teacher": 0}
    assert layout.weights == linears
    found = costs.memory(skeleton, layout, lora=None, **asked)
    assert found == 16 * everything + linears + rest
    ends = 2 * (4 * 64 + 3 * 80)
    found = costs.memory(skeleton, layout, lora=4, **asked)
    assert found == 4 * everything + 16 * 4 * ends + 5 * linears + rest


def test_a_step_is_timed_without_a_trace(home: Path) -> None:
    model = tiny_model("llama")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    state = torch.random.get_rng_state()
    ids = windows(2, 8)
    took = costs.seconds_per_step(lambda x: model(x).logits.square().mean(), ids, model)
    assert took > 0 and torch.equal(state, torch.random.get_rng_state()) and not model.training
    assert all(p.grad is None and torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_distillation_by_a_slow_sum() -> None:
    from neuroal.finetune.trainer import loss_of

    model, teacher, ids = tiny_model("llama"), tiny_model("llama", seed=1), windows(2, 4)
    p, q = (x(ids).logits.double().softmax(-1) for x in (teacher, model))
    slow = sum(
        (p[i, j, k] * (p[i, j, k] / q[i, j, k]).log()).item()
        for i in range(2)
        for j in range(4)
        for k in range(97)
    )
    assert loss_of(model, ids, teacher).item() == pytest.approx(slow / 8, rel=1e-4)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"steps": 0}, "steps 0 is too low"),
    ({"batch": 0}, "batch 0 is too low"),
    ({"lora": 0}, "lora 0 is too low"),
    ({"learning_rate": 0.0}, "learning rate 0 is not between 0 and 1"),
    ({"weight_decay": -1.0}, "weight decay -1 is negative"),
    ({"targets": ("mlp",)}, "targets are for low-rank changes: give a rank"),
    ({"dtype": "float16"}, "float16 overflows in training"),
]


@pytest.mark.parametrize(("wrong", "message"), REFUSED, ids=lambda x: str(x))
def test_settings_that_make_no_sense(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        FineTuning(**{"data": "demo", "steps": 1, **wrong})


def test_what_is_not_there_is_refused_before_anything_is_done(home: Path, tmp_path: Path) -> None:
    def refused(message: str, run: str = "run", **how: Any) -> None:
        settings = FineTuning(**{"data": str(home / "rows.jsonl"), "steps": 2, **how})
        with pytest.raises(NeuroalError, match=message):
            finetune(home / run, settings, tmp_path / "out", device="cpu")
        assert not list(tmp_path.iterdir())

    refused("is no run: give the output folder of `neuroal prune`", run="dense")
    refused("no such file", data="absent.jsonl")
    refused("fewer than a batch of 99: give a smaller --batch", batch=99)
    refused("target mpl means no linear", lora=2, targets=("mpl",))
    moved = home.parent / "moved"
    shutil.copytree(home, moved, dirs_exist_ok=True)
    report = json.loads((moved / "run/neuroal.json").read_text())
    for name, message in (("../absent/model", "is not there"), (str(moved / "run"), "is not what")):
        report["model"]["name"] = name
        (moved / "run/neuroal.json").write_text(json.dumps(report))
        settings = FineTuning(str(home / "rows.jsonl"), 2, distil=True)
        with pytest.raises(UsageError, match=f"{message}.*leave --distil out"):
            finetune(moved / "run", settings, tmp_path / "out", device="cpu")
