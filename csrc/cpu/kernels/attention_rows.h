// What both ways of computing attention share: the sizes of a task, its memory, which positions
// each of its rows sees, and where the keys and values of a chunk of positions lie.
#pragma once

#include <algorithm>
#include <limits>

#include "attention_softmax.h"
#include "attention_tiles.h"

namespace inferlab::cpu::INFERLAB_ISA {

constexpr int64_t kManyRows = 8;  // of one head: from here on a tile of keys is used often
constexpr int64_t kSomeRows = 3;  // the same where it takes long to convert

// A task's memory (attention_scratch_floats), handed out in whole cache lines.
class Scratch {
 public:
  explicit Scratch(float* memory) : next_(memory) {}

  template <typename E = float>
  E* take(int64_t count) {
    float* start = next_;
    next_ += padded(count * static_cast<int64_t>(sizeof(E) / sizeof(float)));
    return reinterpret_cast<E*>(start);
  }

 private:
  float* next_;
};

// A chunk's keys, by places counted from its start.
struct Chunk {
  Range shared;  // committed ones that some row sees
  Range next;    // of the next chunk: those to ask the memory for
  int64_t own;   // places from here on are a row's own ancestors
};

// The rows of a task, by KV head, node, query head. T: the type of q and the output; P: of K and V.
template <typename T, typename P>
struct Rows {
  Rows(const AttentionParams& params, const AttentionTask& task, Scratch& scratch)
      : p(params),
        t(task),
        group(p.q_heads / p.kv_heads),
        heads(t.head_end - t.head_begin),
        nodes(t.node_end - t.node_begin),
        per_head(nodes * group),
        count(heads * per_head),
        stride(padded(p.head_dim)),
        head_elems(page_head_bytes(p.format, p.head_dim, p.dtype) /
                   static_cast<int64_t>(sizeof(P))),
        slot_elems(p.kv_heads * head_elems),
        // For few rows what counts is that a tile's pages and the next one's have their addresses
        // at hand (TLB).
        tile_keys(per_head >= kManyRows ? kTile : kTile / 2),
        page_shift(__builtin_ctzll(static_cast<uint64_t>(p.page_size))),
        table(p.block_table + t.b * p.table_stride),
        len(p.seq_lens[t.b]),
        shared_end(p.ancestors != nullptr ? len : std::numeric_limits<int64_t>::max()),
        offsets(scratch.take<int64_t>(kListLength)),
        next_offsets(scratch.take<int64_t>(kListLength)),
        own_offsets(scratch.take<int64_t>(nodes * own_list_length(p.words))),
        seen(scratch.take<Range>(nodes)),
        here(scratch.take<Range>(count)),
        own(scratch.take<Range>(nodes)),
        scores(scratch.take(count * kScoreStride)),
        found(take_state(scratch)) {}

  int64_t state_floats() const { return attention_state_floats(count, p.head_dim); }
  State state_at(float* f) const { return {f, f + count, f + padded(2 * count)}; }
  State take_state(Scratch& scratch) const { return state_at(scratch.take(state_floats())); }

  const P* keys(int64_t h) const {
    return static_cast<const P*>(p.k_pages) + (t.head_begin + h) * head_elems;
  }
  const P* values(int64_t h) const {
    return static_cast<const P*>(p.v_pages) + (t.head_begin + h) * head_elems;
  }
  int64_t* own_list(int64_t node) const { return own_offsets + node * own_list_length(p.words); }

  // f(h, r, q): for row r of each head, its q.
  template <typename F>
  void each_query(const F& f) const {
    for (int64_t i = 0; i < nodes; ++i) {
      for (int64_t h = 0; h < heads; ++h) {
        const T* q = static_cast<const T*>(p.q) + t.q_begin + (t.node_begin + i) * p.q_stride[1] +
                     (t.head_begin + h) * group * p.q_stride[2];
        for (int64_t g = 0; g < group; ++g, q += p.q_stride[2]) f(h, i * group + g, q);
      }
    }
  }

  // The positions that each node sees.
  void find_seen() {
    const int64_t valid = p.num_nodes != nullptr ? p.num_nodes[t.b] : p.nodes;
    lowest = std::numeric_limits<int64_t>::max();
    highest = 0;
    for (int64_t i = 0; i < nodes; ++i) {
      const int64_t n = t.node_begin + i;
      int64_t end = len + p.node_offset + n + 1;
      bool padding = n >= valid;
      if (p.ancestors != nullptr && !padding) {
        int64_t path = 0;
        for (int64_t w = 0; w < p.words; ++w) path += __builtin_popcountll(bits(i)[w]);
        end = len + path;
        padding = path == 0;
      }
      seen[i] = {p.window > 0 ? std::max<int64_t>(0, end - p.window) : 0, end};
      if (padding) seen[i] = {0, 0};
      if (!seen[i].empty()) {
        lowest = std::min(lowest, seen[i].begin);
        highest = std::max(highest, seen[i].end);
      }
    }
    if (highest == 0) lowest = 0;
  }

