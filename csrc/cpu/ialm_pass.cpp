// A block of rows meets a panel of columns whose factors stay in L1, as in residual_pass.cpp. What is multiplied is
// formed in registers from D and T; with the rows' factors it goes into the panel's sums at once, for products with the
// panel's factors into a small tile first.
#include "ialm_pass.h"

#include "panels.h"

namespace fastpref::FASTPREF_SIMD {
namespace {

enum class Kind { update, rows, measured_rows, columns };

struct ChunkTotals {
  double sums[4];
};

struct Layout : PanelLayout {
  int64_t row_rank;                   // columns of the rows' factors
  int64_t factors;                    // offset in bytes in the part of all chunks: of the columns' factors, by rows
  int64_t sums, packed_rows, totals;  // and in a chunk's own

  Layout(const IalmPass& args, bool by_columns)
      : PanelLayout(args.dtype, args.rows, args.columns, args.width),
        row_rank(by_columns ? args.width : args.rank),
        factors(shared.take(by_columns ? 0 : panels * args.width * panel * item)),
        sums(own.take(by_columns ? panels * args.width * panel * item : group_rows * args.width * alignment)),
        packed_rows(own.take(group_rows * row_rank * item)),
        totals(own.take(sizeof(ChunkTotals))) {}
};

inline Vf clipped(Vf t, Vf bound) {
#if defined(FASTPREF_SIMD_avx512)
  return (Vf)_mm512_maskz_range_ps(0xffff, (__m512)t, (__m512)bound, 2);  // the smaller magnitude with t's sign
#elif defined(FASTPREF_SIMD_avx2)
  return (Vf)_mm256_max_ps(_mm256_min_ps((__m256)t, (__m256)bound), (__m256)-bound);
#else
  return t > bound ? bound : (t < -bound ? -bound : t);
#endif
}
inline V<double> clipped(V<double> t, V<double> bound) {
#if defined(FASTPREF_SIMD_avx512)
  return (V<double>)_mm512_maskz_range_pd(0xff, (__m512d)t, (__m512d)bound, 2);
#elif defined(FASTPREF_SIMD_avx2)
  return (V<double>)_mm256_max_pd(_mm256_min_pd((__m256d)t, (__m256d)bound), (__m256d)-bound);
#else
  return t > bound ? bound : (t < -bound ? -bound : t);
#endif
}

template <class F>
struct Constants {
  F scale, lam, mu, inverse_mu, inverse_before, data, sparse, dual, missing;
  explicit Constants(const IalmPass& args)
      : scale(F(args.scale)),
        lam(F(args.lam)),
        mu(F(args.mu)),
        inverse_mu(F(1 / args.mu)),
        inverse_before(F(1 / args.mu_before)),
        data(F(args.from_data)),
        sparse(F(args.from_sparse)),
        dual(F(args.from_dual)),
        missing(F(args.from_missing)) {}
};

// The block to come begins so many rows and columns ahead, and is fetched into L2: no hardware prefetcher follows rows
// this short, and L1 is full.
template <class D, Kind KIND, bool MASKED>
void meet(const IalmPass& args, int64_t rows_ahead, int64_t columns_ahead, const Block<Factor_t<D>>& block,
          const Panel<Factor_t<D>>& panel, double* totals) {
  using F = Factor_t<D>;
  using I = typename Lanes<F>::I;
  constexpr int L = Lanes<F>::n;
  const Constants<F> c(args);
  const V<F> zero{}, bound = zero + c.lam;
  const bool reads_data = MASKED || args.matrix;
  const D* matrix = static_cast<const D*>(args.matrix) + (reads_data ? block.first * args.stride + panel.first : 0);
  F* state = static_cast<F*>(args.state) + block.first * args.state_stride + panel.first;
  const int64_t end = round_up(panel.columns, step<F>);
  const int64_t d_ahead = rows_ahead * args.stride + columns_ahead;
  const int64_t t_ahead = rows_ahead * args.state_stride + columns_ahead;
  alignas(64) F e[KIND == Kind::columns ? 1 : block_rows * max_panel];
  V<F> sums[4] = {};
  for (int64_t j = 0; j < end; j += step<F>) {
    const D* d = matrix + j;
    F* t = state + j;
    int64_t stride = args.stride;
    D part[block_rows * step<F>];
    if (reads_data && (block.rows < block_rows || j + step<F> > panel.columns)) {
      copy_part(d, args.stride, false, block.first, block.rows, panel.first + j, panel.columns - j,
                MASKED ? missing<D>() : D{}, part);
      d = part, stride = step<F>;
    }
    Tile<F> tile{};
    if constexpr (KIND == Kind::update)
      subtract_product<F>(tile, block.factors, panel.factors + j, panel.stride, args.rank);
#pragma GCC unroll 8
    for (int i = 0; i < block_rows; i++) {
      if (reads_data)
        for (int byte = 0; byte < int(step<F> * sizeof(D)); byte += 64)
          __builtin_prefetch(reinterpret_cast<const char*>(matrix + d_ahead + i * args.stride + j) + byte, 0, 2);
      for (int byte = 0; byte < int(step<F> * sizeof(F)); byte += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(t + t_ahead + i * args.state_stride) + byte, 0, 2);
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {
        F* at = t + i * args.state_stride + half * L;
        const V<F> data = reads_data ? values(d + i * stride + half * L) * c.scale : zero;
        const V<F> old = load_at(at), old_dual = clipped(old, bound);
        const auto where_there = [&](V<F> x, V<F> otherwise) { return MASKED ? (data == data ? x : otherwise) : x; };
        V<F> value;
        if constexpr (KIND == Kind::update) {
          const V<F> formed = (data + tile[i][half] + old_dual * c.inverse_mu) * c.mu, dual = clipped(formed, bound);
          const V<F> sparse = formed - dual, low = -tile[i][half];
          const V<F> turn = where_there(dual - old_dual, zero), kept = where_there(dual, zero);
          const V<F> move = where_there(sparse * c.inverse_mu - (old - old_dual) * c.inverse_before, low - old);
          sums[0] += turn * turn;
          sums[1] += move * move;
          sums[2] += kept * kept;
          store_at(at, where_there(formed, low));
          value = where_there(data * c.data + (sparse * c.sparse + dual * c.dual), low * c.missing);
        } else {
          const V<F> sparse = old - old_dual;
          value = where_there(data * c.data + (sparse * c.sparse + old_dual * c.dual), old * c.missing);
          if constexpr (KIND == Kind::measured_rows) {
            const I there = data == data;
            const V<F> size = abs_of<F>(old_dual);
            sums[0] += there ? abs_of<F>(sparse) : zero;
            sums[1] = (sparse != zero) & there ? sums[1] + F(1) : sums[1];
            sums[2] += there ? old_dual * data : zero;
            sums[3] = there & (size > sums[3]) ? size : sums[3];
          }
        }
        if constexpr (KIND == Kind::columns)
          tile[i][half] = value;
        else
          store_at(e + i * panel.stride + j + half * L, value);
      }
    }
    if constexpr (KIND == Kind::columns)
      add_to_columns<F>(tile, block.factors, panel.sums + j, panel.stride, args.width);
  }
  if constexpr (KIND != Kind::columns) add_to_rows(panel.factors, e, panel.stride, 0, end, args.width, block.sums);
  if constexpr (KIND == Kind::update || KIND == Kind::measured_rows)
    for (int i = 0; i < 3; i++) totals[i] += sum_of<F>(sums[i]);
  if constexpr (KIND == Kind::measured_rows) totals[3] = larger(totals[3], max_of<F>(sums[3]));
}

template <class D, Kind KIND, bool MASKED>
void chunk(const IalmPass& args, const Layout& layout, int64_t index) {
  using F = Factor_t<D>;
  constexpr bool by_columns = KIND == Kind::columns;
  const int64_t width = args.width, row_rank = layout.row_rank;
  const F* row_factors = static_cast<const F*>(args.row_factors);
  F* products = static_cast<F*>(args.products);
  const F* factors = layout.shared_part<F>(args.workspace, layout.factors);  // of all panels
  F* column_sums = layout.chunk_part<F>(args.workspace, index, layout.sums);
  V<F>* row_sums = layout.chunk_part<V<F>>(args.workspace, index, layout.sums);
  F* packed_rows = layout.chunk_part<F>(args.workspace, index, layout.packed_rows);
  ChunkTotals* totals = layout.chunk_part<ChunkTotals>(args.workspace, index, layout.totals);
  *totals = {};
  if (by_columns) std::memset(column_sums, 0, layout.panels * width * layout.panel * sizeof(F));
  const int64_t rows_end = smaller((index + 1) * layout.chunk_rows, args.rows);
  for (int64_t group = index * layout.chunk_rows; group < rows_end; group += group_rows) {
    const int64_t group_end = smaller(group + group_rows, rows_end);
    const int64_t blocks = divide_up(group_end - group, block_rows);
    for (int64_t i = 0; i < blocks * block_rows; i++) {
      F* out = packed_rows + i / block_rows * row_rank * block_rows + i % block_rows;
      for (int64_t k = 0; k < row_rank; k++)
        out[k * block_rows] = group + i < group_end ? row_factors[(group + i) * row_rank + k] : 0;
    }
    if (!by_columns) std::memset(static_cast<void*>(row_sums), 0, blocks * block_rows * width * sizeof(V<F>));
    for (int64_t p = 0; p < layout.panels; p++) {
      const int64_t first = p * layout.panel, at = p * width * layout.panel;
      const Panel<F> panel{first, smaller(layout.panel, args.columns - first), layout.panel, factors + at,
                           column_sums + at};
      for (int64_t i = 0; i < blocks; i++) {
        const int64_t row = group + i * block_rows;
        const Block<F> block{row, smaller(block_rows, group_end - row), packed_rows + i * row_rank * block_rows,
                             row_sums + i * width * block_rows};
        const bool last = i + 1 == blocks;
        meet<D, KIND, MASKED>(args, last ? -i * block_rows : block_rows, last ? layout.panel : 0, block, panel,
                              totals->sums);
      }
    }
    if (!by_columns)
      for (int64_t row = group; row < group_end; row++) {
        const int64_t i = row - group;
        const V<F>* sums = row_sums + i / block_rows * width * block_rows + i % block_rows;
        for (int64_t k = 0; k < width; k++) products[row * width + k] = sum_of<F>(sums[k * block_rows]);
      }
  }
}

template <class D, Kind KIND>
void chunks_dtype(const IalmPass& args, int64_t begin, int64_t end) {
  const Layout layout(args, KIND == Kind::columns);
  for (int64_t index = begin; index < end; index++) {
    if (KIND == Kind::measured_rows || args.masked)
      chunk<D, KIND, true>(args, layout, index);
    else if constexpr (KIND != Kind::measured_rows)
      chunk<D, KIND, false>(args, layout, index);
  }
}

template <Kind KIND>
void chunks(const IalmPass& args, int64_t begin, int64_t end) {
  with_entries(args.dtype, [&](auto entry) { chunks_dtype<decltype(entry), KIND>(args, begin, end); });
}

template <class F>
void pack(const IalmPass& args, int64_t begin, int64_t end) {
  const Layout layout(args, false);
  const F* factors = static_cast<const F*>(args.column_factors);
  for (int64_t p = begin; p < end; p++) {
    F* out = layout.shared_part<F>(args.workspace, layout.factors) + p * args.width * layout.panel;
    for (int64_t j = 0; j < layout.panel; j++) {
      const int64_t column = p * layout.panel + j;
      for (int64_t k = 0; k < args.width; k++)
        out[k * layout.panel + j] = column < args.columns ? factors[column * args.width + k] : 0;
    }
  }
}

template <class F>
void reduce(const IalmPass& args, int64_t begin, int64_t end) {
  const Layout layout(args, true);
  F* products = static_cast<F*>(args.products);
  for (int64_t p = begin; p < end; p++) {
    const int64_t first = p * layout.panel, columns = smaller(layout.panel, args.columns - first);
    for (int64_t k = 0; k < args.width; k++)
      for (int64_t j = 0; j < columns; j += Lanes<F>::n) {
        V<F> total{};
        for (int64_t c = 0; c < layout.chunks; c++)
          total +=
              load_at(layout.chunk_part<F>(args.workspace, c, layout.sums) + (p * args.width + k) * layout.panel + j);
        for (int64_t lane = 0; lane < smaller(Lanes<F>::n, columns - j); lane++)
          products[(first + j + lane) * args.width + k] = total[lane];
      }
  }
}

}  // namespace

void ialm_update_chunks(const IalmPass& args, int64_t begin, int64_t end) { chunks<Kind::update>(args, begin, end); }

void ialm_rows_chunks(const IalmPass& args, int64_t begin, int64_t end) {
  args.sums ? chunks<Kind::measured_rows>(args, begin, end) : chunks<Kind::rows>(args, begin, end);
}

void ialm_columns_chunks(const IalmPass& args, int64_t begin, int64_t end) { chunks<Kind::columns>(args, begin, end); }

void ialm_pack(const IalmPass& args, int64_t begin, int64_t end) {
  args.dtype == MatrixDType::f64 ? pack<double>(args, begin, end) : pack<float>(args, begin, end);
}

void ialm_reduce(const IalmPass& args, int64_t begin, int64_t end) {
  args.dtype == MatrixDType::f64 ? reduce<double>(args, begin, end) : reduce<float>(args, begin, end);
}

}  // namespace fastpref::FASTPREF_SIMD

