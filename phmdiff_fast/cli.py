"""The command line. Every command imports what it needs inside, so that --help costs no torch."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import click

from . import __version__
from .errors import BACKEND, IO, MEMORY, USAGE, DataErrors, PhmdiffError
from .progress import bar, say, share_bar

PRESETS = "xs|s4|b4|l4|paper"  # config.PRESETS, named here so that --help need not import it; a test holds them equal
MAX_LINE = 2000  # characters of an error
DATA = click.argument("data", metavar="DATA", type=click.Path(path_type=Path))
RUN = click.argument("run", metavar="RUN", type=click.Path(path_type=Path))
DEVICE = click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True,
                      help="Where to compute.")  # fmt: skip
STEPS = click.option("--steps", type=int, help="Sampling steps; 1 is the direct estimate.  [default: the run's]")
SAMPLER = click.option("--sampler", type=click.Choice(["ddim", "dpm++", "unipc", "heun", "ddpm"]),
                       help="How to step.  [default: the run's]")  # fmt: skip
SAMPLES = click.option("--samples", type=click.IntRange(1, 1024), metavar="K", help="Mean of K syntheses from other "
                       "noise each; from 2 on, how far they lie apart too.  [default: the run's]")  # fmt: skip
BACKGROUND = click.option("--skip-background/--no-skip-background", default=None, help="Leave patches without "
                          "foreground out of the transformer.  [default: the run's]")  # fmt: skip
VIEWS = click.option("--views", type=click.IntRange(1, 2), help="2: the mean of the synthesis and that of the mirrored "
                     "sources, twice the work.  [default: the run's]")  # fmt: skip
DETAIL = click.option("--detail", type=float, help="Fine structure times this: above 1 sharper, a little less exact.  "
                      "[default: the run's]")  # fmt: skip
QUIET = click.option("--quiet", is_flag=True, help="No progress bars.")


def _number(context, option, value):
    """A range lets NaN pass."""
    if value is not None and math.isnan(value):
        raise click.BadParameter("nan is no number.", context, option)
    return value


NAN = click.option("--nan", type=click.Choice(["raise", "zero"]), help="NaN and Inf voxels: refuse the scan, or "
                   "set them to 0.  [default: the run's, else raise]")  # fmt: skip
MAX_GIB = click.option("--max-volume-gib", type=click.FloatRange(0, 2**20, min_open=True), metavar="GIB",
                       callback=_number, help="Largest scan that is read, counted as float32.  [default: the run's, "
                       "else 2]")  # fmt: skip
OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace outputs that exist.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="phmdiff-fast")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Synthesize a missing medical scan from the ones that exist (PHMDiff, arXiv 2507.16579).

    Research use only, never a diagnosis.
    """
    if click.get_current_context().invoked_subcommand in ("train", "sample", "evaluate", "ablate", "distill", "demo"):
        from .kernel_caches import private_kernel_caches

        for line in private_kernel_caches():
            say(line)


@cli.command()
@DATA
@click.option("--source", "sources", multiple=True, help="A contrast that has to be there (repeat for several).")
@click.option("--target", help="The contrast to synthesize; has to be there too.")
@click.option("--split", type=click.Path(path_type=Path), help="Look only at the people of this split file.")
@click.option("--html", type=click.Path(path_type=Path), help="Write a page that shows a slice of every scan.")
@NAN
@MAX_GIB
@OVERWRITE
@QUIET
def check(data, sources, target, split, html, nan, max_volume_gib, overwrite, quiet) -> None:
    """List every problem of a cohort before anything is trained.

    DATA is a folder in BraTS 2021, BraTS 2023/24 or SynthRAD layout, or a CSV list
    (subject,contrast,path). Without --source and --target a contrast that only some people have is a
    note, not a problem.
    """
    from .check import check_cohort
    from .data import discover, read_split
    from .files import refuse_existing

    if html is not None:
        refuse_existing(html, overwrite)
    cohort = discover(data)
    subjects = list(cohort.files)
    if split is not None:
        chosen = read_split(split, subjects)
        subjects = [s for part in chosen.values() for s in part]
    wanted = [*_names(sources), *_names([target] if target else [])]
    with bar(len(subjects), "checking", not quiet) as meter:
        report = check_cohort(cohort, contrasts=wanted or None, subjects=subjects, views=html is not None,
                              nan=nan or "raise", max_gib=max_volume_gib or 2.0,
                              progress=lambda *_: meter.update())  # fmt: skip
    click.echo(report.table())
    for note in report.notes:
        click.echo(f"note: {note}")
    if html is not None:
        from .check_page import write_check_page

        page = write_check_page(html, cohort_root=data, layout=cohort.layout, report=report, overwrite=overwrite)
        click.echo(f"open {page.resolve()}")
    if report.problems:
        raise DataErrors(report.problems)
    click.echo(f"{len(subjects)} people in {cohort.layout} layout, no problem found")


