// CUDA calls as exceptions, and the current device put back on every way out.
#pragma once
#include <cuda_runtime.h>

#include "check.h"

namespace fastpref {

inline void check_cuda(cudaError_t status, const char* call, const char* file, int line) {
  if (status != cudaSuccess)
    throw CudaError(std::string(call) + " failed: " + cudaGetErrorString(status) + " (" + cudaGetErrorName(status) +
                    ") at " + file + ":" + std::to_string(line));
}

#define FASTPREF_CHECK_CUDA(call) ::fastpref::check_cuda((call), #call, __FILE__, __LINE__)

struct DeviceGuard {
  explicit DeviceGuard(int device) {
    FASTPREF_CHECK_CUDA(cudaGetDevice(&previous));
    if (previous != device) FASTPREF_CHECK_CUDA(cudaSetDevice(device));
    changed = previous != device;
  }
  ~DeviceGuard() {
    if (changed) cudaSetDevice(previous);  // a destructor must not throw
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  int previous = 0;
  bool changed = false;
};

}  // namespace fastpref
