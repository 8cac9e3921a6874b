"""Attention against its equation, on every backend and path; which backend is taken; device and precision."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from kernel_tools import needs_triton, no_worse_than_eager
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from phmdiff_fast import attention
from phmdiff_fast.attention import NAMES, attend, attend_packed, choose, use, why_not
from phmdiff_fast.device import pick_device, pick_precision
from phmdiff_fast.errors import PhmdiffError
from phmdiff_fast.packing import Packing

CPU, CUDA, BF16 = torch.device("cpu"), torch.device("cuda"), torch.bfloat16
LENGTHS = [(16, 64), (64, 32, 12), (5,), (7, 7), (1, 3)]
HEADS, DIM = 2, 16


@pytest.fixture(autouse=True)
def _as_before(monkeypatch):
    """Each test begins with auto, and what it taught the caches goes with it."""
    monkeypatch.delenv("PHMDIFF_ATTENTION", raising=False)
    caches = [attention._resolved, attention._why_not_xformers, attention._xformers, attention._block_diagonal,
              attention._why_not_varlen]  # fmt: skip
    with use("auto"):
        yield
    monkeypatch.undo()
    for cache in caches:
        cache.cache_clear()


def equation(q, k, v):
    """(..., N, d): in whatever precision these have."""
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1) @ v


def by_sequence(qkv, heads, packing):
    """(T, 3 D) -> (T, D), a sequence for itself."""
    done = []
    for rows in qkv.split([length for length in packing.lengths for _ in range(packing.batch)]):
        q, k, v = rows.view(len(rows), 3, heads, -1).permute(1, 2, 0, 3)  # (heads, N, d)
        done.append(equation(q, k, v).transpose(0, 1).flatten(1))
    return torch.cat(done)


def with_gradient(function, qkv, weight):
    qkv = qkv.detach().clone().requires_grad_()
    out = function(qkv)
    return out.detach(), *torch.autograd.grad((out * weight.to(out)).sum(), qkv)


def check_packed(packing, dtype, device="cpu", heads=HEADS, dim=DIM):
    """Result and gradient, packed and (where all lengths are one) dense, no worse than the equation in this type."""
    qkv = torch.randn(packing.tokens, 3 * heads * dim, device=device).to(dtype)
    weight = torch.randn(packing.tokens, heads * dim, device=device)
    exact = with_gradient(lambda x: by_sequence(x, heads, packing), qkv.double(), weight)
    eager = with_gradient(lambda x: by_sequence(x, heads, packing), qkv, weight)
    ways = {"packed": lambda x: attend_packed(x, heads, packing)}
    if len(set(packing.lengths)) == 1:
        ways["dense"] = lambda x: attend(x.unflatten(0, (-1, packing.longest)), heads).flatten(0, 1)
    for way, function in ways.items():
        for what, *of in zip(("result", "gradient"), with_gradient(function, qkv, weight), eager, exact, strict=True):
            no_worse_than_eager(*of, small=True, name=f"{way} {what}")


class Operations(TorchDispatchMode):
    """Names of the operations that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("dense", [1024, 0])
def test_attend_is_its_equation(dtype, bound, dense, monkeypatch):
    monkeypatch.setattr(attention, "DENSE_TOKENS", dense)  # 0: bf16 goes through SDPA too
    qkv = torch.randn(2, 10, 3 * 24, dtype=torch.float64).to(dtype)
    expected = by_sequence(qkv.double().flatten(0, 1), 3, Packing(2, (10,))).view(2, 10, 24)
    got = attend(qkv, 3)
    assert got.dtype == dtype
    assert float((got.double() - expected).abs().max()) < bound * float(expected.abs().max())


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("name", ["auto", "sdpa", "products"])
def test_packed_is_each_sequence_for_itself(name, dtype, lengths):
    with use(name):
        check_packed(Packing(2, lengths), dtype)


@pytest.mark.parametrize("name", ["auto", "sdpa", "products"])
def test_sequences_do_not_see_each_other(name):
    packing = Packing(3, (6, 4, 2))
    qkv = torch.randn(packing.tokens, 3 * 32)
    other = qkv.clone()
    other[18 + 4 : 18 + 8] += 1.0  # the second sequence of the second level
    with use(name):
        before, after = attend_packed(qkv, HEADS, packing), attend_packed(other, HEADS, packing)
    changed = (before != after).any(1)
    assert changed[22:26].all()
    assert int(changed.sum()) == 4


