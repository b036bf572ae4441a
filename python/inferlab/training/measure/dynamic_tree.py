"""EAGLE-2's dynamic trees on a text the target wrote: tokens per target forward, measured offline.

Each level goes on from the `width` most confident nodes of the level before; a node's confidence
is the product of the draft's probabilities along its path. Of all nodes seen the `nodes` most
confident ones are proposed (Li et al., "EAGLE-2", 2024). With noise, the probabilities are those
of the perturbed scores, as draft and target choose by those.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from inferlab.models.draft_heads import EagleHead
from inferlab.training.measure.heldout import Text


@dataclass(frozen=True)
class _Nodes:
    """Nodes of one level; `keys` and `values` are those of a node's ancestors and itself.

    Attributes:
        tokens: int64 `[W]`.
        scores: log confidence, `[W]`.
        features: output of the parents, `[W, H]`.
        keys, values: of the ancestors, `[W, KV, depth, D]`.
        on_text: whether the path is what the target wrote, `[W]`.
    """

    tokens: Tensor
    scores: Tensor
    features: Tensor
    keys: Tensor
    values: Tensor
    on_text: Tensor


@torch.no_grad()
def accepted_lengths(
    head: EagleHead, text: Text, *, nodes: int, depth: int, width: int
) -> list[int]:
    """Tokens that each target forward yields, the bonus token included.

    Args:
        nodes: proposed at once, without the root.
        depth: levels.
        width: nodes that a level goes on from, and children of each.
    """
    dtype = head.fc.weight.dtype
    features = text.features[..., : head.feature_size].to(dtype)
    embeds = head.embed(text.tokens[:, 1:]).to(dtype)
    positions = torch.arange(features.shape[1], device=features.device)[None]
    x, residual = head.enter(embeds, features)
    rotation = head.rotary(x, positions)
    _, keys, values = head.layer.self_attn.qkv(x, rotation)
    outputs = head.layer.finish(residual, head.layer.self_attn(x, rotation))[0]
    count = text.tokens.shape[1] - text.start - 1
    lengths, position = [], 0
    while position < count:
        row = text.start - 1 + position
        prefix = keys[0, :, : row + 1], values[0, :, : row + 1]
        accepted = _propose(head, text, outputs[row], prefix, nodes, depth, width, position)
        lengths.append(accepted + 1)
        position += accepted + 1
    return lengths


def _propose(
    head: EagleHead,
    text: Text,
    root_output: Tensor,
    prefix: tuple[Tensor, Tensor],
    nodes: int,
    depth: int,
    width: int,
    position: int,
) -> int:
    """How many proposed tokens are what the target wrote behind token `start + position`."""
    kv_heads, dim = head.num_kv_heads, head.head_dim
    root = _Nodes(
        tokens=text.tokens[0, text.start + position, None],
        scores=root_output.new_zeros(1, dtype=torch.float32),
        features=root_output[None],
        keys=root_output.new_zeros(1, kv_heads, 0, dim),
        values=root_output.new_zeros(1, kv_heads, 0, dim),
        on_text=torch.ones(1, dtype=torch.bool, device=root_output.device),
    )
    levels: list[_Nodes] = []
    level, outputs = root, root_output[None]
    remaining = text.tokens.shape[1] - text.start - 1 - position
    for index in range(min(depth, remaining)):
        if index:
            outputs, level = _run(head, level, prefix, index)
        place = text.start + position + 1 + index
        children = _children(
            head, level, outputs, width, text.noise[place - text.start], text.tokens[0, place]
        )
        levels.append(children)
        best = children.scores.topk(min(width, children.scores.numel())).indices
        level = _Nodes(*(getattr(children, name)[best] for name in _Nodes.__dataclass_fields__))
    scores = torch.cat([one.scores for one in levels])
    threshold = scores.topk(min(nodes, scores.numel())).values[-1]
    accepted = 0
    for one in levels:
        if not bool((one.on_text & (one.scores >= threshold)).any()):
            break
        accepted += 1
    return accepted


def _run(
    head: EagleHead, level: _Nodes, prefix: tuple[Tensor, Tensor], index: int
) -> tuple[Tensor, _Nodes]:
    """One forward over the nodes of a level: outputs `[W, H]`, nodes with their own K/V."""
    attention = head.layer.self_attn
    embeds = head.embed(level.tokens)[:, None].to(level.features.dtype)
    x, residual = head.enter(embeds, level.features[:, None])
    place = torch.full((level.tokens.numel(), 1), prefix[0].shape[1] - 1 + index, device=x.device)
    query, key, value = attention.qkv(x, head.rotary(x, place))
    keys = torch.cat([level.keys, key], dim=2)
    values = torch.cat([level.values, value], dim=2)
    count = keys.shape[0]
    mixed = torch.nn.functional.scaled_dot_product_attention(
        query,
        torch.cat([prefix[0].expand(count, -1, -1, -1), keys], dim=2),
        torch.cat([prefix[1].expand(count, -1, -1, -1), values], dim=2),
        enable_gqa=True,
    )
    attended = attention.o_proj(mixed.transpose(1, 2).flatten(2))
    outputs = head.layer.finish(residual, attended)[:, 0]
    moved = _Nodes(level.tokens, level.scores, outputs, keys, values, level.on_text)
    return outputs, moved


def _children(
    head: EagleHead, level: _Nodes, outputs: Tensor, width: int, noise: Tensor, truth: Tensor
) -> _Nodes:
    """The `width` likeliest children of every node, `[W * width]`."""
    scores = head.logits(outputs).float() + noise.to(outputs.device)
    best = torch.log_softmax(scores, dim=-1).topk(width, dim=-1)
    tokens = best.indices.flatten()

    def per_child(tensor: Tensor) -> Tensor:
        return tensor.repeat_interleave(width, dim=0)

    return _Nodes(
        tokens=tokens,
        scores=(level.scores[:, None] + best.values).flatten(),
        features=per_child(outputs),
        keys=per_child(level.keys),
        values=per_child(level.values),
        on_text=per_child(level.on_text) & (tokens == truth),
    )
