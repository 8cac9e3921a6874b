"""Several processes against one: gradients, weights, samples. Two gloo processes on the CPU, started once."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import socket
import sys
import time
import traceback
from functools import partial
from multiprocessing import get_context

import numpy as np
import pytest
import torch

from phmdiff_fast import background, checkpoint, evaluate, generate, held_out, losses, parallel
from phmdiff_fast.config import build_config
from phmdiff_fast.distributed import Alone, Together, processes
from phmdiff_fast.ema import EMA
from phmdiff_fast.errors import PhmdiffError
from phmdiff_fast.model import TimestepEmbedder
from phmdiff_fast.phmdiff import PHMDiff

CPU = torch.device("cpu")
PRELOADED = ["phmdiff_fast.evaluate", "phmdiff_fast.held_out", "phmdiff_fast.parallel", "matplotlib.pyplot",
             "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor"]  # fmt: skip
SIZE, BATCH = 16, 4  # of all processes
TINY = dict(
    depth=1, width=32, heads=2, decoder_depth=1, decoder_width=16, decoder_heads=2, stem_width=16, head_width=16
)
MMD = {"mmd_weight": 0.5, "mmd_rows": 24}
TEACHER = {"coarse": "teacher", "coarse_noise": 100}


# --- two processes that do what they are told -------------------------------------------------------


def serve(pipe, rank: int, world: int, port: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))  # fmt: skip
    torch.set_num_threads(1)
    gc.freeze()  # what is imported is not looked through again
    with Together(CPU, timeout=60, ending=lambda line, code: pipe.send((False, line))) as ranks:
        while (order := pipe.recv()) is not None:
            function, arguments = order
            try:
                pipe.send((True, function(ranks, *arguments)))
            except Exception:
                pipe.send((False, traceback.format_exc()))
        ranks.max(0.0)
        ranks.part()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Pair:
    """``run(function, *arguments)``: function(ranks, *arguments) in both; both answers."""

    def __init__(self):
        context = get_context("forkserver")  # one import of torch for all
        context.set_forkserver_preload(PRELOADED)
        port = free_port()
        self.pipes, self.children = [], []
        for rank in range(2):
            mine, theirs = context.Pipe()
            child = context.Process(target=serve, args=(theirs, rank, 2, port), daemon=True)
            child.start()
            theirs.close()
            self.pipes.append(mine)
            self.children.append(child)

    def run(self, function, *arguments) -> list:
        for pipe in self.pipes:
            pipe.send((function, arguments))
        answers = []
        for pipe in self.pipes:
            assert pipe.poll(120), "no answer"
            answers.append(pipe.recv())
        for fine, answer in answers:
            assert fine, answer
        return [answer for _, answer in answers]

    def close(self) -> None:
        for pipe in self.pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        for child in self.children:
            child.join(20)
            child.kill()


@pytest.fixture(scope="module")
def pair():
    both = Pair()
    yield both
    both.close()


# --- what they do -----------------------------------------------------------------------------------


def settings(model: dict, train: dict):
    return build_config("s4", {"model": {**TINY, **model}, "train": {"batch_size": BATCH, **train}})


class Exact(PHMDiff):
    """In float64 all through: what the counter-based generator gives is float32."""

    def normals(self, sample_ids, like, rng, stream):
        return super().normals(sample_ids, like, rng, stream).to(like.dtype)


def make(config, dtype=torch.float32) -> PHMDiff:
    """A model whose every weight has a gradient: at the start of a training most are zero."""
    torch.manual_seed(1)
    model = Exact(config.model, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    for embedder in (m for m in model.modules() if isinstance(m, TimestepEmbedder)):  # its sinusoids are float32
        embedder.mlp.register_forward_pre_hook(lambda _, given: given[0].to(dtype))
    return model.to(dtype)


def images(dtype, step: int = 0):
    torch.manual_seed(100 + step)
    target, sources = (torch.rand(BATCH, 1, SIZE, SIZE, dtype=dtype) * 2 - 1 for _ in range(2))
    return target, sources, torch.randperm(1000)[:BATCH]


def backward(config, call, inputs, step, masked, weight=1.0, gather=None):
    terms = call(*inputs, (3, step), config.train, masked=masked, gather=gather)
    (terms.total * weight).backward()
    return [value.detach() * weight for value in (terms.total, terms.denoise, terms.mmd, terms.vlb)]


def one_process(config, model, inputs, step, masked, micro) -> torch.Tensor:
    """Gradients of all images, those that two processes have at a time together; the total."""
    total = 0
    for at in range(0, BATCH // 2, micro):
        rows = torch.arange(BATCH).view(2, -1)[:, at : at + micro].flatten()
        total += backward(config, model, [x[rows] for x in inputs], step, masked, 2 * micro / BATCH)[0]
    return total


def two_processes(config, together, inputs, step, masked, micro) -> torch.Tensor:
    each = BATCH // 2
    own = [x.view(2, each, *x.shape[1:])[together.ranks.rank] for x in inputs]
    parts = []
    for at in range(0, each, micro):
        gather = together.gather(inputs[2].view(2, each)[:, at : at + micro])
        with together.accumulate(at + micro >= each):
            given = [x[at : at + micro] for x in own]
            parts.append(backward(config, together.module, given, step, masked, micro / each, gather))
    return together.mean(parallel.LossTerms(*(sum(values) for values in zip(*parts, strict=True)))).total


def whole(tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def apart(model, reference) -> tuple[float, float]:
    """Relative difference (norms) of all gradients together, and the largest of a parameter's."""
    pairs = []
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        if (p.grad is None) != (q.grad is None):
            raise AssertionError(f"{name}: a gradient {'is missing' if p.grad is None else 'is there'}")
        if q.grad is not None:
            pairs.append((float((whole(p.grad) - q.grad).norm()), float(q.grad.norm())))
    off, norms = np.array(pairs).T
    return float(np.linalg.norm(off) / np.linalg.norm(norms)), float((off / norms).max())


