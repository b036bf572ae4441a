"""Work of the tests to come, done beside the one that runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

Job = TypeVar("Job", bound=Hashable)
Result = TypeVar("Result")


class Ahead(Generic[Job, Result]):
    """`Ahead(...)[job]` is work(job), begun as soon as one of `threads` is free.

    Among the workers of pytest-xdist, who have the cores busy and do not know which tests will be
    theirs, nothing is begun before it is asked for.
    """

    def __init__(self, work: Callable[[Job], Result], jobs: Sequence[Job], threads: int) -> None:
        self._work = work
        self._pool = ThreadPoolExecutor(threads)
        if "PYTEST_XDIST_WORKER" in os.environ:
            jobs = []
        self._futures: dict[Job, Future[Result]] = {j: self._pool.submit(work, j) for j in jobs}

    def __enter__(self) -> Ahead[Job, Result]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def __getitem__(self, job: Job) -> Result:
        return self._futures[job].result() if job in self._futures else self._work(job)
