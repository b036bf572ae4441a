"""Several threads, one engine: their requests run in one batch, whoever of them makes the steps."""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

from inferlab.models import use_threads_that_exist
from inferlab.scheduler import Request
from inferlab.specdec.emission import Emission

if TYPE_CHECKING:
    from inferlab.specdec.engine import Engine


class Turns:
    """Lets callers from any thread run requests.

    A caller that waits for tokens makes the next step if nobody else does; what the step gives to
    others' requests is put where they look. So a caller that stops asking holds up nobody.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine_ref = weakref.ref(engine)  # whose cache is large: it goes when nobody has it
        self._process = os.getpid()
        self._changed = threading.Condition()
        self._stepping = False
        self._new: list[Request] = []  # to be added before the next step
        self._ended: list[tuple[Request, str]] = []  # to be aborted before the next step
        self._inboxes: dict[Request, deque[Emission]] = {}

    @property
    def _engine(self) -> Engine:
        engine = self._engine_ref()
        assert engine is not None, "the engine runs its turns"
        return engine

    def run(self, requests: Sequence[Request]) -> Generator[Emission]:
        """Runs requests and yields what they get, as it comes; closing it aborts the rest.

        Raises:
            ValueError: one of the requests can not run (see `Engine.check`); none has run then.
            RuntimeError: in a child of `fork` that cannot go on with what it was given.
        """
        self._enter_process()
        for request in requests:
            self._engine.check(request)
        inbox: deque[Emission] = deque()
        with self._changed:
            self._inboxes.update((request, inbox) for request in requests)
            self._new += requests
        reason = "error"
        try:
            open_ = dict.fromkeys(requests)
            while open_:
                # What an interrupt of somebody's kept from being delivered is made up for.
                for emission in self._wait(inbox) or [Emission.of(r) for r in open_ if r.finished]:
                    if emission.finished:
                        open_.pop(emission.request, None)
                    yield emission
        except GeneratorExit:
            reason = "aborted"
            raise
        except KeyboardInterrupt:
            reason = "interrupted"
            raise
        finally:
            self._leave(requests, reason)

    def _wait(self, inbox: deque[Emission]) -> list[Emission]:
        """What there is in the inbox, after a step of somebody's."""
        with self._changed:
            while not inbox and self._stepping:
                self._changed.wait()
            if inbox:
                return _emptied(inbox)
            self._stepping = True
        try:
            with self._changed:
                self._take_in()
            emissions = self._engine.step()
        except BaseException:
            self._engine.recover()
            emissions = []
            raise
        finally:
            with self._changed:
                self._deliver(emissions)
                self._stepping = False
                self._changed.notify_all()
                self._take_in()
        return _emptied(inbox)

    def _leave(self, requests: Sequence[Request], reason: str) -> None:
        """Aborts what has not ended."""
        with self._changed:
            gone = set(requests)
            self._new = [r for r in self._new if r not in gone]
            self._ended += [(r, reason) for r in requests if not r.finished]
            for request in requests:
                self._inboxes.pop(request, None)
            if not self._stepping:
                self._take_in()

    def _take_in(self) -> None:
        """What came while nobody could touch the engine."""
        while self._new:
            self._engine.add(self._new.pop(0))
        while self._ended:
            request, reason = self._ended.pop(0)
            self._engine.abort(request.request_id, reason)
            request.finish_reason = request.finish_reason or reason  # was never added

    def _deliver(self, emissions: list[Emission]) -> None:
        for emission in emissions:
            inbox = self._inboxes.get(emission.request)
            if inbox is not None:
                inbox.append(emission)

    def _enter_process(self) -> None:
        """Makes the engine usable in a child of `fork`, or says that it is not."""
        use_threads_that_exist()
        if self._process == os.getpid():
            return
        device = self._engine.target.device
        if device.type != "cpu" or self._stepping:
            what = (
                "is in the middle of a step"
                if device.type == "cpu"
                else f"has its model on {device}"
            )
            raise RuntimeError(
                f"this process was forked from one whose engine {what}, and cannot use it; load "
                f"the model in the child, or start it with multiprocessing's 'spawn'"
            )
        self._process = os.getpid()
        self._changed = threading.Condition()


def _emptied(inbox: deque[Emission]) -> list[Emission]:
    return [inbox.popleft() for _ in range(len(inbox))]
