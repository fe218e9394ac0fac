# ruff: noqa: E501  (PTX)
"""Each instruction against numpy or exact arithmetic, on every kind of operand."""

from fractions import Fraction

import numpy as np
import ptxsim
import pytest
from ptx_cases import BF16, F16, F32, F64, NUMPY, apply, bf16, lanes, pairs, rounded, same, to_bf16

INTEGERS = {
    "u16": [0, 1, 2, 7, 0x7FFF, 0x8000, 0xFFFF, 12345],
    "s16": [0, 1, -1, 7, -7, 0x7FFF, -0x8000, 12345],
    "u32": [0, 1, 2, 7, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 123456789],
    "s32": [0, 1, -1, 7, -7, 0x7FFFFFFF, -0x80000000, 123456789],
    "u64": [0, 1, 2, 7, 2**63 - 1, 2**63, 2**64 - 1, 12345678901234],
    "s64": [0, 1, -1, 7, -7, 2**63 - 1, -(2**63), 12345678901234],
}


def ints(ty):
    dtype = {"u16": np.uint16, "s16": np.int16, "u32": np.uint32, "s32": np.int32, "u64": np.uint64, "s64": np.int64}[
        ty
    ]
    return np.array(INTEGERS[ty], dtype)


def wrap(x, ty):
    width = int(ty[1:])
    x &= (1 << width) - 1
    return x - (1 << width) if ty[0] == "s" and x >> (width - 1) else x


def quotient(x, y):
    return abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)


# ----------------------------------------------------------------------------------------------------------------------
# Integers


@pytest.mark.parametrize("ty", INTEGERS)
@pytest.mark.parametrize("op", ["add", "sub", "mul.lo", "mul.hi", "min", "max", "and", "or", "xor", "div", "rem"])
def test_integer_binary(op, ty):
    a, b = pairs(ints(ty))
    width = int(ty[1:])
    if op in ("div", "rem"):  # by zero: undefined
        a, b = a[b != 0], b[b != 0]
    kind = f"b{width}" if op in ("and", "or", "xor") else ty
    got = apply(f"{op}.{kind} {{d}}, {{0}}, {{1}};", ty, (ty, a), (ty, b))
    f = {
        "add": lambda x, y: x + y,
        "sub": lambda x, y: x - y,
        "mul.lo": lambda x, y: x * y,
        "mul.hi": lambda x, y: x * y >> width,
        "min": min,
        "max": max,
        "and": lambda x, y: x & y,
        "or": lambda x, y: x | y,
        "xor": lambda x, y: x ^ y,
        "div": quotient,
        "rem": lambda x, y: x - y * quotient(x, y),
    }[op]
    assert got.tolist() == [wrap(f(int(x), int(y)), ty) for x, y in zip(a, b, strict=True)]


@pytest.mark.parametrize(
    "op,ty", [(op, ty) for ty in INTEGERS for op in ("not", "neg", "abs") if ty[0] == "s" or op == "not"]
)
def test_integer_unary(op, ty):
    a = ints(ty)
    got = apply(f"{op}.{'b' + ty[1:] if op == 'not' else ty} {{d}}, {{0}};", ty, (ty, a))
    f = {"not": lambda x: ~x, "neg": lambda x: -x, "abs": abs}[op]
    assert got.tolist() == [wrap(f(int(x)), ty) for x in a]


@pytest.mark.parametrize("ty", ["u16", "s16", "u32", "s32"])
def test_wide(ty):
    a, b = pairs(ints(ty))
    wide = ty[0] + str(2 * int(ty[1:]))
    exact = [int(x) * int(y) for x, y in zip(a, b, strict=True)]
    assert apply(f"mul.wide.{ty} {{d}}, {{0}}, {{1}};", wide, (ty, a), (ty, b)).tolist() == exact
    got = apply(f"mad.wide.{ty} {{d}}, {{0}}, {{1}}, {{2}};", wide, (ty, a), (ty, b), (wide, np.full(len(a), 77)))
    assert got.tolist() == [wrap(e + 77, wide) for e in exact]


