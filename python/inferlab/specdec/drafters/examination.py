"""What a draft model would have drafted of a text that it reads late: seen for next to nothing."""

from __future__ import annotations

import torch

from inferlab import kernels
from inferlab.kernels import SamplingTensors
from inferlab.specdec.acceptance import WINDOW, sure_of
from inferlab.specdec.batch import Batch
from inferlab.specdec.control import Judge
from inferlab.specdec.drafters.writer import SameVocabulary
from inferlab.specdec.reading import Reading


class Examination:
    """Of the texts of a batch, whether the draft's choices would have been the target's.

    A chain that was drafted at one of these tokens would have been accepted as far as the choices
    that follow it are right: until then its text is the one that was read.

    Args:
        batch: whose texts are read; without penalties and bias, which change with each token.
        purpose: what the draft's draws are for.
        judge: who hears of it.
    """

    def __init__(self, batch: Batch, purpose: int, judge: Judge) -> None:
        self._judge = judge
        self._batch = batch
        self._purpose = purpose
        self._place = {r.request_id: i for i, r in enumerate(batch.requests)}
        self._sure: list[list[float]] = [[] for _ in batch.requests]
        self._right: list[list[bool]] = [[] for _ in batch.requests]
        self._asked: list[tuple[int, int]] = []  # of the forward under way: place, position

    def rows(self, reading: Reading) -> torch.Tensor:
        """Of which rows of a forward logits are wanted: [S] int64."""
        rows: list[int] = []
        self._asked = []
        for chunk, row in zip(reading.chunks, reading.first_rows, strict=True):
            request = chunk.request
            last = len(request.tokens) - 1
            first = max(chunk.start, len(request.prompt) - 1, last - WINDOW)
            rows += range(row + first - chunk.start, row + chunk.stop - chunk.start)
            place = self._place[request.request_id]
            self._asked += [(place, at + 1) for at in range(first, chunk.stop)]
        return torch.tensor(rows, dtype=torch.int64, device=reading.device)

    def mark(self, logits: torch.Tensor) -> None:
        """Takes the draft's logits [S, 1, .] of these rows."""
        if not self._asked:
            return
        device = logits.device
        places, positions = torch.tensor(self._asked, device=device).unbind(1)
        sampling = self._batch.sampling
        scores = torch.empty((len(places), 2), dtype=torch.float32, device=device)
        drawn = kernels.sample(
            SameVocabulary(self._batch.vocab_size).scores(logits)[:, 0],
            positions.contiguous(),
            SamplingTensors(
                sampling.temperature[places],
                sampling.top_k[places],
                sampling.top_p[places],
                sampling.min_p[places],
                sampling.seed[places],
            ),
            purpose=self._purpose,
            num_samples=2,
            allowed_vocab=self._batch.allowed_vocab,
            scores=scores,
        )
        chosen = zip(self._asked, drawn[:, 0].tolist(), scores.tolist(), strict=True)
        for (place, position), token, (best, second) in chosen:
            self._sure[place].append(sure_of(best, second))
            self._right[place].append(token == self._batch.requests[place].tokens[position])

    def passed(self) -> bool:
        """Whether the judge has it go on to drafting; that is so where nothing was seen."""
        if not any(self._right):
            return True
        requests = [request.request_id for request in self._batch.requests]
        return self._judge.examined(requests, self._sure, self._right)
