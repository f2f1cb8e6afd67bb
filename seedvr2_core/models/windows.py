"""Attention windows: how large they are, where they lie, and which tokens they hold.

    t h w a token grid: latent frames, and 2 x 2 cells of latent positions   n tokens of a grid, row-major (t, h, w)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from ..errors import SettingError
from ..video.geometry import Grid


class Span(NamedTuple):
    """Tokens start..stop-1 along one axis."""

    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class WindowConfig:
    """How windows follow from the size of a clip."""

    splits: Annotated[Grid, "windows along time, height and width of a clip of the training area"] = Grid(4, 3, 3)
    # A token covers 16 x 16 pixels, so this is 1280 x 720.
    train_area: Annotated[tuple[int, int], "height and width, in tokens"] = (45, 80)
    max_t: Annotated[int, "latent frames; a longer clip gets more windows along time, not longer ones"] = 30
    # The rule of the first SeedVR, to compare with: every clip is cut into windows of this size, whatever its own.
    size: Annotated[Grid | None, "tokens; none: adaptive, as the others say"] = None

    def __post_init__(self) -> None:
        if self.size is not None and min(self.size) < 1:
            raise SettingError(
                f"A window of {' x '.join(map(str, self.size))} tokens holds nothing; give at least 1 along time, "
                "height and width, or none for windows that follow the size of a clip."
            )


def window_size(grid: Grid, config: WindowConfig) -> Grid:
    """Size of a full window.

    An adaptive window is as large as it would be if the frame were scaled to the training area at its own aspect ratio.
    A larger frame therefore gets more windows, not larger ones, and meets the sizes the model was trained on.

    Source: SeedVR2, arXiv 2506.05301, eq. 1 and 2. As in the released model, the scaled sides are rounded to whole
    tokens (ties to even), and frames smaller than the training area are scaled up too.
    """
    if config.size is not None:
        return config.size
    scale = math.sqrt(config.train_area[0] * config.train_area[1] / (grid.h * grid.w))
    return Grid(
        math.ceil(min(grid.t, config.max_t) / config.splits.t),
        math.ceil(round(grid.h * scale) / config.splits.h),
        math.ceil(round(grid.w * scale) / config.splits.w),
    )


def spans(length: int, window: int, shifted: bool) -> list[Span]:
    """Cut one axis into windows; shifted ones start with half a window. The rest at either end stays small: nothing is
    padded, wrapped around or masked. An axis that one window covers is never cut."""
    if shifted and window < length:
        cuts = [(2 * j + 1) * window // 2 for j in range(length // window + 1)]
    else:
        cuts = range(window, length, window)
    edges = [0, *(cut for cut in cuts if 0 < cut < length), length]
    return [Span(*pair) for pair in pairwise(edges)]


def windows(grid: Grid, config: WindowConfig, shifted: bool) -> list[tuple[Span, Span, Span]]:
    """All windows of a grid as (t, h, w) spans, width outermost and time innermost."""
    size = window_size(grid, config)
    t, h, w = (spans(length, window, shifted) for length, window in zip(grid, size, strict=True))
    return [(a, b, c) for c, b, a in product(w, h, t)]


def window_tokens(grid: Grid, config: WindowConfig, shifted: bool) -> tuple[Tensor, list[Grid]]:
    """Which tokens each window holds.

    Returns:
        order: n, the row-major index of every token, window after window.
        shapes: the size of every window.
    """
    index = torch.arange(math.prod(grid)).view(grid)
    order, shapes = [], []
    for t, h, w in windows(grid, config, shifted):
        order.append(index[t.start : t.stop, h.start : h.stop, w.start : w.stop].reshape(-1))
        shapes.append(Grid(t.stop - t.start, h.stop - h.start, w.stop - w.start))
    return torch.cat(order), shapes
