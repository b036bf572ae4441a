"""A rank that does not lead. `python -m inferlab.models.parallel.follower` is one that the leader
started."""

from __future__ import annotations

from typing import NoReturn

from inferlab.models.parallel import ranks
from inferlab.models.parallel.part import ModelPart


def follow() -> NoReturn:
    """Does as rank 0 says until it ends; then this process ends, too."""
    ranks.follow(ModelPart())


if __name__ == "__main__":
    follow()
