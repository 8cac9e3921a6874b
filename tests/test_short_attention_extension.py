"""Short attention in the C++ extension against float64: values, gradients, bits, how it is called."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
import warnings
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_tools import in_margins, no_worse_than_eager

from phmdiff_fast.kernels import _extension
from phmdiff_fast.kernels import short_attention as module
from phmdiff_fast.kernels._impl import BackendError
from phmdiff_fast.kernels.short_attention import MOST_TOKENS_CPU, short_attention, why_not_extension

pytestmark = pytest.mark.skipif(bool(_extension.problem()), reason=_extension.problem() or "the extension is there")

OPS = torch.ops.phmdiff_fast
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
every_type = pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
ISAS = ("generic", "avx2")
PACKS = [[5, 0, 1, 70], [0, 4, 0], [64, 65, 0, 17], [3], [1, 1, 1], [130, 2]]


def batch(lengths, heads, dim, dtype, *, packed=False, seed=0):
    """(qkv, gradient of the result, arguments of a pack); both lie between margins of NaN."""
    g = torch.Generator().manual_seed(seed)
    rows = (sum(lengths),) if packed else (len(lengths), lengths[0])
    qkv, dout = (in_margins((torch.randn(*rows, n * heads * dim, generator=g) * 1.3).to(dtype)) for n in (3, 1))
    cu = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return qkv, dout, {"cu_tokens": cu, "longest": max(lengths, default=0)} if packed else {}


def run(qkv, dout, heads, impl="extension", **packed):
    """(result, gradient of qkv)"""
    leaf = qkv.detach().requires_grad_()
    out = short_attention(leaf, heads, impl=impl, **packed)
    return out.detach(), torch.autograd.grad(out, leaf, dout)[0]


def plain(qkv, dout, heads, cu_tokens=None, longest=None):
    """The same in eager PyTorch of qkv's type throughout, a sequence at a time."""
    leaf = qkv.detach().requires_grad_()
    out = []
    for x in leaf if cu_tokens is None else leaf.split((cu_tokens[1:] - cu_tokens[:-1]).tolist()):
        q, k, v = x.unflatten(-1, (3, heads, -1)).permute(1, 2, 0, 3)
        weights = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1)
        out.append((weights @ v).transpose(0, 1).flatten(1))
    out = torch.stack(out) if cu_tokens is None else torch.cat(out)
    return out.detach(), torch.autograd.grad(out, leaf, dout)[0]


def same(a, b):
    assert len(a) == len(b)
    for p, q in zip(a, b, strict=True):
        assert p.dtype == q.dtype
        assert torch.equal(p, q)


def compare(qkv, dout, packed, heads, small=True, name=""):
    got, eager = run(qkv, dout, heads, **packed), plain(qkv, dout, heads, **packed)
    exact = plain(qkv.double(), dout.double(), heads, **packed)
    for what, a, b, c in zip(("result", "gradient"), got, eager, exact, strict=True):
        assert a.is_contiguous()
        no_worse_than_eager(a, b, c, small=small, name=f"{name} {what}")


# --- values ------------------------------------------------------------------------------------


@every_type
def test_results_and_gradients(dtype):
    for tokens in (1, 2, 3, 4, 5, 12, 15, 16, 17, 20, 31, 33, 48, 49, 64, 65, 127, 256):
        compare(*batch([tokens] * 2, 2, 24, dtype), 2, name=f"{tokens} x 24")
    for dim in (1, 2, 5, 15, 16, 17, 32, 33, 48, 63, 64, 72, 80, 97, 128):
        for tokens, heads in ((3, 3), (21, 2), (21, 3)):  # an odd number of values, rows of an even one and an odd one
            compare(*batch([tokens] * 2, heads, dim, dtype), heads, name=f"{tokens} x {dim}")
    for lengths in PACKS:
        compare(*batch(lengths, 2, 16, dtype, packed=True), 2, name=f"{lengths} x 16")
    for lengths, heads, dim in (([64] * 8, 6, 64), ([128] * 3, 3, 32), ([32] * 9, 2, 72)):
        compare(*batch(lengths, heads, dim, dtype), heads, small=False, name=f"{lengths} x {dim}")


