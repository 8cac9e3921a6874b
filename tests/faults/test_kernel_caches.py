"""Caches of compiled kernels that somebody else could write to: row R7 of the fault matrix."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile

import pytest

from phmdiff_fast.errors import PhmdiffError
from phmdiff_fast.kernel_caches import private_kernel_caches

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no modes")
VARIABLES = {"triton": "TRITON_CACHE_DIR", "inductor": "TORCHINDUCTOR_CACHE_DIR"}
as_root = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root gives files away")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home of mode 0755, a sticky temporary folder for all beside it, and no settings."""
    for name in ("TRITON_HOME", "XDG_CACHE_HOME", *VARIABLES.values()):
        monkeypatch.setenv(name, "")  # so that what a test sets is forgotten afterwards
        monkeypatch.delenv(name)
    home, temporary = tmp_path / "home", tmp_path / "tmp"
    home.mkdir(mode=0o755)
    temporary.mkdir()
    temporary.chmod(0o1777)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    return home


def kept(home, name):
    return home / ".cache" / "phmdiff_fast" / "kernels" / name


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_r7_a_private_cache_is_left_alone_and_torch_s_default_in_tmp_is_not_used(home):
    cache = home / ".triton" / "cache"
    cache.mkdir(parents=True, mode=0o755)
    assert private_kernel_caches() == []
    assert "TRITON_CACHE_DIR" not in os.environ
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(kept(home, "inductor"))
    assert mode(kept(home, "inductor")) == mode(kept(home, "inductor").parent) == 0o700
    assert private_kernel_caches() == []  # a second time, with what the first has set


def test_r7_missing_folders_of_one_s_own_need_nothing(home, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(home / "kernels" / "triton"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(home / "kernels" / "inductor"))
    assert private_kernel_caches() == []
    assert os.environ["TRITON_CACHE_DIR"] == str(home / "kernels" / "triton")
    assert list(home.iterdir()) == []


@pytest.mark.parametrize("bits", [0o777, 0o775, 0o722, 0o1777])
@pytest.mark.parametrize("where", ["default", "TRITON_HOME", "TRITON_CACHE_DIR"])
def test_r7_a_cache_others_may_write_to_is_not_used(home, monkeypatch, bits, where):
    cache = {"default": home / ".triton" / "cache", "TRITON_HOME": home / "other" / ".triton" / "cache",
             "TRITON_CACHE_DIR": home / "kernels"}[where]  # fmt: skip
    cache.mkdir(parents=True)
    cache.chmod(bits)
    if where == "TRITON_HOME":
        monkeypatch.setenv(where, str(home / "other"))
    elif where == "TRITON_CACHE_DIR":
        monkeypatch.setenv(where, str(cache))
    (line,) = private_kernel_caches()
    assert str(cache) in line
    assert f"mode {bits:o}" in line
    assert os.environ["TRITON_CACHE_DIR"] == str(kept(home, "triton"))
    assert mode(kept(home, "triton")) == 0o700


def test_r7_torch_s_cache_where_it_was_set_to_a_shared_folder(home, monkeypatch):
    shared = home / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(shared))
    assert len(private_kernel_caches()) == 1
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(kept(home, "inductor"))


def test_r7_torch_s_default_in_a_temporary_folder_of_one_s_own_is_used(home, monkeypatch):
    own = home / "tmp"
    own.mkdir(mode=0o700)
    monkeypatch.setattr(tempfile, "tempdir", str(own))
    monkeypatch.setenv("LOGNAME", "an/na")
    assert private_kernel_caches() == []
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    theirs = own / "torchinductor_an_na"
    theirs.mkdir()
    theirs.chmod(0o777)
    assert str(theirs) in private_kernel_caches()[0]


@pytest.mark.parametrize("bits", [0o777, 0o1777])
@pytest.mark.parametrize("made", [True, False])
def test_r7_a_folder_that_others_could_replace_or_make_first_is_not_used(home, monkeypatch, bits, made):
    above = home / "scratch"
    above.mkdir()
    if made:
        (above / "kernels" / "mine").mkdir(parents=True)
    above.chmod(bits)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(above / "kernels" / "mine"))
    lines = private_kernel_caches()
    if made and bits == 0o1777:  # sticky: what is ours there stays ours
        assert lines == []
    else:
        assert "others may write to" in lines[0]
        assert os.environ["TRITON_CACHE_DIR"] == str(kept(home, "triton"))


