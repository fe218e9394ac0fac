// Log-probabilities of labels on the GPU, forward (gather.cuh) and backward. The backward writes
// coefficient * (onehot - softmax) by one read of the logits and one write; a block takes a 64 KB piece of a row, and
// each element depends on its own column alone, with a softcap also on the rounding of three others.
#include "gather.cuh"

namespace fastpref {
namespace {

constexpr int bwd_threads = 256;
constexpr int piece_tiles = 4;
template <class T>
constexpr int piece_columns = piece_tiles * bwd_threads * loads * vec<T>;

struct Scatter {
  Rows logits, out;
  int vocab;
  Divider pieces;  // of a row
  float multiplier, tanh_scale;
  Labels labels;
  const float* logps;
  const float* lse;
  // the gradient of a row: its own, or its sequence's coefficient times that of the loss
  const float* row_grad;
  const float* coefficients;       // [sequences]
  const float* tail_coefficients;  // [sequences], or nullptr
  const int64_t* tail_begin;       // [sequences]
  const float* loss_grad;          // [1], or [sequences / 2]
  bool grad_per_pair;
};

// scale p, p = exp(multiplier (v - hi) - lo). An fp32 exponent of -30 is off by 1e-6: EXACT puts its rounding back as a
// factor, which 16-bit results do not show.
template <bool EXACT>
struct Softmax {
  float hi, scale, k, k_lo, lowest;  // k + k_lo / ln 2 = multiplier log2(e)

  __device__ Softmax(float hi, float lo, float multiplier, float scale)
      : hi(hi),
        scale(expf(-lo) * scale + (hi - hi)),  // NaN where hi is not finite
        k(multiplier * log2e),
        k_lo((fmaf(multiplier, log2e, -k) + multiplier * log2e_lo) * ln2),
        lowest(-200.0f / k) {}  // 2^-200 is 0; -inf would turn the residual into NaN

  __device__ float operator()(float v) const {
    const float t = EXACT ? fmaxf(v - hi, lowest) : v - hi;
    const float exponent = t * k, e = exp2_fast(exponent) * scale;
    if (!EXACT) return e;
    return fmaf(e, fmaf(t, k_lo, fmaf(t, k, -exponent) * ln2), e);
  }
};

template <bool HAS_SOFTCAP, bool EXACT>
struct RowGradient {
  Softmax<EXACT> softmax;
  float at_target;  // before the softcap's slope
  float tanh_scale;

