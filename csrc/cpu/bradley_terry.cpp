// Robust Bradley-Terry fits on the CPU: a whole solve per matrix from cache (dense), or rows in parallel (edges).
// Every iteration forms per pair a pull q_ij on the scores and a weight h_ij, then solves the Laplacian system
//   sum_j h_ij (x_i - x_j) + ridge x_i = sum_j q_ij - ridge w_i,   w += x:
// on complete graphs by one Jacobi sweep, which is then nearly exact, elsewhere by preconditioned conjugate gradients.
#include "bradley_terry.h"

#include <type_traits>

#include "batch.h"

namespace fastpref::FASTPREF_SIMD {
namespace {

constexpr double mad_to_sigma = 1.4826;     // of a normal distribution
constexpr double constant_per_sigma = 2.4;  // 95 % efficiency of Cauchy weights is at 2.385
constexpr double logit_floor = 1e-4;        // of the annealing, in units of the mean |logit|
// by now it is known which logits are wrong, and what they still pull falls with the square of the constant
constexpr double logit_early = 0.1, logit_decay = 0.7, logit_late_decay = 0.4;
constexpr double count_start = 20, count_decay = 0.8, count_floor = 3;
constexpr double count_ridge = 1e-2;
constexpr double outlier_sigmas = 5;
constexpr double nan = __builtin_nan("");

inline double exponential(double x) { return __builtin_exp(x); }
inline Vf exponential(Vf x) { return exp(x); }

inline V<double> exponential(V<double> z) {  // z <= 700
  constexpr double round_to_bits = 6755399441055744.0 + 1023.0;
  const V<double> shifted = z * 1.4426950408889634 + round_to_bits;
  const V<double> n = shifted - round_to_bits;
  const V<double> r = (z - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;
  V<double> p = V<double>{} + 1.0 / 6227020800.0;  // Taylor: 4e-18 of the value at |r| = ln 2 / 2
  constexpr double inverse_factorial[] = {
      1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720,
      1.0 / 120,       1.0 / 24,       1.0 / 6,       0.5,          1.0,         1.0};
  for (double c : inverse_factorial) p = p * r + c;
  const V<double> e = p * (V<double>)((Lanes<double>::I)shifted << 52);
  return z < -700.0 ? V<double>{} : e;
}

template <class Vt>
inline Vt reciprocal(Vt x) {
  return 1 / x;
}
#if defined(FASTPREF_SIMD_avx512)
template <>
inline Vf reciprocal(Vf x) {         // 14 bits and a Newton step: half the time of a division
  x = x > 1e37f ? splat(1e37f) : x;  // the step below would make NaN of 1 / infinity
  const Vf y = (Vf)_mm512_maskz_rcp14_ps(0xffff, (__m512)x);
  return y * (2.0f - x * y);
}
#endif

// To 14 bits, which is enough for weights while the annealing only has to find out which logits are wrong.
template <class Vt>
inline Vt rough_reciprocal(Vt x) {
  return reciprocal(x);
}
#if defined(FASTPREF_SIMD_avx512)
template <>
inline Vf rough_reciprocal(Vf x) {
  return (Vf)_mm512_maskz_rcp14_ps(0xffff, (__m512)x);
}
#endif

template <class Vt>
struct Term {
  Vt residual, pull, weight;
};

// One pair at difference d = w_i - w_j; `precision` is 1 / constant^2. A missing value gives a NaN residual.
template <bool ROUGH, class Vt>
inline Term<Vt> logit_term(Vt value, Vt d, Vt precision) {
  const Vt r = value - d, inverse = 1 + r * r * precision;
  const Vt weight = ROUGH ? rough_reciprocal<Vt>(inverse) : reciprocal<Vt>(inverse);
  return {r, weight * r, weight};
}

template <bool ROBUST, class Vt>
inline Term<Vt> count_term(Vt share, Vt votes, Vt d, Vt precision) {
  const Vt low = Vt{} - 80;
  const Vt s = reciprocal<Vt>(1 + exponential(-(d < low ? low : d)));
  const Vt variance = s * (1 - s), miss = (share - s) * votes;
  const Vt spread = variance * votes + Vt(Vt{} + 1) / 4;  // of the wins, softened by half a vote
  const Vt squared = miss * miss / spread;                // z^2
  if constexpr (!ROBUST) return {squared, miss, votes * variance};
  const Vt weight = reciprocal<Vt>(1 + squared * precision);
  return {squared, weight * miss, weight * votes * variance};
}

template <BradleyTerryData DATA, bool ROUGH = false, class Vt>
inline Term<Vt> pair_term(Vt value, Vt votes, Vt d, Vt precision) {
  if constexpr (DATA == BradleyTerryData::logits) return logit_term<ROUGH>(value, d, precision);
  return count_term<DATA == BradleyTerryData::counts>(value, votes, d, precision);
}

template <class T>
double largest_of(const T* values, int64_t n) {
  using Vt = V<T>;
  Vt most{};
  int64_t i = 0;
  for (; i + Lanes<T>::n <= n; i += Lanes<T>::n) {
    const Vt v = load_at(values + i), size = v < 0 ? -v : v;
    most = size <= most ? most : size;
  }
  double all = 0;
  for (; i < n; i++) all = magnitude(values[i]) <= all ? all : magnitude(values[i]);
  for (int l = 0; l < Lanes<T>::n; l++) all = most[l] <= all ? all : static_cast<double>(most[l]);
  return all;
}

template <class T>
inline T root(T x) {
  return static_cast<T>(__builtin_sqrt(static_cast<double>(x)));
}

// A dense matrix and its workspace; rows are padded with NaN to whole vectors.
template <class T, BradleyTerryData DATA>
struct DenseGraph {
  using Vt = V<T>;
  static constexpr int lanes = Lanes<T>::n;
  using Value = T;
  int64_t items, stride;
  T* values;
  const T* votes;
  T* weights;
  int64_t* row_counts;

  // Sums run down the columns, which needs no sum over lanes: pulls are skew-symmetric, the rest symmetric. f(n, j)
  // takes n vectors of columns from j on.
  template <class F>
  void column_blocks(const F& f) const {
    int64_t j = 0;
    for (; j + 2 * lanes <= stride; j += 2 * lanes) f(std::integral_constant<int, 2>{}, j);
    if (j < stride) f(std::integral_constant<int, 1>{}, j);
  }

  template <bool ROUGH = false>
  Term<Vt> at(int64_t i, int64_t j, const T* w, Vt w_columns, Vt precision) const {
    Vt k{};
    if constexpr (DATA != BradleyTerryData::logits) k = load_at(votes + i * stride + j);
    return pair_term<DATA, ROUGH, Vt>(load_at(values + i * stride + j), k, w[i] - w_columns, precision);
  }

  // gradient_i = sum of pulls, degree_i = sum of weights; returns the number of |residual| <= bound (logits). Keeps the
  // weights, unless the graph is complete.
  int64_t pass(const T* w, T precision, T bound, bool complete, bool rough, T* gradient, T* degree) const {
    if (!complete) return sums<false, false>(w, precision, bound, gradient, degree);
    for (int64_t i = 0; i < items; i++) values[i * stride + i] = 0;  // nothing is missing then, and nothing tested
    const int64_t within = rough ? sums<true, true>(w, precision, bound, gradient, degree)
                                 : sums<true, false>(w, precision, bound, gradient, degree);
    for (int64_t i = 0; i < items; i++) {
      values[i * stride + i] = static_cast<T>(nan);
      degree[i] -= 1;
    }
    return within - items;
  }

  template <bool COMPLETE, bool ROUGH>
  int64_t sums(const T* w, T precision, T bound, T* gradient, T* degree) const {
    int64_t within = 0;
    column_blocks([&](auto block, int64_t j) {
      constexpr int n = block.value;
      const Vt zero{}, one = zero + T(1), precisions = zero + precision, bounds = zero + bound * bound;
      Vt pull[n] = {}, weight[n] = {}, inside[n] = {}, w_columns[n];
      for (int u = 0; u < n; u++) w_columns[u] = load_at(w + j + u * lanes);
      for (int64_t i = 0; i < items; i++)
        for (int u = 0; u < n; u++) {
          const Term<Vt> t = at<ROUGH>(i, j + u * lanes, w, w_columns[u], precisions);
          Vt h = t.weight, q = t.pull;
          if constexpr (!COMPLETE) {
            const auto seen = t.residual == t.residual;
            h = seen ? h : zero;
            q = seen ? q : zero;
          }
          pull[u] -= q;
          weight[u] += h;
          if constexpr (DATA == BradleyTerryData::logits) inside[u] += t.residual * t.residual <= bounds ? one : zero;
          if constexpr (!COMPLETE) store_at(weights + i * stride + j + u * lanes, h);
        }
      for (int u = 0; u < n; u++) {
        store_at(gradient + j + u * lanes, pull[u]);
        store_at(degree + j + u * lanes, weight[u]);
        if constexpr (DATA == BradleyTerryData::logits)
          for (int l = 0; l < lanes && j + u * lanes + l < items; l++) within += static_cast<int64_t>(inside[u][l]);
      }
    });
    return within;
  }

  void product(const T* p, T* y) const {  // y_i = sum_j h_ij p_j
    column_blocks([&](auto block, int64_t j) {
      constexpr int n = block.value;
      Vt even[n] = {}, odd[n] = {};
      int64_t i = 0;
      for (; i + 2 <= items; i += 2)
        for (int u = 0; u < n; u++) {
          even[u] += load_at(weights + i * stride + j + u * lanes) * p[i];
          odd[u] += load_at(weights + (i + 1) * stride + j + u * lanes) * p[i + 1];
        }
      for (int u = 0; u < n; u++) {
        if (i < items) even[u] += load_at(weights + i * stride + j + u * lanes) * p[i];
        even[u] += odd[u];
        store_at(y + j + u * lanes, even[u]);
      }
    });
  }

  void residuals(const T* w) const {  // |residual| (counts: its square) instead of the weights; NaN: missing
    column_blocks([&](auto block, int64_t j) {
      for (int u = 0; u < block.value; u++, j += lanes) {
        const Vt w_columns = load_at(w + j);
        for (int64_t i = 0; i < items; i++) {
          Vt r = at(i, j, w, w_columns, Vt{}).residual;
          r = r < 0 ? -r : r;
          store_at(weights + i * stride + j, r);
        }
      }
    });
  }

  int64_t number_within(T bound) const {  // of residuals <= bound
    constexpr int apart = 4;
    using Counts = typename Lanes<T>::I;
    Counts counts[apart] = {};
    const int64_t vectors = items * (stride / lanes);
    int64_t k = 0;
    for (; k + apart <= vectors; k += apart)
      for (int u = 0; u < apart; u++) counts[u] -= load_at(weights + (k + u) * lanes) <= bound;
    for (; k < vectors; k++) counts[0] -= load_at(weights + k * lanes) <= bound;
    return count_of<T>((counts[0] + counts[1]) + (counts[2] + counts[3]));
  }

  int64_t count_within(T bound) const {  // the same, and per row
    int64_t within = 0;
    column_blocks([&](auto block, int64_t j) {
      constexpr int n = block.value;
      const Vt zero{}, one = zero + T(1);
      Vt inside[n] = {};
      for (int64_t i = 0; i < items; i++)
        for (int u = 0; u < n; u++) inside[u] += load_at(weights + i * stride + j + u * lanes) <= bound ? one : zero;
      for (int u = 0; u < n; u++)
        for (int l = 0; l < lanes && j + u * lanes + l < items; l++) {
          row_counts[j + u * lanes + l] = static_cast<int64_t>(inside[u][l]);
          within += row_counts[j + u * lanes + l];
        }
    });
    return within;
  }
};

// An edge list by rows, in double; rows run in parallel, each on one thread.
template <BradleyTerryData DATA>
struct EdgeGraph {
  using Value = double;
  static constexpr int64_t chunk = 512;
  const BradleyTerryEdges& edges;
  int64_t items;
  int64_t* row_counts;

  template <class F>
  void rows(const F& f) const {
    parallel_for(items, chunk, edges.threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) f(i, edges.offsets[i], edges.offsets[i + 1]);
    });
  }