@pytest.mark.parametrize("ty", ["u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("half", ["lo", "hi"])
def test_mad(ty, half):
    a, b = pairs(ints(ty))
    got = apply(f"mad.{half}.{ty} {{d}}, {{0}}, {{1}}, {{0}};", ty, (ty, a), (ty, b))
    shift = int(ty[1:]) if half == "hi" else 0
    assert got.tolist() == [wrap((int(x) * int(y) >> shift) + int(x), ty) for x, y in zip(a, b, strict=True)]


@pytest.mark.parametrize("ty", INTEGERS)
@pytest.mark.parametrize("op", ["shl", "shr"])
def test_shift_beyond_the_width(op, ty):
    width = int(ty[1:])
    counts = np.array([0, 1, 7, 15, 16, 31, 32, 33, 63, 64, 65, 1000, 2**32 - 1], np.uint32)
    a, n = (x.ravel() for x in np.meshgrid(ints(ty), counts))
    got = apply(f"{op}.{'b' + ty[1:] if op == 'shl' else ty} {{d}}, {{0}}, {{1}};", ty, (ty, a), ("u32", n))
    expected = [
        wrap(int(x) << min(int(k), 99), ty) if op == "shl" else int(x) >> min(int(k), 99)
        for x, k in zip(a, n, strict=True)
    ]
    assert got.tolist() == expected and width


def test_carries():
    a, b = pairs(np.array([0, 1, 2**64 - 1, 2**63, 0x1234567890ABCDEF, 0xFFFFFFFF00000000], np.uint64))
    split = "mov.b64 {{%r1, %r2}}, {0}; mov.b64 {{%r3, %r4}}, {1};\n"
    for op, f in (("add", lambda x, y: x + y), ("sub", lambda x, y: x - y)):
        code = split + f"{op}.cc.u32 %r5, %r1, %r3; {op}c.u32 %r6, %r2, %r4; mov.b64 {{d}}, {{{{%r5, %r6}}}};"
        got = apply(code, "u64", ("u64", a), ("u64", b))
        assert got.tolist() == [f(int(x), int(y)) & (2**64 - 1) for x, y in zip(a, b, strict=True)]
    # 64 x 64 to the upper 64 bits by 32-bit multiply-adds
    code = (
        split
        + """mul.lo.u32 %r5, %r1, %r3; mul.hi.u32 %r6, %r1, %r3;
      mad.lo.cc.u32 %r6, %r1, %r4, %r6; madc.hi.u32 %r7, %r1, %r4, 0;
      mad.lo.cc.u32 %r6, %r2, %r3, %r6; madc.hi.cc.u32 %r7, %r2, %r3, %r7; addc.u32 %r8, 0, 0;
      mad.lo.cc.u32 %r7, %r2, %r4, %r7; madc.hi.u32 %r8, %r2, %r4, %r8; mov.b64 {d}, {{%r7, %r8}};"""
    )
    got = apply(code, "u64", ("u64", a), ("u64", b))
    assert got.tolist() == [int(x) * int(y) >> 64 for x, y in zip(a, b, strict=True)]
    code = "add.cc.u64 %rd5, {0}, {1}; addc.u64 {d}, 0, 0;"
    assert apply(code, "u64", ("u64", a), ("u64", b)).tolist() == [
        int(x) + int(y) >> 64 for x, y in zip(a, b, strict=True)
    ]


# ----------------------------------------------------------------------------------------------------------------------
# Bits


def test_prmt():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 2**32, (2, 200)).astype(np.uint32)
    s = rng.integers(0, 2**16, 200).astype(np.uint32)
    expected = []
    for x, y, z in zip(a.tolist(), b.tolist(), s.tolist(), strict=True):
        data = x.to_bytes(4, "little") + y.to_bytes(4, "little")
        out = []
        for i in range(4):
            byte = data[z >> 4 * i & 7]
            out.append((255 if byte & 128 else 0) if z >> 4 * i & 8 else byte)
        expected.append(int.from_bytes(bytes(out), "little"))
    assert apply("prmt.b32 {d}, {0}, {1}, {2};", "u32", ("u32", a), ("u32", b), ("u32", s)).tolist() == expected


@pytest.mark.parametrize("direction", "lr")
@pytest.mark.parametrize("mode", ["wrap", "clamp"])
def test_shf(direction, mode):
    n = np.array([0, 1, 5, 31, 32, 33, 40, 64], np.uint32)
    a, b = np.full(8, 0x89ABCDEF, np.uint32), np.full(8, 0x12345678, np.uint32)
    got = apply(f"shf.{direction}.{mode}.b32 {{d}}, {{0}}, {{1}}, {{2}};", "u32", ("u32", a), ("u32", b), ("u32", n))
    x = 0x1234567889ABCDEF
    k = [int(v) % 32 if mode == "wrap" else min(int(v), 32) for v in n]
    assert got.tolist() == [(x << v >> 32 if direction == "l" else x >> v) & 0xFFFFFFFF for v in k]


@pytest.mark.parametrize("table", [0xE8, 0x96, 0xCA, 0x01, 0xFE])
def test_lop3(table):
    a, b, c = np.random.default_rng(1).integers(0, 2**32, (3, 32)).astype(np.uint32)
    got = apply(f"lop3.b32 {{d}}, {{0}}, {{1}}, {{2}}, {table};", "u32", ("u32", a), ("u32", b), ("u32", c))
    expected = [sum((table >> (4 * (x >> k & 1) + 2 * (y >> k & 1) + (z >> k & 1)) & 1) << k for k in range(32))
                for x, y, z in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)]  # fmt: skip
    assert got.tolist() == expected


@pytest.mark.parametrize("ty", ["u32", "s32", "u64", "s64"])
def test_bit_fields(ty):
    width = int(ty[1:])
    position, length = (
        x.ravel().astype(np.uint32)
        for x in np.meshgrid([0, 1, 13, 31, 32, 63, 64, 200], [0, 1, 5, 31, 32, 63, 64, 255])
    )
    value = 0x9A5C3F0F89ABCDEF & ((1 << width) - 1)
    a = np.full(len(position), wrap(value, ty), dtype=ints(ty).dtype)
    got = apply(f"bfe.{ty} {{d}}, {{0}}, {{1}}, {{2}};", ty, (ty, a), ("u32", position), ("u32", length))
    expected = []
    for p, n in zip(position.tolist(), length.tolist(), strict=True):  # the manual's pseudo-code
        msb = width - 1
        sign = 0 if ty[0] == "u" or n == 0 else value >> min(p + n - 1, msb) & 1
        bits = [(value >> (p + i) & 1) if i < n and p + i <= msb else sign for i in range(width)]
        expected.append(wrap(sum(b << i for i, b in enumerate(bits)), ty))
    assert got.tolist() == expected
    if ty[0] == "u":
        base = np.full(len(position), (1 << width) - 1, a.dtype)
        got = apply(
            f"bfi.b{width} {{d}}, {{0}}, {{1}}, {{2}}, {{3}};",
            ty,
            (ty, a),
            (ty, base),
            ("u32", position),
            ("u32", length),
        )
        expected = []
        for p, n in zip(position.tolist(), length.tolist(), strict=True):
            field = ((1 << n) - 1) << p & ((1 << width) - 1)
            expected.append((int(base[0]) & ~field) | (value << p & field))
        assert got.tolist() == expected


