// The LM head's tile product on the CPU, the sums over the vocabulary folded into it, and the gradient from the tile.
// Compiled twice: the kernels with AVX-512, AVX512-BF16 and AMX enabled, the entry points with no flags (cpu_baseline).
//
// One product block is 32 vocabulary rows by 32 tokens, k in steps of 32. Both operands are packed, zero beyond their
// edges, as two tiles of 1 KiB per step:
//   panel (vocabulary side)  [steps][2][16 rows][32 k]
//   group (token side)       [steps][2][16 pairs of k][16 tokens][2]
// which is what AMX's tdpbf16ps multiplies and what vdpbf16ps broadcasts from and reads.
#include "linear_logps.h"

#include <cstddef>
#include <type_traits>

#include "arith.h"
#include "simd.h"

namespace fastpref {

enum class Product : int { none, avx512_bf16, amx };

namespace {

constexpr int64_t block = 32;
constexpr int64_t block_elements = block * block;
constexpr int64_t slice_rows = 1024;         // vocabulary rows with partial sums of their own, whatever the threads
constexpr int64_t chunk_bytes = 1280 << 10;  // packed token side that is to stay in L2 while panels pass by

// Of the hidden gradient, whose k is the vocabulary: packed at a time, so that both sides and the result stay in L2.
constexpr int64_t k_rows = 256, k_steps = k_rows / block;
constexpr int64_t unit_groups = 8, unit_columns = 16;  // of 32 tokens, of 32 hidden columns

// Sums of one slice over 32 tokens, without their target columns. v and t = (v - reference) * multiplier are those of
// token_logps.h; top is over the logits before tanh: ties need those.
struct BlockSums {
  float limit[block];  // a v above it moves the reference; -inf: no finite v so far
  float reference[block], top[block];
  double exp[block];
  double exp_t[block], exp_squared[block], value[block];  // with stats only
};

inline int64_t sums_bytes(bool stats) { return stats ? sizeof(BlockSums) : offsetof(BlockSums, exp_t); }

// Sums against a reference that moves by shift / multiplier.
inline void rebase(double& exp, double& exp_t, double& exp_squared, double shift) {
  if (exp == 0) return;
  const double factor = __builtin_exp(shift);
  exp_t = factor > 0 ? (exp_t + shift * exp) * factor : 0.0;
  exp *= factor;
  exp_squared *= factor * factor;
}

}  // namespace

struct ForwardPass {
  LinearLogpsForward args;
  Product product;
  int64_t steps;         // of 32 k: hidden, then adapter
  int64_t groups;        // of 32 tokens
  int64_t chunk_groups;  // packed groups that stay in L2
  bf16* hidden;          // [groups][steps] packed
  int32_t* labels;       // [groups * 32], -1: none
  float* targets;        // [groups * 32] logit of the label
  char* sums;            // [slices][groups] BlockSums
  BlockSums& block_sums(int64_t slice, int64_t group) const {
    return *reinterpret_cast<BlockSums*>(sums + (slice * groups + group) * sums_bytes(args.stats));
  }
};

struct BackwardPass {
  LinearLogpsBackward args;
  const float *lse, *others;  // [tile_stride] lse_hi; gradient per unit of e^t
  const uint32_t* live;       // [tile_stride / 32] bit per token: 0 writes a zero whatever the logit
};

struct WeightGradPass {
  const bf16* dz;
  int64_t tile_stride, rows, vocab, hidden_size;
  float* acc;
  bool accumulate;
  Product product;
  int64_t steps, groups, chunk_groups;  // steps of 32 tokens, groups of 32 hidden columns
  bf16* hidden;                         // [groups][steps] packed
};

struct HiddenGradPass {
  const bf16* dz;
  int64_t tile_stride, rows, vocab;
  const bf16* weight;
  int64_t weight_stride, hidden_size;
  bf16* out;
  Product product;
  int64_t splits, split_rows;  // of the vocabulary
  int64_t groups, columns;     // of 32 tokens, of 32 hidden columns
  float* partial;              // [splits][groups][columns][32 tokens][32 columns]
  float* block_at(int64_t split, int64_t group, int64_t column) const {
    return partial + ((split * groups + group) * columns + column) * block_elements;
  }
};

namespace avx512 {
void pack_hidden(const ForwardPass& pass, const bf16* hidden, const bf16* adapter_hidden, int64_t group);
bool project_slice(const ForwardPass& pass, int64_t slice, bf16* panel);
void scatter_rows(const BackwardPass& pass, int64_t begin, int64_t end);
void pack_weight_grad_group(const WeightGradPass& pass, const bf16* hidden, int64_t group);
void weight_grad_slice(const WeightGradPass& pass, int64_t slice, bf16* panel);
void hidden_grad_partial(const HiddenGradPass& pass, int64_t split, int64_t chunk, bf16* packed);
void hidden_grad_sum(const HiddenGradPass& pass, int64_t group);
}  // namespace avx512

}  // namespace fastpref

#if defined(FASTPREF_SIMD_avx512)

