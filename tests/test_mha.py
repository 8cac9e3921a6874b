"""The MetaImage reader against SimpleITK, which writes the inputs, and against hostile files."""

import os
import re
import signal
import time
import tracemalloc
import zlib

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phmdiff_fast.errors import PhmdiffError
from phmdiff_fast.mha import DTYPES, read_mha, read_mha_grid, read_scan, read_scan_grid
from phmdiff_fast.nifti import read_volume, write_volume

HEADER = (
    "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\nCompressedData = {packed}\n"
    "TransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = 1 2 3\nCenterOfRotation = 0 0 0\nAnatomicalOrientation = RAI\n"
    "ElementSpacing = 1.5 1.25 2\nDimSize = 5 6 7\nElementType = MET_SHORT\nElementDataFile = LOCAL\n"
)
VOXELS = np.random.default_rng(0).integers(-1000, 1000, (5, 6, 7)).astype("<i2")


def write(path, *changes, packed=False, header=None, data=None):
    """VOXELS below HEADER, in which each pair of ``changes`` is replaced."""
    text = (header or HEADER).format(packed=packed)
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    raw = VOXELS.tobytes(order="F") if data is None else data
    path.write_bytes(text.encode("latin-1") + (zlib.compress(raw) if packed else raw))
    return path


def refused(path, read=read_mha, **how):
    with pytest.raises(PhmdiffError) as caught:
        read(path, **how)
    assert caught.value.exit_code == 3
    assert caught.value.file == str(path)
    assert "\n" not in caught.value.line()
    assert len(caught.value.line()) < 400 + len(str(path))
    return caught.value


# ---------------------------------------------------------------- what it holds


@pytest.mark.parametrize("packed", [False, True])
def test_voxels_and_affine_by_hand(tmp_path, packed):
    volume = read_mha(write(tmp_path / "a.mha", packed=packed))
    # Millimetres on L-P-S axes: in R-A-S the first two axes run backwards, from -1 and -2 down.
    assert np.array_equal(volume.grid.affine, [[-1.5, 0, 0, -1], [0, -1.25, 0, -2], [0, 0, 2, 3], [0, 0, 0, 1]])
    assert volume.grid.shape == (5, 6, 7)
    assert np.array_equal(volume.voxels, VOXELS[::-1, ::-1])
    assert volume.voxels.dtype == np.float32
    assert np.array_equal(volume.affine, [[1.5, 0, 0, -7], [0, 1.25, 0, -8.25], [0, 0, 2, 3], [0, 0, 0, 1]])
    assert np.array_equal(read_mha_grid(tmp_path / "a.mha").affine, volume.grid.affine)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 7)] * 3),
    angles=st.tuples(*[st.floats(-3.2, 3.2)] * 3),
    spacing=st.tuples(*[st.floats(0.1, 8)] * 3),
    flip=st.booleans(),
    packed=st.booleans(),
)
def test_the_same_as_simple_itk_and_as_its_nifti(tmp_path_factory, shape, angles, spacing, flip, packed):
    sitk = pytest.importorskip("SimpleITK")
    folder = tmp_path_factory.getbasetemp()
    image = sitk.GetImageFromArray(np.random.default_rng(1).normal(size=shape[::-1]).astype(np.float32))
    turn = nib.eulerangles.euler2mat(*angles) @ np.diag([1, 1, -1 if flip else 1])
    image.SetDirection(turn.ravel().tolist())
    image.SetSpacing(spacing)
    image.SetOrigin((5.5, -3.25, 100.1))
    for name in ("a.mha", "a.nii"):
        sitk.WriteImage(image, str(folder / name), packed)
    one, two = (read_scan(folder / name, allow_constant=True) for name in ("a.mha", "a.nii"))
    assert one.grid.shape == two.grid.shape == shape
    np.testing.assert_allclose(one.grid.affine, two.grid.affine, atol=2e-4)
    corner = np.array(shape) - 1
    place = np.array(image.TransformIndexToPhysicalPoint(corner.tolist())) * [-1, -1, 1]
    np.testing.assert_allclose((one.grid.affine @ [*corner, 1])[:3], place, atol=1e-4)
    # At 45 degrees the axis codes are a tie, which rounding may break either way.
    if np.array_equal(nib.io_orientation(one.grid.affine), nib.io_orientation(two.grid.affine)):
        assert np.array_equal(one.voxels, two.voxels)
    back = write_volume(folder / "back.nii", one.voxels, one.grid, overwrite=True)
    assert np.array_equal(nib.load(back).get_fdata().astype(np.float32), sitk.GetArrayFromImage(image).T)
    assert np.array_equal(nib.load(back).affine, one.grid.affine)


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("big", [False, True])
def test_every_type_in_both_byte_orders_as_simple_itk(tmp_path, kind, big):
    values = VOXELS.astype("i4").clip(-100, 100) if DTYPES[kind][0] != "u" else VOXELS.astype("i4").clip(0, 100)
    data = values.astype((">" if big else "<") + DTYPES[kind]).tobytes(order="F")
    path = write(tmp_path / "a.mha", ("MET_SHORT", kind), ("MSB = False", f"MSB = {big}"), data=data)
    assert np.array_equal(read_mha(path).voxels[::-1, ::-1], values)
    sitk = pytest.importorskip("SimpleITK")
    assert np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(path))).T, values)