@cli.command()
@DATA
@click.option("--source", "sources", multiple=True, help="Source contrast, e.g. t1 (repeat, or t1,flair).")
@click.option("--target", help="Contrast to synthesize, e.g. t2.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Run folder; an existing run goes on.")
@click.option("--preset", help=f"Size and settings: {PRESETS}.  [default: xs]")
@click.option("--minutes", type=float, help="Wall-clock budget of the training.")
@click.option("--steps", type=int, help="Optimizer steps, instead of --minutes.")
@click.option("--image-size", type=int, help="In-plane size after crop or pad and area resampling.  [default: 64]")
@click.option("--axis", type=click.Choice(["axial", "coronal", "sagittal"]), help="Which slices.  [default: axial]")
@click.option("--context-slices", type=int, help="Neighbouring source slices shown on each side.  [default: 0]")
@click.option("--hu-window", type=float, nargs=2, metavar="LOW HIGH", help="HU of CT kept.  [default: -1024 3000]")
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="TOML file with settings.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="One setting, e.g. train.lr=5e-4 (repeat).")
@click.option(
    "--split",
    type=click.Path(path_type=Path),
    help='JSON {"train": [ids], "val": [ids], "test": [ids]}, or CSV subject,part.',
)
@click.option("--fold", metavar="I/K", help="Test on fold I of K (1/5 ... 5/5); every subject is in one fold's test.")
@click.option("--skip-incomplete", is_flag=True, help="Leave people without every contrast asked for out.")
@click.option("--seed", type=int, help="Seed of weights, noise, masks, order and split.  [default: 0]")
@click.option("--resume", type=click.Path(path_type=Path), metavar="STEP", help="Go on from this checkpoint of the "
              "run: a folder step-N, or N. Later ones are set aside.  [default: the newest that is whole]")  # fmt: skip
@click.option("--workers", type=int, help="Processes that read batches ahead.  [default: 0]")
@click.option("--deterministic", is_flag=True, help="The same bits every time on the same machine; needs --steps.")
@click.option("--on-spike", type=click.Choice(["warn", "skip", "rollback", "stop"]), help="When the loss jumps: say "
              "so, leave the step out, go back to the last checkpoint, or stop.  [default: warn]")  # fmt: skip
@click.option("--data-device", type=click.Choice(["cpu", "cuda"]), help="Read batches as they are needed, or keep all "
              "training slices in the GPU's memory.  [default: cpu]")  # fmt: skip
@click.option("--parallel", type=click.Choice(["ddp", "fsdp"]), help="Under torchrun: a whole copy of the weights in "
              "each process, or a share of them.  [default: ddp]")  # fmt: skip