  // Four columns v become their gradients. With has_target, v[target] is the label's, where there is such a column.
  __device__ void operator()(float* v, bool has_target, int target) const {
    float slope[4];
    if (HAS_SOFTCAP) tanh4<EXACT, true>(v, slope, tanh_scale);
#pragma unroll
    for (int i = 0; i < 4; i++) v[i] = softmax(v[i]);
    if (has_target) {
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (i == target) v[i] = at_target;
    }
    if (HAS_SOFTCAP) {
#pragma unroll
      for (int i = 0; i < 4; i++) v[i] *= slope[i];
    }
  }
};

// The pieces' columns [begin, end) of a row. `out` may be the logits: no pointer is __restrict__, and a thread reads a
// column before it writes that column.
template <class In, class Out, class Gradient>
__device__ inline void write_piece(const In* x, Out* out, int begin, int end, int label, const Gradient& gradient) {
  constexpr int step = bwd_threads * vec<In>, tile = step * loads;
  struct alignas(sizeof(Out) * vec<In>) Packed {
    Out columns[vec<In>];
  };
  // the first columns, up to a 16-byte boundary of the logits, one by one; if `out` has none there, all of them
  int head = static_cast<int>((-reinterpret_cast<uintptr_t>(x + begin) & 15) / sizeof(In));
  if (reinterpret_cast<uintptr_t>(out + begin + head) % sizeof(Packed) || head > end - begin) head = end - begin;
  for (int col = begin + threadIdx.x; col < begin + head; col += bwd_threads) {
    float v[4] = {to_float(x[col]), 0.0f, 0.0f, 0.0f};
    gradient(v, col == label, 0);
    out[col] = from_float<Out>(v[0]);
  }
  const int first = begin + head + threadIdx.x * vec<In>;
  x += first, out += first;
  int left = end - first, target = label - first;
  const LastRead read;
  const auto write_tile = [&](auto masked) {
    constexpr bool MASKED = decltype(masked)::value;
    uint4 bits[loads];
    load_tile<In, true, MASKED, step>(bits, x, left, read);
    // of this thread or a later one: one tile of the row pays for the comparisons
    const bool has_target = static_cast<unsigned>(target) < static_cast<unsigned>(tile);
#pragma unroll
    for (int u = 0; u < loads; u++) {
      float v[vec<In>];
      unpack<In>(bits[u], v);
#pragma unroll
      for (int e = 0; e < vec<In>; e += 4) gradient(v + e, has_target, target - u * step - e);
      Packed y;
#pragma unroll
      for (int e = 0; e < vec<In>; e++) y.columns[e] = from_float<Out>(v[e]);
      if (!MASKED || left - u * step >= vec<In>) {
        using Bits = std::conditional_t<sizeof(Packed) == 16, uint4, uint2>;
        Bits packed;
        memcpy(&packed, &y, sizeof(packed));
        __stcs(reinterpret_cast<Bits*>(out + u * step), packed);
      } else {
#pragma unroll
        for (int e = 0; e < vec<In>; e++)
          if (u * step + e < left) out[u * step + e] = y.columns[e];
      }
    }
  };
  int columns = end - begin - head;
#pragma unroll 1
  for (; columns >= tile; columns -= tile) {
    write_tile(std::false_type{});
    x += tile, out += tile, left -= tile, target -= tile;
  }
  if (columns > 0) write_tile(std::true_type{});
}

template <class Out>
__device__ inline void write_zeros(Out* out, int begin, int end) {
  const int to_boundary = static_cast<int>((-reinterpret_cast<uintptr_t>(out + begin) & 15) / sizeof(Out));
  const int first = min(begin + to_boundary, end), last = first + (end - first) / vec<Out> * vec<Out>;
  for (int col = begin + threadIdx.x; col < first; col += bwd_threads) out[col] = from_float<Out>(0.0f);
  for (int col = first + threadIdx.x * vec<Out>; col < last; col += bwd_threads * vec<Out>)
    __stcs(reinterpret_cast<uint4*>(out + col), uint4{});
  for (int col = last + threadIdx.x; col < end; col += bwd_threads) out[col] = from_float<Out>(0.0f);
}

// With softcap, which is bound by its arithmetic, fewer threads of more registers: 16-bit columns would spill at 64.
template <class In, class Out, bool HAS_SOFTCAP>
__global__ void __launch_bounds__(bwd_threads, HAS_SOFTCAP && sizeof(In) == 2 ? 3 : 4)
    scatter_kernel(const __grid_constant__ Scatter a) {
  const unsigned item = gridDim.x - 1 - blockIdx.x,
                 row = a.pieces.divide(item);  // the forward left the last rows in L2
  const Place s = locate(a.labels, row);
  const int begin = static_cast<int>(item - row * a.pieces.divisor) * piece_columns<In>;
  const int end = min(begin + piece_columns<In>, a.vocab);
  const int64_t rows = a.labels.rows;
  const bool owned = s.sequence < a.labels.sequences;
  const int64_t label = owned ? label_at(a.labels, s, s.token) : a.labels.from.ignore_index;
  float hi = 0, grad = 0;
  if (label != a.labels.from.ignore_index) {
    hi = a.lse[row];
    if (a.row_grad) {
      grad = a.row_grad[row];
    } else {
      const int pairs = a.labels.sequences / 2, pair = s.sequence < pairs ? s.sequence : s.sequence - pairs;
      grad = a.coefficients[s.sequence];
      if (a.tail_coefficients && s.token >= a.tail_begin[s.sequence]) grad += a.tail_coefficients[s.sequence];
      grad *= a.loss_grad[a.grad_per_pair ? pair : 0];
    }
  }
  Out* out = row_of<Out>(a.out, a.labels, s, s.token);
  // a zero gradient, and a finite sum says that no column is NaN: nothing to read
  if (grad == 0 && fabsf(hi) < infinity) return write_zeros(out, begin, end);
  const In* x = row_of<In>(a.logits, a.labels, s, s.token);
  const float minus_scale = -grad * (HAS_SOFTCAP ? a.multiplier * a.tanh_scale : a.multiplier);
  constexpr bool exact = sizeof(Out) == 4;
  // -(1 - p) of the target, exact for confident tokens
  const RowGradient<HAS_SOFTCAP, exact> gradient{Softmax<exact>(hi, a.lse[rows + row], a.multiplier, minus_scale),
                                                 expm1f(a.logps[row]) * minus_scale, a.tanh_scale};
  write_piece(x, out, begin, end, label >= 0 && label < a.vocab ? static_cast<int>(label) : -1, gradient);
}

template <class In, class Out>
void launch_scatter_of(const Scatter& a, cudaStream_t stream) {
  const auto kernel = a.tanh_scale != 0 ? scatter_kernel<In, Out, true> : scatter_kernel<In, Out, false>;
  kernel<<<static_cast<unsigned>(a.labels.rows * a.pieces.divisor), bwd_threads, 0, stream>>>(a);
}

TokenLabels labels_of(const LogitRows& logits, const int64_t* labels, int64_t ignore_index) {
  return {{labels, false}, {}, {}, ignore_index, logits.outer, logits.inner, false};
}

struct Prepared {
  Gather gather;
  int64_t bytes;
};

Prepared prepare(const TokenLogpsForward& args, void* memory) {
  DeviceWorkspace workspace{static_cast<char*>(memory)};
  Prepared p{};
  p.gather.logps = args.logps, p.gather.lse = args.lse, p.gather.stats = args.stats;
  fill_gather(p.gather, args.logits, {}, args.transform, labels_of(args.logits, args.labels, args.ignore_index),
              args.stats != nullptr, 0, workspace);
  p.bytes = workspace.parts.bytes;
  return p;
}

}  // namespace

int64_t token_logps_workspace_cuda(const TokenLogpsForward& args) { return prepare(args, nullptr).bytes; }

void token_logps_fwd_cuda(const TokenLogpsForward& args, void* workspace, void* stream) {
  if (args.logits.rows() == 0) return;
  launch_gather(prepare(args, workspace).gather, args.logits.dtype, args.stats != nullptr,
                static_cast<cudaStream_t>(stream));
}

void token_logps_bwd_cuda(const TokenLogpsBackward& args, void* stream) {
  logits_gradient_cuda({args.logits, args.transform, labels_of(args.logits, args.labels, args.ignore_index), args.logps,
                        args.lse, args.grad, nullptr, nullptr, nullptr, nullptr, false, args.out},
                       stream);
}

void logits_gradient_cuda(const LogitsGradient& args, void* stream) {
  const DType in = args.logits.dtype, out = args.out.dtype;
  check(out == in || in == DType::f32, "out must have the logits' dtype, or 16 bits of float32 logits");
  const int64_t columns = in == DType::f32 ? piece_columns<float> : piece_columns<__half>;
  const int64_t pieces = divide_up(args.logits.vocab, columns), rows = rows_of(args.labels);
  if (rows == 0) return;
  check(rows * pieces <= INT_MAX, "logits must have at most " + std::to_string(INT_MAX / pieces) + " rows of " +
                                      std::to_string(args.logits.vocab) + " columns, got " + std::to_string(rows));
  const Scatter a{device_rows(args.logits),
                  device_rows(args.out),
                  static_cast<int>(args.logits.vocab),
                  divider(pieces),
                  static_cast<float>(args.transform.multiplier),
                  args.transform.tanh_scale,
                  device_labels(args.labels),
                  args.logps,
                  args.lse,
                  args.row_grad,
                  args.coefficients,
                  args.tail_coefficients,
                  args.tail_begin,
                  args.loss_grad,
                  args.grad_per_pair};
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (in == DType::f32 && out == DType::f32)
    launch_scatter_of<float, float>(a, cuda_stream);
  else if (in == DType::f32 && out == DType::bf16)
    launch_scatter_of<float, __nv_bfloat16>(a, cuda_stream);
  else if (in == DType::f32)
    launch_scatter_of<float, __half>(a, cuda_stream);
  else if (in == DType::bf16)
    launch_scatter_of<__nv_bfloat16, __nv_bfloat16>(a, cuda_stream);
  else
    launch_scatter_of<__half, __half>(a, cuda_stream);
  FASTPREF_CHECK_CUDA(cudaGetLastError());
}

}  // namespace fastpref
