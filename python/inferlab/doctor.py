"""What is built in, what this machine offers, and what is missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from inferlab import __version__
from inferlab.machine import cpu_flags, memory_gb, processor_name, usable_cores

DISTRIBUTION = "llm-inference-lab"
BANDWIDTH_BYTES = 256 * 2**20
CPU_FLAGS = (
    "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "amx_tile", "amx_int8", "amx_bf16", "asimd", "bf16", "i8mm", "sve",
)  # fmt: skip
BUNDLED_MODELS = {
    "tiny": "model.safetensors",
    "tiny-draft": "model.safetensors",
    "tiny-medusa": "medusa_lm_head.safetensors",
    "tiny-eagle": "model.safetensors",
}
LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "pydantic", "httpx")


class BundledModel(TypedDict):
    """Whether a bundled model is there whole."""

    present: bool
    size_mb: float
    path: str


class Missing(TypedDict):
    """What is missing, and how to get it."""

    what: str
    how: str
    essential: bool


class Gpu(TypedDict):
    """A CUDA device."""

    name: str
    architecture: str
    memory_gb: float


class Devices(TypedDict):
    """What torch can run on beside the CPU; ``torch_cuda`` is the CUDA that it was built with."""

    cuda: list[Gpu]
    torch_cuda: str | None
    mps: bool


class Report(TypedDict):
    """See `examine`."""

    version: str
    build: dict[str, Any]
    machine: dict[str, Any]
    devices: Devices
    versions: dict[str, str | None]
    extras: dict[str, list[str]]
    models: dict[str, BundledModel]
    missing: list[Missing]


def examine() -> Report:
    """Everything that ``inferlab doctor --json`` prints.

    Returns:
        A mapping with ``version``, ``build``, ``machine``, ``devices``, ``versions``, ``extras``,
        ``models``, and ``missing``: a list of ``{"what", "how", "essential"}``.
    """
    build = _build()
    report: Report = {
        "version": __version__,
        "build": build,
        "machine": _machine(native="error" not in build),
        "devices": _devices(),
        "versions": _versions(),
        "extras": _extras(),
        "models": _bundled_models(),
        "missing": [],
    }
    report["missing"] = _missing(report)
    return report


def _build() -> dict[str, Any]:
    try:
        import torch  # noqa: F401  the kernels join its OpenMP team once it is loaded

        from inferlab import _C
    except ImportError as error:
        return {"error": str(error)}
    return {**_C.build_info(), "file": _C.__file__, "threading": _C.threading_backend()}


def _machine(native: bool) -> dict[str, Any]:
    flags = cpu_flags()
    machine: dict[str, Any] = {
        "system": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "cores_usable": usable_cores(),
        "memory_gb": memory_gb(),
        "flags": {name: name in flags for name in CPU_FLAGS} if flags else None,
        "amx": {"amx_tile", "amx_bf16"} <= flags if flags else None,
        "avx512_bf16": "avx512_bf16" in flags if flags else None,
    }
    if native:
        from inferlab import _C

        machine["simd"] = _C.active_isa()
        machine["threads"] = _C.num_threads()
        machine["read_bandwidth_gb_s"] = measure_bandwidth()
    return machine


def measure_bandwidth(num_bytes: int = BANDWIDTH_BYTES, repeats: int = 8) -> float:
    """Reads a buffer larger than the caches with all threads; the best of ``repeats`` in GB/s."""
    import numpy as np

    from inferlab import _C

    data = np.ones(num_bytes // 256 * 64, dtype=np.float32)
    times = []
    for _ in range(repeats + 1):  # the first one wakes the threads
        start = time.perf_counter()
        _C.read_memory(data)
        times.append(time.perf_counter() - start)
    return float(data.nbytes / min(times[1:]) / 1e9)


def _devices() -> Devices:
    import torch

    cuda: list[Gpu] = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            cuda.append(
                {
                    "name": properties.name,
                    "architecture": f"sm_{properties.major}{properties.minor}",
                    "memory_gb": round(properties.total_memory / 2**30, 1),
                }
            )
    return {
        "cuda": cuda,
        "torch_cuda": torch.version.cuda,
        "mps": torch.backends.mps.is_available(),
    }


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            versions[library] = None
    return versions


def _extras() -> dict[str, list[str]]:
    """Extra -> the requirements of it that are not met (an empty list: it is installed)."""
    try:
        metadata = importlib.metadata.metadata(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return {}
    names = metadata.get_all("Provides-Extra") or []
    extras = {}
    for name in names:
        unmet = {
            text.split(" ")[0].split(">")[0]: text for text in sorted(_unmet(DISTRIBUTION, {name}))
        }
        extras[name] = sorted(unmet.values())
    return extras


def _unmet(distribution: str, extras: set[str]) -> list[str]:
    """The requirements that ``distribution[extras]`` adds and that this environment lacks."""
    from packaging.requirements import Requirement

    unmet: list[str] = []
    for text in importlib.metadata.requires(distribution) or []:
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is None or marker.evaluate({"extra": ""}):
            continue  # a requirement of the distribution itself
        if not any(marker.evaluate({"extra": extra}) for extra in extras):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            unmet.append(f"{requirement.name}{requirement.specifier}")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            unmet.append(f"{requirement.name}{requirement.specifier} (found {version})")
        if requirement.extras:
            unmet += _unmet(requirement.name, requirement.extras)
    return unmet


def _bundled_models() -> dict[str, BundledModel]:
    # Not asked of inferlab.models: the doctor must speak where the native module cannot be loaded.
    models: dict[str, BundledModel] = {}
    for name, weights in BUNDLED_MODELS.items():
        directory = Path(__file__).resolve().parent / "assets" / name
        present = all((directory / file).is_file() for file in ("config.json", weights))
        size = sum(file.stat().st_size for file in directory.glob("*")) if present else 0
        models[f"inferlab/{name}"] = {
            "present": present,
            "size_mb": round(size / 2**20, 1),
            "path": str(directory),
        }
    return models


def _missing(report: Report) -> list[Missing]:
    missing: list[Missing] = []

    def add(what: str, how: str, essential: bool = False) -> None:
        missing.append({"what": what, "how": how, "essential": essential})

    build, devices = report["build"], report["devices"]
    if "error" in build:
        add(f"the native module: {build['error']}", "build it: pip install .", essential=True)
    for name, model in report["models"].items():
        if not model["present"]:
            add(f"the bundled model {name}", "inferlab train, or reinstall the package", True)
    for library, version in report["versions"].items():
        if version is None:
            add(library, f"pip install {library}", essential=True)
    for extra, unmet in report["extras"].items():
        if unmet:
            add(f"extra {extra}: {', '.join(unmet)}", f"pip install '{DISTRIBUTION}[{extra}]'")
    if build.get("cuda") is None and devices["cuda"]:
        add(
            "the CUDA kernels (this machine has a GPU, this build serves it by torch operations)",
            "build with nvcc on the PATH: pip install . -C cmake.define.INFERLAB_CUDA=ON",
        )
    if build.get("cuda") is not None and not devices["cuda"]:
        why = (
            "torch finds no CUDA device"
            if devices["torch_cuda"]
            else "this torch is built without CUDA"
        )
        add(
            f"a CUDA device for the CUDA kernels in this build ({why})",
            "only if you want to use one",
        )
    return missing
