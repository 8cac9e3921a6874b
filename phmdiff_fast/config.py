"""Settings: what can be chosen, its default, and where a choice comes from (preset, TOML, --set).

Imported by every room, imports none of them. A settings file has the tables ``[data]``,
``[model]``, ``[train]`` and ``[sample]``; an unknown or wrongly typed key is refused with the
nearest known name.
"""

from __future__ import annotations

import difflib
import stat
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import USAGE, PhmdiffError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


MOST_MEMBERS = 16  # networks of a run
MOST_BYTES = 64 << 10  # of a run's config.toml; ours have two thousand
Contrast = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,128}$")]  # it becomes part of file names


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)


class LevelSpec(Settings):
    """One level of the pyramid, fine (0) to coarse."""

    mask_ratio: float = Field(0.5, ge=0.0, lt=1.0)  # r0 of III.B.1, before the complexity term
    weight: float = Field(1.0, ge=0.0)  # of this level in the loss


def default_levels() -> list[LevelSpec]:
    return [LevelSpec(mask_ratio=r) for r in (0.75, 0.5, 0.25)]


class DataConfig(Settings):
    sources: list[Contrast] = Field(default_factory=lambda: ["t1"], min_length=1, max_length=64)
    target: Contrast = "t2"
    image_size: int = Field(64, ge=8, le=1024)  # in-plane, after crop or pad and area resampling
    # Training slices are kept this many times finer along each side, moved there (rotate, zoom, shift, elastic) and
    # then averaged down by area, as the scan itself was: moved at their own size they would be blurred.
    oversample: int = Field(1, ge=1, le=8)
    crop: int | None = Field(None, ge=8)  # side in voxels of the centre crop; None: longer in-plane side
    axis: Literal["axial", "coronal", "sagittal"] = "axial"  # which slices; of the scan turned to RAS
    context_slices: int = Field(0, ge=0, le=8)  # neighbouring source slices on each side, as further channels
    hu_window: tuple[float, float] = (-1024.0, 3000.0)  # HU that become -1 and 1 (ct, cbct); synthrad2023's range
    min_foreground: float = Field(0.01, ge=0.0, lt=1.0)  # a training slice has at least this share
    skip_incomplete: bool = False  # leave subjects without every contrast asked for out
    nan: Literal["raise", "zero"] = "raise"  # NaN and Inf voxels: refuse the scan, or set them to 0
    max_volume_gib: float = Field(2.0, gt=0)  # the largest scan that is read, counted as float32

    @model_validator(mode="after")
    def _target_is_no_source(self):
        if self.target in self.sources:
            raise ValueError(f"target {self.target!r} is also a source")
        if len(set(self.sources)) != len(self.sources):
            raise ValueError("a source is named twice")
        if not self.hu_window[0] < self.hu_window[1]:
            raise ValueError(f"hu_window {self.hu_window} does not rise")
        return self

    @property
    def source_channels(self) -> int:
        """Cs: sources times the slices shown of each."""
        return len(self.sources) * (2 * self.context_slices + 1)


