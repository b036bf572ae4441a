"""Requests, pages, and the plan of a step. Imports no torch."""

from inferlab.scheduler.constraint import Constraint, NodeMasks
from inferlab.scheduler.pages import PageAllocator
from inferlab.scheduler.plan import Chunk, Plan
from inferlab.scheduler.request import Request
from inferlab.scheduler.scheduler import READ_BESIDE, READ_TOKENS, Scheduler

__all__ = [
    "READ_BESIDE",
    "READ_TOKENS",
    "Chunk",
    "Constraint",
    "NodeMasks",
    "PageAllocator",
    "Plan",
    "Request",
    "Scheduler",
]
