"""Faults for the short attention kernels: (file, old text that occurs once, new text, what it is)."""

TRITON, PUBLIC = "kernels/_short_attention_triton.py", "kernels/short_attention.py"

FAULTS = [
    (
        TRITON,
        "return tl.minimum(tl.maximum(tl.load(cu + at, mask=live, other=0).to(tl.int32), 0), tokens)",
        "return tl.load(cu + at, mask=live, other=0).to(tl.int32)",
        "broken offsets of a pack not kept inside",
    ),
    (TRITON, "length = tl.where(live, tokens, 0)", "length = at * 0 + tokens", "last tiles of a group are written"),
    (
        TRITON,
        "at = sequence * sequence_stride + (begin + lines).to(tl.int64) * row_stride",
        "at = sequence * sequence_stride + ((begin + lines) * row_stride).to(tl.int32)",
        "32-bit offset of a row",
    ),
    (TRITON, "return at.to(tl.int64), begin, length", "return at, begin, length", "32-bit offset of a sequence"),
    (TRITON, "* (scale * LOG2_E)", "* scale", "softmax of base 2"),
    (
        TRITON,
        "weights = tl.exp2(scores - tl.max(scores, -1, keep_dims=True))",
        "weights = tl.exp2(scores)",
        "the largest score is not taken off",
    ),
    (
        TRITON,
        'scores = tl.where(tl.expand_dims(keys | (key_lines == 0), -2), scores, float("-inf"))',
        "scores = tl.where(tl.expand_dims(keys | (key_lines == 0), -2), scores, 0.0)",
        "keys of the padding take part",
    ),
    (
        TRITON,
        "weights = tl.where(real, weights / total, 0.0)",
        "weights = tl.where(real, weights, 0.0)",
        "weights of the backward are not normalised",
    ),
    (
        TRITON,
        "dscores = tl.where(real, weights * (dweights - mean), 0.0)",
        "dscores = tl.where(real, weights * dweights, 0.0)",
        "the softmax's own slope is forgotten",
    ),
    (
        TRITON,
        "dk = dot(tl.trans(dscores), q, dk)",
        "dk = dot(tl.trans(dscores), q, _zeros(GROUP, ROWS, DIM))",
        "dk of the last queries alone",
    ),
    (TRITON, "_store(dk_ptr, to_key, dk * scale,", "_store(dk_ptr, to_key, dk,", "dk of a long tile without its scale"),
    (
        TRITON,
        "dq = dot(dscores, k, _zeros(GROUP, ROWS, DIM)) * scale",
        "dq = dot(dscores, k, _zeros(GROUP, ROWS, DIM))",
        "dq of a short tile without its scale",
    ),
    (TRITON, "wrong = tl.where(length > longest, length, 0)", "wrong = length * 0", "a broken promise is not shown"),
    (
        TRITON,
        "for part in tl.static_range(3):",
        "for part in tl.static_range(1):",
        "gradients of a broken promise left as they lay",
    ),
    (
        TRITON,
        "return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()",
        "return t",
        "columns taken as neighbours",
    ),
    (
        PUBLIC,
        "return torch.where(live[..., None], rows, 0), live",
        "return rows, live",
        "the reference pads with another sequence's values",
    ),
    (PUBLIC, "with torch.autocast(qkv.device.type, enabled=False):", "if True:", "autocast reaches the reference"),
    (
        PUBLIC,
        "too_long = (cu[1:] - cu[:-1] > rows.shape[1])[sequence]",
        "too_long = (cu[1:] - cu[:-1] < 0)[sequence]",
        "the reference cuts a sequence that is too long",
    ),
]
