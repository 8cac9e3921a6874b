"""Splits by subject, folds, split files, and one scan under two names."""

import json
import time

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phmdiff_fast.errors import PhmdiffError
from phmdiff_fast.splits import CELLS, SAME_SCAN, fingerprint, make_fold, make_split, read_split, same_scans


def refused(call, *args, **how):
    with pytest.raises(PhmdiffError) as caught:
        call(*args, **how)
    return caught.value


# ---------------------------------------------------------------- splits


@settings(max_examples=60, deadline=None)
@given(count=st.integers(3, 200), seed=st.integers(0, 2**32 - 1))
def test_make_split_covers_every_subject_once(count, seed):
    ids = [f"s{n}" for n in range(count)]
    split = make_split(ids, seed)
    assert sorted(split["train"] + split["val"] + split["test"]) == sorted(ids)
    assert all(split.values())
    assert split == make_split(ids[::-1], seed)
    if count >= 10:
        assert abs(len(split["train"]) / count - 0.7) < 0.06
        assert abs(len(split["test"]) / count - 0.2) < 0.06


def test_make_split_depends_on_the_seed():
    ids = [f"s{n}" for n in range(30)]
    assert len({tuple(make_split(ids, seed)["test"]) for seed in range(10)}) == 10


def test_make_split_of_few():
    split = make_split(["a", "b"])
    assert (len(split["train"]), split["val"], len(split["test"])) == (1, [], 1)
    for few in ([], ["a"]):
        problem = refused(make_split, few)
        assert (problem.code, problem.exit_code) == ("TOO_FEW", 3)
    assert refused(make_split, ["a", "b", "a"]).code == "LEAK"


