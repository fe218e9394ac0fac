"""residual_pass against float64, on every backend; then its structure, its statistics, and what it refuses."""

import warnings

import numpy as np
import pytest
import torch
from cases import DTYPES, LAYOUTS, make, sizes, zeta_in_a_gap
from tolerance import unit_roundoff

from fastpref import _library, _native, operators
from fastpref._lowrank import residual_pass as op
from fastpref._lowrank.residual_pass import BINS, PSI, histogram_median, residual_pass, residual_pass_ref

pytestmark = pytest.mark.sanitize

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
SHAPES = {
    "one-entry": (1, 1),
    "less-than-a-vector": (3, 5),
    "odd": (61, 101),  # nothing divides it: part blocks of rows and of columns
    "tall": (517, 40),  # several chunks of rows
    "wide": (30, 1033),  # several panels of columns
}
SUMS = ("sum_squares", "max_kept", "row_squares", "column_squares")
FACTORS = ("left_grad", "right_grad")


@pytest.fixture
def backend(backend):
    if reason := _library.OPS["residual_pass"][backend.name](backend.device.type):
        pytest.skip(reason)
    return backend


def serves(backend, dtype):
    if backend.name == "triton" and dtype == torch.float64:
        pytest.skip("float64 runs on CPU and in the reference")


def skew(n, r, dtype=torch.float32, device="cpu"):
    """A skew-symmetric matrix with missing pairs, and factors whose product is skew-symmetric."""
    matrix, right, _ = make(n, n, r, dtype, device, missing=0)
    lower = torch.ones(n, n, dtype=torch.bool, device=device).tril()
    upper = torch.where(lower, 0, matrix)
    matrix = upper - upper.t()
    gone = (torch.rand(n, n, device=device) < 0.2) & ~lower
    matrix[gone | gone.t()] = -128 if dtype == torch.int8 else torch.nan
    turn = torch.randn(r, r, dtype=torch.float64, device=device)
    return matrix, (right.double() @ (turn - turn.t())).to(right.dtype), right


def plain(matrix, left, right, psi, zeta, scale=1.0, row_weights=1.0, column_weights=1.0):
    """E right and E^T left as a user writes them, in the dtype of the factors."""
    residual = scale * op.entries(matrix, left.dtype) - left @ right.t()
    e = op._psi(residual, psi, zeta) * row_weights * column_weights
    e = torch.where(residual.isnan(), 0.0, e)
    return e @ right, e.t() @ left


def assert_products(result, truth, same, matrix, left, right, options):
    """No worse than plain torch, but for rounding in proportion to what the sums would be without any cancellation."""
    absolute = [t.double().abs() for t in (left, right)]
    terms = (options.get("scale", 1.0) * op.entries(matrix, torch.float64)).abs() + absolute[0] @ absolute[1].t()
    terms = torch.where(terms.isnan(), 0.0, terms)
    uncancelled = terms @ absolute[1], terms.t() @ absolute[0]
    for name, composed, bound in zip(FACTORS, same, uncancelled, strict=True):
        value, true = getattr(result, name), getattr(truth, name)
        assert value.dtype == left.dtype
        assert value.shape == composed.shape
        if not value.numel():
            continue
        error, plain_error = ((t.double() - true).abs().max() for t in (value, composed))
        allowed = 1.5 * plain_error + 2 * unit_roundoff(left.dtype) * bound.max()
        assert error <= allowed, (
            f"{name}: off by {error:.3e}, allowed {allowed:.3e}, largest value {true.abs().max():.3e}"
        )


def assert_statistics(result, truth, dtype):
    rtol = 1e-12 if dtype == torch.float64 else 2e-5
    for name in SUMS:
        torch.testing.assert_close(getattr(result, name), getattr(truth, name), rtol=rtol, atol=rtol)
    for name in ("observed", "kept"):
        assert getattr(result, name) == getattr(truth, name), name
    assert result.histogram.sum() == truth.histogram.sum()
    moved = (result.histogram - truth.histogram).abs().sum()  # by rounding, to the bin beside
    assert moved <= 4 + 2e-3 * truth.histogram.sum()


