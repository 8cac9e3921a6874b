"""How a training scales to many GPUs: a calculation from the settings (``python -m benchmarks.scaling``).

    step = compute + what of the communication does not hide behind backward

Bytes and FLOP are counted; rates are assumptions, printed with the table; nothing here has been measured on GPUs.
``--measure`` measures another thing: what two gloo processes on this CPU cost over one, a step of ``--preset``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
import torch

from benchmarks.bench_train import DIT
from phmdiff_fast.config import ModelConfig, build_config
from phmdiff_fast.distributed import Alone, Together
from phmdiff_fast.flops import step_flops
from phmdiff_fast.parallel import wrap
from phmdiff_fast.phmdiff import PHMDiff

FLOP_PER_S, SHARE = 790e12, 0.4  # bf16 products of one H200 (measured, DESIGN 8); the share of it a step reaches
FORWARD = 1 / 3  # of a step's arithmetic; buckets fill in the other two thirds
NVLINK = 450e9  # bytes/s a GPU, one way: NVLink 4
# 400 Gb/s InfiniBand a GPU. Eight rings run at once, one through each adapter of a node, with an eighth of the data
# each: what a GPU sends passes at the rate of all eight.
NETWORK = 8 * 50e9
REACHED = 0.8  # of those rates, by large messages
LATENCY = {8: 20e-6, 64: 60e-6}  # seconds of a collective that moves next to nothing
BUCKET = 25 << 20  # DDP's
MMD_ROWS, STATE_BYTES = 256, 20  # float32 weight, gradient, two moments, average


@dataclass(frozen=True)
class Setup:
    """A model and what it is trained on: (B, C, side, side) on each GPU, the masked stage."""

    name: str
    model: ModelConfig
    side: int
    images: int
    channels: int = 1  # of the target; as many of the source


def setups() -> list[Setup]:
    depth, width, heads = DIT["XL/2"]
    xl = ModelConfig(depth=depth, width=width, heads=heads, decoder_depth=8, decoder_width=512, decoder_heads=16,
                     patch=2, stem=False, head=False)  # fmt: skip
    presets = [Setup(name, build_config(name).model, 256, 32) for name in ("s4", "b4")]
    return [*presets, Setup("XL/2", xl, 32, 32, channels=4)]


def ring_bytes(payload: float, gpus: int) -> float:
    """What each GPU sends in an all-reduce of ``payload`` bytes by a ring: a reduce-scatter and an all-gather."""
    return 2 * (gpus - 1) / gpus * payload


def parameters(setup: Setup) -> int:
    with torch.device("meta"):
        model = PHMDiff(setup.model, setup.channels, setup.channels)
    return sum(p.numel() for p in model.parameters())


def in_modulations(setup: Setup) -> int:
    """Parameters of the blocks' modulations, which run once for all levels."""
    blocks = setup.model.depth * 6 * setup.model.width + setup.model.decoder_depth * 6 * setup.model.decoder_width
    return blocks * (setup.model.width + 1)


@dataclass(frozen=True)
class Calculated:
    """Of one step on ``gpus`` GPUs: bytes each sends, seconds, and the share of its time a GPU computes."""

    gpus: int
    gradient_bytes: float
    mmd_bytes: float
    fsdp_bytes: float
    compute_s: float
    all_reduce_s: float
    exposed_s: float  # DDP: what backward does not hide
    fsdp_s: float  # FSDP2: all its traffic, hidden or not
    state_gib: tuple[float, float]  # weights, gradients, moments and average a GPU: DDP, FSDP2

    @property
    def efficiency(self) -> float:
        return self.compute_s / (self.compute_s + self.exposed_s)

    @property
    def fsdp_floor(self) -> float:
        """If nothing of FSDP2's traffic were hidden."""
        return self.compute_s / (self.compute_s + self.fsdp_s)


