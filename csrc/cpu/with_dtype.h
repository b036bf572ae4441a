// From the name of an element type to the type.
#pragma once

#include "inferlab/dtype.h"

namespace inferlab::cpu {

// Calls f with a value of the element type that `dtype` names.
template <typename F>
void with_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kF32:
      return f(float{});
    case DType::kF16:
      return f(f16{});
    case DType::kBF16:
      return f(bf16{});
  }
}

}  // namespace inferlab::cpu
