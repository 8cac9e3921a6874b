"""The network: what it sees, what it must not see, and that every option runs with gradients."""

from __future__ import annotations

import itertools

import pytest
import torch

from phmdiff_fast.config import LevelSpec, ModelConfig
from phmdiff_fast.kernels.patch_mask import draw_mask
from phmdiff_fast.model import LevelInput, MaskedDiT, dropped_ids, sincos_positions


def small(**more) -> ModelConfig:
    base = dict(depth=2, width=32, heads=2, decoder_depth=1, decoder_width=16, decoder_heads=2, patch=4,
                stem_width=8, head_width=8, levels=[LevelSpec(mask_ratio=0.5), LevelSpec(mask_ratio=0.25)])  # fmt: skip
    return ModelConfig(**{**base, **more})


def woken(net: MaskedDiT) -> MaskedDiT:
    """adaLN-Zero starts as the identity; give every zeroed layer something to do."""
    for parameter in net.parameters():
        if parameter.abs().sum() == 0:
            torch.nn.init.normal_(parameter, std=0.1)
    return net


def call(net, level=0, mask=None, size=16, channels=2, **change):
    g = torch.Generator().manual_seed(2)
    size >>= level
    x = dict(y=torch.randn(2, 1, size, size, generator=g), sources=torch.randn(2, channels, size, size, generator=g),
             t=torch.tensor([900, 40]), abar=torch.tensor([0.02, 0.9]))  # fmt: skip
    coarsest = level == len(net.config.levels) - 1
    x["coarse"] = None if coarsest else torch.randn(2, 1, size // 2, size // 2, generator=g)
    x["eps"] = torch.randn(2, 1, size, size, generator=g)
    full = torch.randn(2, channels, size << level, size << level, generator=g)
    x.update(change)
    maps = net.source_maps(full)
    up = None if coarsest else torch.nn.functional.interpolate(x["coarse"], scale_factor=2, mode="bilinear")
    return net(x["y"], x["sources"], x["coarse"], x["t"], x["abar"], level, eps=x["eps"], mask=mask,
               stem_map=None if maps is None else maps[level], coarse_up=up,
               below=x.get("below"))  # fmt: skip


@pytest.mark.parametrize(
    ("stem", "head", "decoder", "masked"), list(itertools.product([0, 1], [0, 1], ["noisy", "token"], [0, 1]))
)
def test_every_option_runs_and_every_parameter_learns(stem, head, decoder, masked):
    net = woken(MaskedDiT(small(stem=bool(stem), head=bool(head), decoder_input=decoder), 2))
    total = 0.0
    for level in (0, 1):
        num = 16 >> (2 * level)
        mask = draw_mask(torch.arange(2), num, num // 2, rng=(0, 0)) if masked else None
        out = call(net, level, mask)
        assert out.shape == (2, 1, 16 >> level, 16 >> level)
        total = total + out.square().sum()
    total.backward()
    unused = {name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    waiting = {n for n in unused if n.startswith(("decoder_embedder", "mask_token"))}  # only masked steps use them
    assert unused == (set() if masked else waiting)


@pytest.mark.parametrize("to_tokens", [True, False])
def test_a_pyramid_head_reads_tokens_map_and_the_coarser_head_s_features(to_tokens):
    levels = [LevelSpec(mask_ratio=0.5) for _ in range(3)]
    net = woken(MaskedDiT(small(levels=levels, patch=8, head_kind="pyramid", stem_to_tokens=to_tokens), 2))
    assert not net.stem.up  # the head brings the context back up
    for level in range(3):
        size, widths = 32 >> level, (8, 16, 32)
        below = None if level == 2 else torch.randn(2, widths[level + 1], size // 2, size // 2)
        out = call(net, level, size=32, below=below)
        assert out.shape == (2, 1, size, size)
        if below is not None:
            assert not torch.allclose(call(net, level, size=32, below=below + 1), out)
    # What the tokens hold reaches the image through the head's first convolution alone.
    below = torch.randn(2, 16, 16, 16)
    with torch.no_grad():
        net.heads[0].first.weight[:, :8] = 0
    other = torch.randn(2, 1, 32, 32)
    assert torch.allclose(call(net, size=32, below=below), call(net, size=32, below=below, y=other))


def test_levels_in_one_pass_hand_the_head_s_features_up_as_one_after_the_other():
    config = small(head_kind="pyramid", stem_to_tokens=False)
    net = woken(MaskedDiT(config, 2))
    sources, t = torch.randn(2, 2, 16, 16), torch.tensor([900, 40])
    maps = net.source_maps(sources)
    halves = torch.nn.functional.avg_pool2d(sources, 2)
    abar, y = torch.tensor([0.02, 0.9]), [torch.randn(2, 1, n, n) for n in (16, 8)]
    coarse = torch.randn(2, 1, 8, 8)
    up = torch.nn.functional.interpolate(coarse, scale_factor=2, mode="bilinear")

    def inputs():
        return [LevelInput(0, y[0], sources, coarse, abar, maps[0], up, stem_to_tokens=False),
                LevelInput(1, y[1], halves, None, abar, maps[1], stem_to_tokens=False)]  # fmt: skip

    together = net.forward_levels(inputs(), net.packed_modulations(t))
    vectors, (fine, rough) = net.modulations(t), inputs()
    alone = net.forward_levels([rough], vectors[1])
    fine.below = rough.features
    torch.testing.assert_close(together[1], alone[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together[0], net.forward_levels([fine], vectors[0])[0], rtol=1e-4, atol=1e-5)
    fine.below = torch.zeros_like(rough.features)
    assert not torch.allclose(together[0], net.forward_levels([fine], vectors[0])[0], rtol=1e-2)


def test_masking_nothing_equals_no_mask():
    net = woken(MaskedDiT(small(), 2))
    everything = draw_mask(torch.arange(2), 16, 16, rng=(0, 0))
    torch.testing.assert_close(call(net, mask=everything), call(net), rtol=1e-5, atol=1e-5)


def test_the_encoder_sees_kept_patches_only():
    """Without stem and head and with mask tokens, a dropped patch's input changes nothing anywhere."""
    net = woken(MaskedDiT(small(stem=False, head=False, decoder_input="token"), 2))
    ids, inverse = draw_mask(torch.arange(2), 16, 8, rng=(0, 0))
    y = torch.randn(2, 1, 16, 16)
    hidden = (inverse < 0).view(2, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    other = torch.where(hidden, torch.randn_like(y), y)
    assert torch.equal(call(net, mask=(ids, inverse), y=y), call(net, mask=(ids, inverse), y=other))
    shown = torch.where(hidden, y, torch.randn_like(y))
    assert not torch.equal(call(net, mask=(ids, inverse), y=y), call(net, mask=(ids, inverse), y=shown))


def test_noisy_decoder_input_lets_masked_patches_see_themselves():
    net = woken(MaskedDiT(small(stem=False, head=False), 2))
    ids, inverse = draw_mask(torch.arange(2), 16, 8, rng=(0, 0))
    y = torch.randn(2, 1, 16, 16)
    hidden = (inverse < 0).view(2, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    other = torch.where(hidden, torch.randn_like(y), y)
    assert not torch.equal(call(net, mask=(ids, inverse), y=y), call(net, mask=(ids, inverse), y=other))


@pytest.mark.parametrize("name", ["y", "eps", "sources", "coarse", "t", "abar"])
def test_every_input_matters(name):
    net = woken(MaskedDiT(small(stem=False, head=False), 2))
    plain = call(net)
    value = {"t": torch.tensor([1, 2]), "abar": torch.tensor([0.3, 0.4])}.get(name)
    if value is None:
        channels, size = {"sources": 2}.get(name, 1), {"coarse": 8}.get(name, 16)
        value = torch.randn(2, channels, size, size)
    assert not torch.equal(call(net, **{name: value}), plain)


def test_a_sampler_s_state_goes_in_as_y():
    """y_t / sqrt(abar) without eps is the same state as (y, eps)."""
    net = woken(MaskedDiT(small(), 2))
    y, eps, abar = torch.randn(2, 1, 16, 16), torch.randn(2, 1, 16, 16), torch.tensor([0.02, 0.9])
    root = abar.sqrt()[:, None, None, None]
    y_t = root * y + (1 - abar).sqrt()[:, None, None, None] * eps
    torch.testing.assert_close(call(net, y=y_t / root, eps=None), call(net, y=y, eps=eps), rtol=1e-4, atol=1e-4)


def test_output_starts_at_zero():
    for head in (False, True):
        assert (call(MaskedDiT(small(head=head), 2)) == 0).all()


def test_bf16_stays_close_and_returns_float32():
    net = woken(MaskedDiT(small(), 2))
    mask = draw_mask(torch.arange(2), 16, 8, rng=(0, 0))
    exact = call(net, mask=mask).detach()
    with torch.autocast("cpu", torch.bfloat16):
        rough = call(net, mask=mask).detach()
    assert rough.dtype == torch.float32
    assert float((rough - exact).norm() / exact.norm()) < 0.03


def test_positions_and_dropped_ids():
    pos = sincos_positions(3, 5, 16)
    assert pos.shape == (15, 16)
    assert len(torch.unique(pos, dim=0)) == 15
    ids, inverse = draw_mask(torch.arange(3), 10, 4, rng=(0, 0))
    both = torch.cat([ids, dropped_ids(inverse, 4)], 1).sort(1).values
    assert both.tolist() == [list(range(10))] * 3


def test_modulations_of_all_levels_at_once_are_those_of_each():
    net = woken(MaskedDiT(small(), 2))
    t = torch.tensor([900, 40])
    together = net.modulations(t)
    assert len(together) == 2
    assert [v.shape[1] for v in together[0]] == [192, 192, 64, 96, 32]  # 2 blocks, norm, 1 block, norm
    apart = net.modulations(torch.stack([t, t.flip(0)]))  # a t per level
    for a, b, c in zip(together[0], apart[0], net.modulations(t.flip(0))[1], strict=True):
        torch.testing.assert_close(a, b)
        assert not torch.equal(a, c)
    for b, c in zip(apart[1], net.modulations(t.flip(0))[1], strict=True):
        torch.testing.assert_close(b, c)


@pytest.mark.parametrize("masked", [True, False])
def test_patches_know_their_place(masked):
    """With the same content everywhere only the position can tell patches apart, encoder and decoder each."""
    net = woken(MaskedDiT(small(stem=False, head=False, decoder_input="token"), 2))
    mask = draw_mask(torch.arange(2), 16, 8, rng=(0, 0)) if masked else None
    zero = dict(y=torch.zeros(2, 1, 16, 16), eps=torch.zeros(2, 1, 16, 16), sources=torch.zeros(2, 2, 16, 16),
                coarse=torch.zeros(2, 1, 8, 8))  # fmt: skip
    whole = call(net, mask=mask, **zero).unfold(2, 4, 4).unfold(3, 4, 4).reshape(2, 16, 16)
    assert (whole.var(1) > 0).any()
    positions = net.positions
    for width in (32, 16):  # the encoder's, the decoder's
        net.positions = lambda r, c, w, d, off=width: positions(r, c, w, d) * (0 if w == off else 1)
        assert not torch.allclose(
            call(net, mask=mask, **zero).unfold(2, 4, 4).unfold(3, 4, 4).reshape(2, 16, 16), whole
        )
