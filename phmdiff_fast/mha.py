"""The bounded MetaImage (.mha) reader, and the one door to both readers, ``read_scan``. Imports no torch.

The header is text that names the fields below; ITK puts millimetres on L-P-S axes, turned to R-A-S
here. Voxels follow the header, raw or as one zlib stream. The reader is our own because ITK's (5.4,
through SimpleITK 2.5) cannot be bounded from outside: a header with ``NDims = 99`` or a long ``Name``
ends the whole process, damaged compressed voxels come back as zeros without a word, and an
``ElementDataFile`` makes it read any other file. SimpleITK is the oracle of the tests instead.

Every failure is a PhmdiffError (exit 3) with the codes of ``nifti.py``.
"""

from __future__ import annotations

import re
import zlib
from pathlib import Path

import numpy as np

from .nifti import (
    CHUNK,
    Grid,
    Header,
    Volume,
    bad,
    bad_field,
    bad_packing,
    cap_bytes,
    check_affine,
    check_size,
    decoding,
    fill,
    opened,
    read_grid,
    read_volume,
    volume_of,
)

MAX_HEADER = 1 << 16  # bytes of text
SEPARATOR = re.compile("[=:]")  # of a line's name and value
# MetaIO's names; its long has 4 bytes on every machine.
DTYPES = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4", "MET_UINT": "u4",
    "MET_LONG": "i4", "MET_ULONG": "u4", "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}  # fmt: skip
# The names of one field, first that which ITK writes.
SPACING = ("ElementSpacing", "ElementSize")
DIRECTION = ("TransformMatrix", "Rotation", "Orientation")
ORIGIN = ("Offset", "Position", "Origin")
BIG_ENDIAN = ("BinaryDataByteOrderMSB", "ElementByteOrderMSB")
FIELDS = {
    "ObjectType", "NDims", "DimSize", "ElementType", "ElementNumberOfChannels", "BinaryData", "CompressedData",
    "CompressedDataSize", "HeaderSize", "ElementDataFile", *SPACING, *DIRECTION, *ORIGIN, *BIG_ENDIAN,
}  # fmt: skip


def read_scan(path: str | Path, *, nan: str = "raise", allow_constant: bool = False, max_gib: float = 2.0) -> Volume:
    """Read a scan: MetaImage where the name ends in .mha, else NIfTI. Arguments and errors as ``read_volume``."""
    read = read_mha if _is_mha(path) else read_volume
    return read(path, nan=nan, allow_constant=allow_constant, max_gib=max_gib)


def read_scan_grid(path: str | Path) -> Grid:
    """The grid of a scan from its header alone; the voxels are neither read nor checked."""
    return read_mha_grid(path) if _is_mha(path) else read_grid(path)


def _is_mha(path) -> bool:
    return Path(path).suffix.lower() == ".mha"


def read_mha_grid(path: str | Path) -> Grid:
    """The grid of a .mha file, affine in RAS mm, from its header alone."""
    with opened(path) as (stream, _, zipped):
        return _read_header(stream, zipped, path)[0].grid


def read_mha(path: str | Path, *, nan: str = "raise", allow_constant: bool = False, max_gib: float = 2.0) -> Volume:
    """Read one .mha file and turn it to RAS. Arguments, errors and bounds as ``nifti.read_volume``.

    One file with one value a voxel and its voxels inside (``ElementDataFile = LOCAL``, binary) is
    read; anything else is refused with the field's name (NII_HEADER, NII_4D, NII_DTYPE).
    """
    with opened(path) as (stream, size, zipped):
        header, packed = _read_header(stream, zipped, path)
        check_size(header, size, packed, cap_bytes(max_gib), path)
        data = bytearray(header.data_bytes)
        had = _inflate(stream, data, path) if packed else fill(stream, data, path)[0]
        if had < len(data):
            raise bad(path, "NII_TRUNC", f"holds {had} of the {len(data)} voxel bytes its header promises",
                      "copy or download it again")  # fmt: skip
    return volume_of(header, data, path, nan=nan, allow_constant=allow_constant)


def _inflate(stream, buffer: bytearray, path) -> int:
    """Unpack one zlib or gzip stream to its end, where its checksum lies; the bytes had, at most the buffer's."""
    unpack, view, done = zlib.decompressobj(wbits=47), memoryview(buffer), 0
    with decoding(path):
        while not unpack.eof:
            packed = unpack.unconsumed_tail or stream.read(CHUNK)
            if not packed:
                raise bad_packing(path, "the stream has no end")
            part = unpack.decompress(packed, min(CHUNK, len(view) - done) + 1)
            if done + len(part) > len(view):
                raise bad_packing(path, f"it holds more than the {len(view)} voxel bytes its header promises")
            view[done : done + len(part)] = part
            done += len(part)
    return done


