// The forward of a Llama-shaped model in one call: embedding, layers (RMSNorm, rotary GQA over the
// pages, gated SiLU), norm and head. Padding is not computed: what works row by row, and attention,
// run on the real rows alone. A row's bits do not depend on the others, nor on threads.
//
// Bytes: all weights once, K and V of the committed tokens once, the rows' activations.
#pragma once

#include <cstdint>
#include <vector>

#include "inferlab/dtype.h"
#include "inferlab/status.h"

namespace inferlab::cpu {

// y = x weight^T + bias
struct Matrix {
  const void* weight = nullptr;  // [out, in], or packed (packed_weight.h) where `bits` is not 0
  const void* bias = nullptr;    // [out] or null
  int64_t out = 0, in = 0;
  int bits = 0;
  int64_t group = 0;
};

struct Norm {
  const void* weight = nullptr;  // null: there is none
  float eps = 0;
};

struct DecoderLayer {
  Norm input_norm, post_norm;
  Norm q_norm, k_norm;  // of each head, or none
  Matrix qkv, output, gate_up, down;
  int64_t q_heads = 0, kv_heads = 0, head_dim = 0;
  int64_t window = 0;  // 0: none
  float scale = 1, softcap = 0;
};

struct Decoder {
  const void* embedding = nullptr;  // [vocab, hidden]
  int64_t vocab = 0, hidden = 0;
  std::vector<DecoderLayer> layers;
  Norm norm;
  Matrix head;
  DType dtype = DType::kF32;  // of weights that are not packed, pages and results
};

struct DecoderPass {
  int64_t batch = 0, nodes = 0;        // B, N
  const int64_t* tokens = nullptr;     // [B, N], in [0, vocab) where they are no padding
  const int32_t* num_nodes = nullptr;  // [B] real rows of each, or null: all N
  const int64_t* angles = nullptr;     // [B, N] rows of cos and sin; null: one for each of B * N
  const void* cos = nullptr;           // [.., head_dim]
  const void* sin = nullptr;
  int64_t rotary = 0;                    // channels of a head that are rotated
  const int32_t* seq_lens = nullptr;     // [B]
  const int32_t* block_table = nullptr;  // [B, max_pages], `table_stride` apart
  int64_t table_stride = 0, max_pages = 0, node_offset = 0;
  const uint64_t* ancestors = nullptr;  // [B, N, words] or null: causal
  int64_t words = 0;
  void* k_pages = nullptr;  // [L, P, page_size, Hkv, D]
  void* v_pages = nullptr;
  int64_t layer_bytes = 0, pages = 0, page_size = 0;
  bool all_scored = true;  // else these [S] rows of B * N, real ones: their logits are wanted
  const int64_t* scored = nullptr;
  int64_t num_scored = 0;
  void* logits = nullptr;  // [B, N, vocab] with zeros at padding, or [S, vocab]
  // Layers whose outputs are wanted, side by side, -1 for what the head sees: [B, N, count *
  // hidden] with zeros at padding.
  std::vector<int> feature_layers;
  void* features = nullptr;
};

Status forward(const Decoder& decoder, const DecoderPass& pass);

}  // namespace inferlab::cpu
