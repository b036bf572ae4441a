"""An EAGLE head over a paged cache: the layer of `EagleHead.forward`, node by node, in kernels.

The pair of token t + 1 and feature t has cache slot and position t.
"""

from __future__ import annotations

from typing import Any

import torch

from inferlab.kernels import rms_norm
from inferlab.models.attention_hook import LayerSpec, Pass
from inferlab.models.draft_heads.eagle import EagleHead
from inferlab.models.forward import ForwardBatch
from inferlab.models.fused import DecoderLayer, product
from inferlab.models.kv_cache import KVCache
from inferlab.models.quantized import weight_of
from inferlab.models.rotary import LengthRotary, context_length


class PagedEagle:
    """Runs an `EagleHead`.

    Args:
        head: its weights; q, k, v and gate, up become views into joint ones.
    """

    def __init__(self, head: EagleHead) -> None:
        self.head = head
        weight = head.layer.self_attn.q_proj.weight
        self.device, self.dtype = weight.device, weight.dtype
        if head.head_dim % 8:
            raise ValueError(
                f"the EAGLE head has heads of {head.head_dim} channels; the kernels need a "
                "multiple of 8"
            )
        spec = LayerSpec(head.num_kv_heads, head.head_dim, head.head_dim**-0.5, 0, 0.0)
        self._specs = (spec,)
        self._layer = DecoderLayer(head.layer, spec)
        length = context_length(head.config) or head.config.max_position_embeddings
        positions = torch.arange(length, device=self.device)[None]
        rotary = LengthRotary.of(head.rotary) or head.rotary
        cos, sin = rotary(weight[:1], positions)
        self._cos, self._sin = cos[0].contiguous(), sin[0].contiguous()
        self.context_length = length

    @property
    def weights_at(self) -> tuple[int, int]:
        """Where the embedding and the output head lie, which may be the target's."""
        head = self.head
        weight = weight_of(head.output_head)
        output = weight if isinstance(weight, torch.Tensor) else weight.data
        return head.embedding.weight.data_ptr(), output.data_ptr()

    def new_cache(self, num_pages: int, page_size: int) -> KVCache:
        """A zeroed cache of one layer."""
        shape = (self.head.num_kv_heads, self.head.head_dim)
        return KVCache([shape], num_pages, page_size, dtype=self.dtype, device=self.device)

    def forward(self, batch: ForwardBatch, features: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """K/V of pairs into the cache, hidden states out.

        Args:
            batch: tokens t + 1 [B, N], positions t, and where they go.
            features: [B, N, F] of the target, or [B, N, H], the output at the parent nodes.

        Returns:
            [B, N, H]: what `logits` reads and the feature of a node's children.
        """
        size, nodes = batch.tokens.shape
        embeds = self.head.embed(batch.tokens).view(size * nodes, -1)
        x, hidden = self._enter(embeds, features.reshape(size * nodes, -1))
        cos, sin = self._cos[batch.positions], self._sin[batch.positions]
        ongoing = Pass.of(batch, cache, self._specs)
        return self._layer.attend(x, hidden, size, nodes, cos, sin, ongoing, 0).view(
            size, nodes, -1
        )

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, N, H] -> [B, N, V] over the target's vocabulary."""
        head = self.head
        size, nodes, width = hidden.shape
        rows = hidden.reshape(size * nodes, width)
        if head.version == 1:
            out = head.draft_logits(rows)
        else:
            normed = rms_norm(rows, head.norm.weight, head.norm.variance_epsilon)
            out = product(normed, weight_of(head.output_head), head.output_head.bias)
        return head.spread(out).view(size, nodes, -1)

    def _enter(
        self, embeds: torch.Tensor, features: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`EagleHead.enter` for rows [M, .]; what the layer adds to may be overwritten."""
        head = self.head
        if head.version == 1:
            fused = product(torch.cat((embeds, features), dim=-1), head.fc.weight, head.fc.bias)
            return fused, fused
        if features.shape[-1] != head.hidden_size:
            features = product(features, head.fc.weight)
        else:
            features = features.clone()  # the caller's
        layer: Any = head.layer
        parts = (
            rms_norm(embeds, layer.input_layernorm.weight, layer.input_layernorm.variance_epsilon),
            rms_norm(features, layer.hidden_norm.weight, layer.hidden_norm.variance_epsilon),
        )
        return torch.cat(parts, dim=-1), features
