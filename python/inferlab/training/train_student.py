"""`inferlab train draft|medusa|eagle`: flags, the target, the student, the finished folder."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from inferlab.models import loading

from . import students
from .architectures import DRAFT_SHAPE, llama_config, new_llama
from .corpus import load_corpus
from .material import MaterialConfig
from .report import student_report, write_report
from .sources import Source, corpus_source, file_source
from .students import Student
from .teach import RunConfig, require_accelerate, teach
from .trainer import last_checkpoint

HELDOUT_PROMPTS = 20
# The bundled target's width learns best at this rate; a wider one needs a smaller one (Yang et
# al., "Tensor programs V", 2022).
BASE_LR = 3e-3
BASE_WIDTH = 160
STEPS = {"draft": 2000, "medusa": 1500, "eagle": 1500}


def add_arguments(kinds: Any) -> None:
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
            "the target continues it (default: corpus, the .py files of --corpus)",
        )
        parser.add_argument(
            "--init-from", metavar="MODEL", help="weights to start from (default: fresh ones)"
        )
        add_common(parser, steps=STEPS[kind], lr=None)
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


def add_common(parser: argparse.ArgumentParser, *, steps: int, lr: float | None) -> None:
    """Adds what `train target` and the students share."""
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the result")
    parser.add_argument(
        "--corpus",
        metavar="DIR",
        help="folder of .py files (default: the standard library of this interpreter)",
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
    """Trains a student; errors are the caller's to print."""
    require_accelerate()
    if args.eval_prompts < 1:
        raise ValueError(f"--eval-prompts is {args.eval_prompts}, expected at least 1")
    config = _run_config(args)
    if config.resume:
        last_checkpoint(config.output)  # before minutes are spent on anything else
    target, tokenizer = load_target(args.base_model, args.device)
    config = replace(config, material=_within_context(config.material, target))
    if args.lr is None:
        width = target.get_output_embeddings().weight.shape[1]
        config = replace(config, lr=BASE_LR * min(1.0, BASE_WIDTH / width))
    source = load_source(args.data, args.corpus, tokenizer, args.eval_prompts)
    torch.manual_seed(config.seed)
    student = make_student(args, target, tokenizer)
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
    add_arguments(kinds)
    words = ["inferlab", "train", args.train_kind]
    needed = ["--base-model", args.base_model, "--output", Path(args.output).name]
    plain = vars(parser.parse_args([args.train_kind, *needed]))
    words += needed
    for name, value in vars(args).items():
        if name in ("output", "base_model", "resume", "cache", "threads") or name not in plain:
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


def _within_context(material: MaterialConfig, target: Any) -> MaterialConfig:
    """The same windows, long ones no longer than the target can read."""
    context = target.config.get_text_config(decoder=True).max_position_embeddings
    if material.window_length > context:
        raise ValueError(
            f"--window is {material.window_length}, the target reads at most {context} tokens"
        )
    return replace(material, long_length=min(material.long_length, context))


def load_target(name: str, device: str) -> tuple[Any, PreTrainedTokenizerFast]:
    """The target in bf16 and its tokenizer.

    Raises:
        ValueError: it cannot be loaded, its tokenizer has tokens that the model lacks, or the
            device is a CUDA device but the first.
    """
    if device.startswith("cuda:") and device != "cuda:0":
        raise ValueError(
            f"--device is {device!r}; the trainer uses the first GPU that it sees: give --device "
            f"cuda, and choose the GPU with CUDA_VISIBLE_DEVICES={device.removeprefix('cuda:')}"
        )
    try:
        loaded = loading.load(name, device=device, dtype="bfloat16")
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"--base-model {name}: {error}") from error
    target = loaded.model.eval().requires_grad_(False)
    known = target.get_output_embeddings().weight.shape[0]
    if len(loaded.tokenizer) > known:
        raise ValueError(
            f"--base-model {name}: its tokenizer has {len(loaded.tokenizer)} tokens, the model "
            f"{known}; put the model's own tokenizer beside its weights"
        )
    return target, loaded.tokenizer


def load_source(
    data: str, corpus: str | None, tokenizer: PreTrainedTokenizerFast, heldout_prompts: int
) -> Source:
    """What `--data` and `--corpus` name."""
    if data == "corpus":
        folder = None if corpus is None else Path(corpus)
        return corpus_source(load_corpus(folder), tokenizer, heldout_prompts=heldout_prompts)
    if corpus is not None:
        raise ValueError(f"--corpus {corpus}: not with --data {data}; leave one of them out")
    return file_source(Path(data), tokenizer, heldout_prompts=heldout_prompts)


def make_student(
    args: argparse.Namespace, target: Any, tokenizer: PreTrainedTokenizerFast
) -> Student:
    """The student that the flags describe."""
    common = (target, tokenizer, args.base_model)
    if args.train_kind == "medusa":
        for flag, value in (("--heads", args.heads), ("--layers", args.layers)):
            if value is not None and value < 1:
                raise ValueError(f"{flag} is {value}, expected at least 1")
        return students.medusa_student(
            *common,
            init_from=args.init_from,
            num_heads=args.heads,
            num_layers=args.layers,
            tied=args.tied,
            root_token=args.root_token,
        )
    if args.train_kind == "eagle":
        if args.depth < 1:
            raise ValueError(f"--depth is {args.depth}, expected at least 1")
        if args.features is not None:
            _check_layers(args, target)
        return students.eagle_student(
            *common,
            init_from=args.init_from,
            version=args.version,
            feature_layers=None if args.features is None else tuple(args.features),
            steps=args.depth,
        )
    draft = _new_draft(args, target, tokenizer)

    def save(folder: Path) -> None:
        draft.set_attn_implementation("sdpa")
        draft.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return students.draft_student(draft, tokenizer, args.base_model, save=save)


def _check_layers(args: argparse.Namespace, target: Any) -> None:
    count = target.config.get_text_config(decoder=True).num_hidden_layers
    wrong = [layer for layer in args.features if not -1 <= layer < count]
    if wrong:
        raise ValueError(f"--features: {wrong[0]} is no layer of 0 to {count - 1}, nor -1")


def _new_draft(
    args: argparse.Namespace, target: Any, tokenizer: PreTrainedTokenizerFast
) -> LlamaForCausalLM:
    if args.init_from is None:
        llama = llama_config(
            DRAFT_SHAPE, vocab_size=target.config.vocab_size, eos_id=tokenizer.eos_token_id
        )
        return new_llama(llama, seed=args.seed).to(target.device)
    try:
        loaded = loading.load(args.init_from, dtype="bfloat16", device=str(target.device))
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"--init-from {args.init_from}: {error}") from error
    if loaded.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"--init-from {args.init_from}: its tokenizer differs from that of --base-model "
            f"{args.base_model}, so their token ids mean different text; leave --init-from out or "
            "name a model with the same tokenizer"
        )
    return loaded.model