class ModelConfig(Settings):
    # "convolutions": a small U-Net instead (width: head_width), for the comparison of the paper's Table II.
    denoiser: Literal["transformer", "convolutions"] = "transformer"
    # Networks of their own, trained one after the other, each for an equal share of the budget; their estimates are
    # averaged (deep ensemble, Lakshminarayanan et al. 2017): what is learnt of few people by one alone cancels out.
    # 0: as many as the budget has room for, each some 90 passes over the training slices (``trainer.members_for``).
    members: int = Field(1, ge=0, le=MOST_MEMBERS)
    depth: int = Field(6, ge=1, le=256)
    width: int = Field(192, ge=16, le=16384)
    heads: int = Field(3, ge=1, le=1024)
    decoder_depth: int = Field(2, ge=1, le=256)
    decoder_width: int = Field(96, ge=16, le=16384)
    decoder_heads: int = Field(3, ge=1, le=1024)
    patch: int = Field(4, ge=1, le=256)
    mlp_ratio: float = Field(4.0, gt=0, le=64)
    levels: list[LevelSpec] = Field(default_factory=default_levels, min_length=1, max_length=5)
    complexity_gain: float = Field(0.2, ge=0.0)  # the 0.2 of r_n = clip(r0_n + 0.2 (1 - c_n / mean c), ...)
    decoder_input: Literal["noisy", "token"] = "noisy"
    # Which reading of the paper: "maskdit" noises everything, then masks (III.B.1); "diffmae" shows the
    # encoder clean source patches only, and the decoder denoises every target patch (Eq. 2-5).
    reading: Literal["maskdit", "diffmae"] = "maskdit"
    drop_background: bool = False  # the mask drops patches without foreground before any other
    prediction: Literal["x0", "v", "eps"] = "x0"
    scale_state: bool = True  # x0 and v: the state times sqrt(abar) keeps the noise out at high t
    learn_variance: bool = False  # Eq. 4: the reverse variance between beta and beta tilde, for sampler ddpm
    coarse: Literal["predicted", "teacher"] = "predicted"  # Yhat in training: own estimate, or noised truth
    coarse_noise: int = Field(250, ge=1)  # teacher: noised to a t drawn below this, which the network is told
    coupling: Literal["lockstep", "cascade"] = "lockstep"  # one t for all levels, or a t per level
    stem: bool = True  # convolutions over the sources, once a slice
    stem_width: int = Field(32, ge=4, le=4096)
    head: bool = True  # convolutions over the unpatchified tokens, with the stem's maps as skips
    head_width: int = Field(32, ge=4, le=4096)
    # "flat": a level's head sees that level. "pyramid": it also takes over the features of the coarser level's head, so
    # that all levels make one way up through the resolutions, with the stem's maps as skips.
    head_kind: Literal["flat", "pyramid"] = "flat"
    stem_to_tokens: bool = True  # the stem's maps are channels of the patches; else the head alone reads them
    residual: bool = False  # x0 only: a level predicts what the upsampled coarser estimate lacks
    timesteps: int = Field(1000, ge=2, le=100000)
    schedule: Literal["linear", "cosine"] = "linear"  # cosine takes no betas
    beta_start: float = Field(1e-4, gt=0, lt=1)
    beta_end: float = Field(0.02, gt=0, lt=1)

    @model_validator(mode="after")
    def _heads_divide(self):
        for width, heads, name in (
            (self.width, self.heads, "width"),
            (self.decoder_width, self.decoder_heads, "decoder_width"),
        ):
            if width % heads or (width // heads) % 2 or width % 4:
                raise ValueError(f"{name} {width} must be a multiple of 4 and of 2 x its heads ({heads})")
        if self.beta_end < self.beta_start:
            raise ValueError("beta_end is below beta_start")
        if not any(level.weight for level in self.levels):
            raise ValueError("the weight of every level is 0")
        if self.coarse_noise > self.timesteps:
            raise ValueError(f"coarse_noise {self.coarse_noise} is more than the {self.timesteps} timesteps")
        if self.residual and (self.prediction != "x0" or self.learn_variance):
            raise ValueError("residual goes with prediction 'x0' and without learn_variance")
        if self.denoiser == "convolutions":
            if self.decoder_input == "token" or self.reading == "diffmae" or self.coarse == "teacher":
                raise ValueError("denoiser 'convolutions' has no tokens, DiffMAE reading or teacher")
            if self.head_width % 8:
                raise ValueError(f"denoiser 'convolutions' needs a head_width divisible by 8, not {self.head_width}")
        if self.decoder_input == "token" and (self.reading == "diffmae" or self.learn_variance):
            raise ValueError("decoder_input 'token' goes with neither reading 'diffmae' nor learn_variance")
        return self


class TrainConfig(Settings):
    minutes: float | None = Field(None, gt=0)  # wall-clock budget; or
    steps: int | None = Field(None, ge=1)  # optimizer steps
    batch_size: int = Field(16, ge=1)
    lr: float = Field(1e-3, gt=0)
    min_lr_ratio: float = Field(0.02, ge=0, le=1)  # the cosine ends at lr times this
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.01, ge=0)
    warmup_steps: int = Field(50, ge=0)
    grad_clip: float = Field(1.0, gt=0)
    ema: float = Field(0.99, ge=0, lt=1)
    finetune_share: float = Field(0.4, ge=0, le=1)  # last share of the budget is unmasked (III.B.3)
    last_t_share: float = Field(0.8, ge=0, le=1)  # of samples at t = T - 1, where 1-step sampling looks
    # t is one of the timesteps that a sampler of so many steps asks for, and no other (``distill``).
    only_steps: int | None = Field(None, ge=1)
    loss: Literal["l2", "l1"] = "l2"
    ssim_weight: float = Field(0.0, ge=0)  # of 1 - SSIM of the x0 estimate, at levels of 11 pixels a side and more
    mmd_weight: float = Field(0.05, ge=0)  # lambda of L_low + L_mid + L_high (Eq. 6)
    mmd_kernel: Literal["multiscale", "paper"] = "multiscale"  # paper: exp(-|a-b|^2 / d^2), d values a vector
    mmd_rows: int = Field(256, ge=2, le=1024)  # patch vectors a level, chosen by Philox
    token_x0_weight: float = Field(0.1, ge=0)  # decoder_input="token": x0 loss of masked tokens
    min_snr: float = Field(0.0, ge=0)  # gamma of the min-SNR weights (Hang et al. 2023: 5); 0 is off
    vlb_weight: float = Field(0.001, ge=0)  # learn_variance: lambda of L_simple + lambda L_vlb
    flip: bool = True
    gamma: float = Field(0.4, ge=0)  # the source's gamma is exp(U(-gamma, gamma))
    scale: float = Field(0.2, ge=0, lt=1)  # the source's brightness is times U(1 - scale, 1 + scale)
    # The source's values go through a random rising curve of 6 straight pieces, whose slopes are exp(N(0, tone)).
    tone: float = Field(0.0, ge=0, le=2)
    rotate: float = Field(0.0, ge=0, le=180)  # degrees, in the plane: U(-rotate, rotate)
    zoom: float = Field(0.0, ge=0, lt=1)  # size is times exp(U(-zoom, zoom))
    shift: float = Field(0.0, ge=0, lt=1)  # share of the side
    jitter: int = Field(0, ge=0, le=256)  # whole pixels along H and W, nothing is interpolated: -jitter to jitter
    elastic: float = Field(0.0, ge=0, lt=1)  # standard deviation of smooth displacements, share of the side
    bias: float = Field(0.0, ge=0)  # smooth field on the sources, at most exp(+-bias)
    noise: float = Field(0.0, ge=0, lt=1)  # on the sources, standard deviation U(0, noise) of the range
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 where the processor multiplies it natively
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = Field(0, ge=0, lt=2**32)
    deterministic: bool = False  # only operations that give the same bits every time; needs steps, not minutes
    micro_batch: int | None = Field(None, ge=1)  # images a device computes at a time; None: as many as its memory holds
    recompute: bool = False  # activation checkpointing: less memory, a third more arithmetic
    attention: Literal["auto", "short", "varlen", "fa3", "xformers", "sdpa", "products"] = "auto"  # docs/TRAINING.md
    torch_compile: Literal["auto", "off", "blocks", "max-autotune"] = "auto"  # of a block; auto: on a GPU
    cuda_graph: Literal["auto", "off", "on"] = "auto"  # the whole step as one launch; auto: up to 64 images a GPU
    data_device: Literal["cpu", "cuda"] = "cpu"  # where the training slices lie: read batch by batch, or all on the GPU
    parallel: Literal["ddp", "fsdp"] = "ddp"  # several processes: whole copies of the weights, or each a share of them
    on_spike: Literal["warn", "skip", "rollback", "stop"] = "warn"  # a loss far above the last 200 (10 MAD)
    workers: int = Field(0, ge=0, le=64)  # processes that read batches ahead
    worker_timeout: float = Field(60.0, gt=0)  # seconds until a silent worker counts as hung
    peer_timeout: float = Field(300.0, gt=0)  # seconds until a process of several that all wait for counts as hung
    checkpoint_every: float = Field(120.0, gt=0)  # seconds between checkpoints
    checkpoint_steps: int | None = Field(None, ge=1)  # also one every so many steps, without figure and pictures
    keep: int = Field(2, ge=1)  # newest checkpoints kept; the last two that verify stay in any case


