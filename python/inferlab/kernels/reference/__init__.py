"""Slow, obvious torch versions of the ops: the oracle of tests and benchmarks, of nothing else."""

from inferlab.kernels.reference.attention import paged_tree_attention
from inferlab.kernels.reference.kv import kv_append, kv_compact, kv_copy_pages, kv_gather
from inferlab.kernels.reference.sampling import sample
from inferlab.kernels.reference.tree import build_tree
from inferlab.kernels.reference.verify import (
    verify_tree_lossy,
    verify_tree_match,
    verify_tree_rejection,
)

__all__ = [
    "build_tree",
    "kv_append",
    "kv_compact",
    "kv_copy_pages",
    "kv_gather",
    "paged_tree_attention",
    "sample",
    "verify_tree_lossy",
    "verify_tree_match",
    "verify_tree_rejection",
]
