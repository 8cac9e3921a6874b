"""Short attention in Triton against float64: values, gradients, layouts, types and ways to call it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_tools import DEVICE, guarded_buffers, in_margins, needs_triton, no_worse_than_eager, reversed_programs
from torch._subclasses import FakeTensorMode

from phmdiff_fast.kernels import _impl, _launch
from phmdiff_fast.kernels.short_attention import short_attention, why_not_short

pytestmark = needs_triton

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
TYPES = {"fp32": F32, "bf16": BF16, "fp16": F16}


def inputs(tokens, heads, dim, *, dtype=F32, seed=0, batch=None):
    """(qkv, incoming gradient): (B, N, ...), or (T, ...) without batch; qkv lies between margins of NaN."""
    g = torch.Generator().manual_seed(seed)
    rows = (tokens,) if batch is None else (batch, tokens)
    made = [torch.randn(*rows, n * heads * dim, generator=g).to(dtype).to(DEVICE) for n in (3, 1)]
    return in_margins(made[0] * 1.3), in_margins(made[1])


def offsets(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=DEVICE)


def run(qkv, weight, heads, *, impl="triton", **packed):
    """(result, gradient of qkv)"""
    leaf = qkv.detach().requires_grad_()
    out = short_attention(leaf, heads, impl=impl, **packed)
    return out.detach(), torch.autograd.grad(out, leaf, weight.to(out.dtype))[0]


def plain(qkv, weight, heads, lengths=None):
    """The same in eager PyTorch of qkv's type throughout, a sequence at a time."""
    leaf = qkv.detach().requires_grad_()
    out = []
    for x in leaf if lengths is None else leaf.split(lengths):
        q, k, v = x.unflatten(-1, (3, heads, -1)).permute(1, 2, 0, 3)
        weights = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1)
        out.append((weights @ v).transpose(0, 1).flatten(1))
    out = torch.stack(out) if lengths is None else torch.cat(out)
    return out.detach(), torch.autograd.grad(out, leaf, weight.to(out.dtype))[0]


def compare(qkv, weight, heads, lengths=None, longest=None):
    packed = {} if lengths is None else {"cu_tokens": offsets(lengths), "longest": longest or max(lengths)}
    with guarded_buffers():
        got = run(qkv, weight, heads, **packed)
    eager = plain(qkv, weight, heads, lengths)
    exact = plain(qkv.double(), weight, heads, lengths)
    for name, a, b, c in zip(("result", "gradient"), got, eager, exact, strict=True):
        assert a.is_contiguous()
        no_worse_than_eager(a, b, c, small=True, name=name)
    return got


def same(a, b):
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# --- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("types", ["fp32", "bf16"])
@pytest.mark.parametrize("tokens", [1, 3, 12, 16, 17, 33, 64, 100, 128])
def test_lengths(tokens, types):
    compare(*inputs(tokens, 2, 24, dtype=TYPES[types], batch=2), 2)


@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("dim", [16, 24, 32, 48, 64, 72, 128])
def test_widths(dim, types):
    for tokens in (5, 20):
        compare(*inputs(tokens, 2, dim, dtype=TYPES[types], batch=1), 2)


@pytest.mark.parametrize(("tokens", "dim"), [(64, 64), (64, 72), (128, 72)])
@pytest.mark.parametrize("types", ["bf16", "fp16"])
def test_the_largest_tiles(tokens, dim, types):
    compare(*inputs(tokens, 1, dim, dtype=TYPES[types], batch=1), 1)


@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize(
    "lengths",
    [[12], [5, 0, 0, 16, 1, 9, 3], [32, 17, 2, 0, 30], [64] * 2 + [16] * 2 + [4] * 2, [1, 100, 0, 37]],
    ids=lambda n: f"{len(n)} sequences up to {max(n)}",
)
def test_packs(lengths, types):
    compare(*inputs(sum(lengths), 2, 16, dtype=TYPES[types]), 2, lengths)


def test_packs_in_wider_tiles_than_they_need():
    lengths = [3, 12, 5]
    for longest in (13, 20, 64):
        compare(*inputs(sum(lengths), 1, 32, dtype=BF16), 1, lengths, longest)


