// The simulated machine: instructions as decoded, kernels, warps, blocks and the memory's shadow.
#pragma once
#include <algorithm>
#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "ptxsim.h"

namespace ptxsim {

using std::string;
using std::vector;
using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using i32 = int32_t;
using i64 = int64_t;
using u128 = unsigned __int128;

struct Stop : std::runtime_error {  // ends a launch
  using std::runtime_error::runtime_error;
};
struct Unsupported : std::runtime_error {
  using std::runtime_error::runtime_error;
};

constexpr long KB = 1024;
struct Options {  // README.md says what each is
  long seed = 0, race = 1, init = 1, ulp = 0, quantum = 0, collide = 1, resident = 1, ledger = 0;
  long max_findings = 20, max_steps = 200000000, mma_bits = 0;
  long sms = 132, shared_limit = 227 * KB;
};
extern Options opt;
void finding(const string& key, const string& text);  // one for each key

// ---------------------------------------------------------------------------------------------------------------------
// Types

enum Ty : u8 {
  NONE,
  U8,
  S8,
  B8,
  U16,
  S16,
  B16,
  F16,
  BF16,
  U32,
  S32,
  B32,
  F32,
  F16X2,
  BF16X2,
  U64,
  S64,
  B64,
  F64,
  PRED,
  B128
};
inline int size_of(Ty t) {
  static const u8 sizes[] = {4, 1, 1, 1, 2, 2, 2, 2, 2, 4, 4, 4, 4, 4, 4, 8, 8, 8, 8, 4, 16};
  return sizes[t];
}
inline bool is_signed(Ty t) { return t == S8 || t == S16 || t == S32 || t == S64; }
inline bool is_float(Ty t) { return t == F16 || t == BF16 || t == F32 || t == F64; }
inline bool is_half_pair(Ty t) { return t == F16X2 || t == BF16X2; }

template <class To, class From>
To bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}
inline float half_to_float(u16 h) { return float(bits<_Float16>(h)); }
template <class F>
u16 float_to_half(F f) {
  const u16 h = bits<u16>(_Float16(f));
  return (h & 0x7fff) > 0x7c00 ? 0x7fff : h;
}
inline float bf_to_float(u16 h) { return bits<float>(u32(h) << 16); }
inline u16 float_to_bf(float f, bool toward_zero = false) {
  u32 u = bits<u32>(f);
  if ((u & 0x7fffffff) > 0x7f800000) return 0x7fff;
  if (!toward_zero) u += 0x7fff + (u >> 16 & 1);
  return u16(u >> 16);
}
struct Half {
  u16 v;
  Half() = default;
  Half(float f) : v(float_to_half(f)) {}
  operator float() const { return half_to_float(v); }
};
struct Bf {
  u16 v;
  Bf() = default;
  Bf(float f) : v(float_to_bf(f)) {}
  operator float() const { return bf_to_float(v); }
};

// ---------------------------------------------------------------------------------------------------------------------
// Code

struct Warp;
struct Cta;
struct Ins;
using Fn = void (*)(Warp&, const Ins&, u32 lanes);

struct Src {
  u32 off = 0;
  u8 size = 0;  // bytes per lane; 0: absent
  bool constant = false, pred = false, negated = false;
};
// What the scheduler has to do for an instruction. WSYNC: run once every lane of the mask in s[3] is there. POLL: a
// result of 0 ends the warp's turn.
enum Kind : u8 { PLAIN, BRA, BRX, RET, BAR, BAR_ARRIVE, WSYNC, CLUSTER_WAIT, POLL };
enum Space : u8 { GENERIC, GLOBAL, SHARED, LOCAL, PARAM, CONST };
// Of the ledger. FREE: what ptxas usually folds into others (moves, conversions of addresses, parameters).
enum Class : u8 {
  FREE,
  FP32,
  FP64,
  HALF2,
  MUFU,
  INTEGER,
  COMPARE,
  CONVERT,
  CONTROL,
  MEM_GLOBAL,
  MEM_SHARED,
  MEM_LOCAL,
  ATOMIC,
  SHUFFLE,
  BARRIER,
  MATRIX,
  CLASSES
};
extern const char* const class_names[CLASSES];

