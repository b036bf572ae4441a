// Sums of exponentials over a row. A sum is taken in 16 double lanes, element i in lane i % 16, and
// the lanes are added pairwise: the same bits with 4, 8 or 16 SIMD lanes. Bytes moved: the row
// once, and the weights once where they are stored.
#include <cmath>

#include "row_kernels.h"
#include "simd.h"

namespace inferlab::cpu::INFERLAB_ISA {
namespace {

constexpr int kWide = 16;

#if defined(INFERLAB_ISA_AVX512)
// Masses, in 64-bit integers.
struct MassSums {
  __m512i sum = _mm512_setzero_si512();
  static __m512i masses(__m256 w) {
    const __m512d units = _mm512_mul_pd(_mm512_cvtps_pd(w), _mm512_set1_pd(kMassUnits));
    return _mm512_cvttpd_epi64(_mm512_add_pd(units, _mm512_set1_pd(0.5)));
  }
  void add(int, vf a) {
    sum = _mm512_add_epi64(sum, masses(_mm512_castps512_ps256(a.v)));
    sum = _mm512_add_epi64(sum, masses(_mm512_extractf32x8_ps(a.v, 1)));
  }
  uint64_t total() const { return static_cast<uint64_t>(_mm512_reduce_add_epi64(sum)); }
};
struct Sums {
  __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();
  void add(int, vf a) {
    low = _mm512_add_pd(low, _mm512_cvtps_pd(_mm512_castps512_ps256(a.v)));
    high = _mm512_add_pd(high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1)));
  }
  void store(double* out) const {
    _mm512_storeu_pd(out, low);
    _mm512_storeu_pd(out + 8, high);
  }
};
inline vf keep_lanes(vf a, uint32_t mask) {
  return {_mm512_maskz_mov_ps(static_cast<__mmask16>(mask), a.v)};
}
inline vf vabs(vf a) { return {_mm512_abs_ps(a.v)}; }
#elif defined(INFERLAB_ISA_AVX2)
// Masses, in doubles that hold integers: a lane adds up to 2^50 over a chunk.
struct MassSums {
  __m256d lanes[4] = {_mm256_setzero_pd(), _mm256_setzero_pd(), _mm256_setzero_pd(),
                      _mm256_setzero_pd()};
  static __m256d masses(__m128 w) {
    const __m256d units = _mm256_mul_pd(_mm256_cvtps_pd(w), _mm256_set1_pd(kMassUnits));
    return _mm256_floor_pd(_mm256_add_pd(units, _mm256_set1_pd(0.5)));
  }
  void add(int part, vf a) {
    lanes[2 * part] = _mm256_add_pd(lanes[2 * part], masses(_mm256_castps256_ps128(a.v)));
    lanes[2 * part + 1] = _mm256_add_pd(lanes[2 * part + 1], masses(_mm256_extractf128_ps(a.v, 1)));
  }
  uint64_t total() const {
    double lane[kWide];
    for (int i = 0; i < 4; ++i) _mm256_storeu_pd(lane + 4 * i, lanes[i]);
    uint64_t sum = 0;
    for (const double l : lane) sum += static_cast<uint64_t>(l);
    return sum;
  }
};
struct Sums {
  __m256d lanes[4] = {_mm256_setzero_pd(), _mm256_setzero_pd(), _mm256_setzero_pd(),
                      _mm256_setzero_pd()};
  void add(int part, vf a) {
    lanes[2 * part] = _mm256_add_pd(lanes[2 * part], _mm256_cvtps_pd(_mm256_castps256_ps128(a.v)));
    lanes[2 * part + 1] =
        _mm256_add_pd(lanes[2 * part + 1], _mm256_cvtps_pd(_mm256_extractf128_ps(a.v, 1)));
  }
  void store(double* out) const {
    for (int i = 0; i < 4; ++i) _mm256_storeu_pd(out + 4 * i, lanes[i]);
  }
};
inline vf keep_lanes(vf a, uint32_t mask) {
  const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(mask)), bits);
  return {_mm256_and_ps(a.v, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, bits)))};
}
inline vf vabs(vf a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
#else
struct MassSums {
  uint64_t sum = 0;
  void add(int, vf a) {
    for (int i = 0; i < kLanes; ++i) sum += mass_of(a.v[i]);
  }
  uint64_t total() const { return sum; }
};
struct Sums {
  double lanes[kWide] = {};
  void add(int part, vf a) {
    for (int i = 0; i < kLanes; ++i) lanes[kLanes * part + i] += static_cast<double>(a.v[i]);
  }
  void store(double* out) const {
    for (int i = 0; i < kWide; ++i) out[i] = lanes[i];
  }
};
inline vf keep_lanes(vf a, uint32_t mask) {
  for (int i = 0; i < kLanes; ++i) {
    if (!(mask >> i & 1u)) a.v[i] = 0.0f;
  }
  return a;
}
inline vf vabs(vf a) {
  for (int i = 0; i < kLanes; ++i) a.v[i] = std::fabs(a.v[i]);
  return a;
}
#endif

inline double total(const Sums& sums) {
  double lane[kWide];
  sums.store(lane);
  for (int width = kWide / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  }
  return lane[0];
}

// Calls body(first index, vector, lane group, lanes that exist) over [begin, end) in steps of 16.
template <typename T, typename Body>
inline void for_wide(const T* x, int64_t begin, int64_t end, Body body) {
  int64_t i = begin;
  for (; i + kWide <= end; i += kWide) {
    for (int part = 0; part < kWide / kLanes; ++part) {
      body(i + part * kLanes, vload(x + i + part * kLanes), part, kLanes);
    }
  }
  if (i == end) return;
  float rest[kWide] = {};
  for (int64_t j = i; j < end; ++j) rest[j - i] = to_float(x[j]);
  for (int part = 0; part < kWide / kLanes; ++part) {
    const int64_t left = end - i - part * kLanes;
    const int lanes = left < 0 ? 0 : left < kLanes ? static_cast<int>(left) : kLanes;
    body(i + part * kLanes, vload(rest + part * kLanes), part, lanes);
  }
}

// Bit i: lane i exists and `cut` keeps it. Ties with the cut are looked at one by one.
inline uint32_t kept_lanes(vf x, int64_t first, int lanes, const Cut& cut) {
  const uint32_t exist = lanes >= 32 ? ~0u : (1u << lanes) - 1u;
  const uint32_t above = vgt(x, vset(cut.logit)) & exist;
  uint32_t ties = vge(x, vset(cut.logit)) & exist & ~above;
  uint32_t kept = above;
  for (; ties != 0; ties &= ties - 1) {
    const int lane = __builtin_ctz(ties);
    if (first + lane <= cut.token) kept |= 1u << lane;
  }
  return kept;
}

template <typename T>
double weights(const T* x, int64_t begin, int64_t end, Softmax s, Cut cut, float* out) {
  Sums sums;
  for_wide(x, begin, end, [&](int64_t i, vf l, int part, int lanes) {
    const vf w =
        keep_lanes(vexp((l - vset(s.max)) * vset(s.inv_temperature)), kept_lanes(l, i, lanes, cut));
    sums.add(part, w);
    if (out == nullptr) return;
    if (lanes == kLanes) {
      vstore(out + i, w);
    } else {
      float lane[kWide];
      vstore(lane, w);
      for (int j = 0; j < lanes; ++j) out[i + j] = lane[j];
    }
  });
  return total(sums);
}

template <typename T>
uint64_t masses(const T* x, int64_t begin, int64_t end, Softmax s) {
  MassSums sums;
  for_wide(x, begin, end, [&](int64_t, vf l, int part, int lanes) {
    const vf w = vexp((l - vset(s.max)) * vset(s.inv_temperature));
    sums.add(part, keep_lanes(w, lanes >= 32 ? ~0u : (1u << lanes) - 1u));
  });
  return sums.total();
}

template <typename T>
double weighted_logs(const T* x, int64_t begin, int64_t end, Softmax s, Cut cut) {
  Sums sums;
  for_wide(x, begin, end, [&](int64_t i, vf l, int part, int lanes) {
    // Below -104 the weight is 0; the bound keeps 0 * -inf away.
    const vf z = vmax((l - vset(s.max)) * vset(s.inv_temperature), vset(-200.0f));
    sums.add(part, keep_lanes(vexp(z) * z, kept_lanes(l, i, lanes, cut)));
  });
  return total(sums);
}

template <typename T>
double nearer(const T* x, int64_t begin, int64_t end, Softmax s, Cut cut, float center,
              float distance, int64_t token) {
  Sums sums;
  for_wide(x, begin, end, [&](int64_t i, vf l, int part, int lanes) {
    const vf z = (l - vset(s.max)) * vset(s.inv_temperature);
    const vf d = vabs(z - vset(center));
    const uint32_t closer = vgt(vset(distance), d);
    uint32_t ties = vge(vset(distance), d) & ~closer;
    uint32_t chosen = closer;
    for (; ties != 0; ties &= ties - 1) {
      const int lane = __builtin_ctz(ties);
      if (i + lane < token) chosen |= 1u << lane;
    }
    sums.add(part, keep_lanes(vexp(z), chosen & kept_lanes(l, i, lanes, cut)));
  });
  return total(sums);
}

}  // namespace