def check(backend, matrix, left, right, psi="cauchy", structure="general", **options):
    zeta = zeta_in_a_gap(matrix, left, right, options.get("scale", 1.0))
    options |= {"psi": psi, "zeta": zeta}
    result = residual_pass(matrix, left, right, structure=structure, backend=backend.name, **options)
    truth = residual_pass_ref(matrix, left, right, structure=structure, **options)
    options.pop("squares", None)
    if "row_weights" in options:
        options["row_weights"] = options["row_weights"].unsqueeze(1)
    same = plain(matrix, left, right, **options)
    assert_products(result, truth, same, matrix, left, right, options)
    assert_statistics(result, truth, left.dtype)
    return result


@pytest.mark.numerics
@dtypes
@pytest.mark.parametrize("psi", PSI)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_matches_float64(backend, shape, dtype, psi, thin):
    thin(unless=not backend.interpreted or psi in ("hard", "cauchy"))
    serves(backend, dtype)
    check(backend, *make(*shape, 5, dtype, backend.device), psi=psi, scale=0.125 if dtype == torch.int8 else 0.75)


@pytest.mark.numerics
@pytest.mark.parametrize("rank", [0, 1, 2, 3, 4, 7, 10, 16, 33, 64, 70])
def test_ranks(backend, rank):
    check(backend, *make(37, 150, rank, device=backend.device))


@pytest.mark.parametrize("psi", PSI)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_weights_and_squares(backend, dtype, psi):
    serves(backend, dtype)
    matrix, left, right = make(75, 131, 6, dtype, backend.device)
    weights = {
        "row_weights": torch.rand(75, dtype=dtype, device=backend.device),
        "column_weights": torch.rand(131, dtype=dtype, device=backend.device),
    }
    check(backend, matrix, left, right, psi, squares=True)
    check(backend, matrix, left, right, psi, squares=True, **weights)
    one = check(backend, matrix, left, right, psi, column_weights=weights["column_weights"])
    assert one.row_squares.shape == one.column_squares.shape == (0,)


@dtypes
@pytest.mark.parametrize("n", [1, 2, 33, 150])
def test_skew_equals_the_whole_matrix(backend, n, dtype):
    serves(backend, dtype)
    matrix, left, right = skew(n, 6, dtype, backend.device)
    whole = matrix.clone()
    whole.fill_diagonal_(-128 if dtype == torch.int8 else torch.nan)  # not counted
    options = {"psi": "cauchy", "zeta": zeta_in_a_gap(matrix, left, right), "squares": True}
    result = residual_pass(matrix, left, right, structure="skew", backend=backend.name, **options)
    truth = residual_pass_ref(whole, left, right, **options)
    rtol = 1e-11 if dtype == torch.float64 else 1e-4
    for name in FACTORS:
        value, true = getattr(result, name).double(), getattr(truth, name)
        torch.testing.assert_close(value, true, rtol=0, atol=rtol * float(true.abs().max()))
    for name in SUMS:
        torch.testing.assert_close(getattr(result, name), getattr(truth, name), rtol=rtol, atol=rtol)
    assert (result.observed, result.kept) == (truth.observed, truth.kept)
    if n < 180:  # every entry is counted
        assert result.histogram.sum() == truth.histogram.sum()


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_skew_reads_one_triangle_alone(backend, layout):
    matrix, left, right = skew(100, 4, device=backend.device)
    options = {
        "zeta": zeta_in_a_gap(matrix, left, right),
        "structure": "skew",
        "backend": backend.name,
        "squares": True,
    }
    expected = residual_pass(matrix, left, right, **options)
    ones = torch.ones_like(matrix)
    unread = ones.tril() if layout == "rows" else ones.triu()
    spoilt = LAYOUTS.get(layout, lambda x: x)(torch.where(unread > 0, torch.inf, matrix))
    result = residual_pass(spoilt, left, right, **options)
    for name, value, true in zip(result._fields, result, expected, strict=True):
        if layout == "rows":
            assert torch.equal(value, true), name
        elif name != "histogram":  # the other triangle is sampled in other places
            torch.testing.assert_close(value, true, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, layout, dtype, thin):
    thin(unless=not backend.interpreted or dtype == torch.bfloat16)
    matrix, left, right = make(70, 133, 5, dtype, backend.device)
    laid_out = LAYOUTS[layout](matrix)
    weights = torch.rand(70, device=backend.device), torch.rand(133, device=backend.device)
    zeta = zeta_in_a_gap(matrix, left, right)
    options = {"zeta": zeta, "row_weights": weights[0], "column_weights": weights[1], "squares": True}
    result = residual_pass(laid_out, left, right, backend=backend.name, **options)
    truth = residual_pass_ref(matrix, left, right, **options)
    for name in (*FACTORS, *SUMS):
        value, true = getattr(result, name).double(), getattr(truth, name).double()
        torch.testing.assert_close(value, true, rtol=1e-5, atol=1e-5 * float(true.abs().max()))
    strided = torch.nn.functional.pad(left, (2, 1))[:, 2:-1]
    again = residual_pass(laid_out, strided, right, backend=backend.name, **options)
    assert torch.equal(again.right_grad, result.right_grad)


