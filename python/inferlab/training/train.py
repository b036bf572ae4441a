"""`inferlab train target|draft`: trains the bundled pair, or a draft for another target."""

from __future__ import annotations

import argparse
import math
import platform
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from .acceptance import measure_acceptance
from .architectures import (
    DRAFT_SHAPE,
    MAX_POSITIONS,
    TARGET_SHAPE,
    VOCAB_SIZE,
    llama_config,
    new_llama,
)
from .checkpoint import require_checkpoint
from .corpus import Corpus, cut_prompts, is_test_file, load_corpus
from .distill import DistillConfig, distill
from .export import export_model
from .loop import LoopConfig, LoopResult
from .pretrain import heldout_loss, heldout_windows, pretrain
from .tokenizer import same_vocabulary, train_tokenizer

CHECKPOINT_NAME = "checkpoint.pt"

# What the bundled pair was trained with: under an hour of two busy CPU cores. More steps make
# better models.
TARGET_LOOP = LoopConfig(steps=1403)
DRAFT_LOOP = LoopConfig(steps=1978, phases=((0.0, 256),))


@dataclass(frozen=True)
class TrainConfig:
    """A run of `inferlab train`.

    Attributes:
        kind: "target" or "draft".
        output: folder for the checkpoint and the finished model.
        loop: schedule.
        base_model: folder or name of the draft's target; drafts only.
        init_from: folder or name of a draft whose weights to start from; drafts only.
        corpus: folder of `.py` files; None for the interpreter's standard library.
        material: teaching material; drafts only.
        shape: of the model, as keyword arguments of `LlamaConfig`.
        vocab_size: of the tokenizer that is trained; targets only.
        seed: of weights, windows and generated text.
        resume: continue from the checkpoint in `output`.
        compile: compile the loss with torch.compile.
        eval_prompts: held-out prompts to measure the accepted length on; drafts only.
    """

    kind: str
    output: Path
    loop: LoopConfig
    shape: dict[str, Any]
    base_model: str | None = None
    init_from: str | None = None
    corpus: Path | None = None
    material: DistillConfig = field(default_factory=DistillConfig)
    vocab_size: int = VOCAB_SIZE
    seed: int = 0
    resume: bool = False
    compile: bool = True
    eval_prompts: int = 20

    def __post_init__(self) -> None:
        if self.kind == "draft" and self.eval_prompts < 1:
            raise ValueError(f"--eval-prompts is {self.eval_prompts}, expected at least 1")
        if self.resume:
            require_checkpoint(self.checkpoint)

    @property
    def checkpoint(self) -> Path:
        """File that progress is written to."""
        return self.output / CHECKPOINT_NAME


def train_target(config: TrainConfig) -> dict[str, Any]:
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
    report = _report(config, model, corpus, tokenizer, result)
    export_model(config.output, model, tokenizer, report)
    return report


def train_draft(config: TrainConfig) -> dict[str, Any]:
    """Distils a draft from `base_model`, writes it, returns the report.

    Raises:
        ValueError: the base model is missing, the tokenizers differ, the corpus is too small, or
            there is nothing to resume.
        OSError: the output could not be written.
    """
    if not config.base_model:
        raise ValueError("--base-model is missing; name the target that the draft shall serve")
    corpus = load_corpus(config.corpus)
    target = _load_model(config.base_model, "--base-model")
    tokenizer = _load_tokenizer(config.base_model, "--base-model")
    if config.resume and (config.output / "tokenizer.json").is_file():
        _check_tokenizer(str(config.output), "--output", tokenizer, config.base_model)
    if config.init_from:
        _check_tokenizer(config.init_from, "--init-from", tokenizer, config.base_model)
        draft = _load_model(config.init_from, "--init-from")
    else:
        llama = llama_config(
            config.shape,
            vocab_size=target.config.vocab_size,
            eos_id=tokenizer.eos_token_id,
        )
        draft = new_llama(llama, seed=config.seed).bfloat16()
    config.output.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(config.output)
    result = distill(
        draft,
        target,
        corpus,
        tokenizer,
        config.loop,
        config.material,
        seed=config.seed,
        checkpoint=config.checkpoint,
        resume=config.resume,
        use_compiler=config.compile,
    )
    report = _report(config, draft, corpus, tokenizer, result)
    target.set_attn_implementation("sdpa")
    prompts = cut_prompts(corpus, config.eval_prompts, max_chars=240)
    report["acceptance"] = [
        measure_acceptance(
            target.float(), draft.float(), tokenizer, prompts, temperature=temperature
        ).as_dict()
        for temperature in (0.0, 0.8)
    ]
    export_model(config.output, draft.bfloat16(), tokenizer, report)
    return report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `inferlab train` to `parser`."""
    kinds = parser.add_subparsers(dest="train_kind", required=True, metavar="{target,draft}")
    target = kinds.add_parser("target", help="train the bundled target from scratch")
    _add_common(target, TARGET_LOOP)
    draft = kinds.add_parser("draft", help="distil a small draft from a target")
    draft.add_argument(
        "--base-model",
        required=True,
        metavar="MODEL",
        help="target that the draft shall serve: a folder, a hub id or inferlab/tiny",
    )
    draft.add_argument(
        "--init-from", metavar="MODEL", help="draft to start from (default: random weights)"
    )
    _add_common(draft, DRAFT_LOOP)
    draft.add_argument(
        "--eval-prompts",
        type=int,
        default=20,
        metavar="N",
        help="held-out prompts for the accepted length (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Runs what `add_arguments` parsed; returns the exit status."""
    try:
        if args.threads is not None:
            if args.threads < 1:
                raise ValueError(f"--threads is {args.threads}, expected at least 1")
            torch.set_num_threads(args.threads)
        defaults = TARGET_LOOP if args.train_kind == "target" else DRAFT_LOOP
        config = TrainConfig(
            kind=args.train_kind,
            output=Path(args.output),
            loop=replace(defaults, steps=args.steps, minutes=args.minutes, lr=args.lr),
            shape=TARGET_SHAPE if args.train_kind == "target" else DRAFT_SHAPE,
            base_model=getattr(args, "base_model", None),
            init_from=getattr(args, "init_from", None),
            corpus=None if args.corpus is None else Path(args.corpus),
            seed=args.seed,
            resume=args.resume,
            compile=not args.no_compile,
            eval_prompts=getattr(args, "eval_prompts", 0),
        )
        report = train_target(config) if config.kind == "target" else train_draft(config)
    except (ValueError, OSError) as error:
        print(f"inferlab train {args.train_kind}: {error}", file=sys.stderr)
        return 2
    print(f"{config.output}: held-out perplexity {report['heldout_perplexity']:.2f}")
    for entry in report.get("acceptance", []):
        print(
            f"temperature {entry['temperature']}: {entry['mean_accepted_length']:.2f} tokens per "
            f"target forward at K = {entry['chain_length']}"
        )
    return 0


