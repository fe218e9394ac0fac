// Log-probabilities of labels, the forward of every op on logits: rows are folded in fixed chunks, a warp to a chunk,
// and the last warp to arrive at a level does that level's work: 32 rows of a sequence, and, for pairs, what follows
// (preference.cu). There is no barrier, no shared memory and no waiting. Which column a lane folds, and in which order
// partial sums are merged, depends on the column, the vocabulary and the dtype alone: a row has the same bits wherever
// it lies and whatever else is in the batch.
#pragma once
#include <atomic>

#include "check_cuda.h"
#include "columns.cuh"
#include "cpu/arith.h"
#include "token_logps.h"

namespace fastpref {
namespace {

constexpr int fwd_threads = 128;
constexpr int chunk_tiles = 8;  // a chunk is 16 KB of a row: 64 rows of a large vocabulary still are 1024 chunks
template <class T>
constexpr int tile_columns = warp * loads * vec<T>;
template <class T>
constexpr int chunk_columns = chunk_tiles * tile_columns<T>;
constexpr int column_group = 16;  // columns of a lane folded at a time: what fits in 64 registers

// Division of numbers below 2^31 by a multiplication.
struct Divider {
  unsigned divisor, magic, shift;
  __device__ unsigned divide(unsigned n) const { return (__umulhi(n, magic) + n) >> shift; }
};

inline Divider divider(int64_t divisor) {
  unsigned shift = 0;
  while ((int64_t(1) << shift) < divisor) shift++;
  const uint64_t excess = (uint64_t(1) << shift) - static_cast<uint64_t>(divisor);
  return {static_cast<unsigned>(divisor), static_cast<unsigned>((excess << 32) / divisor + 1), shift};
}

struct Rows {
  void* data;
  int64_t sequence_stride, token_stride;  // elements
};

struct Labels {
  TokenLabels from;
  Divider tokens;  // of a padded sequence
  int sequences;
  int64_t rows;
};

struct Gather {
  static constexpr bool has_pairs = false;
  Rows logits, reference;  // reference.data == nullptr: none
  int vocab;
  // the queue's items: first chunks of rows, a row's of one set (policy, reference) after those of the other; then, for
  // pairs, sequences. Constants cost the kernel no registers.
  unsigned chunks, row_items, items;
  Divider items_per_row;
  float multiplier, k, tanh_scale;  // k = multiplier log2(e)
  Labels labels;
  float* logps;  // [rows]
  float* lse;    // [2, rows]
  float* stats;  // [4, rows], or nullptr: they are not asked for, or for pairs alone
  // workspace
  unsigned* tickets;  // [ticket_count], zero: the queue's, the batch's, and of groups of 32 rows
  int64_t ticket_count;
  float2* slots;        // [groups, sets, chunks, 32]: top, sum
  float4* stats_slots;  // the same: sum_t, squared, value, largest
};

// ---------------------------------------------------------------------------------------------------------------------
// Where a row lies

__device__ inline int64_t at(const Integers& x, int64_t i) {
  return x.is_int32 ? static_cast<const int*>(x.data)[i] : static_cast<const int64_t*>(x.data)[i];
}

// A row's sequence and its place there; sequence == labels.sequences: of none.
struct Place {
  int sequence, token, length;
  int64_t begin;  // the sequence's first row
};

__device__ inline Place sequence_at(const Labels& labels, int sequence) {
  if (!labels.from.cu_seqlens.data) {
    const int tokens = static_cast<int>(labels.tokens.divisor);
    return {sequence, 0, labels.rows == 0 ? 0 : tokens, int64_t(sequence) * tokens};
  }
  // nothing beyond the rows is read or written, whatever cu_seqlens says
  const int64_t begin = min(max(at(labels.from.cu_seqlens, sequence), int64_t(0)), labels.rows);
  const int64_t end = min(max(at(labels.from.cu_seqlens, sequence + 1), begin), labels.rows);
  return {sequence, 0, static_cast<int>(end - begin), begin};
}

// By a whole warp.
__device__ inline Place locate(const Labels& labels, unsigned row) {
  if (!labels.from.cu_seqlens.data) {
    const int sequence = labels.tokens.divide(row), tokens = static_cast<int>(labels.tokens.divisor);
    const int64_t begin = int64_t(sequence) * tokens;
    return {sequence, static_cast<int>(row - begin), tokens, begin};
  }
  int low = 0, high = labels.sequences;  // the last i with cu_seqlens[i] <= row, 32 probes at a time
  for (int width = high; low < high && width > 1; high = min(low + width, high)) {
    width = (high - low + warp - 1) / warp;
    const int probe = low + (threadIdx.x % warp + 1) * width;
    low += width * __popc(__ballot_sync(0xffffffff, probe <= high && at(labels.from.cu_seqlens, probe) <= row));
  }
  if (low >= labels.sequences) return {labels.sequences, 0, 0, row};
  Place place = sequence_at(labels, low);
  place.token = static_cast<int>(row - place.begin);
  if (row < place.begin || place.token >= place.length) return {labels.sequences, 0, 0, row};
  return place;
}

__device__ inline int groups_of(const Place& s) { return (s.length + warp - 1) / warp; }

// Of its groups in the workspace: sequences of any lengths never overlap.
__device__ inline int64_t first_group(const Labels& labels, const Place& s) {
  return labels.from.cu_seqlens.data ? s.begin / warp + s.sequence : int64_t(s.sequence) * groups_of(s);
}

__device__ inline int64_t label_at(const Labels& labels, const Place& s, int token) {
  token += labels.from.shift;
  const bool counts = token < s.length && !(labels.from.lengths.data && token >= at(labels.from.lengths, s.sequence));
  return counts ? at(labels.from.labels, s.begin + token) : labels.from.ignore_index;
}

template <class T>
__device__ inline T* row_of(const Rows& rows, const Labels& labels, const Place& s, int token) {
  const int64_t offset = labels.from.cu_seqlens.data ? (s.begin + token) * rows.token_stride
                                                     : s.sequence * rows.sequence_stride + token * rows.token_stride;
  return static_cast<T*>(rows.data) + offset;
}

// ---------------------------------------------------------------------------------------------------------------------
// Arrivals

__device__ inline unsigned arrive(unsigned* ticket) {
  unsigned old;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(old) : "l"(ticket) : "memory");
  return old;
}

// Whether this warp is the last of `count`. Lane 0 wrote what the ticket publishes; after it every lane may read, past
// the first cache.
__device__ inline bool is_last(unsigned* ticket, unsigned count) {
  unsigned old = 0;
  if (threadIdx.x % warp == 0) old = arrive(ticket);
  old = __shfl_sync(0xffffffff, old, 0);
  __syncwarp();
  return old == count - 1;
}

// ---------------------------------------------------------------------------------------------------------------------
// A chunk, by a warp

template <class T, bool HAS_SOFTCAP, bool HAS_STATS, bool ALIGNED>
__device__ inline Sums<HAS_STATS> fold_chunk(const T* row, int begin, int end, int label, float k, float tanh_scale) {
  // everything relative to this lane's first column
  const int first = begin + threadIdx.x % warp * vec<T>;
  const T* x = row + first;
  int left = end - first, target = label - first;
  const float slack = slack_exponent / k;
  Sums<HAS_STATS> sums;
  const auto add_tile = [&](auto masked) {
    constexpr bool MASKED = decltype(masked)::value;
    constexpr int per_group = column_group / vec<T>;
    uint4 tile[loads];
    load_tile<T, ALIGNED, MASKED, warp * vec<T>>(tile, x, left, ReadOnly{});
    // of this lane or a later one: one tile of the row pays for the comparisons
    const bool has_target = static_cast<unsigned>(target) < static_cast<unsigned>(tile_columns<T>);
#pragma unroll
    for (int g = 0; g < loads; g += per_group) {
      const auto each = [&](auto f) {  // (index in the group, vector, its column, column from the lane's first)
#pragma unroll
        for (int u = 0; u < per_group; u++)
#pragma unroll
          for (int e = 0; e < vec<T>; e++) f(u * vec<T> + e, g + u, e, (g + u) * warp * vec<T> + e);
      };
      // plain log-probs: the target leaves the packed columns, so that their maximum is found in pairs
      constexpr bool PACKED = !HAS_STATS && !HAS_SOFTCAP;
      if (PACKED && has_target)
        each([&](int, int u, int e, int column) {
          if (column == target) exclude<T>(tile[u], e);
        });
      float v[column_group], top_of_v;
#pragma unroll
      for (int u = 0; u < per_group; u++) unpack<T>(tile[g + u], v + u * vec<T>);
      if constexpr (PACKED) {
        top_of_v = largest<T, per_group>(&tile[g]);
      } else {
        if (HAS_SOFTCAP && HAS_STATS) sums.largest = fmaxf(sums.largest, largest<T, per_group>(&tile[g]));
        if (HAS_SOFTCAP) {
#pragma unroll
          for (int i = 0; i < column_group; i += 4) tanh4<sizeof(T) == 4, false>(v + i, nullptr, tanh_scale);
        }
        if (HAS_STATS) {
          float value = 0;
          each([&](int i, int, int, int column) { value += !MASKED || column < left ? v[i] : 0.0f; });
          sums.value += value;
        }
        if (HAS_SOFTCAP && MASKED)  // the tanh of what load_columns put there is -1
          each([&](int i, int, int, int column) {
            if (column >= left) v[i] = -infinity;
          });
        if (has_target)
          each([&](int i, int, int, int column) {
            if (column == target) v[i] = -infinity;
          });
        top_of_v = v[0];
#pragma unroll
        for (int i = 1; i < column_group; i++) top_of_v = fmaxf(top_of_v, v[i]);
      }
      sums.add(v, top_of_v, k, slack);
    }
  };
  int columns = end - begin;
#pragma unroll 1
  for (; columns >= tile_columns<T>; columns -= tile_columns<T>) {
    add_tile(std::false_type{});
    x += tile_columns<T>, left -= tile_columns<T>, target -= tile_columns<T>;
  }
  if (columns > 0) add_tile(std::true_type{});
  return warp_merge(sums, k);
}

// The same columns to the same lanes, by accesses of one column.
template <class T, bool HAS_SOFTCAP, bool HAS_STATS>
__device__ __noinline__ Sums<HAS_STATS> fold_unaligned(const T* row, int begin, int end, int label, float k,
                                                       float tanh_scale) {
  return fold_chunk<T, HAS_SOFTCAP, HAS_STATS, false>(row, begin, end, label, k, tanh_scale);
}

// ---------------------------------------------------------------------------------------------------------------------
// 32 rows of a sequence, a row to a lane

template <bool HAS_SOFTCAP>
__device__ inline float transform_one(float x, float tanh_scale) {
  return HAS_SOFTCAP ? tanhf(x * tanh_scale) : x;
}

// What one lane found out about its row.
struct TokenResult {
  RowResult policy;
  double ratio;  // policy - reference
  bool counted, valid;
};

// By a whole warp, after the rows of group `group_index` of s are done; (preference.cu) has it for pairs.
__device__ inline void group_finished(const Gather&, const Place&, int64_t, const TokenResult&) {}

template <class T, bool HAS_SOFTCAP, bool HAS_STATS, class Args>
__device__ __noinline__ void finish_group(const Args& a, unsigned first_row) {
  const Place s = locate(a.labels, first_row);
  const int group_of_sequence = s.token / warp, lane = threadIdx.x % warp, token = group_of_sequence * warp + lane;
  const int64_t group_index = first_group(a.labels, s) + group_of_sequence;
  const int chunks = static_cast<int>(a.chunks), sets = a.reference.data ? 2 : 1;
  const int64_t row = s.begin + token, rows = a.labels.rows, label = label_at(a.labels, s, token);
  const auto merged = [&](const Rows& x, int set, auto with_stats) {
    constexpr bool STATS = decltype(with_stats)::value;
    const int64_t slot = (group_index * sets + set) * chunks * warp + lane;
    Sums<STATS> sums;
#pragma unroll 4
    for (int c = 0; c < chunks; c++) {
      const float2 first = __ldcg(a.slots + slot + c * warp);
      Sums<STATS> other;
      other.top = other.base = first.x, other.sum = first.y;
      if (STATS) {
        const float4 more = __ldcg(a.stats_slots + slot + c * warp);
        other.sum_t = more.x, other.squared = more.y, other.value = more.z, other.largest = more.w;
      }
      sums.merge(other, a.k);
    }
    const float logit = to_float(row_of<T>(x, a.labels, s, token)[label]);
    return finish_row(sums, transform_one<HAS_SOFTCAP>(logit, a.tanh_scale), logit, a.multiplier, a.vocab);
  };

  TokenResult token_result;
  token_result.counted = label != a.labels.from.ignore_index;
  token_result.valid = token_result.counted && label >= 0 && label < a.vocab;
  const float blank = token_result.counted ? nanf("") : 0.0f;
  RowResult& policy = token_result.policy = {blank, blank, blank, {blank, blank, blank, blank}};
  if (token_result.valid) policy = merged(a.logits, 0, std::bool_constant<HAS_STATS>{});
  if constexpr (Args::has_pairs) {
    float reference = 0;
    if (a.reference.data && token_result.valid) reference = merged(a.reference, 1, std::false_type{}).logp;
    if (a.args.ref_token_logps && token_result.counted) reference = a.args.ref_token_logps[row];
    token_result.ratio = double(policy.logp) - double(reference);
  }
  if (token < s.length) {
    a.logps[row] = policy.logp;
    a.lse[row] = policy.lse_hi;
    a.lse[rows + row] = policy.lse_lo;
    if (HAS_STATS && a.stats)
      for (int i = 0; i < 4; i++) a.stats[i * rows + row] = policy.stats[i];
  }
  group_finished(a, s, group_index, token_result);
}

// ---------------------------------------------------------------------------------------------------------------------
// Kernel

struct Item {
  unsigned row;
  int set, chunk;
};

__device__ inline Item item_at(const Gather& a, unsigned item) {
  const unsigned row = a.items_per_row.divide(item), part = item - row * a.items_per_row.divisor;
  const int set = part >= a.chunks;
  return {row, set, static_cast<int>(part - (set ? a.chunks : 0))};
}

// What an item is, is found anew: nothing of it need live in registers while the chunk is folded.
template <class T, bool HAS_SOFTCAP, bool HAS_STATS, class Args>
__device__ __noinline__ void publish(const Args& a, unsigned item, unsigned valid, Sums<HAS_STATS> sums) {
  const int chunks = static_cast<int>(a.chunks), sets = a.reference.data ? 2 : 1;
  const Item i = item_at(a, item);
  const Place s = locate(a.labels, i.row);
  const int64_t group_index = first_group(a.labels, s) + s.token / warp;
  if (threadIdx.x % warp == 0) {
    const int64_t slot = ((group_index * sets + i.set) * chunks + i.chunk) * warp + s.token % warp;
    a.slots[slot] = {sums.top, sums.sum};
    if (HAS_STATS && !i.set)
      a.stats_slots[slot] = {sums.sum_t, sums.squared, sums.value, HAS_SOFTCAP ? sums.largest : sums.top};
  }
  if (is_last(a.tickets + 2 + group_index, __popc(valid) * sets * chunks))
    finish_group<T, HAS_SOFTCAP, HAS_STATS>(a, i.row);
}

// A sequence without rows has no group that could arrive for it; (preference.cu) has it for pairs.
__device__ inline void sequence_begins(const Gather&, int) {}

// Of 128 threads to a multiprocessor: 64 registers, with stats 72. Where they would spill at that, 96, with ptxas's
// schedules for sm_100 and sm_120, and 128 with a softcap too, whose time is arithmetic's.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int stats_blocks = 5;
#else
constexpr int stats_blocks = 7;
#endif
template <bool HAS_SOFTCAP, bool HAS_STATS>
constexpr int fwd_blocks = !HAS_STATS    ? 8
                           : HAS_SOFTCAP ? 4
                                         : stats_blocks;

template <class T, bool HAS_SOFTCAP, bool HAS_STATS, class Args>
__global__ void __launch_bounds__(fwd_threads, (fwd_blocks<HAS_SOFTCAP, HAS_STATS>))
    gather_kernel(const __grid_constant__ Args a) {
  const int lane = threadIdx.x % warp;
  const unsigned warps = gridDim.x * (fwd_threads / warp);
  unsigned claimed = 0;
  for (unsigned item = blockIdx.x * (fwd_threads / warp) + threadIdx.x / warp; item < a.items;
       item = __shfl_sync(0xffffffff, claimed, 0)) {
    if (lane == 0) claimed = warps + atomicAdd(a.tickets, 1);  // asked for early, used late
    if (item >= a.row_items) {
      sequence_begins(a, item - a.row_items);
      continue;
    }
    const Item i = item_at(a, item);
    const Place s = locate(a.labels, i.row);
    if (s.sequence == a.labels.sequences) continue;
    const int64_t labels = label_at(a.labels, s, s.token / warp * warp + lane);
    const unsigned valid =
        __ballot_sync(0xffffffff, labels != a.labels.from.ignore_index && labels >= 0 && labels < a.vocab);
    if (!(valid >> s.token % warp & 1)) {
      // a group without a row to read is finished by the item of its first row
      if (valid == 0 && s.token % warp == 0 && i.set == 0 && i.chunk == 0)
        finish_group<T, HAS_SOFTCAP, HAS_STATS>(a, i.row);
      continue;
    }
    const int label = __shfl_sync(0xffffffff, static_cast<int>(labels), s.token % warp);
    const T* x = row_of<T>(i.set ? a.reference : a.logits, a.labels, s, s.token);
    const int begin = i.chunk * chunk_columns<T>, end = min(begin + chunk_columns<T>, a.vocab);
    const bool aligned = (reinterpret_cast<uintptr_t>(x) & 15) == 0;
    const Sums<HAS_STATS> sums =
        aligned ? fold_chunk<T, HAS_SOFTCAP, HAS_STATS, true>(x, begin, end, label, a.k, a.tanh_scale)
                : fold_unaligned<T, HAS_SOFTCAP, HAS_STATS>(x, begin, end, label, a.k, a.tanh_scale);
    publish<T, HAS_SOFTCAP, HAS_STATS>(a, item, valid, sums);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Host

inline Rows device_rows(const LogitRows& rows) { return {rows.data, rows.outer_stride, rows.inner_stride}; }

inline int64_t rows_of(const TokenLabels& labels) {
  return labels.cu_seqlens.data ? labels.tokens : labels.sequences * labels.tokens;
}

inline Labels device_labels(const TokenLabels& labels) {
  const bool packed = labels.cu_seqlens.data != nullptr;
  return {labels, divider(packed || labels.tokens == 0 ? 1 : labels.tokens), static_cast<int>(labels.sequences),
          rows_of(labels)};
}

inline int64_t groups_of(const TokenLabels& labels) {
  return labels.cu_seqlens.data ? labels.tokens / warp + labels.sequences + 1
                                : labels.sequences * divide_up(labels.tokens, warp);
}

inline int64_t chunks_of(const LogitRows& logits) {
  return divide_up(logits.vocab, logits.dtype == DType::f32 ? chunk_columns<float> : chunk_columns<__half>);
}

// Takes arrays from memory, one after the other; without memory it only counts their bytes.
struct DeviceWorkspace {
  char* memory;
  Parts parts{};

  template <class T>
  T* take(int64_t count) {
    const int64_t at = parts.take(count * int64_t(sizeof(T)));
    return memory ? reinterpret_cast<T*>(memory + at) : nullptr;
  }
};

// The gather of `logits`, and of `reference` where it has data. Behind its own tickets are one for each pair.
inline void fill_gather(Gather& a, const LogitRows& logits, const LogitRows& reference, const LogitTransform& transform,
                        const TokenLabels& labels, bool stats, int64_t pairs, DeviceWorkspace& workspace) {
  const int64_t sets = reference.data ? 2 : 1, chunks = chunks_of(logits), groups = groups_of(labels);
  const int64_t rows = rows_of(labels);
  check(logits.vocab <= INT_MAX - 65536,
        "logits must have fewer than 2147418112 columns, got " + std::to_string(logits.vocab));
  check(rows * sets * chunks + labels.sequences <= INT_MAX,
        "logits must have at most " + std::to_string(INT_MAX / (sets * chunks)) + " rows of " +
            std::to_string(logits.vocab) + " columns, got " + std::to_string(rows));
  a.logits = device_rows(logits), a.reference = device_rows(reference);
  a.vocab = static_cast<int>(logits.vocab);
  a.chunks = static_cast<unsigned>(chunks);
  a.row_items = static_cast<unsigned>(rows * sets * chunks);
  a.items = a.row_items + static_cast<unsigned>(2 * pairs);
  a.items_per_row = divider(sets * chunks);
  a.multiplier = static_cast<float>(transform.multiplier), a.k = a.multiplier * log2e;
  a.tanh_scale = transform.tanh_scale;
  a.labels = device_labels(labels);
  a.ticket_count = 2 + groups + pairs;
  a.tickets = workspace.take<unsigned>(a.ticket_count);
  a.slots = workspace.take<float2>(groups * sets * chunks * warp);
  a.stats_slots = workspace.take<float4>(stats ? groups * sets * chunks * warp : 0);
}

// Blocks of `kernel` that fill the current device; asked for once a device.
template <class Kernel>
int64_t resident_blocks(Kernel kernel, std::atomic<int> (&known)[64]) {
  int device = 0;
  FASTPREF_CHECK_CUDA(cudaGetDevice(&device));
  const bool remembered = device < 64;
  if (remembered && known[device] > 0) return known[device];
  int blocks = 0, processors = 0;
  FASTPREF_CHECK_CUDA(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, fwd_threads, 0));
  FASTPREF_CHECK_CUDA(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  const int all = blocks * processors > 0 ? blocks * processors : 1;
  if (remembered) known[device] = all;
  return all;
}

template <class T, bool HAS_SOFTCAP, bool HAS_STATS, class Args>
void launch_gather_of(const Args& a, cudaStream_t stream) {
  static std::atomic<int> known[64];
  const auto kernel = gather_kernel<T, HAS_SOFTCAP, HAS_STATS, Args>;
  const int64_t blocks = divide_up(a.items, fwd_threads / warp), most = resident_blocks(kernel, known);
  kernel<<<static_cast<unsigned>(blocks < most ? blocks : most), fwd_threads, 0, stream>>>(a);
}

// One memset, one kernel.
template <class Args>
void launch_gather(const Args& a, DType dtype, bool stats, cudaStream_t stream) {
  FASTPREF_CHECK_CUDA(cudaMemsetAsync(a.tickets, 0, a.ticket_count * sizeof(unsigned), stream));
  const auto launch = [&](auto x) {
    using T = decltype(x);
    if (a.tanh_scale != 0)
      stats ? launch_gather_of<T, true, true>(a, stream) : launch_gather_of<T, true, false>(a, stream);
    else
      stats ? launch_gather_of<T, false, true>(a, stream) : launch_gather_of<T, false, false>(a, stream);
  };
  switch (dtype) {
    case DType::f32:
      launch(float{});
      break;
    case DType::bf16:
      launch(__nv_bfloat16{});
      break;
    case DType::f16:
      launch(__half{});
      break;
  }
  FASTPREF_CHECK_CUDA(cudaGetLastError());
}

}  // namespace
}  // namespace fastpref
