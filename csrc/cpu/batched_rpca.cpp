// Fixed-rank robust PCA, one matrix per task. Factors lie by component, [rank, rows] and [rank, columns], padded with
// zeros to whole vectors, and the matrix with missing entries. An iteration is one pass over the matrix: of a few rows
// at a time the residual, its weights, and both products with the factors, the right factor's summed in place, the left
// one's in registers and across lanes for all rows and components together.
#include "batched_rpca.h"

#include "batch.h"
#include "order_statistic.h"

namespace fastpref {

FASTPREF_DISPATCH(batched_rpca_solve, BatchedRpca)  // (matrix, slot)

}  // namespace fastpref

namespace fastpref::FASTPREF_SIMD {
namespace {

// as in fastpref/_lowrank/batched_rpca.py
constexpr double mad = 1.4826, cutoff = 3, finest = 1e-9, clip = 3, ridge = 1e-10, away = 10;
constexpr double complete = 0.9;
struct Schedule {
  double decay, first, step;
};
constexpr Schedule quick{0.75, 8, 0.9}, slow{0.9, 4, 0.7}, low{0.9, 2, 0.7}, still{1, 8, 0.9};
constexpr Schedule again{0.9, 0, 0.7};  // from the fit that was found, with the largest residual as the first cutoff
constexpr Schedule complete_tries[] = {quick, again, slow}, sparse_tries[] = {slow, again, low};
constexpr int64_t blind = 5;

constexpr int64_t widest = 8;  // ranks up to this one have kernels with their factors in registers
constexpr int together = 8;    // rows are padded to a multiple

// Rows at a time: as many sums as registers take beside the rows themselves.
#if defined(FASTPREF_SIMD_avx512) || defined(__aarch64__)
constexpr int rows_at_once(int rank) { return rank <= 2 ? 8 : rank <= 4 ? 4 : 2; }
#else
constexpr int rows_at_once(int rank) { return rank <= 2 ? 4 : rank <= 4 ? 2 : 1; }
#endif

inline Vf inverse(Vf v) {
#if defined(FASTPREF_SIMD_avx512)
  v = (Vf)_mm512_maskz_min_ps(0xffff, (__m512)v,
                              (__m512)splat(1e37f));  // the step below would make NaN of 1 / infinity
  const Vf guess = (Vf)_mm512_maskz_rcp14_ps(0xffff, (__m512)v);
  return guess * (2.0f - v * guess);
#else
  return 1.0f / v;
#endif
}
inline V<double> inverse(V<double> v) { return 1.0 / v; }

template <class T>
struct Solver {
  static constexpr int n = Lanes<T>::n;
  using Vt = V<T>;
  using I = typename Lanes<T>::I;

  const BatchedRpca& args;
  const int64_t rows, columns, rank, height, stride;  // height: of the padded matrix
  const int64_t tall;                                 // of a left component
  T* matrix;                                          // [height, stride], NaN: missing or padding
  T* scratch;                                         // [height, stride]
  T *left, *left_grad;                                // [rank, tall]
  T *right, *right_grad;                              // [rank, stride]
  double *gram, *core, *work;                         // [rank, rank], work twice

  Solver(const BatchedRpca& args, Workspace& workspace, int64_t lanes)
      : args(args),
        rows(args.rows),
        columns(args.columns),
        rank(args.rank),
        height(round_up(rows, together)),
        stride(round_up(columns, lanes)),
        tall(round_up(rows, larger(lanes, together))),
        matrix(workspace.take<T>(height * stride)),
        scratch(workspace.take<T>(height * stride)),
        left(workspace.take<T>(rank * tall)),
        left_grad(workspace.take<T>(rank * tall)),
        right(workspace.take<T>(rank * stride)),
        right_grad(workspace.take<T>(rank * stride)),
        gram(workspace.take<double>(rank * rank)),
        core(workspace.take<double>(rank * rank)),
        work(workspace.take<double>(2 * rank * rank)) {}

  int64_t observed = 0;
  double mean = 0, norm = 0, top = 0, share = 0;
  double unit = 1;  // the power of two by which the matrix is divided, so that its largest entry is about 1

