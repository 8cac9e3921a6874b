"""Single bits of checkpoints turned over: row C7 of the fault matrix.

    python tests/faults/flips.py [--count 10000] [--seed 0]

Every flip must be found (``checkpoint.verify`` raises, exit 4, one line naming the file) or change nothing: the
tensors, the step and the manifest are those that were saved. Two checkpoints of a small training's state, one of a
single process and one in two shards. Of a count of flips at most half are of the manifests, every bit of them if
there are flips enough; the others are drawn, as many of the headers as of the tensors' bytes.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from phmdiff_fast import checkpoint
from phmdiff_fast.ema import EMA
from phmdiff_fast.errors import PhmdiffError

# Text in which a flip may change nothing: an E for an e, a capital in an escape.
FACTS = {"seconds": 1.5e-05, "version": "1", "config": {"train.lr": 1e-06, "note": "\u00ea"}, "val_psnr": 2.5e22}


def groups() -> checkpoint.Groups:
    """The state of a small model after a step."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Linear(6, 3))
    optimizer, ema = torch.optim.AdamW(model.parameters(), lr=0.1), EMA(model, 0.9)
    model(torch.ones(2, 5)).square().sum().backward()
    optimizer.step()
    ema.update(0)
    return {"model": model.state_dict(), "ema": ema.state_dict(),
            "optimizer": checkpoint.optimizer_tensors(optimizer, model)}  # fmt: skip


def save(folder: Path) -> list[Path]:
    """The checkpoints: of one process, and of two."""
    state = groups()
    whole = checkpoint.save(folder / "one", 3, state, FACTS, keep=2)
    for rank in (1, 0):  # the first waits for the other's share
        shards = checkpoint.save(folder / "two", 3, checkpoint.share(state, rank, 2), FACTS, keep=2, rank=rank,
                                 world=2, token="flips")  # fmt: skip
    return [whole, shards]


def positions(files: list[Path], count: int, seed: int) -> Iterator[tuple[Path, int]]:
    """(file, number of the bit): every so many-th of the manifests, or every one where they are no more than half of
    ``count``; then some of every other file, of its length, its header and its tensors alike."""
    draw = random.Random(seed)
    bits = [(path, bit) for path in files if path.name == "manifest.json" for bit in range(8 * path.stat().st_size)]
    stride = -(-len(bits) // (count // 2))
    chosen = bits[draw.randrange(stride) :: stride]
    yield from chosen
    parts = []
    for path in files:
        if path.suffix == ".safetensors":
            header, size = 8 + int.from_bytes(path.read_bytes()[:8], "little"), path.stat().st_size
            parts += [(path, 0, 8), (path, 8, header), *([(path, header, size)] if size > header else [])]
    for number in range(count - len(chosen)):
        path, begin, end = parts[number % len(parts)]
        yield path, draw.randrange(8 * begin, 8 * end)


def same(found: checkpoint.Checkpoint, saved: checkpoint.Checkpoint, tensors: checkpoint.Groups) -> bool:
    """Whether what is read is what was saved, bit for bit."""
    if (found.step, found.manifest) != (saved.step, saved.manifest):
        return False
    for group, wanted in tensors.items():
        read = found.tensors(group)
        if read.keys() != wanted.keys() or not all(torch.equal(read[name], wanted[name]) for name in wanted):
            return False
    return True


def flipped(path: Path, bit: int, saved: checkpoint.Checkpoint, tensors: checkpoint.Groups) -> str:
    """What comes of a flip: "found", "unchanged", or what is wrong."""
    with open(path, "r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))
        file.flush()
        where = f"{path.name}, byte {bit // 8}, bit {bit % 8}: "
        try:
            return "unchanged" if same(checkpoint.verify(path.parent), saved, tensors) else where + "other content"
        except PhmdiffError as problem:
            line = problem.line()
            told = line.isprintable() and problem.exit_code == 4 and str(path) in line
            return "found" if told else where + line
        except Exception as problem:
            return f"{where}{type(problem).__name__}: {problem}"
        finally:
            file.seek(bit // 8)
            file.write(bytes([byte]))


def run(count: int, seed: int = 0) -> dict:
    """Figures of ``count`` flips: found, unchanged, and wrong (a line each); flips of each file."""
    figures: dict = {"flips": 0, "found": 0, "unchanged": 0, "wrong": [], "files": {}}
    with tempfile.TemporaryDirectory() as root:
        tensors = groups()
        saved = {folder: checkpoint.verify(folder) for folder in save(Path(root))}
        files = [folder / name for folder in saved for name in (*saved[folder].manifest["files"], "manifest.json")]
        for path, bit in positions(files, count, seed):
            outcome = flipped(path, bit, saved[path.parent], tensors)
            figures["flips"] += 1
            name = str(path.relative_to(root))
            figures["files"][name] = figures["files"].get(name, 0) + 1
            if outcome in ("found", "unchanged"):
                figures[outcome] += 1
            else:
                figures["wrong"].append(outcome)
        if not all(same(checkpoint.verify(folder), checkpoint_, tensors) for folder, checkpoint_ in saved.items()):
            figures["wrong"].append("the flips were not undone")
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    figures = run(given.count, given.seed)
    print(json.dumps(figures, indent=1))
    return int(bool(figures["wrong"]))


if __name__ == "__main__":
    sys.exit(main())
