"""What pruning a tiny model of one architecture comes to."""

from __future__ import annotations

import re
import tempfile
import textwrap
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import neuroal
from neuroal import Recipe, layout
from neuroal.layout import Layout
from neuroal.model import pretrained
from neuroal.walk import CandidateState, Walker

from .count import Count, close, count, is_half, kind_of, logits_of
from .tiny import VOCABULARY, architectures, tiny_model

SPARSITY = 0.5
LAMBDAS = (0.05, 0.2)
BY_RULE = ("router:", "gate:", "one input")  # reasons to leave a matrix dense anywhere
WINDOWS, SEARCH_WINDOWS, LENGTH = 4, 2, 16


@dataclass(frozen=True)
class Outcome:
    """What one architecture came to.

    Attributes:
        model_type: As transformers' configuration calls it.
        architecture: Name of the model class.
        kind: "decoder"; "multimodal", with blocks that tokens do not reach; "encoder", whose tokens
            see the tokens after them; "encoder-decoder", which reads another model's states; or
            "unknown" where it could not be made.
        verdict: "supported"; "partly" where matrices stay dense that are no router and no gate;
            "fails"; "" for what is no decoder or could not be made.
        reason: What stays dense and why, what failed, or why it is no decoder.
        blocks: Number of blocks found.
        weights: Weights that should be pruned, by the count of this module.
        seconds: How long it took.
    """

    model_type: str
    architecture: str
    kind: str
    verdict: str
    reason: str = ""
    blocks: int = 0
    weights: int = 0
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the outcome as JSON values."""
        return asdict(self)


class CoverageError(AssertionError):
    """A check that did not hold; the message is the reason that the table gives."""


def windows(seed: int = 0, number: int = WINDOWS) -> Tensor:
    """Return random token ids, int64 `(number, LENGTH)`, without the special ones."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY - 4, (number, LENGTH), generator=rng)


def walked(model: nn.Module, found: Layout, pruned: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """Return logits of a walk that lays `pruned` parameters into a block before it runs it."""
    walker = Walker(model, found)
    inputs = walker.inputs(ids)
    state = CandidateState.start(inputs)
    for block in found.blocks:
        with walker.block(block) as module, torch.no_grad():
            for key, p in module.named_parameters():
                if f"{block.name}.{key}" in pruned:
                    p.copy_(pruned[f"{block.name}.{key}"])
            after = walker.run(block, module, inputs, state).state
        assert after is not None
        state = after
    batches = zip(inputs.batches, state.outputs, strict=True)
    return torch.cat([walker.logits(batch, outputs) for batch, outputs in batches])


def _check(holds: bool, reason: str) -> None:
    if not holds:
        raise CoverageError(reason)


def _prune(model_type: str, model: nn.Module, counted: Count) -> tuple[Layout, dict[str, str]]:
    """Prune `model` and return its layout, and why matrices stayed dense.

    Raises:
        CoverageError: A check does not hold.
    """
    ids, unseen = windows(1), windows(2)
    found = layout.find(model)
    dense = {k: p.detach().clone() for k, p in model.named_parameters()}
    expected = logits_of(model, unseen)
    _check(close(walked(model, found, {}, unseen), expected), "the dense walk is not the forward")
    few = {"lambdas": LAMBDAS}
    recipe = Recipe(
        sparsity=SPARSITY,
        pruner="wanda",
        top_up="neuroal",
        options={"linear_schedule": few, "neuroal": few},
        search_samples=SEARCH_WINDOWS,
    )
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "pruned"
        report = neuroal.prune(model, recipe=recipe, windows=ids, out=out)
        after = logits_of(model, unseen)
        _check(bool(torch.isfinite(after).all()), "the pruned model's logits are not finite")
        again, _ = pretrained.load(str(out))
        _check(close(logits_of(again, unseen), after), "the saved model's logits are others")
        skeleton = layout.find(pretrained.skeleton(str(out)))
        _check(skeleton == found, "the layout without weights is another")
    now = dict(model.named_parameters())
    touched = {k: now[k] for k, p in dense.items() if not torch.equal(p, now[k])}
    skipped = {x.name: x.reason for x in found.skipped}
    missed = {k: skipped.get(k, "") for k in counted.matrices if k not in touched}
    unnamed = [k for k, reason in missed.items() if not reason]
    _check(not unnamed, f"neither pruned nor named as skipped: {', '.join(unnamed[:3])}")
    beyond = [k for k in touched if k not in counted.matrices]
    _check(not beyond, f"changed what is no matrix of a block: {', '.join(beyond[:3])}")
    total = sum(p.numel() for p in touched.values())
    zeros = sum(int((p == 0).sum()) for p in touched.values())
    _check(zeros == round(SPARSITY * total), f"{zeros} of {total} weights are zero")
    _check(found.weights == total, f"the layout has {found.weights} weights, {total} were pruned")
    _check(abs(report.sparsity["achieved"] - zeros / total) < 1e-12, "the report says otherwise")
    fresh = tiny_model(model_type)
    _check(
        close(walked(fresh, found, touched, unseen), after),
        "the committed walk is not the forward",
    )
    return found, missed


def check(model_type: str) -> Outcome:
    """Prune a tiny model of an architecture with Wanda and NeuroAL and say what came of it."""
    start = time.perf_counter()
    name = architectures()[model_type]

    def outcome(kind: str, verdict: str, reason: str = "", **more: int) -> Outcome:
        seconds = round(time.perf_counter() - start, 1)
        return Outcome(model_type, name, kind, verdict, reason, seconds=seconds, **more)

    half = is_half(model_type)
    if half:
        return outcome("encoder-decoder", "", half)
    try:
        model = tiny_model(model_type)
        counted = count(model, windows())
        kind, why = kind_of(model, counted, windows())
    except Exception as error:
        return outcome("unknown", "", f"cannot be made and run: {_line(error)}")
    if kind in ("encoder", "encoder-decoder"):
        return outcome(kind, "", why)
    weights = sum(p.numel() for p in counted.matrices.values())
    try:
        found, missed = _prune(model_type, model, counted)
    except Exception as error:
        return outcome(kind, "fails", _line(error), weights=weights)
    partly = any(not reason.startswith(BY_RULE) for reason in missed.values())
    verdict = "partly" if partly else "supported"
    reason = "; ".join(filter(None, (why, *_patterns(missed))))
    return outcome(kind, verdict, reason, blocks=len(found.blocks), weights=weights)


def _line(error: Exception) -> str:
    """Return an error as one short line that names no temporary folder."""
    text = " ".join(str(error).split())
    text = re.sub(re.escape(tempfile.gettempdir()) + r"[^\s':]*", "OUT", text)
    if not isinstance(error, (CoverageError, neuroal.NeuroalError)):
        text = f"{type(error).__name__}: {text}"
    return textwrap.shorten(text, 200, placeholder=" ...")


def _patterns(missed: Mapping[str, str]) -> Iterator[str]:
    """Yield what stays dense and why, each name once with its numbers left out."""
    by_reason: dict[str, dict[str, None]] = {}
    for name, reason in missed.items():
        pattern = ".".join("*" if x.isdigit() else x for x in name.split("."))
        by_reason.setdefault(reason, {})[pattern] = None
    for reason, patterns in by_reason.items():
        yield f"dense: {', '.join(patterns)} ({reason})"
