// Columns of a row of logits on the device: 16-byte accesses, the transform, running sums, and what a row's sums come
// to.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <climits>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace fastpref {
namespace {

constexpr int warp = 32;
constexpr int loads = 4;  // 16-byte loads of a thread and tile, all in flight before the first is used
constexpr float log2e = 1.44269504088896341f;
constexpr float log2e_lo = 1.92596299112661e-8f;  // what fp32 drops of log2(e)
constexpr float ln2 = 0.693147180559945309f;
constexpr float infinity = __builtin_huge_valf();

template <class T>
constexpr int vec = 16 / sizeof(T);  // columns of a 16-byte access

// ---------------------------------------------------------------------------------------------------------------------
// Memory

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

template <class T>
__device__ inline T from_float(float x) {
  if constexpr (sizeof(T) == 4)
    return x;
  else if constexpr (std::is_same_v<T, __half>)
    return __float2half_rn(x);
  else
    return __float2bfloat16_rn(x);
}

// How 16 bytes of logits are read, OFFSET bytes behind an address: past the first cache, which they would only pass
// through, and by lines of the second one. The SASS has it as LDG.E.NA.LTC128B.

// Reads what no thread writes meanwhile and another kernel may read next.
struct ReadOnly {
  template <int OFFSET>
  __device__ uint4 at(const void* x) const {
    uint4 y;
    asm("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4 + %5];"
        : "=r"(y.x), "=r"(y.y), "=r"(y.z), "=r"(y.w)
        : "l"(x), "n"(OFFSET));
    return y;
  }
};

// Reads what nobody reads again and this thread may overwrite: the bytes leave the second cache first. A policy says
// so, which costs the warp two registers, because ptxas refuses .L2::evict_first for less than 32 bytes.
struct LastRead {
  uint64_t policy;
  __device__ LastRead() { asm("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(policy)); }
  template <int OFFSET>
  __device__ uint4 at(const void* x) const {
    uint4 y;
    asm volatile("ld.global.L1::no_allocate.L2::cache_hint.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4 + %5], %6;"
                 : "=r"(y.x), "=r"(y.y), "=r"(y.z), "=r"(y.w)
                 : "l"(x), "n"(OFFSET), "l"(policy)
                 : "memory");
    return y;
  }
};

// The `left` columns from x + OFFSET on, -inf behind them where MASKED. ALIGNED says how to load, never what.
template <class T, bool ALIGNED, bool MASKED, int OFFSET, class Read>
__device__ inline uint4 load_columns(const T* x, int left, const Read& read) {
  constexpr int bytes = OFFSET * static_cast<int>(sizeof(T));
  if constexpr (ALIGNED)
    if (!MASKED || left >= vec<T>) return read.template at<bytes>(x);
  T v[vec<T>];
  if constexpr (MASKED || !ALIGNED) {
#pragma unroll
    for (int e = 0; e < vec<T>; e++) v[e] = !MASKED || e < left ? x[OFFSET + e] : from_float<T>(-infinity);
  }
  uint4 bits;
  memcpy(&bits, v, 16);
  return bits;
}

// tile[u] becomes the columns from x + u STRIDE on, of which `left` - u STRIDE are left.
template <class T, bool ALIGNED, bool MASKED, int STRIDE, int U = 0, class Read>
__device__ inline void load_tile(uint4 (&tile)[loads], const T* x, int left, const Read& read) {
  if constexpr (U < loads) {
    tile[U] = load_columns<T, ALIGNED, MASKED, U * STRIDE>(x, left - U * STRIDE, read);
    load_tile<T, ALIGNED, MASKED, STRIDE, U + 1>(tile, x, left, read);
  }
}

template <class T>
__device__ inline void unpack(const uint4& bits, float* v) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {  // an instruction a column, where the compiler's own takes 1.5
    const unsigned words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int w = 0; w < 4; w++) {
      v[2 * w] = __uint_as_float(words[w] << 16);
      v[2 * w + 1] = __uint_as_float(words[w] & 0xffff0000u);
    }
  } else {
    T x[vec<T>];
    memcpy(x, &bits, 16);
#pragma unroll
    for (int e = 0; e < vec<T>; e++) v[e] = to_float(x[e]);
  }
}

// Column e of a vector becomes -inf.
template <class T>
__device__ inline void exclude(uint4& bits, int e) {
  T x[vec<T>];
  memcpy(x, &bits, 16);
  x[e] = from_float<T>(-infinity);
  memcpy(&bits, x, 16);
}

template <class T>
__device__ inline unsigned max_of_pairs(unsigned x, unsigned y) {
  unsigned z;
  if constexpr (std::is_same_v<T, __half>)
    asm("max.f16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
  else
    asm("max.bf16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
  return z;
}

// The largest column of N vectors; 16-bit ones in pairs, for half the instructions.
template <class T, int N>
__device__ inline float largest(const uint4* bits) {
  if constexpr (sizeof(T) == 4) {
    float top = -infinity;
#pragma unroll
    for (int u = 0; u < N; u++) {
      float v[4];
      memcpy(v, &bits[u], 16);
      top = fmaxf(fmaxf(fmaxf(top, v[0]), fmaxf(v[1], v[2])), v[3]);
    }
    return top;
  } else {
    const auto top_of = [](const uint4& b) {
      return max_of_pairs<T>(max_of_pairs<T>(b.x, b.y), max_of_pairs<T>(b.z, b.w));
    };
    unsigned top = top_of(bits[0]);
#pragma unroll
    for (int u = 1; u < N; u++) top = max_of_pairs<T>(top, top_of(bits[u]));
    T pair[2];
    memcpy(pair, &top, 4);
    return fmaxf(to_float(pair[0]), to_float(pair[1]));
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Arithmetic

__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));  // exp2f adds instructions for results below 2^-126
  return y;
}

__device__ inline float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// fmaxf would drop a NaN.
__device__ inline float max_or_nan(float x, float y) {
  float z;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}

// What to subtract when the maximum is -inf: -inf - -inf would be NaN.
__device__ inline float finite_or_zero(float top) { return top == -infinity ? 0.0f : top; }

// v becomes tanh(v tanh_scale), and slope 1 - tanh^2, of four columns for one reciprocal: with e = exp(-2 |y|) and
// r = 1 / (1 + e), tanh |y| = (1 - e) r and the slope is 4 e r^2, neither of which cancels where tanh saturates. Near 0
// 1 - e does: for EXACT there is a polynomial, whose time float32's bandwidth leaves.
template <bool EXACT, bool HAS_SLOPE>
__device__ inline void tanh4(float* v, float* slope, float tanh_scale) {
  float e[4], d[4];
#pragma unroll
  for (int i = 0; i < 4; i++) e[i] = exp2_fast(fabsf(v[i]) * (-2.0f * log2e * tanh_scale)), d[i] = 1.0f + e[i];
  const float ab = d[0] * d[1], cd = d[2] * d[3], all = reciprocal_fast(ab * cd);
  const float over_ab = all * cd, over_cd = all * ab;
  const float r[4] = {over_ab * d[1], over_ab * d[0], over_cd * d[3], over_cd * d[2]};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if (HAS_SLOPE) slope[i] = 4.0f * (e[i] * r[i]) * r[i];
    float t = (1.0f - e[i]) * r[i];
    if (EXACT) {
      const float y = fabsf(v[i]) * tanh_scale, q = y * y;
      float p = fmaf(q, -0.005905162f, 0.020804758f);
      p = fmaf(q, p, -0.053786494f);
      p = fmaf(q, p, 0.13331956f);
      p = fmaf(q, p, -0.333332992f);
      if (y < 0.6f) t = fmaf(y * q, p, y);
    }
    v[i] = copysignf(t, v[i]);
  }
}

// Over columns: top = max v; relative to base (t = v - base, e = exp(multiplier t)) sum = Σ e, sum_t = Σ e t,
// squared = Σ e², and value = Σ v. k = multiplier log2(e). With stats, base follows top only when that has run away by
// more than slack = 8 / k: e stays below 2^8, and the loop is spared most of the rescalings; without them the branch
// costs more than it spares.
constexpr float slack_exponent = 8;

//
// With softcap and stats, largest = max of the logits: a tanh of four columns is rounded by its neighbours, and a tie
// of the label with the largest logit must be one.
template <bool HAS_STATS>
struct Sums {
  float top = -infinity, base = -infinity, sum = 0, sum_t = 0, squared = 0, value = 0, largest = -infinity;

