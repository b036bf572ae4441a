"""A process that has imported what device tests need and forks a child for each run of pytest:
importing torch takes seconds, under a sanitizer many.

Reads a line of JSON for each run, `{"arguments": [...], "log": PATH}`; writes the exit status.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module

import pytest

# Nothing here starts threads: none is to be missing from a child.
for _name in ("hypothesis.strategies", "helpers.kv_cases", "helpers.metal_shim", "helpers.paged"):
    import_module(_name)
for _name in ("helpers.sampling_cases", "helpers.shim_build", "inferlab.kernels.reference"):
    import_module(_name)


def run(arguments: list[str], log: str) -> int:
    """The exit status of pytest, -N where signal N ended it; all it says is in the file `log`."""
    child = os.fork()
    if child == 0:
        status = 3
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            status = int(pytest.main(arguments))
            sys.stdout.flush()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    for line in sys.stdin:
        print(run(**json.loads(line)), flush=True)
