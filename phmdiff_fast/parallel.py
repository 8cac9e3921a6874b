"""A model trained by several processes: whole copies of it (DDP), or a share of every weight in each (FSDP2).

    together = wrap(model, ranks, "ddp", device, dtype)      # before the optimizer and the average are made
    together.stage(masked, height, width)                    # before the first step of a stage
    with together.accumulate(last=True):
        terms = together.module(target, sources, ids, rng, train, masked=masked, gather=together.gather(everybody))
        terms.total.backward()                               # gradients are averaged on the way
    norm = together.clip(1.0)

The mean over processes of the gradients of each one's images is the gradient of all of them, as every process has as
many; the MMD, which is no mean over images, is computed of all of them by each (``losses.Gather``).
"""

from __future__ import annotations

import contextlib
import gc
import inspect
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .checkpoint import Groups, share
from .distributed import Alone
from .losses import Gather
from .phmdiff import LossTerms, PHMDiff

# Schedules are the same in every process already: DDP's option not to send them, by its name of 2.13 and before.
_OPTIONS = inspect.signature(DistributedDataParallel.__init__).parameters
BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _OPTIONS else "broadcast_buffers"


def wrap(model: PHMDiff, ranks: Alone, kind: str, device: torch.device, dtype: torch.dtype) -> Single:
    """The model on ``device``, ready for the steps of ``ranks``.

    model : with the same weights in every process; "fsdp" takes it from the CPU, so that no device ever holds it whole
    kind : "ddp", or "fsdp" for a model whose weights, gradients, average and optimizer do not fit on one device
    dtype : of the products; with "fsdp" 16-bit weights are sent where the products would round them anyway
    """
    if ranks.world == 1:
        return Single(model.to(device), ranks)
    if kind == "fsdp":
        return Shares(model, ranks, device, dtype)
    return Copies(model.to(device), ranks)