namespace fastpref::avx512 {
namespace {

constexpr __mmask16 all = 0xffff;  // masked forms: GCC 12 warns of an uninitialised register in the plain ones

inline uint32_t first_bits(int64_t n) { return n >= 32 ? ~0u : n <= 0 ? 0u : (1u << n) - 1; }

// 32 rows of `columns` bf16 into a panel; beyond rows and columns zero.
inline void pack_panel(const bf16* rows, int64_t stride, int64_t count, int64_t columns, bf16* panel) {
  for (int64_t half = 0; half < block; half += 16)
    for (int64_t k = 0; k < columns; k += block) {
      const uint32_t in = first_bits(columns - k);
      for (int64_t r = half; r < half + 16; r++)
        _mm512_store_si512(panel + k / block * block_elements + r * block,
                           _mm512_maskz_loadu_epi16(r < count ? in : 0, rows + r * stride + k));
    }
}

inline void transpose(__m512i (&r)[16]) {  // 16 x 16 of 32 bits
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_maskz_unpacklo_epi32(all, r[i], r[i + 1]);
    t[i + 1] = _mm512_maskz_unpackhi_epi32(all, r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++) {
      r[i + 2 * j] = _mm512_maskz_unpacklo_epi64(0xff, t[i + j], t[i + j + 2]);
      r[i + 2 * j + 1] = _mm512_maskz_unpackhi_epi64(0xff, t[i + j], t[i + j + 2]);
    }
  // r[4 q + c] holds, of rows 4 q .. 4 q + 3, the columns c, c + 4, c + 8, c + 12
  for (int c = 0; c < 4; c++) {
    const __m512i low = _mm512_maskz_shuffle_i32x4(all, r[c], r[4 + c], 0x88);
    const __m512i high = _mm512_maskz_shuffle_i32x4(all, r[8 + c], r[12 + c], 0x88);
    const __m512i low_odd = _mm512_maskz_shuffle_i32x4(all, r[c], r[4 + c], 0xdd);
    const __m512i high_odd = _mm512_maskz_shuffle_i32x4(all, r[8 + c], r[12 + c], 0xdd);
    t[c] = _mm512_maskz_shuffle_i32x4(all, low, high, 0x88);
    t[8 + c] = _mm512_maskz_shuffle_i32x4(all, low, high, 0xdd);
    t[4 + c] = _mm512_maskz_shuffle_i32x4(all, low_odd, high_odd, 0x88);
    t[12 + c] = _mm512_maskz_shuffle_i32x4(all, low_odd, high_odd, 0xdd);
  }
  for (int i = 0; i < 16; i++) r[i] = t[i];
}

// 32 tokens of `columns` bf16 into a group; beyond tokens and columns zero.
inline void pack_group(const bf16* tokens, int64_t count, int64_t columns, bf16* group) {
  for (int64_t half = 0; half < 2; half++)
    for (int64_t k = 0; k < columns; k += block) {
      const uint32_t in = first_bits(columns - k);
      __m512i r[16];
      for (int64_t t = 0; t < 16; t++)
        r[t] = half * 16 + t < count ? _mm512_maskz_loadu_epi16(in, tokens + (half * 16 + t) * columns + k)
                                     : _mm512_setzero_si512();
      transpose(r);
      for (int p = 0; p < 16; p++)
        _mm512_store_si512(group + k / block * block_elements + half * 512 + p * block, r[p]);
    }
}

// The first 16 of `columns` columns of rows 2 pair and 2 pair + 1, side by side.
inline __m512i load_pair(const bf16* rows, int64_t stride, int64_t count, int64_t columns, int64_t pair) {
  const __mmask16 in = static_cast<__mmask16>(first_bits(columns));
  const auto row = [&](int64_t r) {
    return _mm512_maskz_cvtepu16_epi32(all, _mm256_maskz_loadu_epi16(r < count ? in : 0, rows + r * stride));
  };
  return _mm512_or_si512(row(2 * pair), _mm512_maskz_slli_epi32(all, row(2 * pair + 1), 16));
}

// `count` rows of `columns` columns into groups of 32 columns, whose k are the rows; beyond rows and columns zero.
// Groups and panels lie `steps` apart; the rows are read about as they lie in memory.
inline void pack_pairs(const bf16* rows, int64_t stride, int64_t count, int64_t columns, int64_t steps, bf16* groups) {
  for (int64_t step = 0; step < steps; step++)
    for (int64_t column = 0; column < columns; column += 16) {
      bf16* out = groups + (column / block * steps + step) * block_elements + column % block * block;
      for (int p = 0; p < 16; p++)
        _mm512_store_si512(out + p * block, load_pair(rows + column, stride, count, columns - column, step * 16 + p));
      if (columns - column <= 16 && column % block == 0) std::memset(static_cast<void*>(out + 512), 0, 1024);
    }
}

// The same as panels: their rows are the columns.
inline void pack_transposed(const bf16* rows, int64_t stride, int64_t count, int64_t columns, int64_t steps,
                            bf16* panels) {
  for (int64_t step = 0; step < steps; step++)
    for (int64_t column = 0; column < columns; column += 16) {
      __m512i r[16];
      for (int p = 0; p < 16; p++) r[p] = load_pair(rows + column, stride, count, columns - column, step * 16 + p);
      transpose(r);
      bf16* out = panels + (column / block * steps + step) * block_elements + column % block * block;
      for (int i = 0; i < 16; i++) _mm512_store_si512(out + i * block, r[i]);
    }
}

// A strided region on its way to L2 while AMX multiplies.
struct Prefetch {
  const bf16* row;
  int64_t stride, rows, columns, at = 0;