@pytest.mark.parametrize("ty", ["u32", "s32", "u64", "s64"])
def test_counts_of_bits(ty):
    a, width = ints(ty), int(ty[1:])
    raw = [int(x) & ((1 << width) - 1) for x in a]
    assert apply(f"popc.b{width} {{d}}, {{0}};", "u32", (ty, a)).tolist() == [x.bit_count() for x in raw]
    assert apply(f"clz.b{width} {{d}}, {{0}};", "u32", (ty, a)).tolist() == [width - x.bit_length() for x in raw]
    assert apply(f"brev.b{width} {{d}}, {{0}};", f"u{width}", (ty, a)).tolist() == [
        int(f"{x:0{width}b}"[::-1], 2) for x in raw
    ]
    found = [(~int(x) if x < 0 else int(x)).bit_length() - 1 for x in a]
    assert apply(f"bfind.{ty} {{d}}, {{0}};", "s32", (ty, a)).tolist() == found
    amounts = [f if f < 0 else width - 1 - f for f in found]
    assert apply(f"bfind.shiftamt.{ty} {{d}}, {{0}};", "s32", (ty, a)).tolist() == amounts


def test_dp4a():
    a, b = np.random.default_rng(2).integers(0, 2**32, (2, 64)).astype(np.uint32)
    got = apply("dp4a.s32.s32 {d}, {0}, {1}, {2};", "s32", ("b32", a), ("b32", b), ("s32", np.full(64, -5)))
    exact = (a.view(np.int8).astype(int) * b.view(np.int8)).reshape(64, 4).sum(1) - 5
    assert got.tolist() == exact.tolist()


# ----------------------------------------------------------------------------------------------------------------------
# Floats


@pytest.mark.parametrize("ty", ["f32", "f64"])
@pytest.mark.parametrize("op", ["add", "sub", "mul", "div.rn"])
def test_float_binary(op, ty):
    a, b = pairs(F32 if ty == "f32" else F64)
    f = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div.rn": np.divide}[op]
    same(apply(f"{op}.{ty} {{d}}, {{0}}, {{1}};", ty, (ty, a), (ty, b)), f(a, b))


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("ty", ["f32", "f64"])
@pytest.mark.parametrize("op", ["add", "sub", "mul", "div"])
def test_rounding_modes(op, ty, mode):
    dtype = np.float32 if ty == "f32" else np.float64
    rng = np.random.default_rng(3)
    a, b = (rng.normal(size=(2, 64)) * 10.0 ** rng.integers(-5, 5, (2, 64))).astype(dtype)
    f = {"add": lambda x, y: x + y, "sub": lambda x, y: x - y, "mul": lambda x, y: x * y, "div": lambda x, y: x / y}[op]
    expected = [rounded(f(Fraction(float(x)), Fraction(float(y))), dtype, mode) for x, y in zip(a, b, strict=True)]
    same(apply(f"{op}.{mode}.{ty} {{d}}, {{0}}, {{1}};", ty, (ty, a), (ty, b)), expected)


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("ty", ["f32", "f64"])
def test_fma(ty, mode):
    dtype = np.float32 if ty == "f32" else np.float64
    rng = np.random.default_rng(4)
    a, b = rng.normal(size=(2, 64)).astype(dtype)
    c = (-a * b * (1 + rng.integers(-1, 2, 64) * 1e-3)).astype(dtype)
    expected = [
        rounded(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)), dtype, mode)
        for x, y, z in zip(a, b, c, strict=True)
    ]
    expected = [e if e != 0 else (dtype(-0.0) if mode == "rm" else dtype(0)) for e in expected]
    same(apply(f"fma.{mode}.{ty} {{d}}, {{0}}, {{1}}, {{2}};", ty, (ty, a), (ty, b), (ty, c)), expected)


def test_ftz_and_sat():
    a, b = pairs(F32)
    tiny = np.finfo(np.float32).tiny

    def flush(x):
        return np.where(np.abs(x) < tiny, np.copysign(np.float32(0), x), x)

    same(apply("add.ftz.f32 {d}, {0}, {1};", "f32", ("f32", a), ("f32", b)), flush(flush(a) + flush(b)))
    same(apply("mul.ftz.f32 {d}, {0}, {1};", "f32", ("f32", a), ("f32", b)), flush(flush(a) * flush(b)))
    exact = a * b
    clamped = np.where(exact > 0, np.minimum(exact, 1), 0).astype(np.float32)  # NaN: +0
    same(apply("mul.sat.f32 {d}, {0}, {1};", "f32", ("f32", a), ("f32", b)), clamped)
    same(apply("fma.rn.sat.f32 {d}, {0}, {1}, 0f00000000;", "f32", ("f32", a), ("f32", b)), clamped)


@pytest.mark.parametrize("ty", ["f32", "f64"])
@pytest.mark.parametrize("op", ["min", "max", "min.NaN", "max.NaN"])
def test_min_max(op, ty):
    a, b = pairs(F32 if ty == "f32" else F64)
    expected = []
    for x, y in zip(a, b, strict=True):
        if np.isnan(x) or np.isnan(y):
            expected.append(
                np.nan if op.endswith("NaN") or (np.isnan(x) and np.isnan(y)) else (y if np.isnan(x) else x)
            )
        else:  # -0 is below +0
            key = lambda v: (v, not np.signbit(v))  # noqa: E731
            expected.append((min if op.startswith("min") else max)(x, y, key=key))
    if ty == "f64" and "NaN" in op:
        return
    same(apply(f"{op}.{ty} {{d}}, {{0}}, {{1}};", ty, (ty, a), (ty, b)), np.array(expected))


