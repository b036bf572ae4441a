"""The forward of a Llama-shaped model on a CPU in one call: ``csrc/cpu/decoder.cpp``."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from inferlab import _C
from inferlab.kernels import SamplingTensors
from inferlab.models.forward import ForwardBatch, ForwardOutput
from inferlab.models.kv_cache import KVCache
from inferlab.models.quantized import weight_of

if TYPE_CHECKING:
    from inferlab.models.fused import DecoderLayer


class NativeDecoder:
    """Weights of a model, and its angles by position.

    Args:
        model: with its decoder as ``model`` and its head as ``lm_head``.
        layers: of it.
        limit: positions that are asked for at most; None: any.
    """

    def __init__(self, model: Any, layers: Sequence[DecoderLayer], limit: int | None) -> None:
        decoder, head = model.model, model.lm_head
        norm = decoder.norm
        self._vocab, self._hidden = head.out_features, head.in_features
        self._angles = Angles(decoder.rotary_emb, norm.weight, limit)
        self._compiled = _C.Decoder(
            embedding=_data(decoder.embed_tokens.weight),
            norm=_data(norm.weight),
            norm_eps=norm.variance_epsilon,
            head=weight_of(head),
            head_bias=_data(head.bias),
        )
        for layer in layers:
            norms = {
                "input": layer.norm,
                "post": layer.post_norm,
                "q": layer.q_norm,
                "k": layer.k_norm,
            }
            self._compiled.add_layer(
                **{f"{n}_norm": None if m is None else _data(m.weight) for n, m in norms.items()},
                **{f"{n}_eps": 0.0 if m is None else m.variance_epsilon for n, m in norms.items()},
                qkv=layer.qkv[0],
                qkv_bias=layer.qkv[1],
                output=weight_of(layer.out),
                output_bias=_data(layer.out.bias),
                gate_up=layer.gate_up[0],
                gate_up_bias=layer.gate_up[1],
                down=weight_of(layer.down),
                down_bias=_data(layer.down.bias),
                q_heads=layer.q_heads,
                kv_heads=layer.kv_heads,
                head_dim=layer.head_dim,
                scale=layer.scale,
                window=layer.window,
                softcap=layer.softcap,
            )

    def first(self, count: int) -> NativeDecoder:
        """The first ``count`` layers alone, then norm and head; with the same weights."""
        shallow = copy.copy(self)
        shallow._compiled = self._compiled.first(count)
        return shallow

    def forward(
        self,
        batch: ForwardBatch,
        cache: KVCache,
        feature_layers: tuple[int, ...] = (),
        *,
        by_length: bool = False,
    ) -> ForwardOutput:
        """See `HFModel.forward`. ``by_length``: angles depend on more than the position."""
        (pool,) = cache.pools
        size, nodes = batch.tokens.shape
        scored = batch.scored
        dtype = pool.k.dtype
        rows = (size, nodes) if scored is None else (len(scored), 1)
        logits = torch.empty((*rows, self._vocab), dtype=dtype)
        features = None
        if feature_layers:
            width = len(feature_layers) * self._hidden
            features = torch.empty((size, nodes, width), dtype=dtype)

        def run(positions: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor) -> int:
            missing: int = self._compiled.forward(
                batch.tokens.contiguous(),
                positions,
                cos,
                sin,
                batch.seq_lens,
                batch.block_table,
                batch.ancestors,
                batch.num_nodes,
                batch.node_offset,
                pool.k,
                pool.v,
                scored,
                logits,
                feature_layers,
                features,
            )
            return missing

        if by_length:
            run(None, *self._angles.of(batch.positions))
        else:
            positions, angles = batch.positions.contiguous(), self._angles
            missing = run(positions, angles.cos, angles.sin)
            if missing:
                angles.grow(missing)
                run(positions, angles.cos, angles.sin)
        return ForwardOutput(logits, features)

    def draft_chain(
        self,
        tokens: torch.Tensor,
        logits: torch.Tensor,
        allowed_vocab: int,
        roots: torch.Tensor,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
        cache: KVCache,
        sampling: SamplingTensors,
        purpose: int,
        judge: Any,
        requests: Sequence[int],
    ) -> tuple[int, list[int] | None]:
        """Chains of tokens that this model draws and reads, level by level.

        Args:
            tokens: [R, 1 + levels] int32, the roots first; what is drafted is written behind them.
            logits: [R, 1, V], at the roots.
            allowed_vocab: of the ids that are drafted.
            roots: [R] int32, their positions, which key the noise.
            seq_lens, block_table: of the cache, up to the roots.
            sampling: without penalties or bias.
            judge: a compiled planner, or None.
            requests: what it calls the sequences.

        Returns:
            Levels that were drafted, and how many tokens of each chain the judge wants verified.
        """
        (pool,) = cache.pools
        while True:
            missing, drafted, counts = self._compiled.draft_chain(
                tokens,
                logits,
                allowed_vocab,
                roots,
                seq_lens,
                self._angles.cos,
                self._angles.sin,
                block_table,
                pool.k,
                pool.v,
                *sampling.flat[:5],
                purpose,
                judge,
                requests,
            )
            if not missing:
                return drafted, counts
            self._angles.grow(missing)


class Angles:
    """Cosines and sines of positions, from the model's own module: [P, D] each, of a table that
    grows as texts do. A position's stay the bits that they were.

    Args:
        rotary: the module.
        like: a tensor of the dtype that they are wanted in.
        limit: positions that are asked for at most; None: any.
    """

    AT_ONCE = 1024

    def __init__(self, rotary: Any, like: torch.Tensor, limit: int | None) -> None:
        self._rotary, self._like = rotary, like
        self._limit = limit
        self.cos = self.sin = like.new_empty((0, 2))

    def of(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of positions [B, N]: [B * N, D]."""
        cos, sin = self._rotary(self._like, positions)
        cos, sin = (x.expand(*positions.shape, -1).flatten(0, 1).contiguous() for x in (cos, sin))
        return cos, sin

    def grow(self, count: int) -> None:
        """To so many positions at least."""
        most = -(-count // self.AT_ONCE) * self.AT_ONCE
        if self._limit is not None:
            most = max(min(most, self._limit), count)
        start = len(self.cos)
        cos, sin = self.of(torch.arange(start, most)[None])
        if start > 0:
            cos, sin = torch.cat((self.cos, cos)), torch.cat((self.sin, sin))
        self.cos, self.sin = cos, sin


def _data(weight: torch.Tensor | None) -> torch.Tensor | None:
    return None if weight is None else weight.detach()
