// The only file that knows Python: function table, exception translation, build_info(). Every tensor arrives as an
// address; Python allocates all outputs and keeps all tensors alive for the duration of a call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <vector>

#include "batched_ialm.h"
#include "batched_rpca.h"
#include "batched_verdict.h"
#include "bradley_terry.h"
#include "check.h"
#include "ialm_pass.h"
#include "linear_logps.h"
#include "outliers.h"
#include "parallel.h"
#include "preference.h"
#include "residual_pass.h"
#include "svt.h"
#include "token_logps.h"

namespace py = pybind11;
using namespace fastpref;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

LogitRows logit_rows(uintptr_t data, int dtype, int64_t outer, int64_t inner, int64_t outer_stride,
                     int64_t inner_stride, int64_t vocab) {
  check(dtype >= 0 && dtype <= 2,
        "dtype code must be 0 (float32), 1 (bfloat16) or 2 (float16), got " + std::to_string(dtype));
  return {pointer<void>(data), static_cast<DType>(dtype), outer, inner, outer_stride, inner_stride, vocab};
}

TokenLogpsForward forward_args(const LogitRows& logits, const LogitTransform& transform, uintptr_t labels,
                               int64_t ignore_index, uintptr_t logps, uintptr_t lse, uintptr_t stats) {
  return {logits,
          transform,
          pointer<const int64_t>(labels),
          ignore_index,
          pointer<float>(logps),
          pointer<float>(lse),
          pointer<float>(stats)};
}

TokenLogpsBackward backward_args(const LogitRows& logits, const LogitTransform& transform, uintptr_t labels,
                                 int64_t ignore_index, uintptr_t logps, uintptr_t lse, uintptr_t grad,
                                 const LogitRows& out) {
  return {logits,
          transform,
          pointer<const int64_t>(labels),
          ignore_index,
          pointer<const float>(logps),
          pointer<const float>(lse),
          pointer<const float>(grad),
          out};
}

// Each tensor of a large argument structure is a property to write, of its field's name: an address.
template <class Args, class T>
void bind_address(py::class_<Args>& type, const char* name, T* Args::* field) {
  type.def_property(name, nullptr, [field](Args& args, uintptr_t address) { args.*field = pointer<T>(address); });
}

LinearProjection linear_projection(uintptr_t weight, int64_t weight_stride, uintptr_t hidden, uintptr_t adapter,
                                   int64_t adapter_stride, uintptr_t adapter_hidden, uintptr_t bias, int64_t rows,
                                   int64_t hidden_size, int64_t vocab, int64_t rank) {
  return {pointer<const bf16>(weight),
          weight_stride,
          pointer<const bf16>(hidden),
          pointer<const bf16>(adapter),
          adapter_stride,
          pointer<const bf16>(adapter_hidden),
          pointer<const float>(bias),
          rows,
          hidden_size,
          vocab,
          rank};
}

ResidualPass residual_pass_args(uintptr_t matrix, int dtype, int64_t rows, int64_t columns, int64_t stride,
                                uintptr_t row_factors, uintptr_t column_factors, int64_t rank, int64_t width, int psi,
                                double zeta, double scale, bool upper, uintptr_t row_weights, uintptr_t column_weights,
                                int64_t sample_stride, uintptr_t row_products, uintptr_t column_products, bool squares,
                                uintptr_t row_squares, uintptr_t column_squares, uintptr_t sums, uintptr_t counts) {
  return {pointer<const void>(matrix),
          static_cast<MatrixDType>(dtype),
          rows,
          columns,
          stride,
          pointer<const void>(row_factors),
          pointer<const void>(column_factors),
          rank,
          width,
          static_cast<Psi>(psi),
          zeta,
          scale,
          upper,
          pointer<const void>(row_weights),
          pointer<const void>(column_weights),
          sample_stride,
          pointer<void>(row_products),
          pointer<void>(column_products),
          squares,
          pointer<double>(row_squares),
          pointer<double>(column_squares),
          pointer<double>(sums),
          pointer<int64_t>(counts),
          nullptr};
}

Outliers outliers_args(uintptr_t matrix, int dtype, int64_t rows, int64_t columns, int64_t stride, uintptr_t left,
                       uintptr_t right, int64_t rank, int64_t padded, double scale, double threshold) {
  Outliers args{};
  args.matrix = pointer<const void>(matrix);
  args.dtype = static_cast<MatrixDType>(dtype);
  args.rows = rows, args.columns = columns, args.stride = stride;
  args.left = pointer<const void>(left), args.right = pointer<const void>(right);
  args.rank = rank, args.padded = padded;
  args.scale = scale, args.threshold = threshold;
  return args;
}