def test_other_names_of_the_fields_and_lines_that_are_not_ours(tmp_path):
    plain = read_mha(write(tmp_path / "a.mha"))
    other = write(
        tmp_path / "b.mha", ("Offset", "Position"), ("TransformMatrix", "Rotation"), ("ElementSpacing", "ElementSize"),
        ("DimSize", "0008|0060 = CT: a = b\nComment = " + "x" * 5000 + "\nDimSize"), ("\n", "\r\n"), ("LOCAL", "Local"),
        ("NDims = 3", "NDims=3"),
    )  # fmt: skip
    volume = read_mha(other)
    assert np.array_equal(volume.voxels, plain.voxels)
    assert np.array_equal(volume.affine, plain.affine)
    short = "NDims = 3\nDimSize = 5 6 7\nBinaryData = True\nElementType = MET_SHORT\nElementDataFile = LOCAL\n"
    assert np.array_equal(read_mha(write(tmp_path / "c.mha", header=short)).grid.affine, np.diag([-1, -1, 1, 1]))


def test_voxels_longer_than_a_piece(tmp_path):
    shape = (130, 110, 100)  # more than a megabyte, and packed far below it
    voxels = np.zeros(shape, "<i2")
    voxels[60:70, 50:60, 40:50] = np.random.default_rng(0).integers(0, 99, (10, 10, 10))
    path = write(tmp_path / "a.mha", ("5 6 7", "130 110 100"), packed=True, data=voxels.tobytes(order="F"))
    assert np.array_equal(read_mha(path).voxels, voxels[::-1, ::-1])


def test_the_reader_is_picked_by_the_name(tmp_path):
    mha = read_scan(write(tmp_path / "a.MHA"))
    write_volume(tmp_path / "a.nii.gz", mha.voxels, mha.grid)
    nifti = read_scan(tmp_path / "a.nii.gz")
    assert np.array_equal(nifti.voxels, mha.voxels)
    assert np.array_equal(nifti.affine, mha.affine)
    assert np.array_equal(read_scan_grid(tmp_path / "a.nii.gz").affine, read_scan_grid(tmp_path / "a.MHA").affine)
    assert refused(tmp_path / "a.MHA", read=read_volume).code == "NII_FORMAT"
    os.rename(tmp_path / "a.nii.gz", tmp_path / "b.mha")
    assert refused(tmp_path / "b.mha").code == "NII_FORMAT"


# ---------------------------------------------------------------- hostile files

