"""Which implementation runs: the choice, its warning, and what a forced one says when it cannot."""

from __future__ import annotations

import warnings

import pytest
import torch
from kernel_tools import needs_triton
from torch._subclasses.fake_tensor import FakeTensorMode

from phmdiff_fast.kernels import _impl
from phmdiff_fast.kernels._impl import BackendError, choose, default
from phmdiff_fast.kernels.adaln import adaln_modulate
from phmdiff_fast.kernels.patch_mask import restore_tokens


def on_gpu(*dtypes):
    """Tensors that say they are on a GPU; no GPU is needed to choose."""
    with FakeTensorMode(), torch.no_grad():
        return {f"t{i}": torch.empty(2, dtype=dtype, device="cuda") for i, dtype in enumerate(dtypes)}


def test_cpu_tensors_take_the_reference_and_gpu_tensors_triton(monkeypatch):
    monkeypatch.setattr(_impl, "HAS_TRITON", True)
    assert choose("op", None, {"x": torch.empty(2)}) == "reference"
    assert choose("op", None, {"x": torch.empty(2, device="meta")}) == "reference"
    assert choose("op", None, on_gpu(torch.float32, torch.bfloat16)) == "triton"
    assert choose("op", "reference", on_gpu(torch.float32)) == "reference"
    assert default(torch.device("cuda"))[0] == "triton"
    assert default(torch.device("cpu")) == ("reference", "Triton kernels need a GPU")


@pytest.mark.parametrize(("dtypes", "installed", "why"), [((torch.float32, torch.float64), True, "t1 is float64"),
                                                          ((torch.float32,), False, "not installed")])  # fmt: skip
def test_k4_what_triton_cannot_do_runs_eagerly_with_one_warning(monkeypatch, dtypes, installed, why):
    monkeypatch.setattr(_impl, "HAS_TRITON", installed)
    tensors = on_gpu(*dtypes)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        for _ in range(3):
            assert choose("op", None, tensors) == "reference"
    assert len(seen) == 1
    assert why in str(seen[0].message)
    with pytest.raises(BackendError, match=why):
        choose("op", "triton", tensors)


def test_a_reason_of_the_caller_counts_too(monkeypatch):
    monkeypatch.setattr(_impl, "HAS_TRITON", True)
    with pytest.warns(UserWarning, match="too many"):
        assert choose("op", None, on_gpu(torch.float32), "too many patches") == "reference"
    with pytest.raises(BackendError, match="too many"):
        choose("op", "triton", on_gpu(torch.float32), "too many patches")
    assert choose("op", "reference", on_gpu(torch.float32), "too many patches") == "reference"


def test_r6_forced_triton_on_a_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.setattr(_impl, "HAS_TRITON", True)
    monkeypatch.setattr(_impl, "INTERPRET", False)
    with pytest.raises(BackendError, match="TRITON_INTERPRET=1"):
        choose("op", "triton", {"x": torch.empty(2)})
    monkeypatch.setattr(_impl, "INTERPRET", True)
    assert choose("op", "triton", {"x": torch.empty(2)}) == "triton"


def test_unknown_names_and_mixed_devices_are_errors():
    with pytest.raises(ValueError, match="unknown"):
        choose("op", "cuda", {})
    with pytest.raises(BackendError, match="extension"):
        choose("op", "extension", {})
    with pytest.raises(ValueError, match="b is on meta, expected cpu like a"):
        choose("op", None, {"a": torch.empty(1), "b": torch.empty(1, device="meta"), "c": None})


@needs_triton
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_k8_vmap_maps(impl):
    """torch runs a custom operation once a mapped entry: slow, and right."""
    x, shift, tokens = torch.randn(3, 2, 4, 64), torch.randn(3, 2, 64), torch.randn(3, 1, 2, 8)
    inverse, fill = torch.tensor([[0, -1, 1]], dtype=torch.int32), torch.randn(8)

    def norm(a, b):
        return adaln_modulate(a, b, b, impl=impl)

    def restore(a):
        return restore_tokens(a, fill, inverse, None, impl=impl)

    expected = torch.stack([norm(a, b) for a, b in zip(x, shift, strict=True)])
    torch.testing.assert_close(torch.vmap(norm)(x, shift), expected)
    torch.testing.assert_close(torch.vmap(restore)(tokens), torch.stack([restore(t) for t in tokens]))
