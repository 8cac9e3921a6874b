"""The FLOP of a step, against PyTorch's own counter on the real loss; peaks of devices by their names."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from phmdiff_fast import attention, blocks
from phmdiff_fast.config import LevelSpec, ModelConfig, TrainConfig, build_config
from phmdiff_fast.flops import Peak, best_peak, measured_peak, mmd_flops, peak, peak_of, step_flops
from phmdiff_fast.phmdiff import PHMDiff

SMALL = dict(depth=2, width=32, heads=2, decoder_depth=1, decoder_width=16, decoder_heads=2, patch=4, stem_width=8,
             head_width=8, levels=[LevelSpec(mask_ratio=r) for r in (0.75, 0.5, 0.25)])  # fmt: skip
VARIANTS = {
    "noisy": {},
    "token": dict(decoder_input="token"),
    "diffmae": dict(reading="diffmae"),
    "no stem": dict(stem=False),
    "no head": dict(head=False),
    "plain": dict(stem=False, head=False, patch=8),
    "pyramid head": dict(head_kind="pyramid", stem_to_tokens=False),
    "pyramid head and tokens": dict(head_kind="pyramid"),
    "pyramid head without stem": dict(head_kind="pyramid", stem=False),
    "pyramid without head": dict(head_kind="pyramid", head=False),
    "variance": dict(learn_variance=True),
    "teacher": dict(coarse="teacher"),
    "cascade": dict(coupling="cascade"),
    "one level": dict(levels=[LevelSpec(mask_ratio=0.5)], mlp_ratio=2.5),
}


def counted(model: PHMDiff, masked: bool, size: tuple[int, int], channels: int, batch: int, backward=False) -> int:
    """What FlopCounterMode counts in one loss, without an MMD.

    With attention as products and the plain block, which computes nothing twice: it cannot look into our operations.
    """
    lacking = {torch.ops.aten.addmm_: lambda start, a, b, **_: 2 * a[0] * a[1] * b[1]}
    images = torch.rand(batch, channels + 1, *size) * 2 - 1
    train = TrainConfig(mmd_weight=0.0)
    plain = mock.patch.object(blocks, "serves", return_value=False)
    with plain, attention.use("products"), FlopCounterMode(display=False, custom_mapping=lacking) as counter:
        terms = model.loss(images[:, :1], images[:, 1:], torch.arange(batch), (0, 1), train, masked=masked)
        if backward:
            terms.total.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_is_what_torch_counts(variant, masked):
    config = ModelConfig(**{**SMALL, **VARIANTS[variant]})
    model = PHMDiff(config, 2, complexity=[1.0, 0.8, 0.5][: len(config.levels)])
    found = counted(model, masked, (30, 33), 2, 3)  # padded to 32 x 48, or 32 x 64 with patch 8
    assert step_flops(config, 2, (30, 33), 3, masked, model.ratios).forward == found


def test_the_convolutional_denoiser_is_what_torch_counts_but_for_its_modulations():
    config = ModelConfig(**SMALL, denoiser="convolutions")
    found = counted(PHMDiff(config, 2, complexity=[1.0, 0.8, 0.5]), True, (32, 48), 2, 3)
    ours = step_flops(config, 2, (32, 48), 3, True).forward
    assert ours <= found < 1.02 * ours


@pytest.mark.parametrize("preset", ["xs", "s4"])
def test_presets_are_what_torch_counts(preset):
    config = build_config(preset=preset).model
    model = PHMDiff(config, 1)
    assert step_flops(config, 1, 32, 1, True).forward == counted(model, True, (32, 32), 1, 1)


def test_tokens_are_the_kept_and_all():
    config = ModelConfig(**SMALL)
    masked, whole = (step_flops(config, 1, 32, 5, how) for how in (True, False))
    assert (masked.encoder_tokens, masked.decoder_tokens) == (5 * (16 + 8 + 3), 5 * (64 + 16 + 4))
    assert whole.encoder_tokens == whole.decoder_tokens == masked.decoder_tokens
    assert masked.encoder < whole.encoder


def test_a_training_step_is_about_three_forwards():
    """Less, as nothing needs the images' gradient: by 1 % here, where the stem's first layer is small."""
    config = ModelConfig(**SMALL)
    model = PHMDiff(config, 1)
    torch.nn.init.normal_(model.net.heads[0].last.weight, std=0.1)
    cpu_count = counted(model, False, (32, 32), 1, 2, backward=True)
    flops = step_flops(config, 1, 32, 2, False)
    assert flops.training == 3 * flops.forward
    # No image needs a gradient, so the first layers have no product for it.
    assert 0.90 * flops.training < cpu_count <= flops.training


def test_mmd_counts_three_tables():
    config = ModelConfig(**SMALL)
    assert mmd_flops(config, 32, 4, 100) == 6 * 16 * (100**2 + 64**2 + 16**2)


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA B200", 2250),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A1000", None),
    ],
)
def test_peaks_by_name(name, tera):
    rate, source = peak_of(name, torch.bfloat16)
    assert rate == (None if tera is None else tera * 1e12)
    assert ("data sheet" in source) == (rate is not None)


def test_peak_of_a_type():
    assert peak_of("NVIDIA H200", torch.float32).flop_per_s == 67e12
    assert peak_of("NVIDIA H200", torch.float32, tf32=True).flop_per_s == 494e12
    assert peak_of("Tesla T4", torch.bfloat16).flop_per_s is None
    assert peak_of("NVIDIA H200", torch.float64).flop_per_s is None


def test_a_cpu_is_measured():
    cpu = torch.device("cpu")
    assert peak(cpu, torch.float32).flop_per_s is None
    found = best_peak(cpu, torch.float32)
    assert isinstance(found, Peak)
    assert found is measured_peak(cpu, torch.float32)  # once a process
    assert found.flop_per_s > 1e8
    assert "product measured here" in found.source


@pytest.mark.gpu
def test_a_gpu_does_less_than_its_data_sheet():
    cuda = torch.device("cuda")
    known, found = peak(cuda, torch.bfloat16), measured_peak(cuda, torch.bfloat16)
    assert found.flop_per_s > 1e12
    if known.flop_per_s:
        assert found.flop_per_s < 1.05 * known.flop_per_s
