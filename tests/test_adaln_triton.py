"""adaLN in Triton against the equation in float64: every gradient, layout, type and way to call it."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_tools import (
    DEVICE,
    guarded,
    guarded_buffers,
    in_margins,
    needs_triton,
    no_worse_than_eager,
    reversed_programs,
)
from torch._subclasses import FakeTensorMode

from phmdiff_fast.kernels import _impl, _launch
from phmdiff_fast.kernels.adaln import adaln_modulate, gated_residual_adaln

pytestmark = needs_triton
__all__ = ["guarded"]  # a fixture

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
TYPES = {
    "fp32": (F32, F32),
    "bf16": (BF16, BF16),
    "fp16": (F16, F16),
    "mixed bf16": (F32, BF16),
    "mixed fp16": (F32, F16),
}
NAMES = ("x", "h", "gate", "shift", "scale")
PLAIN = ("x", "shift", "scale")


def operation(names):
    return gated_residual_adaln if "h" in names else adaln_modulate


def inputs(shape, lengths=None, *, types=(F32, F32), seed=0, names=NAMES, margins=True):
    """Random inputs by name; packed where lengths (of the samples) are given. The vectors are views of one chunk."""
    g = torch.Generator().manual_seed(seed)
    wide, narrow = types
    samples = shape[0] if lengths is None else len(lengths)
    made = {"x": torch.randn(shape, generator=g) * 1.5 + 0.3, "h": torch.randn(shape, generator=g)}
    made = {n: v.to(wide if n == "x" else narrow).to(DEVICE) for n, v in made.items()}
    vectors = torch.randn(samples, 6 * shape[-1], generator=g).to(narrow).to(DEVICE)
    if margins:
        made, vectors = {n: in_margins(v) for n, v in made.items()}, in_margins(vectors)
    made |= dict(zip(("gate", "shift", "scale"), vectors.chunk(6, 1)[1:4], strict=True))
    return {n: made[n] for n in names}


def offsets(lengths):
    return torch.tensor(
        [0, *torch.tensor(lengths).cumsum(0).tolist()] if lengths else [0], dtype=torch.int32, device=DEVICE
    )


def run(given, weights, *, impl, cu=None, needs=None):
    """(results, gradients) of sum(w * result); needs: the inputs that require grad, all by default."""
    leaves = {n: v.detach().requires_grad_(needs is None or n in needs) for n, v in given.items()}
    out = operation(given)(*leaves.values(), cu_tokens=cu, impl=impl)
    out = out if isinstance(out, tuple) else (out,)
    wanted = [v for v in leaves.values() if v.requires_grad]
    total = [(o, w.to(o.dtype)) for o, w in zip(out, weights, strict=True) if w is not None]
    got = iter(
        torch.autograd.grad([o for o, _ in total], wanted, [w for _, w in total], allow_unused=True) if wanted else ()
    )
    return [o.detach() for o in out], {n: next(got) if v.requires_grad else None for n, v in leaves.items()}


def weights_for(given, seed=1):
    g = torch.Generator().manual_seed(seed)
    x, narrow = given["x"], given["shift"].dtype
    made = [torch.randn(x.shape, generator=g).to(narrow).to(DEVICE) for _ in range(2)]
    return made if "h" in given else made[:1]


def compare(given, *, cu=None, weights=None, small=True):
    """Kernel, eager in the same types, and float64 on the same values: results and every gradient."""
    weights = weights_for(given) if weights is None else weights
    with guarded_buffers():
        got = run(given, weights, impl="triton", cu=cu)
    eager = run(given, weights, impl="reference", cu=cu)
    exact = run({n: v.double() for n, v in given.items()}, weights, impl="reference", cu=cu)
    for i, (a, b, c) in enumerate(zip(got[0], eager[0], exact[0], strict=True)):
        assert a.is_contiguous()
        no_worse_than_eager(a, b, c, small=small, name=f"result {i}")
    for name in given:
        if got[1][name] is None:  # nothing came from behind
            assert exact[1][name] is None or not exact[1][name].any(), name
            continue
        no_worse_than_eager(got[1][name], eager[1][name], exact[1][name], small=small, name=f"gradient of {name}")
    return got


def same(a, b):
    """Bit for bit, (results, gradients) of ``run``."""
    assert all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True))
    assert all((x is None and b[1][n] is None) or torch.equal(x, b[1][n]) for n, x in a[1].items())


# --- values ------------------------------------------------------------------------------------


WIDE = [(2, 3, 768), (1, 3, 1024), (1, 5, 1152)]


@pytest.mark.parametrize(
    ("shape", "types"),
    [*product([(2, 9, 64), (1, 5, 384)], TYPES), *product(WIDE, ["fp32", "bf16", "mixed bf16"])],
    ids=str,
)
def test_results_and_gradients(shape, types):
    compare(inputs(shape, types=TYPES[types]))
    compare(inputs(shape, types=TYPES[types], names=PLAIN))


@pytest.mark.parametrize(
    ("shape", "names"),
    [((2, 128, 24), NAMES), ((1, 193, 12), NAMES), ((1, 193, 12), PLAIN), ((1, 1100, 2), NAMES)],
    ids=str,
)
def test_sums_over_several_parts(shape, names):
    compare(inputs(shape, types=TYPES["mixed bf16"], names=names), small=False)


def test_the_norm_reads_x_as_rounded():
    """So that a block's norm is the same whether it is fused with the sum before it or not."""
    given = inputs((2, 9, 96), types=TYPES["bf16"])
    new, y = gated_residual_adaln(*given.values(), impl="triton")
    assert torch.equal(y, adaln_modulate(new, given["shift"], given["scale"], impl="triton"))


