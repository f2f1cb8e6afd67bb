"""Do windows show? Seams at their borders, where windows follow the size of a picture and where they are fixed.

    python -m training.window_study --model nano --data DATA --out DIR    one model, both kinds of windows
    python -m training.window_study --twins --out DIR                     two tiny models, each trained with its kind

Windows have no weights, so any model runs with any windows. A model is used to those it was trained with, though, and
the twins are the fairer comparison. Pictures are held out, larger than those of training, and damaged as ever.

Adaptive windows are the same at every size of one aspect ratio, so fixed ones of the training's size can differ from
them at other ratios and in longer clips only. Seams are looked for in space, not in time.

Writes window_study.json, window_study.md and, where matplotlib is installed, window_study.png.

Source: SeedVR2, arXiv 2506.05301, figure 4.
"""
# T H W frames, height, width   t h w a token grid   n pictures

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from seedvr2_core.checkpoints import Prompts
from seedvr2_core.device import pick_device
from seedvr2_core.errors import MediaError, SeedVR2Error, SettingError
from seedvr2_core.loading import Models, fast_options
from seedvr2_core.models.vae_fast import FastVAE
from seedvr2_core.models.windows import WindowConfig, spans, window_size, windows
from seedvr2_core.pipeline import restore
from seedvr2_core.settings import Settings
from seedvr2_core.video.geometry import CLIP_MULTIPLE, LATENT_FRAMES, Grid, Target

from . import loop, state
from .config import plain
from .evaluate import EvalItem, eval_items
from .metrics import lsd, psnr
from .pico import PRETRAINING, SIDE, UNSHUFFLE, Exam, PicoLatents, PicoPretrainStage, degrade
from .pretrain import Pretraining, load_run
from .procedural import still
from .weights import is_run, open_restorer, open_vae

log = logging.getLogger(__name__)

Kind = Literal["regular", "shifted"]
KINDS: tuple[Kind, ...] = ("regular", "shifted")

# Frames, height and width. nano was trained on squares of 192 and 256 pixels and clips of 5 frames.
SIZES = (Grid(1, 512, 512), Grid(1, 768, 768), Grid(1, 512, 768), Grid(1, 384, 1024), Grid(17, 128, 240))
PICTURES = 4

# What the twins differ in: SeedVR's 64 x 64 latents are 0.53 of the side of its training area, and so are these.
TWIN_AREA, TWIN_SIZE = (8, 8), Grid(1, 4, 4)
TWIN_SIZES = (Grid(1, SIDE, SIDE), Grid(1, 64, 64), Grid(1, 96, 96), Grid(1, 48, 96))
# One step is as sure as so short a training gets; more would bring noise, in which a seam could hide.
TWIN_STEPS, TWIN_SAMPLING, TWIN_PICTURES, TWIN_STILLS = 400, 1, 16, 128
# Pixels of pico covered by a token.
TWIN_TOKEN = 2 * UNSHUFFLE
# Drawn pictures begin here, where neither training nor its exam have been.
TWIN_FIRST = 2_000_000


# What is measured.


@dataclass(frozen=True)
class Borders:
    """Places between two tokens along one axis: which window borders lie there. The edge of the picture is none."""

    regular: tuple[int, ...]  # tokens before it
    shifted: tuple[int, ...]
    other: tuple[int, ...]  # inside the windows of every layer


def borders(grid: Grid, config: WindowConfig) -> tuple[Borders, Borders]:
    """The borders of a token grid, along its height and along its width."""
    found = []
    for length, window in zip(grid[1:], window_size(grid, config)[1:], strict=True):
        cuts = [{span.start for span in spans(length, window, shifted)} - {0} for shifted in (False, True)]
        found.append(Borders(*(tuple(sorted(places)) for places in (*cuts, set(range(1, length)) - cuts[0] - cuts[1]))))
    return found[0], found[1]


