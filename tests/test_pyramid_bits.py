"""The same bits for every memory layout, thread count, instruction set, batch and stretch of noise."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pyramid_tools import (
    ALL,
    BF16,
    F16,
    F32,
    F64,
    LINEAR,
    OPS,
    RNG,
    calls,
    half,
    image,
    images_for,
    poisoned,
    run,
    same,
    vector,
)

from phmdiff_fast.haar import haar3d, inverse_haar3d
from phmdiff_fast.kernels import _extension, _philox
from phmdiff_fast.pyramid import build_pyramid, level_error, merge_state, upsample, upsample_add

pytestmark = pytest.mark.skipif(bool(_extension.problem()), reason=_extension.problem() or "the extension is there")


# --- layouts -----------------------------------------------------------------------------------


def expanded(v, dim):
    return v.narrow(dim, 0, 1).expand(v.shape)


def wrapped(v, *slices, pad):
    """The same values as a part of a larger image that is NaN elsewhere."""
    whole = torch.full([s + p for s, p in zip(v.shape, pad, strict=True)], math.nan, dtype=v.dtype)
    part = whole[slices]
    part.copy_(v)
    return part


LAYOUTS = {
    "transposed": lambda v: v.mT.contiguous().mT,
    "channels last": lambda v: v.to(memory_format=torch.channels_last),
    "batch and channel swapped": lambda v: v.transpose(0, 1).contiguous().transpose(0, 1),
    "some rows": lambda v: wrapped(v, ..., slice(2, -1), slice(None), pad=(0, 0, 3, 0)),
    "some columns": lambda v: wrapped(v, ..., slice(3, -2), pad=(0, 0, 0, 5)),
    "every second column": lambda v: torch.stack([v, torch.full_like(v, math.nan)], -1).flatten(3)[..., ::2],
    "every second row": lambda v: torch.stack([v, torch.full_like(v, math.nan)], 3).flatten(2, 3)[:, :, ::2],
    "at an odd offset": lambda v: torch.cat([v.new_full((3,), math.nan), v.flatten()])[3:].view(v.shape),
    "expanded batch": lambda v: expanded(v, 0),
    "expanded channel": lambda v: expanded(v, 1),
    "expanded row": lambda v: expanded(v, 2),
    "expanded column": lambda v: expanded(v, 3),
}


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=lambda t: str(t)[6:])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_gives_the_same_bits_as_dense_memory(layout, dtype):
    size = (3, 2, 11, 18)
    for name, alpha in [(n, 0.5) for n in ALL] + [("build_pyramid", 0.6)]:
        call, takes = calls(size, alpha)[name]
        needs = () if name == "level_error" else None
        laid = {n: LAYOUTS[layout](v) for n, v in images_for(takes, size, dtype, margins=False).items()}
        dense = {n: v.clone(memory_format=torch.contiguous_format) for n, v in laid.items()}
        assert not any(v.isnan().any() for v in dense.values())
        assert layout == "at an odd offset" or not any(v.is_contiguous() for v in laid.values())
        same(run(call, laid, "extension", needs), run(call, dense, "extension", needs))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gradient_s_layout_changes_no_bit(layout):
    size = (3, 2, 11, 18)
    for name, alpha in [(n, 0.5) for n in LINEAR] + [("build_pyramid", 0.6)]:
        call, takes = calls(size, alpha, levels=2)[name]
        leaves = [v.requires_grad_() for v in images_for(takes, size).values()]
        out = call("extension", *leaves)
        out = out[0] if isinstance(out, list) else out
        grad = LAYOUTS[layout](image(out.shape, margins=False))
        dense = grad.clone(memory_format=torch.contiguous_format)
        a, b = (torch.autograd.grad(out, leaves, g, retain_graph=True) for g in (grad, dense))
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_vectors_may_have_any_layout_and_width():
    y, coarse = image((3, 1, 4, 6)), image((3, 1, 2, 3))
    v, ids = vector(3), torch.tensor([5, -1, 2**40])
    strided = torch.stack([v, v + 1], 1)[:, 0]
    many = torch.stack([ids, ids + 1], 1)[:, 0]
    draw = dict(rng=RNG, impl="extension")
    plain = merge_state(y, None, coarse, v, sample_ids=ids, **draw)
    for other in (strided, v.double()):
        assert torch.equal(merge_state(y, None, coarse, other, sample_ids=many, **draw), plain)
    one = v[:1].expand(3)
    expected = upsample_add(coarse, y, one.contiguous(), impl="extension")
    assert torch.equal(upsample_add(coarse, y, one, impl="extension"), expected)


def test_offsets_beyond_two_to_the_31():
    """Memory is reserved, not touched, but for the few pixels of an image spread over it."""
    far = 2**31 + 64
    whole = torch.empty(far + 4096, dtype=BF16)
    for strides in ((far, 64, 8, 1), (64, far, 8, 1)):
        x = whole.as_strided((2, 2, 6, 8), strides)
        x.copy_(image(x.shape, BF16, margins=False))
        small = whole.as_strided((2, 2, 3, 4), tuple(s + 512 if s == far else s for s in strides), 2048)
        small.copy_(image(small.shape, BF16, seed=1, margins=False))
        a, b = build_pyramid(x, 3, impl="extension"), build_pyramid(x.contiguous(), 3, impl="extension")
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
        merged = merge_state(x, x, small, vector(2), impl="extension")
        assert torch.equal(merged, merge_state(x.clone(), x.clone(), small.clone(), vector(2), impl="extension"))
    tall = whole.as_strided((1, 1, 2, 8), (0, 0, far, 1))
    tall.copy_(image(tall.shape, BF16, margins=False))
    for left, right in ((tall, tall.clone()),):
        assert torch.equal(build_pyramid(left, 2, impl="extension")[1], build_pyramid(right, 2, impl="extension")[1])
        assert torch.equal(upsample(left, 4, 15, impl="extension"), upsample(right, 4, 15, impl="extension"))
        for p, q in zip(
            *(OPS.merge_backward(g, vector(1), None, True, True, True) for g in (left, right)), strict=True
        ):
            assert torch.equal(p, q)


# --- the same bits, whoever computes them --------------------------------------------------------

# Large enough that work is split (in_parallel gives a thread at least 32768 elements), small, and narrow.
BITS = [(2, 3, 130, 257), (1, 1, 1, 37), (3, 5, 7, 3), (1, 2, 9, 64)]


def digests():
    """One hash per operation and type, of results and gradients: what must not depend on threads or processor."""
    found = {}
    for dtype in (F32, BF16, F16, F64):
        for name, alpha in [(n, 0.5) for n in ALL] + [("build_pyramid", a) for a in (0.02, 0.3, 0.6, 0.9)]:
            digest = hashlib.sha256()
            for size in BITS:
                call, takes = calls(size, alpha)[name]
                got = run(call, images_for(takes, size, dtype), "extension", () if name == "level_error" else None)
                for t in (*got[0], *got[1].values()):
                    digest.update(t.contiguous().view(torch.uint8).numpy().tobytes())
            found[f"{name} {alpha} {dtype}"] = digest.hexdigest()[:16]
        for shape in ((1, 2, 40, 33, 50), (2, 1, 3, 4, 5)):
            x = image(shape, dtype)
            bands = haar3d(x, impl="extension")
            back = inverse_haar3d(bands, shape=shape[2:], impl="extension")
            for what, t in (("haar3d", bands), ("inverse_haar3d", back)):
                found[f"{what} {shape} {dtype}"] = hashlib.sha256(t.view(torch.uint8).numpy().tobytes()).hexdigest()[
                    :16
                ]
    ids = torch.tensor([3, -8, 2**35])
    for draw in (_philox.normals, _philox.integers):
        t = draw(ids, 40_007, rng=RNG, stream=3)
        found[draw.__name__] = hashlib.sha256(t.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
    return found


@pytest.fixture(scope="module")
def these_digests():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield digests()
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("threads", [2, 5])
def test_the_number_of_threads_changes_no_bit(threads, these_digests):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert digests() == these_digests
    finally:
        torch.set_num_threads(before)


# Fresh memory holds another byte in each, so that work space read before it is written shows too.
@pytest.mark.parametrize(("isa", "byte"), [("generic", 128), ("avx2", 64), ("avx512", 200)])
def test_the_instruction_set_changes_no_bit(isa, byte, these_digests):
    code = (
        "import torch, json, test_pyramid_bits as t; torch.set_num_threads(1);"
        "print(json.dumps([t._extension.status()[1]['cpu'], t.digests()]))"
    )
    here = Path(__file__).resolve().parent
    env = {**os.environ, "PHMDIFF_ISA": isa, "MALLOC_PERTURB_": str(byte), "MALLOC_MMAP_THRESHOLD_": str(2**30),
           "PYTHONPATH": os.pathsep.join([str(here), *sys.path])}  # fmt: skip
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=env, capture_output=True, text=True, cwd=here
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    ran_on, found = json.loads(ran.stdout.strip().splitlines()[-1])
    if ran_on != isa:
        pytest.skip(f"this processor or build has no {isa}")
    assert found == these_digests


@pytest.mark.parametrize("dtype", [F32, BF16], ids=lambda t: str(t)[6:])
def test_outputs_written_past_the_caches_have_the_same_bits(dtype):
    """From 32 MiB on; a sample alone is smaller. Odd widths, so rows begin anywhere in a line."""
    size = (3, 1, 1201, 2401) if dtype == F32 else (3, 2, 1201, 2401)
    abar, ids = vector(3), torch.tensor([5, 1, 9])
    leaf = image(size, dtype, margins=False).requires_grad_()
    small = image((*size[:2], half(size[2]), half(size[3])), dtype, seed=1, margins=False).requires_grad_()
    assert leaf.numel() * leaf.element_size() >= 2**25 > leaf[0].numel() * leaf.element_size()

    def outcome(rows):
        y, coarse = leaf[rows], small[rows]
        drawn = merge_state(y, None, coarse, abar[rows], rng=RNG, sample_ids=ids[rows], impl="extension")
        levels = build_pyramid(y, 3, impl="extension")[1:]
        fine = build_pyramid(y, 2, alpha=0.9, impl="extension")[1:]
        bands = haar3d(y.unflatten(3, (7, -1)), impl="extension")
        back = inverse_haar3d(bands, shape=(1201, 7, 343), impl="extension")
        out = [drawn, *levels, *fine, bands, back]
        with poisoned():
            grads = torch.autograd.grad(out, [y, coarse], [o.detach() for o in out])
        return [o.detach() for o in (*out, *grads)]

    whole = outcome([0, 1, 2])
    for n in range(3):
        assert all(torch.equal(a[n : n + 1], b) for a, b in zip(whole, outcome([n]), strict=True))


@pytest.mark.parametrize("name", ALL)
def test_no_bit_depends_on_a_sample_s_neighbours(name):
    """Split or reordered batches; the drawn noise goes by sample id."""
    size, order = (4, 2, 13, 18), [2, 0, 3, 1]
    abar, ids, needs = vector(4), torch.tensor([7, -3, 2**34, 0]), () if name == "level_error" else None

    def call(rows):
        def of(impl, **v):
            draw = dict(rng=RNG, sample_ids=ids[rows], stream=2, impl=impl)
            if name == "build_pyramid":
                return build_pyramid(v["x"], 4, impl=impl)[1:]
            if name == "upsample":
                return upsample(v["coarse"], *size[2:], impl=impl)
            if name == "upsample_add":
                return upsample_add(v["coarse"], v["x"], abar[rows], impl=impl)
            if name == "level_error":
                return level_error(v["x"], v["coarse"], impl=impl)
            if "drawn" in name:
                return merge_state(v["y"], None, v.get("coarse"), abar[rows], **draw)
            return merge_state(v["y"], v["eps"], v.get("coarse"), abar[rows], impl=impl)

        return of

    images = images_for(calls(size)[name][1], size, margins=False)
    whole_images = {n: v.clone().requires_grad_(needs is None) for n, v in images.items()}

    def outcome(rows):
        leaves = [v[rows] for v in whole_images.values()]
        out = call(rows)("extension", **dict(zip(whole_images, leaves, strict=True)))
        out = out if isinstance(out, list) else [out]
        grads = [] if needs == () else torch.autograd.grad(out, leaves, [o.detach() for o in out])
        return [*(o.detach() for o in out), *grads]

    whole = outcome([0, 1, 2, 3])
    assert all(torch.equal(a[order], b) for a, b in zip(whole, outcome(order), strict=True))
    parts = [outcome([n]) for n in range(4)]
    assert all(torch.equal(a, torch.cat(p)) for a, p in zip(whole, zip(*parts, strict=True), strict=True))


@pytest.mark.parametrize(("height", "width"), [(5, 7), (1, 1), (3, 514), (8, 259), (2, 4)])
def test_noise_drawn_while_merging_is_that_of_normals(height, width):
    ids, y = torch.tensor([9, -(2**40)]), torch.zeros(2, 3, height, width)
    drawn = merge_state(y, None, None, torch.zeros(2), rng=RNG, sample_ids=ids, stream=4, impl="extension")
    assert torch.equal(drawn.flatten(1), _philox.normals(ids, 3 * height * width, rng=RNG, stream=4))
    held = tuple(torch.tensor(part) for part in RNG)
    again = merge_state(y, None, None, torch.zeros(2), rng=held, sample_ids=ids, stream=4, impl="extension")
    assert torch.equal(drawn, again)
    given_ = merge_state(y, drawn, None, torch.zeros(2), impl="extension")
    assert torch.equal(drawn, given_)
