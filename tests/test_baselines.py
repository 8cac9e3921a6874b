"""The rivals do what they say, or beating them means nothing."""

from __future__ import annotations

import time

import numpy as np
import torch

from phmdiff_fast.baselines import LookupTable, UNet, train_unet, unet_predict
from phmdiff_fast.cache import SliceCache
from phmdiff_fast.config import DataConfig, TrainConfig
from phmdiff_fast.data import discover


class Pixels:
    """A cache of made-up slices: sources uniform, the target a known function of the first."""

    def __init__(self, function, channels=1):
        rng = np.random.default_rng(0)
        self.sources = rng.uniform(-1, 1, (40, channels, 16, 16)).astype(np.float32)
        self.target = function(self.sources[:, :1])

    def batch(self, rows, *, fine=False):
        return {"sources": self.sources[rows], "target": self.target[rows]}


def test_the_table_finds_a_function_of_the_value():
    pixels = Pixels(lambda s: np.sin(3 * s).astype(np.float32))
    table = LookupTable.fit(pixels, np.arange(40), batch_size=7)
    made = table.predict(pixels.sources)
    assert made.shape == (40, 16, 16)
    assert np.abs(made - pixels.target[:, 0]).max() < 0.05


def test_several_sources_have_a_table_each():
    pixels = Pixels(lambda s: s.copy(), channels=2)  # the second source says nothing: its table is flat
    made = LookupTable.fit(pixels, np.arange(40)).predict(pixels.sources)
    assert np.abs(made - pixels.target[:, 0] / 2).mean() < 0.05


def test_the_unet_learns_within_its_time(tiny_cohort, tmp_path):
    cohort = discover(tiny_cohort)
    cache_config = DataConfig(image_size=24)
    cache = SliceCache.build(tmp_path, cohort, list(cohort.files), cache_config)
    config = TrainConfig(batch_size=4, flip=False, gamma=0, scale=0)
    start = time.monotonic()
    model, steps = train_unet(
        cache, np.arange(len(cache)), config, 4.0, torch.device("cpu"), torch.float32, data=cache_config
    )
    assert 4.0 <= time.monotonic() - start < 15
    assert steps > 5
    batch = cache.batch(np.arange(len(cache)))
    made = unet_predict(model, batch["sources"], torch.device("cpu"), torch.float32, batch_size=5)
    error = np.abs(made - batch["target"][:, 0]).mean()
    assert error < 0.5 * np.abs(batch["target"] - batch["target"].mean()).mean()


def test_the_unet_takes_any_size():
    assert UNet(2)(torch.zeros(1, 2, 19, 30)).shape == (1, 1, 19, 30)
