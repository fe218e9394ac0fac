// The residual pass on the CPU. A block of rows meets a panel of columns whose factors, and whose sums of E^T left,
// stay in L1: R is formed and turned into E in registers, which go into the panel's sums at once and into a small tile,
// from which the block's rows then take their product with the panel's factors. Each chunk of rows has sums of its own,
// added up in order at the end.
#include "residual_pass.h"

#include "panels.h"

namespace fastpref::FASTPREF_SIMD {
namespace {

using Vd = V<double>;
using Vl = Lanes<double>::I;
template <class F>
using VectorOf = V<F>;
template <class F>
constexpr int lanes = Lanes<F>::n;

constexpr int64_t sample_rows = 8, sample_columns = 32, sample_shift = 23;
constexpr int bin_shift = 18;

struct ChunkTotals {
  double squares, kept_top, top;
  int64_t observed, kept;
};

// Sizes and places in the workspace; the same on every level.
struct Layout {
  int64_t packed;  // vectors by row and column: the factors, and the weights where there are any
  int64_t slots;   // sums by row and column: the products, and the squares where they are wanted
  int64_t panel, panels, chunk_rows, chunks;
  int64_t packed_columns, column_sums, row_sums, packed_rows, histogram, totals;  // offsets in bytes
  int64_t finite, chunk_bytes, first_chunk, bytes;

  explicit Layout(const ResidualPass& args) {
    const int64_t item = args.dtype == MatrixDType::f64 ? 8 : 4;
    packed = args.width + (args.row_weights || args.column_weights);
    slots = args.width + args.squares;
    panel = panel_columns(packed + slots, item, args.columns);
    panels = (args.columns + panel - 1) / panel;
    chunk_rows = chunk_of_rows(args.rows);
    chunks = (args.rows + chunk_rows - 1) / chunk_rows;

    packed_columns = 0;
    finite = round_up(packed_columns + panels * packed * panel * item, 64);
    first_chunk = round_up(finite + panels * int64_t(sizeof(int64_t)), 64);
    column_sums = 0;  // from here on inside a chunk
    row_sums = column_sums + round_up(panels * slots * panel * item, 64);
    packed_rows = row_sums + group_rows * slots * 64;
    histogram = packed_rows + round_up(group_rows * packed * item, 64);
    totals = histogram + histogram_bins * int64_t(sizeof(int32_t));
    chunk_bytes = round_up(totals + int64_t(sizeof(ChunkTotals)), 64);
    bytes = first_chunk + chunks * chunk_bytes;
  }

