// The forward of a decoder in one call: embedding, layers (norms, rotary GQA over the pages, an
// MLP), norm and head. Padding is not computed: what works row by row, and attention, run on the
// real rows alone. A row's bits do not depend on the others, nor on threads.
//
// Bytes: all weights once, K and V of the committed tokens once, the rows' activations.
#pragma once

#include <cstdint>
#include <vector>

#include "inferlab/page_format.h"
#include "inferlab/status.h"

namespace inferlab::cpu {

// y = x weight^T + bias
struct Matrix {
  const void* weight = nullptr;  // [out, in], or packed (packed_weight.h) where `bits` is not 0
  const void* bias = nullptr;    // [out] or null
  int64_t out = 0, in = 0;
  int bits = 0;
  int64_t group = 0;
  bool zeros = false;
  const int32_t* order = nullptr;
  int64_t bytes = 0;  // of the weight
};

// LayerNorm where `centred`, else RMSNorm.
struct Norm {
  const void* weight = nullptr;  // null: there is none
  const void* bias = nullptr;    // of LayerNorm, or null
  float eps = 0, offset = 0;     // see RmsNormParams
  bool centred = false;
};

enum class Activation : uint8_t { kSilu, kGelu, kGeluTanh, kRelu };

// Gated MLPs of which each row takes the likeliest few (Shazeer et al., 2017).
struct Experts {
  Matrix router;      // [count, hidden]
  Matrix gate_up;     // the first's, gate then up: [2 * inner, hidden]; the others stand behind it
  Matrix down;        // [hidden, inner], likewise
  int64_t count = 0;  // 0: there are none
  int64_t chosen = 0, inner = 0;
  bool normed = false;   // the weights of the chosen add up to 1; else they are the softmax of all
  bool rounded = false;  // weights are rounded to the element type
  Matrix shared_gate;    // [1, hidden]: how much a layer's own MLP counts beside them; `out` 0: it
                         // has none
};

// a = attention(input_norm(x)), y = x + attention_norm(a), y + down_norm(mlp(mlp_norm(y))), with
// what there is of norms. `parallel`: mlp(mlp_norm(x)) in place of y's.
struct DecoderLayer {
  Norm input_norm, attention_norm, mlp_norm, down_norm;
  Norm q_norm, k_norm;  // of each head, or none
  Matrix qkv, output, up, down;
  Experts experts;  // in place of `up` and `down`, or beside them
  Activation activation = Activation::kSilu;
  bool gated = true;  // `up` holds the gate, which is activated, and then what it is multiplied by
  bool parallel = false;
  bool by_head =
      false;           // of qkv's outputs: q, k and v of a head, then the next; else all of q, ...
  int64_t angles = 0;  // which of the pass's
  int64_t q_heads = 0, kv_heads = 0, head_dim = 0;
  int64_t window = 0;  // 0: none
  float scale = 1, softcap = 0;
};

struct Decoder {
  const void* embedding = nullptr;  // [vocab, hidden]
  float embedding_scale = 1;
  const void* places = nullptr;  // [num_places, hidden], added to embeddings by position, or null
  int64_t num_places = 0, first_place = 0;  // the row of position 0
  int64_t vocab = 0, hidden = 0;
  std::vector<DecoderLayer> layers;
  Norm norm;
  Matrix head;
  float softcap = 0;          // of the logits; 0: none
  int64_t num_angles = 1;     // kinds of angles that layers have
  DType dtype = DType::kF32;  // of weights that are not packed, of results, of pages in kSame
};

struct DecoderPass {
  int64_t batch = 0, nodes = 0;        // B, N
  const int64_t* tokens = nullptr;     // [B, N], in [0, vocab) where they are no padding
  const int32_t* num_nodes = nullptr;  // [B] real rows of each, or null: all N
  // [B, N] positions, which are rows of cos and sin, too; null: there is a row for each of B * N.
  const int64_t* positions = nullptr;
  const void* cos = nullptr;  // [.., num_angles, rotary]
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
  PageFormat format = PageFormat::kSame;
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
