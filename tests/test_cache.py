"""The slice cache: what it holds, what makes it stale, what a failed build leaves; the order of batches."""

import json
import os
import resource
import time
import tracemalloc
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phmdiff_fast.cache import SliceCache, batch_rows
from phmdiff_fast.config import DataConfig
from phmdiff_fast.data import discover, load_subject, select_subjects
from phmdiff_fast.errors import PhmdiffError
from phmdiff_fast.grid import InPlane, Scaling, fill_for, fit_scaling, scaling_for, stack_context
from phmdiff_fast.nifti import write_volume

REPO = Path(__file__).resolve().parent.parent
REAL = Path(os.environ.get("PHMDIFF_REAL_DATA", REPO / "../shared/data/brain"))
real_data = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real scans at {REAL} (set PHMDIFF_REAL_DATA)")

SHAPE = (13, 16, 9)
SUBJECTS = ("anna", "bela")
CONFIG = DataConfig(image_size=8)


def scan(seed):
    """0 outside a box; the lowest two and the highest slice are empty."""
    voxels = np.zeros(SHAPE, np.int16)
    voxels[2:11, 3:14, 2:8] = np.random.default_rng(seed).integers(1, 1000, (9, 11, 6))
    return voxels


def save(path, voxels, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, np.diag([1, 1, 2, 1.0]) if affine is None else affine), path)


@pytest.fixture
def cohort(tmp_path):
    for number, subject in enumerate(SUBJECTS):
        for other, contrast in enumerate(("t1", "t2", "flair")):
            save(tmp_path / "data" / subject / f"{subject}_{contrast}.nii.gz", scan(10 * number + other))
    return discover(tmp_path / "data")


@pytest.fixture
def cache(cohort, tmp_path):
    return SliceCache.build(tmp_path / "cache", cohort, SUBJECTS, CONFIG)


def refused(call, *args, **how):
    with pytest.raises(PhmdiffError) as caught:
        call(*args, **how)
    return caught.value


# ---------------------------------------------------------------- what it holds


def test_rows_and_names(cache):
    assert len(cache) == 12
    assert cache.contrasts == ["t1", "t2"]
    assert cache.subjects == ["anna", "bela"]
    assert cache.rows_of("anna").tolist() == list(range(6))
    assert cache.rows_of("bela").tolist() == list(range(6, 12))
    assert cache.rows_of("bela").dtype == np.int64
    with pytest.raises(KeyError):
        cache.rows_of("carl")


