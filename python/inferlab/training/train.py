"""`inferlab train target|draft|medusa|eagle`: trains the bundled models, or others' drafts."""

from __future__ import annotations

import argparse
import math
import platform
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from . import train_student
from .architectures import MAX_POSITIONS, TARGET_SHAPE, VOCAB_SIZE, llama_config, new_llama
from .checkpoint import require_checkpoint
from .corpus import is_test_file, load_corpus
from .export import export_model
from .loop import LoopConfig
from .pretrain import heldout_loss, heldout_windows, pretrain
from .tokenizer import train_tokenizer

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
    corpus = load_corpus(config.corpus)
    library = [p for p in corpus.train_files() if not is_test_file(p)]
    tokenizer = train_tokenizer(
        (text for path in library if (text := corpus.read(path))),
        vocab_size=config.vocab_size,
        max_length=MAX_POSITIONS,
    )
    model = new_llama(
        llama_config(config.shape, vocab_size=config.vocab_size), seed=config.seed
    ).bfloat16()
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `inferlab train` to `parser`."""
    kinds = parser.add_subparsers(
        dest="train_kind", required=True, metavar="{target,draft,medusa,eagle}"
    )
    target = kinds.add_parser("target", help="train the bundled target from scratch")
    train_student.add_common(target, steps=TARGET_LOOP.steps, lr=TARGET_LOOP.lr)
    train_student.add_arguments(kinds)


def run(args: argparse.Namespace) -> int:
    """Runs what `add_arguments` parsed; returns the exit status."""
    try:
        if args.threads is not None:
            if args.threads < 1:
                raise ValueError(f"--threads is {args.threads}, expected at least 1")
            torch.set_num_threads(args.threads)
        if args.train_kind != "target":
            return train_student.run(args)
        config = TargetConfig(
            output=Path(args.output),
            loop=replace(TARGET_LOOP, steps=args.steps, minutes=args.minutes, lr=args.lr),
            shape=TARGET_SHAPE,
            corpus=None if args.corpus is None else Path(args.corpus),
            seed=args.seed,
            resume=args.resume,
            compile=not args.no_compile,
        )
        report = train_target(config)
    except (ValueError, OSError, SafetensorError) as error:
        print(f"inferlab train {args.train_kind}: {error}", file=sys.stderr)
        return 2
    print(f"{config.output}: held-out perplexity {report['heldout_perplexity']:.2f}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """`python -m inferlab.training.train`."""
    parser = argparse.ArgumentParser(prog="inferlab train", description=__doc__)
    add_arguments(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