@pytest.mark.parametrize("tokens", [12, 40])
def test_bits_depend_on_nothing_but_the_sequence(tokens):
    """Dense, packed, alone, among others and in another order."""
    qkv, weight = inputs(tokens, 2, 24, dtype=BF16, batch=5)
    whole = run(qkv, weight, 2)
    for i in (0, 3):
        same(run(qkv[i : i + 1], weight[i : i + 1], 2), [t[i : i + 1] for t in whole])
    packed = run(qkv.flatten(0, 1), weight.flatten(0, 1), 2, cu_tokens=offsets([tokens] * 5), longest=tokens)
    same(packed, [t.flatten(0, 1) for t in whole])
    mixed = [torch.cat([t[4], t[0, :3], t[2], t[1, :7]]) for t in (qkv, weight)]
    got = run(*mixed, 2, cu_tokens=offsets([tokens, 3, tokens, 7]), longest=tokens)
    same([t[:tokens] for t in got], [t[4] for t in whole])
    same([t[tokens + 3 : 2 * tokens + 3] for t in got], [t[2] for t in whole])


@pytest.mark.parametrize("scale", [1e-6, 30.0, 3e4])
def test_extreme_scores(scale):
    """All alike, and one that takes all: 3e4 squared is far past where an exponential overflows."""
    qkv, weight = inputs(20, 2, 16, batch=1)
    qkv[..., :64] *= scale
    out, grad = run(qkv, weight, 2)
    exact = plain(qkv.double(), weight, 2)
    assert torch.isfinite(grad).all()
    eager = plain(qkv, weight, 2)
    no_worse_than_eager(out, eager[0], exact[0], small=True)
    no_worse_than_eager(grad, eager[1], exact[1], small=True)


