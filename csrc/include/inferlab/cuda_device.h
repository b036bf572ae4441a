// What the CUDA runtime says about this machine, and which device the next launches go to.
#pragma once

namespace inferlab::cuda {

int device_count();  // 0 where there is no driver or no device

// Makes a device current while it lives; where it is current already, that costs one query.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = -1;  // -1: nothing to restore
};

// The runtime's words for the last failed launch of this thread.
const char* last_error();

}  // namespace inferlab::cuda
