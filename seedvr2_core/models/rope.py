"""Rotary position embedding of queries and keys, in the two published kinds.

Angles are always computed here, in fp32, from the formulas: checkpoints carry the frequencies as a buffer, but rounded
to their own precision (in fp8 an angle would be off by radians).

    n tokens   m pairs of channels   heads, d attention heads and their width
"""

from __future__ import annotations

import math
from typing import Literal

import torch
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


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate adjacent pairs of the first 2m channels of x (n heads d) by n m angles given as cosine and sine.

    Computed in fp32 and returned in the type of x: angles reach 400 radians.
    """
    turned, rest = x.split([2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]], dim=-1)
    even, odd = turned.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
    return torch.cat([turned.to(x.dtype), rest], dim=-1)


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
