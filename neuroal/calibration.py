"""Text, hub data set or token file to windows of token ids.

Files are read here, line by line; `datasets` is imported for parquet and for the hub alone, and
the network is touched only where a source names a hub data set.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import random
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from neuroal.errors import NeuroalError, UsageError, nearest

LOG = logging.getLogger(__name__)

LONGEST_DEFAULT = 2048

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
NAMES = ("c4", "demo", "ptb", "wikitext2")


@dataclass(frozen=True)
class Source:
    """Where text or tokens come from; made by `parse_source`.

    Attributes:
        text: The source as it was given.
        kind: A file's format ("txt", "jsonl", "json", "parquet"), one of `NAMES`, or "hub".
        path: Path of the file, or owner/name of the hub data set.
        config: Configuration of the hub data set.
        split: Its split; None is "train" for calibration and "test" for evaluation.
        column: Column to read; None is `input_ids` if there is one, else `text`.
    """

    text: str
    kind: str
    path: str = ""
    config: str | None = None
    split: str | None = None
    column: str | None = None


def parse_source(text: str) -> Source:
    """Tell what a source names, without reading it.

    Args:
        text: `FILE[:column]`, a name such as c4, or `owner/name[:config][:split][:column]`, where
            an empty part is the default.

    Returns:
        The source.

    Raises:
        UsageError: It is none of these, or a file that does not exist.
    """
    match = _FILE.fullmatch(text)
    if match and not Path(text).is_file():
        path, kind, column = match[1], match[2].lower(), match[3]
        if not Path(path).is_file():
            fault = "is a folder" if Path(path).is_dir() else "does not exist"
            raise UsageError(f"no such file: source '{path}' {fault}")
        if column and kind == "txt":
            raise UsageError(f"source '{text}' asks for a column, but a .txt file has none")
        return Source(text, kind, path, column=column)
    if match:
        return Source(text, match[2].lower(), text)
    if text in NAMES:
        return Source(text, text, column="sentence" if text == "ptb" else None)
    if text and Path(text).exists():
        kind = "folder" if Path(text).is_dir() else "file of no known kind"
        raise UsageError(f"source '{text}' is a {kind}: give {_FORMS}")
    if _HUB.fullmatch(text):
        path, *parts = text.split(":")
        if not parts and Path(path).parent.is_dir():
            raise UsageError(
                f"no such file '{text}' in the folder '{Path(path).parent}' "
                f"(the hub data set of that name is '{text}:')"
            )
        config, split, column = [part or None for part in [*parts, "", "", ""][:3]]
        return Source(text, "hub", path, config, split, column)
    if _PATH_LIKE.fullmatch(text):
        raise UsageError(f"no such file: source '{text}' does not exist")
    hint = nearest(text.lower(), NAMES)
    if not hint.startswith("did you mean"):
        hint = f"give {', '.join(NAMES)}, {_FORMS}"
    raise UsageError(f"source '{text}' is unknown: {hint}")


def read(source: Source, split: str, *, progress: bool = False) -> Sequence[Any]:
    """Return the rows of a source: texts, or lists of token ids.

    Args:
        source: What to read; a .txt file is one row.
        split: "train" or "test"; files have no splits, and a split in the source goes first.
        progress: Show the bars of a download.

    Returns:
        At least one row.

    Raises:
        NeuroalError: The source cannot be read, has no rows, or not the column.
    """
    rows: Sequence[Any]
    if source.kind == "demo":
        from neuroal.demo import documents

        rows = documents("calibration" if split == "train" else "heldout")
    elif source.kind in (*NAMES, "hub"):
        rows = _from_hub(source, split, progress)
    else:
        try:
            rows = _from_file(source)
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise NeuroalError(f"cannot read '{source.path}': {reason}") from error
    if not len(rows):
        raise NeuroalError(f"'{source.text}' is empty: give text, or rows of input_ids")
    if not isinstance(rows[0], (str, list, tuple)):
        raise NeuroalError(f"row 1 of '{source.text}' is {rows[0]!r:.40}, not text or token ids")
    return rows


def _from_hub(source: Source, split: str, progress: bool) -> Sequence[Any]:
    if source.kind == "hub":
        call = {"path": source.path, "name": source.config, "split": source.split or split}
    else:
        call = {"split": "train", "verification_mode": "no_checks", **_NAMED[source.kind, split]}
    with _datasets(progress) as datasets:
        try:
            table = datasets.load_dataset(**call)
        except Exception as error:  # of many libraries: network, hub, formats
            raise NeuroalError(
                f"cannot load '{source.text}' from the hub: {_reason(error)}; give a local file"
            ) from error
    rows: Sequence[Any] = table[_column(source, table.column_names)]
    return rows


def _from_file(source: Source) -> Sequence[Any]:
    if source.kind == "txt":
        with _opened(source.path) as file:
            text = file.read()
        return [text] if text.strip() else []
    if source.kind == "parquet":
        return _from_parquet(source)
    rows: list[Any] = []
    column = source.column
    for place, row in _objects(source):
        if not isinstance(row, dict):
            raise NeuroalError(f"{place} of '{source.path}' is not an object with a column 'text'")
        if not rows:
            column = _column(source, list(row))
        if column not in row:
            raise NeuroalError(f"{place} of '{source.path}' has no column '{column}'")
        rows.append(row[column])
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
            column = _column(source, list(whole))
            cells = whole[column]
            if isinstance(cells, list) and cells and isinstance(cells[0], (str, list)):
                whole = [{column: cell} for cell in cells]
            else:
                whole = [whole]
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
    with tempfile.TemporaryDirectory(prefix="neuroal-") as folder, _datasets(False) as datasets:
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
            raise NeuroalError(f"cannot read '{source.path}': {_reason(error)}") from error
        rows: Sequence[Any] = table[_column(source, table.column_names)]
        return rows


def _column(source: Source, names: Sequence[str]) -> str:
    if source.column is not None:
        if source.column in names:
            return source.column
        wanted = f"'{source.column}': {nearest(source.column, names)}"
    else:
        for column in ("input_ids", "text"):
            if column in names:
                return column
        wanted = f"'text' or 'input_ids': its columns are {', '.join(names)}"
    raise NeuroalError(f"'{source.text}' has no column {wanted}")


@contextmanager
def _opened(path: str) -> Iterator[TextIO]:
    opener: Any = gzip.open if path.lower().endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
        yield file


@contextmanager
def _datasets(progress: bool) -> Iterator[Any]:
    import datasets

    verbosity = datasets.utils.logging.get_verbosity()
    bars = not datasets.are_progress_bars_disabled()
    if not progress:
        datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(logging.CRITICAL)  # what it logs as errors, it raises
    try:
        yield datasets
    finally:
        datasets.utils.logging.set_verbosity(verbosity)
        if bars:
            datasets.enable_progress_bars()


def _reason(error: BaseException) -> str:
    while type(error).__name__ == "DatasetGenerationError" and error.__cause__ is not None:
        error = error.__cause__
    return f"{' '.join(str(error).split()):.300}" or type(error).__name__


@dataclass(frozen=True, eq=False)
class Windows:
    """Token windows and what identifies them.

    Attributes:
        ids: Token ids, (samples, length), int64, on the CPU.
        source: The source as it was given.
        sha256: Of the ids alone: their little-endian int64 bytes in row-major order.
    """

    ids: Tensor
    source: str
    sha256: str = field(init=False)

    def __post_init__(self) -> None:
        raw = self.ids.numpy().astype("<i8").tobytes()
        object.__setattr__(self, "sha256", hashlib.sha256(raw).hexdigest())

    def to_json(self) -> dict[str, Any]:
        """Return the report's `data` entry."""
        samples, length = self.ids.shape
        return {
            "source": self.source,
            "windows": samples,
            "length": length,
            "sha256": self.sha256,
        }


