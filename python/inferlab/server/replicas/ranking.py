"""Which replica is asked first: consistent hashing with bounded loads."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Collection, Mapping

FACTOR = 1.25
SLACK = 4
"""A replica takes what begins like its own up to ``FACTOR`` times the mean load and ``SLACK`` more
requests: a few of them side by side are one batch, and one that is idle is no better."""


def ranked(
    key: str | None,
    loads: Mapping[str, int],
    avoided: Collection[str] = (),
    *,
    factor: float = FACTOR,
    slack: int = SLACK,
) -> list[str]:
    """All replicas, best first.

    Each key has an order of its own of all replicas (rendezvous hashing), so that one that comes or
    goes moves its own share of the keys alone. The first of this order whose load is within the
    bound is best; behind it come the others, the least loaded first.

    Args:
        key: what the request begins with; None: its load alone decides.
        loads: requests at each replica.
        avoided: replicas to ask last.
    """
    able = [name for name in loads if name not in avoided]
    random.shuffle(able)  # among equals
    able.sort(key=loads.__getitem__)
    if key is not None and able:
        bound = factor * sum(loads[name] for name in able) / len(able) + slack
        within = [name for name in able if loads[name] <= bound]
        best = max(within, key=lambda name: _weight(key, name))
        able.remove(best)
        able.insert(0, best)
    return able + sorted((name for name in loads if name in avoided), key=loads.__getitem__)


def _weight(key: str, name: str) -> bytes:
    return hashlib.blake2b(f"{name}\0{key}".encode("utf-8", "replace"), digest_size=8).digest()