def test_a_batch_is_the_scaled_volume_on_the_network_grid(cache, cohort):
    rows = np.array([7, 0, 11, 7])
    batch = cache.batch(rows)
    assert {name: (part.shape, part.dtype.name) for name, part in batch.items()} == {
        "sources": ((4, 1, 8, 8), "float32"), "target": ((4, 1, 8, 8), "float32"), "foreground": ((4, 1, 8, 8), "bool"),
    }  # fmt: skip
    assert all(part.flags.c_contiguous for part in batch.values())
    plane = InPlane(SHAPE[:2], 8)
    for at, row in enumerate(rows):
        subject = load_subject(cohort, SUBJECTS[row // 6], ["t1", "t2"], foreground_from="t1")
        for part, contrast in (("sources", "t1"), ("target", "t2")):
            scaling = fit_scaling(subject.images[contrast], subject.foreground)
            assert scaling == cache.scaling(subject.id, contrast)
            expected = scaling.forward(plane.to_grid(subject.images[contrast], 0.0)[2 + row % 6])
            np.testing.assert_allclose(batch[part][at, 0], expected, atol=1e-6)
        inside = plane.to_grid(subject.foreground, 0.0)[2 + row % 6] >= 0.5
        assert np.array_equal(batch["foreground"][at, 0], inside)


@pytest.mark.parametrize("context", [0, 1])
def test_a_finer_cache_holds_what_the_plain_one_is_the_mean_of(cohort, tmp_path, context):
    plain, fine = (DataConfig(image_size=8, context_slices=context, oversample=n) for n in (1, 3))
    one = SliceCache.build(tmp_path / "one", cohort, SUBJECTS, plain)
    three = SliceCache.build(tmp_path / "three", cohort, SUBJECTS, fine)
    rows = np.arange(len(one))[::-2]
    assert len(three) == len(one)
    expected, made, stored = one.batch(rows), three.batch(rows), three.batch(rows, fine=True)
    assert {name: part.shape for name, part in made.items()} == {name: part.shape for name, part in expected.items()}
    for name in ("sources", "target"):
        np.testing.assert_allclose(made[name], expected[name], atol=1e-5)
        assert stored[name].shape[2:] == (24, 24)
        means = stored[name].reshape(*stored[name].shape[:2], 8, 3, 8, 3).mean((3, 5))
        np.testing.assert_allclose(means.clip(-1, 1), expected[name], atol=1e-5)
        assert stored[name].min() < -1  # not clipped: the mean is
    assert stored["foreground"].shape[2:] == (24, 24)
    assert (made["foreground"] == expected["foreground"]).mean() > 0.95
    assert np.array_equal(one.batch(rows, fine=True)["target"], expected["target"])  # the same where nothing is finer
    assert "oversample" in refused(SliceCache.open, tmp_path / "one", cohort, SUBJECTS, fine).what


def test_several_sources_come_in_order(cohort, tmp_path):
    config = DataConfig(sources=["flair", "t1"], target="t2", image_size=8)
    cache = SliceCache.build(tmp_path / "cache", cohort, SUBJECTS, config)
    assert cache.contrasts == ["flair", "t1", "t2"]
    both = cache.batch(np.arange(12))
    one = SliceCache.build(tmp_path / "one", cohort, SUBJECTS, CONFIG).batch(np.arange(12))
    assert both["sources"].shape == (12, 2, 8, 8)
    assert np.array_equal(both["sources"][:, 1:], one["sources"])
    assert np.array_equal(both["target"], one["target"])


def test_what_is_stored_is_raw(cache, cohort, tmp_path):
    stored = np.fromfile(tmp_path / "cache" / "slices.bin", "<f4").reshape(12, 2, 8, 8)
    expected = InPlane(SHAPE[:2], 8).to_grid(scan(10).astype(np.float32), 0.0)[2:8]
    np.testing.assert_allclose(stored[6:, 0], expected, rtol=1e-6)
    assert stored.max() > 100


def test_median_of_the_upper_percentiles(cache):
    ends = [cache.scaling(subject, "t2").hi for subject in SUBJECTS]
    assert ends[0] != ends[1]
    assert cache.median_p995("t2") == pytest.approx(np.mean(ends))


def test_slices_with_too_little_foreground_are_left_out(cohort, tmp_path):
    everything = SliceCache.build(tmp_path / "a", cohort, SUBJECTS, CONFIG.model_copy(update={"min_foreground": 0.0}))
    assert len(everything) == 2 * SHAPE[2]
    share = everything.batch(np.arange(9))["foreground"].mean((1, 2, 3)).max()
    just = CONFIG.model_copy(update={"min_foreground": float(share)})
    assert len(SliceCache.build(tmp_path / "b", cohort, SUBJECTS, just)) == 12
    above = CONFIG.model_copy(update={"min_foreground": float(share) + 0.01})
    assert refused(SliceCache.build, tmp_path / "c", cohort, SUBJECTS, above).code == "NO_SLICES"
    assert not (tmp_path / "c").exists()


def test_the_loop_from_file_to_cache_to_file(tmp_path):
    """DESIGN section 5: without a model the same voxels and affine come back."""
    voxels = np.random.default_rng(0).integers(0, 2**15, (11, 9, 14)).astype(np.int16)
    voxels[:2] = 0
    affine = np.array([[0, -1.1, 0, 7], [0, 0, 2.2, -8], [-0.9, 0, 0, 9.7], [0, 0, 0, 1]])
    for contrast in ("t1", "t2"):
        save(tmp_path / "p" / f"p_{contrast}.nii.gz", voxels, affine)
        voxels = voxels[::-1].copy()
    cohort = discover(tmp_path)
    config = DataConfig(image_size=14, min_foreground=0.0)
    cache = SliceCache.build(tmp_path / "cache", cohort, ["p"], config)
    subject = load_subject(cohort, "p", ["t1", "t2"], foreground_from="t1")
    plane = InPlane(subject.foreground.shape[:2], config.image_size)
    slices = np.fromfile(cache.folder / "slices.bin", "<f4").reshape(len(cache), 2, 14, 14)
    for channel, contrast in enumerate(cache.contrasts):
        out = write_volume(tmp_path / f"{contrast}.nii.gz", plane.from_grid(slices[:, channel], 0.0), subject.grid)
        before, after = nib.load(cohort.files["p"][contrast]), nib.load(out)
        assert np.array_equal(after.get_fdata(), before.get_fdata())
        assert np.array_equal(after.affine, before.affine)


# ---------------------------------------------------------------- axis, neighbours, HU


def whole(cohort, subject, contrasts, config):
    """Every slice of a subject, scaled (n, contrasts, S, S), without the cache; and the foreground (n, S, S)."""
    found = load_subject(cohort, subject, contrasts, foreground_from=contrasts[0])
    plane = InPlane.of(SHAPE, config)
    scaled = []
    for name in contrasts:
        image = found.images[name]
        scaling = scaling_for(name, image, found.foreground, config.hu_window)
        scaled.append(scaling.forward(plane.to_grid(image, fill_for(name, image, config.hu_window))))
    return np.stack(scaled, 1), plane.to_grid(found.foreground, 0) >= 0.5


@pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal"])
@pytest.mark.parametrize("k", [0, 1, 2, 8])
@pytest.mark.parametrize("sources", [["t1"], ["flair", "t1"]])
def test_a_batch_is_the_whole_scaled_volume_with_its_neighbours(cohort, tmp_path, axis, k, sources):
    config = DataConfig(sources=sources, image_size=8, axis=axis, context_slices=k, min_foreground=0.02)
    for contrast in ("t1", "t2", "flair"):  # empty in the middle along every axis
        voxels = scan(30 + len(contrast))
        voxels[5:7] = voxels[:, 7:9] = voxels[:, :, 4] = 0
        save(cohort.files["bela"][contrast], voxels)
    cache = SliceCache.build(tmp_path / "cache", cohort, SUBJECTS, config)
    for subject in SUBJECTS:
        scaled, inside = whole(cohort, subject, cache.contrasts, config)
        kept = np.flatnonzero(inside.mean((1, 2)) >= 0.02)
        assert 0 < len(kept) < len(scaled)  # so some neighbours are no rows themselves
        rows = cache.rows_of(subject)
        assert len(rows) == len(kept)
        order = np.random.default_rng(0).permutation(len(rows))
        batch = cache.batch(rows[order])
        assert batch["sources"].shape == (len(rows), config.source_channels, 8, 8)
        assert np.array_equal(batch["sources"], stack_context(scaled[:, :-1], k)[kept][order])
        assert np.array_equal(batch["target"], scaled[kept, -1:][order])
        assert np.array_equal(batch["foreground"][:, 0], inside[kept][order])
        assert all(part.flags.c_contiguous for part in batch.values())
    again = SliceCache.open(tmp_path / "cache", cohort, SUBJECTS, config)
    assert np.array_equal(again.batch(rows)["sources"], cache.batch(rows)["sources"])


def test_neighbours_come_from_the_same_subject(cohort, tmp_path):
    """With every slice a row, the last row of one subject and the first of the next lie side by side."""
    config = CONFIG.model_copy(update={"min_foreground": 0.0, "context_slices": 1})
    cache = SliceCache.build(tmp_path / "cache", cohort, SUBJECTS, config)
    last, first = cache.batch(np.array([SHAPE[2] - 1, SHAPE[2]]))["sources"]
    assert np.array_equal(last[2], last[1])
    assert np.array_equal(first[0], first[1])


def test_only_the_neighbours_that_are_no_rows_are_stored_beside_them(cohort, tmp_path):
    for k, stored in ((0, 12), (1, 16), (2, 18)):  # 6 of 9 slices each: two lie below, one above
        config = CONFIG.model_copy(update={"context_slices": k})
        cache = SliceCache.build(tmp_path / str(k), cohort, SUBJECTS, config)
        assert len(cache) == 12
        assert (cache.folder / "slices.bin").stat().st_size == stored * 2 * 64 * 4


def test_ct_is_scaled_by_the_window_and_keeps_its_unit(cohort, tmp_path):
    rng = np.random.default_rng(0)
    for subject in SUBJECTS:
        voxels = np.full(SHAPE, -1000, np.int16)
        voxels[2:11, 3:14, 2:8] = rng.integers(-100, 2500, (9, 11, 6))
        save(tmp_path / "data" / subject / f"{subject}_ct.nii.gz", voxels)
    config = DataConfig(sources=["t1"], target="ct", image_size=20, hu_window=(-1200, 1800))
    cache = SliceCache.build(tmp_path / "cache", discover(tmp_path / "data"), SUBJECTS, config)
    assert cache.scaling("anna", "ct") == cache.scaling("bela", "ct") == Scaling(-1200.0, 1800.0)
    assert cache.scaling("anna", "t1") != cache.scaling("bela", "t1")
    assert (cache.units("ct"), cache.units("cbct"), cache.units("t1"), cache.units("mr")) == (
        "HU", "HU", "arbitrary", "arbitrary",
    )  # fmt: skip
    batch = cache.batch(cache.rows_of("bela"))
    assert (batch["target"][:, 0, :3] == -1).all()  # where the canvas leaves the scan
    expected = np.clip((voxels[2:11, 3:14, 2:8].astype(np.float32) + 1200) / 1500 - 1, -1, 1).transpose(2, 0, 1)
    np.testing.assert_allclose(batch["target"][:, 0, 5:14, 5:16], expected, atol=1e-6)


def test_mha_cohorts_are_cached_too(cohort, tmp_path):
    sitk = pytest.importorskip("SimpleITK")
    for subject in SUBJECTS:
        for contrast, word in (("t1", "mr"), ("t2", "ct")):
            image = sitk.ReadImage(str(cohort.files[subject][contrast]))
            (tmp_path / "synth" / "Task1" / "brain" / subject).mkdir(parents=True, exist_ok=True)
            sitk.WriteImage(image, str(tmp_path / "synth" / "Task1" / "brain" / subject / f"{word}.mha"), True)
    one = SliceCache.build(tmp_path / "one", cohort, SUBJECTS, CONFIG)
    config = DataConfig(sources=["mr"], target="ct", image_size=8)
    two = SliceCache.build(tmp_path / "two", discover(tmp_path / "synth"), SUBJECTS, config)
    assert np.array_equal(two.batch(np.arange(12))["sources"], one.batch(np.arange(12))["sources"])


# ---------------------------------------------------------------- how it is built


def test_progress_is_told(cohort, tmp_path):
    calls = []
    SliceCache.build(tmp_path / "cache", cohort, SUBJECTS, CONFIG, progress=lambda *call: calls.append(call))
    assert calls == [(1, 2, "anna"), (2, 2, "bela")]


# ---------------------------------------------------------------- open, ensure, stale


def test_ensure_builds_once(cohort, tmp_path):
    cache, why = SliceCache.ensure(tmp_path / "cache", cohort, SUBJECTS, CONFIG)
    assert why == "there is no cache yet"
    before = (tmp_path / "cache" / "slices.bin").stat().st_mtime_ns
    again, why = SliceCache.ensure(tmp_path / "cache", cohort, SUBJECTS, CONFIG)
    assert why is None
    assert (tmp_path / "cache" / "slices.bin").stat().st_mtime_ns == before
    one, two = cache.batch(np.arange(12)), again.batch(np.arange(12))
    assert all(np.array_equal(one[name], two[name]) for name in one)


def later(path):
    """Move a file's time on by a second, as another write would."""
    facts = path.stat()
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns + 10**9))


