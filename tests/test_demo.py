"""The demo, short: from nothing to its page; and it never removes a folder that is not its own."""

from __future__ import annotations

import json

import pytest

from phmdiff_fast.demo import fresh_folder, run_demo
from phmdiff_fast.errors import PhmdiffError


@pytest.mark.slow
def test_from_nothing_to_one_page(tmp_path):
    pytest.importorskip("nilearn", reason="the demo's anatomy comes with nilearn (extra demo)")
    out = tmp_path / "demo"
    page = run_demo(out, minutes=0.02, num_subjects=5, image_size=32, progress=False)
    text = page.read_text()
    assert "simulated" in text
    assert "never for diagnosis" in text
    assert text.count("data:image/png;base64,") == 3  # one test person's strip, the levels and the curves
    assert (out / "check.html").read_text().count("<img") == 15  # five people: T1, T2 and the lesions
    assert "http://" not in text
    assert "https://" not in text
    rows = json.loads((out / "table.json").read_text())["rows"]
    assert {row["method"] for row in rows} == {"ours", "lookup", "unet_l1"}
    test_people = json.loads((out / "run" / "split.json").read_text())["test"]
    assert {p.name for p in (out / "synthesized").iterdir()} == {
        f"{s}_t2_syn.{e}" for s in test_people for e in ("nii.gz", "json")
    }
    with pytest.raises(PhmdiffError, match="OUTPUT_EXISTS"):
        run_demo(out, minutes=0.02, progress=False)
    fresh_folder(out, overwrite=True)
    assert not page.exists()


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_folder_of_somebody_else_is_never_removed(tmp_path, overwrite):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(PhmdiffError) as caught:
        fresh_folder(tmp_path, overwrite)
    assert (caught.value.code, caught.value.exit_code) == ("OUTPUT_EXISTS", 2)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
