"""Tiny random-weight models of every supported family, and a small generated tokenizer."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCAB = 160
CONTEXT = 128
# Shorter than the contexts of the tests, so that sequences cross the edge of the window.
WINDOW = 7

_COMMON = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
_ROTARY = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": False,
    **_COMMON,
}
_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]

FAMILIES: tuple[str, ...] = (
    "opt",
    "gpt2",
    "gpt_neox",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "phi3",
    "gemma2",
    "gemma3",
)
MIXTURES: tuple[str, ...] = ("mixtral", "qwen2_moe", "qwen3_moe")
"""Families of experts."""


def tiny_config(family: str) -> PreTrainedConfig:
    """A fresh config of `family`, small in every dimension, with its peculiarities on."""
    if family == "opt":
        return OPTConfig(
            vocab_size=VOCAB,
            hidden_size=64,
            ffn_dim=96,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=CONTEXT,
            word_embed_proj_dim=64,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
    if family == "gpt2":
        return GPT2Config(
            vocab_size=VOCAB, n_embd=64, n_layer=3, n_head=2, n_positions=CONTEXT, **_COMMON
        )
    if family == "gpt_neox":
        return GPTNeoXConfig(
            vocab_size=VOCAB,
            hidden_size=128,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=CONTEXT,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.25,
            },
            **_COMMON,
        )
    if family == "llama":
        return LlamaConfig(**_ROTARY, head_dim=32)
    if family == "mistral":
        return MistralConfig(**_ROTARY, head_dim=32, sliding_window=WINDOW)
    if family == "qwen2":
        return Qwen2Config(
            **{**_ROTARY, "num_attention_heads": 2, "num_key_value_heads": 1},
            use_sliding_window=True,
            sliding_window=WINDOW,
            max_window_layers=1,
        )
    if family == "qwen3":
        return Qwen3Config(**_ROTARY, head_dim=32)
    if family == "phi3":
        return Phi3Config(
            **{**_ROTARY, "num_attention_heads": 2, "num_key_value_heads": 1},
            sliding_window=WINDOW,
        )
    if family == "gemma2":
        return Gemma2Config(
            **_ROTARY,
            head_dim=32,
            sliding_window=WINDOW,
            layer_types=_SLIDING,
            query_pre_attn_scalar=24,
            attn_logit_softcapping=1.5,
            final_logit_softcapping=2.0,
        )
    if family == "gemma3":
        return Gemma3TextConfig(
            **_ROTARY,
            head_dim=32,
            sliding_window=WINDOW,
            layer_types=_SLIDING,
            query_pre_attn_scalar=24,
        )
    if family == "mixtral":
        return MixtralConfig(**_ROTARY, head_dim=16, num_local_experts=5, num_experts_per_tok=2)
    if family == "qwen2_moe":
        return Qwen2MoeConfig(
            **_ROTARY,
            moe_intermediate_size=44,
            shared_expert_intermediate_size=48,
            num_experts=6,
            num_experts_per_tok=3,
        )
    if family == "qwen3_moe":
        return Qwen3MoeConfig(
            **_ROTARY,
            head_dim=16,
            moe_intermediate_size=40,
            num_experts=9,
            num_experts_per_tok=4,
            norm_topk_prob=True,
            mlp_only_layers=[1],
        )
    raise ValueError(f"family is {family!r}, must be one of {(*FAMILIES, *MIXTURES)}")


def tiny_model(
    family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, attention: str = "eager"
) -> PreTrainedModel:
    """A random model of `family`; weights are spread widely so that logits are far from ties."""
    return random_model(tiny_config(family), seed=seed, dtype=dtype, attention=attention)


def random_model(
    config: PreTrainedConfig,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    attention: str = "eager",
) -> PreTrainedModel:
    """A model with every weight drawn from `seed`, biases and norms included."""
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.1 * noise.to(dtype))
            else:
                parameter.copy_((noise * 1.5 * parameter.shape[-1] ** -0.5).to(dtype))
    return model.eval()


def saved_model(config: PreTrainedConfig, folder: Path, *, seed: int = 0) -> str:
    """A random model with the tiny tokenizer as a directory; its path."""
    random_model(config, seed=seed).save_pretrained(folder)
    tiny_tokenizer(config.vocab_size).save_pretrained(folder)
    return str(folder)


@cache
def tiny_tokenizer(vocab_size: int = VOCAB) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on a few sentences; ids 0 and 1 are ``<s>`` and ``</s>``.

    Below 258 ids it knows printable ASCII only, as bytes alone would fill it.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < 258:
        alphabet = [c for c in alphabet if c.isascii()] + ["Ġ", "Ċ"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


_SENTENCES = [
    "the quick brown fox jumps over the lazy dog while the draft model guesses the next token",
    "speculative decoding verifies the guesses of a small model with one pass of a large model",
    "def forward(self, tokens, positions): return self.model(tokens, positions)",
    "the cache keeps keys and values in pages, and the tree of tokens shares one prefix",
]
