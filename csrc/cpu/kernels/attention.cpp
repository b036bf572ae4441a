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
// bf16 of whole 32 channels goes to AMX (attention_amx.h) where the processor has it.
//
// Each tile prefetches the one that comes after it, values after the chunk's last keys and the next
// chunk's keys after the last values. A key that a row does not see is not in the row's range: it
// is never multiplied by zero, so garbage there, NaN included, has no effect. Mapping: one thread
// per task. Bytes: K and V of the positions once per task, 2 * positions * heads * D * s; q and out
// are small beside them.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <type_traits>

#include "attention_softmax.h"
#include "attention_tiles.h"
#if defined(INFERLAB_ISA_AVX512)
#include "attention_amx.h"
#endif

namespace inferlab::cpu::INFERLAB_ISA {
namespace {

constexpr int64_t kConvertRows = 8;  // from here on a 16-bit tile is converted once for all rows

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
        convert_(!std::is_same_v<T, float> && rows_ >= kConvertRows),
        tile_keys_(rows_ >= kConvertRows ? kTile : kTile / 2) {
    float* f = t.scratch;
    const auto take = [&f](int64_t n) {
      float* start = f;
      f += padded(n);
      return start;
    };
    offsets_ = reinterpret_cast<int64_t*>(take(2 * kListLength));
    next_offsets_ = reinterpret_cast<int64_t*>(take(2 * kListLength));
    own_offsets_ = reinterpret_cast<int64_t*>(take(2 * nodes_ * own_list_length(p.words)));
    seen_ = reinterpret_cast<Range*>(take(4 * nodes_));
    here_ = reinterpret_cast<Range*>(take(4 * heads_ * rows_));
    own_ = reinterpret_cast<Range*>(take(4 * nodes_));
    q_ = take(heads_ * rows_ * stride_);
    split_ = state_at(take(state_floats()));
    row_ = state_at(take(state_floats()));
    chunk_ = state_at(take(state_floats()));
    scores_ = take(heads_ * rows_ * kScoreStride);
    even_ = take(heads_ * rows_ * kScoreStride);
    tile_ = take((kTile + kMaxLanes) * stride_);
    tile_offsets_ = reinterpret_cast<int64_t*>(take(2 * (kTile + kMaxLanes)));
    for (int64_t i = 0; convert_ && i < kTile + kMaxLanes; ++i) tile_offsets_[i] = i * stride_;
#if defined(INFERLAB_ISA_AVX512)
    if (std::is_same_v<T, bf16> && TileProducts::usable(p.head_dim)) {
      float* memory = take(tile_products_floats(heads_, rows_, p.head_dim));
      products_.emplace(memory, heads_, rows_, p.head_dim, p.scale);
    }
#endif
  }

  void run() {
    load_rows();
#if defined(INFERLAB_ISA_AVX512)
    std::optional<TileScope> scope;
    if (products_) products_->enter(scope);
#endif
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
      merge(split_, row_, heads_ * rows_, stride_);
    }
    write_rows();
  }

