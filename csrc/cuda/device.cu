// Questions to the CUDA runtime, which is linked in: they are answered without a driver too.
#include "inferlab/cuda_device.h"

#include "launch.cuh"

namespace inferlab::cuda {
namespace {

thread_local const char* error_text = "";

}  // namespace

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();  // the runtime remembers it, and a later launch would report it
  return 0;
}

DeviceGuard::DeviceGuard(int device) {
  int current = device;
  if (cudaGetDevice(&current) == cudaSuccess && current != device) {
    previous_ = current;
    cudaSetDevice(device);
  }
}

DeviceGuard::~DeviceGuard() {
  if (previous_ >= 0) cudaSetDevice(previous_);
}

const char* last_error() { return error_text; }

Status to_status(cudaError_t error) {
  if (error == cudaSuccess) return Status::kOk;
  cudaGetLastError();  // forget it: errors that are not sticky must not fail the next launch
  error_text = cudaGetErrorString(error);
  if (error == cudaErrorMemoryAllocation) return Status::kOutOfMemory;
  if (error == cudaErrorNoKernelImageForDevice) return Status::kNoKernelImage;
  return Status::kDeviceError;
}

int multiprocessors() {
  int device = 0, count = 1;
  if (cudaGetDevice(&device) != cudaSuccess) return 1;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
    return 1;
  }
  return count;
}

bool starts_early() {
#if CUDART_VERSION < 12030  // graphs cannot hold such launches
  return false;
#endif
  int device = 0, major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         major >= 9;
}

}  // namespace inferlab::cuda
