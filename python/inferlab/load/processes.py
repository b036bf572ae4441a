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
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from inferlab.load.plan import LoadPlan
from inferlab.load.results import Clock, Shard
from inferlab.load.runner import Ran, run_shard
from inferlab.records import RequestRecord

_START_S = 0.05
"""From when everybody is ready to the beginning of the load."""

_END_S = 5.0
"""How long a client process may take to end when it has said what it did."""


@dataclass
class Outcome:
    """What came of a load: ``ran`` has an entry for each client process."""

    records: list[RequestRecord] = field(default_factory=list)
    ran: list[Ran] = field(default_factory=list)

    @property
    def interrupted(self) -> bool:
        return any(ran.interrupted for ran in self.ran)


def run_load(
    plan: LoadPlan,
    processes: int = 1,
    keep: Callable[[RequestRecord], None] | None = None,
    warm: Callable[[], None] = lambda: None,
) -> Outcome:
    """Runs a load; in this process where one is enough. Ctrl-C ends it, and what came is kept.

    Args:
        processes: how many clients share it.
        keep: called with each record as soon as its request has ended.
        warm: called when the requests that do not count have ended, before the first that does.

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

    if processes == 1:
        outcome.ran.append(run_shard(plan, Shard(Clock.now()), take, warm=warm))
    else:
        _run_many(plan, processes, take, outcome, warm)
    outcome.records.sort(key=_sent_at)
    return outcome


def _run_many(
    plan: LoadPlan,
    processes: int,
    take: Callable[[RequestRecord], None],
    outcome: Outcome,
    warm: Callable[[], None],
) -> None:
    clock = Clock.now()
    pipes: list[Connection] = []
    workers: list[subprocess.Popen[bytes]] = []
    try:
        for index in range(processes):
            ours, theirs = multiprocessing.Pipe()
            pipes.append(ours)
            with theirs:
                workers.append(_start(theirs.fileno()))
            ours.send((plan, Shard(clock, index, processes)))
        with _on_interrupt(pipes):
            _gather(pipes, take, outcome, warm)
    finally:
        for pipe in pipes:
            pipe.close()
        for worker in workers:
            try:
                worker.wait(_END_S)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()


def _start(descriptor: int) -> subprocess.Popen[bytes]:
    """A client process that never hears of Ctrl-C: it is told to end."""
    words = [sys.executable, "-m", "inferlab.load.worker", str(descriptor)]
    with _interrupt(signal.SIG_IGN):
        return subprocess.Popen(words, pass_fds=[descriptor], stdin=subprocess.DEVNULL)


def _gather(
    pipes: list[Connection],
    take: Callable[[RequestRecord], None],
    outcome: Outcome,
    warm: Callable[[], None],
) -> None:
    """Begins the load when all are ready, and goes on until each has said what it did."""
    ready = 0
    running = dict(enumerate(pipes))
    while running:
        for pipe in wait(list(running.values())):
            message = _receive(pipe)
            if isinstance(message, RequestRecord):
                take(message)
            elif isinstance(message, Ran):
                outcome.ran.append(message)
                del running[message.index]
            else:
                ready += 1
                if ready == len(pipes):
                    warm()
                    _tell(pipes, time.perf_counter_ns() + int(_START_S * 1e9))
    outcome.ran.sort(key=lambda ran: ran.index)


def _tell(pipes: list[Connection], message: int | None) -> None:
    """When to begin, or that it is over."""
    for pipe in pipes:
        with contextlib.suppress(OSError):  # it has ended
            pipe.send(message)


def _receive(pipe: Any) -> Any:
    try:
        message = pipe.recv()
    except EOFError:
        raise RuntimeError("a client process of the load died") from None
    if isinstance(message, Exception):
        raise message
    return message


@contextlib.contextmanager
def _interrupt(handler: Any) -> Iterator[None]:
    """What Ctrl-C does meanwhile; where this is not the main thread, which alone hears of it,
    nothing changes."""
    try:
        before = signal.signal(signal.SIGINT, handler)
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _on_interrupt(pipes: list[Connection]) -> contextlib.AbstractContextManager[None]:
    """Ctrl-C tells all client processes to end; a second one ends the waiting for them, too."""

    def handle(number: int, _: object) -> None:
        signal.signal(number, signal.default_int_handler)
        _tell(pipes, None)

    return _interrupt(handle)


def _sent_at(record: RequestRecord) -> float:
    return record.exchange.load.sent_at if record.exchange and record.exchange.load else 0.0
