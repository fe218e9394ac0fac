// Entries of a matrix of any dtype as vectors of float (of a double matrix double), NaN where missing.
#pragma once
#include <type_traits>

#include "lanes.h"

namespace fastpref::FASTPREF_SIMD {
namespace {

template <class D>
using Factor_t = std::conditional_t<std::is_same_v<D, double>, double, float>;

inline Vf values(const float* p) { return load_at(p); }
inline V<double> values(const double* p) { return load_at(p); }
inline Vf values(const f16* p) { return half_to_float(p); }
inline Vf values(const bf16* p) {
  using Vh = uint16_t __attribute__((vector_size(W * 2)));
  Vh v;
  std::memcpy(&v, p, sizeof v);
  return (Vf)(__builtin_convertvector(v, Vu) << 16);
}
inline Vf values(const int8_t* p) {
  using Vc = int8_t __attribute__((vector_size(W)));
  Vc bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  const Vi v = __builtin_convertvector(bytes, Vi);
  return v == -128 ? splat(__builtin_nanf("")) : __builtin_convertvector(v, Vf);
}

inline void set_missing(float& x) { x = __builtin_nanf(""); }
inline void set_missing(double& x) { x = __builtin_nan(""); }
inline void set_missing(f16& x) { x.bits = 0x7e00; }
inline void set_missing(bf16& x) { x.bits = 0x7fc0; }
inline void set_missing(int8_t& x) { x = -128; }
template <class D>
inline D missing() {
  D x;
  set_missing(x);
  return x;
}

// f(D{}), D being the type of a matrix's entries.
template <class F>
inline void with_entries(MatrixDType dtype, const F& f) {
  switch (dtype) {
    case MatrixDType::f32:
      return f(float{});
    case MatrixDType::bf16:
      return f(bf16{});
    case MatrixDType::f16:
      return f(f16{});
    case MatrixDType::f64:
      return f(double{});
    case MatrixDType::i8:
      return f(int8_t{});
  }
}

}  // namespace
}  // namespace fastpref::FASTPREF_SIMD
