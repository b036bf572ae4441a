// Paged tree attention, one task: a block of rows (nodes x the query heads of one KV head) over a
// run of positions. Flash-decoding with fixed chunks (csrc/cpu/attention_task.h); per chunk:
//
//   1. scores of all rows against the committed keys of the chunk, in tiles of keys that stay in L1
//      while the rows pass over them; then each node's own ancestors, through a list of its own
//   2. per row: soft cap, maximum, exponentials, their sum
//   3. weighted values, in the same tiles
//   4. merged into the row's state: M = max(m, m'), l = l e^(m-M) + l' e^(m'-M), acc likewise
//
// A key that a row does not see is not in the row's range: it is never multiplied by zero, so
// garbage there, NaN included, has no effect. Mapping: one thread per task. Bytes: the K and V of
// the positions once per task, 2 * positions * D * s; q and out are small beside them.
#include <algorithm>
#include <cmath>
#include <limits>

#include "attention_tiles.h"

namespace inferlab::cpu::INFERLAB_ISA {
namespace {

constexpr int64_t kTile = 64;  // keys
constexpr float kNegInf = -std::numeric_limits<float>::infinity();

// Rows' running softmax: m (maximum), l (sum of exponentials), acc (weighted values).
struct State {
  float* m;
  float* l;
  float* acc;
};

struct Range {
  int64_t begin, end;
};

template <typename T>
class Block {
 public:
  Block(const AttentionParams& p, const AttentionTask& t)
      : p_(p),
        t_(t),
        group_(p.q_heads / p.kv_heads),
        nodes_(t.node_end - t.node_begin),
        rows_(nodes_ * group_),
        stride_(padded_dim(p.head_dim)),
        slot_elems_(p.kv_heads * p.head_dim),
        k_(static_cast<const T*>(p.k_pages) + t.kv_head * p.head_dim),
        v_(static_cast<const T*>(p.v_pages) + t.kv_head * p.head_dim),
        table_(p.block_table + t.b * p.table_stride),
        len_(p.seq_lens[t.b]),
        shared_end_(p.ancestors != nullptr ? len_ : std::numeric_limits<int64_t>::max()) {
    float* f = t.scratch;
    const auto take = [&f](int64_t n) {
      float* start = f;
      f += (n + kMaxLanes - 1) & ~(kMaxLanes - 1);
      return start;
    };
    offsets_ = reinterpret_cast<int64_t*>(take(2 * (kChunk + kMaxLanes)));
    own_offsets_ = reinterpret_cast<int64_t*>(take(2 * (kChunk + kMaxLanes)));
    seen_ = reinterpret_cast<Range*>(take(4 * rows_));
    here_ = reinterpret_cast<Range*>(take(4 * rows_));
    q_ = take(rows_ * stride_);
    scores_ = take(rows_ * kScoreStride);
    for (State* s : {&chunk_, &split_, &row_}) *s = state_at(take(state_floats()));
  }

  void run() {
    load_rows();
    clear(row_);
    const int64_t first = std::max(t_.split_begin, lowest_ / kSplit);
    const int64_t last = std::min(t_.split_end, (highest_ + kSplit - 1) / kSplit);
    if (t_.partials != nullptr) {
      for (int64_t s = t_.split_begin; s < t_.split_end; ++s) {
        split_ = state_at(t_.partials + s * state_floats());
        clear(split_);
        if (s >= first && s < last) run_split(s);
      }
      return;
    }
    for (int64_t s = first; s < last; ++s) {
      clear(split_);
      run_split(s);
      merge(split_, row_);
    }
    write_rows();
  }

  // The partials of all splits, in order, into the rows.
  void merge_partials() {
    clear(row_);
    for (int64_t s = t_.split_begin; s < t_.split_end; ++s) {
      merge(state_at(t_.partials + s * state_floats()), row_);
    }
    write_rows();
  }

 private:
  int64_t state_floats() const { return attention_state_floats(rows_, p_.head_dim); }
  State state_at(float* f) const { return {f, f + rows_, f + state_floats() - rows_ * stride_}; }

  void clear(const State& s) const {
    std::fill_n(s.m, rows_, kNegInf);
    std::fill_n(s.l, rows_, 0.0f);
    std::fill_n(s.acc, rows_ * stride_, 0.0f);
  }

  const uint64_t* bits(int64_t node) const {
    return p_.ancestors + (t_.b * p_.nodes + node) * p_.words;
  }