  // Ranges and lists of the chunk that starts at position `begin`.
  Chunk enter_chunk(int64_t begin) {
    const int64_t first_own = std::clamp<int64_t>(shared_end - begin, 0, kChunk);
    Range shared{kChunk, 0};
    for (int64_t i = 0; i < nodes; ++i) {
      const Range places{std::clamp<int64_t>(seen[i].begin - begin, 0, kChunk),
                         std::clamp<int64_t>(seen[i].end - begin, 0, kChunk)};
      for (int64_t h = 0; h < heads; ++h) {
        std::fill_n(here + h * per_head + i * group, group, places);
      }
      own[i] = {std::max(places.begin, first_own), places.end};
      if (places.empty()) continue;
      shared.begin = std::min(shared.begin, places.begin);
      shared.end = std::max(shared.end, std::min(places.end, first_own));
    }
    list_shared(begin, shared, offsets);
    const int64_t committed_end = std::min(highest, shared_end);
    const Range next{0, std::min(kChunk, committed_end - begin - kChunk)};
    list_shared(begin + kChunk, next, next_offsets);
    list_own(begin);
    return {shared, next, first_own};
  }

  const AttentionParams& p;
  const AttentionTask& t;
  const int64_t group, heads, nodes;
  const int64_t per_head, count;  // rows of one KV head, and of all
  const int64_t stride, head_elems, slot_elems;
  const int64_t tile_keys;
  const int page_shift;
  const int32_t* const table;
  const int64_t len;
  const int64_t shared_end;         // positions from here on are a row's own
  int64_t lowest = 0, highest = 0;  // positions that any row sees
  int64_t* const offsets;           // of the chunk's committed keys, by place in the chunk
  int64_t* const next_offsets;      // of the next chunk's
  int64_t* const own_offsets;       // of each node's own ancestors, from own[node].begin on
  Range* const seen;                // per node: positions
  Range* const here;                // per row: places in the chunk at hand
  Range* const own;                 // per node: the places of these with ancestors of its own
  float* const scores;              // [count, kScoreStride]
  const State found;                // what the chunk at hand adds to each row

 private:
  const uint64_t* bits(int64_t node) const {
    return p.ancestors + (t.b * p.nodes + t.node_begin + node) * p.words;
  }
  int64_t slot_offset(int64_t slot) const {
    const int64_t page = table[slot >> page_shift];
    return ((page << page_shift) + (slot & (p.page_size - 1))) * slot_elems;
  }

  // Element offsets of the committed keys of a chunk; the last one is repeated to the end of the
  // list.
  void list_shared(int64_t begin, Range shared, int64_t* list) const {
    if (shared.empty()) return;
    const int64_t slack = shared.begin & ~(kMaxLanes - 1);
    for (int64_t i = shared.begin; i < shared.end;) {
      const int64_t slot = begin + i;
      int64_t offset = slot_offset(slot);
      const int64_t stop = std::min(shared.end, i + p.page_size - (slot & (p.page_size - 1)));
      for (; i < stop; ++i, offset += slot_elems) list[i] = offset;
    }
    std::fill(list + slack, list + shared.begin, list[shared.begin]);
    std::fill(list + shared.end, list + kListLength, list[shared.end - 1]);
  }

  // The same for each node's own ancestors in the chunk.
  void list_own(int64_t begin) const {
    if (p.ancestors == nullptr) return;
    for (int64_t node = 0; node < nodes; ++node) {
      const Range places = own[node];
      if (places.empty()) continue;
      int64_t* list = own_list(node);
      int64_t place = len - begin;  // of the path's next node in the chunk
      for (int64_t w = 0; w < p.words && place < places.end; ++w) {
        for (uint64_t rest = bits(node)[w]; rest != 0 && place < places.end; rest &= rest - 1) {
          if (place >= places.begin) {
            list[place - places.begin] = slot_offset(len + 64 * w + __builtin_ctzll(rest));
          }
          ++place;
        }
      }
      const int64_t size = places.end - places.begin;
      std::fill_n(list + size, kMaxLanes, list[size - 1]);
    }
  }
};

}  // namespace inferlab::cpu::INFERLAB_ISA
