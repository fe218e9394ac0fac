// Pair losses of the rating-aware logistic family, fused behind the gather and before the scatter of token_logps:
//   loss = a softplus(-z) + b softplus(z) + c/2 (L - m)^2,   L = beta (logratio_chosen - logratio_rejected),
//   z = L - offset g,  m = m0 + m1 g,  g the rating gap.
// DPO, conservative and robust DPO, RDPO, RIPO, ML-RDPO, DDPO and IPO on sums are its corners.
#pragma once
#include <cmath>

#include "token_logps.h"

#ifdef __CUDACC__
#define FASTPREF_HOST_DEVICE __host__ __device__
#else
#define FASTPREF_HOST_DEVICE
#endif

namespace fastpref {

struct LogisticFamily {
  double beta, a, b, c, m0, m1, offset;
  bool drop_square_when_unrated;  // a NaN gap counts as 0; with this the square goes too
};

enum class Reduction { mean, sum, none };

// Sequences 0 to B - 1 are chosen, B to 2 B - 1 rejected, in the same order.
struct PreferenceForward {
  LogitRows logits, reference;  // reference.data == nullptr: no live reference
  LogitTransform transform;
  TokenLabels labels;
  bool stats;
  const float* ref_token_logps;  // [rows] or nullptr
  const float* ref_logps;        // [2 B] or nullptr
  const float* rating_gap;       // [B] or nullptr
  const float* pair_weights;     // [B] or nullptr
  Reduction reduction;
  const float* num_items_tensor;  // [1] or nullptr: replaces the mean's divisor, the sum of the weights
  double num_items;               // 0, or the same as a number
  LogisticFamily family;
  float* loss;          // [1], or [B] unreduced
  float* losses;        // [B] before weights
  float* logps;         // [2 B] sums of log-probs
  float* rewards;       // [2 B] beta times the sums of per-token policy - reference
  float* margins;       // [B]
  int64_t* lengths;     // [2 B] tokens that count
  float* coefficients;  // [2 B] derivative of the reduced loss, or of the pair's, by the sequence's log-prob
  float* metrics;       // [7] accuracy; with stats also the means of entropy, log sum p^2 and top-1 over all tokens, of
                        // the mean logit over chosen and over rejected tokens, of top-1 over chosen tokens
  int64_t* counts;      // [3] ties, unrated pairs, invalid labels
  double* stat_sums;  // [2 B, 4] sums over tokens of entropy, log sum p^2, mean logit and top-1; nullptr without stats
  float* tail;        // [2 B] sums of policy - reference over the tail: the tokens that count beyond as many as the
                      // pair's shorter sequence has; or nullptr: not asked for. Not with ref_logps.
  int64_t* tail_begin;  // [2 B] place in its sequence of the tail's first token; behind the last one where it has none
  float* token_logps;   // [rows]
  float* lse;           // [2, rows]
  float* token_stats;   // CPU: [4, rows], workspace of the stats
  int64_t pairs() const { return labels.sequences / 2; }
};

struct PairLoss {
  double loss, slope;  // slope: by the difference of the two log-ratios
};

FASTPREF_HOST_DEVICE inline double softplus(double x) {
  return std::fmax(x, 0.0) + std::log1p(std::exp(-std::fabs(x)));
}

FASTPREF_HOST_DEVICE inline double sigmoid(double x) {
  const double e = std::exp(-std::fabs(x));
  return (x > 0 ? 1.0 : e) / (1.0 + e);
}

// gap: nullptr, or NaN, where there is no rating.
FASTPREF_HOST_DEVICE inline PairLoss pair_loss(const LogisticFamily& f, float chosen_logratio, float rejected_logratio,
                                               const float* gap) {
  const double L = f.beta * (double(chosen_logratio) - double(rejected_logratio));
  const bool rated = gap && *gap == *gap;
  const double g = rated ? *gap : 0.0, c = rated || !f.drop_square_when_unrated ? f.c : 0.0;
  // a term with weight 0 is left out: 0 * inf would not be 0
  const double z = f.offset != 0 ? L - f.offset * g : L;
  const double error = L - (f.m1 != 0 ? f.m0 + f.m1 * g : f.m0);
  double loss = 0, slope = 0;
  if (f.a != 0) loss += f.a * softplus(-z), slope -= f.a * sigmoid(-z);
  if (f.b != 0) loss += f.b * softplus(z), slope += f.b * sigmoid(z);
  if (c != 0) loss += 0.5 * c * error * error, slope += c * error;
  return {loss, f.beta * slope};
}

// What the losses are divided by. total_weight: of all pairs.
FASTPREF_HOST_DEVICE inline double divisor_of(const PreferenceForward& args, double total_weight) {
  if (args.reduction != Reduction::mean) return 1;
  if (args.num_items_tensor) return *args.num_items_tensor;
  if (args.num_items != 0) return args.num_items;
  return total_weight == 0 ? 1 : total_weight;
}

struct PreferenceBackward {
  TokenLogpsBackward tokens;  // tokens.grad is written here: [rows]
  float* token_grad;          // [rows] workspace behind tokens.grad
  const int64_t* cu_seqlens;
  int64_t pairs, tokens_per_sequence;
  const float* coefficients;       // [2 B]
  const float* tail_coefficients;  // [2 B]: added to them from the token tail_begin on; or nullptr
  const int64_t* tail_begin;       // [2 B]
  const float* grad_loss;          // [1], or [B] unreduced
  bool grad_per_pair;
};

// Whole pairs whose tokens' log-probs are known, pairs [begin, end) of B: their losses, and the gradient of each token.
// Sequences of the group are [bounds[0], bounds[1]), ... among its rows, the chosen ones first.
struct PairEpilogue {
  const float* token_logps;  // [rows]
  const int64_t* labels;     // [rows]
  const int64_t* bounds;     // [2 (end - begin) + 1]
  int64_t ignore_index, rows, begin, end, pairs;
  const float* ref_token_logps;  // [rows] or nullptr
  const float* ref_logps;        // [2 B] or nullptr
  const float* rating_gap;       // [B] or nullptr
  const float* scale_of_pair;    // [B]: what each loss is multiplied by before they are added up
  LogisticFamily family;
  float* losses;      // [B] before weights
  float* logps;       // [2 B]
  float* logratios;   // [2 B]
  int64_t* lengths;   // [2 B]
  float* token_grad;  // [rows], of the sum of losses times scale_of_pair; rows of no sequence are left as they are
};

// CPU: labels are int64, neither shifted nor cut by lengths.
void preference_fwd_cpu(const PreferenceForward& args, int threads);
void preference_bwd_cpu(const PreferenceBackward& args, int threads);
void preference_pairs_cpu(const PairEpilogue& args);

// CUDA, on `stream` of the current device. The backward is logits_gradient_cuda.
int64_t preference_workspace_cuda(const PreferenceForward& args);  // bytes
void preference_fwd_cuda(const PreferenceForward& args, void* workspace, void* stream);
void preference_pairs_cuda(const PairEpilogue& args, void* stream);

}  // namespace fastpref
