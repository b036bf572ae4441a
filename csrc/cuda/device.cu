// Questions to the CUDA runtime, which is linked in: they are answered without a driver too.
#include <cuda_runtime.h>

#include "inferlab/cuda_device.h"

namespace inferlab::cuda {

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();  // the runtime remembers it, and a later launch would report it
  return 0;
}

}  // namespace inferlab::cuda