def boundary_energy(
    restored: Tensor, wanted: Tensor, places: tuple[Borders, Borders], kind: Kind, token: int = CLIP_MULTIPLE
) -> float | None:
    """How much more neighbours differ across window borders than elsewhere; 0: borders cannot be told.

    The mean absolute difference across the borders, divided by that across all places between two tokens that are no
    border, minus the same quotient of the original. Only places between two tokens are compared, not any two pixels:
    patches leave a grid of their own, which would pass for seams wherever windows are. The mean over the axes that have
    both kinds of places, each for itself, since pictures are not alike in both directions.

    What happens to lie on the borders of one picture moves it by tenths. See `Row.seams` for what windows add.

    Args:
        restored, wanted: frames T 3 H W.
        places: from `borders`.
        kind: of the layers whose borders are meant.
        token: pixels covered by a token.

    Returns:
        None where no axis has such borders, or has nothing beside them.
    """
    excess = []
    for axis, line in zip((-2, -1), places, strict=True):
        at = getattr(line, kind)
        if at and line.other:
            excess.append(_quotient(gaps(restored, axis), at, line.other, token)
                          - _quotient(gaps(wanted, axis), at, line.other, token))  # fmt: skip
    return sum(excess) / len(excess) if excess else None


def _quotient(step: Tensor, at: Sequence[int], other: Sequence[int], token: int) -> float:
    across, elsewhere = (step[[token * place - 1 for place in chosen]].mean() for chosen in (at, other))
    return (across / elsewhere.clamp_min(1e-6)).item()


def gaps(frames: Tensor, axis: int) -> Tensor:
    """The mean absolute difference of neighbours along an axis of frames T 3 H W, a value for each of its gaps."""
    return frames.float().diff(dim=axis).abs().movedim(axis, 0).flatten(1).mean(1)


def profile(frames: Sequence[Tensor], axis: int, window: int, token: int) -> Tensor:
    """`gaps` against the position in a regular window, relative to their mean: window x token values, the first across
    the border; NaN where there is none."""
    step = torch.stack([gaps(clip, axis) for clip in frames]).mean(0)
    period = window * token
    position = torch.arange(1, len(step) + 1) % period
    sums = torch.zeros(period).index_add_(0, position, step / step.mean())
    return sums / torch.bincount(position, minlength=period)


@dataclass(frozen=True)
class Mode:
    """A kind of windows."""

    name: str
    windows: WindowConfig


@dataclass(frozen=True)
class Trial:
    """Pictures of one size, and what became of them in every mode."""

    size: Grid  # frames, height and width
    grid: Grid  # of tokens
    token: int  # pixels covered by one
    names: list[str]
    wanted: list[Tensor]  # each T 3 H W in 0..1
    restored: Mapping[str, list[Tensor]]  # by mode

    @property
    def title(self) -> str:
        t, h, w = self.size
        return f"{w} x {h}" + (f" x {t}" if t > 1 else "")


def same_windows(grid: Grid, a: WindowConfig, b: WindowConfig) -> bool:
    return all(windows(grid, a, shifted) == windows(grid, b, shifted) for shifted in (False, True))


@dataclass(frozen=True, kw_only=True)
class Row:
    """One size in one mode; a list has a value a picture."""

    size: str
    mode: str
    window: Grid
    energy: Mapping[Kind, list[float]]  # `boundary_energy`
    # Minus that of the same places in what the other modes made of the same picture: what is due to the windows.
    seams: Mapping[Kind, list[float]]
    psnr: list[float]
    lsd: list[float]


def measure(trial: Trial, modes: Sequence[Mode]) -> list[Row]:
    """A row for every mode."""
    rows = []
    for mode in modes:
        others = [other for other in modes if not same_windows(trial.grid, mode.windows, other.windows)]
        energy = {kind: _energies(trial, mode, mode, kind) for kind in KINDS}
        pairs = list(zip(trial.restored[mode.name], trial.wanted, strict=True))
        rows.append(Row(
            size=trial.title,
            mode=mode.name,
            window=window_size(trial.grid, mode.windows),
            energy=energy,
            seams={kind: _above(own, [_energies(trial, mode, other, kind) for other in others])
                   for kind, own in energy.items()},
            psnr=[psnr(a, b) for a, b in pairs],
            lsd=[lsd(a, b) for a, b in pairs],
        ))  # fmt: skip
    return rows


