// One function per domain; module.cpp calls them all.
#pragma once

#include <pybind11/pybind11.h>

namespace inferlab {

void bind_system(pybind11::module_& m);     // build facts, instruction set, threads, bandwidth
void bind_tree(pybind11::module_& m);       // build_tree
void bind_sample(pybind11::module_& m);     // sample
void bind_verify(pybind11::module_& m);     // verify_tree_match, _rejection, _lossy
void bind_kv(pybind11::module_& m);         // kv_append, kv_compact, kv_gather, kv_copy_pages
void bind_attention(pybind11::module_& m);  // paged_tree_attention
void bind_layer(pybind11::module_& m);      // rms_norm, silu_mul, rope_append, linear
void bind_suffix(pybind11::module_& m);     // SuffixAutomaton, PromptLookup, draft_trie
void bind_growth(pybind11::module_& m);     // grow_level, grow_tree, grow_offsets
void bind_decoder(pybind11::module_& m);    // Decoder
void bind_planner(pybind11::module_& m);    // planner.*

}  // namespace inferlab
