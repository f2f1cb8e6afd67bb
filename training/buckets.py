"""Which samples make the batch of a step: a pure function of the step, so a run is resumed by its number alone.

Samples of one shape form a bucket, and a batch comes from one bucket. It may have a budget of tokens instead of a
number of samples, so that every step costs about the same. In each epoch every sample of a bucket comes up once, in an
order that a Philox key (seed, epoch, bucket) decides; a second permutation interleaves the buckets. Where clips are cut
to several lengths, the batches of a bucket take these in turn, and a sample has one of them in an epoch. Batches are
always whole: the last of an epoch are filled up with samples that the epoch has had already.

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

from .curriculum import Phase
from .randomness import rng

# Height over width of the shapes that a phase of training uses: 13, spaced evenly in their logarithm.
ASPECTS, ASPECT_RANGE = 13, (0.42, 2.4)
# About 97 frames of 720p, what the paper calls a batch of 100 frames.
BATCH_TOKENS = 90_000
# The ids of each bucket.
Members = Mapping[Grid, np.ndarray]


def tokens(bucket: Grid) -> int:
    """Tokens of the transformer for one sample of latent size t h w."""
    return bucket.t * -(-bucket.h // TOKEN_SIDE) * -(-bucket.w // TOKEN_SIDE)


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


@dataclass(frozen=True, kw_only=True)
class Deal:
    """How a stage deals samples to its steps."""

    samples: int = 1  # of a micro-batch
    tokens: int | None = None  # instead, a micro-batch has as many samples as this holds, at least one
    micros: int = 1  # micro-batches of a step, whoever computes them; all are of one shape
    image_share: float | None = None  # of the steps of pictures; None: the kinds of sample take turns
    phase: Phase | None = None  # of the curriculum, whose samples are taken, in its lengths; None: all as they are
    order: str = "order"  # a name: under each, samples come in another order

    def size(self, shape: Grid) -> int:
        """Samples of a micro-batch, of latent size t h w each."""
        return self.samples if self.tokens is None else max(1, self.tokens // tokens(shape))

    def cuts(self, bucket: Grid) -> dict[int, int]:
        """How many samples of a bucket make a batch, by the length t that they are cut to; {}: they have no part."""
        lengths = (bucket.t,) if self.phase is None else self.phase.lengths(bucket)
        return {t: self.size(bucket._replace(t=t)) * self.micros for t in lengths}


@dataclass(frozen=True)
class Batch:
    """The samples of one step, on all ranks together."""

    shape: Grid  # that they are cut to
    ids: np.ndarray  # int64, positions in the index of samples; the position in this array is the sample's slot

    def slots(self, rank: int, world: int) -> range:
        """The positions that are this rank's: equal shares, the last ranks one more where it does not divide."""
        return range(len(self.ids) * rank // world, len(self.ids) * (rank + 1) // world)


class BatchPlan:
    """`plan(step)` is the batch of that step. Seeking costs nothing; an epoch costs one permutation when it begins."""

    def __init__(self, kinds: Sequence[Members], deal: Deal, seed: int):
        """
        Args:
            kinds: of every kind of sample, the ids of each bucket. Kinds that take turns have epochs of their own; so
                have pictures and clips that have shares.
            deal: which samples make a batch.
            seed: of the run.

        Raises:
            SettingError: there are no samples, or none of a kind that has a share.
        """
        taken = [{bucket: ids for bucket, ids in kind.items() if len(ids) and deal.cuts(bucket)} for kind in kinds]
        parts = _parts([kind for kind in taken if kind], deal.image_share)
        self.streams = [_Stream(f"{deal.order}/{name}", part, deal, seed) for name, (_, part) in parts.items()]
        shares = [share for share, _ in parts.values()]
        # Of the steps that the streams before it leave over; the last one gets what is left.
        self.shares = [share / sum(shares[i:]) for i, share in enumerate(shares[:-1])]

    def __call__(self, step: int) -> Batch:
        # Every stream comes up evenly: as often among the first n steps as its share says, to within one.
        for stream, share in zip(self.streams[:-1], self.shares, strict=True):
            before, after = (_share_of(share, count) for count in (step, step + 1))
            if after > before:
                return stream.batch(before)
            step -= before
        return self.streams[-1].batch(step)

    @property
    def steps_in_epoch(self) -> int:
        """Batches until every id has come up, of the part that has most."""
        return max(stream.batches for stream in self.streams)


def _parts(kinds: Sequence[Members], image_share: float | None) -> dict[str, tuple[float, Members]]:
    """What has epochs of its own, by name, each with its share of the steps."""
    if not kinds:
        raise SettingError("A batch plan needs buckets with samples in them, and got an empty one.")
    if image_share is None:
        return {str(number): (1 / len(kinds), kind) for number, kind in enumerate(kinds)}
    buckets = sorted({bucket for kind in kinds for bucket in kind})
    everything = {bucket: np.concatenate([kind[bucket] for kind in kinds if bucket in kind]) for bucket in buckets}
    images = {bucket: ids for bucket, ids in everything.items() if bucket.t == 1}
    clips = {bucket: ids for bucket, ids in everything.items() if bucket.t > 1}
    parts = {"images": (image_share, images), "clips": (1 - image_share, clips)}
    wanted = {name: (share, part) for name, (share, part) in parts.items() if share}
    if not all(part for _, part in wanted.values()):
        raise SettingError(f"image_share is {image_share}, but there are {len(images)} buckets of images and "
                           f"{len(clips)} of clips; precompute the other kind, or give it no share.")
    return wanted


def _share_of(share: float, steps: int) -> int:
    # Decimals, or 10 steps at a share of 0.3 would hold 2.9999 images.
    return math.floor(round(share * steps, 9))


class _Stream:
    """Endless batches over some buckets, epoch after epoch."""

    def __init__(self, name: str, members: Members, deal: Deal, seed: int):
        self.name, self.seed = name, seed
        self.buckets = sorted(members)
        self.members = [np.asarray(members[bucket], dtype=np.int64) for bucket in self.buckets]
        # Of each bucket its lengths, and the samples in a batch of that length.
        self.cuts = [list(deal.cuts(bucket).items()) for bucket in self.buckets]
        counts = [_batches(len(ids), [size for _, size in cuts])
                  for ids, cuts in zip(self.members, self.cuts, strict=True)]  # fmt: skip
        # Of every batch of an epoch, before they are interleaved: its bucket, and its place among those of its bucket.
        self.bucket_of = np.repeat(np.arange(len(counts)), counts)
        self.place_of = np.concatenate([np.arange(count) for count in counts])
        self.batches = len(self.bucket_of)
        self.epoch, self.order, self.permutations = -1, np.empty(0), {}

    def batch(self, index: int) -> Batch:
        epoch, position = divmod(index, self.batches)
        if epoch != self.epoch:
            self.order = rng(self.seed, self.name, epoch).permutation(self.batches)
            # Nothing but a memory of what (seed, epoch) says anyway.
            self.epoch, self.permutations = epoch, {}
        chosen = self.order[position]
        which, place = int(self.bucket_of[chosen]), int(self.place_of[chosen])
        bucket, cuts = self.buckets[which], self.cuts[which]
        if which not in self.permutations:
            draw = rng(self.seed, f"{self.name}/{bucket.t}x{bucket.h}x{bucket.w}", epoch)
            self.permutations[which] = draw.permutation(self.members[which])
        # A round has a batch of every length. Epochs begin it at different ones: a small bucket may not fill a round.
        rounds, turn = divmod(place, len(cuts))
        cuts = [cuts[(number + epoch) % len(cuts)] for number in range(len(cuts))]
        t, size = cuts[turn]
        first = rounds * sum(size for _, size in cuts) + sum(size for _, size in cuts[:turn])
        ids = self.permutations[which].take(np.arange(first, first + size), mode="wrap")
        return Batch(bucket._replace(t=t), ids)


def _batches(samples: int, sizes: Sequence[int]) -> int:
    """Batches of sizes that take turns until all samples have come up, whichever is the first."""
    rounds, rest = divmod(samples, sum(sizes))
    return rounds * len(sizes) + int(np.searchsorted(np.cumsum([0, *sorted(sizes)]), rest))


def members_of(buckets: Sequence[Grid], column: np.ndarray, ids: np.ndarray) -> dict[Grid, np.ndarray]:
    """Those of `ids` that each bucket has, from the column that holds the bucket's number for every id."""
    return {bucket: own for i, bucket in enumerate(buckets) if len(own := ids[column[ids] == i])}
