"""Bad data through the command line: rows D1 to D23 of the fault matrix, hostile files, and a torture of the reader."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import reader_torture
import torch
from conftest import TINY, cli, phantom, write_scan
from hostile_data import CANARY, KINDS, RAN, changed
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import mha, nifti, packed
from small_scans import AFFINE, save, scan

from phmdiff_fast import generate
from phmdiff_fast.cache import SliceCache
from phmdiff_fast.check import check_cohort
from phmdiff_fast.config import DataConfig, ModelConfig, SampleConfig
from phmdiff_fast.data import Subject, discover
from phmdiff_fast.errors import PhmdiffError
from phmdiff_fast.nifti import Grid
from phmdiff_fast.phmdiff import PHMDiff

LINE = re.compile(r"phmdiff-fast: error\[([A-Z0-9_]+)\] [^\x00-\x1f\x7f-\x9f]+")
MORE = re.compile(r"phmdiff-fast: \.\.\. and (\d+) more problems")


def errors(capsys) -> list[tuple[str, str]]:
    """(code, line) of every line on stderr; each must be an error of one line, never a traceback."""
    told = []
    for line in capsys.readouterr().err.splitlines():
        match = LINE.fullmatch(line)
        assert match or MORE.fullmatch(line), line
        assert len(line) <= 2100
        told.append((match[1] if match else "MORE", line))
    return told


def codes(capsys) -> list[str]:
    return [code for code, _ in errors(capsys)]


def put(root: Path, subject: str, content: bytes, name: str = "{}_t1.nii.gz") -> Path:
    path = root / subject / name.format(subject)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def check_all(root: Path, files: dict[str, tuple[str, bytes]], capsys, *more) -> None:
    """A cohort of these files, subject -> (code, content), gets the code of each, in order, and exit 3."""
    for subject, (_, content) in files.items():
        put(root, subject, content)
    assert cli("check", root, "--quiet", *more) == 3
    assert codes(capsys) == [files[subject][0] for subject in sorted(files)]


@pytest.fixture(scope="module")
def trained(tiny_cohort, tmp_path_factory) -> Path:
    """A run of 2 steps, t1 -> t2."""
    out = tmp_path_factory.mktemp("runs") / "run"
    split = out.parent / "split.json"
    split.write_text(json.dumps({"train": ["p0", "p1"], "val": ["p2"], "test": ["p3"]}))
    assert cli(*training(tiny_cohort, out, "--split", split)) == 0
    return out


def training(cohort, out, *more) -> list:
    return ["train", cohort, "--source", "t1", "--target", "t2", "--out", out, "--steps", 2, "--image-size", 24,
            "--quiet", *TINY, *more]  # fmt: skip


class within:
    """At most so many seconds; what blocks is interrupted."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def __enter__(self):
        def stop(*_):
            raise TimeoutError(f"more than {self.seconds} s")

        self.before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, self.seconds)

    def __exit__(self, *_):
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self.before)


