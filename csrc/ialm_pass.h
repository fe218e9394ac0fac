// The reads of a matrix D in the convex program of robust PCA (inexact augmented Lagrangian), whose state of D's size
// is T = mu W: Y = clip(T, +-lam) and S = (T - Y) / mu, mu being the penalty at which T was formed. Where D is missing
// (NaN; int8: -128) T holds L, in whose place the next step takes it.
#pragma once
#include <cstddef>
#include <cstdint>

#include "dtype.h"

namespace fastpref {

struct IalmPass {      // F: double for a double matrix, else float
  const void* matrix;  // [rows, columns], row i at i * stride (elements)
  MatrixDType dtype;
  int64_t rows, columns, stride;
  void* state;           // F [rows rounded up to ialm_rows, state_stride], finite
  int64_t state_stride;  // columns rounded up to ialm_columns, or more
  bool masked;           // entries may be missing; if not, and D is not what is multiplied, matrix may be null
  double scale, lam;
  const void* row_factors;     // F [rows, rank]: L = row_factors column_factors[:, :rank]^T; for columns() the factor
  const void* column_factors;  // F [columns, width]
  int64_t rank, width;
  double mu, mu_before;  // of an update: the penalty of W, and the one at which T was formed
  // What is multiplied: from_data D + from_sparse (T - Y) + from_dual Y, where D is missing from_missing T.
  double from_data, from_sparse, from_dual, from_missing;
  void* products;  // F [rows, width]; of columns() F [columns, width]
  double* sums;  // [4] of observed entries. Update: (Y - Y before)^2; (T - Y) / mu less the same before, squared, where
                 // missing (L - L before)^2; Y^2. Else: |T - Y|; how many are not 0; Y D; the largest |Y|
  void* workspace;  // ialm_workspace bytes
};

constexpr int64_t ialm_rows = 8, ialm_columns = 32;

size_t ialm_workspace(const IalmPass& args, bool by_columns);

// Results do not depend on `threads`: sums are taken in chunks of rows that depend on the shape alone.
void ialm_update_cpu(const IalmPass& args, int threads);  // T <- mu (D - L + Y / mu), then rows() of the new T
void ialm_rows_cpu(const IalmPass& args, int threads);
void ialm_columns_cpu(const IalmPass& args, int threads);

}  // namespace fastpref
