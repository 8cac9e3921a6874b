"""The pyramid: an image to its levels, and back up into the state of the next finer one (PHMDiff Eq. 1, Eq. 6).

    build_pyramid   x -> [x, x_1, ...], each level the one above it made smaller by alpha
    upsample        bilinear, scale exactly 2, align_corners False, cropped
    merge_state     sqrt(abar) y + sqrt(1 - abar) eps + (1 - sqrt(abar)) up(coarse)
    upsample_add    x + weight up(coarse), for samplers
    level_error     |x - up(coarse)|, what the coarser level leaves open

Level 0 is full resolution. alpha = 0.5 is the mean of 2 x 2 blocks, edge blocks over what exists; odd sides
are legal: 15 -> 8 -> 15. Shapes: B batch, C channels, H x W image, (h, w) = (ceil(H/2), ceil(W/2)).

Bytes an element of x, of e bytes each: build_pyramid reads e and writes e/3 in all, which is the floor (a
chain of pooling reads e 4/3); merge_state reads 2 e + e/4 and writes e (eager PyTorch: 12 e). The extension
computes 16-bit images in float32 and rounds once, at the end; between the levels of alpha = 0.5 too.
Backward keeps no image and gathers: each pixel of a gradient is written once, in one fixed order of sums,
so that results are the same bits at every run, thread count and instruction set.

The reference is the plain PyTorch form; "extension" is csrc/. No gradient flows to abar and weight in the
extension: asked for, the reference runs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import _philox, _pyramid_ops
from .kernels._extension import choose
from .kernels._pyramid_ops import half, side_below

MOST_LEVELS = 25  # of one call, x included


def per_sample(v: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1)."""
    return v[:, None, None, None]


# --- references: the definitions, and the path without the extension -----------------------------


def downsample(x: Tensor, alpha: float = 0.5) -> Tensor:
    """(B, C, H, W) -> (B, C, ceil(alpha H), ceil(alpha W)): 2x2 means, or antialiased bilinear (Eq. 1)."""
    if alpha == 0.5:
        return F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)
    if x.shape[3] == 1 < x.shape[2]:  # PyTorch 2.13 gets a single column wrong, a single row right
        return downsample(x.mT, alpha).mT
    if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16):  # it has no such kernel
        return downsample(x.float(), alpha).to(x.dtype)
    size = [side_below(n, alpha) for n in x.shape[2:]]
    return F.interpolate(x, size=size, mode="bilinear", antialias=True, align_corners=False)


def upsample_reference(coarse: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False)[..., :height, :width]


def build_pyramid_reference(x: Tensor, levels: int, alpha: float) -> list[Tensor]:
    out = [x]
    for _ in range(levels - 1):
        out.append(downsample(out[-1], alpha))
    return out


def merge_state_reference(y: Tensor, eps: Tensor, coarse: Tensor | None, abar: Tensor) -> Tensor:
    state = per_sample(abar.sqrt()) * y + per_sample((1 - abar).sqrt()) * eps
    if coarse is not None:
        state = state + per_sample(1 - abar.sqrt()) * upsample_reference(coarse, *y.shape[2:])
    return state.to(y.dtype)


# --- checks --------------------------------------------------------------------------------------


def _check_images(op: str, images: dict[str, Tensor | None]) -> None:
    """All (B, C, H, W), of one type. Raises ValueError and TypeError naming the argument."""
    first = None
    for name, image in images.items():
        if image is None:
            continue
        if image.dim() != 4:
            raise ValueError(f"{op}: {name} must be (B, C, H, W), got {tuple(image.shape)}")
        if not image.is_floating_point():
            raise TypeError(f"{op}: {name} must be floating point, got {str(image.dtype)[6:]}")
        if first is None:
            first, dtype = name, image.dtype
        elif image.dtype != dtype:
            raise TypeError(f"{op}: {name} is {str(image.dtype)[6:]}, expected {str(dtype)[6:]} like {first}")


def _check_half(op: str, coarse: Tensor, like: Tensor | None, height: int, width: int) -> None:
    expected = (*(coarse if like is None else like).shape[:2], half(height), half(width))
    if tuple(coarse.shape) != expected:
        raise ValueError(f"{op}: coarse must be {expected} for {height} x {width}, got {tuple(coarse.shape)}")


def _check_vector(op: str, name: str, v: Tensor, images: Tensor) -> None:
    if tuple(v.shape) != (images.shape[0],):
        raise ValueError(f"{op}: {name} must be (B,) = ({images.shape[0]},), got {tuple(v.shape)}")


def _vector(v: Tensor | None, images: Tensor) -> Tensor | None:
    """As the extension takes it: dense, float32, or float64 beside float64."""
    return None if v is None else v.to(torch.promote_types(images.dtype, torch.float32)).contiguous()


def _no_gradient_for(name: str, v: Tensor | None) -> str:
    return f"{name} needs a gradient" if v is not None and v.requires_grad else ""


# --- operations ----------------------------------------------------------------------------------


