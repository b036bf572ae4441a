// Runs SIMT kernels on the CPU, for tests: every GPU thread is a fibre with a stack of its own, and
// all of them take turns on one CPU thread. A fibre runs until it waits at a barrier, a warp
// exchange or in a polling loop, so runs are fast and reproducible; the order in which the lanes,
// warps and blocks take turns changes from launch to launch, so that code which depends on it is
// found out.
//
// Under ThreadSanitizer each fibre counts as a thread, and only what orders memory on a GPU orders
// it here: a block barrier, a warp barrier, a memory fence. Shuffles, atomics and turns do not, and
// neither does one block's ending before another begins; one launch's ending before the next does.
//
// Shared memory is a heap block of exactly the size asked for, filled with 0xff (NaN, -1), so that
// AddressSanitizer sees every overrun and stale reads give nonsense.
#pragma once

#include <cstddef>
#include <cstdint>

namespace simt {

struct Dim {
  unsigned x, y, z;
};

// The device that the shim is: few multiprocessors, so that grids stay small and several blocks
// still share a row (fewer for TSan: a barrier's cost to it grows with the square of the threads);
// the least shared memory of the architectures we build for (8.6, 8.9, 12.0).
constexpr unsigned kWarpSize = 32;
#if defined(__SANITIZE_THREAD__) || defined(SIMT_TSAN)
constexpr unsigned kMultiprocessors = 4;
#else
constexpr unsigned kMultiprocessors = 6;
#endif
constexpr size_t kMaxSharedBytes = 99 * 1024;

struct Thread {
  Dim thread, block, block_dim, grid_dim;
  unsigned lane;  // in its warp
  void* shared;   // the block's shared memory
};

// The thread that is running. Null outside of kernels.
extern Thread* self;

// A line of source. As a default argument, here() is the caller's.
struct Site {
  const char* file = nullptr;
  int line = 0;
  static constexpr Site here(const char* f = __builtin_FILE(), int l = __builtin_LINE()) {
    return Site{f, l};
  }
};

// Runs body(arg) once per thread. With `together` all blocks are alive at once, as a cooperative
// launch promises; otherwise each block ends before the next begins. False if the launch was
// illegal or its threads could not go on; last_error() then says why, until the next such launch.
bool launch(Dim grid, Dim block, size_t shared_bytes, bool together, void (*body)(void*),
            void* arg);
const char* last_error();

// Waits for all threads of the block that have not exited; returns how many of them gave a true
// predicate. All must come to the same `site`.
int block_barrier(int predicate, Site site);

// Waits for the lanes of `mask` (all of them must come) and orders memory between them.
void warp_barrier(uint32_t mask, Site intrinsic = Site::here());

// Waits for the lanes of `mask`; returned[i] is the value that lane i brought, until the warp meets
// again. Orders no memory. All must come by the same intrinsic: the line that calls this.
const uint64_t* warp_exchange(uint32_t mask, uint64_t value, Site intrinsic = Site::here());

inline void warp_exchange(uint32_t mask, uint64_t value, uint64_t (&out)[kWarpSize],
                          Site intrinsic = Site::here()) {
  const uint64_t* all = warp_exchange(mask, value, intrinsic);
  for (unsigned i = 0; i < kWarpSize; ++i) out[i] = all[i];
}

// Lets the others run: to be called in every loop that waits for memory to change.
void yield(Site site = Site::here());

// To be called by every atomic read: what makes a later fence a fence against the writer.
void observe();

// Memory fences: between all threads, and between those of the block.
void fence();
void fence_block();

}  // namespace simt
