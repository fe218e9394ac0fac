// Log-probabilities of labels on the GPU: one read of the logits forward, one read and one write backward.
// A block per row; every thread keeps its own running maximum and sums, so that the loop has neither barrier nor
// shuffle. Rows begin at any address: the body between two 16-byte boundaries goes in 16-byte accesses.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <climits>
#include <cstring>
#include <type_traits>

#include "check_cuda.h"
#include "token_logps.h"

namespace fastpref {
namespace {

constexpr int max_threads = 256;
constexpr int warp = 32;
constexpr float log2e = 1.44269504088896341f;
constexpr float log2e_lo = 1.92596299112661e-8f;  // what fp32 drops of log2(e)
constexpr float ln2 = 0.693147180559945309f;
constexpr float infinity = __builtin_huge_valf();

// ---------------------------------------------------------------------------------------------------------------------
// Arithmetic

__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));  // exp2f adds instructions for results below 2^-126
  return y;
}

// Without tanhf's branch, which would break up unrolled loops. The odd polynomial keeps the relative accuracy that
// 1 - 2 / (e^(2|y|) + 1) loses near 0.
__device__ inline float tanh_fast(float y) {
  const float a = fabsf(y), q = y * y;
  float r = fmaf(q, -0.005905162f, 0.020804758f);
  r = fmaf(q, r, -0.053786494f);
  r = fmaf(q, r, 0.13331956f);
  r = fmaf(q, r, -0.333332992f);
  const float near = fmaf(a * q, r, a);
  const float far = 1.0f - __fdividef(2.0f, exp2_fast(a * (2.0f * log2e)) + 1.0f);
  return copysignf(a < 0.6f ? near : far, y);
}

// 1 - tanh(y)^2 without its cancellation where tanh saturates.
__device__ inline float tanh_slope(float y) {
  const float e = exp2_fast(fabsf(y) * (-2.0f * log2e)), d = 1.0f + e;
  return __fdividef(4.0f * e, d * d);
}

// What to subtract when the maximum is -inf: -inf - -inf would be NaN.
__device__ inline float finite_or_zero(float top) { return top == -infinity ? 0.0f : top; }

// Over columns: top = max v, then relative to it (t = v - top, e = exp(multiplier t)) sum = Σ e, sum_t = Σ e t,
// squared = Σ e², and value = Σ v. k = multiplier log2(e).
template <bool HAS_STATS>
struct Sums {
  float top = -infinity, sum = 0, sum_t = 0, squared = 0, value = 0;

  __device__ void rebase(float new_top, float k) {
    const float reference = finite_or_zero(new_top);
    const float decay = exp2_fast((top - reference) * k);
    if (HAS_STATS) {
      // selected, not multiplied: 0 * -inf
      sum_t = decay > 0 ? decay * fmaf(sum, finite_or_zero(top) - reference, sum_t) : 0.0f;
      squared *= decay * decay;
    }
    sum *= decay;
    top = new_top;
  }

  template <int N>
  __device__ void add(const float (&v)[N], float k) {
    float new_top = top;
#pragma unroll
    for (int i = 0; i < N; i++) new_top = fmaxf(new_top, v[i]);
    rebase(new_top, k);
    const float reference = finite_or_zero(new_top);
    float new_sum = 0, new_sum_t = 0, new_squared = 0;
#pragma unroll
    for (int i = 0; i < N; i++) {
      const float t = v[i] - reference, e = exp2_fast(t * k);
      new_sum += e;
      if (HAS_STATS) {
        new_sum_t += e > 0 ? e * t : 0.0f;
        new_squared = fmaf(e, e, new_squared);
      }
    }
    sum += new_sum;
    if (HAS_STATS) {
      sum_t += new_sum_t;
      squared += new_squared;
    }
  }

  __device__ void merge(Sums other, float k) {
    const float new_top = fmaxf(top, other.top);
    rebase(new_top, k);
    other.rebase(new_top, k);
    sum += other.sum;
    if (HAS_STATS) {
      sum_t += other.sum_t;
      squared += other.squared;
      value += other.value;
    }
  }
};