  __device__ void rebase(float new_base, float k) {
    const float reference = finite_or_zero(new_base), decay = exp2_fast((base - reference) * k);
    if (HAS_STATS) {
      // selected, not multiplied: 0 * -inf
      sum_t = decay > 0 ? decay * fmaf(sum, finite_or_zero(base) - reference, sum_t) : 0.0f;
      squared *= decay * decay;
    }
    sum *= decay;
    base = new_base;
  }

  template <int N>
  __device__ void add(const float (&v)[N], float top_of_v, float k, float slack) {
    top = fmaxf(top, top_of_v);
    if (!HAS_STATS || top - base > slack) rebase(top, k);
    const float reference = finite_or_zero(base);
    float added = 0, added_t = 0, added_squares = 0;
#pragma unroll
    for (int i = 0; i < N; i++) {
      float t = v[i] - reference;
      if (HAS_STATS) t = max_or_nan(t, -1e30f);  // 0 * -inf
      const float e = exp2_fast(t * k);
      added += e;
      if (HAS_STATS) added_t = fmaf(e, t, added_t), added_squares = fmaf(e, e, added_squares);
    }
    sum += added;
    if (HAS_STATS) sum_t += added_t, squared += added_squares;
  }

  __device__ void merge(Sums other, float k) {  // both have base == top
    const float new_top = fmaxf(top, other.top);
    rebase(new_top, k);
    other.rebase(new_top, k);
    top = new_top;
    sum += other.sum;
    if (HAS_STATS) {
      sum_t += other.sum_t, squared += other.squared, value += other.value;
      largest = fmaxf(largest, other.largest);
    }
  }
};

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int lane = warp / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(0xffffffff, x, lane);
  return x;
}

