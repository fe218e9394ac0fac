// Arithmetic, comparison, conversion and bits: one function for an operation and a type. A pair of 16-bit floats is two
// elements of a lane (N = 2).
#include "machine.h"

namespace ptxsim {
namespace {

template <class T>
constexpr bool floating = std::is_floating_point_v<T> || std::is_same_v<T, Half> || std::is_same_v<T, Bf>;

template <class T>
T flushed(T x) {
  if constexpr (std::is_same_v<T, Half>)
    return (x.v & 0x7c00) ? x : bits<Half>(u16(x.v & 0x8000));
  else if constexpr (std::is_same_v<T, float>)
    return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x;
  else
    return x;
}
template <class T>
T saturated(T x) {
  return float(x) > 0 ? (float(x) < 1 ? x : T(1)) : T(0);  // NaN: 0
}
u32 jitter_state;
// An approximate instruction's result, off by up to `ulp` units: of the last place, or larger ones where two of them
// are the error that the PTX manual allows.
template <class T = float>
float jitter(float x, float unit = 0) {
  if (!opt.ulp || x == 0 || !std::isfinite(x)) return x;
  if constexpr (sizeof(T) == 2) unit = std::max(unit, std::fabs(x) * (std::is_same_v<T, Bf> ? 0x1p-8f : 0x1.2p-11f));
  jitter_state = jitter_state * 1664525u + 1013904223u;
  const long steps = long(jitter_state >> 8) % (2 * opt.ulp + 1) - opt.ulp;
  const u32 magnitude = bits<u32>(std::fabs(x));
  const float last_place = bits<float>(magnitude + 1) - bits<float>(magnitude);
  if (unit > last_place) return x + float(steps) * unit;
  return std::copysign(bits<float>(u32(std::clamp(long(magnitude) + steps, 0l, 0x7f800000l))), x);
}
struct Rounding {
  bool set;
  explicit Rounding(int mode) : set(mode) {
    static const int modes[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD};
    if (set) fesetround(modes[mode]);
  }
  ~Rounding() {
    if (set) fesetround(FE_TONEAREST);
  }
};
// double to a narrower type in one rounding: odd in float, then the other
float to_float_odd(double d) {
  const float f = float(d);
  if (double(f) == d || d != d || (bits<u32>(f) & 1)) return f;
  return std::nextafterf(f, d > f ? INFINITY : -INFINITY);
}

// ---------------------------------------------------------------------------------------------------------------------
// Operations

struct Add {
  template <class T>
  static T f(T a, T b) {
    return T(a + b);
  }
};
struct Sub {
  template <class T>
  static T f(T a, T b) {
    return T(a - b);
  }
};
struct Mul {
  template <class T>
  static T f(T a, T b) {
    return T(a * b);
  }
};
struct MulHi {
  template <class T>
  static T f(T a, T b) {
    using Wide = std::conditional_t<std::is_signed_v<T>, __int128, u128>;
    return T(Wide(a) * Wide(b) >> (8 * sizeof(T)));
  }
};
struct Div {
  template <class T>
  static T f(T a, T b) {
    if constexpr (std::is_integral_v<T>) {
      if (b == 0) return T(-1);
      if (std::is_signed_v<T> && b == T(-1)) return T(-a);
    }
    return T(a / b);
  }
};
struct Rem {
  template <class T>
  static T f(T a, T b) {
    if (b == 0) return a;
    if (std::is_signed_v<T> && b == T(-1)) return 0;
    return T(a % b);
  }
};
// -0 is below +0; a NaN loses to a number
struct Min {
  template <class T>
  static T f(T a, T b) {
    if constexpr (floating<T>) {
      if (a != a) return b != b ? T(NAN) : b;
      if (b != b) return a;
      if (a == b) return std::signbit(double(a)) ? a : b;
    }
    return a < b ? a : b;
  }
};
struct Max {
  template <class T>
  static T f(T a, T b) {
    if constexpr (floating<T>) {
      if (a != a) return b != b ? T(NAN) : b;
      if (b != b) return a;
      if (a == b) return std::signbit(double(a)) ? b : a;
    }
    return a > b ? a : b;
  }
};
template <class F>
struct WithNan {
  template <class T>
  static T f(T a, T b) {
    return a != a || b != b ? T(NAN) : F::f(a, b);
  }
};
struct And {
  template <class T>
  static T f(T a, T b) {
    return T(a & b);
  }
};
struct Or {
  template <class T>
  static T f(T a, T b) {
    return T(a | b);
  }
};
struct Xor {
  template <class T>
  static T f(T a, T b) {
    return T(a ^ b);
  }
};
struct Copysign {  // copysign d, sign, magnitude
  template <class T>
  static T f(T a, T b) {
    return T(std::copysign(b, a));
  }
};

template <class T, class F, int N = 1>
void binary(Warp& w, const Ins& i, u32 m) {
  T* d = w.D<T>(i.d);
  const T *a = w.S<T>(i.s[0]), *b = w.S<T>(i.s[1]);
  LANES(for (int e = 0; e < N; e++) d[N * l + e] = F::f(a[N * l + e], b[N * l + e]);)
}
template <class T, class F, int N = 1>
void binary_modes(Warp& w, const Ins& i, u32 m) {  // with a rounding mode, ftz or sat
  const Rounding rounding(i.round);
  T* d = w.D<T>(i.d);
  const T *a = w.S<T>(i.s[0]), *b = w.S<T>(i.s[1]);
  LANES(for (int e = 0; e < N; e++) {
    const volatile T p = i.ftz ? flushed(a[N * l + e]) : a[N * l + e], q = i.ftz ? flushed(b[N * l + e]) : b[N * l + e];
    T r = F::f(const_cast<const T&>(p), const_cast<const T&>(q));
    if (i.ftz) r = flushed(r);
    d[N * l + e] = i.sat ? saturated(r) : r;
  })
}
template <class T>
T fused(T a, T b, T c) {
  if constexpr (std::is_floating_point_v<T>) {
    return std::fma(a, b, c);
  } else {  // the product is exact in double; the sum is rounded to odd, then to 16 bits
    const double p = double(a) * double(b), z = double(c), s = p + z, v = s - p, e = (p - (s - v)) + (z - v);
    double r = s;
    if (e != 0 && std::isfinite(s) && !(bits<u64>(s) & 1)) r = std::nextafter(s, e > 0 ? INFINITY : -INFINITY);
    T out;
    out.v = std::is_same_v<T, Half> ? float_to_half(r) : float_to_bf(to_float_odd(r));
    return out;
  }
}
template <class T, int N = 1>
void fma_plain(Warp& w, const Ins& i, u32 m) {
  T* d = w.D<T>(i.d);
  const T *a = w.S<T>(i.s[0]), *b = w.S<T>(i.s[1]), *c = w.S<T>(i.s[2]);
  LANES(for (int e = 0; e < N; e++) d[N * l + e] = fused(a[N * l + e], b[N * l + e], c[N * l + e]);)
}
template <class T, int N = 1>
void fma_modes(Warp& w, const Ins& i, u32 m) {
  const Rounding rounding(i.round);
  T* d = w.D<T>(i.d);
  const T *a = w.S<T>(i.s[0]), *b = w.S<T>(i.s[1]), *c = w.S<T>(i.s[2]);
  LANES(for (int e = N * l; e < N * l + N; e++) {
    const volatile T x = i.ftz ? flushed(a[e]) : a[e], y = i.ftz ? flushed(b[e]) : b[e],
                     z = i.ftz ? flushed(c[e]) : c[e];
    T r = fused(const_cast<const T&>(x), const_cast<const T&>(y), const_cast<const T&>(z));
    if (i.ftz) r = flushed(r);
    if (i.relu) r = r != r ? T(NAN) : float(r) > 0 ? r : T(0);
    d[e] = i.sat ? saturated(r) : r;
  })
}

template <class T>
void mad_lo(Warp& w, const Ins& i, u32 m) {
  T* d = w.D<T>(i.d);
  const T *a = w.S<T>(i.s[0]), *b = w.S<T>(i.s[1]), *c = w.S<T>(i.s[2]);
  LANES(d[l] = T(a[l] * b[l] + c[l]);)
}
template <class T>
void mad_hi(Warp& w, const Ins& i, u32 m) {
  T* d = w.D<T>(i.d);
  const T *a = w.S<T>(i.s[0]), *b = w.S<T>(i.s[1]), *c = w.S<T>(i.s[2]);
  LANES(d[l] = T(MulHi::f(a[l], b[l]) + c[l]);)
}
template <class T, class W>
void mul_wide(Warp& w, const Ins& i, u32 m) {
  W* d = w.D<W>(i.d);
  const T *a = w.S<T>(i.s[0]), *b = w.S<T>(i.s[1]);
  LANES(d[l] = W(a[l]) * W(b[l]);)
}
template <class T, class W>
void mad_wide(Warp& w, const Ins& i, u32 m) {
  W* d = w.D<W>(i.d);
  const T *a = w.S<T>(i.s[0]), *b = w.S<T>(i.s[1]);
  const W* c = w.S<W>(i.s[2]);
  LANES(d[l] = W(a[l]) * W(b[l]) + c[l];)
}
// mode: 1 subtracts, 2 takes the carry, 4 leaves one
template <class T>
void add_carry(Warp& w, const Ins& i, u32 m) {
  LANES(const u128 a = w.S<T>(i.s[0])[l]; const u128 b = w.S<T>(i.s[1])[l];
        const u128 in = i.mode & 2 ? w.carry >> l & 1 : 0; const u128 r = i.mode & 1 ? a - b - in : a + b + in;
        w.D<T>(i.d)[l] = T(r); if (i.mode & 4) w.carry = (w.carry & ~(1u << l)) | u32(r >> (8 * sizeof(T)) & 1) << l;)
}
// mode: 1 high half of the product, 2 and 4 as above
template <class T>
void mad_carry(Warp& w, const Ins& i, u32 m) {
  LANES(const T a = w.S<T>(i.s[0])[l]; const T b = w.S<T>(i.s[1])[l]; const u128 in = i.mode & 2 ? w.carry >> l & 1 : 0;
        const u128 r = u128(i.mode & 1 ? MulHi::f(a, b) : T(a * b)) + w.S<T>(i.s[2])[l] + in; w.D<T>(i.d)[l] = T(r);
        if (i.mode & 4) w.carry = (w.carry & ~(1u << l)) | u32(r >> (8 * sizeof(T)) & 1) << l;)
}
template <class T, bool LEFT>
void shift(Warp& w, const Ins& i, u32 m) {
  T* d = w.D<T>(i.d);
  const T* a = w.S<T>(i.s[0]);
  const u32* b = w.S<u32>(i.s[1]);
  constexpr u32 n = 8 * sizeof(T);
  LANES(const u32 k = b[l]; d[l] = LEFT     ? (k >= n ? T(0) : T(a[l] << k))
                                   : k >= n ? (a[l] < 0 ? T(-1) : T(0))
                                            : T(a[l] >> k);)
}
template <class S>
void dp4a(Warp& w, const Ins& i, u32 m) {
  LANES(u32 sum = w.S<u32>(i.s[2])[l]; const u32 x = w.S<u32>(i.s[0])[l]; const u32 y = w.S<u32>(i.s[1])[l];
        for (int b = 0; b < 32; b += 8) sum += i32(S(x >> b)) * (i.ty2 == S32 ? i32(int8_t(y >> b)) : i32(u8(y >> b)));
        w.D<u32>(i.d)[l] = sum;)
}

struct Not {
  template <class T>
  static T f(T a, const Ins&) {
    return T(~a);
  }
};
struct Neg {
  template <class T>
  static T f(T a, const Ins&) {
    if constexpr (std::is_same_v<T, Half> || std::is_same_v<T, Bf>)
      return bits<T>(u16(a.v ^ 0x8000));
    else
      return T(-a);
  }
};
struct Abs {
  template <class T>
  static T f(T a, const Ins&) {
    if constexpr (std::is_same_v<T, Half> || std::is_same_v<T, Bf>)
      return bits<T>(u16(a.v & 0x7fff));
    else if constexpr (std::is_floating_point_v<T>)
      return std::fabs(a);
    else
      return T(a < 0 ? -a : a);
  }
};
struct Mov {
  template <class T>
  static T f(T a, const Ins&) {
    return a;
  }
};
// Of float and double, in full accuracy; approximate forms are jittered, but for EXACT arguments, in units of UNIT.
#define TRANSCENDENTAL(NAME, EXPR, EXACT, UNIT)                               \
  struct NAME {                                                               \
    template <class T>                                                        \
    static T f(T x, const Ins& i) {                                           \
      using W = std::conditional_t<std::is_same_v<T, double>, double, float>; \
      const W a = W(i.ftz ? flushed(x) : x);                                  \
      const W r = EXPR;                                                       \
      if constexpr (std::is_same_v<T, double>) {                              \
        return r;                                                             \
      } else {                                                                \
        const T out = T(i.mode && !(EXACT) ? jitter<T>(r, UNIT) : r);         \
        return i.ftz ? flushed(out) : out;                                    \
      }                                                                       \
    }                                                                         \
  };
TRANSCENDENTAL(Ex2, std::exp2(a), a == std::rint(a) || std::fabs(a) < 0x1p-126f, 0)
TRANSCENDENTAL(Lg2, std::log2(a), false, a > 0.5f && a < 2 ? 0x1p-23f : std::fabs(r) * 0x1p-23f)
TRANSCENDENTAL(Rcp, W(1) / a, false, 0)
TRANSCENDENTAL(Rsqrt, W(1) / std::sqrt(a), false, 0)
TRANSCENDENTAL(Sqrt, std::sqrt(a), false, 0)
TRANSCENDENTAL(Sin, W(std::sin(double(a))), false, 0x1.6ap-22f)
TRANSCENDENTAL(Cos, W(std::cos(double(a))), false, 0x1.6ap-22f)
TRANSCENDENTAL(Tanh, W(std::tanh(double(a))), false, std::fabs(r) * 0x1p-12f)
#undef TRANSCENDENTAL

template <class T, class F, int N = 1>
void unary(Warp& w, const Ins& i, u32 m) {
  const Rounding rounding(i.round);
  T* d = w.D<T>(i.d);
  const T* a = w.S<T>(i.s[0]);
  LANES(for (int e = N * l; e < N * l + N; e++) { d[e] = F::f(a[e], i); })
}
void div_approx(Warp& w, const Ins& i, u32 m) {  // mode: .approx, whose quotient is 0 for huge divisors
  float* d = w.D<float>(i.d);
  const float *a = w.S<float>(i.s[0]), *b = w.S<float>(i.s[1]);
  LANES(const float x = i.ftz ? flushed(a[l]) : a[l]; const float y = i.ftz ? flushed(b[l]) : b[l];
        float r = i.mode && std::fabs(y) > 0x1p126f && std::isfinite(y)
                      ? (std::isfinite(x) ? std::copysign(0.0f, x) * std::copysign(1.0f, y) : NAN)
                      : jitter(x / y);
        d[l] = i.ftz ? flushed(r) : r;)
}

// ---------------------------------------------------------------------------------------------------------------------
// Predicates

void mov_pred(Warp& w, const Ins& i, u32 m) { w.set_pred(i.d, m, w.pred(i.s[0])); }
void logic_pred(Warp& w, const Ins& i, u32 m) {  // mode: and, or, xor, not
  const u32 a = w.pred(i.s[0]), b = i.mode == 3 ? 0 : w.pred(i.s[1]);
  w.set_pred(i.d, m, i.mode == 0 ? a & b : i.mode == 1 ? a | b : i.mode == 2 ? a ^ b : ~a);
}
template <class T>
void selp(Warp& w, const Ins& i, u32 m) {
  T* d = w.D<T>(i.d);
  const T *a = w.S<T>(i.s[0]), *b = w.S<T>(i.s[1]);
  const u32 p = w.pred(i.s[2]);
  LANES(d[l] = p >> l & 1 ? a[l] : b[l];)
}
enum Cmp { EQ, NE, LT, LE, GT, GE, EQU, NEU, LTU, LEU, GTU, GEU, NUM, NOTNUM };
template <class T>
bool compare(int c, T a, T b) {
  const bool nan = a != a || b != b;
  switch (c) {
    case EQ:
      return a == b;
    case NE:
      return !nan && a != b;
    case LT:
      return a < b;
    case LE:
      return a <= b;
    case GT:
      return a > b;
    case GE:
      return a >= b;
    case EQU:
      return nan || a == b;
    case NEU:
      return nan || a != b;
    case LTU:
      return nan || a < b;
    case LEU:
      return nan || a <= b;
    case GTU:
      return nan || a > b;
    case GEU:
      return nan || a >= b;
    case NUM:
      return !nan;
    default:
      return nan;
  }
}
// mode: comparison, and with s[2]: 16 or, 32 xor, else and. Of N = 2 values each half has a predicate of its own.
template <class T, int N = 1>
void setp(Warp& w, const Ins& i, u32 m) {
  const T *a = w.S<T>(i.s[0]), *b = w.S<T>(i.s[1]);
  u32 r = 0, high = 0;
  const auto all = [&](auto c) {
    const auto one = [&](int at) {
      return u32(compare<T>(c, i.ftz ? flushed(a[at]) : a[at], i.ftz ? flushed(b[at]) : b[at]));
    };
    for (int l = 0; l < 32; l++) {
      r |= one(N * l) << l;
      if (N == 2) high |= one(2 * l + 1) << l;
    }
  };
  switch (i.mode & 15) {  // the usual ones without a switch for each lane
    case LT:
      all(std::integral_constant<int, LT>());
      break;
    case GT:
      all(std::integral_constant<int, GT>());
      break;
    case EQ:
      all(std::integral_constant<int, EQ>());
      break;
    case NE:
      all(std::integral_constant<int, NE>());
      break;
    default:
      all(i.mode & 15);
  }
  u32 r2 = N == 2 ? high : ~r;
  if (i.s[2].size) {
    const u32 p = w.pred(i.s[2]);
    const auto join = [&](u32 x) { return i.mode & 16 ? x | p : i.mode & 32 ? x ^ p : x & p; };
    r = join(r), r2 = join(r2);
  }
  w.set_pred(i.d, m, r);
  if (i.d2.size) w.set_pred(i.d2, m, r2);
}
template <class T>
void testp(Warp& w, const Ins& i, u32 m) {  // mode: index into FP_ kinds
  u32 r = 0;
  LANES(
      const T a = w.S<T>(i.s[0])[l]; const int k = std::fpclassify(a);
      const bool ok[] = {std::isfinite(a), std::isinf(a), k != FP_NAN, k == FP_NAN, k == FP_NORMAL, k == FP_SUBNORMAL};
      r |= u32(ok[i.mode]) << l;)
  w.set_pred(i.d, m, r);
}

// ---------------------------------------------------------------------------------------------------------------------
// Conversions. In general through long double, which holds every float and 64-bit integer.

template <class To, class From>
void convert_exact(Warp& w, const Ins& i, u32 m) {  // the usual ones, exact or to nearest
  To* d = w.D<To>(i.d);
  const From* a = w.S<From>(i.s[0]);
  LANES(d[l] = To(a[l]);)
}
void convert(Warp& w, const Ins& i, u32 m) {  // mode: 1 rni, 2 rzi, 3 rmi, 4 rpi
  const bool from_float = is_float(i.ty2), to_float = is_float(i.ty);
  const int width = 8 * size_of(i.ty);
  LANES(
      const u64 raw = w.raw(i.s[0], l); long double f = 0; __int128 n = 0; u64 out = 0; switch (i.ty2) {
        case F16:
          f = half_to_float(u16(raw));
          break;
        case BF16:
          f = bf_to_float(u16(raw));
          break;
        case F32:
          f = i.ftz ? flushed(bits<float>(u32(raw))) : bits<float>(u32(raw));
          break;
        case F64:
          f = bits<double>(raw);
          break;
        case S8:
          n = int8_t(raw);
          break;
        case S16:
          n = int16_t(raw);
          break;
        case S32:
          n = i32(raw);
          break;
        case S64:
          n = i64(raw);
          break;
        default:
          n = raw & (~0ull >> (64 - 8 * size_of(i.ty2)));
      } if (from_float && i.mode) f = i.mode == 1 ? std::nearbyint(f)
                                                                                        : i.mode == 2 ? std::trunc(f)
                                                                                        : i.mode == 3 ? std::floor(f)
                                                                                                      : std::ceil(f);
      if (to_float) {
        if (!from_float) f = (long double)n;
        if (i.sat) f = f > 0 ? std::min(f, 1.0L) : 0.0L;
        if (i.relu && f < 0) f = 0;
        const volatile long double exact = f;
        const Rounding rounding(i.round);
        if (i.ty == F64)
          out = bits<u64>(double(exact));
        else if (i.ty == F16)
          out = float_to_half(to_float_odd(double(exact)));
        else if (i.ty == BF16)
          out = float_to_bf(to_float_odd(double(exact)), i.round == 1);
        else {
          const float g = float(exact);
          out = bits<u32>(i.ftz ? flushed(g) : g);
        }
      } else if (from_float) {
        const long double lo = is_signed(i.ty) ? -std::ldexp(1.0L, width - 1) : 0,
                          hi = std::ldexp(1.0L, width - is_signed(i.ty));
        if (f != f)
          out = width == 64 ? 1ull << 63 : 0;
        else if (f < lo)
          out = is_signed(i.ty) ? u64(-1) << (width - 1) : 0;
        else if (f >= hi)
          out = is_signed(i.ty) ? (1ull << (width - 1)) - 1 : ~0ull >> (64 - width);
        else
          out = is_signed(i.ty) ? u64(i64(f)) : u64(f);
      } else {
        if (i.sat) {
          const __int128 one = 1, hi = (one << (width - is_signed(i.ty))) - 1, lo = is_signed(i.ty) ? -hi - 1 : 0;
          n = std::max(lo, std::min(hi, n));
        }
        out = u64(n) << (64 - width);
        out = is_signed(i.ty) ? u64(i64(out) >> (64 - width)) : out >> (64 - width);
      } w.set(i.d, l, out);)
}
u16 narrowed(const Ins& i, bool bf, float x) {
  if (i.relu) x = x != x ? NAN : x > 0 ? x : 0.0f;
  const Rounding rounding(bf ? 0 : i.round);
  const volatile float y = x;
  return bf ? float_to_bf(y, i.round == 1) : float_to_half(y);
}
void convert_pair(Warp& w, const Ins& i, u32 m) {  // cvt.rn.bf16x2.f32 d, high, low
  const bool bf = i.ty == BF16X2;
  LANES(w.D<u32>(i.d)[l] = u32(narrowed(i, bf, w.S<float>(i.s[0])[l])) << 16 | narrowed(i, bf, w.S<float>(i.s[1])[l]);)
}
void convert_tf32(Warp& w, const Ins& i, u32 m) {  // mode: ties away from zero, else to even
  LANES(const u32 u = w.S<u32>(i.s[0])[l]; const bool nan = (u & 0x7fffffff) > 0x7f800000;
        w.D<u32>(i.d)[l] = nan ? 0x7fffffff : (u + (i.mode ? 0x1000 : 0xfff + (u >> 13 & 1))) & 0xffffe000;)
}
void mov_pack(Warp& w, const Ins& i, u32 m) {  // mov d, {v...}
  LANES(u128 x = 0; int at = 0; for (const Src& s : i.v) x |= u128(w.raw(s, l)) << at, at += 8 * s.size;
        memcpy(w.regs + i.d.off + l * i.d.size, &x, i.d.size);)
}
void mov_unpack(Warp& w, const Ins& i, u32 m) {  // mov {v...}, s
  const int each = i.s[0].size / int(i.v.size());
  LANES(u8 copy[16]; memcpy(copy, w.at(i.s[0]) + l * i.s[0].size, i.s[0].size); int at = 0; for (const Src& s : i.v) {
    if (s.size) memcpy(w.regs + s.off + l * s.size, copy + at, each);
    at += each;
  })
}

// ---------------------------------------------------------------------------------------------------------------------
// Bits

void prmt(Warp& w, const Ins& i, u32 m) {
  LANES(const u64 x = u64(w.S<u32>(i.s[1])[l]) << 32 | w.S<u32>(i.s[0])[l]; const u32 s = w.S<u32>(i.s[2])[l];
        u32 r = 0; for (int b = 0; b < 4; b++) {
          const u32 sel = s >> (4 * b) & 15;
          u8 v = u8(x >> (8 * (sel & 7)));
          if (sel & 8) v = v & 0x80 ? 0xff : 0;
          r |= u32(v) << (8 * b);
        } w.D<u32>(i.d)[l] = r;)
}
void shf(Warp& w, const Ins& i, u32 m) {  // mode: 1 right, 2 wrap
  LANES(const u64 x = u64(w.S<u32>(i.s[1])[l]) << 32 | w.S<u32>(i.s[0])[l]; u32 n = w.S<u32>(i.s[2])[l];
        n = i.mode & 2 ? n & 31 : std::min(n, 32u); w.D<u32>(i.d)[l] = i.mode & 1 ? u32(x >> n) : u32(x << n >> 32);)
}
void lop3(Warp& w, const Ins& i, u32 m) {
  LANES(const u32 a = w.S<u32>(i.s[0])[l]; const u32 b = w.S<u32>(i.s[1])[l]; const u32 c = w.S<u32>(i.s[2])[l];
        u32 r = 0;
        for (int k = 0; k < 8; k++) if (i.imm >> k & 1) r |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
        w.D<u32>(i.d)[l] = r;)
}
template <class T>
void bfe(Warp& w, const Ins& i, u32 m) {
  using U = std::make_unsigned_t<T>;
  constexpr u32 n = 8 * sizeof(T);
  LANES(const T a = w.S<T>(i.s[0])[l]; const u32 pos = w.S<u32>(i.s[1])[l] & 255;
        const u32 len = w.S<u32>(i.s[2])[l] & 255;
        const bool sign = std::is_signed_v<T> && len && (a >> std::min(pos + len - 1, n - 1) & 1); U r = 0;
        for (u32 k = 0; k < n; k++) r |= U(k < len && pos + k < n ? U(a) >> (pos + k) & 1 : sign) << k;
        w.D<T>(i.d)[l] = T(r);)
}
template <class T>
void bfi(Warp& w, const Ins& i, u32 m) {
  LANES(const T a = w.S<T>(i.s[0])[l]; T r = w.S<T>(i.s[1])[l]; const u32 pos = w.S<u32>(i.s[2])[l] & 255;
        const u32 len = w.S<u32>(i.s[3])[l] & 255; for (u32 k = 0; k < len && pos + k < 8 * sizeof(T); k++) r =
                                                       (r & ~(T(1) << (pos + k))) | ((a >> k & 1) << (pos + k));
        w.D<T>(i.d)[l] = r;)
}
template <class T>
void count_bits(Warp& w, const Ins& i, u32 m) {  // mode: 0 popc, 1 clz, 2 bfind, 3 bfind.shiftamt
  constexpr int n = 8 * sizeof(T);
  LANES(u64 a = std::make_unsigned_t<T>(w.S<T>(i.s[0])[l]); u32 r;
        if (i.mode >= 2 && std::is_signed_v<T> && T(a) < 0) a = std::make_unsigned_t<T>(~T(a));
        const u32 zeros = a ? u32(__builtin_clzll(a) - (64 - n)) : u32(n);
        if (i.mode == 0) r = u32(__builtin_popcountll(a)); else if (i.mode == 1) r = zeros;
        else r = !a            ? ~0u
                 : i.mode == 2 ? n - 1 - zeros
                               : zeros;
        w.D<u32>(i.d)[l] = r;)
}
template <class T>
void brev(Warp& w, const Ins& i, u32 m) {
  LANES(T a = w.S<T>(i.s[0])[l]; T r = 0;
        for (u32 k = 0; k < 8 * sizeof(T); k++) r |= (a >> k & 1) << (8 * sizeof(T) - 1 - k); w.D<T>(i.d)[l] = r;)
}

// ---------------------------------------------------------------------------------------------------------------------
// Which function

#define FOR_INTEGERS(X)  \
  switch (i.ty) {        \
    case U8:             \
    case B8:             \
      return X(u8);      \
    case S8:             \
      return X(int8_t);  \
    case U16:            \
    case B16:            \
      return X(u16);     \
    case S16:            \
      return X(int16_t); \
    case U32:            \
    case B32:            \
      return X(u32);     \
    case S32:            \
      return X(i32);     \
    case U64:            \
    case B64:            \
      return X(u64);     \
    case S64:            \
      return X(i64);     \
    default:             \
      return nullptr;    \
  }
template <class F>
Fn integer_binary(const Ins& i) {
#define X(T) binary<T, F>
  FOR_INTEGERS(X)
#undef X
}
template <class F>
Fn float_binary(const Ins& i) {
  const bool modes = i.round || i.ftz || i.sat;
  switch (i.ty) {
    case F32:
      return modes ? Fn(binary_modes<float, F>) : Fn(binary<float, F>);
    case F64:
      return modes ? Fn(binary_modes<double, F>) : Fn(binary<double, F>);
    case F16:
      return modes ? Fn(binary_modes<Half, F>) : Fn(binary<Half, F>);
    case BF16:
      return modes ? Fn(binary_modes<Bf, F>) : Fn(binary<Bf, F>);
    case F16X2:
      return modes ? Fn(binary_modes<Half, F, 2>) : Fn(binary<Half, F, 2>);
    case BF16X2:
      return modes ? Fn(binary_modes<Bf, F, 2>) : Fn(binary<Bf, F, 2>);
    default:
      return nullptr;
  }
}
template <class F>
Fn any_binary(const Ins& i) {
  return is_float(i.ty) || is_half_pair(i.ty) ? float_binary<F>(i) : integer_binary<F>(i);
}
template <class F>
Fn float_unary(const Ins& i) {
  switch (i.ty) {
    case F32:
      return unary<float, F>;
    case F64:
      return unary<double, F>;
    case F16:
      return unary<Half, F>;
    case BF16:
      return unary<Bf, F>;
    case F16X2:
      return unary<Half, F, 2>;
    case BF16X2:
      return unary<Bf, F, 2>;
    default:
      return nullptr;
  }
}
template <class F>
Fn integer_unary(const Ins& i){
#define X(T) unary<T, F>
    FOR_INTEGERS(X)
#undef X
} Fn mad_function(Ins& i, bool hi){
#define X(T) (hi ? Fn(mad_hi<T>) : Fn(mad_lo<T>))
    FOR_INTEGERS(X)
#undef X
} Fn setp_function(const Ins& i) {
  switch (i.ty) {
    case F32:
      return setp<float>;
    case F64:
      return setp<double>;
    case F16:
      return setp<Half>;
    case BF16:
      return setp<Bf>;
    case F16X2:
      return setp<Half, 2>;
    case BF16X2:
      return setp<Bf, 2>;
    default:
      break;
  }
#define X(T) setp<T>
  FOR_INTEGERS(X)
#undef X
}
Fn cvt_function(const Ins& i) {
  const bool plain = !i.round && !i.ftz && !i.sat && !i.relu && !i.mode;
  if (plain) switch (i.ty * 32 + i.ty2) {
      case F32 * 32 + BF16:
        return convert_exact<float, Bf>;
      case F32 * 32 + F16:
        return convert_exact<float, Half>;
      case BF16 * 32 + F32:
        return convert_exact<Bf, float>;
      case F16 * 32 + F32:
        return convert_exact<Half, float>;
      case F32 * 32 + S32:
        return convert_exact<float, i32>;
      case F64 * 32 + F32:
        return convert_exact<double, float>;
      case F32 * 32 + F64:
        return convert_exact<float, double>;
      case S64 * 32 + S32:
        return convert_exact<i64, i32>;
      case U64 * 32 + U32:
        return convert_exact<u64, u32>;
    }
  return convert;
}
}  // namespace

void begin_jitter() { jitter_state = 12345 + u32(opt.seed) * 2654435761u; }

Fn alu_function(Ins& i, const Suffixes& p) {
  const string& o = p[0];
  const auto has = [&](const char* s) { return std::find(p.begin(), p.end(), s) != p.end(); };
  const Ty ty = i.ty;
  const int size = size_of(ty);
  const bool flt = is_float(ty) || is_half_pair(ty), carries = has("cc") || o == "addc" || o == "subc" || o == "madc";
  if (carries) i.mode = u8((o == "addc" || o == "subc" || o == "madc" ? 2 : 0) | (has("cc") ? 4 : 0));
  if (carries && o.substr(0, 3) == "mad") {
    i.mode |= has("hi");
    if (is_signed(ty) && has("hi")) return nullptr;
    return size == 4 ? Fn(mad_carry<u32>) : Fn(mad_carry<u64>);
  }
  if (carries) {
    i.mode |= o.substr(0, 3) == "sub";
    return size == 4 ? Fn(add_carry<u32>) : Fn(add_carry<u64>);
  }
  if (ty == PRED && (o == "and" || o == "or" || o == "xor" || o == "not")) {
    i.mode = o == "and" ? 0 : o == "or" ? 1 : o == "xor" ? 2 : 3;
    return logic_pred;
  }
  if (o == "add") return any_binary<Add>(i);
  if (o == "sub") return any_binary<Sub>(i);
  if (o == "mul" && has("wide"))
    return ty == U32   ? Fn(mul_wide<u32, u64>)
           : ty == S32 ? Fn(mul_wide<i32, i64>)
           : ty == U16 ? Fn(mul_wide<u16, u32>)
                       : Fn(mul_wide<int16_t, i32>);
  if (o == "mul") return has("hi") ? integer_binary<MulHi>(i) : any_binary<Mul>(i);
  if (o == "div" && ty == F32 && (has("approx") || has("full"))) {
    i.mode = has("approx");
    return div_approx;
  }
  if (o == "div") return any_binary<Div>(i);
  if (o == "rem") return integer_binary<Rem>(i);
  if (o == "min") return i.nan ? float_binary<WithNan<Min>>(i) : any_binary<Min>(i);
  if (o == "max") return i.nan ? float_binary<WithNan<Max>>(i) : any_binary<Max>(i);
  if (o == "and") return integer_binary<And>(i);
  if (o == "or") return integer_binary<Or>(i);
  if (o == "xor") return integer_binary<Xor>(i);
  if (o == "copysign") return ty == F64 ? Fn(binary<double, Copysign>) : Fn(binary<float, Copysign>);
  if (o == "fma" || (o == "mad" && flt)) {
    const bool modes = i.round || i.ftz || i.sat || i.relu;
    switch (ty) {
      case F32:
        return modes ? Fn(fma_modes<float>) : Fn(fma_plain<float>);
      case F64:
        return modes ? Fn(fma_modes<double>) : Fn(fma_plain<double>);
      case F16:
        return modes ? Fn(fma_modes<Half>) : Fn(fma_plain<Half>);
      case BF16:
        return modes ? Fn(fma_modes<Bf>) : Fn(fma_plain<Bf>);
      case F16X2:
        return modes ? Fn(fma_modes<Half, 2>) : Fn(fma_plain<Half, 2>);
      case BF16X2:
        return modes ? Fn(fma_modes<Bf, 2>) : Fn(fma_plain<Bf, 2>);
      default:
        return nullptr;
    }
  }
  if (o == "mad" && has("wide"))
    return ty == U32   ? Fn(mad_wide<u32, u64>)
           : ty == S32 ? Fn(mad_wide<i32, i64>)
           : ty == U16 ? Fn(mad_wide<u16, u32>)
                       : Fn(mad_wide<int16_t, i32>);
  if (o == "mad") return mad_function(i, has("hi"));
  if (o == "dp4a") return p[1] == "u32" ? Fn(dp4a<u8>) : Fn(dp4a<int8_t>);
  if (o == "shl") return size == 2 ? Fn(shift<u16, true>) : size == 4 ? Fn(shift<u32, true>) : Fn(shift<u64, true>);
  if (o == "shr" && is_signed(ty))
    return size == 2 ? Fn(shift<int16_t, false>) : size == 4 ? Fn(shift<i32, false>) : Fn(shift<i64, false>);
  if (o == "shr") return size == 2 ? Fn(shift<u16, false>) : size == 4 ? Fn(shift<u32, false>) : Fn(shift<u64, false>);
  if (o == "not") return integer_unary<Not>(i);
  if (o == "neg") return flt ? float_unary<Neg>(i) : integer_unary<Neg>(i);
  if (o == "abs") return flt ? float_unary<Abs>(i) : integer_unary<Abs>(i);
  if (o == "mov")
    return ty == PRED   ? Fn(mov_pred)
           : size == 2  ? Fn(unary<u16, Mov>)
           : size == 8  ? Fn(unary<u64, Mov>)
           : size == 16 ? Fn(unary<u128, Mov>)
                        : Fn(unary<u32, Mov>);
  if (o == "mov_pack") return mov_pack;
  if (o == "mov_unpack") return mov_unpack;
  i.mode = i.mode ? i.mode : has("approx");
  if (o == "ex2") return float_unary<Ex2>(i);
  if (o == "lg2") return float_unary<Lg2>(i);
  if (o == "rcp") return float_unary<Rcp>(i);
  if (o == "rsqrt") return float_unary<Rsqrt>(i);
  if (o == "sqrt") return float_unary<Sqrt>(i);
  if (o == "sin") return float_unary<Sin>(i);
  if (o == "cos") return float_unary<Cos>(i);
  if (o == "tanh") return float_unary<Tanh>(i);
  if (o == "selp") return size == 2 ? Fn(selp<u16>) : size == 8 ? Fn(selp<u64>) : Fn(selp<u32>);
  if (o == "setp") {
    static const std::map<string, int> names = {{"eq", EQ},   {"ne", NE},   {"lt", LT},     {"le", LE},   {"gt", GT},
                                                {"ge", GE},   {"lo", LT},   {"ls", LE},     {"hi", GT},   {"hs", GE},
                                                {"equ", EQU}, {"neu", NEU}, {"ltu", LTU},   {"leu", LEU}, {"gtu", GTU},
                                                {"geu", GEU}, {"num", NUM}, {"nan", NOTNUM}};
    i.mode = u8(names.at(p[1]) | (has("or") ? 16 : has("xor") ? 32 : 0));
    return setp_function(i);
  }
  if (o == "testp") {
    static const std::map<string, int> names = {{"finite", 0},     {"infinite", 1}, {"number", 2},
                                                {"notanumber", 3}, {"normal", 4},   {"subnormal", 5}};
    i.mode = u8(names.at(p[1]));
    return ty == F64 ? Fn(testp<double>) : Fn(testp<float>);
  }
  if (o == "cvt") {
    if (has("tf32")) {
      i.mode = has("rna");
      return convert_tf32;
    }
    i.mode = has("rni") ? 1 : has("rzi") ? 2 : has("rmi") ? 3 : has("rpi") ? 4 : 0;
    return is_half_pair(i.ty) ? Fn(convert_pair) : cvt_function(i);
  }
  if (o == "prmt") return p.size() > 2 ? nullptr : prmt;
  if (o == "shf") {
    i.mode = u8(has("r") | has("wrap") << 1);
    return shf;
  }
  if (o == "lop3") return lop3;
  if (o == "bfe") return ty == U32 ? Fn(bfe<u32>) : ty == S32 ? Fn(bfe<i32>) : ty == U64 ? Fn(bfe<u64>) : Fn(bfe<i64>);
  if (o == "bfi") return size == 4 ? Fn(bfi<u32>) : Fn(bfi<u64>);
  if (o == "popc" || o == "clz" || o == "bfind") {
    i.mode = o == "popc" ? 0 : o == "clz" ? 1 : has("shiftamt") ? 3 : 2;
    return ty == S32   ? Fn(count_bits<i32>)
           : ty == S64 ? Fn(count_bits<i64>)
           : size == 4 ? Fn(count_bits<u32>)
                       : Fn(count_bits<u64>);
  }
  if (o == "brev") return size == 4 ? Fn(brev<u32>) : Fn(brev<u64>);
  return nullptr;
}

}  // namespace ptxsim
