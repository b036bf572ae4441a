// Rows: opening one (penalties, bias), scanning it, drawing from it. Filters are in filters.cpp.
#include "row.h"

namespace inferlab::cpu {
namespace {

int block_size(int64_t size) { return size <= kChunk ? 64 : 256; }

int64_t chunk_count(int64_t size) { return (size + kChunk - 1) / kChunk; }

// Keeps buffers from being filled with zeros each time.
template <typename T>
T* grow(std::vector<T>& v, int64_t size) {
  if (static_cast<int64_t>(v.size()) < size) v.resize(static_cast<size_t>(size));
  return v.data();
}

void penalise(float* row, int64_t size, const SamplingParams& s, int64_t b,
              const std::vector<int32_t>& path, Workspace& ws) {
  const bool repeats = s.repetition_penalty != nullptr && s.repetition_penalty[b] != 1.0f;
  const float presence = s.presence_penalty != nullptr ? s.presence_penalty[b] : 0.0f;
  const float frequency = s.frequency_penalty != nullptr ? s.frequency_penalty[b] : 0.0f;
  if (repeats || presence != 0.0f || frequency != 0.0f) {
    const int32_t* context = s.context_tokens + b * s.context_size;
    const int64_t length = s.context_lens[b], prompt = s.prompt_lens[b];
    const int64_t total = length + static_cast<int64_t>(path.size());
    const auto token_at = [&](int64_t i) {
      return i < length ? context[i] : path[static_cast<size_t>(i - length)];
    };
    // Bit 31: seen; the rest: how often in the output.
    uint32_t* counts = grow(ws.counts, size);
    for (int64_t i = 0; i < total; ++i) {
      const int32_t t = token_at(i);
      if (t >= size) continue;
      if (counts[t] == 0 && repeats) {
        const float r = s.repetition_penalty[b];
        row[t] = row[t] > 0.0f ? row[t] / r : row[t] * r;
      }
      counts[t] = (counts[t] + (i >= prompt ? 1u : 0u)) | 0x80000000u;
    }
    for (int64_t i = 0; i < total; ++i) {
      const int32_t t = token_at(i);
      if (t >= size || counts[t] == 0) continue;
      const uint32_t count = counts[t] & 0x7fffffffu;
      counts[t] = 0;
      if (count == 0) continue;
      if (s.frequency_penalty != nullptr) row[t] = row[t] - frequency * static_cast<float>(count);
      if (s.presence_penalty != nullptr) row[t] = row[t] - presence;
    }
  }
  for (int64_t j = 0; j < s.bias_size; ++j) {
    const int32_t t = s.bias_tokens[b * s.bias_size + j];
    if (t >= 0 && t < size) row[t] = row[t] + s.bias_values[b * s.bias_size + j];
  }
}

bool changes_logits(const SamplingParams& s, int64_t b) {
  if (s.repetition_penalty != nullptr && s.repetition_penalty[b] != 1.0f) return true;
  if (s.presence_penalty != nullptr && s.presence_penalty[b] != 0.0f) return true;
  if (s.frequency_penalty != nullptr && s.frequency_penalty[b] != 0.0f) return true;
  return s.bias_size > 0;
}

Row make_row(const void* data, DType dtype, int64_t size, Workspace& ws, int slot) {
  const int block = block_size(size);
  return Row{data, dtype, size, block, grow(ws.block_max[slot], (size + block - 1) / block)};
}

}  // namespace

Workspace& Workspace::of_thread() {
  thread_local Workspace workspace;
  return workspace;
}

Row open_row(const LogitsView& view, int64_t b, int64_t n, const SamplingParams* sampling,
             const std::vector<int32_t>& path, Workspace& ws, int slot) {
  Row row = make_row(view.row(b, n), view.dtype, view.allowed, ws, slot);
  if (sampling == nullptr || !changes_logits(*sampling, b)) return row;
  float* copy = grow(ws.penalised, row.size);
  INFERLAB_DISPATCH(widen, row, 0, row.size, copy);
  penalise(copy, row.size, *sampling, b, path, ws);
  row.data = copy;
  row.dtype = DType::kF32;
  return row;
}

Row open_weights(float* weights, int64_t size, Workspace& ws, int slot) {
  return make_row(weights, DType::kF32, size, ws, slot);
}

float row_at(const Row& row, int64_t token) {
  if (row.dtype == DType::kF32) return static_cast<const float*>(row.data)[token];
  if (row.dtype == DType::kBF16) return to_float(static_cast<const bf16*>(row.data)[token]);
  return to_float(static_cast<const f16*>(row.data)[token]);
}

namespace {

bool largest(const Row& row, float* max) {
  float best = -kInf;
  const int64_t blocks = (row.size + row.block - 1) / row.block;
  for (int64_t i = 0; i < blocks; ++i) best = std::max(best, row.block_max[i]);
  *max = best;
  return best > -kInf && best < kInf;
}

// Runs body(begin, end) over the row's chunks, on the threads if `threaded`.
template <typename Body>
void for_chunks(const Row& row, bool threaded, Body body) {
  const auto one = [&](int64_t c) { body(c * kChunk, std::min(row.size, (c + 1) * kChunk)); };
  const int64_t chunks = chunk_count(row.size);
  if (threaded && chunks > 1) {
    parallel_for(chunks, row.size * dtype_size(row.dtype), one);
  } else {
    for (int64_t c = 0; c < chunks; ++c) one(c);
  }
}

// Long stretches, since reading ahead ends with each; four per thread, since threads differ.
int64_t stretch_of(const Row& row) {
  const int64_t share = row.size / (4 * num_threads());
  return std::max(kChunk, share - share % kChunk);
}

// The best token at temperature 0: the largest element, with nothing kept of the others.
bool choose_largest(const Row& row, Top& top, Workspace& ws, bool threaded) {
  const int64_t pieces = (row.size + kPiece - 1) / kPiece;
  const int64_t share = threaded ? (pieces + num_threads() - 1) / num_threads() : pieces;
  const int64_t stretch = std::max<int64_t>(1, share) * kPiece;
  const int64_t parts = (row.size + stretch - 1) / stretch;
  float* scores = grow(ws.top_scores, parts);
  int32_t* tokens = grow(ws.top_tokens, parts);
  std::atomic<bool> valid{true};
  parallel_for(parts, row.size * dtype_size(row.dtype), [&](int64_t c) {
    const int64_t begin = c * stretch, end = std::min(row.size, begin + stretch);
    if (!INFERLAB_DISPATCH(find_largest, row, begin, end, scores + c, tokens + c)) {
      valid.store(false, std::memory_order_relaxed);
    }
  });
  for (int64_t c = 0; c < parts; ++c) top.offer(scores[c], tokens[c]);
  return valid.load() && top.count > 0 && top.score[0] < kInf;
}

// Draws on the threads; with `scan`, scans on the way. False: a NaN.
bool draw_threaded(const Row& row, Draw draw, Top& top, bool scan) {
  const int64_t stretch = stretch_of(row);
  const int64_t parts = (row.size + stretch - 1) / stretch;
  Workspace& ws = Workspace::of_thread();
  const int n = top.capacity;
  float* scores = grow(ws.top_scores, parts * n);
  int32_t* tokens = grow(ws.top_tokens, parts * n);
  std::vector<int> counts(static_cast<size_t>(parts));
  std::atomic<float> floor{-kInf};
  std::atomic<bool> valid{true};
  draw.floor = &floor;
  parallel_for(parts, row.size * dtype_size(row.dtype), [&](int64_t c) {
    const int64_t begin = c * stretch, end = std::min(row.size, begin + stretch);
    Top part{scores + c * n, tokens + c * n, n, 0};
    if (!scan) {
      INFERLAB_DISPATCH(draw_blocks, row, begin, end, draw, part);
    } else if (!INFERLAB_DISPATCH(scan_and_draw, row, begin, end, draw, part)) {
      valid.store(false, std::memory_order_relaxed);
    }
    counts[static_cast<size_t>(c)] = part.count;
  });
  for (int64_t c = 0; c < parts; ++c) {
    for (int i = 0; i < counts[static_cast<size_t>(c)]; ++i) {
      top.offer(scores[c * n + i], tokens[c * n + i]);
    }
  }
  return valid.load();
}

}  // namespace

bool scan_row(const Row& row, float* max, bool threaded) {
  std::atomic<bool> valid{true};
  for_chunks(row, threaded, [&](int64_t begin, int64_t end) {
    if (!INFERLAB_DISPATCH(scan_blocks, row, begin, end)) {
      valid.store(false, std::memory_order_relaxed);
    }
  });
  return largest(row, max) && valid.load();
}

void draw_row(const Row& row, const Draw& draw, Top& top, bool threaded) {
  if (threaded && chunk_count(row.size) > 1) {
    draw_threaded(row, draw, top, false);
  } else {
    INFERLAB_DISPATCH(draw_blocks, row, 0, row.size, draw, top);
  }
}

bool choose(const Row& row, const Choice& choice, uint32_t position, uint32_t purpose, Top& top,
            Workspace& ws, bool threaded) {
  if (choice.greedy && top.capacity == 1) return choose_largest(row, top, ws, threaded);
  Draw draw{choice.greedy ? Score::kLogit : Score::kGumbel,
            choice.temperature,
            choice.seed,
            position,
            purpose,
            kKeepAll,
            nullptr};
  const bool filtered = !choice.greedy && choice.filters(row.size);
  float max;
  if (!filtered) {
    const bool valid = threaded && chunk_count(row.size) > 1
                           ? draw_threaded(row, draw, top, true)
                           : INFERLAB_DISPATCH(scan_and_draw, row, 0, row.size, draw, top);
    return largest(row, &max) && valid;
  }
  if (!scan_row(row, &max, threaded)) return false;
  draw.cut = find_cut(row, max, choice, ws, threaded);
  draw_row(row, draw, top, threaded);
  return true;
}

double ordered_sum(int64_t size, Workspace& ws, bool threaded,
                   const std::function<double(int64_t, int64_t)>& part) {
  const int64_t chunks = chunk_count(size);
  if (chunks == 1) return part(0, size);
  double* sums = grow(ws.chunk_sums, chunks);
  const auto one = [&](int64_t c) { sums[c] = part(c * kChunk, std::min(size, (c + 1) * kChunk)); };
  if (threaded) {
    parallel_for(chunks, size * 4, one);
  } else {
    for (int64_t c = 0; c < chunks; ++c) one(c);
  }
  double sum = 0.0;
  for (int64_t c = 0; c < chunks; ++c) sum += sums[c];
  return sum;
}

}  // namespace inferlab::cpu
