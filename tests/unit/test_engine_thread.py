"""The thread that makes an engine's steps: whose failure fails whom, and that nothing hangs."""

from __future__ import annotations

import threading
from collections import deque
from contextlib import contextmanager

import pytest

from inferlab import SpeculativePipeline
from inferlab.server.engine_thread import EngineThread, QueueFull, Ticket, Unavailable
from inferlab.specdec.emission import Emission

POISON = 499
"""A token id; what has it in its prompt is what steps fail by."""
LIMIT_S = 60


def make_pipeline(**settings):
    given = {"implementation": "fake", "draft_mode": "ngram", "controller": "fixed", **settings}
    return SpeculativePipeline(**given)


class Owner:
    """Who hands requests in, and waits until all have ended."""

    def __init__(self, pipeline, *prompts, max_tokens=24, **params):
        self.requests = [
            pipeline.request(list(prompt), max_tokens=max_tokens, ignore_eos=True, **params)
            for prompt in prompts
        ]
        self._woken = threading.Event()
        self.ticket = Ticket(self.requests, self._woken.set, streams=False)

    def ends(self):
        """How they ended."""
        assert self._woken.wait(LIMIT_S), "a request hangs"
        return [request.finish_reason for request in self.requests]

    def begins(self):
        """Waits until one has a token."""
        end = threading.Event()
        while not any(request.num_output for request in self.requests):
            assert not end.wait(0.001)


@contextmanager
def running(pipeline, **settings):
    engine = EngineThread(pipeline.engine, **settings)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


def fail_in(pipeline, method, fails):
    """Has a method of the engine raise where `fails`, which gets the running requests, says so."""
    engine = pipeline.engine
    original = getattr(engine, method)

    def failing(*args):
        if fails(engine.scheduler.running):
            raise RuntimeError("poisoned")
        return original(*args)

    setattr(engine, method, failing)


def poisoned(running):
    return any(POISON in request.prompt for request in running)


def expected(prompt, max_tokens=24):
    return make_pipeline().generate(list(prompt), max_tokens=max_tokens, ignore_eos=True)[
        "token_ids"
    ]


PROMPTS = [[330 + i, 340, 350 + i] for i in range(6)]


@pytest.mark.parametrize("method", ["_decode", "_read"])
def test_a_request_that_steps_fail_by_fails_alone(method):
    pipeline = make_pipeline()
    fail_in(pipeline, method, poisoned)
    with running(pipeline) as engine:
        owners = [Owner(pipeline, p) for p in (*PROMPTS[:3], [POISON, 330], *PROMPTS[3:])]
        for owner in owners:
            engine.submit(owner.ticket)
        ends = [owner.ends() for owner in owners]
        assert ends == [["length"]] * 3 + [["error"]] + [["length"]] * 3
        assert "RuntimeError: poisoned" in owners[3].requests[0].error
        assert engine.failure is None
        del owners[3]
        for owner, prompt in zip(owners, PROMPTS, strict=True):
            assert owner.requests[0].output == expected(prompt)
        later = Owner(pipeline, PROMPTS[0])
        engine.submit(later.ticket)
        assert later.ends() == ["length"]
        assert pipeline.engine.scheduler.max_batch == pipeline.config.max_batch
        assert (engine.num_running, engine.num_waiting, engine.pages_used) == (0, 0, 0)


def test_one_that_fails_late_in_a_long_text_is_told_from_those_behind_it():
    """Its text takes more steps to be read than a trial has, so it must be under trial as long."""
    pipeline = make_pipeline()
    long = [POISON, *range(330, 400)]
    fail_in(
        pipeline,
        "_decode",
        lambda running: any(POISON in r.prompt and r.num_output > 2 for r in running),
    )
    with running(pipeline) as engine:
        pipeline.engine.scheduler.read_tokens = 4
        owners = [Owner(pipeline, p) for p in (long, *PROMPTS)]
        for owner in owners:
            engine.submit(owner.ticket)
        assert [owner.ends() for owner in owners] == [["error"]] + [["length"]] * len(PROMPTS)


@pytest.mark.parametrize("method", ["_decode", "_read"])
def test_bad_requests_one_after_the_other_do_not_kill_the_engine(method):
    pipeline = make_pipeline()
    fail_in(pipeline, method, poisoned)
    with running(pipeline) as engine:
        for i in range(8):
            owner = Owner(pipeline, [POISON, 330 + i])
            engine.submit(owner.ticket)
            assert owner.ends() == ["error"]
        together = Owner(pipeline, *[[POISON, 330 + i] for i in range(8)], PROMPTS[0])
        engine.submit(together.ticket)
        assert together.ends() == ["error"] * 8 + ["length"]
        assert engine.failure is None


@pytest.mark.parametrize("method", ["_step", "_decode", "_read", "_restart_outgrown"])
def test_an_engine_whose_steps_fail_whoever_takes_part_is_dead(method):
    pipeline = make_pipeline()
    broken = threading.Event()
    fail_in(pipeline, method, lambda running: broken.is_set())
    with running(pipeline, max_waiting=100) as engine:
        going = [Owner(pipeline, p, max_tokens=3000) for p in PROMPTS]
        for owner in going:
            engine.submit(owner.ticket)
        for owner in going:
            owner.begins()
        broken.set()
        late = Owner(pipeline, PROMPTS[0])
        try:
            engine.submit(late.ticket)
            going.append(late)
        except Unavailable:
            pass  # it has died already
        assert {end for owner in going for end in owner.ends()} == {"error"}
        assert "poisoned" in engine.failure
        with pytest.raises(Unavailable, match="broken down"):
            engine.submit(Owner(pipeline, PROMPTS[0]).ticket)
        with pytest.raises(Unavailable):
            engine.check_taking()


