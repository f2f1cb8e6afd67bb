"""What shall lie where, and how much be done at once: the plan of one clip, made before its first step.

Every stage is tried without contents (see `stages`), so what a plan takes is known beforehand. Of the ways to compute a
clip, sorted from the fastest to the smallest, the first that fits becomes the plan.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Literal, TypeVar, get_args

import torch

from ..errors import SettingError
from ..models.tiling import TiledVAE
from ..models.vae_fast import FastVAE
from ..video.chunks import OVERLAP
from ..video.geometry import LATENT_FRAMES, latent_grid
from .stages import Portions, Work, reach, try_autoencoder, try_restore, weights_of
from .streaming import Placement

# Share of the memory that a plan may fill: predictions are within a tenth of what is measured.
USABLE = 0.9
# Latents in one pass of the transformer: more than the first gain nothing, fewer than the last see little of time.
CHUNKS = (32, 22, 15, 10, 7, 5)
# Tokens in one product of the transformer where memory is short; still enough to keep a GPU busy.
FEW_ROWS = 1 << 14
# Pixels of the largest frame, 4K, of which a plan is found in seconds. Beyond it, what cannot fit is refused untried.
QUICK = 3840 * 2160
# Frames that the autoencoder computes at once, and bands of a frame in one convolution.
BLOCKS_AND_BANDS = ((2, 1), (1, 1), (1, 3), (1, 8))

# Colour values in the frames of a latent, by pixel; most are fp32 outside the models.
VALUES = 3 * LATENT_FRAMES
# Bytes by pixel while frames are resized and brought to -1..1: as they come out of each step, and padded.
PREPARED = 3 * 4 * VALUES
# Bytes by pixel of a frame that is finished: its source, its result and what is handed out, in fp32; and what the most
# demanding colour transfer takes inside, measured.
FINISHED = 3 * 3 * 4
TRANSFERRED = 70
# Copies of a chunk's latents, in fp32: the conditions, what the transformer made of them, and one to blend with.
LATENT_COPIES = 3
# Latents' worth of frames that have been read and are on their way in or out, besides those of a chunk.
ON_THE_WAY = 6

# Bytes that the libraries of a CPU keep for each thread once they have met the shapes of a clip; measured.
BY_THREAD = 8 << 20

T = TypeVar("T")
Stage = Literal["encode", "restore", "decode"]
STAGES: tuple[Stage, ...] = get_args(Stage)

PREFIXES = "KMGT"
GIB = 1 << 30


@dataclass(frozen=True, kw_only=True, eq=False)
class MemoryPlan:
    """How a clip is computed, and the bytes that this is predicted to take on the device."""

    planner: Planner
    budget: int  # that may be filled
    chunk: int  # latents in one pass of the transformer
    rows: int | None  # its tokens in one product; None: as many as is fastest
    portions: Portions  # of the autoencoder
    state: Placement  # of causal states
    streamed: int  # blocks of the transformer whose weights wait in host memory
    weights: int
    encode: int  # at the peak of a stage, with what other stages keep, without weights
    restore: int
    decode: int

    @property
    def work(self) -> Work:
        return self.planner.work

    @property
    def peak(self) -> int:
        return self.weights + max(self.encode, self.restore, self.decode)


def make_plan(work: Work, budget: int) -> MemoryPlan:
    """The fastest plan that fits.

    Args:
        budget: bytes on the device, those that weights take already included.

    Raises:
        SettingError: nothing fits.
    """
    return Planner(work).fit(budget)


def step_down(plan: MemoryPlan, stage: Stage, available: int) -> MemoryPlan | None:
    """A smaller plan for the rest of the clip, after memory ran out in a stage; None if there is none.

    Args:
        available: bytes on the device that could be had, weights included, as measured when it happened.
    """
    # Either there was less memory than thought, or the prediction was too low; those of other stages and plans will be
    # low by the same factor. Both ways everything has to lie as far below what was there as in a first plan. Where
    # nothing does, the smallest may still fit.
    taken = plan.weights + getattr(plan, stage)
    # A chunk that a user has chosen is given up rather than the work that is done.
    lengths = sorted({min(length, plan.chunk) for length in CHUNKS}, reverse=True)
    smaller = plan.planner.search(min(available, taken), lengths)
    return smaller if smaller.weights + getattr(smaller, stage) < taken else None


def describe(plan: MemoryPlan, stages: Sequence[Stage] = STAGES) -> str:
    """A line for people: what was chosen and what it will take, if these stages run."""
    work, (block, band) = plan.work, plan.portions
    whole, length = work.latents <= plan.chunk, LATENT_FRAMES * (plan.chunk - 1) + 1
    passes = "one pass" if whole else f"passes of {length} frame{'s' * (length > 1)}"
    parts = [
        *([passes] if work.dit else []),
        *([f"{plan.rows} tokens at a time"] if plan.rows else []),
        *([f"autoencoder {block} frame{'s' * (block > 1)} at a time"] if isinstance(work.vae, FastVAE) else []),
        *([f"in {-(-work.pixels // band)} bands"] if band else []),
        *(["its state in host memory"] if plan.state == "host" else []),
        *([f"{plan.streamed} of {len(work.dit.blocks)} blocks streamed"] if plan.streamed else []),
    ]
    shares = [f"{name} {amount(getattr(plan, name))}" for name in ("weights", *stages)]
    taken = plan.weights + max(getattr(plan, name) for name in stages)
    parts = [", ".join(parts)] if parts else []
    return "; ".join([*parts, f"memory {amount(taken)} of {amount(plan.budget)} ({', '.join(shares)})"])


def parse_bytes(text: str) -> int:
    """Bytes of an amount such as 8G, 6.5GiB or 800MB. G and GiB are 1024 * 1024 * 1024, GB is 1000 * 1000 * 1000.

    Raises:
        SettingError: it is not a number above zero with a unit.
    """
    found = re.fullmatch(rf"\s*(\d+(?:\.\d+)?)\s*([{PREFIXES}])(i?B)?\s*", text, re.IGNORECASE)
    size = 0
    if found:
        number, prefix, suffix = found.groups()
        base = 1000 if suffix and suffix.upper() == "B" else 1024
        size = int(float(number) * base ** (1 + PREFIXES.index(prefix.upper())))
    if size <= 0:
        raise SettingError(f"{text!r} is no amount of memory; write a number above zero and a unit, such as 8G.")
    return size


def amount(size: float) -> str:
    """Bytes for people."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{max(1, round(size / 2**20))} MiB"


