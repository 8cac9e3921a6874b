"""Faults planted in what is compared and how: losses, members, augmentation, scores, bench; see tests/mutants.py."""

TESTS = ("phmdiff", "model", "losses", "members", "augment", "metrics", "quality", "rivals", "ablate")
MODULE = "phmdiff_fast.phmdiff"
ARGUMENTS = ("-k", "not overfits and not every_option")

LOSSES, METHOD, MODEL = "phmdiff_fast/losses.py", "phmdiff_fast/phmdiff.py", "phmdiff_fast/model.py"
TRAINER, EMA, CONV = "phmdiff_fast/trainer.py", "phmdiff_fast/ema.py", "phmdiff_fast/conv_denoiser.py"
AUGMENT, METRICS, ABLATE = "phmdiff_fast/augment.py", "phmdiff_fast/metrics.py", "phmdiff_fast/ablate.py"
BENCH, TABLE, RIVALS = "benchmarks/quality.py", "benchmarks/quality_table.py", "benchmarks/rivals"
FAULTS = [
    (LOSSES, "c1, c2 = (0.01 * DATA_RANGE) ** 2, (0.03 * DATA_RANGE) ** 2", "c1 = c2 = (0.01 * DATA_RANGE) ** 2", "C2"),
    (LOSSES, "with torch.autocast(x.device.type, enabled=False):", "if True:", "SSIM in 16 bit"),
    (METHOD, "denoise + train.ssim_weight * (1 - losses", "denoise + train.ssim_weight * (losses", "the wrong sign"),
    (METHOD, "for n, net in enumerate(nets) if n != self.active", "for n, net in enumerate(nets) if n > self.active",
     "members trained before are not idle"),
    (METHOD, "nets, mirrors = self.nets[: self.usable]", "nets, mirrors = self.nets", "untrained members count"),
    (METHOD, "[level.flip(2) for level in levels] if mirrored", "levels if mirrored", "the mirror is not undone"),
    (METHOD, "return [level / (len(nets) * len(mirrors))", "return [level / (len(nets))", "a sum for a mean"),
    (METHOD, "            below = given.features\n", "            below = None\n", "nothing handed up"),
    (MODEL, "                below = at.features\n", "                below = None\n", "nor within one pass"),
    (MODEL, "return x + at.coarse_up if", "return x if", "no residual"),
    (CONV, "            x = x * kept", "            kept = x * kept", "a mask that hides nothing"),
    (CONV, "return per_sample(root) * state if scaled else state", "return state", "a state that is not scaled"),
    (TRAINER, "return share * members - active", "return share", "a member's schedule runs over the whole budget"),
    (TRAINER, "members if share >= 1 else max(1, active)", "members", "all count as trained"),
    (TRAINER, "round(passes / PASSES)", "int(passes / PASSES)", "members rounded down"),
    (EMA, "if id(weight) in chosen", "if True", "the average follows everybody"),
    (AUGMENT, "- offsets[:, axis - 2, None]", "+ offsets[:, axis - 2, None]", "moved the other way"),
    (AUGMENT, "2 * config.jitter + 1) * uniforms", "2 * config.jitter) * uniforms", "one offset never comes"),
    (AUGMENT, "return (end + (at - piece - 1) * rise)", "return (end - (at - piece - 1) * rise)", "a curve that jumps"),
    (METRICS, "(mean(prediction * reference) - a * b)", "mean(prediction * reference)", "no covariance"),
    (METRICS, "np.take(foreground, range(1, image.shape[axis]), axis) & ", "", "an edge out of the foreground counts"),
    (ABLATE, 'tables["model"]["levels"] = tables["model"]["levels"][:1]', "pass", "the pyramid stays"),
    (ABLATE, 'tables["train"]["last_t_share"] = 1.0', "pass", "the diffusion stays"),
    (BENCH, "tuple(s for s in real if s != person), (), (person,)", "tuple(real), (), (person,)", "tests its own"),
    (BENCH, 's not in FIXED["val"] and s not in FIXED["test"]', 's not in FIXED["test"]', "trained on validation"),
    (BENCH, "if job.key in done:", "if False:", "trained again"),
    (BENCH, 'b"" if file.read() == b"\\n" else b"\\n"', 'b""', "a cut line swallows the next"),
    (TABLE, "apart.std(ddof=1) / math.sqrt(count)", "apart.std(ddof=1)", "the interval of a person"),
    (TABLE, "stats.t.ppf(0.975, count - 1)", "stats.norm.ppf(0.975)", "a normal interval for three people"),
]  # fmt: skip
