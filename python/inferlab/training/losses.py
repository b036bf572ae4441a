"""What drafts and heads are taught: to give the target's next-token distribution.

`tokens` is int64 `[B, T + 1]` and `features` `[B, T, F]` what the target's layers said about all
but the last of them; its last hidden state is the feature's last H columns, and its LM head makes
the teacher's logits of it when they are needed. Every loss comes back per position of the draft,
fp32 `[positions]`, in nats, unweighted; `POSITION_DECAY ** i` is the weight of position i.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from inferlab.models.draft_heads import EagleHead, MedusaHeads

from .architectures import causal_bias
from .unroll import unroll

POSITION_DECAY = 0.8
# Weights of EAGLE-1's two losses (github SafeAILab/EAGLE, eagle/train/main.py: v_w, p_w).
FEATURE_WEIGHT = 1.0
TOKEN_WEIGHT = 0.1
# Uniform noise on EAGLE-1's features while training, so that it bears its own errors later (ibid.).
FEATURE_NOISE = 0.2 * 512


def agreement_loss(logits: Tensor, teacher: Tensor, argmax_weight: float) -> Tensor:
    """`(1 - w) * KL(teacher, student) + w * CE(argmax of the teacher, student)`, mean over rows.

    Args:
        logits: of the student, `[rows, V]`.
        teacher: logits of the target, `[rows, V]`.
        argmax_weight: w.
    """
    log_q = F.log_softmax(logits.float(), dim=-1)
    log_p = F.log_softmax(teacher.float(), dim=-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    first_choice = F.nll_loss(log_q, teacher.argmax(-1))
    return (1.0 - argmax_weight) * divergence + argmax_weight * first_choice


def draft_loss(
    draft: LlamaForCausalLM, tokens: Tensor, features: Tensor, lm_head: Tensor, argmax_weight: float
) -> Tensor:
    """A draft model's: the distribution behind each token."""
    teacher = features @ lm_head.T
    positions = torch.arange(features.shape[1], device=tokens.device)[None]
    logits = draft(input_ids=tokens[:, :-1], position_ids=positions, use_cache=False).logits
    return agreement_loss(logits.flatten(0, 1), teacher.flatten(0, 1), argmax_weight)[None]


def medusa_loss(
    heads: MedusaHeads, tokens: Tensor, features: Tensor, lm_head: Tensor, argmax_weight: float
) -> Tensor:
    """Head i at position t: what the target says behind token t + 1 + i."""
    teacher = features @ lm_head.T
    losses = []
    for index, states in enumerate(heads.hidden(features).unbind(-2)):
        rows = features.shape[1] - 1 - index
        logits = heads.read(states[:, :rows].flatten(0, 1), index)
        losses.append(agreement_loss(logits, teacher[:, 1 + index :].flatten(0, 1), argmax_weight))
    return torch.stack(losses)


def eagle3_loss(
    head: EagleHead,
    tokens: Tensor,
    features: Tensor,
    lm_head: Tensor,
    argmax_weight: float,
    steps: int,
) -> Tensor:
    """Training-time test: the head runs `steps` levels deep on its own outputs.

    Level i at position t guesses what the target says behind token t + 1 + i. With a reduced draft
    vocabulary the teacher speaks those tokens only.
    """
    teacher = features[..., -lm_head.shape[1] :] @ lm_head.T
    if head.draft_to_target is not None:
        teacher = teacher[..., head.draft_to_target]
    bias = causal_bias(features.shape[1]).to(features.device)
    outputs = unroll(head, tokens, features[..., : head.feature_size], bias, steps)
    losses = []
    for index, hidden in enumerate(outputs):
        rows = features.shape[1] - 1 - index
        logits = head.draft_logits(hidden[:, :rows].flatten(0, 1))
        losses.append(agreement_loss(logits, teacher[:, 1 + index :].flatten(0, 1), argmax_weight))
    return torch.stack(losses)


def eagle1_loss(head: EagleHead, tokens: Tensor, features: Tensor, lm_head: Tensor) -> Tensor:
    """Smooth L1 to the next feature and cross-entropy to its token distribution, weighted."""
    noise = torch.rand_like(features) - 0.5
    noisy = features + noise * (FEATURE_NOISE / features.shape[1])
    bias = causal_bias(features.shape[1]).to(features.device)
    hidden = next(unroll(head, tokens, noisy, bias, 1))[:, :-1]
    regression = F.smooth_l1_loss(hidden.float(), features[:, 1:].float())
    log_q = F.log_softmax((hidden @ lm_head.T).float(), dim=-1)
    target = torch.softmax((features[:, 1:] @ lm_head.T).float(), dim=-1)
    cross_entropy = -(target * log_q).sum(-1).mean()
    return (FEATURE_WEIGHT * regression + TOKEN_WEIGHT * cross_entropy)[None]
