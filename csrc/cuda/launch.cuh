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
bool starts_early();    // whether it can begin a kernel before the one in front has ended (sm_90)

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

// Whether a kernel may begin while those in front of it still run (programmatic dependent launch).
// Such a kernel calls wait_for_earlier_kernels() in every thread before it reads what others write,
// or writes anything; so when it has ended, they have. Calling let_next_kernel_start() first lets
// the next one do likewise.
enum class Start { kInOrder, kEarly };

__device__ __forceinline__ void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void wait_for_earlier_kernels() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

constexpr size_t kSharedWithoutAsking = 48 * 1024;

template <typename P>
Status launch(void (*kernel)(P), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
              const P& params, Blocks blocks = Blocks::kIndependent,
              Start start = Start::kInOrder) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return Status::kOk;
#if defined(INFERLAB_CUDA_SHIM)
  (void)stream;
  (void)start;
  struct Call {
    void (*kernel)(P);
    const P& params;
  } call{kernel, params};
  const bool done = simt::launch(
      simt::Dim{grid.x, grid.y, grid.z}, simt::Dim{block.x, block.y, block.z}, shared_bytes,
      blocks == Blocks::kTogether,
      [](void* c) { static_cast<Call*>(c)->kernel(static_cast<Call*>(c)->params); }, &call);
  return to_status(done ? cudaSuccess : cudaErrorLaunchFailure);
#else
  if (shared_bytes > kSharedWithoutAsking) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return to_status(error);
  }
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  if (blocks == Blocks::kTogether) {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
    config.numAttrs = 1;
  } else if (start == Start::kEarly && starts_early()) {
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.numAttrs = 1;
  }
  void* args[] = {const_cast<P*>(&params)};
  return to_status(cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), args));
#endif
}

}  // namespace inferlab::cuda