def test_a_touched_source_is_the_same(cache, cohort, tmp_path):
    later(cohort.files["bela"]["t2"])
    assert len(SliceCache.open(tmp_path / "cache", cohort, SUBJECTS, CONFIG)) == 12


def test_settings_without_effect_do_not_matter(cache, cohort, tmp_path):
    config = CONFIG.model_copy(update={"skip_incomplete": True, "max_volume_gib": 3.0})
    assert len(SliceCache.open(tmp_path / "cache", cohort, SUBJECTS, config)) == 12


def change_size(cohort, tmp_path):
    save(cohort.files["bela"]["t2"], scan(77))


def change_size_but_not_time(cohort, tmp_path):
    path = cohort.files["bela"]["t2"]
    facts = path.stat()
    path.write_bytes(path.read_bytes() + b"x")
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def change_content(cohort, tmp_path):
    path = cohort.files["bela"]["t2"]
    raw = path.read_bytes()
    path.write_bytes(raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:])
    later(path)


def drop_source(cohort, tmp_path):
    cohort.files["bela"]["t2"].unlink()


def add_mask(cohort, tmp_path):
    save(tmp_path / "data" / "anna" / "anna_mask.nii.gz", np.ones(SHAPE, np.uint8))


def cut_slices(cohort, tmp_path):
    path = tmp_path / "cache" / "slices.bin"
    path.write_bytes(path.read_bytes()[:-4])