// The maximum first, so that a lane rebases once and not at each of five steps.
template <bool HAS_STATS>
__device__ inline Sums<HAS_STATS> warp_merge(Sums<HAS_STATS> sums, float k) {
  float top = sums.top;
#pragma unroll
  for (int lane = warp / 2; lane > 0; lane /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, lane));
  sums.rebase(top, k);
  sums.top = top;
  sums.sum = warp_sum(sums.sum);
  if (HAS_STATS) {
    sums.sum_t = warp_sum(sums.sum_t);
    sums.squared = warp_sum(sums.squared);
    sums.value = warp_sum(sums.value);
#pragma unroll
    for (int lane = warp / 2; lane > 0; lane /= 2)
      sums.largest = fmaxf(sums.largest, __shfl_xor_sync(0xffffffff, sums.largest, lane));
  }
  return sums;
}

struct RowResult {
  float logp, lse_hi, lse_lo;
  float stats[4];  // entropy, log sum p^2, mean logit, top-1 hit
};

// others: every column but the target in top, sum, sum_t and squared; every column in value.
template <bool HAS_STATS>
__device__ inline RowResult finish_row(const Sums<HAS_STATS>& others, float target, float target_logit,
                                       float multiplier, int vocab) {
  RowResult row;
  const float k = multiplier * log2e;
  // logp = -softplus(d), d = log sum_{v != y} exp(z_v) - z_y: never above 0, exact for confident tokens
  float d = fmaf(multiplier, finite_or_zero(others.top) - target, logf(others.sum));
  if (target == infinity) d = nanf("");
  row.logp = d == d ? 0.0f - (fmaxf(d, 0.0f) + log1pf(expf(-fabsf(d)))) : nanf("");

  Sums<HAS_STATS> all = others;
  const float target_column[1] = {target};
  all.add(target_column, target, k, 0.0f);
  const float log_sum = logf(all.sum);
  // hi + error = top + quotient exactly (two-sum)
  const float quotient = log_sum / multiplier, hi = all.top + quotient, back = hi - all.top;
  const float error = (all.top - (hi - back)) + (quotient - back);
  row.lse_hi = hi;
  row.lse_lo = fabsf(hi) < infinity ? fmaf(multiplier, error, fmaf(-multiplier, quotient, log_sum)) : 0.0f;
  if (HAS_STATS) {
    row.stats[0] = log_sum - multiplier * (all.sum_t / all.sum);
    row.stats[1] = logf(all.squared) - 2.0f * log_sum;
    row.stats[2] = multiplier * (others.value / static_cast<float>(vocab));
    row.stats[3] = target_logit >= others.largest ? 1.0f : 0.0f;
  }
  return row;
}

}  // namespace
}  // namespace fastpref