def gradients(ranks, kind, model, train, stages, micro, dtype):
    """Per stage: relative differences of gradients and total, and the parameters without a gradient."""
    config = settings(model, train)
    reference, together = make(config, dtype), parallel.wrap(make(config, dtype), ranks, kind, CPU, torch.float32)
    out = []
    for step, masked in enumerate(stages):
        together.stage(masked, SIZE, SIZE)
        together.model.zero_grad(set_to_none=True)
        reference.zero_grad(set_to_none=True)
        inputs = images(dtype, step)
        met = ranks._met
        total = two_processes(config, together, inputs, step, masked, micro)
        met = ranks._met - met
        expected = one_process(config, reference, inputs, step, masked, micro)
        idle = sum(p.grad is None for p in reference.parameters())
        of_all, of_one = apart(together.model, reference)
        out.append((of_all, of_one, float(abs(total - expected) / abs(expected)), idle, met))
    return out


CASES = {  # model, train, stages (masked), micro-batch
    "predicted, MMD": ({}, MMD, [True, False, True], 2),
    "MMD of all rows, micro-batches": ({}, {**MMD, "mmd_rows": 1000}, [True, False], 1),
    "the paper's kernel, eps": ({"prediction": "eps"}, {**MMD, "mmd_kernel": "paper"}, [True], 2),
    "teacher, MMD": (TEACHER, MMD, [True, False], 2),
    "token": ({"decoder_input": "token"}, MMD, [True, False], 2),
    "diffmae": ({"reading": "diffmae"}, MMD, [False], 2),
    "cascade, learned variance, no MMD": ({"coupling": "cascade", "learn_variance": True}, {"mmd_weight": 0.0}, [True],
                                          2),
}  # fmt: skip
IN_FLOAT32 = ["predicted, MMD", "MMD of all rows, micro-batches"]
WITH_FSDP = [*IN_FLOAT32, "teacher, MMD", "token"]  # in the others is nothing that FSDP2 sees otherwise