  Term<double> at(int64_t e, double w_i, const double* w, double precision) const {
    const double votes = DATA == BradleyTerryData::logits ? 0 : edges.votes[e];
    return pair_term<DATA, false, double>(edges.values[e], votes, w_i - w[edges.columns[e]], precision);
  }

  int64_t pass(const double* w, double precision, double bound, bool, bool, double* gradient, double* degree) const {
    rows([&](int64_t i, int64_t begin, int64_t end) {
      double pull = 0, weight = 0;
      int64_t within = 0;
      for (int64_t e = begin; e < end; e++) {
        const Term<double> t = at(e, w[i], w, precision);
        pull += t.pull;
        weight += t.weight;
        within += magnitude(t.residual) <= bound;
        edges.weights[e] = t.weight;
      }
      gradient[i] = pull;
      degree[i] = weight;
      row_counts[i] = within;
    });
    return total();
  }

  void product(const double* p, double* y) const {
    rows([&](int64_t i, int64_t begin, int64_t end) {
      double sum = 0;
      for (int64_t e = begin; e < end; e++) sum += edges.weights[e] * p[edges.columns[e]];
      y[i] = sum;
    });
  }

  void residuals(const double* w) const {
    rows([&](int64_t i, int64_t begin, int64_t end) {
      for (int64_t e = begin; e < end; e++) edges.weights[e] = magnitude(at(e, w[i], w, 0).residual);
    });
  }

