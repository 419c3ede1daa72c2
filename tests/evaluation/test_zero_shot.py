"""Zero-shot scores are the harness's own, and those of a slow formula."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from neuroal.errors import NeuroalError, UsageError
from neuroal.evaluation.tasks import PAPER, Tasks, load_tasks
from neuroal.evaluation.zero_shot import zero_shot
from neuroal.layout import find
from neuroal.model.pretrained import load
from neuroal.testing import tiny_model, tiny_tokenizer

pytest.importorskip("lm_eval", reason="lm-eval is not installed: neuroal[eval]")


MUTUAL = """\
- metric: acc_mutual_info
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """Wild weights, so that answers differ."""
    torch.manual_seed(5)
    made = tiny_model("llama", blocks=2)
    with torch.no_grad():
        for weight in made.parameters():
            if weight.dim() == 2:
                weight.mul_(8)
    return made


@pytest.fixture(scope="module")
def tasks(definitions: Path) -> Tasks:
    return load_tasks("endings", definitions)


def log_likelihood(model: nn.Module, context: str, ending: str) -> float:
    """Of the ending after the context, one token at a time, in float64 afterwards."""
    tokenizer = tiny_tokenizer()
    ids, start = tokenizer(context + ending)["input_ids"], len(tokenizer(context)["input_ids"])
    total = 0.0
    with torch.no_grad():
        for at in range(start, len(ids)):
            scores = model(input_ids=torch.tensor([ids[:at]])).logits[0, -1].double()
            total += float(scores.log_softmax(0)[ids[at]])
    return total


def by_hand(model: nn.Module, documents: list[dict[str, Any]]) -> tuple[float, float]:
    """acc and acc_norm: the likeliest ending, by sum and by mean over its characters."""
    right = [0, 0]
    for document in documents:
        sums = [log_likelihood(model, document["ctx"], f" {x}") for x in document["endings"]]
        means = [s / len(x) for s, x in zip(sums, document["endings"], strict=True)]
        for n, values in enumerate((sums, means)):
            right[n] += values.index(max(values)) == document["label"]
    return right[0] / len(documents), right[1] / len(documents)


def test_accuracy_is_the_slow_formula(
    model: nn.Module, tasks: Tasks, endings: list[dict[str, Any]]
) -> None:
    found = zero_shot(model, tiny_tokenizer(), tasks)
    [score] = found.tasks
    acc, acc_norm = by_hand(model, endings)
    assert (score.metrics["acc"], score.metrics["acc_norm"]) == (acc, acc_norm)
    assert 0 < acc < 1
    deviation = math.sqrt(acc * (1 - acc) / (len(endings) - 1))  # of the mean of ones and zeros
    assert score.metrics["acc_stderr"] == pytest.approx(deviation, rel=1e-12)
    assert found.accuracy == acc


def test_the_protocol_is_told(model: nn.Module, tasks: Tasks) -> None:
    import lm_eval

    found = zero_shot(model, tiny_tokenizer(), tasks, limit=3, batch=2).to_json()
    assert json.loads(json.dumps(found)) == found
    score = found["tasks"]["endings"]
    assert (score["examples"], score["few_shot"], score["version"]) == (3, 0, "2.5")
    assert (found["limit"], found["batch"], found["dtype"]) == (3, 2, "float32")
    assert found["harness"] == f"lm-eval {lm_eval.__version__}"
    assert set(score) >= {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "sha256"}
    assert "groups" not in found


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_the_batch_changes_nothing(batch: int, model: nn.Module, tasks: Tasks) -> None:
    expected = zero_shot(model, tiny_tokenizer(), tasks)
    assert zero_shot(model, tiny_tokenizer(), tasks, batch=batch).tasks == expected.tasks


def test_the_hash_is_of_what_was_asked_alone(
    model: nn.Module, tasks: Tasks, definitions: Path, tmp_path: Path
) -> None:
    def digest(asked: Tasks, asker: nn.Module = model, limit: int | None = None) -> str:
        return zero_shot(asker, tiny_tokenizer(), asked, limit=limit).tasks[0].sha256

    expected = digest(tasks)
    assert digest(tasks, tiny_model("opt")) == expected
    assert digest(tasks, limit=9) != expected
    data = tmp_path / "endings.jsonl"
    data.write_text((definitions / "endings.jsonl").read_text().replace("Otto", "Anna", 1))
    text = (definitions / "endings.yaml").read_text()
    (tmp_path / "x.yaml").write_text(text.replace(str(definitions), str(tmp_path)))
    assert digest(load_tasks("endings", tmp_path)) != expected


