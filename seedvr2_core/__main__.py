"""The command line: `seedvr2 restore IN OUT`, `seedvr2 info FILE`, `seedvr2 download NAME`.

Exit codes: 0 done; 1 refused or failed, with one sentence on stderr; 2 wrong arguments; 130 interrupted by Ctrl-C;
141 stopped because nobody reads what it prints.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

try:
    import resource
except ModuleNotFoundError:  # Windows
    resource = None

from .attention import ATTENTION_NAMES
from .checkpoints import inspect
from .checkpoints.download import NAMES, download
from .checkpoints.folders import EXTENSIONS, default_directory, pick
from .device import DTYPES, pick_device, pick_dtype
from .errors import Cancelled, MediaError, SeedVR2Error, SettingError
from .journal import SUFFIX as JOURNAL
from .journal import holds_work
from .loading import Models, load_models
from .memory.plan import parse_bytes
from .models.linear import PACKING_NAMES
from .progress import Overall
from .settings import Settings
from .video.color import COLOR_METHODS
from .video.files import probe
from .video.geometry import Target
from .video.stills import SUFFIXES as IMAGE_SUFFIXES
from .video.stills import images_in, missing_numbers, why_no_clip
from .video.video_writer import MUXERS
from .whole_files import Report, check_file, fingerprint, restore_file

log = logging.getLogger(__name__)

# Holds every kind of sound and subtitles; for what comes in a container that is not written.
ANY_VIDEO = ".mkv"
# Seconds without a change after which a file that was being written is taken to be left by a run that was killed.
ABANDONED = 600
# Name of what says which pictures of a folder are finished.
FINISHED = "pictures"
# Seconds between two looks of the bar, where it moves and where every look is a line in a file.
MOVING, LISTED = 0.1, 10


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.DEBUG if args.verbose else logging.INFO, format="%(message)s", stream=sys.stderr)
    if not args.verbose:
        # Every request of the hub client would be a line.
        logging.getLogger("httpx").setLevel(logging.WARNING)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read what is printed, such as `head`, has seen enough. What is left would fail once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except SeedVR2Error as error:
        print(f"seedvr2: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nseedvr2: interrupted; what was there before is untouched.", file=sys.stderr)
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="seedvr2", description="Restore videos and images with SeedVR2.")
    parser.add_argument("--verbose", action="store_true", help="say what happens inside")
    parser.add_argument("--version", action="version", version=f"seedvr2 {_version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_restore(commands.add_parser("restore", help="restore a video, an image or a folder of images"))
    _add_info(commands.add_parser("info", help="say what a media file or a checkpoint is"))
    _add_download(commands.add_parser("download", help="fetch published weights"))
    return parser


def _add_restore(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run_restore)
    parser.add_argument("input", type=Path, metavar="IN", help="video, image or folder of images")
    parser.add_argument(
        "output", type=Path, metavar="OUT", help="file to write, folder to put it in, or new folder for images"
    )
    parser.add_argument("--model", help="nano, 3b, 7b or a file (default: the best found on this machine, else nano)")
    parser.add_argument("--vae", help="nano, 3b, 7b or a file (default: the one that belongs to the model)")
    folder = parser.add_mutually_exclusive_group()
    folder.add_argument(
        "--clip", dest="folder", action="store_const", const="clip",
        help="the images in IN are frames of a clip (default: if their names are one numbered sequence)",
    )  # fmt: skip
    folder.add_argument(
        "--pictures", dest="folder", action="store_const", const="pictures",
        help="they have nothing to do with each other: each is restored by itself",
    )  # fmt: skip
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--scale", type=float, help="enlarge by this factor (default: 2)")
    size.add_argument("--short-side", type=int, metavar="PIXELS", help="pixels of the shorter side")
    size.add_argument("--long-side", type=int, metavar="PIXELS", help="pixels of the longer side")
    size.add_argument("--megapixels", type=float, metavar="MP", help="millions of pixels of a frame")
    size.add_argument("--size", type=_width_x_height, metavar="WxH", help="exactly this width and height")
    size.add_argument("--same", action="store_true", help="restore without enlarging")
    parser.add_argument("--color", choices=COLOR_METHODS, default=Settings.color, help="how colours follow the source")
    parser.add_argument(
        "--strength", type=float, default=Settings.strength, help="0..1; below 1 the enlarged source shows through"
    )
    parser.add_argument("--seed", type=int, default=Settings.seed, help="same seed, same result")
    parser.add_argument("--steps", type=int, default=Settings.steps, help="sampling steps; SeedVR2 needs one")
    parser.add_argument("--cfg", type=float, default=Settings.cfg, help="guidance, for the multi-step SeedVR")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="type to compute in")
    parser.add_argument("--packing", choices=PACKING_NAMES, default="auto", help="of linear layers; fp8 is opt-in")
    parser.add_argument("--kernels", action="store_true", help="try our own GPU kernels, unproven so far")
    parser.add_argument("--attention", choices=ATTENTION_NAMES, default=Settings.attention, help="implementation")
    parser.add_argument("--one-shot", action="store_true", help="do not look for cuts, at which all begins anew")
    parser.add_argument("--chunk", type=_auto_or_int, default=None, metavar="auto|N", help="frames seen at once")
    parser.add_argument("--memory-limit", metavar="8G", help="memory to use at most (default: what is free)")
    parser.add_argument("--fps", type=_rate, default=Fraction(24), help="frame rate of a folder of images")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a report of the run")


def run_restore(args: argparse.Namespace) -> None:
    device = pick_device(args.device)
    settings = Settings(
        target=_target(args),
        color=args.color,
        strength=args.strength,
        seed=args.seed,
        steps=args.steps,
        cfg=args.cfg,
        attention=args.attention,
        chunk=args.chunk,
        one_shot=args.one_shot,
        memory_limit=None if args.memory_limit is None else parse_bytes(args.memory_limit),
    )
    # What is wrong is refused before gigabytes are loaded.
    separate, taken_for = _folder_kind(args)
    destination = _destination(args.input, args.output)
    if separate:
        _check_folder(args.input, args.output)
    else:
        check_file(args.input, destination, settings, args.fps)
    if args.json:
        _check_report(args.json)
    if taken_for:
        log.info("%s: %s", args.input, taken_for)
    if separate:
        _mention_abandoned(destination, f".{FINISHED}{JOURNAL}")
    else:
        own = f".{destination.name}{JOURNAL}", f".{destination.stem}.partial{destination.suffix}"
        _mention_abandoned(destination.parent, *own)
    dtype = pick_dtype(args.dtype, device)
    models = load_models(
        *pick(args.model, args.vae), device, dtype, args.packing, args.kernels, settings.memory_limit
    )
    if separate:
        rows, failed, left = _restore_pictures(args.input, destination, models, settings)
        row = {"pictures": rows, "failed": failed, "finished_before": left}
    else:
        row, failed, left = dataclasses.asdict(_restore(args.input, destination, models, settings, args.fps)), {}, 0
    if args.json:
        _save(args.json, {**row, **_circumstances(settings, device)})
    if failed:
        done = len(rows) + left
        others = f"the others are in {destination}" if done else "there are no others"
        raise MediaError(f"{len(failed)} of {_counted(len(failed) + done, 'picture')} could not be restored "
                         f"({', '.join(failed)}), for the reasons above; {others}.")  # fmt: skip


def _restore(source: Path, destination: Path, models: Models, settings: Settings, fps: Fraction) -> Report:
    replaced = destination.is_file()
    with logging_redirect_tqdm(), Bar() as bar:
        report = restore_file(source, destination, models, settings, bar, fps)
        bar.finish(report.frames)
    log.info(
        "%s: %s in %.1f s%s",
        report.destination,
        _counted(report.frames, "frame"),
        report.seconds,
        ", in place of the file that was there" if replaced else "",
    )
    return report


def _restore_pictures(
    source: Path, destination: Path, models: Models, settings: Settings
) -> tuple[list[dict[str, Any]], dict[str, str], int]:
    """Restore each image of a folder into another, under its own name.

    Returns reports, what failed and why, and how many were left alone because an interrupted run has finished them.
    """
    destination.mkdir(exist_ok=True)
    finished = destination / f".{FINISHED}{JOURNAL}"
    rows, failed, left = [], {}, 0
    # A line each time that a picture is begun or finished; the last one counts.
    lines = finished.read_text("utf-8").splitlines() if finished.exists() else []
    marks = {name: mark for mark, _, name in (line.partition(" ") for line in lines)}

    def note(mark: str, name: str) -> None:
        # Without it a picture is restored once more.
        with suppress(OSError), finished.open("a", encoding="utf-8") as file:
            file.write(f"{mark} {name}\n")

    for image in images_in(source):
        try:
            mark = fingerprint(probe(image), models, settings)
            if marks.get(image.name) == mark and (destination / image.name).exists():
                left += 1
                continue
            if image.name in marks:
                note("begun", image.name)
            rows.append(dataclasses.asdict(_restore(image, destination / image.name, models, settings, Fraction(24))))
            note(mark, image.name)
        except Cancelled:
            raise
        except (MediaError, SettingError) as error:
            print(f"seedvr2: {error}", file=sys.stderr)
            failed[image.name] = str(error)
    if not failed:
        finished.unlink(missing_ok=True)
    if left:
        log.info("%s had been restored by a run that was interrupted", _counted(left, "picture"))
    return rows, failed, left


def _folder_kind(args: argparse.Namespace) -> tuple[bool, str]:
    """Whether the images of a folder are separate pictures, not a clip, and in words what they are taken for."""
    images = images_in(args.input) if args.input.is_dir() else []
    if args.folder and args.input.is_file():
        raise SettingError(f"--{args.folder} tells what the images of a folder are, but {args.input.name} is a file.")
    if not images:
        return False, ""
    # Only a clip goes into one file.
    kind = args.folder or ("clip" if args.output.suffix and not args.output.is_dir() else None)
    reason = None if kind else why_no_clip(args.input)
    if kind == "pictures" or reason:
        others = sum(not each.name.startswith(".") for each in args.input.iterdir()) - len(images)
        why = f", because {reason}; --clip if they are frames" if reason else ""
        left = f"; {_counted(others, 'other file')} left alone" if others else ""
        return True, _counted(len(images), "separate picture") + why + left
    words = [f"{_counted(len(images), 'frame')} of a clip"]
    if missing := missing_numbers(args.input):
        words.append(f"{_counted(len(missing), 'number')} missing between them, the first is {missing[0]}")
    return False, "; ".join([*words, *([] if kind else ["--pictures if they are separate"])])


def _destination(source: Path, output: Path) -> Path:
    """A file goes into a folder under its own name, as with cp."""
    if source.is_dir() or not output.is_dir():
        return output
    written = (*MUXERS, *IMAGE_SUFFIXES)
    return output / (source.name if source.suffix.lower() in written else f"{source.stem}{ANY_VIDEO}")


def _check_folder(source: Path, output: Path) -> None:
    if not output.is_dir() and (output.exists() or output.suffix):
        raise MediaError(f"Separate pictures go into a folder, but {output.name} is none; name a folder.")
    if not output.absolute().parent.is_dir():
        raise MediaError(f"The folder {output.parent} for {output.name} does not exist; make it first.")
    if output.exists():
        if output.samefile(source):
            raise MediaError(f"{output.name} is the folder being read; name another to write to.")
        return
    try:
        output.mkdir()
    except OSError as error:
        raise MediaError(f"The folder {output} cannot be made ({error.strerror}); name another.") from error
    output.rmdir()


def _mention_abandoned(folder: Path, *own: str) -> None:
    """What runs for other destinations than our own have left, unless they may still be at it."""
    for path in sorted([*folder.glob(".*.partial*"), *folder.glob(f".*{JOURNAL}")]):
        with suppress(FileNotFoundError):  # finished meanwhile
            if path.name in own or time.time() - path.stat().st_mtime < ABANDONED:
                continue
            if path.suffix == JOURNAL and (path.is_file() or holds_work(path)):
                log.info("%s holds what an interrupted run has restored; begin it again to go on, or delete it.", path)
            elif path.suffix != JOURNAL:
                log.info("%s seems to be left by a run that was killed; delete it if no other is writing it.", path)


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _circumstances(settings: Settings, device: torch.device) -> dict[str, Any]:
    row: dict[str, Any] = {"settings": {**dataclasses.asdict(settings), "target": str(settings.target)}}
    if resource:
        # Kilobytes on Linux, bytes on macOS.
        unit = 1 if sys.platform == "darwin" else 1024
        row["peak_resident_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if device.type == "cuda":
        row["peak_device_bytes"] = torch.cuda.max_memory_allocated(device)
    return row | {"device": str(device), "torch": torch.__version__}


def _check_report(path: Path) -> None:
    there = path.exists()
    try:
        path.open("a").close()
    except OSError as error:
        raise SettingError(f"The report {path} cannot be written ({error.strerror}); name another file.") from error
    if not there:
        path.unlink()


def _save(path: Path, row: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(row, indent=1, default=str) + "\n")
    except OSError as error:
        raise SettingError(f"The report {path} cannot be written ({error.strerror}), but the media are.") from error


def _target(args: argparse.Namespace) -> Target:
    if args.short_side is not None:
        return Target.short_side(args.short_side)
    if args.long_side is not None:
        return Target.long_side(args.long_side)
    if args.megapixels is not None:
        return Target.megapixels(args.megapixels)
    if args.size is not None:
        return Target.exact(*args.size)
    if args.same:
        return Target.same()
    return Settings.target if args.scale is None else Target.scale(args.scale)


class Bar:
    """A progress bar for a restoration: stage, share done, time left. A callable for `on_progress`.

    It appears with the first progress, so that a refusal stands alone.
    """

    def __enter__(self) -> Bar:
        self._overall = Overall()
        self._bar: tqdm | None = None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, stage: str, done: float, total: int | None) -> None:
        if self._bar is None:
            form = "{desc:8} {percentage:3.0f}%|{bar:30}| {elapsed}<{remaining}{postfix}"
            self._bar = tqdm(total=100, bar_format=form, miniters=0, mininterval=_interval())
        share = self._overall(stage, done, total)
        self._bar.set_description_str(stage, refresh=False)
        self._bar.set_postfix_str(f"{int(self._overall.done['decode'])}/{total or '?'} frames", refresh=False)
        # Drawn a few times a second, however often there is progress.
        self._bar.update(max(0.0, 100 * (share or 0.0) - self._bar.n))

    def finish(self, frames: int) -> None:
        """All is done, however many frames there were expected to be."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"{frames}/{frames} frames", refresh=False)
            self._bar.update(100 - self._bar.n)


