"""The CUDA sources where there is no GPU: their results, emulated, are the CPU kernels' bit for bit, and nvcc
compiles them for every architecture without a spill.

The emulation (tests/cuda_on_cpu) runs the very files of csrc/cuda, block after block; it finds wrong indices,
missing barriers, misaligned vectors and writes outside an array, not what only a GPU can show.
"""

from __future__ import annotations

import ctypes as c
import mmap
import sys
import weakref
from itertools import product
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent / "cuda_on_cpu"))

import cuda_build

FLOAT, DOUBLE, BFLOAT16, FLOAT16 = range(4)
TYPES = {"float32": FLOAT, "float64": DOUBLE, "bfloat16": BFLOAT16, "float16": FLOAT16}
STORED = {FLOAT: np.float32, DOUBLE: np.float64, BFLOAT16: np.uint16, FLOAT16: np.float16}
MARGIN = 96  # elements before and after everything, for accesses out of bounds
SENTINEL = 0xA5
MAX_LEVELS = 24
P, I = c.c_void_p, c.c_int64

every_type = pytest.mark.parametrize("kind", TYPES.values(), ids=TYPES.keys())


# --- the arguments of csrc/common/args.h ---------------------------------------------------------------


class Image(c.Structure):
    _fields_ = [("data", P), ("batch", I), ("channel", I), ("row", I)]


class Shape(c.Structure):
    _fields_ = [("batch", I), ("channels", I), ("height", I), ("width", I)]


class PyramidArgs(c.Structure):
    _fields_ = [("x", Image), ("shape", Shape), ("levels", c.c_int), ("level", P * MAX_LEVELS)]


class ResampleArgs(c.Structure):
    _fields_ = [("in_", P), ("add", P), ("out", P), ("planes", I), ("in_height", I), ("in_width", I),
                ("out_height", I), ("out_width", I), ("transposed", c.c_bool)]  # fmt: skip


class Normals(c.Structure):
    _fields_ = [("sample_ids", P), ("seed", I), ("step", I), ("stream", I), ("seed_at", P), ("step_at", P)]


def _merge_args(number):
    factors = type("FactorsOf", (c.Structure,), {"_fields_": [("abar", P), ("weight", P), ("coarse", number)]})
    forward = [("y", Image), ("eps", Image), ("coarse", Image), ("normals", Normals), ("shape", Shape),
               ("factors", factors), ("absolute", c.c_bool), ("out", P)]  # fmt: skip
    backward = [("grad", Image), ("shape", Shape), ("factors", factors), ("y", P), ("eps", P), ("coarse", P)]
    return (type("MergeArgs", (c.Structure,), {"_fields_": forward, "factors_of": factors}),
            type("MergeBackwardArgs", (c.Structure,), {"_fields_": backward, "factors_of": factors}))  # fmt: skip


MERGE, MERGE_BACKWARD = zip(_merge_args(c.c_float), _merge_args(c.c_double), strict=True)


class HaarArgs(c.Structure):
    _fields_ = [("in_", P), ("out", P), ("batch", I), ("channels", I), ("x", I), ("y", I), ("z", I)]


class DrawArgs(c.Structure):
    _fields_ = [("normals", Normals), ("batch", I), ("count", I), ("out", P)]


# --- memory ----------------------------------------------------------------------------------------------


def wide(kind):
    return np.float64 if kind == DOUBLE else np.float32


def is_double(kind) -> int:
    return int(kind == DOUBLE)


