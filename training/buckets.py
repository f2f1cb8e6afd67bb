"""Which samples make the batch of a step: a pure function of the step, so a run is resumed by its number alone.

Samples of one shape form a bucket, and a batch comes from one bucket. A batch has a budget of tokens, not a number of
samples, so that every step costs about the same. In each epoch every sample of a bucket comes up once, in an order that
a Philox key (seed, epoch, bucket) decides; a second permutation interleaves the buckets. All batches of a bucket are of
one size: the last of an epoch is filled up with samples that the epoch has had already.

Nothing depends on ranks or workers: a rank takes its share of the positions of the global batch.
"""
# t h w latent frames, height, width   H W the same in pixels

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from seedvr2_core.errors import SettingError
from seedvr2_core.video.geometry import CLIP_MULTIPLE, Grid
from seedvr2_core.video.geometry import PATCH as TOKEN_SIDE

from .randomness import rng

# Height over width of the shapes that a phase of training uses: 13, spaced evenly in their logarithm.
ASPECTS, ASPECT_RANGE = 13, (0.42, 2.4)
# About 97 frames of 720p, what the paper calls a batch of 100 frames.
BATCH_TOKENS = 90_000


def tokens(bucket: Grid) -> int:
    """Tokens of the transformer for one sample of latent size t h w."""
    return bucket.t * -(-bucket.h // TOKEN_SIDE) * -(-bucket.w // TOKEN_SIDE)


def batch_size(bucket: Grid, budget: int = BATCH_TOKENS, parts: int = 1) -> int:
    """Samples of a batch of so many equal parts, each of as many as its budget of tokens holds, at least one."""
    return max(1, budget // tokens(bucket)) * parts


def aspect_sizes(area: int, count: int = ASPECTS) -> list[tuple[int, int]]:
    """Sizes (H, W) of about `area` pixels in `count` aspect ratios, wide to tall, sides multiples of 16 pixels.

    One aspect is the square. Sizes that fall together after rounding are listed once.

    Raises:
        SettingError: the area is below one multiple squared.
    """
    if area < CLIP_MULTIPLE**2 or count < 1:
        raise SettingError(f"There are no {count} sizes of {area} pixels; sides are multiples of {CLIP_MULTIPLE}.")
    low, high = ASPECT_RANGE
    ratios = [1.0] if count == 1 else [low * (high / low) ** (i / (count - 1)) for i in range(count)]
    return list(dict.fromkeys((_side(math.sqrt(area * ratio)), _side(math.sqrt(area / ratio))) for ratio in ratios))


def _side(length: float) -> int:
    return max(1, round(length / CLIP_MULTIPLE)) * CLIP_MULTIPLE


@dataclass(frozen=True)
class Batch:
    """The samples of one step, on all ranks together."""

    bucket: Grid
    ids: np.ndarray  # int64, positions in the index of samples; the position in this array is the sample's slot

    def slots(self, rank: int, world: int) -> range:
        """The positions that are this rank's: equal shares, the last ranks one more where it does not divide."""
        return range(len(self.ids) * rank // world, len(self.ids) * (rank + 1) // world)


class BatchPlan:
    """`plan(step)` is the batch of that step. Seeking costs nothing; an epoch costs one permutation when it begins."""

    def __init__(
        self,
        members: Mapping[Grid, np.ndarray],
        sizes: Mapping[Grid, int],
        seed: int,
        image_share: float | None = None,
    ):
        """
        Args:
            members: the ids of each bucket.
            sizes: samples in a batch of each bucket.
            seed: of the run.
            image_share: share of the steps whose samples have one latent frame; images and clips then have epochs of
                their own. None: as many as there are, in one order with the clips.

        Raises:
            SettingError: there are no samples, or none of a kind that has a share.
        """
        if not members or any(not len(ids) for ids in members.values()):
            raise SettingError("A batch plan needs buckets with samples in them, and got an empty one.")
        images = {bucket: ids for bucket, ids in members.items() if bucket.t == 1}
        clips = {bucket: ids for bucket, ids in members.items() if bucket.t > 1}
        if image_share is None or image_share in (0, 1):
            chosen = members if image_share is None else images if image_share else clips
            parts = {"all": chosen}
        else:
            parts = {"images": images, "clips": clips}
        if not all(parts.values()):
            raise SettingError(f"image_share is {image_share}, but there are {len(images)} buckets of images and "
                               f"{len(clips)} of clips; precompute the other kind, or give it no share.")
        self.image_share = image_share if len(parts) > 1 else None
        self.streams = [_Stream(name, part, sizes, seed) for name, part in parts.items()]

    def __call__(self, step: int) -> Batch:
        if self.image_share is None:
            return self.streams[0].batch(step)
        # Images come up evenly: as often among the first n steps as their share says, to within one.
        before, after = (_share_of(self.image_share, count) for count in (step, step + 1))
        return self.streams[0].batch(before) if after > before else self.streams[1].batch(step - before)

    @property
    def steps_in_epoch(self) -> int:
        """Batches until every id has come up; with a share for images, of the kind that has more."""
        return max(stream.batches for stream in self.streams)


def _share_of(share: float, steps: int) -> int:
    # Decimals, or 10 steps at a share of 0.3 would hold 2.9999 images.
    return math.floor(round(share * steps, 9))


class _Stream:
    """Endless batches over some buckets, epoch after epoch."""

    def __init__(self, name: str, members: Mapping[Grid, np.ndarray], sizes: Mapping[Grid, int], seed: int):
        self.name, self.seed = name, seed
        self.buckets = sorted(members)
        self.members = [np.asarray(members[bucket], dtype=np.int64) for bucket in self.buckets]
        self.sizes = [sizes[bucket] for bucket in self.buckets]
        counts = [-(-len(ids) // size) for ids, size in zip(self.members, self.sizes, strict=True)]
        # Of every batch of an epoch, before they are interleaved: its bucket, and its place among those of its bucket.
        self.bucket_of = np.repeat(np.arange(len(counts)), counts)
        self.place_of = np.concatenate([np.arange(count) for count in counts])
        self.batches = len(self.bucket_of)
        self.epoch, self.order, self.permutations = -1, np.empty(0), {}

    def batch(self, index: int) -> Batch:
        epoch, position = divmod(index, self.batches)
        if epoch != self.epoch:
            self.order = rng(self.seed, f"order/{self.name}", epoch).permutation(self.batches)
            # Nothing but a memory of what (seed, epoch) says anyway.
            self.epoch, self.permutations = epoch, {}
        chosen = self.order[position]
        which, place = int(self.bucket_of[chosen]), int(self.place_of[chosen])
        if which not in self.permutations:
            t, h, w = self.buckets[which]
            self.permutations[which] = rng(self.seed, f"order/{t}x{h}x{w}", epoch).permutation(self.members[which])
        slots = np.arange(place * self.sizes[which], (place + 1) * self.sizes[which])
        return Batch(self.buckets[which], self.permutations[which].take(slots, mode="wrap"))


def members_of(buckets: Sequence[Grid], column: np.ndarray) -> dict[Grid, np.ndarray]:
    """The ids of each bucket, from the column that holds the bucket's number for every id."""
    return {bucket: ids for i, bucket in enumerate(buckets) if len(ids := np.flatnonzero(column == i))}