double sum_weights(const Row& row, int64_t begin, int64_t end, Softmax s, Cut cut, float* out) {
  return INFERLAB_BY_DTYPE(row, weights, begin, end, s, cut, out);
}

uint64_t sum_masses(const Row& row, int64_t begin, int64_t end, Softmax s) {
  return INFERLAB_BY_DTYPE(row, masses, begin, end, s);
}

double sum_weighted_logs(const Row& row, int64_t begin, int64_t end, Softmax s, Cut cut) {
  return INFERLAB_BY_DTYPE(row, weighted_logs, begin, end, s, cut);
}

double sum_nearer(const Row& row, int64_t begin, int64_t end, Softmax s, Cut cut, float center,
                  float distance, int64_t token) {
  return INFERLAB_BY_DTYPE(row, nearer, begin, end, s, cut, center, distance, token);
}

double sum_residual(const float* p, const float* q, float p_scale, float q_scale, int64_t n,
                    float* out) {
  Sums sums;
  const vf ps = vset(p_scale), qs = vset(q_scale), zero = vset(0.0f);
  int64_t i = 0;
  for (; i + kWide <= n; i += kWide) {
    for (int part = 0; part < kWide / kLanes; ++part) {
      const int64_t at = i + part * kLanes;
      const vf r = vmax(vload(p + at) * ps - vload(q + at) * qs, zero);
      vstore(out + at, r);
      sums.add(part, r);
    }
  }
  double sum = total(sums);
  for (; i < n; ++i) {
    const float a = p[i] * p_scale, b = q[i] * q_scale;
    out[i] = a > b ? a - b : 0.0f;
    sum += static_cast<double>(out[i]);
  }
  return sum;
}