def calibration_windows(
    source: Source | str,
    tokenizer: Any,
    *,
    samples: int,
    length: int | None = None,
    seed: int = 0,
    context: int | None = None,
    vocabulary: int | None = None,
    progress: bool = False,
) -> Windows:
    """Take rows of token ids as they stand, or draw random windows of documents.

    A draw is the driver of the Wanda family: with one `random.Random(seed)`, document indices
    until a document is longer than `length`, then a start in [0, tokens - length - 1].

    Args:
        source: A `Source` or its text.
        tokenizer: Called as transformers' tokenizers are; may be None for rows of token ids.
        samples: Number of windows; of rows the first.
        length: Tokens per window; None is the rows' own, for text the smaller of 2048 and
            `context`.
        seed: Seed of the draws.
        context: Longest window that the model takes, if it has a bound.
        vocabulary: Number of token ids that the model knows; None leaves ids unchecked.
        progress: Show the bars of a download.

    Returns:
        The windows, (samples, length).

    Raises:
        UsageError: `samples` or `length` is out of range, or the source text is wrong.
        NeuroalError: The source cannot be read, or holds too little or the wrong thing.
    """
    source = parse_source(source) if isinstance(source, str) else source
    check_sizes(samples, length, context)
    values = read(source, "train", progress=progress)
    if holds_tokens(values):
        if len(values) < samples:
            raise NeuroalError(
                f"'{source.text}' has {len(values)} windows of token ids, fewer than the {samples} "
                f"asked for: give --samples {len(values)} or more rows"
            )
        ids = token_rows(source, values, samples, length, context)
    else:
        if source.kind in ("ptb", "wikitext2"):
            values = [joined(source, values, " ")]
        rng = random.Random(seed)
        ids = _draw(source, values, tokenizer, rng, samples, length or default_length(context))
    return windows_of(ids, source, vocabulary)


