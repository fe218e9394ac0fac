// A parallel loop over rows on the threads torch already has, the SIMD level chosen for this machine, and page advice.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>

namespace fastpref {

// Calls body(context, begin, end) over [0, count) in chunks, handed out as threads become free: rows may cost very
// different amounts (ignored rows cost nothing). Each chunk runs on one thread, so results do not depend on `threads`.
using RangeBody = void (*)(const void* context, int64_t begin, int64_t end);
void parallel_for(int64_t count, int64_t chunk, int threads, RangeBody body, const void* context);

template <class F>
void parallel_for(int64_t count, int64_t chunk, int threads, const F& f) {
  parallel_for(
      count, chunk, threads, [](const void* c, int64_t b, int64_t e) { (*static_cast<const F*>(c))(b, e); }, &f);
}

// f(i, slot) for i in [0, count), slot < threads telling concurrent calls apart: each has scratch memory of its own.
template <class F>
void parallel_with_slot(int64_t count, int threads, const F& f) {
  std::atomic<int64_t> next{0};
  parallel_for(threads, 1, threads, [&](int64_t slot, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) f(i, slot);
  });
}

// "openmp (<library>)" or "std::thread": what parallel_for runs on.
const char* parallel_runtime();

enum class SimdLevel : int { baseline = 0, avx2 = 1, avx512 = 2 };
SimdLevel simd_level();  // the level in use
void set_simd_level(
    const char* name);  // "auto" or a level; throws std::invalid_argument if built without it or unsupported
const char* simd_level_name(SimdLevel level);

// Asks for huge pages under a fresh output before its first touch: page faults cost more than the kernels do.
void advise_huge_pages(void* data, size_t bytes);

}  // namespace fastpref
