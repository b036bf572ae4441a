"""`inferlab train target|draft|medusa|eagle`: trains the bundled models, or others' drafts."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from inferlab.cli.flags import add_log_arguments
from inferlab.models import HFModel
from inferlab.training.heads import students
from inferlab.training.heads.card import student_report, write_report
from inferlab.training.heads.students import Student
from inferlab.training.heads.teach import RunConfig, require_accelerate, teach
from inferlab.training.heads.teacher import load_target, within_context
from inferlab.training.heads.trainer import last_checkpoint
from inferlab.training.material.sources import open_source
from inferlab.training.material.writing import MaterialConfig
from inferlab.training.target.architectures import TARGET_SHAPE
from inferlab.training.target.loop import LoopConfig
from inferlab.training.target.run import TargetConfig, train_target

# What the bundled target was trained with: under an hour of two busy CPU cores.
TARGET_LOOP = LoopConfig(steps=1403)
HELDOUT_PROMPTS = 20
# The bundled target's width learns best at this rate; a wider one needs a smaller one (Yang et
# al., "Tensor programs V", 2022).
BASE_LR = 3e-3
BASE_WIDTH = 160
NO_PART_OF_A_RUN = ("resume", "cache", "threads", "log_level", "verbose")
"""Flags that say where and how, and change nothing of what is trained."""
STEPS = {"draft": 2000, "medusa": 1500, "eagle": 1500}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``inferlab train``."""
    kinds = parser.add_subparsers(
        dest="train_kind", required=True, metavar="{target,draft,medusa,eagle}"
    )
    target = kinds.add_parser("target", help="train the bundled target from scratch")
    _add_common(target, steps=TARGET_LOOP.steps, lr=TARGET_LOOP.lr)
    _add_students(kinds)


def _add_students(kinds: Any) -> None:
    """Adds the three subcommands."""
    helps = {
        "draft": "distil a small draft model from a target",
        "medusa": "train Medusa heads on a target",
        "eagle": "train an EAGLE head on a target",
    }
    for kind, text in helps.items():
        parser = kinds.add_parser(kind, help=text)
        parser.add_argument(
            "--base-model",
            required=True,
            metavar="MODEL",
            help="target to serve: a folder, a hub id or inferlab/tiny",
        )
        parser.add_argument(
            "--data",
            default="corpus",
            metavar="FILE",
            help="a .txt file, or a .jsonl file with text, prompt, messages or turns in each line; "
            "the target continues it (default: corpus, the texts of --corpus)",
        )
        parser.add_argument(
            "--init-from", metavar="MODEL", help="weights to start from (default: fresh ones)"
        )
        _add_common(parser, steps=STEPS[kind], lr=None)
        _add_sizes(parser)
        if kind == "medusa":
            parser.add_argument(
                "--heads",
                type=int,
                help=f"default: {students.MEDUSA_HEADS}, or as --init-from has",
            )
            parser.add_argument(
                "--layers",
                type=int,
                help=f"residual blocks per head (default: {students.MEDUSA_LAYERS}, or as "
                "--init-from has)",
            )
            parser.add_argument(
                "--tied", action="store_true", help="share the target's LM head, own none"
            )
            parser.add_argument(
                "--root-token",
                action="store_true",
                help="heads also read the newest token, which the published ones do not",
            )
        if kind == "eagle":
            parser.add_argument(
                "--version",
                type=int,
                choices=(1, 3),
                help="EAGLE-1 (which EAGLE-2 uses, too) or EAGLE-3 (default: 3, or as --init-from "
                "has)",
            )
            parser.add_argument(
                "--features",
                type=int,
                nargs=3,
                metavar="LAYER",
                help="EAGLE-3: layers whose output is read, from 0; -1 is what the LM head sees "
                "(default: those of the published code, or as --init-from has)",
            )
            parser.add_argument(
                "--depth",
                type=int,
                default=students.EAGLE_STEPS,
                help="EAGLE-3: levels unrolled while training (default: %(default)s)",
            )


def _add_common(parser: argparse.ArgumentParser, *, steps: int, lr: float | None) -> None:
    """Adds what `train target` and the students share."""
    add_log_arguments(parser)
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the result")
    parser.add_argument(
        "--corpus",
        metavar="DIR",
        help="folder of texts, .py, .txt, .md or .rst (default: the standard library of this "
        "interpreter)",
    )
    parser.add_argument("--steps", type=int, default=steps, help="updates (default: %(default)s)")
    parser.add_argument(
        "--minutes", type=float, help="time budget; ends before --steps when it is used up"
    )
    parser.add_argument(
        "--lr",
        type=float,
        default=lr,
        help="peak learning rate (default: %(default)s)"
        if lr is not None
        else f"peak learning rate (default: {BASE_LR} at hidden size {BASE_WIDTH}, less for wider)",
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--resume", action="store_true", help="continue from the last checkpoint in --output"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument(
        "--no-compile",
        action="store_true",
        help="do without torch.compile, which needs a C++ compiler; slower",
    )


