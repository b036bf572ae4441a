"""A client process of a load: ``python -m inferlab.load.worker FD``, where FD is its end of a pipe.

It is given a plan and its part of it, says that it is ready, is told when to begin, and gives a
record for every request, at last a `runner.Ran`, or the error that ended it.
"""

from __future__ import annotations

import sys
from multiprocessing.connection import Connection

from inferlab.load.runner import run_shard


def main(descriptor: int) -> None:
    """Its life."""
    with Connection(descriptor) as pipe:
        plan, part = pipe.recv()
        try:
            pipe.send(run_shard(plan, part, pipe.send, pipe))
        except Exception as error:
            said = f"client process {part.index}: {type(error).__name__}: {error}"
            pipe.send(RuntimeError(said))


if __name__ == "__main__":
    main(int(sys.argv[1]))
