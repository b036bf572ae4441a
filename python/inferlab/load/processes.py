"""A load by as many client processes as it takes: each runs its share, one place gathers records.

Every process is told one clock (`results.Clock`) and, once all are ready, when the load begins. The
monotonic clock is the machine's, the same in all of its processes, so what they measured is told
on one axis of time. Conversation i goes to process i modulo their number, at the time that the
arrivals, drawn from one seed, have for it: all shares together are the load that one would run.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from inferlab.load.plan import LoadPlan
from inferlab.load.results import Clock, Shard
from inferlab.load.runner import Ran, run_shard
from inferlab.records import RequestRecord

_START_S = 0.05
"""From when everybody is ready to the first arrival."""


@dataclass
class Outcome:
    """What came of a load: ``ran`` has an entry for each client process."""

    records: list[RequestRecord] = field(default_factory=list)
    ran: list[Ran] = field(default_factory=list)
    wall_s: float = 0.0

    @property
    def interrupted(self) -> bool:
        return any(ran.interrupted for ran in self.ran)


def run_load(
    plan: LoadPlan, processes: int = 1, keep: Callable[[RequestRecord], None] | None = None
) -> Outcome:
    """Runs a load; in this process where one is enough. Ctrl-C ends it, and what came is kept.

    Args:
        processes: how many clients share it.
        keep: called with each record as soon as its request has ended.

    Raises:
        ValueError: more processes than users of a closed load, or than may run at a time.
        RuntimeError: a client process died.
    """
    if processes < 1 or (plan.concurrency is not None and processes > plan.concurrency):
        raise ValueError(
            f"processes is {processes}; it must be from 1 to the concurrency, {plan.concurrency}"
        )
    outcome = Outcome()

    def take(record: RequestRecord) -> None:
        outcome.records.append(record)
        if keep is not None:
            keep(record)

    begun = time.perf_counter()
    if processes == 1:
        outcome.ran.append(run_shard(plan, Shard(Clock.now()), take))
    else:
        _run_many(plan, processes, take, outcome)
    outcome.wall_s = time.perf_counter() - begun
    outcome.records.sort(key=_sent_at)
    return outcome


def _run_many(
    plan: LoadPlan, processes: int, take: Callable[[RequestRecord], None], outcome: Outcome
) -> None:
    context = multiprocessing.get_context("spawn")
    clock = Clock.now()
    pipes: list[Connection] = []
    workers: list[BaseProcess] = []
    try:
        with _deaf():
            for index in range(processes):
                ours, theirs = context.Pipe()
                part = Shard(clock, index, processes)
                worker: BaseProcess = context.Process(
                    target=_work, args=(theirs, plan, part), daemon=True
                )
                worker.start()
                theirs.close()
                pipes.append(ours)
                workers.append(worker)
        try:
            for pipe in pipes:
                _receive(pipe)  # it is ready
            start_ns = time.perf_counter_ns() + int(_START_S * 1e9)
            for pipe in pipes:
                pipe.send(start_ns)
            _gather(pipes, take, outcome)
        except KeyboardInterrupt:
            for pipe in pipes:
                with contextlib.suppress(OSError):
                    pipe.send(None)
            _gather(pipes, take, outcome)
    finally:
        for pipe in pipes:
            pipe.close()
        for worker in workers:
            worker.join(5)
            if worker.is_alive():
                worker.kill()
                worker.join()


def _gather(
    pipes: list[Connection], take: Callable[[RequestRecord], None], outcome: Outcome
) -> None:
    """Until every process has said what it did."""
    while len(outcome.ran) < len(pipes):
        told = {ran.index for ran in outcome.ran}
        running = [pipe for index, pipe in enumerate(pipes) if index not in told]
        for pipe in wait(running):
            message = _receive(pipe)
            if isinstance(message, Ran):
                outcome.ran.append(message)
            elif isinstance(message, RequestRecord):
                take(message)
    outcome.ran.sort(key=lambda ran: ran.index)


def _receive(pipe: Any) -> Any:
    try:
        message = pipe.recv()
    except EOFError:
        raise RuntimeError("a client process of the load died") from None
    if isinstance(message, Exception):
        raise message
    return message


def _work(pipe: Connection, plan: LoadPlan, part: Shard) -> None:
    """The life of a client process: says that it is ready, hears when to start, gives records."""
    try:
        pipe.send(run_shard(plan, part, pipe.send, pipe))
    except Exception as error:
        pipe.send(RuntimeError(f"client process {part.index}: {type(error).__name__}: {error}"))


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Processes that are started meanwhile never hear of Ctrl-C: they are told to end."""
    try:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    except ValueError:  # not the main thread, which alone would hear of it
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _sent_at(record: RequestRecord) -> float:
    return record.exchange.load.sent_at if record.exchange and record.exchange.load else 0.0