@pytest.mark.parametrize(("kind", "case"), [*(("ddp", case) for case in CASES), *(("fsdp", c) for c in WITH_FSDP)])
def test_gradients_of_two_are_those_of_one(pair, kind, case):
    limits = {torch.float64: (1e-13, 1e-11)} | ({torch.float32: (1e-6, 3e-6)} if case in IN_FLOAT32 else {})
    for dtype, (limit, of_a_parameter) in limits.items():
        first, second = pair.run(gradients, kind, *CASES[case], dtype)
        assert first == second
        for off, worst, of_total, _, _ in first:
            assert off < limit
            assert worst < of_a_parameter
            assert of_total < limit


def test_a_stage_leaves_unused_parameters_out_and_the_wrapper_before_it_is_gone(pair):
    """Else a bucket would wait for ever, AdamW would decay what has no gradient, or all be summed twice."""
    found = pair.run(gradients, "ddp", {}, {"mmd_weight": 0.0}, [True, False, True, False], 2, torch.float32)[0]
    idle, met = [entry[3] for entry in found], [entry[4] for entry in found]
    assert idle == [2, 6, 2, 6]  # of 4 x 4, 2 x 2 and 1 patches the last is never masked
    assert len(set(met)) == 1


# --- whole steps, and what a checkpoint keeps of them -----------------------------------------------


def optimizer_of(config, model):
    tc = config.train
    return torch.optim.AdamW(model.parameters(), lr=tc.lr, betas=tc.betas, weight_decay=tc.weight_decay, fused=True)


def trained(config, model, gradients_of, clip, steps=4):
    """A few steps as the trainer makes them, the third with a gradient that counts as not finite."""
    optimizer, ema, norms = optimizer_of(config, model), EMA(model, 0.9), []
    for step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        gradients_of(step, step < 2)
        norms.append(float(clip(config.train.grad_clip)))
        optimizer.found_inf = torch.tensor(float(step == 2))
        optimizer.step()
        ema.update(step)
    return optimizer, ema, norms


def groups_of(model, optimizer, ema):
    return {"model": model.state_dict(), "ema": ema.state_dict(),
            "optimizer": checkpoint.optimizer_tensors(optimizer, model)}  # fmt: skip


