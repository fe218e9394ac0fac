"""Tiny kernels around one instruction."""

import ctypes
from fractions import Fraction

import numpy as np
import ptxsim

NUMPY = {
    "f32": np.float32,
    "f64": np.float64,
    "f16": np.uint16,
    "bf16": np.uint16,
    "b16": np.uint16,
    "u16": np.uint16,
    "s16": np.int16,
    "b32": np.uint32,
    "u32": np.uint32,
    "s32": np.int32,
    "b64": np.uint64,
    "u64": np.uint64,
    "s64": np.int64,
    "u8": np.uint8,
    "s8": np.int8,
    "f16x2": np.uint32,
    "bf16x2": np.uint32,
}
REGISTER = {"u8": "u16", "s8": "s16", "f16": "b16", "bf16": "b16", "f16x2": "b32", "bf16x2": "b32"}
MEMORY = {"f16": "b16", "bf16": "b16", "f16x2": "b32", "bf16x2": "b32"}
HEADER = ".version 8.3\n.target sm_90a\n.address_size 64\n"
DECLARATIONS = """
.reg .pred %p<16>; .reg .b16 %h<32>; .reg .b32 %r<64>; .reg .f32 %f<64>; .reg .b64 %rd<64>; .reg .f64 %fd<16>;
"""


def kernel(body, params="", outside=""):
    return ptxsim.Module(f"{HEADER}{outside}\n.visible .entry k({params})\n{{\n{DECLARATIONS}\n{body}\nret;\n}}\n")


