#include "parser.h"

namespace ptxsim {

const std::unordered_map<string, Ty> type_names = {
    {"u8", U8},     {"s8", S8},   {"b8", B8},   {"u16", U16}, {"s16", S16},   {"b16", B16},     {"f16", F16},
    {"bf16", BF16}, {"u32", U32}, {"s32", S32}, {"b32", B32}, {"f32", F32},   {"f16x2", F16X2}, {"bf16x2", BF16X2},
    {"u64", U64},   {"s64", S64}, {"b64", B64}, {"f64", F64}, {"pred", PRED}, {"b128", B128}};

namespace {
const std::unordered_map<string, Special> special = {{"%tid.x", TIDX},
                                                     {"%tid.y", TIDY},
                                                     {"%tid.z", TIDZ},
                                                     {"%ntid.x", NTIDX},
                                                     {"%ntid.y", NTIDY},
                                                     {"%ntid.z", NTIDZ},
                                                     {"%ctaid.x", CTAX},
                                                     {"%ctaid.y", CTAY},
                                                     {"%ctaid.z", CTAZ},
                                                     {"%nctaid.x", NCTAX},
                                                     {"%nctaid.y", NCTAY},
                                                     {"%nctaid.z", NCTAZ},
                                                     {"%laneid", LANEID},
                                                     {"%warpid", WARPID},
                                                     {"%nwarpid", NWARPID},
                                                     {"%smid", SMID},
                                                     {"%nsmid", NSMID},
                                                     {"%lanemask_eq", MASK_EQ},
                                                     {"%lanemask_lt", MASK_LT},
                                                     {"%lanemask_le", MASK_LE},
                                                     {"%lanemask_gt", MASK_GT},
                                                     {"%lanemask_ge", MASK_GE},
                                                     {"%cluster_ctarank", CRANK},
                                                     {"%cluster_ctaid.x", CRANK},
                                                     {"%cluster_ctaid.y", ZERO},
                                                     {"%cluster_ctaid.z", ZERO},
                                                     {"%cluster_nctarank", CSIZE},
                                                     {"%cluster_nctaid.x", CSIZE},
                                                     {"%cluster_nctaid.y", ONE},
                                                     {"%cluster_nctaid.z", ONE},
                                                     {"%clusterid.x", CLUSTERX},
                                                     {"%clusterid.y", CTAY},
                                                     {"%clusterid.z", CTAZ},
                                                     {"%nclusterid.x", NCLUSTERX},
                                                     {"%nclusterid.y", NCTAY},
                                                     {"%nclusterid.z", NCTAZ},
                                                     {"%envreg1", ENVREG1},
                                                     {"%envreg2", ENVREG2},
                                                     {"%clock", ZERO},
                                                     {"%gridid", ZERO}};
vector<Token> tokenize(const char* p) {
  vector<Token> out;
  int line = 1;
  const auto word = [](char c) { return isalnum(u8(c)) || c == '_' || c == '$' || c == '%' || c == '.'; };
  while (*p) {
    const char* q = p;
    if (isspace(u8(*p))) {
      line += *p++ == '\n';
    } else if (p[0] == '/' && p[1] == '/') {
      while (*p && *p != '\n') p++;
    } else if (p[0] == '/' && p[1] == '*') {
      for (p += 2; *p && !(p[0] == '*' && p[1] == '/'); p++) line += *p == '\n';
      if (*p) p += 2;
    } else if (*p == '"') {
      for (q++; *q && *q != '"'; q++) {
      }
      out.push_back({string(p, *q ? q + 1 : q), line});
      p = *q ? q + 1 : q;
    } else if (word(*p)) {
      while (word(*q) || (q[0] == ':' && q[1] == ':' && word(q[2]) && (q += 1))) q++;
      out.push_back({string(p, q), line});
      p = q;
    } else {
      out.push_back({string(1, *p++), line});
    }
  }
  out.push_back({"", line});
  return out;
}
bool is_number(const string& s) { return !s.empty() && isdigit(u8(s[0])); }
u64 round_up(u64 x, u64 to) { return (x + to - 1) / to * to; }
}  // namespace

void parse(const char* ptx, Module& m) { Parser(ptx, m).run(); }

Parser::Parser(const char* ptx, Module& m) : t_(tokenize(ptx)), mod_(m) {}
bool Parser::take(const char* s) {
  if (peek() != s) return false;
  at_++;
  return true;
}
void Parser::expect(const char* s) {
  if (!take(s)) fail(string("expected '") + s + "'");
}
void Parser::fail(const string& what) const {
  throw Unsupported("UNSUPPORTED: " + what + " at PTX line " + std::to_string(t_[at_].line) + ", near '" + peek() +
                    "'");
}
void Parser::skip_braces() {
  expect("{");
  for (int depth = 1; depth && !done();) {
    const string s = next();
    depth += s == "{" ? 1 : s == "}" ? -1 : 0;
  }
}
void Parser::skip_line() {
  for (const int line = t_[at_].line; t_[at_].line == line && !done();) at_++;
}
u64 Parser::number(const string& s, Ty ty, bool negative) const {
  const auto floating = [&](double f) { return ty == F64 ? bits<u64>(f) : u64(bits<u32>(float(f))); };
  const double sign = negative ? -1 : 1;
  if (s.size() == 10 && s[0] == '0' && (s[1] | 32) == 'f') {  // 0f.. and 0d.. are bit patterns
    const u32 u = u32(std::stoull(s.substr(2), nullptr, 16));
    return ty == F64 ? floating(sign * double(bits<float>(u))) : u ^ (negative ? 0x80000000u : 0);
  }
  if (s.size() == 18 && s[0] == '0' && (s[1] | 32) == 'd') {
    const u64 u = std::stoull(s.substr(2), nullptr, 16);
    return ty == F64 || size_of(ty) == 8 ? u ^ (negative ? 1ull << 63 : 0) : floating(sign * bits<double>(u));
  }
  if (s.find('.') != string::npos) return floating(sign * std::stod(s));
  const u64 x = std::stoull(s[s.size() - 1] == 'U' ? s.substr(0, s.size() - 1) : s, nullptr, 0);
  return negative ? 0 - x : x;
}
u32 Parser::add_register(u32 bytes) {
  const u32 o = k_->reg_bytes;
  k_->reg_bytes += u32(round_up(bytes, 32));
  return o;
}
Src Parser::constant(u64 x, int size) {
  auto [it, fresh] = constants_.try_emplace({x, size}, u32(k_->constants.size()));
  if (fresh) {
    k_->constants.resize(it->second + round_up(32 * size, 32));
    for (int l = 0; l < 32; l++) memcpy(&k_->constants[it->second + l * size], &x, std::min(size, 8));
  }
  Src s;
  s.off = it->second, s.size = u8(size), s.constant = true;
  return s;
}

// ---------------------------------------------------------------------------------------------------------------------
// Declarations

void Parser::run() {
  for (size_t q = 0; q + 1 < t_.size(); q++) {  // names of functions: calls may come before bodies
    if (t_[q].text != ".func") continue;
    size_t n = q + 1;
    if (t_[n].text == "(") {
      while (t_[n].text != ")") n++;
      n++;
    }
    size_t end = n;
    while (!t_[end].text.empty() && t_[end].text != "{" && t_[end].text != ";") end++;
    if (t_[end].text == "{") functions_[t_[n].text] = q;
  }
  while (!done()) {
    const string s = peek();
    if (s == ".version" || s == ".address_size" || s == ".target" || s == ".extern" || s == ".visible" ||
        s == ".weak" || s == ".common") {
      if (s == ".version" || s == ".address_size" || s == ".target")
        skip_line();
      else
        at_++;
    } else if (s == ".file") {
      const string f = peek(2);
      mod_.files[std::stoi(peek(1))] = f.substr(1, f.size() - 2);
      skip_line();
    } else if (s == ".section") {
      while (peek() != "{") at_++;
      skip_braces();
    } else if (s == ".entry") {
      entry();
    } else if (s == ".func") {
      while (peek() != ";" && peek() != "{") at_++;
      if (!take(";")) skip_braces();
    } else if (s == ".global" || s == ".const" || s == ".shared") {
      variable(mod_.variables);
    } else if (s == ".pragma" || s == ".alias") {
      while (next() != ";") {
      }
    } else {
      fail("this at module level");
    }
  }
}
// .space [.align N] .type name [\[n\]]... [= init];
void Parser::variable(std::map<string, Variable>& into) {
  const string space = next();
  u64 align = 1, count = 1;
  Ty ty = B8;
  bool unsized = false;
  while (peek()[0] == '.') {
    const string n = next().substr(1);
    if (n == "align") {
      align = std::stoull(next());
    } else if (n == "attribute") {
      while (next() != ")") {
      }
    } else if (type_names.count(n)) {
      ty = type_names.at(n);
    }
  }
  const string name = next();
  while (take("[")) {
    if (take("]")) {
      unsized = true, count = 0;
    } else {
      count *= std::stoull(next());
      expect("]");
    }
  }
  Variable v;
  align = std::max<u64>(align, size_of(ty));
  v.size = count * size_of(ty);
  if (take("=")) {
    v.init.assign(v.size, 0);
    u64 pos = 0;
    int depth = 0;
    bool negative = false;
    do {
      const string s = next();
      if (s == "{") {
        depth++;
      } else if (s == "}") {
        depth--;
      } else if (s == "-") {
        negative = true;
      } else if (s != ",") {
        if (!is_number(s)) {  // of another variable: kernels that use this one can't run
          while (next() != ";") {
          }
          return;
        }
        const u64 x = number(s, ty, negative);
        memcpy(&v.init.at(pos), &x, size_of(ty));
        pos += size_of(ty), negative = false;
      }
    } while (depth || peek() != ";");
  }
  expect(";");
  if (space == ".shared") {
    v.space = SHARED;
    if (unsized) {
      v.address = ~0ull;
      if (k_) k_->has_dynamic = true, v.address = DYNAMIC_AT;
    } else if (k_) {
      place_shared(v, align);
    } else {
      v.address = align;  // placed in each kernel that names it
    }
  } else if (space == ".local" || space == ".param") {
    v.space = LOCAL;
    v.address = round_up(k_->local_bytes, std::max<u64>(align, 8));
    k_->local_bytes = u32(v.address + v.size);
  } else {
    v.space = space == ".const" ? CONST : GLOBAL;
    mod_.storage.push_back(std::make_unique<vector<u8>>(v.size + align));
    v.address = round_up(u64(mod_.storage.back()->data()), align);
    if (!v.init.empty()) memcpy(reinterpret_cast<void*>(v.address), v.init.data(), v.size);
    add_alloc(reinterpret_cast<void*>(v.address), v.size, name, space == ".const", true);
  }
  into[name] = v;
}
void Parser::place_shared(Variable& v, u64 align) {  // with a gap of 16 bytes that no access may touch
  v.address = round_up(k_->shared_static, align);
  k_->shared_vars.push_back({u32(v.address), u32(v.address + v.size)});
  k_->shared_static = u32(v.address + v.size + 16);
}
Param Parser::parameter(u32 offset) {
  expect(".param");
  u32 align = 1;
  Ty ty = B8;
  while (peek()[0] == '.') {
    const string s = next().substr(1);
    if (s == "align")
      align = u32(std::stoul(next()));
    else if (type_names.count(s))
      ty = type_names.at(s);
  }
  Param p{next(), 0, u32(size_of(ty))};
  p.off = u32(round_up(offset, std::max(align, p.size)));
  if (take("[")) {
    p.size *= u32(std::stoul(next()));
    expect("]");
  }
  return p;
}
void Parser::entry() {
  next();
  Kernel& kernel = mod_.kernels[peek()];
  kernel = Kernel();
  k_ = &kernel;
  k_->name = next();
  k_->files = &mod_.files;
  scopes_.assign(1, {});
  locals_.clear(), placed_.clear(), labels_.clear(), constants_.clear(), target_lists_.clear(), prefix_.clear();
  if (take("("))
    while (!take(")")) {
      if (take(",")) continue;
      k_->params.push_back(parameter(k_->param_bytes));
      k_->param_bytes = k_->params.back().off + k_->params.back().size;
    }
  while (peek() != "{" && peek() != ";") {
    const string s = next();
    const auto product = [&] {
      u32 n = u32(std::stoul(next()));
      while (take(",")) n *= u32(std::stoul(next()));
      return n;
    };
    if (s == ".reqnctapercluster") {
      k_->cluster = u32(std::stoul(peek()));
      if (product() != k_->cluster) k_->error = "UNSUPPORTED: clusters along y or z";
    } else if (s == ".maxntid") {
      k_->max_threads = product();
    } else if (s == ".reqntid") {
      k_->exact_threads = product();
    }
  }
  if (!take(";")) {
    for (u32& s : k_->special) s = add_register(128);
    const size_t at = at_;
    try {
      next();
      scopes_.emplace_back();
      body("");
      for (Ins& i : k_->code) {
        const auto place = [&](const string& label) {
          if (!labels_.count(label)) throw Unsupported("UNSUPPORTED: label " + label);
          return labels_[label];
        };
        if (i.kind == BRA) i.target = place(i.label);
        if (i.kind == BRX)
          for (auto& l : target_lists_[i.label]) i.targets.push_back(place(l));
      }
      Ins end;
      end.kind = RET, end.name = "end", end.cls = CONTROL;
      k_->code.push_back(end);
    } catch (std::exception& e) {  // the others of the file can still run
      k_->error = e.what();
      at_ = at, depth_ = 0;
      skip_braces();
    }
  }
  k_ = nullptr;
}
void Parser::body(const string& end_label) {
  for (int depth = 1; depth;) {
    const string s = peek();
    if (s == "{") {
      at_++, depth++;
      scopes_.emplace_back();
    } else if (s == "}") {
      at_++, depth--;
      scopes_.pop_back();
    } else if (s == ".reg") {
      registers();
    } else if (s == ".shared" || s == ".local" || s == ".param") {
      variable(locals_);
    } else if (s == ".loc") {
      file_ = std::stoi(peek(1)), line_ = std::stoi(peek(2)), from_line_ = 0;
      for (size_t q = at_, line = t_[at_].line; q + 2 < t_.size() && size_t(t_[q].line) == line; q++)
        if (t_[q].text == "inlined_at") from_file_ = std::stoi(t_[q + 1].text), from_line_ = std::stoi(t_[q + 2].text);
      skip_line();
    } else if (s == ".pragma") {
      while (next() != ";") {
      }
    } else if (peek(1) == ":") {
      at_ += 2;
      if (take(".branchtargets")) {
        auto& list = target_lists_[prefix_ + s];
        while (!take(";"))
          if (!take(",")) list.push_back(prefix_ + next());
      } else if (peek() == ".callprototype") {
        fail("an indirect call");
      } else {
        labels_[prefix_ + s] = int(k_->code.size());
      }
    } else if (s.empty()) {
      fail("the file's end in a kernel");
    } else {
      instruction(end_label);
    }
  }
}
void Parser::registers() {
  next();
  const Ty ty = type_names.at(next().substr(1));
  const Reg r{0, u8(ty == PRED ? 4 : size_of(ty)), ty == PRED};
  do {
    const string name = next();
    if (take("<")) {
      const int n = std::stoi(next());
      expect(">");
      for (int i = 0; i < n; i++) scopes_.back()[name + std::to_string(i)] = r;
    } else {
      scopes_.back()[name] = r;
    }
  } while (take(","));
  expect(";");
}
// A call: the function's body here, its parameters in the caller's variables.
void Parser::expand(const string& function, const vector<string>& arguments, const vector<string>& results) {
  if (!functions_.count(function)) fail("a call of " + function + ", which has no body here,");
  if (++depth_ > 16) fail("recursion of " + function);
  const auto saved_at = at_;
  const auto saved_locals = locals_;
  const auto saved_prefix = prefix_;
  const int saved_file = file_, saved_line = line_;
  at_ = functions_[function] + 1;
  const auto bind = [&](const vector<string>& actual) {
    size_t n = 0;
    while (!take(")")) {
      if (take(",")) continue;
      const Param p = parameter(0);
      auto it = n < actual.size() ? saved_locals.find(actual[n]) : saved_locals.end();
      if (it == saved_locals.end()) fail("an argument of " + function);
      locals_[p.name] = it->second;
      n++;
    }
  };
  if (take("(")) bind(results);
  next();
  if (take("(")) bind(arguments);
  while (!take("{")) next();
  prefix_ = std::to_string(++expansions_) + "/";
  const string end = prefix_ + "end";
  scopes_.emplace_back();
  body(end);
  labels_[end] = int(k_->code.size());
  at_ = saved_at, locals_ = saved_locals, prefix_ = saved_prefix, file_ = saved_file, line_ = saved_line;
  depth_--;
}

// ---------------------------------------------------------------------------------------------------------------------
// Operands

Parser::Reg* Parser::find_reg(const string& s) {
  for (auto it = scopes_.rbegin(); it != scopes_.rend(); ++it) {
    auto f = it->find(s);
    if (f == it->end()) continue;
    if (!f->second.off) f->second.off = add_register(32 * f->second.size);  // 0: a special register is there
    return &f->second;
  }
  return nullptr;
}
Src Parser::reg(const string& s) {
  Src r;
  if (s == "_") return r;
  if (s == "%clock64" || s == "%globaltimer") return constant(0, 8);
  const auto it = special.find(s);
  if (it != special.end()) {
    r.off = k_->special[it->second], r.size = 4;
    return r;
  }
  Reg* f = find_reg(s);
  if (!f) fail("register " + s);
  r.off = f->off, r.size = f->size, r.pred = f->pred;
  return r;
}
const Variable* Parser::find_var(const string& s) {
  auto it = locals_.find(s);
  if (it != locals_.end()) return &it->second;
  it = placed_.find(s);
  if (it != placed_.end()) return &it->second;
  it = mod_.variables.find(s);
  if (it == mod_.variables.end()) return nullptr;
  if (it->second.space != SHARED) return &it->second;
  Variable v = it->second;
  if (v.address == ~0ull)
    k_->has_dynamic = true, v.address = DYNAMIC_AT;
  else
    place_shared(v, v.address);
  return &(placed_[s] = v);
}
Src Parser::operand(Ty ty) {
  if (ty == PRED) {
    const bool negated = take("!");
    take("-");  // nvcc writes mov.pred %p, -1
    Src s;
    if (is_number(peek()))
      s = constant(std::stoi(next()) ? ~0u : 0, 4), s.pred = true;
    else
      s = reg(next());
    s.negated = negated;
    return s;
  }
  const bool negative = take("-");
  const string s = next();
  if (is_number(s)) return constant(number(s, ty, negative), size_of(ty));
  if (s == "WARP_SZ") return constant(32, size_of(ty));
  if (s[0] != '%' && s != "_") {
    for (auto& p : k_->params)
      if (p.name == s) return constant(p.off, std::max(4, size_of(ty)));
    if (const Variable* v = find_var(s)) {
      const i64 offset = take("+") ? i64(number(next(), S64)) : 0;
      return constant(v->address + offset, std::max(4, size_of(ty)));
    }
  }
  return reg(s);
}
Space Parser::address_operand(i64& offset, Src& base) {
  expect("[");
  const string s = next();
  Space space = GENERIC;
  offset = 0;
  const auto param = std::find_if(k_->params.begin(), k_->params.end(), [&](auto& p) { return p.name == s; });
  if (is_number(s)) {
    offset = i64(number(s, S64));
  } else if (param != k_->params.end()) {
    offset = param->off, space = PARAM;
  } else if (const Variable* v = s[0] == '%' ? nullptr : find_var(s)) {
    offset = i64(v->address), space = v->space;
  } else {
    base = reg(s);
  }
  while (peek() == "+" || peek() == "-") {
    bool negative = next() == "-";
    if (take("-")) negative = !negative;
    offset += i64(number(next(), S64, negative));
  }
  expect("]");
  return space;
}
vector<Src> Parser::vector_operand(Ty ty) {
  if (!take("{")) return {operand(ty)};
  vector<Src> v;
  do v.push_back(operand(ty));
  while (take(","));
  expect("}");
  return v;
}

}  // namespace ptxsim
