"""What in a data folder is good enough to train on. `python -m training.data filter --data DIR`

Every picture and clip is looked at once, and what was seen becomes a row of a table, DIR/filter.jsonl: numbers, and
which limits they break. Where the table lies training leaves out the rows that break any. To try other limits, run the
command again with, say, `noise_quantile=0.95`: numbers of files that have not changed are taken from the table.

Nothing here needs weights. Nearly the same picture is recognised by a hash of gradients; of several the largest stays.

Source: the list of SeedVR, arXiv 2501.01320, less what needs networks; the limits are ours.
"""
# H W frame height, width   h w the same of a thumbnail   c channels

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image
from tqdm import tqdm

from seedvr2_core.errors import MediaError, SeedVR2Error, SettingError
from seedvr2_core.video.shots import scene_cuts, thumbnail

from .config import check, describe, override, setting
from .data import (
    CLIP_SUFFIXES,
    DAMAGES,
    FILTER_FILE,
    IMAGE_SUFFIXES,
    Kind,
    decode,
    list_media,
    list_sources,
    source_name,
)

log = logging.getLogger(__name__)

# Of a clip every so many frames are looked at closely.
CLOSE_LOOKS = 24
# Side of the blocks of JPEG and of most video codecs.
BLOCK = 8
# A bar is this dark and this even, in codes of 255.
BAR_LEVEL, BAR_SPREAD = 32, 3
# Sides of the thumbnail whose horizontal gradients are the hash: 8 x 8 bits.
HASH_H, HASH_W = 8, 9
HASH_BITS = HASH_H * (HASH_W - 1)
# Side of the squares of which the smoothest show the noise, and how many of them are used.
SQUARE, SMOOTHEST = 16, 0.2
UNREADABLE = "unreadable"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a source may be like. None: anything."""

    image_pixels: int | None = setting(1_000_000, "fewest pixels of a picture", least=0)
    clip_side: int | None = setting(720, "smallest short side of a clip, in pixels", least=0)
    least_motion: float | None = setting(0.5, "of a clip: mean change between frames, in codes of 255", least=0)
    most_motion: float | None = setting(40.0, "the same; above it strobes", least=0)
    # None, because clips are trained on shot by shot.
    cuts: int | None = setting(None, "most cuts to another shot in a clip", least=0)
    letterbox: float | None = setting(0.02, "largest share of height or width that dark bars take", least=0, most=1)
    duplicate_bits: int | None = setting(4, "hashes that differ in so many of 64 bits are the same picture", most=16)
    # Relative, because what is normal depends on the material. The worst tenth of fewer than 11 files is none of them.
    block_quantile: float | None = setting(0.9, "share of sources with the faintest coding blocks", least=0, most=1)
    noise_quantile: float | None = setting(0.9, "share of sources with the least noise", least=0, most=1)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What one source is like; a row of the table."""

    source: str  # its path under the data folder
    kind: Kind
    version: str  # of the file; another one is looked at anew
    error: str | None = None  # why it cannot be read; all below is empty then
    width: int = 0
    height: int = 0
    frames: int = 0
    motion: float = 0.0  # mean change between frames of a shot, in codes of 255
    cuts: int = 0
    letterbox: float = 0.0  # share of the height or width that dark bars take
    hash: str = ""  # 16 hex digits
    blockiness: float = 0.0  # steps between 8 x 8 blocks over those within; 1: none
    noise: float = 0.0  # its deviation, in codes of 255


COLUMNS = tuple(field.name for field in dataclasses.fields(Seen))


def look(path: Path, kind: Kind, root: Path | None = None) -> Seen:
    """Everything about one picture, video or folder of pictures. It is read frame by frame, however long it is."""
    name, version = source_name(path, root), version_of(path)
    try:
        return dataclasses.replace(measure(frames_of(path), kind), source=name, version=version)
    except MediaError as error:
        return Seen(source=name, kind=kind, version=version, error=str(error))


