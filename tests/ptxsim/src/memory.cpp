// Loads, stores, atomics and asynchronous copies, with their checks: bounds, alignment, initialisation and races.
#include "machine.h"

namespace ptxsim {

std::map<u64, Alloc> allocs;
namespace {
Alloc* last_alloc;
// Of the launch: what came before the releases at a word, in other blocks and (vector_clocks only) by the threads of
// each.
struct Released {
  std::map<u32, u16> blocks;
  std::map<u32, vector<u32>> threads;
};
std::map<u64, Released> released;

bool ordered(const Cta& c, const Warp& w, int lane, u32 other, u32 clock) {
  const u32 t = w.id * 32 + lane;
  return other == t || clock <= c.base[other] || (other / 32 == u32(w.id) && clock <= w.seen[lane][other % 32]) ||
         (c.k->vector_clocks && clock <= c.known_by[size_t(t) * c.clock.size() + other]);
}
// Up to which of its block clocks another block's work is known to a thread.
u16 known(const Cta& c, const Warp& w, int lane, u32 tag) {
  const auto it = c.acquired.find(tag);
  u16 most = 0;
  if (it != c.acquired.end())
    for (const Acquired& a : it->second)
      if (ordered(c, w, lane, a.thread, a.clock)) most = std::max(most, a.block_clock);
  return most;
}

struct Access {
  Cta& c;
  Warp& w;
  const Ins& i;
  int lane;
  bool write, atomic;
  const char* space;
};
void race(const Access& a, u64 at, const string& after, int other_pc) {
  std::ostringstream m, key;
  key << "race" << &a.i << "/" << other_pc << a.write;
  m << "RACE in " << a.space << " memory: " << (a.write ? "write" : "read") << " by " << who(a.w, a.lane) << " at "
    << where(*a.c.k, a.i) << ", byte " << at << ", not ordered after " << after << " at "
    << where(*a.c.k, a.c.k->code[other_pc]);
  finding(key.str(), m.str());
}
// value: what a store writes, over `now`
void shadow_access(const Access& a, Shadow* shadow, u32 bytes, u64 at, const u8* now, const u8* value) {
  Cta& c = a.c;
  const u32 t = a.w.id * 32 + a.lane;
  const int pc = int(&a.i - c.k->code.data());
  const bool precise = c.k->vector_clocks;
  for (u32 b = 0; b < bytes; b++) {
    Shadow& s = shadow[b];
    const auto elsewhere = [&](u32 tag, u16 clock) {  // another block of this launch, not synchronised with
      return tag && tag != c.tag && tag >> 20 == c.tag >> 20 && clock > known(c, a.w, a.lane, tag);
    };
    const bool other_wrote = elsewhere(s.write_tag, s.write_block_clock);
    const bool wrote = s.write_tag == c.tag && !ordered(c, a.w, a.lane, s.writer, s.write_clock);
    // lanes of one store that write the same value to one address, as Triton's reductions do
    const bool same = value && s.write_tag == c.tag && s.writer / 32 == a.w.id && s.write_pc == pc &&
                      (!opt.collide || now[b] == value[b]);
    if ((wrote || other_wrote) && !same && !(a.atomic && s.atomic))
      race(a, at + b,
           string("the write by ") + (other_wrote ? "another block's " : "") + "thread " + std::to_string(s.writer),
           s.write_pc);
    if (a.write && !a.atomic) {
      const bool other_read = elsewhere(s.read_tag, s.read_block_clock);
      bool read = other_read;
      if (precise) {
        auto it = c.readers.find(&s);
        if (it != c.readers.end())
          for (auto [u, clock] : it->second) read |= !ordered(c, a.w, a.lane, u, clock);
      } else if (s.read_tag == c.tag && s.read_barrier == c.barriers) {
        if (s.read_warp != a.w.id) read = true;  // 0xffff included
        for (u32 mm = s.read_mask & ~(1u << a.lane); mm && !read; mm &= mm - 1)
          read = s.read_clock > a.w.seen[a.lane][__builtin_ctz(mm)];
      }
      if (read) race(a, at + b, other_read ? "a read by another block" : "a read", s.read_pc);
    }
    if (a.write) {
      s.write_tag = c.tag, s.writer = u16(t), s.write_clock = c.clock[t], s.write_pc = pc;
      s.written = true, s.atomic = a.atomic, s.write_block_clock = c.block_clock;
      if (precise) c.readers.erase(&s);
    } else if (!a.atomic) {
      if (precise) {
        auto& readers = c.readers[&s];
        auto it = std::find_if(readers.begin(), readers.end(), [&](auto& r) { return r.first == t; });
        if (it == readers.end())
          readers.push_back({t, c.clock[t]});
        else
          it->second = c.clock[t];
      }
      if (s.read_tag != c.tag || s.read_barrier != c.barriers)
        s.read_warp = u16(a.w.id), s.read_mask = 1u << a.lane, s.read_clock = c.clock[t];
      else if (s.read_warp != a.w.id)
        s.read_warp = 0xffff;
      else
        s.read_mask |= 1u << a.lane, s.read_clock = std::max(s.read_clock, c.clock[t]);
      s.read_tag = c.tag, s.read_barrier = c.barriers, s.read_pc = pc, s.read_block_clock = c.block_clock;
    }
  }
}

[[noreturn]] void bad_access(const Warp& w, const Ins& i, int lane, const string& what, u64 addr, u64 bytes,
                             const string& more = "") {
  std::ostringstream s;
  s << what << ": " << bytes << " bytes at 0x" << std::hex << addr << std::dec << " by " << who(w, lane) << " at "
    << where(*w.cta->k, i) << more;
  throw Stop(s.str());
}
Alloc* find_alloc(u64 addr) {
  if (last_alloc && addr - last_alloc->base < last_alloc->size) return last_alloc;
  auto it = allocs.upper_bound(addr);
  if (it == allocs.begin()) return nullptr;
  --it;
  if (addr - it->second.base >= it->second.size) return nullptr;
  return last_alloc = &it->second;
}
string nearest(u64 addr) {
  auto it = allocs.upper_bound(addr);
  if (it == allocs.begin()) return "; below every registered range";
  --it;
  std::ostringstream s;
  s << "; " << addr - it->second.base << " bytes into '" << it->second.name << "' of " << it->second.size << " bytes";
  return s.str();
}
void strip_space(Space& space, u64& addr) {
  if (space != GENERIC) return;
  const int top = int(addr >> 56);
  space = top == 1 ? SHARED : top == 2 ? LOCAL : top == 3 ? PARAM : GLOBAL;
  if (space != GLOBAL) addr &= SHARED_BASE - 1;
}
// Which block of the cluster a shared address is of, and where it is there.
Cta& shared_owner(Warp& w, const Ins& i, int lane, u64& addr) {
  Cta& c = *w.cta;
  Cta* owner = &c;
  addr &= 0xffffffffu;
  if (addr >> 24) {
    const u32 rank = u32(addr >> 24) - 1;
    if (rank != c.rank || c.cluster) {
      if (!c.cluster || rank >= c.cluster->size())
        bad_access(w, i, lane, "DISTRIBUTED SHARED memory of a block that is not there", addr, 1);
      owner = &(*c.cluster)[rank];
      if (owner->ended) bad_access(w, i, lane, "DISTRIBUTED SHARED memory of a block that has ended", addr, 1);
    }
    addr &= 0xffffff;
  }
  if (addr >= DYNAMIC_AT) addr = addr - DYNAMIC_AT + c.k->dynamic_at;
  return *owner;
}
void merge(vector<u32>& into, const vector<u32>& clocks) {
  into.resize(clocks.size());
  for (size_t u = 0; u < clocks.size(); u++) into[u] = std::max(into[u], clocks[u]);
}
// A synchronising access of a global or shared word. A fence releases what came before it: to the thread's own block by
// its clock then, to others only if it has written nothing since.
void synchronise(Warp& w, const Ins& i, int lane, const void* word, bool acquire, bool release) {
  Cta& c = *w.cta;
  const u32 t = w.id * 32 + lane;
  Space space = i.space;
  u64 at = address(w, i, lane, i.s[0]);
  strip_space(space, at);
  const bool global = space == GLOBAL;  // shared memory is the next block's afterwards
  Released& there = released[u64(word)];
  if (acquire) {
    for (auto& [b, k] : there.blocks)
      if (b != c.tag && k > known(c, w, lane, b)) c.acquire(b, {k, t, c.clock[t]});
    if (c.k->vector_clocks)
      for (auto& [b, clocks] : there.threads) {
        if (b == c.tag)
          c.learn(t, clocks);
        else if (global)
          merge(c.heard[b], clocks);
      }
  }
  if (!release) return;
  if (global && (i.releases || c.fenced[t])) {
    for (auto& [b, a] : c.acquired) there.blocks[b] = std::max(there.blocks[b], known(c, w, lane, b));
    there.blocks[c.tag] = c.block_clock++;
    if (!c.block_clock) throw Unsupported("UNSUPPORTED: more than 65535 releases by one block");
  }
  if (c.k->vector_clocks && (i.releases || c.fence_clock[t])) {
    for (auto& [b, clocks] : c.heard)
      if (global) merge(there.threads[b], clocks);
    vector<u32> mine;
    c.teach(t, mine);
    if (!i.releases) mine[t] = c.fence_clock[t];
    merge(there.threads[c.tag], mine);
    c.clock[t]++;
  }
}
}  // namespace

bool add_alloc(void* base, u64 bytes, const string& name, bool readonly, bool module) {
  last_alloc = nullptr;
  const u64 at = u64(base);
  if (!bytes) return true;
  auto next = allocs.upper_bound(at);
  if (next != allocs.end() && next->first < at + bytes) return false;
  if (next != allocs.begin()) {
    Alloc& before = std::prev(next)->second;
    if (before.base == at) {
      before.size = std::max(before.size, bytes), before.readonly &= readonly;
      before.shadow.clear(), before.touched.clear();
      return true;
    }
    if (before.base + before.size > at) return false;
  }
  allocs[at] = Alloc{at, bytes, name, readonly, module, {}, {}};
  return true;
}
string unwritable(const void* at, u64 bytes) {
  const Alloc* a = find_alloc(u64(at));
  if (!bytes) return "";
  if (!a || u64(at) + bytes > a->base + a->size)
    return "OUT OF BOUNDS: " + std::to_string(bytes) + " bytes" + nearest(u64(at));
  return a->readonly ? "WRITE TO READ-ONLY '" + a->name + "'" : "";
}
void begin_launch_memory() {
  released.clear();
  last_alloc = nullptr;
}

u8* resolve(Warp& w, const Ins& i, int lane, Space space, u64 addr, u32 bytes, bool write, bool atomic,
            const u8* value) {
  Cta& c = *w.cta;
  strip_space(space, addr);
  Cta& owner = space == SHARED ? shared_owner(w, i, lane, addr) : c;
  static const char* const names[] = {"", "global", "shared", "local", "parameter", "constant"};
  const char* verb = write ? " write" : " read";
  if (addr & (bytes - 1)) bad_access(w, i, lane, string("MISALIGNED ") + names[space] + verb, addr, bytes);
  const Access access{c, w, i, lane, write, atomic, space == SHARED ? "shared" : "global"};
  switch (space) {
    case SHARED: {
      if (addr + bytes > owner.shared.size() || !owner.shared_valid[addr] || !owner.shared_valid[addr + bytes - 1])
        bad_access(w, i, lane, string("OUT OF BOUNDS shared") + verb, addr, bytes,
                   "; the block has " + std::to_string(owner.shared.size()) +
                       " bytes of shared memory, gaps between variables included");
      Shadow* s = &owner.shadow[addr];
      const auto report = [&](const char* what) {
        finding(what + std::to_string(i.line),
                string(what) + " by " + who(w, lane) + " at " + where(*c.k, i) + ", byte " + std::to_string(addr));
      };
      if (s->pending) report("ACCESS of shared bytes whose asynchronous copy has not been waited for,");
      if (!write && opt.init && !std::all_of(s, s + bytes, [](const Shadow& x) { return x.written; }))
        report("UNINITIALISED shared read");
      if (opt.race)
        shadow_access(access, s, bytes, addr, &owner.shared[addr], value);
      else if (write)
        for (u32 b = 0; b < bytes; b++) s[b].written = true;
      return &owner.shared[addr];
    }
    case LOCAL:
      if (addr + bytes > c.k->local_bytes) bad_access(w, i, lane, "OUT OF BOUNDS local access", addr, bytes);
      return &c.local[size_t(w.id * 32 + lane) * c.k->local_bytes + addr];
    case PARAM:
      if (addr + bytes > c.k->param_bytes) bad_access(w, i, lane, "OUT OF BOUNDS parameter read", addr, bytes);
      return const_cast<u8*>(c.params) + addr;
    default:
      break;
  }
  Alloc* a = find_alloc(addr);
  if (!a || addr + bytes > a->base + a->size)
    bad_access(w, i, lane, string("OUT OF BOUNDS global") + verb, addr, bytes, nearest(addr));
  if (write && a->readonly) bad_access(w, i, lane, "WRITE TO READ-ONLY '" + a->name + "'", addr, bytes);
  if (write && !atomic) c.fenced[w.id * 32 + lane] = 0;
  const u64 at = addr - a->base;
  if (opt.ledger) {
    if (a->touched.empty()) a->touched.resize(a->size);
    for (u32 b = 0; b < bytes; b++) a->touched[at + b] |= write ? 2 : 1;
  }
  if (opt.race) {
    if (a->shadow.empty()) a->shadow.resize(a->size, Shadow{});
    Shadow* s = &a->shadow[at];
    if (i.nc && s->written && s->write_tag >> 20 == c.tag >> 20)
      finding("nc" + std::to_string(i.line),
              "NON-COHERENT read (ld.global.nc, __ldg) of bytes that this launch wrote, "
              "by " +
                  who(w, lane) + " at " + where(*c.k, i));
    shadow_access(access, s, bytes, at, reinterpret_cast<u8*>(addr), value);
  }
  return reinterpret_cast<u8*>(addr);
}

// ---------------------------------------------------------------------------------------------------------------------
// Loads, stores, atomics

namespace {
void count_access(Warp& w, const Ins& i, u32 m, u32 bytes, bool write) {
  u64 addresses[32];
  u32 n = 0;
  Space space = i.space;
  for (u32 mm = m; mm; mm &= mm - 1) {
    Space s = i.space;
    addresses[n] = address(w, i, __builtin_ctz(mm), i.s[0]);
    strip_space(s, addresses[n++]);
    space = s;
  }
  ledger_access(space, write, bytes, n, addresses);
}
}  // namespace

void do_ld(Warp& w, const Ins& i, u32 m) {
  const u32 each = size_of(i.ty), bytes = each * i.vec;
  if (opt.ledger && i.space != PARAM) count_access(w, i, m, bytes, false);
  for (u32 mm = m; mm; mm &= mm - 1) {
    const int l = __builtin_ctz(mm);
    const u8* p = resolve(w, i, l, i.space, address(w, i, l, i.s[0]), bytes, false, i.strong);
    if (i.strong) synchronise(w, i, l, p, true, false);
    for (int e = 0; e < i.vec; e++) {
      const Src& d = i.v[e];
      if (!d.size) continue;
      u8* to = w.regs + d.off + l * d.size;
      if (each == 16) {
        memcpy(to, p, 16);
        continue;
      }
      u64 x = 0;
      memcpy(&x, p + e * each, each);
      if (is_signed(i.ty) && each < 8) x = u64(i64(x << (64 - 8 * each)) >> (64 - 8 * each));
      memcpy(to, &x, d.size);
    }
  }
}
void do_st(Warp& w, const Ins& i, u32 m) {
  const u32 each = size_of(i.ty), bytes = each * i.vec;
  if (opt.ledger) count_access(w, i, m, bytes, true);
  for (u32 mm = m; mm; mm &= mm - 1) {
    const int l = __builtin_ctz(mm);
    u8 value[64];
    for (int e = 0; e < i.vec; e++) memcpy(value + e * each, w.at(i.v[e]) + l * i.v[e].size, each);
    u8* p = resolve(w, i, l, i.space, address(w, i, l, i.s[0]), bytes, true, i.strong, value);
    if (i.strong) synchronise(w, i, l, p, false, true);
    memcpy(p, value, bytes);
  }
}
namespace {
enum { ADD, MIN, MAX, EXCH, CAS, AND, OR, XOR, INC, DEC };
template <class T>
T atomic_op(int mode, T old, T x, T y) {
  switch (mode) {
    case ADD:
      return T(old + x);
    case MIN:
      return std::min(old, x);
    case MAX:
      return std::max(old, x);
    case EXCH:
      return x;
    case CAS:
      return old == x ? y : old;
    default:
      break;
  }
  if constexpr (std::is_integral_v<T>) switch (mode) {
      case AND:
        return old & x;
      case OR:
        return old | x;
      case XOR:
        return old ^ x;
      case INC:
        return old >= x ? 0 : old + 1;
      case DEC:
        return old == 0 || old > x ? x : old - 1;
    }
  throw Unsupported("this atomic operation");
}
template <class H>
struct Pair {
  H x, y;
};
template <class T>
void do_atom(Warp& w, const Ins& i, u32 m) {
  constexpr bool pair = std::is_same_v<T, Pair<Half>> || std::is_same_v<T, Pair<Bf>>;
  if (opt.ledger) count_access(w, i, m, sizeof(T), true);
  for (u32 mm = m; mm; mm &= mm - 1) {
    const int l = __builtin_ctz(mm);
    T* p = reinterpret_cast<T*>(resolve(w, i, l, i.space, address(w, i, l, i.s[0]), sizeof(T), true, true));
    const T x = w.S<T>(i.s[1])[l], y = i.s[2].size ? w.S<T>(i.s[2])[l] : T(), old = *p;
    if constexpr (pair)
      *p = T{decltype(old.x)(old.x + x.x), decltype(old.x)(old.y + x.y)};
    else
      *p = atomic_op<T>(i.mode, old, x, y);
    synchronise(w, i, l, p, true, true);
    if (i.d.size) w.D<T>(i.d)[l] = old;
  }
}
}  // namespace
Fn atomic_function(Ty ty) {
  switch (ty) {
    case U32:
    case B32:
      return do_atom<u32>;
    case S32:
      return do_atom<i32>;
    case U64:
    case B64:
      return do_atom<u64>;
    case S64:
      return do_atom<i64>;
    case F32:
      return do_atom<float>;
    case F64:
      return do_atom<double>;
    case B16:
    case U16:
      return do_atom<u16>;
    case F16:
      return do_atom<Half>;
    case BF16:
      return do_atom<Bf>;
    case F16X2:
      return do_atom<Pair<Half>>;
    case BF16X2:
      return do_atom<Pair<Bf>>;
    default:
      return nullptr;
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Asynchronous copies. A destination holds NaN and is `pending` until its copy has been waited for.

namespace {
void finish(Cta& c, const Copy& copy, u32 clock) {
  memset(copy.to, 0, copy.size);
  if (copy.bytes) memcpy(copy.to, copy.from, copy.bytes);
  for (u32 b = 0; copy.shadow && b < copy.size; b++) {
    copy.shadow[b].pending = false;
    copy.shadow[b].write_clock = clock;
    copy.shadow[b].write_tag = c.tag;
  }
}
void finish_groups(Warp& w, int lane, size_t keep) {
  Cta& c = *w.cta;
  const u32 t = w.id * 32 + lane;
  auto& groups = c.async[t];  // the last one has not been committed
  while (groups.size() > keep + 1) {
    for (const Copy& copy : groups.front()) finish(c, copy, c.clock[t]);
    groups.erase(groups.begin());
  }
}
Copy begin_copy(Warp& w, const Ins& i, int l, u64 shared, u64 global, u32 size, u32 bytes, u32 step) {
  Cta& c = *w.cta;
  const u8* from = nullptr;
  u8* to = nullptr;
  for (u32 at = 0; at < size; at += step) {
    if (at < bytes) {
      u8* p = nullptr;
      const u32 n = std::min(step, bytes - at);
      for (u32 b = 0; b < n; b += n & (n - 1) ? 1 : n) {
        u8* q = resolve(w, i, l, GLOBAL, global + at + b, n & (n - 1) ? 1 : n, false);
        p = b ? p : q;
      }
      from = at ? from : p;
    }
    u8* p = resolve(w, i, l, SHARED, shared + at, step, true);
    to = at ? to : p;
  }
  u64 place = shared;
  Cta& owner = shared_owner(w, i, l, place);
  Shadow* shadow = &owner.shadow[place];
  memset(to, 0xff, size);
  for (u32 b = 0; b < size; b++) shadow[b].pending = true;
  return {to, from, bytes, size, shadow, u32(w.id * 32 + l), c.clock[w.id * 32 + l], 0};
}
}  // namespace

void do_cp_async(Warp& w, const Ins& i, u32 m) {  // s0 shared, s1 global, vec: bytes, s2: how many to read
  if (opt.ledger) {
    u64 from[32], to[32];
    u32 n = 0;
    for (u32 mm = m; mm; mm &= mm - 1, n++) {
      from[n] = w.raw(i.s[1], __builtin_ctz(mm)) + i.imm2;
      to[n] = address(w, i, __builtin_ctz(mm), i.s[0]);
    }
    ledger_access(GLOBAL, false, i.vec, n, from);
    ledger_access(SHARED, true, i.vec, n, to);
  }
  for (u32 mm = m; mm; mm &= mm - 1) {
    const int l = __builtin_ctz(mm);
    const u32 size = i.vec, bytes = i.s[2].size ? std::min(size, u32(w.raw(i.s[2], l))) : size;
    const u64 shared = address(w, i, l, i.s[0]), global = w.raw(i.s[1], l) + i.imm2;
    if (shared % size || global % size)
      bad_access(w, i, l, "MISALIGNED cp.async", shared % size ? shared : global, size);
    w.cta->async[w.id * 32 + l].back().push_back(begin_copy(w, i, l, shared, global, size, bytes, size));
  }
}
void do_cp_commit(Warp& w, const Ins&, u32 m) { LANES(w.cta->async[w.id * 32 + l].emplace_back();) }
void do_cp_wait(Warp& w, const Ins& i, u32 m) {  // mode: all of them
  LANES(if (i.mode) w.cta->async[w.id * 32 + l].emplace_back(); finish_groups(w, l, i.mode ? 0 : size_t(i.imm));)
}

namespace {
MBarrier& mbarrier_at(Warp& w, const Ins& i, int l, u64 at) {
  auto it = w.cta->mbarriers.find(at);
  if (it == w.cta->mbarriers.end()) bad_access(w, i, l, "MBARRIER that has not been initialised", at, 8);
  return it->second;
}
u64 mbarrier_address(Warp& w, const Ins& i, int l, u64 at) {
  Space space = i.space == GENERIC ? GENERIC : SHARED;
  strip_space(space, at);
  if (space != SHARED) bad_access(w, i, l, "MBARRIER outside shared memory", at, 8);
  if (&shared_owner(w, i, l, at) != w.cta) throw Unsupported("mbarrier of another block of the cluster");
  if (at % 8 || at + 8 > w.cta->shared.size()) bad_access(w, i, l, "MBARRIER misaligned or out of bounds", at, 8);
  return at;
}
void settle(MBarrier& b) {
  if (b.pending || b.tx) return;
  b.completed = b.arriving;
  b.pending = b.count;
  b.phase++;
}
void arrive(Warp& w, const Ins& i, int l, MBarrier& b, u32 n, bool add = false) {
  Cta& c = *w.cta;
  if (add) b.pending += n;
  if (n > b.pending) throw Stop("MBARRIER: more arrivals than its count, by " + who(w, l) + " at " + where(*c.k, i));
  c.teach(w.id * 32 + l, b.arriving);
  c.clock[w.id * 32 + l]++;
  b.pending -= n;
  settle(b);
}
}  // namespace
void do_mbarrier(Warp& w, const Ins& i, u32 m) {
  Cta& c = *w.cta;
  for (u32 mm = m; mm; mm &= mm - 1) {
    const int l = __builtin_ctz(mm);
    const u32 t = w.id * 32 + l;
    const u64 at = mbarrier_address(w, i, l, address(w, i, l, i.s[0]));
    if (i.mode == MB_INIT) {
      MBarrier& b = c.mbarriers[at] = MBarrier{};
      b.count = b.pending = u32(w.raw(i.s[1], l));
      for (u32 k = 0; k < 8; k++) c.shadow[at + k].written = true;
      continue;
    }
    MBarrier& b = mbarrier_at(w, i, l, at);
    const u32 phase = b.phase;
    switch (i.mode) {
      case MB_INVAL:
        c.mbarriers.erase(at);
        continue;
      case MB_EXPECT:
        b.tx += i64(w.raw(i.s[1], l));
        continue;
      case MB_COMPLETE:
        b.tx -= i64(w.raw(i.s[1], l)), settle(b);
        continue;
      case MB_ARRIVE_EXPECT:
        b.tx += i64(w.raw(i.s[1], l)), arrive(w, i, l, b, 1);
        break;
      case MB_ARRIVE:
        arrive(w, i, l, b, i.s[1].size ? u32(w.raw(i.s[1], l)) : 1);
        break;
      case MB_CP_ASYNC:
        c.async[t].emplace_back();
        finish_groups(w, l, 0);
        arrive(w, i, l, b, 1, !i.nc);
        continue;
      default: {  // waits
        for (size_t q = 0; q < c.bulk.size();) {
          Copy& copy = c.bulk[q];
          if (copy.mbarrier != at) {
            q++;
            continue;
          }
          finish(c, copy, copy.clock);
          b.arriving.resize(c.clock.size());
          b.arriving[copy.thread] = std::max(b.arriving[copy.thread], copy.clock);
          b.tx -= copy.size;
          c.bulk.erase(c.bulk.begin() + q);
          settle(b);
        }
        const u64 state = w.raw(i.s[1], l);
        const bool done = i.mode == MB_WAIT_PARITY ? (b.phase & 1) != (state & 1) : b.phase != u32(state);
        if (done) c.learn(t, b.completed);
        w.set_pred(i.d, 1u << l, done ? ~0u : 0);
        c.polled |= !done;
        continue;
      }
    }
    if (i.d.size) w.set(i.d, l, phase);
  }
}
void do_bulk(Warp& w, const Ins& i, u32 m) {  // mode 0: global to shared, 1: shared to global; s0 to, s1 from, s2 size
  Cta& c = *w.cta;
  for (u32 mm = m; mm; mm &= mm - 1) {
    const int l = __builtin_ctz(mm);
    const u64 to = address(w, i, l, i.s[0]), from = w.raw(i.s[1], l) + i.imm2;
    const u32 size = u32(w.raw(i.s[2], l)), t = w.id * 32 + l;
    if (size % 16 || to % 16 || from % 16) bad_access(w, i, l, "MISALIGNED cp.async.bulk", to % 16 ? to : from, size);
    if (opt.ledger)
      for (u32 b = 0; b < size; b += 512) {
        u64 addresses[32];
        const u32 n = std::min(32u, (size - b) / 16);
        for (u32 k = 0; k < n; k++) addresses[k] = (i.mode ? to : from) + b + 16 * k;
        ledger_access(GLOBAL, i.mode, 16, n, addresses);
      }
    if (i.mode == 1) {
      for (u32 b = 0; b < size; b += 16) {
        const u8* p = resolve(w, i, l, SHARED, from + b, 16, false);
        memcpy(resolve(w, i, l, GLOBAL, to + b, 16, true), p, 16);
      }
      continue;
    }
    const u64 at = mbarrier_address(w, i, l, w.raw(i.s[3], l));
    mbarrier_at(w, i, l, at);
    Copy copy = begin_copy(w, i, l, to, from, size, size, 16);
    copy.mbarrier = at;
    c.clock[t]++;
    c.bulk.push_back(copy);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Fences and addresses

void do_nop(Warp&, const Ins&, u32) {}
void do_fence(Warp& w, const Ins&, u32 m) {
  Cta& c = *w.cta;
  LANES(const u32 t = w.id * 32 + l; c.fenced[t] = 1; c.fence_clock[t] = c.clock[t]++;)
}
void do_cluster_arrive(Warp& w, const Ins&, u32 m) { w.cta->arrived += __builtin_popcount(m); }
void do_mapa(Warp& w, const Ins& i, u32 m) {
  LANES(w.set(i.d, l, (w.raw(i.s[0], l) & ~0xff000000ull) | (w.raw(i.s[1], l) + 1) << 24);)
}
void do_cvta(Warp& w, const Ins& i, u32 m) { LANES(w.set(i.d, l, w.raw(i.s[0], l) + u64(i.imm));) }
void do_isspacep(Warp& w, const Ins& i, u32 m) {
  u32 r = 0;
  LANES(Space s = GENERIC; u64 a = w.raw(i.s[0], l); strip_space(s, a); r |= u32(s == i.space) << l;)
  w.set_pred(i.d, m, r);
}
void do_trap(Warp& w, const Ins& i, u32 m) {
  throw Stop("TRAP by " + who(w, __builtin_ctz(m)) + " at " + where(*w.cta->k, i));
}
void do_assert(Warp& w, const Ins& i, u32 m) {  // v: the arguments of __assertfail, in local memory
  const int l = __builtin_ctz(m);
  const auto argument = [&](int n) {
    u64 x = 0;
    memcpy(&x, resolve(w, i, l, LOCAL, w.raw(i.v[n], l), 8, false), 8);
    return x;
  };
  const char* text = i.v.empty() ? "" : reinterpret_cast<const char*>(argument(0));
  throw Stop(string("ASSERTION FAILED: ") + (text && find_alloc(u64(text)) ? text : "?") + ", by " + who(w, l) +
             " at " + where(*w.cta->k, i));
}

}  // namespace ptxsim
