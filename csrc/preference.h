// Pair losses of the rating-aware logistic family, fused behind the gather and before the scatter of token_logps:
//   loss = a softplus(-z) + b softplus(z) + c/2 (L - m)^2,   L = beta (logratio_chosen - logratio_rejected),
//   z = L - offset g,  m = m0 + m1 g,  g the rating gap.
// DPO, conservative and robust DPO, RDPO, RIPO, ML-RDPO, DDPO and IPO on sums are its corners.
#pragma once
#include "token_logps.h"

namespace fastpref {

struct LogisticFamily {
  double beta, a, b, c, m0, m1, offset;
  bool drop_square_when_unrated;  // a NaN gap counts as 0; with this the square goes too
};

struct PreferenceForward {
  TokenLogpsForward policy;
  TokenLogpsForward reference;   // logits.data == nullptr: no live reference
  const float* ref_token_logps;  // [rows] or nullptr
  const float* ref_logps;        // [2 pairs] or nullptr
  const int64_t* cu_seqlens;     // [2 pairs + 1], or nullptr: sequences of tokens_per_sequence rows
  int64_t pairs, tokens_per_sequence;
  const float* rating_gap;  // [pairs] or nullptr
  LogisticFamily family;
  float* logps;         // [2 pairs] sums of log-probs; the first half of the sequences is chosen, the second rejected
  float* logratios;     // [2 pairs] sums of per-token policy - reference
  int64_t* lengths;     // [2 pairs] tokens that count
  float* losses;        // [pairs]
  float* coefficients;  // [2 pairs] derivative of the pair's loss by the sequence's log-prob
};

struct PreferenceBackward {
  TokenLogpsBackward tokens;  // tokens.grad is written here: [rows]
  float* token_grad;          // [rows] workspace behind tokens.grad
  const int64_t* cu_seqlens;
  int64_t pairs, tokens_per_sequence;
  const float* coefficients;  // [2 pairs]
  const float* grad_losses;   // [pairs]
};

void preference_fwd_cpu(const PreferenceForward& args, int threads);
void preference_bwd_cpu(const PreferenceBackward& args, int threads);

}  // namespace fastpref