def steps(ranks, kind, folder):
    """In float64, as Adam divides rounding by rounding where a gradient is nearly zero."""
    config, kept = settings({}, {**MMD, "grad_clip": 0.1, "lr": 1e-2}), torch.float64
    model = make(config, kept)
    reference = trained(
        config, model, lambda step, masked: one_process(config, model, images(kept, step), step, masked, 2),
        lambda limit: torch.nn.utils.clip_grad_norm_(model.parameters(), limit),
    )  # fmt: skip
    together = parallel.wrap(make(config, kept), ranks, kind, CPU, torch.float32)

    def gradients_of(step, masked):
        together.stage(masked, SIZE, SIZE)
        two_processes(config, together, images(kept, step), step, masked, 2)

    optimizer, ema, norms = trained(config, together.model, gradients_of, together.clip)
    expected = groups_of(model, *reference[:2])
    mine = checkpoint.share(together.full(groups_of(together.model, optimizer, ema)), ranks.rank, 2)
    checkpoint.save(folder, 4, mine, {"seconds": 1.0}, keep=2, rank=ranks.rank, world=2, token=ranks.token)
    ranks.max(0.0)
    found = checkpoint.newest(folder)
    tensors = {group: found.tensors(group) for group in expected}
    off = {
        group: max(float((tensors[group][name] - value).abs().max()) for name, value in values.items())
        for group, values in expected.items()
    }
    assert {group: set(values) for group, values in tensors.items()} == {g: set(v) for g, v in expected.items()}

    # Into another start, and out again: the same bits.
    again = parallel.wrap(PHMDiff(config.model, 1).to(kept), ranks, kind, CPU, torch.float32)
    optimizer, ema = optimizer_of(config, again.model), EMA(again.model, 0.9)
    again.model.load_state_dict(again.shard(tensors["model"]))
    ema.load_state_dict(again.shard(tensors["ema"]))
    checkpoint.load_optimizer(optimizer, again.model, again.shard(tensors["optimizer"]))
    back = again.full(groups_of(again.model, optimizer, ema))
    same = all(torch.equal(value, tensors[group][name]) for group, values in back.items()
               for name, value in values.items() if not value.is_meta)  # fmt: skip
    meta = sum(value.is_meta for values in back.values() for value in values.values())
    held = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in again.model.parameters())
    share = held / sum(p.numel() for p in model.parameters())
    return off, norms, reference[2], same, meta, share


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_steps_of_two_are_those_of_one_and_so_is_their_checkpoint(pair, kind, tmp_path):
    answers = pair.run(steps, kind, tmp_path)
    for off, norms, expected, same, meta, share in answers:
        assert max(off.values()) < 1e-10  # of steps of 1e-2
        assert norms == pytest.approx(expected, rel=1e-12)
        assert norms[0] > 0.1  # it was clipped
        assert same
        assert (meta > 0) == (kind == "fsdp")  # the other process' share
        assert share == 1 if kind == "ddp" else 0.4 < share < 0.6


# --- the MMD alone ----------------------------------------------------------------------------------


def discrepancy(ranks, rows):
    torch.manual_seed(5)
    eps, eps_hat = torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8, requires_grad=True)
    ids = torch.tensor([7, 3, 900, 12])
    alone = losses.cross_granularity(eps, eps_hat, 4, rows, ids, 1, (3, 9))
    (expected,) = torch.autograd.grad(alone, eps_hat)
    own = slice(2 * ranks.rank, 2 * ranks.rank + 2)
    gather = losses.Gather(ids.view(2, 2), ranks.rank, ranks.total)
    shared = losses.cross_granularity(eps[own], eps_hat[own], 4, rows, ids[own], 1, (3, 9), gather=gather)
    (gradient,) = torch.autograd.grad(shared, eps_hat)
    return torch.equal(shared, alone), torch.equal(gradient[own] / 2, expected[own]), float(expected.abs().max())


@pytest.mark.parametrize("rows", [6, 16, 100])  # of 16 patches
def test_the_mmd_of_two_has_the_bits_of_one(pair, rows):
    for value, gradient, largest in pair.run(discrepancy, rows):
        assert value
        assert gradient
        assert largest > 0


# --- sampling and figures ---------------------------------------------------------------------------


def a_run(folder):
    config = settings({}, {})
    found = checkpoint.Checkpoint(folder, 3, {"files": {"ema.safetensors": "ab"}, "seconds": 1.0})
    facts = {"units": "arbitrary", "median_p995": 900.0}
    config.data.image_size = SIZE
    return generate.Run(folder, config, make(config).eval(), facts, found, CPU, torch.float32)


def sampling(ranks, folder, skip):
    """A volume of 11 slices in batches of 3, of several and of this process alone; batches this one made."""
    run, made = a_run(folder), []
    sources = np.random.default_rng(0).uniform(-1, 1, (11, 1, SIZE, SIZE)).astype(np.float32)
    how = run.sample_settings(steps=3, batch_size=3, sampler="ddpm")
    inside = {"foreground": (sources[:, 0] > 0) & (np.arange(SIZE) < 12)} if skip else {}
    generate.batches = partial(background.batches, small=16)  # as if these images were large
    shared = generate.predict(run, sources, how, first=4, ranks=ranks, progress=made.append, **inside).mean
    alone = generate.predict(a_run(folder), sources, how, first=4, **inside).mean
    again = generate.predict(run, sources[:2], how, first=4, ranks=ranks).mean  # one batch: the other does it too
    return shared.tobytes() == alone.tobytes(), float(abs(shared - alone).max()), made, again.shape


