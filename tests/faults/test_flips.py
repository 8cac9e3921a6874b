"""Single bits of checkpoints turned over: row C7 of the fault matrix. See ``flips.py``."""

from __future__ import annotations

import re

import flips
import pytest

from phmdiff_fast import checkpoint


def test_c7_a_flipped_bit_is_found_or_changes_nothing():
    figures = flips.run(300, seed=1)
    assert figures["wrong"] == []
    assert figures["found"] + figures["unchanged"] == figures["flips"] == 300
    assert figures["found"] > 280
    # All of both checkpoints: three groups and a manifest of one process, of two the groups in shards.
    assert len(figures["files"]) == 4 + 7


@pytest.fixture
def saved(tmp_path):
    folder = flips.save(tmp_path)[0]
    return folder, checkpoint.verify(folder), flips.groups()


@pytest.mark.parametrize(("letter", "bit"), [(rb"(?<=\d)e(?=-0)", 5), (rb"(?<=\\u00)e", 5)])
def test_c7_a_flip_of_which_nothing_is_read_changes_nothing(saved, letter, bit):
    folder, *rest = saved
    at = re.search(letter, (folder / "manifest.json").read_bytes()).start()
    assert flips.flipped(folder / "manifest.json", 8 * at + bit, *rest) == "unchanged"


def test_c7_the_search_finds_what_it_is_for(monkeypatch):
    """Without the hashes flipped weights are taken for the right ones."""

    class Same(str):
        def __ne__(self, other):
            return False

        __hash__ = str.__hash__

    monkeypatch.setattr(checkpoint, "sha256_of", lambda path: Same("0" * 64))
    wrong = flips.run(100)["wrong"]
    assert any("other content" in line for line in wrong)
    assert all(".safetensors" in line for line in wrong)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("how", ["gone", "half", "longer"])
def test_c7_a_file_that_is_gone_or_of_another_length_is_named(tmp_path, which, how):
    folder = flips.save(tmp_path)[which]
    assert checkpoint.newest(folder.parent).folder == folder
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        if how == "gone":
            path.unlink()
        else:
            path.write_bytes(content[: len(content) // 2] if how == "half" else content + b"\0")
        lines: list[str] = []
        assert checkpoint.newest(folder.parent, warn=lines.append) is None
        assert len(lines) == 1
        assert str(path) in lines[0]
        path.write_bytes(content)
    assert checkpoint.newest(folder.parent).folder == folder
