"""The bounded NIfTI-1 reader and the writer, and what every reader of scans shares. Imports no torch.

Volumes are (X, Y, Z) float32 in RAS order in memory; the file's own grid is kept beside them, so
that writing hands back exactly what reading turned. Every failure is a PhmdiffError (exit 3) with
the file's name: NOT_A_FILE, UNREADABLE, NII_EMPTY, NII_FORMAT, NII_HEADER, NII_4D, NII_DTYPE,
NII_AFFINE, NII_TOO_BIG, NII_TRUNC, NII_CRC, NII_NONFINITE, NII_CONSTANT.
"""

from __future__ import annotations

import errno
import gzip
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation, ornt_transform
from nibabel.spatialimages import HeaderDataError
from nibabel.volumeutils import apply_read_scaling

from .errors import USAGE, PhmdiffError
from .files import refuse_existing, whole_file

HEADER_BYTES = 348
DATA_OFFSET = 352  # header and the four extension bytes
MAX_OFFSET = 64 << 20  # the largest block of extensions that is skipped
CHUNK = 1 << 20
DEFLATE_RATIO = 1032  # deflate never packs better than this
MAX_REST = 64 << 20  # unpacked bytes that may follow the voxels
SLACK = 1 << 20  # bytes by which a packed file may be larger than what it claims to hold
MAX_GIB = 1 << 20
LARGEST = 1e18  # voxels beyond count as Inf: sums and squares of such volumes leave float32
SIZEOF_HDR = {b"\x5c\x01\x00\x00": "<", b"\x00\x00\x01\x5c": ">"}  # the number 348 in either byte order
DTYPES = {2: "uint8", 4: "int16", 8: "int32", 16: "float32", 64: "float64",
          256: "int8", 512: "uint16", 768: "uint32", 1024: "int64", 1280: "uint64"}  # fmt: skip
GIVE_A_FILE = "give a .nii.gz, .nii or .mha file"
RAS = np.array([[0, 1], [1, 1], [2, 1]])


