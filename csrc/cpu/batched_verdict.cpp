// One matrix per task: a read for its mean, one for its residuals, and the decomposition of L from those of its
// factors, in double precision.
#include "batched_verdict.h"

#include "batch.h"

namespace fastpref {

FASTPREF_DISPATCH(batched_verdict_judge, BatchedVerdict)  // (matrix, slot)

}  // namespace fastpref

namespace fastpref::FASTPREF_SIMD {
namespace {

constexpr int64_t most_lanes = 16;  // rows are padded alike for both types and all levels

inline double dot(const double* a, const double* b, int64_t length) {
  V<double> sum{};
  for (int64_t j = 0; j < length; j += Lanes<double>::n) sum += load_at(a + j) * load_at(b + j);
  return sum_of<double>(sum);
}

inline void subtract(double* from, const double* q, double times, int64_t length) {
  for (int64_t j = 0; j < length; j += Lanes<double>::n) store_at(from + j, load_at(from + j) - load_at(q + j) * times);
}

inline void scale(double* q, double by, int64_t length) {
  for (int64_t j = 0; j < length; j += Lanes<double>::n) store_at(q + j, load_at(q + j) * by);
}

// q [count, length] (apart by `apart`, padding zero) becomes orthonormal, r [count, count] upper with q_old = r^T q. A
// vector that depends on the ones before is replaced by a unit vector that does not, with 0 in r.
inline void orthonormalise(double* q, int64_t count, int64_t length, int64_t apart, double* r) {
  for (int64_t k = 0; k < count; k++) {
    double* own = q + k * apart;
    const double before = dot(own, own, apart);
    for (int64_t l = 0; l < count; l++) r[l * count + k] = 0;
    for (int round = 0; round < 2; round++)
      for (int64_t l = 0; l < k; l++) {
        const double part = dot(own, q + l * apart, apart);
        subtract(own, q + l * apart, part, apart);
        r[l * count + k] += part;
      }
    double squares = dot(own, own, apart);
    if (squares > 1e-26 * before && squares > 1e-290) {
      r[k * count + k] = __builtin_sqrt(squares);
    } else {
      int64_t free = 0;
      double most = -1;
      for (int64_t t = 0; t < length; t++) {
        double left = 1;
        for (int64_t l = 0; l < k; l++) left -= q[l * apart + t] * q[l * apart + t];
        if (left > most) most = left, free = t;
      }
      std::memset(own, 0, apart * sizeof(double));
      own[free] = 1;
      for (int round = 0; round < 2; round++)
        for (int64_t l = 0; l < k; l++) subtract(own, q + l * apart, dot(own, q + l * apart, apart), apart);
      squares = dot(own, own, apart);
    }
    scale(own, 1 / __builtin_sqrt(squares), apart);
  }
}

inline void rotate(double* a, double* b, double c, double s, int64_t length) {
  for (int64_t j = 0; j < length; j += Lanes<double>::n) {
    const V<double> x = load_at(a + j), y = load_at(b + j);
    store_at(a + j, x * c - y * s);
    store_at(b + j, x * s + y * c);
  }
}

inline void exchange(double* a, double* b, int64_t length) {
  for (int64_t j = 0; j < length; j++) {
    const double kept = a[j];
    a[j] = b[j], b[j] = kept;
  }
}

// One-sided Jacobi: a [count, count] by columns (vector k at k * apart) becomes U diag(s), v [count, count] its right
// vectors, likewise by columns.
inline void jacobi(double* a, double* v, int64_t count, int64_t apart) {
  std::memset(v, 0, count * apart * sizeof(double));
  for (int64_t k = 0; k < count; k++) v[k * apart + k] = 1;
  for (int sweep = 0; sweep < 30; sweep++) {
    bool turned = false;
    for (int64_t p = 0; p < count; p++)
      for (int64_t q = p + 1; q < count; q++) {
        const double alpha = dot(a + p * apart, a + p * apart, apart), beta = dot(a + q * apart, a + q * apart, apart);
        const double gamma = dot(a + p * apart, a + q * apart, apart);
        if (!(gamma * gamma > 1e-30 * alpha * beta)) continue;
        turned = true;
        const double ratio = (beta - alpha) / (2 * gamma), size = magnitude(ratio);
        const double t = (ratio < 0 ? -1 : 1) / (size + __builtin_sqrt(1 + size * size));
        const double c = 1 / __builtin_sqrt(1 + t * t), s = c * t;
        rotate(a + p * apart, a + q * apart, c, s, apart);
        rotate(v + p * apart, v + q * apart, c, s, apart);
      }
    if (!turned) break;
  }
}

template <class T>
struct Judge {
  static constexpr int n = Lanes<T>::n;
  using Vt = V<T>;

