// Bradley-Terry scores w from pairwise data, by iteratively reweighted least squares (logits) or reweighted Newton
// steps (win counts) on the weighted Laplacian of the comparison graph. See fastpref/_lowrank/bradley_terry.py for the
// model.
#pragma once
#include <cstdint>

namespace fastpref {

enum class BradleyTerryData : int { logits = 0, counts = 1, counts_mle = 2 };

// Columns of the statistics of one solve.
enum BradleyTerryStat : int {
  bt_iterations,
  bt_converged,
  bt_scale,         // 1.4826 median of |residual|: logits in their unit, counts standardised; NaN without data
  bt_outlier_rate,  // share of the pairs beyond the threshold
  bt_gradient,      // largest |gradient| / degree, in units of the mean |logit| (counts: in logits)
  bt_constant,      // final constant of the Cauchy weights; 0 for plain maximum likelihood
  bt_threshold,     // |residual| beyond which a pair counts as an outlier
  bt_ridge,         // ridge in use
  bt_worst,      // logits: largest |m_ij + m_ji| (NaN: one of the two is missing); counts: a negative or infinite one
  bt_worst_row,  // its position, -1: none seen
  bt_worst_column,
  bt_largest,  // largest |logit|, infinite if one is
  bt_stats
};

struct BradleyTerryOptions {
  BradleyTerryData data;
  double tol;
  int64_t max_iter;
};

struct BradleyTerryOutputs {
  double* scores;       // [items], 0-mean per component, NaN without comparisons
  int64_t* components;  // [items]
  double* rejected;     // [items], share of the item's pairs that are outliers
  double* stats;        // [bt_stats]
};

struct BradleyTerryDense {
  const void* matrix;  // [batch, items, items], contiguous
  bool is_double;
  int64_t batch, items;
  BradleyTerryOptions options;
  BradleyTerryOutputs out;  // of the first matrix; the others follow
  void* workspace;          // [slots, bradley_terry_workspace(items, is_double)] bytes
  int64_t slots;
};

struct BradleyTerryEdges {  // both directions of every pair, rows in order
  const int64_t* offsets;   // [items + 1]
  const int32_t* columns;   // [entries]
  const double* values;     // [entries]: logit, or share of the votes won
  const double* votes;      // [entries]: votes of the pair; nullptr for logits
  int64_t items;
  BradleyTerryOptions options;
  BradleyTerryOutputs out;
  double* weights;  // [entries]
  double* vectors;  // [14, items]
  int threads;
};

int64_t bradley_terry_workspace(int64_t items, bool is_double);
void bradley_terry_dense_cpu(const BradleyTerryDense& args, int threads);
void bradley_terry_edges_cpu(const BradleyTerryEdges& args);

}  // namespace fastpref
