"""Shared by the tests of the extension's pyramid: the operations by name, images, comparison with float64.

Memory that the extension is given starts as NaN (``poisoned``).
"""

from __future__ import annotations

import contextlib
import ctypes

import torch
from kernel_tools import in_margins, no_worse_than_eager

from phmdiff_fast.pyramid import build_pyramid, level_error, merge_state, upsample, upsample_add

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
TYPES = [F32, BF16, F16]
ALPHAS = [0.5, 0.3, 0.6, 0.75, 0.9]
SIZES = [(2, 3, 33, 40), (2, 2, 15, 17), (3, 1, 1, 9), (1, 2, 14, 1), (1, 1, 2, 3), (1, 4, 64, 70)]
OPS = torch.ops.phmdiff_fast
RNG = (2**40 + 7, 11)


LIBC = ctypes.CDLL(None)
LIBC.malloc.restype, LIBC.malloc.argtypes, LIBC.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]


def dirty_heap():
    """Leave free memory behind that is all bits set, NaN in every type: work space is likely cut from it."""
    blocks = [LIBC.malloc(2**16) for _ in range(16)]
    end = LIBC.malloc(64)  # so that what is freed does not go back to the system
    for block in blocks:
        ctypes.memset(block, 0xFF, 2**16)
        LIBC.free(block)
    LIBC.free(end)


@contextlib.contextmanager
def poisoned():
    """Memory from at::empty starts as NaN, in C++ too: an element left unwritten shows."""
    dirty_heap()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def half(n):
    return -(-n // 2)


def image(shape, dtype=F32, seed=0, margins=True):
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return in_margins(made) if margins else made


def vector(n, seed=0):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed)) * 0.9 + 0.05


def levels_of(x, levels, alpha, impl):
    """build_pyramid; eager PyTorch's antialiasing on a CPU wants help.

    It has no 16-bit form, so that is float32 here, each level rounded; and of an image of one column
    PyTorch 2.13 makes a constant, so that is turned to be one row.
    """
    if impl != "reference" or alpha == 0.5:
        return build_pyramid(x, levels, alpha=alpha, impl=impl)
    if x.shape[3] == 1:
        return [level.mT for level in levels_of(x.mT, levels, alpha, impl)]
    out = [x]
    for _ in range(levels - 1):
        wide = out[-1].to(torch.promote_types(x.dtype, F32))
        out.append(build_pyramid(wide, 2, alpha=alpha, impl=impl)[1].to(x.dtype))
    return out


# Every operation as name -> (images by name -> results, what images it takes); `size` is (B, C, H, W).
def calls(size, alpha=0.5, levels=4):
    height, width = size[2:]
    abar = vector(size[0])
    ids = torch.arange(size[0]) * 2**33 - 5
    draw = dict(rng=RNG, sample_ids=ids, stream=2)

    def wide(v, x):  # the vectors are never rounded; beside float64 images they are float64
        return v.to(torch.promote_types(x.dtype, F32))

    return {
        "build_pyramid": (lambda impl, x: levels_of(x, levels, alpha, impl)[1:], ("x",)),
        "merge_state": (lambda impl, y, eps, coarse: merge_state(y, eps, coarse, wide(abar, y), impl=impl),
                        ("y", "eps", "coarse")),
        "merge_state, coarsest": (lambda impl, y, eps: merge_state(y, eps, None, wide(abar, y), impl=impl),
                                  ("y", "eps")),
        "merge_state, drawn": (lambda impl, y, coarse: merge_state(y, None, coarse, wide(abar, y), impl=impl, **draw),
                               ("y", "coarse")),
        "merge_state, drawn, coarsest": (lambda impl, y: merge_state(y, None, None, wide(abar, y), impl=impl, **draw),
                                         ("y",)),
        "upsample": (lambda impl, coarse: upsample(coarse, height, width, impl=impl), ("coarse",)),
        "upsample_add": (lambda impl, coarse, x: upsample_add(coarse, x, wide(abar, x), impl=impl), ("coarse", "x")),
        "level_error": (lambda impl, x, coarse: level_error(x, coarse, impl=impl), ("x", "coarse")),
    }  # fmt: skip


LINEAR = [name for name in calls(SIZES[0]) if name != "level_error"]
ALL = list(calls(SIZES[0]))


def images_for(names, size, dtype=F32, margins=True):
    coarse = (*size[:2], half(size[2]), half(size[3]))
    return {
        n: image(coarse if n == "coarse" else size, dtype, seed=["x", "y", "eps", "coarse"].index(n), margins=margins)
        for n in names
    }


def run(call, images, impl, needs=None, seed=9):
    """(results, gradients by name) of sum(w result); needs: what requires grad, all by default."""
    needs = tuple(images) if needs is None else needs
    leaves = {n: v.detach().requires_grad_(n in needs) for n, v in images.items()}
    with poisoned() if impl == "extension" else contextlib.nullcontext():
        out = call(impl, **leaves)
        out = list(out) if isinstance(out, (list, tuple)) else [out]
        wanted = [v for v in leaves.values() if v.requires_grad]
        if not wanted:
            return out, {}
        weights = [image(o.shape, F32, seed + i, margins=False).to(o.dtype) for i, o in enumerate(out)]
        got = iter(torch.autograd.grad(out, wanted, weights))
    return [o.detach() for o in out], {n: next(got) for n, v in leaves.items() if v.requires_grad}


def same(a, b):
    """Bit for bit, (results, gradients) of ``run``."""
    assert len(a[0]) == len(b[0])
    assert a[1].keys() == b[1].keys()
    assert all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True))
    assert all(torch.equal(x, b[1][n]) for n, x in a[1].items())


def compare(name, size, dtype, *, alpha=0.5, levels=4, small=True):
    call, takes = calls(size, alpha, levels)[name]
    images, needs = images_for(takes, size, dtype), () if name == "level_error" else None
    before = {n: v.clone() for n, v in images.items()}
    got, eager = (run(call, images, impl, needs) for impl in ("extension", "reference"))
    exact = run(call, {n: v.double() for n, v in images.items()}, "reference", needs)
    for i, (a, b, c) in enumerate(zip(got[0], eager[0], exact[0], strict=True)):
        assert a.is_contiguous()
        no_worse_than_eager(a, b, c, small=small, name=f"{name} {i}")
        assert not any(a.untyped_storage().data_ptr() == v.untyped_storage().data_ptr() for v in images.values())
    for n, a in got[1].items():
        no_worse_than_eager(a, eager[1][n], exact[1][n], small=small, name=f"{name}: gradient of {n}")
    assert all(torch.equal(v, before[n]) for n, v in images.items()), "an input was changed"


def check_empty(name, size, alpha, levels):
    """Shapes as of one sample and one channel, but with no elements; eager PyTorch refuses some of these."""
    needs = () if name == "level_error" else None
    got, one = (
        run(call, images_for(takes, s), "extension", needs)
        for s in (size, (1, 1, *size[2:]))
        for call, takes in [calls(s, alpha, levels)[name]]
    )
    assert [o.shape for o in got[0]] == [(*size[:2], *o.shape[2:]) for o in one[0]]
    assert {n: g.shape for n, g in got[1].items()} == {n: (*size[:2], *g.shape[2:]) for n, g in one[1].items()}