def test_a_step_that_fails_once_fails_nobody():
    pipeline = make_pipeline()
    failures = iter([False] * 5 + [True])
    fail_in(pipeline, "_decode", lambda running: next(failures, False))
    with running(pipeline) as engine:
        owners = [Owner(pipeline, p) for p in PROMPTS]
        for owner in owners:
            engine.submit(owner.ticket)
        for owner, prompt in zip(owners, PROMPTS, strict=True):
            assert owner.ends() == ["length"]
            assert owner.requests[0].output == expected(prompt)


def test_a_text_that_cannot_be_decoded_fails_its_request_alone():
    """It fails where the request has left the scheduler already."""
    pipeline = make_pipeline()
    text = pipeline.engine._text

    def failing(request):
        if POISON in request.prompt:
            raise RuntimeError("no text")
        return text(request)

    pipeline.engine._text = failing
    with running(pipeline) as engine:
        owners = [Owner(pipeline, p) for p in (PROMPTS[0], [POISON, 330], PROMPTS[1])]
        for owner in owners:
            engine.submit(owner.ticket)
        assert [owner.ends() for owner in owners] == [["length"], ["error"], ["length"]]
        aborted = Owner(pipeline, [POISON, 331], max_tokens=3000)
        engine.submit(aborted.ticket)
        aborted.begins()
        engine.abort(aborted.requests)
        aborted.ends()
        assert engine.failure is None
        assert engine.pages_used == 0


def test_what_is_told_of_ends_may_fail():
    pipeline = make_pipeline()

    def on_finish(request):
        raise RuntimeError("no figures")

    with running(pipeline, on_finish=on_finish) as engine:
        owner = Owner(pipeline, *PROMPTS)
        engine.submit(owner.ticket)
        assert owner.ends() == ["length"] * len(PROMPTS)
        assert engine.failure is None


def test_a_ticket_is_open_until_its_last_emission_is_there():
    """Who takes what there is looks at `open` first, in another thread."""
    seen = []

    class Inbox(deque):
        def append(self, emission):
            seen.append(ticket.open)
            super().append(emission)

    pipeline = make_pipeline()
    ticket = Owner(pipeline, PROMPTS[0]).ticket
    ticket.inbox = Inbox()
    ticket.put(Emission(ticket.requests[0], [5], 0, finished=True))
    assert (seen, ticket.open) == ([1], 0)


def test_owners_are_woken_when_the_target_is_about_to_compute():
    """Woken earlier, they would take the interpreter from a step that needs it."""
    pipeline = make_pipeline(draft_mode="none")
    heard = []
    ended = threading.Event()
    forward = pipeline.engine.target.forward

    def noted(*args):
        heard.append("forward")
        return forward(*args)

    def wake():
        heard.append("wake")
        if ticket.open == 0:
            ended.set()

    pipeline.engine.target.forward = noted
    request = pipeline.request(list(PROMPTS[0]), max_tokens=8, ignore_eos=True)
    ticket = Ticket([request], wake, streams=True)
    with running(pipeline) as engine:
        engine.submit(ticket)
        assert ended.wait(LIMIT_S)
    assert heard == ["forward"] + ["wake", "forward"] * 7 + ["wake"]


def test_aborted_requests_leave_and_the_others_go_on():
    pipeline = make_pipeline()
    with running(pipeline) as engine:
        endless = Owner(pipeline, *PROMPTS, max_tokens=4000)
        engine.submit(endless.ticket)
        endless.begins()
        other = Owner(pipeline, PROMPTS[0])
        engine.submit(other.ticket)
        engine.abort(endless.requests)
        assert endless.ends() == ["aborted"] * len(PROMPTS)
        assert other.ends() == ["length"]
        assert engine.pages_used == 0


def test_more_than_may_run_and_wait_are_refused_at_once():
    pipeline = make_pipeline(max_batch=2)
    with running(pipeline, max_waiting=3) as engine:
        endless = [Owner(pipeline, p, max_tokens=4000) for p in PROMPTS[:5]]
        for owner in endless:
            engine.submit(owner.ticket)
        with pytest.raises(QueueFull, match="5 requests run or wait; 5 may"):
            engine.submit(Owner(pipeline, PROMPTS[0]).ticket)
        with pytest.raises(ValueError, match="6 choices"):
            engine.submit(Owner(pipeline, *PROMPTS).ticket)
        engine.abort(endless[0].requests)
        endless[0].ends()
        engine.submit(Owner(pipeline, PROMPTS[0]).ticket)


def test_the_end_aborts_what_runs_and_what_waits():
    pipeline = make_pipeline(max_batch=2)
    engine = EngineThread(pipeline.engine)
    engine.start()
    owners = [Owner(pipeline, p, max_tokens=4000) for p in PROMPTS]
    for owner in owners:
        engine.submit(owner.ticket)
    owners[0].begins()
    engine.drain()
    with pytest.raises(Unavailable, match="shutting down"):
        engine.submit(Owner(pipeline, PROMPTS[0]).ticket)
    engine.stop()
    assert [owner.ends() for owner in owners] == [["aborted"]] * len(PROMPTS)
    assert engine.pages_used == 0


def test_requests_that_cannot_run_are_refused_whole():
    pipeline = make_pipeline()
    with running(pipeline) as engine:
        with pytest.raises(ValueError, match="token id 9999"):
            engine.submit(Owner(pipeline, PROMPTS[0], [9999]).ticket)
        assert engine.num_waiting == 0
