"""Pages and the choice of the batch."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from inferlab.scheduler import PageAllocator, Request, Scheduler
from inferlab.scheduler.scheduler import MAX_OVERTAKEN, share_out
from inferlab.types import SamplingParams


def request_of(request_id: int, prompt: int, max_tokens: int) -> Request:
    return Request([1] * prompt, SamplingParams(max_tokens=max_tokens), request_id=request_id)


def test_pages_are_handed_out_once_and_reused():
    pages = PageAllocator(8, 4)
    first = pages.allocate(5)
    second = pages.allocate(3)
    assert sorted(first + second) == list(range(8))
    pages.release(first)
    assert sorted(pages.allocate(5)) == sorted(first)
    assert pages.num_free == 0


def test_running_out_of_pages_says_how_many_were_needed():
    pages = PageAllocator(4, 4)
    pages.allocate(3)
    with pytest.raises(RuntimeError, match=r"2 needed, 1 of 4 free"):
        pages.allocate(2)


@pytest.mark.parametrize("bad", [[7], [-1], [0]])
def test_releasing_a_page_twice_is_refused(bad):
    pages = PageAllocator(4, 4)
    pages.allocate(2)
    pages.release([0])
    with pytest.raises(ValueError, match="not allocated"):
        pages.release(bad)


@pytest.mark.parametrize(("count", "size"), [(0, 16), (4, 3), (4, 0)])
def test_bad_pools_are_refused(count, size):
    with pytest.raises(ValueError, match=r"num_pages|page_size"):
        PageAllocator(count, size)


def test_a_request_that_never_fits_is_refused_with_the_numbers():
    scheduler = Scheduler(PageAllocator(4, 16), max_batch=2, tree_slots=5)
    with pytest.raises(ValueError, match=r"needs 7 K/V pages of 16 .* the cache has 4"):
        scheduler.add(request_of(0, 40, 64))


def test_first_come_first_served_and_waiting_for_pages():
    scheduler = Scheduler(PageAllocator(8, 16), max_batch=8, tree_slots=1)
    requests = [request_of(0, 60, 35), request_of(1, 40, 20), request_of(2, 1, 8)]
    for request in requests:
        scheduler.add(request)
    assert scheduler.plan().admitted == requests[:2]
    # 4 + 3 pages are taken; the last one stays free for those that run.
    assert scheduler.allocator.num_free == 1
    requests[0].finish_reason = "length"
    assert scheduler.retire() == [requests[0]]
    assert scheduler.plan().admitted == [requests[2]]
    assert scheduler.running == requests[1:]


def read_on(plan, token=5):
    """What an engine does of a plan: one token for each that decodes or is read to its root."""
    for chunk in plan.chunks:
        chunk.request.num_cached = chunk.stop
    for request in (*plan.started, *plan.decode):
        request.tokens.append(token)
        request.num_cached = len(request.tokens) - 1


def test_pages_are_taken_as_they_are_needed():
    scheduler = Scheduler(PageAllocator(64, 4), max_batch=8, tree_slots=3)
    request = request_of(0, 6, 200)
    scheduler.add(request)
    held = []
    for _ in range(40):
        read_on(scheduler.plan())
        assert len(request.pages) * 4 >= len(request.tokens) - 1 + 3 - 1
        held.append(len(request.pages))
    assert held[0] == 2
    assert held == sorted(held)
    assert held[-1] < scheduler.pages_needed(request)


def test_without_pages_the_last_in_order_gives_up_its_own():
    scheduler = Scheduler(PageAllocator(8, 4), max_batch=8, tree_slots=1)
    first, second = request_of(0, 8, 23), request_of(1, 8, 20)
    for request in (first, second):
        scheduler.add(request)
    preempted = []
    for _ in range(60):
        plan = scheduler.plan()
        preempted += plan.preempted
        assert not set(plan.preempted) & {*plan.decode, *(c.request for c in plan.chunks)}
        read_on(plan)
        for request in (first, second):
            if request.remaining == 0:
                request.finish_reason = "length"
        scheduler.retire()
        if not scheduler.has_work:
            break
    assert set(preempted) == {second}
    assert second.num_preempted == len(preempted)
    assert first.num_preempted == 0
    assert first.finished
    assert second.finished
    assert scheduler.allocator.num_free == 8


def test_priorities_go_first_but_not_for_ever():
    scheduler = Scheduler(PageAllocator(256, 16), max_batch=1, tree_slots=1)
    patient = request_of(0, 3, 1)
    patient.priority = 5
    scheduler.add(patient)
    served = []
    for number in range(1, 100):
        scheduler.add(request_of(number, 3, 1))
        (admitted,) = scheduler.plan().admitted
        served.append(admitted.request_id)
        admitted.finish_reason = "length"
        scheduler.retire()
    assert served[:3] == [1, 2, 3]
    assert served.index(0) == MAX_OVERTAKEN


def test_those_whose_time_is_over_end_waiting_or_running():
    scheduler = Scheduler(PageAllocator(64, 16), max_batch=1, tree_slots=1)
    requests = [request_of(i, 3, 3) for i in range(3)]
    requests[0].deadline, requests[1].deadline = 20.0, 10.0
    for request in requests:
        scheduler.add(request)
    scheduler.plan()
    scheduler.expire(9.0)
    assert scheduler.retire() == []
    scheduler.expire(25.0)
    assert set(scheduler.retire()) == set(requests[:2])
    assert [r.finish_reason for r in requests] == ["deadline", "deadline", None]


def sharing(pages=64, size=4, **settings):
    allocator = PageAllocator(pages, size)
    return Scheduler(allocator, max_batch=8, tree_slots=1, shares=True, **settings)


def test_texts_that_begin_alike_share_full_pages():
    scheduler = sharing()
    first = Request(list(range(14)), SamplingParams(max_tokens=4))
    scheduler.add(first)
    read_on(scheduler.plan())
    scheduler.plan()  # says of the pages what they hold
    same = Request(list(range(14)), SamplingParams(max_tokens=4))
    fork = Request([*range(8), 99, *range(9, 14)], SamplingParams(max_tokens=4))
    other = Request([7, *range(1, 14)], SamplingParams(max_tokens=4))
    for request in (same, fork, other):
        scheduler.add(request)
    plan = scheduler.plan()
    assert [r.num_shared for r in (first, same, fork, other)] == [0, 12, 8, 0]
    assert same.pages[:3] == first.pages[:3] != same.pages
    assert fork.pages[:2] == first.pages[:2]
    assert not set(fork.pages[2:]) & set(first.pages)
    assert [(c.start, c.stop, c.root) for c in plan.chunks] == [
        (12, 13, True),
        (8, 13, True),
        (0, 13, True),
    ]
    assert [scheduler.allocator.users(p) for p in first.pages[:3]] == [3, 3, 2]


def test_what_ended_texts_held_is_found_until_its_pages_are_needed():
    scheduler = sharing(pages=8)

    def run(tokens):
        request = Request(tokens, SamplingParams(max_tokens=2))
        scheduler.add(request)
        read_on(scheduler.plan())
        request.finish_reason = "length"
        scheduler.retire()
        return request.num_shared

    assert run(list(range(18))) == 0
    assert scheduler.allocator.num_free == 8
    assert run(list(range(18))) == 16
    assert run([99] * 29) == 0  # takes all eight pages
    assert run(list(range(18))) == 0


def test_one_token_before_the_root_is_always_read():
    scheduler = sharing()
    first = Request(list(range(9)), SamplingParams(max_tokens=4))
    scheduler.add(first)
    read_on(scheduler.plan())
    scheduler.plan()
    again = Request(list(range(9)), SamplingParams(max_tokens=4))
    scheduler.add(again)
    plan = scheduler.plan()
    assert again.num_shared == 4  # the second page ends just before the root
    assert [(c.start, c.stop, c.root) for c in plan.chunks] == [(4, 8, True)]


def test_a_preempted_text_finds_its_own_pages_again():
    scheduler = sharing()
    request = Request(list(range(20)), SamplingParams(max_tokens=8))
    scheduler.add(request)
    read_on(scheduler.plan())
    read_on(scheduler.plan())
    scheduler.preempt(request)
    plan = scheduler.plan()
    assert [(c.start, c.stop) for c in plan.chunks] == [(20, 21)]
    assert request.num_shared == 0  # of its prompt nothing was there when it came


def test_the_batch_is_bounded():
    scheduler = Scheduler(PageAllocator(100, 16), max_batch=2, tree_slots=1)
    requests = [request_of(i, 3, 3) for i in range(3)]
    for request in requests:
        scheduler.add(request)
    assert scheduler.plan().admitted == requests[:2]
    assert scheduler.plan().admitted == []
    assert scheduler.has_work


def test_a_big_request_at_the_head_is_not_overtaken():
    scheduler = Scheduler(PageAllocator(8, 16), max_batch=8, tree_slots=0)
    running, big, small = request_of(0, 60, 4), request_of(1, 60, 20), request_of(2, 1, 4)
    for request in (running, big, small):
        scheduler.add(request)
    assert scheduler.plan().admitted == [running]
    assert list(scheduler.waiting) == [big, small]


def test_a_page_is_free_when_its_last_user_has_released_it():
    pages = PageAllocator(4, 4)
    mine = pages.allocate(2)
    pages.share(mine)
    pages.release(mine)
    assert pages.num_free == 2
    assert [pages.users(p) for p in mine] == [1, 1]
    pages.release(mine)
    assert pages.num_free == 4
    with pytest.raises(ValueError, match="is shared, but it is not allocated"):
        pages.share(mine[:1])


def test_a_page_named_more_often_than_it_has_users_releases_none():
    pages = PageAllocator(4, 4)
    first, second = pages.allocate(2)
    with pytest.raises(ValueError, match="not allocated"):
        pages.release([first, second, first])
    assert pages.num_free == 2
    pages.release([second, first])
    assert pages.num_free == 4


def test_first_tokens_do_not_wait_for_long_texts():
    scheduler = Scheduler(
        PageAllocator(64, 16), max_batch=8, tree_slots=1, read_tokens=50, read_beside=40
    )
    long, one, longer, short = requests = [
        request_of(0, 31, 4),
        request_of(1, 1, 4),
        request_of(2, 60, 4),
        request_of(3, 9, 4),
    ]

    def step():
        plan = scheduler.plan()
        read_on(plan)
        return [(c.request, c.start, c.stop, c.root) for c in plan.chunks]

    for request in requests:
        scheduler.add(request)
    assert step() == [(one, 0, 0, True), (short, 0, 8, True), (long, 0, 17, False)]
    assert step() == [(long, 17, 30, True), (longer, 0, 12, False)]  # what is left is short
    assert step() == [(longer, 12, 52, False)]  # beside those that decode
    assert step() == [(longer, 52, 59, True)]


@pytest.mark.parametrize(
    ("unread", "running", "shares"),
    [
        ([300, 700], 2, [(0, 256)]),  # the second one's first token does not come sooner
        ([700, 100, 80], 3, [(0, 16), (2, 80), (1, 100)]),  # a long one came before
        ([700, 600], 2, [(0, 16), (1, 240)]),
        ([700], 1, [(0, 256)]),
        ([300, 700], 3, [(0, 128)]),
        ([700, 20, 30, 40], 4, [(1, 20), (2, 30), (0, 30)]),
        ([700, 100, 300], 5, [(0, 16), (1, 100), (2, 12)]),
        ([700, 100, 30], 3, [(2, 30), (0, 16), (1, 34)]),
        ([10] * 20, 20, [(i, 10) for i in range(12)]),
        ([0, 65], 2, [(0, 0), (1, 65)]),
        ([], 3, []),
    ],
)
def test_what_a_step_reads(unread, running, shares):
    assert share_out(unread, running, alone=512, beside=128) == shares


def test_a_preempted_request_is_the_next_to_be_admitted_and_read_anew():
    scheduler = Scheduler(PageAllocator(8, 16), max_batch=2, tree_slots=0)
    first, second, third = (request_of(i, 40, 20) for i in range(3))
    for request in (first, second, third):
        scheduler.add(request)
    assert scheduler.plan().admitted == [first, second]
    second.num_cached = 39
    second.tokens.append(7)
    scheduler.preempt(second)
    assert second.pages == []
    assert scheduler.allocator.num_free == 5
    plan = scheduler.plan()
    assert plan.preempted == plan.admitted == [second]
    assert [(c.start, c.stop) for c in plan.chunks if c.request is second] == [(0, 40)]
    assert list(scheduler.waiting) == [third]


class AnyOrder(RuleBasedStateMachine):
    """Requests come, are cancelled and end in any order; what an engine would do is done."""

    @initialize(
        pages=st.integers(6, 24),
        batch=st.integers(1, 4),
        slots=st.integers(1, 5),
        budget=st.integers(1, 24),
    )
    def begin(self, pages, batch, slots, budget):
        allocator = PageAllocator(pages, 4)
        self.scheduler = Scheduler(allocator, batch, slots, budget, shares=True)
        self.slots = slots
        self.open: list[Request] = []
        self.holds: dict[int, tuple] = {}  # page -> what was written to it last
        self.steps = 0

    @rule(
        length=st.integers(1, 40), new=st.integers(1, 30), family=st.integers(0, 2),
        priority=st.integers(0, 2),
    )  # fmt: skip
    def add(self, length, new, family, priority):
        tokens = [family + i // 6 % 2 for i in range(length)]
        request = Request(tokens, SamplingParams(max_tokens=new), priority=priority)
        if self.scheduler.pages_needed(request) <= self.scheduler.allocator.num_pages:
            self.scheduler.add(request)
            self.open.append(request)
        else:
            with pytest.raises(ValueError, match="K/V pages"):
                self.scheduler.add(request)

    @precondition(lambda self: self.open)
    @rule(place=st.integers(0, 99))
    def cancel(self, place):
        request = self.open.pop(place % len(self.open))
        request.finish_reason = "aborted"
        assert request in self.scheduler.retire()
        assert request.pages == []

    @precondition(lambda self: self.open)
    @rule(place=st.integers(0, 99))
    def recover(self, place):
        for request in reversed(list(self.scheduler.running)):
            self.scheduler.preempt(request)

    @rule(accepted=st.integers(1, 5))
    def step(self, accepted):
        plan = self.scheduler.plan()
        work = [(c.request, c.start, c.stop) for c in plan.chunks]
        work += [(r, r.num_cached, r.num_cached) for r in plan.decode]
        assert len({id(request) for request, _, _ in work}) == len(work)
        assert sum(stop - start for _, start, stop in work) <= self.scheduler.read_tokens
        emitting = [*plan.started, *plan.decode]
        for request, start, stop in work:
            self.check_shared_content(request, start)
            slots = self.slots if request in plan.decode else 1
            end = stop + (slots if request in emitting else 0)
            assert end <= len(request.pages) * 4, "a step writes into its own pages"
            self.write(request, start, end)
            request.num_cached = stop
        for request in emitting:
            new = min(accepted if request in plan.decode else 1, self.slots, request.remaining)
            request.tokens += [len(request.tokens) % 3 for _ in range(new)]
            self.write(request, request.num_cached, len(request.tokens) - 1)
            request.num_cached = len(request.tokens) - 1
            if request.remaining == 0:
                request.finish_reason = "length"
                self.open.remove(request)
        self.scheduler.retire()
        if self.open:
            assert work, "while somebody waits something is done"

    def write(self, request, start, end):
        """Slots [start, end) hold what depends on the tokens up to each of them."""
        for slot in range(start, end):
            page = request.pages[slot // 4]
            content = tuple(request.tokens[: slot + 1]) if slot < len(request.tokens) else slot
            before = self.holds.get((page, slot % 4))
            shared = self.scheduler.allocator.users(page) > 1
            assert not shared or before == content, "others' pages stay as they are"
            self.holds[page, slot % 4] = content

    def check_shared_content(self, request, start):
        for slot in range(min(start, request.num_cached)):
            page = request.pages[slot // 4]
            assert self.holds[page, slot % 4] == tuple(request.tokens[: slot + 1])

    @invariant()
    def every_page_is_accounted_for(self):
        if not hasattr(self, "scheduler"):
            return
        allocator = self.scheduler.allocator
        held = Counter(p for r in self.scheduler.running for p in r.pages)
        assert all(allocator.users(p) == held[p] for p in range(allocator.num_pages))
        assert allocator.num_free == allocator.num_pages - len(held)
        assert {*self.scheduler.running, *self.scheduler.waiting} == set(self.open)

    def teardown(self):
        """All that is left runs to its end."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(3000):
            if not self.open:
                break
            self.step(accepted=3)
        assert not self.open, "nobody starves"
        assert self.scheduler.allocator.num_free == self.scheduler.allocator.num_pages


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
