"""Requests, pages, the choice of the batch, and new text. Imports no torch."""

from inferlab.scheduler.pages import PageAllocator
from inferlab.scheduler.scheduler import Scheduler
from inferlab.scheduler.sequence import Sequence
from inferlab.scheduler.text import NewText, StopStrings, special_tokens, text_decoder

__all__ = [
    "NewText",
    "PageAllocator",
    "Scheduler",
    "Sequence",
    "StopStrings",
    "special_tokens",
    "text_decoder",
]