  int64_t number_within(double bound) const { return count_within(bound); }

  int64_t count_within(double bound) const {  // residuals <= bound: all, and per row
    rows([&](int64_t i, int64_t begin, int64_t end) {
      int64_t within = 0;
      for (int64_t e = begin; e < end; e++) within += edges.weights[e] <= bound;
      row_counts[i] = within;
    });
    return total();
  }

  int64_t total() const {
    int64_t sum = 0;
    for (int64_t i = 0; i < items; i++) sum += row_counts[i];
    return sum;
  }
};

template <class T>
struct Bits;
template <>
struct Bits<float> {
  using type = uint32_t;
  static constexpr type infinity = 0x7f800000u, step = 1u << 16;  // a step is at most 0.8 %
};
template <>
struct Bits<double> {
  using type = uint64_t;
  static constexpr type infinity = 0x7ff0000000000000ull, step = 1ull << 45;
};

// Median of the stored residuals, rounded up by at most 0.8 %: bisection on the bits, whose order is the floats'.
template <class T, class Graph>
double median(const Graph& graph, int64_t observed) {
  typename Bits<T>::type low = 0, high = Bits<T>::infinity;
  while (high - low > Bits<T>::step) {
    const auto middle = low + (high - low) / 2;
    T bound;
    std::memcpy(&bound, &middle, sizeof bound);
    (2 * graph.number_within(bound) >= observed ? high : low) = middle;
  }
  T result;
  std::memcpy(&result, &high, sizeof result);
  return low == 0 ? 0 : static_cast<double>(result);
}

struct Problem {
  int64_t items, observed;    // entries, both directions
  bool complete;              // every item was compared with every other
  int64_t groups;             // connected components
  const int64_t* components;  // [items]
  const int64_t* compared;    // [items] pairs of each item
  double mean;                // |logit|, over the observed entries
  double ridge;
  double rounding;  // of residuals, relative to the mean
  BradleyTerryOptions options;
  double* group_sums;  // [2, items]
};

template <class T>
double dot(const T* a, const T* b, int64_t n) {
  double sums[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int l = 0; l < 8; l++) sums[l] += static_cast<double>(a[i + l]) * static_cast<double>(b[i + l]);
  for (; i < n; i++) sums[i % 8] += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}

template <class T>
void centre(T* w, const Problem& problem) {
  double* sums = problem.group_sums;
  double* sizes = sums + problem.items;
  for (int64_t g = 0; g < problem.groups; g++) sums[g] = sizes[g] = 0;
  for (int64_t i = 0; i < problem.items; i++) {
    sums[problem.components[i]] += static_cast<double>(w[i]);
    sizes[problem.components[i]] += 1;
  }
  for (int64_t i = 0; i < problem.items; i++)
    w[i] -= static_cast<T>(sums[problem.components[i]] / sizes[problem.components[i]]);
}

// Vectors of a solve; their padding is 0: it meets NaN values, never NaN scores.
template <class T>
struct Vectors {
  T *w, *gradient, *degree, *x, *r, *z, *p, *y;  // r, z, p, y: of the conjugate gradients

