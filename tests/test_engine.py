"""The engine: what it keeps changes nothing, what it leaves out changes little, and samples spread."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_phmdiff import awake, images

from phmdiff_fast.background import batches
from phmdiff_fast.config import SampleConfig
from phmdiff_fast.engine import SAMPLE, Engine, kept_on
from phmdiff_fast.sampling import SAMPLERS

IDS = torch.arange(4)


def plan(inside, views=1):
    """(rows, kept as tensors) of each batch; inside (Z, H, W) bool."""
    made = batches(inside, 8, patch=4, levels=3, views=views, small=16)
    return [(torch.from_numpy(part.rows), kept_on("cpu", part.kept)) for part in made]


def scattered():
    """Sources with background (-1) right and below of a smooth shape, and where there is any foreground."""
    sources = images()[0].clone()
    inside = torch.zeros(4, 32, 32, dtype=torch.bool)
    for n in range(4):
        inside[n, : 8 + 4 * n, : 20 - 4 * n] = True
    sources[~inside[:, None]] = -1
    return sources, inside.numpy()


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("coupling", ["lockstep", "cascade"])
def test_an_engine_used_again_gives_what_a_fresh_one_gives(sampler, coupling):
    model = awake(coupling=coupling, learn_variance=sampler == "ddpm").eval()
    settings = SampleConfig(steps=3, sampler=sampler, seed=5)
    engine, source = Engine(model, settings), images()[0]
    first = engine(source, IDS).levels
    for again in (engine(source, IDS).levels, model.translate(source, IDS, settings)):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    part = engine(source[2:], IDS[2:]).levels  # another batch size, the same vectors
    torch.testing.assert_close(part[0], first[0][2:], rtol=1e-4, atol=1e-5)


def test_the_vectors_of_a_timestep_are_computed_once(monkeypatch):
    model, asked = awake(members=2).eval(), []
    for net in model.nets:
        made = net.modulations
        monkeypatch.setattr(net, "modulations", lambda *a, made=made: asked.append(len(a[0])) or made(*a))
    engine = Engine(model, SampleConfig(steps=4, samples=3, views=2))
    for _ in range(3):
        engine(images()[0], IDS)
    assert asked == [1] * 8  # 4 timesteps x 2 members, one row each
    engine._room, engine._vectors = 0, {}
    engine(images()[0], IDS)  # no room: it still works
    assert len(asked) == 8 + 4 * 2 * 3 * 2


def test_a_stem_sees_every_slice_once_a_member_and_view():
    model, seen = awake(members=2).eval(), []
    for net in model.nets:
        net.stem.register_forward_hook(lambda module, given, made: seen.append(len(given[0])))
    Engine(model, SampleConfig(steps=5, samples=3, views=2))(images()[0], IDS)
    assert seen == [4] * 4


# --- background -----------------------------------------------------------------------------------


def tokens_of(model):
    """Tokens that the first block of the encoder and of the decoder see, call by call."""
    seen = []
    for blocks in (model.net.blocks, model.net.decoder_blocks):
        blocks[0].register_forward_pre_hook(lambda module, given: seen.append(given[0].shape[1]))
    return seen


def test_background_never_enters_the_transformer():
    model = awake().eval()
    sources, inside = scattered()
    engine, seen = Engine(model, SampleConfig()), tokens_of(model)
    for number, (rows, kept) in enumerate(plan(inside)):
        engine(sources[rows], IDS[rows], kept)
        if number == 0:  # the empty slice is computed whole, once
            assert seen[:6] == [4, 4, 16, 16, 64, 64]
            del seen[:6]
        assert seen == [n for level in (2, 1, 0) for n in 2 * [4 if level == 2 else kept[0][level].shape[1]]]
        seen.clear()


@pytest.mark.parametrize("more", [{}, {"reading": "diffmae"}, {"head": False}, {"coupling": "cascade"},
                                  {"decoder_input": "token"}, {"residual": True}], ids=str)  # fmt: skip
@pytest.mark.parametrize("sampler", ["ddim", "heun"])
def test_leaving_nothing_out_is_the_whole_image(more, sampler):
    """Every patch named: the same numbers, through the other way."""
    model = awake(**more).eval()
    settings = SampleConfig(steps=3, sampler=sampler)
    everything = [[torch.arange(64 >> 2 * n, dtype=torch.int32).expand(4, -1) for n in range(3)]]
    made = Engine(model, settings)(images()[0], IDS, everything).levels
    for a, b in zip(made, model.translate(images()[0], IDS, settings), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_an_empty_slice_stands_where_nothing_is_computed():
    """Without convolutions behind the tokens, what is left out is exactly what an empty slice shows there."""
    model = awake(head=False, stem=False).eval()
    sources, inside = scattered()
    engine = Engine(model, SampleConfig(seed=3))
    empty = model.translate(torch.full((1, 1, 32, 32), -1.0), torch.zeros(1, dtype=torch.int64), seed=3)[0]
    for rows, kept in plan(inside):
        made = engine(sources[rows], IDS[rows], kept).levels[0]
        left_out = torch.ones(len(rows), 64, dtype=torch.bool).scatter(1, kept[0][0].long(), False)
        where = left_out.view(-1, 1, 8, 8).repeat_interleave(4, 2).repeat_interleave(4, 3)
        assert where.any()
        torch.testing.assert_close(made[where], empty.expand_as(made)[where], rtol=1e-4, atol=1e-5)


def test_what_is_left_out_does_not_depend_on_the_batch():
    model = awake().eval()
    sources, inside = scattered()
    engine = Engine(model, SampleConfig(steps=2, views=2))
    made, alone = torch.zeros(4, 1, 32, 32), torch.zeros(4, 1, 32, 32)
    for rows, kept in plan(inside, views=2):
        made[rows] = engine(sources[rows], IDS[rows], kept).levels[0]
    for n in range(4):
        ((_, kept),) = plan(inside[n : n + 1], views=2)
        alone[n : n + 1] = Engine(model, engine.settings)(sources[n : n + 1], IDS[n : n + 1], kept).levels[0]
    torch.testing.assert_close(made, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", [{"prediction": "eps"}, {"prediction": "v"}, {"denoiser": "convolutions"}], ids=str)
def test_models_that_cannot_do_without_background_compute_it(model):
    model = awake(**model).eval()
    sources, inside = scattered()
    engine = Engine(model, SampleConfig(steps=2))
    assert not engine.skips
    for rows, kept in plan(inside):
        made = engine(sources[rows], IDS[rows], kept).levels[0]
        torch.testing.assert_close(made, model.translate(sources[rows], IDS[rows], steps=2)[0])


def test_many_steps_keep_few_empty_slices():
    model = awake().eval()
    sources, inside = scattered()
    engine = Engine(model, SampleConfig(steps=70))
    rows, kept = plan(inside)[0]
    engine(sources[rows], IDS[rows], kept)
    ((_, record),) = engine._empty.items()
    assert len(record) == 3 * 24  # of 70, every third
    assert torch.isfinite(engine(sources[rows], IDS[rows], kept).levels[0]).all()


# --- several samples ------------------------------------------------------------------------------


def test_samples_are_those_of_their_numbers_and_their_deviation_is_numpy_s():
    model = awake(members=2).eval()
    settings = SampleConfig(steps=3, sampler="ddpm", views=2)
    made = Engine(model, settings.model_copy(update={"samples": 3}))(images()[0], IDS)
    each = []
    for k in range(3):
        for member in range(2):
            for view in range(2):
                source = images()[0].flip(2) if view else images()[0]
                alone = awake(members=1).eval()
                alone.net.load_state_dict(model.nets[member].state_dict())
                plain = settings.model_copy(update={"views": 1})
                image = Engine(alone, plain)(source, IDS + k * SAMPLE).levels[0]
                each.append((image.flip(2) if view else image).numpy())
    np.testing.assert_allclose(made.levels[0].numpy(), np.mean(each, 0), atol=1e-5)
    np.testing.assert_allclose(made.deviation.numpy(), np.std(each, 0, ddof=1), atol=1e-5)
    assert float(made.deviation.mean()) > 1e-3


def test_one_image_has_no_deviation():
    assert Engine(awake().eval(), SampleConfig())(images()[0], IDS).deviation is None
