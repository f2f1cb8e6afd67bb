"""Where a long clip is cut in time, and how overlapping chunks become one clip again."""

# Time is axis 0 of what is cross-faded: T C H W or T H W C

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import SettingError


def split(frames: int, length: int, overlap: int = 0) -> list[tuple[int, int]]:
    """Spans (start, stop) that cover a clip, each sharing `overlap` frames with the one before.

    All are `length` frames long but the last, which is shorter but always brings something new.

    Args:
        frames: length of the clip.
        length: longest span, in frames.
        overlap: frames two neighbours share; below `length`, else SettingError.
    """
    if not 0 <= overlap < length:
        raise SettingError(f"Chunks of {length} frames cannot overlap by {overlap}; "
                           "the overlap must be zero or more and shorter than the chunk.")
    starts = range(0, max(frames - overlap, 1), length - overlap)
    return [(start, min(start + length, frames)) for start in starts]


def linear_weights(overlap: int) -> Tensor:
    """Weight of the later chunk in each overlapping frame, a straight ramp that never quite reaches 0 or 1."""
    return torch.arange(1, overlap + 1) / (overlap + 1)


def plateau_cosine_weights(overlap: int) -> Tensor:
    """Weight of the later chunk as the community node has it: 0, a cosine in the middle third, 1.

    Two frames switch hard and one keeps the earlier chunk, so `linear_weights` is what we use.
    """
    if overlap < 3:
        return torch.arange(overlap).float()
    ramp = (3 * torch.arange(overlap) / (overlap - 1) - 1).clamp(0, 1)
    return 0.5 - 0.5 * torch.cos(math.pi * ramp)


def crossfade(previous_tail: Tensor, current_head: Tensor, weights: Tensor | None = None) -> Tensor:
    """Blend the frames two chunks share, in the dtype given.

    Args:
        previous_tail: the last frames of the earlier chunk; axis 0 is time.
        current_head: the first frames of the later chunk, of the same shape.
        weights: share of the later chunk per frame, 0..1; `linear_weights` if not given.
    """
    if weights is None:
        weights = linear_weights(len(current_head))
    weights = weights.to(current_head.device).view(-1, *[1] * (current_head.dim() - 1))
    # fp32: in half precision a slow fade moves in visible steps.
    return torch.lerp(previous_tail.float(), current_head.float(), weights).to(current_head.dtype)
