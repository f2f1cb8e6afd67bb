"""Where a film cuts from one shot to the next: nothing that restores or learns from frames may look across."""
# T H W c frames, uint8, uint16 or floats in 0..1

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, pairwise
from operator import itemgetter
from typing import TypeVar

import numpy as np
from torch import Tensor

Frame = TypeVar("Frame", np.ndarray, Tensor)

# Side of the thumbnails that are compared, and how finely their colours are counted.
THUMBNAIL, BINS = 24, 8
# A cut changes this share of the colours, and changes pixels this many times as much as the frames around it do. Fast
# motion and flashes fulfil one of the two, rarely both.
COLOURS, OUTSTANDING = 0.25, 3.0
# In codes of 255: less is never a cut.
LEAST = 8.0
# Frames on either side that a change has to stand out from.
AROUND = 4


def scene_cuts(frames: Iterable[Frame]) -> list[int]:
    """Numbers of the frames that begin a new shot; the first frame is none of them."""
    numbers = [shot for shot, _ in _numbered(frames)]
    return [at for at, (before, shot) in enumerate(pairwise(numbers), start=1) if shot != before]


def split_shots(frames: np.ndarray, cuts: Sequence[int]) -> list[np.ndarray]:
    """The shots of a clip, as views."""
    edges = [0, *cuts, len(frames)]
    return [frames[start:stop] for start, stop in pairwise(edges)]


def shots(frames: Iterable[Frame]) -> Iterator[Iterator[Frame]]:
    """The frames of every shot, as they come; AROUND of them wait until what follows them is known.

    A shot has to be used up before the next one is asked for.
    """
    for _, numbered in groupby(_numbered(frames), key=itemgetter(0)):
        yield (frame for _, frame in numbered)


def _numbered(frames: Iterable[Frame]) -> Iterator[tuple[int, Frame]]:
    """Every frame, with the number of its shot."""
    # Of every frame, how much it differs from the one before: in pixels, and in the share of its colours.
    pixels, colours = [0.0], [0.0]
    waiting: deque[Frame] = deque()
    before, shot, number = None, 0, 0
    for frame in frames:
        small = _look(frame)
        counts = _histogram(small)
        if before is not None:
            pixels.append(float(np.abs(small - before[0]).mean()))
            colours.append(float(np.abs(counts - before[1]).sum()) / 2)
        before = small, counts
        waiting.append(frame)
        if len(waiting) > AROUND:
            shot += _begins(pixels, colours, number)
            yield shot, waiting.popleft()
            number += 1
    while waiting:
        shot += _begins(pixels, colours, number)
        yield shot, waiting.popleft()
        number += 1


def _look(frame: np.ndarray | Tensor) -> np.ndarray:
    """A thumbnail of a frame's colours, in 0..255."""
    pixels = frame.cpu().numpy() if isinstance(frame, Tensor) else frame
    small = thumbnail(pixels[..., :3]).astype(np.float32)
    brightest = 1 if np.issubdtype(pixels.dtype, np.floating) else np.iinfo(pixels.dtype).max
    return small * (255 / brightest)


def thumbnail(frame: np.ndarray) -> np.ndarray:
    """Means over a coarse grid, or the frame itself where it is smaller."""
    H, W, c = frame.shape
    h, w = max(1, H // THUMBNAIL), max(1, W // THUMBNAIL)
    # Every few pixels are enough for a mean.
    step_y, step_x = max(1, h // 8), max(1, w // 8)
    blocks = frame[: H // h * h, : W // w * w].reshape(H // h, h, W // w, w, c)
    return blocks[:, ::step_y, :, ::step_x].mean(axis=(1, 3))


def _histogram(frame: np.ndarray) -> np.ndarray:
    """Shares of BINS^3 colours."""
    index = (frame.clip(0, 255) / 256 * BINS).astype(int)
    counts = np.bincount((index @ (BINS**2, BINS, 1)).ravel(), minlength=BINS**3)
    return counts / counts.sum()


def _begins(pixels: Sequence[float], colours: Sequence[float], number: int) -> bool:
    """Whether a frame begins a shot, by its change and those around it."""
    if number == 0 or colours[number] <= COLOURS:
        return False
    others = [*pixels[max(1, number - AROUND) : number], *pixels[number + 1 : number + 1 + AROUND]]
    usual = float(np.median(others)) if others else 0.0
    return pixels[number] > max(LEAST, OUTSTANDING * usual)
