// Per-token log-probabilities straight from the LM head, z[t, v] = x[t] . W[v] + a[t] . B[v] + bias[v], in bf16 with
// fp32 accumulators. The maximum and the sum over v are taken from the accumulators; only the gradient reads the tile
// of stored logits. The tile is vocabulary-major, [vocab, tile_stride] with tokens contiguous: lanes are tokens.
//
// Transform, lse pair, excluded target column, stats and errors are those of token_logps.h. Results do not depend on
// `threads`. Everything here needs a tile product: where linear_logps_product() is "", the functions throw.
#pragma once
#include <cstdint>

#include "dtype.h"
#include "token_logps.h"

namespace fastpref {

struct LinearProjection {
  const bf16* weight;  // [vocab, hidden_size], rows weight_stride apart, columns contiguous
  int64_t weight_stride;
  const bf16* hidden;   // [rows, hidden_size] contiguous
  const bf16* adapter;  // B [vocab, rank], rows adapter_stride apart; or nullptr
  int64_t adapter_stride;
  const bf16* adapter_hidden;  // a [rows, rank] contiguous; or nullptr
  const float* bias;           // [vocab] or nullptr; -inf masks a column
  int64_t rows, hidden_size, vocab, rank;
};

struct LinearLogpsForward {
  LinearProjection projection;
  LogitTransform transform;
  const int64_t* labels;  // [rows]
  int64_t ignore_index;
  bool round_logits;    // each logit becomes bf16 (to nearest even) before anything else, and so does the tile
  void* tile;           // out, [vocab, tile_stride], aligned to 64 bytes: fp16, or bf16 with round_logits; or nullptr
  int64_t tile_stride;  // a multiple of 32, >= rows; what lies beyond the rows is written too
  float* logps;         // [rows], 0 where ignored
  float* lse;           // [2, rows]: hi, lo; 0 where ignored
  float* stats;         // [4, rows] or nullptr
  void* workspace;      // linear_logps_workspace() bytes
};

struct LinearLogpsBackward {
  void* tile;  // in: logits as the forward left them; out: bf16 gradient before the transform, 0 in [rows, tile_stride)
  bool tile_is_bf16;
  int64_t tile_stride, rows, vocab;
  LogitTransform transform;
  const int64_t* labels;
  int64_t ignore_index;
  const float* logps;  // [rows]
  const float* lse;    // [2, rows]
  const float* grad;   // [rows]: gradient of the loss by each log-prob
};

// "amx", "avx512_bf16", or "" where neither serves: not built, not this processor, or a SIMD level below avx512.
const char* linear_logps_product();
// "auto", "amx", "avx512_bf16" or "none"; throws std::invalid_argument for one that cannot serve.
void set_linear_product(const char* name);

// false: a finite logit is beyond fp16 (|z| > 65504). The log-probabilities are right then, the tile is not.
bool linear_logps_fwd_cpu(const LinearLogpsForward& args, int threads);
int64_t linear_logps_workspace(int64_t rows, int64_t hidden_size, int64_t vocab, int64_t rank, bool stats, int threads);

void linear_logps_bwd_cpu(const LinearLogpsBackward& args, int threads);

// dW: acc [vocab, hidden_size] fp32 = dz [vocab, rows] x [rows, hidden_size], or += to accumulate, with dz as the
// backward left it.
void linear_logps_weight_grad_cpu(const bf16* dz, int64_t tile_stride, int64_t rows, int64_t vocab, const bf16* hidden,
                                  int64_t hidden_size, float* acc, bool accumulate, void* workspace, int threads);
int64_t linear_logps_weight_grad_workspace(int64_t rows, int64_t hidden_size, int threads);

// dX: out [rows, hidden_size] bf16 contiguous = dz^T [rows, vocab] W [vocab, hidden_size].
void linear_logps_hidden_grad_cpu(const bf16* dz, int64_t tile_stride, int64_t rows, int64_t vocab, const bf16* weight,
                                  int64_t weight_stride, int64_t hidden_size, bf16* out, void* workspace, int threads);
int64_t linear_logps_hidden_grad_workspace(int64_t rows, int64_t hidden_size, int64_t vocab, int threads);

}  // namespace fastpref
