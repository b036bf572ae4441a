"""What drafts and heads are taught: to give the target's next-token distribution.

`tokens` is int64 `[B, T + 1]` and `features` `[B, T, F]` what the target's layers said about all
but the last of them; its last hidden state is the feature's last H columns, and its LM head makes
the teacher's logits of it when they are needed. Every loss comes back per position of the draft,
fp32 `[positions]`, in nats, unweighted; `POSITION_DECAY ** i` is the weight of position i.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from inferlab.models.draft_heads import EagleHead, MedusaHeads
from inferlab.training.heads.unroll import unroll
from inferlab.training.target.architectures import causal_bias

POSITION_DECAY = 0.8
# Weights of EAGLE-1's two losses (github SafeAILab/EAGLE, eagle/train/main.py: v_w, p_w).
FEATURE_WEIGHT = 1.0
TOKEN_WEIGHT = 0.1
# Uniform noise on EAGLE-1's features while training, so that it bears its own errors later (ibid.).
FEATURE_NOISE = 0.2 * 512


def targets(teacher: Tensor, argmax_weight: float) -> Tensor:
    """What to agree with: `(1 - w) * softmax(teacher) + w * one-hot of its first choice`.

    Kept in the teacher's dtype, and made once for all positions.
    """
    soft = torch.softmax(teacher.float(), dim=-1)
    first = torch.arange(teacher.shape[-1], device=teacher.device) == teacher.argmax(-1, True)
    return ((1.0 - argmax_weight) * soft + argmax_weight * first).to(teacher.dtype)


def agreement_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy `-sum(target * log_softmax(logits))`, mean over rows.

    Args:
        logits: of the student, `[rows, V]`.
        target: distributions, `[rows, V]`.
    """
    wide = logits.float()
    return (torch.logsumexp(wide, dim=-1) - (target * wide).sum(-1)).mean()


class _LinearAgreement(torch.autograd.Function):
    """`linear_agreement_loss`; the gradients are found on the way forward."""

    CPU_ROWS, ROWS = 128, 2048  # at a time: on a CPU their logits stay in the cache

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        to_states = torch.empty_like(states)
        learns = ctx.needs_input_grad[1]
        to_weight = torch.zeros_like(weight, dtype=torch.float32) if learns else None
        loss = torch.zeros((), device=states.device)
        rows = _LinearAgreement.CPU_ROWS if states.is_cpu else _LinearAgreement.ROWS
        blocks = (x.split(rows) for x in (states, target, to_states))
        for some, wanted, to_some in zip(*blocks, strict=True):
            wide, wanted = (some @ weight.T).float(), wanted.float()
            log_sum = torch.logsumexp(wide, dim=-1, keepdim=True)
            loss += log_sum.sum() - (wanted * wide).sum()
            to_logits = ((wide - log_sum).exp() - wanted).to(weight.dtype)
            torch.mm(to_logits, weight, out=to_some)
            if to_weight is not None:
                to_weight += to_logits.T @ some
        ctx.save_for_backward(to_states, to_weight)
        return loss / len(states)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        to_states, to_weight = ctx.saved_tensors
        scale = grads[0] / len(to_states)
        if to_weight is not None:
            to_weight = (to_weight * scale).to(to_states.dtype)
        return to_states * scale, to_weight, None


def linear_agreement_loss(states: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """`agreement_loss(states @ weight.T, target)`, but the logits are never all in memory.

    Args:
        states: `[rows, H]`.
        weight: `[V, H]`, in the dtype of `states`.
        target: distributions, `[rows, V]`; no gradient goes there.
    """
    loss: Tensor = _LinearAgreement.apply(states, weight, target)
    return loss


def draft_loss(
    draft: LlamaForCausalLM, tokens: Tensor, features: Tensor, lm_head: Tensor, argmax_weight: float
) -> Tensor:
    """A draft model's: the distribution behind each token."""
    target = targets(features @ lm_head.T, argmax_weight)
    positions = torch.arange(features.shape[1], device=tokens.device)[None]
    logits = draft(input_ids=tokens[:, :-1], position_ids=positions, use_cache=False).logits
    return agreement_loss(logits.flatten(0, 1), target.flatten(0, 1))[None]


@torch.compiler.disable  # many deep heads take minutes to compile, and gain nothing here
def medusa_loss(
    heads: MedusaHeads, tokens: Tensor, features: Tensor, lm_head: Tensor, argmax_weight: float
) -> Tensor:
    """Head i at position t: what the target says behind token t + 1 + i."""
    target = targets(features @ lm_head.T, argmax_weight)
    losses = []
    for index, states in enumerate(heads.hidden(features, tokens[:, 1:]).unbind(-2)):
        rows = features.shape[1] - 1 - index
        wanted = target[:, 1 + index :].flatten(0, 1)
        read = states[:, :rows].flatten(0, 1)
        losses.append(linear_agreement_loss(read, heads.lm_head(index), wanted))
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
    target = targets(teacher, argmax_weight)
    bias = causal_bias(features.shape[1]).to(features.device)
    outputs = unroll(head, tokens, features[..., : head.feature_size], bias, steps)
    losses = []
    for index, hidden in enumerate(outputs):
        rows = features.shape[1] - 1 - index
        logits = head.draft_logits(hidden[:, :rows].flatten(0, 1))
        losses.append(agreement_loss(logits, target[:, 1 + index :].flatten(0, 1)))
    return torch.stack(losses)


def eagle1_loss(head: EagleHead, tokens: Tensor, features: Tensor, lm_head: Tensor) -> Tensor:
    """Smooth L1 to the next feature and cross-entropy to its token distribution, weighted."""
    noise = torch.rand_like(features) - 0.5
    noisy = features + noise * (FEATURE_NOISE / features.shape[1])
    bias = causal_bias(features.shape[1]).to(features.device)
    hidden = next(unroll(head, tokens, noisy, bias, 1))[:, :-1]
    regression = F.smooth_l1_loss(hidden.float(), features[:, 1:].float())
    cross_entropy = agreement_loss(hidden @ lm_head.T, targets(features[:, 1:] @ lm_head.T, 0.0))
    return (FEATURE_WEIGHT * regression + TOKEN_WEIGHT * cross_entropy)[None]