@given(
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=4), heads=st.integers(1, 3), dim=st.integers(4, 80),
    packed=st.booleans(), dtype=st.sampled_from([F32, BF16]), more=st.integers(0, 30),
)  # fmt: skip
@settings(max_examples=30, derandomize=True, deadline=None)
def test_any_size(lengths, heads, dim, packed, dtype, more):
    lengths = lengths if packed else lengths[:1] * len(lengths)
    if not sum(lengths):
        return
    qkv, dout, extra = batch(lengths, heads, dim, dtype, packed=packed)
    if packed:
        extra["longest"] += more
    compare(qkv, dout, extra, heads)


@every_type
def test_large_scores_do_not_overflow(dtype):
    """One weight is 1, or two are 1/2, and all others are nothing."""
    for tokens in (100, 33):
        qkv, dout, _ = batch([tokens], 1, 16, dtype)
        qkv[..., :32] *= 100
        assert run(qkv, dout, 1)[0].isfinite().all()
        compare(qkv, dout, {}, 1)
    qkv[:, :, :16], qkv[:, :, 16:32], qkv[0, [4, 20], 16:32] = 30, -30, 30
    out, dqkv = run(qkv, dout, 1)
    expected = qkv[0, [4, 20], 32:].double().mean(0).to(dtype).expand(33, 16)
    torch.testing.assert_close(out[0], expected, rtol=torch.finfo(dtype).eps, atol=0)
    assert not dqkv[0, :4, 16:].any()


@every_type
@pytest.mark.parametrize("tokens", [5, 20, 32, 90])
def test_backward_multiplies_what_forward_does(dtype, tokens):
    """Where one side of a product is the unit matrix, the other shows: as it was rounded, and the same both ways."""
    q, k, v, dout = (torch.randn(tokens, tokens, generator=torch.Generator().manual_seed(n)) for n in range(4))
    one, off = torch.eye(tokens), torch.finfo(dtype).eps / 2
    weights, dqkv = run(torch.cat([q, k, one], 1)[None].to(dtype), one[None].to(dtype), 1)
    assert torch.equal(dqkv[0, :, 2 * tokens :], weights[0].T)  # dV = P^T
    exact = (q.to(dtype).double() @ k.to(dtype).double().T * tokens**-0.5).softmax(-1)
    assert ((weights[0].double() - exact).abs() <= exact * (off + 2**-18)).all()
    dqkv = run(torch.cat([one, one, v], 1)[None].to(dtype), dout[None].to(dtype), 1)[1]
    assert torch.equal(dqkv[0, :, :tokens], dqkv[0, :, tokens : 2 * tokens].T)  # dQ = dS, dK = dS^T


@every_type
def test_nan_and_infinity_stay_in_their_sequence(dtype):
    lengths = [7, 18, 3]
    qkv, dout, packed = batch(lengths, 2, 24, dtype, packed=True)
    clean = run(qkv, dout, 2, **packed)
    for row in (0, 6, 7, 20, 24, 25, 27):
        own = next(n for n, end in enumerate(accumulate(lengths)) if row < end)
        others = torch.ones(28, dtype=torch.bool)
        others[sum(lengths[:own]) : sum(lengths[: own + 1])] = False
        for bad in (math.nan, math.inf, -math.inf):
            for column in (0, 48, 96):
                spoilt = qkv.clone()
                spoilt[row, column] = bad
                got = run(spoilt, dout, 2, **packed)
                same([t[others] for t in got], [t[others] for t in clean])
                assert torch.equal(got[0][:, 24:], clean[0][:, 24:])  # the other head
                exact = plain(spoilt.double(), dout.double(), 2, **packed)
                assert torch.equal(got[0].isfinite(), exact[0].isfinite())
                assert torch.equal(got[1].isfinite(), exact[1].isfinite())


@every_type
def test_a_sequence_longer_than_promised_is_nan(dtype):
    qkv, dout, packed = batch([3, 5, 2], 2, 8, dtype, packed=True)
    clean = run(qkv, dout, 2, **packed)
    for part, whole in zip(run(qkv, dout, 2, cu_tokens=packed["cu_tokens"], longest=4), clean, strict=True):
        assert part[3:8].isnan().all()
        same([part[:3], part[8:]], [whole[:3], whole[8:]])


# --- bits --------------------------------------------------------------------------------------