struct Ins {
  Fn fn = nullptr;
  Kind kind = PLAIN;
  Ty ty = NONE, ty2 = NONE;
  Space space = GENERIC;
  Class cls = FREE;
  u8 slots = 0;          // issue slots of a warp, estimated
  u8 vec = 1, mode = 0;  // mode: the instruction's own
  u8 round = 0;          // 0 nearest, 1 zero, 2 down, 3 up
  bool guarded = false, guard_negated = false, ftz = false, sat = false, nc = false, nan = false, relu = false;
  bool strong = false, releases = false;  // strong: a load or store that is not weak
  u32 guard = 0;
  Src d, d2, s[4];
  vector<Src> v;          // vector operand
  i64 imm = 0, imm2 = 0;  // address offsets
  int target = -1, line = 0, file = 0, file_line = 0;
  int from_file = 0, from_line = 0;  // where it was inlined
  vector<int> targets;
  string label;
  const char* name = "";
};
struct Variable {
  Space space = GLOBAL;
  u64 address = 0, size = 0;
  vector<u8> init;
};
struct Param {
  string name;
  u32 off, size;
};
enum Special {
  TIDX,
  TIDY,
  TIDZ,
  NTIDX,
  NTIDY,
  NTIDZ,
  CTAX,
  CTAY,
  CTAZ,
  NCTAX,
  NCTAY,
  NCTAZ,
  LANEID,
  WARPID,
  NWARPID,
  SMID,
  NSMID,
  MASK_EQ,
  MASK_LT,
  MASK_LE,
  MASK_GT,
  MASK_GE,
  CRANK,
  CSIZE,
  CLUSTERX,
  NCLUSTERX,
  ZERO,
  ONE,
  ENVREG1,
  ENVREG2,
  SPECIALS
};
struct Kernel {
  string name, error;  // error: why it can't run
  vector<Param> params;
  u32 param_bytes = 0, reg_bytes = 0;
  vector<Ins> code;
  vector<u8> constants;  // each 32 times
  u32 shared_static = 0, local_bytes = 0, dynamic_at = 0, max_threads = 0, exact_threads = 0, cluster = 1;
  vector<std::pair<u32, u32>> shared_vars;  // [begin, end)
  bool has_dynamic = false, vector_clocks = false;
  const std::map<int, string>* files = nullptr;
  u32 special[SPECIALS] = {};
  vector<u64> executed, lanes;  // of the last launch, for each instruction

  u32 shared_used() const {  // without the gaps
    u32 used = 0;
    for (auto [begin, end] : shared_vars) used += end - begin;
    return used;
  }
};
struct Module {
  std::map<string, Kernel> kernels;
  std::map<string, Variable> variables;
  std::map<int, string> files;
  vector<std::unique_ptr<vector<u8>>> storage;
};
void parse(const char* ptx, Module& m);

// ---------------------------------------------------------------------------------------------------------------------
// Memory

// Bits 56.. of a generic address tell its space.
constexpr u64 SHARED_BASE = 1ull << 56, LOCAL_BASE = 2ull << 56, PARAM_BASE = 3ull << 56;
constexpr u64 DYNAMIC_AT = 1u << 20;  // where the block's dynamic shared memory begins for the kernel

struct Shadow {           // of one byte
  u16 writer, read_warp;  // thread; warp, 0xffff: several
  u32 write_clock, read_mask, read_clock, read_barrier;
  u32 write_tag, read_tag;  // which block of which launch
  u16 write_block_clock, read_block_clock;
  int write_pc, read_pc;
  bool written, atomic, pending;  // pending: of an asynchronous copy that has not been waited for
};
struct Alloc {
  u64 base, size;
  string name;
  bool readonly, module;  // module: a __device__ or __constant__ variable
  vector<Shadow> shadow;
  vector<u8> touched;  // for the ledger: 1 read, 2 written
};
extern std::map<u64, Alloc> allocs;
bool add_alloc(void* base, u64 bytes, const string& name, bool readonly, bool module);
string unwritable(const void* at, u64 bytes);  // why, or nothing

