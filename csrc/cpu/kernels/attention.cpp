// Paged tree attention, one task: a block of rows (nodes x the query heads of some KV heads) over a
// run of positions. Flash-decoding with fixed chunks (csrc/cpu/attention_task.h); per chunk and
// head:
//
//   1. scores of all rows against the committed keys of the chunk, then of each node against its
//      own ancestors there
//   2. per row: soft cap, maximum, exponentials, their sum (attention_softmax.h)
//   3. weighted values, in the order of the keys
//   4. merged into the row's state: M = max(m, m'), l = l e^(m-M) + l' e^(m'-M), acc likewise
//
// 1 to 3 by vectors (attention_by_vectors.h); bf16 of whole 32 channels by AMX
// (attention_by_tiles.h) where the processor has it.
//
// Mapping: one thread per task. Bytes: K and V of the positions once per task, 2 * positions *
// heads * D * s (s = 1, and 4 / D of the scale, for pages in 8 bits); q and out are small beside
// them.
#include <algorithm>

#include "attention_by_vectors.h"
#include "attention_rows.h"
#if defined(INFERLAB_ISA_AVX512)
#include "attention_by_tiles.h"
#endif

namespace inferlab::cpu::INFERLAB_ISA {
namespace {

// Way: how chunks are computed, ByVectors<T, P> or ByTiles.
template <typename Way>
class Block {
  using T = typename Way::Element;

 public:
  Block(const AttentionParams& p, const AttentionTask& t)
      : p_(p),
        t_(t),
        scratch_(t.scratch),
        rows_(p, t, scratch_),
        split_(rows_.take_state(scratch_)),
        row_(rows_.take_state(scratch_)) {}

  void run() {
    rows_.find_seen();
    Way way(rows_, scratch_);
    const int64_t first = std::max(t_.split_begin, rows_.lowest / kSplit);
    const int64_t last = std::min(t_.split_end, (rows_.highest + kSplit - 1) / kSplit);
    if (t_.partials != nullptr) {
      for (int64_t s = t_.split_begin; s < t_.split_end; ++s) {
        const State partial = partial_of(s);
        clear(partial);
        if (s >= first && s < last) run_split(way, s, partial);
      }
      return;
    }
    clear(row_);
    for (int64_t s = first; s < last; ++s) {
      clear(split_);
      run_split(way, s, split_);
      merge(split_, row_, rows_.count, rows_.stride);
    }
    write_rows();
  }

  // The partials of all splits, in order, into the rows.
  void merge_partials() {
    clear(row_);
    for (int64_t s = t_.split_begin; s < t_.split_end; ++s) {
      merge(partial_of(s), row_, rows_.count, rows_.stride);
    }
    write_rows();
  }

 private:
  State partial_of(int64_t split) const {
    return rows_.state_at(t_.partials + split * rows_.state_floats());
  }

  // acc is left as it is: merging into an empty row (m = -inf) replaces it.
  void clear(const State& s) const {
    std::fill_n(s.m, rows_.count, kNegInf);
    std::fill_n(s.l, rows_.count, 0.0f);
  }

  void run_split(Way& way, int64_t split, const State& into) {
    const int64_t begin = std::max(split * kSplit, rows_.lowest / kChunk * kChunk);
    const int64_t end = std::min((split + 1) * kSplit, rows_.highest);
    for (int64_t c = begin; c < end; c += kChunk) {
      way.run(rows_.enter_chunk(c));
      merge(rows_.found, into, rows_.count, rows_.stride);
    }
  }

  void write_rows() const {
    int64_t r = 0;
    for (int64_t h = t_.head_begin; h < t_.head_end; ++h) {
      for (int64_t n = t_.node_begin; n < t_.node_end; ++n) {
        T* out = static_cast<T*>(p_.out) +
                 ((t_.out_row + n) * p_.q_heads + h * rows_.group) * p_.head_dim;
        for (int64_t g = 0; g < rows_.group; ++g, ++r, out += p_.head_dim) {
          const float* acc = row_.acc + r * rows_.stride;
          if (row_.m[r] == kNegInf) {  // padding
            std::fill_n(out, p_.head_dim, T{});
            continue;
          }
          const float inverse = 1.0f / row_.l[r];
          for (int64_t d = 0; d < p_.head_dim; ++d) {
            out[d] = from_float<T>(acc[Way::place(d)] * inverse);
          }
        }
      }
    }
  }

  const AttentionParams& p_;
  const AttentionTask& t_;
  Scratch scratch_;
  Rows<T, typename Way::Stored> rows_;
  const State split_, row_;
};

// f(a block that is computed the fastest way).
template <typename F>
void with_block(const AttentionParams& p, const AttentionTask& t, const F& f) {
#if defined(INFERLAB_ISA_AVX512)
  if (p.dtype == DType::kBF16 && p.format == PageFormat::kSame && ByTiles::usable(p.head_dim)) {
    return f(Block<ByTiles>(p, t));
  }
#endif
  with_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    switch (p.format) {
      case PageFormat::kSame:
        return f(Block<ByVectors<T, T>>(p, t));
      case PageFormat::kInt8:
        return f(Block<ByVectors<T, int8_t>>(p, t));
      case PageFormat::kE4M3:
        return f(Block<ByVectors<T, e4m3>>(p, t));
    }
  });
}

}  // namespace

void attention_block(const AttentionParams& p, const AttentionTask& t) {
  with_block(p, t, [](auto&& block) { block.run(); });
}

void attention_merge(const AttentionParams& p, const AttentionTask& t) {
  with_block(p, t, [](auto&& block) { block.merge_partials(); });
}

}  // namespace inferlab::cpu::INFERLAB_ISA