@pytest.mark.filterwarnings("ignore:invalid value")  # NumPy's, in the interpreter
@pytest.mark.parametrize("lengths", [[5, 12, 3, 9], [40, 20, 7]], ids=["one program", "a program each"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("column", [0, 32, 64], ids=["q", "k", "v"])
def test_nan_and_infinity_stay_in_their_sequence_and_head(lengths, bad, column):
    qkv, weight = inputs(sum(lengths), 2, 16)
    packed = {"cu_tokens": offsets(lengths), "longest": max(lengths)}
    clean = run(qkv, weight, 2, **packed)
    begin, end = lengths[0], lengths[0] + lengths[1]
    spoilt = qkv.clone()
    spoilt[end - 1, column] = bad
    got = run(spoilt, weight, 2, **packed)
    heads = [t.unflatten(1, (-1, 2, 16)) for t in (*got, *clean)]
    for a, b in zip(heads[:2], heads[2:], strict=True):
        assert not a[begin:end, :, 0].isfinite().all()
        assert torch.equal(a[begin:end, :, 1], b[begin:end, :, 1])
        assert torch.equal(a[:begin], b[:begin])
        assert torch.equal(a[end:], b[end:])


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("tokens", [5, 20, 40], ids=["sixteen rows", "thirty-two rows", "sixty-four rows"])
def test_infinities_meet_no_padding(tokens):
    """A key of -inf that every query turns away has weight 0, and so do its slopes, padding or not."""
    qkv, weight = inputs(tokens, 1, 16, batch=1)
    qkv[..., 0] = qkv[..., 0].abs() + 0.1
    qkv[0, 2, 16] = float("-inf")
    got, exact = run(qkv, weight, 1)[0], plain(qkv.double(), weight, 1)[0]
    assert torch.isfinite(exact).all()
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)
    dv = [t[..., 32:] for t in (run(qkv, weight, 1)[1], plain(qkv.double(), weight, 1)[1])]
    torch.testing.assert_close(dv[0].double(), dv[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("longest", [4, 10, 20, 40])
def test_a_sequence_longer_than_promised_is_nan(longest, monkeypatch):
    """Also one that runs past its tile; the others have their values. Buffers start as 0: each NaN is written."""
    lengths = [longest, 70, 3, 41]
    qkv, weight = inputs(sum(lengths), 1, 16)
    monkeypatch.setattr(_launch, "empty", lambda shape, dtype, device: torch.zeros(shape, dtype=dtype, device=device))
    got = run(qkv, weight, 1, cu_tokens=offsets(lengths), longest=longest)
    expected = plain(qkv, weight, 1, lengths)
    parts = [[t.split(lengths) for t in pair] for pair in (got, expected)]
    for mine, right in zip(*parts, strict=True):
        for i, n in enumerate(lengths):
            if n > longest:
                assert mine[i].isnan().all()
            else:
                torch.testing.assert_close(mine[i], right[i], rtol=1e-4, atol=1e-5)


# --- rows of the fault matrix ------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 4, 48), (2, 0, 48)], ids=str)
def test_k2_empty(shape):
    launches = []
    qkv = torch.zeros(shape, device=DEVICE)
    with _launch.observe(lambda *launch: launches.append(launch)):
        out, grad = run(qkv, torch.zeros(*shape[:2], 16, device=DEVICE), 1)
    assert (out.shape, grad.shape, launches) == ((*shape[:2], 16), shape, [])


@pytest.mark.parametrize("lengths", [[], [0, 0]], ids=str)
def test_k2_empty_packs(lengths):
    qkv = torch.zeros(0, 96, device=DEVICE)
    out, grad = run(qkv, qkv[:, :32], 2, cu_tokens=offsets(lengths), longest=0)
    assert (out.shape, grad.shape) == ((0, 32), (0, 96))


LAYOUTS = {
    "transposed": lambda v: v.transpose(0, 1).contiguous().transpose(0, 1),
    "columns apart": lambda v: torch.stack([v, v.flip(-1)], -1)[..., 0],
    "columns outermost": lambda v: v.movedim(-1, 0).contiguous().movedim(0, -1),
    "window": lambda v: torch.cat([v * float("nan"), v], -1)[..., v.shape[-1] :],
    "misaligned": lambda v: torch.cat([v.flatten()[:1], v.flatten()])[1:].view(v.shape),
    "expanded": lambda v: v[:1].expand(v.shape),
    "rows expanded": lambda v: v[:, :1].expand(v.shape),
    "all expanded": lambda v: v.flatten()[0].expand(v.shape),
    "reversed": lambda v: v.flip(0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_k3_strides(layout):
    qkv, weight = inputs(7, 2, 24, batch=3)
    laid = [LAYOUTS[layout](t) for t in (qkv, weight)]
    close = [t.clone(memory_format=torch.contiguous_format) for t in laid]
    expected = run(*close, 2)
    same(run(*laid, 2), expected)
    flat = [LAYOUTS[layout](t.flatten(0, 1)) for t in (qkv, weight)] if "rows" not in layout else None
    if flat is not None:
        packed = {"cu_tokens": offsets([7, 7, 7]), "longest": 7}
        same(run(*flat, 2, **packed), run(*[t.clone(memory_format=torch.contiguous_format) for t in flat], 2, **packed))


def test_k3_a_view_is_read_without_a_copy():
    qkv, _ = inputs(5, 2, 16, batch=2)
    wide = torch.cat([qkv, qkv], -1)[..., 96:]
    seen = []
    with _launch.observe(lambda _kernel, _grid, args, _meta: seen.extend(args)):
        short_attention(wide, 2, impl="triton")
    assert wide.data_ptr() in {a.data_ptr() for a in seen if isinstance(a, torch.Tensor)}


def test_k4_what_the_kernels_do_not_compute(monkeypatch):
    qkv, _ = inputs(5, 2, 16, batch=2)
    with pytest.raises(_impl.BackendError, match="float64"):
        short_attention(qkv.double(), 2, impl="triton")
    with pytest.raises(_impl.BackendError, match="8 values"):
        short_attention(qkv, 4, impl="triton")
    long = torch.zeros(1, 129, 48, device=DEVICE, dtype=BF16)
    with pytest.raises(_impl.BackendError, match="129 tokens"):
        short_attention(long, 1, impl="triton")
    with pytest.raises(_impl.BackendError, match="129 tokens"):
        short_attention(long[0], 1, cu_tokens=offsets([129]), longest=129, impl="triton")
    assert why_not_short(DEVICE, F32, 16, 128) == ""
    monkeypatch.setattr("phmdiff_fast.kernels.short_attention.short_attention_reference", lambda *a, **k: "eager")
    # On a GPU the eager path runs, with a warning.
    with FakeTensorMode(), pytest.warns(UserWarning, match="129 tokens"):
        assert short_attention(torch.empty(1, 129, 48, device="cuda"), 1) == "eager"


@pytest.mark.skipif(DEVICE != "cpu", reason="untouched memory is free on a CPU only; see the GPU's own")
@pytest.mark.parametrize("strides", [(1 << 30, 48), (48, 1 << 30)], ids=["sequences apart", "rows apart"])
@pytest.mark.parametrize("dim", [16, 64], ids=["several tiles", "one tile"])
def test_k5_offsets_beyond_32_bits(strides, dim):
    qkv, weight = inputs(3, 1, 16, dtype=F16, batch=3)
    far = torch.empty((1 << 31) + 256, dtype=F16).as_strided((3, 3, 48), (*strides, 1))
    far.copy_(qkv)
    near = run(qkv, weight, 1)
    same(run(far, weight, 1), near)
    far[..., :16].copy_(weight)
    same(run(qkv, far[..., :16], 1), near)
    rows = far.as_strided((3, 48), (1 << 30, 1))
    rows.copy_(qkv[0])
    packed = {"cu_tokens": offsets([3]), "longest": 3 if dim == 16 else 64}
    same(run(rows, weight[0], 1, **packed), run(qkv[0].contiguous(), weight[0], 1, **packed))


def test_k6_nothing_is_recorded_or_kept_beyond_qkv():
    qkv, _ = inputs(5, 2, 16, batch=2)
    assert not short_attention(qkv, 2, impl="triton").requires_grad
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        leaf = qkv.detach().requires_grad_()
        short_attention(leaf, 2, impl="triton")
    assert {t.data_ptr() for t in kept} == {leaf.data_ptr()}


def test_k7_double_backward_raises():
    qkv = inputs(5, 1, 16, batch=1)[0].detach().requires_grad_()
    (grad,) = torch.autograd.grad(short_attention(qkv, 1, impl="triton").square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.sum(), qkv)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_k8_opcheck(packed):
    qkv, weight = inputs(7, 2, 16, batch=None if packed else 2)
    cu = offsets([4, 0, 3]) if packed else None
    ops = torch.ops.phmdiff_fast
    torch.library.opcheck(ops.short_attention.default, (qkv.detach().requires_grad_(), 2, cu, 7))
    torch.library.opcheck(ops.short_attention_backward.default, (weight, qkv, 2, cu, 7))


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_k8_compile(packed):
    cases = [inputs(7, 2, 16, batch=None if packed else 2), inputs(9, 2, 16, batch=None if packed else 3, seed=1)]
    cus = [offsets([4, 0, 3]), offsets([9, 0, 0])] if packed else [None, None]

    def call(qkv, cu):
        return short_attention(qkv * 2, 2, cu_tokens=cu, longest=9 if packed else None, impl="triton") * 0.5

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for (qkv, weight), cu in zip(cases, cus, strict=True):
        got = []
        for f in (call, compiled):
            leaf = qkv.detach().requires_grad_()
            out = f(leaf, cu)
            got.append((out, torch.autograd.grad(out, leaf, weight)[0]))
        same(*got)


def test_k8_autocast_changes_nothing():
    qkv, weight = inputs(7, 2, 16, batch=2)
    expected = run(qkv, weight, 2)
    with torch.autocast(DEVICE, BF16):
        same(run(qkv, weight, 2), expected)


@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_k9_no_value_is_read_on_the_host(packed, impl):
    """Fake tensors have no values: .item() or a data-dependent shape would raise."""
    device = "cpu" if impl else "cuda"  # without a GPU, PyTorch cannot index a fake tensor of one
    with FakeTensorMode(), torch.no_grad():
        qkv = torch.empty((14, 96) if packed else (2, 7, 96), device=device, dtype=BF16)
        cu = torch.empty(3, device=device, dtype=torch.int32) if packed else None
        out = short_attention(qkv, 2, cu_tokens=cu, longest=9 if packed else None, impl=impl)
        assert (out.shape, out.dtype, out.device.type) == ((*qkv.shape[:-1], 32), BF16, device)
        grad = torch.ops.phmdiff_fast.short_attention_backward(out, qkv, 2, cu, 9)
        assert (grad.shape, grad.dtype) == (qkv.shape, BF16)


@pytest.mark.skipif(DEVICE != "cpu", reason="only the interpreter's order can be chosen")
def test_k11_order_of_programs():
    for lengths in ([5, 0, 12, 1, 9, 16, 2], [40, 12, 0, 64]):
        qkv, weight = inputs(sum(lengths), 2, 16)
        packed = {"cu_tokens": offsets(lengths), "longest": max(lengths)}
        forwards = run(qkv, weight, 2, **packed)
        with reversed_programs():
            same(run(qkv, weight, 2, **packed), forwards)


@pytest.mark.parametrize("longest", [9, 40])
def test_k11_broken_offsets_stay_inside(longest):
    qkv, weight = inputs(9, 1, 16)
    with guarded_buffers():
        for broken in ([0, 3, 500], [-4, 3, 9], [0, 700, 9], [5, 2, 9]):
            run(qkv, weight, 1, cu_tokens=torch.tensor(broken, dtype=torch.int32, device=DEVICE), longest=longest)


# --- all of it together ------------------------------------------------------------------------


@st.composite
def calls(draw):
    edge = st.sampled_from([1, 2, 3, 12, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128])
    dtype = TYPES[draw(st.sampled_from(sorted(TYPES)))]
    dim = draw(st.sampled_from([16, 20, 24, 32, 40, 48, 64, 72, 96, 128]))
    heads = draw(st.integers(1, 3))
    most = next(n for n in (128, 64, 32) if not why_not_short(DEVICE, dtype, dim, n))
    if draw(st.booleans()):
        lengths = draw(
            st.lists(st.one_of(edge.filter(lambda n: n <= most), st.integers(0, 20)), min_size=1, max_size=5)
        )
        lengths = lengths if any(lengths) else [1]
        return inputs(sum(lengths), heads, dim, dtype=dtype), heads, lengths
    tokens = draw(edge.filter(lambda n: n <= most))
    return inputs(tokens, heads, dim, dtype=dtype, batch=draw(st.integers(1, 5 if tokens < 40 else 1))), heads, None


@settings(max_examples=6, derandomize=True, deadline=None)
@given(calls())
def test_any_call(call):
    (qkv, weight), heads, lengths = call
    compare(qkv, weight, heads, lengths)


# --- launches ----------------------------------------------------------------------------------


def test_short_sequences_share_a_program_and_one_launch_goes_each_way():
    launches = []
    for tokens, programs in ((16, 2 * 3), (32, 2 * 3), (33, 5 * 3), (128, 5 * 3)):
        qkv, weight = inputs(tokens, 3, 64, dtype=BF16, batch=5)
        with _launch.observe(lambda kernel, grid, args, meta: launches.append((kernel.__name__, grid))):
            run(qkv, weight, 3)
        assert launches == [("short_attention_forward", (programs,)), ("short_attention_backward", (programs,))]
        launches.clear()


@pytest.mark.gpu
@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize(("tokens", "dim"), [(12, 64), (16, 72), (32, 64), (32, 128), (64, 64), (64, 32), (128, 32)])
def test_gpu_bits_are_the_same_every_run(tokens, dim, types):
    qkv, weight = inputs(tokens, 6, dim, dtype=TYPES[types], batch=333)
    if why_not_short("cuda", TYPES[types], dim, tokens):
        pytest.skip("past the limit of float32")
    first = compare(qkv, weight, 6)
    for _ in range(20):
        same(run(qkv, weight, 6), first)


@pytest.mark.gpu
def test_gpu_more_elements_than_32_bits_count():
    qkv = torch.empty(1 << 15, 64, 1152, device="cuda", dtype=BF16).normal_()  # 2.4e9 elements
    last = run(qkv[-8:], qkv[-8:, :, :384], 6)
    same([t[-8:] for t in run(qkv, qkv[..., :384], 6)], last)


@pytest.mark.gpu
def test_gpu_nothing_synchronizes_and_a_graph_replays():
    lengths = [64] * 3 + [16] * 3 + [12] * 3
    qkv, weight = inputs(sum(lengths), 6, 64, dtype=BF16)
    cu = offsets(lengths)

    def both():
        out = short_attention(qkv, 6, cu_tokens=cu, longest=64)
        return out, torch.ops.phmdiff_fast.short_attention_backward(weight, qkv, 6, cu, 64)

    expected = [t.clone() for t in both()]
    torch.cuda.set_sync_debug_mode("error")
    try:
        both()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    for t in captured:
        t.fill_(7)
    graph.replay()
    same(captured, expected)