struct RowResult {
  float logp, lse_hi, lse_lo;
  float stats[4];  // entropy, log sum p^2, mean logit, top-1 hit
};

// others: every column but the target in top, sum, sum_t and squared; every column in value.
template <bool HAS_STATS>
__device__ inline RowResult finish_row(const Sums<HAS_STATS>& others, float target, float multiplier, float k,
                                       int64_t vocab) {
  RowResult row;
  // logp = -softplus(d), d = log sum_{v != y} exp(z_v) - z_y: never above 0, exact for confident tokens
  float d = fmaf(multiplier, finite_or_zero(others.top) - target, logf(others.sum));
  if (target == infinity) d = nanf("");
  row.logp = d == d ? 0.0f - (fmaxf(d, 0.0f) + log1pf(expf(-fabsf(d)))) : nanf("");

  Sums<HAS_STATS> all = others;
  const float target_column[1] = {target};
  all.add(target_column, k);
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
    row.stats[3] = target >= others.top ? 1.0f : 0.0f;
  }
  return row;
}

// p = exp(multiplier (v - hi) - lo). An fp32 exponent of -30 is off by 1e-6: its rounding is put back as a factor.
struct Softmax {
  float hi, minus_lo_exp, k, k_lo, lowest;  // k + k_lo = multiplier log2(e)

  __device__ Softmax(float hi, float lo, float multiplier)
      : hi(hi),
        minus_lo_exp(expf(-lo) + (hi - hi)),  // NaN where hi is not finite
        k(multiplier * log2e),
        k_lo(fmaf(multiplier, log2e, -k) + multiplier * log2e_lo),
        lowest(-200.0f / k) {}  // 2^-200 is 0; -inf would turn the residual into NaN