  void some(int lines) {
    for (; lines > 0 && rows > 0; lines--) {
      __builtin_prefetch(row + at, 0, 2);
      at += block;
      if (at < columns) continue;
      at = 0;
      rows--;
      row += stride;
    }
  }
};

#if defined(__AMX_BF16__)
struct alignas(64) TileConfig {  // eight tiles of 16 rows by 64 bytes
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t columns[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
#endif

// Tiles configured for as long as this lives: others use them in the same threads.
template <Product PRODUCT>
struct Tiles {
  Tiles() {
#if defined(__AMX_BF16__)
    const TileConfig config;
    asm volatile("" ::"r"(&config) : "memory");
    if constexpr (PRODUCT == Product::amx) _tile_loadconfig(&config);
#endif
  }
  ~Tiles() {
#if defined(__AMX_BF16__)
    if constexpr (PRODUCT == Product::amx) _tile_release();
#endif
  }
};

// c [32 rows of the panel, 32 of the group], rows c_stride apart: = panel x group, or += with ACCUMULATE. between() is
// called once per step, for vector work that may fill the time of AMX's multiplications.
template <Product PRODUCT, bool ACCUMULATE, class F>
inline void multiply(const bf16* panel, const bf16* group, int64_t steps, float* c, int64_t c_stride,
                     const F& between) {
#if defined(__AMX_BF16__)
  if constexpr (PRODUCT == Product::amx) {
    asm volatile("" ::: "memory");  // GCC's tile loads do not say that they read memory
    const int64_t bytes = c_stride * 4;
    if constexpr (ACCUMULATE) {
      _tile_loadd(0, c, bytes);
      _tile_loadd(1, c + 16, bytes);
      _tile_loadd(2, c + 16 * c_stride, bytes);
      _tile_loadd(3, c + 16 * c_stride + 16, bytes);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t step = 0; step < steps; step++) {
      _tile_loadd(4, panel + step * block_elements, 64);
      _tile_loadd(6, group + step * block_elements, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, group + step * block_elements + 512, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, panel + step * block_elements + 512, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
      between();
    }
    _tile_stored(0, c, bytes);
    _tile_stored(1, c + 16, bytes);
    _tile_stored(2, c + 16 * c_stride, bytes);
    _tile_stored(3, c + 16 * c_stride + 16, bytes);
    asm volatile("" ::: "memory");
    return;
  }
#endif
  constexpr int rows = 8;
  constexpr int64_t stretch = 4;  // steps summed on their own, as AMX does one: 128 k, for less rounding error
  for (int64_t begin = 0; begin < steps; begin += stretch) {
    const int64_t end = smaller(begin + stretch, steps);
    for (int64_t first = 0; first < block; first += rows) {
      __m512 sum[rows][2];
      for (int r = 0; r < rows; r++) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
      for (int64_t step = begin; step < end; step++) {
        const bf16* a = panel + step * block_elements + first * block;
        const bf16* b = group + step * block_elements;
        for (int pair = 0; pair < 16; pair++) {
          const __m512bh b0 = (__m512bh)_mm512_load_si512(b + pair * block);
          const __m512bh b1 = (__m512bh)_mm512_load_si512(b + 512 + pair * block);
          for (int r = 0; r < rows; r++) {
            int32_t two;
            std::memcpy(&two, a + r * block + 2 * pair, 4);
            const __m512bh broadcast = (__m512bh)_mm512_set1_epi32(two);
            sum[r][0] = _mm512_dpbf16_ps(sum[r][0], broadcast, b0);
            sum[r][1] = _mm512_dpbf16_ps(sum[r][1], broadcast, b1);
          }
        }
      }
      for (int r = 0; r < rows; r++) {
        float* out = c + (first + r) * c_stride;
        const bool add = ACCUMULATE || begin > 0;
        for (int half = 0; half < 2; half++, out += 16)
          _mm512_storeu_ps(out, add ? _mm512_loadu_ps(out) + sum[r][half] : sum[r][half]);
      }
    }
  }
}

// 32 tokens of one vocabulary row as two vectors, in order.
inline Pair load_tokens(const f16* p) { return load(p); }
inline Pair load_tokens(const bf16* p) {
  const auto half = [](const bf16* p) {
    return (Vf)((Vu)_mm512_maskz_cvtepu16_epi32(all, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))) << 16);
  };
  return {half(p), half(p + 16)};
}
inline __m512i pack_tokens(const f16* type, Pair v) { return (__m512i)pack(type, v); }
inline __m512i pack_tokens(const bf16*, Pair v) { return (__m512i)_mm512_cvtne2ps_pbh((__m512)v.b, (__m512)v.a); }

inline Vf load_vector(const float* p) {
  Vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// The fold of a product block into the sums of its 32 tokens, in three parts so that the rows can run between the
// multiplications of the next block.
template <class T, bool SOFTCAP, bool STATS>
struct Fold {
  static constexpr bool round_logits = std::is_same_v<T, bf16>;
  const ForwardPass& pass;
  const float multiplier, tanh_scale;
  bool fits = true;

  float* logits = nullptr;  // [32 v][32 t]
  BlockSums* sums = nullptr;
  T* tile = nullptr;
  int64_t first = 0, group = 0;  // its vocabulary row and tokens
  int count = 0, next = 0;       // rows of the block, rows folded; -1: not begun
  bool has_target = false;
  Vi target_a{}, target_b{};  // row of each token's label
  Vf reference_a{}, reference_b{}, exp_a{}, exp_b{}, exp_t_a{}, exp_t_b{}, squared_a{}, squared_b{}, value_a{},
      value_b{};

  explicit Fold(const ForwardPass& pass)
      : pass(pass),
        multiplier(static_cast<float>(pass.args.transform.multiplier)),
        tanh_scale(pass.args.transform.tanh_scale) {}

  // logits is a finished block; whatever of it has not been folded by then, finish() folds
  void enqueue(float* block_logits, BlockSums& block_sums, int64_t first_row, int64_t rows, int64_t token_group) {
    logits = block_logits;
    sums = &block_sums;
    first = first_row;
    group = token_group;
    count = static_cast<int>(rows);
    next = -1;
  }

  void some() {
    if (next < 0)
      begin();
    else if (next + 3 <= count)
      for (int i = 0; i < 3; i++) add_row();
  }

  void finish() {
    if (next < 0) begin();
    while (next < count) add_row();
    if (!sums) return;
    add(sums->exp, exp_a, exp_b);
    if constexpr (STATS) {
      add(sums->exp_t, exp_t_a, exp_t_b);
      add(sums->exp_squared, squared_a, squared_b);
      add(sums->value, value_a, value_b);
    }
    sums = nullptr;
  }

 private:
  void begin() {
    next = 0;
    tile = pass.args.tile ? static_cast<T*>(pass.args.tile) + first * pass.args.tile_stride + group * block : nullptr;
    adjust();
    find_targets();
    for_targets([&](float& logit, float& target) {
      target = logit;
      logit = -__builtin_inff();
    });

    Vf top_a = splat(-__builtin_inff()), top_b = top_a, bottom_a = -top_a, bottom_b = -top_a;
    for (int i = 0; i < count; i++) {
      const Pair v = load(logits + i * block);
      top_a = (Vf)_mm512_maskz_max_ps(all, (__m512)v.a, (__m512)top_a);  // of a NaN and a number the number
      top_b = (Vf)_mm512_maskz_max_ps(all, (__m512)v.b, (__m512)top_b);
      bottom_a = (Vf)_mm512_maskz_min_ps(all, (__m512)v.a, (__m512)bottom_a);
      bottom_b = (Vf)_mm512_maskz_min_ps(all, (__m512)v.b, (__m512)bottom_b);
    }
    for_targets([&](float& logit, float& target) { logit = target; });
    if (!round_logits && tile && (has_target || outside(vmax(top_a, top_b), bottom_a < bottom_b ? bottom_a : bottom_b)))
      for (int i = 0; i < count * block; i++) fits = fits && !beyond_half(logits[i]);
    raise(0, top_a);
    raise(16, top_b);
    reference_a = load_vector(sums->reference);
    reference_b = load_vector(sums->reference + 16);
    exp_a = exp_b = exp_t_a = exp_t_b = squared_a = squared_b = value_a = value_b = Vf{};
  }

  void add_row() {
    const int row = next++;
    const Pair x = load(logits + row * block);
    if (tile)
      store_vector<true>(tile + row * pass.args.tile_stride, (Vf)pack_tokens(static_cast<const T*>(nullptr), x));
    Vf v_a = SOFTCAP ? tanh(x.a * tanh_scale) : x.a, v_b = SOFTCAP ? tanh(x.b * tanh_scale) : x.b;
    const Vf t_a = (v_a - reference_a) * multiplier, t_b = (v_b - reference_b) * multiplier;
    Vf e_a = exp_term(t_a), e_b = exp_term(t_b);
    if (has_target) {  // not part of the sums
      const Vf zero{};
      e_a = target_a == row ? zero : e_a;
      e_b = target_b == row ? zero : e_b;
      if constexpr (STATS) {
        v_a = target_a == row ? zero : v_a;
        v_b = target_b == row ? zero : v_b;
      }
    }
    exp_a += e_a;
    exp_b += e_b;
    if constexpr (STATS) {
      const Vf lowest = splat(-200.0f);  // 0 * -inf counts as 0
      exp_t_a += e_a * vmax(lowest, t_a);
      exp_t_b += e_b * vmax(lowest, t_b);
      squared_a += e_a * e_a;
      squared_b += e_b * e_b;
      value_a += v_a;
      value_b += v_b;
    }
  }

  static void add(double* to, Vf a, Vf b) {
    float both[block];
    store<false>(both, {a, b});
    for (int i = 0; i < block; i++) to[i] += both[i];
  }

  void adjust() {
    const float* bias = pass.args.projection.bias;
    if (!bias && !round_logits) return;
    for (int i = 0; i < count; i++) {
      Pair v = load(logits + i * block);
      if (bias) v = {v.a + bias[first + i], v.b + bias[first + i]};
      if constexpr (round_logits) v = {(Vf)(float_to_bf16(v.a) << 16), (Vf)(float_to_bf16(v.b) << 16)};
      store<false>(logits + i * block, v);
    }
  }

  void find_targets() {
    const int32_t* labels = pass.labels + group * block;
    std::memcpy(&target_a, labels, sizeof target_a);
    std::memcpy(&target_b, labels + 16, sizeof target_b);
    target_a -= static_cast<int32_t>(first);
    target_b -= static_cast<int32_t>(first);
    has_target = targets(target_a) || targets(target_b);
  }

  uint32_t targets(Vi row) const { return _mm512_cmplt_epu32_mask((__m512i)row, _mm512_set1_epi32(count)); }

  template <class F>
  void for_targets(const F& f) {
    if (!has_target) return;
    for (uint32_t in = targets(target_a) | targets(target_b) << 16; in; in &= in - 1) {
      const int lane = __builtin_ctz(in);
      f(logits[(lane < 16 ? target_a[lane] : target_b[lane - 16]) * block + lane], pass.targets[group * block + lane]);
    }
  }

  static bool outside(Vf top, Vf bottom) {
    return _mm512_cmp_ps_mask((__m512)top, _mm512_set1_ps(65504.0f), _CMP_GT_OQ) ||
           _mm512_cmp_ps_mask((__m512)bottom, _mm512_set1_ps(-65504.0f), _CMP_LT_OQ);
  }

  static bool beyond_half(float z) {
    const float magnitude = z < 0 ? -z : z;
    return magnitude > 65504.0f && magnitude < __builtin_inff();
  }

  void raise(int lane0, Vf top_x) {  // the references to the block's maxima, where those are clearly above
    const Vf top = SOFTCAP ? tanh(top_x * tanh_scale) : top_x;
    const Vf so_far = load_vector(sums->top + lane0);
    store_vector<false>(sums->top + lane0, vmax(top_x, so_far));
    const Vf limit = load_vector(sums->limit + lane0);
    for (uint32_t above = _mm512_cmp_ps_mask((__m512)top, (__m512)limit, _CMP_GT_OQ); above; above &= above - 1) {
      const int i = __builtin_ctz(above), lane = lane0 + i;
      double none = 0;
      const double shift = (double(sums->reference[lane]) - double(top[i])) * pass.args.transform.multiplier;
      rebase(sums->exp[lane], STATS ? sums->exp_t[lane] : none, STATS ? sums->exp_squared[lane] : none, shift);
      sums->reference[lane] = top[i];
      sums->limit[lane] = top[i] + 1.0f / multiplier;  // further above, v - reference loses bits that v had
    }
  }
};

template <Product PRODUCT, class T, bool SOFTCAP, bool STATS>
__attribute__((flatten)) bool project(const ForwardPass& pass, int64_t slice, bf16* panel) {
  const LinearProjection& p = pass.args.projection;
  const int64_t begin = slice * slice_rows, end = smaller(begin + slice_rows, p.vocab);
  const int64_t group_elements = pass.steps * block_elements;
  for (int64_t g = 0; g < pass.groups; g++) {
    BlockSums& sums = pass.block_sums(slice, g);
    std::memset(static_cast<void*>(&sums), 0, sums_bytes(STATS));
    for (int i = 0; i < block; i++) sums.limit[i] = sums.top[i] = -__builtin_inff();
  }
  const Tiles<PRODUCT> tiles;
  alignas(64) float logits[2][block_elements];
  int which = 0;
  Fold<T, SOFTCAP, STATS> fold(pass);
  for (int64_t first_group = 0; first_group < pass.groups; first_group += pass.chunk_groups) {
    const int64_t end_group = smaller(first_group + pass.chunk_groups, pass.groups);
    for (int64_t v = begin; v < end; v += block) {
      const int64_t count = smaller(block, end - v);
      const bf16* weight = p.weight + v * p.weight_stride;
      pack_panel(weight, p.weight_stride, count, p.hidden_size, panel);
      if (p.rank)
        pack_panel(p.adapter + v * p.adapter_stride, p.adapter_stride, count, p.rank,
                   panel + divide_up(p.hidden_size, block) * block_elements);
      for (int64_t g = first_group; g < end_group; g++) {
        multiply<PRODUCT, false>(panel, pass.hidden + g * group_elements, pass.steps, logits[which], block,
                                 [&]() __attribute__((always_inline)) { fold.some(); });
        fold.finish();
        fold.enqueue(logits[which], pass.block_sums(slice, g), v, count, g);
        which ^= 1;
      }
    }
  }
  fold.finish();
  stream_fence();
  return fold.fits;
}

template <Product PRODUCT, class T>
bool project_type(const ForwardPass& pass, int64_t slice, bf16* panel) {
  if (pass.args.transform.tanh_scale != 0)
    return pass.args.stats ? project<PRODUCT, T, true, true>(pass, slice, panel)
                           : project<PRODUCT, T, true, false>(pass, slice, panel);
  return pass.args.stats ? project<PRODUCT, T, false, true>(pass, slice, panel)
                         : project<PRODUCT, T, false, false>(pass, slice, panel);
}

template <class T, bool SOFTCAP>
__attribute__((flatten)) void scatter(const BackwardPass& pass, int64_t begin, int64_t end) {
  const LinearLogpsBackward& args = pass.args;
  const float multiplier = static_cast<float>(args.transform.multiplier), tanh_scale = args.transform.tanh_scale;
  const auto gradient = [&](Vf x, Vf lse, Vf others) {
    if constexpr (SOFTCAP) {
      const Vf y = x * tanh_scale;
      return exp_term((tanh(y) - lse) * multiplier) * others * tanh_slope(y);
    }
    return exp_term((x - lse) * multiplier) * others;
  };
  for (int64_t v = begin; v < end; v++) {
    T* row = static_cast<T*>(args.tile) + v * args.tile_stride;
    for (int64_t t = 0; t < args.tile_stride; t += block) {
      const Pair x = load_tokens(row + t), lse = load(pass.lse + t), others = load(pass.others + t);
      const Pair out = {gradient(x.a, lse.a, others.a), gradient(x.b, lse.b, others.b)};
      const __m512i packed = pack_tokens(static_cast<const bf16*>(nullptr), out);
      _mm512_storeu_si512(row + t, _mm512_maskz_mov_epi16(pass.live[t / block], packed));
    }
  }
}

template <Product PRODUCT, bool ACCUMULATE>
__attribute__((flatten)) void weight_grad(const WeightGradPass& pass, int64_t slice, bf16* panel) {
  const int64_t begin = slice * slice_rows, end = smaller(begin + slice_rows, pass.vocab), hidden = pass.hidden_size;
  const int64_t group_elements = pass.steps * block_elements;
  const Tiles<PRODUCT> tiles;
  alignas(64) float edge[block_elements];
  for (int64_t first_group = 0; first_group < pass.groups; first_group += pass.chunk_groups) {
    const int64_t end_group = smaller(first_group + pass.chunk_groups, pass.groups);
    for (int64_t v = begin; v < end; v += block) {
      const int64_t count = smaller(block, end - v);
      pack_panel(pass.dz + v * pass.tile_stride, pass.tile_stride, count, pass.rows, panel);
      for (int64_t g = first_group; g < end_group; g++) {
        float* out = pass.acc + v * hidden + g * block;
        const bf16* group = pass.hidden + g * group_elements;
        const int64_t columns = smaller(block, hidden - g * block);
        if (count == block && columns == block) {
          // the next block of acc on its way: a tile load of 16 distant lines would wait for each
          const float* ahead = g + 1 < end_group ? out + block : pass.acc + (v + block) * hidden + first_group * block;
          int left = g + 1 < end_group || v + block < end ? block : 0;
          multiply<PRODUCT, ACCUMULATE>(panel, group, pass.steps, out, hidden, [&]() __attribute__((always_inline)) {
            for (int i = 0; i < 2 && left > 0; i++, left--, ahead += hidden) {
              __builtin_prefetch(ahead, 1);
              __builtin_prefetch(ahead + 16, 1);
            }
          });
          continue;
        }
        multiply<PRODUCT, false>(panel, group, pass.steps, edge, block, [] {});
        for (int64_t r = 0; r < count; r++)
          for (int64_t c = 0; c < columns; c++)
            out[r * hidden + c] = (ACCUMULATE ? out[r * hidden + c] : 0.0f) + edge[r * block + c];
      }
    }
  }
}

template <Product PRODUCT>
__attribute__((flatten)) void hidden_grad(const HiddenGradPass& pass, int64_t split, int64_t chunk, bf16* packed) {
  const int64_t begin = split * pass.split_rows, end = smaller(begin + pass.split_rows, pass.vocab);
  const int64_t first_group = chunk * unit_groups, end_group = smaller(first_group + unit_groups, pass.groups);
  bf16 *const panels = packed, *const groups = packed + unit_groups * k_steps * block_elements;
  const Tiles<PRODUCT> tiles;
  for (int64_t first_column = 0; first_column < pass.columns; first_column += unit_columns) {
    const int64_t end_column = smaller(first_column + unit_columns, pass.columns);
    for (int64_t v = begin; v < end; v += k_rows) {
      const int64_t count = smaller(k_rows, end - v), steps = divide_up(count, block);
      pack_transposed(pass.dz + v * pass.tile_stride + first_group * block, pass.tile_stride, count,
                      (end_group - first_group) * block, steps, panels);
      pack_pairs(pass.weight + v * pass.weight_stride + first_column * block, pass.weight_stride, count,
                 smaller(unit_columns * block, pass.hidden_size - first_column * block), steps, groups);
      const int64_t next = v + k_rows, next_count = smaller(k_rows, end - next);
      Prefetch weight{pass.weight + next * pass.weight_stride + first_column * block, pass.weight_stride, next_count,
                      (end_column - first_column) * block};
      Prefetch dz{pass.dz + next * pass.tile_stride + first_group * block, pass.tile_stride, next_count,
                  (end_group - first_group) * block};
      const auto prefetch = [&]() __attribute__((always_inline)) {
        weight.some(4);
        dz.some(2);
      };
      for (int64_t g = first_group; g < end_group; g++)
        for (int64_t h = first_column; h < end_column; h++) {
          const bf16* panel = panels + (g - first_group) * steps * block_elements;
          const bf16* group = groups + (h - first_column) * steps * block_elements;
          float* out = pass.block_at(split, g, h);
          if (v == begin)
            multiply<PRODUCT, false>(panel, group, steps, out, block, prefetch);
          else
            multiply<PRODUCT, true>(panel, group, steps, out, block, prefetch);
        }
    }
  }
}

}  // namespace

void pack_hidden(const ForwardPass& pass, const bf16* hidden, const bf16* adapter_hidden, int64_t group) {
  const LinearProjection& p = pass.args.projection;
  const int64_t first = group * block, count = smaller(block, p.rows - first);
  bf16* out = pass.hidden + group * pass.steps * block_elements;
  pack_group(hidden + first * p.hidden_size, count, p.hidden_size, out);
  if (p.rank)
    pack_group(adapter_hidden + first * p.rank, count, p.rank, out + divide_up(p.hidden_size, block) * block_elements);
}

bool project_slice(const ForwardPass& pass, int64_t slice, bf16* panel) {
  if (pass.product == Product::amx)
    return pass.args.round_logits ? project_type<Product::amx, bf16>(pass, slice, panel)
                                  : project_type<Product::amx, f16>(pass, slice, panel);
  return pass.args.round_logits ? project_type<Product::avx512_bf16, bf16>(pass, slice, panel)
                                : project_type<Product::avx512_bf16, f16>(pass, slice, panel);
}

void scatter_rows(const BackwardPass& pass, int64_t begin, int64_t end) {
  if (pass.args.transform.tanh_scale != 0)
    return pass.args.tile_is_bf16 ? scatter<bf16, true>(pass, begin, end) : scatter<f16, true>(pass, begin, end);
  return pass.args.tile_is_bf16 ? scatter<bf16, false>(pass, begin, end) : scatter<f16, false>(pass, begin, end);
}

void pack_weight_grad_group(const WeightGradPass& pass, const bf16* hidden, int64_t group) {
  pack_pairs(hidden + group * block, pass.hidden_size, pass.rows, smaller(block, pass.hidden_size - group * block),
             pass.steps, pass.hidden + group * pass.steps * block_elements);
}

void weight_grad_slice(const WeightGradPass& pass, int64_t slice, bf16* panel) {
  if (pass.product == Product::amx)
    return pass.accumulate ? weight_grad<Product::amx, true>(pass, slice, panel)
                           : weight_grad<Product::amx, false>(pass, slice, panel);
  return pass.accumulate ? weight_grad<Product::avx512_bf16, true>(pass, slice, panel)
                         : weight_grad<Product::avx512_bf16, false>(pass, slice, panel);
}

void hidden_grad_partial(const HiddenGradPass& pass, int64_t split, int64_t chunk, bf16* packed) {
  if (pass.product == Product::amx) return hidden_grad<Product::amx>(pass, split, chunk, packed);
  return hidden_grad<Product::avx512_bf16>(pass, split, chunk, packed);
}

void hidden_grad_sum(const HiddenGradPass& pass, int64_t group) {
  for (int64_t t = 0; t < smaller(block, pass.rows - group * block); t++)
    for (int64_t h = 0; h < pass.columns; h++) {
      Pair sum{};
      for (int64_t split = 0; split < pass.splits; split++) {
        const Pair part = load(pass.block_at(split, group, h) + t * block);
        sum = {sum.a + part.a, sum.b + part.b};
      }
      _mm512_mask_storeu_epi16(pass.out + (group * block + t) * pass.hidden_size + h * block,
                               first_bits(pass.hidden_size - h * block),
                               pack_tokens(static_cast<const bf16*>(nullptr), sum));
    }
}

}  // namespace fastpref::avx512

#else  // the entry points, once

#include <atomic>
#include <cstddef>
#include <string>
#include <vector>

#include "check.h"
#include "parallel.h"

#if defined(FASTPREF_LINEAR_PRODUCT)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace fastpref {
namespace {

#if defined(FASTPREF_LINEAR_PRODUCT)

bool has_avx512_bf16() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
}

bool has_amx() {
#if defined(FASTPREF_AMX) && defined(__linux__) && defined(SYS_arch_prctl)
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!has_avx512_bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low >> 17 & 3) != 3) return false;
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, for the whole process
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

Product best_product() {
  static const Product best = has_amx() ? Product::amx : has_avx512_bf16() ? Product::avx512_bf16 : Product::none;
  return best;
}

#else

Product best_product() { return Product::none; }

#endif

std::atomic<Product>& chosen_product() {
  static std::atomic<Product> product{best_product()};
  return product;
}

Product product_in_use() { return simd_level() == SimdLevel::avx512 ? chosen_product().load() : Product::none; }

Product need_product() {
  const Product product = product_in_use();
  check(product != Product::none, "the linear kernels need AVX512-BF16 or AMX, and neither is in use");
  return product;
}

int64_t groups_per_chunk(int64_t groups, int64_t steps) {  // chunks of about the same size
  const int64_t most = chunk_bytes / (steps * block_elements * 2);
  return most < 1 ? 1 : divide_up(groups, divide_up(groups, most));
}

int64_t packed_bytes(int64_t steps) { return steps * block_elements * 2; }

// Offsets in bytes. Each thread has panels of its own.
struct ForwardLayout {
  int64_t steps, groups, slices;
  Parts parts;
  int64_t hidden, labels, targets, sums, panels;
  ForwardLayout(int64_t rows, int64_t hidden_size, int64_t vocab, int64_t rank, bool stats, int threads)
      : steps(divide_up(hidden_size, block) + divide_up(rank, block)),
        groups(divide_up(rows, block)),
        slices(divide_up(vocab, slice_rows)),
        hidden(parts.take(groups * packed_bytes(steps))),
        labels(parts.take(groups * block * int64_t(sizeof(int32_t)))),
        targets(parts.take(groups * block * int64_t(sizeof(float)))),
        sums(parts.take(slices * groups * sums_bytes(stats))),
        panels(parts.take(threads * packed_bytes(steps))) {}
};

struct WeightGradLayout {
  int64_t steps, groups;
  Parts parts;
  int64_t hidden, panels;
  WeightGradLayout(int64_t rows, int64_t hidden_size, int threads)
      : steps(divide_up(rows, block)),
        groups(divide_up(hidden_size, block)),
        hidden(parts.take(groups * packed_bytes(steps))),
        panels(parts.take(threads * packed_bytes(steps))) {}
};

struct HiddenGradLayout {
  int64_t groups, columns, splits, split_rows;
  Parts parts;
  int64_t partial, packed;
  HiddenGradLayout(int64_t rows, int64_t hidden_size, int64_t vocab, int threads)
      : groups(divide_up(rows, block)), columns(divide_up(hidden_size, block)) {
    const int64_t partial_bytes = groups * columns * block_elements * int64_t(sizeof(float));
    constexpr int64_t most_splits = 16, most_bytes = 20 << 20;  // whatever the threads
    splits = smaller(divide_up(vocab, 8 * k_rows), most_splits);
    while (splits > 1 && splits * partial_bytes > most_bytes) splits--;
    split_rows = splits ? round_up(divide_up(vocab, splits), k_rows) : 0;
    splits = splits ? divide_up(vocab, split_rows) : 0;
    partial = parts.take(splits * partial_bytes);
    packed = parts.take(threads * packed_bytes((unit_groups + unit_columns) * k_steps));
  }
};

void check_tile(const void* tile, int64_t tile_stride, int64_t rows, int64_t vocab) {
  check(tile_stride >= rows && tile_stride % block == 0, "tile_stride must be a multiple of 32 and at least " +
                                                             std::to_string(rows) + ", got " +
                                                             std::to_string(tile_stride));
  check(reinterpret_cast<uintptr_t>(tile) % 64 == 0, "the tile must be aligned to 64 bytes");
  check(vocab < int64_t{1} << 31, "vocab must be below 2^31, got " + std::to_string(vocab));
}

template <class T>
float read_logit(const void* tile, int64_t at) {
  using namespace baseline;
  T padded[2 * W] = {static_cast<const T*>(tile)[at]};
  return load(padded).a[0];
}

bf16 rounded(float value) { return {static_cast<uint16_t>(baseline::float_to_bf16(baseline::splat(value))[0])}; }

void finish_row(const ForwardPass& pass, int64_t slices, int64_t row) {
  const LinearLogpsForward& args = pass.args;
  const int64_t rows = args.projection.rows, lane = row % block;
  const double multiplier = args.transform.multiplier;
  if (args.labels[row] == args.ignore_index) {
    args.logps[row] = args.lse[row] = args.lse[rows + row] = 0;
    if (args.stats)
      for (int s = 0; s < 4; s++) args.stats[s * rows + row] = 0;
    return;
  }
  // all slices, in order, against the largest of their references
  float reference = -__builtin_inff(), top = reference;
  for (int64_t slice = 0; slice < slices; slice++) {
    const BlockSums& sums = pass.block_sums(slice, row / block);
    if (sums.limit[lane] > -__builtin_inff() && sums.reference[lane] > reference) reference = sums.reference[lane];
    if (sums.top[lane] > top) top = sums.top[lane];
  }
  const float x_target = pass.targets[row];
  const double target =
      args.transform.tanh_scale != 0 ? __builtin_tanh(double(x_target) * args.transform.tanh_scale) : x_target;
  // nothing but -inf beside the target: it is the whole sum
  if (!(reference > -__builtin_inff())) reference = target > -__builtin_inf() ? static_cast<float>(target) : 0.0f;
  double exp = 0, exp_t = 0, exp_squared = 0, value = 0;
  for (int64_t slice = 0; slice < slices; slice++) {
    const BlockSums& sums = pass.block_sums(slice, row / block);
    double e = sums.exp[lane], e_t = args.stats ? sums.exp_t[lane] : 0,
           squared = args.stats ? sums.exp_squared[lane] : 0;
    if (sums.reference[lane] != reference)
      rebase(e, e_t, squared, (double(sums.reference[lane]) - double(reference)) * multiplier);
    exp += e;
    exp_t += e_t;
    exp_squared += squared;
    if (args.stats) value += sums.value[lane];
  }

  const double log_sum = __builtin_log(exp);  // relative to the reference
  // a +inf logit has no softmax, here as beside the target
  const double d =
      target < __builtin_inf() ? multiplier * (double(reference) - target) + log_sum : double(__builtin_nanf(""));
  args.logps[row] =
      static_cast<float>(d > 0 ? -(d + __builtin_log1p(__builtin_exp(-d))) : 0.0 - __builtin_log1p(__builtin_exp(d)));

  const double largest = target > reference ? target : reference;
  const double log_all = __builtin_log(__builtin_exp(log_sum + multiplier * (reference - largest)) +
                                       __builtin_exp(multiplier * (target - largest)));
  const float hi = static_cast<float>(largest + log_all / multiplier);
  args.lse[row] = hi;
  args.lse[rows + row] = hi - hi == 0 ? static_cast<float>(multiplier * (largest - double(hi)) + log_all) : 0.0f;

  if (args.stats) {
    if (target > reference) {
      rebase(exp, exp_t, exp_squared, (double(reference) - double(static_cast<float>(target))) * multiplier);
      reference = static_cast<float>(target);
    }
    const double t = (target - reference) * multiplier, e = __builtin_exp(t);
    const double all = exp + e;
    args.stats[row] = static_cast<float>(__builtin_log(all) - (exp_t + (e > 0 ? e * t : 0.0)) / all);
    args.stats[rows + row] = static_cast<float>(__builtin_log(exp_squared + e * e) - 2 * __builtin_log(all));
    args.stats[2 * rows + row] = static_cast<float>(multiplier * (value + target) / args.projection.vocab);
    args.stats[3 * rows + row] = x_target >= top ? 1.0f : 0.0f;
  }
}

}  // namespace