def _add_info(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run_info)
    parser.add_argument("file", type=Path, metavar="FILE", help="video, image, folder of images or checkpoint")


def run_info(args: argparse.Namespace) -> None:
    if args.file.suffix.lower() in EXTENSIONS:
        info = inspect(args.file)
        rows = {
            "kind": info.label,
            "format": f"{info.format}, mostly {info.dtype}",
            "size": f"{info.size:,} bytes, {info.tensors} tensors, {info.parameters:,} parameters",
            "prompts": ", ".join(info.prompts) or "none inside",
            "prefix": info.prefix or "none",
            "loadable": info.why_not or "yes",
        }
    elif args.file.is_dir() and images_in(args.file) and (reason := why_no_clip(args.file)):
        rows = {"kind": "folder of separate pictures", "pictures": len(images_in(args.file)), "because": reason}
    else:
        info = probe(args.file)
        rows = {name: value for name, value in dataclasses.asdict(info).items() if value not in (None, ())}
        rows["fps"] = _decimal(info.fps)
        rows |= {name: f"{_decimal(rows[name])} s" for name in ("duration", "start") if name in rows}
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:{width}}  {', '.join(value) if isinstance(value, tuple) else value}")


def _add_download(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run_download)
    parser.add_argument("name", choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--dir", type=Path, help=f"folder to put it in (default: {default_directory()})")


def run_download(args: argparse.Namespace) -> None:
    bars: dict[str, tqdm] = {}

    def on_progress(stage: str, done: int, total: int) -> None:
        bar = bars.get(stage)
        if bar is None or bar.total != total:
            bar = bars[stage] = tqdm(total=total, desc=stage, unit="B", unit_scale=True, mininterval=_interval())
        bar.update(done - bar.n)

    for path in download(args.name, args.dir, on_progress):
        print(path)


def _interval() -> float:
    return MOVING if sys.stderr.isatty() else LISTED


def _decimal(value: Fraction) -> str:
    return f"{float(value):.3f}".rstrip("0").rstrip(".")


def _version() -> str:
    try:
        return importlib.metadata.version("seedvr2")
    except importlib.metadata.PackageNotFoundError:
        return "from a folder, not installed"


def _width_x_height(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    try:
        return int(height), int(width)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write it as 1920x1080") from None


def _rate(text: str) -> Fraction:
    try:
        if (rate := Fraction(text)) > 0:
            return rate
    except (ValueError, ZeroDivisionError):
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is no frame rate; write it as 24 or 24000/1001")


def _auto_or_int(text: str) -> int | None:
    try:
        return None if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor a number of frames") from None


def _terminate(number: int, frame: object) -> None:
    # Unwinds like Ctrl-C, so that nothing half-written stays behind.
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