  __device__ float operator()(float v) const {
    const float t = fmaxf(v - hi, lowest);
    const float exponent = t * k;
    const float residual = fmaf(t, k_lo, fmaf(t, k, -exponent));
    const float e = exp2_fast(exponent);
    return fmaf(e, residual * ln2, e) * minus_lo_exp;
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// Rows

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

template <bool HAS_SOFTCAP>
__device__ inline float transform(float x, float tanh_scale) {
  return HAS_SOFTCAP ? tanh_fast(x * tanh_scale) : x;
}

template <class T>
constexpr int vec = 16 / sizeof(T);  // columns of a 16-byte access
constexpr int loads = 4;             // of a thread and tile, all in flight before the first is used
constexpr int group = 16;            // columns of a thread folded at a time: what fits beside them in 64 registers

template <class T>
struct Row {
  T* data;
  int vocab;
  // columns before and in the body; the body begins on a 16-byte boundary and is whole 16-byte vectors
  int head, body;

  __device__ Row(const LogitRows& rows, unsigned row)
      : data(static_cast<T*>(rows.data)), vocab(static_cast<int>(rows.vocab)) {
    const unsigned inner = static_cast<unsigned>(rows.inner);
    data += int64_t(row / inner) * rows.outer_stride + int64_t(row % inner) * rows.inner_stride;
    head = static_cast<int>((-reinterpret_cast<uintptr_t>(data) & 15) / sizeof(T));
    head = head < vocab ? head : vocab;
    body = (vocab - head) / vec<T> * vec<T>;
  }
  __device__ int phase() const { return static_cast<int>(reinterpret_cast<uintptr_t>(data) & 15); }
  __device__ void all_scalar() { head = vocab, body = 0; }
  __device__ uint4* vectors() const { return reinterpret_cast<uint4*>(data + head); }
  __device__ int vector_count() const { return body / vec<T>; }
  template <class F>
  __device__ void for_each_outside_body(F f) const {
    for (int col = threadIdx.x; col < head; col += blockDim.x) f(col);
    for (int col = head + body + threadIdx.x; col < vocab; col += blockDim.x) f(col);
  }
};

// Loads of one thread: vectors first, first + blockDim.x, ... MASKED: those from `count` on are not there.
template <bool MASKED>
__device__ inline void load_tile(const uint4* vectors, int first, int count, uint4 (&tile)[loads]) {
#pragma unroll
  for (int u = 0; u < loads; u++) {
    const int i = first + u * blockDim.x;
    tile[u] = !MASKED || i < count ? vectors[i] : uint4{};
  }
}

template <class T, bool HAS_SOFTCAP>
__device__ inline void unpack(const uint4& bits, float tanh_scale, float* v) {
  T x[vec<T>];
  memcpy(x, &bits, 16);
#pragma unroll
  for (int e = 0; e < vec<T>; e++) v[e] = transform<HAS_SOFTCAP>(to_float(x[e]), tanh_scale);
}

template <class T>
__device__ inline uint4 pack(const float* v) {
  T x[vec<T>];
#pragma unroll
  for (int e = 0; e < vec<T>; e++) x[e] = from_float<T>(v[e]);
  uint4 bits;
  memcpy(&bits, x, 16);
  return bits;
}

template <bool HAS_STATS>
__device__ inline Sums<HAS_STATS> warp_merge(Sums<HAS_STATS> sums, float k) {
#pragma unroll
  for (int lane = warp / 2; lane > 0; lane /= 2) {
    Sums<HAS_STATS> other;
    other.top = __shfl_xor_sync(0xffffffff, sums.top, lane);
    other.sum = __shfl_xor_sync(0xffffffff, sums.sum, lane);
    if (HAS_STATS) {
      other.sum_t = __shfl_xor_sync(0xffffffff, sums.sum_t, lane);
      other.squared = __shfl_xor_sync(0xffffffff, sums.squared, lane);
      other.value = __shfl_xor_sync(0xffffffff, sums.value, lane);
    }
    sums.merge(other, k);
  }
  return sums;
}

// ---------------------------------------------------------------------------------------------------------------------
// Kernels

template <class T, bool HAS_SOFTCAP, bool HAS_STATS>
__global__ void __launch_bounds__(max_threads) token_logps_fwd_kernel(const TokenLogpsForward args) {
  const unsigned row = blockIdx.x;
  const int64_t rows = gridDim.x;
  const int64_t label = args.labels[row];
  const bool ignored = label == args.ignore_index;
  if (ignored || label < 0 || label >= args.logits.vocab) {
    if (threadIdx.x == 0) {
      const float blank = ignored ? 0.0f : nanf("");
      args.logps[row] = args.lse[row] = args.lse[rows + row] = blank;
      if (HAS_STATS)
        for (int s = 0; s < 4; s++) args.stats[s * rows + row] = blank;
    }
    return;
  }

  const Row<T> x(args.logits, row);
  const float multiplier = static_cast<float>(args.transform.multiplier), tanh_scale = args.transform.tanh_scale;
  const float k = multiplier * log2e;
  const float target = transform<HAS_SOFTCAP>(to_float(x.data[label]), tanh_scale);
  const int target_col = static_cast<int>(label) - x.head;  // in the body

  Sums<HAS_STATS> sums;  // of every column but the target; value: of every column
  x.for_each_outside_body([&](int col) {
    const float v[1] = {transform<HAS_SOFTCAP>(to_float(x.data[col]), tanh_scale)};
    if (HAS_STATS) sums.value += v[0];
    if (col != label) sums.add(v, k);
  });
  const uint4* vectors = x.vectors();
  const int count = x.vector_count(), step = loads * blockDim.x;
  const auto add_tile = [&](int start, auto masked) {
    constexpr bool MASKED = decltype(masked)::value;
    constexpr int per_group = group / vec<T>;
    const int first = start + threadIdx.x;
    uint4 tile[loads];
    load_tile<MASKED>(vectors, first, count, tile);
    // one tile of the row pays for the comparisons
    const bool has_target = static_cast<unsigned>(target_col - start * vec<T>) < static_cast<unsigned>(step * vec<T>);
#pragma unroll
    for (int g = 0; g < loads; g += per_group) {
      float v[group];
      float value = 0;
#pragma unroll
      for (int u = 0; u < per_group; u++) {
        unpack<T, HAS_SOFTCAP>(tile[g + u], tanh_scale, v + u * vec<T>);
        const int i = first + (g + u) * blockDim.x;
        if (HAS_STATS && (!MASKED || i < count)) {
#pragma unroll
          for (int e = 0; e < vec<T>; e++) value += v[u * vec<T> + e];
        }
        if (MASKED && i >= count) {
#pragma unroll
          for (int e = 0; e < vec<T>; e++) v[u * vec<T> + e] = -infinity;
        }
      }
      if (has_target) {
#pragma unroll
        for (int u = 0; u < per_group; u++)
#pragma unroll
          for (int e = 0; e < vec<T>; e++)
            if ((first + (g + u) * int(blockDim.x)) * vec<T> + e == target_col) v[u * vec<T> + e] = -infinity;
      }
      if (HAS_STATS) sums.value += value;
      sums.add(v, k);
    }
  };
  int start = 0;
#pragma unroll 1
  for (; start + step <= count; start += step) add_tile(start, std::false_type{});
  if (start < count) add_tile(start, std::true_type{});

  sums = warp_merge(sums, k);
  __shared__ __align__(16) unsigned char storage[max_threads / warp * sizeof(Sums<HAS_STATS>)];
  Sums<HAS_STATS>* warps = reinterpret_cast<Sums<HAS_STATS>*>(storage);
  if (threadIdx.x % warp == 0) warps[threadIdx.x / warp] = sums;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (unsigned w = 1; w < blockDim.x / warp; w++) sums.merge(warps[w], k);

  const RowResult result = finish_row(sums, target, multiplier, k, x.vocab);
  args.logps[row] = result.logp;
  args.lse[row] = result.lse_hi;
  args.lse[rows + row] = result.lse_lo;
  if (HAS_STATS) {
#pragma unroll
    for (int s = 0; s < 4; s++) args.stats[s * rows + row] = result.stats[s];
  }
}

// `out` may be the logits: no pointer is __restrict__, and a thread reads a column before it writes that column.
template <class T, bool HAS_SOFTCAP>
__global__ void __launch_bounds__(max_threads) token_logps_bwd_kernel(const TokenLogpsBackward args) {
  const int64_t rows = gridDim.x;
  const unsigned row = gridDim.x - 1 - blockIdx.x;  // last row first: the forward left it in L2
  const int64_t label = args.labels[row];
  const float grad = args.grad[row], hi = args.lse[row];
  Row<T> out(args.out, row);

  // a zero gradient, and a finite sum says that no column is NaN: nothing to read
  if (label == args.ignore_index || (grad == 0 && fabsf(hi) < infinity)) {
    for (int i = threadIdx.x; i < out.vector_count(); i += blockDim.x) out.vectors()[i] = uint4{};
    out.for_each_outside_body([&](int col) { out.data[col] = from_float<T>(0.0f); });
    return;
  }

  Row<T> x(args.logits, row);
  if (x.phase() != out.phase()) x.all_scalar();  // no boundary is common to both
  const float multiplier = static_cast<float>(args.transform.multiplier), tanh_scale = args.transform.tanh_scale;
  const Softmax softmax(hi, args.lse[rows + row], multiplier);
  const float minus_scale = -grad * (HAS_SOFTCAP ? multiplier * tanh_scale : multiplier);
  const float minus_rest = expm1f(args.logps[row]);  // -(1 - p) of the target, exact for confident tokens
  const auto gradient = [&](float logit, bool is_target) {
    float p = is_target ? minus_rest : softmax(transform<HAS_SOFTCAP>(logit, tanh_scale));
    if (HAS_SOFTCAP) p *= tanh_slope(logit * tanh_scale);
    return p * minus_scale;
  };

  x.for_each_outside_body(
      [&](int col) { out.data[col] = from_float<T>(gradient(to_float(x.data[col]), col == label)); });
  const uint4* vectors = x.vectors();
  uint4* out_vectors = reinterpret_cast<uint4*>(out.data + x.head);
  const int count = x.vector_count(), step = loads * blockDim.x;
  const int64_t target_col = label - x.head;  // in the body
  const auto write_tile = [&](int start, auto masked) {
    constexpr bool MASKED = decltype(masked)::value;
    const int first = start + threadIdx.x;
    uint4 tile[loads];
    load_tile<MASKED>(vectors, first, count, tile);
    const int64_t target_in_tile = target_col - start * vec<T>;
    const bool has_target = target_in_tile >= 0 && target_in_tile < step * vec<T>;
#pragma unroll
    for (int u = 0; u < loads; u++) {
      const int i = first + u * blockDim.x;
      float v[vec<T>];
      unpack<T, false>(tile[u], tanh_scale, v);
      if (has_target) {
#pragma unroll
        for (int e = 0; e < vec<T>; e++) v[e] = gradient(v[e], int64_t(i) * vec<T> + e == target_col);
      } else {
#pragma unroll
        for (int e = 0; e < vec<T>; e++) v[e] = gradient(v[e], false);
      }
      if (!MASKED || i < count) out_vectors[i] = pack<T>(v);
    }
  };
  int start = 0;
#pragma unroll 1
  for (; start + step <= count; start += step) write_tile(start, std::false_type{});
  if (start < count) write_tile(start, std::true_type{});
}

// ---------------------------------------------------------------------------------------------------------------------
// Launches

int threads_per_block(const LogitRows& logits, int item_bytes) {  // 64 bytes of the row per thread and step
  const int64_t row_bytes = logits.vocab * item_bytes;
  return row_bytes <= 2048 ? warp : row_bytes <= 16384 ? 128 : max_threads;
}

void check_size(const LogitRows& logits) {
  check(logits.rows() <= INT_MAX, "logits must have at most 2147483647 rows, got " + std::to_string(logits.rows()));
  check(logits.vocab <= INT_MAX - 65536,
        "logits must have fewer than 2147418112 columns, got " + std::to_string(logits.vocab));
}

template <class T>
void launch_fwd(const TokenLogpsForward& args, cudaStream_t stream) {
  const bool softcap = args.transform.tanh_scale != 0, stats = args.stats != nullptr;
  const auto kernel = softcap
                          ? (stats ? token_logps_fwd_kernel<T, true, true> : token_logps_fwd_kernel<T, true, false>)
                          : (stats ? token_logps_fwd_kernel<T, false, true> : token_logps_fwd_kernel<T, false, false>);
  kernel<<<static_cast<unsigned>(args.logits.rows()), threads_per_block(args.logits, sizeof(T)), 0, stream>>>(args);
}

template <class T>
void launch_bwd(const TokenLogpsBackward& args, cudaStream_t stream) {
  const auto kernel =
      args.transform.tanh_scale != 0 ? token_logps_bwd_kernel<T, true> : token_logps_bwd_kernel<T, false>;
  kernel<<<static_cast<unsigned>(args.logits.rows()), threads_per_block(args.logits, sizeof(T)), 0, stream>>>(args);
}

}  // namespace

void token_logps_fwd_cuda(const TokenLogpsForward& args, void* stream) {
  if (args.logits.rows() == 0) return;
  check_size(args.logits);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  switch (args.logits.dtype) {
    case DType::f32:
      launch_fwd<float>(args, cuda_stream);
      break;
    case DType::bf16:
      launch_fwd<__nv_bfloat16>(args, cuda_stream);
      break;
    case DType::f16:
      launch_fwd<__half>(args, cuda_stream);
      break;
  }
  FASTPREF_CHECK_CUDA(cudaGetLastError());
}

void token_logps_bwd_cuda(const TokenLogpsBackward& args, void* stream) {
  check(args.out.dtype == args.logits.dtype, "out must have the logits' dtype");
  if (args.logits.rows() == 0) return;
  check_size(args.logits);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  switch (args.logits.dtype) {
    case DType::f32:
      launch_bwd<float>(args, cuda_stream);
      break;
    case DType::bf16:
      launch_bwd<__nv_bfloat16>(args, cuda_stream);
      break;
    case DType::f16:
      launch_bwd<__half>(args, cuda_stream);
      break;
  }
  FASTPREF_CHECK_CUDA(cudaGetLastError());
}

}  // namespace fastpref