def _asked_for(size: float) -> str:
    """`amount`, rounded up, so that who allows this much allows enough."""
    step = GIB / 10 if size >= GIB else 2**20
    return amount(math.ceil(size / step) * step)


class Planner:
    """Tries the ways to compute one clip, each once."""

    def __init__(self, work: Work):
        self.work = work
        self.weights = weights_of(work)
        self.portions = _portions(work)
        self.half = cache(partial(try_autoencoder, work))
        self.dit = cache(partial(try_restore, work))

    def fit(self, budget: int) -> MemoryPlan:
        """See `make_plan`."""
        work, lengths = self.work, CHUNKS if self.work.chunk is None else [self.work.chunk]
        least = self.expected(lengths) if work.pixels > QUICK else 0
        if least <= budget:
            plan = self.search(budget, lengths)
            if plan.peak <= USABLE * budget:
                return plan
            least = plan.peak
        raise SettingError(
            f"Restoring at {work.width} x {work.height} takes {_asked_for(least / USABLE)} of memory or more, of which "
            f"{amount(budget)} may be used; choose a smaller size, raise the limit or close other programs."
        )

    def expected(self, lengths: Sequence[int]) -> int:
        """About the bytes of the smallest plan, by what a size takes that does not take long to try."""
        ratio = QUICK / self.work.pixels
        height, width = (max(1, int(side * math.sqrt(ratio))) for side in self.work.size)
        smaller = Planner(replace(self.work, height=height, width=width))
        plan = smaller.plan(0, *smaller.placements()[-1], [min(lengths)])
        # The rest grows with the pixels; of tiles, only frames do, so that this is still the least.
        fixed, grown = plan.weights + self.libraries, 1 if isinstance(self.work.vae, TiledVAE) else 1 / ratio
        return fixed + int((plan.peak - fixed) * grown)

    def search(self, budget: int, lengths: Sequence[int]) -> MemoryPlan:
        """The fastest plan that fits, with a pass of one of these lengths, in latents; or else the smallest."""
        # What is chosen last is the smallest; every placement takes less than the one before.
        *larger, smallest = self.placements()
        fastest = self.portions[0]
        for state, streamed in larger:
            # Trials of what cannot fit would take most of the time: states alone may be too much.
            states = max(self.states(max(lengths), fastest, state), self.half("decode", fastest, state).kept)
            if self.weights.on_device(streamed) + states <= USABLE * budget:
                plan = self.plan(budget, state, streamed, lengths)
                if plan.peak <= USABLE * budget:
                    return plan
        return self.plan(budget, *smallest, lengths)

    def placements(self) -> list[tuple[Placement, int]]:
        """Where states may wait, and how many blocks may be streamed, from the fastest to the smallest."""
        most = len(self.weights.blocks) if self.weights.streamable else 0
        # Elsewhere device and host are one memory.
        apart = self.work.device == "cuda" and isinstance(self.work.vae, FastVAE)
        states: tuple[Placement, ...] = ("device", "host") if apart else ("device",)
        return [(state, streamed) for state in states for streamed in range(most + 1)]

    def plan(self, budget: int, state: Placement, streamed: int, lengths: Sequence[int]) -> MemoryPlan:
        """The fastest plan with this placement that fits, or the smallest."""
        weights = self.weights.on_device(streamed)
        room = USABLE * budget - weights
        fastest, passes = self.portions[0], list(_passes(self.work, lengths))
        # The fastest autoencoder tells what states take; no other takes more.
        chunk, rows = _first(passes, lambda choice: self.restore(*choice, fastest, state) <= room)
        # Decoding takes most: where it does not fit, encoding need not be tried.
        portions = _first(
            self.portions,
            lambda choice: self.decode(chunk, choice, state) <= room and self.encode(chunk, choice, state) <= room,
        )
        return MemoryPlan(
            planner=self,
            budget=budget,
            chunk=chunk,
            rows=rows,
            portions=portions,
            state=state,
            streamed=streamed,
            weights=weights,
            encode=self.encode(chunk, portions, state),
            restore=self.restore(chunk, rows, portions, state),
            decode=self.decode(chunk, portions, state),
        )

    # The peak of every stage, with all that waits for others, without weights.

    def encode(self, chunk: int, portions: Portions, state: Placement) -> int:
        peak, kept = self.half("encode", portions, state)
        waiting = self.waiting(chunk) + (self.decoder(portions, state) if self.interleaved(chunk) else 0)
        return int(waiting + max(peak, kept + self.share * PREPARED * self.work.pixels))

    def restore(self, chunk: int, rows: int | None, portions: Portions, state: Placement) -> int:
        return self.waiting(chunk) + self.states(chunk, portions, state) + self.dit(chunk, rows)

    def decode(self, chunk: int, portions: Portions, state: Placement) -> int:
        peak, kept = self.half("decode", portions, state)
        waiting = self.waiting(chunk) + (self.encoder(portions, state) if self.interleaved(chunk) else 0)
        decoded = self.share * VALUES * self.work.dtype.itemsize
        finishing = kept + (decoded + FINISHED + TRANSFERRED) * self.work.pixels
        return int(waiting + max(self.handed_out + peak, finishing))

    # What a stage leaves for the next time, while others work.

    def encoder(self, portions: Portions, state: Placement) -> int:
        return self.half("encode", portions, state).kept

    def decoder(self, portions: Portions, state: Placement) -> int:
        return self.half("decode", portions, state).kept + self.handed_out

    def states(self, chunk: int, portions: Portions, state: Placement) -> int:
        """Bytes of both that wait for the transformer."""
        if self.work.latents <= chunk:
            return 0
        both = self.encoder(portions, state), self.decoder(portions, state)
        return sum(both) if self.interleaved(chunk) else max(both)

    def interleaved(self, chunk: int) -> bool:
        """Whether anything heavy is decoded before the last latent is encoded: more than a first, lone frame."""
        # Every pass but the last settles so many latents, once the one behind it is encoded.
        settled = max(chunk - OVERLAP, 1)
        return self.work.latents - 1 - chunk > (1 if settled == 1 else 0)

    @property
    def share(self) -> float:
        """Of a latent's frames: a lone picture is a quarter of them, and nothing comes before or after it."""
        return 1 / LATENT_FRAMES if self.work.latents == 1 else 1

    @property
    def libraries(self) -> int:
        """Bytes that they keep."""
        return BY_THREAD * torch.get_num_threads() if self.work.device == "cpu" else 0

    @property
    def handed_out(self) -> int:
        """Bytes of the frames of a latent, and of the last one finished, that wait while the next latent is decoded."""
        each = VALUES * self.work.dtype.itemsize + FINISHED
        return 0 if self.work.latents == 1 else self.work.pixels * each

    def waiting(self, chunk: int) -> int:
        """Latents and frames that wait for other stages, or in case that memory runs out; and what libraries keep."""
        work = self.work
        latents = int(min(chunk, work.latents))
        channels = work.vae.config.latent_channels if work.vae else work.dit.config.out_channels
        held = LATENT_COPIES * 4 * channels * latents * latent_grid(1, *work.size).h * latent_grid(1, *work.size).w
        frames = LATENT_FRAMES * (max(chunk, reach(work.vae.config)[0] if work.vae else 0) + ON_THE_WAY)
        return held + self.libraries + work.source * int(min(frames, work.latents * LATENT_FRAMES))


def _first(choices: list[T], fits: Callable[[T], bool]) -> T:
    """The first choice that fits, given that every one takes less than those before; the last if none does."""
    # Mostly the first one does, and every other costs a trial.
    if fits(choices[0]):
        return choices[0]
    return choices[min(bisect_left(choices, True, lo=1, key=fits), len(choices) - 1)]


def _passes(work: Work, lengths: Sequence[int]) -> Iterator[tuple[int, int | None]]:
    """Latents in a pass of the transformer and tokens in a product, from the fastest to the smallest."""
    lengths = sorted({int(min(length, work.latents)) for length in lengths}, reverse=True)
    yield lengths[0], None
    # On a CPU the transformer takes few tokens anyway.
    rows = None if work.device == "cpu" else FEW_ROWS
    yield from ((length, rows) for length in lengths if rows or length != lengths[0])


def _portions(work: Work) -> list[Portions]:
    """How the autoencoder may compute, from the fastest to the smallest."""
    bands = BLOCKS_AND_BANDS if isinstance(work.vae, FastVAE) else BLOCKS_AND_BANDS[:1]
    return [Portions(block, None if count == 1 else -(-work.pixels // count)) for block, count in bands]
