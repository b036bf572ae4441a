"""One engine, one thread that makes its steps: others hand in requests and are told what they got.

Nothing here knows HTTP or asyncio; whoever hands in requests says how it is to be woken.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from inferlab.models import use_threads_that_exist
from inferlab.scheduler import READ_BESIDE, Request
from inferlab.specdec.emission import Emission
from inferlab.specdec.engine import Engine
from inferlab.types import SamplingParams

log = logging.getLogger(__name__)

TRIAL_STEPS = 4
"""Steps that must give a token to a request that took part in one that failed, with no other such
request beside it, until it is trusted again. What fails meanwhile fails by it."""


PROBE = SamplingParams(max_tokens=4, ignore_eos=True)


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

    def put(self, emission: Emission) -> bool:
        """Takes what a request got; whether that is of interest to the owner."""
        self.inbox.append(emission)
        self.open -= emission.finished  # behind it: who sees that none is open sees all they got
        return self.streams or self.open == 0


class EngineThread:
    """Runs an engine, which nobody else may touch from `start` to `stop`.

    A step that fails fails the request that it fails by, alone: those that took part are read anew,
    one by one. An engine that cannot make a step for a request of its own either is dead: all its
    requests end with an error, and no new ones are taken.

    Args:
        engine: it should be idle.
        max_waiting: requests that may wait beside a full batch; more are refused.
        on_finish: told of each request that has ended, in the engine's thread.
        read_beside: of a model on a CPU, see `inferlab.scheduler.Scheduler`.
    """

    def __init__(
        self,
        engine: Engine,
        max_waiting: int = 1024,
        on_finish: Callable[[Request], None] = lambda request: None,
        read_beside: int = READ_BESIDE,
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
        self._suspects: dict[Request, int] = {}  # steps until each is trusted again
        self._told: list[Ticket] = []  # whose owners are to be woken
        engine.before_forward = self._wake_owners
        if engine.target.device.type == "cpu":
            engine.scheduler.read_beside = read_beside
        self._thread = threading.Thread(target=self._run, name="inferlab-engine", daemon=True)

    def start(self) -> None:
        """Begins to make steps."""
        self._thread.start()

    def submit(self, ticket: Ticket) -> None:
        """Hands in requests.

        Raises:
            ValueError: one of them can not run (see `Engine.check`), or they are more than there is
                ever room for; none runs then.
            QueueFull, Unavailable: they are not taken in.
        """
        most = self._max_batch + self._max_waiting
        if len(ticket.requests) > most:
            raise ValueError(
                f"{len(ticket.requests)} choices are asked for; there is room for {most}"
            )
        for request in ticket.requests:
            self._engine.check(request)
        with self._changed:
            self._require_taking()
            if len(self._tickets) + len(ticket.requests) > most:
                raise QueueFull(f"{len(self._tickets)} requests run or wait; {most} may")
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
        return max(len(self._tickets) - self.num_running, 0)

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

    def end(self) -> None:
        """Has all requests end as aborted, and then the thread; does not wait for it."""
        with self._changed:
            self._draining = self._stopping = True
            self._changed.notify_all()

    def stop(self) -> None:
        """Ends all requests as aborted, and the thread."""
        self.end()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        try:
            use_threads_that_exist()
            while self._wait():
                emissions = self._step()
                self._wake_owners()  # of the step before, where this one had no forward
                self._deliver(emissions)
        except BaseException as error:  # also what is no Exception: nothing may hang
            log.exception("the engine has broken down")
            self._die(error)
        self._wake_owners()

    def _wait(self) -> bool:
        """Takes in what there is to do; False at the end of all."""
        if not self._engine.scheduler.has_work:
            self._wake_owners()
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
            if request in self._tickets:
                self._end(request, reason)
        return not self._stopping

    def _step(self) -> list[Emission]:
        """A step of the engine, or what became of one that failed."""
        try:
            emissions = self._engine.step()
        except Exception as error:
            log.exception("a step failed")
            self._after_failure(error)
            return []
        if self._suspects:
            self._trust(emissions)
        return emissions

    def _after_failure(self, error: Exception) -> None:
        """Fails the request that a step failed by, if that is known, or begins to find it out."""
        scheduler = self._engine.scheduler
        there = [*scheduler.running] or list(scheduler.waiting)[: scheduler.max_batch]
        going = [request for request in there if not request.finished]
        suspects = [request for request in going if request in self._suspects] or going
        self._engine.recover()
        with self._changed:
            ended = [request for request in self._tickets if request.finished]
        lost = [request for request in ended if request not in scheduler.waiting]
        if not there and not lost:
            raise error
        for request in lost:
            self._conclude(request)
        if len(suspects) == 1 and not lost:
            self._suspects.pop(suspects[0], None)
            self._fail(suspects[0], error)
            self._probe()
        else:
            self._suspects |= dict.fromkeys(suspects, TRIAL_STEPS)
        scheduler.max_batch = 1 if self._suspects else self._max_batch

    def _conclude(self, request: Request) -> None:
        """Tells of a request that ended in a step which failed before it told of it."""
        try:
            request.text = self._engine.result(request).text
        except Exception as error:
            self._fail(request, error)
        else:
            self._deliver([Emission.of(request)])

    def _probe(self) -> None:
        """Steps for a request of the engine's own. What they raise, the engine is dead by."""
        scheduler = self._engine.scheduler
        others, scheduler.waiting = scheduler.waiting, []
        probe = self._engine.add(Request([0], PROBE))
        while not probe.finished:
            self._engine.step()
        scheduler.waiting = others

    def _trust(self, emissions: Iterable[Emission]) -> None:
        """Those that got on; the next suspect may join once no other is in the batch."""
        scheduler = self._engine.scheduler
        for emission in emissions:
            if emission.tokens and emission.request in self._suspects:
                self._suspects[emission.request] -= 1
        self._suspects = {
            request: left
            for request, left in self._suspects.items()
            if left > 0 and request in self._tickets and not request.finished
        }
        if not self._suspects:
            scheduler.max_batch = self._max_batch
        elif not any(request in self._suspects for request in scheduler.running):
            scheduler.max_batch = len(scheduler.running) + 1

    def _fail(self, request: Request, error: BaseException) -> None:
        request.error = f"{type(error).__name__}: {error}"
        request.finish_reason = "error"
        self._end(request, "error")

    def _end(self, request: Request, reason: str) -> None:
        """Takes a request out of the engine and tells its owner."""
        try:
            self._engine.abort(request.request_id, reason)
        except Exception:
            log.exception("a request could not be ended properly")
        request.finish_reason = request.finish_reason or reason
        self._deliver([Emission.of(request)])

    def _deliver(self, emissions: Iterable[Emission]) -> None:
        for emission in emissions:
            request = emission.request
            if emission.finished:
                ticket = self._tickets.pop(request, None)
            else:
                ticket = self._tickets.get(request)
            if ticket is None:
                continue
            if emission.finished:
                try:
                    self._on_finish(request)
                except Exception:
                    log.exception("the end of a request could not be noted")
            if ticket.put(emission):
                self._told.append(ticket)

    def _wake_owners(self) -> None:
        told, self._told = self._told, []
        for ticket in told:
            ticket.wake()

    def _die(self, error: BaseException) -> None:
        with self._changed:
            self._failure = f"{type(error).__name__}: {error}"
            left = list(self._tickets)
            self._new.clear()
        for request in left:
            request.finish_reason = "error"
            request.error = f"the engine has broken down: {self._failure}"
            self._deliver([Emission.of(request)])
