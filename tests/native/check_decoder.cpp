// Forwards of small decoders on one thread, on four, and from two callers at once: the same bits,
// and nothing for a sanitizer to report. Two of the four threads have no core of their own on small
// machines, so they lose it in the middle of stages.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <deque>
#include <string>
#include <thread>
#include <vector>

#include "check_random.h"
#include "inferlab/decoder.h"
#include "inferlab/packed_weight.h"
#include "isa.h"
#include "parallel.h"

using namespace inferlab;
using cpu::Matrix;

namespace {

constexpr int64_t kHidden = 192, kInner = 320, kVocab = 500, kLayers = 3, kHeads = 4, kDim = 32;
constexpr int64_t kKvHeads = 2, kBatch = 3, kPages = 24, kPageSize = 8, kMaxPages = 8;

void store(DType dtype, void* to, int64_t at, float value) {
  if (dtype == DType::kF32) static_cast<float*>(to)[at] = value;
  if (dtype == DType::kF16) static_cast<f16*>(to)[at] = from_float<f16>(value);
  if (dtype == DType::kBF16) static_cast<bf16*>(to)[at] = from_float<bf16>(value);
}

struct Kind {
  const char* name;
  DType dtype;
  int bits;
  bool zeros, experts;
};

// A decoder, and what it points to.
class Model {
 public:
  explicit Model(const Kind& kind) : kind_(kind) {
    decoder.dtype = kind.dtype;
    decoder.vocab = kVocab;
    decoder.hidden = kHidden;
    decoder.embedding = numbers(kVocab * kHidden, 1.0f);
    decoder.norm = norm();
    for (int64_t i = 0; i < kLayers; ++i) {
      cpu::DecoderLayer layer;
      layer.input_norm = layer.mlp_norm = norm();
      layer.q_heads = kHeads;
      layer.kv_heads = kKvHeads;
      layer.head_dim = kDim;
      layer.scale = 0.2f;
      layer.window = i == 1 ? 20 : 0;
      layer.qkv = matrix((kHeads + 2 * kKvHeads) * kDim, kHidden);
      layer.output = matrix(kHidden, kHeads * kDim);
      if (kind.experts) {
        layer.experts.count = 5;
        layer.experts.chosen = 2;
        layer.experts.inner = kInner;
        layer.experts.normed = true;
        layer.experts.router = dense(5, kHidden, 1);
        layer.experts.gate_up = matrix(2 * kInner, kHidden, 5);
        layer.experts.down = matrix(kHidden, kInner, 5);
      } else {
        layer.up = matrix(2 * kInner, kHidden);
        layer.down = matrix(kHidden, kInner);
      }
      decoder.layers.push_back(layer);
    }
    decoder.head = matrix(kVocab, kHidden);
  }

  cpu::Decoder decoder;

 private:
  void* bytes(int64_t count) {
    memory_.emplace_back(count / 16 + 4);
    return memory_.back().data();
  }

  void* numbers(int64_t count, float size) {
    void* to = bytes(count * dtype_size(kind_.dtype));
    for (int64_t i = 0; i < count; ++i) store(kind_.dtype, to, i, size * random_.number());
    return to;
  }

  cpu::Norm norm() {
    cpu::Norm norm;
    norm.weight = numbers(kHidden, 1.0f);
    norm.eps = 1e-5f;
    return norm;
  }

  Matrix dense(int64_t out, int64_t in, int64_t count) {
    Matrix matrix;
    matrix.out = out;
    matrix.in = in;
    matrix.weight = numbers(count * out * in, 0.1f);
    matrix.bytes = out * in * dtype_size(kind_.dtype);
    return matrix;
  }

  Matrix matrix(int64_t out, int64_t in, int64_t count = 1) {
    if (kind_.bits == 0) return dense(out, in, count);
    Matrix matrix;
    matrix.out = out;
    matrix.in = in;
    matrix.bits = kind_.bits;
    matrix.group = 32;
    matrix.zeros = kind_.zeros;
    LinearParams p{};
    p.out = out;
    p.in = in;
    p.bits = kind_.bits;
    p.group = 32;
    p.zeros = kind_.zeros;
    const int64_t tile = packed_tile_bytes(p), tiles = count * packed_tiles(p);
    auto* data = static_cast<uint8_t*>(bytes(tiles * tile));
    matrix.weight = data;
    matrix.bytes = packed_tiles(p) * tile;
    const int64_t scales = (kind_.bits == 8 ? 1 : packed_groups(p)) * kPackedOutputs;
    for (int64_t t = 0; t < tiles; ++t, data += tile) {
      for (int64_t i = 0; i < tile; ++i) data[i] = static_cast<uint8_t>(random_.next());
      for (int64_t i = 0; i < scales; ++i) {
        store(kind_.zeros ? DType::kF16 : DType::kBF16, data, i, 0.01f * random_.number());
      }
    }
    return matrix;
  }

