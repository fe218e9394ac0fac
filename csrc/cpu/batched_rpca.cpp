// Fixed-rank robust PCA, one matrix per task. An iteration is one pass over the matrix: of a few rows at a time the
// residual, its weights, and both products with the factors, the left factor's by row, the right one's by column.
#include "batched_rpca.h"

#include "dispatch.h"
#include "lanes.h"

namespace fastpref {

FASTPREF_DISPATCH(batched_rpca_solve, BatchedRpca)  // (matrix, slot)

}  // namespace fastpref

namespace fastpref::FASTPREF_SIMD {
namespace {

// as in fastpref/batched_rpca.py
constexpr double mad = 1.4826, cutoff = 3, step_size = 0.7, finest = 1e-9, clip = 3, ridge = 1e-10, away = 10;
constexpr int64_t blind = 5;

constexpr int64_t widest = 8;  // ranks up to this one have kernels with their factors in registers

template <class T>
struct Solver {
  static constexpr int n = Lanes<T>::n;
  using Vt = V<T>;
  using I = typename Lanes<T>::I;

  const BatchedRpca& args;
  const int64_t rows, columns, rank, stride;
  T* matrix;                   // [rows, stride], NaN: missing or padding
  T* scratch;                  // [rows, stride]
  T *left, *left_grad;         // [rows, rank]
  T *right, *right_grad;       // [rank, stride], padding zero
  double *gram, *core, *work;  // [rank, rank]
  double* line;                // [rank]

  Solver(const BatchedRpca& args, char* memory)
      : args(args), rows(args.rows), columns(args.columns), rank(args.rank), stride((args.columns + n - 1) / n * n) {
    const auto take = [&](int64_t bytes) {
      char* at = memory;
      memory += (bytes + 63) / 64 * 64;
      return at;
    };
    matrix = reinterpret_cast<T*>(take(rows * stride * sizeof(T)));
    scratch = reinterpret_cast<T*>(take(rows * stride * sizeof(T)));
    left = reinterpret_cast<T*>(take(rows * rank * sizeof(T)));
    left_grad = reinterpret_cast<T*>(take(rows * rank * sizeof(T)));
    right = reinterpret_cast<T*>(take(rank * stride * sizeof(T)));
    right_grad = reinterpret_cast<T*>(take(rank * stride * sizeof(T)));
    gram = reinterpret_cast<double*>(take(rank * rank * 8));
    core = reinterpret_cast<double*>(take(rank * rank * 8));
    work = reinterpret_cast<double*>(take(2 * rank * rank * 8));
    line = reinterpret_cast<double*>(take(rank * 8));
  }

  int64_t observed = 0;
  double mean = 0, norm = 0, top = 0, share = 0;

  void read(int64_t b) {
    const T* in = static_cast<const T*>(args.data) + b * rows * columns;
    const T nan = static_cast<T>(__builtin_nan(""));
    double sum = 0, squares = 0, most = 0;
    observed = 0;
    for (int64_t i = 0; i < rows; i++) {
      T* row = matrix + i * stride;
      std::memcpy(row, in + i * columns, columns * sizeof(T));
      for (int64_t j = columns; j < stride; j++) row[j] = nan;
      Vt s{}, s2{}, count{}, high{};
      for (int64_t j = 0; j < stride; j += n) {
        const Vt v = load_at(row + j), a = v == v ? abs_of<T>(v) : Vt{};
        s += a;
        s2 += a * a;
        high = a > high ? a : high;
        count += v == v ? Vt{} + 1 : Vt{};
      }
      sum += sum_of<T>(s);
      squares += sum_of<T>(s2);
      observed += static_cast<int64_t>(sum_of<T>(count));
      for (int k = 0; k < n; k++) most = larger(most, high[k]);
    }
    mean = observed ? sum / observed : 0;
    norm = __builtin_sqrt(squares);
    top = most;
    share = double(observed) / double(rows * columns);
  }

  struct Sums {
    double squares = 0;  // of E
    int64_t small = 0;   // residuals up to the bound asked for
  };

