"""Held-out slices: which source channels are shown, and their figures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from phmdiff_fast import held_out, pictures
from phmdiff_fast.cache import SliceCache
from phmdiff_fast.config import Config, DataConfig
from phmdiff_fast.data import discover


class Fixed:
    """A model that makes a grey image of every slice, at each of three levels."""

    def translate(self, sources, sample_ids, settings):
        self.settings = settings
        return [torch.full((len(sources), 1, n, n), 0.5) for n in (16, 8, 4)]


def test_slice_psnr_is_the_mean_over_slices():
    made, target = torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 4)
    target[0], target[1] = 0.2, 0.02  # 10 log10(4 / 0.04) = 20 dB, and 40 dB
    assert held_out.slice_psnr(made, target) == pytest.approx(30.0, abs=1e-4)


def test_a_look_shows_the_slice_itself_among_its_neighbours(tmp_path, monkeypatch):
    drawn = {}
    for name in ("strip", "levels"):
        monkeypatch.setattr(
            pictures, name, lambda path, rows, _name=name, **how: drawn.update({_name: (path.name, rows, how)})
        )
    config = Config(data=DataConfig(sources=["t1", "ct"], context_slices=1, axis="sagittal", image_size=16))
    config.sample.steps = 500
    sources = torch.arange(6.0)[None, :, None, None].expand(5, 6, 16, 16)
    looking = held_out.HeldOut(sources, torch.full((5, 1, 16, 16), 0.7), np.arange(5), "slice", config, 20.0)
    model = Fixed()
    psnr = looking.look(model, torch.device("cpu"), torch.float32, tmp_path, 12)
    assert psnr == pytest.approx(20.0, abs=1e-3)
    assert model.settings.steps == held_out.VALIDATION_STEPS  # not 500
    name, rows, how = drawn["strip"]
    assert (name, how["axis"]) == ("step-00000012.png", "sagittal")
    assert [float(image[0, 0]) for image in rows[0]["source"]] == [1.0, 4.0]
    assert rows[0]["source_names"] == ["source t1", "source ct"]
    name, rows, _ = drawn["levels"]
    assert name == "levels-00000012.png"
    assert [image.shape for image in rows[0]["truths"]] == [(16, 16), (8, 8), (4, 4)]


def test_the_reference_is_what_a_lookup_table_reaches(tiny_cohort, tmp_path):
    config = Config(data=DataConfig(image_size=24))
    cache = SliceCache.build(tmp_path, discover(tiny_cohort), ["p0", "p1", "p2"], config.data)
    watched = held_out.held_out(cache, {"train": ["p0", "p1"], "val": ["p2"]}, config, torch.device("cpu"))
    grey = watched.target.mean() * torch.ones_like(watched.target)
    assert watched.who == "held-out slice"
    assert watched.rows.tolist() == cache.rows_of("p2").tolist()
    assert held_out.slice_psnr(grey, watched.target) + 3 < watched.reference < 60


def test_a_look_takes_a_few_slices_at_a_time_and_each_keeps_its_number(tmp_path):
    seen = []

    class Numbered(Fixed):
        def translate(self, sources, sample_ids, settings):
            seen.append(sample_ids.tolist())
            return super().translate(sources, sample_ids, settings)

    count = held_out.LOOK_BATCH + 3
    images = torch.zeros(count, 1, 16, 16)
    looking = held_out.HeldOut(images, images, np.arange(100, 100 + count), "slice", Config(), 20.0)
    looking.look(Numbered(), torch.device("cpu"), torch.float32, tmp_path, 1)
    assert [len(part) for part in seen] == [held_out.LOOK_BATCH, 3]
    assert [number for part in seen for number in part] == list(range(100, 100 + count))
