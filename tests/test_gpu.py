"""What only a GPU can show: same integers, close normals, same loss, a training step under autocast."""

from __future__ import annotations

import pytest
import torch

from phmdiff_fast.config import LevelSpec, ModelConfig, SampleConfig, TrainConfig
from phmdiff_fast.engine import EAGER_BATCHES, Engine
from phmdiff_fast.kernels import _philox
from phmdiff_fast.kernels.patch_mask import draw_mask
from phmdiff_fast.phmdiff import PHMDiff

pytestmark = pytest.mark.gpu
SMALL = ModelConfig(depth=2, width=64, heads=2, decoder_depth=1, decoder_width=32, decoder_heads=2, stem_width=8,
                    head_width=8, levels=[LevelSpec(mask_ratio=r) for r in (0.75, 0.5, 0.25)])  # fmt: skip


@pytest.fixture(autouse=True)
def _whole_float32(monkeypatch):
    """A GPU's convolutions round float32 to 11 bits unless told otherwise; what is compared here is ours."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def test_integers_and_masks_are_bit_identical():
    ids = torch.tensor([0, 5, 2**40 + 3])
    for draw in (_philox.integers, _philox.uniforms):
        assert torch.equal(draw(ids, 999, rng=(3, 4), stream=1), draw(ids.cuda(), 999, rng=(3, 4), stream=1).cpu())
    masks = [draw_mask(i, 256, 64, rng=(3, 4)) for i in (ids, ids.cuda())]
    assert all(torch.equal(a, b.cpu()) for a, b in zip(*masks, strict=True))


def test_normals_agree_to_2e_6():
    ids = torch.arange(64)
    a, b = (_philox.normals(i, 4096, rng=(1, 2), stream=1).cpu() for i in (ids, ids.cuda()))
    assert float((a - b).abs().max()) <= 2e-6


OPTIONS = {
    "default": {},
    "teacher": dict(prediction="v", coarse="teacher", learn_variance=True, schedule="cosine"),
    "diffmae": dict(reading="diffmae", coupling="cascade", drop_background=True),
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("masked", [True, False])
def test_the_loss_and_its_gradient_are_those_of_the_cpu(masked, name):
    torch.manual_seed(0)
    model = PHMDiff(SMALL.model_copy(update=OPTIONS[name]), 1)
    for p in model.parameters():
        if p.abs().sum() == 0:
            torch.nn.init.normal_(p, std=0.05)
    target, source = torch.rand(4, 1, 32, 32) * 2 - 1, torch.rand(4, 1, 32, 32) * 2 - 1
    found = []
    for device in ("cpu", "cuda"):
        model = model.to(device)
        model.net._positions.clear()
        model.zero_grad()
        ids = torch.arange(4, device=device)
        terms = model.loss(target.to(device), source.to(device), ids, (0, 1), TrainConfig(), masked=masked,
                           foreground=(source > -0.9).to(device))  # fmt: skip
        terms.total.backward()
        found.append(
            (terms.denoise.cpu(), {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None})
        )
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-3, atol=1e-5)
    assert found[0][1].keys() == found[1][1].keys()
    for name, gradient in found[0][1].items():
        assert float((gradient - found[1][1][name]).norm()) <= 2e-2 * float(gradient.norm()) + 1e-6, name


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_synthesis_is_that_of_the_cpu(sampler):
    torch.manual_seed(0)
    model = PHMDiff(SMALL.model_copy(update={"learn_variance": True}), 1).eval()
    source, made = torch.rand(2, 1, 32, 32) * 2 - 1, []
    for device in ("cpu", "cuda"):
        model = model.to(device)
        model.net._positions.clear()
        ids = torch.arange(2, device=device)
        made.append(model.translate(source.to(device), ids, SampleConfig(steps=4, sampler=sampler))[0].cpu())
    torch.testing.assert_close(made[0], made[1], rtol=1e-3, atol=1e-3)


def test_bf16_training_falls():
    torch.manual_seed(0)
    model = PHMDiff(SMALL, 1).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    target = torch.rand(8, 1, 8, 8, device="cuda").repeat_interleave(4, 2).repeat_interleave(4, 3) * 2 - 1
    ids, curve = torch.arange(8, device="cuda"), []
    for step in range(60):
        with torch.autocast("cuda", torch.bfloat16):
            terms = model.loss(target, -target, ids, (0, step), TrainConfig(), masked=True)
        optimizer.zero_grad()
        terms.total.backward()
        optimizer.step()
        curve.append(float(terms.denoise[0]))
    assert sum(curve[-10:]) < 0.3 * sum(curve[:10])


def test_a_batch_seen_before_is_replayed_and_gives_the_same_images():
    model = PHMDiff(SMALL, 1).cuda().eval()
    torch.manual_seed(0)
    for p in model.parameters():
        if p.abs().sum() == 0:
            torch.nn.init.normal_(p, std=0.05)
    kept = [[torch.arange(40, dtype=torch.int32, device="cuda").expand(4, -1).contiguous(), None, None]]
    settings, ids = SampleConfig(steps=3, sampler="dpm++", samples=2), torch.arange(4, device="cuda")
    engine = Engine(model, settings, torch.bfloat16)
    plain = Engine(model, settings.model_copy(update={"cuda_graph": "off"}), torch.bfloat16)
    for call in range(2 * EAGER_BATCHES + 2):
        sources = torch.rand(4, 1, 32, 32, device="cuda") * 2 - 1
        made, expected = engine(sources, ids + call, kept), plain(sources, ids + call, kept)
        assert len(engine._recorded) == (call >= EAGER_BATCHES)
        for a, b in zip([*made.levels, made.deviation], [*expected.levels, expected.deviation], strict=True):
            torch.testing.assert_close(a, b)
