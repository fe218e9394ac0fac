// The scheduler: warps of a block, blocks of a launch.
#include "machine.h"

namespace ptxsim {
namespace {

struct GridWorkspace {  // what cooperative groups' grid.sync() uses, at envreg1:2
  u32 size = 8, barrier = 0;
};

class Runner {
 public:
  Runner(Kernel& k, Cta& c) : k_(k), c_(c), code_(k.code) {}

  string stuck() const {
    static const char* const why[] = {" at ", " wait at a barrier ", " wait at a warp-wide instruction ",
                                      " wait for the cluster "};
    std::ostringstream s;
    for (const Warp& w : c_.warps)
      for (const Group& g : w.groups)
        s << "; block " << c_.linear << " warp " << w.id << " lanes 0x" << std::hex << g.mask << std::dec
          << why[g.state] << where(k_, code_[g.pc]);
    return s.str();
  }
  enum End { DONE, BLOCKED, YIELD };
  // until every thread has ended, waits for the cluster, or other resident blocks should have a turn
  End run(bool others) {
    vector<int> order(c_.warps.size());
    for (;;) {
      for (size_t q = 0; q < order.size(); q++) order[q] = int(q);
      if (opt.seed) std::shuffle(order.begin(), order.end(), c_.rng);
      const u64 before = c_.steps;
      c_.polled = false;
      bool progress = false;
      for (int q : order) progress |= run_warp(c_.warps[q], others && !opt.quantum ? 64 : u64(opt.quantum));
      bool left = false, runnable = false, cluster = false;
      for (Warp& w : c_.warps)
        for (auto& g : w.groups) left = true, runnable |= g.state == RUNS, cluster |= g.state == AT_CLUSTER;
      if (!left) {
        c_.ended = true;
        return DONE;
      }
      if (release_barriers() || runnable) {
        idle_ = progress && c_.polled && c_.steps - before < 64 * c_.warps.size() ? idle_ + 1 : 0;
        if (idle_ > 10000) throw Stop("HANG: no thread completes the mbarrier" + stuck());
        if (others) return YIELD;
        continue;
      }
      if (cluster) return BLOCKED;
      throw Stop("DEADLOCK" + stuck());
    }
  }

 private:
  Kernel& k_;
  Cta& c_;
  const vector<Ins>& code_;
  long idle_ = 0;

