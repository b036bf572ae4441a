"""How probable the target found what was chosen, and what else it found probable."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from inferlab.types import TokenLogprobs


def token_logprobs(
    logits: torch.Tensor, tokens: Sequence[int], most: int, allowed_vocab: int | None
) -> list[TokenLogprobs]:
    """Log-probabilities of tokens by the model's own logits: before temperature, filters, penalties
    and bias.

    Args:
        logits: [K, V], behind which the tokens were chosen.
        tokens: K of them.
        most: the likeliest that are told beside each.
        allowed_vocab: columns from here on are padding; None: there is none.
    """
    scores = torch.log_softmax(logits[:, :allowed_vocab].float(), dim=-1)
    chosen = scores.gather(1, torch.tensor(tokens, device=scores.device)[:, None])[:, 0].tolist()
    if most == 0:
        return [TokenLogprobs(value, []) for value in chosen]
    values, ids = scores.topk(min(most, scores.shape[1]), dim=-1)
    return [
        TokenLogprobs(value, list(zip(of, best, strict=True)))
        for value, of, best in zip(chosen, ids.tolist(), values.tolist(), strict=True)
    ]