def test_autocast_decides_the_type(monkeypatch):
    taken, original = [], attention._dense
    monkeypatch.setattr(attention, "_dense", lambda x, heads, name: taken.append(name) or original(x, heads, name))
    packing = Packing(2, (9, 4))
    qkv = torch.randn(packing.tokens, 3 * 32)
    for name in ("auto", "sdpa", "products"):
        with use(name), torch.autocast("cpu", BF16):
            assert attend_packed(qkv, HEADS, packing).dtype == BF16
            assert attend(qkv.view(2, 13, 96), HEADS).dtype == BF16
    assert taken[:3] == 3 * ["products"]  # what auto takes for bf16, not for float32


def test_a_long_level_on_a_cpu_leaves_the_short_ones_their_products(monkeypatch):
    monkeypatch.setattr(attention, "DENSE_TOKENS", 8)
    taken, original = [], attention._dense
    monkeypatch.setattr(
        attention, "_dense", lambda x, heads, name: taken.append((x.shape[1], name)) or original(x, heads, name)
    )
    check_packed(Packing(2, (12, 8)), BF16)
    assert taken == [(12, "sdpa"), (8, "products")]
    assert "levels of at most 8 tokens as products" in choose(CPU, BF16, 64, (12, 8)).why


@pytest.mark.parametrize(("dtype", "dynamic"), [(BF16, False), (torch.float32, False)])
def test_compiled_whole_and_anew_when_the_choice_changes(dynamic, dtype):
    """fullgraph: a graph break is an error. The operations in the graph are those of the backend set at the time."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append({getattr(node.target, "__name__", str(node.target)) for node in graph.graph.nodes})
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    function = torch.compile(
        lambda x, p: (attend_packed(x, HEADS, p), attend(x[: 2 * p.lengths[0]].unflatten(0, (2, -1)), HEADS)),
        fullgraph=True, backend=backend, dynamic=dynamic,
    )  # fmt: skip
    for name, sdpa in (("sdpa", True), ("products", False), ("auto", dtype == torch.float32)):
        for packing in [Packing(2, (9, 6)), Packing(4, (11, 5))][: 1 if dynamic is False else 2]:
            qkv = torch.randn(packing.tokens, 3 * 32).to(dtype).requires_grad_()
            with use(name):
                got, expected = function(qkv, packing), attend_packed(qkv, HEADS, packing)
            torch.testing.assert_close(got[0], expected)
            grads = [torch.autograd.grad(out.float().square().sum(), qkv)[0] for out in (got[0], expected)]
            torch.testing.assert_close(*grads)
            if packing.batch == 2:
                assert ("scaled_dot_product_attention" in graphs[-1]) == sdpa, (name, graphs[-1])
    before = len(graphs)
    with use("sdpa"):
        function(qkv, packing)
    assert len(graphs) == before  # what was compiled once serves again


@needs_triton
@pytest.mark.parametrize("lengths", [(9, 4), (5,)])
def test_the_short_kernel_in_the_interpreter(lengths):
    """Packed and dense, run as it is and compiled whole."""
    packing = Packing(2, lengths)
    qkv = torch.randn(packing.tokens, 3 * 32, requires_grad=True)
    with use("short"):
        check_packed(packing, torch.float32)
        with Operations() as ran:
            attend_packed(qkv, HEADS, packing)
        assert any("phmdiff_fast.short_attention" in name for name in ran.names)  # not its reference
        torch._dynamo.reset()
        outs = [
            torch.compile(attend_packed, fullgraph=True, backend="aot_eager")(qkv, HEADS, packing),
            attend_packed(qkv, HEADS, packing),
        ]
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), qkv)[0] for out in outs))


@pytest.mark.parametrize("dynamic", [False, None])
@pytest.mark.parametrize("lengths", [(9, 4), (5,)])
def test_varlen_is_one_operation_of_a_compiled_graph(lengths, dynamic, monkeypatch):
    """Traced with torch's own function; its kernel needs a GPU, so the graph is not run."""
    if why := attention._why_not_varlen():
        pytest.skip(why)
    monkeypatch.setattr(attention, "_why_not", lambda *_: attention._why_not_varlen())
    attention._why_not_varlen.cache_clear()  # it is imported and wrapped in the midst of the tracing
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        shapes = [node.meta["example_value"].shape for node in graph.graph.output_node().args[0]]
        return lambda *_: [torch.zeros([int(n) for n in shape]) for shape in shapes]

    function = torch.compile(attend_packed, fullgraph=True, backend=backend, dynamic=dynamic)
    with use("varlen"):
        function(torch.randn(2 * sum(lengths), 96), HEADS, Packing(2, lengths))
    assert len(graphs) == 1
    assert sum("_varlen_attn" in target for target in graphs[0]) == 1