@pytest.mark.parametrize("skip", [False, True], ids=["whole", "without background"])
def test_samples_of_two_are_those_of_one(pair, tmp_path, skip):
    answers = pair.run(sampling, tmp_path, skip)
    assert [made for _, _, made, _ in answers] == [[3, 3], [3, 2]]
    for same, off, _, shape in answers:
        assert same, off
        assert shape == (2, SIZE, SIZE)


def looking(ranks, folder, sharded):
    config = settings({}, {})
    torch.manual_seed(2)
    sources, target = torch.rand(2, 20, 1, SIZE, SIZE) * 2 - 1
    watched = held_out.HeldOut(sources, target, np.arange(50, 70), "slice", config, 20.0)
    whole, drawn = make(config).eval(), folder / f"of-{ranks.rank}"
    model = parallel.wrap(make(config).eval(), ranks, "fsdp", CPU, torch.float32).model if sharded else whole
    drawn.mkdir()
    psnr = watched.look(model, CPU, torch.float32, drawn, 5, ranks)
    alone = watched.look(whole, CPU, torch.float32, folder / "alone", 5) if ranks.first else psnr
    return psnr, alone, sorted(path.name for path in drawn.iterdir())


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "fsdp"])
def test_a_look_of_two_is_that_of_one_and_drawn_once(pair, tmp_path, sharded):
    (tmp_path / "alone").mkdir()
    (first, alone, drawn), (second, _, nothing) = pair.run(looking, tmp_path, sharded)
    assert first == second == alone
    assert drawn == ["levels-00000005.png", "step-00000005.png"]
    assert nothing == []
    for name in drawn:
        assert (tmp_path / "of-0" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def scoring(ranks, cohort, folder):
    run = a_run(folder)
    shared = evaluate.evaluate(run, cohort, run.sample_settings(batch_size=2), ranks=ranks, keep_images=True)
    paths = generate.sample(run, [cohort / "p0", cohort / "p1"], folder / "out", run.sample_settings(batch_size=2),
                            ranks=ranks)  # fmt: skip
    ranks.max(0.0)  # process 0 has written
    written = [path.is_file() for path in paths]
    alone = evaluate.evaluate(run, cohort, run.sample_settings(batch_size=2)) if ranks.first else None
    return shared.rows, alone and alone.rows, written, sorted(shared.made.get("ours", []))


def test_an_evaluation_of_two_is_that_of_one(pair, tiny_cohort, tmp_path):
    (tmp_path / "split.json").write_text(json.dumps({"train": ["p0"], "val": ["p1"], "test": ["p2", "p3"]}))
    (rows, alone, written, people), (nothing, _, seen, _) = pair.run(scoring, tiny_cohort, tmp_path)
    assert rows == alone
    assert len(rows) > 3
    assert nothing == []
    assert people == ["p2", "p3"]
    assert written == seen == [True, True]


# --- a process that is lost inside a backward pass --------------------------------------------------


def lost(how: str, rank: int, port: int, kind: str, folder) -> None:
    """Two steps; in the second, process 1 dies or hangs before the first of its gradients is there."""
    os.dup2(os.open(folder / f"{how}-{kind}-{rank}.err", os.O_WRONLY | os.O_CREAT), 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))  # fmt: skip
    torch.set_num_threads(1)
    config = settings({}, {"mmd_weight": 0.0})
    with Together(CPU, timeout=2, ending=lambda line, code: None) as ranks:
        together = parallel.wrap(make(config), ranks, kind, CPU, torch.float32)
        together.stage(False, SIZE, SIZE)
        for step in range(2):
            inputs = [x[2 * rank : 2 * rank + 2] for x in images(torch.float32, step)]
            with together.accumulate(True):
                terms = together.module(*inputs, (3, step), config.train, masked=False)
                if rank == 1 and step == 1:
                    ends = {"dies": lambda _: os._exit(3), "hangs": lambda _: time.sleep(60)}
                    terms.total.register_hook(ends.get(how, lambda _: 1 / 0))
                terms.total.backward()
        ranks.part()