def test_the_papers_tasks_in_their_own_schemas(model: nn.Module, paper_definitions: Path) -> None:
    """The harness's own prompts, on documents of the project's: which metrics, how many."""
    found = zero_shot(model, tiny_tokenizer(), load_tasks("paper", paper_definitions))
    assert tuple(x.name for x in found.tasks) == PAPER
    both = {"hellaswag", "arc_easy", "arc_challenge", "openbookqa"}
    for score in found.tasks:
        values = {k for k in score.metrics if not k.endswith("_stderr")}
        assert values == ({"acc", "acc_norm"} if score.name in both else {"acc"}), score.name
        assert all(0 <= score.metrics[k] <= 1 for k in values)
    accuracies = [x.metrics["acc"] for x in found.tasks]
    assert found.accuracy == pytest.approx(sum(accuracies) / 7, rel=1e-12)
    assert [x.examples for x in found.tasks] == [3, 2, 2, 2, 3, 3, 3]


def test_a_prompt_of_the_paper_by_hand(
    model: nn.Module, paper_definitions: Path, documents: dict[str, list[dict[str, Any]]]
) -> None:
    right = 0
    for x in documents["boolq"]:
        prompt = f"{x['passage']}\nQuestion: {x['question']}?\nAnswer:"
        no, yes = (log_likelihood(model, prompt, answer) for answer in (" no", " yes"))
        right += (yes > no) == x["label"]
    asked = load_tasks("boolq", paper_definitions)
    found = zero_shot(model, tiny_tokenizer(), asked).tasks[0].metrics["acc"]
    assert found == pytest.approx(right / 2, rel=1e-12)


def test_model_and_tokenizer_are_left_as_they_were(model: nn.Module, tasks: Tasks) -> None:
    tokenizer = tiny_tokenizer()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.train()
    modes = [part.training for part in model.modules()]
    zero_shot(model, tokenizer, tasks, limit=2)
    assert tokenizer.pad_token is None
    assert [part.training for part in model.modules()] == modes
    model.eval()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_tasks_serve_any_number_of_models(model: nn.Module, definitions: Path) -> None:
    asked = load_tasks("endings", definitions)
    first = zero_shot(model, tiny_tokenizer(), asked)
    zero_shot(tiny_model("opt"), tiny_tokenizer(), asked, limit=2)
    assert zero_shot(model, tiny_tokenizer(), asked) == first


def test_bad_arguments_are_refused(model: nn.Module, tasks: Tasks) -> None:
    with pytest.raises(UsageError, match="batch 0 is not a positive number"):
        zero_shot(model, tiny_tokenizer(), tasks, batch=0)
    with pytest.raises(UsageError, match="limit -1 is not a positive number"):
        zero_shot(model, tiny_tokenizer(), tasks, limit=-1)
    with pytest.raises(NeuroalError, match="no tokenizer"):
        zero_shot(model, None, tasks)