class Single:
    """One process: nothing to agree on.

    ``module`` is called as ``PHMDiff.loss``; ``model`` holds the parameters, for optimizer, average and ``translate``;
    ``shared``: this process holds only its share of each.
    """

    shared = False

    def __init__(self, model: PHMDiff, ranks: Alone):
        self.model, self.ranks = model, ranks
        self.module: nn.Module | None = model

    def stage(self, masked: bool, height: int, width: int) -> None:
        """To be called by all before the first step of a stage on (height, width) images; again changes nothing."""

    @contextlib.contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """Around forward and backward of a micro-batch: gradients are averaged over processes at the ``last``."""
        yield

    def gather(self, everybody: Tensor) -> Gather | None:
        """What ``PHMDiff.loss`` needs for a loss of all processes' images. everybody (W, B) int64: their sample ids,
        a row a process, on the device."""
        return None

    def mean(self, terms: LossTerms) -> LossTerms:
        """Detached loss terms, averaged over the processes."""
        return terms

    def clip(self, max_norm: float) -> Tensor:
        """Scale the gradients to a norm of at most ``max_norm``; the norm before, 0-d, which nobody waits for."""
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)

    def full(self, groups: Groups) -> Groups:
        """What ``Writer.save`` takes: whole tensors where this process writes them (``checkpoint.share``)."""
        return groups

    def shard(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The reverse: a checkpoint's tensors, named as parameters or ``<state>/<parameter>``, as this process holds
        them; to be loaded as they are into model, average and optimizer."""
        return tensors


class Several(Single):
    """What both ways have in common."""

    def gather(self, everybody: Tensor) -> Gather:
        return Gather(everybody, self.ranks.rank, self.ranks.total)

    def mean(self, terms: LossTerms) -> LossTerms:
        parts = [part.detach().clone() for part in (terms.total, terms.denoise, terms.mmd, terms.vlb)]
        self.ranks.average(parts)
        return LossTerms(*parts)


class Copies(Several):
    """DDP: every process holds all weights; gradients are summed in buckets while backward goes on.

    Parameters that a stage does not use take no part in it, so that no bucket waits for them and they have no gradient,
    as with one process. Another stage has another wrapper.
    """

    def __init__(self, model: PHMDiff, ranks: Alone):
        super().__init__(model, ranks)
        self._at: tuple | None = None
        self._idle: set[int] | None = None
        self.module = None  # until the first stage

    def stage(self, masked: bool, height: int, width: int) -> None:
        at = (masked, height, width, self.model.active)
        if at == self._at:
            return
        self._at = at
        idle = {id(parameter) for parameter in self.model.unused(masked, height, width)}
        if idle == self._idle:
            return
        self._idle = idle
        for parameter in self.model.parameters():
            parameter.requires_grad_(id(parameter) not in idle)
            parameter.grad = None  # a piece of the old wrapper's buckets
        if self.module is not None:
            self.module = None
            gc.collect()  # the old wrapper is a cycle, and its hooks on the parameters go with it
        with self.ranks.meeting():
            self.module = DistributedDataParallel(self.model, gradient_as_bucket_view=True, **{BUFFERS: False})
        self.module.register_comm_hook(self.ranks, _average)

    @contextlib.contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        if not last:
            with self.module.no_sync():
                yield
            return
        with self.ranks.meeting():
            yield


def _average(ranks, bucket):  # without types: DDP refuses those that are text
    """What DDP does by itself; said to the watching thread, to which a process that hangs in backward has not come."""
    ranks.arrive()
    gradients = bucket.buffer().div_(ranks.world)
    return dist.all_reduce(gradients, async_op=True).get_future().then(lambda done: done.value()[0])


class Shares(Several):
    """FSDP2: every process holds a share of each weight, its gradient, its average and its optimizer's state.

    A block's weights are gathered when it runs, forward and again backward. Its modulation runs long before it, so it
    is a unit of its own; what is left (embedders, stem, heads, norms) is one more. Micro-batches are averaged one by
    one: whole gradients would be kept otherwise.
    """

    shared = True

    def __init__(self, model: PHMDiff, ranks: Alone, device: torch.device, dtype: torch.dtype):
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

        super().__init__(model, ranks)
        _register_loss_terms()
        mesh = DeviceMesh.from_group(dist.group.WORLD, device.type)
        narrow = dtype if dtype in (torch.bfloat16, torch.float16) else None
        # Under autocast a product rounds its weights; sent rounded they are the same bits and half the bytes.
        products = MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=torch.float32, cast_forward_inputs=False)
        rest = MixedPrecisionPolicy(reduce_dtype=None, cast_forward_inputs=False)
        if narrow is None:
            products = rest  # float64 stays float64
        with ranks.meeting():
            for block in [block for net in model.nets for block in (*net.blocks, *net.decoder_blocks)]:
                fully_shard(block.adaLN_modulation[1], mesh=mesh, mp_policy=products, reshard_after_forward=True)
                fully_shard(block, mesh=mesh, mp_policy=products, reshard_after_forward=True)
            fully_shard(model, mesh=mesh, mp_policy=rest, reshard_after_forward=True)
        for method in ("loss", "translate"):
            register_fsdp_forward_method(model, method)
        for unit in (module for module in model.modules() if isinstance(module, FSDPModule)):
            unit.set_custom_all_gather(_AllGather(ranks))
            unit.set_custom_reduce_scatter(_ReduceScatter(ranks))
        self._parameters = dict(model.named_parameters())

    @contextlib.contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        with self.ranks.meeting():
            yield

    def clip(self, max_norm: float) -> Tensor:
        gradients = [p.grad.to_local() for p in self._parameters.values() if p.grad is not None]
        squared = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))).square()
        self.ranks.total(squared)
        norm = squared.sqrt()
        torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp_max(1.0))  # as clip_grad_norm_
        return norm

    def full(self, groups: Groups) -> Groups:
        mine = share(groups, self.ranks.rank, self.ranks.world)
        whole: Groups = {}
        for group, tensors in groups.items():
            whole[group] = {}
            for name, value in tensors.items():
                if hasattr(value, "full_tensor"):
                    with self.ranks.meeting():
                        value = value.full_tensor()  # one at a time: no process holds all of them
                    # Others hold its place: the same size, so that ``share`` deals as before, and no bytes.
                    value = value.cpu() if name in mine[group] else torch.empty_like(value, device="meta")
                whole[group][name] = value
        return whole

    def shard(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: self._sharded(name, value) for name, value in tensors.items()}

    def _sharded(self, name: str, value: Tensor) -> Tensor:
        from torch.distributed.tensor import distribute_tensor

        like = self._parameters.get(name)
        if like is None:
            like = self._parameters.get(name.partition("/")[2])
        if like is None or value.shape != like.shape:  # a step's number; what does not fit is refused by who loads it
            return value
        mine = distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
        return torch.empty_like(like, dtype=value.dtype).copy_(mine)  # a copy: the piece would keep the whole alive


class _Counted:
    """A collective of FSDP2's, said to the watching thread as DDP's buckets are."""

    def __init__(self, ranks: Alone):
        self.ranks = ranks

    def allocate(self, size, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _AllGather(_Counted):
    def __call__(self, output_tensor, input_tensor, group, async_op=False):
        self.ranks.arrive()
        return dist.all_gather_into_tensor(output_tensor, input_tensor, group=group, async_op=async_op)


class _ReduceScatter(_Counted):
    def __call__(self, output_tensor, input_tensor, group, op, async_op=False):
        self.ranks.arrive()
        if input_tensor.device.type == "cpu" and op == dist.ReduceOp.AVG:  # gloo has sums only
            input_tensor.div_(self.ranks.world)
            op = dist.ReduceOp.SUM
        return dist.reduce_scatter_tensor(output_tensor, input_tensor, group=group, op=op, async_op=async_op)


def _register_loss_terms() -> None:
    """FSDP2 finds the tensors that a forward returns, on which backward begins, in what pytree knows alone."""
    from torch.utils import _pytree

    if LossTerms not in _pytree.SUPPORTED_NODES:
        torch.export.register_dataclass(LossTerms)