@dataclass(frozen=True, eq=False)
class Grid:
    """The grid of a file in its own voxel order: ``shape`` (3 sizes) and ``affine`` (4, 4) float64, voxel -> mm.

    The affine's entries are float32 numbers, so that a written header holds them exactly.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray


@dataclass(frozen=True, eq=False)
class Volume:
    """``voxels`` (X, Y, Z) float32 in RAS, their ``affine`` (4, 4) in mm, the file's own ``grid`` and ``path``;
    ``zeroed``: how many voxels were NaN or Inf and are 0 now."""

    voxels: np.ndarray
    affine: np.ndarray
    grid: Grid
    path: Path
    zeroed: int = 0


@dataclass(frozen=True, eq=False)
class Header:
    """What a file says of its voxels: they begin at byte ``offset``, in Fortran order, and mean slope * v + inter."""

    grid: Grid
    dtype: np.dtype
    offset: int
    slope: float | None
    inter: float | None

    @property
    def data_bytes(self) -> int:
        return int(np.prod(self.grid.shape, dtype=object)) * self.dtype.itemsize


def read_grid(path: str | Path) -> Grid:
    """The grid of a NIfTI file from its header alone; the voxels are neither read nor checked."""
    with opened(path) as (stream, _, _):
        return _read_header(stream, path).grid


def read_volume(path: str | Path, *, nan: str = "raise", allow_constant: bool = False, max_gib: float = 2.0) -> Volume:
    """Read one NIfTI-1 file (.nii or .nii.gz, told by content) to its end and turn it to RAS.

    nan : "raise" refuses NaN and Inf (NII_NONFINITE, count and first index in the file's own
        order); "zero" sets them to 0
    allow_constant : do not refuse a volume whose voxels are all equal
    max_gib : the largest volume that is read, counted as float32

    Raises PhmdiffError (exit 3) with one of the codes above; memory is taken only after the size
    the header claims has passed ``max_gib`` and what the file's own size can hold.
    """
    with opened(path) as (stream, size, zipped):
        header, cap = _read_header(stream, path), cap_bytes(max_gib)
        check_size(header, size, zipped, cap, path)
        skip, piece = header.offset - HEADER_BYTES, bytearray(CHUNK)
        while skip and (skipped := fill(stream, memoryview(piece)[: min(skip, CHUNK)], path)[0]):
            skip -= skipped
        data = bytearray(header.data_bytes)
        had = fill(stream, data, path)[0] if not skip else 0
        if had < len(data):
            raise bad(path, "NII_TRUNC", f"holds {had} of the {len(data)} voxel bytes its header promises",
                       "copy or download it again")  # fmt: skip
        if zipped:
            _finish_gzip(stream, min(cap, MAX_REST), path)
    return volume_of(header, data, path, nan=nan, allow_constant=allow_constant)


def volume_of(header: Header, data: bytearray, path, *, nan: str, allow_constant: bool) -> Volume:
    """The voxel bytes of a file, checked and turned to RAS. Raises NII_NONFINITE, NII_CONSTANT; ``nan`` as above."""
    raw = np.frombuffer(data, header.dtype).reshape(header.grid.shape, order="F")
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is found as non-finite below
        voxels = apply_read_scaling(raw, header.slope, header.inter).astype(np.float32, copy=False)
    return _turned(voxels, header.grid, path, nan, allow_constant)


def image_volume(
    image, name: str, *, nan: str = "raise", allow_constant: bool = False, max_gib: float = 2.0
) -> Volume:  # fmt: skip
    """A nibabel image in memory as ``read_volume`` gives a file; ``name`` stands for it in errors.

    Raises PhmdiffError (exit 3): NII_4D, NII_AFFINE, NII_TOO_BIG, NII_NONFINITE, NII_CONSTANT.
    """
    shape = tuple(int(size) for size in image.shape)
    if len(shape) != 3:
        raise bad(name, "NII_4D", f"has {len(shape)} dimensions {shape}", "give one 3D volume")
    affine = np.eye(4) if image.affine is None else np.asarray(image.affine, np.float32).astype(np.float64)
    check_affine(affine, np.linalg.norm(affine[:3, :3], axis=0), name)
    check_cap(shape, cap_bytes(max_gib), name)  # its voxels may still lie in a file
    with np.errstate(over="ignore", invalid="ignore"):
        voxels = np.asarray(image.dataobj).astype(np.float32)
    return _turned(voxels, Grid(shape, affine), name, nan, allow_constant)


def _turned(voxels: np.ndarray, grid: Grid, path, nan: str, allow_constant: bool) -> Volume:
    """Voxels in the order of ``grid``, checked and turned to RAS."""
    voxels, zeroed = _check_voxels(voxels, nan, allow_constant, path)
    turn = io_orientation(grid.affine)
    turned = np.ascontiguousarray(apply_orientation(voxels, turn))
    return Volume(turned, grid.affine @ inv_ornt_aff(turn, grid.shape), grid, Path(path), zeroed)


def to_image(voxels_ras: np.ndarray, grid: Grid, *, descrip: str = "SYNTHETIC phmdiff-fast") -> nib.Nifti1Image:
    """A RAS array (X, Y, Z) as a float32 nibabel image on ``grid``, with the header ``write_volume`` writes."""
    voxels = to_original(voxels_ras, grid).astype(np.float32)
    return nib.Nifti1Image(voxels, grid.affine, _fresh_header(grid, descrip))


def to_original(voxels_ras: np.ndarray, grid: Grid) -> np.ndarray:
    """A RAS array (X, Y, Z) in the voxel order of the file that ``grid`` came from.

    Raises ValueError if its shape does not belong to the grid.
    """
    out = apply_orientation(voxels_ras, ornt_transform(RAS, io_orientation(grid.affine)))
    if out.shape != tuple(grid.shape):
        raise ValueError(f"voxels {voxels_ras.shape} in RAS become {out.shape}, the grid is {tuple(grid.shape)}")
    return np.ascontiguousarray(out)


def write_volume(
    path: str | Path,
    voxels_ras: np.ndarray,
    grid: Grid,
    *,
    descrip: str = "SYNTHETIC phmdiff-fast",
    overwrite: bool = False,
) -> Path:
    """Write a RAS array (X, Y, Z) as float32 NIfTI-1 on ``grid``, in the grid's voxel order.

    The header is a fresh one (sform and qform from the grid, mm, ``descrip``): no text of an input
    gets into it. The file appears complete or not at all (temporary file, fsync, rename).

    Raises PhmdiffError: OUTPUT_EXISTS (exit 2) unless ``overwrite``; OUTPUT_NAME (exit 2) if the
    name ends in neither .nii nor .nii.gz; OUTPUT_WRITE (exit 74) if the disk refuses.
    """
    path = Path(path)
    if not path.name.endswith((".nii", ".nii.gz")):
        raise PhmdiffError("OUTPUT_NAME", "an output ends in .nii or .nii.gz", "rename it", exit_code=USAGE, file=path)
    refuse_existing(path, overwrite)
    header = _fresh_header(grid, descrip).binaryblock + bytes(DATA_OFFSET - HEADER_BYTES)
    data = to_original(voxels_ras, grid).astype("<f4").tobytes(order="F")
    with whole_file(path) as file:
        if path.name.endswith(".gz"):
            # No name and no time in the gzip header: the same voxels give the same bytes.
            with gzip.GzipFile(filename="", mode="wb", fileobj=file, compresslevel=4, mtime=0) as packed:
                packed.write(header + data)
        else:
            file.write(header + data)
    return path


def bad(path, code: str, what: str, cure: str) -> PhmdiffError:
    """The error of a file."""
    return PhmdiffError(code, what, cure, file=path)


@contextmanager
def opened(path) -> Iterator[tuple]:
    """(stream of decoded bytes, size of the file in bytes, whether it is gzip). Raises NOT_A_FILE, UNREADABLE."""
    handle = None
    try:
        # Looked at before it is opened: opening a device can do things. O_NONBLOCK all the same, as it may
        # have changed in between, and opening a FIFO without a writer would wait for ever.
        if stat.S_ISREG(os.stat(path).st_mode):
            handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except (OSError, ValueError) as problem:  # ValueError: a zero byte in the name
        problem = problem if isinstance(problem, OSError) else OSError(errno.EINVAL, str(problem))
        if problem.errno in (errno.ELOOP, errno.ENXIO):  # a loop of links; a socket
            raise bad(path, "NOT_A_FILE", f"is no regular file ({problem.strerror})", GIVE_A_FILE) from None
        raise bad(path, "UNREADABLE", f"cannot be read ({problem.strerror})", "check path and permissions") from None
    if handle is None or not stat.S_ISREG(os.fstat(handle).st_mode):
        if handle is not None:
            os.close(handle)
        raise bad(path, "NOT_A_FILE", "is no regular file (folder, pipe or device)", GIVE_A_FILE)
    with os.fdopen(handle, "rb") as file:
        size = os.fstat(handle).st_size
        zipped = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        yield (gzip.GzipFile(fileobj=file) if zipped else file), size, zipped


@contextmanager
def decoding(path):
    """What goes wrong while bytes are read and decoded, as a PhmdiffError; EOFError passes."""
    try:
        yield
    except (gzip.BadGzipFile, zlib.error) as problem:
        raise bad_packing(path, problem) from None
    except OSError as problem:
        raise bad(path, "UNREADABLE", f"cannot be read ({problem.strerror})", "check the disk") from None


def fill(stream, buffer: bytearray | memoryview, path) -> tuple[int, bool]:
    """Read until ``buffer`` is full or the data end; the bytes read, and whether a gzip stream broke off."""
    view, done = memoryview(buffer), 0
    with decoding(path):
        while done < len(view):
            try:
                # readinto1, as readinto would drop what was decoded before a gzip stream breaks off
                count = stream.readinto1(view[done : done + CHUNK])
            except EOFError:
                return done, True
            if not count:
                break
            done += count
    return done, False


def _finish_gzip(stream, most: int, path) -> None:
    """Decode what is left: only then has gzip compared its checksum."""
    rest = 0
    with decoding(path):
        try:
            while count := len(stream.read1(CHUNK)):
                rest += count
                if rest > most:
                    raise bad(path, "NII_TOO_BIG", f"more than {most} bytes follow the voxels", "write it anew")
        except EOFError:
            raise bad_packing(path, "the gzip stream has no end") from None


def bad_packing(path, problem) -> PhmdiffError:
    return bad(path, "NII_CRC", f"its compressed data are damaged ({problem})", "copy or download it again")


def _read_header(stream, path) -> Header:
    block = bytearray(HEADER_BYTES)
    had, broken = fill(stream, block, path)
    start = bytes(block[: min(had, 4)])
    if had == 0 and not broken:
        raise bad(path, "NII_EMPTY", "is empty", "copy or download it again")
    if not any(number.startswith(start) for number in SIZEOF_HDR):
        raise bad(path, "NII_FORMAT", f"is no NIfTI-1 file (it begins with {start!r})", "convert it to .nii.gz")
    if had < HEADER_BYTES:
        raise bad(path, "NII_TRUNC", f"has {had} of the {HEADER_BYTES} bytes of a header",
                   "copy or download it again")  # fmt: skip
    magic = bytes(block[344:348])
    if magic != b"n+1\0":
        raise bad(path, "NII_FORMAT", f"is no single-file NIfTI-1 (magic {magic!r})", "convert it to .nii.gz")
    header = nib.Nifti1Header(bytes(block), endianness=SIZEOF_HDR[start], check=False)
    shape = _shape(header, path)
    code = int(header["datatype"])
    if code not in DTYPES:
        raise bad(path, "NII_DTYPE", f"has voxels of NIfTI type {code}",
                   "convert them to one of " + ", ".join(DTYPES.values()))  # fmt: skip
    offset = float(header["vox_offset"])
    if not DATA_OFFSET <= offset <= MAX_OFFSET or offset != int(offset):  # NaN fails the comparison too
        raise bad_field(path, "vox_offset", offset)
    try:
        slope, inter = header.get_slope_inter()
    except HeaderDataError:
        raise bad_field(path, "scl_inter", float(header["scl_inter"])) from None
    unit = int(header["xyzt_units"]) & 7
    if unit not in (0, 2):  # unknown is taken for mm
        raise bad_field(path, "xyzt_units", f"{unit} (not mm)")
    return Header(Grid(shape, _affine(header, path)), header.get_data_dtype(), int(offset), slope, inter)


def bad_field(path, field: str, value) -> PhmdiffError:
    return bad(path, "NII_HEADER", f"the header is wrong: field={field} value={value}", "write the file anew")


def _shape(header, path) -> tuple[int, int, int]:
    dim = [int(size) for size in header["dim"]]
    if not 3 <= dim[0] <= 7:
        raise bad_field(path, "dim[0]", dim[0])
    for axis in range(1, dim[0] + 1):
        if dim[axis] <= 0:
            raise bad_field(path, f"dim[{axis}]", dim[axis])
    if any(size > 1 for size in dim[4 : dim[0] + 1]):
        raise bad(path, "NII_4D", f"has {dim[0]} dimensions {tuple(dim[1 : dim[0] + 1])}", "give one 3D volume a file")
    return dim[1], dim[2], dim[3]


def _affine(header, path) -> np.ndarray:
    """The header's voxel -> mm matrix, rounded to float32 (a quaternion's is no float32 number by itself)."""
    spacing = header["pixdim"][1:4]
    try:
        with np.errstate(all="ignore"):  # a signalling NaN; what is not finite is found below
            affine = header.get_best_affine().astype(np.float32).astype(np.float64)
    except (HeaderDataError, ValueError) as problem:  # a quaternion that is none
        raise bad(path, "NII_AFFINE", f"has no usable orientation ({problem})", "write its header anew") from None
    check_affine(affine, spacing, path)
    return affine


def check_affine(affine: np.ndarray, spacing: np.ndarray, path) -> None:
    """Raise NII_AFFINE unless (4, 4) is finite and can be inverted and the voxel sizes (3,) are positive."""
    if not np.isfinite(affine).all():
        raise bad(path, "NII_AFFINE", "has NaN or Inf in its affine", "write its header anew")
    if not (np.isfinite(spacing).all() and (spacing > 0).all()):
        raise bad(path, "NII_AFFINE", f"has the voxel size {spacing.tolist()}", "write its header anew")
    length = np.linalg.norm(affine[:3, :3], axis=0)
    if not (length > 0).all() or abs(np.linalg.det(affine[:3, :3] / length)) < 1e-4:
        rows = [[float(f"{value:.4g}") for value in row] for row in affine[:3]]
        raise bad(path, "NII_AFFINE", f"has a singular affine {rows}", "write its header anew")


def check_size(header: Header, size: int, zipped: bool, cap: int, path) -> None:
    """Compare what the header claims with the cap and the file's own size, before memory is taken."""
    needed = header.data_bytes
    check_cap(header.grid.shape, cap, path)
    if zipped and needed > DEFLATE_RATIO * size:
        raise bad(path, "NII_TOO_BIG", f"claims {needed} voxel bytes, more than {size} compressed bytes can hold",
                   "copy or download it again")  # fmt: skip
    # Packing makes nothing much larger; what lies behind the voxels is unpacked too, piece by tiny piece.
    if zipped and size > (header.offset + needed) * 9 // 8 + SLACK:
        raise bad(path, "NII_TOO_BIG", f"has {size} bytes packed, and claims only {needed} voxel bytes",
                   "write it anew")  # fmt: skip
    if not zipped and header.offset + needed > size:
        raise bad(path, "NII_TRUNC", f"has {size} of the {header.offset + needed} bytes its header promises",
                   "copy or download it again")  # fmt: skip


