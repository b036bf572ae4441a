"""Energy, from the counters of processors (RAPL) and GPUs (NVML), where they can be read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")

Counter = Callable[[], float]
"""Joules since some time."""


class EnergyMeter:
    """Counts the energy of whole processors and GPUs: of all that runs on them.

    Attributes:
        sources: what is counted, such as ``package-0`` and ``GPU``; empty: nothing can be read, and
            energy is not known. On most systems only root reads a processor's counters.

    Args:
        gpu: UUID of a CUDA device to count as well.
        powercap: the system's folder of RAPL's counters.
    """

    def __init__(self, gpu: str | None = None, powercap: Path = POWERCAP) -> None:
        self._counters, self._ranges = _rapl(powercap)
        if gpu is not None and (counter := _nvml(gpu)) is not None:
            self._counters["GPU"] = counter
        elif gpu is not None:  # the processor's alone would be a small part of it
            self._counters = {}
        self.sources = tuple(self._counters)

    def read(self) -> dict[str, float]:
        """Joules by source."""
        return {name: counter() for name, counter in self._counters.items()}

    def since(self, before: Mapping[str, float]) -> float | None:
        """Joules of all sources since `read` gave ``before``; None: not known.

        RAPL's counters begin anew at the end of their range, at most once between two readings that
        are minutes apart.
        """
        if not self.sources:
            return None
        total = 0.0
        for name, now in self.read().items():
            used = now - before[name]
            total += used if used >= 0 else used + self._ranges.get(name, 0.0)
        return total


def _rapl(powercap: Path) -> tuple[dict[str, Counter], dict[str, float]]:
    """Counters of the packages, whose parts they hold, and the ranges of the counters in J."""
    counters: dict[str, Counter] = {}
    ranges: dict[str, float] = {}
    for zone in sorted(powercap.glob("intel-rapl:*")):  # AMD's have this name, too
        try:
            name = (zone / "name").read_text().strip()
            if not name.startswith("package") or name in counters:
                continue
            file = zone / "energy_uj"
            float(file.read_text())
            ranges[name] = float((zone / "max_energy_range_uj").read_text()) / 1e6
        except (OSError, ValueError):
            continue
        counters[name] = lambda file=file: float(file.read_text()) / 1e6  # type: ignore[misc]
    return counters, ranges


def _nvml(uuid: str) -> Counter | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        device = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(device)
    except Exception:  # no package, no driver, or a GPU without the counter
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(device) / 1e3
