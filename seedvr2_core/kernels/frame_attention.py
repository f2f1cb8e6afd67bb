"""Attention over the positions of a frame, with a single head as wide as the features: 512 channels.

Flash kernels of the libraries stop at heads of 256 channels. Here a program keeps all channels of its queries, so no
scores leave it. The reference defines the answer: fp32 inside, one rounding at the end.

    n frames   l positions of a frame   c channels
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# A program has this many channels of its queries in registers.
MAX_CHANNELS = 512
# Compute capabilities where a block may have more than 99 KiB of shared memory: those of data centres.
ROOMY = ((8, 0), (8, 7), (9, 0), (10, 0), (10, 3))


@dataclass(frozen=True, kw_only=True)
class Tile:
    """What one program of an attention kernel computes: `queries` positions, `keys` at a time."""

    queries: int
    keys: int
    warps: int
    stages: int  # loads in flight

    @property
    def name(self) -> str:
        return f"{self.queries}x{self.keys}, {self.stages} stages"


# Shared memory in the notes is for 16 bits and 512 channels.
TILES = (
    # Two warpgroups, each with half of the channels of the result; 192 KiB on Hopper, 132 before.
    Tile(queries=64, keys=32, warps=8, stages=2),
    # Keys and values ahead; 160 KiB on Hopper.
    Tile(queries=64, keys=16, warps=8, stages=3),
    # Half as many rounds, in which nothing is loaded ahead; 128 KiB on Hopper, 136 before.
    Tile(queries=64, keys=64, warps=8, stages=1),
    # Fits the 99 KiB of compute capability 8.6 and 8.9.
    Tile(queries=32, keys=32, warps=4, stages=1),
)


def tiles(capability: tuple[int, int], channels: int) -> tuple[Tile, ...]:
    """The tiles worth trying for this width on a GPU of this compute capability; none: leave it to the library."""
    if channels > MAX_CHANNELS:
        return ()
    return TILES if capability in ROOMY else TILES[-1:]


def attend(q: Tensor, k: Tensor, v: Tensor, tile: Tile) -> Tensor:
    """softmax(q k^T / sqrt(c)) v of every frame: n l c in and out."""
    from .triton_frame_attention import run

    return run(q, k, v, tile)


def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q.float() @ k.float().transpose(1, 2) / q.shape[-1] ** 0.5
    return torch.matmul(scores.softmax(-1), v.float()).to(q.dtype)