def part_of(v, *pad):
    """The same values inside a larger tensor that is NaN elsewhere."""
    whole = v.new_full([s + p for s, p in zip(v.shape, pad, strict=True)], math.nan)
    return whole[tuple(slice(p // 2, p // 2 + s) for s, p in zip(v.shape, pad, strict=True))].copy_(v)


LAYOUTS = {
    "transposed": lambda v: v.mT.contiguous().mT,
    "columns of a larger one": lambda v: part_of(v, *[0] * (v.dim() - 1), 10),
    "odd rows": lambda v: part_of(v, *[0] * (v.dim() - 1), 7),
    "rows of a larger one": lambda v: part_of(v, *[0] * (v.dim() - 2), 4, 0),
    "first dimension behind": lambda v: v.transpose(0, 1).contiguous().transpose(0, 1),
    "every second column": lambda v: torch.stack([v, v * math.nan], -1).flatten(-2)[..., ::2],
    "expanded": lambda v: v[:1].expand(v.shape),
    "at an odd offset": lambda v: torch.cat([v.new_full((3,), math.nan), v.flatten()])[3:].view(v.shape),
}


@every_type
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_gives_the_same_bits_as_dense_memory(layout, dtype):
    for packed in (False, True):
        qkv, dout, extra = batch([5, 33] if packed else [20, 20], 2, 18, dtype, packed=packed)
        laid = [LAYOUTS[layout](t) for t in (qkv, dout)]
        dense = [t.clone(memory_format=torch.contiguous_format) for t in laid]
        before = [t.clone() for t in laid]
        same(run(*laid, 2, **extra), run(*dense, 2, **extra))
        same(laid, before)  # inputs are not written


@every_type
@pytest.mark.parametrize("tokens", [13, 40, 70])
def test_no_bit_depends_on_neighbours_or_packing(dtype, tokens):
    """A sequence alone, in any batch or order, or packed between others of any length; with other heads or without."""
    qkv, dout, _ = batch([tokens] * 4, 2, 24, dtype)
    whole = run(qkv, dout, 2)
    order = [2, 0, 3, 1]
    same(run(qkv[order], dout[order], 2), [t[order] for t in whole])
    for n in range(4):
        same(run(qkv[n : n + 1], dout[n : n + 1], 2), [t[n : n + 1] for t in whole])
    extra, extra_dout, _ = batch([100], 2, 24, dtype, seed=3)
    rows = [torch.cat([e[0], t.flatten(0, 1)]) for e, t in ((extra, qkv), (extra_dout, dout))]
    ends = torch.tensor([0, 93, 93, 100, *[100 + tokens * n for n in range(1, 5)]])
    for cu in (ends.int(), ends, torch.stack([ends, ends + 1], 1)[:, 0]):
        got = run(*rows, 2, cu_tokens=cu, longest=93)
        same([t[100:].view_as(w) for t, w in zip(got, whole, strict=True)], whole)
    first = qkv.unflatten(-1, (3, 2, 24))[..., 0, :].flatten(-2)
    same(run(first, dout[..., :24], 1), [whole[0][..., :24], whole[1].unflatten(-1, (3, 2, 24))[..., 0, :].flatten(-2)])


def digests():
    """A hash a type, of results and gradients: not to depend on threads or processor."""
    found = {}
    for dtype in (F32, BF16):
        digest = hashlib.sha256()
        for lengths, heads, dim, packed in (([64] * 6, 3, 64, False), ([5, 0, 100, 33], 2, 17, True),
                                            ([16] * 9, 4, 32, False), ([31], 1, 7, False)):  # fmt: skip
            qkv, dout, extra = batch(lengths, heads, dim, dtype, packed=packed)
            for t in run(qkv, dout, heads, **extra):
                digest.update(t.contiguous().view(torch.uint8).numpy().tobytes())
        found[str(dtype)] = digest.hexdigest()[:16]
    return found


@pytest.fixture(scope="module")
def these_digests():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield digests()
    finally:
        torch.set_num_threads(threads)


def test_the_number_of_threads_changes_no_bit(these_digests):
    before = torch.get_num_threads()
    torch.set_num_threads(5)
    try:
        assert digests() == these_digests
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def elsewhere():
    """{instruction set: the process that finds digests in it}"""
    code = (
        "import torch, json, test_short_attention_extension as t; torch.set_num_threads(1);"
        "print(json.dumps([t._extension.status()[1]['cpu'], t.digests()]))"
    )
    here = Path(__file__).resolve().parent
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), *sys.path])}
    env |= {"MALLOC_PERTURB_": "128", "MALLOC_MMAP_THRESHOLD_": str(2**30)}  # scratch memory holds no zeros
    command, pipe = [sys.executable, "-W", "ignore", "-c", code], subprocess.PIPE
    processes = {
        isa: subprocess.Popen(command, env=env | {"PHMDIFF_ISA": isa}, stdout=pipe, stderr=pipe, text=True, cwd=here)
        for isa in ISAS
    }
    yield processes
    for process in processes.values():
        process.kill()
        process.communicate()


