// The convex program, one matrix per task. What an iteration knows of A = D - S + Y / mu are its k leading singular
// vectors, k a few more than the rank: P = orth(A Q), Z = A^T P, and Jacobi rotations turn the columns of Z into
// V Sigma, V being the next Q. All of D, the dual matrix and A stay in cache; nothing is summed across lanes but the
// rotations' dot products.
#include "batched_ialm.h"

#include "batch.h"
#include "jacobi.h"
#include "order_statistic.h"

namespace fastpref {

FASTPREF_DISPATCH(batched_ialm_solve, BatchedIalm)  // (matrix, slot)

}  // namespace fastpref

namespace fastpref::FASTPREF_SIMD {
namespace {

// as in fastpref/_lowrank/ialm.py
constexpr double closed = 1e-3, balance = 0.1, settled = 1e-4, most_lowered = 1e-4, least_lowered = 0.1, faint = 100,
                 first_mu = 1.25, top_mu = 1e7, rho = 1.5;
constexpr int64_t pause = 5, extra = 5, first_directions = 15;

constexpr int sweeps = 30;  // of rotations; 1 is usual, as the last iteration's vectors nearly fit
constexpr int norm_rounds = 2;
constexpr double margin = 1e-4;      // relative, of the bound on a spectral norm
constexpr double skewness = 0.3;     // of P's columns, from which one Cholesky round leaves them orthogonal to rounding
constexpr double indifferent = 0.1;  // cosine of two directions, both below the threshold, that are left as they are

template <class T>
struct Solver {
  static constexpr int n = Lanes<T>::n;
  static constexpr T epsilon = sizeof(T) == 8 ? T(0x1p-53) : T(0x1p-24);
  using Vt = V<T>;
  using I = typename Lanes<T>::I;

  const BatchedIalm& args;
  const bool wide;                          // then all is transposed
  const int64_t rows, columns, stride;      // rows >= columns
  T *data, *dual, *a;                       // [rows, stride]; dual is Y / mu; the padding of all three is 0
  T *left, *other, *low;                    // [rows, width]; low and right are L's factors
  T* basis;                                 // [columns, width]
  T *right, *sorted, *saved;                // [columns, stride], the first k rows
  T *turn, *core, *gram, *half, *products;  // [columns, stride]
  T *squares, *sigma, *excess;              // [stride]
  T *dots, *first, *second, *cosine, *sine;
  int32_t* order;

  Solver(const BatchedIalm& args, Workspace& workspace, int64_t lanes)
      : args(args),
        wide(args.columns > args.rows),
        rows(wide ? args.columns : args.rows),
        columns(wide ? args.rows : args.columns),
        stride(round_up(columns, lanes)) {
    T** const matrices[] = {&data, &dual, &a, &left, &other, &low};
    T** const squares_of[] = {&basis, &right, &sorted, &saved, &turn, &core, &gram, &half, &products};
    T** const lines[] = {&squares, &sigma, &excess, &dots, &first, &second, &cosine, &sine};
    for (T** matrix : matrices) *matrix = workspace.take<T>(rows * stride);
    for (T** square : squares_of) *square = workspace.take<T>(columns * stride);
    for (T** line : lines) *line = workspace.take<T>(2 * stride);
    order = workspace.take<int32_t>(2 * stride);
  }

  int64_t observed = 0, k = 0, width = 0;   // width: k in whole vectors
  double norm = 0, largest = 0, scale = 1;  // of what is stored, and what that was divided by
  uint64_t state = 0;

  double draw() {  // uniform in (-1, 1)
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<double>(static_cast<int64_t>(state)) * 0x1p-63;
  }

  void draw_row(T* row) {
    for (int64_t j = 0; j < columns; j++) row[j] = static_cast<T>(draw());
    for (int64_t j = columns; j < stride; j++) row[j] = 0;
  }

  // ---- products ----

  // out[t] = sum over s of scalars[t * apart + s * along] * vectors[s], VECTORS vectors each
  template <int ROWS, int VECTORS>
  static inline void tile(const T* scalars, int64_t apart, int64_t along, int64_t length, const T* vectors,
                          int64_t vectors_stride, T* out, int64_t out_stride) {
    Vt sum[ROWS][VECTORS] = {};
    for (int64_t s = 0; s < length; s++) {
      Vt v[VECTORS];
      for (int u = 0; u < VECTORS; u++) v[u] = load_at(vectors + s * vectors_stride + u * n);
      for (int t = 0; t < ROWS; t++) {
        const T scalar = scalars[t * apart + s * along];
        for (int u = 0; u < VECTORS; u++) sum[t][u] += v[u] * scalar;
      }
    }
    for (int t = 0; t < ROWS; t++)
      for (int u = 0; u < VECTORS; u++) store_at(out + t * out_stride + u * n, sum[t][u]);
  }

