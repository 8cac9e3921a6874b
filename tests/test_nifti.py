"""The bounded reader and the writer. nibabel writes the input files and is the oracle for orientation."""

import gzip
import itertools
import os
import resource
import signal
import socket
import struct
import tempfile
import tracemalloc
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phmdiff_fast.errors import PhmdiffError
from phmdiff_fast.nifti import DTYPES, Grid, image_volume, read_grid, read_volume, to_original, write_volume

SIGNED_PERMUTATIONS = [
    (order, signs) for order in itertools.permutations(range(3)) for signs in itertools.product((1, -1), repeat=3)
]
AFFINE = np.array([[-1.5, 0, 0, 10], [0, 1.25, 0, -20], [0, 0, 2, 30.5], [0, 0, 0, 1]])


def save(path, voxels, affine=AFFINE, **fields):
    """Write with nibabel; afterwards overwrite header fields by name with raw values."""
    image = nib.Nifti1Image(voxels, affine)
    image.header.set_xyzt_units("mm")
    image.set_data_dtype(voxels.dtype)
    nib.save(image, path)
    return patch(path, **fields)


def patch(path, **fields):
    raw = bytearray(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes())
    header = np.ndarray((), nib.Nifti1Header().structarr.dtype, raw)
    for name, value in fields.items():
        if isinstance(value, dict):
            for at, one in value.items():
                header[name][at] = one
        else:
            header[name] = value
    path.write_bytes(gzip.compress(bytes(raw)) if path.suffix == ".gz" else bytes(raw))
    return path


def noise(shape=(5, 6, 7), dtype=np.int16, seed=0):
    return np.random.default_rng(seed).integers(0, 100, shape).astype(dtype)


def code_of(path, **how):
    with pytest.raises(PhmdiffError) as caught:
        read_volume(path, **how)
    assert caught.value.exit_code == 3
    assert caught.value.file == str(path)
    assert "\n" not in caught.value.line()
    return caught.value.code


# ---------------------------------------------------------------- the loop


@pytest.mark.parametrize(("order", "signs"), SIGNED_PERMUTATIONS)
def test_loop_keeps_voxels_and_affine_in_all_48_orientations(tmp_path, order, signs):
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis, (to, sign) in enumerate(zip(order, signs, strict=True)):
        affine[to, axis] = sign * (0.7, 1.1, 3.3)[axis]
    affine[:3, 3] = 12.3, -45.6, 78.9
    source = save(tmp_path / "in.nii.gz", noise((3, 5, 8)), affine)
    original = nib.load(source)

    volume = read_volume(source)
    canonical = nib.as_closest_canonical(original)
    assert nib.aff2axcodes(volume.affine) == ("R", "A", "S")
    assert np.array_equal(volume.voxels, canonical.get_fdata())
    np.testing.assert_allclose(volume.affine, canonical.affine, atol=1e-12)

    back = nib.load(write_volume(tmp_path / "out.nii.gz", volume.voxels, volume.grid))
    assert np.array_equal(back.get_fdata(dtype=np.float32), original.get_fdata(dtype=np.float32))
    assert np.array_equal(back.affine, original.affine)
    np.testing.assert_allclose(back.header.get_qform(), original.affine, atol=1e-4)
    again = read_volume(tmp_path / "out.nii.gz")
    assert np.array_equal(again.voxels, volume.voxels)
    assert np.array_equal(again.affine, volume.affine)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 9)] * 3),
    angles=st.tuples(*[st.floats(-3.2, 3.2)] * 3),
    spacing=st.tuples(*[st.floats(0.1, 8)] * 3),
    flip=st.booleans(),
    sform=st.booleans(),
    extension=st.sampled_from((".nii", ".nii.gz")),
)
def test_loop_keeps_oblique_grids(shape, angles, spacing, flip, sform, extension):
    turn = nib.eulerangles.euler2mat(*angles) @ np.diag(np.array(spacing) * [1, 1, -1 if flip else 1])
    affine = nib.affines.from_matvec(turn, [5.5, -3.25, 100.1])
    with tempfile.TemporaryDirectory() as folder:
        source = save(Path(folder) / f"in{extension}", noise(shape, np.float32), affine)
        if not sform:
            patch(source, sform_code=0, qform_code=1)
        volume = read_volume(source, allow_constant=True)
        write_volume(Path(folder) / f"out{extension}", volume.voxels, volume.grid)
        original, back = nib.load(source), nib.load(Path(folder) / f"out{extension}")
        assert np.array_equal(back.get_fdata(), original.get_fdata())
        assert np.array_equal(back.affine, original.affine.astype(np.float32))
        again = read_volume(Path(folder) / f"out{extension}", allow_constant=True)
        assert np.array_equal(again.grid.affine, volume.grid.affine)
        # The nearest axis codes are a tie at 45 degrees; the place of every voxel in the world is not.
        corner = np.array([*np.array(volume.voxels.shape) - 1, 1])
        ends = volume.affine @ [0, 0, 0, 1], volume.affine @ corner
        assert volume.voxels[0, 0, 0] == value_at(original, ends[0])
        assert volume.voxels[-1, -1, -1] == value_at(original, ends[1])


