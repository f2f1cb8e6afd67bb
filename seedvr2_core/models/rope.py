"""Rotary position embedding of queries and keys, in the two published kinds.

Angles are always computed here, in fp32, from the formulas: checkpoints carry the frequencies as a buffer, but rounded
to their own precision (in fp8 an angle would be off by radians).

    n tokens   m pairs of channels   heads, d attention heads and their width
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..video.geometry import Grid

# "video_text" (3B): whole positions, text rotated too, time counted on from the last text token.
# "video" (7B): positions -1..1 across the window, text not rotated.
RopeKind = Literal["video_text", "video"]


def frequencies(kind: RopeKind, head_dim: int) -> Tensor:
    """Frequencies of one axis; time, height and width have the same."""
    if kind == "video_text":
        channels = head_dim // 3
        # The reciprocal of a power, not a negative power: bit for bit what published checkpoints hold.
        return 1 / 10000.0 ** (torch.arange(0, channels // 2 * 2, 2, dtype=torch.float32) / channels)
    count = head_dim // 2 // 3 // 2
    return math.pi * torch.linspace(1, 128, count, dtype=torch.float32)


def video_angles(kind: RopeKind, head_dim: int, window: Grid, text_length: int) -> Tensor:
    """Angles n m of the tokens of one window, row-major (t, h, w).

    Args:
        window: size of the window, in tokens.
        text_length: tokens of the sample's text.
    """
    if kind == "video_text":
        axes = [torch.arange(length, dtype=torch.float32) for length in window]
        axes[0] += text_length
    else:
        # A window of one token has its only position at -1, not at 0. linspace rounds as the published code does; with
        # frequencies of up to 402 the last bit of a position shows in the output.
        axes = [torch.linspace(-1, 1, length) for length in window]
    return _angles(torch.cartesian_prod(*axes), frequencies(kind, head_dim))


def text_angles(kind: RopeKind, head_dim: int, text_length: int) -> Tensor | None:
    """Angles l m of text tokens, or None where text is not rotated."""
    if kind == "video":
        return None
    positions = torch.arange(text_length, dtype=torch.float32)[:, None].expand(-1, 3)
    return _angles(positions, frequencies(kind, head_dim))


def _angles(positions: Tensor, freqs: Tensor) -> Tensor:
    return (positions[:, :, None] * freqs).flatten(1)


class Turns(NamedTuple):
    """The rotation of a run of equal sequences, as large as one of them."""

    count: int  # sequences
    factors: Tensor  # l d/2 complex, of one sequence, see `factors`


def window_factors(kind: RopeKind, head_dim: int, window: Grid, text_length: int) -> Tensor:
    """Factors l d/2 of the tokens of a window and of the text after them."""
    video = video_angles(kind, head_dim, window, text_length)
    text = text_angles(kind, head_dim, text_length)
    return factors(torch.cat([video, video.new_zeros(text_length, video.shape[1]) if text is None else text]), head_dim)


def factors(angles: Tensor, head_dim: int) -> Tensor:
    """Complex numbers n d/2 whose products with pairs of channels rotate the first m of them; the others keep still."""
    angles = F.pad(angles, (0, head_dim // 2 - angles.shape[1]))
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: Tensor, turns: Sequence[Turns]) -> Tensor:
    """Rotate adjacent pairs of channels of x, l heads d, run after run of equal sequences.

    Computed in fp32 and returned in the type of x: angles reach 400 radians. Where x needs no gradient, the result lies
    in its memory.
    """
    runs = x.split([count * len(factors) for count, factors in turns])
    rotated = [
        _rotate(run.unflatten(0, (count, -1)), factors[:, None]).flatten(0, 1)
        for run, (count, factors) in zip(runs, turns, strict=True)
    ]
    return torch.cat(rotated) if x.requires_grad else x


def _rotate(x: Tensor, factors: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
    if x.requires_grad:
        return torch.view_as_real(pairs * factors).flatten(-2).to(x.dtype)
    pairs.mul_(factors)
    return x if wide is x else x.copy_(wide)


class _Frequencies(nn.Module):
    def __init__(self, kind: RopeKind, head_dim: int):
        super().__init__()
        self.register_buffer("freqs", frequencies(kind, head_dim))


class RopeBuffer(nn.Module):
    """Holds the place of `rope.rope.freqs` in a checkpoint. Nothing reads it; see the top of this file."""

    def __init__(self, kind: RopeKind, head_dim: int):
        super().__init__()
        self.rope = _Frequencies(kind, head_dim)

    def reset(self, kind: RopeKind, head_dim: int) -> None:
        """Put the exact frequencies back, whatever was loaded."""
        self.rope.freqs = frequencies(kind, head_dim).to(self.rope.freqs.device)
