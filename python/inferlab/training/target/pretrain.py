"""Trains the bundled target: next-token prediction on the corpus."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from inferlab.training.material.corpus import Corpus, training_texts
from inferlab.training.material.windows import WindowSampler, encode_documents
from inferlab.training.target.architectures import causal_bias, use_training_attention
from inferlab.training.target.loop import LoopConfig, LoopResult, train_loop
from inferlab.training.target.optim import MasterOptimizer

TOKENS_PER_STEP = 4096
TEST_SHARE = 3
HELDOUT_LENGTH = 512


def corpus_sampler(
    corpus: Corpus, tokenizer: PreTrainedTokenizerFast, *, seed: int
) -> WindowSampler:
    """Windows of the corpus's training files."""

    def epoch_documents(epoch: int) -> list[np.ndarray]:
        return encode_documents(
            list(training_texts(corpus, epoch, test_share=TEST_SHARE)), tokenizer
        )

    return WindowSampler(epoch_documents, seed=seed)


def heldout_windows(
    corpus: Corpus, tokenizer: PreTrainedTokenizerFast, *, length: int = HELDOUT_LENGTH
) -> Tensor:
    """Every held-out token once, in windows: int64 `[windows, length + 1]`."""
    documents = encode_documents([corpus.read(path) for path in corpus.heldout_files()], tokenizer)
    stream = torch.cat([torch.from_numpy(document) for document in documents]).long()
    length = min(length, stream.numel() - 1)
    return stream.unfold(0, length + 1, length).contiguous()


@torch.no_grad()
def heldout_loss(model: LlamaForCausalLM, windows: Tensor) -> float:
    """Mean next-token loss in nats over windows `[N, length + 1]`."""
    total = 0.0
    for rows in windows.split(8):
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits.float()
        total += float(
            F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum")
        )
    return total / (windows.shape[0] * (windows.shape[1] - 1))


def next_token_loss(model: LlamaForCausalLM, windows: Tensor) -> Tensor:
    """Mean cross-entropy over windows `[B, T + 1]`, in nats per token."""
    positions = torch.arange(windows.shape[1] - 1, device=windows.device)[None]
    logits = model(
        input_ids=windows[:, :-1], position_ids=positions, use_cache=False
    ).logits.float()
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def compiled(
    loss: Callable[..., Tensor], lengths: Iterable[int], *, use_compiler: bool
) -> Callable[..., Tensor]:
    """Compiles a loss, once for each of these window lengths when it first occurs."""
    for length in lengths:
        causal_bias(length)
    return torch.compile(loss, dynamic=False) if use_compiler else loss


def pretrain(
    model: LlamaForCausalLM,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerFast,
    config: LoopConfig,
    *,
    seed: int,
    checkpoint: Path | None = None,
    resume: bool = False,
    use_compiler: bool = True,
    tokens_per_step: int = TOKENS_PER_STEP,
    stop_after: int | None = None,
) -> LoopResult:
    """Trains `model` (bf16 or fp32) in place."""
    use_training_attention(model)
    model.train()
    sampler = corpus_sampler(corpus, tokenizer, seed=seed)
    watch = heldout_windows(corpus, tokenizer)
    watch = watch[:: max(1, math.ceil(len(watch) / 32))]
    loss_of = compiled(
        next_token_loss, [length for _, length in config.phases], use_compiler=use_compiler
    )

    def compute_loss(tokens_before: int, length: int) -> tuple[Tensor, int]:
        count = max(1, tokens_per_step // length)
        windows = sampler.batch(tokens_before, num_windows=count, length=length)
        return loss_of(model, windows), count * length

    return train_loop(
        config,
        MasterOptimizer(model),
        compute_loss,
        evaluate=lambda: heldout_loss(model, watch),
        checkpoint=checkpoint,
        resume=resume,
        title="target",
        stop_after=stop_after,
    )