  void read(int64_t b) {
    const T* in = static_cast<const T*>(args.data) + b * rows * columns;
    const T nan = static_cast<T>(__builtin_nan(""));
    double sum = 0, squares = 0;
    observed = 0;
    Vt high{};
    for (int64_t i = 0; i < rows; i++) {
      T* row = matrix + i * stride;
      std::memcpy(row, in + i * columns, columns * sizeof(T));
      for (int64_t j = columns; j < stride; j++) row[j] = nan;
      for (int64_t j = 0; j < stride; j += n) {
        const Vt v = load_at(row + j), a = v == v ? abs_of<T>(v) : Vt{};
        high = a > high ? a : high;
      }
    }
    top = max_of<T>(high);
    unit = power_of_two(top);
    top /= unit;
    const Vt down = Vt{} + static_cast<T>(1 / unit);
    for (int64_t i = 0; i < rows; i++) {
      T* row = matrix + i * stride;
      Vt s{}, s2{}, count{};
      for (int64_t j = 0; j < stride; j += n) {
        const Vt v = load_at(row + j) * down, a = v == v ? abs_of<T>(v) : Vt{};
        store_at(row + j, v);
        s += a;
        s2 += a * a;
        count += v == v ? Vt{} + 1 : Vt{};
      }
      sum += sum_of<T>(s);
      squares += sum_of<T>(s2);
      observed += static_cast<int64_t>(sum_of<T>(count));
    }
    for (int64_t i = rows * stride; i < height * stride; i++) matrix[i] = nan;
    mean = observed ? sum / observed : 0;
    norm = __builtin_sqrt(squares);
    share = double(observed) / double(rows * columns);
  }

  struct Sums {
    double squares = 0;  // of E
    int64_t small = 0;   // residuals up to the bound asked for
  };

  // sums[i * R + k], by lane, of ROWS rows from `first` -> out[k][first + i]
  template <int R, int ROWS>
  static inline void store_row_sums(Vt (&sums)[ROWS][R], T* out, int64_t apart, int64_t first) {
    constexpr int count = ROWS * R;
    for (int begin = 0; begin < count; begin += n) {
      Vt some[n];
      for (int x = 0; x < n; x++) some[x] = begin + x < count ? sums[(begin + x) / R][(begin + x) % R] : Vt{};
      const Vt total = sums_of<T>(some);
      for (int x = 0; x < n && begin + x < count; x++)
        out[(begin + x) % R * apart + first + (begin + x) / R] = total[x];
    }
  }

  // E = R / (1 + (R / zeta)^2), E right and (unless skew) E^T left of ROWS rows.
  template <int R, int ROWS>
  __attribute__((always_inline)) inline void some_rows(int64_t first, Vt inverse_zeta2, Vt limit, Vt& squares,
                                                       I& below) {
    const Vt one = Vt{} + 1;
    Vt own[ROWS][R];
    for (int i = 0; i < ROWS; i++)
      for (int k = 0; k < R; k++) own[i][k] = Vt{};
    for (int64_t j = 0; j < stride; j += n) {
      Vt e[ROWS];
      for (int i = 0; i < ROWS; i++) e[i] = load_at(matrix + (first + i) * stride + j);
      for (int k = 0; k < R; k++) {
        const Vt v = load_at(right + k * stride + j);
        for (int i = 0; i < ROWS; i++) e[i] -= v * left[k * tall + first + i];
      }
      for (int i = 0; i < ROWS; i++) {
        below = abs_of<T>(e[i]) <= limit ? below + 1 : below;  // false of NaN
        const Vt weighted = e[i] * inverse(one + e[i] * e[i] * inverse_zeta2);
        e[i] = e[i] == e[i] ? weighted : Vt{};
        squares += e[i] * e[i];
      }
      for (int k = 0; k < R; k++) {
        const Vt v = load_at(right + k * stride + j);
        for (int i = 0; i < ROWS; i++) own[i][k] += e[i] * v;
        if (args.skew) continue;
        Vt sum = load_at(right_grad + k * stride + j);
        for (int i = 0; i < ROWS; i++) sum += e[i] * left[k * tall + first + i];
        store_at(right_grad + k * stride + j, sum);
      }
    }
    store_row_sums<R, ROWS>(own, left_grad, tall, first);
  }