  // E = R / (1 + (R / zeta)^2), E right and (unless skew) E^T left; R kept in `scratch` if asked.
  template <int R, int ROWS>
  __attribute__((always_inline)) inline void some_rows(int64_t first, Vt inverse_zeta2, Vt limit, Vt& squares,
                                                       I& below) {
    const int64_t r = R ? R : rank;
    const Vt one = Vt{} + 1;
    Vt own[ROWS][R ? R : 1];
    if constexpr (R != 0)
      for (int i = 0; i < ROWS; i++)
        for (int k = 0; k < R; k++) own[i][k] = Vt{};
    if constexpr (R == 0)
      for (int64_t k = 0; k < r; k++) left_grad[first * rank + k] = 0;
    for (int64_t j = 0; j < stride; j += n) {
      Vt e[ROWS];
      for (int i = 0; i < ROWS; i++) e[i] = load_at(matrix + (first + i) * stride + j);
      for (int64_t k = 0; k < r; k++) {
        const Vt v = load_at(right + k * stride + j);
        for (int i = 0; i < ROWS; i++) e[i] -= v * left[(first + i) * rank + k];
      }
      for (int i = 0; i < ROWS; i++) {
        const auto present = e[i] == e[i];
        const Vt residual = present ? e[i] : Vt{};
        below -= (abs_of<T>(residual) <= limit) & present;
        e[i] = residual * inverse(one + residual * residual * inverse_zeta2);
        squares += e[i] * e[i];
      }
      for (int64_t k = 0; k < r; k++) {
        const Vt v = load_at(right + k * stride + j);
        if constexpr (R != 0)
          for (int i = 0; i < ROWS; i++) own[i][k] += e[i] * v;
        else
          left_grad[first * rank + k] += sum_of<T>(e[0] * v);
        if (args.skew) continue;
        Vt sum = load_at(right_grad + k * stride + j);
        for (int i = 0; i < ROWS; i++) sum += e[i] * left[(first + i) * rank + k];
        store_at(right_grad + k * stride + j, sum);
      }
    }
    if constexpr (R != 0)
      for (int i = 0; i < ROWS; i++)
        for (int k = 0; k < R; k++) left_grad[(first + i) * rank + k] = sum_of<T>(own[i][k]);
  }

  template <int R>
  __attribute__((noinline)) Sums pass_of(double zeta, double bound) {
    constexpr int many = R == 0 ? 1 : R <= 4 ? 4 : 2;
    const Vt inverse_zeta2 = Vt{} + static_cast<T>(1 / (zeta * zeta)), limit = Vt{} + static_cast<T>(bound);
    Vt squares{};
    I below{};
    std::memset(right_grad, 0, rank * stride * sizeof(T));
    int64_t i = 0;
    for (; i + many <= rows; i += many) some_rows<R, many>(i, inverse_zeta2, limit, squares, below);
    for (; i < rows; i++) some_rows<R, 1>(i, inverse_zeta2, limit, squares, below);
    Sums sums;
    sums.squares = sum_of<T>(squares);
    for (int k = 0; k < n; k++) sums.small += below[k];
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
        return pass_of<0>(zeta, bound);
    }
  }

  double median_residual(int64_t every) {
    int64_t kept = 0, present = 0;
    double most = 0;
    for (int64_t i = 0; i < rows; i += every) {
      T* out = scratch + kept++ * stride;
      Vt high{}, count{};
      for (int64_t j = 0; j < stride; j += n) {
        Vt r = load_at(matrix + i * stride + j);
        for (int64_t k = 0; k < rank; k++) r -= load_at(right + k * stride + j) * left[i * rank + k];
        r = abs_of<T>(r);
        store_at(out + j, r);
        high = r > high ? r : high;
        count += r == r ? Vt{} + 1 : Vt{};
      }
      present += static_cast<int64_t>(sum_of<T>(count));
      for (int k = 0; k < n; k++) most = larger(most, high[k]);
    }
    return present ? order_statistic(scratch, kept * stride, (present + 1) / 2, most) : 0;
  }

  // ---- r x r ----

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

  void gram_of_right() {
    for (int64_t k = 0; k < rank; k++)
      for (int64_t l = 0; l <= k; l++) {
        Vt sum{};
        for (int64_t j = 0; j < stride; j += n)
          sum += load_at(right + k * stride + j) * load_at(right + l * stride + j);
        gram[k * rank + l] = gram[l * rank + k] = sum_of<T>(sum);
      }
  }

  void gram_of_left() {
    for (int64_t k = 0; k < rank * rank; k++) gram[k] = 0;
    for (int64_t i = 0; i < rows; i++)
      for (int64_t k = 0; k < rank; k++)
        for (int64_t l = 0; l <= k; l++) gram[k * rank + l] += double(left[i * rank + k]) * left[i * rank + l];
    for (int64_t k = 0; k < rank; k++)
      for (int64_t l = 0; l < k; l++) gram[l * rank + k] = gram[k * rank + l];
  }

  // left += size * left_grad inverse; returns the relative change
  double step_left(const double* inverse, double size) {
    double moved = 0, total = 0;
    for (int64_t i = 0; i < rows; i++) {
      for (int64_t k = 0; k < rank; k++) {
        double sum = 0;
        for (int64_t l = 0; l < rank; l++) sum += left_grad[i * rank + l] * inverse[l * rank + k];
        line[k] = size * sum;
      }
      for (int64_t k = 0; k < rank; k++) {
        T& entry = left[i * rank + k];
        moved += line[k] * line[k];
        total += double(entry) * entry;
        entry = static_cast<T>(entry + line[k]);
      }
    }
    return moved > 0 ? __builtin_sqrt(moved / larger(total, 1e-300)) : 0;
  }