def _above(own: list[float], others: Sequence[list[float]]) -> list[float]:
    """What each value has over the mean of its counterparts; nothing where there are none."""
    rows = zip(own, *others, strict=True) if others else ()
    return [value - sum(controls) / len(controls) for value, *controls in rows]


def _energies(trial: Trial, mode: Mode, other: Mode, kind: Kind) -> list[float]:
    """Of the borders of one mode in what another restored; a value a picture, or none where there are no borders."""
    places = borders(trial.grid, mode.windows)
    pairs = zip(trial.restored[other.name], trial.wanted, strict=True)
    values = [boundary_energy(restored, wanted, places, kind, trial.token) for restored, wanted in pairs]
    return [value for value in values if value is not None]


# A model that there is.


def open_models(where: str | Path, vae: str | Path, device: torch.device) -> Models:
    """A model to restore with: a run, a checkpoint or a published name, and the same for its autoencoder."""
    restorer = open_restorer(where, device=device)
    return Models(
        dit=restorer.dit.eval().requires_grad_(False),
        vae=FastVAE(open_vae(vae, device=device), fast_options(device)),
        prompts=Prompts(positive=restorer.prompt.detach(), negative=None),
        label=str(where),
        device=restorer.dit.txt_in.weight.device,
    )


def modes_of(config: WindowConfig, fixed: Sequence[Grid] = ()) -> list[Mode]:
    """Adaptive windows, and fixed ones: of these sizes, or as large as adaptive ones are for a picture of the training
    area."""
    adaptive = replace(config, size=None)
    sizes = fixed or [config.size or window_size(Grid(1, *config.train_area), adaptive)]
    return [Mode("adaptive", adaptive), *(Mode(f"fixed {_times(size)}", replace(config, size=size)) for size in sizes)]


