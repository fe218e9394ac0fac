// What the passes over one large matrix share. A block of rows meets a panel of columns two vectors at a time: a tile
// of the matrix is in registers, and the thin factors it meets are packed, vector by vector, one after the other.
#pragma once
#include "arith.h"
#include "entries.h"

namespace fastpref::FASTPREF_SIMD {
namespace {

// 2 block_rows vectors of a tile and those they meet fill the registers: 32 with AVX-512 (and NEON), else 16.
#if defined(FASTPREF_SIMD_avx512) || defined(__aarch64__)
constexpr int block_rows = 8, dot_columns = 3;
#else
constexpr int block_rows = 4, dot_columns = 2;
#endif
template <class F>
constexpr int step = 2 * Lanes<F>::n;  // columns of a tile

constexpr int64_t max_panel = 512;
constexpr int64_t group_rows = 48;  // rows that meet a panel while it is in L1
constexpr int64_t max_step = 32;    // of all levels and types

template <class F>
using Tile = V<F>[block_rows][2];

// Columns of a panel such that `vectors` of its factors and sums stay in a third of L1.
inline int64_t panel_columns(int64_t vectors, int64_t item, int64_t columns) {
  const int64_t fits = 16384 / (larger(vectors, 1) * item) / max_step * max_step;
  return smaller(larger(64, smaller(max_panel, fits)), round_up(larger(columns, 1), max_step));
}

// Rows with sums of their own over them: few enough such chunks that these stay small beside the matrix, and enough of
// them for the threads.
inline int64_t chunk_of_rows(int64_t rows) {
  return round_up(larger(larger(32, smaller(96, rows / 16)), rows / 24), 8);
}

// Panels and chunks of a matrix, and where they have their parts of the workspace: what all chunks share comes first,
// then what each chunk has of its own. The same on every level.
struct PanelLayout {
  int64_t item;  // bytes of a factor's entry
  int64_t panel, panels, chunk_rows, chunks;
  Parts shared, own;  // of all chunks, of each

  // `vectors` of the panel's factors and sums are to stay in L1
  PanelLayout(MatrixDType dtype, int64_t rows, int64_t columns, int64_t vectors)
      : item(dtype == MatrixDType::f64 ? 8 : 4),
        panel(panel_columns(vectors, item, columns)),
        panels(divide_up(columns, panel)),
        chunk_rows(chunk_of_rows(rows)),
        chunks(divide_up(rows, chunk_rows)) {}

  int64_t bytes() const { return padded(shared.bytes + chunks * own.bytes); }
  template <class T>
  T* shared_part(void* workspace, int64_t offset) const {
    return reinterpret_cast<T*>(aligned(workspace) + offset);
  }
  template <class T>
  T* chunk_part(void* workspace, int64_t chunk, int64_t offset) const {
    return reinterpret_cast<T*>(aligned(workspace) + shared.bytes + chunk * own.bytes + offset);
  }
};

// A panel of columns, and the chunk's sums over rows of its products.
template <class F>
struct Panel {
  int64_t first, columns, stride;
  const F* factors;  // [vectors, stride], 0 beyond the matrix
  F* sums;           // [vectors, stride]
};

// A block of rows, and the sums over columns of its products.
template <class F>
struct Block {
  int64_t first, rows;
  const F* factors;  // [vectors, block_rows], 0 beyond the matrix
  V<F>* sums;        // [vectors, block_rows], by lane
};

// Panels per task such that little work stays on this thread: to wake another and wait for it takes longer.
inline int64_t panels_per_task(int64_t elements, int64_t elements_of_panel) {
  return elements / (elements_of_panel + 1) + 1;
}

// A tile in part outside the matrix, or (upper) on or below its diagonal: `fill` there.
template <class D>
void copy_part(const D* d, int64_t stride, bool upper, int64_t row, int64_t rows, int64_t column, int64_t columns,
               D fill, D* out) {
  constexpr int width = step<Factor_t<D>>;
  for (int64_t i = 0; i < block_rows; i++)
    for (int64_t j = 0; j < width; j++) {
      const bool inside = i < rows && j < columns && (!upper || column + j > row + i);
      out[i * width + j] = inside ? d[i * stride + j] : fill;
    }
}

// tile[i] -= sum_k a[k][i] b[k]
template <class F>
inline void subtract_product(Tile<F>& tile, const F* a, const F* b, int64_t stride, int64_t rank) {
  for (int64_t k = 0; k < rank; k++, b += stride, a += block_rows) {
    const V<F> b0 = load_at(b), b1 = load_at(b + Lanes<F>::n);
#pragma GCC unroll 8
    for (int i = 0; i < block_rows; i++) {
      tile[i][0] -= a[i] * b0;
      tile[i][1] -= a[i] * b1;
    }
  }
}

// sums[k] += sum_i a[k][i] tile[i]
template <class F>
inline void add_to_columns(const Tile<F>& tile, const F* a, F* sums, int64_t stride, int64_t width) {
  constexpr int L = Lanes<F>::n;
  for (int64_t k = 0; k < width; k++, sums += stride, a += block_rows) {
    V<F> s0 = load_at(sums), s1 = load_at(sums + L);
#pragma GCC unroll 8
    for (int i = 0; i < block_rows; i++) {
      s0 += a[i] * tile[i][0];
      s1 += a[i] * tile[i][1];
    }
    store_at(sums, s0);
    store_at(sums + L, s1);
  }
}

// sums[k][i] += sum_j factors[k][j] e[i][j]
template <int K, class F>
inline void dots(const F* factors, const F* e, int64_t stride, int64_t begin, int64_t end, V<F>* sums) {
  V<F> total[K][block_rows] = {};
  for (int64_t j = begin; j < end; j += Lanes<F>::n) {
    V<F> b[K];
    for (int k = 0; k < K; k++) b[k] = load_at(factors + k * stride + j);
#pragma GCC unroll 8
    for (int i = 0; i < block_rows; i++) {
      V<F> x = load_at(e + i * stride + j);
#if defined(FASTPREF_SIMD_avx512)
      asm("" : "+v"(x));  // in a register: GCC would load it again for each k, and loads are what this loop waits for
#endif
      for (int k = 0; k < K; k++) total[k][i] += b[k] * x;
    }
  }
  for (int k = 0; k < K; k++)
    for (int i = 0; i < block_rows; i++) sums[k * block_rows + i] += total[k][i];
}

// The same for all `width` factors of a panel; e is [block_rows, stride].
template <class F>
inline void add_to_rows(const F* factors, const F* e, int64_t stride, int64_t begin, int64_t end, int64_t width,
                        V<F>* sums) {
  int64_t k = 0;
  for (; k + dot_columns <= width; k += dot_columns)
    dots<dot_columns>(factors + k * stride, e, stride, begin, end, sums + k * block_rows);
  if constexpr (dot_columns == 3) {
    if (width - k == 2) dots<2>(factors + k * stride, e, stride, begin, end, sums + k * block_rows), k += 2;
  }
  if (k < width) dots<1>(factors + k * stride, e, stride, begin, end, sums + k * block_rows);
}

}  // namespace
}  // namespace fastpref::FASTPREF_SIMD
