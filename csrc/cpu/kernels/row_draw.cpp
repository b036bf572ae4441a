// The Gumbel-max draw. The largest noise that a 32-bit word can give is 22.9, and almost all of it
// is far smaller: from the best score so far and a block's largest element follows how small a
// token's Philox word must be for it to have a chance (large noise comes from small words). So most
// blocks are skipped, in the others only integers are computed, and the two logarithms of the noise
// are taken for a handful of tokens. What is taken is exactly noise_gumbel. Blocks with the largest
// maxima go first, which makes the best score good at once.
#include <cmath>

#include "row_kernels.h"
#include "simd_noise.h"

namespace inferlab::cpu::INFERLAB_ISA {
namespace {

constexpr float kMaxGumbel = 22.88f;
constexpr int kGroup = 64;  // tokens whose words are computed together; divides every block size

template <typename T>
struct Drawer {
  const T* x;
  const Row& row;
  const Draw& draw;
  Top& top;
  PhiloxRow philox;
  float inv_temperature;
  int64_t fetch_end = 0;  // elements before it are fetched kPiece ahead

  Drawer(const T* data, const Row& r, const Draw& d, Top& t)
      : x(data),
        row(r),
        draw(d),
        top(t),
        philox(d.seed, d.position, d.purpose),
        inv_temperature(1.0f / d.temperature) {}

  float scaled(float l) const {
    return draw.score == Score::kGumbel      ? l / draw.temperature
           : draw.score == Score::kLogGumbel ? noise_log(l)
                                             : l;
  }

  float threshold() const {
    const float own = top.threshold();
    if (draw.floor == nullptr) return own;
    const float shared = draw.floor->load(std::memory_order_relaxed);
    return own > shared ? own : shared;
  }

  void offer(int64_t t, uint32_t word) {
    const float l = to_float(x[t]);
    if (!draw.cut.keeps(l, t)) return;
    const float z = scaled(l);
    top.offer(draw.score == Score::kLogit ? z : z + noise_gumbel(word), static_cast<int32_t>(t));
  }

  // A token under a block maximum of z can reach `least` only with a word <= the bound; negative:
  // none can. The slack covers the rounding of the noise and of the scores.
  static int64_t word_bound(float least, float z) {
    const float slack = 1e-3f + 1e-6f * (std::fabs(least) + std::fabs(z));
    const float needed = least - z - slack;  // -log(u) >= noise, so u <= exp(-needed)
    if (needed > kMaxGumbel) return -1;
    if (!(needed > 0.0f)) return 0xffffffff;
    const float words = std::exp(-needed) * 4294967296.0f;
    return words < 4294967040.0f ? static_cast<int64_t>(words) + 1 : int64_t{0xffffffff};
  }

  // The same for one token, with the logarithm taken to the next power of two above.
  bool can_reach(float least, int64_t t, uint32_t word) const {
    if (draw.score != Score::kGumbel || word == 0) return true;
    const float z = to_float(x[t]) * inv_temperature;
    const float most = static_cast<float>(__builtin_clz(word) + 1) * 0.6931472f;
    return !(z + most < least - 1e-3f - 1e-6f * (std::fabs(least) + std::fabs(z)));
  }

  // The first of a block's largest elements, to have a score to beat before anything is computed.
  void offer_largest(int64_t b) {
    const int64_t first = b * row.block;
    const int64_t last = first + row.block < row.size ? first + row.block : row.size;
    for (int64_t i = first; i < last; ++i) {
      if (to_float(x[i]) != row.block_max[b]) continue;
      offer(i, draw.score == Score::kLogit
                   ? 0u
                   : noise_word(draw.seed, draw.position, static_cast<uint32_t>(i), draw.purpose));
      return;
    }
  }

  void by_logit(int64_t first, int64_t last) {
    const float least = threshold();
    const vf bound = vset(least > draw.cut.logit ? least : draw.cut.logit);
    int64_t i = first;
    for (; i + kLanes <= last; i += kLanes) {
      for (uint32_t m = vge(vload(x + i), bound); m != 0; m &= m - 1) {
        offer(i + __builtin_ctz(m), 0u);
      }
    }
    for (; i < last; ++i) offer(i, 0u);
  }

  void fetch(int64_t first) const {
    if (first + kGroup > fetch_end) return;
    const char* p = reinterpret_cast<const char*>(x + first);
    for (size_t byte = 0; byte < kGroup * sizeof(T); byte += 64) __builtin_prefetch(p + byte);
  }