def _draw(
    source: Source,
    texts: Sequence[Any],
    tokenizer: Any,
    rng: random.Random,
    samples: int,
    length: int,
) -> Tensor:
    long: dict[int, list[int]] = {}  # tokenised once, when first drawn
    short: set[int] = set()
    longest = 0
    drawn: list[list[int]] = []
    while len(drawn) < samples:
        index = rng.randrange(len(texts))
        if index in short:
            continue
        if index not in long:
            tokens = encode(source, tokenizer, joined(source, [texts[index]], first=index + 1))
            longest = max(longest, len(tokens))
            if len(tokens) > length:
                long[index] = tokens
            else:
                short.add(index)
                if len(short) == len(texts):
                    raise NeuroalError(
                        f"no document of '{source.text}' is longer than {length} tokens, the "
                        f"longest has {longest}: {cure(longest - 1)}"
                    )
                continue
        tokens = long[index]
        start = rng.randint(0, len(tokens) - length - 1)
        drawn.append(tokens[start : start + length])
    return torch.tensor(drawn)


def check_sizes(windows: int | None, length: int | None, context: int | None) -> None:
    """Raise a `UsageError` for a number of windows or a length that no source can give."""
    if windows is not None and windows < 1:
        raise UsageError(f"{windows} windows are too few: give at least 1")
    if length is not None and length < 2:
        raise UsageError(f"length {length} is too short: a window needs at least 2 tokens")
    if length is not None and context is not None and length > context:
        raise UsageError(f"length {length} is more than the model's context of {context} tokens")


def default_length(context: int | None) -> int:
    """Return the length of windows of text where none is asked for."""
    return min(LONGEST_DEFAULT, context or LONGEST_DEFAULT)


def cure(tokens: int) -> str:
    """Return what to do where windows of at most `tokens` tokens can be had."""
    rounded = 1 << max(tokens, 1).bit_length() - 1
    return f"give --length {rounded} or more text" if rounded > 1 else "give more text"


def holds_tokens(values: Sequence[Any]) -> bool:
    """Return whether the rows are token ids and not texts."""
    return isinstance(values[0], (list, tuple))


def joined(source: Source, texts: Sequence[Any], separator: str = "", first: int = 1) -> str:
    """Return the texts as one; the first is row `first` of the source."""
    for row, text in enumerate(texts, first):
        if not isinstance(text, str):
            raise NeuroalError(f"row {row} of '{source.text}' is {text!r:.40}, not text")
    return separator.join(texts)


def encode(source: Source, tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a text, special tokens included, however long it is."""
    if tokenizer is None:
        raise NeuroalError(
            f"the model has no tokenizer to read '{source.text}' with: give a file of input_ids"
        )
    # verbose=False: no warning that the text is longer than the model's context.
    return list(tokenizer(text, verbose=False)["input_ids"])


def token_rows(
    source: Source, rows: Sequence[Any], samples: int, length: int | None, context: int | None
) -> Tensor:
    """Return the first rows of token ids as they stand: (samples, length), int64.

    Raises:
        NeuroalError: They are no integers, or not of one length, or not of the wanted one.
    """
    rows = list(rows[:samples])
    for row, ids in enumerate(rows, 1):
        if not isinstance(ids, (list, tuple)) or not all(type(token) is int for token in ids):
            raise NeuroalError(f"row {row} of '{source.text}' is not a list of token ids")
        if len(ids) != len(rows[0]):
            raise NeuroalError(
                f"row {row} of '{source.text}' has {len(ids)} token ids and row 1 has "
                f"{len(rows[0])}: windows must be of one length"
            )
    found = len(rows[0])
    if length is not None and found != length:
        raise NeuroalError(
            f"the rows of '{source.text}' have {found} token ids, not {length}: "
            f"give --length {found} or none"
        )
    if found < 2 or (context is not None and found > context):
        bound = "at least 2" if found < 2 else f"at most the model's context of {context}"
        raise NeuroalError(f"the rows of '{source.text}' have {found} token ids, not {bound}")
    try:
        return torch.tensor(rows)
    except (RuntimeError, ValueError, OverflowError):  # differs between versions of torch
        raise NeuroalError(f"'{source.text}' has token ids beyond 64 bits") from None


def windows_of(ids: Tensor, source: Source, vocabulary: int | None) -> Windows:
    """Return the windows once every id is known to be one of the model's."""
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        known = "" if vocabulary is None else f" (0 to {vocabulary - 1})"
        raise NeuroalError(
            f"'{source.text}' has the token id {low if low < 0 else high}, which is none of the "
            f"model's{known}: tokens and model do not belong together"
        )
    return Windows(ids, source.text)
