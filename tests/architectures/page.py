"""The page of supported models, written from outcomes and read back by the tests."""

from __future__ import annotations

import datetime
import re
from collections import Counter
from collections.abc import Sequence

import transformers

from .check import LENGTH, SPARSITY, WINDOWS, Outcome

_ROW = re.compile(r"^\| `([\w-]+)` \| \w+ \| ([\w -]+?) \|", re.MULTILINE)
_ABOUT = re.compile(r"transformers ([\d.]+)")

_HEAD = """\
# Supported models

What neuroal prunes is decided by structure, not by a list of names. This table is a measurement,
made by `python -m tests.architectures` with transformers {version} on {date}: a tiny model of
random weights of every architecture that `AutoModelForCausalLM` knows, pruned to {sparsity:.0%} by
Wanda with NeuroAL on top, on {windows} windows of {length} tokens.

*Supported* means that all of this holds:

- every matrix inside the blocks is pruned: every parameter of two or more dimensions that a matrix
  multiplication reads, counted by running the model, experts that are stacked in one tensor
  included. Embeddings, the head and what no product reads (convolutions, decay rates) stay dense,
  and by rule the routers that choose experts and gates of one output, which the remarks name;
- exactly half of those weights are zero, and nothing else has changed;
- the blocks run one by one give the model's own logits, before pruning and while pruning;
- the saved folder loads again and gives the same logits; the layout without weights is the same.

*Partly* says what stays dense. *Multimodal* models have blocks that tokens do not reach (of
pictures or sound): those stay dense. An *encoder* lets a token see the tokens after it, with the
defaults of its configuration; an *encoder-decoder* reads another model's states: neither is a
decoder-only language model, and pruning it is refused or means nothing.

| decoder-only architectures | {decoders} |
|---|---|
| supported | {supported} ({share:.1%}), {ruled} of them with routers or gates left dense |
| partly | {partly} |
| fail | {fails} |

Beside them {multimodal} multimodal models, {encoders} encoders, {pairs} halves of a pair of models,
and {unknown} that could not be made here.

| model type | class | outcome | remark |
|---|---|---|---|
"""


def page(outcomes: Sequence[Outcome]) -> str:
    """Return the page as Markdown."""
    kinds = Counter(o.kind for o in outcomes)
    decoders = [o for o in outcomes if o.kind == "decoder"]
    verdicts = Counter(o.verdict for o in decoders)
    head = _HEAD.format(
        version=transformers.__version__,
        date=datetime.date.today().isoformat(),
        sparsity=SPARSITY,
        windows=WINDOWS,
        length=LENGTH,
        decoders=len(decoders),
        supported=verdicts["supported"],
        share=verdicts["supported"] / max(1, len(decoders)),
        ruled=sum(o.verdict == "supported" and bool(o.reason) for o in decoders),
        partly=verdicts["partly"],
        fails=verdicts["fails"],
        multimodal=kinds["multimodal"],
        encoders=kinds["encoder"],
        pairs=kinds["encoder-decoder"],
        unknown=kinds["unknown"],
    )
    rows = (
        f"| `{o.model_type}` | {o.architecture} | {label(o)} | {_cell(o.reason)} |"
        for o in outcomes
    )
    return head + "\n".join(rows) + "\n"


def label(outcome: Outcome) -> str:
    """Return the outcome as the table says it."""
    if outcome.kind == "decoder":
        return outcome.verdict
    if outcome.kind == "unknown":
        return "not made"
    return f"{outcome.kind} {outcome.verdict}".strip()


def read(text: str) -> tuple[str, dict[str, str]]:
    """Return the version of transformers that a page is about, and its labels by model type."""
    about = _ABOUT.search(text)
    return about[1] if about else "", dict(_ROW.findall(text))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")