def _read_header(stream, zipped: bool, path) -> tuple[Header, bool]:
    """What the header says, and whether the voxels are packed; the stream then stands at their first byte."""
    if zipped:
        raise bad(path, "NII_FORMAT", "is gzip, no MetaImage", "unpack it, or name it .nii.gz if it is one")
    fields, offset = _fields(stream, path)

    def flag(names: tuple[str, ...]) -> bool:
        _, text = _one_of(fields, names, "False", path)
        return text[:1] in ("T", "t", "1")

    if fields.get("ObjectType", "Image") != "Image":
        raise bad_field(path, "ObjectType", ascii(fields["ObjectType"][:40]))
    if fields["ElementDataFile"].upper() != "LOCAL":
        # The header must not make us open another file.
        raise bad(path, "NII_HEADER", f"keeps its voxels in another file, {fields['ElementDataFile'][:40]!a}",
                  "write it as one .mha file")  # fmt: skip
    sides = _numbers(fields, "DimSize", None, None, int, path)
    if _numbers(fields, "NDims", 1, None, int, path) != [3]:
        raise bad(path, "NII_4D", f"has {fields['NDims'][:20]!a} dimensions", "give one 3D volume a file")
    if len(sides) != 3 or min(sides) <= 0 or max(sides) >= 2**31:
        raise bad_field(path, "DimSize", ascii(fields["DimSize"][:40]))
    kind = fields.get("ElementType", "")
    if kind not in DTYPES or _numbers(fields, "ElementNumberOfChannels", 1, [1], int, path) != [1]:
        what = f"has voxels of type {kind[:40]!a} x {fields.get('ElementNumberOfChannels', '1')[:20]!a}"
        raise bad(path, "NII_DTYPE", what, "convert them to one of " + ", ".join(DTYPES))
    if not flag(("BinaryData",)):
        raise bad_field(path, "BinaryData", ascii(fields.get("BinaryData", "")[:20]))
    if _numbers(fields, "HeaderSize", 1, [0], int, path) != [0]:
        raise bad_field(path, "HeaderSize", ascii(fields["HeaderSize"][:20]))
    dtype = np.dtype((">" if flag(BIG_ENDIAN) else "<") + DTYPES[kind])
    return Header(Grid(tuple(sides), _affine(fields, path)), dtype, offset, None, None), flag(("CompressedData",))


def _fields(stream, path) -> tuple[dict[str, str], int]:
    """The header's known fields, up to ElementDataFile, which ends it; and its length in bytes."""
    fields: dict[str, str] = {}
    length = 0
    while "ElementDataFile" not in fields:
        with decoding(path):
            raw = stream.readline(MAX_HEADER - length + 1)
        if not raw and length == 0:
            raise bad(path, "NII_EMPTY", "is empty", "copy or download it again")
        length += len(raw)
        # One expression for the whole line would take hours over a line of blanks.
        found = SEPARATOR.search(line := raw.decode("latin-1"))
        name = line[: found.start()].strip() if found else ""
        if not name and length == len(raw):
            raise bad(path, "NII_FORMAT", f"is no MetaImage (it begins with {raw[:4]!r})", "convert it to .nii.gz")
        if not raw.endswith(b"\n") and length <= MAX_HEADER:
            raise bad(path, "NII_TRUNC", "ends within its header", "copy or download it again")
        if not name or length > MAX_HEADER:
            raise bad(path, "NII_HEADER", f"has no header line at byte {length - len(raw)}, before its voxels begin",
                      "write the file anew")  # fmt: skip
        if name in fields:
            raise bad_field(path, name, "given twice")
        if name in FIELDS:
            fields[name] = line[found.end() :].strip()
    return fields, length


def _one_of(fields: dict[str, str], names: tuple[str, ...], default: str, path) -> tuple[str, str]:
    """(name, text) of a field that goes by several names; two of them at once would contradict each other."""
    given = [name for name in names if name in fields]
    if len({fields[name] for name in given}) > 1:
        raise bad_field(path, given[0], f"contradicted by {given[1]}")
    return (given[0], fields[given[0]]) if given else (names[0], default)


def _numbers(fields: dict[str, str], name: str, count: int | None, default, kind, path) -> list:
    """The numbers of a field, ``count`` of them where that is given; ``default`` where the field is absent."""
    text = fields.get(name)
    if text is None and default is not None:
        return default
    try:
        numbers = [kind(word) for word in (text or "").split()]
    except ValueError:
        numbers = []
    if not numbers or (count is not None and len(numbers) != count):
        raise bad_field(path, name, "missing" if text is None else ascii(text[:40]))
    return numbers


def _affine(fields: dict[str, str], path) -> np.ndarray:
    """Voxel -> RAS mm, rounded to float32 as ``nifti`` does, so that a written header holds it exactly."""
    found = []
    for names, default, count in ((SPACING, [1.0] * 3, 3), (DIRECTION, list(np.eye(3).ravel()), 9),
                                  (ORIGIN, [0.0] * 3, 3)):  # fmt: skip
        name, _ = _one_of(fields, names, "", path)
        found.append(np.array(_numbers(fields, name, count, default, float, path)))
    spacing, direction, origin = found
    affine = np.eye(4)
    with np.errstate(over="ignore", invalid="ignore"):  # found as not finite below
        affine[:3, :3] = direction.reshape(3, 3).T * spacing  # row i of the file is where axis i points
        affine[:3, 3] = origin
        affine[:2] *= -1  # L-P-S -> R-A-S
        affine = affine.astype(np.float32).astype(np.float64)
    check_affine(affine, spacing, path)
    return affine