@click.option("--profile", is_flag=True, help="Record five steps: a trace, a table of time per stage; in OUT/profile.")
@NAN
@MAX_GIB
@DEVICE
@QUIET
def train(data, sources, target, out, preset, minutes, steps, image_size, axis, context_slices, hu_window,
          config_file, settings, split, fold, skip_incomplete, seed, resume, workers, deterministic, on_spike,
          data_device, parallel, profile, nan, max_volume_gib, device, quiet) -> None:  # fmt: skip
    """Train a model on a cohort: masked pre-training, then unmasked fine-tuning.

    The same command goes on where an interrupted training stopped. On several devices:
    torchrun --nproc-per-node N -m phmdiff_fast train ...

    Settings are taken from the preset, then --config, then the options, then --set; later ones win.
    """
    from .config import build_config, load_run_toml, load_toml, parse_set

    if split is not None and fold is not None:
        raise PhmdiffError("USAGE", "--split and --fold are two ways to say the same", "give one", exit_code=USAGE)
    flags: dict = {"data": {}, "train": {}}
    given = [("data", "sources", _names(sources) or None), ("data", "target", target),
             ("data", "image_size", image_size), ("data", "axis", axis), ("data", "context_slices", context_slices),
             ("data", "hu_window", list(hu_window) if hu_window else None),
             ("data", "skip_incomplete", skip_incomplete or None),
             ("train", "minutes", minutes), ("train", "steps", steps), ("train", "seed", seed),
             ("train", "device", device if device != "auto" else None), ("train", "workers", workers),
             ("train", "deterministic", deterministic or None), ("train", "on_spike", on_spike),
             ("train", "data_device", data_device), ("train", "parallel", parallel),
             ("data", "nan", nan), ("data", "max_volume_gib", max_volume_gib)]  # fmt: skip
    for table, key, value in given:
        if value is not None:
            flags[table][key] = value
    base: dict = {}
    if (out / "run.json").is_file() and preset is None and config_file is None:
        base = load_run_toml(out / "config.toml")  # an existing run goes on with its own settings
        if minutes is not None or steps is not None:
            for key in ("minutes", "steps"):
                base["train"].pop(key, None)
    elif not sources or not target:
        from_file = load_toml(config_file).get("data", {}) if config_file else {}
        if not ({"sources", "target"} <= {*from_file, *flags["data"]}):
            raise PhmdiffError(
                "USAGE", "train needs --source and --target", "e.g. --source t1 --target t2", exit_code=USAGE
            )
    overlays = [base, load_toml(config_file) if config_file else {}, flags, parse_set(settings)]
    config = build_config(preset or "xs", *overlays, file=config_file)

    from .train import train as run_training

    run_training(data, out, config, split_file=split, fold=_fold(fold), resume=resume, progress=not quiet,
                 profile=profile)  # fmt: skip


@cli.command()
@RUN
@click.argument("inputs", metavar="INPUT...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the volumes.")
@STEPS
@SAMPLER
@VIEWS
@DETAIL
@SAMPLES
@BACKGROUND
@click.option("--also", multiple=True, type=click.Path(path_type=Path), metavar="RUN", help="Average with this run's "
              "volume too, such as one trained on another axis (repeat).")  # fmt: skip
@click.option("--seed", type=int, help="Seed of the noise.  [default: the run's]")
@click.option("--batch-size", type=int, help="Slices at a time.  [default: the run's]")
@NAN
@MAX_GIB
@OVERWRITE
@DEVICE
@QUIET
def sample(run, inputs, out, steps, sampler, views, detail, samples, skip_background, also, seed, batch_size,
           nan, max_volume_gib, overwrite, device, quiet) -> None:  # fmt: skip
    """Synthesize the missing contrast of each INPUT with a trained RUN.

    INPUT is a scan (runs with one source), a subject's folder, or a whole cohort. Each volume is
    written on its input's grid as <subject>_<contrast>_syn.nii.gz, with a JSON sidecar; with --samples 2
    or more also their standard deviation, <subject>_<contrast>_syn_std.nii.gz.
    """
    from .streaming import one_arena

    one_arena()

    from .device import pick_device
    from .distributed import processes
    from .generate import load
    from .generate import sample as synthesize_all

    with processes(pick_device(device)) as ranks:
        with ranks.told_once():
            opened = load(run, device=device, warn=_warn if ranks.first else None)
            over = dict(steps=steps, sampler=sampler, views=views, detail=detail, seed=seed, samples=samples,
                        skip_background=skip_background, batch_size=batch_size)  # fmt: skip
            settings = opened.sample_settings(**over)
            others = [load(folder, device=device, warn=_warn if ranks.first else None) for folder in also]
            others = [(other, other.sample_settings(**over)) for other in others]
            if ranks.first:
                _warn_of_equal_samples(opened, settings)
        with share_bar("synthesizing", ranks.first and not quiet) as meter:

            def count(subject: str, done: float, total: int) -> None:
                meter.note(f"{subject}, {min(total, int(done) + 1)} of {total}")
                meter.at(done / total)

            written = synthesize_all(opened, inputs, out, settings, nan=nan, max_gib=max_volume_gib,
                                     overwrite=overwrite, progress=count, ranks=ranks, also=others)  # fmt: skip
        for path in written if ranks.first else ():
            click.echo(path)


