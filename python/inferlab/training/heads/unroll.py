"""Runs an EAGLE head several levels deep from every position of a text at once.

Level 0 reads the target's features; level i reads what level i - 1 put out, and token t + 1 + i,
as a draft does that begins behind token t + 1 and is right all along. A row of level i attends to
what such a draft has in its cache: level 0 at positions up to t, and levels 1 .. i at t alone
(EAGLE-3's training-time test; github SafeAILab/EAGLE, eagle/traineagle3/cnets.py). So one pass
gives what all drafts of a text would say.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from inferlab.models.draft_heads import EagleHead


def unroll(
    head: EagleHead, tokens: Tensor, features: Tensor, bias: Tensor, steps: int
) -> Iterator[Tensor]:
    """Yields each level's output.

    Args:
        tokens: int64 `[B, T + 1]`.
        features: of all but the last token, `[B, T, feature_size]`.
        bias: fp32 `[T, T]`, 0 where a row may see a column, else -inf.
        steps: levels.

    Yields:
        `[B, T, H]`; row t of level i belongs to token t + 2 + i. The last i rows have run out of
        tokens and mean nothing.
    """
    attention = head.layer.self_attn
    batch, length = features.shape[:2]
    group = head.num_heads // head.num_kv_heads
    positions = torch.arange(length, device=tokens.device)[None]
    embeds = head.embed(tokens[:, 1:]).to(features.dtype)
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for level in range(steps):
        if level:
            embeds = torch.cat([embeds[:, 1:], embeds[:, -1:]], dim=1)
        x, residual = head.enter(embeds, features)
        query, key, value = attention.qkv(x, head.rotary(x, positions + level))
        keys.append(key)
        values.append(value)
        # [B, KV, G, T, D]; the heads of a group share their keys.
        query = query.unflatten(1, (head.num_kv_heads, group)) * head.head_dim**-0.5
        rows = query.flatten(2, 3)
        scores = (rows @ keys[0].mT).unflatten(2, (group, length)).float() + bias
        own = [(query * key[:, :, None]).sum(-1, keepdim=True).float() for key in keys[1:]]
        weights = torch.softmax(torch.cat([scores, *own], dim=-1), dim=-1).to(query.dtype)
        mixed = (weights[..., :length].flatten(2, 3) @ values[0]).unflatten(2, (group, length))
        for index, value in enumerate(values[1:]):
            mixed = mixed + weights[..., length + index, None] * value[:, :, None]
        attended = attention.o_proj(mixed.flatten(1, 2).transpose(1, 2).reshape(batch, length, -1))
        features = head.layer.finish(residual, attended)
        yield features