const char* linear_logps_product() {
  switch (product_in_use()) {
    case Product::amx:
      return "amx";
    case Product::avx512_bf16:
      return "avx512_bf16";
    case Product::none:
      break;
  }
  return "";
}

void set_linear_product(const char* name) {
  const std::string wanted = name;
  Product product = best_product();
  if (wanted == "none")
    product = Product::none;
  else if (wanted == "avx512_bf16")
    product = Product::avx512_bf16;
  else if (wanted == "amx")
    product = Product::amx;
  else
    check(wanted == "auto", "linear product must be 'auto', 'amx', 'avx512_bf16' or 'none', got '" + wanted + "'");
  check(product <= best_product(), "linear product '" + wanted + "' is not in this build or not supported here");
  chosen_product() = product;
}

int64_t linear_logps_workspace(int64_t rows, int64_t hidden_size, int64_t vocab, int64_t rank, bool stats,
                               int threads) {
  return padded(ForwardLayout(rows, hidden_size, vocab, rank, stats, threads).parts.bytes);
}

int64_t linear_logps_weight_grad_workspace(int64_t rows, int64_t hidden_size, int threads) {
  return padded(WeightGradLayout(rows, hidden_size, threads).parts.bytes);
}

int64_t linear_logps_hidden_grad_workspace(int64_t rows, int64_t hidden_size, int64_t vocab, int threads) {
  return padded(HiddenGradLayout(rows, hidden_size, vocab, threads).parts.bytes);
}

