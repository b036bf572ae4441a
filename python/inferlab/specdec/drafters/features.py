"""Hidden states of the target that drafters keep from one step to the next, on the device."""

from __future__ import annotations

import numpy as np
import torch

from inferlab.models.transfer import upload
from inferlab.scheduler import Request
from inferlab.specdec.batch import Batch
from inferlab.specdec.reading import Reading
from inferlab.specdec.walk import Walk


class LastFeatures:
    """The hidden states of each request's newest tokens that the target has processed.

    They are kept by request when the batch changes, and moved on by every step.

    Args:
        count: how many of each request, newest last.
    """

    def __init__(self, count: int = 1) -> None:
        self.count = count
        self._batch: Batch | None = None
        self._rows: list[torch.Tensor] = []  # [B, .., F] each; the last `count` rows matter
        self._loose: dict[int, torch.Tensor] = {}  # [count, F] of requests not in _batch

    def start(self, reading: Reading, features: torch.Tensor) -> None:
        """Takes the hidden states [R, W, F] of what was read."""
        for chunk, rows in zip(reading.chunks, reading.by_chunk(features), strict=True):
            before = self._loose.get(chunk.request.request_id)
            if before is None:
                first = rows[:1] if len(rows) else rows.new_zeros((1, rows.shape[-1]))
                before = first.expand(self.count, -1)
            self._loose[chunk.request.request_id] = torch.cat((before, rows))[-self.count :]

    def of(self, batch: Batch) -> torch.Tensor:
        """[B, count, F], newest last."""
        if self._batch is not batch:
            self._put_back()
            self._rows = [torch.stack([self._loose.pop(r.request_id) for r in batch.requests])]
            self._batch = batch
        if len(self._rows) > 1:
            self._rows = [torch.cat(self._rows, dim=1)[:, -self.count :]]
        return self._rows[0]

    def advance(self, batch: Batch, walk: Walk) -> None:
        """Moves on by a step."""
        features = walk.output.features
        assert features is not None
        if features.shape[1] == 1 and self._batch is batch:  # the root alone, which is always kept
            self._rows = [*self._rows, features][-self.count :]
            return
        rows = self.of(batch)
        # Walk entry j stands at count + j in (rows, walk); the last `count` before the kept end.
        ahead = torch.arange(self.count, device=batch.device) - self.count
        at = walk.kept.to(torch.int64)[:, None] + ahead
        walked = walk.nodes.gather(1, at.clamp_min(0)).clamp_min(0).to(torch.int64)
        picked = _rows_at(features, walked)
        if self.count > 1:
            older = _rows_at(rows, (at + self.count).clamp_max(self.count - 1))
            picked = torch.where((at < 0)[:, :, None], older, picked)
        self._rows = [picked]

    def release(self, request: Request) -> None:
        """Forgets a request."""
        self._put_back()
        self._loose.pop(request.request_id, None)

    def _put_back(self) -> None:
        if self._batch is not None:
            rows = self.of(self._batch)
            for row, request in zip(rows, self._batch.requests, strict=True):
                self._loose[request.request_id] = row
        self._batch = None


def _rows_at(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """values [B, N, F], index [B, M] int64 -> [B, M, F]."""
    return values.gather(1, index[:, :, None].expand(-1, -1, values.shape[-1]))


class PendingFeatures:
    """Hidden states of tokens that a draft head has not processed yet, in order of position.

    The first one of request b stands for position ``cached[b]``.

    Attributes:
        cached: [B] int32, how many positions are done.
    """

    START = 8  # room at first

    def __init__(self) -> None:
        self._batch: Batch | None = None
        self._rows = torch.empty(0)  # [B, room, F]
        self.cached = torch.empty(0, dtype=torch.int32)
        self._done: dict[int, int] = {}  # by request: positions done, on the host
        self._loose: dict[int, torch.Tensor] = {}  # [pending, F] of requests not in _batch

    def start(self, request: Request, features: torch.Tensor, done: int) -> None:
        """Sets a request's pending hidden states [P, F], behind ``done`` positions."""
        self._loose[request.request_id] = features
        self._done[request.request_id] = done

    def enter(self, batch: Batch) -> None:
        """Must come first in a step: lays the rows out for this batch."""
        if self._batch is batch:
            return
        self._put_back()
        rows = [self._loose.pop(r.request_id) for r in batch.requests]
        room = max(self.START, *(len(r) for r in rows))
        self._rows = rows[0].new_zeros((len(rows), room, rows[0].shape[-1]))
        for into, row in zip(self._rows, rows, strict=True):
            into[: len(row)] = row
        done = [self._done[r.request_id] for r in batch.requests]
        self.cached = upload(done, np.int32, batch.device)
        self._batch = batch

    def counts(self, batch: Batch) -> list[int]:
        """Pending positions of each request between two steps."""
        return [r.num_cached - self._done[r.request_id] for r in batch.requests]

    def take(self, batch: Batch, width: int) -> torch.Tensor:
        """All that is pending, [B, width, F], and padding behind it: from here on it is done."""
        taken = self._rows[:, :width]
        if taken.shape[1] < width:
            taken = torch.nn.functional.pad(taken, (0, 0, 0, width - taken.shape[1]))
        self.cached = batch.seq_lens
        for request in batch.requests:
            self._done[request.request_id] = request.num_cached
        return taken

    def append(self, batch: Batch, walk: Walk) -> None:
        """Puts a step's hidden states behind what is pending."""
        features = walk.output.features
        assert features is not None
        walked = walk.nodes[:, : max(walk.tree.depths) + 1].clamp_min(0).to(torch.int64)
        picked = _rows_at(features, walked)
        starts = zip(batch.requests, walk.starts, strict=True)
        pending = max(start - self._done[request.request_id] for request, start in starts)
        if pending == 0:
            self._rows = picked
            return
        missing = pending + walked.shape[1] - self._rows.shape[1]
        if missing > 0:
            room = max(missing, self._rows.shape[1])
            self._rows = torch.nn.functional.pad(self._rows, (0, 0, 0, room))
        offset = (walk.seq_lens - self.cached).to(torch.int64)[:, None]
        at = offset + torch.arange(walked.shape[1], device=batch.device)
        self._rows.scatter_(1, at[:, :, None].expand_as(picked), picked)

    def release(self, request: Request) -> None:
        """Forgets a request."""
        self._put_back()
        self._loose.pop(request.request_id, None)
        self._done.pop(request.request_id, None)

    def _put_back(self) -> None:
        if self._batch is not None:
            for i, request in enumerate(self._batch.requests):
                pending = request.num_cached - self._done[request.request_id]
                self._loose[request.request_id] = self._rows[i, :pending]
        self._batch = None
