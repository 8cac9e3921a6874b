"""Broken copies of small scans, drawn from a number: what ``reader_torture.py`` feeds to the reader. No torch."""

from __future__ import annotations

import gzip
import io
import struct
import zlib
from dataclasses import dataclass

import nibabel as nib
import numpy as np

from phmdiff_fast.mha import FIELDS as MHA_FIELDS
from phmdiff_fast.nifti import DTYPES

FIELDS_TYPE = nib.Nifti1Header().structarr.dtype
FIELDS = FIELDS_TYPE.fields  # name -> (type, offset)
FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, np.nan, np.inf, -np.inf, 1e30, -1e30, 3.4e38, 1e-38, 1e-45, 352.0, 1e19)
MHA_HEADER = (
    "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\nCompressedData = {packed}\n"
    "TransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = 1 2 3\nElementSpacing = 1.5 1.25 2\nDimSize = {sizes}\n"
    "ElementType = MET_SHORT\nElementDataFile = LOCAL\n"
)
MHA_VALUES = ("", "0", "-1", "3", "99", "nan", "inf -inf 1", "1e999", "0 0 0", "1 1", "5 6 7 8", "9" * 5000, "1 " * 99,
              "True", "False", "LOCAL", "LIST", "/etc/passwd", "../x.raw", "\x1b[31m\xff\xe9", "MET_FLOAT",
              "MET_DOUBLE", "MET_UCHAR", "MET_LONG_LONG", "2147483647 2147483647 2147483647",
              " " * 5000, "1e-40 1e-40 1e-40",
              "3e38 3e38 3e38", "1 0 0 1 0 0 0 0 1", "1_0 1_0 1_0")  # fmt: skip


@dataclass(frozen=True)
class Base:
    """A sound file: ``raw`` unpacked, and its name's ending."""

    suffix: str
    raw: bytes


def voxels(shape, dtype, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 100, shape).astype(dtype)


def nifti(shape=(5, 6, 7), dtype=np.int16, endian="<", *, slope=None, extension=b"", sform=True) -> bytes:
    """The bytes of a sound .nii file."""
    header = nib.Nifti1Header(endianness=endian)
    header.set_data_dtype(np.dtype(dtype).newbyteorder(endian))
    header.set_xyzt_units("mm")
    affine = np.array([[-1.5, 0, 0, 10], [0, 1.25, 0.1, -20], [0, 0.2, 2, 30.5], [0, 0, 0, 1]])
    image = nib.Nifti1Image(voxels(shape, header.get_data_dtype()), affine, header)
    image.set_qform(affine, 1)
    image.set_sform(affine, int(sform))
    if extension:
        image.header.extensions.append(nib.nifti1.Nifti1Extension(6, extension))
    raw = bytearray(image.to_bytes())
    if slope:
        header = np.ndarray((), image.header.structarr.dtype, raw)
        header["scl_slope"], header["scl_inter"] = slope
    return bytes(raw)


def mha(shape=(5, 6, 7), *, packed=False) -> bytes:
    """The bytes of a sound .mha file, its voxels raw or as one zlib stream."""
    data = voxels(shape, "<i2").tobytes(order="F")
    header = MHA_HEADER.format(packed=packed, sizes=" ".join(map(str, shape)))
    return header.encode() + (zlib.compress(data) if packed else data)


BASES = [
    Base(".nii", nifti()),
    Base(".nii", nifti((4, 4, 4), np.float32)),
    Base(".nii", nifti((3, 5, 4), np.float64, ">")),
    Base(".nii", nifti((6, 6, 3), np.uint8, slope=(0.5, -3.0))),
    Base(".nii", nifti((5, 4, 3), np.int64, ">", slope=(2.0, 1.0))),
    Base(".nii", nifti((7, 3, 2, 1), np.uint16, extension=b"x" * 40)),
    Base(".nii", nifti((4, 5, 6), np.int32, sform=False)),
    Base(".mha", mha()),
    Base(".mha", mha((9, 2, 3), packed=True)),
]


