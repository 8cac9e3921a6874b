"""Attention of short sequences: the equation, packs, limits and messages, all on the reference."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from phmdiff_fast.kernels import _impl
from phmdiff_fast.kernels.short_attention import short_attention, why_not_short

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64


def random(*shape, dtype=F64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def by_hand(qkv, heads):
    """One sequence (N, 3 D), a head and a row at a time."""
    parts = qkv.double().unflatten(1, (3, heads, -1))  # (N, 3, heads, d)
    out = []
    for head in range(heads):
        q, k, v = parts[:, :, head].unbind(1)
        rows = []
        for row in q:
            weights = torch.exp(k @ row / row.shape[0] ** 0.5)
            rows.append((weights[:, None] * v).sum(0) / weights.sum())
        out.append(torch.stack(rows))
    return torch.cat(out, 1)


def offsets(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)


@pytest.mark.parametrize(("tokens", "heads", "dim"), [(1, 1, 16), (5, 3, 4), (12, 2, 24), (130, 1, 8)])
def test_it_is_its_equation(tokens, heads, dim):
    qkv = random(2, tokens, 3 * heads * dim)
    expected = torch.stack([by_hand(one, heads) for one in qkv])
    torch.testing.assert_close(short_attention(qkv, heads), expected, rtol=1e-12, atol=1e-12)


def test_it_is_what_pytorch_computes():
    qkv = random(2, 9, 96)
    q, k, v = qkv.unflatten(2, (3, 4, 8)).permute(2, 0, 3, 1, 4)
    expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(short_attention(qkv, 4), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lengths", [[3, 12, 1], [0, 5, 0, 0, 7, 0], [4]], ids=str)
@pytest.mark.parametrize("more", [0, 3], ids=["longest", "longest and more"])
def test_a_pack_is_its_sequences(lengths, more):
    qkv = random(sum(lengths), 48)
    expected = torch.cat([by_hand(one, 2) for one in qkv.split(lengths) if len(one)])
    got = short_attention(qkv, 2, cu_tokens=offsets(lengths), longest=max(lengths) + more)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_gradients(packed):
    extra = dict(cu_tokens=offsets([2, 0, 4]), longest=4) if packed else {}
    qkv = random(*((6,) if packed else (2, 3)), 12).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: short_attention(x, 2, **extra), qkv)
    assert torch.autograd.gradgradcheck(lambda x: short_attention(x, 2, **extra), qkv)


def test_nothing_is_rounded_but_the_result():
    qkv = random(2, 33, 96, dtype=BF16)
    reference = partial(short_attention, impl="reference")
    got, exact = reference(qkv, 2), reference(qkv.double(), 2)
    assert got.dtype == BF16
    assert ((got.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()
    with torch.autocast("cpu", BF16):
        assert torch.equal(reference(qkv, 2), got)
        assert reference(qkv.float(), 2).dtype == F32


@pytest.mark.parametrize("row", [0, 4, 9], ids=["first", "middle", "last"])
def test_nan_and_infinity_stay_in_their_sequence(row):
    qkv, cu = random(10, 24), offsets([3, 4, 3])
    clean = short_attention(qkv, 2, cu_tokens=cu, longest=4)
    others = torch.ones(10, dtype=torch.bool)
    others[[slice(0, 3), slice(3, 7), slice(7, 10)][row // 4]] = False
    for bad in (float("nan"), float("inf")):
        for column in (0, 8, 16):
            spoilt = qkv.clone()
            spoilt[row, column] = bad
            got = short_attention(spoilt, 2, cu_tokens=cu, longest=4)
            assert torch.equal(got[others], clean[others])
            assert got[row].isnan().any() or bad == float("inf")  # a score of -inf is a weight of 0


def test_a_sequence_longer_than_promised_is_nan():
    qkv = random(10, 24)
    got = short_attention(qkv, 2, cu_tokens=offsets([3, 5, 2]), longest=3)
    assert got[3:8].isnan().all()
    assert not got[:3].isnan().any()
    assert not got[8:].isnan().any()


@pytest.mark.parametrize("shape", [(0, 4, 24), (2, 0, 24)], ids=str)
def test_empty(shape):
    assert short_attention(random(*shape), 2).shape == (*shape[:2], shape[2] // 3)


@pytest.mark.parametrize("lengths", [[], [0, 0]], ids=str)
def test_empty_packs(lengths):
    qkv = torch.zeros(0, 24, dtype=F64, requires_grad=True)
    out = short_attention(qkv, 2, cu_tokens=offsets(lengths), longest=0)
    assert out.shape == (0, 8)
    out.sum().backward()
    assert qkv.grad.shape == (0, 24)


def test_what_does_not_fit_is_named():
    qkv, cu = random(6, 24), offsets([2, 4])
    dense = random(2, 3, 24)
    for heads in (0, 3):
        with pytest.raises(ValueError, match=r"packed as \(3, heads, d\)"):
            short_attention(dense, heads)
    with pytest.raises(ValueError, match="no multiple of 3 x 2"):
        short_attention(dense[..., :0], 2)
    with pytest.raises(ValueError, match="qkv must be"):
        short_attention(qkv, 2)
    with pytest.raises(ValueError, match="qkv must be"):
        short_attention(dense, 2, cu_tokens=cu, longest=4)
    with pytest.raises(ValueError, match="longest must be the most tokens"):
        short_attention(qkv, 2, cu_tokens=cu)
    with pytest.raises(ValueError, match="longest is 4, but"):
        short_attention(dense, 2, longest=4)
    for wrong in (torch.zeros(1, 3), torch.zeros(0), torch.zeros(1)):
        with pytest.raises(ValueError, match=r"cu_tokens must be \(S \+ 1,\)"):
            short_attention(qkv, 2, cu_tokens=wrong.int(), longest=4)
    with pytest.raises(ValueError, match="longest 0 for 6 rows"):
        short_attention(qkv, 2, cu_tokens=cu, longest=0)
    with pytest.raises(ValueError, match="cu_tokens is on meta"):
        short_attention(qkv, 2, cu_tokens=cu.to("meta"), longest=4)
    with pytest.raises(TypeError, match=r"cu_tokens is torch\.float32"):
        short_attention(qkv, 2, cu_tokens=cu.float(), longest=4)
    with pytest.raises(TypeError, match=r"qkv is torch\.int32"):
        short_attention(dense.int(), 2)
    with pytest.raises(ValueError, match="impl='fast' is unknown"):
        short_attention(dense, 2, impl="fast")


def test_which_calls_the_kernel_can_serve(monkeypatch):
    monkeypatch.setattr(_impl, "HAS_TRITON", True)
    for dim in (16, 24, 32, 48, 64, 72, 128):
        for longest in (1, 16, 64, 128):
            assert why_not_short("cuda", BF16, dim, longest) == ""
    assert why_not_short("cuda", torch.float16, 64, 128) == ""
    assert [why_not_short("cuda", F32, d, n) for d, n in ((32, 128), (64, 64), (128, 32))] == [""] * 3
    for d, n in ((33, 128), (64, 65), (72, 33), (128, 64)):
        assert "tokens" in why_not_short(torch.device("cuda"), F32, d, n)
    assert "129 tokens" in why_not_short("cuda", BF16, 64, 129)
    assert "15 values" in why_not_short("cuda", BF16, 15, 64)
    assert "136 values" in why_not_short("cuda", BF16, 136, 64)
    assert "float64" in why_not_short("cuda", F64, 64, 64)
    monkeypatch.setattr(_impl, "INTERPRET", False)
    assert "needs a GPU" in why_not_short("cpu", BF16, 64, 64)
    monkeypatch.setattr(_impl, "HAS_TRITON", False)
    assert "not installed" in why_not_short("cuda", BF16, 64, 64)
