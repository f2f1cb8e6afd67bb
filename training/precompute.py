"""Latents of (clean, degraded) pairs, computed once. `python -m training.precompute --config nano --out runs/latents`

Degrading and encoding take longer than the step that uses them; the paper trains four times as fast on latents. The
samples of a data set are dealt into shards (see `shards`). What a sample holds depends on its number alone, so any
number of processes may share the work, each `--shard i/N` taking every Nth shard, and a run that was cut off is
continued: shards that are finished are passed over. Whoever finishes the last one writes the index. With `mode=pixels`
nothing is made now: see `training.pixels`.

A file NAME.txt.safetensors beside a picture, a video or a folder of frames NAME is the embedding of its caption, one
tensor of tokens x width, and goes into its samples. `prompt=3b` gives all others the prompt of a published model. What
is done with texts is said by `text.mode` of the stage that reads them.
"""
# T H W pixel frames, height, width   c t h w latent channels, frames, height, width   l c text tokens and channels

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from seedvr2_core.checkpoints import load_prompts
from seedvr2_core.device import pick_device, pick_dtype
from seedvr2_core.errors import MediaError, SeedVR2Error, SettingError
from seedvr2_core.models.vae import VideoVAE, posterior
from seedvr2_core.video.geometry import to_clip, to_floats

from .buckets import aspect_sizes
from .config import parse_command, plain, setting
from .data import (
    CLIP_SUFFIXES,
    IMAGE_SUFFIXES,
    SHOT,
    UNREADABLE_SHARE,
    DataConfig,
    Dataset,
    Kind,
    Part,
    Sample,
    left_out,
)
from .degradation import MIXTURES
from .randomness import rng, torch_rng
from .shards import HELD_OUT, PIXELS, Pair, build_index, is_finished, write_shard
from .state import write_whole
from .weights import latent_scale, open_vae, published

log = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# How many other samples are tried in place of one whose file cannot be read.
SUBSTITUTES = 3
# What comes after a source's name in the file of its caption's embedding.
CAPTION_SUFFIX = ".txt.safetensors"
# In the description of a sample that took the place of another: why.
REPLACED = "replaced"


def part_of(index: int) -> Part:
    """Which files a sample comes from: the first of each kind are for validation, see `shards.Latents`."""
    return "held out" if index < HELD_OUT else "training"


@dataclass(frozen=True, kw_only=True)
class PairCrops:
    """Samples of one length and area."""

    kind: Kind = setting("image", "image or clip")
    count: int = setting(about="samples", least=1)
    size: int = setting(about="side of a square crop in pixels; the area of the others", least=16)
    frames: int = setting(1, "frames of a clip, 4n+1; 1: pictures", least=1)
    aspects: int = setting(1, "shapes of that area, from wide to tall; 1: squares alone", least=1)

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.frames}x{self.size}" + (f"x{self.aspects}" if self.aspects > 1 else "")

    def sizes(self, dataset: Dataset, part: Part = "all") -> list[tuple[int, int]]:
        """The shapes that a part of the data is large enough for, or all of it where that part is not.

        Raises:
            SettingError: there is none.
        """
        every = aspect_sizes(self.size**2, self.aspects)
        fitting = {which: [size for size in every if dataset.fits(self.kind, size, self.frames, which)]
                   for which in (part, "all")}  # fmt: skip
        found = fitting[part] or fitting["all"]
        if not found:
            frames = f"{self.frames} frames of " if self.frames > 1 else ""
            raise SettingError(
                f"No source is large and long enough for {self.name}, which is {frames}about {self.size} x {self.size} "
                "pixels. Set a smaller size or fewer frames for these crops, crops.N.size or crops.N.frames, or take "
                "larger data."
            )
        return found

    def shape(self, seed: int, index: int, dataset: Dataset) -> tuple[int, int]:
        """Height and width of one sample."""
        sizes = self.sizes(dataset, part_of(index))
        return sizes[int(rng(seed, f"aspect/{self.name}", index).integers(len(sizes)))]


