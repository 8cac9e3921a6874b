"""The training benchmark: the peers compute what they say, arithmetic is counted right, goals are judged right."""

from __future__ import annotations

import copy
import json
from unittest import mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import bench_train, peers, train_compare
from benchmarks.bench_train import VARIANTS, PeerStep, Shape
from phmdiff_fast import attention, blocks
from phmdiff_fast.config import LevelSpec, ModelConfig, TrainConfig
from phmdiff_fast.kernels.patch_mask import embed_visible
from phmdiff_fast.phmdiff import PHMDiff

CPU = torch.device("cpu")
SIDE, BATCH = 32, 2


def config(ratios=(0.75, 0.5, 0.25), **more) -> ModelConfig:
    sizes = dict(depth=2, width=32, heads=2, decoder_depth=1, decoder_width=16, decoder_heads=2, patch=4)
    return ModelConfig(**sizes, levels=[LevelSpec(mask_ratio=r) for r in ratios], stem=False, head=False, **more)


def images(channels: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = torch.Generator().manual_seed(1)
    return tuple(torch.rand(BATCH, channels, SIDE, SIDE, generator=drawn) * 2 - 1 for _ in range(2))


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """Weights without zeros: a fresh DiT's blocks are shut (adaLN-Zero) and would hide every fault."""
    drawn = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=drawn) * 0.1)
    return model


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names, weights = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, weights), strict=True))


def peer(kind, ratios=(0.75, 0.5, 0.25), **how):
    return randomised(kind(config(ratios), 2, 2, SIDE, **how))


@pytest.mark.parametrize("kind", [peers.DiT, peers.MaskDiT], ids=["dit", "maskdit"])
def test_every_weight_of_a_peer_gets_a_gradient(kind):
    model = peer(kind, fused=False)
    torch.manual_seed(0)
    for name, gradient in gradients(model, model.loss(*images())).items():
        assert 0 < gradient.abs().sum() < float("inf"), name


@pytest.mark.parametrize("kind", [peers.DiT, peers.MaskDiT], ids=["dit", "maskdit"])
def test_both_attentions_of_a_peer_are_one_function(kind):
    published, tuned = peer(kind, fused=False), peer(kind, fused=True)
    draws = published.draw(images()[0])
    losses = [model.loss_of(*images(), draws) for model in (published, tuned)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    for one, other in zip(gradients(published, losses[0]).values(), gradients(tuned, losses[1]).values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_compiled_peer_is_the_same_function():
    """With the backend that only traces: the code generator takes minutes and is torch's own affair."""
    model = peer(peers.MaskDiT, (0.75,), fused=True)
    draws = model.draw(images()[0])
    compiled = torch.compile(model.loss_of, dynamic=False, fullgraph=True, backend="eager")
    assert compiled(*images(), draws).item() == pytest.approx(model.loss_of(*images(), draws).item(), rel=1e-6)


def test_dit_is_the_same_on_our_blocks():
    theirs, ours = peer(peers.DiT, fused=True), peers.DiTOnOurBlocks(config(), 2, 2, SIDE)
    ours.load_peer(theirs)
    draws = theirs.draw(images()[0])
    wanted, got = (model.loss_of(*images(), draws) for model in (theirs, ours))
    assert got.item() == pytest.approx(wanted.item(), rel=1e-5)
    of_peer = gradients(theirs, wanted)
    for name, gradient in gradients(ours, got).items():
        torch.testing.assert_close(gradient, of_peer[name].view_as(gradient), rtol=1e-3, atol=1e-6, msg=name)


def test_the_unmasked_dit_is_ours_up_to_the_decoder():
    """One level, nothing masked: what the peer's encoder sees is what ours embeds, from the same weights."""
    model = peer(peers.DiT, (0.0,), fused=True)
    ours = PHMDiff(config((0.0,)), 2, 2)
    conv = model.x_embedder[0]
    target, sources = images()
    draws = model.draw(target)
    abar = ours.schedule(draws.t)
    got = embed_visible(target, sources, None, abar, None, conv.weight.flatten(1), conv.bias, model.pos0,
                        eps=draws.eps[0], state_scale=abar.sqrt())  # fmt: skip
    torch.testing.assert_close(model.tokens(0, target, sources, None, abar.view(-1, 1, 1, 1), draws.eps[0]), got,
                               rtol=1e-4, atol=1e-5)  # fmt: skip


def test_masked_ids_are_a_permutation_that_restore_undoes():
    kept, restore = peers.masked_ids(torch.rand(BATCH, 64), 16)
    order = torch.argsort(restore, 1)
    assert torch.equal(order[:, :16], kept)
    assert torch.equal(order.sort(1).values, torch.arange(64).expand(BATCH, -1))


def test_masked_tokens_do_not_reach_the_encoder():
    model = peer(peers.MaskDiT, (0.75,), fused=True)
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given[0].shape))
    model.loss(*images())
    assert seen == [(BATCH, 16, 32)]  # a quarter of 64 tokens


