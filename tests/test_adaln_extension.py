"""adaLN in the C++ extension against its definition in float64: values, gradients, bits, how it is called."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
import warnings
from itertools import accumulate, product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_tools import in_margins, no_worse_than_eager

from phmdiff_fast.kernels import _extension
from phmdiff_fast.kernels import adaln as module
from phmdiff_fast.kernels._impl import BackendError
from phmdiff_fast.kernels.adaln import adaln_modulate, gated_residual_adaln
from phmdiff_fast.kernels.gelu import gelu

pytestmark = pytest.mark.skipif(bool(_extension.problem()), reason=_extension.problem() or "the extension is there")

OPS = torch.ops.phmdiff_fast
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
MIXES = {"fp32": (F32, F32), "x fp32, bf16": (F32, BF16), "bf16": (BF16, BF16)}
every_mix = pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
# Below, at and beyond a vector, 32 lanes, 16 summed rows and a stretch of 64.
LENGTHS = [[3, 3], [1], [16, 16], [17], [64], [65, 65], [200]]
PACKS = [[5, 0, 1, 130], [0], [64, 65, 0], [16, 17, 192]]
WIDTHS = [1, 5, 31, 32, 33, 192]


def batch(lengths, width, mix, *, packed=False, offset=0.0, seed=0, margins=True):
    """Inputs by name, cu_tokens among them where packed; and gradients of x' and y."""
    g = torch.Generator().manual_seed(seed)
    shape = (sum(lengths), width) if packed else (len(lengths), lengths[0], width)

    def normal(size, dtype):
        t = torch.randn(size, generator=g).to(dtype)
        return in_margins(t) if margins else t

    x = normal(shape, F32) + offset
    made = {"x": in_margins(x.to(mix[0])) if margins else x.to(mix[0]), "h": normal(shape, mix[1])}
    made |= {name: normal((len(lengths), width), mix[1]) for name in ("gate", "shift", "scale")}
    cu = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32) if packed else None
    return made, cu, (normal(shape, mix[0]), normal(shape, mix[1]))


def run(inputs, cu, grads, impl="extension", gated=True, needs=None):
    """Results, then gradients of those in ``needs`` (all)."""
    names = ("x", "h", "gate", "shift", "scale") if gated else ("x", "shift", "scale")
    needs = names if needs is None else needs
    leaves = {name: inputs[name].detach().requires_grad_(name in needs) for name in names}
    if gated:
        out = gated_residual_adaln(**leaves, cu_tokens=cu, impl=impl)
    else:
        out, grads = (adaln_modulate(**leaves, cu_tokens=cu, impl=impl),), grads[1:]
    found = torch.autograd.grad(out, [leaves[name] for name in needs], grads) if needs else ()
    return [*(o.detach() for o in out), *found]


def double(inputs, cu, grads):
    return {name: t.double() for name, t in inputs.items()}, cu, tuple(g.double() for g in grads)


def same(a, b):
    assert len(a) == len(b)
    for p, q in zip(a, b, strict=True):
        assert p.dtype == q.dtype
        assert torch.equal(p, q)


def compare(given_, gated, small, name=""):
    got, eager = run(*given_, gated=gated), run(*given_, "reference", gated)
    exact = run(*double(*given_), "reference", gated)
    # Few columns: a sum over rows may be right by luck in eager, so its terms' rounding errors are allowed.
    terms = max(float(g.float().abs().sum(-2).max()) for g in given_[2])
    for n, (a, b, c) in enumerate(zip(got, eager, exact, strict=True)):
        assert a.is_contiguous()
        if small and n >= len(got) - (3 if gated else 2):
            limit = torch.finfo(a.dtype).eps * c.abs() + torch.finfo(F32).eps * 4 * terms
            limit = limit + 2 * (b.double() - c).abs().max()
            assert ((a.double() - c).abs() <= limit).all(), f"{name} result {n}"
        else:
            no_worse_than_eager(a, b, c, small=small, name=f"{name} result {n}")


