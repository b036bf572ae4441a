// One row or one token of each layer op.
#include "inferlab/layer.h"

#include <cmath>
#include <cstring>

#include "layer_rows.h"
#include "page_head.h"
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
    const vf normed = vload(x + i) * vscale;
    vstore(out + i, (offset != 0 ? normed : vround_to<T>(normed)) * (vload(weight + i) + voffset));
  }
  for (; i < dim; ++i) {
    float normed = to_float(x[i]) * scale;
    if (offset == 0) normed = to_float(from_float<T>(normed));
    out[i] = from_float<T>(normed * (to_float(weight[i]) + offset));
  }
}

template <typename T>
void layer_norm(const T* x, const T* weight, const T* bias, T* out, int64_t dim, float eps) {
  vf sum = vset(0.0f);
  int64_t i = 0;
  for (; i + kLanes <= dim; i += kLanes) sum = sum + vload(x + i);
  float total = vreduce_add(sum);
  for (; i < dim; ++i) total += to_float(x[i]);
  const float mean = total / static_cast<float>(dim);
  const vf vmean = vset(mean);
  sum = vset(0.0f);
  for (i = 0; i + kLanes <= dim; i += kLanes) {
    const vf a = vload(x + i) - vmean;
    sum = vfma(a, a, sum);
  }
  total = vreduce_add(sum);
  for (; i < dim; ++i) total += (to_float(x[i]) - mean) * (to_float(x[i]) - mean);
  const float scale = 1.0f / std::sqrt(total / static_cast<float>(dim) + eps);
  const vf vscale = vset(scale);
  for (i = 0; i + kLanes <= dim; i += kLanes) {
    const vf normed = (vload(x + i) - vmean) * vscale * vload(weight + i);
    vstore(out + i, bias != nullptr ? normed + vload(bias + i) : normed);
  }
  for (; i < dim; ++i) {
    const float normed = (to_float(x[i]) - mean) * scale * to_float(weight[i]);
    out[i] = from_float<T>(bias != nullptr ? normed + to_float(bias[i]) : normed);
  }
}

inline vf vdivide(vf a, vf b) {
  float lane[kLanes], base[kLanes];
  vstore(lane, a);
  vstore(base, b);
  for (int l = 0; l < kLanes; ++l) lane[l] /= base[l];
  return vload(lane);
}

struct Silu {
  static vf of(vf x) { return vdivide(x, vset(1.0f) + vexp(vset(0.0f) - x)); }
  static float of(float x) { return x / (1.0f + std::exp(-x)); }
};

struct Relu {
  static vf of(vf x) { return vmax(x, vset(0.0f)); }
  static float of(float x) { return x > 0.0f ? x : 0.0f; }
};

// x / 2 (1 + tanh(u)) = x / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3)
struct GeluTanh {
  static constexpr float kScale = -1.5957691216f, kCubic = 0.044715f;
  static vf of(vf x) {
    const vf u = vset(kScale) * x * vfma(vset(kCubic) * x, x, vset(1.0f));
    return vdivide(x, vset(1.0f) + vexp(u));
  }
  static float of(float x) { return x / (1.0f + std::exp(kScale * x * (1.0f + kCubic * x * x))); }
};

// x / 2 (1 + erf(x / sqrt(2))); erfc(z) = exp(-z^2) t (a1 + t (a2 + ...)), t = 1 / (1 + p z), is
// off by 1.5e-7 at most (Abramowitz & Stegun, 7.1.26).
struct Gelu {
  static vf of(vf x) {
    const vf zero = vset(0.0f), size = vmax(x, zero - x), z = size * vset(0.70710678f);
    const vf t = vdivide(vset(1.0f), vfma(vset(0.3275911f), z, vset(1.0f)));
    vf tail = vset(1.061405429f);
    for (const float a : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) {
      tail = vfma(tail, t, vset(a));
    }
    tail = tail * t * vexp(zero - z * z);
    return vmax(x, zero) - vset(0.5f) * size * tail;
  }
  static float of(float x) { return 0.5f * x * (1.0f + std::erf(x * 0.70710678f)); }
};

template <typename Function, typename T>
void activate(const T* x, const T* up, T* out, int64_t dim) {
  int64_t i = 0;
  for (; i + kLanes <= dim; i += kLanes) {
    const vf y = Function::of(vload(x + i));
    vstore(out + i, up != nullptr ? vround_to<T>(y) * vload(up + i) : y);
  }
  for (; i < dim; ++i) {
    const T y = from_float<T>(Function::of(to_float(x[i])));
    out[i] = up != nullptr ? from_float<T>(to_float(y) * to_float(up[i])) : y;
  }
}

