"""Which patches synthesis computes, and which slices go together."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phmdiff_fast.background import PARTS, SMALL, batches, plain_batches

PATCH, LEVELS = 4, 3


def volume(seed, count=9, height=64, width=48, filled=0.5):
    """Blobs of foreground of various sizes; the first slice empty, the last one full."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    inside = np.stack([
        (y - rng.uniform(0, height)) ** 2 + (x - rng.uniform(0, width)) ** 2 < (filled * rng.uniform(2, width)) ** 2
        for _ in range(count)
    ])  # fmt: skip
    inside[0], inside[-1] = False, True
    return inside


def cells(inside, level):
    cell = PATCH << level
    rows, columns = inside.shape[0] // cell, inside.shape[1] // cell
    return inside.reshape(rows, cell, columns, cell).any((1, 3)).ravel()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 2), st.integers(0, 2))
def test_every_slice_is_there_once_and_every_patch_with_foreground_is_computed(seed, size, views, context):
    inside = volume(seed)
    made = batches(inside, size, patch=PATCH, levels=LEVELS, views=views, context=context, small=16)
    assert sorted(np.concatenate([part.rows for part in made]).tolist()) == list(range(9))
    for part in made:
        assert 1 <= len(part.rows) <= size
        for view, level in np.ndindex(views, LEVELS):
            kept = part.kept and part.kept[view][level]
            if kept is None:
                continue
            assert kept.dtype == np.int32
            assert (np.diff(kept, axis=1) > 0).all()
            for row, ids in zip(part.rows, kept, strict=True):
                near = inside[max(0, row - context) : row + context + 1].any(0)
                assert np.isin(np.flatnonzero(cells(near[::-1] if view else near, level)), ids).all()


def test_a_slice_keeps_the_same_patches_whatever_it_is_made_with():
    inside = volume(3)
    whole = batches(inside, 9, patch=PATCH, levels=LEVELS, small=16)
    for part in whole:
        for at, row in enumerate(part.rows):
            (alone,) = batches(inside[row : row + 1], 1, patch=PATCH, levels=LEVELS, small=16)
            assert (alone.kept is None) == (part.kept is None)
            for kept, own in zip(part.kept[0] if part.kept else (), alone.kept[0] if alone.kept else (), strict=True):
                assert (kept is None) == (own is None)
                assert kept is None or np.array_equal(kept[at], own[0])


def test_what_rounding_leaves_room_for_is_the_nearest_background():
    inside = np.zeros((1, 64, 64), bool)
    inside[0, 28:32, 28:32] = True  # one patch of 16 x 16
    (part,) = batches(inside, 4, patch=4, levels=1, small=16)
    kept = part.kept[0][0][0]
    assert len(kept) == 256 // PARTS
    rows, columns = kept // 16 - 7, kept % 16 - 7
    assert (np.maximum(abs(rows), abs(columns)) <= 2).all()
    assert {(y, x) for y, x in zip(rows.tolist(), columns.tolist(), strict=True)} >= set(np.ndindex(2, 2)) - {(2, 2)}


def test_a_full_slice_and_small_levels_are_computed_whole():
    assert batches(np.ones((2, 64, 64), bool), 4, patch=4, levels=3)[0].kept is None
    assert all(part.kept is None for part in batches(volume(1)[:, :60, :], 4, patch=4, levels=1))
    assert volume(1)[0, :60].size // 16 < SMALL
    (part,) = batches(volume(1)[:1], 4, patch=4, levels=3, small=16)
    assert [kept is None for kept in part.kept[0]] == [False, False, True]  # 16 x 16, 8 x 8 and 4 x 3 patches


def test_sizes_that_are_no_multiple_are_padded_as_the_model_pads():
    inside = np.zeros((1, 37, 50), bool)
    inside[0, 36, 49] = True
    (part,) = batches(inside, 4, patch=4, levels=2, small=16)  # of 40 x 56
    assert 9 * 14 + 12 in part.kept[0][0][0]


@pytest.mark.parametrize(("count", "size"), [(7, 3), (6, 3), (1, 5)])
def test_plain_batches_are_in_order(count, size):
    made = plain_batches(count, size)
    assert np.concatenate([part.rows for part in made]).tolist() == list(range(count))
    assert max(len(part.rows) for part in made) <= size
    assert all(part.kept is None for part in made)
