// One row or one token of each layer op.
#include "inferlab/layer.h"

#include <cmath>
#include <cstring>

#include "layer_rows.h"
#include "simd.h"

namespace inferlab::cpu::INFERLAB_ISA {
namespace {

inline void vstore(bf16* p, vf a) {
  float lane[kLanes];
  vstore(lane, a);
  for (int i = 0; i < kLanes; ++i) p[i] = from_float<bf16>(lane[i]);
}
inline void vstore(f16* p, vf a) {
  float lane[kLanes];
  vstore(lane, a);
  for (int i = 0; i < kLanes; ++i) p[i] = from_float<f16>(lane[i]);
}

// Rounds to T and back: what storing an intermediate result in T does.
template <typename T>
inline vf vround_to(vf a) {
  T lane[kLanes];
  vstore(lane, a);
  return vload(lane);
}
template <>
inline vf vround_to<float>(vf a) {
  return a;
}

template <typename T>
void rms_norm(const T* x, const T* weight, T* out, int64_t dim, float eps, float offset) {
  vf sum = vset(0.0f);
  int64_t i = 0;
  for (; i + kLanes <= dim; i += kLanes) {
    const vf a = vload(x + i);
    sum = vfma(a, a, sum);
  }
  float total = vreduce_add(sum);
  for (int64_t j = i; j < dim; ++j) total += to_float(x[j]) * to_float(x[j]);
  const float scale = 1.0f / std::sqrt(total / static_cast<float>(dim) + eps);
  const vf vscale = vset(scale), voffset = vset(offset);
  for (i = 0; i + kLanes <= dim; i += kLanes) {
    const vf normed = vround_to<T>(vload(x + i) * vscale);
    vstore(out + i, normed * (vload(weight + i) + voffset));
  }
  for (; i < dim; ++i) {
    const float normed = to_float(from_float<T>(to_float(x[i]) * scale));
    out[i] = from_float<T>(normed * (to_float(weight[i]) + offset));
  }
}

template <typename T>
void silu_mul(const T* gate, const T* up, T* out, int64_t dim) {
  const vf one = vset(1.0f), zero = vset(0.0f);
  int64_t i = 0;
  float lane[kLanes], base[kLanes];
  for (; i + kLanes <= dim; i += kLanes) {
    const vf g = vload(gate + i);
    vstore(base, one + vexp(zero - g));
    vstore(lane, g);
    for (int l = 0; l < kLanes; ++l) lane[l] /= base[l];
    vstore(out + i, vround_to<T>(vload(lane)) * vload(up + i));
  }
  for (; i < dim; ++i) {
    const float g = to_float(gate[i]);
    const float silu = to_float(from_float<T>(g / (1.0f + std::exp(-g))));
    out[i] = from_float<T>(silu * to_float(up[i]));
  }
}

// (a, b) -> (a cos - b sin, b cos + a sin) for the pairs (i, i + half); the rest is copied.
template <typename T>
void rotate(const T* x, const T* cos, const T* sin, T* out, int64_t half, int64_t dim) {
  int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const vf a = vload(x + i), b = vload(x + half + i);
    const vf ca = vload(cos + i), cb = vload(cos + half + i);
    const vf sa = vload(sin + i), sb = vload(sin + half + i);
    vstore(out + i, vround_to<T>(a * ca) - vround_to<T>(b * sa));
    vstore(out + half + i, vround_to<T>(b * cb) + vround_to<T>(a * sb));
  }
  const auto product = [](T p, T q) { return to_float(from_float<T>(to_float(p) * to_float(q))); };
  for (; i < half; ++i) {
    const T a = x[i], b = x[half + i];
    out[i] = from_float<T>(product(a, cos[i]) - product(b, sin[i]));
    out[half + i] = from_float<T>(product(b, cos[half + i]) + product(a, sin[half + i]));
  }
  if (out != x && dim > 2 * half) {
    std::memcpy(out + 2 * half, x + 2 * half, static_cast<size_t>(dim - 2 * half) * sizeof(T));
  }
}

template <typename T>
void rope_append(const RopeAppendParams& p, const RopeRow& row) {
  const int64_t half = p.rotary / 2;
  const T* cos = static_cast<const T*>(p.cos) + row.angles * p.rotary;
  const T* sin = static_cast<const T*>(p.sin) + row.angles * p.rotary;
  T* q = static_cast<T*>(p.q) + row.q;
  for (int64_t h = 0; h < p.q_heads; ++h) {
    rotate(q + h * p.head_dim, cos, sin, q + h * p.head_dim, half, p.head_dim);
  }
  const T* k = static_cast<const T*>(p.k) + row.k;
  const T* v = static_cast<const T*>(p.v) + row.v;
  const int64_t slot = p.seq_lens[row.b] + p.node_offset + row.n;
  const int64_t page = p.block_table[row.b * p.table_stride + slot / p.page_size];
  const int64_t into = (page * p.page_size + slot % p.page_size) * p.kv_heads * p.head_dim;
  T* k_out = static_cast<T*>(p.k_pages) + into;
  for (int64_t h = 0; h < p.kv_heads; ++h) {
    rotate(k + h * p.head_dim, cos, sin, k_out + h * p.head_dim, half, p.head_dim);
  }
  std::memcpy(static_cast<T*>(p.v_pages) + into, v,
              static_cast<size_t>(p.kv_heads * p.head_dim) * sizeof(T));
}

}  // namespace

void rms_norm_row(const RmsNormParams& p, int64_t row) {
  with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    rms_norm(static_cast<const T*>(p.x) + row * p.x_stride, static_cast<const T*>(p.weight),
             static_cast<T*>(p.out) + row * p.out_stride, p.dim, p.eps, p.offset);
  });
}

void silu_mul_row(const SiluMulParams& p, int64_t row) {
  with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* x = static_cast<const T*>(p.x) + row * 2 * p.dim;
    silu_mul(x, x + p.dim, static_cast<T*>(p.out) + row * p.dim, p.dim);
  });
}

void rope_append_row(const RopeAppendParams& p, const RopeRow& row) {
  with_dtype(p.dtype, [&](auto zero) { rope_append<decltype(zero)>(p, row); });
}

}  // namespace inferlab::cpu::INFERLAB_ISA
