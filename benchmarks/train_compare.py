"""Training beside the peers: ``python -m benchmarks.train_compare [--shape s4] [--batch 4 32] [--json FILE]``.

The variants are in ``bench_train.py``. One step of each a round, in turning order, on the same batch with the same
optimizer (fused AdamW, gradients clipped to 1, average of the weights); medians. Every variant runs under bf16
autocast where the processor multiplies bf16 natively, else in float32. Convolutions (stem, head) and MMD are off,
as the peers have none; the last two lines of a preset show it whole, masked and unmasked.

Speed-up is over the fastest form of the unmasked DiT, on the peers' blocks or on ours; the FLOP ratio is the DiT's
products and attention over ours, and efficiency the one over the other; beside it stands the one over the peers' own
DiT. Peak memory is what a variant holds
(weights, optimizer, average) and what a step allocates on top: by CUDA's allocator on a GPU, on a CPU by the
allocator events of torch's profiler. A variant that does not fit takes the batch in parts; its memory is then
compared with nothing.

``--curves`` trains twice in float32, on the plain reference path (no kernels, no extension, no compilation, one
level after the other) and with everything on, and compares the loss curves.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import harness, peers
from benchmarks.bench_train import DIT, DITS, FORMS, LEVELS, VARIANTS, OurStep, Shape, variants_for
from phmdiff_fast.config import PRESETS, build_config
from phmdiff_fast.device import pick_precision
from phmdiff_fast.errors import PhmdiffError
from phmdiff_fast.phmdiff import PHMDiff

CURVES = ("predicted", "teacher")  # where a level's coarse image comes from: level after level, or all in one pass
CURVE_GOAL = 1e-4
CURVE_LR = 1e-4  # of this benchmark's other steps
PLAIN = {"PHMDIFF_EXTENSION": "0", "PHMDIFF_ATTENTION": "products"}  # environment of the plain reference path


# --- measuring ------------------------------------------------------------------------------------------


def peak_of(call: Callable[[], object], device: torch.device) -> int:
    """Bytes that ``call`` allocates on top of what lay there, at their most.

    On a CPU: the running sum of the allocator events of torch's profiler, which sees every tensor of the call, what
    autograd keeps and the scratch that operations take from torch; not what a library allocates by itself.
    """
    if device.type == "cuda":
        return harness.peak_bytes(call, device)
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    moves = sorted((e["ts"], e["args"]["Ev Idx"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    held = most = 0
    for *_, moved in moves:
        held += moved
        most = max(most, held)
    return most


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product: measured before on known GPUs, else now."""
    if device.type == "cuda":
        return harness.ceiling(device)[1]
    m = torch.randn(2048, 2048).to(dtype)
    return 2 * 2048**3 / min(harness.seconds(lambda: torch.mm(m, m), device) for _ in range(5))


def measure(
    shape: Shape, names: list[str], device: torch.device, dtype: torch.dtype, *, budget: float, apart: bool = False
) -> dict:  # fmt: skip
    """A record of one shape: variant -> seconds a step and what they mean.

    budget : seconds a variant; apart : one variant after the other, each with the whole memory for itself
    """
    steps, times, out = {}, {}, {}
    for name in names:
        torch.manual_seed(0)
        try:
            step = VARIANTS[name][1](shape, device, dtype)
            step.fit()
        except (PhmdiffError, torch.OutOfMemoryError) as problem:
            out[name] = {"error": getattr(problem, "what", "does not fit in memory")}
            step = None
            harness.forget()
            continue
        step.optimizer.zero_grad(set_to_none=True)  # they count among what a step allocates
        held, most = step.held_bytes(), peak_of(step, device)
        loss = [float(step()) for _ in range(4 if device.type == "cuda" else 1)][-1]  # a CUDA graph is made now
        if not loss < float("inf"):
            raise harness.WrongResult(f"{shape}: the loss of {name} is {loss}")
        out[name] = {"held_bytes": held, "step_bytes": most, "peak_bytes": held + most, "images_at_a_time": step.micro}
        steps[name] = step
        if apart:
            times |= interleaved(steps, device, budget)
            step = None
            steps.clear()
            harness.forget()
    if not apart:
        times = interleaved(steps, device, budget)
    rate, config = product_rate(device, dtype), shape.model
    for name, taken in times.items():
        out[name] |= {"step_s": taken, "images_per_s": shape.batch / taken}
        if name in FORMS:
            count = peers.flops(FORMS[name], config, shape.channels, shape.channels, shape.side)
            speed = count * shape.batch / taken
            out[name] |= {"flops_per_image": count, "flop_per_s": speed, "share": speed / rate}
    record = {"shape": shape.name, "levels": shape.levels, "batch": shape.batch, "dtype": str(dtype)[6:],
              "apart": apart, "product_flop_per_s": rate, "variants": out, **harness.origin(device)}  # fmt: skip
    return record | summary(record, device.type)


