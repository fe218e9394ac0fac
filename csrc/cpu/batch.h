// Batches of small matrices: each is solved whole by one thread, in memory of that thread's own.
//
// A Solver<T> of T float or double is made of the arguments and a Workspace, from which it takes its arrays, rows
// padded to whole vectors of `lanes`; run(i) solves matrix i.
#pragma once
#include "arith.h"
#include "dispatch.h"
#include "lanes.h"

namespace fastpref {
namespace {

// Takes arrays from memory, one after the other. Without memory it only counts their bytes.
class Workspace {
  char* memory_;
  Parts parts_;

 public:
  explicit Workspace(void* memory = nullptr) : memory_(memory ? aligned(memory) : nullptr) {}

  template <class T>
  T* take(int64_t count) {
    const int64_t at = parts_.take(count * int64_t(sizeof(T)));
    return memory_ ? reinterpret_cast<T*>(memory_ + at) : nullptr;
  }
  int64_t bytes() const { return padded(parts_.bytes); }
};

// SOLVE, one of FASTPREF_DISPATCH's, of each of `count` tasks with a thread's slot of the workspace.
template <auto SOLVE, class Args>
void solve_each(const Args& args, int64_t count, int threads, SimdLevel level = simd_level()) {
  parallel_with_slot(count, threads, [&](int64_t task, int64_t slot) { SOLVE(level, args, task, slot); });
}

}  // namespace
}  // namespace fastpref

namespace fastpref::FASTPREF_SIMD {
namespace {

// Of one thread, on whatever level.
template <template <class> class Solver, class T, class Args>
int64_t workspace_of(const Args& args) {
  Workspace workspace;
  Solver<T>(args, workspace, alignment / int64_t(sizeof(T)));
  return workspace.bytes();
}
template <template <class> class Solver, class Args>
int64_t workspace_bytes(const Args& args) {
  return args.is_double ? workspace_of<Solver, double>(args) : workspace_of<Solver, float>(args);
}

// What a kernel of solve_each does: task `task`, with the memory of `slot`.
template <template <class> class Solver, class T, class Args>
void solve_task_of(const Args& args, int64_t task, int64_t slot) {
  Workspace workspace(static_cast<char*>(args.workspace) + slot * workspace_of<Solver, T>(args));
  Solver<T>(args, workspace, Lanes<T>::n).run(task);
}
template <template <class> class Solver, class Args>
void solve_task(const Args& args, int64_t task, int64_t slot) {
  args.is_double ? solve_task_of<Solver, double>(args, task, slot) : solve_task_of<Solver, float>(args, task, slot);
}

}  // namespace
}  // namespace fastpref::FASTPREF_SIMD
