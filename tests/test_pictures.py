"""Pictures: what is shown where, upright, on fixed scales; nothing left behind on failure."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from phmdiff_fast import pictures
from phmdiff_fast.errors import PhmdiffError


def row(value=0.0, side=(32, 40), **more):
    truth = np.full(side, value)
    return {"label": "p1\nslice 3", "source": truth, "synthesized": truth, "truth": truth, **more}


def panels(path):
    """Boxes (left, right) of the pictures in a one-row strip, and its pixels (H, W, 3) as int."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    middle = pixels[pixels.shape[0] // 2]
    filled = (middle.sum(1) < 755).astype(int)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], filled, [0]])))
    boxes = [(a, b) for a, b in edges.reshape(-1, 2) if b - a > 100]
    return boxes, pixels


def test_columns_in_order_and_error_on_a_fixed_scale(tmp_path):
    truth = np.full((32, 32), 0.0)
    one = row(side=(32, 32), source=[truth - 1, truth - 0.5], synthesized=truth + 0.5, truth=truth)
    path = pictures.strip(tmp_path / "s.png", [one], title="T1 to T2")
    boxes, pixels = panels(path)
    assert len(boxes) == 5
    y = pixels.shape[0] * 2 // 3
    seen = [pixels[y, (a + b) // 2] for a, b in boxes]
    # grey runs from -1 (black) to 1 (white); |error| 0.5 is the end of the map
    for colour, value in zip(seen[:4], (-1, -0.5, 0.5, 0), strict=True):
        np.testing.assert_allclose(colour, 127.5 * (value + 1), atol=3)
    from matplotlib import colormaps

    np.testing.assert_allclose(seen[4], 255 * np.array(colormaps[pictures.ERROR_MAP](1.0)[:3]), atol=4)


def test_images_are_turned_upright(tmp_path):
    image = np.full((40, 40), -1.0)  # [x, y]: bright at high x (right) and high y (front)
    image[30:, 30:] = 1
    boxes, pixels = panels(pictures.strip(tmp_path / "s.png", [row(side=(40, 40), truth=image, source=image)]))
    a, b = boxes[2]  # the truth: no letters on it
    width = b - a
    bottom = pixels.shape[0] - int(0.1 * pictures.DPI)
    corner = {
        (v, h): pixels[int(bottom - width * (0.9 if v == "front" else 0.1)), int(a + width * h), 0]
        for v in ("front", "back") for h in (0.1, 0.9)
    }  # fmt: skip
    assert corner["front", 0.9] > 240
    assert max(corner["front", 0.1], corner["back", 0.1], corner["back", 0.9]) < 15


def test_each_other_method_has_its_picture_and_its_error(tmp_path):
    others = {"lookup": np.full((32, 40), 0.1), "unet_l1": np.full((32, 40), 0.2)}
    boxes, pixels = panels(pictures.strip(tmp_path / "s.png", [row(others=others)]))
    assert len(boxes) == 1 + 2 + 1 + 1 + 3
    y = pixels.shape[0] * 2 // 3
    errors = [pixels[y, (a + b) // 2].sum() for a, b in boxes[5:]]
    assert errors[1] > errors[0] > errors[2]  # |0.2| > |0.1| > ours, which is right


def test_paper_is_white_and_the_file_small(tmp_path):
    rng = np.random.default_rng(0)
    noisy = row(side=(64, 64), synthesized=rng.uniform(-1, 1, (64, 64)))
    path = pictures.strip(tmp_path / "s.png", [noisy] * 3)
    assert np.asarray(Image.open(path).convert("RGB"))[0, 0].tolist() == [255, 255, 255]
    assert path.stat().st_size < 300_000


def test_same_rows_same_bytes(tmp_path):
    a, b = (pictures.strip(tmp_path / name, [row(0.3)]).read_bytes() for name in ("a.png", "b.png"))
    assert a == b


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "at least one row"),
        ([row(), row(others={"lookup": np.zeros((32, 40))})], "different columns"),
        ([row(synthesized=np.zeros((40, 32)))], "'synthesized' is"),
        ([row(source=[np.zeros((32, 40))], source_names=["t1", "flair"])], "names"),
    ],
)
def test_rows_that_do_not_fit_are_refused(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        pictures.strip(tmp_path / "s.png", rows)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def figure(monkeypatch):
    """The matplotlib figure that is about to be saved; nothing is written."""
    seen = {}
    monkeypatch.setattr(pictures, "_save", lambda path, canvas, palette=None: seen.update(figure=canvas.figure))
    return lambda draw, *args, **more: (draw("x.png", *args, **more), seen["figure"])[1]


def texts(figure):
    return [text.get_text() for place in (figure, *figure.axes) for text in place.texts]


@pytest.mark.parametrize(("axis", "sides"), [("axial", "LR"), ("coronal", "LR"), ("sagittal", "PA")])
def test_sides_are_marked_once_by_the_axis(figure, axis, sides):
    drawn = figure(pictures.strip, [row(), row()], axis=axis)
    marks = [(text.get_text(), text.get_position()[0] > 0.5) for axes in drawn.axes for text in axes.texts]
    assert marks == [(sides[0], False), (sides[1], True)]
    with pytest.raises(ValueError, match="unknown axis 'oblique'"):
        pictures.strip("x.png", [row()], axis="oblique")


def pyramid(value=0.0, side=(64, 48), levels=3):
    return [np.full((side[0] >> n, side[1] >> n), value) for n in range(levels)]


def test_levels_go_from_coarse_to_fine_with_the_psnr_of_each(figure):
    estimates = [truth + error for truth, error in zip(pyramid(), (0.2, 0.02, 0.0), strict=True)]
    rows = [{"label": f"p{i}", "estimates": estimates, "truths": pyramid()} for i in range(2)]
    shown = texts(figure(pictures.levels, rows, title="Levels"))
    heads = ["level 2\n16 x 12", "level 1\n32 x 24", "level 0\n64 x 48"]
    assert [text for text in shown if text.startswith("level")] == heads
    psnr = ["exact", "40.00 dB", "20.00 dB"]  # 10 log10(4 / 0.2^2) = 20
    assert [text for text in shown if text.endswith("dB") or text == "exact"] == psnr * 2
    assert shown.count("estimate") == shown.count("truth") == 2


def test_levels_are_enlarged_in_whole_pixels_and_upright(tmp_path):
    rng = np.random.default_rng(0)
    truths = [np.where(rng.random((32 >> n, 32 >> n)) < 0.5, -1.0, 1.0) for n in range(2)]
    estimates = [-truth for truth in truths]
    estimates[1] = truths[1]
    path = pictures.levels(tmp_path / "l.png", [{"label": "p", "estimates": estimates, "truths": truths}])
    pixels = np.asarray(Image.open(path).convert("L")).astype(int)

    def places(image, enlarged):
        """(row, column) wherever the enlarged image stands; the letters of the sides may hide a little."""
        block = 255 * np.kron(np.rot90(image) > 0, np.ones((enlarged, enlarged), int))
        windows = np.lib.stride_tricks.sliding_window_view(pixels, block.shape)
        likely = np.argwhere((np.abs(windows[:, :, ::16, ::16] - block[::16, ::16]) <= 2).mean((2, 3)) > 0.9)
        return [(y, x) for y, x in likely if (np.abs(windows[y, x] - block) <= 2).mean() > 0.97]

    (estimate,), (truth,) = places(estimates[0], 4), places(truths[0], 4)
    assert truth == (estimate[0] + 134, estimate[1])
    # The coarse level, which is right, stands twice, left of the fine one, in cells of the same size.
    assert places(truths[1], 8) == [(estimate[0], estimate[1] - 134), (truth[0], truth[1] - 134)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "at least one row"),
        ([{"label": "a", "estimates": pyramid()[:2], "truths": pyramid()}], "2 estimates and 3 truths"),
        ([{"label": "a", "estimates": [], "truths": []}], "no levels"),
        ([{"label": "a", "estimates": pyramid(side=(48, 64)), "truths": pyramid()}], "level 0 is"),
        ([{"label": "a", "estimates": pyramid(levels=n), "truths": pyramid(levels=n)} for n in (2, 3)], "different"),
    ],
)
def test_levels_that_do_not_fit_are_refused(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        pictures.levels(tmp_path / "s.png", rows)
    assert not list(tmp_path.iterdir())


def records(n):
    return [{"step": i, "loss": 1 / (i + 1)} for i in range(n)]


def test_curves_have_a_panel_for_each_kind_of_record(tmp_path):
    scores = [{"step": 0, "val_psnr": 20.0}, {"step": 9, "val_psnr": float("nan")}, {"step": 19, "val_psnr": 25.0}]
    widths = [
        Image.open(pictures.curves(tmp_path / f"{i}.png", log, title="run")).width
        for i, log in enumerate([records(60), scores, records(60) + scores])
    ]
    assert widths[0] == widths[1]
    assert widths[2] == 2 * widths[0]


def full_log(n=100):
    log = [
        {"step": i, "loss": 2 / (i + 1), "denoise": [1 / (i + 1), 2 / (i + 1), 3 / (i + 1)], "mmd": [0.1, -0.1, 0.0],
         "stage": "masked" if i < 60 else "unmasked"}
        for i in range(n)
    ]  # fmt: skip
    return [*log, {"step": n, "val_psnr": 24.0}]


def test_curves_show_the_levels_the_references_and_the_change_of_stage(figure):
    loss, psnr, denoise, mmd = figure(pictures.curves, full_log(), reference={"lookup table": 22.4, "U-Net": 24.1}).axes
    assert [axes.get_ylabel().split(",")[0] for axes in (loss, psnr, denoise, mmd)] == [
        "training loss", "validation PSNR (dB)", "denoising loss", "MMD$^2$",
    ]  # fmt: skip
    names = [text.get_text() for text in denoise.get_legend().get_texts()]
    assert names == ["level 0 (fine)", "level 1", "level 2 (coarse)"]
    first, last = denoise.lines[0], denoise.lines[2]
    np.testing.assert_allclose(last.get_ydata(), 3 * first.get_ydata())
    np.testing.assert_allclose(first.get_ydata()[0], np.mean([1, 1 / 2, 1 / 3, 1 / 4, 1 / 5]))
    assert (denoise.get_yscale(), mmd.get_yscale()) == ("log", "linear")  # an unbiased MMD^2 may be negative
    for axes in (loss, psnr, denoise, mmd):
        assert [60, 60] in [list(line.get_xdata()) for line in axes.lines]
        assert [(text.get_text(), text.get_position()[0]) for text in axes.texts if "best" not in text.get_text()] == [
            ("unmasked", 60)
        ]
    assert [text.get_text() for text in psnr.get_legend().get_texts()] == ["lookup table 22.40 dB", "U-Net 24.10 dB"]
    assert [24.1, 24.1] in [list(line.get_ydata()) for line in psnr.lines]


def test_curves_without_mmd_or_change_of_stage_leave_them_out(figure):
    log = [{**record, "mmd": [0.0, 0.0, 0.0], "stage": "masked"} for record in full_log()[:-1]]
    axes = figure(pictures.curves, log).axes
    assert [one.get_ylabel() for one in axes] == ["training loss", "denoising loss"]
    assert not [text for one in axes for text in one.texts]


def test_curves_bear_a_broken_run_and_refuse_an_empty_one(tmp_path):
    pictures.curves(tmp_path / "c.png", [*records(3), {"step": 3, "loss": float("nan")}])
    pictures.curves(tmp_path / "c.png", [{"step": 0, "loss": float("nan")}])
    with pytest.raises(ValueError, match="no loss"):
        pictures.curves(tmp_path / "d.png", [{"step": 1}])


def test_unwritable_folder_is_one_error_and_leaves_nothing(tmp_path):
    for draw, content in ((pictures.strip, [row()]), (pictures.curves, records(3))):
        with pytest.raises(PhmdiffError) as caught:
            draw(tmp_path / "nowhere" / "s.png", content)
        assert (caught.value.code, caught.value.exit_code) == ("OUTPUT_WRITE", 74)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(PhmdiffError):
        pictures.strip(tmp_path / "folder.png", [row()])
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder.png"]


def test_no_global_pyplot_state(tmp_path):
    code = (
        "import sys, numpy as np; from phmdiff_fast import pictures, metrics, report, simulate\n"
        "slow = {'matplotlib', 'scipy.ndimage', 'skimage', 'nilearn', 'PIL'} & set(sys.modules)\n"
        "assert not slow, slow\n"
        "z = np.zeros((16, 16)); pictures.strip(sys.argv[1], [dict(label='a', source=z, synthesized=z, truth=z)])\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "s.png")], check=True)