def interleaved(steps: dict[str, Callable[[], object]], device: torch.device, budget: float) -> dict[str, float]:
    """variant -> median seconds. Each round calls every variant once, in turning order; a slow one sits rounds out."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for turn in range(100):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if turn < 5 or sum(found[name]) < budget:
                found[name].append(harness.seconds(steps[name], device))
    return {name: statistics.median(times) for name, times in found.items()}


# --- what it means --------------------------------------------------------------------------------------


def summary(record: dict, device: str) -> dict:
    """Ratios of a record and its goals: {"speedup", "flop_ratio", "efficiency", "goals"}; None where not measured."""
    timed = {name: f for name, f in record["variants"].items() if "step_s" in f}
    ours = timed.get("ours")
    dits = [name for name in DITS if name in timed]
    out = {"fastest_dit": None, "speedup": None, "flop_ratio": None, "efficiency": None, "step_memory": None}
    if ours and "maskdit" in timed and _whole(record, timed, "maskdit"):
        out["step_memory"] = ours["step_bytes"] / timed["maskdit"]["step_bytes"]
    if ours and dits:
        best = min(dits, key=lambda name: timed[name]["step_s"])
        out["fastest_dit"], out["speedup"] = best, timed[best]["step_s"] / ours["step_s"]
        out["flop_ratio"] = timed[best]["flops_per_image"] / ours["flops_per_image"]
        out["efficiency"] = out["speedup"] / out["flop_ratio"]
    if ours and "dit" in timed:  # the peers' own unmasked form, without our blocks
        speedup = timed["dit"]["step_s"] / ours["step_s"]
        out["efficiency_peer"] = speedup * ours["flops_per_image"] / timed["dit"]["flops_per_image"]
    return out | {"goals": goals(record, out, ours, timed, device)}


def _whole(record: dict, timed: dict, other: str) -> bool:
    """Whether ours and another took the batch as a whole, so that their memory can be compared."""
    return all(timed[name]["images_at_a_time"] == record["batch"] for name in ("ours", other) if name in timed)


def goals(record: dict, ratios: dict, ours: dict | None, timed: dict, device: str) -> list[dict]:
    """The goals of this shape: {"goal", "want", "got", "met"}; got and met None where nothing was measured."""
    name, batch, gpu = record["shape"], record["batch"], device == "cuda"

    def times(other: str, what: str = "step_s") -> float | None:
        return timed[other][what] / ours[what] if ours and other in timed else None

    large, small = (256, 16) if gpu else (32, 4)
    wanted = []
    if batch in (large, small):
        wanted.append(("speed-up over the FLOP ratio", 0.85 if batch == large else 0.7, ratios["efficiency"]))
    if not gpu or name in ("B/2", "XL/2"):
        wanted.append(("x MaskDiT as published", 2.5 if gpu else 1.05, times("maskdit")))
        wanted.append(("x MaskDiT modern", 1.25 if gpu else 1.0, times("maskdit_modern")))
    if gpu and batch == large and name in ("S/2", "XL/2"):
        wanted.append(("share of the bf16 peak", 0.5 if name == "XL/2" else 0.25, ours["share"] if ours else None))
    found = [{"goal": goal, "want": want, "got": got, "met": None if got is None else got >= want}
             for goal, want, got in wanted]  # fmt: skip
    memory = times("maskdit", "peak_bytes") if _whole(record, timed, "maskdit") else None
    memory = 1 / memory if memory else None
    return [*found, {"goal": "memory over MaskDiT as published, at most", "want": 0.7, "got": memory,
                     "met": None if memory is None else memory <= 0.7}]  # fmt: skip


HEADS = ("shape", "variant", "", "step ms", "images/s", "x DiT", "x MaskDiT", "x modern", "TFLOP/s", "share",
         "held MiB", "step MiB", "peak MiB")  # fmt: skip


def table(record: dict) -> list[tuple]:
    """A row a variant; x ...: how many times faster this variant is."""
    variants, rows = record["variants"], []
    before = f"{record['shape']} {record['levels']} B{record['batch']} {record['dtype']}"
    others = [variants.get(name, {}).get("step_s") for name in (record["fastest_dit"], "maskdit", "maskdit_modern")]
    for name, f in variants.items():
        if "error" in f:
            rows.append((before, VARIANTS[name][0], f["error"], *[""] * (len(HEADS) - 3)))
        else:
            parts = f["images_at_a_time"]
            rows.append((
                before, VARIANTS[name][0], f"{parts} at a time" if parts < record["batch"] else "",
                f"{f['step_s'] * 1e3:.2f}", f"{f['images_per_s']:.1f}",
                *(f"{other / f['step_s']:.2f}" if other else "-" for other in others),
                f"{f['flop_per_s'] / 1e12:.3f}" if "share" in f else "-", f"{f['share']:.0%}" if "share" in f else "-",
                *(f"{f[key] / 2**20:.0f}" for key in ("held_bytes", "step_bytes", "peak_bytes")),
            ))  # fmt: skip
        before = ""
    return rows


def lines(record: dict) -> list[str]:
    """Ratios and goals of a record, in words."""
    out = []
    if record["speedup"] is not None:
        out.append(f"speed-up {record['speedup']:.2f} over {VARIANTS[record['fastest_dit']][0]}, FLOP ratio "
                   f"{record['flop_ratio']:.2f}, efficiency {record['efficiency']:.2f}")  # fmt: skip
        if record.get("efficiency_peer"):
            print(f"  over the peers' own DiT, eager: efficiency {record['efficiency_peer']:.2f}")
    if record["step_memory"] is not None:
        out.append(
            f"without what a variant holds, a step's memory is {record['step_memory']:.2f} of MaskDiT as published"
        )
    for goal in record["goals"]:
        word = {True: "met", False: "MISSED", None: "not measured"}[goal["met"]]
        got = "" if goal["got"] is None else f" {goal['got']:.2f}"
        out.append(f"{word}: {goal['goal']}{got} (goal {goal['want']})")
    return out


# --- loss curves ----------------------------------------------------------------------------------------


def curve(
    coarse: str, steps: int, device: torch.device, reference: bool, compiled: bool = False, *, lr: float = CURVE_LR,
    nudged: bool = False,
) -> list[float]:  # fmt: skip
    """Losses of a training of preset xs with stem, head and MMD in float32; ``reference``: on the plain path.

    Masked and unmasked steps take turns. The plain path also needs PLAIN in the environment from the start. nudged :
    all weights begin larger by 1e-7 of themselves.
    """
    import phmdiff_fast.kernels._impl as impl

    off = {"torch_compile": "blocks"} if compiled else {}
    if reference:
        off = {"torch_compile": "off", "cuda_graph": "off"}
    config = build_config(
        "xs", {"model": {"stem": True, "coarse": coarse}, "train": {"mmd_weight": 0.05, "lr": lr, **off}}
    )
    torch.manual_seed(0)
    model = PHMDiff(config.model, 1).to(device)
    if nudged:
        with torch.no_grad():
            torch._foreach_mul_(list(model.parameters()), 1 + 1e-7)
    if reference:
        impl.HAS_TRITON = False
        one_after_the_other(model.net)
    step = OurStep(model, config, Shape("xs", "pyramid", config.train.batch_size), device, torch.float32, True)
    losses = []
    for count in range(steps):
        step.masked = count % 2 == 0
        losses.append(step())
    return torch.stack(losses).tolist()


def one_after_the_other(net) -> None:
    """Have the network take the levels of a packed pass one by one."""
    together = net.forward_levels

    def apart(inputs, vectors):
        parts = [v.split(v.shape[0] // len(inputs)) for v in vectors]
        images, below = [], None
        for i, at in reversed(list(enumerate(inputs))):  # a head may take over what the coarser one made
            at.below = at.below if below is None else below
            images.insert(0, together([at], [v[i] for v in parts])[0])
            below = at.features
        return images

    net.forward_levels = apart


def compare_curves(steps: int, device: str, compiled: bool = False, lr: float = CURVE_LR) -> list[dict]:
    """{"coarse", "largest", "at", "met", "nudged"} for each way a level gets its coarse image; each curve in its own
    process. nudged: how far the plain path parts from itself when its weights begin 1e-7 larger, which is what a
    training with this learning rate makes of rounding."""
    out = []
    for coarse in CURVES:
        curves = {}
        for name, more in (("reference", ["--reference"]), ("ours", ["--compile"] * compiled),
                           ("nudged", ["--reference", "--nudged"])):  # fmt: skip
            command = [sys.executable, "-m", "benchmarks.train_compare", "--curve", coarse, "--steps", str(steps),
                       "--device", device, "--lr", str(lr), *more]  # fmt: skip
            env = os.environ | (PLAIN if "--reference" in more else {})
            done = subprocess.run(command, cwd=harness.ROOT, env=env, stdout=subprocess.PIPE, text=True, check=True)
            curves[name] = json.loads(done.stdout.splitlines()[-1])
        apart, nudged = (_apart(curves["reference"], curves[name]) for name in ("ours", "nudged"))
        largest = max(apart)
        out.append({"coarse": coarse, "steps": steps, "lr": lr, "largest": largest, "at": apart.index(largest),
                    "met": largest <= CURVE_GOAL, "nudged": max(nudged), "curves": curves})  # fmt: skip
    return out


def _apart(one: list[float], other: list[float]) -> list[float]:
    return [abs(a - b) / abs(a) for a, b in zip(one, other, strict=True)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=[*PRESETS, *DIT], help="xs s4 on a CPU, B/2 on a GPU")
    parser.add_argument("--levels", nargs="+", choices=list(LEVELS), help="both on a CPU, one on a GPU")
    parser.add_argument("--batch", nargs="+", type=int, help="4 32 on a CPU, 16 256 on a GPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if harness.CUDA else "cpu")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--threads", type=int, help="of a CPU, all by default")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), help="all by default")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="the compiled peers too (on a GPU)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing a variant, %(default)s")
    parser.add_argument("--apart", action="store_true", help="one after the other, as XL/2: all at once take memory")
    parser.add_argument("--check", action="store_true", help="on a GPU: S/2, B/2 and XL/2, batches 16 and 256")
    parser.add_argument("--curves", action="store_true", help="loss curves instead of times")
    parser.add_argument("--steps", type=int, default=200, help="of --curves, %(default)s")
    parser.add_argument("--lr", type=float, default=CURVE_LR, help="of --curves, %(default)s")
    parser.add_argument("--nudged", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--curve", choices=CURVES, help=argparse.SUPPRESS)
    parser.add_argument("--reference", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not harness.CUDA:
        parser.error("torch sees no GPU here")
    if args.check and args.device != "cuda":
        parser.error("--check is for a GPU")
    device, gpu = torch.device(args.device), args.device == "cuda"
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.curve:
        warnings.filterwarnings("ignore", message="phmdiff_fast: .* runs the slower")
        how = (args.curve, args.steps, device, args.reference, bool(args.compile))
        print(json.dumps(curve(*how, lr=args.lr, nudged=args.nudged)))
        return 0
    if args.curves:
        return _print_curves(compare_curves(args.steps, args.device, bool(args.compile), args.lr), args.json)
    if not gpu:
        harness.keep_freed_memory()
    wanted = args.shape or (list(DIT) if args.check else ["B/2"] if gpu else ["xs", "s4"])
    compiled = gpu if args.compile is None else args.compile
    shapes = [Shape(name, levels, batch) for name in wanted for levels in args.levels or (["one"] if gpu else LEVELS)
              for batch in args.batch or ((16, 256) if gpu else (4, 32))]  # fmt: skip
    dtype = pick_precision(args.precision, device)
    return _print_records(shapes, args, compiled, device, dtype)


def _print_records(shapes: list[Shape], args: argparse.Namespace, compiled: bool, device, dtype) -> int:
    from tqdm import tqdm

    from benchmarks.traffic import print_table

    records = []
    for shape in tqdm(shapes, desc="training", leave=False, disable=None):
        names, apart = args.variants or variants_for(shape, device, compiled), args.apart or shape.name == "XL/2"
        records.append(measure(shape, names, device, dtype, budget=args.seconds, apart=apart))
        harness.forget()
        torch.compiler.reset()
        if args.json:  # after each shape: a run that is cut short keeps what it has
            args.json.write_text(json.dumps({"train": records}, indent=1))
    print(f"{harness.device_name(device)}; product {records[0]['product_flop_per_s'] / 1e12:.3g} TFLOP/s; "
          f"commit {harness.commit()}")  # fmt: skip
    print_table(HEADS, [row for record in records for row in table(record)])
    for shape, record in zip(shapes, records, strict=True):
        how = ", one variant after the other" if record["apart"] else ""
        print(f"\n{shape}{how}", *(f"  {line}" for line in lines(record)), sep="\n")
    return 0


def _print_curves(results: list[dict], file: Path | None) -> int:
    for r in results:
        word = "met" if r["met"] else "MISSED"
        print(f"{word}: coarse={r['coarse']}, {r['steps']} steps in float32: losses differ by {r['largest']:.2g} "
              f"at most, at step {r['at']} (goal {CURVE_GOAL:g}); the plain path with weights 1e-7 larger by "
              f"{r['nudged']:.2g} from itself (learning rate {r['lr']:g})")  # fmt: skip
    if file:
        file.write_text(json.dumps({"curves": results}, indent=1))
    return 0 if all(r["met"] for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
