"""Data that somebody made to do harm, or that looks like it: ``KINDS``, each a cohort that ``check`` must refuse.

A maker is given an empty folder and returns the arguments of ``phmdiff-fast check``. What lies in
``folder/outside`` must not be read: it holds CANARY. Nothing may create ``folder/RAN``.
"""

from __future__ import annotations

import gzip
import io
import os
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mutations
import numpy as np

CANARY = "canary 5d1f7c: nobody may read this"
RAN = "RAN"  # the file that hostile code would make


@dataclass(frozen=True)
class Kind:
    """``make(folder)`` -> arguments of check; ``codes`` that its errors may have; ``exit_code``."""

    name: str
    make: Callable[[Path], list]
    codes: tuple[str, ...]
    exit_code: int = 3


KINDS: list[Kind] = []


def kind(*codes: str, exit_code: int = 3):
    """The function is the maker of a kind; its name, with blanks, is the kind's."""

    def add(make):
        KINDS.append(Kind(make.__name__.replace("_", " "), make, codes, exit_code))
        return make

    return add


def outside(folder: Path) -> Path:
    """A file with CANARY beside the data."""
    path = folder / "outside" / "secret.txt"
    path.parent.mkdir(exist_ok=True)
    path.write_text(CANARY + "\n")
    return path


def place(folder: Path, name: str = "p_t1.nii.gz") -> Path:
    """Where a subject's scan lies."""
    path = folder / "data" / "p" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def scan(folder: Path, content: bytes, name: str = "p_t1.nii.gz") -> list:
    place(folder, name).write_bytes(content)
    return [folder / "data"]


def listed(folder: Path, subject: str, path: str) -> list:
    """A CSV list beside a sound scan, whose second line is this."""
    scan(folder, gzip.compress(mutations.nifti()))
    table = folder / "data" / "list.csv"
    table.write_text(f"subject,contrast,path\nsound,t1,p/p_t1.nii.gz\n{subject},t2,{path}\n")
    return [table]


def changed(**fields) -> bytes:
    """A .nii with header fields overwritten: a value, or {place: value}."""
    raw = bytearray(mutations.nifti((4, 5, 6), np.float32))
    header = np.ndarray((), mutations.FIELDS_TYPE, raw)
    for name, value in fields.items():
        for at, one in value.items() if isinstance(value, dict) else [((), value)]:
            header[name][at] = one
    return bytes(raw)


# ---------------------------------------------------------------- scans


@kind("NII_TOO_BIG")
def header_bomb(folder):
    return scan(folder, gzip.compress(changed(dim={1: 2048, 2: 2048, 3: 2048})))


@kind("NII_TOO_BIG")
def gzip_bomb(folder):
    raw = changed(dim={1: 256, 2: 256, 3: 256}, datatype=2, bitpix=8)
    return [*scan(folder, mutations.packed(raw[:352], 16 << 20, b"")), "--max-volume-gib", "0.01"]


@kind("NII_TOO_BIG")
def gzip_bomb_behind_the_voxels(folder):
    return scan(folder, mutations.packed(mutations.nifti(), 80 << 20, b""))


@kind("NII_TOO_BIG")
def gzip_with_a_gibibyte_of_padding(folder):
    arguments = scan(folder, gzip.compress(mutations.nifti()))
    os.truncate(place(folder), 1 << 30)  # takes no room on the disk
    return arguments


@kind("NII_FORMAT")
def gzip_in_gzip(folder):
    return scan(folder, gzip.compress(gzip.compress(gzip.compress(mutations.nifti()))))


@kind("NII_FORMAT")
def zip_file_called_nii_gz(folder):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("../../" + RAN, "out of the folder")
        archive.writestr("p_t1.nii", mutations.nifti())
    return scan(folder, out.getvalue())


