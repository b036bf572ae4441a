"""FakeLM: a language model without weights, so that the engine around it can be tested in no time.

Its "hidden state" is a hash of the whole context, but it remembers nothing by itself: like a real
model it gets only the new tokens and must read the older ones from the paged cache, where it
stores token ids in place of keys and positions in place of values. A wrong page, a skipped
compaction or a wrong ancestor bit changes its output, as it would a real model's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from inferlab.kernels import kv_append, kv_gather
from inferlab.models.fake_tokenizer import EOS_ID, FIRST_WORD_ID, MIN_VOCAB, fake_tokenizer
from inferlab.models.forward import ForwardBatch, ForwardOutput
from inferlab.models.kv_cache import KVCache

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
# Rows of ready-made logits; a context picks one and raises one token of it.
_TABLE_ROWS = 31
# How far the preferred token stands above the highest other one (standard deviation 1).
_PEAK = 2.0
# Logit of tokens that are never meant to be written: raw bytes, end of text.
_UNWANTED = -60.0


class FakeLM:
    """A deterministic, weightless causal LM.

    Logits at a node depend on `seed`, on every token of its context and on their order. One token
    per context stands out; temperature 0 picks it. With the same `seed` and ``agreement=1`` a draft
    is the target; with ``agreement=a`` it prefers another token in a fraction 1 - a of all
    contexts, chosen by the context's hash and therefore the same in every run.

    Args:
        vocab_size: columns of the logits. From 320 on there is a tokenizer (bytes and words) and
            the model writes words; below there is none and it uses all ids.
        seed: of the language. Draft and target must share it to agree at all.
        agreement: probability in [0, 1] that the preferred token is that of the FakeLM with
            ``agreement=1``.
        context_length: longest sequence, None for no limit.
        name: for results.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        vocab_size: int = 512,
        seed: int = 0,
        agreement: float = 1.0,
        *,
        context_length: int | None = 4096,
        name: str = "fake",
    ) -> None:
        if vocab_size < 2 or vocab_size >= 2**24:
            raise ValueError(f"vocab_size is {vocab_size}, must be in [2, 2^24)")
        if not 0.0 <= agreement <= 1.0:
            raise ValueError(f"agreement is {agreement}, must be in [0, 1]")
        self.name = name
        self.vocab_size = vocab_size
        self.context_length = context_length
        self.reread_length: int | None = None
        self.device = torch.device("cpu")
        self.dtype = torch.float32
        self.num_parameters = 0
        self.quantization: str | None = None
        self.kv_cache_dtype = "auto"
        self.seed = seed
        self.agreement = agreement
        has_tokenizer = vocab_size >= MIN_VOCAB
        self.tokenizer: Any = fake_tokenizer(vocab_size) if has_tokenizer else None
        self.tokenizer_vocab_size: int | None = vocab_size if has_tokenizer else None
        self.eos_token_ids: tuple[int, ...] = (EOS_ID,) if has_tokenizer else ()
        self._first_choice = FIRST_WORD_ID if has_tokenizer else 0

        rng = np.random.default_rng(seed & 0xFFFF_FFFF)
        table = rng.standard_normal((_TABLE_ROWS, vocab_size), dtype=np.float32)
        table[:, : self._first_choice] = _UNWANTED
        self._table = table
        self._peak = table.max(axis=1) + np.float32(_PEAK)
        self.embed: torch.nn.Module | None = None
        self.head: torch.nn.Module | None = None
        self._key = _mix(np.array([seed & 0xFFFF_FFFF_FFFF_FFFF], dtype=np.uint64))[0]

    def new_cache(self, num_pages: int, page_size: int = 16) -> KVCache:
        """A cache of one layer, one head, one channel: token ids as keys, positions as values."""
        return KVCache([(1, 1)], num_pages, page_size, dtype=torch.float32)

    def notice_changes(self) -> None:
        """Nothing about it can be changed."""

    def forward(
        self, batch: ForwardBatch, cache: KVCache, layers: tuple[int, ...] = ()
    ) -> ForwardOutput:
        """Stores the new tokens, hashes each node's context, returns f32 logits.

        Raises:
            ValueError: asked for hidden states.
        """
        if layers:
            raise ValueError(
                f"{self.name} has no hidden states; drafters that read them (medusa, eagle) need "
                "a real model (implementation='hf')"
            )
        B, N = batch.tokens.shape
        k_pages, v_pages = cache.pages[0]
        kv_append(
            batch.tokens.to(torch.float32).reshape(B, N, 1, 1),
            batch.positions.to(torch.float32).reshape(B, N, 1, 1),
            k_pages,
            v_pages,
            batch.block_table,
            batch.seq_lens,
            node_offset=batch.node_offset,
            num_nodes=batch.num_nodes,
        )
        seq_lens = batch.seq_lens.numpy()
        num_nodes = np.full(B, N) if batch.num_nodes is None else batch.num_nodes.numpy()
        lengths = seq_lens + batch.node_offset + num_nodes
        slots = int(lengths.max())
        terms = self._terms(
            k_pages, v_pages, batch, torch.from_numpy(lengths.astype(np.int32)), slots
        )

        hashes = np.empty((B, N), dtype=np.uint64)
        for b in range(B):
            prefix, nodes = terms[b, : seq_lens[b]], terms[b, seq_lens[b] : lengths[b]]
            seen = _path_sums(nodes, batch, b, N)
            hashes[b, : len(seen)] = prefix.sum(dtype=np.uint64) + seen
            hashes[b, len(seen) :] = 0
        if batch.scored is not None:
            hashes = hashes.reshape(-1, 1)[batch.scored.numpy()]
        return ForwardOutput(torch.from_numpy(self._logits(_mix(hashes + self._key))))

    def plain(self) -> None:
        """There is no model behind it."""

    def _terms(
        self,
        k_pages: torch.Tensor,
        v_pages: torch.Tensor,
        batch: ForwardBatch,
        lengths: torch.Tensor,
        slots: int,
    ) -> np.ndarray:
        """[B, slots] u64: a hash of (token, position) for every cache slot, to be added up."""
        tokens = kv_gather(k_pages, batch.block_table, lengths, slots)
        positions = kv_gather(v_pages, batch.block_table, lengths, slots)
        shape = (tokens.shape[0], slots)
        word = tokens.numpy().reshape(shape).astype(np.uint64) << np.uint64(32)
        return _mix(word | positions.numpy().reshape(shape).astype(np.uint64))

    def _logits(self, hashes: np.ndarray) -> np.ndarray:
        """[B, N] u64 context hashes to [B, N, V] f32 logits."""
        rows = (hashes % np.uint64(_TABLE_ROWS)).astype(np.int64)
        choices = np.uint64(self.vocab_size - self._first_choice)
        pick = (hashes >> np.uint64(8)) % choices
        if self.agreement < 1.0:
            fresh = _mix(hashes ^ _GOLDEN)
            disagree = fresh >= np.uint64(min(self.agreement * 2.0**64, 2.0**64 - 2048))
            if self.agreement == 0.0:
                disagree = np.ones_like(disagree)
            if choices > 1:
                pick = np.where(
                    disagree, (pick + 1 + fresh % (choices - np.uint64(1))) % choices, pick
                )
        logits = self._table[rows]
        tokens = pick.astype(np.int64)[..., None] + self._first_choice
        np.put_along_axis(logits, tokens, self._peak[rows][..., None], axis=-1)
        return logits


def _path_sums(nodes: np.ndarray, batch: ForwardBatch, b: int, N: int) -> np.ndarray:
    """For each new node of sequence b: the sum (mod 2^64) of the terms on its path and its own.

    nodes: [node_offset + n] u64 terms of the sequence's tree so far. Returns [n] u64.
    """
    offset = batch.node_offset
    if batch.ancestors is None:
        return np.cumsum(nodes, dtype=np.uint64)[offset:]
    words = batch.ancestors[b, : len(nodes) - offset].contiguous().numpy().view(np.uint8)
    bits = np.unpackbits(words, axis=-1, bitorder="little", count=len(nodes))
    return np.where(bits, nodes, np.uint64(0)).sum(axis=1, dtype=np.uint64)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele et al., 2014) over u64 arrays, wrapping."""
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