def fresh(code: str, *arguments) -> subprocess.CompletedProcess:
    """Run code in a new process, where ``peak()`` is its largest resident size in MiB."""
    peak = "def peak(): return int(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1]) / 1024\n"
    command = [sys.executable, "-c", "import re, sys\n" + peak + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


# ---------------------------------------------------------------- D1 to D9: one file


def test_d1_a_cut_file_is_told_with_what_it_had_and_needed(tmp_path, capsys):
    raw = nifti((9, 9, 9), np.float32)
    for name, whole in (("{}_t1.nii", raw), ("{}_t2.nii.gz", gzip.compress(raw))):
        for part in range(1, 64):
            put(tmp_path, f"s{part:02d}", whole[: len(whole) * part // 64], name)
    assert cli("check", tmp_path, "--quiet") == 3
    told = errors(capsys)
    assert [code for code, _ in told] == ["NII_TRUNC"] * 20 + ["MORE"]
    assert all(re.search(r"\d+ of the \d+", line) for _, line in told[:-1])
    assert MORE.fullmatch(told[-1][1])[1] == str(2 * 63 - 20)


def test_d2_what_is_no_nifti(tmp_path, capsys):
    files = {
        "empty": ("NII_EMPTY", b""), "nothing": ("NII_EMPTY", gzip.compress(b"")),
        "html": ("NII_FORMAT", b"<html><body>404</body></html>" * 30), "zeros": ("NII_FORMAT", bytes(1000)),
        "pair": ("NII_FORMAT", gzip.compress(changed(magic=b"ni1"))), "magic": ("NII_FORMAT", changed(magic=b"oops")),
        "nifti2": ("NII_FORMAT", b"\x1c\x02\0\0" + bytes(1000)),
    }  # fmt: skip
    check_all(tmp_path, files, capsys)


def test_d3_a_wrong_checksum_or_trailer(tmp_path, capsys):
    whole = gzip.compress(nifti(), mtime=0)
    flipped = bytearray(whole)
    flipped[-6] ^= 1
    files = {"crc": bytes(flipped), "none": whole[:-8], "part": whole[:-3], "zeros": whole[:-8] + bytes(8),
             "junk": whole + b"junk"}  # fmt: skip
    check_all(tmp_path, {name: ("NII_CRC", content) for name, content in files.items()}, capsys)


def test_d3_every_flipped_bit_is_found_or_changes_nothing():
    """tests/faults/reader_torture.py flips 10,000."""
    told = reader_torture.run(0, seed=7, flip_count=400, bomb_count=0)
    assert told["failures"] == []
    figures = told["packed_flips"]
    assert figures["files"] == 400
    assert (figures["refused"] + figures["unchanged"], figures["changed_unnoticed"]) == (400, 0)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_d4_a_huge_claim_takes_neither_memory_nor_time(tmp_path, suffix):
    raw = changed(dim={1: 2048, 2: 2048, 3: 2048}) + os.urandom(11_000)
    path = tmp_path / f"p_t1{suffix}"
    path.write_bytes(gzip.compress(raw) if suffix == ".nii.gz" else raw)
    done = fresh(
        "import resource, time\n"
        "from phmdiff_fast.nifti import read_volume\n"
        "from phmdiff_fast.errors import PhmdiffError\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))\n"
        "start = time.perf_counter()\n"
        "try: read_volume(sys.argv[1])\n"
        "except PhmdiffError as problem: print(problem.code, time.perf_counter() - start, peak())",
        path,
    )
    code, seconds, mib = done.stdout.split()
    assert code == "NII_TOO_BIG"
    assert float(seconds) <= 1
    assert float(mib) <= 200


def test_d5_a_real_bomb_stops_at_the_cap(tmp_path, capsys):
    claim = changed(dim={1: 512, 2: 512, 3: 256}, datatype=2, bitpix=8)  # 64 MiB of bytes, 256 MiB as float32
    files = {
        "behind": ("NII_TOO_BIG", packed(nifti(), 20 << 20, b"")),
        "voxels": ("NII_TOO_BIG", packed(claim[:352], 64 << 20, b"")),
    }
    check_all(tmp_path, files, capsys, "--max-volume-gib", 0.01)
    assert cli("check", tmp_path, "--quiet", "--max-volume-gib", 0.3) == 3  # now it is read, and holds one value
    told = errors(capsys)
    assert [code for code, _ in told] == ["NII_CONSTANT"]
    assert "voxels/t1" in told[0][1]


def test_d5_the_cap_is_named_as_the_cure_and_holds_for_mha_too(tmp_path, capsys):
    put(tmp_path, "p", mha((64, 64, 65), packed=True), "mr.mha")
    save(tmp_path / "p" / "ct.nii", scan(0, (64, 64, 65)))
    assert cli("check", tmp_path, "--quiet", "--max-volume-gib", 2**-10) == 3
    told = errors(capsys)
    assert [code for code, _ in told] == ["NII_TOO_BIG"] * 2
    assert all("--max-volume-gib" in line for _, line in told)
    for bad in ("0", "-1", "nan", "inf", "x"):
        assert cli("check", tmp_path, "--quiet", f"--max-volume-gib={bad}") == 2
        assert codes(capsys) == ["USAGE"]


HEADERS = {
    "d6": [("NII_HEADER", fields) for fields in (
        dict(dim={0: 0}), dict(dim={0: 8}), dict(dim={0: 2}), dict(dim={0: -1}), dict(dim={2: 0}), dict(dim={3: -4}),
        dict(vox_offset=0), dict(vox_offset=np.nan), dict(vox_offset=1e30), dict(vox_offset=-352), dict(vox_offset=351),
    )],
    "d7": [("NII_4D", dict(dim={0: 4, 3: 1, 4: 7})), ("NII_4D", dict(dim={0: 5, 3: 1, 4: 1, 5: 3}))],
    "d8": [("NII_DTYPE", dict(datatype=code)) for code in (0, 1, 32, 128, 1536, 1792, 2048, 2304, 777, -1)],
    "d14": [("NII_AFFINE", fields) for fields in (
        dict(srow_x={0: np.nan}), dict(srow_y={3: np.inf}), dict(srow_z=0), dict(pixdim={1: 0}),
        dict(pixdim={3: np.nan}), dict(pixdim={2: -1}), dict(sform_code=0, qform_code=1, quatern_b=3),
        dict(srow_x=[1, 2, 3, 0], srow_y=[2, 4, 6, 0]),
    )],
}  # fmt: skip


@pytest.mark.parametrize("row", HEADERS, ids=lambda row: f"{row}_wrong_headers")
def test_d6_d7_d8_d14_wrong_headers(tmp_path, capsys, row):
    files = {f"s{i:02d}": (code, gzip.compress(changed(**fields))) for i, (code, fields) in enumerate(HEADERS[row])}
    check_all(tmp_path, files, capsys)


def test_d6_field_and_value_are_named(tmp_path, capsys):
    put(tmp_path, "p", changed(dim={2: -4}))
    assert cli("check", tmp_path, "--quiet") == 3
    assert "field=dim[2] value=-4" in errors(capsys)[0][1]


def test_d7_one_volume_in_four_dimensions_is_squeezed(tmp_path, capsys):
    put(tmp_path, "p", nifti((4, 5, 6, 1), np.float32))
    assert cli("check", tmp_path, "--quiet") == 0
    assert "4x5x6" in capsys.readouterr().out


def test_d8_the_allowed_types_are_named(tmp_path, capsys):
    put(tmp_path, "p", changed(datatype=128))
    assert cli("check", tmp_path, "--quiet") == 3
    assert "uint8, int16, int32, float32, float64" in errors(capsys)[0][1]


def with_nan(subject: int = 0) -> np.ndarray:
    voxels = phantom(subject)["t1"].astype(np.float32)
    voxels[1, 2, 3] = voxels[4, 0, 0] = np.nan
    return voxels


def test_d9_voxels_that_are_not_finite(tmp_path, capsys):
    overflow = gzip.compress(changed(scl_slope=3e38))
    check_all(tmp_path / "a", {"slope": ("NII_NONFINITE", overflow)}, capsys)
    save(tmp_path / "b" / "p" / "p_t1.nii.gz", with_nan())
    assert cli("check", tmp_path / "b", "--quiet") == 3
    line = errors(capsys)[0][1]
    assert "2 NaN or Inf voxels, the first at (1, 2, 3)" in line
    assert "--nan zero" in line
    assert cli("check", tmp_path / "b", "--quiet", "--nan", "zero") == 0
    assert "note: p/t1: 2 NaN or Inf voxels are taken as 0" in capsys.readouterr().out


def test_d9_zero_is_asked_for_once_and_holds_for_the_run(tiny_cohort, tmp_path, capsys):
    cohort, run = tmp_path / "cohort", tmp_path / "run"
    shutil.copytree(tiny_cohort, cohort)
    affine = nib.load(cohort / "p0" / "p0_t1.nii.gz").affine
    for number in range(4):
        write_scan(cohort / f"p{number}" / f"p{number}_t1.nii.gz", with_nan(number), affine)
    assert cli(*training(cohort, run)) == 3
    assert codes(capsys) == ["NII_NONFINITE"] * 4
    assert not run.exists()
    assert cli(*training(cohort, run, "--nan", "zero")) == 0
    for more, code in (([], 0), (["--nan", "raise"], 3), (["--max-volume-gib", "1e-6"], 3)):
        for command in (["sample", run, cohort / "p0", "--out", tmp_path / "out", "--overwrite"],
                        ["evaluate", run, cohort]):  # fmt: skip
            capsys.readouterr()
            assert cli(*command, "--quiet", *more) == code, (command, more)
            if code:
                assert codes(capsys)[0] == ("NII_NONFINITE" if "raise" in more else "NII_TOO_BIG")
    opened = generate.load(run)
    given = {"t1": cohort / "p0" / "p0_t1.nii.gz"}
    assert opened.translate(given).shape == (20, 24, 9)
    for how, code in ((dict(nan="raise"), "NII_NONFINITE"), (dict(max_gib=1e-6), "NII_TOO_BIG")):
        for image in (given, {"t1": nib.load(given["t1"])}):
            with pytest.raises(PhmdiffError) as caught:
                opened.translate(image, **how)
            assert caught.value.code == code


# ---------------------------------------------------------------- D10 to D15: a subject's scans


def test_d10_one_value_only_is_refused_in_training_and_told_in_sampling(trained, tiny_cohort, tmp_path, capsys):
    cohort, run = tmp_path / "cohort", tmp_path / "run"
    shutil.copytree(tiny_cohort, cohort)
    flat = cohort / "p1" / "p1_t1.nii.gz"
    write_scan(flat, np.full((20, 24, 9), 5.0, np.float32), nib.load(flat).affine)
    assert cli(*training(cohort, run)) == 3
    assert [code for code, _ in errors(capsys)] == ["NII_CONSTANT"]
    assert not run.exists()
    assert cli("sample", trained, flat, "--out", tmp_path / "out", "--quiet") == 0
    assert "p1/t1 holds one value only: the synthesized volume is 0 everywhere" in capsys.readouterr().err
    made = np.asarray(nib.load(tmp_path / "out" / "p1_t2_syn.nii.gz").dataobj)
    assert made.shape == (20, 24, 9)
    assert not made.any()


def test_d11_all_missing_contrasts_are_told_at_once(trained, tiny_cohort, tmp_path, capsys):
    cohort = tmp_path / "cohort"
    shutil.copytree(tiny_cohort, cohort)
    (cohort / "p0" / "p0_t1.nii.gz").unlink()
    (cohort / "p2" / "p2_t1.nii.gz").unlink()
    for command in (["check", cohort, "--source", "t1", "--target", "t2", "--quiet"], training(cohort, tmp_path / "r"),
                    ["sample", trained, cohort, "--out", tmp_path / "o", "--quiet"]):  # fmt: skip
        assert cli(*command) == 3
        told = errors(capsys)
        assert [code for code, _ in told] == ["MISSING_CONTRAST"] * 2
        assert ["p0" in told[0][1], "p2" in told[1][1]] == [True, True]
    assert not (tmp_path / "r").exists()
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda voxels, affine: (voxels[:-1], affine), ["(19, 24, 9)", "(20, 24, 9)"]),
        (lambda voxels, affine: (voxels, affine @ np.diag([1.01, 1, 1, 1])), ["1.515", "1.5"]),
        (lambda voxels, affine: (voxels, affine + 0.01 * np.eye(4)[:, [3, 1, 2, 0]]), ["mm off", "origin"]),
    ],
    ids=["d12_shape", "d12_spacing", "d12_origin"],
)
def test_d12_another_grid_is_refused_with_both_values(tiny_cohort, tmp_path, capsys, change, told):
    cohort, run = tmp_path / "cohort", tmp_path / "run"
    shutil.copytree(tiny_cohort, cohort)
    image = nib.load(cohort / "p1" / "p1_t2.nii.gz")
    write_scan(cohort / "p1" / "p1_t2.nii.gz", *change(np.asarray(image.dataobj), image.affine.copy()))
    for command in (["check", cohort, "--quiet"], training(cohort, run)):
        assert cli(*command) == 3
        ((code, line),) = errors(capsys)
        assert code == "GRID_MISMATCH"
        assert all(text in line for text in ["p1/t2", *told]), line
    assert not run.exists()