def calculate(setup: Setup, gpus: int) -> Calculated:
    count, levels = parameters(setup), len(setup.model.levels)
    gradients = 4.0 * count
    mmd = levels * MMD_ROWS * 2 * setup.channels * setup.model.patch**2 * 4  # drawn and predicted rows, float32
    rate = REACHED * (NVLINK if gpus <= 8 else NETWORK)
    flops = step_flops(setup.model, setup.channels, setup.side, setup.images, True, target_channels=setup.channels)
    compute = flops.training / (FLOP_PER_S * SHARE)
    buckets = -(-gradients // BUCKET)
    all_reduce = ring_bytes(gradients, gpus) / rate + buckets * LATENCY[gpus]
    last = ring_bytes(min(BUCKET, gradients), gpus) / rate + LATENCY[gpus]  # full only when backward is over
    exposed = max(last, all_reduce - (1 - FORWARD) * compute)
    exposed += levels * LATENCY[gpus] + ring_bytes(mmd, gpus) / rate  # the MMD's, in the forward pass
    # Weights are gathered in 16 bits for each use, forward and again backward: for every level, unless all run at
    # once, but a modulation's for all levels together. Gradients are scattered once, in 32 bits.
    uses = 1 if setup.model.coarse == "teacher" else levels
    once = in_modulations(setup)
    sharded = (gpus - 1) / gpus * (2 * 2 * (uses * (count - once) + once) + 4 * count)
    units = setup.model.depth + setup.model.decoder_depth
    fsdp = sharded / rate + units * (2 * uses + 1 + 3) * LATENCY[gpus]
    state = STATE_BYTES * count / 2**30
    return Calculated(gpus, ring_bytes(gradients, gpus), ring_bytes(mmd, gpus), sharded, compute, all_reduce, exposed,
                      fsdp, (state, state / gpus))  # fmt: skip


def table() -> str:
    """The table of docs/SCALING.md, in Markdown."""
    lines = [
        "| model, images a GPU | parameters | GPUs | all-reduced | MMD | compute | all-reduce | not hidden | DDP | "
        "FSDP2 sends | FSDP2 at least | state, DDP / FSDP2 |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for setup in setups():
        count = parameters(setup)
        for gpus in (8, 64):
            c = calculate(setup, gpus)
            lines.append(
                f"| {setup.name}, {setup.images} of {setup.side} x {setup.side} | {count / 1e6:.0f} M | {gpus} "
                f"| {c.gradient_bytes / 1e6:.0f} MB | {c.mmd_bytes / 1e6:.2f} MB | {c.compute_s * 1e3:.1f} ms "
                f"| {c.all_reduce_s * 1e3:.1f} ms | {c.exposed_s * 1e3:.2f} ms | {c.efficiency:.0%} "
                f"| {c.fsdp_bytes / 1e6:.0f} MB | {c.fsdp_floor:.0%} "
                f"| {c.state_gib[0]:.2f} / {c.state_gib[1]:.2f} GiB |"
            )
    return "\n".join(lines)


def assumptions() -> str:
    return (
        f"assumed: {SHARE:.0%} of {FLOP_PER_S / 1e12:.0f} TFLOP/s (bf16, H200); {REACHED:.0%} of NVLink's "
        f"{NVLINK / 1e9:.0f} GB/s within 8 GPUs, of {NETWORK / 1e9:.0f} GB/s (a node's eight adapters of 400 Gb/s) "
        f"for 64; {LATENCY[8] * 1e6:.0f} and {LATENCY[64] * 1e6:.0f} us a collective; two thirds of compute are "
        "backward, behind which all buckets but the last hide"
    )


# --- measured: two gloo processes on this CPU -------------------------------------------------------


def timed_steps(ranks: Alone, preset: str, side: int, images: int, repeats: int) -> dict[str, float]:
    """Medians of seconds a step (forward and backward), and of an all-reduce of as many bytes as its gradients."""
    config = build_config(preset, {"train": {"batch_size": images * ranks.world}})
    cpu = torch.device("cpu")
    torch.manual_seed(0)
    together = wrap(PHMDiff(config.model, 1), ranks, "ddp", cpu, torch.float32)
    together.stage(True, side, side)
    everybody = torch.arange(images * ranks.world).view(ranks.world, images)
    target, sources = (torch.rand(images, 1, side, side) * 2 - 1 for _ in range(2))
    flat = torch.zeros(sum(p.numel() for p in together.model.parameters()))
    steps, reduces = [], []
    for step in range(repeats + 3):
        together.model.zero_grad(set_to_none=True)
        ranks.max(0.0)
        begun = time.perf_counter()
        with together.accumulate(True):
            terms = together.module(target, sources, everybody[ranks.rank], (0, step), config.train, masked=True,
                                    gather=together.gather(everybody))  # fmt: skip
            terms.total.backward()
        steps.append(time.perf_counter() - begun)
        ranks.max(0.0)
        begun = time.perf_counter()
        ranks.total(flat)
        reduces.append(time.perf_counter() - begun)
    return {"step": statistics.median(steps[3:]), "all_reduce": statistics.median(reduces[3:])}


def _one_of_two(pipe, rank: int, port: int, arguments: tuple) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))  # fmt: skip
    torch.set_num_threads(1)
    with Together(torch.device("cpu"), timeout=300, ending=lambda line, code: None) as ranks:
        pipe.send(timed_steps(ranks, *arguments))
        ranks.max(0.0)
        ranks.part()


def measure(preset: str, side: int, images: int, repeats: int) -> str:
    """One process with ``images``, and two with as many each, a thread each: a step and its all-reduce."""
    import socket

    torch.set_num_threads(1)
    alone = timed_steps(Alone(), preset, side, images, repeats)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = get_context("spawn")
    pairs = [context.Pipe(duplex=False) for _ in range(2)]
    arguments = (preset, side, images, repeats)
    children = [context.Process(target=_one_of_two, args=(pairs[rank][1], rank, port, arguments)) for rank in range(2)]
    for child in children:
        child.start()
    answers = [mine.recv() for mine, _ in pairs]
    for child in children:
        child.join()
    both = {name: float(np.max([answer[name] for answer in answers])) for name in alone}
    extra = both["step"] - alone["step"]
    return "\n".join([
        "| processes | images each | step | over one process | an all-reduce of as many bytes, share of a step |",
        "|---|---|---|---|---|",
        f"| 1 | {images} | {alone['step'] * 1e3:.1f} ms | | |",
        f"| 2 (gloo) | {images} | {both['step'] * 1e3:.1f} ms | {extra * 1e3:+.1f} ms ({extra / alone['step']:+.0%}) "
        f"| {both['all_reduce'] * 1e3:.1f} ms, {both['all_reduce'] / both['step']:.0%} |",
    ])  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="two gloo processes against one, on this CPU")
    parser.add_argument("--preset", default="s4")
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--images", type=int, default=4, help="of each process")
    parser.add_argument("--repeats", type=int, default=15)
    given = parser.parse_args(arguments)
    if given.measure:
        print(measure(given.preset, given.side, given.images, given.repeats))
        print(f"{given.preset}, {given.side} x {given.side}, masked stage, float32, one thread a process, "
              f"median of {given.repeats}")  # fmt: skip
        return
    print(table())
    print(f"\nA calculation, not a measurement; {assumptions()}.")


if __name__ == "__main__":
    sys.exit(main())