  // until every lane of the warp waits or has ended, or its turn is over
  bool run_warp(Warp& w, u64 quantum) {
    bool progressed = false;
    u64 jumps_back = 0;
    for (;;) {
      int best = -1;
      for (int q = 0; q < int(w.groups.size()); q++)
        if (w.groups[q].state == RUNS && (best < 0 || w.groups[q].pc < w.groups[best].pc)) best = q;
      if (best < 0) return progressed;
      progressed = true;
      int pc = w.groups[best].pc;
      u32 mask = w.groups[best].mask;
      w.groups.erase(w.groups.begin() + best);
      if (!run_group(w, pc, mask, quantum, jumps_back)) return true;
    }
  }
  void put(Warp& w, int pc, u32 mask, GroupState state = RUNS, u32 barrier = 0) {
    if (mask) w.groups.push_back({pc, mask, state, barrier});
  }
  // Place of the next group at or after pc: lanes meet there again.
  int meeting(const Warp& w, int pc) const {
    int limit = INT32_MAX;
    for (auto& g : w.groups)
      if (g.pc >= pc) limit = std::min(limit, g.pc);
    return limit;
  }
  // until the group splits, waits, meets another, or ends; false: the warp's turn is over
  bool run_group(Warp& w, int pc, u32 mask, u64 quantum, u64& jumps_back) {
    int limit = meeting(w, pc);
    for (;;) {
      if (pc >= limit) {
        if (pc > limit) {
          put(w, pc, mask);
          return true;
        }
        for (size_t q = 0; q < w.groups.size();) {
          const Group& g = w.groups[q];
          if (g.pc == pc && (g.state == RUNS || g.state == AT_WARP_OP)) {
            mask |= g.mask;
            w.groups.erase(w.groups.begin() + q);
          } else {
            q++;
          }
        }
        limit = meeting(w, pc + 1);
      }
      const Ins& i = code_[pc];
      u32 m = mask;
      if (i.guarded) {
        const u32 p = *reinterpret_cast<const u32*>(w.regs + i.guard);
        m &= i.guard_negated ? ~p : p;
      }
      k_.executed[pc]++, k_.lanes[pc] += __builtin_popcount(m);
      if (++c_.steps > u64(opt.max_steps))
        throw Stop("HANG: no end after " + std::to_string(opt.max_steps) + " warp instructions of one block, " +
                   who(w, __builtin_ctz(mask)) + " at " + where(k_, i) + stuck());
      switch (i.kind) {
        case PLAIN:
          if (m) i.fn(w, i, m);
          pc++;
          continue;
        case POLL: {
          const bool before = c_.polled;
          c_.polled = false;
          if (m) i.fn(w, i, m);
          const bool failed = c_.polled;
          c_.polled |= before;
          pc++;
          if (!failed) continue;
          put(w, pc, mask);
          return false;
        }
        case BRA:
          if (m && m != mask) {
            put(w, i.target, m);
            put(w, pc + 1, mask & ~m);
            return true;
          }
          if (m && quantum && i.target <= pc && ++jumps_back > quantum) {
            put(w, i.target, mask);
            return false;
          }
          pc = m ? i.target : pc + 1;
          if (!w.groups.empty()) {
            put(w, pc, mask);
            return true;
          }
          limit = INT32_MAX;
          continue;
        case BRX: {
          std::map<int, u32> to;
          for (u32 mm = m; mm; mm &= mm - 1) {
            const u64 index = w.raw(i.s[0], __builtin_ctz(mm));
            if (index >= i.targets.size())
              throw Stop("BRANCH outside its table, by " + who(w, __builtin_ctz(mm)) + " at " + where(k_, i));
            to[i.targets[index]] |= 1u << __builtin_ctz(mm);
          }
          to[pc + 1] |= mask & ~m;
          for (auto& [place, lanes] : to) put(w, place, lanes);
          return true;
        }
        case RET:
          w.alive &= ~m, mask &= ~m;
          if (!mask) {  // lanes that wait for these may go on
            for (auto& g : w.groups)
              if (g.state == AT_WARP_OP) g.state = RUNS;
            return true;
          }
          pc++;
          continue;
        case BAR:
        case CLUSTER_WAIT:
          put(w, pc + 1, mask & ~m);
          if (m)
            put(w, pc, m, i.kind == BAR ? AT_BARRIER : AT_CLUSTER,
                i.kind == BAR ? u32(w.raw(i.s[0], __builtin_ctz(m))) : 0);
          return true;
        case BAR_ARRIVE:
          for (u32 mm = m; mm; mm &= mm - 1) {
            Named& n = c_.named[u32(w.raw(i.s[0], __builtin_ctz(mm)))];
            const u32 t = w.id * 32 + __builtin_ctz(mm);
            n.arrived++;
            c_.teach(t, n.clocks);
            c_.clock[t]++;
          }
          pc++;
          continue;
        case WSYNC: {
          u32 through = mask & ~m;
          for (u32 rest = m; rest;) {  // lanes may have different masks, as tiles of a warp do
            const u32 need = u32(w.raw(i.s[3], __builtin_ctz(rest)));
            u32 same = 0;
            for (u32 mm = rest; mm; mm &= mm - 1)
              same |= u32(u32(w.raw(i.s[3], __builtin_ctz(mm))) == need) << __builtin_ctz(mm);
            rest &= ~same;
            if (same & ~need)
              throw Stop("MEMBER MASK lacks the calling lane: " + who(w, __builtin_ctz(same & ~need)) + " at " +
                         where(k_, i));
            if (need & w.alive & ~same) {
              put(w, pc, same, AT_WARP_OP);
              continue;
            }
            if (need & ~w.alive & w.all)
              finding("exited" + std::to_string(i.line), "MEMBER MASK names lanes that have ended, at " + where(k_, i) +
                                                             " by " + who(w, __builtin_ctz(same)));
            i.fn(w, i, same);
            through |= same;
          }
          if (through == mask) {
            pc++;
            continue;
          }
          put(w, pc + 1, through);
          return true;
        }
      }
    }
  }