FAULTS = [
    ("NII_HEADER", "/etc/passwd", ("LOCAL", "/etc/passwd")),
    ("NII_HEADER", "voxels.raw", ("LOCAL", "voxels.raw")),
    ("NII_HEADER", "LIST", ("LOCAL", "LIST")),
    ("NII_TOO_BIG", "claims", ("5 6 7", "500000 600000 700000")),
    ("NII_HEADER", "DimSize", ("5 6 7", "5 6 " + "9" * 60)),
    ("NII_HEADER", "DimSize", ("5 6 7", "5 6 " + "9" * 5000)),
    ("NII_HEADER", "DimSize", ("5 6 7", "5 -6 7")),
    ("NII_HEADER", "DimSize", ("5 6 7", "5 0 7")),
    ("NII_HEADER", "DimSize", ("5 6 7", "5 6")),
    ("NII_HEADER", "DimSize", ("5 6 7", "5 6 x")),
    ("NII_HEADER", "missing", ("DimSize", "DimSizes")),
    ("NII_HEADER", "missing", ("NDims", "Dims")),
    ("NII_4D", "'4'", ("NDims = 3", "NDims = 4")),
    ("NII_4D", "'99'", ("NDims = 3", "NDims = 99")),  # ends ITK's process
    ("NII_4D", "'2'", ("NDims = 3", "NDims = 2")),
    ("NII_DTYPE", "MET_FOO", ("MET_SHORT", "MET_FOO")),
    ("NII_DTYPE", "'3'", ("DimSize", "ElementNumberOfChannels = 3\nDimSize")),
    ("NII_HEADER", "BinaryData", ("BinaryData = True", "BinaryData = False")),
    ("NII_HEADER", "HeaderSize", ("DimSize", "HeaderSize = -1\nDimSize")),
    ("NII_HEADER", "ObjectType", ("= Image", "= Tube")),
    ("NII_HEADER", "twice", ("DimSize", "DimSize = 5 6 6\nDimSize")),
    ("NII_HEADER", "contradicted", ("Offset", "Origin = 0 0 0\nOffset")),
    ("NII_HEADER", "Offset", ("1 2 3", "1 2")),
    ("NII_AFFINE", "NaN or Inf", ("1 2 3", "1 nan 3")),
    ("NII_AFFINE", "NaN or Inf", ("1 2 3", "1 1e99 3")),
    ("NII_AFFINE", "voxel size", ("1.5 1.25", "0 1.25")),
    ("NII_AFFINE", "voxel size", ("1.5 1.25", "-1.5 1.25")),
    ("NII_AFFINE", "singular", ("1 0 0 0 1 0 0 0 1", "1 0 0 1 0 0 0 0 1")),
    ("NII_HEADER", "no header line", ("DimSize", "x\nDimSize")),
    ("NII_HEADER", "no header line", ("DimSize", "K" * 70000 + " = 1\nDimSize")),
    ("NII_FORMAT", "is no MetaImage", ("ObjectType = Image\n", "hello world\n")),
]


