// Element types of the tensors the kernels read and write. The codes are the contract with fastpref/_native.py.
#pragma once
#include <cstdint>

namespace fastpref {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

}  // namespace fastpref