#ifdef FASTPREF_SIMD_baseline  // the entry points, once

#include "dispatch.h"

namespace fastpref {

FASTPREF_DISPATCH(ialm_pack, IalmPass)
FASTPREF_DISPATCH(ialm_update_chunks, IalmPass)
FASTPREF_DISPATCH(ialm_rows_chunks, IalmPass)
FASTPREF_DISPATCH(ialm_columns_chunks, IalmPass)
FASTPREF_DISPATCH(ialm_reduce, IalmPass)

namespace {

template <auto KERNEL>
void by_rows(const IalmPass& args, int threads) {
  const baseline::Layout layout(args, false);
  for_ranges<ialm_pack>(args, layout.panels, baseline::panels_per_task(1 << 16, args.width * layout.panel), threads);
  for_ranges<KERNEL>(args, layout.chunks, 1, threads);
  if (!args.sums) return;
  for (int i = 0; i < 4; i++) args.sums[i] = 0;
  for (int64_t c = 0; c < layout.chunks; c++) {
    const auto& totals = *layout.chunk_part<baseline::ChunkTotals>(args.workspace, c, layout.totals);
    for (int i = 0; i < 3; i++) args.sums[i] += totals.sums[i];
    args.sums[3] = larger(totals.sums[3], args.sums[3]);
  }
}

}  // namespace

size_t ialm_workspace(const IalmPass& args, bool by_columns) { return baseline::Layout(args, by_columns).bytes(); }

void ialm_update_cpu(const IalmPass& args, int threads) { by_rows<ialm_update_chunks>(args, threads); }

void ialm_rows_cpu(const IalmPass& args, int threads) { by_rows<ialm_rows_chunks>(args, threads); }

void ialm_columns_cpu(const IalmPass& args, int threads) {
  const baseline::Layout layout(args, true);
  for_ranges<ialm_columns_chunks>(args, layout.chunks, 1, threads);
  for_ranges<ialm_reduce>(args, layout.panels,
                          baseline::panels_per_task(1 << 19, layout.chunks * args.width * layout.panel), threads);
}

}  // namespace fastpref

#endif
