"""Pages and the choice of the batch."""

import pytest

from inferlab.scheduler import PageAllocator, Request, Scheduler
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
    scheduler = Scheduler(PageAllocator(10, 16), max_batch=8, tree_slots=1)
    requests = [request_of(0, 60, 35), request_of(1, 40, 20), request_of(2, 1, 8)]
    for request in requests:
        scheduler.add(request)
    assert scheduler.plan().admitted == requests[:1] + requests[1:2] == requests[:2]
    # The third (1 page) does not fit behind 6 + 4 pages: it waits.
    assert scheduler.allocator.num_free == 0
    requests[0].finish_reason = "length"
    assert scheduler.retire() == [requests[0]]
    assert scheduler.plan().admitted == [requests[2]]
    assert scheduler.running == requests[1:]


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


def test_reading_is_shared_out_in_order_of_arrival():
    scheduler = Scheduler(PageAllocator(64, 16), max_batch=8, tree_slots=1, read_tokens=50)
    requests = [
        request_of(0, 31, 4),
        request_of(1, 1, 4),
        request_of(2, 40, 4),
        request_of(3, 9, 4),
    ]
    for request in requests:
        scheduler.add(request)
    plan = scheduler.plan()
    assert plan.admitted == requests
    assert [(c.request, c.start, c.stop, c.root) for c in plan.chunks] == [
        (requests[0], 0, 30, True),
        (requests[1], 0, 0, True),
        (requests[2], 0, 20, False),
    ]
    assert plan.decode == []
    for chunk in plan.chunks:
        chunk.request.num_cached = chunk.stop + chunk.root
        chunk.request.tokens += [5] * chunk.root
    plan = scheduler.plan()
    assert [(c.start, c.stop, c.root) for c in plan.chunks] == [(20, 39, True), (0, 8, True)]
    assert plan.decode == requests[:2]
    assert not plan.admitted


def test_a_preempted_request_is_the_next_to_be_admitted_and_read_anew():
    scheduler = Scheduler(PageAllocator(8, 16), max_batch=8, tree_slots=0)
    first, second, third = (request_of(i, 40, 20) for i in range(3))
    for request in (first, second, third):
        scheduler.add(request)
    assert scheduler.plan().admitted == [first, second]
    second.num_cached = 39
    second.tokens.append(7)
    scheduler.preempt(second)
    assert second.pages == []
    assert scheduler.allocator.num_free == 4
    plan = scheduler.plan()
    assert plan.preempted == plan.admitted == [second]
    assert [(c.start, c.stop) for c in plan.chunks if c.request is second] == [(0, 40)]
    assert list(scheduler.waiting) == [third]
