"""The ops: thin wrappers over the kernels of each device, torch reference ops where it has none."""

from inferlab.kernels._walk import VerifyResult, verify_workspace
from inferlab.kernels.attention import attention_workspace, paged_tree_attention
from inferlab.kernels.build_tree import TreeLinks, build_tree
from inferlab.kernels.growth import Frontier, GrownTree, grow_level, grow_offsets, grow_tree
from inferlab.kernels.kv import (
    advise_large_pages,
    kv_append,
    kv_compact,
    kv_copy_pages,
    kv_gather,
)
from inferlab.kernels.layer import linear, packed_linear, rms_norm, rope_append, silu_mul
from inferlab.kernels.packed_weight import PackedWeight, pack, pack_rounded, packed_sizes, unpack
from inferlab.kernels.sample import sample, sample_workspace
from inferlab.kernels.sampling_params import SamplingTensors
from inferlab.kernels.verify import verify_tree_match, verify_tree_rejection
from inferlab.kernels.verify_lossy import verify_tree_lossy

__all__ = [
    "Frontier",
    "GrownTree",
    "PackedWeight",
    "SamplingTensors",
    "TreeLinks",
    "VerifyResult",
    "advise_large_pages",
    "attention_workspace",
    "build_tree",
    "grow_level",
    "grow_offsets",
    "grow_tree",
    "kv_append",
    "kv_compact",
    "kv_copy_pages",
    "kv_gather",
    "linear",
    "pack",
    "pack_rounded",
    "packed_linear",
    "packed_sizes",
    "paged_tree_attention",
    "rms_norm",
    "rope_append",
    "sample",
    "sample_workspace",
    "silu_mul",
    "unpack",
    "verify_tree_lossy",
    "verify_tree_match",
    "verify_tree_rejection",
    "verify_workspace",
]