  static constexpr int64_t count = 8;
  Vectors(T* memory, int64_t stride) {
    T** const vectors[] = {&w, &gradient, &degree, &x, &r, &z, &p, &y};
    for (int64_t v = 0; v < count; v++) *vectors[v] = memory + v * stride;
    for (int64_t i = 0; i < count * stride; i++) memory[i] = 0;
  }
};

// Solves the Laplacian system for x from x = 0 until the residual's norm has fallen to `reduction` of what it was.
template <class T, class Graph>
void conjugate_gradients(const Graph& graph, const Vectors<T>& vectors, T ridge, double reduction) {
  const int64_t n = graph.items;
  const T *right = vectors.gradient, *degree = vectors.degree;
  T *x = vectors.x, *r = vectors.r, *z = vectors.z, *p = vectors.p, *y = vectors.y;
  const auto precondition = [&] {
    for (int64_t i = 0; i < n; i++) z[i] = degree[i] + ridge > 0 ? r[i] / (degree[i] + ridge) : T(0);
  };
  for (int64_t i = 0; i < n; i++) {
    x[i] = 0;
    r[i] = right[i];
  }
  precondition();
  constexpr double rounding = 8 * (sizeof(T) == 4 ? 1.2e-7 : 2.2e-16);
  double rho = dot(r, z, n);
  const double goal = rho * reduction * reduction;
  for (int64_t i = 0; i < n; i++) p[i] = z[i];
  for (int64_t iteration = 0; iteration < n + 10 && rho > goal; iteration++) {
    graph.product(p, y);
    for (int64_t i = 0; i < n; i++) y[i] = (degree[i] + ridge) * p[i] - y[i];
    const double curvature = dot(p, y, n);
    for (int64_t i = 0; i < n; i++) z[i] = (degree[i] + ridge) * p[i];
    if (!(curvature > rounding * dot(p, z, n))) break;  // along constants, which cost nothing: only rounding is left
    const T alpha = static_cast<T>(rho / curvature);
    for (int64_t i = 0; i < n; i++) {
      x[i] += alpha * p[i];
      r[i] -= alpha * y[i];
    }
    precondition();
    const double next = dot(r, z, n);
    const T beta = static_cast<T>(next / rho);
    for (int64_t i = 0; i < n; i++) p[i] = z[i] + beta * p[i];
    rho = next;
  }
}

struct Progress {
  int64_t iterations;
  bool converged;
  double constant;  // of the weights
};

// Anneals the constant and takes a step for each, then steps until the scores rest.
template <BradleyTerryData DATA, class Graph, class T>
Progress iterate(const Graph& graph, const Problem& problem, const Vectors<T>& vectors) {
  constexpr bool logits = DATA == BradleyTerryData::logits, plain = DATA == BradleyTerryData::counts_mle;
  const int64_t n = problem.items;
  T *w = vectors.w, *gradient = vectors.gradient, *degree = vectors.degree, *x = vectors.x;
  const double floor = logits ? logit_floor * problem.mean : count_floor;
  const T ridge = static_cast<T>(problem.ridge);
  double constant = logits ? 2 * problem.mean : count_start;
  bool settled = plain, sweeps = logits && problem.complete, converged = problem.observed == 0;
  double previous = 0;
  int64_t iteration = 0;
  if (logits && problem.mean == 0) converged = true;
  while (!converged && iteration < problem.options.max_iter) {
    iteration++;
    const double decay = !logits ? count_decay : constant > logit_early * problem.mean ? logit_decay : logit_late_decay;
    const double bound = decay * constant / (constant_per_sigma * mad_to_sigma);
    const T precision = static_cast<T>(plain ? 0 : 1 / (constant * constant));
    const int64_t within = graph.pass(w, precision, static_cast<T>(bound), sweeps, !settled, gradient, degree);
    if (problem.ridge > 0)
      for (int64_t i = 0; i < n; i++) gradient[i] -= ridge * w[i];
    if (sweeps) {
      for (int64_t i = 0; i < n; i++) x[i] = gradient[i] / (degree[i] + 1);  // + 1: the item against itself
    } else {
      centre(gradient, problem);  // it sums to 0 but for rounding, which the singular system would blow up
      conjugate_gradients(graph, vectors, ridge, settled ? 1e-2 : 0.1);
    }
    double step = 0, size = 0;
    if (!sweeps) centre(x, problem);
    step = largest_of(x, n);
    const T damping = static_cast<T>(!logits && step > 1 ? 1 / step : 1);
    for (int64_t i = 0; i < n; i++) w[i] += damping * x[i];
    if (!logits) size = largest_of(w, n);
    const double unit = logits ? problem.mean : (size > 1 ? size : 1);
    if (settled) {
      converged = step <= problem.options.tol * unit;
      if (sweeps && previous > 0 && step > 0.7 * previous) sweeps = false;  // slow: one item hangs by few weights
      previous = step;
      continue;
    }
    double next = decay * constant;
    if (logits && 2 * within < problem.observed) {
      graph.residuals(w);
      const double least = constant_per_sigma * mad_to_sigma * median<T>(graph, problem.observed);
      next = least > next ? least : next;
    }
    next = next > floor ? next : floor;
    next = next < constant ? next : constant;
    settled = next <= floor || (next >= 0.99 * constant && step <= 0.05 * constant);
    constant = next;
  }
  centre(w, problem);
  return {iteration, converged, constant};
}

// The outputs at the scores that were found.
template <BradleyTerryData DATA, class Graph, class T>
void report(const Graph& graph, const Problem& problem, const Vectors<T>& vectors, const Progress& progress,
            const BradleyTerryOutputs& out) {
  constexpr bool logits = DATA == BradleyTerryData::logits, plain = DATA == BradleyTerryData::counts_mle;
  const int64_t n = problem.items;
  T *w = vectors.w, *gradient = vectors.gradient, *degree = vectors.degree;
  const T ridge = static_cast<T>(problem.ridge);
  const double constant = progress.constant;
  double largest = 0;
  graph.pass(w, static_cast<T>(plain || constant == 0 ? 0 : 1 / (constant * constant)), 0, false, false, gradient,
             degree);
  for (int64_t i = 0; i < n; i++) {
    const double g = magnitude(gradient[i] - ridge * w[i]);
    if (degree[i] > 0 && g / degree[i] > largest) largest = g / degree[i];
  }
  graph.residuals(w);
  double scale = median<T>(graph, problem.observed);
  scale = mad_to_sigma * (logits ? scale : root(scale));
  double threshold = outlier_sigmas * (logits || scale > 1 ? scale : 1.0);
  if (logits && threshold < problem.rounding * problem.mean) threshold = problem.rounding * problem.mean;
  const int64_t kept = graph.count_within(static_cast<T>(logits ? threshold : threshold * threshold));
  for (int64_t i = 0; i < n; i++) {
    const bool alone = problem.compared[i] == 0;
    out.scores[i] = alone ? nan : static_cast<double>(w[i]);
    out.rejected[i] = alone ? nan : 1 - double(graph.row_counts[i]) / double(problem.compared[i]);
    out.components[i] = problem.components[i];
  }
  const bool empty = problem.observed == 0;
  out.stats[bt_iterations] = double(progress.iterations);
  out.stats[bt_converged] = progress.converged;
  out.stats[bt_scale] = empty ? nan : scale;
  out.stats[bt_outlier_rate] = empty ? nan : 1 - double(kept) / double(problem.observed);
  out.stats[bt_gradient] = logits && problem.mean > 0 ? largest / problem.mean : largest;
  out.stats[bt_constant] = plain ? 0 : constant;
  out.stats[bt_threshold] = threshold;
  out.stats[bt_ridge] = problem.ridge;
}

template <BradleyTerryData DATA, class Graph, class T>
void solve(const Graph& graph, const Problem& problem, T* memory, int64_t stride, const BradleyTerryOutputs& out) {
  const Vectors<T> vectors(memory, stride);
  report<DATA>(graph, problem, vectors, iterate<DATA>(graph, problem, vectors), out);
}

// Labels of the connected components by depth-first search, numbered by their first items. neighbours(i, visit) calls
// visit(j) for every j next to i. Returns their number.
template <class Neighbours>
int64_t components(int64_t items, const Neighbours& neighbours, int64_t* labels, int64_t* stack) {
  int64_t groups = 0;
  for (int64_t i = 0; i < items; i++) labels[i] = -1;
  for (int64_t root = 0; root < items; root++) {
    if (labels[root] >= 0) continue;
    int64_t top = 0;
    stack[top++] = root;
    labels[root] = groups;
    while (top > 0)
      neighbours(stack[--top], [&](int64_t j) {
        if (labels[j] >= 0) return;
        labels[j] = groups;
        stack[top++] = j;
      });
    groups++;
  }
  return groups;
}

// The likelihood has a maximum where within each component wins lead from every item to every other: where as many
// searches along wins, and along losses, as there are components reach everything.
template <class Wins, class Losses>
bool strongly_connected(int64_t items, int64_t groups, const Wins& wins, const Losses& losses, int64_t* labels,
                        int64_t* stack) {
  return components(items, wins, labels, stack) == groups && components(items, losses, labels, stack) == groups;
}

// Whether values_ij = -values_ji, or both are missing; by blocks of 4 x 4 transposed in registers.
template <class T>
bool skew_symmetric(const T* values, int64_t n, int64_t stride) {
  typedef T Quad __attribute__((vector_size(4 * sizeof(T))));
  using Flags = decltype(Quad{} == Quad{});
  Flags wrong{};
  const auto row = [&](int64_t i, int64_t j) {
    Quad quad;
    std::memcpy(&quad, values + i * stride + j, sizeof quad);
    return quad;
  };
  const auto compare = [&](Quad a, Quad b) {
    const Flags missing_a = a != a, missing_b = b != b;
    wrong |= (a + b != 0) & ~(missing_a & missing_b);
  };
  const int64_t whole = n / 4 * 4;
  for (int64_t i = 0; i < whole; i += 4)
    for (int64_t j = 0; j <= i; j += 4) {
      const Quad a = row(j, i), b = row(j + 1, i), c = row(j + 2, i), d = row(j + 3, i);
      for (int k = 0; k < 4; k++) compare(row(i + k, j), Quad{a[k], b[k], c[k], d[k]});
    }
  bool skew = (wrong[0] | wrong[1] | wrong[2] | wrong[3]) == 0;
  for (int64_t i = whole; i < n; i++)
    for (int64_t j = 0; j < i; j++) {
      const T a = values[i * stride + j], b = values[j * stride + i];
      skew &= a + b == 0 || (a != a && b != b);
    }
  return skew;
}

// What is wrong with a matrix, and where.
struct Complaint {
  double worst = 0;
  int64_t row = -1, column = -1;