  template <int VECTORS>
  static void strip(const T* scalars, int64_t apart, int64_t along, int64_t count, int64_t length, const T* vectors,
                    int64_t vectors_stride, T* out, int64_t out_stride) {
    int64_t t = 0;
    for (; t + 8 <= count; t += 8)
      tile<8, VECTORS>(scalars + t * apart, apart, along, length, vectors, vectors_stride, out + t * out_stride,
                       out_stride);
    for (; t + 2 <= count; t += 2)
      tile<2, VECTORS>(scalars + t * apart, apart, along, length, vectors, vectors_stride, out + t * out_stride,
                       out_stride);
    if (t < count)
      tile<1, VECTORS>(scalars + t * apart, apart, along, length, vectors, vectors_stride, out + t * out_stride,
                       out_stride);
  }

  static __attribute__((noinline)) void product(const T* scalars, int64_t apart, int64_t along, int64_t count,
                                                int64_t length, const T* vectors, int64_t vectors_stride, T* out,
                                                int64_t out_stride, int64_t size) {
    int64_t j = 0;
    for (; j + 2 * n <= size; j += 2 * n)
      strip<2>(scalars, apart, along, count, length, vectors + j, vectors_stride, out + j, out_stride);
    if (j < size) strip<1>(scalars, apart, along, count, length, vectors + j, vectors_stride, out + j, out_stride);
  }

  // ---- the leading singular vectors ----

  // left becomes orthonormal; columns that depend on those before them become zero
  void orthonormalise() {
    for (int round = 0; round < 2; round++) {
      product(left, 1, width, k, rows, left, width, gram, width, width);
      std::memset(half, 0, k * width * sizeof(T));
      T least = 1;
      for (int64_t p = 0; p < k; p++) {
        const T square = gram[p * width + p];
        squares[p] = square > 0 ? static_cast<T>(1 / __builtin_sqrt(square)) : T(0);
      }
      for (int64_t p = k; p < width; p++) squares[p] = 0;
      for (int64_t p = 0; p < k; p++) {
        for (int64_t c = 0; c < width; c += n)
          store_at(gram + p * width + c, load_at(gram + p * width + c) * load_at(squares + c) * squares[p]);
        half[p * width + p] = squares[p];
      }
      for (int64_t p = 0; p < k; p++) {  // elimination: half becomes R^-T
        const T pivot = gram[p * width + p];
        const bool used = pivot > 4 * epsilon * static_cast<T>(rows);
        if (used && pivot < least) least = pivot;
        const T factor = used ? static_cast<T>(1 / __builtin_sqrt(pivot)) : T(0);
        for (int64_t c = 0; c < width; c += n) {
          store_at(gram + p * width + c, load_at(gram + p * width + c) * factor);
          store_at(half + p * width + c, load_at(half + p * width + c) * factor);
        }
        if (!used) continue;
        for (int64_t r = p + 1; r < k; r++) {
          const T share = gram[p * width + r];
          for (int64_t c = 0; c < width; c += n) {
            store_at(gram + r * width + c, load_at(gram + r * width + c) - load_at(gram + p * width + c) * share);
            store_at(half + r * width + c, load_at(half + r * width + c) - load_at(half + p * width + c) * share);
          }
        }
      }
      std::memset(core, 0, k * width * sizeof(T));
      for (int64_t p = 0; p < k; p++)
        for (int64_t r = p; r < k; r++) core[p * width + r] = half[r * width + p];
      product(left, width, 1, rows, k, core, width, other, width, width);
      T* swap = left;
      left = other;
      other = swap;
      if (least > skewness) break;
    }
  }

  static inline T dot(const T* x, const T* y, int64_t length) {
    Vt sum{};
    for (int64_t j = 0; j < length; j += n) sum += load_at(x + j) * load_at(y + j);
    return sum_of<T>(sum);
  }