# --- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "norm alone"])
@every_mix
def test_results_and_gradients(mix, gated):
    for lengths, packed in [(n, False) for n in LENGTHS] + [(n, True) for n in PACKS]:
        for width in WIDTHS:
            if sum(lengths):
                compare(batch(lengths, width, mix, packed=packed), gated, True, f"{lengths} x {width}")
    compare(batch([256] * 4, 192, mix), gated, False)
    compare(batch([100, 300, 0, 65], 1152, mix, packed=True), gated, False)


@given(
    lengths=st.lists(st.integers(0, 150), min_size=1, max_size=4), width=st.integers(8, 140), packed=st.booleans(),
    mix=st.sampled_from(list(MIXES.values())), gated=st.booleans(),
)  # fmt: skip
@settings(max_examples=40, derandomize=True, deadline=None)
def test_any_size(lengths, width, packed, mix, gated):
    lengths = lengths if packed else lengths[:1] * len(lengths)
    if sum(lengths):
        compare(batch(lengths, width, mix, packed=packed), gated, True)


@pytest.mark.parametrize("offset", [30.0, 1000.0])
def test_rows_far_from_zero_lose_no_more_than_eager(offset):
    for mix in (MIXES["fp32"], MIXES["x fp32, bf16"]):
        compare(batch([64, 64], 192, mix, offset=offset), True, False)


def test_long_sums_over_rows_stay_exact():
    """Sums of ones are integers; added one after the other in 16 bits they would stop at 256."""
    x, width = torch.randn(1, 5000, 8).bfloat16(), 8
    ones, zero = torch.ones(1, 5000, width, dtype=BF16), torch.zeros(1, width, dtype=BF16)
    shift = OPS.adaln_backward_cpu(ones, None, x, None, None, zero, None, 1e-6, False, False, False, True, False)[0]
    assert torch.equal(shift, torch.full((1, width), 5000.0).bfloat16())


def test_norm_of_what_is_written():
    """y is the norm of x' as rounded, so the norm alone of x' gives it again, bit for bit."""
    for mix in MIXES.values():
        inputs, cu, grads = batch([70, 70], 96, mix)
        new, y = run(inputs, cu, grads, needs=())
        assert torch.equal(adaln_modulate(new, inputs["shift"], inputs["scale"], impl="extension"), y)


@every_mix
def test_a_nan_stays_in_its_row(mix):
    inputs, cu, grads = batch([70, 70], 33, mix)
    inputs["x"][1, 66, 5] = math.nan
    new, y, dx, dh, *vectors = run(inputs, cu, grads)
    for rows in (y, dx, dh):
        bad = rows.isnan().any(-1)
        assert bad.sum() == 1
        assert bad[1, 66]
    assert new.isnan().sum() == 1
    for v in vectors:
        assert not v[0].isnan().any()


# --- what is asked for ---------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@every_mix
def test_any_choice_of_gradients_gives_the_same_bits(mix, packed):
    given_ = batch([70, 70, 3] if packed else [70, 70], 33, mix, packed=packed)
    for gated, names in ((True, ("x", "h", "gate", "shift", "scale")), (False, ("x", "shift", "scale"))):
        results = 2 if gated else 1
        whole = dict(zip(names, run(*given_, gated=gated)[results:], strict=True))
        for choice in product((False, True), repeat=len(names)):
            needs = tuple(name for name, chosen in zip(names, choice, strict=True) if chosen)
            same(run(*given_, gated=gated, needs=needs)[results:], [whole[name] for name in needs])


