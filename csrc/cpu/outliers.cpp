// A few rows at a time meet the matrix's columns, two vectors of each: R is formed in registers, compared, and counted
// or listed.
#include "outliers.h"

#include "arith.h"
#include "dispatch.h"
#include "entries.h"

namespace fastpref {

FASTPREF_DISPATCH(outliers_count, Outliers)  // (block of rows, slot)
FASTPREF_DISPATCH(outliers_list, Outliers)   // (block of rows, slot)

}  // namespace fastpref

namespace fastpref::FASTPREF_SIMD {
namespace {

constexpr int64_t block_rows = 16;  // of one task
constexpr int together = 4;

// visit(i, j, R) of ROWS rows from `first`, by vectors; R is NaN where missing and beyond the matrix.
template <class D, int ROWS, class Visit>
inline void residuals(const Outliers& args, int64_t first, const Visit& visit) {
  using F = Factor_t<D>;
  constexpr int n = Lanes<F>::n, step = 2 * n;
  const D* matrix = static_cast<const D*>(args.matrix) + first * args.stride;
  const F* left = static_cast<const F*>(args.left) + first * args.rank;
  const F* right = static_cast<const F*>(args.right);
  const F scale = static_cast<F>(args.scale);
  for (int64_t j = 0; j < args.columns; j += step) {
    const D* d = matrix + j;
    int64_t stride = args.stride;
    D part[ROWS * step];
    if (j + step > args.columns) {
      for (int i = 0; i < ROWS; i++)
        for (int64_t k = 0; k < step; k++)
          if (j + k < args.columns)
            part[i * step + k] = d[i * stride + k];
          else
            set_missing(part[i * step + k]);
      d = part, stride = step;
    }
    V<F> r[ROWS][2];
    for (int i = 0; i < ROWS; i++)
      for (int half = 0; half < 2; half++) r[i][half] = values(d + i * stride + half * n) * scale;
    for (int64_t k = 0; k < args.rank; k++) {
      const V<F> b0 = load_at(right + k * args.padded + j), b1 = load_at(right + k * args.padded + j + n);
      for (int i = 0; i < ROWS; i++) {
        r[i][0] -= b0 * left[i * args.rank + k];
        r[i][1] -= b1 * left[i * args.rank + k];
      }
    }
    for (int i = 0; i < ROWS; i++)
      for (int half = 0; half < 2; half++) visit(i, j + half * n, r[i][half]);
  }
}

template <class D, int ROWS>
void count_rows(const Outliers& args, int64_t first, typename Lanes<Factor_t<D>>::I* by_column) {
  using F = Factor_t<D>;
  using I = typename Lanes<F>::I;
  constexpr int n = Lanes<F>::n;
  const V<F> threshold = V<F>{} + static_cast<F>(args.threshold);
  I far[ROWS]{}, observed[ROWS]{};
  double rest[ROWS]{};
  V<F> squares[ROWS]{};
  residuals<D, ROWS>(args, first, [&](int i, int64_t j, V<F> r) {
    const I is_far = abs_of<F>(r) > threshold, there = r == r;  // -1 where true
    far[i] -= is_far;
    observed[i] -= there;
    by_column[j / n] -= is_far;
    by_column[(args.padded + j) / n] -= there;
    const V<F> near = (is_far | ~there) ? V<F>{} : r;
    squares[i] += near * near;
    if (j / n % 256 == 255) rest[i] += sum_of<F>(squares[i]), squares[i] = V<F>{};  // long sums in double
  });
  for (int i = 0; i < ROWS; i++) {
    args.far[first + i] = count_of<F>(far[i]);
    args.observed[first + i] = count_of<F>(observed[i]);
    args.rest[first + i] = rest[i] + sum_of<F>(squares[i]);
  }
}

template <class D>
void count(const Outliers& args, int64_t block, int64_t slot) {
  using I = typename Lanes<Factor_t<D>>::I;
  I* by_column = static_cast<I*>(args.by_column) + slot * 2 * args.padded / Lanes<Factor_t<D>>::n;
  const int64_t end = smaller(args.rows, (block + 1) * block_rows);
  int64_t i = block * block_rows;
  for (; i + together <= end; i += together) count_rows<D, together>(args, i, by_column);
  for (; i < end; i++) count_rows<D, 1>(args, i, by_column);
}

template <class D, int ROWS>
void list_rows(const Outliers& args, int64_t first) {
  using F = Factor_t<D>;
  using I = typename Lanes<F>::I;
  const V<F> threshold = V<F>{} + static_cast<F>(args.threshold);
  int64_t at[ROWS];
  for (int i = 0; i < ROWS; i++) at[i] = args.first[first + i];
  residuals<D, ROWS>(args, first, [&](int i, int64_t j, V<F> r) {
    const I is_far = abs_of<F>(r) > threshold;
    for (int k = 0; k < Lanes<F>::n; k++)
      if (is_far[k] && at[i] < args.first[first + i + 1]) {  // a file may have changed since it was counted
        args.out_rows[at[i]] = first + i;
        args.out_columns[at[i]] = j + k;
        static_cast<F*>(args.values)[at[i]++] = r[k];
      }
  });
}

template <class D>
void list(const Outliers& args, int64_t block) {
  const int64_t end = smaller(args.rows, (block + 1) * block_rows);
  int64_t i = block * block_rows;
  for (; i + together <= end; i += together) list_rows<D, together>(args, i);
  for (; i < end; i++) list_rows<D, 1>(args, i);
}

}  // namespace

void outliers_count(const Outliers& args, int64_t block, int64_t slot) {
  with_entries(args.dtype, [&](auto entry) { count<decltype(entry)>(args, block, slot); });
}

void outliers_list(const Outliers& args, int64_t block, int64_t) {
  with_entries(args.dtype, [&](auto entry) { list<decltype(entry)>(args, block); });
}

}  // namespace fastpref::FASTPREF_SIMD

#if defined(FASTPREF_SIMD_baseline)  // the entry points, once

namespace fastpref {

namespace {
int64_t blocks_of(const Outliers& args) { return divide_up(args.rows, baseline::block_rows); }
}  // namespace

void outliers_count_cpu(const Outliers& args, int threads) {
  const SimdLevel level = simd_level();
  parallel_with_slot(blocks_of(args), threads,
                     [&](int64_t block, int64_t slot) { outliers_count(level, args, block, slot); });
}

void outliers_list_cpu(const Outliers& args, int threads) {
  const SimdLevel level = simd_level();
  parallel_with_slot(blocks_of(args), threads,
                     [&](int64_t block, int64_t slot) { outliers_list(level, args, block, slot); });
}

}  // namespace fastpref

#endif
