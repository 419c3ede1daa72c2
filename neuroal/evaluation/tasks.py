"""The tasks of lm-eval: found by name without its whole index, and loaded with their data."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from neuroal.data.source import cause_of, quiet_datasets
from neuroal.errors import NeuroalError, UsageError, nearest
from neuroal.progress import bar, on_terminal

PAPER = (
    "rte",
    "winogrande",
    "boolq",
    "hellaswag",
    "arc_easy",
    "arc_challenge",
    "openbookqa",
)
_FEW_SHOT_SEED = 1234  # the harness's own default
_NAME = re.compile(r"^task:[ \t]*[\"']?([\w.-]+)[\"']?[ \t]*(?:#.*)?$", re.MULTILINE)


@dataclass(frozen=True, eq=False)
class Tasks:
    """Tasks with their data, ready for any number of models; made by `load_tasks`.

    Attributes:
        names: What was asked for, in order; "paper" spelt out.
        loaded: The harness's own tasks and groups.
    """

    names: tuple[str, ...]
    loaded: Mapping[str, Any]


def check_names(
    names: Sequence[str] | str, include_path: str | Path | None = None
) -> tuple[str, ...]:
    """Return the names of the tasks, "paper" spelt out, once all are known to exist.

    Args:
        names: Task, group or tag names, or "paper"; a text is split at commas.
        include_path: Folder with the user's task definitions, which replace those of the
            harness that have the same name.

    Raises:
        UsageError: lm-eval is not installed, or a task or the folder does not exist.
    """
    wanted = _spelt_out(names)
    _find(wanted, include_path)
    return wanted


def load_tasks(
    names: Sequence[str] | str, include_path: str | Path | None = None, *, progress: bool = False
) -> Tasks:
    """Load the data of tasks, from the hub or from where their definitions say.

    Args:
        names: As in `check_names`.
        include_path: As in `check_names`.
        progress: Show the bars of a download.

    Raises:
        UsageError: As in `check_names`, or a task needs more than a causal language model.
        NeuroalError: A task's definition or data cannot be loaded.
    """
    wanted = _spelt_out(names)
    manager, specs = _find(wanted, include_path)
    built = []
    with quiet_harness(progress), quiet_datasets(progress):
        for name, spec in zip(wanted, specs, strict=True):
            try:
                part = manager.load([spec])
            except Exception as error:  # of many libraries: network, hub, formats, YAML
                raise NeuroalError(
                    f"cannot load task '{name}': {cause_of(error)}; "
                    "a definition of local files works without the hub: --include-path"
                ) from error
            built.append(part)
    loaded: dict[str, Any] = {
        key: {k: v for part in built for k, v in part.get(key, {}).items()}
        for key in ("tasks", "groups", "group_map")
    }
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            why = "runs code that the model writes"
            if getattr(task, "MULTIMODAL", False):
                why = "asks about more than text"
            raise UsageError(f"task '{name}' {why}: neuroal does not do that")
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_FEW_SHOT_SEED)
    return Tasks(wanted, loaded)


def _spelt_out(names: Sequence[str] | str) -> tuple[str, ...]:
    asked = names.split(",") if isinstance(names, str) else names
    stripped = [name.strip() for name in asked if name.strip()]
    if not stripped:
        raise UsageError("no task is named: give paper, or names such as arc_easy,hellaswag")
    wanted = [x for name in stripped for x in (PAPER if name == "paper" else (name,))]
    return tuple(dict.fromkeys(wanted))


def _find(names: Sequence[str], include_path: str | Path | None) -> tuple[Any, list[str]]:
    """Return the harness's task manager and what it loads each name by.

    Its index of all its own definitions, some 14,000 files, is built only for what may be a group,
    a tag or a name made of other files: a task is loaded by the one file that names it.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError(
            "zero-shot tasks need lm-eval, which is not installed: pip install 'neuroal[eval]'"
        )
    folder = None if include_path is None else str(Path(include_path).expanduser())
    if folder is not None and not Path(folder).is_dir():
        raise UsageError(f"folder of task definitions '{include_path}' does not exist")
    from lm_eval.tasks import TaskManager

    with quiet_harness():
        local = TaskManager(include_path=folder, include_defaults=False)
        files, unheard = _scan([name for name in names if name not in local.all_subtasks])
        known = [*files, *local.all_tasks]
        for name in names:
            if name in unheard and name not in local.all_tasks:
                raise UsageError(f"no such task '{name}': {_hint(name, known, folder)}")
        if all(name in local.all_subtasks or name in files for name in names):
            return local, [n if n in local.all_subtasks else str(files[n]) for n in names]
        everything = TaskManager(include_path=folder)
    for name in names:
        if name not in everything.all_tasks:
            raise UsageError(f"no such task '{name}': {_hint(name, everything.all_tasks, folder)}")
    return everything, list(names)


def _scan(names: Collection[str]) -> tuple[dict[str, Path], set[str]]:
    """Return the file of every task of the harness, and the names that no file contains."""
    import lm_eval.tasks

    files: dict[str, Path] = {}
    unheard = set(names)
    if names:
        assert lm_eval.tasks.__file__ is not None
        for file in sorted(Path(lm_eval.tasks.__file__).parent.rglob("*.yaml")):
            text = file.read_text(encoding="utf-8", errors="ignore")
            unheard = {name for name in unheard if name not in text}
            for match in _NAME.finditer(text):
                files.setdefault(match[1], file)
    return files, unheard


def _hint(name: str, valid: Sequence[str], folder: str | None) -> str:
    close = nearest(name, valid)
    if close.startswith("did"):
        return close
    where = f"of lm-eval or of '{folder}'" if folder else "of lm-eval; --include-path adds your own"
    return f"it is none {where}"


@contextmanager
def _requests_in_lines(log: TextIO) -> Iterator[None]:
    """Have the harness count requests by lines on a log; it takes no other bar than tqdm's."""
    from lm_eval.models import huggingface

    def lines(iterable: Any = None, **options: Any) -> Any:
        return bar(iterable=iterable, **options | {"file": log, "desc": "tasks"})

    own = huggingface.tqdm
    huggingface.tqdm = lines
    try:
        yield
    finally:
        huggingface.tqdm = own


@contextmanager
def quiet_harness(progress: bool = False) -> Iterator[list[logging.LogRecord]]:
    """Hold back what the harness prints and logs, and yield its warnings.

    Its progress bars, which it has no option to turn off, are held back unless they are wanted; in
    a log, those that count requests become lines.
    """
    warnings: list[logging.LogRecord] = []
    harness, models = logging.getLogger("lm_eval"), logging.getLogger("transformers")
    collector = logging.Handler(logging.WARNING)
    collector.emit = warnings.append  # type: ignore[method-assign,assignment]
    levels, propagate = (harness.level, models.level), harness.propagate
    harness.addHandler(collector)
    harness.setLevel(logging.WARNING)
    harness.propagate = False
    models.setLevel(logging.ERROR)  # warns of long texts, as the harness does that cuts them
    try:
        with contextlib.ExitStack() as held:
            held.enter_context(contextlib.redirect_stdout(io.StringIO()))
            if not (progress and on_terminal()):
                if progress:
                    held.enter_context(_requests_in_lines(sys.stderr))
                held.enter_context(contextlib.redirect_stderr(io.StringIO()))
            yield warnings
    finally:
        harness.removeHandler(collector)
        harness.propagate = propagate
        harness.setLevel(levels[0])
        models.setLevel(levels[1])