struct Ledger {
  u64 blocks, threads, barriers, global_loads, global_stores, sectors, ideal_sectors, read, written;
  u64 unique_read, unique_written, shared_requests, wavefronts, ideal_wavefronts, mma_flops;
};
extern Ledger ledger;
string ledger_json();
void ledger_begin(Kernel& k);
void ledger_end();
void ledger_access(Space space, bool write, u32 bytes, u32 n, const u64* addresses);

// ---------------------------------------------------------------------------------------------------------------------
// Warps and blocks

enum GroupState : u8 { RUNS, AT_BARRIER, AT_WARP_OP, AT_CLUSTER };
struct Group {  // lanes of a warp at one place
  int pc;
  u32 mask;
  GroupState state;
  u32 barrier;
};
struct Copy {  // asynchronous, into shared memory or (bulk) out of it
  u8* to;
  const u8* from;
  u32 bytes, size;  // the rest up to size becomes 0
  Shadow* shadow;   // of the destination where that is shared memory
  u32 thread, clock;
  u64 mbarrier;
};
struct MBarrier {
  u32 count = 0, pending = 0, phase = 0;
  i64 tx = 0;
  vector<u32> arriving, completed;  // vector clocks: of the phase under way, of the last one
};
struct Acquired {  // a thread has synchronised with another block: with what that did up to its `block_clock`
  u16 block_clock;
  u32 thread, clock;
};
struct Named {  // bar.arrive
  u32 arrived = 0;
  vector<u32> clocks;
};
struct Warp {
  Cta* cta;
  int id;
  u8* regs;
  const u8* constants;
  vector<Group> groups;
  u32 alive, all, carry = 0;
  u32 seen[32][32];  // seen[t][u]: clock of lane u that lane t has synchronised with in this warp

  template <class T>
  T* D(const Src& s) const {
    return reinterpret_cast<T*>(regs + s.off);
  }
  const u8* at(const Src& s) const { return (s.constant ? constants : regs) + s.off; }
  template <class T>
  const T* S(const Src& s) const {
    return reinterpret_cast<const T*>(at(s));
  }
  u32 pred(const Src& s) const {
    const u32 m = *S<u32>(s);
    return s.negated ? ~m : m;
  }
  u64 raw(const Src& s, int lane) const {
    u64 x = 0;
    memcpy(&x, at(s) + lane * s.size, s.size);
    return x;
  }
  void set(const Src& s, int lane, u64 x) const { memcpy(regs + s.off + lane * s.size, &x, s.size); }
  void set_pred(const Src& s, u32 lanes, u32 values) const {
    u32* d = D<u32>(s);
    *d = (*d & ~lanes) | (values & lanes);
  }
};
struct Cta {
  Kernel* k;
  const u8* params;
  u32 grid[3], block[3], id[3], linear, threads, tag;
  vector<Warp> warps;
  vector<u8> regs, shared, local, shared_valid;
  vector<Shadow> shadow;
  vector<u32> clock, base;  // of each thread; base[u]: clock of u that every thread has synchronised with
  vector<u32> known_by;     // [t][u]: clock of u that t knows by mbarriers and partial barriers (vector_clocks only)
  std::unordered_map<const Shadow*, vector<std::pair<u32, u32>>> readers;  // thread, clock (vector_clocks only)
  u32 barriers = 0;
  vector<vector<vector<Copy>>> async;  // of each thread: groups of cp.async copies, the last one open
  vector<Copy> bulk;                   // that wait for their mbarrier
  std::map<u64, MBarrier> mbarriers;
  std::map<u32, Named> named;
  std::mt19937 rng;
  std::map<u32, vector<Acquired>> acquired;  // of other blocks
  std::map<u32, vector<u32>> heard;          // of other blocks' threads, to pass on (vector_clocks only)
  u16 block_clock = 1;
  vector<u8> fenced;        // of each thread: a fence since its last global write
  vector<u32> fence_clock;  // of each thread: its clock at its last fence
  vector<Cta>* cluster = nullptr;
  u32 rank = 0, arrived = 0;
  bool ended = false, polled = false;
  u64 steps = 0;

