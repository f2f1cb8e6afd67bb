"""Where a film cuts from one shot to the next, so that no training clip contains a cut."""
# T H W c frames as decoded, uint8

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

# Side of the thumbnails that are compared, and how finely their colours are counted.
THUMBNAIL, BINS = 24, 8
# A cut changes this share of the colours, and changes pixels this many times as much as the frames around it do. Fast
# motion and flashes fulfil one of the two, rarely both.
COLOURS, OUTSTANDING = 0.25, 3.0
# In codes of 255: less is never a cut.
LEAST = 8.0
# Frames on either side that a change has to stand out from.
AROUND = 4


def scene_cuts(frames: np.ndarray) -> list[int]:
    """Numbers of the frames that begin a new shot; the first frame is none of them."""
    small = np.stack([thumbnail(frame) for frame in frames]).astype(np.float32)
    if len(small) < 2:
        return []
    pixels = np.abs(np.diff(small, axis=0)).mean(axis=(1, 2, 3))
    histograms = np.stack([_histogram(frame) for frame in small])
    colours = np.abs(np.diff(histograms, axis=0)).sum(axis=1) / 2
    return [i + 1 for i in range(len(pixels)) if colours[i] > COLOURS and _stands_out(pixels, i)]


def split_shots(frames: np.ndarray, cuts: Sequence[int]) -> list[np.ndarray]:
    """The shots of a clip, as views."""
    edges = [0, *cuts, len(frames)]
    return [frames[start:stop] for start, stop in pairwise(edges)]


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
    index = (frame / 256 * BINS).astype(int)
    counts = np.bincount((index @ (BINS**2, BINS, 1)).ravel(), minlength=BINS**3)
    return counts / counts.sum()


def _stands_out(changes: np.ndarray, i: int) -> bool:
    others = np.concatenate([changes[max(0, i - AROUND) : i], changes[i + 1 : i + 1 + AROUND]])
    usual = np.median(others) if len(others) else 0.0
    return changes[i] > max(LEAST, OUTSTANDING * usual)
