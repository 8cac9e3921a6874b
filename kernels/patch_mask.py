"""Masked patches: which patches stay, their tokens, and the way back to the full grid.

    draw_mask       keep the K patches with the smallest Philox keys            III.B.1
    embed_visible   tokens of kept patches only, from the merged state          Eq. 6
    restore_tokens  visible tokens back among the fill, each row written once

Shapes: B batch, C target channels, Cs source channels, H x W image, p patch side, N = HW/p^2
tokens, K kept, D width, P = p^2 (C + Cs [+ C with coarse]) values of a patch, in the order
(state, sources, coarse_up) x (row, column), which is that of a flattened Conv2d weight.

Bytes a sample, 4 to a pixel and e to a token element. Literal form: all of y, eps, sources and coarse
read, the merged image (C + Cs + C) H W written and read, N D e written, K D e read and written again.
Fused, which is the floor: kept patches of y, eps (none where drawn inside) and sources, those of
coarse with a one-pixel halo, each once; K D e written. The reference gathers kept patches too, but
upsamples all of ``coarse`` and writes the (K, P) patches. ``restore_tokens``: K D + N D elements.

Backward keeps the inputs, forms the patches again for the weight's gradient (partial sums in fixed
order, at most 4 % of the bytes) and writes each pixel of the sources' gradient once, 0 where dropped.
Kernels: _patch_mask_triton.py, _embed_triton.py; registration: _patch_mask_ops.py. On a CPU with the C++
extension the state is merged over the whole image in one pass (impl="extension" of ``embed_visible``).

Limits: H and W are multiples of p, N < 2^24. Triton draws masks of up to 16,384 patches (their keys
lie in one program's registers; beyond, the reference runs) and gives no gradient for y, coarse, abar,
eps, state_scale or pos of ``embed_visible`` (the reference does).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _extension, _philox, _pyramid_ops  # noqa: F401  (_pyramid_ops registers the gradients of merging)
from . import _patch_mask_ops as ops
from ._impl import BackendError, choose

MAX_PATCHES = 16384  # of a sample that Triton draws a mask for


def draw_mask_reference(
    sample_ids, num_patches, num_keep, *, rng, stream=0, drop_first=None, integers=_philox.integers_reference
):
    keys = integers(sample_ids, num_patches, rng=rng, stream=stream)  # (B, N)
    # The index makes every packed key unique: no tie, so no order left to define.
    packed = (keys << 24) | torch.arange(num_patches, dtype=torch.int64, device=keys.device)
    if drop_first is not None:
        packed = packed | (drop_first.to(torch.int64) << 60)  # a class above the key: sorts behind all others
    keep = torch.topk(packed, num_keep, dim=1, largest=False, sorted=False).indices
    keep = keep.sort(dim=1).values  # (B, K)
    rank = torch.arange(num_keep, dtype=torch.int32, device=keep.device).expand_as(keep)
    inverse = torch.full(keys.shape, -1, dtype=torch.int32, device=keep.device).scatter(1, keep, rank)
    return keep.to(torch.int32), inverse


def patch_rows(x: Tensor, patch: int, ids: Tensor | None) -> Tensor:
    """Patches ``ids`` (B, K) of x (B, C, H, W), or all N of them, as (B, K, C, p p)."""
    batch, channels, height, width = x.shape
    rows, cols = height // patch, width // patch
    if ids is None:
        grid = x.reshape(batch, channels, rows, patch, cols, patch).permute(0, 2, 4, 1, 3, 5)
        return grid.reshape(batch, rows * cols, channels, patch * patch)
    # Pixel by pixel: kept patches alone are read, and their gradient is as many additions. Whole rows of
    # the patch matrix by index_select would first copy every patch: 3 to 15 times as long.
    ids, side = ids.long(), torch.arange(patch, device=x.device)
    corner = (ids // cols * width + ids % cols) * patch  # (B, K)
    pixels = (corner[..., None] + (side[:, None] * width + side).flatten()).flatten(1)  # (B, K p p)
    kept = x.flatten(2).gather(2, pixels[:, None].expand(-1, channels, -1))  # (B, C, K p p)
    return kept.unflatten(2, (ids.shape[1], patch * patch)).transpose(1, 2)


def unpatchify(tokens: Tensor, patch: int, height: int, width: int) -> Tensor:
    """(B, N, C p p) in the order (channel, row, column) -> (B, C, H, W)."""
    batch, rows, cols = tokens.shape[0], height // patch, width // patch
    grid = tokens.reshape(batch, rows, cols, -1, patch, patch)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(batch, -1, height, width)


def _side(values: int, channels: int) -> int:
    """The patch side p of p p channels values, or of the next smaller square (a loop: sizes may be symbols)."""
    side = 0
    while channels and (side + 1) ** 2 * channels <= values:
        side += 1
    return side


def _per_sample(v: Tensor) -> Tensor:
    return v[:, None, None, None]


def embed_visible_reference(
    y, sources, coarse, abar, keep_ids, weight, bias, pos,
    *, eps=None, rng=None, sample_ids=None, stream=None, state_scale=None,
):  # fmt: skip
    channels, height, width = y.shape[1:]
    patch = _side(weight.shape[1], channels + sources.shape[1] + (0 if coarse is None else channels))
    if rng is not None:
        eps = _philox.normals_reference(sample_ids, y.shape[1:].numel(), rng=rng, stream=stream).view_as(y)
    state = _per_sample(abar.sqrt()) * patch_rows(y, patch, keep_ids)  # (B, K, C, p p)
    if eps is not None:
        state = state + _per_sample((1 - abar).sqrt()) * patch_rows(eps, patch, keep_ids)
    parts = [patch_rows(sources, patch, keep_ids)]
    if coarse is not None:
        up = F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False)
        up = patch_rows(up[..., :height, :width], patch, keep_ids)
        state = state + _per_sample(1 - abar.sqrt()) * up
        parts.append(up)
    return _tokens(state, parts, keep_ids, weight, bias, pos, state_scale)


def embed_visible_merged(
    y, sources, coarse, abar, keep_ids, weight, bias, pos,
    *, eps=None, rng=None, sample_ids=None, stream=None, state_scale=None,
):  # fmt: skip
    """The CPU path with the extension: one pass over the image forms Eq. 6, then kept patches are gathered."""
    channels, height, width = y.shape[1:]
    patch = _side(weight.shape[1], channels + sources.shape[1] + (0 if coarse is None else channels))
    merge = torch.ops.phmdiff_fast
    if eps is None and rng is None:
        state = _per_sample(abar.sqrt()) * y
        if coarse is not None:
            state = merge.upsample_add(coarse, state, 1 - abar.sqrt(), height, width)
    else:
        draw = (0, 0, None, None, 0) if rng is None else (*_philox.split(rng), stream)
        ids = None if rng is None else sample_ids.contiguous()
        state = merge.merge_state(y, eps, coarse, abar.contiguous(), ids, *draw)
    parts = [patch_rows(sources, patch, keep_ids)]
    if coarse is not None:
        parts.append(patch_rows(merge.upsample_add(coarse, None, None, height, width), patch, keep_ids))
    return _tokens(patch_rows(state, patch, keep_ids), parts, keep_ids, weight, bias, pos, state_scale)


def _tokens(state, parts, keep_ids, weight, bias, pos, state_scale):
    """The patch embedding's product: state (B, K, C, p p) and the other channels' patches -> (B, K, D)."""
    if state_scale is not None:
        state = _per_sample(state_scale) * state
    patches = torch.cat([state, *parts], dim=2).flatten(2)  # (B, K, P)
    patches = patches.to(weight.dtype)
    if pos is None or keep_ids is None:
        tokens = F.linear(patches, weight, bias)  # (B, K, D)
        return tokens if pos is None else tokens + pos.to(tokens.dtype)
    # The product starts from the positions, in their place: two passes over the tokens less than adding
    # them afterwards. Autocast knows no operation in place.
    start = pos.index_select(0, keep_ids.flatten()).to(weight.dtype)
    product = torch.addmm if torch.is_autocast_enabled(start.device.type) else Tensor.addmm_
    tokens = product(start, patches.flatten(0, 1), weight.t())
    if bias is not None:
        tokens.add_(bias.to(tokens.dtype))
    return tokens.view(*keep_ids.shape, weight.shape[0])


def restore_tokens_reference(x, fill, inverse, pos):
    batch, num = inverse.shape
    keep, width = x.shape[1:]
    if fill.dim() == 1:
        rows = torch.cat([x, fill.to(x.dtype).expand(batch, 1, width)], dim=1)
        order = torch.where(inverse < 0, keep, inverse)
    else:
        rows = torch.cat([x, fill.to(x.dtype)], dim=1)  # (B, N, D)
        hidden = inverse < 0
        order = torch.where(hidden, keep - 1 + hidden.cumsum(1), inverse)
    first = torch.arange(batch, device=x.device)[:, None] * rows.shape[1]
    out = rows.flatten(0, 1).index_select(0, (order + first).flatten()).view(batch, num, width)
    return out if pos is None else out + pos.to(out.dtype)


def draw_mask(
    sample_ids: Tensor, num_patches: int, num_keep: int,
    *, rng, stream: int = 0, drop_first: Tensor | None = None, impl: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Choose the patches that stay (PHMDiff III.B.1).

    Parameters
    ----------
    sample_ids : (B,) int64, the samples' global names
    num_patches, num_keep : N and K, 0 <= K <= N < 2^24
    rng : (seed, step), ints or 0-d int64 tensors
    stream : Philox stream, 0 for the finest level
    drop_first : (B, N) bool, patches that go before any other does

    Returns
    -------
    keep_ids (B, K) int32, ascending; inverse (B, N) int32, the rank among the kept or -1

    Raises ValueError for K outside [0, N] or a wrong shape. Bit-identical on every device.
    """
    if not 0 <= num_keep <= num_patches < 1 << 24:
        raise ValueError(f"draw_mask: need 0 <= num_keep <= num_patches < 2^24, got {num_keep} and {num_patches}")
    if sample_ids.dim() != 1:
        raise ValueError(f"draw_mask: sample_ids must be (B,), got {tuple(sample_ids.shape)}")
    if drop_first is not None and drop_first.shape != (sample_ids.shape[0], num_patches):
        raise ValueError(f"draw_mask: drop_first must be (B, N), got {tuple(drop_first.shape)}")
    big = f"{num_patches} patches, Triton draws up to {MAX_PATCHES}" if num_patches > MAX_PATCHES else ""
    seeds = _philox.split(rng)
    tensors = {"sample_ids": sample_ids, "drop_first": drop_first, "seed": seeds[2], "step": seeds[3]}
    if choose("draw_mask", impl, tensors, big) == "triton":
        return ops.draw_mask(sample_ids, num_patches, num_keep, *seeds, stream, drop_first)
    integers = _philox.integers if impl is None else _philox.integers_reference  # the same numbers, one sooner
    return draw_mask_reference(sample_ids, num_patches, num_keep, rng=rng, stream=stream, drop_first=drop_first,
                               integers=integers)  # fmt: skip