IalmPass ialm_pass_args(uintptr_t matrix, int dtype, int64_t rows, int64_t columns, int64_t stride, bool masked,
                        double scale, uintptr_t state, int64_t state_stride, double lam) {
  IalmPass args{};
  args.matrix = pointer<const void>(matrix);
  args.dtype = static_cast<MatrixDType>(dtype);
  args.rows = rows, args.columns = columns, args.stride = stride;
  args.masked = masked, args.scale = scale;
  args.state = pointer<void>(state), args.state_stride = state_stride, args.lam = lam;
  args.mu = args.mu_before = 1;
  return args;
}

std::map<std::string, std::string> build_info() {
  return {
      {"version", FASTPREF_VERSION},
      {"compiler", __VERSION__},
      {"simd", simd_level_name(simd_level())},
      {"threads", parallel_runtime()},
      {"linear_product", linear_logps_product()},
#ifdef FASTPREF_WITH_CUDA
      {"cuda", FASTPREF_CUDA_VERSION},
      {"cuda_architectures", FASTPREF_CUDA_ARCHS},
#endif
  };
}

using release = py::call_guard<py::gil_scoped_release>;

// CudaError becomes fastpref.CudaError. That class is Python's, so that it exists without a native core.
void translate_exceptions() {
  py::register_local_exception_translator([](std::exception_ptr error) {
    PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<py::object> type;
    try {
      if (error) std::rethrow_exception(error);
    } catch (const CudaError& cuda) {
      type.call_once_and_store_result([] { return py::module_::import("fastpref.errors").attr("CudaError"); });
      py::set_error(type.get_stored(), cuda.what());
    }
  });
}

void bind_token_logps(py::module_& m) {
  py::class_<LogitRows>(m, "LogitRows").def(py::init(&logit_rows));
  py::class_<LogitTransform>(m, "LogitTransform").def(py::init([](double multiplier, double tanh_scale) {
    return LogitTransform{multiplier, static_cast<float>(tanh_scale)};
  }));
  py::class_<Integers>(m, "Integers").def(py::init([](uintptr_t data, bool is_int32) {
    return Integers{pointer<const void>(data), is_int32};
  }));
  py::class_<TokenLabels>(m, "TokenLabels")
      .def(py::init([](const Integers& labels, const Integers& cu_seqlens, const Integers& lengths,
                       int64_t ignore_index, int64_t sequences, int64_t tokens, bool shift) {
        return TokenLabels{labels, cu_seqlens, lengths, ignore_index, sequences, tokens, shift};
      }));
  py::class_<LogitsGradient>(m, "LogitsGradient")
      .def(py::init([](const LogitRows& logits, const LogitTransform& transform, const TokenLabels& labels,
                       uintptr_t logps, uintptr_t lse, uintptr_t coefficients, uintptr_t tail_coefficients,
                       uintptr_t tail_begin, uintptr_t loss_grad, bool grad_per_pair, const LogitRows& out) {
        return LogitsGradient{logits,
                              transform,
                              labels,
                              pointer<const float>(logps),
                              pointer<const float>(lse),
                              nullptr,
                              pointer<const float>(coefficients),
                              pointer<const float>(tail_coefficients),
                              pointer<const int64_t>(tail_begin),
                              pointer<const float>(loss_grad),
                              grad_per_pair,
                              out};
      }));
  py::class_<TokenLogpsForward>(m, "TokenLogpsForward").def(py::init(&forward_args));
  py::class_<TokenLogpsBackward>(m, "TokenLogpsBackward").def(py::init(&backward_args));
  m.def("token_logps_fwd_cpu", &token_logps_fwd_cpu, release());
  m.def("token_logps_bwd_cpu", &token_logps_bwd_cpu, release());
#ifdef FASTPREF_WITH_CUDA
  m.def("token_logps_workspace_cuda", &token_logps_workspace_cuda);
  m.def(
      "token_logps_fwd_cuda",
      [](const TokenLogpsForward& args, uintptr_t workspace, uintptr_t stream) {
        token_logps_fwd_cuda(args, pointer<void>(workspace), pointer<void>(stream));
      },
      release());
  m.def(
      "token_logps_bwd_cuda",
      [](const TokenLogpsBackward& args, uintptr_t stream) { token_logps_bwd_cuda(args, pointer<void>(stream)); },
      release());
  m.def(
      "logits_gradient_cuda",
      [](const LogitsGradient& args, uintptr_t stream) { logits_gradient_cuda(args, pointer<void>(stream)); },
      release());
#endif
}