def drop_foreground(cohort, tmp_path):
    (tmp_path / "cache" / "foreground.bin").unlink()


def cut_context(cohort, tmp_path):
    path = tmp_path / "cache" / "context.bin"
    path.write_bytes(path.read_bytes()[:-4])


def cut_index(cohort, tmp_path):
    path = tmp_path / "cache" / "index.json"
    path.write_text(path.read_text()[:-5])


def other_version(cohort, tmp_path):
    path = tmp_path / "cache" / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 0}))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (change_size, "bela/t2"),
        (change_size_but_not_time, "bela/t2"),
        (change_content, "bela/t2"),
        (drop_source, "bela/t2"),
        (add_mask, "mask"),
        (cut_slices, "slices.bin"),
        (drop_foreground, "foreground.bin"),
        (cut_context, "context.bin"),
        (cut_index, "index"),
        (other_version, "version"),
    ],
)
def test_a_changed_file_makes_it_stale(cache, cohort, tmp_path, change, told):
    change(cohort, tmp_path)
    problem = refused(SliceCache.open, tmp_path / "cache", discover(tmp_path / "data"), SUBJECTS, CONFIG)
    assert (problem.code, problem.exit_code) == ("CACHE_STALE", 3)
    assert told in problem.what


@pytest.mark.parametrize(
    ("subjects", "changes", "told"),
    [
        (("anna",), {}, "other subjects"),
        (("bela", "anna"), {}, "other subjects"),
        (SUBJECTS, {"image_size": 9}, "image_size 8 -> 9"),
        (SUBJECTS, {"crop": 10}, "crop None -> 10"),
        (SUBJECTS, {"min_foreground": 0.05}, "min_foreground 0.01 -> 0.05"),
        (SUBJECTS, {"target": "flair"}, "target 't2' -> 'flair'"),
        (SUBJECTS, {"context_slices": 1}, "context_slices 0 -> 1"),
        (SUBJECTS, {"axis": "coronal"}, "axis 'axial' -> 'coronal'"),
        (SUBJECTS, {"nan": "zero"}, "nan 'raise' -> 'zero'"),
    ],
)
def test_ensure_rebuilds_for_other_settings(cache, cohort, tmp_path, subjects, changes, told):
    config = CONFIG.model_copy(update=changes)
    rebuilt, why = SliceCache.ensure(tmp_path / "cache", cohort, subjects, config)
    assert told in why
    assert rebuilt.subjects == list(subjects)
    assert SliceCache.ensure(tmp_path / "cache", cohort, subjects, config)[1] is None


