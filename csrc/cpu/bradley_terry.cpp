// Robust Bradley-Terry fits, one matrix per task. A reweighting takes one pass over the matrix: residuals, redescending
// weights, and the gradient. On (nearly) complete graphs a Jacobi step on the weighted Laplacian follows from the same
// pass; elsewhere the weights are kept and conjugate gradients solve for the step.
#include "bradley_terry.h"

#include "dispatch.h"
#include "lanes.h"

namespace fastpref {

FASTPREF_DISPATCH(bradley_terry_solve, BradleyTerry)  // (matrix, slot)

}  // namespace fastpref

namespace fastpref::FASTPREF_SIMD {
namespace {

constexpr double mad = 1.4826;      // of a normal distribution: standard deviation / median |x|
constexpr double cutoff = 2.4;      // of Cauchy's weights, in standard deviations: 95 % efficiency
constexpr double shrink = 0.7;      // of the cutoff per sweep, down to the noise
constexpr double floor_of = 1e-4;   // of mean |M|: a cutoff below this only rounds
constexpr double count_cutoff = 3;  // of standardised count residuals
constexpr double outlier = 5;       // standard deviations
constexpr double complete = 0.9;    // share of pairs compared from which a Jacobi step converges fast

inline Vf sigmoid(Vf x) {
  const Vf bound = splat(80.0f);
  x = x > bound ? bound : x < -bound ? -bound : x;
  return 1.0f / (1.0f + exp(-x));
}
inline V<double> sigmoid(V<double> x) {
  for (int i = 0; i < Lanes<double>::n; i++) x[i] = 1 / (1 + __builtin_exp(-x[i]));
  return x;
}

template <int N>
struct Count {
  static constexpr int n = N;
};

template <class T>
struct Solver {
  static constexpr int n = Lanes<T>::n;
  using Vt = V<T>;
  using I = typename Lanes<T>::I;

  const BradleyTerry& args;
  const int64_t items, stride;  // rows are padded with missing entries to whole vectors
  T *matrix, *votes, *weights;  // [items, stride]: logits or shares of wins, NaN missing; votes; Laplacian weights
  T *scores, *step, *residual, *direction, *product, *diagonal, *gradient;  // [stride]
  int64_t *label, *queue, *degree;                                          // [items]

  Solver(const BradleyTerry& args, char* memory) : args(args), items(args.items), stride((args.items + n - 1) / n * n) {
    const auto take = [&](int64_t count) {
      T* at = reinterpret_cast<T*>(memory);
      memory += (count * sizeof(T) + 63) / 64 * 64;
      return at;
    };
    matrix = take(items * stride);
    votes = args.counts ? take(items * stride) : nullptr;
    weights = take(items * stride);
    scores = take(stride);
    step = take(stride);
    residual = take(stride);
    direction = take(stride);
    product = take(stride);
    diagonal = take(stride);
    gradient = take(stride);
    label = reinterpret_cast<int64_t*>(memory);
    queue = label + items;
    degree = queue + items;
  }

  // ---- what is compared ----

  int64_t pairs = 0;                 // ordered
  double mean = 0;                   // |M| of compared pairs
  bool dense = false, full = false;  // nearly all, or all pairs are compared

  void read(int64_t b) {
    const T* in = static_cast<const T*>(args.data) + b * items * items;
    const T nan = static_cast<T>(__builtin_nan(""));
    double total = 0;
    pairs = 0;
    dense = full = items > 1;
    for (int64_t i = 0; i < items; i++) {
      T* row = matrix + i * stride;
      for (int64_t j = 0; j < items; j++) {
        if (votes) {
          const T won = in[i * items + j], lost = in[j * items + i], sum = won + lost;
          const bool compared = i != j && sum > 0;
          votes[i * stride + j] = compared ? sum : 0;
          row[j] = compared ? won : nan;
        } else {
          row[j] = i == j ? nan : in[i * items + j];
        }
      }
      for (int64_t j = items; j < stride; j++) {
        row[j] = nan;
        if (votes) votes[i * stride + j] = 0;
      }
      Vt sum{};
      Vt present{};
      for (int64_t j = 0; j < stride; j += n) {
        const Vt v = load_at(row + j), a = abs_of<T>(v);
        sum += v == v ? a : Vt{};
        present += v == v ? Vt{} + 1 : Vt{};
      }
      total += sum_of<T>(sum);
      degree[i] = static_cast<int64_t>(sum_of<T>(present));
      pairs += degree[i];
      dense = dense && degree[i] >= complete * (items - 1);
      full = full && degree[i] == items - 1;
    }
    mean = pairs ? total / pairs : 0;
  }