def value_at(image, place):
    index = np.linalg.inv(image.affine) @ place
    assert np.abs(index - np.rint(index)).max() < 1e-2
    return image.get_fdata()[tuple(np.rint(index[:3]).astype(int))]


def test_sheared_grid_survives_through_the_sform_alone(tmp_path):
    affine = AFFINE.copy()
    affine[0, 1] = 0.4
    source = save(tmp_path / "in.nii", noise(), affine)
    volume = read_volume(source)
    back = nib.load(write_volume(tmp_path / "out.nii", volume.voxels, volume.grid))
    assert np.array_equal(back.affine, nib.load(source).affine)
    assert back.header["qform_code"] == 0


def test_to_original_refuses_voxels_of_another_grid():
    with pytest.raises(ValueError, match="grid is"):
        to_original(np.zeros((5, 6, 8), np.float32), Grid((5, 6, 7), AFFINE))


# ---------------------------------------------------------------- what is understood


@pytest.mark.parametrize("name", DTYPES.values())
@pytest.mark.parametrize("endian", ["<", ">"])
def test_every_allowed_type_in_both_byte_orders(tmp_path, name, endian):
    voxels = noise().astype(np.dtype(name).newbyteorder(endian))
    header = nib.Nifti1Header(endianness=endian)
    header.set_data_dtype(voxels.dtype)
    nib.save(nib.Nifti1Image(voxels, np.eye(4), header), tmp_path / "in.nii.gz")
    volume = read_volume(tmp_path / "in.nii.gz")
    assert volume.voxels.dtype == np.float32
    assert np.array_equal(volume.voxels, voxels)


def test_slope_and_intercept(tmp_path):
    path = save(tmp_path / "in.nii", noise(), np.eye(4), scl_slope=0.5, scl_inter=-3)
    assert np.array_equal(read_volume(path).voxels, noise() * 0.5 - 3)


def test_a_fourth_dimension_of_one_is_squeezed(tmp_path):
    path = save(tmp_path / "in.nii.gz", noise((3, 4, 5, 1, 1)), np.eye(4))
    assert read_grid(path).shape == (3, 4, 5)
    assert np.array_equal(read_volume(path).voxels, noise((3, 4, 5, 1, 1))[..., 0, 0])


def test_extensions_and_a_late_offset_are_skipped(tmp_path):
    image = nib.Nifti1Image(noise(), np.eye(4))
    image.header.extensions.append(nib.nifti1.Nifti1Extension(6, b"x" * 5000))
    nib.save(image, tmp_path / "in.nii.gz")
    assert np.array_equal(read_volume(tmp_path / "in.nii.gz").voxels, noise())


def test_compression_is_told_by_content_not_by_name(tmp_path):
    plain = save(tmp_path / "in.nii", noise(), np.eye(4))
    plain.rename(tmp_path / "in.nii.gz")
    assert np.array_equal(read_volume(tmp_path / "in.nii.gz").voxels, noise())


def test_read_grid_gives_the_files_own_grid(tmp_path):
    path = save(tmp_path / "in.nii.gz", noise())
    grid = read_grid(path)
    assert grid.shape == (5, 6, 7)
    assert np.array_equal(grid.affine, AFFINE)
    assert grid.affine.dtype == np.float64


def test_qform_counts_where_there_is_no_sform(tmp_path):
    path = save(tmp_path / "in.nii", noise(), sform_code=0, qform_code=1, srow_x=np.nan)
    np.testing.assert_allclose(read_grid(path).affine, AFFINE, atol=1e-5)


