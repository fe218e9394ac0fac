#include "parallel.h"

#include <atomic>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "cpu/arith.h"

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <sys/mman.h>
#endif

namespace fastpref {
namespace {

// libgomp and LLVM's libomp both export this entry point; a second OpenMP runtime beside torch's is never loaded.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

struct OpenMp {
  GompParallel parallel = nullptr;
  std::string name = "std::thread";
};

const OpenMp& loaded_openmp() {
  static const OpenMp runtime = [] {
    OpenMp found;
#if defined(__linux__)
    // the loader's lock is held in the callback: only collect there, open afterwards
    std::vector<std::string> loaded;
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* out) {
          if (info->dlpi_name) static_cast<std::vector<std::string>*>(out)->push_back(info->dlpi_name);
          return 0;
        },
        &loaded);
    for (const std::string& path : loaded) {
      const std::string name = path.substr(path.rfind('/') + 1);
      if (name.rfind("libgomp", 0) != 0 && name.rfind("libiomp5", 0) != 0 && name.rfind("libomp", 0) != 0) continue;
      void* handle = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
      void* symbol = handle ? dlsym(handle, "GOMP_parallel") : nullptr;
      if (!symbol) continue;
      found.parallel = reinterpret_cast<GompParallel>(symbol);
      found.name = "openmp (" + name + ")";
      break;
    }
#endif
    return found;
  }();
  return runtime;
}

// libgomp's thread pool does not survive fork(): a child that enters a parallel region waits for ever.
std::atomic<bool> forked_child{false};
#if defined(__linux__)
const int registered = pthread_atfork(nullptr, nullptr, [] { forked_child = true; });
#endif

struct Loop {
  RangeBody body;
  const void* context;
  int64_t count, chunk;
  std::atomic<int64_t> next{0};

  void run() {
    for (int64_t begin; (begin = next.fetch_add(chunk, std::memory_order_relaxed)) < count;)
      body(context, begin, begin + chunk < count ? begin + chunk : count);
  }
};

}  // namespace

const char* parallel_runtime() { return loaded_openmp().name.c_str(); }

void parallel_for(int64_t count, int64_t chunk, int threads, RangeBody body, const void* context) {
  if (count <= 0) return;
  const int64_t chunks = divide_up(count, chunk);
  if (threads > chunks) threads = static_cast<int>(chunks);
  Loop loop{body, context, count, chunk, {}};
  if (threads <= 1 || forked_child) return loop.run();
  if (loaded_openmp().parallel)
    return loaded_openmp().parallel([](void* l) { static_cast<Loop*>(l)->run(); }, &loop,
                                    static_cast<unsigned>(threads), 0);
  std::vector<std::thread> pool;
  try {
    for (int i = 1; i < threads; i++) pool.emplace_back([&loop] { loop.run(); });
  } catch (const std::system_error&) {  // the system gives no more threads: those that started do the work
  }
  loop.run();
  for (auto& thread : pool) thread.join();
}

namespace {

bool built(SimdLevel level) {
  switch (level) {
    case SimdLevel::baseline:
      return true;
    case SimdLevel::avx2:
#ifdef FASTPREF_HAS_AVX2
      return true;
#else
      return false;
#endif
    case SimdLevel::avx512:
#ifdef FASTPREF_HAS_AVX512
      return true;
#else
      return false;
#endif
  }
  return false;
}

bool supported(SimdLevel level) {
  if (!built(level)) return false;
#if defined(__x86_64__)
  // every processor with AVX2 has the F16C that the kernels use too; older compilers cannot ask for it
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  if (level == SimdLevel::avx2) return avx2;
  if (level == SimdLevel::avx512)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512cd");
#endif
  return level == SimdLevel::baseline;
}

SimdLevel best_level() {
  for (SimdLevel level : {SimdLevel::avx512, SimdLevel::avx2})
    if (supported(level)) return level;
  return SimdLevel::baseline;
}

std::atomic<SimdLevel>& current_level() {
  static std::atomic<SimdLevel> level{best_level()};
  return level;
}

}  // namespace

SimdLevel simd_level() { return current_level(); }

const char* simd_level_name(SimdLevel level) {
  static const char* const names[] = {"baseline", "avx2", "avx512"};
  return names[static_cast<int>(level)];
}

void set_simd_level(const char* name) {
  const std::string wanted = name;
  if (wanted == "auto") {
    current_level() = best_level();
    return;
  }
  for (SimdLevel level : {SimdLevel::baseline, SimdLevel::avx2, SimdLevel::avx512}) {
    if (wanted != simd_level_name(level)) continue;
    if (!supported(level))
      throw std::invalid_argument("simd level '" + wanted + "' is not " +
                                  (built(level) ? "supported by this processor" : "in this build") +
                                  "; the best here is '" + simd_level_name(best_level()) + "'");
    current_level() = level;
    return;
  }
  throw std::invalid_argument("simd level must be 'auto', 'baseline', 'avx2' or 'avx512', got '" + wanted + "'");
}

void advise_huge_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t huge = uintptr_t{1} << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + huge - 1) & ~(huge - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(huge - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: failure is harmless
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace fastpref
