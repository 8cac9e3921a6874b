"""Synthesis of slices with a trained model: what does not change from step to step or batch to batch is made once.

Levels go coarse to fine at every timestep (lockstep), or each level is sampled to its end before the next (cascade).

    adaLN vectors    depend on the timestep alone: one row a timestep, for all slices and batches
    stem's maps      once a slice and member, whatever the number of steps and samples
    launches         on a GPU, a batch of a shape seen before is one CUDA graph: all steps of all members
    background       patches without foreground (``background.batches``) never enter the transformer; in their place
                     stands what the network makes of an empty slice, so that the head's convolutions and norms see
                     what they know. Only where x0 is predicted: noise at a place that was not seen cannot be.

Shapes: B slices, C target channels, Cs source channels, H x W image, N patches of a level, K of them kept.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .config import SampleConfig
from .device import autocast
from .diffusion import to_x0
from .kernels import _philox
from .pyramid import build_pyramid, per_sample
from .sampling import SAMPLERS, evaluations, with_detail

VECTOR_BYTES = 256 << 20  # of adaLN vectors kept; timesteps beyond are computed every time
EMPTY_RECORDS = 32  # timesteps of the empty slice kept, evenly spaced; between them the one before serves
EAGER_BATCHES = 2  # of a shape, before it is recorded: kernels are compiled and tuned on the way
MOST_RECORDED = 64  # evaluations of the network in one graph; a batch of more is launched from Python
MOST_GRAPHS = 32  # of an engine: batches of ever new sizes would fill the GPU with them
SAMPLE = 1 << 32  # sample k of slice z takes the noise number z + k 2^32

Kept = list  # a level: (B, K) int32, ascending, the patches that are computed; None: all


def kept_on(device, kept: list | None) -> list[Kept] | None:
    """``background.Batch.kept`` as tensors."""
    return kept and [[k if k is None else torch.from_numpy(k).to(device) for k in view] for view in kept]


@dataclass
class Made:
    """levels : the mean, fine to coarse, (B, C, H_n, W_n) in [-1, 1]; deviation : (B, C, H, W), of what the mean is
    over (samples, members, views), None where ``settings.samples`` is 1."""

    levels: list[Tensor]
    deviation: Tensor | None


@dataclass
class _Pass:
    """What all timesteps of one run of the sampler share."""

    member: int
    sources: list[Tensor]  # a level
    maps: list[Tensor] | None
    ids: Tensor
    kept: Kept | None = None
    empty: dict | None = None  # (level, record) -> tokens (1, N, P) of the empty slice
    record: dict | None = None  # the same, to be filled: this is the empty slice
    asked: Counter = field(default_factory=Counter)  # evaluations of each level so far
    features: Tensor | None = None  # the head's, which a cascade's finer level takes over


class Engine:
    """A model ready to synthesize batch after batch with one setting.

    model : PHMDiff, whose weights do not change from now on; settings : SampleConfig; dtype : of the products, None
    for what autocast says where it is called. Members, views and samples (``settings.samples``, other noise each)
    are averaged.
    """

    def __init__(self, model, settings: SampleConfig, dtype: torch.dtype | None = None):
        self.model, self.settings, self.dtype = model, settings, dtype
        self._vectors: dict[tuple[int, int], list[list[Tensor]]] = {}
        self._room = VECTOR_BYTES
        self._empty: dict[tuple, dict] = {}
        asked = evaluations(settings.sampler, settings.steps)
        self._stride = -(-asked // EMPTY_RECORDS)
        self._records = asked * model.usable * settings.views * settings.samples <= MOST_RECORDED
        self._recorded: dict[tuple, _Recorded] = {}
        self._pool = None  # of memory, shared by all graphs: they run one after the other
        self._calls: Counter = Counter()

    @property
    def skips(self) -> bool:
        """Whether background is left out: the settings say so, and this model can do without."""
        config = self.model.config
        return self.settings.skip_background and config.denoiser == "transformer" and config.prediction == "x0"

    @torch.no_grad()
    def __call__(self, sources: Tensor, sample_ids: Tensor, kept: list[Kept] | None = None, *, progress=None) -> Made:
        """sources (B, Cs, H, W) in [-1, 1]; sample_ids (B,) int64 name the slices and their noise.

        kept : for each view the patches of every level that are computed (``background.batches``); None: all
        ``progress(i)`` is called after each step of each pass (member, view and sample).
        """
        with autocast(sources.device, self.dtype) if self.dtype else contextlib.nullcontext():
            if not (sources.is_cuda and self._records and progress is None and self.settings.cuda_graph == "auto"):
                return self._made(sources, sample_ids, kept, progress)
            shapes = kept and tuple(tuple(k is not None and k.shape for k in view) for view in kept)
            key = (sources.shape, sources.device, shapes)
            self._calls[key] += 1
            full = key not in self._recorded and len(self._recorded) == MOST_GRAPHS
            if self._calls[key] <= EAGER_BATCHES or full:
                with _aside():
                    return self._made(sources, sample_ids, kept, None)
            if key not in self._recorded:
                self._pool = self._pool or torch.cuda.graph_pool_handle()
                self._recorded[key] = _Recorded(self._made, sources, sample_ids, kept, self._pool)
            return self._recorded[key].replay(sources, sample_ids, kept)

    def _made(self, sources: Tensor, sample_ids: Tensor, kept: list[Kept] | None, progress) -> Made:
        members, views, samples = self.model.usable, self.settings.views, self.settings.samples
        mean = _Mean(members * views * samples, spread=samples > 1)
        for view in range(views):
            seen = self.model.pad(sources.flip(2) if view else sources)
            levels = build_pyramid(seen, self.model.num_levels)
            for member in range(members):
                maps = self.model.nets[member].source_maps(levels[0])
                for k in range(samples):
                    way = _Pass(member, levels, maps, sample_ids + k * SAMPLE)
                    if kept is not None and self.skips:
                        way.kept = kept[view]
                        way.empty = self._empty_slice(member, levels)
                    made = self._cropped(self._sampled(way, progress), *sources.shape[2:])
                    mean.add([level.flip(2) for level in made] if view else made)
        levels = mean.levels()
        return Made([with_detail(levels[0], self.settings.detail), *levels[1:]], mean.deviation())

    @staticmethod
    def _cropped(levels: list[Tensor], height: int, width: int) -> list[Tensor]:
        out = []
        for image in levels:
            out.append(image[..., :height, :width])
            height, width = -(-height // 2), -(-width // 2)
        return out

    def _sampled(self, way: _Pass, progress) -> list[Tensor]:
        """x0 of all levels, of one member, view and noise."""
        every = range(self.model.num_levels)
        if self.model.config.coupling == "lockstep":
            return self._sample(way, every, None, progress)
        levels: list[Tensor] = []
        for n in reversed(every):
            levels.insert(0, self._sample(way, range(n, n + 1), levels[0] if levels else None, progress)[0])
        return levels

    def _sample(self, way: _Pass, levels: range, coarse: Tensor | None, progress) -> list[Tensor]:
        """Run the sampler over some levels together; ``coarse`` is the estimate below the coarsest of them."""
        model, settings, below = self.model, self.settings, way.features
        shape = (len(way.ids), model.nets[way.member].target_channels)
        likes = {n: way.sources[n].new_empty(*shape, *way.sources[n].shape[2:]) for n in levels}

        def draw(i: int) -> list[Tensor]:
            return [model.normals(way.ids, likes[n], (settings.seed, i), _philox.EPS + n) for n in levels]

        def denoise(states: list[Tensor], t: int):
            return self._denoise(way, levels, states, t, coarse, below)

        how = {"draw": draw} if settings.sampler == "ddpm" else {}
        run = SAMPLERS[settings.sampler]
        return run(denoise, draw(0), model.schedule.table, settings.steps, progress=progress, **how)

    def _denoise(self, way: _Pass, levels: range, states: list[Tensor], t: int, coarse, below):
        """x0 estimates and variance fractions of some levels, coarse to fine; lists are fine to coarse."""
        model, count = self.model, len(way.ids)
        coarse_t = self.settings.coarse_t if model.config.coarse == "teacher" else 0
        abar = torch.full((count,), model.schedule.table[t], device=way.ids.device)
        vectors = self._modulations(way.member, t, coarse_t, way.ids)
        out, fractions = list(states), list(states)
        for i, level in reversed(list(enumerate(levels))):
            if coarse is not None and coarse_t:
                told = way.ids.new_full((count,), coarse_t)
                coarse = model.noised_coarse(coarse, way.ids, (self.settings.seed, 0), level + 1, told)
            rows = [row.expand(count, -1).contiguous() for row in vectors[level]]
            coarse, fractions[i], below = self._estimate(way, level, states[i], coarse, abar, rows, below)
            out[i] = coarse
        way.features = below
        return out, fractions if model.config.learn_variance else None

    def _estimate(self, way: _Pass, level: int, y_t: Tensor, coarse, abar: Tensor, rows: list[Tensor], below):
        """(x0 clamped, variance fraction or None, the head's features or None) of one level from a sampler's y_t."""
        model, number = self.model, way.asked[level]
        way.asked[level] += 1
        clean = y_t / per_sample(abar.sqrt())  # embed_visible multiplies by sqrt(abar) again
        given = model.at_level(level, clean, way.sources[level], coarse, abar, way.maps, below=below)
        given.record = way.record is not None and number % self._stride == 0
        if way.kept is not None and way.kept[level] is not None:
            given.kept = way.kept[level]
            given.empty = way.empty[level, number // self._stride]
        out, fraction = model.split(model.nets[way.member].forward_levels([given], rows)[0])
        if given.record:
            way.record[level, number // self._stride] = given.tokens
        return to_x0(model.config.prediction, out, y_t, abar).clamp(-1, 1), fraction, given.features

    def _modulations(self, member: int, t: int, coarse_t: int, ids: Tensor) -> list[list[Tensor]]:
        """adaLN vectors of a timestep, a level and layer: (1, 6 D) or (1, 2 D)."""
        if (member, t) in self._vectors:
            return self._vectors[member, t]
        made = self.model.nets[member].modulations(ids.new_full((1,), t), ids.new_full((1,), coarse_t))
        size = sum(row.numel() * row.element_size() for rows in made for row in rows)
        if size <= self._room:
            self._room -= size
            self._vectors[member, t] = made
        return made

    def _empty_slice(self, member: int, like: list[Tensor]) -> dict:
        """Tokens in front of the head, at each timestep and level, of a slice that is background everywhere."""
        key = (member, *like[0].shape[1:])
        if key not in self._empty:
            sources = [torch.full_like(level[:1], -1) for level in like]
            maps = self.model.nets[member].source_maps(sources[0])
            ids = torch.zeros(1, dtype=torch.int64, device=like[0].device)
            way = _Pass(member, sources, maps, ids, record={})
            self._sampled(way, None)
            self._empty[key] = way.record
        return self._empty[key]


@contextlib.contextmanager
def _aside():
    """A stream of its own: what is allocated and tuned on the way is then ready to be recorded."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        yield
    torch.cuda.current_stream().wait_stream(side)


class _Recorded:
    """A batch as a CUDA graph: its inputs are copied into its own, its images are copied out of its own."""

    def __init__(self, make, sources: Tensor, sample_ids: Tensor, kept: list[Kept] | None, pool):
        self.sources, self.ids = sources.clone(), sample_ids.clone()
        self.kept = kept and [[k if k is None else k.clone() for k in view] for view in kept]
        self.graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        # A cast weight that autocast remembers from outside would be none of the graph's.
        torch.clear_autocast_cache()
        with torch.cuda.graph(self.graph, pool=pool):
            self.made = make(self.sources, self.ids, self.kept, None)
        torch.clear_autocast_cache()

    def replay(self, sources: Tensor, sample_ids: Tensor, kept: list[Kept] | None) -> Made:
        self.sources.copy_(sources)
        self.ids.copy_(sample_ids)
        for own, given in zip(self.kept or (), kept or (), strict=True):
            for mine, theirs in zip(own, given, strict=True):
                if mine is not None:
                    mine.copy_(theirs)
        self.graph.replay()
        # Copied out before another graph of the pool runs over it.
        levels, deviation = self.made.levels, self.made.deviation
        return Made([level.clone() for level in levels], None if deviation is None else deviation.clone())


class _Mean:
    """Of images that come one after the other; their deviation by Welford's sums, as squares would cancel out."""

    def __init__(self, count: int, spread: bool):
        self.count, self.spread, self.seen = count, spread, 0
        self._total: list[Tensor] = []
        self._mean = self._squares = None

    def add(self, levels: list[Tensor]) -> None:
        self.seen += 1
        self._total = [a + b for a, b in zip(self._total, levels, strict=True)] if self._total else levels
        if self.spread:
            if self._mean is None:
                self._mean, self._squares = torch.zeros_like(levels[0]), torch.zeros_like(levels[0])
            gap = levels[0] - self._mean
            self._mean = self._mean + gap / self.seen
            self._squares = self._squares + gap * (levels[0] - self._mean)

    def levels(self) -> list[Tensor]:
        return [level / self.count for level in self._total]

    def deviation(self) -> Tensor | None:
        return None if self._squares is None else (self._squares / (self.count - 1)).sqrt()