def _add_common(parser: argparse.ArgumentParser, defaults: LoopConfig) -> None:
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the model")
    parser.add_argument(
        "--corpus",
        metavar="DIR",
        help="folder of .py files (default: the standard library of this interpreter)",
    )
    parser.add_argument(
        "--steps", type=int, default=defaults.steps, help="updates (default: %(default)s)"
    )
    parser.add_argument(
        "--minutes", type=float, help="time budget; ends before --steps when it is used up"
    )
    parser.add_argument(
        "--lr", type=float, default=defaults.lr, help="peak learning rate (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--resume", action="store_true", help="continue from the checkpoint in --output"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument(
        "--no-compile",
        action="store_true",
        help="do without torch.compile, which needs a C++ compiler; slower",
    )


def _bundled(name: str) -> str:
    """The folder of a bundled model such as `inferlab/tiny`; other names as they are."""
    folder = Path(__file__).resolve().parents[1] / "assets" / name.removeprefix("inferlab/")
    return str(folder) if name.startswith("inferlab/") and folder.is_dir() else name


def _load_model(name: str, flag: str) -> LlamaForCausalLM:
    name = _bundled(name)
    if name.startswith(("/", "./", "../", "~")) and not Path(name).is_dir():
        raise ValueError(f"{flag} {name}: no such folder; name one that holds a trained model")
    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{flag} {name}: no causal language model could be loaded from there ({error}); name a "
            "folder that holds config.json and model.safetensors"
        ) from error


def _load_tokenizer(name: str, flag: str) -> PreTrainedTokenizerFast:
    name = _bundled(name)
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{flag} {name}: no tokenizer could be loaded from there ({error}); put the model's "
            "tokenizer.json and tokenizer_config.json beside its weights"
        ) from error


def _check_tokenizer(
    name: str, flag: str, tokenizer: PreTrainedTokenizerFast, base_model: str
) -> None:
    if not same_vocabulary(_load_tokenizer(name, flag), tokenizer):
        raise ValueError(
            f"{flag} {name}: its tokenizer differs from that of --base-model {base_model}, so "
            f"their token ids mean different text; leave {flag} out or name a model with the same "
            "tokenizer"
            if flag != "--output"
            else f"{flag} {name}: it holds a tokenizer that differs from that of --base-model "
            f"{base_model}; name another folder, or the base model that this draft was begun with"
        )


def _report(
    config: TrainConfig,
    model: LlamaForCausalLM,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerFast,
    result: LoopResult,
) -> dict[str, Any]:
    """What is written to training.json, but for the acceptance."""
    model.set_attn_implementation("sdpa")
    model.eval()
    loss = heldout_loss(model, heldout_windows(corpus, tokenizer))
    return {
        "kind": config.kind,
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


def main(argv: list[str] | None = None) -> int:
    """`python -m inferlab.training.train`."""
    parser = argparse.ArgumentParser(prog="inferlab train", description=__doc__)
    add_arguments(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