@pytest.mark.parametrize("name", ["auto", "sdpa", "products", "short", "varlen"])
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_shapes_are_known_without_numbers(kind, name):
    """Nothing is read back from the device: fake tensors have no numbers to read."""
    if why := why_not("sdpa" if name == "auto" else name, torch.device(kind), BF16, DIM, (9, 4)):
        pytest.skip(why)
    packing = Packing(2, (9, 4))
    with FakeTensorMode(), use(name), torch.no_grad():
        qkv = torch.empty(packing.tokens, 3 * 32, device=kind, dtype=BF16)
        got = attend_packed(qkv, HEADS, packing), attend(qkv.view(2, 13, 96), HEADS)
    assert [tuple(x.shape) for x in got] == [(26, 32), (2, 13, 32)]
    assert all(x.device.type == kind and x.dtype == BF16 for x in got)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a GPU that is not there")
@pytest.mark.parametrize(("lengths", "dtype", "name", "calls"), [
    ((64, 32, 12), BF16, "short", 3), ((64, 48), BF16, "short", 1), ((256, 64), BF16, "varlen", 1),
    ((256,), BF16, "sdpa", 1),
    ((256, 256), BF16, "sdpa", 1), ((64, 32), torch.float32, "sdpa", 2),
])  # fmt: skip
def test_on_a_gpu_the_chosen_operation_runs(lengths, dtype, name, calls):
    """Once for all sequences, SDPA once a length, the short kernel once a size of its tiles.

    Without a GPU torch writes SDPA out, with its own softmax.
    """
    if name == "varlen" and (why := why_not(name, CUDA, dtype, DIM, lengths)):
        pytest.skip(why)
    marks = {"short": "phmdiff_fast.short_attention", "varlen": "_varlen_attn", "sdpa": "_safe_softmax"}
    packing = Packing(2, lengths)
    with FakeTensorMode(), torch.no_grad(), Operations() as ran:
        attend_packed(torch.empty(packing.tokens, 3 * 32, device="cuda", dtype=dtype), HEADS, packing)
    counts = {backend: sum(mark in operation for operation in ran.names) for backend, mark in marks.items()}
    assert counts == {"short": 0, "varlen": 0, "sdpa": 0, name: calls}
    assert choose(CUDA, dtype, DIM, lengths).name == name


# ---- the choice --------------------------------------------------------------------------------------------


def test_use_holds_until_its_end_and_nests():
    qkv, taken = torch.randn(1, 3, 3 * 32), []
    before = attention._wanted
    with use("sdpa"):
        taken.append(attention._wanted)
        with use("products"):
            taken.append(attention._wanted)
            use("sdpa")  # outside a with: from now on
            taken.append(attention._wanted)
        taken.append(attention._wanted)
        with pytest.raises(PhmdiffError) as caught:
            use("flash9")
        with pytest.raises(PhmdiffError), use("varlen"):
            attend(qkv, HEADS)
        taken.append(attention._wanted)
    assert taken == ["sdpa", "products", "sdpa", "sdpa", "sdpa"]
    assert attention._wanted == before
    assert caught.value.exit_code == 8
    assert "products" in caught.value.line()


def test_the_environment_names_what_auto_is(monkeypatch):
    monkeypatch.setenv("PHMDIFF_ATTENTION", "products")
    with use("auto"):
        assert attention._name(torch.randn(1, 3, 96), HEADS, 3, mixed=False) == "products"
        assert choose(CPU, torch.float32, 64, (3,)).name == "products"
    with use("sdpa"):
        assert attention._wanted == "sdpa"
    monkeypatch.setenv("PHMDIFF_ATTENTION", "fast")
    with pytest.raises(PhmdiffError):
        use("auto")


def test_the_rule_of_auto():
    def name(*of):
        return choose(*of).name

    assert name(CPU, BF16, 64, (64, 32, 12)) == "products"
    assert name(CPU, torch.float32, 64, (64, 32, 12)) == "sdpa"
    assert name(CPU, BF16, 64, (4096,)) == "sdpa"
    assert name(CUDA, BF16, 64, (64, 32, 12)) == name(CUDA, torch.float16, 64, (128,)) == "short"
    assert name(CUDA, BF16, 64, (256,)) == name(CUDA, BF16, 64, (256, 256)) == "sdpa"
    assert name(CUDA, BF16, 64, (256, 64)) == "varlen"
    assert name(CUDA, BF16, 9, (256, 64)) == "sdpa"  # flash takes multiples of 8
    assert name(CUDA, torch.float32, 64, (64, 32)) == "sdpa"