def test_d13_every_orientation_gives_the_same_volume_on_its_own_grid(trained, tmp_path, capsys):
    """All 48: what the network sees is in RAS; what is written has the input's order, to the last bit."""
    voxels, affine = phantom(3)["t1"], np.diag([1.5, 1.25, 2.0, 1.0])
    turns = list(itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)))
    original = nib.Nifti1Image(voxels, affine)
    inputs = []
    for number, (order, signs) in enumerate(turns):
        turned = original.as_reoriented(np.array(list(zip(order, signs, strict=True))))
        inputs.append(tmp_path / f"q{number:02d}_t1.nii.gz")
        nib.save(turned, inputs[-1])
    assert cli("sample", trained, *inputs, "--out", tmp_path / "out", "--quiet") == 0
    first = None
    for number, path in enumerate(inputs):
        made, given = nib.load(tmp_path / "out" / f"q{number:02d}_t2_syn.nii.gz"), nib.load(path)
        assert made.shape == given.shape
        assert np.array_equal(made.affine, given.affine)
        upright = nib.as_closest_canonical(made).get_fdata()
        first = upright if first is None else first
        assert np.array_equal(upright, first), turns[number]
    assert np.ptp(first) > 0


def test_d15_every_size_from_1_to_97_keeps_its_shape():
    """Padded to patch * 2^(levels - 1) = 16, predicted, cropped: exactly the corner of the padded image's estimate."""
    torch.manual_seed(0)
    config = ModelConfig(depth=1, width=16, heads=1, decoder_depth=1, decoder_width=16, decoder_heads=1, patch=4,
                         stem=False, head=False)  # fmt: skip
    model = PHMDiff(config, 1).eval()
    for weight in model.parameters():  # a new network's last layer is 0, and then any crop would do
        torch.nn.init.normal_(weight, std=0.2)
    assert model.multiple == 16
    ids = torch.zeros(1, dtype=torch.int64)
    for size in range(1, 98):
        image = torch.rand(1, 1, size, 98 - size) * 2 - 1
        made = model.translate(image, ids)[0]
        assert made.shape == image.shape
        assert torch.isfinite(made).all()
        whole = model.translate(model.pad(image), ids)[0]
        assert whole.shape[2] % 16 == whole.shape[3] % 16 == 0
        assert torch.equal(made, whole[:, :, :size, : 98 - size])
        assert made.std() > 0.01