  void add(double value, int64_t at_row, int64_t at_column) {
    if (worst != worst || !(magnitude(value) > worst || value != value)) return;  // the first NaN stays
    worst = value != value ? value : magnitude(value);
    row = at_row;
    column = at_column;
  }
};

template <class T>
struct DenseFit {
  static constexpr double finite = sizeof(T) == 4 ? 3.4028234663852886e38 : 1.7976931348623157e308;  // the largest
  using Vt = V<T>;

  const BradleyTerryDense& args;
  const int64_t n, stride;
  T *values, *weights, *votes;                              // [n, stride], NaN or (votes) 0 beyond the matrix
  T* vectors;                                               // [Vectors<T>::count, stride]
  double* group_sums;                                       // [2, n]
  int64_t *row_counts, *compared, *stack, *labels, *other;  // [n]

  DenseFit(const BradleyTerryDense& args, Workspace& workspace, int64_t)
      : args(args),
        n(args.items),
        stride(round_up(n, alignment / int64_t(sizeof(T)))),
        values(workspace.take<T>(n * stride)),
        weights(workspace.take<T>(n * stride)),
        votes(workspace.take<T>(n * stride)),
        vectors(workspace.take<T>(Vectors<T>::count * stride)),
        group_sums(workspace.take<double>(2 * n)),
        row_counts(workspace.take<int64_t>(n)),
        compared(workspace.take<int64_t>(n)),
        stack(workspace.take<int64_t>(n)),
        labels(workspace.take<int64_t>(n)),
        other(workspace.take<int64_t>(n)) {}

