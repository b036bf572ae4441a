"""Texts on their way into the K/V cache: parts of several, laid out for one forward."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch

from inferlab.models import ForwardBatch, ForwardOutput
from inferlab.models.transfer import upload, upload_pages
from inferlab.scheduler import Chunk

PIECE = 16
"""Tokens of a row where texts of different lengths are read together."""


class Reading:
    """Chunks of texts as the rows of one forward, roots that ride along among them.

    Chunks of one length are a row each. Others are cut into pieces, a row each, so that little of
    the forward is padding: a forward writes the K/V of all its rows before any of them attends, so
    a piece sees the one before it.

    Attributes:
        chunks: what is read.
        tokens, following: [R, W] int64, the tokens of each row, and the ones behind each of them; 0
            behind a root.
        positions: [R, W] int64.
        seq_lens: [R] int32, where the rows begin.
        num_nodes: [R] int32, tokens of each row; None: all W.
        roots: [S] int64, where the roots are among the R * W.
        block_table: [R, max_pages] int32.
        prompt_lens: [R] int32, see `ForwardBatch`.
    """

    def __init__(self, chunks: Sequence[Chunk], device: torch.device) -> None:
        self.chunks = list(chunks)
        self.device = device
        ends = [chunk.stop + chunk.root for chunk in chunks]
        counts = [end - chunk.start for end, chunk in zip(ends, chunks, strict=True)]
        width = counts[0] if min(counts) == max(counts) else min(PIECE, max(counts))
        self._rows_of: list[range] = []
        starts: list[int] = []
        lengths: list[int] = []
        of: list[Chunk] = []
        roots: list[int] = []
        for chunk, end in zip(chunks, ends, strict=True):
            pieces = range(chunk.start, end, width)
            self._rows_of.append(range(len(starts), len(starts) + len(pieces)))
            starts += pieces
            lengths += [min(width, end - start) for start in pieces]
            of += [chunk] * len(pieces)
            if chunk.root:
                roots.append((len(starts) - 1) * width + lengths[-1] - 1)
        texts = np.zeros((len(starts), width + 1), dtype=np.int64)
        for row, chunk, start, length in zip(texts, of, starts, lengths, strict=True):
            known = chunk.request.tokens[start : start + length + 1]
            row[: len(known)] = known
        texts_there = upload(texts, np.int64, device)
        self.tokens, self.following = texts_there[:, :-1], texts_there[:, 1:]
        inside = np.minimum(np.arange(width), np.array(lengths)[:, None] - 1)
        self.positions = upload(np.array(starts)[:, None] + inside, np.int64, device)
        self.seq_lens = upload(starts, np.int32, device)
        self.roots = upload(roots, np.int64, device)
        even = min(lengths) == width
        self.num_nodes = None if even else upload(lengths, np.int32, device)
        self.block_table = upload_pages([c.request.pages for c in of], device)
        self.prompt_lens = upload([c.request.read_length for c in of], np.int32, device)

    @cached_property
    def batch(self) -> ForwardBatch:
        """For the target, and for a draft model with pages of the same numbers."""
        return ForwardBatch(
            tokens=self.tokens,
            positions=self.positions,
            seq_lens=self.seq_lens,
            block_table=self.block_table,
            num_nodes=self.num_nodes,
            prompt_lens=self.prompt_lens,
            scored=self.roots,
        )

    @property
    def first_rows(self) -> list[int]:
        """Where the chunks begin among the R * W; a chunk's tokens follow each other."""
        return [of.start * self.tokens.shape[1] for of in self._rows_of]

    def by_chunk(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """Values [R, W, F] of the rows' tokens as [tokens, F] of each chunk, without its root."""
        return [
            rows[of.start : of.stop].flatten(0, 1)[: chunk.stop - chunk.start]
            for of, chunk in zip(self._rows_of, self.chunks, strict=True)
        ]

    def at_roots(self, output: ForwardOutput) -> ForwardOutput:
        """Of a forward of the batch what it says about the roots: [S, 1, V] and [S, 1, F]."""
        if output.features is None:
            return output
        return output._replace(features=output.features.flatten(0, 1)[self.roots].unsqueeze(1))