  // The first entry that its mirror image contradicts, as info's last two numbers; -1: none.
  void find_asymmetry(int64_t b, double* at) const {
    const T* in = static_cast<const T*>(args.data) + b * items * items;
    at[0] = at[1] = -1;
    for (int64_t i = 1; i < items; i++)
      for (int64_t j = 0; j < i; j++) {
        const T a = in[i * items + j], mirror = in[j * items + i];
        if (a + mirror == 0 || (a != a && mirror != mirror)) continue;
        // logits of p and of 1 - p, each rounded, differ by a share of themselves
        if (magnitude(double(a) + mirror) <= 1e-2 * larger(magnitude(a), mean)) continue;
        at[0] = static_cast<double>(i);
        at[1] = static_cast<double>(j);
        return;
      }
  }

  int64_t components = 0;  // labelled in the order of their first items

  void find_components() {
    components = 0;
    for (int64_t i = 0; i < items; i++) label[i] = -1;
    for (int64_t first = 0; first < items; first++) {
      if (label[first] >= 0) continue;
      int64_t end = 0;
      queue[end++] = first;
      label[first] = components;
      for (int64_t at = 0; at < end && end < items; at++) {
        const T* row = matrix + queue[at] * stride;
        for (int64_t j = 0; j < items; j++)
          if (label[j] < 0 && row[j] == row[j]) {
            label[j] = components;
            queue[end++] = j;
          }
      }
      components++;
    }
  }

  void centre(T* values) {  // to mean 0 in each component
    for (int64_t first = 0, component = 0; component < components; first++) {
      if (label[first] != component) continue;
      double sum = 0;
      int64_t members = 0;
      for (int64_t i = first; i < items; i++)
        if (components == 1 || label[i] == component) {
          sum += values[i];
          members++;
        }
      for (int64_t i = first; i < items; i++)
        if (components == 1 || label[i] == component) values[i] = static_cast<T>(values[i] - sum / members);
      component++;
    }
  }

  // ---- linear algebra on the weighted Laplacian ----

  // x = (diag(diagonal) - weights + ridge)^-1 gradient, to a residual of `precision`; a singular part stays zero.
  void solve(T* x, double precision, double ridge) {
    double norm = 0;
    if (ridge == 0) centre(gradient);  // rounding must not push along the constants, which the weights do not see
    for (int64_t i = 0; i < stride; i++) {
      x[i] = 0;
      residual[i] = i < items ? gradient[i] : 0;
      direction[i] = 0;
    }
    const auto preconditioned = [&](int64_t i) {
      const double d = double(diagonal[i]) + ridge;
      return d > 0 ? residual[i] / d : 0.0;
    };
    for (int64_t i = 0; i < items; i++) {
      direction[i] = static_cast<T>(preconditioned(i));
      norm += double(residual[i]) * direction[i];
    }
    const double target = norm * precision * precision;
    for (int64_t iteration = 0; iteration < 2 * items + 8 && norm > target && norm > 0; iteration++) {
      in_blocks([&](int64_t first, auto count) {  // the weights are symmetric: by rows, without sums across lanes
        constexpr int U = count.n;
        Vt sum[U] = {};
        for (int64_t j = 0; j < items; j++) {
          const Vt other = Vt{} + direction[j];
          for (int u = 0; u < U; u++) sum[u] += load_at(weights + j * stride + first + u * n) * other;
        }
        for (int u = 0; u < U; u++) store_at(product + first + u * n, sum[u]);
      });
      double curvature = 0;
      for (int64_t i = 0; i < items; i++) {
        product[i] = static_cast<T>((double(diagonal[i]) + ridge) * direction[i] - product[i]);
        curvature += double(product[i]) * direction[i];
      }
      if (!(curvature > 0)) break;
      const double length = norm / curvature;
      double next = 0;
      for (int64_t i = 0; i < items; i++) {
        x[i] = static_cast<T>(x[i] + length * direction[i]);
        residual[i] = static_cast<T>(residual[i] - length * product[i]);
        next += residual[i] * preconditioned(i);
      }
      for (int64_t i = 0; i < items; i++) direction[i] = static_cast<T>(preconditioned(i) + next / norm * direction[i]);
      norm = next;
    }
  }

