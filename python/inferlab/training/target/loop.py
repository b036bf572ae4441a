"""The training loop that all trainers share: schedule, step, report, checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from inferlab.training.target.checkpoint import load_checkpoint, save_checkpoint
from inferlab.training.target.optim import MasterOptimizer, learning_rate


@dataclass(frozen=True)
class LoopConfig:
    """When to stop, how fast to learn, what to report.

    Attributes:
        steps: updates in all.
        minutes: time budget; the schedule then follows whichever of steps and time is further
            on, so that a run cut short by it still cools down. None: steps alone.
        lr: peak learning rate.
        warmup: share of the training spent warming up.
        cooldown: share of the training spent cooling down.
        phases: `(progress, window length in tokens)`, each length in force from that share on.
        eval_every: steps between held-out evaluations.
        checkpoint_every: steps between checkpoints.
    """

    steps: int
    minutes: float | None = None
    lr: float = 5e-3
    warmup: float = 0.02
    cooldown: float = 0.45
    phases: tuple[tuple[float, int], ...] = ((0.0, 256), (0.85, 1024))
    eval_every: int = 250
    checkpoint_every: int = 250

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"--steps is {self.steps}, expected at least 1")
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"--minutes is {self.minutes}, expected more than 0")
        if not self.lr > 0:
            raise ValueError(f"--lr is {self.lr}, expected more than 0")

    def window_length(self, progress: float) -> int:
        """Length in tokens of the training windows at this share of the training."""
        return [length for start, length in self.phases if progress >= start][-1]


@dataclass(frozen=True)
class LoopResult:
    """What a finished loop did; `seconds` includes earlier, resumed parts."""

    steps: int
    tokens: int
    seconds: float
    losses: tuple[float, ...]


def train_loop(
    config: LoopConfig,
    optimizer: MasterOptimizer,
    compute_loss: Callable[[int, int], tuple[Tensor, int]],
    *,
    evaluate: Callable[[], float] | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
    title: str = "training",
    stop_after: int | None = None,
) -> LoopResult:
    """Trains until the steps or the minutes are used up.

    Args:
        config: schedule and reporting.
        optimizer: holds the weights.
        compute_loss: from tokens consumed so far and window length to the loss and the number
            of tokens in it; must depend on these two and the weights only.
        evaluate: held-out loss in nats per token, shown while training.
        checkpoint: file to write progress to; None writes none.
        resume: continue from `checkpoint`.
        title: shown by the progress bar.
        stop_after: end after that many further steps as if interrupted, for tests.
    """
    step, tokens, seconds_before = 0, 0, 0.0
    losses: list[float] = []
    if resume:
        if checkpoint is None:
            raise ValueError("--resume needs a checkpoint; name its folder with --output")
        state = load_checkpoint(checkpoint)
        optimizer.load_state_dict(state["optimizer"])
        step, tokens, seconds_before = state["step"], state["tokens"], state["seconds"]
        losses = list(state["losses"])
        torch.set_rng_state(state["rng"])
    started = time.monotonic()
    first_step, first_tokens = step, tokens
    heldout = ""

    def elapsed() -> float:
        return seconds_before + time.monotonic() - started

    def save() -> None:
        if checkpoint is not None:
            save_checkpoint(
                checkpoint,
                {
                    "optimizer": optimizer.state_dict(),
                    "step": step,
                    "tokens": tokens,
                    "seconds": elapsed(),
                    "losses": losses,
                    "rng": torch.get_rng_state(),
                },
            )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[status]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as bar:
        task = bar.add_task(title, total=1.0, status="")
        while True:
            progress = step / config.steps
            if config.minutes is not None:
                progress = max(progress, elapsed() / (60.0 * config.minutes))
            if progress >= 1.0 or (stop_after is not None and step - first_step >= stop_after):
                break
            loss, num_tokens = compute_loss(tokens, config.window_length(progress))
            loss.backward()
            optimizer.step(
                learning_rate(
                    progress, peak=config.lr, warmup=config.warmup, cooldown=config.cooldown
                )
            )
            step, tokens = step + 1, tokens + num_tokens
            losses.append(float(loss.detach()))
            if evaluate is not None and step % config.eval_every == 0:
                heldout = f" held-out {evaluate():.3f}"
            if step % config.checkpoint_every == 0:
                save()
            rate = (tokens - first_tokens) / (time.monotonic() - started)
            recent = sum(losses[-20:]) / len(losses[-20:])
            status = f"step {step} loss {recent:.3f}{heldout} {rate:,.0f} tokens/s"
            bar.update(task, completed=progress, status=status)
            if not bar.console.is_terminal and (step == 1 or step % 50 == 0):
                bar.console.print(f"{title}: {status}", soft_wrap=True)
        bar.update(task, completed=1.0)
    save()
    return LoopResult(step, tokens, elapsed(), tuple(losses))
