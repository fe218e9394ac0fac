// Rounding and padding of sizes, and the parts of a workspace. Internal to each source that includes it, as each SIMD
// level needs copies of its own.
#pragma once
#include <cstddef>
#include <cstdint>

namespace fastpref {
namespace {

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr double smaller(double a, double b) { return a < b ? a : b; }
constexpr double larger(double a, double b) { return a > b ? a : b; }
constexpr double magnitude(double a) { return a < 0 ? -a : a; }

// Near size, and so that neither it nor its inverse leaves the range of float; 1 for 0 and infinity.
inline double power_of_two(double size) {
  if (!(size > 0) || size > 1.7e308) return 1;
  int exponent;
  __builtin_frexp(size, &exponent);
  return __builtin_ldexp(1.0, exponent < -120 ? -120 : exponent > 120 ? 120 : exponent);
}

// A workspace may begin at any address: its parts begin on cache lines (and for the widest vectors), so `size` bytes of
// parts need padded(size).
constexpr int64_t alignment = 64;
constexpr int64_t padded(int64_t size) { return size + alignment; }
inline char* aligned(void* workspace) {
  char* begin = static_cast<char*>(workspace);
  return begin + (alignment - reinterpret_cast<uintptr_t>(begin) % alignment) % alignment;
}

// Offsets of the parts in bytes, one after the other.
struct Parts {
  int64_t bytes = 0;

  int64_t take(int64_t size) {
    const int64_t at = bytes;
    bytes = round_up(bytes + size, alignment);
    return at;
  }
};

}  // namespace
}  // namespace fastpref