  // ---- logits ----

  inline Vt residual_of(const T* row, int64_t j, Vt own) const { return load_at(row + j) - own + load_at(scores + j); }

  // The median of |r| over every `step_rows`-th row; kept in `weights`.
  double median_residual(int64_t step_rows) {
    int64_t rows = 0, present = 0;
    double most = 0;
    for (int64_t i = 0; i < items; i += step_rows) {
      const T* row = matrix + i * stride;
      T* out = weights + rows++ * stride;
      const Vt own = Vt{} + scores[i];
      Vt top{};
      for (int64_t j = 0; j < stride; j += n) {
        const Vt r = abs_of<T>(residual_of(row, j, own));
        store_at(out + j, r);
        top = r > top ? r : top;
      }
      for (int k = 0; k < n; k++) most = larger(most, top[k]);
      present += degree[i];
    }
    if (present == 0) return 0;
    // where all are compared, items against themselves lie among the values, as zeros
    return order_statistic(weights, rows * stride, (present + 1) / 2 + (full ? rows : 0), most);
  }

  struct Sweep {
    double change;  // of the largest score
    int64_t small;  // residuals below the bound asked for
  };

  // f(first, Count<U>) for all columns, U vectors at a time.
  template <class F>
  void in_blocks(F&& f) {
    int64_t at = 0;
    for (; at + 4 * n <= stride; at += 4 * n) f(at, Count<4>{});
    if (at + 2 * n <= stride) f(at, Count<2>{}), at += 2 * n;
    if (at < stride) f(at, Count<1>{});
  }

  // Gradient and diagonal of U vectors of items under Cauchy's likelihood with cutoff d. Items are lanes, and the other
  // side of each comparison is a row, so that no sum crosses lanes: row j holds what j thinks of them, -r.
  template <bool FULL, int U>
  I weigh(int64_t first, Vt inverse_d2, Vt limit) {
    const Vt one = Vt{} + 1;
    Vt own[U], force[U] = {}, weight[U] = {};
    I below{};
    for (int u = 0; u < U; u++) own[u] = load_at(scores + first + u * n);
    for (int64_t j = 0; j < items; j++) {
      const T* row = matrix + j * stride + first;
      const Vt other = Vt{} + scores[j];
      for (int u = 0; u < U; u++) {
        Vt r = load_at(row + u * n) - other + own[u];
        const auto present = r == r;
        if (!FULL) r = present ? r : Vt{};
        Vt g = inverse(one + r * r * inverse_d2);
        if (!FULL) g = present ? g : Vt{};
        force[u] -= g * r;
        weight[u] += g;
        below -= FULL ? abs_of<T>(r) <= limit : (abs_of<T>(r) <= limit) & present;
        if (!dense) store_at(weights + j * stride + first + u * n, g);
      }
    }
    for (int u = 0; u < U; u++) {
      store_at(gradient + first + u * n, force[u]);
      store_at(diagonal + first + u * n, weight[u]);
    }
    return below;
  }

  // One reweighting and a step.
  Sweep sweep(double d, double bound) {
    const Vt inverse_d2 = Vt{} + static_cast<T>(1 / (d * d)), limit = Vt{} + static_cast<T>(bound);
    I below{};
    in_blocks([&](int64_t first, auto count) {
      below += full ? weigh<true, count.n>(first, inverse_d2, limit) : weigh<false, count.n>(first, inverse_d2, limit);
    });
    Sweep result{0, 0};
    for (int k = 0; k < n; k++) result.small += below[k];
    if (full) result.small -= items;
    if (dense) {  // the item against itself counts too: without it bipartite graphs oscillate
      const T self = full ? 0 : 1;
      for (int64_t i = 0; i < items; i++) step[i] = gradient[i] / (diagonal[i] + self);
    } else {
      solve(step, sizeof(T) == 8 ? 1e-8 : 1e-4, 0);
    }
    for (int64_t i = 0; i < items; i++) {
      scores[i] += step[i];
      result.change = larger(result.change, magnitude(step[i]));
    }
    if (dense) centre(scores);
    return result;
  }