@settings(max_examples=60, deadline=None)
@given(count=st.integers(2, 60), folds=st.integers(2, 60), seed=st.integers(0, 2**32 - 1))
def test_folds_test_every_subject_once(count, folds, seed):
    ids = [f"s{n}" for n in range(count)]
    folds = min(folds, count)
    splits = [make_fold(ids, fold, folds, seed) for fold in range(folds)]
    assert sorted(subject for split in splits for subject in split["test"]) == sorted(ids)
    for fold, split in enumerate(splits):
        assert sorted(split["train"] + split["val"] + split["test"]) == sorted(ids)
        assert split["train"]
        assert len(split["test"]) in (count // folds, -(-count // folds))
        rest = count - len(split["test"])
        assert len(split["val"]) == (max(1, round(rest / 10)) if rest >= 3 else 0)
        assert split == make_fold(ids[::-1], fold, folds, seed)
        assert all(part == sorted(part) for part in split.values())


def test_folds_depend_on_the_seed_and_watch_different_people():
    ids = [f"s{n}" for n in range(30)]
    assert len({tuple(make_fold(ids, 0, 5, seed)["test"]) for seed in range(10)}) == 10
    assert len({tuple(make_fold(ids, fold, 5)["val"]) for fold in range(5)}) == 5


@pytest.mark.parametrize(
    ("code", "exit_code", "ids", "fold", "folds"),
    [
        ("FOLDS", 2, "abc", 0, 1),
        ("FOLDS", 2, "abc", 0, 0),
        ("FOLDS", 2, "abc", 3, 3),
        ("FOLDS", 2, "abc", -1, 3),
        ("TOO_FEW", 3, "abc", 0, 4),
        ("TOO_FEW", 3, "a", 0, 2),
        ("LEAK", 3, "aba", 0, 2),
    ],
)
def test_folds_that_are_refused(code, exit_code, ids, fold, folds):
    problem = refused(make_fold, list(ids), fold, folds)
    assert (problem.code, problem.exit_code) == (code, exit_code)


def test_read_split(tmp_path):
    path = tmp_path / "split.json"
    path.write_text(json.dumps({"train": ["b", "a"], "test": ["c"]}))
    assert read_split(path, ["a", "b", "c", "d"]) == {"train": ["a", "b"], "val": [], "test": ["c"]}


def test_read_split_from_a_csv(tmp_path):
    path = tmp_path / "split.csv"
    path.write_text("\ufeffpart,age,subject\ntrain,3,b\ntest,4, c\ntrain,5,a\n")
    assert read_split(path, ["a", "b", "c", "d"]) == {"train": ["a", "b"], "val": [], "test": ["c"]}


@pytest.mark.parametrize(
    ("code", "exit_code", "content", "told"),
    [
        ("SPLIT_FILE", 2, "", "lacks a column"),
        ("SPLIT_FILE", 2, "subject,fold\na,1\n", "lacks a column"),
        ("SPLIT_FILE", 2, "subject,part\n", "nobody in train"),
        ("SPLIT_FILE", 2, "subject,part\na,test\n", "nobody in train"),
        ("SPLIT_FILE", 2, "subject,part\na,train\nb,tset\n", "line 3 has the part 'tset'"),
        ("SPLIT_FILE", 2, "subject,part\na\n", "the part ''"),
        ("SPLIT_FILE", 2, 'subject,part\n"a,train\n', "no CSV"),
        ("SUBJECT_UNKNOWN", 2, "subject,part\na,train\nanne,test\n", "'anne'"),
        ("LEAK", 3, "subject,part\na,train\na,test\n", "more than once: a"),
        ("LEAK", 3, "subject,part\na,train\na,train\n", "more than once: a"),
    ],
)
def test_a_csv_split_that_is_refused(tmp_path, code, exit_code, content, told):
    path = tmp_path / "split.csv"
    path.write_text(content)
    problem = refused(read_split, path, ["a", "b", "anna"])
    assert (problem.code, problem.exit_code, problem.file) == (code, exit_code, str(path))
    assert told in problem.what


@pytest.mark.parametrize(
    ("code", "exit_code", "content"),
    [
        ("SPLIT_FILE", 2, "{"),
        ("SPLIT_FILE", 2, "[" * 200_000),
        ("SPLIT_FILE", 2, "[]"),
        ("SPLIT_FILE", 2, "{}"),
        ("SPLIT_FILE", 2, '{"train": []}'),
        ("SPLIT_FILE", 2, '{"train": "a"}'),
        ("SPLIT_FILE", 2, '{"train": [1]}'),
        ("SPLIT_FILE", 2, '{"train": ["a"], "tset": ["b"]}'),
        ("SUBJECT_UNKNOWN", 2, '{"train": ["a", "anne"]}'),
        ("LEAK", 3, '{"train": ["a", "b"], "test": ["b"]}'),
        ("LEAK", 3, '{"train": ["a", "a"]}'),
    ],
)
def test_a_split_that_is_refused(tmp_path, code, exit_code, content):
    path = tmp_path / "split.json"
    path.write_text(content)
    problem = refused(read_split, path, ["a", "b", "anna"])
    assert (problem.code, problem.exit_code, problem.file) == (code, exit_code, str(path))
    if code == "SUBJECT_UNKNOWN":
        assert "'anne'" in problem.what
        assert "'anna'" in problem.cure
    assert refused(read_split, tmp_path / "none.json", ["a"]).code == "SPLIT_FILE"


# ---------------------------------------------------------------- one scan under two names


def head(seed, shape=(30, 36, 28)):
    """A smooth random ellipsoid, 0 outside, int16 values."""
    rng = np.random.default_rng(seed)
    at = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij"))
    inside = (at**2).sum(0) < 0.8
    waves = sum(np.sin((rng.normal(0, 4, 3)[:, None, None, None] * at).sum(0) + rng.uniform(0, 6)) for _ in range(8))
    return np.where(inside, 600 + 100 * waves, 0).clip(0).astype(np.int16).astype(np.float32)


def correlation(a, b):
    return float(fingerprint(a) @ fingerprint(b))


COPIES = {
    "itself": lambda v: v,
    "rescaled": lambda v: 0.37 * v + 11,
    "as bytes": lambda v: np.rint(v / v.max() * 255),
    "in 64 grey levels": lambda v: np.rint(v / v.max() * 63) - 32,
    "padded": lambda v: np.pad(v, ((5, 9), (3, 0), (0, 4))),
    "cropped": lambda v: v[1:-1, 1:-1, 1:-1],
    "with noise": lambda v: v + np.random.default_rng(0).normal(0, 0.01 * v.std(), v.shape),
    "moved": lambda v: np.roll(np.pad(v, 6), (4, -2, 3), (0, 1, 2)),
}


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("flip", [(), (0,), (1, 2), (0, 1, 2)])
def test_a_copy_is_found(copy, flip):
    scan = head(1)
    prints = [fingerprint(v) for v in (head(2), scan, np.flip(copy(scan), flip), head(3))]
    found = same_scans(prints, ["a", "b", "c", "d"])
    assert [(i, j) for i, j, _ in found] == [(1, 2)]
    assert SAME_SCAN <= found[0][2] <= 1


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), gain=st.floats(0.01, 100), offset=st.floats(-1000, 1000))
def test_the_fingerprint_does_not_know_the_unit(seed, gain, offset):
    scan = head(seed, (12, 14, 10))
    assert correlation(scan, gain * scan + offset) > 0.9999