  // Lets the threads at one barrier go on where they are all those that have not ended, or as many as it names.
  bool release_barriers() {
    std::map<u32, u32> arrived;
    u32 alive = 0;
    for (Warp& w : c_.warps) {
      alive += __builtin_popcount(w.alive);
      for (auto& g : w.groups)
        if (g.state == AT_BARRIER) arrived[g.barrier] += __builtin_popcount(g.mask);
    }
    for (auto& [barrier, here] : arrived) {
      u32 need = alive;
      bool partial = false;
      for_each_at(barrier, [&](Warp& w, Group& g) {
        const Src& count = code_[g.pc].s[1];
        if (count.size) need = u32(w.raw(count, __builtin_ctz(g.mask))), partial = need != alive;
      });
      if (here + (c_.named.count(barrier) ? c_.named[barrier].arrived : 0) < need) continue;
      release(barrier, here, partial);
      return true;
    }
    return false;
  }
  template <class F>
  void for_each_at(u32 barrier, F f) {
    for (Warp& w : c_.warps)
      for (auto& g : w.groups)
        if (g.state == AT_BARRIER && g.barrier == barrier) f(w, g);
  }
  void release(u32 barrier, u32 here, bool partial) {
    ledger.barriers++;
    std::set<int> sites;
    u32 votes = 0;
    for_each_at(barrier, [&](Warp& w, Group& g) {
      sites.insert(g.pc);
      if (code_[g.pc].mode) votes += __builtin_popcount(w.pred(code_[g.pc].s[2]) & g.mask);
    });
    const string block =
        "block (" + std::to_string(c_.id[0]) + "," + std::to_string(c_.id[1]) + "," + std::to_string(c_.id[2]) + ")";
    if (sites.size() > 1 && !partial) {
      string text = "DIVERGENT BARRIER: threads of " + block + " meet at different barriers:", key = "div";
      for (int s : sites) text += " " + where(k_, code_[s]), key += std::to_string(s) + ",";
      finding(key, text);
    }
    for (Warp& w : c_.warps) {
      u32 lanes = 0;
      int pc = 0;
      for (auto& g : w.groups)
        if (g.state == AT_BARRIER && g.barrier == barrier) lanes |= g.mask, pc = g.pc;
      if (lanes && lanes != w.alive)
        finding("part" + std::to_string(pc), "DIVERGENT BARRIER: warp " + std::to_string(w.id) + " of " + block +
                                                 " takes part with only some of its threads at " +
                                                 where(k_, code_[pc]));
      if (lanes && w.alive != w.all)
        finding("ended" + std::to_string(pc), "BARRIER after some threads of warp " + std::to_string(w.id) +
                                                  " have ended, at " + where(k_, code_[pc]));
    }
    vector<u32> clocks;
    if (partial) {
      clocks = c_.named[barrier].clocks;
      for_each_at(barrier, [&](Warp& w, Group& g) {
        for (u32 m = g.mask; m; m &= m - 1) c_.teach(w.id * 32 + __builtin_ctz(m), clocks);
      });
    }
    for_each_at(barrier, [&](Warp& w, Group& g) {
      const Ins& i = code_[g.pc];
      for (u32 m = g.mask; m; m &= m - 1) {
        const int l = __builtin_ctz(m);
        const u32 t = w.id * 32 + l;
        if (i.mode == 1) w.set(i.d, l, votes);
        if (partial)
          c_.learn(t, clocks);
        else
          c_.base[t] = c_.clock[t];
        c_.clock[t]++;
      }
      if (i.mode > 1) w.set_pred(i.d, g.mask, (i.mode == 2 ? votes == here : votes > 0) ? ~0u : 0);
      g.state = RUNS, g.pc++;
    });
    c_.named.erase(barrier);
    if (!partial) c_.barriers++;
  }
};

struct Launch {
  Kernel& k;
  const PtxLaunch& shape;
  const vector<u8>& params;
  u32 cluster, batch, threads, warps, shared, id;
  u64 blocks, workspace;

