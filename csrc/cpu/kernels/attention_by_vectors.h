// A chunk of attention by vectors, for every type. Keys and values are taken in tiles that stay in
// L1 while the rows pass over them (attention_tiles.h), then each node's own ancestors, through a
// list of its own. For many rows a tile of 16-bit or 8-bit numbers is first converted, once for all
// of them. What int8 are multiplied with comes behind: scores are, when they are there, and weights
// before they meet the values.
//
// Each tile prefetches the one that comes after it, values after the chunk's last keys and the next
// chunk's keys after the last values. A key that a row does not see is not in the row's range: it
// is never multiplied by zero, so garbage there, NaN included, has no effect.
#pragma once

#include <algorithm>
#include <type_traits>

#include "attention_rows.h"

namespace inferlab::cpu::INFERLAB_ISA {

// T: the type of q and the output; P: of K and V.
template <typename T, typename P>
class ByVectors {
 public:
  using Element = T;
  using Stored = P;

  // Where channel d stands in a row's sums.
  static int64_t place(int64_t d) { return d; }

  ByVectors(const Rows<T, P>& rows, Scratch& scratch)
      : rows_(rows),
        dim_(rows.p.head_dim),
        stride_(rows.stride),
        convert_(!std::is_same_v<P, float> &&
                 rows.per_head >= (std::is_same_v<P, e4m3> ? kSomeRows : kManyRows)),
        q_(scratch.take(rows.count * stride_)),
        tile_(scratch.take((kTile + kMaxLanes) * stride_)),
        tile_offsets_(scratch.take<int64_t>(kTile + kMaxLanes)) {
    for (int64_t i = 0; convert_ && i < kTile + kMaxLanes; ++i) tile_offsets_[i] = i * stride_;
    rows.each_query([this](int64_t h, int64_t r, const T* q) {
      float* to = q_ + (h * rows_.per_head + r) * stride_;
      for (int64_t d = 0; d < dim_; ++d) to[d] = to_float(q[d]) * rows_.p.scale;
      for (int64_t d = dim_; d < stride_; ++d) to[d] = 0.0f;
    });
  }

  // rows.found of a chunk.
  void run(const Chunk& chunk) {
    score(chunk.shared);
    for (int64_t r = 0; r < rows_.count; ++r) {
      float* scores = rows_.scores + r * kScoreStride;
      const Softened row = soften(scores, rows_.here[r], rows_.p.softcap, [] {});
      rows_.found.m[r] = row.m;
      rows_.found.l[r] = row.l;
    }
    std::fill_n(rows_.found.acc, rows_.count * stride_, 0.0f);
    sum(chunk.shared, chunk.next);
  }

 private:
  void score(Range shared) {
    const int64_t step = rows_.tile_keys;
    for (int64_t i = shared.begin; i < shared.end; i += step) {
      const bool more = i + step < shared.end;
      for (int64_t h = 0; h < rows_.heads; ++h) {
        const Ahead<P> ahead{more ? rows_.keys(h) : rows_.values(h),
                             rows_.offsets + (more ? step : shared.begin - i)};
        score_shared(h, {i, std::min(i + step, shared.end)}, ahead);
      }
    }
    for (int64_t node = 0; node < rows_.nodes; ++node) {
      if (rows_.own[node].empty()) continue;
      for (int64_t h = 0; h < rows_.heads; ++h) score_own(h, node);
    }
  }

