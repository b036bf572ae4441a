// Memory that grows and never shrinks, so that a decoding loop allocates nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

namespace inferlab::cpu {

class Arena {
 public:
  // 64-byte aligned, with what it had lost where it grew; null where there is no memory.
  float* get(int64_t floats) {
    const auto need = static_cast<size_t>(floats) + 16;
    if (data_.size() < need) {
      try {
        data_.clear();
        data_.resize(need + need / 4);
      } catch (const std::bad_alloc&) {
        return nullptr;
      }
    }
    const uintptr_t address = reinterpret_cast<uintptr_t>(data_.data());
    return reinterpret_cast<float*>((address + 63) & ~uintptr_t{63});
  }

 private:
  std::vector<float> data_;
};

}  // namespace inferlab::cpu
