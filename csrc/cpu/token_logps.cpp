// Log-probabilities of labels on the CPU: one read of the logits forward, one read and one write backward.
// The sum runs against a floating reference instead of the maximum: a block is summed against the reference at hand
// while its own maximum is taken, and only a block that rises above it is read again (from L1).
#include "token_logps.h"

#include <type_traits>

#include "simd.h"

namespace fastpref::FASTPREF_SIMD {
namespace {

constexpr int64_t block_columns = 128 * W;  // two in L1; 64 additions per lane, then on in double
constexpr int prefetch_bytes = 4096;        // the hardware prefetcher stops at the end of a 4 KiB page, this does not
constexpr float rebase_threshold = 1.0f;    // further above the reference, v - reference loses bits that v had

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
inline float to_float(f16 x) {
  f16 padded[2 * W] = {x};
  return load(padded).a[0];
}

template <class T>
inline void prefetch(const T* p) {
  for (int byte = 0; byte < int(2 * W * sizeof(T)); byte += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(p) + prefetch_bytes + byte);
}

// Sums over columns against a reference: t = (v - reference) * multiplier. The difference comes first: with large
// logits of any common offset it is exact, where the product would already be rounded.
struct Sums {
  double exp = 0, exp_t = 0, exp_squared = 0, value = 0;  // of e^t, e^t * t, e^2t, v
  float top = -__builtin_inff();                          // max x: tanh is monotonic, but ties need the logits
  float reference = 0;
  bool started = false;  // a finite reference was found

  void rebase(float new_reference, double multiplier) {
    if (exp != 0) {
      const double shift = (double(reference) - double(new_reference)) * multiplier;
      const double factor = __builtin_exp(shift);
      exp_t = factor > 0 ? (exp_t + shift * exp) * factor : 0.0;
      exp *= factor;
      exp_squared *= factor * factor;
    }
    reference = new_reference;
    started = true;
  }
};

template <bool SOFTCAP>
inline Pair transformed(Pair x, float tanh_scale) {
  if constexpr (SOFTCAP) return {tanh(x.a * tanh_scale), tanh(x.b * tanh_scale)};
  return x;
}

template <class T, bool SOFTCAP>
inline float block_max(const T* x, int64_t n, float tanh_scale) {
  Vf top = splat(-__builtin_inff());
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    const Pair v = load(x + i);
    top = vmax(vmax(top, v.a), v.b);
  }
  float m = hmax(top);
  for (; i < n; i++) {
    const float v = to_float(x[i]);
    m = v > m ? v : m;
  }
  if constexpr (SOFTCAP) m = tanh(splat(m * tanh_scale))[0];  // monotonic
  return m;
}

template <class T, bool SOFTCAP, bool STATS>
void add_block(const T* x, int64_t n, float multiplier, float tanh_scale, Sums& sums) {
  if (!sums.started) {
    const float m = block_max<T, SOFTCAP>(x, n, tanh_scale);
    if (m > -__builtin_inff()) sums.rebase(m, multiplier);
  }
  Vf exp_a{}, exp_b{}, exp_t{}, squared{}, value{};
  Vf top_a = splat(-__builtin_inff()), top_b = top_a, top_x = top_a;
  const float reference = sums.reference;
  const auto add = [&](Pair v) {
    const Vf t_a = (v.a - reference) * multiplier, t_b = (v.b - reference) * multiplier;
    const Vf e_a = exp_term(t_a), e_b = exp_term(t_b);
    top_a = vmax(top_a, v.a);
    top_b = vmax(top_b, v.b);
    exp_a += e_a;
    exp_b += e_b;
    if constexpr (STATS) {
      exp_t += e_a * vmax(splat(-200.0f), t_a) + e_b * vmax(splat(-200.0f), t_b);  // 0 * -inf counts as 0
      squared += e_a * e_a + e_b * e_b;
    }
  };
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    prefetch(x + i);
    const Pair logits = load(x + i), v = transformed<SOFTCAP>(logits, tanh_scale);
    add(v);
    if constexpr (STATS) value += v.a + v.b;
    if constexpr (STATS && SOFTCAP) top_x = vmax(top_x, vmax(logits.a, logits.b));
  }
  if (i < n) {
    T tail[2 * W] = {};
    std::memcpy(static_cast<void*>(tail), x + i, (n - i) * sizeof(T));
    const Pair logits = load(tail), v = transformed<SOFTCAP>(logits, tanh_scale);
    const int32_t left = static_cast<int32_t>(n - i);
    const Vi in_a = column<T>(0) < left, in_b = column<T>(1) < left;
    const Vf outside = splat(-__builtin_inff()), zero{};
    add({in_a ? v.a : outside, in_b ? v.b : outside});
    if constexpr (STATS) value += (in_a ? v.a : zero) + (in_b ? v.b : zero);
    if constexpr (STATS && SOFTCAP) top_x = vmax(top_x, vmax(in_a ? logits.a : outside, in_b ? logits.b : outside));
  }
  const float top = hmax(vmax(top_a, top_b));
  if ((top - reference) * multiplier > rebase_threshold) {
    sums.rebase(top, multiplier);
    return add_block<T, SOFTCAP, STATS>(x, n, multiplier, tanh_scale, sums);
  }
  const float largest = STATS && SOFTCAP ? hmax(top_x) : top;
  sums.top = largest > sums.top ? largest : sums.top;
  sums.exp += hsum(exp_a + exp_b);
  if constexpr (STATS) {
    sums.exp_t += hsum(exp_t);
    sums.exp_squared += hsum(squared);
    sums.value += hsum(value);
  }
}