def test_loop_ema_is_an_average():
    model = torch.nn.Linear(2, 2)
    before, ema = copy.deepcopy(model), peers.LoopEMA(model, 0.9)
    with torch.no_grad():
        model.weight.add_(1)
    ema.update(0)
    torch.testing.assert_close(ema.shadow[0], before.weight + 0.1)


# --- arithmetic --------------------------------------------------------------------------------------


def counted(model: torch.nn.Module, loss) -> int:
    """Of forward and backward; bf16, in which attention on a CPU is two plain products."""
    counter, plain = FlopCounterMode(display=False), mock.patch.object(blocks, "serves", return_value=False)
    with plain, attention.use("products"), counter:  # it cannot look into our operations
        with torch.autocast("cpu", torch.bfloat16):
            total = loss()
        total.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("ratios", [(0.75,), (0.75, 0.5, 0.25)], ids=["one", "pyramid"])
@pytest.mark.parametrize("form", ["dit", "maskdit"])
def test_flops_of_the_peers_are_those_torch_counts(form, ratios):
    model = peer({"dit": peers.DiT, "maskdit": peers.MaskDiT}[form], ratios, fused=False)
    found = counted(model, lambda: model.loss(*images()))
    assert found == BATCH * peers.flops(form, config(ratios), 2, 2, SIDE)


@pytest.mark.parametrize("decoder_input", ["noisy", "token"])
@pytest.mark.parametrize("ratios", [(0.75,), (0.75, 0.5, 0.25)], ids=["one", "pyramid"])
@pytest.mark.parametrize("form", ["ours", "unmasked"])
def test_our_flops_are_those_torch_counts(form, ratios, decoder_input):
    sizes = config(ratios, decoder_input=decoder_input)
    model = randomised(PHMDiff(sizes, 2, 2))
    ids, train = torch.arange(BATCH), TrainConfig(mmd_weight=0.0)
    found = counted(model, lambda: model.loss(*images(), ids, (0, 0), train, masked=form == "ours").total)
    assert found == BATCH * peers.flops(form, sizes, 2, 2, SIDE)


# --- steps and memory ----------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch):
    """A shape of a few weights under the name of a preset."""
    monkeypatch.setattr(Shape, "model", property(lambda self: config(bench_train.LEVELS[self.levels])))
    monkeypatch.setattr(Shape, "side", property(lambda self: SIDE))
    return Shape("xs", "pyramid", BATCH)


def test_a_step_trains_and_leaves_no_gradients(tiny):
    for name in ("dit", "maskdit", "dit_blocks", "ours"):
        torch.manual_seed(0)
        step = VARIANTS[name][1](tiny, CPU, torch.float32)
        before = [p.clone() for p in step.model.parameters()]
        assert torch.isfinite(step())
        assert step.count == 1
        assert all(p.grad is None for p in step.model.parameters())
        assert any(not torch.equal(a, b) for a, b in zip(before, step.model.parameters(), strict=True)), name