class Harm:
    """Pickled: makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@kind("NII_FORMAT")
def pickle_called_nii_gz(folder):
    return scan(folder, pickle.dumps(Harm(folder / RAN)))


@kind("NII_FORMAT")
def packed_pickle(folder):
    return scan(folder, gzip.compress(pickle.dumps(Harm(folder / RAN))))


@kind("NII_FORMAT")
def a_web_page(folder):
    return scan(folder, b"<!DOCTYPE html><html><body>Please sign in</body></html>" * 20)


@kind("NII_HEADER")
def extension_that_claims_two_gibibytes(folder):
    raw = bytearray(changed(vox_offset=2.0**31))
    raw[348:360] = b"\1\0\0\0" + np.array([2**31 - 16, 6], "<i4").tobytes()
    return scan(folder, bytes(raw), "p_t1.nii")


@kind("NII_4D")
def four_dimensions(folder):
    return scan(folder, gzip.compress(changed(dim={0: 4, 1: 2, 2: 2, 3: 5, 4: 6})))


@kind("NII_HEADER")
def more_dimensions_than_there_are(folder):
    return scan(folder, gzip.compress(changed(dim={0: 32767})))


@kind("NII_NONFINITE")
def voxels_that_overflow(folder):
    return scan(folder, gzip.compress(changed(scl_slope=3e38, scl_inter=-3e38)))


@kind("NII_NONFINITE")
def signalling_nans(folder):
    raw = mutations.nifti((4, 5, 6), np.float32)
    return scan(folder, raw[:400] + b"\1\0\xa0\x7f" * 5 + raw[420:], "p_t1.nii")


@kind("NII_AFFINE")
def an_affine_of_nans(folder):
    return scan(folder, gzip.compress(changed(srow_x={0: np.nan, 1: np.inf})))


@kind("NII_HEADER")
def mha_that_names_another_file(folder):
    return scan(folder, mutations.mha().replace(b"LOCAL", str(outside(folder)).encode()), "mr.mha")


@kind("NII_HEADER")
def mha_that_names_a_list_of_files(folder):
    outside(folder)
    return scan(folder, mutations.mha().replace(b"LOCAL", b"LIST\n../../outside/secret.txt"), "mr.mha")


@kind("NII_4D")
def mha_of_99_dimensions(folder):
    return scan(folder, mutations.mha().replace(b"NDims = 3", b"NDims = 99"), "mr.mha")


@kind("NII_FORMAT")
def mha_of_blanks(folder):
    return scan(folder, b" " * 60_000 + b"\n", "mr.mha")


@kind("NII_HEADER")
def mha_with_a_number_of_five_thousand_digits(folder):
    return scan(folder, mutations.mha().replace(b"5 6 7", b"5 6 " + b"9" * 5000), "mr.mha")


@kind("NII_HEADER")
def mha_with_control_codes(folder):
    return scan(folder, mutations.mha().replace(b"5 6 7", b"\x1b]0;owned\x07\x9b31m\rerror 5 6"), "mr.mha")


# ---------------------------------------------------------------- what is no file


@kind("NOT_A_FILE")
def loop_of_links(folder):
    place(folder).symlink_to("p_t1.nii.gz")
    return [folder / "data"]


@kind("NOT_A_FILE")
def fifo(folder):
    os.mkfifo(place(folder))
    return [folder / "data"]


@kind("NOT_A_FILE")
def link_to_a_device(folder):
    place(folder).symlink_to("/dev/zero")
    return [folder / "data"]


@kind("NOT_A_FILE")
def folder_called_nii_gz(folder):
    arguments = listed(folder, "q", "q_t2.nii.gz")
    (folder / "data" / "q_t2.nii.gz").mkdir()
    return arguments


@kind("NII_FORMAT")
def link_out_of_the_cohort(folder):
    """Linked scans are read, as people link them from other disks; this one is no scan."""
    place(folder).symlink_to(outside(folder))
    return [folder / "data"]


@kind("DATA_EMPTY")
def folders_linked_in_a_circle(folder):
    place(folder).parent.joinpath("again").symlink_to("../..")
    (folder / "data" / "root").symlink_to("/")
    return [folder / "data"]


# ---------------------------------------------------------------- names


@kind("BAD_ID")
def a_name_with_line_breaks_and_control_codes(folder):
    (folder / "data").mkdir()
    (folder / "data" / "a\nphmdiff-fast: all is well\n\x1b[2J_t1.nii.gz").write_bytes(b"")
    return [folder / "data"]


@kind("BAD_ID")
def a_very_long_name(folder):
    (folder / "data").mkdir()
    (folder / "data" / ("x" * 240 + "_t1.nii.gz")).write_bytes(b"")
    return [folder / "data"]


@kind("BAD_ID")
def a_name_that_is_no_text(folder):
    (folder / "data").mkdir()
    (folder / "data" / os.fsdecode(b"\xff\xfe\x80_t1.nii.gz")).write_bytes(b"")
    return [folder / "data"]


@kind("BAD_ID")
def a_file_of_the_subject_dot_dot(folder):
    (folder / "data").mkdir()
    (folder / "data" / ".._t1.nii.gz").write_bytes(gzip.compress(mutations.nifti()))
    return [folder / "data"]


# ---------------------------------------------------------------- CSV lists


@kind("PATH_OUTSIDE")
def link_out_of_the_folder_of_a_list(folder):
    arguments = listed(folder, "q", "q.nii.gz")
    (folder / "data" / "q.nii.gz").symlink_to(outside(folder))
    return arguments


@kind("PATH_OUTSIDE")
def dot_dot_in_a_list(folder):
    outside(folder)
    return listed(folder, "q", "p/../../outside/secret.txt")


@kind("PATH_OUTSIDE")
def absolute_path_in_a_list(folder):
    return listed(folder, "q", str(outside(folder)))


@kind("BAD_ID")
def subject_dot_dot_in_a_list(folder):
    return listed(folder, "..", "p/p_t1.nii.gz")


@kind("BAD_ID")
def subject_with_a_path_in_a_list(folder):
    return listed(folder, f"../{RAN}", "p/p_t1.nii.gz")


@kind("BAD_ID")
def subject_with_control_codes_in_a_list(folder):
    return listed(folder, '"a\n\x1b[31mb"', "p/p_t1.nii.gz")


@kind("BAD_ID")
def subject_of_a_hundred_thousand_letters_in_a_list(folder):
    return listed(folder, "x" * 100_000, "p/p_t1.nii.gz")


@kind("CSV_FORMAT")
def list_of_one_line_of_a_gibibyte(folder):
    (folder / "data").mkdir()
    table = folder / "data" / "list.csv"
    table.write_text("subject,contrast,path\nq,t1,")
    os.truncate(table, 1 << 30)  # takes no room on the disk
    return [table]


@kind("CSV_FORMAT")
def list_with_a_field_without_end(folder):
    return listed(folder, '"' + "x" * 300_000, "y")


@kind("CSV_FORMAT")
def list_that_is_no_text(folder):
    (folder / "data").mkdir()
    table = folder / "data" / "list.csv"
    table.write_bytes(b"\xff\xfe\0" * 1000)
    return [table]


@kind("UNREADABLE")
def list_that_is_a_fifo(folder):
    os.mkfifo(folder / "list.csv")
    return [folder / "list.csv"]


# ---------------------------------------------------------------- split files


def split(folder: Path, content: str) -> list:
    (folder / "split.json").write_text(content)
    return [*scan(folder, gzip.compress(mutations.nifti())), "--split", folder / "split.json"]


@kind("SPLIT_FILE", exit_code=2)
def split_nested_a_hundred_thousand_deep(folder):
    return split(folder, '{"train": ' + "[" * 100_000 + "]" * 100_000 + "}")


@kind("SPLIT_FILE", exit_code=2)
def split_with_a_number_of_a_million_digits(folder):
    return split(folder, '{"train": [' + "9" * 1_000_000 + "]}")


@kind("SPLIT_FILE", exit_code=2)
def split_that_is_a_pickle(folder):
    arguments = split(folder, "")
    (folder / "split.json").write_bytes(pickle.dumps(Harm(folder / RAN)))
    return arguments


@kind("SUBJECT_UNKNOWN", exit_code=2)
def split_that_names_paths(folder):
    outside(folder)
    return split(folder, '{"train": ["../outside/secret", "/etc/passwd", "\\u001b[2J\\n"]}')
