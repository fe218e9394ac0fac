// The residual pass on the CPU. A block of rows meets a panel of columns whose factors, and whose sums of E^T left,
// stay in L1: R is formed and turned into E in registers, which go into the panel's sums at once and into a small tile,
// from which the block's rows then take their product with the panel's factors. Each chunk of rows has sums of its own,
// added up in order at the end.
#include "residual_pass.h"

#include "panels.h"

namespace fastpref::FASTPREF_SIMD {
namespace {

constexpr int64_t sample_rows = 8, sample_columns = 32, sample_shift = 23;
constexpr int bin_shift = 18;

struct ChunkTotals {
  double squares, kept_top, top;
  int64_t observed, kept;
};

struct Layout : PanelLayout {
  int64_t packed;                  // vectors by row and column: the factors, and the weights where there are any
  int64_t slots;                   // sums by row and column: the products, and the squares where they are wanted
  int64_t packed_columns, finite;  // offsets in bytes in the part of all chunks
  int64_t column_sums, row_sums, packed_rows, histogram, totals;  // and in a chunk's own

  explicit Layout(const ResidualPass& args)
      : Layout(args, args.width + (args.row_weights || args.column_weights), args.width + args.squares) {}

 private:
  Layout(const ResidualPass& args, int64_t packed, int64_t slots)
      : PanelLayout(args.dtype, args.rows, args.columns, packed + slots),
        packed(packed),
        slots(slots),
        packed_columns(shared.take(panels * packed * panel * item)),
        finite(shared.take(panels * int64_t(sizeof(int64_t)))),
        column_sums(own.take(panels * slots * panel * item)),
        row_sums(own.take(group_rows * slots * alignment)),
        packed_rows(own.take(group_rows * packed * item)),
        histogram(own.take(histogram_bins * int64_t(sizeof(int32_t)))),
        totals(own.take(sizeof(ChunkTotals))) {}
};

inline V<double> divided(V<double> x, V<double> by) { return x / by; }
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
template <Psi PSI, class F>
inline V<F> clipped(V<F> r, V<F> size, const Clip<F>& clip) {
  using Vt = V<F>;
  const Vt zero{};
  if constexpr (PSI == Psi::hard) return size <= clip.zeta ? r : zero;
  if constexpr (PSI == Psi::soft) {
    const Vt high = zero + clip.zeta;
    const Vt bounded = size <= high ? r : (r > zero ? high : -high);
    return r == r ? bounded : zero;
  }
  if constexpr (PSI == Psi::cauchy) {
    const Vt t = r * clip.inverse;
    const Vt q = t * t + F(1);
    return q < F(sizeof(F) == 4 ? 1e37 : 1e307) ? divided(r, q) : zero;  // beyond, E is below 1e-18 zeta
  }
  return r == r ? r : zero;
}

template <class F>
struct Running {  // totals of a chunk
  double squares = 0;
  int64_t observed = 0, kept = 0;
  V<F> top{}, kept_top{};
};

template <class F>
void count(const Tile<F>& r, int32_t* histogram) {
  float sizes[block_rows][step<F>];
  for (int i = 0; i < block_rows; i++)
    for (int half = 0; half < 2; half++)
      for (int lane = 0; lane < Lanes<F>::n; lane++)
        sizes[i][half * Lanes<F>::n + lane] = static_cast<float>(r[i][half][lane]);
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
          Running<Factor_t<D>>& totals, int32_t* histogram) {
  using F = Factor_t<D>;
  using Vt = V<F>;
  using I = typename Lanes<F>::I;
  constexpr int L = Lanes<F>::n;
  const D* matrix = static_cast<const D*>(args.matrix);
  const Clip<F> clip(args.zeta);
  const F scale = static_cast<F>(args.scale);
  const int64_t rank = args.rank, width = args.width;
  const int64_t end = round_up(panel.columns, step<F>);
  int64_t begin = 0;
  if (args.upper) begin = larger(0, block.first + 1 - panel.first) / step<F> * step<F>;
  if (begin >= end) return;

  alignas(64) F e[block_rows * max_panel];
  const Vt zero{}, zeta = zero + clip.zeta;
  Vt squares{}, top = totals.top, kept_top = totals.kept_top;
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
    Tile<F> r;
#pragma GCC unroll 8
    for (int i = 0; i < block_rows; i++) {
      r[i][0] = values(d + i * stride) * scale;
      r[i][1] = values(d + i * stride + L) * scale;
      for (int byte = 0; byte < int(step<F> * sizeof(D)); byte += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(next + i * args.stride + j) + byte);
    }
    subtract_product<F>(r, block.factors, panel.factors + j, panel.stride, rank);
    if (((block.first / sample_rows * sample_shift + column / sample_columns) & (args.sample_stride - 1)) == 0) {
      Tile<F> sampled;  // a copy: the address of r itself would keep it out of registers
      for (int i = 0; i < block_rows; i++)
        for (int half = 0; half < 2; half++) sampled[i][half] = r[i][half];
      count<F>(sampled, histogram);
    }
    if constexpr (EXTRA) {
      if (args.squares) {
        Vt by_column[2] = {};
        for (int i = 0; i < block_rows; i++)
          for (int half = 0; half < 2; half++) {
            const Vt square = r[i][half] == r[i][half] ? r[i][half] * r[i][half] : zero;
            by_column[half] += square;
            block.sums[width * block_rows + i] += square;
          }
        F* sums = panel.sums + width * panel.stride + j;
        store_at(sums, load_at(sums) + by_column[0]);
        store_at(sums + L, load_at(sums + L) + by_column[1]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < block_rows; i++) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {
        const Vt x = r[i][half], size = abs_of<F>(x);
        top = size > top ? size : top;
        observed = x == x ? observed + 1 : observed;
        kept = size <= zeta ? kept + 1 : kept;
        const Vt candidate = size <= zeta ? size : zero;
        kept_top = candidate > kept_top ? candidate : kept_top;
        Vt y = clipped<PSI, F>(x, size, clip);
        if constexpr (EXTRA) {
          if (args.row_weights || args.column_weights)
            y *= load_at(panel.factors + width * panel.stride + j + half * L) * block.factors[width * block_rows + i];
        }
        squares += y * y;
        store_at(e + i * panel.stride + j + half * L, y);
        r[i][half] = y;
      }
    }
    add_to_columns<F>(r, block.factors, panel.sums + j, panel.stride, width);
  }
  add_to_rows(panel.factors, e, panel.stride, begin, end, width, block.sums);
  totals.top = top;
  totals.kept_top = kept_top;
  totals.squares += sum_of<F>(squares);
  totals.observed += count_of<F>(observed);
  totals.kept += count_of<F>(kept);
}

template <class D, Psi PSI, bool EXTRA>
void chunk(const ResidualPass& args, const Layout& layout, int64_t index) {
  using F = Factor_t<D>;
  using Vt = V<F>;
  const int64_t width = args.width, packed = layout.packed, slots = layout.slots;
  const D* matrix = static_cast<const D*>(args.matrix);
  const F* row_factors = static_cast<const F*>(args.row_factors);
  const F* row_weights = static_cast<const F*>(args.row_weights);
  F* row_products = static_cast<F*>(args.row_products);
  const F* packed_columns = layout.shared_part<F>(args.workspace, layout.packed_columns);
  F* column_sums = layout.chunk_part<F>(args.workspace, index, layout.column_sums);
  Vt* row_sums = layout.chunk_part<Vt>(args.workspace, index, layout.row_sums);
  F* packed_rows = layout.chunk_part<F>(args.workspace, index, layout.packed_rows);
  int32_t* histogram = layout.chunk_part<int32_t>(args.workspace, index, layout.histogram);
  std::memset(column_sums, 0, layout.panels * slots * layout.panel * sizeof(F));
  std::memset(histogram, 0, histogram_bins * sizeof(int32_t));

  Running<F> totals;
  F not_finite = 0;
  const int64_t rows_end = smaller((index + 1) * layout.chunk_rows, args.rows);
  for (int64_t group = index * layout.chunk_rows; group < rows_end; group += group_rows) {
    const int64_t group_end = smaller(group + group_rows, rows_end);
    const int64_t blocks = divide_up(group_end - group, block_rows);
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
    std::memset(static_cast<void*>(row_sums), 0, blocks * block_rows * slots * sizeof(Vt));
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
      const Vt* sums = row_sums + i / block_rows * slots * block_rows + i % block_rows;
      for (int64_t k = 0; k < width; k++) row_products[row * width + k] = sum_of<F>(sums[k * block_rows]);
      if (args.squares) args.row_squares[row] = sum_of<F>(sums[width * block_rows]);
    }
  }
  const double top = not_finite == 0 ? max_of<F>(totals.top) : __builtin_inf();
  *layout.chunk_part<ChunkTotals>(args.workspace, index, layout.totals) = {totals.squares, max_of<F>(totals.kept_top),
                                                                           top, totals.observed, totals.kept};
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
  int64_t* finite = layout.shared_part<int64_t>(args.workspace, layout.finite);
  for (int64_t p = begin; p < end; p++) {
    F* out = layout.shared_part<F>(args.workspace, layout.packed_columns) + p * layout.packed * layout.panel;
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
    finite[p] = not_finite == 0;
  }
}

template <class F>
void reduce(const ResidualPass& args, int64_t begin, int64_t end) {
  using Vt = V<F>;
  const Layout layout(args);
  F* products = static_cast<F*>(args.column_products);
  for (int64_t p = begin; p < end; p++) {
    const int64_t first = p * layout.panel, columns = smaller(layout.panel, args.columns - first);
    for (int64_t k = 0; k < layout.slots; k++)
      for (int64_t j = 0; j < columns; j += Lanes<F>::n) {
        Vt total{};
        for (int64_t c = 0; c < layout.chunks; c++)
          total += load_at(layout.chunk_part<F>(args.workspace, c, layout.column_sums) +
                           (p * layout.slots + k) * layout.panel + j);
        for (int64_t lane = 0; lane < smaller(Lanes<F>::n, columns - j); lane++) {
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
  with_entries(args.dtype, [&](auto entry) { chunks_dtype<decltype(entry)>(args, begin, end); });
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

void add_chunks(const ResidualPass& args, const baseline::Layout& layout) {
  double squares = 0, kept_top = 0, top = 0;
  int64_t observed = 0, kept = 0;
  int64_t* histogram = args.counts + 2;
  std::memset(histogram, 0, histogram_bins * sizeof(int64_t));
  for (int64_t c = 0; c < layout.chunks; c++) {
    const auto& chunk = *layout.chunk_part<baseline::ChunkTotals>(args.workspace, c, layout.totals);
    squares += chunk.squares;
    kept_top = chunk.kept_top > kept_top ? chunk.kept_top : kept_top;
    top = chunk.top > top ? chunk.top : top;
    observed += chunk.observed;
    kept += chunk.kept;
    const int32_t* counted = layout.chunk_part<int32_t>(args.workspace, c, layout.histogram);
    for (int bin = 0; bin < histogram_bins; bin++) histogram[bin] += counted[bin];
  }
  const int64_t* finite = layout.shared_part<int64_t>(args.workspace, layout.finite);
  for (int64_t p = 0; p < layout.panels; p++)
    if (!finite[p]) top = __builtin_inf();
  args.sums[0] = squares, args.sums[1] = kept_top, args.sums[2] = top;
  args.counts[0] = observed, args.counts[1] = kept;
}

}  // namespace

size_t residual_pass_workspace(const ResidualPass& args) { return baseline::Layout(args).bytes(); }

void residual_pass_cpu(const ResidualPass& args, int threads) {
  const baseline::Layout layout(args);
  for_ranges<residual_pass_pack>(args, layout.panels, baseline::panels_per_task(1 << 16, layout.packed * layout.panel),
                                 threads);
  const int64_t chunk_work = layout.chunk_rows * args.columns * (args.width + 8);
  for_ranges<residual_pass_chunks>(args, layout.chunks, (1 << 18) / (chunk_work + 1) + 1, threads);
  for_ranges<residual_pass_reduce>(
      args, layout.panels, baseline::panels_per_task(1 << 19, layout.chunks * layout.slots * layout.panel), threads);
  add_chunks(args, layout);
}

}  // namespace fastpref

#endif