class Draw:
    """One broken file: ``content`` with the name's ``suffix``, and the ``kind`` of breakage, from (seed, number)."""

    def __init__(self, seed: int, number: int):
        self.rng = np.random.default_rng([seed, number])
        base = BASES[self.below(len(BASES))]
        self.suffix, raw = base.suffix, base.raw
        ways = [*COMMON, *(MHA if base.suffix == ".mha" else NIFTI)]
        way = ways[self.below(len(ways))]
        self.kind, content = way.__name__, way(self, raw)
        if base.suffix == ".nii" and way not in PACKED and self.below(2):
            self.suffix, content = ".nii.gz", gzip.compress(content, 6, mtime=0)
            if self.below(4) == 0:
                content = flip(self, content)
        if way in PACKED:
            self.suffix = ".nii.gz"
        self.content = content

    def below(self, count: int) -> int:
        return int(self.rng.integers(count)) if count > 0 else 0

    def bytes(self, count: int) -> bytes:
        return self.rng.bytes(count)

    def pick(self, items):
        return items[self.below(len(items))]


# ---------------------------------------------------------------- any file


def flip(draw: Draw, raw: bytes) -> bytes:
    out = bytearray(raw)
    for _ in range(1 + draw.below(8)):
        out[draw.below(len(out))] ^= 1 << draw.below(8)
    return bytes(out)


def truncate(draw: Draw, raw: bytes) -> bytes:
    return raw[: draw.below(len(raw))]


def insert(draw: Draw, raw: bytes) -> bytes:
    at = draw.below(len(raw))
    return raw[:at] + draw.bytes(1 + draw.below(300)) + raw[at:]


def duplicate(draw: Draw, raw: bytes) -> bytes:
    start = draw.below(len(raw))
    return raw[: start + draw.below(len(raw) - start)] + raw[start:]


def splice(draw: Draw, raw: bytes) -> bytes:
    other = draw.pick(BASES).raw
    return raw[: draw.below(len(raw))] + other[draw.below(len(other)) :]


def noise(draw: Draw, raw: bytes) -> bytes:
    keep = draw.below(400)
    return raw[:keep] + draw.bytes(draw.below(2000))


COMMON = [flip, truncate, insert, duplicate, splice, noise]


# ---------------------------------------------------------------- NIfTI headers