class SampleConfig(Settings):
    steps: int = Field(1, ge=1)
    sampler: Literal["ddim", "dpm++", "unipc", "heun", "ddpm"] = "ddim"  # steps = 1 is the x0 estimate at t = T
    coarse_t: int = Field(0, ge=0)  # coarse="teacher": noise put on the coarser estimate, as in training
    detail: float = Field(1.0, ge=0.5, le=2)  # times this: what a mean over 3 x 3 pixels takes from the image
    views: Literal[1, 2] = 1  # 2: the mean with what the mirrored sources give, mirrored back; twice the work
    samples: int = Field(1, ge=1, le=1024)  # so many, each from other noise, are averaged
    # x0 only: patches without foreground do not enter the transformer; an empty slice's stand in their place.
    skip_background: bool = True
    cuda_graph: Literal["auto", "off"] = "auto"  # a batch of slices as one launch, from the third of its shape on
    batch_size: int = Field(32, ge=1)
    seed: int = Field(0, ge=0, lt=2**32)


# What may change from one start of a run to the next: it decides how far, where or how safely, not what.
FREE = {
    "data.max_volume_gib", "data.skip_incomplete", "train.minutes", "train.steps", "train.device", "train.keep",
    "train.deterministic", "train.on_spike", "train.workers", "train.worker_timeout", "train.peer_timeout",
    "train.checkpoint_every", "train.checkpoint_steps", "train.micro_batch",
    "train.recompute", "train.attention", "train.torch_compile", "train.cuda_graph", "train.data_device",
    "train.parallel",
}  # fmt: skip


