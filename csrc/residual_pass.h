// One read of a matrix D against thin factors. With R = scale D - left right^T and E = w_i w_j psi(R), 0 where D is
// missing (NaN; int8: -128), it gives E right, E^T left and sums over R and E; nothing of D's size is written.
//
// The factors come as they enter the products, `width` columns each; R takes the first `rank` of them. In general both
// are r. For a skew-symmetric matrix the caller passes [left | -right] and [right | -left], width 2 r, and `upper`:
// the triangle's products with the second half are what the other triangle adds.
#pragma once
#include <cstddef>
#include <cstdint>

#include "dtype.h"

namespace fastpref {

enum class Psi : int { hard = 0, soft = 1, cauchy = 2, identity = 3 };

constexpr int histogram_bins = 8160;  // of the upper 14 bits of |R| as float

struct ResidualPass {  // F: double for a double matrix, else float
  const void* matrix;  // [rows, columns], row i at i * stride (elements)
  MatrixDType dtype;
  int64_t rows, columns, stride;
  const void* row_factors;     // F [rows, width]
  const void* column_factors;  // F [columns, width]
  int64_t rank, width;
  Psi psi;
  double zeta, scale;
  bool upper;                                // only entries with column > row are read
  const void *row_weights, *column_weights;  // F [rows], F [columns]; nullptr: all 1
  int64_t sample_stride;                     // a power of two: one block of 8 x 32 entries in so many is counted
  void* row_products;                        // F [rows, width]: E column_factors
  void* column_products;                     // F [columns, width]: E^T row_factors
  bool squares;
  double *row_squares, *column_squares;  // [rows], [columns]: sums of R^2, where `squares`
  double* sums;                          // [3]: of E^2; the largest |R| <= zeta; the largest |R|, inf where a
                                         // factor is not finite
  int64_t* counts;                       // [2 + histogram_bins]: observed; |R| <= zeta; histogram of |R|
  void* workspace;                       // residual_pass_workspace bytes
};

// Of a pass with these sizes and dtype, and weights and squares where these have them; reads no memory.
size_t residual_pass_workspace(const ResidualPass& args);

// Sums are taken in chunks of rows that depend on the shape alone, so the result does not depend on `threads`.
void residual_pass_cpu(const ResidualPass& args, int threads);

}  // namespace fastpref
