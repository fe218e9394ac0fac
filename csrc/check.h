// Argument checks. std::invalid_argument becomes ValueError in Python, CudaError becomes fastpref.CudaError.
#pragma once
#include <stdexcept>
#include <string>

namespace fastpref {

inline void check(bool ok, const std::string& message) {
  if (!ok) throw std::invalid_argument(message);
}

struct CudaError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace fastpref