# ---------------------------------------------------------------- what is refused


HEADER_FAULTS = [
    ("NII_HEADER", dict(dim={0: 0})),
    ("NII_HEADER", dict(dim={0: 8})),
    ("NII_HEADER", dict(dim={0: 2})),
    ("NII_HEADER", dict(dim={2: 0})),
    ("NII_HEADER", dict(dim={3: -4})),
    ("NII_HEADER", dict(vox_offset=0)),
    ("NII_HEADER", dict(vox_offset=352.5)),
    ("NII_HEADER", dict(vox_offset=np.nan)),
    ("NII_HEADER", dict(vox_offset=1e30)),
    ("NII_HEADER", dict(scl_slope=2, scl_inter=np.inf)),
    ("NII_HEADER", dict(xyzt_units=1)),
    ("NII_FORMAT", dict(magic=b"ni1")),
    ("NII_FORMAT", dict(magic=b"oops")),
    ("NII_FORMAT", dict(sizeof_hdr=540)),
    ("NII_AFFINE", dict(srow_x={0: np.nan})),
    ("NII_AFFINE", dict(srow_y={3: np.inf})),
    ("NII_AFFINE", dict(srow_z=0)),
    ("NII_AFFINE", dict(srow_x={0: -1.5}, srow_y={0: 1, 1: 0}, srow_z={2: 0, 0: 3})),
    ("NII_AFFINE", dict(pixdim={1: 0})),
    ("NII_AFFINE", dict(pixdim={3: np.nan})),
    ("NII_AFFINE", dict(pixdim={2: -1})),
    ("NII_AFFINE", dict(sform_code=0, qform_code=1, quatern_b=3)),
    ("NII_4D", dict(dim={0: 4, 3: 1, 4: 7})),
    ("NII_TOO_BIG", dict(dim={1: 2048, 2: 2048, 3: 2048})),
    ("NII_NONFINITE", dict(scl_slope=3e38)),
    *[("NII_DTYPE", dict(datatype=code)) for code in (0, 1, 32, 128, 1536, 1792, 2048, 2304, 777)],
]


@pytest.mark.parametrize("extension", [".nii", ".nii.gz"])
@pytest.mark.parametrize(("code", "fields"), HEADER_FAULTS, ids=lambda value: str(value)[:60])
def test_header_faults(tmp_path, code, fields, extension):
    path = save(tmp_path / f"in{extension}", noise(), **fields)
    assert code_of(path) == code
    if code != "NII_TOO_BIG" and code != "NII_NONFINITE":  # these two need more than the header
        with pytest.raises(PhmdiffError) as caught:
            read_grid(path)
        assert caught.value.code == code


def test_header_fault_names_field_and_value(tmp_path):
    with pytest.raises(PhmdiffError, match=r"field=dim\[2\] value=-4"):
        read_volume(save(tmp_path / "in.nii.gz", noise(), dim={2: -4}))


@pytest.mark.parametrize(
    ("code", "content"),
    [
        ("NII_EMPTY", b""),
        ("NII_EMPTY", gzip.compress(b"")),
        ("NII_FORMAT", b"<html><body>404 Not Found</body></html>"),
        ("NII_FORMAT", b"<html>" + b" " * 1000),
        ("NII_FORMAT", gzip.compress(b"hello" * 200)),
        ("NII_TRUNC", b"\x5c\x01\x00\x00" + bytes(200)),
        ("NII_CRC", b"\x1f\x8b" + b"\xff" * 500),
    ],
)
def test_other_content(tmp_path, code, content):
    path = tmp_path / "in.nii.gz"
    path.write_bytes(content)
    assert code_of(path) == code