def test_ensure_reads_a_changed_scan_anew(cache, cohort, tmp_path):
    change_size(cohort, tmp_path)
    rebuilt, why = SliceCache.ensure(tmp_path / "cache", cohort, SUBJECTS, CONFIG)
    assert "bela/t2" in why
    expected = fit_scaling(scan(77).astype(np.float32), scan(10) > 0)
    assert rebuilt.scaling("bela", "t2") == expected
    # The open cache is told, and does not go on with slices that are no longer the run's.
    assert refused(cache.batch, np.arange(12)).code == "CACHE_CHANGED"
    assert rebuilt.batch(np.arange(12))["target"].shape == (12, 1, 8, 8)


# ---------------------------------------------------------------- files that change under an open cache


def rewritten(path):
    path.write_bytes(path.read_bytes() + b"x")


@pytest.mark.parametrize("name", ["slices.bin", "foreground.bin"])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (Path.unlink, "deleted or replaced"),
        (lambda path: os.replace(path.with_name("index.json"), path), "deleted or replaced"),
        (lambda path: os.truncate(path, 0), "has 0 of its"),
        (lambda path: os.truncate(path, path.stat().st_size - 1), "of its"),
        (rewritten, "of its"),
    ],
)
def test_a_cache_that_changes_is_refused(cache, name, change, told):
    change(cache.folder / name)
    problem = refused(cache.batch, np.arange(3))
    assert (problem.code, problem.exit_code, problem.file) == ("CACHE_CHANGED", 3, str(cache.folder / name))
    assert told in problem.what


