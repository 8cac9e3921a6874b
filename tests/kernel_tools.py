"""What every kernel test uses: poisoned buffers between margins, reversed programs, the yardstick of error."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch

from phmdiff_fast.kernels import _impl

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(
    not _impl.HAS_TRITON or (DEVICE == "cpu" and not _impl.INTERPRET),
    reason="needs Triton and its interpreter or a GPU",
)
MARGIN = 64  # elements


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fill with what no kernel computes: NaN, or the smallest integer."""
    return tensor.fill_(math.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min)


def in_margins(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in a buffer with poison on both sides: a read out of bounds shows in the result."""
    whole = poison(torch.empty(tensor.numel() + 2 * MARGIN, dtype=tensor.dtype, device=tensor.device))
    inside = whole[MARGIN : MARGIN + tensor.numel()].view(tensor.shape)
    with torch.no_grad():
        inside.copy_(tensor)
    return inside.requires_grad_(tensor.requires_grad)


@contextlib.contextmanager
def guarded_buffers():
    """Outputs and workspaces start poisoned and lie between margins that must come back untouched."""
    from phmdiff_fast.kernels import _launch

    made, original = [], _launch.empty

    def empty(shape, dtype, device):
        size = math.prod(shape)
        whole = poison(torch.empty(size + 2 * MARGIN, dtype=dtype, device=device))
        made.append(whole)
        return whole[MARGIN : MARGIN + size].view(tuple(shape))

    _launch.empty = empty
    try:
        yield
    finally:
        _launch.empty = original
    for whole in made:
        for margin in (whole[:MARGIN], whole[-MARGIN:]):
            assert torch.equal(margin.nan_to_num(7), poison(torch.empty_like(margin)).nan_to_num(7)), (
                "margin overwritten"
            )


@pytest.fixture
def guarded():
    with guarded_buffers():
        yield


@contextlib.contextmanager
def reversed_programs():
    """The interpreter runs the programs of a grid last to first: a result that changes is a race."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    original = type(builder).set_grid_idx

    def flipped(x, y, z):
        nx, ny, nz = builder.grid_dim
        original(builder, nx - 1 - x, ny - 1 - y, nz - 1 - z)

    builder.set_grid_idx = flipped
    try:
        yield
    finally:
        del builder.set_grid_idx


@contextlib.contextmanager
def patched_once():
    """Let the interpreter patch triton.language once a launch, not at each call of a device function.

    The patch is of shared modules, so the later ones change nothing and take half of the time.
    """
    from triton.runtime import interpreter

    original, done = interpreter._patch_lang, set()

    def patch(fn):
        found = {id(v) for v in fn.__globals__.values() if v is interpreter.tl or v is interpreter.tl.core}
        if found <= done:
            return interpreter._LangPatchScope() if hasattr(interpreter, "_LangPatchScope") else None
        done.update(found)
        return original(fn)

    interpreter._patch_lang = patch
    try:
        yield
    finally:
        interpreter._patch_lang = original


def rms(x: torch.Tensor) -> float:
    return float(x.detach().double().square().mean().sqrt()) if x.numel() else 0.0


def no_worse_than_eager(got, eager, exact, *, small: bool = False, name: str = "") -> None:
    """Error against float64 at most that of eager PyTorch in the same dtype (flash-attention's yardstick).

    16 bit: 1.1 times its RMS and twice its largest error; float32: 1.5 and 3 times. small : with few
    elements eager may be right by luck, so one rounding of the result is allowed on top.
    """
    assert got.dtype == eager.dtype, f"{name}: dtype {got.dtype}, eager {eager.dtype}"
    assert got.shape == eager.shape == exact.shape, f"{name}: {got.shape}, {eager.shape}, {exact.shape}"
    if not got.numel():
        return
    of_rms, of_max = (1.5, 3.0) if got.dtype == torch.float32 else (1.1, 2.0)
    unit = torch.finfo(got.dtype).eps
    errors = [(x.detach().double() - exact.detach().double()) for x in (got, eager)]
    assert not errors[0].isnan().any(), f"{name}: NaN where eager has none" if not errors[1].isnan().any() else name
    slack_rms, slack_max = unit * 0.05 * rms(exact), unit * 0.5 * float(exact.detach().abs().max())
    if small:
        slack_rms, slack_max = unit * float(exact.detach().abs().max()), 2 * unit * float(exact.detach().abs().max())
    assert rms(errors[0]) <= of_rms * rms(errors[1]) + slack_rms, (name, rms(errors[0]), rms(errors[1]))
    largest = [float(e.abs().max()) for e in errors]
    assert largest[0] <= of_max * largest[1] + slack_max, (name, *largest)