  template <int R>
  __attribute__((noinline)) Sums pass_of(double zeta, double bound) {
    constexpr int many = rows_at_once(R);
    const Vt inverse_zeta2 = Vt{} + static_cast<T>(1 / (zeta * zeta)), limit = Vt{} + static_cast<T>(bound);
    Vt squares{};
    I below{};
    std::memset(right_grad, 0, rank * stride * sizeof(T));
    for (int64_t i = 0; i < height; i += many) some_rows<R, many>(i, inverse_zeta2, limit, squares, below);
    return sums_of_pass(squares, below);
  }

  // Of more components: E goes through `scratch`.
  __attribute__((noinline)) Sums pass_of_many(double zeta, double bound) {
    const Vt inverse_zeta2 = Vt{} + static_cast<T>(1 / (zeta * zeta)), limit = Vt{} + static_cast<T>(bound);
    const Vt one = Vt{} + 1;
    Vt squares{};
    I below{};
    for (int64_t first = 0; first < height; first += 4)
      for (int64_t j = 0; j < stride; j += n) {
        Vt e[4];
        residuals<4>(first, j, e);
        for (int i = 0; i < 4; i++) {
          below = abs_of<T>(e[i]) <= limit ? below + 1 : below;
          const Vt weighted = e[i] * inverse(one + e[i] * e[i] * inverse_zeta2);
          e[i] = e[i] == e[i] ? weighted : Vt{};
          squares += e[i] * e[i];
          store_at(scratch + (first + i) * stride + j, e[i]);
        }
      }
    times_right(left_grad);
    if (!args.skew) times_left(right_grad);
    return sums_of_pass(squares, below);
  }

  Sums sums_of_pass(Vt squares, I below) {
    Sums sums;
    sums.squares = sum_of<T>(squares);
    sums.small = count_of<T>(below);
    return sums;
  }

  Sums pass(double zeta, double bound) {
    switch (rank) {
      case 1:
        return pass_of<1>(zeta, bound);
      case 2:
        return pass_of<2>(zeta, bound);
      case 3:
        return pass_of<3>(zeta, bound);
      case 4:
        return pass_of<4>(zeta, bound);
      case 5:
        return pass_of<5>(zeta, bound);
      case 6:
        return pass_of<6>(zeta, bound);
      case 7:
        return pass_of<7>(zeta, bound);
      case widest:
        return pass_of<widest>(zeta, bound);
      default:
        return pass_of_many(zeta, bound);
    }
  }

  template <int ROWS>
  inline void residuals(int64_t first, int64_t j, Vt* r) const {
    for (int i = 0; i < ROWS; i++) r[i] = load_at(matrix + (first + i) * stride + j);
    for (int64_t k = 0; k < rank; k++) {
      const Vt v = load_at(right + k * stride + j);
      for (int i = 0; i < ROWS; i++) r[i] -= v * left[k * tall + first + i];
    }
  }

  // out [rank, tall] = scratch right
  void times_right(T* out) const {
    int64_t k = 0;
    for (; k + 4 <= rank; k += 4) times_right_of<4>(out, k);
    for (; k < rank; k++) times_right_of<1>(out, k);
  }
  template <int R>
  void times_right_of(T* out, int64_t k) const {
    for (int64_t first = 0; first < height; first += 4) {
      Vt sums[4][R]{};
      for (int64_t j = 0; j < stride; j += n)
        for (int x = 0; x < R; x++) {
          const Vt v = load_at(right + (k + x) * stride + j);
          for (int i = 0; i < 4; i++) sums[i][x] += load_at(scratch + (first + i) * stride + j) * v;
        }
      store_row_sums<R, 4>(sums, out + k * tall, tall, first);
    }
  }

  // out [rank, stride] = scratch^T left
  void times_left(T* out) const {
    std::memset(out, 0, rank * stride * sizeof(T));
    for (int64_t first = 0; first < height; first += 4)
      for (int64_t k = 0; k < rank; k++)
        for (int64_t j = 0; j < stride; j += n) {
          Vt sum = load_at(out + k * stride + j);
          for (int i = 0; i < 4; i++) sum += load_at(scratch + (first + i) * stride + j) * left[k * tall + first + i];
          store_at(out + k * stride + j, sum);
        }
  }

