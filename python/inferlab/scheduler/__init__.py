"""Requests, pages and the choice of the batch. Imports no torch."""

from inferlab.scheduler.pages import PageAllocator
from inferlab.scheduler.scheduler import Scheduler
from inferlab.scheduler.sequence import Sequence

__all__ = ["PageAllocator", "Scheduler", "Sequence"]
