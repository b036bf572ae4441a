"""Calls replayed from CUDA graphs: hundreds of launches for the price of one.

A step of an 8 B model is some 300 launches, which the host takes as long to queue as the device to
run; drafting a tree level by level is hundreds more, of which each runs for a few microseconds. A
call whose shapes have come up a few times is captured, once per shape; from then on its inputs are
copied to where the graph reads them and the graph is replayed. Block tables are padded to a power
of two, so that a growing text does not bring a new shape with every page.

Only for calls that ask the device nothing and whose host values are those of the shape: forwards of
`fused`, and drafts by heads and models. One that cannot be captured runs as before. Calls within a
call that is captured are part of its graph.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch

from inferlab.models.forward import ForwardBatch, ForwardOutput
from inferlab.models.kv_cache import KVCache

logger = logging.getLogger(__name__)

Tensors = Sequence[Any]  # tensors, or None
Call = Callable[[Tensors], Tensors]
Replay = Callable[[], None]
Capture = Callable[[Callable[[], Tensors]], tuple[Tensors, Replay]]
Forward = Callable[[ForwardBatch, KVCache, tuple[int, ...]], ForwardOutput]

USES_BEFORE_CAPTURE = 4  # a capture costs what some ten replays save
MAX_ROWS = 512  # of a batch: what is larger is a prompt, and takes the device longer than the host
MAX_GRAPHS = 64  # of a cache; each holds its inputs and outputs


class _Here(threading.local):
    """Of a thread."""

    uses = USES_BEFORE_CAPTURE
    capturing = False


_here = _Here()


@contextmanager
def captured_soon() -> Iterator[None]:
    """Calls of this thread are captured when they come up for the second time: to measure what they
    will take. (Not the first: kernels are loaded then, which a capture does not allow.)"""
    before, _here.uses = _here.uses, 1
    try:
        yield
    finally:
        _here.uses = before


@dataclass
class Captured:
    """A graph, what it reads and what it writes."""

    inputs: Tensors
    output: Tensors
    replay: Replay


class Graphs:
    """Runs calls, from graphs where there are some.

    Args:
        capture: makes a graph of a call: the call's result, and what repeats it.
    """

    def __init__(self, capture: Capture | None = None) -> None:
        self.can_capture = True
        self._capture = capture or CudaCapture()
        self._graphs: dict[Hashable, Captured] = {}
        self._uses: Counter[Hashable] = Counter()

    def run(
        self, key: Hashable, inputs: Tensors, call: Call, *, table: int, copied: bool
    ) -> Tensors:
        """``call(inputs)``.

        Args:
            key: all that the call hangs on beside its inputs.
            inputs: tensors, or None.
            table: which of them is the block table.
            copied: what is returned is the caller's; False: it holds until the next run.
        """
        if not self.can_capture or _here.capturing:
            return call(inputs)
        sizes = [None if value is None else tuple(value.shape) for value in inputs]
        rows, pages = sizes[table] or (0, 0)
        sizes[table] = (rows, 1 << (pages - 1).bit_length())
        key = (key, tuple(sizes))
        captured = self._graphs.get(key)
        if captured is None and len(self._graphs) < MAX_GRAPHS:
            self._uses[key] += 1
            if self._uses[key] > _here.uses:
                captured = self._captured(inputs, sizes, call)
        if captured is None:
            return call(inputs)
        self._graphs[key] = captured
        _copy(inputs, captured.inputs)
        captured.replay()
        if not copied:
            return captured.output
        return [None if value is None else value.clone() for value in captured.output]

    def _captured(
        self, inputs: Tensors, sizes: Sequence[tuple[int, ...] | None], call: Call
    ) -> Captured | None:
        held = [
            None if value is None or size is None else value.new_full(size, -1)
            for value, size in zip(inputs, sizes, strict=True)
        ]
        _copy(inputs, held)
        _here.capturing = True
        try:
            output, replay = self._capture(lambda: call(held))
        except RuntimeError as error:
            self.can_capture = False
            logger.warning("this cannot be captured in a CUDA graph and runs slower: %s", error)
            return None
        finally:
            _here.capturing = False
        return Captured(held, output, replay)


def _copy(inputs: Tensors, held: Tensors) -> None:
    pairs = [(to, value) for to, value in zip(held, inputs, strict=True) if value is not None]
    # Of a table that is narrower than the held one: no slot in use is in what is left behind it.
    into = [to if to.shape == value.shape else to[:, : value.shape[1]] for to, value in pairs]
    torch._foreach_copy_(into, [value for _, value in pairs])


_TENSORS = (
    "tokens",
    "positions",
    "seq_lens",
    "block_table",
    "ancestors",
    "num_nodes",
    "scored",
    "prompt_lens",
)


class ForwardGraphs:
    """A model's forwards, from graphs that go with the cache they write to.

    Args:
        forward: what is captured.
        capture: see `Graphs`.
    """

    def __init__(self, forward: Forward, capture: Capture | None = None) -> None:
        self._forward = forward
        self._capture = capture or CudaCapture()
        self._of_cache: WeakKeyDictionary[KVCache, Graphs] = WeakKeyDictionary()
        self._can_capture = True

    def forward(
        self, batch: ForwardBatch, cache: KVCache, layers: tuple[int, ...]
    ) -> ForwardOutput:
        """See `HFModel.forward`; what it returns is the caller's."""
        if not self._can_capture or batch.tokens.numel() > MAX_ROWS:
            return self._forward(batch, cache, layers)
        graphs = self._of_cache.get(cache)
        if graphs is None:
            graphs = self._of_cache[cache] = Graphs(self._capture)

        def call(inputs: Tensors) -> ForwardOutput:
            held = replace(batch, **dict(zip(_TENSORS, inputs, strict=True)))
            return self._forward(held, cache, layers)

        inputs = [getattr(batch, name) for name in _TENSORS]
        table = _TENSORS.index("block_table")
        key = batch.node_offset, layers
        logits, features = graphs.run(key, inputs, call, table=table, copied=True)
        self._can_capture = graphs.can_capture
        return ForwardOutput(logits, features)


class CudaCapture:
    """Captures on a stream of its own; the graphs share a pool of memory, as they run one at a
    time. (`torch.cuda.graph` also gives all cached memory back: some 100 ms, and as much again to
    get it back.)"""

    def __init__(self) -> None:
        self._pool: Any = None
        self._stream: Any = None
        self._alive: WeakSet[Any] = WeakSet()  # graphs; the pool goes with the last of them

    def __call__(self, call: Callable[[], Tensors]) -> tuple[Tensors, Replay]:
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        if not self._alive:
            self._pool = torch.cuda.graph_pool_handle()
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                output = call()
            finally:
                graph.capture_end()
        current.wait_stream(self._stream)
        self._alive.add(graph)
        return output, graph.replay
