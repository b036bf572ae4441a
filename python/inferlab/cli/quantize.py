"""`inferlab quantize`: a model with packed weights, as a directory that every command loads."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from inferlab.cli.flags import add_log_arguments, add_safety_arguments
from inferlab.cli.parser import EXIT_OK
from inferlab.cli.terminal import progress, setup_logging, show_line
from inferlab.errors import UsageError
from inferlab.models import loading
from inferlab.models.packed_checkpoint import PackedConfig, save_packed
from inferlab.models.quantized import FORMATS, count_weights, quantize
from inferlab.prompts import read_prompts

PIECE = 512
"""Tokens of a text that a forward sees at most."""
TOKENS = 8192


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``inferlab quantize``."""
    parser.add_argument("model", metavar="MODEL", help="directory, bundled name or hub id")
    parser.add_argument("--format", required=True, choices=tuple(FORMATS), help="of the weights")
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="a new directory, or an empty one"
    )
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        help="text (or prompts, FILE.jsonl) on which roundings make up for each other's errors; "
        "without it each weight is rounded to nearest",
    )
    parser.add_argument(
        "--calibration-tokens", type=int, metavar="N", help=f"take so many of it ({TOKENS})"
    )
    parser.add_argument(
        "--dtype", default="auto", help="of what is not packed, as for specdec (auto)"
    )
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    add_safety_arguments(parser)
    add_log_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Runs ``inferlab quantize``; returns the exit code."""
    folder = Path(args.output).resolve()
    _check(args, folder)
    setup_logging(args.log_level or "INFO", args.verbose)
    texts = [] if args.calibration is None else _texts(Path(args.calibration))
    try:
        loaded = loading.load(
            args.model,
            device="cpu",
            dtype=args.dtype,
            max_memory_mb=args.max_memory_mb,
            trust_remote_code=args.trust_remote_code,
            allow_pickle=args.allow_pickle,
            dense=True,
        )
        model = loaded.model
        if PackedConfig.of(model.config) is not None:
            raise ValueError(f"{args.model} is packed already; name the model that it was made of")
        ids = _pieces(loaded, texts, args.calibration_tokens or TOKENS)
        if texts and not any(ids):
            raise UsageError(f"--calibration: {args.calibration} has no tokens")
        before, tied = _bytes(model), bool(model.config.tie_word_embeddings)
        count = count_weights(model)
        with progress(count, "packing", not args.no_progress) as advance:
            quantize(model, args.format, ids, advance)
    except UsageError:
        raise
    except (ValueError, OSError) as error:
        raise UsageError(f"MODEL: {error}") from error
    try:
        save_packed(model, loaded.tokenizer, folder, tied=tied)
    except OSError as error:
        raise UsageError(f"--output: {folder}: {error.strerror or error}") from error
    how = f"on {sum(map(len, ids))} tokens" if ids else "to nearest"
    sizes = f"{before / 2**20:.1f} MB, now {_bytes(model) / 2**20:.1f} MB"
    show_line([args.output, f"{count} weights rounded to {args.format} {how}", sizes])
    return EXIT_OK


def _check(args: argparse.Namespace, folder: Path) -> None:
    if args.calibration is None and args.calibration_tokens is not None:
        raise UsageError("--calibration-tokens: is of --calibration; give that too")
    if args.calibration_tokens is not None and args.calibration_tokens < 1:
        raise UsageError(
            f"--calibration-tokens: {args.calibration_tokens} is not allowed; must be at least 1"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"--output: {folder} is there already; name a new or an empty directory")
    above = next(parent for parent in folder.parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        why = "permission denied" if above.is_dir() else f"{above} is a file"
        raise UsageError(f"--output: {folder} cannot be written: {why}")


def _texts(file: Path) -> list[str]:
    """A text file's whole, or the prompts of a FILE.jsonl."""
    if file.suffix == ".jsonl":
        return [prompt.text for prompt in read_prompts(file)]
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UsageError(f"--calibration: {file} cannot be read: {why}") from None
    if not text.strip():
        raise UsageError(f"--calibration: {file} has no text")
    return [text]


def _pieces(loaded: Any, texts: Sequence[str], limit: int) -> list[list[int]]:
    """Token ids in pieces that the model's context holds, ``limit`` in all."""
    context = getattr(loaded.model.config, "max_position_embeddings", None) or PIECE
    length = min(PIECE, context)
    pieces: list[list[int]] = []
    for text in texts:
        ids = loaded.tokenizer.encode(text)[:limit]
        limit -= len(ids)
        pieces += [ids[start : start + length] for start in range(0, len(ids), length)]
    return pieces


def _bytes(model: Any) -> int:
    """Of all its weights."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