  // Rotates the first k rows of right until they are orthogonal; row c of turn is column c of the rotation.
  void rotate(T threshold) {
    const T tight2 = 64 * epsilon * epsilon * static_cast<T>(columns);
    const T coarse2 = static_cast<T>(__builtin_sqrt(tight2));  // a sweep of smaller ones squares what is left
    const T loose2 = static_cast<T>(indifferent * indifferent), small = threshold * threshold;
    std::memset(turn, 0, k * width * sizeof(T));
    for (int64_t c = 0; c < k; c++) turn[c * width + c] = 1;
    const int64_t players = k + k % 2, pairs = players / 2;
    for (int64_t c = 0; c < players; c++) order[c] = static_cast<int32_t>(c);
    for (int64_t i = pairs; i < round_up(pairs, n); i++) dots[i] = first[i] = second[i] = 0;
    for (int sweep = 0; sweep < sweeps; sweep++) {
      T top = 0;
      for (int64_t c = 0; c < k; c++) {
        squares[c] = dot(right + c * stride, right + c * stride, stride);
        if (squares[c] > top) top = squares[c];
      }
      const T floor = top * (epsilon * epsilon);
      I unfinished{};
      for (int64_t stage = 0; stage + 1 < players; stage++) {
        for (int64_t i = 0; i < pairs; i++) {
          const int64_t p = order[i], q = order[players - 1 - i];
          const bool bye = p >= k || q >= k;
          first[i] = bye ? T(0) : squares[p];
          second[i] = bye ? T(0) : squares[q];
          dots[i] = bye ? T(0) : dot(right + p * stride, right + q * stride, stride);
        }
        for (int64_t i = 0; i < pairs; i += n) {
          const Vt alpha = load_at(first + i), beta = load_at(second + i), c = load_at(dots + i);
          const Vt bound = ((alpha < small) & (beta < small)) ? Vt{} + loose2 : Vt{} + tight2;
          const I turns = (c * c > bound * alpha * beta) & (alpha > floor) & (beta > floor);
          unfinished |= turns & (c * c > coarse2 * alpha * beta);
          const Vt zeta = (beta - alpha) / (2 * (turns ? c : Vt{} + 1));
          const Vt size = 1 / (abs_of<T>(zeta) + root(1 + zeta * zeta));
          const Vt tangent = turns ? (zeta < 0 ? -size : size) : Vt{};
          const Vt cs = 1 / root(1 + tangent * tangent);
          store_at(cosine + i, cs);
          store_at(sine + i, cs * tangent);
          store_at(first + i, alpha - tangent * c);
          store_at(second + i, beta + tangent * c);
        }
        for (int64_t i = 0; i < pairs; i++) {
          if (sine[i] == 0) continue;
          const int64_t p = order[i], q = order[players - 1 - i];
          squares[p] = first[i];
          squares[q] = second[i];
          turn_rows(right + p * stride, right + q * stride, stride, cosine[i], sine[i]);
          turn_rows(turn + p * width, turn + q * width, width, cosine[i], sine[i]);
        }
        const int32_t last = order[players - 1];  // round robin: all but the first move on
        for (int64_t c = players - 1; c > 1; c--) order[c] = order[c - 1];
        order[1] = last;
      }
      if (!any(unfinished)) break;
    }
  }

  static inline void turn_rows(T* x, T* y, int64_t length, T cs, T sn) {
    for (int64_t j = 0; j < length; j += n) {
      const Vt v = load_at(x + j), w = load_at(y + j);
      store_at(x + j, v * cs - w * sn);
      store_at(y + j, v * sn + w * cs);
    }
  }

  // A step of subspace iteration on `matrix` [rows, stride]: sigma, descending, the rows of right as their vectors, and
  // core such that left core are those of the other side.
  void subspace(const T* matrix, T threshold) {
    width = round_up(k, n);
    for (int64_t c = 0; c < k; c++)
      for (int64_t j = 0; j < columns; j++) basis[j * width + c] = right[c * stride + j];
    for (int64_t c = k; c < width; c++)
      for (int64_t j = 0; j < columns; j++) basis[j * width + c] = 0;
    product(matrix, stride, 1, rows, columns, basis, width, left, width, width);
    orthonormalise();
    product(left, 1, width, k, rows, matrix, stride, right, stride, stride);
    rotate(threshold);
    for (int64_t c = 0; c < k; c++) squares[c] = dot(right + c * stride, right + c * stride, stride);
    for (int64_t c = 0; c < k; c++) {
      int64_t best = -1;
      for (int64_t r = 0; r < k; r++)
        if (squares[r] >= 0 && (best < 0 || squares[r] > squares[best])) best = r;
      const T size = static_cast<T>(__builtin_sqrt(squares[best]));
      squares[best] = -1;
      sigma[c] = size;
      for (int64_t r = 0; r < k; r++) core[r * width + c] = turn[best * width + r];
      if (size > epsilon * epsilon) {
        for (int64_t j = 0; j < stride; j += n)
          store_at(sorted + c * stride + j, load_at(right + best * stride + j) * (1 / size));
      } else {
        draw_row(sorted + c * stride);  // a direction that was lost
      }
    }
    T* swap = right;
    right = sorted;
    sorted = swap;
  }