def version_of(path: Path) -> str:
    """What changes when a file, or one in a folder, is replaced."""
    parts = [path.stat()] if path.is_file() else [file.stat() for file in list_media(path, IMAGE_SUFFIXES)]
    return f"{len(parts)}-{sum(part.st_size for part in parts)}-{max(part.st_mtime_ns for part in parts)}"


def frames_of(path: Path) -> Iterator[np.ndarray]:
    """Frames H W 3, uint8, one after the other.

    Raises:
        MediaError: the file cannot be decoded to its end.
    """
    if path.suffix.lower() not in CLIP_SUFFIXES or path.is_dir():
        pictures = list_media(path, IMAGE_SUFFIXES) if path.is_dir() else [path]
        yield from (decode(picture)[0] for picture in pictures)
        return
    try:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                yield frame.to_ndarray(format="rgb24")
    except DAMAGES as error:
        raise MediaError(f"{path.name} cannot be decoded ({error}). Replace it or leave it out.") from error


def measure(frames: Iterator[np.ndarray], kind: Kind) -> Seen:
    """All numbers of a source but its name.

    Raises:
        MediaError: there is no frame, or frames are of several sizes.
    """
    thumbnails, changes, close = [], [], []
    dark_rows = dark_columns = None
    before, size = None, None
    for number, frame in enumerate(frames):
        if size not in (None, frame.shape[:2]):
            raise MediaError(f"Frame {number} is {frame.shape[1]} x {frame.shape[0]}, the ones before {size[1]} x "
                             f"{size[0]}; a clip has frames of one size.")
        size = frame.shape[:2]
        thumbnails.append(thumbnail(frame))
        # Every fourth pixel is enough for a mean, and unlike an average of pixels it sees fine motion.
        green = frame[::4, ::4, 1].astype(np.int16)
        if before is not None:
            changes.append(float(np.abs(green - before).mean()))
        before = green
        if number % CLOSE_LOOKS == 0:
            luma = frame @ np.array([0.299, 0.587, 0.114], np.float32)
            rows, columns = is_bar(luma), is_bar(luma.T)
            # A bar is one in every frame; a fade from black is not.
            dark_rows = rows if dark_rows is None else dark_rows & rows
            dark_columns = columns if dark_columns is None else dark_columns & columns
            close.append((blockiness(luma), noise(luma)))
    if size is None:
        raise MediaError("There is no frame in it. Replace it or leave it out.")
    cuts = scene_cuts(small.round().astype(np.uint8) for small in thumbnails) if kind == "clip" else []
    within = [change for number, change in enumerate(changes, 1) if number not in cuts]
    blocks, grain = np.median(close, axis=0)
    return Seen(
        source="", kind=kind, version="", width=size[1], height=size[0], frames=len(thumbnails),
        motion=round(float(np.mean(within)), 3) if within else 0.0, cuts=len(cuts),
        letterbox=round(max(share_of_bars(dark_rows), share_of_bars(dark_columns)), 4),
        hash=f"{difference_hash(thumbnails[len(thumbnails) // 2]):016x}",
        blockiness=round(float(blocks), 4), noise=round(float(grain), 4),
    )  # fmt: skip


def is_bar(luma: np.ndarray) -> np.ndarray:
    """Which rows of a frame H W are dark and of one tone."""
    return (luma.mean(axis=1) < BAR_LEVEL) & (luma.std(axis=1) < BAR_SPREAD)


def share_of_bars(dark: np.ndarray) -> float:
    """Share of the lines in two bars along opposite edges; a dark edge on one side alone is part of the picture."""
    first, last = (len(dark) if side.all() else int(np.argmin(side)) for side in (dark, dark[::-1]))
    return min(1.0, 2 * min(first, last) / len(dark))