def test_bars_are_shown_on_demand_and_nothing_is_printed(
    model: nn.Module,
    tasks: Tasks,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    zero_shot(model, tiny_tokenizer(), tasks, limit=2, progress=True)  # not on a terminal
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr("neuroal.evaluation.tasks.on_terminal", lambda: True)
    zero_shot(model, tiny_tokenizer(), tasks, limit=2, progress=True)
    captured = capfd.readouterr()
    assert captured.out == "" and "8/8" in captured.err


def test_a_log_has_lines(
    model: nn.Module,
    tasks: Tasks,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A line every 30 seconds, of no seconds here, for each of 2 documents with 4 endings."""
    monkeypatch.setattr("neuroal.progress.SECONDS", 0.0)
    zero_shot(model, tiny_tokenizer(), tasks, limit=2)
    assert capsys.readouterr() == ("", "")
    zero_shot(model, tiny_tokenizer(), tasks, limit=2, progress=True)
    said = capsys.readouterr()
    assert said.out == ""
    lines = {line.split(",")[0] for line in said.err.splitlines()}
    assert {f"tasks: {n} of 8" for n in range(1, 9)} <= lines


def test_what_the_harness_cuts_short_is_said_once(
    definitions: Path, tmp_path: Path, model: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    row = {"ctx": "word " * 60, "endings": ["a", "b", "cc", "d"], "label": 0}
    (tmp_path / "endings.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    text = (definitions / "endings.yaml").read_text()
    (tmp_path / "x.yaml").write_text(text.replace(str(definitions), str(tmp_path)))
    with caplog.at_level(logging.WARNING, "neuroal"):
        zero_shot(model, tiny_tokenizer(), load_tasks("endings", tmp_path))
    [said] = caplog.messages
    assert "exceeds model's maximum length" in said and "more like this)" in said


def test_answers_that_are_no_numbers_are_told(
    tasks: Tasks, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tiny_model("llama", blocks=1)
    with torch.no_grad():
        next(broken.parameters()).fill_(math.nan)
    zero_shot(broken, tiny_tokenizer(), tasks, limit=3)
    assert "3 of 3 answers to 'endings' are not finite" in caplog.text


@pytest.mark.slow
@pytest.mark.matrix
def test_a_group_has_the_mean_of_its_tasks(
    model: nn.Module, definitions: Path, tmp_path: Path
) -> None:
    text = (definitions / "endings.yaml").read_text()
    for name in ("one", "two"):
        own = text.replace("task: endings", f"task: {name}_ends")
        (tmp_path / f"{name}.yaml").write_text(own)
    (tmp_path / "both.yaml").write_text(
        "group: both_ends\ntask: [one_ends, two_ends]\naggregate_metric_list:\n  - metric: acc\n"
    )
    found = zero_shot(model, tiny_tokenizer(), load_tasks("both_ends", tmp_path)).to_json()
    assert list(found["tasks"]) == ["one_ends", "two_ends"]
    assert found["groups"]["both_ends"]["acc"] == pytest.approx(found["accuracy"], rel=1e-12)


@pytest.mark.slow
@pytest.mark.matrix
def test_it_equals_the_harnesss_own_command(
    model: nn.Module,
    definitions: Path,
    tasks: Tasks,
    tmp_path: Path,
    run_process: Callable[..., Any],
) -> None:
    model.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    command = ["--model", "hf", "--model_args", f"pretrained={tmp_path / 'model'}"]
    command += ["--tasks", "endings", "--include_path", str(definitions), "--device", "cpu"]
    done = run_process(
        [sys.executable, "-m", "lm_eval", *command, "--output_path", tmp_path / "out.json"]
    )
    assert done.returncode == 0, done.stderr
    [file] = tmp_path.glob("out*.json")
    theirs = json.loads(file.read_text())["results"]["endings"]
    ours = zero_shot(model, tiny_tokenizer(), tasks).tasks[0].metrics
    assert ours == {name: theirs[f"{name},none"] for name in ours}
    assert len(ours) == 4


def test_the_metric_that_counts_is_the_first_of_the_definition(
    model: nn.Module, definitions: Path, tmp_path: Path
) -> None:
    text = (definitions / "endings.yaml").read_text()
    (tmp_path / "x.yaml").write_text(text.replace("- metric: acc\n", f"{MUTUAL}  - metric: acc\n"))
    found = zero_shot(model, tiny_tokenizer(), load_tasks("endings", tmp_path))
    [score] = found.tasks
    assert score.metric == "acc_mutual_info" and {"acc", "acc_norm"} <= score.metrics.keys()
    assert found.accuracy == score.metrics["acc_mutual_info"]
    assert found.to_json()["tasks"]["endings"]["metric"] == "acc_mutual_info"


@pytest.mark.slow
@pytest.mark.matrix
def test_a_trained_model_knows_how_texts_go_on(
    shared: Path, definitions: Path, tmp_path: Path
) -> None:
    """Far above the quarter that guessing gives, far less so with nine weights of ten gone."""
    data = shared / "data/zeroshot/continuations.jsonl"
    text = (definitions / "endings.yaml").read_text().replace("- metric: acc\n", MUTUAL)
    (tmp_path / "x.yaml").write_text(text.replace(str(definitions / "endings.jsonl"), str(data)))
    asked = load_tasks("endings", tmp_path)
    trained, tokenizer = load(str(shared / "models/llama"))
    dense = zero_shot(trained, tokenizer, asked, limit=60).accuracy
    with torch.no_grad():
        for linear in find(trained).linears:
            weight = trained.get_parameter(f"{linear}.weight")
            weight[weight.abs() <= weight.abs().flatten().quantile(0.9)] = 0
    pruned = zero_shot(trained, tokenizer, asked, limit=60).accuracy
    assert dense is not None and pruned is not None
    assert dense > 0.55 and pruned < dense - 0.1
