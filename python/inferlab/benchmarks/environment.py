"""What a measurement ran on: processor, cores, threads and versions, to be written beside it."""

from __future__ import annotations

import datetime
import platform
from typing import Any

import numpy as np
import torch
import transformers

from inferlab import _C, __version__
from inferlab.machine import processor_name, usable_cores


def describe_environment() -> dict[str, Any]:
    """Machine and versions, as JSON types. ``cores`` are those that this process may use."""
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": processor_name(),
        "cores": usable_cores(),
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