@pytest.mark.parametrize("extension", [".nii", ".nii.gz"])
def test_truncation_is_found_wherever_the_file_is_cut(tmp_path, extension):
    whole = save(tmp_path / f"whole{extension}", noise((9, 9, 9), np.float32)).read_bytes()
    cut = tmp_path / f"cut{extension}"
    for part in range(1, 64):
        cut.write_bytes(whole[: len(whole) * part // 64])
        assert code_of(cut) == "NII_TRUNC", part


def test_truncation_says_what_it_had_and_needed(tmp_path):
    path = save(tmp_path / "in.nii", noise())
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(PhmdiffError, match="500 of the 772 bytes"):
        read_volume(path)
    # An uncompressed deflate block: the bytes that were decoded before the break are counted.
    raw = save(tmp_path / "raw.nii", noise()).read_bytes()
    path.write_bytes(gzip.compress(raw, compresslevel=0)[: 15 + 352 + 100])
    with pytest.raises(PhmdiffError, match="100 of the 420 voxel bytes"):
        read_volume(path)


def test_a_missing_or_wrong_gzip_trailer_is_found(tmp_path):
    whole = save(tmp_path / "in.nii.gz", noise()).read_bytes()
    path = tmp_path / "cut.nii.gz"
    for content in (whole[:-8], whole[:-1], whole[:-8] + bytes(8), whole + b"junk"):
        path.write_bytes(content)
        assert code_of(path) == "NII_CRC"


def test_every_flipped_byte_is_refused_or_harmless(tmp_path):
    path = save(tmp_path / "in.nii.gz", noise((4, 5, 6)))
    whole, voxels = path.read_bytes(), read_volume(path).voxels
    exit_codes = []
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        try:
            assert np.array_equal(read_volume(path).voxels, voxels), at
        except PhmdiffError as problem:
            exit_codes.append(problem.exit_code)
    assert set(exit_codes) == {3}
    assert len(exit_codes) > len(whole) - 10  # the ten bytes of the gzip header are partly free


def test_a_huge_claim_takes_no_memory(tmp_path):
    for extension in (".nii", ".nii.gz"):
        path = save(tmp_path / f"in{extension}", noise(), dim={1: 2048, 2: 2048, 3: 2048}, datatype=2)
        tracemalloc.start()
        try:
            assert code_of(path) == "NII_TOO_BIG"
            assert tracemalloc.get_traced_memory()[1] < 4 << 20
        finally:
            tracemalloc.stop()


def test_a_claim_the_compressed_bytes_cannot_hold(tmp_path):
    path = save(tmp_path / "in.nii.gz", noise(), dim={1: 300, 2: 300, 3: 300})  # 54 MB, below the cap
    assert code_of(path) == "NII_TOO_BIG"


def test_the_cap_is_an_argument_counted_as_float32(tmp_path):
    path = save(tmp_path / "in.nii.gz", noise((8, 8, 8), np.uint8))
    assert read_volume(path, max_gib=2048 / 2**30).voxels.shape == (8, 8, 8)
    assert code_of(path, max_gib=2047 / 2**30) == "NII_TOO_BIG"


def test_a_bomb_behind_the_voxels_is_stopped_at_the_cap(tmp_path):
    raw = save(tmp_path / "in.nii", noise()).read_bytes()
    path = tmp_path / "bomb.nii.gz"
    path.write_bytes(gzip.compress(raw + bytes(30 << 20), compresslevel=1))
    assert read_volume(path).voxels.shape == (5, 6, 7)
    assert code_of(path, max_gib=0.01) == "NII_TOO_BIG"


def test_what_may_follow_the_voxels_is_bounded_packed_and_unpacked(tmp_path):
    raw, path = save(tmp_path / "in.nii", noise()).read_bytes(), tmp_path / "in.nii.gz"
    path.write_bytes(gzip.compress(raw + bytes(70 << 20), compresslevel=1))
    assert code_of(path) == "NII_TOO_BIG"
    whole = gzip.compress(raw)
    for tail in (bytes(1 << 20), gzip.compress(b"") * 50_000):
        path.write_bytes(whole + tail)
        assert read_volume(path).voxels.shape == (5, 6, 7)
        path.write_bytes(whole + 2 * tail)
        with pytest.raises(PhmdiffError, match=f"has {path.stat().st_size} bytes packed"):
            read_volume(path)


def test_a_late_offset_is_skipped_in_pieces(tmp_path):
    plain = save(tmp_path / "in.nii", noise(), vox_offset=float(352 + (20 << 20)))
    raw, path = plain.read_bytes(), tmp_path / "in.nii.gz"
    path.write_bytes(gzip.compress(raw[:352] + bytes(20 << 20) + raw[352:], compresslevel=1))
    tracemalloc.start()
    try:
        assert np.array_equal(np.sort(read_volume(path).voxels, None), np.sort(noise(), None))
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_an_image_in_memory_has_the_same_cap_and_cures(tmp_path):
    image = nib.Nifti1Image(noise((8, 8, 8), np.float32), AFFINE)
    assert image_volume(image, "x", max_gib=2048 / 2**30).voxels.shape == (8, 8, 8)
    with pytest.raises(PhmdiffError, match=r"NII_TOO_BIG.*--max-volume-gib"):
        image_volume(image, "x", max_gib=2047 / 2**30)
    image.dataobj[1, 2, 3] = np.nan
    with pytest.raises(PhmdiffError, match="--nan zero"):
        image_volume(image, "x")
    assert image_volume(image, "x", nan="zero").zeroed == 1


@pytest.mark.parametrize("gib", [1e30, 1.7e308, np.inf])
def test_a_cap_beyond_all_memory_is_none(tmp_path, gib):
    assert read_volume(save(tmp_path / "in.nii", noise()), max_gib=gib).voxels.shape == (5, 6, 7)


@pytest.mark.filterwarnings("error")
def test_numbers_that_no_sum_survives(tmp_path):
    """Enormous voxels would overflow in the percentiles; signalling NaNs make numpy talk."""
    voxels = noise(dtype=np.float32)
    voxels[1, 2, 3] = -2e18
    path = save(tmp_path / "in.nii", voxels, np.eye(4))
    with pytest.raises(PhmdiffError, match=r"has 1 beyond 1e\+18 voxels, the first at \(1, 2, 3\)"):
        read_volume(path)
    assert read_volume(path, nan="zero").voxels[1, 2, 3] == 0
    raw = bytearray(path.read_bytes())
    raw[400:404] = b"\1\0\xa0\x7f"
    path.write_bytes(raw)
    assert code_of(path) == "NII_NONFINITE"
    raw[296:300] = b"\1\0\xa0\x7f"  # srow_y
    path.write_bytes(raw)
    assert code_of(path) == "NII_AFFINE"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_voxels(tmp_path, bad):
    voxels = noise(dtype=np.float32)
    voxels[1, 2, 3] = voxels[4, 0, 0] = bad
    path = save(tmp_path / "in.nii.gz", voxels, np.eye(4))
    with pytest.raises(PhmdiffError, match=r"has 2 NaN or Inf voxels, the first at \(1, 2, 3\)"):
        read_volume(path)
    assert code_of(path) == "NII_NONFINITE"
    voxels[1, 2, 3] = voxels[4, 0, 0] = 0
    assert np.array_equal(read_volume(path, nan="zero").voxels, voxels)
    assert read_volume(path, nan="zero").zeroed == 2
    with pytest.raises(ValueError, match="nan must be"):
        read_volume(path, nan="ignore")


def test_constant_volume(tmp_path):
    path = save(tmp_path / "in.nii.gz", np.full((4, 4, 4), 5.0, np.float32))
    assert code_of(path) == "NII_CONSTANT"
    assert (read_volume(path, allow_constant=True).voxels == 5).all()


@pytest.fixture
def limit():
    """Two seconds: a test that would block fails instead."""

    def stop(*_):
        raise TimeoutError("blocked")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(2)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def test_what_is_no_file_is_refused_without_blocking(tmp_path, limit, monkeypatch):
    os.mkfifo(tmp_path / "pipe.nii.gz")
    (tmp_path / "folder.nii.gz").mkdir()
    (tmp_path / "loop.nii.gz").symlink_to("loop.nii.gz")
    (tmp_path / "device.nii.gz").symlink_to("/dev/zero")
    monkeypatch.chdir(tmp_path)  # the name of a socket is limited to 107 bytes
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.nii.gz")
        for name in ("pipe", "folder", "loop", "device", "socket"):
            assert code_of(tmp_path / f"{name}.nii.gz") == "NOT_A_FILE"


def test_a_device_is_not_even_opened(tmp_path, monkeypatch):
    """Opening one can do things: rewind a tape, start a watchdog."""
    (tmp_path / "device.nii").symlink_to("/dev/zero")
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", lambda *_: pytest.fail("opened"))
        assert code_of(tmp_path / "device.nii") == "NOT_A_FILE"


def test_a_fifo_that_was_a_file_a_moment_ago_does_not_block(tmp_path, limit, monkeypatch):
    regular = os.stat(save(tmp_path / "in.nii", noise()))
    os.mkfifo(tmp_path / "pipe.nii")
    with monkeypatch.context() as patch:
        patch.setattr("phmdiff_fast.nifti.os.stat", lambda path: regular)
        assert code_of(tmp_path / "pipe.nii") == "NOT_A_FILE"


def test_a_missing_file_is_unreadable(tmp_path):
    assert code_of(tmp_path / "none.nii.gz") == "UNREADABLE"
    assert code_of(tmp_path / "a\0b.nii.gz") == "UNREADABLE"
    assert code_of(tmp_path / ("x" * 300 + ".nii.gz")) == "UNREADABLE"


def test_a_forbidden_file_is_unreadable():
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to other users
        path = save(Path(folder) / "in.nii.gz", noise())
        os.chmod(folder, 0o755)
        os.chmod(path, 0o000)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            assert code_of(path) == "UNREADABLE"
        finally:
            if root:
                os.seteuid(0)


# ---------------------------------------------------------------- writing


def test_output_has_a_fresh_header(tmp_path):
    secret = b"SECRET-NAME"
    image = nib.Nifti1Image(noise(), AFFINE)
    for field in ("descrip", "aux_file", "intent_name", "db_name"):
        image.header[field] = secret
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", secret))
    nib.save(image, tmp_path / "in.nii")
    assert secret in (tmp_path / "in.nii").read_bytes()
    volume = read_volume(tmp_path / "in.nii")
    for name in ("out.nii", "out.nii.gz"):
        path = write_volume(tmp_path / name, volume.voxels, volume.grid)
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if name.endswith(".gz") else raw
        assert secret not in raw
        assert len(raw) == 352 + 4 * 5 * 6 * 7
        header = nib.load(path).header
        assert header["descrip"].item() == b"SYNTHETIC phmdiff-fast"
        assert header.get_xyzt_units()[0] == "mm"
        assert header.get_data_dtype() == np.float32
        assert (header["sform_code"], header["qform_code"]) == (1, 1)
        assert struct.unpack("<f", raw[108:112]) == (352.0,)


def test_the_same_voxels_give_the_same_bytes_and_no_file_name(tmp_path):
    grid = Grid((5, 6, 7), AFFINE)
    one = write_volume(tmp_path / "patient-one.nii.gz", noise(dtype=np.float32), grid).read_bytes()
    two = write_volume(tmp_path / "two.nii.gz", noise(dtype=np.float32), grid).read_bytes()
    assert one == two
    assert b"patient" not in one
    assert one[4:8] == bytes(4)  # gzip's time


def test_an_output_is_replaced_only_on_request(tmp_path):
    grid, path = Grid((5, 6, 7), AFFINE), tmp_path / "out.nii.gz"
    write_volume(path, noise(dtype=np.float32), grid)
    before = path.read_bytes()
    with pytest.raises(PhmdiffError) as caught:
        write_volume(path, noise(seed=1), grid)
    assert (caught.value.code, caught.value.exit_code) == ("OUTPUT_EXISTS", 2)
    assert path.read_bytes() == before
    write_volume(path, noise(seed=1), grid, overwrite=True)
    assert path.read_bytes() != before
    assert os.listdir(tmp_path) == ["out.nii.gz"]


def test_an_output_name_is_checked(tmp_path):
    with pytest.raises(PhmdiffError) as caught:
        write_volume(tmp_path / "out.png", noise(), Grid((5, 6, 7), AFFINE))
    assert (caught.value.code, caught.value.exit_code) == ("OUTPUT_NAME", 2)


def test_a_full_disk_leaves_the_old_output_and_nothing_else(tmp_path):
    grid, path = Grid((5, 6, 7), AFFINE), tmp_path / "out.nii"
    write_volume(path, noise(dtype=np.float32), grid)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        with pytest.raises(PhmdiffError) as caught:
            write_volume(path, noise(seed=1), grid, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (caught.value.code, caught.value.exit_code) == ("OUTPUT_WRITE", 74)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["out.nii"]


def test_a_missing_output_folder_is_told(tmp_path):
    with pytest.raises(PhmdiffError) as caught:
        write_volume(tmp_path / "none" / "out.nii", noise(), Grid((5, 6, 7), AFFINE))
    assert caught.value.exit_code == 74
