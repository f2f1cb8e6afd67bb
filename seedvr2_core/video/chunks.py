"""Where a long clip is cut in time, and how overlapping chunks become one clip again."""

#    c t h w latent channels, frames, height, width

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

# Latents that two neighbouring chunks share and blend.
OVERLAP = 2


def overlapping(latents: Iterable[tuple[Tensor, bool]], length: int) -> Iterator[tuple[int, Tensor, bool]]:
    """Gather latents into chunks that share OVERLAP of them with the chunk before.

    The last chunk reaches back as far as it takes to be as long as the others, so no chunk is too short to see motion.

    Args:
        latents: c t h w, pieces of any length, each with whether it is the last.
        length: latents in a chunk, more than OVERLAP.

    Yields:
        The index of a chunk's first latent, the chunk c t h w, and whether it is the last.
    """
    held, first, start = None, 0, 0  # `held` begins at latent `first`, the next chunk at `start`
    for latent, last in latents:
        held = latent if held is None else torch.cat([held, latent], dim=1)
        end = first + held.shape[1]
        # More than a full chunk is there, so this one cannot be the last.
        while end - start > length:
            yield start, held[:, start - first : start - first + length], False
            start += length - OVERLAP
            keep = max(first, end - length)
            held, first = held[:, min(keep, start) - first :], min(keep, start)
        if last:
            start = max(first, end - length)
            yield start, held[:, start - first :], True


def linear_weights(overlap: int) -> Tensor:
    """Weight of the later chunk in each overlapping frame, a straight ramp that never quite reaches 0 or 1."""
    return torch.arange(1, overlap + 1) / (overlap + 1)


def crossfade(previous_tail: Tensor, current_head: Tensor) -> Tensor:
    """Blend the frames two chunks share by `linear_weights`, in the dtype given.

    Args:
        previous_tail: the last frames of the earlier chunk; axis 0 is time.
        current_head: the first frames of the later chunk, of the same shape.
    """
    weights = linear_weights(len(current_head)).to(current_head.device).view(-1, *[1] * (current_head.dim() - 1))
    # fp32: in half precision a slow fade moves in visible steps.
    return torch.lerp(previous_tail.float(), current_head.float(), weights).to(current_head.dtype)
