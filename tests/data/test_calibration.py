import gzip
import hashlib
import json
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from neuroal.data.calibration import calibration_windows
from neuroal.data.source import Source, parse_source
from neuroal.data.windows import Windows
from neuroal.errors import NeuroalError, UsageError

WORDS = ["<s>", "<unk>", *(f"w{n}" for n in range(60)), "é", "日本"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, `<s>` first, and a context far shorter than the texts."""
    core = Tokenizer(WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    core.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=4)


def texts(count: int = 30, seed: int = 5) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS[2:], k=rng.randrange(3, 40))) for _ in range(count)]


def rows(count: int = 6, length: int = 5) -> list[list[int]]:
    return [[(7 * r + c) % 60 for c in range(length)] for r in range(count)]


def drawn_by_hand(documents: list[str], samples: int, length: int, seed: int) -> list[list[int]]:
    """The common driver, every document tokenised first, and by hand."""
    tokens = [[0, *(WORDS.index(word) for word in text.split())] for text in documents]
    rng, windows = random.Random(seed), []
    for _ in range(samples):
        while len(document := tokens[rng.randint(0, len(tokens) - 1)]) <= length:
            pass
        start = rng.randint(0, len(document) - length - 1)
        windows.append(document[start : start + length])
    return windows


def write(path: Path, column: str, values: list, **extra: object) -> str:
    """Write a column in the format, and the compression, of the path's suffixes."""
    packed = path.suffix == ".gz"
    kind = path.with_suffix("").suffix if packed else path.suffix
    table = [{**extra, column: value} for value in values]
    if kind == ".parquet":
        import pyarrow as pa
        from pyarrow import parquet

        sink = pa.BufferOutputStream()
        parquet.write_table(pa.Table.from_pylist(table), sink)
        raw = sink.getvalue().to_pybytes()
    elif kind == ".json":
        raw = json.dumps(table, indent=1).encode()
    else:
        raw = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in table).encode()
    path.write_bytes(gzip.compress(raw) if packed else raw)
    return str(path)


FORMATS = [kind + packed for kind in (".jsonl", ".json", ".parquet") for packed in ("", ".gz")]


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("c4", Source("c4", "c4")),
        ("demo", Source("demo", "demo")),
        ("owner/name", Source("owner/name", "hub", "owner/name")),
        ("a/b:c:d:e", Source("a/b:c:d:e", "hub", "a/b", "c", "d", "e")),
        ("a/b::test", Source("a/b::test", "hub", "a/b", None, "test", None)),
        ("a/b:::body", Source("a/b:::body", "hub", "a/b", None, None, "body")),
        ("a/b:", Source("a/b:", "hub", "a/b")),
    ],
)
def test_names_and_hub_data_sets_are_told_apart_unread(text: str, source: Source) -> None:
    assert parse_source(text) == source


def test_an_existing_file_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    for name in ("x.TXT", "owner/name.jsonl.gz", "with:colon.json"):
        (tmp_path / name).touch()
        assert parse_source(name).path == name
    assert parse_source("owner/name.jsonl.gz:body").column == "body"
    assert parse_source("x.TXT").kind == "txt"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("wikitext", "did you mean 'wikitext2'?"),
        ("C4x", "did you mean 'c4'?"),
        ("nonsense", r"give c4, demo, ptb, wikitext2, .*\.jsonl.*owner/name"),
        ("", "give c4"),
        ("A text, not a source.\n" * 1000, "'A text, not a source.*unknown"),
        ("missing.txt", "no such file.*'missing.txt' does not exist"),
        ("missing.jsonl.gz:body", "no such file.*'missing.jsonl.gz'"),
        ("./owner/name", "no such file"),
        ("/a/b/c", "no such file"),
        ("data.csv", "no such file"),
        ("a/b:c:d:e:f", "unknown"),
        ("folder", "is a folder: give"),
        ("folder.json", "is a folder"),
        ("folder/typo", "no such file 'folder/typo' in the folder 'folder'"),
        ("notes.md", "is a file of no known kind: give"),
        ("text.txt:column", "a .txt file has none"),
    ],
)
def test_a_wrong_source_is_a_usage_error(
    text: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "notes.md").touch()
    (tmp_path / "text.txt").touch()
    with pytest.raises(UsageError, match=says) as raised:
        parse_source(text)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("suffix", FORMATS)
