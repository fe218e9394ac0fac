// What fits L = left right^T of many small matrices leave of them: singular value decompositions of L, and counts and
// sums of the residuals beyond and within a bound.
#pragma once
#include <cstdint>

namespace fastpref {

struct BatchedVerdict {
  const void* data;  // [batch, rows, columns] float or double; NaN is missing
  bool is_double;
  int64_t batch, rows, columns, rank;  // rank <= min(rows, columns)
  const void *left, *right;            // [batch, rows, rank], [batch, columns, rank]
  const double* median;                // [batch] of |D - L|
  double outlier, exact;               // |R| > max(outlier * median, exact * mean |D|) is an outlier
  void *u, *s, *vh;                    // [batch, rows, rank], [batch, rank] descending, [batch, rank, columns]
  double* sums;                        // [batch, 4]: mean |D|, |D - L| of the rest / |D|, shares of outliers: of all
                                       // entries, and the largest of a row or column
  double *row_rates, *column_rates;    // [batch, rows], [batch, columns]: shares of outliers
  void* workspace;                     // threads * batched_verdict_workspace(...) bytes
};

int64_t batched_verdict_workspace(int64_t rows, int64_t columns, int64_t rank);
void batched_verdict_cpu(const BatchedVerdict& args, int threads);

}  // namespace fastpref
