// The float copy of a row with penalties and bias applied, in the order of csrc/cpu/row.cpp. Every
// block works on its own slice alone, so no meeting is needed: how often a token stands in the
// context is counted once per sequence, and the path adds to it on the way down.
#pragma once

#include "row.cuh"

namespace inferlab::cuda {

class Penalties {
 public:
  // counts [size], copy [size], both rounded up to 8: of this group, in the workspace.
  __device__ Penalties(const Group& group, const SamplingParams& params, uint32_t size,
                       uint32_t* counts, float* copy)
      : group_(group), p_(params), size_(size), counts_(counts), copy_(copy) {}

  // Counts the context of sequence b.
  __device__ void begin(int64_t b) {
    auto& penalty = group_.shared.penalty;
    __syncthreads();  // the last sequence's may still be read
    if (threadIdx.x == 0) {
      penalty.repetition = p_.repetition_penalty != nullptr ? p_.repetition_penalty[b] : 1.0f;
      penalty.presence = p_.presence_penalty != nullptr ? p_.presence_penalty[b] : 0.0f;
      penalty.frequency = p_.frequency_penalty != nullptr ? p_.frequency_penalty[b] : 0.0f;
      penalty.context =
          penalty.repetition != 1.0f || penalty.presence != 0.0f || penalty.frequency != 0.0f;
    }
    __syncthreads();
    if (!penalty.context) return;
    const uint32_t begin = group_.begin(size_), end = group_.end(size_);
    for (uint32_t t = begin + threadIdx.x; t < end; t += kThreads) counts_[t] = 0;
    __syncthreads();
    const int64_t length = clamp(p_.context_lens[b], p_.context_size);
    const int64_t prompt = clamp(p_.prompt_lens[b], length);
    const int32_t* tokens = p_.context_tokens + b * p_.context_size;
    for (int64_t i = threadIdx.x; i < length; i += kThreads) count(tokens[i], i >= prompt);
    __syncthreads();
  }

  __device__ __forceinline__ bool change_logits() const {
    return group_.shared.penalty.context || p_.bias_size > 0;
  }

  // A token on the path to the next row.
  __device__ void add_path(int32_t token) {
    if (group_.shared.penalty.context && threadIdx.x == 0) count(token, true);
  }

  // A row of sequence b after penalties. The whole of it may be read once the group has met.
  template <typename T>
  __device__ Row<T> apply(const Row<T>& row, int64_t b) {
    const bool context = group_.shared.penalty.context;
    __syncthreads();  // the copy may still be read, and the path written
    for_vectors<3>(group_, row, [&](uint32_t first, const float (&x)[Row<T>::kPer]) {
#pragma unroll
      for (int i = 0; i < Row<T>::kPer; ++i) {
        if (first + i >= group_.end(size_)) break;
        copy_[first + i] = context ? penalised(x[i], counts_[first + i]) : x[i];
      }
    });
    __syncthreads();
    add_bias(b);
    __syncthreads();
    return Row<T>{copy_, size_, true};
  }

 private:
  static constexpr uint32_t kSeen = 0x80000000u;  // the other bits: how often in the output

  __device__ static __forceinline__ int64_t clamp(int64_t n, int64_t most) {
    return n < 0 ? 0 : n < most ? n : most;
  }
  __device__ __forceinline__ bool owns(int32_t token) const {
    return token >= 0 && static_cast<uint32_t>(token) >= group_.begin(size_) &&
           static_cast<uint32_t>(token) < group_.end(size_);
  }
  __device__ __forceinline__ void count(int32_t token, bool output) {
    if (!owns(token)) return;
    atomicOr(&counts_[token], kSeen);
    if (output) atomicAdd(&counts_[token], 1u);
  }

  __device__ __forceinline__ float penalised(float l, uint32_t count) const {
    if (count == 0) return l;
    const auto& penalty = group_.shared.penalty;
    l = l > 0.0f ? l / penalty.repetition : l * penalty.repetition;
    const uint32_t output = count & ~kSeen;
    if (output == 0) return l;
    l = l - penalty.frequency * static_cast<float>(output);
    return l - penalty.presence;
  }

  // Entries for one token are added in order, by the thread of the first of them.
  __device__ void add_bias(int64_t b) {
    const int32_t* tokens = p_.bias_tokens + b * p_.bias_size;
    const float* values = p_.bias_values + b * p_.bias_size;
    for (int64_t j = threadIdx.x; j < p_.bias_size; j += kThreads) {
      const int32_t token = tokens[j];
      if (!owns(token)) continue;
      bool first = true;
      for (int64_t i = 0; i < j && first; ++i) first = tokens[i] != token;
      if (!first) continue;
      float l = copy_[token];
      for (int64_t i = j; i < p_.bias_size; ++i) {
        if (tokens[i] == token) l = l + values[i];
      }
      copy_[token] = l;
    }
  }

  const Group& group_;
  const SamplingParams& p_;
  uint32_t size_;
  uint32_t* counts_;
  float* copy_;
};

// The row of a node as it is; and with penalties. A rule that reads other blocks' slices of it must
// meet before it returns: the next row takes its place.
template <typename T>
__device__ __forceinline__ Row<T> open_row(const LogitsView& logits, int64_t b, int64_t node) {
  return Row<T>{
      static_cast<const T*>(logits.data) + b * logits.batch_stride + node * logits.node_stride,
      static_cast<uint32_t>(logits.allowed), false};
}
template <typename T>
__device__ __forceinline__ Row<T> open_row(const LogitsView& logits, int64_t b, int64_t node,
                                           Penalties& penalties) {
  const Row<T> row = open_row<T>(logits, b, node);
  return penalties.change_logits() ? penalties.apply(row, b) : row;
}

}  // namespace inferlab::cuda
