// Rank-free robust PCA of many small matrices, min |L|_* + lambda |S|_1 with L + S = D on what is observed: inexact
// augmented Lagrangian steps with a duality gap. Each matrix is solved whole, in cache, by one thread, and stops on its
// own.
#pragma once
#include <cstdint>

namespace fastpref {

struct BatchedIalm {
  const void* data;  // [batch, rows, columns] float or double, finite; NaN is missing
  bool is_double;
  int64_t batch, rows, columns;
  const double* lam;  // [batch]
  double tol;
  int64_t max_iter;
  void *left, *right;  // [batch, d, rows], [batch, d, columns], d = min(rows, columns): vectors up to the rank
  void* sigma;         // [batch, d], likewise
  int64_t *rank, *iterations;
  double *residual, *gap, *median;  // [batch]; the median of |D - L| over the observed entries
  double* dense_share;              // [batch] of the observed entries, those where S is not zero
  bool* converged;
  void* workspace;  // threads * batched_ialm_workspace(...) bytes
};

int64_t batched_ialm_workspace(int64_t rows, int64_t columns, bool is_double);
void batched_ialm_cpu(const BatchedIalm& args, int threads);

}  // namespace fastpref