def cap_bytes(max_gib: float) -> int:
    """The bytes of ``max_gib``; more than any machine has counts as MAX_GIB."""
    return int(min(max_gib, MAX_GIB) * 2**30)


def check_cap(shape: tuple[int, ...], cap: int, path) -> None:
    """Raise NII_TOO_BIG if a volume of this shape takes more than ``cap`` bytes as float32."""
    needed = 4 * int(np.prod(shape, dtype=object))
    if needed > cap:
        raise bad(path, "NII_TOO_BIG", f"claims {shape}, {needed} bytes as float32, above {cap}",
                  "crop it, resample it, or raise --max-volume-gib")  # fmt: skip


def _check_voxels(voxels: np.ndarray, nan: str, allow_constant: bool, path) -> tuple[np.ndarray, int]:
    """The voxels, and how many of them were set to 0."""
    if nan not in ("raise", "zero"):
        raise ValueError(f"nan must be 'raise' or 'zero', not {nan!r}")
    with np.errstate(invalid="ignore"):
        finite, zeroed = voxels <= LARGEST, 0
        finite &= voxels >= -LARGEST
    if not finite.all():
        zeroed = int((~finite).sum())
        if nan == "raise":
            first = tuple(int(i) for i in np.unravel_index(np.argmin(finite), voxels.shape))
            kind = f"beyond {LARGEST:g}" if np.isfinite(voxels[first]) else "NaN or Inf"
            raise bad(path, "NII_NONFINITE", f"has {zeroed} {kind} voxels, the first at {first}",
                      "set them to 0 (--nan zero does), or leave the subject out")  # fmt: skip
        voxels = np.where(finite, voxels, np.float32(0))
    if not allow_constant and voxels.min() == voxels.max():
        raise bad(path, "NII_CONSTANT", f"has the value {voxels.flat[0]:g} in every voxel", "leave this scan out")
    return voxels, zeroed


def _fresh_header(grid: Grid, descrip: str) -> nib.Nifti1Header:
    header = nib.Nifti1Header(endianness="<")
    header.set_data_dtype(np.float32)
    header.set_data_shape(grid.shape)
    header.set_xyzt_units("mm")
    header.set_slope_inter(1.0, 0.0)
    header["vox_offset"] = DATA_OFFSET
    header["descrip"] = descrip.encode("ascii", "replace")
    header.set_qform(grid.affine, code=1)  # also sets the voxel sizes
    # A quaternion cannot say shears: then only the sform is marked as valid.
    reach = np.abs(header.get_qform() - grid.affine) @ np.array([*grid.shape, 1.0])
    if reach.max() > 1e-2:
        header.set_qform(None, code=0)
    header.set_sform(grid.affine, code=1)
    return header
