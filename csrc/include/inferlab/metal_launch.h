// What Metal kernels and their launches (csrc/bindings) agree on.
#pragma once

#include "inferlab/portable.h"

namespace inferlab {

INFERLAB_CONSTANT int kMetalSimd = 32;      // threads that exchange registers; all Apple GPUs
INFERLAB_CONSTANT int kMetalThreads = 256;  // of a threadgroup, where a launch says nothing else
INFERLAB_CONSTANT int kMetalAttentionRows = 8;  // of a threadgroup of paged_tree_attention
INFERLAB_CONSTANT int kMetalCopiedWords = 4;    // of a thread of kv_copy_pages
INFERLAB_CONSTANT int kMetalRejectionRows = 3;  // floats of the workspace: a row's copy, p and q

}  // namespace inferlab
