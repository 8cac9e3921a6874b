"""Arithmetic of a training step, counted from its settings, and what a device could do at most.

"Model FLOPs": what the method asks for, not what an implementation spends. 2 FLOP a multiply-add; products,
convolutions and attention alone; a training step is 3 forward passes (the gradients by the inputs and by the
weights are one each, Chowdhery et al. 2022, appendix B); recomputed activations are not counted. Norms,
activations, the pyramids and the optimizer are not: they move bytes rather than multiply.

    products of a token    2 in out
    attention              4 N^2 D a sequence (Q K^T and P V), whatever the number of heads
    3x3 convolution        18 in out a pixel written
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from functools import lru_cache

import torch

from .config import ModelConfig
from .masking import num_kept

T_FREQUENCIES = 256  # sinusoids of a timestep, model.TimestepEmbedder


@dataclass(frozen=True)
class Flops:
    """FLOP of the forward pass of one step, by part, and its tokens; all of the whole batch."""

    embed: int  # patches to tokens, encoder's and decoder's
    encoder: int  # blocks on the visible tokens, and the projection to the decoder's width
    decoder: int  # blocks on all tokens
    head: int  # output projections and convolutions
    stem: int
    modulations: int  # timestep embedding and adaLN vectors
    encoder_tokens: int
    decoder_tokens: int

    @property
    def forward(self) -> int:
        return self.embed + self.encoder + self.decoder + self.head + self.stem + self.modulations

    @property
    def training(self) -> int:
        """Forward and backward: 3 times the forward."""
        return 3 * self.forward

    @property
    def tokens(self) -> int:
        """Tokens through a transformer block of either kind, once each."""
        return self.encoder_tokens + self.decoder_tokens

    def parts(self) -> dict[str, int]:
        """FLOP of the forward by part."""
        return {name: value for name, value in asdict(self).items() if not name.endswith("_tokens")}


def step_flops(
    config: ModelConfig, source_channels: int, image_size: int | tuple[int, int], batch: int, masked: bool,
    ratios: list[float] | None = None, *, target_channels: int = 1,
) -> Flops:  # fmt: skip
    """FLOP and tokens of one step of ``PHMDiff.loss``, the MMD apart (``mmd_flops``).

    image_size : side, or (H, W), before padding; batch : images, of all micro-batches together;
    masked : the pre-training with masks, else the unmasked stage; ratios : mask ratio of each level, fine to
    coarse (``PHMDiff.ratios``), None: those of the settings.
    """
    levels, p = len(config.levels), config.patch
    D, Dd = config.width, config.decoder_width
    ratios = [spec.mask_ratio for spec in config.levels] if ratios is None else ratios
    sides = _level_sides(image_size, p, levels)
    maps = [config.stem_width * 2 ** min(n, 2) * config.stem for n in range(levels)]
    if config.denoiser == "convolutions":
        areas = [height * width for height, width in sides]
        convolved = batch * sum(_conv_denoiser(config, source_channels, target_channels, area) for area in areas)
        return Flops(0, 0, 0, convolved, 0, 0, 0, 0)
    diffmae = config.reading == "diffmae"
    embed = encoder = decoder = head = encoder_tokens = decoder_tokens = 0
    for n, (height, width) in enumerate(sides):
        pixels = height * width
        N = pixels // p**2
        K = num_kept(N, ratios[n]) if masked else N
        coarse = target_channels * (n < levels - 1)
        clean = p * p * (source_channels + maps[n] * config.stem_to_tokens)
        values = clean + p * p * (target_channels + coarse)
        embed += 2 * K * D * (clean if diffmae else values)
        if diffmae:
            embed += 2 * N * Dd * values
        elif config.decoder_input == "noisy":
            embed += 2 * (N - K) * Dd * values
        encoder += config.depth * _block(K, D, config.mlp_ratio) + 2 * K * D * Dd
        decoder += config.decoder_depth * _block(N, Dd, config.mlp_ratio)
        encoder_tokens += K
        decoder_tokens += N
        outputs = target_channels * (2 if config.learn_variance else 1)
        wide = config.head_width if config.head else outputs
        head += 2 * pixels * Dd * wide
        if config.head:
            inputs = wide + source_channels + maps[n] + coarse
            if config.head_kind == "pyramid":
                if n < levels - 1:  # what the coarser level's head made, at its size
                    head += 2 * (pixels // 4) * (wide << min(n + 1, 2)) * (wide << min(n, 2))
                wide <<= min(n, 2)
            head += 2 * pixels * wide * (inputs + 2 * 9 * wide + 9 * outputs)
    return Flops(
        *(batch * part for part in (embed, encoder, decoder, head, _stem(config, source_channels, sides))),
        modulations=_modulations(config, batch),
        encoder_tokens=batch * encoder_tokens,
        decoder_tokens=batch * decoder_tokens,
    )


def mmd_flops(
    config: ModelConfig, image_size: int | tuple[int, int], batch: int, rows: int, *, target_channels: int = 1
) -> int:
    """FLOP of the products |a|^2 + |b|^2 - 2 a b of the MMD's forward, all levels: three n x n tables of d products.

    rows : ``train.mmd_rows``. A number for comparison: the blocks compute half of two of the tables.
    """
    total = 0
    for height, width in _level_sides(image_size, config.patch, len(config.levels)):
        n = min(rows, batch * height * width // config.patch**2)
        total += 3 * 2 * n * n * target_channels * config.patch**2
    return total


def _level_sides(image_size, patch: int, levels: int) -> list[tuple[int, int]]:
    """(H, W) of each level, fine to coarse, padded as ``PHMDiff.pad`` does."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    multiple = patch * 2 ** (levels - 1)
    height, width = (-(-side // multiple) * multiple for side in (height, width))
    return [(height >> n, width >> n) for n in range(levels)]


def _block(tokens: int, width: int, mlp_ratio: float) -> int:
    """A DiT block on one sequence, its modulation apart."""
    products = 2 * tokens * (4 * width * width + 2 * width * int(width * mlp_ratio))
    return products + 4 * tokens * tokens * width


def _stem(config: ModelConfig, channels: int, sides: list[tuple[int, int]]) -> int:
    """Convolutions over the sources of one slice."""
    if not config.stem:
        return 0
    widths = [config.stem_width * 2 ** min(n, 2) for n in range(len(sides))]
    pixels = [height * width for height, width in sides]
    total = 2 * 9 * channels * widths[0] * pixels[0]
    for n, (area, wide) in enumerate(zip(pixels, widths, strict=True)):
        total += 2 * 2 * 9 * wide * wide * area  # the two of a ResidualConv
        if n:  # down to here, and 1x1 back up
            goes_up = config.head and config.head_kind == "pyramid"  # then the head brings the context back up
            back = 0 if goes_up else wide * widths[n - 1]
            total += 2 * (9 * widths[n - 1] * wide + back) * area
    return total


def _conv_denoiser(config: ModelConfig, sources: int, targets: int, pixels: int) -> int:
    """The U-Net of ``conv_denoiser`` on one image; its modulations, a thousandth of it, apart."""
    w = config.head_width

    def block(inputs: int, width: int, shrunk: int) -> int:
        skip = inputs * width if inputs != width else 0
        return 2 * (9 * inputs * width + 9 * width * width + skip) * (pixels // shrunk)

    outputs = targets * (2 if config.learn_variance else 1)
    ends = 2 * 9 * w * (2 * targets + sources + outputs) * pixels
    down = block(w, w, 1) + block(w, 2 * w, 4) + block(2 * w, 4 * w, 16) + block(4 * w, 4 * w, 16)
    return ends + down + block(6 * w, 2 * w, 4) + block(3 * w, w, 1)


def _modulations(config: ModelConfig, batch: int) -> int:
    D, rows = config.width, batch * len(config.levels)  # an adaLN vector a sample and level
    embedder = 2 * (T_FREQUENCIES * D + D * D)
    told = embedder * (batch if config.coupling == "lockstep" else rows)
    if config.coarse == "teacher":
        told += embedder * batch
    outputs = 6 * D * config.depth + 2 * D + (6 * config.decoder_depth + 2) * config.decoder_width
    return told + 2 * rows * D * outputs


# --- what a device can do ---------------------------------------------------------------------------

# TFLOP/s of dense products (without sparsity) by makers' data sheets: 16-bit with float32 sums, TF32, float32.
# The first name found in the device's own counts. Boost clocks under a full power budget: an H200 measured
# here gives 790 of its 989, which is what benchmarks/ take as the ceiling.
PEAKS: dict[str, tuple[float, float | None, float]] = {
    "GB300": (2500, 1250, 80), "GB200": (2500, 1250, 80), "B300": (2250, 1125, 75), "B200": (2250, 1125, 75),
    "H200 NVL": (835, 417, 60), "GH200": (989, 494, 67), "H200": (989, 494, 67),
    "H100 PCIe": (756, 378, 51), "H100 NVL": (835, 417, 60), "H100": (989, 494, 67), "H800": (989, 494, 67),
    "A100": (312, 156, 19.5), "A800": (312, 156, 19.5), "A30": (165, 82, 10.3), "A40": (150, 75, 37.4),
    "A10G": (70, 35, 31.5), "A10": (125, 62.5, 31.2), "L40S": (362, 183, 91.6), "L40": (181, 90.5, 90.5),
    "L4": (121, 60, 30.3), "RTX 6000 Ada": (364, 182, 91.1), "RTX A6000": (155, 77.4, 38.7),
    "RTX 5090": (209.5, 104.8, 104.8), "RTX 4090": (165, 82.6, 82.6), "RTX 3090": (71, 35.6, 35.6),
    "V100": (125, None, 15.7), "T4": (65, None, 8.1),
}  # fmt: skip


@dataclass(frozen=True)
class Peak:
    """flop_per_s : None where nothing is known; source : where the number comes from, for people."""

    flop_per_s: float | None
    source: str

    def __iter__(self):
        return iter((self.flop_per_s, self.source))


def peak_of(name: str, dtype: torch.dtype, *, tf32: bool = False) -> Peak:
    """The data sheet's dense peak of the GPU of this name (``torch.cuda.get_device_name``) for products in dtype."""
    words = name.replace("-", " ").split()
    found = next((key for key in PEAKS if _holds(words, key.split())), None)
    if found is None or "MIG" in words or "Laptop" in words:  # a slice of a GPU, or one with less power
        return Peak(None, f"{name} is in no table here")
    half, tensor, single = PEAKS[found]
    if dtype == torch.bfloat16 and found in ("V100", "T4"):
        return Peak(None, f"{found} has no bf16 products")
    if dtype in (torch.bfloat16, torch.float16):
        value, what = half, str(dtype)[6:]
    elif dtype == torch.float32:
        value, what = (tensor, "TF32") if tf32 and tensor else (single, "float32")
    else:
        return Peak(None, f"no peak of {str(dtype)[6:]} is in the table")
    return Peak(value * 1e12, f"{found}'s {value:g} TFLOP/s, dense {what}, by its data sheet")


def _holds(words: list[str], key: list[str]) -> bool:
    """Whether the key's words stand in a row in the name; whole words, as "L4" is no "L40"."""
    return any(words[i : i + len(key)] == key for i in range(len(words) - len(key) + 1))


def peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """What the device can do at most by its data sheet; of a CPU no table says it."""
    if device.type != "cuda":
        return Peak(None, "no table says what a CPU does")
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return peak_of(torch.cuda.get_device_name(device), dtype, tf32=tf32)


@lru_cache
def measured_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> Peak:
    """What a square product of side 2048 does here, the best of those that fit into ``seconds``.

    A slow processor takes a smaller side, which the source names. Measured once a process; on a busy machine
    the figure is too low, and shares of it too high.
    """
    begun = time.perf_counter()
    side = 256
    _product(side, device, dtype)  # the first call loads the library
    once = _product(side, device, dtype)
    while side < 2048 and 3 * 8 * once < seconds:  # twice the side takes 8 times as long
        side *= 2
        once = _product(side, device, dtype)
    while time.perf_counter() - begun + once < seconds:
        once = min(once, _product(side, device, dtype))
    rate = 2 * side**3 / once
    return Peak(rate, f"{rate / 1e9:.3g} GFLOP/s of a {side}^3 {str(dtype)[6:]} product measured here")


def _product(side: int, device: torch.device, dtype: torch.dtype) -> float:
    """Seconds of one product."""
    a = torch.ones(side, side, device=device, dtype=dtype)
    out = torch.empty_like(a)
    with torch.no_grad():
        if device.type != "cuda":
            begun = time.perf_counter()
            torch.mm(a, a, out=out)
            return time.perf_counter() - begun
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.mm(a, a, out=out)
        first.record()
        torch.mm(a, a, out=out)
        last.record()
        last.synchronize()
        return first.elapsed_time(last) * 1e-3


def best_peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """``peak`` where a table knows the device, else ``measured_peak``."""
    known = peak(device, dtype)
    return known if known.flop_per_s else measured_peak(device, dtype)
