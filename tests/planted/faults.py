"""Faults planted in what keeps a training: checkpoints, resume, signals, processes; see tests/mutants.py."""

TESTS = ("faults/test_resume", "faults/test_distributed", "faults/test_guards", "faults/test_loader",
         "faults/test_signals", "faults/test_hostile_checkpoints", "faults/test_flips",
         "faults/test_injection", "checkpoint")  # fmt: skip
MODULE = "phmdiff_fast.train"

CHECKPOINT, WRITER = "phmdiff_fast/checkpoint.py", "phmdiff_fast/checkpoint_writer.py"
FORMAT = "phmdiff_fast/checkpoint_format.py"
TRAIN, TRAINER, FOLDER = "phmdiff_fast/train.py", "phmdiff_fast/trainer.py", "phmdiff_fast/run_folder.py"
RANKS, LOADER, GUARDS = "phmdiff_fast/distributed.py", "phmdiff_fast/loader.py", "phmdiff_fast/guards.py"
SIGNALS, STEP = "phmdiff_fast/signals.py", "phmdiff_fast/step.py"
FAULTS = [
    (CHECKPOINT, "        temporary.rename(final)\n", "        shutil.copytree(temporary, final)\n", "not renamed"),
    (FORMAT, "            total.update(data)\n", "            total.update(data[:8])\n", "half of a file hashed"),
    (FORMAT, 'text += b" " * (-len(text) % 8)', 'text += b""', "tensors not aligned"),
    (CHECKPOINT, "lightest = load.index(min(load))", "lightest = 0", "one process writes all"),
    (CHECKPOINT, "[1]) > step:", "[1]) >= step:", "the one gone back to is set aside too"),
    (WRITER, "return held.copy_(value.detach(), non_blocking=value.is_cuda)", "return value.detach()", "not copied"),
    (WRITER, "        self.wait()\n        mine", "        mine", "two writings at once"),
    (WRITER, "                self._problem = problem\n", "                pass\n", "a failed writing is not told"),
    (WRITER, "self.abandon()\n\n    def _copy", "pass\n\n    def _copy", "goes on after the end"),
    (TRAIN, "            if asked or share >= 1:\n", "            if stop.asked or share >= 1:\n", "each its own stop"),
    (TRAIN, "                if writer.problem:\n                    raise writer.problem\n", "", "no cause told"),
    (TRAIN, "if trainer.step == trainer.written:", "if False:", "written twice"),
    (TRAIN, '"spikes": trainer.spikes.state()', '"spikes": {}', "the window of losses is not kept"),
    (TRAIN, "        look()\n        if trainer.step ==", "        if trainer.step ==", "a bad step may be saved"),
    (TRAINER, "self.step = self.written = latest.step", "self.step = self.written = latest.step + 1", "a step too far"),
    (TRAINER, "self.everybody_at(step)[self.ranks.rank]", "self.everybody_at(step)[0]", "all see the same share"),
    (TRAINER, 'self.before = float(latest.manifest["seconds"])', "self.before = 0.0", "the clock begins again"),
    (STEP, "self.optimizer.found_inf = bad", "self.optimizer.found_inf = None", "updated with NaN"),
    (STEP, "weight = len(here[0]) / count", "weight = 1.0", "micro-batches are added, not averaged"),
    (TRAINER, "left_out, rollbacks = {*spikes.left_out, self.step}", "left_out, rollbacks = {self.step + 1}", "loops"),
    (TRAINER, "latest.refuse_other(self.config, self.model.state_dict())", "pass", "another run's checkpoint"),
    (FOLDER, 'if record["step"] <= step]', "]", "the log keeps what was lost"),
    (FOLDER, '"stopped" if exit_code in (130, 143) else "failed"', '"failed"', "state in status.json"),
    (RANKS, "        flat /= self.world\n", "", "gradients added, not averaged"),
    (RANKS, "or peer.met >= self._met:", "or peer.met > self._met:", "those who wait are named too"),
    (RANKS, "and not _runs(peer.pid)", "and False", "a dead process is seen late"),
    (RANKS, "os._exit(exit_code)", "os._exit(1)", "exit code of a lost process"),
    (RANKS, "phmdiff-fast/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", "phmdiff-fast", "restarts share names"),
    (RANKS, "self._beat(-2, line, exit_code)\n", "pass\n", "a hung process hears nothing"),
    (LOADER, "signal.signal(signal.SIGTERM, signal.SIG_IGN)", "signal.signal(signal.SIGTERM, signal.SIG_DFL)", "group"),
    (LOADER, "generator=torch.Generator().manual_seed(0),", "", "draws from the global generator"),
    (LOADER, "        if step != self._next:\n", "        if False:\n", "does not go back"),
    (LOADER, "                process.kill()\n", "                pass\n", "workers are left behind"),
    (GUARDS, "        if stage != self.stage:\n", "        if False:\n", "another stage is a spike"),
    (GUARDS, "micro = -(-micro // 2)", "micro = micro // 4", "skips sizes that fit"),
    (GUARDS, "if not is_out_of_memory(problem):", "if False:", "every error is lack of memory"),
    (SIGNALS, "if self.asked is not None and number == signal.SIGINT:", "if False:", "never at once"),
    (SIGNALS, "if asked:\n            raise Terminated", "if False:\n            raise Terminated", "status 0"),
]  # fmt: skip
