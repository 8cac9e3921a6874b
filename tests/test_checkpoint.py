"""Checkpoints: whole or not at all, verified, newest valid first, exact resume of the optimizer."""

from __future__ import annotations

import json

import pytest
import torch

from phmdiff_fast import checkpoint
from phmdiff_fast.ema import EMA
from phmdiff_fast.errors import PhmdiffError


def groups(value=1.0):
    return {"model": {"w": torch.full((3,), value)}, "ema": {"w": torch.zeros(3)}}


def test_round_trip_and_manifest(tmp_path):
    folder = checkpoint.save(tmp_path, 7, groups(), {"seconds": 1.5}, keep=2)
    assert folder.name == "step-00000007"
    found = checkpoint.newest(tmp_path)
    assert (found.step, found.manifest["seconds"]) == (7, 1.5)
    assert torch.equal(found.tensors("model")["w"], torch.ones(3))
    assert {p.name for p in tmp_path.iterdir()} == {"step-00000007"}  # no temporary folder is left


def test_never_overwritten_and_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 10, 3):
        checkpoint.save(tmp_path, step, groups(step), {}, keep=2)
    assert [p.name for p in checkpoint.found(tmp_path)] == ["step-00000010", "step-00000003"]
    checkpoint.save(tmp_path, 10, groups(99), {}, keep=2)
    assert float(checkpoint.newest(tmp_path).tensors("model")["w"][0]) == 10


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path, name):
    checkpoint.save(tmp_path, 1, groups(1), {}, keep=5)
    last = checkpoint.save(tmp_path, 2, groups(2), {}, keep=5)
    data = bytearray((last / name).read_bytes())
    data[-1] ^= 1
    (last / name).write_bytes(data)
    lines = []
    assert checkpoint.newest(tmp_path, warn=lines.append).step == 1
    assert len(lines) == 1
    assert name in lines[0]
    with pytest.raises(PhmdiffError) as caught:
        checkpoint.verify(last)
    assert (caught.value.code, caught.value.exit_code) == ("CHECKPOINT_HASH", 4)


@pytest.mark.parametrize("text", ["", "{", "{}", '{"format": 1, "step": 1}', '{"format": 99, "step": 1, "files": {}}'])
def test_a_bad_manifest_is_refused(tmp_path, text):
    folder = checkpoint.save(tmp_path, 1, groups(), {}, keep=5)
    (folder / "manifest.json").write_text(text)
    with pytest.raises(PhmdiffError) as caught:
        checkpoint.verify(folder)
    assert caught.value.exit_code == 4
    assert checkpoint.newest(tmp_path) is None


def test_a_disk_that_refuses_leaves_the_older_one(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, groups(), {}, keep=5)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.raises(PhmdiffError) as caught:
        checkpoint.save(tmp_path, 2, groups(), {}, keep=5)
    assert caught.value.exit_code == 74
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_the_optimizer_goes_on_exactly(tmp_path):
    def start():
        torch.manual_seed(1)
        model = torch.nn.Linear(4, 3)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)

    def step(model, optimizer, i):
        optimizer.zero_grad()
        (model(torch.full((2, 4), float(i))) ** 2).sum().backward()
        optimizer.step()

    model, optimizer = start()
    for i in range(6):
        if i == 3:
            moments = checkpoint.optimizer_tensors(optimizer, model)
            checkpoint.save(tmp_path, 3, {"model": model.state_dict(), "optimizer": moments}, {}, keep=1)
        step(model, optimizer, i)
    again, other = start()
    found = checkpoint.newest(tmp_path)
    again.load_state_dict(found.tensors("model"))
    checkpoint.load_optimizer(other, again, found.tensors("optimizer"))
    for i in range(3, 6):
        step(again, other, i)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_ema_by_hand_and_swap():
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, 1.0)
    ema = EMA(model, 0.99)
    torch.nn.init.constant_(model.weight, 2.0)
    ema.update(0)  # d = min(0.99, 1 / 10): 0.1 * 1 + 0.9 * 2
    assert float(ema.shadow[0]) == pytest.approx(1.9)
    ema.update(10**6)  # d = 0.99: 0.99 * 1.9 + 0.01 * 2
    assert float(ema.shadow[0]) == pytest.approx(1.901)
    ema.swap()
    assert float(model.weight.detach()) == pytest.approx(1.901)
    ema.swap()
    assert float(model.weight.detach()) == 2.0
    other = EMA(torch.nn.Linear(1, 1, bias=False), 0.9)
    other.load_state_dict(ema.state_dict())
    assert torch.equal(other.shadow[0], ema.shadow[0])


def test_nothing_is_pickled(tmp_path):
    folder = checkpoint.save(tmp_path, 1, groups(), {}, keep=1)
    assert {p.suffix for p in folder.iterdir()} == {".safetensors", ".json"}
    assert set(json.loads((folder / "manifest.json").read_text())["files"]) == {"model.safetensors", "ema.safetensors"}


def test_processes_share_the_bytes():
    tensors = {f"w{n}": torch.zeros(n) for n in range(1, 40)}
    parts = [checkpoint.share({"model": tensors, "ema": tensors}, rank, 3) for rank in range(3)]
    sizes = [sum(value.nbytes for group in part.values() for value in group.values()) for part in parts]
    assert max(sizes) - min(sizes) <= 4 * 39
    for group in ("model", "ema"):
        assert sorted(name for part in parts for name in part[group]) == sorted(tensors)
