"""GELU in its tanh form (Hendrycks & Gimpel 2016, as in DiT's MLP), for the CPU:

    y = x s,   s = 1 / (1 + e^-z),   z = sqrt(8/pi) (x + 0.044715 x^3)

which is 0.5 x (1 + tanh(z / 2)). Elements of any shape; float32 or bfloat16 in the extension (csrc/cpu/gelu.cpp),
computed in float32 with one exponential and one division an element. Everything else is PyTorch's own, also on a
GPU, where torch.compile makes it a part of the product before it.

Bytes an element of e: forward 2 e, backward 3 e, which is the floor; backward keeps x and forms s again.

Error against float64: y 2e-7 |x| and also 1e-5 |y| (down to |y| = 1e-37, below which y is 0), slope 3e-7; and one
rounding of the result in bfloat16. Eager's 1 + tanh cancels for negative x: 5e-8 |x|, all of y below -5. At -inf the
result is -0 and the slope 0, at +inf +inf and 1: their limits (eager: NaN). NaN stays NaN.

Limits: no second derivative in the extension (RuntimeError).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _extension
from ._impl import BackendError, forward_mode, known

ops = torch.ops.phmdiff_fast
TYPES = (torch.float32, torch.bfloat16)


def gelu_reference(x):
    return F.gelu(x, approximate="tanh")


def _fake(x):
    return x.new_empty(x.shape)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])


def _backward(ctx, dy):
    return ops.gelu_backward(dy, ctx.saved_tensors[0])


def _backward_fake(dy, x):
    return x.new_empty(x.shape)


def _no_second(ctx, grad):
    raise RuntimeError("gelu of the extension has no second derivative; impl='reference' has")


def _nothing_kept(ctx, inputs, output):
    pass


if not _extension.problem():
    torch.library.register_fake("phmdiff_fast::gelu", _fake)
    torch.library.register_autograd("phmdiff_fast::gelu", _backward, setup_context=_setup)
    torch.library.register_fake("phmdiff_fast::gelu_backward", _backward_fake)
    torch.library.register_autograd("phmdiff_fast::gelu_backward", _no_second, setup_context=_nothing_kept)


def gelu(x: Tensor, *, impl: str | None = None) -> Tensor:
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), element by element.

    x : any shape, a floating type. Returns y like x, in its type; autocast changes nothing. ``impl=None`` takes the
    extension for float32 and bfloat16 on the CPU, PyTorch's own for the rest. Raises ValueError for an unknown impl,
    BackendError (impl cannot run here).
    """
    known("gelu", impl)
    if impl == "triton":
        raise BackendError("gelu: impl='triton' cannot run here: this operation has none")
    if impl == "reference" or (impl is None and (x.device.type != "cpu" or x.dtype not in TYPES)):
        return gelu_reference(x)
    why = _why_not(x)
    if why and impl == "extension":
        raise BackendError(f"gelu: impl='extension' cannot run here: {why}")
    if not why:
        return ops.gelu(x)
    if missing := _extension.problem():
        _extension.warn_once("gelu", missing)
    return gelu_reference(x)


def _why_not(x: Tensor) -> str:
    """Why the extension does not do this; empty if it does."""
    if x.device.type != "cpu":
        return f"it runs on CPU tensors, not on {x.device.type}"
    if x.dtype not in TYPES:
        return f"x is {str(x.dtype)[6:]}; it computes float32 and bfloat16"
    return _extension.problem() or forward_mode()
