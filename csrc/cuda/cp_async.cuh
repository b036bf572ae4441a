// Copies from global to shared memory that run on while the thread computes (cp.async). Copies are
// committed in groups; wait<n>() returns when all but the newest n groups have arrived, for the
// copies of this thread: a barrier must follow before others read them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#if defined(INFERLAB_CUDA_SHIM)
#include <vector>
#endif

namespace inferlab::cuda {

#if !defined(INFERLAB_CUDA_SHIM)

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

struct AsyncCopies {
  // 16 bytes, both addresses aligned to them; zeros unless `valid`.
  __device__ __forceinline__ void copy16(void* to, const void* from, bool valid) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                 "l"(from), "r"(valid ? 16 : 0)
                 : "memory");
  }
  __device__ __forceinline__ void copy4(void* to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(to)), "l"(from)
                 : "memory");
  }
  __device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
  template <int kPending>
  __device__ __forceinline__ void wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
  }
};

#else

// As late as the rules allow: bytes under way are 0xff (NaN) and arrive when they are waited for.
class AsyncCopies {
 public:
  void copy16(void* to, const void* from, bool valid) { add(to, valid ? from : nullptr, 16); }
  void copy4(void* to, const void* from) { add(to, from, 4); }
  void commit() { groups_.push_back(copies_.size()); }
  template <int kPending>
  void wait() {
    while (groups_.size() - arrived_groups_ > kPending) {
      for (; arrived_ < groups_[arrived_groups_]; ++arrived_) {
        const Copy& c = copies_[arrived_];
        if (c.from == nullptr) {
          std::memset(c.to, 0, c.bytes);
        } else {
          std::memcpy(c.to, c.from, c.bytes);
        }
      }
      ++arrived_groups_;
    }
  }

 private:
  struct Copy {
    void* to;
    const void* from;
    size_t bytes;
  };
  void add(void* to, const void* from, size_t bytes) {
    std::memset(to, 0xff, bytes);
    copies_.push_back({to, from, bytes});
  }

  std::vector<Copy> copies_;
  std::vector<size_t> groups_;  // copies_.size() at each commit
  size_t arrived_ = 0, arrived_groups_ = 0;
};

#endif

}  // namespace inferlab::cuda
