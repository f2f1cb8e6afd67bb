"""What the steps of the fast autoencoder pass to each other, and how the taps of a convolution meet it.

    a frame is b c h w, in channels-last memory   t frames that follow each other
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

Frames = list[Tensor]


class Taps(Protocol):
    """How the taps of a convolution meet frames; all are padded by one row and column."""

    def moving(self, frames: Frames) -> Frames:
        """The results at the last n of n + 2 frames; or, of an upsampler, the one result of all frames."""


class ThreeTaps(Taps, Protocol):
    def still(self, frame: Tensor) -> Tensor:
        """The result at a frame before which it was always the same."""


def stacked(frames: Frames) -> Tensor:
    """b c t h w, every frame in channels-last memory."""
    b, c, h, w = frames[0].shape
    out = frames[0].new_empty(b, len(frames), h, w, c).permute(0, 4, 1, 2, 3)
    return torch.stack(frames, dim=2, out=out)
