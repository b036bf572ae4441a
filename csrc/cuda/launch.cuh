// How every kernel is launched, and where its shared memory lies. A kernel takes one parameter
// struct by value; its shared memory is one struct, reached by shared_memory<T>(), so that the
// launcher says sizeof(T) and a CPU stand-in can poison it (tests/native/shim).
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "inferlab/status.h"

namespace inferlab::cuda {

Status to_status(cudaError_t error);
int multiprocessors();  // of the current device

// The block's dynamic shared memory as a T; uninitialised.
template <typename T>
__device__ __forceinline__ T& shared_memory() {
#if defined(INFERLAB_CUDA_SHIM)
  return *static_cast<T*>(simt::self->shared);
#else
  extern __shared__ __align__(128) unsigned char inferlab_shared_memory[];
  return *reinterpret_cast<T*>(inferlab_shared_memory);
#endif
}

// Whether blocks may wait for each other: kTogether guarantees that all of them run at once.
enum class Blocks { kIndependent, kTogether };

constexpr size_t kSharedWithoutAsking = 48 * 1024;

template <typename P>
Status launch(void (*kernel)(P), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
              const P& params, Blocks blocks = Blocks::kIndependent) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return Status::kOk;
#if defined(INFERLAB_CUDA_SHIM)
  (void)stream;
  struct Call {
    void (*kernel)(P);
    const P& params;
  } call{kernel, params};
  simt::launch(
      simt::Dim{grid.x, grid.y, grid.z}, simt::Dim{block.x, block.y, block.z}, shared_bytes,
      blocks == Blocks::kTogether,
      [](void* c) { static_cast<Call*>(c)->kernel(static_cast<Call*>(c)->params); }, &call);
  return Status::kOk;
#else
  if (shared_bytes > kSharedWithoutAsking) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return to_status(error);
  }
  const auto* function = reinterpret_cast<const void*>(kernel);
  void* args[] = {const_cast<P*>(&params)};
  const auto s = static_cast<cudaStream_t>(stream);
  return to_status(blocks == Blocks::kTogether
                       ? cudaLaunchCooperativeKernel(function, grid, block, args, shared_bytes, s)
                       : cudaLaunchKernel(function, grid, block, args, shared_bytes, s));
#endif
}

}  // namespace inferlab::cuda