void bind_preference(py::module_& m) {
  py::class_<LogisticFamily>(m, "LogisticFamily")
      .def(py::init([](double beta, double a, double b, double c, double m0, double m1, double offset, bool drop) {
        return LogisticFamily{beta, a, b, c, m0, m1, offset, drop};
      }));
  py::enum_<Reduction>(m, "Reduction")
      .value("mean", Reduction::mean)
      .value("sum", Reduction::sum)
      .value("none", Reduction::none);
  using Args = PreferenceForward;
  py::class_<Args> args(m, "PreferenceForward");
  args.def(py::init([](const LogitRows& logits, const LogitTransform& transform, const TokenLabels& labels, bool stats,
                       Reduction reduction, double num_items, const LogisticFamily& family) {
    Args made{};
    made.logits = logits, made.transform = transform, made.labels = labels, made.stats = stats;
    made.reduction = reduction, made.num_items = num_items, made.family = family;
    return made;
  }));
  args.def_readwrite("ref_logits", &Args::reference);
  bind_address(args, "ref_token_logps", &Args::ref_token_logps);
  bind_address(args, "ref_logps", &Args::ref_logps);
  bind_address(args, "rating_gap", &Args::rating_gap);
  bind_address(args, "pair_weights", &Args::pair_weights);
  bind_address(args, "num_items", &Args::num_items_tensor);
  bind_address(args, "loss", &Args::loss);
  bind_address(args, "losses", &Args::losses);
  bind_address(args, "logps", &Args::logps);
  bind_address(args, "rewards", &Args::rewards);
  bind_address(args, "margins", &Args::margins);
  bind_address(args, "lengths", &Args::lengths);
  bind_address(args, "metrics", &Args::metrics);
  bind_address(args, "counts", &Args::counts);
  bind_address(args, "stat_sums", &Args::stat_sums);
  bind_address(args, "tail", &Args::tail);
  bind_address(args, "tail_begin", &Args::tail_begin);
  bind_address(args, "coefficients", &Args::coefficients);
  bind_address(args, "token_logps", &Args::token_logps);
  bind_address(args, "lse", &Args::lse);
  bind_address(args, "token_stats", &Args::token_stats);
  py::class_<PairEpilogue> epilogue(m, "PairEpilogue");
  epilogue.def(py::init(
      [](int64_t ignore_index, int64_t rows, int64_t begin, int64_t end, int64_t pairs, const LogisticFamily& family) {
        PairEpilogue made{};
        made.ignore_index = ignore_index, made.rows = rows, made.begin = begin, made.end = end, made.pairs = pairs;
        made.family = family;
        return made;
      }));
  bind_address(epilogue, "token_logps", &PairEpilogue::token_logps);
  bind_address(epilogue, "labels", &PairEpilogue::labels);
  bind_address(epilogue, "bounds", &PairEpilogue::bounds);
  bind_address(epilogue, "ref_token_logps", &PairEpilogue::ref_token_logps);
  bind_address(epilogue, "ref_logps", &PairEpilogue::ref_logps);
  bind_address(epilogue, "rating_gap", &PairEpilogue::rating_gap);
  bind_address(epilogue, "scale_of_pair", &PairEpilogue::scale_of_pair);
  bind_address(epilogue, "losses", &PairEpilogue::losses);
  bind_address(epilogue, "logps", &PairEpilogue::logps);
  bind_address(epilogue, "logratios", &PairEpilogue::logratios);
  bind_address(epilogue, "lengths", &PairEpilogue::lengths);
  bind_address(epilogue, "token_grad", &PairEpilogue::token_grad);
  m.def("preference_pairs_cpu", &preference_pairs_cpu, release());
  m.def("preference_fwd_cpu", &preference_fwd_cpu, release());
  m.def(
      "preference_bwd_cpu",
      [](const TokenLogpsBackward& tokens, uintptr_t token_grad, uintptr_t cu_seqlens, int64_t pairs,
         int64_t tokens_per_sequence, uintptr_t coefficients, uintptr_t tail_coefficients, uintptr_t tail_begin,
         uintptr_t grad_loss, bool grad_per_pair, int threads) {
        preference_bwd_cpu(
            {tokens, pointer<float>(token_grad), pointer<const int64_t>(cu_seqlens), pairs, tokens_per_sequence,
             pointer<const float>(coefficients), pointer<const float>(tail_coefficients),
             pointer<const int64_t>(tail_begin), pointer<const float>(grad_loss), grad_per_pair},
            threads);
      },
      release());
#ifdef FASTPREF_WITH_CUDA
  m.def(
      "preference_pairs_cuda",
      [](const PairEpilogue& args, uintptr_t stream) { preference_pairs_cuda(args, pointer<void>(stream)); },
      release());
  m.def("preference_workspace_cuda", &preference_workspace_cuda);
  m.def(
      "preference_fwd_cuda",
      [](const PreferenceForward& args, uintptr_t workspace, uintptr_t stream) {
        preference_fwd_cuda(args, pointer<void>(workspace), pointer<void>(stream));
      },
      release());
#endif
}