  void sum(Range shared, Range next) {
    const int64_t step = rows_.tile_keys;
    for (int64_t i = shared.begin; i < shared.end; i += step) {
      const bool more = i + step < shared.end;
      for (int64_t h = 0; h < rows_.heads; ++h) {
        const Ahead<P> ahead{more           ? rows_.values(h)
                             : next.empty() ? nullptr
                                            : rows_.keys(h),
                             more ? rows_.offsets + step : rows_.next_offsets - i};
        sum_shared(h, {i, std::min(i + step, shared.end)}, ahead);
      }
    }
    for (int64_t node = 0; node < rows_.nodes; ++node) {
      if (rows_.own[node].empty()) continue;
      for (int64_t h = 0; h < rows_.heads; ++h) sum_own(h, node);
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

  // int8: columns `places` of the scores or weights of some rows times what the numbers of their
  // keys or values are to be multiplied with; offsets[0] is of the first.
  void scale_columns(const P* from, const int64_t* offsets, Range places, int64_t first_row,
                     int64_t count) {
    if constexpr (std::is_same_v<P, int8_t>) {
      float scales[kChunk];
      for (int64_t i = 0; i < places.end - places.begin; ++i) {
        std::memcpy(scales + i, from + offsets[i] + dim_, sizeof *scales);
      }
      for (int64_t r = first_row; r < first_row + count; ++r) {
        float* columns = rows_.scores + r * kScoreStride + places.begin;
        for (int64_t i = 0; i < places.end - places.begin; ++i) columns[i] *= scales[i];
      }
    }
  }

  void score_shared(int64_t h, Range tile, const Ahead<P>& ahead) {
    const P* keys = rows_.keys(h);
    const int64_t first = h * rows_.per_head;
    if (convert_) convert_rows(keys, rows_.offsets, tile, dim_, stride_, ahead, tile_);
    in_groups<kKeyRows>(first, first + rows_.per_head, [&](int64_t r, auto count) {
      Range seen{tile.end, tile.begin};  // of the tile, by any of the rows
      for (int i = 0; i < count; ++i) {
        seen.begin = std::min(seen.begin, std::max(tile.begin, rows_.here[r + i].begin));
        seen.end = std::max(seen.end, std::min(tile.end, rows_.here[r + i].end));
      }
      float* scores = rows_.scores + r * kScoreStride;
      if (convert_) {
        score_rows<count>(q_ + r * stride_, stride_, tile_, tile_offsets_, seen.begin - tile.begin,
                          seen.end - tile.begin, stride_, scores + tile.begin);
      } else {
        score_rows<count>(q_ + r * stride_, stride_, keys, rows_.offsets, seen.begin, seen.end,
                          dim_, scores, r == first ? ahead : Ahead<P>{});
      }
    });
    scale_columns(keys, rows_.offsets + tile.begin, tile, first, rows_.per_head);
  }

  void score_own(int64_t h, int64_t node) {
    const Range own = rows_.own[node];
    const int64_t first = h * rows_.per_head + node * rows_.group;
    in_groups<kKeyRows>(first, first + rows_.group, [&](int64_t r, auto count) {
      score_rows<count>(q_ + r * stride_, stride_, rows_.keys(h), rows_.own_list(node), 0,
                        own.end - own.begin, dim_, rows_.scores + r * kScoreStride + own.begin);
    });
    scale_columns(rows_.keys(h), rows_.own_list(node), own, first, rows_.group);
  }

  void sum_shared(int64_t h, Range tile, const Ahead<P>& ahead) {
    if (convert_) convert_rows(rows_.values(h), rows_.offsets, tile, dim_, stride_, ahead, tile_);
    const int64_t first = h * rows_.per_head;
    scale_columns(rows_.values(h), rows_.offsets + tile.begin, tile, first, rows_.per_head);
    in_groups<kValueRows>(first, first + rows_.per_head, [&](int64_t r, auto count) {
      const Range* here = rows_.here + r;
      // Together what all of the rows see; what only some see, before and after it, row by row.
      Range common = tile;
      for (int i = 0; i < count; ++i) common = intersect(common, here[i]);
      if (common.empty()) common = {tile.end, tile.end};
      for (int i = 0; count > 1 && i < count; ++i) {
        sum_rows<1>(h, r + i, tile, intersect(here[i], {tile.begin, common.begin}));
      }
      sum_rows<count>(h, r, tile, common, r == first ? ahead : Ahead<P>{});
      for (int i = 0; count > 1 && i < count; ++i) {
        sum_rows<1>(h, r + i, tile, intersect(here[i], {common.end, tile.end}));
      }
    });
  }

  template <int R>
  void sum_rows(int64_t h, int64_t r, Range tile, Range keys, const Ahead<P>& ahead = {}) {
    float* acc = rows_.found.acc + r * stride_;
    const float* weights = rows_.scores + r * kScoreStride;
    if (convert_) {
      value_rows<R>(acc, stride_, weights + tile.begin, tile_, tile_offsets_,
                    keys.begin - tile.begin, keys.end - tile.begin, stride_);
    } else {
      value_rows<R>(acc, stride_, weights, rows_.values(h), rows_.offsets, keys.begin, keys.end,
                    dim_, ahead);
    }
  }

  void sum_own(int64_t h, int64_t node) {
    const Range own = rows_.own[node];
    const int64_t first = h * rows_.per_head + node * rows_.group;
    scale_columns(rows_.values(h), rows_.own_list(node), own, first, rows_.group);
    in_groups<kValueRows>(first, first + rows_.group, [&](int64_t r, auto count) {
      value_rows<count>(rows_.found.acc + r * stride_, stride_,
                        rows_.scores + r * kScoreStride + own.begin, rows_.values(h),
                        rows_.own_list(node), 0, own.end - own.begin, dim_);
    });
  }

  const Rows<T, P>& rows_;
  const int64_t dim_, stride_;
  const bool convert_;
  float* const q_;     // [rows, stride]: q * scale
  float* const tile_;  // what convert_rows wrote
  int64_t* const tile_offsets_;
};

}  // namespace inferlab::cpu::INFERLAB_ISA
