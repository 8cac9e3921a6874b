"""Masked patches: counts, order, classes; tokens against a plain convolution; the way back."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from phmdiff_fast.kernels._impl import BackendError
from phmdiff_fast.kernels.patch_mask import draw_mask, embed_visible, restore_tokens, unpatchify
from phmdiff_fast.pyramid import merge_state, upsample


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 6), st.integers(0, 90), st.floats(0, 1))
def test_counts_order_and_inverse(batch, num, share):
    keep = int(share * num)
    ids, inverse = draw_mask(torch.arange(batch), num, keep, rng=(3, 4))
    assert ids.shape == (batch, keep)
    assert inverse.shape == (batch, num)
    assert ids.dtype == inverse.dtype == torch.int32
    assert (ids[:, 1:] > ids[:, :-1]).all()
    assert ((inverse >= 0).sum(1) == keep).all()
    for row in range(batch):
        assert inverse[row, ids[row].long()].tolist() == list(range(keep))


def test_keeps_the_smallest_keys():
    from phmdiff_fast.kernels import _philox

    samples = torch.arange(5)
    keys = _philox.integers(samples, 40, rng=(8, 1), stream=0)
    ids, _ = draw_mask(samples, 40, 13, rng=(8, 1))
    for row in range(5):
        assert sorted(ids[row].tolist()) == sorted(keys[row].argsort()[:13].tolist())


def test_every_patch_is_equally_likely():
    ids, _ = draw_mask(torch.arange(4000), 16, 4, rng=(0, 0))
    counts = torch.bincount(ids.flatten().long(), minlength=16).double()
    chi2 = float(((counts - 1000) ** 2 / (1000 * 0.75)).sum())
    assert chi2 < 40  # 15 degrees of freedom: 1 in 2000


def test_batch_split_and_order_do_not_matter():
    samples = torch.tensor([5, 2, 9, 1 << 33])
    whole, _ = draw_mask(samples, 64, 16, rng=(1, 2))
    parts = torch.cat([draw_mask(samples[:3], 64, 16, rng=(1, 2))[0], draw_mask(samples[3:], 64, 16, rng=(1, 2))[0]])
    assert torch.equal(whole, parts)
    assert torch.equal(draw_mask(samples.flip(0), 64, 16, rng=(1, 2))[0], whole.flip(0))


def test_drop_first_patches_go_before_any_other():
    drop = torch.zeros(3, 20, dtype=torch.bool)
    drop[:, :8] = True
    ids, _ = draw_mask(torch.arange(3), 20, 12, rng=(0, 0), drop_first=drop)
    assert ids.tolist() == [list(range(8, 20))] * 3
    ids, _ = draw_mask(torch.arange(3), 20, 14, rng=(0, 0), drop_first=drop)  # two of them have to stay
    assert ((ids < 8).sum(1) == 2).all()


def inputs(coarse=True, C=1, Cs=3, H=8, W=12, p=4, D=10, dtype=torch.float64):
    g = torch.Generator().manual_seed(1)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=dtype)  # noqa: E731
    channels = C + Cs + (C if coarse else 0)
    return dict(
        y=rand(2, C, H, W), sources=rand(2, Cs, H, W), coarse=rand(2, C, -(-H // 2), -(-W // 2)) if coarse else None,
        abar=torch.tensor([0.9, 0.04], dtype=dtype), weight=rand(D, channels * p * p), bias=rand(D),
        pos=rand(H * W // p**2, D), eps=rand(2, C, H, W), patch=p,
    )  # fmt: skip


@pytest.mark.parametrize("coarse", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_tokens_are_those_of_a_convolution_over_the_merged_state(coarse, scaled):
    x = inputs(coarse)
    patch = x.pop("patch")
    scale = x["abar"].sqrt() if scaled else None
    ids, _ = draw_mask(torch.arange(2), 6, 4, rng=(0, 0))
    got = embed_visible(x["y"], x["sources"], x["coarse"], x["abar"], ids, x["weight"], x["bias"], x["pos"],
                        eps=x["eps"], state_scale=scale)  # fmt: skip
    state = merge_state(x["y"], x["eps"], x["coarse"], x["abar"])
    if scaled:
        state = state * scale[:, None, None, None]
    channels = [state, x["sources"]] + ([upsample(x["coarse"], 8, 12)] if coarse else [])
    image = torch.cat(channels, 1)
    kernel = x["weight"].view(10, image.shape[1], patch, patch)
    full = F.conv2d(image, kernel, x["bias"], stride=patch).flatten(2).transpose(1, 2) + x["pos"]
    expected = torch.stack([full[b, ids[b].long()] for b in range(2)])
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    everything = embed_visible(x["y"], x["sources"], x["coarse"], x["abar"], None, x["weight"], x["bias"], x["pos"],
                               eps=x["eps"], state_scale=scale)  # fmt: skip
    torch.testing.assert_close(everything, full, rtol=1e-12, atol=1e-12)


def test_noise_can_be_drawn_inside():
    from phmdiff_fast.kernels import _philox

    x = inputs(dtype=torch.float32)
    common = (x["y"], x["sources"], x["coarse"], x["abar"], None, x["weight"], x["bias"], x["pos"])
    samples = torch.tensor([7, 8])
    eps = _philox.normals(samples, 96, rng=(3, 3), stream=1).view(2, 1, 8, 12)
    drawn = embed_visible(*common, rng=(3, 3), sample_ids=samples, stream=1)
    assert torch.equal(drawn, embed_visible(*common, eps=eps))


def test_gradients_reach_weight_bias_and_sources_and_are_zero_where_dropped():
    x = inputs()
    sources, weight, bias = (x[k].requires_grad_() for k in ("sources", "weight", "bias"))
    ids, inverse = draw_mask(torch.arange(2), 6, 3, rng=(0, 0))

    def run(s, w, b):
        return embed_visible(x["y"], s, x["coarse"], x["abar"], ids, w, b, x["pos"], eps=x["eps"])

    assert torch.autograd.gradcheck(run, (sources, weight, bias))
    run(sources, weight, bias).square().sum().backward()
    kept = (inverse >= 0).view(2, 1, 2, 3).repeat_interleave(4, 2).repeat_interleave(4, 3).expand_as(sources)
    assert (sources.grad[~kept] == 0).all()
    assert (sources.grad[kept] != 0).all()


@pytest.mark.parametrize("fill_kind", ["token", "rows"])
@pytest.mark.parametrize("keep", [0, 3, 6])
def test_restore_puts_every_row_in_its_place(fill_kind, keep):
    ids, inverse = draw_mask(torch.arange(2), 6, keep, rng=(0, 0))
    x = torch.randn(2, keep, 5, dtype=torch.float64, requires_grad=True)
    pos = torch.randn(6, 5, dtype=torch.float64)
    fill = (
        torch.randn(5, dtype=torch.float64)
        if fill_kind == "token"
        else torch.randn(2, 6 - keep, 5, dtype=torch.float64)
    )
    fill.requires_grad_()
    got = restore_tokens(x, fill, inverse, pos)
    for b in range(2):
        gaps = [n for n in range(6) if n not in ids[b].tolist()]
        for rank, n in enumerate(ids[b].tolist()):
            assert torch.equal(got[b, n], x[b, rank] + pos[n])
        for rank, n in enumerate(gaps):
            assert torch.equal(got[b, n], (fill if fill_kind == "token" else fill[b, rank]) + pos[n])
    assert torch.autograd.gradcheck(lambda a, f: restore_tokens(a, f, inverse, pos), (x, fill))


def test_unpatchify_undoes_patches():
    from phmdiff_fast.kernels.patch_mask import patch_rows

    x = torch.randn(2, 3, 8, 12)
    assert torch.equal(unpatchify(patch_rows(x, 4, None).flatten(2), 4, 8, 12), x)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="num_keep"):
        draw_mask(torch.arange(2), 4, 5, rng=(0, 0))
    with pytest.raises(ValueError, match="unknown"):
        draw_mask(torch.arange(2), 4, 2, rng=(0, 0), impl="cuda")
    with pytest.raises(BackendError, match="cannot run here"):
        draw_mask(torch.arange(2), 4, 2, rng=(0, 0), impl="extension")
    x = inputs()
    good = dict(y=x["y"], sources=x["sources"], coarse=x["coarse"], abar=x["abar"], keep_ids=None,
                weight=x["weight"], bias=x["bias"], pos=x["pos"], eps=x["eps"])  # fmt: skip
    for name, value, match in (
        ("weight", x["weight"][:, :-1], "weight"), ("coarse", x["coarse"][..., :-1], "coarse"),
        ("abar", x["abar"].half(), "abar"), ("sources", x["sources"][..., :-1], "sources"),
        ("y", x["y"][..., :-1], "multiple"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            embed_visible(**{**good, name: value})
    with pytest.raises(ValueError, match="fill"):
        restore_tokens(torch.zeros(1, 2, 3), torch.zeros(4), torch.zeros(1, 5, dtype=torch.int32), None)