@dataclass(frozen=True, kw_only=True)
class Precompute:
    """Everything the latents depend on, and how they are made."""

    vae: Path = setting(about="run directory of training.vae, a checkpoint, or nano, 3b, 7b")
    crops: tuple[PairCrops, ...] = setting(about="what to make")
    degradation: str = setting("mixed", f"one of {', '.join(MIXTURES)}", source="S2")
    variants: int = setting(1, "degraded versions of each sample", least=1)
    # Inference of the release samples too; ours takes the mean.
    latent: Literal["sample", "mean"] = setting("sample", "what is kept of the autoencoder's posterior")
    dtype: Literal["bf16", "fp32"] = setting("bf16", "stored")
    captions: Path | None = setting(None, "folder of captions' embeddings; none: they are beside the media")
    prompt: str | None = setting(None, "checkpoint or published name whose prompt samples without a caption get")
    data: DataConfig = field(default_factory=lambda: DataConfig(seed=1))
    mode: Literal["latents", "pixels"] = setting("latents", "pixels: each sample is made when a stage asks for it")
    shard_samples: int = setting(1000, "in a shard", least=1)
    batch: int = setting(16, "samples encoded together", least=1)
    workers: int = setting(2, "processes that degrade; 0: this one", least=0)

    @property
    def settings(self) -> dict:
        """What the samples of all shards depend on."""
        made_here = ("mode", "batch", "workers")
        return {name: value for name, value in json.loads(json.dumps(asdict(self), default=str)).items()
                if name not in made_here}  # fmt: skip


NANO = Precompute(
    vae=Path("runs/vae"),
    crops=(
        PairCrops(kind="image", count=10_000, size=192),
        PairCrops(kind="clip", count=2_500, size=128, frames=5),
    ),
    degradation="nano_mixed",
    latent="mean",
    dtype="fp32",
)
# From a folder of one's own to a fine-tuned 3B: real media alone, in the shapes of the paper's last phase.
FINE_TUNE = Precompute(
    vae=Path("3b"),
    crops=(
        PairCrops(kind="image", count=2_000, size=960, aspects=13),
        PairCrops(kind="clip", count=1_000, size=512, frames=21, aspects=13),
    ),
    variants=2,
    # Cropped and not made smaller, which worked better for SeedVR.
    data=DataConfig(seed=1, real=1.0, moving_photo=0.0, max_reduction=1.0, stills=0, keep_clips=False),
    shard_samples=250,
    batch=1,
)
RECIPES = {
    "nano": NANO,
    # Seconds: to see every stage work.
    "pico": replace(
        NANO,
        vae=Path("nano"),
        crops=(PairCrops(kind="image", count=64, size=64), PairCrops(kind="clip", count=32, size=64, frames=5)),
        data=DataConfig(seed=1, stills=8, still_size=192),
        workers=0,
    ),
    "3b": FINE_TUNE,
    "7b": replace(FINE_TUNE, vae=Path("7b")),
    # From nothing: what every phase of `7b_scratch` asks for, and the lengths of the last stage in 720p.
    "7b_scratch": replace(
        FINE_TUNE,
        vae=Path("7b"),
        crops=(
            *(PairCrops(kind="image", count=100_000, size=size, aspects=13) for size in (256, 512, 768, 960)),
            PairCrops(kind="clip", count=50_000, size=256, frames=5, aspects=13),
            PairCrops(kind="clip", count=50_000, size=512, frames=9, aspects=13),
            PairCrops(kind="clip", count=50_000, size=768, frames=21, aspects=13),
            *(PairCrops(kind="clip", count=50_000, size=960, frames=frames, aspects=13) for frames in (21, 49, 97)),
        ),
    ),
}


@dataclass(frozen=True)
class Task:
    """One shard: samples start..stop-1 of one kind of crop."""

    name: str
    crops: PairCrops
    start: int
    stop: int


def tasks(config: Precompute) -> list[Task]:
    """All shards of a data set, in order."""
    found = []
    for crops in config.crops:
        starts = range(0, crops.count, config.shard_samples)
        for number, start in enumerate(starts):
            stop = min(start + config.shard_samples, crops.count)
            found.append(Task(f"{crops.name}-{number:06d}", crops, start, stop))
    return found


