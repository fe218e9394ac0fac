// Singular-value thresholding on the CPU, one matrix per vector lane. Jacobi turns a copy X of A into Sigma U^T; V is
// never accumulated, as the product of A with a row of X is sigma^2 v:
//   L = sum over sigma_i > tau of (1 - tau / sigma_i) (A x_i) x_i^T / |x_i|^2.
#include "svt.h"

#include "batch.h"
#include "jacobi.h"

namespace fastpref {

FASTPREF_DISPATCH(svt_matrices, Svt)  // (group of as many matrices as a vector has lanes, slot)

}  // namespace fastpref

namespace fastpref::FASTPREF_SIMD {
namespace {

// A has the shorter side first: [count, length], transposed where the matrix is tall.
template <class T>
struct Thresholder {
  using I = typename Lanes<T>::I;
  static constexpr int lanes = Lanes<T>::n;
  static constexpr bool is_double = sizeof(T) == 8;
  static constexpr T epsilon = is_double ? T(0x1p-53) : T(0x1p-24);
  static constexpr int largest_exponent = 20;  // of the scaled entries: their fourth powers stay far from both ends

  const Svt& args;
  const bool tall;
  const int64_t count, length;
  V<T>*a, *x, *products, *squares;
  int64_t* kept;

  Thresholder(const Svt& args, Workspace& workspace, int64_t vector_lanes)
      : args(args),
        tall(args.rows > args.columns),
        count(tall ? args.columns : args.rows),
        length(tall ? args.rows : args.columns) {
    const auto vectors = [&](int64_t size) { return reinterpret_cast<V<T>*>(workspace.take<T>(size * vector_lanes)); };
    a = vectors(count * length), x = vectors(count * length);
    products = vectors(count * count), squares = vectors(count);
    kept = workspace.take<int64_t>(count);
  }

  int64_t entry(int64_t p, int64_t k) const { return tall ? k * count + p : p * length + k; }

  void read(int64_t first, int used) {
    const int64_t size = count * length;
    for (int64_t i = 0; i < size; i++) a[i] = V<T>{};
    for (int lane = 0; lane < used; lane++) {
      const T* matrix = static_cast<const T*>(args.matrix) + (first + lane) * size;
      T* out = reinterpret_cast<T*>(a) + lane;
      for (int64_t p = 0; p < count; p++)
        for (int64_t k = 0; k < length; k++) out[(p * length + k) * lanes] = matrix[entry(p, k)];
    }
  }