double sum_floats(const float* x, int64_t n) {
  Sums sums;
  for_wide(x, 0, n, [&](int64_t, vf a, int part, int lanes) {
    sums.add(part, keep_lanes(a, lanes >= 32 ? ~0u : (1u << lanes) - 1u));
  });
  return total(sums);
}

namespace {

// Log weight to bucket, as a float so that comparing needs no conversion.
inline vf bucket_of(vf z) {
  return vmin(z * vset(-16.0f), vset(static_cast<float>(kMassBuckets) - 0.5f));
}

// Neighbours often fall into one bucket; four copies keep them from waiting for each other.
template <typename T>
void histogram(const T* x, int64_t begin, int64_t end, Softmax s, uint64_t* buckets) {
  uint64_t copies[4][kMassBuckets] = {};
  for_wide(x, begin, end, [&](int64_t, vf l, int, int lanes) {
    const vf z = (l - vset(s.max)) * vset(s.inv_temperature);
    float weight[kLanes], bucket[kLanes];
    vstore(weight, vexp(z));
    vstore(bucket, bucket_of(z));
    for (int i = 0; i < lanes; ++i)
      copies[i % 4][static_cast<int>(bucket[i])] += mass_of(weight[i]);
  });
  for (int i = 0; i < kMassBuckets; ++i) {
    buckets[i] += copies[0][i] + copies[1][i] + copies[2][i] + copies[3][i];
  }
}

template <typename T>
int64_t collect_of_bucket(const T* x, const Row& row, Softmax s, int bucket, uint64_t* keys) {
  int64_t count = 0;
  const vf from = vset(static_cast<float>(bucket)), to = vset(static_cast<float>(bucket + 1));
  for (int64_t b = 0; b * row.block < row.size; ++b) {
    const float best = (row.block_max[b] - s.max) * s.inv_temperature * -16.0f;
    if (!(best < static_cast<float>(bucket + 1)) && bucket != kMassBuckets - 1) continue;
    const int64_t first = b * row.block;
    const int64_t last = first + row.block < row.size ? first + row.block : row.size;
    for_wide(x, first, last, [&](int64_t i, vf l, int, int lanes) {
      const vf at = bucket_of((l - vset(s.max)) * vset(s.inv_temperature));
      const uint32_t exist = lanes >= 32 ? ~0u : (1u << lanes) - 1u;
      for (uint32_t m = vge(at, from) & vgt(to, at) & exist; m != 0; m &= m - 1) {
        const int64_t t = i + __builtin_ctz(m);
        const float logit = to_float(x[t]);
        if (logit > -kInf) keys[count++] = rank_key(logit, static_cast<uint32_t>(t));
      }
    });
  }
  return count;
}

}  // namespace

void mass_histogram(const Row& row, int64_t begin, int64_t end, Softmax s, uint64_t* buckets) {
  INFERLAB_BY_DTYPE(row, histogram, begin, end, s, buckets);
}

int64_t collect_bucket(const Row& row, Softmax s, int bucket, uint64_t* keys) {
  return INFERLAB_BY_DTYPE(row, collect_of_bucket, row, s, bucket, keys);
}

void key_masses(const uint64_t* keys, int64_t n, Softmax s, uint64_t* masses) {
  float z[64], w[64];
  for (int64_t i = 0; i < n; i += 64) {
    const int64_t m = n - i < 64 ? n - i : 64;
    for (int64_t j = 0; j < 64; ++j) {
      z[j] = j < m ? (key_value(keys[i + j]) - s.max) * s.inv_temperature : 0.0f;
    }
    for (int j = 0; j < 64; j += kLanes) vstore(w + j, vexp(vload(z + j)));
    for (int64_t j = 0; j < m; ++j) masses[i + j] = mass_of(w[j]);
  }
}

float exp_one(float x) { return weight_exp(x); }

}  // namespace inferlab::cpu::INFERLAB_ISA