  double step_right(const double* inverse, double size) {
    double moved = 0, total = 0;
    for (int64_t k = 0; k < rank; k++) {
      Vt squares{}, moves{};
      for (int64_t j = 0; j < stride; j += n) {
        Vt sum{};
        for (int64_t l = 0; l < rank; l++)
          sum += load_at(right_grad + l * stride + j) * static_cast<T>(size * inverse[l * rank + k]);
        const Vt v = load_at(right + k * stride + j);
        squares += v * v;
        moves += sum * sum;
        store_at(right + k * stride + j, v + sum);
      }
      moved += sum_of<T>(moves);
      total += sum_of<T>(squares);
    }
    return moved > 0 ? __builtin_sqrt(moved / larger(total, 1e-300)) : 0;
  }

  // ---- the start ----

  T clipped(T v, double bound) const {
    return v == v ? static_cast<T>(v > bound ? bound : v < -bound ? -bound : v) : T(0);
  }

  void orthonormalise(T* q, int64_t length, int64_t along, int64_t apart) {  // q[i along + k apart], Gram-Schmidt twice
    for (int64_t k = 0; k < rank; k++) {
      for (int round = 0; round < 2; round++)
        for (int64_t l = 0; l < k; l++) {
          double dot = 0;
          for (int64_t i = 0; i < length; i++) dot += double(q[i * along + k * apart]) * q[i * along + l * apart];
          for (int64_t i = 0; i < length; i++) {
            T& entry = q[i * along + k * apart];
            entry = static_cast<T>(entry - dot * q[i * along + l * apart]);
          }
        }
      double squares = 0;
      for (int64_t i = 0; i < length; i++) squares += double(q[i * along + k * apart]) * q[i * along + k * apart];
      const double scale = squares > 1e-60 ? 1 / __builtin_sqrt(squares) : 0;
      for (int64_t i = 0; i < length; i++) q[i * along + k * apart] = static_cast<T>(q[i * along + k * apart] * scale);
    }
  }

  void power_left() {  // left = C right
    for (int64_t i = 0; i < rows; i++)
      for (int64_t k = 0; k < rank; k++) {
        Vt sum{};
        for (int64_t j = 0; j < stride; j += n)
          sum += load_at(scratch + i * stride + j) * load_at(right + k * stride + j);
        left[i * rank + k] = sum_of<T>(sum);
      }
  }

  void power_right() {  // right = C^T left
    std::memset(right, 0, rank * stride * sizeof(T));
    for (int64_t i = 0; i < rows; i++)
      for (int64_t k = 0; k < rank; k++) {
        const T own = left[i * rank + k];
        for (int64_t j = 0; j < stride; j += n)
          store_at(right + k * stride + j, load_at(right + k * stride + j) + load_at(scratch + i * stride + j) * own);
      }
  }

  void cold() {
    const double bound = clip * mean, scale = share > 0 ? 1 / share : 0;
    for (int64_t i = 0; i < rows * stride; i++) scratch[i] = static_cast<T>(clipped(matrix[i], bound) * scale);
    const T* q = static_cast<const T*>(args.start);
    std::memset(right, 0, rank * stride * sizeof(T));
    for (int64_t j = 0; j < columns; j++)
      for (int64_t k = 0; k < rank; k++) right[k * stride + j] = q[j * rank + k];
    for (int round = 0; round < 3; round++) {
      power_left();
      orthonormalise(left, rows, rank, 1);
      power_right();
      orthonormalise(right, columns, 1, stride);
    }
    power_left();
    if (!args.skew) return;
    for (int64_t k = 0; k < rank; k++)  // core^T = q^T C q, left = q
      for (int64_t l = 0; l < rank; l++) {
        double sum = 0;
        for (int64_t i = 0; i < rows; i++) sum += double(right[k * stride + i]) * left[i * rank + l];
        core[l * rank + k] = sum;
      }
    for (int64_t i = 0; i < rows; i++)
      for (int64_t k = 0; k < rank; k++) left[i * rank + k] = right[k * stride + i];
  }