def test_d15_volumes_of_every_size_come_back_in_their_shape(trained):
    run = generate.load(trained)
    for size in range(1, 98, 3):
        shape = (size, 98 - size, 1 + size % 3)
        voxels = np.random.default_rng(size).uniform(1, 100, shape).astype(np.float32)
        subject = Subject("q", {"t1": voxels}, np.eye(4), Grid(shape, np.eye(4)), np.ones(shape, bool))
        made = generate.synthesize(run, subject, SampleConfig()).mean
        assert made.shape == shape
        assert np.isfinite(made).all()


# ---------------------------------------------------------------- D16 to D19: files


@pytest.mark.parametrize("what", ["fifo", "device", "loop", "folder", "socket"])
def test_d16_what_is_no_file_never_blocks(trained, tmp_path, capsys, what):
    path = tmp_path / "data" / "p_t1.nii.gz"
    path.parent.mkdir()
    (tmp_path / "data" / "list.csv").write_text("subject,contrast,path\np,t1,p_t1.nii.gz\n")
    make = {
        "fifo": os.mkfifo, "device": lambda path: os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5)),
        "loop": lambda path: path.symlink_to(path.name), "folder": os.mkdir,
        "socket": lambda path: os.mknod(path, 0o600 | 0o140000),
    }  # fmt: skip
    try:
        make[what](path)
    except PermissionError:
        path.symlink_to("/dev/zero")
    inputs = [["check", tmp_path / "data" / "list.csv", "--quiet"]]
    if what != "folder":  # a folder is looked into
        inputs += [["check", tmp_path / "data", "--quiet"],
                   ["sample", trained, path, "--out", tmp_path / "o", "--quiet"]]  # fmt: skip
    for command in inputs:
        with within(2):
            code = cli(*command)
        told = codes(capsys)
        assert code == 3, told
        assert told[0] in (("NOT_A_FILE", "PATH_OUTSIDE") if what == "device" else ("NOT_A_FILE",))
    assert not (tmp_path / "o").exists()