@pytest.mark.parametrize("name", ["slices.bin", "foreground.bin"])
def test_a_file_cut_between_the_look_and_the_reading_is_refused(cache, monkeypatch, name):
    looks, check = [], type(cache._slices).check

    def cut(file):
        check(file)
        looks.append(file.path.name)
        if file.path.name == name:
            os.truncate(file.path, 100)

    monkeypatch.setattr(type(cache._slices), "check", cut)
    assert "bytes at" in refused(cache.batch, np.arange(6, 9)).what
    assert name in looks


@pytest.mark.parametrize("name", ["slices.bin", "foreground.bin", "context.bin"])
def test_a_cache_whose_files_went_as_it_was_opened(cache, cohort, monkeypatch, name):
    (cache.folder / name).unlink()
    monkeypatch.setattr("phmdiff_fast.cache._stale", lambda *_: None)
    problem = refused(SliceCache.open, cache.folder, cohort, SUBJECTS, CONFIG)
    assert (problem.code, problem.exit_code) == ("CACHE_CHANGED", 3)


def test_processes_forked_from_one_read_at_once(cache):
    """They share the open files; reading by position they do not move each other."""
    expected = cache.batch(np.arange(12))["target"]
    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            good = all(
                np.array_equal(cache.batch(np.array([row]))["target"][0], expected[row])
                for row in np.random.default_rng(os.getpid()).integers(0, 12, 300)
            )
            os._exit(0 if good else 1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4


def test_files_are_closed_with_the_cache(cache):
    handles = {cache._slices._handle, cache._foreground._handle}
    links = {os.readlink(f"/proc/self/fd/{handle}") for handle in handles}
    assert {Path(link).name for link in links} == {"slices.bin", "foreground.bin"}
    cache._slices = cache._foreground = None
    still = {str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()}
    assert not links & still


def test_no_rows_rows_from_the_end_and_rows_there_are_none_of(cache):
    empty = cache.batch(np.zeros(0, np.int64))
    assert {name: part.shape for name, part in empty.items()} == dict.fromkeys(empty, (0, 1, 8, 8))
    last = cache.batch(np.array([-1]))
    assert all(np.array_equal(part, cache.batch(np.array([11]))[name]) for name, part in last.items())
    with pytest.raises(IndexError):
        cache.batch(np.array([12]))


# ---------------------------------------------------------------- builds that fail


def test_nan_voxels_and_the_cap_are_settings(cohort, tmp_path):
    voxels = scan(10).astype(np.float32)
    voxels[5, 5, 5] = np.nan
    save(cohort.files["bela"]["t1"], voxels)
    assert refused(SliceCache.build, tmp_path / "a", cohort, SUBJECTS, CONFIG).code == "NII_NONFINITE"
    zero = SliceCache.build(tmp_path / "a", cohort, SUBJECTS, CONFIG.model_copy(update={"nan": "zero"}))
    assert np.isfinite(zero.batch(np.arange(12))["sources"]).all()
    small = CONFIG.model_copy(update={"max_volume_gib": 1e-9})
    assert refused(SliceCache.build, tmp_path / "b", cohort, SUBJECTS, small).code == "NII_TOO_BIG"


def test_a_scan_that_changes_while_it_is_read(cohort, tmp_path, monkeypatch):
    def slow(*arguments, **how):
        subject = load_subject(*arguments, **how)
        change_size(cohort, tmp_path)
        return subject

    monkeypatch.setattr("phmdiff_fast.cache.load_subject", slow)
    problem = refused(SliceCache.build, tmp_path / "cache", cohort, SUBJECTS, CONFIG)
    assert (problem.code, problem.subject, problem.contrast) == ("FILE_CHANGED", "bela", "t2")
    assert not (tmp_path / "cache").exists()


def test_a_bad_scan_is_located_and_nothing_stays(cohort, tmp_path):
    path = cohort.files["bela"]["t2"]
    path.write_bytes(path.read_bytes()[:-40])
    problem = refused(SliceCache.build, tmp_path / "cache", cohort, SUBJECTS, CONFIG)
    assert (problem.code, problem.subject, problem.contrast) == ("NII_TRUNC", "bela", "t2")
    assert not (tmp_path / "cache").exists()
    path.unlink()
    assert refused(SliceCache.build, tmp_path / "cache", cohort, SUBJECTS, CONFIG).code == "UNREADABLE"


def test_a_scan_that_is_constant_inside_is_located(cohort, tmp_path):
    voxels = np.where(scan(10) > 0, 5, 0).astype(np.int16)
    save(cohort.files["bela"]["t2"], voxels)
    problem = refused(SliceCache.build, tmp_path / "cache", cohort, SUBJECTS, CONFIG)
    assert (problem.code, problem.subject, problem.contrast) == ("NII_CONSTANT", "bela", "t2")


def test_a_failed_rebuild_leaves_the_old_cache(cache, cohort, tmp_path):
    cohort.files["bela"]["flair"].write_bytes(b"")
    other = CONFIG.model_copy(update={"target": "flair"})
    assert refused(SliceCache.ensure, tmp_path / "cache", cohort, SUBJECTS, other).code == "NII_EMPTY"
    assert sorted(os.listdir(tmp_path / "cache")) == ["context.bin", "foreground.bin", "index.json", "slices.bin"]
    assert len(SliceCache.open(tmp_path / "cache", cohort, SUBJECTS, CONFIG)) == 12


def test_a_full_disk_leaves_nothing(cohort, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        problem = refused(SliceCache.build, tmp_path / "cache", cohort, SUBJECTS, CONFIG)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (problem.code, problem.exit_code) == ("CACHE_WRITE", 74)
    assert "bytes free" in problem.what
    assert not (tmp_path / "cache").exists()


def test_a_file_in_the_place_of_the_folder_is_left_alone(cohort, tmp_path):
    (tmp_path / "cache").write_text("precious")
    assert refused(SliceCache.ensure, tmp_path / "cache", cohort, SUBJECTS, CONFIG).code == "CACHE_WRITE"
    assert (tmp_path / "cache").read_text() == "precious"


# ---------------------------------------------------------------- the order of batches


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 50), batch=st.integers(1, 70), seed=st.integers(0, 2**32 - 1), first=st.integers(0, 10**6))
def test_every_epoch_visits_every_row_once(rows, batch, seed, first):
    start = first * batch
    steps = -(-2 * rows // batch) + 1
    run = np.concatenate([batch_rows(rows, batch, seed=seed, step=first + step) for step in range(steps)])
    assert run.dtype == np.int64
    skip = -start % rows  # to the next beginning of an epoch
    epoch = run[skip : skip + rows]
    assert sorted(epoch) == list(range(rows))


def test_the_order_is_a_pure_function():
    def run(steps):
        return {step: batch_rows(37, 8, seed=3, step=step).tolist() for step in steps}

    forward, backward = run(range(40)), run(reversed(range(40)))
    assert forward == backward
    whole = [row for step in range(40) for row in forward[step]]
    other = [row for step in range(80) for row in batch_rows(37, 4, seed=3, step=step)]
    assert whole == other  # the batch size cuts one and the same sequence


def test_seeds_and_epochs_differ():
    orders = {tuple(batch_rows(20, 20, seed=seed, step=step)) for seed in range(5) for step in range(5)}
    assert len(orders) == 25


def test_a_batch_can_be_changed_without_changing_the_order():
    first = batch_rows(10, 10, seed=0, step=0)
    kept = first.copy()
    first[:] = 0
    assert np.array_equal(batch_rows(10, 10, seed=0, step=0), kept)


@pytest.mark.parametrize(("rows", "batch"), [(0, 4), (4, 0)])
def test_empty_orders_are_refused(rows, batch):
    with pytest.raises(ValueError, match="must be positive"):
        batch_rows(rows, batch, seed=0, step=0)


# ---------------------------------------------------------------- real scans


@real_data
def test_the_real_people_with_t1_and_t2(tmp_path):
    cohort = discover(REAL)
    config = DataConfig(skip_incomplete=True)
    people = select_subjects(cohort, config, [name for name in cohort.files if not name.startswith("tpl-")])
    assert len(people) == 9
    start = time.perf_counter()
    cache = SliceCache.build(tmp_path, cohort, people, config)
    print(f"SliceCache.build: {len(cache)} slices of {len(people)} people in {time.perf_counter() - start:.2f} s")
    assert all(50 < len(cache.rows_of(person)) < 112 for person in people)
    batch = cache.batch(batch_rows(len(cache), 64, seed=0, step=0))
    assert batch["sources"].min() == -1
    assert batch["sources"].max() == 1
    inside = batch["target"][batch["foreground"]]
    assert abs(inside.mean()) < 0.7
    assert batch["target"][~batch["foreground"]].mean() < -0.9
    assert SliceCache.ensure(tmp_path, cohort, people, config)[1] is None


def test_memory_does_not_grow_with_the_number_of_subjects(tmp_path):
    """Building and reading hold one subject and one batch, whatever the cohort's size."""
    names = [f"m{i:02d}" for i in range(16)]
    for number, subject in enumerate(names):
        for other, contrast in enumerate(("t1", "t2")):
            save(tmp_path / "many" / subject / f"{subject}_{contrast}.nii.gz", scan(100 + 2 * number + other))
    many = discover(tmp_path / "many")
    config = CONFIG.model_copy(update={"sources": ["t1"], "target": "t2"})
    peaks = []
    for count in (2, 2, 16):  # the first run pays for what is imported late
        tracemalloc.start()
        try:
            built = SliceCache.build(tmp_path / f"cache-{count}", many, names[:count], config)
            for start in range(0, len(built), 4):
                built.batch(np.arange(start, min(start + 4, len(built))))
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[2] < peaks[1] * 1.25 + 40_000, peaks  # the index takes about 2 kB a subject


def test_the_hu_window_makes_only_a_cache_with_ct_stale(cohort, tmp_path):
    narrow = CONFIG.model_copy(update={"hu_window": (-500.0, 500.0)})
    SliceCache.build(tmp_path / "mr", cohort, SUBJECTS, CONFIG)
    assert SliceCache.open(tmp_path / "mr", cohort, SUBJECTS, narrow).scaling("anna", "t1").hi > 500
    for number, subject in enumerate(SUBJECTS):
        save(tmp_path / "data" / subject / f"{subject}_ct.nii.gz", scan(number) - 1000)
    with_ct, cohort = CONFIG.model_copy(update={"target": "ct"}), discover(tmp_path / "data")
    SliceCache.build(tmp_path / "ct", cohort, SUBJECTS, with_ct)
    asked = with_ct.model_copy(update={"hu_window": (-500.0, 500.0)})
    assert "hu_window" in refused(SliceCache.open, tmp_path / "ct", cohort, SUBJECTS, asked).what
