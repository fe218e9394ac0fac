// Calls the copy of a row kernel that was compiled for the instruction set in use.
#pragma once
#include "parallel.h"

// Declares NAME in each level's namespace and defines NAME(args, begin, end) to call the one in use.
#define FASTPREF_LEVEL(level, NAME, ARGS)   \
  namespace level {                         \
  void NAME(const ARGS&, int64_t, int64_t); \
  }
#ifdef FASTPREF_HAS_AVX2
#define FASTPREF_X86_LEVELS(NAME, ARGS) FASTPREF_LEVEL(avx2, NAME, ARGS) FASTPREF_LEVEL(avx512, NAME, ARGS)
#define FASTPREF_X86_CALL(NAME)                                          \
  if (level == SimdLevel::avx512) return avx512::NAME(args, begin, end); \
  if (level == SimdLevel::avx2) return avx2::NAME(args, begin, end);
#else
#define FASTPREF_X86_LEVELS(NAME, ARGS)
#define FASTPREF_X86_CALL(NAME) (void)level;
#endif
#define FASTPREF_DISPATCH(NAME, ARGS)                                               \
  FASTPREF_LEVEL(baseline, NAME, ARGS)                                              \
  FASTPREF_X86_LEVELS(NAME, ARGS)                                                   \
  inline void NAME(SimdLevel level, const ARGS& args, int64_t begin, int64_t end) { \
    FASTPREF_X86_CALL(NAME)                                                         \
    return baseline::NAME(args, begin, end);                                        \
  }

namespace fastpref {

// KERNEL, one of FASTPREF_DISPATCH's, over [0, count) in chunks on threads.
template <auto KERNEL, class Args>
void for_ranges(const Args& args, int64_t count, int64_t chunk, int threads) {
  const SimdLevel level = simd_level();
  parallel_for(count, chunk, threads, [&](int64_t begin, int64_t end) { KERNEL(level, args, begin, end); });
}

}  // namespace fastpref