def test_other_heads_are_others_and_one_subject_is_not_compared_with_itself():
    prints = [fingerprint(head(seed)) for seed in range(12)]
    assert same_scans(prints, [str(n) for n in range(12)]) == []
    assert same_scans([prints[0], prints[0], prints[1]], ["a", "a", "b"]) == []
    assert [pair[:2] for pair in same_scans([prints[0]] * 3, ["a", "b", "a"])] == [(0, 1), (1, 2)]


def test_a_fingerprint_is_normalised_and_a_constant_scan_has_none():
    one = fingerprint(head(0))
    assert (one.shape, one.dtype) == ((CELLS**3,), np.float32)
    assert abs(one.mean()) < 1e-6
    assert np.linalg.norm(one) == pytest.approx(1, abs=1e-5)
    empty = fingerprint(np.full((4, 5, 6), 3.0))
    assert not empty.any()
    assert same_scans([empty, empty], ["a", "b"]) == []
    assert same_scans([], []) == []


@pytest.mark.parametrize("shape", [(1, 9, 9), (40, 1, 7), (2, 2, 2)])
def test_thin_scans_have_one_too(shape):
    scan = np.random.default_rng(0).random(shape)
    assert np.isfinite(fingerprint(scan)).all()
    assert correlation(scan, 2 * scan + 1) == pytest.approx(1, abs=1e-3)


def test_a_large_cohort_is_compared_quickly():
    """1251 people with 4 contrasts, everybody a little like everybody else, one copy."""
    rng = np.random.default_rng(0)
    coarse = rng.normal(size=(5004, 8, 8, 8)).astype(np.float32) + 3 * rng.normal(size=(8, 8, 8)).astype(np.float32)
    prints = coarse.repeat(2, 1).repeat(2, 2).repeat(2, 3).reshape(5004, -1)
    prints[4001] = np.flip(prints[17].reshape(16, 16, 16), (0, 2)).ravel()
    prints -= prints.mean(1, keepdims=True)
    prints /= np.linalg.norm(prints, axis=1, keepdims=True)
    start = time.perf_counter()
    found = same_scans(prints, [f"s{n // 4}" for n in range(5004)])
    assert [(i, j) for i, j, _ in found] == [(17, 4001)]
    print(f"same_scans: 5004 scans in {time.perf_counter() - start:.2f} s")
    assert time.perf_counter() - start < 6  # 0.6 s on two idle cores


def test_different_people_are_far_below_the_bound(real_data):
    people = [path for path in sorted(real_data.iterdir()) if not path.name.startswith("tpl-")]
    scans = [(path.name, file) for path in people for file in sorted(path.glob("*_t1.nii.gz"))]
    cubes = [fingerprint(nib.load(file).get_fdata(dtype=np.float32)) for _, file in scans]
    between = (np.array(cubes) @ np.array(cubes).T)[np.triu_indices(len(cubes), 1)]
    print(f"largest correlation between the T1 of {len(people)} people: {between.max():.4f}")
    assert between.max() < 0.99
    assert same_scans(cubes, [name for name, _ in scans]) == []
