// Per-token log-probabilities of given labels from logits, and the gradient back to the logits.
//
// z = multiplier * v, with v = x (no softcap) or v = tanh(x * tanh_scale); the multiplier folds scale, softcap and
// temperature. The forward keeps lse = log sum_v exp(z_v) as a pair in the domain of v:
//   lse = multiplier * lse_hi + lse_lo,
// so that p_v = exp(multiplier * (v - lse_hi) - lse_lo) stays exact when all logits share a large offset.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace fastpref {

struct LogitRows {  // row (i, j) begins at data + i * outer_stride + j * inner_stride (elements); columns are
                    // contiguous
  void* data;
  DType dtype;
  int64_t outer, inner;
  int64_t outer_stride, inner_stride;
  int64_t vocab;
  int64_t rows() const { return outer * inner; }
  int64_t offset(int64_t row) const { return row / inner * outer_stride + row % inner * inner_stride; }
};

struct LogitTransform {
  double multiplier;  // > 0: scale / temperature, or softcap / temperature
  float tanh_scale;   // scale / softcap; 0: no softcap
  double slope() const { return tanh_scale != 0 ? multiplier * tanh_scale : multiplier; }  // dz/dx at v = 0
};

struct Integers {    // as the caller has them
  const void* data;  // nullptr: none
  bool is_int32;     // or int64
};

// The token that each row predicts: labels of `sequences` times `tokens` rows, or packed, of `tokens` rows in all.
struct TokenLabels {
  Integers labels;
  Integers cu_seqlens;  // [sequences + 1], or none: not packed
  Integers lengths;     // [sequences], or none; labels at later positions are ignored
  int64_t ignore_index, sequences, tokens;
  bool shift;  // the target of a row is the next label of its sequence, and the last row is ignored
};

struct TokenLogpsForward {
  LogitRows logits;
  LogitTransform transform;
  const int64_t* labels;  // [rows]
  int64_t ignore_index;
  float* logps;  // [rows], 0 where ignored
  float* lse;    // [2, rows]: hi, lo; 0 where ignored
  float* stats;  // [4, rows]: entropy, log sum p^2, mean logit, top-1 hit; or nullptr
};

struct TokenLogpsBackward {
  LogitRows logits;
  LogitTransform transform;
  const int64_t* labels;
  int64_t ignore_index;
  const float* logps;  // [rows]
  const float* lse;    // [2, rows]
  const float* grad;   // [rows]: gradient of the loss by each log-prob
  LogitRows out;       // shape of logits, and their dtype, or 16 bits of float32 logits; may be the same memory
};

// As above, with labels as the caller has them, and a gradient of each row (row_grad) or of each sequence.
struct LogitsGradient {
  LogitRows logits;
  LogitTransform transform;
  TokenLabels labels;
  const float* logps;
  const float* lse;
  const float* row_grad;           // [rows], or nullptr: coefficients[sequence] * loss_grad
  const float* coefficients;       // [sequences]
  const float* tail_coefficients;  // [sequences]: added to them from the token tail_begin on; or nullptr
  const int64_t* tail_begin;       // [sequences]
  const float* loss_grad;          // [1], or of each pair: sequences 0 and S/2, 1 and S/2 + 1, ...
  bool grad_per_pair;
  LogitRows out;
};

// CPU. A label outside [0, vocab) that is not ignore_index throws std::invalid_argument.
void token_logps_fwd_cpu(const TokenLogpsForward& args, int threads);
void token_logps_bwd_cpu(const TokenLogpsBackward& args, int threads);

// CUDA, on `stream` of the current device. An invalid label gives NaN and reads nothing out of bounds.
int64_t token_logps_workspace_cuda(const TokenLogpsForward& args);  // bytes
void token_logps_fwd_cuda(const TokenLogpsForward& args, void* workspace, void* stream);
void token_logps_bwd_cuda(const TokenLogpsBackward& args, void* stream);
void logits_gradient_cuda(const LogitsGradient& args, void* stream);

}  // namespace fastpref