def test_parts_of_a_batch_give_the_gradients_of_the_whole():
    """Seen in what SGD subtracts; eight images, three at a time, so that the last part is a smaller one."""
    found = []
    for images_at_a_time in (8, 3):
        model = torch.nn.Conv2d(1, 1, 3, bias=False)
        torch.nn.init.constant_(model.weight, 0.1)
        step = PeerStep(model, lambda y, c, m=model: (m(c)).square().mean(), Shape("xs", "one", 8), CPU, torch.float32)
        step.micro, step.optimizer, step.clip = images_at_a_time, torch.optim.SGD(model.parameters(), lr=1.0), 1e9
        found.append((step(), model.weight.detach()))
    assert not torch.allclose(found[0][1], torch.tensor(0.1))
    torch.testing.assert_close(found[0], found[1])


def test_a_step_that_does_not_fit_takes_the_batch_in_parts():
    class Full(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def forward(self, target, sources):
            if len(target) > 3:
                raise torch.OutOfMemoryError("more than three images")
            return self.weight * target.mean()

    model = Full()
    step = PeerStep(model, model, Shape("xs", "one", 8), CPU, torch.float32)
    step.fit()
    assert (step.micro, step.count) == (2, 1)


def test_peak_counts_what_lives_at_once():
    def call():
        first = torch.zeros(1 << 18)  # 1 MiB
        second = first + 1
        del first
        return second + 1

    assert train_compare.peak_of(call, CPU) == pytest.approx(2 << 20, abs=1024)  # and a few scalars


def test_held_bytes_are_weights_moments_and_average(tiny):
    step = VARIANTS["maskdit"][1](tiny, CPU, torch.float32)
    step()
    weights = sum(p.numel() * 4 for p in step.model.parameters())
    others = sum(b.numel() * b.element_size() for b in step.model.buffers())
    counters = 4 * len(list(step.model.parameters()))  # AdamW's step of each
    assert step.held_bytes() == 4 * weights + others + counters


def test_rounds_call_every_variant_in_turning_order():
    calls = []
    train_compare.interleaved({name: lambda name=name: calls.append(name) for name in "abc"}, CPU, 0.0)
    assert "".join(calls) == "abcbcacababcbca"  # five rounds; nothing after them within a budget of 0


# --- the table -----------------------------------------------------------------------------------------


def record(times: dict[str, float], *, shape="s4", batch=32, device="cpu", **more) -> dict:
    flops = {"ours": 10, "maskdit": 10, "maskdit_modern": 10, "dit": 30, "dit_blocks": 30}
    variants = {
        name: {"step_s": taken, "images_per_s": batch / taken, "held_bytes": 100, "step_bytes": 100, "peak_bytes": 200,
               "images_at_a_time": batch, "flops_per_image": flops[name], "flop_per_s": 1.0, "share": 0.6}
        for name, taken in times.items()
    }  # fmt: skip
    for name, figures in more.items():
        variants[name] |= figures
    out = {"shape": shape, "levels": "one", "batch": batch, "dtype": "bfloat16", "product_flop_per_s": 1e12,
           "variants": variants}  # fmt: skip
    return out | train_compare.summary(out, device)


def met(record: dict) -> dict[str, bool | None]:
    return {goal["goal"]: goal["met"] for goal in record["goals"]}


def test_the_speed_up_is_over_the_faster_dit():
    found = record({"ours": 1.0, "dit": 4.0, "dit_blocks": 2.7, "maskdit": 1.1})
    assert found["fastest_dit"] == "dit_blocks"
    assert (found["speedup"], found["flop_ratio"]) == (2.7, 3.0)
    assert found["efficiency"] == pytest.approx(0.9)
    assert found["efficiency_peer"] == pytest.approx(4 / 3)  # beside it, over the peers' own form


def test_goals_of_a_cpu():
    found = met(record({"ours": 1.0, "dit": 2.5, "maskdit": 1.04, "maskdit_modern": 1.0}, ours={"peak_bytes": 139}))
    assert found == {
        "speed-up over the FLOP ratio": False,  # 2.5 / 3 < 0.85
        "x MaskDiT as published": False,
        "x MaskDiT modern": True,
        "memory over MaskDiT as published, at most": True,
    }
    small = met(record({"ours": 1.0, "dit": 2.5, "maskdit": 1.06}, batch=4))
    assert list(small.values()) == [True, True, None, False]


def test_goals_of_a_gpu():
    times = {"ours": 1.0, "dit": 2.5, "maskdit": 2.6, "maskdit_modern": 1.2}
    found = met(record(times, shape="XL/2", batch=256, device="cuda"))
    assert list(found.values()) == [False, True, False, True, False]
    found = met(record(times, shape="S/2", batch=16, device="cuda"))
    assert set(found) == {"speed-up over the FLOP ratio", "memory over MaskDiT as published, at most"}


def test_memory_of_a_batch_in_parts_is_compared_with_nothing():
    found = record({"ours": 1.0, "dit": 2.5, "maskdit": 1.1}, maskdit={"images_at_a_time": 16})
    assert met(found)["memory over MaskDiT as published, at most"] is None
    assert found["step_memory"] is None


def test_the_table_has_a_row_for_what_did_not_fit():
    found = record({"ours": 1.0, "dit": 2.5, "maskdit": 1.1}, dit={"images_at_a_time": 4})
    found["variants"]["maskdit_modern"] = {"error": "memory is too small"}
    rows = train_compare.table(found)
    assert all(len(row) == len(train_compare.HEADS) for row in rows)
    assert [row[2] for row in rows] == ["", "4 at a time", "", "memory is too small"]
    assert [row[5] for row in rows[:3]] == ["2.50", "1.00", "2.27"]
    assert any("not measured" in line for line in train_compare.lines(found))


@pytest.mark.parametrize("apart", [False, True], ids=["together", "apart"])
def test_measuring_a_shape_gives_every_figure(tiny, monkeypatch, apart):
    monkeypatch.setattr(train_compare, "product_rate", lambda *_: 1e12)
    found = train_compare.measure(tiny, ["dit", "maskdit", "ours"], CPU, torch.float32, budget=0.0, apart=apart)
    assert set(found["variants"]) == {"dit", "maskdit", "ours"}
    assert found["fastest_dit"] == "dit"
    assert all(f["step_s"] > 0 and f["step_bytes"] > 0 for f in found["variants"].values())
    json.dumps(found)
    assert train_compare.table(found)


def test_curves_of_both_paths_agree(monkeypatch):
    """In this process, one masked and one unmasked step; only a process of its own can leave the extension out."""
    import phmdiff_fast.kernels._impl as impl

    monkeypatch.setattr(impl, "HAS_TRITON", impl.HAS_TRITON)  # put back what the plain path sets
    plain, fast = (train_compare.curve("teacher", 2, CPU, reference) for reference in (True, False))
    assert plain[0] != plain[1]
    assert plain == pytest.approx(fast, rel=1e-5)


def test_levels_one_after_the_other_are_those_of_one_pass():
    model = randomised(PHMDiff(config(coarse="teacher"), 2, 2))
    ids, train = torch.arange(BATCH), TrainConfig(mmd_weight=0.0)
    packed = gradients_of_ours(model, ids, train)
    calls, together = [], model.net.forward_levels
    model.net.forward_levels = lambda inputs, vectors: calls.append(len(inputs)) or together(inputs, vectors)
    train_compare.one_after_the_other(model.net)
    apart = gradients_of_ours(model, ids, train)
    assert calls == [1, 1, 1]
    for one, other in zip(packed, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def gradients_of_ours(model: PHMDiff, ids, train) -> list[torch.Tensor]:
    loss = model.loss(*images(), ids, (0, 0), train, masked=True).total
    return list(torch.autograd.grad(loss, list(model.parameters())))