def test_windows_are_drawn_as_by_hand(
    suffix: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write(tmp_path / f"text{suffix}", "text", texts(), url="x")
    for seed in (0, 7):
        windows = calibration_windows(path, tokenizer, samples=50, length=12, seed=seed)
        assert windows.ids.tolist() == drawn_by_hand(texts(), 50, 12, seed)
        assert windows.ids.dtype == torch.int64
        assert windows.source == path


@pytest.mark.parametrize("suffix", FORMATS)
def test_rows_of_token_ids_stand_as_they_are(suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"ids{suffix}", "input_ids", rows(), text="not read")
    for length in (None, 5):
        windows = calibration_windows(path, None, samples=4, length=length, vocabulary=60)
        assert windows.ids.tolist() == rows()[:4]


def test_a_column_can_be_named(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "x.jsonl", "body", texts(), text="too short")
    windows = calibration_windows(f"{path}:body", tokenizer, samples=3, length=8)
    assert windows.ids.tolist() == drawn_by_hand(texts(), 3, 8, 0)
    with pytest.raises(NeuroalError, match="no column 'bodi': did you mean 'body'"):
        calibration_windows(f"{path}:bodi", tokenizer, samples=3, length=8)


@pytest.mark.parametrize("packed", [False, True])
def test_a_txt_file_is_one_document(
    packed: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / ("x.txt.gz" if packed else "x.txt")
    raw = "\n\n".join(texts()).encode()
    path.write_bytes(gzip.compress(raw) if packed else raw)
    windows = calibration_windows(str(path), tokenizer, samples=9, length=30)
    assert windows.ids.tolist() == drawn_by_hand([" ".join(texts())], 9, 30, 0)


def test_an_object_of_columns_and_json_lines_named_json_are_read(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    columns, lines = tmp_path / "columns.json", tmp_path / "lines.json"
    columns.write_text(json.dumps({"text": texts(), "url": ["x"] * 30}))
    lines.write_text("\n".join(json.dumps({"text": text}) for text in texts()))
    for path in (columns, lines):
        windows = calibration_windows(str(path), tokenizer, samples=5, length=6)
        assert windows.ids.tolist() == drawn_by_hand(texts(), 5, 6, 0)
    (tmp_path / "one.json").write_text('{"input_ids": [1, 2, 3]}')
    assert calibration_windows(str(tmp_path / "one.json"), None, samples=1).ids.tolist() == [
        [1, 2, 3]
    ]


def test_a_window_is_strictly_shorter_than_its_document(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write(tmp_path / "x.jsonl", "text", ["w1 w2 w3", "w4 w5 w6 w7"])  # 4 and 5 tokens
    windows = calibration_windows(path, tokenizer, samples=20, length=4)
    assert windows.ids.tolist() == [[0, 6, 7, 8]] * 20  # the start 1 is never drawn either
    with pytest.raises(
        NeuroalError, match=r"longer than 5 tokens.*has 5: give more text, or --length 4"
    ):
        calibration_windows(path, tokenizer, samples=1, length=5)


def test_a_bom_windows_line_ends_and_blank_lines_do_no_harm(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "\xc3\xa9 w1 w2"}\r\n\r\n{"text": "\\u65e5\\u672c"}\r\n'
    )
    windows = calibration_windows(str(path), tokenizer, samples=1, length=3)
    assert windows.ids.tolist() == [[0, WORDS.index("é"), 3]]


def test_the_length_of_text_windows_is_the_models_context_at_most_2048(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "x.txt"
    path.write_text("w1 " * 3000)
    for context, length in ((None, 2048), (4096, 2048), (512, 512)):
        windows = calibration_windows(str(path), tokenizer, samples=1, context=context)
        assert windows.ids.shape == (1, length)


def test_a_document_is_tokenised_once(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    read: list[str] = []

    def counted(text: str, **options: object) -> dict[str, list[int]]:
        read.append(text)
        return {"input_ids": tokenizer(text, **options)["input_ids"]}

    path = write(tmp_path / "x.jsonl", "text", texts())
    calibration_windows(path, counted, samples=3, length=8)
    assert len(read) < 30
    read.clear()
    calibration_windows(path, counted, samples=300, length=8)
    assert sorted(read) == sorted(texts())


def test_long_texts_are_tokenised_without_a_warning(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "x.jsonl", "text", texts())
    calibration_windows(path, tokenizer, samples=3, length=8)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_the_digest_is_of_the_little_endian_ids_alone() -> None:
    expected = hashlib.sha256(struct.pack("<4q", 1, 2, 3, 258)).hexdigest()
    ids = torch.tensor([[1, 2], [3, 258]])
    assert Windows(ids, "x").sha256 == expected
    assert Windows(ids.T.contiguous().T, "y").to_json() == {
        "source": "y",
        "windows": 2,
        "length": 2,
        "bos": None,
        "packed": False,
        "documents": None,
        "sha256": expected,
    }


CONTENTS = {
    "x.txt": [
        (b"", "'{}' is empty"),
        (b" \n", "'{}' is empty"),
        (b"\xff\xfe", "cannot read '{}'.*utf-8"),
        (
            b"w1 w2",
            "no document of '{}' is longer than 8 tokens.*has 3: give more text, or --length 2",
        ),
    ],
    "x.txt.gz": [(b"plain", "cannot read '{}'"), (b"\x1f\x8b\x08\x00\x00", "cannot read '{}'")],
    "x.jsonl": [
        (b"", "'{}' is empty"),
        (b'{"text": "a"}\n{"text": \n', "line 2 of '{}' is not JSON"),
        (b"[" * 100_000, "line 1 of '{}' is not JSON"),
        (b'"text"', "line 1 of '{}' is not an object"),
        (b'{"body": "a"}', "'{}' has no column 'text' or 'input_ids',.*: its columns are body"),
        (b'{"text": "a"}\n{"body": "a"}', "line 2 of '{}' has no column 'text'"),
        (b'{"text": 5}', "row 1 of '{}' is 5, not text"),
        (b'{"text": "a"}\n{"text": null}', "row 2 of '{}' is None, not text"),
        (b'{"input_ids": [1, 2.5]}\n' * 4, "row 1 of '{}' is not a list of token ids"),
        (b'{"input_ids": [true, "a"]}\n' * 4, "row 1 of '{}' is not a list of token ids"),
        (b'{"input_ids": [1, 2, 3]}\n' * 3 + b'{"input_ids": [1]}', "row 4.*has 1 .*row 1 has 3"),
        (b'{"input_ids": [1, 2, 3]}\n' * 4, "have 3 token ids, not 8: give --length 3 or none"),
        (b'{"input_ids": [1, 2, 3, 4, 5, 6, 7, 64]}\n' * 4, r"id 64, which is none.*\(0 to 63\)"),
        (b'{"input_ids": [1, 2, 3, 4, 5, 6, 7, -1]}\n' * 4, "token id -1"),
        (b'{"input_ids": [1, 2, 3, 4, 5, 6, 7, 9999999999999999999]}\n' * 4, "beyond 64 bits"),
        (b'{"input_ids": [1]}\n' * 4, "have 1 token ids, not 8"),
    ],
    "x.json": [
        (b"", "'{}' is empty"),
        (b"[]", "'{}' is empty"),
        (b"[1]", "row 1 of '{}' is not an object"),
        (b"[{}", "line 1 of '{}' is not JSON"),
    ],
    "x.parquet": [(b"", "'{}' is empty"), (b"PAR1 nonsense PAR1", "cannot read '{}'")],
}


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [(name, *case) for name, cases in CONTENTS.items() for case in cases],
)
def test_a_bad_file_is_one_line_that_names_it(
    name: str,
    content: bytes,
    says: str,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(content)
    with pytest.raises(NeuroalError, match=says.format(name)) as raised:
        calibration_windows(name, tokenizer, samples=4, length=8, vocabulary=len(WORDS))
    assert "\n" not in str(raised.value)
    assert capfd.readouterr().err == ""


def test_a_parquet_file_without_rows_is_empty(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "x.parquet")
    with pytest.raises(NeuroalError, match=r"x\.parquet' is empty"):
        calibration_windows(str(tmp_path / "x.parquet"), None, samples=1)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"samples": 0}, "0 windows"),
        ({"samples": 1, "length": 1}, "length 1 is too short"),
        ({"samples": 1, "length": 600, "context": 512}, "600 is more than the model's context"),
    ],
)
def test_sizes_out_of_range_are_refused(options: dict[str, int], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        calibration_windows("demo", None, **options)


def test_rows_longer_than_the_context_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", "input_ids", rows(length=5))
    with pytest.raises(NeuroalError, match="5 token ids, not at most the model's context of 4"):
        calibration_windows(path, None, samples=1, context=4)


def test_text_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(NeuroalError, match="no tokenizer"):
        calibration_windows("demo", None, samples=1, length=4)


def test_the_demo_has_its_own_documents(tokenizer: PreTrainedTokenizerFast) -> None:
    from neuroal.demo import documents

    windows = calibration_windows("demo", tokenizer, samples=4, length=16)
    first = random.Random(0).randrange(len(documents("calibration")))
    expected = tokenizer(documents("calibration")[first], verbose=False)["input_ids"]
    found = windows.ids[0].tolist()
    assert any(found == expected[s : s + 16] for s in range(len(expected)))


class Hub:
    """Stands in for `datasets.load_dataset`: remembers its calls, returns one table."""

    def __init__(self, column: str, values: list) -> None:
        self.column, self.values, self.calls = column, values, []

    def __call__(self, path: str, **options: object) -> object:
        import datasets

        self.calls.append((path, {k: v for k, v in options.items() if v is not None}))
        return datasets.Dataset.from_dict({self.column: self.values})


@pytest.mark.parametrize(
    ("source", "column", "path", "options"),
    [
        (
            "c4",
            "text",
            "allenai/c4",
            {"data_files": "en/c4-train.00000-of-01024.json.gz", "split": "train"},
        ),
        (
            "wikitext2",
            "text",
            "Salesforce/wikitext",
            {"name": "wikitext-2-raw-v1", "split": "train"},
        ),
        (
            "ptb",
            "sentence",
            "ptb-text-only/ptb_text_only",
            {
                "revision": "refs/convert/parquet",
                "data_files": "penn_treebank/train/0000.parquet",
                "split": "train",
            },
        ),
        ("a/b", "text", "a/b", {"split": "train"}),
        ("a/b:c:d:e", "e", "a/b", {"name": "c", "split": "d"}),
    ],
)
def test_hub_sources_are_loaded_by_their_current_names(
    source: str,
    column: str,
    path: str,
    options: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    hub = Hub(column, texts())
    monkeypatch.setattr("datasets.load_dataset", hub)
    windows = calibration_windows(source, tokenizer, samples=5, length=10)
    [(called, given)] = hub.calls
    assert called == path
    assert {k: v for k, v in given.items() if k != "verification_mode"} == options
    one = source in ("wikitext2", "ptb")  # joined, as in the Wanda family's code
    documents = [" ".join(texts())] if one else texts()
    assert windows.ids.tolist() == drawn_by_hand(documents, 5, 10, 0)


def test_without_the_hub_the_error_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        NeuroalError, match=r"cannot load 'a/b' from the hub.*give a local"
    ) as raised:
        calibration_windows("a/b", None, samples=1)
    assert "\n" not in str(raised.value)

    def fails(path: str, **options: object) -> None:
        raise ValueError("Config name is missing.\nPlease pick one among: x, y")

    monkeypatch.setattr("datasets.load_dataset", fails)
    with pytest.raises(NeuroalError, match=r"missing\. Please pick one among: x, y; give"):
        calibration_windows("a/b", None, samples=1)
    assert capfd.readouterr().err == ""


def test_parquet_leaves_nothing_on_disk_and_no_setting_of_datasets_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    path = write(tmp_path / "x.parquet.gz", "input_ids", rows())
    before = datasets.utils.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    calibration_windows(path, None, samples=1)
    assert not list((tmp_path / "temporary").iterdir())
    after = datasets.utils.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    assert after == before
    write(tmp_path / "x.parquet.gz", "input_ids", [[9, 9]])  # no stale cache
    assert calibration_windows(path, None, samples=1).ids.tolist() == [[9, 9]]


def test_neither_transformers_nor_datasets_is_imported_to_read_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", "input_ids", rows())
    code = (
        "import sys; from neuroal.data.calibration import calibration_windows as c;"
        f"c({path!r}, None, samples=1);"
        "assert not {'datasets', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_fewer_rows_than_samples_are_all_taken_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('{"input_ids": [1, 2, 3]}\n' * 2)
    taken = calibration_windows(str(file), None, samples=4)
    assert taken.ids.tolist() == [[1, 2, 3]] * 2
    assert "has 2 windows of token ids, not 4" in caplog.text