@cli.command()
@RUN
@DATA
@click.option(
    "--protocol",
    "protocols",
    multiple=True,
    help="phmdiff-slice, brain or brain-3d (repeat).  [default: the first two]",
)
@click.option("--baselines", is_flag=True, help="Also a lookup table and a U-Net trained as long as the model was.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the table and each person's figures.")
@click.option("--on", "part", type=click.Choice(["test", "val", "train"]), default="test", show_default=True,
              help="Which people of the run's split.")  # fmt: skip
@click.option("--calibration", type=click.Path(path_type=Path), metavar="PNG", help="With --samples 2 or more: draw "
              "the error over the deviation that was predicted.")  # fmt: skip
@STEPS
@SAMPLER
@VIEWS
@DETAIL
@SAMPLES
@BACKGROUND
@click.option("--seed", type=int, help="Seed of the noise.  [default: the run's]")
@NAN
@MAX_GIB
@OVERWRITE
@DEVICE
@QUIET
def evaluate(run, data, protocols, baselines, json_file, part, calibration, steps, sampler, views, detail, samples,
             skip_background, seed, nan, max_volume_gib, overwrite, device, quiet) -> None:  # fmt: skip
    """Score a RUN on people it has not seen, at the run's image size; mean and deviation over people."""
    from dataclasses import asdict

    from . import pictures
    from .device import pick_device
    from .distributed import processes
    from .evaluate import calibration_of, write_table
    from .evaluate import evaluate as score
    from .files import refuse_existing
    from .generate import load
    from .report import format_table

    with processes(pick_device(device)) as ranks:
        with ranks.told_once():
            for path in (json_file, calibration):  # before the long work, not after it
                if path is not None:
                    refuse_existing(path, overwrite)
            opened = load(run, device=device, warn=_warn if ranks.first else None)
            settings = opened.sample_settings(steps=steps, sampler=sampler, views=views, detail=detail, seed=seed,
                                              samples=samples, skip_background=skip_background)  # fmt: skip
            if calibration is not None and settings.samples < 2:
                raise PhmdiffError("USAGE", "--calibration needs several samples", "add --samples 8", exit_code=USAGE)
            if ranks.first:
                _warn_of_equal_samples(opened, settings)
        with share_bar("training the U-Net baseline", baselines and ranks.first and not quiet) as meter:
            result = score(opened, data, settings, protocols=protocols or ("phmdiff-slice", "brain"), part=part,
                           nan=nan, max_gib=max_volume_gib, baselines=baselines, progress=meter.at,
                           ranks=ranks)  # fmt: skip
        if not ranks.first:
            return
        size = opened.config.data.image_size
        who = ", ".join(case.subject for case in result.cases)
        click.echo(f"{'+'.join(opened.sources)} -> {opened.target}, {part} people: {who}")
        how = f"{settings.steps} sampling step(s)" + " x 2 views" * (settings.views == 2)
        how += f", detail x {settings.detail:g}" * (settings.detail != 1)
        how += f", mean of {settings.samples} samples" * (settings.samples > 1)
        click.echo(f"scored at {size}x{size}, {how}")
        click.echo(format_table(result.rows))
        if result.unet_steps is not None:
            click.echo(f"model: {opened.found.step} steps, U-Net: {result.unet_steps} steps, "
                       f"{opened.found.manifest['seconds']:.0f} s each")  # fmt: skip
        found = calibration_of(result) if settings.samples > 1 else None
        if found is not None:
            click.echo(found.line())
        if calibration is not None:
            click.echo(f"open {pictures.calibration(calibration, found).resolve()}")
        if json_file is not None:
            write_table(json_file, result, overwrite=overwrite, more=found and {"calibration": asdict(found)})


