"""The ops: thin wrappers over the compiled module on the CPU, torch reference ops elsewhere."""

from inferlab.kernels.build_tree import TreeLinks, build_tree
from inferlab.kernels.sample import sample
from inferlab.kernels.sampling_params import SamplingTensors
from inferlab.kernels.verify import (
    VerifyResult,
    verify_tree_lossy,
    verify_tree_match,
    verify_tree_rejection,
)

__all__ = [
    "SamplingTensors",
    "TreeLinks",
    "VerifyResult",
    "build_tree",
    "sample",
    "verify_tree_lossy",
    "verify_tree_match",
    "verify_tree_rejection",
]
