// ptxsim: runs PTX (of nvcc or Triton) on the CPU, warp by warp, and checks every access. One thread at a time.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
typedef struct PtxModule PtxModule;
typedef struct {
  unsigned grid[3], block[3];
  unsigned shared;   // bytes of dynamic shared memory
  unsigned cluster;  // blocks of a cluster (along x); 0: as the kernel says
  int cooperative;   // every block is resident at once
} PtxLaunch;

PtxModule* ptxsim_load(const char* ptx);  // NULL on a parse error: see ptxsim_report()
// Memory that kernels may touch. Bounds are those of a registered range. 0 where it overlaps another; one at the same
// address joins it: as long as the longer, read-only where both are.
int ptxsim_register(void* base, uint64_t bytes, const char* name, int readonly);
void ptxsim_unregister(void* base);
void ptxsim_clear(void);
// 0: clean; 1: finished, with findings; 2: stopped (out of bounds, deadlock, unsupported)
int ptxsim_launch(PtxModule*, const char* entry, const PtxLaunch*, void** args);
const char* ptxsim_report(void);  // findings since the last ptxsim_reset, one a line
void ptxsim_reset(void);
int ptxsim_option(const char* name, long value);  // 0 where there is no such option; README.md lists them
const char* ptxsim_ledger(void);                  // of the last launch, as JSON (option ledger)
// "shared", "local", "params", "max_threads", "cluster"; -1 where there is no such kernel
long ptxsim_kernel_info(PtxModule*, const char* entry, const char* what);
// Of the CUDA runtime (simcudart.cpp): launches run the module's kernels in place of those of the same name; NULL:
// their own again. How many there are.
int ptxsim_replace(PtxModule*);
long ptxsim_runtime_launches(void);  // through that runtime, so far
long ptxsim_runtime_memsets(void);
#ifdef __cplusplus
}
#endif
