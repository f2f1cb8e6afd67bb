"""Pictures and clips on disk -> batches of clean crops, and pairs of (clean, degraded) crops.

Sources are decoded once and kept as uint8, in memory or as memory-mapped files that worker processes share. Which crop
lands in which batch is a pure function of (seed, step, slot), so nothing about the data needs saving for a resume.

    python -m training.data --root DATA --cache-dir CACHE --out pairs.npy --count 6000 --size 128
"""
# b batch   T H W pixel frames, height, width   c channels   s side of a square crop

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import av
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from seedvr2_core.errors import MediaError, SettingError
from seedvr2_core.video.geometry import to_uint8
from training.degradation import MIXTURES, Mixture, degrade, draw_profile, upsample
from training.procedural import moving_view, still
from training.randomness import key, rng

log = logging.getLogger(__name__)

Kind = Literal["image", "clip"]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
CLIP_SUFFIXES = (".mp4", ".mkv", ".mov", ".webm")
# Under a non-commercial licence, while weights trained here are published under Apache-2.0.
EXCLUDED_STEMS = ("speaker_portrait_540x960",)
# Windows tried for a crop; the one with most detail is kept, because much of a photograph is sky or out of focus.
LOOKS = 2


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a crop is drawn from."""

    seed: int = 0
    # Share of crops from photographs and clips; the rest is procedural.
    real: float = 0.8
    # Share of the real clips that are a camera move over a photograph, because clips on disk are few.
    moving_photo: float = 0.25
    # A crop is taken up to this many times larger and reduced: sharper than its source, and objects in more sizes.
    max_reduction: float = 2.0
    # Procedural pictures drawn before training, and their side in pixels.
    stills: int = 48
    still_size: int = 512
    # File names, without suffix, to leave out.
    excluded: tuple[str, ...] = EXCLUDED_STEMS

    def __post_init__(self) -> None:
        if not (0 <= self.real <= 1 and 0 <= self.moving_photo <= 1):
            raise SettingError(f"real and moving_photo are shares in 0..1, got {self.real} and {self.moving_photo}.")
        if self.max_reduction < 1:
            raise SettingError(f"max_reduction is {self.max_reduction}; a crop can only be reduced, use 1 or more.")


def decode(path: Path) -> np.ndarray:
    """Read a picture or a clip as uint8 T H W 3; a picture has T = 1.

    Raises:
        MediaError: the file has no pictures in it, or cannot be decoded.
    """
    try:
        if path.suffix.lower() in IMAGE_SUFFIXES:
            with Image.open(path) as picture:
                return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))[None]
        with av.open(str(path)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    except (OSError, IndexError, av.FFmpegError) as error:
        raise MediaError(f"{path.name} cannot be decoded ({error}). Replace it or leave it out.") from error
    if not frames:
        raise MediaError(f"{path.name} holds no video frame. Replace it or leave it out.")
    return np.stack(frames)


def list_media(folder: Path, suffixes: Sequence[str], excluded: Sequence[str] = ()) -> list[Path]:
    """Files in folder with one of the suffixes, by name, without the excluded stems; [] where there is no folder."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in suffixes and p.stem not in excluded)


def _load(paths: Iterable[Path], cache_dir: Path | None) -> list[np.ndarray]:
    if cache_dir is None:
        return [decode(path) for path in paths]
    return [_cached(cache_dir / f"{path.parent.name}-{path.name}.npy", lambda p=path: decode(p)) for path in paths]


def _cached(file: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f"{file.name}.{os.getpid()}.part")
        with part.open("wb") as stream:
            np.save(stream, make())
        part.replace(file)
    return np.load(file, mmap_mode="r")