void bind_linear_logps(py::module_& m) {
  py::class_<LinearProjection>(m, "LinearProjection").def(py::init(&linear_projection));
  m.def("linear_logps_workspace", &linear_logps_workspace);
  m.def(
      "linear_logps_fwd_cpu",
      [](const LinearProjection& projection, const LogitTransform& transform, uintptr_t labels, int64_t ignore_index,
         bool round_logits, uintptr_t tile, int64_t tile_stride, uintptr_t logps, uintptr_t lse, uintptr_t stats,
         uintptr_t workspace, int threads) {
        return linear_logps_fwd_cpu(
            {projection, transform, pointer<const int64_t>(labels), ignore_index, round_logits, pointer<void>(tile),
             tile_stride, pointer<float>(logps), pointer<float>(lse), pointer<float>(stats), pointer<void>(workspace)},
            threads);
      },
      release());
  m.def(
      "linear_logps_bwd_cpu",
      [](uintptr_t tile, bool tile_is_bf16, int64_t tile_stride, int64_t rows, int64_t vocab,
         const LogitTransform& transform, uintptr_t labels, int64_t ignore_index, uintptr_t logps, uintptr_t lse,
         uintptr_t grad, int threads) {
        linear_logps_bwd_cpu(
            {pointer<void>(tile), tile_is_bf16, tile_stride, rows, vocab, transform, pointer<const int64_t>(labels),
             ignore_index, pointer<const float>(logps), pointer<const float>(lse), pointer<const float>(grad)},
            threads);
      },
      release());
  m.def(
      "linear_logps_weight_grad_cpu",
      [](uintptr_t dz, int64_t tile_stride, int64_t rows, int64_t vocab, uintptr_t hidden, int64_t hidden_size,
         uintptr_t acc, bool accumulate, uintptr_t workspace, int threads) {
        linear_logps_weight_grad_cpu(pointer<const bf16>(dz), tile_stride, rows, vocab, pointer<const bf16>(hidden),
                                     hidden_size, pointer<float>(acc), accumulate, pointer<void>(workspace), threads);
      },
      release());
  m.def("linear_logps_weight_grad_workspace", &linear_logps_weight_grad_workspace);
  m.def(
      "linear_logps_hidden_grad_cpu",
      [](uintptr_t dz, int64_t tile_stride, int64_t rows, int64_t vocab, uintptr_t weight, int64_t weight_stride,
         int64_t hidden_size, uintptr_t out, uintptr_t workspace, int threads) {
        linear_logps_hidden_grad_cpu(pointer<const bf16>(dz), tile_stride, rows, vocab, pointer<const bf16>(weight),
                                     weight_stride, hidden_size, pointer<bf16>(out), pointer<void>(workspace), threads);
      },
      release());
  m.def("linear_logps_hidden_grad_workspace", &linear_logps_hidden_grad_workspace);
  m.def("linear_logps_product", &linear_logps_product);
  m.def("set_linear_product", [](const std::string& name) { set_linear_product(name.c_str()); });
}

void bind_residual_pass(py::module_& m) {
  py::class_<ResidualPass>(m, "ResidualPass").def(py::init(&residual_pass_args));
  m.def("residual_pass_workspace", &residual_pass_workspace);
  m.def(
      "residual_pass_cpu",
      [](ResidualPass args, uintptr_t workspace, int threads) {
        args.workspace = pointer<void>(workspace);
        residual_pass_cpu(args, threads);
      },
      release());
}