  void by_noise(int64_t first, int64_t last, float block_max) {
    const float z = scaled(block_max);
    float least = threshold();
    int64_t bound = word_bound(least, z);
    for (int64_t g = first; g < last && bound >= 0; g += kGroup) {
      fetch(g + kPiece);
      constexpr int kCalls = kGroup / kWordTokens;
      vq words[kCalls][4];
      vq smallest = qset(0xffffffffu);
      for (int c = 0; c < kCalls; ++c) {
        philox.words(static_cast<uint32_t>(g / 4) + static_cast<uint32_t>(c * kWordLanes),
                     words[c]);
        smallest =
            qmin(smallest, qmin(qmin(words[c][0], words[c][1]), qmin(words[c][2], words[c][3])));
      }
      const vq limit = qset(static_cast<uint32_t>(bound));
      if (!qany_le(smallest, limit)) continue;
      for (int c = 0; c < kCalls; ++c) {
        for (int j = 0; j < 4; ++j) {
          uint32_t m = qle(words[c][j], limit);
          if (m == 0) continue;
          uint32_t lane_words[kWordLanes];
          qstore(lane_words, words[c][j]);
          for (; m != 0; m &= m - 1) {
            const int lane = __builtin_ctz(m);
            const int64_t t = g + c * kWordTokens + 4 * lane + j;
            if (t < last && can_reach(least, t, lane_words[lane])) offer(t, lane_words[lane]);
          }
        }
      }
      const float now = threshold();
      if (now > least) {
        least = now;
        bound = word_bound(least, z);
      }
    }
  }

  void run(int64_t begin, int64_t end) {
    const int64_t first = begin / row.block, last = (end + row.block - 1) / row.block;
    int64_t largest = -1;
    for (int seeds = 0; seeds < top.capacity && seeds < 8; ++seeds) {
      int64_t next = -1;
      for (int64_t b = first; b < last; ++b) {
        const float m = row.block_max[b];
        const bool used = largest >= 0 && (m > row.block_max[largest] ||
                                           (m == row.block_max[largest] && b <= largest));
        if (!used && (next < 0 || m > row.block_max[next])) next = b;
      }
      // Worth it only while its logit alone would do.
      if (next < 0 || !(row.block_max[next] >= draw.cut.logit) ||
          !(scaled(row.block_max[next]) > threshold())) {
        break;
      }
      largest = next;
      offer_largest(next);
    }
    for (int64_t b = first; b < last; ++b) {
      const float m = row.block_max[b];
      if (!(m >= draw.cut.logit)) continue;
      const int64_t from = b * row.block;
      const int64_t to = from + row.block < end ? from + row.block : end;
      if (draw.score != Score::kLogit) {
        by_noise(from, to, m);
      } else if (m >= threshold()) {
        by_logit(from, to);
      }
    }
  }
};

template <typename T>
void run_draw(const T* x, const Row& row, int64_t begin, int64_t end, const Draw& draw, Top& top) {
  Drawer<T>(x, row, draw, top).run(begin, end);
}

template <typename T>
bool run_pieces(const T* x, const Row& row, int64_t begin, int64_t end, const Draw& draw,
                Top& top) {
  Drawer<T> drawer(x, row, draw, top);
  drawer.fetch_end = end;
  bool valid = true;
  for (int64_t i = begin; i < end; i += kPiece) {
    const int64_t j = i + kPiece < end ? i + kPiece : end;
    valid &= scan_blocks(row, i, j);
    drawer.run(i, j);
  }
  return valid;
}

void raise_floor(const Draw& draw, const Top& top) {
  if (draw.floor == nullptr) return;
  const float reached = top.threshold();
  float seen = draw.floor->load(std::memory_order_relaxed);
  while (reached > seen && !draw.floor->compare_exchange_weak(seen, reached)) {
  }
}

}  // namespace

void draw_blocks(const Row& row, int64_t begin, int64_t end, const Draw& draw, Top& top) {
  INFERLAB_BY_DTYPE(row, run_draw, row, begin, end, draw, top);
  raise_floor(draw, top);
}

bool scan_and_draw(const Row& row, int64_t begin, int64_t end, const Draw& draw, Top& top) {
  const bool valid = INFERLAB_BY_DTYPE(row, run_pieces, row, begin, end, draw, top);
  raise_floor(draw, top);
  return valid;
}

void gumbel_fill(uint64_t seed, uint32_t position, uint32_t purpose, float* out, int64_t count) {
  const PhiloxRow philox(seed, position, purpose);
  for (int64_t g = 0; g < count; g += kWordTokens) {
    vq words[4];
    philox.words(static_cast<uint32_t>(g / 4), words);
    uint32_t by_word[4][kWordLanes], by_token[kWordTokens];
    for (int j = 0; j < 4; ++j) qstore(by_word[j], words[j]);
    for (int i = 0; i < kWordTokens; ++i) by_token[i] = by_word[i % 4][i / 4];
    float noise[kWordTokens];
    for (int i = 0; i < kWordTokens; i += kLanes) vstore(noise + i, vnoise_gumbel(by_token + i));
    for (int64_t i = 0; i < kWordTokens && g + i < count; ++i) out[g + i] = noise[i];
  }
}

}  // namespace inferlab::cpu::INFERLAB_ISA
