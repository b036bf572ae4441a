"""Writes a finished model: weights, tokenizer, training.json and the model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if not loop.last %}\n{% endif %}{% endfor %}"
)
"""What it says to messages: it goes on with them as with any text, so that clients that know
nothing but chats can ask it. It was trained on no conversations."""


def export_model(
    folder: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    report: dict[str, Any],
) -> None:
    """Writes a folder that `from_pretrained` loads.

    Args:
        folder: existing folder; files of these names are replaced.
        model: saved as bf16 safetensors.
        tokenizer: saved beside it.
        report: written to training.json and told in README.md.
    """
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(model_card(model, report), encoding="utf-8")


def model_card(model: LlamaForCausalLM, report: dict[str, Any]) -> str:
    """README.md of a trained model, in Markdown."""
    config = model.config
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "license: mit",
        "tags: [speculative-decoding, testing]",
        "---",
        "",
        "# inferlab/tiny",
        "",
        "A very small language model of Python source code: the target that the examples, tests "
        "and benchmarks of LLM Inference Lab run on, without a download or a GPU. Its draft is "
        "`inferlab/tiny-draft`.",
        "",
        "**For trying, testing and benchmarking only.** It writes text that looks like Python; the "
        "code rarely makes sense and must not be relied on.",
        "",
        "| | |",
        "|---|---|",
        f"| shape | Llama, {config.num_hidden_layers} layer(s), hidden {config.hidden_size}, "
        f"intermediate {config.intermediate_size}, {config.num_attention_heads} heads of "
        f"{config.head_dim}, {config.num_key_value_heads} KV head(s), tied embeddings |",
        f"| parameters | {report['parameters']:,} (bf16) |",
        f"| vocabulary | {config.vocab_size:,}: byte-level BPE; `<|endoftext|>` is begin, end and "
        "padding token; encoding adds no token |",
        "| messages | it goes on with their texts, a line each; it was trained on no chats |",
        f"| context | {config.max_position_embeddings:,} tokens |",
        f"| training | {report['steps']:,} steps, {report['tokens'] / 1e6:.1f} M tokens, "
        f"{report['minutes']:.0f} minutes on {report['threads']} CPU threads |",
        f"| held-out perplexity | {report['heldout_perplexity']:.2f} per token |",
    ]
    lines += [
        "",
        "## How it was made",
        "",
        "```",
        "inferlab train target --output tiny",
        "```",
        "",
        "Next-token prediction on the training files; Muon for matrices, AdamW for embeddings and "
        "norms; windows of 256 tokens, at the end 1,024.",
        "",
        f"The corpus is the source code of Python's standard library ({report['python']}), read in "
        "place from the interpreter that runs the training. Held out are "
        f"{report['heldout_files']} of its files, chosen by a hash of their paths "
        "(`inferlab.training.material.corpus.heldout_files()`); perplexity is measured on "
        "those.",
        "",
        "The standard library is under the Python Software Foundation License. Its sources are "
        "read for training and are not part of this package; the weights are under this "
        "project's licence.",
        "",
    ]
    return "\n".join(lines)