#if defined(FASTPREF_LINEAR_PRODUCT)

bool linear_logps_fwd_cpu(const LinearLogpsForward& args, int threads) {
  const LinearProjection& p = args.projection;
  const Product product = need_product();
  check_labels(args.labels, p.rows, p.vocab, args.ignore_index);
  check_tile(args.tile, args.tile ? args.tile_stride : round_up(p.rows, block), p.rows, p.vocab);
  if (p.rows == 0) return true;
  const ForwardLayout layout(p.rows, p.hidden_size, p.vocab, p.rank, args.stats, threads);
  char* memory = aligned(args.workspace);
  ForwardPass pass{args,
                   product,
                   layout.steps,
                   layout.groups,
                   groups_per_chunk(layout.groups, layout.steps),
                   reinterpret_cast<bf16*>(memory + layout.hidden),
                   reinterpret_cast<int32_t*>(memory + layout.labels),
                   reinterpret_cast<float*>(memory + layout.targets),
                   memory + layout.sums};
  for (int64_t row = 0; row < layout.groups * block; row++)
    pass.labels[row] =
        row < p.rows && args.labels[row] != args.ignore_index ? static_cast<int32_t>(args.labels[row]) : -1;
  parallel_for(layout.groups, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; g++) avx512::pack_hidden(pass, p.hidden, p.adapter_hidden, g);
  });
  std::atomic<bool> fits{true};
  parallel_with_slot(layout.slices, threads, [&](int64_t slice, int64_t slot) {
    bf16* panel = reinterpret_cast<bf16*>(memory + layout.panels + slot * packed_bytes(layout.steps));
    if (!avx512::project_slice(pass, slice, panel)) fits = false;
  });
  parallel_for(p.rows, 16, threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) finish_row(pass, layout.slices, row);
  });
  return fits;
}