@settings(max_examples=150, deadline=None)
@given(
    parts=st.lists(st.sampled_from(["..", ".", "p", "q", "link", "", "p_t1.nii.gz", "outside", "etc"]), max_size=6),
    absolute=st.booleans(),
    subject=st.text(alphabet="ab.-_/\\ \x00\x1b\nä%", min_size=1, max_size=6) | st.sampled_from(["..", ".", "a" * 129]),
)
def test_d17_no_path_of_a_list_leads_out_of_its_folder(parts, absolute, subject):
    name = ("/" if absolute else "") + "/".join(parts)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(os.path.realpath(folder)) / "data"
        (root / "p").mkdir(parents=True)
        (root / "link").symlink_to("..")
        quoted = subject.replace('"', '""')
        (root / "list.csv").write_text(f'subject,contrast,path\n"{quoted}",t1,"{name}"\n')
        refused = None
        try:
            cohort = discover(root / "list.csv")
        except PhmdiffError as problem:
            refused = problem
        if refused:
            assert (refused.exit_code, refused.code in ("PATH_OUTSIDE", "BAD_ID", "CSV_FORMAT")) == (3, True)
            return
        ((found, files),) = cohort.files.items()
        assert re.fullmatch(r"[A-Za-z0-9._-]{1,128}", found)
        assert found not in (".", "..")
        assert files["t1"].is_relative_to(root)
        assert not absolute


def test_d17_paths_that_lead_out_are_all_told_and_none_is_read(tmp_path, capsys):
    outside = tmp_path / "outside.nii.gz"
    outside.write_bytes(gzip.compress(nifti()))
    data = tmp_path / "data"
    data.mkdir()
    (data / "link.nii.gz").symlink_to(outside)
    rows = ["a,t1,../outside.nii.gz", f"b,t1,{outside}", "c,t1,link.nii.gz", "..,t1,x.nii.gz", "e/f,t1,x.nii.gz"]
    (data / "list.csv").write_text("\n".join(["subject,contrast,path", *rows]))
    assert cli("check", data / "list.csv", "--quiet") == 3
    assert codes(capsys) == ["PATH_OUTSIDE"] * 3 + ["BAD_ID"] * 2


@pytest.mark.parametrize("what", ["file", "folder"])
def test_d18_what_may_not_be_read(what):
    code = (
        "import os, scipy.ndimage, phmdiff_fast.check, phmdiff_fast.data, phmdiff_fast.files\n"
        "from phmdiff_fast.cli import main\n"
        "if os.geteuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "main(['check', sys.argv[1], '--quiet'])"
    )
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to other users
        path = put(Path(name), "p", gzip.compress(nifti()))
        for part in (Path(name), path.parent, path):
            part.chmod(0o755)
        assert fresh(code, name).returncode == 0
        (path if what == "file" else path.parent).chmod(0)
        done = fresh(code, name)
        assert done.returncode == 3, done.stderr
        assert LINE.fullmatch(done.stderr.strip())[1] == "UNREADABLE"


