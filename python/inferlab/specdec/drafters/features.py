"""Hidden states of the target that drafters keep from one step to the next, on the device."""

from __future__ import annotations

import numpy as np
import torch

from inferlab.models.transfer import upload
from inferlab.scheduler import Sequence
from inferlab.specdec.batch import Batch


class LastFeatures:
    """The hidden states of each sequence's newest tokens that the target has processed.

    They are kept by sequence when the batch changes, and moved on by every step.

    Args:
        count: how many of each sequence, newest last.
    """

    def __init__(self, count: int = 1) -> None:
        self.count = count
        self._batch: Batch | None = None
        self._rows: list[torch.Tensor] = []  # [B, .., F] each; the last `count` rows matter
        self._loose: dict[int, torch.Tensor] = {}  # [count, F] of sequences not in _batch

    def start(self, sequence: Sequence, features: torch.Tensor) -> None:
        """Takes the hidden states of a chunk of the prompt, [C, F]."""
        before = self._loose.get(sequence.request_id)
        if before is None:
            before = features[:1].expand(self.count, -1)
        self._loose[sequence.request_id] = torch.cat((before, features))[-self.count :]

    def of(self, batch: Batch) -> torch.Tensor:
        """[B, count, F], newest last."""
        if self._batch is not batch:
            self._put_back()
            self._rows = [torch.stack([self._loose.pop(s.request_id) for s in batch.sequences])]
            self._batch = batch
        if len(self._rows) > 1:
            self._rows = [torch.cat(self._rows, dim=1)[:, -self.count :]]
        return self._rows[0]

    def advance(
        self, batch: Batch, features: torch.Tensor, nodes: torch.Tensor, kept: torch.Tensor
    ) -> None:
        """Moves on by a step.

        Args:
            features: [B, N, F], of all nodes of the tree.
            nodes: [B, S] int32, the walk. kept: [B] int32, how many of its entries count, >= 1.
        """
        if features.shape[1] == 1 and self._batch is batch:  # the root alone, which is always kept
            self._rows = [*self._rows, features][-self.count :]
            return
        rows = self.of(batch)
        # Walk entry j stands at count + j in (rows, walk); the last `count` before the kept end.
        ahead = torch.arange(self.count, device=batch.device) - self.count
        at = kept.to(torch.int64)[:, None] + ahead
        walked = nodes.gather(1, at.clamp_min(0)).clamp_min(0).to(torch.int64)
        picked = _rows_at(features, walked)
        if self.count > 1:
            older = _rows_at(rows, (at + self.count).clamp_max(self.count - 1))
            picked = torch.where((at < 0)[:, :, None], older, picked)
        self._rows = [picked]

    def release(self, sequence: Sequence) -> None:
        """Forgets a sequence."""
        if self._batch is not None:
            self._put_back()
        self._loose.pop(sequence.request_id, None)

    def _put_back(self) -> None:
        if self._batch is not None:
            rows = self.of(self._batch)
            for row, sequence in zip(rows, self._batch.sequences, strict=True):
                self._loose[sequence.request_id] = row
        self._batch = None


def _rows_at(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """values [B, N, F], index [B, M] int64 -> [B, M, F]."""
    return values.gather(1, index[:, :, None].expand(-1, -1, values.shape[-1]))


class PendingFeatures:
    """Hidden states of tokens that a draft head has not processed yet, in order of position.

    The first one of sequence b stands for position ``cached[b]``.

    Attributes:
        cached: [B] int32, how many positions are done.
    """

    START = 8  # room at first

    def __init__(self) -> None:
        self._batch: Batch | None = None
        self._rows = torch.empty(0)  # [B, room, F]
        self.cached = torch.empty(0, dtype=torch.int32)
        self._done: dict[int, int] = {}  # by request: positions done, on the host
        self._loose: dict[int, torch.Tensor] = {}  # [pending, F] of sequences not in _batch

    def start(self, sequence: Sequence, features: torch.Tensor, done: int) -> None:
        """Sets a sequence's pending hidden states [P, F], behind ``done`` positions."""
        self._loose[sequence.request_id] = features
        self._done[sequence.request_id] = done

    def loose(self, sequence: Sequence) -> torch.Tensor | None:
        """What `start` was given last, before the sequence's first batch."""
        return self._loose.get(sequence.request_id)

    def enter(self, batch: Batch) -> None:
        """Must come first in a step: lays the rows out for this batch."""
        if self._batch is batch:
            return
        self._put_back()
        rows = [self._loose.pop(s.request_id) for s in batch.sequences]
        room = max(self.START, *(len(r) for r in rows))
        self._rows = rows[0].new_zeros((len(rows), room, rows[0].shape[-1]))
        for into, row in zip(self._rows, rows, strict=True):
            into[: len(row)] = row
        done = [self._done[s.request_id] for s in batch.sequences]
        self.cached = upload(done, np.int32, batch.device)
        self._batch = batch

    def counts(self, batch: Batch) -> list[int]:
        """Pending positions of each sequence, known on the host."""
        return [s.num_cached - self._done[s.request_id] for s in batch.sequences]

    def take(self, batch: Batch) -> torch.Tensor:
        """All that is pending, [B, P, F]: from here on it is done."""
        taken = self._rows[:, : max(self.counts(batch))]
        self.cached = batch.seq_lens.clone()
        for sequence in batch.sequences:
            self._done[sequence.request_id] = sequence.num_cached
        return taken

    def append(self, batch: Batch, features: torch.Tensor, walked: torch.Tensor) -> None:
        """Puts a step's hidden states behind what is pending, before the batch moves on.

        Args:
            features: [B, N, F], of all nodes of the tree. walked: [B, S] int64, nodes, those behind
                the kept ones arbitrary.
        """
        picked = _rows_at(features, walked)
        pending = max(self.counts(batch))
        if pending == 0:
            self._rows = picked
            return
        missing = pending + walked.shape[1] - self._rows.shape[1]
        if missing > 0:
            room = max(missing, self._rows.shape[1])
            self._rows = torch.nn.functional.pad(self._rows, (0, 0, 0, room))
        offset = (batch.seq_lens - self.cached).to(torch.int64)[:, None]
        at = offset + torch.arange(walked.shape[1], device=batch.device)
        self._rows.scatter_(1, at[:, :, None].expand_as(picked), picked)

    def release(self, sequence: Sequence) -> None:
        """Forgets a sequence."""
        if self._batch is not None:
            self._put_back()
        self._loose.pop(sequence.request_id, None)
        self._done.pop(sequence.request_id, None)

    def _put_back(self) -> None:
        if self._batch is not None:
            for i, sequence in enumerate(self._batch.sequences):
                pending = sequence.num_cached - self._done[sequence.request_id]
                self._loose[sequence.request_id] = self._rows[i, :pending]
        self._batch = None