@pytest.mark.parametrize("isa", ISAS)
def test_the_instruction_set_changes_no_bit(isa, elsewhere, these_digests):
    said, wrong = elsewhere[isa].communicate(timeout=120)
    assert elsewhere[isa].returncode == 0, wrong[-2000:]
    ran_on, found = json.loads(said.strip().splitlines()[-1])
    if ran_on != isa:
        pytest.skip(f"this processor or build has no {isa}")
    assert found == these_digests


# --- how it is called ----------------------------------------------------------------------------


@every_type
def test_nothing_in_nothing_out(dtype):
    for shape in ((0, 4, 24), (2, 0, 24), (0, 0, 24)):
        out, dqkv = run(torch.zeros(shape, dtype=dtype), torch.zeros(*shape[:2], 8, dtype=dtype), 2)
        assert (out.shape, dqkv.shape) == ((*shape[:2], 8), shape)
    for lengths in ([], [0, 0]):
        qkv, dout, packed = batch(lengths, 2, 4, dtype, packed=True)
        out, dqkv = run(qkv, dout, 2, **packed)
        assert (out.shape, dqkv.shape) == ((0, 8), (0, 24))


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@every_type
def test_opcheck(dtype, packed):
    qkv, dout, extra = batch([5, 3] if packed else [5, 5], 2, 8, dtype, packed=packed)
    qkv, dout = qkv.clone().requires_grad_(), dout.clone()
    cu = extra.get("cu_tokens")
    torch.library.opcheck(OPS.short_attention_cpu.default, (qkv, 2, cu, 5))
    torch.library.opcheck(OPS.short_attention_backward_cpu.default, (dout, qkv.detach(), 2, cu, 5))


def test_compiled_in_one_graph_for_any_size():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def twice(x, w):
        return short_attention(x @ w, 2) + short_attention(x @ w, 3)

    compiled = torch.compile(twice, fullgraph=True, dynamic=True, backend=counter)
    weight, traced = torch.randn(24, 72), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for samples, tokens in ((2, 5), (3, 70), (4, 66)):
            x = torch.randn(samples, tokens, 24).requires_grad_()
            out, eager = compiled(x, weight), twice(x, weight)
            assert torch.equal(out, eager)
            same(torch.autograd.grad(out.square().sum(), x), torch.autograd.grad(eager.square().sum(), x))
            traced.append(counter.frame_count)
    assert traced == traced[:1] * 3
    torch._dynamo.reset()


@every_type
def test_fake_tensors_have_the_shapes_of_real_ones(dtype):
    from torch._subclasses import FakeTensorMode

    for packed in (False, True):
        qkv, _, extra = batch([5, 5], 2, 8, dtype, packed=packed)
        real = short_attention(qkv, 2, **extra)
        with FakeTensorMode() as mode:
            given_ = {n: mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for n, t in extra.items()}
            fake = short_attention(mode.from_tensor(qkv), 2, **given_)
        assert (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride())


