"""Counter-based random numbers: Philox4x32-10 (Salmon et al., SC 2011), the same on every device.

    key     = (seed low, seed high)
    counter = (index, sample low, sample high xor stream << 24, step)

so a number depends on what it is for and never on batch split, order or world size. ``rng`` is
``(seed, step)``: ints, or 0-d int64 tensors that may live inside a CUDA graph.

Streams: 0 = mask of level 0, 1 + n = eps of level n, 8 + n = mask of level n >= 1, 16 = t,
17 = how noisy a teacher's coarse image is, 17 + n = that noise on level n >= 1, 24 + n = rows of
level n for the MMD, 32 and above = augmentation.

A draw of integers or uniforms uses word 0 of counter ``index``. A draw of normals uses all four
words, so that one call serves four neighbours: element e has index e // 4; words (0, 1) give its
lanes 0 (cos) and 1 (sin) and words (2, 3) its lanes 2 and 3.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import _extension

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF

MASK, EPS, MASK_COARSE, TIMESTEP, COARSE, MMD_ROWS, AUGMENT = 0, 1, 8, 16, 17, 24, 32


def mask_stream(level: int) -> int:
    """The stream of a level's mask keys."""
    return MASK if level == 0 else MASK_COARSE + level


def philox4x32(c0, c1, c2, c3, k0, k1):
    """Ten rounds. All arguments: int64 tensors (broadcast) holding uint32; returns four of them."""
    for _ in range(10):
        # The 64-bit product wraps, but its bit pattern is the unsigned one.
        a, b = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = ((b >> 32) & _LOW) ^ c1 ^ k0, b & _LOW, ((a >> 32) & _LOW) ^ c3 ^ k1, a & _LOW
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return c0, c1, c2, c3


def split(rng) -> tuple[int, int, Tensor | None, Tensor | None]:
    """(seed, step) as integers, 0 where they live on the device, and as tensors, None where they do not."""
    held = [isinstance(part, Tensor) for part in rng]
    return (*(0 if t else part for part, t in zip(rng, held, strict=True)),
            *(part.to(torch.int64) if t else None for part, t in zip(rng, held, strict=True)))  # fmt: skip


def _call(sample_ids: Tensor, num: int, rng, stream: int):
    device = sample_ids.device
    # A fill is no copy from the host, for which a GPU would wait, and which a CUDA graph cannot record.
    seed, step = (
        part.to(device=device, dtype=torch.int64)
        if isinstance(part, Tensor)
        else torch.full((), part, dtype=torch.int64, device=device)
        for part in rng
    )
    index = torch.arange(num, dtype=torch.int64, device=device)[None]  # (1, num)
    ids = sample_ids.to(torch.int64)[:, None]  # (B, 1)
    high = ((ids >> 32) & _LOW) ^ (stream << 24)
    return philox4x32(index, ids & _LOW, high, step & _LOW, seed & _LOW, (seed >> 32) & _LOW)


def _in_extension(sample_ids: Tensor) -> bool:
    return sample_ids.device.type in ("cpu", "cuda") and not _extension.problem_on(sample_ids.device)


def _arguments(sample_ids: Tensor, num: int, rng, stream: int) -> tuple:
    return sample_ids.to(torch.int64).contiguous(), num, *split(rng), stream


def integers(sample_ids: Tensor, num: int, *, rng, stream: int) -> Tensor:
    """(B,) int64 sample ids -> (B, num) int64 in [0, 2^32); in the extension where it can be used."""
    if _in_extension(sample_ids):
        return torch.ops.phmdiff_fast.philox_integers(*_arguments(sample_ids, num, rng, stream))
    return integers_reference(sample_ids, num, rng=rng, stream=stream)


def integers_reference(sample_ids: Tensor, num: int, *, rng, stream: int) -> Tensor:
    return _call(sample_ids, num, rng, stream)[0].expand(sample_ids.shape[0], num)


def _unit(words: Tensor) -> Tensor:
    return ((words >> 8).to(torch.float32) + 0.5) * 2.0**-24


def uniforms(sample_ids: Tensor, num: int, *, rng, stream: int) -> Tensor:
    """(B,) int64 sample ids -> (B, num) float32 in (0, 1)."""
    return _unit(integers(sample_ids, num, rng=rng, stream=stream))


def normals(sample_ids: Tensor, num: int, *, rng, stream: int) -> Tensor:
    """(B,) int64 sample ids -> (B, num) float32 standard normals (Box-Muller).

    In the extension where it can be used: within 2e-6 of the reference, the same integers behind them.
    """
    if _in_extension(sample_ids):
        return torch.ops.phmdiff_fast.philox_normals(*_arguments(sample_ids, num, rng, stream))
    return normals_reference(sample_ids, num, rng=rng, stream=stream)


def normals_reference(sample_ids: Tensor, num: int, *, rng, stream: int) -> Tensor:
    words = _call(sample_ids, (num + 3) // 4, rng, stream)
    lanes = []
    for first, second in ((words[0], words[1]), (words[2], words[3])):
        radius = torch.sqrt(-2.0 * torch.log(_unit(first)))
        angle = (2.0 * math.pi) * _unit(second)
        lanes += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return torch.stack(lanes, dim=-1).flatten(1)[:, :num]


if not _extension.problem():

    def _drawn(dtype: torch.dtype):
        return lambda ids, num, *_: ids.new_empty(ids.shape[0], num, dtype=dtype)

    torch.library.register_fake("phmdiff_fast::philox_normals", _drawn(torch.float32))
    torch.library.register_fake("phmdiff_fast::philox_integers", _drawn(torch.int64))
