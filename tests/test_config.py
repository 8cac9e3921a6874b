"""Settings: precedence, round trip, and one clear line for every mistake."""

from __future__ import annotations

import pytest

from phmdiff_fast import cli
from phmdiff_fast.config import PRESETS, Config, build_config, load_toml, parse_set, tomllib
from phmdiff_fast.errors import PhmdiffError


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_valid_and_survives_toml(preset):
    config = build_config(preset)
    assert Config.model_validate(tomllib.loads(config.to_toml())) == config
    model = config.model
    if preset == "paper":
        assert (config.train.lr, config.train.batch_size, config.train.mmd_weight) == (1e-6, 10, 0.5)
        assert (model.stem, model.head) == (False, False)
        assert model.prediction == "eps"
    else:
        sizes = {
            "xs": (6, 192, 3, 2, 96),
            "s4": (12, 384, 6, 4, 192),
            "b4": (12, 768, 12, 4, 384),
            "l4": (24, 1024, 16, 4, 512),
        }
        assert (model.depth, model.width, model.heads, model.decoder_depth, model.decoder_width) == sizes[preset]
        small = preset == "xs"  # minutes on a CPU: what the probe in docs/LOG.md found
        assert (model.patch, model.stem, model.head) == (8 if small else 4, True, True)
        kinds = ("pyramid", False, 0, 0.2) if small else ("flat", True, 1, 0.0)
        assert (model.head_kind, model.stem_to_tokens, model.members, config.train.ssim_weight) == kinds


def test_the_command_line_names_the_presets():
    assert cli.PRESETS.split("|") == list(PRESETS)


def test_later_tables_win():
    config = build_config("s4", {"train": {"lr": 0.1, "steps": 5}}, parse_set(["train.lr=0.2", "data.target=flair"]))
    assert (config.train.lr, config.train.steps, config.data.target, config.train.batch_size) == (0.2, 5, "flair", 32)


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        (["train.lrr=1"], "did you mean 'lr'"),
        (["trian.lr=1"], "did you mean 'train'"),
        (["train.lr=nan"], "train.lr"),
        (["train.lr='fast'"], "train.lr"),
        (["train.lr=-1"], "greater than 0"),
        (["train=3"], "TABLE.KEY=VALUE"),
        (["model.width=190"], "width"),
        (["model.prediction=x1"], "'x0'"),
        (["model.coarse_noise=2000"], "coarse_noise"),
        (["model.decoder_input=token", "model.learn_variance=true"], "token"),
        (["model.residual=true", "model.prediction=v"], "residual"),
        (["model.denoiser=convolutions", "model.coarse=teacher"], "convolutions"),
        (["model.denoiser=convolutions", "model.head_width=12"], "head_width"),
        (["sample.views=2", "data.axis=sagittal"], "left and right"),
        (["data.hu_window=[100, -100]"], "hu_window"),
        (["sample.sampler=euler"], "'ddpm'"),
        (["data.target=t1"], "also a source"),
        (["data.sources=[]"], "data.sources"),
    ],
)
def test_mistakes_are_named_with_exit_code_2(items, expected):
    with pytest.raises(PhmdiffError) as caught:
        build_config("xs", parse_set(items))
    assert expected in caught.value.line()
    assert "\n" not in caught.value.line()
    assert caught.value.exit_code == 2


def test_files_that_are_no_settings(tmp_path):
    (tmp_path / "a.toml").write_text("[train\n")
    for path in (tmp_path / "a.toml", tmp_path / "missing.toml"):
        with pytest.raises(PhmdiffError) as caught:
            load_toml(path)
        assert caught.value.exit_code == 2
        assert str(path) in caught.value.line()
    with pytest.raises(PhmdiffError, match="did you mean 'xs'"):
        build_config("xss")
