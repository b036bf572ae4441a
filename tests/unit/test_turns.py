"""Requests that come and go: steps by hand, streams of tokens, several threads, interrupts."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from inferlab.models import FakeLM
from inferlab.scheduler import Request
from inferlab.specdec.controllers import FixedController
from inferlab.specdec.drafters import ModelDrafter, NgramDrafter
from inferlab.specdec.engine import Engine
from inferlab.specdec.policies import Policy
from inferlab.specdec.tree import TreeShape
from inferlab.types import SamplingParams

PAGES = 64
PROMPTS = [[300 + i for i in range(3)], [260], [270 + i % 60 for i in range(50)], [5, 6, 300, 301]]
PARAMS = SamplingParams(max_tokens=24, temperature=0.8, seed=5)


def make_engine(drafter: str = "vanilla", **options) -> Engine:
    target = FakeLM(seed=3)
    draft = FakeLM(seed=3, agreement=0.7)
    made = {
        "none": lambda: None,
        "vanilla": lambda: ModelDrafter(draft, draft.new_cache(PAGES), TreeShape.chain(3)),
        "ngram": lambda: NgramDrafter(4),
    }[drafter]()
    return Engine(target, target.new_cache(PAGES), Policy(), FixedController(4), made, **options)


@pytest.fixture(scope="module")
def expected():
    engine = make_engine("none", max_batch=1)
    return [r.token_ids for r in engine.generate([(p, PARAMS) for p in PROMPTS])]


def free_pages(engine):
    return engine.scheduler.allocator.num_free


def test_steps_by_hand(expected):
    engine = make_engine()
    requests = [engine.add(Request(p, PARAMS)) for p in PROMPTS[:2]]
    told = {r: [] for r in requests}
    while engine.scheduler.has_work:
        for emission in engine.step():
            assert not emission.request.finished or emission.finished
            assert 0 <= emission.drafted <= len(emission.tokens)
            told[emission.request] += emission.tokens
        if len(requests) < 4:
            requests.append(engine.add(Request(PROMPTS[len(requests)], PARAMS)))
            told[requests[-1]] = []
    assert [told[r] for r in requests] == expected
    assert [r.finish_reason for r in requests] == ["length"] * 4
    assert free_pages(engine) == PAGES


def test_several_texts_are_read_in_one_forward_which_gives_their_first_tokens(expected):
    engine = make_engine()
    requests = [engine.add(Request(p, PARAMS)) for p in PROMPTS]
    emissions = engine.step()
    assert [e.request for e in emissions] == requests
    assert all(e.tokens for e in emissions)
    assert [r.stats.prefill_forwards for r in requests] == [0, 0, 0, 0]


def test_texts_are_read_beside_others_that_decode(expected):
    engine = make_engine()
    engine.scheduler.read_tokens = 7
    requests = [engine.add(Request(p, PARAMS)) for p in PROMPTS]
    first = engine.step()
    # 2 of 2 and 0 of 0 tokens are read, and 5 of 49.
    assert [e.request for e in first] == requests[:2]
    assert [r.num_cached for r in requests[2:]] == [5, 0]
    tokens = {r: [] for r in requests}
    emissions = first
    while True:
        for emission in emissions:
            tokens[emission.request] += emission.tokens
        if not engine.scheduler.has_work:
            break
        emissions = engine.step()
    assert [tokens[r] for r in requests] == expected
    assert [r.stats.prefill_forwards for r in requests] == [0, 0, 7, 0]


def test_where_nothing_is_drafted_reading_and_decoding_share_a_forward(expected):
    engine = make_engine("none")
    rows = []
    forward = engine.target.forward

    def counted(batch, *args):
        rows.append(batch.tokens.shape)
        return forward(batch, *args)

    engine.target.forward = counted
    first = engine.add(Request(PROMPTS[0], PARAMS))
    engine.step()
    second = engine.add(Request(PROMPTS[2], PARAMS))
    engine.step()
    assert len(rows) == 2
    assert (first.num_output, second.num_output) == (2, 1)
    while engine.scheduler.has_work:
        engine.step()
    assert [first.output, second.output] == [expected[0], expected[2]]


def test_aborting_gives_the_pages_back_at_once(expected):
    engine = make_engine()
    requests = [engine.add(Request(p, PARAMS)) for p in PROMPTS[:3]]
    engine.step()
    emission = engine.abort(requests[0].request_id)
    assert emission is not None
    assert emission.finished
    assert requests[0].finish_reason == "aborted"
    assert requests[0].pages == []
    assert engine.abort(requests[0].request_id) is None
    while engine.scheduler.has_work:
        engine.step()
    assert [r.output for r in requests[1:]] == expected[1:3]
    kept = requests[0].output
    assert 0 < len(kept) < 24
    assert kept == expected[0][: len(kept)]
    waiting = engine.add(Request(PROMPTS[0], PARAMS))
    assert engine.abort(waiting.request_id, "interrupted").request.output == []
    assert waiting.finish_reason == "interrupted"
    assert free_pages(engine) == PAGES


@pytest.mark.parametrize("drafter", ["none", "vanilla", "ngram"])
def test_streams_end_when_they_are_closed(drafter, expected):
    engine = make_engine(drafter)
    requests = [Request(p, PARAMS) for p in PROMPTS]
    emissions = engine.run(requests)
    seen = [next(emissions) for _ in range(6)]
    emissions.close()
    assert {r.finish_reason for r in requests} == {"aborted"}
    assert free_pages(engine) == PAGES
    for request, tokens in zip(requests, expected, strict=True):
        told = [t for e in seen if e.request is request for t in e.tokens]
        assert told == tokens[: len(told)]
    assert [r.token_ids for r in engine.generate([(p, PARAMS) for p in PROMPTS])] == expected


def test_threads_share_the_batch(expected):
    engine = make_engine()
    together = []
    step = engine.step

    def watched():
        together.append(len(engine.scheduler.running))
        return step()

    engine.step = watched
    barrier = threading.Barrier(4)

    def run(index):
        barrier.wait()
        got = []
        for emission in engine.run([Request(PROMPTS[index], PARAMS)]):
            got += emission.tokens
        return got

    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            assert list(pool.map(run, range(4))) == expected
    assert max(together) > 1
    assert free_pages(engine) == PAGES


def test_a_stream_that_nobody_reads_holds_up_nobody(expected):
    engine = make_engine()
    slow = engine.run([Request(PROMPTS[0], PARAMS)])
    got = list(next(slow).tokens)
    with ThreadPoolExecutor(1) as pool:
        (other,) = pool.submit(engine.generate, [(PROMPTS[2], PARAMS)]).result(timeout=60)
    assert other.token_ids == expected[2]
    for emission in slow:
        got += emission.tokens
    assert got == expected[0]


def test_a_callback_may_generate(expected):
    engine = make_engine()
    inner = []

    def finish(index, result):
        if index == 0:
            inner.extend(engine.generate([(PROMPTS[1], PARAMS)]))

    results = engine.generate([(p, PARAMS) for p in PROMPTS], finish)
    assert [r.token_ids for r in results] == expected
    assert inner[0].token_ids == expected[1]


class FailingOnce(FakeLM):
    fail_at = 9
    calls = 0

    def forward(self, batch, cache, layers=()):
        self.calls += 1
        if self.calls == self.fail_at:
            raise OSError("a cable was pulled")
        return super().forward(batch, cache, layers)


@pytest.mark.parametrize("fail_at", range(1, 10))
def test_a_step_that_fails_costs_others_time_and_nothing_else(fail_at, expected):
    target = FailingOnce(seed=3)
    target.fail_at = fail_at
    draft = FakeLM(seed=3, agreement=0.7)
    drafter = ModelDrafter(draft, draft.new_cache(PAGES), TreeShape.chain(3))
    engine = Engine(target, target.new_cache(PAGES), Policy(), FixedController(3), drafter)
    bystander = engine.run([Request(PROMPTS[2], PARAMS)])
    got = list(next(bystander).tokens) if fail_at > 2 else []
    failed = False
    try:
        engine.generate([(p, PARAMS) for p in PROMPTS])
    except OSError:
        failed = True
    try:
        for emission in bystander:
            got += emission.tokens
    except OSError:
        failed = True
        assert fail_at <= 2 or len(got) > 0
    else:
        assert got == expected[2]
    assert failed
    assert free_pages(engine) == PAGES
    assert [r.token_ids for r in engine.generate([(p, PARAMS) for p in PROMPTS])] == expected


def test_what_can_not_run_is_refused_before_anything_runs():
    engine = make_engine()
    with pytest.raises(ValueError, match="prompt is empty"):
        next(engine.run([Request(PROMPTS[0], PARAMS), Request([], PARAMS)]))
    assert not engine.scheduler.has_work