@every_mix
def test_only_one_result_is_used(mix):
    inputs, cu, (dnew, dy) = batch([70, 70], 64, mix)
    names = ("x", "h", "gate", "shift", "scale")
    for which, given_ in ((0, (dnew, torch.zeros_like(dy))), (1, (torch.zeros_like(dnew), dy))):
        leaves = [inputs[name].detach().requires_grad_() for name in names]
        out = gated_residual_adaln(*leaves, impl="extension")[which]
        got = torch.autograd.grad(out, leaves, given_[which], allow_unused=True)
        both = run(inputs, cu, given_)[2:]
        if which == 0:  # shift and scale do not reach x'
            assert got[3] is got[4] is None
            got, both = got[:3], both[:3]
        same(got, both)


def test_inputs_are_not_written():
    for mix in MIXES.values():
        inputs, cu, grads = batch([70, 70], 33, mix)
        before = [t.clone() for t in (*inputs.values(), *grads)]
        run(inputs, cu, grads)
        same(before, [*inputs.values(), *grads])


# --- bits --------------------------------------------------------------------------------------


def part_of(v, *pad):
    """The same values inside a larger tensor that is NaN elsewhere."""
    whole = v.new_full([s + p for s, p in zip(v.shape, pad, strict=True)], math.nan)
    part = whole[tuple(slice(p // 2, p // 2 + s) for s, p in zip(v.shape, pad, strict=True))]
    return part.copy_(v)


LAYOUTS = {
    "transposed": lambda v: v.mT.contiguous().mT,
    "columns of a larger one": lambda v: part_of(v, *[0] * (v.dim() - 1), 10),
    "rows of a larger one": lambda v: part_of(v, *[0] * (v.dim() - 2), 4, 0),
    "first dimension behind": lambda v: v.transpose(0, 1).contiguous().transpose(0, 1),
    "every second column": lambda v: torch.stack([v, v * math.nan], -1).flatten(-2)[..., ::2],
    "expanded": lambda v: v[:1].expand(v.shape),
    "at an odd offset": lambda v: torch.cat([v.new_full((3,), math.nan), v.flatten()])[3:].view(v.shape),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_gives_the_same_bits_as_dense_memory(layout, packed):
    for mix in MIXES.values():
        inputs, cu, grads = batch([5, 70] if packed else [70, 70], 34, mix, packed=packed)
        laid = {name: LAYOUTS[layout](t) for name, t in inputs.items()}
        laid_grads = tuple(LAYOUTS[layout](g) for g in grads)
        dense = {name: t.clone(memory_format=torch.contiguous_format) for name, t in laid.items()}
        dense_grads = tuple(g.clone(memory_format=torch.contiguous_format) for g in laid_grads)
        same(run(laid, cu, laid_grads), run(dense, cu, dense_grads))


@every_mix
def test_vectors_that_are_chunks_of_one_product(mix):
    inputs, cu, grads = batch([70, 70], 33, mix)
    product_ = in_margins(torch.cat([inputs[n] for n in ("shift", "scale", "gate")] * 2, dim=1))
    chunks = dict(zip(("shift", "scale", "gate"), product_.chunk(6, dim=1), strict=False))
    assert not any(v.is_contiguous() for v in chunks.values())
    same(run(inputs | chunks, cu, grads), run(inputs, cu, grads))


@every_mix
def test_no_bit_depends_on_neighbours_or_packing(mix):
    """A sample alone, in any batch, or packed between others of any length."""
    inputs, _, grads = batch([130] * 3, 100, mix, margins=False)
    whole = run(inputs, None, grads)
    order = [2, 0, 1]
    same(run({n: t[order] for n, t in inputs.items()}, None, tuple(g[order] for g in grads)),
         [t[order] for t in whole])  # fmt: skip
    for n in range(3):
        row = slice(n, n + 1)
        same(run({k: t[row] for k, t in inputs.items()}, None, tuple(g[row] for g in grads)), [t[row] for t in whole])
    extra, _, extra_grads = batch([7, 0], 100, mix, packed=True, seed=5, margins=False)
    rows = {"x", "h"}
    packed = {k: torch.cat([extra[k], t.flatten(0, 1) if k in rows else t]) for k, t in inputs.items()}
    packed_grads = tuple(torch.cat([e, g.flatten(0, 1)]) for e, g in zip(extra_grads, grads, strict=True))
    ends = torch.tensor([0, 7, 7, 137, 267, 397])
    for cu in (ends.int(), ends, torch.stack([ends, ends + 1], 1)[:, 0]):
        got = run(packed, cu, packed_grads)
        for n, (a, b) in enumerate(zip(got, whole, strict=True)):
            assert torch.equal(a[7:].view_as(b) if n < 4 else a[2:], b), n
            assert n < 4 or not a[1].any()  # nothing comes from a sample without rows


def digests():
    """One hash per type, of results and gradients of adaLN and GELU: not to depend on threads or processor."""
    found = {}
    for name, mix in MIXES.items():
        digest = hashlib.sha256()
        for lengths, width, packed in (([300] * 3, 192, False), ([5, 0, 333, 70], 257, True), ([64] * 8, 96, False),
                                       ([1], 7, False)):  # fmt: skip
            for gated in (True, False):
                for t in run(*batch(lengths, width, mix, packed=packed), gated=gated):
                    digest.update(t.contiguous().view(torch.uint8).numpy().tobytes())
        found[name] = digest.hexdigest()[:16]
    for dtype in (F32, BF16):
        x = torch.linspace(-15, 15, 100_003).to(dtype).requires_grad_()
        y = gelu(x, impl="extension")
        grad = torch.autograd.grad(y, x, x.detach().cos())[0]
        bits = [t.detach().view(torch.uint8).numpy().tobytes() for t in (y, grad)]
        found[f"gelu {dtype}"] = hashlib.sha256(b"".join(bits)).hexdigest()[:16]
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


@pytest.mark.parametrize(("isa", "byte"), [("generic", 128), ("avx2", 64)])
def test_the_instruction_set_changes_no_bit(isa, byte, these_digests):
    code = (
        "import torch, json, test_adaln_extension as t; torch.set_num_threads(1);"
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


# --- how it is called ----------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [True, False])
def test_nothing_in_nothing_out(gated):
    for mix in MIXES.values():
        for lengths, width, packed in (([0, 0], 5, False), ([3, 3], 0, False), ([], 4, True), ([0, 0], 4, True)):
            if not lengths and not packed:
                continue
            inputs, cu, grads = batch(lengths, width, mix, packed=packed)
            for t in run(inputs, cu, grads, gated=gated):
                assert not t.any()
        inputs, cu, grads = batch([4], 6, mix)
        none = {n: t[:0] for n, t in inputs.items()}
        assert all(not t.numel() for t in run(none, None, tuple(g[:0] for g in grads), gated=gated))


def op_arguments():
    found = []
    for mix, packed in ((MIXES["x fp32, bf16"], False), (MIXES["fp32"], True)):
        inputs, cu, (dnew, dy) = batch([5, 66] if packed else [66, 66], 9, mix, packed=packed, margins=False)
        x, h, gate, shift, scale = (inputs[n].requires_grad_() for n in ("x", "h", "gate", "shift", "scale"))
        found += [
            ("adaln_modulate_cpu", (x, shift, scale, cu, 1e-6)),
            ("gated_residual_adaln_cpu", (x, h, gate, shift, scale, cu, 1e-6)),
            ("adaln_backward_cpu", (dy, dnew, x.detach(), h.detach(), gate.detach(), scale.detach(), cu, 1e-6,
                                    *[True] * 5)),
            ("adaln_backward_cpu", (None, dnew, x.detach(), h.detach(), None, scale.detach(), cu, 1e-6,
                                    True, False, True, False, False)),
        ]  # fmt: skip
    return found


@pytest.mark.parametrize("number", range(8))
def test_registered_operations_pass_opcheck(number):
    name, arguments = op_arguments()[number]
    torch.library.opcheck(getattr(OPS, name).default, arguments)


def test_compiled_in_one_graph_for_any_size():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def block(x, h, vectors):
        a, b, c, d, e, f = vectors.chunk(6, dim=1)
        x, y = gated_residual_adaln(x, h, a, b, c)
        return gated_residual_adaln(x, gelu(y) + adaln_modulate(x, d, e), f, b, e)

    def outcome(f, samples, rows):
        inputs, _, grads = batch([rows] * samples, 24, MIXES["x fp32, bf16"], margins=False)
        vectors = torch.cat([inputs[n] for n in ("shift", "scale", "gate")] * 2, dim=1)
        leaves = [t.requires_grad_() for t in (inputs["x"], inputs["h"], vectors)]
        out = f(*leaves)
        return [*(o.detach() for o in out), *torch.autograd.grad(out, leaves, grads)]

    compiled, traced = torch.compile(block, fullgraph=True, dynamic=True, backend=counter), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for samples, rows in ((2, 5), (3, 70), (4, 66)):
            same(outcome(compiled, samples, rows), outcome(block, samples, rows))
            traced.append(counter.frame_count)
    assert traced == traced[:1] * 3
    torch._dynamo.reset()


def test_fake_tensors_have_the_shapes_of_real_ones():
    from torch._subclasses import FakeTensorMode

    for mix, packed in product(MIXES.values(), (False, True)):
        inputs, cu, _ = batch([5, 5], 9, mix, packed=packed, margins=False)
        real = gated_residual_adaln(**inputs, cu_tokens=cu, impl="extension")
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            given_ = {n: mode.from_tensor(t) for n, t in inputs.items()}
            fake = gated_residual_adaln(**given_, cu_tokens=cu if cu is None else mode.from_tensor(cu))
        for a, b in zip(real, fake, strict=True):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def test_a_second_derivative_raises():
    inputs, _, _ = batch([4], 8, MIXES["fp32"])
    leaves = [t.requires_grad_() for t in inputs.values()]
    new, y = gated_residual_adaln(*leaves, impl="extension")
    first = torch.autograd.grad(new.sum() + y.square().sum(), leaves[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(first.sum(), leaves[0])


def test_the_extension_is_what_runs_unless_told_otherwise(monkeypatch):
    def never(*args, **named):
        raise AssertionError("the reference ran")

    monkeypatch.setattr(module, "adaln_modulate_reference", never)
    monkeypatch.setattr(module, "gated_residual_adaln_reference", never)
    for mix in MIXES.values():
        inputs, cu, grads = batch([4], 8, mix)
        with torch.autocast("cpu", BF16):
            same(run(inputs, cu, grads, None), run(inputs, cu, grads))
            same(run(inputs, cu, grads, None, False), run(inputs, cu, grads, gated=False))
        for gated in (True, False):
            with pytest.raises(AssertionError, match="the reference ran"):
                run(inputs, cu, grads, "reference", gated)
    for kinds in ((F64, F64), (F32, F16), (F16, F16)):
        with pytest.raises(AssertionError, match="the reference ran"):
            run(*batch([4], 8, kinds), None)


def test_what_it_does_not_do_is_refused_where_it_is_forced():
    for kinds, why in (((F64, F64), "float64 beside float64"), ((F32, F16), "float32 beside float16")):
        with pytest.raises(BackendError, match=f"impl='extension' cannot run here: x is {why}"):
            run(*batch([4], 8, kinds))
    inputs, _, _ = batch([4], 8, MIXES["fp32"])
    meta = {n: t.to("meta") for n, t in inputs.items()}
    with pytest.raises(BackendError, match="on CPU tensors, not on meta"):
        gated_residual_adaln(**meta, impl="extension")
    with pytest.raises(ValueError, match="gate is on meta, expected cpu like x"):
        gated_residual_adaln(**inputs | {"gate": meta["gate"]}, impl="extension")
    with pytest.raises(ValueError, match="shift must be"):
        gated_residual_adaln(**inputs | {"shift": inputs["shift"][:, :3]}, impl="extension")


def test_forward_mode_takes_the_reference():
    inputs, _, _ = batch([4], 8, MIXES["fp32"])
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(inputs["x"], torch.ones_like(inputs["x"]))
        out = gated_residual_adaln(**inputs | {"x": x})[0]
        assert torch.autograd.forward_ad.unpack_dual(out).tangent is not None
        with pytest.raises(BackendError, match="forward-mode"):
            gated_residual_adaln(**inputs | {"x": x}, impl="extension")


def test_without_the_extension_the_reference_runs_and_says_so_once(monkeypatch):
    monkeypatch.setattr(_extension, "status", lambda: ("there is none", {}))
    monkeypatch.setattr(_extension, "_warned", set())
    given_ = batch([4], 8, MIXES["fp32"])
    with pytest.warns(UserWarning, match="adaln runs the slower reference path: there is none") as told:
        results = [run(*given_, None), run(*given_, None, False)[:1]]
    assert len(told) == 1
    same(results[0], run(*given_, "reference"))
    with pytest.raises(BackendError, match="there is none"):
        run(*given_)


X, V, CU = torch.zeros(2, 3, 4), torch.zeros(2, 4), torch.tensor([0, 2, 6], dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: OPS.adaln_modulate_cpu(X[0], V, V, None, 1e-6), "x must be"),
        (lambda: OPS.adaln_modulate_cpu(X, V, V, CU, 1e-6), "x must be"),
        (lambda: OPS.adaln_modulate_cpu(X, V[:1], V, None, 1e-6), "shift must be one row"),
        (lambda: OPS.adaln_modulate_cpu(X, V, V[:, :2], None, 1e-6), "scale must be one row"),
        (lambda: OPS.adaln_modulate_cpu(X, V.bfloat16(), V, None, 1e-6), "shift has another element type"),
        (lambda: OPS.adaln_modulate_cpu(X.double(), V.double(), V.double(), None, 1e-6), "need float32"),
        (lambda: OPS.gated_residual_adaln_cpu(X, X[:, :2], V, V, V, None, 1e-6), "h must have the shape"),
        (lambda: OPS.gated_residual_adaln_cpu(X, X.bfloat16(), V, V, V, None, 1e-6), "h has another"),
        (lambda: OPS.adaln_modulate_cpu(X.view(6, 4), V, V, CU.float(), 1e-6), "int32 or int64"),
        (lambda: OPS.adaln_modulate_cpu(X.view(6, 4), V, V, CU + 1, 1e-6), "from 0 to 6"),
        (lambda: OPS.adaln_modulate_cpu(X.view(6, 4)[:5], V, V, CU, 1e-6), "from 0 to 5"),
        (lambda: OPS.adaln_modulate_cpu(X.view(6, 4), V, V, CU.clamp(min=1), 1e-6), "from 0 to 6"),
        (lambda: OPS.adaln_modulate_cpu(X.view(6, 4), torch.zeros(3, 4), torch.zeros(3, 4),
                                        torch.tensor([0, 5, 2, 6]), 1e-6), "must ascend"),
        (lambda: OPS.adaln_backward_cpu(None, None, X, None, None, V, None, 1e-6, True, *[False] * 4), "a gradient"),
        (lambda: OPS.adaln_backward_cpu(None, X, X, None, None, V, None, 1e-6, True, *[False] * 3, True), "alone"),
        (lambda: OPS.adaln_backward_cpu(X, X, X, X, None, V, None, 1e-6, True, True, *[False] * 3), "needs gate"),
        (lambda: OPS.adaln_backward_cpu(X, X, X, None, V, V, None, 1e-6, True, False, True, False, False), "needs h"),
        (lambda: OPS.adaln_backward_cpu(X[:1], X, X, None, None, V, None, 1e-6, True, *[False] * 4), "dy must have"),
    ],
)  # fmt: skip
def test_operations_called_with_wrong_arguments_say_so(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()
