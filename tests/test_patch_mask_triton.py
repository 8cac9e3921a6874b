"""The Triton kernels of patch_mask against the reference: masks bit for bit, tokens to eager's own rounding."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_tools import DEVICE, guarded_buffers, in_margins, needs_triton, no_worse_than_eager, reversed_programs
from torch._subclasses.fake_tensor import FakeTensorMode

from phmdiff_fast.kernels import _philox
from phmdiff_fast.kernels._impl import BackendError
from phmdiff_fast.kernels.patch_mask import MAX_PATCHES, draw_mask, embed_visible, restore_tokens

pytestmark = needs_triton
FEW = settings(max_examples=25, deadline=None, derandomize=True)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Around the edges of tiles of 16, 32 and 64 rows.
EDGES = st.sampled_from([0, 1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 130])


def randn(*shape, dtype=torch.float32, seed=0, grad=False):
    g = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=g).to(dtype).to(DEVICE).requires_grad_(grad)


def ids_of(batch: int) -> torch.Tensor:
    return (torch.arange(batch, device=DEVICE) * 977 + (1 << 33)) * torch.tensor([1, -1], device=DEVICE).repeat(batch)[
        :batch
    ]


def mask_of(batch, num, keep):
    return draw_mask(ids_of(batch), num, keep, rng=(5, 6), impl="reference")


# ---- draw_mask ----------------------------------------------------------------------------------


@FEW
@given(st.integers(0, 5), st.sampled_from([0, 1, 15, 16, 17, 100, 255, 256, 257, 600]), st.floats(0, 1),
       st.sampled_from([0, 0.0, 0.4, 1.0]), st.integers(0, 2**62), st.integers(0, 2**40),
       st.sampled_from([0, 8, 10]))  # fmt: skip
def test_masks_are_bit_identical_to_the_reference(batch, num, share, drop, seed, step, stream):
    keep = round(share * num)
    first = None if drop == 0 else torch.rand(batch, num, device=DEVICE) < drop
    common = dict(rng=(seed, step), stream=stream, drop_first=first)
    with guarded_buffers():
        got = draw_mask(ids_of(batch), num, keep, impl="triton", **common)
    for a, b in zip(got, draw_mask(ids_of(batch), num, keep, impl="reference", **common), strict=True):
        assert a.dtype == b.dtype == torch.int32
        assert torch.equal(a, b)


@pytest.mark.parametrize("num", [4095, 4096, 4097, MAX_PATCHES])
def test_masks_of_many_patches(num):
    ids = torch.tensor([3, 2**50 + 1], device=DEVICE)
    for a, b in zip(*(draw_mask(ids, num, num // 3, rng=(1, 2), impl=i) for i in ("triton", "reference")), strict=True):
        assert torch.equal(a, b)


def test_more_patches_than_registers_hold_are_refused_not_cut_off():
    with pytest.raises(BackendError, match="up to 16384"):
        draw_mask(ids_of(1), MAX_PATCHES + 1, 5, rng=(0, 0), impl="triton")
    assert draw_mask(ids_of(1), MAX_PATCHES + 1, 5, rng=(0, 0))[0].shape == (1, 5)


def test_seed_and_step_may_live_on_the_device():
    seed, step = (torch.tensor(v, device=DEVICE) for v in (2**45 + 7, 123))
    for rng in ((seed, step), (2**45 + 7, step), (seed, 123)):
        for a, b in zip(draw_mask(ids_of(3), 70, 20, rng=rng, impl="triton"),
                        draw_mask(ids_of(3), 70, 20, rng=(2**45 + 7, 123), impl="reference"), strict=True):  # fmt: skip
            assert torch.equal(a, b)


def test_k3_strides_of_ids_and_classes():
    ids = ids_of(8)[::2]
    first = (torch.rand(50, 4, device=DEVICE) < 0.5).T
    for a, b in zip(*(draw_mask(ids, 50, 20, rng=(1, 2), drop_first=first, impl=i) for i in ("triton", "reference")),
                    strict=True):  # fmt: skip
        assert torch.equal(a, b)


def test_masks_depend_on_neither_the_batch_split_nor_its_order():
    ids = ids_of(5)
    whole = draw_mask(ids, 90, 33, rng=(1, 2), impl="triton")
    turned = draw_mask(ids.flip(0), 90, 33, rng=(1, 2), impl="triton")
    assert all(torch.equal(w, t.flip(0)) for w, t in zip(whole, turned, strict=True))
    parts = [draw_mask(i, 90, 33, rng=(1, 2), impl="triton") for i in (ids[:2], ids[2:])]
    assert all(torch.equal(w, torch.cat(p)) for w, p in zip(whole, zip(*parts, strict=True), strict=True))


# ---- restore_tokens -----------------------------------------------------------------------------


@settings(FEW, max_examples=16)
@given(st.integers(0, 2), EDGES, st.floats(0, 1), st.sampled_from([0, 1, 33, 64, 130]), st.sampled_from(DTYPES),
       st.booleans(), st.booleans(),
       st.sampled_from(["plain", "offset", "transposed", "expanded"]), st.integers(0, 7))  # fmt: skip
def test_restore_is_no_worse_than_eager(batch, num, share, width, dtype, fill_rows, positions, view, needed):
    keep = round(share * num)
    inverse = mask_of(batch, num, keep)[1]
    x, fill = randn(batch, keep, width, dtype=dtype), randn(*((batch, num - keep, width) if fill_rows else (width,)))
    if view == "offset":
        x = torch.nn.functional.pad(x, (3, 5, 1, 2))[:, 1 : 1 + keep, 3 : 3 + width]
    elif view == "transposed":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    elif view == "expanded":
        x, fill = x[:1].expand(batch, keep, width) if batch else x, fill
    pos = randn(num, width, seed=3) if positions else None
    grad = randn(batch, num, width, dtype=dtype, seed=4)
    leaves = [t.detach().requires_grad_(bool(needed >> i & 1)) if t is not None else None
              for i, t in enumerate((in_margins(x) if view == "plain" else x, in_margins(fill), pos))]  # fmt: skip

    def run(impl, kind=None):
        a = [t if t is None or kind is None else t.detach().to(kind).requires_grad_(t.requires_grad) for t in leaves]
        out = restore_tokens(a[0], a[1], inverse, a[2], impl=impl)
        wanted = [t for t in a if t is not None and t.requires_grad]
        return [out, *(torch.autograd.grad(out, wanted, grad.to(out.dtype)) if wanted else ())]

    with guarded_buffers():
        got = run("triton")
    for i, (a, b, c) in enumerate(zip(got, run("reference"), run("reference", torch.float64), strict=True)):
        no_worse_than_eager(a, b, c, small=True, name=f"output {i}")


@pytest.mark.parametrize("fill_rows", [False, True])
@pytest.mark.parametrize("keep", [0, 40, 300])
def test_restore_puts_every_row_in_its_place_over_many_tiles(fill_rows, keep):
    batch, num, width = 3, 300, 72
    keep_ids, inverse = mask_of(batch, num, keep)
    x, fill = randn(batch, keep, width, grad=True), randn(*((batch, num - keep, width) if fill_rows else (width,)))
    fill = fill.requires_grad_()
    with guarded_buffers():
        out = restore_tokens(x, fill, inverse, None, impl="triton")
        grad = randn(batch, num, width, seed=9)
        dx, dfill = torch.autograd.grad(out, (x, fill), grad)
    for b in range(batch):
        gaps = [n for n in range(num) if n not in set(keep_ids[b].tolist())]
        assert torch.equal(out[b, keep_ids[b].long()], x[b])
        assert torch.equal(out[b, gaps], fill[b] if fill_rows else fill.expand(num - keep, width))
        assert torch.equal(dx[b], grad[b, keep_ids[b].long()])
        if fill_rows:
            assert torch.equal(dfill[b], grad[b, gaps])
    if not fill_rows:
        exact = grad.double()[inverse < 0].sum(0)
        torch.testing.assert_close(dfill.double(), exact, rtol=1e-5, atol=1e-4)


def test_an_expanded_gradient_is_read_right():
    inverse = mask_of(2, 20, 7)[1]
    x, fill = randn(2, 7, 48, grad=True), randn(48, grad=True)
    found = []
    for impl in ("triton", "reference"):
        out = restore_tokens(x, fill, inverse, None, impl=impl)
        found.append(torch.autograd.grad(out.sum() + out[..., :1].sum(), (x, fill)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


# ---- embed_visible ------------------------------------------------------------------------------


def inputs(B=3, C=1, Cs=2, H=16, W=24, p=4, D=40, keep=5, coarse=True, noise="eps", scaled=True, positions=True,
           dtype=torch.float32, needed=7, images=torch.float32):  # fmt: skip
    """Keyword arguments of embed_visible on the edge-poisoned buffers; ``needed`` bits: sources, weight, bias."""
    channels = Cs + C * (2 if coarse else 1)
    num = (H // p) * (W // p)
    out = dict(
        y=randn(B, C, H, W, dtype=images), sources=randn(B, Cs, H, W, dtype=images, seed=1),
        coarse=randn(B, C, -(-H // 2), -(-W // 2), seed=2) if coarse else None,
        abar=torch.linspace(0.9999, 0.01, max(B, 1))[:B].to(DEVICE),
        keep_ids=None if keep is None else mask_of(B, num, min(keep, num))[0],
        weight=randn(D, channels * p * p, seed=3, dtype=dtype), bias=randn(D, seed=4, dtype=dtype),
        pos=randn(num, D, seed=5) if positions else None,
    )  # fmt: skip
    out = {k: v if v is None or k == "keep_ids" else in_margins(v) for k, v in out.items()}
    for bit, name in enumerate(("sources", "weight", "bias")):
        out[name] = out[name].detach().requires_grad_(bool(needed >> bit & 1))
    if noise == "eps":
        out["eps"] = in_margins(randn(B, C, H, W, seed=6))
    elif noise == "drawn":
        out |= dict(rng=(2**40 + 1, 17), sample_ids=ids_of(B), stream=3)
    if scaled:
        out["state_scale"] = out["abar"].sqrt()
    return out


def outputs(args, impl, kind=None, seed=8):
    """[tokens, gradients of what needs one]; ``kind``: everything floating in that dtype first."""
    args = dict(args)
    leaves = []
    for name, value in args.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            if kind is not None:
                args[name] = value.detach().to(kind).requires_grad_(value.requires_grad)
            if value.requires_grad:
                leaves.append(args[name])
    out = embed_visible(**args, impl=impl)
    grad = randn(*out.shape, seed=seed, dtype=args["weight"].dtype if kind is None else torch.float32)
    if kind is not None:  # the gradient that arrives was rounded too
        grad = randn(*out.shape, seed=seed, dtype=outputs.dtype).to(kind)
    return [out, *(torch.autograd.grad(out, leaves, grad) if leaves else ())]


def exact_of(args):
    """The reference in float64, on noise drawn as it is drawn in float32."""
    args = dict(args)
    if "rng" in args:
        y = args["y"]
        drawn = _philox.normals(
            args.pop("sample_ids"), y.shape[1:].numel(), rng=args.pop("rng"), stream=args.pop("stream")
        )
        args["eps"] = drawn.view_as(y)
    outputs.dtype = args["weight"].dtype
    return outputs(args, "reference", torch.float64)


def compare(args, small=True):
    with guarded_buffers():
        got = outputs(args, "triton")
    for i, (a, b, c) in enumerate(zip(got, outputs(args, "reference"), exact_of(args), strict=True)):
        no_worse_than_eager(a, b, c, small=small, name=f"output {i}")


@FEW
@given(st.integers(0, 3), st.integers(0, 3), st.integers(0, 5), st.sampled_from([(1, 7, 5), (2, 10, 14), (3, 15, 9),
       (4, 16, 24), (8, 16, 16)]), EDGES, st.sampled_from([0, 1, 5, 200, None]), st.booleans(),
       st.sampled_from(["eps", "drawn", "none"]), st.booleans(), st.booleans(), st.sampled_from(DTYPES),
       st.integers(0, 7))  # fmt: skip
def test_embed_is_no_worse_than_eager(B, C, Cs, size, D, keep, coarse, noise, scaled, positions, dtype, needed):
    if C + Cs == 0:
        return
    p, H, W = size
    compare(inputs(B, C, Cs, H, W, p, D, keep, coarse and C > 0, noise, scaled, positions, dtype, needed))


@pytest.mark.parametrize("dtype", DTYPES)
def test_embed_of_one_level_of_a_preset(dtype):
    compare(inputs(B=4, C=1, Cs=1, H=64, W=64, D=384, keep=64, dtype=dtype), small=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("C", "Cs", "p"), [(1, 33, 4), (16, 2, 4), (3, 3, 8), (5, 40, 2)])
def test_embed_in_several_pieces(C, Cs, p, dtype):
    """Stem maps and latents: more columns than one piece of the product holds, in the state or the sources."""
    compare(inputs(B=2, C=C, Cs=Cs, H=16, W=16, p=p, D=72, keep=9, noise="drawn", dtype=dtype), small=False)


def test_embed_reads_nothing_of_dropped_patches():
    args = inputs(B=2, Cs=2, noise="eps", keep=4)
    clean = outputs(args, "triton")
    kept = torch.zeros(2, 24, dtype=torch.bool, device=DEVICE).scatter(1, args["keep_ids"].long(), True)
    pixels = kept.view(2, 1, 4, 6).repeat_interleave(4, 2).repeat_interleave(4, 3)
    halo = torch.nn.functional.max_pool2d(pixels.float(), 2)  # the coarse pixels below kept patches, then their ring
    halo = torch.nn.functional.max_pool2d(halo, 3, stride=1, padding=1) > 0
    for name in ("y", "eps", "sources"):
        with torch.no_grad():
            args[name].masked_fill_(~pixels.expand_as(args[name]), float("nan"))
    args["coarse"].masked_fill_(~halo, float("nan"))
    for a, b in zip(clean, outputs(args, "triton"), strict=True):
        assert torch.equal(a, b)


def test_gradient_of_the_sources_is_zero_where_dropped():
    args = inputs(B=3, keep=7, needed=1)
    with guarded_buffers():
        _, dsources = outputs(args, "triton")
    kept = torch.zeros(3, 24, dtype=torch.bool, device=DEVICE).scatter(1, args["keep_ids"].long(), True)
    pixels = kept.view(3, 1, 4, 6).repeat_interleave(4, 2).repeat_interleave(4, 3).expand_as(dsources)
    assert (dsources[~pixels] == 0).all()
    assert (dsources[pixels] != 0).all()


def test_the_order_of_kept_ids_is_free():
    args = inputs(B=2, keep=6)
    args["keep_ids"] = args["keep_ids"].flip(1)
    compare(args)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_embed_of_extreme_values(scale):
    """Nothing is squared on the way: what float32 holds goes through, and zeros stay zeros."""
    args = inputs(B=2, keep=6, needed=7, positions=False)
    for name in ("y", "sources", "coarse", "eps"):
        args[name] = (args[name].detach() * scale).requires_grad_(args[name].requires_grad)
    args["bias"] = (args["bias"].detach() * scale).requires_grad_()
    compare(args)
    empty = {k: torch.zeros_like(v) if k in ("y", "sources", "coarse", "eps", "bias") else v for k, v in args.items()}
    assert (embed_visible(**empty, impl="triton") == 0).all()


@pytest.mark.parametrize("p", [1, 2, 4, 8])
def test_noise_drawn_inside_is_that_of_philox(p):
    """An identity for weight gives the noise itself: within 2e-6 of the reference's."""
    B, C, side = 2, 2, 16
    y, ids = torch.zeros(B, C, side, side, device=DEVICE), ids_of(B)
    eye = torch.eye(C * p * p, device=DEVICE)
    common = dict(y=y, sources=y[:, :0], coarse=None, abar=torch.zeros(B, device=DEVICE), keep_ids=None, weight=eye,
                  bias=None, pos=None, rng=(3, 2**35), sample_ids=ids, stream=2)  # fmt: skip
    a, b = (embed_visible(**common, impl=i) for i in ("triton", "reference"))
    assert float((a - b).abs().max()) <= 2e-6
    assert float((a - embed_visible(**{**common, "stream": 3}, impl="triton")).abs().max()) > 0.1
    seed, step = (torch.tensor(v, device=DEVICE) for v in (3, 2**35))
    for rng in ((seed, step), (3, step), (seed, 2**35)):
        assert torch.equal(a, embed_visible(**{**common, "rng": rng}, impl="triton"))


