// Kernels and launches of CUDA C++ that fastpref's kernels don't have, each with its planted bug. The program takes the
// number of a bug and prints "ok NAME" for each feature; a finding ends it with the report.
#include <cooperative_groups.h>
#include <cooperative_groups/memcpy_async.h>
#include <cooperative_groups/reduce.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>

#include <cassert>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <cuda/barrier>

#include "ptxsim.h"

namespace cg = cooperative_groups;

#define CHECK(call)                                                 \
  do {                                                              \
    cudaError_t status = (call);                                    \
    if (status == cudaSuccess) status = cudaGetLastError();         \
    if (status != cudaSuccess) {                                    \
      printf("%s failed: %s\n", #call, cudaGetErrorString(status)); \
      exit(1);                                                      \
    }                                                               \
  } while (0)
#define EXPECT(condition)                                \
  do {                                                   \
    if (!(condition)) {                                  \
      printf("line %d: not %s\n", __LINE__, #condition); \
      exit(2);                                           \
    }                                                    \
  } while (0)

enum Bug {
  NONE,
  NO_BARRIER,
  NO_FENCE,
  NO_CLUSTER_SYNC,
  NO_LAST_SYNC,
  NO_GRID_SYNC,
  NO_WAIT,
  NO_STORE_BARRIER,
  MEMSET_TOO_LONG,
  BAD_ASSERT
};

template <class T>
struct Array {  // of the device, which is the host
  T* p;
  int n;
  explicit Array(int n) : n(n) { CHECK(cudaMalloc(reinterpret_cast<void**>(&p), n * sizeof(T))); }
  ~Array() { cudaFree(p); }
};

// dynamic shared memory, shuffles, votes, atomics
__global__ void reduce(const float* x, int n, double* out, int* count) {
  extern __shared__ double part[];
  double s = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
    s += double(__ldg(x + i)) * x[i];
  for (int o = 16; o; o /= 2) s += __shfl_down_sync(~0u, s, o);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = s;
  __syncthreads();
  if (threadIdx.x < 32) {
    s = threadIdx.x < blockDim.x / 32 ? part[threadIdx.x] : 0;
    for (int o = 16; o; o /= 2) s += __shfl_xor_sync(~0u, s, o);
    if (threadIdx.x == 0) atomicAdd(out, s);
  }
  const unsigned votes = __ballot_sync(~0u, x[threadIdx.x] > 0);
  if (threadIdx.x % 32 == 0) atomicAdd(count, __popc(votes));
  if (__reduce_add_sync(~0u, threadIdx.x & 1) != 16) __trap();
  if (__syncthreads_count(1) != blockDim.x) __trap();
}
// double-buffered cp.async
__global__ void copy_async(const float4* x, float4* y, int tiles, Bug bug) {
  __shared__ float4 buffer[2][64];
  const auto fetch = [&](int t) {
    __pipeline_memcpy_async(&buffer[t & 1][threadIdx.x], x + t * 64 + threadIdx.x, 16);
    __pipeline_commit();
  };
  fetch(0);
  for (int t = 0; t < tiles; t++) {
    if (t + 1 < tiles) fetch(t + 1);
    __pipeline_wait_prior(t + 1 < tiles ? 1 : 0);
    if (bug != NO_BARRIER) __syncthreads();
    y[t * 64 + threadIdx.x] = buffer[t & 1][63 - threadIdx.x];
    __syncthreads();
  }
}
__global__ void halves(const __half2* a, const __nv_bfloat162* b, float* out) {
  const int i = threadIdx.x;
  const float2 h = __half22float2(__hfma2(a[i], a[i], __float2half2_rn(1.0f)));
  const float2 g = __bfloat1622float2(__hmul2(b[i], b[i]));
  out[4 * i] = h.x, out[4 * i + 1] = h.y, out[4 * i + 2] = g.x, out[4 * i + 3] = g.y;
}
// the last block adds up
__device__ unsigned done;
__global__ void last_block(const float* x, float* part, float* out, Bug bug) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    part[blockIdx.x] = x[blockIdx.x];
    if (bug != NO_FENCE) __threadfence();
    last = atomicAdd(&done, 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (last && threadIdx.x == 0) {
    float s = 0;
    for (unsigned b = 0; b < gridDim.x; b++) s += part[b];
    *out = s;
  }
}
__global__ void cluster_sum(const float* x, float* out, Bug bug) {
  __shared__ float mine;
  cg::cluster_group cluster = cg::this_cluster();
  if (threadIdx.x == 0) mine = x[blockIdx.x];
  if (bug != NO_CLUSTER_SYNC) cluster.sync();
  if (threadIdx.x == 0) {
    float s = 0;
    for (unsigned r = 0; r < cluster.num_blocks(); r++) s += *cluster.map_shared_rank(&mine, r);
    out[blockIdx.x] = s;
  }
  if (bug != NO_LAST_SYNC) cluster.sync();
}
__global__ void grid_sum(const float* x, float* part, float* out, Bug bug) {
  cg::grid_group grid = cg::this_grid();
  if (threadIdx.x == 0) part[blockIdx.x] = x[blockIdx.x];
  if (bug != NO_GRID_SYNC) grid.sync();
  if (threadIdx.x == 0) {
    float s = 0;
    for (unsigned b = 0; b < gridDim.x; b++) s += part[b];
    out[blockIdx.x] = s;
  }
}
// bulk copies in and out
namespace bulk = cuda::device::experimental;
using Barrier = cuda::barrier<cuda::thread_scope_block>;
#pragma nv_diag_suppress static_var_with_dynamic_init
__global__ void bulk_copies(const float* x, float* y, int tiles, Bug bug) {
  __shared__ alignas(128) float tile[256];
  __shared__ Barrier barrier;
  if (threadIdx.x == 0) {
    init(&barrier, blockDim.x);
    bulk::fence_proxy_async_shared_cta();
  }
  __syncthreads();
  for (int t = 0; t < tiles; t++) {
    Barrier::arrival_token token;
    if (threadIdx.x == 0) {
      bulk::cp_async_bulk_global_to_shared(tile, x + 256 * t, sizeof tile, barrier);
      token = cuda::device::barrier_arrive_tx(barrier, 1, sizeof tile);
    } else {
      token = barrier.arrive();
    }
    if (bug != NO_WAIT) barrier.wait(std::move(token));
    for (int i = threadIdx.x; i < 256; i += blockDim.x) tile[i] = 2 * tile[i];
    bulk::fence_proxy_async_shared_cta();
    if (bug != NO_STORE_BARRIER) __syncthreads();
    if (threadIdx.x == 0) {
      bulk::cp_async_bulk_shared_to_global(y + 256 * t, tile, sizeof tile);
      bulk::cp_async_bulk_commit_group();
      bulk::cp_async_bulk_wait_group_read<0>();
    }
    __syncthreads();
  }
}
// tiles of a warp, coalesced groups
__global__ void groups(const float* x, float* y) {
  __shared__ float s[64];
  auto block = cg::this_thread_block();
  cg::memcpy_async(block, s, x, sizeof s);
  cg::wait(block);
  auto tile = cg::tiled_partition<16>(block);
  float r = cg::reduce(tile, s[threadIdx.x], cg::plus<float>());
  if (threadIdx.x % 3 == 0) r += float(cg::coalesced_threads().size());
  y[threadIdx.x] = r;
}
__device__ __noinline__ float polynomial(float x, int n) {
  float r = 0;
  for (int i = 0; i < n; i++) r = r * x + 1;
  return r;
}
__global__ void calls(float* out, int n) {
  assert(n < 5);
  out[threadIdx.x] = polynomial(threadIdx.x, n) + polynomial(2, threadIdx.x % 3);
}

// What a launcher asks of a device, and the limits it meets, of an H200 and of others
void check_device() {
  int device, sms, optin, blocks;
  CHECK(cudaGetDevice(&device));
  cudaDeviceProp properties;
  cudaFuncAttributes attributes;
  CHECK(cudaFuncGetAttributes(&attributes, reduce));
  EXPECT(attributes.sharedSizeBytes == 0 && attributes.maxThreadsPerBlock == 1024 && attributes.numRegs > 0);
  const struct {
    int sms, kilobytes;
  } devices[] = {{108, 163}, {84, 99}, {132, 227}};
  for (auto [count, kilobytes] : devices) {
    const int limit = kilobytes << 10;
    ptxsim_option("sms", count), ptxsim_option("shared_limit", limit);
    CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device));
    CHECK(cudaDeviceGetAttribute(&optin, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    CHECK(cudaGetDeviceProperties(&properties, device));
    EXPECT(sms == count && properties.multiProcessorCount == count && properties.major == 9);
    EXPECT(optin == limit && properties.sharedMemPerBlockOptin == size_t(limit));
    EXPECT(properties.sharedMemPerMultiprocessor == size_t(limit) + 1024);
    CHECK(cudaFuncSetAttribute(reduce, cudaFuncAttributeMaxDynamicSharedMemorySize, limit));
    EXPECT(cudaFuncSetAttribute(reduce, cudaFuncAttributeMaxDynamicSharedMemorySize, limit + 1) ==
           cudaErrorInvalidValue);
    EXPECT(cudaGetLastError() == cudaErrorInvalidValue);
    CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, reduce, 128, limit / 2 - 1024));
    EXPECT(blocks == 2);
    CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, reduce, 128, limit));
    EXPECT(blocks == 1);
  }
}