  template <class Visit>
  void sizes(const Visit& visit) const {  // |R| by vectors, 0 where missing
    for (int64_t first = 0; first < height; first += 4)
      for (int64_t j = 0; j < stride; j += n) {
        Vt r[4];
        residuals<4>(first, j, r);
        for (int i = 0; i < 4; i++) visit(r[i] == r[i] ? abs_of<T>(r[i]) : Vt{});
      }
  }

  double mean_residual() const {
    Vt sum{};
    sizes([&](Vt size) { sum += size; });
    return sum_of<T>(sum) / observed;
  }

  double largest_residual() const {
    Vt high{};
    sizes([&](Vt size) { high = size > high ? size : high; });
    return max_of<T>(high);
  }

  double median_residual(int64_t every) {  // of every so manyth group of four rows
    int64_t kept = 0;
    Vt high{}, count{};
    for (int64_t first = 0; first < height; first += 4 * every, kept += 4)
      for (int64_t j = 0; j < stride; j += n) {
        Vt r[4];
        residuals<4>(first, j, r);
        for (int i = 0; i < 4; i++) {
          r[i] = abs_of<T>(r[i]);
          store_at(scratch + (kept + i) * stride + j, r[i]);
          high = r[i] > high ? r[i] : high;
          count += r[i] == r[i] ? Vt{} + 1 : Vt{};
        }
      }
    const int64_t present = static_cast<int64_t>(sum_of<T>(count));
    if (every > 1 && 2 * every * present < observed) return median_residual(1);  // most of the sample is missing
    return present ? order_statistic(scratch, kept * stride, (present + 1) / 2, max_of<T>(high)) : 0;
  }

  // ---- factors ----

  // inverse = (gram + ridge)^-1 by Gauss-Jordan with the diagonal as pivots: gram is positive definite with its ridge.
  void invert(double* inverse) {
    double trace = 0;
    for (int64_t k = 0; k < rank; k++) trace += gram[k * rank + k];
    for (int64_t k = 0; k < rank * rank; k++) inverse[k] = 0;
    if (!(trace > 0)) return;
    for (int64_t k = 0; k < rank; k++) {
      gram[k * rank + k] += ridge * trace;
      inverse[k * rank + k] = 1;
    }
    for (int64_t k = 0; k < rank; k++) {
      const double pivot = 1 / gram[k * rank + k];
      for (int64_t j = 0; j < rank; j++) gram[k * rank + j] *= pivot, inverse[k * rank + j] *= pivot;
      for (int64_t i = 0; i < rank; i++) {
        if (i == k) continue;
        const double factor = gram[i * rank + k];
        for (int64_t j = 0; j < rank; j++) {
          gram[i * rank + j] -= factor * gram[k * rank + j];
          inverse[i * rank + j] -= factor * inverse[k * rank + j];
        }
      }
    }
  }

  static double dot(const T* a, const T* b, int64_t length) {
    Vt sum{};
    for (int64_t j = 0; j < length; j += n) sum += load_at(a + j) * load_at(b + j);
    return sum_of<T>(sum);
  }

  void gram_of(const T* factor, int64_t length) {
    for (int64_t k = 0; k < rank; k++)
      for (int64_t l = 0; l <= k; l++)
        gram[k * rank + l] = gram[l * rank + k] = dot(factor + k * length, factor + l * length, length);
  }

  // factor += size * grad inverse; returns the relative change
  double step(T* factor, const T* grad, const double* inverse, double size, int64_t length) const {
    Vt moved{}, total{};
    for (int64_t k = 0; k < rank; k++)
      for (int64_t j = 0; j < length; j += n) {
        Vt sum{};
        for (int64_t l = 0; l < rank; l++)
          sum += load_at(grad + l * length + j) * static_cast<T>(size * inverse[l * rank + k]);
        const Vt v = load_at(factor + k * length + j);
        total += v * v;
        moved += sum * sum;
        store_at(factor + k * length + j, v + sum);
      }
    const double way = sum_of<T>(moved);
    return way == 0 ? 0 : __builtin_sqrt(way / larger(sum_of<T>(total), 1e-300));  // NaN stays
  }

  // ---- the start ----