@pytest.mark.parametrize(
    "change",
    [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-300]),
     lambda path: path.write_bytes(b"")],
    ids=["d19_vanished", "d19_cut", "d19_emptied"],
)  # fmt: skip
def test_d19_a_scan_that_changes_after_the_check(tiny_cohort, tmp_path, capsys, monkeypatch, change):
    cohort, run = tmp_path / "cohort", tmp_path / "run"
    shutil.copytree(tiny_cohort, cohort)
    build = SliceCache.build.__func__

    def later(cls, *arguments, **how):
        change(cohort / "p1" / "p1_t1.nii.gz")
        return build(cls, *arguments, **how)

    monkeypatch.setattr(SliceCache, "build", classmethod(later))
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"train": ["p0", "p1"], "val": ["p2"], "test": ["p3"]}))
    start = time.monotonic()
    assert cli(*training(cohort, run, "--split", split)) == 3
    assert time.monotonic() - start < 5
    ((code, line),) = errors(capsys)
    assert code in ("UNREADABLE", "NII_TRUNC", "NII_CRC", "NII_EMPTY", "FILE_CHANGED")
    assert "p1/t1" in line
    assert not run.exists()


def test_d19_a_scan_that_becomes_another_sound_one_after_the_check(tiny_cohort, tmp_path):
    cohort = tmp_path / "cohort"
    shutil.copytree(tiny_cohort, cohort)
    found, config = discover(cohort), DataConfig(image_size=24)
    seen = check_cohort(found, contrasts=["t1", "t2"]).seen
    assert len(SliceCache.build(tmp_path / "a", found, ["p0", "p1"], config, seen=seen)) > 0
    shutil.copy(cohort / "p3" / "p3_t1.nii.gz", cohort / "p1" / "p1_t1.nii.gz")
    with pytest.raises(PhmdiffError) as caught:
        SliceCache.build(tmp_path / "b", found, ["p0", "p1"], config, seen=seen)
    assert (caught.value.code, caught.value.exit_code, caught.value.subject) == ("FILE_CHANGED", 3, "p1")
    assert not (tmp_path / "b").exists()


def replaced(path: Path) -> None:
    shutil.copy(path, path.with_name("other"))
    os.replace(path.with_name("other"), path)


@pytest.mark.parametrize("name", ["slices.bin", "foreground.bin"])
@pytest.mark.parametrize(
    "change",
    [Path.unlink, lambda path: os.truncate(path, 0), lambda path: os.truncate(path, path.stat().st_size - 1), replaced],
    ids=["d19_deleted", "d19_emptied", "d19_cut", "d19_replaced"],
)
@pytest.mark.parametrize("workers", [0, 2])
def test_d19_a_cache_that_changes_while_a_training_reads_it(
    tiny_cohort, tmp_path, capsys, monkeypatch, name, change, workers
):
    """A mapped file would end the process with SIGBUS, or give zeros."""
    run, batch, calls = tmp_path / "run", SliceCache.batch, []

    def later(cache, rows, **how):
        if len(rows) == 4:  # a batch of the training
            calls.append(rows)
        if len(calls) == 3:
            with contextlib.suppress(FileNotFoundError):  # another worker was there first
                change(cache.folder / name)
        return batch(cache, rows, **how)

    monkeypatch.setattr(SliceCache, "batch", later)
    start = time.monotonic()
    assert cli(*training(tiny_cohort, run), "--set", "train.steps=40", "--workers", workers) == 3
    assert time.monotonic() - start < 10
    ((code, line),) = [told for told in errors(capsys) if told[0] != "MORE"]
    assert code == "CACHE_CHANGED"
    assert str(run / "cache" / name) in line
    assert workers or len(calls) == 3


# ---------------------------------------------------------------- D20 to D23: people, settings, outputs


def test_d20_one_person_in_two_parts_or_under_two_names(tiny_cohort, tmp_path, capsys):
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"train": ["p0", "p1"], "test": ["p1"]}))
    assert cli(*training(tiny_cohort, tmp_path / "r", "--split", split)) == 3
    assert codes(capsys) == ["LEAK"]
    cohort = tmp_path / "cohort"
    shutil.copytree(tiny_cohort, cohort)
    (cohort / "p9").mkdir()
    for contrast in ("t1", "t2"):  # the same voxels in another file: stored as float, not packed
        image = nib.load(cohort / "p0" / f"p0_{contrast}.nii.gz")
        image.set_data_dtype(np.float32)
        nib.save(image, cohort / "p9" / f"p9_{contrast}.nii")
    assert cli(*training(cohort, tmp_path / "r")) == 3
    told = errors(capsys)
    assert [code for code, _ in told] == ["LEAK", "LEAK"]
    assert all("p9" in line and "p0" in line for _, line in told)
    (tmp_path / "twice.csv").write_text(
        "subject,contrast,path\n" + "\n".join(f"p0,t1,cohort/p{n}/p{n}_t1.nii.gz" for n in (0, 1))
    )
    assert cli("check", tmp_path / "twice.csv", "--quiet") == 3
    assert codes(capsys) == ["DUPLICATE"]
    assert not (tmp_path / "r").exists()


