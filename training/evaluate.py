"""Restored clips against their originals, and on their own: tables for people and for programs.

Frames are rounded to 8 bits; a metric is averaged over frames, then over the clips of a set. The metrics of `metrics`
always run; those of `perceptual` need libraries and weights, and one that is not here is named in every table.

    python -m training.evaluate --pred RESTORED --gt ORIGINALS --metrics psnr,ssim,lpips --out results

A set is a folder of clips, and a clip a video, a picture or a folder of numbered pictures. RESTORED may hold several
sets, in folders named like the benchmarks of the paper: SPMCS, UDM10, REDS30, YouHQ40, VideoLQ, AIGC28.

Source: protocol of SeedVR2, arXiv 2506.05301, section 4; what it leaves open is ours: RGB and Y, no crop.
"""
# T H W frames, height, width

from __future__ import annotations

import argparse
import json
import logging
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from seedvr2_core.device import pick_device
from seedvr2_core.errors import MediaError, SeedVR2Error, SettingError

from .data import CLIP_SUFFIXES, IMAGE_SUFFIXES, decode, list_clips, list_media
from .degradation import NANO, degrade
from .metrics import PANEL, Measure, Metric, means, measure
from .perceptual import OPTIONAL, MetricMissing
from .randomness import key

log = logging.getLogger(__name__)

METRICS = {metric.name: metric for metric in (*PANEL, *OPTIONAL)}
# Groups that `--metrics` understands beside single names.
GROUPS = {"panel": tuple(metric.name for metric in PANEL), "all": tuple(METRICS)}
# Folders in which data sets keep their originals and their degraded inputs.
GT_FOLDERS, LQ_FOLDERS = ("gt", "hr", "hq", "original", "sharp"), ("lq", "lr", "input", "bicubic", "bdx4", "bix4")


@dataclass(frozen=True)
class Benchmark:
    """A data set of the paper."""

    name: str
    clips: int
    reference: bool  # has originals


BENCHMARKS = (
    Benchmark("SPMCS", 30, True),
    Benchmark("UDM10", 10, True),
    Benchmark("REDS30", 30, True),
    Benchmark("YouHQ40", 40, True),
    Benchmark("VideoLQ", 50, False),
    Benchmark("AIGC28", 28, False),
)


def recognise(folder: Path) -> Benchmark | None:
    """The benchmark that a folder's name, or else the nearest of its parents', stands for: "udm10", "UDM10_x4"."""
    for name in (folder.name, *(parent.name for parent in folder.parents)):
        words = re.sub(r"[^a-z0-9]", "", name.lower())
        for benchmark in BENCHMARKS:
            if words.startswith(benchmark.name.lower()):
                return benchmark
    return None


@dataclass(frozen=True, kw_only=True)
class ClipSet:
    """Clips that are averaged into one row."""

    name: str
    benchmark: Benchmark | None
    pred: Mapping[str, Path]
    gt: Mapping[str, Path] | None  # of the same names, or no originals at all

    @property
    def remark(self) -> str:
        """What keeps the row from being comparable with published ones; "" if nothing does."""
        if self.benchmark and len(self.pred) != self.benchmark.clips:
            return f"{self.name}: {len(self.pred)} of {self.benchmark.clips} clips"
        return ""


def find_sets(pred: Path, gt: Path | None) -> list[ClipSet]:
    """What there is to measure: one set, or one for every subfolder of pred with the name of a benchmark.

    Raises:
        MediaError: a folder is missing or empty, or originals and restored clips have different names.
    """
    if not pred.is_dir():
        raise MediaError(f"{pred} is not a folder; expected one that holds the restored clips.")
    inner = [folder for folder in sorted(pred.iterdir()) if folder.is_dir() and _own_benchmark(folder)]
    if not inner:
        return [_clip_set(pred, gt)]
    return [_clip_set(folder, _counterpart(folder, gt)) for folder in inner]


def _own_benchmark(folder: Path) -> Benchmark | None:
    return recognise(Path(folder.name))


def _counterpart(folder: Path, gt: Path | None) -> Path | None:
    benchmark = _own_benchmark(folder)
    if gt is None or not benchmark.reference:
        return None
    found = [other for other in sorted(gt.iterdir()) if other.is_dir() and _own_benchmark(other) == benchmark]
    if len(found) != 1:
        raise MediaError(f"{gt} holds {len(found)} folders for {benchmark.name}, expected 1 with its originals.")
    return found[0]


def _clip_set(pred: Path, gt: Path | None) -> ClipSet:
    benchmark = recognise(pred)
    restored = {path.stem: path for path in list_clips(pred)}
    if not restored:
        raise MediaError(f"{pred} holds no clip or picture; expected restored ones.")
    name = benchmark.name if benchmark else pred.name
    if gt is None or (benchmark and not benchmark.reference):
        return ClipSet(name=name, benchmark=benchmark, pred=restored, gt=None)
    folder = _originals(gt)
    originals = {path.stem: path for path in list_clips(folder)}
    missing = [name for name in originals if name not in restored]
    extra = [name for name in restored if name not in originals]
    if not originals or missing or extra:
        raise MediaError(f"{folder} holds {len(originals)} clips, of which {pred} lacks {_names(missing)}, and has "
                         f"{_names(extra)} beside them. Give both folders the same names.")
    return ClipSet(name=name, benchmark=benchmark, pred=restored, gt=originals)


