"""The CPU's block in one node of autograd: the plain block's values and gradients, with less kept."""

from __future__ import annotations

import pytest
import torch

from phmdiff_fast import blocks as room
from phmdiff_fast.blocks import Block, run_blocks
from phmdiff_fast.kernels import _extension
from phmdiff_fast.lean_block import Narrow, serves
from phmdiff_fast.packing import packing_of

pytestmark = pytest.mark.skipif(bool(_extension.problem()), reason="adaLN of the extension is not there")
WIDTH, HEADS, DEPTH = 48, 3, 3


def parts(seed: int = 0, batch: int = 2):
    """Blocks, and vectors of three levels, none of them the identity that adaLN-Zero begins as."""
    torch.manual_seed(seed)
    blocks = torch.nn.ModuleList(Block(WIDTH, HEADS, 4.0, WIDTH) for _ in range(DEPTH))
    widths = [6 * WIDTH] * DEPTH + [2 * WIDTH]
    return blocks, [torch.randn(3 * batch, width).mul(0.3) for width in widths]


def results(blocks, vectors, x, packing, autocast, monkeypatch, lean: bool):
    monkeypatch.setattr(room, "serves", serves if lean else lambda *_: False)
    x = x.clone().requires_grad_()
    vectors = [v.clone().requires_grad_() for v in vectors]
    blocks.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        given = [v.to(torch.bfloat16) for v in vectors] if autocast else vectors
        out = run_blocks(x, blocks, given, packing)
    drawn = torch.Generator().manual_seed(9)
    out.backward(torch.randn(out.shape, generator=drawn).to(out.dtype))
    named = {name: p.grad.clone() for name, p in blocks.named_parameters() if p.grad is not None}
    return out.detach(), {"x": x.grad, **{f"vector {n}": v.grad for n, v in enumerate(vectors)}, **named}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("lengths", [(9,), (16, 4, 1)])
def test_it_is_the_plain_block(lengths, autocast, monkeypatch):
    blocks, vectors = parts()
    packing = packing_of(2, lengths) if len(lengths) > 1 else None
    vectors = [v[: 2 * len(lengths)] for v in vectors]
    x = torch.randn(2 * sum(lengths), WIDTH) if packing else torch.randn(2, lengths[0], WIDTH)
    lean, plain = (results(blocks, vectors, x, packing, autocast, monkeypatch, way) for way in (True, False))
    assert torch.equal(lean[0], plain[0])  # forward is the same operations
    assert lean[1].keys() == plain[1].keys()
    for name, gradient in plain[1].items():
        apart = (lean[1][name] - gradient).norm() / gradient.norm()
        assert apart < (1e-2 if autocast else 1e-6), name


def test_it_is_used_and_keeps_less(monkeypatch):
    blocks, vectors = parts()
    vectors = [v[:2].clone().requires_grad_() for v in vectors]
    kept = {}
    for lean in (True, False):
        monkeypatch.setattr(room, "serves", serves if lean else lambda *_: False)
        seen = {}

        def keep(t, seen=seen):
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        x = torch.randn(2, 64, WIDTH, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16):
            out = run_blocks(x, blocks, [v.to(torch.bfloat16) for v in vectors])
        weights = sum(p.numel() * 2 for p in blocks.parameters())
        kept[lean] = sum(seen.values()) - weights
        assert ("_Block" in type(out.grad_fn).__name__) == lean
    assert kept[True] < 0.65 * kept[False]
    per_token = kept[True] / (128 * DEPTH * WIDTH * 2)
    assert per_token < 12.9  # 12 D of 16 bits, and the first x and the last norm's


def test_weights_are_cast_once_for_all_levels_and_anew_after_an_update():
    layer = torch.nn.Linear(4, 4)
    narrow = Narrow(layer)
    first, second = narrow(torch.bfloat16), narrow(torch.bfloat16)
    assert first[0] is second[0]
    assert narrow(torch.float32)[0] is layer.weight
    first[0].float().sum().backward()
    assert torch.equal(layer.weight.grad, torch.ones(4, 4))
    with torch.no_grad():
        layer.weight.add_(1)
    again = narrow(torch.bfloat16)
    narrow.let_go()
    assert narrow(torch.bfloat16)[0] is not again[0]
    assert not torch.equal(again[0], first[0])
    assert torch.equal(again[0], layer.weight.to(torch.bfloat16))


def test_where_it_cannot_serve_the_plain_block_runs():
    blocks, vectors = parts()
    vectors = [v[:2] for v in vectors]
    x = torch.randn(2, 5, WIDTH)
    assert serves(x, x)
    assert not serves(x.double(), x.double())
    with torch.no_grad():
        assert not serves(x, x)
    double = torch.nn.ModuleList(blocks).double()
    assert torch.isfinite(run_blocks(x.double(), double, [v.double() for v in vectors])).all()


def test_a_second_derivative_is_refused():
    blocks, vectors = parts()
    x = torch.randn(2, 5, WIDTH, requires_grad=True)
    out = run_blocks(x, blocks, [v[:2] for v in vectors])
    (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"second derivative|once_differentiable"):
        first.sum().backward()
