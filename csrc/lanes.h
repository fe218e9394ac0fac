// Vectors of float or double, for kernels that are templates of the two; included by one source per SIMD level.
#pragma once
#include "simd.h"

namespace fastpref::FASTPREF_SIMD {
namespace {

template <class T>
struct Lanes;
template <>
struct Lanes<float> {
  static constexpr int n = W;
  using V = Vf;
  using I = Vi;
};
template <>
struct Lanes<double> {
  static constexpr int n = W / 2;
  using V = double __attribute__((vector_size(W * 4)));
  using I = int64_t __attribute__((vector_size(W * 4)));
};

template <class T>
using V = typename Lanes<T>::V;

template <class T>
inline V<T> load_at(const T* p) {
  V<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
inline void store_at(T* p, V<T> v) {
  std::memcpy(p, &v, sizeof v);
}
template <class T>
inline T sum_of(V<T> v) {
  for (int half = Lanes<T>::n / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) v[i] += v[i + half];
  return v[0];
}
// Lane i of the result is the sum of v[i]'s lanes: a tree that halves the vectors and doubles what a lane stands for.
#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
template <int... I>
struct LaneList {};
template <int N, int... I>
struct LanesUpTo : LanesUpTo<N - 1, N - 1, I...> {};
template <int... I>
struct LanesUpTo<0, I...> {
  using list = LaneList<I...>;
};
template <int HALF, class Vt, int... I>
inline Vt folded(Vt a, Vt b,
                 LaneList<I...>) {  // lanes without the bit HALF: of a, with its other half added; else of b
  constexpr int n = sizeof...(I);
  return __builtin_shufflevector(a, b, (I & HALF ? n + I : I)...) +
         __builtin_shufflevector(a, b, (I & HALF ? n + (I ^ HALF) : (I ^ HALF))...);
}
template <class T, int HALF = Lanes<T>::n / 2>
inline V<T> sums_of(V<T>* v) {
  if constexpr (HALF == 0) {
    return v[0];
  } else {
    for (int i = 0; i < HALF; i++) v[i] = folded<HALF>(v[i], v[i + HALF], typename LanesUpTo<Lanes<T>::n>::list{});
    return sums_of<T, HALF / 2>(v);
  }
}
#else
template <class T>
inline V<T> sums_of(V<T>* v) {
  V<T> out;
  for (int i = 0; i < Lanes<T>::n; i++) out[i] = sum_of<T>(v[i]);
  return out;
}
#endif
template <class T>
inline V<T> abs_of(V<T> v) {
  using I = typename Lanes<T>::I;
  return (V<T>)((I)v & ~((I{} + 1) << (sizeof(T) * 8 - 1)));
}
inline Vf inverse(Vf v) {
#if defined(FASTPREF_SIMD_avx512)
  v = (Vf)_mm512_maskz_min_ps(0xffff, (__m512)v,
                              (__m512)splat(1e37f));  // the step below would make NaN of 1 / infinity
  const Vf guess = (Vf)_mm512_maskz_rcp14_ps(0xffff, (__m512)v);
  return guess * (2.0f - v * guess);
#else
  return 1.0f / v;
#endif
}
inline V<double> inverse(V<double> v) { return 1.0 / v; }

inline double smaller(double a, double b) { return a < b ? a : b; }
inline double larger(double a, double b) { return a > b ? a : b; }
inline double magnitude(double a) { return a < 0 ? -a : a; }

// Near size, and so that neither it nor its inverse leaves the range of float; 1 for 0 and infinity.
inline double power_of_two(double size) {
  if (!(size > 0) || size > 1.7e308) return 1;
  int exponent;
  __builtin_frexp(size, &exponent);
  return __builtin_ldexp(1.0, exponent < -120 ? -120 : exponent > 120 ? 120 : exponent);
}

// The value that `wanted` of values[0, count) do not exceed, to a percent; NaN entries are none. count is whole
// vectors.
template <class T>
inline double order_statistic(const T* values, int64_t count, int64_t wanted, double most) {
  constexpr int n = Lanes<T>::n;
  double low = 0, high = most;
  for (int round = 0; round < 40 && high > low * 1.01 && high > 1e-30; round++) {
    // by decades at first, as they may be spread over many orders of magnitude
    const double middle = low > 0 ? __builtin_sqrt(low * high) : high * 0.1;
    const V<T> bound = V<T>{} + static_cast<T>(middle);
    typename Lanes<T>::I below{};
    for (int64_t i = 0; i < count; i += n) below -= load_at(values + i) <= bound;
    int64_t found = 0;
    for (int k = 0; k < n; k++) found += below[k];
    if (found >= wanted)
      high = middle;
    else
      low = middle;
  }
  return high;
}

}  // namespace
}  // namespace fastpref::FASTPREF_SIMD