def test_a_choice_says_why():
    assert "12 to 64 tokens" in choose(CUDA, BF16, 64, (64, 32, 12)).why
    assert "flash" in choose(CPU, torch.float32, 64, (64,)).why  # torch's name for its kernel there
    assert choose(CPU, BF16, 64, (64,), "sdpa").why.startswith("asked for")
    line = attention.describe(CPU, BF16, 64, (64, 12), "products")
    assert line.startswith("attention: products (asked for")
    assert "bfloat16" in line
    assert "\n" not in line


def test_every_backend_that_cannot_serve_says_why():
    for name in ("varlen", "fa3", "xformers"):
        assert "needs a GPU" in why_not(name, CPU, BF16, 64, (16,))
        assert "float64" in why_not(name, CUDA, torch.float64, 64, (16,))
        assert "12" in why_not(name, CUDA, BF16, 12, (16,))
    assert "129" in why_not("short", CUDA, BF16, 64, (129, 16))
    assert "int32" in why_not("sdpa", CPU, torch.int32, 64, (16,))
    assert dict(attention.table(CPU, BF16))["sdpa"] == "yes"
    assert len(attention.table(CPU, BF16)) == len(NAMES)
    with pytest.raises(PhmdiffError) as caught:
        choose(CPU, BF16, 64, (16,), "varlen")
    line = caught.value.line()
    assert caught.value.exit_code == 8
    assert "needs a GPU" in line
    assert "sdpa" in line
    assert "fa3" not in line
    with use("short"), pytest.raises(PhmdiffError, match=r"300 tokens|TRITON_INTERPRET"):
        attend(torch.randn(1, 300, 96), HEADS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_flash_attention_3_is_left_alone_where_it_cannot_run():
    from torch.nn import attention as of_torch

    with use("fa3"):
        assert getattr(of_torch, "current_flash_attention_impl", lambda: None)() is None
        with pytest.raises(PhmdiffError, match="fa3"):
            attend(torch.randn(1, 3, 96), HEADS)
    assert why_not("fa3", CUDA, BF16, 64, (16,))


# ---- other people's packages -------------------------------------------------------------------------------


def package(monkeypatch, folder, files):
    """A package ``xformers`` in place of the one that may be installed."""
    for name in [n for n in sys.modules if n.split(".")[0] == "xformers"]:
        monkeypatch.delitem(sys.modules, name)
    for name, text in files.items():
        path = folder / "xformers" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(folder)
    for cache in (attention._xformers, attention._why_not_xformers, attention._resolved, attention._block_diagonal):
        cache.cache_clear()


def forget(monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == "xformers"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize("broken", ["raise OSError('libcudart.so.11.0: cannot open')", "raise RuntimeError('')",
                                    "import a_module_that_is_not_there"])  # fmt: skip
def test_xformers_that_cannot_load_is_a_reason(tmp_path, monkeypatch, broken):
    package(monkeypatch, tmp_path, {"__init__.py": "", "ops/__init__.py": broken})
    why = why_not("xformers", CUDA, BF16, 64, (16,))
    assert "cannot be imported" in why
    assert any(word in why for word in ("OSError: libcudart", "RuntimeError: no message", "ModuleNotFoundError"))
    forget(monkeypatch)


XFORMERS = """
import torch
def memory_efficient_attention(q, k, v, attn_bias=None):  # (B, N, heads, d)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = None if attn_bias is None else attn_bias.mask
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
"""
MASK = """
import torch
class BlockDiagonalMask:
    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen=None{device}):
        made = cls()
        made.mask = torch.block_diag(*[torch.ones(n, n) for n in q_seqlen]).bool()
        return made
"""


@pytest.mark.parametrize("device", ["", ", *, device=None"])  # the argument came later
@pytest.mark.parametrize("lengths", [(6, 3), (5,)])
def test_xformers_is_called_as_it_wants(tmp_path, monkeypatch, device, lengths):
    """A package with xformers' interface that also computes on a CPU."""
    files = {"__init__.py": "", "ops/__init__.py": XFORMERS, "ops/fmha/__init__.py": ""}
    package(monkeypatch, tmp_path, {**files, "ops/fmha/attn_bias.py": MASK.format(device=device)})
    monkeypatch.setattr(attention, "_why_not", lambda *_: "")
    with use("xformers"):
        check_packed(Packing(2, lengths), torch.float32)
    forget(monkeypatch)


def _flash(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k):
    """What varlen_attn computes, (T, heads, d)."""
    assert cu_seq_q.dtype == torch.int32
    assert torch.equal(cu_seq_q, cu_seq_k)
    lengths = cu_seq_q.diff().tolist()
    assert max_q == max_k == max(lengths)
    assert sum(lengths) == len(query)
    parts = [x.split(lengths) for x in (query, key, value)]
    done = [equation(*(x.transpose(0, 1) for x in qkv)).transpose(0, 1) for qkv in zip(*parts, strict=True)]
    return torch.cat(done)


def of_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    assert is_causal is False
    assert return_aux is None
    return _flash(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)


def of_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):
    assert window_size == (-1, -1)
    assert scale is None
    return _flash(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)


def in_another_order(*, max_k, max_q, cu_seq_k, cu_seq_q, value, key, query, window_size, num_splits=None):
    assert window_size == (-1, -1)
    return _flash(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k), None


@pytest.mark.parametrize("lengths", [(6, 3), (5,), (1, 2, 1)])
@pytest.mark.parametrize("version", [of_2_10, of_2_11, in_another_order])
def test_varlen_is_called_as_each_version_wants(version, lengths, monkeypatch):
    module = SimpleNamespace(varlen_attn=version)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
    monkeypatch.setattr(attention, "_varlen", None)
    attention._why_not_varlen.cache_clear()
    assert why_not("varlen", CUDA, BF16, DIM, lengths) == ""
    monkeypatch.setattr(attention, "_why_not", lambda *_: "")
    with use("varlen"):
        check_packed(Packing(2, lengths), torch.float32)


def test_a_varlen_that_is_not_known_is_a_reason(monkeypatch):
    def later(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, layout):
        raise AssertionError

    def renamed(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k):
        raise AssertionError

    def fewer(query, key, value, cu_seq_q, max_q, max_k):
        raise AssertionError

    for function, word in ((later, "layout"), (renamed, "query"), (fewer, "cu_seq_k")):
        monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", SimpleNamespace(varlen_attn=function))
        attention._why_not_varlen.cache_clear()
        assert word in why_not("varlen", CUDA, BF16, 64, (256, 64))
        assert choose(CUDA, BF16, 64, (256, 64)).name == "sdpa"
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)  # as in a torch without it
    attention._why_not_varlen.cache_clear()
    assert "does not offer it" in why_not("varlen", CUDA, BF16, 64, (256, 64))


