"""Attention, one call over several backends: each is asked whether it can serve, one is taken, and it can be named.

softmax(q k^T / sqrt(d)) v inside each sequence, for tokens as a dense batch or packed (packing.py):

    short     our own (kernels/short_attention.py): on a GPU a Triton kernel for sequences up to 128 tokens, several in
              one program; on a CPU the extension's, up to 256 tokens
    varlen    torch.nn.attention.varlen: sequences of different lengths in one flash-attention call
    fa3       the same call on FlashAttention-3, where torch and the flash_attn_interface package offer it
    xformers  memory_efficient_attention, with a block-diagonal mask for packed tokens
    sdpa      torch's scaled_dot_product_attention, a call a level; torch chooses flash, cuDNN, efficient or plain
    products  two plain matrix products and a softmax

``use`` sets the one to take, PHMDIFF_ATTENTION what "auto" stands for. Backends are imported when first asked for.
"""

from __future__ import annotations

import importlib
import inspect
import operator
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from . import errors
from .errors import PhmdiffError
from .kernels._impl import INTERPRET
from .kernels.short_attention import MOST_TOKENS, MOST_TOKENS_CPU, short_attention, why_not_extension, why_not_short
from .packing import Packing

NAMES = ("short", "varlen", "fa3", "xformers", "sdpa", "products")
DENSE_TOKENS = 1024  # up to here the N x N scores of a CPU batch stay in cache-sized pieces
TYPICAL_HEAD, TYPICAL_LENGTHS = 64, (64, 32, 12)  # preset s4 on 64 x 64 images, masked: what doctor asks for
HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Choice:
    """The backend that serves (``name``) and why this one, in words."""

    name: str
    why: str


def attend(qkv: Tensor, heads: int) -> Tensor:
    """Self-attention inside each of B sequences.

    qkv (B, N, 3 D), as (3, heads, D / heads) -> (B, N, D) in qkv's type, or autocast's where that is on.
    Raises PhmdiffError (exit code 8) where the backend that was asked for cannot serve these tensors.
    """
    qkv = _autocast(qkv)
    num = qkv.shape[1]
    return _dense(qkv, heads, _name(qkv, heads, num, mixed=False))


def attend_packed(qkv: Tensor, heads: int, packing: Packing) -> Tensor:
    """Self-attention inside each sequence of a packed buffer.

    qkv (T, 3 D), as (3, heads, D / heads), rows as ``packing`` says -> (T, D). Raises as ``attend``.
    """
    qkv = _autocast(qkv)
    shortest, longest = min(packing.lengths), packing.longest
    name = _name(qkv, heads, longest, mixed=shortest != longest)
    if shortest == longest:  # one length: a dense batch of all sequences, (S, K, 3 D)
        return _dense(qkv.unflatten(0, (packing.sequences, longest)), heads, name).flatten(0, 1)
    if name == "short" and (qkv.device.type == "cpu" or _tile(shortest) == _tile(longest)):
        return _short(qkv, heads, packing.cu_tokens(qkv.device), longest)
    if name in ("varlen", "fa3"):
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).unbind(1)  # (T, heads, d)
        return _varlen(q, k, v, packing.cu_tokens(qkv.device), longest).flatten(1)
    if name == "xformers":
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).unsqueeze(0).unbind(2)  # (1, T, heads, d)
        return _xformers()(q, k, v, attn_bias=_block_diagonal(packing, qkv.device)).flatten(2)[0]
    parts = packing.views(qkv)
    if _wanted == "auto" and qkv.device.type == "cpu":  # short levels as products beside a long one as sdpa
        return packing.pack([_dense(x, heads, _name(x, heads, x.shape[1], mixed=True)) for x in parts])
    return packing.pack([_dense(x, heads, name) for x in parts])