def try_model(models: Models, modes: Sequence[Mode], data: Path, size: Grid, count: int) -> Trial:
    """Restore held-out pictures in every mode: the same weights, the same noise.

    Raises:
        MediaError: none is so large.
    """
    items = list(islice(_items(data, size), count))
    if not items:
        raise MediaError(f"{data} holds nothing to evaluate of {_times((size.w, size.h))} pixels and {size.t} frames; "
                         "name other sizes.")  # fmt: skip
    grid = Grid((size.t - 1) // LATENT_FRAMES + 1, size.h // CLIP_MULTIPLE, size.w // CLIP_MULTIPLE)
    restored: dict[str, list[Tensor]] = {}
    for index, mode in enumerate(modes):
        twin = next((other for other in modes[:index] if same_windows(grid, mode.windows, other.windows)), None)
        if twin is not None:
            restored[mode.name] = restored[twin.name]
            continue
        settings = Settings(target=Target.exact(size.h, size.w), windows=mode.windows)
        log.info("%s windows, %s pixels, frames: %d", mode.name, _times((size.w, size.h)), size.t)
        restored[mode.name] = [
            restore(item.degraded().permute(0, 2, 3, 1), models, settings).permute(0, 3, 1, 2) for item in items
        ]
    return Trial(size, grid, CLIP_MULTIPLE, [item.name for item in items], [item.frames for item in items], restored)


def _items(data: Path, size: Grid) -> Iterator[EvalItem]:
    """What is at least so large, cut to its middle; pictures for one frame, else clips."""
    for item in eval_items(data, length=size.t):
        t, _, h, w = item.frames.shape
        if t == size.t and h >= size.h and w >= size.w:
            top, left = (h - size.h) // 2, (w - size.w) // 2
            yield EvalItem(item.name, item.frames[..., top : top + size.h, left : left + size.w])


# Two models that are trained for it.


def twin_modes() -> list[Mode]:
    adaptive = WindowConfig(train_area=TWIN_AREA)
    return [Mode("adaptive", adaptive), Mode(f"fixed {_times(TWIN_SIZE)}", replace(adaptive, size=TWIN_SIZE))]


def twin_config(mode: Mode, steps: int) -> Pretraining:
    """pico's first stage, shortened, and with windows."""
    run = replace(PRETRAINING.run, steps=steps, save_every=steps, validate_every=steps + 1)
    return replace(PRETRAINING, model=replace(PRETRAINING.model, windows=mode.windows), run=run)


def try_twins(modes: Sequence[Mode], out: Path, sizes: Sequence[Grid], steps: int, count: int) -> list[Trial]:
    """Train a model in every mode, from the same weights on the same batches, and let each restore in its own."""
    latents = PicoLatents(out / "data", seed=0, pictures=TWIN_STILLS, held_out=1)
    restorers = {}
    for mode in modes:
        config, directory = twin_config(mode, steps), out / mode.name.replace(" ", "_")
        loop.run(PicoPretrainStage(config, latents), config, {"g": config.optim}, directory)
        restorers[mode.name] = load_run(directory, config.model)
    trials = []
    for size in sizes:
        drawn = [still(0, TWIN_FIRST + index, max(size))[: size.h, : size.w] for index in range(count)]
        wanted = torch.stack([torch.from_numpy(picture.copy()) for picture in drawn]).permute(0, 3, 1, 2).float() / 255
        exam = Exam(wanted, degrade(wanted, seed=2))
        restored = {name: list(exam.restore(one, TWIN_SAMPLING).split(1)) for name, one in restorers.items()}
        names = [f"drawn {index}" for index in range(count)]
        grid = Grid(1, size.h // TWIN_TOKEN, size.w // TWIN_TOKEN)
        trials.append(Trial(size, grid, TWIN_TOKEN, names, list(wanted.split(1)), restored))
    return trials


# The report.

ABOUT = """\
**Energy** is boundary energy: the mean absolute difference of neighbours across window borders, divided by that across
places between two tokens that are no border of any layer, minus the same quotient of the original. **Seams** is what
windows add to it: the energy, minus that of the same places in what the other windows made of the same picture, where
they are no border; 0 where borders cannot be told. ± is the standard error over pictures. PSNR: more is better; seams
and LSD: less. Where windows of two kinds coincide, so do the results."""
HEAD = ("size", "windows", "t x h x w", "energy, regular", "seams, regular", "energy, shifted", "seams, shifted",
        "PSNR", "LSD")  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    lines = ["| " + " | ".join(HEAD) + " |", "| --- " * len(HEAD) + "|"]
    for row in rows:
        cells = [row.size, row.mode, _times(row.window)]
        for kind in KINDS:
            cells += [_mean(row.energy[kind]), _mean(row.seams[kind])]
        cells += [f"{sum(values) / len(values):.2f}" for values in (row.psnr, row.lsd)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _times(grid: Sequence[int]) -> str:
    return " x ".join(map(str, grid))


def _mean(values: Sequence[float]) -> str:
    if not values:
        return "–"
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:+.3f}"
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return f"{mean:+.3f} ± {deviation / math.sqrt(len(values)):.3f}"


def report(title: str, trials: Sequence[Trial], modes: Sequence[Mode], out: Path) -> str:
    """Write the three files; returns the text."""
    rows = [row for trial in trials for row in measure(trial, modes)]
    counts = ", ".join(f"{len(trial.names)} of {trial.title}" for trial in trials)
    text = f"# {title}\n\n{ABOUT}\n\n{table(rows)}\n\nPictures: {counts}.\n"
    out.mkdir(parents=True, exist_ok=True)
    state.write_whole(out / "window_study.md", text)
    content = {
        "title": title,
        "torch": torch.__version__,
        "modes": [plain(mode) for mode in modes],
        "pictures": {trial.title: trial.names for trial in trials},
        "rows": [plain(row) for row in rows],
    }
    state.write_whole(out / "window_study.json", json.dumps(content, indent=1) + "\n")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        log.warning("matplotlib is not installed: there is no window_study.png. The numbers are in window_study.json.")
        return text
    shown = _telling(trials, modes)
    figure = Figure(figsize=(5 * (len(modes) + 2), 13), layout="constrained")
    draw(figure, shown, modes, title)
    figure.savefig(out / "window_study.png", dpi=80)
    return text


def _telling(trials: Sequence[Trial], modes: Sequence[Mode]) -> Trial:
    """The largest trial in which the modes differ."""
    first, *others = modes
    differing = [trial for trial in trials
                 if not any(same_windows(trial.grid, first.windows, other.windows) for other in others)]  # fmt: skip
    return max(differing or trials, key=lambda trial: trial.size.h * trial.size.w)


# Tokens along a side of the crops in the picture, at most, and how much a difference is enlarged there.
CROP, GAIN = 10, 8
MARKS = {"regular": "red", "shifted": "cyan"}
ORIGINAL, OWN, OTHERS = "0.6", "tab:blue", "tab:orange"


def draw(figure: Any, trial: Trial, modes: Sequence[Mode], title: str) -> None:
    """Profiles over the windows of every mode, and a crop of the picture that shows the most of a difference."""
    top, bottom = figure.subfigures(2, 1, height_ratios=(9, 5))
    shown = f"{len(trial.names)} of {trial.title} pixels, {_times(trial.grid[1:])} tokens"
    figure.suptitle(f"{title}: {shown}", fontsize=16)
    axes = top.subplots(2, len(modes), sharey=True, squeeze=False)
    for column, mode in enumerate(modes):
        for row, (axis, name) in enumerate(((-2, "height"), (-1, "width"))):
            draw_profile(axes[row][column], trial, mode, modes, axis)
            tokens = window_size(trial.grid, mode.windows)[axis]
            axes[row][column].set_title(f"{mode.name}: along the {name}, windows of {tokens} tokens")
        axes[1][column].set_xlabel("pixels from the border of a regular window")
    for row in axes:
        row[0].set_ylabel("difference of neighbours / mean")
    top.legend(*axes[1][0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    draw_crops(bottom.subplots(1, len(modes) + 2), trial, modes)


def draw_profile(plot: Any, trial: Trial, mode: Mode, modes: Sequence[Mode], axis: int) -> None:
    window, length, token = window_size(trial.grid, mode.windows)[axis], trial.grid[axis], trial.token
    rest = [frames for other in modes if not same_windows(trial.grid, mode.windows, other.windows)
            for frames in trial.restored[other.name]]  # fmt: skip
    lines = {
        "original": (ORIGINAL, 0.8, trial.wanted),
        # Between tokens is where it may differ; its line would only hide the other.
        "with other windows": (OTHERS, 0, rest),
        "with these windows": (OWN, 0.8, trial.restored[mode.name]),
    }
    for name, (colour, width, frames) in lines.items():
        if frames:
            values = profile(frames, axis, min(window, length), token)
            plot.plot(values, color=colour, linewidth=width, alpha=0.7)
            between = range(0, len(values), token)
            plot.plot(between, values[::token], "o", color=colour, markersize=6, label=f"{name}, between tokens")
    if window < length:
        for kind, place in (("regular", 0), ("shifted", window // 2)):
            at = place * token
            plot.axvline(at, color=MARKS[kind], linestyle="--", linewidth=1.5, label=f"{kind} border", zorder=0)
    plot.grid(alpha=0.3)


def draw_crops(plots: Sequence[Any], trial: Trial, modes: Sequence[Mode]) -> None:
    """The same crop of the original and of every mode, its window borders marked, and how two modes differ."""
    names = [mode.name for mode in modes]
    differences = [(a - b)[0].abs().mean(0) for a, b in zip(*(trial.restored[name] for name in names[:2]), strict=True)]
    index = max(range(len(differences)), key=lambda index: differences[index].mean())
    side = trial.token * min(CROP, *trial.grid[1:])
    heat = F.avg_pool2d(differences[index][None], side, trial.token)[0]
    top, left = (int(place) * trial.token for place in divmod(int(heat.argmax()), heat.shape[1]))
    cut = (slice(top, top + side), slice(left, left + side))
    shown = {"original": trial.wanted[index][0], **{name: trial.restored[name][index][0] for name in names}}
    for plot, (name, frame) in zip(plots, shown.items(), strict=False):
        plot.imshow(frame[(slice(None), *cut)].permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
        plot.set_title(f"{trial.names[index]}: {name}")
    plots[-1].imshow((GAIN * differences[index][cut]).clamp(0, 1).numpy(), cmap="gray", interpolation="nearest")
    plots[-1].set_title(f"|{names[0]} - {names[1]}| x {GAIN}")
    for plot, mode in zip(plots[1:], modes, strict=False):
        mark(plot, trial, mode, (top, left), side)
    for plot in plots:
        plot.set_xticks(())
        plot.set_yticks(())


def mark(plot: Any, trial: Trial, mode: Mode, corner: tuple[int, int], side: int) -> None:
    """Borders as dashes over a crop, so that between them one sees what they mark."""
    places = borders(trial.grid, mode.windows)
    for line, start, across in zip(places, corner, (plot.axhline, plot.axvline), strict=True):
        for kind, colour in MARKS.items():
            for place in getattr(line, kind):
                at = place * trial.token - start
                if 0 < at < side:
                    across(at - 0.5, color=colour, dashes=(3, 5), linewidth=1.8)


def _grid(text: str) -> Grid:
    """"1,6,6": tokens along time, height and width."""
    try:
        return Grid(*(int(part) for part in text.split(",")))
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"expected T,H,W in tokens, got {text!r}") from error


def _size(text: str) -> Grid:
    """"768x512" or "448x256x17": width, height and frames."""
    try:
        w, h, t = [*(int(part) for part in text.lower().split("x")), 1][:3]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT or WIDTHxHEIGHTxFRAMES, got {text!r}") from error
    if h < 1 or w < 1 or t < 1 or h % CLIP_MULTIPLE or w % CLIP_MULTIPLE or (t - 1) % LATENT_FRAMES:
        raise argparse.ArgumentTypeError(f"{text} is not in multiples of {CLIP_MULTIPLE} pixels, with 4n+1 frames")
    return Grid(t, h, w)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; 1 if something was refused."""
    parser = argparse.ArgumentParser(
        prog="python -m training.window_study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", help="run, checkpoint, or published name such as nano")
    which.add_argument("--twins", action="store_true", help="train two tiny models, one for each kind of windows")
    parser.add_argument("--data", type=Path, help="folder with eval/, for --model")
    parser.add_argument("--out", type=Path, required=True, help="where to write; trained twins are kept there")
    parser.add_argument("--vae", help="of a run: its autoencoder (default: that of the same name, or nano's)")
    parser.add_argument("--fixed", type=_grid, action="append", metavar="T,H,W", default=[],
                        help="tokens of fixed windows, several times if wanted (default: the training's)")  # fmt: skip
    parser.add_argument("--sizes", type=_size, nargs="+", metavar="WxH[xFRAMES]", help="of the results, in pixels")
    parser.add_argument("--pictures", type=int, help="of every size")
    parser.add_argument("--steps", type=int, default=TWIN_STEPS, help="that each twin is trained")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--device", default="cpu", help="for --model: auto, cpu or cuda")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("seedvr2_core").setLevel(logging.WARNING)  # the memory plan of every picture
    torch.set_num_threads(args.threads)
    # Numbers below 1e-38 appear in dying channels and are a hundred times slower on a CPU.
    torch.set_flush_denormal(True)
    try:
        print(study(args))
    except SeedVR2Error as error:
        print(f"window_study: {error}", file=sys.stderr)
        return 1
    return 0


def study(args: argparse.Namespace) -> str:
    if args.twins:
        modes = twin_modes()
        trials = try_twins(modes, args.out, args.sizes or TWIN_SIZES, args.steps, args.pictures or TWIN_PICTURES)
        return report(f"Window study of two twins, {args.steps} steps each", trials, modes, args.out)
    if args.data is None:
        raise SettingError("--data is missing: the folder that holds eval/ with pictures and clips.")
    vae = args.vae or ("nano" if is_run(args.model) else args.model)
    models = open_models(args.model, vae, pick_device(args.device))
    modes = modes_of(models.dit.config.windows, args.fixed)
    trials = [try_model(models, modes, args.data, size, args.pictures or PICTURES) for size in args.sizes or SIZES]
    return report(f"Window study of {args.model}", trials, modes, args.out)


if __name__ == "__main__":
    sys.exit(main())
