// Argument checks. std::invalid_argument becomes ValueError in Python, CudaError becomes fastpref.CudaError.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

namespace fastpref {

inline void check(bool ok, const std::string& message) {
  if (!ok) throw std::invalid_argument(message);
}

inline void check_labels(const int64_t* labels, int64_t rows, int64_t vocab, int64_t ignore_index) {
  for (int64_t row = 0; row < rows; row++)
    if ((labels[row] < 0 || labels[row] >= vocab) && labels[row] != ignore_index)
      throw std::invalid_argument("labels must lie in [0, " + std::to_string(vocab) +
                                  ") or equal ignore_index=" + std::to_string(ignore_index) + ", got " +
                                  std::to_string(labels[row]) + " at position " + std::to_string(row));
}

struct CudaError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace fastpref