def apply(code, out, *inputs):
    """An instruction on every element: `code` with {d} and {0}, {1}, ...; out: PTX type; inputs: (PTX type, array)."""
    n = len(inputs[0][1])
    padded = -(-n // 32) * 32
    arrays = []
    for ty, x in inputs:
        a = np.zeros(padded, NUMPY[ty])
        a[:n] = np.asarray(x).astype(NUMPY[ty]) if np.asarray(x).dtype != NUMPY[ty] else x
        arrays.append(a)
    result = np.zeros(padded, NUMPY[out])
    params = ", ".join(f".param .u64 q{i}" for i in range(len(arrays) + 1))
    body = "mov.u32 %r60, %tid.x; mov.u32 %r61, %ctaid.x; mad.lo.u32 %r60, %r61, 32, %r60;\n"
    names = {"d": "%out"}
    body += f".reg .{REGISTER.get(out, out)} %out;\n"
    for i, (ty, _) in enumerate(inputs):
        body += f".reg .{REGISTER.get(ty, ty)} %in{i};\nld.param.u64 %rd60, [q{i}];\n"
        body += (
            f"mad.wide.u32 %rd60, %r60, {arrays[i].itemsize}, %rd60;\nld.global.{MEMORY.get(ty, ty)} %in{i}, [%rd60];\n"
        )
    body += code.format(*[f"%in{i}" for i in range(len(inputs))], **names) + "\n"
    body += f"ld.param.u64 %rd61, [q{len(arrays)}];\nmad.wide.u32 %rd61, %r60, {result.itemsize}, %rd61;\n"
    body += f"st.global.{MEMORY.get(out, out)} [%rd61], %out;\n"
    m = kernel(body, params)
    tensors = {f"in{i}": (a, True) for i, a in enumerate(arrays)} | {"out": result}
    m.launch("k", padded // 32, 32, [ptxsim.pointer(a) for a in (*arrays, result)], tensors)
    return result[:n]


def aligned(x):
    """A copy of an array on a 256-byte boundary, as an allocation of the GPU's is."""
    x = np.ascontiguousarray(x)
    store = np.empty(x.nbytes + 256, np.uint8)
    start = -store.ctypes.data % 256
    out = store[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    out[...] = x
    return out


def lanes(code, outputs=1, data=None, threads=32, outside="", blocks=1, shared=0, **launch):
    """`code` for blocks of `threads`: %r0 is the thread, %rd0 points to data[thread], %rd1 to out[thread * outputs], in
    4 bytes; all of `out` comes back."""
    data = aligned(np.arange(threads, dtype=np.uint32) if data is None else data)
    out = aligned(np.zeros((threads * blocks, outputs), np.uint32))
    body = f"""mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x; mad.lo.u32 %r1, %r1, {threads}, %r0;
    ld.param.u64 %rd2, [q0]; mad.wide.u32 %rd0, %r0, {data.itemsize}, %rd2;
    ld.param.u64 %rd3, [q1]; mad.wide.u32 %rd1, %r1, {4 * outputs}, %rd3;\n"""
    m = kernel(body + code, ".param .u64 q0, .param .u64 q1", outside)
    m.launch(
        "k",
        blocks,
        threads,
        [ptxsim.pointer(data), ptxsim.pointer(out)],
        {"data": data, "out": out},
        shared=shared,
        **launch,
    )
    return out if outputs > 1 else out[:, 0]


def pairs(values):
    a, b = np.meshgrid(values, values)
    return a.ravel(), b.ravel()


def same(a, b):
    """Equal, -0 and +0 told apart, NaN equal to NaN."""
    a, b = np.asarray(a), np.asarray(b)
    bad = ~((a == b) & (np.signbit(a) == np.signbit(b)) | (np.isnan(a) & np.isnan(b)))
    assert not bad.any(), f"at {np.flatnonzero(bad)[:5]}: {a[bad][:5]} instead of {b[bad][:5]}"


def rounded(exact, ty, mode="rn"):
    """A Fraction in a float type, by the mode's definition."""
    x = ty(float(exact)) if abs(exact) < Fraction(2) ** 1000 else ty(np.inf if exact > 0 else -np.inf)
    candidates = [ty(np.nextafter(x, ty(-np.inf))), x, ty(np.nextafter(x, ty(np.inf)))]
    finite = [c for c in candidates if np.isfinite(c)]
    below = [c for c in finite if Fraction(float(c)) <= exact]
    above = [c for c in finite if Fraction(float(c)) >= exact]
    down = max(below) if below else ty(-np.inf)
    up = min(above) if above else ty(np.inf)
    if mode == "rm" or (mode == "rz" and exact > 0):
        return down
    if mode == "rp" or mode == "rz":
        return up
    if not np.isfinite(up) or not np.isfinite(down):  # overflow: beyond half a unit over the largest
        largest = float(np.finfo(ty).max)
        half = Fraction(largest) + (Fraction(largest) - Fraction(float(np.nextafter(ty(largest), ty(0))))) / 2
        return (up if exact > 0 else down) if abs(exact) >= half else (down if exact > 0 else up)
    low, high = exact - Fraction(float(down)), Fraction(float(up)) - exact
    if low != high:
        return down if low < high else up
    even = int(down.view({2: np.uint16, 4: np.uint32, 8: np.uint64}[down.itemsize])) % 2 == 0
    return down if even else up


def bf16(bits):
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


@np.errstate(over="ignore")
def to_bf16(x):
    """float64 to bfloat16 bits, to nearest even."""
    out = []
    for v in np.asarray(x, np.float64):
        if np.isnan(v):
            out.append(0x7FFF)
            continue
        v = min(max(v, -(2.0**128)), 2.0**128)
        low = int(np.float32(v).view(np.uint32)) >> 16
        if np.isinf(np.float32(v)) and np.isfinite(v):
            low = 0x7F7F | (0x8000 if v < 0 else 0)
        options = sorted({(low + s) & 0xFFFF for s in (-1, 0, 1) if 0 <= (low & 0x7FFF) + s <= 0x7F80})
        values = bf16(np.array(options, np.uint16)).astype(np.float64)
        values = np.where(np.isinf(values), np.sign(values) * 2.0**128, values)
        errors = np.abs(values - v)
        best = [o for o, e in zip(options, errors, strict=True) if e == errors.min()]
        out.append(best[0] if len(best) == 1 else next(o for o in best if o % 2 == 0))
    return np.array(out, np.uint16)


F32 = np.array(
    [
        0.0,
        -0.0,
        1,
        -1,
        0.5,
        1.5,
        -2.5,
        3,
        1e-45,
        -1e-45,
        1e-39,
        1.1754944e-38,
        -1.1754944e-38,
        3.4028235e38,
        -3.4028235e38,
        np.inf,
        -np.inf,
        np.nan,
        0.1,
        -0.3,
        1 + 2**-23,
        16777216,
        16777215,
        1e10,
        -7.25,
    ],
    np.float32,
)
F64 = np.array([0.0, -0.0, 1, -1.5, 5e-324, 2.2e-308, 1.7e308, -np.inf, np.inf, np.nan, 0.1, 1 / 3, 2**53 - 1, -7.25])
F16 = np.array(
    [0.0, -0.0, 1, -1, 0.1, 6e-8, -6e-5, 65504, -65504, np.inf, -np.inf, np.nan, 0.333, 2049, 1.001, 3e-5], np.float16
)
BF16 = to_bf16([0.0, -0.0, 1, -1, 0.1, 1e-40, -1e-38, 3.38e38, -3e38, np.inf, -np.inf, np.nan, 1.0078125, 257, 0.333])
ulong = ctypes.c_uint64
