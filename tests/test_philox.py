"""Random numbers: the published vectors, and independence of batch and order."""

from __future__ import annotations

import math

import pytest
import torch

from phmdiff_fast.kernels import _philox

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
