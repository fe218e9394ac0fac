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
template <class T>
inline double max_of(V<T> v) {
  double most = v[0];
  for (int i = 1; i < Lanes<T>::n; i++) most = v[i] > most ? v[i] : most;
  return most;
}
template <class T>
inline int64_t count_of(typename Lanes<T>::I v) {
  int64_t sum = 0;
  for (int i = 0; i < Lanes<T>::n; i++) sum += v[i];
  return sum;
}

}  // namespace
}  // namespace fastpref::FASTPREF_SIMD
