// Paged tree attention, one task: a block of rows (nodes x the query heads of some KV heads) over a
// run of positions. Flash-decoding with fixed chunks (csrc/cpu/attention_task.h); per chunk and
// head:
//
//   1. scores of all rows against the committed keys of the chunk, in tiles of keys that stay in L1
//      while the rows pass over them; then each node's own ancestors, through a list of its own
//   2. per row: soft cap, maximum, exponentials, their sum
//   3. weighted values, in the same tiles
//   4. merged into the row's state: M = max(m, m'), l = l e^(m-M) + l' e^(m'-M), acc likewise
//
// Step 1 prefetches the values, step 3 the keys of the next head or chunk. A key that a row does
// not see is not in the row's range: it is never multiplied by zero, so garbage there, NaN
// included, has no effect. Mapping: one thread per task. Bytes: K and V of the positions once per
// task, 2 * positions * heads * D * s; q and out are small beside them.
#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "attention_tiles.h"

namespace inferlab::cpu::INFERLAB_ISA {
namespace {

constexpr int64_t kConvertRows = 8;  // from here on a 16-bit tile is converted once for all rows
constexpr float kNegInf = -std::numeric_limits<float>::infinity();

// Rows' running softmax: m (maximum), l (sum of exponentials), acc (weighted values).
struct State {
  float* m;
  float* l;
  float* acc;
};

struct Range {
  int64_t begin, end;
  bool empty() const { return begin >= end; }
};

Range intersect(Range a, Range b) { return {std::max(a.begin, b.begin), std::min(a.end, b.end)}; }

template <typename T>
class Block {
 public:
  Block(const AttentionParams& p, const AttentionTask& t)
      : p_(p),
        t_(t),
        group_(p.q_heads / p.kv_heads),
        heads_(t.head_end - t.head_begin),
        nodes_(t.node_end - t.node_begin),
        rows_(nodes_ * group_),
        stride_(padded(p.head_dim)),
        slot_elems_(p.kv_heads * p.head_dim),
        page_shift_(__builtin_ctzll(static_cast<uint64_t>(p.page_size))),
        table_(p.block_table + t.b * p.table_stride),
        len_(p.seq_lens[t.b]),
        shared_end_(p.ancestors != nullptr ? len_ : std::numeric_limits<int64_t>::max()),
        convert_(!std::is_same_v<T, float> && rows_ >= kConvertRows) {
    float* f = t.scratch;
    const auto take = [&f](int64_t n) {
      float* start = f;
      f += padded(n);
      return start;
    };
    offsets_ = reinterpret_cast<int64_t*>(take(2 * (kChunk + kMaxLanes)));
    next_offsets_ = reinterpret_cast<int64_t*>(take(2 * (kChunk + kMaxLanes)));
    own_offsets_ = reinterpret_cast<int64_t*>(take(2 * nodes_ * own_list_length(p.words)));
    seen_ = reinterpret_cast<Range*>(take(4 * nodes_));
    here_ = reinterpret_cast<Range*>(take(4 * nodes_));
    own_ = reinterpret_cast<Range*>(take(4 * nodes_));
    q_ = take(heads_ * rows_ * stride_);
    split_ = state_at(take(state_floats()));
    row_ = state_at(take(state_floats()));
    chunk_ = state_at(take(state_floats()));
    scores_ = take(heads_ * rows_ * kScoreStride);
    tile_ = take((kTile + kMaxLanes) * stride_);
    tile_offsets_ = reinterpret_cast<int64_t*>(take(2 * (kTile + kMaxLanes)));
    for (int64_t i = 0; convert_ && i < kTile + kMaxLanes; ++i) tile_offsets_[i] = i * stride_;
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
  int64_t state_floats() const { return attention_state_floats(heads_ * rows_, p_.head_dim); }
  State state_at(float* f) const { return {f, f + heads_ * rows_, f + padded(2 * heads_ * rows_)}; }

  // acc is left as it is: merging into an empty row (m = -inf) replaces it.
  void clear(const State& s) const {
    std::fill_n(s.m, heads_ * rows_, kNegInf);
    std::fill_n(s.l, heads_ * rows_, 0.0f);
  }

  const uint64_t* bits(int64_t node) const {
    return p_.ancestors + (t_.b * p_.nodes + t_.node_begin + node) * p_.words;
  }
  const T* keys(int64_t h) const {
    return static_cast<const T*>(p_.k_pages) + (t_.head_begin + h) * p_.head_dim;
  }
  const T* values(int64_t h) const {
    return static_cast<const T*>(p_.v_pages) + (t_.head_begin + h) * p_.head_dim;
  }
  int64_t slot_offset(int64_t slot) const {
    const int64_t page = table_[slot >> page_shift_];
    return ((page << page_shift_) + (slot & (p_.page_size - 1))) * slot_elems_;
  }

  // q * scale in fp32, and the range of positions of each node.
  void load_rows() {
    const int64_t count = p_.num_nodes != nullptr ? p_.num_nodes[t_.b] : p_.nodes;
    lowest_ = std::numeric_limits<int64_t>::max();
    highest_ = 0;
    for (int64_t i = 0; i < nodes_; ++i) {
      const int64_t n = t_.node_begin + i;
      int64_t end = len_ + p_.node_offset + n + 1;
      bool padding = n >= count;
      if (p_.ancestors != nullptr && !padding) {
        int64_t path = 0;
        for (int64_t w = 0; w < p_.words; ++w) path += __builtin_popcountll(bits(i)[w]);
        end = len_ + path;
        padding = path == 0;
      }
      seen_[i] = {p_.window > 0 ? std::max<int64_t>(0, end - p_.window) : 0, end};
      if (padding) seen_[i] = {0, 0};
      if (!seen_[i].empty()) {
        lowest_ = std::min(lowest_, seen_[i].begin);
        highest_ = std::max(highest_, seen_[i].end);
      }
      for (int64_t h = 0; h < heads_; ++h) {
        const T* q = static_cast<const T*>(p_.q) + t_.b * p_.q_stride[0] + n * p_.q_stride[1] +
                     (t_.head_begin + h) * group_ * p_.q_stride[2];
        float* to = q_ + (h * rows_ + i * group_) * stride_;
        for (int64_t g = 0; g < group_; ++g, q += p_.q_stride[2], to += stride_) {
          for (int64_t d = 0; d < p_.head_dim; ++d) to[d] = to_float(q[d]) * p_.scale;
          for (int64_t d = p_.head_dim; d < stride_; ++d) to[d] = 0.0f;
        }
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
    const int64_t shared_here = std::clamp<int64_t>(shared_end_ - begin, 0, kChunk);
    Range shared{kChunk, 0};
    for (int64_t i = 0; i < nodes_; ++i) {
      const Range here{std::clamp<int64_t>(seen_[i].begin - begin, 0, kChunk),
                       std::clamp<int64_t>(seen_[i].end - begin, 0, kChunk)};
      here_[i] = here;
      own_[i] = {std::max(here.begin, shared_here), here.end};
      if (here.empty()) continue;
      shared.begin = std::min(shared.begin, here.begin);
      shared.end = std::max(shared.end, std::min(here.end, shared_here));
    }
    list_shared(begin, shared, offsets_);
    const int64_t committed_end = std::min(highest_, shared_end_);
    const Range next{0, std::min(kChunk, committed_end - begin - kChunk)};
    list_shared(begin + kChunk, next, next_offsets_);
    list_own(begin);
    for (int64_t i = shared.begin; i < shared.end; i += kTile) {
      Ahead ahead = i + kTile < shared.end
                        ? tile_ahead(keys(0), offsets_, i + kTile, shared.end)
                        : tile_ahead(values(0), offsets_, shared.begin, shared.end);
      for (int64_t h = 0; h < heads_; ++h) {
        score_shared(h, {i, std::min(i + kTile, shared.end)}, &ahead);
      }
    }
    for (int64_t node = 0; node < nodes_; ++node) {
      for (int64_t h = 0; h < heads_ && !own_[node].empty(); ++h) score_own(h, node);
    }
    for (int64_t r = 0; r < heads_ * rows_; ++r) soften(r);
    std::fill_n(chunk_.acc, heads_ * rows_ * stride_, 0.0f);
    for (int64_t i = shared.begin; i < shared.end; i += kTile) {
      Ahead ahead = i + kTile < shared.end
                        ? tile_ahead(values(0), offsets_, i + kTile, shared.end)
                        : tile_ahead(keys(0), next_offsets_, next.begin, next.end);
      for (int64_t h = 0; h < heads_; ++h) {
        sum_shared(h, {i, std::min(i + kTile, shared.end)}, &ahead);
      }
    }
    for (int64_t node = 0; node < nodes_; ++node) {
      for (int64_t h = 0; h < heads_ && !own_[node].empty(); ++h) sum_own(h, node);
    }
    merge(chunk_, split_);
  }

  // The tile from `begin` on, all heads.
  Ahead tile_ahead(const T* base, const int64_t* offsets, int64_t begin, int64_t end) const {
    if (begin >= end) return Ahead();
    return Ahead(base, offsets + begin, offsets + std::min(begin + kTile, end),
                 heads_ * p_.head_dim * static_cast<int64_t>(sizeof(T)), sizeof(T));
  }

  // Element offsets of the committed keys of a chunk, by place in the chunk; the last one is
  // repeated to the end of the list.
  void list_shared(int64_t begin, Range shared, int64_t* offsets) const {
    if (shared.empty()) return;
    for (int64_t i = shared.begin; i < shared.end;) {
      const int64_t slot = begin + i;
      int64_t offset = slot_offset(slot);
      const int64_t stop = std::min(shared.end, i + p_.page_size - (slot & (p_.page_size - 1)));
      for (; i < stop; ++i, offset += slot_elems_) offsets[i] = offset;
    }
    std::fill(offsets + shared.end, offsets + kChunk + kMaxLanes, offsets[shared.end - 1]);
  }

  int64_t* own_list(int64_t node) const { return own_offsets_ + node * own_list_length(p_.words); }

  // The same for each node's own ancestors in the chunk, counted from own_[node].begin.
  void list_own(int64_t begin) {
    if (p_.ancestors == nullptr) return;
    for (int64_t node = 0; node < nodes_; ++node) {
      const Range own = own_[node];
      if (own.empty()) continue;
      int64_t* list = own_list(node);
      int64_t place = len_ - begin;  // of the path's next node in the chunk
      for (int64_t w = 0; w < p_.words && place < own.end; ++w) {
        for (uint64_t rest = bits(node)[w]; rest != 0 && place < own.end; rest &= rest - 1) {
          if (place >= own.begin) {
            list[place - own.begin] = slot_offset(len_ + 64 * w + __builtin_ctzll(rest));
          }
          ++place;
        }
      }
      const int64_t count = own.end - own.begin;
      std::fill_n(list + count, kMaxLanes, list[count - 1]);
    }
  }

  Range row_range(int64_t r) const { return here_[r % rows_ / group_]; }

  // Calls f(row, count as a constant) for rows [begin, end), in groups of R rows, then of 2,
  // then 1.
  template <int R, typename F>
  static void in_groups(int64_t begin, int64_t end, const F& f) {
    int64_t r = begin;
    for (; r + R <= end; r += R) f(r, std::integral_constant<int, R>{});
    for (; R > 2 && r + 2 <= end; r += 2) f(r, std::integral_constant<int, 2>{});
    for (; r < end; ++r) f(r, std::integral_constant<int, 1>{});
  }

  // A tile's keys or values in fp32, rows padded with zeros.
  void convert(const T* from, Range tile) {
    for (int64_t i = tile.begin; i < tile.end; ++i) {
      const T* x = from + offsets_[i];
      float* to = tile_ + (i - tile.begin) * stride_;
      int64_t d = 0;
      for (; d + kLanes <= p_.head_dim; d += kLanes) vstore(to + d, vload(x + d));
#if defined(INFERLAB_ISA_AVX512)
      if (d < p_.head_dim) {
        vstore(to + d, vload_half(x + d));
        d += kLanes;
      }
#endif
      for (; d < stride_; ++d) to[d] = 0.0f;
    }
  }

  void score_shared(int64_t h, Range tile, Ahead* ahead) {
    const float* q = q_ + h * rows_ * stride_;
    const auto seen_by = [&](int64_t r, int64_t count) {  // of the tile, by any of the rows
      Range keys{tile.end, tile.begin};
      for (int64_t node = r / group_; node <= (r + count - 1) / group_; ++node) {
        keys.begin = std::min(keys.begin, std::max(tile.begin, here_[node].begin));
        keys.end = std::max(keys.end, std::min(tile.end, here_[node].end));
      }
      return keys;
    };
    if (convert_) convert(keys(h), tile);
    in_groups<kKeyRows>(0, rows_, [&](int64_t r, auto count) {
      const Range seen = seen_by(r, count);
      float* scores = scores_ + (h * rows_ + r) * kScoreStride;
      Ahead* mine = r == 0 ? ahead : nullptr;
      if (convert_) {
        score_rows<count>(q + r * stride_, stride_, tile_, tile_offsets_, seen.begin - tile.begin,
                          seen.end - tile.begin, stride_, scores + tile.begin, mine);
      } else {
        score_rows<count>(q + r * stride_, stride_, keys(h), offsets_, seen.begin, seen.end,
                          p_.head_dim, scores, mine);
      }
    });
  }

  void score_own(int64_t h, int64_t node) {
    const Range own = own_[node];
    const int64_t first = h * rows_ + node * group_;
    in_groups<kKeyRows>(first, first + group_, [&](int64_t r, auto count) {
      score_rows<count>(q_ + r * stride_, stride_, keys(h), own_list(node), 0, own.end - own.begin,
                        p_.head_dim, scores_ + r * kScoreStride + own.begin, nullptr);
    });
  }

  // Scores of one row -> exponentials, with m and l. Lanes are counted from the chunk's start, and
  // places outside the row's range count as e^-inf.
  void soften(int64_t r) {
    const Range keys = row_range(r);
    chunk_.m[r] = kNegInf;
    chunk_.l[r] = 0.0f;
    if (keys.empty()) return;
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

  void sum_shared(int64_t h, Range tile, Ahead* ahead) {
    if (convert_) convert(values(h), tile);
    const int64_t first = h * rows_;
    in_groups<kValueRows>(first, first + rows_, [&](int64_t r, auto count) {
      // Together what all of the rows see; what only some see, before and after it, row by row.
      Range common = tile;
      for (int i = 0; i < count; ++i) common = intersect(common, row_range(r + i));
      if (common.empty()) common = {tile.end, tile.end};
      for (int i = 0; count > 1 && i < count; ++i) {
        sum_rows<1>(h, r + i, tile, intersect(row_range(r + i), {tile.begin, common.begin}));
      }
      sum_rows<count>(h, r, tile, common, r == first ? ahead : nullptr);
      for (int i = 0; count > 1 && i < count; ++i) {
        sum_rows<1>(h, r + i, tile, intersect(row_range(r + i), {common.end, tile.end}));
      }
    });
  }

  template <int R>
  void sum_rows(int64_t h, int64_t r, Range tile, Range keys, Ahead* ahead = nullptr) {
    float* acc = chunk_.acc + r * stride_;
    const float* weights = scores_ + r * kScoreStride;
    if (convert_) {
      value_rows<R>(acc, stride_, weights + tile.begin, tile_, tile_offsets_,
                    keys.begin - tile.begin, keys.end - tile.begin, stride_, ahead);
    } else {
      value_rows<R>(acc, stride_, weights, values(h), offsets_, keys.begin, keys.end, p_.head_dim,
                    ahead);
    }
  }

  void sum_own(int64_t h, int64_t node) {
    const Range own = own_[node];
    const int64_t first = h * rows_ + node * group_;
    in_groups<kValueRows>(first, first + group_, [&](int64_t r, auto count) {
      value_rows<count>(chunk_.acc + r * stride_, stride_, scores_ + r * kScoreStride + own.begin,
                        values(h), own_list(node), 0, own.end - own.begin, p_.head_dim);
    });
  }

  void merge(const State& from, const State& into) const {
    for (int64_t r = 0; r < heads_ * rows_; ++r) {
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
    for (int64_t r = 0; r < heads_ * rows_; ++r) {
      const int64_t n = t_.node_begin + r % rows_ / group_;
      const int64_t head = (t_.head_begin + r / rows_) * group_ + r % group_;
      T* out = static_cast<T*>(p_.out) + ((t_.b * p_.nodes + n) * p_.q_heads + head) * p_.head_dim;
      if (row_.m[r] == kNegInf) {
        std::fill_n(out, p_.head_dim, T{});
        continue;
      }
      const float* acc = row_.acc + r * stride_;
      const float inverse = 1.0f / row_.l[r];
      for (int64_t d = 0; d < p_.head_dim; ++d) out[d] = from_float<T>(acc[d] * inverse);
    }
  }

  const AttentionParams& p_;
  const AttentionTask& t_;
  const int64_t group_, heads_, nodes_;
  const int64_t rows_;  // of one KV head
  const int64_t stride_, slot_elems_;
  const int page_shift_;
  const int32_t* const table_;
  const int64_t len_;
  const int64_t shared_end_;  // positions from here on are a row's own
  const bool convert_;
  int64_t lowest_ = 0, highest_ = 0;  // positions that any row sees
  int64_t* offsets_;
  int64_t* next_offsets_;  // of the next chunk
  int64_t* own_offsets_;
  Range* seen_;  // per node: positions
  Range* here_;  // per node: places in the chunk at hand
  Range* own_;   // per node: of these, the ones with its own ancestors
  float* q_;
  float* scores_;
  float* tile_;
  int64_t* tile_offsets_;
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