@dataclass(frozen=True)
class Sources:
    """What a process needs to make samples."""

    root: Path | None
    cache_dir: Path
    config: Precompute

    def dataset(self) -> Dataset:
        dataset = Dataset.load(self.root, self.config.data, self.cache_dir)
        log.info(dataset.split())
        for crops in self.config.crops:
            found, every = crops.sizes(dataset), aspect_sizes(crops.size**2, crops.aspects)
            if len(found) < len(every):
                log.info("%s: %d of %d shapes; the data is too small for others.", crops.name, len(found), len(every))
        return dataset


def make_sample(dataset: Dataset, config: Precompute, crops: PairCrops, index: int) -> Sample:
    """One sample; those for validation, the first of each kind, are from sources that no other comes from.

    Where its file cannot be read any more, another one, always the same, takes its place.
    """
    last: MediaError | None = None
    for attempt in range(SUBSTITUTES + 1):
        try:
            # Beyond the last sample of this kind lie numbers that nobody uses.
            number = index + attempt * crops.count
            shape = crops.shape(config.data.seed, index, dataset)
            sample = dataset.sample(number, MIXTURES[config.degradation], kind=crops.kind, size=shape,
                                    frames=crops.frames, variants=config.variants,
                                    part=part_of(index))  # fmt: skip
            return sample if last is None else replace(sample, about={**sample.about, REPLACED: str(last)})
        except MediaError as error:
            log.warning("Sample %d is replaced: %s", index, error)
            last = error
    raise last


@torch.no_grad()
def encode(vae: VideoVAE, clips: Tensor, noise: Sequence[torch.Generator] | None) -> Tensor:
    """Latents b c t h w in fp32, not scaled, of clips b 3 T H W, uint8: posterior means, or samples of it by the given
    generators, one a clip."""
    weight = next(vae.parameters())
    # Rounded once, as inference does it: codes in bf16 would be off by up to half a step.
    mean, std = posterior(vae.encode(to_clip(to_floats(clips.to(weight.device))).to(weight.dtype)))
    if noise is None:
        return mean.float().cpu()
    drawn = torch.stack([torch.randn(m.shape, generator=generator) for m, generator in zip(mean, noise, strict=True)])
    return mean.float().cpu() + std.float().cpu() * drawn


def write(directory: Path, task: Task, work: Work, vae: VideoVAE, samples: Iterator[Sample]) -> None:
    """Encode the samples of a task and write its shard."""
    batch = work.config.batch

    def pairs() -> Iterator[tuple[str, Pair]]:
        waiting: list[tuple[int, Sample]] = []
        numbered = zip(range(task.start, task.stop), samples, strict=True)
        for index, sample in tqdm(numbered, total=task.stop - task.start, desc=task.name):
            # Samples of one shape are encoded together; they keep their order.
            if waiting and (waiting[0][1].clean.shape != sample.clean.shape or len(waiting) == batch):
                yield from finish(work, vae, task.crops, waiting)
                waiting = []
            waiting.append((index, sample))
        yield from finish(work, vae, task.crops, waiting)

    write_shard(directory, task.name, pairs(), work.settings)


def finish(
    work: Work, vae: VideoVAE, crops: PairCrops, group: Sequence[tuple[int, Sample]]
) -> Iterator[tuple[str, Pair]]:
    """Key and pair of every sample of a group, given with their numbers; those of one shape are encoded together."""
    config, columns = work.config, []
    for variant in range(-1, config.variants):
        clips = torch.stack([s.clean if variant < 0 else s.degraded[variant] for _, s in group])
        noise = None
        if config.latent == "sample":
            noise = [torch_rng(config.data.seed, f"posterior/{crops.name}", i, variant + 1) for i, _ in group]
        columns.append(encode(vae, clips, noise).to(DTYPES[config.dtype]))
    for (index, sample), hq, *lq in zip(group, *columns, strict=True):
        about = {**sample.about, "frames": sample.clean.shape[1], "size": list(sample.clean.shape[2:]),
                 "latent": config.latent, "vae": str(config.vae)}  # fmt: skip
        name = f"{crops.name}-{index:09d}"
        work.count(name, sample)
        text = work.captions.of(sample.about["source"])
        yield name, Pair(hq.clone(), [z.clone() for z in lq], about, text)