@pytest.mark.parametrize("width", [1, 2, 3, 7, 65, 127, 129, 255, 511, 1500, 2049, 3000, 4096, 5000])
def test_any_width(width):
    compare(inputs((1, 2, width), types=TYPES["bf16" if width % 2 else "fp32"]))


@pytest.mark.parametrize(
    "lengths",
    [[5], [0, 3, 0, 0, 7, 1, 0], [64, 127, 128, 129, 0, 1], [300, 2]],
    ids=lambda n: f"{len(n)} samples, {sum(n)} rows",
)
@pytest.mark.parametrize("names", [NAMES, PLAIN], ids=["gated", "plain"])
def test_packed_rows(lengths, names):
    given = inputs((sum(lengths), 6), lengths, types=TYPES["mixed fp16"], names=names)
    got = compare(given, cu=offsets(lengths))
    nothing = torch.tensor(lengths, device=DEVICE) == 0
    assert not any(got[1][n][nothing].any() for n in names if n not in ("x", "h"))


@pytest.mark.parametrize("lengths", [[0, 2, 1, 0, 130, 0, 0, 3, 1, 64, 0], [0, 0, 0, 0, 128], [1] * 8], ids=str)
def test_more_samples_than_one_search_takes(lengths, monkeypatch):
    monkeypatch.setattr("phmdiff_fast.kernels._adaln_triton.SEARCH", (2, 4))
    compare(inputs((sum(lengths), 4), lengths), cu=offsets(lengths))


def test_packed_is_dense_bit_for_bit():
    given = inputs((2, 130, 6))
    cu = offsets([130, 130])
    packed = {n: v.flatten(0, 1) if n in ("x", "h") else v for n, v in given.items()}
    weights = weights_for(given)
    a, b = run(given, weights, impl="triton"), run(packed, [w.flatten(0, 1) for w in weights], impl="triton", cu=cu)
    same(a, ([o.view(2, 130, 6) for o in b[0]], {n: v.view(given[n].shape) for n, v in b[1].items()}))


@pytest.mark.parametrize("length", [9, 128])
def test_no_bit_depends_on_how_a_batch_is_split(length):
    given = inputs((3, length, 24), types=TYPES["bf16"])
    weights = weights_for(given)
    whole = run(given, weights, impl="triton")
    parts = [
        run({n: v[i : i + 1] for n, v in given.items()}, [w[i : i + 1] for w in weights], impl="triton")
        for i in range(3)
    ]
    same(whole, ([torch.cat(o) for o in zip(*(p[0] for p in parts), strict=True)],
                 {n: torch.cat([p[1][n] for p in parts]) for n in NAMES}))  # fmt: skip