@cli.command()
@DATA
@click.option("--source", "sources", multiple=True, required=True, help="Source contrast, e.g. t1 (or t1,flair).")
@click.option("--target", required=True, help="Contrast to synthesize, e.g. t2.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for runs and table; goes on.")
@click.option("--preset", default="xs", show_default=True, help=f"Size and settings: {PRESETS}.")
@click.option("--minutes", type=float, help="Wall-clock budget of each training.")
@click.option("--steps", type=int, help="Optimizer steps of each training, instead of --minutes.")
@click.option("--rows", help="Comma-separated: full, no-pyramid, no-masking, no-diffusion, no-transformer, no-cgr.  "
              "[default: all]")  # fmt: skip
@click.option("--on", "part", type=click.Choice(["test", "val"]), default="test", show_default=True,
              help="Which people of the split to score.")  # fmt: skip
@click.option("--image-size", type=int, help="In-plane size.  [default: 64]")
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="TOML file with settings.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="One setting, e.g. train.lr=5e-4 (repeat).")
@click.option("--split", type=click.Path(path_type=Path), help="Split file, as of train.")
@click.option("--fold", metavar="I/K", help="Test on fold I of K.")
@click.option("--skip-incomplete", is_flag=True, help="Leave people without every contrast asked for out.")
@click.option("--seed", type=int, help="Seed of everything.  [default: 0]")
@DEVICE
@QUIET
def ablate(data, sources, target, out, preset, minutes, steps, rows, part, image_size, config_file, settings, split,
           fold, skip_incomplete, seed, device, quiet) -> None:  # fmt: skip
    """What each component is worth: the paper's Table II on your data.

    Trains the full method and, one at a time, the method without pyramid, masking, diffusion (one regression
    step), transformer (convolutions) and cross-granularity loss, each for the same budget, and prints one table.
    The same command goes on where it was stopped.
    """
    from .ablate import CHANGES
    from .ablate import ablate as run_ablation
    from .config import build_config, load_toml, parse_set

    if split is not None and fold is not None:
        raise PhmdiffError("USAGE", "--split and --fold are two ways to say the same", "give one", exit_code=USAGE)
    if minutes is None and steps is None:
        raise PhmdiffError("NO_BUDGET", "neither --minutes nor --steps is given", "give one", exit_code=USAGE)
    given = {"data": {"sources": _names(sources), "target": target, "image_size": image_size,
                      "skip_incomplete": skip_incomplete or None},
             "train": {"minutes": minutes, "steps": steps, "seed": seed,
                       "device": device if device != "auto" else None}}  # fmt: skip
    flags = {table: {k: v for k, v in keys.items() if v is not None} for table, keys in given.items()}
    overlays = [load_toml(config_file) if config_file else {}, flags, parse_set(settings)]
    config = build_config(preset, *overlays, file=config_file)
    run_ablation(data, out, config, rows=tuple(rows.split(",")) if rows else tuple(CHANGES), split_file=split,
                 fold=_fold(fold), part=part, progress=not quiet)  # fmt: skip


@cli.command()
@RUN
@DATA
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Run folder of the student; goes on.")
@click.option("--steps", type=click.IntRange(1), default=1, show_default=True, help="Sampling steps of the student.")
@click.option("--minutes", type=float, help="Wall-clock budget of its training.")
@click.option("--train-steps", type=int, help="Optimizer steps, instead of --minutes.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="One setting, e.g. train.lr=5e-4 (repeat).")
@DEVICE
@QUIET
def distill(run, data, out, steps, minutes, train_steps, settings, device, quiet) -> None:
    """Teach one network what a RUN's members, views and steps give together: as good, in few steps.

    DATA is the cohort the run was trained on; the student trains on the same people. Its run folder is used like
    any other, by sample and evaluate. The same command goes on where it was stopped.
    """
    from .config import parse_set
    from .distill import distill as run_distillation

    run_distillation(run, data, out, steps=steps, minutes=minutes, train_steps=train_steps,
                     settings=parse_set(settings), device=device, progress=not quiet)  # fmt: skip


@cli.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("demo_out"), show_default=True, help="Folder.")
@click.option("--minutes", type=float, default=3.5, show_default=True, help="Training time (the U-Net takes as long).")
@click.option("--subjects", type=click.IntRange(5, 500), default=12, show_default=True, help="Simulated patients.")
@click.option("--image-size", type=int, default=64, show_default=True, help="In-plane size.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of everything.")
@OVERWRITE
@QUIET
def demo(out, minutes, subjects, image_size, seed, overwrite, quiet) -> None:
    """The main job with no data of yours: simulate patients, check, train, sample, evaluate, one page."""
    from .demo import run_demo

    page = run_demo(out, minutes=minutes, num_subjects=subjects, image_size=image_size, seed=seed,
                    overwrite=overwrite, progress=not quiet)  # fmt: skip
    click.echo(f"\nopen {page.resolve()}")