class Captions:
    """The captions of sources, as embeddings l c."""

    def __init__(self, folder: Path | None, root: Path | None, width: int | None = None):
        """
        Args:
            folder: where they are, each NAME.safetensors or NAME.txt.safetensors; None: beside the media.
            root: of the media; None: there are none, and no captions beside them.
            width: channels that all have; None: as many as the first.
        """
        self.folder, self.root, self.width = folder, root, width

    def of(self, source: str) -> Tensor | None:
        """The caption of a source by its path under root, or None where it has none.

        Raises:
            SettingError: the file is not one embedding, or of another width than the others.
        """
        file = next((file for file in self._places(source) if file.exists()), None)
        if file is None:
            return None
        try:
            tensors = list(load_file(file).values())
        except (OSError, SafetensorError) as error:
            raise SettingError(f"The caption {file.name} cannot be read ({error}); make it again or remove it."
                               ) from error
        if len(tensors) != 1 or tensors[0].ndim != 2 or not tensors[0].numel():
            shapes = " and ".join(str(list(tensor.shape)) for tensor in tensors) or "nothing"
            raise SettingError(f"The caption {file.name} holds {shapes}, expected one tensor of tokens x width.")
        (text,) = tensors
        self.width = self.width or text.shape[1]
        if text.shape[1] != self.width:
            raise SettingError(f"The caption {file.name} is {text.shape[1]} wide, and texts before it {self.width}; "
                               "make all of them with the text encoder of one model.")
        return text

    def _places(self, source: str) -> list[Path]:
        path = Path(source.partition(SHOT)[0])
        if path.suffix.lower() in (*IMAGE_SUFFIXES, *CLIP_SUFFIXES):
            path = path.with_suffix("")
        if self.folder is not None:
            return [self.folder / f"{path.name}{suffix}" for suffix in (CAPTION_SUFFIX, ".safetensors")]
        return [] if self.root is None else [self.root / path.parent / f"{path.name}{CAPTION_SUFFIX}"]


class Work:
    """A data set in the making: its settings, and the texts and failures of its samples."""

    def __init__(self, config: Precompute, root: Path | None):
        """
        Raises:
            CheckpointError: there is no prompt of the name in the config.
        """
        self.config = config
        self.text = None if config.prompt is None else load_prompts(published(config.prompt, "dit")).positive
        self.captions = Captions(config.captions, root, None if self.text is None else self.text.shape[1])
        # Which sources are drawn from depends on what was filtered out of them.
        refused = None if root is None else left_out(root)
        digest = None if refused is None else hashlib.sha256("\n".join(sorted(refused)).encode()).hexdigest()[:16]
        self.settings = {**config.settings, "filter": digest}
        self.total = sum(crops.count for crops in config.crops)
        self.replaced: dict[str, str] = {}  # samples, and why

    def count(self, name: str, sample: Sample) -> None:
        """Refuse to go on where so many samples had to be replaced that it is no accident.

        Raises:
            MediaError: naming the last of them.
        """
        if REPLACED not in sample.about:
            return
        self.replaced[name] = sample.about[REPLACED]
        if len(self.replaced) > max(1, UNREADABLE_SHARE * self.total):
            raise MediaError(f"{len(self.replaced)} of {self.total} samples had to be replaced, the last because: "
                             f"{sample.about[REPLACED]} Mend the data and run the command again; finished shards are "
                             "kept.")


