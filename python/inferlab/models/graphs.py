"""Calls replayed from CUDA graphs: hundreds of launches for the price of one.

A step of an 8 B model is some 300 launches, which the host takes as long to queue as the device to
run; drafting a tree level by level is hundreds more, of which each runs for a few microseconds. A
call whose shapes have come up a few times is captured, once per shape; from then on its inputs are
copied to where the graph reads them and the graph is replayed. Block tables are padded to a power
of two, so that a growing text does not bring a new shape with every page, and trees to one of a few
sizes, until their own has come up so often that padding costs more than a graph.

Only for calls that ask the device nothing and whose host values are those of the shape: forwards of
`fused`, and drafts by heads and models. One that cannot be captured runs as before. Calls within a
call that is captured are part of its graph.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
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
USES_BEFORE_OWN = 32  # of a tree's size; until then it shares the graph of a somewhat larger one
MAX_ROWS = 512  # of a batch: what is larger is a prompt, and takes the device longer than the host
MAX_GRAPHS = 64  # of a cache, those used last; each holds its inputs and outputs


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

    def run(self, key: Hashable, inputs: Tensors, call: Call, rooms: Mapping[int, int]) -> Tensors:
        """``call(inputs)``, which holds until the next run.

        Args:
            key: all that the call hangs on beside its inputs.
            inputs: tensors, or None.
            rooms: what the second dimension of some inputs is padded to, by their place, so that
                calls of several sizes share a graph. A graph's results are as wide.
        """
        if not self.can_capture or _here.capturing:
            return call(inputs)
        sizes = [None if value is None else tuple(value.shape) for value in inputs]
        for place, room in rooms.items():
            if (size := sizes[place]) is not None:
                sizes[place] = (size[0], room, *size[2:])
        key = (key, tuple(sizes))
        captured = self._graphs.pop(key, None)
        if captured is None:
            self._uses[key] += 1
            if self._uses[key] > _here.uses:
                captured = self._captured(inputs, sizes, call)
        if captured is None:
            return call(inputs)
        self._graphs[key] = captured  # the last one, of the order of their use
        if len(self._graphs) > MAX_GRAPHS:
            oldest = next(iter(self._graphs))
            del self._graphs[oldest], self._uses[oldest]
        _copy(inputs, captured.inputs)
        captured.replay()
        return captured.output

    def _captured(
        self, inputs: Tensors, sizes: Sequence[tuple[int, ...] | None], call: Call
    ) -> Captured | None:
        held = [
            None if value is None or size is None else value.new_zeros(size)
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
    # Of what is narrower than the held one: nothing reads what is left behind it.
    into = [to if to.shape == value.shape else to[:, : value.shape[1]] for to, value in pairs]
    torch._foreach_copy_(into, [value for _, value in pairs])


def power_of_two(least: int) -> int:
    """The first one that is no less: for sizes of which there should be few."""
    return 1 << (least - 1).bit_length()


def table_room(table: torch.Tensor) -> int:
    """Pages that a block table [rows, pages] is padded to."""
    return power_of_two(table.shape[1])


def node_room(nodes: int) -> int:
    """Nodes that trees are padded to: 1, 2, 3, 4, 6, 8, 12, 16, ..."""
    power = power_of_two(nodes)
    return power * 3 // 4 if nodes <= power * 3 // 4 else power


@lru_cache(maxsize=256)
def _all_of(rows: int, nodes: int, device: torch.device) -> torch.Tensor:
    return torch.full((rows,), nodes, dtype=torch.int32, device=device)


_BY_NODE = ("tokens", "positions", "ancestors")
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
        self._uses: Counter[Hashable] = Counter()
        self._can_capture = True

    def forward(
        self, batch: ForwardBatch, cache: KVCache, layers: tuple[int, ...]
    ) -> ForwardOutput:
        """See `HFModel.forward`; what it returns is the caller's."""
        if not self._can_capture or _here.capturing or batch.tokens.numel() > MAX_ROWS:
            return self._forward(batch, cache, layers)
        graphs = self._of_cache.get(cache)
        if graphs is None:
            graphs = self._of_cache[cache] = Graphs(self._capture)
        rows, nodes = batch.tokens.shape
        if nodes > 1 and batch.num_nodes is None:
            batch = replace(batch, num_nodes=_all_of(rows, nodes, batch.tokens.device))

        def call(inputs: Tensors) -> ForwardOutput:
            held = replace(batch, **dict(zip(_TENSORS, inputs, strict=True)))
            return self._forward(held, cache, layers)

        inputs = [getattr(batch, name) for name in _TENSORS]
        rooms = {_TENSORS.index("block_table"): table_room(batch.block_table)}
        if batch.scored is None:  # which counts rows
            shape = rows, nodes, batch.ancestors is None, batch.node_offset, layers
            self._uses[shape] += 1
            if self._uses[shape] <= USES_BEFORE_OWN:
                rooms |= dict.fromkeys(map(_TENSORS.index, _BY_NODE), node_room(nodes))
        key = batch.node_offset, layers
        logits, features = graphs.run(key, inputs, call, rooms)
        self._can_capture = graphs.can_capture
        if features is not None:
            features = features[:, :nodes].clone()
        return ForwardOutput(logits[:, :nodes].clone(), features)


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
