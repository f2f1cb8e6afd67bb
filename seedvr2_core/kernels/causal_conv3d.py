"""The causal convolution of the autoencoder as an implicit matrix product over channels-last frames.

Nothing is copied on the way in: the frames before a slice are the first frames of the input buffer, and the zeros
around a frame are made up as it is read. Bias, residual and the statistics for the norm that follows are added on the
way out. The reference defines the answer: fp32 inside, one rounding at the end.

    b clips   c_in, c_out channels   k taps in time, 1 to 3   t h w frames out, height, width   groups of channels
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from .group_norm import Moments, group_statistics, reference_statistics

# How inputs reach the tensor cores. "descriptors": the copy engine of Hopper and later reads boxes of a tensor, with
# zeros beyond its edges. "pointers": every thread computes addresses; any GPU.
Loads = Literal["descriptors", "pointers"]


@dataclass(frozen=True, kw_only=True)
class Tile:
    """What one program computes, `rows` x `columns` x `channels`, and how."""

    loads: Loads
    rows: int  # of a frame
    columns: int
    channels: int  # out
    depth: int  # input channels multiplied in one go
    warps: int
    stages: int  # loads in flight

    @property
    def name(self) -> str:
        return f"{self.loads} {self.rows}x{self.columns}x{self.channels} by {self.depth}"


# All there is to choose from: a first run compiles three kernels for a convolution at most. Shared memory in the notes
# is for 16-bit inputs.
TILES = (
    # Two warpgroups, 192 KiB of the 227 that a Hopper block may have: the fewest bytes read for each product.
    Tile(loads="descriptors", rows=16, columns=16, channels=128, depth=64, warps=8, stages=4),
    # 96 KiB, so two blocks share a multiprocessor and one computes while the other stores. Wins where sums are short.
    Tile(loads="descriptors", rows=8, columns=16, channels=128, depth=64, warps=4, stages=3),
    # 64 KiB, which fits the 99 of compute capability 8.6 and 8.9.
    Tile(loads="pointers", rows=8, columns=16, channels=128, depth=32, warps=8, stages=4),
    # Few outputs, as in the convolution to RGB: the tile is no wider than a tensor core's.
    Tile(loads="pointers", rows=16, columns=16, channels=16, depth=32, warps=4, stages=3),
)


def tiles(capability: tuple[int, int], c_in: int, c_out: int) -> list[Tile]:
    """The tiles worth trying for a convolution on a GPU of this compute capability; none: leave it to the library."""
    if c_in < 16:
        # A matrix product over three colours would be mostly padding.
        return []
    few = c_out <= 16
    return [
        tile
        for tile in TILES
        if (tile.channels == 16) == few
        and (tile.loads == "pointers" or (capability >= (9, 0) and c_in % tile.depth == 0))
    ]


def causal_conv3d(
    x: Tensor, weight: Tensor, tile: Tile, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """Convolution with stride 1, no padding in time and one zero on every side in space, + bias + residual.

    Args:
        x: b c_in (t+k-1) h w, channels-last frames: the frames before the slice, then the slice.
        weight: c_out c_in k 3 3. Keep it in memory format channels_last_3d, or it is copied on every call.
        tile: of `tiles`.
        bias: c_out.
        residual: b c_out t h w, channels-last frames.

    Returns:
        b c_out t h w, in the type of x.
    """
    from .triton_causal_conv3d import run

    return run(x, weight, tile, bias, residual)


def causal_conv3d_with_statistics(
    x: Tensor,
    weight: Tensor,
    tile: Tile,
    groups: int,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Moments]:
    """`causal_conv3d`, and the moments of what is stored for a GroupNorm that follows."""
    from .triton_causal_conv3d import run_with_statistics

    width = weight.shape[0] // groups
    if width & (width - 1) or width > tile.channels:
        # Groups that a tile does not hold whole.
        out = causal_conv3d(x, weight, tile, bias, residual)
        return out, group_statistics(out, groups)
    return run_with_statistics(x, weight, tile, groups, bias, residual)


def reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    y = F.conv3d(x.float(), weight.float(), None if bias is None else bias.float(), padding=(0, 1, 1))
    return (y if residual is None else y + residual.float()).to(x.dtype)


def reference_with_statistics(
    x: Tensor, weight: Tensor, groups: int, bias: Tensor | None = None, residual: Tensor | None = None
) -> tuple[Tensor, Moments]:
    y = reference(x, weight, bias, residual)
    return y, reference_statistics(y, groups)
