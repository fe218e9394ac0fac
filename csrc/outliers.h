// Where a matrix D is far from a product of thin factors: |R| > threshold, R = scale D - left right^T. First counted,
// which sizes the list, then listed. NaN (int8: -128) is missing, and no outlier.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace fastpref {

struct Outliers {      // F: double for a double matrix, else float
  const void* matrix;  // [rows, columns], row i at i * stride (elements)
  MatrixDType dtype;
  int64_t rows, columns, stride;
  const void* left;   // F [rows, rank]
  const void* right;  // F [rank, padded], 0 beyond the columns
  int64_t rank, padded;
  double scale, threshold;
  // counting
  int64_t *far, *observed;  // [rows]
  void* by_column;          // [threads, 2, padded] int32 (double: int64), zero: far and observed, to be summed
  double* rest;             // [rows]: sum of R^2 of the other observed entries
  // listing
  const int64_t* first;             // [rows + 1]: where a row's outliers begin, and the last one's end
  int64_t *out_rows, *out_columns;  // by row, then by column
  void* values;                     // F: R
};

constexpr int outliers_padding = 32;  // padded is a multiple of this

void outliers_count_cpu(const Outliers& args, int threads);
void outliers_list_cpu(const Outliers& args, int threads);

}  // namespace fastpref