  // ---- the duality gap ----

  // Whether bound^2 - dual^T dual is positive definite, by elimination; products holds dual^T dual
  bool is_bound(double bound) {
    for (int64_t i = 0; i < columns; i++) {
      for (int64_t j = 0; j < stride; j += n) store_at(half + i * stride + j, -load_at(products + i * stride + j));
      half[i * stride + i] = static_cast<T>(bound * bound + half[i * stride + i]);
    }
    for (int64_t p = 0; p < columns; p++) {
      const T* row = half + p * stride;
      if (!(row[p] > 0)) return false;
      const T inverse = 1 / row[p];
      for (int64_t r = p + 1; r < columns; r++) {
        const T share = row[r] * inverse;
        for (int64_t j = r / n * n; j < stride; j += n)
          store_at(half + r * stride + j, load_at(half + r * stride + j) - load_at(row + j) * share);
      }
    }
    return true;
  }

  // An upper bound of |dual|_2, at most `margin` above it
  double dual_norm_above() {
    product(dual, 1, stride, columns, rows, dual, stride, products, stride, stride);
    std::memcpy(saved, right, k * stride * sizeof(T));
    subspace(dual, 0);
    std::memcpy(right, saved, k * stride * sizeof(T));
    const double about = larger(sigma[0], 1e-15);
    double low = 0, high = margin;
    while (high < 1e30 && !is_bound(about * (1 + high))) {
      low = high;
      high *= 2;
    }
    while (high - low > margin * (1 + low)) {
      const double middle = (low + high) / 2;
      (is_bound(about * (1 + middle)) ? high : low) = middle;
    }
    return about * (1 + high);
  }

  // after an iteration, a holding D - S + ratio Y / mu
  double duality_gap(double lam, double nuclear, double ratio) {
    double sum = 0, inner = 0, most = 0;
    for (int64_t i = 0; i < rows; i++) {
      Vt s1{}, s2{}, top{};
      for (int64_t j = i * stride; j < (i + 1) * stride; j += n) {
        const Vt d = load_at(data + j), y = load_at(dual + j);
        const Vt sparse = d + y * static_cast<T>(ratio) - load_at(a + j);
        const auto present = d == d;
        s1 += present ? abs_of<T>(sparse) : Vt{};
        s2 += present ? y * d : Vt{};
        const Vt size = abs_of<T>(y);
        top = size > top ? size : top;
      }
      sum += sum_of<T>(s1);
      inner += sum_of<T>(s2);
      most = larger(most, max_of<T>(top));
    }
    const double size = larger(larger(dual_norm_above(), most / lam), 1e-300);
    return 1 - inner / size / larger(nuclear + lam * sum, 1e-300);
  }

  // ---- iterations ----

  // data, scaled by a power of two so that squares neither over- nor underflow; a, the same with zeros where missing
  void read(int64_t b) {
    const T* in = static_cast<const T*>(args.data) + b * rows * columns;
    Vt top{};
    I present{};
    for (int64_t i = 0; i < rows; i++) {
      T* row = data + i * stride;
      if (wide)
        for (int64_t j = 0; j < columns; j++) row[j] = in[j * rows + i];
      else
        std::memcpy(row, in + i * columns, columns * sizeof(T));
      for (int64_t j = columns; j < stride; j++) row[j] = 0;
      for (int64_t j = 0; j < stride; j += n) {
        const Vt size = abs_of<T>(load_at(row + j));
        top = size > top ? size : top;
        present -= size == size;
      }
    }
    observed = count_of<T>(present) - rows * (stride - columns);
    largest = max_of<T>(top);
    const int exponent = largest > 0 ? __builtin_ilogb(largest) : 0;
    scale = __builtin_ldexp(1.0, exponent);
    largest /= scale;
    // in two factors: one alone can overflow for subnormal matrices
    const T up = static_cast<T>(__builtin_ldexp(1.0, -exponent / 2));
    const T down = static_cast<T>(__builtin_ldexp(1.0, -exponent - -exponent / 2));
    double squares_sum = 0;
    for (int64_t i = 0; i < rows; i++) {
      Vt sum{};
      for (int64_t j = i * stride; j < (i + 1) * stride; j += n) {
        const Vt value = load_at(data + j) * up * down, known = value == value ? value : Vt{};
        store_at(data + j, value);
        store_at(a + j, known);
        sum += known * known;
      }
      squares_sum += sum_of<T>(sum);
    }
    norm = __builtin_sqrt(squares_sum);
  }

