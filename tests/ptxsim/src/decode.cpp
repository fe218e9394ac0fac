#include <iterator>

#include "parser.h"

namespace ptxsim {
namespace {

Suffixes split(const string& s) {
  Suffixes out;
  std::stringstream in(s);
  for (string part; std::getline(in, part, '.');) out.push_back(part);
  return out;
}
bool has(const Suffixes& p, const char* s) { return std::find(p.begin(), p.end(), s) != p.end(); }
template <size_t N>
int index_of(const Suffixes& p, const char* const (&names)[N]) {
  for (size_t n = 0; n < N; n++)
    if (has(p, names[n])) return int(n);
  return -1;
}
std::set<string> words(const char* text) {
  std::istringstream in(text);
  return {std::istream_iterator<string>(in), {}};
}
// A suffix outside this list might change what an instruction means.
bool known_suffix(const string& s) {
  static const std::set<string> known = words(
      "approx full ftz sat rn rz rm rp rni rzi rmi rpi rna lo hi wide cc NaN relu eq ne lt le gt ge ls hs "
      "equ neu ltu leu gtu geu num nan and or xor global shared shared::cta shared::cluster local param "
      "param::entry param::func const v2 v4 v8 nc ca cg cs lu cv wb wt volatile relaxed acquire release "
      "acq_rel sc weak cta cluster gpu sys gl add min max exch cas inc dec noftz async commit_group "
      "wait_group wait_all bulk read bulk_group mbarrier mbarrier::complete_tx::bytes noinc arrive "
      "expect_tx complete_tx init inval wait test_wait try_wait parity aligned sync to red popc up down "
      "bfly idx all any uni ballot warp wrap clamp l r shiftamt finite infinite number notanumber normal "
      "subnormal m16n8k4 m16n8k8 m16n8k16 m8n8 row col trans x1 x2 x4 tf32 b32 proxy mbarrier_init "
      "launch_dependents b16 level::eviction_priority fractional");
  return known.count(s) || type_names.count(s) || s.rfind("L1::", 0) == 0 || s.rfind("L2::", 0) == 0 ||
         s.rfind("async::", 0) == 0 || s.rfind("alias", 0) == 0;
}
Space space_of(const Suffixes& p) {
  for (auto& s : p) {
    if (s == "global") return GLOBAL;
    if (s.rfind("shared", 0) == 0) return SHARED;
    if (s == "local") return LOCAL;
    if (s.rfind("param", 0) == 0) return PARAM;
    if (s == "const") return CONST;
  }
  return GENERIC;
}
// The ledger's class, and how many instructions of the machine it may take: an estimate, as ptxas isn't run.
void classify(Ins& i, const Suffixes& p) {
  const string& o = p[0];
  const bool wide = size_of(i.ty) == 8 && i.ty != F64, approx = has(p, "approx");
  const auto set = [&](Class c, int slots) { i.cls = c, i.slots = u8(slots); };
  const auto is = [&](std::initializer_list<const char*> names) {
    return std::any_of(names.begin(), names.end(), [&](const char* n) { return o == n; });
  };
  const Class number = i.ty == F64 ? FP64 : i.ty == F32 ? FP32 : is_float(i.ty) || is_half_pair(i.ty) ? HALF2 : INTEGER;
  if (is({"mov", "mov_pack", "mov_unpack", "cvta", "mapa"}))
    set(FREE, 0);
  else if (is({"ld", "st", "ldu"}))
    set(i.space == PARAM    ? FREE
        : i.space == SHARED ? MEM_SHARED
        : i.space == LOCAL  ? MEM_LOCAL
                            : MEM_GLOBAL,
        i.space != PARAM);
  else if (is({"atom", "red"}))
    set(ATOMIC, 1);
  else if (is({"cp"}))
    set(MEM_GLOBAL, 1);
  else if (is({"ldmatrix", "stmatrix"}))
    set(MEM_SHARED, 1);
  else if (is({"mma"}))
    set(MATRIX, 1);
  else if (is({"shfl", "vote", "match", "redux", "elect", "movmatrix"}))
    set(SHUFFLE, 1);
  else if (is({"bar", "barrier", "mbarrier", "membar", "fence"}))
    set(BARRIER, 1);
  else if (is({"bra", "brx", "ret", "exit", "call", "trap"}))
    set(CONTROL, 1);
  else if (is({"setp", "selp", "testp", "min", "max"}))
    set(COMPARE, i.ty == PRED ? 1 : wide ? 2 : 1);
  else if (is({"ex2", "lg2", "rcp", "rsqrt", "sqrt", "sin", "cos", "tanh"}))
    set(MUFU, !approx ? 8 : i.ftz || o == "tanh" ? 1 : 3);
  else if (o == "div" && number != INTEGER)
    set(MUFU, has(p, "full") ? 8 : approx ? 2 : 10);
  else if (is({"div", "rem"}))
    set(INTEGER, wide ? 70 : 20);
  else if (o == "cvt") {
    if (i.ty == U64 && i.ty2 == U32)
      set(FREE, 0);
    else
      set(is_float(i.ty) || is_float(i.ty2) || is_half_pair(i.ty) ? CONVERT : INTEGER, 1);
  } else if (i.ty == PRED)
    set(COMPARE, 1);
  else if (number != INTEGER)
    set(number, 1);
  else
    set(INTEGER, wide && !has(p, "wide") ? (is({"mul", "mad"}) ? 4 : 2) : 1);
}
}  // namespace

void Parser::operands(Ins& i, Ty d, std::initializer_list<Ty> s) {
  i.d = operand(d);
  int n = 0;
  for (Ty ty : s) {
    expect(",");
    i.s[n++] = operand(ty);
  }
}

void Parser::instruction(const string& end_label) {
  Ins i;
  i.line = t_[at_].line, i.file = file_, i.file_line = line_, i.from_file = from_file_, i.from_line = from_line_;
  if (take("@")) {
    i.guarded = true, i.guard_negated = take("!");
    i.guard = reg(next()).off;
  }
  const string op = next();
  static std::set<string> names;
  i.name = names.insert(op).first->c_str();
  const Suffixes p = split(op);
  vector<Ty> types;
  for (size_t n = 1; n < p.size(); n++) {
    if (!known_suffix(p[n])) fail("'." + p[n] + "' of " + op);
    if (type_names.count(p[n])) types.push_back(type_names.at(p[n]));
  }
  i.ty = types.empty() ? NONE : types.back();
  i.ftz = has(p, "ftz"), i.sat = has(p, "sat"), i.nan = has(p, "NaN"), i.relu = has(p, "relu");
  i.round = has(p, "rz") ? 1 : has(p, "rm") ? 2 : has(p, "rp") ? 3 : 0;
  if (p[0] == "call") {
    call(i);
    return;
  }
  if (p[0] == "ret" && !end_label.empty()) {
    i.kind = BRA, i.label = end_label;
  } else if (!decode_memory(i, p) && !decode_warp(i, p) && !decode_alu(i, p, types)) {
    fail("instruction " + op);
  }
  if (i.kind == PLAIN && !i.fn) fail("instruction " + op);
  if (!take(";")) fail("an operand of " + op);
  if (i.cls == FREE && !i.slots) {
    Suffixes q = p;
    if (!i.v.empty() && p[0] == "mov") q[0] = "mov_pack";
    classify(i, q);
  }
  k_->code.push_back(std::move(i));
}

bool Parser::decode_memory(Ins& i, const Suffixes& p) {
  const string& o = p[0];
  const Ty ty = i.ty;
  const auto policy = [&] {
    if (take(",")) operand(B64);
  };
  const auto place = [&](Space named) {  // a device function's parameters lie in local memory
    if (named == LOCAL || (named == PARAM && i.space == GENERIC)) i.space = named;
  };
  if (o == "ld" || o == "ldu" || o == "st") {
    i.space = space_of(p), i.nc = has(p, "nc");
    i.vec = has(p, "v2") ? 2 : has(p, "v4") ? 4 : has(p, "v8") ? 8 : 1;
    i.strong = has(p, "volatile") || has(p, "acquire") || has(p, "release") || has(p, "relaxed");
    i.releases = has(p, "release");
    k_->vector_clocks |= i.strong && i.space != SHARED;
    if (o == "st") {
      i.fn = do_st;
      place(address_operand(i.imm, i.s[0]));
      expect(",");
      i.v = vector_operand(ty);
    } else {
      i.fn = do_ld;
      i.v = vector_operand(ty);
      expect(",");
      place(address_operand(i.imm, i.s[0]));
    }
    if (i.v.size() != i.vec) fail("a vector of another size");
    if (space_of(p) == PARAM && i.space == LOCAL) i.cls = MEM_LOCAL;
    policy();
    return true;
  }
  if (o == "createpolicy") {  // of the second cache, which has no effect here: any number will do
    if (!has(p, "fractional")) fail("this form of createpolicy");
    i.fn = alu_function(i, {"mov"}), i.d = operand(B64), i.s[0] = constant(0, 8);
    if (take(",")) operand(F32);
    return true;
  }
  if (o == "atom" || o == "red") {
    if (o == "red" && has(p, "async")) return false;
    static const char* const ops[] = {"add", "min", "max", "exch", "cas", "and", "or", "xor", "inc", "dec"};
    i.space = space_of(p), i.releases = has(p, "release") || has(p, "acq_rel"), i.mode = u8(index_of(p, ops));
    k_->vector_clocks = true;  // warps of a block may synchronise by it
    if (has(p, "v2") || has(p, "v4") || has(p, "v8")) fail("a vector of atomics");
    if (o == "atom") {
      i.d = operand(ty);
      expect(",");
    }
    address_operand(i.imm, i.s[0]);
    expect(",");
    i.s[1] = operand(ty);
    if (take(",")) i.s[2] = operand(ty);
    i.fn = atomic_function(ty);
    return true;
  }
  if (o == "cp" && has(p, "bulk")) {
    if (has(p, "commit_group")) {
      i.fn = do_nop;
    } else if (has(p, "wait_group")) {
      i.fn = do_nop;
      next();
    } else {
      i.mode = p.size() > 3 && p[3] == "global";
      if (p[1] != "async" || p[2] != "bulk" || (!i.mode && p[4] != "global") || has(p, "multicast::cluster"))
        fail("this form of cp.async.bulk");
      i.fn = do_bulk, i.space = SHARED, i.ty = B128;
      address_operand(i.imm, i.s[0]);
      expect(",");
      address_operand(i.imm2, i.s[1]);
      expect(",");
      i.s[2] = operand(U32);
      if (!i.mode) {
        k_->vector_clocks = true;
        i64 offset;
        expect(",");
        address_operand(offset, i.s[3]);
        if (!i.s[3].size)
          i.s[3] = constant(u64(offset), 8);
        else if (offset)
          fail("an offset of the mbarrier");
      }
      if (!i.s[1].size) i.s[1] = constant(0, 8);
      policy();
    }
    return true;
  }
  if (o == "cp" && has(p, "mbarrier")) {
    i.fn = do_mbarrier, i.mode = MB_CP_ASYNC, i.space = space_of(p), i.nc = has(p, "noinc");
    k_->vector_clocks = true;
    address_operand(i.imm, i.s[0]);
    return true;
  }
  if (o == "cp") {
    if (has(p, "commit_group")) {
      i.fn = do_cp_commit;
    } else if (has(p, "wait_group") || has(p, "wait_all")) {
      i.fn = do_cp_wait, i.mode = has(p, "wait_all");
      if (!i.mode) i.imm = std::stoi(next());
    } else {
      i.fn = do_cp_async;
      address_operand(i.imm, i.s[0]);
      expect(",");
      address_operand(i.imm2, i.s[1]);
      if (!i.s[1].size) i.s[1] = constant(0, 8);
      expect(",");
      i.vec = u8(std::stoi(next()));
      if (take(",")) {
        i.s[2] = operand(U32);
        if (i.s[2].pred || i.s[2].size == 8) fail("this operand of cp.async");
      }
    }
    return true;
  }
  if (o == "mbarrier") {
    static const char* const ops[] = {"init", "inval", "arrive", "expect_tx", "complete_tx", "test_wait", "try_wait"};
    k_->vector_clocks = true;
    i.fn = do_mbarrier, i.space = SHARED;
    switch (index_of(p, ops)) {
      case 0:
        i.mode = MB_INIT;
        break;
      case 1:
        i.mode = MB_INVAL;
        break;
      case 2:
        i.mode = has(p, "expect_tx") ? MB_ARRIVE_EXPECT : MB_ARRIVE;
        break;
      case 3:
        i.mode = MB_EXPECT;
        break;
      case 4:
        i.mode = MB_COMPLETE;
        break;
      case 5:
      case 6:
        i.mode = has(p, "parity") ? MB_WAIT_PARITY : MB_WAIT, i.kind = POLL;
        break;
      default:
        return false;
    }
    if (i.mode == MB_ARRIVE || i.mode == MB_ARRIVE_EXPECT || i.kind == POLL) {
      i.d = operand(i.kind == POLL ? PRED : B64);
      expect(",");
    }
    address_operand(i.imm, i.s[0]);
    if (take(",")) i.s[1] = operand(i.mode == MB_WAIT ? B64 : U32);
    if (take(",")) operand(U32);
    return true;
  }
  if (o == "cvta") {
    const Space s = space_of(p);
    i.fn = do_cvta;
    i.imm = i64(s == SHARED ? SHARED_BASE : s == LOCAL ? LOCAL_BASE : s == PARAM ? PARAM_BASE : 0);
    if (has(p, "to")) i.imm = -i.imm;
    operands(i, i.ty, {i.ty});
    return true;
  }
  if (o == "mapa") {
    i.fn = do_mapa;
    operands(i, i.ty, {i.ty, U32});
    return true;
  }
  if (o == "isspacep") {
    i.fn = do_isspacep, i.space = space_of(p);
    operands(i, PRED, {B64});
    return true;
  }
  if (o == "membar" || o == "fence" || o == "prefetch" || o == "prefetchu" || o == "discard" || o == "applypriority" ||
      o == "griddepcontrol" || o == "nanosleep") {
    i.fn = o == "membar" || o == "fence" ? do_fence : do_nop;
    while (peek() != ";") next();
    return true;
  }
  return false;
}

bool Parser::decode_warp(Ins& i, const Suffixes& p) {
  const string& o = p[0];
  const Ty ty = i.ty;
  const auto mask = [&] {
    i.kind = WSYNC;
    expect(",");
    i.s[3] = operand(B32);
  };
  if (o == "bra") {
    i.kind = BRA, i.label = prefix_ + next();
    return true;
  }
  if (o == "brx") {
    i.kind = BRX, i.s[0] = operand(U32);
    expect(",");
    i.label = prefix_ + next();
    return true;
  }
  if (o == "ret" || o == "exit") {
    i.kind = RET;
    return true;
  }
  if (o == "trap" || o == "brkpt") {
    i.fn = do_trap;
    return true;
  }
  if ((o == "bar" || o == "barrier") && has(p, "warp")) {
    i.kind = WSYNC, i.fn = do_syncwarp, i.s[3] = operand(B32);
    return true;
  }
  if (o == "barrier" && has(p, "cluster")) {
    if (has(p, "arrive"))
      i.fn = do_cluster_arrive;
    else
      i.kind = CLUSTER_WAIT;
    return true;
  }
  if (o == "bar" || o == "barrier") {
    i.kind = has(p, "arrive") ? BAR_ARRIVE : BAR;
    if (has(p, "red")) {
      i.mode = has(p, "popc") ? 1 : has(p, "and") ? 2 : 3;
      i.d = operand(i.mode == 1 ? U32 : PRED);
      expect(",");
    }
    i.s[0] = operand(U32);
    while (take(",")) {
      const Src s = peek() == "!" ? operand(PRED) : operand(U32);
      i.s[s.pred ? 2 : 1] = s;
    }
    k_->vector_clocks |= i.s[1].size != 0;
    return true;
  }
  if (o == "shfl") {
    if (!has(p, "sync")) return false;
    i.fn = do_shfl, i.mode = has(p, "up") ? 0 : has(p, "down") ? 1 : has(p, "bfly") ? 2 : 3;
    i.d = operand(B32);
    if (take("|")) i.d2 = operand(PRED);
    for (int n = 0; n < 3; n++) {
      expect(",");
      i.s[n] = operand(B32);
    }
    mask();
    return true;
  }
  if (o == "vote") {
    if (!has(p, "sync")) return false;
    i.fn = do_vote, i.mode = has(p, "all") ? 0 : has(p, "any") ? 1 : has(p, "uni") ? 2 : 3;
    i.d = operand(i.mode == 3 ? B32 : PRED);
    expect(",");
    i.s[0] = operand(PRED);
    mask();
    return true;
  }
  if (o == "elect") {
    i.fn = do_vote, i.mode = 4, i.kind = WSYNC;
    i.d = operand(B32);
    expect("|");
    i.d2 = operand(PRED);
    mask();
    return true;
  }
  if (o == "match") {
    i.fn = do_match, i.mode = has(p, "all");
    i.d = operand(B32);
    if (take("|")) i.d2 = operand(PRED);
    expect(",");
    i.s[0] = operand(ty);
    mask();
    return true;
  }
  if (o == "redux") {
    static const char* const ops[] = {"add", "min", "max", "-", "-", "and", "or", "xor"};
    if (is_float(ty)) return false;
    i.mode = u8(index_of(p, ops)), i.fn = ty == S32 ? do_redux_signed : do_redux_unsigned;
    i.d = operand(ty);
    expect(",");
    i.s[0] = operand(ty);
    mask();
    return true;
  }
  if (o == "activemask") {
    i.fn = do_activemask, i.d = operand(B32);
    return true;
  }
  if (o == "movmatrix") {
    if (!has(p, "trans") || !has(p, "b16")) fail("this form of movmatrix");
    i.kind = WSYNC, i.s[3] = constant(~0u, 4), i.fn = do_movmatrix, i.d = operand(B32);
    expect(",");
    i.s[0] = operand(B32);
    return true;
  }
  if (o == "mma" || o == "ldmatrix" || o == "stmatrix") {
    i.kind = WSYNC, i.s[3] = constant(~0u, 4);
    i.vec = has(p, "x4") ? 4 : has(p, "x2") ? 2 : 1;
    i.mode = has(p, "trans");
  }
  if (o == "mma") {
    i.imm = has(p, "m16n8k16") ? 16 : has(p, "m16n8k8") ? 8 : has(p, "m16n8k4") ? 4 : 0;
    i.mode = has(p, "bf16") ? 0 : has(p, "f16") ? 1 : has(p, "tf32") ? 2 : 9;
    const auto accumulator = [&](size_t at) { return p.size() > at && p[p.size() - at] == "f32"; };
    if (!i.imm || i.mode == 9 || !accumulator(1) || !accumulator(4)) fail("this shape or type of mma");
    i.fn = do_mma;
    for (int n = 0; n < 4; n++) {
      if (n) expect(",");
      for (Src& s : vector_operand(B32)) i.v.push_back(s);
    }
    return true;
  }
  if (o == "ldmatrix") {
    i.fn = do_ldmatrix, i.v = vector_operand(B32);
    expect(",");
    address_operand(i.imm, i.s[0]);
    return true;
  }
  if (o == "stmatrix") {
    i.fn = do_stmatrix;
    address_operand(i.imm, i.s[0]);
    expect(",");
    i.v = vector_operand(B32);
    return true;
  }
  return false;
}

bool Parser::decode_alu(Ins& i, const Suffixes& p, const vector<Ty>& types) {
  const string& o = p[0];
  if (o == "mov" && peek() == "{") {
    i.fn = alu_function(i, {"mov_unpack"});
    i.v = vector_operand(i.ty);
    expect(",");
    i.s[0] = operand(i.ty);
    return true;
  }
  if (o == "mov" && peek(2) == "{") {
    i.fn = alu_function(i, {"mov_pack"});
    i.d = operand(i.ty);
    expect(",");
    i.v = vector_operand(i.ty);
    return true;
  }
  if (o == "cvt") i.ty = types[0], i.ty2 = types.back();
  if (o == "dp4a") i.ty2 = types.back(), i.ty = U32;
  i.fn = alu_function(i, p);
  if (!i.fn) return false;
  const Ty ty = i.ty, twice = ty == U32 ? U64 : ty == S32 ? S64 : ty == U16 ? U32 : S32;
  const bool wide = has(p, "wide");
  if (o == "setp") {
    i.d = operand(PRED);
    if (take("|")) i.d2 = operand(PRED);
    expect(",");
    i.s[0] = operand(ty);
    expect(",");
    i.s[1] = operand(ty);
    if (take(",")) i.s[2] = operand(PRED);
  } else if (o == "cvt") {
    if (is_half_pair(ty))
      operands(i, B32, {F32, F32});
    else
      operands(i, ty, {i.ty2});
  } else if (o == "selp") {
    operands(i, ty, {ty, ty, PRED});
  } else if (o == "testp") {
    operands(i, PRED, {ty});
  } else if (o == "fma" || o == "mad" || o == "madc" || o == "dp4a") {
    operands(i, wide ? twice : ty, {ty, ty, wide ? twice : ty});
  } else if (o == "shl" || o == "shr") {
    operands(i, ty, {ty, U32});
  } else if (o == "prmt" || o == "shf") {
    operands(i, B32, {B32, B32, B32});
  } else if (o == "lop3") {
    operands(i, B32, {B32, B32, B32});
    expect(",");
    i.imm = i64(number(next(), U32));
  } else if (o == "bfe") {
    operands(i, ty, {ty, U32, U32});
  } else if (o == "bfi") {
    operands(i, ty, {ty, ty, U32, U32});
  } else if (o == "popc" || o == "clz" || o == "bfind") {
    operands(i, U32, {ty});
  } else {
    i.d = operand(wide ? twice : ty);
    expect(",");
    i.s[0] = operand(ty);
    if (take(",")) i.s[1] = operand(ty);
    static const std::set<string> one = words("not neg abs mov ex2 lg2 rcp rsqrt sqrt sin cos tanh brev");
    if (one.count(o) == (i.s[1].size != 0)) fail("another number of operands for " + o);
  }
  return true;
}

void Parser::call(Ins& i) {
  vector<string> results, arguments;
  const auto list = [&](vector<string>& into) {
    while (!take(")"))
      if (!take(",")) into.push_back(next());
  };
  if (take("(")) {
    list(results);
    expect(",");
  }
  const string name = next();
  if (take(",")) {
    expect("(");
    list(arguments);
  }
  expect(";");
  i.cls = CONTROL, i.slots = 1;
  if (name == "vprintf") return;
  if (name == "__assertfail") {
    i.fn = do_assert;
    for (auto& a : arguments)
      if (const Variable* v = find_var(a)) i.v.push_back(constant(v->address, 8));
    k_->code.push_back(std::move(i));
    return;
  }
  if (i.guarded) {  // around the body
    Ins skip = i;
    skip.kind = BRA, skip.guard_negated = !i.guard_negated;
    skip.label = "skip" + std::to_string(++expansions_);
    k_->code.push_back(skip);
    expand(name, arguments, results);
    labels_[skip.label] = int(k_->code.size());
    return;
  }
  expand(name, arguments, results);
}

}  // namespace ptxsim
