"""What the machine is: versions, the GPU, how streams reach the kernels, bandwidth."""

from __future__ import annotations

import platform
import shutil
import statistics
import subprocess

import torch
import transformers


def version_of(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return "not found"
    lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    return lines[-1].strip() if lines else "says nothing"


def bandwidth() -> dict[str, float]:
    """GB/s of a copy (read + written) and of a read of 2 GB."""
    data, to = (torch.ones(1 << 29, device="cuda") for _ in range(2))
    total = torch.empty((), device="cuda")
    ways = {
        "copy": (2 * data.nbytes, lambda: to.copy_(data)),
        "read": (data.nbytes, lambda: torch.sum(data, dim=0, out=total)),
    }
    found = {}
    for name, (num_bytes, run) in ways.items():
        times = []
        for _ in range(12):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        found[name] = num_bytes / statistics.median(times[2:]) / 1e9
    return found


def main() -> None:
    print(f"python {platform.python_version()}, torch {torch.__version__} (CUDA "
          f"{torch.version.cuda}), transformers {transformers.__version__}")  # fmt: skip
    print(f"nvcc: {version_of('nvcc', '--version')}")
    print(f"compiler: {version_of('g++', '-dumpfullversion')}")
    api = hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
    print(f"streams reach the kernels by {'the DLPack exchange API' if api else 'torch.cuda'}")
    if not torch.cuda.is_available():
        print("no CUDA device")
        return
    gpu = torch.cuda.get_device_properties(0)
    print(
        f"{gpu.name}: sm_{gpu.major}{gpu.minor}, {gpu.multi_processor_count} multiprocessors, "
        f"{gpu.total_memory / 1e9:.1f} GB, L2 {gpu.L2_cache_size / 1e6:.0f} MB"
    )
    print(", ".join(f"{name} {speed:.0f} GB/s" for name, speed in bandwidth().items()))


if __name__ == "__main__":
    main()
