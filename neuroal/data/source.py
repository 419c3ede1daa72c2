"""Text and token rows from files and the hub.

Files are read here, line by line; `datasets` is imported only for parquet and for the hub, and the
network is used only if a source names a hub data set.
"""

from __future__ import annotations

import gzip
import json
import logging
import os.path
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from neuroal.data import columns
from neuroal.data.conversations import Conversation
from neuroal.errors import NeuroalError, UsageError, nearest
from neuroal.progress import on_terminal

_FILE = re.compile(r"(.+?\.(txt|jsonl|json|parquet)(?:\.gz)?)(?::([^:/\\]+))?", re.IGNORECASE)
_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?::[^:]*){0,3}")
_PATH_LIKE = re.compile(r"[./~].*|.*[\\].*|.*/.*/.*|.*/|.*\.\w+")
_FORMS = (
    "a .txt, .jsonl, .json or .parquet file (also .gz), "
    "or a hub data set owner/name[:config][:split][:column]"
)

# What `datasets.load_dataset` is called with. The Penn Treebank's repository holds a loading
# script, which `datasets` refuses since version 4: the hub's own parquet copy of it is read.
_C4 = "en/c4-{}.json.gz"
_PTB = {"path": "ptb-text-only/ptb_text_only", "revision": "refs/convert/parquet"}
_WIKITEXT2 = {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1"}
_NAMED: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("c4", "train"): {"path": "allenai/c4", "data_files": _C4.format("train.00000-of-01024")},
    ("c4", "test"): {"path": "allenai/c4", "data_files": _C4.format("validation.00000-of-00008")},
    ("ptb", "train"): {**_PTB, "data_files": "penn_treebank/train/0000.parquet"},
    ("ptb", "test"): {**_PTB, "data_files": "penn_treebank/test/0000.parquet"},
    ("wikitext2", "train"): {**_WIKITEXT2, "split": "train"},
    ("wikitext2", "test"): {**_WIKITEXT2, "split": "test"},
}
_LARGE = 1 << 24  # bytes of a .json file that is not read for its first row alone
NAMES = ("c4", "demo", "ptb", "wikitext2")


@dataclass(frozen=True)
class Source:
    """Where text or tokens come from; made by `parse_source`.

    Attributes:
        text: What the user wrote.
        kind: A file's format ("txt", "jsonl", "json", "parquet"), one of `NAMES`, or "hub".
        path: Path of the file, or owner/name of the hub data set.
        config: Configuration of the hub data set.
        split: Its split; None is "train" for calibration and "test" for evaluation.
        column: Column to read; None is `input_ids`, `text` or those of chat data.
    """

    text: str
    kind: str
    path: str = ""
    config: str | None = None
    split: str | None = None
    column: str | None = None

    @property
    def on_hub(self) -> bool:
        """Return whether it is a data set of the hub."""
        return self.kind == "hub" or (self.kind in NAMES and self.kind != "demo")


def parse_source(text: str) -> Source:
    """Return the source that a text names, without reading it.

    Args:
        text: `FILE[:column]`, a name such as c4, or `owner/name[:config][:split][:column]`, where
            an empty part is the default.

    Returns:
        The source.

    Raises:
        UsageError: It is none of these, or a file that does not exist.
    """
    match = _FILE.fullmatch(text)
    if match and not os.path.isfile(text):
        path, kind, column = match[1], match[2].lower(), match[3]
        if not os.path.isfile(path):
            fault = "is a folder" if os.path.isdir(path) else "does not exist"
            raise UsageError(f"no such file: source '{path}' {fault}")
        if column and kind == "txt":
            raise UsageError(f"source '{text}' asks for a column, but a .txt file has none")
        return Source(text, kind, path, column=column)
    if match:
        return Source(text, match[2].lower(), text)
    if text in NAMES:
        return Source(text, text, column="sentence" if text == "ptb" else None)
    if os.path.exists(text):
        kind = "folder" if os.path.isdir(text) else "file of no known kind"
        raise UsageError(f"source '{text}' is a {kind}: give {_FORMS}")
    if _HUB.fullmatch(text):
        path, *parts = text.split(":")
        if not parts and os.path.isdir(os.path.dirname(path)):
            raise UsageError(
                f"no such file '{text}' in the folder '{os.path.dirname(path)}' "
                f"(the hub data set of that name is '{text}:')"
            )
        config, split, column = [part or None for part in [*parts, "", "", ""][:3]]
        return Source(text, "hub", path, config, split, column)
    if _PATH_LIKE.fullmatch(text):
        raise UsageError(f"no such file: source '{text}' does not exist")
    hint = nearest(text.lower(), NAMES)
    if not hint.startswith("did you mean"):
        hint = f"give {', '.join(NAMES)}, {_FORMS}"
    raise UsageError(f"source {text!r:.80} is unknown: {hint}")