int main(int, char** arguments) {
  Bug bug = Bug(atoi(arguments[1]));
  check_device();
  printf("ok device\n");

  const int n = 1000;
  Array<float> x(n), y(n), z(n);
  for (int i = 0; i < n; i++) x.p[i] = float(i % 7) - 3;
  {
    Array<double> out(1);
    Array<int> count(1);
    *out.p = 0, *count.p = 0;
    CHECK(cudaFuncSetAttribute(reduce, cudaFuncAttributeMaxDynamicSharedMemorySize, 64 << 10));
    reduce<<<3, 128, 60 << 10>>>(x.p, n, out.p, count.p);
    CHECK(cudaGetLastError());
    double expected = 0;
    int positive = 0;
    for (int i = 0; i < n; i++) expected += double(x.p[i]) * x.p[i], positive += i < 128 && x.p[i] > 0;
    EXPECT(*out.p == expected && *count.p == 3 * positive);
    int blocks;
    CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, reduce, 128, 60 << 10));
    EXPECT(blocks == 3);
    reduce<<<3, 128, 65 << 10>>>(x.p, n, out.p, count.p);  // beyond cudaFuncSetAttribute
    EXPECT(cudaGetLastError() == cudaErrorInvalidValue);
    ptxsim_option("shared_limit", 50 << 10);
    reduce<<<3, 128, 60 << 10>>>(x.p, n, out.p, count.p);  // beyond the device
    EXPECT(cudaGetLastError() == cudaErrorInvalidValue);
    ptxsim_option("shared_limit", 227 << 10);
    printf("ok reduce\n");
  }
  {
    Array<float> from(3 * 256), to(3 * 256);
    for (int i = 0; i < from.n; i++) from.p[i] = i;
    copy_async<<<1, 64>>>(reinterpret_cast<float4*>(from.p), reinterpret_cast<float4*>(to.p), 3, bug);
    CHECK(cudaGetLastError());
    for (int i = 0; i < to.n; i++) EXPECT(to.p[i] == from.p[i / 256 * 256 + (63 - i / 4 % 64) * 4 + i % 4]);
    printf("ok copy_async\n");
  }
  {
    Array<__half> a(64);
    Array<__nv_bfloat16> b(64);
    Array<float> out(128);
    for (int i = 0; i < 64; i++) a.p[i] = float(i) / 8, b.p[i] = float(i) / 8;
    halves<<<1, 32>>>(reinterpret_cast<__half2*>(a.p), reinterpret_cast<__nv_bfloat162*>(b.p), out.p);
    CHECK(cudaGetLastError());
    for (int i = 0; i < 64; i++) {
      const float v = float(i) / 8, h = out.p[i / 2 * 4 + i % 2], g = out.p[i / 2 * 4 + 2 + i % 2];
      EXPECT(h == __half2float(__half(v * v + 1)) && g == __bfloat162float(__nv_bfloat16(v * v)));
    }
    printf("ok halves\n");
  }
  last_block<<<7, 32>>>(x.p, y.p, z.p, bug);
  CHECK(cudaGetLastError());
  EXPECT(z.p[0] == 0);
  printf("ok last_block\n");
  {
    cudaLaunchConfig_t config = {};
    config.gridDim = 8, config.blockDim = 32;
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {4, 1, 1};
    config.attrs = &attribute, config.numAttrs = 1;
    CHECK(cudaLaunchKernelEx(&config, cluster_sum, static_cast<const float*>(x.p), y.p, bug));
    for (int b = 0; b < 8; b++)
      EXPECT(y.p[b] == x.p[b / 4 * 4] + x.p[b / 4 * 4 + 1] + x.p[b / 4 * 4 + 2] + x.p[b / 4 * 4 + 3]);
    printf("ok cluster_sum\n");
  }
  {
    const float* in = x.p;
    void* args[] = {&in, &y.p, &z.p, &bug};
    CHECK(cudaLaunchCooperativeKernel(reinterpret_cast<void*>(grid_sum), 20, 64, args, 0, nullptr));
    float s = 0;
    for (int i = 0; i < 20; i++) s += x.p[i];
    for (int b = 0; b < 20; b++) EXPECT(z.p[b] == s);
    printf("ok grid_sum\n");
  }
  bulk_copies<<<1, 64>>>(x.p, y.p, 3, bug);
  CHECK(cudaGetLastError());
  for (int i = 0; i < 768; i++) EXPECT(y.p[i] == 2 * x.p[i]);
  printf("ok bulk_copies\n");
  groups<<<1, 64>>>(x.p, y.p);
  CHECK(cudaGetLastError());
  for (int i = 0; i < 64; i++) {
    float r = i % 3 ? 0 : 11;  // 0, 3, ... 30 and 33, ... 63
    for (int j = 0; j < 16; j++) r += x.p[i / 16 * 16 + j];
    EXPECT(y.p[i] == r);
  }
  printf("ok groups\n");
  CHECK(cudaMemsetAsync(y.p, 0, 4 * n + (bug == MEMSET_TOO_LONG ? 4 : 0), nullptr));
  CHECK(cudaMemcpyAsync(z.p, y.p, 4 * n, cudaMemcpyDeviceToDevice, nullptr));
  CHECK(cudaStreamSynchronize(nullptr));
  EXPECT(z.p[5] == 0);
  printf("ok memory\n");
  cudaEvent_t event;
  EXPECT(cudaEventCreate(&event) == cudaErrorNotSupported && strstr(cudaGetErrorString(cudaGetLastError()), "events"));
  EXPECT(cudaStreamBeginCapture(nullptr, cudaStreamCaptureModeGlobal) == cudaErrorNotSupported);
  EXPECT(cudaGetLastError() == cudaErrorNotSupported);
  printf("ok absent\n");
  calls<<<1, 32>>>(y.p, bug == BAD_ASSERT ? 5 : 4);
  CHECK(cudaGetLastError());
  for (int i = 0; i < 32; i++)
    EXPECT(y.p[i] == ((float(i) + 1) * i + 1) * i + 1 + (i % 3 == 0 ? 0 : i % 3 == 1 ? 1 : 3));
  printf("ok calls\n");
}
