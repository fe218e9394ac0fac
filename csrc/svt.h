// Singular-value thresholding of many small matrices: one-sided Jacobi on one matrix per vector lane.
#pragma once
#include <cstdint>

namespace fastpref {

struct Svt {
  const void* matrix;     // [batch, rows, columns] float or double
  const void* threshold;  // [batch], not negative
  bool is_double;
  int64_t batch, rows, columns;
  void* low_rank;   // [batch, rows, columns]
  int64_t* rank;    // [batch]; -1: no convergence, -2: an entry is not finite (then low_rank is not written)
  void* workspace;  // threads * svt_workspace(...) bytes
};

int64_t svt_workspace(int64_t rows, int64_t columns);
void svt_cpu(const Svt& args, int threads);

}  // namespace fastpref