def test_signs():
    same(apply("neg.f32 {d}, {0};", "f32", ("f32", F32)), -F32)
    same(apply("abs.f32 {d}, {0};", "f32", ("f32", F32)), np.abs(F32))
    a, b = pairs(F32[~np.isnan(F32)])
    same(apply("copysign.f32 {d}, {0}, {1};", "f32", ("f32", a), ("f32", b)), np.copysign(b, a))
    h = F16.view(np.uint16)
    assert apply("neg.f16 {d}, {0};", "f16", ("f16", h)).tolist() == (h ^ 0x8000).tolist()
    assert apply("abs.bf16 {d}, {0};", "bf16", ("bf16", BF16)).tolist() == (BF16 & 0x7FFF).tolist()


@pytest.mark.parametrize("op", ["add", "sub", "mul", "fma"])
def test_f16(op):
    a, b = pairs(F16)
    rng = np.random.default_rng(5)
    a = np.concatenate([a, rng.normal(size=200).astype(np.float16)])
    b = np.concatenate([b, rng.normal(size=200).astype(np.float16)])
    bits = ("f16", a.view(np.uint16)), ("f16", b.view(np.uint16))
    if op == "fma":
        c = np.roll(a, 7)
        got = apply("fma.rn.f16 {d}, {0}, {1}, {2};", "f16", *bits, ("f16", c.view(np.uint16))).view(np.float16)
        exact = a.astype(np.longdouble) * b.astype(np.longdouble) + c.astype(
            np.longdouble
        )  # exact in 64 bits, but for a few
        same(got, exact.astype(np.float16))
    else:
        f = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[op]
        got = apply(f"{op}.f16 {{d}}, {{0}}, {{1}};", "f16", *bits).view(np.float16)
        same(got, f(a, b))
        pair = (
            ("f16x2", a.view(np.uint16).astype(np.uint32) << 16 | 0x3C00),
            ("f16x2", b.view(np.uint16).astype(np.uint32) << 16 | 0x3C00),
        )
        two = apply(f"{op}.f16x2 {{d}}, {{0}}, {{1}};", "f16x2", *pair)
        same((two >> 16).astype(np.uint16).view(np.float16), f(a, b))
        assert set((two & 0xFFFF).tolist()) == {int(f(np.float16(1), np.float16(1)).view(np.uint16))}


@pytest.mark.parametrize("op", ["add", "mul", "fma"])
def test_bf16(op):
    rng = np.random.default_rng(6)
    values = np.concatenate([BF16, to_bf16(rng.normal(size=12))])
    a, b = pairs(values)
    c = np.roll(a, 5)
    x, y, z = (bf16(v).astype(np.float64) for v in (a, b, c))
    exact = {"add": x + y, "mul": x * y, "fma": x * y + z}[op]
    if op == "fma":  # where the sum isn't exact in double
        keep = [not np.isfinite(e) or Fraction(p) * Fraction(q) + Fraction(r) == Fraction(e)
                for e, p, q, r in zip(exact, x, y, z, strict=True)]  # fmt: skip
        a, b, c, exact = a[keep], b[keep], c[keep], exact[keep]
    args = [("bf16", a), ("bf16", b)] + ([("bf16", c)] if op == "fma" else [])
    suffix = ".rn" if op == "fma" else ""
    got = apply(f"{op}{suffix}.bf16 {{d}}, {{0}}, {{1}}{', {2}' if op == 'fma' else ''};", "bf16", *args)
    same(bf16(got), bf16(to_bf16(exact)))


APPROXIMATE = {
    "ex2": np.exp2, "lg2": np.log2, "rcp": lambda x: 1 / x, "rsqrt": lambda x: 1 / np.sqrt(x), "sqrt": np.sqrt, "sin": np.sin,
    "cos": np.cos, "tanh": np.tanh,
}  # fmt: skip

# the errors that the manual allows, where they are larger than two units of the last place
MANUAL = {
    "lg2": lambda x, size: np.where((x > 0.5) & (x < 2), 2.0**-22, 2.0**-22 * size),
    "sin": lambda x, size: 2.0**-20.5,
    "cos": lambda x, size: 2.0**-20.5,
    "tanh": lambda x, size: 2.0**-11 * size,
}


@pytest.mark.parametrize("op", APPROXIMATE)
def test_approximate(op):
    a = np.concatenate([F32, np.linspace(-20, 20, 77, dtype=np.float32), np.linspace(0.9, 1.1, 32, dtype=np.float32)])
    expected = APPROXIMATE[op](a.astype(np.float64)).astype(np.float32)
    got = apply(f"{op}.approx.f32 {{d}}, {{0}};", "f32", ("f32", a))
    finite = np.isfinite(expected)
    same(got[~finite], expected[~finite])
    assert np.all(np.abs(got[finite] - expected[finite]) <= np.spacing(np.abs(expected[finite])))
    with ptxsim.options(ulp=2):
        off = [apply(f"{op}.approx.f32 {{d}}, {{0}};", "f32", ("f32", a)) for _ in range(2)]
    same(*off)  # the seed decides
    error = np.abs(off[0][finite] - expected[finite].astype(np.float64))
    size = np.abs(expected[finite])
    by_manual = MANUAL[op](a[finite], size) + np.spacing(size) if op in MANUAL else 0 * size
    allowed = np.maximum(3 * np.spacing(size), by_manual)
    assert np.all(error <= allowed)
    assert np.any(error > allowed / 5)
    wide = by_manual > 8 * np.spacing(size)
    assert not wide.any() or np.any(error[wide] > allowed[wide] / 5)