  // The partials of all splits, in order, into the rows.
  void merge_partials() {
    clear(row_);
    for (int64_t s = t_.split_begin; s < t_.split_end; ++s) {
      merge(state_at(t_.partials + s * state_floats()), row_, heads_ * rows_, stride_);
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
#if defined(INFERLAB_ISA_AVX512)
          if constexpr (std::is_same_v<T, bf16>) {
            if (products_) {
              products_->set_row(h, i * group_ + g, q);
              continue;
            }
          }
#endif
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
      for (int64_t h = 0; h < heads_; ++h) {
        std::fill_n(here_ + h * rows_ + i * group_, group_, here);
      }
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
#if defined(INFERLAB_ISA_AVX512)
    if constexpr (std::is_same_v<T, bf16>) {
      if (products_) {
        run_chunk_by_tiles(shared, next, shared_here);
        merge(chunk_, split_, heads_ * rows_, stride_);
        return;
      }
    }
#endif
    for (int64_t i = shared.begin; i < shared.end; i += tile_keys_) {
      const bool more = i + tile_keys_ < shared.end;
      for (int64_t h = 0; h < heads_; ++h) {
        const Ahead<T> ahead{more ? keys(h) : values(h),
                             offsets_ + (more ? tile_keys_ : shared.begin - i)};
        score_shared(h, {i, std::min(i + tile_keys_, shared.end)}, ahead);
      }
    }
    for (int64_t node = 0; node < nodes_; ++node) {
      for (int64_t h = 0; h < heads_ && !own_[node].empty(); ++h) score_own(h, node);
    }
    for (int64_t r = 0; r < heads_ * rows_; ++r) {
      const Softened row = soften(scores_ + r * kScoreStride, here_[r], p_.softcap, [] {});
      chunk_.m[r] = row.m;
      chunk_.l[r] = row.l;
    }
    std::fill_n(chunk_.acc, heads_ * rows_ * stride_, 0.0f);
    for (int64_t i = shared.begin; i < shared.end; i += tile_keys_) {
      const bool more = i + tile_keys_ < shared.end;
      for (int64_t h = 0; h < heads_; ++h) {
        const Ahead<T> ahead{more           ? values(h)
                             : next.empty() ? nullptr
                                            : keys(h),
                             more ? offsets_ + tile_keys_ : next_offsets_ - i};
        sum_shared(h, {i, std::min(i + tile_keys_, shared.end)}, ahead);
      }
    }
    for (int64_t node = 0; node < nodes_; ++node) {
      for (int64_t h = 0; h < heads_ && !own_[node].empty(); ++h) sum_own(h, node);
    }
    merge(chunk_, split_, heads_ * rows_, stride_);
  }

  // Element offsets of the committed keys of a chunk, by place in the chunk; the last one is
  // repeated to the end of the list.
  void list_shared(int64_t begin, Range shared, int64_t* offsets) const {
    if (shared.empty()) return;
    const int64_t slack = shared.begin & ~(kMaxLanes - 1);
    for (int64_t i = shared.begin; i < shared.end;) {
      const int64_t slot = begin + i;
      int64_t offset = slot_offset(slot);
      const int64_t stop = std::min(shared.end, i + p_.page_size - (slot & (p_.page_size - 1)));
      for (; i < stop; ++i, offset += slot_elems_) offsets[i] = offset;
    }
    std::fill(offsets + slack, offsets + shared.begin, offsets[shared.begin]);
    std::fill(offsets + shared.end, offsets + kListLength, offsets[shared.end - 1]);
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

  // Calls f(row, count as a constant) for rows [begin, end), in groups of R rows, then of 2,
  // then 1.
  template <int R, typename F>
  static void in_groups(int64_t begin, int64_t end, const F& f) {
    int64_t r = begin;
    for (; r + R <= end; r += R) f(r, std::integral_constant<int, R>{});
    for (; R > 2 && r + 2 <= end; r += 2) f(r, std::integral_constant<int, 2>{});
    for (; r < end; ++r) f(r, std::integral_constant<int, 1>{});
  }

  void score_shared(int64_t h, Range tile, const Ahead<T>& ahead) {
    const float* q = q_ + h * rows_ * stride_;
    if (convert_) convert_rows(keys(h), offsets_, tile, p_.head_dim, stride_, ahead, tile_);
    in_groups<kKeyRows>(0, rows_, [&](int64_t r, auto count) {
      Range seen{tile.end, tile.begin};  // of the tile, by any of the rows
      for (int i = 0; i < count; ++i) {
        seen.begin = std::min(seen.begin, std::max(tile.begin, here_[r + i].begin));
        seen.end = std::max(seen.end, std::min(tile.end, here_[r + i].end));
      }
      float* scores = scores_ + (h * rows_ + r) * kScoreStride;
      if (convert_) {
        score_rows<count>(q + r * stride_, stride_, tile_, tile_offsets_, seen.begin - tile.begin,
                          seen.end - tile.begin, stride_, scores + tile.begin);
      } else {
        score_rows<count>(q + r * stride_, stride_, keys(h), offsets_, seen.begin, seen.end,
                          p_.head_dim, scores, r == 0 ? ahead : Ahead<T>{});
      }
    });
  }

  void score_own(int64_t h, int64_t node) {
    const Range own = own_[node];
    const int64_t first = h * rows_ + node * group_;
    in_groups<kKeyRows>(first, first + group_, [&](int64_t r, auto count) {
      score_rows<count>(q_ + r * stride_, stride_, keys(h), own_list(node), 0, own.end - own.begin,
                        p_.head_dim, scores_ + r * kScoreStride + own.begin);
    });
  }

#if defined(INFERLAB_ISA_AVX512)
  // 16 committed keys or values from `place` on, a multiple of 16, of `seen` places: from their
  // page where all are seen and stand in one.
  Block16 committed_block(const T* from, int64_t place, Range seen) {
    const int64_t* list = offsets_ + place;
    if (p_.page_size >= kBlock && seen.begin <= place && place + kBlock <= seen.end) {
      return {from + list[0], slot_elems_};
    }
    return products_->lay(place / kBlock % (kTile / kBlock), from, list,
                          {seen.begin - place, seen.end - place});
  }

  // run_chunk's work by AMX.
  void run_chunk_by_tiles(Range shared, Range next, int64_t shared_here) {
    const int64_t begin = shared.begin & ~(kBlock - 1);
    const int64_t slots = std::max<int64_t>(shared.end - begin, 0);
    ahead_.begin_chunk(keys(0), values(0), offsets_ + begin, slots, next_offsets_,
                       std::clamp<int64_t>(next.end, 0, tile_keys_), heads_ * p_.head_dim,
                       std::min(slots, tile_keys_));
    // Softmax asks for a line with each vector, since it reads none, and sums ask for so many less.
    const int64_t lines = std::max(kBlock - 32 * rows_ / p_.head_dim, kBlock / 2);
    for (int64_t i = begin; i < shared.end; i += tile_keys_) {
      const int64_t stop = std::min(i + tile_keys_, shared.end);
      for (int64_t h = 0; h < heads_; ++h) {
        for (int64_t j = i; j < stop; j += kBlock) {
          products_->score(h, {0, rows_}, committed_block(keys(h), j, shared),
                           scores_ + h * rows_ * kScoreStride + j, &ahead_);
        }
      }
    }
    for (int64_t node = 0; node < nodes_; ++node) {
      const Range own = own_[node];
      for (int64_t i = own.begin; i < own.end; i += kBlock) {
        for (int64_t h = 0; h < heads_; ++h) {
          const Block16 block = products_->lay(0, keys(h), own_list(node) + i - own.begin,
                                               {0, std::min(kBlock, own.end - i)});
          products_->score(h, {node * group_, (node + 1) * group_}, block,
                           scores_ + h * rows_ * kScoreStride + i, nullptr);
        }
      }
    }
    for (int64_t r = 0; r < heads_ * rows_; ++r) {
      const Softened row =
          soften(scores_ + r * kScoreStride, here_[r], p_.softcap, [this] { ahead_.ask(1); });
      chunk_.m[r] = row.m;
      chunk_.l[r] = row.l;
      split_weights(scores_ + r * kScoreStride, even_ + r * kScoreStride, here_[r]);
    }
    std::fill_n(chunk_.acc, heads_ * rows_ * stride_, 0.0f);
    // A block with some node's own ancestors is that node's alone.
    const int64_t whole = p_.ancestors != nullptr ? shared_here & ~(kBlock - 1) : kChunk;
    const int64_t end = std::min(shared.end, whole);
    for (int64_t i = begin; i < end; i += tile_keys_) {
      const int64_t stop = std::min(i + tile_keys_, end);
      for (int64_t h = 0; h < heads_; ++h) {
        sum_committed(h, {i, stop}, shared, lines);
      }
    }
    for (int64_t node = 0; node < nodes_ && p_.ancestors != nullptr; ++node) {
      sum_alone(node, {whole, kChunk}, shared_here);
    }
    // Rows that a value spoiled which they do not see, NaN or infinite, see to it alone.
    if (!finite(chunk_.acc, heads_ * rows_ * stride_)) {
      std::fill_n(chunk_.acc, heads_ * rows_ * stride_, 0.0f);
      for (int64_t node = 0; node < nodes_; ++node) {
        sum_alone(node, {0, kChunk}, shared_here);
        for (int64_t h = 0; h < heads_; ++h) {
          for (int64_t g = 0; g < group_; ++g) sum_exactly(h, h * rows_ + node * group_ + g, node);
        }
      }
    }
  }

  // A value that is not finite spoils its channel alone; a tile's zero spoils the one beside it.
  void sum_exactly(int64_t h, int64_t r, int64_t node) {
    float* acc = chunk_.acc + r * stride_;
    if (finite(acc, stride_)) return;
    const float* weights = scores_ + r * kScoreStride;
    const Range own = own_[node];
    std::fill_n(tile_, stride_, 0.0f);
    value_rows<1>(tile_, stride_, weights, values(h), offsets_, here_[r].begin,
                  own.empty() ? here_[r].end : own.begin, p_.head_dim);
    if (!own.empty()) {
      value_rows<1>(tile_, stride_, weights + own.begin, values(h), own_list(node), 0,
                    own.end - own.begin, p_.head_dim);
    }
    for (int64_t d = 0; d < p_.head_dim; ++d) acc[tile_place(d)] = tile_[d];
  }

  // Blocks of `places`, all of them committed, of which `shared` are read.
  void sum_committed(int64_t h, Range places, Range shared, int64_t lines) {
    Block16 blocks[kTile / kBlock];
    int64_t count = 0;
    for (int64_t j = places.begin; j < places.end; j += kBlock) {
      blocks[count++] = committed_block(values(h), j, shared);
    }
    const int64_t at = h * rows_ * kScoreStride + places.begin;
    products_->sum({0, rows_}, blocks, count, scores_ + at, even_ + at,
                   chunk_.acc + h * rows_ * stride_, stride_, &ahead_, lines);
  }

  // What a node sees of `places`, from a multiple of 16 on.
  void sum_alone(int64_t node, Range places, int64_t shared_here) {
    const Range here = intersect(here_[node * group_], places);
    for (int64_t i = here.begin & ~(kBlock - 1); i < here.end; i += kBlock) {
      const Range block = intersect(here, {i, i + kBlock});
      int64_t list[kBlock] = {};
      for (int64_t j = block.begin; j < block.end; ++j) {
        list[j - i] = j < shared_here ? offsets_[j] : own_list(node)[j - own_[node].begin];
      }
      for (int64_t h = 0; h < heads_; ++h) {
        const Block16 values_here =
            products_->lay(0, values(h), list, {block.begin - i, block.end - i});
        const int64_t at = h * rows_ * kScoreStride + i;
        products_->sum({node * group_, (node + 1) * group_}, &values_here, 1, scores_ + at,
                       even_ + at, chunk_.acc + h * rows_ * stride_, stride_, nullptr, 0);
      }
    }
  }

  static bool finite(const float* x, int64_t count) {
    vf worst = vset(0.0f);  // x * 0 is NaN where x is not finite
    for (int64_t i = 0; i < count; i += kLanes) worst = vfma(vload(x + i), vset(0.0f), worst);
    return visnan(worst) == 0;
  }
#endif

  void sum_shared(int64_t h, Range tile, const Ahead<T>& ahead) {
    if (convert_) convert_rows(values(h), offsets_, tile, p_.head_dim, stride_, ahead, tile_);
    const int64_t first = h * rows_;
    in_groups<kValueRows>(first, first + rows_, [&](int64_t r, auto count) {
      // Together what all of the rows see; what only some see, before and after it, row by row.
      Range common = tile;
      for (int i = 0; i < count; ++i) common = intersect(common, here_[r + i]);
      if (common.empty()) common = {tile.end, tile.end};
      for (int i = 0; count > 1 && i < count; ++i) {
        sum_rows<1>(h, r + i, tile, intersect(here_[r + i], {tile.begin, common.begin}));
      }
      sum_rows<count>(h, r, tile, common, r == first ? ahead : Ahead<T>{});
      for (int i = 0; count > 1 && i < count; ++i) {
        sum_rows<1>(h, r + i, tile, intersect(here_[r + i], {common.end, tile.end}));
      }
    });
  }

  template <int R>
  void sum_rows(int64_t h, int64_t r, Range tile, Range keys, const Ahead<T>& ahead = {}) {
    float* acc = chunk_.acc + r * stride_;
    const float* weights = scores_ + r * kScoreStride;
    if (convert_) {
      value_rows<R>(acc, stride_, weights + tile.begin, tile_, tile_offsets_,
                    keys.begin - tile.begin, keys.end - tile.begin, stride_);
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

  // Where channel d stands in a row's sums.
  int64_t place(int64_t d) const {
#if defined(INFERLAB_ISA_AVX512)
    if (products_) return tile_place(d);
#endif
    return d;
  }

  void write_rows() const {
    int64_t r = 0;
    for (int64_t h = t_.head_begin; h < t_.head_end; ++h) {
      for (int64_t n = t_.node_begin; n < t_.node_end; ++n) {
        T* out = static_cast<T*>(p_.out) +
                 ((t_.b * p_.nodes + n) * p_.q_heads + h * group_) * p_.head_dim;
        for (int64_t g = 0; g < group_; ++g, ++r, out += p_.head_dim) {
          const float* acc = row_.acc + r * stride_;
          if (row_.m[r] == kNegInf) {  // padding
            std::fill_n(out, p_.head_dim, T{});
            continue;
          }
          const float inverse = 1.0f / row_.l[r];
          for (int64_t d = 0; d < p_.head_dim; ++d) {
            out[d] = from_float<T>(acc[place(d)] * inverse);
          }
        }
      }
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
  // Many rows use a tile often; for few what counts is that its pages and the next tile's have
  // their addresses at hand (TLB).
  const int64_t tile_keys_;
  int64_t lowest_ = 0, highest_ = 0;  // positions that any row sees
  int64_t* offsets_;
  int64_t* next_offsets_;  // of the next chunk
  int64_t* own_offsets_;
  Range* seen_;  // per node: positions
  Range* here_;  // per row: places in the chunk at hand
  Range* own_;   // per node: the places of these with ancestors of its own
  float* q_;
  float* scores_;
  float* even_;  // with AMX: weights in the low halves; scores_ has them in the high ones
  float* tile_;
  int64_t* tile_offsets_;
  State chunk_, split_, row_;
#if defined(INFERLAB_ISA_AVX512)
  SlotsAhead ahead_;
  std::optional<TileProducts> products_;  // bf16 only: products are taken by AMX
#endif
};

}  // namespace

void attention_block(const AttentionParams& p, const AttentionTask& t) {
  with_dtype(p.dtype, [&](auto type) { Block<decltype(type)>(p, t).run(); });
}

void attention_merge(const AttentionParams& p, const AttentionTask& t) {
  with_dtype(p.dtype, [&](auto type) { Block<decltype(type)>(p, t).merge_partials(); });
}

}  // namespace inferlab::cpu::INFERLAB_ISA
