"""What a measurement ran on: processor, cores, threads and versions, to be written beside it."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from inferlab import _C, __version__


def describe_environment() -> dict[str, Any]:
    """Machine and versions, as JSON types. ``cores`` are those that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _processor_name(),
        "cores": len(affinity(0)) if affinity is not None else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "kernel_threads": _C.num_threads(),
        "simd": _C.active_isa(),
        "gpus": [torch.cuda.get_device_name(index) for index in gpus],
        "inferlab": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
