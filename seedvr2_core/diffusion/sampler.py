"""From noise to a clean latent along the predicted velocity. One step is the common case.

The model is a callable; nothing here knows what computes the velocity.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from torch import Tensor

from .schedule import to_data, to_noise, trailing_times

# (point b c t h w, time 0..1) -> velocity of the same shape
Velocity = Callable[[Tensor, float], Tensor]


def sample(velocity: Velocity, noise: Tensor, steps: int = 1) -> Tensor:
    """Clean latent reached from `noise` in Euler steps over trailing times. One step is noise - v(noise, 1).

    Args:
        velocity: the model.
        noise: b c t h w, unit Gaussian, fp32 (the path is kept in its type).
        steps: model calls; SeedVR2 was distilled to 1.
    """
    times = [*trailing_times(steps), 0.0]
    x = noise
    for u, to in pairwise(times):
        v = velocity(x, u).to(x.dtype)
        data = to_data(x, v, u)
        x = data if to == 0 else (1 - to) * data + to * to_noise(x, v, u)
    return x


def guide(positive: Tensor, negative: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: negative + scale (positive - negative)."""
    return negative + scale * (positive - negative)
