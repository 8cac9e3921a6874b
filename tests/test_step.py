"""A training step: nothing waits for the device, and every way to make it faster gives the same step."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from phmdiff_fast.config import build_config
from phmdiff_fast.distributed import Alone
from phmdiff_fast.ema import EMA
from phmdiff_fast.packing import packing_of
from phmdiff_fast.parallel import Single
from phmdiff_fast.phmdiff import PHMDiff
from phmdiff_fast.step import Step, compile_blocks, wants

CPU = torch.device("cpu")
MODEL = {"depth": 2, "width": 32, "heads": 2, "decoder_depth": 1, "decoder_width": 16, "decoder_heads": 2, "patch": 4,
         "stem_width": 8, "head_width": 8}  # fmt: skip
FINE = 32 * build_config("xs").data.oversample
KINDS = {
    "predicted": {},
    "teacher": {"coarse": "teacher"},
    "cascade, learned variance, eps": {"coupling": "cascade", "learn_variance": True, "prediction": "eps"},
    "bare token": {"decoder_input": "token", "stem": False, "head": False},
    "diffmae": {"reading": "diffmae"},
    "convolutions": {"denoiser": "convolutions"},
    "flat head": {"head_kind": "flat", "stem_to_tokens": True, "residual": True},
}


def settings(model=None, **train):
    tables = {"model": MODEL | (model or {}), "train": {"batch_size": 4, "lr": 1e-3, "mmd_weight": 0.1, **train}}
    return build_config("xs", {"data": {"image_size": 32}}, tables)


def made(model=None, device=CPU, dtype=torch.float32, **train) -> Step:
    config = settings(model, **train)
    torch.manual_seed(0)
    return Step(Single(PHMDiff(config.model, 1).to(device), Alone()), config, device, dtype)


def without_values(made_by, device) -> PHMDiff:
    """A model whose weights are fake tensors of ``device``, which need not exist; inside a FakeTensorMode."""
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        model = made_by()
    for module in model.modules():
        for name, p in module._parameters.items():
            module._parameters[name] = p if p is None else torch.nn.Parameter(torch.empty(p.shape, device=device))
        for name, b in module._buffers.items():
            module._buffers[name] = torch.empty(b.shape, dtype=b.dtype, device=device)
    return model


def batch(device=CPU, images: int = 4) -> list[torch.Tensor]:
    """As the cache gives it: finer than the images of 32 x 32 that the model sees."""
    drawn = torch.Generator().manual_seed(1)
    sources, target = torch.rand(2, images, 1, FINE, FINE, generator=drawn) * 2 - 1
    parts = [sources, target, torch.rand(images, 1, FINE, FINE, generator=drawn) < 0.7, torch.arange(images)[None]]
    return [part.to(device) for part in parts]


def gradients_of(step: Step) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in step.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_nothing_in_a_step_is_read_back(where, kind, masked):
    """Under fake tensors there are no values: ``.item()``, a branch on one or a size from one raises."""
    device = torch.device(where)
    everything = dict(gamma=0.3, scale=0.2, rotate=5.0, zoom=0.1, elastic=0.02, bias=0.2, noise=0.02, jitter=3,
                      tone=0.3, ssim_weight=0.2, min_snr=5.0, torch_compile="off")  # fmt: skip
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=False):
        warnings.simplefilter("ignore")
        config = settings(KINDS[kind], **everything)
        model = without_values(lambda: PHMDiff(config.model, 1), device)
        packing_of.cache_clear()
        step = Step(Single(model, Alone()), config, device, torch.bfloat16)
        images = [torch.rand(4, 1, FINE, FINE, device=device) for _ in range(2)]
        inside = torch.ones(4, 1, FINE, FINE, dtype=torch.bool, device=device)
        number = torch.zeros((), dtype=torch.int64, device=device)
        inputs = [*images, inside, torch.arange(4, device=device)[None], number]
        terms = step.gradients(inputs, masked, micro=2)
        bad = step.update(terms, 1e-3, 0)
    packing_of.cache_clear()
    assert bad.device.type == terms.total.device.type == where
    assert all(p.grad is not None for p in step.model.parameters() if id(p) not in idle(step, masked))


def idle(step: Step, masked: bool) -> set[int]:
    return {id(p) for p in step.model.unused(masked, 32, 32)}


def test_the_test_above_notices_a_value_that_is_read():
    with FakeTensorMode():
        step = made()
        terms = step.gradients([*batch(), 0], True, micro=4)
        with pytest.raises(DataDependentOutputException):
            float(terms.total)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", [True, False])
def test_unused_parameters_are_those_without_a_gradient(kind, masked):
    step = made(KINDS[kind])
    step.gradients([*batch(), 0], masked, micro=4)
    assert {id(p) for p in step.model.parameters() if p.grad is None} == idle(step, masked)


@pytest.mark.parametrize("finer", [1, 2])
def test_the_stage_is_told_the_size_the_model_sees(finer):
    """Several processes agree beforehand on what no gradient reaches, and that depends on the size."""
    step = made()
    step.config.data.oversample, told = finer, []
    step.together.stage = lambda *what: told.append(what)
    step.gradients([*batch(), 0], True, micro=4)
    assert told == [(True, FINE // finer, FINE // finer)]


def test_a_level_too_small_to_mask_leaves_its_fill_unused():
    levels = [{"mask_ratio": 0.75}, {"mask_ratio": 0.5}, {"mask_ratio": 0.2}]
    step = made({"patch": 8, "levels": levels, "complexity_gain": 0.0})  # level 2 has one token, and keeps it
    step.gradients([*batch(), 0], True, micro=4)
    names = {name for name, p in step.model.named_parameters() if p.grad is None}
    assert names == {"net.decoder_embedder.2.weight", "net.decoder_embedder.2.bias"}
    assert {id(p) for p in step.model.parameters() if p.grad is None} == idle(step, True)


def test_a_step_number_on_the_device_gives_the_same_step():
    results = []
    for number in (7, torch.tensor(7)):
        step = made(elastic=0.02, noise=0.02)
        terms = step.gradients([*batch(), number], True, micro=4)
        results.append((terms.total.detach(), gradients_of(step)))
    assert torch.equal(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        assert torch.equal(gradient, results[1][1][name]), name
    other = made(elastic=0.02, noise=0.02).gradients([*batch(), 8], True, micro=4)
    assert not torch.equal(other.total, results[0][0])  # the number is what noise, masks and augmentation are drawn by


def saved_bytes(step: Step) -> int:
    seen = {}

    def keep(t):
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        terms = step.loss(*batch(), 0, True)
    total = sum(seen.values())
    terms.total.backward()
    return total


def test_recomputing_gives_the_same_gradients_and_keeps_less():
    kept, gradients = [], []
    for recompute in (False, True):
        step = made({"depth": 8, "stem": False, "head": False}, recompute=recompute)  # blocks alone are recomputed
        kept.append(saved_bytes(step))
        gradients.append(gradients_of(step))
    assert kept[1] < 0.7 * kept[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("kind", ["predicted", "teacher"])
def test_compiled_blocks_are_one_graph_each_and_the_same_step(kind):
    expected = made(KINDS[kind])
    expected.gradients([*batch(), 0], True, micro=4)
    step = made(KINDS[kind])
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compile_blocks(step.model, "blocks", backend=backend)  # fullgraph: a break would raise
    step.gradients([*batch(), 0], True, micro=4)
    # Encoder, its last block (whose vectors are others' strides) and decoder, for each length they meet.
    assert len(graphs) == 3 * (1 if kind == "teacher" else 3)
    for name, gradient in gradients_of(expected).items():
        torch.testing.assert_close(dict(step.model.named_parameters())[name].grad, gradient, msg=name)
    torch._dynamo.reset()


def test_the_average_takes_a_share_from_the_device():
    weights = torch.nn.Linear(3, 3)
    averages = [EMA(weights, 0.9) for _ in range(2)]
    with torch.no_grad():
        weights.weight.add_(1.0)
    averages[0].take(0.25)
    averages[1].take(torch.tensor(0.25))
    for a, b in zip(averages[0].shadow, averages[1].shadow, strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.equal(averages[0].shadow[0], weights.weight)


def test_a_step_that_is_not_finite_changes_nothing():
    step = made()
    before = copy.deepcopy(step.model.state_dict())
    terms = step.gradients([*batch(), 0], True, micro=4)
    next(step.model.parameters()).grad[0] = float("nan")
    assert step.update(terms, 1e-3, 0) == 1
    assert all(torch.equal(value, before[name]) for name, value in step.model.state_dict().items())


@pytest.mark.parametrize(
    ("choice", "automatic", "means"),
    [("auto", True, True), ("auto", False, False), ("off", True, False), ("on", False, True)],
)
def test_auto_is_decided_by_the_machine(choice, automatic, means):
    assert wants(choice, automatic) is means


def test_whole_is_gradients_and_update():
    halves, whole = made(), made()
    for number in range(3):
        given = [*batch(), number]
        terms = halves.gradients(given, number < 2, 4)
        bad = halves.update(terms, 1e-3, number)
        both, not_finite = whole.whole(given, number < 2, 4, 1e-3, number)
        assert torch.equal(both.total, terms.total)
        assert torch.equal(bad, not_finite)
    for a, b in zip(halves.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["predicted", "teacher"])
def test_a_replayed_step_is_the_step(kind):
    device, results = torch.device("cuda"), {}
    for graph in ("off", "on"):
        step = made(KINDS[kind], device, torch.bfloat16, cuda_graph=graph, torch_compile="off")
        assert step.replays is (graph == "on")
        losses = []
        for number in range(12):
            inputs = [*batch(device), torch.full((), number, dtype=torch.int64, device=device)]
            terms, bad = step.whole(inputs, number < 6, 4, 1e-3 / (1 + number), number)
            losses.append(torch.stack([terms.total, bad]))
        results[graph] = torch.stack(losses).cpu(), [p.detach().cpu() for p in step.ema.shadow]
    assert torch.equal(results["on"][0], results["off"][0])
    assert all(torch.equal(a, b) for a, b in zip(results["on"][1], results["off"][1], strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", ["off", "blocks"])
def test_no_step_waits_for_the_gpu(compiled):
    device = torch.device("cuda")
    step = made(None, device, torch.bfloat16, cuda_graph="off", torch_compile=compiled)
    inputs = [*batch(device), torch.zeros((), dtype=torch.int64, device=device)]
    for masked in (True, False):
        step.whole(inputs, masked, 4, 1e-3, 0)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for masked in (True, False):
            step.whole(inputs, masked, 4, 1e-3, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
