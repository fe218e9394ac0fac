// A whole preference step from logits in one launch: the gather (gather.cuh), and behind it two more levels at which
// the last to arrive does the work: groups of 32 rows -> pair -> batch. A loss on part of the completion takes a second
// one. The backward is that of token_logps.
#include "gather.cuh"
#include "preference.h"

namespace fastpref {
namespace {

struct StatSums {  // in the order of RowResult::stats
  double entropy, log_sum_p2, mean_logit, top1;
};

struct PairGather : Gather {
  static constexpr bool has_pairs = true;
  PreferenceForward args;
  int pairs;
  // workspace
  unsigned* pair_tickets;    // [pairs], zero
  double2* group_sums;       // [groups]: of log-probs, of policy - reference
  int2* group_counts;        // [groups]: tokens that count, invalid labels
  StatSums* group_stats;     // [groups], or nullptr: without stats
  StatSums* sequence_stats;  // [2 pairs]: args.stat_sums
  int* invalid;              // [2 pairs]
  double* token_ratios;      // [rows] policy - reference, or nullptr: the tail is not asked for
};

__device__ inline double warp_sum(double x) {
#pragma unroll
  for (int lane = warp / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(0xffffffff, x, lane);
  return x;
}
__device__ inline int warp_sum(int x) { return __reduce_add_sync(0xffffffff, x); }
__device__ inline StatSums warp_sum(const StatSums& x) {
  return {warp_sum(x.entropy), warp_sum(x.log_sum_p2), warp_sum(x.mean_logit), warp_sum(x.top1)};
}
// Another warp wrote them: read past the first cache.
__device__ inline void add_to(StatSums& sum, const StatSums* x) {
  sum.entropy += __ldcg(&x->entropy), sum.log_sum_p2 += __ldcg(&x->log_sum_p2);
  sum.mean_logit += __ldcg(&x->mean_logit), sum.top1 += __ldcg(&x->top1);
}

// Functions that are not inlined leave the registers to the loop over columns.

__device__ __noinline__ void finish_stats(const PairGather& a) {
  const int lane = threadIdx.x % warp;
  double tokens[2] = {};  // chosen, rejected
  StatSums stats[2] = {};
#pragma unroll
  for (int side = 0; side < 2; side++) {
    for (int s = side * a.pairs + lane; s < (side + 1) * a.pairs; s += warp) {
      tokens[side] += static_cast<double>(__ldcg(a.args.lengths + s));
      add_to(stats[side], a.sequence_stats + s);
    }
    tokens[side] = warp_sum(tokens[side]), stats[side] = warp_sum(stats[side]);
  }
  if (lane != 0) return;
  const double chosen = fmax(tokens[0], 1.0), rejected = fmax(tokens[1], 1.0), all = fmax(tokens[0] + tokens[1], 1.0);
  float* metrics = a.args.metrics;
  metrics[1] = static_cast<float>((stats[0].entropy + stats[1].entropy) / all);
  metrics[2] = static_cast<float>((stats[0].log_sum_p2 + stats[1].log_sum_p2) / all);
  metrics[3] = static_cast<float>((stats[0].top1 + stats[1].top1) / all);
  metrics[4] = static_cast<float>(stats[0].mean_logit / chosen);
  metrics[5] = static_cast<float>(stats[1].mean_logit / rejected);
  metrics[6] = static_cast<float>(stats[0].top1 / chosen);
}

__device__ __noinline__ void finish_batch(const PairGather& a) {
  const int lane = threadIdx.x % warp;
  const PreferenceForward& args = a.args;
  double loss = 0, total_weight = 0;
  int right = 0, ties = 0, unrated = 0, invalid = 0;
  for (int p = lane; p < a.pairs; p += warp) {
    const double weight = args.pair_weights ? args.pair_weights[p] : 1.0;
    const float margin = __ldcg(args.margins + p);
    loss += weight * double(__ldcg(args.losses + p));
    total_weight += weight;
    right += margin > 0, ties += margin == 0;
    unrated += args.rating_gap && isnan(args.rating_gap[p]);
    invalid += __ldcg(a.invalid + p) + __ldcg(a.invalid + a.pairs + p);
  }
  loss = warp_sum(loss), total_weight = warp_sum(total_weight);
  right = warp_sum(right), ties = warp_sum(ties), unrated = warp_sum(unrated), invalid = warp_sum(invalid);
  const double divisor = divisor_of(args, total_weight);
  for (int p = lane; p < a.pairs; p += warp) {
    const double weight = args.pair_weights ? args.pair_weights[p] : 1.0;
    if (args.reduction == Reduction::none) args.loss[p] = static_cast<float>(weight * double(__ldcg(args.losses + p)));
#pragma unroll
    for (int side = 0; side < 2; side++) {
      float* coefficient = args.coefficients + side * a.pairs + p;
      *coefficient = static_cast<float>(double(__ldcg(coefficient)) * (weight / divisor));
    }
  }
  if (lane == 0) {
    if (args.reduction != Reduction::none) args.loss[0] = static_cast<float>(loss / divisor);
    args.metrics[0] = static_cast<float>(right) / static_cast<float>(a.pairs);
    args.counts[0] = ties, args.counts[1] = unrated, args.counts[2] = invalid;
  }
  if (a.sequence_stats) finish_stats(a);
}

__device__ __noinline__ void write_pair(const PairGather& a, int pair, float chosen_logratio, float rejected_logratio) {
  const PreferenceForward& args = a.args;
  // rounded each for itself, as torch does: a contraction would change the margins' bits
  const float beta = static_cast<float>(args.family.beta);
  const float chosen = __fmul_rn(beta, chosen_logratio), rejected = __fmul_rn(beta, rejected_logratio);
  args.rewards[pair] = chosen, args.rewards[a.pairs + pair] = rejected;
  args.margins[pair] = __fsub_rn(chosen, rejected);
  const float* gap = args.rating_gap ? args.rating_gap + pair : nullptr;
  const PairLoss found = pair_loss(args.family, chosen_logratio, rejected_logratio, gap);
  args.losses[pair] = static_cast<float>(found.loss);
  args.coefficients[pair] = static_cast<float>(found.slope);
  args.coefficients[a.pairs + pair] = -static_cast<float>(found.slope);
}

__device__ __noinline__ void sum_stats(const PairGather& a, int sequence) {
  const Place s = sequence_at(a.labels, sequence);
  const StatSums* groups = a.group_stats + first_group(a.labels, s);
  StatSums stats{};
  for (int g = threadIdx.x % warp; g < groups_of(s); g += warp) add_to(stats, groups + g);
  stats = warp_sum(stats);
  if (threadIdx.x % warp == 0) a.sequence_stats[sequence] = stats;
}

// Returns the log-ratio of a sequence.
__device__ __noinline__ float finish_sequence(const PairGather& a, int sequence) {
  const int lane = threadIdx.x % warp;
  const PreferenceForward& args = a.args;
  const Place s = sequence_at(a.labels, sequence);
  const int64_t first = first_group(a.labels, s);
  double sum = 0, ratio = 0;
  int length = 0, invalid = 0;
  for (int g = lane; g < groups_of(s); g += warp) {
    const double2 sums = __ldcg(a.group_sums + first + g);
    const int2 counts = __ldcg(a.group_counts + first + g);
    sum += sums.x, ratio += sums.y, length += counts.x, invalid += counts.y;
  }
  sum = warp_sum(sum), ratio = warp_sum(ratio), length = warp_sum(length), invalid = warp_sum(invalid);
  if (lane == 0) {
    args.logps[sequence] = static_cast<float>(sum);
    args.lengths[sequence] = length;
    a.invalid[sequence] = invalid;
  }
  if (a.group_stats) sum_stats(a, sequence);
  return static_cast<float>(args.ref_logps ? sum - double(args.ref_logps[sequence]) : ratio);
}

__device__ __noinline__ void finish_pair(const PairGather& a, int pair) {
  const float chosen = finish_sequence(a, pair), rejected = finish_sequence(a, a.pairs + pair);
  if (threadIdx.x % warp == 0) write_pair(a, pair, chosen, rejected);
  if (is_last(a.tickets + 1, a.pairs)) finish_batch(a);
}

// Arrivals of a pair: each group of its two sequences, and each sequence, which may have no group.
__device__ __noinline__ void sequence_begins(const PairGather& a, int sequence) {
  const int pair = sequence < a.pairs ? sequence : sequence - a.pairs;
  const int arrivals = groups_of(sequence_at(a.labels, pair)) + groups_of(sequence_at(a.labels, a.pairs + pair)) + 2;
  if (is_last(a.pair_tickets + pair, arrivals)) finish_pair(a, pair);
}

__device__ inline void group_finished(const PairGather& a, const Place& s, int64_t group_index,
                                      const TokenResult& token) {
  const double2 sums{warp_sum(double(token.policy.logp)), warp_sum(token.counted ? token.ratio : 0.0)};
  const int2 counts{__popc(__ballot_sync(0xffffffff, token.counted)),
                    __popc(__ballot_sync(0xffffffff, token.counted && !token.valid))};
  StatSums stats{};
  if (a.group_stats) {
    const float* values = token.policy.stats;
    stats = warp_sum(StatSums{values[0], values[1], values[2], values[3]});
  }
  if (threadIdx.x % warp == 0) {
    a.group_sums[group_index] = sums, a.group_counts[group_index] = counts;
    if (a.group_stats) a.group_stats[group_index] = stats;
  }
  if (a.token_ratios) {
    const int place = s.token / warp * warp + threadIdx.x % warp;
    if (place < s.length) a.token_ratios[s.begin + place] = token.ratio;
  }
  sequence_begins(a, s.sequence);
}

// ---------------------------------------------------------------------------------------------------------------------
// The tail of a pair's longer sequence, behind the gather, which knows no length before its end: a block to a sequence

constexpr int tail_threads = 512;

__global__ void __launch_bounds__(tail_threads) tail_kernel(const __grid_constant__ PairGather a) {
  constexpr int warps = tail_threads / warp;
  __shared__ int counts[warps];
  __shared__ double sums[warps];
  const int lane = threadIdx.x % warp, own = threadIdx.x / warp, sequence = blockIdx.x;
  const int partner = sequence < a.pairs ? sequence + a.pairs : sequence - a.pairs;
  const int length = static_cast<int>(a.args.lengths[sequence]);
  const int shorter = min(length, static_cast<int>(a.args.lengths[partner]));
  const Place s = sequence_at(a.labels, sequence);
  const int end = length > shorter ? s.length : 0;
  int before = 0;  // tokens that count before this round's
  double sum = 0;
  for (int first = 0; first < end; first += tail_threads) {
    const int token = first + static_cast<int>(threadIdx.x);
    const bool counted = label_at(a.labels, s, token) != a.labels.from.ignore_index;
    const unsigned of_warp = __ballot_sync(0xffffffff, counted);
    if (lane == 0) counts[own] = __popc(of_warp);
    __syncthreads();
    int rank = before + __popc(of_warp & ((1u << lane) - 1));
#pragma unroll
    for (int w = 0; w < warps; w++) {
      if (w < own) rank += counts[w];
      before += counts[w];
    }
    if (counted && rank >= shorter) sum += a.token_ratios[s.begin + token];
    if (counted && rank == shorter) a.args.tail_begin[sequence] = token;
    __syncthreads();
  }
  sum = warp_sum(sum);
  if (lane == 0) sums[own] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  double total = 0;
  for (int w = 0; w < warps; w++) total += sums[w];
  a.args.tail[sequence] = static_cast<float>(total);
  if (length == shorter) a.args.tail_begin[sequence] = s.length;
}

// ---------------------------------------------------------------------------------------------------------------------
// The epilogue alone, behind log-probs of tokens: a block per pair, half of it to a sequence

constexpr int pair_threads = 256;

__global__ void __launch_bounds__(pair_threads) pair_kernel(const __grid_constant__ PairEpilogue a) {
  constexpr int half = pair_threads / 2, half_warps = half / warp;
  __shared__ double2 sums[2][half_warps];  // of log-probs, of policy - reference
  __shared__ int counts[2][half_warps];
  __shared__ float chosen_grad;
  const int64_t group = a.end - a.begin, p = blockIdx.x;
  const auto bound = [&](int64_t sequence) { return min(max(a.bounds[sequence], int64_t(0)), a.rows); };
  const int side = threadIdx.x / half, thread = threadIdx.x % half;
  const int64_t begin = bound(side * group + p), end = bound(side * group + p + 1);
  double sum = 0, ratio = 0;
  int length = 0;
#pragma unroll 4
  for (int64_t row = begin + thread; row < end; row += half) {
    if (a.labels[row] == a.ignore_index) continue;
    const double logp = a.token_logps[row];
    sum += logp, length++;
    ratio += a.ref_token_logps ? logp - double(a.ref_token_logps[row]) : logp;
  }
  sum = warp_sum(sum), ratio = warp_sum(ratio), length = warp_sum(length);
  if (thread % warp == 0) sums[side][thread / warp] = {sum, ratio}, counts[side][thread / warp] = length;
  __syncthreads();
  if (threadIdx.x == 0) {
    float logratio[2];
#pragma unroll
    for (int of = 0; of < 2; of++) {
      double2 total{};
      int tokens = 0;
#pragma unroll
      for (int w = 0; w < half_warps; w++) {
        total.x += sums[of][w].x, total.y += sums[of][w].y;
        tokens += counts[of][w];
      }
      const int64_t sequence = of * a.pairs + a.begin + p;
      logratio[of] = static_cast<float>(a.ref_logps ? total.x - double(a.ref_logps[sequence]) : total.y);
      a.logps[sequence] = static_cast<float>(total.x);
      a.logratios[sequence] = logratio[of];
      a.lengths[sequence] = tokens;
    }
    const int64_t pair = a.begin + p;
    const PairLoss found = pair_loss(a.family, logratio[0], logratio[1], a.rating_gap ? a.rating_gap + pair : nullptr);
    a.losses[pair] = static_cast<float>(found.loss);
    chosen_grad = static_cast<float>(found.slope * a.scale_of_pair[pair]);
  }
  __syncthreads();
  const float grad = side == 0 ? chosen_grad : -chosen_grad;
  for (int64_t row = begin + thread; row < end; row += half)
    a.token_grad[row] = a.labels[row] == a.ignore_index ? 0.0f : grad;
}

struct Prepared {
  PairGather gather;
  int64_t bytes;
};

Prepared prepare(const PreferenceForward& args, void* memory) {
  check(!args.reference.data || args.reference.dtype == args.logits.dtype, "ref_logits must have the logits' dtype");
  DeviceWorkspace workspace{static_cast<char*>(memory)};
  Prepared p{};
  PairGather& a = p.gather;
  const int64_t pairs = args.pairs(), groups = groups_of(args.labels);
  a.logps = args.token_logps, a.lse = args.lse;
  fill_gather(a, args.logits, args.reference, args.transform, args.labels, args.stats, pairs, workspace);
  a.args = args;
  a.pairs = static_cast<int>(pairs);
  a.pair_tickets = a.tickets + 2 + groups;
  a.group_sums = workspace.take<double2>(groups);
  a.group_counts = workspace.take<int2>(groups);
  a.invalid = workspace.take<int>(2 * pairs);
  if (args.stats) {
    a.group_stats = workspace.take<StatSums>(groups);
    a.sequence_stats = reinterpret_cast<StatSums*>(args.stat_sums);
  }
  if (args.tail) a.token_ratios = workspace.take<double>(rows_of(args.labels));
  p.bytes = workspace.parts.bytes;
  return p;
}

}  // namespace

int64_t preference_workspace_cuda(const PreferenceForward& args) { return prepare(args, nullptr).bytes; }

void preference_fwd_cuda(const PreferenceForward& args, void* workspace, void* stream) {
  check(args.pairs() > 0, "a batch must have at least one pair");
  const PairGather gather = prepare(args, workspace).gather;
  launch_gather(gather, args.logits.dtype, args.stats, static_cast<cudaStream_t>(stream));
  if (!args.tail) return;
  tail_kernel<<<static_cast<unsigned>(2 * args.pairs()), tail_threads, 0, static_cast<cudaStream_t>(stream)>>>(gather);
  FASTPREF_CHECK_CUDA(cudaGetLastError());
}

void preference_pairs_cuda(const PairEpilogue& args, void* stream) {
  const int64_t blocks = args.end - args.begin;
  if (blocks == 0) return;
  check(blocks <= INT_MAX, "a group must have at most 2147483647 pairs, got " + std::to_string(blocks));
  pair_kernel<<<static_cast<unsigned>(blocks), pair_threads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  FASTPREF_CHECK_CUDA(cudaGetLastError());
}

}  // namespace fastpref
