// Element types of the tensors the kernels read and write. The codes are the contract with Python's DTYPE_CODES.
#pragma once
#include <cstdint>

namespace fastpref {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };
enum class MatrixDType : int { f32 = 0, bf16 = 1, f16 = 2, f64 = 3, i8 = 4 };  // of the matrices of the low-rank ops

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

}  // namespace fastpref
