"""Pictures and clips on disk -> batches of clean crops, and samples of a clean crop with degraded versions of it.

A source is decoded once and kept as uint8, in memory or as a memory-mapped file that worker processes share, or decoded
anew for every crop where neither has room. Clips are split where they cut to another shot. Which crop lands in which
batch is a pure function of (seed, step, slot), so nothing about the data needs saving for a resume.

`python -m training.data filter --data DIR` looks at everything in a folder and writes DIR/filter.jsonl, which says what
is good enough to train on; where it lies, the rest is left out. See `training.filter`.
"""
# b batch   T H W pixel frames, height, width   c channels   s side of a square crop

from __future__ import annotations

import hashlib
import json
import logging
import operator
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from seedvr2_core.errors import MediaError, SettingError
from seedvr2_core.video.geometry import to_uint8
from seedvr2_core.video.shots import scene_cuts, split_shots

from .config import setting
from .degradation import CODEC_LEAD, Mixture, degrade, draw_profile, upsample
from .procedural import moving_view, still
from .randomness import key, rng

log = logging.getLogger(__name__)

Kind = Literal["image", "clip"]
# Pixels: the side of a square, or height and width.
Size = int | tuple[int, int]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
CLIP_SUFFIXES = (".mp4", ".mkv", ".mov", ".webm")
# A folder whose pictures are all named like this is a clip, as is any folder of pictures in a folder called clips.
FRAME_NAME = re.compile(r"(frame|im)?[_-]?\d+", re.IGNORECASE)
CLIP_FOLDERS = ("clips", "videos")
# Parts of a data folder that are not for training.
NOT_FOR_TRAINING = ("eval", "lq")
# Under a non-commercial licence, while weights trained here are published under Apache-2.0.
EXCLUDED_STEMS = ("speaker_portrait_540x960",)
# Between the name of a file and the number of a shot in it.
SHOT = "#"
# Sources kept for validation at most; a validation looks at few samples.
MOST_HELD_OUT = 16
# Windows tried for a crop; the one with most detail is kept, because much of a photograph is sky or out of focus.
LOOKS = 2
# What `training.filter` writes into a data folder.
FILTER_FILE = "filter.jsonl"
# What decoders raise on damaged files; Pillow's are not all of one kind.
DAMAGES = (OSError, IndexError, SyntaxError, ValueError, Image.DecompressionBombError, av.FFmpegError)
# Share of sources that may be unreadable, one in any case: more is no accident, and training on the rest would hide it.
UNREADABLE_SHARE = 0.001


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a crop is drawn from."""

    seed: int = setting(0, "of every draw")
    real: float = setting(0.8, "share of crops from photographs and clips; the rest is procedural", least=0, most=1)
    # Because clips on disk are few.
    moving_photo: float = setting(0.25, "share of real clips that are a camera move over a photograph", least=0, most=1)
    # Sharper than its source, and objects in more sizes.
    max_reduction: float = setting(2.0, "times by which a crop may be taken larger, and reduced", least=1)
    stills: int = setting(48, "procedural pictures, drawn before training", least=0)
    still_size: int = setting(512, "their side in pixels", least=16)
    held_out: float = setting(0.1, "share of the files of each kind that are for validation alone", least=0, most=1)
    # In memory or in the cache folder.
    keep_clips: bool = setting(True, "keep clips decoded; false: decode for every crop, which is slow and small")
    excluded: tuple[str, ...] = setting(EXCLUDED_STEMS, "file names, without suffix, to leave out")


def decode(path: Path) -> np.ndarray:
    """Read a picture, a clip or a folder of numbered pictures as uint8 T H W 3; a picture has T = 1.

    Raises:
        MediaError: the file has no pictures in it, or cannot be decoded.
    """
    if path.is_dir():
        return _decode_folder(path)
    try:
        if path.suffix.lower() in IMAGE_SUFFIXES:
            with Image.open(path) as picture:
                return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))[None]
        with av.open(str(path)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    except DAMAGES as error:
        raise MediaError(f"{path.name} cannot be decoded ({error}). Replace it or leave it out.") from error
    if not frames:
        raise MediaError(f"{path.name} holds no video frame. Replace it or leave it out.")
    return np.stack(frames)


def _decode_folder(folder: Path) -> np.ndarray:
    pictures = [decode(path)[0] for path in list_media(folder, IMAGE_SUFFIXES)]
    sizes = {picture.shape[:2] for picture in pictures}
    if len(sizes) != 1:
        raise MediaError(f"{folder.name} holds {len(pictures)} pictures of {len(sizes)} sizes; a clip has frames of "
                         "one size.")
    return np.stack(pictures)


def list_media(folder: Path, suffixes: Sequence[str], excluded: Sequence[str] = ()) -> list[Path]:
    """Files in folder with one of the suffixes, by name, without the excluded stems; [] where there is no folder."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in suffixes and p.stem not in excluded)