template <class T, bool SOFTCAP, bool STATS>
void forward_row(const TokenLogpsForward& args, int64_t row, int64_t label) {
  const LogitRows& logits = args.logits;
  const T* x = static_cast<const T*>(logits.data) + logits.offset(row);
  const double multiplier = args.transform.multiplier;
  const float tanh_scale = args.transform.tanh_scale;

  Sums sums;  // without the target column
  const auto add = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += block_columns)
      add_block<T, SOFTCAP, STATS>(x + i, end - i < block_columns ? end - i : block_columns,
                                   static_cast<float>(multiplier), tanh_scale, sums);
  };
  add(0, label);
  add(label + 1, logits.vocab);

  const float x_target = to_float(x[label]);
  const double target = SOFTCAP ? __builtin_tanh(double(x_target) * tanh_scale) : x_target;
  // nothing but -inf beside the target: it is the whole sum
  if (!sums.started && target > -__builtin_inf()) sums.rebase(static_cast<float>(target), multiplier);
  const double log_sum = __builtin_log(sums.exp);  // relative to the reference
  // a +inf logit has no softmax, here as beside the target
  const double d =
      target < __builtin_inf() ? multiplier * (double(sums.reference) - target) + log_sum : double(__builtin_nanf(""));
  args.logps[row] =
      static_cast<float>(d > 0 ? -(d + __builtin_log1p(__builtin_exp(-d))) : 0.0 - __builtin_log1p(__builtin_exp(d)));

  const double top = target > sums.reference ? target : sums.reference;
  const double log_all = __builtin_log(__builtin_exp(log_sum + multiplier * (sums.reference - top)) +
                                       __builtin_exp(multiplier * (target - top)));
  const float hi = static_cast<float>(top + log_all / multiplier);
  args.lse[row] = hi;
  args.lse[logits.rows() + row] = hi - hi == 0 ? static_cast<float>(multiplier * (top - double(hi)) + log_all) : 0.0f;

  if constexpr (STATS) {
    if (target > sums.reference) sums.rebase(static_cast<float>(target), multiplier);
    const double t = (target - sums.reference) * multiplier, e = __builtin_exp(t);
    const double exp = sums.exp + e;
    const double exp_t = sums.exp_t + (e > 0 ? e * t : 0.0);
    const int64_t rows = logits.rows();
    args.stats[row] = static_cast<float>(__builtin_log(exp) - exp_t / exp);
    args.stats[rows + row] = static_cast<float>(__builtin_log(sums.exp_squared + e * e) - 2 * __builtin_log(exp));
    args.stats[2 * rows + row] = static_cast<float>(multiplier * (sums.value + target) / logits.vocab);
    args.stats[3 * rows + row] = x_target >= sums.top ? 1.0f : 0.0f;
  }
}

