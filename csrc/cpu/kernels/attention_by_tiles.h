// A chunk of attention on bf16 by AMX (attention_amx.h): committed keys and values in blocks of 16
// places, read from their pages; each node's own ancestors in blocks of its own, laid out before.
// The memory is asked for slots in their order (attention_ahead.h), a line for each line read.
//
// A tile multiplies what a row does not see by zero. Where that was not finite the rows it spoiled
// are done again, each alone.
#pragma once

#include <algorithm>

#include "attention_ahead.h"
#include "attention_amx.h"
#include "attention_rows.h"

namespace inferlab::cpu::INFERLAB_ISA {

class ByTiles {
 public:
  using Element = bf16;
  using Stored = bf16;

  static bool usable(int64_t head_dim) { return TileProducts::usable(head_dim); }
  static int64_t place(int64_t d) { return tile_place(d); }

  // Tiles of 16 rows read past a head's last row and drop what comes of it. So up to 15 rows more
  // of the scratch must follow scores, found.acc and even_, whatever they hold: behind even_ there
  // is at least what only ByVectors takes.
  ByTiles(const Rows<bf16, bf16>& rows, Scratch& scratch)
      : rows_(rows),
        stride_(rows.stride),
        sum_lines_(std::max(kBlock - 32 * rows.per_head / rows.p.head_dim, kBlock / 2)),
        even_(scratch.take(rows.count * kScoreStride)),
        channels_(scratch.take(stride_)),
        products_(scratch.take(tile_products_floats(rows.heads, rows.per_head, rows.p.head_dim)),
                  rows.heads, rows.per_head, rows.p.head_dim, rows.p.scale),
        scope_(products_.enter()) {
    rows.each_query([this](int64_t h, int64_t r, const bf16* q) { products_.set_row(h, r, q); });
  }

  // rows.found of a chunk.
  void run(const Chunk& chunk) {
    const int64_t begin = chunk.shared.begin & ~(kBlock - 1);
    const int64_t slots = std::max<int64_t>(chunk.shared.end - begin, 0);
    ahead_.begin_chunk(rows_.keys(0), rows_.values(0), rows_.offsets + begin, slots,
                       rows_.next_offsets, std::clamp<int64_t>(chunk.next.end, 0, rows_.tile_keys),
                       rows_.heads * rows_.p.head_dim, std::min(slots, rows_.tile_keys));
    score(chunk.shared);
    for (int64_t r = 0; r < rows_.count; ++r) {
      float* scores = rows_.scores + r * kScoreStride;
      const Softened row =
          soften(scores, rows_.here[r], rows_.p.softcap, [this] { ahead_.ask(1); });
      rows_.found.m[r] = row.m;
      rows_.found.l[r] = row.l;
      split_weights(scores, even_ + r * kScoreStride, rows_.here[r]);
    }
    std::fill_n(rows_.found.acc, rows_.count * stride_, 0.0f);
    sum(chunk);
    if (!finite(rows_.found.acc, rows_.count * stride_)) sum_each_alone(chunk);
  }

 private:
  void score(Range shared) {
    for (int64_t i = shared.begin & ~(kBlock - 1); i < shared.end; i += rows_.tile_keys) {
      const int64_t stop = std::min(i + rows_.tile_keys, shared.end);
      for (int64_t h = 0; h < rows_.heads; ++h) {
        for (int64_t j = i; j < stop; j += kBlock) {
          products_.score(h, {0, rows_.per_head}, committed_block(rows_.keys(h), j, shared),
                          head_scores(h) + j, &ahead_);
        }
      }
    }
    for (int64_t node = 0; node < rows_.nodes; ++node) {
      const Range own = rows_.own[node];
      for (int64_t i = own.begin; i < own.end; i += kBlock) {
        for (int64_t h = 0; h < rows_.heads; ++h) {
          const Block16 block =
              products_.lay(0, rows_.keys(h), rows_.own_list(node) + i - own.begin,
                            {0, std::min(kBlock, own.end - i)});
          products_.score(h, rows_of(node), block, head_scores(h) + i, nullptr);
        }
      }
    }
  }

  void sum(const Chunk& chunk) {
    // A block with some node's own ancestors is that node's alone.
    const bool tree = rows_.p.ancestors != nullptr;
    const int64_t whole = tree ? chunk.own & ~(kBlock - 1) : kChunk;
    const int64_t end = std::min(chunk.shared.end, whole);
    for (int64_t i = chunk.shared.begin & ~(kBlock - 1); i < end; i += rows_.tile_keys) {
      const int64_t stop = std::min(i + rows_.tile_keys, end);
      for (int64_t h = 0; h < rows_.heads; ++h) sum_committed(h, {i, stop}, chunk.shared);
    }
    for (int64_t node = 0; node < rows_.nodes && tree; ++node) {
      sum_alone(node, {whole, kChunk}, chunk.own);
    }
  }

