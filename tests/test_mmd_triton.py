"""The MMD's Triton tiles against float64, forward and every gradient, and rows K2 to K11 of the fault matrix."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_tools import (
    DEVICE,
    guarded_buffers,
    in_margins,
    needs_triton,
    no_worse_than_eager,
    reversed_programs,
)
from test_mmd import oracle, within
from torch._subclasses import FakeTensorMode

from phmdiff_fast.kernels import _impl, _launch
from phmdiff_fast.kernels.mmd import mmd2, mmd2_reference

pytestmark = needs_triton
HALVES = [torch.float16, torch.bfloat16]
DTYPES = [torch.float32, *HALVES]


def sets(n, m, d, dtype=torch.float32, seed=0, mean=0.3, spread=1.3):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, d, generator=g) + mean, torch.randn(m, d, generator=g) * spread + mean
    return tuple(t.to(DEVICE, dtype).requires_grad_() for t in (x, y))


def both(x, y, bandwidths=None, estimator="biased", impl="triton"):
    """(value, gradients of the inputs that need one) for an incoming gradient of 3."""
    value = mmd2(x, y, bandwidths, estimator=estimator, impl=impl)
    wanted = [t for t in (x, y) if t.requires_grad]
    return value, torch.autograd.grad(value, wanted, value.new_full((), 3.0)) if wanted else ()


def plain(x, y, bandwidths, estimator):
    """Eager PyTorch in the type of the rows throughout: what 16 bits give without care."""
    if bandwidths is None:
        pooled = torch.cat([x, y]).detach().double()
        m = 2 * float(pooled.var(0, correction=0).sum())
        bandwidths = [m * 2.0**j for j in range(-2, 3)]

    def kernel(a, b):
        squared = (a[:, None] - b[None]).square().sum(2)
        return sum(torch.exp(-squared / w) for w in bandwidths) / len(bandwidths)

    xx, yy, xy = kernel(x, x), kernel(y, y), kernel(x, y)
    if estimator == "biased":
        return (xx.mean() + yy.mean() - 2 * xy.mean()).float()
    off = [(k.sum() - k.diagonal().sum()) / (len(k) * (len(k) - 1)) for k in (xx.float(), yy.float())]
    return off[0] + off[1] - 2 * xy.float().mean()


@pytest.fixture(autouse=True)
def processors(request, monkeypatch):
    """Off a GPU a launch is for one processor, many tiles a program, unless a test says otherwise."""
    number = getattr(request, "param", 1 if DEVICE == "cpu" else 0)
    if number:
        monkeypatch.setattr(_launch, "processors", lambda device: number)


@pytest.mark.parametrize(
    ("bandwidths", "estimator"),
    [(None, "biased"), (None, "unbiased"), ([2.0, 9.0, 31.0], "biased"), ([2.0, 9.0, 31.0], "unbiased")],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_worse_than_eager_in_the_same_type(dtype, bandwidths, estimator):
    shapes = [(5, 3, 3), (65, 40, 17), (30, 100, 48)] + [(60, 65, 150)] * (bandwidths is None)
    found = []
    for seed, shape in enumerate(shapes):
        x, y = sets(*shape, dtype, seed)
        wide = [t.detach().double().requires_grad_() for t in (x, y)]
        exact = mmd2_reference(*wide, bandwidths, estimator=estimator)
        eager = (mmd2_reference if dtype == torch.float32 else plain)(x, y, bandwidths, estimator=estimator)
        got = mmd2(x, y, bandwidths, estimator=estimator, impl="triton")
        found.append((got.detach(), eager.detach(), exact.detach()))
        grads = [torch.autograd.grad(v, i) for v, i in ((got, (x, y)), (eager, (x, y)), (exact, wide))]
        for name, *three in zip("xy", *grads, strict=True):
            no_worse_than_eager(*three, small=True, name=f"{shape} d{name}")
    got, eager, exact = (torch.stack(each) for each in zip(*found, strict=True))
    # Values are differences of numbers near 1: one rounding of those.
    assert float((got - exact).abs().max()) <= 2 * float((eager - exact).abs().max()) + 2.0**-23


@pytest.mark.parametrize(("mean", "apart"), [(0.0, 1.0), (1.5, 1.0), (0.0, 0.02)])
def test_16_bit_rows_near_the_origin_lose_nothing_but_the_last_rounding(mean, apart):
    """Their centred copies are exact, so the error is that of float32 with gradients rounded once.

    Of sets nearly alike (apart 0.02) the gradient is a small difference of many slopes.
    """
    x, y = sets(90, 90, 24, torch.float16, mean=mean)
    with torch.no_grad():
        y.copy_(apart * y + (1 - apart) * x)
    exact = oracle(x, y)
    value, got = both(x, y)
    assert float(value.detach()) == pytest.approx(exact.value, abs=3e-7)
    in_float32 = torch.autograd.grad(mmd2_reference(x, y), (x, y), torch.tensor(3.0, device=DEVICE))
    for name, *three in zip("xy", got, in_float32, [3 * g for g in exact.gradients], strict=True):
        no_worse_than_eager(*three, name=name)


rows = st.one_of(st.integers(1, 130), st.sampled_from([1, 2, 63, 64, 65, 127, 128, 129]))
columns = st.one_of(st.integers(1, 130), st.sampled_from([1, 15, 16, 17, 31, 33, 64, 65, 127, 128, 129]))


@st.composite
def views(draw):
    """How rows lie in memory: offset, row and column steps, transposed, one row repeated."""
    kind = draw(st.sampled_from(["plain", "offset", "steps", "transposed", "repeated"]))
    return kind, draw(st.integers(1, 3)), draw(st.integers(1, 3))


def laid_out(values: torch.Tensor, kind: str, a: int, b: int) -> torch.Tensor:
    n, d = values.shape
    if kind == "offset":
        whole = values.new_full((n + a, d + b), torch.nan)
        view = whole[a:, b:]
    elif kind == "steps":
        whole = values.new_full((n * (a + 1), d * (b + 1)), torch.nan)
        view = whole[:: a + 1, :: b + 1]
    elif kind == "transposed":
        whole = values.new_full((d + a, n + b), torch.nan)
        view = whole[a:, b:].T
    elif kind == "repeated":
        return values[:1].expand(n, d)
    else:
        return in_margins(values)
    view.copy_(values)
    return view


@settings(max_examples=20, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape_layout_scale_and_subset_of_gradients(data):
    n, m, d = data.draw(rows, "n"), data.draw(rows, "m"), data.draw(columns, "d")
    dtype, list_of = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from([None, None, [3.0, 0.5]]))
    estimator = data.draw(st.sampled_from(["biased", "unbiased"] if min(n, m) > 1 else ["biased"]))
    scale, mean = data.draw(st.sampled_from([1.0, 1e-3, 50.0])), data.draw(st.sampled_from([0.0, 0.0, 4.0]))
    needed = data.draw(st.tuples(st.booleans(), st.booleans()))
    bandwidths = None if list_of is None else [w * d * scale**2 for w in list_of]
    x, y = (scale * t.detach().float() for t in sets(n, m, d, mean=mean, seed=n + m))
    x, y = (laid_out(t.to(dtype), *data.draw(views())) for t in (x, y))
    x, y = (t.detach().requires_grad_(need) for t, need in zip((x, y), needed, strict=True))
    with guarded_buffers():
        value, grads = both(x, y, bandwidths, estimator)
    exact = oracle(x, y, bandwidths, estimator == "unbiased")
    assert value.dtype == torch.float32
    within(value, exact.value, exact.value_slack)
    wanted = [(g, s) for g, s, need in zip(exact.gradients, exact.slacks, needed, strict=True) if need]
    assert len(grads) == len(wanted)
    tiny = 3 * torch.finfo(dtype).tiny  # float16 gradients of large sets of large rows are subnormal
    for got, (gradient, slack) in zip(grads, wanted, strict=True):
        assert got.dtype == dtype
        within(got, 3 * gradient, 3 * slack + tiny)


@pytest.mark.parametrize(
    ("n", "m", "bandwidths"), [(130, 200, None), (200, 64, None), (1, 200, None), (70, 130, [2.0, 9.0])]
)
@pytest.mark.parametrize("processors", [1, 132], indirect=True)
def test_walks_of_many_tiles(n, m, bandwidths):
    """Odd and even numbers of blocks, both sets in one walk, and every share of the walk."""
    x, y = sets(n, m, 20)
    with guarded_buffers():
        value, grads = both(x, y, bandwidths)
    exact = oracle(x, y, bandwidths)
    within(value, exact.value, exact.value_slack)
    for got, gradient, slack in zip(grads, exact.gradients, exact.slacks, strict=True):
        within(got, 3 * gradient, 3 * slack)


def test_more_partial_sums_than_one_load_takes():
    """The last kernel by itself: 3000 partial sums, and the norms of 2000 blocks."""
    from phmdiff_fast.kernels import _mmd_triton

    n = m = 1000 * _mmd_triton.ROWS
    partials, energy = torch.rand(3000).to(DEVICE), torch.rand(2001).to(DEVICE)
    energy[-1] = 1e-3
    value, rate = torch.empty((), device=DEVICE), torch.empty(1, device=DEVICE)
    _launch.launch(_mmd_triton._finish_kernel, (1,), partials, energy, value, rate, 3000, n, m,
                   ROWS=_mmd_triton.ROWS, BLOCK=1024, LADDER=True, UNBIASED=False, num_warps=4)  # fmt: skip
    assert float(value) == pytest.approx(float(partials.double().sum()) + 1 / n + 1 / m, rel=1e-6)
    assert float(rate) == pytest.approx(1 / (8 * (float(energy[:-1].double().sum()) / (n + m) - 1e-3)), rel=1e-4)


def test_the_order_of_rows_does_not_matter():
    """Each gradient goes with its row, and the value stays: only sums are added in another order."""
    x, y = sets(70, 90, 5)
    value, (dx, dy) = both(x, y)
    px, py = torch.randperm(70, device=DEVICE), torch.randperm(90, device=DEVICE)
    again, (gx, gy) = both(*(t.detach()[p].requires_grad_() for t, p in ((x, px), (y, py))))
    assert abs(float(again.detach() - value.detach())) < 1e-6
    torch.testing.assert_close(gx, dx[px], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gy, dy[py], rtol=1e-4, atol=1e-6)


def test_extreme_values():
    same = torch.ones(70, 20, device=DEVICE)
    value, grads = both(same.clone().requires_grad_(), same[:5].clone().requires_grad_())
    assert float(value.detach()) == pytest.approx(0, abs=1e-6)
    assert not any(g.any() for g in grads)
    for scale in (1e-15, 1e14):
        x, y = (t.detach() * scale for t in sets(20, 30, 5))
        assert float(mmd2(x, y, impl="triton")) == pytest.approx(oracle(x, y).value, rel=1e-4)
    x, y = (t.detach() + 3000 for t in sets(70, 80, 5, mean=0.0))
    assert float(mmd2(x, y, impl="triton")) == pytest.approx(oracle(x, y).value, abs=1e-6)
    x, y = sets(20, 80, 5)
    wide = mmd2(x, y, [float("inf"), 1e38], impl="triton")
    assert float(wide.detach()) == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        x[3, 2] = torch.nan
    assert mmd2(x, y, impl="triton").isnan()


def test_far_apart_blocks_of_16_bit_rows_keep_their_slopes():
    """With few rows against many the two weights differ 200 fold: they must not be rounded with the slopes."""
    x, y = sets(2, 400, 8, torch.float16)
    exact, (_, grads) = oracle(x, y), both(x, y)
    for got, gradient in zip(grads, exact.gradients, strict=True):
        assert float((got - 3 * gradient).norm() / (3 * gradient).norm()) < 1.5e-3


def test_results_are_the_same_bits_again_and_do_not_depend_on_the_order_of_programs():
    x, y = sets(130, 75, 20, torch.float16)
    once = both(x, y)
    again = both(x, y)
    assert torch.equal(once[0], again[0])
    assert all(torch.equal(a, b) for a, b in zip(once[1], again[1], strict=True))
    if DEVICE == "cpu":
        with reversed_programs():
            other = both(x, y)
        assert torch.equal(once[0], other[0])
        assert all(torch.equal(a, b) for a, b in zip(once[1], other[1], strict=True))


def test_k2_single_rows_and_no_columns():
    x, y = sets(1, 1, 3)
    value, grads = both(x, y)
    within(value, oracle(x, y).value, 1e-6)
    assert [g.shape for g in grads] == [(1, 3), (1, 3)]
    with launches() as seen:
        value, grads = both(torch.empty(3, 0, device=DEVICE, requires_grad=True),
                            torch.empty(2, 0, device=DEVICE, requires_grad=True))  # fmt: skip
    assert not seen
    assert float(value) == 0
    assert [g.shape for g in grads] == [(3, 0), (2, 0)]
    with pytest.raises(ValueError, match="1 rows or more"):
        mmd2(x[:0], y, impl="triton")


@pytest.mark.parametrize("kind", ["offset", "steps", "transposed", "repeated", "plain"])
def test_k3_strides_give_the_bits_of_the_contiguous_result(kind):
    x, y = (t.detach() for t in sets(70, 66, 18))
    if kind == "repeated":
        x, y = x[:1].expand(70, 18), y[:1].expand(66, 18)
    packed = both(x.contiguous().requires_grad_(), y.contiguous().requires_grad_())
    strided = both(laid_out(x, kind, 1, 3).detach().requires_grad_(), laid_out(y, kind, 2, 1).detach().requires_grad_())
    assert torch.equal(packed[0], strided[0])
    assert all(torch.equal(a, b) for a, b in zip(packed[1], strided[1], strict=True))


def test_k4_types_that_triton_does_not_do_are_refused():
    x, y = (t.detach() for t in sets(8, 9, 3))
    with pytest.raises(_impl.BackendError, match="float64"):
        mmd2(x.double(), y.double(), impl="triton")
    with pytest.raises(TypeError, match=r"y must be torch\.float32"):
        mmd2(x, y.half(), impl="triton")
    with pytest.raises(TypeError, match="x must be floating point"):
        mmd2(x.int(), y.int(), impl="triton")
    with pytest.raises(_impl.BackendError, match="bandwidths needs a gradient"):
        mmd2(x, y, torch.ones(2, device=DEVICE, requires_grad=True), impl="triton")


def test_k5_offsets_beyond_31_bits():
    try:
        whole = torch.empty(2**31 + 4096, dtype=torch.float16, device=DEVICE)  # never written: no memory
    except RuntimeError:
        pytest.skip("no 4 GiB of addresses")
    far = whole.as_strided((3, 4), (2**30, 1))
    values = torch.randn(3, 4).to(whole)
    far.copy_(values)
    other = torch.randn(5, 4).to(whole)
    assert torch.equal(mmd2(far, other, impl="triton"), mmd2(values, other, impl="triton"))
    assert torch.equal(mmd2(other, far, impl="triton"), mmd2(other, values, impl="triton"))
    across = whole.as_strided((4, 3), (1, 2**30))
    across.copy_(values.T)
    assert torch.equal(mmd2(across, other[:, :3], impl="triton"), mmd2(values.T, other[:, :3], impl="triton"))


class launches:
    """The kernels launched inside, by name, and their grids."""

    def __enter__(self):
        self.original, seen = _launch.launch, []

        def launch(kernel, grid, *args, **meta):
            if 0 not in grid:
                seen.append((kernel.fn.__name__ if hasattr(kernel, "fn") else kernel.__name__, grid))
            self.original(kernel, grid, *args, **meta)

        _launch.launch = launch
        return seen

    def __exit__(self, *_):
        _launch.launch = self.original


@pytest.mark.parametrize("needed", [(False, False), (True, False), (False, True), (True, True)])
def test_k6_only_the_gradients_needed_are_computed(needed):
    x, y = (t.detach().requires_grad_(n) for t, n in zip(sets(130, 66, 18), needed, strict=True))
    whole = both(*sets(130, 66, 18))[1]
    with launches() as seen:
        _, grads = both(x, y)
    assert [grid[0] for name, grid in seen if name == "_slopes_kernel"] == [
        b for b, n in zip((3, 2), needed, strict=True) if n
    ]
    assert len(seen) == 4 + 2 * sum(needed)
    wanted = [g for g, n in zip(whole, needed, strict=True) if n]
    assert all(torch.equal(a, b) for a, b in zip(grads, wanted, strict=True))
    with torch.no_grad():
        assert not mmd2(x, y, impl="triton").requires_grad


def test_k7_a_second_derivative_raises():
    x, y = sets(8, 9, 3)
    value = mmd2(x, y, impl="triton")
    (first,) = torch.autograd.grad(value, x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        (value + first.square().sum()).backward()  # where a missing second derivative would go unseen


@pytest.mark.parametrize("bandwidths", [None, [2.0, 5.0]])
@pytest.mark.parametrize("dynamic", [False, True])
def test_k8_compiles_to_one_graph(dynamic, bandwidths):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, y: mmd2(x * 1, y, bandwidths, impl="triton"), fullgraph=True,
                             backend="aot_eager", dynamic=dynamic)  # fmt: skip
    for n in (9, 20) if dynamic else (9,):
        x, y = sets(n, 2 * n, 5)
        (value, grads), got = both(x, y, bandwidths), compiled(x, y)
        assert torch.equal(value, got)
        found = torch.autograd.grad(got, (x, y), got.new_tensor(3.0))
        assert all(torch.equal(a, b) for a, b in zip(grads, found, strict=True))


def test_k8_opcheck():
    x, y = sets(9, 12, 5)
    rates = torch.tensor([0.5, 2.0], device=DEVICE)
    for of_list in (None, rates):
        torch.library.opcheck(torch.ops.phmdiff_fast.mmd2, (x, y, of_list, False, True))
        _, z, norms, rate = (t.detach() for t in torch.ops.phmdiff_fast.mmd2(x, y, of_list, False, True))
        rest = (9, 12, 5, of_list is None, False, True, True, False)
        kept = rate if of_list is None else of_list
        torch.library.opcheck(torch.ops.phmdiff_fast.mmd2_backward, (x.new_ones(()), z, norms, kept, *rest))


def test_k8_autocast_changes_nothing():
    x, y = sets(40, 50, 6)
    with torch.autocast(DEVICE, torch.bfloat16):
        value, grads = both(x, y)
    plain_value, plain_grads = both(x, y)
    assert value.dtype == torch.float32
    assert torch.equal(value, plain_value)
    assert all(torch.equal(a, b) for a, b in zip(grads, plain_grads, strict=True))


@pytest.mark.parametrize("bandwidths", [None, [2.0, 5.0], "tensor"])
def test_k9_no_value_is_read_on_the_host(bandwidths):
    """The backward is called by itself: without a GPU, PyTorch's autograd aborts on its tensors."""
    with FakeTensorMode(), torch.no_grad():
        x, y = (torch.empty(n, 7, device="cuda", dtype=torch.bfloat16) for n in (30, 20))
        of_list = torch.empty(3, device="cuda") if bandwidths == "tensor" else bandwidths
        value = mmd2(x, y, of_list)  # no implementation is forced
        rates = None if bandwidths is None else torch.empty(3, device="cuda")
        _, *kept = torch.ops.phmdiff_fast.mmd2(x, y, rates, False, True)
        grads = torch.ops.phmdiff_fast.mmd2_backward(value, *kept, 30, 20, 7, rates is None, False, True, True, False)
    assert (value.device.type, value.shape, value.dtype) == ("cuda", (), torch.float32)
    assert [(g.shape, g.dtype) for g in grads] == [((30, 7), x.dtype), ((0, 7), y.dtype)]