  int64_t iterations = 0;
  bool converged = false;

  void set_diagonal(T value) {
    for (int64_t i = 0; i < items; i++) matrix[i * stride + i] = value;
  }

  void fit_logits(double tol) {
    iterations = 0;
    converged = pairs == 0 || mean == 0;
    const double least = floor_of * mean, settled = tol * mean, infinite = 1e18 * mean;
    if (full) set_diagonal(0);  // an item against itself: a residual of zero, whose weight belongs there anyway
    const int64_t sampled = items >= 48 ? 4 : 1;  // rows are alike: a quarter of them gives the median to a few percent
    double d = args.robust ? 2 * mean : infinite;
    for (bool at_floor = !args.robust; !converged && iterations < args.max_iter; iterations++) {
      const double next = larger(shrink * d, least);
      const Sweep swept = sweep(d, next / (cutoff * mad));
      converged = at_floor && swept.change <= settled;
      if (!args.robust || converged) continue;
      const double before = d;
      d = next;  // unless the noise is above it, which a look at the median is needed for
      if (2 * swept.small < pairs) d = larger(d, cutoff * mad * median_residual(sampled));
      at_floor = d >= 0.99 * before || d <= least;
    }
    if (full) set_diagonal(static_cast<T>(__builtin_nan("")));
    full = false;
  }

  // ---- counts ----

  // One reweighted Newton step; returns the largest change of a score.
  double newton(double ridge) {
    const Vt one = Vt{} + 1, quarter = Vt{} + static_cast<T>(0.25);
    const Vt inverse_c2 = Vt{} + static_cast<T>(1 / (count_cutoff * count_cutoff));
    in_blocks([&](int64_t first, auto count) {
      constexpr int U = count.n;
      Vt own[U], force[U] = {}, weight[U] = {};
      for (int u = 0; u < U; u++) own[u] = load_at(scores + first + u * n);
      for (int64_t j = 0; j < items; j++) {
        const Vt other = Vt{} + scores[j];
        for (int u = 0; u < U; u++) {
          const int64_t at = j * stride + first + u * n;
          const Vt k = load_at(votes + at), p = load_at(matrix + at);
          const Vt s = sigmoid(other - own[u]), v = s * (one - s);
          const Vt diff = k > 0 ? p - s : Vt{};
          Vt g = k;
          if (args.robust) g = k * inverse(one + diff * diff * k * k * inverse_c2 * inverse(k * v + quarter));
          force[u] -= g * diff;
          weight[u] += g * v;
          store_at(weights + at, g * v);
        }
      }
      for (int u = 0; u < U; u++) {
        const Vt pull = own[u] * static_cast<T>(ridge);
        store_at(gradient + first + u * n, force[u] - pull);
        store_at(diagonal + first + u * n, weight[u]);
      }
    });
    solve(step, sizeof(T) == 8 ? 1e-6 : 1e-4, ridge);
    double most = 0;
    for (int64_t i = 0; i < items; i++) most = larger(most, magnitude(step[i]));
    const double damping = most > 1 ? 1 / most : 1;
    for (int64_t i = 0; i < items; i++) scores[i] = static_cast<T>(scores[i] + damping * step[i]);
    return most;
  }

  void fit_counts(int64_t b, double tol, double ridge) {
    if (args.robust) {  // from a robust fit of smoothed logits
      logits_of_counts();
      fit_logits(1e-2);
      read(b);
    }
    for (int64_t i = 0; i < items; i++)
      for (int64_t j = 0; j < items; j++)
        if (votes[i * stride + j] > 0) matrix[i * stride + j] /= votes[i * stride + j];
    converged = pairs == 0;
    for (int64_t rounds = 0; !converged && rounds < args.max_iter; rounds++, iterations++)
      converged = newton(ridge) <= tol;
  }