def blockiness(luma: np.ndarray) -> float:
    """How much larger steps between neighbours are on the strongest grid of 8 x 8 blocks than on others: H W to 1 and
    above."""
    ratios = []
    for picture in (luma, luma.T):
        steps = np.abs(np.diff(picture, axis=1)).mean(axis=0)
        # Medians, or one long edge in the picture would look like a grid.
        phases = [np.median(steps[phase::BLOCK]) for phase in range(BLOCK) if len(steps[phase::BLOCK])]
        usual = float(np.median(phases))
        ratios.append(max(phases) / usual if usual > 0 else 1.0)
    return float(np.mean(ratios))


def noise(luma: np.ndarray) -> float:
    """Deviation of the noise in a frame H W, from its smoothest squares, where least of it is texture.

    Source: Immerkaer, Fast Noise Variance Estimation, 1996, within squares.
    """
    # Second differences along both axes take away everything that is smooth.
    rough = np.abs(np.diff(np.diff(luma, 2, axis=0), 2, axis=1))
    rows, columns = (max(1, side // SQUARE) for side in rough.shape)
    h, w = (min(SQUARE, side) for side in rough.shape)
    if not h or not w:
        return 0.0
    squares = rough[: rows * h, : columns * w].reshape(rows, h, columns, w).mean(axis=(1, 3))
    return float(np.quantile(squares, SMOOTHEST)) * np.sqrt(np.pi / 2) / 6


def difference_hash(picture: np.ndarray) -> int:
    """64 bits, each saying where a coarse thumbnail gets brighter to the right; of H W 3."""
    grey = Image.fromarray(picture.mean(axis=2).astype(np.float32))
    small = np.asarray(grey.resize((HASH_W, HASH_H), Image.Resampling.BOX))
    bits = (np.diff(small, axis=1) > 0).ravel()
    return int("".join("1" if bit else "0" for bit in bits), 2)


# Limits.


def judge(rows: Sequence[Seen], limits: Limits) -> list[list[str]]:
    """Which limits each source breaks, by their names; [] for one that is good enough."""
    fails: list[list[str]] = [broken(seen, limits) for seen in rows]
    for kind in ("image", "clip"):
        members = [i for i, seen in enumerate(rows) if seen.kind == kind and seen.error is None]
        for column, name, share in (
            ("blockiness", "block_quantile", limits.block_quantile),
            ("noise", "noise_quantile", limits.noise_quantile),
        ):
            if share is None or not members:
                continue
            values = [getattr(rows[i], column) for i in members]
            most = np.quantile(values, share, method="higher")
            for i, value in zip(members, values, strict=True):
                fails[i] += [name] if value > most else []
        if limits.duplicate_bits is not None:
            good = [i for i in members if not fails[i]]
            for i in duplicates({i: rows[i] for i in good}, limits.duplicate_bits):
                fails[i].append("duplicate_bits")
    return fails


def broken(seen: Seen, limits: Limits) -> list[str]:
    """The limits that one source breaks by itself."""
    if seen.error is not None:
        return [UNREADABLE]
    found = {"letterbox": _above(seen.letterbox, limits.letterbox)}
    if seen.kind == "image":
        found["image_pixels"] = _below(seen.width * seen.height, limits.image_pixels)
    else:
        found["clip_side"] = _below(min(seen.width, seen.height), limits.clip_side)
        found["least_motion"] = _below(seen.motion, limits.least_motion)
        found["most_motion"] = _above(seen.motion, limits.most_motion)
        found["cuts"] = _above(seen.cuts, limits.cuts)
    return [name for name, fails in found.items() if fails]


def _below(value: float, least: float | None) -> bool:
    return least is not None and value < least


def _above(value: float, most: float | None) -> bool:
    return most is not None and value > most


def duplicates(rows: Mapping[int, Seen], bits: int) -> list[int]:
    """Those of the rows that show nearly what a larger one does, or as large a one of an earlier name."""
    order = sorted(rows, key=lambda i: (-rows[i].width * rows[i].height * rows[i].frames, rows[i].source))
    # Hashes that differ in n bits agree on one of n + 1 parts, so only those are compared.
    edges = [HASH_BITS * part // (bits + 1) for part in range(bits + 2)]
    kept: dict[tuple[int, int], list[int]] = defaultdict(list)
    found = []
    for i in order:
        value = int(rows[i].hash, 16)
        parts = [(low, value >> low & ((1 << (high - low)) - 1)) for low, high in pairwise(edges)]
        if any((value ^ other).bit_count() <= bits for part in parts for other in kept[part]):
            found.append(i)
            continue
        for part in parts:
            kept[part].append(value)
    return found


# The table.


def load_table(file: Path) -> dict[str, Seen]:
    """Rows of an earlier run by source; {} where there was none.

    Raises:
        MediaError: the file is something else.
    """
    if not file.exists():
        return {}
    try:
        rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        seen = [Seen(**{name: row[name] for name in COLUMNS}) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MediaError(f"{file} is no table of training.data filter ({error!r}); remove it, or choose another --out."
                         ) from error
    return {row.source: row for row in seen}


def save_table(file: Path, rows: Sequence[Seen], fails: Sequence[Sequence[str]]) -> None:
    """Write the table whole or not at all.

    Raises:
        MediaError: it cannot be written.
    """
    table = zip(rows, fails, strict=True)
    lines = [json.dumps({**dataclasses.asdict(seen), "fails": list(why)}) for seen, why in table]
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text("".join(f"{line}\n" for line in lines), "utf-8")
        part.replace(file)
    except OSError as error:
        raise MediaError(f"{file} cannot be written ({error.strerror}); choose another place with --out.") from error
    finally:
        part.unlink(missing_ok=True)


def scan(root: Path, known: Mapping[str, Seen]) -> list[Seen]:
    """A row for every source of a data folder, from `known` where the file is still the same.

    Raises:
        MediaError: there are none.
    """
    images, clips = list_sources(root)
    sources: list[tuple[Path, Any]] = [*((path, "image") for path in images), *((path, "clip") for path in clips)]
    if not sources:
        raise MediaError(f"{root} holds no training media. Expected photographs and clips in it, or in its folder "
                         "train.")
    rows = []
    for path, kind in tqdm(sources, desc="filter"):
        old = known.get(source_name(path, root))
        same = old is not None and (old.version, old.kind) == (version_of(path), kind)
        rows.append(old if same else look(path, kind, root))
    return rows


def report(rows: Sequence[Seen], fails: Sequence[Sequence[str]]) -> str:
    """How many pass, and how often each limit is broken."""
    lines = []
    for kind in ("image", "clip"):
        those = [why for seen, why in zip(rows, fails, strict=True) if seen.kind == kind]
        lines.append(f"{sum(not why for why in those)} of {len(those)} {kind}s pass")
        counts = Counter(name for why in those for name in why)
        lines += [f"  {count:6d} fail {name}" for name, count in counts.most_common()]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(
        prog="python -m training.data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(["limits:", *describe(Limits())]).replace("%", "%%"),
    )
    parser.add_argument("command", choices=("filter",))
    parser.add_argument("--data", type=Path, required=True, help="folder of pictures and clips")
    parser.add_argument("--out", type=Path, help=f"the table; default: DATA/{FILTER_FILE}, where training looks for it")
    parser.add_argument("limits", nargs="*", metavar="LIMIT=VALUE", help="e.g. clip_side=540 duplicate_bits=none")
    options = parser.parse_intermixed_args(argv)
    out = options.out or options.data / FILTER_FILE
    try:
        limits = override(Limits(), options.limits)
        check(limits)
        if not options.data.is_dir():
            raise SettingError(f"{options.data} is not a folder; expected one with pictures and clips.")
        rows = scan(options.data, load_table(out))
        fails = judge(rows, limits)
        save_table(out, rows, fails)
    except SeedVR2Error as error:
        print(f"filter: {error}", file=sys.stderr)
        return 1
    print(report(rows, fails))
    print(f"The table is {out}." if out == options.data / FILTER_FILE else
          f"The table is {out}; put it at {options.data / FILTER_FILE} to train on what passes.")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