def test_what_is_exact_is_not_jittered():
    a = np.array([0, -0.0, 1, -1, 5, -126, -140, 127, 1e-40, -1e-40], np.float32)
    for form in ("approx", "approx.ftz"):
        for seed in range(8):
            with ptxsim.options(ulp=2, seed=seed):
                got = apply(f"ex2.{form}.f32 {{d}}, {{0}};", "f32", ("f32", a))
                ones = apply(f"lg2.{form}.f32 {{d}}, {{0}};", "f32", ("f32", np.ones(32, np.float32)))
            exact = np.exp2(np.where(np.abs(a) < 1e-38, 0, a).astype(np.float64)).astype(np.float32)
            same(got, np.where(exact < np.finfo(np.float32).tiny, 0, exact) if form.endswith("ftz") else exact)
            assert not ones.any()


def test_division():
    a, b = pairs(F32)
    got = apply("div.approx.f32 {d}, {0}, {1};", "f32", ("f32", a), ("f32", b))
    huge = (np.abs(b) > 2.0**126) & np.isfinite(b)
    expected = np.where(huge, np.where(np.isinf(a) | np.isnan(a), np.nan, np.copysign(0, a) * np.sign(b)), a / b)
    same(got, expected.astype(np.float32))
    same(apply("div.full.f32 {d}, {0}, {1};", "f32", ("f32", a), ("f32", b)), a / b)
    same(apply("sqrt.rn.f64 {d}, {0};", "f64", ("f64", F64)), np.sqrt(F64))
    same(apply("rcp.rn.f32 {d}, {0};", "f32", ("f32", F32)), 1 / F32)


# ----------------------------------------------------------------------------------------------------------------------
# Conversions