  const BatchedVerdict& args;
  const int64_t rows, columns, rank, tall, wide, square;  // the last three padded
  double *q, *p, *rq, *rp, *middle, *turn, *norms;        // [rank, tall], [rank, wide], [rank, rank] ..., [rank]
  T *right, *far, *seen;                                  // [rank, wide], [wide], [wide]
  T* line;                                                // [wide]: a row of the matrix

  Judge(const BatchedVerdict& args, Workspace& workspace, int64_t)
      : args(args),
        rows(args.rows),
        columns(args.columns),
        rank(args.rank),
        tall(round_up(rows, most_lanes)),
        wide(round_up(columns, most_lanes)),
        square(round_up(rank, most_lanes)),
        q(workspace.take<double>(rank * tall)),
        p(workspace.take<double>(rank * wide)),
        rq(workspace.take<double>(rank * rank)),
        rp(workspace.take<double>(rank * rank)),
        middle(workspace.take<double>(rank * square)),
        turn(workspace.take<double>(rank * square)),
        norms(workspace.take<double>(rank)),
        right(workspace.take<T>(rank * wide)),
        far(workspace.take<T>(wide)),
        seen(workspace.take<T>(wide)),
        line(workspace.take<T>(wide)) {}

  void decompose(int64_t b) {
    const T* own_left = static_cast<const T*>(args.left) + b * rows * rank;
    const T* own_right = static_cast<const T*>(args.right) + b * columns * rank;
    std::memset(q, 0, rank * tall * sizeof(double));
    std::memset(p, 0, rank * wide * sizeof(double));
    std::memset(right, 0, rank * wide * sizeof(T));
    for (int64_t k = 0; k < rank; k++) {
      for (int64_t i = 0; i < rows; i++) q[k * tall + i] = own_left[i * rank + k];
      for (int64_t j = 0; j < columns; j++) p[k * wide + j] = right[k * wide + j] = own_right[j * rank + k];
    }
    orthonormalise(q, rank, rows, tall, rq);
    orthonormalise(p, rank, columns, wide, rp);
    std::memset(middle, 0, rank * square * sizeof(double));
    for (int64_t i = 0; i < rank; i++)  // L = Q^T (rq rp^T) P
      for (int64_t j = 0; j < rank; j++) {
        double sum = 0;
        for (int64_t k = 0; k < rank; k++) sum += rq[i * rank + k] * rp[j * rank + k];
        middle[j * square + i] = sum;
      }
    jacobi(middle, turn, rank, square);
    for (int64_t k = 0; k < rank; k++) norms[k] = __builtin_sqrt(dot(middle + k * square, middle + k * square, square));
    for (int64_t k = 0; k < rank; k++) {  // descending
      int64_t largest = k;
      for (int64_t l = k + 1; l < rank; l++)
        if (norms[l] > norms[largest]) largest = l;
      exchange(norms + k, norms + largest, 1);
      exchange(middle + k * square, middle + largest * square, rank);
      exchange(turn + k * square, turn + largest * square, rank);
    }
    T* s = static_cast<T*>(args.s) + b * rank;
    for (int64_t k = 0; k < rank; k++) s[k] = static_cast<T>(norms[k]);
    orthonormalise(middle, rank, rank, square, rq);  // to U; the vectors of zeros are completed
    T* u = static_cast<T*>(args.u) + b * rows * rank;
    T* vh = static_cast<T*>(args.vh) + b * rank * columns;
    for (int64_t k = 0; k < rank; k++) {
      for (int64_t i = 0; i < rows; i++) {
        double sum = 0;
        for (int64_t l = 0; l < rank; l++) sum += q[l * tall + i] * middle[k * square + l];
        u[i * rank + k] = static_cast<T>(sum);
      }
      for (int64_t j = 0; j < columns; j++) {
        double sum = 0;
        for (int64_t l = 0; l < rank; l++) sum += p[l * wide + j] * turn[k * square + l];
        vh[k * columns + j] = static_cast<T>(sum);
      }
    }
  }