  void acquire(u32 tag, Acquired a) {
    vector<Acquired>& all = acquired[tag];
    if (all.empty()) all.push_back({0, 0, 0});  // the first: what every thread knows
    all.push_back(a);
    const size_t most = 32;  // the oldest beyond that count as known to all: a race may be missed, none is made up
    for (size_t q = 1; q < all.size();) {
      if (all[q].clock > base[all[q].thread] && all.size() <= most) {
        q++;
        continue;
      }
      all[0].block_clock = std::max(all[0].block_clock, all[q].block_clock);
      all.erase(all.begin() + q);
    }
  }
  void learn(u32 t, const vector<u32>& clocks) {  // thread t synchronises with those
    for (u32 u = 0; u < clocks.size(); u++) {
      u32& k = known_by[size_t(t) * clock.size() + u];
      k = std::max(k, clocks[u]);
    }
  }
  void teach(u32 t, vector<u32>& clocks) {  // what thread t did so far
    clocks.resize(clock.size());
    for (u32 u = 0; u < clocks.size(); u++)
      clocks[u] = std::max({clocks[u], known_by[size_t(t) * clock.size() + u], base[u]});
    clocks[t] = clock[t];
  }
};

string where(const Kernel& k, const Ins& i);
string who(const Warp& w, int lane);
void begin_launch_memory();
void launch(Module& m, const string& entry, const PtxLaunch& shape, void** args);

#define LANES(...)                       \
  if (m == ~0u) {                        \
    for (int l = 0; l < 32; l++) {       \
      __VA_ARGS__                        \
    }                                    \
  } else {                               \
    for (u32 mm = m; mm; mm &= mm - 1) { \
      const int l = __builtin_ctz(mm);   \
      __VA_ARGS__                        \
    }                                    \
  }

// An instruction's functions, by the file they are in. Each returns nullptr for what is not its own.
using Suffixes = vector<string>;
Fn alu_function(Ins& i, const Suffixes& p);
void begin_jitter();  // a launch's jitter depends on the seed alone
void do_ld(Warp&, const Ins&, u32), do_st(Warp&, const Ins&, u32), do_cp_async(Warp&, const Ins&, u32);
void do_cp_commit(Warp&, const Ins&, u32), do_cp_wait(Warp&, const Ins&, u32), do_bulk(Warp&, const Ins&, u32);
void do_mbarrier(Warp&, const Ins&, u32), do_fence(Warp&, const Ins&, u32), do_mapa(Warp&, const Ins&, u32);
void do_isspacep(Warp&, const Ins&, u32), do_cvta(Warp&, const Ins&, u32), do_nop(Warp&, const Ins&, u32);
void do_cluster_arrive(Warp&, const Ins&, u32), do_trap(Warp&, const Ins&, u32), do_assert(Warp&, const Ins&, u32);
Fn atomic_function(Ty ty);
void do_shfl(Warp&, const Ins&, u32), do_vote(Warp&, const Ins&, u32), do_match(Warp&, const Ins&, u32);
void do_syncwarp(Warp&, const Ins&, u32), do_activemask(Warp&, const Ins&, u32);
void do_redux_signed(Warp&, const Ins&, u32), do_redux_unsigned(Warp&, const Ins&, u32);
void do_mma(Warp&, const Ins&, u32), do_movmatrix(Warp&, const Ins&, u32), do_ldmatrix(Warp&, const Ins&, u32),
    do_stmatrix(Warp&, const Ins&, u32);
enum MBarrierOp : u8 {
  MB_INIT,
  MB_INVAL,
  MB_ARRIVE,
  MB_ARRIVE_EXPECT,
  MB_EXPECT,
  MB_COMPLETE,
  MB_WAIT,
  MB_WAIT_PARITY,
  MB_CP_ASYNC
};

u8* resolve(Warp& w, const Ins& i, int lane, Space space, u64 addr, u32 bytes, bool write, bool atomic = false,
            const u8* value = nullptr);
inline u64 address(const Warp& w, const Ins& i, int lane, const Src& base) {
  return u64(i.imm) + (base.size ? w.raw(base, lane) : 0);
}

}  // namespace ptxsim

struct PtxModule : ptxsim::Module {};
