"""Packing: levels in one buffer give what they give one by one, and never see each other."""

from __future__ import annotations

import pytest
import torch

from phmdiff_fast.config import LevelSpec, ModelConfig
from phmdiff_fast.kernels.patch_mask import draw_mask
from phmdiff_fast.model import LevelInput, MaskedDiT
from phmdiff_fast.packing import Packing, packing_of
from phmdiff_fast.pyramid import upsample

LEVELS = 3


def test_pack_and_views_are_inverse_and_views_copy_nothing():
    packing = Packing(2, (5, 3, 1))
    assert (packing.tokens, packing.sequences, packing.longest) == (18, 6, 5)
    parts = [torch.randn(2, length, 4) for length in packing.lengths]
    x = packing.pack(parts)
    assert x.shape == (18, 4)
    for part, view in zip(parts, packing.views(x), strict=True):
        assert torch.equal(part, view)
        assert view.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    one = Packing(2, (5,)).pack(parts[:1])
    assert one.data_ptr() == parts[0].data_ptr()


def test_cu_tokens_are_the_ends_of_the_sequences_level_by_level():
    packing = packing_of(3, (4, 2))
    cu = packing.cu_tokens(torch.device("cpu"))
    assert cu.dtype == torch.int32
    assert cu.tolist() == [0, 4, 8, 12, 14, 16, 18]
    assert packing_of(3, (4, 2)).cu_tokens(torch.device("cpu")) is cu  # made once


def network(**more) -> MaskedDiT:
    config = dict(depth=2, width=32, heads=2, decoder_depth=2, decoder_width=16, decoder_heads=2, patch=4,
                  stem_width=8, head_width=8, coarse="teacher",
                  levels=[LevelSpec(mask_ratio=r) for r in (0.75, 0.5, 0.25)])  # fmt: skip
    torch.manual_seed(0)
    net = MaskedDiT(ModelConfig(**{**config, **more}), 1)
    for p in net.parameters():  # adaLN-Zero starts as the identity
        if not p.abs().sum():
            torch.nn.init.normal_(p, std=0.1)
    return net.double()


def inputs(net: MaskedDiT, masked: bool, batch: int = 2, size: int = 32) -> list[LevelInput]:
    drawn = torch.Generator().manual_seed(1)
    image = lambda side: torch.randn(batch, 1, side, side, generator=drawn, dtype=torch.float64)  # noqa: E731
    maps = net.source_maps(image(size))
    made = []
    for level in range(LEVELS):
        side = size >> level
        tokens = (side // net.config.patch) ** 2
        coarse = None if level == LEVELS - 1 else image(side // 2)
        made.append(LevelInput(
            level, image(side), image(side), coarse, torch.tensor([0.3, 0.8], dtype=torch.float64),
            None if maps is None else maps[level], None if coarse is None else upsample(coarse, side, side),
            image(side),
            draw_mask(torch.arange(batch), tokens, max(1, tokens // 2), rng=(0, 0), stream=level) if masked else None,
        ))  # fmt: skip
    return made


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(
    "more", [{}, {"decoder_input": "token"}, {"reading": "diffmae"}, {"stem": False, "head": False}]
)
def test_all_levels_in_one_pass_are_each_level_by_itself(more, masked):
    net = network(**more)
    t, coarse_t = torch.tensor([500, 20]), torch.tensor([7, 90])
    results = []
    for packed in (True, False):
        net.zero_grad()
        at = inputs(net, masked)
        if packed:
            outs = net.forward_levels(at, net.packed_modulations(t, coarse_t))
        else:
            vectors = net.modulations(t, coarse_t)
            outs = [net.forward_levels([each], vectors[each.level])[0] for each in at]
        sum(out.square().sum() for out in outs).backward()
        results.append((outs, {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}))
    (outs, gradients), (apart, gradients_apart) = results
    for a, b in zip(outs, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert gradients.keys() == gradients_apart.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, gradients_apart[name], rtol=1e-9, atol=1e-9, msg=name)


def test_a_level_and_a_sample_do_not_see_another():
    net = network()
    with torch.no_grad():
        vectors = net.packed_modulations(torch.tensor([500, 20]))
        before = net.forward_levels(inputs(net, True), vectors)
        changed = inputs(net, True)
        changed[1].y[0] += 1.0  # level 1, sample 0
        after = net.forward_levels(changed, vectors)
    same = [[torch.equal(a[i], b[i]) for i in range(2)] for a, b in zip(before, after, strict=True)]
    assert same == [[True, True], [False, True], [True, True]]


def test_a_packed_pass_runs_each_layer_once(monkeypatch):
    net = network()
    calls = {"products": 0}
    inner = torch.nn.functional.linear

    def counted(x, *rest):
        calls["products"] += x.dim() == 2 and x.shape[0] > 8  # not those of the vectors, one row a sequence
        return inner(x, *rest)

    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    at = inputs(net, True)
    vectors = net.packed_modulations(torch.tensor([500, 20]))
    calls["products"] = 0
    net.forward_levels(at, vectors)
    # qkv, proj, fc1 and fc2 of each block, once for all levels, and the way to the decoder.
    assert calls["products"] == 4 * (net.config.depth + net.config.decoder_depth) + 1