  void run(int64_t b) {
    decompose(b);
    const T* data = static_cast<const T*>(args.data) + b * rows * columns;
    const T* left = static_cast<const T*>(args.left) + b * rows * rank;
    for (int64_t j = columns; j < wide; j++) line[j] = static_cast<T>(__builtin_nan(""));
    Vt high{};
    for (int64_t i = 0; i < rows; i++) {
      std::memcpy(line, data + i * columns, columns * sizeof(T));
      for (int64_t j = 0; j < wide; j += n) {
        const Vt a = abs_of<T>(load_at(line + j));
        high = a > high ? a : high;
      }
    }
    const double unit = power_of_two(max_of<T>(high));  // so that sums of squares stay in range
    const Vt down = Vt{} + static_cast<T>(1 / unit);
    double total = 0, squares = 0, observed = 0;
    for (int64_t i = 0; i < rows; i++) {
      std::memcpy(line, data + i * columns, columns * sizeof(T));
      Vt sum{}, square{}, count{};
      for (int64_t j = 0; j < wide; j += n) {
        const Vt v = load_at(line + j) * down, a = v == v ? abs_of<T>(v) : Vt{};
        sum += a;
        square += a * a;
        count += v == v ? Vt{} + 1 : Vt{};
      }
      total += sum_of<T>(sum);
      squares += sum_of<T>(square);
      observed += sum_of<T>(count);
    }
    const double mean = observed > 0 ? total / observed * unit : 0;
    const Vt bound = Vt{} + static_cast<T>(larger(args.outlier * args.median[b], args.exact * mean));
    std::memset(far, 0, wide * sizeof(T));
    std::memset(seen, 0, wide * sizeof(T));
    double rest = 0, outliers = 0, worst = 0;
    double* row_rates = args.row_rates + b * rows;
    double* column_rates = args.column_rates + b * columns;
    for (int64_t i = 0; i < rows; i++) {
      std::memcpy(line, data + i * columns, columns * sizeof(T));
      Vt near{}, beyond{}, there{};
      for (int64_t j = 0; j < wide; j += n) {
        Vt r = load_at(line + j);
        for (int64_t k = 0; k < rank; k++) r -= load_at(right + k * wide + j) * left[i * rank + k];
        const auto is_far = abs_of<T>(r) > bound;
        const Vt one = r == r ? Vt{} + 1 : Vt{}, wrong = is_far ? Vt{} + 1 : Vt{};
        const Vt kept = is_far ? Vt{} : (r == r ? r * down : Vt{});
        near += kept * kept;
        beyond += wrong;
        there += one;
        store_at(far + j, load_at(far + j) + wrong);
        store_at(seen + j, load_at(seen + j) + one);
      }
      rest += sum_of<T>(near);
      const double wrong = sum_of<T>(beyond), present = sum_of<T>(there);
      outliers += wrong;
      row_rates[i] = wrong / larger(present, 1);
      worst = larger(worst, row_rates[i]);
    }
    for (int64_t j = 0; j < columns; j++) {
      column_rates[j] = far[j] / larger(seen[j], 1);
      worst = larger(worst, column_rates[j]);
    }
    double* sums = args.sums + 4 * b;
    sums[0] = mean;
    sums[1] = squares > 0 ? __builtin_sqrt(rest / squares) : 0;
    sums[2] = outliers / larger(observed, 1);
    sums[3] = worst;
  }
};

}  // namespace

void batched_verdict_judge(const BatchedVerdict& args, int64_t matrix, int64_t slot) {
  solve_task<Judge>(args, matrix, slot);
}

}  // namespace fastpref::FASTPREF_SIMD

#if defined(FASTPREF_SIMD_baseline)  // the entry points, once

namespace fastpref {

int64_t batched_verdict_workspace(int64_t rows, int64_t columns, int64_t rank) {
  BatchedVerdict args{};
  args.rows = rows, args.columns = columns, args.rank = rank;
  return baseline::workspace_of<baseline::Judge, double>(args);
}

void batched_verdict_cpu(const BatchedVerdict& args, int threads) {
  solve_each<batched_verdict_judge>(args, args.batch, threads);
}

}  // namespace fastpref

#endif