@cli.command()
def doctor() -> None:
    """What is installed, which backend each operation will use, and why."""
    from .doctor import report

    for line in report():
        click.echo(line)


def _names(items) -> list[str]:
    """("t1", "t2,flair") -> ["t1", "t2", "flair"]."""
    return [name for item in items for name in item.split(",") if name]


def _warn_of_equal_samples(run, settings) -> None:
    """One step of a regression forgets the noise."""
    if settings.samples > 1 and settings.steps == 1 and run.model.usable == 1:
        say("one step of one member makes nearly one image of all samples: --steps 10 --sampler ddpm spreads them")


def _warn(line: str) -> None:
    say(f"{line} An older checkpoint is used.")


def _fold(text: str | None) -> tuple[int, int] | None:
    """ "2/5" -> (2, 5)."""
    if text is None:
        return None
    fold, slash, folds = text.partition("/")
    if not (slash and fold.isdecimal() and folds.isdecimal()):
        raise PhmdiffError("USAGE", f"--fold {text!r} is not I/K", "write it like 1/5", exit_code=USAGE)
    if not 1 <= int(fold) <= int(folds) or int(folds) < 2:
        raise PhmdiffError("USAGE", f"--fold {text} names no fold", f"give 1/{folds} to {folds}/{folds}, of at least 2",
                           exit_code=USAGE)  # fmt: skip
    return int(fold), int(folds)


def _fail(lines: list[str], code: int) -> None:
    for line in lines:
        say(_one_line(line))
    sys.exit(code)


def _one_line(text: str) -> str:
    """What a file or folder is called may hold line breaks and a terminal's control codes, or never end."""
    told = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text[: MAX_LINE + 1])
    return told if len(told) <= MAX_LINE else told[: MAX_LINE - 4] + " ..."


def _is_backend_error(problem: Exception) -> bool:
    """A forced kernel that cannot run; asked by name, so that no error costs an import of torch."""
    return type(problem).__name__ == "BackendError"


def main(arguments: list[str] | None = None) -> None:
    """Run a command; every foreseen failure is one line on stderr and its exit code."""
    from .signals import end_tidily_on_sigterm

    arguments = sys.argv[1:] if arguments is None else arguments
    end_tidily_on_sigterm()
    debug = "--debug" in arguments
    try:
        sys.exit(cli.main(args=arguments, prog_name="phmdiff-fast", standalone_mode=False) or 0)
    except click.exceptions.Exit as leaving:
        sys.exit(leaving.exit_code)
    except (click.exceptions.Abort, KeyboardInterrupt):
        sys.exit(130)
    except click.ClickException as problem:
        where = f" See: {problem.ctx.command_path} --help" if getattr(problem, "ctx", None) else ""
        _fail([f"error[USAGE] {problem.format_message()}{where}"], USAGE)
    except DataErrors as problems:
        if debug:
            raise
        _fail(problems.lines(), problems.exit_code)
    except PhmdiffError as problem:
        if debug:
            raise
        _fail([problem.line()], problem.exit_code)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
    except OSError as problem:
        if debug:
            raise
        _fail([f"error[IO] {problem.filename or ''}: {problem.strerror or problem}. Check the path and the disk."], IO)
    except MemoryError:
        if debug:
            raise
        _fail(["error[MEMORY] not enough memory. Lower train.batch_size or --image-size."], MEMORY)
    except RuntimeError as problem:
        if debug or not _is_backend_error(problem):
            raise
        _fail([f"error[BACKEND] {problem}."], BACKEND)