class Config(Settings):
    """All settings of a run."""

    data: DataConfig = Field(default_factory=DataConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    sample: SampleConfig = Field(default_factory=SampleConfig)

    @model_validator(mode="after")
    def _mirrors_left_and_right(self):
        if self.sample.views > 1 and self.data.axis == "sagittal":
            raise ValueError("sample.views 2 mirrors left and right, which sagittal slices do not show")
        return self

    def to_toml(self) -> str:
        """The settings as TOML text; ``None`` values are left out."""
        import tomli_w

        return tomli_w.dumps(self.model_dump(exclude_none=True, mode="json"))

    def fixed(self) -> dict[str, Any]:
        """``"table.key"`` -> value (of JSON's types) of everything a run has to go on with as it was begun."""
        return {
            f"{table}.{key}": value
            for table, keys in self.model_dump(mode="json", include={"data", "model", "train"}).items()
            for key, value in keys.items()
            if f"{table}.{key}" not in FREE
        }


def differing(begun: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The fields of two ``Config.fixed()`` that differ, with both values: ``"train.lr 0.001 -> 0.002"``."""
    return [f"{key} {begun[key]!r} -> {now[key]!r}" for key in now if key in begun and begun[key] != now[key]]


def _vit(depth, width, heads, decoder_depth, **more) -> dict[str, Any]:
    model = dict(depth=depth, width=width, heads=heads, decoder_depth=decoder_depth,
                 decoder_width=width // 2, decoder_heads=more.pop("decoder_heads", heads))  # fmt: skip
    return {"model": model | more.pop("model", {}), **more}


_VARIED = {"rotate": 2.0, "zoom": 0.03, "elastic": 0.01, "shift": 0.005, "tone": 0.3}

# DESIGN section 4: name -> tables laid over the defaults.
PRESETS: dict[str, dict[str, Any]] = {
    # For minutes on a CPU at 64 x 64, and few people: the winners of the experiments in docs/LOG.md (2026-11-28).
    "xs": _vit(
        6,
        192,
        3,
        2,
        data={"oversample": 2},
        model={"patch": 8, "stem_to_tokens": False, "head_kind": "pyramid", "members": 0},
        train={"lr": 2e-3, "batch_size": 8, "mmd_weight": 0.0, "ssim_weight": 0.2, "finetune_share": 0.7} | _VARIED,
        sample={"detail": 1.15},
    ),
    "s4": _vit(12, 384, 6, 4, train={"lr": 3e-4, "batch_size": 32}),
    "b4": _vit(12, 768, 12, 4, train={"lr": 2e-4, "batch_size": 32}),
    "l4": _vit(24, 1024, 16, 4, train={"lr": 1e-4, "batch_size": 32}),
    # The paper: Adam 1e-6, batch 10, eps, no stem, no head. It gives no size, so the size is ours (s4).
    "paper": _vit(
        12,
        384,
        6,
        4,
        model={"prediction": "eps", "stem": False, "head": False, "scale_state": False},
        train={
            "lr": 1e-6,
            "batch_size": 10,
            "weight_decay": 0.0,
            "betas": [0.9, 0.999],
            "mmd_weight": 0.5,
            "mmd_kernel": "paper",
            "last_t_share": 0.0,
            "warmup_steps": 0,
            "min_lr_ratio": 1.0,
        },
        sample={"steps": 500, "sampler": "ddpm"},
    ),
}


def _merge(base: dict, over: dict) -> dict:
    out = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = _merge(out[key], value) if both else value
    return out


def _nearest(word: str, known) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.4)
    return f"did you mean {close[0]!r}?" if close else "known: " + ", ".join(sorted(known))


def _keys(model: type[BaseModel]) -> dict[str, type[BaseModel] | None]:
    out = {}
    for name, field in model.model_fields.items():
        kind = field.annotation
        out[name] = kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None
    return out


def _refuse_unknown(table: dict, model: type[BaseModel], prefix: str, file) -> None:
    known = _keys(model)
    for key, value in table.items():
        if key not in known:
            raise PhmdiffError("CONFIG_KEY", f"unknown setting {prefix + key!r}",
                               _nearest(key, known), exit_code=USAGE, file=file)  # fmt: skip
        if known[key] is not None:
            if not isinstance(value, dict):
                raise PhmdiffError("CONFIG_KEY", f"{key!r} is a table of settings, not a value",
                                   f"write {key}.NAME = VALUE", exit_code=USAGE, file=file)  # fmt: skip
            _refuse_unknown(value, known[key], f"{prefix}{key}.", file)


def parse_set(items: list[str] | tuple[str, ...]) -> dict[str, Any]:
    """``["train.lr=1e-3", ...]`` -> nested tables; the value is read as TOML, else as text."""
    out: dict[str, Any] = {}
    for item in items:
        key, equals, text = item.partition("=")
        parts = key.strip().split(".")
        if not equals or len(parts) < 2 or not all(parts):
            raise PhmdiffError("CONFIG_KEY", f"--set {item!r} is not TABLE.KEY=VALUE",
                               "write it like train.lr=1e-3", exit_code=USAGE)  # fmt: skip
        try:
            value = tomllib.loads(f"v = {text}")["v"]
        except tomllib.TOMLDecodeError:
            value = text.strip()
        table = value
        for part in reversed(parts):
            table = {part: table}
        out = _merge(out, table)
    return out


def load_toml(path: str | Path) -> dict[str, Any]:
    """Tables of a TOML file. Raises PhmdiffError(exit 2) if it is missing or no TOML."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as problem:
        raise PhmdiffError("CONFIG_FILE", f"cannot be read ({problem.strerror})",
                           "check the path given to --config", exit_code=USAGE, file=path) from None  # fmt: skip
    except (ValueError, RecursionError) as problem:  # no TOML, no UTF-8, or a number of ten thousand digits
        raise PhmdiffError("CONFIG_FILE", f"is no TOML: {problem}", "correct that line",
                           exit_code=USAGE, file=path) from None  # fmt: skip


def build_config(preset: str = "xs", *overrides: dict[str, Any], file=None) -> Config:
    """A preset with tables laid over it, later ones winning.

    Raises PhmdiffError (exit 2) naming the key, what is wrong and the nearest known name.
    """
    if preset not in PRESETS:
        raise PhmdiffError("CONFIG_PRESET", f"unknown preset {preset!r}", _nearest(preset, PRESETS), exit_code=USAGE)
    tables = PRESETS[preset]
    for over in overrides:
        _refuse_unknown(over, Config, "", file)
        tables = _merge(tables, over)
    return _validated(tables, file)


def load_run_toml(path: str | Path) -> dict[str, Any]:
    """``load_toml`` of a run's config.toml, which may come from anywhere: a regular file of the size ours have."""
    try:
        about = Path(path).stat()
        if not stat.S_ISREG(about.st_mode) or about.st_size > MOST_BYTES:
            raise PhmdiffError("CONFIG_FILE", f"is no regular file of at most {MOST_BYTES} bytes",
                               "take it from a copy of the run", exit_code=USAGE, file=path)  # fmt: skip
    except OSError:
        pass  # said by load_toml
    return load_toml(path)


def read_config(path: str | Path) -> Config:
    """The settings a run was begun with (its config.toml); errors as ``load_toml`` and ``build_config``."""
    tables = load_run_toml(path)
    _refuse_unknown(tables, Config, "", path)
    return _validated(tables, path)


def _validated(tables: dict[str, Any], file) -> Config:
    try:
        return Config.model_validate(tables)
    except (ValidationError, RecursionError) as problems:
        first = problems.errors()[0] if isinstance(problems, ValidationError) else {"loc": ["?"], "msg": "too deep"}
        key = ".".join(str(part) for part in first["loc"])
        given = repr(first.get("input"))
        detail = f"{key} = {given[:200]}: " if not isinstance(first.get("input"), dict) else f"{key}: "
        raise PhmdiffError("CONFIG_VALUE", detail + first["msg"].removeprefix("Value error, "), "correct the setting",
                           exit_code=USAGE, file=file) from None  # fmt: skip
