// The part of the CUDA runtime that nvcc's host code and ordinary launch code call, over ptxsim: linked instead of
// cudart, the unchanged .cu file runs on the CPU, launches included. The device is an H200 in name, with as many
// multiprocessors and as much shared memory as the options say; its memory is the host's. A finding becomes
// cudaErrorIllegalAddress, and cudaGetErrorString tells it. Every call is synchronous.
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

#include "machine.h"

using ptxsim::opt;

namespace {
constexpr int kThreadsPerSm = 2048, kBlocksPerSm = 32, kReserved = 1024;  // bytes of shared memory, for each block
int shared_of_an_sm() { return int(opt.shared_limit) + kReserved; }
struct FatBinary {
  int magic, version;
  const unsigned char* data;
  void* file;
};
struct Config {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};
struct Code {
  PtxModule* module;
  std::string name;
};
struct Function {
  Code own, now;  // now: another module's, by ptxsim_replace
  int max_dynamic;
  long info(const char* what) const { return ptxsim_kernel_info(now.module, now.name.c_str(), what); }
};
thread_local Config pending;
thread_local cudaError_t last = cudaSuccess;
thread_local std::string text;
std::map<const void*, Function>& functions() {
  static std::map<const void*, Function> f;
  return f;
}
Function* find(const void* host) {
  auto it = functions().find(host);
  return it == functions().end() ? nullptr : &it->second;
}
cudaError_t fail(cudaError_t e, const std::string& why) {
  text = why;
  return last = e;
}
template <class T>
T read(const unsigned char* p) {
  T x;
  memcpy(&x, p, sizeof x);
  return x;
}

// By threads and shared memory alone: registers are ptxas's.
int blocks_of_an_sm(const Function& f, size_t threads, size_t shared) {
  const long by_threads = kThreadsPerSm / ((long(threads) + 31) / 32 * 32);
  const long by_shared = shared_of_an_sm() / (f.info("shared") + long(shared) + kReserved);
  return int(std::min({by_threads, by_shared, long(kBlocksPerSm)}));
}
long launches, memsets;  // so far

cudaError_t launch(const Function* f, dim3 grid, dim3 block, void** args, size_t shared, unsigned cluster = 0,
                   bool cooperative = false) {
  if (!f || !f->now.module)
    return fail(cudaErrorInvalidDeviceFunction, "no PTX of this kernel: compile for compute_XX with --no-compress");
  const size_t threads = size_t(block.x) * block.y * block.z;
  if (!grid.x || !grid.y || !grid.z || grid.x > 2147483647u || grid.y > 65535 || grid.z > 65535 || !threads ||
      threads > 1024 || block.z > 64)
    return fail(cudaErrorInvalidConfiguration, "invalid configuration");
  if (long(threads) > f->info("max_threads"))
    return fail(cudaErrorLaunchOutOfResources, "more threads than __launch_bounds__");
  if (long(shared) > f->max_dynamic || long(shared) + f->info("shared") > opt.shared_limit)
    return fail(cudaErrorInvalidValue, "more dynamic shared memory than cudaFuncSetAttribute allowed");
  if (cluster > 8) return fail(cudaErrorInvalidClusterSize, "clusters have at most 8 blocks");
  if (cooperative && size_t(grid.x) * grid.y * grid.z > size_t(opt.sms) * blocks_of_an_sm(*f, threads, shared))
    return fail(cudaErrorCooperativeLaunchTooLarge, "too many blocks for a cooperative launch");
  const PtxLaunch shape = {
      {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, unsigned(shared), cluster, cooperative};
  launches++;
  if (ptxsim_launch(f->now.module, f->now.name.c_str(), &shape, args))
    return fail(cudaErrorIllegalAddress, ptxsim_report());
  return cudaSuccess;
}
// Without the name of an anonymous namespace, which differs from file to file: <length>_GLOBAL__N_...
std::string common_name(std::string s) {
  const size_t at = s.find("_GLOBAL__N_");
  if (at == std::string::npos) return s;
  size_t number = at;
  while (isdigit(s[number - 1])) number--;
  return s.erase(number, at - number + std::stoul(s.substr(number, at - number)));
}
}  // namespace

extern "C" {
long ptxsim_runtime_launches() { return launches; }
long ptxsim_runtime_memsets() { return memsets; }
int ptxsim_replace(PtxModule* module) {
  int replaced = 0;
  for (auto& [host, f] : functions()) {
    f.now = f.own;
    if (!module) continue;
    for (auto& [name, kernel] : module->kernels)
      if (common_name(name) == common_name(f.own.name)) f.now = {module, name}, replaced++;
  }
  return replaced;
}

// What nvcc's host code calls
void** __cudaRegisterFatBinary(void* wrapper) {
  const unsigned char* p = static_cast<FatBinary*>(wrapper)->data;
  const unsigned char* at = p + read<unsigned short>(p + 6);
  const unsigned char* end = at + read<unsigned long long>(p + 8);
  PtxModule* module = nullptr;
  while (at < end && !module) {
    const unsigned kind = read<unsigned short>(at), header = read<unsigned>(at + 4);
    const unsigned long long size = read<unsigned long long>(at + 8);
    if (kind == 1) module = ptxsim_load(std::string(reinterpret_cast<const char*>(at + header), size).c_str());
    at += header + size;
  }
  return reinterpret_cast<void**>(module);
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void** module, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  const Code code = {reinterpret_cast<PtxModule*>(module), name};
  functions()[host] = {code, code, 48 * 1024};
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, CUstream_st* stream) {
  pending = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = pending.grid, *block = pending.block, *shared = pending.shared;
  *static_cast<cudaStream_t*>(stream) = pending.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* k, const void* host) {
  *k = reinterpret_cast<cudaKernel_t>(find(host));
  return *k ? cudaSuccess : fail(cudaErrorInvalidDeviceFunction, "no such kernel");
}
cudaError_t __cudaLaunchKernel(cudaKernel_t k, dim3 grid, dim3 block, void** args, size_t shared, cudaStream_t) {
  return launch(reinterpret_cast<Function*>(k), grid, block, args, shared);
}

// Launches
cudaError_t cudaLaunchKernel(const void* host, dim3 grid, dim3 block, void** args, size_t shared, cudaStream_t) {
  return launch(find(host), grid, block, args, shared);
}
cudaError_t cudaLaunchCooperativeKernel(const void* host, dim3 grid, dim3 block, void** args, size_t shared,
                                        cudaStream_t) {
  return launch(find(host), grid, block, args, shared, 0, true);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* host, void** args) {
  unsigned cluster = 0;
  bool cooperative = false;
  for (unsigned i = 0; i < c->numAttrs; i++) {
    const cudaLaunchAttribute& a = c->attrs[i];
    if (a.id == cudaLaunchAttributeCooperative) cooperative = a.val.cooperative;
    if (a.id != cudaLaunchAttributeClusterDimension) continue;
    if (a.val.clusterDim.y > 1 || a.val.clusterDim.z > 1) return fail(cudaErrorNotSupported, "clusters along y or z");
    cluster = a.val.clusterDim.x;
  }
  return launch(find(host), c->gridDim, c->blockDim, args, c->dynamicSmemBytes, cluster, cooperative);
}
cudaError_t cudaFuncSetAttribute(const void* host, cudaFuncAttribute attribute, int value) {
  Function* f = find(host);
  if (!f) return fail(cudaErrorInvalidDeviceFunction, "no such kernel");
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || value + f->info("shared") > opt.shared_limit)
    return fail(cudaErrorInvalidValue, "more shared memory than a block of this device may have");
  f->max_dynamic = value;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void* host) {
  const Function* f = find(host);
  if (!f) return fail(cudaErrorInvalidDeviceFunction, "no such kernel");
  *a = {};
  a->sharedSizeBytes = size_t(f->info("shared")), a->localSizeBytes = size_t(f->info("local"));
  a->maxThreadsPerBlock = int(f->info("max_threads")), a->numRegs = 64, a->ptxVersion = a->binaryVersion = 90;
  a->maxDynamicSharedSizeBytes = f->max_dynamic;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void* host, int threads, size_t shared,
                                                                   unsigned) {
  const Function* f = find(host);
  if (!f || threads < 1) return fail(cudaErrorInvalidValue, "no such kernel or block");
  *n = blocks_of_an_sm(*f, size_t(threads), shared);
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* n, const void* host, int threads, size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(n, host, threads, shared, 0);
}

// The device
cudaError_t cudaGetDeviceCount(int* n) { return *n = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
  return device ? fail(cudaErrorInvalidDevice, "invalid device ordinal") : cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const std::map<int, int> values = {{cudaDevAttrMultiProcessorCount, int(opt.sms)},
                                     {cudaDevAttrMaxSharedMemoryPerBlockOptin, int(opt.shared_limit)},
                                     {cudaDevAttrMaxSharedMemoryPerBlock, 49152},
                                     {cudaDevAttrMaxSharedMemoryPerMultiprocessor, shared_of_an_sm()},
                                     {cudaDevAttrReservedSharedMemoryPerBlock, kReserved},
                                     {cudaDevAttrMaxThreadsPerMultiProcessor, kThreadsPerSm},
                                     {cudaDevAttrMaxThreadsPerBlock, 1024},
                                     {cudaDevAttrMaxBlocksPerMultiprocessor, kBlocksPerSm},
                                     {cudaDevAttrWarpSize, 32},
                                     {cudaDevAttrComputeCapabilityMajor, 9},
                                     {cudaDevAttrComputeCapabilityMinor, 0},
                                     {cudaDevAttrCooperativeLaunch, 1},
                                     {cudaDevAttrL2CacheSize, 62914560},
                                     {cudaDevAttrMaxRegistersPerBlock, 65536},
                                     {cudaDevAttrMaxRegistersPerMultiprocessor, 65536},
                                     {cudaDevAttrMaxGridDimX, 2147483647},
                                     {cudaDevAttrMaxGridDimY, 65535},
                                     {cudaDevAttrMaxGridDimZ, 65535},
                                     {cudaDevAttrMaxBlockDimX, 1024},
                                     {cudaDevAttrMaxBlockDimY, 1024},
                                     {cudaDevAttrMaxBlockDimZ, 64},
                                     {cudaDevAttrClockRate, 1980000},
                                     {cudaDevAttrGlobalMemoryBusWidth, 6144},
                                     {cudaDevAttrMemoryPoolsSupported, 1},
                                     {cudaDevAttrUnifiedAddressing, 1}};
  auto it = values.find(attribute);
  if (it == values.end()) return fail(cudaErrorNotSupported, "a device attribute that the simulator doesn't have");
  *value = it->second;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  *p = {};
  strcpy(p->name, "NVIDIA H200 (ptxsim)");
  p->totalGlobalMem = 141ull << 30, p->sharedMemPerBlock = 49152, p->sharedMemPerBlockOptin = size_t(opt.shared_limit);
  p->sharedMemPerMultiprocessor = size_t(shared_of_an_sm()), p->reservedSharedMemPerBlock = kReserved,
  p->regsPerBlock = p->regsPerMultiprocessor = 65536, p->warpSize = 32;
  p->maxThreadsPerBlock = 1024, p->maxThreadsPerMultiProcessor = kThreadsPerSm, p->multiProcessorCount = int(opt.sms);
  p->maxBlocksPerMultiProcessor = kBlocksPerSm, p->major = 9, p->minor = 0, p->l2CacheSize = 62914560,
  p->cooperativeLaunch = 1;
  p->maxGridSize[0] = 2147483647, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
  return cudaSuccess;
}
#if CUDART_VERSION < 13000
cudaError_t cudaGetDeviceProperties_v2(cudaDeviceProp* p, int device) { return cudaGetDeviceProperties(p, device); }
#endif
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

// Errors
cudaError_t cudaGetLastError() {
  const cudaError_t e = last;
  last = cudaSuccess;
  return e;
}
cudaError_t cudaPeekAtLastError() { return last; }
const char* cudaGetErrorName(cudaError_t e) { return e == cudaSuccess ? "cudaSuccess" : "cudaError (ptxsim)"; }
const char* cudaGetErrorString(cudaError_t e) { return e == cudaSuccess ? "no error" : text.c_str(); }

// Memory and streams. Freshly allocated memory is NaN.
cudaError_t cudaMalloc(void** p, size_t n) {
  *p = aligned_alloc(256, (n + 255) / 256 * 256);
  if (!*p) return fail(cudaErrorMemoryAllocation, "out of memory");
  memset(*p, 0xff, n);
  ptxsim_register(*p, n, "cudaMalloc", 0);
  return cudaSuccess;
}
cudaError_t cudaFree(void* p) {
  ptxsim_unregister(p);
  free(p);
  return cudaSuccess;
}
cudaError_t cudaMallocAsync(void** p, size_t n, cudaStream_t) { return cudaMalloc(p, n); }
cudaError_t cudaFreeAsync(void* p, cudaStream_t) { return cudaFree(p); }
cudaError_t cudaMemcpy(void* to, const void* from, size_t n, cudaMemcpyKind) {
  return memmove(to, from, n), cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t n, cudaMemcpyKind, cudaStream_t) {
  return memmove(to, from, n), cudaSuccess;
}
cudaError_t cudaMemset(void* p, int value, size_t n) {
  const std::string wrong = ptxsim::unwritable(p, n);
  if (!wrong.empty()) return fail(cudaErrorInvalidValue, "cudaMemset: " + wrong);
  memsets++;
  return memset(p, value, n), cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* p, int value, size_t n, cudaStream_t) { return cudaMemset(p, value, n); }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamQuery(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* s) {
  return *s = cudaStreamCaptureStatusNone, cudaSuccess;
}
cudaError_t cudaStreamGetDevice(cudaStream_t, int* device) { return *device = 0, cudaSuccess; }

// What a library that is captured from outside does not call. They link, so that the call can say so.
#define ABSENT(NAME, ...) \
  cudaError_t NAME(__VA_ARGS__) { return fail(cudaErrorNotSupported, "ptxsim has no events and no graphs: " #NAME); }
ABSENT(cudaEventCreate, cudaEvent_t*)
ABSENT(cudaEventCreateWithFlags, cudaEvent_t*, unsigned)
ABSENT(cudaEventDestroy, cudaEvent_t)
ABSENT(cudaEventRecord, cudaEvent_t, cudaStream_t)
ABSENT(cudaEventSynchronize, cudaEvent_t)
ABSENT(cudaEventElapsedTime, float*, cudaEvent_t, cudaEvent_t)
ABSENT(cudaStreamWaitEvent, cudaStream_t, cudaEvent_t, unsigned)
ABSENT(cudaStreamBeginCapture, cudaStream_t, cudaStreamCaptureMode)
ABSENT(cudaStreamEndCapture, cudaStream_t, cudaGraph_t*)
ABSENT(cudaGraphLaunch, cudaGraphExec_t, cudaStream_t)
ABSENT(cudaGraphExecDestroy, cudaGraphExec_t)
ABSENT(cudaGraphDestroy, cudaGraph_t)
#undef ABSENT
}
