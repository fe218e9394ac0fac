// The pair epilogue on the CPU: a few vectors of the length of the batch, in double, between one gather and one
// scatter.
#include "preference.h"

#include <cmath>
#include <limits>
#include <string>

#include "check.h"

namespace fastpref {
namespace {

double softplus(double x) { return x > 0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x)); }
double sigmoid(double x) { return x > 0 ? 1 / (1 + std::exp(-x)) : std::exp(x) / (1 + std::exp(x)); }

struct Segment {
  int64_t begin, end;
};

Segment tokens_of(const int64_t* cu_seqlens, int64_t tokens_per_sequence, int64_t sequence) {
  if (cu_seqlens) return {cu_seqlens[sequence], cu_seqlens[sequence + 1]};
  return {sequence * tokens_per_sequence, (sequence + 1) * tokens_per_sequence};
}

void check_segments(const int64_t* cu_seqlens, int64_t sequences, int64_t rows) {
  if (!cu_seqlens) return;
  check(cu_seqlens[0] == 0, "cu_seqlens must start at 0, got " + std::to_string(cu_seqlens[0]));
  for (int64_t s = 0; s < sequences; s++)
    check(cu_seqlens[s] <= cu_seqlens[s + 1], "cu_seqlens must not decrease, got " + std::to_string(cu_seqlens[s]) +
                                                  " then " + std::to_string(cu_seqlens[s + 1]));
  check(cu_seqlens[sequences] == rows, "cu_seqlens must end at the number of tokens " + std::to_string(rows) +
                                           ", got " + std::to_string(cu_seqlens[sequences]));
}

}  // namespace

void preference_fwd_cpu(const PreferenceForward& args, int threads) {
  const int64_t sequences = 2 * args.pairs;
  check_segments(args.cu_seqlens, sequences, args.policy.logits.rows());
  token_logps_fwd_cpu(args.policy, threads);
  const float* ref_token_logps = args.ref_token_logps;
  if (args.reference.logits.data) {
    token_logps_fwd_cpu(args.reference, threads);
    ref_token_logps = args.reference.logps;
  }

  for (int64_t s = 0; s < sequences; s++) {
    const Segment tokens = tokens_of(args.cu_seqlens, args.tokens_per_sequence, s);
    double sum = 0, logratio = 0;
    int64_t length = 0;
    for (int64_t t = tokens.begin; t < tokens.end; t++) {
      if (args.policy.labels[t] == args.policy.ignore_index) continue;
      length++;
      sum += args.policy.logps[t];
      if (ref_token_logps) logratio += double(args.policy.logps[t]) - double(ref_token_logps[t]);
    }
    if (!ref_token_logps) logratio = args.ref_logps ? sum - double(args.ref_logps[s]) : sum;
    args.logps[s] = static_cast<float>(sum);
    args.logratios[s] = static_cast<float>(logratio);
    args.lengths[s] = length;
  }

  const LogisticFamily& f = args.family;
  for (int64_t i = 0; i < args.pairs; i++) {
    const double L = f.beta * (double(args.logratios[i]) - double(args.logratios[args.pairs + i]));
    const bool rated = args.rating_gap && !std::isnan(args.rating_gap[i]);
    const double g = rated ? args.rating_gap[i] : 0.0;
    const double c = rated || !f.drop_square_when_unrated ? f.c : 0.0;
    // a term with weight 0 is left out: 0 * inf would not be 0
    const double z = f.offset != 0 ? L - f.offset * g : L;
    const double error = L - (f.m1 != 0 ? f.m0 + f.m1 * g : f.m0);
    double loss = 0, slope = 0;
    if (f.a != 0) loss += f.a * softplus(-z), slope -= f.a * sigmoid(-z);
    if (f.b != 0) loss += f.b * softplus(z), slope += f.b * sigmoid(z);
    if (c != 0) loss += 0.5 * c * error * error, slope += c * error;
    args.losses[i] = static_cast<float>(loss);
    args.coefficients[i] = static_cast<float>(f.beta * slope);
    args.coefficients[args.pairs + i] = -args.coefficients[i];
  }
}

void preference_bwd_cpu(const PreferenceBackward& args, int threads) {
  const int64_t sequences = 2 * args.pairs;
  check_segments(args.cu_seqlens, sequences, args.tokens.logits.rows());
  for (int64_t s = 0; s < sequences; s++) {
    const Segment tokens = tokens_of(args.cu_seqlens, args.tokens_per_sequence, s);
    const float gradient = args.coefficients[s] * args.grad_losses[s % args.pairs];
    for (int64_t t = tokens.begin; t < tokens.end; t++) args.token_grad[t] = gradient;
  }
  token_logps_bwd_cpu(args.tokens, threads);
}

}  // namespace fastpref
