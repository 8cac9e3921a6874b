"""What a checkpoint costs the training loop: ``python -m benchmarks.checkpoint_stall [--preset s4] [--folder F]``.

Steps with and without a checkpoint take turns. The loop itself waits for the copy of the state (``copy``); the
thread that hashes and writes it then takes time from the steps beside it (``beside``: how much longer the steps
until it is done took than those in between took). Both as a share of one step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from phmdiff_fast import checkpoint
from phmdiff_fast.checkpoint_writer import Writer
from phmdiff_fast.config import build_config
from phmdiff_fast.device import autocast, pick_device, pick_precision
from phmdiff_fast.ema import EMA
from phmdiff_fast.phmdiff import PHMDiff


def measure(preset: str, folder: Path, *, repeats: int = 3, device: str = "auto", batch: int | None = None) -> dict:
    """Figures of ``repeats`` checkpoints after one that is not counted (it allocates)."""
    where = pick_device(device)
    dtype = pick_precision("auto", where)
    config = build_config(preset)
    size, batch = config.data.image_size, batch or config.train.batch_size
    model = PHMDiff(config.model, 1, 1).to(where)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ema = EMA(model, 0.99)
    target, source = (torch.rand(batch, 1, size, size, device=where) * 2 - 1 for _ in range(2))
    ids = torch.arange(batch, device=where)
    made = 0

    def groups() -> checkpoint.Groups:
        return {"model": model.state_dict(), "ema": ema.state_dict(),
                "optimizer": checkpoint.optimizer_tensors(optimizer, model)}  # fmt: skip

    def step() -> float:
        nonlocal made
        begun = time.perf_counter()
        with autocast(where, dtype):
            loss = model.loss(target, source, ids, (0, made), config.train, masked=True).total
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        ema.update(made)
        made += 1
        float(loss.detach())
        return time.perf_counter() - begun

    plain, copies, beside, written = [], [], [], []
    with Writer(folder, keep=2) as writer:
        for _ in range(3):
            step()
        for number in range(repeats + 1):
            before = [step() for _ in range(3)]
            begun = time.perf_counter()
            writer.save(made, groups(), {"seconds": 0.0})
            copied = time.perf_counter() - begun
            while_writing = [step()]
            while not writer.is_idle:
                while_writing.append(step())
            taken = time.perf_counter() - begun
            after = [step() for _ in range(3)]
            if number:
                usual = statistics.median(before + after)
                plain.append(usual)
                copies.append(copied)
                written.append(taken)
                beside.append(sum(while_writing) - usual * len(while_writing))
    stored = sum(path.stat().st_size for path in checkpoint.found(folder)[0].iterdir())
    usual = statistics.median(plain)
    return {
        "preset": preset, "batch": batch, "image_size": size, "device": str(where), "precision": str(dtype)[6:],
        "checkpoint_mib": round(stored / 2**20, 1), "step_s": usual, "copy_s": statistics.median(copies),
        "copy_share": statistics.median(copies) / usual, "beside_share": statistics.median(beside) / usual,
        "written_after_s": statistics.median(written), "repeats": repeats,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="s4")
    parser.add_argument("--folder", type=Path, help="where to write (the disk that is measured)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        figures = measure(given.preset, Path(folder), repeats=given.repeats, batch=given.batch)
    print(f"{figures['preset']}, batch {figures['batch']}, {figures['image_size']}x{figures['image_size']}, "
          f"{figures['device']}, {figures['precision']}: a checkpoint of {figures['checkpoint_mib']} MiB, "
          f"a step of {figures['step_s']:.2f} s")  # fmt: skip
    copy, beside = 100 * figures["copy_share"], 100 * figures["beside_share"]
    print(f"the loop waits {figures['copy_s'] * 1e3:.0f} ms for the copy, {copy:.1f} % of a step; the steps beside the")
    print(f"writing take {beside:.1f} % of a step longer in all; written after {figures['written_after_s']:.1f} s")
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