  int64_t observed = 0;
  double sum = 0, largest = 0;  // of |logit|
  Complaint complaint;

  void read(int64_t b) {
    const T* matrix = static_cast<const T*>(args.matrix) + b * n * n;
    const T missing = static_cast<T>(nan);
    for (int64_t i = 0; i < n; i++) {
      T* row = values + i * stride;
      std::memcpy(row, matrix + i * n, n * sizeof(T));
      for (int64_t j = n; j < stride; j++) row[j] = missing;
      if (row[i] != 0 && row[i] == row[i]) complaint.add(2 * double(row[i]), i, i);
      row[i] = missing;
    }
  }

  void read_logits() {
    const bool skew = skew_symmetric(values, n, stride);
    const Vt zero{}, one = zero + T(1);
    Vt top{};
    for (int64_t j = 0; j < stride; j += Lanes<T>::n) {  // down the columns, which are the rows but for signs
      Vt column_sum{}, seen{};
      for (int64_t i = 0; i < n; i++) {
        const Vt v = load_at(values + i * stride + j), size = v < 0 ? -v : v;
        column_sum += v == v ? size : zero;
        seen += v == v ? one : zero;
        top = size > top ? size : top;
      }
      for (int l = 0; l < Lanes<T>::n && j + l < n; l++) {
        sum += double(column_sum[l]);
        compared[j + l] = static_cast<int64_t>(seen[l]);
        observed += compared[j + l];
      }
    }
    largest = max_of<T>(top);
    if (skew) return;
    for (int64_t i = 0; i < n; i++)
      for (int64_t j = 0; j < i; j++) {
        const T a = values[i * stride + j], c = values[j * stride + i];
        if ((a == a) != (c == c)) complaint.add(nan, i, j);
        if (a == a && c == c) complaint.add(double(a) + double(c), i, j);
      }
  }