def test_no_bit_depends_on_a_sample_s_neighbours_in_a_pack():
    lengths, order = [3, 140, 0, 70], [3, 1, 0]
    given = inputs((sum(lengths), 8), lengths)
    weights = weights_for(given)
    a = run(given, weights, impl="triton", cu=offsets(lengths))
    ends = offsets(lengths).tolist()
    rows = torch.cat([torch.arange(ends[i], ends[i + 1]) for i in order])
    moved = {n: v[rows] if n in ("x", "h") else v[order] for n, v in given.items()}
    b = run(moved, [w[rows] for w in weights], impl="triton", cu=offsets([lengths[i] for i in order]))
    assert all(torch.equal(x[rows], y) for x, y in zip(a[0], b[0], strict=True))
    assert all(torch.equal(a[1][n][rows if n in ("x", "h") else order], b[1][n]) for n in NAMES)


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 3e3])
def test_extreme_rows(scale):
    given = inputs((1, 6, 48))
    given["x"] = given["x"] * scale + torch.tensor([0.0, 1e3, -1e3, 0, 0, 0], device=DEVICE)[:, None]
    given["x"][:, 3], given["h"][:, 3] = 2.5, 0  # a constant row: variance 0
    given["x"][:, 4] = 0
    given["scale"] = torch.full_like(given["scale"], -1.0)
    compare(given)
    given["scale"] = torch.full_like(given["scale"], 50.0)
    compare(given)


def test_nan_stays_in_its_row_and_sample():
    given = inputs((2, 5, 40))
    given["x"][0, 2, 7] = float("nan")
    results, grads = run(given, weights_for(given), impl="triton")
    bad = torch.zeros(2, 5, dtype=torch.bool, device=DEVICE)
    bad[0, 2] = True
    assert torch.equal(results[1].isnan().all(-1), bad)
    assert torch.equal(grads["x"].isnan().all(-1), bad)
    assert not grads["scale"][1].isnan().any()


def test_where_each_sum_goes_alone():
    """All but one value zero: a sum written to another sample, column or vector shows."""
    given = inputs((2, 130, 5))
    for sample, row, col in ((0, 65, 4), (1, 129, 0)):
        weights = [torch.zeros(2, 130, 5, device=DEVICE) for _ in range(2)]
        weights[1][sample, row, col] = 1
        compare(given, weights=weights)


# --- rows of the fault matrix ------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8), (2, 5, 0), (0, 0, 0), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("names", [NAMES, PLAIN], ids=["gated", "plain"])
def test_k2_empty_and_one(shape, names):
    launches = []
    given = inputs(shape, names=names)
    with guarded_buffers():
        got = run(given, weights_for(given), impl="triton")
    assert [o.shape for o in got[0]] == [torch.Size(shape)] * (2 if "h" in names else 1)
    assert all(g.shape == given[n].shape and (shape == (1, 1, 1) or not g.any()) for n, g in got[1].items())
    with _launch.observe(lambda *launch: launches.append(launch)):
        run(given, weights_for(given), impl="triton")
    assert (launches == []) == (shape != (1, 1, 1))


@pytest.mark.parametrize("lengths", [[], [0, 0]], ids=str)
def test_k2_empty_packs(lengths):
    given = inputs((0, 8), lengths)
    got = run(given, weights_for(given), impl="triton", cu=offsets(lengths))
    assert got[0][1].shape == (0, 8)
    assert got[1]["gate"].shape == (len(lengths), 8)
    assert not got[1]["gate"].any()


