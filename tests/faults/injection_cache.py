"""A small cohort and its slice cache, as a scenario of ``injection_scenarios.py``."""

from __future__ import annotations

import tempfile
from functools import lru_cache
from pathlib import Path


def cohort(folder: Path):
    from phmdiff_fast.data import discover

    return discover(folder / "data")


# The same shapes both times, so that sizes cannot tell an old file from a new one.
CONTRASTS = {"old": (["t1"], "t2"), "new": (["t2"], "t1")}


def cache_config(which: str):
    from phmdiff_fast.config import DataConfig

    sources, target = CONTRASTS[which]
    return DataConfig(sources=sources, target=target, image_size=8)


def build_cache(which: str):
    def build(folder: Path) -> None:
        from phmdiff_fast.cache import SliceCache

        SliceCache.build(folder / "cache", cohort(folder), ["anna", "bela"], cache_config(which))

    return build


def scans(folder: Path) -> None:
    import nibabel
    import numpy as np

    for seed, (person, contrast) in enumerate((p, c) for p in ("anna", "bela") for c in ("t1", "t2")):
        voxels = np.zeros((13, 16, 9), np.int16)
        voxels[2:11, 3:14, 2:8] = np.random.default_rng(seed).integers(1, 1000, (9, 11, 6))
        path = folder / "data" / person / f"{person}_{contrast}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(voxels, np.diag([1, 1, 2, 1.0])), path)


def cohort_and_cache(folder: Path) -> None:
    scans(folder)
    build_cache("old")(folder)
    for which in CONTRASTS:  # what verify compares with
        _slices(folder, which)


@lru_cache
def _built(data: Path, which: str) -> dict:
    from phmdiff_fast.cache import SliceCache
    from phmdiff_fast.data import discover

    with tempfile.TemporaryDirectory() as elsewhere:
        cache = SliceCache.build(Path(elsewhere) / "c", discover(data), ["anna", "bela"], cache_config(which))
        return cache.batch(range(len(cache)))


def _slices(folder: Path, which: str) -> dict:
    # The template's scans, which stay where they are and are those of every run.
    return _built(folder.with_name(folder.name.removesuffix("-before") + "-before") / "data", which)


def cache_is_whole_or_stale(folder: Path) -> str:
    import numpy as np

    from phmdiff_fast.cache import SliceCache
    from phmdiff_fast.errors import PhmdiffError

    opened = []
    for which in CONTRASTS:
        try:
            cache = SliceCache.open(folder / "cache", cohort(folder), ["anna", "bela"], cache_config(which))
        except PhmdiffError as problem:
            if problem.code != "CACHE_STALE":
                raise
            continue
        read, built = cache.batch(range(len(cache))), _slices(folder, which)
        assert all(np.array_equal(read[name], built[name]) for name in built), f"garbage for the {which} settings"
        opened.append(which)
    assert len(opened) < 2
    return opened[0] if opened else "none"
