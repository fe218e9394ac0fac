// The pair epilogue on the CPU: a few vectors of the length of the batch, in double, between one gather and one
// scatter.
#include "preference.h"

#include <algorithm>
#include <string>
#include <vector>

#include "check.h"

namespace fastpref {
namespace {

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

struct SequenceSums {
  double logps = 0, logratio = 0;
  int64_t length = 0;  // tokens that count
};

// Of the tokens of one sequence. ref_token_logps: nullptr, or of the same rows; ref_logps: nullptr, or the reference's
// sum.
SequenceSums sum_sequence(Segment tokens, const int64_t* labels, int64_t ignore_index, const float* token_logps,
                          const float* ref_token_logps, const float* ref_logps) {
  SequenceSums sums;
  for (int64_t t = tokens.begin; t < tokens.end; t++) {
    if (labels[t] == ignore_index) continue;
    const double logp = token_logps[t];
    sums.length++;
    sums.logps += logp;
    sums.logratio += ref_token_logps ? logp - double(ref_token_logps[t]) : logp;
  }
  if (ref_logps) sums.logratio = sums.logps - double(*ref_logps);
  return sums;
}

// Returns the place, within the segment, of the token that counts and has exactly `before` such tokens before it; the
// segment's length if there is none.
int64_t place_behind(Segment tokens, const int64_t* labels, int64_t ignore_index, int64_t before) {
  for (int64_t t = tokens.begin; t < tokens.end; t++)
    if (labels[t] != ignore_index && before-- == 0) return t - tokens.begin;
  return tokens.end - tokens.begin;
}

struct SideStats {  // of the tokens of all chosen, or all rejected sequences
  int64_t count = 0;
  double sums[4] = {};
};

void finish_stats(const PreferenceForward& args) {
  SideStats sides[2];
  for (int64_t s = 0; s < args.labels.sequences; s++) {
    SideStats& side = sides[s >= args.pairs()];
    side.count += args.lengths[s];
    for (int i = 0; i < 4; i++) side.sums[i] += args.stat_sums[4 * s + i];
  }
  const SideStats &chosen = sides[0], &rejected = sides[1];
  const auto mean = [](double sum, int64_t count) { return static_cast<float>(sum / double(count > 0 ? count : 1)); };
  const auto mean_of_all = [&](int i) {
    return mean(chosen.sums[i] + rejected.sums[i], chosen.count + rejected.count);
  };
  args.metrics[1] = mean_of_all(0);
  args.metrics[2] = mean_of_all(1);
  args.metrics[3] = mean_of_all(3);
  args.metrics[4] = mean(chosen.sums[2], chosen.count);
  args.metrics[5] = mean(rejected.sums[2], rejected.count);
  args.metrics[6] = mean(chosen.sums[3], chosen.count);
}

}  // namespace

void preference_fwd_cpu(const PreferenceForward& args, int threads) {
  const TokenLabels& from = args.labels;
  const int64_t pairs = args.pairs(), rows = args.logits.rows();
  const auto labels = static_cast<const int64_t*>(from.labels.data);
  const auto cu_seqlens = static_cast<const int64_t*>(from.cu_seqlens.data);
  check(!from.labels.is_int32 && !from.cu_seqlens.is_int32 && !from.shift && !from.lengths.data,
        "labels must be int64 and aligned with the logits");
  check_segments(cu_seqlens, from.sequences, rows);
  const float* ref_token_logps = args.ref_token_logps;
  std::vector<float> reference(args.reference.data ? 3 * rows : 0);
  if (args.reference.data) {
    token_logps_fwd_cpu(
        {args.reference, args.transform, labels, from.ignore_index, reference.data(), reference.data() + rows, nullptr},
        threads);
    ref_token_logps = reference.data();
  }
  token_logps_fwd_cpu({args.logits, args.transform, labels, from.ignore_index, args.token_logps, args.lse,
                       args.stats ? args.token_stats : nullptr},
                      threads);

  std::vector<float> logratios(from.sequences);
  for (int64_t s = 0; s < from.sequences; s++) {
    const Segment tokens = tokens_of(cu_seqlens, from.tokens, s);
    const SequenceSums sums = sum_sequence(tokens, labels, from.ignore_index, args.token_logps, ref_token_logps,
                                           args.ref_logps ? args.ref_logps + s : nullptr);
    for (int i = 0; args.stats && i < 4; i++) {
      double& sum = args.stat_sums[4 * s + i] = 0;
      for (int64_t t = tokens.begin; t < tokens.end; t++)
        if (labels[t] != from.ignore_index) sum += args.token_stats[i * rows + t];
    }
    args.logps[s] = static_cast<float>(sums.logps);
    logratios[s] = static_cast<float>(sums.logratio);
    args.rewards[s] = static_cast<float>(args.family.beta) * logratios[s];
    args.lengths[s] = sums.length;
  }
  for (int64_t s = 0; args.tail && s < from.sequences; s++) {
    const Segment tokens = tokens_of(cu_seqlens, from.tokens, s);
    const int64_t shorter = std::min(args.lengths[s], args.lengths[s < pairs ? s + pairs : s - pairs]);
    args.tail_begin[s] = place_behind(tokens, labels, from.ignore_index, shorter);
    const Segment tail{tokens.begin + args.tail_begin[s], tokens.end};
    const SequenceSums sums = sum_sequence(tail, labels, from.ignore_index, args.token_logps, ref_token_logps, nullptr);
    args.tail[s] = static_cast<float>(sums.logratio);
  }

  double loss = 0, total_weight = 0;
  int64_t right = 0, ties = 0, unrated = 0;
  for (int64_t p = 0; p < pairs; p++) {
    const float* gap = args.rating_gap ? args.rating_gap + p : nullptr;
    const double weight = args.pair_weights ? args.pair_weights[p] : 1.0;
    const PairLoss found = pair_loss(args.family, logratios[p], logratios[pairs + p], gap);
    args.losses[p] = static_cast<float>(found.loss);
    args.coefficients[p] = static_cast<float>(found.slope);
    args.margins[p] = args.rewards[p] - args.rewards[pairs + p];
    loss += weight * double(args.losses[p]);
    total_weight += weight;
    right += args.margins[p] > 0, ties += args.margins[p] == 0;
    unrated += gap && std::isnan(*gap);
  }
  const double divisor = divisor_of(args, total_weight);
  for (int64_t p = 0; p < pairs; p++) {
    const double weight = args.pair_weights ? args.pair_weights[p] : 1.0;
    if (args.reduction == Reduction::none) args.loss[p] = static_cast<float>(weight * double(args.losses[p]));
    args.coefficients[p] = static_cast<float>(double(args.coefficients[p]) * (weight / divisor));
    args.coefficients[pairs + p] = -args.coefficients[p];
  }
  if (args.reduction != Reduction::none) args.loss[0] = static_cast<float>(loss / divisor);
  args.metrics[0] = static_cast<float>(right) / static_cast<float>(pairs > 0 ? pairs : 1);
  args.counts[0] = ties, args.counts[1] = unrated, args.counts[2] = 0;  // an invalid label has thrown
  if (args.stats) finish_stats(args);
}

void preference_bwd_cpu(const PreferenceBackward& args, int threads) {
  const int64_t sequences = 2 * args.pairs;
  check_segments(args.cu_seqlens, sequences, args.tokens.logits.rows());
  for (int64_t s = 0; s < sequences; s++) {
    const Segment tokens = tokens_of(args.cu_seqlens, args.tokens_per_sequence, s);
    const int64_t tail =
        args.tail_coefficients ? std::clamp(tokens.begin + args.tail_begin[s], tokens.begin, tokens.end) : tokens.end;
    const float grad_loss = args.grad_loss[args.grad_per_pair ? s % args.pairs : 0];
    const float gradient = args.coefficients[s] * grad_loss;
    std::fill(args.token_grad + tokens.begin, args.token_grad + tail, gradient);
    if (tail < tokens.end)
      std::fill(args.token_grad + tail, args.token_grad + tokens.end,
                (args.coefficients[s] + args.tail_coefficients[s]) * grad_loss);
  }
  token_logps_bwd_cpu(args.tokens, threads);
}

void preference_pairs_cpu(const PairEpilogue& args) {
  const int64_t group = args.end - args.begin;
  const auto sequence_of = [&](int side, int64_t p) { return side * args.pairs + args.begin + p; };
  for (int64_t p = 0; p < group; p++) {
    const int64_t pair = args.begin + p;
    for (int side = 0; side < 2; side++) {
      const int64_t sequence = sequence_of(side, p);
      const SequenceSums sums = sum_sequence({args.bounds[side * group + p], args.bounds[side * group + p + 1]},
                                             args.labels, args.ignore_index, args.token_logps, args.ref_token_logps,
                                             args.ref_logps ? args.ref_logps + sequence : nullptr);
      args.logps[sequence] = static_cast<float>(sums.logps);
      args.logratios[sequence] = static_cast<float>(sums.logratio);
      args.lengths[sequence] = sums.length;
    }
    const PairLoss found = pair_loss(args.family, args.logratios[sequence_of(0, p)], args.logratios[sequence_of(1, p)],
                                     args.rating_gap ? args.rating_gap + pair : nullptr);
    args.losses[pair] = static_cast<float>(found.loss);
    const float chosen = static_cast<float>(found.slope * args.scale_of_pair[pair]);
    for (int side = 0; side < 2; side++)
      for (int64_t row = args.bounds[side * group + p]; row < args.bounds[side * group + p + 1]; row++)
        args.token_grad[row] = args.labels[row] == args.ignore_index ? 0.0f : side == 0 ? chosen : -chosen;
  }
}

}  // namespace fastpref