  // Rows that a value spoiled which they do not see, NaN or infinite, see to it alone.
  void sum_each_alone(const Chunk& chunk) {
    std::fill_n(rows_.found.acc, rows_.count * stride_, 0.0f);
    for (int64_t node = 0; node < rows_.nodes; ++node) {
      sum_alone(node, {0, kChunk}, chunk.own);
      for (int64_t h = 0; h < rows_.heads; ++h) {
        for (int64_t r = rows_of(node).begin; r < rows_of(node).end; ++r) sum_exactly(h, r, node);
      }
    }
  }

  // Blocks of `places`, all of them committed, of which `shared` are read.
  void sum_committed(int64_t h, Range places, Range shared) {
    Block16 blocks[kTile / kBlock];
    int64_t count = 0;
    for (int64_t j = places.begin; j < places.end; j += kBlock) {
      blocks[count++] = committed_block(rows_.values(h), j, shared);
    }
    products_.sum({0, rows_.per_head}, blocks, count, head_scores(h) + places.begin,
                  head_even(h) + places.begin, head_sums(h), stride_, &ahead_, sum_lines_);
  }

  // What a node sees of `places`, from a multiple of 16 on; from place `first_own` on its own.
  void sum_alone(int64_t node, Range places, int64_t first_own) {
    const Range here = intersect(rows_.here[node * rows_.group], places);
    for (int64_t i = here.begin & ~(kBlock - 1); i < here.end; i += kBlock) {
      const Range block = intersect(here, {i, i + kBlock});
      int64_t list[kBlock] = {};
      for (int64_t j = block.begin; j < block.end; ++j) {
        list[j - i] =
            j < first_own ? rows_.offsets[j] : rows_.own_list(node)[j - rows_.own[node].begin];
      }
      for (int64_t h = 0; h < rows_.heads; ++h) {
        const Block16 values =
            products_.lay(0, rows_.values(h), list, {block.begin - i, block.end - i});
        products_.sum(rows_of(node), &values, 1, head_scores(h) + i, head_even(h) + i, head_sums(h),
                      stride_, nullptr, 0);
      }
    }
  }

  // A value that is not finite spoils its channel alone; a tile's zero spoils the one beside it.
  void sum_exactly(int64_t h, int64_t r, int64_t node) {
    float* acc = head_sums(h) + r * stride_;
    if (finite(acc, stride_)) return;
    const float* weights = head_scores(h) + r * kScoreStride;
    const Range here = rows_.here[r], own = rows_.own[node];
    const int64_t dim = rows_.p.head_dim;
    std::fill_n(channels_, stride_, 0.0f);
    value_rows<1>(channels_, stride_, weights, rows_.values(h), rows_.offsets, here.begin,
                  own.empty() ? here.end : own.begin, dim);
    if (!own.empty()) {
      value_rows<1>(channels_, stride_, weights + own.begin, rows_.values(h), rows_.own_list(node),
                    0, own.end - own.begin, dim);
    }
    for (int64_t d = 0; d < dim; ++d) acc[tile_place(d)] = channels_[d];
  }

  // 16 committed keys or values from `place` on, a multiple of 16, of `seen` places: from their
  // page where all are seen and stand in one.
  Block16 committed_block(const bf16* from, int64_t place, Range seen) {
    const int64_t* list = rows_.offsets + place;
    if (rows_.p.page_size >= kBlock && seen.begin <= place && place + kBlock <= seen.end) {
      return {from + list[0], rows_.slot_elems};
    }
    return products_.lay(place / kBlock % (kTile / kBlock), from, list,
                         {seen.begin - place, seen.end - place});
  }

  static bool finite(const float* x, int64_t count) {
    vf worst = vset(0.0f);  // x * 0 is NaN where x is not finite
    for (int64_t i = 0; i < count; i += kLanes) worst = vfma(vload(x + i), vset(0.0f), worst);
    return visnan(worst) == 0;
  }

  Range rows_of(int64_t node) const { return {node * rows_.group, (node + 1) * rows_.group}; }
  float* head_scores(int64_t h) const { return rows_.scores + h * rows_.per_head * kScoreStride; }
  float* head_even(int64_t h) const { return even_ + h * rows_.per_head * kScoreStride; }
  float* head_sums(int64_t h) const { return rows_.found.acc + h * rows_.per_head * stride_; }

  const Rows<bf16, bf16>& rows_;
  const int64_t stride_;
  // Softmax asks for a line with each vector, since it reads none, and sums ask for so many less.
  const int64_t sum_lines_;
  float* const even_;      // weights in the low halves; scores has them in the high ones
  float* const channels_;  // of one row
  SlotsAhead ahead_;
  TileProducts products_;
  const TileScope scope_;
};

}  // namespace inferlab::cpu::INFERLAB_ISA