  struct Step {
    double moved = 0, changed = 0, size = 0;  // |Y - previous Y| / mu, |S - previous S|, |Y| / mu; squared
  };

  // L from its factors, then S, Y and the next A, of D - S + next Y / mu
  Step shrink(int64_t rank, double threshold, double ratio, double next) {
    const Vt bound = Vt{} + static_cast<T>(threshold), own = Vt{} + static_cast<T>(ratio);
    const Vt after = Vt{} + static_cast<T>(1 + next);
    Step step;
    for (int64_t i = 0; i < rows; i++) {
      Vt moved{}, changed{}, size{};
      for (int64_t j = 0; j < stride; j += n) {
        Vt value{};
        for (int64_t c = 0; c < rank; c++) value += load_at(right + c * stride + j) * low[i * width + c];
        const int64_t at = i * stride + j;
        const Vt y = load_at(dual + at) * own, rest = value - y, w = load_at(data + at) - rest;
        Vt kept = w > bound ? bound : w;
        kept = kept < -bound ? -bound : kept;
        kept = w == w ? kept : Vt{};
        const Vt change = load_at(a + at) - value - kept;  // where missing, of L
        store_at(dual + at, kept);
        store_at(a + at, rest + kept * after);
        moved += (kept - y) * (kept - y);
        changed += change * change;
        size += kept * kept;
      }
      step.moved += sum_of<T>(moved);
      step.changed += sum_of<T>(changed);
      step.size += sum_of<T>(size);
    }
    return step;
  }

  struct Outcome {
    int64_t rank = 0, iterations = 0;
    double residual = 0, gap = __builtin_nan(""), dense_share = 0;
    bool converged = false;
  };

  // Y / mu from a, and the first A
  void start_dual(double size, double mu) {
    const T share = static_cast<T>(1 / size / mu);
    for (int64_t j = 0; j < rows * stride; j += n) {
      const Vt known = load_at(a + j), y = known * share;
      store_at(dual + j, y);
      store_at(a + j, known + y);
    }
  }

  // The left factor of L = A with its singular values lowered by `threshold`; their sum, and the rank
  double shrink_spectrum(double threshold, int64_t& rank) {
    double nuclear = 0;
    for (rank = 0; rank < k && sigma[rank] > static_cast<T>(threshold); rank++) {
      excess[rank] = static_cast<T>(sigma[rank] - threshold);
      nuclear += excess[rank];
    }
    for (int64_t c = 0; c < k; c++)
      for (int64_t r = 0; r < k; r++) core[c * width + r] = r < rank ? core[c * width + r] * excess[r] : T(0);
    product(left, width, 1, rows, k, core, width, low, width, round_up(rank, n));
    return nuclear;
  }

  void change_ratio(double change) {  // of Y / mu in a
    const T correction = static_cast<T>(change);
    for (int64_t j = 0; j < rows * stride; j += n) store_at(a + j, load_at(a + j) + load_at(dual + j) * correction);
  }

  void follow_rank(int64_t rank) {  // a few directions more than are used
    const int64_t more = rank < k - extra || columns < 40 ? 1 : columns / 20;
    const int64_t wanted = smaller(rank + more + extra, columns);
    for (; k < wanted; k++) draw_row(right + k * stride);
    k = wanted;
  }

  double dense_share(double threshold) const {  // an entry of S is not zero where Y is at its bound
    I at_bound{};
    for (int64_t j = 0; j < rows * stride; j += n)
      at_bound -= abs_of<T>(load_at(dual + j)) == static_cast<T>(threshold);
    return double(count_of<T>(at_bound)) / double(observed);
  }