LAYOUTS = {
    "transposed": lambda v: v.transpose(0, 1).contiguous().transpose(0, 1),
    "columns apart": lambda v: torch.stack([v, v.flip(-1)], -1)[..., 0],
    "columns outermost": lambda v: v.movedim(-1, 0).contiguous().movedim(0, -1),
    "part of a wider row": lambda v: torch.cat([v, v * 2, v], -1)[..., v.shape[-1] : 2 * v.shape[-1]] / 2,
    "window": lambda v: torch.cat([v * float("nan"), v], -1)[..., v.shape[-1] :],
    "misaligned": lambda v: torch.cat([v.flatten()[:1], v.flatten()])[1:].view(v.shape),
    "expanded": lambda v: v[:1].expand(v.shape),
    "rows expanded": lambda v: v[:, :1].expand(v.shape),
    "all expanded": lambda v: v.flatten()[0].expand(v.shape),
    "reversed": lambda v: v.flip(0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_k3_strides(layout):
    for names in (NAMES, PLAIN):
        given = inputs((3, 4, 24), names=names)
        laid = {n: LAYOUTS[layout](v) for n, v in given.items()}
        weights = [LAYOUTS[layout](w) for w in weights_for(given)]
        plain = {n: v.clone(memory_format=torch.contiguous_format) for n, v in laid.items()}
        same(run(laid, weights, impl="triton"), run(plain, [w.contiguous() for w in weights], impl="triton"))
        if names == NAMES and layout != "all expanded":  # a row of one value is all rounding error
            compare(laid, weights=weights)


def test_k3_views_are_read_without_a_copy():
    given = inputs((2, 4, 32))
    given["x"] = torch.cat([given["x"]] * 2, -1)[..., 32:]
    seen = []
    with _launch.observe(lambda _kernel, _grid, args, _meta: seen.extend(args)):
        gated_residual_adaln(*given.values(), impl="triton")
    read = {a.data_ptr() for a in seen if isinstance(a, torch.Tensor)}
    assert {v.data_ptr() for v in given.values()} <= read


def test_k4_types(monkeypatch):
    given = inputs((2, 3, 8))
    wide = {n: v.double() for n, v in given.items()}
    with pytest.raises(_impl.BackendError, match="float64"):
        gated_residual_adaln(*wide.values(), impl="triton")
    with pytest.raises(TypeError, match="shift"):
        adaln_modulate(given["x"].half(), given["shift"], given["scale"], impl="triton")
    with pytest.raises(TypeError, match=r"x is torch\.int32"):
        adaln_modulate(*(given[n].int() for n in PLAIN), impl="triton")
    with pytest.raises(TypeError, match="cu_tokens"):
        adaln_modulate(
            given["x"][0], given["shift"], given["scale"], cu_tokens=torch.tensor([0.0, 1, 3]), impl="triton"
        )
    # On a GPU the eager path runs, with a warning.
    monkeypatch.setattr("phmdiff_fast.kernels.adaln.gated_residual_adaln_reference", lambda *args, cu_tokens: "eager")
    with FakeTensorMode():
        fake = [torch.empty(v.shape, dtype=torch.float64, device="cuda") for v in given.values()]
        with pytest.warns(UserWarning, match="float64"):
            assert gated_residual_adaln(*fake) == "eager"


@pytest.mark.skipif(DEVICE != "cpu", reason="untouched memory is free on a CPU only; see the GPU's own")
@pytest.mark.parametrize("strides", [(1 << 30, 8), (8, 1 << 30)], ids=["samples apart", "rows apart"])
def test_k5_offsets_beyond_32_bits(strides):
    far = torch.empty((1 << 31) + 64, dtype=F16).as_strided((3, 3, 8), (*strides, 1))
    given = inputs((3, 3, 8), types=TYPES["fp16"])
    weights = [w.to(F16) for w in weights_for(given)]
    near = run(given, weights, impl="triton")
    for name in ("x", "h"):
        far.copy_(given[name])
        same(run(given | {name: far}, weights, impl="triton"), near)
    for i in range(2):
        far.copy_(weights[i])
        moved = [far if j == i else w for j, w in enumerate(weights)]
        same(run(given, moved, impl="triton"), near)
    far = far.as_strided((3, 8), (1 << 30, 1))
    for name in ("gate", "shift", "scale"):
        far.copy_(given[name])
        same(run(given | {name: far}, weights, impl="triton"), near)


@pytest.mark.parametrize(("names", "rows"), [(NAMES, 3), (PLAIN, 3), (NAMES, 128), (PLAIN, 128)], ids=str)
def test_k6_subsets_of_requires_grad(names, rows):
    given = inputs((2, rows, 4), names=names)
    weights = weights_for(given)
    full = run(given, weights, impl="triton")
    for chosen in product((False, True), repeat=len(names)):
        needs = {n for n, c in zip(names, chosen, strict=True) if c}
        if rows > 100 and needs & {"x", "h"} != {"x"}:  # what matters there is which sums have a slot
            continue
        got = run(given, weights, impl="triton", needs=needs)
        assert {n for n, g in got[1].items() if g is not None} == needs
        same(got, (full[0], {n: full[1][n] if n in needs else None for n in names}))


def test_k6_what_is_not_needed_is_not_computed():
    given = inputs((1, 3, 4))
    launches = []

    def arguments(kernel, grid, args, meta):
        launches.append(dict(zip(kernel.arg_names, args, strict=False)))

    for needs in ({"x"}, {"h"}, {"gate"}, {"shift"}, {"scale"}):
        with _launch.observe(arguments):
            run(given, weights_for(given), impl="triton", needs=needs)
        (name,) = needs
        assert {n for n in NAMES if launches[-1][f"d{n}"] is not None} == {name}
        assert (launches[-1]["h"] is None) == (name != "gate")
        assert (launches[-1]["gate"] is None) == (name != "h")


@pytest.mark.parametrize("come", [(True, False), (False, True)], ids=["x' alone", "y alone"])
def test_gradient_from_one_result(come):
    given = inputs((2, 130, 6), types=TYPES["mixed bf16"])
    compare(given, weights=[w if c else None for w, c in zip(weights_for(given), come, strict=True)])


def test_k7_double_backward_raises():
    given = {n: v.detach().requires_grad_() for n, v in inputs((1, 3, 4)).items()}
    out = gated_residual_adaln(*given.values(), impl="triton")
    (dx,) = torch.autograd.grad(out[1].square().sum(), given["x"], create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(dx.sum(), given["x"])


def cases_of_ops():
    given, lengths = inputs((2, 3, 8)), [0, 2, 3]
    packed = inputs((5, 8), lengths, types=TYPES["mixed bf16"])
    for tensors, cu in ((given, None), (packed, offsets(lengths))):
        tensors = {n: v.detach().requires_grad_() for n, v in tensors.items()}
        yield "gated_residual_adaln", (*tensors.values(), cu)
        yield "adaln_modulate", (*(tensors[n] for n in PLAIN), cu)
        dy, dnew = tensors["h"].detach(), tensors["x"].detach()
        data = [tensors[n].detach() for n in ("x", "h", "gate", "scale")]
        yield "adaln_backward", (dy, dnew, *data, cu, [True] * 5)
        yield "adaln_backward", (dy, None, data[0], None, None, data[3], cu, [True, False, False, False, True])


@pytest.mark.parametrize("number", range(8))
def test_k8_opcheck(number):
    name, args = list(cases_of_ops())[number]
    torch.library.opcheck(getattr(torch.ops.phmdiff_fast, name).default, args)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_k8_compile(packed):
    cu = offsets([4, 0, 3]) if packed else None
    cases = [inputs((7, 8), [4, 0, 3]) if packed else inputs((2, 4, 8))]
    cases.append(inputs((7, 8), [4, 0, 3], seed=2) if packed else inputs((3, 6, 8)))

    def both(x, h, gate, shift, scale):
        x, y = gated_residual_adaln(x, h, gate, shift, scale, cu_tokens=cu, impl="triton")
        return x, adaln_modulate(y, shift, scale, cu_tokens=cu, impl="triton")

    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager", dynamic=True)
    for case in cases:
        for f in (both, compiled):
            leaves = [v.detach().requires_grad_() for v in case.values()]
            out = f(*leaves)
            grads = torch.autograd.grad(out, leaves, [torch.ones_like(out[0]), out[1].detach()])
            if f is both:
                expected = [*out, *grads]
        assert all(torch.equal(a, b) for a, b in zip([*out, *grads], expected, strict=True))


def test_k8_autocast_changes_nothing():
    given = inputs((2, 3, 8), types=TYPES["mixed bf16"])
    plain = run(given, weights_for(given), impl="triton")
    with torch.autocast(DEVICE, BF16):
        same(run(given, weights_for(given), impl="triton"), plain)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_k9_no_value_is_read_on_the_host(packed):
    """Fake tensors of a GPU have no values: .item() or a data-dependent shape would raise.

    The backward is called by itself: without a GPU, PyTorch's autograd aborts on its tensors.
    """
    with FakeTensorMode(), torch.no_grad():
        shape = (14, 8) if packed else (2, 7, 8)
        x = torch.empty(shape, device="cuda")
        h = torch.empty(shape, device="cuda", dtype=BF16)
        gate, shift, scale = torch.empty(2, 48, device="cuda", dtype=BF16).chunk(6, 1)[:3]
        cu = torch.empty(3, device="cuda", dtype=torch.int32) if packed else None
        new, y = gated_residual_adaln(x, h, gate, shift, scale, cu_tokens=cu)
        z = adaln_modulate(new, shift, scale, cu_tokens=cu)
        grads = torch.ops.phmdiff_fast.adaln_backward(y, new, new, h, gate, scale, cu, [True] * 5)
    assert (new.dtype, y.dtype, z.dtype) == (F32, BF16, BF16)
    expected = [(v.shape, v.dtype, "cuda") for v in (x, h, gate, shift, scale)]
    assert [(g.shape, g.dtype, g.device.type) for g in grads] == expected


def test_k10_what_does_not_fit_is_named():
    given = inputs((2, 3, 8))
    x, _, _, shift, scale = given.values()
    launches = []
    with _launch.observe(lambda *launch: launches.append(launch)):
        for name in NAMES[1:]:
            with pytest.raises(ValueError, match=rf"{name} is on meta, expected .* like x"):
                gated_residual_adaln(**given | {name: given[name].to("meta")}, impl="triton")
            with pytest.raises(ValueError, match=rf"{name} must be \(2, .*got"):
                gated_residual_adaln(**given | {name: given[name][..., :7]}, impl="triton")
        with pytest.raises(ValueError, match="cu_tokens is on meta"):
            adaln_modulate(
                x[0], shift, scale, cu_tokens=torch.empty(3, dtype=torch.int32, device="meta"), impl="triton"
            )
        for cu in (torch.zeros(1, 3), torch.zeros(0), torch.zeros(1)):
            with pytest.raises(ValueError, match=r"cu_tokens must be \(S \+ 1,\)"):
                adaln_modulate(x[0], shift, scale, cu_tokens=cu.int().to(DEVICE), impl="triton")
        with pytest.raises(ValueError, match="x must be"):
            adaln_modulate(x, shift, scale, cu_tokens=offsets([1, 2]), impl="triton")
    assert launches == []


@pytest.mark.skipif(DEVICE != "cpu", reason="only the interpreter's order can be chosen")
def test_k11_order_of_programs():
    lengths = [0, 140, 3, 0, 129, 1]
    given, cu = inputs((sum(lengths), 8), lengths), offsets(lengths)
    weights = weights_for(given)
    forwards = run(given, weights, impl="triton", cu=cu)
    with reversed_programs():
        same(run(given, weights, impl="triton", cu=cu), forwards)
    dense = inputs((2, 130, 8))
    forwards = run(dense, weights_for(dense), impl="triton")
    with reversed_programs():
        same(run(dense, weights_for(dense), impl="triton"), forwards)


def test_k11_broken_offsets_stay_inside():
    """cu_tokens that promise more rows than there are read and write nothing beyond x."""
    given = inputs((9, 8), [3, 6])
    with guarded_buffers():
        for broken in ([0, 3, 500], [-4, 3, 9], [0, 700, 9]):
            run(given, weights_for(given), impl="triton", cu=torch.tensor(broken, dtype=torch.int32, device=DEVICE))


# --- all of it together ------------------------------------------------------------------------


@st.composite
def calls(draw):
    names = draw(st.sampled_from([NAMES, PLAIN]))
    edge = st.sampled_from([0, 1, 2, 3, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 130])
    size = st.one_of(edge, st.integers(0, 130))
    width = draw(size)
    most = st.integers(0, max(1, 1500 // max(width, 8)))  # the interpreter is slow
    lengths = draw(st.one_of(st.none(), st.lists(st.one_of(size.filter(lambda n: n * width < 2500), most), max_size=4)))
    shape = (sum(lengths), width) if lengths is not None else (draw(st.integers(0, 3)), draw(most), width)
    given = inputs(
        shape, lengths, types=TYPES[draw(st.sampled_from(sorted(TYPES)))], seed=draw(st.integers(0, 99)), names=names
    )
    for n in names:
        layout = draw(st.sampled_from(["as is", "misaligned", "window", "columns apart"]))
        if layout != "as is" and given[n].numel():
            given[n] = LAYOUTS[layout](given[n])
    return given, None if lengths is None else offsets(lengths), draw(st.sets(st.sampled_from(names)))


@settings(max_examples=24, derandomize=True, deadline=None)
@given(calls())
def test_any_call(call):
    given, cu, needs = call
    full = compare(given, cu=cu)
    got = run(given, weights_for(given), impl="triton", cu=cu, needs=needs)
    same(got, (full[0], {n: full[1][n] if n in needs else None for n in given}))


# --- launches ----------------------------------------------------------------------------------


def test_presets_waste_no_register_and_short_samples_need_no_workspace():
    from phmdiff_fast.kernels import _adaln_triton as kernels

    for width in (384, 768, 1024, 1152):
        blocks = kernels._blocks(width, 8, most=24, fill=12)
        assert blocks["HEAD"] + blocks["TAIL"] == width
    launches = []
    for rows, expected in ((127, ["adaln_backward"]), (128, ["adaln_backward", "adaln_add_parts"])):
        given = {n: v.detach().requires_grad_() for n, v in inputs((2, rows, 8)).items()}
        with _launch.observe(lambda kernel, grid, args, meta: launches.append((kernel.__name__, grid))):
            out = gated_residual_adaln(*given.values(), impl="triton")
            launches.clear()
            torch.autograd.grad(out, list(given.values()), [o.detach() for o in out])
        assert [name for name, _ in launches] == expected
    assert launches[0][1] == (4,)


@pytest.mark.skipif(not _impl.INTERPRET, reason="the order of the axes is compiled in")
@pytest.mark.parametrize("lengths", [None, [5, 0, 9]])
def test_either_order_of_the_axes_gives_the_same(lengths, monkeypatch):
    """Which one is taken depends on Triton's version, and only one version is installed."""
    from phmdiff_fast.kernels import _adaln_triton

    given = inputs((2, 9, 96) if lengths is None else (14, 96), lengths)
    cu = None if lengths is None else offsets(lengths)
    one = run(given, weights_for(given), impl="triton", cu=cu)
    piece, row = _adaln_triton.PIECE_AXIS, _adaln_triton.ROW_AXIS
    monkeypatch.setattr(_adaln_triton, "PIECE_AXIS", row)
    monkeypatch.setattr(_adaln_triton, "ROW_AXIS", piece)
    other = run(given, weights_for(given), impl="triton", cu=cu)
    assert piece.value != row.value
    for a, b in zip([*one[0], *one[1].values()], [*other[0], *other[1].values()], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("types", TYPES.values(), ids=TYPES)
@pytest.mark.parametrize("width", [96, 384, 768, 1024, 1152])
def test_gpu_bits_are_the_same_every_run(width, types):
    given = inputs((8, 300, width), types=types)
    weights = weights_for(given)
    first = compare(given, weights=weights, small=False)
    for _ in range(20):
        same(run(given, weights, impl="triton"), first)


@pytest.mark.gpu
def test_gpu_more_elements_than_32_bits_count():
    shape = (3, 1 << 20, 1024)
    x = torch.empty(shape, device="cuda", dtype=BF16).normal_()
    shift, scale = torch.randn(3, 2048, device="cuda").bfloat16().chunk(2, 1)
    last = run({"x": x[2:], "shift": shift[2:], "scale": scale[2:]}, [x[2:]], impl="triton")
    got = run({"x": x, "shift": shift, "scale": scale}, [x], impl="triton")
    same(last, ([o[2:] for o in got[0]], {n: g[2:] for n, g in got[1].items()}))


@pytest.mark.gpu
def test_gpu_inside_a_cuda_graph():
    lengths = [100, 0, 300]
    given, cu = inputs((400, 384), lengths, types=TYPES["mixed bf16"]), offsets(lengths)
    weights = weights_for(given)
    eager = run(given, weights, impl="triton", cu=cu)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(given, weights, impl="triton", cu=cu)
    graph.replay()
    same(captured, eager)