def test_r7_a_link_is_judged_by_where_it_leads(home, monkeypatch):
    cache = home / "kernels"
    cache.symlink_to(home / "real")
    (home / "real").mkdir(mode=0o700)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    assert private_kernel_caches() == []
    (home / "real").chmod(0o777)
    assert len(private_kernel_caches()) == 1
    (home / "loop").symlink_to(home / "loop")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(home / "loop"))
    assert len(private_kernel_caches()) == 1


@as_root
def test_r7_somebody_else_s_link_in_a_sticky_folder_is_not_followed(home, tmp_path, monkeypatch):
    (home / "mine").mkdir(mode=0o700)
    link = tmp_path / "tmp" / "link"
    link.symlink_to(home / "mine")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(link))
    assert private_kernel_caches() == []
    os.lchown(link, 12345, 12345)
    assert "others may write to" in private_kernel_caches()[0]


@as_root
def test_r7_somebody_else_s_folder_is_not_used(home):
    cache = home / ".triton" / "cache"
    cache.mkdir(parents=True, mode=0o755)
    os.chown(cache, 12345, 12345)
    assert "belongs to user 12345" in private_kernel_caches()[0]
    cache.rmdir()
    os.chown(cache.parent, 12345, 12345)
    os.environ.pop("TRITON_CACHE_DIR")
    assert "belongs to user 12345" in private_kernel_caches()[0]


def refused(path):
    with pytest.raises(PhmdiffError) as caught:
        private_kernel_caches()
    assert (caught.value.code, caught.value.exit_code) == ("KERNEL_CACHE", 8)
    assert str(path) in caught.value.line()
    assert "\n" not in caught.value.line()


def test_r7_where_no_folder_is_private_it_is_refused(home):
    own = kept(home, "inductor")
    own.mkdir(parents=True)
    for path, bits in ((own, 0o777), (own, 0o750), (own.parent, 0o777)):
        own.chmod(0o700)
        own.parent.chmod(0o700)
        path.chmod(bits)
        refused(path)
    own.chmod(0o700)
    own.parent.chmod(0o700)
    home.chmod(0o777)
    refused(own.parent)


def test_r7_a_link_in_the_place_of_the_private_folder_is_refused(home, tmp_path):
    kept(home, "").mkdir(parents=True, mode=0o700)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    kept(home, "inductor").symlink_to(elsewhere)
    refused(kept(home, "inductor"))
    kept(home, "inductor").unlink()
    kept(home, "inductor").write_text("a file")
    refused(kept(home, "inductor"))


@as_root
def test_r7_somebody_else_s_private_folder_is_refused(home):
    kept(home, "inductor").mkdir(parents=True, mode=0o700)
    kept(home, "").chmod(0o700)
    os.chown(kept(home, "inductor"), 12345, 12345)
    refused(kept(home, "inductor"))


def test_r7_the_user_s_cache_folder_may_lie_elsewhere(home, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    private_kernel_caches()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "xdg" / "phmdiff_fast" / "kernels" / "inductor")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    private_kernel_caches()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(kept(home, "inductor"))


def test_r7_without_a_home_to_write_to_there_is_a_folder_for_this_run(home, tmp_path):
    """In a process of its own, whose end removes it again."""
    blocked = tmp_path / "file"
    blocked.write_text("no folder can be made below a file")
    code = """
import os, sys
from phmdiff_fast.kernel_caches import private_kernel_caches
private_kernel_caches()
folder = os.environ["TORCHINDUCTOR_CACHE_DIR"]
print(folder, oct(os.stat(folder).st_mode & 0o777), "torch" in sys.modules)
"""
    environment = {**os.environ, "XDG_CACHE_HOME": str(blocked / "below"), "TMPDIR": str(tmp_path / "tmp")}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    folder, bits, torch = ran.stdout.split()
    assert folder.startswith(str(tmp_path / "tmp" / "phmdiff_fast_inductor_"))
    assert (bits, torch) == ("0o700", "False")
    assert not os.path.exists(folder)


def test_r7_torch_and_triton_keep_their_kernels_there(home):
    """What they themselves say, in a process of its own."""
    code = """
from phmdiff_fast.kernel_caches import private_kernel_caches
private_kernel_caches()
from torch._inductor.runtime.cache_dir_utils import cache_dir
print(cache_dir())
try:
    from triton import knobs
    print(knobs.cache.dir)
except ImportError:
    pass
"""
    (home / ".triton" / "cache").mkdir(parents=True)
    (home / ".triton" / "cache").chmod(0o777)
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60,
                         env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    inductor, *triton = ran.stdout.split()
    assert inductor == str(kept(home, "inductor"))
    assert triton in ([], [str(kept(home, "triton"))])
