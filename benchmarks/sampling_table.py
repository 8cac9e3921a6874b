"""Speed beside quality: seconds a volume and PSNR/SSIM on the fixed split, for every sampler and number of steps.

    python -m benchmarks.sampling_table RUN DATA --out benchmarks/results/cpu-sampling.jsonl --plot docs/sampling.png

RUN is a trained run, DATA the cohort it was trained on; its test people are scored. Every setting is timed on the first
of them, from a read scan to the volume on its grid (``generate.synthesize``). Beside it stands, for the run's own
setting and interleaved with it, the literal form: slice by slice, every patch, the stem and the adaLN vectors computed
again in each step. One line of JSON a setting; --resume goes on with what is missing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks import harness
from phmdiff_fast import metrics
from phmdiff_fast.config import SampleConfig
from phmdiff_fast.data import discover, load_subject
from phmdiff_fast.device import kept_memory
from phmdiff_fast.engine import Engine
from phmdiff_fast.evaluate import Case, load_case, people
from phmdiff_fast.generate import Run, load, predict, synthesize
from phmdiff_fast.progress import say
from phmdiff_fast.sampling import SAMPLERS, evaluations

STEPS = (1, 2, 4, 10, 25, 100)
PROTOCOLS = ("phmdiff-slice", "brain")
QUICK = 5.0  # seconds a volume up to which it is timed three times
COLOURS = {"ddim": "#0072b2", "dpm++": "#d55e00", "unipc": "#009e73", "heun": "#cc79a7", "ddpm": "#e69f00"}


class Literal(Engine):
    """What a peer writes: nothing is kept from step to step, nothing is left out."""

    skips = False

    def _denoise(self, way, *arguments):
        way.maps = self.model.nets[way.member].source_maps(way.sources[0])
        self._vectors, self._room = {}, 0
        return super()._denoise(way, *arguments)


VARIANTS: dict[str, tuple[type[Engine], dict]] = {
    "literal": (Literal, {"batch_size": 1}),
    "batched": (Engine, {"skip_background": False}),
    "engine": (Engine, {}),
}


def timed(run: Run, subject, settings: SampleConfig, kind: type[Engine] = Engine) -> float:
    """Seconds from a scan in memory to its volume, with an engine made before."""
    engine = kind(run.model, settings, run.dtype)
    begun = time.perf_counter()
    synthesize(run, subject, settings, engine=engine)
    if run.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def interleaved(run: Run, subject, settings: SampleConfig, rounds: int) -> dict[str, float]:
    """Median seconds of each of ``VARIANTS``, in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for i in range(rounds + 1):  # the first round warms up
        for name, (kind, over) in VARIANTS.items():
            took = timed(run, subject, settings.model_copy(update=over), kind)
            if i:
                seconds[name].append(took)
    return {name: statistics.median(times) for name, times in seconds.items()}


def scores(run: Run, cases: list[Case], settings: SampleConfig) -> dict[str, dict[str, float]]:
    """protocol -> metric -> mean over people."""
    engine = run.engine(settings)
    made = [predict(run, case.sources, settings, foreground=case.touched, engine=engine).mean for case in cases]
    found = {
        name: [
            metrics.PROTOCOLS[name](image, case.target, case.foreground)
            for image, case in zip(made, cases, strict=True)
        ]
        for name in PROTOCOLS
    }
    return {
        name: {m: float(np.mean([f[m] for f in figures])) for m in ("psnr", "ssim")} for name, figures in found.items()
    }


def measure(run: Run, subject, cases: list[Case], settings: SampleConfig) -> dict:
    """One line of the table."""
    times = [timed(run, subject, settings)]
    while times[-1] < QUICK and len(times) < 3:
        times.append(timed(run, subject, settings))
    asked = evaluations(settings.sampler, settings.steps)
    return {"sampler": settings.sampler, "steps": settings.steps, "evaluations": asked,
            "members": run.model.usable, "skip_background": settings.skip_background, "views": settings.views,
            "detail": settings.detail, "seconds": statistics.median(times), **scores(run, cases, settings)}  # fmt: skip


def plan(samplers: list[str], steps: list[int]) -> list[dict]:
    """Settings in order of what they cost; with one step all samplers are the same."""
    wanted = [
        {"sampler": s, "steps": n, "skip_background": True}
        for n in steps
        for s in samplers
        if n > 1 or s == samplers[0]
    ]
    whole = [{"sampler": samplers[0], "steps": n, "skip_background": False} for n in steps if n <= 2]
    return sorted([*wanted, *whole], key=lambda how: evaluations(how["sampler"], how["steps"]))