def ceil_half(n, times=1):
    return -(-n // 2**times)


def stored(values: np.ndarray, kind: int) -> np.ndarray:
    if kind == BFLOAT16:
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(STORED[kind])


class Memory:
    """`count` elements between two margins; the first lies `offset` elements past a multiple of 64 bytes."""

    alive: ClassVar = weakref.WeakSet()  # what an emulated kernel may read

    def __init__(self, dtype, count: int, byte: int, offset: int = 0):
        dtype = np.dtype(dtype)
        raw = np.full((count + 2 * MARGIN + offset) * dtype.itemsize + 64, byte, np.uint8)
        start = -raw.ctypes.data % 64
        self.elements = raw[start : start + (raw.size - 64)].view(dtype)
        self.count, self.first = count, MARGIN + offset
        self.pointer = self.elements.ctypes.data + self.first * dtype.itemsize
        Memory.alive.add(self)

    @property
    def body(self):
        return self.elements[self.first : self.first + self.count]

    def check_margins(self):
        for side in (self.elements[: self.first], self.elements[self.first + self.count :]):
            assert (side.view(np.uint8) == SENTINEL).all(), "written outside of an output"


def random(rng, shape):
    """Normal numbers, one in twenty of them a zero of either sign."""
    values = rng.standard_normal(shape)
    return np.where(rng.random(shape) < 0.05, np.copysign(0.0, values), values)


LAYOUTS = ("packed", "off by one", "padded rows", "aligned rows", "expanded batch", "expanded channels", "far planes")


def image(rng, kind, shape, layout="packed", values=None):
    """(Image, memory): an input of random numbers, NaN wherever it has no element."""
    b, ch, h, w = shape
    row = w + {"padded rows": 3, "aligned rows": -w % 16 + 16, "far planes": 1}.get(layout, 0)
    held = (1 if layout == "expanded batch" else b, 1 if layout == "expanded channels" else ch)
    channel = h * row + (5 if layout == "far planes" else 0)
    batch = held[1] * channel + (16 if layout == "aligned rows" else 0)
    memory = Memory(STORED[kind], held[0] * batch, 0xFF, offset=int(layout == "off by one"))
    view = np.lib.stride_tricks.as_strided(
        memory.body, (*held, h, w), tuple(memory.body.itemsize * n for n in (batch, channel, row, 1))
    )
    view[...] = stored(random(rng, view.shape) if values is None else values, kind)
    strides = (batch if held[0] == b else 0, channel if held[1] == ch else 0, row)
    return Image(memory.pointer, *strides), memory


def given(rng, kind, count, offset=0):
    memory = Memory(STORED[kind], count, 0xFF, offset)
    memory.body[...] = stored(random(rng, count), kind)
    return memory


# --- running -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library():
    if not cuda_build.has("g++"):
        pytest.skip("needs g++")
    made = c.CDLL(str(cuda_build.library()))
    made.emulated_faults.restype = c.c_char_p
    made.size_of.restype = I
    made.emulated_settings.argtypes = [c.c_bool, I, I]
    made.emulated_readable.argtypes = [P, I]
    number, flag = c.c_int, c.c_bool  # ..., the arguments, first and last unit of the CPU
    made.pyramid.argtypes = made.haar.argtypes = [number, flag, flag, P, I, I]
    made.merge.argtypes = made.merge_backward.argtypes = made.resampled.argtypes = [number, flag, P, I, I]
    made.drawn.argtypes = [flag, flag, P]
    return made


# (reversed, most blocks of a grid): as many blocks as there are pieces of work, then few, which then loop.
ALL = 2**31 - 1
EVERY = (0, -1)  # unit of the CPU
ORDERS = ((False, ALL), (True, ALL), (False, 3), (True, 2))


def bits(array):
    return array.view(f"u{array.itemsize}")


def same(library, outputs, run, what, alike=None):
    """`run(cuda, pointers)` writes the outputs, (dtype, count, offset) each: the CPU's and CUDA's in every order."""
    results = []
    for cuda, (reverse, most) in [(False, ORDERS[0]), *((True, order) for order in ORDERS)]:
        memories = [Memory(dtype, count, SENTINEL, offset) for dtype, count, offset in outputs]
        library.emulated_settings(reverse, most, ALL)
        for memory in Memory.alive:
            library.emulated_readable(memory.pointer, memory.body.nbytes)
        run(cuda, [m.pointer for m in memories])
        library.emulated_readable(None, 0)
        assert library.emulated_faults() == b"", what
        for memory in memories:
            memory.check_margins()
        results.append([m.body for m in memories])
    for order, result in zip(ORDERS, results[1:], strict=True):
        for n, (expected, got) in enumerate(zip(results[0], result, strict=True)):
            equal = bits(expected) == bits(got) if alike is None else alike(expected, got)
            if not equal.all():
                at = int(np.flatnonzero(~equal)[0])
                pytest.fail(f"{what}, {order}: output {n} differs in {(~equal).sum()} of {equal.size} elements, first "
                            f"{at}: {expected[at]} on the CPU, {got[at]}")  # fmt: skip
    return results[0]


def sides(rng, largest=70):
    """Every height and every width from 1 on, once each, and a few that fill tiles just so."""
    yield from zip(range(1, largest + 1), rng.permutation(largest) + 1, strict=True)
    yield from ((64, 64), (65, 128), (129, 63), (1, 300), (300, 1), (128, 256))


def test_arguments_are_laid_out_alike(library):
    structures = (
        PyramidArgs,
        ResampleArgs,
        MERGE[0],
        MERGE_BACKWARD[0],
        MERGE[1],
        MERGE_BACKWARD[1],
        HaarArgs,
        DrawArgs,
    )
    assert [library.size_of(n) for n in range(len(structures))] == [c.sizeof(s) for s in structures]


# --- the pyramid --------------------------------------------------------------------------------------------


def level_sizes(h, w, levels):
    return [(ceil_half(h, n), ceil_half(w, n)) for n in range(1, levels + 1)]


@every_type
def test_pyramid_forward(library, kind):
    rng = np.random.default_rng(0)
    deepest = 7 if kind in (FLOAT, DOUBLE) else 6  # of a 16-bit type the seventh starts from a rounded sixth
    for case, (h, w) in enumerate(sides(rng)):
        layout, levels, offset = LAYOUTS[case % len(LAYOUTS)], case % deepest + 1, int(case % 4 == 3)
        shape = (1 + case % 3, 1 + case % 2, int(h), int(w))
        x, keep = image(rng, kind, shape, layout)
        planes = shape[0] * shape[1]

        def run(cuda, out, x=x, shape=shape, levels=levels):
            args = PyramidArgs(x, Shape(*shape), levels, (P * MAX_LEVELS)(*out))
            library.pyramid(kind, cuda, False, c.byref(args), *EVERY)

        outputs = [(STORED[kind], planes * i * j, offset) for i, j in level_sizes(h, w, levels)]
        same(library, outputs, run, f"{shape} {layout}, {levels} levels")
        del keep


@every_type
def test_pyramid_backward(library, kind):
    rng = np.random.default_rng(1)
    deep = [(9, (200, 70)), (8, (70, 200)), (7, (129, 321)), (7, (321, 129)), (8, (385, 257))]
    for case, (levels, (h, w)) in enumerate([*((n % 8 + 1, side) for n, side in enumerate(sides(rng))), *deep]):
        offset = int(case % 4 == 3)
        shape = (1 + case % 3, 1 + case % 2, int(h), int(w))
        planes = shape[0] * shape[1]
        grads = [given(rng, kind, planes * i * j, case % 2) for i, j in level_sizes(h, w, levels)]
        level = (P * MAX_LEVELS)(*(g.pointer for g in grads))

        def run(cuda, out, level=level, shape=shape, levels=levels):
            args = PyramidArgs(Image(out[0], 0, 0, 0), Shape(*shape), levels, level)
            library.pyramid(kind, cuda, True, c.byref(args), *EVERY)

        same(library, [(STORED[kind], planes * h * w, offset)], run, f"{shape}, {levels} levels")


def test_seventh_level_of_16_bits_is_within_a_rounding(library):
    rng = np.random.default_rng(2)
    x, keep = image(rng, FLOAT16, (1, 2, 200, 150))
    args = PyramidArgs(x, Shape(1, 2, 200, 150), 7)
    seventh = []
    for cuda in (False, True):
        memories = [Memory(np.float16, 2 * i * j, SENTINEL) for i, j in level_sizes(200, 150, 7)]
        args.level = (P * MAX_LEVELS)(*(m.pointer for m in memories))
        library.emulated_settings(False, ALL, ALL)
        library.pyramid(FLOAT16, cuda, False, c.byref(args), *EVERY)
        seventh.append(memories[6].body.astype(float))
    assert np.abs(seventh[0] - seventh[1]).max() <= 2.0**-10 * np.abs(seventh[0]).max()
    del keep


# --- resampling -----------------------------------------------------------------------------------------------


@every_type
@pytest.mark.parametrize("transposed", [False, True])
def test_resample(library, kind, transposed):
    rng = np.random.default_rng(3)
    alphas = (0.7, 0.9, 0.35, 0.5, 0.1, 0.62, 0.99, 0.05)
    large = [*((int(h), int(w)) for h, w in list(sides(rng))[::2]), (400, 37), (37, 400), (3, 900)]
    for case, (h, w) in enumerate(large):
        alpha, planes = alphas[case % len(alphas)], 1 + case % 3
        small = (max(1, int(h * alpha)), max(1, int(w * alpha)))
        (ih, iw), (oh, ow) = (small, (h, w)) if transposed else ((h, w), small)
        source, add = given(rng, kind, planes * ih * iw, case % 2), given(rng, kind, planes * oh * ow)
        source.body[source.body == -source.body] = 0  # CPU tables hold weights of 0, and -0 + 0 x is 0

        def run(cuda, out, source=source, add=add, case=case, sizes=(planes, ih, iw, oh, ow)):
            args = ResampleArgs(source.pointer, add.pointer if case % 3 else None, out[0], *sizes, transposed)
            library.resampled(kind, cuda, c.byref(args), *EVERY)

        same(library, [(STORED[kind], planes * oh * ow, case % 2)], run, f"{(ih, iw)} -> {(oh, ow)}, {planes} planes")


# --- merging --------------------------------------------------------------------------------------------------

INPUTS = [terms for terms in product((True, False), repeat=3) if any(terms)]


class Merge:
    """A case of merge_state: its arguments but the output, and what they point to."""

    def __init__(self, rng, kind, case, h, w, values=None):
        y, eps, coarse = INPUTS[case % len(INPUTS)]
        self.kind, self.shape = kind, (1 + case % 3, 1 + case % 2, int(h), int(w))
        half = (*self.shape[:2], ceil_half(int(h)), ceil_half(int(w)))
        self.layout, self.keep = LAYOUTS[case // 2 % len(LAYOUTS)], []
        self.drawn = eps and case % 2 == 1
        args = MERGE[is_double(kind)]()
        for name, there, size in (
            ("y", y, self.shape),
            ("eps", eps and not self.drawn, self.shape),
            ("coarse", coarse, half),
        ):
            if there:
                picture, memory = image(rng, kind, size, self.layout, values)
                setattr(args, name, picture)
                self.keep.append(memory)
        if self.drawn:
            ids = rng.integers(0, 2**40, self.shape[0])
            at = np.array([2**35 + 7, 11], np.int64)
            self.keep += [ids, at]
            args.normals = Normals(ids.ctypes.data, 2**33 + 5, 3, 2, at.ctypes.data if case % 4 == 1 else None,
                                   at.ctypes.data + 8 if case % 4 == 1 else None)  # fmt: skip
        args.shape = Shape(*self.shape)
        args.factors = self.factors(rng, case)
        args.absolute = case % 5 == 4
        self.args = args
        self.numel = int(np.prod(self.shape))

    def factors(self, rng, case):
        numbers = rng.random(self.shape[0]).astype(wide(self.kind))
        self.keep.append(numbers)
        kind = MERGE[is_double(self.kind)].factors_of
        return (kind(numbers.ctypes.data, None, 0), kind(None, numbers.ctypes.data, 0), kind(None, None, -0.75))[
            case % 3
        ]

    def __str__(self):
        there = [name for name in ("y", "eps", "coarse") if getattr(self.args, name).data]
        return f"{self.shape} {self.layout}, {there} given{', noise drawn' if self.drawn else ''}"


@every_type
def test_merge_forward(library, kind):
    rng = np.random.default_rng(4)
    for case, (h, w) in enumerate(sides(rng)):
        merge = Merge(rng, kind, case, h, w)

        def run(cuda, out, merge=merge):
            merge.args.out = out[0]
            library.merge(kind, cuda, c.byref(merge.args), *EVERY)

        same(library, [(STORED[kind], merge.numel, int(case % 4 == 2))], run, f"{case}: {merge}")


@every_type
def test_merge_backward(library, kind):
    rng = np.random.default_rng(5)
    for case, (h, w) in enumerate(sides(rng)):
        asked, layout = INPUTS[case % len(INPUTS)], LAYOUTS[case // 2 % len(LAYOUTS)]
        merge = Merge(rng, kind, case, h, w)
        grad, keep = image(rng, kind, merge.shape, layout)
        b, ch, _, _ = merge.shape
        counts = (merge.numel, merge.numel, b * ch * ceil_half(int(h)) * ceil_half(int(w)))
        outputs = [(STORED[kind], n, case % 2) for n, wanted in zip(counts, asked, strict=True) if wanted]

        def run(cuda, out, grad=grad, merge=merge, asked=asked):
            rest = iter(out)
            to = [next(rest) if wanted else None for wanted in asked]
            args = MERGE_BACKWARD[is_double(kind)](
                grad, merge.args.shape, MERGE_BACKWARD[is_double(kind)].factors_of(), *to
            )
            for name in ("abar", "weight", "coarse"):
                setattr(args.factors, name, getattr(merge.args.factors, name))
            library.merge_backward(kind, cuda, c.byref(args), *EVERY)

        same(library, outputs, run, f"{case}: {merge.shape} {layout}, asked for {asked}")
        del keep


# --- Haar, random numbers ----------------------------------------------------------------------------------------


@every_type
@pytest.mark.parametrize("inverse", [False, True])
def test_haar(library, kind, inverse):
    rng = np.random.default_rng(6)
    shorter = rng.permutation(70) % 9 + 1
    for case, z in enumerate([*range(1, 71), 128, 600]):
        b, ch, x, y = 1 + case % 2, 1 + case % 3, int(shorter[case % 70]), int(shorter[-1 - case % 70])
        volume, bands = b * ch * x * y * z, b * 8 * ch * ceil_half(x) * ceil_half(y) * ceil_half(z)
        count, size = (bands, volume) if inverse else (volume, bands)
        source = given(rng, kind, count, int(case % 8 > 5))

        def run(cuda, out, source=source, sizes=(b, ch, x, y, z)):
            library.haar(kind, cuda, inverse, c.byref(HaarArgs(source.pointer, out[0], *sizes)), *EVERY)

        same(library, [(STORED[kind], size, int(case % 8 in (3, 7)))], run, f"{(b, ch, x, y, z)}")


@pytest.mark.parametrize("integers", [False, True])
def test_draws(library, integers):
    ids, at = np.array([0, 5, 2**33 + 1], np.int64), np.array([2**40 + 9, 77], np.int64)
    for case, count in enumerate([*range(1, 30), 255, 256, 257, 1023, 1024, 1025, 5000]):
        seed_at, step_at = (at.ctypes.data, at.ctypes.data + 8) if case % 2 else (None, None)
        normals = Normals(ids.ctypes.data, 2**32 + 3, 19, case % 33, seed_at, step_at)

        def run(cuda, out, normals=normals, count=count):
            library.drawn(cuda, integers, c.byref(DrawArgs(normals, 3, count, out[0])))

        same(library, [(np.int64 if integers else np.float32, 3 * count, case % 3)], run, f"3 x {count}")


# --- what sizes and values should not change ------------------------------------------------------------------------


def alike(expected, got):
    """Equal bits, or NaN both: which NaN comes of two is the processor's affair."""
    if expected.dtype == np.uint16:
        expected, got = ((a.astype(np.uint32) << 16).view(np.float32) for a in (expected, got))
    return (bits(expected) == bits(got)) | (np.isnan(expected) & np.isnan(got))


def spoil(rng, memory, kind):
    """Inf and NaN at two places each, one of them at the border of a row or image now and then."""
    for special in (np.inf, np.nan):
        memory.body[[0, -1][rng.integers(2)]] = stored(np.array(special), kind)
        memory.body[rng.integers(memory.count)] = stored(np.array(special), kind)


@every_type
def test_inf_and_nan_stay_where_they_belong(library, kind):
    rng = np.random.default_rng(7)
    for case in range(28):
        h, w = 1 + case, 29 - case
        merge = Merge(rng, kind, case, h, w)
        for memory in merge.keep:
            if isinstance(memory, Memory):
                spoil(rng, memory, kind)

        def run(cuda, out, merge=merge):
            merge.args.out = out[0]
            library.merge(kind, cuda, c.byref(merge.args), *EVERY)

        same(library, [(STORED[kind], merge.numel, 0)], run, f"{merge}", alike)

        grad, memory = image(rng, kind, merge.shape)
        spoil(rng, memory, kind)
        coarse = (*merge.shape[:2], ceil_half(h), ceil_half(w))

        def backward(cuda, out, grad=grad, merge=merge):
            args = MERGE_BACKWARD[is_double(kind)](grad, merge.args.shape, coarse=out[0])
            args.factors.coarse = 0.5
            library.merge_backward(kind, cuda, c.byref(args), *EVERY)

        same(library, [(STORED[kind], int(np.prod(coarse)), 0)], backward, f"{merge}", alike)


@every_type
def test_nothing_to_do(library, kind):
    args = MERGE[is_double(kind)](shape=Shape(0, 1, 5, 5))
    library.merge(kind, True, c.byref(args), *EVERY)
    library.merge_backward(kind, True, c.byref(MERGE_BACKWARD[is_double(kind)](shape=Shape(1, 1, 5, 5))), *EVERY)
    for backward in (False, True):
        library.pyramid(kind, True, backward, c.byref(PyramidArgs(shape=Shape(2, 0, 5, 5), levels=2)), *EVERY)
        library.haar(kind, True, backward, c.byref(HaarArgs(None, None, 1, 1, 0, 4, 4)), *EVERY)
    library.resampled(
        kind, True, c.byref(ResampleArgs(planes=0, in_height=5, in_width=5, out_height=3, out_width=3)), *EVERY
    )
    assert library.emulated_faults() == b""


# --- images of more than 2^31 elements -----------------------------------------------------------------------------


class Huge:
    """Address space for `count` elements: pages come into being, as zeros, where they are touched."""

    def __init__(self, dtype, count):
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
        self.memory = mmap.mmap(-1, count * np.dtype(dtype).itemsize, flags=flags)
        self.array = np.frombuffer(self.memory, dtype)
        self.pointer = self.array.ctypes.data


LAST = {True: 4, False: 100}  # blocks, or units of the CPU: either make the last 90 elements of an image at least


def last_of_huge(library, outputs, run, units):
    """The last blocks of a huge image give what the CPU's last units give."""
    results = []
    for cuda in (False, True):
        memories = [Huge(dtype, count) for dtype, count in outputs]
        library.emulated_settings(False, ALL, LAST[True])
        run(cuda, [m.pointer for m in memories], units - LAST[False], units)
        assert library.emulated_faults() == b""
        results.append([m.array[-90:].copy() for m in memories])
    for expected, got in zip(*results, strict=True):
        assert np.array_equal(bits(expected), bits(got))
        assert (got != 0).any()


# 2^32 + 92722 elements in rows that are no multiple of 16 bytes or of a tile; more than 2^31 rows even of coarse.
@pytest.mark.parametrize("huge", [(2, 2, 23171, 46340), (1, 1, 2**32 + 421, 1)], ids=["wide", "high"])
def test_offsets_beyond_31_bits(library, huge):
    rng = np.random.default_rng(8)
    b, ch, h, w = huge
    half = (b, ch, ceil_half(h), ceil_half(w))
    tail = stored(rng.standard_normal(max(w, 2) * 200), BFLOAT16)
    x, coarse = Huge(np.uint16, b * ch * h * w), Huge(np.uint16, int(np.prod(half)))
    for memory in (x, coarse):
        memory.array[-tail.size :] = tail
    x_image, coarse_image = (Image(m.pointer, ch * i * j, i * j, j) for m, (_, ch, i, j) in ((x, huge), (coarse, half)))
    args = MERGE[0](y=x_image, eps=x_image, coarse=coarse_image, shape=Shape(*huge))
    args.factors.coarse = 0.3

    def merge(cuda, out, begin, end):
        args.out = out[0]
        library.merge(BFLOAT16, cuda, c.byref(args), begin, end)

    last_of_huge(library, [(np.uint16, x.array.size)], merge, b * ch * h)

    def backward(cuda, out, begin, end):
        grads = MERGE_BACKWARD[0](x_image, args.shape, MERGE_BACKWARD[0].factors_of(None, None, 0.3), *out)
        library.merge_backward(BFLOAT16, cuda, c.byref(grads), begin, end)

    outputs = [(np.uint16, x.array.size), (np.uint16, x.array.size), (np.uint16, coarse.array.size)]
    last_of_huge(library, outputs, backward, b * ch * half[2])

    def pyramid(cuda, out, begin, end):
        levels = PyramidArgs(x_image, Shape(*huge), 1, (P * MAX_LEVELS)(*out))
        library.pyramid(BFLOAT16, cuda, False, c.byref(levels), begin, end)

    last_of_huge(library, [(np.uint16, coarse.array.size)], pyramid, b * ch * half[2])

    def spread(cuda, out, begin, end):
        levels = PyramidArgs(Image(out[0], 0, 0, 0), Shape(*huge), 1, (P * MAX_LEVELS)(coarse.pointer))
        library.pyramid(BFLOAT16, cuda, True, c.byref(levels), begin, end)

    last_of_huge(library, [(np.uint16, x.array.size)], spread, b * ch * half[2])


def test_offsets_beyond_31_bits_of_haar_and_resample(library):
    rng = np.random.default_rng(9)
    b, ch, x, y, z = 2, 3, 701, 705, 1501  # the last 100 rows of blocks are what the last 100 rows of voxels hold
    volume, bands = Huge(np.uint16, b * ch * x * y * z), Huge(np.uint16, b * 8 * ch * 351 * 353 * 751)
    for memory in (volume, bands):
        memory.array[-(10**6) :] = stored(rng.standard_normal(10**6), BFLOAT16)
    for inverse, source, size in ((False, volume, bands.array.size), (True, bands, volume.array.size)):

        def haar(cuda, out, begin, end, inverse=inverse, source=source):
            args = HaarArgs(source.pointer, out[0], b, ch, x, y, z)
            library.haar(BFLOAT16, cuda, inverse, c.byref(args), begin, end)

        last_of_huge(library, [(np.uint16, size)], haar, b * ch * 351 * 353)

    large, small = (3, 40001, 40003), (3, 28001, 28003)
    images = {size: Huge(np.uint16, int(np.prod(size))) for size in (large, small)}
    for memory in images.values():
        memory.array[-(10**7) :] = stored(rng.standard_normal(10**7), BFLOAT16)
    for transposed, source, result in ((False, large, small), (True, small, large)):

        def resample(cuda, out, begin, end, transposed=transposed, source=source, result=result):
            args = ResampleArgs(
                images[source].pointer, images[result].pointer, out[0], *source, *result[1:], transposed
            )
            library.resampled(BFLOAT16, cuda, c.byref(args), begin, end)

        last_of_huge(library, [(np.uint16, images[result].array.size)], resample, 3 * result[1])


# --- nvcc ------------------------------------------------------------------------------------------------------------


def test_nvcc_compiles_without_a_spill(capsys):
    if not cuda_build.has("nvcc"):
        pytest.skip("needs nvcc")
    rows = cuda_build.resources()
    with capsys.disabled():
        print("\n" + cuda_build.table(rows))
    assert {(row["file"], row["arch"]) for row in rows} == set(
        product((s.name for s in cuda_build.CUDA), cuda_build.ARCHES)
    )
    wrong = [row for row in rows if int(row["stack"]) or int(row["stores"]) or int(row["loads"])]
    assert not wrong, cuda_build.table(wrong)
