#include "machine.h"

using namespace ptxsim;

namespace ptxsim {
Options opt;
namespace {
vector<string> findings;
std::set<string> finding_keys;
string text;

long* option(const string& name) {
  static const std::map<string, long*> options = {// by README.md's names
                                                  {"seed", &opt.seed},
                                                  {"race", &opt.race},
                                                  {"init", &opt.init},
                                                  {"ulp", &opt.ulp},
                                                  {"quantum", &opt.quantum},
                                                  {"collide", &opt.collide},
                                                  {"resident", &opt.resident},
                                                  {"ledger", &opt.ledger},
                                                  {"max_findings", &opt.max_findings},
                                                  {"sms", &opt.sms},
                                                  {"shared_limit", &opt.shared_limit},
                                                  {"max_steps", &opt.max_steps},
                                                  {"mma_bits", &opt.mma_bits}};
  auto it = options.find(name);
  return it == options.end() ? nullptr : it->second;
}
}  // namespace
void finding(const string& key, const string& what) {
  if (finding_keys.insert(key).second && long(findings.size()) < opt.max_findings) findings.push_back(what);
}
}  // namespace ptxsim

extern "C" {
PtxModule* ptxsim_load(const char* ptx) {
  auto m = std::make_unique<PtxModule>();
  try {
    parse(ptx, *m);
  } catch (std::exception& e) {
    findings.push_back(e.what());
    return nullptr;
  }
  return m.release();
}
int ptxsim_register(void* base, uint64_t bytes, const char* name, int readonly) {
  return add_alloc(base, bytes, name, readonly, false);
}
void ptxsim_unregister(void* base) {
  begin_launch_memory();
  allocs.erase(u64(base));
}
void ptxsim_clear() {
  begin_launch_memory();
  for (auto it = allocs.begin(); it != allocs.end();) it = it->second.module ? std::next(it) : allocs.erase(it);
}
int ptxsim_launch(PtxModule* m, const char* entry, const PtxLaunch* shape, void** args) {
  const size_t before = finding_keys.size();
  try {
    launch(*m, entry, *shape, args);
  } catch (std::exception& e) {
    std::fesetround(FE_TONEAREST);
    findings.push_back(e.what());
    return 2;
  }
  return finding_keys.size() > before;
}
const char* ptxsim_report() {
  text.clear();
  for (auto& f : findings) text += f + "\n";
  return text.c_str();
}
void ptxsim_reset() {
  findings.clear();
  finding_keys.clear();
}
int ptxsim_option(const char* name, long value) {
  long* o = option(name);
  if (o) *o = value;
  return o != nullptr;
}
const char* ptxsim_ledger() {
  text = ledger_json();
  return text.c_str();
}
long ptxsim_kernel_info(PtxModule* m, const char* entry, const char* what) {
  auto it = m->kernels.find(entry);
  if (it == m->kernels.end()) return -1;
  const Kernel& k = it->second;
  const string w = what;
  return w == "shared"        ? k.shared_used()
         : w == "local"       ? k.local_bytes
         : w == "params"      ? k.param_bytes
         : w == "cluster"     ? k.cluster
         : w == "max_threads" ? (k.max_threads ? k.max_threads : 1024)
                              : -1;
}
}