  void logits_of_counts() {  // smoothed; a pair that was not compared is 0 / 0
    double total = 0;
    for (int64_t i = 0; i < items; i++)
      for (int64_t j = 0; j < items; j++) {
        T& entry = matrix[i * stride + j];
        if (!(entry == entry)) continue;
        entry = static_cast<T>(__builtin_log((entry + 0.5) / (votes[i * stride + j] - entry + 0.5)));
        total += magnitude(entry);
      }
    mean = pairs ? total / pairs : 0;
  }

  // ---- the end ----

  void finish(int64_t b) {
    double scale = args.counts ? 1 : mad * median_residual(1);
    const double bound = outlier * larger(scale, args.counts ? scale : floor_of * mean / outlier);
    int64_t outliers = 0;
    const Vt limit = Vt{} + static_cast<T>(bound), quarter = Vt{} + static_cast<T>(0.25);
    for (int64_t i = 0; i < items; i++) {
      const T* row = matrix + i * stride;
      const Vt own = Vt{} + scores[i];
      I far{};
      for (int64_t j = 0; j < stride; j += n) {
        Vt r = residual_of(row, j, own), spread = limit;
        if (votes) {  // standardised; compared without the division
          const Vt k = load_at(votes + i * stride + j), s = sigmoid(own - load_at(scores + j));
          const Vt diff = (load_at(row + j) - s) * k;
          r = diff * diff;
          spread = limit * limit * (s * (Vt{} + 1 - s) * k + quarter);
        }
        far -= abs_of<T>(r) > spread;  // never of a NaN
      }
      int64_t count = 0;
      for (int k = 0; k < n; k++) count += far[k];
      outliers += count;
      args.rejected[b * items + i] = degree[i] ? float(count) / float(degree[i]) : 0.0f;
    }
    centre(scores);
    T* out = static_cast<T*>(args.scores) + b * items;
    for (int64_t i = 0; i < items; i++) {
      out[i] = degree[i] ? scores[i] : static_cast<T>(__builtin_nan(""));
      args.components[b * items + i] = label[i];
    }
    double* info = args.info + bradley_terry_info * b;
    info[0] = static_cast<double>(iterations);
    info[1] = converged && pairs > 0;
    info[2] = scale;
    info[3] = pairs ? double(outliers) / double(pairs) : 0.0;
  }

  void run(int64_t b) {
    read(b);
    find_components();
    double* asymmetry = args.info + bradley_terry_info * b + 4;
    asymmetry[0] = asymmetry[1] = -1;
    if (!args.counts) find_asymmetry(b, asymmetry);
    for (int64_t i = 0; i < stride; i++) scores[i] = step[i] = residual[i] = direction[i] = 0;
    if (args.counts)
      fit_counts(b, args.tol, args.ridge);
    else
      fit_logits(args.tol);
    finish(b);
  }
};

}  // namespace

void bradley_terry_solve(const BradleyTerry& args, int64_t matrix, int64_t slot) {
  char* memory = static_cast<char*>(args.workspace) + slot * bradley_terry_workspace(args.items, args.is_double);
  if (args.is_double)
    Solver<double>(args, memory).run(matrix);
  else
    Solver<float>(args, memory).run(matrix);
}

}  // namespace fastpref::FASTPREF_SIMD

#if defined(FASTPREF_SIMD_baseline)  // the entry points, once

namespace fastpref {

int64_t bradley_terry_workspace(int64_t items, bool is_double) {
  const int64_t stride = (items + 15) / 16 * 16, size = is_double ? 8 : 4;
  return (3 * items * stride + 7 * stride) * size + 10 * 64 + (3 * items * 8 + 63) / 64 * 64;
}

void bradley_terry_cpu(const BradleyTerry& args, int threads) {
  const SimdLevel level = simd_level();
  parallel_with_slot(args.batch, threads,
                     [&](int64_t matrix, int64_t slot) { bradley_terry_solve(level, args, matrix, slot); });
}

}  // namespace fastpref

#endif
