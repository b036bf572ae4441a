"""One run that makes a target: tokenizer, weights, report, finished folder."""

from __future__ import annotations

import math
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from inferlab.training.material.corpus import Corpus
from inferlab.training.precision import training_dtype
from inferlab.training.target.architectures import (
    VOCAB_SIZE,
    model_config,
    new_model,
)
from inferlab.training.target.checkpoint import require_checkpoint
from inferlab.training.target.export import export_model
from inferlab.training.target.loop import LoopConfig
from inferlab.training.target.pretrain import heldout_loss, heldout_windows, pretrain
from inferlab.training.target.tokenizer import corpus_tokenizer

CHECKPOINT_NAME = "checkpoint.pt"

# What the bundled target was trained with: under an hour of two busy CPU cores.
TARGET_LOOP = LoopConfig(steps=1403)


@dataclass(frozen=True)
class TargetConfig:
    """A run of `inferlab train target`.

    Attributes:
        output: folder for the checkpoint and the finished model.
        loop: schedule.
        shape: of the model, as keyword arguments of `LlamaConfig`.
        corpus: folder of `.py` files; None for the interpreter's standard library.
        vocab_size: of the tokenizer that is trained.
        seed: of weights and windows.
        resume: continue from the checkpoint in `output`.
        compile: compile the loss with torch.compile.
    """

    output: Path
    loop: LoopConfig
    shape: dict[str, Any]
    corpus: Path | None = None
    vocab_size: int = VOCAB_SIZE
    seed: int = 0
    resume: bool = False
    compile: bool = True

    def __post_init__(self) -> None:
        if self.resume:
            require_checkpoint(self.checkpoint)

    @property
    def checkpoint(self) -> Path:
        """File that progress is written to."""
        return self.output / CHECKPOINT_NAME


def train_target(config: TargetConfig) -> dict[str, Any]:
    """Trains a tokenizer and a target from scratch, writes them, returns the report.

    Raises:
        ValueError: the corpus is empty or too small, or there is nothing to resume.
        OSError: the output could not be written.
    """
    corpus = Corpus.of(config.corpus)
    tokenizer = corpus_tokenizer(corpus, config.vocab_size)
    model = new_model(
        model_config(config.shape, vocab_size=config.vocab_size), seed=config.seed
    ).to(training_dtype(torch.device("cpu")))
    config.output.mkdir(parents=True, exist_ok=True)
    result = pretrain(
        model,
        corpus,
        tokenizer,
        config.loop,
        seed=config.seed,
        checkpoint=config.checkpoint,
        resume=config.resume,
        use_compiler=config.compile,
    )
    model.set_attn_implementation("sdpa")
    model.eval()
    loss = heldout_loss(model, heldout_windows(corpus, tokenizer))
    report = {
        "kind": "target",
        "parameters": model.num_parameters(),
        "steps": result.steps,
        "tokens": result.tokens,
        "minutes": round(result.seconds / 60.0, 1),
        "final_training_loss": sum(result.losses[-50:]) / len(result.losses[-50:]),
        "heldout_loss": loss,
        "heldout_perplexity": math.exp(loss),
        "learning_rate": config.loop.lr,
        "seed": config.seed,
        "corpus": "standard library" if config.corpus is None else "other",
        "train_files": len(corpus.train_files()),
        "heldout_files": len(corpus.heldout_files()),
        "python": platform.python_version(),
        "torch": torch.__version__.split("+")[0],
        "threads": torch.get_num_threads(),
    }
    export_model(config.output, model, tokenizer, report)
    return report
