// Vectors for the CPU kernels, on the compilers' portable vector types: one source, compiled once per instruction set
// into a namespace of its own (FASTPREF_SIMD: baseline, avx2 or avx512). No intrinsics but for fp16 and streaming.
// Code here must not call inline functions of the standard library: the linker may keep any level's copy of those.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "dtype.h"

namespace fastpref::FASTPREF_SIMD {
namespace {

#if defined(FASTPREF_SIMD_avx512)
constexpr int W = 16;
#elif defined(FASTPREF_SIMD_avx2)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

using Vf = float __attribute__((vector_size(W * 4)));
using Vi = int32_t __attribute__((vector_size(W * 4)));
using Vu = uint32_t __attribute__((vector_size(W * 4)));

inline Vf splat(float x) { return Vf{} + x; }
inline Vf vmax(Vf a, Vf b) { return a > b ? a : b; }

inline float hmax(Vf v) {
  float m = v[0];
  for (int i = 1; i < W; i++) m = v[i] > m ? v[i] : m;
  return m;
}

inline float hsum(Vf v) {  // pairwise
  for (int half = W / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) v[i] += v[i + half];
  return v[0];
}

// Two vectors at a time. bf16 arrives as even and odd columns, which two cheap operations split out of one load; every
// other type as two halves. column() says which column of the 2 W a lane holds.
struct Pair {
  Vf a, b;
};

template <class T>
constexpr bool interleaved = false;
template <>
constexpr bool interleaved<bf16> = true;

template <class T>
inline Vi column(int which) {
  Vi lane;
  for (int i = 0; i < W; i++) lane[i] = i;
  return interleaved<T> ? lane * 2 + which : lane + which * W;
}

inline Pair load(const float* p) {
  Pair v;
  std::memcpy(&v.a, p, sizeof v.a);
  std::memcpy(&v.b, p + W, sizeof v.b);
  return v;
}

inline Pair load(const bf16* p) {
  Vu v;
  std::memcpy(&v, p, sizeof v);
  return {(Vf)(v << 16), (Vf)(v & 0xffff0000u)};
}

inline Vf half_to_float(const f16* p) {
#if defined(FASTPREF_SIMD_avx512)
  // maskz: GCC 12 warns of an uninitialised register in the plain form
  return (Vf)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(FASTPREF_SIMD_avx2)
  return (Vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  using Vh = uint16_t __attribute__((vector_size(W * 2)));
  Vh h;
  std::memcpy(&h, p, sizeof h);
  const Vu bits = __builtin_convertvector(h, Vu);
  const Vu magnitude = (bits & 0x7fffu) << 13;
  const Vf value = (Vf)magnitude * 0x1p112f;  // rebias the exponent; exact, subnormals included
  const Vu special = magnitude | 0x7f800000u;
  const Vu finite = (Vu)value;
  return (Vf)(((bits & 0x7fffu) >= 0x7c00u ? special : finite) | (bits & 0x8000u) << 16);
#endif
}

inline Pair load(const f16* p) { return {half_to_float(p), half_to_float(p + W)}; }

// Round to nearest even; a NaN keeps its sign and stays a NaN.
inline Vu float_to_bf16(Vf v) {  // result in the low 16 bits
  const Vu bits = (Vu)v;
  const Vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return v == v ? rounded : (bits >> 16 | 0x40u);
}

inline uint16_t float_to_half(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00u;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // rounds to infinity
  if (magnitude < 0x38800000u) {                        // subnormal: let the float adder round
    float m;
    std::memcpy(&m, &magnitude, 4);
    m += 0.5f;
    uint32_t r;
    std::memcpy(&r, &m, 4);
    return sign | (r - 0x3f000000u);
  }
  return sign | ((magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13);
}

// A pair of vectors as the 2 W sixteen-bit columns they stand for.
inline Vu pack(const bf16*, Pair v) { return float_to_bf16(v.a) | float_to_bf16(v.b) << 16; }
inline Vu pack(const f16*, Pair v) {
  Vu out;
  char* bytes = reinterpret_cast<char*>(&out);
#if defined(FASTPREF_SIMD_avx512)
  const __m256i a = _mm512_maskz_cvtps_ph(0xffff, (__m512)v.a, 0), b = _mm512_maskz_cvtps_ph(0xffff, (__m512)v.b, 0);
  std::memcpy(bytes, &a, 32);
  std::memcpy(bytes + 32, &b, 32);
#elif defined(FASTPREF_SIMD_avx2)
  const __m128i a = _mm256_cvtps_ph((__m256)v.a, 0), b = _mm256_cvtps_ph((__m256)v.b, 0);
  std::memcpy(bytes, &a, 16);
  std::memcpy(bytes + 16, &b, 16);
#else
  for (int i = 0; i < W; i++) {
    const uint16_t a = float_to_half(v.a[i]), b = float_to_half(v.b[i]);
    std::memcpy(bytes + 2 * i, &a, 2);
    std::memcpy(bytes + 2 * (W + i), &b, 2);
  }
#endif
  return out;
}

// Streaming stores skip the read for ownership of a line that is overwritten whole: a third of the traffic of a
// backward pass into fresh memory. They need W * 4-byte alignment and a fence before other threads read.
template <bool STREAM>
inline void store_vector(void* p, Vf v) {
#if defined(__SSE2__)
  if constexpr (STREAM) {
#if defined(FASTPREF_SIMD_avx512)
    _mm512_stream_ps(static_cast<float*>(p), (__m512)v);
#elif defined(FASTPREF_SIMD_avx2)
    _mm256_stream_ps(static_cast<float*>(p), (__m256)v);
#else
    _mm_stream_ps(static_cast<float*>(p), (__m128)v);
#endif
    return;
  }
#endif
  std::memcpy(p, &v, sizeof v);
}

inline void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

template <bool STREAM>
inline void store(float* p, Pair v) {
  store_vector<STREAM>(p, v.a);
  store_vector<STREAM>(p + W, v.b);
}
template <bool STREAM>
inline void store(bf16* p, Pair v) {
  store_vector<STREAM>(p, (Vf)pack(p, v));
}
template <bool STREAM>
inline void store(f16* p, Pair v) {
  store_vector<STREAM>(p, (Vf)pack(p, v));
}

// Columns in the two halves' order, as every type but bf16 is loaded, to sixteen-bit ones.
inline void store_halves(bf16* p, Pair v) {
  using Vh = uint16_t __attribute__((vector_size(W * 2)));
  const Vh a = __builtin_convertvector(float_to_bf16(v.a), Vh), b = __builtin_convertvector(float_to_bf16(v.b), Vh);
  std::memcpy(p, &a, sizeof a);
  std::memcpy(p + W, &b, sizeof b);
}
inline void store_halves(f16* p, Pair v) { store<false>(p, v); }

// Round to integer by adding 1.5 * 2^23 (+ 127), whose low bits then hold the biased exponent of 2^n.
constexpr float round_to_exponent = 12582912.0f + 127.0f;

constexpr float log2e = 1.44269504f;
constexpr float ln2_hi = 0.693359375f;  // few bits: products with an exponent are exact
constexpr float ln2_lo = -2.12194440e-4f;

// 2^n e^r for |r| <= ln 2 / 2, with n as it was rounded: z * log2(e) + round_to_exponent.
inline Vf exp_reduced(Vf shifted, Vf r) {
  Vf p = splat(1.381316106e-03f);  // minimax of (e^r - 1 - r) / r^2
  p = p * r + 8.369410411e-03f;
  p = p * r + 4.166845605e-02f;
  p = p * r + 1.666651517e-01f;
  p = p * r + 4.999999404e-01f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * (Vf)((Vi)shifted << 23);
}

// e^z for z <= 87, to 1e-7 relative with no mean error; exactly 0 below -87, NaN for NaN.
inline Vf exp(Vf z) {
  const Vf shifted = z * log2e + round_to_exponent;
  const Vf n = shifted - round_to_exponent;
  const Vf e = exp_reduced(shifted, (z - n * ln2_hi) - n * ln2_lo);
  return z < -87.0f ? Vf{} : e;
}

// The same for one term of a sum, in fewer operations: to 2e-7 relative with a mean error of 2e-8.
inline Vf exp_term(Vf z) {
  const Vf lowest = splat(-104.0f);
  z = lowest > z ? lowest : z;  // e^-104 is 0 already; a NaN stays
  const Vf shifted = z * log2e + round_to_exponent;
  const Vf n = shifted - round_to_exponent;
  const Vf r = z - n * 0.693147181f;
  Vf p = splat(8.290283382e-03f);  // minimax of (e^r - 1) / r
  p = p * r + 4.189809784e-02f;
  p = p * r + 1.666763723e-01f;
  p = p * r + 4.999914765e-01f;
  p = p * r + 9.999997020e-01f;
  p = p * r + 1.0f;
#if defined(FASTPREF_SIMD_avx512)
  return (Vf)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)n);
#else
  p *= (Vf)((Vi)shifted << 23);
  return z < -87.0f ? Vf{} : p;
#endif
}

// e^(d m) with the product to more than float: the rounding of d m alone would cost |d m| 6e-8. With 12 bits of each
// factor in its high part, high times high is exact, with or without fused multiply-add.
struct Factor {
  float value, high, low;  // value ~ high + low
  explicit Factor(double m) : value(static_cast<float>(m)) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    bits &= 0xfffff000u;
    std::memcpy(&high, &bits, 4);
    low = static_cast<float>(m - double(high));
  }
};

inline Vf exp_product(Vf d, const Factor& m) {
  const Vf z = d * m.value;
  const Vf shifted = z * log2e + round_to_exponent;
  const Vf n = shifted - round_to_exponent;
  const Vf high = (Vf)((Vu)d & 0xfffff000u);
  const Vf r = (high * m.high - n * ln2_hi) + ((d - high) * m.value + high * m.low - n * ln2_lo);
  const Vf e = exp_reduced(shifted, r);
  return z < -87.0f ? Vf{} : e;
}

// Odd polynomial near 0, where 1 - 2 / (e^2y + 1) would cancel (Cephes' split at 0.625).
inline Vf tanh(Vf y) {
  const Vf square = y * y;
  Vf p = splat(-5.70498872745e-3f);
  p = p * square + 2.06390887954e-2f;
  p = p * square + -5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square + -3.33332819422e-1f;
  const Vf small = p * square * y + y;
  const Vf magnitude = y < 0.0f ? -y : y;
  const Vf bounded = magnitude > 20.0f ? splat(20.0f) : magnitude;  // NaN stays: the comparison is false
  Vf large = 1.0f - 2.0f / (exp(bounded * 2.0f) + 1.0f);
  large = y < 0.0f ? -large : large;
  return magnitude < 0.625f ? small : large;
}

// 1 - tanh(y)^2 without its cancellation where tanh saturates.
inline Vf tanh_slope(Vf y) {
  const Vf e = exp(y < 0.0f ? y * 2.0f : y * -2.0f);
  return 4.0f * e / ((1.0f + e) * (1.0f + e));
}

}  // namespace
}  // namespace fastpref::FASTPREF_SIMD
