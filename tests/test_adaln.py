"""Modulated LayerNorm: the equation, packed rows, types."""

from __future__ import annotations

import pytest
import torch

from phmdiff_fast.kernels.adaln import adaln_modulate, gated_residual_adaln


def by_hand(x, shift, scale):
    mean = x.mean(-1, keepdim=True)
    var = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / (var + 1e-6).sqrt() * (1 + scale[:, None]) + shift[:, None]


def tensors(*shapes, dtype=torch.float64):
    g = torch.Generator().manual_seed(3)
    return [torch.randn(*shape, generator=g, dtype=dtype) for shape in shapes]


def test_modulate_is_its_equation():
    x, shift, scale = tensors((2, 5, 8), (2, 8), (2, 8))
    torch.testing.assert_close(adaln_modulate(x, shift, scale), by_hand(x, shift, scale), rtol=1e-12, atol=1e-12)


def test_gated_residual_is_its_equation():
    x, h, gate, shift, scale = tensors((2, 5, 8), (2, 5, 8), (2, 8), (2, 8), (2, 8))
    new, y = gated_residual_adaln(x, h, gate, shift, scale)
    torch.testing.assert_close(new, x + gate[:, None] * h, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(y, by_hand(new, shift, scale), rtol=1e-12, atol=1e-12)


def test_packed_rows_take_their_own_vectors():
    x, h, gate, shift, scale = tensors((2, 5, 8), (2, 5, 8), (2, 8), (2, 8), (2, 8))
    dense = gated_residual_adaln(x, h, gate, shift, scale)
    cu = torch.tensor([0, 3, 8], dtype=torch.int32)  # sample 0 has 3 rows, sample 1 has 5
    packed = [torch.cat([v[0, :3], v[1]]) for v in (x, h)]
    got = gated_residual_adaln(*packed, gate, shift, scale, cu_tokens=cu)
    for a, b in zip(got, dense, strict=True):
        torch.testing.assert_close(a, torch.cat([b[0, :3], b[1]]), rtol=1e-12, atol=1e-12)
    only = adaln_modulate(packed[0], shift, scale, cu_tokens=cu)
    torch.testing.assert_close(only, torch.cat([by_hand(x, shift, scale)[0, :3], by_hand(x, shift, scale)[1]]))


def test_gradients():
    args = [t.requires_grad_() for t in tensors((2, 3, 6), (2, 3, 6), (2, 6), (2, 6), (2, 6))]
    assert torch.autograd.gradcheck(gated_residual_adaln, args)
    assert torch.autograd.gradcheck(adaln_modulate, (args[0], args[3], args[4]))


def test_16_bit_branches_keep_a_float32_residual():
    x, h, gate, shift, scale = tensors((2, 5, 64), (2, 5, 64), (2, 64), (2, 64), (2, 64), dtype=torch.float32)
    narrow = [t.bfloat16() for t in (h, gate, shift, scale)]
    new, y = gated_residual_adaln(x, *narrow)
    assert new.dtype == torch.float32
    assert y.dtype == torch.bfloat16
    exact = gated_residual_adaln(x.double(), *(t.double() for t in narrow))
    assert (new - exact[0]).abs().max() < 1e-5
    # The only 16-bit rounding left is that of the result: half a unit in the last of 8 bits.
    assert ((y.double() - exact[1]).abs() <= exact[1].abs() * 2**-8 + 1e-6).all()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gated_residual_adaln(x, *narrow)[1], y)


def test_wrong_types_and_shapes_are_named():
    x, h, gate, shift, scale = tensors((2, 5, 8), (2, 5, 8), (2, 8), (2, 8), (2, 8), dtype=torch.float32)
    with pytest.raises(TypeError, match="shift"):
        adaln_modulate(x.bfloat16(), shift, scale)
    with pytest.raises(TypeError, match="scale"):
        gated_residual_adaln(x, h.bfloat16(), gate.bfloat16(), shift.bfloat16(), scale)
    with pytest.raises(ValueError, match="gate"):
        gated_residual_adaln(x, h, gate[:1], shift, scale)
    with pytest.raises(ValueError, match="x must be"):
        adaln_modulate(x[0], shift, scale)