def _dense(qkv: Tensor, heads: int, name: str) -> Tensor:
    """(B, N, 3 D) -> (B, N, D) on the backend of this name."""
    if name == "short":
        return _short(qkv, heads, None, None)
    batch, num, triple = qkv.shape
    parts = qkv.view(batch, num, 3, heads, triple // (3 * heads))
    if name in ("varlen", "fa3"):
        q, k, v = parts.flatten(0, 1).unbind(1)  # (B N, heads, d)
        cu = torch.arange(0, batch * num + 1, num, dtype=torch.int32, device=qkv.device)
        return _varlen(q, k, v, cu, num).view(batch, num, triple // 3)
    if name == "xformers":
        return _xformers()(*parts.unbind(2)).flatten(2)
    q, k, v = parts.permute(2, 0, 3, 1, 4)  # (B, heads, N, d)
    if name == "products":
        out = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).reshape(batch, num, triple // 3)


def attend_backward(qkv: Tensor, dout: Tensor, heads: int, packing: Packing | None = None) -> Tensor:
    """Gradient of ``attend``, or of ``attend_packed``, by qkv; dout like their result. For a CPU's ``lean_block``."""
    longest = qkv.shape[1] if packing is None else packing.longest
    mixed = packing is not None and min(packing.lengths) != longest
    if qkv.device.type == "cpu" and not INTERPRET and _name(qkv, heads, longest, mixed) == "short":
        cu = None if packing is None else packing.cu_tokens(qkv.device)
        return torch.ops.phmdiff_fast.short_attention_backward_cpu(dout, qkv, heads, cu, longest)
    with torch.enable_grad():
        again = qkv.detach().requires_grad_()
        out = attend(again, heads) if packing is None else attend_packed(again, heads, packing)
        return torch.autograd.grad(out, again, dout)[0]


def _autocast(qkv: Tensor) -> Tensor:
    """float32 in autocast's type: not every backend is an operation that autocast knows."""
    kind = qkv.device.type
    if qkv.dtype == torch.float32 and torch.is_autocast_enabled(kind):
        return qkv.to(torch.get_autocast_dtype(kind))
    return qkv


def _short(qkv: Tensor, heads: int, cu_tokens: Tensor | None, longest: int | None) -> Tensor:
    forced = "extension" if qkv.device.type == "cpu" and not INTERPRET else "triton"
    impl = forced if _wanted == "short" else None
    return short_attention(qkv, heads, cu_tokens=cu_tokens, longest=longest, impl=impl)


class use:
    """Take this backend in the whole process from now on; as a context manager, until its end.

    name : one of ``NAMES``, or "auto" (``choose`` has its rule); another name raises PhmdiffError (exit code 8)

    The choice itself is made, and refused with an error, where tensors are seen: ``choose`` asks beforehand.
    """

    def __init__(self, name: str):
        self.before = _wanted
        _switch(_default() if name == "auto" else name)

    def __enter__(self) -> use:
        return self

    def __exit__(self, *_) -> None:
        _switch(self.before)


def choose(
    device: torch.device, dtype: torch.dtype, head_dim: int, lengths: tuple[int, ...], wanted: str = "auto"
) -> Choice:
    """The backend for sequences of these lengths (one: a dense batch) with heads of head_dim numbers, and why.

    "auto": what PHMDIFF_ATTENTION names, else on a GPU in 16 bit the short kernel where all sequences fit it or
    varlen for several lengths, and sdpa; on a CPU the short one where they fit it and the extension is there, products
    for the next longer sequences in bf16, and sdpa. Raises
    PhmdiffError (exit code 8) where ``wanted`` cannot serve, with the reason and what can.
    """
    device, longest, wanted = torch.device(device), max(lengths), _default() if wanted == "auto" else wanted
    name = _pick(device, dtype, head_dim, longest, longest <= DENSE_TOKENS, len(set(lengths)) > 1, wanted)
    tokens = _tokens(lengths)
    if name == "short":
        why = f"sequences of {tokens}: " + ("one call, no copies" if device.type == "cpu" else "each fits one tile")
    elif name in ("varlen", "fa3"):
        why = f"sequences of {tokens} in one call" + ("" if name == "varlen" else " of FlashAttention-3")
    elif name == "xformers":
        why = "memory_efficient_attention"
    elif name == "products" and device.type == "cpu" and dtype == torch.bfloat16:
        why = f"sequences of {tokens}: plain products reach the processor's bf16 units, torch's kernel does not"
    elif name == "products":
        why = "two plain products and a softmax"
    else:
        why = f"torch takes its {_torch_kernels(device, dtype, head_dim, lengths)} kernel"
        if wanted == "auto" and device.type == "cpu" and dtype == torch.bfloat16 and min(lengths) <= DENSE_TOKENS:
            why += f"; levels of at most {DENSE_TOKENS} tokens as products"
    return Choice(name, why if wanted == "auto" else f"asked for; {why}")


def why_not(name: str, device: torch.device, dtype: torch.dtype, head_dim: int, lengths: tuple[int, ...]) -> str:
    """Why this backend cannot serve sequences of these lengths there; "" if it can."""
    return _why_not(name, torch.device(device), dtype, head_dim, max(lengths))


def describe(
    device: torch.device, dtype: torch.dtype, head_dim: int, lengths: tuple[int, ...], wanted: str = "auto"
) -> str:
    """One line for the run log: the backend, why, and for what. Raises as ``choose``."""
    choice = choose(device, dtype, head_dim, lengths, wanted)
    where = f"{torch.device(device).type}, {str(dtype)[6:]}, {_tokens(lengths)}, head dimension {head_dim}"
    return f"attention: {choice.name} ({choice.why}) for {where}"


def table(
    device: torch.device, dtype: torch.dtype, head_dim: int = TYPICAL_HEAD, lengths: tuple[int, ...] = TYPICAL_LENGTHS
) -> list[tuple[str, str]]:
    """(backend, "yes" or why not) for each of ``NAMES``."""
    return [(name, why_not(name, device, dtype, head_dim, lengths) or "yes") for name in NAMES]


def _tokens(lengths: tuple[int, ...]) -> str:
    few, many = min(lengths), max(lengths)
    return f"{many} tokens" if few == many else f"{few} to {many} tokens"


def _default() -> str:
    return os.environ.get("PHMDIFF_ATTENTION") or "auto"


_wanted = _default()


def _switch(name: str) -> None:
    global _wanted
    if name not in ("auto", *NAMES):
        raise _unknown(name)
    _set_fa3(name == "fa3" and not _why_not_fa3())
    _wanted = name


def _name(qkv: Tensor, heads: int, longest: int, mixed: bool) -> str:
    """The backend for these tensors. torch.compile sees constants and comparisons here: it guards on ``_wanted``,
    on the type and on where the lengths lie, and lets the number of tokens vary inside that."""
    most = MOST_TOKENS_CPU if qkv.device.type == "cpu" else MOST_TOKENS
    if longest <= MOST_TOKENS:
        rounded = _tile(longest)
    elif longest <= most:
        rounded = most
    else:  # only the error that is coming tells the number
        rounded = operator.index(longest) if _wanted == "short" else most + 1
    head_dim = operator.index(qkv.shape[-1] // (3 * heads))  # a number in a compiled graph as well
    dense, mixed = 1 if longest <= DENSE_TOKENS else 0, 1 if mixed else 0  # bool() would stay a symbol
    return _resolve(qkv.device.type, qkv.dtype, head_dim, rounded, dense, mixed, _wanted)


def _tile(length: int) -> int:
    """Rows of the short kernel's tile for a sequence; levels of other tiles get a call of their own."""
    return 16 if length <= 16 else 32 if length <= 32 else 64 if length <= 64 else MOST_TOKENS


def _resolve(kind: str, dtype: torch.dtype, head_dim: int, longest: int, dense: bool, mixed: bool, wanted: str) -> str:
    return _resolved(kind, dtype, head_dim, longest, dense, mixed, wanted)


# What torch.compiler.assume_constant_result sets, without the import of the whole compiler that it begins with.
_resolve._dynamo_marked_constant = True


@lru_cache(maxsize=256)
def _resolved(kind, dtype, head_dim, longest, dense, mixed, wanted) -> str:
    name = _pick(torch.device(kind), dtype, head_dim, longest, dense, mixed, wanted)
    if name == "fa3":
        _set_fa3(True)
    return name


def _pick(device, dtype, head_dim, longest, dense, mixed, wanted) -> str:
    """The name. dense : at most DENSE_TOKENS tokens; mixed : packed, of several lengths"""
    if wanted not in ("auto", *NAMES):
        raise _unknown(wanted)
    if wanted != "auto":
        why = _why_not(wanted, device, dtype, head_dim, longest)
        if why:
            can = [name for name in NAMES if not _why_not(name, device, dtype, head_dim, longest)]
            what = f"attention '{wanted}' cannot serve {str(dtype)[6:]} on {device.type}: {why}"
            raise PhmdiffError("ATTENTION", what, f"Take auto or {', '.join(can)}", exit_code=errors.BACKEND)
        return wanted
    if device.type == "cpu":
        if not INTERPRET and not _why_not("short", device, dtype, head_dim, longest):
            return "short"
        # PyTorch's CPU flash kernel takes 2 to 4 times as long in bf16, forward and backward: with
        # few tokens two plain products reach the processor's bf16 units and it does not.
        return "products" if dtype == torch.bfloat16 and dense else "sdpa"
    if dtype in HALF and not _why_not("short", device, dtype, head_dim, longest):
        return "short"
    return "varlen" if mixed and not _why_not("varlen", device, dtype, head_dim, longest) else "sdpa"


def _unknown(name: str) -> PhmdiffError:
    known = ", ".join(("auto", *NAMES))
    return PhmdiffError("ATTENTION", f"attention {name!r} is unknown", f"Take one of {known}", exit_code=errors.BACKEND)


def _why_not(name: str, device: torch.device, dtype: torch.dtype, head_dim: int, longest: int) -> str:
    if name not in NAMES:
        raise _unknown(name)
    if name in ("sdpa", "products"):
        return "" if dtype.is_floating_point else f"{str(dtype)[6:]} is no floating-point type"
    if name == "short":
        ask = why_not_extension if device.type == "cpu" and not INTERPRET else why_not_short
        return ask(device, dtype, head_dim, longest)
    if device.type != "cuda":
        return f"it needs a GPU, not {device.type}"
    if dtype not in HALF and not (name == "xformers" and dtype == torch.float32):
        return f"it computes float16 and bfloat16, not {str(dtype)[6:]}"
    if head_dim % 8 or head_dim > 256:
        return f"heads of {head_dim} numbers: it takes multiples of 8 up to 256"
    if name == "xformers":
        return _why_not_xformers(dtype, head_dim)
    return _why_not_varlen() or (_why_not_fa3() if name == "fa3" else "")


def _first_line(problem: BaseException) -> str:
    return f"{type(problem).__name__}: {str(problem).strip().splitlines()[0] if str(problem).strip() else 'no message'}"


def _torch_kernels(device: torch.device, dtype: torch.dtype, head_dim: int, lengths: tuple[int, ...]) -> str:
    """Which of its kernels scaled_dot_product_attention takes, a level's each, in words."""
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        return "own choice of"  # there is nothing to ask
    words = [_torch_kernel(device, dtype, head_dim, length) for length in dict.fromkeys(lengths)]
    return " or ".join(dict.fromkeys(words))


def _torch_kernel(device: torch.device, dtype: torch.dtype, head_dim: int, length: int) -> str:
    from torch.nn.attention import SDPBackend

    words = {"FLASH_ATTENTION": "flash", "CUDNN_ATTENTION": "cuDNN", "EFFICIENT_ATTENTION": "efficient",
             "MATH": "plain (math)"}  # fmt: skip
    with torch.inference_mode(False):
        qkv = torch.empty(1, length, 3, 1, head_dim, dtype=dtype, device=device, requires_grad=True)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        try:
            name = SDPBackend(torch._fused_sdp_choice(q, k, v)).name  # what SDPA itself asks; no public name
        except (AttributeError, RuntimeError, TypeError, ValueError):
            return "own choice of"
    return words.get(name, name.lower())


_varlen: Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor] | None = None


@lru_cache(maxsize=1)
def _why_not_varlen() -> str:
    """Looks for torch's function and wraps it for this version."""
    global _varlen
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return "it needs compute capability 8.0"
    try:
        _varlen = wrap_varlen(importlib.import_module("torch.nn.attention.varlen").varlen_attn)
    except (ImportError, AttributeError, TypeError) as problem:
        return f"torch {torch.__version__} does not offer it in a form known here ({_first_line(problem)})"
    return ""


def wrap_varlen(function: Callable) -> Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]:
    """(q, k, v (T, heads, d), cu (S + 1,) int32, longest) -> (T, heads, d), by torch's varlen_attn of any version.

    torch 2.10 has ``is_causal``; later ones ``window_size``, keyword-only, and more that may be left alone. Raises
    TypeError where an argument is gone or a new one must be given.
    """
    given = inspect.signature(function).parameters
    ours = ("query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k")
    whole = {name: value for name, value in (("is_causal", False), ("window_size", (-1, -1))) if name in given}
    gone = [name for name in ours if name not in given]
    new = [n for n, p in given.items() if p.default is p.empty and n not in (*ours, *whole) and p.kind not in (2, 4)]
    if gone or new:
        raise TypeError(f"varlen_attn without {gone} or with {new}")

    def call(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int) -> Tensor:
        out = function(query=q, key=k, value=v, cu_seq_q=cu, cu_seq_k=cu, max_q=longest, max_k=longest, **whole)
        return out[0] if isinstance(out, tuple) else out

    return call


@lru_cache(maxsize=1)
def _why_not_fa3() -> str:
    from torch.nn import attention

    if "FA3" not in getattr(attention, "list_flash_attention_impls", list)():
        return f"torch {torch.__version__} does not offer FlashAttention-3"
    if not torch.cuda.is_available():
        return "it needs a GPU of compute capability 9.0 (Hopper)"
    if torch.cuda.get_device_capability()[0] != 9:
        return f"it needs compute capability 9.0 (Hopper), not {'.'.join(map(str, torch.cuda.get_device_capability()))}"
    try:
        importlib.import_module("flash_attn_interface")
        _ = torch.ops.flash_attn_3.fwd, torch.ops.flash_attn_3.bwd  # the two that torch will call
    except Exception as problem:  # a package built for another torch may fail in any way
        return f"the package flash_attn_interface does not serve ({_first_line(problem)})"
    return ""


_fa3 = False  # whether it was activated here: it takes the place of torch's own flash attention, in the whole process


def _set_fa3(on: bool) -> None:
    global _fa3
    if on == _fa3:
        return
    from torch.nn import attention

    if on:
        attention.activate_flash_attention_impl("FA3")
    else:
        attention.restore_flash_attention_impl()
    _fa3 = on


@lru_cache(maxsize=1)
def _xformers() -> Callable[..., Tensor]:
    return importlib.import_module("xformers.ops").memory_efficient_attention


@lru_cache(maxsize=16)
def _why_not_xformers(dtype: torch.dtype, head_dim: int) -> str:
    """Imports it and, on a GPU, has it compute something small, both ways: only then is it known to have a kernel."""
    try:
        function = _xformers()
    except Exception as problem:  # built for another torch or CUDA it fails in many ways: OSError, RuntimeError, ...
        return f"it cannot be imported ({_first_line(problem)})"
    if not torch.cuda.is_available():
        return ""
    try:
        with torch.inference_mode(False), torch.enable_grad():
            qkv = torch.zeros(3, 1, 16, 1, head_dim, dtype=dtype, device="cuda", requires_grad=True)
            function(*qkv).sum().backward()
    except Exception as problem:
        return f"it has no kernel for this ({_first_line(problem)})"
    return ""


@lru_cache(maxsize=64)
def _block_diagonal(packing: Packing, device: torch.device):
    mask = importlib.import_module("xformers.ops.fmha.attn_bias").BlockDiagonalMask
    lengths = [length for length in packing.lengths for _ in range(packing.batch)]
    here = {"device": device} if "device" in inspect.signature(mask.from_seqlens).parameters else {}
    return mask.from_seqlens(lengths, **here)