def refusing(how: str, rank: int, port: int, folder) -> None:
    """Process 1 alone, or both, cannot read a file; processes that go on wait in a collective."""
    os.dup2(os.open(folder / f"{how}-{rank}.err", os.O_WRONLY | os.O_CREAT), 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))  # fmt: skip
    try:
        with processes(CPU, timeout=20) as ranks:
            with ranks.told_once():
                pass
            with ranks.told_once():
                if how == "both" or rank == 1:
                    raise PhmdiffError("NII_TRUNC", "is cut short", exit_code=3, file="a.nii")
            ranks.max(1.0)
    except PhmdiffError as problem:
        print(problem.line(), file=sys.stderr, flush=True)
        os._exit(problem.exit_code)


def test_what_all_would_say_is_said_once(tmp_path):
    context, ports = get_context("forkserver"), {"both": free_port(), "one": free_port()}
    children = {
        how: [context.Process(target=refusing, args=(how, rank, port, tmp_path)) for rank in range(2)]
        for how, port in ports.items()
    }
    for child in (child for both in children.values() for child in both):
        child.start()
    for how, both in children.items():
        for child in both:
            child.join(30)
        told = [(tmp_path / f"{how}-{rank}.err").read_text() for rank in range(2)]
        assert [child.exitcode for child in both] == [3, 3], told
        teller = 0 if how == "both" else 1
        assert told[teller].count("error[NII_TRUNC]") == 1
        assert told[1 - teller] == ""


def test_r5_a_process_lost_in_a_backward_pass_is_named(tmp_path):
    context, children = get_context("forkserver"), {}
    for how, kind in [("dies", "ddp"), ("hangs", "ddp"), ("hangs", "fsdp"), ("raises", "ddp")]:
        port = free_port()
        children[how, kind] = [
            context.Process(target=lost, args=(how, rank, port, kind, tmp_path)) for rank in range(2)
        ]
        for child in children[how, kind]:
            child.start()
    try:
        for (how, kind), (first, second) in children.items():
            first.join(60)
            told = (tmp_path / f"{how}-{kind}-0.err").read_text()
            if how == "raises":  # an error of its own: told by the process it belongs to
                second.join(20)
                assert first.exitcode == 1, told
                assert "ZeroDivisionError" in (tmp_path / f"{how}-{kind}-1.err").read_text()
                continue
            assert first.exitcode == 7, told
            assert "error[PEER_LOST]" in told
            assert f"process 1 (pid {second.pid}" in told
            assert ("is gone" if how == "dies" else "hangs: the others have waited") in told
            assert "Traceback" not in told
    finally:
        for child in (child for both in children.values() for child in both):
            child.kill()
            child.join(10)


# --- one process ------------------------------------------------------------------------------------


def test_alone_nothing_changes():
    config = settings({}, MMD)
    model, plain = make(config), make(config)
    single = parallel.wrap(model, Alone(), "ddp", CPU, torch.float32)
    assert single.module is single.model is model
    single.stage(False, SIZE, SIZE)
    assert all(p.requires_grad for p in model.parameters())
    inputs = images(torch.float32)
    assert single.gather(inputs[2][None]) is None
    with single.accumulate(True):
        backward(config, single.module, inputs, 0, True)
    backward(config, plain, inputs, 0, True)
    assert float(single.clip(0.1)) == float(torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1))
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad)
    groups = {"model": model.state_dict()}
    assert single.full(groups) is groups
    assert single.shard(groups["model"]) is groups["model"]