def test_partial_sums_of_the_weights_gradient():
    """Enough rows that the weight's gradient is summed in shares; same bits again, right in every share."""
    args = inputs(B=4, Cs=1, H=64, W=64, p=2, D=16, keep=300, coarse=False, positions=False, needed=6)
    from phmdiff_fast.kernels import _launch

    grids = {}
    out = embed_visible(**args, impl="triton")
    grad = randn(*out.shape, seed=8)
    run = lambda: torch.autograd.grad(out, (args["weight"], args["bias"]), grad, retain_graph=True)  # noqa: E731
    first = run()

    def watch(kernel, grid, positional, meta):
        grids[kernel.__name__] = grid
        kernel[grid](*positional, **meta)

    with _launch.observe(watch), guarded_buffers():
        second = run()
    assert grids["_embed_weights"][2] > 1
    exact, eager = exact_of(args)[1:], outputs(args, "reference")[1:]
    for a, b, c, d in zip(first, second, eager, exact, strict=True):
        assert torch.equal(a, b)
        no_worse_than_eager(a, c, d)


def test_long_sums_in_float32_lose_nothing():
    """Terms of 1 + 2^-19: a tile's sum is exact, and added up plainly its last bit is lost from 1024 on."""
    args = inputs(B=2, C=1, Cs=7, H=64, W=64, p=2, D=8, keep=1020, coarse=False, noise="none", scaled=False, needed=6)
    args["abar"] = torch.ones(2, device=DEVICE)
    args["y"], args["sources"] = torch.ones_like(args["y"]), torch.ones_like(args["sources"])
    out = embed_visible(**args, impl="triton")
    term = 1 + 2.0**-19
    for gradient in torch.autograd.grad(out, (args["weight"], args["bias"]), torch.full_like(out, term)):
        assert float((gradient.double() / (2040 * term) - 1).abs().max()) < 1e-7


