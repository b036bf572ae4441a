"""The trainer of drafts and draft heads: Hugging Face's, with our loss, optimizer and reports."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from inferlab.training.target.optim import MasterOptimizer, learning_rate

COMPLETE = "trainer_state.json"  # written last of a checkpoint's files


class BoundOptimizer(torch.optim.Optimizer):
    """`MasterOptimizer` as torch's interface wants it."""

    def __init__(self, model: nn.Module, lr: float, vocab_size: int) -> None:
        self.master = MasterOptimizer(model, vocab_size=vocab_size)
        super().__init__([p for p in model.parameters() if p.requires_grad], {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.master.step(self.param_groups[0]["lr"])

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "master": self.master.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = dict(state_dict)
        self.master.load_state_dict(state.pop("master"))
        super().load_state_dict(state)


class Clock(TrainerCallback):
    """How far a run is, by steps or by minutes, whichever is further on; ends it in time."""

    def __init__(self, steps: int, minutes: float | None) -> None:
        self.steps = steps
        self.minutes = minutes
        self._before = 0.0
        self._started = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Minutes trained, earlier parts of a resumed run included."""
        return self._before + (time.monotonic() - self._started) / 60.0

    def progress(self, step: int) -> float:
        """Share of the run that is over, in [0, 1]."""
        share = step / self.steps
        if self.minutes is not None:
            share = max(share, self.elapsed / self.minutes)
        return min(share, 1.0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._before = next((e["minutes"] for e in state.log_history[::-1] if "minutes" in e), 0.0)
        self._started = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.progress(state.global_step) >= 1.0:
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kw: Any) -> None:
        state.log_history[-1]["minutes"] = round(self.elapsed, 3)


class DraftTrainer(Trainer):
    """Trains a student on windows of tokens and features of the target.

    Args:
        student: draft or heads.
        loss: from the student, tokens and features to the loss of each position.
        weights: of the positions.
        clock: schedule of the learning rate.
        vocab_size: matrices of so many rows are tables of tokens, which have another optimizer.
    """

    def __init__(
        self,
        student: nn.Module,
        arguments: TrainingArguments,
        *,
        loss: Callable[..., Tensor],
        weights: Tensor,
        clock: Clock,
        vocab_size: int,
        **options: Any,
    ) -> None:
        self._loss = loss
        self._weights = weights
        self._clock = clock
        optimizer = BoundOptimizer(student, arguments.learning_rate, vocab_size)
        # Its own step is used, not the scheduler's, which a resumed run would count from zero.
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: learning_rate(clock.progress(step), peak=1.0, warmup=0.02, cooldown=0.45),
        )
        super().__init__(
            model=student,
            args=arguments,
            data_collator=lambda batches: batches[0],
            optimizers=(optimizer, schedule),
            callbacks=[clock],
            **options,
        )
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        losses = self._loss(model, inputs["tokens"], inputs.get("features"))
        weights = self._weights.to(losses.device)
        return (losses * weights).sum() / weights.sum()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes a checkpoint whole or not at all; the one before is intact either way.

        Raises:
            OSError: the disk is full, say.
        """
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:
            # safetensors and torch's zip writer hide the OSError.
            if not (folder / COMPLETE).is_file():
                shutil.rmtree(folder, ignore_errors=True)
            raise OSError(
                f"{folder}: checkpoint not written ({error}); the one before it is intact: free "
                "some space and go on with --resume"
            ) from error


def last_checkpoint(output: Path) -> Path:
    """The newest whole checkpoint.

    Raises:
        ValueError: there is none.
    """
    found = [path.parent for path in output.glob(f"checkpoint-*/{COMPLETE}")]
    if not found:
        raise ValueError(
            f"--resume: no checkpoint in {output}; check --output, or start anew without --resume"
        )
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]))