def build_pyramid(x: Tensor, levels: int, *, alpha: float = 0.5, impl: str | None = None) -> list[Tensor]:
    """An image and its coarser levels, from one read of it (PHMDiff Eq. 1).

    x : (B, C, H, W) floating; levels : how many to return, 1 to 25, x itself included
    alpha : in (0, 1); sides of a level are ceil(alpha side). 0.5: means of 2 x 2 blocks; else antialiased
        bilinear, each level from the one above it

    Returns [x, x_1, ...]. Raises ValueError for shapes, levels or alpha outside that, TypeError for integers.
    """
    _check_images("build_pyramid", {"x": x})
    if not 1 <= levels <= MOST_LEVELS:
        raise ValueError(f"build_pyramid: levels must be 1 to {MOST_LEVELS}, got {levels}")
    if not 0 < alpha < 1:
        raise ValueError(f"build_pyramid: alpha must lie between 0 and 1, got {alpha}")
    if min(x.shape[2:]) == 0:
        raise ValueError(f"build_pyramid: x has no pixels, {tuple(x.shape)}")
    extension = choose("build_pyramid", impl, {"x": x})
    if levels == 1:
        return [x]
    if extension:
        return [x, *_pyramid_ops.ops.build_pyramid(x, levels - 1, alpha)]
    return build_pyramid_reference(x, levels, alpha)


def upsample(coarse: Tensor, height: int, width: int, *, impl: str | None = None) -> Tensor:
    """Bilinear up by exactly 2, align_corners False, cropped.

    coarse : (B, C, h, w) with h = ceil(height/2), w = ceil(width/2)

    Returns (B, C, height, width). Raises ValueError for another size.
    """
    _check_images("upsample", {"coarse": coarse})
    _check_half("upsample", coarse, None, height, width)
    if choose("upsample", impl, {"coarse": coarse}):
        return _pyramid_ops.ops.upsample_add(coarse, None, None, height, width)
    return upsample_reference(coarse, height, width)


def merge_state(
    y: Tensor, eps: Tensor | None, coarse: Tensor | None, abar: Tensor,
    *, rng=None, sample_ids: Tensor | None = None, stream: int = _philox.EPS, impl: str | None = None,
) -> Tensor:  # fmt: skip
    """The merged state (PHMDiff Eq. 6): sqrt(abar) y + sqrt(1 - abar) eps + (1 - sqrt(abar)) up(coarse).

    y, eps : (B, C, H, W); coarse : (B, C, h, w), or None for 0 (the coarsest level)
    abar : (B,) float32, never rounded to 16 bits
    eps None : the noise is drawn while merging, from rng = (seed, step), sample_ids (B,) int64 and the
        Philox stream: the same as ``_philox.normals`` gives, and as good as free where memory is slow

    Returns (B, C, H, W) in y's type. Raises ValueError for shapes that do not fit, TypeError for mixed types.
    """
    images = {"y": y, "eps": eps, "coarse": coarse}
    _check_images("merge_state", images)
    _check_vector("merge_state", "abar", abar, y)
    if eps is not None and eps.shape != y.shape:
        raise ValueError(f"merge_state: eps must be {tuple(y.shape)} like y, got {tuple(eps.shape)}")
    if coarse is not None:
        _check_half("merge_state", coarse, y, *y.shape[2:])
    if (eps is None) == (rng is None) or (rng is None) != (sample_ids is None):
        raise ValueError("merge_state: give either eps, or rng and sample_ids to draw it from")
    if sample_ids is not None:
        _check_vector("merge_state", "sample_ids", sample_ids, y)
        if sample_ids.dtype != torch.int64:
            raise TypeError(f"merge_state: sample_ids must be int64, got {str(sample_ids.dtype)[6:]}")
    tensors = images | {"abar": abar, "sample_ids": sample_ids}
    if choose("merge_state", impl, tensors, _no_gradient_for("abar", abar)):
        draw = (0, 0, None, None) if rng is None else _philox.split(rng)
        ids = None if sample_ids is None else sample_ids.contiguous()
        return _pyramid_ops.ops.merge_state(y, eps, coarse, _vector(abar, y), ids, *draw, stream)
    if eps is None:
        eps = _philox.normals_reference(sample_ids, y.shape[1:].numel(), rng=rng, stream=stream).view_as(y).to(y.dtype)
    return merge_state_reference(y, eps, coarse, abar)


def upsample_add(coarse: Tensor, x: Tensor, weight: Tensor, *, impl: str | None = None) -> Tensor:
    """x + weight up(coarse): a sampler's y_t merged with the coarser level's estimate.

    coarse : (B, C, h, w); x : (B, C, H, W); weight : (B,), 1 - sqrt(abar) for Eq. 6

    Returns (B, C, H, W) in x's type. Raises ValueError for shapes that do not fit, TypeError for mixed types.
    """
    _check_images("upsample_add", {"x": x, "coarse": coarse})
    _check_half("upsample_add", coarse, x, *x.shape[2:])
    _check_vector("upsample_add", "weight", weight, x)
    tensors = {"x": x, "coarse": coarse, "weight": weight}
    if choose("upsample_add", impl, tensors, _no_gradient_for("weight", weight)):
        return _pyramid_ops.ops.upsample_add(coarse, x, _vector(weight, x), *x.shape[2:])
    return (x + per_sample(weight) * upsample_reference(coarse, *x.shape[2:])).to(x.dtype)


def level_error(x: Tensor, coarse: Tensor, *, impl: str | None = None) -> Tensor:
    """|x - up(coarse)|: the error map between a level and the next coarser one.

    x : (B, C, H, W); coarse : (B, C, h, w)

    Returns (B, C, H, W). Raises ValueError for shapes that do not fit, TypeError for mixed types.
    """
    _check_images("level_error", {"x": x, "coarse": coarse})
    _check_half("level_error", coarse, x, *x.shape[2:])
    refused = _no_gradient_for("x", x) or _no_gradient_for("coarse", coarse)
    if choose("level_error", impl, {"x": x, "coarse": coarse}, refused):
        return _pyramid_ops.ops.level_error(x, coarse)
    return (x - upsample_reference(coarse, *x.shape[2:])).abs()