void bind_ialm_pass(py::module_& m) {
  py::class_<IalmPass>(m, "IalmPass")
      .def(py::init(&ialm_pass_args))
      .def("set_factors",
           [](IalmPass& args, uintptr_t row_factors, uintptr_t column_factors, int64_t rank, int64_t width) {
             args.row_factors = pointer<const void>(row_factors),
             args.column_factors = pointer<const void>(column_factors);
             args.rank = rank, args.width = width;
           })
      .def("set_penalty", [](IalmPass& args, double mu, double mu_before) { args.mu = mu, args.mu_before = mu_before; })
      .def("set_value",
           [](IalmPass& args, double from_data, double from_sparse, double from_dual, double from_missing) {
             args.from_data = from_data, args.from_sparse = from_sparse;
             args.from_dual = from_dual, args.from_missing = from_missing;
           });
  m.attr("ialm_rows") = ialm_rows;
  m.attr("ialm_columns") = ialm_columns;
  m.def("ialm_workspace", &ialm_workspace);
  for (const auto& [name, pass] :
       {std::pair{"ialm_update_cpu", &ialm_update_cpu}, std::pair{"ialm_rows_cpu", &ialm_rows_cpu},
        std::pair{"ialm_columns_cpu", &ialm_columns_cpu}})
    m.def(
        name,
        [pass = pass](IalmPass args, uintptr_t products, uintptr_t sums, uintptr_t workspace, int threads) {
          args.products = pointer<void>(products), args.sums = pointer<double>(sums);
          args.workspace = pointer<void>(workspace);
          pass(args, threads);
        },
        release());
}

void bind_outliers(py::module_& m) {
  py::class_<Outliers>(m, "Outliers").def(py::init(&outliers_args));
  m.attr("outliers_padding") = outliers_padding;
  m.def(
      "outliers_count_cpu",
      [](Outliers args, uintptr_t far, uintptr_t observed, uintptr_t by_column, uintptr_t rest, int threads) {
        args.far = pointer<int64_t>(far), args.observed = pointer<int64_t>(observed);
        args.by_column = pointer<void>(by_column), args.rest = pointer<double>(rest);
        outliers_count_cpu(args, threads);
      },
      release());
  m.def(
      "outliers_list_cpu",
      [](Outliers args, uintptr_t first, uintptr_t out_rows, uintptr_t out_columns, uintptr_t values, int threads) {
        args.first = pointer<const int64_t>(first);
        args.out_rows = pointer<int64_t>(out_rows), args.out_columns = pointer<int64_t>(out_columns);
        args.values = pointer<void>(values);
        outliers_list_cpu(args, threads);
      },
      release());
}

void bind_svt(py::module_& m) {
  m.def(
      "svt_cpu",
      [](uintptr_t matrix, uintptr_t threshold, bool is_double, int64_t batch, int64_t rows, int64_t columns,
         uintptr_t low_rank, uintptr_t rank, uintptr_t workspace, int threads) {
        svt_cpu({pointer<const void>(matrix), pointer<const void>(threshold), is_double, batch, rows, columns,
                 pointer<void>(low_rank), pointer<int64_t>(rank), pointer<void>(workspace)},
                threads);
      },
      release());
  m.def("svt_workspace", &svt_workspace);
}

void bind_bradley_terry(py::module_& m) {
  m.def("bradley_terry_workspace", &bradley_terry_workspace);
  m.def(
      "bradley_terry_dense_cpu",
      [](uintptr_t matrix, bool is_double, int64_t batch, int64_t items, int data, double tol, int64_t max_iter,
         uintptr_t scores, uintptr_t components, uintptr_t rejected, uintptr_t stats, uintptr_t workspace,
         int64_t slots, int threads) {
        bradley_terry_dense_cpu(
            {pointer<const void>(matrix),
             is_double,
             batch,
             items,
             {static_cast<BradleyTerryData>(data), tol, max_iter},
             {pointer<double>(scores), pointer<int64_t>(components), pointer<double>(rejected), pointer<double>(stats)},
             pointer<void>(workspace),
             slots},
            threads);
      },
      release());
  m.def(
      "bradley_terry_edges_cpu",
      [](uintptr_t offsets, uintptr_t columns, uintptr_t values, uintptr_t votes, int64_t items, int data, double tol,
         int64_t max_iter, uintptr_t scores, uintptr_t components, uintptr_t rejected, uintptr_t stats,
         uintptr_t weights, uintptr_t vectors, int threads) {
        bradley_terry_edges_cpu(
            {pointer<const int64_t>(offsets),
             pointer<const int32_t>(columns),
             pointer<const double>(values),
             pointer<const double>(votes),
             items,
             {static_cast<BradleyTerryData>(data), tol, max_iter},
             {pointer<double>(scores), pointer<int64_t>(components), pointer<double>(rejected), pointer<double>(stats)},
             pointer<double>(weights),
             pointer<double>(vectors),
             threads});
      },
      release());
}

