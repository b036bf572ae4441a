// Runs SIMT kernels on the CPU, for tests: every GPU thread is a fibre with a stack of its own, and
// all of them take turns on one CPU thread. A fibre runs until it waits at a barrier, a warp
// exchange or in a polling loop, so runs are fast and reproducible; the order in which fibres of a
// block and blocks of a grid run changes from launch to launch, so that code which depends on it is
// found out.
//
// Under ThreadSanitizer each fibre counts as a thread, and only what orders memory on a GPU orders
// it here: a block barrier, a warp barrier, a memory fence. Shuffles do not, and turns do not.
// Shared memory is a heap block of exactly the size asked for, filled with 0xff (NaN, -1), so that
// AddressSanitizer sees every overrun and stale reads give nonsense.
#pragma once

#include <cstddef>
#include <cstdint>

namespace simt {

struct Dim {
  unsigned x, y, z;
};

constexpr unsigned kWarpSize = 32;

struct Thread {
  Dim thread, block, block_dim, grid_dim;
  unsigned lane;  // in its warp
  void* shared;   // the block's shared memory
};

// The thread that is running. Null outside of kernels.
extern Thread* self;

struct LaunchError {  // thrown by launch
  const char* what;
};

// Runs body(arg) once per thread. With `together` all blocks are alive at once, as a cooperative
// launch promises; otherwise each block ends before the next begins.
void launch(Dim grid, Dim block, size_t shared_bytes, bool together, void (*body)(void*),
            void* arg);

// Waits for all threads of the block; returns how many of them gave a true predicate.
int block_barrier(int predicate);

// Waits for the lanes of `mask` (all of them must come) and orders memory between them.
void warp_barrier(uint32_t mask);

// Waits for the lanes of `mask`; out[i] is the value that lane i brought. Orders no memory.
void warp_exchange(uint32_t mask, uint64_t value, uint64_t out[kWarpSize]);

// Lets the others run: to be called in every loop that waits for memory to change.
void yield();

// A device-wide memory fence.
void fence();

}  // namespace simt
