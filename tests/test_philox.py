"""Random numbers: the published vectors, and independence of batch and order."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phmdiff_fast.kernels import _extension, _philox

# Random123's known answers for philox4x32-10: counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]  # fmt: skip


def philox_in_python(counter, key):
    """The same ten rounds on Python's own integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & 0xFFFFFFFF, (a >> 32) ^ c3 ^ k1, a & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_published_vectors(counter, key, expected):
    words = _philox.philox4x32(*(torch.tensor(v) for v in (*counter, *key)))
    assert tuple(int(w) for w in words) == expected
    assert philox_in_python(counter, key) == expected


def test_the_counter_is_laid_out_as_documented():
    seed, step, sample, stream = 0x1234567890, 77, (5 << 32) + 9, 3
    words = _philox.integers(torch.tensor([sample]), 4, rng=(seed, step), stream=stream)
    for index in range(4):
        counter = (index, 9, 5 ^ (stream << 24), step)
        assert int(words[0, index]) == philox_in_python(counter, (seed & 0xFFFFFFFF, seed >> 32))[0]


def test_normals_are_box_muller_of_the_words():
    z = _philox.normals(torch.tensor([4]), 7, rng=(1, 2), stream=1)
    unit = lambda word: ((word >> 8) + 0.5) / 2**24  # noqa: E731
    for e in range(7):
        words = philox_in_python((e // 4, 4, 1 << 24, 2), (1, 0))
        u, v = (unit(w) for w in words[2 * (e % 4 // 2) :][:2])
        turn = math.cos if e % 2 == 0 else math.sin
        assert float(z[0, e]) == pytest.approx(math.sqrt(-2 * math.log(u)) * turn(2 * math.pi * v), abs=2e-6)


def test_seed_and_step_may_be_tensors():
    ids = torch.arange(3)
    plain = _philox.integers(ids, 5, rng=(7, 11), stream=0)
    assert torch.equal(plain, _philox.integers(ids, 5, rng=(torch.tensor(7), torch.tensor(11)), stream=0))


@pytest.mark.parametrize("draw", [_philox.integers, _philox.uniforms, _philox.normals])
def test_draws_do_not_depend_on_the_batch(draw):
    ids = torch.tensor([3, 900, 2**40 + 1, 12])
    whole = draw(ids, 10, rng=(1, 5), stream=2)
    assert torch.equal(
        torch.cat([draw(ids[:1], 10, rng=(1, 5), stream=2), draw(ids[1:], 10, rng=(1, 5), stream=2)]), whole
    )
    assert torch.equal(draw(ids.flip(0), 10, rng=(1, 5), stream=2), whole.flip(0))
    for other in (dict(rng=(2, 5), stream=2), dict(rng=(1, 6), stream=2), dict(rng=(1, 5), stream=3)):
        assert not torch.equal(draw(ids, 10, **other), whole)


def test_moments():
    z = _philox.normals(torch.arange(64), 4096, rng=(0, 0), stream=1).double()
    n = z.numel()
    assert abs(float(z.mean())) < 4 / n**0.5
    assert abs(float(z.var()) - 1) < 4 * (2 / n) ** 0.5
    assert abs(float((z**4).mean()) - 3) < 4 * (96 / n) ** 0.5
    neighbours = (z[:, 1:] * z[:, :-1]).mean()  # cos and sin lanes share their radius, not their value
    assert abs(float(neighbours)) < 4 / n**0.5


# --- the extension ------------------------------------------------------------------------------

needs_extension = pytest.mark.skipif(
    bool(_extension.problem()), reason=_extension.problem() or "the extension is there"
)
OPS = torch.ops.phmdiff_fast
INT64 = st.integers(-(2**63), 2**63 - 1)


def integers_and_normals(ids, num, rng, stream):
    """From the extension, and from the reference."""
    given_ = dict(rng=rng, stream=stream)
    return (
        (_philox.integers(ids, num, **given_), _philox.normals(ids, num, **given_)),
        (_philox.integers_reference(ids, num, **given_), _philox.normals_reference(ids, num, **given_)),
    )


@needs_extension
@given(
    ids=st.lists(INT64, max_size=4), num=st.integers(0, 300), seed=INT64, step=INT64, stream=st.integers(0, 255),
    held=st.sampled_from([(False, False), (True, False), (False, True), (True, True)]),
)  # fmt: skip
@settings(max_examples=60, derandomize=True, deadline=None)
def test_the_extension_draws_the_reference_s_integers(ids, num, seed, step, stream, held):
    rng = tuple(torch.tensor(part) if tensor else part for part, tensor in zip((seed, step), held, strict=True))
    got, expected = integers_and_normals(torch.tensor(ids, dtype=torch.int64), num, rng, stream)
    assert got[0].shape == got[1].shape == (len(ids), num)
    assert torch.equal(got[0], expected[0])
    assert (got[1].dtype, expected[1].dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(got[1], expected[1], atol=2e-6, rtol=0)


def box_muller_in_float64(ids, num, rng, stream):
    """Of the uniforms as they are in float32."""
    words = _philox._call(ids, -(-num // 4), rng, stream)
    u = [_philox._unit(w).double() for w in words]
    lanes = []
    for first, second in ((u[0], u[1]), (u[2], u[3])):
        radius, angle = (-2 * first.log()).sqrt(), 2 * math.pi * second
        lanes += [radius * angle.cos(), radius * angle.sin()]
    return torch.stack(lanes, -1).flatten(1)[:, :num]


@needs_extension
def test_two_million_numbers_of_the_extension():
    ids, num = torch.tensor([3, -(2**40)]), 1_000_003
    got = _philox.normals(ids, num, rng=(5, 6), stream=1)
    exact = box_muller_in_float64(ids, num, (5, 6), 1)
    assert float((got.double() - exact).abs().max()) <= 2e-6
    assert float((got - _philox.normals_reference(ids, num, rng=(5, 6), stream=1)).abs().max()) <= 2e-6
    assert torch.equal(got, _philox.normals(ids, num + 1, rng=(5, 6), stream=1)[:, :num])
    words = _philox.integers(ids, num, rng=(5, 6), stream=1)
    assert torch.equal(words, _philox.integers_reference(ids, num, rng=(5, 6), stream=1))


# Samples whose first four words begin with 24 bits 0 or 1, at seed 5, step 3, stream 1: word -> (lowest, highest).
EXTREME = {0: (25676780, 8436068), 1: (3981689, 30848262), 2: (13625203, 29628037), 3: (16819000, 11122304)}


@needs_extension
@pytest.mark.parametrize("word", EXTREME)
@pytest.mark.parametrize("highest", [False, True])
def test_normals_of_the_extreme_words(word, highest):
    sample = EXTREME[word][highest]
    assert philox_in_python((0, sample, 1 << 24, 3), (5, 0))[word] >> 8 == (0xFFFFFF if highest else 0)
    ids = torch.tensor([sample])
    got = _philox.normals(ids, 4, rng=(5, 3), stream=1)
    assert got.isfinite().all()
    torch.testing.assert_close(got.double(), box_muller_in_float64(ids, 4, (5, 3), 1), atol=2e-6, rtol=0)
    if word in (0, 2) and highest:  # u is 1 in float32, so the radius is 0
        assert not got[0, word : word + 2].any()


@needs_extension
@pytest.mark.parametrize("num", [1, 2, 3, 4, 5, 63, 255, 256, 257, 1023, 4095, 4096, 4097, 12289])
def test_any_number_of_draws_begins_the_stream(num):
    ids = torch.tensor([1, 2, 3])
    for draw in (_philox.integers, _philox.normals):
        whole = draw(ids, 12345, rng=(1, 2), stream=3)
        assert torch.equal(draw(ids, num, rng=(1, 2), stream=3), whole[:, :num])


@needs_extension
def test_integers_and_normals_are_drawn_in_the_extension(monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("the reference ran")

    monkeypatch.setattr(_philox, "integers_reference", never)
    monkeypatch.setattr(_philox, "normals_reference", never)
    for draw in (_philox.integers, _philox.uniforms, _philox.normals):
        assert draw(torch.arange(2), 5, rng=(1, 2), stream=3).shape == (2, 5)
        assert draw(torch.arange(4)[::2].int(), 5, rng=(1, 2), stream=3).shape == (2, 5)


def test_meta_tensors_draw_on_the_reference():
    for draw in (_philox.integers, _philox.normals):
        assert draw(torch.arange(2, device="meta"), 5, rng=(1, 2), stream=3).shape == (2, 5)