def list_clips(folder: Path) -> list[Path]:
    """Videos, pictures and folders of pictures in a folder, by name."""
    files = list_media(folder, (*IMAGE_SUFFIXES, *CLIP_SUFFIXES))
    return sorted([*files, *(inner for inner in folder.iterdir() if list_media(inner, IMAGE_SUFFIXES))])


def list_sources(root: Path, excluded: Sequence[str] = ()) -> tuple[list[Path], list[Path]]:
    """Photographs and clips to train on, each by path: everything under `root/train`, or under root without such.

    Folders called eval or lq, and hidden ones, are passed over.
    """
    top = root / "train" if (root / "train").is_dir() else root
    images: list[Path] = []
    clips: list[Path] = []
    for folder in [top, *sorted(path for path in top.rglob("*") if path.is_dir())]:
        parts = folder.relative_to(top).parts
        if any(part.lower() in NOT_FOR_TRAINING or part.startswith(".") for part in parts):
            continue
        pictures = list_media(folder, IMAGE_SUFFIXES, excluded)
        if _is_clip(folder, pictures):
            clips.append(folder)
        else:
            images += pictures
        clips += list_media(folder, CLIP_SUFFIXES, excluded)
    return images, clips


def left_out(root: Path) -> set[str] | None:
    """The sources, by their paths under root, that its filter refuses; None where there is no filter.

    Raises:
        MediaError: the filter's table cannot be read.
    """
    table = Path(root) / FILTER_FILE
    if not table.exists():
        return None
    try:
        rows = [json.loads(line) for line in table.read_text("utf-8").splitlines()]
        return {row["source"] for row in rows if row["fails"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MediaError(f"{table} is no table of training.data filter ({error!r}); remove it or make it again."
                         ) from error


def source_name(path: Path, root: Path | None) -> str:
    """What a source is called everywhere: its path under the data folder."""
    return path.name if root is None else path.relative_to(root).as_posix()


def _is_clip(folder: Path, pictures: Sequence[Path]) -> bool:
    if len(pictures) < 2:
        return False
    return folder.parent.name.lower() in CLIP_FOLDERS or all(FRAME_NAME.fullmatch(path.stem) for path in pictures)


class LazyClip:
    """A clip that is decoded whenever a part of it is asked for; otherwise like an array T H W 3."""

    def __init__(self, path: Path, start: int, shape: tuple[int, int, int, int]):
        self.path, self.start, self.shape = path, start, shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        frames, *window = index
        start, stop, _ = frames.indices(len(self))
        return decode(self.path)[(slice(self.start + start, self.start + stop), *window)]


Source = np.ndarray | LazyClip


class Loader:
    """Reads sources, keeps what it has decoded, and counts what it could not read."""

    def __init__(self, cache_dir: Path | None, keep_clips: bool = True, root: Path | None = None):
        """`root` is the data folder, under which sources have their names."""
        self.cache_dir, self.keep_clips, self.root = cache_dir, keep_clips, root
        self.unreadable: dict[Path, str] = {}  # and why

    def images(self, paths: Sequence[Path]) -> dict[str, Source]:
        """Name -> picture; one that cannot be read is left out."""
        return {self._name(path): frames for path in paths if (frames := self._read(path)) is not None}

    def clips(self, paths: Sequence[Path]) -> dict[str, Source]:
        """Name -> shot, of every shot of every clip; one that cannot be read is left out."""
        shots: dict[str, Source] = {}
        for path in paths:
            frames = self._read(path)
            if frames is None:
                continue
            cuts = self._cuts(path, frames)
            if cuts:
                log.info("%s cuts to another shot at frame %s.", path.name, ", ".join(map(str, cuts)))
            starts = [0, *cuts]
            for number, (start, shot) in enumerate(zip(starts, split_shots(frames, cuts), strict=True)):
                kept = shot if self.keep_clips else LazyClip(path, start, shot.shape)
                shots[f"{self._name(path)}{SHOT}{number}" if cuts else self._name(path)] = kept
        return shots

    def check(self, total: int) -> None:
        """Refuse where so many of the `total` files were unreadable that it is no accident.

        Raises:
            MediaError: naming the first of them.
        """
        if len(self.unreadable) > max(1, UNREADABLE_SHARE * total):
            first = next(iter(self.unreadable.values()))
            raise MediaError(f"{len(self.unreadable)} of {total} files cannot be read, the first because: {first}")

    def _read(self, path: Path) -> np.ndarray | None:
        try:
            if self.cache_dir is None or (not self.keep_clips and path.suffix.lower() not in IMAGE_SUFFIXES):
                return decode(path)
            return _cached(self._cache(path, ".npy"), lambda: decode(path))
        except MediaError as error:
            log.warning("Left out: %s", error)
            self.unreadable[path] = str(error)
            return None

    def _name(self, path: Path) -> str:
        return source_name(path, self.root)

    def _cuts(self, path: Path, frames: np.ndarray) -> list[int]:
        if self.cache_dir is None:
            return scene_cuts(frames)
        file = self._cache(path, ".cuts.json")
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_name(f"{file.name}.{os.getpid()}.part")
            part.write_text(json.dumps(scene_cuts(frames)))
            part.replace(file)
        return json.loads(file.read_text())

    def _cache(self, path: Path, suffix: str) -> Path:
        # Another file of this name, or a newer version of this one, is another entry.
        about = path.stat()
        version = hashlib.sha256(f"{path.resolve()}/{about.st_size}/{about.st_mtime_ns}".encode()).hexdigest()[:12]
        return self.cache_dir / f"{path.parent.name}-{path.name}-{version}{suffix}"


def _cached(file: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f"{file.name}.{os.getpid()}.part")
        with part.open("wb") as stream:
            np.save(stream, make())
        part.replace(file)
    return np.load(file, mmap_mode="r")


@dataclass(frozen=True)
class Sample:
    """A clean crop and degraded versions of it at its size, with how they came about."""

    clean: torch.Tensor  # uint8 3 T H W
    degraded: list[torch.Tensor]  # uint8 3 T H W
    about: dict[str, Any]  # ready for JSON


# Which sources a crop may come from.
Part = Literal["all", "training", "held out"]


@dataclass(frozen=True)
class Pool:
    """Sources of one kind, and which of them are kept for validation: whole files, whatever shots they have."""

    names: list[str]
    sources: list[Source]
    held_out: frozenset[int]
    # By length, size and part, which have it: looking at all of them for every crop would take long.
    _fitting: dict[tuple[int, tuple[int, int], Part], list[int]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, given: Sequence[Source] | dict[str, Source], kind: str, config: DataConfig) -> Pool:
        """`given` by name, or in order; `config` says how many are kept, and its seed which."""
        named = given if isinstance(given, dict) else {f"{kind}{n}": source for n, source in enumerate(given)}
        files = [name.partition(SHOT)[0] for name in named]
        ranked = sorted(set(files), key=lambda file: key(config.seed, f"held out/{file}"))
        kept = ranked[: min(MOST_HELD_OUT, int(config.held_out * len(ranked)))]
        return cls(list(named), list(named.values()), frozenset(i for i, file in enumerate(files) if file in kept))

    def __len__(self) -> int:
        return len(self.sources)

    def fitting(self, frames: int, size: tuple[int, int], part: Part = "all") -> list[int]:
        """The numbers of the sources that hold so many frames of this size, of a part if anything is held out."""
        asked = frames, size, part
        if asked not in self._fitting:
            found = [i for i, source in enumerate(self.sources) if all(map(operator.ge, source.shape, (frames, *size)))]
            if part != "all" and self.held_out:
                found = [i for i in found if (i in self.held_out) == (part == "held out")]
            self._fitting[asked] = found
        return self._fitting[asked]

    def pick(self, draw: np.random.Generator, frames: int, size: tuple[int, int], part: Part) -> int:
        """The number of a random source that holds so many frames of this size: of the part asked for, where that has
        one.

        Raises:
            SettingError: no source does.
        """
        fit = self.fitting(frames, size, part) or self.fitting(frames, size)
        if not fit:
            raise SettingError(
                f"None of {len(self)} sources has {frames} frames of {size[1]} x {size[0]} pixels; "
                "choose a smaller crop, a shorter clip or larger data."
            )
        return fit[draw.integers(len(fit))]


class Dataset:
    """All sources of one run, ready to crop. Every array is uint8 T H W 3.

    Args:
        images: photographs, T = 1, by name or in order.
        clips: real clips, one shot each.
        stills: procedural pictures, T = 1.
        config: how crops are drawn.
        unreadable: files that were left out, and why.
    """

    def __init__(
        self,
        images: Sequence[Source] | dict[str, Source],
        clips: Sequence[Source] | dict[str, Source],
        stills: Sequence[np.ndarray],
        config: DataConfig,
        unreadable: dict[Path, str] | None = None,
    ) -> None:
        self.images = Pool.of(images, "image", config)
        self.clips = Pool.of(clips, "clip", config)
        self.stills = Pool.of(stills, "procedural", config)
        self.config, self.unreadable = config, unreadable or {}

    @classmethod
    def load(cls, root: Path | None, config: DataConfig | None = None, cache_dir: Path | None = None) -> Dataset:
        """Decode the photographs and clips of a folder, see `list_sources`, and draw the procedural pictures.

        What the folder's filter refuses is left out, see `left_out`, and so is, with a warning, a file that cannot be
        read; more than a few such are refused.

        Args:
            root: the data folder; None for procedural pictures alone.
            config: how crops are drawn.
            cache_dir: where decoded sources are kept as .npy files and memory-mapped, so that later runs start at once
                and processes share one copy; None decodes into memory.

        Raises:
            MediaError: root holds no training media, or too many that cannot be decoded.
        """
        config = config or DataConfig()
        root = None if root is None else Path(root)
        loader = Loader(cache_dir, config.keep_clips, root)
        images: dict[str, Source] = {}
        clips: dict[str, Source] = {}
        if root is not None:
            pictures, films = list_sources(root, config.excluded)
            refused = left_out(root)
            if refused is not None:
                found = len(pictures) + len(films)
                pictures, films = ([p for p in paths if source_name(p, root) not in refused]
                                   for paths in (pictures, films))  # fmt: skip
                log.info("%s leaves %d of %d sources.", FILTER_FILE, len(pictures) + len(films), found)
                if found and not pictures and not films:
                    raise MediaError(f"{root / FILTER_FILE} leaves none of {found} photographs and clips. Run the "
                                     "filter again with other limits, such as clip_side=480, or remove the file.")
            images, clips = loader.images(pictures), loader.clips(films)
            loader.check(len(pictures) + len(films))
            if not images and not clips:
                raise MediaError(f"{root} holds no training media. Expected photographs and clips in it, or in its "
                                 "folder train.")

        def draw() -> np.ndarray:
            size = config.still_size
            pictures = [still(config.seed, i, size) for i in range(config.stills)]
            return np.stack(pictures)[:, None] if pictures else np.empty((0, 1, size, size, 3), np.uint8)

        name = f"procedural-{config.seed}-{config.stills}x{config.still_size}.npy"
        stills = draw() if cache_dir is None else _cached(cache_dir / name, draw)
        return cls(images, clips, list(stills), config, loader.unreadable)

    def split(self) -> str:
        """How many sources of every kind are kept for validation, in words."""
        pools = {"photographs": self.images, "clips": self.clips, "procedural pictures": self.stills}
        found = {name: pool for name, pool in pools.items() if len(pool)}
        shared = [name for name, pool in found.items() if not pool.held_out]
        kept = ", ".join(f"{len(pool.held_out)} of {len(pool)} {name}" for name, pool in found.items())
        return f"Kept for validation: {kept}." + (
            f" So few {' and '.join(shared)} are trained on and validated with alike." if shared else ""
        )

    def sample_batch(
        self, step: int, *, kind: Kind = "image", batch: int, size: Size, frames: int = 1
    ) -> torch.Tensor:
        """Clean crops for one step: float32 b 3 T H W in -1..1, the same for the same (seed, kind, step).

        Args:
            step: optimiser step.
            kind: "image" draws from photographs, or frames of clips where there are none, "clip" from clips and camera
                moves over photographs.
            batch: crops.
            size: of a crop, in pixels.
            frames: length of a clip, 4n+1; an image has one frame.

        Raises:
            SettingError: no source is large or long enough.
        """
        crops = [self.crop(step, slot, kind=kind, size=size, frames=frames) for slot in range(batch)]
        return torch.stack(crops).float().div_(127.5).sub_(1)

    def crop(self, step: int, slot: int = 0, *, kind: Kind = "image", size: Size, frames: int = 1) -> torch.Tensor:
        """One clean crop: uint8 3 T H W. Arguments and failures as in `sample_batch`, slot being the place in it."""
        return self._crop(step, slot, kind, size, frames, "all").pixels

    def pair(self, index: int, mixture: Mixture, *, kind: Kind = "image", size: Size, frames: int = 1) -> torch.Tensor:
        """One training pair: uint8 2 3 T H W, first the clean crop, then its degraded self at the size of the crop.

        The same for the same (seed, index, mixture and sizes); failures as in `sample_batch`.
        """
        sample = self.sample(index, mixture, kind=kind, size=size, frames=frames)
        return torch.stack((sample.clean, *sample.degraded))

    def sample(
        self, index: int, mixture: Mixture, *, kind: Kind = "image", size: Size, frames: int = 1, variants: int = 1,
        part: Part = "all",
    ) -> Sample:  # fmt: skip
        """A clean crop and `variants` degraded selves of it; otherwise as `pair`. `part` of the sources has it, unless
        nothing there is large or long enough, or nothing is held out.

        Frames that lie before the crop in its source are degraded with it and dropped, so that a codec does not always
        start where the crop does.
        """
        crop = self._crop(index, 0, kind, size, frames, part, lead=CODEC_LEAD)
        frames_01 = torch.cat((crop.before, crop.pixels), dim=1).transpose(0, 1).float() / 255
        lead = crop.before.shape[1]
        height, width = crop.pixels.shape[-2:]
        degraded, logs = [], []
        for variant in range(variants):
            seed = key(self.config.seed, "pair", index, variant)
            damaged, drawn = degrade(frames_01, seed, draw_profile(mixture, seed), lead)
            degraded.append(to_uint8(upsample(damaged, height, width)).transpose(0, 1))
            logs.append(drawn)
        return Sample(crop.pixels, degraded, {**crop.about, "seed": self.config.seed, "degradations": logs})

    def _crop(self, step: int, slot: int, kind: Kind, size: Size, frames: int, part: Part, lead: int = 0) -> _Crop:
        if kind == "image" and frames != 1:
            raise SettingError(f"An image crop has 1 frame, got frames={frames}; ask for kind='clip'.")
        size = (size, size) if isinstance(size, int) else size
        draw = rng(self.config.seed, f"crop/{kind}", step, slot)
        real = draw.random() < self.config.real
        moving = kind == "clip" and real and bool(self.clips) and draw.random() < self.config.moving_photo
        pool, moved = self._choose(kind, real, moving)
        about: dict[str, Any] = {"kind": kind, "index": step, "slot": slot, "moving_photo": False}
        before = 0
        if moved:
            chosen = pool.pick(draw, 1, _around(size), part)
            where = {"source": pool.names[chosen], "moving_photo": True}
            pixels = moving_view(pool.sources[chosen][0], draw, frames, size)
        else:
            pixels, before, where = self._cut(pool, draw, frames, size, part, lead if kind == "clip" else 0)
        if draw.random() < 0.5:
            pixels, where["flipped"] = pixels[:, :, ::-1], True
        tensor = torch.from_numpy(np.ascontiguousarray(pixels.transpose(3, 0, 1, 2)))
        return _Crop(tensor[:, before:], tensor[:, :before], {**about, **where})

    def _choose(self, kind: Kind, real: bool, moving: bool) -> tuple[Pool, bool]:
        """The sources of a crop, and whether it is a camera move over a picture of them.

        What there are none of is replaced: photographs by frames of clips, then by procedural pictures, which are
        replaced by real ones.
        """
        if kind == "image":
            taken = self.images or self.clips
            return (taken if (real and taken) or not self.stills else self.stills), False
        pictures = self.images if (real and self.images) or not self.stills else self.stills
        if self.clips and ((real and not moving) or not pictures):
            return self.clips, False
        return pictures, True

    def fits(self, kind: Kind, size: tuple[int, int], frames: int, part: Part = "all") -> bool:
        """Whether crops of this size can be had from all that they may be drawn from."""
        reals = [real for real, share in ((True, self.config.real), (False, 1 - self.config.real)) if share]
        moves = [m for m, share in ((True, self.config.moving_photo), (False, 1 - self.config.moving_photo)) if share]
        chosen = (self._choose(kind, real, moving) for real in reals for moving in moves)
        wanted = ((pool, 1, _around(size)) if moved else (pool, frames, size) for pool, moved in chosen)
        return all(pool.fitting(length, room, part) for pool, length, room in wanted)

    def _cut(
        self, pool: Pool, draw: np.random.Generator, frames: int, size: tuple[int, int], part: Part, lead: int = 0
    ) -> tuple[np.ndarray, int, dict[str, Any]]:
        """A random stretch and window of a random source, reduced to size; how many frames lie before the stretch, at
        most `lead`; and where it was cut."""
        chosen = pool.pick(draw, frames, size, part)
        source = pool.sources[chosen]
        T, H, W, _ = source.shape
        most = min(self.config.max_reduction, min(H / size[0], W / size[1]))
        reduction = draw.uniform(1, most)
        rows, columns = (int(side * reduction) for side in size)
        start = int(draw.integers(0, T - frames + 1))
        before = min(lead, start)
        corners = draw.integers(0, (H - rows + 1, W - columns + 1), (LOOKS, 2))
        stretch = source[start - before : start + frames, :, :]
        views = [stretch[:, top : top + rows, left : left + columns] for top, left in corners]
        best = max(range(LOOKS), key=lambda look: _detail(views[look][before:]))
        top, left = map(int, corners[best])
        where = {"source": pool.names[chosen], "start": start, "window": [top, left, rows, columns]}
        window = np.ascontiguousarray(views[best])
        if (rows, columns) == size:
            return window, before, where
        pixels = torch.from_numpy(window).permute(0, 3, 1, 2)
        reduced = F.interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False)
        return reduced.permute(0, 2, 3, 1).numpy(), before, where


@dataclass(frozen=True)
class _Crop:
    pixels: torch.Tensor  # uint8 3 T H W
    before: torch.Tensor  # uint8 3 n H W, the frames in front of it
    about: dict[str, Any]


def _around(size: tuple[int, int]) -> tuple[int, int]:
    """What a picture has to hold for a camera of this size to move over it."""
    return int(1.5 * size[0]), int(1.5 * size[1])


def _detail(view: np.ndarray) -> float:
    green = view[0, ::2, :, 1].astype(np.int16)
    return float(np.abs(np.diff(green)).mean())


if __name__ == "__main__":
    from training.filter import main  # it builds on this file

    sys.exit(main())
