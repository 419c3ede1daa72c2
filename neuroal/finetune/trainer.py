"""The Trainer of transformers, with a loss of its own and checkpoints of what is trained alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from neuroal.finetune.settings import FineTuning
from neuroal.model.files import load_tensors
from neuroal.model.pretrained import quiet
from neuroal.types import Tick

_TRAINED, _STATE = "trained.safetensors", "trainer_state.json"
_WARM_UP, _LOGGED = 20, 100  # a part of the steps; how many losses are kept at most


def loss_of(model: Any, ids: Tensor, teacher: Any = None) -> Tensor:
    """Return the loss of a batch of windows, 0-d.

    It is the model's own mean cross-entropy of next tokens; with a teacher, the mean over all
    tokens of KL(teacher ‖ model) between their predictions (Hinton et al. 2015, arXiv:1503.02531,
    at temperature 1; alone, as in Muralidharan et al. 2024, arXiv:2407.14679).

    Args:
        model: A causal language model.
        ids: int64 `(windows, tokens)`.
        teacher: Another one of the same vocabulary, or None.
    """
    if teacher is None:
        loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
        return loss
    with torch.no_grad():
        wanted = teacher(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
    given = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
    return functional.kl_div(given, wanted, reduction="sum", log_target=True) / ids.numel()


class _Trainer(Trainer):
    """Trains some parameters by `loss_of`, and keeps just these in its checkpoints."""

    teacher: nn.Module | None = None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        loss = loss_of(model, inputs["input_ids"], self.teacher)
        return (loss, {}) if return_outputs else loss

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(str(output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_file({n: p.contiguous() for n, p in self._trained().items()}, folder / _TRAINED)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        own = self._trained()
        for name, values in load_tensors(Path(resume_from_checkpoint) / _TRAINED).items():
            own[name].copy_(values)

    def _trained(self) -> dict[str, Tensor]:
        model: Any = self.model
        return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


class _Watch(TrainerCallback):
    """Moves a progress bar on."""

    def __init__(self, tick: Callable[[int, int], Tick]) -> None:
        self._open = tick
        self._tick: Tick = int

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._tick = self._open(state.max_steps, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._tick()


def train(
    model: nn.Module,
    ids: Tensor,
    settings: FineTuning,
    folder: Path,
    *,
    teacher: nn.Module | None = None,
    save_every: int,
    tick: Callable[[int, int], Tick],
) -> list[tuple[int, float]]:
    """Train the parameters of a model that require gradients, going on from a checkpoint.

    Args:
        model: On its device.
        ids: Windows, int64 `(windows, tokens)`, at least a batch.
        settings: What was asked for.
        folder: Has the checkpoints.
        teacher: The dense model, where it is learnt from.
        save_every: Steps between checkpoints.
        tick: Opens a progress bar of so many steps, of which so many are done.

    Returns:
        The losses that were logged: `(step, mean loss since the one before)`.
    """
    on = next(model.parameters()).device
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch,
        learning_rate=settings.rate,
        weight_decay=settings.weight_decay,
        lr_scheduler_type="cosine",
        warmup_steps=settings.steps // _WARM_UP,
        optim="adamw_torch",
        bf16=on.type == "cuda" and torch.cuda.is_bf16_supported(),
        use_cpu=on.type == "cpu",
        seed=settings.seed,
        data_seed=settings.seed,
        logging_steps=max(1, settings.steps // _LOGGED),
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=save_every,
        save_total_limit=2,
        dataloader_drop_last=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # no copies of the model on other devices
    rows: Any = [{"input_ids": row} for row in ids]
    with quiet():
        trainer = _Trainer(model, arguments, train_dataset=rows, callbacks=[_Watch(tick)])
        trainer.remove_callback(PrinterCallback)
        trainer.teacher = teacher
        there = last_checkpoint(folder)
        trainer.train(resume_from_checkpoint=None if there is None else str(there))
    return [(int(x["step"]), float(x["loss"])) for x in trainer.state.log_history if "loss" in x]


def last_checkpoint(folder: Path) -> Path | None:
    """Return the last whole checkpoint in a folder: one whose state, written last, can be read."""
    steps = {}
    for found in folder.glob("checkpoint-*"):
        number = re.fullmatch(r"checkpoint-(\d+)", found.name)
        if number is not None and _readable(found / _STATE):
            steps[int(number[1])] = found
    return steps[max(steps)] if steps else None


def _readable(file: Path) -> bool:
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