def test_rows_depend_on_neither_the_batch_split_nor_its_order():
    # As many rows a sample as a tile has: the interpreter's product rounds by the row's place in the tile.
    args = inputs(B=4, H=32, W=32, keep=32, needed=1, noise="drawn")
    out, dsources = outputs(args, "triton")
    per_sample = ("y", "sources", "coarse", "abar", "keep_ids", "sample_ids", "state_scale")
    grad = randn(*out.shape, seed=8)
    for half in (slice(0, 1), slice(1, 4), torch.tensor([2, 0, 3, 1], device=DEVICE)):
        part = {k: v[half].detach() if k in per_sample else v for k, v in args.items()}
        part["sources"].requires_grad_()
        again = embed_visible(**part, impl="triton")
        assert torch.equal(again, out[half])
        assert torch.equal(torch.autograd.grad(again, part["sources"], grad[half])[0], dsources[half])


def test_k1_nothing_kept_and_everything_kept():
    args = inputs(B=2, keep=0)
    out, *grads = outputs(args, "triton")
    assert out.shape == (2, 0, 40)
    assert all((g == 0).all() for g in grads)
    whole = inputs(B=2, keep=24)
    for a, b in zip(outputs(whole, "triton"), outputs({**whole, "keep_ids": None}, "triton"), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("view", ["channels_last", "expanded", "offset", "reversed", "strided"])
def test_k3_strides_equal_the_contiguous_result(view):
    args = inputs(B=2, C=2, Cs=3, keep=6, noise="eps")
    plain = outputs(args, "triton")
    for name in ("y", "sources", "coarse", "eps"):
        x = args[name].detach()
        if view == "channels_last":
            x = x.contiguous(memory_format=torch.channels_last)
        elif view == "offset":
            x = torch.nn.functional.pad(x, (1, 2, 3, 1), value=float("nan"))[..., 3:-1, 1:-2]
        elif view == "reversed":
            x = x.flip(0).flip(0)
        elif view == "strided":
            x = torch.stack([x, torch.full_like(x, float("nan"))], -1)[..., 0]
        elif view == "expanded":
            args[name] = x[:, :1].expand(-1, x.shape[1], -1, -1)
            continue
        args[name] = x.requires_grad_(args[name].requires_grad)
    if view == "expanded":
        args["sources"].requires_grad_()
        images = ("y", "sources", "coarse", "eps")
        copies = {k: args[k].detach().clone().requires_grad_(args[k].requires_grad) for k in images}
        plain = outputs({**args, **copies}, "triton")
    args["weight"] = args["weight"].detach().T.contiguous().T.requires_grad_()
    for a, b in zip(plain, outputs(args, "triton"), strict=True):
        assert torch.equal(a, b)


def test_k4_types():
    args = inputs(needed=0)
    with pytest.raises(TypeError, match="bias"):
        embed_visible(**{**args, "bias": args["bias"].half()}, impl="triton")
    with pytest.raises(BackendError, match="float64"):
        embed_visible(**{**args, "weight": args["weight"].double(), "bias": args["bias"].double()}, impl="triton")
    with pytest.raises(TypeError, match="inverse"):
        restore_tokens(randn(1, 2, 3), randn(3), torch.zeros(1, 5, device=DEVICE), None, impl="triton")
    compare(inputs(images=torch.bfloat16, dtype=torch.bfloat16))
    long = {**args, "keep_ids": args["keep_ids"].long()}
    assert torch.equal(embed_visible(**args, impl="triton"), embed_visible(**long, impl="triton"))


def test_k5_offsets_beyond_32_bits():
    """Rows and images 2^31 elements apart: memory that is never touched between them."""
    far = (1 << 31) + 64
    store = torch.empty(far + 4096, dtype=torch.float16, device=DEVICE)
    images = store.as_strided((2, 1, 8, 8), (far, 64, 8, 1))
    images.copy_(randn(2, 1, 8, 8))
    args = inputs(B=2, C=1, Cs=1, H=8, W=8, keep=3, coarse=False, noise="none", needed=6)
    near = {**args, "y": images.clone(), "sources": images.clone()}
    for a, b in zip(outputs(near, "triton"), outputs({**args, "y": images, "sources": images}, "triton"), strict=True):
        assert torch.equal(a, b)
    x = store.as_strided((2, 3, 64), (far, 64, 1))
    inverse = mask_of(2, 5, 3)[1]
    fill = randn(64, dtype=torch.float16)
    assert torch.equal(*(restore_tokens(t, fill, inverse, None, impl="triton") for t in (x, x.clone())))


def test_k6_gradients_that_are_not_needed_are_not_computed():
    from phmdiff_fast.kernels import _launch

    for needed in range(1, 8):
        args = inputs(B=2, needed=needed, noise="none")
        out = embed_visible(**args, impl="triton")
        launched = []

        def watch(kernel, grid, positional, meta, launched=launched):
            launched.append(kernel.__name__)
            kernel[grid](*positional, **meta)

        with _launch.observe(watch):
            out.backward(randn(*out.shape))
        for bit, name in enumerate(("sources", "weight", "bias")):
            assert (args[name].grad is not None) == bool(needed >> bit & 1)
        assert ("_embed_sources" in launched) == bool(needed & 1)
        assert ("_embed_weights" in launched) == bool(needed & 6)


@pytest.mark.parametrize("name", ["y", "coarse", "abar", "eps", "pos", "state_scale"])
def test_k6_inputs_only_the_reference_trains_are_refused(name):
    args = inputs(needed=7)
    args[name] = args[name].detach().requires_grad_()
    with pytest.raises(BackendError, match=f"{name} needs a gradient"):
        embed_visible(**args, impl="triton")
    with torch.no_grad():
        embed_visible(**args, impl="triton")


def test_k7_second_derivatives_are_refused():
    args = inputs(B=1, needed=7)
    out = embed_visible(**args, impl="triton")
    first = torch.autograd.grad(out.square().sum(), args["weight"], create_graph=True)[0]
    with pytest.raises(RuntimeError):
        torch.autograd.grad(first.sum(), args["sources"])
    x, fill = randn(1, 2, 8, grad=True), randn(8, grad=True)
    out = restore_tokens(x, fill, mask_of(1, 5, 2)[1], None, impl="triton")
    first = torch.autograd.grad(out.square().sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError):
        torch.autograd.grad(first.sum(), fill)


def test_k8_registered_rightly():
    a = inputs(B=2)
    weights = [a[k].detach().requires_grad_() for k in ("sources", "weight", "bias")]
    embed = (a["y"], weights[0], a["coarse"], a["abar"], a["keep_ids"], weights[1], weights[2], a["pos"], a["eps"],
             a["state_scale"], None, None, None, 0, 0, 0, False)  # fmt: skip
    ops = torch.ops.phmdiff_fast
    torch.library.opcheck(ops.embed_visible.default, embed)
    _, inverse = mask_of(2, 20, 6)
    torch.library.opcheck(ops.draw_mask.default, (ids_of(2), 20, 6, 1, 2, None, None, 0, None))
    for fill in (randn(8, grad=True), randn(2, 14, 8, grad=True)):
        torch.library.opcheck(ops.restore_tokens.default, (randn(2, 6, 8, grad=True), fill, inverse, randn(20, 8)))


def whole_path(ids, y, sources, coarse, abar, weight, bias, fill, step):
    rng = (7, step)
    keep_ids, inverse = draw_mask(ids, 24, 9, rng=rng, impl="triton")
    x = embed_visible(y, sources, coarse, abar, keep_ids, weight, bias, None, rng=rng, sample_ids=ids, stream=1,
                      impl="triton")  # fmt: skip
    return restore_tokens(x, fill, inverse, None, impl="triton").square().sum()


def path_inputs(B=2):
    a = inputs(B=B)
    return [ids_of(B), a["y"], a["sources"], a["coarse"], a["abar"], a["weight"], a["bias"], randn(40, grad=True)]


def test_k8_compiles_whole_and_no_step_compiles_again():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(whole_path, fullgraph=True, backend=counter)
    for step in (3, 4, 5, 6):
        args = path_inputs()
        leaves = [t for t in args if t.requires_grad]
        step_on_device = torch.tensor(step, device=DEVICE)
        found = []
        for run in (whole_path, compiled):
            out = run(*args, step_on_device)
            found.append([out, *torch.autograd.grad(out, leaves)])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert counter.frame_count == 1
    for step in (10, 11, 12, 13):  # integers: one more graph in which the step is a symbol, then none
        compiled(*path_inputs(), step)
    assert counter.frame_count <= 3


def test_k8_dynamic_shapes_compile():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(whole_path, fullgraph=True, backend=counter, dynamic=True)
    for batch in (3, 5, 7):  # sizes no other axis has: equal sizes share a symbol
        args = path_inputs(batch)
        torch.testing.assert_close(compiled(*args, 4), whole_path(*args, 4))
    assert counter.frame_count == 1


def test_k8_autocast_multiplies_in_16_bit_and_keeps_abar():
    args = inputs(B=4, H=32, W=32, D=64, keep=30, noise="eps", needed=7)
    args["abar"] = torch.full((4,), 0.9999, device=DEVICE)  # 1 in bfloat16: the noise would be gone
    with torch.autocast(DEVICE, torch.bfloat16):
        found = [embed_visible(**args, impl=i) for i in ("triton", "reference")]
    assert found[0].dtype == found[1].dtype == torch.bfloat16
    narrow = {**args, "weight": args["weight"].bfloat16(), "bias": args["bias"].bfloat16()}
    exact = embed_visible(**{k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
                             for k, v in narrow.items()})  # fmt: skip
    no_worse_than_eager(*found, exact)
    found[0].float().sum().backward()
    assert args["weight"].grad.dtype == torch.float32


def test_k9_nothing_waits_for_the_device():
    """Under fake tensors any .item() raises: neither the operations nor what launches them has one."""
    with FakeTensorMode(allow_non_fake_inputs=False):
        args = path_shapes("cpu")
        out = whole_path(*args, torch.empty((), dtype=torch.int64))
        grads = torch.autograd.grad(out, [t for t in args if t.requires_grad])
        assert [g.shape for g in grads] == [t.shape for t in args if t.requires_grad]
        with torch.no_grad():  # without CUDA in torch, autograd cannot even name the device
            out = whole_path(*path_shapes("cuda"), torch.empty((), dtype=torch.int64, device="cuda"))
        assert out.device.type == "cuda"


def test_k9_launching_waits_for_nothing():
    from phmdiff_fast.kernels import _embed_triton, _launch, _patch_mask_triton

    launched = []
    with _launch.observe(lambda kernel, *_: launched.append(kernel.__name__), dry=True), FakeTensorMode():
        ids, y, sources, coarse, abar, weight, bias, fill = path_shapes("cpu")
        scalar = torch.empty((), dtype=torch.int64)
        keep_ids, inverse = _patch_mask_triton.draw_mask(ids, 24, 9, 0, 0, scalar, scalar, 0, torch.empty(2, 24).bool())
        noise = (ids, scalar, scalar, 0, 0, 1, True)
        x = _embed_triton.embed(y, sources, coarse, abar, keep_ids, weight, bias, None, None, abar, *noise)
        grads = _embed_triton.embed_backward(x, y, sources, coarse, abar, keep_ids, weight, None, abar, *noise,
                                             True, True, True)  # fmt: skip
        out = _patch_mask_triton.restore_tokens(x, fill, inverse, None)
        _patch_mask_triton.restore_tokens_backward(out, inverse, 9, False, x.dtype, fill.dtype, True, True)
    assert [g.shape for g in grads] == [sources.shape, weight.shape, bias.shape]
    assert len(launched) >= 6


def path_shapes(device):
    B, H, W = 2, 16, 24
    shapes = [(B,), (B, 1, H, W), (B, 2, H, W), (B, 1, 8, 12), (B,), (40, 64), (40,), (40,)]
    trained = (2, 5, 6, 7)
    return [torch.empty(shape, device=device, dtype=torch.int64 if i == 0 else torch.float32,
                        requires_grad=i in trained) for i, shape in enumerate(shapes)]  # fmt: skip


def test_k10_wrong_devices_and_shapes_are_named_before_any_launch():
    args = inputs(needed=0)
    for name, value, match in (
        ("weight", args["weight"].to("meta"), "weight is on meta"),
        ("keep_ids", args["keep_ids"][:2], "keep_ids must be"),
        ("keep_ids", args["keep_ids"].float(), "keep_ids must be"),
        ("bias", args["bias"][:-1], "bias must be"),
        ("pos", args["pos"][:-1], "pos must be"),
        ("state_scale", args["state_scale"][:-1], "state_scale must be"),
        ("y", args["y"][0], "need y"),
    ):
        with pytest.raises(ValueError, match=match):
            embed_visible(**{**args, name: value}, impl="triton")
    with pytest.raises(ValueError, match="inverse"):
        restore_tokens(randn(2, 3, 4), randn(4), torch.zeros(1, 5, dtype=torch.int32, device=DEVICE), None)
    with pytest.raises(ValueError, match="drop_first is on meta"):
        draw_mask(ids_of(2), 4, 2, rng=(0, 0), drop_first=torch.zeros(2, 4, dtype=torch.bool, device="meta"))


@pytest.mark.skipif(DEVICE != "cpu", reason="the interpreter's order of programs")
def test_k11_the_order_of_programs_does_not_matter():
    def everything():
        args = path_inputs()
        args[0] = args[0].clone()
        out = whole_path(*args, 3)
        return [out, *torch.autograd.grad(out, [t for t in args if t.requires_grad])]

    forward = everything()
    with reversed_programs():
        backward = everything()
    for a, b in zip(forward, backward, strict=True):
        assert torch.equal(a, b)


def test_k2_empty_shapes_launch_nothing():
    for B, num, keep, D in itertools.product((0, 2), (0, 6), (0, 3), (0, 8)):
        if keep > num:
            continue
        inverse = mask_of(B, num, keep)[1]
        x, fill = randn(B, keep, D, grad=True), randn(D, grad=True)
        out = restore_tokens(x, fill, inverse, None, impl="triton")
        assert out.shape == (B, num, D)
        dx, dfill = torch.autograd.grad(out.sum(), (x, fill))
        assert torch.equal(dx, torch.ones_like(x))
        assert torch.equal(dfill, torch.full_like(fill, B * (num - keep)))