class Dataset:
    """All sources of one run, ready to crop. Every array is uint8 T H W 3.

    Args:
        images: photographs, T = 1.
        clips: real clips.
        stills: procedural pictures, T = 1.
        config: how crops are drawn.
    """

    def __init__(
        self,
        images: Sequence[np.ndarray],
        clips: Sequence[np.ndarray],
        stills: Sequence[np.ndarray],
        config: DataConfig,
    ) -> None:
        self.images, self.clips, self.stills, self.config = images, clips, stills, config

    @classmethod
    def load(cls, root: Path | None, config: DataConfig | None = None, cache_dir: Path | None = None) -> Dataset:
        """Decode `root/train/images` and `root/train/clips` and draw the procedural pictures.

        Args:
            root: the data folder; None for procedural pictures alone.
            config: how crops are drawn.
            cache_dir: where decoded sources are kept as .npy files and memory-mapped, so that later runs start at once
                and processes share one copy; None decodes into memory.

        Raises:
            MediaError: root holds no training media, or one that cannot be decoded.
        """
        config = config or DataConfig()
        images: list[np.ndarray] = []
        clips: list[np.ndarray] = []
        if root is not None:
            train = Path(root) / "train"
            images = _load(list_media(train / "images", IMAGE_SUFFIXES, config.excluded), cache_dir)
            clips = _load(list_media(train / "clips", CLIP_SUFFIXES, config.excluded), cache_dir)
            if not images and not clips:
                raise MediaError(f"{train} holds no training media. Expected the folders images and clips in it.")

        def draw() -> np.ndarray:
            size = config.still_size
            pictures = [still(config.seed, i, size) for i in range(config.stills)]
            return np.stack(pictures)[:, None] if pictures else np.empty((0, 1, size, size, 3), np.uint8)

        name = f"procedural-{config.seed}-{config.stills}x{config.still_size}.npy"
        return cls(images, clips, list(draw() if cache_dir is None else _cached(cache_dir / name, draw)), config)

    def sample_batch(
        self, step: int, *, kind: Kind = "image", batch: int, size: int, frames: int = 1
    ) -> torch.Tensor:
        """Clean crops for one step: float32 b 3 T s s in -1..1, the same for the same (seed, kind, step).

        Args:
            step: optimiser step.
            kind: "image" draws from photographs, "clip" from clips and camera moves over photographs.
            batch: crops.
            size: side of a crop, in pixels.
            frames: length of a clip, 4n+1; an image has one frame.

        Raises:
            SettingError: no source is large or long enough.
        """
        crops = [self.crop(step, slot, kind=kind, size=size, frames=frames) for slot in range(batch)]
        return torch.stack(crops).float().div_(127.5).sub_(1)

    def crop(self, step: int, slot: int = 0, *, kind: Kind = "image", size: int, frames: int = 1) -> torch.Tensor:
        """One clean crop: uint8 3 T s s. Arguments and failures as in `sample_batch`, slot being the place in it."""
        if kind == "image" and frames != 1:
            raise SettingError(f"An image crop has 1 frame, got frames={frames}; ask for kind='clip'.")
        draw = rng(self.config.seed, f"crop/{kind}", step, slot)
        real = draw.random() < self.config.real
        if kind == "image":
            pictures = self.images if (real and self.images) or not self.stills else self.stills
            crop = self._cut(pictures, draw, 1, size)
        else:
            from_clip = real and self.clips and draw.random() >= self.config.moving_photo
            if from_clip:
                crop = self._cut(self.clips, draw, frames, size)
            else:
                pictures = self.images if (real and self.images) or not self.stills else self.stills
                crop = moving_view(_pick(pictures, draw, 1, int(1.5 * size))[0], draw, frames, size)
        if draw.random() < 0.5:
            crop = crop[:, :, ::-1]
        return torch.from_numpy(np.ascontiguousarray(crop.transpose(3, 0, 1, 2)))

    def pair(self, index: int, mixture: Mixture, *, kind: Kind = "image", size: int, frames: int = 1) -> torch.Tensor:
        """One training pair: uint8 2 3 T s s, first the clean crop, then its degraded self at the size of the crop.

        The same for the same (seed, index, mixture and sizes); failures as in `sample_batch`.
        """
        clean = self.crop(index, kind=kind, size=size, frames=frames)
        frames_01 = clean.transpose(0, 1).float() / 255
        seed = key(self.config.seed, "pair", index)
        degraded, _ = degrade(frames_01, seed, draw_profile(mixture, seed))
        return torch.stack((clean, to_uint8(upsample(degraded, size, size)).transpose(0, 1)))

    def _cut(self, sources: Sequence[np.ndarray], draw: np.random.Generator, frames: int, size: int) -> np.ndarray:
        """A random stretch and square of a random source, reduced to size."""
        source = _pick(sources, draw, frames, size)
        T, H, W, _ = source.shape
        side = int(size * draw.uniform(1, min(self.config.max_reduction, min(H, W) / size)))
        start = int(draw.integers(0, T - frames + 1))
        corners = draw.integers(0, (H - side + 1, W - side + 1), (LOOKS, 2))
        views = [source[start : start + frames, top : top + side, left : left + side] for top, left in corners]
        window = np.ascontiguousarray(max(views, key=_detail))
        if side == size:
            return window
        pixels = torch.from_numpy(window).permute(0, 3, 1, 2)
        reduced = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True, align_corners=False)
        return reduced.permute(0, 2, 3, 1).numpy()