def embed_visible(
    y: Tensor, sources: Tensor, coarse: Tensor | None, abar: Tensor, keep_ids: Tensor | None,
    weight: Tensor, bias: Tensor | None, pos: Tensor | None,
    *, eps: Tensor | None = None, rng=None, sample_ids: Tensor | None = None, stream: int | None = None,
    state_scale: Tensor | None = None, impl: str | None = None,
) -> Tensor:  # fmt: skip
    """Tokens of the kept patches, from the merged state formed on the way (PHMDiff Eq. 6).

        state = sqrt(abar) y + sqrt(1 - abar) eps + (1 - sqrt(abar)) up(coarse)
        token = weight @ (state_scale * state, sources, up(coarse)) + bias + pos

    Parameters
    ----------
    y : (B, C, H, W) target, C = 0 for tokens of the sources alone; sources : (B, Cs, H, W), may need a gradient
    coarse : (B, C, ceil(H/2), ceil(W/2)) or None (then neither merged nor a channel)
    abar : (B,) float32, never cast
    keep_ids : (B, K) int32, or None for every patch
    weight : (D, P); bias : (D,) or None; pos : (N, D) or None
    eps : (B, C, H, W) noise, or drawn from ``rng``, ``sample_ids`` and ``stream``; with neither,
        the noise term is left out (a sampler's y_t goes in as y = y_t / sqrt(abar))
    state_scale : (B,) float32 factor on the state's channels only (ours)

    Returns (B, K, D) in weight's dtype, or autocast's. Raises ValueError for shapes that do not fit.
    """
    if y.dim() != 4 or weight.dim() != 2:
        raise ValueError(f"embed_visible: need y (B, C, H, W) and weight (D, P), got {tuple(y.shape)} "
                         f"and {tuple(weight.shape)}")  # fmt: skip
    batch, channels, height, width = y.shape
    merged = channels + sources.shape[1] + (0 if coarse is None else channels)
    patch = _side(weight.shape[1], merged)
    if patch * patch * merged != weight.shape[1] or patch == 0:
        raise ValueError(f"embed_visible: weight {tuple(weight.shape)} holds no square patch of {merged} channels")
    if height % patch or width % patch:
        raise ValueError(f"embed_visible: image {height}x{width} is no multiple of the patch side {patch}")
    num, width_out = (height // patch) * (width // patch), weight.shape[0]
    if sources.dim() != 4 or sources.shape[0] != batch or sources.shape[2:] != y.shape[2:]:
        raise ValueError(f"embed_visible: sources {tuple(sources.shape)} do not fit y {tuple(y.shape)}")
    if coarse is not None and coarse.shape != (batch, channels, -(-height // 2), -(-width // 2)):
        raise ValueError(f"embed_visible: coarse {tuple(coarse.shape)} is not half of y {tuple(y.shape)}")
    if abar.shape != (batch,) or abar.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"embed_visible: abar must be (B,) float32, got {tuple(abar.shape)} {abar.dtype}")
    for name, value, expected in (("bias", bias, (width_out,)), ("pos", pos, (num, width_out)),
                                  ("state_scale", state_scale, (batch,)),
                                  ("sample_ids", sample_ids, (batch,))):  # fmt: skip
        if value is not None and tuple(value.shape) != expected:
            raise ValueError(f"embed_visible: {name} must be {expected}, got {tuple(value.shape)}")
    if keep_ids is not None and (keep_ids.dim() != 2 or keep_ids.shape[0] != batch or keep_ids.is_floating_point()):
        raise ValueError(f"embed_visible: keep_ids must be (B, K) int32, got {tuple(keep_ids.shape)} {keep_ids.dtype}")
    if bias is not None and bias.dtype != weight.dtype:
        raise TypeError(f"embed_visible: bias is {bias.dtype} beside weight {weight.dtype}; use one type")
    if eps is not None and (rng is not None or eps.shape != y.shape):
        raise ValueError("embed_visible: eps must have y's shape and excludes rng")
    if rng is not None and (sample_ids is None or stream is None):
        raise ValueError("embed_visible: rng needs sample_ids and stream")
    rng_parts = (0, 0, None, None) if rng is None else _philox.split(rng)
    tensors = dict(y=y, sources=sources, coarse=coarse, abar=abar, keep_ids=keep_ids, weight=weight, bias=bias, pos=pos,
                   eps=eps, state_scale=state_scale, sample_ids=sample_ids, seed=rng_parts[2],
                   step=rng_parts[3])  # fmt: skip
    chosen = None
    if impl == "extension":
        chosen = embed_visible_merged
        if why := _why_not_merged(tensors):
            raise BackendError(f"embed_visible: impl='extension' cannot run here: {why}")
    elif choose("embed_visible", impl, tensors, _why_not_fused(tensors)) == "reference":
        chosen = embed_visible_reference
        if impl is None and y.device.type == "cpu":
            if why := _why_not_merged(tensors):
                _extension.warn_once("embed_visible", why)
            else:
                chosen = embed_visible_merged
    if chosen is not None:
        return chosen(y, sources, coarse, abar, keep_ids, weight, bias, pos,
                      eps=eps, rng=rng, sample_ids=sample_ids, stream=stream, state_scale=state_scale)  # fmt: skip
    if torch.is_autocast_enabled(y.device.type):  # as F.linear: the product is 16-bit. abar is never cast
        kind = torch.get_autocast_dtype(y.device.type)
        weight, bias = weight.to(kind), None if bias is None else bias.to(kind)
    return ops.embed_visible(y, sources, coarse, abar, keep_ids, weight, bias, pos, eps, state_scale,
                             sample_ids, rng_parts[2], rng_parts[3], *rng_parts[:2], stream or 0,
                             rng is not None)  # fmt: skip


def _why_not_merged(tensors: dict[str, Tensor | None]) -> str:
    """Why the extension does not merge these inputs; empty if it does."""
    y, eps, coarse, abar = (tensors[name] for name in ("y", "eps", "coarse", "abar"))
    if why := _extension.problem_on(y.device):
        return why
    if abar.requires_grad and torch.is_grad_enabled():
        return "abar needs a gradient, which only the reference gives"
    mixed = any(t is not None and t.dtype != y.dtype for t in (eps, coarse))
    if mixed or abar.dtype != torch.promote_types(y.dtype, torch.float32):
        return "y, eps and coarse must be of one type, abar float32 (float64 beside float64)"
    return ""


def _why_not_fused(tensors: dict[str, Tensor | None]) -> str:
    """Why the fused form does not do these inputs; empty if it does."""
    if torch.is_grad_enabled():
        for name in ("y", "coarse", "abar", "eps", "state_scale", "pos"):
            if tensors[name] is not None and tensors[name].requires_grad:
                return f"{name} needs a gradient, which only the reference gives"
    y = tensors["y"]
    if max(y.shape[0] * y.shape[2] * y.shape[3], y.shape[1:].numel()) >= 1 << 31:
        return "patches are counted, and a sample's pixels numbered, in 32 bits"
    return ""


def restore_tokens(x: Tensor, fill: Tensor, inverse: Tensor, pos: Tensor | None, *, impl: str | None = None) -> Tensor:
    """Visible tokens back among the fill, position added to every row.

    Parameters
    ----------
    x : (B, K, D); fill : (D,) one token for every gap, or (B, N - K, D) in ascending order of place
    inverse : (B, N) int32 of ``draw_mask``; pos : (N, D) or None

    Returns (B, N, D) in x's dtype. Raises ValueError for shapes that do not fit.
    """
    if x.dim() != 3 or inverse.dim() != 2 or inverse.shape[0] != x.shape[0] or inverse.shape[1] < x.shape[1]:
        raise ValueError(f"restore_tokens: need x (B, K, D) and inverse (B, N), N >= K, got {tuple(x.shape)} "
                         f"and {tuple(inverse.shape)}")  # fmt: skip
    if inverse.is_floating_point() or not (x.is_floating_point() and fill.is_floating_point()):
        raise TypeError(f"restore_tokens: x and fill are floating, inverse integer; got {x.dtype}, {fill.dtype}, "
                        f"{inverse.dtype}")  # fmt: skip
    (batch, keep, width), num = x.shape, inverse.shape[1]
    if fill.shape not in ((width,), (batch, num - keep, width)):
        raise ValueError(f"restore_tokens: fill {tuple(fill.shape)} is neither (D,) nor (B, N - K, D)")
    if pos is not None and pos.shape != (num, width):
        raise ValueError(f"restore_tokens: pos {tuple(pos.shape)} is not (N, D) = ({num}, {width})")
    if choose("restore_tokens", impl, {"x": x, "fill": fill, "inverse": inverse, "pos": pos}) == "triton":
        return ops.restore_tokens(x, fill, inverse, pos)
    return restore_tokens_reference(x, fill, inverse, pos)
