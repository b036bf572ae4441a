// What an op reports back. Kernels know no framework and never throw, print or exit.
#pragma once

namespace inferlab {

enum class Status : int {
  kOk = 0,
  kBadArgument = 1,  // a combination the binding should have refused
  kOutOfMemory = 2,  // workspace could not be had
  kDeviceError = 3,  // the device runtime reported a fault
};

}  // namespace inferlab
