"""Faults planted in what is compared and how: losses, members, augmentation, scores, bench; see tests/mutants.py."""

TESTS = ("phmdiff", "model", "losses", "members", "augment", "metrics", "quality", "rivals", "ablate",
         "cache", "grid", "diffusion")  # fmt: skip
MODULE = "phmdiff_fast.phmdiff"
ARGUMENTS = ("-k", "not overfits and not every_option")

LOSSES, METHOD, MODEL = "phmdiff_fast/losses.py", "phmdiff_fast/phmdiff.py", "phmdiff_fast/model.py"
TRAINER, EMA, CONV = "phmdiff_fast/trainer.py", "phmdiff_fast/ema.py", "phmdiff_fast/conv_denoiser.py"
STEP, CACHE, SAMPLING = "phmdiff_fast/step.py", "phmdiff_fast/cache.py", "phmdiff_fast/sampling.py"
AUGMENT, METRICS, ABLATE = "phmdiff_fast/augment.py", "phmdiff_fast/metrics.py", "phmdiff_fast/ablate.py"
BENCH, TABLE = "benchmarks/quality.py", "benchmarks/quality_table.py"
UNET, RIVAL_TRAINING = "benchmarks/rivals/unet.py", "benchmarks/rivals/training.py"
FAULTS = [
    (LOSSES, "c1, c2 = (0.01 * DATA_RANGE) ** 2, (0.03 * DATA_RANGE) ** 2", "c1 = c2 = (0.01 * DATA_RANGE) ** 2", "C2"),
    (LOSSES, "with torch.autocast(x.device.type, enabled=False):", "if True:", "SSIM in 16 bit"),
    (METHOD, "denoise + train.ssim_weight * (1 - losses", "denoise + train.ssim_weight * (losses", "the wrong sign"),
    (METHOD, "for n, net in enumerate(nets) if n != self.active", "for n, net in enumerate(nets) if n > self.active",
     "members trained before are not idle"),
    (SAMPLING, "0.25 * (before + after) + 0.5 * here", "(before + after + here) / 3", "a box for a binomial"),
    (SAMPLING, "(1 - gain) * blurred).clamp(-1, 1)", "(1 - gain) * blurred)", "detail beyond the range"),
    (CACHE, "blocks.mean((-3, -1), dtype=np.float32)", "blocks[..., 0, :, 0]", "a corner for the mean"),
    (CACHE, "clip = self._lo[rows], self._gain[rows], self.finer == 1 or not fine",
     "clip = self._lo[rows], self._gain[rows], True", "clipped before the mean"),
    (CACHE, "data_config.hu_window), finer)[stored]",
     "data_config.hu_window)).repeat(finer, 1).repeat(finer, 2)[stored]", "finer in size alone"),
    (AUGMENT, "(F.avg_pool2d(image, finer) for image in", "(image[..., ::finer, ::finer] for image in", "no mean"),
    (AUGMENT, "    if finer > 1 or moved:\n", "    if moved:\n", "means that are not clipped"),
    (AUGMENT, "offsets = finer * (((2", "offsets = (((2", "jitter by fine pixels"),
    (AUGMENT, '"finer": data.oversample}', '"finer": 1}', "finer slices trained on as they are"),
    (STEP, "(side // self.config.data.oversample for side", "(side for side", "unused weights of a larger image"),
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
    (BENCH, '(*parts["train"], *parts["val"]), (), tuple(parts["test"])',
     '(*parts["train"], *parts["test"]), (), tuple(parts["test"])', "a fold trains on its own people"),
    (UNET, "self.nets[active].step(sources, target, share * count - active, step - self.before)",
     "self.nets[active].step(sources, target, share, step)", "one schedule for all U-Nets"),
    (UNET, "self.nets[: int(self.usable)]", "self.nets", "U-Nets that are not trained count"),
    (RIVAL_TRAINING, "        rival.end()\n", "", "the last U-Net does not count"),
    (RIVAL_TRAINING, "count * config.batch_size / len(rows)", "count / len(rows)", "passes of single slices"),
    (ABLATE, 'read_facts(out / rows[0], configs[rows[0]])["members"]', "settings.model.members",
     "members follow a row's speed"),
    (TABLE, "apart.std(ddof=1) / math.sqrt(count)", "apart.std(ddof=1)", "the interval of a person"),
    (TABLE, "stats.t.ppf(0.975, count - 1)", "stats.norm.ppf(0.975)", "a normal interval for three people"),
]  # fmt: skip