def run(config: Precompute, directory: Path, root: Path | None, vae: VideoVAE, part: tuple[int, int] = (0, 1)) -> None:
    """Make every shard of this part that is not there yet, and the index when all are.

    Args:
        config: what to make.
        directory: of the data set.
        root: folder of photographs and clips; None for procedural pictures alone.
        vae: the autoencoder, on its device.
        part: (i, N): this process makes the shards i, i+N, i+2N, ...

    Raises:
        SettingError: the directory holds latents made with other settings, or a caption cannot be used.
        CheckpointError: the disk is full.
        MediaError: more than a few samples cannot be made.
    """
    everything, work = tasks(config), Work(config, root)
    mine = [task for task in everything[part[0] :: part[1]] if not is_finished(directory, task.name, work.settings)]
    log.info("%d of %d shards are to be made here.", len(mine), len(everything))
    if mine:
        sources = Sources(root, directory / "sources", config)
        with sample_maker(sources) as make:
            for task in mine:
                write(directory, task, work, vae, make(task))
    missing = [task.name for task in everything if not is_finished(directory, task.name, work.settings)]
    if missing:
        log.info("%d shards are still to be made by others, %s first.", len(missing), missing[0])
    else:
        build_index(directory, [task.name for task in everything], work.text, latent_scale(config.vae, vae))


def note(directory: Path, config: Precompute, root: Path | None) -> None:
    """Leave word of what there is to make, and from what, for `training.pixels`."""
    directory.mkdir(parents=True, exist_ok=True)
    about = {"media": None if root is None else str(root), "config": plain(config)}
    write_whole(directory / PIXELS, json.dumps(about, indent=1) + "\n")


@contextmanager
def sample_maker(sources: Sources) -> Iterator:
    """A function from a task to its samples, in order, made by worker processes where the config has some."""
    config = sources.config
    # Fills the cache once, before workers look for it.
    dataset = sources.dataset()
    if config.workers == 0:
        yield lambda task: (make_sample(dataset, config, task.crops, i) for i in range(task.start, task.stop))
        return
    # Spawned, not forked: torch's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(config.workers, context, initializer=_start_worker, initargs=(sources,)) as pool:

        def make(task: Task) -> Iterator[Sample]:
            # A bounded number is under way: a map over all would hold a whole shard in memory.
            numbers = iter(range(task.start, task.stop))
            waiting = [pool.submit(_work, task.crops, i) for i in islice(numbers, 4 * config.workers)]
            while waiting:
                arrived = waiting.pop(0).result()
                waiting += [pool.submit(_work, task.crops, i) for i in islice(numbers, 1)]
                clean, degraded, about = arrived
                yield Sample(torch.from_numpy(clean), [torch.from_numpy(d) for d in degraded], about)

        yield make


_WORKER: list = []  # in a worker process: its data set and its config, for as long as it lives


def _start_worker(sources: Sources) -> None:
    torch.set_num_threads(1)
    _WORKER[:] = [sources.dataset(), sources.config]


def _work(crops: PairCrops, index: int) -> tuple[np.ndarray, list[np.ndarray], dict]:
    sample = make_sample(*_WORKER, crops, index)
    return sample.clean.numpy(), [degraded.numpy() for degraded in sample.degraded], sample.about


def parse_part(text: str) -> tuple[int, int]:
    """"3/8" to (3, 8), counted from 0."""
    try:
        number, total = map(int, text.split("/"))
    except ValueError:
        raise SettingError(f"--shard takes i/N, such as 0/4, got {text!r}.") from None
    if not 0 <= number < total:
        raise SettingError(f"--shard {text} is out of range; it counts from 0/{max(total, 1)} on.")
    return number, total


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--shard", default="0/1")
    known, rest = own.parse_known_args(argv)
    command = parse_command("precompute", RECIPES, rest)
    config: Precompute = command.config
    try:
        if config.degradation not in MIXTURES:
            raise SettingError(f"There is no degradation {config.degradation!r}; choose one of {', '.join(MIXTURES)}.")
        part = parse_part(known.shard)
        if command.dry_run:
            print(json.dumps(config.settings, indent=1))
            print(f"{len(tasks(config))} shards, {sum(crops.count for crops in config.crops)} samples")
            return 0
        if config.mode == "pixels":
            note(command.out, config, command.data)
            return 0
        torch.set_num_threads(command.threads)
        device = pick_device(command.device)
        vae = open_vae(config.vae, pick_dtype("auto", device), device)
        run(config, command.out, command.data, vae, part)
    except SeedVR2Error as error:
        print(f"precompute: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
