"""Tasks are found by name, in the harness and in folders, before any model is loaded."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

import pytest

from neuroal.errors import NeuroalError, UsageError
from neuroal.evaluation.tasks import PAPER, check_names, load_tasks

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: neuroal[eval]"
)


def test_without_the_extra_the_cure_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"not installed: pip install 'neuroal\[eval\]'"):
        check_names("rte")


@pytest.mark.parametrize("names", ["", " , ", []])
def test_no_name_is_no_task(names: Any) -> None:
    with pytest.raises(UsageError, match="no task is named: give paper, or names such as"):
        check_names(names)


@pytest.fixture
def no_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test for which the harness reads all of its definitions."""
    from lm_eval.tasks._index import TaskIndex

    build = TaskIndex.build

    def small(paths: Any, **options: Any) -> Any:
        found = list(paths)
        assert all("lm_eval" not in Path(path).parts for path in found), found
        return build(found, **options)

    monkeypatch.setattr(TaskIndex, "build", staticmethod(small))


@needs_harness
@pytest.mark.usefixtures("no_index")
def test_tasks_are_found_without_the_whole_index(definitions: Path) -> None:
    assert check_names("paper") == PAPER
    assert check_names("piqa, paper,rte") == ("piqa", *PAPER)  # each once
    assert check_names(["endings", "arc_easy"], definitions) == ("endings", "arc_easy")


@needs_harness
@pytest.mark.usefixtures("no_index")
def test_a_misspelt_task_is_met_with_the_nearest(definitions: Path) -> None:
    with pytest.raises(UsageError, match="no such task 'arc_eazy': did you mean 'arc_easy'"):
        check_names("rte,arc_eazy")
    with pytest.raises(UsageError, match="no such task 'endigns': did you mean 'endings'"):
        check_names("endigns", definitions)
    with pytest.raises(UsageError, match="'qqqqqq': it is none of lm-eval; --include-path adds"):
        check_names("qqqqqq")
    with pytest.raises(UsageError, match=f"'qqqqqq': it is none of lm-eval or of '{definitions}'"):
        check_names("qqqqqq", definitions)


@needs_harness
@pytest.mark.slow
def test_groups_and_tags_are_found_in_the_whole_index() -> None:
    """A group and a tag are; a mere part of a word in its files is not."""
    with pytest.raises(UsageError, match="no such task 'hellaswa': did you mean 'hellaswag'"):
        check_names("mmlu,glue,hellaswa")


@needs_harness
def test_a_folder_that_is_none_is_refused(definitions: Path) -> None:
    for wrong in ("no-such-folder", definitions / "endings.yaml"):
        with pytest.raises(UsageError, match=r"folder of task definitions '.*' does not exist"):
            check_names("endings", wrong)


@needs_harness
def test_without_network_the_error_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(NeuroalError, match=r"cannot load task 'rte': .*--include-path") as raised:
        load_tasks("rte")
    assert "\n" not in str(raised.value)
    assert raised.value.exit_code == 1
    assert capfd.readouterr() == ("", "")


@needs_harness
def test_a_definition_whose_file_is_missing_says_so(definitions: Path, tmp_path: Path) -> None:
    text = (definitions / "endings.yaml").read_text()
    (tmp_path / "x.yaml").write_text(text.replace("endings.jsonl", "gone.jsonl"))
    with pytest.raises(NeuroalError, match=r"cannot load task 'endings': .*gone\.jsonl"):
        load_tasks("endings", tmp_path)


@needs_harness
def test_ones_own_definition_goes_before_the_harnesss(paper_definitions: Path) -> None:
    found = load_tasks("paper", paper_definitions)
    assert tuple(found.loaded["tasks"]) == PAPER == found.names
    sizes = {name: len(task.eval_docs) for name, task in found.loaded["tasks"].items()}
    assert sizes == dict(zip(PAPER, (3, 2, 2, 2, 3, 3, 3), strict=True))


@needs_harness
def test_the_harness_is_quiet_and_its_logger_as_before(
    definitions: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    harness = logging.getLogger("lm_eval")
    before = harness.level, harness.propagate, list(harness.handlers)
    load_tasks("endings", definitions)
    assert capfd.readouterr() == ("", "")
    assert (harness.level, harness.propagate, list(harness.handlers)) == before