  void read_counts() {
    const T missing = static_cast<T>(nan);
    std::memset(votes, 0, n * stride * sizeof(T));
    std::memset(compared, 0, n * sizeof(int64_t));
    for (int64_t i = 0; i < n; i++)
      for (int64_t j = 0; j < i; j++) {
        const T a = values[i * stride + j], c = values[j * stride + i], total = a + c;
        if (a < 0 || a > finite || (a == a) != (c == c)) complaint.add(a == a ? 1 : nan, i, j);
        if (c < 0 || c > finite) complaint.add(1, j, i);
        const bool seen = total > 0;
        values[i * stride + j] = seen ? a / total : missing;
        values[j * stride + i] = seen ? c / total : missing;
        votes[i * stride + j] = votes[j * stride + i] = seen ? total : T(0);
        compared[i] += seen;
        compared[j] += seen;
      }
    for (int64_t i = 0; i < n; i++) observed += compared[i];
  }

  int64_t label_components() {
    if (observed == n * (n - 1)) {
      for (int64_t i = 0; i < n; i++) labels[i] = 0;
      return 1;
    }
    const auto neighbours = [&](int64_t i, const auto& visit) {
      for (int64_t j = 0; j < n; j++)
        if (values[i * stride + j] == values[i * stride + j]) visit(j);
    };
    return components(n, neighbours, labels, stack);
  }

  bool has_maximum(int64_t groups) {
    const auto along = [&](bool wins) {
      return [&, wins](int64_t i, const auto& visit) {
        for (int64_t j = 0; j < n; j++)
          if ((wins ? values[i * stride + j] : values[j * stride + i]) > 0) visit(j);
      };
    };
    return strongly_connected(n, groups, along(true), along(false), other, stack);
  }

