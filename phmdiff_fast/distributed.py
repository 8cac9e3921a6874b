"""Several processes that train one model: who is who, what they agree on, and what happens when one is lost.

``torchrun --nproc-per-node N -m phmdiff_fast train ...`` starts them; each takes its share of every batch
(``parallel``), and of the batches of ``sample`` and ``evaluate`` (``deal``).
A thread in each tells the others twice a second that it is there (a beat), and how many times it has come to a
meeting (a collective operation). A process that is gone, or that the others have waited for too long, is named,
and all that are left end with exit code 7: a step that misses a process' gradients cannot be finished.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import PEER, USAGE, PhmdiffError

BEAT = 0.5  # seconds
SILENT = 6.0  # seconds without a beat after which a process of another machine counts as gone
PATIENCE = 8.0  # seconds in which a broken connection is traced to a process
GLANCE = 3 * BEAT  # and in which it is looked whether another error comes of a lost process
CONNECTION = ("gloo", "nccl", "connection", "socket")  # words of what torch raises when one breaks


@dataclass
class Peer:
    """What another process says of itself: ``beats``, ``met`` (meetings it came to), whether it is ``busy`` with what
    the others wait for, where it runs, how it left."""

    beats: int = -1
    met: int = 0
    busy: bool = False
    host: str = "?"
    pid: int = 0
    left: str | None = None  # "" : all went well; else the line of its error
    exit_code: int = 0
    heard: float = 0.0  # time.monotonic() of its last new beat
    free: float = 0.0  # and of when it was last not waited for


class Alone:
    """One process: everything is agreed on already."""

    rank, world, local_rank, token = 0, 1, 0, ""
    first = True

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def max(self, *values: float) -> list[float]:
        """The largest over all processes of each value."""
        return list(values)

    def tell(self, text: str) -> str:
        """Process 0's text, in every process."""
        return text

    def average(self, tensors: list[Tensor]) -> None:
        """Replace every tensor by its mean over the processes."""

    def total(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over the processes; on its own device, which is not waited for."""

    def deal(self, sizes: list[int], work: Callable[[int], list[Tensor]]) -> list[Tensor]:
        """Pieces of work done in turn by all processes; every one gets all results, in the order of the pieces.

        sizes : n_i of each piece, at least one; work(i) : piece i as tensors (n_i, ...) on the CPU
        Every process does as many pieces as any other (one that would have none left does the last again), so that
        ``work`` may hold collectives. Returns work's tensors, each joined over the pieces: (sum of n_i, ...).
        """
        return [torch.cat(parts) for parts in zip(*(work(i) for i in range(len(sizes))), strict=True)]

    @contextlib.contextmanager
    def meeting(self) -> Iterator[None]:
        """Around collectives that others start (a backward pass): this process comes to them, and if a connection
        breaks inside, the process that is lost is named. Any other error passes."""
        yield

    def arrive(self) -> None:
        """Inside a meeting: this process has come to one more collective. Every process says so as often."""

    @contextlib.contextmanager
    def told_once(self) -> Iterator[None]:
        """Around what every process does for itself, such as reading a file: if it fails in several, the first of
        them tells why, and all end. A meeting of all processes."""
        yield

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """While entered, the others wait for this process as long as it takes: reading a cohort, drawing pictures."""
        yield

    def part(self) -> None:
        """After the last meeting: from here on each ends by itself."""


class Together(Alone):
    """This process among several, as torchrun's environment says (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT).

    timeout : seconds the others wait at a meeting until a process counts as hung
    ending : called with the line and exit code before the process is ended from the watching thread
    """

    def __init__(self, device: torch.device, *, timeout: float, ending: Callable[[str, int], None]):
        self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.first = self.rank == 0
        self._timeout, self._ending = timeout, ending
        self._met, self._busy = 0, False
        self._waits_since: float | None = None
        self._over = threading.Event()
        self._leaving = threading.Lock()
        self.peers = {rank: Peer() for rank in range(self.world) if rank != self.rank}
        backend = "gloo"
        if device.type == "cuda":
            backend = "cpu:gloo,cuda:nccl"
            torch.cuda.set_device(self.local_rank)
        patience = datetime.timedelta(days=7)  # the watching thread ends a process long before
        store = self._connect(patience, hosts=self.first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True")
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world, timeout=patience)
        # A connection of its own: what the main thread waits for on the other one would hold the beats up.
        self._store = self._connect(datetime.timedelta(seconds=SILENT))
        self._beat(0)
        self._watching = threading.Thread(target=self._watch, name="peers", daemon=True)
        self._watching.start()
        self.token = self.tell(f"{os.getpid()}-{time.time_ns():x}")

    @staticmethod
    def _connect(patience: datetime.timedelta, hosts: bool = False) -> dist.PrefixStore:
        """The store that torchrun, or process 0, keeps; with names of this start alone: after a restart torchrun's
        still holds the addresses of the processes that are gone."""
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=hosts,
                              timeout=patience, wait_for_workers=False)  # fmt: skip
        return dist.PrefixStore(f"phmdiff-fast/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)

    # --- what they agree on

    def max(self, *values: float) -> list[float]:
        mine = torch.tensor(values, dtype=torch.float64)
        with self.meeting():
            dist.all_reduce(mine, dist.ReduceOp.MAX)
        return mine.tolist()

    def tell(self, text: str) -> str:
        size = torch.tensor([len(text.encode())])
        with self.meeting():
            dist.broadcast(size, 0)
        data = torch.zeros(int(size), dtype=torch.uint8)
        if self.first:
            data = torch.frombuffer(bytearray(text.encode()) or bytearray(1), dtype=torch.uint8)[: int(size)]
        with self.meeting():
            dist.broadcast(data, 0)
        return bytes(data.tolist()).decode()

    def average(self, tensors: list[Tensor]) -> None:
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        with self.meeting():
            dist.all_reduce(flat)
        flat /= self.world
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def total(self, tensor: Tensor) -> None:
        with self.meeting():
            dist.all_reduce(tensor)

    def deal(self, sizes: list[int], work: Callable[[int], list[Tensor]]) -> list[Tensor]:
        rounds, most = -(-len(sizes) // self.world), max(sizes)
        with self.busy(), self.meeting():  # `work` may take long, and may hold collectives
            turns = range(self.rank, rounds * self.world, self.world)
            mine = [work(min(turn, len(sizes) - 1)) for turn in turns]
        joined = []
        for parts in zip(*mine, strict=True):
            own = parts[0].new_zeros(rounds, most, *parts[0].shape[1:])
            for place, part in zip(own, parts, strict=True):
                place[: len(part)] = part
            everyone = [torch.empty_like(own) for _ in range(self.world)]
            with self.meeting():
                dist.all_gather(everyone, own)
            pieces = [everyone[i % self.world][i // self.world, :size] for i, size in enumerate(sizes)]
            joined.append(torch.cat(pieces))
        return joined

    @contextlib.contextmanager
    def told_once(self) -> Iterator[None]:
        problem = None
        try:
            yield
        except PhmdiffError as raised:
            problem = raised
        failed = self.max(*(float(problem is not None and rank == self.rank) for rank in range(self.world)))
        if not any(failed):
            return
        if problem is None or any(failed[: self.rank]):
            threading.Event().wait(PATIENCE)  # the watching thread hears why the other left, and ends this process
        raise problem or PhmdiffError("PEER_FAILED", "another process has failed", "see its line", exit_code=PEER)

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        before, self._busy = self._busy, True
        try:
            yield
        finally:
            self._busy = before

    def part(self) -> None:
        self._over.set()

    @contextlib.contextmanager
    def meeting(self) -> Iterator[None]:
        self.arrive()
        before, self._waits_since = self._waits_since, time.monotonic()
        try:
            yield
        except RuntimeError as problem:  # who is it?
            broke = _is_connection(problem)
            if not broke and isinstance(problem, torch.OutOfMemoryError):
                raise
            until = time.monotonic() + (PATIENCE if broke else GLANCE)
            while time.monotonic() < until:
                time.sleep(BEAT / 2)
                self._judge()  # does not come back if somebody is gone
            if not broke:
                raise
            self._leave(f"a connection broke ({str(problem).splitlines()[0][:200]!r})", PEER)
        finally:
            self._waits_since = before

    def arrive(self) -> None:
        self._met += 1

    # --- who is lost

    def _beat(self, number: int, left: str | None = None, exit_code: int = 0) -> None:
        said = "-" if left is None else "+" + left
        about = f"{number} {self._met} {self._busy:d} {os.getpid()} {exit_code} {platform.node()}"
        self._store.set(f"{self.rank}", f"{about}\n{said}")

    def _watch(self) -> None:
        number = 0
        while not self._over.wait(BEAT):
            number += 1
            try:
                self._beat(number)
                for rank, peer in self.peers.items():
                    self._hear(rank, peer)
            except Exception as problem:
                if self._over.is_set():
                    return
                # The store lives with torchrun, or with process 0.
                self._leave(f"process 0, or torchrun, which keeps the processes together, is gone "
                            f"({str(problem).splitlines()[0][:120]!r})", PEER)  # fmt: skip
            self._judge()

    def _hear(self, rank: int, peer: Peer) -> None:
        if not self._store.check([f"{rank}"]):
            return
        head, _, said = self._store.get(f"{rank}").decode().partition("\n")
        beats, met, busy, pid, exit_code, host = head.split(" ", 5)
        if int(beats) != peer.beats or said[:1] == "+":
            peer.heard = time.monotonic()
        peer.beats, peer.met, peer.busy, peer.pid, peer.host = int(beats), int(met), busy == "1", int(pid), host
        if said[:1] == "+":
            peer.left, peer.exit_code = said[1:], int(exit_code)

    def _judge(self) -> None:
        """End this process if another is lost."""
        now = time.monotonic()
        waits = self._waits_since
        for rank, peer in self.peers.items():
            who = f"process {rank} (pid {peer.pid} on {peer.host!r})"
            if peer.left:
                self._leave(f"{who} ended: {peer.left}", peer.exit_code, said=True)
            elif peer.left == "" or peer.beats < 0:
                continue
            elif peer.host == platform.node() and not _runs(peer.pid):
                self._leave(f"{who} is gone", PEER)
            elif now - peer.heard > SILENT and peer.host != platform.node():
                self._leave(f"{who} has not been heard of for {now - peer.heard:.0f} s", PEER)
            elif peer.busy or waits is None or peer.met >= self._met:
                peer.free = now
            elif now - max(waits, peer.free) > self._timeout:
                self._leave(f"{who} hangs: the others have waited for it for {now - max(waits, peer.free):.0f} s", PEER)

    def _leave(self, what: str, exit_code: int, *, said: bool = False) -> None:
        """End at once, from whichever thread: the main one may be inside a collective that never returns."""
        if not self._leaving.acquire(blocking=False) or self._over.is_set():
            threading.Event().wait()  # the other thread is ending the process, or it is ending by itself
        cure = "the same command goes on from the last checkpoint"
        line = PhmdiffError("PEER_LOST", what, cure, exit_code=PEER).line()
        try:
            if not said:  # an error is told once, by the process it belongs to
                print(f"phmdiff-fast: process {self.rank}: {line}", file=sys.stderr, flush=True)
            self._ending(line, exit_code)
            with contextlib.suppress(Exception):  # one that hangs still hears of it, and ends
                self._beat(-2, line, exit_code)
        finally:
            os._exit(exit_code)

    def __exit__(self, kind, problem, trace) -> None:
        together = problem is None or self._over.is_set()
        self._over.set()
        self._watching.join(BEAT + SILENT)
        left = "" if together else str(problem) if isinstance(problem, PhmdiffError) else kind.__name__
        try:
            self._beat(-2, left, _exit_code(problem))
            if together:
                dist.destroy_process_group()
            else:
                self._until_heard()
        except Exception:  # the store is gone already; there is nobody left to tell
            pass

    def _until_heard(self) -> None:
        """Wait a little until the others have heard of the error: the store may end with this process."""
        until = time.monotonic() + 6 * BEAT
        while time.monotonic() < until:
            for rank, peer in self.peers.items():
                self._hear(rank, peer)
            if all(peer.left is not None or peer.beats < 0 for peer in self.peers.values()):
                return
            time.sleep(BEAT / 5)


def _exit_code(problem: BaseException | None) -> int:
    if isinstance(problem, KeyboardInterrupt):
        return 130
    if isinstance(problem, SystemExit):
        return int(problem.code or 0)
    return 0 if problem is None else getattr(problem, "exit_code", 1)


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except OSError:
        return not os.path.isdir("/proc/self")  # without /proc nothing is known


def _is_connection(problem: RuntimeError) -> bool:
    text = str(problem).lower()
    return isinstance(problem, dist.DistError) or any(word in text for word in CONNECTION)


@contextlib.contextmanager
def processes(device: torch.device, *, timeout: float = 300.0) -> Iterator[Alone]:
    """This process among those that torchrun started with it, or alone: for ``sample`` and ``evaluate``.

    device : as ``device.pick_device`` gives it; a GPU process gets the one of its LOCAL_RANK. timeout : as of
    ``Together``. Nobody leaves before all are done; an error of one ends all with its exit code.
    """
    if not is_several():
        yield Alone()
        return
    with Together(device, timeout=timeout, ending=lambda line, exit_code: None) as ranks:
        yield ranks
        ranks.max(0.0)
        ranks.part()


def is_several() -> bool:
    """Whether this process was started as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def refuse_share(batch_size: int, world: int) -> None:
    """Raise WORLD_SIZE (exit 2) unless ``world`` processes can share a batch equally."""
    if batch_size % world:
        legal = ", ".join(str(n) for n in range(1, batch_size + 1) if batch_size % n == 0)
        raise PhmdiffError("WORLD_SIZE", f"a batch of {batch_size} cannot be shared by {world} processes",
                           f"start one of {legal}, or change train.batch_size", exit_code=USAGE)  # fmt: skip
