"""How the extension's operations are called: torch.compile, fakes, vmap, forward mode, wrong arguments."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import pytest
import torch
from pyramid_tools import (
    ALL,
    BF16,
    LINEAR,
    OPS,
    calls,
    check_empty,
    half,
    image,
    images_for,
    vector,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.library import opcheck

from phmdiff_fast.haar import haar3d, inverse_haar3d
from phmdiff_fast.kernels import _extension, _pyramid_ops
from phmdiff_fast.pyramid import build_pyramid, level_error, merge_state, upsample, upsample_add

pytestmark = pytest.mark.skipif(bool(_extension.problem()), reason=_extension.problem() or "the extension is there")


# --- how it is called ----------------------------------------------------------------------------


def op_arguments():
    x, eps = image((2, 3, 13, 9)).requires_grad_(), image((2, 3, 13, 9), seed=1).requires_grad_()
    coarse, v, ids = image((2, 3, 7, 5), seed=2).requires_grad_(), vector(2), torch.tensor([1, -5])
    held = torch.tensor(5), torch.tensor(7)
    levels = [image((2, 3, 7, 5)).requires_grad_(), image((2, 3, 4, 3)).requires_grad_()]
    return [
        ("build_pyramid", (x, 3, 0.5)),
        ("build_pyramid", (x, 2, 0.6)),
        ("build_pyramid_backward", (levels, 13, 9, 0.5)),
        ("merge_state", (x, eps, coarse, v, None, 0, 0, None, None, 0)),
        ("merge_state", (x, None, coarse, v, ids, 5, 7, None, None, 1)),
        ("merge_state", (x, None, None, v, ids, 0, 0, *held, 1)),
        ("upsample_add", (coarse, x, v, 13, 9)),
        ("upsample_add", (coarse, None, None, 13, 9)),
        ("level_error", (x.detach(), coarse.detach())),
        ("merge_backward", (x, v, None, True, True, True)),
        ("merge_backward", (x, v, None, False, True, False)),
        ("merge_backward", (x, None, v, False, False, True)),
        ("haar3d", (image((2, 3, 5, 4, 3)).requires_grad_(),)),
        ("inverse_haar3d", (image((2, 8, 3, 3, 2, 2)).requires_grad_(), 5, 4, 3)),
        ("philox_normals", (ids, 17, 5, 7, None, None, 1)),
        ("philox_integers", (ids, 17, 0, 0, *held, 1)),
    ]


@pytest.mark.parametrize("number", range(len(op_arguments()) if not _extension.problem() else 0))
def test_registered_operations_pass_opcheck(number):
    name, arguments = op_arguments()[number]
    opcheck(getattr(OPS, name).default, arguments)


def test_every_operation_of_the_library_is_checked_above():
    text = (Path(_pyramid_ops.__file__).resolve().parent.parent / "csrc" / "bind.cpp").read_text()
    defined = {line.split('m.def("')[1].split("(")[0] for line in text.splitlines() if "m.def(" in line}
    # adaLN, GELU and attention have tests of their own
    elsewhere = ("adaln", "gated_residual_adaln", "gelu", "short_attention")
    assert {name for name, _ in op_arguments()} == {name for name in defined if not name.startswith(elsewhere)}


def everything(y, coarse, ids, abar, seed, step):
    levels = build_pyramid(y, 3, impl="extension")
    fine = build_pyramid(y, 3, alpha=0.75, impl="extension")
    up = upsample(coarse, *y.shape[2:], impl="extension")
    state = merge_state(y, None, coarse, abar, rng=(seed, step), sample_ids=ids, impl="extension")
    state = state + upsample_add(coarse, y, abar, impl="extension") * level_error(
        y.detach(), coarse.detach(), impl="extension"
    )
    bands = haar3d(y[..., None, :], impl="extension")
    back = inverse_haar3d(2 * bands, shape=(y.shape[2], 1, y.shape[3]), impl="extension")[..., 0, :]
    return (state + up + back * y).sum() + sum(level.sum() for level in levels + fine)


def test_compiled_in_one_graph_for_any_size_seed_and_step():
    torch._dynamo.reset()
    counter, traced = CompileCounterWithBackend("aot_eager"), []
    compiled = torch.compile(everything, fullgraph=True, dynamic=True, backend=counter)

    def outcomes(f, size, seed, step):
        y = image(size, margins=False).requires_grad_()
        coarse = image((*size[:2], half(size[2]), half(size[3])), seed=1, margins=False).requires_grad_()
        out = f(y, coarse, torch.arange(size[0]), vector(size[0]), seed, step)
        return [out.detach(), *torch.autograd.grad(out, [y, coarse])]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number, (size, seed, step) in enumerate(
            [((2, 3, 13, 10), 5, 9), ((2, 3, 13, 10), 6, 9), ((2, 3, 13, 10), 2**62, 10), ((3, 2, 31, 24), 7, 3)]
        ):
            for a, b in zip(outcomes(compiled, size, seed, step), outcomes(everything, size, seed, step), strict=True):
                torch.testing.assert_close(a, b)
            # The first call may trace twice: alpha's default is tried as a variable first.
            traced.append(counter.frame_count)
            assert traced[-1] == traced[0], number
    torch._dynamo.reset()


def test_fake_tensors_have_the_shapes_of_real_ones():
    for name, alpha in [(n, 0.5) for n in ALL] + [("build_pyramid", 0.3)]:
        call, takes = calls((2, 3, 11, 15), alpha)[name]
        real = call("extension", **images_for(takes, (2, 3, 11, 15), BF16))
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = call(
                "extension", **{n: mode.from_tensor(v) for n, v in images_for(takes, (2, 3, 11, 15), BF16).items()}
            )
        for a, b in zip(*(o if isinstance(o, list) else [o] for o in (real, fake)), strict=True):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", ALL)
def test_vmap_gives_what_a_loop_gives(name):
    size = (2, 3, 9, 8)
    call, takes = calls(size)[name]
    sets = [images_for(takes, size), {n: v + 1 for n, v in images_for(takes, size).items()}]
    stacked = [torch.stack([s[n] for s in sets]) for n in takes]
    got = torch.vmap(lambda *v: call("extension", *v))(*stacked)
    loop = [call("extension", **{n: s[n] for n in takes}) for s in sets]
    for level, expected in enumerate(zip(*(o if isinstance(o, list) else [o] for o in loop), strict=True)):
        assert torch.equal(got[level] if isinstance(loop[0], list) else got, torch.stack(expected))


def test_forward_mode_gives_no_silent_zero():
    import torch.autograd.forward_ad as forward

    for name in LINEAR:
        call, takes = calls((1, 1, 4, 6))[name]
        images = images_for(takes, (1, 1, 4, 6))
        with forward.dual_level():
            try:
                out = call("extension", **{n: forward.make_dual(v, torch.ones_like(v)) for n, v in images.items()})
            except (RuntimeError, NotImplementedError):
                continue
            out = out[0] if isinstance(out, list) else out
            assert forward.unpack_dual(out).tangent is not None, name


def test_the_extension_is_what_runs_unless_told_otherwise(monkeypatch):
    seen = []

    class Watched:
        def __getattr__(self, op):
            seen.append(op)
            return getattr(OPS, op)

    monkeypatch.setattr(_pyramid_ops, "ops", Watched())
    y, coarse, v = image((2, 1, 6, 6)), image((2, 1, 3, 3)), vector(2)
    for impl, expected in ((None, ["build_pyramid", "merge_state", "upsample_add", "upsample_add", "level_error"]),
                           ("reference", [])):  # fmt: skip
        seen.clear()
        build_pyramid(y, 2, impl=impl)
        merge_state(y, y, coarse, v, impl=impl)
        upsample(coarse, 6, 6, impl=impl)
        upsample_add(coarse, y, v, impl=impl)
        level_error(y, coarse, impl=impl)
        assert seen == expected


# --- wrong arguments ---------------------------------------------------------------------------

Y, C = torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 2, 2)
V, IDS = torch.ones(2), torch.zeros(2, dtype=torch.int64)
META = torch.zeros(2, 1, 4, 4, device="meta")


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda i: build_pyramid(Y[0], 2, impl=i), ValueError, "x must be"),
        (lambda i: build_pyramid(Y.long(), 2, impl=i), TypeError, "x must be floating"),
        (lambda i: build_pyramid(Y, 2, alpha=1.0, impl=i), ValueError, "alpha"),
        (lambda i: build_pyramid(Y, 2, alpha=0.0, impl=i), ValueError, "alpha"),
        (lambda i: build_pyramid(Y[..., :0], 2, impl=i), ValueError, "x has no pixels"),
        (lambda i: upsample(C, 5, 4, impl=i), ValueError, "coarse"),
        (lambda i: upsample(C, 4, 5, impl=i), ValueError, "coarse"),
        (lambda i: upsample(C[0], 4, 4, impl=i), ValueError, "coarse"),
        (lambda i: merge_state(Y, Y[..., :3], C, V, impl=i), ValueError, "eps"),
        (lambda i: merge_state(Y, Y[:1], C, V, impl=i), ValueError, "eps"),
        (lambda i: merge_state(Y, Y.double(), C, V, impl=i), TypeError, "eps is float64"),
        (lambda i: merge_state(Y, Y, C.half(), V, impl=i), TypeError, "coarse is float16"),
        (lambda i: merge_state(Y, Y, C[..., :1], V, impl=i), ValueError, "coarse"),
        (lambda i: merge_state(Y, Y, C[:1], V, impl=i), ValueError, "coarse"),
        (lambda i: merge_state(Y, Y, C, V[:1], impl=i), ValueError, "abar"),
        (lambda i: merge_state(Y, Y, C, V[:, None], impl=i), ValueError, "abar"),
        (lambda i: merge_state(Y, None, C, V, impl=i), ValueError, "eps"),
        (lambda i: merge_state(Y, Y, C, V, rng=(1, 2), sample_ids=IDS, impl=i), ValueError, "eps"),
        (lambda i: merge_state(Y, None, C, V, rng=(1, 2), impl=i), ValueError, "sample_ids"),
        (lambda i: merge_state(Y, None, C, V, rng=(1, 2), sample_ids=IDS[:1], impl=i), ValueError, "sample_ids"),
        (lambda i: upsample_add(C, Y[..., :3, :2], V, impl=i), ValueError, "coarse"),
        (lambda i: upsample_add(C, Y.bfloat16(), V, impl=i), TypeError, "coarse is float32"),
        (lambda i: upsample_add(C, Y, V[:1], impl=i), ValueError, "weight"),
        (lambda i: level_error(Y, C[..., :1], impl=i), ValueError, "coarse"),
        (lambda i: level_error(Y, C.double(), impl=i), TypeError, "coarse is float64"),
        (lambda i: upsample_add(C, META, V, impl=i), ValueError, "coarse is on cpu"),
        (lambda i: merge_state(Y, META, None, V, impl=i), ValueError, "eps is on meta"),
        (lambda i: merge_state(Y, Y, None, V.to("meta"), impl=i), ValueError, "abar is on meta"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("impl", [None, "extension", "reference"])
def test_wrong_arguments_are_named(call, kind, message, impl):
    with pytest.raises(kind, match=message):
        call(impl)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: OPS.build_pyramid(Y[0], 1, 0.5), "B, C, H, W"),
        (lambda: OPS.build_pyramid(Y, 0, 0.5), "levels"),
        (lambda: OPS.build_pyramid(Y, 25, 0.5), "levels"),
        (lambda: OPS.build_pyramid(Y, 1, math.nan), "alpha"),
        (lambda: OPS.build_pyramid(Y, 1, 1.5), "alpha"),
        (lambda: OPS.build_pyramid(Y[:, :, :0], 1, 0.5), "no pixels"),
        (lambda: OPS.build_pyramid(Y.int(), 1, 0.5), "element type"),
        (lambda: OPS.build_pyramid_backward([], 4, 4, 0.5), "no tensor arguments"),
        (lambda: OPS.build_pyramid_backward([C, C], 4, 4, 0.5), "gradient 1"),
        (lambda: OPS.build_pyramid_backward([C, C[..., :1, :1].double()], 4, 4, 0.5), "element type"),
        (lambda: OPS.build_pyramid_backward([C[0]], 4, 4, 0.5), "B, C, H, W"),
        (lambda: OPS.merge_state(Y, Y[..., :3], None, V, None, 0, 0, None, None, 0), "eps"),
        (lambda: OPS.merge_state(Y, Y.half(), None, V, None, 0, 0, None, None, 0), "eps"),
        (lambda: OPS.merge_state(Y, Y, None, V, IDS, 0, 0, None, None, 0), "eps"),
        (lambda: OPS.merge_state(Y, None, None, V, IDS[:1], 0, 0, None, None, 0), "sample_ids"),
        (lambda: OPS.merge_state(Y, None, None, V, V, 0, 0, None, None, 0), "sample_ids"),
        (lambda: OPS.merge_state(Y, None, None, V, IDS, 0, 0, V[0], None, 0), "seed"),
        (lambda: OPS.merge_state(Y, None, None, V, IDS, 0, 0, None, IDS, 0), "seed and step"),
        (lambda: OPS.merge_state(Y, None, C[..., :1], V, None, 0, 0, None, None, 0), "coarse"),
        (lambda: OPS.merge_state(Y, None, C.double(), V, None, 0, 0, None, None, 0), "coarse"),
        (lambda: OPS.merge_state(Y, None, None, V[:1], None, 0, 0, None, None, 0), "abar"),
        (lambda: OPS.merge_state(Y, None, None, V.double(), None, 0, 0, None, None, 0), "abar"),
        (lambda: OPS.merge_state(Y, None, None, V[:1].expand(2), None, 0, 0, None, None, 0), "abar"),
        (lambda: OPS.upsample_add(C, Y[..., :3, :], None, 4, 4), "x must be"),
        (lambda: OPS.upsample_add(C, None, None, 6, 4), "coarse"),
        (lambda: OPS.upsample_add(C[0], None, None, 4, 4), "B, C, H, W"),
        (lambda: OPS.upsample_add(C, Y, V[:1], 4, 4), "weight"),
        (lambda: OPS.level_error(Y, C[:1]), "coarse"),
        (lambda: OPS.merge_backward(Y[0], V, None, True, True, True), "B, C, H, W"),
        (lambda: OPS.merge_backward(Y, V[:1], None, True, True, True), "abar"),
        (lambda: OPS.merge_backward(Y, None, V[:1], True, True, True), "weight"),
        (lambda: OPS.philox_normals(IDS, -1, 0, 0, None, None, 0), "numbers"),
        (lambda: OPS.philox_integers(IDS, 2**32 + 1, 0, 0, None, None, 0), "numbers"),
        (lambda: OPS.philox_normals(IDS, 2**34 + 1, 0, 0, None, None, 0), "numbers"),
        (lambda: OPS.philox_normals(IDS.int(), 1, 0, 0, None, None, 0), "sample_ids"),
        (lambda: OPS.philox_normals(IDS[:1].expand(2), 1, 0, 0, None, None, 0), "sample_ids"),
    ],
)  # fmt: skip
def test_operations_called_with_wrong_arguments_say_so(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()


def test_sample_ids_that_are_no_integers_are_named():
    with pytest.raises(TypeError, match="sample_ids"):
        merge_state(Y, None, None, V, rng=(1, 2), sample_ids=V, impl="extension")


def test_images_of_another_rank_are_refused_by_the_operations():
    for bad in (Y[0], Y[0, 0], Y[None]):
        for call in (lambda bad=bad: OPS.merge_state(bad, None, None, V, None, 0, 0, None, None, 0),
                     lambda bad=bad: OPS.level_error(bad, C),
                     lambda bad=bad: OPS.upsample_add(C, bad, None, 4, 4)):  # fmt: skip
            with pytest.raises(RuntimeError):
                call()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("size", [(0, 3, 6, 5), (3, 0, 6, 5), (0, 0, 1, 1)], ids=str)
def test_empty_batches_give_empty_results_and_gradients(name, size):
    for alpha in (0.5, 0.75):
        check_empty(name, size, alpha, levels=4)


def test_no_rows_or_columns_merge_to_nothing():
    for size in ((2, 1, 0, 4), (2, 1, 4, 0)):
        y, coarse = torch.zeros(size), torch.zeros(2, 1, half(size[2]), half(size[3]))
        assert merge_state(y, y, coarse, V, impl="extension").shape == size
        assert [g.shape for g in OPS.merge_backward(y, V, None, True, False, True)] == [y.shape, coarse.shape]