def test_a_second_derivative_raises():
    qkv = batch([4], 2, 8, F32)[0].detach().requires_grad_()
    first = torch.autograd.grad(short_attention(qkv, 2, impl="extension").square().sum(), qkv, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(first.sum(), qkv)


def test_the_extension_is_what_runs_unless_told_otherwise(monkeypatch):
    def never(*args, **named):
        raise AssertionError("the reference ran")

    monkeypatch.setattr(module, "short_attention_reference", never)
    for dtype in (F32, BF16):
        for packed in (False, True):
            qkv, dout, extra = batch([4, 4], 2, 8, dtype, packed=packed)
            expected = run(qkv, dout, 2, **extra)
            same(run(qkv, dout, 2, None, **extra), expected)
            with torch.autocast("cpu", BF16):
                same(run(qkv, dout, 2, None, **extra), expected)
            with pytest.raises(AssertionError, match="the reference ran"):
                run(qkv, dout, 2, "reference", **extra)
    for tokens, dim, dtype in ((4, 8, F64), (4, 8, F16), (MOST_TOKENS_CPU + 1, 8, F32), (4, 136, BF16)):
        with pytest.raises(AssertionError, match="the reference ran"):
            run(*batch([tokens], 2, dim, dtype)[:2], 2, None)


def test_what_it_does_not_do_is_refused_where_it_is_forced():
    most = MOST_TOKENS_CPU
    for tokens, dim, dtype, why in (
        (4, 8, F64, "qkv is float64"), (4, 8, F16, "qkv is float16"), (4, 136, F32, "136 values"),
        (most + 1, 8, F32, f"up to {most + 1} tokens"),
    ):  # fmt: skip
        assert why in why_not_extension("cpu", dtype, dim, tokens)
        with pytest.raises(BackendError, match=f"impl='extension' cannot run here: .*{why}"):
            run(*batch([tokens], 2, dim, dtype)[:2], 2)
    for dim, tokens in ((128, most), (1, 1), (64, 0)):
        assert why_not_extension(torch.device("cpu"), BF16, dim, tokens) == ""
    assert "not on cuda" in why_not_extension("cuda", BF16, 64, 64)
    with pytest.raises(BackendError, match="on CPU tensors, not on meta"):
        short_attention(torch.zeros(2, 3, 24, device="meta"), 2, impl="extension")
    with pytest.raises(ValueError, match="cu_tokens is on meta"):
        short_attention(torch.zeros(3, 24), 2, cu_tokens=torch.zeros(2, device="meta").int(), longest=3,
                        impl="extension")  # fmt: skip


def test_forward_mode_takes_the_reference():
    qkv = batch([4], 2, 8, F32)[0]
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(qkv, torch.ones_like(qkv))
        assert torch.autograd.forward_ad.unpack_dual(short_attention(x, 2)).tangent is not None
        with pytest.raises(BackendError, match="forward-mode"):
            short_attention(x, 2, impl="extension")


def test_without_the_extension_the_reference_runs_and_says_so_once(monkeypatch):
    monkeypatch.setattr(_extension, "status", lambda: ("there is none", {}))
    monkeypatch.setattr(_extension, "_warned", set())
    qkv, dout, _ = batch([4], 2, 8, F32)
    with pytest.warns(UserWarning, match="short_attention runs the slower reference path: there is none") as told:
        results = [run(qkv, dout, 2, None), run(qkv, dout, 2, None)]
    assert len(told) == 1
    same(results[0], run(qkv, dout, 2, "reference"))
    with pytest.raises(BackendError, match="there is none"):
        run(qkv, dout, 2)
    assert why_not_extension("cpu", F32, 8, 4) == "there is none"


Q, G, CU = torch.zeros(2, 3, 24), torch.zeros(2, 3, 8), torch.tensor([0, 2, 6], dtype=torch.int32)
FLAT = Q.view(6, 24)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: OPS.short_attention_cpu(FLAT, 2, None, 3), "qkv must be"),
        (lambda: OPS.short_attention_cpu(Q, 2, CU, 3), "qkv must be"),
        (lambda: OPS.short_attention_cpu(Q, 5, None, 3), "packed as"),
        (lambda: OPS.short_attention_cpu(Q, 0, None, 3), "packed as"),
        (lambda: OPS.short_attention_cpu(Q, 2, None, 4), "longest must be 3"),
        (lambda: OPS.short_attention_cpu(FLAT, 2, CU, -1), "not be negative"),
        (lambda: OPS.short_attention_cpu(Q.double(), 2, None, 3), "need float32"),
        (lambda: OPS.short_attention_cpu(FLAT, 2, CU.float(), 4), "int32 or int64"),
        (lambda: OPS.short_attention_cpu(FLAT, 2, CU[:0], 4), "must be .S"),
        (lambda: OPS.short_attention_cpu(FLAT, 2, CU + 1, 4), "from 0 to 6"),
        (lambda: OPS.short_attention_cpu(FLAT[:5], 2, CU, 4), "from 0 to 5"),
        (lambda: OPS.short_attention_cpu(FLAT, 2, CU.clamp(max=5), 4), "from 0 to 6"),
        (lambda: OPS.short_attention_cpu(FLAT, 2, torch.tensor([0, 5, 2, 6]), 4), "must ascend"),
        (lambda: OPS.short_attention_backward_cpu(G[:1], Q, 2, None, 3), "shape of the result"),
        (lambda: OPS.short_attention_backward_cpu(G[0], Q, 2, None, 3), "shape of the result"),
        (lambda: OPS.short_attention_backward_cpu(G.bfloat16(), Q, 2, None, 3), "another element type"),
    ],
)
def test_operations_called_with_wrong_arguments_say_so(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()