  void run(int64_t group) {
    const int64_t first = group * lanes, size = count * length;
    const int used = static_cast<int>(smaller(args.batch - first, lanes));
    read(first, used);
    V<T> top{}, nonfinite{};
    for (int64_t i = 0; i < size; i++) {
      const V<T> value = abs_of<T>(a[i]);
      top = value > top ? value : top;
      nonfinite += a[i] - a[i];  // NaN for NaN and infinity
    }
    const I finite = nonfinite == nonfinite;
    // exact scaling, in two factors: one alone can overflow for subnormal matrices
    V<T> up{}, down{};
    int exponent[lanes];
    for (int lane = 0; lane < lanes; lane++) {
      const bool usable = finite[lane] && top[lane] > 0;
      exponent[lane] = usable ? __builtin_ilogb(static_cast<double>(top[lane])) - largest_exponent : 0;
      up[lane] = static_cast<T>(__builtin_ldexp(1.0, -exponent[lane] / 2));
      down[lane] = static_cast<T>(__builtin_ldexp(1.0, -exponent[lane] - -exponent[lane] / 2));
    }
    V<T> norm{};
    for (int64_t i = 0; i < size; i++) {
      a[i] = finite ? a[i] * up * down : V<T>{};
      x[i] = a[i];
      norm += a[i] * a[i];
    }
    const T least = epsilon / 8;
    const I converged = orthogonalise<T>(x, squares, count, length, epsilon, norm * (least * least));

    V<T> tau{};
    for (int lane = 0; lane < used; lane++)
      tau[lane] = static_cast<const T*>(args.threshold)[first + lane] * up[lane] * down[lane];
    I rank{};
    int64_t terms = 0;
    for (int64_t i = 0; i < count; i++) {
      const T slack = 1 - T(0x1p-10);
      if (!any((root(squares[i]) > tau * slack) & (squares[i] > norm * (least * least)))) continue;
      // the rotations' rounding adds up in |x_i|, but cancels out of |A x_i| / |x_i|
      V<T>* product = products + terms * count;
      multiply(x + i * length, product);
      const V<T> sigma = root(dot<T>(product, product, count) / squares[i]);
      const I above = (sigma > tau) & (squares[i] > norm * (least * least));
      rank -= above;
      const V<T> share = above ? (1 - tau / sigma) / squares[i] : V<T>{};
      for (int64_t p = 0; p < count; p++) product[p] *= share;
      kept[terms++] = i;
    }
    for (int64_t p = 0; p < count; p++) rebuild(p, terms, a + p * length);  // A's row p is not needed any more
    const V<T> back_up = 1 / up, back_down = 1 / down;
    for (int64_t i = 0; i < size; i++) a[i] = a[i] * back_up * back_down;

    for (int lane = 0; lane < used; lane++) {
      args.rank[first + lane] = !finite[lane] ? -2 : !converged[lane] ? -1 : rank[lane];
      if (!finite[lane]) continue;
      T* out = static_cast<T*>(args.low_rank) + (first + lane) * size;
      const T* in = reinterpret_cast<const T*>(a) + lane;
      for (int64_t p = 0; p < count; p++)
        for (int64_t k = 0; k < length; k++) out[entry(p, k)] = in[(p * length + k) * lanes];
    }
  }

  void multiply(const V<T>* row, V<T>* out) const {  // A row
    int64_t p = 0;
    for (; p + 4 <= count; p += 4) {
      V<T> sum[4] = {};
      for (int64_t k = 0; k < length; k++)
        for (int u = 0; u < 4; u++) sum[u] += a[(p + u) * length + k] * row[k];
      for (int u = 0; u < 4; u++) out[p + u] = sum[u];
    }
    for (; p < count; p++) out[p] = dot<T>(a + p * length, row, length);
  }

  void rebuild(int64_t p, int64_t terms, V<T>* out) const {
    int64_t k = 0;
    for (; k + 8 <= length; k += 8) {
      V<T> sum[8] = {};
      for (int64_t i = 0; i < terms; i++)
        for (int u = 0; u < 8; u++) sum[u] += products[i * count + p] * x[kept[i] * length + k + u];
      for (int u = 0; u < 8; u++) out[k + u] = sum[u];
    }
    for (; k < length; k++) {
      V<T> sum{};
      for (int64_t i = 0; i < terms; i++) sum += products[i * count + p] * x[kept[i] * length + k];
      out[k] = sum;
    }
  }
};

}  // namespace

void svt_matrices(const Svt& args, int64_t group, int64_t slot) { solve_task<Thresholder>(args, group, slot); }

}  // namespace fastpref::FASTPREF_SIMD

#if defined(FASTPREF_SIMD_baseline)  // the entry points, once

namespace fastpref {

int64_t svt_workspace(int64_t rows, int64_t columns) {  // vectors of either type have the same bytes
  Svt args{};
  args.rows = rows, args.columns = columns;
  return baseline::workspace_bytes<baseline::Thresholder>(args);
}

void svt_cpu(const Svt& args, int threads) {
  const SimdLevel level = simd_level();
  const int64_t width = (level == SimdLevel::avx512 ? 16 : level == SimdLevel::avx2 ? 8 : 4) / (args.is_double ? 2 : 1);
  solve_each<svt_matrices>(args, divide_up(args.batch, width), threads, level);
}

}  // namespace fastpref

#endif