template <typename T>
void sum(float scale, const T* x, const T* y, T* out, int64_t dim) {
  const vf vscale = vset(scale);
  int64_t i = 0;
  for (; i + kLanes <= dim; i += kLanes) {
    const vf scaled = vload(x + i) * vscale;
    vstore(out + i, y != nullptr ? vround_to<T>(scaled) + vload(y + i) : scaled);
  }
  for (; i < dim; ++i) {
    const T scaled = from_float<T>(to_float(x[i]) * scale);
    out[i] = y != nullptr ? from_float<T>(to_float(scaled) + to_float(y[i])) : scaled;
  }
}

// tanh(x) = 1 - 2 / (1 + exp(2 x))
template <typename T>
void softcap(T* x, int64_t dim, float cap) {
  const vf vcap = vset(cap), one = vset(1.0f), two = vset(2.0f);
  int64_t i = 0;
  for (; i + kLanes <= dim; i += kLanes) {
    const vf share = vround_to<T>(vdivide(vload(x + i), vcap));
    const vf bent = one - vdivide(two, one + vexp(two * share));
    vstore(x + i, vround_to<T>(bent) * vcap);
  }
  for (; i < dim; ++i) {
    const float share = to_float(from_float<T>(to_float(x[i]) / cap));
    x[i] = from_float<T>(to_float(from_float<T>(std::tanh(share))) * cap);
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
    T* head = q + h * row.head_stride;
    rotate(head, cos, sin, head, half, p.head_dim);
  }
  const T* k = static_cast<const T*>(p.k) + row.k;
  const T* v = static_cast<const T*>(p.v) + row.v;
  const int64_t slot = p.seq_lens[row.b] + p.node_offset + row.n;
  const int64_t page = p.block_table[row.b * p.table_stride + slot / p.page_size];
  const int64_t place = (page * p.page_size + slot % p.page_size) * p.kv_heads;
  if (p.format != PageFormat::kSame) {
    const int64_t bytes = page_head_bytes(p.format, p.head_dim, p.dtype);
    char* k_out = static_cast<char*>(p.k_pages) + place * bytes;
    char* v_out = static_cast<char*>(p.v_pages) + place * bytes;
    for (int64_t h = 0; h < p.kv_heads; ++h) {
      T turned[kMaxHeadDim];
      rotate(k + h * row.head_stride, cos, sin, turned, half, p.head_dim);
      write_head(turned, p.head_dim, p.format, k_out + h * bytes);
      write_head(v + h * row.head_stride, p.head_dim, p.format, v_out + h * bytes);
    }
    return;
  }
  T* k_out = static_cast<T*>(p.k_pages) + place * p.head_dim;
  for (int64_t h = 0; h < p.kv_heads; ++h) {
    rotate(k + h * row.head_stride, cos, sin, k_out + h * p.head_dim, half, p.head_dim);
  }
  T* v_out = static_cast<T*>(p.v_pages) + place * p.head_dim;
  const bool together = row.head_stride == p.head_dim;
  const int64_t pieces = together ? 1 : p.kv_heads;
  const int64_t length = together ? p.kv_heads * p.head_dim : p.head_dim;
  for (int64_t i = 0; i < pieces; ++i) {
    std::memcpy(v_out + i * length, v + i * row.head_stride,
                static_cast<size_t>(length) * sizeof(T));
  }
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
    activate<Silu>(x, x + p.dim, static_cast<T*>(p.out) + row * p.dim, p.dim);
  });
}

void layer_norm_row(const LayerNormRow& p) {
  with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    layer_norm(static_cast<const T*>(p.x), static_cast<const T*>(p.weight),
               static_cast<const T*>(p.bias), static_cast<T*>(p.out), p.dim, p.eps);
  });
}

void activation_row(const ActivationRow& p) {
  with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* x = static_cast<const T*>(p.x);
    const T* up = static_cast<const T*>(p.up);
    T* out = static_cast<T*>(p.out);
    switch (p.activation) {
      case Activation::kSilu:
        return activate<Silu>(x, up, out, p.dim);
      case Activation::kGelu:
        return activate<Gelu>(x, up, out, p.dim);
      case Activation::kGeluTanh:
        return activate<GeluTanh>(x, up, out, p.dim);
      case Activation::kRelu:
        return activate<Relu>(x, up, out, p.dim);
    }
  });
}

void sum_row(const SumRow& p) {
  with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    sum(p.scale, static_cast<const T*>(p.x), static_cast<const T*>(p.y), static_cast<T*>(p.out),
        p.dim);
  });
}

void softcap_row(const SoftcapRow& p) {
  with_dtype(p.dtype, [&](auto zero) { softcap(static_cast<decltype(zero)*>(p.x), p.dim, p.cap); });
}

void rope_append_row(const RopeAppendParams& p, const RopeRow& row) {
  with_dtype(p.dtype, [&](auto zero) { rope_append<decltype(zero)>(p, row); });
}

}  // namespace inferlab::cpu::INFERLAB_ISA