def test_memory_mapped(tmp_path):
    matrix, left, right = make(50, 90, 3)
    np.save(tmp_path / "matrix.npy", matrix.numpy())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        mapped = torch.from_numpy(np.load(tmp_path / "matrix.npy", mmap_mode="r"))
    result = residual_pass(mapped, left, right, zeta=1.0)
    for value, expected in zip(result, residual_pass(matrix, left, right, zeta=1.0), strict=True):
        assert torch.equal(value, expected)


@pytest.mark.parametrize("shape", [(0, 0), (0, 7), (7, 0)], ids=str)
@pytest.mark.parametrize("structure", ["general", "skew"])
def test_empty(backend, shape, structure):
    if structure == "skew" and shape[0] != shape[1]:
        pytest.skip("skew-symmetric matrices are square")
    matrix, left, right = make(*shape, 4, device=backend.device)
    result = residual_pass(matrix, left, right, structure=structure, squares=True, backend=backend.name)
    for value in result:
        assert (value == 0).all()
    assert (result.left_grad.shape, result.right_grad.shape) == (left.shape, right.shape)
    assert (result.row_squares.shape, result.column_squares.shape) == (shape[:1], shape[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=["float32", "int8"])
def test_missing_rows_and_columns_have_no_gradient(backend, dtype):
    matrix, left, right = make(40, 77, 3, dtype, backend.device)
    gone = -128 if dtype == torch.int8 else torch.nan
    matrix[5], matrix[:, 76] = gone, gone
    result = residual_pass(matrix, left, right, zeta=1.0, squares=True, backend=backend.name)
    assert (result.left_grad[5] == 0).all()
    assert (result.right_grad[76] == 0).all()
    assert result.row_squares[5] == result.column_squares[76] == 0
    assert result.left_grad[4].any()
    matrix.fill_(gone)
    for value in residual_pass(matrix, left, right, zeta=1.0, squares=True, backend=backend.name):
        assert (value == 0).all()


@pytest.mark.parametrize("place", [(0, 0), (3, 129), (68, 132), (69, 7)], ids=str)
@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("psi", PSI)
def test_an_infinite_entry_is_named(backend, place, layout, psi):
    matrix, left, right = make(70, 133, 3, device=backend.device)
    matrix[place] = -torch.inf
    matrix = LAYOUTS.get(layout, lambda x: x)(matrix)
    call = {"psi": psi, "zeta": 1.0, "backend": backend.name}
    if backend.name == "triton":
        result = residual_pass(matrix, left, right, **call)
        assert result.left_grad[place[0]].isnan().all()
        assert result.right_grad[place[1]].isnan().all()
        assert result.sum_squares.isnan()
        return
    with pytest.raises(ValueError, match=f"got -inf at row {place[0]}, column {place[1]}$"):
        residual_pass(matrix, left, right, **call)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", ["left", "right"])
def test_factors_that_are_not_finite(backend, which, value):
    matrix, left, right = make(70, 133, 3, device=backend.device)
    {"left": left, "right": right}[which][69, 2] = value
    for psi in PSI:
        if backend.name == "triton":
            result = residual_pass(matrix, left, right, psi=psi, zeta=1.0, backend=backend.name)
            assert result.sum_squares.isnan()
            continue
        with pytest.raises(ValueError, match="must be finite, but a factor is not, or the product overflows"):
            residual_pass(matrix, left, right, psi=psi, zeta=1.0, backend=backend.name)


def test_an_overflowing_product(backend):
    if backend.name != "native":
        pytest.skip("the reference computes in float64; in Triton E is NaN")
    matrix, left, right = make(20, 30, 2)
    with pytest.raises(ValueError, match="or the product overflows"):
        residual_pass(matrix, left * 1e20, right * 1e20, backend="native")


@pytest.mark.parametrize("zeta", [1e-40, 1e-30, 1e-3, 1e30, torch.inf])
def test_extreme_ratios(backend, zeta):
    matrix = torch.tensor([[1e30, -5e29, 1.0, 0.0, -3e-5], [1e17, -1e-20, 2.0, torch.nan, 0.5]], device=backend.device)
    left, right = torch.zeros(2, 1, device=backend.device), torch.ones(5, 1, device=backend.device)
    for psi in PSI:
        if psi == "identity" or (zeta >= 1e30 and psi != "cauchy"):
            continue  # E^2 is beyond float32
        scale = 1e-12 if zeta >= 1e30 else 1.0
        result = residual_pass(matrix, left, right, psi=psi, zeta=zeta, scale=scale, backend=backend.name)
        truth = residual_pass_ref(matrix, left, right, psi=psi, zeta=zeta, scale=scale)
        torch.testing.assert_close(result.left_grad.double(), truth.left_grad, rtol=1e-6, atol=1e-37)
        assert result.kept == truth.kept


@pytest.mark.numerics
def test_results_do_not_depend_on_threads(backend):
    if backend.name != "native" or backend.device.type != "cpu":
        pytest.skip("only the native CPU kernels choose their threads")
    matrix, left, right = make(300, 411, 10)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(residual_pass(matrix, left, right, zeta=1.0, squares=True, backend="native"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for value, first in zip(other, results[0], strict=True):
            assert torch.equal(value, first)


@pytest.mark.triton
def test_triton_in_slabs_and_groups(backend, monkeypatch):
    if backend.name != "triton":
        pytest.skip("the other backends have none")
    monkeypatch.setattr(op, "_SLAB", 2)
    monkeypatch.setattr(op, "_PROGRAMS", 4)
    check(backend, *make(300, 133, 40, device=backend.device), squares=True)
    matrix, left, right = skew(300, 20, device=backend.device)
    options = {"zeta": zeta_in_a_gap(matrix, left, right), "structure": "skew", "squares": True}
    result = residual_pass(matrix, left, right, backend="triton", **options)
    truth = residual_pass_ref(matrix, left, right, **options)
    for name in (*FACTORS, "row_squares"):
        value, true = getattr(result, name).double(), getattr(truth, name)
        torch.testing.assert_close(value, true, rtol=0, atol=1e-5 * float(true.abs().max()))


@pytest.mark.parametrize("shape", [(600, 400), (40, 5000), (3000, 70)], ids=str)
def test_a_sampled_histogram_has_the_median(backend, shape, thin):
    thin(unless=not backend.interpreted or shape == (600, 400))
    matrix, left, right = make(*shape, 2, device=backend.device)
    zeta = zeta_in_a_gap(matrix, left, right)
    result = residual_pass(matrix, left, right, zeta=zeta, backend=backend.name)
    truth = residual_pass_ref(matrix, left, right, zeta=zeta)
    assert_statistics(result, truth, torch.float32)
    counted = int(result.histogram.sum())
    assert 2**13 < counted < 2**16
    median = float(sizes(matrix, left, right).median())
    # half a bin, and four standard deviations of the sample's median (|R| has a density of about 0.43 / median there)
    assert abs(histogram_median(result.histogram) / median - 1) < 1 / 64 + 4 * 0.5 / 0.43 / counted**0.5


def test_the_sample_leaves_no_column_out():
    rows, columns = torch.arange(2048), torch.arange(2048)
    stride = op._sample_stride(2048, 2048)
    assert stride == 128
    sampled = op._sampled(rows, columns, stride)
    assert sampled.any(0).all()
    assert sampled.sum() == 2048 * 2048 // stride
    assert op._sample_stride(128, 256) == 1
    assert op._sample_stride(10**5, 10**5) == 256


def histogram_of(values):
    """By way of the reference: values against factors of no columns."""
    matrix = torch.as_tensor(values, dtype=torch.float64).reshape(1, -1)
    return residual_pass_ref(matrix, torch.empty(1, 0), torch.empty(matrix.shape[1], 0)).histogram


def test_histogram_median():
    assert histogram_of([]).shape == (BINS,)
    assert np.isnan(histogram_median(histogram_of([])))
    assert histogram_median(histogram_of([0.0, 0.0, 1.0])) == 0
    for size in (1, 2, 3, 10, 1001, 4000):
        values = torch.randn(size, dtype=torch.float64).exp() * 10 ** float(torch.empty(()).uniform_(-20, 20))
        median = float(values.median())  # the lower one, as histogram_median's
        assert abs(histogram_median(histogram_of(values)) / median - 1) <= 1 / 64
    clumped = torch.tensor([1e-6] * 40 + [3.0] * 59)
    assert abs(histogram_median(histogram_of(clumped)) / 3 - 1) <= 1 / 64


def test_the_workspace_stays_small():
    n, r = 20000, 10
    args = (0, 0, n, n, n, 0, 0, r, r, 2, 1.0, 1.0, False, 0, 0, 256, 0, 0, False, 0, 0, 0, 0)
    assert _native._core.residual_pass_workspace(_native._core.ResidualPass(*args)) < 0.03 * 4 * n * n


REFUSED = {
    "no tensor": ({"matrix": [[1.0]]}, TypeError, "matrix must be a torch.Tensor, got list"),
    "dtype": ({"matrix": torch.ones(4, 6).int()}, TypeError, "matrix must be float32, float64,.* got torch.int32"),
    "vector": ({"matrix": torch.ones(4)}, ValueError, r"matrix must have shape \[m, n\], got \[4\]"),
    "strides": ({"matrix": torch.ones(4, 12)[:, ::2]}, ValueError, r"call .contiguous\(\), .* got strides \(12, 2\)"),
    "one row": ({"matrix": torch.ones(6).expand(4, 6)}, ValueError, r"got strides \(0, 1\) for shape \[4, 6\]"),
    "left rows": ({"left": torch.ones(5, 2)}, ValueError, r"left must have shape \[4, r\] to match .* got \[5, 2\]"),
    "right rows": ({"right": torch.ones(4, 2)}, ValueError, r"right must have shape \[6, r\] to match .* got \[4, 2\]"),
    "ranks": ({"right": torch.ones(6, 3)}, ValueError, r"as many columns, got shapes \[4, 2\] and \[6, 3\]"),
    "factor dtype": ({"left": torch.ones(4, 2).double()}, TypeError, "left must be torch.float32 for a torch.float32"),
    "psi": ({"psi": "huber"}, ValueError, "psi must be one of .* got 'huber'"),
    "structure": ({"structure": "btl"}, ValueError, "structure must be one of .* got 'btl'"),
    "not square": ({"structure": "skew"}, ValueError, r"needs a square matrix, got shape \[4, 6\]"),
    "zeta": ({"zeta": 0.0}, ValueError, "zeta must be positive, got 0.0"),
    "zeta NaN": ({"zeta": float("nan")}, ValueError, "zeta must be positive, got nan"),
    "zeta type": ({"zeta": "1"}, TypeError, "zeta must be a positive float, got str"),
    "scale": ({"scale": float("inf")}, ValueError, "scale must be a finite float, got inf"),
    "weights": ({"row_weights": torch.ones(6)}, ValueError, r"row_weights must have shape \[4\] \(one per row\)"),
    "weights dtype": ({"column_weights": torch.ones(6).half()}, TypeError, "column_weights must be torch.float32 like"),
    "backend": ({"backend": "cublas"}, ValueError, "backend must be None or one of .* got 'cublas'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    change, error, message = REFUSED[case]
    arguments = {"matrix": torch.ones(4, 6), "left": torch.ones(4, 2), "right": torch.ones(6, 2)} | change
    with pytest.raises(error, match=message):
        residual_pass(**arguments)


@pytest.mark.triton
def test_float64_is_refused_by_triton():
    matrix, left, right = make(4, 6, 2, torch.float64)
    with pytest.raises(TypeError, match=r"backend='triton' takes .* got torch\.float64"):
        residual_pass(matrix, left, right, backend="triton")


@pytest.mark.compiled
@pytest.mark.parametrize("structure", ["general", "skew"])
def test_opcheck(backend, structure):
    matrix, left, right = skew(20, 4, device=backend.device)
    weights = torch.rand(20, device=backend.device)
    for options in ((None, None, False), (weights, None, True)):
        args = (matrix, left, right, "cauchy", 1.0, 1.0, structure == "skew", *options, backend.name)
        torch.library.opcheck(operators.residual_pass, args)


@pytest.mark.compiled
def test_compiles_without_graph_breaks():
    matrix, left, right = make(20, 30, 3)

    def step(left):
        return residual_pass(matrix, left * 2, right, zeta=1.0).left_grad + 1

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(left), step(left))


def test_results_are_detached():
    matrix, left, right = make(20, 30, 3)
    result = residual_pass(matrix, left.requires_grad_(), right, zeta=1.0)
    assert not any(t.requires_grad for t in result)
