"""A corpus, a tokenizer and models so small that a whole training takes seconds."""

from __future__ import annotations

from pathlib import Path

from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from inferlab.training.material.corpus import Corpus
from inferlab.training.target.architectures import model_config, new_model
from inferlab.training.target.tokenizer import train_tokenizer

VOCAB = 300
MICRO = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}


def write_micro_corpus(root: Path) -> Corpus:
    """60 modules of 80 short functions each."""
    for index in range(60):
        lines = [f"def f{index}_{line}(x):\n    return x + {line * index}\n" for line in range(80)]
        (root / f"module_{index}.py").write_text("".join(lines), encoding="utf-8")
    return Corpus.of(root)


def micro_tokenizer(corpus: Corpus, extra: str = "") -> PreTrainedTokenizerFast:
    """A tokenizer of 300 tokens for it."""
    texts = [corpus.read(path) for path in corpus.paths]
    return train_tokenizer([*texts, extra], vocab_size=VOCAB, max_length=64)


def micro_model(seed: int = 0, **changes: int) -> LlamaForCausalLM:
    """A fresh Llama; `changes` are of its shape."""
    config = model_config({**MICRO, **changes}, vocab_size=VOCAB, max_positions=256)
    return new_model(config, seed=seed)