void linear_logps_bwd_cpu(const LinearLogpsBackward& args, int threads) {
  need_product();
  check_labels(args.labels, args.rows, args.vocab, args.ignore_index);
  check_tile(args.tile, args.tile_stride, args.rows, args.vocab);
  if (args.rows == 0) return;
  const int64_t tokens = args.tile_stride;
  std::vector<float> lse(tokens), others(tokens), targets(args.rows);
  std::vector<uint32_t> live(tokens / block);
  for (int64_t row = 0; row < args.rows; row++) {
    const float grad = args.grad[row], hi = args.lse[row];
    // no gradient, and a finite sum says that no column was NaN
    if (args.labels[row] == args.ignore_index || (grad == 0 && hi - hi == 0)) continue;
    live[row / block] |= 1u << row % block;
    const double g = double(grad) * args.transform.slope();
    lse[row] = hi;
    others[row] = static_cast<float>(-g * __builtin_exp(-double(args.lse[args.rows + row])));
    // 1 - p of the target, exact for confident tokens where the difference would cancel
    double target = -__builtin_expm1(double(args.logps[row])) * g;
    if (args.transform.tanh_scale != 0) {
      const int64_t at = args.labels[row] * args.tile_stride + row;
      const float x = args.tile_is_bf16 ? read_logit<bf16>(args.tile, at) : read_logit<f16>(args.tile, at);
      const double v = __builtin_tanh(double(x) * args.transform.tanh_scale);
      target *= 1 - v * v;
    }
    targets[row] = static_cast<float>(target);
  }
  const BackwardPass pass{args, lse.data(), others.data(), live.data()};
  const int64_t chunk = 131072 / tokens;
  parallel_for(args.vocab, chunk < 1 ? 1 : chunk, threads,
               [&](int64_t begin, int64_t end) { avx512::scatter_rows(pass, begin, end); });
  for (int64_t row = 0; row < args.rows; row++)
    if (live[row / block] >> row % block & 1)
      static_cast<bf16*>(args.tile)[args.labels[row] * args.tile_stride + row] = rounded(targets[row]);
}

