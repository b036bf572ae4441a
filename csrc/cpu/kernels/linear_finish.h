// What follows a product's sums.
#pragma once

#include "inferlab/dtype.h"
#include "inferlab/linear.h"

namespace inferlab::cpu::INFERLAB_ISA {

// Adds bias and residual to finished sums and rounds, in the order of the unfused layer.
template <typename T>
inline void finish_row(const LinearParams& p, int64_t row, int64_t begin, int64_t end,
                       const float* sums) {
  const T* bias = static_cast<const T*>(p.bias);
  const T* residual = static_cast<const T*>(p.residual);
  if (residual != nullptr) residual += row * p.out;
  T* y = static_cast<T*>(p.y) + row * p.out;
  for (int64_t n = begin; n < end; ++n) {
    float sum = sums[n - begin];
    if (bias != nullptr) sum += to_float(bias[n]);
    if (residual != nullptr) sum = to_float(residual[n]) + to_float(from_float<T>(sum));
    y[n] = from_float<T>(sum);
  }
}

}  // namespace inferlab::cpu::INFERLAB_ISA