def test_d21_nobody_or_too_few(tiny_cohort, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.csv").write_text("subject,contrast,path\n")
    for data in (tmp_path / "empty", tmp_path / "empty.csv", tmp_path / "none"):
        for command in (["check", data, "--quiet"], training(data, tmp_path / "r")):
            assert cli(*command) == 3
            assert codes(capsys)[0] in ("DATA_EMPTY", "UNREADABLE")
    assert cli(*training(tiny_cohort, tmp_path / "r", "--set", "train.batch_size=500")) == 3
    ((code, line),) = errors(capsys)
    assert code == "TOO_FEW_SLICES"
    assert re.search(r"\b\d+ training slices for a batch of 500", line)
    one = tmp_path / "one"
    shutil.copytree(tiny_cohort / "p0", one / "p0")
    assert cli(*training(one, tmp_path / "r")) == 3
    assert codes(capsys) == ["TOO_FEW"]


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("train.lrr=1", "did you mean 'lr'"), ("trian.lr=1", "did you mean 'train'"), ("data.nann='zero'", "'nan'"),
        ("train.lr=nan", "train.lr"), ("train.lr=inf", "train.lr"), ("train.lr='fast'", "train.lr"),
        ("train.lr=-1", "train.lr"), ("train.batch_size=1.5", "train.batch_size"), ("train.batch_size=0", "batch_size"),
        ("data.image_size='big'", "data.image_size"), ("data.nan='ignore'", "data.nan"),
        ("data.max_volume_gib=0", "data.max_volume_gib"), ("data.max_volume_gib=nan", "data.max_volume_gib"),
        ("train.flip=3", "train.flip"), ("data=1", "data"), ("lr", "TABLE.KEY=VALUE"), ("model.levels=[]", "levels"),
    ],
)  # fmt: skip
def test_d22_wrong_settings_are_refused_with_the_key(tiny_cohort, tmp_path, capsys, setting, told):
    assert cli(*training(tiny_cohort, tmp_path / "r"), "--set", setting) == 2
    ((code, line),) = errors(capsys)
    assert code.startswith("CONFIG_")
    assert told in line
    assert not (tmp_path / "r").exists()


SECRETS = {field: f"SECRET-{field}"[:10].encode() for field in ("descrip", "aux_file", "intent_name", "db_name")}
EXTENSION = b"SECRET-extension: Jane Doe, 1970-01-01"


def secret_scan(path: Path, voxels: np.ndarray) -> None:
    image = nib.Nifti1Image(voxels, AFFINE)
    for field, text in SECRETS.items():
        image.header[field] = text
    for code in ("comment", "dicom", "afni"):
        image.header.extensions.append(nib.nifti1.Nifti1Extension(code, EXTENSION))
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)


def holds_secret(path: Path) -> bool:
    raw = path.read_bytes()
    unpacked = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else b""
    return b"SECRET" in raw or b"SECRET" in unpacked or b"Jane" in raw or b"Jane" in unpacked


def test_d23_no_text_of_an_input_gets_into_any_output(tmp_path, capsys):
    cohort, run, out = tmp_path / "cohort", tmp_path / "run", tmp_path / "out"
    for number in range(4):
        for contrast, voxels in phantom(number).items():
            secret_scan(cohort / f"p{number}" / f"p{number}_{contrast}.nii.gz", voxels)
    given = cohort / "p3" / "p3_t1.nii.gz"
    assert holds_secret(given)
    unpacked = gzip.decompress(given.read_bytes())
    assert all(text in unpacked for text in [*SECRETS.values(), EXTENSION])
    assert cli("check", cohort, "--html", tmp_path / "page.html", "--quiet") == 0
    assert cli(*training(cohort, run)) == 0
    assert cli("sample", run, cohort, "--out", out, "--quiet") == 0
    assert cli("evaluate", run, cohort, "--json", tmp_path / "table.json", "--quiet") == 0
    said = capsys.readouterr()
    assert not any(word in said.out + said.err for word in ("SECRET", "Jane"))
    made = [path for path in tmp_path.rglob("*") if path.is_file() and cohort not in path.parents]
    assert sum(path.suffixes[-2:] == [".nii", ".gz"] for path in made) == 4
    assert {".json", ".html", ".toml", ".jsonl", ".bin", ".safetensors"} <= {path.suffix for path in made}
    assert [path for path in made if holds_secret(path)] == []
    image = nib.load(out / "p3_t2_syn.nii.gz")
    assert not image.header.extensions
    assert image.header["descrip"].item() == b"SYNTHETIC phmdiff-fast"
    assert not any(image.header[field].item() for field in ("aux_file", "intent_name", "db_name"))