  Outcome iterate(double lam) {
    Outcome found;
    state = 1;
    k = smaller(columns, first_directions);
    for (int64_t c = 0; c < k; c++) draw_row(right + c * stride);
    for (int round = 0; round < norm_rounds; round++) subspace(a, static_cast<T>(norm));
    const double spectral = sigma[0], start = first_mu / spectral, top = top_mu * start;
    double mu = start, ratio = 1, threshold = 0;
    bool balanced = observed < rows * columns;
    int64_t steps = 1, next_look = 0;
    start_dual(larger(spectral, largest / lam), mu);
    while (found.iterations < args.max_iter) {
      found.iterations++;
      const double inverse_mu = 1 / mu;
      for (int64_t step = 0; step < steps; step++) subspace(a, static_cast<T>(inverse_mu));
      const double nuclear = shrink_spectrum(inverse_mu, found.rank);
      threshold = lam * inverse_mu;
      const double raised = smaller(rho * mu, top);
      const Step step = shrink(found.rank, threshold, ratio, mu / raised);
      const double residual = found.residual = __builtin_sqrt(step.moved) / norm;
      const double change = __builtin_sqrt(step.changed / larger(step.size, 1e-300));
      double after = balanced && residual < balance * change ? mu : raised;
      if (residual < args.tol && found.iterations >= next_look && (!balanced || change < settled)) {
        found.gap = duality_gap(lam, nuclear, mu / raised);
        found.converged = found.gap <= closed;
        if (found.converged) break;
        if (balanced)
          steps++;
        else
          after = mu * larger(smaller(residual / larger(balance * change, 1e-300), least_lowered), most_lowered);
        balanced = true;
        next_look = found.iterations + pause;
      }
      ratio = mu / after;
      if (after != raised) change_ratio(ratio - mu / raised);
      mu = after;
      follow_rank(found.rank);
    }
    found.dense_share = dense_share(threshold);
    int64_t certain = 0;  // singular values of rounding's size are none
    while (certain < found.rank && excess[certain] > faint * args.tol * excess[0]) certain++;
    found.rank = certain;
    return found;
  }

  void run(int64_t b) {
    read(b);
    Outcome found;
    if (norm > 0)
      found = iterate(args.lam[b]);
    else
      found.converged = observed > 0;
    write(b, found.rank);
    args.rank[b] = found.rank;
    args.iterations[b] = found.iterations;
    args.residual[b] = found.residual;
    args.gap[b] = found.gap;
    args.dense_share[b] = found.dense_share;
    args.converged[b] = found.converged;
  }

  void write(int64_t b, int64_t rank) {
    T* tall = static_cast<T*>(wide ? args.right : args.left) + b * columns * rows;
    T* flat = static_cast<T*>(wide ? args.left : args.right) + b * columns * columns;
    T* values = static_cast<T*>(args.sigma) + b * columns;
    for (int64_t c = 0; c < rank; c++) {
      values[c] = static_cast<T>(excess[c] * scale);
      for (int64_t i = 0; i < rows; i++) tall[c * rows + i] = low[i * width + c] / excess[c];
      for (int64_t j = 0; j < columns; j++) flat[c * columns + j] = right[c * stride + j];
    }
    Vt top{};
    for (int64_t i = 0; i < rows; i++) {
      for (int64_t j = 0; j < stride; j += n) {
        Vt value = load_at(data + i * stride + j);
        for (int64_t c = 0; c < rank; c++) value -= load_at(right + c * stride + j) * low[i * width + c];
        value = abs_of<T>(value);
        store_at(a + i * stride + j, value);
        top = value > top ? value : top;  // not of a missing entry, which is NaN
      }
      for (int64_t j = columns; j < stride; j++) a[i * stride + j] = static_cast<T>(__builtin_nan(""));
    }
    args.median[b] = observed ? scale * order_statistic(a, rows * stride, (observed + 1) / 2, max_of<T>(top)) : 0;
  }
};

}  // namespace

void batched_ialm_solve(const BatchedIalm& args, int64_t matrix, int64_t slot) {
  solve_task<Solver>(args, matrix, slot);
}

}  // namespace fastpref::FASTPREF_SIMD

#if defined(FASTPREF_SIMD_baseline)  // the entry points, once

namespace fastpref {

int64_t batched_ialm_workspace(int64_t rows, int64_t columns, bool is_double) {
  BatchedIalm args{};
  args.is_double = is_double;
  args.rows = rows, args.columns = columns;
  return baseline::workspace_bytes<baseline::Solver>(args);
}

void batched_ialm_cpu(const BatchedIalm& args, int threads) {
  solve_each<batched_ialm_solve>(args, args.batch, threads);
}

}  // namespace fastpref

#endif