void bind_batched_rpca(py::module_& m) {
  m.def(
      "batched_rpca_cpu",
      [](uintptr_t data, bool is_double, bool skew, bool warm, int attempt, int64_t batch, int64_t rows,
         int64_t columns, int64_t rank, uintptr_t start, double tol, int64_t max_iter, uintptr_t left, uintptr_t right,
         uintptr_t iterations, uintptr_t median, uintptr_t converged, uintptr_t workspace, int threads) {
        batched_rpca_cpu(
            {pointer<const void>(data), is_double, skew, warm, attempt, batch, rows, columns, rank,
             pointer<const void>(start), tol, max_iter, pointer<void>(left), pointer<void>(right),
             pointer<int64_t>(iterations), pointer<double>(median), pointer<bool>(converged), pointer<void>(workspace)},
            threads);
      },
      release());
  m.def("batched_rpca_workspace", &batched_rpca_workspace);
}

void bind_batched_verdict(py::module_& m) {
  m.def(
      "batched_verdict_cpu",
      [](uintptr_t data, bool is_double, int64_t batch, int64_t rows, int64_t columns, int64_t rank, uintptr_t left,
         uintptr_t right, uintptr_t median, double outlier, double exact, uintptr_t u, uintptr_t s, uintptr_t vh,
         uintptr_t sums, uintptr_t row_rates, uintptr_t column_rates, uintptr_t workspace, int threads) {
        batched_verdict_cpu(
            {pointer<const void>(data), is_double, batch, rows, columns, rank, pointer<const void>(left),
             pointer<const void>(right), pointer<const double>(median), outlier, exact, pointer<void>(u),
             pointer<void>(s), pointer<void>(vh), pointer<double>(sums), pointer<double>(row_rates),
             pointer<double>(column_rates), pointer<void>(workspace)},
            threads);
      },
      release());
  m.def("batched_verdict_workspace", &batched_verdict_workspace);
}

void bind_batched_ialm(py::module_& m) {
  m.def(
      "batched_ialm_cpu",
      [](uintptr_t data, bool is_double, int64_t batch, int64_t rows, int64_t columns, uintptr_t lam, double tol,
         int64_t max_iter, uintptr_t left, uintptr_t right, uintptr_t sigma, uintptr_t rank, uintptr_t iterations,
         uintptr_t residual, uintptr_t gap, uintptr_t median, uintptr_t dense_share, uintptr_t converged,
         uintptr_t workspace, int threads) {
        batched_ialm_cpu(
            {pointer<const void>(data), is_double, batch, rows, columns, pointer<const double>(lam), tol, max_iter,
             pointer<void>(left), pointer<void>(right), pointer<void>(sigma), pointer<int64_t>(rank),
             pointer<int64_t>(iterations), pointer<double>(residual), pointer<double>(gap), pointer<double>(median),
             pointer<double>(dense_share), pointer<bool>(converged), pointer<void>(workspace)},
            threads);
      },
      release());
  m.def("batched_ialm_workspace", &batched_ialm_workspace);
}

}  // namespace

PYBIND11_MODULE(_core, m, py::mod_gil_not_used()) {
  translate_exceptions();
  bind_token_logps(m);
  bind_preference(m);
  bind_linear_logps(m);
  bind_residual_pass(m);
  bind_ialm_pass(m);
  bind_outliers(m);
  bind_svt(m);
  bind_bradley_terry(m);
  bind_batched_rpca(m);
  bind_batched_verdict(m);
  bind_batched_ialm(m);
  m.def("advise_huge_pages", [](uintptr_t data, size_t bytes) { advise_huge_pages(pointer<void>(data), bytes); });
  m.def("simd_level", [] { return simd_level_name(simd_level()); });
  m.def("set_simd_level", [](const std::string& level) { set_simd_level(level.c_str()); });
  m.def("build_info", &build_info);
}