def read(source: Source, split: str, *, progress: bool = False) -> Sequence[Any]:
    """Return the rows of a source: texts, conversations, or lists of token ids.

    Args:
        source: What to read; a .txt file is one row.
        split: "train" or "test"; files have no splits, and a split in the source has priority.
        progress: Show the progress bars of downloads.

    Returns:
        At least one row.

    Raises:
        NeuroalError: The source cannot be read, has no rows, or not the column.
    """
    rows: Sequence[Any]
    if source.kind == "demo":
        from neuroal.demo import documents

        rows = documents("calibration" if split == "train" else "heldout")
    elif source.on_hub:
        rows = _from_hub(source, split, progress)
    else:
        try:
            rows = _from_file(source)
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise NeuroalError(f"cannot read '{source.path}': {reason}") from error
    if not len(rows):
        raise NeuroalError(f"'{source.text}' is empty: give text, or rows of input_ids")
    if not isinstance(rows[0], (str, list, tuple, Conversation)):
        raise NeuroalError(f"row 1 of '{source.text}' is {rows[0]!r:.40}, not text or token ids")
    return rows


def peek(source: Source) -> str | None:
    """Refuse a file that has not the column, by its first row, within a blink.

    Returns:
        "tokens" or "text" as the row holds; None where more would have to be read: of a hub data
        set, and of a large .json file, which is one value.

    Raises:
        NeuroalError: The first row is wrong.
    """
    if source.kind == "txt":
        return "text"
    if source.kind not in ("json", "jsonl", "parquet") or not os.path.getsize(source.path):
        return None
    if source.kind == "parquet":
        if source.path.lower().endswith(".gz"):
            return None
        from pyarrow import parquet

        try:
            names = parquet.read_schema(source.path).names
        except (OSError, ValueError) as error:
            raise NeuroalError(f"cannot read '{source.path}': {cause_of(error)}") from error
        chosen = columns.choose(source.text, source.column, names)
        return "tokens" if chosen == ("input_ids",) else None
    if source.kind == "json" and os.path.getsize(source.path) > _LARGE:
        return None
    try:
        first = next(iter(_objects(source)), None)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise NeuroalError(f"cannot read '{source.path}': {reason}") from error
    if first is None or not isinstance(first[1], dict):
        return None  # refused when it is read
    chosen = columns.choose(source.text, source.column, list(first[1]))
    return "tokens" if isinstance(first[1][chosen[0]], list) and len(chosen) == 1 else "text"


def origin(source: Source, split: str) -> str:
    """Return where the rows of a source come from: of the hub, the data set and its parts."""
    if source.on_hub:
        call = _call(source, split)
        keys = ("path", "name", "revision", "data_files", "split")
        return " ".join(str(call[key]) for key in keys if call.get(key) is not None)
    return source.text


def _call(source: Source, split: str) -> Mapping[str, Any]:
    """Return what `datasets.load_dataset` is called with."""
    if source.kind == "hub":
        return {"path": source.path, "name": source.config, "split": source.split or split}
    return {"split": "train", "verification_mode": "no_checks", **_NAMED[source.kind, split]}