  // q * scale in fp32, and the range of positions of each node.
  void load_rows() {
    const T* q = static_cast<const T*>(p_.q) + t_.b * p_.q_stride[0];
    const int64_t count = p_.num_nodes != nullptr ? p_.num_nodes[t_.b] : p_.nodes;
    lowest_ = std::numeric_limits<int64_t>::max();
    highest_ = 0;
    for (int64_t i = 0; i < nodes_; ++i) {
      const int64_t n = t_.node_begin + i;
      int64_t end = len_ + p_.node_offset + n + 1;
      bool padding = n >= count;
      if (p_.ancestors != nullptr && !padding) {
        int64_t path = 0;
        for (int64_t w = 0; w < p_.words; ++w) path += __builtin_popcountll(bits(n)[w]);
        end = len_ + path;
        padding = path == 0;
      }
      Range seen{p_.window > 0 ? std::max<int64_t>(0, end - p_.window) : 0, end};
      if (padding) seen = {0, 0};
      seen_[i] = seen;
      if (seen.end > 0) {
        lowest_ = std::min(lowest_, seen.begin);
        highest_ = std::max(highest_, seen.end);
      }
      for (int64_t g = 0; g < group_; ++g) {
        const T* from = q + n * p_.q_stride[1] + (t_.kv_head * group_ + g) * p_.q_stride[2];
        float* to = q_ + (i * group_ + g) * stride_;
        for (int64_t d = 0; d < p_.head_dim; ++d) to[d] = to_float(from[d]) * p_.scale;
        for (int64_t d = p_.head_dim; d < stride_; ++d) to[d] = 0.0f;
      }
    }
    if (highest_ == 0) lowest_ = 0;
  }

  void run_split(int64_t split) {
    const int64_t begin = std::max(split * kSplit, lowest_ / kChunk * kChunk);
    const int64_t end = std::min((split + 1) * kSplit, highest_);
    for (int64_t c = begin; c < end; c += kChunk) run_chunk(c);
  }

  void run_chunk(int64_t begin) {
    Range shared{kChunk, 0};
    for (int64_t i = 0; i < nodes_; ++i) {
      here_[i] = {std::clamp<int64_t>(seen_[i].begin - begin, 0, kChunk),
                  std::clamp<int64_t>(seen_[i].end - begin, 0, kChunk)};
      if (here_[i].begin >= here_[i].end) continue;
      shared.begin = std::min(shared.begin, here_[i].begin);
      shared.end = std::max(shared.end, here_[i].end);
    }
    shared_here_ = std::clamp<int64_t>(shared_end_ - begin, 0, kChunk);
    shared.end = std::min(shared.end, shared_here_);
    list_shared(begin, shared);
    for (int64_t i = shared.begin; i < shared.end; i += kTile) {
      score_shared({i, std::min(i + kTile, shared.end)});
    }
    for_each_own([&](int64_t node, Range own) { score_own(node, own); }, begin);
    for (int64_t r = 0; r < rows_; ++r) soften(r);
    std::fill_n(chunk_.acc, rows_ * stride_, 0.0f);
    for (int64_t i = shared.begin; i < shared.end; i += kTile) {
      sum_shared({i, std::min(i + kTile, shared.end)});
    }
    for_each_own(
        [&](int64_t node, Range own) {
          for (int64_t g = 0; g < group_; ++g) sum_row(node * group_ + g, own_offsets_, own);
        },
        begin);
    merge(chunk_, split_);
  }

  // Element offsets of the committed keys of the chunk, by place in the chunk.
  void list_shared(int64_t begin, Range shared) {
    const int shift = __builtin_ctzll(static_cast<uint64_t>(p_.page_size));
    for (int64_t i = shared.begin; i < shared.end;) {
      const int64_t slot = begin + i;
      const int64_t row = slot & (p_.page_size - 1);
      const int64_t page = table_[slot >> shift];
      int64_t offset = ((page << shift) + row) * slot_elems_;
      const int64_t stop = std::min(shared.end, i + p_.page_size - row);
      for (; i < stop; ++i, offset += slot_elems_) offsets_[i] = offset;
    }
    for (int64_t i = 0; shared.begin < shared.end && i < kMaxLanes; ++i) {
      offsets_[shared.end + i] = offsets_[shared.end - 1];
    }
  }