void linear_logps_weight_grad_cpu(const bf16* dz, int64_t tile_stride, int64_t rows, int64_t vocab, const bf16* hidden,
                                  int64_t hidden_size, float* acc, bool accumulate, void* workspace, int threads) {
  const Product product = need_product();
  check_tile(dz, tile_stride, rows, vocab);
  if (hidden_size == 0 || (rows == 0 && accumulate)) return;
  const WeightGradLayout layout(rows, hidden_size, threads);
  char* memory = aligned(workspace);
  const WeightGradPass pass{dz,
                            tile_stride,
                            rows,
                            vocab,
                            hidden_size,
                            acc,
                            accumulate,
                            product,
                            layout.steps,
                            layout.groups,
                            groups_per_chunk(layout.groups, layout.steps),
                            reinterpret_cast<bf16*>(memory + layout.hidden)};
  parallel_for(layout.groups, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; g++) avx512::pack_weight_grad_group(pass, hidden, g);
  });
  parallel_with_slot(divide_up(vocab, slice_rows), threads, [&](int64_t slice, int64_t slot) {
    char* panel = memory + layout.panels + slot * packed_bytes(layout.steps);
    avx512::weight_grad_slice(pass, slice, reinterpret_cast<bf16*>(panel));
  });
}

void linear_logps_hidden_grad_cpu(const bf16* dz, int64_t tile_stride, int64_t rows, int64_t vocab, const bf16* weight,
                                  int64_t weight_stride, int64_t hidden_size, bf16* out, void* workspace, int threads) {
  const Product product = need_product();
  check_tile(dz, tile_stride, rows, vocab);
  if (rows == 0 || hidden_size == 0) return;
  const HiddenGradLayout layout(rows, hidden_size, vocab, threads);
  char* memory = aligned(workspace);
  const HiddenGradPass pass{dz,
                            tile_stride,
                            rows,
                            vocab,
                            weight,
                            weight_stride,
                            hidden_size,
                            out,
                            product,
                            layout.splits,
                            layout.split_rows,
                            layout.groups,
                            layout.columns,
                            reinterpret_cast<float*>(memory + layout.partial)};
  const int64_t chunks = divide_up(layout.groups, unit_groups);
  parallel_with_slot(layout.splits * chunks, threads, [&](int64_t i, int64_t slot) {
    const int64_t at = layout.packed + slot * packed_bytes((unit_groups + unit_columns) * k_steps);
    avx512::hidden_grad_partial(pass, i / chunks, i % chunks, reinterpret_cast<bf16*>(memory + at));
  });
  parallel_for(layout.groups, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; g++) avx512::hidden_grad_sum(pass, g);
  });
}

#else

bool linear_logps_fwd_cpu(const LinearLogpsForward&, int) {
  need_product();
  return false;
}
void linear_logps_bwd_cpu(const LinearLogpsBackward&, int) { need_product(); }
void linear_logps_weight_grad_cpu(const bf16*, int64_t, int64_t, int64_t, const bf16*, int64_t, float*, bool, void*,
                                  int) {
  need_product();
}
void linear_logps_hidden_grad_cpu(const bf16*, int64_t, int64_t, int64_t, const bf16*, int64_t, int64_t, bf16*, void*,
                                  int) {
  need_product();
}

#endif

}  // namespace fastpref

#endif
