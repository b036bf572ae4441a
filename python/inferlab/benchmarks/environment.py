"""What a measurement ran on: processor, cores, threads and versions, to be written beside it."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import sys
from typing import Any

import numpy as np

from inferlab import _C, __version__
from inferlab.machine import processor_name, usable_cores


def describe_environment() -> dict[str, Any]:
    """Machine and versions, as JSON types. ``cores`` are those that this process may use; what
    only torch knows, its threads and GPUs, is told where torch is at work."""
    torch = sys.modules.get("torch")
    gpus = range(torch.cuda.device_count()) if torch and torch.cuda.is_available() else ()
    return {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": processor_name(),
        "cores": usable_cores(),
        "torch_threads": torch.get_num_threads() if torch else None,
        "kernel_threads": _C.num_threads(),
        "simd": _C.active_isa(),
        "gpus": [torch.cuda.get_device_name(index) for index in gpus] if torch else [],
        "inferlab": __version__,
        "torch": torch.__version__ if torch else importlib.metadata.version("torch"),
        "transformers": importlib.metadata.version("transformers"),
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
