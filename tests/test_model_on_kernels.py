"""The whole method on the Triton kernels: the loss and every gradient are those of the reference."""

from __future__ import annotations

import pytest
import torch
from kernel_tools import DEVICE, needs_triton

from phmdiff_fast import blocks
from phmdiff_fast.config import LevelSpec, ModelConfig, SampleConfig, TrainConfig
from phmdiff_fast.kernels import _impl, adaln, mmd, patch_mask
from phmdiff_fast.phmdiff import PHMDiff

pytestmark = needs_triton
SMALL = ModelConfig(depth=1, width=32, heads=2, decoder_depth=1, decoder_width=16, decoder_heads=2, stem_width=8,
                    head_width=8, patch=4, levels=[LevelSpec(mask_ratio=r) for r in (0.75, 0.5, 0.25)])  # fmt: skip
OPTIONS = {
    "default": {},
    "token": dict(decoder_input="token", drop_background=True),
    "diffmae": dict(reading="diffmae", stem=False),
    "teacher": dict(prediction="v", coarse="teacher", head=False),
}


@pytest.fixture
def on_kernels(monkeypatch):
    """Every operation picks Triton where nobody chose, as on a GPU; yields the operations that did."""
    picked = set()

    def choose(op, impl, *args, **kwargs):
        picked.add(op)
        return _impl.choose(op, impl or "triton", *args, **kwargs)

    def switch():
        for module in (adaln, mmd, patch_mask):
            monkeypatch.setattr(module, "choose", choose)
        monkeypatch.setattr(blocks, "serves", lambda *_: False)  # the CPU's block, which calls the extension
        return picked

    return switch


def model(**options) -> PHMDiff:
    torch.manual_seed(0)
    made = PHMDiff(SMALL.model_copy(update=options), 1)
    for p in made.parameters():
        if p.abs().sum() == 0:  # the zeros of adaLN-Zero would hide what flows through them
            torch.nn.init.normal_(p, std=0.05)
    return made.to(DEVICE)


def loss_and_gradients(net, masked, autocast=None):
    target, source = (torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(i)).to(DEVICE) for i in (1, 2))
    ids = torch.arange(2, device=DEVICE)
    net.zero_grad()
    with torch.autocast(DEVICE, autocast or torch.bfloat16, enabled=autocast is not None):
        terms = net.loss(target * 2 - 1, source * 2 - 1, ids, (0, 3), TrainConfig(mmd_weight=0.1), masked=masked,
                         foreground=source > 0.2)  # fmt: skip
    terms.total.backward()
    return terms, {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("name", "masked"), [("default", True), ("default", False), ("token", True), ("diffmae", True),
                                              ("teacher", False)])  # fmt: skip
def test_a_training_step(name, masked, on_kernels):
    net = model(**OPTIONS[name])
    expected, gradients = loss_and_gradients(net, masked)
    picked = on_kernels()
    got, found = loss_and_gradients(net, masked)
    assert picked >= {"embed_visible", "adaln_modulate", "gated_residual_adaln", "mmd2"}
    assert not masked or picked >= {"draw_mask", "restore_tokens"}
    torch.testing.assert_close(got.denoise, expected.denoise, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.mmd, expected.mmd, rtol=1e-3, atol=1e-5)
    assert found.keys() == gradients.keys()
    for key, gradient in gradients.items():
        assert float((found[key] - gradient).norm()) <= 2e-3 * float(gradient.norm()) + 1e-6, key


def test_a_training_step_in_bf16(on_kernels):
    """As close to float32 as the reference is in bf16: the residual stays float32, the branches are 16-bit."""
    net = model()
    exact, gradients = loss_and_gradients(net, True)
    eager, rounded = loss_and_gradients(net, True, torch.bfloat16)
    on_kernels()
    got, found = loss_and_gradients(net, True, torch.bfloat16)
    distance = [float((t.denoise - exact.denoise).norm()) for t in (got, eager)]
    assert distance[0] <= 2 * distance[1] + 1e-3 * float(exact.denoise.norm())
    off = [sum(float((g[k] - gradients[k]).square().sum()) for k in gradients) ** 0.5 for g in (found, rounded)]
    assert off[0] <= 1.5 * off[1]


def test_sampling(on_kernels):
    net = model().eval()
    source, ids = torch.rand(2, 1, 32, 32, device=DEVICE) * 2 - 1, torch.arange(2, device=DEVICE)
    expected = net.translate(source, ids, SampleConfig(steps=2))[0]
    on_kernels()
    torch.testing.assert_close(net.translate(source, ids, SampleConfig(steps=2))[0], expected, rtol=1e-4, atol=1e-4)