  // Calls f(node, range) for every node that has ancestors of its own in the chunk, with
  // own_offsets_ filled over that range.
  template <typename F>
  void for_each_own(const F& f, int64_t begin) {
    if (p_.ancestors == nullptr) return;
    const int shift = __builtin_ctzll(static_cast<uint64_t>(p_.page_size));
    for (int64_t node = 0; node < nodes_; ++node) {
      const Range own{std::max(here_[node].begin, shared_here_), here_[node].end};
      if (own.begin >= own.end) continue;
      const uint64_t* row = bits(t_.node_begin + node);
      int64_t place = len_ - begin;  // of the path's next node in the chunk
      for (int64_t w = 0; w < p_.words; ++w) {
        for (uint64_t rest = row[w]; rest != 0; rest &= rest - 1, ++place) {
          if (place < own.begin || place >= own.end) continue;
          const int64_t slot = len_ + 64 * w + __builtin_ctzll(rest);
          const int64_t page = table_[slot >> shift];
          own_offsets_[place] = ((page << shift) + (slot & (p_.page_size - 1))) * slot_elems_;
        }
      }
      for (int64_t i = 0; i < kMaxLanes; ++i) own_offsets_[own.end + i] = own_offsets_[own.end - 1];
      f(node, own);
    }
  }

  Range row_range(int64_t r) const { return here_[r / group_]; }

  template <int R>
  void score(int64_t r, const int64_t* offsets, Range keys) {
    score_rows<R>(q_ + r * stride_, stride_, k_, offsets, keys.begin, keys.end, p_.head_dim,
                  scores_ + r * kScoreStride);
  }

  void score_shared(Range tile) {
    int64_t r = 0;
    const auto clipped =
        [&](int64_t count) {  // what any of `count` rows from r on sees of the tile
          Range keys{tile.end, tile.begin};
          for (int64_t node = r / group_; node <= (r + count - 1) / group_; ++node) {
            keys.begin = std::min(keys.begin, std::max(tile.begin, here_[node].begin));
            keys.end = std::max(keys.end, std::min(tile.end, here_[node].end));
          }
          return keys;
        };
    for (; r + kKeyRows <= rows_; r += kKeyRows) score<kKeyRows>(r, offsets_, clipped(kKeyRows));
    for (; kKeyRows > 2 && r + 2 <= rows_; r += 2) score<2>(r, offsets_, clipped(2));
    for (; r < rows_; ++r) score<1>(r, offsets_, clipped(1));
  }

  void score_own(int64_t node, Range own) {
    int64_t r = node * group_;
    const int64_t end = r + group_;
    for (; r + kKeyRows <= end; r += kKeyRows) score<kKeyRows>(r, own_offsets_, own);
    for (; kKeyRows > 2 && r + 2 <= end; r += 2) score<2>(r, own_offsets_, own);
    for (; r < end; ++r) score<1>(r, own_offsets_, own);
  }

  // Scores of one row -> exponentials, with m and l. Lanes are counted from the chunk's start, and
  // places outside the row's range count as e^-inf.
  void soften(int64_t r) {
    const Range keys = row_range(r);
    chunk_.m[r] = kNegInf;
    chunk_.l[r] = 0.0f;
    if (keys.begin >= keys.end) return;
    float* s = scores_ + r * kScoreStride;
    const int64_t first = keys.begin & ~int64_t{kMaxLanes - 1};
    const int64_t last = (keys.end + kMaxLanes - 1) & ~int64_t{kMaxLanes - 1};
    uint32_t nan = 0;
    if (p_.softcap > 0.0f) {
      const vf cap = vset(p_.softcap), inverse = vset(1.0f / p_.softcap);
      for (int64_t i = keys.begin; i < keys.end; ++i) nan |= std::isnan(s[i]) ? 1u : 0u;
      for (int64_t i = first; i < last; i += kLanes) {
        vstore(s + i, cap * vtanh(vload(s + i) * inverse));
      }
    }
    std::fill(s + first, s + keys.begin, kNegInf);
    std::fill(s + keys.end, s + last, kNegInf);
    vf top = vset(kNegInf);
    for (int64_t i = first; i < last; i += kLanes) {
      const vf x = vload(s + i);
      nan |= visnan(x);
      top = vmax(x, top);
    }
    const float m = vreduce_max(top);
    const vf shift = vset(m);
    vf sum = vset(0.0f);
    for (int64_t i = first; i < last; i += kLanes) {
      const vf e = vexp(vload(s + i) - shift);
      vstore(s + i, e);
      sum = sum + e;
    }
    const bool lost = nan != 0 || !std::isfinite(m);  // as a softmax would: the row is NaN
    chunk_.m[r] = lost ? 0.0f : m;
    chunk_.l[r] = lost ? std::numeric_limits<float>::quiet_NaN() : vreduce_add(sum);
  }