  void warm(int64_t b) {
    const T* own_left = static_cast<const T*>(args.left) + b * rows * rank;
    const T* own_right = static_cast<const T*>(args.right) + b * columns * rank;
    std::memcpy(left, own_left, rows * rank * sizeof(T));
    std::memset(right, 0, rank * stride * sizeof(T));
    for (int64_t j = 0; j < columns; j++)
      for (int64_t k = 0; k < rank; k++) right[k * stride + j] = own_right[j * rank + k];
    if (!args.skew) return;
    gram_of_left();  // core = (left^T left)^-1 left^T right
    invert(work);
    double* cross = work + rank * rank;
    for (int64_t k = 0; k < rank; k++)
      for (int64_t l = 0; l < rank; l++) {
        double sum = 0;
        for (int64_t i = 0; i < rows; i++) sum += double(left[i * rank + k]) * right[l * stride + i];
        cross[k * rank + l] = sum;
      }
    for (int64_t k = 0; k < rank; k++)
      for (int64_t l = 0; l < rank; l++) {
        double sum = 0;
        for (int64_t x = 0; x < rank; x++) sum += work[k * rank + x] * cross[x * rank + l];
        core[k * rank + l] = sum;
      }
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
    for (int64_t i = 0; i < rows; i++)
      for (int64_t l = 0; l < rank; l++) {
        double sum = 0;
        for (int64_t k = 0; k < rank; k++) sum += left[i * rank + k] * core[k * rank + l];
        right[l * stride + i] = static_cast<T>(sum);
      }
  }

  void run(int64_t b) {
    read(b);
    int64_t iterations = 0;
    bool converged = observed > 0 && norm == 0;
    if (observed == 0 || norm == 0) {
      std::memset(left, 0, rows * rank * sizeof(T));
      std::memset(right, 0, rank * stride * sizeof(T));
    } else {
      args.warm ? warm(b) : cold();
      if (args.skew) {
        make_core_skew();
        right_of_core();
      }
      const double least = finest * mean, gamma = args.gamma[b], size = step_size / share;
      const int64_t sampled = rows >= 48 ? 4 : 1;
      double zeta = larger(args.warm ? cutoff * mad * median_residual(1) : top, least);
      for (int quiet = 0; !converged && iterations < args.max_iter; iterations++) {
        const double next = larger(gamma * zeta, least);
        const Sums sums = pass(zeta, next / (cutoff * mad));
        const bool noisy = iterations >= blind && 2 * sums.small < observed;
        const double noise = noisy ? cutoff * mad * median_residual(sampled) : 0;
        gram_of_right();
        invert(work);
        if (!args.skew) {
          gram_of_left();
          invert(work + rank * rank);
        }
        double change = step_left(work, size);
        if (args.skew)
          right_of_core();
        else
          change = larger(change, step_right(work + rank * rank, size));
        if (!(change < away)) break;
        zeta = larger(next, noise);
        quiet = change < args.tol ? quiet + 1 : 0;
        converged = __builtin_sqrt(sums.squares) < args.tol * norm || quiet >= 3;
      }
    }
    double median = median_residual(1);
    if (!(median <= 2 * top)) {  // the steps, scaled up for missing entries, led away: too little is observed
      converged = false;
      std::memset(left, 0, rows * rank * sizeof(T));
      std::memset(right, 0, rank * stride * sizeof(T));
      median = median_residual(1);
    }
    T* out_left = static_cast<T*>(args.left) + b * rows * rank;
    T* out_right = static_cast<T*>(args.right) + b * columns * rank;
    std::memcpy(out_left, left, rows * rank * sizeof(T));
    for (int64_t j = 0; j < columns; j++)
      for (int64_t k = 0; k < rank; k++) out_right[j * rank + k] = right[k * stride + j];
    args.iterations[b] = iterations;
    args.converged[b] = converged;
    args.median[b] = median;
  }
};

}  // namespace

void batched_rpca_solve(const BatchedRpca& args, int64_t matrix, int64_t slot) {
  char* memory = static_cast<char*>(args.workspace) +
                 slot * batched_rpca_workspace(args.rows, args.columns, args.rank, args.is_double);
  if (args.is_double)
    Solver<double>(args, memory).run(matrix);
  else
    Solver<float>(args, memory).run(matrix);
}

}  // namespace fastpref::FASTPREF_SIMD

#if defined(FASTPREF_SIMD_baseline)  // the entry points, once

namespace fastpref {

int64_t batched_rpca_workspace(int64_t rows, int64_t columns, int64_t rank, bool is_double) {
  const int64_t stride = (columns + 15) / 16 * 16, size = is_double ? 8 : 4;
  return (2 * rows * stride + 2 * rank * (rows + stride)) * size + (4 * rank * rank + rank) * 8 + 12 * 64;
}

void batched_rpca_cpu(const BatchedRpca& args, int threads) {
  const SimdLevel level = simd_level();
  parallel_with_slot(args.batch, threads,
                     [&](int64_t matrix, int64_t slot) { batched_rpca_solve(level, args, matrix, slot); });
}

}  // namespace fastpref

#endif
