"""One client process: conversations begin when they are due, their turns follow each other, and
every request becomes a record."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import resource
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

from inferlab.client.connection import MAX_RETRY_WAIT_S
from inferlab.load.arrivals import shard
from inferlab.load.failures import RequestFailure
from inferlab.load.plan import LoadPlan
from inferlab.load.results import Place, Shard, request_record
from inferlab.load.session import Attempt, LoadSession
from inferlab.records import RequestRecord

LAG_EVERY_S = 0.01
"""How often the lag of the event loop is sampled."""


@dataclass
class Ran:
    """What a client process did, beside the records that it gave away one by one.

    Attributes:
        index: of the process.
        loop_lag_ms: how much later than asked the event loop woke a task, every 10 ms; up to 1 ms
            of it is what its timers are rounded to.
        interrupted: Ctrl-C ended it.
        cpu_s, wall_s: processor time that the load took, and time.
    """

    index: int
    loop_lag_ms: list[float] = field(default_factory=list)
    interrupted: bool = False
    cpu_s: float = 0.0
    wall_s: float = 0.0


Keep = Callable[[RequestRecord], None]


def run_shard(
    plan: LoadPlan,
    part: Shard,
    keep: Keep,
    pipe: Connection | None = None,
    warm: Callable[[], None] = lambda: None,
) -> Ran:
    """Runs a part of a load to its end. Ctrl-C ends it: nothing more begins, and what is under way
    becomes records of the class "interrupted", with what came until then.

    Args:
        keep: called with each record as soon as its request has ended.
        pipe: to whoever runs the whole: it is told when this part is ready, and tells the
            ``time.perf_counter_ns()`` at which to begin, and None in place of Ctrl-C.
        warm: called before the load begins, where nobody else runs a part of it.
    """
    with _calm_collector(), _many_connections():
        return asyncio.run(_Runner(plan, part, keep, pipe, warm).run())


@contextlib.contextmanager
def _calm_collector() -> Iterator[None]:
    """What is there already is not searched for garbage meanwhile, and the rest less often: a
    search stops the event loop, for a tenth of a second where torch is loaded."""
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(5_000, 20, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


@contextlib.contextmanager
def _many_connections() -> Iterator[None]:
    """As many files may be open meanwhile as the system lets this process have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS has a bound of its own
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class _Runner:
    def __init__(
        self,
        plan: LoadPlan,
        part: Shard,
        keep: Keep,
        pipe: Connection | None,
        warm: Callable[[], None],
    ) -> None:
        self._plan, self._part, self._keep, self._pipe, self._warm = plan, part, keep, pipe, warm
        self._ran = Ran(part.index)
        self._tasks: list[asyncio.Future[None]] = []

    async def run(self) -> Ran:
        loop = asyncio.get_running_loop()
        self._begin: asyncio.Future[int] = loop.create_future()
        self._main = asyncio.current_task()
        if self._pipe is not None:
            loop.add_reader(self._pipe.fileno(), self._told)
        else:
            with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
                loop.add_signal_handler(signal.SIGINT, self._stop)  # only the main thread can
        cpu_s = time.process_time()
        async with LoadSession(self._plan.asking) as session:
            self._session = session
            lag: asyncio.Future[None] = loop.create_future()
            begun_ns = time.perf_counter_ns()
            try:
                await self._warm_up()
                await self._wait_until(await self._start())
                cpu_s, begun_ns = time.process_time(), self._start_ns
                lag = asyncio.ensure_future(self._sample_lag())
                if self._plan.arrivals.kind == "closed":
                    await self._closed()
                else:
                    await self._open()
            except asyncio.CancelledError:
                if not self._ran.interrupted:
                    raise
            finally:
                await self._end(lag)
        if self._pipe is not None:
            loop.remove_reader(self._pipe.fileno())
        self._ran.cpu_s = time.process_time() - cpu_s
        self._ran.wall_s = (time.perf_counter_ns() - begun_ns) / 1e9
        return self._ran

    def _stop(self) -> None:
        if self._ran.interrupted:
            raise KeyboardInterrupt
        self._ran.interrupted = True
        assert self._main is not None
        self._main.cancel()

    def _told(self) -> None:
        assert self._pipe is not None
        try:
            start_ns = self._pipe.recv()
        except EOFError:  # whoever would take the records has gone
            start_ns = None
            asyncio.get_running_loop().remove_reader(self._pipe.fileno())
        if start_ns is not None:
            self._begin.set_result(start_ns)
        elif not self._ran.interrupted:
            self._stop()

    async def _start(self) -> int:
        """When the load begins."""
        if self._pipe is None:
            await asyncio.to_thread(self._warm)
            self._start_ns = time.perf_counter_ns()
        else:
            self._pipe.send("ready")
            self._start_ns = await self._begin
        return self._start_ns

    async def _end(self, lag: asyncio.Future[None]) -> None:
        """Cancels what runs; each request under way keeps what it has."""
        for task in (lag, *self._tasks):
            task.cancel()
        await asyncio.gather(lag, *self._tasks, return_exceptions=True)

    async def _warm_up(self) -> None:
        asking = self._plan.asking
        first = self._plan.conversations
        for index in range(self._plan.warmup if self._part.index == 0 else 0):
            messages = [{"role": "user", "content": first[index % len(first)].turns[0].text}]
            attempt = await self._session.ask(asking.payload(messages, None))
            if attempt.failure is not None and attempt.failure.kind == "interrupted":
                raise asyncio.CancelledError

    async def _closed(self) -> None:
        users = self._plan.concurrency or 1
        if self._plan.count is not None:  # the others would have nothing to send
            users = min(users, self._plan.count)
        own = len(range(self._part.index, users, self._part.of))
        numbers = self._numbers()

        async def user() -> None:
            scheduled_ns = self._start_ns
            for number in numbers:
                if self._is_over(time.perf_counter_ns()):
                    return
                scheduled_ns = await self._converse(number, scheduled_ns)

        self._tasks = [asyncio.ensure_future(user()) for _ in range(own)]
        await asyncio.gather(*self._tasks)

    async def _open(self) -> None:
        part, limit = self._part, self._plan.concurrency
        own = None if limit is None else asyncio.Semaphore(
            max(1, len(range(part.index, limit, part.of)))
        )  # fmt: skip

        async def conversation(number: int, scheduled_ns: int) -> None:
            async with own or contextlib.nullcontext():
                await self._converse(number, scheduled_ns)

        times = shard(self._plan.arrivals.times(), part.index, part.of)
        for number, at_s in zip(self._numbers(), times, strict=False):
            scheduled_ns = self._start_ns + int(at_s * 1e9)
            if self._is_over(scheduled_ns):
                break
            await self._wait_until(scheduled_ns)
            self._tasks.append(asyncio.ensure_future(conversation(number, scheduled_ns)))
        await asyncio.gather(*self._tasks)

    def _numbers(self) -> Iterator[int]:
        """Of the conversations that this process begins."""
        return itertools.islice(
            itertools.count(), self._part.index, self._plan.count, self._part.of
        )

    def _is_over(self, at_ns: int) -> bool:
        duration_s = self._plan.duration_s
        return duration_s is not None and at_ns - self._start_ns >= duration_s * 1e9

    async def _converse(self, number: int, scheduled_ns: int) -> int:
        """Sends the turns of a conversation; returns when it ended. A turn that fails ends it."""
        plan = self._plan
        conversation = plan.conversations[number % len(plan.conversations)]
        messages: list[dict[str, str]] = []
        if conversation.system is not None:
            messages.append({"role": "system", "content": conversation.system})
        for place, turn in enumerate(conversation.turns):
            messages.append({"role": "user", "content": turn.text})
            payload = plan.asking.payload(messages, turn.max_tokens)
            first_ns = time.perf_counter_ns()
            attempt, tries = await self._ask(payload)
            record = request_record(
                attempt,
                plan.asking,
                payload,
                Place(number, place, conversation, scheduled_ns, first_ns, tries),
                self._part,
            )
            self._keep(record)
            scheduled_ns = attempt.ended_ns
            if attempt.failure is not None:
                if attempt.failure.kind == "interrupted":
                    raise asyncio.CancelledError
                break
            messages.append({"role": "assistant", "content": record.text})
        return scheduled_ns

    async def _ask(self, payload: dict[str, object]) -> tuple[Attempt, int]:
        """(the last try, how many there were). It knows what the last refusal asked for."""
        asking = self._plan.asking
        tries, retry_after_s = 0, None
        while True:
            tries += 1
            attempt = await self._session.ask(payload)
            asked_s = attempt.retry_after_s
            retry_after_s = attempt.retry_after_s = retry_after_s if asked_s is None else asked_s
            if not attempt.retryable or tries > asking.retries:
                return attempt, tries
            wait_s = asking.retry_delay_s * 2 ** (tries - 1)
            if asked_s is not None:
                wait_s = asked_s
            if wait_s > MAX_RETRY_WAIT_S:
                return attempt, tries
            try:
                await asyncio.sleep(wait_s)
            except asyncio.CancelledError:
                attempt.failure = RequestFailure("interrupted", "interrupted by Ctrl-C")
                return attempt, tries

    async def _wait_until(self, at_ns: int) -> None:
        while (left_s := (at_ns - time.perf_counter_ns()) / 1e9) > 0:
            await asyncio.sleep(left_s)

    async def _sample_lag(self) -> None:
        while True:
            asked_ns = time.perf_counter_ns() + int(LAG_EVERY_S * 1e9)
            await asyncio.sleep(LAG_EVERY_S)
            self._ran.loop_lag_ms.append(max(0.0, (time.perf_counter_ns() - asked_ns) / 1e6))
