"""Faults planted in a step of training: packing, the lean block, the step; see tests/mutants.py."""

TESTS = ("packing", "step", "lean_block", "resident", "phmdiff")
MODULE = "phmdiff_fast.step"

PACKING, LEAN, STEP = "phmdiff_fast/packing.py", "phmdiff_fast/lean_block.py", "phmdiff_fast/step.py"
MODEL, METHOD = "phmdiff_fast/model.py", "phmdiff_fast/phmdiff.py"
EMA, LOADER = "phmdiff_fast/ema.py", "phmdiff_fast/loader.py"
FAULTS = [
    (PACKING, "first += self.batch * length", "first += length", "levels overlap"),
    (PACKING, "torch.arange(1, self.batch + 1,", "torch.arange(0, self.batch,", "sequences begin one too early"),
    (LEAN, "dwp, dbp = _of_weight(dh1, mixed)", "dwp, dbp = _of_weight(dh1, dh1)", "a weight's gradient of itself"),
    (LEAN, "dwide = ops.gelu_backward(_into(dh2, w2), wide)", "dwide = _into(dh2, w2)", "no slope of GELU"),
    (LEAN, "if key != self._key:", "if self._made is None:", "casts outlive an update"),
    (LEAN, "ops.adaln_modulate_cpu(x, shift1, scale1, cu, EPS)", "ops.adaln_modulate_cpu(x2, shift1, scale1, cu, EPS)",
     "the norm of another sum"),
    (STEP, "self.optimizer.found_inf = bad", "pass", "updated with NaN"),
    (STEP, "rng, sample_ids = self.config.train, (self.config.train.seed, step), everybody[self.rank]",
     "rng, sample_ids = self.config.train, (self.config.train.seed, 0), everybody[self.rank]", "noise of step 0"),
    (STEP, "            net.recompute = tc.recompute", "            net.recompute = False", "never recomputed"),
    (STEP, "fullgraph=True, backend=backend", "fullgraph=True, backend=\"eager\"", "compiled by nobody"),
    (MODEL, "idle += [] if level in masked_levels else layer.parameters()", "idle += layer.parameters()", "idle ones"),
    (METHOD, "kept[n] < numbers[n]})", "True})", "a level that keeps all is taken for masked"),
    (METHOD, "told[:-1] = [self.noised_coarse(targets[n + 1]", "told[:-1] = [self.noised_coarse(targets[n]", "level"),
    (METHOD, "return x0.clamp(-1, 1)", "return x0", "the coarse estimate is not clamped"),
    (EMA, "torch._foreach_mul_(apart, share)", "torch._foreach_mul_(apart, 1 - share)", "the other share"),
    (LOADER, "whole[at : at + len(part)] = part", "whole[: len(part)] = part", "slices over one another"),
]  # fmt: skip
