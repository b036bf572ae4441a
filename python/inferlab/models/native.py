"""The forward of a decoder on a CPU in one call: ``csrc/cpu/decoder.cpp``."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from inferlab import _C
from inferlab.kernels import SamplingTensors
from inferlab.models.forward import ForwardBatch, ForwardOutput
from inferlab.models.kv_cache import KVCache
from inferlab.models.quantized import weight_of
from inferlab.models.shapes import ModelShape


class NativeDecoder:
    """Weights of a model, and its angles by position.

    Args:
        shape: of the model.
        limit: positions that are asked for at most; None: any.
    """

    def __init__(self, shape: ModelShape, limit: int | None) -> None:
        head = shape.head
        self._vocab, self._hidden = head.out_features, head.in_features
        self._dtype = shape.embedding.dtype
        self._angles = Angles(shape.rotary, shape.norm[0], limit, shape.kinds)
        self._compiled = _C.Decoder(
            embedding=shape.embedding,
            embedding_scale=shape.embedding_scale,
            places=shape.places,
            first_place=shape.first_place,
            norm=shape.norm,
            head=(weight_of(head), None if head.bias is None else head.bias.detach()),
            softcap=shape.softcap,
            num_angles=max(len(shape.kinds), 1),
        )
        for layer in shape.layers:
            self._compiled.add_layer(**vars(layer))

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
        dtype = self._dtype
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
    """Cosines and sines of positions, from the model's own module: [P, kinds * D] each, of a table
    that grows as texts do. A position's stay the bits that they were.

    Args:
        rotary: the module; None: positions are not turned into angles, and D is 0.
        like: a tensor of the dtype that they are wanted in.
        limit: positions that are asked for at most; None: any.
        kinds: what the module is asked for beside positions, one after the other.
    """

    AT_ONCE = 1024

    def __init__(
        self, rotary: Any, like: torch.Tensor, limit: int | None, kinds: Sequence[str] = ()
    ) -> None:
        self._rotary, self._like = rotary, like
        self._limit = limit
        self._kinds: list[tuple[str, ...]] = [(kind,) for kind in kinds] or [()]
        width = 2 * len(self._kinds) if rotary is not None else 0
        self.cos = self.sin = like.new_empty((0, width))

    def of(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of positions [B, N]: [B * N, kinds * D]."""
        if self._rotary is None:
            none = self._like.new_empty((positions.numel(), 0))
            return none, none
        of_kinds = [self._rotary(self._like, positions, *kind) for kind in self._kinds]
        cos, sin = (
            torch.cat([x.expand(*positions.shape, -1) for x in each], dim=-1).flatten(0, 1)
            for each in zip(*of_kinds, strict=True)
        )
        return cos.contiguous(), sin.contiguous()

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
