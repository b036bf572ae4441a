"""Children of `fork`: they have the memory of their parent, but none of its threads.

OpenMP, which torch's operations on the CPU run on, waits for its threads for ever; so a child runs
torch with the one thread that it has. The kernels get new threads there (csrc/cpu/parallel.cpp).
"""

from __future__ import annotations

import logging
import os

import torch

logger = logging.getLogger(__name__)

_in_new_child = False


def _after_fork() -> None:
    global _in_new_child
    _in_new_child = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def use_threads_that_exist() -> None:
    """In a child of `fork`: has torch use one thread, and says so once. Called before torch works.

    A child that wants more threads is started by ``multiprocessing.get_context("spawn")``.
    """
    global _in_new_child
    if not _in_new_child:
        return
    _in_new_child = False
    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)
        logger.warning(
            "this process was forked and lacks the threads that torch computes with: torch uses "
            "one here; processes that multiprocessing starts with 'spawn' have them all"
        )
