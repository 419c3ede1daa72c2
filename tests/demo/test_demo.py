"""What the package ships: texts that are the generator's, and a model that reads them well."""

import gzip
import hashlib
import json
import math
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from neuroal.demo import MODEL, TEXTS, documents

WINDOW = 256
# The folder is part of a repository and of a wheel.
MOST_BYTES = 4_000_000
# Every number that was published on the demo belongs to these texts.
SHA256 = {
    "calibration": (256, "d8a4babcf9d2ddf057deae8b2e6b5d9f7e8dc94109a306c579be50c793edd5bf"),
    "heldout": (128, "9c6272ed014209534131405b5384ffe034f4fc378ab2da05c8ad305997de40f6"),
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.mark.parametrize("split", SHA256)
def test_texts_are_those_of_every_published_number(split: str) -> None:
    texts = documents(split)
    assert (len(texts), hashlib.sha256("\0".join(texts).encode()).hexdigest()) == SHA256[split]


def test_splits_share_no_document() -> None:
    assert not set(documents("calibration")) & set(documents("heldout"))


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown split 'test'; choose calibration or heldout"):
        documents("test")


def test_the_file_holds_two_columns_and_no_time_of_day() -> None:
    assert TEXTS.read_bytes()[4:8] == bytes(4)  # the time in the header of gzip (RFC 1952)
    with gzip.open(TEXTS, "rt", encoding="utf-8") as file:
        assert {tuple(json.loads(line)) for line in file} == {("split", "text")}


def test_every_document_holds_a_window(tokenizer: Any) -> None:
    for split in SHA256:
        rows = tokenizer(documents(split))["input_ids"]
        assert min(len(row) for row in rows) > 1.2 * WINDOW


@pytest.mark.parametrize(
    "text", [documents("heldout")[0], "Another text: Märta – 3 € \U0001f33e\n\ttab", ""]
)
def test_tokenizer_keeps_every_text(tokenizer: Any, text: str) -> None:
    tokens = tokenizer(text)["input_ids"]
    assert tokens[0] == tokenizer.bos_token_id
    assert tokenizer.decode(tokens, skip_special_tokens=True) == text
    assert max(tokens) < 1024


def test_folder_is_small_and_tells_no_path() -> None:
    files = [path for path in MODEL.iterdir() if path.is_file()]
    assert {path.name for path in files} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(path.stat().st_size for path in files) < MOST_BYTES
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        settings = json.loads((MODEL / name).read_text("utf-8"))
        assert not [key for key in settings if "path" in key]
        assert not [value for value in settings.values() if "/" in str(value).replace("</s>", "")]


def test_model_reads_unseen_documents_well(tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    weights = sum(weight.numel() for weight in model.parameters())
    assert 300_000 < weights < 2_000_000
    rows = tokenizer(documents("heldout")[:16])["input_ids"]
    batch = torch.tensor([row[:WINDOW] for row in rows])
    with torch.no_grad():
        perplexity = math.exp(model(input_ids=batch, labels=batch).loss.item())
    # 1.38 over the whole split; a guess among the tokens would be at 1024.
    assert 1.2 < perplexity < 1.5
