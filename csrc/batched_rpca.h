// Fixed-rank robust PCA of many small matrices: annealed M-estimation with scaled gradient steps on L = left right^T.
// Each matrix is solved whole, in cache, by one thread, and stops on its own.
#pragma once
#include <cstdint>

namespace fastpref {

struct BatchedRpca {
  const void* data;  // [batch, rows, columns] float or double; NaN is missing
  bool is_double, skew, warm;
  int attempt;  // which of the schedules for its observed share a matrix is given; 1, warm: again, from a found fit
  int64_t batch, rows, columns, rank;
  const void* start;  // [columns, rank] for the block power steps of a cold start
  double tol;
  int64_t max_iter;
  void *left, *right;   // [batch, rows, rank], [batch, columns, rank]; read first where warm
  int64_t* iterations;  // [batch]
  double* median;       // [batch] of |D - L| over the observed entries
  bool* converged;      // [batch]
  void* workspace;      // threads * batched_rpca_workspace(...) bytes
};

int64_t batched_rpca_workspace(int64_t rows, int64_t columns, int64_t rank, bool is_double);
void batched_rpca_cpu(const BatchedRpca& args, int threads);

}  // namespace fastpref
