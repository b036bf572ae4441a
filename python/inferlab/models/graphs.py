"""Forwards replayed from CUDA graphs: hundreds of launches for the price of one.

A step of an 8 B model is some 300 launches, which the host takes as long to queue as the device to
run. A forward whose shape has come up a few times is captured, once per shape; from then on its
inputs are copied to where the graph reads them and the graph is replayed. Block tables are padded
to a power of two, so that a growing text does not bring a new shape with every page.

Only for forwards that ask the device nothing and whose host values are those of the shape: those
of `fused`. One that cannot be captured runs as before.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

from inferlab.models.forward import ForwardBatch, ForwardOutput
from inferlab.models.kv_cache import KVCache

logger = logging.getLogger(__name__)

Forward = Callable[[ForwardBatch, KVCache, tuple[int, ...]], ForwardOutput]
Replay = Callable[[], None]

USES_BEFORE_CAPTURE = 2
MAX_ROWS = 512  # of a batch: what is larger is a prompt, and takes the device longer than the host
MAX_GRAPHS = 64  # of a cache; each holds its inputs and outputs

_TENSORS = (
    "tokens",
    "positions",
    "seq_lens",
    "block_table",
    "ancestors",
    "num_nodes",
    "scored",
    "prompt_lens",
    "real_rows",
)


class Shape(NamedTuple):
    """What a graph is captured for."""

    sizes: tuple[tuple[int, ...] | None, ...]  # of the batch's tensors, the table's padded
    node_offset: int
    layers: tuple[int, ...]


@dataclass
class Captured:
    """A graph, what it reads and what it writes."""

    batch: ForwardBatch
    output: ForwardOutput
    replay: Replay


class ForwardGraphs:
    """Runs a forward, from a graph where there is one.

    Args:
        forward: what is captured.
        capture: makes a graph of a call: the call's result, and what repeats it.
    """

    def __init__(
        self,
        forward: Forward,
        capture: Callable[[Callable[[], ForwardOutput]], tuple[ForwardOutput, Replay]]
        | None = None,
    ) -> None:
        self._forward = forward
        self._capture = capture or _CudaCapture()
        self._of_cache: WeakKeyDictionary[KVCache, tuple[dict[Shape, Captured], Counter[Shape]]]
        self._of_cache = WeakKeyDictionary()
        self._can_capture = True

    def forward(
        self, batch: ForwardBatch, cache: KVCache, layers: tuple[int, ...]
    ) -> ForwardOutput:
        """See `HFModel.forward`; what it returns is the caller's."""
        rows = batch.tokens.numel()
        if not self._can_capture or rows > MAX_ROWS:
            return self._forward(batch, cache, layers)
        shape = _shape_of(batch, layers)
        graphs, uses = self._of_cache.setdefault(cache, ({}, Counter()))
        captured = graphs.get(shape)
        if captured is None and len(graphs) < MAX_GRAPHS:
            uses[shape] += 1
            if uses[shape] > USES_BEFORE_CAPTURE:
                captured = self._captured(batch, cache, layers, shape)
        if captured is None:
            return self._forward(batch, cache, layers)
        graphs[shape] = captured
        _copy_inputs(batch, captured.batch)
        captured.replay()
        logits, features = captured.output
        return ForwardOutput(logits.clone(), None if features is None else features.clone())

    def _captured(
        self, batch: ForwardBatch, cache: KVCache, layers: tuple[int, ...], shape: Shape
    ) -> Captured | None:
        held = replace(batch)
        for name, size in zip(_TENSORS, shape.sizes, strict=True):
            if size is not None:
                value: torch.Tensor = getattr(batch, name)
                setattr(held, name, value.new_full(size, -1))
        _copy_inputs(batch, held)
        try:
            output, replay = self._capture(lambda: self._forward(held, cache, layers))
        except RuntimeError as error:
            self._can_capture = False
            logger.debug("this forward cannot be captured in a CUDA graph: %s", error)
            return None
        return Captured(held, output, replay)


def _shape_of(batch: ForwardBatch, layers: tuple[int, ...]) -> Shape:
    sizes: list[tuple[int, ...] | None] = []
    for name in _TENSORS:
        value = getattr(batch, name)
        sizes.append(None if value is None else tuple(value.shape))
    rows, pages = batch.block_table.shape
    sizes[_TENSORS.index("block_table")] = (rows, 1 << (pages - 1).bit_length())
    return Shape(tuple(sizes), batch.node_offset, layers)


def _copy_inputs(batch: ForwardBatch, held: ForwardBatch) -> None:
    for name in _TENSORS:
        value: torch.Tensor | None = getattr(batch, name)
        if value is None:
            continue
        to: torch.Tensor = getattr(held, name)
        if name == "block_table":
            to = to[:, : value.shape[1]]  # no slot in use is in what is left behind it
        to.copy_(value)


class _CudaCapture:
    """Captures on a side stream; the graphs share a pool of memory, as they run one at a time."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, call: Callable[[], ForwardOutput]) -> tuple[ForwardOutput, Replay]:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = call()
        return output, graph.replay
