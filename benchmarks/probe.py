"""Which parts of the architecture pay: short trainings at equal wall-clock, scored on the validation person.

    python -m benchmarks.probe --data DATA --split SPLIT.json --minutes 3 --out results.jsonl

One change at a time to BASE, which is preset xs as it was before the probe; the U-Net with its L1 loss
stands beside. Nothing else may run on the machine meanwhile: wall-clock is the budget. A row already in
--out is skipped, so that a broken series goes on; every row tells its steps and steps per second (seed 0).
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from pathlib import Path

import numpy as np
import torch

from phmdiff_fast import metrics
from phmdiff_fast.baselines import train_unet, unet_predict
from phmdiff_fast.config import build_config
from phmdiff_fast.data import discover
from phmdiff_fast.evaluate import evaluate, load_case, people
from phmdiff_fast.generate import load
from phmdiff_fast.held_out import rows_of
from phmdiff_fast.run_folder import open_cache
from phmdiff_fast.train import train

BASE = {"model": {"patch": 4, "stem": True}, "train": {"mmd_weight": 0.05}}
FLAT = [{"mask_ratio": 0.0}] * 3
# name -> (settings over BASE, sampling steps at which it is scored)
ROWS: dict[str, tuple[dict, tuple[int, ...]]] = {
    "base": ({}, (1,)),
    "no stem": ({"model": {"stem": False}}, (1,)),
    "no head": ({"model": {"head": False}}, (1,)),
    "patch 2": ({"model": {"patch": 2}}, (1,)),
    "patch 8": ({"model": {"patch": 8}}, (1,)),
    "v": ({"model": {"prediction": "v"}}, (1,)),
    "eps": ({"model": {"prediction": "eps"}, "train": {"last_t_share": 0.0}}, (25,)),
    "state not scaled": ({"model": {"scale_state": False}}, (1,)),
    "token decoder": ({"model": {"decoder_input": "token"}}, (1,)),
    "no masking": ({"model": {"levels": FLAT}}, (1,)),
    "decoder depth 1": ({"model": {"decoder_depth": 1}}, (1,)),
    "teacher": ({"model": {"coarse": "teacher"}}, (1,)),
    "no mmd": ({"train": {"mmd_weight": 0.0}}, (1,)),
    "patch 8, no stem, no mmd": ({"model": {"patch": 8, "stem": False}, "train": {"mmd_weight": 0.0}}, (1,)),
}
UNET = "U-Net L1"
HEADS = ("row", "sampling steps", "PSNR", "SSIM", "brain PSNR", "steps", "steps/s", "parameters")


def score_model(data: Path, split: Path, minutes: float, over: dict, sampling: tuple[int, ...]) -> list[dict]:
    """Train one row; a dict for each number of sampling steps."""
    config = build_config("xs", BASE, over, {"train": {"minutes": minutes, "checkpoint_every": 1e6},
                                       "data": {"skip_incomplete": True}})  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        run = load(train(data, Path(folder) / "run", config, split_file=split, progress=False))
        out = []
        for steps in sampling:
            settings = config.sample.model_copy(update={"steps": steps})
            table = evaluate(run, data, settings, protocols=("phmdiff-slice", "brain"), part="val").rows
            figures = {f"{row['protocol']} {row['metric']}": row["mean"] for row in table}
            out.append({"sampling": steps, "steps": run.found.step, "seconds": run.found.manifest["seconds"],
                        "parameters": sum(p.numel() for p in run.model.parameters()), **figures})  # fmt: skip
        return out


def score_unet(data: Path, split: Path, minutes: float) -> list[dict]:
    """The U-Net for the same time, with the same data, augmentation, batch size and precision."""
    config = build_config("xs", {"train": {"steps": 1}, "data": {"skip_incomplete": True}})
    cohort = discover(data)
    with tempfile.TemporaryDirectory() as folder:
        run = load(train(data, Path(folder) / "run", config, split_file=split, progress=False))
        parts = json.loads((run.folder / "split.json").read_text())
        cache = open_cache(run.folder, cohort, run.config, parts, False)
        unet, steps = train_unet(cache, rows_of(cache, parts["train"]), config.train, minutes * 60, run.device,
                                 run.dtype, data=config.data)  # fmt: skip
        figures: dict = {}
        for subject in people(run, cohort, "val"):
            case = load_case(run, cohort, subject)
            made = unet_predict(unet, case.sources, run.device, run.dtype)
            for name in ("phmdiff-slice", "brain"):
                scores = metrics.PROTOCOLS[name](made, case.target, case.foreground)
                for metric, value in scores.items():
                    figures.setdefault(f"{name} {metric}", []).append(value)
    size = sum(p.numel() for p in unet.parameters())
    means = {key: float(np.mean(values)) for key, values in figures.items()}
    return [{"sampling": 1, "steps": steps, "seconds": minutes * 60, "parameters": size, **means}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", help=f"comma-separated, of: {', '.join([*ROWS, UNET])}")
    parser.add_argument("--extra", action="append", default=[], metavar="NAME=JSON", help="a row of your own")
    args = parser.parse_args()
    rows = dict(ROWS) | {UNET: None}
    rows |= {name: (json.loads(text), (1,)) for name, _, text in (item.partition("=") for item in args.extra)}
    chosen = args.rows.split(",") if args.rows else list(rows)
    done = {json.loads(line)["row"] for line in args.out.read_text().splitlines()} if args.out.exists() else set()
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("| " + " | ".join(HEADS) + " |\n" + "|---" * len(HEADS) + "|")
    for name in chosen:
        if name in done:
            continue
        row = rows[name]
        found = score_unet(args.data, args.split, args.minutes) if row is None else score_model(
            args.data, args.split, args.minutes, *row)  # fmt: skip
        for result in found:
            with open(args.out, "a") as file:
                file.write(json.dumps({"row": name, "minutes": args.minutes, **result}) + "\n")
            cells = [name, result["sampling"], f"{result['phmdiff-slice psnr']:.2f}",
                     f"{result['phmdiff-slice ssim']:.2f}", f"{result['brain psnr']:.2f}", result["steps"],
                     f"{result['steps'] / (60 * args.minutes):.2f}", f"{result['parameters'] / 1e6:.1f} M"]  # fmt: skip
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