  void orthonormalise(T* q, int64_t length) const {  // Gram-Schmidt twice; zero where there are fewer directions
    for (int64_t k = 0; k < rank; k++) {
      T* own = q + k * length;
      for (int round = 0; round < 2; round++)
        for (int64_t l = 0; l < k; l++) {
          const T part = static_cast<T>(dot(own, q + l * length, length));
          for (int64_t j = 0; j < length; j += n)
            store_at(own + j, load_at(own + j) - load_at(q + l * length + j) * part);
        }
      const double squares = dot(own, own, length);
      const T scale = squares > 1e-30 ? static_cast<T>(1 / __builtin_sqrt(squares)) : T(0);
      for (int64_t j = 0; j < length; j += n) store_at(own + j, load_at(own + j) * scale);
    }
  }

  void cold() {
    const Vt bound = Vt{} + static_cast<T>(clip * mean), scale = Vt{} + static_cast<T>(share > 0 ? 1 / share : 0);
    for (int64_t i = 0; i < height * stride; i += n) {
      const Vt v = load_at(matrix + i), below = v > bound ? bound : v, inside = below < -bound ? -bound : below;
      store_at(scratch + i, v == v ? inside * scale : Vt{});
    }
    const T* q = static_cast<const T*>(args.start);
    std::memset(right, 0, rank * stride * sizeof(T));
    for (int64_t j = 0; j < columns; j++)
      for (int64_t k = 0; k < rank; k++) right[k * stride + j] = q[j * rank + k];
    for (int round = 0; round < 3; round++) {
      times_right(left);
      orthonormalise(left, tall);
      times_left(right);
      orthonormalise(right, stride);
    }
    times_right(left);
    if (!args.skew) return;
    for (int64_t k = 0; k < rank; k++)  // core^T = q^T C q, left = q
      for (int64_t l = 0; l < rank; l++) core[l * rank + k] = dot(right + k * stride, left + l * tall, stride);
    copy(right, stride, left, tall);
  }

  void copy(const T* from, int64_t length, T* to, int64_t other) const {  // the matrix is square
    for (int64_t k = 0; k < rank; k++) std::memcpy(to + k * other, from + k * length, rows * sizeof(T));
  }

  bool warm(int64_t b) {  // unless that is nothing, from which no step leads away
    const T* own_left = static_cast<const T*>(args.left) + b * rows * rank;
    const T* own_right = static_cast<const T*>(args.right) + b * columns * rank;
    std::memset(right, 0, rank * stride * sizeof(T));
    for (int64_t k = 0; k < rank; k++) {
      for (int64_t i = 0; i < rows; i++) left[k * tall + i] = static_cast<T>(own_left[i * rank + k] / unit);
      for (int64_t j = 0; j < columns; j++) right[k * stride + j] = own_right[j * rank + k];
    }
    Vt high{};
    for (int64_t i = 0; i < rank * tall; i += n) {
      const Vt size = abs_of<T>(load_at(left + i));
      high = size > high ? size : high;
    }
    if (max_of<T>(high) == 0) return false;
    if (!args.skew) return true;
    gram_of(left, tall);  // core = (left^T left)^-1 left^T right
    invert(work);
    double* cross = work + rank * rank;
    const int64_t common = smaller(tall, stride);
    for (int64_t k = 0; k < rank; k++)
      for (int64_t l = 0; l < rank; l++) cross[k * rank + l] = dot(left + k * tall, right + l * stride, common);
    for (int64_t k = 0; k < rank; k++)
      for (int64_t l = 0; l < rank; l++) {
        double sum = 0;
        for (int64_t x = 0; x < rank; x++) sum += work[k * rank + x] * cross[x * rank + l];
        core[k * rank + l] = sum;
      }
    return true;
  }

  void make_core_skew() {
    for (int64_t k = 0; k < rank; k++)
      for (int64_t l = 0; l <= k; l++) {
        const double half = (core[k * rank + l] - core[l * rank + k]) / 2;
        core[k * rank + l] = half;
        core[l * rank + k] = -half;
      }
  }