def table(lines: list[dict]) -> str:
    """Markdown: a line a setting."""
    heads = ["sampler", "steps", "evaluations", "background", "s a volume", "slice PSNR / SSIM", "brain PSNR / SSIM"]
    rows = [heads, ["---", *["---:"] * 2, "---", *["---:"] * 3]]
    for line in sorted(lines, key=lambda line: (line["sampler"], line["steps"], line["skip_background"])):
        both = [f"{line[p]['psnr']:.2f} / {line[p]['ssim']:.2f}" for p in PROTOCOLS]
        name = line["sampler"] if line["steps"] > 1 else "any"
        background = "left out" if line["skip_background"] else "computed"
        rows.append([name, str(line["steps"]), str(line["evaluations"]), background, f"{line['seconds']:.2f}", *both])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def plot(path: Path, lines: list[dict], title: str) -> None:
    """Quality over speed: a line a sampler, a point a number of steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.8), dpi=120, facecolor="white", layout="constrained")
    canvas = FigureCanvasAgg(figure)
    shown = [line for line in lines if line["skip_background"]]
    for at, (metric, label) in enumerate(
        (("psnr", "PSNR inside the brain (dB)"), ("ssim", "SSIM inside the brain (%)"))
    ):
        axes = figure.add_subplot(1, 2, at + 1)
        for sampler in SAMPLERS:
            own = sorted((x for x in shown if x["sampler"] == sampler or x["steps"] == 1), key=lambda x: x["steps"])
            if len(own) < 2:
                continue
            axes.plot([x["seconds"] for x in own], [x["brain"][metric] for x in own], "o-", markersize=4,
                      color=COLOURS[sampler], label=sampler)  # fmt: skip
            if sampler == "ddim":
                for x in own:
                    axes.annotate(f"{x['steps']}", (x["seconds"], x["brain"][metric]), xytext=(0, 5), size=7,
                                  textcoords="offset points", ha="center")  # fmt: skip
        axes.set_xscale("log")
        axes.set_xlabel("seconds a volume", size=9)
        axes.set_ylabel(label, size=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, color="#e4e7eb", linewidth=0.6)
        axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=8)
    figure.suptitle(title, size=10)
    canvas.print_png(str(path))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sampling_table", description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--steps", default=",".join(map(str, STEPS)))
    parser.add_argument("--samplers", default=",".join(SAMPLERS))
    parser.add_argument("--members", type=int, help="use the first so many members of the run  [default: all]")
    parser.add_argument("--on", default="test", choices=["test", "val"])
    parser.add_argument("--rounds", type=int, default=3, help="of the comparison with the literal form")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--resume", action="store_true", help="keep the lines of --out and add what is missing")
    given = parser.parse_args(arguments)
    if given.out.exists() and not given.resume:
        parser.error(f"{given.out} exists: give --resume, or another name")

    run = load(given.run, device=given.device)
    run.model.usable = given.members or run.model.usable
    cohort = discover(given.data)
    who = people(run, cohort, given.on)
    cases = [load_case(run, cohort, subject) for subject in who]
    subject = load_subject(cohort, who[0], run.sources, foreground_from=run.sources[0], with_seg=False)
    lines = [json.loads(line) for line in given.out.read_text().splitlines()] if given.out.exists() else []
    same = ("sampler", "steps", "skip_background", "members")
    about = {**harness.origin(run.device), "people": who, "shape": list(subject.foreground.shape),
             "image_size": run.config.data.image_size, "run_step": run.found.step}  # fmt: skip

    def add(line: dict) -> None:
        lines.append({**line, "about": about})
        with given.out.open("a") as file:
            file.write(json.dumps(lines[-1]) + "\n")

    setting = run.sample_settings
    with kept_memory(run.device):
        if not any("variants" in line for line in lines):
            variants = interleaved(run, subject, setting(), given.rounds)
            add({"variants": variants, "steps": run.config.sample.steps, "members": run.model.usable})
            say(", ".join(f"{name} {seconds:.2f} s" for name, seconds in variants.items()))
        for how in plan(given.samplers.split(","), [int(n) for n in given.steps.split(",")]):
            key = {**how, "members": run.model.usable}
            if any("variants" not in line and all(line[k] == key[k] for k in same) for line in lines):
                continue
            add(measure(run, subject, cases, setting(**how)))
            say(f"{how['sampler']}, {how['steps']} steps: {lines[-1]['seconds']:.2f} s, "
                f"brain {lines[-1]['brain']['psnr']:.2f} dB")  # fmt: skip
    figures = [line for line in lines if "variants" not in line]
    print(table(figures))
    for line in lines:
        if "variants" in line:
            base = line["variants"]["literal"]
            print("\n" + ", ".join(f"{n} {s:.2f} s ({base / s:.1f} x)" for n, s in line["variants"].items()))
    if given.plot:
        plot(given.plot, figures, f"{'+'.join(run.sources)} -> {run.target}, {len(who)} people, {about['device']}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
