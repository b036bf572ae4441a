"""Trains a target of some size and a draft for it, from nothing, on this machine's CPU.

    python benchmarks/trained_pair.py OUTPUT [--shape llama-100m] [--minutes 60] [--corpus DIR]
        [--threads N]

Writes OUTPUT/target and OUTPUT/draft, models as others are, for measurements that want weights
that have learnt something and are larger than the bundled ones. The corpus is the standard library
of this interpreter, or the texts of a folder (.py, .txt, .md, .rst).

An hour of two cores is a few hundred updates. So a target learns its embeddings and a quarter of
its layers first, as a model of its own; then each of these layers is followed by copies of itself
that add nothing yet (their last projections are zero: Chen et al., "Net2Net", 2016; Shen et al.,
"Staged training", 2022) and all of it learns on. The draft learns from the same texts and then, by
`inferlab train draft`, from the target. They are good for measuring, not for programming.
"""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerFast

from inferlab.cli import main as inferlab
from inferlab.training.material.corpus import Corpus
from inferlab.training.precision import training_dtype
from inferlab.training.target.architectures import model_config, new_model
from inferlab.training.target.loop import LoopConfig
from inferlab.training.target.pretrain import heldout_loss, heldout_windows, pretrain
from inferlab.training.target.tokenizer import corpus_tokenizer


class Shape(NamedTuple):
    family: str
    vocab_size: int
    target: dict[str, int]
    draft: dict[str, int]
    lr: float


SHAPES = {
    "llama-100m": Shape(
        "llama", 8192,
        {"hidden_size": 640, "intermediate_size": 1792, "num_hidden_layers": 22,
         "num_attention_heads": 10, "num_key_value_heads": 2, "head_dim": 64},
        {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 4,
         "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64},
        2e-3,
    ),
    "qwen3-24m": Shape(
        "qwen3", 4096,
        {"hidden_size": 448, "intermediate_size": 1216, "num_hidden_layers": 10,
         "num_attention_heads": 7, "num_key_value_heads": 1, "head_dim": 64},
        {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 2,
         "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 64},
        3e-3,
    ),
}  # fmt: skip
# Of the minutes: the first layers of the target, all of it, the draft alone, the draft's lessons.
SHARES = (0.45, 0.2, 0.15, 0.2)
GROWTH = 4  # a target ends with so many times the layers that it begins with
LAST_PROJECTIONS = ("o_proj.weight", "down_proj.weight")


def make(family: str, sizes: dict[str, int], vocab_size: int) -> Any:
    """A fresh model, in the dtype to train in."""
    config = model_config(sizes, vocab_size=vocab_size, family=family)
    return new_model(config, seed=0).to(training_dtype(torch.device("cpu")))


def grow(model: Any, grown: Any) -> None:
    """Makes `grown`, of more layers, say what `model` says."""
    have, wanted = model.config.num_hidden_layers, grown.config.num_hidden_layers
    weights = model.state_dict()
    source = [layer * have // wanted for layer in range(wanted)]
    state = {}
    for name, fresh in grown.state_dict().items():
        found = re.fullmatch(r"(model\.layers\.)(\d+)(\..*)", name)
        if found is None:
            state[name] = weights[name]
            continue
        before, layer, after = found[1], int(found[2]), found[3]
        copied = layer and source[layer] == source[layer - 1]
        is_last = copied and after.endswith(LAST_PROJECTIONS)
        state[name] = (
            torch.zeros_like(fresh) if is_last else weights[f"{before}{source[layer]}{after}"]
        )
    grown.load_state_dict(state)


def learn(
    model: Any,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerFast,
    minutes: float,
    lr: float,
    *,
    warmup: float = 0.02,
) -> None:
    """Next-token prediction on the corpus for so long."""
    loop = LoopConfig(
        steps=10**6, minutes=minutes, lr=lr, warmup=warmup, phases=((0.0, 256),), eval_every=50
    )
    result = pretrain(model, corpus, tokenizer, loop, seed=0)
    size = f"{model.num_parameters():,} parameters"
    print(f"{size}: {result.steps} steps, {result.tokens / 1e6:.2f} M tokens", flush=True)


def save(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.set_attn_implementation("sdpa")
    model.eval().to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="llama-100m")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    shape, corpus = SHAPES[args.shape], Corpus.of(args.corpus)
    tokenizer = corpus_tokenizer(corpus, shape.vocab_size)
    first, whole, alone, lessons = (share * args.minutes for share in SHARES)

    layers = -(-shape.target["num_hidden_layers"] // GROWTH)
    small = make(shape.family, {**shape.target, "num_hidden_layers": layers}, shape.vocab_size)
    learn(small, corpus, tokenizer, first, shape.lr)
    target = make(shape.family, shape.target, shape.vocab_size)
    grow(small, target)
    learn(target, corpus, tokenizer, whole, shape.lr / 4, warmup=0.2)
    loss = heldout_loss(target, heldout_windows(corpus, tokenizer)[:32])
    print(f"target: held-out perplexity {math.exp(loss):.2f}", flush=True)
    save(target, tokenizer, args.output / "target")

    draft = make("llama", shape.draft, shape.vocab_size)
    learn(draft, corpus, tokenizer, alone, 2 * shape.lr)
    save(draft, tokenizer, args.output / "first-draft")
    lesson: dict[str, Any] = {
        "--base-model": args.output / "target",
        "--init-from": args.output / "first-draft",
        "--output": args.output / "draft",
        "--minutes": lessons,
        "--lr": shape.lr / 2,
        "--windows": 256,
        "--text-windows": 128,
        "--long-windows": 0,
    }
    if args.corpus:
        lesson["--corpus"] = args.corpus
    words = [str(word) for flag in lesson.items() for word in flag]
    raise SystemExit(inferlab(["train", "draft", *words]))


if __name__ == "__main__":
    main()
