// CUDA calls as exceptions.
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

}  // namespace fastpref
