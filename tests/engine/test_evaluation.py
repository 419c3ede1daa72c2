"""Quality as part of a run: measured before and after, however the model is held."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import neuroal
from neuroal import NeuroalError, Recipe, Report, UsageError
from neuroal.evaluation import perplexity as module
from neuroal.evaluation.perplexity import perplexity, windows_for
from neuroal.model import pretrained
from neuroal.run import evaluation
from neuroal.testing import tiny_model, tiny_tokenizer

Files = Mapping[str, Path]
TEXT = "The quick brown fox jumps over the lazy dog, again and again. "


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "text.txt").write_text(TEXT * 9)
    rows = [json.dumps({"input_ids": row}) for row in neuroal_windows(5).tolist()]
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")
    return str(folder / "text.txt"), str(folder / "rows.jsonl")


def neuroal_windows(count: int) -> Tensor:
    from neuroal.testing import windows

    return windows(count, 16)


@pytest.fixture
def asked(from_file: Recipe, texts: tuple[str, str]) -> Recipe:
    return dataclasses.replace(from_file, evaluate=texts, evaluate_length=16)


def by_itself(folder: Path, text: str) -> Any:
    """The perplexity of a saved model, as `neuroal evaluate` measures it."""
    model, tokenizer = pretrained.load(str(folder))
    cut = windows_for(pretrained.load_config(str(folder)), text, tokenizer, length=16)
    return perplexity(model, cut)


def test_both_models_are_measured_by_the_same_protocol(
    models: Files, asked: Recipe, texts: tuple[str, str], tmp_path: Path
) -> None:
    report = neuroal.prune(models["llama"], recipe=asked, out=tmp_path / "out")
    assert (
        report.evaluation == json.loads((tmp_path / "out/neuroal.json").read_text())["evaluation"]
    )
    assert [x["data"] for x in report.evaluation] == list(texts)
    for entry, text in zip(report.evaluation, texts, strict=True):
        dense, pruned = by_itself(models["llama"], text), by_itself(tmp_path / "out", text)
        assert dense.sha256 == pruned.sha256
        assert entry == pruned.to_json() | {
            "dense_perplexity": dense.perplexity,
            "difference": pruned.perplexity - dense.perplexity,
            "excess": math.log(pruned.perplexity) - math.log(dense.perplexity),
        }
    card = (tmp_path / "out/README.md").read_text()
    assert card.count(" of 16 tokens | ") == 2 and f"| `{texts[0]}` |" in card
    assert report.timings["evaluate"] > 0


@pytest.mark.parametrize("how", [{"stream": True}, {"stream": True, "spill": True}])
@pytest.mark.usefixtures("streaming")
def test_a_streamed_model_has_the_same_numbers_to_the_bit(
    how: dict[str, bool], structure: str, models: Files, asked: Recipe, tmp_path: Path
) -> None:
    plain = neuroal.prune(models[structure], recipe=asked, out=tmp_path / "plain")
    streamed = neuroal.prune(models[structure], recipe=asked, out=tmp_path / "streamed", **how)  # type: ignore[arg-type]
    assert streamed.evaluation == plain.evaluation
    assert streamed.counts == plain.counts


@pytest.mark.usefixtures("streaming")
def test_a_streamed_run_without_calibration_is_evaluated(
    models: Files, texts: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "_TOKENS", 32)  # many groups of two windows
    recipe = Recipe(pruner="magnitude", top_up="uniform", evaluate=texts, evaluate_length=16)
    reports = [
        neuroal.prune(models["opt"], recipe=recipe, out=tmp_path / str(stream), stream=stream)
        for stream in (False, True)
    ]
    assert reports[0].evaluation == reports[1].evaluation
    assert reports[1].counts["block_runs"] == 0


@pytest.mark.usefixtures("streaming")
def test_the_evaluation_changes_nothing_else(
    models: Files,
    from_file: Recipe,
    asked: Recipe,
    tmp_path: Path,
    digests: Callable[[Path], dict[str, str]],
) -> None:
    for stream in (False, True):
        without, withal = tmp_path / f"without {stream}", tmp_path / f"with {stream}"
        one = neuroal.prune(models["llama"], recipe=from_file, out=without, stream=stream)
        other = neuroal.prune(models["llama"], recipe=asked, out=withal, stream=stream)
        assert digests(without) == digests(withal)
        assert (one.counts, one.candidates) == (other.counts, other.candidates)
        assert one.evaluation == [] and "evaluate" not in one.timings


def test_a_model_in_memory(recipe: Recipe, windows: Tensor, texts: tuple[str, str]) -> None:
    model = tiny_model("llama")
    asked = dataclasses.replace(recipe, evaluate=texts[0], evaluate_windows=3, evaluate_length=8)
    assert asked.evaluate == (texts[0],)
    cut = windows_for(model.config, texts[0], tiny_tokenizer(), length=8, windows=3)
    before = perplexity(model, cut).perplexity
    report = neuroal.prune(model, tiny_tokenizer(), asked, windows=windows)
    (entry,) = report.evaluation
    assert (entry["windows"], entry["length"]) == (3, 8)
    assert entry["dense_perplexity"] == before
    assert entry["perplexity"] == perplexity(model, cut).perplexity != before


def test_texts_are_refused_before_a_weight_is_read(
    models: Files, from_file: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "short.txt").write_text("short")
    monkeypatch.setattr(pretrained, "load", None)
    cases: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
        "a missing file": ({"evaluate": "gone.txt"}, UsageError, "'gone.txt' does not exist"),
        "an unknown name": ({"evaluate": "wikitext3"}, UsageError, "did you mean 'wikitext2'"),
        "a short text": (
            {"evaluate": str(tmp_path / "short.txt"), "evaluate_length": 16},
            NeuroalError,
            "fewer than one window of 16",
        ),
        "too long windows": (
            {"evaluate": str(tmp_path / "short.txt"), "evaluate_length": 65},
            UsageError,
            "more than the model's context of 64",
        ),
    }
    for changes, kind, words in cases.values():
        asked = dataclasses.replace(from_file, **changes)
        with pytest.raises(kind, match=words):
            neuroal.prune(models["llama"], recipe=asked, out=tmp_path / "out")
        assert [p.name for p in tmp_path.iterdir()] == ["short.txt"]
    asked = dataclasses.replace(from_file, evaluate=str(tmp_path / "short.txt"), evaluate_length=2)
    with pytest.raises(NeuroalError, match="no tokenizer to read"):
        neuroal.prune(tiny_model("llama"), None, dataclasses.replace(asked))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"evaluate_length": 8}, "evaluate_length is for evaluate, which names no text"),
        ({"evaluate_windows": 8}, "evaluate_windows is for evaluate, which names no text"),
        ({"evaluate": "demo", "evaluate_length": 1}, "evaluate_length 1 is too short"),
        ({"evaluate": "demo", "evaluate_windows": 0}, "evaluate_windows 0 is not a positive"),
    ],
)
def test_what_a_recipe_refuses(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Recipe(**changes)


def test_a_recipe_repeats_its_evaluation(asked: Recipe, texts: tuple[str, str]) -> None:
    again = Recipe.from_json(json.loads(json.dumps(asked.to_json())))
    assert again == asked and again.digest() == asked.digest()
    assert Recipe(evaluate=[*texts, texts[0]]).evaluate == texts  # type: ignore[arg-type]


def test_the_dense_model_is_not_measured_again(
    models: Files, asked: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted behind the pruning, and behind the last measurement: nothing is done twice."""
    whole = neuroal.prune(models["llama"], recipe=asked, out=tmp_path / "whole")
    measured: list[str] = []
    plain = evaluation.window_losses

    def losses(model: Any, windows: Any, *given: Any, **how: Any) -> Tensor:
        measured.append(windows.source)
        if len(measured) == limit:
            raise KeyboardInterrupt
        return plain(model, windows, *given, **how)

    monkeypatch.setattr(evaluation, "window_losses", losses)
    limit = 3  # dense on both texts, then pruned on the first
    with pytest.raises(KeyboardInterrupt):
        neuroal.prune(models["llama"], recipe=asked, out=tmp_path / "out")
    assert measured == [*asked.evaluate, asked.evaluate[0]]
    measured.clear()
    limit = 0
    with monkeypatch.context() as patch:
        patch.setattr(pretrained, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            neuroal.prune(models["llama"], recipe=asked, out=tmp_path / "out", resume=True)
    assert measured == list(asked.evaluate)
    measured.clear()
    resumed = neuroal.prune(models["llama"], recipe=asked, out=tmp_path / "out", resume=True)
    assert measured == []
    assert resumed.evaluation == whole.evaluation
    done = neuroal.prune(models["llama"], recipe=asked, out=tmp_path / "out", resume=True)
    assert isinstance(done, Report) and done.evaluation == whole.evaluation


@pytest.mark.usefixtures("streaming")
def test_a_streamed_run_resumes_its_evaluation(
    models: Files, asked: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = neuroal.prune(models["llama"], recipe=asked, out=tmp_path / "whole", stream=True)
    calls = 0
    plain = evaluation.streamed_losses

    def losses(*given: Any, **how: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return plain(*given, **how)

    monkeypatch.setattr(evaluation, "streamed_losses", losses)
    with pytest.raises(KeyboardInterrupt):
        neuroal.prune(models["llama"], recipe=asked, out=tmp_path / "out", stream=True)
    resumed = neuroal.prune(
        models["llama"], recipe=asked, out=tmp_path / "out", stream=True, resume=True
    )
    assert calls == 5
    assert resumed.evaluation == whole.evaluation


def test_calibration_on_the_same_text_is_warned_of(
    models: Files, texts: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = Recipe(
        top_up="uniform", calibration=texts[0], samples=16, length=60, evaluate=texts[0],
        evaluate_length=60,
    )  # fmt: skip
    with caplog.at_level(logging.WARNING, "neuroal"):
        neuroal.prune(models["llama"], recipe=recipe, out=tmp_path / "out")
    assert "the perplexity flatters the pruned model" in caplog.text


def test_no_more_windows_than_are_asked_for_are_run(
    models: Files, asked: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    plain = module.cross_entropy

    def count(logits: Tensor, tokens: Tensor) -> Tensor:
        seen.append(len(tokens))
        return plain(logits, tokens)

    monkeypatch.setattr(module, "cross_entropy", count)
    few = dataclasses.replace(asked, evaluate_windows=2)
    report = neuroal.prune(models["llama"], recipe=few, out=tmp_path / "out")
    assert [x["windows"] for x in report.evaluation] == [2, 2]
    assert sum(seen) == 2 * 2 * 2  # texts, windows, before and after
