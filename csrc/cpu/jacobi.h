// One-sided Jacobi on as many small matrices as a vector has lanes, all in cache: every step is the same for all of
// them, so nothing is summed across lanes. A matrix that has converged only gets rotations by zero.
#pragma once
#include "lanes.h"

namespace fastpref::FASTPREF_SIMD {
namespace {

constexpr int jacobi_sweeps = 40;  // 5 to 9 are usual

inline Vf root(Vf v) {
#if defined(FASTPREF_SIMD_avx512)
  return (Vf)_mm512_maskz_sqrt_ps(0xffff, (__m512)v);
#elif defined(FASTPREF_SIMD_avx2)
  return (Vf)_mm256_sqrt_ps((__m256)v);
#else
  for (int i = 0; i < W; i++) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}
inline V<double> root(V<double> v) {
#if defined(FASTPREF_SIMD_avx512)
  return (V<double>)_mm512_maskz_sqrt_pd(0xff, (__m512d)v);
#elif defined(FASTPREF_SIMD_avx2)
  return (V<double>)_mm256_sqrt_pd((__m256d)v);
#else
  for (int i = 0; i < Lanes<double>::n; i++) v[i] = __builtin_sqrt(v[i]);
  return v;
#endif
}

template <class I>
inline bool any(I mask) {  // lanes are 0 or -1
#if defined(FASTPREF_SIMD_avx512)
  return _mm512_test_epi64_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(FASTPREF_SIMD_avx2)
  return _mm256_movemask_epi8((__m256i)mask) != 0;
#else
  int64_t halves[2];
  std::memcpy(halves, &mask, sizeof halves);
  return (halves[0] | halves[1]) != 0;
#endif
}

template <class T>
inline V<T> dot(const V<T>* a, const V<T>* b, int64_t length) {
  V<T> sum[4] = {};
  int64_t k = 0;
  for (; k + 4 <= length; k += 4)
    for (int u = 0; u < 4; u++) sum[u] += a[k + u] * b[k + u];
  for (; k < length; k++) sum[0] += a[k] * b[k];
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// Rotates the rows of x [count, length] until they are orthogonal: x becomes Sigma U^T. squares [count] returns their
// squared norms. Rows below `floor`, squared, count as zero: they are noise, and no rotation makes them orthogonal.
// Entries must be of a size whose fourth powers neither overflow nor underflow. Returns which lanes have converged.
template <class T>
typename Lanes<T>::I orthogonalise(V<T>* x, V<T>* squares, int64_t count, int64_t length, T epsilon, V<T> floor) {
  using I = typename Lanes<T>::I;
  const T tolerance = epsilon * epsilon * static_cast<T>(length);  // of c^2, as dot products of this length round
  for (int64_t p = 0; p < count; p++) squares[p] = dot<T>(x + p * length, x + p * length, length);
  I unfinished = ~I{};
  for (int sweep = 0; sweep < jacobi_sweeps && any(unfinished); sweep++) {
    unfinished = I{};
    for (int64_t p = 0; p + 1 < count; p++) {
      V<T>* a = x + p * length;
      for (int64_t q = p + 1; q < count; q++) {
        V<T>* b = x + q * length;
        const V<T> alpha = squares[p], beta = squares[q], c = dot<T>(a, b, length);
        const I turn = (c * c > tolerance * alpha * beta) & (alpha > floor) & (beta > floor);
        if (!any(turn)) continue;
        unfinished |= turn;
        const V<T> zeta = (beta - alpha) / (2 * (turn ? c : V<T>{} + 1));
        const V<T> size = 1 / (abs_of<T>(zeta) + root(1 + zeta * zeta));
        const V<T> tangent = zeta < 0 ? -size : size;
        const V<T> cosine = 1 / root(1 + tangent * tangent), sine = cosine * tangent;
        // the longer of the two comes first: sorted rows need fewer sweeps
        const I swap = beta > alpha;
        const V<T> zero{}, one = zero + 1;
        const V<T> cs = turn ? (swap ? sine : cosine) : one, sn = turn ? (swap ? -cosine : sine) : zero;
        V<T> first[2] = {}, second[2] = {};
        int64_t k = 0;
        for (; k + 2 <= length; k += 2)
          for (int u = 0; u < 2; u++) {
            const V<T> left = a[k + u], right = b[k + u];
            a[k + u] = cs * left - sn * right;
            b[k + u] = sn * left + cs * right;
            first[u] += a[k + u] * a[k + u];
            second[u] += b[k + u] * b[k + u];
          }
        if (k < length) {
          const V<T> left = a[k], right = b[k];
          a[k] = cs * left - sn * right;
          b[k] = sn * left + cs * right;
          first[0] += a[k] * a[k];
          second[0] += b[k] * b[k];
        }
        squares[p] = first[0] + first[1];
        squares[q] = second[0] + second[1];
      }
    }
  }
  return ~unfinished;
}

}  // namespace
}  // namespace fastpref::FASTPREF_SIMD