def _add_sizes(parser: argparse.ArgumentParser) -> None:
    material = MaterialConfig()
    parser.add_argument(
        "--windows",
        type=int,
        default=material.generated_windows,
        help="sequences the target writes (default: %(default)s)",
    )
    parser.add_argument(
        "--text-windows",
        type=int,
        help="sequences of the training texts themselves (default: half of --windows)",
    )
    parser.add_argument(
        "--long-windows",
        type=int,
        help="the same, four times as long (default: a twelfth of --text-windows)",
    )
    parser.add_argument(
        "--window",
        type=int,
        default=material.window_length,
        metavar="TOKENS",
        help="length of a sequence (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-tokens", type=int, default=4096, help="tokens of a batch (default: %(default)s)"
    )
    parser.add_argument(
        "--accumulate", type=int, default=1, help="batches per update (default: %(default)s)"
    )
    parser.add_argument(
        "--cache",
        metavar="DIR",
        help="folder for the target's text and hidden states, which runs with the same target and "
        "data may share (default: cache in --output)",
    )
    parser.add_argument(
        "--no-cache",
        action="store_true",
        help="compute the target's hidden states in every step instead of keeping them on disk",
    )
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda, mps (default: %(default)s)"
    )
    parser.add_argument(
        "--eval-prompts",
        type=int,
        default=HELDOUT_PROMPTS,
        metavar="N",
        help="held-out prompts that acceptance is measured on (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Runs ``inferlab train``; returns the exit code."""
    try:
        if args.threads is not None:
            if args.threads < 1:
                raise ValueError(f"--threads is {args.threads}, expected at least 1")
            torch.set_num_threads(args.threads)
        if args.train_kind != "target":
            return _run_student(args)
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


def _run_student(args: argparse.Namespace) -> int:
    """Trains a student; errors are the caller's to print."""
    require_accelerate()
    if args.eval_prompts < 1:
        raise ValueError(f"--eval-prompts is {args.eval_prompts}, expected at least 1")
    config = _run_config(args)
    if config.resume:
        last_checkpoint(config.output)  # before minutes are spent on anything else
    target = load_target(args.base_model, args.device)
    config = replace(config, material=within_context(config.material, target))
    if args.lr is None:
        width = target.config.hidden_size
        config = replace(config, lr=BASE_LR * min(1.0, BASE_WIDTH / width))
    source = open_source(args.data, args.corpus, target.tokenizer, args.eval_prompts)
    torch.manual_seed(config.seed)
    student = make_student(args, target)
    taught = teach(config, student, target, source)
    student.save(config.output)
    report = student_report(
        args.train_kind, _command(args), config, student, target, source, taught
    )
    write_report(config.output, report)
    for entry in report["acceptance"]:
        print(
            f"temperature {entry['temperature']}: {entry['chain']:.2f} tokens per target forward "
            f"in chains of {len(entry['by_position'])}, {entry['tree']:.2f} in a tree of "
            f"{entry['nodes']}"
        )
    print(config.output)
    return 0


def _command(args: argparse.Namespace) -> list[str]:
    """The command, without flags that are as by default and those that say where and how."""
    parser = argparse.ArgumentParser()
    kinds = parser.add_subparsers(dest="train_kind")
    _add_students(kinds)
    words = ["inferlab", "train", args.train_kind]
    needed = ["--base-model", args.base_model, "--output", Path(args.output).name]
    plain = vars(parser.parse_args([args.train_kind, *needed]))
    words += needed
    for name, value in vars(args).items():
        if name in (*NO_PART_OF_A_RUN, "output", "base_model") or name not in plain:
            continue
        if value != plain[name]:
            words.append("--" + name.replace("_", "-"))
            if value is not True:
                words += map(str, value if isinstance(value, list) else [value])
    return words


def _run_config(args: argparse.Namespace) -> RunConfig:
    output = Path(args.output)
    defaults = MaterialConfig()
    texts = args.windows // 2 if args.text_windows is None else args.text_windows
    long_texts = texts // 12 if args.long_windows is None else args.long_windows
    for flag, value in (("--text-windows", texts), ("--long-windows", long_texts)):
        if value < 0:
            raise ValueError(f"{flag} is {value}, expected at least 0")
    return RunConfig(
        output=output,
        cache=output / "cache" if args.cache is None else Path(args.cache),
        steps=args.steps,
        minutes=args.minutes,
        lr=BASE_LR if args.lr is None else args.lr,
        tokens_per_batch=args.batch_tokens,
        accumulate=args.accumulate,
        seed=args.seed,
        keep_features=not args.no_cache,
        resume=args.resume,
        compile=not args.no_compile,
        material=replace(
            defaults,
            generated_windows=args.windows,
            corpus_windows=texts,
            long_windows=long_texts,
            window_length=args.window,
            long_length=4 * args.window,
            min_prompt=max(1, args.window // 16),
            max_prompt=max(1, args.window // 2),
        ),
    )


def make_student(args: argparse.Namespace, target: HFModel) -> Student:
    """The student that the flags describe."""
    if args.train_kind == "medusa":
        for flag, value in (("--heads", args.heads), ("--layers", args.layers)):
            if value is not None and value < 1:
                raise ValueError(f"{flag} is {value}, expected at least 1")
        return students.medusa_student(
            target,
            init_from=args.init_from,
            num_heads=args.heads,
            num_layers=args.layers,
            tied=args.tied,
            root_token=args.root_token,
        )
    if args.train_kind == "eagle":
        if args.depth < 1:
            raise ValueError(f"--depth is {args.depth}, expected at least 1")
        return students.eagle_student(
            target,
            init_from=args.init_from,
            version=args.version,
            feature_layers=None if args.features is None else tuple(args.features),
            steps=args.depth,
        )
    draft = students.new_draft(target, args.init_from, seed=args.seed)
    return students.draft_student(draft, target.tokenizer)
