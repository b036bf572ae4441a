// What the CUDA runtime says about this machine.
#pragma once

namespace inferlab::cuda {

int device_count();  // 0 where there is no driver or no device

}  // namespace inferlab::cuda
