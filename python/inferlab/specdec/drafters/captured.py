"""Drafts replayed from CUDA graphs: a tree, level by level, is one launch for the host.

What a level computes takes a device some 200 us of a head's weights, and the host longer to queue:
drafting a grown tree of EAGLE's launch by launch takes as long as a step of an 8 B model. Forwards
of a draft model have graphs of their own, but between them lie draws, and inputs to be copied.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch

from inferlab.kernels import SamplingTensors
from inferlab.models.graphs import Capture, Graphs, Tensors, table_room
from inferlab.specdec.batch import Batch
from inferlab.specdec.drafters.writer import Ground

Write = Callable[[Ground, Tensors], Tensors]


class DraftGraphs:
    """Runs what drafts, on a CUDA device from graphs.

    Args:
        device: what is drafted on.
        capture: see `Graphs`; given, any device drafts from graphs.
    """

    def __init__(self, device: torch.device, capture: Capture | None = None) -> None:
        captures = device.type == "cuda" or capture is not None
        self._graphs = Graphs(capture) if captures else None

    @property
    def captures(self) -> bool:
        """Whether shapes should be few: each has a graph of its own."""
        return self._graphs is not None and self._graphs.can_capture

    def run(
        self, key: Hashable, batch: Batch, more: Sequence[torch.Tensor | None], write: Write
    ) -> Tensors:
        """``write(ground, more)``, which holds until the next run.

        Args:
            key: all that ``write`` hangs on beside its arguments.
            batch: whose sequences are drafted for.
            more: what ``write`` reads beside the ground.
        """
        ground = Ground.of(batch)
        if self._graphs is None:
            return write(ground, more)
        start = (ground.roots, ground.seq_lens, ground.block_table)
        sampling = ground.sampling.flat

        def call(inputs: Tensors) -> Tensors:
            (roots, seq_lens, table), rest = inputs[: len(start)], inputs[len(start) :]
            held = Ground(
                roots, seq_lens, seq_lens, table,
                SamplingTensors(*rest[: len(sampling)]),
                ground.allowed_vocab,
            )  # fmt: skip
            return write(held, rest[len(sampling) :])

        inputs = (*start, *sampling, *more)
        key = (key, ground.allowed_vocab)
        rooms = {2: table_room(ground.block_table)}
        return self._graphs.run(key, inputs, call, rooms)