  void begin_block(Cta& c, vector<Cta>& all, u32 rank, u64 linear) const {
    c = Cta{};
    c.ended = linear >= blocks;
    if (c.ended) return;
    const u32 *grid = shape.grid, *block = shape.block;
    c.k = &k, c.params = params.data();
    memcpy(c.grid, grid, sizeof c.grid);
    memcpy(c.block, block, sizeof c.block);
    c.threads = threads, c.linear = u32(linear), c.tag = id << 20 | u32((linear + 1) & 0xfffff);
    c.id[0] = u32(linear % grid[0]), c.id[1] = u32(linear / grid[0] % grid[1]),
    c.id[2] = u32(linear / grid[0] / grid[1]);
    c.rng.seed(u32(opt.seed + linear));
    c.cluster = cluster > 1 ? &all : nullptr, c.rank = cluster > 1 ? rank : 0;
    c.regs.assign(size_t(k.reg_bytes) * warps + 64, 0xff);
    c.shared.assign(shared, 0xff);  // NaN
    c.shared_valid.assign(shared, 0);
    for (auto [begin, end] : k.shared_vars) std::fill(c.shared_valid.begin() + begin, c.shared_valid.begin() + end, 1);
    if (k.has_dynamic) std::fill(c.shared_valid.begin() + k.dynamic_at, c.shared_valid.end(), 1);
    c.shadow.assign(shared, Shadow{});
    c.local.assign(size_t(k.local_bytes) * warps * 32, 0xff);
    c.clock.assign(warps * 32, 1);
    c.base.assign(warps * 32, 0);
    if (k.vector_clocks) c.known_by.assign(size_t(warps) * 32 * warps * 32, 0);
    c.fenced.assign(warps * 32, 0);
    c.fence_clock.assign(warps * 32, 0);
    c.async.assign(warps * 32, vector<vector<Copy>>(1));
    c.warps.resize(warps);
    for (u32 q = 0; q < warps; q++) {
      Warp& w = c.warps[q];
      w.cta = &c, w.id = int(q), w.constants = k.constants.data();
      w.regs = c.regs.data() + (32 - u64(c.regs.data()) % 32) % 32 + size_t(k.reg_bytes) * q;
      const u32 n = std::min(32u, threads - q * 32);
      w.all = w.alive = n == 32 ? ~0u : (1u << n) - 1;
      w.groups.assign(1, Group{0, w.alive, RUNS, 0});
      memset(w.seen, 0, sizeof w.seen);
      for (u32 l = 0; l < 32; l++) {
        const u32 t = q * 32 + l, bit = 1u << l;
        const u32 values[SPECIALS] = {t % block[0],
                                      t / block[0] % block[1],
                                      t / block[0] / block[1],
                                      block[0],
                                      block[1],
                                      block[2],
                                      c.id[0],
                                      c.id[1],
                                      c.id[2],
                                      grid[0],
                                      grid[1],
                                      grid[2],
                                      l,
                                      q,
                                      warps,
                                      u32(linear % opt.sms),
                                      u32(opt.sms),
                                      bit,
                                      bit - 1,
                                      bit | (bit - 1),
                                      ~(bit | (bit - 1)),
                                      ~(bit - 1),
                                      c.rank,
                                      cluster,
                                      c.id[0] / cluster,
                                      grid[0] / cluster,
                                      0,
                                      1,
                                      u32(workspace >> 32),
                                      u32(workspace)};
        for (int s = 0; s < SPECIALS; s++) reinterpret_cast<u32*>(w.regs + k.special[s])[l] = values[s];
      }
    }
    ledger.blocks++;
    ledger.threads += threads;
  }
  void run(vector<Cta>& ctas) const {
    vector<Runner> runners;
    for (Cta& c : ctas) runners.emplace_back(k, c);
    for (u32 left = batch; left;) {
      left = 0;
      bool yielded = false;
      for (u32 r = 0; r < batch; r++) {
        if (ctas[r].ended) continue;
        const auto end = runners[r].run(batch > 1 && cluster == 1);
        left += end != Runner::DONE, yielded |= end == Runner::YIELD;
      }
      if (!left || yielded) continue;
      meet(ctas, runners);
    }
  }
  void meet(vector<Cta>& ctas, const vector<Runner>& runners) const {  // a barrier of the cluster
    u32 arrived = 0, alive = 0;
    for (Cta& c : ctas) {
      arrived += c.arrived;
      for (Warp& w : c.warps) alive += __builtin_popcount(w.alive);
    }
    if (arrived < alive) {
      string s;
      for (auto& r : runners) s += r.stuck();
      throw Stop("DEADLOCK of a cluster" + s);
    }
    for (Cta& c : ctas) {
      c.arrived = 0, c.barriers++;
      for (u32 t = 0; t < c.clock.size(); t++) c.base[t] = c.clock[t]++;
      for (Cta& o : ctas) c.acquire(o.tag, {o.block_clock, 0, c.base[0]});
    }
    for (Cta& c : ctas) {
      c.block_clock++;
      for (Warp& w : c.warps)
        for (auto& g : w.groups)
          if (g.state == AT_CLUSTER) g.state = RUNS, g.pc++;
    }
  }
};
}  // namespace

string where(const Kernel& k, const Ins& i) {
  std::ostringstream s;
  const auto place = [&](int file, int line, const char* before, const char* after) {
    if (!line || !k.files || !k.files->count(file)) return;
    const string& name = k.files->at(file);
    s << before << name.substr(name.rfind('/') + 1) << ":" << line << after;
  };
  place(i.file, i.file_line, "", " ");
  place(i.from_file, i.from_line, "inlined at ", " ");
  s << "(ptx line " << i.line << ", " << i.name << ")";
  return s.str();
}
string who(const Warp& w, int lane) {
  const Cta& c = *w.cta;
  std::ostringstream s;
  s << "block (" << c.id[0] << "," << c.id[1] << "," << c.id[2] << ") thread " << w.id * 32 + lane;
  return s.str();
}

void launch(Module& m, const string& entry, const PtxLaunch& shape, void** args) {
  static u32 launches;
  auto it = m.kernels.find(entry);
  if (it == m.kernels.end()) throw Unsupported("no kernel " + entry);
  Kernel& k = it->second;
  if (!k.error.empty()) throw Unsupported(k.name + ": " + k.error);
  const u64 threads = u64(shape.block[0]) * shape.block[1] * shape.block[2],
            blocks = u64(shape.grid[0]) * shape.grid[1] * shape.grid[2];
  if (!threads || threads > 1024 || !blocks)
    throw Stop("LAUNCH of no blocks, or of blocks of 0 or more than 1024 threads");
  if ((k.max_threads && threads > k.max_threads) || (k.exact_threads && threads != k.exact_threads))
    throw Stop("LAUNCH with " + std::to_string(threads) + " threads of " + k.name + ", which is made for " +
               std::to_string(k.max_threads ? k.max_threads : k.exact_threads));
  const u32 cluster = shape.cluster ? shape.cluster : k.cluster;
  if (k.cluster > 1 && cluster != k.cluster) throw Stop("LAUNCH with another cluster than the kernel's own");
  if (shape.grid[0] % cluster) throw Stop("LAUNCH of a grid that is no multiple of the cluster");
  k.dynamic_at = (k.shared_static + 127) / 128 * 128;
  const u32 shared = (k.has_dynamic ? k.dynamic_at : k.shared_static) + shape.shared;
  if (k.shared_used() + shape.shared > opt.shared_limit)
    throw Stop("LAUNCH with more than " + std::to_string(opt.shared_limit) + " bytes of shared memory in a block");
  vector<u8> params(k.param_bytes + 16);
  for (size_t p = 0; p < k.params.size(); p++) memcpy(&params[k.params[p].off], args[p], k.params[p].size);

  begin_launch_memory();
  begin_jitter();
  ledger_begin(k);
  launches = launches % 0xfff + 1;
  if (launches == 1)
    for (auto& [base, a] : allocs) a.shadow.clear();
  alignas(64) GridWorkspace workspace;
  if (shape.cooperative) add_alloc(&workspace, sizeof workspace, "grid barrier", false, false);
  struct Cleanup {
    bool yes;
    void* p;
    ~Cleanup() {
      if (yes) ptxsim_unregister(p);
    }
  } cleanup{shape.cooperative != 0, &workspace};
  const u32 batch = cluster > 1 ? cluster : shape.cooperative ? u32(blocks) : u32(std::max(1l, opt.resident));
  if (cluster > 1 && shape.cooperative) throw Unsupported("UNSUPPORTED: a cooperative launch of clusters");
  const Launch l{k,      shape,    params, cluster,        batch, u32(threads), u32((threads + 31) / 32),
                 shared, launches, blocks, u64(&workspace)};
  vector<u64> order((blocks + batch - 1) / batch);
  for (size_t q = 0; q < order.size(); q++) order[q] = q;
  std::mt19937 rng(u32(opt.seed));
  if (opt.seed) std::shuffle(order.begin(), order.end(), rng);
  vector<Cta> ctas(batch);
  for (u64 b : order) {
    for (u32 rank = 0; rank < batch; rank++) l.begin_block(ctas[rank], ctas, rank, b * batch + rank);
    l.run(ctas);
  }
  ledger_end();
}

}  // namespace ptxsim
