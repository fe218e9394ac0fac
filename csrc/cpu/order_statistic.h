// The median, or any other order statistic, of many magnitudes, by bisection.
#pragma once
#include "lanes.h"

namespace fastpref::FASTPREF_SIMD {
namespace {

// The value that `wanted` of values[0, count) do not exceed, to a percent; NaN entries are none. count is whole
// vectors, `most` the largest of the values.
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
    (count_of<T>(below) >= wanted ? high : low) = middle;
  }
  return high;
}

}  // namespace
}  // namespace fastpref::FASTPREF_SIMD
