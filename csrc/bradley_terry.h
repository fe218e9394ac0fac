// Robust Bradley-Terry fits of many small matrices: logits M[i][j] ~ w_i - w_j, or win counts W[i][j] with
// P(i beats j) = sigmoid(w_i - w_j). Each matrix is solved whole, in cache, by one thread, and stops on its own.
#pragma once
#include <cstdint>

namespace fastpref {

constexpr int64_t bradley_terry_info = 6;

struct BradleyTerry {
  const void* data;  // [batch, items, items] logits (skew, NaN: not compared) or wins; float or double
  bool is_double, counts, robust;
  int64_t batch, items;
  int64_t max_iter;
  double tol;           // of the largest change of a score, relative to mean |M| (logits) or absolute (counts)
  double ridge;         // on counts
  void* scores;         // [batch, items] of data's type; centred per component; NaN: an item without comparisons
  float* rejected;      // [batch, items] share of the item's comparisons that are outliers
  int64_t* components;  // [batch, items] labels 0, 1, ... in the order of their first items
  double* info;         // [batch, 6] iterations, converged, scale of the residuals, share of pairs rejected; row and
                        // column of a logit that its mirror image contradicts, or -1
  void* workspace;      // threads * bradley_terry_workspace(items, is_double) bytes
};

int64_t bradley_terry_workspace(int64_t items, bool is_double);
void bradley_terry_cpu(const BradleyTerry& args, int threads);

}  // namespace fastpref