def _names(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


def _originals(folder: Path) -> Path:
    """The subfolder with the originals of a data set that keeps several kinds side by side, or the folder itself."""
    if not folder.is_dir():
        raise MediaError(f"{folder} is not a folder; expected one that holds the originals.")
    inner = {child.name.lower(): child for child in folder.iterdir() if child.is_dir()}
    if any(name in inner for name in LQ_FOLDERS) or len(inner) == 1:
        return next((inner[name] for name in GT_FOLDERS if name in inner), folder)
    return folder


def open_metrics(names: Sequence[str], device: torch.device) -> tuple[dict[str, Measure], dict[str, str], dict]:
    """Load metrics by name.

    Returns:
        name -> the metric at work; name -> why it cannot run here; name -> libraries and weights it is made of.
    """
    ready, missing, made_of = {}, {}, {}
    for name in names:
        try:
            opened = METRICS[name].open(device)
        except MetricMissing as error:
            missing[name] = str(error)
            log.warning("%s is not measured: %s", name, error)
            continue
        ready[name] = opened.measure
        if opened.made_of:
            made_of[name] = dict(opened.made_of)
    return ready, missing, made_of


def parse_metrics(text: str) -> tuple[str, ...]:
    """Names from "psnr,ssim" or "panel,lpips" or "all", in the order of the tables.

    Raises:
        SettingError: a name that does not exist.
    """
    names: list[str] = []
    for word in _words(text):
        if word not in METRICS and word not in GROUPS:
            raise SettingError(f"There is no metric {word!r}; choose from {', '.join((*GROUPS, *METRICS))}.")
        names += GROUPS.get(word, (word,))
    return tuple(name for name in METRICS if name in names)


def _words(text: str) -> list[str]:
    return [part.strip().lower().replace("-", "_") for part in text.split(",") if part.strip()]


def measure_set(clips: ClipSet, ready: Mapping[str, Measure], border: int = 0) -> dict[str, dict[str, float]]:
    """Every metric that fits, clip by clip: name -> metric -> value.

    Args:
        clips: what to measure.
        ready: metrics at work.
        border: pixels to leave out on each side.

    Raises:
        MediaError: a file cannot be decoded.
        SettingError: a clip and its original differ in size or length, or the border leaves nothing.
    """
    results = {}
    for name, path in tqdm(clips.pred.items(), desc=clips.name):
        pred = cut_border(read(path), border)
        gt = cut_border(read(clips.gt[name]), border) if clips.gt else None
        if gt is not None and pred.shape != gt.shape:
            raise SettingError(f"{name}: restored is {_shape(pred)}, the original {_shape(gt)}. Both have to be of one "
                               "size and length; nothing is resized here.")
        fits = [metric for metric in map(METRICS.get, ready) if metric.fits(pred, gt is not None)]
        results[name] = {metric.name: ready[metric.name](pred, gt) for metric in fits}
    return results


def read(path: Path) -> Tensor:
    """A clip, picture or folder of pictures as codes, uint8 T 3 H W."""
    return torch.tensor(decode(path)).permute(0, 3, 1, 2)


def cut_border(frames: Tensor, border: int) -> Tensor:
    """Frames without `border` pixels on each side."""
    height, width = frames.shape[-2:]
    if border < 0 or 2 * border >= min(height, width):
        raise SettingError(f"A border of {border} pixels does not fit {width} x {height}; use 0 for whole frames.")
    return frames[..., border : height - border, border : width - border]


def _shape(frames: Tensor) -> str:
    return f"{len(frames)} frames of {frames.shape[-1]} x {frames.shape[-2]}"


@dataclass(frozen=True, kw_only=True)
class Results:
    """What came out, and what it came from."""

    sets: Mapping[str, Mapping[str, Mapping[str, float]]]  # set -> clip -> metric -> value
    missing: Mapping[str, str]  # metric -> why it was not measured
    remarks: Sequence[str]
    options: Mapping[str, object]
    versions: Mapping[str, object]

    def as_json(self) -> str:
        sets = {name: {"mean": means(clips), "clips": clips} for name, clips in self.sets.items()}
        whole = {"sets": sets, "not_measured": self.missing, "remarks": self.remarks, "options": self.options,
                 "versions": self.versions}  # fmt: skip
        return json.dumps(_finite(whole), indent=1) + "\n"

    def as_markdown(self) -> str:
        """One row a set; below, what was not measured and why."""
        rows = {name: means(clips) for name, clips in self.sets.items()}
        used = [metric for metric in METRICS.values() if any(metric.name in row for row in rows.values())]
        arrows = {"higher": "↑", "lower": "↓"}
        lines = ["| set | clips | " + " | ".join(f"{metric.name} {arrows[metric.better]}" for metric in used) + " |",
                 "| --- " * (len(used) + 2) + "|"]  # fmt: skip
        for name, row in rows.items():
            cells = [f"{row[metric.name]:.{metric.decimals}f}" if metric.name in row else "–" for metric in used]
            lines.append(f"| {name} | {len(self.sets[name])} | " + " | ".join(cells) + " |")
        lines += ["", *(f"- {remark}" for remark in self.remarks)]
        lines += [f"- not measured: {name}, {reason}" for name, reason in self.missing.items()]
        about = {name: value for name, value in {**self.options, **self.versions}.items() if name != "metrics"}
        return "\n".join([*lines, f"- {', '.join(f'{name} {value}' for name, value in about.items())}"]) + "\n"


def _finite(value: object) -> object:
    """The same for JSON, which knows no infinity: the PSNR of equal frames becomes the word "inf"."""
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def evaluate(
    pred: Path, gt: Path | None, metrics: Sequence[str] = GROUPS["panel"], border: int = 0, device: str = "cpu"
) -> Results:
    """Measure a folder of restored clips, or several; see the module's docstring.

    Raises:
        MediaError: something is missing or cannot be decoded.
        SettingError: sizes differ, or there is nothing that can be measured.
    """
    sets = find_sets(pred, gt)
    chosen = pick_device(device)
    ready, missing, made_of = open_metrics(metrics, chosen)
    if not any(METRICS[name].reference is False or clips.gt for name in ready for clips in sets):
        raise SettingError(f"None of {', '.join(metrics)} can be measured: without originals (--gt) only metrics that "
                           f"need none can, and {_names(list(missing))} cannot run here.")
    return Results(
        sets={clips.name: measure_set(clips, ready, border) for clips in sets},
        missing=missing,
        remarks=[clips.remark for clips in sets if clips.remark],
        options={"metrics": list(metrics), "border": border, "device": str(chosen)},
        versions={"torch": torch.__version__, "av": av.__version__, "pillow": Image.__version__, **made_of},
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; 1 if something was refused, or a metric asked for by its name could not run."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(
        prog="python -m training.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pred", type=Path, required=True, help="folder of restored clips, or of several such")
    parser.add_argument("--gt", type=Path, help="folder of the originals; without, only metrics that need none")
    parser.add_argument("--metrics", default="panel", help=f"comma-separated: {', '.join((*GROUPS, *METRICS))}")
    parser.add_argument("--crop", type=int, default=0, help="pixels to leave out on each side (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="for metrics that are networks")
    parser.add_argument("--out", type=Path, help="where to write the tables: OUT.md and OUT.json")
    options = parser.parse_args(argv)
    try:
        results = evaluate(options.pred, options.gt, parse_metrics(options.metrics), options.crop, options.device)
        if options.out:
            write(results, options.out)
    except SeedVR2Error as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 1
    print(results.as_markdown())
    return int(any(name in _words(options.metrics) for name in results.missing))


def write(results: Results, out: Path) -> None:
    """The tables as OUT.md and OUT.json."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_name(f"{out.name}.md").write_text(results.as_markdown(), "utf-8")
        out.with_name(f"{out.name}.json").write_text(results.as_json(), "utf-8")
    except OSError as error:
        raise SettingError(f"{out}.md and .json cannot be written ({error.strerror}); choose another place.") from error


@dataclass(frozen=True)
class EvalItem:
    """One original: its file name without suffix, and its frames T 3 H W in 0..1."""

    name: str
    frames: Tensor

    def degraded(self) -> Tensor:
        """The input every model is given: float32 T 3 H//4 W//4 in 0..1, damaged by NANO with a seed of the name."""
        return degrade(self.frames, key(0, f"eval/{self.name}"), NANO)[0]


def eval_items(root: Path, side: int | None = None, length: int | None = None) -> Iterator[EvalItem]:
    """The originals in `root/eval/images` and `root/eval/clips`, one at a time, images first.

    Args:
        root: the data folder.
        side: cut a centred square of at most this many pixels; None keeps whole frames.
        length: keep at most this many frames of a clip; None keeps all.

    Raises:
        MediaError: there is nothing to evaluate, or a file cannot be decoded.
    """
    folder = Path(root) / "eval"
    paths = list_media(folder / "images", IMAGE_SUFFIXES) + list_media(folder / "clips", CLIP_SUFFIXES)
    if not paths:
        raise MediaError(f"{folder} holds nothing to evaluate. Expected the folders images and clips in it.")
    for path in paths:
        frames = read(path)[:length].float() / 255
        if side is not None:
            top, left = (max(0, (whole - side) // 2) for whole in frames.shape[-2:])
            frames = frames[..., top : top + side, left : left + side]
        yield EvalItem(path.stem, frames)


__all__ = ["BENCHMARKS", "METRICS", "EvalItem", "Metric", "eval_items", "evaluate", "find_sets", "means", "measure",
           "recognise"]  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