  void sum_row(int64_t r, const int64_t* offsets, Range keys) {
    value_rows<1>(chunk_.acc + r * stride_, stride_, scores_ + r * kScoreStride, v_, offsets,
                  keys.begin, keys.end, p_.head_dim);
  }

  void sum_shared(Range tile) {
    const auto clipped = [&](int64_t r) {
      return Range{std::max(tile.begin, row_range(r).begin), std::min(tile.end, row_range(r).end)};
    };
    int64_t r = 0;
    for (; r + kValueRows <= rows_; r += kValueRows) sum_rows<kValueRows>(r, clipped);
    for (; r + 2 <= rows_; r += 2) sum_rows<2>(r, clipped);
    for (; r < rows_; ++r) sum_row(r, offsets_, clipped(r));
  }

  // R rows together over what all of them see; what only some see before and after it, row by row.
  template <int R, typename F>
  void sum_rows(int64_t r, const F& clipped) {
    Range keys[R];
    Range common{0, kChunk};
    for (int i = 0; i < R; ++i) {
      keys[i] = clipped(r + i);
      common.begin = std::max(common.begin, keys[i].begin);
      common.end = std::min(common.end, keys[i].end);
    }
    if (common.begin >= common.end) {
      for (int i = 0; i < R; ++i) sum_row(r + i, offsets_, keys[i]);
      return;
    }
    for (int i = 0; i < R; ++i) sum_row(r + i, offsets_, {keys[i].begin, common.begin});
    value_rows<R>(chunk_.acc + r * stride_, stride_, scores_ + r * kScoreStride, v_, offsets_,
                  common.begin, common.end, p_.head_dim);
    for (int i = 0; i < R; ++i) sum_row(r + i, offsets_, {common.end, keys[i].end});
  }

  void merge(const State& from, const State& into) const {
    for (int64_t r = 0; r < rows_; ++r) {
      if (from.m[r] == kNegInf) continue;
      float* to = into.acc + r * stride_;
      const float* add = from.acc + r * stride_;
      if (into.m[r] == kNegInf) {
        into.m[r] = from.m[r];
        into.l[r] = from.l[r];
        std::memcpy(to, add, sizeof(float) * static_cast<size_t>(stride_));
        continue;
      }
      const float top = std::max(into.m[r], from.m[r]);
      const float keep = std::exp(into.m[r] - top);
      const float gain = std::exp(from.m[r] - top);
      into.m[r] = top;
      into.l[r] = into.l[r] * keep + from.l[r] * gain;
      const vf a = vset(keep), b = vset(gain);
      for (int64_t d = 0; d < stride_; d += kLanes) {
        vstore(to + d, vfma(vload(add + d), b, vload(to + d) * a));
      }
    }
  }

  void write_rows() const {
    for (int64_t r = 0; r < rows_; ++r) {
      const int64_t n = t_.node_begin + r / group_;
      const int64_t head = t_.kv_head * group_ + r % group_;
      T* out = static_cast<T*>(p_.out) + ((t_.b * p_.nodes + n) * p_.q_heads + head) * p_.head_dim;
      const float* acc = row_.acc + r * stride_;
      const float inverse = row_.m[r] == kNegInf ? 0.0f : 1.0f / row_.l[r];
      for (int64_t d = 0; d < p_.head_dim; ++d) out[d] = from_float<T>(acc[d] * inverse);
    }
  }

  const AttentionParams& p_;
  const AttentionTask& t_;
  const int64_t group_, nodes_, rows_, stride_, slot_elems_;
  const T* const k_;
  const T* const v_;
  const int32_t* const table_;
  const int64_t len_;
  const int64_t shared_end_;  // positions from here on are a row's own
  int64_t shared_here_ = 0;   // the same, in the chunk at hand
  int64_t lowest_ = 0, highest_ = 0;
  int64_t* offsets_;
  int64_t* own_offsets_;
  Range* seen_;  // per node: positions
  Range* here_;  // per node: places in the chunk at hand
  float* q_;
  float* scores_;
  State chunk_, split_, row_;
};

template <typename F>
void with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kF32:
      return f(float{});
    case DType::kF16:
      return f(f16{});
    case DType::kBF16:
      return f(bf16{});
  }
}

}  // namespace

void attention_block(const AttentionParams& p, const AttentionTask& t) {
  with_type(p.dtype, [&](auto type) { Block<decltype(type)>(p, t).run(); });
}

void attention_merge(const AttentionParams& p, const AttentionTask& t) {
  with_type(p.dtype, [&](auto type) { Block<decltype(type)>(p, t).merge_partials(); });
}

}  // namespace inferlab::cpu::INFERLAB_ISA
