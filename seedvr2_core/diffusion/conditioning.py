"""What goes into the transformer beside the noisy latent: the degraded latent, its mask, and noise.

    b clips   c channels   t h w latent frames, height, width
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .schedule import interpolate, shift, shift_factor


def frame_noise(seed: int, start: int, count: int, channels: int, h: int, w: int) -> Tensor:
    """Unit Gaussian noise c t h w of latent frames start..start+count-1 of a clip, fp32 on the CPU.

    Every latent frame has a stream of its own, drawn from (seed, frame). However a clip is cut into chunks, a frame
    meets the same noise, on every device.

    Args:
        seed: any integer; its lowest 64 bits count.
    """
    # A list with a seed of 2**63 or more would pass through float64 and lose its lowest bits.
    keys = [np.array([seed % 2**64, frame], np.uint64) for frame in range(start, start + count)]
    generators = [np.random.Generator(np.random.Philox(key=key)) for key in keys]
    frames = [generator.standard_normal((channels, h, w), np.float32) for generator in generators]
    return torch.from_numpy(np.stack(frames, axis=1))


def with_mask(latent: Tensor) -> Tensor:
    """The condition b 17 t h w of a degraded latent b 16 t h w: for restoration, the mask says "known" everywhere."""
    return torch.cat([latent, torch.ones_like(latent[:, :1])], dim=1)


def augment(latent: Tensor, noise: Tensor, level: float) -> Tensor:
    """Noise a degraded latent b c t h w, which makes the model trust it less.

    Args:
        noise: unit Gaussian, of the latent's shape.
        level: 0..1 before the resolution-dependent shift. SeedVR2 was published with 0, SeedVR with 0.1.

    The shift takes the latent's (t, h, w). The published script passes (h, w, c) instead, which at any level but 0
    gives more noise on short clips; ours is what the formula means.
    """
    if level == 0:
        return latent
    return interpolate(latent, noise, shift(level, shift_factor(*latent.shape[2:])))
