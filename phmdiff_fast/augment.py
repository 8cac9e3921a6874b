"""Augmentation of a batch, a pure function of (seed, sample, step).

Geometry moves everything alike: left-right flips, and a small affine map with a smooth warp, composed
so that an image is interpolated once. Sources alone, never the target, get what another scanner would
do to them: gamma and brightness, a smooth bias field, noise. Every number is Philox's, so it depends
on the sample and the step and not on the batch; nothing here is read back from the device.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import DataConfig, TrainConfig
from .grid import HU_CONTRASTS
from .kernels import _philox
from .pyramid import per_sample

FLIP, GAMMA, SCALE, AFFINE, LEVEL, ELASTIC, BIAS, NOISE, TONE = (_philox.AUGMENT + n for n in range(9))
ELASTIC_NODES, BIAS_NODES = 5, 4  # a side
TONE_PIECES = 6
# Of the Laplacian's energy in 64 x 64 T2 slices 71 % is left, 97 % where the slices are moved twice as fine and then
# averaged down (bilinear: 43 and 73 %).
INTERPOLATION = "bicubic"


def manner(data: DataConfig) -> dict:
    """What ``augment`` must know about the channels of a cohort, as its keyword arguments."""
    each = 2 * data.context_slices + 1
    physical = tuple(name in HU_CONTRASTS for name in data.sources for _ in range(each))
    return {"group": each, "physical": physical, "mirror": data.axis != "sagittal", "finer": data.oversample}


def augment(
    sources: Tensor, target: Tensor, sample_ids: Tensor, rng, config: TrainConfig, *, foreground: Tensor | None = None,
    group: int = 1, physical: tuple[bool, ...] = (), mirror: bool = True, finer: int = 1,
) -> tuple[Tensor, ...]:  # fmt: skip
    """sources (B, Cs, H, W), target (B, C, H, W) -> the same in [-1, 1], augmented; -1 is background.

    foreground : (B, 1, H, W) bool, moved with the images and then returned third.
    finer      : the images come so many times finer along H and W and are averaged down by area once they are moved;
                 only then are they clipped to [-1, 1]. With 1 they are in [-1, 1] when they come.
    group      : channels a source (its neighbouring slices, source-major); they share gamma, scale, bias
                 and noise level, while each has its own noise.
    physical   : for each source channel, whether its values are a measure (HU): then it gets geometry and
                 noise only. () = none is.
    mirror     : whether H is the left-right axis (RAS x); if not, ``config.flip`` is passed over.

    In this order, u = U(-1, 1) drawn for each sample, and for each source where it is a source's own:
    flip; whole pixels (of the result) from -``jitter`` to ``jitter`` along H and W; rotation ``rotate`` u degrees, zoom
    exp(``zoom`` u), shift ``shift`` u sides along H and W, warp with a standard deviation of ``elastic``
    sides (above 0.04 it begins to fold), what comes from outside
    being -1; then, a source as v in [0, 1], a curve of slopes proportional to exp(``tone`` n), n normal, which
    keeps 0 and 1 where they are (``through_curves``), then scale v^gamma exp(bias f), clipped, with gamma =
    exp(``gamma`` u), scale = 1 + ``scale`` u and max |f| = 1; noise of standard deviation U(0, ``noise``),
    see ``add_noise``; a setting that is 0 is off. Raises ValueError if
    ``group`` does not divide Cs or ``physical`` is not Cs long.
    """
    channels = sources.shape[1]
    if channels % group or len(physical) not in (0, channels):
        raise ValueError(f"{channels} source channels, group {group}, physical {physical}")
    physical = physical or (False,) * channels
    count = channels // group
    flip = config.flip and mirror
    moved = bool(config.rotate or config.zoom or config.shift or config.elastic)
    tone = bool(config.gamma or config.scale or config.bias or config.tone) and not all(physical)
    # A fill is no copy from the host, for which a GPU would wait.
    rng = tuple(p if torch.is_tensor(p) else sample_ids.new_full((), p, dtype=torch.int64) for p in rng)
    if flip or config.jitter or moved or tone or config.noise:
        uniforms = _several(_philox.uniforms, sample_ids, max(6, count), rng, FLIP, LEVEL)
    if config.elastic or config.bias:
        num = max(2 * ELASTIC_NODES**2, count * BIAS_NODES**2)
        normals = _several(_philox.normals, sample_ids, num, rng, ELASTIC, BIAS)

    if flip:
        turned = per_sample(uniforms[FLIP][:, 0] < 0.5)
        sources, target = (torch.where(turned, image.flip(2), image) for image in (sources, target))
        if foreground is not None:
            foreground = torch.where(turned, foreground.flip(2), foreground)
    if config.jitter:
        offsets = finer * (((2 * config.jitter + 1) * uniforms[AFFINE][:, 4:6]).long() - config.jitter)  # (B, 2)
        sources, target = (displaced(image, offsets, -1.0) for image in (sources, target))
        foreground = None if foreground is None else displaced(foreground, offsets, False)
    if moved:
        size, bend, u = target.shape[2:], None, 2 * uniforms[AFFINE] - 1
        if config.elastic:
            nodes = normals[ELASTIC][:, : 2 * ELASTIC_NODES**2].unflatten(1, (2, ELASTIC_NODES, ELASTIC_NODES))
            bend = smooth_field(nodes * config.elastic, *size)  # (B, 2, H, W)
        angle, zoom, shift = u[:, 0] * math.radians(config.rotate), torch.exp(u[:, 1] * config.zoom), u[:, 2:4]
        grid = sampling_grid(*size, angle, zoom, shift * config.shift, bend)
        sources, target, foreground = resample(grid, sources, target, foreground)
    if finer > 1:
        sources, target = (F.avg_pool2d(image, finer) for image in (sources, target))
        foreground = None if foreground is None else F.avg_pool2d(foreground.to(target.dtype), finer) >= 0.5
    if finer > 1 or moved:
        sources, target = (image.clamp(-1, 1) for image in (sources, target))
    if tone:
        made = ((sources + 1) / 2).clamp(0, 1)
        if config.tone:
            drawn = _philox.normals(sample_ids, count * TONE_PIECES, rng=rng, stream=TONE)
            slopes = torch.exp(config.tone * drawn.view(len(drawn), count, TONE_PIECES))
            made = through_curves(made, _each_channel(slopes, group))
        if config.gamma or config.scale:
            gamma = _each_channel(torch.exp((2 * uniforms[GAMMA][:, :count] - 1) * config.gamma), group)
            scale = _each_channel(1 + (2 * uniforms[SCALE][:, :count] - 1) * config.scale, group)
            made = scale[:, :, None, None] * made ** gamma[:, :, None, None]
        if config.bias:
            nodes = normals[BIAS][:, : count * BIAS_NODES**2].unflatten(1, (count, BIAS_NODES, BIAS_NODES))
            made = made * _each_channel(bias_field(nodes, *made.shape[2:], config.bias), group)
        sources = _choose(physical, sources, (made * 2 - 1).clamp(-1, 1))
    if config.noise:
        sigma = _each_channel(uniforms[LEVEL][:, :count] * config.noise, group)
        sources = add_noise(sources, sigma[:, :, None, None], sample_ids, rng, physical)
    return (sources, target) if foreground is None else (sources, target, foreground)


def through_curves(v: Tensor, slopes: Tensor) -> Tensor:
    """v (B, C, H, W) in [0, 1] through a rising curve from (0, 0) to (1, 1) of straight pieces, each as wide.

    slopes (B, C, pieces) > 0, of which only the proportions count.
    """
    pieces = slopes.shape[-1]
    rises = slopes / slopes.sum(-1, keepdim=True)
    ends = rises.cumsum(-1)
    at = v.flatten(2) * pieces  # (B, C, H W)
    piece = at.long().clamp_max(pieces - 1)
    rise, end = rises.gather(2, piece), ends.gather(2, piece)
    return (end + (at - piece - 1) * rise).view_as(v)


def displaced(images: Tensor, offsets: Tensor, fill: float | bool) -> Tensor:
    """images (B, C, H, W), each moved by its offsets (B, 2) int64, pixels along H and W; ``fill`` comes in."""
    for axis in (2, 3):
        size = images.shape[axis]
        at = torch.arange(size, device=images.device) - offsets[:, axis - 2, None]  # (B, size): where it comes from
        shape = [len(images), 1, 1, 1]
        shape[axis] = size
        inside = ((at >= 0) & (at < size)).view(shape)
        images = images.gather(axis, at.clamp(0, size - 1).view(shape).expand_as(images))
        images = torch.where(inside, images, fill)
    return images


def cubic_basis(size: int, nodes: int, device=None) -> Tensor:
    """(size, nodes): cubic B-splines about ``nodes`` points from edge to edge, at the pixel centres.

    The rows have an L2 norm of 1 (ours; a B-spline's sum to 1): a sum of independent normal nodes then
    has their standard deviation at every pixel, not only near a node.
    """
    at = (torch.arange(size, device=device) + 0.5) * ((nodes - 1) / size)
    away = (at[:, None] - torch.arange(nodes, device=device)).abs()
    weight = (2 - away).clamp_min(0) ** 3 - 4 * (1 - away).clamp_min(0) ** 3
    return weight / weight.norm(dim=1, keepdim=True)


def smooth_field(nodes: Tensor, height: int, width: int) -> Tensor:
    """Control points (B, K, n, n) -> (B, K, height, width) through ``cubic_basis`` along both sides.

    Sums of products, not matmul: its result could depend on the batch size, and on TF32.
    """
    n = nodes.shape[-1]
    across, down = cubic_basis(width, n, nodes.device), cubic_basis(height, n, nodes.device)
    rows = nodes[..., :1] * across[:, 0]
    for k in range(1, n):
        rows = torch.addcmul(rows, nodes[..., k : k + 1], across[:, k])  # (B, K, n, width)
    field = rows[:, :, :1] * down[:, :1]
    for k in range(1, n):
        field = torch.addcmul(field, rows[:, :, k : k + 1], down[:, k : k + 1])
    return field  # (B, K, height, width)


def sampling_grid(
    height: int, width: int, angle: Tensor, zoom: Tensor, shift: Tensor, bend: Tensor | None = None
) -> Tensor:
    """Where each pixel of the output comes from, as F.grid_sample (align_corners=False) wants it.

    angle (B,): radians the image is turned about its centre, as torch.rot90 turns; zoom (B,): times it
    is enlarged; shift (B, 2): then moved along H and W, in sides; bend (B, 2, H, W): added to where the
    values come from, along W and H, in sides. Returns (B, H, W, 2), a view with W innermost.
    """
    y, x = ((2 * torch.arange(n, device=angle.device) + 1) / n - 1 for n in (height, width))
    y = y[:, None] - 2 * shift[:, 0, None, None]  # (B, H, 1)
    x = x - 2 * shift[:, 1, None, None]  # (B, 1, W)
    cos, sin = ((f(angle) / zoom)[:, None, None] for f in (torch.cos, torch.sin))
    # Coordinates count half sides, of which H and W may have unequal ones: a turn trades them.
    grid = torch.stack([cos * x - (sin * (height / width)) * y, cos * y + (sin * (width / height)) * x], 1)
    if bend is not None:
        grid = torch.add(grid, bend, alpha=2)
    return grid.permute(0, 2, 3, 1)


def resample(
    grid: Tensor, sources: Tensor, target: Tensor, foreground: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sources, target and foreground at a grid's points, -1 outside them; foreground is where it is half or more.

    A cubic may leave the range of the images a little: whoever averages them clips afterwards.
    """
    parts = [sources, target] if foreground is None else [sources, target, foreground.to(sources.dtype) - 1]
    together = torch.cat(parts, 1) + 1  # grid_sample pads with 0
    made = F.grid_sample(together, grid, mode=INTERPOLATION, padding_mode="zeros", align_corners=False)
    images, edge = made - 1, sources.shape[1]
    moved = None if foreground is None else made[:, -1:] >= 0.5
    return images[:, :edge], images[:, edge : edge + target.shape[1]], moved


def bias_field(nodes: Tensor, height: int, width: int, strength: float) -> Tensor:
    """exp(strength f), f the nodes' (B, K, n, n) smooth field divided by its largest magnitude."""
    field = smooth_field(nodes, height, width)
    return torch.exp(field * (strength / field.abs().amax((2, 3), keepdim=True)))


def add_noise(sources: Tensor, sigma: Tensor, sample_ids: Tensor, rng, physical: tuple[bool, ...]) -> Tensor:
    """sources (B, Cs, H, W) in [-1, 1], sigma (B, Cs, 1, 1) in units of [0, 1] -> sources with noise.

    MR is a magnitude: v in [0, 1] becomes sqrt((v + n1)^2 + n2^2), Rician, nearly Gaussian above a few
    sigma and without negative values to clip: dark tissue is not turned into background. (Exact for one
    coil and where v = 0 is no signal; ours is the 0.5 percentile of the foreground.) HU are no magnitude:
    v + n1, clipped. Exact background, v = 0, stays: in a skull-stripped, masked or padded image nothing
    was measured there, elsewhere the scaling cuts the air's own noise off, so at prediction it is 0 too.
    """
    batch, channels, height, width = sources.shape
    parts = 1 if all(physical) else 2
    normals = _philox.normals(sample_ids, parts * channels * height * width, rng=rng, stream=NOISE)
    normals = normals.view(batch, parts, channels, height, width)
    real = torch.addcmul((sources + 1) / 2, normals[:, 0], sigma)
    made = real
    if parts == 2:
        made = _choose(physical, real, torch.hypot(real, normals[:, 1] * sigma))
    return torch.where(sources > -1, (made * 2 - 1).clamp(-1, 1), sources)


def _several(draw, sample_ids: Tensor, num: int, rng, first: int, last: int) -> dict[int, Tensor]:
    """{stream: (B, num)} of Philox streams first..last, in one call: on a CPU that costs what one stream does."""
    streams = torch.arange(first, last + 1, device=sample_ids.device)
    # A counter holds sample xor stream << 56, so a sample of that name is the sample's own stream.
    names = sample_ids ^ (streams[:, None] << 56)
    drawn = draw(names.flatten(), num, rng=rng, stream=0)
    return dict(enumerate(drawn.view(*names.shape, num), first))


def _each_channel(of_source: Tensor, group: int) -> Tensor:
    """(B, sources, ...) -> (B, sources * group, ...), source-major."""
    return of_source[:, :, None].expand(-1, -1, group, *of_source.shape[2:]).flatten(1, 2)


def _choose(first: tuple[bool, ...], a: Tensor, b: Tensor) -> Tensor:
    """Channels of a (B, Cs, H, W) where ``first``, else of b; a mask tensor would have to be copied over."""
    if not any(first):
        return b
    return torch.stack([x if chosen else y for chosen, x, y in zip(first, a.unbind(1), b.unbind(1), strict=True)], 1)
