"""What the published script and the community node do where the engine does otherwise; golden files hold their
results.
"""

# Time is axis 0 of clips here   H W height and width

from __future__ import annotations

import math

import torch
from torch import Tensor

from seedvr2_core.video.geometry import CLIP_MULTIPLE, LATENT_FRAMES, padded_length


def area_size(rows: int, columns: int, height: int, width: int) -> tuple[int, int]:
    """Height and width with about as many pixels as rows x columns, in the proportions of a frame height x width. The
    published script's way, with 720 x 1280."""
    # The square root is squared again because the script does; it decides some roundings.
    factor = math.sqrt(((rows * columns) ** 0.5) ** 2 / (height * width))
    return round(height * factor), round(width * factor)


def centre_crop(clip: Tensor, multiple: int = CLIP_MULTIPLE) -> Tensor:
    """The middle of ... H W, cut down to multiples. The published script's way; it loses up to 15 rows and columns."""
    height, width = clip.shape[-2:]
    h, w = height - height % multiple, width - width % multiple
    top, left = round((height - h) / 2), round((width - w) / 2)
    return clip[..., top : top + h, left : left + w]


def repeat_last_indices(frames: int, ranks: int = 1) -> list[int]:
    """Frame numbers that lengthen a clip to what the published script needs, holding the last frame.

    Args:
        ranks: sequence-parallel processes the clip is spread over; each needs a whole latent frame.
    """
    return [*range(frames), *[frames - 1] * (padded_length(frames, LATENT_FRAMES * ranks) - frames)]


def batches(frames: int, length: int, overlap: int) -> list[tuple[int, int]]:
    """Spans (start, stop) of `length` frames that cover a clip, each sharing `overlap` frames with the one before; the
    last is shorter but always brings something new. The node's batches."""
    starts = range(0, max(frames - overlap, 1), length - overlap)
    return [(start, min(start + length, frames)) for start in starts]


def plateau_cosine_weights(overlap: int) -> Tensor:
    """Weight of the later chunk as the community node has it: 0, a cosine in the middle third, 1.

    Two frames switch hard and one keeps the earlier chunk, so `linear_weights` is what we use.
    """
    if overlap < 3:
        return torch.arange(overlap).float()
    ramp = (3 * torch.arange(overlap) / (overlap - 1) - 1).clamp(0, 1)
    return 0.5 - 0.5 * torch.cos(math.pi * ramp)