def test_d23_an_output_that_exists_is_kept(trained, tiny_cohort, tmp_path, capsys):
    out, table, page = tmp_path / "out", tmp_path / "table.json", tmp_path / "page.html"
    out.mkdir()
    kept = [out / "p3_t2_syn.nii.gz", table, page]
    for path in kept:
        path.write_text("mine")
    commands = [["sample", trained, tiny_cohort / "p3", "--out", out], ["check", tiny_cohort, "--html", page],
                ["evaluate", trained, tiny_cohort, "--json", table]]  # fmt: skip
    for command in commands:
        assert cli(*command, "--quiet") == 2
        assert codes(capsys) == ["OUTPUT_EXISTS"]
    assert [path.read_text() for path in kept] == ["mine"] * 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "page.html", "table.json"]
    for command in commands:
        assert cli(*command, "--quiet", "--overwrite") == 0
    assert all(path.stat().st_size > 100 for path in kept)


# ---------------------------------------------------------------- hostile files, and the torture


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name.replace(" ", "_"))
def test_hostile_data(tmp_path, capsys, kind):
    arguments = kind.make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with within(10):
        code = cli("check", *arguments, "--quiet")
    said = capsys.readouterr()
    assert code == kind.exit_code, said.err
    found = [LINE.fullmatch(line) for line in said.err.splitlines()]
    assert found, "no error told"
    assert all(found), said.err[:500]
    assert {match[1] for match in found} <= set(kind.codes), said.err[:500]
    assert max(map(len, said.err.splitlines())) <= 2100
    assert CANARY[:16] not in said.out + said.err
    assert not (tmp_path / RAN).exists()
    assert sorted(tmp_path.rglob("*")) == before


def test_there_are_enough_kinds_of_hostile_data():
    assert len({kind.name for kind in KINDS}) == len(KINDS) >= 15


def test_torture_of_the_reader():
    """The short form; ``python tests/faults/reader_torture.py --count 10000`` is the long one."""
    start = time.monotonic()
    told = reader_torture.run(400, seed=11, flip_count=0, bomb_count=6)
    assert told["failures"] == []
    figures = told["mutated"]
    assert (figures["files"], figures["crashes"], figures["hangs"]) == (400, 0, 0)
    assert figures["refused"] + figures["accepted"] == 400
    assert figures["refused"] > 200
    assert len(figures["codes"]) >= 7
    assert time.monotonic() - start < 30


def test_the_torture_finds_what_it_is_for(tmp_path, monkeypatch):
    """A reader that dies, hangs, eats memory, talks nonsense or gives voxels that are none is told as such."""
    path = tmp_path / "x.nii"
    path.write_bytes(nifti())
    reader = reader_torture.Child()
    good = reader.ask(path, None)
    assert "broken" not in good
    reader.process.kill()
    assert reader.ask(path, None)["outcome"] == "crash"
    assert reader.ask(path, None)["digest"] == good["digest"]  # another child goes on
    monkeypatch.setattr(reader_torture, "DEAD", 0.3)
    os.kill(reader.process.pid, signal.SIGSTOP)
    assert reader.ask(path, None)["outcome"] == "hang"
    assert reader.end() == 0

    def wrong(*_, **__):
        raise PhmdiffError("NII_FORMAT", "two\nlines")

    monkeypatch.setattr(reader_torture, "read_scan", wrong)
    assert "broken" in reader_torture.look(str(path), None)
    monkeypatch.setattr(reader_torture, "read_scan", lambda *_, **__: 1 / 0)
    assert reader_torture.look(str(path), None)["outcome"] == "crash"


def test_reading_brings_no_torch_and_takes_little_memory(tmp_path):
    paths = []
    for name, content in (("a.nii.gz", gzip.compress(nifti())), ("b.mha", mha(packed=True))):
        paths.append(tmp_path / name)
        paths[-1].write_bytes(content)
    done = fresh(
        "from phmdiff_fast.mha import read_scan\n"
        "for path in sys.argv[1:]: read_scan(path)\n"
        "print('torch' in sys.modules, peak())", *paths,
    )  # fmt: skip
    loaded, mib = done.stdout.split()
    assert loaded == "False"
    assert float(mib) < 200
    assert "torch" not in fresh("import phmdiff_fast.nifti; print(*sys.modules)").stdout.split()


def test_d19_a_scan_exchanged_between_check_and_cache_is_refused(tiny_cohort, tmp_path, monkeypatch, capsys):
    from phmdiff_fast import run_folder

    cohort = shutil.copytree(tiny_cohort, tmp_path / "cohort")
    real = run_folder.check_cohort

    def then_exchanged(*given, **more):
        report = real(*given, **more)
        shutil.copy(cohort / "p1" / "p1_t1.nii.gz", cohort / "p0" / "p0_t1.nii.gz")
        return report

    monkeypatch.setattr(run_folder, "check_cohort", then_exchanged)
    assert cli("train", cohort, "--source", "t1", "--target", "t2", "--out", tmp_path / "run", "--steps", 1,
               "--image-size", 24, "--quiet", *TINY) == 3  # fmt: skip
    assert "error[FILE_CHANGED]" in capsys.readouterr().err
