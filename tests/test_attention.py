"""Attention against its equation, on every path; device and precision."""

from __future__ import annotations

import pytest
import torch

from phmdiff_fast import attention
from phmdiff_fast.device import pick_device, pick_precision
from phmdiff_fast.errors import PhmdiffError


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("dense", [1024, 0])
def test_attend_is_its_equation(dtype, bound, dense, monkeypatch):
    monkeypatch.setattr(attention, "DENSE_TOKENS", dense)  # 0: bf16 goes through SDPA too
    qkv = torch.randn(2, 10, 3 * 24, dtype=torch.float64).to(dtype)
    q, k, v = qkv.double().view(2, 10, 3, 3, 8).permute(2, 0, 3, 1, 4)
    expected = ((q @ k.transpose(-1, -2)) / 8**0.5).softmax(-1) @ v
    expected = expected.transpose(1, 2).reshape(2, 10, 24)
    got = attention.attend(qkv, 3)
    assert got.dtype == dtype
    assert float((got.double() - expected).abs().max()) < bound * float(expected.abs().max())


def test_precision_is_what_was_asked():
    cpu = pick_device("cpu")
    assert pick_precision("fp32", cpu) == torch.float32
    assert pick_precision("bf16", cpu) == torch.bfloat16
    assert pick_precision("auto", cpu) in (torch.float32, torch.bfloat16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(PhmdiffError) as caught:
        pick_device("cuda")
    assert caught.value.exit_code == 8
