"""Many real processes for the price of one import of torch: a server that forks a process for each command line.

    with Zygote() as zygote:
        run = zygote.start(["train", ...], hook="kill_at:before_rename,4")
        run.kill(); status = run.wait()

A child is a process of its own in every way that matters here: it is killed, signalled and measured like any
other. ``hook`` names a function of ``hooks`` and what it is given (or several, between semicolons); the child calls it
before the command.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent


class Child:
    """A started command: ``pid``, ``wait() -> exit status`` (negative: the signal), ``err`` what it wrote on stderr."""

    def __init__(self, zygote: Zygote, pid: int, err: Path):
        self.zygote, self.pid, self._err, self.status, self.seconds = zygote, pid, err, None, None
        self._started = time.monotonic()

    @property
    def err(self) -> str:
        return self._err.read_text(errors="replace") if self._err.exists() else ""

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self.status is None:
            os.kill(self.pid, number)

    def poll(self) -> int | None:
        if self.status is None:
            self.status = self.zygote._ask({"poll": self.pid})["status"]
            self.seconds = time.monotonic() - self._started
        return self.status

    def wait(self, timeout: float = 120.0) -> int:
        until = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > until:
                self.kill()
                raise TimeoutError(f"still running after {timeout:.0f} s:\n{self.err}")
            time.sleep(0.01)
        return self.status


class Zygote:
    def __enter__(self) -> Zygote:
        self._folder = tempfile.TemporaryDirectory()
        self._count = 0
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")])),
        }
        environment.setdefault("TRITON_INTERPRET", "1")
        self._server = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True, env=environment)  # fmt: skip
        if self._server.stdout.readline() != "ready\n":
            raise RuntimeError("the server did not start")
        return self

    def __exit__(self, *_) -> None:
        self._server.stdin.close()
        self._server.wait(30)
        self._server.stdout.close()
        self._folder.cleanup()

    def _ask(self, request: dict) -> dict:
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def start(self, arguments, *, hook: str = "", env: dict | None = None) -> Child:
        self._count += 1
        err = Path(self._folder.name) / f"{self._count}.err"
        request = {"argv": [str(a) for a in arguments], "hook": hook, "env": env or {}, "err": str(err)}
        return Child(self, self._ask(request)["pid"], err)

    def run(self, arguments, *, hook: str = "", env: dict | None = None, timeout: float = 120.0) -> Child:
        child = self.start(arguments, hook=hook, env=env)
        child.wait(timeout)
        return child

    def start_ranks(self, arguments, world: int, *, hooks: dict[int, str] | None = None) -> list[Child]:
        """``world`` processes with the environment torchrun gives them."""
        port = free_port()
        return [
            self.start(arguments, hook=(hooks or {}).get(rank, ""),
                       env={"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
            for rank in range(world)
        ]  # fmt: skip


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(condition, timeout: float = 60.0) -> None:
    """Until ``condition()`` is true. Raises TimeoutError."""
    until = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError("it did not come to that")
        time.sleep(0.005)


def serve() -> None:
    import hooks
    import matplotlib.pyplot  # noqa: F401 (this is what a start costs)
    import torch
    import torch._dynamo
    import torch.distributed  # noqa: F401

    import phmdiff_fast.evaluate
    import phmdiff_fast.train  # noqa: F401
    from phmdiff_fast.cli import main

    print("ready", flush=True)
    running: set[int] = set()
    while select.select([sys.stdin], [], []) and (line := sys.stdin.readline()):
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            running -= {pid}
            print(json.dumps({"status": os.waitstatus_to_exitcode(status) if pid else None}), flush=True)
            continue
        pid = os.fork()
        if pid:
            running.add(pid)
            print(json.dumps({"pid": pid}), flush=True)
            continue
        code = 1
        try:
            os.setsid()
            err = os.open(request["err"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(err, 2)
            os.dup2(err, 1)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.environ.update(request["env"])
            for hook in filter(None, request["hook"].split(";")):
                name, _, given = hook.partition(":")
                getattr(hooks, name)(*given.split(",") if given else ())
            main(request["argv"])
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else 0 if leaving.code is None else 1
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    for pid in running:
        try:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


if __name__ == "__main__":
    serve()