@pytest.mark.parametrize(("code", "told", "change"), FAULTS, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("packed", [False, True])
def test_header_faults(tmp_path, code, told, change, packed):
    problem = refused(write(tmp_path / "a.mha", change, packed=packed))
    assert (problem.code, told in problem.what) == (code, True), problem.line()
    if code != "NII_TOO_BIG":  # that is a matter of the voxels, which this does not read
        assert refused(tmp_path / "a.mha", read=read_mha_grid).code == code


@pytest.mark.parametrize(
    ("code", "content"),
    [
        ("NII_EMPTY", b""),
        ("NII_FORMAT", b"\0" * 500),
        ("NII_FORMAT", b"\x1f\x8b" + b"\0" * 500),
        ("NII_FORMAT", b"a" * 200_000),
        ("NII_TRUNC", b"ObjectType = Image\nNDims = 3\n"),
        ("NII_TRUNC", b"ObjectType = Ima"),
        ("NII_HEADER", b"K = 1\n" * 20_000),
    ],
)
def test_other_content(tmp_path, code, content):
    (tmp_path / "a.mha").write_bytes(content)
    assert refused(tmp_path / "a.mha").code == code


@pytest.mark.parametrize("line", [" " * 60_000, "K" + " " * 60_000, "K = a" + " " * 60_000 + "a", "=" * 60_000])
def test_a_line_of_blanks_takes_no_time(tmp_path, line):
    """As one regular expression 2,000 blanks took 9 s, and eight times as long for each doubling."""
    path = write(tmp_path / "a.mha", ("DimSize", line + "\nDimSize"))
    start = time.perf_counter()
    try:
        outcome = read_mha(path).voxels.shape
    except PhmdiffError as problem:
        outcome = problem.code
    assert outcome in ((5, 6, 7), "NII_HEADER")
    assert time.perf_counter() - start < 0.5


def test_errors_are_ascii_and_short(tmp_path):
    change = ("5 6 7", "\x1b[2J\xe9\xff\x9b" * 500)
    path = write(tmp_path / "a.mha", header=HEADER.format(packed=False).replace(*change))
    line = refused(path).line()
    assert line.isascii()
    assert line.isprintable()
    assert len(line) < 500


@pytest.mark.parametrize("packed", [False, True])
def test_truncation_is_found_wherever_the_file_is_cut(tmp_path, packed):
    raw = write(tmp_path / "a.mha", packed=packed).read_bytes()
    for end in range(0, len(raw), 7):
        (tmp_path / "a.mha").write_bytes(raw[:end])
        assert refused(tmp_path / "a.mha").code in {"NII_EMPTY", "NII_FORMAT", "NII_TRUNC", "NII_CRC"}


def test_a_stream_of_another_length(tmp_path):
    short, long = VOXELS.tobytes()[:-2], VOXELS.tobytes() + b"\0\0"
    problem = refused(write(tmp_path / "a.mha", packed=True, data=short))
    assert (problem.code, "418 of the 420" in problem.what) == ("NII_TRUNC", True)
    assert refused(write(tmp_path / "a.mha", packed=True, data=long)).code == "NII_CRC"


def test_every_flipped_byte_of_a_packed_file_is_refused_or_harmless(tmp_path):
    """ITK gives zeros for some of these without a word; the checksum tells them all."""
    raw = write(tmp_path / "a.mha", packed=True).read_bytes()
    begin = raw.index(b"LOCAL\n") + 6
    for at in range(begin, len(raw)):
        (tmp_path / "a.mha").write_bytes(raw[:at] + bytes([raw[at] ^ 0x20]) + raw[at + 1 :])
        try:
            outcome = np.array_equal(read_mha(tmp_path / "a.mha").voxels, VOXELS[::-1, ::-1])
        except PhmdiffError as problem:
            outcome = problem.code
        assert outcome in (True, "NII_CRC", "NII_TRUNC")


def test_a_bomb_takes_no_memory(tmp_path):
    bomb = zlib.compress(bytes(64 << 20))
    path = write(tmp_path / "a.mha", ("CompressedData = False", "CompressedData = True"), data=bomb)
    tracemalloc.start()
    try:
        assert refused(path).code == "NII_CRC"
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    big = write(tmp_path / "b.mha", ("5 6 7", "700 700 700"), ("= False\nT", "= True\nT"), data=zlib.compress(b"x"))
    assert refused(big).code == "NII_TOO_BIG"
    assert refused(tmp_path / "a.mha", max_gib=1e-7).code == "NII_TOO_BIG"


def test_nothing_but_the_exception_is_told(tmp_path, capfd):
    for _, _, change in FAULTS:
        refused(write(tmp_path / "a.mha", change))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_voxels(tmp_path, bad):
    voxels = VOXELS.astype("<f4")
    voxels[1, 2, 3] = bad
    path = write(tmp_path / "a.mha", ("MET_SHORT", "MET_FLOAT"), data=voxels.tobytes(order="F"))
    problem = refused(path)
    assert problem.code == "NII_NONFINITE"
    assert "1 NaN or Inf voxels, the first at (1, 2, 3)" in problem.what
    assert read_mha(path, nan="zero").voxels[3, 3, 3] == 0
    with pytest.raises(ValueError, match="nan must be"):
        read_mha(path, nan="keep")


def test_constant_voxels(tmp_path):
    path = write(tmp_path / "a.mha", data=(VOXELS * 0 + 7).tobytes())
    assert refused(path).code == "NII_CONSTANT"
    assert (read_mha(path, allow_constant=True).voxels == 7).all()


def test_what_is_no_file_is_refused_without_blocking(tmp_path):
    os.mkfifo(tmp_path / "a.mha")
    (tmp_path / "b.mha").mkdir()
    previous = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("blocked"))
    signal.alarm(5)
    try:
        assert refused(tmp_path / "a.mha").code == "NOT_A_FILE"
        assert refused(tmp_path / "b.mha").code == "NOT_A_FILE"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    assert refused(tmp_path / "none.mha").code == "UNREADABLE"


@settings(max_examples=150, deadline=None)
@given(
    at=st.integers(0, len(HEADER)),
    cut=st.integers(0, 30),
    text=st.text(alphabet="LOCA= 0123456789\n-enTrue.", max_size=12),
)
def test_any_header_ends_as_a_volume_or_one_line(tmp_path_factory, at, cut, text):
    path = tmp_path_factory.getbasetemp() / "fuzz.mha"
    header = HEADER.format(packed=False)
    path.write_bytes((header[:at] + text + header[at + cut :]).encode() + VOXELS.tobytes(order="F"))
    try:
        outcome = read_mha(path, max_gib=0.001).voxels.size <= 2**18
    except PhmdiffError as problem:
        outcome = re.fullmatch(r"error\[[A-Z0-9_]+\] .*", problem.line())
    assert outcome