def _extreme(draw: Draw, kind: np.dtype) -> bytes:
    """One value of a type, at its ends or anywhere."""
    if draw.below(4) == 0 or kind.kind not in "iuf":
        return draw.bytes(kind.itemsize)
    if kind.kind == "f" and draw.below(8) == 0:  # a signalling NaN
        return np.array((0x7FA00000 if kind.itemsize == 4 else 0x7FF4 << 48) | 1, kind.str.replace("f", "u")).tobytes()
    if kind.kind == "f":
        return np.array(draw.pick(FLOATS), kind).tobytes()
    ends = np.iinfo(kind)
    return np.array(
        draw.pick([ends.min, ends.max, 0, 1, min(2048, ends.max), ends.max - 1, ends.min // 2]), kind
    ).tobytes()


def _put(draw: Draw, raw: bytes, name: str) -> bytes:
    kind, at = FIELDS[name][:2]
    one = kind.base.newbyteorder("<" if raw[0] == 0x5C else ">")
    count = kind.itemsize // one.itemsize
    places = range(count) if draw.below(3) == 0 else [draw.below(count)]
    out = bytearray(raw)
    for place in places:
        here = at + place * one.itemsize
        out[here : here + one.itemsize] = _extreme(draw, one)
    return bytes(out)


def field(draw: Draw, raw: bytes) -> bytes:
    return _put(draw, raw, draw.pick(list(FIELDS)))


def fields(draw: Draw, raw: bytes) -> bytes:
    for _ in range(2 + draw.below(4)):
        raw = _put(draw, raw, draw.pick(list(FIELDS)))
    return raw


def geometry(draw: Draw, raw: bytes) -> bytes:
    """The fields that decide most, one to three of them; more often by the quaternion than by the matrix."""
    names = ["dim", "pixdim", "vox_offset", "scl_slope", "scl_inter", "datatype", "qform_code", "sform_code",
             "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "srow_x", "srow_y", "srow_z",
             "xyzt_units"]  # fmt: skip
    for _ in range(1 + draw.below(3)):
        raw = _put(draw, raw, draw.pick(names))
    if draw.below(2):
        raw = raw[:254] + bytes(2) + raw[256:]  # sform_code 0
    return raw


def huge(draw: Draw, raw: bytes) -> bytes:
    order = "<" if raw[0] == 0x5C else ">"
    sides = [draw.pick([1, 2, 255, 2048, 32767, -32768, -1]) for _ in range(3)]
    out = bytearray(raw)
    struct.pack_into(order + "4h", out, 40, 3, *sides)
    struct.pack_into(order + "h", out, 70, draw.pick(list(DTYPES)))
    return bytes(out)


def magic(draw: Draw, raw: bytes) -> bytes:
    word = draw.pick([b"ni1\0", b"n+2\0", b"n+1 ", b"\0\0\0\0", b"\xff\xfe\x1b[", draw.bytes(4)])
    return raw[:344] + word + raw[348:]


def endian(draw: Draw, raw: bytes) -> bytes:
    if draw.below(2):
        return raw[3::-1] + raw[4:]  # says the other order, and is not
    header = nib.Nifti1Header(raw[:348], check=False).as_byteswapped()
    return header.binaryblock + raw[348:]


NIFTI = [field, field, fields, geometry, geometry, huge, magic, endian]


# ---------------------------------------------------------------- gzip


def members(draw: Draw, raw: bytes) -> bytes:
    """Sound: cut into several gzip members, some of them empty."""
    cuts = sorted(draw.below(len(raw)) for _ in range(draw.below(30)))
    parts = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    return b"".join(gzip.compress(part, mtime=0) for part in parts)


def trailer(draw: Draw, raw: bytes) -> bytes:
    tails = [bytes(draw.below(100_000)), draw.bytes(1 + draw.below(50)), b"\x1f\x8b", gzip.compress(b"", mtime=0) * 500,
             gzip.compress(draw.bytes(500)), bytes(20) + b"\x1f\x8b\x08",
             b"\x1f\x8b\x08\x1f" + draw.bytes(60)]  # fmt: skip
    return gzip.compress(raw, mtime=0) + draw.pick(tails)


def checksum(draw: Draw, raw: bytes) -> bytes:
    whole = gzip.compress(raw, mtime=0)
    at = draw.pick([4, 8])  # ISIZE, CRC
    wrong = bytes(a ^ b for a, b in zip(whole[-at:][:4], draw.pick([b"\1\0\0\0", b"\xff" * 4]), strict=True))
    return whole[: len(whole) - at] + wrong + whole[len(whole) - at + 4 :]


def nested(draw: Draw, raw: bytes) -> bytes:
    for _ in range(2 + draw.below(5)):
        raw = gzip.compress(raw, mtime=0)
    return raw


def deflate(draw: Draw, raw: bytes) -> bytes:
    """A changed deflate stream inside a sound frame: its checksum is that of the voxels it should hold."""
    pack = zlib.compressobj(draw.below(10), zlib.DEFLATED, -15, 8, draw.pick([0, 2, 4]))
    stream = COMMON[draw.below(4)](draw, pack.compress(raw) + pack.flush())
    frame = struct.pack("<2I", zlib.crc32(raw), len(raw) & 0xFFFFFFFF)
    return b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + stream + frame


def flags(draw: Draw, raw: bytes) -> bytes:
    """A gzip header with any flags, and then what they ask for, or not."""
    whole = gzip.compress(raw, mtime=0)
    extra = [b"", b"name\0", b"\xff\xff" + draw.bytes(50), draw.bytes(300), b"\x02\0ab"]
    return whole[:3] + bytes([draw.below(256)]) + whole[4:10] + draw.pick(extra) + whole[10:]


def bomb(draw: Draw, raw: bytes) -> bytes:
    """Megabytes of zeros packed: as voxels that the header claims, behind the voxels, or as an extension."""
    order = "<" if raw[0] == 0x5C else ">"
    out, where = bytearray(raw), draw.below(3)
    length = draw.pick([1 << 20, 8 << 20, 30 << 20, 90 << 20])
    if where == 0:
        struct.pack_into(order + "4h", out, 40, 3, 512, 512, length >> 18)
        struct.pack_into(order + "2h", out, 70, 2, 8)
    elif where == 1:
        struct.pack_into(order + "f", out, 108, 352.0 + length)
    return packed(bytes(out[:352]), length, bytes(out[352:]))


def packed(head: bytes, zeros: int, tail: bytes) -> bytes:
    """``head``, as many zeros, ``tail``: packed piece by piece, as no test should hold a bomb either."""
    out = io.BytesIO()
    with gzip.GzipFile(fileobj=out, mode="wb", compresslevel=9, mtime=0) as file:
        file.write(head)
        for start in range(0, zeros, 1 << 20):
            file.write(bytes(min(1 << 20, zeros - start)))
        file.write(tail)
    return out.getvalue()


PACKED = [members, trailer, checksum, nested, deflate, deflate, flags]
NIFTI += PACKED


# ---------------------------------------------------------------- MetaImage


def _lines(raw: bytes) -> tuple[list[bytes], bytes]:
    end = raw.index(b"LOCAL\n") + 6
    return raw[:end].splitlines(keepends=True), raw[end:]


def value(draw: Draw, raw: bytes) -> bytes:
    lines, data = _lines(raw)
    for _ in range(1 + draw.below(2)):
        at = draw.below(len(lines))
        name = lines[at].split(b"=")[0].split(b":")[0].strip()
        lines[at] = name + draw.pick([b" = ", b"=", b": "]) + draw.pick(MHA_VALUES).encode("latin-1") + b"\n"
    return b"".join(lines) + data


def lines(draw: Draw, raw: bytes) -> bytes:
    """Lines deleted, doubled, moved, or added: known names, blanks, very long ones."""
    parts, data = _lines(raw)
    new = [draw.pick(sorted(MHA_FIELDS)).encode() + b" = " + draw.pick(MHA_VALUES).encode("latin-1") + b"\n",
           b" " * draw.pick([1, 3000, 60_000]) + b"\n", b"K" + b" " * 60_000 + b"\n", b"=\n",
           b"K = a" + b" " * 60_000 + b"a\n",
           b"Comment = " + draw.bytes(200) + b"\n", b"K = 1\n" * 12_000, b"\n", b"\r\n", draw.bytes(100)]  # fmt: skip
    at, way = draw.below(len(parts)), draw.below(4)
    if way == 0:
        del parts[at]
    elif way == 1:
        parts.insert(draw.below(len(parts)), parts[at])
    elif way == 2:
        parts.insert(draw.below(len(parts)), parts.pop(at))
    else:
        parts.insert(at, draw.pick(new))
    return b"".join(parts) + data


def stream(draw: Draw, raw: bytes) -> bytes:
    """Voxels packed in a way that is not the header's: changed, longer, shorter, a bomb, twice, as gzip."""
    parts, data = _lines(raw)
    parts = [b"CompressedData = True\n" if part.startswith(b"CompressedData") else part for part in parts]
    plain = draw.bytes(draw.pick([0, 1, 107, 108, 109, 420]))
    ways = [flip(draw, zlib.compress(plain)), zlib.compress(plain), zlib.compress(zlib.compress(plain)),
            gzip.compress(plain), zlib.compress(bytes(1 << 20)), zlib.compress(plain) + draw.bytes(20),
            b"", data]  # fmt: skip
    return b"".join(parts) + draw.pick(ways)


MHA = [value, value, lines, lines, stream]