  template <class T>
  T* chunk_part(const ResidualPass& args, int64_t chunk, int64_t offset) const {
    return reinterpret_cast<T*>(static_cast<char*>(args.workspace) + first_chunk + chunk * chunk_bytes + offset);
  }
};

template <class V, class T>
inline V load_vector(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class V, class T>
inline void store_whole(T* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

inline Vf magnitude(Vf v) { return (Vf)((Vi)v & 0x7fffffff); }
inline Vd magnitude(Vd v) { return (Vd)((Vl)v & 0x7fffffffffffffff); }

template <class V>
inline double lane_sum(V v) {  // pairwise
  constexpr int n = sizeof(V) / sizeof(v[0]);
  for (int half = n / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) v[i] += v[i + half];
  return v[0];
}

template <class V>
inline double lane_max(V v) {
  double m = v[0];
  for (int i = 1; i < int(sizeof(V) / sizeof(v[0])); i++) m = v[i] > m ? v[i] : m;
  return m;
}

inline Vd divided(Vd x, Vd by) { return x / by; }
inline Vf divided(Vf x, Vf by) {
#if defined(FASTPREF_SIMD_avx512)
  const Vf y = (Vf)_mm512_maskz_rcp14_ps(0xffff, (__m512)by);  // maskz: as in half_to_float
  return x * (y * (2.0f - by * y));
#else
  return x / by;
#endif
}

template <class F>
struct Clip {
  F zeta, inverse;  // of psi
  explicit Clip(double z) : zeta(static_cast<F>(z)) {
    constexpr double largest = sizeof(F) == 4 ? 3.4e38 : 1.7e308;
    inverse = static_cast<F>(1 / z < largest ? 1 / z : largest);
  }
};

// E of observed entries, 0 of missing ones.
template <Psi PSI, class V, class F>
inline V clipped(V r, V size, const Clip<F>& clip) {
  const V zero{};
  if constexpr (PSI == Psi::hard) return size <= clip.zeta ? r : zero;
  if constexpr (PSI == Psi::soft) {
    const V high = zero + clip.zeta;
    const V bounded = size <= high ? r : (r > zero ? high : -high);
    return r == r ? bounded : zero;
  }
  if constexpr (PSI == Psi::cauchy) {
    const V t = r * clip.inverse;
    const V q = t * t + F(1);
    return q < F(sizeof(F) == 4 ? 1e37 : 1e307) ? divided(r, q) : zero;  // beyond, E is below 1e-18 zeta
  }
  return r == r ? r : zero;
}

// A panel of columns, and the chunk's sums over rows of its products.
template <class F>
struct Panel {
  int64_t first, columns, stride;
  const F* factors;  // [packed, stride], 0 beyond the matrix
  F* sums;           // [slots, stride]
};

// A block of rows, and the sums over columns of its products.
template <class F>
struct Block {
  int64_t first, rows;
  const F* factors;   // [packed, block_rows], 0 beyond the matrix
  VectorOf<F>* sums;  // [slots, block_rows], by lane
};

template <class F>
struct Totals {
  double squares = 0;
  int64_t observed = 0, kept = 0;
  VectorOf<F> top{}, kept_top{};
};

template <class F, class V>
void count(const V (&r)[block_rows][2], int32_t* histogram) {
  float sizes[block_rows][step<F>];
  for (int i = 0; i < block_rows; i++)
    for (int half = 0; half < 2; half++)
      for (int lane = 0; lane < lanes<F>; lane++)
        sizes[i][half * lanes<F> + lane] = static_cast<float>(r[i][half][lane]);
  for (int i = 0; i < block_rows; i++)
    for (int j = 0; j < step<F>; j++) {
      uint32_t bits;
      std::memcpy(&bits, &sizes[i][j], 4);
      bits &= 0x7fffffffu;
      if (bits > 0x7f800000u) continue;  // missing
      const uint32_t bin = bits >> bin_shift;
      histogram[bin < histogram_bins ? bin : histogram_bins - 1]++;
    }
}

// `next` is where the block to come begins, for the prefetcher: no hardware one follows rows this short.
template <class D, Psi PSI, bool EXTRA>
void meet(const ResidualPass& args, const D* next, const Block<Factor_t<D>>& block, const Panel<Factor_t<D>>& panel,
          Totals<Factor_t<D>>& totals, int32_t* histogram) {
  using F = Factor_t<D>;
  using V = VectorOf<F>;
  using I = typename Lanes<F>::I;
  constexpr int L = lanes<F>;
  const D* matrix = static_cast<const D*>(args.matrix);
  const Clip<F> clip(args.zeta);
  const F scale = static_cast<F>(args.scale);
  const int64_t rank = args.rank, width = args.width;
  const int64_t end = round_up(panel.columns, step<F>);
  int64_t begin = 0;
  if (args.upper) begin = larger(0, block.first + 1 - panel.first) / step<F> * step<F>;
  if (begin >= end) return;

  alignas(64) F e[block_rows * max_panel];
  const V zero{}, zeta = zero + clip.zeta;
  V squares{}, top = totals.top, kept_top = totals.kept_top;
  I observed{}, kept{};
  for (int64_t j = begin; j < end; j += step<F>) {
    const int64_t column = panel.first + j;
    const D* d = matrix + block.first * args.stride + column;
    int64_t stride = args.stride;
    D part[block_rows * step<F>];
    const bool whole = block.rows == block_rows && j + step<F> <= panel.columns &&
                       (!args.upper || column > block.first + block_rows - 1);
    if (!whole) {
      copy_part(d, args.stride, args.upper, block.first, block.rows, column, panel.columns - j, missing<D>(), part);
      d = part, stride = step<F>;
    }
    V r[block_rows][2];
#pragma GCC unroll 8
    for (int i = 0; i < block_rows; i++) {
      r[i][0] = values(d + i * stride) * scale;
      r[i][1] = values(d + i * stride + L) * scale;
      for (int byte = 0; byte < int(step<F> * sizeof(D)); byte += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(next + i * args.stride + j) + byte);
    }
    subtract_product<F>(r, block.factors, panel.factors + j, panel.stride, rank);
    if (((block.first / sample_rows * sample_shift + column / sample_columns) & (args.sample_stride - 1)) == 0) {
      V sampled[block_rows][2];  // a copy: the address of r itself would keep it out of registers
      for (int i = 0; i < block_rows; i++)
        for (int half = 0; half < 2; half++) sampled[i][half] = r[i][half];
      count<F>(sampled, histogram);
    }
    if constexpr (EXTRA) {
      if (args.squares) {
        V by_column[2] = {};
        for (int i = 0; i < block_rows; i++)
          for (int half = 0; half < 2; half++) {
            const V square = r[i][half] == r[i][half] ? r[i][half] * r[i][half] : zero;
            by_column[half] += square;
            block.sums[width * block_rows + i] += square;
          }
        F* sums = panel.sums + width * panel.stride + j;
        store_whole(sums, load_vector<V>(sums) + by_column[0]);
        store_whole(sums + L, load_vector<V>(sums + L) + by_column[1]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < block_rows; i++) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {
        const V x = r[i][half], size = magnitude(x);
        top = size > top ? size : top;
        observed = x == x ? observed + 1 : observed;
        kept = size <= zeta ? kept + 1 : kept;
        const V candidate = size <= zeta ? size : zero;
        kept_top = candidate > kept_top ? candidate : kept_top;
        V y = clipped<PSI>(x, size, clip);
        if constexpr (EXTRA) {
          if (args.row_weights || args.column_weights)
            y *= load_vector<V>(panel.factors + width * panel.stride + j + half * L) *
                 block.factors[width * block_rows + i];
        }
        squares += y * y;
        store_whole(e + i * panel.stride + j + half * L, y);
        r[i][half] = y;
      }
    }
    add_to_columns<F>(r, block.factors, panel.sums + j, panel.stride, width);
  }
  add_to_rows(panel.factors, e, panel.stride, begin, end, width, block.sums);
  totals.top = top;
  totals.kept_top = kept_top;
  totals.squares += lane_sum(squares);
  for (int lane = 0; lane < L; lane++) {
    totals.observed += observed[lane];
    totals.kept += kept[lane];
  }
}

template <class D, Psi PSI, bool EXTRA>
void chunk(const ResidualPass& args, const Layout& layout, int64_t index) {
  using F = Factor_t<D>;
  using V = VectorOf<F>;
  const int64_t width = args.width, packed = layout.packed, slots = layout.slots;
  const D* matrix = static_cast<const D*>(args.matrix);
  const F* row_factors = static_cast<const F*>(args.row_factors);
  const F* row_weights = static_cast<const F*>(args.row_weights);
  F* row_products = static_cast<F*>(args.row_products);
  const F* packed_columns =
      reinterpret_cast<const F*>(static_cast<const char*>(args.workspace) + layout.packed_columns);
  F* column_sums = layout.chunk_part<F>(args, index, layout.column_sums);
  V* row_sums = layout.chunk_part<V>(args, index, layout.row_sums);
  F* packed_rows = layout.chunk_part<F>(args, index, layout.packed_rows);
  int32_t* histogram = layout.chunk_part<int32_t>(args, index, layout.histogram);
  std::memset(column_sums, 0, layout.panels * slots * layout.panel * sizeof(F));
  std::memset(histogram, 0, histogram_bins * sizeof(int32_t));

  Totals<F> totals;
  F not_finite = 0;
  const int64_t rows_end = smaller((index + 1) * layout.chunk_rows, args.rows);
  for (int64_t group = index * layout.chunk_rows; group < rows_end; group += group_rows) {
    const int64_t group_end = smaller(group + group_rows, rows_end);
    const int64_t blocks = (group_end - group + block_rows - 1) / block_rows;
    for (int64_t i = 0; i < blocks * block_rows; i++) {
      F* out = packed_rows + i / block_rows * packed * block_rows + i % block_rows;
      const int64_t row = group + i;
      for (int64_t k = 0; k < width; k++) {
        const F x = row < group_end ? row_factors[row * width + k] : 0;
        out[k * block_rows] = x;
        not_finite += x - x;
      }
      if (packed > width) out[width * block_rows] = row < group_end ? (row_weights ? row_weights[row] : 1) : 0;
    }
    std::memset(static_cast<void*>(row_sums), 0, blocks * block_rows * slots * sizeof(V));
    for (int64_t p = 0; p < layout.panels; p++) {
      const int64_t first = p * layout.panel;
      const Panel<F> panel{first, smaller(layout.panel, args.columns - first), layout.panel,
                           packed_columns + p * packed * layout.panel, column_sums + p * slots * layout.panel};
      for (int64_t i = 0; i < blocks; i++) {
        const int64_t row = group + i * block_rows;
        const Block<F> block{row, smaller(block_rows, group_end - row), packed_rows + i * packed * block_rows,
                             row_sums + i * slots * block_rows};
        const D* next = matrix + (i + 1 < blocks ? (row + block_rows) * args.stride + first
                                                 : group * args.stride + first + layout.panel);
        meet<D, PSI, EXTRA>(args, next, block, panel, totals, histogram);
      }
    }
    for (int64_t row = group; row < group_end; row++) {
      const int64_t i = row - group;
      const V* sums = row_sums + i / block_rows * slots * block_rows + i % block_rows;
      for (int64_t k = 0; k < width; k++)
        row_products[row * width + k] = static_cast<F>(lane_sum(sums[k * block_rows]));
      if (args.squares) args.row_squares[row] = lane_sum(sums[width * block_rows]);
    }
  }
  const double top = not_finite == 0 ? lane_max(totals.top) : __builtin_inf();
  *layout.chunk_part<ChunkTotals>(args, index, layout.totals) = {totals.squares, lane_max(totals.kept_top), top,
                                                                 totals.observed, totals.kept};
}

template <class D, Psi PSI>
void chunks_psi(const ResidualPass& args, int64_t begin, int64_t end) {
  const Layout layout(args);
  const bool extra = args.squares || args.row_weights || args.column_weights;
  for (int64_t index = begin; index < end; index++)
    extra ? chunk<D, PSI, true>(args, layout, index) : chunk<D, PSI, false>(args, layout, index);
}

template <class D>
void chunks_dtype(const ResidualPass& args, int64_t begin, int64_t end) {
  switch (args.psi) {
    case Psi::hard:
      return chunks_psi<D, Psi::hard>(args, begin, end);
    case Psi::soft:
      return chunks_psi<D, Psi::soft>(args, begin, end);
    case Psi::cauchy:
      return chunks_psi<D, Psi::cauchy>(args, begin, end);
    case Psi::identity:
      return chunks_psi<D, Psi::identity>(args, begin, end);
  }
}

template <class F>
void pack(const ResidualPass& args, int64_t begin, int64_t end) {
  const Layout layout(args);
  const F* factors = static_cast<const F*>(args.column_factors);
  const F* weights = static_cast<const F*>(args.column_weights);
  char* workspace = static_cast<char*>(args.workspace);
  for (int64_t p = begin; p < end; p++) {
    F* out = reinterpret_cast<F*>(workspace + layout.packed_columns) + p * layout.packed * layout.panel;
    F not_finite = 0;
    for (int64_t j = 0; j < layout.panel; j++) {
      const int64_t column = p * layout.panel + j;
      const bool inside = column < args.columns;
      for (int64_t k = 0; k < args.width; k++) {
        const F x = inside ? factors[column * args.width + k] : 0;
        out[k * layout.panel + j] = x;
        not_finite += x - x;
      }
      if (layout.packed > args.width) out[args.width * layout.panel + j] = inside ? (weights ? weights[column] : 1) : 0;
    }
    reinterpret_cast<int64_t*>(workspace + layout.finite)[p] = not_finite == 0;
  }
}

template <class F>
void reduce(const ResidualPass& args, int64_t begin, int64_t end) {
  using V = VectorOf<F>;
  const Layout layout(args);
  F* products = static_cast<F*>(args.column_products);
  for (int64_t p = begin; p < end; p++) {
    const int64_t first = p * layout.panel, columns = smaller(layout.panel, args.columns - first);
    for (int64_t k = 0; k < layout.slots; k++)
      for (int64_t j = 0; j < columns; j += lanes<F>) {
        V total{};
        for (int64_t c = 0; c < layout.chunks; c++)
          total += load_vector<V>(layout.chunk_part<F>(args, c, layout.column_sums) +
                                  (p * layout.slots + k) * layout.panel + j);
        for (int64_t lane = 0; lane < smaller(lanes<F>, columns - j); lane++) {
          const int64_t column = first + j + lane;
          if (k < args.width)
            products[column * args.width + k] = total[lane];
          else
            args.column_squares[column] = total[lane];
        }
      }
  }
}

}  // namespace

void residual_pass_chunks(const ResidualPass& args, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case MatrixDType::f32:
      return chunks_dtype<float>(args, begin, end);
    case MatrixDType::bf16:
      return chunks_dtype<bf16>(args, begin, end);
    case MatrixDType::f16:
      return chunks_dtype<f16>(args, begin, end);
    case MatrixDType::f64:
      return chunks_dtype<double>(args, begin, end);
    case MatrixDType::i8:
      return chunks_dtype<int8_t>(args, begin, end);
  }
}

void residual_pass_pack(const ResidualPass& args, int64_t begin, int64_t end) {
  args.dtype == MatrixDType::f64 ? pack<double>(args, begin, end) : pack<float>(args, begin, end);
}

void residual_pass_reduce(const ResidualPass& args, int64_t begin, int64_t end) {
  args.dtype == MatrixDType::f64 ? reduce<double>(args, begin, end) : reduce<float>(args, begin, end);
}

}  // namespace fastpref::FASTPREF_SIMD

#ifdef FASTPREF_SIMD_baseline  // the entry points, once

#include "dispatch.h"

namespace fastpref {

FASTPREF_DISPATCH(residual_pass_pack, ResidualPass)
FASTPREF_DISPATCH(residual_pass_chunks, ResidualPass)
FASTPREF_DISPATCH(residual_pass_reduce, ResidualPass)

namespace {

void totals(const ResidualPass& args, const baseline::Layout& layout) {
  double squares = 0, kept_top = 0, top = 0;
  int64_t observed = 0, kept = 0;
  int64_t* histogram = args.counts + 2;
  std::memset(histogram, 0, histogram_bins * sizeof(int64_t));
  for (int64_t c = 0; c < layout.chunks; c++) {
    const auto& chunk = *layout.chunk_part<baseline::ChunkTotals>(args, c, layout.totals);
    squares += chunk.squares;
    kept_top = chunk.kept_top > kept_top ? chunk.kept_top : kept_top;
    top = chunk.top > top ? chunk.top : top;
    observed += chunk.observed;
    kept += chunk.kept;
    const int32_t* counted = layout.chunk_part<int32_t>(args, c, layout.histogram);
    for (int bin = 0; bin < histogram_bins; bin++) histogram[bin] += counted[bin];
  }
  const auto* finite = reinterpret_cast<const int64_t*>(static_cast<const char*>(args.workspace) + layout.finite);
  for (int64_t p = 0; p < layout.panels; p++)
    if (!finite[p]) top = __builtin_inf();
  args.sums[0] = squares, args.sums[1] = kept_top, args.sums[2] = top;
  args.counts[0] = observed, args.counts[1] = kept;
}

}  // namespace

size_t residual_pass_workspace(const ResidualPass& args) { return baseline::Layout(args).bytes; }

void residual_pass_cpu(const ResidualPass& args, int threads) {
  const SimdLevel level = simd_level();
  const baseline::Layout layout(args);
  // little work stays on this thread: to wake another and wait for it takes longer
  const auto panels_of = [&](int64_t elements, int64_t by_panel) { return elements / (by_panel + 1) + 1; };
  parallel_for(layout.panels, panels_of(1 << 16, layout.packed * layout.panel), threads,
               [&](int64_t begin, int64_t end) { residual_pass_pack(level, args, begin, end); });
  const int64_t chunk_work = layout.chunk_rows * args.columns * (args.width + 8);
  parallel_for(layout.chunks, (1 << 18) / (chunk_work + 1) + 1, threads,
               [&](int64_t begin, int64_t end) { residual_pass_chunks(level, args, begin, end); });
  parallel_for(layout.panels, panels_of(1 << 19, layout.chunks * layout.slots * layout.panel), threads,
               [&](int64_t begin, int64_t end) { residual_pass_reduce(level, args, begin, end); });
  totals(args, layout);
}

}  // namespace fastpref

#endif