def test_k4_float64_on_a_gpu_takes_the_blocks_with_a_warning():
    with FakeTensorMode(), torch.no_grad():
        x, y = (torch.empty(n, 7, device="cuda", dtype=torch.float64) for n in (30, 20))
        with pytest.warns(UserWarning, match="float64"):
            assert mmd2(x, y).dtype == torch.float64


def test_k10_wrong_arguments_launch_nothing():
    x, y = (t.detach() for t in sets(8, 9, 3))
    with launches() as seen:
        for arguments, message in {
            (x, y.to("meta")): "y is on meta, expected",
            (x, y[:, :2]): r"\(n, d\)",
            (x[0], y): r"\(n, d\)",
            (x, y, torch.ones(2, device="meta")): "bandwidths is on meta",
        }.items():
            with pytest.raises(ValueError, match=message):
                mmd2(*arguments, impl="triton")
    assert not seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("bandwidths", [None, [2.0, 5.0]])
def test_k11_nothing_outside_the_buffers_is_read_or_written(dtype, bandwidths):
    for n, m, d in ((65, 3, 7), (3, 64, 65)):
        x, y = sets(n, m, d, dtype)
        expected = both(x, y, bandwidths)
        with guarded_buffers():
            value, grads = both(in_margins(x), in_margins(y), bandwidths)
        assert torch.equal(value, expected[0])
        assert all(torch.equal(a, b) for a, b in zip(grads, expected[1], strict=True))


@pytest.mark.gpu
def test_k9_a_cuda_graph_replays():
    x, y = sets(300, 200, 48)
    eager = both(x, y, [4.0, 90.0]), both(x, y)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        both(x, y, [4.0, 90.0]), both(x, y)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = both(x, y, [4.0, 90.0]), both(x, y)
    graph.replay()
    for (a, ga), (b, gb) in zip(eager, recorded, strict=True):
        assert torch.equal(a, b)
        assert all(torch.equal(p, q) for p, q in zip(ga, gb, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_k11_a_thousand_runs_give_the_same_bits(dtype):
    x, y = sets(1000, 900, 48, dtype)
    value, grads = both(x, y)
    for _ in range(1000):
        again, more = both(x, y)
        assert torch.equal(value, again)
        assert all(torch.equal(a, b) for a, b in zip(grads, more, strict=True))


@pytest.mark.gpu
def test_65536_rows_need_memory_for_rows_alone():
    x, y = sets(65536, 65536, 64)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both(x, y)
    assert torch.cuda.max_memory_allocated() - before < 8 * (x.nbytes + y.nbytes)