def _detail(view: np.ndarray) -> float:
    green = view[0, ::2, :, 1].astype(np.int16)
    return float(np.abs(np.diff(green)).mean())


def _pick(sources: Sequence[np.ndarray], draw: np.random.Generator, frames: int, side: int) -> np.ndarray:
    fit = [source for source in sources if source.shape[0] >= frames and min(source.shape[1:3]) >= side]
    if not fit:
        raise SettingError(
            f"None of {len(sources)} sources has {frames} frames of {side} x {side} pixels; "
            "choose a smaller crop, a shorter clip or larger data."
        )
    return fit[draw.integers(len(fit))]


@dataclass(frozen=True, kw_only=True)
class PairJob:
    """A file of precomputed pairs."""

    root: Path | None
    # Decoded sources, shared by the workers.
    cache_dir: Path
    count: int
    kind: Kind = "image"
    # Side in pixels and length in frames.
    size: int = 128
    frames: int = 1
    # A key of MIXTURES.
    degradation: str = "nano_mixed"
    data: DataConfig = field(default_factory=DataConfig)


def write_pairs(out: Path, job: PairJob, workers: int = 2) -> Path:
    """Make pairs in worker processes and store them as one .npy: uint8 N 2 3 T s s; see `Dataset.pair`.

    A file that exists already is left as it is. The bytes do not depend on the number of workers.

    Args:
        out: a path ending in .npy. Read it with np.load(out, mmap_mode="r").
        job: what to make.
        workers: processes, one thread each.

    Raises:
        SettingError: no source is large or long enough, or the degradation is unknown.
        MediaError: the root holds no training media.
    """
    if job.degradation not in MIXTURES:
        raise SettingError(f"There is no degradation {job.degradation!r}; choose one of {', '.join(MIXTURES)}.")
    if out.exists():
        log.info("%s exists and is used as it is", out.name)
        return out
    Dataset.load(job.root, job.data, job.cache_dir)  # fills the cache once, before the workers look for it
    part = out.with_name(f"{out.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    shape = (job.count, 2, 3, job.frames, job.size, job.size)
    np.lib.format.open_memmap(part, mode="w+", dtype=np.uint8, shape=shape).flush()
    # Spawned, not forked: torch's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        shares = [pool.submit(_write_share, part, job, worker, workers) for worker in range(workers)]
        for share in shares:
            share.result()
    part.replace(out)
    return out


def _write_share(part: Path, job: PairJob, worker: int, workers: int) -> None:
    torch.set_num_threads(1)
    dataset = Dataset.load(job.root, job.data, job.cache_dir)
    pairs = np.lib.format.open_memmap(part, mode="r+")
    mixture = MIXTURES[job.degradation]
    for index in range(worker, job.count, workers):
        pairs[index] = dataset.pair(index, mixture, kind=job.kind, size=job.size, frames=job.frames).numpy()
    pairs.flush()


def main() -> None:
    """Precompute a file of pairs; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m training.data", description=main.__doc__)
    parser.add_argument("--root", type=Path, help="data folder; leave out for procedural pictures alone")
    parser.add_argument("--cache-dir", type=Path, required=True, help="folder for decoded sources")
    parser.add_argument("--out", type=Path, required=True, help="the .npy file to write")
    parser.add_argument("--count", type=int, required=True, help="pairs")
    parser.add_argument("--kind", choices=("image", "clip"), default="image")
    parser.add_argument("--size", type=int, default=128, help="side of a crop in pixels")
    parser.add_argument("--frames", type=int, default=1, help="frames of a clip, 4n+1")
    parser.add_argument("--degradation", choices=MIXTURES, default="nano_mixed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    job = PairJob(
        root=options.root, cache_dir=options.cache_dir, count=options.count, kind=options.kind, size=options.size,
        frames=options.frames, degradation=options.degradation, data=DataConfig(seed=options.seed),
    )  # fmt: skip
    write_pairs(options.out, job, options.workers)


if __name__ == "__main__":
    main()