  struct alignas(16) Sixteen {
    char of[16];
  };
  Kind kind_;
  Random random_;
  std::deque<std::vector<Sixteen>> memory_;
};

// Prompts of several lengths, then trees: all logits, as bytes.
std::string run(const cpu::Decoder& decoder) {
  const int64_t size = dtype_size(decoder.dtype);
  const int64_t layer_bytes = kPages * kPageSize * kKvHeads * kDim * size;
  std::vector<char> keys(kLayers * layer_bytes), values(kLayers * layer_bytes);
  std::vector<int32_t> table(kBatch * kMaxPages);
  for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<int32_t>(i * 7 % kPages);
  std::vector<char> angles(2 * 64 * kDim * size);
  for (int64_t i = 0; i < 2 * 64 * kDim; ++i) {
    store(decoder.dtype, angles.data(), i, static_cast<float>(i * 37 % 100) / 100.0f);
  }
  std::vector<int32_t> lengths(kBatch, 0);
  std::string all;
  Random random;
  for (const int64_t nodes : {40, 9, 1}) {
    std::vector<int64_t> tokens(kBatch * nodes), positions(kBatch * nodes);
    std::vector<int32_t> counts(kBatch);
    for (int64_t b = 0; b < kBatch; ++b)
      counts[b] = static_cast<int32_t>(nodes == 1 ? 1 : nodes - 3 * b);
    for (int64_t i = 0; i < kBatch * nodes; ++i) {
      tokens[i] = random.next() % kVocab;
      positions[i] = lengths[i / nodes] + std::min<int64_t>(i % nodes, 5);
    }
    std::vector<uint64_t> ancestors(kBatch * nodes);
    for (int64_t i = 0; i < kBatch * nodes; ++i) {
      const int64_t n = i % nodes;
      ancestors[i] = n == 0 ? 1 : ancestors[i - n + (n - 1) / 2] | uint64_t{1} << n;
    }
    cpu::DecoderPass pass;
    pass.batch = kBatch;
    pass.nodes = nodes;
    pass.tokens = tokens.data();
    pass.num_nodes = counts.data();
    pass.positions = positions.data();
    pass.cos = angles.data();
    pass.sin = angles.data() + 64 * kDim * size;
    pass.rotary = kDim;
    pass.seq_lens = lengths.data();
    pass.block_table = table.data();
    pass.table_stride = pass.max_pages = kMaxPages;
    pass.ancestors = nodes == 40 ? nullptr : ancestors.data();
    pass.words = 1;
    pass.k_pages = keys.data();
    pass.v_pages = values.data();
    pass.layer_bytes = layer_bytes;
    pass.pages = kPages;
    pass.page_size = kPageSize;
    std::string logits(kBatch * nodes * kVocab * size, '\0');
    std::string features(kBatch * nodes * 2 * kHidden * size, '\0');
    pass.logits = logits.data();
    pass.feature_layers = {0, -1};
    pass.features = features.data();
    if (cpu::forward(decoder, pass) != Status::kOk) return "";
    all += logits + features;
    if (nodes == 40) lengths = counts;
  }
  return all;
}

bool check(const Kind& kind) {
  const Model model(kind);
  cpu::set_num_threads(1);
  const std::string alone = run(model.decoder);
  cpu::set_num_threads(4);
  bool same = !alone.empty();
  for (int round = 0; round < 3; ++round) same = same && run(model.decoder) == alone;
  std::string here, there;
  std::thread other([&] { there = run(model.decoder); });
  here = run(model.decoder);
  other.join();
  same = same && here == alone && there == alone;
  std::printf("%s on %s: %s\n", kind.name, cpu::isa_name(cpu::active_isa()),
              same ? "the same" : "differs");
  return same;
}

}  // namespace

int main() {
  bool same = true;
  for (const char* isa : {"generic", "avx2", "avx512", "avx512_bf16", "amx"}) {
    if (!cpu::force_isa(isa)) continue;
    for (const Kind& kind : {
             Kind{"fp32", DType::kF32, 0, false, false},
             Kind{"bf16", DType::kBF16, 0, false, false},
             Kind{"int8 beside bf16", DType::kBF16, 8, false, false},
             Kind{"int4 beside fp16", DType::kF16, 4, false, false},
             Kind{"int4 with zeros beside fp32", DType::kF32, 4, true, false},
             Kind{"experts in bf16", DType::kBF16, 0, false, true},
             Kind{"experts of int4", DType::kF32, 4, false, true},
         }) {
      same = check(kind) && same;
    }
  }
  return same ? 0 : 1;
}