def _from_hub(source: Source, split: str, progress: bool) -> Sequence[Any]:
    with quiet_datasets(progress) as datasets:
        try:
            table = datasets.load_dataset(**_call(source, split))
        except Exception as error:  # of many libraries: network, hub, formats
            raise NeuroalError(
                f"cannot load '{source.text}' from the hub: {cause_of(error)}; give a local file"
            ) from error
    return _from_table(source, table)


def _from_file(source: Source) -> Sequence[Any]:
    if source.kind == "txt":
        with _opened(source.path) as file:
            text = file.read()
        return [text] if text.strip() else []
    if source.kind == "parquet":
        return _from_parquet(source)
    rows: list[Any] = []
    chosen: columns.Columns = ()
    for where, row in _objects(source):
        if not isinstance(row, dict):
            raise NeuroalError(f"{where} of '{source.path}' is not an object with a column 'text'")
        chosen = chosen or columns.choose(source.text, source.column, list(row))
        try:
            rows.append(columns.row_of(chosen, row))
        except KeyError as error:
            raise NeuroalError(f"{where} of '{source.path}' has no column {error}") from None
    return rows


def _objects(source: Source) -> Iterator[tuple[str, Any]]:
    if source.kind == "json":  # one array, one object of columns, or lines as in .jsonl
        with _opened(source.path) as file:
            try:
                whole = json.load(file)
            except (ValueError, RecursionError) as error:
                if isinstance(error, UnicodeDecodeError):
                    raise
                whole = None
        if isinstance(whole, dict):
            chosen = columns.choose(source.text, source.column, list(whole))
            cells = {column: whole[column] for column in chosen if column in whole}
            whole = columns.as_rows(source.text, cells) or [whole]
        if isinstance(whole, list):
            yield from ((f"row {number}", row) for number, row in enumerate(whole, 1))
            return
    with _opened(source.path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield f"line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = f"line {number} of '{source.path}' is not JSON: {error}"
                raise NeuroalError(reason) from error


def _from_parquet(source: Source) -> Sequence[Any]:
    with (
        tempfile.TemporaryDirectory(prefix="neuroal-") as folder,
        quiet_datasets(False) as datasets,
    ):
        path = source.path
        if path.lower().endswith(".gz"):
            path = str(Path(folder) / "rows.parquet")
            with gzip.open(source.path) as packed, open(path, "wb") as file:
                shutil.copyfileobj(packed, file)
        if not Path(path).stat().st_size:
            return []
        try:
            # A row group of no rows needs a batch size.
            table = datasets.Dataset.from_parquet(
                path, cache_dir=folder, keep_in_memory=True, batch_size=1000
            )
        except Exception as error:  # pyarrow's and datasets' own
            if "corresponds to no data" in str(error):  # how `datasets` says that no row is there
                return []
            raise NeuroalError(f"cannot read '{source.path}': {cause_of(error)}") from error
        return _from_table(source, table)


def _from_table(source: Source, table: Any) -> Sequence[Any]:
    chosen = columns.choose(source.text, source.column, table.column_names)
    return columns.rows_of_table(chosen, table)


@contextmanager
def _opened(path: str) -> Iterator[TextIO]:
    opener: Any = gzip.open if path.lower().endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
        yield file


@contextmanager
def quiet_datasets(progress: bool) -> Iterator[Any]:
    """Give the library with its logging silenced, and its progress bars only if asked for."""
    import datasets

    verbosity = datasets.utils.logging.get_verbosity()
    bars = not datasets.are_progress_bars_disabled()
    if not (progress and on_terminal()):
        datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(logging.CRITICAL)  # what it logs as errors, it raises
    try:
        yield datasets
    finally:
        datasets.utils.logging.set_verbosity(verbosity)
        if bars:
            datasets.enable_progress_bars()


def cause_of(error: BaseException) -> str:
    """Return the message of a library's exception in one line."""
    while type(error).__name__ == "DatasetGenerationError" and error.__cause__ is not None:
        error = error.__cause__
    return f"{' '.join(str(error).split()):.300}" or type(error).__name__