template <class T, bool SOFTCAP, bool STATS>
void forward_rows(const TokenLogpsForward& args, int64_t begin, int64_t end) {
  const int64_t rows = args.logits.rows();
  for (int64_t row = begin; row < end; row++) {
    const int64_t label = args.labels[row];
    if (label != args.ignore_index) {
      forward_row<T, SOFTCAP, STATS>(args, row, label);
      continue;
    }
    args.logps[row] = args.lse[row] = args.lse[rows + row] = 0;
    if constexpr (STATS)
      for (int s = 0; s < 4; s++) args.stats[s * rows + row] = 0;
  }
}

// A gradient narrower than its logits may overwrite them too: it is stored behind the reads.
template <bool STREAM, class T, class U>
inline void store_gradient(U* out, Pair v, const T*) {
  if constexpr (std::is_same_v<T, U>)
    store<STREAM>(out, v);
  else
    store_halves(out, v);
}

template <class T, class U, bool SOFTCAP, bool STREAM>
void backward_columns(const T* x, U* out, int64_t n, const Factor& multiplier, float lse_hi, float g,
                      float tanh_scale) {
  const auto gradient = [&](Vf x) {
    if constexpr (SOFTCAP) {
      const Vf y = x * tanh_scale;
      return exp_product(tanh(y) - lse_hi, multiplier) * g * tanh_slope(y);
    }
    return exp_product(x - lse_hi, multiplier) * g;
  };
  int64_t i = 0;
  const auto some = [&](int64_t count) {  // fewer than 2 W columns, through the stack
    T tail[2 * W] = {};
    U gradients[2 * W];
    std::memcpy(static_cast<void*>(tail), x + i, count * sizeof(T));
    const Pair logits = load(tail);
    store_gradient<false>(gradients, {gradient(logits.a), gradient(logits.b)}, x);
    std::memcpy(static_cast<void*>(out + i), gradients, count * sizeof(U));
    i += count;
  };
  if constexpr (STREAM) {
    const int64_t misaligned = reinterpret_cast<uintptr_t>(out) % (W * 4);
    const int64_t head = misaligned ? (W * 4 - misaligned) / int64_t(sizeof(U)) : 0;
    if (head) some(head < n ? head : n);
  }
  for (; i + 2 * W <= n; i += 2 * W) {
    prefetch(x + i);
    const Pair logits = load(x + i);
    store_gradient<STREAM>(out + i, {gradient(logits.a), gradient(logits.b)}, x);
  }
  if (i < n) some(n - i);
}

template <class T, class U, bool SOFTCAP, bool STREAM>
void backward_rows(const TokenLogpsBackward& args, int64_t begin, int64_t end) {
  const LogitRows &logits = args.logits, &out_rows = args.out;
  const float tanh_scale = args.transform.tanh_scale;
  const Factor multiplier(args.transform.multiplier);
  for (int64_t row = begin; row < end; row++) {
    const T* x = static_cast<const T*>(logits.data) + logits.offset(row);
    U* out = static_cast<U*>(out_rows.data) + out_rows.offset(row);
    const int64_t label = args.labels[row];
    const float grad = args.grad[row], hi = args.lse[row];
    // no gradient, and a finite sum says that no column was NaN: nothing to read
    if (label == args.ignore_index || (grad == 0 && hi - hi == 0)) {
      std::memset(static_cast<void*>(out), 0, logits.vocab * sizeof(U));
      continue;
    }
    const float x_target = to_float(x[label]);  // before it may be overwritten
    const double g = double(grad) * args.transform.slope();
    const double others = -g * __builtin_exp(-double(args.lse[logits.rows() + row]));
    backward_columns<T, U, SOFTCAP, STREAM>(x, out, logits.vocab, multiplier, hi, static_cast<float>(others),
                                            tanh_scale);
    // 1 - p of the target, exact for confident tokens where the difference would cancel
    double target = -__builtin_expm1(double(args.logps[row])) * g;
    if constexpr (SOFTCAP) {
      const double v = __builtin_tanh(double(x_target) * tanh_scale);
      target *= 1 - v * v;
    }
    U packed[2 * W];
    store<false>(packed, {splat(static_cast<float>(target)), splat(static_cast<float>(target))});
    out[label] = packed[0];
  }
  if constexpr (STREAM) stream_fence();
}

