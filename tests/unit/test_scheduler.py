"""Pages and the choice of the batch."""

import pytest

from inferlab.scheduler import PageAllocator, Scheduler, Sequence
from inferlab.types import SamplingParams


def sequence(request_id: int, prompt: int, max_tokens: int) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens)
    return Sequence(request_id, [1] * prompt, params, arrived_at=0.0)


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
        scheduler.add(sequence(0, 40, 64))


def test_first_come_first_served_and_waiting_for_pages():
    scheduler = Scheduler(PageAllocator(10, 16), max_batch=8, tree_slots=1)
    requests = [sequence(0, 60, 35), sequence(1, 40, 20), sequence(2, 1, 8)]
    for request in requests:
        scheduler.add(request)
    assert scheduler.admit() == requests[:1] + requests[1:2] == requests[:2]
    # The third (1 page) does not fit behind 6 + 4 pages: it waits.
    assert scheduler.allocator.num_free == 0
    requests[0].finish_reason = "length"
    assert scheduler.retire() == [requests[0]]
    assert scheduler.admit() == [requests[2]]
    assert scheduler.running == requests[1:]


def test_the_batch_is_bounded():
    scheduler = Scheduler(PageAllocator(100, 16), max_batch=2, tree_slots=1)
    requests = [sequence(i, 3, 3) for i in range(3)]
    for request in requests:
        scheduler.add(request)
    assert scheduler.admit() == requests[:2]
    assert scheduler.admit() == []
    assert scheduler.has_work


def test_a_big_request_at_the_head_is_not_overtaken():
    scheduler = Scheduler(PageAllocator(8, 16), max_batch=8, tree_slots=0)
    running, big, small = sequence(0, 60, 4), sequence(1, 60, 20), sequence(2, 1, 4)
    for request in (running, big, small):
        scheduler.add(request)
    assert scheduler.admit() == [running]
    assert list(scheduler.waiting) == [big, small]