  template <BradleyTerryData DATA>
  void fit(int64_t b) {
    constexpr bool logits = DATA == BradleyTerryData::logits;
    BradleyTerryOutputs out = args.out;
    out.scores += b * n;
    out.components += b * n;
    out.rejected += b * n;
    out.stats += b * bt_stats;
    read(b);
    if constexpr (logits)
      read_logits();
    else
      read_counts();
    out.stats[bt_worst] = complaint.worst;
    out.stats[bt_worst_row] = double(complaint.row);
    out.stats[bt_worst_column] = double(complaint.column);
    out.stats[bt_largest] = largest;
    // Bad data is Python's to refuse: no answer is formed from it.
    if (largest > finite || complaint.worst != complaint.worst || (!logits && complaint.worst > 0)) {
      for (int64_t s = 0; s < bt_worst; s++) out.stats[s] = nan;
      return;
    }
    const int64_t groups = label_components();
    double ridge = logits ? 0 : count_ridge;
    if (DATA == BradleyTerryData::counts_mle && has_maximum(groups)) ridge = 0;
    const double mean = observed > 0 ? sum / double(observed) : 0;
    const double rounding = sizeof(T) == 4 ? 1e-5 : 1e-6;
    const Problem problem{
        n,         observed, observed == n * (n - 1), groups, labels, compared, mean, ridge, rounding, args.options,
        group_sums};
    solve<DATA>(DenseGraph<T, DATA>{n, stride, values, votes, weights, row_counts}, problem, vectors, stride, out);
  }

  void run(int64_t b) {
    switch (args.options.data) {
      case BradleyTerryData::logits:
        return fit<BradleyTerryData::logits>(b);
      case BradleyTerryData::counts:
        return fit<BradleyTerryData::counts>(b);
      case BradleyTerryData::counts_mle:
        return fit<BradleyTerryData::counts_mle>(b);
    }
  }
};

template <BradleyTerryData DATA>
void fit_edges(const BradleyTerryEdges& edges) {
  constexpr bool logits = DATA == BradleyTerryData::logits;
  const int64_t n = edges.items;
  double* group_sums = edges.vectors + Vectors<double>::count * n;
  int64_t* compared = reinterpret_cast<int64_t*>(group_sums + 2 * n);
  int64_t *row_counts = compared + n, *stack = row_counts + n, *labels = stack + n;
  double sum = 0;
  for (int64_t i = 0; i < n; i++) compared[i] = edges.offsets[i + 1] - edges.offsets[i];
  const int64_t observed = edges.offsets[n];
  if constexpr (logits)
    for (int64_t e = 0; e < observed; e++) sum += magnitude(edges.values[e]);
  const auto along = [&](double least_share) {
    return [&edges, least_share](int64_t i, const auto& visit) {
      for (int64_t e = edges.offsets[i]; e < edges.offsets[i + 1]; e++)
        if (least_share < 0 || edges.values[e] > least_share) visit(edges.columns[e]);
    };
  };
  const auto losses = [&edges](int64_t i, const auto& visit) {
    for (int64_t e = edges.offsets[i]; e < edges.offsets[i + 1]; e++)
      if (edges.values[e] < 1) visit(edges.columns[e]);
  };
  const int64_t groups = components(n, along(-1), labels, stack);
  double ridge = logits ? 0 : count_ridge;
  if constexpr (DATA == BradleyTerryData::counts_mle)
    if (strongly_connected(n, groups, along(0), losses, edges.out.components, stack)) ridge = 0;
  const double mean = observed > 0 ? sum / double(observed) : 0;
  const Problem problem{n, observed, false, groups, labels, compared, mean, ridge, 1e-6, edges.options, group_sums};
  solve<DATA>(EdgeGraph<DATA>{edges, n, row_counts}, problem, edges.vectors, n, edges.out);
}

}  // namespace

void bradley_terry_matrix(const BradleyTerryDense& args, int64_t matrix, int64_t slot) {
  solve_task<DenseFit>(args, matrix, slot);
}

void bradley_terry_graph(const BradleyTerryEdges& args, int64_t, int64_t) {
  switch (args.options.data) {
    case BradleyTerryData::logits:
      return fit_edges<BradleyTerryData::logits>(args);
    case BradleyTerryData::counts:
      return fit_edges<BradleyTerryData::counts>(args);
    case BradleyTerryData::counts_mle:
      return fit_edges<BradleyTerryData::counts_mle>(args);
  }
}

}  // namespace fastpref::FASTPREF_SIMD

#ifdef FASTPREF_SIMD_baseline  // the entry points, once

namespace fastpref {

FASTPREF_DISPATCH(bradley_terry_matrix, BradleyTerryDense)
FASTPREF_DISPATCH(bradley_terry_graph, BradleyTerryEdges)

int64_t bradley_terry_workspace(int64_t items, bool is_double) {
  BradleyTerryDense args{};
  args.is_double = is_double;
  args.items = items;
  return baseline::workspace_bytes<baseline::DenseFit>(args);
}

void bradley_terry_dense_cpu(const BradleyTerryDense& args, int threads) {
  solve_each<bradley_terry_matrix>(args, args.batch, args.slots < threads ? static_cast<int>(args.slots) : threads);
}

void bradley_terry_edges_cpu(const BradleyTerryEdges& args) { bradley_terry_graph(simd_level(), args, 0, args.items); }

}  // namespace fastpref

#endif
