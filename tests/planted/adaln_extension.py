"""Faults planted in adaLN and GELU of the C++ extension; see tests/mutants.py. Only the generic set is built."""

TESTS, MODULE = ("adaln_extension", "gelu"), "phmdiff_fast.kernels._extension"
ARGUMENTS = ("-k", "not instruction_set and not compiled")

KERNEL, HOST, GELU = "csrc/cpu/adaln.cpp", "csrc/adaln.cpp", "csrc/cpu/gelu.cpp"
OPS, PUBLIC = "kernels/_adaln_ops.py", "kernels/adaln.py"

FAULTS = [
    # the kernels of adaLN
    (KERNEL, "l = 0; i < n; ++i, ++l) rest[l]", "l = 0; i + 1 < n; ++i, ++l) rest[l]", "last column not in the sums"),
    (KERNEL, "if (i < n) {", "if (i + 8 < n) {", "a short tail not in the sums"),
    (KERNEL, "sums[v] += sums[v + half];", "sums[v] += sums[v];", "half of the lanes lost"),
    (KERNEL, "(sums[0][1] + sums[0][3])", "(sums[0][1] + sums[0][1])", "a lane counted twice"),
    (KERNEL, "squares / float(n) + eps", "squares / float(n)", "no eps"),
    (KERNEL, "squares / float(n) + eps", "squares / float(n - 1) + eps", "the variance of a sample"),
    (KERNEL, "+ sample * rows.sample + row", "+ row", "every sample the first one's rows"),
    (KERNEL, "from.data) + sample * from.row", "from.data) + sample * n", "chunks of a product taken for dense"),
    (
        KERNEL,
        "unit == begin || s.sample != a.stretches[unit - 1].sample) {\n      read_vector<V>(a.gate, s.sample, n, 0.0f, "
        "gate);\n      read_vector<V>(a.shift",
        "unit == begin) {\n      read_vector<V>(a.gate, s.sample, n, 0.0f, gate);\n      read_vector<V>(a.shift",
        "the first sample's vectors for all, forward",
    ),
    (
        KERNEL,
        "unit == begin || s.sample != a.stretches[unit - 1].sample) {\n      read_vector<V>(a.gate, s.sample, n, 0.0f, "
        "gate);\n      read_vector<V>(a.scale",
        "unit == begin) {\n      read_vector<V>(a.gate, s.sample, n, 0.0f, gate);\n      read_vector<V>(a.scale",
        "the first sample's vectors for all, backward",
    ),
    (KERNEL, "* s.inverse * scale[i] + shift[i]", "* s.inverse * scale[i]", "no shift"),
    (
        KERNEL,
        "narrow<X>(widen(x[i]) + gate[i] * widen(h[i]))",
        "narrow<X>(widen(x[i]) + widen(h[i]))",
        "no gate",
    ),
    (KERNEL, "          x = out;\n", "", "norm of x, not of x'"),
    (KERNEL, "y + r * n", "y", "rows of a group over each other"),
    (KERNEL, "scale_sum[i] += d * hat;", "scale_sum[i] += d;", "gradient of scale without xhat"),
    (KERNEL, "grad[i] = d * scale[i];", "grad[i] = d;", "gradient of the norm without its scale"),
    (KERNEL, "(grad[i] - plain - normed[i] * along) + d", "(grad[i] - normed[i] * along) + d", "mean gradient kept"),
    (KERNEL, "(grad[i] - plain - normed[i] * along) + d", "(grad[i] - plain) + d", "no projection on xhat"),
    (KERNEL, "(grad[i] - plain - normed[i] * along) + d", "(grad[i] - plain - normed[i] * along)", "dx' dropped"),
    (KERNEL, "dh[i] = narrow<V>(d * gate[i]);", "dh[i] = narrow<V>(d);", "gradient of h without the gate"),
    (KERNEL, "gate_sum[i] += d * widen(h[i]);", "gate_sum[i] = d * widen(h[i]);", "gate's sum of the last row alone"),
    (KERNEL, "    from[i] = 0.0f;\n", "", "sums of a few rows counted again"),
    (KERNEL, "|| first + rows == s.count)", ")", "rows beyond the last 16 left out"),
    (KERNEL, "for (float* row : sums) std::fill(row, row + n, 0.0f);", "", "sums of the stretch before kept"),
    (KERNEL, "a.partial + (3 * unit + k) * n", "a.partial + 3 * unit * n", "partial sums over each other"),
    (KERNEL, "a.partial + (3 * (first + part) + k) * n", "a.partial + (3 * part + k) * n", "the first sample's parts"),
    (KERNEL, "k < 3 && parts > 1;", "k < 3 && parts > 2;", "samples of two stretches never added up"),
    (KERNEL, "row_of<V>(a.h, s.sample, row) :", "row_of<V>(a.h, s.sample, s.first) :", "h of the first row for all"),
    # what calls them
    (HOST, "std::min(STRETCH, end - at)", "STRETCH", "a stretch into the next sample"),
    (HOST, "std::max<int64_t>(1, (end", "std::max<int64_t>(0, (end", "no gradient for a sample without rows"),
    (HOST, "{sample, at, std", "{0, at, std", "every stretch the first sample's"),
    (HOST, "require(at[sample] <= at[sample + 1]", "require(true", "descending offsets taken"),
    (HOST, "at[0] == 0 && at[layout.samples]", "at[layout.samples]", "offsets from anywhere"),
    (HOST, "std::make_unique<Tensor>(dense_rows(t))", "std::make_unique<Tensor>(t)", "columns taken for dense"),
    (HOST, "const Tensor dense = torch::stable::contiguous(*cu);", "const Tensor& dense = *cu;", "strided offsets"),
    (HOST, "dense.dim() == 3 ? dense.stride(0) : 0", "dense.stride(0)", "packed rows apart by samples"),
    (HOST, "layout.most > 1 &&", "layout.most > 2 &&", "no room for two stretches"),
    # registration
    (OPS, "ctx.save_for_backward(output[0], h if", "ctx.save_for_backward(inputs[0], h if", "statistics of x, not x'"),
    (OPS, "needs = *needs[:3], False, False", "pass", "shift and scale from no gradient of y"),
    (OPS, "x.shape[0] if cu_tokens is None else cu_tokens.shape[0] - 1", "x.shape[0]", "fake vectors of a pack"),
    (PUBLIC, "common_device(op, tensors)\n        if why", "if why", "devices not compared where it is forced"),
    # GELU
    (GELU, "0.1029432396f", "0.1029f", "a constant of four digits"),
    (GELU, "series = 1.546144746e-04f;", "series = 0.0f;", "a term less of the series"),
    (GELU, "limit < x ? limit : x", "x < limit ? x : limit", "NaN taken for large"),
    (GELU, "const float inside = at_least(-REACH, x);", "const float inside = x;", "minus infinity times 0"),
    (GELU, "at_least(-REACH, at_most(REACH, x))", "x", "an infinite slope times 0"),
    (GELU, "REACH = 10.04f", "REACH = 9.0f", "the tail cut off early"),
    (GELU, "REACH = 10.04f", "REACH = 10.2f", "the exponent below its least"),
    (GELU, "inside * (x < 0.0f ? p.smaller : p.larger)", "inside * p.larger", "the larger part for every sign"),
    (GELU, "0.2140644488f", "0.0713548163f", "the cube's derivative without its 3"),
    (GELU, "static_cast<T*>(y) + begin", "static_cast<T*>(y)", "shares of the work over each other"),
    ("csrc/gelu.cpp", "grad = torch::stable::contiguous(dy)", "grad = dy", "a strided gradient taken for dense"),
    ("csrc/gelu.cpp", "const Tensor dense = torch::stable::contiguous(x);", "const Tensor dense = x;", "strided x"),
    ("csrc/gelu.cpp", "require(sizes_of(dy) == sizes_of(x)", "require(true", "a gradient of another shape"),
]
