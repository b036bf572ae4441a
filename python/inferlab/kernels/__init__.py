"""The ops: thin wrappers over the compiled module on the CPU, torch reference ops elsewhere."""

from inferlab.kernels.attention import paged_tree_attention
from inferlab.kernels.build_tree import TreeLinks, build_tree
from inferlab.kernels.kv import kv_append, kv_compact, kv_copy_pages, kv_gather
from inferlab.kernels.layer import linear, rms_norm, rope_append, silu_mul
from inferlab.kernels.sample import sample, sample_workspace
from inferlab.kernels.sampling_params import SamplingTensors
from inferlab.kernels.verify import (
    VerifyResult,
    verify_tree_lossy,
    verify_tree_match,
    verify_tree_rejection,
    verify_workspace,
)

__all__ = [
    "SamplingTensors",
    "TreeLinks",
    "VerifyResult",
    "build_tree",
    "kv_append",
    "kv_compact",
    "kv_copy_pages",
    "kv_gather",
    "linear",
    "paged_tree_attention",
    "rms_norm",
    "rope_append",
    "sample",
    "sample_workspace",
    "silu_mul",
    "verify_tree_lossy",
    "verify_tree_match",
    "verify_tree_rejection",
    "verify_workspace",
]