  void right_of_core() {  // right = left core: the product stays skew
    const int64_t common = smaller(tall, stride);
    for (int64_t l = 0; l < rank; l++)
      for (int64_t j = 0; j < common; j += n) {
        Vt sum{};
        for (int64_t k = 0; k < rank; k++) sum += load_at(left + k * tall + j) * static_cast<T>(core[k * rank + l]);
        store_at(right + l * stride + j, sum);
      }
  }

  void forget() {
    std::memset(left, 0, rank * tall * sizeof(T));
    std::memset(right, 0, rank * stride * sizeof(T));
  }

  void run(int64_t b) {
    read(b);
    std::memset(left, 0, rank * tall * sizeof(T));
    std::memset(left_grad, 0, rank * tall * sizeof(T));
    int64_t iterations = 0;
    bool converged = observed > 0 && norm == 0, lost = false;
    if (observed == 0 || norm == 0) {
      forget();
    } else {
      const bool warm_start = args.warm && warm(b);
      if (!warm_start) cold();
      if (args.skew) {
        make_core_skew();
        right_of_core();
      }
      const double typical = mean * __builtin_sqrt(double(observed));  // |D|, were all entries of mean size
      const bool explains_all = rank == rows || rank == columns;
      Schedule schedule = explains_all ? still : (share < complete ? sparse_tries : complete_tries)[args.attempt];
      if (!warm_start && schedule.first == 0) schedule = slow;
      const double least = finest * mean, size = schedule.step / share;
      const int64_t every = rows >= 48 ? 4 : 1;
      double zeta = least;
      if (!warm_start)
        zeta = larger(zeta, smaller(top, schedule.first * mean_residual()));
      else if (args.attempt == 1)
        zeta = larger(zeta, largest_residual());
      else
        zeta = larger(zeta, cutoff * mad * median_residual(1));
      for (int still = 0; !converged && iterations < args.max_iter; iterations++) {
        const double next = larger(schedule.decay * zeta, least);
        const Sums sums = pass(zeta, next / (cutoff * mad));
        const bool noisy = iterations >= blind && 2 * sums.small < observed;
        const double noise = noisy ? cutoff * mad * median_residual(every) : 0;
        gram_of(right, stride);
        invert(work);
        if (!args.skew) {
          gram_of(left, tall);
          invert(work + rank * rank);
        }
        double change = step(left, left_grad, work, size, tall);
        if (args.skew)
          right_of_core();
        else
          change = larger(change, step(right, right_grad, work + rank * rank, size, stride));
        if (lost = !(change < away); lost) {
          iterations++;
          break;
        }
        zeta = larger(next, noise);
        still = change < args.tol ? still + 1 : 0;
        converged = __builtin_sqrt(sums.squares) < args.tol * typical || still >= 3;
      }
    }
    double median = median_residual(1);
    if (lost || !(median <= 2 * top)) {  // the steps, scaled up for missing entries, led away: too little is observed
      converged = false;
      forget();
      median = median_residual(1);
    }
    T* out_left = static_cast<T*>(args.left) + b * rows * rank;
    T* out_right = static_cast<T*>(args.right) + b * columns * rank;
    for (int64_t k = 0; k < rank; k++) {
      for (int64_t i = 0; i < rows; i++) out_left[i * rank + k] = static_cast<T>(left[k * tall + i] * unit);
      for (int64_t j = 0; j < columns; j++) out_right[j * rank + k] = right[k * stride + j];
    }
    args.iterations[b] = iterations;
    args.converged[b] = converged;
    args.median[b] = median * unit;
  }
};

}  // namespace

void batched_rpca_solve(const BatchedRpca& args, int64_t matrix, int64_t slot) {
  solve_task<Solver>(args, matrix, slot);
}

}  // namespace fastpref::FASTPREF_SIMD

#if defined(FASTPREF_SIMD_baseline)  // the entry points, once

namespace fastpref {

int64_t batched_rpca_workspace(int64_t rows, int64_t columns, int64_t rank, bool is_double) {
  BatchedRpca args{};
  args.is_double = is_double;
  args.rows = rows, args.columns = columns, args.rank = rank;
  return baseline::workspace_bytes<baseline::Solver>(args);
}

void batched_rpca_cpu(const BatchedRpca& args, int threads) {
  solve_each<batched_rpca_solve>(args, args.batch, threads);
}

}  // namespace fastpref

#endif