template <class T>
void forward_dtype(const TokenLogpsForward& args, int64_t begin, int64_t end) {
  if (args.transform.tanh_scale != 0)
    args.stats ? forward_rows<T, true, true>(args, begin, end) : forward_rows<T, true, false>(args, begin, end);
  else
    args.stats ? forward_rows<T, false, true>(args, begin, end) : forward_rows<T, false, false>(args, begin, end);
}

template <class T, class U, bool STREAM>
void backward_pair(const TokenLogpsBackward& args, int64_t begin, int64_t end) {
  if (args.transform.tanh_scale != 0)
    backward_rows<T, U, true, STREAM>(args, begin, end);
  else
    backward_rows<T, U, false, STREAM>(args, begin, end);
}

template <class T>
void backward_dtype(const TokenLogpsBackward& args, int64_t begin, int64_t end) {
  if (args.out.data != args.logits.data) return backward_pair<T, T, true>(args, begin, end);
  return backward_pair<T, T, false>(args, begin, end);
}

}  // namespace

void token_logps_fwd_rows(const TokenLogpsForward& args, int64_t begin, int64_t end) {
  switch (args.logits.dtype) {
    case DType::f32:
      return forward_dtype<float>(args, begin, end);
    case DType::bf16:
      return forward_dtype<bf16>(args, begin, end);
    case DType::f16:
      return forward_dtype<f16>(args, begin, end);
  }
}

void token_logps_bwd_rows(const TokenLogpsBackward& args, int64_t begin, int64_t end) {
  if (args.out.dtype != args.logits.dtype) {  // checked: from float, the tile of a bf16 or fp16 projection
    if (args.out.dtype == DType::bf16) return backward_pair<float, bf16, false>(args, begin, end);
    return backward_pair<float, f16, false>(args, begin, end);
  }
  switch (args.logits.dtype) {
    case DType::f32:
      return backward_dtype<float>(args, begin, end);
    case DType::bf16:
      return backward_dtype<bf16>(args, begin, end);
    case DType::f16:
      return backward_dtype<f16>(args, begin, end);
  }
}

}  // namespace fastpref::FASTPREF_SIMD

#ifdef FASTPREF_SIMD_baseline  // the entry points, once

#include "check.h"
#include "dispatch.h"

namespace fastpref {

FASTPREF_DISPATCH(token_logps_fwd_rows, TokenLogpsForward)
FASTPREF_DISPATCH(token_logps_bwd_rows, TokenLogpsBackward)

namespace {

int64_t rows_per_chunk(const LogitRows& logits) {  // about 64 Ki columns: long enough to amortise handing it out
  return logits.vocab >= 65536 ? 1 : 65536 / (logits.vocab > 0 ? logits.vocab : 1);
}

}  // namespace

void token_logps_fwd_cpu(const TokenLogpsForward& args, int threads) {
  check_labels(args.labels, args.logits.rows(), args.logits.vocab, args.ignore_index);
  for_ranges<token_logps_fwd_rows>(args, args.logits.rows(), rows_per_chunk(args.logits), threads);
}

void token_logps_bwd_cpu(const TokenLogpsBackward& args, int threads) {
  check(args.out.dtype == args.logits.dtype || args.logits.dtype == DType::f32,
        "out must have the logits' dtype, or be bfloat16 or float16 of float32 logits");
  check_labels(args.labels, args.logits.rows(), args.logits.vocab,
               args.ignore_index);  // the caller may have changed them since the forward
  for_ranges<token_logps_bwd_rows>(args, args.logits.rows(), rows_per_chunk(args.logits), threads);
}

}  // namespace fastpref

#endif
