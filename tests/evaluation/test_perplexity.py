import json
import math
import random
import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from neuroal.data.windows import Windows
from neuroal.errors import NeuroalError, UsageError
from neuroal.evaluation import perplexity as module
from neuroal.evaluation.perplexity import (
    Perplexity,
    evaluation_windows,
    perplexity,
)

VOCABULARY, LENGTH = 40, 9


def llama(**options: object) -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.5,
        **options,
    )
    return LlamaForCausalLM(config)


def opt() -> OPTForCausalLM:
    torch.manual_seed(3)
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        ffn_dim=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        word_embed_proj_dim=16,
        init_std=0.5,
        dropout=0.5,
    )
    return OPTForCausalLM(config)


@pytest.fixture
def windows() -> Windows:
    return Windows(torch.randint(3, VOCABULARY, (7, LENGTH)), "random")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, without special tokens; blank lines are no tokens."""
    words = ["<unk>", *(f"w{n}" for n in range(39))]
    core = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=4)


def by_hand(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """One token at a time, each from a forward of its own prefix, in float64 afterwards."""
    model.eval()
    means = []
    with torch.no_grad():
        for window in ids:
            losses = []
            for at in range(1, len(window)):
                scores = model(input_ids=window[None, :at]).logits[0, -1].double()
                losses.append(-float(scores.log_softmax(0)[window[at]]))
            means.append(sum(losses) / len(losses))
    return math.exp(sum(means) / len(means))


@pytest.mark.parametrize("make", [llama, opt])
def test_it_is_the_slow_formula(make: object, windows: Windows) -> None:
    model = make()  # type: ignore[operator]
    found = perplexity(model, windows)
    assert found.perplexity == pytest.approx(by_hand(model, windows.ids), rel=1e-5)
    assert found.perplexity > 1.5 * VOCABULARY  # the weights are wild: not just a uniform guess
    assert found.to_json() == {
        "perplexity": found.perplexity,
        "windows": 7,
        "length": LENGTH,
        "data": "random",
        "sha256": windows.sha256,
        "dtype": "float32",
        "protocol": module.MEAN,
        "bos": None,
    }


@pytest.mark.parametrize("batch", [1, 2, 7, 100])
def test_the_batch_changes_nothing(batch: int, windows: Windows) -> None:
    model = llama()
    expected = perplexity(model, windows).perplexity
    assert perplexity(model, windows, batch=batch).perplexity == pytest.approx(expected, rel=1e-6)


def test_logits_are_copied_to_float32_in_small_parts(
    windows: Windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama()
    expected = perplexity(model, windows).perplexity
    monkeypatch.setattr(module, "LOGITS_BYTES", 3 * 4 * VOCABULARY)  # three tokens, one window
    assert perplexity(model, windows).perplexity == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("length", "vocabulary", "batch"), [(256, 40, 8), (250, 140_000, 1)])
def test_a_forward_holds_a_bounded_number_of_tokens(
    length: int, vocabulary: int, batch: int
) -> None:
    """Of 2048 tokens and 256 MiB of float32 logits the smaller; always one window."""
    sizes = []

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(vocabulary, 1)

        def get_input_embeddings(self) -> torch.nn.Embedding:
            return self.embedding

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> object:
            assert not use_cache
            sizes.append(len(input_ids))
            logits = torch.zeros(1).expand(*input_ids.shape, vocabulary)
            return type("Output", (), {"logits": logits})

    ids = torch.zeros(batch + 1, length, dtype=torch.int64)
    found = perplexity(Model(), Windows(ids, "x"))
    assert sizes == [batch, 1]
    assert found.perplexity == pytest.approx(vocabulary, rel=1e-5)


def test_modes_and_weights_are_as_before_whatever_happens(windows: Windows) -> None:
    model = opt()
    model.train()
    model.model.decoder.layers[0].eval()
    modes = [part.training for part in model.modules()]
    first, second = perplexity(model, windows), perplexity(model, windows)
    assert first == second  # no dropout
    assert [part.training for part in model.modules()] == modes
    assert all(weight.grad is None for weight in model.parameters())
    model.lm_head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        perplexity(model, windows)
    assert [part.training for part in model.modules()] == modes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_named_and_its_loss_taken_in_float32(
    dtype: torch.dtype, windows: Windows
) -> None:
    model = llama().to(dtype)
    with torch.no_grad():
        logits = model(input_ids=windows.ids).logits.double()[:, :-1].log_softmax(-1)
    expected = math.exp(-logits.gather(-1, windows.ids[:, 1:, None]).mean())
    found = perplexity(model, windows)
    assert found.dtype == str(dtype).removeprefix("torch.")
    assert found.perplexity == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("factor", "text"), [(math.nan, "nan"), (1e30, "inf"), (math.inf, "nan")])
def test_a_broken_model_has_an_honest_perplexity(
    factor: float, text: str, windows: Windows
) -> None:
    model = llama()
    model.lm_head.register_forward_hook(lambda _, __, logits: logits * factor)
    found = perplexity(model, windows).to_json()
    assert found["perplexity"] == text
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    if factor == 1e30:
        assert re.fullmatch(
            r"the mean cross-entropy of \S+ is beyond what exp can give", found["reason"]
        )
    else:
        assert found["reason"] == (
            "the logits are not finite: the model overflows in float32; its weights or inputs are "
            "too large"
        )


def test_it_says_why_a_perplexity_is_nan(
    windows: Windows, caplog: pytest.LogCaptureFixture
) -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(3e4)
    assert math.isfinite(perplexity(model, windows).perplexity)
    why = (
        "the logits are not finite: the model overflows in float16; give --dtype bfloat16 or "
        "float32"
    )
    assert perplexity(model.half(), windows).reason == why
    assert f"the perplexity on 'random' is nan: {why}" in caplog.text
    with torch.no_grad():
        model.lm_head.weight[3, 1] = math.nan
    assert perplexity(model.float(), windows).reason == "'lm_head.weight' holds NaN or infinity"


def test_bad_arguments_are_refused(windows: Windows) -> None:
    with pytest.raises(UsageError, match="batch 0"):
        perplexity(llama(), windows, batch=0)
    foreign = Windows(windows.ids + VOCABULARY, "foreign")
    with pytest.raises(NeuroalError, match=r"'foreign' has the token id \d+, .*vocabulary of 40"):
        perplexity(llama(), foreign)


def test_progress_is_shown_on_demand(
    windows: Windows, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neuroal.progress.SECONDS", 0.0)
    perplexity(llama(), windows)
    assert capfd.readouterr().err == ""
    perplexity(llama(), windows, progress=True)
    assert "perplexity: 7 of 7" in capfd.readouterr().err


def words(count: int, seed: int = 1) -> str:
    return " ".join(f"w{random.Random(seed + n).randrange(39)}" for n in range(count))


def test_the_text_is_cut_into_consecutive_windows(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "x.txt"
    path.write_text(words(47))
    tokens = [1 + int(word[1:]) for word in words(47).split()]
    found = evaluation_windows(str(path), tokenizer, length=10)
    assert found.ids.tolist() == [tokens[n : n + 10] for n in (0, 10, 20, 30)]
    assert found.source == str(path)
    for count in (1, 4):
        part = evaluation_windows(str(path), tokenizer, length=10, windows=count)
        assert part.ids.equal(found.ids[:count])
    assert not caplog.records
    assert evaluation_windows(str(path), tokenizer, length=10, windows=9).ids.equal(found.ids)
    assert "has 4 windows, not 9" in caplog.text
    assert evaluation_windows(str(path), tokenizer, context=47).ids.shape == (1, 47)


def test_a_text_shorter_than_a_window_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "x.txt"
    path.write_text(words(47))
    says = r"has 47 tokens, fewer than one window of 2048: give more text, or --length 32"
    with pytest.raises(NeuroalError, match=says):
        evaluation_windows(str(path), tokenizer)


def test_rows_of_token_ids_are_evaluated_as_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("".join(f'{{"input_ids": [{n}, 1, 2]}}\n' for n in range(5)))
    assert evaluation_windows(str(path), None).ids[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert evaluation_windows(str(path), None, windows=2).ids[:, 0].tolist() == [0, 1]
    with pytest.raises(NeuroalError, match="3 token ids, not 4"):
        evaluation_windows(str(path), None, length=4)
    with pytest.raises(NeuroalError, match="token id 4, which is none of the model's"):
        evaluation_windows(str(path), None, vocabulary=4)


def tokenised(source: str) -> str:
    """The text that a tokenizer is given."""
    texts = []

    def tokenizer(text: str, verbose: bool) -> dict[str, list[int]]:
        texts.append(text)
        return {"input_ids": [0] * len(text)}

    evaluation_windows(source, tokenizer, length=2)
    return texts[0]


def test_a_txt_file_is_taken_as_it_is_and_documents_are_joined_by_blank_lines(
    tmp_path: Path,
) -> None:
    text = " a \r\n\n\tb\x85 日本 \n"
    (tmp_path / "x.txt").write_bytes(text.encode())
    assert tokenised(str(tmp_path / "x.txt")) == text
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"text": "b\\n"}\n{"text": ""}\n')
    assert tokenised(str(tmp_path / "x.jsonl")) == "a\n\nb\n\n\n"


def test_the_demo_is_evaluated_on_its_held_out_documents() -> None:
    from neuroal.demo import documents

    assert tokenised("demo") == "\n\n".join(documents("heldout"))


@pytest.mark.parametrize(
    ("source", "column", "call", "joined"),
    [
        (
            "c4",
            "text",
            {"path": "allenai/c4", "data_files": "en/c4-validation.00000-of-00008.json.gz"},
            " ".join(f"w{n % 39}" for n in range(1100)),
        ),
        (
            "wikitext2",
            "text",
            {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "test"},
            "\n\n".join(f"w{n % 39}" for n in range(1200)),
        ),
        (
            "ptb",
            "sentence",
            {
                "path": "ptb-text-only/ptb_text_only",
                "revision": "refs/convert/parquet",
                "data_files": "penn_treebank/test/0000.parquet",
            },
            " ".join(f"w{n % 39}" for n in range(1200)),
        ),
        ("a/b", "text", {"path": "a/b", "split": "test"}, None),
        ("a/b::validation", "text", {"path": "a/b", "split": "validation"}, None),
    ],
)
def test_hub_texts_are_joined_as_the_protocol_says(
    source: str,
    column: str,
    call: dict[str, str],
    joined: str | None,
    monkeypatch: pytest.MonkeyPatch,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    import datasets

    calls = []
    rows = [f"w{n % 39}" for n in range(1200)]

    def load_dataset(**options: object) -> datasets.Dataset:
        calls.append(options)
        return datasets.Dataset.from_dict({column: rows})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert tokenised(source) == (joined or "\n\n".join(rows))
    assert call.items() <= calls[0].items()
    found = evaluation_windows(source, tokenizer, length=4)
    assert found.ids.shape == (256 if source == "c4" else 300, 4)


@pytest.mark.parametrize(("text", "key"), [("wikitext2.test", "wikitext2"), ("ptb.test", "ptb")])
def test_the_dense_model_has_the_published_codes_perplexity(
    text: str, key: str, shared: Path
) -> None:
    expected = json.loads((shared / "reference/llama.json").read_text())["dense"][key]
    folder = shared / "models/llama"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    windows = evaluation_windows(
        str(shared / f"data/{text}.txt"), tokenizer, length=256, windows=100, context=512
    )
    found = perplexity(model, windows)
    assert isinstance(found, Perplexity)
    assert found.perplexity == pytest.approx(expected, abs=0.006)  # it has two or three decimals
