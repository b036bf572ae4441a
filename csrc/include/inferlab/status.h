// What an op reports back. Kernels know no framework and never throw, print or exit.
#pragma once

namespace inferlab {

enum class Status : int {
  kOk = 0,
  kBadArgument = 1,    // a combination the binding should have refused
  kOutOfMemory = 2,    // memory could not be had
  kDeviceError = 3,    // the device runtime reported a fault
  kNoKernelImage = 4,  // no code for this device's architecture was compiled in
};

}  // namespace inferlab