@pytest.mark.parametrize("to", ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("source", ["f32", "f64"])
@pytest.mark.parametrize("mode", ["rni", "rzi", "rmi", "rpi"])
def test_float_to_integer(mode, source, to):
    dtype = np.float32 if source == "f32" else np.float64
    a = np.array([0.0, -0.0, 0.5, 1.5, 2.5, -0.5, -1.5, 127.5, 128, -128.5, 255.5, 1e5, -1e5, 2147483648.0, -2147483904.0, 4294967296.0,
                  1e19, -1e19, 9.3e18, np.inf, -np.inf, np.nan, 1e-40], dtype)  # fmt: skip
    got = apply(f"cvt.{mode}.{to}.{source} {{d}}, {{0}};", to, (source, a))
    width, f = int(to[1:]), {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[mode]
    low, high = (-(1 << (width - 1)), (1 << (width - 1)) - 1) if to[0] == "s" else (0, (1 << width) - 1)
    nan = wrap(1 << 63, to) if width == 64 else 0
    expected = [
        nan if np.isnan(x) else low if x == -np.inf else high if x == np.inf else max(low, min(high, int(f(float(x)))))
        for x in a
    ]
    assert got.tolist() == expected


@pytest.mark.parametrize("source", ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_integer_to_float(mode, source):
    width = int(source[1:])
    rng = np.random.default_rng(7)
    values = [wrap(int(v), source) for v in rng.integers(0, 2**63, 30, dtype=np.uint64)] + [
        wrap(v, source) for v in (0, 1, -1, 1 << (width - 1))
    ]
    a = np.array(values, NUMPY[source])
    same(
        apply(f"cvt.{mode}.f32.{source} {{d}}, {{0}};", "f32", (source, a)),
        [rounded(Fraction(v), np.float32, mode) for v in values],
    )
    same(
        apply(f"cvt.{mode}.f64.{source} {{d}}, {{0}};", "f64", (source, a)),
        [rounded(Fraction(v), np.float64, mode) for v in values],
    )


def test_narrowing_floats():
    rng = np.random.default_rng(8)
    a = np.concatenate(
        [
            F32,
            rng.normal(size=200).astype(np.float32),
            np.array([65519, 65520, -65520, 6.1e-5, 3e-8, 2.9e-8], np.float32),
        ]
    )
    same(apply("cvt.rn.f16.f32 {d}, {0};", "f16", ("f32", a)).view(np.float16), a.astype(np.float16))
    same(bf16(apply("cvt.rn.bf16.f32 {d}, {0};", "bf16", ("f32", a))), bf16(to_bf16(a)))
    same(bf16(apply("cvt.rz.bf16.f32 {d}, {0};", "bf16", ("f32", a))),
         np.where(np.isnan(a), a, (a.view(np.uint32) & 0xFFFF0000).view(np.float32)))  # fmt: skip
    same(apply("cvt.f32.f16 {d}, {0};", "f32", ("f16", F16.view(np.uint16))), F16.astype(np.float32))
    same(apply("cvt.f32.bf16 {d}, {0};", "f32", ("bf16", BF16)), bf16(BF16))
    d = np.concatenate([F64, rng.normal(size=100), [1 + 2**-24, 1 + 2**-24 + 2**-50, 1e-46, 3.4028235677973366e38]])
    same(apply("cvt.rn.f32.f64 {d}, {0};", "f32", ("f64", d)), d.astype(np.float32))
    same(apply("cvt.rn.f16.f64 {d}, {0};", "f16", ("f64", d)).view(np.float16), d.astype(np.float16))
    for mode in ("rz", "rm", "rp"):
        finite = d[np.isfinite(d) & (np.abs(d) < 1e300) & (d != 0)]
        same(
            apply(f"cvt.{mode}.f32.f64 {{d}}, {{0}};", "f32", ("f64", finite)),
            [rounded(Fraction(float(v)), np.float32, mode) for v in finite],
        )
    high, low = pairs(F32)
    two = apply("cvt.rn.bf16x2.f32 {d}, {0}, {1};", "bf16x2", ("f32", high), ("f32", low))
    same(bf16(two >> 16), bf16(to_bf16(high)))
    same(bf16(two & 0xFFFF), bf16(to_bf16(low)))
    two = apply("cvt.rn.relu.f16x2.f32 {d}, {0}, {1};", "f16x2", ("f32", high), ("f32", low))
    same(
        (two >> 16).astype(np.uint16).view(np.float16),
        np.where(np.isnan(high), high, np.where(high > 0, high, 0)).astype(np.float16),
    )


def test_float_to_float():
    same(
        apply("cvt.sat.f32.f32 {d}, {0};", "f32", ("f32", F32)),
        np.where(F32 > 0, np.minimum(F32, 1), 0).astype(np.float32),
    )
    for mode, f in (("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)):
        same(apply(f"cvt.{mode}.f32.f32 {{d}}, {{0}};", "f32", ("f32", F32)), f(F32))
    same(apply("cvt.ftz.f32.f32 {d}, {0};", "f32", ("f32", np.float32([1e-40, -1e-40, 1]))), np.float32([0, -0.0, 1]))
    u = F32[np.isfinite(F32)]
    got = apply("cvt.rna.tf32.f32 {d}, {0};", "b32", ("f32", u))
    assert got.tolist() == ((u.view(np.uint32).astype(np.uint64) + 0x1000) & 0xFFFFE000).tolist()


@pytest.mark.parametrize("to", ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("source", INTEGERS)
def test_integer_to_integer(source, to):
    a, width = ints(source), int(to[1:])
    assert apply(f"cvt.{to}.{source} {{d}}, {{0}};", to, (source, a)).tolist() == [wrap(int(x), to) for x in a]
    low, high = (-(1 << (width - 1)), (1 << (width - 1)) - 1) if to[0] == "s" else (0, (1 << width) - 1)
    assert apply(f"cvt.sat.{to}.{source} {{d}}, {{0}};", to, (source, a)).tolist() == [
        max(low, min(high, int(x))) for x in a
    ]


# ----------------------------------------------------------------------------------------------------------------------
# Predicates

COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip


@pytest.mark.parametrize("op", [*COMPARISONS, *(c + "u" for c in COMPARISONS), "num", "nan"])
@pytest.mark.parametrize("ty", ["f32", "f64", "f16", "bf16"])
def test_setp_float(op, ty):
    raw = {"f32": F32, "f64": F64, "f16": F16.view(np.uint16), "bf16": BF16}[ty]
    a, b = pairs(raw)
    x, y = (
        {"f16": lambda v: v.view(np.float16), "bf16": bf16}.get(ty, lambda v: v)(a),
        {"f16": lambda v: v.view(np.float16), "bf16": bf16}.get(ty, lambda v: v)(b),
    )
    nan = np.isnan(x) | np.isnan(y)
    if op in ("num", "nan"):
        expected = nan if op == "nan" else ~nan
    else:
        expected = COMPARISONS[op[:2]](x, y) & ~nan | (nan if len(op) == 3 else False)
    got = apply(f"setp.{op}.{ty} %p1, {{0}}, {{1}}; selp.u32 {{d}}, 1, 0, %p1;", "u32", (ty, a), (ty, b))
    assert got.astype(bool).tolist() == expected.tolist()


@pytest.mark.parametrize("op", ["lt", "neu", "num"])
@pytest.mark.parametrize("ty", ["f16", "bf16"])
def test_setp_of_pairs(op, ty):
    """Each half has a predicate of its own: the low half the first."""
    raw = {"f16": F16.view(np.uint16), "bf16": BF16}[ty]
    a, b = pairs(raw)
    one = apply(f"setp.{op}.{ty} %p1, {{0}}, {{1}}; selp.u32 {{d}}, 1, 0, %p1;", "u32", (ty, a), (ty, b))
    wide = [x.astype(np.uint32) | np.roll(x, 1).astype(np.uint32) << 16 for x in (a, b)]
    code = f"setp.{op}.{ty}x2 %p1|%p2, {{0}}, {{1}}; selp.u32 %r1, 2, 0, %p2; selp.u32 {{d}}, 1, 0, %p1; or.b32 {{d}}, {{d}}, %r1;"
    two = apply(code, "u32", *((f"{ty}x2", x) for x in wide))
    assert two.tolist() == (one + 2 * np.roll(one, 1)).tolist()


@pytest.mark.parametrize("op", COMPARISONS)
@pytest.mark.parametrize("ty", INTEGERS)
def test_setp_integer(op, ty):
    a, b = pairs(ints(ty))
    got = apply(f"setp.{op}.{ty} %p1, {{0}}, {{1}}; selp.u32 {{d}}, 1, 0, %p1;", "u32", (ty, a), (ty, b))
    assert got.astype(bool).tolist() == COMPARISONS[op](a, b).tolist()
    if ty[0] == "u" and op in ("lt", "le", "gt", "ge"):
        other = {"lt": "lo", "le": "ls", "gt": "hi", "ge": "hs"}[op]
        assert (
            apply(f"setp.{other}.{ty} %p1, {{0}}, {{1}}; selp.u32 {{d}}, 1, 0, %p1;", "u32", (ty, a), (ty, b)).tolist()
            == got.tolist()
        )


@pytest.mark.parametrize("join", ["and", "or", "xor"])
def test_setp_with_a_predicate(join):
    a, b = pairs(np.array([0, 1], np.uint32))
    code = f"setp.ne.u32 %p1, {{1}}, 0; setp.ne.{join}.u32 %p2|%p3, {{0}}, 0, %p1; selp.u32 %r1, 2, 0, %p2; selp.u32 {{d}}, 1, 0, %p3; or.b32 {{d}}, {{d}}, %r1;"
    f = {"and": lambda x, y: x & y, "or": lambda x, y: x | y, "xor": lambda x, y: x ^ y}[join]
    got = apply(code, "u32", ("u32", a), ("u32", b))
    assert got.tolist() == [2 * f(int(x), int(y)) + f(1 - int(x), int(y)) for x, y in zip(a, b, strict=True)]
    code = f"setp.ne.u32 %p1, {{0}}, 0; setp.ne.u32 %p2, {{1}}, 0; {join}.pred %p3, %p1, %p2; not.pred %p4, %p3; selp.u32 {{d}}, 1, 0, %p4;"
    assert apply(code, "u32", ("u32", a), ("u32", b)).tolist() == [
        1 - f(int(x), int(y)) for x, y in zip(a, b, strict=True)
    ]
    code = "setp.ne.u32 %p1, {0}, 0; setp.ne.and.u32 %p2, {1}, 0, !%p1; selp.u32 {d}, 1, 0, %p2;"
    assert apply(code, "u32", ("u32", a), ("u32", b)).tolist() == [
        int(y) & (1 - int(x)) for x, y in zip(a, b, strict=True)
    ]


def test_setp_ftz_and_testp():
    a = np.float32([1e-40, -1e-40, 0, 2])
    assert apply("setp.eq.ftz.f32 %p1, {0}, 0f00000000; selp.u32 {d}, 1, 0, %p1;", "u32", ("f32", a)).tolist() == [
        1,
        1,
        1,
        0,
    ]
    b = np.float32([1, np.inf, np.nan, 1e-40, 0])
    for kind, expected in {"finite": [1, 0, 0, 1, 1], "infinite": [0, 1, 0, 0, 0], "number": [1, 1, 0, 1, 1],
                           "notanumber": [0, 0, 1, 0, 0], "normal": [1, 0, 0, 0, 0], "subnormal": [0, 0, 0, 1, 0]}.items():  # fmt: skip
        assert apply(f"testp.{kind}.f32 %p1, {{0}}; selp.u32 {{d}}, 1, 0, %p1;", "u32", ("f32", b)).tolist() == expected


def test_guards():
    code = "setp.gt.s32 %p1, {0}, 0; mov.u32 {d}, 7; @%p1 mov.u32 {d}, 1; @!%p1 add.u32 {d}, {d}, 1;"
    assert apply(code, "u32", ("s32", np.array([-1, 0, 1, 2]))).tolist() == [8, 8, 1, 1]


# ----------------------------------------------------------------------------------------------------------------------
# Warps


@pytest.mark.parametrize("width", [32, 16, 8, 2])
@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("by", [0, 1, 3, 8, 17, 31])
def test_shfl(mode, by, width):
    mask = (32 - width) << 8 | (0 if mode == "up" else 31)
    out = lanes(f"add.u32 %r2, %r0, 100; shfl.sync.{mode}.b32 %r3|%p1, %r2, {by}, {mask}, -1; selp.u32 %r4, 1, 0, %p1;"
                "st.global.v2.u32 [%rd1], {%r3, %r4};", 2)  # fmt: skip
    for lane in range(32):  # the manual's pseudo-code
        segment, clamp = mask >> 8 & 31, mask & 31
        last, first = (lane & segment) | (clamp & ~segment & 31), lane & segment
        j = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": first | (by & ~segment & 31)}[mode]
        valid = j >= last if mode == "up" else j <= last
        assert out[lane].tolist() == [100 + (j if valid else lane), int(valid)]


def test_tiles_of_a_warp_have_masks_of_their_own():
    out = lanes(
        """and.b32 %r5, %r0, 16; mov.u32 %r6, 0xffff; shl.b32 %r6, %r6, %r5; shfl.sync.bfly.b32 %r3, %r0, 8, 0x101f, %r6;
      vote.sync.ballot.b32 %r4, 1, %r6; st.global.v2.u32 [%rd1], {%r3, %r4};""",
        2,
    )
    assert out.tolist() == [[lane ^ 8, 0xFFFF << (lane & 16)] for lane in range(32)]


def test_shuffle_of_absent_lanes():
    code = "setp.lt.u32 %p1, %r0, 16; @!%p1 bra L; shfl.sync.idx.b32 %r3, %r0, 20, 31, 0xffff; L: st.global.u32 [%rd1], %r0;"
    with pytest.raises(ptxsim.Findings, match="SHUFFLE reads lane 20"):
        lanes(code)
    with pytest.raises(ptxsim.Findings, match="MEMBER MASK lacks the calling lane"):
        lanes("shfl.sync.idx.b32 %r3, %r0, 0, 31, 0xffff;")
    with pytest.raises(ptxsim.Findings, match="MEMBER MASK names lanes that have ended"):
        lanes("setp.lt.u32 %p1, %r0, 3; @%p1 exit; shfl.sync.idx.b32 %r3, %r0, 9, 31, -1; st.global.u32 [%rd1], %r3;")


def test_votes():
    code = """setp.lt.u32 %p1, %r0, 5; vote.sync.ballot.b32 %r2, %p1, -1; vote.sync.any.pred %p2, %p1, -1;
      vote.sync.all.pred %p3, %p1, -1; vote.sync.uni.pred %p4, %p1, -1; vote.sync.all.pred %p5, !%p1, 0xffffffe0;
      selp.u32 %r3, 1, 0, %p2; selp.u32 %r4, 2, 0, %p3; selp.u32 %r5, 4, 0, %p4; or.b32 %r3, %r3, %r4; or.b32 %r3, %r3, %r5;
      st.global.v2.u32 [%rd1], {%r2, %r3};"""
    with pytest.raises(ptxsim.Findings, match="MEMBER MASK lacks"):
        lanes(code, 2)
    out = lanes(code.replace("vote.sync.all.pred %p5, !%p1, 0xffffffe0;", ""), 2)
    assert (out == [31, 1]).all()
    half = """setp.lt.u32 %p1, %r0, 16; setp.eq.u32 %p2, %r0, 3; @!%p1 bra B; vote.sync.ballot.b32 %r2, %p2, 0xffff; bra E;
      B: vote.sync.ballot.b32 %r2, !%p2, 0xffff0000; E: activemask.b32 %r3; st.global.u32 [%rd1], %r2;"""
    out = lanes(half)
    assert set(out[:16]) == {8} and set(out[16:]) == {0xFFFF0000}


def test_elect():
    out = lanes("elect.sync %r2|%p1, -1; selp.u32 %r3, 1, 0, %p1; st.global.v2.u32 [%rd1], {%r2, %r3};", 2)
    assert out.tolist() == [[0, int(lane == 0)] for lane in range(32)]


def test_match():
    data = np.random.default_rng(9).integers(0, 4, 32).astype(np.uint32)
    out = lanes("ld.global.u32 %r2, [%rd0]; match.any.sync.b32 %r3, %r2, -1; st.global.u32 [%rd1], %r3;", data=data)
    assert out.tolist() == [sum(1 << k for k in range(32) if data[k] == data[lane]) for lane in range(32)]
    for values, expected in ((np.full(32, 5, np.uint32), [0xFFFFFFFF, 1]), (data, [0, 0])):
        out = lanes("ld.global.u32 %r2, [%rd0]; match.all.sync.b32 %r3|%p1, %r2, -1; selp.u32 %r4, 1, 0, %p1;"
                    "st.global.v2.u32 [%rd1], {%r3, %r4};", 2, values)  # fmt: skip
        assert (out == expected).all()


@pytest.mark.parametrize(
    "op", ["add.u32", "min.u32", "max.u32", "add.s32", "min.s32", "max.s32", "and.b32", "or.b32", "xor.b32"]
)
def test_redux(op):
    data = np.random.default_rng(10).integers(0, 2**32, 32).astype(np.uint32)
    out = lanes(f"ld.global.u32 %r2, [%rd0]; redux.sync.{op} %r3, %r2, -1; st.global.u32 [%rd1], %r3;", data=data)
    name, ty = op.split(".")
    x = data.view(np.int32) if ty == "s32" else data
    f = {
        "add": np.add,
        "min": np.minimum,
        "max": np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }[name]
    assert set(out.view(x.dtype)) == {f.reduce(x, dtype=x.dtype)}


# ----------------------------------------------------------------------------------------------------------------------
# Atomics


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize("op", ["add.u32", "min.s32", "max.s32", "min.u32", "and.b32", "or.b32", "xor.b32", "exch.b32", "inc.u32",
                                "dec.u32", "cas.b32"])  # fmt: skip
def test_atomics(op, space):
    start = {"and.b32": 0xFFFFFFFF, "cas.b32": 0, "dec.u32": 3, "min.u32": 99}.get(op, 5)
    operand = "0, %r2" if op == "cas.b32" else "6" if op[:3] in ("inc", "dec") else "%r2"
    data = np.random.default_rng(11).integers(0, 2**32, 32).astype(np.uint32)
    data[0] = max(1, data[0])
    if space == "global":
        word, before, after = "[%rd9]", "", "ld.global.u32 %r5, [%rd9];"
        outside = f".global .u32 word = {start};"
        address = "mov.u64 %rd9, word;"
    else:
        word, outside = "[%rd9]", ".shared .u32 word;"
        address = "mov.u64 %rd9, word;"
        before = f"setp.eq.u32 %p1, %r0, 0; @%p1 st.shared.u32 [%rd9], {start}; bar.sync 0;"
        after = "bar.sync 0; ld.shared.u32 %r5, [%rd9];"
    barrier = "bar.sync 0;" if space == "global" else ""
    code = f"{address} ld.global.u32 %r2, [%rd0]; {before} atom.{space}.{op} %r3, {word}, {operand}; {barrier} {after} st.global.v2.u32 [%rd1], {{%r3, %r5}};"
    out = lanes(code, 2, data, outside=outside)
    x, olds = start, []
    signed = lambda v: v - 2**32 if v >> 31 else v  # noqa: E731
    for d in data.tolist():
        olds.append(x)
        x = {
            "add.u32": (x + d) % 2**32, "min.s32": min(signed(x), signed(d)) % 2**32, "max.s32": max(signed(x), signed(d)) % 2**32,
            "min.u32": min(x, d), "and.b32": x & d, "or.b32": x | d, "xor.b32": x ^ d, "exch.b32": d,
            "inc.u32": 0 if x >= 6 else x + 1, "dec.u32": 6 if x == 0 or x > 6 else x - 1, "cas.b32": d if x == 0 else x,
        }[op]  # fmt: skip
    assert out[:, 0].tolist() == olds and set(out[:, 1].tolist()) == {x}


def test_float_atomics():
    out = lanes("mov.u64 %rd9, word; red.global.add.f32 [%rd9], 0f3F000000; bar.sync 0; ld.global.f32 %f1, [%rd9]; st.global.f32 [%rd1], %f1;",
                outside=".global .f32 word = 0f3F800000;")  # fmt: skip
    assert set(out.view(np.float32)) == {17.0}
    out = lanes("mov.u64 %rd9, word; mov.b32 %r2, 0x40003C00; red.global.add.noftz.f16x2 [%rd9], %r2; bar.sync 0; ld.global.u32 %r3, [%rd9];"
                "st.global.u32 [%rd1], %r3;", outside=".global .u32 word = 0;")  # fmt: skip
    assert out[0] == int(np.float16(64).view(np.uint16)) << 16 | int(np.float16(32).view(np.uint16))
