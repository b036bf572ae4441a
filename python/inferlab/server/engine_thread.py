"""One engine, one thread that makes its steps: others hand in requests and are told what they got.

Nothing here knows HTTP or asyncio; whoever hands in requests says how it is to be woken.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from inferlab.models import use_threads_that_exist
from inferlab.scheduler import Request
from inferlab.specdec.emission import Emission
from inferlab.specdec.engine import Engine

log = logging.getLogger(__name__)

TRIAL_STEPS = 4
"""Steps for which a request that took part in a step that failed runs as the newest of the batch.
What fails meanwhile fails by it."""
FAILURES_IN_A_ROW = 3
"""So many requests that fail one after the other, without a step that works between them, mean that
it is not the requests."""


class Refused(Exception):
    """A request cannot be taken in now; it may be tried again elsewhere, or later."""


class QueueFull(Refused):
    """As many requests wait as may wait."""


class Unavailable(Refused):
    """The engine is ending, or has broken down."""


class Ticket:
    """Requests that were handed in together, and what they got.

    Attributes:
        inbox: what they got and nobody has taken yet, in order.
        streams: whether the owner wants to know of each step, or of the end alone.
    """

    def __init__(self, requests: Sequence[Request], wake: Callable[[], None], streams: bool):
        self.requests = list(requests)
        self.streams = streams
        self.inbox: deque[Emission] = deque()
        self.wake = wake
        self.open = len(self.requests)

    def put(self, emission: Emission) -> None:
        """Takes what a request got, and wakes the owner where that is of interest."""
        self.open -= emission.finished
        self.inbox.append(emission)
        if self.streams or self.open == 0:
            self.wake()


class EngineThread:
    """Runs an engine, which nobody else may touch from `start` to `stop`.

    A step that fails fails the request that it fails by, alone. An engine whose steps fail whoever
    takes part is dead: all its requests end with an error, and no new ones are taken.

    Args:
        engine: it should be idle.
        max_waiting: requests that may wait for their turn; more are refused.
        on_finish: told of each request that has ended, in the engine's thread.
    """

    def __init__(
        self,
        engine: Engine,
        max_waiting: int = 1024,
        on_finish: Callable[[Request], None] = lambda request: None,
    ) -> None:
        self._engine = engine
        self._max_batch = engine.scheduler.max_batch
        self._max_waiting = max_waiting
        self._on_finish = on_finish
        self._changed = threading.Condition()
        self._new: deque[Request] = deque()
        self._ended: list[tuple[Request, str]] = []
        self._tickets: dict[Request, Ticket] = {}
        self._draining = False
        self._stopping = False
        self._failure: str | None = None
        self._trial = 0  # steps left for the newest of the batch to prove itself
        self._failed_in_a_row = 0
        self._thread = threading.Thread(target=self._run, name="inferlab-engine", daemon=True)

    def start(self) -> None:
        """Begins to make steps."""
        self._thread.start()

    def submit(self, ticket: Ticket) -> None:
        """Hands in requests.

        Raises:
            ValueError: one of them can not run (see `Engine.check`); none runs then.
            QueueFull, Unavailable: they are not taken in.
        """
        for request in ticket.requests:
            self._engine.check(request)
        with self._changed:
            self._require_taking()
            waiting = self.num_waiting
            if waiting + len(ticket.requests) > self._max_waiting:
                raise QueueFull(f"{waiting} requests are waiting; {self._max_waiting} may")
            for request in ticket.requests:
                self._tickets[request] = ticket
            self._new += ticket.requests
            self._changed.notify_all()

    def abort(self, requests: Iterable[Request], reason: str = "aborted") -> None:
        """Ends requests that have not ended; their pages are free before the next step."""
        with self._changed:
            self._ended += [(request, reason) for request in requests]
            self._changed.notify_all()

    def check_taking(self) -> None:
        """Raises Unavailable where `submit` would."""
        with self._changed:
            self._require_taking()

    def _require_taking(self) -> None:
        if self._failure is not None:
            raise Unavailable(f"the engine has broken down: {self._failure}")
        if self._draining or not self._thread.is_alive():
            raise Unavailable("the server is shutting down")

    @property
    def failure(self) -> str | None:
        """Why the engine is dead; None: it is not."""
        if self._failure is None and not self._stopping and not self._thread.is_alive():
            return "its thread has ended"
        return self._failure

    @property
    def num_waiting(self) -> int:
        """Requests that have no pages yet."""
        return len(self._new) + len(self._engine.scheduler.waiting)

    @property
    def num_running(self) -> int:
        """Requests in the batch."""
        return len(self._engine.scheduler.running)

    @property
    def pages_used(self) -> float:
        """The share of the K/V pages that requests hold."""
        pages = self._engine.scheduler.allocator
        return 1 - pages.num_free / pages.num_pages

    def drain(self) -> None:
        """Takes no new requests; those that are there go on."""
        with self._changed:
            self._draining = True

    def stop(self) -> None:
        """Ends all requests as aborted, and the thread."""
        with self._changed:
            self._draining = self._stopping = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        use_threads_that_exist()
        try:
            while self._wait():
                self._deliver(self._step())
        except BaseException as error:  # also what is no Exception: nothing may hang
            log.exception("the engine has broken down")
            self._die(error)

    def _wait(self) -> bool:
        """Takes in what there is to do; False at the end of all."""
        with self._changed:
            while not (
                self._new or self._ended or self._stopping or self._engine.scheduler.has_work
            ):
                self._changed.wait()
            new, self._new = self._new, deque()
            ended, self._ended = self._ended, []
            if self._stopping:
                ended += [(request, "aborted") for request in self._tickets]
        for request in new:
            try:
                self._engine.add(request)
            except Exception as error:
                self._fail(request, error)
        for request, reason in ended:
            if not request.finished and self._engine.abort(request.request_id, reason):
                self._deliver([Emission.of(request)])
        return not self._stopping

    def _step(self) -> list[Emission]:
        """A step of the engine, or what became of one that failed."""
        scheduler = self._engine.scheduler
        try:
            emissions = self._engine.step()
        except Exception as error:
            log.exception("a step failed")
            newest = scheduler.running[-1] if scheduler.running else None
            blamed = newest if self._trial > 0 or len(scheduler.running) == 1 else None
            self._engine.recover()
            scheduler.max_batch, self._trial = 1, TRIAL_STEPS
            if blamed is not None or newest is None:
                self._failed_in_a_row += 1
                if self._failed_in_a_row >= FAILURES_IN_A_ROW:
                    raise
            if blamed is not None:
                self._fail(blamed, error)
            return []
        self._failed_in_a_row = 0
        if scheduler.max_batch < self._max_batch:
            self._trial -= 1
            if self._trial <= 0 and not scheduler.waiting:
                scheduler.max_batch, self._trial = self._max_batch, 0
            elif self._trial <= 0:
                scheduler.max_batch, self._trial = scheduler.max_batch + 1, TRIAL_STEPS
        return emissions

    def _fail(self, request: Request, error: BaseException) -> None:
        request.error = f"{type(error).__name__}: {error}"
        if self._engine.abort(request.request_id, "error") is None:
            request.finish_reason = "error"
        self._deliver([Emission.of(request)])

    def _deliver(self, emissions: Iterable[Emission]) -> None:
        for emission in emissions:
            request = emission.request
            if emission.finished:
                ticket = self._tickets.pop(request, None)
                self._on_finish(request)
            else:
                ticket = self._tickets.get(request)
            if ticket is not None:
                ticket.put(emission)

    def _die(self, error: BaseException) -> None:
        with self._changed:
            self._failure = f"{type(error).__name__}: {error}"
            left = list(self._tickets)
            self._new.clear()
        for request in left:
            request.finish_reason = "error"
            request.error = f"the engine has broken down: {self._failure}"
            self._deliver([Emission.of(request)])