# ---- on a GPU ----------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [(16, 64), (64, 32, 12), (256,), (300, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("name", ["auto", *NAMES])
def test_every_backend_on_a_gpu(name, dtype, lengths):
    """Result and gradient in bf16 and float32; a backend that cannot serve here says so and is skipped by its word."""
    if name != "auto" and (why := why_not(name, CUDA, dtype, 64, lengths)):
        with pytest.raises(PhmdiffError):
            choose(CUDA, dtype, 64, lengths, name)
        pytest.skip(why)
    with use(name):
        check_packed(Packing(3, lengths), dtype, "cuda", heads=3, dim=64)


@pytest.mark.gpu
def test_torch_s_own_answer_on_a_gpu():
    assert any(word in choose(CUDA, BF16, 64, (256,)).why for word in ("flash", "cuDNN", "efficient"))
    assert any(word in choose(CUDA, torch.float32, 64, (256,)).why for word in ("efficient", "plain"))
    assert why_not("varlen", CUDA, BF16, 64, (256, 64)) == "" or torch.cuda.get_device_capability() < (8, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["short", "varlen", "sdpa"])
def test_compiled_on_a_gpu(name):
    packing = Packing(3, (64, 32, 12))
    if why := why_not(name, CUDA, BF16, 64, packing.lengths):
        pytest.skip(why)
    qkv = torch.randn(packing.tokens, 3 * 192, device="cuda", dtype=BF16, requires_grad=True)
    with use(name):
        got = torch.compile(attend_packed, fullgraph=True)(qkv, 3, packing)
        expected = attend_packed(qkv, 3, packing)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x.float().square().sum(), qkv)[0] for x in (got, expected)))


# ---- device and precision ----------------------------------------------------------------------------------


def test_precision_is_what_was_asked():
    cpu = pick_device("cpu")
    assert pick_precision("fp32", cpu) == torch.float32
    assert pick_precision("bf16", cpu) == torch.bfloat16
    assert pick_precision("auto", cpu) in (torch.float32, torch.bfloat16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(PhmdiffError) as caught:
        pick_device("cuda")
    assert caught.value.exit_code == 8
