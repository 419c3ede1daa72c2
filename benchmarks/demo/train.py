"""The demo model is trained from nothing on the generated text, in minutes on two cores."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .text import documents

LOG = logging.getLogger(__name__)

VOCABULARY = 1024
WINDOW = 256
BATCH = 8
PEAK_RATE = 3e-3
FINAL_SHARE = 0.02
WARM_UP = 100
WEIGHT_DECAY = 0.1
BEGIN = "<s>"
END = "</s>"


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE is learnt from the text and encodes every other text as well.

    Args:
        texts: The documents to learn from.

    Returns:
        The tokenizer, which puts ``<s>`` before every text.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, core.token_to_id(BEGIN))]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core,
        bos_token=BEGIN,
        eos_token=END,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The untrained model has eight narrow blocks and tied embeddings.

    Args:
        tokenizer: Its vocabulary sets the size of the embeddings.

    Returns:
        The model with random weights.
    """
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=240,
            num_hidden_layers=8,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=WINDOW,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """Documents become one row of tokens, each between ``<s>`` and ``</s>``.

    Args:
        tokenizer: The tokenizer of the model.
        texts: The documents.

    Returns:
        The tokens of all documents, one after the other.
    """
    end = tokenizer.eos_token_id
    rows = tokenizer(texts, verbose=False)["input_ids"]
    return torch.tensor([token for row in rows for token in [*row, end]])


def rate(step: int, steps: int) -> float:
    """The learning rate rises for the warm-up and then falls along a cosine.

    Args:
        step: The step, from 0.
        steps: The number of steps.

    Returns:
        The share of the peak rate.
    """
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    angle = math.pi * (step - WARM_UP) / max(1, steps - WARM_UP)
    return FINAL_SHARE + (1 - FINAL_SHARE) * (1 + math.cos(angle)) / 2


def train(model: LlamaForCausalLM, tokens: Tensor, steps: int, seed: int) -> None:
    """The model is fitted to random windows of the text by AdamW.

    Args:
        model: The model; its weights change in place.
        tokens: The text from `encode`.
        steps: The number of steps.
        seed: The seed of the windows.
    """
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    vectors = [weight for weight in model.parameters() if weight.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))
    generator = torch.Generator().manual_seed(seed)
    span = torch.arange(WINDOW)
    model.train()
    for _ in (bar := tqdm(range(steps), desc="training", mininterval=5.0)):
        starts = torch.randint(len(tokens) - WINDOW, (BATCH, 1), generator=generator)
        batch = tokens[starts + span]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


@torch.no_grad()
def perplexity(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> float:
    """Perplexity is taken over the first window of every document.

    Args:
        model: The model to judge.
        tokenizer: Its tokenizer.
        texts: Documents of at least one window.

    Returns:
        The exponential of the mean loss per token.
    """
    model.train(mode=False)
    rows = [tokenizer(text, verbose=False)["input_ids"][:WINDOW] for text in texts]
    batches = torch.split(torch.tensor(rows), BATCH)
    losses = [model(input_ids=batch, labels=batch).loss for batch in batches]
    return math.exp(torch.stack(losses).mean().item())


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """A folder of Hugging Face form holds the model and its tokenizer.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        folder: Where to write; it is made where it is absent.
    """
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # transformers 5 writes a class name that transformers 4 does not know.
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text("utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2) + "\n", "utf-8")


def make(folder: Path, steps: int, seed: int) -> None:
    """The tokenizer is learnt, the model trained, and both are written to a folder.

    Args:
        folder: Where to write; it is made where it is absent.
        steps: The number of training steps.
        seed: The seed of the weights and of the windows.
    """
    torch.manual_seed(seed)
    texts = documents("train")
    tokenizer = make_tokenizer(texts)
    tokens = encode(tokenizer, texts)
    model = make_model(tokenizer)
    LOG.info("%d tokens of text, %d weights", len(tokens), model.num_parameters())
    train(model, tokens, steps, seed)
    for split in ("calibration", "heldout"):
        LOG.info("%s perplexity %.3f", split, perplexity(model, tokenizer, documents(split)))
    save(model, tokenizer, folder)
    LOG.info("written to %s", folder)
