"""The straight path between data and noise, and where on it a model is asked.

Time u is 0..1, 1 being pure noise (1000 in the papers). Tensors are latents of any shape.
"""

from __future__ import annotations

from torch import Tensor

from ..video.geometry import LATENT_FRAMES, LATENT_PIXELS

# Pixels (times frames, for clips) at which the shift has the two values named: images, then clips.
IMAGE_ANCHORS = ((256 * 256, 1.0), (1024 * 1024, 3.2))
CLIP_ANCHORS = ((256 * 256 * 37, 1.0), (1280 * 720 * 145, 5.0))


def interpolate(data: Tensor, noise: Tensor, u: float | Tensor) -> Tensor:
    """The point x_u = (1 - u) data + u noise."""
    return (1 - u) * data + u * noise


def velocity(data: Tensor, noise: Tensor) -> Tensor:
    """What a model predicts along the whole path: noise - data."""
    return noise - data


def to_data(x: Tensor, v: Tensor, u: float | Tensor) -> Tensor:
    """The end of the path at u = 0, seen from x at u with velocity v."""
    return x - u * v


def to_noise(x: Tensor, v: Tensor, u: float | Tensor) -> Tensor:
    """The end of the path at u = 1, seen from x at u with velocity v."""
    return x + (1 - u) * v


def trailing_times(steps: int) -> list[float]:
    """Times of the model calls of an n-step sampler: 1, 1 - 1/n, ..., 1/n. Built by index, so it has n entries."""
    return [1 - i / steps for i in range(steps)]


def shift_factor(t: int, h: int, w: int) -> float:
    """How strongly times are shifted towards noise for a latent of t frames and h x w positions.

    1 for a 256 x 256 image and 3.2 for 1024 x 1024; 1 for 37 frames of 256 x 256 and 5 for 145 frames of 1280 x 720; a
    straight line in the number of pixels, not clamped. Used for the noise level of the condition, never for the
    sampling times.
    """
    frames = LATENT_FRAMES * (t - 1) + 1
    pixels = h * w * LATENT_PIXELS**2
    (x0, y0), (x1, y1) = IMAGE_ANCHORS if frames == 1 else CLIP_ANCHORS
    return y0 + (pixels * frames - x0) * (y1 - y0) / (x1 - x0)


def shift(u: float | Tensor, factor: float) -> float | Tensor:
    """Move time u towards noise by a factor; 0 and 1 stay where they are."""
    return factor * u / (1 + (factor - 1) * u)
