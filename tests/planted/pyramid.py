"""Faults planted in what Python knows of the C++ extension; see tests/mutants.py."""

TESTS, MODULE = ("pyramid", "haar", "philox", "extension"), "phmdiff_fast.pyramid"

OPS, PYRAMID, HAAR = "kernels/_pyramid_ops.py", "phmdiff_fast/pyramid.py", "phmdiff_fast/haar.py"
LOADER, PHILOX = "kernels/_extension.py", "kernels/_philox.py"
FAULTS = [
    (OPS, "return (n + 1) // 2", "return n // 2", "odd sides lose their last pixel"),
    (OPS, "math.ceil(alpha * side - 1e-9)", "math.ceil(alpha * side)", "sides one too large by rounding errors"),
    (
        OPS,
        "ctx.levels, ctx.alpha = len(inputs[0]), inputs[3]",
        "ctx.levels, ctx.alpha = len(inputs[0]), 0.5",
        "second derivatives as if alpha was 0.5",
    ),
    (OPS, "down, grad if x else None,", "down, grad,", "a gradient nobody asked for"),
    (
        OPS,
        "return (*[next(given) if need else None for need in needs],",
        "return (*[next(given, None) for need in needs],",
        "gradients in the wrong places where not all are asked for",
    ),
    (
        OPS,
        "y = grads[0].new_zeros(ctx.like) if y is None else y",
        "y = grads[0].new_ones(ctx.like) if y is None else y",
        "second derivatives of eps get a term of y",
    ),
    (
        OPS,
        "ops.upsample_add(coarse, y, weight, *ctx.like[2:])",
        "ops.upsample_add(coarse, y, None, *ctx.like[2:])",
        "second derivatives of upsample_add without the weight",
    ),
    (
        OPS,
        "return ops.haar3d(grad), None, None, None",
        "return ops.haar3d(grad.detach()), None, None, None",
        "the inverse transform's second derivative lost",
    ),
    (OPS, "return y.new_empty(y.shape)", "return y.new_empty(y.shape, dtype=abar.dtype)", "a fake of another type"),
    (PYRAMID, "torch.promote_types(images.dtype, torch.float32)", "images.dtype", "abar rounded to 16 bits"),
    (PYRAMID, '_no_gradient_for("abar", abar)', '""', "a gradient of abar silently 0"),
    (PYRAMID, "if (eps is None) == (rng is None)", "if (eps is None) and (rng is None)", "both eps and rng taken"),
    (
        PYRAMID,
        "if tuple(coarse.shape) != expected:",
        "if tuple(coarse.shape[1:]) != expected[1:]:",
        "coarse of another batch taken",
    ),
    (
        HAAR,
        'if choose("inverse_haar3d", impl, {"bands": bands})',
        'if choose("inverse_haar3d", None, {"bands": bands})',
        "impl not heeded",
    ),
    (
        HAAR,
        "_pyramid_ops.half(n) for n in sides) != half",
        "_pyramid_ops.half(n) for n in sides) < half",
        "sides too large taken",
    ),
    (
        LOADER,
        'if csrc.is_dir() and facts["sources"] != fingerprint',
        "if csrc.is_dir() and not fingerprint",
        "a build of other sources loaded",
    ),
    (
        LOADER,
        "    except (OSError, RuntimeError, AttributeError) as problem:",
        "    except (RuntimeError, AttributeError) as problem:",
        "a file that is no library ends the program",
    ),
    (LOADER, "if why in _warned or", "if", "warned at every call"),
    (
        LOADER,
        'if why and impl == "extension":',
        'if why and impl == "extension" and not refused:',
        "a forced extension silently replaced",
    ),
    (
        PHILOX,
        "part.to(torch.int64) if t else None for part, t",
        "None for part, t",
        "seed and step in tensors read as 0",
    ),
]
