"""Device functions shared by the Triton kernels: matrix product, Philox, normals."""

from __future__ import annotations

import triton
import triton.language as tl

from . import _impl

INTERPRET = tl.constexpr(_impl.INTERPRET)


@triton.jit
def narrow(value, kind: tl.constexpr):
    """float32 to the type that is stored or multiplied, rounded to nearest even.

    The interpreter alone would cut bfloat16 off; on a GPU this is the plain conversion.
    """
    if INTERPRET and kind == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = tl.where(value == value, bits.to(tl.float32, bitcast=True), value)
    return value.to(kind)


@triton.jit
def dot(a, b, acc):
    """acc + a @ b in float32; float32 operands multiply in full precision, 16-bit ones on tensor cores."""
    if INTERPRET:  # the interpreter's product of bfloat16 is garbage: the same values, widened
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def philox(index, sample, stream, seed, step):
    """Philox4x32-10 of kernels/_philox.py: four uint32 words at counter (index, sample, stream, step).

    index : int32 or int64 block below 2^32; sample : int64, broadcastable to it; stream : int;
    seed, step : int64 scalars
    """
    # Sums with an int64: an integer argument is as wide as its value asks for.
    zero = tl.full((), 0, tl.int64)
    seed, step, sample = zero + seed, zero + step, sample.to(tl.int64)
    c0 = index.to(tl.uint32)  # 64 to 32 bits keeps the low ones
    c1 = sample.to(tl.uint32) + c0 * 0
    c2 = ((sample >> 32) ^ (stream.to(tl.int64) << 24)).to(tl.uint32) + c0 * 0
    c3 = step.to(tl.uint32) + c0 * 0
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        a_low, a_high = c0 * 0xD2511F53, tl.umulhi(c0, tl.full(c0.shape, 0xD2511F53, tl.uint32))
        b_low, b_high = c2 * 0xCD9E8D57, tl.umulhi(c2, tl.full(c2.shape, 0xCD9E8D57, tl.uint32))
        c0, c1, c2, c3 = b_high ^ c1 ^ k0, b_low, a_high ^ c3 ^ k1, a_low
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def unit(word):
    """A uint32 word as a float32 in (0, 1): (word >> 8 + 0.5) 2^-24."""
    return ((word >> 8).to(tl.float32) + 0.5) * 5.9604644775390625e-08


@triton.jit
def normal_pair(first, second):
    """Two independent standard normals from two words (Box-Muller): the cosine, then the sine.

    The angle lies in (0, 2 pi), so its reduction to |r| <= pi / 4 needs no table: libdevice's sine
    keeps one for huge arguments, on the stack. Polynomials of Cephes sinf and cosf, error below 1e-7.
    """
    radius = tl.sqrt_rn(-2.0 * tl.log(unit(first)))
    angle = 6.283185307179586 * unit(second)
    quarter = tl.floor(angle * 0.6366197723675814 + 0.5)
    r = ((angle - quarter * 1.5703125) - quarter * 4.83751296997e-4) - quarter * 7.54978995489e-8
    z = r * r
    sine = r + r * z * (-1.6666654611e-1 + z * (8.3321608736e-3 - z * 1.9515295891e-4))
    cosine = 1.0 - 0.5 * z + z * z * (4.166664568298827e-2 + z * (-1.388731625493765e-3 + z * 2.443315711809948e-5))
    turn = quarter.to(tl.int32) & 3
    swapped = (turn & 1) == 1
    a, b = tl.where(swapped, sine, cosine), tl.where(swapped, cosine, sine)
    a = tl.where((turn == 1) | (turn == 2), -a, a)
    b = tl.where(turn >= 2, -b, b)
    return radius * a, radius * b
